"""Searching: beside the writers, complete whatever the index holds, and in order."""

from __future__ import annotations

import random
import sqlite3
import uuid
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from audit_lab import INDEX_KEY, ORIGIN, Lab, op

from audit import event
from audit.chain import DAY_US, Chain, pack
from audit.index import SPAN, Indexer, IndexKey, forget
from audit.search import Found, Search
from audit.tables import batch_table, index_table, shard_table

pytestmark = pytest.mark.anyio

KEYS = [str(uuid.UUID(int=i)) for i in range(40)]
ACTORS = ["spiffe://a/app", 'x509:CN="quoted, \\ name"', "oidc:https://idp#alice"]


async def test_a_search_waits_for_no_writer(made: Lab) -> None:
    writer = made.writer()
    await writer.start()
    await writer.append(op("t0"))
    await writer.close()
    with sqlite3.connect(made.path, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        assert len(made.search.records(tenant="t0")) == 1
        assert len(list(made.search.scan(since=0, until=2**53))) == 3
        other.execute("ROLLBACK")


def fill(engine: sa.Engine, shard: int, count: int, chooser: random.Random) -> None:
    """A chain of random records in batches of random sizes, unsealed: a search checks no seal."""
    chain, at = Chain(f"{ORIGIN}/n{shard}-0"), 0
    t = 1_790_000_000_000_000
    rows = []
    while at < count:
        n, first = min(chooser.randrange(1, 600), count - at), at
        t += chooser.choice([0, 1_000, 5_000_000])
        entries = []
        for _ in range(n):
            facts: dict[str, Any] = {"op": chooser.choice(["encrypt", "decrypt", "sign"])}
            if chooser.random() < 0.9:
                facts |= {"key": chooser.choice(KEYS), "actor": chooser.choice(ACTORS)}
            record = op(
                chooser.choice(["t0", "t1", "rare" if chooser.random() < 0.01 else None]),
                out=chooser.choice(["ok"] * 9 + ["denied"]),
                **facts,
            )
            entries.append(chain.append(event.encode(record), t, record.tenant))
        at += n
        head = bytes.fromhex(chain.previous)
        row = {"shard": shard, "first_seq": first, "n": n, "epoch": 1, "t": t, "day": t // DAY_US}
        rows.append({**row, "entries": pack(entries), "head": head, "seal": b""})
    shard_row = {"shard": shard, "log_id": chain.log, "node": f"n{shard}", "slot": 0, "epoch": 1, "next_seq": count}
    with engine.begin() as connection:
        connection.execute(sa.insert(shard_table), [{**shard_row, "head": head}])
        connection.execute(sa.insert(batch_table), rows)


def brute_force(everything: list[Found], shards: dict[str, int], wanted: dict[str, Any]) -> list[Found]:
    since, until = wanted.get("since", 0), wanted.get("until", 2**53)
    fields = {k: v for k, v in wanted.items() if k not in {"since", "until"}}
    found = [
        f
        for f in everything
        if since <= f.t <= until and all(f.record.get(name) == value for name, value in fields.items())
    ]
    return sorted(found, key=lambda f: (f.t, shards[f.log], f.seq), reverse=True)


def a_query(chooser: random.Random, times: list[int]) -> dict[str, Any]:
    some = {
        "tenant": ["t0", "t1", "rare", "nobody"],
        "key": [*KEYS[:3], str(uuid.UUID(int=99))],
        "actor": ACTORS,
        "op": ["encrypt", "sign", "verify"],
        "out": ["ok", "denied"],
        "since": times,
        "until": times,
    }
    return {name: chooser.choice(values) for name, values in some.items() if chooser.random() < 0.35}


def every_page(made: Lab, wanted: dict[str, Any], limit: int) -> list[Found]:
    found: list[Found] = []
    while page := made.search.records(**wanted, limit=limit, after=(found[-1].log, found[-1].seq) if found else None):
        found += page
    return found


def damage_facts(c: sa.Connection) -> None:
    c.execute(sa.update(index_table).where(index_table.c.first_seq == 0).values(facts=b"\0" * 100))


def move_rows(c: sa.Connection) -> None:
    c.execute(sa.update(index_table).where(index_table.c.shard == 1).values(shard=7))
    c.execute(sa.update(index_table).where(index_table.c.shard == 2).values(shard=1))
    c.execute(sa.update(index_table).where(index_table.c.shard == 7).values(shard=2))


SPOILS: dict[str, Callable[[sa.Connection], object]] = {
    "whole": lambda c: None,
    "deleted": lambda c: c.execute(sa.delete(index_table)),
    "one deleted": lambda c: c.execute(sa.delete(index_table).where(index_table.c.first_seq == SPAN)),
    "facts changed": damage_facts,
    "times changed": lambda c: c.execute(sa.update(index_table).values(t_min=2**52, t_max=2**52)),
    "of other chains": move_rows,
}


def test_a_search_equals_a_look_at_every_record_whatever_the_index_holds(made: Lab) -> None:
    chooser = random.Random(20_261_125)
    for shard, count in ((1, 2 * SPAN + 700), (2, SPAN + 10), (3, 300)):
        fill(made.engine, shard, count, chooser)
    shards = {f"{ORIGIN}/n{s}-0": s for s in (1, 2, 3)}
    everything = list(made.search.scan(since=0, until=2**53))
    assert len(everything) == 3 * SPAN + 1_010
    times = [f.t for f in chooser.sample(everything, 10)]
    indexer = Indexer(made.engine, INDEX_KEY)
    made.search = Search(made.engine, INDEX_KEY, cache=20_000)  # of one segment or two
    for name, spoil in SPOILS.items():
        assert indexer.round() == 3
        assert indexer.round() == 0
        with made.engine.begin() as connection:
            spoil(connection)
        for _ in range(3):
            wanted = a_query(chooser, times)
            expected = brute_force(everything, shards, wanted)
            limit = chooser.choice([len(expected) + 1, len(expected) // 3 + 1])
            assert every_page(made, wanted, limit) == expected, (name, wanted)
        forget(made.engine)


def test_a_scan_for_what_records_tell_finds_each_of_them_and_no_other(made: Lab) -> None:
    fill(made.engine, 1, 1_500, random.Random(7))
    fill(made.engine, 2, 40, random.Random(8))
    everything = list(made.search.scan(since=0, until=2**53))
    wanted = [f for f in everything if f.record.get("tenant") == "rare"]
    assert 0 < len(wanted) < 100
    assert list(made.search.scan(since=0, until=2**53, telling=b'"tenant":"rare"')) == wanted
    assert made.search.stored_since() is None


def test_rows_made_under_another_key_are_no_index(made: Lab) -> None:
    fill(made.engine, 1, SPAN, random.Random(1))
    Indexer(made.engine, IndexKey(b"\2" * 32)).round()
    with made.engine.begin() as connection:
        connection.execute(sa.update(index_table).values(key_id=INDEX_KEY.id))
    assert len(made.search.records(tenant="t0", limit=SPAN)) > SPAN // 5
    assert Indexer(made.engine, INDEX_KEY).round() == 1, "the foreign segment is made again"


def test_a_lost_segment_is_made_again_and_a_sound_one_is_not(made: Lab) -> None:
    fill(made.engine, 1, 3 * SPAN, random.Random(1))
    indexer = Indexer(made.engine, INDEX_KEY)
    assert indexer.round(limit=2) == 2
    assert indexer.round(limit=2) == 1
    with made.engine.begin() as connection:
        damage_facts(connection)
    assert Indexer(made.engine, INDEX_KEY).round() == 1


def test_values_stand_in_the_index_only_as_keyed_hashes(made: Lab) -> None:
    fill(made.engine, 1, SPAN, random.Random(1))
    Indexer(made.engine, INDEX_KEY).round()
    with made.engine.connect() as connection:
        facts = connection.execute(sa.select(index_table.c.facts)).scalars().one()
    assert b"alice" not in facts
    assert KEYS[0].encode() not in facts
    assert made.search.records(actor=ACTORS[2], limit=1)
