"""A writer in a process of its own, so that faults hit it and not the test. `python writing.py` is that process.

It appends without end and tells what it was told, one JSON line for each append, until SIGTERM.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

TASKS = 8


@dataclass(frozen=True)
class Told:
    """One append: begun at and took (s), and its receipt, or why it was refused."""

    begun: float
    took: float
    receipt: str | None
    refused: str | None


@dataclass
class Writing:
    """The process, and what it told so far."""

    process: subprocess.Popen[bytes]
    told: list[Told] = field(default_factory=list)

    def read(self, stdout: IO[bytes]) -> None:
        for line in stdout:
            with contextlib.suppress(ValueError):  # killed in the middle of a line
                self.told.append(Told(**json.loads(line)))

    @property
    def receipts(self) -> list[str]:
        return [t.receipt for t in self.told if t.receipt is not None]

    def wait(self, wanted: Callable[[Told], bool], *, timeout: float) -> Told:
        """The first thing told that is wanted."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            found = next((t for t in list(self.told) if wanted(t)), None)
            if found is not None:
                return found
            assert self.process.poll() is None, "the writer ended"
            time.sleep(0.02)
        raise AssertionError(f"not within {timeout} s; the last: {self.told[-3:]}")


@contextlib.contextmanager
def writing(url: str, directory: Path, key: str, *, under: Sequence[str] = (), check: bool = True) -> Any:
    """A writer at work for the block; it must end in order, unless not `check`."""
    command = [*under, sys.executable, __file__, url, str(directory), key]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    with (directory / "writing.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment)
    assert process.stdout is not None
    made = Writing(process)
    reader = threading.Thread(target=made.read, args=(process.stdout,))
    reader.start()
    try:
        yield made
        process.terminate()
        status = process.wait(60)
        assert not check or status == 0, (directory / "writing.log").read_text()[-3_000:]
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stdout.close()


async def _append(writer: Any, stop: asyncio.Event) -> None:
    from audit_lab import op

    from audit.log import Unavailable

    while not stop.is_set():
        begun, receipt, refused = time.monotonic(), None, None
        try:
            receipt = (await writer.append(op())).header()
        except Unavailable as error:
            refused = str(error)
        told = {"begun": begun, "took": time.monotonic() - begun, "receipt": receipt, "refused": refused}
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()
        await asyncio.sleep(0.01 if refused is None else 0.05)


async def _main(url: str, directory: Path, key: str) -> None:
    from audit_lab import Lab

    lab = Lab(directory, url=url, key=bytes.fromhex(key), make=False)
    writer = lab.writer(deadline_s=2.0)
    await writer.start()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await asyncio.gather(*(_append(writer, stop) for _ in range(TASKS)))
    await writer.close()


if __name__ == "__main__":
    sys.path[:0] = [str(parent) for parent in Path(__file__).parents[:3]]  # this folder, the tests, the product
    asyncio.run(_main(sys.argv[1], Path(sys.argv[2]), sys.argv[3]))
