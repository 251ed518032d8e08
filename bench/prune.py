"""What it costs to let archived records go, beside a writer that goes on: `python -m bench.prune [ROWS]`, on PostgreSQL.

A row of `audit_batch` is what one commit of 64 records leaves, about 40 kB. The archived part is deleted as the service does, by
`audit_prune` in one transaction; the writer inserts one row after the other meanwhile, each durable.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Final

import sqlalchemy as sa
from sqlalchemy import Engine

from postgres import cluster
from service.database import migrate, open_engine

RECORDS: Final = 64  # in a row
SIZE: Final = 40_000  # bytes of one
ALONE_S: Final = 5.0
FILL: Final = (
    "INSERT INTO audit_batch SELECT 0, 7, n * 64, 64, 1, 1, "
    "(SELECT decode(string_agg(md5(random()::text || n || i), ''), 'hex') FROM generate_series(1, :blocks) i), '', '' "
    "FROM generate_series(CAST(:first AS bigint), CAST(:last AS bigint)) n"
)


def filled(engine: Engine, rows: int) -> None:
    """Rows of one chain, all of them archived."""
    with engine.begin() as connection:
        connection.execute(sa.text("INSERT INTO audit_shard VALUES (7, 'log', 'n0', 0, 1, 300, '')"))
        for first in range(0, rows, 1_000):
            last = min(rows, first + 1_000) - 1
            connection.execute(sa.text(FILL), {"first": first, "last": last, "blocks": SIZE // 16})
        end = {"to": rows * RECORDS - 1, "at": rows * RECORDS}
        connection.execute(sa.text("INSERT INTO audit_archive VALUES ('log', 0, :to, :at, '', '', '', '')"), end)


class Writer:
    """Inserts one durable row after the other, and notes how long each took."""

    def __init__(self, engine: Engine, number: int) -> None:
        self._engine, self._number, self._over = engine, number, threading.Event()
        self._took: list[float] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        row = {"entries": os.urandom(SIZE)}
        with self._engine.connect() as connection:
            while not self._over.is_set():
                begun = time.perf_counter()
                values = row | {"n": self._number}
                connection.execute(
                    sa.text("INSERT INTO audit_batch VALUES (0, 7, :n, 64, 1, 1, :entries, '', '')"), values
                )
                connection.commit()
                self._took.append(time.perf_counter() - begun)
                self._number += RECORDS

    def taken(self) -> list[float]:
        """Milliseconds of each since the last time, the shortest first."""
        found, self._took = self._took, []
        return sorted(1_000 * seconds for seconds in found)

    def end(self) -> None:
        self._over.set()
        self._thread.join()


def main() -> int:
    """Print the table."""
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    with cluster(parent=Path(tempfile.gettempdir()), settings="max_wal_size = 4GB") as server:
        engine = open_engine(server.fresh("prune"))
        migrate(engine, lock_dir=server.directory)
        filled(engine, rows)
        writer = Writer(engine, rows * RECORDS)
        time.sleep(ALONE_S)
        shown = {"before": writer.taken()}
        begun = time.perf_counter()
        with engine.begin() as connection:
            connection.execute(sa.text("SELECT audit_prune(7, :below, :below)"), {"below": rows * RECORDS})
        lasted = time.perf_counter() - begun
        shown["while it is deleted"] = writer.taken()
        begun = time.perf_counter()
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(sa.text("VACUUM audit_batch"))
        vacuum = time.perf_counter() - begun
        shown["while it is vacuumed"] = writer.taken()
        writer.end()
        engine.dispose()
    print(f"{rows * RECORDS:,} records in {rows:,} rows: deleted in {lasted:.1f} s, vacuumed in {vacuum:.1f} s\n")
    print("| inserts of the writer | a second | p50 ms | p99 ms | max ms | p99, of before |\n|---|---|---|---|---|---|")
    seconds, base = (ALONE_S, lasted, vacuum), 0.0
    for (name, took), over in zip(shown.items(), seconds, strict=True):
        p99 = took[int(len(took) * 0.99)]
        base = base or p99
        middle = took[len(took) // 2]
        print(f"| {name} | {len(took) / over:,.0f} | {middle:.1f} | {p99:.1f} | {took[-1]:.1f} | {p99 / base:.1f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
