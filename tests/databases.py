"""The database that a test's node has: a SQLite file, or with SKMS_TEST_DATABASE=postgresql one of a throw-away server."""

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
from service.database import open_engine

POSTGRESQL = os.environ.get("SKMS_TEST_DATABASE", "sqlite") == "postgresql"
sqlite_only = pytest.mark.skipif(POSTGRESQL, reason="about the file of a SQLite database")
_made: set[str] = set()


@functools.cache
def _server() -> Cluster:
    """One server for all tests of this process; it has its files in memory, since what it survives is tested elsewhere."""
    ends = contextlib.ExitStack()
    atexit.register(ends.close)
    return ends.enter_context(cluster(parent=Path("/dev/shm"), settings="max_connections = 600"))


def address(directory: Path, name: str = "skms") -> str:
    """SQLAlchemy's address of a database of this directory: empty the first time, then the same one."""
    path = directory / f"{name}.db"
    if not POSTGRESQL:
        return f"sqlite:///{path}"
    server, database = _server(), "t" + hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:24]
    if database not in _made:
        _made.add(database)
        return server.fresh(database)
    return server.url(database)


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


def behind(url: str, *statements: str) -> list[sa.Row[Any]]:
    """Run statements as a database owner would, behind the service's back; the rows of the last one, if it is a query."""
    engine = open_engine(url)
    try:
        with engine.begin() as connection:
            for statement in statements:
                done = connection.execute(sa.text(statement))
            return list(done) if done.returns_rows else []
    finally:
        engine.dispose()
