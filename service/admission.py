"""Bounds for callers without a credential: how often and how many at once they may ask, and how many records they cause."""

from __future__ import annotations

import contextlib
import ipaddress
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from service.limits import Meter, Rate, RateLimited

RATE: Final = 10.0  # requests per second and source: a log asks once or twice a second
BURST: Final = 20
AT_ONCE: Final = 8
SOURCES: Final = 4_096  # remembered; beyond it the one that was quiet for longest is forgotten
RECORDS: Final = 1.0  # refusals of a source that are recorded one by one, per second
RECORDS_BURST: Final = 20
RECORDS_TOGETHER: Final = 20.0  # of all sources


class Buckets:
    """A rate for each source; an IPv6 host is its /64."""

    def __init__(self, *, rate: float, burst: int, sources: int, monotonic: Callable[[], float]) -> None:
        self._rate, self._meter = Rate(rate, burst), Meter(names=sources, monotonic=monotonic)

    def take(self, source: str) -> float:
        """Take one of this source; if there is none, the seconds until there is, else 0."""
        return self._meter.take(_network(source), self._rate)

    def late(self, source: str, *, most: float) -> float:
        """Take one of this source, and tell how many seconds too early that was: `most` seconds at the most."""
        return self._meter.late(_network(source), self._rate, most=most)


class Admission:
    """The bounds of one worker. For one event loop."""

    def __init__(
        self,
        *,
        rate: float = RATE,
        burst: int = BURST,
        at_once: int = AT_ONCE,
        sources: int = SOURCES,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._free = at_once
        self._buckets = Buckets(rate=rate, burst=burst, sources=sources, monotonic=monotonic)

    @contextlib.contextmanager
    def admitted(self, source: str) -> Iterator[None]:
        """Hold one of the places for the block; RateLimited if the source or everybody has used up theirs."""
        if wait := self._buckets.take(source):
            raise RateLimited(math.ceil(wait))
        if self._free <= 0:
            raise RateLimited(1)
        self._free -= 1
        try:
            yield
        finally:
            self._free += 1


@dataclass(slots=True)
class Counted:
    """Refusals of one source, for one reason, that got no record of their own: how many, between which times (us)."""

    source: str  # the first address of its network; empty: of several networks
    why: str
    count: int
    since: int
    until: int


class Refusals:
    """Which refusals of strangers are recorded one by one, and the exact count of the others. For one event loop.

    Else whoever sends requests that are refused would fill the disk of the log, which stops everybody.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], int],
        rate: float = RECORDS,
        burst: int = RECORDS_BURST,
        together: float = RECORDS_TOGETHER,
        sources: int = SOURCES,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock, self._sources = clock, sources
        self._each = Buckets(rate=rate, burst=burst, sources=sources, monotonic=monotonic)
        # Many sources are cheap to have: a bound for all of them, too.
        self._all = Buckets(rate=together, burst=math.ceil(together), sources=1, monotonic=monotonic)
        self._counted: dict[tuple[str, str], Counted] = {}

    def only_counted(self, source: str, why: str) -> bool:
        """Whether this refusal gets no record of its own; then it is counted."""
        if not self._each.take(source) and not self._all.take(""):
            return False
        key = (_network(source), why)
        if key not in self._counted and len(self._counted) >= self._sources:
            key, source = ("", why), ""
        now = self._clock()
        counted = self._counted.setdefault(key, Counted(source, why, 0, now, now))
        counted.count, counted.until = counted.count + 1, max(counted.until, now)
        return True

    def taken(self) -> list[Counted]:
        """What was counted since the last time, to be recorded now."""
        found, self._counted = list(self._counted.values()), {}
        return found

    def give_back(self, counted: Iterable[Counted]) -> None:
        """Counts that could not be recorded: they are part of the next ones."""
        for c in counted:
            key = (_network(c.source), c.why)
            since = self._counted.setdefault(key, Counted(c.source, c.why, 0, c.since, c.until))
            since.count, since.since = since.count + c.count, min(since.since, c.since)


def _network(source: str) -> str:
    """The source itself (an IPv4 address), or the /64 that one IPv6 host chooses its addresses from (RFC 8981)."""
    try:
        address = ipaddress.ip_address(source)
    except ValueError:
        return source
    if address.version == 4:
        return source
    return str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))
