"""Whether keys meet the bars of their tiers now: their places, and the labels of who supplies their region's HSMs.

A tier is a minimum that is met at all times, not at creation alone. Every use asks `Bars`, which answers from memory: what
was found for keys of the same tier, tenant and places holds until a label ends, another bundle is in force, or other HSMs
serve. What is unknown (an HSM without a supplier, a supplier without a label, a region without an HSM) is not met.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Final, Protocol

from keystore import Keystore, Located, Placed
from policy import NO_HSM, Gap, Policy, Registry, Verdict
from policy.graph import KeyGraph, graph_of, root

_KEPT: Final = 4096
LEAK: Final = "no copy is usable outside residency"
NO_BACKUPS: Final[Mapping[str, str]] = MappingProxyType({})


class Homed(Protocol):
    """Where a key's root KEK is, and where its material may be."""

    @property
    def home(self) -> str: ...
    @property
    def residency(self) -> frozenset[str]: ...


class _Tiered(Protocol):
    """What the bar of a tier looks at, of a key or of one that is to be."""

    @property
    def tenant(self) -> str: ...
    @property
    def tier(self) -> int: ...
    @property
    def home(self) -> str: ...
    @property
    def residency(self) -> frozenset[str]: ...
    @property
    def execution(self) -> frozenset[str]: ...
    @property
    def reach(self) -> frozenset[str]: ...
    @property
    def egress(self) -> frozenset[str]: ...
    @property
    def failover(self) -> frozenset[str]: ...


@dataclass(frozen=True, slots=True)
class _Known:
    """What was found under one registry while the same HSMs served."""

    registry: Registry | None
    serving: Mapping[str, frozenset[str]]  # region -> HSMs that may be called
    graph: KeyGraph | None = None
    found: dict[tuple[object, ...], Verdict] = field(default_factory=dict)


class Bars:
    """The bars of the tiers as this worker knows them. `supplied` names the supplier of each HSM, None if it has none.

    `serving` gives the HSMs of a region that may be called: one that is drained holds no key up. `backups` are the tokens
    that are stored away, and their regions.
    """

    def __init__(
        self,
        supplied: Mapping[str, str | None],
        *,
        regions: Iterable[str],
        serving: Callable[[str], frozenset[str]],
        backups: Mapping[str, str] = NO_BACKUPS,
    ) -> None:
        self._supplied, self.regions, self._serving = dict(supplied), frozenset(regions), serving
        self._backups = dict(backups)
        self._known = _Known(None, {})
        self.refresh()

    def refresh(self) -> None:
        """Look again which HSMs serve. Memory only."""
        serving = {region: self._serving(region) for region in self.regions}
        if serving != self._known.serving:
            self._known = _Known(self._known.registry, serving, self._known.graph)

    def graph(self, registry: Registry) -> KeyGraph:
        """Where the root KEKs of all regions are usable."""
        known = self._of(registry)
        if known.graph is None:
            places = registry.expand(["approved"])
            known = self._known = replace(known, graph=graph_of(registry, places | self.regions, self._backups))
        return known.graph or graph_of(registry, self.regions, self._backups)

    def _of(self, registry: Registry) -> _Known:
        if self._known.registry is not registry:
            self._known = _Known(registry, self._known.serving)
        return self._known

    def leaks(self, registry: Registry, key: Homed) -> tuple[Gap, ...]:
        """The places outside a key's residency in which its material is usable, each with the path."""
        found = self.graph(registry).leaks(root(key.home), key.residency)
        return tuple(Gap(f"{LEAK}: key -wrap-> {leak.path}") for leak in found)

    def verdict(self, registry: Registry, key: _Tiered, now: int) -> Verdict:
        """What a key lacks at `now` (us), and how long that holds. One look into memory but for the first of its kind."""
        known = self._of(registry)
        kind = (key.tenant, key.tier, key.home, key.residency, key.execution, key.reach, key.egress, key.failover)
        found = known.found.get(kind)
        if found is None or not found.since <= now < found.until:
            if len(known.found) >= _KEPT:
                known.found.clear()
            places = registry.verdict(
                tenant=key.tenant,
                tier=key.tier,
                home=key.home,
                residency=key.residency,
                execution=key.execution,
                reach=key.reach,
                egress=key.egress,
                failover=key.failover,
                suppliers={self._supplied.get(hsm) for hsm in known.serving.get(key.home, ())},
                now=now,
            )
            found = known.found[kind] = replace(places, gaps=(*places.gaps, *self.leaks(registry, key)))
        return found

    def hsms(self) -> dict[str, str | None]:
        """The HSMs that serve here, and the supplier of each."""
        serving = {hsm for names in self._known.serving.values() for hsm in names}
        return {hsm: self._supplied.get(hsm) for hsm in sorted(serving)}


@dataclass(frozen=True, slots=True)
class TierReport:
    """A tier: what it demands of suppliers, its keys (destroyed ones apart), and how many of them are below its bar.

    `elsewhere` are keys that meet all but what only a node with HSMs of their region can tell; this one refuses them.
    """

    tier: int
    labels: Mapping[str, int]
    keys: int
    below: int
    elsewhere: int


