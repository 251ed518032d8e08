"""The log: its tables, and the only writer. An answer leaves only after the COMMIT that carries its record.

Each worker process owns one chain: it takes a slot of its node, raises the slot's epoch (which fences every earlier
writer), checks the tail, has a fresh key certified by the HSM, and from then on commits records in groups, each sealed
by that key. Records are encoded by the request and only framed here, so a bad record fails its own request alone.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import fcntl
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import msgspec
import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from audit import event
from audit.chain import (
    BUNDLE,
    DAY_US,
    Bad,
    Batch,
    Chain,
    Verifier,
    chain_of,
    check_seal,
    check_signature,
    leaf_hash,
    pack,
    seal_statement,
    snapshot_of,
    snapshot_statement,
    unpack,
    writer_statement,
)
from audit.verify import Report, Trust, check_chain, tile_path

_log: Final = logging.getLogger("skms.audit")

tables: Final = sa.MetaData()

_shard: Final = sa.Table(
    "audit_shard",
    tables,
    sa.Column("shard", sa.Integer, primary_key=True),
    sa.Column("log_id", sa.String(128), nullable=False, unique=True),
    sa.Column("node", sa.String(64), nullable=False),
    sa.Column("slot", sa.Integer, nullable=False),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    sa.Column("next_seq", sa.BigInteger, nullable=False),
    sa.Column("head", sa.LargeBinary, nullable=False),
)
_batch: Final = sa.Table(
    "audit_batch",
    tables,
    sa.Column("day", sa.Integer, nullable=False, primary_key=True),
    sa.Column("shard", sa.Integer, nullable=False, primary_key=True),
    sa.Column("first_seq", sa.BigInteger, nullable=False, primary_key=True),
    sa.Column("n", sa.Integer, nullable=False),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    sa.Column("t", sa.BigInteger, nullable=False),
    sa.Column("entries", sa.LargeBinary, nullable=False),
    sa.Column("head", sa.LargeBinary, nullable=False),
    sa.Column("seal", sa.LargeBinary, nullable=False),
)
sa.Index("audit_batch_chain", _batch.c.shard, _batch.c.first_seq)
sa.Index("audit_batch_time", _batch.c.t)
_snapshot: Final = sa.Table(
    "audit_snapshot",
    tables,
    sa.Column("shard", sa.Integer, primary_key=True),
    sa.Column("at_seq", sa.BigInteger, primary_key=True),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    sa.Column("blob", sa.LargeBinary, nullable=False),
    sa.Column("seal", sa.LargeBinary, nullable=False),
)
_intent: Final = sa.Table(
    "audit_intent",
    tables,
    sa.Column("id", sa.String(36), primary_key=True),
    sa.Column("shard", sa.Integer, nullable=False),
    sa.Column("seq", sa.BigInteger, nullable=False),
)

# Against accidents, not against the owner of the database: that is what chain and seals are for.
APPEND_ONLY: Final = tuple(
    f"CREATE TRIGGER audit_{name}_{verb.lower()} BEFORE {verb} ON audit_{name} "
    f"BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END"
    for name in ("batch", "snapshot")
    for verb in ("UPDATE", "DELETE")
)
for _statement in APPEND_ONLY:
    sa.event.listen(tables, "after_create", sa.DDL(_statement).execute_if(dialect="sqlite"))  # type: ignore[no-untyped-call]

SNAPSHOT_EVERY: Final = 65_536
MARK_S: Final = 60.0
STEP_US: Final = 1_000_000
FORWARD_US: Final = 600_000_000  # a step forward beyond this needs an operator: `t` cannot go back


class Unavailable(Exception):
    """No durable record, so no answer. `executed` tells whether the operation may have taken effect."""

    def __init__(self, reason: str, *, executed: bool = False) -> None:
        super().__init__(reason)
        self.executed = executed


class Fenced(Unavailable):
    """Another writer owns the chain: this process must end."""


class ChangeFailed(Exception):
    """The change that was to commit with the record failed and was undone; its record says so. `__cause__` is why."""

    def __init__(self, receipt: Receipt) -> None:
        super().__init__("the change was undone")
        self.receipt = receipt


@dataclass(frozen=True, slots=True)
class Receipt:
    """Where a record stands: chain, number, leaf hash. Durable before anybody sees it."""

    log: str
    seq: int
    leaf: bytes

    def header(self) -> str:
        """The value of `Audit-Receipt` (RFC 9651 dictionary)."""
        return f'log="{self.log}", seq={self.seq}, leaf=:{base64.b64encode(self.leaf).decode()}:'


@dataclass(frozen=True, slots=True)
class Change:
    """Metadata that commits with a record.

    `write` runs under a savepoint of its own; what it raises undoes it, and the record says `error`. `applied` runs on
    the event loop after COMMIT and before any waiting `append` of the group returns.
    """

    write: Callable[[Connection], None]
    applied: Callable[[], None]


@dataclass(frozen=True, slots=True)
class OpenFacts:
    """What the `open` record tells of this process: SHA-256 of configuration and code, version."""

    cfg: str
    dist: str
    ver: str


class Signer(Protocol):
    """The audit key in the HSM."""

    def public_key(self) -> bytes: ...

    def sign(self, statement: bytes) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Found:
    """A record found by a search."""

    log: str
    seq: int
    leaf: bytes
    t: int
    record: dict[str, Any]


@dataclass(slots=True)
class _Member:
    """One record that waits for its commit."""

    record: event.Record
    body: bytes
    done: asyncio.Future[Receipt] | None = None
    change: Change | None = None
    failed: Exception | None = None
    late: bool = False
    receipt: Receipt | None = None


@dataclass(slots=True)
class _Built:
    """A framed and sealed group."""

    chain: Chain
    bundle: bytes
    seal: bytes
    intents: list[tuple[str, int]] = field(default_factory=list)
    settled: list[str] = field(default_factory=list)


class Log:
    """The writer of this process. Call `start` once, `append` from the event loop, `close` at the end."""

    def __init__(
        self,
        engine: Engine,
        *,
        origin: str,
        node: str,
        slots: int,
        lock_dir: Path,
        signer: Signer,
        open_facts: OpenFacts,
        clock: Callable[[], int],
        monotonic: Callable[[], float],
        deadline_s: float = 2.0,
        max_waiting: int = 4_096,
        max_group: int = 512,
    ) -> None:
        self._engine, self._origin, self._node, self._slots = engine, origin, node, slots
        self._lock_dir, self._signer, self._facts = lock_dir, signer, open_facts
        self._clock, self._monotonic, self._deadline = clock, monotonic, deadline_s
        self._max_waiting, self._max_group = max_waiting, max_group
        self._key = Ed25519PrivateKey.generate()
        self._pub = self._key.public_key().public_bytes_raw().hex()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="audit-commit")
        self._queue: list[_Member] = []
        self._wake = asyncio.Event()
        self._connection: Connection | None = None
        self._chain = Chain(origin)
        self._shard = 0
        self._opened_at = 0
        self._open_previous = ""
        self._cert = ""
        self._open_intents: dict[str, int] = {}
        self._lock_file: Any = None
        self._tasks: list[asyncio.Task[None]] = []
        self._file: tuple[Path, int] | None = None
        self._last_commit = monotonic()
        self._clock_base: tuple[int, float] | None = None
        self._snapshot_at = 0
        self._closing = False
        self.epoch = 0
        self.state: Literal["STARTING", "RUNNING", "DEGRADED", "FENCED", "CLOSED"] = "STARTING"
        self.groups = self.records_written = self.last_group_size = 0

    # ---- what others see -------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The chain: origin, node and slot."""
        return self._chain.log

    @property
    def next_seq(self) -> int:
        """Number of the next record."""
        return self._chain.n

    @property
    def waiting(self) -> int:
        """Records that wait for their commit."""
        return len(self._queue)

    def public_key(self) -> bytes:
        """SubjectPublicKeyInfo (DER) of the audit key."""
        return self._signer.public_key()

    def last_commit_age_s(self) -> float:
        """Seconds since the last successful commit."""
        return self._monotonic() - self._last_commit

    # ---- life ------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Take a slot, fence its earlier writer, check its tail, open. Bad if the tail does not verify."""
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._thread, self._take_over)
        except BaseException:
            await loop.run_in_executor(self._thread, self._disconnect)
            self._thread.shutdown(wait=True)
            if self._lock_file is not None:
                self._lock_file.close()
            raise
        self.state = "RUNNING"
        self._clock_base = (self._clock(), self._monotonic())
        self._tasks = [asyncio.create_task(self._run()), asyncio.create_task(self._heartbeat())]

    async def close(self) -> None:
        """Commit what waits, then snapshot and `close`."""
        if self.state in {"CLOSED", "STARTING"}:
            return
        self._closing = True
        with contextlib.suppress(Unavailable):
            count = self._chain.n + len(self._queue) - self._opened_at + 1
            if self.state == "RUNNING" and not self._queue:
                closing = event.Close(id=_uuid(), ts=self._clock(), node=self._node, epoch=self.epoch, count=count)
                await self.append(closing, last=True)
                await asyncio.get_running_loop().run_in_executor(self._thread, self._write_snapshot)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.get_running_loop().run_in_executor(self._thread, self._disconnect)
        self._thread.shutdown(wait=True)
        if self._lock_file is not None:
            self._lock_file.close()
        self.state = "CLOSED"

    # ---- appending -------------------------------------------------------------------------------------------------

    async def append(self, record: event.Record, *, change: Change | None = None, last: bool = False) -> Receipt:
        """The receipt, once the record (and its change) is durable.

        Unavailable if that does not happen in time; should the record land later, a `withheld` record follows it.
        ChangeFailed if the change was undone: then the record stands, and says so.
        """
        if self._closing and not last:
            raise Unavailable("the audit log is closing")
        (member,) = self._enqueue([(record, change)])
        return await self._settled(member)

    async def append_many(self, records: Sequence[event.Record]) -> list[Receipt]:
        """As `append`, for several records in order, with one deadline."""
        if self._closing:
            raise Unavailable("the audit log is closing")
        members = self._enqueue([(record, None) for record in records])
        async with asyncio.timeout(None):
            return [await self._settled(m) for m in members]

    def _enqueue(self, given: Sequence[tuple[event.Record, Change | None]]) -> list[_Member]:
        if self.state == "FENCED":
            raise Fenced("another writer owns this chain")
        if self.state not in {"RUNNING", "DEGRADED"}:
            raise Unavailable(f"the audit log is {self.state.lower()}")
        if self.waiting + len(given) > self._max_waiting:
            raise Unavailable("too many records wait for their commit")
        loop = asyncio.get_running_loop()
        members = [_Member(r, event.encode(r), loop.create_future(), c) for r, c in given]
        self._queue += members
        self._wake.set()
        return members

    async def _settled(self, member: _Member) -> Receipt:
        assert member.done is not None
        try:
            return await asyncio.wait_for(asyncio.shield(member.done), self._deadline)
        except TimeoutError:
            if member.done.done() and not member.done.cancelled() and member.done.exception() is None:
                return member.done.result()
            member.late = True
            raise Unavailable("the audit log did not commit in time", executed=member.change is not None) from None
        except asyncio.CancelledError:
            member.late = True
            raise

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._wake.clear()
            if not self._queue:
                await self._wake.wait()
                continue
            group, self._queue = self._queue[: self._max_group], self._queue[self._max_group :]
            error: Exception | None = None
            try:
                self._watch_clock(group)
                # Without changes the group is framed, hashed and sealed here: one hand-over, only the COMMIT elsewhere.
                built = None if any(m.change for m in group) else self._build(group)
                built = await loop.run_in_executor(self._thread, self._commit, group, built)
                self._adopt(built, group)
            except Exception as caught:  # every kind of failure means: no record, no answer
                error = caught if isinstance(caught, Unavailable) else Unavailable(f"audit: {type(caught).__name__}")
                self.state = "FENCED" if isinstance(caught, Fenced) else "DEGRADED"
                _log.error("audit commit failed", extra={"facts": {"error": type(caught).__name__}})
            self._release(group, error)
            if isinstance(error, Fenced):
                self._release(self._queue, error)
                self._queue = []
                return

    def _adopt(self, built: _Built, group: list[_Member]) -> None:
        self._chain.adopt(built.chain)
        for intent, seq in built.intents:
            self._open_intents[intent] = seq
        for intent in built.settled:
            self._open_intents.pop(intent, None)
        self.state, self._last_commit = "RUNNING", self._monotonic()
        self.groups += 1
        self.records_written += len(group)
        self.last_group_size = len(group)
        if self._chain.n - self._snapshot_at >= SNAPSHOT_EVERY:
            self._snapshot_at = self._chain.n
            self._thread.submit(self._write_snapshot)

    def _release(self, group: list[_Member], error: Exception | None) -> None:
        """Changes are seen by this process before any answer of the group is."""
        for member in group:
            if error is None and member.change is not None and member.failed is None:
                member.change.applied()
        for member in group:
            if error is None and member.late:
                self._withhold(member)
            if member.done is None or member.done.done():
                continue
            if error is not None:
                member.done.set_exception(error)
                member.done.exception()  # a caller that gave up does not look
            elif member.failed is not None:
                assert member.receipt is not None
                failure = ChangeFailed(member.receipt)
                failure.__cause__ = member.failed
                member.done.set_exception(failure)
                member.done.exception()
            else:
                assert member.receipt is not None
                member.done.set_result(member.receipt)

    def _withhold(self, member: _Member) -> None:
        record = member.record
        withheld = event.Withheld(
            id=_uuid(),
            ts=self._clock(),
            node=self._node,
            tenant=event.tenant_of(record),
            intent=record.id,
            why="audit_unavailable",
        )
        self._queue.append(_Member(withheld, event.encode(withheld)))
        self._wake.set()

    async def _heartbeat(self) -> None:
        """A `mark` each minute without a record; while degraded, one try a second to come back."""
        while True:
            await asyncio.sleep(1.0)
            due = self.last_commit_age_s() >= MARK_S or self.state == "DEGRADED"
            if due and not self._queue and not self._closing:
                mark = event.Mark(id=_uuid(), ts=self._clock(), node=self._node)
                with contextlib.suppress(Unavailable, asyncio.TimeoutError):
                    await self.append(mark)

    def _watch_clock(self, group: list[_Member]) -> None:
        """Note a step of the clock; far forward is refused, since the chain's time cannot go back."""
        assert self._clock_base is not None
        now, tick = self._clock(), self._monotonic()
        base, base_tick = self._clock_base
        should = base + int((tick - base_tick) * 1e6)
        if abs(now - should) <= STEP_US:
            return
        if now - should > FORWARD_US:
            raise Unavailable("the clock jumped forward by more than 10 minutes: confirm the time, then restart")
        step = event.Clock(id=_uuid(), ts=now, node=self._node, was=should, now=now)
        group.insert(0, _Member(step, event.encode(step)))
        self._clock_base = (now, tick)

    # ---- framing and committing ------------------------------------------------------------------------------------

    def _build(self, group: list[_Member]) -> _Built:
        chain, first = self._chain.stage(), self._chain.n
        entries, built = [], _Built(chain, b"", b"")
        for member in group:
            at = chain.n
            entries.append(chain.append(member.body, self._clock(), event.tenant_of(member.record)))
            member.receipt = Receipt(chain.log, at, bytes.fromhex(chain.previous))
            if isinstance(member.record, event.Intent):
                built.intents.append((member.record.id, at))
            elif isinstance(member.record, event.Outcome):
                built.settled.append(member.record.intent)
        built.bundle = pack(entries)
        built.seal = self._key.sign(seal_statement(chain.log, self.epoch, first, len(entries), chain.previous))
        return built

    def _commit(self, group: list[_Member], built: _Built | None) -> _Built:
        """One group in one transaction; at most once more if the outcome of COMMIT was unknown."""
        for _ in range(2):
            connection = self._connect()
            try:
                with_changes = built is None
                connection.begin()
                for member in group if with_changes else ():
                    self._write_change(connection, member)
                made = built or self._build(group)
                self._store(connection, made, len(group))
            except BaseException:
                self._disconnect()  # before COMMIT: a plain failure, nothing is stored
                raise
            try:
                connection.commit()
            except SQLAlchemyError:
                self._disconnect()
                if self._landed(made):
                    return made
                continue  # not there: the same group once more, and the epoch decides
            return made
        raise Unavailable("COMMIT failed twice")

    def _write_change(self, connection: Connection, member: _Member) -> None:
        """A member's change under its own savepoint: if it fails it undoes itself, and its neighbours stand."""
        if member.change is None:
            return
        nested = connection.begin_nested()
        try:
            member.failed = None
            member.change.write(connection)
            nested.commit()
        except Exception as error:  # whatever it is belongs to this member
            nested.rollback()
            member.failed = error
            if isinstance(member.record, event.Asked):
                changed = _with(member.record, out="error", why="change_undone")
                member.record, member.body = changed, event.encode(changed)

    def _store(self, connection: Connection, built: _Built, count: int) -> None:
        first, chain = self._chain.n, built.chain
        moved = connection.execute(
            sa.update(_shard)
            .where(_shard.c.shard == self._shard, _shard.c.epoch == self.epoch, _shard.c.next_seq == first)
            .values(next_seq=chain.n, head=bytes.fromhex(chain.previous))
        )
        if moved.rowcount != 1:
            raise Fenced("another writer owns this chain")
        connection.execute(
            sa.insert(_batch),
            [
                {
                    "day": chain.t // DAY_US,
                    "shard": self._shard,
                    "first_seq": first,
                    "n": count,
                    "epoch": self.epoch,
                    "t": chain.t,
                    "entries": built.bundle,
                    "head": bytes.fromhex(chain.previous),
                    "seal": built.seal,
                }
            ],
        )
        if built.intents:
            rows = [{"id": i, "shard": self._shard, "seq": seq} for i, seq in built.intents]
            connection.execute(sa.insert(_intent), rows)
        if built.settled:
            connection.execute(sa.delete(_intent).where(_intent.c.id.in_(built.settled)))

    def _landed(self, built: _Built) -> bool:
        """Whether a group whose COMMIT failed in an unknown way is there: asked on a new connection."""
        connection = self._connect()
        with connection.begin():
            head = connection.execute(
                sa.select(_batch.c.head).where(
                    _batch.c.shard == self._shard, _batch.c.first_seq == self._chain.n, _batch.c.epoch == self.epoch
                )
            ).scalar()
        return bool(head == bytes.fromhex(built.chain.previous))

    def _connect(self) -> Connection:
        if self._connection is not None and self._file is not None:
            path, inode = self._file
            try:
                same = path.stat().st_ino == inode
            except OSError:
                same = False
            if not same:
                self._disconnect()
                self._engine.dispose()
                raise Unavailable(f"the database file {path} was removed or replaced")
        if self._connection is None:
            database = self._engine.url.database
            if self._engine.dialect.name == "sqlite" and database:
                file = Path(database)
                if not file.is_file():
                    raise Unavailable(f"the database file {file} is missing")
                self._file = (file, file.stat().st_ino)
            self._connection = self._engine.connect()
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(SQLAlchemyError):
                self._connection.invalidate()
            with contextlib.suppress(SQLAlchemyError):
                self._connection.close()
            self._connection = None

    # ---- taking over -----------------------------------------------------------------------------------------------

    def _take_slot(self) -> int:
        """The lowest slot of this node that no living process holds: the kernel releases a dead process's lock."""
        self._lock_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        for slot in range(self._slots):
            file = (self._lock_dir / f"audit-{self._node}-{slot}.lock").open("ab")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.close()
                continue
            self._lock_file = file
            return slot
        raise Unavailable(f"all {self._slots} audit slots of node {self._node} are taken: raise [audit] slots")

    def _take_over(self) -> None:
        slot = self._take_slot()
        name = f"{self._origin}/{self._node}-{slot}"
        connection = self._connect()
        with connection.begin():
            row = connection.execute(sa.select(_shard).where(_shard.c.log_id == name)).mappings().first()
            if row is None:
                shard = int(connection.execute(sa.select(sa.func.max(_shard.c.shard))).scalar() or 0) + 1
                values = {
                    "shard": shard,
                    "log_id": name,
                    "node": self._node,
                    "slot": slot,
                    "epoch": 0,
                    "next_seq": 0,
                    "head": b"",
                }
                connection.execute(sa.insert(_shard), [values])
                found: Any = values
            else:
                found = row
            self._shard, self.epoch = int(found["shard"]), int(found["epoch"]) + 1
            verifier = self._check_tail(connection, name, found)
            self._chain = verifier.chain
            # Epoch and `open` record commit together: from here on an earlier writer's group matches no row.
            connection.execute(sa.update(_shard).where(_shard.c.shard == self._shard).values(epoch=self.epoch))
            self._open_intents = {
                r.id: r.seq for r in connection.execute(sa.select(_intent).where(_intent.c.shard == self._shard))
            }
            opening = self._opening()
            built = self._build([_Member(opening, event.encode(opening))])
            self._store(connection, built, 1)
        self._chain.adopt(built.chain)
        self._snapshot_at = self._chain.n
        self._settle_open_intents()

    def _opening(self) -> event.Open:
        self._opened_at, self._open_previous = self._chain.n, self._chain.previous
        statement = writer_statement(self._chain.log, self.epoch, self._chain.n, self._chain.previous, self._pub)
        self._cert = self._signer.sign(statement).hex()
        return event.Open(
            id=_uuid(),
            ts=self._clock(),
            node=self._node,
            epoch=self.epoch,
            pub=self._pub,
            cert=self._cert,
            cfg=self._facts.cfg,
            dist=self._facts.dist,
            ver=self._facts.ver,
            clk="system",
        )

    def _check_tail(self, connection: Connection, name: str, row: Any) -> Verifier:
        """Start from the newest well-sealed snapshot and check everything after it; Bad if anything is wrong."""
        verifier = Verifier(name, self._signer.public_key())
        for found in connection.execute(
            sa.select(_snapshot).where(_snapshot.c.shard == row["shard"]).order_by(_snapshot.c.at_seq.desc())
        ).mappings():
            restored = restore(found["blob"], found["seal"], found["epoch"], name, self._signer.public_key())
            if restored is not None and restored.chain.n <= row["next_seq"]:
                verifier = restored
                break
        for batch in _batches(connection, row["shard"], name, after=verifier.chain.n):
            verifier.batch(batch)
        head = bytes.fromhex(verifier.chain.previous) if verifier.chain.n else b""
        if (row["next_seq"], row["head"]) != (verifier.chain.n, head):
            raise Bad("E_TRUNC", f"{name}/{verifier.chain.n}", f"the shard row says {row['next_seq']} records")
        return verifier

    def _settle_open_intents(self) -> None:
        """A change commits only together with its outcome: what a crash left open was not changed. Say so."""
        if not self._open_intents:
            return
        group = []
        for intent, seq in sorted(self._open_intents.items(), key=lambda item: item[1]):
            record = self._find(seq)
            if not isinstance(record, event.Intent):
                continue
            facts = {f: getattr(record, f) for f in ("tenant", "actor", "op", "key", "rh")}
            outcome = event.Outcome(
                id=_uuid(),
                ts=self._clock(),
                node=self._node,
                authn="internal",
                out="error",
                why="interrupted",
                intent=intent,
                **facts,
            )
            group.append(_Member(outcome, event.encode(outcome)))
        if group:
            built = self._commit(group, self._build(group))
            self._chain.adopt(built.chain)
            self._open_intents.clear()

    def _find(self, seq: int) -> event.Record | None:
        with self._engine.connect() as connection:
            row = connection.execute(
                sa.select(_batch.c.first_seq, _batch.c.entries)
                .where(_batch.c.shard == self._shard, _batch.c.first_seq <= seq)
                .order_by(_batch.c.first_seq.desc())
                .limit(1)
            ).first()
        if row is None:
            return None
        return event.decode(_body(unpack(row.entries)[seq - row.first_seq]))

    def _write_snapshot(self) -> None:
        """A sealed copy of the chain's state, so that a start need not read everything."""
        state = {
            **snapshot_of(self._chain),
            "cert": self._cert,
            "opened": [self._opened_at, self._open_previous],
            "pub": self._pub,
        }
        blob = event.encode_plain(state)
        seal = self._key.sign(snapshot_statement(self._chain.log, self.epoch, self._chain.n, blob))
        values = {"shard": self._shard, "at_seq": self._chain.n, "epoch": self.epoch, "blob": blob, "seal": seal}
        connection = self._connect()
        with connection.begin():
            connection.execute(sa.insert(_snapshot), [values])

    # ---- searching -------------------------------------------------------------------------------------------------

    def records(
        self,
        *,
        tenant: str | None = None,
        key: str | None = None,
        actor: str | None = None,
        op: str | None = None,
        out: str | None = None,
        since: int | None = None,
        until: int | None = None,
        after: tuple[str, int] | None = None,
        limit: int = 50,
    ) -> list[Found]:
        """Up to `limit` records that match, newest batch first; `after` is the last one of the page before."""
        filters = {"tenant": tenant, "key": key, "actor": actor, "op": op, "out": out}
        wanted = {k: v for k, v in filters.items() if v is not None}
        found: list[Found] = []
        with self._engine.connect() as connection:
            names = {r.shard: r.log_id for r in connection.execute(sa.select(_shard))}
            chosen = sa.select(_batch).order_by(_batch.c.t.desc(), _batch.c.shard.desc(), _batch.c.first_seq.desc())
            if since is not None:
                chosen = chosen.where(_batch.c.t >= since)
            if after is not None:
                place = self._place(connection, after, names)
                if place is None:
                    return []
                key_columns = sa.tuple_(_batch.c.t, _batch.c.shard, _batch.c.first_seq)
                chosen = chosen.where(key_columns <= sa.tuple_(*(sa.literal(p) for p in place)))
            for row in connection.execution_options(stream_results=True).execute(chosen).mappings():
                log = names.get(row["shard"], "")
                for seq, entry in reversed(list(enumerate(unpack(row["entries"]), row["first_seq"]))):
                    if after is not None and log == after[0] and seq >= after[1]:
                        continue
                    match = _found(log, seq, entry, wanted, since, until)
                    if match is not None:
                        found.append(match)
                        if len(found) >= limit:
                            return found
        return found

    def _place(
        self, connection: Connection, after: tuple[str, int], names: dict[int, str]
    ) -> tuple[int, int, int] | None:
        shard = next((s for s, name in names.items() if name == after[0]), None)
        if shard is None:
            return None
        row = (
            connection.execute(
                sa.select(_batch.c.t, _batch.c.first_seq)
                .where(_batch.c.shard == shard, _batch.c.first_seq <= after[1])
                .order_by(_batch.c.first_seq.desc())
                .limit(1)
            )
            .mappings()
            .first()
        )
        return None if row is None else (int(row["t"]), shard, int(row["first_seq"]))


