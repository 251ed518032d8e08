"""Explanations: every rule that concerns a request, the values it looked at, and fixes that flip the decision."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from policy import Caller, KeyFacts, Policy, Request, TenantFacts
from policy.bundle import SHIPPED
from policy.explain import explain, shown
from policy.selftest import requests
from policy.written import RequestMalformed, digest, read, written
from service.cli.commands import app

HOME = frozenset({"eu-de-1"})
KEY = KeyFacts(
    id="6f1c0000-0000-4000-8000-000000000001",
    tenant="health",
    tier=2,
    residency=HOME,
    execution=HOME,
    reach=HOME,
    egress=HOME,
    failover=frozenset(),
    shared_with=frozenset(),
    purposes=("billing",),
    state="active",
)
WORKLOAD = Caller(
    id="mtls:eu-de-1.gov.example:/health/app",
    kind="workload",
    tenant="health",
    roles=frozenset({"workload"}),
    places=HOME,
    proof=3,
    authn="mtls",
)
ENCRYPT = Request(
    caller=WORKLOAD, action="encrypt", resource=KEY, now=1_800_000_000, hsm="eu-de-1", via=HOME, purpose="billing"
)


@pytest.fixture(scope="module")
def shipped() -> Policy:
    return Policy.load(SHIPPED)


def test_an_allowed_request_names_the_permit_and_needs_no_fix(shipped: Policy) -> None:
    told = explain(shipped, ENCRYPT)
    assert told.decision.allowed
    assert [r.rule.id for r in told.rules if r.applied] == ["health.workload-use"]
    assert told.fixes == ()


def test_a_denial_shows_the_leaf_that_failed_with_its_value(shipped: Policy) -> None:
    abroad = dataclasses.replace(ENCRYPT, caller=dataclasses.replace(WORKLOAD, places=frozenset({"eu-fr-1"})))
    told = explain(shipped, abroad)
    (rule,) = [r for r in told.rules if r.applied and r.rule.effect == "forbid"]
    assert rule.rule.id == "charter.caller"
    leaf = rule.clauses[0].leaves[1]
    assert (leaf.text, leaf.value, leaf.expected, leaf.holds) == (
        "resource.reach.containsAll(context.caller)",
        ['Place::"eu-de-1"'],
        'containsAll [Place::"eu-fr-1"]',
        False,
    )
    assert [dict(fix.changes) for fix in told.fixes] == [{"caller.places": (["eu-fr-1"], ["eu-de-1"])}]


def test_every_fix_that_is_named_flips_the_decision(shipped: Policy) -> None:
    flipped = 0
    for request in itertools.islice(requests(shipped.bundle, 100), 100):
        for fix in explain(shipped, request).fixes if not shipped.decide(request).allowed else ():
            assert shipped.decide(fix.request).allowed, (request, fix.changes)
            flipped += 1
    assert flipped > 40


def test_two_facts_that_fail_together_are_named_together(shipped: Policy) -> None:
    wrong = dataclasses.replace(ENCRYPT, purpose="marketing", caller=dataclasses.replace(WORKLOAD, proof=0))
    (first, *_) = explain(shipped, wrong).fixes
    assert dict(first.changes) == {"caller.proof": (0, 3), "purpose": ("marketing", "billing")}


def test_what_applied_is_what_decided(shipped: Policy) -> None:
    for request in itertools.islice(requests(shipped.bundle, 60), 60):
        told = explain(shipped, request)
        applied = [r.rule for r in told.rules if r.applied]
        forbids = [r.id for r in applied if r.effect == "forbid"]
        deciding = set(forbids or [r.id for r in applied if r.effect == "permit"])
        assert set(told.decision.rules) <= deciding or told.decision.rule_code in {"TOKEN-SCOPE", "DEFAULT"}
        assert told.decision.allowed is (bool(deciding) and not forbids)


def test_rules_of_another_tenant_are_not_told(shipped: Policy) -> None:
    text = json.dumps(shown(explain(shipped, ENCRYPT)))
    assert "health.workload-use" in text
    assert "defence" not in text


def test_a_request_survives_its_json(shipped: Policy) -> None:
    for request in itertools.islice(requests(shipped.bundle, 200), 200):
        again = read(json.loads(json.dumps(written(request))))
        assert again == request
        assert digest(again) == digest(request)


def test_a_digest_covers_every_fact_but_name_and_time() -> None:
    seen = {digest(ENCRYPT)}
    assert digest(dataclasses.replace(ENCRYPT, now=2)) in seen
    assert digest(dataclasses.replace(ENCRYPT, caller=dataclasses.replace(WORKLOAD, id="mtls:a:/health/b"))) in seen
    others: list[Request] = [
        dataclasses.replace(ENCRYPT, resource=TenantFacts("health")),
        dataclasses.replace(ENCRYPT, resource=dataclasses.replace(KEY, state="suspended")),
        dataclasses.replace(ENCRYPT, caller=dataclasses.replace(WORKLOAD, scopes=frozenset())),
        dataclasses.replace(ENCRYPT, caller=dataclasses.replace(WORKLOAD, proof=4)),
        *(dataclasses.replace(ENCRYPT, **changed) for changed in _other_facts()),
    ]
    assert len(seen.union(map(digest, others))) == len(others) + 1


def _other_facts() -> list[dict[str, Any]]:
    some = frozenset({"eu-fr-1"})
    sets = [{name: some} for name in ("via", "dest", "target", "waived_reach", "waived_egress")]
    return [*sets, {"hsm": ""}, {"failover": True}, {"purpose": ""}, {"reason": "x"}, {"approvals": 1}]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"extra": 1}, "extra"),
        ({"now": "soon"}, "now"),
        ({"approvals": True}, "approvals"),
        ({"caller": {"id": "x"}}, "caller"),
        ({"resource": {"type": "Vault", "id": "x"}}, "resource.type"),
        ({"via": "eu-de-1"}, "via"),
    ],
)
def test_a_malformed_request_names_its_field(change: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestMalformed, match=f"^{named}"):
        read({**written(ENCRYPT), **change})


def test_a_draft_is_tried_offline_and_a_malformed_one_is_refused_with_its_line(tmp_path: Path) -> None:
    draft, asked = tmp_path / "draft", tmp_path / "request.json"
    shutil.copytree(SHIPPED, draft, ignore=shutil.ignore_patterns("cases"))
    asked.write_text(json.dumps(written(ENCRYPT)))
    simulate = ["policy", "simulate", "--bundle", str(draft), "--request", str(asked)]
    assert CliRunner().invoke(app, simulate).exit_code == 0
    rules = draft / "tenants/health/00-roles.cedar"
    rules.write_text(rules.read_text().replace('Role::"health/workload"', 'Role::"health/none"'))
    done = CliRunner().invoke(app, ["-o", "json", *simulate])
    assert done.exit_code == 3
    assert json.loads(done.stdout)["fixes"][0]["caller.role"]["needs"] == ["workload", "none"]
    rules.write_text(rules.read_text().replace("principal.tenant", "principal.tenannt", 1))
    refused = CliRunner().invoke(app, simulate)
    assert isinstance(refused.exception, Exception)
    assert "tenants/health/00-roles.cedar:2" in str(refused.exception)
