"""How full the log's disk is, and what is kept back so that a full one still takes the end of what was begun.

At the first watermark operators are told, at the second the data plane is refused, at the third everything that is not
already under way: a log that runs into the end of its disk could not even say so.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_log: Final = logging.getLogger("skms.audit")
MIB: Final = 1 << 20


class Level(enum.IntEnum):
    """What a disk still allows."""

    OK = 0
    WARN = 1
    REFUSE = 2  # no data plane
    STOP = 3  # only what ends an operation that has begun


@dataclass(frozen=True, slots=True)
class Watermarks:
    """Percent of the disk in use at which each level begins, and bytes kept back (0: none)."""

    warn: int = 80
    refuse: int = 90
    stop: int = 95
    reserve: int = 16 * MIB

    def level(self, used: float) -> Level:
        """The level of a ratio in use, 0 to 1."""
        for level, percent in ((Level.STOP, self.stop), (Level.REFUSE, self.refuse), (Level.WARN, self.warn)):
            if used * 100 >= percent:
                return level
        return Level.OK


class Disk:
    """The file system of one folder, watched, with a file that keeps some of it back.

    `reserve` is None where the log's data is not on this file system (a PostgreSQL server): then only the folder itself
    is watched and nothing is kept back. Workers of a node share one reserve.
    """

    def __init__(self, folder: Path, marks: Watermarks, *, reserve: Path | None) -> None:
        self._folder, self._marks = folder, marks
        self._reserve = reserve if marks.reserve else None
        self.used = 0.0
        self.level = Level.OK

    def measure(self) -> Level:
        """Look at the disk, and take the reserve if it is not held; OSError if the folder is gone. May block as disks do."""
        found = os.statvfs(self._folder)
        held, taken = self._held(), (found.f_blocks - found.f_bfree) * found.f_frsize
        usable = max(1, taken + found.f_bavail * found.f_frsize)
        # A released reserve counts as used: what it gave is for outcomes, not for new operations.
        self.used = min(1.0, (taken + (self._marks.reserve if self._released() else 0)) / usable)
        self.level = self._marks.level(self.used)
        # It is given back only when a write fails: whoever fills the disk would take it too.
        if self.level < Level.REFUSE and self._reserve is not None and held < self._marks.reserve:
            self._keep(self._reserve)
        return self.level

    def full(self) -> None:
        """A write found no space, whatever the last look said (a quota, another's burst): stop, release the reserve."""
        self.level = Level.STOP
        self._release()

    def _held(self) -> int:
        try:
            return 0 if self._reserve is None else self._reserve.stat().st_blocks * 512
        except OSError:
            return 0

    def _released(self) -> bool:
        """An empty reserve stands for one that was released; none at all was never taken."""
        try:
            return self._reserve is not None and self._reserve.stat().st_size == 0
        except OSError:
            return False

    def _release(self) -> None:
        if self._reserve is None or not self._held():
            return
        try:
            os.truncate(self._reserve, 0)
        except OSError as error:
            _log.error("the reserve was not released", extra={"facts": {"errno": error.errno}})

    def _keep(self, reserve: Path) -> None:
        try:
            with os.fdopen(os.open(reserve, os.O_CREAT | os.O_WRONLY, 0o600), "wb") as file:
                os.posix_fallocate(file.fileno(), 0, self._marks.reserve)
        except OSError as error:
            _log.warning("no space could be kept back", extra={"facts": {"errno": error.errno}})
            with contextlib.suppress(OSError):
                reserve.unlink()