def _uuid() -> str:
    return str(uuid.UUID(bytes=os.urandom(16), version=4))


def _with(record: event.Asked, **changes: Any) -> Any:
    return msgspec.structs.replace(record, **changes)


def _body(entry: bytes) -> bytes:
    return entry[entry.index(b',"r":{') + 5 : -1]


def _found(
    log: str, seq: int, entry: bytes, wanted: dict[str, str], since: int | None, until: int | None
) -> Found | None:
    # A cheap look before the parser: most entries of a search do not match.
    if any(v.encode() not in entry for v in wanted.values()):
        return None
    parsed = json.loads(entry)
    record, t = parsed["r"], parsed["c"]["t"]
    if any(record.get(k) != v for k, v in wanted.items()):
        return None
    if (since is not None and t < since) or (until is not None and t > until):
        return None
    return Found(log, seq, leaf_hash(entry), t, record)


def _batches(connection: Connection, shard: int, log: str, *, after: int = 0) -> Iterator[Batch]:
    chosen = (
        sa.select(_batch)
        .where(_batch.c.shard == shard, _batch.c.first_seq >= after)
        .order_by(_batch.c.first_seq, _batch.c.day)
    )
    for row in connection.execute(chosen).mappings():
        yield Batch(
            log=log,
            first=row["first_seq"],
            n=row["n"],
            epoch=row["epoch"],
            t=row["t"],
            entries=row["entries"],
            head=row["head"],
            seal=row["seal"],
            day=row["day"],
        )


