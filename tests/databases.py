"""The database that a test's node has: a SQLite file, or with SKMS_TEST_DATABASE=postgresql one of a throw-away server.

Tests of keystore and audit alone choose for themselves: most need the file, those about PostgreSQL ask for `postgres`.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from postgres import Cluster, cluster
from service.database import migrate, open_engine
from service.dbroles import grant

POSTGRESQL = os.environ.get("SKMS_TEST_DATABASE", "sqlite") == "postgresql"
sqlite_only = pytest.mark.skipif(POSTGRESQL, reason="about the file of a SQLite database")
OWNER, SERVICE, _TEMPLATE = "skms_owner", "skms_service", "skms_template"
_made: set[str] = set()


@functools.cache
def _server() -> Cluster:
    """One server for all tests of this process; it has its files in memory, since what it survives is tested elsewhere."""
    ends = contextlib.ExitStack()
    atexit.register(ends.close)
    made = ends.enter_context(cluster(parent=Path("/dev/shm"), settings="max_connections = 600"))
    engine = sa.create_engine(made.url(), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for role in (OWNER, SERVICE):
            connection.execute(sa.text(f"CREATE ROLE {role} LOGIN"))
    engine.dispose()
    template = open_engine(made.fresh(_TEMPLATE, owner=OWNER))
    migrate(template, lock_dir=made.directory)
    with template.begin() as connection:
        grant(connection, service=SERVICE)
    template.dispose()
    return made


def address(directory: Path, name: str = "skms") -> str:
    """SQLAlchemy's address of a node's database of this directory: without a row the first time, then the same one.

    On PostgreSQL a node has the rights of its own role, as in production: another one owns the schema, which is there already.
    """
    return f"sqlite:///{directory / f'{name}.db'}" if not POSTGRESQL else _made_once(directory, name, SERVICE)


def empty(directory: Path, name: str = "skms") -> str:
    """The same for who makes the tables: a database without any, and on PostgreSQL the rights of its owner."""
    return f"sqlite:///{directory / f'{name}.db'}" if not POSTGRESQL else _made_once(directory, name, OWNER)


def owned(url: str) -> str:
    """The address for who may do everything: who recovers a log, and what a test does behind the service's back."""
    return sa.make_url(url).set(username="skms").render_as_string() if url.startswith("postgresql") else url


def _made_once(directory: Path, name: str, role: str) -> str:
    server = _server()
    database = "t" + hashlib.sha256(str((directory / f"{name}.db").absolute()).encode()).hexdigest()[:24]
    if database not in _made:
        _made.add(database)
        server.fresh(database, owner=OWNER, template=_TEMPLATE if role == SERVICE else None)
    return server.url(database, role)


def copy(source: str, target: str) -> None:
    """Make the second database what the first one is at this moment, whatever it was."""
    if POSTGRESQL:
        name = sa.make_url(target).database
        assert name is not None
        _server().fresh(name)
        _server().load(name, content(source))
        return
    for old in Path(target.removeprefix("sqlite:///")).parent.glob(f"{Path(target).name}*"):
        old.unlink()
    files = [sqlite3.connect(url.removeprefix("sqlite:///")) for url in (source, target)]
    with contextlib.closing(files[0]), contextlib.closing(files[1]):
        files[0].backup(files[1])


def content(url: str) -> bytes:
    """All that a thief of the database would read: its file, or what pg_dump writes."""
    if not POSTGRESQL:
        return Path(url.removeprefix("sqlite:///")).read_bytes()
    name = sa.make_url(url).database
    assert name is not None
    return _server().dump(name)


def patient(url: str) -> sa.Engine:
    """An engine for who writes beside a busy node, and waits a minute for SQLite's lock."""
    return sa.create_engine(owned(url), connect_args={} if POSTGRESQL else {"timeout": 60})


def behind(url: str, *statements: str) -> list[sa.Row[Any]]:
    """Run statements as a database owner would, behind the service's back; the rows of the last one, if it is a query."""
    engine = open_engine(owned(url))
    try:
        with engine.begin() as connection:
            for statement in statements:
                done = connection.execute(sa.text(statement))
            return list(done) if done.returns_rows else []
    finally:
        engine.dispose()


def unguarded(connection: sa.Connection) -> None:
    """The owner of a database switches its triggers off first: they stop accidents only."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("SET session_replication_role = replica")
        return
    names = "SELECT name FROM sqlite_master WHERE type = 'trigger'"
    for name in connection.exec_driver_sql(names).scalars().all():
        connection.exec_driver_sql(f"DROP TRIGGER {name}")
