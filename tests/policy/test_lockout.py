"""Who would be locked out by a draft: told by name, and only where no way is left."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from policy import LockedOut, Policy
from policy.bundle import SHIPPED, made
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
    return Policy(made({path: text.encode() for path, text in sources.items() if text}, known=shipped.bundle))


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


def with_rule(shipped: Policy, when: str, action: str = 'action == Action::"rotate"') -> Policy:
    """The shipped bundle with one more rule of a tenant, which forbids unless something holds."""
    first = '@id("health.workload-use")'
    rule = (
        '@id("health.more") @layer("tenant") @code("HEALTH-MORE")\n'
        f'forbid (principal, {action}, resource in Tenant::"health")\nunless {{ {when} }};\n'
    )
    return changed(shipped, {RULES: (first, rule + first)})


@pytest.mark.parametrize(
    "when",
    [
        "context.callerProof >= 5",
        "context.approvals >= 16",
        "context.attest.level >= 3 && context.attest.tcbOk && context.attest.ageS == 0",
        'context.purpose == "default" && context.reason == "customer-initiated"',
        'context.hsm == Place::"eu-fr-1"',
        'context.via == [Place::"us-mkt-1"] && resource.execution.contains(Place::"us-mkt-1")',
        'context.caller == [Place::"eu-de-1"]',  # where the authority of those people is
        "context.now == 1800000000",
        'resource.state == "active" && resource.tier == 3 && resource.purposes == ["default"]',
        "resource.failover.isEmpty() && resource.sharedWith.isEmpty()",
        'resource.residency.contains(Place::"us-mkt-1") && resource.reach.contains(Place::"us-mkt-1")',
    ],
)
def test_a_rule_that_somebody_in_the_best_place_can_meet_locks_nobody_out(shipped: Policy, when: str) -> None:
    assert lost(shipped, with_rule(shipped, when), now=NOW) == ()


@pytest.mark.parametrize(
    "when",
    [
        "context.callerProof >= 6",
        "context.approvals >= 17",
        "context.attest.level >= 4",
        "context.now > 1800000000",
        'context.caller.contains(Place::"eu-fr-1")',  # no authority of these people vouches for it
        'context.hsm == Place::"atlantis"',
        "context.via.isEmpty()",
        "resource.tier < 3",
    ],
)
def test_a_rule_that_nobody_can_ever_meet_locks_everybody_out(shipped: Policy, when: str) -> None:
    (found,) = lost(shipped, with_rule(shipped, when), now=NOW)
    assert (found.tenant, found.action, found.members) == ("health", "rotate", (f"{PEOPLE}/operator-1",))


@pytest.mark.parametrize("identity", ["oidc:https://idp.example/:operator-1", "mtls:elsewhere.example:/health/o"])
def test_who_is_vouched_for_by_no_regions_authority_may_be_anywhere(shipped: Policy, identity: str) -> None:
    somewhere = changed(
        with_rule(shipped, 'context.caller.contains(Place::"eu-fr-1")'), {MEMBERS: (f"{PEOPLE}/operator-1", identity)}
    )
    assert holders(somewhere, now=NOW)["health", "rotate"] == (identity,)


def test_what_nobody_could_do_before_is_not_lost(shipped: Policy) -> None:
    nobody = changed(shipped, {MEMBERS: ('role: "officer"', 'role: "auditor"')})
    assert holders(nobody, now=NOW)["health", "freeze"] == ()
    assert lost(nobody, nobody, now=NOW) == ()
    assert {one.action for one in lost(nobody, with_rule(nobody, "context.approvals > 16"), now=NOW)} == {"rotate"}


def test_the_installation_is_told_of_as_such_and_every_name_once(shipped: Policy) -> None:
    platform = "installation/members.yaml"
    people = "mtls:eu-de-1.gov.example:/platform/people"
    without = changed(shipped, {platform: ('role: "officer"', 'role: "auditor"')})
    with pytest.raises(LockedOut) as refused:
        check(shipped, without, now=NOW)
    assert str(refused.value) == (
        f"nobody of the installation could changePolicy any more, today: {people}/officer-1; "
        f"nobody of the installation could approve any more, today: {people}/officer-1"
    )
    assert refused.value.names == [f"{people}/officer-1"]
    check(shipped, shipped, now=NOW)


def test_rules_that_ask_for_one_approval_or_none_ask_for_so_many(shipped: Policy) -> None:
    quorum = "context.approvals < 2 || (resource.tier == 1 && context.approvals < 3)"
    one = changed(shipped, {CHARTER: (quorum, "context.approvals < 1")})
    none = changed(shipped, {CHARTER: (quorum, "context.approvals < 0")})
    assert [strictest(policy, now=NOW) for policy in (one, none)] == [1, 0]
    assert [lowered(a, b, now=NOW) for a, b in ((shipped, one), (one, none), (none, shipped), (none, none))] == [
        3,
        1,
        0,
        0,
    ]
