"""Small rules of the charter's words: where a caller can be, which names stand for places, which keys prove a hop."""

from __future__ import annotations

import base64
import dataclasses
from typing import Any

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pydantic import ValidationError

from policy import Caller, Evidence, UnknownPlace, behind, whereabouts
from policy.bundle import SHIPPED
from policy.places import Charter, Member, Registry

CALLER = Caller("mtls:x:/y", "workload", "health", frozenset({"workload"}), frozenset({"eu-de-1"}), 4, "mtls")
FRANCE = frozenset({"eu-fr-1"})


def charter(**more: Any) -> Charter:
    return Charter.model_validate({**yaml.safe_load((SHIPPED / "charter.yaml").read_text()), **more})


def test_who_comes_through_a_forwarder_may_be_where_its_own_caller_is_and_who_is_nowhere_stays_there() -> None:
    assert behind(CALLER, FRANCE).places == {"eu-de-1", "eu-fr-1"}
    assert behind(CALLER, frozenset()) is CALLER
    nowhere = dataclasses.replace(CALLER, places=frozenset())
    assert behind(nowhere, FRANCE).places == frozenset()


@pytest.mark.parametrize(
    ("places", "good"),
    [(["eu-de-1"], True), (["DE"], True), (["approved"], True), (["nowhere"], False), (["eu-de-1", "de"], False)],
)
def test_a_copy_is_in_places_of_the_charter(places: list[str], good: bool) -> None:
    copies = {"vault": {"kind": "backup", "of": "eu-de-1", "places": places}}
    if good:
        assert charter(copies=copies).copies["vault"].places == tuple(places)
        return
    with pytest.raises(ValidationError, match="is no place, jurisdiction or group of the charter"):
        charter(copies=copies)


def forwarder(key: Any) -> dict[str, Any]:
    der = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    identity = "mtls:eu-de-1.gov.example:/platform/proxy"
    return {"edge": {"identity": identity, "places": ["eu-de-1"], "public_key": base64.b64encode(der).decode()}}


def test_a_forwarder_signs_with_one_of_two_kinds_of_key() -> None:
    for good in (ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP256R1())):
        assert charter(forwarders=forwarder(good)).forwarders["edge"].places == ("eu-de-1",)
    for bad in (rsa.generate_private_key(65_537, 2_048), ec.generate_private_key(ec.SECP384R1())):
        with pytest.raises(ValidationError, match="an Ed25519 or P-256 key"):
            charter(forwarders=forwarder(bad))


def test_a_forwarders_key_is_a_public_key_in_base64() -> None:
    good = forwarder(ed25519.Ed25519PrivateKey.generate())["edge"]
    for text in ("", "x", "AAAA", good["public_key"][:-4], good["public_key"] + "\n", "-" + good["public_key"]):
        with pytest.raises(ValidationError, match="a public key in base64"):
            charter(forwarders={"edge": {**good, "public_key": text}})


