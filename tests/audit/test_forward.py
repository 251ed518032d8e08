"""Forwarding from a real database: nothing missing, nothing out of order, nobody waits for a receiver."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from audit_lab import ORIGIN, Lab, MemorySigner, now, op
from sqlalchemy import Connection

from audit import tables
from audit.forward import TRIES, Forwarder, Skipped, Target, Wanted, lags, positions
from audit.log import Log
from audit.sinks import KINDS
from databases import unguarded
from harness import ROOT
from postgres import Cluster
from receivers import Held, MemorySink, Pki, http_receiver
from service.database import open_engine
from service.jobs import Forwarding
from service.rows import Lease, LeaseLost
from service.rows import tables as service_tables

pytestmark = pytest.mark.anyio
LOG = f"{ORIGIN}/n0-0"


class Ticks:
    """A monotonic clock that a test moves."""

    def __init__(self) -> None:
        self.at = 1_000.0

    def __call__(self) -> float:
        return self.at


def holds(_: Connection) -> None:
    """The lease is ours."""


def forwarder_of(made: Lab, held: Held, **options: Any) -> Forwarder:
    given: dict[str, Any] = {"clock": now, "skipped": lambda _: None} | options
    return Forwarder("siem", MemorySink(held), made.engine, **given)


def drain(forwarder: Forwarder, epoch: int = 1) -> None:
    while forwarder.round(epoch, holds):
        pass
    forwarder.finish(holds)


async def records(made: Lab, count: int, node: str = "n0", **facts: Any) -> list[int]:
    writer = made.writer(node=node)
    await writer.start()
    first = writer.next_seq
    await writer.append_many([op(f"t{i % 3}", **facts) for i in range(count)])
    await writer.close()
    return list(range(first, writer.next_seq))


def stored(made: Lab) -> dict[str, int]:
    with made.engine.connect() as connection:
        return positions(connection).get("siem", {})


async def test_every_record_of_every_chain_arrives_once_and_in_order(made: Lab) -> None:
    await records(made, 700)
    await records(made, 3, "n1")
    held = Held()
    forwarder = forwarder_of(made, held)
    drain(forwarder)
    assert held.numbers(LOG) == list(range(702))
    assert held.numbers(f"{ORIGIN}/n1-0") == list(range(5))
    assert stored(made) == {LOG: 702, f"{ORIGIN}/n1-0": 5}
    await records(made, 2)
    drain(forwarder_of(made, held), epoch=2)
    assert held.numbers(LOG) == list(range(706))


async def test_a_receiver_that_was_away_misses_nothing_and_is_not_hammered(
    made: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    await records(made, 40)
    held, ticks = Held(away=True), Ticks()
    forwarder = forwarder_of(made, held, monotonic=ticks)
    for _ in range(1_000):
        forwarder.round(1, holds)
        ticks.at += 1
    assert 15 < forwarder.failures < 50  # about one a minute in the end
    assert [r.getMessage() for r in caplog.records].count("sink failed") == 1
    lag = lags(made.engine, ("siem",), now() + 9_000_000)["siem"]
    assert lag.records == 42
    assert lag.seconds >= 9
    held.away = False
    ticks.at += 60
    drain(forwarder)
    assert held.numbers(LOG) == list(range(42))
    assert lags(made.engine, ("siem",), now())["siem"].records == 0


async def test_a_receiver_that_asks_for_time_gets_it(made: Lab) -> None:
    await records(made, 1)
    held, ticks = Held(away=True, retry_after="600"), Ticks()
    forwarder = forwarder_of(made, held, monotonic=ticks)
    forwarder.round(1, holds)
    held.away = False
    ticks.at += 599
    forwarder.round(1, holds)
    assert held.taken == []
    ticks.at += 2
    drain(forwarder)
    assert held.numbers(LOG) == [0, 1, 2]


async def test_a_refused_record_is_found_and_stops_its_own_chain_alone(made: Lab) -> None:
    await records(made, 100)
    await records(made, 10, "n1")
    held = Held(refuses=lambda taken: taken[:2] == (LOG, 37))
    ticks = Ticks()
    forwarder = forwarder_of(made, held, monotonic=ticks)
    for _ in range(100):
        forwarder.round(1, holds)
        ticks.at += 60
    assert held.numbers(LOG) == list(range(37))
    assert held.numbers(f"{ORIGIN}/n1-0") == list(range(12))
    assert lags(made.engine, ("siem",), now())["siem"].refused
    held.refuses = lambda _: False  # somebody mended the receiver
    ticks.at += 60
    drain(forwarder)
    assert held.numbers(LOG) == list(range(102))
    assert not lags(made.engine, ("siem",), now())["siem"].refused


async def test_a_refused_record_is_skipped_only_if_so_configured_after_tries_and_with_a_record(made: Lab) -> None:
    await records(made, 30)
    tried: list[int] = []
    skipped: list[Skipped] = []

    def refuses(taken: Any) -> bool:
        tried.append(taken[1])
        return bool(taken[1] == 7)

    held, ticks = Held(refuses=refuses), Ticks()

    def record(what: Skipped) -> None:
        if not skipped:
            skipped.append(what)
            raise TimeoutError("the log is away")  # then the record is not skipped yet
        skipped.append(what)

    forwarder = forwarder_of(made, held, on_reject="skip", skipped=record, monotonic=ticks)
    for _ in range(40):
        try:
            forwarder.round(1, holds)
        except TimeoutError:
            assert held.numbers(LOG) == list(range(7))
        ticks.at += 60
    assert held.numbers(LOG) == [n for n in range(32) if n != 7]
    assert [(s.sink, s.log, s.item.n) for s in skipped] == [("siem", LOG, 7)] * 2
    assert tried.count(7) >= TRIES
    assert forwarder.skips == 1


async def test_a_filter_leaves_out_other_tenants_and_kinds_and_does_not_wait_for_them(made: Lab) -> None:
    await records(made, 30)
    held = Held()
    drain(forwarder_of(made, held, wanted=Wanted(frozenset({"t1"}), frozenset({"op"}))))
    assert held.numbers(LOG) == list(range(2, 32, 3))
    assert all(b'"tenant":"t1"' in entry for *_, entry in held.taken)
    assert stored(made) == {LOG: 32}


async def test_who_lost_the_lease_stores_no_position(made: Lab) -> None:
    await records(made, 5)

    def lost(_: Connection) -> None:
        raise LeaseLost("sink:siem")

    with pytest.raises(LeaseLost):
        forwarder_of(made, Held()).round(1, lost)
    assert stored(made) == {}


def prune(made: Lab, below: int) -> None:
    with made.engine.begin() as connection:
        unguarded(connection)
        connection.execute(sa.text("DELETE FROM audit_batch WHERE first_seq < :b"), {"b": below})


async def test_what_is_gone_before_it_was_sent_is_never_passed_over(made: Lab) -> None:
    await records(made, 5)
    await records(made, 5)
    first = forwarder_of(made, Held(away=True))
    first.round(1, holds)
    first.finish(holds)  # it has delivered nothing, and from now on it has a position
    assert stored(made) == {LOG: 0}
    prune(made, 6)
    held = Held()
    forwarder = forwarder_of(made, held, on_reject="skip")
    forwarder.round(1, holds)
    forwarder.finish(holds)
    assert held.taken == []
    assert forwarder.last_error == f"U_PRUNED {LOG}/0"
    assert lags(made.engine, ("siem",), now())["siem"].refused


async def test_a_new_sink_begins_with_the_oldest_record_that_is_still_there(made: Lab) -> None:
    await records(made, 5)
    await records(made, 5)
    prune(made, 6)
    held = Held()
    drain(forwarder_of(made, held))
    assert held.numbers(LOG) == list(range(6, 14))


@pytest.fixture
def leased(made: Lab) -> Callable[[], Lease]:
    with made.engine.begin() as connection:
        service_tables.create_all(connection)
    return lambda: Lease(made.engine, clock=now)


def until(condition: Callable[[], bool], seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


async def test_one_of_two_workers_forwards(made: Lab, leased: Callable[[], Lease]) -> None:
    await records(made, 50)
    held = Held()
    both = [Forwarding(forwarder_of(made, held), leased(), owner=name) for name in "ab"]
    for worker in both:
        worker.start()
    assert until(lambda: len(held.taken) >= 52)
    await records(made, 50)
    assert until(lambda: len(held.taken) >= 104)
    for worker in both:
        worker.stop()
    assert held.numbers(LOG) == list(range(104))
    assert sorted(w.forwarder.delivered for w in both) == [0, 104]


@pytest.fixture
def deaf() -> Iterator[socket.socket]:
    """A server that accepts and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=50) as listening:
        yield listening


