"""The writer's own database session: it knows which files it writes, and when a COMMIT may not be believed."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

# After these a COMMIT of SQLite has certainly not taken effect; after an I/O error nobody knows.
UNDONE: Final = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_READONLY)
DISK_FULL: Final = "53100"  # SQLSTATE of PostgreSQL, appendix A
# What each must be, so that a COMMIT that returned survives a loss of power.
DURABLE: Final = {
    "fsync": ("on",),
    "full_page_writes": ("on",),
    "synchronous_commit": ("on", "remote_apply"),
}


class StoreUnusable(Exception):
    """The database cannot be written as a log must be; the message names cause and remedy."""


class CommitUnknown(Exception):
    """COMMIT did not say whether it took effect, or what it says cannot be relied on."""


def is_full(error: BaseException) -> bool:
    """Whether a statement failed because there is no space left."""
    origin = getattr(error, "orig", None)
    full: bool = getattr(origin, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL
    return full or getattr(origin, "sqlstate", None) == DISK_FULL


class Session:
    """One connection at a time, opened when needed. Used by the commit thread alone."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        database = engine.url.database
        self.file: Final = Path(database) if engine.dialect.name == "sqlite" and database else None
        self._connection: Connection | None = None
        self._files: dict[Path, tuple[int, int]] = {}
        self._warnings: list[str] = []

    def begin(self) -> Connection:
        """A connection in a new transaction; StoreUnusable if the files are not the ones written so far."""
        moved = self._moved()
        if moved is not None:
            self.drop()
            self._engine.dispose()
            raise StoreUnusable(f"the database file {moved} was removed or replaced: put it back")
        if self._connection is None:
            self._connection = self._open()
        self._connection.begin()
        if self.file is not None and not self._files:  # BEGIN has opened the write-ahead log
            self._files = {f: _identity(f) for f in (self.file, self.file.with_name(self.file.name + "-wal"))}
        return self._connection

    def commit(self, connection: Connection) -> None:
        """Commit; CommitUnknown if it is not certain that the transaction is durable where it will be looked for.

        SQLAlchemyError if it certainly is not.
        """
        self._warnings.clear()
        try:
            connection.commit()
        except SQLAlchemyError as error:
            self.drop()
            if getattr(error.orig if isinstance(error, DBAPIError) else None, "sqlite_errorcode", 0) & 0xFF in UNDONE:
                raise
            raise CommitUnknown(type(error).__name__) from error
        if self._warnings:
            # "canceling wait for synchronous replication" comes with a COMMIT that succeeded on this server alone.
            self.drop()
            raise CommitUnknown(self._warnings[0])
        moved = self._moved()
        if moved is not None:  # a file without a name takes writes, and nobody will ever read them
            self.drop()
            self._engine.dispose()
            raise CommitUnknown(f"{moved} was removed or replaced")

    def drop(self) -> None:
        """Close the connection for good; what was not committed is undone."""
        if self._connection is not None:
            with contextlib.suppress(SQLAlchemyError):
                self._connection.invalidate()
            with contextlib.suppress(SQLAlchemyError):
                self._connection.close()
            self._connection = None
        self._files = {}

    def _moved(self) -> Path | None:
        return next((f for f, identity in self._files.items() if _identity(f) != identity), None)

    def _open(self) -> Connection:
        if self.file is not None and not self.file.is_file():
            raise StoreUnusable(f"the database file {self.file} is missing: put it back")
        connection = self._engine.connect()
        if self._engine.dialect.name == "postgresql":
            try:
                _refuse_unless_durable(connection)
                driver: Any = connection.connection.driver_connection
                driver.add_notice_handler(self._noticed)
            except BaseException:
                connection.invalidate()
                connection.close()
                raise
        return connection

    def _noticed(self, diagnostic: Any) -> None:
        """Keep a warning of the server; its severity is not translated, its text may be."""
        if diagnostic.severity_nonlocalized == "WARNING":
            self._warnings.append(str(diagnostic.message_primary))


def _identity(file: Path) -> tuple[int, int]:
    try:
        found = file.stat()
    except OSError:
        return (0, 0)
    return (found.st_dev, found.st_ino)


def _refuse_unless_durable(connection: Connection) -> None:
    for name, accepted in DURABLE.items():
        value = connection.execute(sa.text(f"SHOW {name}")).scalar()
        if value not in accepted:
            raise StoreUnusable(
                f"PostgreSQL runs with {name} = {value}: a loss of power would lose records that were acknowledged; "
                f"set {name} = on for this database and role"
            )
    connection.rollback()
