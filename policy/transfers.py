"""Transfers: which operations carry data out of a jurisdiction, and the registered agreements that let them.

A crossing is a pair of jurisdictions: where a plaintext is, and another one where it can be next. Places are sets of
*possible* regions, so every pair that is possible needs an agreement.

| operation | data comes from | and can be in |
|-|-|-|
| encrypt, sign, mac, verify, verifyMac, and every use that is not named here | the caller | the nodes it passes, the HSM |
| generateDataKey, encapsulate, and all that releases | the HSM | the nodes it passes, the caller, the destinations |
| all that moves | the HSM | those, and wherever a copy becomes usable |
| rewrap, administration, reads | | nothing leaves: ciphertexts, names and states |

Asked after the policies, and only if they allow: an agreement lifts no rule. What was found stands last among the deciding
rules, so that a record names it and a recompute finds the same: `SOV-TRANSFER/<from>/<to>/<agreement>`, or without an
agreement if there is none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from policy.compiler import Action
from policy.places import NAME, Charter
from policy.request import Decision, Request

RULE: Final = "SOV-TRANSFER"
CODE: Final = "transfer_not_authorised"
UNKNOWN: Final = "unknown"  # the jurisdiction of what no registered place is; no agreement can name it
MOST: Final = 7  # crossings of one operation: more could not be told beside the rule that permits it
_MADE_INSIDE: Final = frozenset({"generateDataKey", "encapsulate"})  # though they protect: what they make goes out
_NOTHING_LEAVES: Final = frozenset({"rewrap"})
_KEPT: Final = 8192

Crossing = tuple[str, str]  # from, to
_Asked = tuple[str, str, frozenset[str], frozenset[str], frozenset[str], frozenset[str]]


class AgreementRefused(Exception):
    """An agreement cannot be registered; `where` is its place in charter.yaml."""

    def __init__(self, where: tuple[str, ...], reason: str) -> None:
        super().__init__(f"{'.'.join(where)}: {reason}")
        self.where = where


@dataclass(frozen=True, slots=True)
class Agreement:
    """A registered agreement; `begins` and `ends` in seconds since the epoch, the end no longer belonging to it."""

    id: str
    crossing: Crossing
    tenants: frozenset[str]
    purposes: frozenset[str]
    legal_basis: str
    legal_ref: str
    parties: tuple[str, ...]
    begins: int
    ends: int

    def lacks(self, request: Request) -> tuple[str, ...]:
        """Why it does not cover a request of its tenant, in words; empty if it does."""
        missing = []
        if request.purpose not in self.purposes:
            missing.append("another purpose")
        if request.now < self.begins:
            missing.append("not yet begun")
        if request.now >= self.ends:
            missing.append("ended")
        return tuple(missing)


class Agreements:
    """The charter's agreements, found by crossing. Immutable; whether one is in force is asked of each request's time."""

    def __init__(self, charter: Charter, actions: Mapping[str, Action]) -> None:
        """AgreementRefused names the first one that cannot be."""
        self._jurisdiction = {place: about.jurisdiction for place, about in charter.places.items()}
        self._inward = frozenset(name for name, action in actions.items() if _takes(name, action.groups))
        self._outward = frozenset(name for name, action in actions.items() if _gives(name, action.groups))
        self._carry = self._inward | self._outward
        self._known: dict[_Asked, tuple[Crossing, ...]] = {}
        found = [_agreement(name, charter) for name in sorted(charter.transfer_agreements)]
        self._by_id = {agreement.id: agreement for agreement in found}
        self._by_crossing: dict[tuple[Crossing, str], tuple[Agreement, ...]] = {}
        for agreement in found:
            for tenant in agreement.tenants:
                named = agreement.crossing, tenant
                self._by_crossing[named] = (*self._by_crossing.get(named, ()), agreement)

    def crossings(self, request: Request) -> tuple[Crossing, ...]:
        """The borders that data of a request crosses, in order; nearly always none."""
        action = request.action
        if action not in self._carry:
            return ()
        asked = action, request.hsm, request.caller.places, request.via, request.dest, request.target
        found = self._known.get(asked)
        if found is None:
            if len(self._known) >= _KEPT:
                self._known.clear()
            found = self._known[asked] = tuple(sorted(self._crossed(asked)))
        return found

    @property
    def all(self) -> tuple[Agreement, ...]:
        """Every registered agreement, by name."""
        return tuple(self._by_id.values())

    def of(self, tenant: str, crossing: Crossing) -> tuple[Agreement, ...]:
        """Every agreement of a tenant about a crossing, in force or not."""
        return self._by_crossing.get((crossing, tenant), ())

    def found(
        self, request: Request, tenant: str, crossed: Iterable[Crossing]
    ) -> tuple[tuple[Crossing, Agreement | None], ...]:
        """For each crossing the first agreement of the tenant that is in force for the purpose, or None."""
        return tuple((one, next((a for a in self.of(tenant, one) if not a.lacks(request)), None)) for one in crossed)

    def ends(self, rules: Iterable[str]) -> int:
        """When the first of the agreements ends that these rules of a decision name; 0 if one is registered no more."""
        named = [self._by_id.get(agreement) for _, agreement in crossings_of(rules)]
        return min((0 if agreement is None else agreement.ends for agreement in named), default=0)

    def first_end(self, now: int) -> float:
        """When (s) the first of those ends that are in force at `now`; infinite if none is."""
        return min((float(a.ends) for a in self.all if a.begins <= now < a.ends), default=math.inf)

    def _crossed(self, asked: _Asked) -> set[Crossing]:
        action, hsm, caller, via, dest, target = asked
        # Of whom nothing is known, it is not known that data stays: the charter refuses both, and so does this.
        here, stops, callers = self._of((hsm,)), self._of(via or ("",)), self._of(caller or ("",))
        found: set[Crossing] = set()
        if action in self._inward:
            found |= {(a, b) for a in callers for b in stops | here}
        if action in self._outward:
            found |= {(a, b) for a in here for b in stops | callers | self._of(dest | target)}
        return {(a, b) for a, b in found if a != b or a == UNKNOWN}

    def _of(self, places: Iterable[str]) -> set[str]:
        return {self._jurisdiction.get(place, UNKNOWN) for place in places}


def instant(seconds: int) -> str:
    """A time as charters spell it."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def crosses(decision: Decision) -> bool:
    """Whether data crosses a border in what was decided, or would: such a rule is told last, of a denial first."""
    return bool(decision.rules) and decision.rules[-1].startswith(RULE)


