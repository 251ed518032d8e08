"""What is proved of a bundle: the shipped charter keeps its promises, a sabotaged one is refuted by a real request."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import z3

from policy import Policy, selftest
from policy.bundle import SHIPPED, made, read, write_development
from policy.proofs import PROMISES, Formula, NotEncodable, Proof, World, difference, idle, prove, told, unforbidden
from policy.request import KeyFacts, Request

CHARTER = "charter/00-charter.cedar"
ROLES = "tenants/health/00-roles.cedar"


def edited(directory: Path, file: str, old: str, new: str) -> Path:
    """The shipped bundle with one edit, its cases left out: they would refuse most of these before any proof."""
    made = directory / "bundle"
    shutil.copytree(SHIPPED, made, ignore=shutil.ignore_patterns("cases"))
    text = (made / file).read_text()
    assert old in text
    (made / file).write_text(text.replace(old, new, 1))
    return made


def broken(proofs: list[Proof]) -> set[str]:
    assert not any(p.unknown for p in proofs)
    return {p.promise.code for p in proofs if p.refuted is not None}


def test_the_shipped_charter_keeps_every_promise_it_makes() -> None:
    proofs = prove(read(SHIPPED))
    assert len(proofs) == len(PROMISES) >= 16
    assert [p.promise.name for p in proofs if not p.holds] == []


def test_a_development_bundle_keeps_all_but_what_it_says_it_waives(tmp_path: Path) -> None:
    write_development(tmp_path / "dev", trust_domains={}, members={}, platform_member="mtls:a:/platform")
    proofs = prove(read(tmp_path / "dev"))
    assert len(proofs) == len(PROMISES) - 2
    assert all(p.holds for p in proofs)


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("resource.execution.containsAll(context.via)", "resource.execution.containsAny(context.via)", "SOV-EXECUTION"),
        ("(resource.tier > 1 && context.waivedReach", "(resource.tier >= 1 && context.waivedReach", "SOV-CALLER-PLACE"),
        (
            "principal.tenant == resource.tenant || resource.sharedWith.contains(principal.tenant)",
            "principal.tenant == resource.tenant || resource.tier == 3",
            "SOV-TENANT",
        ),
    ],
    ids=["any hop inside is enough", "tier 1 may be waived", "tier 3 is shared"],
)
def test_a_sabotaged_charter_is_refuted(tmp_path: Path, old: str, new: str, code: str) -> None:
    bundle = read(edited(tmp_path, CHARTER, old, new))
    proofs = prove(bundle)
    assert broken(proofs) == {code}
    for proof in proofs:
        if proof.refuted is not None:
            assert unforbidden(bundle, proof.refuted)
            assert not unforbidden(read(SHIPPED), proof.refuted)


def test_a_broken_promise_is_shown_by_a_request_that_both_engines_allow(tmp_path: Path) -> None:
    bundle = edited(
        tmp_path, CHARTER, "resource.execution.containsAll(context.via)", "resource.execution.containsAny(context.via)"
    )
    policy = Policy.load(bundle)
    (found,) = told(policy)["refuted"]
    assert (found["decided"], found["unforbidden"], found["code"]) == ("allow", True, "SOV-EXECUTION")
    (proof,) = [p for p in prove(policy.bundle) if not p.holds]
    assert proof.refuted is not None
    key = proof.refuted.resource
    assert isinstance(key, KeyFacts)
    assert not proof.refuted.via <= key.execution
    assert not Policy.load(SHIPPED).decide(proof.refuted).allowed


def pinned(world: World, request: Request) -> list[z3.BoolRef]:
    """The symbolic request made this very one."""
    key, caller = request.resource, request.caller
    assert isinstance(key, KeyFacts)
    tenant = "installation" if caller.tenant is None else caller.tenant

    def exactly(value: object, names: frozenset[str]) -> z3.BoolRef:
        numbers = {world.number(value.kind, n) for n in names}
        return z3.And([inside == (n in numbers) for n, inside in value.members])

    number, context, k = world.number, world.context, world.key
    kind = caller.kind.capitalize()
    return [
        world.action == world.actions.index(request.action),
        world.workload == (kind == "Workload"),
        world.principal == number(kind, caller.id),
        world.tenant == number("Tenant", tenant),
        world.resource == number("Key", key.id),
        *(
            inside == (n.partition("/")[0] == tenant and n.partition("/")[2] in caller.roles)
            for (of, what, n), inside in world._within.items()
            if (of, what) == ("principal", "Role")
        ),
        k["tenant"].z == number("Tenant", key.tenant),
        world.whole(k["tier"]) == key.tier,
        k["state"].z == number("Text", key.state),
        exactly(k["purposes"], frozenset(key.purposes)),
        exactly(k["sharedWith"], key.shared_with),
        *(exactly(k[name], getattr(key, name)) for name in ("residency", "execution", "reach", "egress", "failover")),
        *(
            exactly(context[n], v)
            for n, v in (("via", request.via), ("dest", request.dest), ("target", request.target))
        ),
        exactly(context["caller"], caller.places),
        exactly(context["waivedReach"], request.waived_reach),
        exactly(context["waivedEgress"], request.waived_egress),
        context["hsm"].z == number("Place", request.hsm),
        context["failover"] == request.failover,
        context["purpose"].z == number("Text", request.purpose),
        context["reason"].z == number("Text", request.reason),
        world.whole(context["callerProof"]) == caller.proof,
        world.whole(context["approvals"]) == request.approvals,
        world.whole(context["now"]) == request.now,
        context["attest"]["level"].z == request.attest.level,
        context["attest"]["ageS"].z == request.attest.age_s,
        context["attest"]["tcbOk"] == request.attest.tcb_ok,
    ]


def test_the_formula_decides_random_requests_as_the_engine_does() -> None:
    policy = Policy.load(SHIPPED)
    requests = [r for r in selftest.requests(policy.bundle, 1_500) if isinstance(r.resource, KeyFacts) and r.hsm]
    texts = {t for r in requests for t in (r.purpose, r.reason, *r.resource.purposes)}
    world = World([policy.bundle], "Key", texts=sorted(texts))
    allowed = Formula(policy.bundle, world).allowed()
    solver, outcomes = z3.Solver(), {True: 0, False: 0}
    for request in requests:
        solver.push()
        solver.add(*pinned(world, request))
        decision = policy.decide(request)
        # What only lacks an agreement was allowed by the rules, and of them alone the formula speaks.
        decided = decision.allowed or decision.rule_code == "SOV-TRANSFER"
        assert (solver.check(allowed) == z3.sat) is decided, request
        assert (solver.check(z3.Not(allowed)) == z3.sat) is not decided, request
        outcomes[decided] += 1
        solver.pop()
    assert min(outcomes.values()) > 5, outcomes


def test_a_change_is_told_by_what_it_newly_allows_and_denies(tmp_path: Path) -> None:
    shipped = read(SHIPPED)
    assert difference(shipped, shipped) == []
    looser = read(edited(tmp_path / "a", CHARTER, "context.callerProof < 3 ||", "context.callerProof < 2 ||"))
    (change,) = difference(shipped, looser)
    assert (change.newly, change.kind, change.witness.caller.proof) == ("allowed", "Key", 2)
    assert [c.newly for c in difference(looser, shipped)] == ["denied"]
    other = "context.callerProof < 2 || context.callerProof == 5 ||"
    both = read(edited(tmp_path / "c", CHARTER, "context.callerProof < 3 ||", other))
    found = difference(shipped, both)
    assert [(c.newly, c.witness.caller.proof) for c in found] == [("allowed", 2), ("denied", 5)]
    roles = read(edited(tmp_path / "b", ROLES, 'Action::"createKey", Action::"createToken", ', 'Action::"createKey", '))
    (change,) = difference(shipped, roles)
    assert (change.newly, change.kind, change.witness.action) == ("denied", "Tenant", "createToken")


def test_rules_that_never_decide_are_named(tmp_path: Path) -> None:
    assert idle(read(SHIPPED)).dead == []
    assert idle(read(SHIPPED)).redundant == []
    made = edited(
        tmp_path,
        ROLES,
        "// The scheduler",
        """@id("health.never") @layer("tenant")
