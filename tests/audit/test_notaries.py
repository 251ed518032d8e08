"""Notaries with real leases on both databases: one signs, a stopped one halts the log, and the next goes on."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import sqlalchemy as sa
from audit_lab import ORIGIN, Lab, now, op
from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError
from test_generation import SECOND, asked, open_it, verify
from test_rollback import guard_of, node_files, note_of, signed

from audit import tables
from audit.checkpoint import key_of, open_checkpoint
from audit.log import Log, RolledBack, Unavailable
from audit.notary import Notary
from audit.rootlog import RootLog
from postgres import Cluster
from service import rows
from service.database import open_engine, reader
from service.jobs import NOTARY, notarise
from service.rows import Lease, LeaseLost

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["sqlite", "postgresql"])
def shared(request: pytest.FixtureRequest, made: Lab) -> Iterator[Lab]:
    """A log with leases on each database."""
    if request.param == "postgresql":
        cluster: Cluster = request.getfixturevalue("postgres")
        made.engine.dispose()
        made.engine = open_engine(cluster.fresh("notaries"))
        with made.engine.begin() as connection:
            tables.tables.create_all(connection)
    with made.engine.begin() as connection:
        rows.tables.create_all(connection)
    yield made
    made.engine.dispose()


def fence_of(epoch: int) -> Callable[[Connection], None]:
    return lambda connection: Lease.fence(connection, NOTARY, epoch)


async def test_of_notaries_that_race_only_the_holder_of_the_lease_appends(shared: Lab) -> None:
    writer = shared.writer()
    await writer.start()
    stop, lost, failures = threading.Event(), list[str](), list[BaseException]()

    ticks = itertools.count(1)

    def race(owner: str, pause_s: float) -> None:
        # Whenever one looks, the other's lease has just expired: it is taken over in the middle of a round.
        lease = Lease(shared.engine, clock=lambda: next(ticks) * 10_000_000)
        notary = Notary(shared.engine, origin=ORIGIN, signer=shared.signer, clock=now)
        while not stop.wait(pause_s):
            epoch = lease.acquire(NOTARY, owner, 1)
            if epoch is None:
                continue
            try:
                notary.round(epoch, fence_of(epoch))
            except (LeaseLost, IntegrityError) as error:
                lost.append(type(error).__name__)
            except BaseException as error:
                failures.append(error)
                return

    threads = [threading.Thread(target=race, args=(f"n{i}", 0.01 + 0.007 * i)) for i in range(2)]
    for thread in threads:
        thread.start()

    def holders() -> set[int]:
        with reader(shared.engine).connect() as connection:
            entries = connection.execute(sa.text("SELECT entry FROM audit_root")).scalars().all()
        return {json.loads(entry)["r"]["epoch"] for entry in entries}

    appended, deadline = 0, time.monotonic() + 120
    while appended < 30 or (len(holders()) < 2 and not failures and time.monotonic() < deadline):
        await writer.append(op())
        await asyncio.sleep(0.05)
        appended += 1
    stop.set()
    for thread in threads:
        await asyncio.to_thread(thread.join)
    await writer.close()
    assert failures == []
    root, roots, epochs = RootLog(ORIGIN), dict[int, bytes](), list[int]()
    with shared.engine.connect() as connection:
        for entry in connection.execute(sa.text("SELECT entry FROM audit_root ORDER BY seq")).scalars():
            heads = root.check(entry)
            assert heads is not None
            epochs.append(heads.epoch)
            roots[root.chain.n] = root.chain.frontier.root()
        notes = connection.execute(sa.text("SELECT size, note FROM audit_checkpoint")).all()
    keys = [key_of(ORIGIN, shared.signer.public_key())]
    assert {size: open_checkpoint(note, ORIGIN, keys).root for size, note in notes}.items() <= roots.items()
    assert epochs == sorted(epochs)
    assert len(set(epochs)) > 1  # they did take it from each other


async def test_a_notary_that_was_overtaken_between_its_entry_and_its_signature_leaves_both_to_the_next(
    shared: Lab,
) -> None:
    writer = shared.writer()
    await writer.start()
    await writer.append(op())
    first = Lease(shared.engine, clock=lambda: 0).acquire(NOTARY, "first", 5)
    assert first == 1
    calls: list[int] = []

    def overtaken(connection: Connection) -> None:
        calls.append(1)
        if len(calls) == 2:
            # In the transaction that would store the signature: from here on the lease is another's.
            values = {"epoch": 2, "owner": "second"}
            connection.execute(sa.update(rows.tables.tables["service_lease"]).values(**values))
        Lease.fence(connection, NOTARY, first)

    with pytest.raises(LeaseLost):
        Notary(shared.engine, origin=ORIGIN, signer=shared.signer, clock=now).round(1, overtaken)
    with shared.engine.connect() as connection:
        before = connection.execute(sa.text("SELECT entry FROM audit_root")).scalars().all()
        assert connection.execute(sa.text("SELECT count(*) FROM audit_checkpoint")).scalar() == 0
    assert len(before) == 1
    later = Notary(shared.engine, origin=ORIGIN, signer=shared.signer, clock=now)
    epoch = Lease(shared.engine, clock=lambda: 6_000_000).acquire(NOTARY, "second", 5)
    assert epoch == 2
    found = later.round(epoch, fence_of(epoch))
    assert found is not None
    with shared.engine.connect() as connection:
        after = connection.execute(sa.text("SELECT entry FROM audit_root ORDER BY seq")).scalars().all()
    assert after[0] == before[0]
    await writer.close()


async def test_a_stopped_notary_halts_the_log_and_the_next_checkpoint_lets_it_go_on(shared: Lab) -> None:
    writer = shared.writer()
    await writer.start()
    anchor = node_files(shared.directory)
    guard = guard_of(shared, anchor)
    guard.start()
    lease = Lease(shared.engine, clock=now)
    assert lease.acquire(NOTARY, "a notary that hangs", 600) == 1
    notary = Notary(shared.engine, origin=ORIGIN, signer=shared.signer, clock=now)
    running = asyncio.create_task(
        notarise(notary, lease, writer, shared.engine, guard, owner="next", clock=now, period_s=0.05, halt_s=0.5)
    )
    await writer.append(op())
    await until(lambda: writer.halted is not None)
    written = writer.next_seq
    with pytest.raises(Unavailable, match="no checkpoint for"):
        await writer.append(op())
    assert writer.next_seq == written
    with shared.engine.begin() as connection:  # it is killed at last
        connection.execute(sa.update(rows.tables.tables["service_lease"]).values(until=0))
    await until(lambda: writer.halted is None)
    await appended(writer)
    anchor.keep(note_of(shared.signer, 99, bytes(32)))  # another node has seen more
    await until(running.done)
    with pytest.raises(RolledBack, match="99 entries"):
        await writer.append(op())
    await writer.close()
    assert writer.next_seq >= written + 1


async def appended(writer: Log, seconds: float = 60) -> None:
    """Append, though the log halts again whenever a busy machine's notary is late by half a second."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            await writer.append(op())
            return
        except Unavailable:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)


async def until(wanted: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not wanted():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


async def test_a_recovery_works_on_both_databases(shared: Lab) -> None:
    await signed(shared)
    anchor = node_files(shared.directory)
    anchor.keep(note_of(shared.signer, 9, bytes(32)))
    with pytest.raises(RolledBack):
        guard_of(shared, anchor).start()
    recovery = asked(shared, anchor)
    open_it(shared, recovery)
    guard = guard_of(shared, anchor, origin=SECOND)
    guard.start()
    guard.keep(leads=True)
    assert verify(shared, ORIGIN).findings == []
