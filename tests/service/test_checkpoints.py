"""A wired node signs checkpoints by itself, and its writer names them."""

from __future__ import annotations

import asyncio
import time

import pytest

from audit.checkpoint import key_of, open_checkpoint
from audit.notary import coverage
from harness import Lab
from service.database import open_engine
from service.wiring import now


@pytest.mark.anyio
async def test_a_node_signs_checkpoints_of_its_own_records_and_a_mark_names_one(lab: Lab) -> None:
    await lab.client("health-operator").get("/v1/whoami")
    engine, log = open_engine(lab.files.config.database.url), lab.node.kms.log
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and log._marked is None:
        await asyncio.sleep(0.2)
    seen = coverage(engine, now())
    engine.dispose()
    assert seen.signed is not None
    assert log._marked is not None
    origin = lab.files.config.node.origin
    keys = [key_of(origin, spki) for spki in log._signer.known_keys()]
    assert open_checkpoint(seen.signed.note, origin, keys) == seen.signed.checkpoint
    assert log.halted is None
