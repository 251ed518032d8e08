"""Exceptions through the API: asked by an officer, signed by two with the data-protection officer, over by themselves."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from msgspec import structs

from databases import behind
from harness import Files, Lab, lab_of, new_key, officer, until, with_database
from postgres import Cluster
from service.approvals import Asked, approve
from service.config import ApprovalsSection, ApproverSection
from service.dev import domain
from service.exceptions import OFFICER

B64 = base64.b64encode(b"hello").decode()
ABROAD = "health-eu-fr-1"
DAY = 86_400
REQUESTER = f"mtls:{domain('eu-de-1')}:/health/officer/health-officer"


def signed_by(files: Files, directory: Path) -> Files:
    """A node of its own whose approvers are: dpo, two more, one of them twice, and the officer who asks (a DPO too)."""
    made = with_database(files, directory)
    people = {"dpo": (OFFICER,), "alice": (), "bob": (), "health-officer": (OFFICER,)}
    keys = {name: officer(directory, name)[1] for name in people}
    approvers = [
        ApproverSection(n, keys[n], (REQUESTER,) if n == "health-officer" else (f"mtls:x:/{n}",), (), groups)
        for n, groups in people.items()
    ]
    approvers.append(ApproverSection("alice-again", keys["alice"], ("mtls:x:/alice-again",)))
    config = structs.replace(made.config, approvals=ApprovalsSection(approver=tuple(approvers)))
    return dataclasses.replace(made, config=config)


@pytest.fixture(scope="module")
async def excepting(dev_files: Files, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    async with lab_of(signed_by(dev_files, tmp_path_factory.mktemp("excepting"))) as made:
        yield made


def after(seconds: float) -> str:
    return datetime.fromtimestamp(time.time() + seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def fresh() -> dict[str, str]:
    return {"Idempotency-Key": uuid.uuid4().hex}


async def ask(lab: Lab, *keys: str, who: str = "health-officer", days: float = 20, **body: Any) -> httpx.Response:
    wanted = {
        "keys": list(keys),
        "kind": "reach",
        "places": ["FR"],
        "purpose": "default",
        "legal_basis": "eu-law",
        "legal_ref": "Regulation (EU) 2016/679, Article 49",
        "not_after": after(days * DAY - 30),
        "not_before": "begun",
        **body,
    }
    if wanted["not_before"] == "begun":  # long enough ago for a clock that nobody synchronises
        wanted["not_before"] = after(-60)
    return await lab.client(who).post("/v1/exceptions", json=wanted, headers=fresh())


async def asked(lab: Lab, *keys: str, **body: Any) -> Asked:
    answer = await ask(lab, *keys, **body)
    assert answer.status_code == 202, answer.text
    made = Asked.of(json.dumps(answer.json()["request"]))
    assert made.digest() == answer.json()["digest"]
    return made


async def sign(lab: Lab, request: Asked, name: str) -> httpx.Response:
    key = keys_of(lab) / f"{name.removesuffix('-again')}.key"
    made = approve(request.kind, request.digest(), name=name, key_file=key)
    body = {"approver": name, "signature": made.signature.hex()}
    return await lab.client("health-custodian").post(f"/v1/approvals/{request.id}/signatures", json=body)


def keys_of(lab: Lab) -> Path:
    return lab.files.config.approvals.approver[0].public_key.parent


async def excepted(lab: Lab, *keys: str, **body: Any) -> str:
    """The id of an exception in force."""
    request = await asked(lab, *keys, **body)
    assert (await sign(lab, request, "alice")).json()["state"] == "open"
    answer = await sign(lab, request, "dpo")
    assert answer.json()["state"] == "executed", answer.text
    return request.id


async def use(lab: Lab, key: str, **body: Any) -> httpx.Response:
    return await lab.client(ABROAD).post(f"/v1/keys/{key}/encrypt", json={"plaintext": B64, **body})


async def refused(lab: Lab, key: str) -> bool:
    answer = await use(lab, key)
    return (answer.status_code, answer.json().get("rule")) == (403, "SOV-CALLER-PLACE")


async def revoke(lab: Lab, exception: str, *, who: str = "health-officer") -> int:
    return (await lab.client(who).delete(f"/v1/exceptions/{exception}")).status_code


# ---- accepted: 1 and 2 -----------------------------------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize(("tier", "days"), [(2, 20), (3, 45)])
async def test_two_people_with_the_data_protection_officer_let_callers_in_and_one_officer_ends_that(
    excepting: Lab, tier: int, days: float
) -> None:
    lab, key = excepting, await new_key(excepting, "AES_256", tier=tier)
    other = await new_key(lab, "AES_256", tier=tier)
    assert await refused(lab, key)
    made = await excepted(lab, key, days=days)
    answer = await use(lab, key)
    assert answer.status_code == 200, answer.text
    record = lab.node.kms.search.records(key=key, op="encrypt", out="ok", limit=1)[0].record
    assert record["exc"] == made
    assert await refused(lab, other)
    # Reach was waived, egress was not.
    ciphertext = answer.json()["ciphertext"]
    out = await lab.client(ABROAD).post("/v1/decrypt", json={"ciphertext": ciphertext})
    assert out.json()["rule"] == "SOV-DESTINATION"
    beside = await excepted(lab, key, days=days, kind="egress")
    assert (await lab.client(ABROAD).post("/v1/decrypt", json={"ciphertext": ciphertext})).status_code == 200
    opened = lab.node.kms.search.records(key=key, op="decrypt", out="ok", limit=1)[0].record
    assert set(opened["exc"].split(".")) == {made[:13], beside[:13]}
    for auditor in ("health-auditor", "health-officer"):
        shown = (await lab.client(auditor).get(f"/v1/exceptions/{made}")).json()
        assert (shown["state"], shown["tier"], sorted(shown["approvals"])) == ("live", tier, ["alice", "dpo"])
    assert Asked.of(json.dumps(shown["request"])).id == made
    told = (await lab.client("health-auditor").get(f"/v1/policy/decisions/{opened['id']}")).json()
    assert told["decision"]["allowed"] is True
    assert {w["id"]: w["lacks"] for w in told["exceptions"]} == {made: [], beside: []}
    metrics = (await lab.client("platform").get("/metrics")).text
    assert f'skms_exceptions_live{{criterion="egress",tier="{tier}"}}' in metrics
    assert 'skms_exception_next_end_seconds{criterion="reach"} Inf' not in metrics
    assert await revoke(lab, made) == 204
    assert await refused(lab, key)
    assert await revoke(lab, made) == 404
    # What was decided under it is told years later too.
    assert (await lab.client("health-auditor").get(f"/v1/policy/decisions/{opened['id']}")).status_code == 200


# ---- refused: 3 to 9 -------------------------------------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("pointer", "tier", "body"),
    [
        ("/keys", 1, {"days": 1}),  # tier 1
        ("/kind", 2, {"kind": "residency"}),
        ("/kind", 2, {"kind": "execution"}),
        ("/not_after", 2, {"days": 45}),
        ("/not_after", 3, {"days": 91}),
        ("/not_after", 2, {"not_after": "2020-01-01T00:00:00Z"}),
        ("/not_after", 2, {"not_before": after(21 * DAY)}),
        ("/not_before", 3, {"not_before": after(100 * DAY), "not_after": after(101 * DAY)}),
        ("/purpose", 2, {"purpose": "billing"}),
        ("/places", 2, {"places": ["atlantis"]}),
        ("/legal_basis", 2, {"legal_basis": "convenience"}),
        ("/legal_ref", 2, {"legal_ref": " "}),
    ],
)
async def test_what_can_never_be_is_refused_before_anybody_is_asked(
    excepting: Lab, pointer: str, tier: int, body: dict[str, Any]
) -> None:
    key = await new_key(excepting, "AES_256", tier=tier)
    answer = await ask(excepting, key, **body)
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, pointer), answer.text


@pytest.mark.anyio
async def test_an_exception_without_an_end_or_with_a_field_nobody_knows_is_refused(excepting: Lab) -> None:
    key = await new_key(excepting, "AES_256")
    assert (await ask(excepting, key, not_after=None)).status_code == 422
    assert (await ask(excepting, key, tier=3)).status_code == 422
    assert (await ask(excepting)).status_code == 422


@pytest.mark.anyio
async def test_one_person_twice_the_requester_and_two_without_the_dpo_are_no_quorum(excepting: Lab) -> None:
    lab, key = excepting, await new_key(excepting, "AES_256")
    request = await asked(lab, key)
    assert (await sign(lab, request, "alice")).json()["missing"] == [OFFICER]
    assert (await sign(lab, request, "alice-again")).json()["code"] == "approval_refused"  # one person twice
    assert (await sign(lab, request, "health-officer")).json()["code"] == "approval_refused"  # who asked, a DPO
    answer = (await sign(lab, request, "bob")).json()
    assert (answer["state"], answer["missing"]) == ("open", [OFFICER])  # two, but no DPO
    assert await refused(lab, key)
    assert (await sign(lab, request, "dpo")).json()["state"] == "executed"
    assert (await use(lab, key)).status_code == 200
    alone = await asked(lab, key)
    assert (await sign(lab, alone, "dpo")).json()["state"] == "open"  # a DPO, and nobody else


@pytest.mark.anyio
async def test_without_a_data_protection_officer_nobody_can_be_asked(dev_files: Files, tmp_path: Path) -> None:
    files = signed_by(dev_files, tmp_path)
    section = files.config.approvals
    without = structs.replace(section, approver=tuple(a for a in section.approver if a.name != "dpo"))
    files = dataclasses.replace(files, config=structs.replace(files.config, approvals=without))
    async with lab_of(files) as lab:
        answer = await ask(lab, await new_key(lab, "AES_256"))
        assert (answer.status_code, answer.json()["code"]) == (403, "approval_refused")
        assert OFFICER in answer.json()["detail"]


@pytest.mark.anyio
async def test_what_was_edited_after_signing_is_not_what_was_signed(excepting: Lab) -> None:
    lab, key, other = excepting, await new_key(excepting, "AES_256"), await new_key(excepting, "AES_256")
    request = await asked(lab, key)
    assert (await sign(lab, request, "alice")).status_code == 200
    edited = dataclasses.replace(request, parameters={**request.parameters, "keys": [other]})
    signature = approve(edited.kind, edited.digest(), name="dpo", key_file=keys_of(lab) / "dpo.key").signature
    body = {"approver": "dpo", "signature": signature.hex()}
    answer = await lab.client("health-custodian").post(f"/v1/approvals/{request.id}/signatures", json=body)
    assert answer.json()["code"] == "approval_refused"
    # In the database too: the row of the request, and that of the exception.
    text = f"UPDATE service_approval SET content = replace(content, '{key}', '{other}') WHERE id = '{request.id}'"
    sql(lab.files, text)
    assert (await sign(lab, request, "dpo")).status_code == 500
    assert await refused(lab, other)
    sql(lab.files, f"DELETE FROM service_approval WHERE id = '{request.id}'")


@pytest.mark.anyio
async def test_who_is_no_officer_or_of_another_tenant_asks_reads_and_revokes_nothing(excepting: Lab) -> None:
    lab, key = excepting, await new_key(excepting, "AES_256")
    made = await excepted(lab, key)
    for who in ("health-operator", "health-custodian", "health-auditor", ABROAD):
        assert (await ask(lab, key, who=who)).status_code == 403, who
        assert await revoke(lab, made, who=who) == 403, who
    assert (await ask(lab, key, who="defence-officer")).status_code == 404
    assert await revoke(lab, made, who="defence-officer") == 404
    assert (await lab.client("defence-auditor").get(f"/v1/exceptions/{made}")).status_code == 404
    assert made not in (await lab.client("defence-officer").get("/v1/exceptions")).text
    assert made in (await lab.client("health-auditor").get("/v1/exceptions")).text
    assert (await ask(lab, key, str(uuid.uuid4()))).status_code == 404
    assert (await use(lab, key)).status_code == 200


@pytest.mark.anyio
async def test_what_changed_while_it_was_signed_is_looked_at_again(excepting: Lab) -> None:
    lab, key = excepting, await new_key(excepting, "AES_256", tier=3)
    request = await asked(lab, key, days=45)
    assert (await sign(lab, request, "alice")).status_code == 200
    etag = (await lab.client("health-officer").get(f"/v1/keys/{key}")).headers["etag"]
    headers = fresh() | {"If-Match": etag}
    answer = await lab.client("health-officer").post(f"/v1/keys/{key}/policy", json={"tier": 2}, headers=headers)
    stricter = Asked.of(json.dumps(answer.json()["request"]))
    for name in ("alice", "bob"):
        assert (await sign(lab, stricter, name)).status_code == 200
    late = await sign(lab, request, "dpo")
    assert (late.status_code, late.json()["code"]) == (409, "approval_closed")
    assert await refused(lab, key)


# ---- live and not live: 10 to 15 ---------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_it_counts_for_its_purpose_and_places_alone(excepting: Lab) -> None:
    lab, key = excepting, await new_key(excepting, "AES_256", purposes=["billing", "research"])
    await excepted(lab, key, purpose="billing")
    assert (await use(lab, key, purpose="billing")).status_code == 200
    assert (await use(lab, key, purpose="research")).json()["rule"] == "SOV-CALLER-PLACE"
    elsewhere = await new_key(lab, "AES_256")
    await excepted(lab, elsewhere, places=["FI"])
    assert await refused(lab, elsewhere)


@pytest.mark.anyio
async def test_it_ends_by_itself_and_has_not_begun_before_its_beginning(excepting: Lab) -> None:
    lab, key, later = excepting, await new_key(excepting, "AES_256"), await new_key(excepting, "AES_256")
    error = lab.node.kms.exceptions.time().error / 1e6
    made = await excepted(lab, key, not_after=after(error + 8))
    ends = time.time() + 8
    future = await excepted(lab, later, not_before=after(3_600))
    assert await refused(lab, later)
    assert (await use(lab, key)).status_code == 200
    while not await refused(lab, key):
        assert time.time() < ends + 5
        await asyncio.sleep(0.1)
    assert time.time() > ends - 6
    shown = {w["id"]: w for w in (await lab.client("health-auditor").get("/v1/exceptions")).json()["items"]}
    assert (shown[made]["state"], shown[made]["revoked_at"], shown[future]["state"]) == ("ended", None, "not_yet")


@pytest.mark.anyio
async def test_a_clock_that_is_a_minute_off_opens_nothing(excepting: Lab) -> None:
    lab, key = excepting, await new_key(excepting, "AES_256")
    await excepted(lab, key)
    request = await asked(lab, key)
    try:
        for ahead in (-60, 60):
            lab.clock.ahead = ahead * 1_000_000
            assert await refused(lab, key), ahead
            assert (await ask(lab, key)).json()["errors"][0]["code"] == "clock_unsure"
            assert (await sign(lab, request, "alice")).json()["code"] == "approval_closed"
    finally:
        lab.clock.ahead = 0
    assert (await use(lab, key)).status_code == 200


# ---- a database owner, several nodes, a restart ------------------------------------------------------------------------


def sql(files: Files, *statements: str) -> None:
    behind(files.config.database.url, *statements)


@pytest.mark.anyio
@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE policy_signed SET content = replace(content, 'eu-fr-1', 'us-mkt-1') WHERE id = '{made}'",
        "UPDATE policy_signed SET ends = ends + 1 WHERE id = '{made}'",
        "UPDATE policy_signed SET revoked_at = NULL WHERE id = '{gone}'",
        "DELETE FROM policy_signed WHERE id = '{gone}'",
        "UPDATE policy_signed SET kind = 'grant' WHERE id = '{gone}'",
        "DELETE FROM policy_signed; DELETE FROM policy_signed_head",
        "DELETE FROM policy_signed WHERE id = '{gone}'; INSERT INTO policy_signed SELECT * FROM old WHERE id = '{gone}'",
        "DELETE FROM policy_signed; INSERT INTO policy_signed SELECT * FROM old; "
        "DELETE FROM policy_signed_head; INSERT INTO policy_signed_head SELECT * FROM old_head",
    ],
)
async def test_A_18_rows_changed_deleted_or_put_back_by_sql_let_nobody_in(
    dev_files: Files, tmp_path: Path, statement: str
) -> None:
    files = signed_by(dev_files, tmp_path)
    async with lab_of(files) as lab:
        key = await new_key(lab, "AES_256")
        made, gone = await excepted(lab, key), await excepted(lab, key)
        sql(files, "CREATE TABLE old AS SELECT * FROM policy_signed")
        sql(files, "CREATE TABLE old_head AS SELECT * FROM policy_signed_head")
        assert await revoke(lab, gone) == 204
        await until(lambda: lab.node.kms.exceptions.epoch == 3, "not read")
        assert (await use(lab, key)).status_code == 200
        sql(files, *statement.format(made=made, gone=gone).split("; "))
        await until(lambda: bool(lab.node.kms.exceptions.damaged), "not noticed")
        assert await refused(lab, key)
        assert (await lab.client("health-auditor").get("/v1/exceptions")).status_code == 500
    async with lab_of(files) as lab:
        assert lab.node.kms.exceptions.damaged
        assert await refused(lab, key)


async def seen(lab: Lab, wanted: Callable[[httpx.Response], bool], key: str) -> float:
    begun = time.monotonic()
    while not wanted(await use(lab, key)):
        assert time.monotonic() < begun + 60
        await asyncio.sleep(0.02)
    return time.monotonic() - begun


@pytest.mark.anyio
async def test_on_postgresql_another_node_obeys_and_a_restart_forgets_nothing(
    dev_files: Files, postgres: Cluster, tmp_path: Path
) -> None:
    first = signed_by(dev_files, tmp_path)
    database = structs.replace(first.config.database, url=postgres.fresh("exceptions"))
    first = dataclasses.replace(first, config=structs.replace(first.config, database=database))
    node = structs.replace(first.config.node, name="n1", region="eu-de-2", state_dir=tmp_path / "n1")
    node.state_dir.mkdir()
    second = dataclasses.replace(first, config=structs.replace(first.config, node=node))
    async with lab_of(first) as lab, lab_of(second) as other:
        key = await new_key(lab, "AES_256", execution=["DE"])
        made = await excepted(lab, key)
        assert (await use(lab, key)).status_code == 200
        took = [await seen(other, lambda a: a.status_code == 200, key)]
        assert await revoke(other, made) == 204
        assert await refused(other, key)
        took.append(await seen(lab, lambda a: a.status_code == 403, key))
        kept = await excepted(other, key)
    assert max(took) <= 5, took  # a second on a machine with nothing else to do
    async with lab_of(first) as again:
        assert set(again.node.kms.exceptions.rows) == {kept}
        assert (await use(again, key)).status_code == 200
