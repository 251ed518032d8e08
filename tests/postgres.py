"""A throw-away PostgreSQL cluster on a local socket, for every suite that wants the other database."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa


def _binary(name: str) -> str:
    """Where a server's program is: Debian keeps them off the PATH."""
    found = shutil.which(name)
    if found is None:
        found = next((str(p) for p in sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), reverse=True)), None)
    if found is None:
        pytest.fail(f"{name} is not installed: run `make setup`, or apt-get install postgresql")
    return found


@dataclass(frozen=True, slots=True)
class Cluster:
    """A running server. Durable as in production unless it was started with `fsync=False`."""

    directory: Path
    user: str | None

    def url(self, database: str = "postgres", role: str = "skms") -> str:
        """SQLAlchemy's address of one of its databases; `skms` is the superuser."""
        return f"postgresql+psycopg://{role}@/{database}?host={self.directory}"

    def fresh(self, name: str, *, owner: str = "skms", template: str | None = None) -> str:
        """The address, for its owner, of a new database: empty, or as another one that nobody uses."""
        engine = sa.create_engine(self.url(), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(sa.text(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)'))
            like = "" if template is None else f'TEMPLATE "{template}"'
            connection.execute(sa.text(f'CREATE DATABASE "{name}" OWNER "{owner}" {like}'))
        engine.dispose()
        return self.url(name, owner)

    def control(self, *arguments: str) -> None:
        """`pg_ctl` with these arguments: start, stop -m immediate, ..."""
        self.run(_binary("pg_ctl"), "-D", f"{self.directory}/data", "-w", "-l", f"{self.directory}/log", *arguments)

    def postmaster(self) -> int:
        """Process id of the server."""
        return int((self.directory / "data" / "postmaster.pid").read_text().split()[0])

    def dump(self, name: str) -> bytes:
        """A database as the SQL that makes it again."""
        return self.run(_binary("pg_dump"), "-h", f"{self.directory}", "-U", "skms", name)

    def load(self, name: str, sql: bytes) -> None:
        """Run what `dump` gave in an empty database."""
        options = ("-q", "-v", "ON_ERROR_STOP=1", "-h", f"{self.directory}", "-U", "skms")
        self.run(_binary("psql"), *options, name, fed=sql)

    def run(self, *command: str, fed: bytes = b"") -> bytes:
        """What a program writes that runs as the server's user."""
        options: dict[str, Any] = {"user": self.user, "cwd": self.directory, "capture_output": True, "input": fed}
        return bytes(subprocess.run(command, check=True, **options).stdout)


@contextlib.contextmanager
def cluster(*, fsync: bool = True, settings: str = "", parent: Path = Path("/tmp")) -> Iterator[Cluster]:
    """A cluster that is gone afterwards. `settings` are further lines of postgresql.conf."""
    directory = Path(tempfile.mkdtemp(prefix="skms-pg-", dir=parent))  # short: a socket's path has 107 bytes
    user = "postgres" if os.geteuid() == 0 else None  # PostgreSQL refuses to run as root
    if user is not None:
        shutil.chown(directory, user)
    made = Cluster(directory, user)
    try:
        made.run(_binary("initdb"), "-D", f"{directory}/data", "-A", "trust", "-U", "skms")
        # In the file, so that a later `start` has them too.
        with (directory / "data" / "postgresql.conf").open("a") as configuration:
            configuration.write(
                f"\nlisten_addresses = ''\nunix_socket_directories = '{directory}'\n"
                f"fsync = {'on' if fsync else 'off'}\n{settings}\n"
            )
        made.control("start")
        try:
            yield made
        finally:
            with contextlib.suppress(subprocess.CalledProcessError):  # a test may have stopped it
                made.control("-m", "immediate", "stop")
    finally:
        shutil.rmtree(directory)
