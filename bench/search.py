"""Searches of a log of 1,000,000 records: p50 and p95 of each kind of search, and how long the index took.

On a machine that others use too, the processor's time says more than the clock's.

`python -m bench.search [RECORDS]`, on SQLite in a temporary folder. The records are typical ones: 50 tenants, 2,000 keys,
300 callers, 2 % refused.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from audit import event
from audit.chain import DAY_US, Chain, pack
from audit.index import Indexer, IndexKey
from audit.search import Search
from audit.tables import batch_table, shard_table, tables
from service.database import open_engine

START = 1_790_000_000_000_000
CHAINS, GROUP, STEP_US = 2, 32, 3_000_000
TENANTS = [f"tenant-{i:02d}" for i in range(50)]
KEYS = [str(uuid.UUID(int=2**127 + i)) for i in range(2_000)]
ACTORS = [f"spiffe://bank.example/ns/prod/sa/service-{i:03d}" for i in range(300)]


def record(chooser: random.Random, t: int) -> event.Op:
    """A typical record of the data plane."""
    key = chooser.randrange(len(KEYS))
    refused = chooser.random() < 0.02
    return event.Op(
        id=str(uuid.UUID(int=chooser.getrandbits(128))),
        ts=t,
        node="n0",
        tenant=TENANTS[key % len(TENANTS)],
        actor=ACTORS[chooser.randrange(6) * 50 + key % 50],
        authn="mtls",
        src="10.20.30.40",
        req=str(uuid.UUID(int=chooser.getrandbits(128))),
        op=chooser.choice(["encrypt"] * 5 + ["decrypt"] * 4 + ["sign"]),
        key=KEYS[key],
        kver=1,
        alg="AES_256_GCM",
        in_len=chooser.randrange(4_096),
        region="eu-de-1",
        hsm="a",
        out="denied" if refused else "ok",
        why="policy_denied" if refused else None,
        rule=("allow-app",),
        pol="0" * 32,
        us=chooser.randrange(2_000),
    )


def fill(engine: sa.Engine, records: int) -> None:
    """Chains of such records; unsealed, because a search checks no seal."""
    chooser = random.Random(1)
    for shard in range(1, CHAINS + 1):
        chain, t, rows = Chain(f"kms.example/audit/n0-{shard}"), START + shard, []
        while chain.n < records // CHAINS:
            first, t = chain.n, t + STEP_US
            made = [record(chooser, t) for _ in range(min(GROUP, records // CHAINS - first))]
            entries = pack([chain.append(event.encode(r), t, r.tenant) for r in made])
            row = {"shard": shard, "first_seq": first, "n": len(made), "epoch": 1, "t": t, "day": t // DAY_US}
            rows.append({**row, "entries": entries, "head": bytes.fromhex(chain.previous), "seal": bytes(64)})
        row = {"shard": shard, "log_id": chain.log, "node": "n0", "slot": shard, "epoch": 1, "next_seq": chain.n}
        with engine.begin() as connection:
            connection.execute(sa.insert(shard_table), [{**row, "head": bytes.fromhex(chain.previous)}])
            connection.execute(sa.insert(batch_table), rows)


def searches(end: int) -> dict[str, Callable[[random.Random], dict[str, Any]]]:
    """The kinds of search, each with its random values."""

    def key(c: random.Random) -> dict[str, Any]:
        number = c.randrange(len(KEYS))
        return {"tenant": TENANTS[number % len(TENANTS)], "key": KEYS[number]}

    return {
        "tenant": lambda c: {"tenant": c.choice(TENANTS)},
        "tenant and key": key,
        "tenant and key, refused": lambda c: {**key(c), "out": "denied"},
        "tenant and actor": lambda c: {"tenant": TENANTS[(n := c.randrange(300)) % 50], "actor": ACTORS[n]},
        "tenant and operation": lambda c: {"tenant": c.choice(TENANTS), "op": "sign"},
        "all refused": lambda c: {"out": "denied"},
        "key, one hour long ago": lambda c: {
            **key(c),
            "until": (t := c.randrange(START, end)),
            "since": t - 3_600_000_000,
        },
        "an unknown key": lambda c: {"key": str(uuid.UUID(int=c.getrandbits(127)))},
    }


def main() -> None:
    """Fill, index, search; print a table."""
    records = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as directory:
        engine = open_engine(f"sqlite:///{Path(directory)}/bench.db")
        with engine.begin() as connection:
            tables.create_all(connection)
        fill(engine, records)
        key = IndexKey(bytes(32))
        begun = time.perf_counter()
        made = Indexer(engine, key).round(limit=records)
        took = time.perf_counter() - begun
        print(f"indexed {records:,} records in {made} segments: {took:.1f} s, {records / took:,.0f} a second")
        with engine.connect() as connection:
            size = connection.execute(sa.text("SELECT sum(length(facts)) FROM audit_index")).scalar() or 0
        print(f"index: {size / records:.1f} bytes a record\n")
        search, chooser = Search(engine, key), random.Random(2)
        print(
            f"the first search of a process, of a rare key: {_timed(search, {'key': str(uuid.UUID(int=1))})[0]:.0f} ms\n"
        )
        print("| search, 50 a page | p50 ms | p95 ms | worst | p95 of processor time |\n|---|---|---|---|---|")
        for name, make in searches(START + records // CHAINS // GROUP * STEP_US).items():
            _show(name, [_timed(search, make(chooser)) for _ in range(40)])
        times = []
        for _ in range(20):  # deep pages
            wanted: dict[str, Any] = {"tenant": chooser.choice(TENANTS), "limit": 51}
            page = search.records(**wanted)
            for _ in range(10):
                begun, spent = time.perf_counter(), time.process_time()
                page = search.records(**wanted, after=(page[-1].log, page[-1].seq))
                times.append(((time.perf_counter() - begun) * 1e3, (time.process_time() - spent) * 1e3))
        _show("tenant, pages 2 to 11", times)


def _timed(search: Search, wanted: dict[str, Any]) -> tuple[float, float]:
    begun, spent = time.perf_counter(), time.process_time()
    search.records(**wanted, limit=51)
    return (time.perf_counter() - begun) * 1e3, (time.process_time() - spent) * 1e3


def _show(name: str, times: list[tuple[float, float]]) -> None:
    wall = sorted(t for t, _ in times)
    p95, own = (statistics.quantiles(values, n=20)[-1] for values in (wall, [t for _, t in times]))
    print(f"| {name} | {statistics.median(wall):.0f} | {p95:.0f} | {wall[-1]:.0f} | {own:.0f} |", flush=True)


if __name__ == "__main__":
    main()
