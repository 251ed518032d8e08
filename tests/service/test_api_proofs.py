"""Proofs over the API: what each role may take away, what everybody may check alone, and what is no name of anything."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from audit import verify
from audit.chain import Receipt
from audit.checkpoint import parse_checkpoint, parse_note
from audit.evidence import check_growth, check_record_proof, trusted_checkpoint
from audit.proof import root_from_inclusion
from audit.tenantbundle import check_bundle
from audit.verify import Trust, load_trust
from harness import ROOT, Files, Lab, Served
from policy import Policy

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def everyones(dev_files: Files, tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """The development policy with an auditor of the installation: its platform engineer."""
    bundle = tmp_path_factory.mktemp("policy") / "bundle"
    shutil.copytree(dev_files.config.policy.bundle, bundle)
    rules = bundle / "installation/00-platform.cedar"
    rules.write_text(rules.read_text().replace('Action::"hsmDrain"', 'Action::"readAllAudit", Action::"hsmDrain"', 1))
    return Policy.load(bundle, sample=25)


@pytest.fixture
def auditor(lab: Lab, everyones: Policy) -> Iterator[str]:
    """The name of the installation's auditor."""
    before, lab.node.kms.policy = lab.node.kms.policy, everyones
    yield "platform"
    lab.node.kms.policy = before


def trust_of(lab: Lab) -> Trust:
    return load_trust(Path(lab.files.environment["trust_file"]))


async def get(lab: Lab, name: str | None, path: str, *, status: int = 200) -> Any:
    """The answer, once a checkpoint covers what is asked for."""
    for _ in range(600):
        answer = await lab.client(name).get(path)
        if answer.status_code != 503:
            break
        assert answer.json()["code"] == "checkpoint_pending"
        assert answer.headers["retry-after"] == "1"
        await asyncio.sleep(0.2)
    assert answer.status_code == status, answer.text
    return answer


async def made_record(lab: Lab, name: str) -> Receipt:
    answer = await lab.client(name).get("/v1/whoami")
    return verify.parse_receipt(answer.headers["audit-receipt"])


async def test_nobody_else_reads_what_is_for_auditors(lab: Lab) -> None:
    receipt = await made_record(lab, "health-eu-de-1")
    chain = receipt.log.rpartition("/")[2]
    paths = ["checkpoint", "checkpoint/1", "tile/0/000.p/1", "tile/entries/000.p/1", "consistency?from=1", "status"]
    paths += [f"{chain}/{receipt.seq}/proof", f"{chain}/tile/0/000.p/1", "tenants/health/bundle"]
    for path in paths:
        for name, status in (("platform", 403), ("health-eu-de-1", 403), (None, 401)):
            answer = await get(lab, name, f"/v1/audit/{path}", status=status)
            assert "audit-receipt" in answer.headers


async def test_a_receipt_is_proven_to_its_tenant_and_to_the_installations_auditor_alone(lab: Lab, auditor: str) -> None:
    receipt = await made_record(lab, "health-eu-de-1")
    path = f"/v1/audit/{receipt.log.rpartition('/')[2]}/{receipt.seq}/proof"
    for name in ("health-auditor", auditor):
        answer = await get(lab, name, path)
        assert answer.headers["content-type"] == "text/plain; charset=utf-8"
        proven = check_record_proof(answer.content, trust_of(lab), asked=receipt)
        assert proven.leaf == receipt.leaf
        assert len(answer.content) <= 4_096
    for name, status in [("defence-auditor", 404), ("health-eu-de-1", 403)]:
        await get(lab, name, path, status=status)
    none = await get(lab, "health-auditor", path.replace(str(receipt.seq), "0"), status=404)  # the writer's own
    missing = await get(lab, "health-auditor", "/v1/audit/nobody-0/5/proof", status=404)
    assert none.json()["code"] == missing.json()["code"] == "not_found"