def crossings_of(rules: Iterable[str]) -> list[tuple[Crossing, str]]:
    """The crossings that a record's rules tell, each with its agreement; empty if it had none."""
    found = []
    for rule in rules:
        name, _, rest = rule.partition("/")
        if name == RULE and rest:
            here, there, *agreement = rest.split("/")
            found.append(((here, there), agreement[0] if agreement else ""))
    return found


def _takes(action: str, groups: frozenset[str]) -> bool:
    return "use" in groups and "release" not in groups and action not in _MADE_INSIDE | _NOTHING_LEAVES


def _gives(action: str, groups: frozenset[str]) -> bool:
    return bool(groups & {"release", "move"}) or action in _MADE_INSIDE


def _agreement(name: str, charter: Charter) -> Agreement:
    entry, where = charter.transfer_agreements[name], ("transfer_agreements", name)
    if NAME.fullmatch(name) is None:
        raise AgreementRefused(where, "an agreement's name has lower-case letters, digits and hyphens, at most 63")
    known = {about.jurisdiction for about in charter.places.values()}
    for field, jurisdiction in (("from", entry.from_), ("to", entry.to)):
        if jurisdiction not in known or jurisdiction == UNKNOWN:
            raise AgreementRefused((*where, field), f"{jurisdiction!r} is no jurisdiction of a place")
    if entry.from_ == entry.to:
        raise AgreementRefused((*where, "to"), f"data that stays in {entry.to!r} crosses nothing")
    for tenant in entry.tenants:
        if tenant not in charter.tenants:
            raise AgreementRefused((*where, "tenants"), f"tenant {tenant!r} is not registered")
    if entry.legal_basis not in charter.legal_bases:
        listed = ", ".join(charter.legal_bases) or "none"
        raise AgreementRefused((*where, "legal_basis"), f"{entry.legal_basis!r} is not in legal_bases: {listed}")
    if entry.not_after <= entry.not_before:
        raise AgreementRefused((*where, "not_after"), "it ends before it begins")
    return Agreement(
        id=name,
        crossing=(entry.from_, entry.to),
        tenants=frozenset(entry.tenants),
        purposes=frozenset(entry.purposes),
        legal_basis=entry.legal_basis,
        legal_ref=entry.legal_ref,
        parties=entry.parties,
        begins=entry.not_before,
        ends=entry.not_after,
    )


__all__ = [
    "CODE",
    "MOST",
    "RULE",
    "Agreement",
    "AgreementRefused",
    "Agreements",
    "Crossing",
    "crosses",
    "crossings_of",
    "instant",
]
