"""What the service does by itself: rotation by age and count, destruction after its time, the end of imported keys.

Jobs run on whichever worker holds the `scheduler` lease; a job that is killed midway leaves nothing behind, because a
change commits with its record or not at all. Each job asks the policy like everybody else, as the tenant's scheduler.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from sqlalchemy import Connection, Engine

from audit import event
from audit.archive import ArchiveFailed, Archiver, archive
from audit.chain import Bad
from audit.forward import Forwarder
from audit.index import Indexer
from audit.log import Change, Log, RolledBack
from audit.notary import ALARM_S, HALT_S, Notary, coverage
from audit.rollback import Guard
from audit.segments import Segment
from keystore import Key
from policy import Caller
from service.ids import uuid7
from service.kms import Ask, Kms
from service.rows import Lease, LeaseLost

log: Final = logging.getLogger("skms.jobs")
LEASE_S: Final = 30
NOTARY: Final = "notary"
NOTARY_LEASE_S: Final = 10
SINK_LEASE_S: Final = 15
SINK_RENEW_S: Final = 5.0
SINK_IDLE_S: Final = 0.5
INDEX_S: Final = 5.0
ARCHIVER: Final = "audit-archive"
ARCHIVE_S: Final = 3_600.0
ARCHIVE_LEASE_S: Final = 600  # of one segment; whoever outlives it is fenced
INDEX_PAUSE_S: Final = 0.05
INDEX_AT_ONCE: Final = 4  # segments


def scheduler_of(tenant: str, region: str, node: str) -> Caller:
    """The scheduler as the policy sees it: an operator of the tenant that may rotate, complete deletions and disable."""
    return Caller(
        id=f"internal:{node}:scheduler",
        kind="operator",
        tenant=tenant,
        roles=frozenset({"scheduler"}),
        places=frozenset({region}),
        proof=5,
        authn="internal",
    )


class Scheduler:
    """Runs what is due, every `period_s` seconds, if this worker holds the lease."""

    def __init__(
        self,
        kms: Kms,
        lease: Lease,
        *,
        owner: str,
        clock: Callable[[], int],
        nightly: Callable[[], Awaitable[object]],
        period_s: float = 5.0,
    ) -> None:
        self._kms, self._lease, self._owner, self._clock, self._period = kms, lease, owner, clock, period_s
        self._nightly = nightly  # does nothing while it is not due

    async def run(self) -> None:
        """For ever; one failing job is logged and does not stop the others."""
        while True:
            await asyncio.sleep(self._period)
            try:
                if await asyncio.to_thread(self._lease.acquire, "scheduler", self._owner, LEASE_S) is not None:
                    await self.once()
            except Exception as error:  # the database may be away; the next round tries again
                log.warning("scheduler round failed", extra={"facts": {"error": type(error).__name__}})

    async def once(self) -> int:
        """Do all that is due now; how many jobs succeeded."""
        now = self._clock()
        done = 0
        try:
            await self._nightly()
        except Exception as error:  # it stays due
            log.error("the key graph was not computed", extra={"facts": {"error": type(error).__name__}})
        for key in await asyncio.to_thread(self._kms.keystore.due_rotations, now):
            done += await self._job(key, self._kms.rotate_key)
        for key in await asyncio.to_thread(self._kms.keystore.due_deletions, now):
            done += await self._job(key, self._kms.complete_deletion)
        for key in await asyncio.to_thread(self._kms.keystore.due_expiries, now):
            done += await self._job(key, self._kms.disable_key, reason="material-expired")
        await asyncio.to_thread(self._kms.imports.sweep, now)
        return done

    async def _job(self, key: Key, act: Callable[[Ask, str], Awaitable[Key]], *, reason: str | None = None) -> bool:
        now = self._clock()
        caller = scheduler_of(key.tenant, self._kms.region, self._kms.node)
        ask = Ask(caller=caller, request_id=uuid7(now), arrived=now, if_match=key.kv, reason=reason)
        with contextlib.suppress(asyncio.CancelledError):
            try:
                await act(ask, str(key.id))
            except Exception as error:  # it stands in its record; the next round tries again
                facts = {"key": str(key.id), "error": type(error).__name__, "code": ask.facts.get("why")}
                log.warning("job failed", extra={"facts": facts})
                return False
            return True
        return False


async def notarise(
    notary: Notary,
    lease: Lease,
    audit_log: Log,
    engine: Engine,
    guard: Guard,
    *,
    owner: str,
    clock: Callable[[], int],
    period_s: float = 1.0,
    halt_s: float = HALT_S,
) -> None:
    """Each second, for ever: sign what is new if this worker holds the lease, and see how far checkpoints reach.

    A log whose records stand without a checkpoint for too long accepts no more of them: who stops the notary must not
    gain an ever longer part of the log that could still be rewritten. A database that an anchor contradicts stops the
    log for good; the process lives on to say so.
    """
    while True:
        await asyncio.sleep(period_s)
        try:
            await asyncio.to_thread(_one_round, notary, lease, owner, guard)
        except RolledBack as found:
            audit_log.stop(found)
            return
        except Bad as bad:
            log.critical("audit log refused", extra={"facts": {"code": bad.code, "where": bad.where}})
        except Exception as error:  # the database or the HSM may be away; the next round tries again
            log.warning("notary round failed", extra={"facts": {"error": type(error).__name__}})
        try:
            seen = await asyncio.to_thread(coverage, engine, clock())
        except Exception as error:  # what cannot be read is as old as it was, and a second older
            audit_log.exposed_s += 1.0
            log.warning("no checkpoint could be read", extra={"facts": {"error": type(error).__name__}})
        else:
            audit_log.checkpoint_age_s, audit_log.exposed_s = seen.age_s, seen.exposed_s
            if seen.signed is not None:
                audit_log.checkpoint = (seen.signed.checkpoint.size, seen.signed.checkpoint.root.hex())
        late = audit_log.exposed_s
        stopped = f"no checkpoint for {late:.0f} s: look at the notary's log" if late > halt_s else None
        audit_log.halted = stopped or guard.late()
        if late > ALARM_S:
            log.error("the checkpoint is late", extra={"facts": {"seconds": round(late)}})


async def archive_old(archiver: Archiver, lease: Lease, audit_log: Log, *, owner: str, node: str) -> None:
    """Every hour, for ever: archive and prune what retention lets go, on one worker."""
    while True:
        await asyncio.sleep(ARCHIVE_S)
        try:
            await archive_once(archiver, lease, audit_log, owner=owner, node=node, by="archiver")
        except Bad as bad:
            log.critical("audit log not archived", extra={"facts": {"code": bad.code, "where": bad.where}})
        except ArchiverBusy:
            continue
        except Exception as error:  # whatever was not pruned is in the database still; the next round goes on
            log.error("audit log not archived", extra={"facts": {"error": str(error)}})


async def archive_once(
    archiver: Archiver, lease: Lease, audit_log: Log, *, owner: str, node: str, by: str, before: int | None = None
) -> Sequence[Segment]:
    """Archive and prune all that may go now; ArchiverBusy while another process does."""

    def hold() -> Callable[[Connection], None]:
        epoch = lease.acquire(ARCHIVER, owner, ARCHIVE_LEASE_S)
        if epoch is None:
            raise ArchiverBusy("another process archives: wait until it is done")
        return lambda connection: Lease.fence(connection, ARCHIVER, epoch)

    def append(record: event.Record, change: Change) -> Awaitable[object]:
        return audit_log.append(record, change=change)

    await asyncio.to_thread(hold)
    try:
        done = await archive(archiver, append, hold, node=node, actor=f"internal:{node}:{by}", before=before)
    finally:  # whoever mends what is wrong and runs it again is another owner
        await asyncio.to_thread(lease.release, ARCHIVER, owner)
    if done:
        facts = {"segments": len(done), "records": sum(s.to - s.first for s in done), "to": done[-1].uri}
        log.info("audit log archived and pruned", extra={"facts": facts})
    return done


class ArchiverBusy(ArchiveFailed):
    """Another process holds the archiver's lease."""


