"""Freezes: what one officer stopped and only a quorum lets go again. Not a policy, so that no roll-out stands before it.

Every operation is compared with what is in force before an HSM is called and again before its answer leaves. What a
process knows is good for a lease: one that could not read the freezes for longer serves no key operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, NamedTuple

KINDS: Final = ("everything", "key", "tag", "tenant", "region", "tier", "caller", "hsm")
# What a freeze stops in its scope: everything that is not `PASSING`; what gives data or material out; every use.
MODES: Final[Mapping[str, frozenset[str]]] = MappingProxyType(
    {"halt": frozenset(), "no-release": frozenset({"release", "move"}), "admin-only": frozenset({"use"})}
)
HALT: Final = "halt"
LEASES: Final[Mapping[int, float]] = MappingProxyType({1: 3.0, 2: 10.0, 3: 60.0})  # seconds by tier; else the strictest
LONGEST_LEASE_S: Final = max(LEASES.values())
_STRICTEST: Final = min(LEASES.values())
# What no freeze stops: reading, what only narrows the use of a key, and the way out. An action that is not here is stopped.
PASSING: Final = frozenset(
    """
    describe publicKey readGrants listKeys readAudit readAllAudit readPolicy explainDecision readTransfers reloadPolicy
    listTenants listRegions metrics hsmStatus hsmDrain hsmUndrain hsmDrill suspend revoke revokeVersion
    freeze liftFreeze readFreezes approve readApprovals readCompliance changePolicy
    revokeException readExceptions
    """.split()  # noqa: SIM905  (twenty quoted words would not read better)
)


class Scope(NamedTuple):
    """What a freeze stops: one of `KINDS`, and which (empty for everything)."""

    kind: str
    value: str


@dataclass(frozen=True, slots=True)
class Freeze:
    """A freeze in force. `tenant` is the tenant whose keys it stops; None: those of all. `at` in microseconds.

    `began` (microseconds): when what it answers to began, as its officer says; None: not known.
    """

    id: str
    epoch: int
    scope: Scope
    tenant: str | None
    reason: str
    officer: str
    at: int
    drill: bool = False
    mode: str = HALT
    began: int | None = None

    def stops(self, groups: frozenset[str]) -> bool:
        """Whether it stops an action of these groups; one of which none is known is stopped."""
        return self.mode == HALT or not groups or not groups.isdisjoint(MODES[self.mode])


class Touched(NamedTuple):  # every operation makes one: half a frozen dataclass's time
    """What an operation is and touches. `places` are regions: of the node, of the HSM, of caller and destination."""

    tenant: str | None
    caller: str
    region: str  # whose HSMs may act
    places: frozenset[str]
    groups: frozenset[str]  # of the action, by the schema
    key: str = ""
    tags: Mapping[str, str] = MappingProxyType({})
    tier: int = 0


class Frozen(Exception):
    """A freeze stops the operation; `freeze` says which and since when."""

    def __init__(self, freeze: Freeze) -> None:
        super().__init__(f"frozen by {freeze.id}")
        self.freeze = freeze


class FreezeUnconfirmed(Exception):
    """Whether a freeze is in force cannot be told: the stored freezes could not be read, or somebody changed them."""


class FreezeGone(Exception):
    """The freeze is not in force any more, or never was."""


@dataclass(frozen=True, slots=True)
class InForce:
    """The freezes as of an epoch: the number of freezes and lifts so far. Never changed; a later one takes its place."""

    epoch: int = 0
    freezes: tuple[Freeze, ...] = ()
    kinds: frozenset[str] = frozenset()  # of scopes, so that no others need be looked for
    _by_tenant: Mapping[str | None, Mapping[tuple[str, str], tuple[Freeze, ...]]] = field(default_factory=dict)

    @classmethod
    def of(cls, epoch: int, freezes: Iterable[Freeze]) -> InForce:
        """Those freezes, found by tenant and scope; of several that stop something the earliest is told."""
        ordered = tuple(sorted(freezes, key=lambda f: f.epoch))
        found: dict[str | None, dict[tuple[str, str], tuple[Freeze, ...]]] = {}
        for freeze in ordered:
            of_tenant = found.setdefault(freeze.tenant, {})
            of_tenant[freeze.scope] = (*of_tenant.get(freeze.scope, ()), freeze)
        return cls(epoch, ordered, frozenset(f.scope.kind for f in ordered), found)

    def stopping(self, tenant: str | None, scopes: Iterable[tuple[str, str]], groups: frozenset[str]) -> Freeze | None:
        """The earliest freeze of a tenant's keys, or of all, with one of these scopes, that stops these actions."""
        held = [self._by_tenant[t] for t in {None, tenant} if t in self._by_tenant]
        found = [f for index in held for scope in scopes for f in index.get(scope, ()) if f.stops(groups)]
        return min(found, key=lambda f: f.epoch) if found else None


