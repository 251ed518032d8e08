"""Keys through the API: every kind, life cycle, versions, aliases, paging, idempotency, ETags, dry runs, batches."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import uuid
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

from harness import Lab, new_key, shows

B64 = base64.b64encode(b"hello").decode()


def fresh() -> dict[str, str]:
    return {"Idempotency-Key": uuid.uuid4().hex}


async def etag(lab: Lab, key: str) -> dict[str, str]:
    answer = await lab.client("health-operator").get(f"/v1/keys/{key}")
    return {"If-Match": answer.headers["etag"]}


@pytest.mark.anyio
async def test_a_key_has_the_fields_of_the_api_and_a_receipt(lab: Lab) -> None:
    body = {
        "spec": "AES_256",
        "usage": "encrypt",
        "tier": 2,
        "home": "eu-de-1",
        "residency": ["eu-de-1"],
        "purposes": ["billing"],
        "alias": "payments-fields",
        "rotation": {"max_age": "P90D", "max_uses": 1_000_000_000},
        "suite": "0x0001",
        "tags": {"team": "billing"},
    }
    answer = await lab.client("health-operator").post("/v1/keys", json=body, headers=fresh())
    assert answer.status_code == 201, answer.text
    key = answer.json()
    assert answer.headers["location"] == f"/v1/keys/{key['id']}"
    assert re.fullmatch(r'"\d+"', answer.headers["etag"])
    assert re.fullmatch(r'log="[a-z0-9./-]+", seq=\d+, leaf=:[A-Za-z0-9+/]{43}=:', answer.headers["audit-receipt"])
    assert re.fullmatch(
        r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", answer.headers["x-request-id"]
    )
    assert answer.headers["cache-control"] == "no-store"
    assert (key["state"], key["latest_version"], key["origin"], key["protection"]) == ("enabled", 1, "hsm", "hsm")
    assert key["rotation"] == {"max_age": "P90D", "max_uses": 1_000_000_000}
    assert key["tier_status"] == {"met": True, "missing": []}
    assert [v["state"] for v in key["versions"]] == ["enabled"]
    by_alias = await lab.client("health-operator").get("/v1/keys/alias/payments-fields")
    assert by_alias.json()["id"] == key["id"]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("spec", "algorithm", "form"),
    [
        *(("EC_P256", "ECDSA_SHA_256", f) for f in ("der", "raw")),
        ("EC_P384", "ECDSA_SHA_384", "der"),
        ("RSA_3072", "RSA_PSS_SHA_256", "der"),
        ("RSA_3072", "RSA_PKCS1_SHA_512", "der"),
    ],
)
async def test_W8_signatures_verify_with_another_implementation(lab: Lab, spec: str, algorithm: str, form: str) -> None:
    key = await new_key(lab, spec)
    client = lab.client("health-eu-de-1")
    body: dict[str, Any] = {"message": B64, "algorithm": algorithm, "format": form}
    answer = await client.post(f"/v1/keys/{key}/sign", json=body)
    assert answer.status_code == 200, answer.text
    signature = base64.b64decode(answer.json()["signature"])
    pem = await client.get(f"/v1/keys/{key}/public-key")
    public = serialization.load_pem_public_key(pem.content)
    match public:
        case ec.EllipticCurvePublicKey():
            from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

            if form == "raw":
                half = len(signature) // 2
                signature = encode_dss_signature(
                    int.from_bytes(signature[:half], "big"), int.from_bytes(signature[half:], "big")
                )
            digest = hashes.SHA256() if algorithm.endswith("256") else hashes.SHA384()
            public.verify(signature, b"hello", ec.ECDSA(digest))
        case rsa.RSAPublicKey():
            if "PSS" in algorithm:
                scheme: Any = padding.PSS(padding.MGF1(hashes.SHA256()), 32)
                public.verify(signature, b"hello", scheme, hashes.SHA256())
            else:
                public.verify(signature, b"hello", padding.PKCS1v15(), hashes.SHA512())
        case _:
            raise AssertionError(type(public))
    checked = await client.post(f"/v1/keys/{key}/verify", json={**body, "signature": answer.json()["signature"]})
    assert checked.json()["valid"] is True
    other = {**body, "message": base64.b64encode(b"hellp").decode(), "signature": answer.json()["signature"]}
    assert (await client.post(f"/v1/keys/{key}/verify", json=other)).json()["valid"] is False
    jwk = await client.get(f"/v1/keys/{key}/public-key", headers={"Accept": "application/jwk+json"})
    assert jwk.json()["kty"] in {"EC", "RSA"}


@pytest.mark.anyio
async def test_what_the_token_lacks_is_refused_at_creation_with_its_reason(lab: Lab) -> None:
    """SoftHSM 2.6.1 signs with Ed25519 token keys but cannot wrap such a key."""
    body = {"spec": "ED25519", "tier": 2, "home": "eu-de-1"}
    answer = await lab.client("health-operator").post("/v1/keys", json=body, headers=fresh())
    assert (answer.status_code, answer.json()["code"]) == (422, "algorithm_not_supported_by_hsm")
    assert "ED25519" in answer.json()["detail"]


@pytest.mark.anyio
async def test_a_digest_must_have_its_hashs_length(lab: Lab) -> None:
    key = await new_key(lab, "EC_P256")
    client = lab.client("health-eu-de-1")
    right = base64.b64encode(hashlib.sha256(b"hello").digest()).decode()
    ok = await client.post(f"/v1/keys/{key}/sign", json={"digest": right, "algorithm": "ECDSA_SHA_256"})
    assert ok.status_code == 200
    wrong = await client.post(f"/v1/keys/{key}/sign", json={"digest": B64, "algorithm": "ECDSA_SHA_256"})
    assert wrong.status_code == 422
    both = await client.post(
        f"/v1/keys/{key}/sign", json={"digest": right, "message": B64, "algorithm": "ECDSA_SHA_256"}
    )
    assert both.status_code == 422
    other = await client.post(f"/v1/keys/{key}/sign", json={"message": B64, "algorithm": "RSA_PSS_SHA_256"})
    assert other.status_code == 422
    sealed = await client.post(f"/v1/keys/{key}/encrypt", json={"plaintext": B64})
    assert (sealed.status_code, sealed.json()["code"]) == (422, "key_usage_invalid")


@pytest.mark.anyio
@pytest.mark.parametrize(("spec", "algorithm"), [("HMAC_256", "HMAC_SHA_256"), ("HMAC_512", "HMAC_SHA_512")])
async def test_W9_a_wrong_mac_is_an_answer_not_an_error(lab: Lab, spec: str, algorithm: str) -> None:
    key = await new_key(lab, spec)
    client = lab.client("health-eu-de-1")
    made = await client.post(f"/v1/keys/{key}/mac", json={"message": B64, "algorithm": algorithm})
    value = base64.b64decode(made.json()["mac"])
    assert len(value) == (32 if spec == "HMAC_256" else 64)
    body = {"message": B64, "algorithm": algorithm}
    good = await client.post(f"/v1/keys/{key}/verify-mac", json={**body, "mac": made.json()["mac"]})
    assert good.json()["valid"] is True
    flipped = base64.b64encode(bytes([value[0] ^ 1]) + value[1:]).decode()
    bad = await client.post(f"/v1/keys/{key}/verify-mac", json={**body, "mac": flipped})
    assert (bad.status_code, bad.json()["valid"]) == (200, False)
    short = await client.post(f"/v1/keys/{key}/verify-mac", json={**body, "mac": base64.b64encode(value[:8]).decode()})
    assert short.json()["valid"] is False


@pytest.mark.anyio
async def test_W3_a_wrapped_only_data_key_is_never_in_clear_and_opens_by_unwrap_alone(lab: Lab) -> None:
    key = await new_key(lab, "AES_256")
    client = lab.client("health-eu-de-1")
    only = (await client.post(f"/v1/keys/{key}/data-keys", json={"bytes": 48})).json()
    assert "plaintext_key" not in only
    opened = (await client.post("/v1/data-keys/unwrap", json={"wrapped_key": only["wrapped_key"]})).json()
    assert len(base64.b64decode(opened["plaintext_key"])) == 48
    both = (await client.post(f"/v1/keys/{key}/data-keys", json={"return": "both", "context": {"a": "b"}})).json()
    again = await client.post(
        "/v1/data-keys/unwrap", json={"wrapped_key": both["wrapped_key"], "context": {"a": "b"}, "expect_key": key}
    )
    assert again.json()["plaintext_key"] == both["plaintext_key"]


@pytest.mark.anyio
async def test_expect_key_guards_against_another_key(lab: Lab) -> None:
    one, two = await new_key(lab, "AES_256"), await new_key(lab, "AES_256")
    client = lab.client("health-eu-de-1")
    made = (await client.post(f"/v1/keys/{one}/encrypt", json={"plaintext": B64})).json()
    right = await client.post("/v1/decrypt", json={"ciphertext": made["ciphertext"], "expect_key": one})
    assert right.status_code == 200
    wrong = await client.post("/v1/decrypt", json={"ciphertext": made["ciphertext"], "expect_key": two})
    assert (wrong.status_code, wrong.json()["code"]) == (400, "incorrect_key")


@pytest.mark.anyio
async def test_W12_rewrap_moves_to_the_newest_version_another_key_and_another_context(lab: Lab) -> None:
    one, two = await new_key(lab, "AES_256"), await new_key(lab, "AES_256")
    client = lab.client("health-eu-de-1")
    made = (await client.post(f"/v1/keys/{one}/encrypt", json={"plaintext": B64, "context": {"r": "1"}})).json()
    await lab.client("health-operator").post(f"/v1/keys/{one}/rotate", headers=fresh())
    moved = await client.post("/v1/rewrap", json={"ciphertext": made["ciphertext"], "context": {"r": "1"}})
    assert moved.status_code == 200, moved.text
    assert (moved.json()["from"]["key_version"], moved.json()["to"]["key_version"]) == (1, 2)
    other = await client.post(
        "/v1/rewrap",
        json={
            "ciphertext": moved.json()["ciphertext"],
            "context": {"r": "1"},
            "to_key": two,
            "to_context": {"r": "2"},
        },
    )
    assert other.status_code == 200, other.text
    opened = await client.post("/v1/decrypt", json={"ciphertext": other.json()["ciphertext"], "context": {"r": "2"}})
    assert opened.json()["plaintext"] == B64
    assert opened.json()["key_id"] == two


@pytest.mark.anyio
async def test_lifecycle_states_and_their_refusals(lab: Lab) -> None:
    key = await new_key(lab, "AES_256")
    operator, client = lab.client("health-operator"), lab.client("health-eu-de-1")
    path = f"/v1/keys/{key}"
    made = (await client.post(f"{path}/encrypt", json={"plaintext": B64})).json()["ciphertext"]
    disabled = await operator.post(f"{path}/disable")
    assert disabled.json()["state"] == "disabled"
    for url, body in ((f"{path}/encrypt", {"plaintext": B64}), ("/v1/decrypt", {"ciphertext": made})):
        refused = await client.post(url, json=body)
        assert (refused.status_code, refused.json()["code"], refused.json()["state"]) == (
            409,
            "key_state_invalid",
            "disabled",
        )
    assert (await operator.post(f"{path}/enable")).status_code == 428
    stale = await operator.post(f"{path}/enable", headers={"If-Match": '"1"'})
    assert (stale.status_code, stale.json()["code"]) == (412, "etag_mismatch")
    assert (await operator.post(f"{path}/enable", headers=await etag(lab, key))).json()["state"] == "enabled"
    assert (await client.post("/v1/decrypt", json={"ciphertext": made})).json()["plaintext"] == B64
    assert (await operator.delete(path)).json()["code"] == "deletion_is_scheduled"
    for wait in ("P6D", "P91D"):
        headers = {**await etag(lab, key), **fresh()}
        assert (
            await operator.post(f"{path}/schedule-deletion", json={"wait": wait}, headers=headers)
        ).status_code == 422
    headers = {**await etag(lab, key), **fresh()}
    scheduled = await operator.post(f"{path}/schedule-deletion", json={"wait": "P7D"}, headers=headers)
    assert scheduled.json()["state"] == "pending_deletion"
    assert scheduled.json()["delete_at"].endswith("Z")
    assert (await client.post("/v1/decrypt", json={"ciphertext": made})).json()["state"] == "pending_deletion"
    cancelled = await operator.post(f"{path}/cancel-deletion", headers=await etag(lab, key))
    assert cancelled.json()["state"] == "disabled"
    assert cancelled.json()["delete_at"] is None


@pytest.mark.anyio
async def test_the_scheduler_destroys_what_is_due_and_rotates_what_is_old(lab: Lab) -> None:
    operator, client = lab.client("health-operator"), lab.client("health-eu-de-1")
    doomed = await new_key(lab, "AES_256")
    made = (await client.post(f"/v1/keys/{doomed}/encrypt", json={"plaintext": B64})).json()["ciphertext"]
    headers = {**await etag(lab, doomed), **fresh()}
    await operator.post(f"/v1/keys/{doomed}/schedule-deletion", json={"wait": "P7D"}, headers=headers)
    aging = await new_key(lab, "AES_256", rotation={"max_age": "P1D"})
    busy = await new_key(lab, "AES_256", rotation={"max_uses": 10})
    for _ in range(10):
        assert (await client.post(f"/v1/keys/{busy}/encrypt", json={"plaintext": B64})).status_code == 200
    assert (await shows(operator, busy, latest_version=2))["id"] == busy
    assert (await operator.get(f"/v1/keys/{aging}")).json()["latest_version"] == 1
    lab.clock.ahead += 8 * 86_400 * 1_000_000
    try:
        assert (await shows(operator, aging, latest_version=2))["state"] == "enabled"
        assert (await shows(operator, doomed, state="destroyed"))["id"] == doomed
        gone = await client.post("/v1/decrypt", json={"ciphertext": made})
        assert (gone.status_code, gone.json()["code"]) == (410, "key_destroyed")
    finally:
        lab.clock.ahead = 0


@pytest.mark.anyio
async def test_O9_fences_and_revoked_versions_are_refused(lab: Lab) -> None:
    key = await new_key(lab, "AES_256")
    operator, client = lab.client("health-operator"), lab.client("health-eu-de-1")
    made = [(await client.post(f"/v1/keys/{key}/encrypt", json={"plaintext": B64})).json()["ciphertext"]]
    for _ in range(2):
        await operator.post(f"/v1/keys/{key}/rotate", headers=fresh())
        made.append((await client.post(f"/v1/keys/{key}/encrypt", json={"plaintext": B64})).json()["ciphertext"])
    fenced = await operator.patch(
        f"/v1/keys/{key}", json={"min_decrypt_version": "latest-1"}, headers=await etag(lab, key)
    )
    assert fenced.json()["min_decrypt_version"] == 2
    codes = [(await client.post("/v1/decrypt", json={"ciphertext": c})).json().get("code") for c in made]
    assert codes == ["version_fenced", None, None]
    revoked = await operator.post(f"/v1/keys/{key}/versions/2/revoke")
    assert revoked.status_code == 200, revoked.text
    codes = [(await client.post("/v1/decrypt", json={"ciphertext": c})).json().get("code") for c in made]
    assert codes == ["version_fenced", "version_fenced", None]
    versions = (await operator.get(f"/v1/keys/{key}/versions")).json()["items"]
    assert [v["state"] for v in versions] == ["enabled", "revoked", "enabled"]


@pytest.mark.anyio
async def test_idempotency_replays_refuses_reuse_and_is_required(lab: Lab) -> None:
    operator = lab.client("health-operator")
    body = {"spec": "AES_256", "tier": 2, "home": "eu-de-1"}
    missing = await operator.post("/v1/keys", json=body)
    assert (missing.status_code, missing.json()["code"]) == (400, "idempotency_key_missing")
    headers = fresh()
    first = await operator.post("/v1/keys", json=body, headers=headers)
    again = await operator.post("/v1/keys", json=body, headers=headers)
    assert again.json() == first.json()
    assert again.status_code == 201
    assert again.headers["idempotency-replayed"] == "true"
    other = await operator.post("/v1/keys", json={**body, "tier": 3}, headers=headers)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")
    stranger = await lab.client("defence-operator").post("/v1/keys", json=body, headers=headers)
    assert stranger.status_code == 201
    assert stranger.json()["id"] != first.json()["id"]
    headers = fresh()
    both = await asyncio.gather(*(operator.post("/v1/keys", json=body, headers=headers) for _ in range(4)))
    made = {a.json()["id"] for a in both if a.status_code == 201}
    assert len(made) == 1
    assert {a.status_code for a in both} <= {201, 409}


@pytest.mark.anyio
async def test_paging_is_complete_and_its_token_is_bound(lab: Lab) -> None:
    operator = lab.client("health-operator")
    wanted = {await new_key(lab, "HMAC_256", tags={"set": "paging"}) for _ in range(7)}
    seen: list[str] = []
    path = "/v1/keys?page_size=3&tag.set=paging"
    token = None
    while True:
        answer = await operator.get(path + (f"&page_token={token}" if token else ""))
        assert answer.status_code == 200, answer.text
        seen += [k["id"] for k in answer.json()["items"]]
        token = answer.json()["next_page_token"]
        if token is None:
            break
        assert 'rel="next"' in answer.headers["link"]
        used = token
    assert set(seen) == wanted
    assert len(seen) == 7
    other_filter = await operator.get(f"/v1/keys?page_size=3&tag.set=other&page_token={used}")
    assert other_filter.json()["code"] == "page_token_invalid"
    other_tenant = await lab.client("defence-operator").get(path + f"&page_token={used}")
    assert other_tenant.json()["code"] == "page_token_invalid"


@pytest.mark.anyio
async def test_W10_aliases_repoint_at_once_and_old_ciphertexts_open(lab: Lab) -> None:
    one, two = await new_key(lab, "AES_256"), await new_key(lab, "AES_256")
    operator, client = lab.client("health-operator"), lab.client("health-eu-de-1")
    assert (await operator.put("/v1/aliases/orders", json={"key": one})).status_code == 200
    first = (await client.post("/v1/keys/alias/orders/encrypt", json={"plaintext": B64})).json()
    assert first["key_id"] == one
    assert (await operator.put("/v1/aliases/orders", json={"key": two})).status_code == 200
    assert (await client.post("/v1/keys/alias/orders/encrypt", json={"plaintext": B64})).json()["key_id"] == two
    assert (await client.post("/v1/decrypt", json={"ciphertext": first["ciphertext"]})).json()["plaintext"] == B64
    listed = (await operator.get("/v1/aliases")).json()["items"]
    assert {"alias": "orders", "key_id": two} in listed
    foreign = await lab.client("defence-operator").put("/v1/aliases/orders", json={"key": two})
    assert foreign.status_code == 404
    assert (await operator.delete("/v1/aliases/orders")).status_code == 204
    assert (await client.post("/v1/keys/alias/orders/encrypt", json={"plaintext": B64})).status_code == 404


@pytest.mark.anyio
async def test_a_dry_run_decides_and_does_nothing(lab: Lab, pkcs11_calls: Any) -> None:
    key = await new_key(lab, "AES_256")
    client, operator = lab.client("health-eu-de-1"), lab.client("health-operator")
    before = pkcs11_calls()
    yes = await client.post(f"/v1/keys/{key}/encrypt?dry_run=true", json={"plaintext": B64})
    assert (yes.status_code, yes.json()["would"]) == (200, "allow")
    no = await lab.client("health-us-mkt-1").post(f"/v1/keys/{key}/encrypt?dry_run=true", json={"plaintext": B64})
    assert (no.status_code, no.json()["would"], no.json()["decision"]["rule"]) == (200, "deny", "SOV-CALLER-PLACE")
    rotated = await operator.post(f"/v1/keys/{key}/rotate?dry_run=true", headers=fresh())
    assert rotated.json()["would"] == "allow"
    assert (await operator.get(f"/v1/keys/{key}")).json()["latest_version"] == 1
    assert pkcs11_calls() == before
    assert (
        await lab.client("defence-eu-de-1").post(f"/v1/keys/{key}/encrypt?dry_run=true", json={"plaintext": B64})
    ).status_code == 404
    records = await lab.client("health-auditor").get(f"/v1/audit/records?key={key}&page_size=10")
    assert sum(1 for r in records.json()["items"] if r["record"].get("dry")) == 3


@pytest.mark.anyio
async def test_W6_a_bad_item_harms_no_other_and_each_has_its_record(lab: Lab) -> None:
    key = await new_key(lab, "AES_256")
    foreign = await new_key(lab, "AES_256", tenant="defence")
    client = lab.client("health-eu-de-1")
    items = [
        {"key": key, "plaintext": B64, "reference": "a"},
        {"key": foreign, "plaintext": B64, "reference": "b"},
        {"key": key, "plaintext": "!", "reference": "c"},
        {"key": key, "plaintext": B64, "surprise": 1},
        {"key": key, "plaintext": B64, "destination": ["us-mkt-1"], "reference": "e"},
    ]
    answer = await client.post("/v1/batch/encrypt", json={"items": items})
    assert answer.status_code == 200
    assert answer.headers["x-batch-failed"] == "3"
    results = answer.json()["results"]
    assert [r["status"] for r in results] == [200, 404, 422, 422, 200]
    assert [r.get("reference") for r in results] == ["a", "b", "c", None, "e"]
    assert len({r["receipt"] for r in results}) == 5
    assert (await client.post("/v1/batch/encrypt", json={"items": []})).status_code == 422
    too_many = {"items": [{"key": key, "plaintext": B64}] * 501}
    assert (await client.post("/v1/batch/encrypt", json=too_many)).status_code == 422
    records = (await lab.client("health-auditor").get("/v1/audit/records?page_size=50")).json()["items"]
    batch = [r["record"] for r in records if r["record"].get("batch") == answer.json()["batch_id"]]
    assert sorted(r["bi"] for r in batch) == [0, 1, 2, 3, 4]


@pytest.mark.anyio
async def test_what_a_batch_remembers_of_a_decision_is_what_each_item_would_be_told(lab: Lab) -> None:
    key = await new_key(lab, "AES_256", purposes=["care", "billing"])
    client = lab.client("health-eu-de-1")
    uses: list[dict[str, Any]] = [
        {"purpose": "care"},
        {"purpose": "billing"},
        {"purpose": "care", "destination": ["us-mkt-1"]},
        {"purpose": "research"},
        {},
    ]
    singles = [await client.post(f"/v1/keys/{key}/encrypt", json={"plaintext": B64, **use}) for use in uses]
    assert [a.status_code for a in singles[:3]] == [200, 200, 200]
    items = [{"key": key, "plaintext": B64, **use} for use in uses * 3]
    told = (await client.post("/v1/batch/encrypt", json={"items": items})).json()
    assert [r["status"] for r in told["results"]] == [a.status_code for a in singles] * 3
    found = (await lab.client("health-auditor").get("/v1/audit/records?page_size=100")).json()["items"]
    records = [r["record"] for r in found if r["record"].get("key") == key and r["record"]["op"] == "encrypt"]
    of_items = sorted((r for r in records if "bi" in r), key=lambda r: r["bi"])
    of_singles = sorted((r for r in records if "bi" not in r), key=lambda r: r["ts"])
    apart = {"id", "ts", "us", "req", "alg", "out_len", "bi", "batch", "facts"}  # facts: the digest has the time
    shown = [{n: v for n, v in r.items() if n not in apart} for r in (*of_singles, *of_items)]
    assert len(shown) == 20
    assert shown[5:] == shown[:5] * 3


@pytest.mark.anyio
async def test_a_batch_of_one_key_costs_one_derivation(lab: Lab, pkcs11_calls: Any) -> None:
    key = await new_key(lab, "AES_256")
    client = lab.client("health-eu-de-1")
    await client.post(f"/v1/keys/{key}/encrypt", json={"plaintext": B64})
    before = pkcs11_calls()
    items = [{"key": key, "plaintext": B64} for _ in range(100)]
    sealed = (await client.post("/v1/batch/encrypt", json={"items": items})).json()["results"]
    assert pkcs11_calls() - before <= 4
    assert {r["result"]["suite"] for r in sealed} == {"0x0004"}
    alone = await client.post("/v1/decrypt", json={"ciphertext": sealed[37]["result"]["ciphertext"]})
    assert alone.json()["plaintext"] == B64


@pytest.mark.anyio
async def test_a_key_that_misses_its_tier_is_refused_with_what_is_missing(lab: Lab) -> None:
    body = {"spec": "AES_256", "tier": 1, "home": "eu-de-1", "residency": ["eu-de-1", "us-mkt-1"]}
    answer = await lab.client("health-operator").post("/v1/keys", json=body, headers=fresh())
    assert (answer.status_code, answer.json()["code"]) == (409, "tier_not_met")
    assert answer.json()["missing"]
    nowhere = {"spec": "AES_256", "tier": 2, "home": "eu-fr-1"}
    answer = await lab.client("health-operator").post("/v1/keys", json=nowhere, headers=fresh())
    assert answer.status_code == 422, answer.text


@pytest.mark.anyio
async def test_suite_0x0002_encrypts_in_the_token(lab: Lab) -> None:
    key = await new_key(lab, "AES_256", suite="0x0002")
    client = lab.client("health-eu-de-1")
    made = await client.post(f"/v1/keys/{key}/encrypt", json={"plaintext": B64, "context": {"a": "b"}})
    assert made.json()["suite"] == "0x0002"
    opened = await client.post("/v1/decrypt", json={"ciphertext": made.json()["ciphertext"], "context": {"a": "b"}})
    assert opened.json()["plaintext"] == B64
    wrong = await client.post("/v1/decrypt", json={"ciphertext": made.json()["ciphertext"]})
    assert wrong.json()["code"] == "invalid_ciphertext"


@pytest.mark.anyio
async def test_random_comes_from_the_token_and_whoami_tells_the_place(lab: Lab) -> None:
    client = lab.client("health-eu-fr-1")
    one, two = [(await client.post("/v1/random", json={"bytes": 32})).json()["random"] for _ in range(2)]
    assert len(base64.b64decode(one)) == 32
    assert one != two
    me = (await client.get("/v1/whoami")).json()
    assert (me["tenant"], me["kind"], me["places"], me["authn"]) == ("health", "workload", ["eu-fr-1"], "mtls")