def restore(blob: bytes, seal: bytes, epoch: int, name: str, audit_key: bytes) -> Verifier | None:
    """A verifier that goes on from a snapshot, if its writer was certified and sealed it; None otherwise."""
    try:
        state = json.loads(blob)
        chain = chain_of(state)
        opened, previous = state["opened"]
        pub, cert = str(state["pub"]), bytes.fromhex(state["cert"])
    except (ValueError, KeyError, TypeError):
        return None
    if chain.log != name:
        return None
    certified = check_signature(audit_key, cert, writer_statement(name, epoch, opened, previous, pub))
    if not certified or not check_seal(pub, seal, snapshot_statement(name, epoch, chain.n, blob)):
        return None
    verifier = Verifier(name, audit_key, chain)
    verifier.epoch, verifier.writer = epoch, pub
    verifier.resume(opened)
    return verifier


# ---- the whole database ----------------------------------------------------------------------------------------------


def verify_database(engine: Engine, trust: Trust) -> Report:
    """Recompute and compare every stored column of every audit table; the first bad record of each chain is named."""
    with engine.connect() as connection:
        return verify_connection(connection, trust)


def verify_connection(connection: Connection, trust: Trust) -> Report:
    """As `verify_database`, on a connection: what it sees in its transaction."""
    report = Report()
    shards = connection.execute(sa.select(_shard).order_by(_shard.c.shard)).mappings().all()
    if not shards:
        report.add("E_MISSING", trust.origin, "the database holds no chain")
    known = {row["shard"] for row in shards}
    for table in (_batch, _snapshot, _intent):
        stray = connection.execute(sa.select(sa.func.count()).where(table.c.shard.not_in(known))).scalar()
        if stray:
            report.add("E_DERIVED", table.name, f"{stray} rows belong to no chain")
    for row in shards:
        _verify_shard(connection, row, trust, report)
    report.anchored = True  # the shard rows are what the writers committed; exports need receipts or a state
    return report