permit (principal in Role::"health/operator", action == Action::"rotate", resource in Tenant::"health")
when { principal.tenant == Tenant::"health" && resource.tier > 3 };

@id("health.twice") @layer("tenant")
permit (principal in Role::"health/operator", action == Action::"rotate", resource in Tenant::"health")
when { principal.tenant == Tenant::"health" && resource.tier == 2 };

// The scheduler""",
    )
    found = idle(read(made))
    assert found.dead == ["health.never"]
    assert found.redundant == ["health.twice"]


def test_what_has_no_formula_is_refused_and_named(tmp_path: Path) -> None:
    made = edited(tmp_path, CHARTER, "resource.purposes.contains(context.purpose)", 'context.purpose like "a*"')
    with pytest.raises(NotEncodable, match=r"charter\.purpose .*line \d+.*`like`"):
        prove(read(made))


# ---- what a formula means --------------------------------------------------------------------------------------------


EQUAL = [
    ("context.now < 5", "!(context.now >= 5)"),
    ("context.now <= 4", "5 > context.now"),
    ("context.now > 4", "context.now >= 5"),
    ("context.now + 1 == 5", "context.now == 4"),
    ("context.now - 1 == 5", "context.now == 6"),
    ("context.now * 2 == 10", "context.now == 5"),
    ("-context.now == 5", "context.now == -5"),
    ("context.now != 5", "context.now < 5 || context.now > 5"),
    ("context.failover && context.attest.tcbOk", "!(!context.failover || !context.attest.tcbOk)"),
    (
        "if context.failover then context.now == 1 else context.now == 2",
        "(context.failover && context.now == 1) || (!context.failover && context.now == 2)",
    ),
    ("context.failover == true", "context.failover != false"),
    (
        "context.failover != context.attest.tcbOk",
        "(context.failover || context.attest.tcbOk) && !(context.failover && context.attest.tcbOk)",
    ),
    ('context.purpose == "a"', '["a"].contains(context.purpose)'),
    ('["a", "b"].contains(context.reason)', 'context.reason == "a" || "b" == context.reason'),
    (
        'resource.purposes.contains("a") && context.purpose == "a"',
        'resource.purposes.contains(context.purpose) && context.purpose == "a"',
    ),
    ('context.hsm == Place::"no-1"', '[Place::"no-1"].contains(context.hsm)'),
    (
        "resource.reach == context.via",
        "resource.reach.containsAll(context.via) && context.via.containsAll(resource.reach)",
    ),
    ("context.via.isEmpty()", "!context.via.containsAny(context.via)"),
    (
        'context.via.containsAny([Place::"no-1", Place::"uk-1"])',
        'context.via.contains(Place::"no-1") || context.via.contains(Place::"uk-1")',
    ),
    (
        'context.via.containsAll([Place::"no-1", Place::"uk-1"])',
        'context.via.contains(Place::"no-1") && context.via.contains(Place::"uk-1")',
    ),
    (
        'context.via == [Place::"no-1"]',
        'context.via.contains(Place::"no-1") && [Place::"no-1"].containsAll(context.via)',
    ),
    ('principal == Workload::"w"', 'principal is Workload && Workload::"w" == principal'),
    ('principal in Operator::"w"', 'principal == Operator::"w"'),
    ("principal is Workload", "!(principal is Operator)"),
    (
        'principal in [Role::"health/x", Role::"health/y"]',
        'principal in Role::"health/x" || principal in Role::"health/y"',
    ),
    ('principal is Operator in Role::"health/x"', 'principal is Operator && principal in Role::"health/x"'),
    ('principal in Tenant::"health"', 'principal.tenant == Tenant::"health"'),
    ('resource == Key::"k1"', 'resource in Key::"k1"'),
    ('resource in KeyRing::"health/r"', 'resource in KeyRing::"health/r" && resource in Tenant::"health"'),
    ('action in Action::"release"', 'action in [Action::"release", Action::"decrypt"]'),
    # What holds of every request that reaches the policies:
    ("resource.tier >= 3", "resource.tier != 1 && resource.tier != 2"),
    ("resource.tier <= 1", "resource.tier < 2 && resource.tier > 0"),
    ('principal in Role::"health/x"', 'principal in Role::"health/x" && principal.tenant == Tenant::"health"'),
    ('principal is Workload && action in Action::"encrypt"', 'action in Action::"encrypt"'),
]
ALWAYS = [
    "resource has tier && context has now && principal has tenant && context.attest has level",
    "resource.residency.containsAll(resource.failover)",
    '!(resource.tier == 1 && resource.residency.contains(Place::"eu-fr-1"))',
    '!(resource.tier == 2 && resource.residency.contains(Place::"us-mkt-1"))',
    "context.now < 9007199254740992 && context.now > -9007199254740992",
    "context.approvals < 9007199254740992 && context.attest.ageS < 9007199254740992",
    'resource.state != "nonsense"',
    'resource.tenant == Tenant::"health" || resource.tenant == Tenant::"defence"',
    'context.hsm != Place::"nowhere-at-all"',
    'context.hsm != Tenant::"health" || true',
    'principal != Role::"health/x" || true',
    '!(action in Action::"createKey")',
    '!(principal is Operator && action in Action::"use")',
]


