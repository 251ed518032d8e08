"""Rows that say who may do more than the rules alone allow, until an end: how one worker knows them, and when they count.

The service writes and signs them (`policy.rows.SignedRows`). A worker trusts what it read for a short lease; rows that
cannot be read, or that somebody changed, count for nothing: whatever they would allow is denied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

LEASE_S: Final = 3.0  # how long rows count that could not be read again: a revocation may be among what was not read
MOST_ERROR_US: Final = 30_000_000  # a clock that may be further off opens nothing that has an end


class Instant(NamedTuple):
    """The time as the clock reads it, and how far off it may be, both in microseconds."""

    now: int
    error: int


def within(at: Instant, begins: int, ends: int) -> bool:
    """Whether it is surely later than `begins` and earlier than `ends` (us), however wrong the clock is."""
    return at.error <= MOST_ERROR_US and begins + at.error <= at.now and at.now + at.error < ends


@dataclass(frozen=True, slots=True)
class SignedRow:
    """One stored row. `content` is JSON that its kind reads; times are in microseconds."""

    id: str
    tenant: str
    content: str
    at: int
    ends: int
    revoked_at: int | None = None
    revoked_by: str = ""


@dataclass(frozen=True, slots=True)
class Stored:
    """All rows of a kind as one transaction saw them. `epoch` counts the changes so far."""

    epoch: int
    rows: tuple[SignedRow, ...]


class Seen(Protocol):
    """The highest epoch that a node has seen, kept where no owner of the database sets it back."""

    @property
    def path(self) -> Path: ...
    def value(self) -> int: ...
    def rise(self, number: int) -> None: ...


class RowsDamaged(Exception):
    """Stored rows are not what the service wrote; the message says which and why."""


class RowGone(Exception):
    """There is no such row, or it was revoked before."""


class Ended(Protocol):
    """What a row says: it has an id, an end (us) and perhaps was revoked."""

    @property
    def id(self) -> str: ...
    @property
    def ends(self) -> int: ...
    @property
    def revoked_at(self) -> int | None: ...


R = TypeVar("R", bound=Ended)


class Known(Generic[R]):
    """The rows of a kind that one worker knows and that are not revoked. `monotonic` gives seconds."""

    def __init__(self, monotonic: Callable[[], float], time: Callable[[], Instant]) -> None:
        self._monotonic, self.time = monotonic, time
        self.epoch, self.damaged = 0, ""
        self.rows: Mapping[str, R] = {}
        self._confirmed: float | None = None
        self._added: tuple[tuple[float, R], ...] = ()  # by this process, and since when it counts them
        self._revoked: dict[str, float] = {}  # by this process, and since when

    @property
    def trusted(self) -> bool:
        """Whether what is known may count now."""
        return self._confirmed is not None and self._monotonic() - self._confirmed <= LEASE_S

    @property
    def age_s(self) -> float | None:
        """Seconds since the rows were last read; None if they cannot be believed."""
        return None if self._confirmed is None else self._monotonic() - self._confirmed

    def confirm(self, at: float, epoch: int | None = None, rows: Iterable[R] = ()) -> None:
        """The rows were read at `at` (seconds): those given with their epoch, or what is known already."""
        if epoch is not None:
            read = list(rows)
            # What this process did while those were read is not among them, and counts all the same.
            self._added = tuple(a for a in self._added if a[0] >= at)
            self._revoked = {i: since for i, since in self._revoked.items() if since >= at}
            self.epoch = epoch
            self._take([*read, *(row for _, row in self._added)])
        self._confirmed, self.damaged = at, ""

    def distrust(self, why: str) -> None:
        """The stored rows were changed behind the service's back: none counts until they are right again."""
        self._confirmed, self.damaged = None, why

    def add(self, row: R) -> None:
        """A row of this process counts from now on, before the stored ones are read again."""
        self._added = (*self._added, (self._monotonic(), row))
        self._take([*self.rows.values(), row])

    def revoke(self, row_id: str) -> None:
        """A row that this process revoked counts no more from now on."""
        self._revoked[row_id] = self._monotonic()
        self._take(self.rows.values())

    def _take(self, rows: Iterable[R]) -> None:
        self.rows = {r.id: r for r in rows if r.revoked_at is None and r.id not in self._revoked}
        self._indexed()

    def _indexed(self) -> None:
        """Called when the rows are others."""
