"""The stored freezes, and below them grants and exceptions.

Freezes are rows that are only ever added, each under a MAC that covers the row before it.

A freeze is a row, its lift another one; `epoch` counts both without gaps. Whoever edits, removes or exchanges a row
behind the service's back breaks the count or a MAC, and then nothing may be used. The newest rows could be cut off whole:
a process that saw them notices, since an epoch never falls.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import Connection, Engine

from policy.freeze import HALT, LONGEST_LEASE_S, Freeze, FreezeGone, InForce, Scope
from policy.grants import Grant
from policy.signed import RowGone, RowsDamaged, Seen, SignedRow, Stored

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
    sa.Column("mode", sa.String(16), nullable=False),
    sa.Column("began", sa.BigInteger),
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

_signed: Final = sa.Table(
    "policy_signed",
    tables,
    sa.Column("kind", sa.String(16), primary_key=True),  # grant, exception
    sa.Column("id", sa.String(36), primary_key=True),
    sa.Column("tenant", sa.String(64), nullable=False),
    sa.Column("content", sa.Text, nullable=False),
    sa.Column("at", sa.BigInteger, nullable=False),
    sa.Column("ends", sa.BigInteger, nullable=False),
    sa.Column("revoked_at", sa.BigInteger),
    sa.Column("revoked_by", sa.String(600), nullable=False),
    sa.Column("region", sa.String(64), nullable=False),
    sa.Column("mac", sa.LargeBinary, nullable=False),
)
_head: Final = sa.Table(
    "policy_signed_head",
    tables,
    sa.Column("kind", sa.String(16), primary_key=True),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    sa.Column("region", sa.String(64), nullable=False),
    sa.Column("mac", sa.LargeBinary, nullable=False),  # over the MACs of all rows of the kind
)
_use: Final = sa.Table(
    "policy_grant_use",
    tables,
    sa.Column("id", sa.String(36), primary_key=True),
    sa.Column("used", sa.BigInteger, nullable=False),
    sa.Column("region", sa.String(64), nullable=False),
    sa.Column("mac", sa.LargeBinary, nullable=False),
)

_LABEL: Final = b"skms/row/freeze/1\0"
_LOCK: Final = 0x736B6D7366727A  # PostgreSQL: one freeze or lift commits after the other
_STORED_US: Final = 2_000_000  # how long a freeze may take to be stored: no longer than its record
_KEPT_US: Final = 400 * 86_400_000_000  # how long a worker that is gone is remembered: figures of a year are counted
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
            "mode": freeze.mode,
            "began": freeze.began,
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
        # Rows of before there were modes halt, and say nothing of it, nor of when it began.
        said = {name: value for name, value in row.items() if (name, value) not in {("mode", HALT), ("began", None)}}
        signed = json.dumps({**said, "before": before.hex()}, sort_keys=True)
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

    def serving(self) -> set[str]:
        """The nodes of which a worker serves now."""
        wanted = sa.select(_worker.c.node).where(_worker.c.until > self._clock()).distinct()
        with self._reading.connect() as connection:
            return {str(row.node) for row in connection.execute(wanted)}

    def _hold_out(self, worker: str, until: int) -> None:
        with self._engine.begin() as connection:
            connection.execute(sa.update(_worker).where(_worker.c.worker == worker).values(until=until))

    def acknowledge(self, worker: str, epoch: int) -> None:
        """This worker releases nothing any more that a freeze of this epoch or an earlier one stops."""
        with self._engine.begin() as connection:
            connection.execute(sa.insert(_ack), [{"worker": worker, "epoch": epoch, "at": self._clock()}])

    def reach(self, freeze: Freeze) -> Reach:
        """Who that served when it was made obeys a freeze; a worker that is silent obeys once its lease is over.

        One that started meanwhile counts too: it may have read the freezes just before this one was stored.
        """
        begun = _worker.c.started_at <= freeze.at + _STORED_US
        served = sa.select(_worker).where(begun, _worker.c.until > freeze.at)
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
        mode=row["mode"],
        began=row["began"],
    )


# ---- rows with an end ------------------------------------------------------------------------------------------------

GRANT: Final = "grant"
EXCEPTION: Final = "exception"
_ROW_LABEL: Final = b"skms/row/signed/1\0"
_HEAD_LABEL: Final = b"skms/row/signed-head/1\0"
_USE_LABEL: Final = b"skms/row/grant-use/1\0"
_SIGNED_LOCK: Final = 0x736B6D73736772  # PostgreSQL: one transaction after the other, whatever of all these it changes
_ENDED_US: Final = 90 * 86_400_000_000  # how long a row is kept and shown after its end


class SignedRows:
    """The stored rows of one kind, each under a MAC, and a head whose MAC covers all of them and how often they changed.

    Whoever edits, removes or adds a row, or puts an old one back, breaks a MAC. All of it set back together to what it once
    was is noticed by its epoch: by whoever saw a later one, and by each node whose `mark` keeps the newest it has seen.
    `key` gives a region's MAC key; `region` is that of this node.
    """

    def __init__(self, engine: Engine, kind: str, *, key: Callable[[str], bytes], region: str, mark: Seen) -> None:
        self._engine, self.kind, self._key, self._region, self.mark = engine, kind, key, region, mark
        self._reading = engine.execution_options(reading=True)

    def extent(self) -> tuple[int, int]:
        """(epoch, number of rows): cheap enough to ask five times a second."""
        of = sa.select(sa.func.coalesce(sa.func.max(_head.c.epoch), 0)).where(_head.c.kind == self.kind)
        count = sa.select(sa.func.count()).select_from(_signed).where(_signed.c.kind == self.kind)
        with self._reading.connect() as connection:
            row = connection.execute(sa.select(of.scalar_subquery(), count.scalar_subquery())).one()
        return int(row[0]), int(row[1])

    def read(self) -> Stored:
        """All rows; RowsDamaged."""
        with self._reading.connect() as connection:
            return self._stored(connection)[0]

    def put(self, connection: Connection, row: SignedRow) -> None:
        """Store a new row in the caller's transaction; RowsDamaged. Grants whose end is long past go."""
        stored, macs = self._held(connection)
        for old in stored.rows if self.kind == GRANT else ():  # places of an exception are facts of old decisions
            if old.ends < row.at - _ENDED_US:
                there = (_signed.c.kind == self.kind) & (_signed.c.id == old.id)
                connection.execute(sa.delete(_signed).where(there))
                connection.execute(sa.delete(_use).where(_use.c.id == old.id))
                del macs[old.id]
        values = self._values(row)
        connection.execute(sa.insert(_signed), [values])
        self._raise(connection, stored.epoch, {**macs, row.id: values["mac"]})

    def revoke(self, connection: Connection, row_id: str, *, by: str, at: int) -> None:
        """Revoke a row in the caller's transaction; RowGone if it is not in force there, RowsDamaged."""
        stored, macs = self._held(connection)
        found = [r for r in stored.rows if r.id == row_id and r.revoked_at is None]
        if not found:
            raise RowGone(f"{self.kind} {row_id} is not in force")
        values = self._values(SignedRow(**{**asdict(found[0]), "revoked_at": at, "revoked_by": by}))
        connection.execute(sa.update(_signed).where(_signed.c.kind == self.kind, _signed.c.id == row_id).values(values))
        self._raise(connection, stored.epoch, {**macs, row_id: values["mac"]})

    def _held(self, connection: Connection) -> tuple[Stored, dict[str, bytes]]:
        """The rows, which nobody else changes before the caller's transaction ends. SQLite's are one after the other."""
        _hold_signed(connection)
        return self._stored(connection)

    def _stored(self, connection: Connection) -> tuple[Stored, dict[str, bytes]]:
        # In one statement, so that head and rows are of one moment on PostgreSQL too.
        chosen = (
            sa.select(_signed, _head.c.epoch, _head.c.region.label("head_region"), _head.c.mac.label("head_mac"))
            .select_from(_head.outerjoin(_signed, _signed.c.kind == _head.c.kind))
            .where(_head.c.kind == self.kind)
            .order_by(_signed.c.id)
        )
        found = list(connection.execute(chosen).mappings())
        if not found:
            lost = connection.execute(
                sa.select(sa.func.count()).select_from(_signed).where(_signed.c.kind == self.kind)
            ).scalar()
            if lost:
                raise RowsDamaged(f"the head of the {self.kind}s is missing")
            self._not_set_back(0)
            return Stored(0, ()), {}
        rows, macs = [], {}
        for row in found:
            if row["id"] is None:
                continue
            values = {name: row[name] for name in _signed.c.keys() if name != "mac"}  # noqa: SIM118 - columns, no dict
            if not hmac.compare_digest(self._mac(values), row["mac"]):
                raise RowsDamaged(f"{self.kind} {row['id']} was changed outside the service")
            rows.append(SignedRow(**{n: v for n, v in values.items() if n not in {"kind", "region"}}))
            macs[str(row["id"])] = bytes(row["mac"])
        head = found[0]
        if not hmac.compare_digest(self._head_mac(head["epoch"], head["head_region"], macs), head["head_mac"]):
            raise RowsDamaged(f"{self.kind}s were removed, added or put back outside the service")
        self._not_set_back(int(head["epoch"]))
        return Stored(int(head["epoch"]), tuple(rows)), macs

    def _raise(self, connection: Connection, epoch: int, macs: Mapping[str, bytes]) -> None:
        values = {"epoch": epoch + 1, "region": self._region}
        values["mac"] = self._head_mac(epoch + 1, self._region, macs)
        if connection.execute(sa.update(_head).where(_head.c.kind == self.kind).values(values)).rowcount == 0:
            connection.execute(sa.insert(_head), [{"kind": self.kind, **values}])

    def _values(self, row: SignedRow) -> dict[str, Any]:
        values = {"kind": self.kind, **asdict(row), "region": self._region}
        return {**values, "mac": self._mac(values)}

    def _mac(self, values: Mapping[str, Any]) -> bytes:
        text = json.dumps(dict(values), sort_keys=True)
        return hmac.digest(self._key(values["region"]), _ROW_LABEL + text.encode(), "sha256")

    def _head_mac(self, epoch: int, region: str, macs: Mapping[str, bytes]) -> bytes:
        rows = sorted((row_id, mac.hex()) for row_id, mac in macs.items())
        text = json.dumps({"kind": self.kind, "epoch": epoch, "region": region, "rows": rows}, sort_keys=True)
        return hmac.digest(self._key(region), _HEAD_LABEL + text.encode(), "sha256")

    def _not_set_back(self, epoch: int) -> None:
        if epoch < (seen := self.mark.value()):
            raise RowsDamaged(
                f"{self.kind}s were set back: {seen} changes were seen here and {epoch} are stored; restore the database, "
                f"or remove {self.mark.path} if it was set back on purpose"
            )


