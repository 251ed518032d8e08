"""Transfers through the API: one record per crossing and per denial, an end that stops within a second, and the report."""

from __future__ import annotations

import asyncio
import base64
import copy
import dataclasses
import itertools
import math
import shutil
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from msgspec import structs

from databases import address
from harness import Files, Lab, lab_of, new_key
from policy import Policy
from policy.transfers import instant
from service.protocols import wire

B64 = base64.b64encode(b"hello").decode()
WIDE = {"reach": ["DE", "FR", "US"], "egress": ["DE", "FR", "US"], "tier": 3, "purposes": ["care", "billing"]}
ENOUGH = {"from": "FR", "to": "DE", "tenants": ["health"], "purposes": ["care"]}
BACK = {**ENOUGH, "from": "DE", "to": "FR"}
pytestmark = pytest.mark.anyio
Agreed = Callable[..., None]


@pytest.fixture(scope="module")
async def borders(dev_files: Files, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    """A node over a database of its own: the report counts what happens here and nothing else."""
    directory = tmp_path_factory.mktemp("borders")
    config = dev_files.config
    node = structs.replace(config.node, state_dir=directory)
    database = structs.replace(config.database, url=address(directory))
    files = dataclasses.replace(dev_files, config=structs.replace(config, node=node, database=database))
    async with lab_of(files) as made:
        yield made


@pytest.fixture
def agreed(borders: Lab, tmp_path: Path) -> Any:
    """Put a charter in force that registers exactly these agreements; the installation's officer is its auditor there."""
    kms = borders.node.kms
    before, numbers = kms.policy, itertools.count()

    def put(**agreements: dict[str, Any]) -> Policy:
        bundle = shutil.copytree(borders.files.config.policy.bundle, tmp_path / f"bundle{next(numbers)}")
        charter = yaml.safe_load((bundle / "charter.yaml").read_text())
        given = {"legal_basis": "treaty", "legal_ref": "Treaty of 1963", "parties": ["one", "two"]}
        given |= {"not_before": "2026-01-01T00:00:00Z", "not_after": "2090-01-01T00:00:00Z"}
        # Each with lists of its own: what stands there twice is written as an alias, which no bundle may have.
        charter["transfer_agreements"] = {n: copy.deepcopy({**given, **about}) for n, about in agreements.items()}
        (bundle / "charter.yaml").write_text(yaml.safe_dump(charter, sort_keys=False))
        members = bundle / "installation/members.yaml"
        members.write_text(members.read_text().replace("role: officer", "role: auditor"))
        kms.policy = Policy.load(bundle, known=before, sample=0)
        kms.decisions.bundles.starting(kms.policy, at=borders.clock())
        return kms.policy

    yield put
    kms.policy = before


async def ending(borders: Lab, agreed: Agreed, edge: str = "not_after") -> int:
    """A second that comes soon, at which an agreement that is in force from now on ends or begins (s)."""
    for lead in (2, 4, 8, 16, 32):  # trying out a charter takes a busy machine longer than the agreement would last
        at = borders.clock() // 1_000_000 + lead
        agreed(care={**ENOUGH, edge: instant(at)})
        await asyncio.sleep(0)
        if borders.clock() < at * 1_000_000 - 800_000:
            break
    return at


async def encrypt(lab: Lab, key: str, who: str = "health-eu-fr-1", purpose: str = "care") -> httpx.Response:
    body = {"plaintext": B64, "purpose": purpose}
    return await lab.client(who).post(f"/v1/keys/{key}/encrypt", json=body)


def records(lab: Lab, key: str) -> list[dict[str, Any]]:
    """Every record about uses of a key, oldest first."""
    found = lab.node.kms.search.records(key=key, limit=500)
    return [f.record for f in reversed(found) if f.record["op"] != "create_key"]


async def reported(lab: Lab, who: str = "health-auditor", **query: str) -> list[dict[str, Any]]:
    answer = await lab.client(who).get("/v1/transfers", params=query)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["items"])


async def test_a_crossing_makes_one_record_that_names_its_agreement(borders: Lab, agreed: Agreed) -> None:
    agreed(care=ENOUGH, back=BACK)
    key = await new_key(borders, "AES_256", **{**WIDE, "purposes": ["care"]})
    made = await borders.client("health-eu-fr-1").post(f"/v1/keys/{key}/encrypt", json={"plaintext": B64})
    assert made.status_code == 200, made.text
    opened = await borders.client("health-eu-fr-1").post("/v1/decrypt", json={"ciphertext": made.json()["ciphertext"]})
    assert opened.status_code == 200, opened.text
    first, second = records(borders, key)
    assert first["rule"] == ["health.workload-use", "SOV-TRANSFER/FR/DE/care"]
    assert second["rule"] == ["health.workload-use", "SOV-TRANSFER/DE/FR/back"]
    assert {r["purpose"] for r in (first, second)} == {"care"}  # though no request named it