class Freezes:
    """What this process knows of the freezes: read by every operation, exchanged whole.

    `serving` gives the HSMs of a region that may be called, `monotonic` seconds that count while the machine sleeps.
    """

    def __init__(
        self,
        *,
        serving: Callable[[str], frozenset[str]],
        monotonic: Callable[[], float],
    ) -> None:
        self.now = InForce()
        self.damaged = ""  # why the stored freezes cannot be believed
        self._serving, self._monotonic = serving, monotonic
        self._confirmed: float | None = None
        self._added: tuple[tuple[float, Freeze], ...] = ()  # since when this process obeys a freeze of its own

    def confirm(self, at: float, now: InForce | None = None) -> None:
        """The freezes were read at `at` (seconds): those in `now`, or what is known already."""
        if now is not None:
            # A freeze that was made while those were read is not among them, and counts all the same.
            self._added = tuple(a for a in self._added if a[0] >= at)
            self.now = InForce.of(now.epoch, (*now.freezes, *(freeze for _, freeze in self._added)))
        self._confirmed, self.damaged = at, ""

    def distrust(self, why: str) -> None:
        """The stored freezes were changed behind the service's back: nothing may be used until they are right again."""
        self._confirmed, self.damaged = None, why

    def add(self, freeze: Freeze) -> None:
        """This process obeys a freeze from now on, before it has read the stored ones again."""
        self._added = (*self._added, (self._monotonic(), freeze))
        self.now = InForce.of(self.now.epoch, (*self.now.freezes, freeze))

    @property
    def age_s(self) -> float | None:
        """Seconds since the freezes were last read; None if they cannot be told."""
        return None if self._confirmed is None else self._monotonic() - self._confirmed

    def check(self, touched: Touched, *, around: Callable[[frozenset[str]], frozenset[str]]) -> None:
        """Frozen if a freeze stops what is touched, FreezeUnconfirmed if that cannot be told. Memory only.

        `around` gives every name of the charter that stands for one of some regions.
        """
        now = self.now
        if now.freezes:
            freeze = now.stopping(touched.tenant, self._scopes(now, touched, around), touched.groups)
            if freeze is not None:
                raise Frozen(freeze)
        confirmed = self._confirmed
        if confirmed is None or self._monotonic() - confirmed > LEASES.get(touched.tier, _STRICTEST):
            raise FreezeUnconfirmed(self.damaged or "the freezes could not be read for longer than the lease")

    def _scopes(
        self, now: InForce, touched: Touched, around: Callable[[frozenset[str]], frozenset[str]]
    ) -> set[tuple[str, str]]:
        scopes = {("everything", ""), ("key", touched.key), ("caller", touched.caller), ("tier", str(touched.tier))}
        if touched.tenant is not None:
            scopes.add(("tenant", touched.tenant))
        scopes |= {("tag", f"{name}={value}") for name, value in touched.tags.items()}
        if "region" in now.kinds:
            scopes |= {("region", name) for name in around(touched.places | {touched.region})}
        if "hsm" in now.kinds:
            scopes |= {("hsm", name) for name in self._serving(touched.region)}
        return scopes
