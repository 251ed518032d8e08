"""OIDC tokens: what is ambiguous or foreign is refused before and after the library (I-01 to I-05)."""

from __future__ import annotations

import base64
import hmac
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from joserfc import jwt
from joserfc.jwk import ECKey, KeySet, RSAKey

from service.identity import Unidentified
from service.identity.oidc import OidcProvider

pytestmark = pytest.mark.anyio
NOW = 1_800_000_000


@dataclass(frozen=True)
class Issuer:
    issuer: str
    jwks_file: Path | None
    audience: str = "skms"
    algorithms: tuple[str, ...] = ("ES256",)
    jwks_uri: str | None = None
    tenant: str = "health"
    place: str = "eu-de-1"
    roles: tuple[str, ...] = ()


class World:
    """Two issuers with keys of their own; the second has a key with the first one's id."""

    def __init__(self, directory: Path) -> None:
        self.key = ECKey.generate_key("P-256", {"kid": "k1", "alg": "ES256"})
        self.other = ECKey.generate_key("P-256", {"kid": "k1", "alg": "ES256"})
        self.rsa = RSAKey.generate_key(2048, {"kid": "r1", "alg": "RS256"})
        for name, keys in (("one", [self.key, self.rsa]), ("two", [self.other])):
            (directory / name).write_text(json.dumps(KeySet(keys).as_dict(private=False)))
        issuers = (
            Issuer("https://one.example", directory / "one", algorithms=("ES256", "RS256")),
            Issuer("https://two.example", directory / "two"),
        )
        self.provider = OidcProvider(issuers, clock=lambda: NOW)

    def claims(self, **changes: Any) -> dict[str, Any]:
        made = {"iss": "https://one.example", "aud": "skms", "sub": "svc", "iat": NOW, "exp": NOW + 600}
        made.update(changes)
        return {k: v for k, v in made.items() if v is not None}

    def token(self, claims: dict[str, Any] | None = None, *, key: Any = None, **header: Any) -> str:
        chosen = key or self.key
        made = {"alg": chosen.alg, "kid": chosen.kid, **header}
        return jwt.encode(made, claims or self.claims(), chosen, algorithms=[made["alg"]])

    async def ask(self, token: str) -> Any:
        return await self.provider.identify(
            {"headers": [(b"authorization", b"Bearer " + token.encode())], "client": ("x", 1)}
        )


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def sign_by_hand(world: World, header: str, claims: str) -> str:
    """A token with exactly these bytes, signed correctly."""
    signed = f"{b64(header.encode())}.{b64(claims.encode())}"
    private = world.key.private_key
    der = private.sign(signed.encode(), ec.ECDSA(hashes.SHA256()))
    r, s = decode_dss_signature(der)
    return f"{signed}.{b64(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"


async def test_a_good_token_names_tenant_place_and_subject(world: World) -> None:
    caller = await world.ask(world.token())
    assert (caller.id, caller.tenant, caller.places, caller.proof, caller.kind) == (
        "oidc:https://one.example:svc",
        "health",
        frozenset({"eu-de-1"}),
        3,
        "workload",
    )
    by_hand = sign_by_hand(world, '{"alg":"ES256","kid":"k1"}', json.dumps(world.claims()))
    assert (await world.ask(by_hand)).id == caller.id


@pytest.mark.parametrize(
    "header",
    [
        '{"alg":"none","kid":"k1"}',
        '{"alg":"nOnE","kid":"k1"}',
        '{"alg":"HS256","kid":"k1"}',
        '{"alg":"RS256","kid":"k1"}',
        '{"alg":"ES256","kid":"r1"}',
        '{"alg":"ES256"}',
        '{"alg":"ES256","kid":"k1","crit":[]}',
        '{"alg":"ES256","kid":"k1","crit":["x"]}',
        '{"alg":"ES256","kid":"k1","b64":false}',
        '{"alg":"ES256","kid":"k1","jwk":{}}',
        '{"alg":"ES256","kid":"k1","jku":"https://evil.example"}',
        '{"alg":"ES256","kid":"k1","x5u":"https://evil.example"}',
        '{"alg":"ES256","kid":"k1","x5c":[]}',
        '{"alg":"ES256","kid":"k1","zip":"DEF"}',
        '{"alg":"ES256","kid":"k1","p2c":100000000}',
        '{"alg":"none","alg":"ES256","kid":"k1"}',
        '{"alg":"ES256","kid":"k1","typ":"JWE"}',
        '{"alg":"ES256","kid":"k1","x":"' + "a" * 3_000 + '"}',
        '{"alg":["ES256"],"kid":"k1"}',
        "[]",
        "NaN",
    ],
)
async def test_I_01_W_13_header_tricks_are_refused(world: World, header: str) -> None:
    with pytest.raises(Unidentified):
        await world.ask(sign_by_hand(world, header, json.dumps(world.claims())))


