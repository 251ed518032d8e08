"""System calls of a running process, seen or bent by strace."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def straced(pid: int, calls: str, *options: str, into: str | Path = "/dev/null") -> Iterator[None]:
    """For the block, these calls of a process and its threads are traced into a file. Skips where strace cannot attach."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed: run `make setup`")
    command = [strace, "-f", "-qq", "-o", str(into), "-e", f"trace={calls}", *options, "-p", str(pid)]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE)
    assert tracer.stderr is not None
    try:
        deadline = time.monotonic() + 60
        while f"TracerPid:\t{tracer.pid}\n" not in Path(f"/proc/{pid}/status").read_text():
            if tracer.poll() is not None:
                pytest.skip(f"strace cannot attach here: {tracer.stderr.read().decode()}")
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield
    finally:
        tracer.terminate()
        tracer.wait(60)
        tracer.stderr.close()
