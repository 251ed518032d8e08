"""Explaining recorded decisions: who may, what is told, what is refused rather than guessed, and that replays agree."""

from __future__ import annotations

import asyncio
import base64
import os
import uuid
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from harness import Lab, new_key
from policy.bundle import read
from service.database import open_engine
from service.protocols import wire

B64 = base64.b64encode(b"hello").decode()
pytestmark = pytest.mark.anyio


async def denied_abroad(lab: Lab) -> str:
    """The decision id of an encryption from a place that the key does not reach."""
    key = await new_key(lab, "AES_256")
    answer = await lab.client("health-eu-fr-1").post(f"/v1/keys/{key}/encrypt", json={"plaintext": B64})
    assert answer.status_code == 403, answer.text
    return str(answer.json()["decision_id"])


async def explained(lab: Lab, decision: str, name: str = "health-auditor") -> Any:
    return await lab.client(name).get(f"/v1/policy/decisions/{decision}")


async def test_an_auditor_sees_the_condition_that_failed_and_the_fix(lab: Lab) -> None:
    answer = await explained(lab, await denied_abroad(lab))
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert told["decision"]["rules"] == ["charter.caller"] == told["record"]["rule"]
    (rule,) = [r for r in told["rules"] if r["id"] == "charter.caller"]
    assert rule["clauses"][0]["leaves"][1]["expected"] == 'containsAll [Place::"eu-fr-1"]'
    assert told["fixes"][0] == {"caller.places": {"is": ["eu-fr-1"], "needs": ["eu-de-1"]}}


async def test_the_fix_that_is_named_flips_the_decision(lab: Lab) -> None:
    key = await new_key(lab, "AES_256")
    abroad = await lab.client("health-eu-fr-1").post(f"/v1/keys/{key}/encrypt", json={"plaintext": B64})
    (fix, *_) = (await explained(lab, abroad.json()["decision_id"])).json()["fixes"]
    (place,) = fix["caller.places"]["needs"]
    home = await lab.client(f"health-{place}").post(f"/v1/keys/{key}/encrypt", json={"plaintext": B64})
    assert home.status_code == 200


async def test_another_tenants_officer_learns_nothing_and_is_recorded(lab: Lab) -> None:
    decision = await denied_abroad(lab)
    foreign = await explained(lab, decision, "defence-officer")
    unknown = await explained(lab, str(uuid.uuid4()), "defence-officer")
    assert (foreign.status_code, unknown.status_code) == (404, 404)
    assert foreign.json().keys() == unknown.json().keys()
    found = (await lab.client("defence-auditor").get("/v1/audit/records", params={"op": "get_decision"})).json()[
        "items"
    ]
    assert [(r["record"]["out"], r["record"]["why"]) for r in found[:2]] == [("denied", "not_found")] * 2


async def test_a_workload_and_an_operator_may_not_ask(lab: Lab) -> None:
    decision = await denied_abroad(lab)
    for name in ("health-eu-de-1", "health-operator"):
        assert (await explained(lab, decision, name)).json()["code"] == "policy_denied"


async def test_what_typed_code_ended_is_said_not_guessed(lab: Lab) -> None:
    key = await new_key(lab, "AES_256")
    disabled = await lab.client("health-operator").post(f"/v1/keys/{key}/disable")
    assert disabled.status_code == 200, disabled.text
    stopped = await lab.client("health-eu-de-1").post(f"/v1/keys/{key}/encrypt", json={"plaintext": B64})
    assert stopped.json()["code"] == "key_state_invalid"
    wanted = {"key": key, "op": "encrypt"}
    (found,) = (await lab.client("health-auditor").get("/v1/audit/records", params=wanted)).json()["items"]
    answer = await explained(lab, found["record"]["id"])
    assert (answer.status_code, answer.json()["code"]) == (409, "facts_lost")
    assert "key_state_invalid" in answer.json()["detail"]


async def test_a_bundle_that_was_lost_is_a_typed_error(lab: Lab) -> None:
    decision = await denied_abroad(lab)
    name = f"policy-bundle/{lab.node.kms.policy.digest[:32]}"
    engine = open_engine(lab.files.config.database.url)
    where = {"name": name}
    with engine.begin() as connection:
        kept = connection.execute(sa.text("SELECT value FROM service_setting WHERE name = :name"), where).scalar_one()
        connection.execute(sa.text("DELETE FROM service_setting WHERE name = :name"), where)
    lab.node.kms.decisions.bundles.forget()
    try:
        answer = await explained(lab, decision)
    finally:
        with engine.begin() as connection:
            insert = sa.text("INSERT INTO service_setting (name, value) VALUES (:name, :value)")
            connection.execute(insert, {**where, "value": kept})
        engine.dispose()
    assert (answer.status_code, answer.json()["code"]) == (409, "bundle_lost")
    assert (await explained(lab, decision)).status_code == 200


async def test_a_recorded_period_comes_out_the_same_under_its_own_bundles(lab: Lab) -> None:
    """Some thousand decisions of all kinds, allowed and denied; `make policy-replay` makes 100,000."""
    wanted = int(os.environ.get("POLICY_REPLAY", "2000"))
    began = lab.clock()
    key = await new_key(lab, "AES_256")
    items = [{"plaintext": B64, "key": key, "purpose": p} for p in ("default", "marketing") for _ in range(250)]
    for _ in range(max(1, wanted // 1000)):
        for name in ("health-eu-de-1", "health-eu-fr-1"):
            assert (await lab.client(name).post("/v1/batch/encrypt", json={"items": items})).status_code == 200
    for name in ("health-operator", "defence-auditor", "platform"):
        for path in (f"/v1/keys/{key}", "/v1/keys", "/v1/policy", "/v1/hsms", "/v1/audit/status"):
            await lab.client(name).get(path)
    made = await asyncio.to_thread(lab.node.kms.decisions.replay, tenant=None, since=began, until=lab.clock())
    assert (made.changed, made.unmade) == ([], {})
    assert made.decisions == made.identical >= wanted


async def test_a_draft_is_compared_with_what_was_decided(lab: Lab, tmp_path: Path) -> None:
    began = wire.moment(lab.clock())
    key = await new_key(lab, "AES_256")
    home, abroad = lab.client("health-eu-de-1"), lab.client("health-eu-fr-1")
    for client in (home, home, abroad):
        await client.post(f"/v1/keys/{key}/encrypt", json={"plaintext": B64})
    files = {path: data.decode() for path, data in read(lab.files.config.policy.bundle).sources.items()}
    files["tenants/health/01-stop.cedar"] = (
        '@id("health.stop") @layer("tenant") @code("HEALTH-STOP")\n'
        'forbid (principal, action == Action::"encrypt", resource in Tenant::"health");\n'
    )
    body = {"files": files, "from": began, "to": wire.moment(lab.clock())}
    answer = await lab.client("health-officer").post("/v1/policy/simulate", json=body)
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert (told["newly_denied"], told["newly_allowed"]) == (2, 0)
    (denied,) = [d for d in told["differences"] if d["newly"] == "denied"]
    assert (denied["key"], denied["count"], denied["was"], denied["becomes"]) == (
        key,
        2,
        ["health.workload-use"],
        ["health.stop"],
    )
    files["tenants/health/01-stop.cedar"] = "permit (principal, action, resource);"
    refused = await lab.client("health-officer").post("/v1/policy/simulate", json=body)
    assert (refused.status_code, refused.json()["file"], refused.json()["line"]) == (
        422,
        "tenants/health/01-stop.cedar",
        1,
    )
    assert "health.stop" not in lab.node.kms.policy.bundle.rules
