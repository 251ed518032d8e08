"""What of a key's administration one person asks for and others approve: destruction, and what bounds a key's use."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import shutil
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from msgspec import structs

from databases import address
from harness import Files, Lab, lab_of, new_key, officer
from policy import Policy
from postgres import Cluster
from service.approvals import Asked, approve
from service.config import ApprovalsSection, ApproverSection
from service.dev import domain

B64 = base64.b64encode(b"hello").decode()
HEALTH = f"mtls:{domain('eu-de-1')}:/health"
# Approver -> as whom the service knows the person, and whose requests it approves. Who asks (the tenant's operator) is one
# of them, and has a second login; gemini and twin are one human with two logins and two keys.
PEOPLE: dict[str, tuple[str, tuple[str, ...]]] = {
    "alice": (f"{HEALTH}/people/alice", ()),
    "bob": (f"{HEALTH}/people/bob", ("health",)),
    "carol": (f"{HEALTH}/people/carol", ("health", "defence")),
    "gemini": (f"{HEALTH}/people/gemini", ()),
    "twin": (f"{HEALTH}/people/twin", ()),
    "dave": ("mtls:x:/dave", ("defence",)),
    "operator": (f"{HEALTH}/operator/health-operator", ()),
    "laptop": (f"{HEALTH}/people/laptop", ()),
}
LISTED = {
    "gemini": ("auditor", "one-human"),
    "twin": ("auditor", "one-human"),
    "laptop": ("auditor", "health-operator"),
}


def config_of(files: Files, directory: Path, *, url: str | None = None, without: frozenset[str] = frozenset()) -> Files:
    """The development node with those approvers, a database and a bundle of its own."""
    bundle = directory / "policy"
    if not bundle.exists():
        shutil.copytree(files.config.policy.bundle, bundle)
        members = bundle / "tenants/health/members.yaml"
        listed = yaml.safe_load(members.read_text())["members"]
        listed += [{"id": PEOPLE[n][0], "role": role, "person": person} for n, (role, person) in LISTED.items()]
        members.write_text(yaml.safe_dump({"members": listed}))
        for name in PEOPLE:
            officer(directory, name)
    approvers = tuple(
        ApproverSection(name, directory / f"{name}.pem", (identity,), tenants)
        for name, (identity, tenants) in PEOPLE.items()
        if name not in without
    )
    config = structs.replace(
        files.config,
        database=structs.replace(files.config.database, url=url or address(directory)),
        node=structs.replace(files.config.node, state_dir=directory),
        policy=structs.replace(files.config.policy, bundle=bundle),
        approvals=ApprovalsSection(approver=approvers),
    )
    return dataclasses.replace(files, config=config)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("key-requests")


@pytest.fixture(scope="module")
async def voting(dev_files: Files, directory: Path) -> AsyncIterator[Lab]:
    async with lab_of(config_of(dev_files, directory)) as made:
        yield made


def fresh() -> dict[str, str]:
    return {"Idempotency-Key": uuid.uuid4().hex}


async def tag(lab: Lab, key: str) -> dict[str, str]:
    return {"If-Match": (await lab.client("health-operator").get(f"/v1/keys/{key}")).headers["etag"]}


async def destruction(lab: Lab, key: str, *, who: str = "health-operator") -> httpx.Response:
    headers = {**fresh(), **await tag(lab, key)}
    body = {"reason": {"code": "leaked"}}
    return await lab.client(who).post(f"/v1/keys/{key}/destroy", json=body, headers=headers)


async def bounds(lab: Lab, key: str, *, who: str = "health-officer", **body: Any) -> httpx.Response:
    headers = {**fresh(), **await tag(lab, key)}
    return await lab.client(who).post(f"/v1/keys/{key}/policy", json=body, headers=headers)


def request_in(answer: httpx.Response) -> Asked:
    assert answer.status_code == 202, answer.text
    shown = answer.json()
    assert (shown["code"], shown["state"], shown["approvers"]) == ("approval_required", "open", [])
    assert answer.headers["location"] == f"/v1/approvals/{shown['id']}"
    made = Asked.of(json.dumps(shown["request"]))
    assert made.digest() == shown["digest"]
    return made


async def sign(
    lab: Lab,
    request: Asked,
    name: str,
    *,
    to: str | None = None,
    who: str = "health-custodian",
    kind: str = "",
    where: str = "signatures",
) -> httpx.Response:
    file = lab.files.config.node.state_dir / f"{name}.key"
    made = approve(kind or request.kind, request.digest(), name=name, key_file=file)
    body = {"approver": name, "signature": made.signature.hex()}
    return await lab.client(who).post(f"/v1/approvals/{to or request.id}/{where}", json=body)


async def signed(lab: Lab, request: Asked, *names: str) -> tuple[str, list[str]]:
    """(state, approvers) after these have signed; each of them counts."""
    for name in names:
        answer = await sign(lab, request, name)
        assert answer.status_code == 200, answer.text
    return answer.json()["state"], answer.json()["approvers"]


async def state(lab: Lab, key: str) -> str:
    return str((await lab.client("health-operator").get(f"/v1/keys/{key}")).json()["state"])


async def standing(lab: Lab, request: Asked) -> tuple[str, list[str], int]:
    shown = (await lab.client("health-operator").get(f"/v1/approvals/{request.id}")).json()
    return shown["state"], shown["approvers"], shown["needed"]


@pytest.mark.anyio
async def test_two_others_destroy_what_an_operator_asked_for_and_nothing_opens_again(voting: Lab) -> None:
    key, workload = await new_key(voting, "AES_256"), voting.client("health-eu-de-1")
    text = (await workload.post(f"/v1/keys/{key}/encrypt", json={"plaintext": B64})).json()["ciphertext"]
    request = request_in(await destruction(voting, key))
    assert request.parameters == {"key": key, "version": 1, "tier": 2, "state": "enabled", "reason": "leaked"}
    assert await signed(voting, request, "alice") == ("open", ["alice"])
    assert (await workload.post("/v1/decrypt", json={"ciphertext": text})).status_code == 200
    assert await signed(voting, request, "bob") == ("executed", ["alice", "bob"])
    assert await state(voting, key) == "destroyed"
    opened = await workload.post("/v1/decrypt", json={"ciphertext": text})
    assert (opened.status_code, opened.json()["code"]) == (410, "key_destroyed")
    engine = sa.create_engine(voting.files.config.database.url)
    with engine.connect() as connection:
        kept = connection.execute(sa.text("SELECT blob FROM keystore_version WHERE key_id = :k"), {"k": key}).all()
    engine.dispose()
    assert [bytes(row.blob) for row in kept] == [b""]
    late = await sign(voting, request, "carol")
    assert (late.status_code, late.json()["code"]) == (409, "approval_closed")


@pytest.mark.anyio
async def test_the_log_tells_who_asked_who_approved_what_and_that_it_was_done(voting: Lab) -> None:
    key = await new_key(voting, "AES_256")
    request = request_in(await destruction(voting, key))
    await signed(voting, request, "alice", "carol")
    found = [f.record for f in reversed(voting.node.kms.search.records(key=key))]
    steps = [(r["op"], r["kind"], r.get("out"), r.get("why"), r.get("appr"), r.get("kv")) for r in found]
    named = [request.id, request.digest()]
    assert [s for s in steps if s[0] in {"destroy_key", "sign_approval"}] == [
        ("destroy_key", "intent", "ok", "approval_required", named, 1),
        ("destroy_key", "outcome", "ok", "approval_required", named, 1),
        ("sign_approval", "outcome", "ok", None, [*named, "alice", "carol"], 2),
    ]
    asked = next(r for r in found if r["op"] == "destroy_key")
    assert (asked["actor"], asked["reason"]) == (PEOPLE["operator"][0], "leaked")
    assert asked["rule"] == ["charter.quorum"]
    first = voting.node.kms.search.records(op="sign_approval", out="ok")[2].record
    assert first["appr"] == [*named, "alice"]
    explained = await voting.client("health-auditor").get(f"/v1/policy/decisions/{asked['id']}")
    assert explained.status_code == 200, explained.text
    told = explained.json()
    assert (told["decision"]["rule"], told["request"]["action"]) == ("SOV-QUORUM", "destroy")
    assert told["request"]["approvals"] == 0


@pytest.mark.anyio
async def test_tier_1_takes_three_and_the_number_stands_in_the_rule_alone(
    voting: Lab, directory: Path, tmp_path: Path
) -> None:
    first, second = [await new_key(voting, "AES_256", tier=1) for _ in range(2)]
    request, other = [request_in(await destruction(voting, key)) for key in (first, second)]
    assert await standing(voting, request) == ("open", [], 3)
    assert await signed(voting, request, "alice", "bob") == ("open", ["alice", "bob"])
    assert await state(voting, first) == "enabled"
    assert await signed(voting, request, "carol") == ("executed", ["alice", "bob", "carol"])
    # A bundle that asks for four is obeyed by requests that are open already.
    kms, before = voting.node.kms, voting.node.kms.policy
    bundle = tmp_path / "stricter"
    shutil.copytree(directory / "policy", bundle)
    charter = bundle / "charter/00-charter.cedar"
    text = charter.read_text()
    assert "resource.tier == 1 && context.approvals < 3" in text
    charter.write_text(text.replace("resource.tier == 1 && context.approvals < 3", "context.approvals < 4"))
    try:
        kms.policy = Policy.load(bundle, known=before, sample=20)
        assert await signed(voting, other, "alice", "bob", "carol") == ("open", ["alice", "bob", "carol"])
        assert await standing(voting, other) == ("open", ["alice", "bob", "carol"], 4)
        assert await signed(voting, other, "twin") == ("executed", ["alice", "bob", "carol", "twin"])
    finally:
        kms.policy = before


@pytest.mark.anyio
async def test_A_20_what_is_not_one_more_persons_signature_of_exactly_this_counts_nothing(voting: Lab) -> None:
    key, another = await new_key(voting, "AES_256"), await new_key(voting, "AES_256")
    request, other = request_in(await destruction(voting, key)), request_in(await destruction(voting, another))
    assert await signed(voting, request, "gemini") == ("open", ["gemini"])

    def altered(**changes: object) -> Asked:
        return dataclasses.replace(request, parameters={**request.parameters, **changes})

    for attempt, why in (
        (sign(voting, request, "operator"), "asked for this"),
        (sign(voting, request, "laptop"), "asked for this"),
        (sign(voting, request, "gemini"), "counts once"),
        (sign(voting, request, "twin"), "counts once"),
        (sign(voting, request, "dave"), "not approve for this tenant"),
        (sign(voting, other, "alice", to=request.id), "false"),
        (sign(voting, altered(key=another), "alice"), "false"),
        (sign(voting, altered(version=2), "alice"), "false"),
        (sign(voting, dataclasses.replace(request, kind="set_key_policy"), "alice"), "false"),
        (sign(voting, dataclasses.replace(request, kind="lift_freeze"), "alice"), "false"),
        (sign(voting, dataclasses.replace(request, installation=str(uuid.uuid4())), "alice"), "false"),
    ):
        answer = await attempt
        assert (answer.status_code, answer.json()["code"]) == (403, "approval_refused"), why
        assert why in answer.json()["detail"]
    # The right key over the right digest, under another domain than that of approvals.
    pem = (voting.files.config.node.state_dir / "alice.key").read_bytes()
    private = load_pem_private_key(pem, None)
    assert isinstance(private, Ed25519PrivateKey)
    for domain_tag in ("skms-approval/v2", "skms-approval/v1 ", ""):
        text = f"{domain_tag}\n{request.kind}\n{request.digest()}\n".encode()
        body = {"approver": "alice", "signature": private.sign(text).hex()}
        answer = await voting.client("health-custodian").post(f"/v1/approvals/{request.id}/signatures", json=body)
        assert answer.json()["code"] == "approval_refused", domain_tag
    assert await standing(voting, request) == ("open", ["gemini"], 2)
    assert await state(voting, key) == "enabled"


@pytest.mark.anyio
async def test_two_logins_that_turn_out_to_be_one_human_count_once_from_then_on(
    voting: Lab, directory: Path, tmp_path: Path
) -> None:
    key = await new_key(voting, "AES_256", tier=1)
    request = request_in(await destruction(voting, key))
    kms, before = voting.node.kms, voting.node.kms.policy
    bundle, members = tmp_path / "unlinked", "tenants/health/members.yaml"
    shutil.copytree(directory / "policy", bundle)
    listed = yaml.safe_load((bundle / members).read_text())["members"]
    own = [m | {"person": m["id"]} if m["person"] == "one-human" else m for m in listed]
    (bundle / members).write_text(yaml.safe_dump({"members": own}))
    try:
        kms.policy = Policy.load(bundle, known=before, sample=20)
        assert await signed(voting, request, "gemini", "twin") == ("open", ["gemini", "twin"])
    finally:
        kms.policy = before
    assert await standing(voting, request) == ("open", ["gemini"], 3)
    assert await signed(voting, request, "alice") == ("open", ["alice", "gemini"])
    assert await state(voting, key) == "enabled"
    assert await signed(voting, request, "bob") == ("executed", ["alice", "bob", "gemini"])


@pytest.mark.anyio
async def test_A_20_an_approval_that_was_taken_back_does_not_count_and_cannot_be_handed_in_again(voting: Lab) -> None:
    key = await new_key(voting, "AES_256")
    request, other = request_in(await destruction(voting, key)), request_in(await destruction(voting, key))
    back = {"where": "revocations", "kind": "revoke-destroy_key"}
    assert await signed(voting, request, "gemini") == ("open", ["gemini"])
    for attempt, why in (
        (sign(voting, request, "gemini", where="revocations"), "false"),  # the approval itself takes nothing back
        (sign(voting, other, "gemini", to=request.id, **back), "false"),
        (sign(voting, request, "alice", **back), "not approved"),
        (sign(voting, request, "alice", kind="revoke-destroy_key"), "false"),
    ):
        answer = await attempt
        assert (answer.status_code, answer.json()["code"]) == (403, "approval_refused"), why
        assert why in answer.json()["detail"]
    assert (await sign(voting, request, "gemini", who="health-operator", **back)).status_code == 403
    assert (await sign(voting, request, "gemini", who="defence-custodian", **back)).status_code == 404
    taken = await sign(voting, request, "gemini", **back)
    assert (taken.status_code, taken.json()["state"], taken.json()["approvers"]) == (200, "open", [])
    record = voting.node.kms.search.records(op="revoke_approval", out="ok")[0].record
    assert record["appr"] == [request.id, request.digest()]
    for name in ("gemini", "twin"):
        assert "took the approval back" in (await sign(voting, request, name)).json()["detail"]
    assert (await sign(voting, request, "gemini", **back)).json()["code"] == "approval_refused"
    assert await signed(voting, request, "alice") == ("open", ["alice"])
    assert await state(voting, key) == "enabled"
    assert await signed(voting, request, "bob") == ("executed", ["alice", "bob"])
    assert (await sign(voting, request, "bob", **back)).json()["code"] == "approval_closed"


@pytest.mark.anyio
async def test_A_21_who_may_not_ask_sign_see_or_withdraw_cannot(voting: Lab) -> None:
    key = await new_key(voting, "AES_256")
    for who, status, code in (
        ("health-officer", 403, "policy_denied"),
        ("health-custodian", 403, "policy_denied"),
        ("health-auditor", 403, "policy_denied"),
        ("health-eu-de-1", 403, "policy_denied"),
        ("defence-operator", 404, "not_found"),
        ("platform", 404, "not_found"),
        ("installation-officer", 404, "not_found"),
    ):
        answer = await destruction(voting, key, who=who)
        assert (answer.status_code, answer.json()["code"]) == (status, code), who
    for who, status in (("health-operator", 403), ("health-custodian", 403), ("defence-officer", 404)):
        assert (await bounds(voting, key, who=who, tier=3)).status_code == status, who
    request = request_in(await destruction(voting, key))
    for who, status in (("health-custodian", 403), ("health-officer", 403), ("defence-operator", 404)):
        answer = await voting.client(who).post(f"/v1/approvals/{request.id}/cancel")
        assert answer.status_code == status, (who, answer.text)
    assert (await sign(voting, request, "alice", who="health-operator")).status_code == 403
    assert (await sign(voting, request, "alice", who="defence-custodian")).status_code == 404
    assert (await voting.client("defence-officer").get(f"/v1/approvals/{request.id}")).status_code == 404
    listed = (await voting.client("defence-officer").get("/v1/approvals")).json()["items"]
    assert request.id not in {shown["id"] for shown in listed}
    withdrawn = await voting.client("health-operator").post(f"/v1/approvals/{request.id}/cancel")
    assert (withdrawn.status_code, withdrawn.json()["state"]) == (200, "cancelled")
    assert (await sign(voting, request, "alice")).json()["code"] == "approval_closed"
    assert await state(voting, key) == "enabled"


@pytest.mark.anyio
async def test_a_key_that_changed_since_is_not_touched(voting: Lab) -> None:
    key, operator = await new_key(voting, "AES_256"), voting.client("health-operator")
    request, other = request_in(await destruction(voting, key)), request_in(await destruction(voting, key))
    assert await signed(voting, request, "alice") == ("open", ["alice"])
    assert (await operator.post(f"/v1/keys/{key}/rotate", headers=fresh())).status_code == 200
    late = await sign(voting, request, "bob")
    assert (late.status_code, late.json()["code"]) == (409, "approval_closed")
    assert "changed since" in late.json()["detail"]
    assert (await standing(voting, request))[0] == "outdated"
    assert await state(voting, key) == "enabled"
    withdrawn = await operator.post(f"/v1/approvals/{other.id}/cancel")
    assert withdrawn.json()["state"] == "cancelled"


@pytest.mark.anyio
async def test_a_frozen_key_is_not_destroyed_and_its_request_waits(voting: Lab) -> None:
    key = await new_key(voting, "AES_256")
    request = request_in(await destruction(voting, key))
    assert await signed(voting, request, "alice") == ("open", ["alice"])
    body = {"scope": {"kind": "key", "value": key}, "reason": {"code": "incident"}}
    freeze = (await voting.client("health-officer").post("/v1/freezes", json=body, headers=fresh())).json()["id"]
    refused = await sign(voting, request, "bob")
    assert (refused.status_code, refused.json()["code"]) == (423, "frozen")
    assert await standing(voting, request) == ("open", ["alice"], 2)
    assert (await destruction(voting, key)).json()["code"] == "frozen"
    record = voting.node.kms.search.records(op="sign_approval", out="denied")[0].record
    assert (record["why"], record["appr"][2:]) == ("frozen", ["alice", "bob"])
    lift = request_in(await voting.client("health-officer").post(f"/v1/freezes/{freeze}/lift", headers=fresh()))
    assert await signed(voting, lift, "alice", "carol") == ("executed", ["alice", "carol"])
    for _ in range(1_000):
        last = await sign(voting, request, "bob")
        if last.status_code == 200:
            break
        await asyncio.sleep(0.05)
    assert last.json()["state"] == "executed"
    assert await state(voting, key) == "destroyed"


@pytest.mark.anyio
async def test_two_last_signatures_at_once_destroy_once(voting: Lab) -> None:
    key = await new_key(voting, "AES_256")
    first, second = request_in(await destruction(voting, key)), request_in(await destruction(voting, key))
    assert [(await sign(voting, r, "alice")).status_code for r in (first, second)] == [200, 200]
    answers = await asyncio.gather(
        *(sign(voting, first, n) for n in ("bob", "bob", "carol", "gemini")), sign(voting, second, "bob")
    )
    assert [a.status_code for a in answers].count(200) == 1
    assert {a.json()["code"] for a in answers if a.status_code != 200} == {"approval_closed"}
    shown = (await voting.client("health-operator").get(f"/v1/keys/{key}")).json()
    assert shown["state"] == "destroyed"
    records = [f.record for f in voting.node.kms.search.records(key=key, op="sign_approval", out="ok")]
    assert [(r["kv"], len(r["appr"])) for r in records] == [(2, 4)]


@pytest.mark.anyio
async def test_first_signatures_at_once_are_both_kept_and_a_restart_forgets_none(
    dev_files: Files, tmp_path: Path
) -> None:
    files = config_of(dev_files, tmp_path)
    async with lab_of(files) as lab:
        tier_1, left, late = [await new_key(lab, "AES_256", tier=t) for t in (1, 2, 2)]
        request, lonely, expired = [request_in(await destruction(lab, key)) for key in (tier_1, left, late)]
        at_once = await asyncio.gather(sign(lab, request, "alice"), sign(lab, request, "bob"))
        assert [a.status_code for a in at_once] == [200, 200]
        assert await signed(lab, lonely, "alice") == ("open", ["alice"])
        assert await signed(lab, expired, "bob") == ("open", ["bob"])
    async with lab_of(config_of(dev_files, tmp_path, without=frozenset({"alice"}))) as lab:
        # An approver who has left counts no more, though it signed when it did.
        assert await signed(lab, lonely, "bob") == ("open", ["bob"])
        assert await signed(lab, request, "carol") == ("open", ["bob", "carol"])
        assert await signed(lab, request, "twin") == ("executed", ["bob", "carol", "twin"])
        assert [await state(lab, key) for key in (tier_1, left)] == ["destroyed", "enabled"]
        lab.clock.ahead = 3_601_000_000
        answer = await sign(lab, expired, "carol")
        assert (answer.status_code, answer.json()["code"]) == (409, "approval_closed")
        assert "expired" in answer.json()["detail"]
        lab.clock.ahead = 0
    async with lab_of(config_of(dev_files, tmp_path, without=frozenset({"alice", "carol"}))) as lab:
        nobody = await destruction(lab, await new_key(lab, "AES_256", tier=1))
        assert (nobody.status_code, nobody.json()["code"]) == (403, "approval_refused")
        assert "2 approvers may approve this and 3 must" in nobody.json()["detail"]


@pytest.mark.anyio
async def test_who_asked_must_still_be_allowed_when_it_is_done(voting: Lab, directory: Path, tmp_path: Path) -> None:
    key = await new_key(voting, "AES_256")
    request = request_in(await destruction(voting, key))
    assert await signed(voting, request, "alice") == ("open", ["alice"])
    kms, before = voting.node.kms, voting.node.kms.policy
    members = "tenants/health/members.yaml"
    listed = yaml.safe_load((directory / "policy" / members).read_text())["members"]
    for name, kept in (
        ("gone", [m for m in listed if m["id"] != PEOPLE["operator"][0]]),
        ("moved", [m | {"role": "auditor"} if m["id"] == PEOPLE["operator"][0] else m for m in listed]),
    ):
        bundle = tmp_path / name
        shutil.copytree(directory / "policy", bundle)
        (bundle / members).write_text(yaml.safe_dump({"members": kept}))
        try:
            kms.policy = Policy.load(bundle, known=before, sample=20)
            answer = await sign(voting, request, "bob")
            assert (answer.status_code, answer.json()["code"]) == (403, "policy_denied"), name
        finally:
            kms.policy = before
    assert await standing(voting, request) == ("open", ["alice"], 2)
    assert await signed(voting, request, "bob") == ("executed", ["alice", "bob"])


@pytest.mark.anyio
async def test_asking_needs_the_keys_etag_and_is_idempotent_and_a_dry_run_stores_nothing(voting: Lab) -> None:
    key, operator = await new_key(voting, "AES_256"), voting.client("health-operator")
    path = f"/v1/keys/{key}/destroy"
    assert (await operator.post(path, headers=fresh())).json()["code"] == "if_match_required"
    stale = await operator.post(path, headers={**fresh(), "If-Match": '"7"'})
    assert (stale.status_code, stale.json()["code"]) == (412, "etag_mismatch")
    assert (await operator.post(path, headers=await tag(voting, key))).json()["code"] == "idempotency_key_missing"
    before = (await operator.get("/v1/approvals")).json()["items"]
    tried = await operator.post(f"{path}?dry_run=true", headers=await tag(voting, key))
    assert tried.json()["would"] == "deny"
    assert tried.json()["decision"]["code"] == "approval_required"
    assert tried.json()["decision"]["rule"] == "SOV-QUORUM"
    assert (await operator.get("/v1/approvals")).json()["items"] == before
    headers = {**fresh(), **await tag(voting, key)}
    first, again = [await operator.post(path, headers=headers) for _ in range(2)]
    assert (again.status_code, again.json()["id"]) == (202, first.json()["id"])
    assert again.headers["idempotency-replayed"] == "true"
    assert (await operator.delete(f"/v1/keys/{key}")).json()["code"] == "deletion_is_scheduled"


@pytest.mark.anyio
async def test_a_waiting_deletion_is_shortened_and_a_destroyed_key_not_destroyed_again_by_a_quorum(voting: Lab) -> None:
    key, operator = await new_key(voting, "AES_256"), voting.client("health-operator")
    headers = {**fresh(), **await tag(voting, key)}
    await operator.post(f"/v1/keys/{key}/schedule-deletion", json={"wait": "P90D"}, headers=headers)
    request = request_in(await destruction(voting, key))
    assert request.parameters["state"] == "pending_deletion"
    await signed(voting, request, "alice", "bob")
    assert await state(voting, key) == "destroyed"
    again = await destruction(voting, key)
    assert (again.status_code, again.json()["code"]) == (410, "key_destroyed")


@pytest.mark.anyio
async def test_a_quorum_widens_who_reaches_a_key_and_lowers_its_tier(voting: Lab) -> None:
    key, far = await new_key(voting, "AES_256", tier=1), voting.client("health-eu-fr-1")
    use = (f"/v1/keys/{key}/encrypt", {"plaintext": B64})
    refused = (await far.post(use[0], json=use[1])).json()
    assert refused["code"] == "region_not_allowed"
    request = request_in(await bounds(voting, key, tier=2, reach=["eu-de-1", "FR"], purposes=["default", "billing"]))
    assert request.parameters["from"] == {"tier": 1, "reach": ["eu-de-1"], "purposes": ["default"]}
    assert request.parameters["to"] == {"tier": 2, "reach": ["eu-de-1", "eu-fr-1"], "purposes": ["default", "billing"]}
    assert await signed(voting, request, "alice", "bob") == ("open", ["alice", "bob"])
    assert (await far.post(use[0], json=use[1])).json()["code"] == "region_not_allowed"
    assert (await signed(voting, request, "carol"))[0] == "executed"
    shown = (await voting.client("health-operator").get(f"/v1/keys/{key}")).json()
    assert (shown["tier"], shown["reach"], shown["purposes"]) == (2, ["eu-de-1", "eu-fr-1"], ["default", "billing"])
    assert (await far.post(use[0], json={**use[1], "purpose": "billing"})).status_code == 200
    voting.node.kms.keystore.poll()
    assert (await far.post(use[0], json={**use[1], "purpose": "billing"})).status_code == 200
    used_id = voting.node.kms.search.records(key=key, op="encrypt", out="ok")[0].record["id"]
    # What was decided under other bounds is explained by those, after one change of them and after two.
    auditor, decision = voting.client("health-auditor"), f"/v1/policy/decisions/{refused['decision_id']}"
    told = (await auditor.get(decision)).json()
    assert (told["request"]["resource"]["reach"], told["request"]["resource"]["tier"]) == (["eu-de-1"], 1)
    # Now that it is tier 2, two suffice.
    narrower = request_in(await bounds(voting, key, reach=["eu-de-1"]))
    assert await signed(voting, narrower, "alice", "bob") == ("executed", ["alice", "bob"])
    late = (await far.post(use[0], json={**use[1], "purpose": "billing"})).json()
    assert late["code"] == "region_not_allowed"
    for name, tier, purposes in (
        (refused["decision_id"], 1, ["default"]),
        (used_id, 2, ["default", "billing"]),
        (late["decision_id"], 2, ["default", "billing"]),
    ):
        made = (await auditor.get(f"/v1/policy/decisions/{name}")).json()["request"]["resource"]
        assert (made["tier"], made["purposes"]) == (tier, purposes), name
    assert (await auditor.get(decision)).json()["request"] == told["request"]


@pytest.mark.anyio
async def test_a_fence_is_raised_by_one_operator_and_lowered_by_a_quorum(voting: Lab) -> None:
    key, workload = await new_key(voting, "AES_256", tier=1), voting.client("health-eu-de-1")
    operator, path = voting.client("health-operator"), f"/v1/keys/{key}"
    old = (await workload.post(f"{path}/encrypt", json={"plaintext": B64})).json()["ciphertext"]
    await operator.post(f"{path}/rotate", headers=fresh())

    async def patched(**body: object) -> httpx.Response:
        return await operator.patch(path, json=body, headers=await tag(voting, key))

    async def opened() -> str | None:
        found: str | None = (await workload.post("/v1/decrypt", json={"ciphertext": old})).json().get("code")
        return found

    assert (await patched(min_decrypt_version="latest", min_encrypt_version=2)).status_code == 200
    assert await opened() == "version_fenced"
    before = (await operator.get(path)).json()
    for body in ({"min_decrypt_version": 1}, {"min_decrypt_version": "latest-1"}, {"min_encrypt_version": 1}):
        answer = await patched(**body, description="lowered")
        assert (answer.status_code, answer.json()["code"]) == (422, "validation_failed"), body
        assert [(e["pointer"], e["code"]) for e in answer.json()["errors"]] == [(f"/{next(iter(body))}", "lowers")]
    assert (await operator.get(path)).json() == before
    assert (await patched(min_decrypt_version=2, description="same")).status_code == 200
    # Who administers does not ask for it, and what is asked for is exactly one number.
    assert (await bounds(voting, key, who="health-operator", min_decrypt_version=1)).status_code == 403
    for wrong in (0, 3, "latest-1"):
        assert (await bounds(voting, key, min_decrypt_version=wrong)).status_code == 422, wrong
    request = request_in(await bounds(voting, key, min_decrypt_version=1))
    assert (request.parameters["from"], request.parameters["to"]) == (
        {"min_decrypt_version": 2},
        {"min_decrypt_version": 1},
    )
    assert await signed(voting, request, "alice", "bob") == ("open", ["alice", "bob"])
    assert await opened() == "version_fenced"
    assert (await signed(voting, request, "carol"))[0] == "executed"
    assert await opened() is None
    after = (await operator.get(path)).json()
    assert (after["min_decrypt_version"], after["min_encrypt_version"]) == (1, 2)
    # A decision from before is explained as before: fences are no fact of a policy.
    used = voting.node.kms.search.records(key=key, op="encrypt", out="ok")[0].record["id"]
    told = await voting.client("health-auditor").get(f"/v1/policy/decisions/{used}")
    assert told.status_code == 200, told.text
    # A key that was changed since is asked for anew.
    late = request_in(await bounds(voting, key, min_encrypt_version=1))
    assert (await patched(description="changed")).status_code == 200
    assert (await sign(voting, late, "alice")).json()["code"] == "approval_closed"


@pytest.mark.anyio
async def test_bounds_that_no_key_may_have_are_refused_before_anybody_signs(voting: Lab) -> None:
    key = await new_key(voting, "AES_256", residency=["eu-de-1", "eu-de-2"])
    for body, status, code, where in (
        ({"residency": ["DE", "eu-fr-1"]}, 422, "validation_failed", "/residency"),
        ({"residency": ["eu-de-2"]}, 409, "tier_not_met", "home is part of residency"),
        ({"failover": ["eu-fr-1"]}, 409, "tier_not_met", "failover is part of residency"),
        ({"reach": ["atlantis"]}, 422, "validation_failed", "/reach"),
        ({"purposes": ["a", "a"]}, 422, "validation_failed", "/purposes"),
        ({"purposes": []}, 422, "validation_failed", "/purposes"),
        ({"tier": 4}, 422, "validation_failed", "/tier"),
        ({"tier": 2}, 422, "validation_failed", "unchanged"),
        ({}, 422, "validation_failed", "unchanged"),
        ({"home": "eu-de-2"}, 422, "validation_failed", ""),
        ({"approvals": 2, "tier": 3}, 422, "validation_failed", ""),
    ):
        answer = await bounds(voting, key, **body)
        assert (answer.status_code, answer.json()["code"]) == (status, code), (body, answer.text)
        assert where in answer.text, body


@pytest.mark.anyio
async def test_on_postgresql_two_nodes_execute_once_and_a_restart_forgets_nothing(
    dev_files: Files, postgres: Cluster, tmp_path: Path
) -> None:
    files = config_of(dev_files, tmp_path, url=postgres.fresh("requests"))
    node = structs.replace(files.config.node, name="n1")
    beside = dataclasses.replace(files, config=structs.replace(files.config, node=node))
    async with lab_of(files) as lab, lab_of(beside) as other:
        keys = [await new_key(lab, "AES_256", tier=1) for _ in range(2)]
        request, kept = [request_in(await destruction(lab, key)) for key in keys]
        answers = await asyncio.gather(sign(lab, request, "alice"), sign(other, request, "bob"))
        assert [a.status_code for a in answers] == [200, 200]
        assert (await standing(other, request))[1] == ["alice", "bob"]
        last = await asyncio.gather(
            sign(lab, request, "carol"), sign(other, request, "carol"), sign(other, request, "twin")
        )
        assert [a.status_code for a in last].count(200) == 1, [a.text for a in last]
        assert {a.json()["code"] for a in last if a.status_code != 200} == {"approval_closed"}
        lab.node.kms.keystore.poll()
        assert await state(lab, keys[0]) == "destroyed"
        assert await signed(other, kept, "alice", "bob") == ("open", ["alice", "bob"])
    async with lab_of(files) as again:
        assert await state(again, keys[0]) == "destroyed"
        assert await signed(again, kept, "carol") == ("executed", ["alice", "bob", "carol"])
        assert await state(again, keys[1]) == "destroyed"
