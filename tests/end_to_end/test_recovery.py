"""From an old backup to a serving node, by the commands an operator and two officers give."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import re
import time
from pathlib import Path

import pytest
from msgspec.structs import replace

from audit.anchors import checkpoint_in
from audit.event import decode_recovery
from audit.generation import KIND, RecoveryRefused, digest_of
from databases import address, behind, copy, owned
from harness import Files, lab_of, new_key, officer, skms
from service.approvals import ApprovalRefused, approve
from service.config import load
from service.recovery import prepare, recover

pytestmark = pytest.mark.anyio


def written(files: Files, directory: Path) -> Path:
    """The development node's configuration with a database of its own, and two officers."""
    text = files.config_file.read_text()
    for option, value in {
        "name": "n8",
        "state_dir": str(directory / "state"),
        "url": address(directory, "own"),
    }.items():
        text = re.sub(rf'(?m)^{option} = ".*"', f'{option} = "{value}"', text, count=1)
    for name in ("alice", "bob"):
        _, public = officer(directory, name)
        text += f'\n[[approvals.approver]]\nname = "{name}"\npublic_key = "{public}"\n'
    path = directory / "skms.toml"
    path.write_text(text)
    return path


async def anchored(config_file: Path, *, beyond: int) -> int:
    """Wait until the node's own anchor has seen more than this."""
    path = load(config_file).node.state_dir / "anchors" / "n8.last-checkpoint"
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        if path.exists() and (size := checkpoint_in(path.read_bytes()).size) > beyond:
            return size
        await asyncio.sleep(0.1)
    raise AssertionError("no checkpoint was anchored")


async def test_an_old_backup_is_refused_and_two_officers_open_a_new_generation(
    dev_files: Files, tmp_path: Path
) -> None:
    config_file = written(dev_files, tmp_path)
    database, backup = address(tmp_path, "own"), address(tmp_path, "backup")
    async with lab_of(dataclasses.replace(dev_files, config=load(config_file))) as lab:
        key = await new_key(lab, "AES_256")
        await anchored(config_file, beyond=0)
        copy(database, backup)
        ((size,),) = behind(backup, "SELECT count(*) FROM audit_root")
        await lab.client("health-operator").get("/v1/whoami")
        await anchored(config_file, beyond=size)
    copy(backup, database)

    served = await asyncio.to_thread(skms, "serve", "--config", str(config_file))
    assert served.returncode == 1
    assert b"ROLLED_BACK" in served.stderr
    assert b"n8.last-checkpoint" in served.stderr

    request = tmp_path / "recovery.json"
    # It takes the rights of the schema's owner, which nodes do not have.
    owner = {**os.environ, "SKMS_DATABASE_URL": owned(database)}
    command = ("audit", "recover", "--config", str(config_file), "--request", str(request))
    asked = await asyncio.to_thread(skms, "-o", "json", *command, env=owner)
    assert asked.returncode == 0, asked.stderr
    recovery = decode_recovery(request.read_bytes())
    assert json.loads(asked.stdout)["new log"] == "dev.skms.example/audit/g2"
    first = tmp_path / "alice.json"
    alice = ("audit", "approve", str(request), "--name", "alice", "--key", str(tmp_path / "alice.key"))
    made = await asyncio.to_thread(skms, *alice, "--to", str(first))
    assert made.returncode == 0, made.stderr
    assert digest_of(recovery)[:8].encode() in made.stdout
    second = tmp_path / "bob.json"
    bob = approve(KIND, digest_of(recovery), name="bob", key_file=tmp_path / "bob.key")
    second.write_text(bob.to_json())

    alone = await asyncio.to_thread(skms, *command, "--approval", str(first), env=owner)
    assert alone.returncode == 5
    assert b"1 of 2 approvals" in alone.stderr
    config, one = (
        load(config_file, environment=owner),
        approve(KIND, digest_of(recovery), name="alice", key_file=tmp_path / "alice.key"),
    )
    other = replace(recovery, lost=(0, 0))
    for wanted, given, at, why in (
        (recovery, [one, one], recovery.asked, "one officer"),
        (other, [one, bob], recovery.asked, "another request"),
        (recovery, [one, bob], recovery.asked + 3_601_000_000, "an hour old"),
    ):
        with pytest.raises(ApprovalRefused, match=why):
            await recover(config, wanted, given, clock=lambda at=at: at)

    both = await asyncio.to_thread(skms, *command, "--approval", str(first), "--approval", str(second), env=owner)
    assert both.returncode == 0, both.stderr
    with pytest.raises(RecoveryRefused, match="nothing to recover from"):
        await prepare(config)  # with the old origin still in the configuration
    config_file.write_text(config_file.read_text().replace("example/audit", "example/audit/g2"))
    async with lab_of(dataclasses.replace(dev_files, config=load(config_file))) as lab:
        sealed = await lab.client("health-eu-de-1").post(f"/v1/keys/{key}/encrypt", json={"plaintext": "AAAA"})
        assert sealed.status_code == 200, sealed.text
        assert 'log="dev.skms.example/audit/g2/n8-0"' in sealed.headers["audit-receipt"]
        await anchored(config_file, beyond=1)
    verified = await asyncio.to_thread(skms, "-o", "json", "audit", "verify", "--config", str(config_file))
    assert verified.returncode == 0, verified.stdout
    logs = json.loads(verified.stdout)["logs"]
    assert {"dev.skms.example/audit/n8-0", "dev.skms.example/audit/g2/n8-0"} <= set(logs)
