"""Authorisation and tenancy through the API (group A of the hardening list)."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import uuid
from pathlib import Path
from typing import Any

import pytest

from harness import Lab, new_key
from policy import Policy
from service.dev import domain
from service.protocols.native import ROUTES
from service.protocols.openapi import document
from service.protocols.wire import moment
from service.wiring import now

B64 = base64.b64encode(b"hello").decode()


OPERATION = "00000000-0000-4000-8000-000000000000"
AUDITED: dict[str, Any] = {"size": 1, "chain": "n-0", "seq": 0, "tenant": "health", "level": 0, "tile": "000.p/1"} | {
    "decision": OPERATION,
    "freeze": OPERATION,
    "approval": OPERATION,
    "grant": OPERATION,
    "exception": OPERATION,
}


def fresh() -> dict[str, str]:
    return {"Idempotency-Key": uuid.uuid4().hex}


def body_of(path: str, method: str, key: str, ciphertext: str, wrapped: str) -> dict[str, Any] | None:
    """A well-formed body for every route that takes one."""
    last = path.rsplit("/", 1)[-1]
    if method in {"GET", "DELETE"}:
        return None
    if path == "/v1/keys":
        return {"spec": "AES_256", "tier": 2, "home": "eu-de-1"}
    if path == "/v1/drills":
        return {"kind": "exit", "from": "softhsm-eu-de-1", "to": "softhsm-eu-de-2"}
    if path == "/v1/policy/simulate":
        return {"files": {"charter.yaml": ""}, "from": "2026-01-01T00:00:00Z", "to": "2026-01-01T00:00:00Z"}
    if path == "/v1/freezes/drill":
        return {"key": key}
    if path == "/v1/freezes":
        return {"scope": {"kind": "key", "value": key}, "reason": {"code": "incident"}}
    if path == "/v1/exceptions":
        waived = {"keys": [key], "kind": "reach", "places": ["FR"], "purpose": "default", "legal_basis": "eu-law"}
        return {**waived, "legal_ref": "Article 49", "not_after": moment(now() + 3_600_000_000)}
    if path == "/v1/tokens":
        return {"scopes": ["listKeys"]}
    if path.startswith("/v1/batch/"):
        item = body_of(f"/v1/keys/{{key}}/{last}", "POST", key, ciphertext, wrapped) or {}
        if last in {"decrypt", "rewrap", "unwrap"}:
            item = {"wrapped_key": wrapped} if last == "unwrap" else {"ciphertext": ciphertext}
        else:
            item = {**item, "key": key}
        return {"items": [item]}
    return {
        "encrypt": {"plaintext": B64},
        "decrypt": {"ciphertext": ciphertext},
        "rewrap": {"ciphertext": ciphertext},
        "unwrap": {"wrapped_key": wrapped},
        "data-keys": {},
        "sign": {"message": B64, "algorithm": "ECDSA_SHA_256"},
        "verify": {"message": B64, "algorithm": "ECDSA_SHA_256", "signature": B64},
        "mac": {"message": B64, "algorithm": "HMAC_SHA_256"},
        "verify-mac": {"message": B64, "algorithm": "HMAC_SHA_256", "mac": B64},
        "random": {"bytes": 16},
        "schedule-deletion": {"wait": "P30D"},
        "policy": {"tier": 3},
        "grants": {
            "grantee": f"mtls:{domain('eu-de-1')}:/health/workload/health-eu-de-1",
            "operations": ["encrypt"],
            "expires_at": moment(now() + 3_600_000_000),
        },
        "signatures": {"approver": "nobody", "signature": "0" * 128},
        "revocations": {"approver": "nobody", "signature": "0" * 128},
        "import-parameters": {"wrapping": "RSAES_OAEP_SHA_1"},
        "import": {
            "import_token": "skms_import_" + "A" * 64,
            "wrapped_key": B64,
            "key_check_value": "0" * 16,
        },
        "{key}": {"description": "x"},
        "{name}": {"key": key},
    }.get(last)


class Things:
    """One thing of each kind that tenant health owns."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab

    async def make(self) -> Things:
        workload = self.lab.client("health-eu-de-1")
        self.key = await new_key(self.lab, "AES_256", alias=f"things-{uuid.uuid4().hex[:8]}")
        made = await workload.post(f"/v1/keys/{self.key}/encrypt", json={"plaintext": B64})
        self.ciphertext = made.json()["ciphertext"]
        self.wrapped = (await workload.post(f"/v1/keys/{self.key}/data-keys", json={})).json()["wrapped_key"]
        return self

    def calls(self, key: str) -> list[tuple[str, str, dict[str, Any] | None]]:
        found = []
        for route in ROUTES:
            if route.public:
                continue
            path = route.path.format(key=key, version=1, name="nothing", id="abcdefgh", operation=OPERATION, **AUDITED)
            found.append((route.method, path, body_of(route.path, route.method, key, self.ciphertext, self.wrapped)))
        return found