async def test_a_receiver_that_never_answers_holds_up_no_operation_and_no_other_sink(
    made: Lab, leased: Callable[[], Lease], deaf: socket.socket, tmp_path: Path
) -> None:
    pki, writer, held = Pki.make(tmp_path / "pki"), made.writer(), Held()
    await writer.start()

    async def longest() -> float:
        took = []
        for _ in range(200):
            began = time.perf_counter()
            await writer.append(op())
            took.append(time.perf_counter() - began)
        return max(took)

    await longest()
    kinds = {"https-json": "https", "otlp": "https", "syslog": "tls"}
    targets = {
        k: Target(f"{scheme}://127.0.0.1:{deaf.getsockname()[1]}", ca=pki.ca, timeout_s=30)
        for k, scheme in kinds.items()
    }
    hanging = [
        Forwarder(kind, KINDS[kind](target), made.engine, clock=now, skipped=lambda _: None)
        for kind, target in targets.items()
    ]
    workers = [Forwarding(f, leased(), owner="a") for f in (*hanging, forwarder_of(made, held))]
    for worker in workers:
        worker.start()
    beside = await longest()
    assert await asyncio.to_thread(until, lambda: len(held.taken) >= 401)
    await writer.close()
    assert beside < 15, "an operation waited for a receiver, which the sinks do for 30 s"
    assert all(f.delivered == 0 for f in hanging)
    deaf.close()
    for worker in workers:
        worker.stop()


