"""`skms backup`: the database in one signed file that needs neither its engine nor its server, and back from it.

A backup is gzip over lines of JSON: a head (which installation, schema and moment), each row of each table as one transaction
saw them, and an end with the number of rows, the SHA-256 of all lines before it, and a signature by an audit key. There is no
secret in it in clear: keys are wrapped under root KEKs, tokens are digests, PINs are in files of the nodes. Root KEKs are not in
it either: they come back by a token that was joined (`skms hsm join`).
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import gzip
import hashlib
import itertools
import json
import os
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection, Engine

from audit.chain import check_signature
from audit.stored import past_origins, snapshot, verify_connection
from audit.tables import checkpoint_table
from audit.verify import Report, Trust
from keystore import Catalog, outdate_counts
from keystore.pkcs11 import Transcript
from service.config import Config
from service.database import SCHEMA, open_engine, reader, revision, sole, upgrade
from service.rows import Lease
from service.wiring import AuditSigner, now, open_fleet

FORMAT: Final = 1
MAX_LINE: Final = 64 * 2**20  # the largest row is a bundle of audit records
_DOMAIN: Final = b"skms/backup/1\0"
_ROWS: Final = 500  # rows read or written at a time
_SCHEMA_TABLE: Final = "alembic_version"


class BackupRefused(Exception):
    """A file, a place or a token that cannot be used for this; the message says why, and what to do."""


class Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a backup is of. `at` is in us since 1970; `roots` are the versions of the root KEKs that open it, by region."""

    skms_backup: int
    installation: str
    origin: str
    schema: str
    at: int
    roots: dict[str, int]
    checkpoint: str  # the newest signed note; empty before the first one