async def test_I_01_hs256_with_the_public_key_as_secret_is_refused(world: World) -> None:
    pem = world.rsa.as_pem(private=False)
    header = b64(json.dumps({"alg": "HS256", "kid": "r1"}).encode())
    signed = f"{header}.{b64(json.dumps(world.claims()).encode())}"
    with pytest.raises(Unidentified):
        await world.ask(f"{signed}.{b64(hmac.digest(pem, signed.encode(), 'sha256'))}")


@pytest.mark.parametrize(
    "changes",
    [
        {"aud": None},
        {"aud": ["skms"]},
        {"aud": ["skms", "other"]},
        {"aud": "skm"},
        {"aud": "skms2"},
        {"aud": "SKMS"},
        {"aud": ""},
        {"iss": None},
        {"iss": ["https://one.example"]},
        {"iss": "https://one.example/"},
        {"iss": "https://one"},
        {"iss": "https://unknown.example"},
    ],
)
async def test_I_02_audience_and_issuer_are_exact(world: World, changes: dict[str, Any]) -> None:
    with pytest.raises(Unidentified):
        await world.ask(sign_by_hand(world, '{"alg":"ES256","kid":"k1"}', json.dumps(world.claims(**changes))))


@pytest.mark.parametrize(
    "changes",
    [
        {"exp": None},
        {"exp": str(NOW + 600)},
        {"exp": 1e300},
        {"exp": -1},
        {"exp": NOW - 1},
        {"exp": True},
        {"exp": NOW + 3_601},
        {"iat": None},
        {"iat": NOW + 120},
        {"nbf": NOW + 120},
        {"nbf": "x"},
        {"exp": NOW + 600.5},
    ],
)
async def test_I_03_dates_are_integers_in_order(world: World, changes: dict[str, Any]) -> None:
    with pytest.raises(Unidentified):
        await world.ask(sign_by_hand(world, '{"alg":"ES256","kid":"k1"}', json.dumps(world.claims(**changes))))


async def test_I_03_1e300_written_out_and_doubled_dates_are_refused(world: World) -> None:
    for claims in ('"exp":1e300', f'"exp":{NOW - 1},"exp":{NOW + 600}'):
        text = '{"iss":"https://one.example","aud":"skms","sub":"s","iat":' + str(NOW) + "," + claims + "}"
        with pytest.raises(Unidentified):
            await world.ask(sign_by_hand(world, '{"alg":"ES256","kid":"k1"}', text))


async def test_I_04_only_the_issuers_own_keys_are_tried(world: World) -> None:
    second = world.claims(iss="https://two.example")
    with pytest.raises(Unidentified):
        await world.ask(world.token(second, key=world.key))
    assert (await world.ask(world.token(second, key=world.other))).id == "oidc:https://two.example:svc"


@pytest.mark.parametrize("token", ["", "a", "a.b", "a.b.c", "a.b.c.d", "..", "=.=.=", "a" * 20_000, "e30.e30.e30"])
async def test_junk_is_refused(world: World, token: str) -> None:
    with pytest.raises(Unidentified):
        await world.ask(token)


async def test_a_changed_or_respelt_token_is_refused(world: World) -> None:
    token = world.token()
    head, body, signature = token.split(".")
    last = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    respelt = signature[:-1] + last[last.index(signature[-1]) ^ 1]
    for bad in (
        f"{head}.{body}.{respelt}",
        f"{head}.{body}.",
        f"{head}.{body}.{signature}=",
        f"{head}.{body[:-2]}.{signature}",
    ):
        with pytest.raises(Unidentified):
            await world.ask(bad)


async def test_I_05_an_issuer_whose_keys_cannot_be_fetched_lets_nobody_in() -> None:
    gone = Issuer("https://gone.example", None, jwks_uri="https://127.0.0.1:9/jwks")
    provider = OidcProvider((gone,), clock=time.time)
    key = ECKey.generate_key("P-256", {"kid": "k1", "alg": "ES256"})
    claims = {"iss": gone.issuer, "aud": "skms", "sub": "s", "iat": int(time.time()), "exp": int(time.time()) + 60}
    token = jwt.encode({"alg": "ES256", "kid": "k1"}, claims, key)
    for _ in range(2):
        with pytest.raises(Unidentified):
            await provider.identify({"headers": [(b"authorization", b"Bearer " + token.encode())]})


async def test_two_credentials_are_refused(world: World) -> None:
    header = (b"authorization", b"Bearer " + world.token().encode())
    with pytest.raises(Unidentified):
        await world.provider.identify({"headers": [header, header]})


def test_keys_of_the_test_are_what_they_say(world: World) -> None:
    assert isinstance(world.rsa.private_key, rsa.RSAPrivateKey)
    assert world.key.private_key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
