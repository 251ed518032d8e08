"""The database engine and its migrations: one schema on SQLite and PostgreSQL."""

from __future__ import annotations

import asyncio
import fcntl
import os
import sqlite3
import time
import urllib.parse
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import Connection, Engine

MIGRATIONS: Final = Path(__file__).parent / "migrations"
SCHEMA: Final = "0010"  # the newest revision among the migrations; a worker that finds it there has nothing to load
BUSY_MS: Final = 5_000
MIGRATING: Final = 0x534B4D53  # PostgreSQL's advisory lock for it
INSUFFICIENT_PRIVILEGE: Final = "42501"
# libpq: how long a server may be silent before its connection counts as lost. A busy one still answers the kernel.
PATIENCE: Final = {
    "connect_timeout": 2,
    "keepalives_idle": 2,
    "keepalives_interval": 1,
    "keepalives_count": 2,
    "tcp_user_timeout": 4_000,
}


class DatabaseUnusable(Exception):
    """The database cannot be used as configured; the message says what to do."""


class DatabaseUnavailable(Exception):
    """The database does not answer just now."""


def open_engine(url: str) -> Engine:
    """An engine on which a transaction is one: SQLite begins IMMEDIATE, in WAL, and commits durably.

    `synchronous=FULL` is a setting of each connection and not of the file; with NORMAL a power loss would lose commits.
    """
    parsed = sa.make_url(url)
    if parsed.get_backend_name() != "sqlite":
        patience = {k: v for k, v in PATIENCE.items() if k not in parsed.query}
        return sa.create_engine(url, pool_pre_ping=True, isolation_level="READ COMMITTED", connect_args=patience)
    if not parsed.database:
        raise DatabaseUnusable("database url: name a file, as in sqlite:////var/lib/skms/skms.db")
    path = Path(parsed.database)
    if not path.parent.is_dir():
        raise DatabaseUnusable(f"database url: the folder {path.parent} does not exist")
    if not path.exists():
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    uri = f"file:{urllib.parse.quote(str(path.absolute()))}?mode=rw"  # a file that was removed is not made anew, empty

    def opened() -> sqlite3.Connection:
        return sqlite3.connect(uri, uri=True, timeout=BUSY_MS / 1000, check_same_thread=False)

    engine = sa.create_engine(url, creator=opened)

    @sa.event.listens_for(engine, "connect")
    def _connected(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # the driver must not begin transactions of its own
        cursor = connection.cursor()
        for pragma in ("journal_mode=WAL", "synchronous=FULL", f"busy_timeout={BUSY_MS}", "foreign_keys=ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.execute("PRAGMA secure_delete=ON")  # an erased blob leaves no bytes behind in free pages
        cursor.close()

    @sa.event.listens_for(engine, "begin")
    def _begun(connection: Connection) -> None:
        # A read takes no lock; a write takes its lock at once, so that it cannot fail halfway.
        reading = connection.get_execution_options().get("reading", False)
        connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")

    return engine


async def close_engine(engine: Engine, *, within_s: float = 5.0) -> None:
    """Close every connection, waiting for those that threads of ended jobs still use, `within_s` seconds at most.

    `Engine.dispose` forgets a connection that is in use: on a server its process lived on until this one happened to
    collect its garbage.
    """

    def refused(*_: object) -> None:
        raise DatabaseUnusable("this node has ended: its database is closed")

    sa.event.listen(engine, "checkout", refused)
    pool, deadline = engine.pool, time.monotonic() + within_s
    while isinstance(pool, sa.QueuePool) and pool.checkedout() and time.monotonic() < deadline:  # noqa: ASYNC110 - a count, no event
        await asyncio.sleep(0.01)
    engine.dispose()


def reader(engine: Engine) -> Engine:
    """The same engine for reads: they take no write lock."""
    return engine.execution_options(reading=True)


def migrate(engine: Engine, *, lock_dir: Path) -> None:
    """Bring the schema to the newest revision; workers that start together do it one after the other, on several nodes too.

    DatabaseUnusable if a later release has been there.
    """
    if known_revision(engine) == SCHEMA:
        return
    lock_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (lock_dir / "migrate.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with engine.begin() as connection:
            sole(connection)
            upgrade(connection, SCHEMA)


def sole(connection: Connection) -> None:
    """Until the transaction's end no other one changes the schema; on SQLite no other one writes at all."""
    if connection.dialect.name == "postgresql":  # nodes lock files of their own
        connection.execute(sa.text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": MIGRATING})


def upgrade(connection: Connection, to: str) -> None:
    """Bring the schema to a revision, in the caller's transaction. DatabaseUnusable if its role may not."""
    # A fifth of a worker's imports, and almost never needed.
    from alembic import command
    from alembic.config import Config as AlembicConfig

    config = AlembicConfig()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, to)
    except sa.exc.ProgrammingError as error:
        if getattr(error.orig, "sqlstate", None) != INSUFFICIENT_PRIVILEGE:
            raise
        raise DatabaseUnusable(
            f"this role may not bring the schema to {to}, which this release needs: run `skms db migrate` (a restore: `skms "
            f"backup restore`) with the address of the schema's owner in SKMS_DATABASE_URL"
        ) from None


def known_revision(engine: Engine) -> str:
    """The revision that is there, none as ""; DatabaseUnusable if this release does not know it."""
    if (found := revision(engine)) > SCHEMA:
        raise DatabaseUnusable(
            f"the database has schema {found}, and this release knows none after {SCHEMA}: run the release that made it, or "
            f"restore a backup of before its upgrade"
        )
    return found


def revision(engine: Engine) -> str:
    """The revision of the schema that is there; empty if there is none."""
    with reader(engine).connect() as connection:
        if not sa.inspect(connection).has_table("alembic_version"):
            return ""
        return connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar() or ""


def ping(engine: Engine) -> None:
    """Raise unless the database answers."""
    with reader(engine).connect() as connection:
        connection.execute(sa.text("SELECT 1"))
