"""Explanations: every rule that concerns a request, the values it looked at, and fixes that flip the decision."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import cedarpy
import pytest
from typer.testing import CliRunner

from policy import Attest, Caller, KeyFacts, Policy, Request, TenantFacts
from policy.bundle import SHIPPED, made
from policy.exceptions import Waiver
from policy.explain import MAX_FIXES, explain, fixes, said, shown
from policy.grants import Grant
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
WORKLOAD_UID = 'Workload::"mtls:eu-de-1.gov.example:/health/app"'
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


# ---- what is told of a rule ------------------------------------------------------------------------------------------


SPELLED = [
    "context.failover",
    "!context.failover",
    "!(context.now == 1)",
    "-context.now < 0",
    "-(context.now + 1) < 0",
    "context.now + 1 * context.approvals - 2 >= 0",
    "(context.now + 1) * context.approvals != 2",
    "context.now <= 1 && context.now > 0",
    "context.failover || (context.now < 1 && context.approvals == 2)",
    "(context.failover || context.now < 1) && context.approvals == 2",
    "if context.failover then context.now == 1 else context.now == 2",
    "(if context.failover then 1 else 2) == 1",
    "resource.reach.containsAll(context.via) && resource.reach.containsAny(context.dest)",
    "resource.purposes.contains(context.purpose) && !resource.reach.isEmpty()",
    'context.purpose == "say \\"no\\""',
    'context.purpose like "a*b"',
    'principal in Role::"health/x" && principal in [Role::"health/y", Tenant::"health"]',
    "principal is Operator || principal has clearance",
    'principal is Operator in Role::"health/x"',
    '["a", "b"].contains(context.reason) && [1, context.now].contains(2)',
    'context.attest == {level: 1, ageS: 2, "tcbOk": true}',
    "{a: 1, b: {c: context.now}}.b.c == 1",
    'principal == Workload::"a" || action == Action::"encrypt" || action in Action::"use"',
]


def parsed(condition: str) -> Any:
    text = cedarpy.policies_to_json_str(f"permit (principal, action, resource) when {{ {condition} }};")
    return json.loads(text)["staticPolicies"]["policy0"]["conditions"][0]["body"]


@pytest.mark.parametrize("condition", SPELLED)
def test_a_condition_is_told_as_text_that_means_the_same(condition: str) -> None:
    assert parsed(said(parsed(condition))) == parsed(condition)


def test_every_condition_that_is_shipped_is_told_as_text_that_means_the_same(shipped: Policy) -> None:
    bodies = [c["body"] for rule in shipped.told for c in rule.est["conditions"]]
    assert len(bodies) > 20
    assert [parsed(said(body)) for body in bodies] == bodies


def with_rules(shipped: Policy, *rules: str, file: str = "tenants/health/99-more.cedar") -> Policy:
    return Policy(made({**shipped.bundle.sources, file: "\n".join(rules).encode()}, known=shipped.bundle))


def forbid(conditions: str, head: str = 'principal, action, resource is Key in Tenant::"health"') -> str:
    return f'@id("health.more") @layer("tenant") @code("X-YZ") forbid ({head}) {conditions};'


@pytest.mark.parametrize(
    ("condition", "leaf"),
    [
        ("context.now == 5", ("context.now == 5", 1_800_000_000, "== 5", False)),
        ("context.now != 5", ("context.now != 5", 1_800_000_000, "!= 5", True)),
        ("resource.tier < 3", ("resource.tier < 3", 2, "< 3", True)),
        ("resource.tier >= 3", ("resource.tier >= 3", 2, ">= 3", False)),
        ('context.purpose == "x"', ('context.purpose == "x"', "billing", '== "x"', False)),
        (
            'context.via.contains(Place::"no-1")',
            ('context.via.contains(Place::"no-1")', ['Place::"eu-de-1"'], 'contains Place::"no-1"', False),
        ),
        (
            "resource.reach.containsAny(context.via)",
            (
                "resource.reach.containsAny(context.via)",
                ['Place::"eu-de-1"'],
                'containsAny [Place::"eu-de-1"]',
                True,
            ),
        ),
        ("context.dest.isEmpty()", ("context.dest.isEmpty()", [], "isEmpty", True)),
        ("context.failover", ("context.failover", False, "true", False)),
        ('context.purpose like "b*"', ('context.purpose like "b*"', "billing", '"b*"', True)),
        ("principal is Operator", ("principal is Operator", WORKLOAD_UID, "Operator", False)),
        ("principal has home", ("principal has home", None, "has home", True)),
        (
            'principal in Role::"health/x"',
            ('principal in Role::"health/x"', WORKLOAD_UID, 'in Role::"health/x"', False),
        ),
        (
            "context.attest == {level: 0, ageS: 0, tcbOk: false}",
            (
                'context.attest == {"ageS": 0, "level": 0, "tcbOk": false}',
                {"level": 0, "ageS": 0, "tcbOk": False},
                '== {"ageS": 0, "level": 0, "tcbOk": false}',
                True,
            ),
        ),
    ],
)
def test_a_leaf_tells_the_value_that_was_looked_at_and_what_is_asked_of_it(
    shipped: Policy, condition: str, leaf: tuple[str, Any, str, bool]
) -> None:
    told = explain(with_rules(shipped, forbid(f"when {{ {condition} }}")), ENCRYPT)
    (rule,) = [r for r in told.rules if r.rule.id == "health.more"]
    (clause,) = rule.clauses
    (found,) = clause.leaves
    assert (found.text, found.value, found.expected, found.holds) == leaf
    assert (clause.kind, clause.text, clause.holds) == ("when", leaf[0], leaf[3])
    assert rule.applied is leaf[3]
    unless = explain(with_rules(shipped, forbid(f"unless {{ {condition} }}")), ENCRYPT)
    (rule,) = [r for r in unless.rules if r.rule.id == "health.more"]
    assert (rule.clauses[0].kind, rule.clauses[0].holds, rule.applied) == ("unless", not leaf[3], not leaf[3])


def test_each_leaf_of_a_condition_is_told_and_one_that_errs_as_such(shipped: Policy) -> None:
    condition = (
        "context.failover && (if resource.tier == 1 then context.now > 1 else !(context.now < 2)) "
        "|| context.now * 9000000000000000000 > 0"
    )
    (rule,) = [
        r
        for r in explain(with_rules(shipped, forbid(f"when {{ {condition} }}")), ENCRYPT).rules
        if r.rule.id == "health.more"
    ]
    (clause,) = rule.clauses
    assert [(leaf.text, leaf.holds) for leaf in clause.leaves] == [
        ("context.failover", False),
        ("resource.tier == 1", False),
        ("context.now > 1", True),
        ("context.now < 2", False),
        ("(context.now * 9000000000000000000) > 0", None),
    ]
    assert (clause.holds, rule.applied) == (None, False)
    assert clause.leaves[4].value is None


@pytest.mark.parametrize(
    ("head", "leaves"),
    [
        ('principal, action, resource in Tenant::"health"', [("resource in", True)]),
        (
            f'principal == {WORKLOAD_UID}, action, resource in Tenant::"health"',
            [("principal ==", True), ("resource in", True)],
        ),
        (
            'principal == Workload::"b", action, resource in Tenant::"health"',
            [("principal ==", False), ("resource in", True)],
        ),
        (
            'principal in Role::"health/x", action, resource in KeyRing::"health/r"',
            [("principal in", False), ("resource in", False)],
        ),
        (
            'principal is Workload in Role::"health/workload", action in Action::"use", resource in Tenant::"health"',
            [("principal in", True), ("resource in", True)],
        ),
        ('principal, action == Action::"decrypt", resource in Tenant::"health"', None),
        ('principal is Operator, action, resource in Tenant::"health"', None),
        ('principal, action, resource is Tenant in Tenant::"health"', None),
    ],
)
def test_a_rules_head_is_told_if_it_is_about_this_action_and_these_kinds(
    shipped: Policy, head: str, leaves: list[tuple[str, bool]] | None
) -> None:
    told = [r for r in explain(with_rules(shipped, forbid("", head)), ENCRYPT).rules if r.rule.id == "health.more"]
    if leaves is None:
        assert told == []
        return
    assert [(" ".join(leaf.text.split()[:2]), leaf.holds) for leaf in told[0].head] == leaves
    assert told[0].applied == all(holds for _, holds in leaves)
    for leaf in told[0].head:
        ancestors = {*leaf.value} if isinstance(leaf.value, list) else {leaf.value}
        assert leaf.expected == leaf.text.partition(" ")[2]
        assert (leaf.expected.partition(" ")[2] in ancestors) is leaf.holds


def test_a_rule_of_another_key_is_not_told(shipped: Policy) -> None:
    other = KEY.id.replace("1", "2")
    for name, told in ((KEY.id, True), (other, False)):
        rule = f'@id("key.more") @layer("key") @code("X-YZ") forbid (principal, action, resource == Key::"{name}");'
        policy = with_rules(shipped, rule, file=f"keys/{name}.cedar")
        assert ("key.more" in {r.rule.id for r in explain(policy, ENCRYPT).rules}) is told


def test_facts_of_a_wrong_type_are_denied_and_have_no_rules(shipped: Policy) -> None:
    told = explain(shipped, dataclasses.replace(ENCRYPT, approvals=True))
    assert (told.decision.rule_code, told.rules, told.fixes) == ("POLICY-ERROR", (), ())


def test_an_explanation_is_shown_with_all_that_it_tells(shipped: Policy) -> None:
    abroad = dataclasses.replace(ENCRYPT, caller=dataclasses.replace(WORKLOAD, places=frozenset({"eu-fr-1"})))
    us = 1_000_000
    at = ENCRYPT.now * us
    grant = Grant("g1", "health", KEY.id, WORKLOAD.id, ("encrypt",), "billing", at + us, "officer", at, max_uses=3)
    conditional = dataclasses.replace(grant, id="g2", context_subset={"a": "b"}, ends=at)
    exact = dataclasses.replace(grant, id="g3", context_equals={"a": "b"})
    waiver = Waiver(
        *("w1", "health", (KEY.id,), "reach", ("eu-fr-1",), "billing", "eu-law", "Article 49", at, at + us, 2)
    )
    told = shown(explain(shipped, abroad, grants=[grant, conditional, exact], exceptions=[waiver]))
    assert told["decision"] == {
        "allowed": False,
        "code": "region_not_allowed",
        "rule": "SOV-CALLER-PLACE",
        "rules": ["charter.caller"],
        "policy": shipped.digest,
    }
    assert told["request"] == written(abroad)
    assert told["fixes"] == [{"caller.places": {"is": ["eu-fr-1"], "needs": ["eu-de-1"]}}]
    assert [(g["id"], g["context"], g["decided"], g["lacks"]) for g in told["grants"]] == [
        ("g1", "any", False, []),
        ("g2", "subset", False, ["ended"]),
        ("g3", "equals", False, []),
    ]
    assert {n: told["grants"][0][n] for n in ("operations", "purpose", "max_uses", "granter", "not_after")} == {
        "operations": ["encrypt"],
        "purpose": "billing",
        "max_uses": 3,
        "granter": "officer",
        "not_after": "2027-01-15T08:00:01Z",
    }
    assert told["exceptions"] == [
        {
            "id": "w1",
            "kind": "reach",
            "places": ["eu-fr-1"],
            "purpose": "billing",
            "legal_basis": "eu-law",
            "legal_ref": "Article 49",
            "not_before": "2027-01-15T08:00:00Z",
            "not_after": "2027-01-15T08:00:01Z",
            "lacks": [],
        }
    ]
    (rule,) = [r for r in told["rules"] if r["id"] == "charter.caller"]
    assert (rule["effect"], rule["code"], rule["file"], rule["applied"]) == (
        *("forbid", "SOV-CALLER-PLACE", "charter/00-charter.cedar", True),
    )
    assert rule["line"] == shipped.bundle.rules["charter.caller"].line
    assert rule["clauses"][0]["leaves"][0] == {
        "text": "context.caller.isEmpty()",
        "value": ['Place::"eu-fr-1"'],
        "expected": "isEmpty",
        "holds": False,
    }
    allowed = shown(explain(shipped, ENCRYPT))
    assert (allowed["decision"]["code"], allowed["decision"]["rule"], allowed["fixes"]) == (None, None, [])
    (permit,) = [r for r in allowed["rules"] if r["id"] == "health.workload-use"]
    assert (permit["code"], [leaf["text"] for leaf in permit["head"]]) == (
        *(None, ['principal in Role::"health/workload"', 'resource in Tenant::"health"']),
    )


# ---- what would help -------------------------------------------------------------------------------------------------


def key(**other: Any) -> KeyFacts:
    return dataclasses.replace(KEY, **other)


def who(**other: Any) -> Caller:
    return dataclasses.replace(WORKLOAD, **other)


OPERATOR = who(kind="operator", roles=frozenset({"operator"}))
OUT = {"action": "decrypt", "dest": HOME, "reason": "customer-initiated"}
MOVED = {**OUT, "action": "reEncrypt", "target": HOME}
TWO = frozenset({"eu-de-1", "eu-de-2"})


@pytest.mark.parametrize(
    ("facts", "changes"),
    [
        ({"caller": who(roles=frozenset())}, [{"caller.role": (["workload", ""], ["workload", "workload"])}]),
        ({"caller": OPERATOR}, [{"caller.role": (["operator", "operator"], ["workload", "workload"])}]),
        ({"caller": who(scopes=frozenset({"sign"}))}, [{"caller.scopes": (["sign"], ["encrypt", "sign"])}]),
        ({"caller": who(proof=0)}, [{"caller.proof": (0, 3)}, {"caller.proof": (0, 4)}]),
        ({"caller": who(proof=3), "resource": key(tier=1)}, [{"caller.proof": (3, 4)}]),
        (
            {"caller": who(places=frozenset()), "resource": key(reach=TWO)},
            [{"caller.places": ([], ["eu-de-1"])}, {"caller.places": ([], ["eu-de-2"])}],
        ),
        ({"hsm": "eu-fr-1"}, [{"hsm": ("eu-fr-1", "eu-de-1")}]),
        ({"via": frozenset({"eu-fr-1"})}, [{"via": (["eu-fr-1"], ["eu-de-1"])}]),
        ({**OUT, "dest": frozenset({"eu-fr-1"})}, [{"dest": (["eu-fr-1"], ["eu-de-1"])}]),
        ({**MOVED, "target": frozenset()}, [{"target": ([], ["eu-de-1"])}]),
        ({"purpose": "x"}, [{"purpose": ("x", "billing")}]),
        ({**OUT, "reason": "unspecified"}, [{"reason": ("unspecified", "customer-initiated")}]),
        ({"resource": key(state="suspended")}, [{"key.state": ("suspended", "active")}]),
        (
            {"caller": OPERATOR, "action": "destroy"},
            [{"approvals": (0, 2)}, {"approvals": (0, 3)}],
        ),
        (
            {
                "caller": dataclasses.replace(OPERATOR, proof=4),
                "action": "destroy",
                "resource": key(tier=1),
                "approvals": 2,
            },
            [{"approvals": (2, 3)}],
        ),
        (
            {**OUT, "caller": who(proof=4), "resource": key(tier=1)},
            [{"attest": ({"level": 0, "age_s": 0, "tcb_ok": False}, {"level": 2, "age_s": 0, "tcb_ok": True})}],
        ),
        (
            {**OUT, "caller": who(proof=4), "resource": key(tier=1), "attest": Attest(3, 301, tcb_ok=True)},
            [{"attest": ({"level": 3, "age_s": 301, "tcb_ok": True}, {"level": 2, "age_s": 0, "tcb_ok": True})}],
        ),
        (
            {**OUT, "caller": who(proof=4), "resource": key(tier=1), "attest": Attest(1, 0, tcb_ok=True)},
            [{"attest": ({"level": 1, "age_s": 0, "tcb_ok": True}, {"level": 2, "age_s": 0, "tcb_ok": True})}],
        ),
        ({"resource": key(failover=HOME)}, [{"failover": (False, True)}]),
        (
            {"action": "createKey", "resource": TenantFacts("health")},
            [{"caller.role": (["workload", "workload"], ["operator", "operator"])}],
        ),
        ({"action": "nonsense"}, []),
        ({"caller": who(tenant="ghost")}, []),
    ],
)
def test_the_fact_that_is_wrong_is_the_one_that_is_named(
    shipped: Policy, facts: dict[str, Any], changes: list[dict[str, Any]]
) -> None:
    request = dataclasses.replace(ENCRYPT, **facts)
    found = list(fixes(shipped, request))
    assert [dict(fix.changes) for fix in found] == changes
    for fix in found:
        assert shipped.decide(fix.request).allowed


def test_nobody_is_told_to_take_another_tenants_role_or_one_that_nobody_can_be_given(shipped: Policy) -> None:
    rotate = dataclasses.replace(ENCRYPT, action="rotate")
    roles = [fix.changes["caller.role"][1] for fix in fixes(shipped, rotate)]
    assert roles == [["operator", "operator"]]  # the scheduler may rotate too, and is no role of a person
    theirs = Policy.stored(
        {
            **shipped.bundle.sources,
            "tenants/defence/99-more.cedar": b'@id("d.x") @layer("tenant") permit (principal in Role::"defence/signer", '
            b'action, resource in Tenant::"defence") when { principal.tenant == Tenant::"defence" };',
        }
    )
    asked = dataclasses.replace(ENCRYPT, caller=dataclasses.replace(WORKLOAD, roles=frozenset()))
    assert [fix.changes["caller.role"][1] for fix in fixes(theirs, asked)] == [["workload", "workload"]]
    own = dataclasses.replace(asked, caller=dataclasses.replace(asked.caller, tenant="defence"))
    own = dataclasses.replace(own, resource=key(tenant="defence"))
    assert [fix.changes["caller.role"][1][1] for fix in fixes(theirs, own)] == ["signer", "workload"]


def test_as_few_facts_as_help_are_named_and_at_most_eight_ways(shipped: Policy) -> None:
    many = frozenset(f"p{n}" for n in range(12))
    wide = dataclasses.replace(ENCRYPT, resource=key(reach=many | HOME), caller=who(places=frozenset()), hsm="eu-fr-1")
    found = list(fixes(shipped, dataclasses.replace(wide, resource=key(reach=HOME | {"eu-de-2"}))))
    assert [sorted(fix.changes) for fix in found] == [["caller.places", "hsm"]] * 2
    allied = shipped.registry.expand(["DE"]) | {f"{n}" for n in range(9)}
    everywhere = dataclasses.replace(ENCRYPT, resource=key(residency=allied), hsm="none")
    assert len(list(fixes(shipped, everywhere))) <= MAX_FIXES
    worse = dataclasses.replace(
        ENCRYPT, caller=who(places=frozenset(), proof=0, roles=frozenset()), hsm="none", purpose="x"
    )
    assert list(fixes(shipped, worse)) == []  # five facts at once are no advice


# ---- requests as JSON ------------------------------------------------------------------------------------------------


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
        ({"caller": 5}, "caller: must be an object"),
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