def _verify_shard(connection: Connection, row: Any, trust: Trust, report: Report) -> None:
    log = row["log_id"]
    if log != f"{trust.origin}/{row['node']}-{row['slot']}":
        report.add("E_ORIGIN", str(log), "log_id, node and slot of the shard row disagree, or the origin is another")
        return
    snapshots = {
        s["at_seq"]: s
        for s in connection.execute(sa.select(_snapshot).where(_snapshot.c.shard == row["shard"])).mappings()
    }

    def compare(chain: Chain) -> None:
        snapshot = snapshots.pop(chain.n, None)
        if snapshot is not None:
            _verify_snapshot(snapshot, chain, log, report, trust)

    verifier = check_chain(log, _batches(connection, row["shard"], log), trust, report, after=compare)
    if verifier is None:
        return
    for at in snapshots:
        report.add("E_DERIVED", f"{log}/{at}", "a snapshot stands where no batch ends")
    where = f"{log}/{verifier.chain.n}"
    head = bytes.fromhex(verifier.chain.previous) if verifier.chain.n else b""
    if row["next_seq"] > verifier.chain.n:
        report.add("E_TRUNC", where, f"the shard row says {row['next_seq']} records")
    elif (row["next_seq"], row["head"]) != (verifier.chain.n, head):
        report.add("E_DERIVED", where, "next_seq or head of the shard row differ from the entries")
    elif row["epoch"] != verifier.epoch:
        report.add("E_EPOCH", where, f"the shard row says epoch {row['epoch']}, the last writer's is {verifier.epoch}")
    stored = {r.id: r.seq for r in connection.execute(sa.select(_intent).where(_intent.c.shard == row["shard"]))}
    if stored != verifier.intents:
        report.add("E_DERIVED", where, "the table of open intents differs from the entries")