async def send(lab: Lab, name: str, method: str, path: str, body: Any) -> Any:
    headers = {**fresh(), "If-Match": '"1"'}
    return await lab.client(name).request(method, path, json=body, headers=headers)


def shown(answer: Any) -> Any:
    """The JSON of an answer; nothing where it is a note, a tile or a bundle."""
    media = answer.headers["content-type"].split(";")[0]
    return answer.json() if media == "application/json" or media.endswith("+json") else {}


@pytest.mark.anyio
async def test_A_06_ids_of_another_tenant_answer_like_unknown_ones_on_every_route(lab: Lab) -> None:
    things = await Things(lab).make()
    unknown = str(uuid.uuid4())
    compared = 0
    for stranger in ("defence-eu-de-1", "defence-operator", "defence-officer", "defence-auditor", "platform"):
        for (method, path, body), (_, path_unknown, body_unknown) in zip(
            things.calls(things.key), things.calls(unknown), strict=True
        ):
            if things.key not in path and things.key not in json.dumps(body):
                continue
            theirs = await send(lab, stranger, method, path, body)
            none = await send(lab, stranger, method, path_unknown, body_unknown)
            shown = [
                {k: v for k, v in a.json().items() if k not in {"request_id", "decision_id", "batch_id"}}
                for a in (theirs, none)
            ]
            for answer in shown:
                for item in answer.get("results", []):
                    item.pop("receipt")
                    item["problem"].pop("request_id")
                    item["problem"].pop("decision_id")
            assert theirs.status_code == none.status_code, (stranger, method, path)
            assert shown[0] == shown[1], (stranger, method, path)
            if "results" not in shown[0]:
                assert not 200 <= theirs.status_code < 300, (stranger, method, path)
            compared += 1
    assert compared > 100


@pytest.mark.anyio
async def test_A_02_A_13_rotating_or_changing_anothers_key_is_404_and_changes_nothing(lab: Lab) -> None:
    key = await new_key(lab, "AES_256")
    before = (await lab.client("health-operator").get(f"/v1/keys/{key}")).json()
    changes = ("rotate", "disable", "enable", "mark-compromised", "schedule-deletion", "cancel-deletion", "destroy")
    for path in (*changes, "policy"):
        body = {"schedule-deletion": {}, "policy": {"tier": 3}}.get(path)
        answer = await send(lab, "defence-operator", "POST", f"/v1/keys/{key}/{path}", body)
        assert answer.status_code == 404, (path, answer.text)
    answer = await send(lab, "defence-operator", "PATCH", f"/v1/keys/{key}", {"description": "mine"})
    assert answer.status_code == 404
    assert (await lab.client("health-operator").get(f"/v1/keys/{key}")).json() == before


@pytest.mark.anyio
async def test_A_03_no_request_can_name_the_key_it_creates_or_take_over_anothers_name(lab: Lab) -> None:
    key = await new_key(lab, "AES_256", alias="takeover")
    body = {"spec": "AES_256", "tier": 2, "home": "eu-de-1"}
    for extra in ({"id": key}, {"tenant": "health"}, {"origin": "hsm2"}, {"key_material": B64}, {"versions": []}):
        answer = await lab.client("defence-operator").post("/v1/keys", json={**body, **extra}, headers=fresh())
        assert answer.status_code == 422
    mine = await lab.client("defence-operator").post("/v1/keys", json={**body, "alias": "takeover"}, headers=fresh())
    assert mine.status_code == 201  # names are per tenant
    assert mine.json()["id"] != key
    again = await lab.client("health-operator").post("/v1/keys", json={**body, "alias": "takeover"}, headers=fresh())
    assert (again.status_code, again.json()["code"]) == (409, "alias_in_use")
    assert (await lab.client("health-operator").get("/v1/keys/alias/takeover")).json()["id"] == key


@pytest.mark.anyio
async def test_A_04_single_batch_and_dry_run_ask_the_same_policy(lab: Lab) -> None:
    key = await new_key(lab, "AES_256")
    far = lab.client("health-us-mkt-1")
    single = await far.post(f"/v1/keys/{key}/encrypt", json={"plaintext": B64})
    batch = await far.post("/v1/batch/encrypt", json={"items": [{"key": key, "plaintext": B64}]})
    dry = await far.post(f"/v1/keys/{key}/encrypt?dry_run=true", json={"plaintext": B64})
    assert single.json()["code"] == "region_not_allowed"
    assert batch.json()["results"][0]["problem"]["code"] == "region_not_allowed"
    assert dry.json()["decision"]["code"] == "region_not_allowed"


