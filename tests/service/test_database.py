"""The schema that a worker expects, and how it gets there."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Engine

from databases import empty
from harness import ROOT
from postgres import Cluster
from service.database import MIGRATIONS, SCHEMA, DatabaseUnusable, close_engine, migrate, open_engine, revision


def test_the_schema_that_the_code_names_is_the_newest_among_the_migrations() -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    assert ScriptDirectory.from_config(config).get_current_head() == SCHEMA


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """On a database without tables, as their owner."""
    made = open_engine(empty(tmp_path))
    yield made
    made.dispose()


def test_an_empty_database_is_brought_to_the_newest_schema_and_left_there(engine: Engine, tmp_path: Path) -> None:
    assert revision(engine) == ""
    migrate(engine, lock_dir=tmp_path)
    assert revision(engine) == SCHEMA
    migrate(engine, lock_dir=tmp_path)
    assert revision(engine) == SCHEMA


def test_nodes_that_meet_an_empty_database_together_all_start(postgres: Cluster, tmp_path: Path) -> None:
    url = postgres.fresh("migrating")
    code = (
        "import sys; from pathlib import Path; from service.database import migrate, open_engine; "
        "migrate(open_engine(sys.argv[1]), lock_dir=Path(sys.argv[2]))"
    )
    each = [[sys.executable, "-c", code, url, str(tmp_path / f"n{number}")] for number in range(4)]
    nodes = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for command in each]
    assert [(node.communicate()[1], node.returncode) for node in nodes] == [("", 0)] * 4
    engine = open_engine(url)
    assert revision(engine) == SCHEMA
    engine.dispose()


def test_a_database_of_a_later_release_is_left_alone_and_told(engine: Engine, tmp_path: Path) -> None:
    migrate(engine, lock_dir=tmp_path)
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(DatabaseUnusable, match=f"schema 9999, and this release knows none after {SCHEMA}"):
        migrate(engine, lock_dir=tmp_path)
    assert revision(engine) == "9999"


@pytest.mark.parametrize("heavy", ["alembic", "httpx", "typer"])
def test_a_worker_does_not_import_what_it_hardly_ever_needs(heavy: str) -> None:
    code = f"import sys, service.serve; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.anyio
async def test_a_closed_engine_leaves_no_connection_to_threads_that_go_on(postgres: Cluster) -> None:
    engine, refused = open_engine(postgres.fresh("closing")), list[str]()
    begun, closing = threading.Event(), threading.Event()

    def at_work() -> None:
        with engine.connect() as connection:
            connection.execute(sa.text("SELECT 1"))
            begun.set()
            closing.wait(60)
        try:
            engine.connect()
        except DatabaseUnusable as error:
            refused.append(str(error))

    thread = threading.Thread(target=at_work)
    thread.start()
    assert begun.wait(60)
    ending = asyncio.create_task(close_engine(engine, within_s=60))
    await asyncio.sleep(0)  # it waits for the thread by now
    assert not ending.done()
    closing.set()
    await ending
    await asyncio.to_thread(thread.join)
    assert refused == ["this node has ended: its database is closed"]
    outside = open_engine(postgres.url())
    with outside.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        left = sa.text("SELECT count(*) FROM pg_stat_activity WHERE datname = 'closing'")
        for _ in range(3_000):  # a server process ends a moment after its connection
            if not connection.scalar(left):
                break
            time.sleep(0.02)
        assert connection.scalar(left) == 0
    outside.dispose()
