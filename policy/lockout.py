"""Whom a change of the policy locks out: powers that somebody has today and nobody would have under the draft.

A power is held by a member for whom some request with the most favourable facts is allowed: right place, best proof, every
approval. So a draft is refused only where no way is left at all, and told with the names of those who hold the power now.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Final, Literal

from policy.bundle import ROLES
from policy.engine import Policy
from policy.places import Member, Registry
from policy.request import Attest, Caller, InstallationFacts, KeyFacts, Request, Resource, TenantFacts

Of = Literal["Installation", "Tenant", "Key"]
# Without one of these a tenant or the installation is administered by nobody. What the installation's own people can do
# in a tenant's place (lift its freezes, change its policy) need not be left to the tenant.
POWERS: Final[tuple[tuple[Of, str], ...]] = (
    ("Installation", "changePolicy"),
    ("Installation", "approve"),
    ("Installation", "hsmDrain"),
    ("Tenant", "createKey"),
    ("Tenant", "freeze"),
    ("Key", "rotate"),
    ("Key", "enable"),
    ("Key", "suspend"),
)
_GUARDED: Final = ("destroy", "setPolicy", "replicate", "export")  # what the charter asks a quorum for
_TIERS: Final = (1, 2, 3)
_TIER: Final = 3
_APPROVALS: Final = 16


@dataclass(frozen=True, slots=True)
class Lost:
    """A power that nobody is left with: of which tenant (None: the installation), and who holds it today."""

    tenant: str | None
    action: str
    members: tuple[str, ...]

    def __str__(self) -> str:
        of = "the installation" if self.tenant is None else f"tenant {self.tenant}"
        return f"nobody of {of} could {self.action} any more, today: {', '.join(self.members)}"


class LockedOut(Exception):
    """The draft leaves some power to nobody; `lost` says which, and `names` who holds one of them today."""

    def __init__(self, lost: tuple[Lost, ...]) -> None:
        super().__init__("; ".join(str(one) for one in lost))
        self.lost = lost
        self.names = sorted({name for one in lost for name in one.members})


def lost(old: Policy, new: Policy, *, now: int, given_up: Callable[[str], bool] = lambda _: False) -> tuple[Lost, ...]:
    """The powers that are held under a bundle and by nobody under its successor at a time (s).

    `given_up` tells of a tenant that the successor does not have any more whether nothing of it is left to administer.
    """
    after = holders(new, now=now)
    gone = {t for t in old.registry.tenant_names() if new.registry.tenant(t) is None and given_up(t)}
    return tuple(
        Lost(tenant, action, members)
        for (tenant, action), members in holders(old, now=now).items()
        if members and not after.get((tenant, action)) and tenant not in gone
    )


def check(old: Policy, new: Policy, *, now: int, given_up: Callable[[str], bool] = lambda _: False) -> None:
    """LockedOut if anything is lost."""
    if found := lost(old, new, now=now, given_up=given_up):
        raise LockedOut(found)


def holders(policy: Policy, *, now: int) -> Mapping[tuple[str | None, str], tuple[str, ...]]:
    """Who holds each power, by tenant (None: the installation) and action."""
    found: dict[tuple[str | None, str], tuple[str, ...]] = {}
    members = sorted(policy.registry.members.items())
    for of, action in POWERS:
        for tenant in (None,) if of == "Installation" else policy.registry.tenant_names():
            able = [i for i, m in members if m.tenant == tenant and _may(policy, i, m, of, action, now)]
            found[tenant, action] = tuple(able)
    return found


def strictest(policy: Policy, *, now: int) -> int:
    """The most approvals that the rules ask for anything done to a key: so many must agree to rules that ask for fewer.

    It counts what the rules refuse for want of approvals, whoever asks: whether somebody could do it otherwise, or has
    the role, is no matter, as members and permits can be taken away first and given back afterwards.
    """
    return max((_asked(policy, request) for request in _guarded(policy.registry, now)), default=0)


def lowered(old: Policy, new: Policy, *, now: int) -> int:
    """The most approvals that the old rules ask for something for which the new ones ask for fewer; 0 if there is nothing."""
    asked = ((_asked(old, request), request) for request in _guarded(old.registry, now))
    return max((count for count, request in asked if count and _asked(new, request) < count), default=0)


def parted(old: Registry, new: Registry) -> tuple[str, ...]:
    """The logins that the old members list gives to a person of several, and the new one does not give to that person."""
    was, becomes = ({login: (m.tenant, m.person) for login, m in r.members.items()} for r in (old, new))
    logins = Counter(was.values())
    return tuple(i for i, person in sorted(was.items()) if logins[person] > 1 and becomes.get(i) != person)


def _guarded(registry: Registry, now: int) -> Iterator[Request]:
    """Requests to do what is guarded, by somebody of each role beside a key of each tier and place, of each tenant."""
    for tenant, role, action, tier in product(registry.tenant_names(), sorted(ROLES), _GUARDED, _TIERS):
        for request in _best(registry, "", Member(tenant, role, ""), "Key", action, now, tier=tier):
            if request.via <= request.caller.places:
                yield request


def _asked(policy: Policy, request: Request) -> int:
    """How many approvals it takes until no rule asks for another one; 0 if none ever does."""

    def outcome(count: int) -> tuple[bool, tuple[str, ...]]:
        decision = policy.decide(replace(request, approvals=count))
        return decision.allowed, decision.rules

    settled = outcome(_APPROVALS)
    if outcome(0) == settled:  # most are; a rule asks for at least so many
        return 0
    return next(count for count in range(_APPROVALS, 0, -1) if outcome(count - 1) != settled)


def _may(policy: Policy, identity: str, member: Member, of: Of, action: str, now: int) -> bool:
    return any(policy.decide(r).allowed for r in _best(policy.registry, identity, member, of, action, now))


def _best(
    registry: Registry, identity: str, member: Member, of: Of, action: str, now: int, *, tier: int = _TIER
) -> Iterator[Request]:
    """Requests of a member with the best facts there can be, one for each place of the caller and of the HSM."""
    approved = sorted(registry.expand(["approved"]))
    own = registry.place_of_trust_domain(identity.split(":", 2)[1]) if identity.startswith("mtls:") else None
    for at in approved if own is None else [own]:
        caller = Caller(identity, "operator", member.tenant, frozenset({member.role}), frozenset({at}), 5, "mtls")
        for home in (at, *(p for p in approved if p != at)):
            yield Request(
                caller=caller,
                action=action,
                resource=_resource(registry, of, member.tenant, home, tier),
                now=now,
                hsm=home,
                via=frozenset({home}),
                purpose="default",
                reason="customer-initiated",
                approvals=_APPROVALS,
                attest=Attest(3, 0, tcb_ok=True),
            )


def _resource(registry: Registry, of: Of, tenant: str | None, home: str, tier: int) -> Resource:
    if of == "Installation" or tenant is None:
        return InstallationFacts()
    if of == "Tenant":
        return TenantFacts(tenant)
    everywhere = registry.expand(["approved"])
    return KeyFacts(
        id="any",
        tenant=tenant,
        tier=tier,
        residency=registry.within_tier(tier, tenant) | {home},
        execution=everywhere,
        reach=everywhere,
        egress=everywhere,
        failover=frozenset(),
        shared_with=frozenset(),
        purposes=("default",),
        state="active",
    )