READ = yaml.safe_load((SHIPPED / "charter.yaml").read_text())
DE1 = READ["places"]["eu-de-1"]
EDGE = forwarder(ed25519.Ed25519PrivateKey.generate())["edge"]
SECOND = forwarder(ed25519.Ed25519PrivateKey.generate())["edge"]
SYSTEM = {"tenant": "health", "critical": True, "stores": {"db": "alias/db"}}
VAULT = {"kind": "backup", "of": "eu-de-1", "places": ["DE"]}
ELSEWHERE = "mtls:eu-de-1.gov.example:/platform/other"


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"tiers": {n: READ["tiers"][n] for n in (1, 2)}}, "1, 2 and 3 must be there"),
        ({"tiers": {**READ["tiers"], 4: READ["tiers"][3]}}, "1, 2 and 3 must be there"),
        ({"places": {**READ["places"], "market": {**DE1, "trust_domain": "x", "groups": ["market"]}}}, "share a name"),
        ({"places": {**READ["places"], "x": {**DE1, "trust_domain": "x", "jurisdiction": "uk-1"}}}, "share a name"),
        ({"places": {**READ["places"], "Eu_De": {**DE1, "trust_domain": "x"}}}, "place 'Eu_De'"),
        ({"places": {**READ["places"], "x": DE1}}, "each trust domain vouches for one region"),
        ({"tenants": {"health": {"home": "EU"}}}, "tenant health: home 'EU' is no jurisdiction"),
        ({"tenants": {"health": {"home": "eu-de-1"}}}, "tenant health: home 'eu-de-1' is no jurisdiction"),
        *(
            ({"tenants": {name: {"home": "DE"}}}, "tenant name")
            for name in ("root", "installation", "none", "A", "a/b")
        ),
        ({"systems": {"X": SYSTEM}}, "system name 'X'"),
        ({"systems": {"x": {**SYSTEM, "tenant": "nobody"}}}, "'nobody' is no tenant of the charter"),
        ({"forwarders": {"Edge": EDGE}}, "forwarder name 'Edge'"),
        ({"forwarders": {"edge": {**EDGE, "places": ["eu-de-2"]}}}, "'eu-de-2' is no place that the authority"),
        ({"forwarders": {"edge": {**EDGE, "places": ["eu-de-1", "DE"]}}}, "'DE' is no place that the authority"),
        (
            {"forwarders": {"a": EDGE, "b": {**SECOND, "identity": EDGE["identity"]}}},
            "two forwarders have one identity",
        ),
        ({"forwarders": {"a": EDGE, "b": {**EDGE, "identity": ELSEWHERE}}}, "two forwarders have one public_key"),
        ({"copies": {"Vault": VAULT}}, "copy name 'Vault'"),
        ({"copies": {"eu-de-1": VAULT}}, "copy name 'eu-de-1'"),
        ({"copies": {"vault": {**VAULT, "of": "DE"}}}, "'DE' is neither a region nor another copy"),
    ],
)
def test_a_charter_that_contradicts_itself_is_refused_with_its_word(more: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        charter(**more)


def test_what_a_charter_may_say_beside_is_taken() -> None:
    both = charter(
        forwarders={"a": EDGE, "b": {**SECOND, "identity": ELSEWHERE}},
        copies={"vault": {**VAULT, "places": ["eu-de-2", "EU", "DE", "approved"]}, "second": {**VAULT, "of": "vault"}},
        systems={"billing": SYSTEM},
    )
    registry = Registry(both, {})
    assert (registry.forwarder_of(EDGE["identity"]), registry.forwarder_of(ELSEWHERE)) == ("a", "b")
    assert registry.forwarder_of(EDGE["identity"].upper()) is None
    found = registry.forwarder("b")
    assert found is not None
    assert (found.identity, found.domain) == (ELSEWHERE, "eu-de-1.gov.example")
    assert registry.forwarder("c") is None
    assert registry.has_forwarders is True
    assert Registry(charter(), {}).has_forwarders is False
    assert set(registry.copies) == {"vault", "second"}
    assert set(registry.systems) == {"billing"}


# ---- the charter's words, looked up ----------------------------------------------------------------------------------


DE = frozenset({"eu-de-1", "eu-de-2"})
EU = DE | {"eu-fr-1", "eu-fi-1"}
ALLIED = EU | {"no-1", "uk-1"}


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry(charter(), {"oidc:x:y": Member("health", "operator", "p1")})


def test_a_name_stands_for_its_regions_and_an_unknown_one_for_none(registry: Registry) -> None:
    assert [registry.expand([name]) for name in ("eu-de-1", "DE", "EU", "ALLIED")] == [{"eu-de-1"}, DE, EU, ALLIED]
    assert registry.expand(["approved"]) == ALLIED | {"us-mkt-1"}
    assert registry.expand(["DE", "UK"]) == DE | {"uk-1"}
    assert registry.expand([]) == frozenset()
    for names in (["Atlantis"], ["DE", "de"], ["Eu"]):
        with pytest.raises(UnknownPlace):
            registry.expand(names)


def test_a_region_is_meant_by_its_own_name_its_jurisdiction_its_groups_and_everything(registry: Registry) -> None:
    assert registry.around(["eu-de-1"]) == {"eu-de-1", "DE", "EU", "ALLIED", "approved"}
    assert registry.around(["us-mkt-1"]) == {"us-mkt-1", "US", "MARKET", "approved"}
    assert registry.around(["elsewhere"]) == {"elsewhere"}
    assert registry.around([]) == frozenset()


def test_whom_and_what_the_charter_does_not_have_nobody_finds(registry: Registry) -> None:
    assert registry.place_of_trust_domain("eu-fr-1.gov.example") == "eu-fr-1"
    assert registry.place_of_trust_domain("eu-xx-1.gov.example") is None
    assert registry.tenant_names() == ("health", "defence")
    found = registry.tenant("health")
    assert found is not None
    assert (found.home, found.default_reason) == ("DE", "customer-initiated")
    assert registry.tenant("Health") is None
    assert registry.member("oidc:x:y") == Member("health", "operator", "p1")
    assert registry.member("oidc:x:Y") is None
    assert dict(registry.members) == {"oidc:x:y": Member("health", "operator", "p1")}
    assert "treaty" in registry.legal_bases
    assert set(registry.suppliers) == {"hsm-de", "hsm-fr"}


def test_places_and_tenants_are_described_by_name(registry: Registry) -> None:
    places = registry.describe_places()
    assert [p["name"] for p in places] == sorted(READ["places"])
    assert places[0] == {
        "name": "eu-de-1",
        "jurisdiction": "DE",
        "groups": ["EU", "ALLIED"],
        "trust_domain": "eu-de-1.gov.example",
    }
    assert registry.describe_tenants() == [{"name": "defence", "home": "DE"}, {"name": "health", "home": "DE"}]


def test_a_tier_bounds_where_material_may_exist(registry: Registry) -> None:
    assert [registry.within_tier(tier, "health") for tier in (1, 2, 3)] == [DE, ALLIED, ALLIED | {"us-mkt-1"}]
    assert [dict(registry.bar(tier)) for tier in (1, 2)] == [{"SOV-2": 3, "SOV-3": 3}, {}]
    nowhere = charter(tiers={**READ["tiers"], 2: {"residency_within": "Atlantis"}})
    assert Registry(nowhere, {}).within_tier(2, "health") == frozenset()


HOME = frozenset({"eu-de-1"})
NOWHERE: frozenset[str] = frozenset()
GOOD: dict[str, Any] = {"tenant": "health", "tier": 1, "home": "eu-de-1", "failover": NOWHERE}
GOOD |= dict.fromkeys(("residency", "execution", "reach", "egress"), HOME)


@pytest.mark.parametrize(
    ("other", "lacks"),
    [
        ({}, ()),
        ({"residency": DE}, ()),
        ({"residency": DE, "failover": frozenset({"eu-de-2"})}, ()),
        ({"tier": 2, "residency": ALLIED}, ()),
        ({"execution": EU, "reach": EU, "egress": ALLIED}, ()),
        ({"tenant": "nobody"}, ("tenant is not registered",)),
        ({"residency": DE | FRANCE}, ("residency lies within home-jurisdiction",)),
        ({"tier": 2, "residency": HOME | {"us-mkt-1"}}, ("residency lies within ALLIED",)),
        ({"residency": NOWHERE}, ("residency lies within home-jurisdiction", "home is part of residency")),
        ({"home": "eu-de-2"}, ("home is part of residency",)),
        ({"failover": frozenset({"eu-de-2"})}, ("failover is part of residency",)),
        *(({name: NOWHERE}, (f"{name} names approved places",)) for name in ("execution", "reach", "egress")),
        *(({name: HOME | {"mars"}}, (f"{name} names approved places",)) for name in ("execution", "reach", "egress")),
    ],
)
def test_a_key_is_told_all_that_it_lacks_for_its_tier(
    registry: Registry, other: dict[str, Any], lacks: tuple[str, ...]
) -> None:
    assert registry.check_key(**{**GOOD, **other}) == lacks


def test_a_verdict_is_of_places_and_suppliers_together(registry: Registry) -> None:
    now = 1_800_000_000 * 1_000_000
    good = registry.verdict(**GOOD, suppliers=["hsm-de"], now=now)
    assert good.gaps == ()
    assert good.until > now
    for other, gap in (({"home": "eu-de-2"}, "home is part of residency"), ({"tier": 4}, "the tier is 1, 2 or 3")):
        assert [g.what for g in registry.verdict(**{**GOOD, **other}, suppliers=["hsm-de"], now=now).gaps] == [gap]
    assert registry.verdict(**GOOD, suppliers=["hsm-fr"], now=now).gaps
    assert registry.verdict(**GOOD, suppliers=[None], now=now).gaps


# ---- what evidence proves --------------------------------------------------------------------------------------------


SVID = Evidence("svid", HOME, vouches=HOME)
LISTENER = Evidence("listener", HOME)
DOCUMENT = Evidence("document", HOME)
TEE = Evidence("tee")
CONFLICT = (NOWHERE, 0, True)


@pytest.mark.parametrize(
    ("evidence", "found"),
    [
        ([], (NOWHERE, 0, False)),
        ([LISTENER], (HOME, 2, False)),
        ([LISTENER, Evidence("listener", DE)], (HOME, 2, False)),
        ([LISTENER, Evidence("listener", FRANCE)], CONFLICT),
        ([LISTENER, TEE], (HOME, 2, False)),
        ([DOCUMENT], (NOWHERE, 0, False)),
        ([DOCUMENT, LISTENER], (NOWHERE, 0, False)),
        ([dataclasses.replace(DOCUMENT, bound=False), LISTENER], (HOME, 2, False)),
        ([TEE, DOCUMENT], (NOWHERE, 0, False)),
        ([SVID], (HOME, 3, False)),
        ([Evidence("svid", HOME)], (HOME, 3, False)),  # whom nobody restricted
        ([SVID, TEE], (HOME, 4, False)),
        ([SVID, dataclasses.replace(TEE, bound=False)], (HOME, 3, False)),
        ([SVID, dataclasses.replace(TEE, stale=True)], (HOME, 3, False)),
        ([SVID, DOCUMENT], (HOME, 4, False)),
        ([SVID, DOCUMENT, TEE], (HOME, 5, False)),
        ([SVID, dataclasses.replace(DOCUMENT, stale=True), TEE], (HOME, 4, False)),
        ([Evidence("svid", DE, vouches=DE), DOCUMENT], (HOME, 4, False)),
        ([SVID, Evidence("svid", FRANCE, vouches=FRANCE)], CONFLICT),
        ([SVID, Evidence("document", FRANCE)], CONFLICT),
        ([SVID, LISTENER, Evidence("listener", FRANCE)], CONFLICT),
        ([Evidence("svid", DE, vouches=HOME)], CONFLICT),
        ([LISTENER, dataclasses.replace(LISTENER, vouches=FRANCE)], CONFLICT),
        ([dataclasses.replace(LISTENER, vouches=DE)], (HOME, 2, False)),
        ([SVID, Evidence("svid", FRANCE, vouches=HOME, stale=True)], (HOME, 3, False)),
        ([SVID, Evidence("header", FRANCE, vouches=HOME)], (HOME, 3, False)),
    ],
)
def test_evidence_narrows_proves_or_contradicts(
    evidence: list[Evidence], found: tuple[frozenset[str], int, bool]
) -> None:
    where = whereabouts(evidence)
    assert (where.places, where.proof, where.conflict) == found
    assert whereabouts(reversed(evidence)) == where
