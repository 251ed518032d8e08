"""The catalog on PostgreSQL: its locks and snapshots are not SQLite's."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import sqlalchemy as sa
from keystore_lab import ROOT_KEK, Lab, new_key
from sqlalchemy.exc import OperationalError

from keystore import AliasInUse, Envelope, HsmUnavailable, Plan, Purpose, Rotation, StaleKey
from postgres import Cluster


@pytest.fixture
def pg(postgres: Cluster) -> Iterator[Lab]:
    lab = Lab(postgres.fresh("keystore"))
    yield lab
    lab.close()


def together(*acts: Callable[[], object]) -> Counter[str]:
    """Run all at once; how each ended, by the name of its exception or `done`."""
    ended: Counter[str] = Counter()
    start = threading.Barrier(len(acts))

    def run(act: Callable[[], object]) -> None:
        start.wait()
        try:
            act()
            ended["done"] += 1
        except Exception as error:  # counted, and asserted on by the test
            ended[type(error).__name__] += 1

    threads = [threading.Thread(target=run, args=(act,)) for act in acts]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return ended


def written(lab: Lab, plan: Plan) -> None:
    with lab.engine.begin() as c:
        plan.write(c)


def test_rows_and_their_macs_survive_postgresql(pg: Lab) -> None:
    key = pg.apply(pg.store.plan_rotate(pg.new(alias="a", tags={"ort": "Köln"}, rotation=Rotation(86_400, 10))))
    blob = pg.seal(key).ciphertext
    fresh = pg.worker()
    assert fresh.find("acme", "alias/a") == key
    assert fresh.open(fresh.find("acme", "alias/a"), Envelope.parse(blob), {}, purpose=Purpose.ENCRYPT) == b"hello"
    pg.clock.days(2)
    assert [k.id for k in pg.store.due_rotations(pg.clock())] == [key.id]


def test_the_first_changes_ever_do_not_collide(pg: Lab) -> None:
    plans = [pg.worker().plan_create(new_key()) for _ in range(6)]
    assert together(*(lambda p=p: written(pg, p) for p in plans)) == {"done": 6}
    assert pg.catalog.epoch() == 6


def test_concurrent_rotations_are_done_or_stale_and_no_row_looks_damaged(pg: Lab) -> None:
    key = pg.new()
    outcomes: Counter[str] = Counter()

    def rotate() -> None:
        store = pg.worker()
        for _ in range(12):
            store.poll()
            found = store.find("acme", str(key.id))
            store.seal(found, b"x", {})
            try:
                written(pg, store.plan_rotate(found))
                outcomes["done"] += 1
            except StaleKey:
                outcomes["stale"] += 1

    assert together(*[rotate] * 4) == {"done": 4}
    assert outcomes.total() == 48
    assert [v.number for v in pg.catalog.key(key.id).versions] == list(range(1, 2 + outcomes["done"]))


def test_one_of_many_that_want_a_new_alias_gets_it(pg: Lab) -> None:
    plans = [pg.worker().plan_create(new_key(), alias="raced") for _ in range(5)]
    assert together(*(lambda p=p: written(pg, p) for p in plans)) == {"done": 1, AliasInUse.__name__: 4}


def test_leases_and_audit_keys_of_racing_workers_are_right(pg: Lab) -> None:
    key = pg.new(rotation=Rotation(max_uses=640))
    stores = [pg.worker() for _ in range(4)]

    def use(number: int) -> None:
        for _ in range(50):
            stores[number].seal(stores[number].by_id(key.id), b"x", {})

    assert together(*(lambda n=n: use(n) for n in range(4))) == {"done": 4}
    assert pg.catalog.key(key.id).latest.uses == 200
    assert together(*(lambda s=s: s.tenant_secret("acme") for s in stores)) == {"done": 4}
    assert len({s.tenant_secret("acme") for s in stores}) == 1


def test_a_row_that_somebody_has_locked_keeps_no_other_key_from_being_counted(pg: Lab) -> None:
    held, good = pg.new(), pg.new()
    store = pg.worker()
    with pg.engine.connect() as connection:
        locked = sa.text("SELECT FROM keystore_version WHERE key_id = :key FOR UPDATE")
        connection.execute(locked, {"key": str(held.id)})
        told = store.count_ahead([(held, 1, 1), (good, 1, 1)])
        assert [type(error) for error in told] == [OperationalError, type(None)]
        assert (store.counted(held), store.counted(good)) == (False, True)
    assert store.count_ahead([(held, 1, 3)]) == [None]


def test_a_retired_root_kek_wraps_nothing_any_more_however_late_a_worker_is(postgres: Cluster) -> None:
    """Retirement and writers race: either the row is counted and the root KEK stays, or the row is refused."""
    for _ in range(6):
        pg = Lab(postgres.fresh("keystore"))
        plans = [pg.worker().plan_create(new_key()) for _ in range(3)]
        left: list[dict[str, int]] = []

        def retire(pg: Lab = pg, left: list[dict[str, int]] = left) -> None:
            with pg.engine.begin() as c:
                left.append(pg.catalog.retire_root(c, ROOT_KEK, now=1))

        ended = together(retire, *(lambda p=p, pg=pg: written(pg, p) for p in plans))
        if left == [{}]:
            assert ended == {"done": 1, HsmUnavailable.__name__: 3}
            assert pg.catalog.count_under(ROOT_KEK)["key versions"] == 0
        else:
            assert left[0]["key versions"] >= 1
            assert ended == {"done": 4}
        pg.close()


def test_destroying_erases_on_postgresql_too(pg: Lab) -> None:
    waiting = pg.apply(pg.store.plan_schedule_deletion(pg.new(), wait_s=7 * 86_400))
    pg.clock.days(8)
    pg.apply(pg.store.plan_destroy(waiting))
    assert pg.catalog.key(waiting.id).latest.blob == b""
