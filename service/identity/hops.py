"""Hop tokens: the forwarders that a request came through, each in a statement that it signed over the ones before it.

A forwarder ends the TLS of its callers and opens a connection of its own, so plaintext passes at its place. It says so in
`Skms-Hops`: compact JWS (RFC 7515), one for each hop, separated by commas, the first hop first. A token is good for one
request: method, target, body and credential are in it. What a token says widens where plaintext passes (`via`) and where
the caller may be; it never narrows either, and it never says who the caller is.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final

import msgspec
from joserfc import jws
from joserfc.errors import JoseError
from joserfc.jwk import ECKey, OKPKey
from msgspec import Meta, Struct
from starlette.types import Scope

from policy import DIRECT, Hops, Registry
from service.identity import Unidentified, bearer
from service.identity.oidc import parsed

HEADER: Final = "skms-hops"
TYPE: Final = "skms-hop+jwt"
MOST: Final = 4  # hops
LONGEST: Final = 4_096  # characters of one token
LIFETIME_S: Final = 60
SKEW_S: Final = 5  # how far a forwarder's clock may be ahead
_KEPT_US: Final = (LIFETIME_S + SKEW_S + 60) * 1_000_000  # longer than any token lives
_IDENTITY: Final = re.compile(r"mtls:([a-z0-9._-]{1,255}):(?:/[A-Za-z0-9._-]+)+")

Digest = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{43}$")]  # SHA-256 in base64url


class HopRefused(Exception):
    """The way of a request is not proven. `reason` is a short constant, for record, alarm and answer."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"hop: {reason}")
        self.reason = reason


class _Claims(Struct, frozen=True, forbid_unknown_fields=True):
    """What a forwarder states. The names of RFC 7519 and RFC 9449 where they have one."""

    aud: str  # the installation
    iat: Annotated[int, Meta(ge=0, lt=2**40)]
    exp: Annotated[int, Meta(ge=0, lt=2**40)]
    jti: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{16,64}$")]
    htm: str  # method
    htu: str  # target: path and query, byte for byte
    body: Digest
    places: Annotated[tuple[str, ...], Meta(min_length=1, max_length=64)]  # where it can be
    ath: Digest | None = None  # SHA-256 of the bearer token; absent if the request has none
    from_: str | None = msgspec.field(default=None, name="from")  # who connected, by client certificate; absent: nobody
    prev: Digest | None = None  # SHA-256 of the token before; absent in the first


@dataclass(frozen=True, slots=True)
class Forwarded:
    """A request as a forwarder passes it on, byte for byte."""

    method: str
    target: str  # path and query
    body: bytes
    bearer: str | None = None

    def stated(self) -> dict[str, str]:
        """The claims that bind a token to it."""
        bound = {"htm": self.method, "htu": self.target, "body": digest(self.body)}
        return bound if self.bearer is None else {**bound, "ath": digest(self.bearer.encode())}


def digest(data: bytes) -> str:
    """SHA-256 in base64url without padding."""
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def add_hop(
    request: Forwarded,
    *,
    name: str,
    key: OKPKey | ECKey,
    audience: str,
    places: Sequence[str],
    now: int,
    came_from: str | None = None,
    before: str = "",
    lifetime_s: int = 30,
) -> str:
    """The value of `Skms-Hops` for the next connection, as forwarder `name` makes it; `now` in seconds.

    `before` is the value that came with the request, `came_from` the canonical identity of the client certificate that it
    came with. A forwarder verifies both before it calls this: it answers for whom it lets through.
    """
    claims: dict[str, Any] = {
        **request.stated(),
        "aud": audience,
        "iat": now,
        "exp": now + lifetime_s,
        "jti": uuid.uuid4().hex,
        "places": list(places),
    }
    if came_from is not None:
        claims["from"] = came_from
    if before:
        claims["prev"] = digest(before.rpartition(",")[2].encode())
    algorithm = "ES256" if isinstance(key, ECKey) else "Ed25519"
    header = {"alg": algorithm, "kid": name, "typ": TYPE}
    token = jws.serialize_compact(header, msgspec.json.encode(claims), key, algorithms=[algorithm])
    return f"{before},{token}" if before else token


@functools.lru_cache(maxsize=256)
def _key(public_key: str) -> tuple[OKPKey | ECKey, str]:
    """(key, its one algorithm) of a registered forwarder."""
    pem = f"-----BEGIN PUBLIC KEY-----\n{public_key}\n-----END PUBLIC KEY-----\n"
    try:
        return ECKey.import_key(pem), "ES256"
    except (JoseError, ValueError):
        return OKPKey.import_key(pem), "Ed25519"


