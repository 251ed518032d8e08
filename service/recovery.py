"""`skms audit recover`: from a database that anchors contradict to a new generation of the log, by two officers.

It runs as a command while the nodes refuse to serve. Killed at any point it is started again: either nothing has changed,
or the new generation is there and only its first checkpoint is missing.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
from sqlalchemy import Connection, Engine

from audit.anchors import AnchorUnusable
from audit.event import Recovery
from audit.generation import KIND, LIFE_US, NEEDED, RecoveryRefused, digest_of, open_generation, opened, recovery_of
from audit.rollback import Findings
from keystore import Catalog, Fleet
from service.approvals import Approval, ApprovalRefused, quorum
from service.config import Config
from service.database import migrate, open_engine
from service.jobs import NOTARY
from service.rows import Lease
from service.wiring import approvers_of, guard_of, notary_of, now, open_fleet, rules_of

LEASE_S: Final = 60
WAIT_S: Final = 20.0  # for the lease of a notary that has just stopped

Clock = Callable[[], int]
Guarded = Callable[[Connection], None]


@dataclass(frozen=True, slots=True)
class Recovered:
    """What came of it: the new origin and the size of its first checkpoint."""

    origin: str
    size: int


@contextlib.asynccontextmanager
async def _standing(config: Config) -> AsyncIterator[tuple[Engine, Fleet]]:
    """The database and the HSMs of the node's region."""
    engine = open_engine(config.database.url)
    try:
        migrate(engine, lock_dir=config.node.state_dir)
        own = tuple(h for h in config.hsm if h.region == config.node.region)
        fleet = await open_fleet(msgspec.structs.replace(config, hsm=own), Catalog(engine), clock=now)
        try:
            yield engine, fleet
        finally:
            for group in fleet:
                group.close()
    finally:
        engine.dispose()


def _survey(config: Config, engine: Engine, fleet: Fleet) -> Findings:
    return guard_of(config, engine, fleet).survey()


async def prepare(config: Config, *, clock: Clock = now) -> Recovery:
    """What a recovery would give up, for the officers to read; RecoveryRefused if nothing is wrong."""
    async with _standing(config) as (engine, fleet):
        found = _survey(config, engine, fleet)
        return recovery_of(found, installation=str(config.node.installation), asked=clock())


async def recover(
    config: Config,
    recovery: Recovery,
    given: Sequence[Approval],
    *,
    clock: Clock = now,
    check: Guarded = lambda _: None,
) -> Recovered:
    """Open the new generation, sign its first checkpoint and give it to every anchor.

    ApprovalRefused, RecoveryRefused if the request is late or no longer what is wrong, AnchorUnusable. `check` is called
    in each transaction before it changes anything, beside the fence of the notary's lease.
    """
    approvals = _approved(config, recovery, given, clock())
    async with _standing(config) as (engine, fleet):
        with engine.execution_options(reading=True).connect() as connection:
            resumed = opened(connection, recovery)
        found = _survey(config, engine, fleet)
        if not resumed:
            fresh = recovery_of(found, installation=str(config.node.installation), asked=recovery.asked)
            if fresh != recovery:
                raise RecoveryRefused("the database or an anchor changed since the request was made: make a new one")
        lease = Lease(engine, clock=clock)
        epoch = _leading(lease)

        def fence(connection: Connection) -> None:
            check(connection)
            Lease.fence(connection, NOTARY, epoch)

        if not resumed:
            open_generation(engine, recovery, approvals, stored=found.origin, epoch=epoch, fence=fence, now=clock())
        after = msgspec.structs.replace(config, node=msgspec.structs.replace(config.node, origin=recovery.origin))
        signed = notary_of(after, engine, fleet, clock=clock).round(epoch, fence)
        guard = guard_of(after, engine, fleet)
        guard.start()
        guard.keep(leads=True)
        if failed := [w.failure for w in guard.watched if w.failing_since is not None]:
            raise AnchorUnusable(f"the new generation is open, but an anchor does not hold it yet: {'; '.join(failed)}")
        return Recovered(recovery.origin, 0 if signed is None else signed.checkpoint.size)


def _approved(config: Config, recovery: Recovery, given: Sequence[Approval], at: int) -> list[tuple[str, str]]:
    if recovery.installation != str(config.node.installation):
        raise ApprovalRefused("the request is for another installation")
    if not 0 <= at - recovery.asked <= LIFE_US:
        raise ApprovalRefused("the request is more than an hour old: make a new one, and have that approved")
    officers, rules = approvers_of(config.approvals), rules_of(config.approvals)
    needed = max(NEEDED, config.approvals.needed)
    agreed = quorum(given, officers, kind=KIND, digest=digest_of(recovery), needed=needed, rules=rules)
    return sorted((a.approver, a.signature.hex()) for a in agreed)


def _leading(lease: Lease) -> int:
    """The epoch under which nobody else signs; RecoveryRefused if a notary still does."""
    owner, until = f"recover/{uuid.uuid4()}", time.monotonic() + WAIT_S
    while True:
        epoch = lease.acquire(NOTARY, owner, LEASE_S)
        if epoch is not None:
            return epoch
        if time.monotonic() >= until:
            raise RecoveryRefused("a notary still signs: stop every node, then try again")
        time.sleep(0.2)
