"""Grants as values: whom they cover, when they count, and that they allow nothing that a rule forbids."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from policy import Caller, KeyFacts, Policy, Request, TenantFacts
from policy.bundle import SHIPPED, BundleRefused
from policy.grants import Grant, Grants
from policy.signed import LEASE_S, Instant, RowsDamaged, SignedRow, within
from policy.written import digest, read, written

S = 1_000_000
NOW = 1_800_000_000 * S
HOME = frozenset({"eu-de-1"})
SERVE = "mtls:eu-de-1.gov.example:/health/ns/ml/sa/serve"
KEY = "00000000-0000-4000-8000-000000000001"
WHO = Caller(SERVE, "workload", "health", frozenset({"workload"}), HOME, 4, "mtls")
FACTS = KeyFacts(
    id=KEY,
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
GRANT = Grant("g1", "health", KEY, SERVE, ("decrypt",), "default", NOW + 100 * S, "officer", NOW)


def asked(**facts: Any) -> Request:
    given: dict[str, Any] = {"caller": WHO, "action": "decrypt", "resource": FACTS, "now": NOW // S, "hsm": "eu-de-1"}
    given |= {"via": HOME, "dest": HOME, "purpose": "default", "reason": "customer-initiated", "grant": "g1"}
    return Request(**{**given, **facts})


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """The shipped charter without a tenant's rule: nothing is permitted."""
    import shutil

    bundle = tmp_path_factory.mktemp("bare") / "bundle"
    shutil.copytree(SHIPPED, bundle, ignore=shutil.ignore_patterns("cases", "tenants", "installation"))
    return Policy.load(bundle, sample=5)


EXACT = Instant(NOW, 0)


def known(*grants: Grant, at: Instant = EXACT) -> Grants:
    made = Grants(lambda: 0.0, lambda: at)
    made.confirm(0.0, 1, grants)
    return made


def covers(grants: Grants, **other: Any) -> bool:
    facts: dict[str, Any] = {"tenant": "health", "key": KEY, "caller": SERVE, "action": "decrypt"}
    facts |= {"purpose": "default", "contexts": ({},)}
    return grants.covering(**{**facts, **other}) is not None


# ---- what a grant allows ---------------------------------------------------------------------------------------------


def test_a_grant_allows_what_nothing_permits_and_is_named_as_the_rule(bare: Policy) -> None:
    decision = bare.decide(asked())
    assert (decision.allowed, decision.rules) == (True, ("GRANT/g1",))
    assert bare.decide(asked(grant="")).rule_code == "DEFAULT"
    assert bare.agrees(asked(), decision)


def test_where_a_rule_permits_the_grant_is_not_what_decided() -> None:
    shipped = Policy.load(SHIPPED, sample=5)
    assert shipped.decide(asked()).rules == ("health.workload-use",)


OUT = frozenset({"eu-fr-1"})
MARKET = frozenset({"us-mkt-1"})


@pytest.mark.parametrize(
    ("code", "facts"),
    [
        ("SOV-RESIDENCY", {"hsm": "eu-fr-1"}),
        ("SOV-EXECUTION", {"via": OUT}),
        ("SOV-CALLER-PLACE", {"caller": dataclasses.replace(WHO, places=OUT)}),
        ("SOV-CALLER-PLACE", {"caller": dataclasses.replace(WHO, places=frozenset())}),
        ("SOV-DESTINATION", {"dest": MARKET}),
        ("SOV-PROOF", {"caller": dataclasses.replace(WHO, proof=2)}),
        ("SOV-ATTEST", {"resource": dataclasses.replace(FACTS, tier=1)}),
        ("SOV-FAILOVER", {"resource": dataclasses.replace(FACTS, failover=HOME)}),
        ("SOV-PURPOSE", {"purpose": "research"}),
        ("DENIED", {"reason": "vendor-initiated"}),
        ("DENIED", {"caller": dataclasses.replace(WHO, tenant="defence")}),
        ("KEY-STATE", {"resource": dataclasses.replace(FACTS, state="preactive")}),
        ("SOV-MOVE", {"action": "reEncrypt", "target": OUT}),
    ],
)
def test_a_grant_crosses_no_rule_of_the_charter(bare: Policy, code: str, facts: dict[str, Any]) -> None:
    decision = bare.decide(asked(**facts))
    assert (decision.allowed, decision.rule_code) == (False, code)
    assert bare.agrees(asked(**facts), decision)


