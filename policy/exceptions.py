"""Exceptions: for a time and a purpose, callers or plaintexts of named keys may be where the keys' bounds do not let them.

A quorum signs each, its data-protection officer among them. It waives reach or egress, never residency or execution, and
nothing on tier 1; the charter's rules name what they waive. Nothing else is lifted: not an agreement, not another rule.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from policy.request import KeyFacts, Request
from policy.signed import Instant, Known, RowsDamaged, SignedRow, within

DAY_US: Final = 86_400_000_000
KINDS: Final = ("reach", "egress")
LONGEST_US: Final[Mapping[int, int]] = {2: 30 * DAY_US, 3: 90 * DAY_US}  # by tier; on others there is none
AHEAD_US: Final = 90 * DAY_US  # how long before its beginning one can be signed
MOST: Final = 4  # exceptions of one operation: a record tells no more of them
_SAID: Final = (
    *("keys", "kind", "places", "purpose", "legal_basis", "legal_ref", "begins", "tier", "request", "approvals"),
)


class ExceptionRefused(Exception):
    """An exception cannot be: `pointer` names the field, `code` and the message say why."""

    def __init__(self, pointer: str, code: str, detail: str) -> None:
        super().__init__(detail)
        self.pointer, self.code = pointer, code


@dataclass(frozen=True, slots=True)
class Waiver:
    """An exception. `places` are regions, times are in us; `tier` is the strictest of its keys when it was asked for.

    `request` is what was approved, and `approvals` who signed it how: an auditor can check both without the service.
    """

    id: str
    tenant: str
    keys: tuple[str, ...]
    kind: str
    places: tuple[str, ...]
    purpose: str
    legal_basis: str
    legal_ref: str
    begins: int
    ends: int
    tier: int
    at: int = 0
    request: str = ""
    approvals: Mapping[str, str] | None = None
    revoked_at: int | None = None
    revoked_by: str = ""

    def row(self) -> SignedRow:
        """As it is stored."""
        said = {name: value for name, value in asdict(self).items() if name in _SAID}
        return SignedRow(self.id, self.tenant, json.dumps(said, sort_keys=True), self.at, self.ends)

    @classmethod
    def of(cls, row: SignedRow) -> Waiver:
        """The exception that a row is; RowsDamaged if it says none."""
        try:
            said: dict[str, Any] = json.loads(row.content)
            if set(said) != set(_SAID):
                raise ValueError
            said |= {"keys": tuple(said["keys"]), "places": tuple(said["places"])}
            return cls(
                id=row.id,
                tenant=row.tenant,
                at=row.at,
                ends=row.ends,
                revoked_at=row.revoked_at,
                revoked_by=row.revoked_by,
                **said,
            )
        except (ValueError, TypeError):
            raise RowsDamaged(f"exception {row.id} is none that this release knows") from None

    def refuse(self, tiers: Iterable[int], *, now: int) -> None:
        """ExceptionRefused unless it can be, for keys of these tiers and as of now (us)."""
        if self.kind not in KINDS:
            raise ExceptionRefused("/kind", "not_allowed", "reach or egress: residency and execution are never waived")
        if not self.places:
            raise ExceptionRefused("/places", "empty", "name at least one place")
        if not self.legal_ref.strip():
            raise ExceptionRefused("/legal_ref", "empty", "say where the legal basis stands")
        longest = min((LONGEST_US.get(tier, 0) for tier in tiers), default=0)
        if not longest:
            raise ExceptionRefused("/keys", "tier_not_allowed", "a key of tier 1 has no exceptions")
        if not self.begins < self.ends <= self.begins + longest:
            detail = f"later than not_before, at most {longest // DAY_US} days: the keys' strictest tier says how many"
            raise ExceptionRefused("/not_after", "out_of_range", detail)
        if self.ends <= now:
            raise ExceptionRefused("/not_after", "out_of_range", "it is over")
        if self.begins > now + AHEAD_US:
            raise ExceptionRefused("/not_before", "out_of_range", f"at most {AHEAD_US // DAY_US} days from now")

    def live(self, at: Instant) -> bool:
        """Whether it surely has begun and not ended, and was not revoked."""
        return self.revoked_at is None and within(at, self.begins, self.ends)

    def waives(self, tenant: str, key: str, tier: int, purpose: str) -> bool:
        """Whether it is about a key as it is now: one that came to a stricter tier is held to that one's limit."""
        meant = self.tenant == tenant and key in self.keys and self.purpose == purpose
        return meant and self.ends - self.begins <= LONGEST_US.get(tier, 0)

    def lacks(self, request: Request) -> tuple[str, ...]:
        """Why it does not cover a request about one of its keys, in words; empty if it does."""
        missing = []
        now = request.now * 1_000_000
        if isinstance(request.resource, KeyFacts) and self.ends - self.begins > LONGEST_US.get(
            request.resource.tier, 0
        ):
            missing.append("longer than the tier allows")
        if request.purpose != self.purpose:
            missing.append("another purpose")
        if now < self.begins:
            missing.append("not yet begun")
        if now >= self.ends:
            missing.append("ended")
        if self.revoked_at is not None and now >= self.revoked_at:
            missing.append("revoked")
        places = request.caller.places if self.kind == "reach" else request.dest
        if not places <= set(self.places):
            missing.append("other places")
        return tuple(missing)