class Ways:
    """Proves how requests came here. `peer` names who a connection is with, `once` spends names for so many us."""

    def __init__(
        self,
        registry: Callable[[], Registry],
        peer: Callable[[Scope], str | None],
        *,
        once: Callable[[Sequence[str], int], bool],
        audience: str,
        clock: Callable[[], float],
    ) -> None:
        self._registry, self._peer, self._once = registry, peer, once
        self._audience, self._clock = audience, clock

    def announced(self, scope: Scope) -> list[str]:
        """The tokens of a request, the first hop first; HopRefused where a forwarder sends none, or a stranger some."""
        values = [v for k, v in scope["headers"] if k.lower() == HEADER.encode()]
        if not values and not self._registry().has_forwarders:
            return []
        peer = self._peer(scope)
        forwarder = None if peer is None else self._registry().forwarder_of(peer)
        if forwarder is None and not values:
            return []
        if forwarder is None:
            raise HopRefused("peer_is_no_forwarder")
        if not values:
            raise HopRefused("missing")
        tokens: list[str] = values[0].decode("latin-1").split(",")
        if len(values) > 1 or len(tokens) > MOST or any(not 0 < len(t) <= LONGEST for t in tokens):
            raise HopRefused("malformed")
        return tokens

    async def proven(self, scope: Scope, tokens: Sequence[str], body: bytes) -> Hops:
        """The hops of a request, all of them proven and none used before; HopRefused otherwise."""
        if not tokens:
            return DIRECT
        registry = self._registry()
        request = Forwarded(scope["method"], _target(scope), body, bearer(scope)).stated()
        names: list[str] = []
        places: set[str] = set()
        spent: list[str] = []
        first: _Claims | None = None
        before: str | None = None  # the token of the hop before
        for token in tokens:
            name, claims = self._hop(registry, token, request)
            if claims.prev != (None if before is None else digest(before.encode())):
                raise HopRefused("chain_broken")
            if names and claims.from_ != _identity(registry, names[-1]):
                raise HopRefused("chain_broken")
            names.append(name)
            places |= set(claims.places)
            spent.append(f"hop/{name}/{claims.jti}")
            first, before = first or claims, token
        if names[-1] != registry.forwarder_of(self._peer(scope) or ""):
            raise HopRefused("peer_is_another")
        if len(set(names)) != len(names):
            raise HopRefused("loop")
        origin = self._origin(registry, first)
        if not await asyncio.to_thread(self._once, spent, _KEPT_US):
            raise HopRefused("replayed")
        return Hops(tuple(names), frozenset(places), origin)

    def _hop(self, registry: Registry, token: str, request: Mapping[str, str]) -> tuple[str, _Claims]:
        """(forwarder, what it states) of one token that holds for this request."""
        try:
            header, found = parsed(token)
        except Unidentified:
            raise HopRefused("malformed") from None
        if set(header) != {"alg", "kid", "typ"} or header["typ"] != TYPE or not isinstance(header["kid"], str):
            raise HopRefused("malformed")
        name = header["kid"]
        about = registry.forwarder(name)
        if about is None:
            raise HopRefused("signer_unknown")
        key, algorithm = _key(about.public_key)
        if header["alg"] != algorithm:  # what the charter's key is for, never what the token asks for
            raise HopRefused("algorithm")
        try:
            jws.deserialize_compact(token, key, algorithms=[algorithm])
        except (JoseError, ValueError, TypeError):
            raise HopRefused("signature") from None
        try:
            claims = msgspec.convert(found, _Claims, strict=True)
        except msgspec.ValidationError:
            raise HopRefused("malformed") from None
        self._fits(claims, request)
        if not set(claims.places) <= set(about.places):
            raise HopRefused("place_not_its_own")
        return name, claims

    def _fits(self, claims: _Claims, request: Mapping[str, str]) -> None:
        if claims.aud != self._audience:
            raise HopRefused("audience")
        now = self._clock()
        if claims.iat > now + SKEW_S or claims.exp <= now or not 0 < claims.exp - claims.iat <= LIFETIME_S:
            raise HopRefused("stale")
        stated = {"htm": claims.htm, "htu": claims.htu, "body": claims.body}
        if (stated if claims.ath is None else {**stated, "ath": claims.ath}) != request:
            raise HopRefused("another_request")

    def _origin(self, registry: Registry, first: _Claims | None) -> frozenset[str]:
        """Where whoever connected to the first hop can be, by the authority of its certificate; nowhere known: refused."""
        if first is None or first.from_ is None:
            return frozenset()
        if registry.forwarder_of(first.from_) is not None:  # it sent no token, or its token was dropped
            raise HopRefused("chain_broken")
        match = _IDENTITY.fullmatch(first.from_)
        place = None if match is None else registry.place_of_trust_domain(match[1])
        if place is None:
            raise HopRefused("origin_unknown")
        return frozenset({place})


def _identity(registry: Registry, name: str) -> str | None:
    about = registry.forwarder(name)
    return None if about is None else about.identity


def _target(scope: Scope) -> str:
    raw: bytes = scope.get("raw_path") or scope["path"].encode()
    query: bytes = scope.get("query_string", b"")
    return (raw.partition(b"?")[0] + (b"?" + query if query else b"")).decode("latin-1")