def test_a_grant_gives_no_administration_no_reading_and_no_operator_the_use(bare: Policy) -> None:
    operator = dataclasses.replace(WHO, kind="operator", roles=frozenset({"officer"}))
    for action, groups in bare.actions.items():
        for who in (WHO, operator):
            for resource in (FACTS, TenantFacts("health")):
                request = asked(caller=who, action=action, resource=resource, target=HOME, approvals=9)
                allowed = bare.decide(request).allowed
                assert allowed == ("use" in groups and who is WHO and resource is FACTS), (action, who.kind)


def test_a_grant_gives_a_shared_key_to_nobody_of_another_tenant(bare: Policy) -> None:
    shared = dataclasses.replace(FACTS, shared_with=frozenset({"defence"}))
    request = asked(caller=dataclasses.replace(WHO, tenant="defence"), resource=shared)
    assert bare.decide(request).rule_code == "DEFAULT"


def test_a_token_with_other_scopes_is_not_helped_by_a_grant(bare: Policy) -> None:
    request = asked(caller=dataclasses.replace(WHO, scopes=frozenset({"describe"})))
    assert bare.decide(request).rule_code == "TOKEN-SCOPE"


def test_a_grant_that_is_no_text_denies(bare: Policy) -> None:
    assert bare.decide(asked(grant=7)).rule_code == "POLICY-ERROR"


def test_no_agreement_no_crossing_whatever_was_granted(bare: Policy) -> None:
    abroad = dataclasses.replace(FACTS, reach=HOME | MARKET, egress=HOME | MARKET)
    request = asked(caller=dataclasses.replace(WHO, places=MARKET), dest=MARKET, resource=abroad)
    assert bare.decide(request).code == "transfer_not_authorised"


def test_a_bundle_cannot_name_its_rule_like_a_grant(tmp_path: Path) -> None:
    import shutil

    bundle = tmp_path / "bundle"
    shutil.copytree(SHIPPED, bundle)
    file = bundle / "tenants/health/00-roles.cedar"
    file.write_text(file.read_text().replace("health.workload-use", "GRANT/00000000"))
    with pytest.raises(BundleRefused, match="names of grants"):
        Policy.load(bundle, sample=1)


# ---- when it counts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        {"caller": SERVE + "r"},
        {"key": KEY.replace("1", "2")},
        {"tenant": "defence"},
        {"action": "encrypt"},
        {"purpose": "research"},
        {"purpose": ""},
    ],
)
def test_it_covers_exactly_what_it_names(other: dict[str, Any]) -> None:
    assert covers(known(GRANT))
    assert not covers(known(GRANT), **other)


@pytest.mark.parametrize(
    ("now", "error", "live"),
    [
        (0, 0, True),
        (98, 1, True),
        (99, 1, False),  # one second before the end, by a clock that may be a second off
        (99, 0, True),
        (100, 0, False),
        (200, 0, False),
        (0, 30, True),
        (0, 31, False),
        (-3_600, 3_600, False),  # moved back an hour
    ],
)
def test_it_ends_by_its_end_early_by_the_error_of_the_clock(now: int, error: int, live: bool) -> None:
    assert covers(known(GRANT, at=Instant(NOW + now * S, error * S))) is live


def test_nothing_begins_before_its_beginning_however_wrong_the_clock() -> None:
    assert within(Instant(12 * S, 1 * S), 10 * S, 20 * S)
    assert within(Instant(11 * S, 1 * S), 10 * S, 20 * S)
    assert not within(Instant(10 * S, 1 * S), 10 * S, 20 * S)


