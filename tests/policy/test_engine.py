"""Decisions: roles apart, tenants apart, places proven, errors denied, and the matrix of roles and actions."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy import (
    Attest,
    BundleRefused,
    Caller,
    Decision,
    Denied,
    Evidence,
    InstallationFacts,
    KeyFacts,
    Policy,
    Request,
    TenantFacts,
    UnknownPlace,
    whereabouts,
    write_development,
)
from policy.bundle import SHIPPED, made, read
from policy.facts import Facts

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
    purposes=("default",),
    state="active",
)


@pytest.fixture(scope="module")
def shipped() -> Policy:
    return Policy.load(SHIPPED)


def caller(role: str = "workload", tenant: str | None = "health", **facts: Any) -> Caller:
    kind: Any = "workload" if role == "workload" else "operator"
    made = Caller(
        id="mtls:eu-de-1.gov.example:/x",
        kind=kind,
        tenant=tenant,
        roles=frozenset({role}),
        places=HOME,
        proof=4,
        authn="mtls",
    )
    return dataclasses.replace(made, **facts)


def ask(who: Caller, action: str, resource: Any = KEY, **facts: Any) -> Request:
    given = {"now": 1_800_000_000, "hsm": "eu-de-1", "via": HOME, "purpose": "default", "reason": "customer-initiated"}
    return Request(caller=who, action=action, resource=resource, **{**given, **facts})


USE = ["encrypt", "sign", "mac", "generateDataKey", "encapsulate", "decrypt", "unwrap", "verify", "verifyMac", "rewrap"]
LIFE = [
    "rotate",
    "importKey",
    "enable",
    "suspend",
    "revoke",
    "revokeVersion",
    "scheduleDeletion",
    "cancelDeletion",
    "updateKey",
    "setAlias",
]
READ = ["describe", "publicKey"]
# Which actions on a key each role may do in its own tenant; everything else is denied.
MAY: dict[str, set[str]] = {
    "workload": {*USE, *READ, "deriveSharedSecret", "decapsulate"},
    "operator": {*LIFE, *READ},
    "officer": {"suspend", "revoke", "revokeVersion", "grant", "readGrants", *READ},
    "custodian": {*READ},
    "auditor": {"readGrants", *READ},
    "scheduler": {"rotate", "completeDeletion", "suspend"},
    "platform": set(),
}


@pytest.mark.parametrize("role", sorted(MAY))
def test_K1_each_role_may_do_its_own_and_nothing_else(shipped: Policy, role: str) -> None:
    tenant = None if role == "platform" else "health"
    wrong = []
    for action, groups in shipped.actions.items():
        if (
            groups & {"move"}
            or action in {"createKey", "createToken", "listKeys", "readAudit", "random"}
            or "meta" in groups
        ):
            continue
        dest = HOME if "release" in groups else frozenset()
        decision = shipped.decide(ask(caller(role, tenant), action, dest=dest))
        if decision.allowed != (action in MAY[role]):
            wrong.append((action, decision))
    assert not wrong, wrong[:3]


def test_nobody_administers_and_uses(shipped: Policy) -> None:
    admin = {a for a, g in shipped.actions.items() if "admin" in g}
    use = {a for a, g in shipped.actions.items() if "use" in g}
    for role, actions in MAY.items():
        assert not (actions & admin and actions & use), role


def test_A_19_a_bundle_without_permits_grants_nothing(tmp_path: Path) -> None:
    import shutil

    bundle = tmp_path / "bundle"
    shutil.copytree(SHIPPED, bundle, ignore=shutil.ignore_patterns("cases", "tenants", "installation"))
    bare = Policy.load(bundle)
    resources: list[Any] = [KEY, TenantFacts("health"), InstallationFacts()]
    for role in MAY:
        for action in bare.actions:
            for resource in resources:
                assert not bare.decide(ask(caller(role), action, resource, dest=HOME, target=HOME, approvals=9)).allowed


@pytest.mark.parametrize(
    "role",
    [
        " workload",
        "workload ",
        "WORKLOAD",
        "work\u200bload",
        "root",
        " root",
        "ROOT",
        "root\u200b",
        "admin",
        "*",
        "health/workload",
    ],
)
def test_A_14_other_spellings_of_a_role_are_other_roles(shipped: Policy, role: str) -> None:
    for action in ("encrypt", "rotate", "describe"):
        assert not shipped.decide(ask(caller("workload", roles=frozenset({role})), action)).allowed
        assert not shipped.decide(ask(caller("operator", roles=frozenset({role})), action)).allowed


@pytest.mark.parametrize(
    "tenant", ["Health", "health ", "heal\u200bth", "HEALTH", "", "root", "installation", "defence"]
)
def test_A_07_A_14_other_spellings_of_a_tenant_are_other_tenants(shipped: Policy, tenant: str) -> None:
    assert not shipped.decide(ask(caller(tenant=tenant), "encrypt")).allowed


def test_a_foreign_key_answers_not_found_whatever_else_is_wrong(shipped: Policy) -> None:
    far = caller(tenant="defence", places=frozenset({"us-mkt-1"}), proof=0)
    decision = shipped.decide(ask(far, "decrypt", dest=frozenset({"us-mkt-1"})))
    assert (decision.code, decision.rule_code) == ("not_found", "DENIED")


def test_A_10_deny_beats_allow(shipped: Policy) -> None:
    elsewhere = dataclasses.replace(KEY, residency=frozenset({"eu-fr-1"}))
    with pytest.raises(Denied) as caught:
        shipped.check(ask(caller(), "encrypt", elsewhere))
    assert caught.value.decision.rules[0] == "charter.residency"


LONG, HUGE = "x" * 1025, 2**53
MALFORMED: list[dict[str, Any]] = [
    *({"now": n} for n in (True, 1.5, "1", HUGE, -HUGE)),
    *({"approvals": n} for n in (True, HUGE, -HUGE)),
    *({"failover": n} for n in (1, None)),
    *({"purpose": text} for text in (None, 5, LONG, "\xfc" * 1025, "\ud800")),
    *({"reason": text} for text in (None, 5, LONG, "\xfc" * 1025, "\ud800")),
    *({"hsm": place} for place in (5, None, LONG)),
    *({name: places} for name in ("via", "dest", "target") for places in (None, ["eu-de-1"], ("eu-de-1",))),
    *({name: ("eu-de-1",)} for name in ("waived_reach", "waived_egress")),
    {"via": frozenset({5})},
    *({"attest": Attest(*seen)} for seen in ((True, 0, True), (2, True, True), (HUGE, 0, True), (2, HUGE, True))),
    *({"attest": Attest(2, 0, flag)} for flag in (1, None)),
    *({"action": action} for action in ("nonsense", 'encrypt"', "use", "", None, 5)),
    *({"resource": other} for other in (None, "6f1c", InstallationFacts, {"id": "k"})),
    *({"resource": TenantFacts(name)} for name in (5, LONG)),
    *({"resource": InstallationFacts(name)} for name in (5, LONG)),
]
MALFORMED_CALLERS: list[dict[str, Any]] = [
    *({"kind": kind} for kind in ("Workload", "WORKLOAD", "robot", "")),
    *({"id": name} for name in (5, None, LONG, "\ud800")),
    *({"roles": roles} for roles in (("workload",), ["workload"], frozenset({"workload", 5}))),
    *({"places": places} for places in (("eu-de-1",), ["eu-de-1"], None)),
    *({"proof": proof} for proof in (True, 4.0, HUGE, -HUGE)),
]
MALFORMED_KEYS: list[dict[str, Any]] = [
    *({"tier": tier} for tier in (True, 2.0, "2", HUGE, -HUGE)),
    *({name: places} for name in ("residency", "execution", "reach", "egress") for places in (("eu-de-1",), "eu-de-1")),
    {"failover": ()},
    {"shared_with": ("defence",)},
    {"shared_with": frozenset({5})},
    *({"purposes": purposes} for purposes in (frozenset({"default"}), "default", ("default", 5), ("default", LONG))),
    *({"state": state} for state in (None, LONG)),
    *({"id": name} for name in (7, LONG)),
]


@pytest.mark.parametrize(
    "facts",
    [
        *MALFORMED,
        *({"caller": caller(**facts)} for facts in MALFORMED_CALLERS),
        *({"resource": dataclasses.replace(KEY, **facts)} for facts in MALFORMED_KEYS),
    ],
)
def test_facts_of_the_wrong_type_or_size_are_denied_unasked(shipped: Policy, facts: dict[str, Any]) -> None:
    allowed = shipped.check(ask(caller(), "encrypt"))
    request = dataclasses.replace(ask(caller(), "encrypt"), **facts)
    decision = shipped.decide(request)
    assert (decision.allowed, decision.code, decision.rules) == (False, "policy_denied", ())
    assert decision.rule_code == "POLICY-ERROR"
    if isinstance(facts.get("action", ""), str) and facts.get("action", "encrypt") in shipped.actions:
        assert shipped.agrees(request, decision)
        assert not shipped.agrees(request, allowed)


@pytest.mark.parametrize(
    "facts",
    [
        {"now": HUGE - 1},
        {"now": 1 - HUGE},
        {"approvals": HUGE - 1},
        {"reason": "x" * 1024},
        {"reason": "\xfc" * 1024},
        {"attest": Attest(HUGE - 1, HUGE - 1, tcb_ok=True)},
        {"caller": caller(id="x" * 1024)},
        {"caller": caller(id="mtls:a:/health/\xfc")},
        {"caller": caller(proof=HUGE - 1)},
        {"resource": dataclasses.replace(KEY, tier=HUGE - 1)},
        {"resource": dataclasses.replace(KEY, purposes=("x" * 1024,)), "purpose": "x" * 1024},
        {"resource": dataclasses.replace(KEY, purposes=("\xfc",)), "purpose": "\xfc"},
    ],
    ids=str,
)
def test_the_largest_facts_there_are_still_decide(shipped: Policy, facts: dict[str, Any]) -> None:
    request = dataclasses.replace(ask(caller(), "encrypt"), **facts)
    assert shipped.agrees(request, shipped.check(request))


def test_what_was_asked_before_makes_no_difference(shipped: Policy) -> None:
    """Facts are kept by their content: an equal one of another type, or another set of the same places, is another."""
    for _ in range(2):
        assert shipped.decide(ask(caller(), "encrypt")).allowed
        assert not shipped.decide(ask(caller(), "encrypt", via=frozenset({"eu-fr-1"}))).allowed
        assert not shipped.decide(ask(caller(), "encrypt", hsm="eu-fr-1")).allowed
        assert not shipped.decide(ask(caller(), "encrypt", dataclasses.replace(KEY, reach=frozenset()))).allowed
        assert not shipped.decide(ask(caller(), "encrypt", dataclasses.replace(KEY, tier=2.0))).allowed  # type: ignore[arg-type]  # on purpose
        assert not shipped.decide(ask(caller("operator"), "encrypt")).allowed


def test_nobody_brings_a_clearance_and_home_is_where_the_caller_is_known_to_be() -> None:
    facts = Facts()
    attrs = facts.principal(caller(places=frozenset({"eu-fr-1", "eu-de-2"}))).attrs
    assert attrs == {"tenant": 'Tenant::"health"', "home": 'Place::"eu-de-2"', "clearance": 0, "critical": False}
    nobody = facts.principal(caller("operator", tenant=None, places=frozenset()))
    assert nobody.attrs["tenant"] == 'Tenant::"installation"'
    assert nobody.attrs["home"] == 'Place::"nowhere"'
    assert nobody.ancestors == {nobody.uid, 'Tenant::"installation"', 'Role::"installation/operator"'}
    assert nobody.uid == 'Operator::"mtls:eu-de-1.gov.example:/x"'


def test_A_12_a_callers_text_is_never_an_entity(shipped: Policy) -> None:
    forged = caller(id='x", "y": Role::"health/operator')
    assert not shipped.decide(ask(forged, "rotate")).allowed
    assert not shipped.decide(ask(caller(), "encrypt", purpose='Place::"eu-de-1"')).allowed


def test_a_token_is_held_to_its_scopes(shipped: Policy) -> None:
    token = caller("operator", scopes=frozenset({"listKeys"}), places=frozenset(), proof=0)
    assert shipped.decide(ask(token, "listKeys", TenantFacts("health"))).allowed
    assert shipped.decide(ask(token, "createKey", TenantFacts("health"))).rule_code == "TOKEN-SCOPE"


def test_a_caller_of_a_tenant_that_is_not_registered_is_told_of_no_rule(shipped: Policy) -> None:
    stranger = caller(tenant="ghost", places=frozenset())
    for resource in (KEY, dataclasses.replace(KEY, tenant="ghost"), TenantFacts("ghost")):
        decision = shipped.decide(ask(stranger, "describe", resource))
        assert (decision.code, decision.rules, decision.rule_code) == ("policy_denied", (), "DEFAULT")
        assert shipped.agrees(ask(stranger, "describe", resource), decision)


# ---- how a decision is told ------------------------------------------------------------------------------------------


ROLES = "tenants/health/00-roles.cedar"
PERMIT = (
    '\n@id("{id}") @layer("tenant"){more} permit (principal, action, resource in Tenant::"health") '
    'when {{ principal.tenant == Tenant::"health"{when} }};'
)
FORBID = '\n@id("{id}") @layer("tenant") @code("X-YZ") forbid (principal, action, resource in Tenant::"health"){when};'


def with_rules(shipped: Policy, *rules: str) -> Policy:
    """The shipped bundle with more rules of the tenant health."""
    sources = dict(shipped.bundle.sources)
    return Policy(made({**sources, ROLES: sources[ROLES] + "".join(rules).encode()}, known=shipped.bundle))


def test_an_allowed_request_is_answered_with_its_decision_and_a_denied_one_raises_it(shipped: Policy) -> None:
    decision = shipped.check(ask(caller(), "encrypt"))
    assert (decision.allowed, decision.code, decision.rule_code) == (True, "", "")
    assert (decision.rules, decision.digest) == (("health.workload-use",), shipped.digest)
    with pytest.raises(Denied, match="region_not_allowed by SOV-RESIDENCY") as denied:
        shipped.check(ask(caller(), "encrypt", hsm="eu-fr-1"))
    assert denied.value.decision == shipped.decide(ask(caller(), "encrypt", hsm="eu-fr-1"))


RELEASE = {"dest": HOME, "attest": Attest(2, 0, tcb_ok=True)}


@pytest.mark.parametrize(
    ("request_", "code", "rule_code"),
    [
        (ask(caller(), "encrypt", hsm="eu-fr-1"), "region_not_allowed", "SOV-RESIDENCY"),
        (ask(caller(), "encrypt", via=frozenset()), "region_not_allowed", "SOV-EXECUTION"),
        (ask(caller(places=frozenset()), "encrypt"), "region_not_allowed", "SOV-CALLER-PLACE"),
        (ask(caller(), "decrypt"), "region_not_allowed", "SOV-DESTINATION"),
        (ask(caller(), "reEncrypt", dest=HOME), "region_not_allowed", "SOV-MOVE"),
        (ask(caller(), "encrypt", dataclasses.replace(KEY, failover=HOME)), "region_not_allowed", "SOV-FAILOVER"),
        (ask(caller("operator"), "destroy", approvals=1), "approval_required", "SOV-QUORUM"),
        (ask(caller(), "decrypt", dataclasses.replace(KEY, tier=1), dest=HOME), "attestation_failed", "SOV-ATTEST"),
        (ask(caller(), "encrypt", dataclasses.replace(KEY, state="destroyed")), "key_state_invalid", "KEY-STATE"),
        (ask(caller(proof=2), "encrypt"), "policy_denied", "SOV-PROOF"),
        (ask(caller(), "encrypt", purpose="research"), "policy_denied", "SOV-PURPOSE"),
        (ask(caller(), "rotate"), "policy_denied", "DEFAULT"),
        (ask(caller(tenant="defence"), "encrypt"), "not_found", "DENIED"),
        # Why a release is wanted is asked back for only where it was not said, and that is the first thing wrong.
        (ask(caller(), "decrypt", reason="unspecified", dest=HOME), "reason_required", "DENIED"),
        (ask(caller(), "decrypt", reason="vendor-initiated", dest=HOME), "policy_denied", "DENIED"),
        (ask(caller(proof=2), "encrypt", reason="unspecified"), "policy_denied", "SOV-PROOF"),
        (ask(caller(tenant="defence"), "decrypt", reason="unspecified", dest=HOME), "not_found", "DENIED"),
    ],
)
def test_each_denial_has_its_code_and_tells_a_rules_code_only_if_that_may_be_told(
    shipped: Policy, request_: Request, code: str, rule_code: str
) -> None:
    for _ in range(2):  # and the same the second time, when it is known
        decision = shipped.decide(request_)
        assert (decision.allowed, decision.code, decision.rule_code) == (False, code, rule_code)


def test_rules_are_told_by_layer_and_name_but_another_tenants_key_first(shipped: Policy) -> None:
    assert [(r.layer, r.id) for r in shipped.told] == sorted((r.layer, r.id) for r in shipped.bundle.rules.values())
    named = with_rules(shipped, *(FORBID.format(id=name, when="") for name in ("a.second", "a.first")))
    far = ask(caller(proof=0), "encrypt", hsm="eu-fr-1")
    assert named.decide(far).rules == ("charter.proof", "charter.residency", "a.first", "a.second")
    foreign = shipped.decide(ask(caller(tenant="defence", proof=0), "encrypt", hsm="eu-fr-1"))
    assert foreign.rules == ("charter.tenant", "charter.proof", "charter.residency")


def test_at_most_eight_rules_are_told_and_an_agreement_is_always_among_them(shipped: Policy) -> None:
    nine = [f"a.{n}" for n in range(9)]
    permits = with_rules(shipped, *(PERMIT.format(id=name, more="", when="") for name in nine))
    assert permits.check(ask(caller(), "encrypt")).rules == tuple(nine[:8])
    abroad = dataclasses.replace(KEY, reach=HOME | {"eu-fr-1"})
    crossing = ask(caller(places=frozenset({"eu-fr-1"})), "encrypt", abroad)
    assert permits.check(crossing).rules == (*nine[:7], "SOV-TRANSFER/FR/DE/health-fr-de")
    assert permits.agrees(crossing, permits.check(crossing))
    forbids = with_rules(shipped, *(FORBID.format(id=name, when="") for name in nine))
    assert forbids.decide(ask(caller(), "encrypt")).rules == tuple(nine[:8])
    foreign = ask(caller(tenant="defence"), "encrypt")
    assert forbids.decide(foreign).rules == ("charter.tenant", *nine[:7])


def test_a_permit_with_an_obligation_that_nothing_meets_denies(shipped: Policy) -> None:
    bound = with_rules(shipped, PERMIT.format(id="a.bound", more=' @obligation("no-cache")', when=""))
    decision = bound.decide(ask(caller(), "encrypt"))
    assert (decision.allowed, decision.code, decision.rule_code) == (False, "policy_denied", "OBLIGATION-UNMET")
    assert (decision.rules, decision.obligations) == (("a.bound", "health.workload-use"), {"no-cache"})
    assert bound.agrees(ask(caller(), "encrypt"), decision)


def test_a_rule_that_errs_denies_and_the_log_names_it_and_no_fact(
    shipped: Policy, caplog: pytest.LogCaptureFixture
) -> None:
    """Stock Cedar passes over a forbid that errs, which lets in what it forbids."""

    def told() -> dict[str, Any]:
        """What the engine said since the last time; a node of another test may speak too."""
        (one,) = [record for record in caplog.records if record.name == "skms.policy"]
        caplog.clear()
        facts: dict[str, Any] = vars(one)["facts"]
        return facts

    when = " when { context.now * 9000000000000000000 > 0 }"
    errs = with_rules(shipped, FORBID.format(id="a.errs", when=when))
    request = ask(caller(), "encrypt")
    decision = errs.decide(request)
    assert (decision.allowed, decision.rules, decision.rule_code) == (False, (), "POLICY-ERROR")
    assert told() == {"error": "OverflowError", "rule": "a.errs", "action": "encrypt"}
    assert errs.agrees(request, decision)
    assert not errs.agrees(request, shipped.check(request))
    charter = shipped.bundle.sources["charter/00-charter.cedar"].replace(
        b"context.callerProof < 3", when[8:-2].encode()
    )
    everyone = Policy.stored({**shipped.bundle.sources, "charter/00-charter.cedar": charter})
    assert everyone.decide(request).rule_code == "POLICY-ERROR"
    # Which of the rules for everyone it was is not known: none is named.
    assert told() == {"error": "OverflowError", "rule": "", "action": "encrypt"}
    errs.decide(ask(caller(), "nonsense"))
    assert told() == {"error": "ValueError", "rule": "", "action": "nonsense"}


# ---- two engines -----------------------------------------------------------------------------------------------------


class Generous(Policy):
    """A policy whose compiled half allows everything: the fault that the oracle is there for."""

    def decide(self, request: Request) -> Decision:
        return Decision(True, "", ("health.workload-use",), "", self.digest)


class Mistaken(Policy):
    """A policy whose compiled half allows what it should, by a rule that does not say so."""

    def decide(self, request: Request) -> Decision:
        decision = super().decide(request)
        return dataclasses.replace(decision, rules=("health.scheduler",)) if decision.allowed else decision


def test_a_node_in_doubt_allows_only_what_both_engines_allow(shipped: Policy) -> None:
    generous = Generous(shipped.bundle)
    good, forbidden = ask(caller(), "encrypt"), ask(caller(), "encrypt", hsm="eu-fr-1")
    assert generous.decide_twice(good) == shipped.decide(good)
    denied = generous.decide_twice(forbidden)
    assert (denied.allowed, denied.code, denied.rules) == (False, "policy_denied", ())
    assert denied.rule_code == "POLICY-ERROR"
    assert shipped.decide_twice(forbidden) == shipped.decide(forbidden)  # a denial needs no second opinion


@pytest.mark.parametrize(
    "facts",
    [
        {"now": "soon"},
        {"caller": caller(scopes=frozenset())},
        {"caller": caller(tenant="ghost")},
        {"resource": None},
        {"action": "nonsense"},
        {"grant": 7, "action": "encapsulate", "caller": caller(roles=frozenset())},
    ],
    ids=str,
)
def test_what_cedar_cannot_even_be_asked_it_has_not_allowed(shipped: Policy, facts: dict[str, Any]) -> None:
    generous = Generous(shipped.bundle)
    request = dataclasses.replace(ask(caller(), "encrypt"), **facts)
    assert generous.decide_twice(request).rule_code == "POLICY-ERROR"


def test_a_bundle_that_the_engines_decide_differently_is_refused() -> None:
    with pytest.raises(BundleRefused, match=r"expected charter\.t1-attested-release, got allow"):
        Generous.load(SHIPPED, sample=1)
    with pytest.raises(
        BundleRefused, match=r"^cases:0: case 'workload encrypts at home': Cedar itself decides otherwise"
    ):
        Mistaken.load(SHIPPED, sample=1)
    sources = {p: data for p, data in read(SHIPPED).sources.items() if not p.startswith("cases/")}
    with pytest.raises(BundleRefused, match=r"^bundle:0: self-test: \w+ is decided otherwise by Cedar itself"):
        Mistaken.draft(sources)


TEXT = st.text(max_size=12)
PLACES = st.frozensets(st.sampled_from(["eu-de-1", "eu-fr-1", "us-mkt-1", "nowhere", ""]), max_size=3)


@settings(max_examples=150)
@given(
    action=st.sampled_from(["encrypt", "decrypt", "rotate", "export", "", "use", "Action"]) | TEXT,
    role=TEXT,
    tenant=TEXT,
    places=PLACES,
    dest=PLACES,
    purpose=TEXT,
    reason=TEXT,
    proof=st.integers(-5, 9),
)
def test_random_requests_never_raise_and_never_get_in(
    shipped: Policy,
    action: str,
    role: str,
    tenant: str,
    places: frozenset[str],
    dest: frozenset[str],
    purpose: str,
    reason: str,
    proof: int,
) -> None:
    who = caller("workload", tenant=tenant, roles=frozenset({role}), places=places, proof=proof)
    decision = shipped.decide(ask(who, action, dest=dest, purpose=purpose, reason=reason))
    assert not decision.allowed or (role, tenant) == ("workload", "health")


DE, FR, US = frozenset({"eu-de-1"}), frozenset({"eu-fr-1"}), frozenset({"us-mkt-1"})
BOTH = frozenset({"eu-de-1", "eu-de-2"})
SVID = Evidence("svid", DE, vouches=DE)
CASES = [
    ("header only", [Evidence("header", DE)], frozenset(), 0),
    ("header and SVID", [Evidence("header", US), SVID], DE, 3),
    ("national SVID", [Evidence("svid", BOTH, vouches=BOTH)], BOTH, 3),
    ("with agreeing listener", [Evidence("svid", BOTH, vouches=BOTH), Evidence("listener", DE)], BOTH, 3),
    ("SVID DE, listener FR", [SVID, Evidence("listener", FR)], frozenset(), 0),
    ("listener alone", [Evidence("listener", DE)], DE, 2),
    ("French authority vouches for DE", [Evidence("svid", DE, vouches=FR)], frozenset(), 0),
    ("SVID DE, document US", [SVID, Evidence("document", US)], frozenset(), 0),
    ("that document unbound", [SVID, Evidence("document", US, bound=False)], DE, 3),
    ("document bound and agreeing", [SVID, Evidence("document", DE)], DE, 4),
    ("and a TEE", [SVID, Evidence("document", DE), Evidence("tee")], DE, 5),
    ("TEE alone", [Evidence("tee")], frozenset(), 0),
    ("stale SVID", [dataclasses.replace(SVID, stale=True)], frozenset(), 0),
]


@pytest.mark.parametrize(("title", "evidence", "places", "proof"), CASES, ids=[c[0] for c in CASES])
def test_evidence_is_weighed(title: str, evidence: list[Evidence], places: frozenset[str], proof: int) -> None:
    found = whereabouts(evidence)
    assert (found.places, found.proof) == (places, proof)


def test_the_registry_expands_and_refuses(shipped: Policy) -> None:
    registry = shipped.registry
    assert registry.expand(["DE"]) == BOTH
    assert "no-1" in registry.expand(["NO"])
    with pytest.raises(UnknownPlace):
        registry.expand(["Atlantis"])
    good = {"tenant": "health", "home": "eu-de-1", "execution": DE, "reach": DE, "egress": DE, "failover": frozenset()}
    assert registry.check_key(tier=1, residency=DE, **good) == ()
    assert registry.check_key(tier=1, residency=DE | FR, **good)
    assert registry.check_key(tier=2, residency=DE | FR, **good) == ()
    assert registry.check_key(tier=2, residency=DE | US, **good)
    assert registry.check_key(tier=3, residency=DE | US, **good) == ()
    assert registry.check_key(tier=3, residency=DE, **{**good, "failover": FR})


def test_the_development_charter_differs_in_k6_and_k7_only(shipped: Policy, tmp_path: Path) -> None:
    bundle = tmp_path / "dev"
    write_development(
        bundle, trust_domains={"eu-de-1": "eu-de-1.dev.example"}, members={}, platform_member="mtls:a:/platform/p"
    )
    development = Policy.load(bundle)
    assert development.development
    assert not shipped.development
    tier1 = dataclasses.replace(KEY, tier=1)
    request = ask(caller(proof=3), "decrypt", tier1, dest=HOME)
    assert development.decide(request).allowed
    assert set(shipped.decide(request).rules) == {"charter.proof", "charter.t1-attested-release"}
    weak = ask(caller(proof=2), "encrypt")
    assert development.decide(weak).rules == ("charter.proof",)
