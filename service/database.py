"""The database engine and its migrations: one schema on SQLite and PostgreSQL."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from alembic import command
from alembic.config import Config as AlembicConfig
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine

MIGRATIONS: Final = Path(__file__).parent / "migrations"
BUSY_MS: Final = 5_000


class DatabaseUnusable(Exception):
    """The database cannot be used as configured; the message says what to do."""


def open_engine(url: str) -> Engine:
    """An engine on which a transaction is one: SQLite begins IMMEDIATE, in WAL, and commits durably.

    `synchronous=FULL` is a setting of each connection and not of the file; with NORMAL a power loss would lose commits.
    """
    parsed = sa.make_url(url)
    if parsed.get_backend_name() != "sqlite":
        return sa.create_engine(url, pool_pre_ping=True, isolation_level="READ COMMITTED")
    if not parsed.database:
        raise DatabaseUnusable("database url: name a file, as in sqlite:////var/lib/skms/skms.db")
    path = Path(parsed.database)
    if not path.parent.is_dir():
        raise DatabaseUnusable(f"database url: the folder {path.parent} does not exist")
    if not path.exists():
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    engine = sa.create_engine(url, connect_args={"timeout": BUSY_MS / 1000, "check_same_thread": False})

    @sa.event.listens_for(engine, "connect")
    def _connected(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # the driver must not begin transactions of its own
        cursor = connection.cursor()
        for pragma in ("journal_mode=WAL", "synchronous=FULL", f"busy_timeout={BUSY_MS}", "foreign_keys=ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.execute("PRAGMA secure_delete=ON")  # an erased blob leaves no bytes behind in free pages
        cursor.close()

    @sa.event.listens_for(engine, "begin")
    def _begun(connection: sa.Connection) -> None:
        # A read takes no lock; a write takes its lock at once, so that it cannot fail halfway.
        reading = connection.get_execution_options().get("reading", False)
        connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")

    return engine


def reader(engine: Engine) -> Engine:
    """The same engine for reads: they take no write lock."""
    return engine.execution_options(reading=True)


def migrate(engine: Engine, *, lock_dir: Path) -> None:
    """Bring the schema to the newest revision; workers that start together do it one after the other."""
    lock_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    config = AlembicConfig()
    config.set_main_option("script_location", str(MIGRATIONS))
    newest = ScriptDirectory.from_config(config).get_current_head()
    with reader(engine).connect() as connection:
        if MigrationContext.configure(connection).get_current_revision() == newest:
            return
    with (lock_dir / "migrate.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with engine.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")


def ping(engine: Engine) -> None:
    """Raise unless the database answers."""
    with reader(engine).connect() as connection:
        connection.execute(sa.text("SELECT 1"))
