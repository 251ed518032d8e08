"""Decisions: roles apart, tenants apart, places proven, errors denied, and the matrix of roles and actions."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy import (
    Caller,
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
from policy.bundle import SHIPPED

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


@pytest.mark.parametrize(
    "facts",
    [
        {"now": True},
        {"approvals": True},
        {"failover": 1},
        {"now": 2**60},
        {"action": "nonsense"},
        {"action": 'encrypt"'},
        {"purpose": None},
        {"hsm": 5},
        {"via": None},
    ],
)
def test_facts_of_the_wrong_type_are_denied(shipped: Policy, facts: dict[str, Any]) -> None:
    request = dataclasses.replace(ask(caller(), "encrypt"), **facts)
    assert not shipped.decide(request).allowed


def test_A_12_a_callers_text_is_never_an_entity(shipped: Policy) -> None:
    forged = caller(id='x", "y": Role::"health/operator')
    assert not shipped.decide(ask(forged, "rotate")).allowed
    assert not shipped.decide(ask(caller(), "encrypt", purpose='Place::"eu-de-1"')).allowed


def test_a_token_is_held_to_its_scopes(shipped: Policy) -> None:
    token = caller("operator", scopes=frozenset({"listKeys"}), places=frozenset(), proof=0)
    assert shipped.decide(ask(token, "listKeys", TenantFacts("health"))).allowed
    assert shipped.decide(ask(token, "createKey", TenantFacts("health"))).rule_code == "TOKEN-SCOPE"


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
