"""Our witness keeps the contract."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from audit import tables
from audit.checkpoint import NoteKey
from audit.witness import Cosigner, Endpoint, Witness
from contracts.witness_contract import LOG, ORIGIN, WitnessContract
from databases import empty
from service.database import open_engine


class TestOurWitness(WitnessContract):
    @pytest.fixture(autouse=True)
    def _database(self, tmp_path: Path) -> object:
        engine = open_engine(empty(tmp_path, "witness"))
        tables.tables.create_all(engine)
        self._cosigner = Cosigner("partner.example/w", Ed25519PrivateKey.generate())
        self._witness = Witness(engine, self._cosigner, {ORIGIN: [LOG]}, clock=lambda: time.time_ns() // 1_000)
        yield
        engine.dispose()

    def endpoint(self) -> Endpoint:
        return self._witness

    def key(self) -> NoteKey:
        return self._cosigner.key
