"""The facts of a request as the compiled policies want them: entities and a context of exactly the schema's types.

A caller's text becomes an entity only where the schema says so, never by its looks. What is converted is kept by its
whole content, so nothing kept can ever be stale; the decision itself is never kept.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from operator import attrgetter
from typing import Any, Final, Generic, TypeVar

from policy.compiler import MAX_TEXT, Entity, Record, uid
from policy.request import Caller, InstallationFacts, KeyFacts, Request, Resource, TenantFacts

RESERVED_TENANT: Final = "installation"  # the tenant of those who belong to none; no tenant may have this name
PLACE_SETS: Final = ("residency", "execution", "reach", "egress", "failover")
_KEPT: Final = 8192
_LIMIT: Final = 1 << 53
_NOTHING: Final = frozenset[str]()

H = TypeVar("H", bound=Hashable)
V = TypeVar("V")


class _Kept(Generic[H, V]):
    """What `make` made of its argument, kept by content; emptied when full, so that no caller can make it grow."""

    def __init__(self, make: Callable[[H], V]) -> None:
        self._make, self._found = make, dict[H, V]()
        self.get = self._found.get

    def find(self, given: H) -> V:
        """What was made of it, or is made now."""
        return self._found.get(given) or self.add(given)

    def add(self, given: H) -> V:
        made = self._make(given)
        if len(self._found) >= _KEPT:
            self._found.clear()
        self._found[given] = made
        return made


_caller_parts: Final = attrgetter("kind", "id", "tenant", "roles", "places")
_key_parts: Final = attrgetter("id", "tenant", "tier", *PLACE_SETS, "shared_with", "purposes", "state")


class Facts:
    """Turns requests into facts. Raises TypeError or ValueError for a value that is not of its field's type."""

    def __init__(self) -> None:
        self._place = _Kept(_place)
        self._places = _Kept(_places)
        self._callers = _Kept(_principal)
        self._keys = _Kept(_key)
        self._attests = _Kept(_attest)

    def principal(self, caller: Caller) -> Entity:
        """The caller: a workload or an operator, in its tenant and roles."""
        parts = _caller_parts(caller)
        return self._callers.get(parts) or self._callers.add(parts)

    def resource(self, resource: Resource) -> Entity:
        """The key, tenant or installation that is asked about."""
        if type(resource) is KeyFacts:
            if type(resource.tier) is not int:
                raise TypeError("tier is not an integer")
            parts = _key_parts(resource)
            return self._keys.get(parts) or self._keys.add(parts)
        if type(resource) is TenantFacts:
            return Entity("Tenant", _text(resource.id), {})
        if type(resource) is InstallationFacts:
            return Entity("Installation", _text(resource.id), {})
        raise TypeError("unknown kind of resource")

    def context(self, r: Request) -> dict[str, Any]:
        """The named facts of the request; nothing else of what a caller sends gets in."""
        caller, attest, kept = r.caller, r.attest, self._places.get
        now, approvals, proof, purpose, reason = r.now, r.approvals, caller.proof, r.purpose, r.reason
        level, age, tcb = seen = attest.level, attest.age_s, attest.tcb_ok
        # A bool is an int in Python and would become true or 1 in Cedar.
        if not (type(now) is type(approvals) is type(proof) is type(level) is type(age) is int):
            raise TypeError("a number is not an integer")
        if not (-_LIMIT < now < _LIMIT and -_LIMIT < approvals < _LIMIT and -_LIMIT < proof < _LIMIT):
            raise ValueError("a number is too large")
        if not (type(r.failover) is type(tcb) is bool):
            raise TypeError("a flag is not a boolean")
        if not (type(purpose) is type(reason) is str and purpose.isascii() and reason.isascii()):
            _text(purpose), _text(reason)
        if len(purpose) > MAX_TEXT or len(reason) > MAX_TEXT:
            raise ValueError("a text is too long")
        via, possible, dest, target = kept(r.via), kept(caller.places), kept(r.dest), kept(r.target)
        return {
            "hsm": self._place.get(r.hsm) or self._place.add(r.hsm),
            "via": self._places.add(r.via) if via is None else via,
            "caller": self._places.add(caller.places) if possible is None else possible,
            "callerProof": proof,
            "dest": self._places.add(r.dest) if dest is None else dest,
            "target": self._places.add(r.target) if target is None else target,
            "failover": r.failover,
            "waivedReach": self._places.find(r.waived_reach) if r.waived_reach else _NOTHING,
            "waivedEgress": self._places.find(r.waived_egress) if r.waived_egress else _NOTHING,
            "purpose": purpose,
            "reason": reason,
            "attest": self._attests.get(seen) or self._attests.add(seen),
            "approvals": approvals,
            "now": now,
        }


def _number(value: object) -> int:
    if type(value) is not int or not -_LIMIT < value < _LIMIT:
        raise TypeError("a number is not an integer")
    return value


def _text(value: object) -> str:
    if type(value) is not str or len(value) > MAX_TEXT:
        raise TypeError(f"a text is not a string of at most {MAX_TEXT} characters")
    if not value.isascii():
        value.encode()  # a lone surrogate is no text: UnicodeEncodeError
    return value


def _names(kind: str, names: object) -> frozenset[str]:
    if type(names) is not frozenset:
        raise TypeError("a set is not a set")
    return frozenset(uid(kind, _text(n)) for n in names)


def _place(name: str) -> str:
    return uid("Place", _text(name))


def _places(names: frozenset[str]) -> frozenset[str]:
    return _names("Place", names)


def _attest(seen: tuple[int, int, bool]) -> Record:
    level, age, tcb = seen
    return Record(level=_number(level), ageS=_number(age), tcbOk=tcb)


def _principal(parts: tuple[str, str, str | None, frozenset[str], frozenset[str]]) -> Entity:
    kind, name, tenant, roles, places = parts
    if kind not in {"workload", "operator"} or type(roles) is not frozenset or type(places) is not frozenset:
        raise TypeError("not a caller")
    own = _text(RESERVED_TENANT if tenant is None else tenant)
    attrs = {
        "tenant": uid("Tenant", own),
        "home": _place(min(places, default="nowhere")),
        "clearance": 0,
        "critical": False,
    }
    parents = [uid("Tenant", own), *(uid("Role", f"{own}/{_text(role)}") for role in roles)]
    return Entity(kind.capitalize(), _text(name), attrs, parents)


def _key(parts: tuple[Any, ...]) -> Entity:
    name, tenant, tier, residency, execution, reach, egress, failover, shared, purposes, state = parts
    owner = uid("Tenant", _text(tenant))
    sets = zip(PLACE_SETS, (residency, execution, reach, egress, failover), strict=True)
    if type(purposes) is not tuple:
        raise TypeError("purposes are not a tuple")
    attrs = {
        "tenant": owner,
        "sharedWith": _names("Tenant", shared),
        "tier": _number(tier),
        "purposes": frozenset(map(_text, purposes)),
        "state": _text(state),
        **{field: _places(places) for field, places in sets},
    }
    return Entity("Key", _text(name), attrs, (owner,))
