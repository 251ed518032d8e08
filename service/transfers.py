"""What crossed a border in a period, and what was refused there: counted from the audit log, which alone knows.

A record tells its crossings by its rules (`policy.transfers`). An operation crossed if its record says ok and no later one
says that its result was withheld; a dry run never did.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from audit.search import Search
from policy.transfers import CODE, RULE, crossings_of

_TELLS: Final = f'"{RULE}/'.encode()  # as the bytes of a record spell it
_WITHHELD: Final = b'"kind":"withheld"'
_FOR_EVER: Final = 2**53


class Kind(NamedTuple):
    """What is counted together; `agreement` is empty where there was none."""

    agreement: str
    origin: str
    destination: str
    tenant: str
    purpose: str


@dataclass(slots=True)
class Count:
    """`crossed` operations, the others by the rule that refused them, or by why they failed; times of requests (us)."""

    crossed: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    first: int = _FOR_EVER
    last: int = 0


@dataclass(frozen=True, slots=True)
class Transfers:
    """`stored_since` (us) is when what is in the database begins, if earlier records are in the archive alone."""

    counts: Mapping[Kind, Count]
    stored_since: int | None


def report(search: Search, *, tenant: str | None, since: int, until: int) -> Transfers:
    """Count the crossings between two times (us), a tenant's own or (None) all."""
    stored = search.stored_since()
    told = [r for r in _records(search, _TELLS, tenant, since, until) if r["kind"] != "intent"]  # its outcome counts
    withheld = {r["intent"]: str(r["why"]) for r in _records(search, _WITHHELD, tenant, since, _FOR_EVER)}
    counts: dict[Kind, Count] = {}
    for record in told:
        for (origin, destination), agreement in crossings_of(record.get("rule", ())):
            kind = Kind(agreement, origin, destination, str(record.get("tenant", "")), str(record.get("purpose", "")))
            count = counts.setdefault(kind, Count())
            count.first, count.last = min(count.first, record["ts"]), max(count.last, record["ts"])
            stopped = _stopped(record, withheld)
            count.refused.update([stopped] if stopped else [])
            count.crossed += not stopped
    return Transfers({kind: counts[kind] for kind in sorted(counts)}, stored)


def _records(search: Search, telling: bytes, tenant: str | None, since: int, until: int) -> Iterator[Mapping[str, Any]]:
    for found in search.scan(since=since, until=until, telling=telling):
        if not found.record.get("dry") and tenant in {None, found.record.get("tenant")}:
            yield found.record


def _stopped(record: Mapping[str, Any], withheld: Mapping[str, str]) -> str:
    """What kept the data where it was: the rule for want of an agreement, else the code; empty if nothing did."""
    why = withheld.get(record["id"], "") if record["out"] == "ok" else str(record.get("why", record["out"]))
    return RULE if why == CODE else why