@pytest.mark.anyio
async def test_A_08_a_key_of_one_region_refuses_on_a_node_of_another(lab: Lab, elsewhere: Lab) -> None:
    key = await new_key(lab, "AES_256")
    signing = await new_key(lab, "EC_P256")
    client = lab.client("health-eu-de-1")
    made = (await client.post(f"/v1/keys/{key}/encrypt", json={"plaintext": B64})).json()["ciphertext"]
    far = elsewhere.client("health-eu-de-1")
    requests = [
        ("POST", f"/v1/keys/{key}/encrypt", {"plaintext": B64}),
        ("POST", "/v1/decrypt", {"ciphertext": made}),
        ("POST", "/v1/rewrap", {"ciphertext": made}),
        ("POST", f"/v1/keys/{key}/data-keys", {}),
        ("POST", f"/v1/keys/{signing}/sign", {"message": B64, "algorithm": "ECDSA_SHA_256"}),
        ("GET", f"/v1/keys/{signing}/public-key", None),
    ]
    for method, path, body in requests:
        answer = await far.request(method, path, json=body)
        assert (answer.status_code, answer.json()["code"]) == (403, "region_not_allowed"), (path, answer.text)
    operator = elsewhere.client("health-operator")
    rotated = await operator.post(f"/v1/keys/{key}/rotate", headers=fresh())
    assert rotated.json()["code"] == "region_not_allowed"


@pytest.mark.anyio
async def test_A_12_only_named_fields_reach_the_policy(lab: Lab) -> None:
    key = await new_key(lab, "AES_256")
    far = lab.client("health-us-mkt-1")
    for query in ("tenant=health", "region=eu-de-1", "project_id=x", "caller=eu-de-1", "proof=5"):
        answer = await far.post(f"/v1/keys/{key}/encrypt?{query}", json={"plaintext": B64})
        assert answer.status_code == 422
    for field in ("tenant", "region", "caller", "proof", "roles", "places", "approvals", "attest", "via", "hsm"):
        answer = await far.post(f"/v1/keys/{key}/encrypt", json={"plaintext": B64, field: "eu-de-1"})
        assert answer.status_code == 422
    # What a caller declares as destination can only widen, never narrow, where the plaintext may go.
    made = await lab.client("health-eu-de-1").post(f"/v1/keys/{key}/encrypt", json={"plaintext": B64})
    declared = {"ciphertext": made.json()["ciphertext"], "destination": ["us-mkt-1"]}
    widened = await lab.client("health-eu-de-1").post("/v1/decrypt", json=declared)
    assert (widened.status_code, widened.json()["rule"]) == (403, "SOV-DESTINATION")


@pytest.mark.anyio
async def test_A_22_nothing_succeeds_after_a_disable_was_answered(lab: Lab) -> None:
    for _ in range(5):
        late, outcomes = await disable_under_load(lab, await new_key(lab, "AES_256"))
        assert not late, late[:3]
        assert outcomes - {503} == {200, 409}


async def disable_under_load(lab: Lab, key: str) -> tuple[list[str], set[int]]:
    """Disable a key under 200 users of it; who succeeded after that was answered, and every status they got."""
    operator, client = lab.client("health-operator"), lab.client("health-eu-de-1")
    stopped = asyncio.Event()
    late: list[str] = []
    outcomes: set[int] = set()
    # The first use of a key waits for the database: what the disable overtakes are those after it.
    assert (await client.post(f"/v1/keys/{key}/encrypt", json={"plaintext": B64})).status_code == 200

    async def use(number: int) -> None:
        for _ in range(3):
            answer = await client.post(f"/v1/keys/{key}/encrypt", json={"plaintext": B64})
            outcomes.add(answer.status_code)
            if answer.status_code == 200 and stopped.is_set():
                late.append(f"{number}: succeeded after the disable was answered")

    async def stop() -> None:
        await asyncio.sleep(0.02)
        wanted = {200}
        for _ in range(50):
            answer = await operator.post(f"/v1/keys/{key}/disable")
            if answer.status_code in wanted:
                break
            assert answer.status_code == 503, answer.text
            if answer.json()["executed"]:  # a busy machine's audit log was late: it may have taken effect
                wanted = {200, 409}
        assert answer.status_code in wanted, answer.text
        stopped.set()

    await asyncio.gather(stop(), *(use(n) for n in range(200)))
    return late, outcomes


