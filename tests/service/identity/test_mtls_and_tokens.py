"""Certificates and API tokens as proofs (I-10, I-11, I-15, L-07)."""

from __future__ import annotations

import pickle
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from databases import empty, sqlite_only
from policy import Policy
from policy.bundle import SHIPPED
from service.database import open_engine
from service.devpki import Authority
from service.identity import Unidentified
from service.identity.api_token import SCANNER, ApiTokenProvider
from service.identity.mtls import MtlsProvider
from service.rows import ApiTokens, NewToken, tables

pytestmark = pytest.mark.anyio
DOMAIN = "eu-de-1.gov.example"
GOOD = f"spiffe://{DOMAIN}/health/ns/ml/sa/serve"


@dataclass(frozen=True)
class Trust:
    domain: str
    authority: Path


class World:
    def __init__(self, directory: Path) -> None:
        self.authorities = {d: Authority.create(d) for d in (DOMAIN, "eu-fr-1.gov.example")}
        trust = []
        for domain, authority in self.authorities.items():
            authority.write(directory / f"{domain}.pem", directory / f"{domain}.key")
            trust.append(Trust(domain, directory / f"{domain}.pem"))
        self.registry = Policy.load(SHIPPED).registry
        self.provider = MtlsProvider(lambda: self.registry, trust, clock=time.time)

    async def ask(self, *uris: str, domain: str = DOMAIN, **options: Any) -> Any:
        pem, _ = self.authorities[domain].issue("x", uris=uris, **options)
        return await self.provider.identify(
            {"extensions": {"tls": {"client_cert_chain": [pem.decode()]}}, "headers": []}
        )


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def test_an_svid_names_tenant_and_the_place_its_authority_vouches_for(world: World) -> None:
    caller = await world.ask(GOOD)
    assert (caller.id, caller.kind, caller.tenant, caller.places, caller.proof) == (
        f"mtls:{DOMAIN}:/health/ns/ml/sa/serve",
        "workload",
        "health",
        frozenset({"eu-de-1"}),
        3,
    )
    operator = await world.ask(f"spiffe://{DOMAIN}/health/people/operator-1")
    assert (operator.kind, operator.roles) == ("operator", frozenset({"operator"}))


@pytest.mark.parametrize(
    "uris",
    [
        (),
        (GOOD, GOOD + "2"),
        (f"spiffe://{DOMAIN}",),
        (f"spiffe://{DOMAIN}/",),
        (f"spiffe://{DOMAIN.upper()}/health/x",),
        (f"spiffe://{DOMAIN}/health/%2e%2e/x",),
        (f"spiffe://{DOMAIN}/health/../defence/x",),
        (f"spiffe://{DOMAIN}/./health/x",),
        (f"spiffe://{DOMAIN}:8443/health/x",),
        (f"spiffe://user@{DOMAIN}/health/x",),
        (f"spiffe://{DOMAIN}//health/x",),
        (f"spiffe://{DOMAIN}/health/x/",),
        (f"https://{DOMAIN}/health/x",),
        (f"spiffe://{DOMAIN}/health/" + "a" * 2_100,),
        (f"spiffe://{DOMAIN}/health/x?y=1",),
        (f"spiffe://{DOMAIN}/unknown-tenant/x",),
        (f"spiffe://{DOMAIN}/platform/nobody",),
        ("spiffe://unknown.example/health/x",),
    ],
)
async def test_I_10_other_names_are_no_svids(world: World, uris: tuple[str, ...]) -> None:
    with pytest.raises(Unidentified):
        await world.ask(*uris)


async def test_I_10_a_server_certificate_and_an_authority_are_no_callers(world: World) -> None:
    with pytest.raises(Unidentified):
        await world.ask(GOOD, server=True)
    from cryptography.hazmat.primitives import serialization

    pem = world.authorities[DOMAIN].certificate.public_bytes(serialization.Encoding.PEM).decode()
    with pytest.raises(Unidentified):
        await world.provider.identify({"extensions": {"tls": {"client_cert_chain": [pem]}}, "headers": []})