def test_contexts_equal_or_hold_what_is_asked_and_all_of_them_must() -> None:
    equal = dataclasses.replace(GRANT, context_equals={"row": "7", "table": "t"})
    some = dataclasses.replace(GRANT, context_subset={"row": "7"})
    nothing = dataclasses.replace(GRANT, context_equals={})
    whole, more = {"row": "7", "table": "t"}, {"row": "7", "table": "t", "x": ""}
    assert [covers(known(equal), contexts=(c,)) for c in (whole, more, {"row": "7"}, {})] == [True, False, False, False]
    assert [covers(known(some), contexts=(c,)) for c in (whole, more, {"row": "8"}, {})] == [True, True, False, False]
    assert [covers(known(nothing), contexts=(c,)) for c in ({}, {"row": "7"})] == [True, False]
    assert covers(known(some), contexts=(whole, more))
    assert not covers(known(some), contexts=(whole, {}))  # as a rewrap that drops the context


def test_uses_are_counted_on_and_an_uncounted_grant_goes_first() -> None:
    counted = dataclasses.replace(GRANT, id="a", max_uses=2)
    held = known(counted)
    held.used("a", 1)
    assert covers(held)
    held.used("a", 2)
    held.used("a", 1)  # what another worker told late
    assert not covers(held)
    both = known(counted, dataclasses.replace(GRANT, id="b"))
    found = both.covering(tenant="health", key=KEY, caller=SERVE, action="decrypt", purpose="default", contexts=({},))
    assert found is not None
    assert found.id == "b"


def test_what_was_revoked_damaged_or_not_read_for_the_lease_counts_not() -> None:
    ticks = [0.0]
    held = Grants(lambda: ticks[0], lambda: Instant(NOW, 0))
    assert not covers(held)  # nothing was read yet
    held.confirm(0.0, 1, [GRANT])
    assert covers(held)
    assert held.still(GRANT)
    ticks[0] = LEASE_S + 0.1
    assert not covers(held)
    assert not held.still(GRANT)
    held.confirm(ticks[0])
    assert covers(held)
    held.distrust("a row was changed")
    assert not covers(held)
    held.confirm(ticks[0], 2, [dataclasses.replace(GRANT, revoked_at=NOW)])
    assert not covers(held)


def test_what_this_process_did_survives_a_reading_that_began_before() -> None:
    ticks = [10.0]
    held = Grants(lambda: ticks[0], lambda: Instant(NOW, 0))
    held.confirm(10.0, 1, [])
    ticks[0] = 11.0
    held.add(GRANT)
    held.confirm(10.5, 1, [])  # read before it was made
    assert covers(held)
    held.revoke(GRANT.id)
    held.confirm(10.9, 2, [GRANT])  # read before it was revoked
    assert not covers(held)
    ticks[0] = 12.0
    held.confirm(11.5, 3, [])
    assert not covers(held)


def test_what_this_process_did_is_told_by_the_rows_once_they_are_read_afterwards() -> None:
    ticks = [10.0]
    held = Grants(lambda: ticks[0], lambda: Instant(NOW, 0))
    held.confirm(10.0, 1, [])
    held.add(GRANT)
    held.revoke("another")
    assert covers(held)  # at once: no reading lies between
    assert held.still(GRANT)
    another = dataclasses.replace(GRANT, id="another", operations=("encrypt",))
    held.confirm(10.0, 2, [another])  # begun in the same instant: what was done may not be in it
    assert covers(held)
    assert not covers(held, action="encrypt")
    ticks[0] = 12.0
    held.confirm(11.0, 3, [another])  # begun afterwards: somebody else took the one back, and the other is there
    assert not covers(held)
    assert covers(held, action="encrypt")


def test_a_revoked_grant_counts_no_more_from_the_moment_it_is_revoked() -> None:
    held = known(GRANT)
    held.revoke(GRANT.id)
    assert not covers(held)
    assert not held.still(GRANT)
    held.add(GRANT)
    assert not covers(held)