def _verify_snapshot(snapshot: Any, chain: Chain, log: str, report: Report, trust: Trust) -> None:
    where = f"{log}/{snapshot['at_seq']}"
    restored = restore(snapshot["blob"], snapshot["seal"], snapshot["epoch"], log, trust.keys[0])
    if restored is None:
        report.add("E_SEAL", where, "snapshot not sealed by a certified writer")
    elif snapshot_of(restored.chain) != snapshot_of(chain):
        report.add("E_DERIVED", where, "snapshot differs from the entries")


# ---- exporting -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ExportSummary:
    """What an export holds."""

    directory: Path
    logs: dict[str, int]

    @property
    def records(self) -> int:
        """All records."""
        return sum(self.logs.values())


def export(engine: Engine, directory: Path, trust: Trust) -> ExportSummary:
    """Write every chain as C2SP tlog-tiles entry bundles and `seals.jsonl`, and the trust file as a convenience."""
    directory.mkdir(parents=True, exist_ok=True)
    logs: dict[str, int] = {}
    with engine.connect() as connection:
        for row in connection.execute(sa.select(_shard).order_by(_shard.c.shard)).mappings():
            logs[row["log_id"]] = _export_chain(connection, row, directory / row["log_id"])
    lines = ["# Compare with the ceremony's report before you trust it.", f"origin {trust.origin}"]
    lines += [f"key {base64.b64encode(k).decode()}" for k in trust.keys]
    (directory / "trust.txt").write_text("\n".join(lines) + "\n")
    return ExportSummary(directory, logs)


def _export_chain(connection: Connection, row: Any, directory: Path) -> int:
    directory.mkdir(parents=True, exist_ok=True)
    pending: list[bytes] = []
    tiles = count = 0

    def write(entries: list[bytes]) -> None:
        path = directory / tile_path(tiles, len(entries))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pack(entries))

    with (directory / "seals.jsonl").open("wb") as seals:
        for batch in _batches(connection, row["shard"], row["log_id"]):
            line = {
                "day": batch.day,
                "epoch": batch.epoch,
                "first": batch.first,
                "head": batch.head.hex(),
                "n": batch.n,
                "seal": batch.seal.hex(),
                "t": batch.t,
            }
            seals.write(event.encode_plain(line) + b"\n")
            pending += unpack(batch.entries)
            count += batch.n
            while len(pending) >= BUNDLE:
                write(pending[:BUNDLE])
                pending, tiles = pending[BUNDLE:], tiles + 1
    if pending:
        write(pending)
    return count
