"""Reloading the policy of a running node: refused bundles change nothing, every worker follows, the log tells."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec import structs

from harness import Files, Lab, lab_of, new_key, officer, until, with_database
from policy import BundleRefused
from policy.bundle import read
from policy.signatures import add, statement
from service import doctor
from service.config import SignerSection
from service.keyfiles import private_key

B64 = base64.b64encode(b"hello").decode()
pytestmark = pytest.mark.anyio


@pytest.fixture
def bundle(lab: Lab, tmp_path: Path) -> Iterator[Path]:
    """The node's bundle directory, put back afterwards; versions go on rising."""
    directory = lab.files.config.policy.bundle
    kept = tmp_path / "kept"
    shutil.copytree(directory, kept)
    yield directory
    version = lab.node.kms.policy.version
    shutil.rmtree(directory)
    shutil.copytree(kept, directory)
    rise(directory, version + 1)


def rise(directory: Path, version: int) -> None:
    path = directory / "charter.yaml"
    lines = [
        f'"version": {version}' if line.startswith('"version"') else line for line in path.read_text().splitlines()
    ]
    path.write_text("\n".join(lines) + "\n")


async def test_a_refused_bundle_names_file_and_reason_and_changes_nothing(lab: Lab, bundle: Path) -> None:
    before = lab.node.kms.policy
    rise(bundle, before.version + 1)
    rules = bundle / "tenants/health/00-roles.cedar"
    rules.write_text(rules.read_text() + '@id("x") @layer("tenant") permit (principal, action, resource);')
    answer = await lab.client("platform").post("/v1/policy/reload")
    assert (answer.status_code, answer.json()["code"]) == (422, "validation_failed")
    assert answer.json()["file"] == "tenants/health/00-roles.cedar"
    assert "pinned" in answer.json()["errors"][0]["detail"]
    assert lab.node.kms.policy is before
    key = await new_key(lab, "AES_256")
    assert (
        await lab.client("health-eu-de-1").post(f"/v1/keys/{key}/encrypt", json={"plaintext": B64})
    ).status_code == 200


async def test_a_directory_that_must_be_signed_is_taken_with_signatures_only(dev_files: Files, tmp_path: Path) -> None:
    key, public = officer(tmp_path, "authority")
    files = with_database(dev_files, tmp_path)
    directory = files.config.policy.bundle
    section = structs.replace(files.config.policy, signer=(SignerSection("bundle", public),))
    files = dataclasses.replace(files, config=structs.replace(files.config, policy=section))
    with pytest.raises(BundleRefused, match="not there, and the configuration wants it"):
        async with lab_of(files):
            pass
    found = {f.check: f for f in await asyncio.to_thread(doctor.examine, files.config)}["policy"]
    assert (found.good, "signatures/bundle.sig" in found.detail) == (False, True)
    sign(directory, key)
    async with lab_of(files) as lab:
        before = lab.node.kms.policy
        rise(directory, before.version + 1)  # whoever can write the directory
        answer = await lab.client("platform").post("/v1/policy/reload")
        assert (answer.status_code, answer.json()["file"]) == (422, "signatures/bundle.sig")
        assert lab.node.kms.policy is before
        sign(directory, key)
        answer = await lab.client("platform").post("/v1/policy/reload")
        assert (answer.status_code, answer.json()["version"]) == (200, before.version + 1)


def sign(directory: Path, key: Path) -> None:
    add(directory, "bundle", private_key(key).sign(statement(read(directory), "bundle")))


async def test_a_new_bundle_decides_at_once_here_and_soon_on_other_workers(
    lab: Lab, elsewhere: Lab, bundle: Path
) -> None:
    key = await new_key(lab, "AES_256")
    workload = lab.client("health-eu-de-1")
    rise(bundle, lab.node.kms.policy.version + 1)
    rules = bundle / "tenants/health/00-roles.cedar"
    rules.write_text(
        rules.read_text()
        + '\n@id("health.stop") @layer("tenant") @code("HEALTH-STOP") @disclose("code")\n'
        + 'forbid (principal, action == Action::"encrypt", resource in Tenant::"health");\n'
    )
    assert (await lab.client("health-operator").post("/v1/policy/reload")).status_code == 403
    answer = await lab.client("platform").post("/v1/policy/reload")
    assert answer.status_code == 200, answer.text
    denied = await workload.post(f"/v1/keys/{key}/encrypt", json={"plaintext": B64})
    assert (denied.status_code, denied.json()["rule"]) == (403, "HEALTH-STOP")
    assert denied.json()["policy"] == answer.json()["digest"][:12]
    digest = answer.json()["digest"]
    await until(lambda: elsewhere.node.kms.policy.digest == digest, "another worker did not follow")


async def test_the_old_bundle_comes_back_under_a_new_version(lab: Lab, bundle: Path) -> None:
    rise(bundle, lab.node.kms.policy.version + 1)
    assert (await lab.client("platform").post("/v1/policy/reload")).status_code == 200
    key = await new_key(lab, "AES_256")
    assert (
        await lab.client("health-eu-de-1").post(f"/v1/keys/{key}/encrypt", json={"plaintext": B64})
    ).status_code == 200


async def test_a_reload_that_leaves_a_power_to_nobody_is_refused_by_name(lab: Lab, bundle: Path) -> None:
    before = lab.node.kms.policy
    rise(bundle, before.version + 1)
    members = bundle / "tenants/health/members.yaml"
    members.write_text(members.read_text().replace("role: officer", "role: auditor"))
    answer = await lab.client("platform").post("/v1/policy/reload")
    assert (answer.status_code, answer.json()["code"]) == (409, "policy_would_lock_out")
    assert [name.rpartition("/")[2] for name in answer.json()["names"]] == ["health-officer"]
    assert lab.node.kms.policy is before


async def test_a_bundle_that_is_read_while_a_later_one_comes_into_force_does_not_take_its_place(
    dev_files: Files, tmp_path: Path
) -> None:
    files = with_database(dev_files, tmp_path)
    directory = files.config.policy.bundle
    async with lab_of(files) as lab:
        kms = lab.node.kms
        rise(directory, kms.policy.version + 2)
        later = kms._load_policy(None)
        rise(directory, kms.policy.version + 1)
        earlier = kms._load_policy(None)
        follows = asyncio.create_task(kms.follow_policy(earlier.digest))  # as another worker said
        await asyncio.sleep(0)  # it reads the directory now, in a thread
        kms.in_force(later, None)
        await follows
        assert kms.policy is later
