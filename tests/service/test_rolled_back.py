"""A node whose database an anchor contradicts serves no operation, says why, and does not start again."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from msgspec import structs

from audit.log import RolledBack
from databases import POSTGRESQL, address, behind
from harness import Files, Lab, lab_of, new_key
from service.config import Config, HsmAnchor

pytestmark = pytest.mark.anyio


@pytest.fixture
def own(dev_files: Files, tmp_path: Path) -> Config:
    """The node's tokens over a database of its own."""
    node = structs.replace(dev_files.config.node, name="n7", state_dir=tmp_path / "state")
    return structs.replace(
        dev_files.config,
        node=node,
        database=structs.replace(dev_files.config.database, url=address(tmp_path, "own")),
        audit=structs.replace(dev_files.config.audit, anchor=(HsmAnchor(),)),
    )


@pytest.fixture
async def running(dev_files: Files, own: Config) -> AsyncIterator[Lab]:
    async with lab_of(dataclasses.replace(dev_files, config=own)) as made:
        yield made


async def until(said: str, wanted: object, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not wanted():
        assert time.monotonic() < deadline, said
        await asyncio.sleep(0.1)


async def test_a_running_node_stops_serving_and_says_why_and_a_restart_is_refused(
    running: Lab, own: Config, dev_files: Files, tmp_path: Path
) -> None:
    key = await new_key(running, "AES_256")
    anchor = own.node.state_dir / "anchors" / "n7.last-checkpoint"
    await until("no checkpoint was anchored", anchor.exists)
    behind(
        own.database.url,
        "ALTER TABLE audit_root DISABLE TRIGGER ALL" if POSTGRESQL else "DROP TRIGGER audit_root_delete",
        "DELETE FROM audit_root",
    )
    log = running.node.kms.log
    await until("the rollback was not noticed", lambda: log.state == "ROLLED_BACK")
    written = log.next_seq
    for answer in (
        await running.client("health-eu-de-1").post(f"/v1/keys/{key}/encrypt", json={"plaintext": "AAAA"}),
        await running.client("health-operator").get("/v1/whoami"),
        await running.client(None).get("/v1/nothing-here"),
    ):
        assert (answer.status_code, answer.json()["code"]) == (503, "audit_unavailable"), answer.text
        assert "anchor" not in answer.text
    assert (await running.client(None).get("/livez")).status_code == 200
    ready, told = await running.node.health.ready(full=True)
    assert not ready
    assert "ROLLED_BACK" in told["checks"]["audit"]["detail"]
    assert "docs/audit-recovery.md" in told["checks"]["audit"]["detail"]
    assert log.next_seq == written
    with pytest.raises(RolledBack, match=r"n7\.last-checkpoint|HSM object"):
        async with lab_of(dataclasses.replace(dev_files, config=own)):
            pass
    anchor.unlink()
    with pytest.raises(RolledBack, match="HSM object audit-anchor"):  # each anchor alone suffices
        async with lab_of(dataclasses.replace(dev_files, config=own)):
            pass
