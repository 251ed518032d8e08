"""Places for work, and a bounded queue before them in which tenants take turns.

One that asks ten times as often as another waits longer, not the other: free places go to the waiting tenants in turn, no
tenant has all places, and of a full queue the longest line gives way. So a refusal meets whoever asks for most.
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict, deque
from typing import Final

SHARE: Final = 0.75  # of the places, at most, for one tenant, unless it is told otherwise


class Overloaded(Exception):
    """No place, and none soon: nothing was done. `limit` is what was reached: queue, wait or connections."""

    told: tuple[tuple[str, str], ...] = ()  # no rate is to blame

    def __init__(self, limit: str, retry_after: int = 1) -> None:
        super().__init__(f"too many requests wait ({limit})")
        self.limit, self.retry_after = limit, retry_after


class Turns:
    """`places` at once, `most` of them for one tenant, and `queue` behind them, each for `wait_s` at most.

    For one event loop.
    """

    def __init__(self, *, places: int, queue: int, wait_s: float, most: int | None = None) -> None:
        self._places, self._queue, self._wait_s = places, queue, wait_s
        self._most = math.ceil(places * SHARE) if most is None else most
        self.inside = self.waiting = 0
        self._held: dict[str, int] = {}  # places of each tenant that has any
        self._lines: dict[str, deque[asyncio.Future[None]]] = {}  # of each tenant that waits
        self._next = OrderedDict[str, None]()  # the tenants whose turn may come: they wait, and may have one more
        self.refused = {"queue": 0, "wait": 0, "connections": 0}

    def enter(self, who: str) -> bool:
        """Take a place if there is one for this tenant now: `leave` gives it back."""
        held = self._held.get(who, 0)
        if self.inside >= self._places or held >= self._most:
            return False  # else nobody waits who could have it: `leave` saw to that
        self.inside += 1
        self._held[who] = held + 1
        return True

    async def wait(self, who: str, seconds: float | None = None) -> None:
        """Take a place once it is this tenant's turn; Overloaded after `seconds`, and at once if the queue is full.

        Unless another tenant has more waiting there: then the newest of those is Overloaded.
        """
        if self.waiting >= self._queue:
            self._make_room(who)
        loop = asyncio.get_running_loop()
        mine = loop.create_future()
        timer = loop.call_later(self._wait_s if seconds is None else seconds, self._late, who, mine)
        self._line(who).append(mine)
        self.waiting += 1
        try:
            await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled() and mine.exception() is None:
                self.leave(who)  # its turn had come
            else:
                self._drop(who, mine)
            raise
        finally:
            timer.cancel()

    def crowded(self) -> Overloaded:
        """The refusal of a request that came by a connection too many."""
        self.refused["connections"] += 1
        return Overloaded("connections")

    def leave(self, who: str) -> None:
        """Give a place back, to whose turn it is."""
        self.inside -= 1
        held = self._held[who] - 1
        if held:
            self._held[who] = held
        else:
            del self._held[who]
        if self._lines:
            if who in self._lines:
                self._next.setdefault(who)
            self._pass_on()

    def _pass_on(self) -> None:
        while self._next and self.inside < self._places:
            who, _ = self._next.popitem(last=False)
            mine = self._lines[who].popleft()
            self.waiting -= 1
            if not mine.done():  # else it was cancelled, and is about to learn that
                self.inside += 1
                self._held[who] = self._held.get(who, 0) + 1
                mine.set_result(None)
            if not self._lines[who]:
                del self._lines[who]
            elif self._held.get(who, 0) < self._most:
                self._next[who] = None  # behind the others

    def _line(self, who: str) -> deque[asyncio.Future[None]]:
        line = self._lines.get(who)
        if line is None:
            line = self._lines[who] = deque()
            if self._held.get(who, 0) < self._most:
                self._next[who] = None
        return line

    def _make_room(self, who: str) -> None:
        """The newest of the longest line gives way to a tenant that has fewer there; else Overloaded."""
        longest = max(self._lines, key=lambda name: len(self._lines[name]), default=who)
        mine = len(self._lines.get(who, ()))
        self.refused["queue"] += 1
        if longest == who or len(self._lines[longest]) <= mine + 1:
            raise Overloaded("queue")
        newest = self._lines[longest][-1]
        self._drop(longest, newest)
        if not newest.done():
            newest.set_exception(Overloaded("queue"))

    def _late(self, who: str, mine: asyncio.Future[None]) -> None:
        if not mine.done():
            self._drop(who, mine)
            self.refused["wait"] += 1
            mine.set_exception(Overloaded("wait"))

    def _drop(self, who: str, mine: asyncio.Future[None]) -> None:
        """Take one out of its line that waits no more."""
        line = self._lines.get(who)
        if line is None or mine not in line:
            return
        line.remove(mine)
        self.waiting -= 1
        if not line:
            del self._lines[who]
            self._next.pop(who, None)
