"""The parts of a request alone: HSM derivation, policy decision, durable record, verification.

Run it on a quiet machine: `python -m bench.parts`. Ratios are against the first line of the same run.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import statistics
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from audit import event, log, stored, tables
from audit.verify import Trust
from keystore.hsm import Material, StoredKey
from keystore.pkcs11 import open_token
from policy import Caller, KeyFacts, Policy, Request
from policy.bundle import SHIPPED
from service import dev
from service.database import open_engine
from service.wiring import token_configs

HOME = frozenset({"eu-de-1"})


def timed(act: Any, count: int) -> list[float]:
    """Microseconds of each call."""
    found = []
    for _ in range(count):
        begun = time.perf_counter()
        act()
        found.append((time.perf_counter() - begun) * 1e6)
    return sorted(found)


def line(name: str, value: str, base: float | None = None, us: float | None = None) -> None:
    """One result."""
    ratio = "" if base is None or us is None else f"{us / base:8.1f}x"
    print(f"{name:46} {value:>26} {ratio}")


class MemorySigner:
    """An audit key without an HSM."""

    def __init__(self) -> None:
        self._key = Ed25519PrivateKey.generate()

    def public_key(self) -> bytes:
        form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        return self._key.public_key().public_bytes(*form)

    def known_keys(self) -> tuple[bytes, ...]:
        return (self.public_key(),)

    def sign(self, statement: bytes) -> bytes:
        return self._key.sign(statement)


async def durable(directory: Path) -> tuple[float, float, int]:
    """(records a second written, a second verified in full, records), 64 in flight."""
    engine, signer = open_engine(f"sqlite:///{directory / 'audit.db'}"), MemorySigner()
    with engine.begin() as connection:
        tables.tables.create_all(connection)
    writer = log.Log(
        engine,
        origin="bench.example/audit",
        node="n0",
        slots=1,
        lock_dir=directory,
        signer=signer,
        open_facts=log.OpenFacts("0" * 64, "0" * 64, "1"),
        clock=lambda: time.time_ns() // 1_000,
        monotonic=time.monotonic,
    )
    await writer.start()

    async def client(number: int) -> None:
        for _ in range(300):
            made = str(uuid.UUID(bytes=os.urandom(16), version=4))
            at = time.time_ns() // 1_000
            record = event.Op(
                id=made, ts=at, node="n0", op="encrypt", out="ok", tenant=f"t{number % 7}", key=made, req=made
            )
            await writer.append(record)

    begun = time.perf_counter()
    await asyncio.gather(*(client(n) for n in range(64)))
    written = 64 * 300 / (time.perf_counter() - begun)
    await writer.close()
    begun = time.perf_counter()
    report = stored.verify_database(engine, Trust("bench.example/audit", (signer.public_key(),)))
    took = time.perf_counter() - begun
    if report.findings:
        raise SystemExit(str(report.findings[0]))
    return written, report.records / took, report.records


def main() -> int:
    """Print the table."""
    with tempfile.TemporaryDirectory() as made:
        directory = Path(made)
        config = dev.prepare(directory / "node", port=0)
        hsm = open_token(token_configs(config)[0])
        wrapped, binding = hsm.generate(Material.KDK_512, uuid.uuid4()), b"bench"
        key = StoredKey(
            *(uuid.uuid4(), Material.KDK_512, wrapped.blob, wrapped.mechanism, wrapped.kek, b"", binding),
            hsm.row_mac(binding),
        )
        secret, data = os.urandom(64), os.urandom(120)
        base = statistics.median(timed(lambda: hmac.digest(secret, data, "sha512"), 5_000))
        line("HMAC-SHA-512 in this process (baseline)", f"{base:.1f} us", base, base)
        derive = statistics.median(timed(lambda: hsm.hmac(key, "sha512", data), 5_000))
        line("the same in SoftHSM, cached key", f"{derive:.1f} us", base, derive)
        policy = Policy.load(SHIPPED)
        caller = Caller("mtls:a:/health/x", "workload", "health", frozenset({"workload"}), HOME, 4, "mtls")
        facts = KeyFacts("k", "health", 2, HOME, HOME, HOME, HOME, frozenset(), frozenset(), ("default",), "active")
        request = Request(caller, "encrypt", facts, 1, "eu-de-1", HOME, purpose="default")
        found = timed(lambda: policy.decide(request), 3_000)
        p50, p99 = statistics.median(found), found[int(len(found) * 0.99)]
        line("policy decision, p50 / p99", f"{p50:.1f} / {p99:.1f} us", base, p50)
        written, verified, count = asyncio.run(durable(directory))
        line("durable records, SQLite, 64 in flight", f"{written:,.0f} a second")
        line(f"verified in full, every column ({count:,})", f"{verified:,.0f} a second")
    return 0


if __name__ == "__main__":
    sys.exit(main())
