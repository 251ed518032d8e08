"""Identity by OIDC token: a strict pre-parser, then joserfc, with the issuer's own keys and algorithms alone.

Libraries disagree on doubled names, string dates, unknown `crit` and `b64: false`; what is ambiguous is refused before
one of them sees it (CVE-2022-29217, CVE-2024-33663, CVE-2025-59420, CVE-2026-27962).
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Protocol

from joserfc import jws
from joserfc.errors import JoseError
from joserfc.jwk import KeySet
from starlette.types import Scope

from policy import Caller, Evidence, whereabouts
from service.identity import Unidentified, bearer, source

HEADER_LIMIT: Final = 2_048
LIFETIME_S: Final = 3_600
SKEW_S: Final = 30
JWKS_LIMIT: Final = 1 << 20
REFETCH_S: Final = 60.0
_PART: Final = re.compile(r"[A-Za-z0-9_-]+")
_FORBIDDEN: Final = frozenset({"crit", "jku", "jwk", "x5u", "x5c", "b64", "zip", "p2c", "p2s"})
_SUBJECT: Final = re.compile(r"[\x21-\x7e]{1,255}")


class Issuer(Protocol):
    """A configured issuer: what it may say, about whom, from where."""

    @property
    def issuer(self) -> str: ...
    @property
    def audience(self) -> str: ...
    @property
    def algorithms(self) -> tuple[str, ...]: ...
    @property
    def jwks_file(self) -> Path | None: ...
    @property
    def jwks_uri(self) -> str | None: ...
    @property
    def tenant(self) -> str: ...
    @property
    def place(self) -> str: ...
    @property
    def roles(self) -> tuple[str, ...]: ...


def _decoded(part: str) -> bytes:
    """Canonical base64url without padding."""
    if not _PART.fullmatch(part) or len(part) % 4 == 1:
        raise Unidentified("token_malformed")
    data = base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))
    if base64.urlsafe_b64encode(data).rstrip(b"=").decode() != part:
        raise Unidentified("token_malformed")
    return data


def _object(data: bytes) -> dict[str, Any]:
    """A JSON object without doubled names and without anything but integers for numbers."""

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({k for k, _ in found}) != len(found):
            raise ValueError("doubled name")
        return dict(found)

    def refuse(_: str) -> Any:
        raise ValueError("not an integer")

    try:
        value = json.loads(data.decode(), object_pairs_hook=pairs, parse_constant=refuse, parse_float=refuse)
    except (ValueError, RecursionError):
        raise Unidentified("token_malformed") from None
    if not isinstance(value, dict):
        raise Unidentified("token_malformed")
    return value


def parsed(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(header, claims) of a compact JWS, nothing of which is proven yet; Unidentified if libraries could disagree on it."""
    parts = text.split(".")
    if len(parts) != 3 or len(parts[0]) > HEADER_LIMIT:
        raise Unidentified("token_malformed")
    header, claims = _object(_decoded(parts[0])), _object(_decoded(parts[1]))
    _decoded(parts[2])
    if _FORBIDDEN & set(header):
        raise Unidentified("token_header")
    return header, claims


def caller_of(issuer: Issuer, subject: str) -> Caller:
    """Who a subject of an issuer is, as the policy sees it."""
    place = frozenset({issuer.place})
    where = whereabouts([Evidence("svid", place, vouches=place)])
    return Caller(
        id=f"oidc:{issuer.issuer}:{subject}",
        kind="workload",
        tenant=issuer.tenant,
        roles=frozenset(issuer.roles) or frozenset({"workload"}),
        places=where.places,
        proof=where.proof,
        authn="oidc",
    )