@pytest.mark.anyio
async def test_A_22_delete_and_rotate_race_with_use(lab: Lab) -> None:
    operator, client = lab.client("health-operator"), lab.client("health-eu-de-1")
    key = await new_key(lab, "AES_256")
    path = f"/v1/keys/{key}"
    made: list[str] = []
    bad: list[str] = []

    async def use() -> None:
        for _ in range(3):
            answer = await client.post(f"{path}/encrypt", json={"plaintext": B64})
            if answer.status_code == 200:
                made.append(answer.json()["ciphertext"])
            elif answer.json()["code"] != "key_state_invalid":
                bad.append(answer.text)

    async def rotate() -> None:
        for _ in range(5):
            assert (await operator.post(f"{path}/rotate", headers=fresh())).status_code == 200

    await asyncio.gather(rotate(), *(use() for _ in range(100)))
    assert not bad, bad[:3]
    for ciphertext in made[::10]:
        assert (await client.post("/v1/decrypt", json={"ciphertext": ciphertext})).status_code == 200
    tag = (await operator.get(path)).headers["etag"]

    async def delete() -> None:
        await asyncio.sleep(0.01)
        answer = await operator.post(
            f"{path}/schedule-deletion", json={"wait": "P7D"}, headers={**fresh(), "If-Match": tag}
        )
        assert answer.status_code == 200, answer.text

    await asyncio.gather(delete(), *(use() for _ in range(100)))
    assert not bad, bad[:3]
    assert (await client.post(f"{path}/encrypt", json={"plaintext": B64})).status_code == 409


# What each Cedar action lets a caller do: (method, route), for the routes that ask for exactly this action.
GRANTS = {
    "encrypt": {("POST", "/v1/keys/{key}/encrypt"), ("POST", "/v1/batch/encrypt")},
    "decrypt": {("POST", "/v1/decrypt"), ("POST", "/v1/batch/decrypt")},
    "unwrap": {("POST", "/v1/data-keys/unwrap"), ("POST", "/v1/batch/unwrap")},
    "generateDataKey": {("POST", "/v1/keys/{key}/data-keys"), ("POST", "/v1/batch/data-keys")},
    "rewrap": {("POST", "/v1/rewrap"), ("POST", "/v1/batch/rewrap")},
    "random": {("POST", "/v1/random")},
    "describe": {("GET", "/v1/keys/{key}"), ("GET", "/v1/keys/{key}/versions")},
    "listKeys": {("GET", "/v1/keys"), ("GET", "/v1/aliases")},
    "createKey": {("POST", "/v1/keys")},
    "createToken": {("POST", "/v1/tokens"), ("GET", "/v1/tokens"), ("DELETE", "/v1/tokens/{id}")},
    "rotate": {("POST", "/v1/keys/{key}/rotate")},
    "importKey": {("POST", "/v1/keys/{key}/import-parameters"), ("POST", "/v1/keys/{key}/import")},
    "suspend": {("POST", "/v1/keys/{key}/disable")},
    "enable": {("POST", "/v1/keys/{key}/enable")},
    "revoke": {("POST", "/v1/keys/{key}/mark-compromised")},
    "revokeVersion": {("POST", "/v1/keys/{key}/versions/{version}/revoke")},
    "scheduleDeletion": {("POST", "/v1/keys/{key}/schedule-deletion")},
    "cancelDeletion": {("POST", "/v1/keys/{key}/cancel-deletion")},
    "destroy": {("POST", "/v1/keys/{key}/destroy")},
    "setPolicy": {("POST", "/v1/keys/{key}/policy")},
    "grant": {("POST", "/v1/keys/{key}/grants"), ("DELETE", "/v1/keys/{key}/grants/{grant}")},
    "readGrants": {("GET", "/v1/keys/{key}/grants")},
    "updateKey": {("PATCH", "/v1/keys/{key}")},
    "setAlias": {("PUT", "/v1/aliases/{name}")},
    "explainDecision": {("GET", "/v1/policy/decisions/{decision}"), ("POST", "/v1/policy/simulate")},
    "requestException": {("POST", "/v1/exceptions")},
    "revokeException": {("DELETE", "/v1/exceptions/{exception}")},
    "readExceptions": {("GET", "/v1/exceptions"), ("GET", "/v1/exceptions/{exception}")},
    "readTransfers": {("GET", "/v1/transfers"), ("GET", "/v1/transfer-agreements")},
    "readAudit": {
        *{("GET", f"/v1/audit/{what}") for what in ("records", "status", "checkpoint", "checkpoint/{size}")},
        *{("GET", f"/v1/audit/{what}") for what in ("tenants/{tenant}/bundle", "tile/{level}/{tile}")},
        ("GET", "/v1/audit/tile/entries/{tile}"),
    },
}
ON_TENANT = {"random", "listKeys", "createKey", "createToken", "readAudit", "explainDecision", "readTransfers"} | {
    "requestException",
    "revokeException",
    "readExceptions",
}
UNTRIED = {
    ("DELETE", "/v1/tokens/{id}"),
    ("POST", "/v1/keys/{key}/cancel-deletion"),
    ("DELETE", "/v1/exceptions/{exception}"),  # tests/service/test_exceptions.py has exceptions
    ("GET", "/v1/exceptions/{exception}"),
    ("DELETE", "/v1/keys/{key}/grants/{grant}"),  # tests/service/test_grants.py has grants to take back
    ("GET", "/v1/policy/decisions/{decision}"),  # tests/service/test_explain.py has decisions to ask for
}
OPEN = {"/v1/whoami", "/v1/tenants", "/v1/regions", "/v1/policy", "/v1/hsms"}  # what every credential may know