async def test_one_regions_authority_cannot_vouch_for_anothers(world: World) -> None:
    with pytest.raises(Unidentified, match="authority_not_trusted"):
        await world.ask(GOOD, domain="eu-fr-1.gov.example")


async def test_I_08_an_expired_certificate_is_refused(world: World) -> None:
    with pytest.raises(Unidentified, match="certificate_expired"):
        await world.ask(GOOD, seconds=-10)


def test_I_11_a_leaf_is_no_trust_anchor(world: World, tmp_path: Path) -> None:
    pem, _ = world.authorities[DOMAIN].issue("x", uris=(GOOD,))
    (tmp_path / "leaf.pem").write_bytes(pem)
    with pytest.raises(ValueError, match="authority"):
        MtlsProvider(lambda: world.registry, [Trust(DOMAIN, tmp_path / "leaf.pem")], clock=time.time)


class Tokens:
    def __init__(self, directory: Path) -> None:
        self.now = 1_800_000_000_000_000
        self.engine = open_engine(empty(directory))
        with self.engine.begin() as connection:
            tables.create_all(connection)
        self.tokens = ApiTokens(self.engine, pepper=b"p" * 32, installation="i", clock=lambda: self.now)
        self.provider = ApiTokenProvider(self.tokens)

    def make(self) -> tuple[str, str]:
        new = NewToken("health", "operator", frozenset({"listKeys", "destroy", "setPolicy"}), 600, "mtls:x:/y")
        token, text, write = self.tokens.plan_create(new)
        with self.engine.begin() as connection:
            write(connection)
        return token.id, text

    async def ask(self, text: str) -> Any:
        return await self.provider.identify({"headers": [(b"authorization", b"Bearer " + text.encode())]})


@pytest.fixture
def issued(tmp_path: Path) -> Tokens:
    return Tokens(tmp_path)


async def test_I_15_a_token_is_held_to_tenant_role_and_scopes_and_never_destroys(issued: Tokens) -> None:
    _, text = issued.make()
    caller = await issued.ask(text)
    assert (caller.tenant, caller.roles, caller.scopes) == ("health", frozenset({"operator"}), frozenset({"listKeys"}))
    assert (caller.places, caller.proof) == (frozenset(), 0)
    assert SCANNER.fullmatch(text)
    assert re.search(SCANNER, f"config = '{text}'")


@sqlite_only
async def test_I_15_only_a_keyed_hash_is_at_rest(issued: Tokens, tmp_path: Path) -> None:
    _, text = issued.make()
    secret = text.split("_")[3].encode()
    for path in tmp_path.iterdir():
        assert secret not in path.read_bytes()
        assert secret[:20] not in path.read_bytes()


async def test_I_15_changed_expired_and_revoked_tokens_are_refused(issued: Tokens) -> None:
    token_id, text = issued.make()
    await issued.ask(text)
    flipped = text[:-10] + ("A" if text[-10] != "A" else "B") + text[-9:]
    for bad in (flipped, text[:-1], text + "0", text.replace("api", "adm"), "skms_", "skms_api_00000000_" + "0" * 49):
        with pytest.raises(Unidentified):
            await issued.ask(bad)
    other = ApiTokens(issued.engine, pepper=b"p" * 32, installation="i", clock=lambda: issued.now)
    with issued.engine.begin() as connection:
        other.plan_revoke("health", token_id)(connection)
    issued.tokens.poll()  # each worker does this five times a second
    with pytest.raises(Unidentified):
        await issued.ask(text)
    _, second = issued.make()
    issued.now += 601_000_000
    with pytest.raises(Unidentified):
        await issued.ask(second)


def test_L_07_nothing_secret_is_shown_or_pickled(issued: Tokens) -> None:
    assert "p" * 8 not in repr(issued.tokens)
    with pytest.raises(TypeError):
        pickle.dumps(issued.tokens)
    import uuid

    from keystore.hsm import Wrapped
    from service.work import DataKey, Plaintext

    for value in (
        Wrapped(b"SECRETBLOB", "m", uuid.uuid4()),
        Plaintext(None, 1, b"SECRETBLOB"),
        DataKey(None, 1, b"", b"SECRETBLOB"),
    ):
        assert "SECRETBLOB" not in repr(value)
