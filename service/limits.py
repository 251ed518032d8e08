"""Rate limits: how often a tenant may ask, and how often a key may be used.

The algorithm is GCRA (ITU-T I.371): for each name one number, the time at which it will have paid for what it was given.
Every worker holds its share of the configured rate, so that a request waits for no other process. Memory is bounded: of
too many names, the one that was quiet for longest is forgotten.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

NAMES: Final = 16_384  # tenants, and keys: a name takes about 200 bytes
URGENT_RATE: Final = 10.0  # a second and caller: nobody stops keys faster, and a flood of it is not urgent
URGENT_BURST: Final = 100


class RateLimited(Exception):
    """Too many requests, or too many at once; `retry_after` in seconds. `told`: which limit, in fields of the answer."""

    def __init__(self, retry_after: int, told: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__("too many requests")
        self.retry_after, self.told = retry_after, told


@dataclass(frozen=True, slots=True)
class Rate:
    """So many a second, and `burst` of them at once."""

    per_second: float
    burst: int


class Meter:
    """How far names have used up their rates. For one event loop."""

    def __init__(self, *, names: int, monotonic: Callable[[], float]) -> None:
        self._names, self._monotonic = names, monotonic
        self._paid = OrderedDict[str, float]()  # name -> when it will have paid for what it was given

    def take(self, name: str, rate: Rate) -> float:
        """Take one; if there is none, the seconds until there is, else 0."""
        now = self._monotonic()
        paid = max(self._paid.get(name, now), now)
        wait = paid - now - (rate.burst - 1) / rate.per_second
        if wait > 1e-9:  # a part of a nanosecond is the arithmetic's
            return wait
        self._set(name, paid + 1 / rate.per_second)
        return 0.0

    def charge(self, name: str, rate: Rate, count: int) -> None:
        """Take `count` whether there are as many or not: what comes later waits until they are paid for."""
        now = self._monotonic()
        self._set(name, max(self._paid.get(name, now), now) + count / rate.per_second)

    def late(self, name: str, rate: Rate, *, most: float) -> float:
        """Take one, and tell how many seconds too early that was: `most` seconds at the most."""
        now, whole = self._monotonic(), rate.burst / rate.per_second
        paid = max(self._paid.get(name, now), now) + 1 / rate.per_second
        paid = min(paid, now + whole + most)
        self._set(name, paid)
        return max(0.0, paid - now - whole)

    def left(self, name: str, rate: Rate) -> tuple[int, float]:
        """(how many could be taken now, seconds until all of the burst could)."""
        now = self._monotonic()
        owed = max(0.0, self._paid.get(name, now) - now)
        return max(0, math.floor(rate.burst - owed * rate.per_second + 1e-6)), owed

    def _set(self, name: str, paid: float) -> None:
        self._paid[name] = paid
        self._paid.move_to_end(name)
        if len(self._paid) > self._names:
            self._paid.popitem(last=False)

    def __len__(self) -> int:
        return len(self._paid)


class RateLimits:
    """The rate limits of one worker among `workers`. Rates are a second and node, 0 for none."""

    def __init__(
        self,
        *,
        tenant: float = 0.0,
        tenants: Mapping[str, float] | None = None,
        key: float = 0.0,
        burst_s: int = 2,
        workers: int = 1,
        names: int = NAMES,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._burst_s, self._workers = burst_s, workers
        self._others = self._rate(tenant)
        self._own = {name: self._rate(rate) for name, rate in (tenants or {}).items()}
        self._key = self._rate(key)
        self._tenants = Meter(names=names, monotonic=monotonic)
        self._keys = Meter(names=names, monotonic=monotonic)
        self._urgent = Meter(names=names, monotonic=monotonic)
        self.refused = {"tenant": 0, "key": 0}

    def _rate(self, of_node: float) -> Rate | None:
        if not of_node:
            return None
        share = of_node / self._workers
        return Rate(share, max(1, math.ceil(share * self._burst_s)))

    def _of(self, tenant: str) -> Rate | None:
        return self._own.get(tenant, self._others)

    def admit(self, tenant: str | None) -> None:
        """Count a request of a tenant; RateLimited if that was too many. The installation's own roles have no limit."""
        rate = None if tenant is None else self._of(tenant)
        if tenant is None or rate is None:
            return
        if wait := self._tenants.take(tenant, rate):
            self.refused["tenant"] += 1
            raise RateLimited(math.ceil(wait), self.told(tenant))

    def charge(self, tenant: str | None, more: int) -> None:
        """Count what a request of a tenant asks for beyond its first: it is let through, and what follows it waits."""
        rate = None if tenant is None else self._of(tenant)
        if tenant is not None and rate is not None and more > 0:
            self._tenants.charge(tenant, rate, more)

    @property
    def keyed(self) -> bool:
        """Whether keys have a limit."""
        return self._key is not None

    def use(self, key_id: str) -> None:
        """Count a use of a key; RateLimited if that was too many."""
        if self._key is not None and (wait := self._keys.take(key_id, self._key)):
            self.refused["key"] += 1
            raise RateLimited(math.ceil(wait), _fields("key", self._key, *self._keys.left(key_id, self._key)))

    def urgent(self, caller: str) -> bool:
        """Whether a request that stops something goes before all others: not if its caller sends a flood of them."""
        return not self._urgent.take(caller, Rate(URGENT_RATE, URGENT_BURST))

    def told(self, tenant: str | None) -> tuple[tuple[str, str], ...]:
        """The fields that tell a tenant's callers where they stand with this worker; none without a limit."""
        rate = None if tenant is None else self._of(tenant)
        if tenant is None or rate is None:
            return ()
        return _fields("tenant", rate, *self._tenants.left(tenant, rate))


def _fields(name: str, rate: Rate, left: int, reset: float) -> tuple[tuple[str, str], ...]:
    """Quota and what is left of it, as draft-ietf-httpapi-ratelimit-headers-10 spells them."""
    window = max(1, math.ceil(rate.burst / rate.per_second))
    policy = f'"{name}";q={rate.burst};w={window}'
    return ("ratelimit-policy", policy), ("ratelimit", f'"{name}";r={left};t={math.ceil(reset)}')
