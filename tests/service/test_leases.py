"""Leases: one holder at a time, on both databases, and a holder that was overtaken commits nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy import Engine

from databases import empty
from postgres import Cluster
from service.database import open_engine
from service.rows import Lease, LeaseLost, tables

SECOND = 1_000_000


@pytest.fixture(params=["sqlite", "postgresql"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    if request.param == "sqlite":
        made = open_engine(empty(tmp_path, "leases"))
    else:
        cluster: Cluster = request.getfixturevalue("postgres")
        made = open_engine(cluster.fresh("leases"))
    with made.begin() as connection:
        tables.create_all(connection)
    yield made
    made.dispose()


@pytest.mark.parametrize("there", [False, True], ids=["new", "expired"])
def test_of_many_that_take_a_lease_at_once_one_gets_it(engine: Engine, there: bool) -> None:
    for attempt in range(10):
        name = f"role-{attempt}"
        if there:
            assert Lease(engine, clock=lambda: 0).acquire(name, "earlier", 1) == 1
        barrier, got = threading.Barrier(4), list[int]()

        def take(owner: str, name: str = name, barrier: threading.Barrier = barrier, got: list[int] = got) -> None:
            lease = Lease(engine, clock=lambda: 10 * SECOND)
            barrier.wait()
            epoch = lease.acquire(name, owner, 5)
            if epoch is not None:
                got.append(epoch)

        threads = [threading.Thread(target=take, args=(f"w{n}",)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert got == [2 if there else 1]


def test_a_holder_that_was_overtaken_is_fenced(engine: Engine) -> None:
    epoch = Lease(engine, clock=lambda: 0).acquire("role", "slow", 5)
    assert epoch == 1
    assert Lease(engine, clock=lambda: 4 * SECOND).acquire("role", "next", 5) is None
    assert Lease(engine, clock=lambda: 6 * SECOND).acquire("role", "next", 5) == 2
    with pytest.raises(LeaseLost, match="epoch 2"), engine.begin() as connection:
        Lease.fence(connection, "role", epoch)


def test_nobody_takes_over_between_the_fence_and_the_commit(engine: Engine) -> None:
    """The fence holds until COMMIT: who takes over waits for it, and then sees what was committed."""
    assert Lease(engine, clock=lambda: 0).acquire("role", "slow", 5) == 1
    taken = threading.Event()

    def take() -> None:
        assert Lease(engine, clock=lambda: 6 * SECOND).acquire("role", "next", 5) == 2
        taken.set()

    with engine.begin() as connection:
        Lease.fence(connection, "role", 1)
        other = threading.Thread(target=take)
        other.start()
        assert not taken.wait(0.5)
        connection.execute(sa.text("SELECT 1"))
    other.join(10)
    assert taken.is_set()


def test_a_lease_given_back_is_free_at_once_and_its_old_epoch_is_fenced(engine: Engine) -> None:
    lease = Lease(engine, clock=lambda: 0)
    epoch = lease.acquire("role", "first", 600)
    assert epoch == 1
    lease.release("role", "stranger")
    assert lease.acquire("role", "next", 600) is None, "only its owner gives it back"
    lease.release("role", "first")
    assert lease.acquire("role", "next", 600) == 2
    with engine.begin() as connection, pytest.raises(LeaseLost):
        Lease.fence(connection, "role", epoch)