async def test_every_auditor_reads_checkpoints_their_growth_and_the_root_logs_tiles(lab: Lab, auditor: str) -> None:
    trust = trust_of(lab)
    old = (await get(lab, "health-auditor", "/v1/audit/checkpoint")).content
    size = trusted_checkpoint(old, trust).size
    await made_record(lab, "health-operator")
    for _ in range(600):
        newest = await get(lab, auditor, "/v1/audit/checkpoint")
        if trusted_checkpoint(newest.content, trust).size > size:
            break
        await asyncio.sleep(0.2)
    assert newest.headers["cache-control"] == "no-store"
    proof = await get(lab, "defence-auditor", f"/v1/audit/consistency?from={size}")
    before, after = check_growth(proof.content, old, trust)
    assert after.size > before.size == size
    again = await get(lab, auditor, f"/v1/audit/checkpoint/{size}")
    assert trusted_checkpoint(again.content, trust) == before
    tile = await get(lab, "health-auditor", "/v1/audit/tile/0/000.p/1")
    entries = await get(lab, "health-auditor", "/v1/audit/tile/entries/000.p/1")
    (entry,) = verify.unpack(entries.content)
    assert b'"kind":"heads"' in entry
    assert (
        root_from_inclusion(0, 1, tile.content, [])
        == parse_checkpoint(parse_note((await get(lab, auditor, "/v1/audit/checkpoint/1")).content).text).root
    )


async def test_a_chains_tiles_are_for_the_installations_auditor_and_full_ones_may_be_kept(
    lab: Lab, auditor: str
) -> None:
    last = await made_record(lab, "health-eu-de-1")
    while last.seq < 300:
        await asyncio.gather(*(made_record(lab, "health-eu-de-1") for _ in range(50)))
        last = await made_record(lab, "health-eu-de-1")
    chain = last.log.rpartition("/")[2]
    await get(lab, "health-auditor", f"/v1/audit/{chain}/{last.seq}/proof")  # so a checkpoint covers it
    for what, size in (("tile/0/000", 8_192), ("tile/1/000.p/1", 32), ("tile/entries/000.p/2", None)):
        answer = await get(lab, auditor, f"/v1/audit/{chain}/{what}")
        assert size is None or len(answer.content) == size
        kept = "immutable" in answer.headers["cache-control"]
        assert kept == (".p/" not in what)
        assert "private" in answer.headers["cache-control"] or not kept
        assert "audit-receipt" in answer.headers
        await get(lab, "health-auditor", f"/v1/audit/{chain}/{what}", status=403)


@pytest.mark.parametrize(
    "name",
    [
        *("000.p/0", "000.p/256", "000.p/999", "000.p/01", "0", "00", "0000", "x001", "x000/001", "001/001"),
        *("x001/x000", "x01/001", "..%2f000", "x001//000", "000.p/", "-01", "000.p/1/2", "%78001/001", "00a", ""),
    ],
)
async def test_what_is_no_name_of_a_tile_is_not_found(lab: Lab, name: str) -> None:
    for log in ("", "n-0/"):
        for kind in ("0", "entries", "64", "00", "-1", "data"):
            answer = await lab.client("health-auditor").get(f"/v1/audit/{log}tile/{kind}/{name}")
            assert answer.status_code == 404, (log, kind, name)
            assert "audit-receipt" in answer.headers


@pytest.mark.parametrize("query", ["", "?from=0", "?from=-1", "?from=01", "?from=2&to=1", "?from=1e3", "?from=1&to="])
async def test_sizes_that_no_checkpoint_can_have_are_refused(lab: Lab, query: str) -> None:
    answer = await lab.client("health-auditor").get(f"/v1/audit/consistency{query}")
    assert (answer.status_code, answer.json()["code"]) == (422, "validation_failed")


async def test_sizes_that_were_never_signed_are_not_found(lab: Lab) -> None:
    await get(lab, "health-auditor", "/v1/audit/checkpoint")
    for path in (
        "checkpoint/999999999",
        "checkpoint/0",
        "consistency?from=999999999",
        "consistency?from=1&to=999999999",
    ):
        answer = await get(lab, "health-auditor", f"/v1/audit/{path}", status=404)
        assert answer.json()["code"] == "not_found", path


