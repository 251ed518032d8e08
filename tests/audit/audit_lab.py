"""A log on a real SQLite file, its audit key in memory."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from audit import event, log
from audit.verify import Trust
from service.database import open_engine

ORIGIN = "kms.example/audit"


class MemorySigner:
    """The audit key, without an HSM."""

    def __init__(self) -> None:
        self._key = Ed25519PrivateKey.generate()

    def public_key(self) -> bytes:
        form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        return self._key.public_key().public_bytes(*form)

    def sign(self, statement: bytes) -> bytes:
        return self._key.sign(statement)


class Lab:
    """One database, one audit key, as many writers as a test wants."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.signer = directory, MemorySigner()
        self.path = directory / "audit.db"
        self.engine = open_engine(f"sqlite:///{self.path}")
        with self.engine.begin() as connection:
            log.tables.create_all(connection)
            connection.execute(sa.text("CREATE TABLE things (name TEXT PRIMARY KEY)"))

    @property
    def trust(self) -> Trust:
        return Trust(ORIGIN, (self.signer.public_key(),))

    def writer(
        self, *, node: str = "n0", locks: str = "locks", clock: Callable[[], int] | None = None, **options: Any
    ) -> log.Log:
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
            **options,
        )

    def verify(self) -> list[str]:
        return [f.code for f in log.verify_database(self.engine, self.trust).findings]


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
