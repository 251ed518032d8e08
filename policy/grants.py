"""Grants: a named caller may do named operations with one key of its own tenant, under conditions, until an end.

A grant only allows what no rule permits: whatever the charter or a tenant forbids stays forbidden, and it is never text of a
policy. Its conditions are fields that typed code compares here; the caller's encryption context never enters Cedar.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from policy.request import Request
from policy.signed import Instant, Known, RowsDamaged, SignedRow, within

RULE: Final = "GRANT"  # how the rule begins that a decision by a grant names
LONGEST_US: Final = 365 * 86_400_000_000
_SAID: Final = ("key", "grantee", "operations", "context_equals", "context_subset", "purpose", "max_uses", "granter")


@dataclass(frozen=True, slots=True)
class Grant:
    """Who may do what with which key, until when (us). `operations` are Cedar actions of the group `use`.

    `context_equals` is the encryption context that a request must have, `context_subset` what must stand in it; at most one
    of them is given. `max_uses` None: as often as wanted.
    """

    id: str
    tenant: str
    key: str
    grantee: str
    operations: tuple[str, ...]
    purpose: str
    ends: int
    granter: str
    at: int
    context_equals: Mapping[str, str] | None = None
    context_subset: Mapping[str, str] | None = None
    max_uses: int | None = None
    revoked_at: int | None = None
    revoked_by: str = ""

    def row(self) -> SignedRow:
        """As it is stored."""
        said = {name: value for name, value in asdict(self).items() if name in _SAID}
        return SignedRow(self.id, self.tenant, json.dumps(said, sort_keys=True), self.at, self.ends)

    @classmethod
    def of(cls, row: SignedRow) -> Grant:
        """The grant that a row is; RowsDamaged if it says none."""
        try:
            said: dict[str, Any] = json.loads(row.content)
            if set(said) != set(_SAID):
                raise ValueError
            said["operations"] = tuple(said["operations"])
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
            raise RowsDamaged(f"grant {row.id} is none that this release knows") from None

    def live(self, at: Instant) -> bool:
        """Whether it surely has not ended and was not revoked."""
        return self.revoked_at is None and within(at, 0, self.ends)

    def fits(self, context: Mapping[str, str]) -> bool:
        """Whether its conditions let it count for this encryption context."""
        if self.context_equals is not None:
            return dict(context) == dict(self.context_equals)
        return all(context.get(name) == value for name, value in (self.context_subset or {}).items())

    def lacks(self, request: Request) -> tuple[str, ...]:
        """Why it does not cover a request of its key, in words; empty if only the encryption context could speak against it."""
        missing = []
        if request.caller.id != self.grantee:
            missing.append("another caller")
        if request.action not in self.operations:
            missing.append("another operation")
        if request.purpose != self.purpose:
            missing.append("another purpose")
        if request.now * 1_000_000 >= self.ends:
            missing.append("ended")
        if self.revoked_at is not None and request.now * 1_000_000 >= self.revoked_at:
            missing.append("revoked")
        return tuple(missing)


class Grants(Known[Grant]):
    """The grants that one worker knows, found by key and caller."""

    def __init__(self, monotonic: Callable[[], float], time: Callable[[], Instant]) -> None:
        super().__init__(monotonic, time)
        self._by_use: dict[tuple[str, str], tuple[Grant, ...]] = {}
        self._used: dict[str, int] = {}  # of those with a number of uses, as far as this process knows

    def _indexed(self) -> None:
        found: dict[tuple[str, str], tuple[Grant, ...]] = {}
        # Those without a number of uses come first: no use is counted that another grant allows anyhow.
        for grant in sorted(self.rows.values(), key=lambda g: (g.max_uses is not None, g.id)):
            named = grant.key, grant.grantee
            found[named] = (*found.get(named, ()), grant)
        self._by_use = found
        self._used = {i: n for i, n in self._used.items() if i in self.rows}

    def held(self, key: str, caller: str) -> bool:
        """Whether a caller has any grant for a key: if not, no encryption context makes a difference."""
        return (key, caller) in self._by_use

    def covering(
        self, *, tenant: str, key: str, caller: str, action: str, purpose: str, contexts: Sequence[Mapping[str, str]]
    ) -> Grant | None:
        """A live grant under which a caller may do this with a key in these encryption contexts; None if there is none."""
        held = self._by_use.get((key, caller))
        if held is None or not self.trusted:
            return None
        at = self.time()
        for grant in held:
            meant = grant.tenant == tenant and action in grant.operations and purpose == grant.purpose
            if meant and grant.live(at) and not self._spent(grant) and all(map(grant.fits, contexts)):
                return grant
        return None

    def still(self, grant: Grant) -> bool:
        """Whether a grant that decided counts now."""
        return self.trusted and grant.id in self.rows and grant.live(self.time())

    def used(self, grant_id: str, count: int) -> None:
        """A grant was used so often."""
        self._used[grant_id] = max(count, self.uses(grant_id))

    def uses(self, grant_id: str) -> int:
        """How often a grant with a number of uses was used, as far as this process knows."""
        return self._used.get(grant_id, 0)

    def _spent(self, grant: Grant) -> bool:
        return grant.max_uses is not None and self.uses(grant.id) >= grant.max_uses