class Exceptions(Known[Waiver]):
    """The exceptions that one worker knows, found by key."""

    def __init__(self, monotonic: Callable[[], float], time: Callable[[], Instant]) -> None:
        super().__init__(monotonic, time)
        self._by_key: dict[str, tuple[Waiver, ...]] = {}

    def _indexed(self) -> None:
        found: dict[str, tuple[Waiver, ...]] = {}
        for waiver in sorted(self.rows.values(), key=lambda w: w.id):
            for key in waiver.keys:
                found[key] = (*found.get(key, ()), waiver)
        self._by_key = found

    def needed(self, request: Request) -> tuple[Waiver, ...]:
        """The live exceptions that a use needs: for a caller outside the key's reach, a plaintext outside its egress.

        The sooner an exception ends, the later it comes: whoever is let in by several is let in by those that last.
        """
        key = request.resource
        if not isinstance(key, KeyFacts) or key.id not in self._by_key or not self.trusted:
            return ()
        outside = {"reach": request.caller.places - key.reach, "egress": request.dest - key.egress}
        at = self.time()
        found = [
            w
            for w in self._by_key[key.id]
            if outside.get(w.kind) and w.waives(key.tenant, key.id, key.tier, request.purpose) and w.live(at)
        ]
        return tuple(sorted(found, key=lambda w: (-w.ends, w.id))[:MOST])

    def still(self, waiver: Waiver) -> bool:
        """Whether an exception that was needed counts now."""
        return self.trusted and waiver.id in self.rows and waiver.live(self.time())

    def next_end_s(self, kind: str) -> float:
        """Seconds until the first live exception of a kind ends; infinite if there is none."""
        at = self.time()
        return min(((w.ends - at.now) / 1e6 for w in self.live_now(kind)), default=float("inf"))

    def live_now(self, kind: str) -> list[Waiver]:
        """The live exceptions of a kind."""
        at = self.time()
        return [w for w in self.rows.values() if w.kind == kind and w.live(at)] if self.trusted else []


def waived(waivers: Iterable[Waiver], kind: str) -> frozenset[str]:
    """The places that exceptions of a kind let in together."""
    return frozenset(place for w in waivers if w.kind == kind for place in w.places)


def told(waivers: Iterable[Waiver]) -> str:
    """How a record names exceptions: the id of one, or how those of several begin."""
    ids = [w.id for w in waivers]
    return ids[0] if len(ids) == 1 else ".".join(i[:13] for i in ids)


def named(said: str, waivers: Iterable[Waiver]) -> tuple[Waiver, ...]:
    """Those that a record names."""
    return tuple(w for w in waivers if said and any(w.id.startswith(part) for part in said.split(".")))
