"""The stored freezes: rows that are only ever added, each under a MAC that covers the row before it.

A freeze is a row, its lift another one; `epoch` counts both without gaps. Whoever edits, removes or exchanges a row
behind the service's back breaks the count or a MAC, and then nothing may be used. The newest rows could be cut off whole:
a process that saw them notices, since an epoch never falls.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import Connection, Engine

from policy.freeze import LONGEST_LEASE_S, Freeze, FreezeGone, InForce, Scope

tables: Final = sa.MetaData()

_freeze: Final = sa.Table(
    "policy_freeze",
    tables,
    sa.Column("epoch", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("freeze_id", sa.String(36), nullable=False),
    sa.Column("lifts", sa.Boolean, nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("value", sa.String(600), nullable=False),
    sa.Column("tenant", sa.String(64)),
    sa.Column("reason", sa.String(64), nullable=False),
    sa.Column("officer", sa.String(600), nullable=False),
    sa.Column("at", sa.BigInteger, nullable=False),
    sa.Column("drill", sa.Boolean, nullable=False),
    sa.Column("approvals", sa.Text, nullable=False),  # JSON of a lift: the approval request, and who approved it
    sa.Column("region", sa.String(64), nullable=False),  # whose HSMs know the key of the MAC
    sa.Column("mac", sa.LargeBinary, nullable=False),
)
_worker: Final = sa.Table(
    "policy_freeze_worker",
    tables,
    sa.Column("worker", sa.String(128), primary_key=True),
    sa.Column("node", sa.String(64), nullable=False),
    sa.Column("started_at", sa.BigInteger, nullable=False),
    sa.Column("until", sa.BigInteger, nullable=False),  # it serves no longer than this without a further row
)
_ack: Final = sa.Table(
    "policy_freeze_ack",
    tables,
    sa.Column("worker", sa.String(128), primary_key=True),
    sa.Column("epoch", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("at", sa.BigInteger, nullable=False),
)

_LABEL: Final = b"skms/row/freeze/1\0"
_LOCK: Final = 0x736B6D7366727A  # PostgreSQL: one freeze or lift commits after the other
_KEPT_US: Final = 86_400_000_000  # how long a worker that is gone is remembered
_SIGNED: Final = tuple(c.name for c in _freeze.columns if c.name != "mac")
BEAT_S: Final = 5.0  # how often a worker says that it lives
HELD_US: Final = int((LONGEST_LEASE_S + 4 * BEAT_S) * 1_000_000)


class FreezeRowsDamaged(Exception):
    """The stored freezes are not what the service wrote; the message says which row and why."""


@dataclass(frozen=True, slots=True)
class Silence:
    """A worker that has not acknowledged; it serves until `until` (us) at the latest."""

    worker: str
    node: str
    until: int


@dataclass(frozen=True, slots=True)
class Reach:
    """How far a freeze got: who acknowledged and when (us), and who has not."""

    acknowledged: Mapping[str, int]
    silent: tuple[Silence, ...]
    contained_at: int | None  # None while a silent worker may still serve


class FreezeRows:
    """The stored freezes and who obeys them. `key` gives a region's MAC key; `region` is that of this node."""

    def __init__(self, engine: Engine, *, key: Callable[[str], bytes], region: str, clock: Callable[[], int]) -> None:
        self._engine, self._key, self._region, self._clock = engine, key, region, clock
        self._reading = engine.execution_options(reading=True)

    # ---- freezes and lifts -----------------------------------------------------------------------------------------

    def extent(self) -> tuple[int, int]:
        """(newest epoch, number of rows): cheap enough to ask five times a second."""
        chosen = sa.select(sa.func.coalesce(sa.func.max(_freeze.c.epoch), 0), sa.func.count())
        with self._reading.connect() as connection:
            row = connection.execute(chosen).one()
        return int(row[0]), int(row[1])

    def read(self) -> InForce:
        """What is in force; FreezeRowsDamaged."""
        with self._reading.connect() as connection:
            return self._in_force(connection)

    def _in_force(self, connection: Connection) -> InForce:
        active: dict[str, Freeze] = {}
        before, epoch = b"", 0
        for row in connection.execute(sa.select(_freeze).order_by(_freeze.c.epoch)).mappings():
            epoch += 1
            if row["epoch"] != epoch:
                raise FreezeRowsDamaged(f"freeze {epoch} is missing")
            if not hmac.compare_digest(self._mac({n: row[n] for n in _SIGNED}, before), row["mac"]):
                raise FreezeRowsDamaged(f"freeze {epoch} was changed outside the service")
            before = row["mac"]
            if row["lifts"]:
                active.pop(row["freeze_id"], None)
            else:
                active[row["freeze_id"]] = _freeze_of(row)
        return InForce.of(epoch, active.values())

    def put(self, connection: Connection, freeze: Freeze) -> None:
        """Store a freeze in the caller's transaction, with the next epoch."""
        self._append(connection, freeze, lifts=False, officer=freeze.officer, at=freeze.at, approvals={})

    def lift(
        self, connection: Connection, freeze_id: str, *, officer: str, at: int, approvals: Mapping[str, object]
    ) -> None:
        """Lift a freeze in the caller's transaction; FreezeGone if it is not in force there."""
        self._hold(connection)
        found = [f for f in self._in_force(connection).freezes if f.id == freeze_id]
        if not found:
            raise FreezeGone(f"freeze {freeze_id} is not in force")
        self._append(connection, found[0], lifts=True, officer=officer, at=at, approvals=approvals)

    def end_drills(self, connection: Connection, drill: Freeze, *, officer: str, at: int) -> None:
        """Lift a drill, and those of the same scope that nobody ended, in the caller's transaction; never a real freeze."""
        self._hold(connection)
        for freeze in self._in_force(connection).freezes:
            if freeze.drill and (freeze.scope, freeze.tenant) == (drill.scope, drill.tenant):
                self._append(connection, freeze, lifts=True, officer=officer, at=at, approvals={})

    def _append(
        self,
        connection: Connection,
        freeze: Freeze,
        *,
        lifts: bool,
        officer: str,
        at: int,
        approvals: Mapping[str, object],
    ) -> None:
        self._hold(connection)
        newest = connection.execute(
            sa.select(_freeze.c.epoch, _freeze.c.mac).order_by(_freeze.c.epoch.desc()).limit(1)
        ).first()
        values: dict[str, Any] = {
            "epoch": 1 if newest is None else newest.epoch + 1,
            "freeze_id": freeze.id,
            "lifts": lifts,
            "kind": freeze.scope.kind,
            "value": freeze.scope.value,
            "tenant": freeze.tenant,
            "reason": freeze.reason,
            "officer": officer,
            "at": at,
            "drill": freeze.drill,
            "approvals": json.dumps(dict(approvals), sort_keys=True),
            "region": self._region,
        }
        values["mac"] = self._mac(values, b"" if newest is None else newest.mac)
        connection.execute(sa.insert(_freeze), [values])

    @staticmethod
    def _hold(connection: Connection) -> None:
        # SQLite's transactions are one after the other already.
        if connection.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))

    def _mac(self, row: Mapping[str, Any], before: bytes) -> bytes:
        signed = json.dumps({**row, "before": before.hex()}, sort_keys=True)
        return hmac.digest(self._key(row["region"]), _LABEL + signed.encode(), "sha256")

    def find(self, freeze_id: str) -> tuple[Freeze, int | None] | None:
        """A freeze that was ever made, and when it was lifted; FreezeRowsDamaged."""
        return next((found for found in self.every() if found[0].id == freeze_id), None)

    def every(self) -> list[tuple[Freeze, int | None]]:
        """All freezes that were ever made, newest first, and when each was lifted; FreezeRowsDamaged."""
        with self._reading.connect() as connection:
            self._in_force(connection)
            rows = list(connection.execute(sa.select(_freeze).order_by(_freeze.c.epoch.desc())).mappings())
        lifted = {r["freeze_id"]: int(r["at"]) for r in rows if r["lifts"]}
        return [(_freeze_of(r), lifted.get(r["freeze_id"])) for r in rows if not r["lifts"]]

    # ---- who obeys -------------------------------------------------------------------------------------------------

    def enlist(self, worker: str, node: str) -> None:
        """This worker serves from now on."""
        now = self._clock()
        with self._engine.begin() as connection:
            gone = sa.select(_worker.c.worker).where(_worker.c.until < now - _KEPT_US)
            connection.execute(sa.delete(_ack).where(_ack.c.worker.in_(gone)))
            connection.execute(sa.delete(_worker).where(_worker.c.until < now - _KEPT_US))
            values = {"worker": worker, "node": node, "started_at": now, "until": now + HELD_US}
            connection.execute(sa.insert(_worker), [values])

    def beat(self, worker: str) -> None:
        """This worker goes on serving."""
        self._hold_out(worker, self._clock() + HELD_US)

    def leave(self, worker: str) -> None:
        """This worker serves no more."""
        self._hold_out(worker, self._clock())

    def _hold_out(self, worker: str, until: int) -> None:
        with self._engine.begin() as connection:
            connection.execute(sa.update(_worker).where(_worker.c.worker == worker).values(until=until))

    def acknowledge(self, worker: str, epoch: int) -> None:
        """This worker releases nothing any more that a freeze of this epoch or an earlier one stops."""
        with self._engine.begin() as connection:
            connection.execute(sa.insert(_ack), [{"worker": worker, "epoch": epoch, "at": self._clock()}])

    def reach(self, freeze: Freeze) -> Reach:
        """Who that served when it was made obeys a freeze; a worker that is silent obeys once its lease is over."""
        served = sa.select(_worker).where(_worker.c.started_at <= freeze.at, _worker.c.until > freeze.at)
        first = (
            sa.select(_ack.c.worker, sa.func.min(_ack.c.at).label("at"))
            .where(_ack.c.epoch >= freeze.epoch)
            .group_by(_ack.c.worker)
        )
        with self._reading.connect() as connection:
            workers = list(connection.execute(served).mappings())
            acknowledged = {str(r.worker): int(r.at) for r in connection.execute(first)}
        obeying = {w["worker"]: acknowledged[w["worker"]] for w in workers if w["worker"] in acknowledged}
        silent = tuple(
            Silence(w["worker"], w["node"], int(w["until"])) for w in workers if w["worker"] not in acknowledged
        )
        waiting = any(s.until > self._clock() for s in silent)
        times = [*obeying.values(), *(s.until for s in silent)]
        return Reach(obeying, silent, None if waiting else max(times, default=freeze.at))


def _freeze_of(row: sa.RowMapping) -> Freeze:
    return Freeze(
        id=row["freeze_id"],
        epoch=row["epoch"],
        scope=Scope(row["kind"], row["value"]),
        tenant=row["tenant"],
        reason=row["reason"],
        officer=row["officer"],
        at=row["at"],
        drill=row["drill"],
    )
