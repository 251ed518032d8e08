"""Where the workers of a node keep their metrics, so that each of them can answer for all (docs/adr/0008).

Every worker has a seat: a number, and files of that number in which prometheus_client keeps its values. The next worker
in a seat counts on from them, so what a killed worker has counted stays, and there are never more files than workers.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry, values
from prometheus_client.multiprocess import MultiProcessCollector

# Memory: a worker that counts in a file of a disk waits whenever that disk writes the page back.
_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - mkdtemp makes a directory of our own in it
_PREFIX: Final = "skms-metrics-"
_VARIABLE: Final = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client knows the directory by it alone
_COUNTED: Final = ("counter", "histogram")
_LIVE: Final = ("gauge_livemin", "gauge_livemax", "gauge_livesum")  # what is so of workers that live
_SIZE: Final = 1 << 20


class Seats:
    """The seats of a supervisor's workers."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._taken: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, command: Sequence[str], fds: Sequence[int]) -> subprocess.Popen[bytes]:
        """A worker in a free seat. OSError if there is no memory for what it counts."""
        self.clear()
        seat = next(n for n in itertools.count() if n not in self._taken)
        for kind in (*_COUNTED, *_LIVE):
            # All of it now: a write to a part that is not there yet ends the writer (SIGBUS) if memory has run out.
            with (self.directory / f"{kind}_{seat}.db").open("ab") as file:
                os.posix_fallocate(file.fileno(), 0, _SIZE)
        placed = [*command, "--metrics", str(self.directory), "--seat", str(seat)]
        self._taken[seat] = subprocess.Popen(placed, pass_fds=tuple(fds))
        return self._taken[seat]

    def clear(self) -> None:
        """Forget what was so of workers that have ended, and keep what they counted."""
        for seat, process in list(self._taken.items()):
            if process.poll() is not None:
                for kind in _LIVE:
                    (self.directory / f"{kind}_{seat}.db").unlink(missing_ok=True)
                del self._taken[seat]


@contextlib.contextmanager
def seats(state_dir: Path) -> Iterator[Seats]:
    """Seats for the block; `metrics` in the state directory names theirs, so that the next start removes what a kill left."""
    state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    pointer = state_dir / "metrics"
    _remove(pointer)
    directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_MEMORY))
    pointer.symlink_to(directory)
    try:
        yield Seats(directory)
    finally:
        _remove(pointer)


def _remove(pointer: Path) -> None:
    if pointer.is_symlink():
        target = pointer.readlink()
        if target.parent == _MEMORY and target.name.startswith(_PREFIX):
            shutil.rmtree(target, ignore_errors=True)
        pointer.unlink()


def sit(directory: Path, seat: int) -> None:
    """This process counts in a seat from now on: call it before the first metric is made."""
    os.environ[_VARIABLE] = str(directory)
    values.ValueClass = values.MultiProcessValue(lambda: seat)  # type: ignore[no-untyped-call]


def of_all_workers(own: CollectorRegistry) -> CollectorRegistry:
    """The metrics of every worker of the node; those of this process if it has no seat."""
    if _VARIABLE not in os.environ:
        return own
    everyone = CollectorRegistry()
    MultiProcessCollector(everyone)  # type: ignore[no-untyped-call]
    return everyone
