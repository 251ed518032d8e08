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

from policy import Caller, behind
from policy.bundle import SHIPPED
from policy.places import Charter

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
