"""Writers and notaries that are killed at their n-th system call. `python killed.py` forks them, one at a time.

A fork costs nothing beside an interpreter's start, and each child is stopped before its first step, until strace waits
for its n-th call.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CALLS = {"sqlite": "pwrite64,fdatasync,unlink,ftruncate", "postgresql": "sendto"}


class Nursery:
    """A process that forks children which append, or append and notarise, until they are killed."""

    def __init__(self, url: str, directory: Path, key: str) -> None:
        if shutil.which("strace") is None:
            pytest.skip("strace is not installed: run `make setup`")
        self._calls = CALLS["sqlite" if url.startswith("sqlite") else "postgresql"]
        self._process = subprocess.Popen(
            [sys.executable, __file__, url, str(directory), key], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def kill_one(self, kind: str, number: int) -> tuple[int, list[str]]:
        """Start a child, kill it at this call; its exit status as `waitpid` has it, and the receipts it gave out."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{kind}\n".encode())
        self._process.stdin.flush()
        pid = int(self._process.stdout.readline())
        wait_until(pid, "State:\tT")
        inject = f"inject={self._calls}:signal=KILL:when={number}"
        tracer = subprocess.Popen(
            ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={self._calls}", "-e", inject, "-p", str(pid)],
            stderr=subprocess.PIPE,
        )
        assert tracer.stderr is not None
        wait_until(pid, f"TracerPid:\t{tracer.pid}")
        os.kill(pid, signal.SIGCONT)
        receipts = []
        for line in self._process.stdout:
            if line.startswith(b"ended "):
                tracer.wait(60)
                tracer.stderr.close()
                return int(line.split()[1]), receipts
            if line.endswith(b";\n") and line.startswith(b"log="):  # the last line may have been cut
                receipts.append(line[:-2].decode())
        raise AssertionError("the nursery ended")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


@contextmanager
def nursery(url: str, directory: Path, key: str) -> Iterator[Nursery]:
    """A nursery for the block."""
    made = Nursery(url, directory, key)
    try:
        yield made
    finally:
        made.close()


def wait_until(pid: int, line: str) -> None:
    """Until the kernel says so of a process."""
    deadline = time.monotonic() + 60
    while line not in Path(f"/proc/{pid}/status").read_text():
        if time.monotonic() > deadline:
            pytest.skip(f"no {line!r} of a child: strace cannot attach here")
        time.sleep(0.005)


async def _work(kind: str, url: str, directory: Path, key: str) -> None:
    from audit_lab import ORIGIN, Lab, now, op

    from audit.notary import Notary

    lab = Lab(directory, url=url, key=bytes.fromhex(key), make=False)
    writer = lab.writer()
    await writer.start()
    notary = Notary(lab.engine, origin=ORIGIN, signer=lab.signer, clock=now)
    while True:
        for receipt in await asyncio.gather(*(writer.append(op(f"t{i}")) for i in range(4))):
            os.write(1, f"{receipt.header()};\n".encode())
        if kind == "notary":
            notary.round(1, lambda _: None)


def _fork(kind: str, arguments: list[Any]) -> None:
    pid = os.fork()
    if pid == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
        try:
            asyncio.run(_work(kind, *arguments))
        finally:
            os._exit(1)
    os.write(1, f"{pid}\n".encode())
    _, status = os.waitpid(pid, 0)
    os.write(1, f"\nended {status}\n".encode())


if __name__ == "__main__":
    sys.path[:0] = [str(parent) for parent in Path(__file__).parents[:3]]  # this folder, the tests, the product
    import audit_lab  # noqa: F401 - before the forks, which then have it

    import audit.notary  # noqa: F401 - as above

    for asked in sys.stdin:
        _fork(asked.strip(), [sys.argv[1], Path(sys.argv[2]), sys.argv[3]])
