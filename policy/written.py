"""Requests as JSON values: what a simulation is asked, what an explanation shows, and what a record's digest covers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from operator import attrgetter
from typing import Any, Final, TypeVar

import msgspec

from policy.request import Attest, Caller, InstallationFacts, KeyFacts, Request, Resource, TenantFacts

F = TypeVar("F", bound=Caller | Resource | Attest)

_DOMAIN: Final = b"skms/facts/v1\0"
_RESOURCES: Final[Mapping[str, type[Resource]]] = {
    "Key": KeyFacts,
    "Tenant": TenantFacts,
    "Installation": InstallationFacts,
}
_UNTOLD: Final = frozenset({"evidence", "source"})  # no rule sees them
_KEPT: Final = 8192

_covered: Final = attrgetter(
    *(f"caller.{name}" for name in ("kind", "tenant", "roles", "places", "proof", "scopes")),
    *(f.name for f in fields(Request) if f.name not in {"caller", "now"}),
)


class RequestMalformed(Exception):
    """The JSON is no request; the message names the field and what is wrong with it, never a value."""


def written(request: Request) -> dict[str, Any]:
    """A request as plain values, sets in order; `read` takes it back."""
    shown: dict[str, Any] = _plain(request)
    shown["resource"] = {"type": _kind(request.resource), **shown["resource"]}
    return shown


def read(value: object) -> Request:
    """The request that plain values spell. RequestMalformed for an unknown, missing or mistyped field."""
    about = dict(_mapping("request", value))
    resource = dict(_mapping("resource", about.get("resource")))
    kind = _RESOURCES.get(str(resource.pop("type", None)))
    if kind is None:
        raise RequestMalformed(f"resource.type: one of {', '.join(_RESOURCES)}")
    about["resource"] = None
    about["caller"] = _made("caller", {"authn": "none", **_mapping("caller", about.get("caller"))}, Caller)
    if "attest" in about:
        about["attest"] = _made("attest", _mapping("attest", about["attest"]), Attest)
    for name in about.keys() - {f.name for f in fields(Request)}:
        raise RequestMalformed(f"{name}: a request has no such field")
    found: dict[str, Any] = {"resource": _made("resource", resource, kind)}
    for one in fields(Request):
        if one.name in {"caller", "attest"} and one.name in about:
            found[one.name] = about[one.name]
        elif one.name in about and one.name != "resource":
            found[one.name] = _typed(one.name, about[one.name], _TYPES[one.name])
    try:
        return Request(**found)
    except TypeError as error:
        raise RequestMalformed(f"request: {error}") from None


class Digests:
    """SHA-256 digests of what a decision was made of, first 32 hex: all facts but the caller's name and the time.

    Those two stand in the record itself, and the name can be erased from there. What was hashed is kept by content.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[Any, ...], str] = {}

    def of(self, request: Request) -> str:
        """The digest of a request's facts."""
        parts = _covered(request)
        found = self._found.get(parts)
        if found is None:
            if len(self._found) >= _KEPT:
                self._found.clear()
            found = self._found[parts] = digest(request)
        return found


def digest(request: Request) -> str:
    """As `Digests.of`: SHA-256(`skms/facts/v1` || 00 || canonical JSON of the facts), first 32 hex."""
    shown = written(request)
    del shown["now"], shown["caller"]["id"], shown["caller"]["authn"]
    if not shown["grant"]:  # digests of before there were grants stay what they were
        del shown["grant"]
    text = json.dumps(shown, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(_DOMAIN + text.encode()).hexdigest()[:32]


_TYPES: Final[Mapping[str, Any]] = {
    "action": str,
    "now": int,
    "hsm": str,
    "via": frozenset[str],
    "dest": frozenset[str],
    "target": frozenset[str],
    "failover": bool,
    "waived_reach": frozenset[str],
    "waived_egress": frozenset[str],
    "purpose": str,
    "reason": str,
    "approvals": int,
    "grant": str,
}


def _kind(resource: Resource) -> str:
    return type(resource).__name__.removesuffix("Facts")


def _plain(value: Any) -> Any:
    if isinstance(value, Caller | KeyFacts | TenantFacts | InstallationFacts | Attest | Request):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value) if f.name not in _UNTOLD}
    if isinstance(value, frozenset):
        return sorted(value)
    return list(value) if isinstance(value, tuple) else value


def _mapping(name: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RequestMalformed(f"{name}: must be an object")
    return value


def _made(name: str, value: Mapping[str, Any], kind: type[F]) -> F:
    for field in value.keys() - {f.name for f in fields(kind)} | value.keys() & _UNTOLD:
        raise RequestMalformed(f"{name}.{field}: no such field")
    return _typed(name, value, kind)  # type: ignore[no-any-return]  # msgspec checks it against `kind`


def _typed(name: str, value: object, kind: Any) -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise RequestMalformed(f"{name}: {error}") from None
