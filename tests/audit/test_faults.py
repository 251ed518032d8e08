"""When it hurts: whatever becomes of the store, no success without a durable record, an answer in time, and back alone.

Every receipt handed out is looked up afterwards, in an export, by the offline verifier.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from audit_lab import Lab, intent, now, op, outcome
from faulty import Proxy, children, injected, stopped
from writing import Writing, writing

from audit import log
from audit.clock import Confirmation, confirm
from audit.disk import Disk, Level, Watermarks
from postgres import Cluster, cluster
from service.database import open_engine

pytestmark = pytest.mark.anyio

DEADLINE_S = 2.0  # by design; a writer without it would refuse nothing while a fault lasts
ANSWER_S = 15.0  # this machine may be busy
BACK_S = 60.0  # 5 s by design


@pytest.fixture(scope="module")
def own() -> Iterator[Cluster]:
    """A server of this module's own: it is stopped, killed and misconfigured."""
    with cluster() as made:
        yield made


@pytest.fixture
def pg(own: Cluster, tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path, url=own.fresh("faults"))
    yield lab
    lab.engine.dispose()


def administer(server: Cluster, *statements: str) -> None:
    """Run statements as the server's owner."""
    engine = sa.create_engine(server.url(), isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with engine.connect() as connection:
        for statement in statements:
            connection.execute(sa.text(statement))


async def eventually(true: Callable[[], bool], timeout: float = BACK_S) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < deadline, "it did not become so in time"
        await asyncio.sleep(0.02)


# ---- a writer under load, and a fault that hits it -----------------------------------------------------------------


def endures(lab: Lab, fault: Callable[[Writing], AbstractContextManager[None]], *, lasts: float = 3.0) -> list[str]:
    """Break the store under load and mend it; what the refusals said. Nothing may hang, or succeed without record."""
    with writing(lab.url, lab.directory, lab.signer.private()) as writer:
        writer.wait(lambda t: t.receipt is not None, timeout=30)
        broken = time.monotonic()
        with fault(writer):
            writer.wait(lambda t: t.refused is not None and t.begun + t.took > broken, timeout=60)
            time.sleep(lasts)
        mended = time.monotonic()
        writer.wait(lambda t: t.receipt is not None and t.begun > mended, timeout=BACK_S)
    refused = [t for t in writer.told if t.refused is not None]
    assert max(t.took for t in writer.told) <= ANSWER_S
    # Who comes while the store hangs does not wait for it in vain.
    behind = [t.took for t in refused if broken + 2 * DEADLINE_S < t.begun < mended]
    assert not behind or sorted(behind)[len(behind) // 2] < DEADLINE_S / 2
    lab.check(writer.receipts)
    return [t.refused for t in refused if t.refused is not None]


@pytest.mark.parametrize(
    ("calls", "inject", "said"),
    [
        ("pwrite64", "error=ENOSPC", "OperationalError"),
        ("pwrite64", "error=EROFS", "did not commit in time"),
        ("fdatasync", "error=EIO", "did not commit in time"),
        ("fdatasync", "delay_enter=3000000", "not answered a commit"),
    ],
    ids=["full", "read-only", "fsync-fails", "blocked"],
)
def test_S_04_a_SQLite_store_that_fails_or_hangs_is_endured(made: Lab, calls: str, inject: str, said: str) -> None:
    refused = endures(made, lambda w: injected(w.process.pid, calls, inject), lasts=3.0 if "delay" in inject else 0.5)
    assert any(said in r for r in refused), sorted(set(refused))


def test_S_04_a_PostgreSQL_server_that_is_stopped_is_endured(pg: Lab, own: Cluster) -> None:
    refused = endures(pg, lambda _: stopped(children(own.postmaster())), lasts=3.0)
    assert any("not answered a commit" in r for r in refused), sorted(set(refused))


def test_S_04_a_PostgreSQL_server_killed_and_started_again_is_endured(pg: Lab, own: Cluster) -> None:
    @contextlib.contextmanager
    def killed(_: Writing) -> Iterator[None]:
        postmaster = own.postmaster()
        left = children(postmaster)
        for pid in (postmaster, *left):  # all of it: those that serve connections outlive their postmaster for seconds
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        yield
        while any(Path(f"/proc/{pid}").exists() for pid in left):
            time.sleep(0.05)
        own.control("start")

    refused = endures(pg, killed, lasts=0.5)
    # Killed in the middle of a COMMIT, nobody can tell what became of it until the server is back.
    assert any("OperationalError" in r or "not answered a commit" in r for r in refused), sorted(set(refused))


def test_S_04_a_PostgreSQL_server_that_becomes_read_only_is_endured(pg: Lab, own: Cluster) -> None:
    @contextlib.contextmanager
    def read_only(_: Writing) -> Iterator[None]:
        administer(own, "ALTER SYSTEM SET default_transaction_read_only = on", "SELECT pg_reload_conf()")
        yield
        administer(own, "BEGIN READ WRITE", "COMMIT", "SET default_transaction_read_only = off")
        (own.directory / "data" / "postgresql.auto.conf").write_text("")
        os.kill(own.postmaster(), signal.SIGHUP)

    refused = endures(pg, read_only, lasts=0.5)
    assert any("ReadOnly" in r or "InternalError" in r for r in refused), sorted(set(refused))


# ---- files ---------------------------------------------------------------------------------------------------------


async def test_S_04_another_process_that_holds_the_write_lock_delays_nobody_beyond_the_deadline(made: Lab) -> None:
    writer = made.writer(deadline_s=0.5)
    await writer.start()
    blocker = sqlite3.connect(made.path, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    record = op()
    with pytest.raises(log.Unavailable, match="in time"):
        await writer.append(record)
    await eventually(lambda: writer.state == "DEGRADED")  # the commit began a moment after the record came
    begun = time.monotonic()
    for _ in range(50):
        with pytest.raises(log.Unavailable, match="not answered a commit"):
            await writer.append(op())
    assert time.monotonic() - begun < 50 * 0.5 / 2, "requests behind a commit that hangs waited for it"
    blocker.execute("ROLLBACK")
    blocker.close()
    await eventually(lambda: writer.withheld == 1)
    assert writer.state == "RUNNING"
    receipt = await writer.append(op())
    await writer.close()
    made.check([receipt.header()])


async def test_a_withheld_record_outlives_the_next_failure_and_close_still_counts_right(made: Lab) -> None:
    engine, fates = open_engine(made.url), list[str]()

    def begun(_: sa.Connection) -> None:
        if fates and fates.pop(0) == "fails":
            raise sa.exc.OperationalError("BEGIN", {}, OSError("away"))

    sa.event.listen(engine, "begin", begun)
    writer = made.writer(engine=engine, deadline_s=0.3)
    await writer.start()
    with contextlib.closing(sqlite3.connect(made.path, isolation_level=None)) as blocker:
        blocker.execute("BEGIN IMMEDIATE")
        late = op()
        with pytest.raises(log.Unavailable):
            await writer.append(late)
        fates += ["lands", "fails"]  # the late one, and the one after it
        blocker.execute("ROLLBACK")
    await eventually(lambda: not fates and writer.withheld == 1)
    await writer.close()
    assert [f.record["intent"] for f in made.search.records() if f.record["kind"] == "withheld"] == [late.id]
    assert made.verify() == []
    engine.dispose()


async def test_S_04_a_removed_database_is_not_made_anew_and_is_used_again_when_it_is_back(made: Lab) -> None:
    writer = made.writer()
    await writer.start()
    receipts = [await writer.append(op())]
    aside = made.path.with_name("aside.db")
    made.path.rename(aside)
    with pytest.raises(log.Unavailable, match="removed or replaced"):
        await writer.append(op())
    with pytest.raises(sa.exc.OperationalError), made.engine.connect() as connection:
        connection.execute(sa.text("SELECT 1"))
    assert not made.path.exists()
    aside.rename(made.path)
    await eventually(lambda: writer.state == "RUNNING")  # by itself: the heartbeat tries
    receipts.append(await writer.append(op()))
    await writer.close()
    made.check(r.header() for r in receipts)


async def test_S_04_an_older_copy_in_place_of_the_database_fences_the_writer(made: Lab) -> None:
    writer = made.writer()
    await writer.start()
    copy = made.path.with_name("copy.db")
    with sqlite3.connect(made.path) as source, contextlib.closing(sqlite3.connect(copy)) as target:
        source.backup(target)
    await writer.append(op())
    for part in ("-wal", "-shm"):  # what only the newer one has
        made.path.with_name(made.path.name + part).unlink()
    copy.replace(made.path)
    with pytest.raises(log.Unavailable, match="removed or replaced"):
        await writer.append(op())
    with pytest.raises(log.Fenced):
        await writer.append(op())
    assert writer.fenced.is_set()
    await writer.close()


async def test_S_04_a_write_ahead_log_that_lost_its_name_takes_no_acknowledged_record_with_it(made: Lab) -> None:
    writer = made.writer()
    await writer.start()
    receipts = [await writer.append(op())]
    made.path.with_name("audit.db-wal").unlink()
    with contextlib.suppress(log.Unavailable):
        receipts.append(await writer.append(op()))
    await eventually(lambda: writer.state == "RUNNING")
    receipts.append(await writer.append(op()))
    await writer.close()
    assert made.check(r.header() for r in receipts) == len(receipts) >= 2


# ---- full ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    place = tmp_path / "small"
    place.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", place]).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def fill(folder: Path, percent: int) -> None:
    """Use so much of the disk."""
    with (folder / "filler").open("wb", buffering=0) as file:
        while shutil.disk_usage(folder).used * 100 < percent * shutil.disk_usage(folder).total:
            file.write(bytes(16_384))


async def test_R15_each_watermark_refuses_what_it_says_and_tells_the_log(small: Path) -> None:
    lab = Lab(small)
    disk = Disk(small, Watermarks(reserve=1 << 20), reserve=small / "audit-reserve")
    writer = lab.writer(disk=disk)

    def told() -> list[str]:
        return [f.record["why"] for f in reversed(lab.search.records(op="watermark"))]

    await writer.start()
    await eventually((small / "audit-reserve").exists)
    asked = intent()
    receipts = [await writer.append(op()), await writer.append(asked)]
    fill(small, 83)
    await eventually(lambda: disk.level is Level.WARN and told() == ["disk_warn"])
    receipts.append(await writer.append(op()))
    fill(small, 92)
    await eventually(lambda: disk.level is Level.REFUSE and told()[1:] == ["disk_refuse"])
    assert writer.state == "DEGRADED"
    with pytest.raises(log.Unavailable, match="full"):
        await writer.append(op())
    with pytest.raises(log.Unavailable, match="full"):
        writer.accepting("decrypt")
    writer.accepting("get_key")
    receipts.append(await writer.append(op(op="get_key")))
    fill(small, 97)
    await eventually(lambda: disk.level is Level.STOP and told()[2:] == ["disk_stop"])
    with pytest.raises(log.Unavailable, match="full"):
        await writer.append(op(op="get_key"))
    with contextlib.suppress(OSError):
        fill(small, 101)
    receipts.append(await writer.append(outcome(asked)))  # what has begun ends, in the reserve
    (small / "filler").unlink()
    await eventually(lambda: writer.state == "RUNNING" and (small / "audit-reserve").stat().st_size == 1 << 20)
    receipts.append(await writer.append(op()))
    await eventually(lambda: told()[-1] == "disk_ok")
    await writer.close()
    lab.check(r.header() for r in receipts)
    lab.engine.dispose()


async def test_R15_a_disk_that_fills_at_once_still_takes_outcomes_and_close(small: Path) -> None:
    lab = Lab(small)
    disk = Disk(small, Watermarks(reserve=1 << 20), reserve=small / "audit-reserve")
    disk.measure()
    writer = lab.writer(disk=disk)
    await writer.start()
    asked = intent()
    receipts = [await writer.append(asked)]
    with contextlib.suppress(OSError):
        fill(small, 101)
    with pytest.raises(log.Unavailable):
        for _ in range(1_000):
            receipts.append(await writer.append(op(reason="x" * 64)))
    receipts.append(await writer.append(outcome(asked)))
    await writer.close()
    lab.check(r.header() for r in receipts)
    assert [f.record["kind"] for f in lab.search.records(limit=1)] == ["close"]
    lab.engine.dispose()


# ---- COMMIT that does not say ----------------------------------------------------------------------------------------


class Lossy(sqlite3.Connection):
    """A driver whose COMMIT takes effect and then reports an I/O error, so often as `losses` says."""

    losses = 0

    def commit(self) -> None:
        changes = self.in_transaction
        super().commit()
        if changes and Lossy.losses:
            Lossy.losses -= 1
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR
            raise error


async def test_a_commit_of_SQLite_that_landed_and_failed_is_found(made: Lab) -> None:
    def opened() -> Any:
        connection = sqlite3.connect(made.path, factory=Lossy, check_same_thread=False, isolation_level=None)
        connection.execute("PRAGMA synchronous=FULL")
        return connection

    engine = sa.create_engine(made.url, creator=opened)
    sa.event.listen(engine, "begin", lambda c: c.exec_driver_sql("BEGIN IMMEDIATE"))
    writer = made.writer(engine=engine)
    await writer.start()
    Lossy.losses = 3  # the commit, and then twice what was to find out about it
    receipt = await writer.append(op())
    assert Lossy.losses == 0
    await writer.close()
    made.check([receipt.header()])
    assert len(made.search.records(op="encrypt")) == 1
    engine.dispose()


@pytest.fixture
def proxy(own: Cluster) -> Iterator[Proxy]:
    made = Proxy(own.directory / ".s.PGSQL.5432")
    yield made
    made.close()


def change(name: str) -> log.Change:
    """Put a name in the table of things."""

    def write(connection: sa.Connection) -> None:
        connection.execute(sa.text("INSERT INTO things VALUES (:n)"), {"n": name})

    return log.Change(write=write, applied=lambda: None)


@pytest.mark.parametrize("how", ["before", "after", "while"])
@pytest.mark.parametrize("refusals", [0, 2], ids=["once", "and-twice-in-recovery"])
async def test_a_connection_cut_at_COMMIT_leaves_exactly_one_record(
    pg: Lab, proxy: Proxy, how: str, refusals: int
) -> None:
    engine = open_engine(f"postgresql+psycopg://skms@127.0.0.1:{proxy.port}/faults")
    writer = pg.writer(engine=engine, deadline_s=30)
    await writer.start()
    asked = intent()
    receipts = [await writer.append(asked)]
    proxy.refusals = refusals
    proxy.cuts.append(how)
    receipts += await asyncio.gather(writer.append(outcome(asked), change=change("a")), writer.append(op()))
    assert proxy.done == [how] + ["refused"] * refusals
    receipts.append(await writer.append(op()))
    assert (writer.state, writer.withheld) == ("RUNNING", 0)
    await writer.close()
    pg.check(r.header() for r in receipts)
    assert len({r.seq for r in receipts}) == 4
    with pg.engine.connect() as connection:
        assert connection.execute(sa.text("SELECT name FROM things")).scalars().all() == ["a"]
    engine.dispose()


async def test_what_could_not_be_found_out_in_time_may_have_been_executed_and_is_withheld(
    pg: Lab, proxy: Proxy
) -> None:
    engine = open_engine(f"postgresql+psycopg://skms@127.0.0.1:{proxy.port}/faults")
    writer = pg.writer(engine=engine, deadline_s=0.5)
    await writer.start()
    asked = intent()
    await writer.append(asked)
    proxy.refusals = 10_000
    proxy.cuts.append("after")
    with pytest.raises(log.Unavailable) as raised:
        await writer.append(outcome(asked), change=change("a"))
    assert raised.value.executed
    with pytest.raises(log.Unavailable, match="not answered a commit"):
        await writer.append(op())
    proxy.refusals = 0
    await eventually(lambda: writer.withheld == 1)
    await writer.close()
    assert pg.verify() == []
    engine.dispose()


async def test_a_commit_that_its_standbys_did_not_confirm_is_unknown_until_they_do(pg: Lab, own: Cluster) -> None:
    writer = pg.writer(deadline_s=1.0)
    await writer.start()
    administer(own, "ALTER SYSTEM SET synchronous_standby_names = 'nobody'", "SELECT pg_reload_conf()")
    try:
        await eventually(lambda: _waits_for_standbys(own, writer))
        administer(own, "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'")
        # The server has said COMMIT, and a warning: here it is not yet believed.
        await asyncio.sleep(1.5)
        assert writer.state == "DEGRADED"
        with pytest.raises(log.Unavailable):
            await writer.append(op())
    finally:
        (own.directory / "data" / "postgresql.auto.conf").write_text("")
        os.kill(own.postmaster(), signal.SIGHUP)
    await eventually(lambda: writer.state == "RUNNING")
    receipt = await writer.append(op())
    await writer.close()
    pg.check([receipt.header()])


def _waits_for_standbys(own: Cluster, writer: log.Log) -> bool:
    if writer.waiting == 0 and writer.state == "RUNNING":
        with contextlib.suppress(RuntimeError):
            asyncio.get_running_loop().create_task(_quietly(writer))
    engine = sa.create_engine(own.url(), poolclass=sa.NullPool)
    with engine.connect() as connection:
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
        return bool(connection.execute(sa.text(waiting)).scalar())


async def _quietly(writer: log.Log) -> None:
    with contextlib.suppress(log.Unavailable):
        await writer.append(op())


@pytest.mark.parametrize("setting", ["synchronous_commit = off", "synchronous_commit = local"])
async def test_a_PostgreSQL_that_would_forget_commits_is_refused(pg: Lab, own: Cluster, setting: str) -> None:
    administer(own, f"ALTER DATABASE faults SET {setting}")
    pg.engine.dispose()
    with pytest.raises(log.Unavailable, match=rf"PostgreSQL runs with {setting}.*set synchronous_commit = on"):
        await pg.writer().start()


async def test_many_nodes_that_begin_their_chains_at_the_same_moment_all_begin(pg: Lab) -> None:
    writers = [pg.writer(node=f"n{number}") for number in range(6)]
    await asyncio.gather(*(w.start() for w in writers))
    receipts = await asyncio.gather(*(w.append(op()) for w in writers))
    await asyncio.gather(*(w.close() for w in writers))
    assert pg.check(r.header() for r in receipts) == 6
    assert len({r.log for r in receipts}) == 6


# ---- the clock -------------------------------------------------------------------------------------------------------


async def test_S_10_a_clock_far_ahead_is_refused_until_an_operator_confirms_it(made: Lab) -> None:
    shift = 0

    def clock() -> int:
        return now() + shift

    writer = made.writer(clock=clock)
    await writer.start()
    asked = intent()
    await writer.append(asked)
    shift = 3_600_000_000
    with pytest.raises(log.Unavailable, match=r"60 minutes.*confirm-clock"):
        await writer.append(op())
    await writer.append(outcome(asked))  # at the time it would be: what has begun ends
    assert made.search.records(limit=1)[0].t < now() + 60_000_000
    confirm(made.directory / "locks", Confirmation(clock() - 1_000_000_000, 0))
    with pytest.raises(log.Unavailable):  # somebody's word about another time
        await writer.append(op())
    confirm(made.directory / "locks", Confirmation(clock(), 4711))
    await writer.append(op())
    assert (writer.state, writer.clock_steps) == ("RUNNING", 1)
    (said,) = made.search.records(op="confirm_clock")
    assert said.record["actor"] == "local:uid:4711"
    await writer.close()
    assert made.verify() == []


async def test_S_10_a_clock_that_goes_back_is_recorded_and_the_chain_s_time_never_does(made: Lab) -> None:
    shift = 0

    def clock() -> int:
        return now() + shift

    writer = made.writer(clock=clock)
    await writer.start()
    for minutes in (0, -60, 5, 0):
        shift = minutes * 60_000_000
        await writer.append(op())
    await writer.close()
    found = made.search.records(limit=50)
    assert [f.t for f in found] == sorted((f.t for f in found), reverse=True)
    steps = [f.record["now"] - f.record["was"] for f in reversed(found) if f.record["kind"] == "clock"]
    assert [round(s / 60e6) for s in steps] == [-60, 65, -5]
    assert made.verify() == []
