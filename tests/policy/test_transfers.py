"""Transfers: what crosses a border, which agreement lets it, to the second; and charters whose agreements are refused."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from policy import BundleRefused, Caller, KeyFacts, Policy, Request
from policy.bundle import SHIPPED, schema_actions
from policy.explain import explain, shown

ALL = frozenset({"eu-de-1", "eu-de-2", "eu-fr-1", "eu-fi-1", "no-1", "uk-1", "us-mkt-1"})
KEY = KeyFacts("k", "health", 3, ALL, ALL, ALL, ALL, frozenset(), frozenset(), ("default", "care"), "active")
WORKLOAD = Caller("mtls:a:/health/x", "workload", "health", frozenset({"workload"}), frozenset({"eu-de-1"}), 4, "mtls")
BEGINS, ENDS = 1_767_225_600, 1_893_456_000  # of the shipped agreements: 2026 to 2030
PAIR = ("SOV-TRANSFER/DE/FR/health-de-fr", "SOV-TRANSFER/FR/DE/health-fr-de")
FI = frozenset({"eu-fi-1"})


@pytest.fixture(scope="module")
def shipped() -> Policy:
    return Policy.load(SHIPPED)


def at(*places: str) -> frozenset[str]:
    return frozenset(places)


def ask(action: str = "encrypt", *, caller: frozenset[str] = WORKLOAD.places, **facts: Any) -> Request:
    given: dict[str, Any] = {
        "caller": dataclasses.replace(WORKLOAD, places=caller),
        "resource": KEY,
        "now": BEGINS,
        "hsm": "eu-de-1",
        "via": at("eu-de-1"),
        "dest": caller if action in {"decrypt", "unwrap", "reEncrypt"} else frozenset(),
        "target": at("eu-de-1") if action in {"reEncrypt", "wrap"} else frozenset(),
        "purpose": "default",
        "reason": "customer-initiated",
    }
    return Request(action=action, **{**given, **facts})


def test_each_use_crosses_where_its_data_goes_and_nothing_else_does(shipped: Policy) -> None:
    """A caller in France, the HSM in Germany, for every action there is."""
    inward, outward = (("FR", "DE"),), (("DE", "FR"),)
    wanted = {
        **dict.fromkeys(("encrypt", "sign", "mac", "verify", "verifyMac"), inward),
        **dict.fromkeys(("generateDataKey", "encapsulate", "decrypt", "unwrap", "decapsulate"), outward),
        **dict.fromkeys(("deriveSharedSecret", "reEncrypt", "replicate", "escrow", "export", "salvage"), outward),
        "wrap": (*outward, *inward),
    }
    for action in schema_actions():
        found = shipped.agreements.crossings(ask(action, caller=at("eu-fr-1")))
        assert found == wanted.get(action, ()), action
        assert shipped.agreements.crossings(ask(action, caller=at("eu-de-2"))) == (), action


@pytest.mark.parametrize(
    ("request_", "rules"),
    [
        (ask(caller=at("eu-fr-1")), PAIR[1:]),
        (ask("decrypt", caller=at("eu-fr-1")), PAIR[:1]),
        (ask("decrypt", dest=at("eu-de-1", "eu-fr-1")), PAIR[:1]),
        (ask("reEncrypt", target=at("eu-de-1", "eu-fr-1")), PAIR[:1]),
        (ask(hsm="eu-fr-1", via=at("eu-fr-1")), PAIR[:1]),
        (ask("decrypt", hsm="eu-fr-1", via=at("eu-fr-1")), PAIR[1:]),
        (ask(via=at("eu-fr-1")), PAIR[:1]),  # a node in another country sees the plaintext too
        (ask("wrap", caller=at("eu-fr-1"), dest=at("eu-fr-1"), target=at("eu-de-1")), PAIR),
    ],
)
def test_an_agreement_in_force_lets_it_and_is_told_last(
    shipped: Policy, request_: Request, rules: tuple[str, ...]
) -> None:
    decision = shipped.check(request_)
    assert decision.rules == ("health.workload-use", *rules)
    assert shipped.agrees(request_, decision)


def test_what_stays_in_one_jurisdiction_names_no_agreement(shipped: Policy) -> None:
    request = ask("decrypt", caller=at("eu-de-2"), dest=at("eu-de-1", "eu-de-2"))
    assert shipped.check(request).rules == ("health.workload-use",)


DENIED = {
    "ended a second ago": ask(caller=at("eu-fr-1"), now=ENDS + 1),
    "ends now": ask(caller=at("eu-fr-1"), now=ENDS),
    "begins in a second": ask(caller=at("eu-fr-1"), now=BEGINS - 1),
    "another purpose": ask(caller=at("eu-fr-1"), purpose="care"),
    "another tenant's agreement": ask(
        caller=at("eu-fr-1"),
        resource=dataclasses.replace(KEY, tenant="defence"),
    ),
    "no agreement": ask(caller=FI),
    "the other direction is no agreement": ask(hsm="eu-fi-1", via=FI),
    "a caller who may be in either country": ask(caller=at("eu-de-1", "eu-fi-1")),
    "a destination that may be a third country": ask("decrypt", dest=at("eu-fr-1", "us-mkt-1")),
    "a copy that becomes usable in a third country": ask("reEncrypt", target=at("eu-de-1", "no-1")),
    "a node in a third country": ask(via=at("eu-de-1", "uk-1")),
}


@pytest.mark.parametrize("name", sorted(DENIED))
def test_without_an_agreement_in_force_it_is_denied_by_name_and_both_engines_agree(shipped: Policy, name: str) -> None:
    request = DENIED[name]
    if isinstance(request.resource, KeyFacts) and request.resource.tenant == "defence":
        request = dataclasses.replace(
            request, caller=dataclasses.replace(request.caller, tenant="defence", id="mtls:a:/defence/x")
        )
    decision = shipped.decide(request)
    assert (decision.allowed, decision.code, decision.rule_code) == (False, "transfer_not_authorised", "SOV-TRANSFER")
    assert all(rule.startswith("SOV-TRANSFER/") and rule.count("/") == 2 for rule in decision.rules)
    assert shipped.agrees(request, decision)


def test_the_last_second_of_an_agreement_still_counts(shipped: Policy) -> None:
    assert shipped.decide(ask(caller=at("eu-fr-1"), now=ENDS - 1)).allowed
    assert shipped.decide(ask(caller=at("eu-fr-1"), now=BEGINS)).allowed


def test_no_agreement_lifts_a_rule_of_the_charter(shipped: Policy) -> None:
    narrow = dataclasses.replace(KEY, reach=at("eu-de-1"))
    decision = shipped.decide(ask(caller=at("eu-fr-1"), resource=narrow))
    assert (decision.code, decision.rules) == ("region_not_allowed", ("charter.caller",))


def test_of_what_is_nowhere_nobody_knows_that_it_stays(tmp_path: Path) -> None:
    """A charter that lost its rules about places still lets nothing of unknown whereabouts through."""
    bundle = shutil.copytree(SHIPPED, tmp_path / "bundle", ignore=shutil.ignore_patterns("cases"))
    (bundle / "charter/00-charter.cedar").write_text("")
    policy = Policy.load(bundle)
    assert policy.decide(ask()).allowed
    for request in (
        ask(caller=frozenset()),
        ask(hsm="atlantis"),
        ask(via=frozenset()),
        ask(via=at("atlantis")),
        ask(hsm="atlantis", via=at("atlantis"), caller=at("atlantis")),
        ask("decrypt", dest=at("atlantis")),
    ):
        decision = policy.decide(request)
        assert (decision.allowed, decision.rule_code) == (False, "SOV-TRANSFER"), request


def test_a_denial_is_explained_by_what_each_agreement_lacks(shipped: Policy) -> None:
    told = shown(explain(shipped, ask("decrypt", dest=at("eu-fr-1", "eu-fi-1"), purpose="care", now=ENDS)))
    assert told["decision"]["rule"] == "SOV-TRANSFER"
    fi, fr = told["transfers"]
    assert fi == {"from": "DE", "to": "FI", "agreement": None, "agreements": []}
    assert (fr["from"], fr["to"], fr["agreement"]) == ("DE", "FR", None)
    (candidate,) = fr["agreements"]
    assert (candidate["id"], candidate["lacks"]) == ("health-de-fr", ["another purpose", "ended"])
    assert candidate["not_after"] == "2030-01-01T00:00:00Z"


def test_a_fix_that_is_named_for_a_missing_agreement_flips_the_decision(shipped: Policy) -> None:
    told = explain(shipped, ask("decrypt", dest=at("eu-fi-1")))
    assert told.decision.rules == ("SOV-TRANSFER/DE/FI",)
    assert {"dest": (["eu-fi-1"], ["eu-fr-1"])} in [dict(fix.changes) for fix in told.fixes]
    assert all(shipped.decide(fix.request).allowed for fix in told.fixes)


def test_more_crossings_than_a_record_can_tell_are_denied(tmp_path: Path) -> None:
    bundle = bundle_with(tmp_path, *(agreement(f"a{n}", "DE", there) for n, there in enumerate(MANY)), places=MANY)
    policy = Policy.load(bundle)
    places = [f"place-{there.lower()}" for there in MANY]
    wide = dataclasses.replace(KEY, egress=ALL | frozenset(places))

    def release(count: int) -> Request:
        return ask("decrypt", dest=at(*places[:count]), resource=wide)

    assert len(policy.check(release(7)).rules) == 8
    decision = policy.decide(release(8))
    assert (decision.allowed, decision.code, decision.rule_code) == (False, "transfer_not_authorised", "SOV-TRANSFER")
    assert decision.rules == tuple(f"SOV-TRANSFER/DE/{there}" for there in MANY[:8])
    assert policy.decide(release(9)).rules == decision.rules
    assert policy.agrees(release(8), decision)


# ---- charters that are refused -----------------------------------------------------------------------------------------

MANY = ("AA", "BB", "CC", "DD", "EE", "GG", "HH", "II", "JJ")


def agreement(name: str, here: str, there: str, **other: str) -> str:
    fields = {
        "from": f'"{here}"',
        "to": f'"{there}"',
        "tenants": '["health"]',
        "legal_basis": '"treaty"',
        "legal_ref": '"Treaty of 1963"',
        "purposes": '["default"]',
        "parties": '["one", "two"]',
        "not_before": '"2026-01-01T00:00:00Z"',
        "not_after": '"2030-01-01T00:00:00Z"',
        **other,
    }
    return f"  {name}:\n" + "".join(f"    {k}: {v}\n" for k, v in fields.items() if v)


def bundle_with(tmp_path: Path, *agreements: str, places: tuple[str, ...] = ()) -> Path:
    bundle = shutil.copytree(SHIPPED, tmp_path / "bundle", ignore=shutil.ignore_patterns("cases"))
    charter = bundle / "charter.yaml"
    text = charter.read_text() + "".join(agreements)
    more = "".join(
        f'  place-{p.lower()}: {{jurisdiction: "{p}", groups: [], trust_domain: "{p}.example"}}\n' for p in places
    )
    charter.write_text(text.replace("tiers:", more + "tiers:", 1))
    return bundle


REFUSED = {
    "no end": ({"not_after": ""}, "new", "not_after: Field required"),
    "no beginning": ({"not_before": ""}, "new", "not_before: Field required"),
    "no legal basis": ({"legal_basis": ""}, "new", "legal_basis: Field required"),
    "no purposes": ({"purposes": "[]"}, "purposes", "at least 1"),
    "no tenants": ({"tenants": "[]"}, "tenants", "at least 1"),
    "one party": ({"parties": '["one"]'}, "parties", "at least 2"),
    "ends before it begins": ({"not_after": '"2025-12-31T00:00:00Z"'}, "not_after", "before it begins"),
    "ends as it begins": ({"not_after": '"2026-01-01T00:00:00Z"'}, "not_after", "before it begins"),
    "an end in local time": ({"not_after": '"2030-01-01T00:00:00"'}, "not_after", "offset"),
    "an end that is a day": ({"not_after": "2030-01-01"}, "not_after", "offset"),
    "an end that is a number": ({"not_after": "1893456000"}, "not_after", "offset"),
    "an end that is no time": ({"not_after": '"never"'}, "not_after", "offset"),
    "an end that is empty": ({"not_after": "null"}, "not_after", "offset"),
    "an unknown jurisdiction": ({"to": '"XX"'}, "to", "no jurisdiction"),
    "a region for a jurisdiction": ({"from": '"eu-de-1"'}, "from", "no jurisdiction"),
    "an unquoted NO": ({"to": "NO"}, "to", "quote"),
    "from and to the same": ({"to": '"DE"'}, "to", "crosses nothing"),
    "an unknown tenant": ({"tenants": '["health", "nobody"]'}, "tenants", "not registered"),
    "a legal basis that is not listed": ({"legal_basis": '"because"'}, "legal_basis", "legal_bases"),
    "an unknown field": ({"unless": '"never"'}, "unless", "Extra inputs"),
    "a purpose that no record could hold": ({"purposes": '["Any Purpose"]'}, "purposes", "pattern"),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_wrong_agreement_is_refused_with_file_line_and_reason(tmp_path: Path, name: str) -> None:
    other, field, reason = REFUSED[name]
    bundle = bundle_with(tmp_path, agreement("first", "DE", "FI"), agreement("new", "DE", "UK", **other))
    lines = (bundle / "charter.yaml").read_text().splitlines()
    new = lines.index("  new:")
    line = next(n for n, text in enumerate(lines) if n >= new and text.strip().startswith(f"{field}:")) + 1
    with pytest.raises(BundleRefused, match=r"transfer_agreements\.new") as caught:
        Policy.load(bundle)
    assert (caught.value.file, caught.value.line) == ("charter.yaml", line)
    assert reason in caught.value.reason


def test_a_name_that_is_no_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleRefused, match="lower-case"):
        Policy.load(bundle_with(tmp_path, agreement("Ours/Theirs", "DE", "UK")))


def test_of_two_agreements_of_one_name_neither_is_taken(tmp_path: Path) -> None:
    bundle = bundle_with(tmp_path, agreement("new", "DE", "UK"), agreement("new", "DE", "FI"))
    with pytest.raises(BundleRefused, match="'new' stands there twice") as caught:
        Policy.load(bundle)
    lines = (bundle / "charter.yaml").read_text().splitlines()
    assert (caught.value.file, lines[caught.value.line - 1]) == ("charter.yaml", "  new:")
    assert caught.value.line > lines.index("  new:") + 1


def test_times_may_stand_unquoted_if_they_say_their_offset(tmp_path: Path) -> None:
    late = agreement("late", "DE", "FI", not_after="2030-01-01T01:00:00+01:00")
    policy = Policy.load(bundle_with(tmp_path, late))
    request = ask("decrypt", dest=FI, now=ENDS - 1)
    assert policy.check(request).rules[-1] == "SOV-TRANSFER/DE/FI/late"
    assert not policy.decide(dataclasses.replace(request, now=ENDS)).allowed


def test_a_charter_without_agreements_lets_nothing_cross(tmp_path: Path) -> None:
    bundle = shutil.copytree(SHIPPED, tmp_path / "bundle", ignore=shutil.ignore_patterns("cases"))
    charter = bundle / "charter.yaml"
    charter.write_text(charter.read_text().partition("legal_bases:")[0])
    policy = Policy.load(bundle)
    assert policy.decide(ask()).allowed
    assert policy.decide(ask(caller=at("eu-fr-1"))).rule_code == "SOV-TRANSFER"


def test_no_policy_can_take_the_name_of_the_check(tmp_path: Path) -> None:
    bundle = shutil.copytree(SHIPPED, tmp_path / "bundle")
    roles = bundle / "tenants/health/00-roles.cedar"
    roles.write_text(
        roles.read_text()
        + '\n@id("SOV-TRANSFER/DE/FI/mine") @layer("tenant") permit (principal, action, resource in Tenant::"health")'
        + ' when { principal.tenant == Tenant::"health" };'
    )
    with pytest.raises(BundleRefused, match="typed code"):
        Policy.load(bundle)
