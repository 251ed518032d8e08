"""Imports through the API: the way in, two tenants, tokens, roles, expiry, records (O7, A-03)."""

from __future__ import annotations

import asyncio
import base64
import os
import uuid
from datetime import datetime
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from harness import Files, Lab, lab_of, new_key, shows
from service.protocols import wire
from vectors import wrap_import

B64 = base64.b64encode(b"hello").decode()
HPKE = {"wrapping": wrap_import.HPKE_NAME}  # its wrapping keys cost nothing to make


def fresh() -> dict[str, str]:
    return {"Idempotency-Key": uuid.uuid4().hex}


async def parameters(lab: Lab, key: str, body: dict[str, Any] = HPKE, tenant: str = "health") -> Any:
    answer = await lab.client(f"{tenant}-operator").post(f"/v1/keys/{key}/import-parameters", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def import_body(made: Any, material: bytes, *, spec: str = "AES_256", tenant: str = "health") -> dict[str, Any]:
    public = base64.b64decode(made["wrapping_public_key"])
    end = int(datetime.fromisoformat(made["expires_at"]).timestamp())
    info = wrap_import.info(tenant, uuid.UUID(made["key_id"]).bytes, spec, end)
    wrapped = wrap_import.wrap(made["wrapping"], public, material, info=info)
    return {
        "import_token": made["import_token"],
        "wrapped_key": base64.b64encode(wrapped).decode(),
        "key_check_value": wrap_import.check_value(material),
    }


async def send(lab: Lab, key: str, body: dict[str, Any], *, tenant: str = "health", **headers: str) -> Any:
    return await lab.client(f"{tenant}-operator").post(
        f"/v1/keys/{key}/import", json=body, headers={**fresh(), **headers}
    )


def why(answer: Any) -> tuple[int, str, str]:
    shown = answer.json()["errors"][0]
    return answer.status_code, shown["pointer"], shown["code"]


@pytest.mark.anyio
async def test_O7_a_key_waits_is_imported_once_and_works(lab: Lab) -> None:
    operator, workload = lab.client("health-operator"), lab.client("health-eu-de-1")
    key = await new_key(lab, "AES_256", origin="external")
    waiting = (await operator.get(f"/v1/keys/{key}")).json()
    assert (waiting["state"], waiting["origin"], waiting["latest_version"]) == ("pending_import", "external", None)
    assert waiting["versions"] == []
    early = await workload.post(f"/v1/keys/{key}/encrypt", json={"plaintext": B64})
    assert (early.status_code, early.json()["code"], early.json()["state"]) == (
        409,
        "key_state_invalid",
        "pending_import",
    )
    material = os.urandom(32)
    made = await parameters(lab, key)
    assert (made["import_path"], made["wrapping_key_spec"]) == ("software", None)
    body = import_body(made, material)
    headers = fresh()
    first = await send(lab, key, body, **headers)
    assert first.status_code == 200, first.text
    assert (first.json()["state"], first.json()["suite"]) == ("enabled", "0x0005")
    assert first.json()["versions"][0]["import_path"] == "software"
    again = await send(lab, key, body, **headers)
    assert (again.status_code, again.headers["idempotency-replayed"]) == (200, "true")
    assert why(await send(lab, key, body)) == (422, "/import_token", "used")
    sealed = await workload.post(f"/v1/keys/{key}/encrypt", json={"plaintext": B64})
    assert sealed.json()["suite"] == "0x0005"
    batch = {"items": [{"key": key, "plaintext": B64}] * 2}
    results = (await workload.post("/v1/batch/encrypt", json=batch)).json()["results"]
    assert {r["result"]["suite"] for r in results} == {"0x0006"}
    for text in (sealed.json()["ciphertext"], results[1]["result"]["ciphertext"]):
        assert (await workload.post("/v1/decrypt", json={"ciphertext": text})).json()["plaintext"] == B64
    rotated = await operator.post(f"/v1/keys/{key}/rotate", headers=fresh())
    assert why(rotated) == (422, "", "not_for_imported")
    mac = await workload.post(f"/v1/keys/{key}/mac", json={"message": B64, "algorithm": "HMAC_SHA_256"})
    assert mac.json()["code"] == "key_usage_invalid"


@pytest.mark.anyio
async def test_A_03_another_tenant_can_neither_replace_a_key_nor_use_its_token(lab: Lab) -> None:
    key = await new_key(lab, "AES_256", origin="external")
    theirs = await new_key(lab, "AES_256", tenant="defence", origin="external")
    made = await parameters(lab, key)
    body = import_body(made, os.urandom(32))
    answer = await send(lab, key, body, tenant="defence")
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    asked = await lab.client("defence-operator").post(f"/v1/keys/{key}/import-parameters", json=HPKE)
    assert (asked.status_code, asked.json()["code"]) == (404, "not_found")
    assert why(await send(lab, theirs, body, tenant="defence")) == (422, "/import_token", "invalid")
    own = await new_key(lab, "AES_256")
    assert why(await send(lab, own, body)) == (422, "", "not_external")
    assert (await send(lab, key, body)).status_code == 200
    before = (await lab.client("health-operator").get(f"/v1/keys/{key}")).json()
    replaced = await send(lab, key, import_body(made, os.urandom(32)), tenant="defence")
    assert replaced.status_code == 404
    assert (await lab.client("health-operator").get(f"/v1/keys/{key}")).json() == before


@pytest.mark.anyio
async def test_only_operators_import(lab: Lab) -> None:
    key = await new_key(lab, "AES_256", origin="external")
    body = import_body(await parameters(lab, key), os.urandom(32))
    for name in ("health-eu-de-1", "health-officer", "health-custodian", "health-auditor"):
        client = lab.client(name)
        for path, sent in (("import-parameters", HPKE), ("import", body)):
            answer = await client.post(f"/v1/keys/{key}/{path}", json=sent, headers=fresh())
            assert (answer.status_code, answer.json()["code"]) == (403, "policy_denied"), name


@pytest.mark.anyio
async def test_of_two_imports_at_once_one_wins(lab: Lab) -> None:
    key = await new_key(lab, "AES_256", origin="external")
    body = import_body(await parameters(lab, key), os.urandom(32))
    answers = await asyncio.gather(*(send(lab, key, body) for _ in range(4)))
    assert sorted(a.status_code for a in answers) == [200, 422, 422, 422]
    assert {why(a)[1:] for a in answers if a.status_code == 422} <= {("/import_token", "used")}
    assert (await lab.client("health-operator").get(f"/v1/keys/{key}")).json()["latest_version"] == 1


@pytest.mark.anyio
async def test_a_token_outlives_a_restart(lab: Lab, dev_files: Files) -> None:
    key = await new_key(lab, "AES_256", origin="external")
    body = import_body(await parameters(lab, key), os.urandom(32))
    async with lab_of(dev_files) as restarted:
        answer = await send(restarted, key, body)
        assert answer.status_code == 200, answer.text
        assert why(await send(restarted, key, body))[1:] == ("/import_token", "used")


@pytest.mark.anyio
async def test_refusals_name_the_field_and_never_a_value(lab: Lab) -> None:
    key = await new_key(lab, "AES_256", origin="external")
    made = await parameters(lab, key)
    body = import_body(made, os.urandom(32))
    for change, answer in (
        ({"wrapped_key": base64.b64encode(os.urandom(1_200)).decode()}, (422, "/wrapped_key", "not_openable")),
        ({"key_check_value": "0" * 16}, (422, "/key_check_value", "check_value_mismatch")),
        (import_body(made, bytes(32)), (422, "/wrapped_key", "weak_material")),
        (import_body(made, os.urandom(31)), (422, "/wrapped_key", "wrong_length")),
        ({"import_token": made["import_token"][:-1] + "_"}, (422, "/import_token", "invalid")),
        ({"expires_at": "2020-01-01T00:00:00Z"}, (422, "/expires_at", "in_the_past")),
        ({"public_key": B64}, (422, "/public_key", "not_for_spec")),
        ({"expires_at": "2020-13-01T00:00:00Z"}, (422, "/expires_at", "invalid_time")),
    ):
        refused = await send(lab, key, {**body, **change})
        assert why(refused) == answer, refused.text
        assert made["import_token"] not in refused.text
    assert (await send(lab, key, body)).status_code == 200
    v15 = {"wrapping": "RSAES_PKCS1_V1_5"}
    refused = await lab.client("health-operator").post(f"/v1/keys/{key}/import-parameters", json=v15)
    assert why(refused)[:2] == (422, "/wrapping")


@pytest.mark.anyio
async def test_a_private_key_is_imported_inside_the_token_and_signs(lab: Lab) -> None:
    pair = ec.generate_private_key(ec.SECP256R1())
    key = await new_key(lab, "EC_P256", origin="external")
    made = await parameters(lab, key, {"wrapping": "RSA_AES_KEY_WRAP_SHA_1"})
    assert (made["import_path"], made["wrapping_key_spec"]) == ("hsm", "RSA_3072")
    body = import_body(made, wrap_import.pkcs8(pair), spec="EC_P256")
    spki = wrap_import.spki(pair)
    body |= {"key_check_value": wrap_import.public_check_value(spki), "public_key": base64.b64encode(spki).decode()}
    answer = await send(lab, key, body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["versions"][0]["import_path"] == "hsm"
    workload = lab.client("health-eu-de-1")
    asked = {"message": B64, "algorithm": "ECDSA_SHA_256"}
    signed = (await workload.post(f"/v1/keys/{key}/sign", json=asked)).json()["signature"]
    from cryptography.hazmat.primitives import hashes

    pair.public_key().verify(base64.b64decode(signed), b"hello", ec.ECDSA(hashes.SHA256()))


@pytest.mark.anyio
async def test_O7_expiry_stops_use_at_once_and_disables_with_a_record(lab: Lab) -> None:
    operator, workload = lab.client("health-operator"), lab.client("health-eu-de-1")
    key = await new_key(lab, "AES_256", origin="external")
    body = import_body(await parameters(lab, key), os.urandom(32))
    end = lab.clock() + 3_600_000_000
    made = await send(lab, key, {**body, "expires_at": wire.moment(end)})
    assert made.json()["versions"][0]["expires_at"] == wire.moment(end)
    sealed = (await workload.post(f"/v1/keys/{key}/encrypt", json={"plaintext": B64})).json()["ciphertext"]
    lab.clock.ahead += 3_700 * 1_000_000
    try:
        for path, sent in ((f"/v1/keys/{key}/encrypt", {"plaintext": B64}), ("/v1/decrypt", {"ciphertext": sealed})):
            refused = await workload.post(path, json=sent)
            assert (refused.status_code, refused.json()["code"], refused.json()["state"]) == (
                409,
                "key_state_invalid",
                "disabled",
            )
        assert (await shows(operator, key, state="disabled"))["id"] == key
        seen = (await lab.client("health-auditor").get(f"/v1/audit/records?key={key}&op=disable_key")).json()["items"]
        outcome = next(i["record"] for i in seen if i["record"]["kind"] == "outcome")
        assert (outcome["out"], outcome["reason"], outcome["authn"]) == ("ok", "material-expired", "internal")
    finally:
        lab.clock.ahead = 0


@pytest.mark.anyio
async def test_imports_are_intents_and_outcomes_without_a_secret(lab: Lab) -> None:
    key = await new_key(lab, "AES_256", origin="external")
    made = await parameters(lab, key)
    body = import_body(made, os.urandom(32))
    bad = await send(lab, key, {**body, "key_check_value": "0" * 16})
    assert bad.status_code == 422
    assert (await send(lab, key, body)).status_code == 200
    auditor = lab.client("health-auditor")
    answer = await auditor.get(f"/v1/audit/records?key={key}")
    records = [i["record"] for i in answer.json()["items"]]
    shown = [(r["op"], r["kind"], r["out"]) for r in records if r["op"].startswith("import")]
    assert shown == [
        ("import_key", "outcome", "ok"),
        ("import_key", "intent", "ok"),
        ("import_key", "outcome", "failed"),
        ("import_key", "intent", "ok"),
        ("import_parameters", "outcome", "ok"),
        ("import_parameters", "intent", "ok"),
    ]
    assert all(v not in answer.text for v in (made["import_token"], body["wrapped_key"], body["key_check_value"]))
    assert next(r for r in records if r["op"] == "import_parameters")["alg"] == wrap_import.HPKE_NAME