class _End(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    rows: dict[str, int]
    sha256: str
    key: str  # SubjectPublicKeyInfo in base64
    signature: str


class _Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    t: str
    r: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Backup:
    """A backup whose signature holds."""

    path: Path
    head: Head
    rows: dict[str, int]
    sha256: str


# ---- writing ---------------------------------------------------------------------------------------------------------


async def create(config: Config, to: Path, *, transcript: Transcript) -> Backup:
    """Write a backup of the configured database into a new file. BackupRefused, HsmUnavailable, OSError.

    The service may go on meanwhile: what is written is one moment.
    """
    engine = open_engine(config.database.url)
    try:
        if (found := revision(engine)) != SCHEMA:
            raise BackupRefused(
                f"the database has schema {found or 'none'}, and this release makes backups of {SCHEMA}"
            )
        fleet = await open_fleet(config, Catalog(engine), clock=now)
        try:
            made = _write(config, engine, AuditSigner(fleet, config.node.region), to)
        finally:
            for group in fleet:
                group.close()
    finally:
        engine.dispose()
    transcript.add("backed up", sha256=made.sha256, rows=sum(made.rows.values()), schema=made.head.schema)
    return made


def _write(config: Config, engine: Engine, signer: AuditSigner, to: Path) -> Backup:
    if to.exists():
        raise BackupRefused(f"{to} exists: a backup never replaces one")
    roots = dict.fromkeys((h.region for h in config.hsm), 1) | {r.region: r.version for r in Catalog(engine).roots()}
    handle, name = tempfile.mkstemp(prefix=f".{to.name}.", dir=to.parent)  # 0600
    try:
        with os.fdopen(handle, "wb") as file:
            with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed, snapshot(engine) as connection:
                newest = sa.select(checkpoint_table.c.note).order_by(checkpoint_table.c.size.desc()).limit(1)
                head = Head(
                    FORMAT,
                    str(config.node.installation),
                    config.node.origin,
                    SCHEMA,
                    now(),
                    roots,
                    (connection.execute(newest).scalar() or b"").decode(),
                )
                digest, rows = hashlib.sha256(), dict[str, int]()
                for line in itertools.chain([msgspec.json.encode(head)], _lines(connection, rows)):
                    digest.update(line + b"\n")
                    packed.write(line + b"\n")
                key = base64.b64encode(signer.public_key()).decode()
                signature = signer.sign(_statement(rows, digest.hexdigest()))
                end = _End(rows, digest.hexdigest(), key, base64.b64encode(signature).decode())
                packed.write(msgspec.json.encode(end) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.link(name, to)  # unlike a rename it never replaces a file
        directory = os.open(to.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    finally:
        os.unlink(name)
    return Backup(to, head, rows, digest.hexdigest())


def _lines(connection: Connection, rows: dict[str, int]) -> Iterator[bytes]:
    """Each row as a line; `rows` gets their number by table."""
    for name, table in _tables(connection).items():
        rows[name] = 0
        chosen = sa.select(table).order_by(*table.primary_key.columns).execution_options(yield_per=_ROWS)
        with connection.execute(chosen) as result:
            for row in result.mappings():
                rows[name] += 1
                yield msgspec.json.encode({"t": name, "r": {str(k): _plain(v) for k, v in row.items()}})


def _tables(connection: Connection) -> dict[str, sa.Table]:
    """By name, in the order in which their rows can be inserted."""
    found = sa.MetaData()
    found.reflect(connection)
    return {str(table.name): table for table in found.sorted_tables if table.name != _SCHEMA_TABLE}


def _plain(value: Any) -> Any:
    return {"b": base64.b64encode(value).decode()} if isinstance(value, bytes | memoryview) else value


def _stored(value: Any) -> Any:
    return base64.b64decode(value["b"], validate=True) if isinstance(value, dict) else value


def _statement(rows: dict[str, int], digest: str) -> bytes:
    return _DOMAIN + json.dumps([rows, digest], sort_keys=True, separators=(",", ":")).encode()


# ---- reading ---------------------------------------------------------------------------------------------------------


def _read(path: Path) -> Iterator[bytes]:
    """Its lines; BackupRefused if it is no whole gzip of lines."""
    try:
        with gzip.open(path, "rb") as packed:
            while line := packed.readline(MAX_LINE):
                if not line.endswith(b"\n"):
                    _refuse(path, "a line has no end, or is too long")
                yield line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise BackupRefused(f"{path}: cut off or changed ({error}): take another one") from None


def _refuse(path: Path, why: str) -> NoReturn:
    raise BackupRefused(f"{path}: {why}: take another one")


def opened(path: Path, trust: Trust) -> Backup:
    """Read a whole backup and check it; BackupRefused, OSError. Nothing of it is believed before its signature holds."""
    digest, lines = hashlib.sha256(), _read(path)
    first = last = next(lines, b"")
    for line in lines:
        digest.update(last)
        last = line
    try:
        told = msgspec.json.decode(first)
        if isinstance(told, dict) and told.get("skms_backup") not in (None, FORMAT):
            raise BackupRefused(
                f"{path}: a backup of format {told['skms_backup']}: restore it by the release that made it"
            )
        head, end = msgspec.json.decode(first, type=Head), msgspec.json.decode(last, type=_End)
        key, signature = (base64.b64decode(text, validate=True) for text in (end.key, end.signature))
    except (msgspec.MsgspecError, ValueError):
        _refuse(path, "not a whole backup")
    if end.sha256 != digest.hexdigest():
        _refuse(path, "changed since it was made")
    if key not in trust.keys:
        raise BackupRefused(
            f"{path}: signed by a key that is not in the file of trust: compare with the ceremony's report"
        )
    if not check_signature(key, signature, _statement(end.rows, end.sha256)):
        _refuse(path, "its signature is wrong")
    if head.origin != trust.origin:
        raise BackupRefused(f"{path}: of the log {head.origin}, and the file of trust is for {trust.origin}")
    if head.schema > SCHEMA:
        raise BackupRefused(
            f"{path}: of schema {head.schema}, and this release knows none after {SCHEMA}: use a later one"
        )
    return Backup(path, head, end.rows, end.sha256)


def _load(backup: Backup, connection: Connection) -> None:
    """Fill an empty database, in the connection's transaction."""
    upgrade(connection, backup.head.schema)
    tables = _tables(connection)
    counted = dict.fromkeys(backup.rows, 0)
    body = itertools.islice(_read(backup.path), 1, 1 + sum(backup.rows.values()))
    parsed = (msgspec.json.decode(line, type=_Row) for line in body)
    for name, found in itertools.groupby(parsed, key=lambda row: row.t):
        if connection.execute(sa.select(tables[name]).limit(1)).first():  # what a migration put there
            connection.execute(sa.delete(tables[name]))
        while rows := list(itertools.islice(found, _ROWS)):
            counted[name] += len(rows)
            connection.execute(sa.insert(tables[name]), [{k: _stored(v) for k, v in row.r.items()} for row in rows])
    if counted != backup.rows:
        _refuse(backup.path, "changed while it was read")
    upgrade(connection, SCHEMA)


@contextlib.contextmanager
def _scratch(backup: Backup) -> Iterator[Engine]:
    """A database of its own with what the backup holds, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="skms-backup-") as directory:
        engine = open_engine(f"sqlite:///{directory}/scratch.db")
        try:
            with engine.begin() as connection:
                _load(backup, connection)
            yield engine
        finally:
            engine.dispose()


def verify(
    path: Path, trust: Trust, *, archive: Path | None = None, held: bytes | None = None
) -> tuple[Backup, Report]:
    """Check a backup without its HSMs, its database or the network: the file, then every column of the audit log in it.

    `held` is a signed checkpoint from outside that the log must go on from. BackupRefused, BadNote, OSError.
    """
    backup = opened(path, trust)
    with _scratch(backup) as engine:
        return backup, _verified(engine, trust, archive, held)


def _verified(engine: Engine, trust: Trust, archive: Path | None, held: bytes | None) -> Report:
    with snapshot(engine) as connection:
        report = verify_connection(connection, trust, archive, held=held)
        for origin in past_origins(connection):
            report.findings += verify_connection(
                connection, dataclasses.replace(trust, origin=origin), archive
            ).findings
    return report


async def restore(
    config: Config,
    path: Path,
    trust: Trust,
    *,
    archive: Path | None = None,
    held: bytes | None,
    transcript: Transcript,
) -> Backup:
    """Fill the configured, empty database from a backup: all of it or nothing. BackupRefused, HsmUnavailable, OSError.

    Before anything is written, the log in it is verified, and the configured HSMs must hold the root KEKs that its rows were
    made under.
    """
    started = time.monotonic()
    backup = opened(path, trust)
    if backup.head.installation != str(config.node.installation):
        raise BackupRefused(f"{path}: of installation {backup.head.installation}, and the configuration is for another")
    if backup.head.origin != config.node.origin:
        raise BackupRefused(
            f"{path}: of the log {backup.head.origin}; the configuration has origin {config.node.origin}"
        )
    engine = open_engine(config.database.url)
    try:
        _empty(engine)
        with _scratch(backup) as scratch:
            report = _verified(scratch, trust, archive, held)
            if report.exit_status != 0:
                told = "; ".join(map(str, report.findings[:3]))
                raise BackupRefused(f"{path}: the audit log in it does not verify: {told}")
            # An HSM is taken only if it knows the MACs of the audit keys' rows: if it holds the region's root KEK.
            for group in await open_fleet(config, Catalog(scratch), clock=now):
                group.close()
        with engine.begin() as connection:
            sole(connection)  # a node that starts now, or another restore, finds a full database, and leaves it alone
            _empty(connection)
            _load(backup, connection)
            Lease.end_all(connection)  # whoever held one is not here
            outdate_counts(connection)
    finally:
        engine.dispose()
    transcript.add(
        "restored",
        sha256=backup.sha256,
        made_at=backup.head.at,
        rows=sum(backup.rows.values()),
        anchored=held is not None,
        seconds=round(time.monotonic() - started),
    )
    return backup


def _empty(database: Engine | Connection) -> None:
    if isinstance(database, Engine):
        with reader(database).connect() as connection:
            return _empty(connection)
    if found := sa.inspect(database).get_table_names():
        raise BackupRefused(
            f"the database is not empty ({len(found)} tables): restore into a new one, and keep this one"
        )
    return None