@dataclass(frozen=True, slots=True)
class Below:
    """A key that does not meet its tier."""

    key: Located
    gaps: Sequence[Gap]


@dataclass(frozen=True, slots=True)
class Report:
    """What does not meet its tier at a moment (us) under a policy, in the order of keys' ids; `more` follow.

    `since` (us) is when the policy's bundle came into force, if that is known; `hsms` those that serve and their suppliers.
    """

    at: int
    policy: Policy
    since: int | None
    tiers: Sequence[TierReport]
    hsms: Mapping[str, str | None]
    below: Sequence[Below]
    more: bool


def spread(registry: Registry, keys: Iterable[Homed], region: str, to: str) -> str:
    """How material of one of these keys would leave its residency if the region's root KEK came to `to`; empty if none would.

    Where `to` is, the charter says, or else it is in the region.
    """
    about = registry.copies.get(to)
    places = frozenset({region}) if about is None else registry.expand(about.places)
    kind = "backup" if about is None else about.kind
    for key in keys:
        outside = sorted(places - key.residency)
        if key.home == region and outside:
            return f"key -wrap-> {root(region)} -{kind}-> {to} in {', '.join(outside)}, outside {_named(key.residency)}"
    return ""


def _named(places: Iterable[str]) -> str:
    return ", ".join(sorted(places)) or "nowhere"


class Compliance:
    """The keys of the installation against the bars of their tiers. Calls the database."""

    def __init__(self, keystore: Keystore, bars: Bars, *, clock: Callable[[], int]) -> None:
        self._keystore, self._bars, self._clock = keystore, bars, clock

    def tiers(self, registry: Registry, *, tenant: str | None = None) -> list[TierReport]:
        """The keys of each tier and how many are below its bar: a tenant's, or (None) all."""
        found = self._keystore.placed(tenant)
        return self._counted(registry, found, self._low(found, registry, self._clock()))

    def leaking(self, registry: Registry, *, after: str | None, limit: int) -> tuple[int, list[Below]]:
        """(how many keys are usable outside their residency, up to `limit` of them after an id and how they are so)."""
        found = [(kind, n, self._bars.leaks(registry, kind)) for kind, n in self._keystore.placed(None)]
        leaking = {kind: gaps for kind, _, gaps in found if gaps}
        named = self._keystore.located(list(leaking), after=after, limit=limit) if leaking and limit else []
        return sum(n for _, n, gaps in found if gaps), [Below(key, leaking[key.placed]) for key in named]

    def spread(self, registry: Registry, region: str, to: str) -> str:
        """As the function `spread`, of all keys."""
        return spread(registry, (kind for kind, _ in self._keystore.placed(None)), region, to)

    def expiries(self, registry: Registry) -> Iterator[tuple[str, str, float]]:
        """Each label of each supplier, and in how many seconds it ends; below 0 once it has."""
        now = self._clock()
        for name, about in registry.suppliers.items():
            for label, entry in about.labels.items():
                yield name, label, (entry.ends - now) / 1e6

    def report(self, policy: Policy, *, since: int | None, tenant: str | None, after: str | None, limit: int) -> Report:
        """Up to `limit` keys below their bar after an id: a tenant's, or (None) all."""
        registry, now, found = policy.registry, self._clock(), self._keystore.placed(tenant)
        low = self._low(found, registry, now)
        told = [kind for kind, verdict in low.items() if not self._elsewhere(kind, verdict)]
        named = self._keystore.located(told, after=after, limit=limit + 1) if told else []
        below = [Below(key, low[key.placed].gaps) for key in named[:limit]]
        tiers = self._counted(registry, found, low)
        return Report(now, policy, since, tiers, self._bars.hsms(), below, len(named) > limit)

    def _low(self, found: Iterable[tuple[Placed, int]], registry: Registry, now: int) -> dict[Placed, Verdict]:
        verdicts = ((kind, self._bars.verdict(registry, kind, now)) for kind, _ in found)
        return {kind: verdict for kind, verdict in verdicts if verdict.gaps}

    def _counted(
        self, registry: Registry, found: Sequence[tuple[Placed, int]], low: Mapping[Placed, Verdict]
    ) -> list[TierReport]:
        told = []
        for tier in (1, 2, 3):
            keys = [(kind, n) for kind, n in found if kind.tier == tier]
            all_low = sum(n for kind, n in keys if kind in low)
            elsewhere = sum(n for kind, n in keys if kind in low and self._elsewhere(kind, low[kind]))
            total = sum(n for _, n in keys)
            told.append(TierReport(tier, registry.bar(tier), total, all_low - elsewhere, elsewhere))
        return told

    def _elsewhere(self, kind: Placed, verdict: Verdict) -> bool:
        return verdict.gaps == (NO_HSM,) and kind.home not in self._bars.regions
