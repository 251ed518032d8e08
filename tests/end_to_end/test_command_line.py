"""The command line against a running node: what an operator types, what comes back, and with which exit status."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from harness import ROOT, Served
from service.protocols.native import ROUTES


def plainly(node: Served, name: str, *arguments: str) -> str:
    """What a person sees of it."""
    who = ("--dev-dir", str(node.directory), "--identity", name)
    command = [sys.executable, "-m", "service.cli.main", *who, *arguments]
    environment = {**os.environ, "COLUMNS": "240"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True, env=environment).stdout


def skms(node: Served, name: str, *arguments: str, status: int = 0, stdin: bytes = b"") -> Any:
    command = [
        sys.executable,
        "-m",
        "service.cli.main",
        "--dev-dir",
        str(node.directory),
        "--identity",
        name,
        "-o",
        "json",
    ]
    done = subprocess.run([*command, *arguments], capture_output=True, input=stdin, cwd=ROOT, check=False)
    assert done.returncode == status, (arguments, done.returncode, done.stdout, done.stderr)
    if status:
        assert b"Traceback" not in done.stderr
        return done.stderr.decode()
    try:
        return json.loads(done.stdout)
    except ValueError:
        return done.stdout.decode()


# Which command serves which route: every operation of the API has one (O5).
COMMANDS = {
    "encrypt": "encrypt", "decrypt": "decrypt", "rewrap": "rewrap", "data_key": "data-key", "unwrap_data_key": "unwrap",
    "sign": "sign", "verify": "verify", "mac": "mac", "verify_mac": "verify-mac", "random": "random",
    "create_key": "key create", "list_keys": "key list", "get_key": "key show", "update_key": "key update",
    "import_parameters": "key import-parameters", "import_key": "key import",
    "rotate_key": "key rotate", "disable_key": "key disable", "enable_key": "key enable",
    "compromise_key": "key compromise", "schedule_deletion": "key schedule-deletion",
    "cancel_deletion": "key cancel-deletion", "destroy_key": "key destroy", "set_key_policy": "key set-policy",
    "list_versions": "key versions", "revoke_version": "key revoke-version",
    "get_public_key": "key public-key", "list_aliases": "alias list", "put_alias": "alias put",
    "delete_alias": "alias delete", "list_tenants": "tenant list", "list_regions": "region list",
    "list_hsms": "hsm status", "drain_hsm": "hsm drain", "undrain_hsm": "hsm undrain",
    "start_drill": "drill exit", "list_drills": "drill list", "get_drill": "drill show", "get_operation": "drill show",
    "drill_report": "drill report", "abort_drill": "drill abort", "confirm_drill": "drill confirm",
    "get_compliance": "compliance", "get_sovereignty": "sovereignty report",
    "get_policy": "policy show", "reload_policy": "policy reload",
    "plan_policy": "policy plan", "apply_policy": "policy apply", "rollback_policy": "policy rollback",
    "freeze": "freeze start", "list_freezes": "freeze list", "get_freeze": "freeze show", "freeze_drill": "freeze drill",
    "lift_freeze": "freeze lift", "list_approvals": "approval list", "get_approval": "approval show",
    "sign_approval": "approval add", "cancel_approval": "approval cancel",
    "revoke_approval": "approval revoke",
    "create_grant": "key grant", "list_grants": "key grants", "revoke_grant": "key revoke-grant",
    "create_exception": "exception ask", "list_exceptions": "exception list", "get_exception": "exception show",
    "revoke_exception": "exception revoke",
    "get_decision": "policy explain", "simulate_policy": "policy simulate",
    "list_transfers": "transfers report", "list_transfer_agreements": "transfers agreements",
    "create_token": "token create", "list_tokens": "token list", "revoke_token": "token revoke",
    "search_records": "audit search", "audit_status": "audit status", "whoami": "whoami",
    "audit_checkpoint": "audit checkpoint", "audit_proof": "audit proof", "audit_consistency": "audit consistency",
    "tenant_bundle": "audit tenant-bundle",
}  # fmt: skip
WITHOUT = {"health", "metrics", "openapi", "audit_tile", "witness_checkpoint"}  # for machines: the last two speak C2SP


def test_O5_every_operation_of_the_api_has_a_command() -> None:
    assert {r.op for r in ROUTES} - WITHOUT == set(COMMANDS)
    import typer

    from service.cli.commands import app

    click: Any = typer.main.get_command(app)
    for command in COMMANDS.values():
        at = click
        for word in command.split():
            at = at.commands[word]


def test_a_key_from_creation_to_deletion(node: Served, tmp_path: Path) -> None:
    made = skms(
        node,
        "health-operator",
        "key",
        "create",
        "--spec",
        "AES_256",
        "--tier",
        "2",
        "--home",
        "eu-de-1",
        "--alias",
        "cli",
    )
    key = made["id"]
    text = skms(node, "health-eu-de-1", "encrypt", "alias/cli", "-c", "row=7", stdin=b"hello")["ciphertext"]
    file = tmp_path / "message"
    file.write_text(text)
    plain = tmp_path / "plain"
    skms(node, "health-eu-de-1", "decrypt", "-i", str(file), "-O", str(plain), "-c", "row=7")
    assert plain.read_bytes() == b"hello"
    assert plain.stat().st_mode & 0o777 == 0o600
    assert skms(node, "health-eu-de-1", "envelope", "inspect", "-i", str(file))["key_id"] == key
    assert skms(node, "health-operator", "key", "rotate", "alias/cli")["latest_version"] == 2
    assert "to" in skms(node, "health-eu-de-1", "rewrap", "-i", str(file), "-c", "row=7")
    assert (
        skms(node, "health-operator", "key", "update", key, "--description", "for tests")["description"] == "for tests"
    )
    assert skms(node, "health-officer", "key", "disable", key)["state"] == "disabled"
    told = skms(node, "health-eu-de-1", "encrypt", key, status=5, stdin=b"x")
    assert "key_state_invalid" in told
    assert "skms key enable" in told
    assert skms(node, "health-operator", "key", "enable", key)["state"] == "enabled"
    assert (
        skms(node, "health-operator", "key", "schedule-deletion", key, "--wait", "P7D")["state"] == "pending_deletion"
    )
    assert skms(node, "health-operator", "key", "cancel-deletion", key)["state"] == "disabled"
    assert any(k["id"] == key for k in skms(node, "health-operator", "key", "list"))
    assert skms(node, "health-operator", "--dry-run", "key", "enable", key)["would"] == "allow"
    assert skms(node, "health-operator", "key", "show", key)["state"] == "disabled"


@pytest.mark.parametrize(
    ("name", "arguments", "status", "says"),
    [
        ("health-us-mkt-1", ("encrypt", "alias/cli-status"), 3, "SOV-CALLER-PLACE"),
        ("defence-eu-de-1", ("encrypt", "alias/cli-status"), 4, "not_found"),
        ("health-operator", ("key", "show", "alias/none"), 4, "not_found"),
        ("health-auditor", ("key", "rotate", "alias/cli-status"), 3, "DEFAULT"),
        (
            "health-operator",
            ("key", "create", "--spec", "AES_256", "--tier", "2", "--home", "us-mkt-1"),
            5,
            "tier_not_met",
        ),
        ("health-operator", ("key", "create", "--spec", "AES_257", "--tier", "2", "--home", "eu-de-1"), 2, "/spec"),
        ("health-operator", ("key", "create", "--tier", "2"), 2, "spec"),
        ("nobody", ("whoami",), 2, "identity"),
        ("health-eu-de-1", ("decrypt", "-i", "/nonexistent"), 2, "No such file"),
    ],
)
def test_exit_statuses_and_messages(
    node: Served, name: str, arguments: tuple[str, ...], status: int, says: str
) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "service.cli.main", "--dev-dir", str(node.directory), "--identity", "health-operator"),
            *("key", "create", "--spec", "AES_256", "--tier", "2", "--home", "eu-de-1", "--alias", "cli-status"),
        ],
        capture_output=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode in {0, 5}
    told = skms(node, name, *arguments, status=status, stdin=b"x")
    assert says in told


def test_a_grant_is_made_shown_and_taken_back_and_an_exception_needs_approvers(node: Served) -> None:
    key = skms(node, "health-operator", "key", "create", "--spec", "AES_256", "--tier", "2", "--home", "eu-de-1")["id"]
    to = skms(node, "health-eu-de-1", "whoami")["id"]
    ends = (datetime.now(UTC) + timedelta(days=1)).isoformat(timespec="seconds").replace("+00:00", "Z")
    grant = ("key", "grant", key, "--to", to, "--operation", "decrypt", "--operation", "rewrap", "--expires-at", ends)
    more = ("--context-subset", "study=onco", "--max-uses", "5")
    made = skms(node, "health-officer", *grant, *more)
    assert (made["operations"], made["context_subset"], made["uses"]) == (["decrypt", "rewrap"], {"study": "onco"}, 0)
    assert "policy_denied" in skms(node, "health-operator", *grant, status=3)
    assert "expires_at" in skms(node, "health-officer", *grant[:-1], "2020-01-01T00:00:00Z", status=2)
    assert [g["id"] for g in skms(node, "health-auditor", "key", "grants", key)] == [made["id"]]
    skms(node, "health-officer", "key", "revoke-grant", key, made["id"])
    assert skms(node, "health-auditor", "key", "grants", key)[0]["state"] == "revoked"
    skms(node, "health-officer", "key", "revoke-grant", key, made["id"], status=4)
    basis = ("--purpose", "default", "--legal-basis", "eu-law", "--legal-ref", "Article 49", "--not-after", ends)
    asked = ("exception", "ask", "--key", key, "--kind", "reach", "--place", "FR", *basis)
    assert "approval_refused" in skms(node, "health-officer", *asked, status=3)
    assert skms(node, "health-auditor", "exception", "list") == []
    for command in ("show", "revoke"):
        skms(node, "health-officer", "exception", command, made["id"], status=4)


def test_transfers_are_reported_and_a_missing_agreement_is_explained(node: Served) -> None:
    create = (
        "key",
        "create",
        "--spec",
        "AES_256",
        "--tier",
        "2",
        "--home",
        "eu-de-1",
        "--reach",
        "DE",
        "--reach",
        "FR",
    )
    billing, other = (
        skms(node, "health-operator", *create, "--purpose", purpose)["id"] for purpose in ("billing", "cli")
    )
    skms(node, "health-eu-fr-1", "encrypt", billing, stdin=b"x")
    told = skms(node, "health-eu-fr-1", "encrypt", other, status=3, stdin=b"x")
    assert "transfer_not_authorised" in told
    assert "SOV-TRANSFER" in told
    decision = re.search(r"decision_id: ([0-9a-f-]{36})", told)
    assert decision
    shown = plainly(node, "health-officer", "policy", "explain", decision[1])
    assert "data crosses from FR to DE: no agreement in force covers it" in shown
    assert "dev-fr-de (2020-01-01T00:00:00Z to 2100-01-01T00:00:00Z): another purpose" in shown
    counted = skms(node, "health-auditor", "transfers", "report", "--from", "2026-01-01T00:00:00Z")["items"]
    rows = {(r["agreement"], r["purpose"]): (r["crossed"], r["refused"]) for r in counted}
    assert rows["dev-fr-de", "billing"] == (1, {})
    assert rows[None, "cli"] == (0, {"SOV-TRANSFER": 1})
    assert "dev-fr-de" in plainly(node, "health-auditor", "transfers", "report")
    assert "in_force" in plainly(node, "health-auditor", "transfers", "agreements")
    told = skms(node, "health-auditor", "transfers", "report", "--tenant", "defence", status=4)
    assert "not_found" in told


def test_signing_tokens_policy_and_audit_from_the_command_line(node: Served, tmp_path: Path) -> None:
    key = skms(node, "health-operator", "key", "create", "--spec", "EC_P256", "--tier", "2", "--home", "eu-de-1")["id"]
    signature = skms(node, "health-eu-de-1", "sign", key, "-a", "ECDSA_SHA_256", stdin=b"m")["signature"]
    verify = ("verify", key, "-a", "ECDSA_SHA_256", "--signature", signature)
    assert skms(node, "health-eu-de-1", *verify, stdin=b"m")["valid"] is True
    skms(node, "health-eu-de-1", *verify, status=8, stdin=b"n")
    assert "BEGIN PUBLIC KEY" in skms(node, "health-eu-de-1", "key", "public-key", key)
    token = tmp_path / "token"
    made = skms(node, "health-operator", "token", "create", "--scope", "listKeys", "--out", str(token))
    assert "token" not in made
    assert token.stat().st_mode & 0o777 == 0o600
    listed = skms(node, "health-operator", "token", "list")
    assert made["id"] in {t["id"] for t in listed}
    assert token.read_text().strip() not in json.dumps(listed)
    skms(node, "health-operator", "token", "revoke", made["id"])
    assert skms(node, "platform", "policy", "reload")["development"] is True
    assert skms(node, "platform", "hsm", "status")[0]["state"] == "UP"
    found = skms(node, "health-auditor", "audit", "search", "--op", "sign")
    assert {r["record"]["op"] for r in found} == {"sign"}


def test_the_report_on_sovereignty_comes_as_table_json_and_page(node: Served, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    told = skms(node, "platform", "sovereignty", "report", "--html", str(page))
    command = [sys.executable, "-m", "service.cli.main", "--dev-dir", str(node.directory), "--identity", "platform"]
    asked = [*command, "sovereignty", "report"]
    table = subprocess.run(asked, capture_output=True, cwd=ROOT, check=True, env={**os.environ, "COLUMNS": "200"})
    assert b"critical systems under sovereign" in table.stdout
    assert page.read_text().startswith("<!doctype html>")
    assert told["critical_systems"]["share"] is None
    assert told["suppliers"]["query"] in page.read_text()


def test_compliance_has_a_status_of_its_own_while_a_key_is_below_its_tier(node: Served) -> None:
    key = skms(node, "health-operator", "key", "create", "--spec", "AES_256", "--tier", "1", "--home", "eu-de-1")["id"]
    told = skms(node, "health-auditor", "compliance")
    assert (told["items"], told["tiers"][0]["labels"]) == ([], {"SOV-2": 3, "SOV-3": 3})
    assert told["suppliers"][0]["hsms"] == ["softhsm-eu-de-1"]
    charter = node.directory / "policy" / "charter.yaml"
    good = charter.read_text()
    version = skms(node, "health-auditor", "policy", "show")["version"]

    def put(text: str, number: int) -> None:
        charter.write_text(re.sub(r'^"version": \d+', f'"version": {number}', text, flags=re.MULTILINE))
        skms(node, "platform", "policy", "reload")

    put(good.replace("9999-12-31", "2020-02-29"), version + 1)
    try:
        command = [sys.executable, "-m", "service.cli.main", "--dev-dir", str(node.directory), "--identity"]
        asked = [*command, "health-auditor", "-o", "json", "compliance"]
        done = subprocess.run(asked, capture_output=True, cwd=ROOT, check=False)
        assert done.returncode == 8, done.stderr
        (item,) = [item for item in json.loads(done.stdout)["items"] if item["key_id"] == key]
        assert {gap["since"] for gap in item["missing"]} == {"2020-03-01T00:00:00.000Z"}
        table = subprocess.run([*command, "platform", "compliance"], capture_output=True, cwd=ROOT, check=False)
        assert table.returncode == 8, table.stderr
        assert b"SOV-2" in table.stdout
        assert "skms compliance" in skms(node, "health-eu-de-1", "encrypt", key, status=5, stdin=b"x")
    finally:
        put(good, version + 2)
    assert "ciphertext" in skms(node, "health-eu-de-1", "encrypt", key, stdin=b"x")


def test_a_draft_policy_is_planned_before_it_is_asked_for(node: Served, tmp_path: Path) -> None:
    draft, stop = tmp_path / "draft", '@id("health.stop") @layer("tenant") @code("HEALTH-STOP")\n'
    shutil.copytree(node.directory / "policy", draft)
    rules, members = draft / "tenants/health/09-stop.cedar", draft / "tenants/health/members.yaml"
    charter = draft / "charter.yaml"
    version = skms(node, "installation-officer", "policy", "show")["version"]
    charter.write_text(re.sub(r'"version": \d+', f'"version": {version + 1}', charter.read_text()))
    rules.write_text(stop + 'forbid (principal, action == Action::"encrypt", resource in Tenant::"health");\n')
    told = skms(node, "installation-officer", "policy", "plan", str(draft), "--from", "2026-01-01T00:00:00Z")
    assert [(f["path"], f["change"]) for f in told["files"]] == [
        ("charter.yaml", "changed"),
        ("tenants/health/09-stop.cedar", "added"),
    ]
    assert [(c["newly"], c["request"]["action"]) for c in told["changes"]] == [("denied", "encrypt")]
    assert told["replay"]["newly_denied"] == sum(told["replay"]["radius"]["key"].values())
    text = skms(node, "installation-officer", "-o", "table", "policy", "plan", str(draft))
    for said in ("added: tenants/health/09-stop.cedar", "newly denied on a Key, by health.stop", "0 broken"):
        assert said in text
    # Offline, beside the directory of the bundle that it is to replace; and one that locks somebody out.
    old = node.directory / "policy"
    assert skms(node, "platform", "policy", "plan", str(draft), "--against", str(old))["locked_out"] == []
    members.write_text(members.read_text().replace("role: officer", "role: auditor"))
    skms(node, "platform", "policy", "plan", str(draft), "--against", str(old), status=8)
    refused = skms(node, "installation-officer", "policy", "apply", str(draft), status=5)
    assert "policy_would_lock_out" in refused
    assert "/health/officer/health-officer" in refused
    shutil.copy(old / "tenants/health/members.yaml", members)
    assert "[[approvals.approver]]" in skms(node, "installation-officer", "policy", "apply", str(draft), status=3)
    assert "bundle_lost" in skms(node, "installation-officer", "policy", "rollback", "--to", "0" * 12, status=5)
    denied = skms(node, "health-operator", "policy", "apply", str(draft), status=3)
    assert "policy_denied" in denied


def test_a_node_is_found_stopped_and_told_apart(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "service.cli.main", "dev"]
    assert (
        subprocess.run([*command, "env", "--dir", str(tmp_path)], capture_output=True, cwd=ROOT, check=False).returncode
        == 7
    )
    assert (
        subprocess.run(
            [*command, "down", "--dir", str(tmp_path)], capture_output=True, cwd=ROOT, check=False
        ).returncode
        == 4
    )
    (tmp_path / "dev.pid").write_text(f"{os.getpid()} 1\n")  # our pid, another process's birth: not to be stopped
    assert (
        subprocess.run(
            [*command, "down", "--dir", str(tmp_path)], capture_output=True, cwd=ROOT, check=False
        ).returncode
        == 4
    )


def test_two_workers_share_one_port_and_see_each_others_changes(tmp_path: Path) -> None:
    from harness import served

    with served(tmp_path / "pair", "--workers", "2") as pair:
        key = skms(pair, "health-operator", "key", "create", "--spec", "AES_256", "--tier", "2", "--home", "eu-de-1")[
            "id"
        ]
        chains = set()
        for _ in range(60):
            with pair.client("health-eu-de-1") as client:  # a connection of its own, so either worker may answer
                answer = client.post(f"/v1/keys/{key}/encrypt", json={"plaintext": "aGk="})
                assert answer.status_code == 200, answer.text
                chains.add(answer.headers["audit-receipt"].split('"')[1])
        assert chains == {"dev.skms.example/audit/n0-0", "dev.skms.example/audit/n0-1"}
        skms(pair, "health-operator", "key", "disable", key)
        import time

        time.sleep(0.5)  # S-01: every worker within a second
        for _ in range(20):
            with pair.client("health-eu-de-1") as client:
                assert client.post(f"/v1/keys/{key}/encrypt", json={"plaintext": "aGk="}).status_code == 409


def test_a_key_is_imported_from_standard_input_and_by_the_openssl_recipe(node: Served, tmp_path: Path) -> None:
    made = skms(node, "health-operator", *EXTERNAL, "--alias", "cli-import")
    assert made["state"] == "pending_import"
    hpke = "HPKE_MLKEM768_X25519_SHA256_AES_256_GCM"
    arguments = ("key", "import", "alias/cli-import", "--material", "-", "--wrapping", hpke)
    imported = skms(node, "health-operator", *arguments, stdin=os.urandom(32))
    assert (imported["state"], imported["latest_version"]) == ("enabled", 1)
    told = skms(node, "health-operator", *arguments, stdin=bytes(32), status=2)
    assert "pattern" in told

    secret = tmp_path / "secret.bin"
    secret.write_bytes(os.urandom(32))
    shown = skms(node, "health-operator", "key", "import-parameters", "alias/cli-import")
    (tmp_path / "parameters.json").write_text(json.dumps(shown))
    (tmp_path / "wrap.der").write_bytes(base64.b64decode(shown["wrapping_public_key"]))
    recipe = (ROOT / "docs" / "import.md").read_text().split("## With OpenSSL")[1].split("## ")[0]
    steps = textwrap.dedent("\n".join(line for line in recipe.splitlines() if line.startswith("    ")))
    script = "\n".join(s for s in steps.splitlines() if not s.startswith(("skms", "python3")))
    done = subprocess.run(["bash", "-euc", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    value = done.stdout.strip().rsplit(" ", 1)[-1][:16]
    again = skms(
        *(node, "health-operator", "key", "import", "alias/cli-import", "--check-value", value),
        *("--parameters", str(tmp_path / "parameters.json"), "--wrapped-key", str(tmp_path / "wrapped.bin")),
    )
    assert again["latest_version"] == 2


EXTERNAL = ("key", "create", "--spec", "AES_256", "--tier", "2", "--home", "eu-de-1", "--origin", "external")