async def test_a_tenant_takes_home_its_whole_record_and_no_one_elses(lab: Lab, auditor: str) -> None:
    await made_record(lab, "defence-operator")
    receipt = await made_record(lab, "health-eu-de-1")
    await get(lab, "health-auditor", f"/v1/audit/{receipt.log.rpartition('/')[2]}/{receipt.seq}/proof")
    receipts = {receipt.log: {receipt.seq: receipt.leaf.hex()}}
    for name in ("health-auditor", auditor):
        answer = await get(lab, name, "/v1/audit/tenants/health/bundle")
        assert answer.headers["content-type"] == "application/x-ndjson"
        lines = answer.content.splitlines(keepends=True)
        verdict = check_bundle(lines, trust_of(lab), tenant="health", receipts=receipts)
        assert not verdict.report.findings, verdict.report.findings
        assert b"defence" not in answer.content
    assert not check_bundle(lines[:-1], trust_of(lab)).report.anchored
    await get(lab, "health-auditor", "/v1/audit/tenants/defence/bundle", status=404)
    await get(lab, "defence-auditor", "/v1/audit/tenants/health/bundle", status=404)
    answer = await lab.client("health-auditor").get("/v1/audit/tenants/health/bundle?from=yesterday")
    assert answer.status_code == 422


async def test_the_status_names_every_chain_and_the_newest_checkpoint(lab: Lab) -> None:
    await get(lab, "health-auditor", "/v1/audit/checkpoint")
    for _ in range(600):
        shown = (await get(lab, "health-auditor", "/v1/audit/status")).json()
        if shown["checkpoint"] is not None:
            break
        await asyncio.sleep(0.1)
    assert shown["checkpoint"]["size"] >= 1
    assert shown["log"] in {chain["log"] for chain in shown["chains"]}


def test_the_commands_fetch_check_and_say_what_is_proven(
    node: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trust, where = str(node.environment["trust_file"]), ("--dev-dir", str(node.directory))

    def skms(name: str, *command: str) -> tuple[int, str, str]:
        run = subprocess.run(
            [sys.executable, "-m", "service.cli.main", *where, "--identity", name, "audit", *command],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=120,
        )
        return run.returncode, run.stdout, run.stderr

    with node.client("health-eu-de-1") as client:
        receipt = client.get("/v1/whoami").headers["audit-receipt"]
    log, seq, _ = verify.parse_receipt(receipt)
    status, out, _ = skms(
        "health-auditor", "proof", "--receipt", receipt, "--trust", trust, "--to", str(tmp_path / "p")
    )
    assert (status, out.startswith(f"proven {log}/{seq} ")) == (0, True)
    assert verify.main(["check-proof", str(tmp_path / "p"), "--receipt", receipt, "--trust", trust]) == 0
    capsys.readouterr()
    old = str(tmp_path / "checkpoint")
    status, out, _ = skms("health-auditor", "checkpoint", "--trust", trust, "--to", old)
    assert (status, out.startswith("checkpoint "), out.endswith(f": written to {old}\n")) == (0, True, True), out
    status, out, _ = skms("health-auditor", "consistency", old, "--trust", trust)
    assert (status, " extends checkpoint " in out) == (0, True)
    (tmp_path / "receipts").write_text(receipt + "\n")
    kept = ("--to", str(tmp_path / "b"), "--receipts", str(tmp_path / "receipts"), "--trust", trust)
    status, out, _ = skms("health-auditor", "tenant-bundle", *kept)
    assert (status, out.startswith("complete health: ")) == (0, True)
    # A receipt whose record is lost, or is another: nothing vouches for it.
    lost = receipt.replace(f"seq={seq}", f"seq={seq + 1_000_000}")
    status, _, told = skms("health-auditor", "proof", "--receipt", lost, "--trust", trust)
    assert (status, "E_TRUNC" in told) == (8, True)
