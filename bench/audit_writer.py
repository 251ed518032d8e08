"""Durable records a second, and what waiting for them costs, beside bare inserts of the same bytes in the same run.

`make bench-audit`: one process with 64 records in flight on SQLite and on PostgreSQL, then four processes on one server.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
import uvloop

from audit import event, log, stored, tables
from audit.verify import Trust
from bench.parts import MemorySigner
from postgres import cluster
from service.database import open_engine

IN_FLIGHT = 64
SECONDS = float(os.environ.get("BENCH_SECONDS", "5"))
RECORD = 600  # bytes of an entry, about


@dataclass(frozen=True)
class Rate:
    """Records a second, latency of one (ms), records in a commit, processor time of one (us), its making included."""

    per_s: float
    p50: float
    p99: float
    group: float
    cpu: float


def record(number: int) -> event.Op:
    """What an encryption leaves, about."""
    made = str(uuid.UUID(bytes=os.urandom(16), version=4))
    return event.Op(
        id=made,
        ts=time.time_ns() // 1_000,
        node="n0",
        op="encrypt",
        out="ok",
        tenant=f"t{number % 7}",
        actor="mtls:spiffe://eu-de-1.gov.example/health/worker",
        authn="mtls",
        src="10.0.0.1",
        key=made,
        req=made,
        region="eu-de-1",
        kver=1,
        pol="0" * 32,
    )


async def written(url: str, directory: Path, node: str = "n0") -> Rate:
    """Append as fast as the writer takes it, then verify everything."""
    engine, signer = open_engine(url), MemorySigner()
    writer = log.Log(
        engine,
        origin=f"bench-{node}.example/audit",
        node=node,
        slots=1,
        lock_dir=directory,
        signer=signer,
        open_facts=log.OpenFacts("0" * 64, "0" * 64, "1"),
        clock=lambda: time.time_ns() // 1_000,
        monotonic=time.monotonic,
    )
    await writer.start()
    took: list[float] = []
    end = time.perf_counter() + SECONDS

    async def client(number: int) -> None:
        while (begun := time.perf_counter()) < end:
            await writer.append(record(number))
            took.append((time.perf_counter() - begun) * 1e3)

    begun, used = time.perf_counter(), time.process_time()
    await asyncio.gather(*(client(n) for n in range(IN_FLIGHT)))
    seconds, used = time.perf_counter() - begun, time.process_time() - used
    groups = writer.groups
    await writer.close()
    report = stored.verify_database(engine, Trust(f"bench-{node}.example/audit", (signer.public_key(),)))
    engine.dispose()
    if any(f.code != "E_MISSING" and node in f.where for f in report.findings):
        raise SystemExit(str(report.findings[0]))
    took.sort()
    return Rate(
        len(took) / seconds,
        statistics.median(took),
        took[len(took) * 99 // 100],
        len(took) / groups,
        used * 1e6 / len(took),
    )


def bare(url: str) -> float:
    """Records a second if each commit inserted a group's bytes and did nothing else. Makes the log's tables, too."""
    engine = open_engine(url)
    with engine.begin() as connection:
        tables.tables.create_all(connection)
        connection.execute(sa.text("CREATE TABLE bare (n INTEGER PRIMARY KEY, entries BYTEA)"))
    data, commits = os.urandom(RECORD * IN_FLIGHT), 0
    insert = sa.text("INSERT INTO bare VALUES (:n, :entries)")
    with engine.connect() as connection:
        begun = time.perf_counter()
        while time.perf_counter() - begun < SECONDS / 2:
            connection.begin()
            connection.execute(insert, {"n": commits, "entries": data})
            connection.commit()
            commits += 1
        rate = commits * IN_FLIGHT / (time.perf_counter() - begun)
    engine.dispose()
    return rate


def line(name: str, rate: Rate, base: float) -> None:
    """One row of the table."""
    figures = f"{rate.per_s:,.0f} | {rate.per_s / base:.2f} x | {rate.p50:.1f} / {rate.p99:.1f} ms"
    print(f"| {name} | {figures} | {rate.group:.0f} | {rate.cpu:.0f} us |")


def main() -> int:
    """Print the table."""
    if len(sys.argv) == 4:  # one of several processes
        rate = uvloop.run(written(sys.argv[1], Path(sys.argv[2]), sys.argv[3]))
        print(rate.per_s, rate.p50, rate.p99, rate.group, rate.cpu)
        return 0
    print("| 64 in flight | records a second | of bare inserts | latency p50 / p99 | records a commit | CPU of one |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as made, cluster() as server:
        directory = Path(made)
        url = f"sqlite:///{directory}/audit.db"
        base = bare(url)
        line("SQLite, one process", uvloop.run(written(url, directory)), base)
        url = server.fresh("bench")
        base = bare(url)
        line("PostgreSQL, one process", uvloop.run(written(url, directory)), base)
        command = [sys.executable, "-m", "bench.audit_writer", url, str(directory)]
        running = [subprocess.Popen([*command, f"p{n}"], stdout=subprocess.PIPE) for n in range(4)]
        rates = [Rate(*map(float, p.communicate()[0].split())) for p in running]
        worst = (max(r.p50 for r in rates), max(r.p99 for r in rates), rates[0].group, max(r.cpu for r in rates))
        total = Rate(sum(r.per_s for r in rates), *worst)
        line("PostgreSQL, four processes", total, base)
    return 0


if __name__ == "__main__":
    sys.exit(main())
