"""The web surface of the native API: malformed input, leaks in answers, paths, headers (groups L and W)."""

from __future__ import annotations

import base64
import json
import time
from typing import Any

import pytest

from harness import Lab, new_key
from service.protocols.native import ROUTES

MARK = "TOPSECRET-6f0e"
OPERATION = "00000000-0000-4000-8000-000000000000"
AUDITED: dict[str, Any] = (
    {"size": 1, "chain": "n-0", "seq": 0, "tenant": "health", "level": 0, "tile": "000.p/1"}
    | {"decision": OPERATION, "freeze": OPERATION, "approval": OPERATION, "grant": OPERATION, "exception": OPERATION}
    | {"origin": "0" * 64}
)
B64 = base64.b64encode(b"hello").decode()
JSON = {"content-type": "application/json"}

MALFORMED = {
    "NaN": b'{"plaintext":NaN}',
    "Infinity": b'{"plaintext":"aGk=","version":Infinity}',
    "1e999": b'{"plaintext":"aGk=","version":1e999}',
    "minus zero": b'{"plaintext":"aGk=","version":-0}',
    "5,000 digits": b'{"plaintext":"aGk=","version":' + b"9" * 5_000 + b"}",
    "lone surrogate": b'{"plaintext":"aGk=","context":{"a":"\\ud800"}}',
    "lone surrogate in a name": b'{"plaintext":"aGk=","context":{"\\udfff":"a"}}',
    "duplicate key": b'{"plaintext":"aGk=","plaintext":"aGk="}',
    "duplicate context name": b'{"plaintext":"aGk=","context":{"a":"1","a":"2"}}',
    "depth": b"[" * 100_000,
    "deep object": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "UTF-16": '{"plaintext":"aGk="}'.encode("utf-16"),
    "BOM": b"\xef\xbb\xbf" + b'{"plaintext":"aGk="}',
    "Latin-1": b'{"plaintext":"\xe4"}',
    "trailing": b'{"plaintext":"aGk="} x',
    "array": b"[]",
    "null": b"null",
    "empty": b"",
    "unknown field": b'{"plaintext":"aGk=","admin":true}',
    "wrong type": b'{"plaintext":["' + MARK.encode() + b'"]}',
    "number for text": b'{"plaintext":12345678}',
    "bad base64": b'{"plaintext":"' + MARK.encode() + b'!"}',
    "non-canonical base64": b'{"plaintext":"aGl="}',
    "unpadded base64": b'{"plaintext":"aGk"}',
    "context not NFC": '{"plaintext":"aGk=","context":{"a":"e\u0301"}}'.encode(),
    "reserved context name": b'{"plaintext":"aGk=","context":{"skms:x":"1"}}',
    "empty context name": b'{"plaintext":"aGk=","context":{"":"1"}}',
    "129 pairs": json.dumps({"plaintext": B64, "context": {f"n{i}": "" for i in range(129)}}).encode(),
    "context of 8,193 bytes": json.dumps({"plaintext": B64, "context": {"n": "x" * 8_192}}).encode(),
    "plaintext of 65,537 bytes": json.dumps({"plaintext": base64.b64encode(bytes(65_537)).decode()}).encode(),
    "many tiny strings": b'{"plaintext":"aGk=","context":{' + b'"a":"",' * 100_000 + b'"b":""}}',
}


@pytest.mark.anyio
@pytest.mark.parametrize("name", sorted(MALFORMED))
async def test_W_01_W_02_malformed_json_is_a_typed_4xx_that_names_no_value(lab: Lab, name: str) -> None:
    key = await new_key(lab, "AES_256")
    begun = time.thread_time()  # the event loop's own work: not its wait for a busy machine's disk
    answer = await lab.client("health-eu-de-1").post(f"/v1/keys/{key}/encrypt", content=MALFORMED[name], headers=JSON)
    took = time.thread_time() - begun
    assert answer.status_code in {400, 413, 422}, (name, answer.status_code, answer.text)
    shown = answer.json()
    assert shown["code"] in {"request_malformed", "validation_failed", "payload_too_large"}
    assert MARK not in answer.text
    assert "audit-receipt" in answer.headers
    assert took < 0.5, f"{name}: {took:.3f} s"


