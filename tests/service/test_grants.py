"""Grants through the API: what they open, how they end, and that no database owner makes or revives one."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
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
from harness import Files, Lab, Shifted, lab_of, new_key, until, with_database
from policy.grants import RULE
from postgres import Cluster
from service.dev import domain
from service.timekeeping import UNKNOWN_US, Timekeeper, kernel_error
from service.wiring import wire

B64 = base64.b64encode(b"hello").decode()
WHO = "health-eu-de-1"
OTHER = "health-eu-fr-1"


def strict(files: Files, directory: Path) -> Files:
    """The node with a database and a bundle of its own, in which no rule lets a workload use a key."""
    made = with_database(files, directory)
    file = directory / "policy/tenants/health/00-roles.cedar"
    text = file.read_text()
    start, end = text.index('@id("health.workload-use")'), text.index('@id("health.workload-random")')
    file.write_text(text[:start] + text[end:])
    return made


@pytest.fixture(scope="module")
async def strict_lab(dev_files: Files, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    async with lab_of(strict(dev_files, tmp_path_factory.mktemp("strict"))) as made:
        yield made


async def name_of(lab: Lab, who: str) -> str:
    return str((await lab.client(who).get("/v1/whoami")).json()["id"])


def after(seconds: float) -> str:
    return datetime.fromtimestamp(time.time() + seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


async def ask(
    lab: Lab, key: str, *operations: str, to: str = WHO, who: str = "health-officer", **body: Any
) -> httpx.Response:
    wanted = {"grantee": await name_of(lab, to), "operations": list(operations), "expires_at": after(3_600), **body}
    headers = {"Idempotency-Key": uuid.uuid4().hex}
    return await lab.client(who).post(f"/v1/keys/{key}/grants", json=wanted, headers=headers)


async def grant(lab: Lab, key: str, *operations: str, **body: Any) -> str:
    answer = await ask(lab, key, *operations, **body)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


async def encrypt(lab: Lab, key: str, *, who: str = WHO, **body: Any) -> httpx.Response:
    return await lab.client(who).post(f"/v1/keys/{key}/encrypt", json={"plaintext": B64, **body})


async def revoke(lab: Lab, key: str, grant_id: str, *, who: str = "health-officer") -> int:
    return (await lab.client(who).delete(f"/v1/keys/{key}/grants/{grant_id}")).status_code


# ---- what a grant opens ----------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_one_named_caller_does_what_was_named_with_one_key_until_it_is_revoked(strict_lab: Lab) -> None:
    lab, key = strict_lab, await new_key(strict_lab, "AES_256", reach=["DE", "FR"])
    other = await new_key(lab, "AES_256")
    assert (await encrypt(lab, key)).json()["rule"] == "DEFAULT"
    made = await grant(lab, key, "encrypt")
    answer = await encrypt(lab, key)
    assert answer.status_code == 200, answer.text
    (record,) = [f.record for f in lab.node.kms.search.records(key=key, op="encrypt", out="ok", limit=1)]
    assert (record["rule"], record["grant"]) == ([f"{RULE}/{made}"], made)
    ciphertext = answer.json()["ciphertext"]
    denied = [
        await lab.client(WHO).post("/v1/decrypt", json={"ciphertext": ciphertext}),
        await encrypt(lab, other),
        await encrypt(lab, key, who=OTHER),
        await encrypt(lab, key, who="health-officer"),
    ]
    assert [(a.status_code, a.json()["code"]) for a in denied] == [(403, "policy_denied")] * 4
    assert await revoke(lab, key, made) == 204
    assert (await encrypt(lab, key)).json()["rule"] == "DEFAULT"
    assert await revoke(lab, key, made) == 404
    (shown,) = (await lab.client("health-auditor").get(f"/v1/keys/{key}/grants")).json()["items"]
    assert (shown["id"], shown["state"]) == (made, "revoked")
    ops = [f.record["op"] for f in lab.node.kms.search.records(key=key, limit=50) if f.record.get("grant") == made]
    assert {"create_grant", "encrypt", "revoke_grant"} <= set(ops)


@pytest.mark.anyio
async def test_every_operation_of_each_usage_can_be_granted(strict_lab: Lab) -> None:
    lab, client = strict_lab, strict_lab.client(WHO)
    aes, to, ec, mac = [await new_key(lab, spec) for spec in ("AES_256", "AES_256", "EC_P256", "HMAC_256")]
    for key, operations in (
        (aes, ("encrypt", "decrypt", "generateDataKey", "unwrap", "rewrap", "reEncrypt")),
        (to, ("encrypt",)),
        (ec, ("sign", "verify")),
        (mac, ("mac", "verifyMac")),
    ):
        await grant(lab, key, *operations)
    ciphertext = (await encrypt(lab, aes)).json()["ciphertext"]
    wrapped = (await client.post(f"/v1/keys/{aes}/data-keys", json={})).json()["wrapped_key"]
    signed, maced = {"message": B64, "algorithm": "ECDSA_SHA_256"}, {"message": B64, "algorithm": "HMAC_SHA_256"}
    for path, body in (
        ("/v1/decrypt", {"ciphertext": ciphertext}),
        ("/v1/data-keys/unwrap", {"wrapped_key": wrapped}),
        ("/v1/rewrap", {"ciphertext": ciphertext}),
        ("/v1/rewrap", {"ciphertext": ciphertext, "to_key": to}),
        (f"/v1/keys/{ec}/sign", signed),
        (f"/v1/keys/{ec}/verify", {**signed, "signature": B64}),
        (f"/v1/keys/{mac}/mac", maced),
        (f"/v1/keys/{mac}/verify-mac", {**maced, "mac": B64}),
    ):
        answer = await client.post(path, json=body)
        assert answer.status_code == 200, (path, answer.text)
    # From a key to another one both must be granted.
    bare = await new_key(lab, "AES_256")
    assert (await client.post("/v1/rewrap", json={"ciphertext": ciphertext, "to_key": bare})).status_code == 403


@pytest.mark.anyio
async def test_the_encryption_context_is_a_condition_that_no_rewrap_gets_around(strict_lab: Lab) -> None:
    lab, client = strict_lab, strict_lab.client(WHO)
    key = await new_key(lab, "AES_256")
    await grant(lab, key, "encrypt", "decrypt", "rewrap", context_subset={"tenant": "a"})
    mine, foreign = {"tenant": "a", "row": "7"}, {"tenant": "b"}
    assert (await encrypt(lab, key, context=foreign)).status_code == 403
    ciphertext = (await encrypt(lab, key, context=mine)).json()["ciphertext"]
    body = {"ciphertext": ciphertext, "context": mine}
    assert (await client.post("/v1/decrypt", json=body)).status_code == 200
    assert (await client.post("/v1/rewrap", json={**body, "to_context": foreign})).status_code == 403
    assert (await client.post("/v1/rewrap", json={**body, "to_context": {"tenant": "a"}})).status_code == 200
    exact = await new_key(lab, "AES_256")
    await grant(lab, exact, "encrypt", context_equals={"row": "7"})
    assert (await encrypt(lab, exact, context={"row": "7", "x": "y"})).status_code == 403
    assert (await encrypt(lab, exact, context={"row": "7"})).status_code == 200


@pytest.mark.anyio
async def test_each_item_of_a_batch_has_a_context_of_its_own(strict_lab: Lab) -> None:
    key = await new_key(strict_lab, "AES_256")
    await grant(strict_lab, key, "encrypt", context_subset={"tenant": "a"})
    contexts = ({"tenant": "a"}, {"tenant": "b"}, {"tenant": "a", "row": "7"}, {}, {"tenant": "a"})
    items = [{"key": key, "plaintext": B64, "context": context} for context in contexts]
    answer = await strict_lab.client(WHO).post("/v1/batch/encrypt", json={"items": items})
    assert [r["status"] for r in answer.json()["results"]] == [200, 403, 200, 403, 200]


@pytest.mark.anyio
async def test_it_counts_for_its_purpose_alone(strict_lab: Lab) -> None:
    key = await new_key(strict_lab, "AES_256", purposes=["billing", "research"])
    assert (await ask(strict_lab, key, "encrypt")).json()["errors"][0]["pointer"] == "/purpose"
    await grant(strict_lab, key, "encrypt", purpose="billing")
    assert (await encrypt(strict_lab, key, purpose="billing")).status_code == 200
    assert (await encrypt(strict_lab, key, purpose="research")).status_code == 403


@pytest.mark.anyio
async def test_a_grant_allows_nothing_that_the_charter_forbids(strict_lab: Lab) -> None:
    lab = strict_lab
    key = await new_key(lab, "AES_256")  # reach: eu-de-1
    await grant(lab, key, "encrypt", to=OTHER)
    refused = await encrypt(lab, key, who=OTHER)
    assert (refused.status_code, refused.json()["rule"]) == (403, "SOV-CALLER-PLACE")


@pytest.mark.anyio
async def test_a_frozen_key_stays_frozen_and_its_grants_can_still_be_revoked(strict_lab: Lab) -> None:
    lab, officer = strict_lab, strict_lab.client("health-officer")
    key = await new_key(lab, "AES_256")
    made = await grant(lab, key, "encrypt")
    body = {"scope": {"kind": "key", "value": key}, "reason": {"code": "incident"}}
    answer = await officer.post("/v1/freezes", json=body, headers={"Idempotency-Key": uuid.uuid4().hex})
    assert answer.status_code == 201
    assert (await encrypt(lab, key)).json()["code"] == "frozen"
    assert (await ask(lab, key, "decrypt")).json()["code"] == "frozen"
    assert (await officer.get(f"/v1/keys/{key}/grants")).status_code == 200
    assert await revoke(lab, key, made) == 204


# ---- uses ------------------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_no_more_uses_than_were_granted_singly_at_once_and_in_batches(strict_lab: Lab) -> None:
    lab = strict_lab
    key = await new_key(lab, "AES_256")
    await grant(lab, key, "encrypt", max_uses=3)
    dry = await lab.client(WHO).post(f"/v1/keys/{key}/encrypt?dry_run=true", json={"plaintext": B64})
    assert dry.json()["would"] == "allow"  # and counts nothing
    answers = await asyncio.gather(*(encrypt(lab, key) for _ in range(12)))
    assert sorted(a.status_code for a in answers) == [200] * 3 + [403] * 9
    assert {a.json()["code"] for a in answers if a.status_code == 403} == {"policy_denied"}
    (shown,) = (await lab.client("health-officer").get(f"/v1/keys/{key}/grants")).json()["items"]
    assert (shown["uses"], shown["state"]) == (3, "used_up")
    batched = await new_key(lab, "AES_256")
    await grant(lab, batched, "encrypt", max_uses=3)
    items = [{"key": batched, "plaintext": B64} for _ in range(5)]
    answer = await lab.client(WHO).post("/v1/batch/encrypt", json={"items": items})
    assert [r["status"] for r in answer.json()["results"]] == [200, 200, 200, 403, 403]
    assert answer.headers["x-batch-failed"] == "2"
    # A use that failed for another reason has cost none.
    failing = await new_key(lab, "AES_256")
    await grant(lab, failing, "encrypt", max_uses=1)
    assert (await encrypt(lab, failing, context={"": "x"})).status_code == 422
    assert (await encrypt(lab, failing)).status_code == 200
    assert (await encrypt(lab, failing)).status_code == 403


@pytest.mark.anyio
async def test_where_another_grant_allows_it_no_use_is_counted(strict_lab: Lab) -> None:
    lab, key = strict_lab, await new_key(strict_lab, "AES_256")
    counted = await grant(lab, key, "encrypt", max_uses=1)
    await grant(lab, key, "encrypt")
    assert [(await encrypt(lab, key)).status_code for _ in range(3)] == [200] * 3
    assert lab.node.kms.grants.uses(counted) == 0


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("pointer", "code", "body"),
    [
        ("/expires_at", None, {"expires_at": None}),
        ("/expires_at", "out_of_range", {"expires_at": "2020-01-01T00:00:00.000Z"}),
        ("/expires_at", "out_of_range", {"expires_at": after(366 * 86_400)}),
        ("/expires_at", "invalid_time", {"expires_at": "tomorrow"}),
        ("/operations", "not_allowed", {"operations": ["destroy"]}),
        ("/operations", "not_allowed", {"operations": ["grant"]}),
        ("/operations", "not_allowed", {"operations": ["use"]}),
        ("/operations", "not_allowed", {"operations": ["sign"]}),
        ("/operations", "not_allowed", {"operations": ["encrypt", "encrypt"]}),
        ("/operations", None, {"operations": []}),
        ("/grantee", "not_a_workload", {"grantee": "mtls:eu-de-1.gov.example:/health/x"}),
        ("/grantee", "not_a_workload", {"grantee": f"mtls:{domain('eu-de-1')}:/defence/ns/app"}),
        ("/grantee", "not_a_workload", {"grantee": f"mtls:{domain('eu-de-1')}:/health/officer/health-officer"}),
        ("/grantee", "not_a_workload", {"grantee": "*"}),
        ("/grantee", "not_a_workload", {"grantee": "token:x:abcdefgh"}),
        ("/purpose", "not_allowed", {"purpose": "billing"}),
        ("/max_uses", None, {"max_uses": 0}),
        ("/context_subset", "not_allowed", {"context_equals": {}, "context_subset": {}}),
        ("/context", None, {"context_subset": {"skms:x": "y"}}),
        ("", None, {"tier": 3}),
    ],
)
async def test_bad_input_is_refused_with_its_field(
    strict_lab: Lab, pointer: str, code: str | None, body: dict[str, Any]
) -> None:
    key = await new_key(strict_lab, "AES_256")
    answer = await ask(strict_lab, key, "encrypt", **body)
    assert answer.status_code == 422, answer.text
    error = answer.json()["errors"][0]
    assert error["pointer"].startswith(pointer), error
    assert code in {None, error["code"]}
    assert (await encrypt(strict_lab, key)).status_code == 403


@pytest.mark.anyio
async def test_a_grant_without_an_end_is_refused(strict_lab: Lab) -> None:
    key = await new_key(strict_lab, "AES_256")
    body = {"grantee": await name_of(strict_lab, WHO), "operations": ["encrypt"]}
    headers = {"Idempotency-Key": uuid.uuid4().hex}
    answer = await strict_lab.client("health-officer").post(f"/v1/keys/{key}/grants", json=body, headers=headers)
    assert answer.status_code == 422


@pytest.mark.anyio
async def test_a_key_without_a_context_takes_no_condition_on_it(strict_lab: Lab) -> None:
    key = await new_key(strict_lab, "EC_P256")
    answer = await ask(strict_lab, key, "sign", context_subset={"a": "b"})
    assert answer.json()["errors"][0]["pointer"] == "/context_subset"


@pytest.mark.anyio
async def test_who_is_no_officer_or_of_another_tenant_grants_reads_and_revokes_nothing(strict_lab: Lab) -> None:
    lab = strict_lab
    key = await new_key(lab, "AES_256")
    made = await grant(lab, key, "encrypt")
    people = {"health-operator": 403, "health-custodian": 403, "health-auditor": 403, WHO: 403, "defence-officer": 404}
    for who, status in people.items():
        assert (await ask(lab, key, "decrypt", who=who)).status_code == status, who
        assert await revoke(lab, key, made, who=who) == status, who
        if who != "health-auditor":
            assert (await lab.client(who).get(f"/v1/keys/{key}/grants")).status_code == status, who
    assert (await ask(lab, str(uuid.uuid4()), "decrypt")).status_code == 404
    # A grant is revoked as one of its own key.
    other = await new_key(lab, "AES_256")
    assert await revoke(lab, other, made) == 404
    assert (await encrypt(lab, key)).status_code == 200


@pytest.mark.anyio
async def test_the_same_request_again_makes_one_grant(strict_lab: Lab) -> None:
    lab, key = strict_lab, await new_key(strict_lab, "AES_256")
    body = {"grantee": await name_of(lab, WHO), "operations": ["encrypt"], "expires_at": after(600)}
    headers = {"Idempotency-Key": uuid.uuid4().hex}
    path, officer = f"/v1/keys/{key}/grants", lab.client("health-officer")
    first, second = [await officer.post(path, json=body, headers=headers) for _ in range(2)]
    assert first.json()["id"] == second.json()["id"]
    assert second.headers["location"].endswith(first.json()["id"])
    assert len((await officer.get(path)).json()["items"]) == 1


# ---- its end and the clock -------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_it_ends_by_itself_early_by_the_error_of_the_clock(strict_lab: Lab) -> None:
    lab, key = strict_lab, await new_key(strict_lab, "AES_256")
    error = lab.node.kms.grants.time().error / 1e6
    made = await grant(lab, key, "encrypt", expires_at=after(error + 8))
    ends = time.time() + 8
    assert (await encrypt(lab, key)).status_code == 200
    while (await encrypt(lab, key)).status_code == 200:
        assert time.time() < ends + 5
        await asyncio.sleep(0.1)
    assert time.time() > ends - 6
    (shown,) = (await lab.client("health-officer").get(f"/v1/keys/{key}/grants")).json()["items"]
    assert (shown["id"], shown["state"], shown["revoked_at"]) == (made, "ended", None)


@pytest.mark.anyio
async def test_a_clock_that_is_moved_opens_nothing_not_even_after_a_restart(dev_files: Files, tmp_path: Path) -> None:
    files = strict(dev_files, tmp_path)
    async with lab_of(files) as lab:
        key = await new_key(lab, "AES_256")
        await grant(lab, key, "encrypt")
        assert (await encrypt(lab, key)).status_code == 200
        for ahead in (-3_600, -60, 60):
            lab.clock.ahead = ahead * 1_000_000
            assert (await encrypt(lab, key)).status_code == 403, ahead
            refused = await ask(lab, key, "encrypt")
            assert refused.json()["errors"][0]["code"] == "clock_unsure", ahead
        lab.clock.ahead = 0
        assert (await encrypt(lab, key)).status_code == 200
    back = Shifted(-3_600_000_000)  # as the node starts, so that nothing but its records tells that it was later once
    async with wire(files.config, clock=back) as node:
        again = Lab(node, files, back)
        assert node.kms.grants.rows
        assert (await encrypt(again, key)).json()["rule"] == "DEFAULT"


def test_the_error_of_a_clock_is_the_greatest_of_what_is_known() -> None:
    now, boot, newest = [0], [0.0], [0]
    keeper = Timekeeper(lambda: now[0], lambda: boot[0], recorded=lambda: newest[0], kernel=lambda: 7)
    assert keeper() == (0, 7)
    now[0], boot[0] = 5_000_000, 5.0
    assert keeper() == (5_000_000, 7)
    boot[0] = 8.0
    assert keeper().error == 3_000_000  # moved back
    boot[0] = 1.0
    assert keeper().error == 4_000_000  # moved forward
    boot[0], newest[0] = 5.0, 9_000_000
    assert keeper().error == 4_000_000  # behind what was recorded


def test_the_kernel_says_how_far_off_the_clock_may_be() -> None:
    assert 0 <= kernel_error() <= UNKNOWN_US


# ---- a database owner ------------------------------------------------------------------------------------------------


def sql(lab_or_files: Files, *statements: str) -> list[Any]:
    return [behind(lab_or_files.config.database.url, s) for s in statements]


async def denied(lab: Lab, key: str, *, why: str) -> None:
    """It is noticed within some seconds, and no grant counts then."""
    await until(lambda: why in lab.node.kms.grants.damaged, f"{why!r} was not noticed")
    assert (await encrypt(lab, key)).json()["rule"] == "DEFAULT"


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("statement", "why"),
    [
        ("UPDATE policy_signed SET ends = ends + 86400000000 WHERE id = '{revoked}'", "was changed"),
        ("UPDATE policy_signed SET revoked_at = NULL, revoked_by = '' WHERE id = '{revoked}'", "was changed"),
        (
            "UPDATE policy_signed SET content = replace(content, 'encrypt', 'decrypt') WHERE id = '{live}'",
            "was changed",
        ),
        ("UPDATE policy_signed SET tenant = 'defence' WHERE id = '{live}'", "was changed"),
        ("UPDATE policy_signed SET id = upper(id) WHERE id = '{live}'", "was changed"),
        ("DELETE FROM policy_signed WHERE id = '{revoked}'", "removed, added or put back"),
        ("DELETE FROM policy_signed WHERE id = '{live}'", "removed, added or put back"),
        ("DELETE FROM policy_signed_head", "set back"),
        ("UPDATE policy_signed_head SET epoch = epoch + 1", "removed, added or put back"),
        ("DELETE FROM policy_signed; DELETE FROM policy_signed_head", "set back"),
    ],
)
async def test_A_18_rows_that_sql_changed_are_noticed_while_serving_and_at_a_start(
    dev_files: Files, tmp_path: Path, statement: str, why: str
) -> None:
    files = strict(dev_files, tmp_path)
    async with lab_of(files) as lab:
        key = await new_key(lab, "AES_256")
        live, revoked = await grant(lab, key, "encrypt"), await grant(lab, key, "encrypt", "decrypt")
        assert await revoke(lab, key, revoked) == 204
        assert (await encrypt(lab, key)).status_code == 200
        await until(lambda: lab.node.kms.grants.epoch == 3, "not read")
        sql(files, *statement.format(live=live, revoked=revoked).split("; "))
        await denied(lab, key, why=why)
        assert (await ask(lab, key, "encrypt")).status_code == 500  # nothing is added to what cannot be believed
    async with lab_of(files) as lab:
        assert lab.node.kms.grants.damaged
        assert (await encrypt(lab, key)).json()["rule"] == "DEFAULT"


@pytest.mark.anyio
async def test_A_18_an_old_row_put_back_or_all_of_them_revives_no_grant(
    dev_files: Files, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = strict(dev_files, tmp_path)
    state = Path(files.config.node.state_dir)
    async with lab_of(files) as lab:
        key = await new_key(lab, "AES_256")
        made = await grant(lab, key, "encrypt")
        columns = "kind, id, tenant, content, at, ends, revoked_at, revoked_by, region, mac"
        sql(
            files,
            "CREATE TABLE old AS SELECT * FROM policy_signed",
            "CREATE TABLE old_head AS SELECT * FROM policy_signed_head",
        )
        assert await revoke(lab, key, made) == 204
        await until(lambda: lab.node.kms.grants.epoch == 2, "not read")
        put_back = ("DELETE FROM policy_signed", f"INSERT INTO policy_signed SELECT {columns} FROM old")
        sql(files, *put_back)
        await denied(lab, key, why="put back")
        assert "skms.alarm" in {r.name for r in caplog.records if r.levelname == "CRITICAL"}
        sql(files, "DELETE FROM policy_signed_head", "INSERT INTO policy_signed_head SELECT * FROM old_head")
        await denied(lab, key, why="set back")
    async with lab_of(files) as lab:  # the node remembers, whatever the database says
        assert "set back" in lab.node.kms.grants.damaged
        assert (await encrypt(lab, key)).json()["rule"] == "DEFAULT"
        # Set back on purpose: the operator says so.
        (state / "grant-epoch").unlink()
        await until(lambda: not lab.node.kms.grants.damaged, "not read again")
        assert (await encrypt(lab, key)).status_code == 200


@pytest.mark.anyio
async def test_A_18_uses_set_back_or_missing_give_no_further_use(dev_files: Files, tmp_path: Path) -> None:
    files = strict(dev_files, tmp_path)
    async with lab_of(files) as lab:
        key = await new_key(lab, "AES_256")
        made = await grant(lab, key, "encrypt", max_uses=3)
        sql(files, "CREATE TABLE old AS SELECT * FROM policy_grant_use")
        assert (await encrypt(lab, key)).status_code == 200
        assert sql(files, f"SELECT used FROM policy_grant_use WHERE id = '{made}'") == [[(1,)]]
        for statements in (
            ("UPDATE policy_grant_use SET used = 0",),
            ("DELETE FROM policy_grant_use", "INSERT INTO policy_grant_use SELECT * FROM old"),
            ("DELETE FROM policy_grant_use",),
        ):
            sql(files, *statements)
            assert (await encrypt(lab, key)).json()["code"] == "policy_denied", statements
        withheld = lab.node.kms.search.records(key=key, op="encrypt", out="error", limit=1)[0].record
        assert withheld["why"] == "change_undone"


@pytest.mark.anyio
async def test_grants_that_cannot_be_read_end_with_the_lease(dev_files: Files, tmp_path: Path) -> None:
    files = strict(dev_files, tmp_path)
    async with lab_of(files) as lab:
        key = await new_key(lab, "AES_256")
        await grant(lab, key, "encrypt")
        sql(files, "ALTER TABLE policy_signed_head RENAME TO elsewhere")
        await until(lambda: not lab.node.kms.grants.trusted, "the lease did not end")
        assert (await encrypt(lab, key)).json()["rule"] == "DEFAULT"
        sql(files, "ALTER TABLE elsewhere RENAME TO policy_signed_head")
        await until(lambda: lab.node.kms.grants.trusted, "not read again")
        assert (await encrypt(lab, key)).status_code == 200


# ---- several nodes, restarts, explanations ---------------------------------------------------------------------------


async def seen(lab: Lab, wanted: Callable[[httpx.Response], bool], key: str) -> float:
    begun = time.monotonic()
    while not wanted(await encrypt(lab, key)):
        assert time.monotonic() < begun + 60
        await asyncio.sleep(0.02)
    return time.monotonic() - begun


@pytest.mark.anyio
@pytest.mark.parametrize("backend", ["sqlite", "postgresql"])
async def test_K8_another_node_obeys_within_a_second_and_a_restart_forgets_nothing(
    dev_files: Files, postgres: Cluster, tmp_path: Path, backend: str
) -> None:
    first = strict(dev_files, tmp_path)
    if backend == "postgresql":
        url = structs.replace(first.config.database, url=postgres.fresh("grants"))
        first = dataclasses.replace(first, config=structs.replace(first.config, database=url))
    node = structs.replace(first.config.node, name="n1", region="eu-de-2", state_dir=tmp_path / "n1")
    node.state_dir.mkdir()
    second = dataclasses.replace(first, config=structs.replace(first.config, node=node))
    async with lab_of(first) as lab, lab_of(second) as other:
        key = await new_key(lab, "AES_256", execution=["DE"])
        made = await grant(lab, key, "encrypt")
        assert (await encrypt(lab, key)).status_code == 200  # where it was made, at once
        took = [await seen(other, lambda a: a.status_code == 200, key)]
        assert await revoke(other, key, made) == 204
        assert (await encrypt(other, key)).status_code == 403
        took.append(await seen(lab, lambda a: a.status_code == 403, key))
        # Counted together, and made by both at once.
        ids = await asyncio.gather(*(grant(node, key, "encrypt", max_uses=2) for node in (lab, other)))
        for both in (lab, other):
            await until(lambda n=both: set(ids) <= set(n.node.kms.grants.rows), "not read")  # type: ignore[misc]
        answers = [a for _ in range(4) for a in await asyncio.gather(encrypt(lab, key), encrypt(other, key))]
        shown = (await lab.client("health-auditor").get(f"/v1/keys/{key}/grants")).json()["items"]
        assert [(g["uses"], g["state"]) for g in shown if g["id"] in ids] == [(2, "used_up")] * 2
        kept = await grant(lab, key, "decrypt")
    assert sorted(a.status_code for a in answers) == [200] * 4 + [403] * 4
    assert max(took) <= 5, took  # a second on a machine with nothing else to do
    async with lab_of(second) as again:
        assert kept in again.node.kms.grants.rows
        assert made not in again.node.kms.grants.rows
        assert (await encrypt(again, key)).status_code == 403


@pytest.mark.anyio
async def test_an_explanation_shows_that_a_grant_decided_and_why_others_did_not(strict_lab: Lab) -> None:
    lab, officer = strict_lab, strict_lab.client("health-officer")
    key = await new_key(lab, "AES_256")
    made, beside = await grant(lab, key, "encrypt"), await grant(lab, key, "decrypt")
    assert (await encrypt(lab, key)).status_code == 200
    record = lab.node.kms.search.records(key=key, op="encrypt", out="ok", limit=1)[0].record
    told = (await officer.get(f"/v1/policy/decisions/{record['id']}")).json()
    assert told["decision"]["rules"] == [f"{RULE}/{made}"]
    grants = {g["id"]: g for g in told["grants"]}
    assert (grants[made]["decided"], grants[made]["lacks"]) == (True, [])
    assert (grants[beside]["decided"], grants[beside]["lacks"]) == (False, ["another operation"])
    # Also when it is long revoked, and the administration of the grant itself.
    assert await revoke(lab, key, made) == 204
    assert (await officer.get(f"/v1/policy/decisions/{record['id']}")).status_code == 200
    for op in ("create_grant", "revoke_grant"):
        administered = lab.node.kms.search.records(key=key, op=op, limit=1)[0].record
        answer = await officer.get(f"/v1/policy/decisions/{administered.get('intent', administered['id'])}")
        assert answer.status_code == 200, answer.text


@pytest.mark.anyio
async def test_the_bundle_that_ships_still_decides_by_its_rules(lab: Lab) -> None:
    key = await new_key(lab, "AES_256")
    await grant(lab, key, "encrypt", max_uses=1)
    assert [(await encrypt(lab, key)).status_code for _ in range(3)] == [200] * 3
    record = lab.node.kms.search.records(key=key, op="encrypt", out="ok", limit=1)[0].record
    assert record["rule"] == ["health.workload-use"]
