"""How a worker comes to know signed rows: a thread reads them five times a second, whatever changed is taken over on the loop."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from policy.rows import SignedRows
from policy.signed import Known, RowsDamaged, SignedRow
from service.mark import MarkDamaged

log: Final = logging.getLogger("skms.following")
alarm: Final = logging.getLogger("skms.alarm")
PERIOD_S: Final = 0.2
AGAIN_S: Final = (
    1.0  # all rows are read again as often, so that a changed one is noticed that left their number as it was
)
SHARE: Final = 50  # and no more often than so many times as long as reading them takes


@dataclass(slots=True)
class Followed:
    """Rows of one kind, what they say, and who is told."""

    rows: SignedRows
    of: Callable[[SignedRow], Any]
    known: Known[Any]
    due: float = field(default=0.0)  # when all of them are read again
    seen: tuple[int, int] = (-1, -1)


class Following:
    """Reads rows until it is ended. `monotonic` gives seconds."""

    def __init__(self, followed: Sequence[Followed], *, monotonic: Callable[[], float]) -> None:
        self._followed, self._monotonic = followed, monotonic
        self._ended, self._wake = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    async def begin(self) -> None:
        """Read all rows before the first request, and have a thread read them from now on."""
        loop = asyncio.get_running_loop()
        await asyncio.to_thread(self._rounds, loop)
        self._thread = threading.Thread(target=self._follow, args=(loop,), name="signed-rows", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """This process changed rows: read them now."""
        self._wake.set()

    def end(self) -> None:
        """Stop reading."""
        self._ended.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout=1.0)

    def _follow(self, loop: asyncio.AbstractEventLoop) -> None:
        while not self._ended.is_set():
            self._wake.wait(PERIOD_S)
            self._wake.clear()
            if not self._ended.is_set():
                self._rounds(loop)

    def _rounds(self, loop: asyncio.AbstractEventLoop) -> None:
        for one in self._followed:
            self._round(one, loop)

    def _round(self, one: Followed, loop: asyncio.AbstractEventLoop) -> None:
        """Read what changed. What cannot be read lets the lease run out; what cannot be believed ends it."""
        known, at = one.known, self._monotonic()
        try:
            extent = one.rows.extent()
            if at < one.due and (extent == one.seen or known.damaged):
                if not known.damaged:
                    known.confirm(at)
                return
            one.seen = (-1, -1)  # whatever comes of this, it is looked at anew
            if extent[0] < known.epoch:
                raise RowsDamaged(f"{one.rows.kind}s were set back: change {known.epoch} was there and is missing")
            stored = one.rows.read()
            read = [one.of(row) for row in stored.rows]
            asyncio.run_coroutine_threadsafe(_take(known, at, stored.epoch, read), loop).result(timeout=10)
            one.seen = (stored.epoch, len(read))
            self._remember(one.rows, stored.epoch)
        except (RowsDamaged, MarkDamaged) as damaged:
            if known.damaged != str(damaged):
                alarm.critical("stored rows were changed outside the service", extra={"facts": {"why": str(damaged)}})
            known.distrust(str(damaged))
        except Exception as error:  # whatever it is, the lease goes on running
            facts = {"kind": one.rows.kind, "error": type(error).__name__}
            log.warning("signed rows could not be read", extra={"facts": facts})
        now = self._monotonic()
        one.due = now + max(AGAIN_S, SHARE * (now - at))

    @staticmethod
    def _remember(rows: SignedRows, epoch: int) -> None:
        try:
            rows.mark.rise(epoch)
        except OSError as error:  # a full disk keeps nobody from obeying
            facts = {"file": str(rows.mark.path), "error": type(error).__name__}
            log.warning("the newest change is not remembered on this node", extra={"facts": facts})


async def _take(known: Known[Any], at: float, epoch: int, rows: Sequence[Any]) -> None:
    # On the event loop: between two requests.
    known.confirm(at, epoch, rows)