def test_how_old_the_knowledge_is_can_be_told_and_damage_says_why() -> None:
    ticks = [5.0]
    held = Grants(lambda: ticks[0], lambda: Instant(NOW, 0))
    assert (held.age_s, held.trusted, held.epoch, held.damaged) == (None, False, 0, "")
    held.confirm(4.0, 7, [GRANT])
    assert (held.age_s, held.trusted, held.epoch) == (1.0, True, 7)
    ticks[0] = 4.0 + LEASE_S
    assert held.trusted  # to the last moment of the lease
    held.distrust("row g1 was changed")
    assert (held.age_s, held.trusted, held.damaged) == (None, False, "row g1 was changed")
    held.confirm(ticks[0])
    assert (held.age_s, held.trusted, held.epoch, held.damaged) == (0.0, True, 7, "")
    assert covers(held)


def test_an_encryption_context_matters_only_to_a_caller_who_holds_a_grant_of_the_key() -> None:
    held = known(GRANT)
    assert held.held(KEY, SERVE) is True
    assert held.held(KEY, SERVE + "r") is False
    assert held.held("another", SERVE) is False


def test_uses_are_told_and_forgotten_with_their_grant() -> None:
    counted = dataclasses.replace(GRANT, max_uses=2)
    held = known(counted)
    assert held.uses(GRANT.id) == 0
    held.used(GRANT.id, 1)
    held.used(GRANT.id, 3)
    assert held.uses(GRANT.id) == 3
    held.confirm(0.0, 2, [counted])
    assert held.uses(GRANT.id) == 3
    held.confirm(0.0, 3, [])
    assert held.uses(GRANT.id) == 0


def test_a_second_grant_counts_where_the_first_does_not() -> None:
    first = dataclasses.replace(GRANT, id="a", context_equals={"row": "7"})
    ended = dataclasses.replace(GRANT, id="b", ends=NOW)
    third = dataclasses.replace(GRANT, id="c", operations=("encrypt", "decrypt"))
    assert covers(known(first, ended, third))
    assert covers(known(first, ended, third), action="encrypt")
    assert not covers(known(first, ended))
    assert covers(known(first, ended), contexts=({"row": "7"},))


# ---- why one does not count, as an explanation tells it --------------------------------------------------------------


REVOKED = dataclasses.replace(GRANT, revoked_at=NOW)


@pytest.mark.parametrize(
    ("grant", "request_", "lacks"),
    [
        (GRANT, asked(), ()),
        (GRANT, asked(caller=dataclasses.replace(WHO, id=SERVE + "r")), ("another caller",)),
        (GRANT, asked(action="encrypt"), ("another operation",)),
        (GRANT, asked(purpose=""), ("another purpose",)),
        (GRANT, asked(now=GRANT.ends // S - 1), ()),
        (GRANT, asked(now=GRANT.ends // S), ("ended",)),
        (REVOKED, asked(), ("revoked",)),
        (REVOKED, asked(now=NOW // S - 1), ()),  # as it was before
        (REVOKED, asked(action="sign", purpose=""), ("another operation", "another purpose", "revoked")),
    ],
)
def test_an_explanation_tells_all_that_a_grant_lacks(grant: Grant, request_: Request, lacks: tuple[str, ...]) -> None:
    assert grant.lacks(request_) == lacks


# ---- as rows and facts -----------------------------------------------------------------------------------------------


def test_a_row_gives_the_grant_back_and_any_other_content_is_damage() -> None:
    full = dataclasses.replace(GRANT, context_subset={"a": "b"}, max_uses=3)
    assert Grant.of(full.row()) == full
    revoked = dataclasses.replace(full.row(), revoked_at=NOW, revoked_by="officer")
    assert Grant.of(revoked) == dataclasses.replace(full, revoked_at=NOW, revoked_by="officer")
    for content in ("[]", "{}", "null", "x", json.dumps({**json.loads(full.row().content), "tier": 1})):
        with pytest.raises(RowsDamaged):
            Grant.of(SignedRow("g", "health", content, NOW, NOW))


def test_requests_without_a_grant_have_the_digest_they_always_had() -> None:
    plain = asked(grant="")
    assert digest(plain) != digest(asked())
    assert digest(plain) == "9405401d9b108900253b13e3f001d146"
    assert read(written(asked())).grant == "g1"