@pytest.mark.anyio
async def test_A_01_each_permission_opens_its_own_routes_and_no_other(lab: Lab, tmp_path: Path) -> None:
    """One permission after the other in a bundle of its own, every route each time: dry runs, so nothing changes."""
    things = await Things(lab).make()
    kms, before = lab.node.kms, lab.node.kms.policy
    wrong = []
    try:
        for action, granted in GRANTS.items():
            bundle = tmp_path / action
            shutil.copytree(lab.files.config.policy.bundle, bundle)
            scope = '== Tenant::"health"' if action in ON_TENANT else 'in Tenant::"health"'
            (bundle / "tenants/health/00-roles.cedar").write_text(
                f'@id("only") @layer("tenant") permit (principal, action == Action::"{action}", resource {scope})'
                ' when { principal.tenant == Tenant::"health" };'
            )
            kms.policy = Policy.load(bundle)
            for route in ROUTES:
                if route.public or route.path in OPEN or route.method == "DELETE":
                    continue
                path = route.path.format(
                    key=things.key, version=1, name="nothing", id="abcdefgh", operation=OPERATION, **AUDITED
                )
                body = body_of(route.path, route.method, things.key, things.ciphertext, things.wrapped)
                for name in ("health-eu-de-1", "health-operator"):
                    query = "" if route.method == "GET" else "?dry_run=true"
                    answer = shown(await send(lab, name, route.method, path + query, body))
                    if "results" in answer:
                        result = answer["results"][0]
                        answer = result.get("problem") or result.get("result")
                    opened = answer.get("would") == "allow" or not ({"code", "would"} & set(answer))
                    opened |= answer.get("code") == "approval_refused"  # it may be asked for; nobody here could approve
                    if opened and (route.method, route.path) not in granted:
                        wrong.append(f"{action} opened {route.method} {route.path} for {name}")
    finally:
        kms.policy = before
    assert not wrong, wrong[:5]


@pytest.mark.anyio
async def test_A_01_the_permission_itself_does_open_its_route(lab: Lab) -> None:
    """The other half: with the ordinary bundle each of these is allowed to somebody."""
    things = await Things(lab).make()
    closed = []
    for action, granted in GRANTS.items():
        for method, template in granted - UNTRIED:
            path = template.format(
                key=things.key, version=1, name="fresh", id="abcdefgh", operation=OPERATION, **AUDITED
            )
            body = body_of(template, method, things.key, things.ciphertext, things.wrapped)
            opened = False
            for name in ("health-eu-de-1", "health-operator", "health-officer", "health-auditor"):
                query = "" if method == "GET" else "?dry_run=true"
                answer = shown(await send(lab, name, method, path + query, body))
                if "results" in answer:
                    answer = answer["results"][0].get("problem") or answer["results"][0].get("result")
                opened |= answer.get("would") == "allow" or answer.get("code") == "etag_mismatch" or "items" in answer
                opened |= not ({"code", "would"} & set(answer))
                opened |= answer.get("code") == "approval_refused"
            if not opened:
                closed.append((action, method, template))
    assert not closed, closed


def test_A_01_every_route_of_the_document_is_in_the_table() -> None:
    described = {(m.upper(), p) for p, ops in document()["paths"].items() for m in ops}
    assert described == {(r.method, r.path) for r in ROUTES}