async def index(indexer: Indexer, lease: Lease, *, owner: str) -> None:
    """Every few seconds, for ever: index what has been written, on one worker of each region.

    Nothing waits for it: what is not indexed yet is searched entry by entry.
    """
    pause = INDEX_S
    while True:
        await asyncio.sleep(pause)
        pause = INDEX_S
        try:
            if await asyncio.to_thread(_index_some, indexer, lease, owner):
                pause = INDEX_PAUSE_S  # a long backlog leaves the machine to those who ask for something
        except Exception as error:  # the database may be away, or an entry spoilt: that is for the verifier to say
            log.warning("audit index not extended", extra={"facts": {"error": str(error)}})


def _index_some(indexer: Indexer, lease: Lease, owner: str) -> int:
    if lease.acquire(f"audit-index/{indexer.key_id}", owner, LEASE_S) is None:
        return 0
    return indexer.round(INDEX_AT_ONCE)


def _one_round(notary: Notary, lease: Lease, owner: str, guard: Guard) -> None:
    guard.check()
    epoch = lease.acquire(NOTARY, owner, NOTARY_LEASE_S)
    if epoch is not None:

        def fence(connection: Connection) -> None:
            Lease.fence(connection, NOTARY, epoch)

        notary.round(epoch, fence)
    guard.keep(leads=epoch is not None)