def conditions(wanted: list[str]) -> Formula:
    """A rule for each condition, as formulas over one world, so that they can be compared."""
    rule = '@id("x.{}") @layer("tenant") @code("X-YZ") forbid (principal, action, resource is Key in Tenant::"health")'
    rules = "".join(f"{rule.format(n)} when {{ {c} }};\n" for n, c in enumerate(wanted))
    shipped = read(SHIPPED)
    bundle = made({**shipped.sources, "tenants/health/99-more.cedar": rules.encode()}, known=shipped)
    return Formula(bundle, World([bundle], "Key"))


def asked_of_health(formula: Formula) -> z3.Solver:
    solver = z3.Solver()
    solver.add(*formula.world.assumed(), formula.world.member("resource", "Tenant", "health"))
    return solver


def test_conditions_that_mean_the_same_have_formulas_that_do() -> None:
    formula = conditions([c for pair in EQUAL for c in pair])
    solver = asked_of_health(formula)
    for n, pair in enumerate(EQUAL):
        one, other = formula.rules[f"x.{2 * n}"], formula.rules[f"x.{2 * n + 1}"]
        assert solver.check(one != other) == z3.unsat, pair
        assert solver.check(one) == z3.sat, pair  # and each can hold and can fail
        assert solver.check(z3.Not(one)) == z3.sat, pair