def _hold_signed(connection: Connection) -> None:
    """One lock for all: transactions that take several, each in the order of its group, would wait for each other."""
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_SIGNED_LOCK)))


class GrantSpent(Exception):
    """A grant was used as often as it may be."""


class GrantUses:
    """How often grants with a number of uses were used: counted in the transaction that records the use."""

    def __init__(self, engine: Engine, *, key: Callable[[str], bytes], region: str) -> None:
        self._reading, self._key, self._region = engine.execution_options(reading=True), key, region

    def read(self) -> Mapping[str, int]:
        """How often each was used; RowsDamaged."""
        with self._reading.connect() as connection:
            return {str(row["id"]): self._checked(row) for row in connection.execute(sa.select(_use)).mappings()}

    def begin(self, connection: Connection, grant_id: str) -> None:
        """A new grant, which was not used yet."""
        connection.execute(sa.insert(_use), [self._values(grant_id, 0)])

    def count(self, connection: Connection, grant: Grant, *, known: int) -> int:
        """One more use, in the caller's transaction: how many that makes. GrantSpent if it has no more, RowsDamaged.

        `known` is how many this process has seen: fewer are stored only if somebody set the count back.
        """
        _hold_signed(connection)
        row = connection.execute(sa.select(_use).where(_use.c.id == grant.id)).mappings().first()
        if row is None:
            raise RowsDamaged(f"the uses of grant {grant.id} are missing")
        used = self._checked(row)
        if used < known:
            raise RowsDamaged(f"the uses of grant {grant.id} were set back from {known} to {used}")
        if grant.max_uses is not None and used >= grant.max_uses:
            raise GrantSpent(grant.id)
        values = self._values(grant.id, used + 1)
        connection.execute(sa.update(_use).where(_use.c.id == grant.id).values(values))
        return int(values["used"])

    def _checked(self, row: sa.RowMapping) -> int:
        if not hmac.compare_digest(self._mac(row["id"], row["used"], row["region"]), row["mac"]):
            raise RowsDamaged(f"the uses of grant {row['id']} were changed outside the service")
        return int(row["used"])

    def _values(self, grant_id: str, used: int) -> dict[str, Any]:
        mac = self._mac(grant_id, used, self._region)
        return {"id": grant_id, "used": used, "region": self._region, "mac": mac}

    def _mac(self, grant_id: str, used: int, region: str) -> bytes:
        text = json.dumps({"id": grant_id, "used": used, "region": region}, sort_keys=True)
        return hmac.digest(self._key(region), _USE_LABEL + text.encode(), "sha256")