async def test_a_killed_worker_leaves_no_gap_behind(made: Lab, leased: Callable[[], Lease], tmp_path: Path) -> None:
    leased()
    pki = Pki.make(tmp_path / "pki")
    writer = made.writer(max_group=8)
    await writer.start()
    with http_receiver(pki) as (held, target):
        for owner in range(2):
            command = [sys.executable, str(Path(__file__).with_name("forwarding_node.py")), str(made.engine.url)]
            seen = len(held.taken)
            process = subprocess.Popen(
                [*command, target.url, str(pki.ca), str(owner)],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
            )
            assert process.stdout is not None
            try:
                assert process.stdout.readline() == b"forwarding\n"
                deadline = time.monotonic() + 120
                while len(held.taken) < seen + 60 and time.monotonic() < deadline:
                    await writer.append_many([op() for _ in range(20)])
            finally:
                process.send_signal(signal.SIGKILL)  # somewhere in the middle: the writer has not stopped
                process.wait(60)
                process.stdout.close()
        await writer.close()
        last = Forwarder("siem", KINDS["https-json"](target), made.engine, clock=now, skipped=lambda _: None)
        drain(last, epoch=9)
        found = held.numbers(LOG)
    assert sorted(set(found)) == list(range(writer.next_seq))
    # In order, but for the places where a successor began again at the stored position: one for each kill at most.
    assert sum(b != a + 1 for a, b in itertools.pairwise(found)) <= 2
    assert all(b <= a + 1 for a, b in itertools.pairwise(found))


async def test_postgresql_forwards_the_same(postgres: Cluster, tmp_path: Path) -> None:
    engine = open_engine(postgres.fresh("forward"))
    with engine.begin() as connection:
        tables.tables.create_all(connection)
        service_tables.create_all(connection)
    made = Lab.__new__(Lab)
    made.directory, made.signer, made.engine = tmp_path, MemorySigner(), engine
    writer: Log = made.writer()
    await writer.start()
    held = Held(away=True)
    worker = Forwarding(forwarder_of(made, held), Lease(engine, clock=now), owner="a")
    worker.start()
    await writer.append_many([op() for _ in range(100)])
    assert await asyncio.to_thread(until, lambda: worker.forwarder.failures > 0)
    held.away = False
    assert await asyncio.to_thread(until, lambda: len(held.taken) >= 101)
    await asyncio.to_thread(worker.stop)
    await writer.close()
    assert held.numbers(LOG)[:101] == list(range(101))
    assert stored(made)[LOG] >= 101
    engine.dispose()