def test_what_typed_code_keeps_from_the_policies_is_assumed_in_a_proof() -> None:
    formula = conditions(ALWAYS)
    solver = asked_of_health(formula)
    for n, condition in enumerate(ALWAYS):
        assert solver.check(z3.Not(formula.rules[f"x.{n}"])) == z3.unsat, condition


@pytest.mark.parametrize(
    "condition",
    [
        'context.purpose like "a*"',
        "principal.clearance > 1",
        'principal.home == Place::"eu-de-1"',
        "resource.purposes.isEmpty()",
        'resource.purposes.containsAny(["a"])',
        'resource.purposes == ["a"]',
        "[context.now].contains(1)",
        "{a: 1} == {a: context.now}",
    ],
)
def test_what_the_formula_cannot_say_it_refuses_to_say(condition: str) -> None:
    with pytest.raises(NotEncodable, match=r"rule x\.0 \(tenants/health/99-more\.cedar, line 1\): .* has no proof"):
        conditions([condition])


@pytest.mark.parametrize(
    ("head", "changes"),
    [
        ('resource == Tenant::"health"', {"Tenant"}),
        ('resource == Tenant::"nobody"', set()),
        ('resource == Installation::"installation"', {"Installation"}),
        ('resource == Installation::"another"', set()),
        ('resource == Key::"k1"', {"Key"}),
    ],
)
def test_a_change_that_concerns_nobody_who_is_registered_is_none(tmp_path: Path, head: str, changes: set[str]) -> None:
    rule = f'@id("x") @layer("charter") @code("X-YZ") forbid (principal, action, {head});\n// K1:'
    found = difference(read(SHIPPED), read(edited(tmp_path, CHARTER, "// K1:", rule)))
    assert {change.kind for change in found} == changes
    for change in found:
        assert change.newly == "denied"
        policy = Policy.load(SHIPPED, sample=0)
        before = policy.decide(change.witness)
        if before.rule_code == "SOV-TRANSFER":  # agreements on transfers are no rules, so they are not in the formula
            assert unforbidden(policy.bundle, change.witness)
        else:
            assert before.allowed