class _Keys:
    """The keys of one issuer. A fetch that fails leaves what was there, and what was not there stays unknown."""

    def __init__(self, issuer: Issuer) -> None:
        self._issuer = issuer
        self._by_id: dict[str, Any] = {}
        self._fetched = float("-inf")
        self._lock = asyncio.Lock()
        if issuer.jwks_file is not None:
            self._take(issuer.jwks_file.read_bytes())

    def _take(self, data: bytes) -> None:
        keys = KeySet.import_key_set(json.loads(data)).keys
        self._by_id = {k.kid: k for k in keys if k.kid and k.key_type in {"RSA", "EC", "OKP"}}

    async def get(self, kid: str) -> Any:
        """The issuer's key of this id; an unknown id is fetched for at most once a minute."""
        if kid not in self._by_id and self._issuer.jwks_uri is not None:
            async with self._lock:
                if kid not in self._by_id and time.monotonic() - self._fetched >= REFETCH_S:
                    self._fetched = time.monotonic()
                    await self._fetch(self._issuer.jwks_uri)
        if kid not in self._by_id:
            raise Unidentified("token_key_unknown")
        return self._by_id[kid]

    async def _fetch(self, uri: str) -> None:
        if not uri.startswith("https://"):
            raise Unidentified("issuer_keys_unavailable")
        import httpx  # a twentieth of a worker's imports, and most nodes have the keys of their issuers in a file

        try:
            async with (
                httpx.AsyncClient(timeout=2.0, follow_redirects=False, trust_env=False) as client,
                client.stream("GET", uri) as answer,
            ):
                if answer.status_code != 200:
                    raise Unidentified("issuer_keys_unavailable")
                data = b""
                async for chunk in answer.aiter_bytes():
                    data += chunk
                    if len(data) > JWKS_LIMIT:
                        raise Unidentified("issuer_keys_unavailable")
            self._take(data)
        except (httpx.HTTPError, ValueError, JoseError):
            raise Unidentified("issuer_keys_unavailable") from None


class OidcProvider:
    """Callers by the JWT of a configured issuer."""

    def __init__(self, issuers: Sequence[Issuer], *, clock: Callable[[], float]) -> None:
        self._issuers: Mapping[str, tuple[Issuer, _Keys]] = {i.issuer: (i, _Keys(i)) for i in issuers}
        self._clock = clock

    async def identify(self, scope: Scope) -> Caller | None:
        """The token's caller; None without a bearer token of this kind."""
        text = bearer(scope)
        if text is None or text.startswith("skms_"):
            return None
        issuer, claims = await self.verified(text)
        subject = claims.get("sub")
        if not isinstance(subject, str) or not _SUBJECT.fullmatch(subject):
            raise Unidentified("token_subject")
        evidence = hashlib.sha256(text.encode()).digest()
        return replace(caller_of(issuer, subject), source=source(scope), evidence=evidence)

    async def verified(self, text: str) -> tuple[Issuer, dict[str, Any]]:
        """(issuer, claims) of a token that holds; Unidentified with a constant reason otherwise."""
        header, claims = parsed(text)
        named = claims.get("iss")
        found = self._issuers.get(named) if isinstance(named, str) else None
        if found is None:
            raise Unidentified("issuer_unknown")
        issuer, keys = found
        algorithm, kid = header.get("alg"), header.get("kid")
        if not isinstance(algorithm, str) or algorithm not in issuer.algorithms or not isinstance(kid, str):
            raise Unidentified("token_algorithm")
        if header.get("typ", "JWT") not in {"JWT", "at+jwt"}:
            raise Unidentified("token_type")
        key = await keys.get(kid)
        if key.alg is not None and key.alg != algorithm:
            raise Unidentified("token_algorithm")
        try:
            jws.deserialize_compact(text, key, algorithms=[algorithm])
        except (JoseError, ValueError, TypeError):
            raise Unidentified("token_signature") from None
        self._check(issuer, claims)
        return issuer, claims

    def _check(self, issuer: Issuer, claims: Mapping[str, Any]) -> None:
        if claims.get("aud") != issuer.audience:  # exactly it: no list, prefix or other case
            raise Unidentified("token_audience")
        issued, expires = claims.get("iat"), claims.get("exp")
        begins = claims.get("nbf", issued)
        dates = [d for d in (issued, expires, begins) if type(d) is int and 0 <= d < 2**40]
        if len(dates) != 3:
            raise Unidentified("token_dates")
        issued, expires, begins = dates
        now = self._clock()
        if issued > now + SKEW_S or begins > now + SKEW_S or expires <= now or expires - issued > LIFETIME_S:
            raise Unidentified("token_dates")
