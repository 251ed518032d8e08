"""Figures of how far an installation is in its own hands. Pure: what they are counted from is given.

What has no evidence counts as not so; what there is nothing to count of has no figure, rather than a good one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

YEAR_US: Final = 365 * 86_400 * 1_000_000
QUARTER_US: Final = 90 * 86_400 * 1_000_000
DAY_S: Final = 86_400.0


@dataclass(frozen=True, slots=True)
class Times:
    """How long something took, in seconds; all None of nothing."""

    count: int
    median_s: float | None
    p90_s: float | None
    max_s: float | None

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Times:
        """Quantiles by nearest rank: each is a time that was measured."""
        found = sorted(seconds)
        if not found:
            return cls(0, None, None, None)
        return cls(len(found), _rank(found, 0.5), _rank(found, 0.9), found[-1])


def _rank(found: Sequence[float], share: float) -> float:
    return found[max(0, math.ceil(share * len(found)) - 1)]


@dataclass(frozen=True, slots=True)
class Exit:
    """The drills of leaving one vendor in a year. `mean_s` and `max_s` are of those that succeeded, None if none did.

    A drill succeeded if it was confirmed and no request was refused meanwhile.
    """

    vendor: str
    succeeded: int
    failed: int
    mean_s: float | None
    max_s: float | None
    refused: int


@dataclass(frozen=True, slots=True)
class Drill:
    """A finished drill: whether it was confirmed, and what it took."""

    vendor: str
    confirmed: bool
    seconds: float
    refused: int
    ended: int  # us


def exits(drills: Iterable[Drill], *, vendors: Iterable[str], now: int) -> tuple[Exit, ...]:
    """Per vendor, of the last 365 days; a vendor without a drill has one line all the same."""
    recent = [d for d in drills if now - YEAR_US <= d.ended <= now]
    told = []
    for vendor in sorted({*vendors, *(d.vendor for d in recent)}):
        own = [d for d in recent if d.vendor == vendor]
        good = [d.seconds for d in own if d.confirmed and not d.refused]
        mean = sum(good) / len(good) if good else None
        refused = sum(d.refused for d in own)
        told.append(Exit(vendor, len(good), len(own) - len(good), mean, max(good, default=None), refused))
    return tuple(told)


@dataclass(frozen=True, slots=True)
class Diversity:
    """What hangs on which supplier, and what would be lost with it.

    `share` weighs keys by tier (1 counts three times, 3 once) at the supplier of the HSM that is asked first; `loss` is the
    part of the keys that no HSM of another supplier could use. `index` is 0 if everything hangs on one of the approved
    suppliers and 1 if it is spread evenly over all of them: 1 - (HHI - 1/N)/(1 - 1/N), HHI the sum of squared shares.
    None without keys, or with fewer than two approved suppliers to spread over.
    """

    keys: int
    approved: int
    share: Mapping[str, float]
    loss: Mapping[str, float]
    index: float | None


@dataclass(frozen=True, slots=True)
class Held:
    """Keys of a tier, and the suppliers of the HSMs that hold them, the first asked first."""

    tier: int
    keys: int
    suppliers: tuple[str, ...]


def diversity(held: Iterable[Held], *, approved: Iterable[str]) -> Diversity:
    """How keys are spread over suppliers."""
    found = [h for h in held if h.keys and h.suppliers]
    known = sorted({*approved, *(s for h in found for s in h.suppliers)})
    weights, lost = dict.fromkeys(known, 0.0), dict.fromkeys(known, 0)
    for h in found:
        weights[h.suppliers[0]] += h.keys * (4 - h.tier)
        if len(set(h.suppliers)) == 1:
            lost[h.suppliers[0]] += h.keys
    keys, total = sum(h.keys for h in found), sum(weights.values())
    share = {s: weight / total if total else 0.0 for s, weight in weights.items()}
    loss = {s: count / keys if keys else 0.0 for s, count in lost.items()}
    n = len(known)
    index = None
    if keys and n > 1:
        index = 1 - (sum(p * p for p in share.values()) - 1 / n) / (1 - 1 / n)
    return Diversity(keys, n, share, loss, index)


CRITERIA: Final[Mapping[str, str]] = {
    "mapped": "every data store is mapped to a key here that can be used",
    "residency": "each key meets its tier: places, suppliers' labels, no copy elsewhere",
    "sole_control": "each key was made inside the HSMs, and nobody else ever had it",
    "reason": "no release of plaintext on a vendor's initiative is allowed",
    "verified": "every record of the log older than a day is under a checkpoint, which is signed after verifying the chain",
    "no_exception": "no exception from reach or egress is open",
}


@dataclass(frozen=True, slots=True)
class System:
    """A system of the charter and the criteria that it does not meet: none, and it is under sovereign control."""

    name: str
    tenant: str
    critical: bool
    gaps: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Control:
    """Critical systems, and how many of them are under sovereign control."""

    critical: int
    sovereign: int
    gaps: Mapping[str, int]  # by criterion: how many critical systems do not meet it

    @property
    def share(self) -> float | None:
        """None if the charter names no critical system."""
        return self.sovereign / self.critical if self.critical else None


def control(systems: Iterable[System]) -> Control:
    """How many critical systems meet every criterion."""
    critical = [s for s in systems if s.critical]
    gaps = {name: sum(name in s.gaps for s in critical) for name in CRITERIA}
    return Control(len(critical), sum(not s.gaps for s in critical), gaps)


@dataclass(frozen=True, slots=True)
class Stop:
    """A freeze: when it was ordered and when the last worker obeyed (us); None if that cannot be told yet.

    `began` is when the incident began (us), as the officer said who stopped it; None: not said.
    """

    at: int
    contained_at: int | None
    drill: bool
    began: int | None = None


@dataclass(frozen=True, slots=True)
class Containment:
    """Time from a freeze to the last worker's obeying it, real ones and drills apart; `open` ones have not got there.

    `detected` is the time from an incident's beginning to its freeze, where that was said.
    """

    detected: Times
    real: Times
    drills: Times
    open: int
    drilled: bool  # within 90 days


def containment(stops: Iterable[Stop], *, now: int) -> Containment:
    """Of the freezes of the last 365 days."""
    recent = [s for s in stops if now - YEAR_US <= s.at <= now]

    def times(drill: bool) -> Times:
        return Times.of(
            (s.contained_at - s.at) / 1e6 for s in recent if s.drill is drill and s.contained_at is not None
        )

    detected = Times.of((s.at - s.began) / 1e6 for s in recent if s.began is not None and not s.drill)
    drilled = any(s.drill and s.contained_at is not None and s.at >= now - QUARTER_US for s in recent)
    return Containment(detected, times(False), times(True), sum(s.contained_at is None for s in recent), drilled)
