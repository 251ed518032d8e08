"""The only writer of the log. An answer leaves only after the COMMIT that carries its record.

Each worker process owns one chain: it takes a slot of its node, raises the slot's epoch (which fences every earlier
writer), checks the tail, has a fresh key certified by the HSM, and from then on commits records in groups, each sealed
by that key. Records are encoded by the request and only framed here, so a bad record fails its own request alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import msgspec
import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from audit import event
from audit.chain import (
    DAY_US,
    Bad,
    Chain,
    Receipt,
    Verifier,
    pack,
    seal_statement,
    snapshot_of,
    snapshot_statement,
    unpack,
    writer_statement,
)
from audit.clock import ClockWatch, Step, StepRefused
from audit.disk import Disk, Level
from audit.session import CommitUnknown, Session, StoreUnusable, is_full
from audit.stored import beginning, restore, stored_batches
from audit.tables import batch_table, intent_table, shard_table, snapshot_table

_log: Final = logging.getLogger("skms.audit")

SNAPSHOT_EVERY: Final = 65_536
MARK_S: Final = 60.0
START_TRIES: Final = 64  # of processes that begin new chains at the same moment, one gets on at each
RETRY_S: Final = 0.1  # between two looks for what became of a COMMIT
_ENDS: Final = (event.Outcome, event.Withheld, event.Close, event.Mark, event.Clock, event.Admin)
LOOKS: Final = frozenset({"metrics", "audit_status"})  # how operators see what is wrong


class Unavailable(Exception):
    """No durable record, so no answer. `executed` tells whether the operation may have taken effect."""

    def __init__(self, reason: str, *, executed: bool = False) -> None:
        super().__init__(reason)
        self.executed = executed


class Fenced(Unavailable):
    """Another writer owns the chain: this process must end."""


class _Failed(Exception):
    """A group that was not stored. `unknown`: it may have been, and nobody has found out."""

    def __init__(self, reason: str, *, unknown: bool = False, full: bool = False) -> None:
        super().__init__(reason)
        self.unknown, self.full = unknown, full


class RolledBack(Unavailable):
    """An anchor outside the database has seen what the database does not hold: nothing is served until a recovery."""


class ChangeFailed(Exception):
    """The change that was to commit with the record failed and was undone; its record says so. `__cause__` is why."""

    def __init__(self, receipt: Receipt) -> None:
        super().__init__("the change was undone")
        self.receipt = receipt


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
    """The audit key in the HSM. Several HSMs may sign one log, each with its own key."""

    def public_key(self) -> bytes:
        """The key that would sign now."""

    def known_keys(self) -> tuple[bytes, ...]:
        """Every key that may have signed for this log so far, also of HSMs that have left."""

    def sign(self, statement: bytes) -> bytes: ...


@dataclass(slots=True)
class _Member:
    """One record that waits for its commit."""

    record: event.Record
    body: bytes
    done: asyncio.Future[Receipt] | None = None
    change: Change | None = None
    failed: Exception | None = None
    due: float = 0.0  # when its caller is told that it is late (time of the event loop)
    late: bool = False
    again: bool = False  # tried once more from the reserve
    receipt: Receipt | None = None

    @property
    def essential(self) -> bool:
        """Whether it ends or explains something that has begun: it is taken while new operations are not."""
        if isinstance(self.record, event.Op):
            return self.record.op in LOOKS
        return isinstance(self.record, _ENDS)


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
        disk: Disk | None = None,
    ) -> None:
        self._engine, self._origin, self._node, self._slots = engine, origin, node, slots
        self._lock_dir, self._signer, self._facts = lock_dir, signer, open_facts
        self._clock, self._monotonic, self._deadline = clock, monotonic, deadline_s
        self._disk, self._looking = disk, False
        self._level = Level.OK  # of the disk, as the last `watermark` record says
        self._max_waiting, self._max_group = max_waiting, max_group
        self._key = Ed25519PrivateKey.generate()
        self._pub = self._key.public_key().public_bytes_raw().hex()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="audit-commit")
        self._queue: list[_Member] = []
        self._wake = asyncio.Event()
        self._waited: deque[_Member] = deque()  # whoever may still be waited for, oldest first
        self._owed: list[_Member] = []  # `withheld` records of a group that failed: they go with the next
        self._timer: asyncio.TimerHandle | None = None
        self._session = Session(engine)
        self._chain = Chain(origin)
        self._shard = 0
        self._opened_at = 0
        self._open_previous = ""
        self._cert = ""
        self._open_intents: dict[str, int] = {}
        self._lock_file: Any = None
        self._tasks: list[asyncio.Task[None]] = []
        self._last_commit = monotonic()
        self._watch: ClockWatch | None = None
        self._clock_refused = ""
        self._begun: float | None = None  # when the commit in flight began
        self._broken = ""  # why the last commit failed
        self._life: Literal["STARTING", "RUNNING", "FENCED", "ROLLED_BACK", "CLOSED"] = "STARTING"
        self._snapshot_at = 0
        self._closing = self._leaving = False
        self._marked: event.Root | None = None  # the newest checkpoint a mark of ours names
        self._unmarked = False  # a record other than a mark stands behind our last mark with a checkpoint
        self.checkpoint: event.Root | None = None  # (size, root) of the newest checkpoint seen, for marks
        self.checkpoint_age_s = self.exposed_s = 0.0  # of the newest checkpoint; since when a record has none
        self.rolled_back: RolledBack | None = None  # the database is not what anchors have seen: see `stop`
        self.halted: str | None = None  # why nothing but marks is accepted: the notary is late
        self.epoch = 0
        self.fenced = asyncio.Event()  # the process must end
        self.groups = self.records_written = self.last_group_size = 0
        self.withheld = self.clock_steps = 0  # records of these kinds
        self.observe: Callable[[int, float], None] = lambda records, seconds: None  # each commit

    # ---- what others see -------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The chain: origin, node and slot."""
        return self._chain.log

    @property
    def state(self) -> Literal["STARTING", "RUNNING", "DEGRADED", "FENCED", "ROLLED_BACK", "CLOSED"]:
        """RUNNING takes every record; DEGRADED refuses some or all, says why, and comes back by itself."""
        if self._life != "RUNNING":
            return self._life
        return "DEGRADED" if self.reason else "RUNNING"

    @property
    def reason(self) -> str:
        """Why the log is DEGRADED or ROLLED_BACK, and what to do; empty if it is not."""
        return str(self.rolled_back or "") or self._broken or self._refusal(data_plane=True)

    @property
    def disk_used(self) -> float:
        """The part of the disk in use, 0 to 1; 0 if nobody watches it."""
        return 0.0 if self._disk is None else self._disk.used

    def accepting(self, op: str) -> None:
        """Unavailable if a new operation's record would be refused now: cheaper to know before the HSM is asked."""
        if self.rolled_back is not None:
            raise self.rolled_back
        refused = self._refusal(data_plane=op in event.DATA_PLANE)
        if refused and op not in LOOKS and self._life == "RUNNING":
            raise Unavailable(refused)

    @property
    def next_seq(self) -> int:
        """Number of the next record."""
        return self._chain.n

    @property
    def newest(self) -> int:
        """The time of the newest record of this chain (us): no clock that is right is behind it."""
        return self._chain.t

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
        """Take a slot, fence its earlier writer, check its tail, open. Bad if the tail does not verify.

        Unavailable if the database cannot be written, or would lose what it has committed.
        """
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._thread, self._take_over)
        except BaseException as error:
            await loop.run_in_executor(self._thread, self._session.drop)
            self._thread.shutdown(wait=True)
            if self._lock_file is not None:
                self._lock_file.close()
            if isinstance(error, StoreUnusable | CommitUnknown):
                raise Unavailable(f"audit: {error}") from error
            raise
        self._watch = ClockWatch(self._clock, self._monotonic, state_dir=self._lock_dir)
        self._life, self._last_commit = "RUNNING", self._monotonic()
        self._tasks = [asyncio.create_task(self._run()), asyncio.create_task(self._heartbeat())]

    async def close(self) -> None:
        """Commit what waits, then snapshot and `close`. What the database does not take within the deadline is left."""
        if self._life in {"CLOSED", "STARTING"}:
            return
        self._closing = True
        loop = asyncio.get_running_loop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._deadline):
                while self._life == "RUNNING" and (self._queue or self._begun is not None):  # noqa: ASYNC110 - two facts
                    await asyncio.sleep(0.01)
        self._leaving = True
        if self._life == "RUNNING" and not self._broken and not self._queue and self._begun is None:
            with contextlib.suppress(Unavailable):
                closing = event.Close(id=_uuid(), ts=self._time(), node=self._node, epoch=self.epoch, count=0)
                await self.append(closing, last=True)
                await loop.run_in_executor(self._thread, self._write_snapshot)
        for task in self._tasks:
            task.cancel()
        if self._timer is not None:
            self._timer.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with contextlib.suppress(TimeoutError):  # a COMMIT that hangs is never cancelled: the process ends without it
            await asyncio.wait_for(loop.run_in_executor(self._thread, self._session.drop), self._deadline)
            self._thread.shutdown(wait=True)
        if self._lock_file is not None:
            self._lock_file.close()
        self._life = "CLOSED"

    def stop(self, found: RolledBack) -> None:
        """Write nothing more: not one record may continue a history that an anchor contradicts."""
        self.rolled_back, self._life = found, "ROLLED_BACK"
        self._give_up(self._queue, found)
        self._queue = []

    # ---- appending -------------------------------------------------------------------------------------------------

    async def append(self, record: event.Record, *, change: Change | None = None, last: bool = False) -> Receipt:
        """The receipt, once the record (and its change) is durable.

        Unavailable if that does not happen in time; should the record land later, a `withheld` record follows it.
        ChangeFailed if the change was undone: then the record stands, and says so.
        """
        if self._closing and not last:
            raise Unavailable("the audit log is closing")
        (outcome,) = await self._settled(self._enqueue([(record, change)]))
        if isinstance(outcome, ChangeFailed):
            raise outcome
        return outcome

    async def append_many(self, records: Sequence[event.Record]) -> list[Receipt]:
        """As `append`, for several records in order, with one deadline."""
        return [o for o in await self.append_each([(r, None) for r in records]) if isinstance(o, Receipt)]

    async def append_each(self, given: Sequence[tuple[event.Record, Change | None]]) -> list[Receipt | ChangeFailed]:
        """As `append_many`, each with its change: one that was undone is told in its place, and harms no other."""
        if self._closing:
            raise Unavailable("the audit log is closing")
        return await self._settled(self._enqueue(given))

    def _enqueue(self, given: Sequence[tuple[event.Record, Change | None]]) -> list[_Member]:
        if self._life == "FENCED":
            raise Fenced("another writer owns this chain")
        if self.rolled_back is not None:
            raise self.rolled_back
        if self._life != "RUNNING":
            raise Unavailable(f"the audit log is {self._life.lower()}")
        loop = asyncio.get_running_loop()
        members = [_Member(r, event.encode(r), loop.create_future(), c) for r, c in given]
        if self._refusal(data_plane=True) or self.waiting + len(given) > self._max_waiting:
            self._refuse_new([m for m in members if not m.essential])
        due = loop.time() + self._deadline
        for member in members:
            member.due = due
        self._queue += members
        self._waited += members
        if self._timer is None:
            self._timer = loop.call_at(due, self._expire)
        self._wake.set()
        return members

    def _refuse_new(self, members: list[_Member]) -> None:
        """Unavailable unless everything may be taken."""
        if not members:
            return
        refused = self._refusal(data_plane=all(_data_plane(m.record) for m in members))
        if refused:
            raise Unavailable(refused)
        if self.waiting + len(members) > self._max_waiting:
            raise Unavailable("too many records wait for their commit")

    def _expire(self) -> None:
        """Tell those whose deadline has passed. One timer for all: they wait equally long."""
        loop = asyncio.get_running_loop()
        self._timer = None
        while self._waited:
            member = self._waited[0]
            assert member.done is not None
            if not member.done.done():
                if member.due > loop.time():
                    self._timer = loop.call_at(member.due, self._expire)
                    return
                member.late = True
                late = Unavailable("the audit log did not commit in time", executed=member.change is not None)
                member.done.set_exception(late)
                member.done.exception()  # a caller that gave up does not look
            self._waited.popleft()

    def _refusal(self, *, data_plane: bool) -> str:
        """Why a new operation is refused; empty if it is not."""
        if self._begun is not None and (hangs := self._monotonic() - self._begun) > self._deadline:
            return f"the database has not answered a commit for {hangs:.0f} s: look at its disk and locks"
        if self._clock_refused:
            with contextlib.suppress(StepRefused):  # it may have been set right, or confirmed
                self._look_at_clock()
        if self._clock_refused or self.halted:
            return self._clock_refused or str(self.halted)
        level = Level.OK if self._disk is None else self._disk.level
        if level is Level.STOP or (level is Level.REFUSE and data_plane):
            return f"the disk of the audit log is full ({self.disk_used:.0%}): make room"
        return ""

    async def _settled(self, members: list[_Member]) -> list[Receipt | ChangeFailed]:
        """Their receipts; if one has none, or nobody waits any more, the others' results are not released either."""
        try:
            return [await _outcome(m.done) for m in members if m.done is not None]
        except BaseException:
            for member in members:
                landed = member.done is not None and member.done.done() and not member.done.cancelled()
                if not landed or member.done is None:
                    member.late = True
                elif member.done.exception() is None:
                    self._withhold(member)
            raise

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            if not self._queue:
                await self._wake.wait()
                continue
            group = [*self._owed, *self._queue[: self._max_group]]
            self._owed, self._queue = [], self._queue[self._max_group :]
            try:
                await self._write(group)
            except Fenced as fenced:
                self._end(group, fenced)
                return
            except _Failed as failed:
                self._broken = f"the last commit failed: {failed}"
                _log.error("audit commit failed", extra={"facts": {"error": str(failed), "unknown": failed.unknown}})
                group = self._again(group) if failed.full else group
                self._owed = [m for m in group if isinstance(m.record, event.Withheld)]
                self._refuse(group, str(failed), unknown=failed.unknown)
            else:
                if self.rolled_back is not None:  # found meanwhile: the records stand, the results stay here
                    self._give_up(group, self.rolled_back)
                    return
                self._release(group)

    async def _write(self, group: list[_Member]) -> None:
        """Commit a group; _Failed if it is not stored, or nobody can tell."""
        step = self._clock_step(group)
        if not group:
            return
        self._begun = begun = self._monotonic()
        try:
            # Without changes the group is framed, hashed and sealed here: one hand-over, only the COMMIT elsewhere.
            built = None if any(m.change for m in group) else self._build(group)
            built = await asyncio.get_running_loop().run_in_executor(self._thread, self._commit, group, built)
        except (Fenced, _Failed):
            raise
        except Exception as caught:  # every kind of failure means: no record, no answer
            reason = str(caught) if isinstance(caught, StoreUnusable) else type(caught).__name__
            raise _Failed(f"audit: {reason}", full=is_full(caught)) from caught
        finally:
            self._begun = None
        self._adopt(built, group)
        self.observe(len(group), self._monotonic() - begun)
        if step is not None and self._watch is not None:
            self._watch.recorded(step)

    def _adopt(self, built: _Built, group: list[_Member]) -> None:
        self._chain.adopt(built.chain)
        for intent, seq in built.intents:
            self._open_intents[intent] = seq
        for intent in built.settled:
            self._open_intents.pop(intent, None)
        if self._broken:
            _log.warning("the audit log is written again", extra={"facts": {"seq": self._chain.n}})
        self._broken, self._last_commit = "", self._monotonic()
        self.groups += 1
        self.records_written += len(group)
        self.last_group_size = len(group)
        for member in group:
            self._unmarked |= not isinstance(member.record, event.Mark)
            self.withheld += isinstance(member.record, event.Withheld)
            self.clock_steps += isinstance(member.record, event.Clock)
        if self._chain.n - self._snapshot_at >= SNAPSHOT_EVERY:
            self._snapshot_at = self._chain.n
            self._thread.submit(self._write_snapshot)

    def _release(self, group: list[_Member]) -> None:
        """Changes are seen by this process before any answer of the group is."""
        for member in group:
            if member.change is not None and member.failed is None:
                member.change.applied()
        for member in group:
            if member.late:
                self._withhold(member)
            if member.done is None or member.done.done():
                continue
            assert member.receipt is not None
            if member.failed is None:
                member.done.set_result(member.receipt)
                continue
            failure = ChangeFailed(member.receipt)
            failure.__cause__ = member.failed
            member.done.set_exception(failure)
            member.done.exception()
        while self._waited and self._waited[0].done is not None and self._waited[0].done.done():
            self._waited.popleft()

    def _refuse(self, group: list[_Member], reason: str, *, unknown: bool = False) -> None:
        for member in group:
            if member.done is not None and not member.done.done():
                executed = unknown and member.change is not None
                member.done.set_exception(Unavailable(reason, executed=executed))
                member.done.exception()

    def _again(self, group: list[_Member]) -> list[_Member]:
        """No space is left: what ends an operation goes once more, into the reserve; the rest of the group is returned."""
        if self._disk is None:
            return group
        self._disk.full()
        kept = [m for m in group if m.essential and not m.again and not isinstance(m.record, event.Clock)]
        for member in kept:
            member.again = True
        self._queue[:0] = kept
        return [m for m in group if m not in kept]

    def _end(self, group: list[_Member], fenced: Fenced) -> None:
        """Another writer owns the chain: nothing more is taken, and the process must end."""
        self._life = "FENCED"
        _log.critical("fenced", extra={"facts": {"log": self.name, "epoch": self.epoch}})
        self._give_up([*group, *self._queue], fenced)
        self._queue = []
        self.fenced.set()

    def _give_up(self, members: list[_Member], found: Unavailable) -> None:
        for member in members:
            if member.done is not None and not member.done.done():
                member.done.set_exception(type(found)(str(found)))
                member.done.exception()  # a caller that gave up does not look

    def _withhold(self, member: _Member) -> None:
        record = member.record
        withheld = event.Withheld(
            id=_uuid(),
            ts=self._time(),
            node=self._node,
            tenant=event.tenant_of(record),
            intent=record.id,
            why="audit_unavailable",
        )
        self._queue.append(_Member(withheld, event.encode(withheld)))
        self._wake.set()

    async def _heartbeat(self) -> None:
        """Each second: look at disk and clock; a `mark` after a minute without a record, at a new checkpoint, or to
        find out whether a log that could not be written can be again."""
        while True:
            await asyncio.sleep(1.0)
            self._look_at_disk()
            with contextlib.suppress(StepRefused):
                self._look_at_clock()
            if self._queue or self._closing or self._begun is not None:
                continue
            # A checkpoint is named once per activity: naming each would make records, hence checkpoints, for ever.
            seen = self.checkpoint
            news = seen is not None and seen != self._marked and self._unmarked
            with contextlib.suppress(Unavailable):
                if self._disk is not None and self._disk.level is not self._level:
                    await self._note_disk(self._disk.level)
                elif self.last_commit_age_s() >= MARK_S or self._broken or news:
                    self._marked, self._unmarked = seen, False
                    await self.append(event.Mark(id=_uuid(), ts=self._time(), node=self._node, root=seen))

    def _look_at_disk(self) -> None:
        """On a thread of its own, one look at a time: a disk that hangs must not take the event loop with it."""
        if self._disk is None or self._looking:
            return
        self._looking = True
        threading.Thread(target=self._measure, args=(self._disk,), name="audit-disk", daemon=True).start()

    def _measure(self, disk: Disk) -> None:
        try:
            disk.measure()
        except OSError as error:
            _log.error("the disk cannot be looked at", extra={"facts": {"errno": error.errno}})
        finally:
            self._looking = False

    async def _note_disk(self, level: Level) -> None:
        """Say in the log that the disk has passed a watermark, up or down."""
        said = event.Admin(
            id=_uuid(), ts=self._time(), node=self._node, op="watermark", out="ok", why=f"disk_{level.name.lower()}"
        )
        await self.append(said)
        self._level = level
        _log.warning("disk watermark", extra={"facts": {"level": level.name, "used": round(self.disk_used, 3)}})

    def _look_at_clock(self) -> Step | None:
        assert self._watch is not None
        try:
            step = self._watch.step()
        except StepRefused as refused:
            if not self._clock_refused:
                _log.critical("the clock is refused", extra={"facts": {"reason": str(refused)}})
            self._clock_refused = str(refused)
            raise
        self._clock_refused = ""
        return step

    def _clock_step(self, group: list[_Member]) -> Step | None:
        """Put a step of the clock in front of the group; far forward, leave in it only what ends an operation."""
        try:
            step = self._look_at_clock()
        except StepRefused as refused:
            fresh = [m for m in group if not m.essential]
            self._refuse(fresh, str(refused))
            group[:] = [m for m in group if m.essential]
            return None
        if step is None:
            return None
        records: list[event.Record] = [
            event.Clock(id=_uuid(), ts=step.now, node=self._node, was=step.was, now=step.now)
        ]
        if step.confirmed is not None:
            actor = f"local:uid:{step.confirmed.uid}"
            records.append(
                event.Admin(id=_uuid(), ts=step.now, node=self._node, op="confirm_clock", out="ok", actor=actor)
            )
        group[:0] = [_Member(r, event.encode(r)) for r in records]
        return step

    def _time(self) -> int:
        """The clock; while it is refused, what it would read without its step (us)."""
        return self._watch.believed() if self._clock_refused and self._watch is not None else self._clock()

    # ---- framing and committing ------------------------------------------------------------------------------------

    def _build(self, group: list[_Member]) -> _Built:
        chain, first = self._chain.stage(), self._chain.n
        entries, built = [], _Built(chain, b"", b"")
        for member in group:
            at = chain.n
            if isinstance(member.record, event.Close):  # what stands before it is known only now
                member.record = msgspec.structs.replace(member.record, count=at - self._opened_at + 1)
                member.body = event.encode(member.record)
            entries.append(chain.append(member.body, self._time(), event.tenant_of(member.record)))
            member.receipt = Receipt(chain.log, at, bytes.fromhex(chain.previous))
            if isinstance(member.record, event.Intent):
                built.intents.append((member.record.id, at))
            elif isinstance(member.record, event.Outcome):
                built.settled.append(member.record.intent)
        built.bundle = pack(entries)
        built.seal = self._key.sign(seal_statement(chain.log, self.epoch, first, len(entries), chain.previous))
        return built

    def _commit(self, group: list[_Member], built: _Built | None) -> _Built:
        """One group in one transaction, once more if COMMIT did not say what became of it."""
        try:
            connection = self._session.begin()
            made = self._fill(connection, group, built)
        except BaseException:
            self._session.drop()  # before COMMIT: a plain failure, nothing is stored
            raise
        try:
            self._session.commit(connection)
        except CommitUnknown as unknown:
            _log.error("outcome of COMMIT unknown", extra={"facts": {"error": str(unknown)}})
            return self._resolve(group, built, made)
        return made

    def _fill(self, connection: Connection, group: list[_Member], built: _Built | None) -> _Built:
        """Everything of a group's transaction but its COMMIT. A group with changes is framed after they ran."""
        for member in group if built is None else ():
            self._write_change(connection, member)
        made = built or self._build(group)
        self._store(connection, made, len(group))
        return made

    def _resolve(self, group: list[_Member], built: _Built | None, made: _Built) -> _Built:
        """Find out whether a group landed, however long that takes: nothing else may be written to the chain before.

        If it did not, the same bytes go once more; the epoch decides whether we still may.
        """
        while not self._leaving:
            absent = False
            try:
                connection = self._session.begin()
                if self._landed(connection, made):
                    # On PostgreSQL this COMMIT waits for the standbys too, and they replay in order.
                    self._session.commit(connection)
                    return made
                absent = True  # and it will never land: the lock waited for the old transaction's end
                made = self._fill(connection, group, built)
                self._session.commit(connection)
                return made
            except CommitUnknown:
                pass
            except Exception:
                self._session.drop()
                if absent:
                    raise
            time.sleep(RETRY_S)
        raise _Failed("the outcome of COMMIT is unknown, and the log is closing", unknown=True)

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
            sa.update(shard_table)
            .where(
                shard_table.c.shard == self._shard, shard_table.c.epoch == self.epoch, shard_table.c.next_seq == first
            )
            .values(next_seq=chain.n, head=bytes.fromhex(chain.previous))
        )
        if moved.rowcount != 1:
            raise Fenced("another writer owns this chain")
        connection.execute(
            sa.insert(batch_table),
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
            connection.execute(sa.insert(intent_table), rows)
        if built.settled:
            connection.execute(sa.delete(intent_table).where(intent_table.c.id.in_(built.settled)))

    def _landed(self, connection: Connection, made: _Built) -> bool:
        """Whether a group is there. Locking the shard's row waits for the transaction that may still be writing it."""
        locked = sa.select(shard_table.c.shard).where(shard_table.c.shard == self._shard).with_for_update()
        connection.execute(locked).one()
        found = sa.select(batch_table.c.head).where(
            batch_table.c.shard == self._shard,
            batch_table.c.first_seq == self._chain.n,
            batch_table.c.epoch == self.epoch,
        )
        return bool(connection.execute(found).scalar() == bytes.fromhex(made.chain.previous))

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
        for _ in range(START_TRIES):
            try:
                self._open_chain(f"{self._origin}/{self._node}-{slot}", slot)
                break
            except IntegrityError:  # another process began a chain of its own at the same moment, under this number
                self._session.drop()
        else:
            raise Unavailable("other processes keep starting chains at the same moment: start again")
        self._snapshot_at = self._chain.n
        self._settle_open_intents()

    def _open_chain(self, name: str, slot: int) -> None:
        """Raise the epoch and write the `open` record, in one transaction."""
        connection = self._session.begin()
        row = connection.execute(sa.select(shard_table).where(shard_table.c.log_id == name)).mappings().first()
        if row is None:
            shard = int(connection.execute(sa.select(sa.func.max(shard_table.c.shard))).scalar() or 0) + 1
            values = {
                "shard": shard,
                "log_id": name,
                "node": self._node,
                "slot": slot,
                "epoch": 0,
                "next_seq": 0,
                "head": b"",
            }
            connection.execute(sa.insert(shard_table), [values])
            found: Any = values
        else:
            found = row
        self._shard, self.epoch = int(found["shard"]), int(found["epoch"]) + 1
        verifier = self._check_tail(connection, name, found)
        self._chain = verifier.chain
        # Epoch and `open` record commit together: from here on an earlier writer's group matches no row.
        connection.execute(sa.update(shard_table).where(shard_table.c.shard == self._shard).values(epoch=self.epoch))
        self._open_intents = {
            r.id: r.seq for r in connection.execute(sa.select(intent_table).where(intent_table.c.shard == self._shard))
        }
        opening = self._opening()
        built = self._build([_Member(opening, event.encode(opening))])
        self._store(connection, built, 1)
        self._session.commit(connection)
        self._chain.adopt(built.chain)

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
        known = self._signer.known_keys()
        verifier, _ = beginning(connection, row["shard"], name, known)
        for found in connection.execute(
            sa.select(snapshot_table)
            .where(snapshot_table.c.shard == row["shard"])
            .order_by(snapshot_table.c.at_seq.desc())
        ).mappings():
            restored = restore(found["blob"], found["seal"], found["epoch"], name, known)
            if restored is not None and restored.chain.n <= row["next_seq"]:
                verifier = restored
                break
        for batch in stored_batches(connection, row["shard"], name, after=verifier.chain.n):
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
                sa.select(batch_table.c.first_seq, batch_table.c.entries)
                .where(batch_table.c.shard == self._shard, batch_table.c.first_seq <= seq)
                .order_by(batch_table.c.first_seq.desc())
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
        try:
            connection = self._session.begin()
            connection.execute(sa.insert(snapshot_table), [values])
            self._session.commit(connection)
        except (
            SQLAlchemyError,
            StoreUnusable,
            CommitUnknown,
        ) as error:  # a start reads more without it, no less surely
            self._session.drop()
            _log.warning("no snapshot was written", extra={"facts": {"error": type(error).__name__}})


async def _outcome(done: asyncio.Future[Receipt]) -> Receipt | ChangeFailed:
    try:
        return await done
    except ChangeFailed as failed:
        return failed


def _uuid() -> str:
    return str(uuid.UUID(bytes=os.urandom(16), version=4))


def _data_plane(record: event.Record) -> bool:
    """Whether a record comes from the data plane, or from callers that nobody knows: the first to be refused."""
    if isinstance(record, event.Op):
        return record.op in event.DATA_PLANE
    return isinstance(record, event.Auth | event.Suppressed)


def _with(record: event.Asked, **changes: Any) -> Any:
    return msgspec.structs.replace(record, **changes)


def _body(entry: bytes) -> bytes:
    return entry[entry.index(b',"r":{') + 5 : -1]
