"""Who would be locked out by a draft: told by name, and only where no way is left."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from policy import LockedOut, Policy
from policy.bundle import SHIPPED
from policy.lockout import POWERS, check, holders, lost, lowered, parted, strictest
from policy.plan import files, told

NOW = 1_800_000_000
PEOPLE = "mtls:eu-de-1.gov.example:/health/people"
CHARTER, MEMBERS, RULES = "charter/00-charter.cedar", "tenants/health/members.yaml", "tenants/health/00-roles.cedar"


@pytest.fixture(scope="module")
def shipped() -> Policy:
    return Policy.load(SHIPPED, sample=25)


def changed(shipped: Policy, edits: Mapping[str, tuple[str, str]]) -> Policy:
    """The shipped bundle with one text for another in some files."""
    sources = {path: data.decode() for path, data in shipped.bundle.sources.items()}
    for path, (was, becomes) in edits.items():
        assert was in sources[path], (path, was)
        sources[path] = sources[path].replace(was, becomes)
    return Policy.stored({path: text.encode() for path, text in sources.items() if text})


def test_every_power_is_held_by_somebody_in_the_shipped_bundle(shipped: Policy) -> None:
    held = holders(shipped, now=NOW)
    assert len(held) == 3 + 2 * (len(POWERS) - 3)
    assert all(held.values())
    assert lost(shipped, shipped, now=NOW) == ()


@pytest.mark.parametrize(
    ("path", "was", "becomes", "actions", "names"),
    [
        (MEMBERS, 'role: "officer"', 'role: "auditor"', {"freeze"}, {"officer-1"}),
        (MEMBERS, 'role: "operator"', 'role: "custodian"', {"createKey", "rotate", "enable"}, {"operator-1"}),
        (RULES, 'Role::"health/operator"', 'Role::"health/nobody"', {"createKey", "rotate", "enable"}, {"operator-1"}),
        # A rule with a time that is over, and one with a place that nobody's authority vouches for.
        (
            RULES,
            'action in [\n    Action::"createKey", Action::"createToken", Action::"listKeys", Action::"random", '
            'Action::"readApprovals"\n  ],\n  resource == Tenant::"health"\n)\nwhen { ',
            'action == Action::"createKey",\n  resource == Tenant::"health"\n)\nwhen { context.now < 1000 && ',
            {"createKey"},
            {"operator-1"},
        ),
        ("charter/00-charter.cedar", "context.callerProof < 3 ||", "context.callerProof < 6 ||", None, None),
    ],
)
def test_a_power_that_nobody_is_left_with_is_told_with_the_names_of_today(
    shipped: Policy, path: str, was: str, becomes: str, actions: set[str] | None, names: set[str] | None
) -> None:
    found = lost(shipped, changed(shipped, {path: (was, becomes)}), now=NOW)
    if actions is None or names is None:  # a charter that nobody can meet ends every key's administration
        assert {(one.tenant, one.action) for one in found} == {
            (tenant, action) for tenant in ("health", "defence") for action in ("rotate", "enable", "suspend")
        }
        return
    assert {one.action for one in found} == actions
    assert {name for one in found for name in one.members} == {f"{PEOPLE}/{name}" for name in names}


def test_a_power_that_somebody_else_still_holds_is_not_lost(shipped: Policy) -> None:
    both = changed(shipped, {MEMBERS: ('role: "auditor"', 'role: "officer"')})
    one = changed(shipped, {MEMBERS: ('role: "officer"', 'role: "auditor"')})
    exchanged = changed(shipped, {MEMBERS: ('"officer"', '"auditor"')})
    assert lost(both, shipped, now=NOW) == ()
    assert {found.action for found in lost(both, exchanged, now=NOW)} == {"freeze"}
    with pytest.raises(LockedOut, match="tenant health could freeze") as refused:
        check(shipped, one, now=NOW)
    assert refused.value.names == [f"{PEOPLE}/officer-1"]


def test_the_most_that_the_rules_ask_for_is_what_destroying_a_tier_1_key_takes(shipped: Policy) -> None:
    fewer = changed(shipped, {CHARTER: ("context.approvals < 3)", "context.approvals < 2)")})
    assert (strictest(shipped, now=NOW), strictest(fewer, now=NOW)) == (3, 2)


def test_a_quorum_is_not_lowered_by_taking_away_first_who_could_meet_it(shipped: Policy) -> None:
    nobody = {f"tenants/{t}/00-roles.cedar": (f'Role::"{t}/op', f'Role::"{t}/no') for t in ("health", "defence")}
    nobody[MEMBERS] = ('role: "operator"', 'role: "auditor"')
    assert strictest(changed(shipped, nobody), now=NOW) == 3


def test_what_a_draft_asks_fewer_approvals_for_is_told_by_what_was_asked(shipped: Policy) -> None:
    rule = (
        '@id("health.four-eyes-twice") @layer("tenant") @code("HEALTH-QUORUM")\nforbid (principal, '
        'action == Action::"destroy", resource in Tenant::"health")\nwhen { context.approvals < 4 };\n'
    )
    first = '@id("health.workload-use")'
    strict = changed(shipped, {RULES: (first, rule + first)})
    three = changed(shipped, {RULES: (first, rule.replace("< 4", "< 3") + first)})
    assert strictest(strict, now=NOW) == 4
    assert [lowered(a, b, now=NOW) for a, b in ((strict, shipped), (strict, three), (three, shipped))] == [4, 4, 3]
    assert [lowered(a, b, now=NOW) for a, b in ((shipped, strict), (three, strict), (strict, strict))] == [0, 0, 0]


def test_a_person_of_two_logins_who_becomes_two_or_loses_one_is_noticed(shipped: Policy) -> None:
    linked = changed(shipped, {MEMBERS: ("health-p3", "health-p2")})
    gone = changed(linked, {MEMBERS: ('/custodian-1"', '/custodian-2"')})
    custodian, officer = (f"{PEOPLE}/{who}-1" for who in ("custodian", "officer"))
    assert parted(shipped.registry, linked.registry) == ()
    assert parted(linked.registry, gone.registry) == (custodian,)
    split = changed(linked, {MEMBERS: ('role: "officer", person: "health-p2"', 'role: "officer", person: "health-p9"')})
    assert parted(linked.registry, split.registry) == (officer,)
    assert parted(linked.registry, changed(linked, {MEMBERS: ("health-p2", "health-p9")}).registry) == (
        custodian,
        officer,
    )


def test_a_tenant_leaves_only_when_nothing_of_it_is_left(shipped: Policy) -> None:
    sources = {p: d for p, d in shipped.bundle.sources.items() if "defence" not in p and "cases/" not in p}
    charter = (
        sources["charter.yaml"].decode().replace('  defence: {home: "DE", default_reason: "customer-initiated"}\n', "")
    )
    without = Policy.stored({**sources, "charter.yaml": charter.encode()})
    assert without.registry.tenant_names() == ("health",)
    assert {one.tenant for one in lost(shipped, without, now=NOW)} == {"defence"}
    assert lost(shipped, without, now=NOW, given_up=lambda tenant: tenant == "defence") == ()
    assert {one.tenant for one in lost(shipped, without, now=NOW, given_up=lambda tenant: tenant == "health")} == {
        "defence"
    }


def test_a_plan_tells_files_and_members_and_what_cannot_be_proved(shipped: Policy) -> None:
    draft = changed(shipped, {MEMBERS: ('role: "officer"', 'role: "auditor"')})
    assert [(f.path, f.change) for f in files(shipped.bundle.sources, draft.bundle.sources)] == [(MEMBERS, "changed")]
    shown = told(shipped, draft, now=NOW)
    (member,) = shown["members"]
    assert (member["id"], member["was"]["role"], member["becomes"]["role"]) == (
        f"{PEOPLE}/officer-1",
        "officer",
        "auditor",
    )
    assert (shown["changes"], shown["refuted"], len(shown["locked_out"])) == ([], [], 1)
    like = 'when { principal.tenant == Tenant::"health" && resource.state like "act*" };'
    rule = '@id("health.like") @layer("tenant")\npermit (principal, action == Action::"encrypt", resource in Tenant::"health")\n'
    unproved = changed(shipped, {RULES: ("// Layer 1", rule + like + "\n// Layer 1")})
    assert "health.like" in told(shipped, unproved, now=NOW)["unproved"]