class Forwarding(threading.Thread):
    """One sink, for ever, in a thread of its own: a receiver that hangs holds up this thread and nothing else.

    All workers of all nodes run one of each; the lease lets one of them forward.
    """

    def __init__(self, forwarder: Forwarder, lease: Lease, *, owner: str) -> None:
        super().__init__(name=f"sink-{forwarder.name}", daemon=True)  # nobody waits at exit for a receiver that hangs
        self.forwarder, self._lease, self._owner = forwarder, lease, owner
        self._role = f"sink:{forwarder.name}"
        self._ended = threading.Event()
        self._epoch: int | None = None
        self._renewed_at = 0.0

    def stop(self) -> None:
        """End after the delivery that is under way; what it delivered is stored if there is time."""
        self._ended.set()
        self.join(timeout=1.0)

    def run(self) -> None:
        """Forward until stopped."""
        pause = 0.0
        while not self._ended.wait(pause):
            try:
                pause = self._once()
            except LeaseLost:
                self._epoch, pause = None, SINK_RENEW_S
                self.forwarder.drop()
            except Exception as error:  # the database may be away; the next round tries again
                pause = SINK_RENEW_S
                facts = {"sink": self.forwarder.name, "error": type(error).__name__}
                log.warning("sink round failed", extra={"facts": facts})
        if self._epoch is not None:
            with contextlib.suppress(Exception):  # what is not stored is sent again
                self.forwarder.finish(self._fence)

    def _once(self) -> float:
        """One round; how long to wait until the next."""
        now = time.monotonic()
        if self._epoch is None or now >= self._renewed_at + SINK_RENEW_S:
            epoch = self._lease.acquire(self._role, self._owner, SINK_LEASE_S)
            if epoch is None and self._epoch is not None:
                self.forwarder.drop()
            self._epoch, self._renewed_at = epoch, now
        if self._epoch is None:
            return SINK_RENEW_S
        spent = time.thread_time()
        if not self.forwarder.round(self._epoch, self._fence):
            return SINK_IDLE_S
        # Who catches up shares the interpreter with the operations of this worker: at most half of its time.
        return time.thread_time() - spent

    def _fence(self, connection: Connection) -> None:
        assert self._epoch is not None
        Lease.fence(connection, self._role, self._epoch)