async def test_what_stays_at_home_has_no_word_of_it(borders: Lab, agreed: Agreed) -> None:
    agreed()
    key = await new_key(borders, "AES_256", **WIDE)
    assert (await encrypt(borders, key, "health-eu-de-1")).status_code == 200
    (record,) = records(borders, key)
    assert record["rule"] == ["health.workload-use"]


@pytest.mark.parametrize(
    "agreements",
    [
        {},
        {"other": {**ENOUGH, "purposes": ["billing"]}},
        {"other": {**ENOUGH, "tenants": ["defence"]}},
        {"other": BACK},
        {"other": {**ENOUGH, "from": "US"}},
        {"over": {**ENOUGH, "not_after": "2026-01-02T00:00:00Z"}},
        {"later": {**ENOUGH, "not_before": "2089-01-01T00:00:00Z"}},
    ],
)
async def test_without_an_agreement_one_denial_is_recorded_and_no_hsm_called(
    borders: Lab, agreed: Agreed, agreements: dict[str, dict[str, Any]]
) -> None:
    agreed(**agreements)
    key = await new_key(borders, "AES_256", **WIDE)
    before = borders.node.pkcs11_calls()
    answer = await encrypt(borders, key)
    assert borders.node.pkcs11_calls() == before
    problem = answer.json()
    assert (answer.status_code, problem["code"], problem["rule"]) == (403, "transfer_not_authorised", "SOV-TRANSFER")
    assert "FR" not in answer.text  # the caller is told the rule, not the facts
    (record,) = records(borders, key)
    assert (record["out"], record["why"]) == ("denied", "transfer_not_authorised")
    assert (record["rule"], record["purpose"]) == (["SOV-TRANSFER/FR/DE"], "care")
    told = await borders.client("health-auditor").get(f"/v1/policy/decisions/{problem['decision_id']}")
    assert told.status_code == 200, told.text
    (border,) = told.json()["transfers"]
    lacking = {"other": "another purpose", "over": "ended", "later": "not yet begun"}
    own = [n for n, a in agreements.items() if a["from"] == "FR" and "health" in a["tenants"]]
    assert (border["from"], border["to"], border["agreement"]) == ("FR", "DE", None)
    assert [(a["id"], a["lacks"]) for a in border["agreements"]] == [(name, [lacking[name]]) for name in own]


@pytest.mark.parametrize("edge", ["not_after", "not_before"])
async def test_an_agreement_ends_and_begins_to_the_second(borders: Lab, agreed: Agreed, edge: str) -> None:
    key = await new_key(borders, "AES_256", **WIDE)
    at = await ending(borders, agreed, edge)
    answered = set[tuple[bool, int]]()
    while borders.clock() < at * 1_000_000 + 300_000:
        began, answer = borders.clock(), await encrypt(borders, key)
        answered.add((began >= at * 1_000_000, answer.status_code))
        await asyncio.sleep(0.02)
    assert (edge == "not_before", 200) in answered
    assert edge == "not_before" or (True, 200) not in answered
    before, after = ("ok", "denied") if edge == "not_after" else ("denied", "ok")
    found = {(r["ts"] >= at * 1_000_000, r["out"]) for r in records(borders, key)}
    assert found == {(False, before), (True, after)}


async def test_what_was_under_way_when_its_agreement_ended_is_withheld_and_did_not_cross(
    borders: Lab, agreed: Agreed
) -> None:
    kms = borders.node.kms
    without = agreed(other=BACK)
    within = agreed(care=ENOUGH)
    for _ in range(20):  # until the charter changes after the decision and before the commit
        kms.policy = within
        key = await new_key(borders, "AES_256", **WIDE)
        since = wire.moment(borders.clock())
        asked = asyncio.create_task(encrypt(borders, key))
        while not kms.log.waiting:  # most likely its record: decided, done, and not yet durable
            assert not asked.done()
            await asyncio.sleep(0)
        kms.policy = without
        answer = await asked
        assert (answer.status_code, answer.json()["code"]) == (403, "transfer_not_authorised")
        assert "ciphertext" not in answer.text
        (record,) = records(borders, key)
        if record["out"] == "ok":
            break
    assert record["out"] == "ok"
    (withheld,) = [f.record for f in kms.search.records(limit=200) if f.record.get("intent") == record["id"]]
    assert (withheld["kind"], withheld["why"]) == ("withheld", "transfer_not_authorised")
    (row,) = await reported(borders, **{"from": since})
    assert (row["agreement"], row["crossed"], row["refused"]) == ("care", 0, {"SOV-TRANSFER": 1})


