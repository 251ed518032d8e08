"""The schema that a worker expects, and how it gets there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory

from harness import ROOT
from service.database import MIGRATIONS, SCHEMA, migrate, open_engine, revision


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
