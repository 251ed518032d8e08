"""The schema that a worker expects, and how it gets there."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.config import Config
from alembic.script import ScriptDirectory

from harness import ROOT
from postgres import Cluster
from service.database import MIGRATIONS, SCHEMA, DatabaseUnusable, close_engine, migrate, open_engine, revision


def test_the_schema_that_the_code_names_is_the_newest_among_the_migrations() -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    assert ScriptDirectory.from_config(config).get_current_head() == SCHEMA


def test_an_empty_database_is_brought_to_the_newest_schema_and_left_there(tmp_path: Path) -> None:
    engine = open_engine(f"sqlite:///{tmp_path}/skms.db")
    assert revision(engine) == ""
    migrate(engine, lock_dir=tmp_path)
    assert revision(engine) == SCHEMA
    migrate(engine, lock_dir=tmp_path)
    assert revision(engine) == SCHEMA


@pytest.mark.parametrize("heavy", ["alembic", "httpx", "typer"])
def test_a_worker_does_not_import_what_it_hardly_ever_needs(heavy: str) -> None:
    code = f"import sys, service.serve; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.anyio
async def test_a_closed_engine_leaves_no_connection_to_threads_that_go_on(postgres: Cluster) -> None:
    engine, refused = open_engine(postgres.fresh("closing")), list[str]()
    begun = threading.Event()

    def at_work() -> None:
        with engine.connect() as connection:
            connection.execute(sa.text("SELECT 1"))
            begun.set()
            time.sleep(0.3)
        try:
            engine.connect()
        except DatabaseUnusable as error:
            refused.append(str(error))

    thread = threading.Thread(target=at_work)
    thread.start()
    assert begun.wait(10)
    await close_engine(engine)
    thread.join()
    assert refused == ["this node has ended: its database is closed"]
    outside = open_engine(postgres.url())
    with outside.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        left = sa.text("SELECT count(*) FROM pg_stat_activity WHERE datname = 'closing'")
        for _ in range(250):  # a server process ends a moment after its connection
            if not connection.scalar(left):
                break
            time.sleep(0.02)
        assert connection.scalar(left) == 0
    outside.dispose()
