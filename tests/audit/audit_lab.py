"""A log on a real SQLite file, its audit key in memory."""

from __future__ import annotations

import contextlib
import io
import os
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from audit import event, log, stored, tables, verify
from audit.export import export
from audit.index import IndexKey
from audit.search import Search
from audit.verify import Trust
from service.database import open_engine

ORIGIN = "kms.example/audit"
INDEX_KEY = IndexKey(b"\1" * 32)


class MemorySigner:
    """The audit key, without an HSM."""

    def __init__(self, key: bytes | None = None) -> None:
        self._key = Ed25519PrivateKey.generate() if key is None else Ed25519PrivateKey.from_private_bytes(key)

    def private(self) -> str:
        """For another process of the same test."""
        return self._key.private_bytes_raw().hex()

    def public_key(self) -> bytes:
        form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        return self._key.public_key().public_bytes(*form)

    def known_keys(self) -> tuple[bytes, ...]:
        return (self.public_key(),)

    def sign(self, statement: bytes) -> bytes:
        return self._key.sign(statement)


class Lab:
    """One database, one audit key, as many writers as a test wants. `make` creates the tables."""

    def __init__(self, directory: Path, *, url: str | None = None, key: bytes | None = None, make: bool = True) -> None:
        self.directory, self.signer = directory, MemorySigner(key)
        self.path = directory / "audit.db"
        self.url = url or f"sqlite:///{directory}/audit.db"
        self.engine = open_engine(self.url)
        if make:
            with self.engine.begin() as connection:
                tables.tables.create_all(connection)
                connection.execute(sa.text("CREATE TABLE things (name TEXT PRIMARY KEY)"))
        self.search = Search(self.engine, INDEX_KEY)

    @property
    def trust(self) -> Trust:
        return Trust(ORIGIN, (self.signer.public_key(),))

    def writer(
        self, *, node: str = "n0", locks: str = "locks", clock: Callable[[], int] | None = None, **options: Any
    ) -> log.Log:
        """A writer. How soon it gives up a commit is for tests of that: the others' disk may be busy."""
        facts = log.OpenFacts(cfg="0" * 64, dist="0" * 64, ver="1.0")
        return log.Log(
            options.pop("engine", self.engine),
            origin=ORIGIN,
            node=node,
            slots=4,
            lock_dir=self.directory / locks,
            signer=self.signer,
            open_facts=facts,
            clock=clock or now,
            monotonic=time.monotonic,
            deadline_s=options.pop("deadline_s", 60.0),
            **options,
        )

    def check(self, receipts: Iterable[str]) -> int:
        """Require that every receipt handed out stands in an export the offline verifier accepts; how many there were."""
        lines = [f"{r}\n" for r in receipts]
        exported = self.directory / "export"
        export(self.engine, exported, self.trust)
        (self.directory / "receipts.txt").write_text("".join(lines))
        told = io.StringIO()
        with contextlib.redirect_stdout(told):
            status = verify.main(
                [
                    *(str(exported), "--trust", str(exported / "trust.txt")),
                    *("--receipts", str(self.directory / "receipts.txt")),
                ]
            )
        assert status == 0, told.getvalue()
        return len(lines)

    def verify(self) -> list[str]:
        return [f.code for f in stored.verify_database(self.engine, self.trust).findings]


def now() -> int:
    return time.time_ns() // 1_000


def op(tenant: str | None = "health", **facts: Any) -> event.Op:
    made = {"op": "encrypt", "out": "ok", **facts}
    return event.Op(id=str(uuid.UUID(bytes=os.urandom(16), version=4)), ts=now(), node="n0", tenant=tenant, **made)


def intent(**facts: Any) -> event.Intent:
    identity = str(uuid.UUID(bytes=os.urandom(16), version=4))
    return event.Intent(id=identity, ts=now(), node="n0", op="rotate_key", tenant="health", **facts)


def outcome(of: event.Intent, **facts: Any) -> event.Outcome:
    identity = str(uuid.UUID(bytes=os.urandom(16), version=4))
    return event.Outcome(
        id=identity, ts=now(), node="n0", op="rotate_key", tenant="health", out="ok", intent=of.id, **facts
    )