@pytest.mark.anyio
async def test_W_01_odd_numbers_and_surrogates_in_path_query_and_headers_are_4xx(lab: Lab) -> None:
    client = lab.client("health-operator")
    for path in (
        "/v1/keys/%ed%a0%80",
        "/v1/keys?page_size=NaN",
        "/v1/keys?page_size=1e999",
        "/v1/keys?page_size=-0",
        "/v1/keys?page_size=" + "9" * 3_000,
        "/v1/keys?page_token=%ed%a0%80",
        "/v1/keys?tier=Infinity",
        "/v1/audit/records?from=NaN",
        "/v1/keys/../keys/" + "a" * 5_000,
    ):
        answer = await client.get(path)
        assert 400 <= answer.status_code < 500, (path, answer.status_code)
    answer = await client.get("/v1/keys", headers={"X-Client-Request-Id": "bad id"})
    assert answer.status_code == 400


@pytest.mark.anyio
@pytest.mark.parametrize(
    "media",
    [
        *("text/plain", "application/xml", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded", ""),
        *("application/json; charset=utf-16", "application/json; charset=latin-1"),
    ],
)
async def test_W_03_only_json_in_utf_8_is_read(lab: Lab, media: str) -> None:
    key = await new_key(lab, "AES_256")
    body = json.dumps({"plaintext": B64}).encode()
    answer = await lab.client("health-eu-de-1").post(
        f"/v1/keys/{key}/encrypt", content=body, headers={"content-type": media}
    )
    assert answer.status_code == 415
    assert answer.json()["code"] == "unsupported_media_type"


@pytest.mark.anyio
async def test_W_05_a_body_over_the_limit_is_refused_with_and_without_a_length(lab: Lab) -> None:
    key = await new_key(lab, "AES_256")
    client = lab.client("health-eu-de-1")
    large = b'{"plaintext":"' + b"A" * 1_100_000 + b'"}'

    async def chunks() -> Any:
        for at in range(0, len(large), 10_000):
            yield large[at : at + 10_000]

    for content in (large, chunks()):
        answer = await client.post(f"/v1/keys/{key}/encrypt", content=content, headers=JSON)
        assert answer.status_code == 413
        assert answer.json()["code"] == "payload_too_large"
        assert answer.json()["limit"] == 1_048_576


@pytest.mark.anyio
@pytest.mark.parametrize(
    "path",
    [
        *("/v1/keys/", "//v1/keys", "/v1//keys", "/V1/keys", "/v1/Keys", "/v1/keys/..", "/v1/%6beys", "/v1/keys%2f"),
        *("/v1/keys/%2e%2e/tenants", "/v1/keys/x%00", "/v1/keys.", "/livez/", "/livez%2f..%2fv1%2fkeys"),
        *("/%0a", "/v1/keys%0a", "/v1/policy/decisions/%14%0a%c3%bd"),  # a path goes on after a newline
    ],
)
async def test_W_09_other_spellings_of_a_path_are_no_route(lab: Lab, path: str) -> None:
    answer = await lab.client("health-operator").get(f"https://127.0.0.1{path}")
    assert answer.status_code == 404, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert "audit-receipt" in answer.headers
    anonymous = await lab.client(None).get(f"https://127.0.0.1{path}")
    assert anonymous.status_code == 401


@pytest.mark.anyio
async def test_W_08_the_host_header_changes_nothing(lab: Lab) -> None:
    body = {"spec": "AES_256", "tier": 2, "home": "eu-de-1"}
    for number, host in enumerate(("evil.example", "127.0.0.1@evil.example", "a/b?c#d")):
        answer = await lab.client("health-operator").post(
            "/v1/keys", json=body, headers={"Host": host, "Idempotency-Key": f"host-{number}"}
        )
        assert answer.status_code == 201
        assert answer.headers["location"] == f"/v1/keys/{answer.json()['id']}"


@pytest.mark.anyio
async def test_W_12_range_is_ignored(lab: Lab) -> None:
    whole = await lab.client("health-operator").get("/openapi.json")
    part = await lab.client("health-operator").get("/openapi.json", headers={"Range": "bytes=0-9"})
    assert part.status_code == 200
    assert part.content == whole.content


@pytest.mark.anyio
async def test_W_14_ciphertexts_of_every_length_get_one_error(lab: Lab) -> None:
    client = lab.client("health-eu-de-1")
    shown = set()
    for length in range(201):
        blob = (b"SK\x01\x00\x01" + bytes(200))[:length]
        text = "skms:v1:" + base64.urlsafe_b64encode(blob).rstrip(b"=").decode()
        answer = await client.post("/v1/decrypt", json={"ciphertext": text})
        body = answer.json()
        if length:
            shown.add((answer.status_code, body["code"], body["title"]))
    assert shown == {(400, "invalid_ciphertext", "The ciphertext cannot be opened")}


@pytest.mark.anyio
async def test_wrong_relabelled_and_foreign_ciphertexts_get_the_same_answer(lab: Lab) -> None:
    ours, theirs = await new_key(lab, "AES_256"), await new_key(lab, "AES_256", tenant="defence")
    mine = lab.client("health-eu-de-1")
    foreign = await lab.client("defence-eu-de-1").post(f"/v1/keys/{theirs}/encrypt", json={"plaintext": B64})
    wrapped = await mine.post(f"/v1/keys/{ours}/data-keys", json={})
    good = await mine.post(f"/v1/keys/{ours}/encrypt", json={"plaintext": B64})
    good_text = good.json()["ciphertext"]
    blob = base64.urlsafe_b64decode(good_text[8:] + "=" * (-len(good_text[8:]) % 4))
    relabelled = blob[:3] + b"\x00\x02" + blob[5:]
    unknown_version = blob[:22] + b"\x00\x00\x09" + blob[25:]

    def text(b: bytes) -> str:
        return "skms:v1:" + base64.urlsafe_b64encode(b).rstrip(b"=").decode()

    answers = []
    for ciphertext in (
        foreign.json()["ciphertext"],
        wrapped.json()["wrapped_key"],
        text(relabelled),
        text(unknown_version),
        text(blob[:-1]),
        text(blob + b"\0"),
    ):
        answers.append(await mine.post("/v1/decrypt", json={"ciphertext": ciphertext}))
    answers.append(await mine.post("/v1/data-keys/unwrap", json={"wrapped_key": good_text}))
    stripped = {
        json.dumps({k: v for k, v in a.json().items() if k not in {"request_id", "decision_id"}}) for a in answers
    }
    assert len(stripped) == 1, stripped
    assert {a.status_code for a in answers} == {400}


@pytest.mark.anyio
async def test_L_02_L_04_answers_and_logs_never_echo_input(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    key = await new_key(lab, "AES_256")
    client = lab.client("health-eu-de-1")
    caplog.set_level("DEBUG")
    for body in (
        {"plaintext": {"x": MARK}},
        {"plaintext": [MARK]},
        {"plaintext": MARK + "!"},
        {"plaintext": B64, "version": MARK},
        {"plaintext": B64, "context": {MARK: 5}},
        {"plaintext": B64, MARK: 1},
        {"plaintext": B64, "purpose": MARK},
        {"plaintext": B64, "reason": {"code": MARK}},
        {"plaintext": B64, "destination": [MARK]},
    ):
        answer = await client.post(f"/v1/keys/{key}/encrypt", json=body)
        assert 400 <= answer.status_code < 500
        assert MARK not in answer.text
        assert all(MARK not in v for v in answer.headers.values())
    for path in (f"/v1/keys/{MARK}", f"/v1/keys?state={MARK}", f"/v1/keys?{MARK}=1", f"/v1/{MARK}"):
        answer = await lab.client("health-operator").get(path)
        assert 400 <= answer.status_code < 500
        assert MARK not in answer.text
    # A log line may carry the path of a request (nothing secret belongs there), but never a field's value.
    assert MARK not in "".join(str(r.__dict__) for r in caplog.records if r.name.startswith(("skms", "uvicorn")))


@pytest.mark.anyio
async def test_L_03_an_internal_error_is_constant_and_has_its_place_in_the_log(
    lab: Lab, database: Any, caplog: pytest.LogCaptureFixture
) -> None:
    key = await new_key(lab, "AES_256")
    database.forge_key_row(key)
    alarms = lab.node.kms.damaged_rows
    answer = await lab.client("health-eu-de-1").post(f"/v1/keys/{key}/encrypt", json={"plaintext": B64})
    assert answer.status_code == 500
    assert lab.node.kms.damaged_rows == alarms + 1
    assert any((r.name, r.levelname) == ("skms.alarm", "CRITICAL") for r in caplog.records)
    body = answer.json()
    assert {k: body[k] for k in ("code", "title", "executed")} == {
        "code": "internal",
        "title": "Internal error",
        "executed": False,
    }
    assert "RowDamaged" not in answer.text
    assert any("RowDamaged" in str(r.__dict__) for r in caplog.records)


@pytest.mark.anyio
async def test_L_05_metrics_carry_no_tenant_key_or_caller(lab: Lab) -> None:
    key = await new_key(lab, "AES_256", alias="payroll-2026")
    await lab.client("health-eu-de-1").post("/v1/keys/alias/payroll-2026/encrypt", json={"plaintext": B64})
    text = (await lab.client("platform").get("/metrics")).text
    assert "skms_operations_total" in text
    for secret in (key, "payroll", "health", "defence", "spiffe", "mtls:"):
        assert secret not in text


@pytest.mark.anyio
async def test_A_05_every_route_without_credentials_answers_401_and_is_audited(lab: Lab) -> None:
    public = {r.path for r in ROUTES if r.public}
    witness = {"/witness/add-checkpoint", "/witness/{origin}/checkpoint"}  # not configured here
    assert public == {"/livez", "/readyz", "/openapi.json", "/witness/{origin}/checkpoint"}
    assert {r.path for r in ROUTES if r.anonymous} == {"/witness/add-checkpoint"}
    client = lab.client(None)
    for route in ROUTES:
        path = route.path.format(key="alias/x", version=1, name="x", id="abcdefgh", operation=OPERATION, **AUDITED)
        answer = await client.request(route.method, path)
        if route.path in witness:
            assert answer.status_code == 404
            assert ("audit-receipt" in answer.headers) == route.anonymous
            continue
        if route.path in public:
            assert answer.status_code in {200, 503}
            continue
        assert answer.status_code == 401, (route.method, route.path)
        assert answer.json()["code"] == "unauthenticated"
        assert answer.headers["www-authenticate"].startswith("Bearer")
        assert "audit-receipt" in answer.headers


@pytest.mark.anyio
async def test_I_12_headers_carry_neither_identity_nor_place(lab: Lab) -> None:
    key = await new_key(lab, "AES_256")
    forged = {
        "X-Forwarded-For": "10.0.0.1",
        "X-Forwarded-Client-Cert": 'URI="spiffe://eu-de-1.dev.skms.example/health/workload/x"',
        "Forwarded": "for=10.0.0.1",
        "X-SSL-Client-Cert": "x",
        "X-User-Id": "health-eu-de-1",
        "X-Roles": "operator,platform",
        "X-Tenant": "health",
        "X-Region": "eu-de-1",
    }
    anonymous = await lab.client(None, **forged).post(f"/v1/keys/{key}/encrypt", json={"plaintext": B64})
    assert anonymous.status_code == 401
    far = await lab.client("health-us-mkt-1", **forged).post(f"/v1/keys/{key}/encrypt", json={"plaintext": B64})
    assert (far.status_code, far.json()["code"]) == (403, "region_not_allowed")
    assert far.json()["rule"] == "SOV-CALLER-PLACE"
    other = await lab.client("defence-eu-de-1", **forged).post(f"/v1/keys/{key}/encrypt", json={"plaintext": B64})
    assert other.status_code == 404