async def test_a_metric_warns_before_an_agreement_ends(borders: Lab, agreed: Agreed) -> None:
    async def left() -> float:
        text = (await borders.client("platform").get("/metrics")).text
        (line,) = [t for t in text.splitlines() if t.startswith("skms_transfer_agreement_expires_seconds ")]
        return float(line.split()[1])

    now = borders.clock() // 1_000_000
    past = {**ENOUGH, "not_after": instant(now - 60)}
    later = {**ENOUGH, "not_before": instant(now + 600), "not_after": instant(now + 900)}
    agreed(past=past, later=later)
    assert await left() == math.inf
    agreed(past=past, later=later, care=ENOUGH, soon={**ENOUGH, "not_after": instant(now + 3_600)})
    assert 3_000 < await left() <= 3_600


async def test_a_batch_records_each_item_and_a_dry_run_crosses_nothing(borders: Lab, agreed: Agreed) -> None:
    agreed(care=ENOUGH)
    key = await new_key(borders, "AES_256", **WIDE)
    since = wire.moment(borders.clock())
    items = [{"plaintext": B64, "key": key, "purpose": purpose} for purpose in ("care", "billing", "care")]
    for query in ("", "?dry_run=true"):
        answer = await borders.client("health-eu-fr-1").post(f"/v1/batch/encrypt{query}", json={"items": items})
        assert answer.status_code == 200, answer.text
    assert len(records(borders, key)) == 6
    assert [
        (r["agreement"], r["purpose"], r["crossed"], r["refused"]) for r in await reported(borders, **{"from": since})
    ] == [
        (None, "billing", 0, {"SOV-TRANSFER": 1}),
        ("care", "care", 2, {}),
    ]


async def test_a_replay_decides_crossings_and_denials_the_same(borders: Lab, agreed: Agreed) -> None:
    key, began = await new_key(borders, "AES_256", **WIDE), borders.clock()
    ends = await ending(borders, agreed)
    while borders.clock() < ends * 1_000_000 + 300_000:
        await encrypt(borders, key)
        await asyncio.sleep(0.05)
    while len(records(borders, key)) < 10:  # a busy machine: so many were not asked in that time
        await encrypt(borders, key)
    assert {r["out"] for r in records(borders, key)} == {"ok", "denied"}
    made = await asyncio.to_thread(borders.node.kms.decisions.replay, tenant=None, since=began, until=borders.clock())
    assert (made.changed, made.unmade) == ([], {})
    assert made.identical == made.decisions >= 10


async def test_a_draft_that_drops_an_agreement_tells_what_it_would_stop(borders: Lab, agreed: Agreed) -> None:
    policy = agreed(care=ENOUGH, back=BACK)
    key = await new_key(borders, "AES_256", **WIDE)
    since = wire.moment(borders.clock())
    for who in ("health-eu-fr-1", "health-eu-fr-1", "health-eu-de-1"):
        assert (await encrypt(borders, key, who)).status_code == 200
    files = {path: data.decode() for path, data in policy.bundle.sources.items()}
    charter = yaml.safe_load(files["charter.yaml"])
    del charter["transfer_agreements"]["care"]
    files["charter.yaml"] = yaml.safe_dump(charter, sort_keys=False)
    body = {"files": files, "from": since, "to": wire.moment(borders.clock())}
    answer = await borders.client("health-officer").post("/v1/policy/simulate", json=body)
    assert answer.status_code == 200, answer.text
    (difference,) = answer.json()["differences"]
    assert (difference["newly"], difference["count"], difference["becomes"]) == ("denied", 2, ["SOV-TRANSFER/FR/DE"])


async def test_the_report_counts_what_happened_by_agreement_border_and_purpose(borders: Lab, agreed: Agreed) -> None:
    agreed(
        care=ENOUGH, back=BACK, us={**ENOUGH, "from": "US", "tenants": ["defence", "health"], "purposes": ["billing"]}
    )
    key = await new_key(borders, "AES_256", **WIDE)
    foreign = await new_key(borders, "AES_256", tenant="defence", **WIDE)
    since = wire.moment(borders.clock())
    made = [await encrypt(borders, key) for _ in range(3)]
    assert [a.status_code for a in made] == [200] * 3
    assert (await encrypt(borders, key, purpose="billing")).status_code == 403
    assert (await encrypt(borders, key, "health-us-mkt-1", "billing")).status_code == 200
    assert (await encrypt(borders, key, "health-eu-de-1")).status_code == 200
    assert (await encrypt(borders, foreign, "defence-us-mkt-1", "billing")).status_code == 200
    assert (await encrypt(borders, foreign, "defence-eu-fr-1")).status_code == 403
    abroad = {"ciphertext": made[0].json()["ciphertext"], "purpose": "care", "destination": ["FR"]}
    assert (await borders.client("health-eu-de-1").post("/v1/decrypt", json=abroad)).status_code == 200
    broken = {**abroad, "context": {"other": "context"}}
    assert (await borders.client("health-eu-de-1").post("/v1/decrypt", json=broken)).status_code == 400

    def told(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
        return [
            tuple(r[n] for n in ("agreement", "from", "to", "tenant", "purpose", "crossed", "refused")) for r in rows
        ]

    denied, own = {"SOV-TRANSFER": 1}, await reported(borders, **{"from": since})
    assert told(own) == [
        (None, "FR", "DE", "health", "billing", 0, denied),
        ("back", "DE", "FR", "health", "care", 1, {"invalid_ciphertext": 1}),
        ("care", "FR", "DE", "health", "care", 3, {}),
        ("us", "US", "DE", "health", "billing", 1, {}),
    ]
    times = [r["ts"] for r in records(borders, key) if r["rule"][-1] == "SOV-TRANSFER/FR/DE/care"]
    assert (own[2]["first"], own[2]["last"]) == (wire.moment(times[0]), wire.moment(times[-1]))
    assert await reported(borders, "health-officer", **{"from": since, "tenant": "health"}) == own
    everything = await reported(borders, "installation-officer", **{"from": since})
    assert told(everything)[0] == (None, "FR", "DE", "defence", "care", 0, denied)
    assert len(everything) == len(own) + 2
    theirs = await reported(borders, "installation-officer", **{"from": since, "tenant": "defence"})
    assert (
        theirs
        == [r for r in everything if r["tenant"] == "defence"]
        == await reported(borders, "defence-auditor", **{"from": since})
    )
    assert await reported(borders, **{"from": since, "to": since}) == []


async def test_who_may_not_read_transfers_learns_nothing_and_is_recorded(borders: Lab, agreed: Agreed) -> None:
    agreed(care=ENOUGH)
    for path in ("/v1/transfers", "/v1/transfer-agreements"):
        for who in ("health-eu-de-1", "health-operator", "health-custodian", "platform"):
            refused = await borders.client(who).get(path)
            assert (refused.status_code, refused.json()["code"]) == (403, "policy_denied"), (who, path)
    for tenant in ("defence", "nobody"):
        foreign = await borders.client("health-auditor").get("/v1/transfers", params={"tenant": tenant})
        assert (foreign.status_code, foreign.json()["code"]) == (404, "not_found")
        found = borders.node.kms.search.records(op="list_transfers", limit=1)[0].record
        assert (found["out"], found["why"]) == ("denied", "not_found")
    for query in ({"from": "yesterday"}, {"to": "2026-01-01T00:00:00"}, {"tenant": "A tenant"}):
        assert (await borders.client("health-auditor").get("/v1/transfers", params=query)).status_code == 422, query


async def test_each_tenant_sees_its_own_agreements(borders: Lab, agreed: Agreed) -> None:
    agreed(
        care={**ENOUGH, "tenants": ["defence", "health"]},
        over={**BACK, "not_after": "2026-01-02T00:00:00Z"},
        secret={**ENOUGH, "tenants": ["defence"]},
    )

    async def shown(who: str) -> list[tuple[Any, ...]]:
        items = (await borders.client(who).get("/v1/transfer-agreements")).raise_for_status().json()["items"]
        return [(a["id"], a["tenants"], a["in_force"]) for a in items]

    assert await shown("health-officer") == [("care", ["health"], True), ("over", ["health"], False)]
    assert await shown("defence-auditor") == [("care", ["defence"], True), ("secret", ["defence"], True)]
    assert await shown("installation-officer") == [
        ("care", ["defence", "health"], True),
        ("over", ["health"], False),
        ("secret", ["defence"], True),
    ]


async def test_two_at_once_are_two_records_and_two_counts(borders: Lab, agreed: Agreed) -> None:
    agreed(care=ENOUGH)
    key = await new_key(borders, "AES_256", **WIDE)
    since = wire.moment(borders.clock())
    answers = await asyncio.gather(*(encrypt(borders, key) for _ in range(20)))
    assert {a.status_code for a in answers} == {200}
    assert len(records(borders, key)) == 20
    (row,) = await reported(borders, **{"from": since})
    assert row["crossed"] == 20


async def test_no_freeze_stops_the_report(borders: Lab, agreed: Agreed) -> None:
    agreed(care=ENOUGH)
    officer = borders.client("defence-officer")
    scope = {"kind": "caller", "value": (await officer.get("/v1/whoami")).json()["id"]}
    frozen = await officer.post(
        "/v1/freezes",
        json={"scope": scope, "reason": {"code": "drill"}},
        headers={"Idempotency-Key": uuid.uuid4().hex},
    )
    assert frozen.status_code == 201, frozen.text
    assert (await officer.get("/v1/transfers")).status_code == 200
    assert (await officer.get("/v1/transfer-agreements")).status_code == 200
