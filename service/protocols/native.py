"""The native REST API, `/v1`: a table of routes, and one ASGI application that serves them all.

`ROUTES` is the API: `make openapi` writes `openapi.yaml` from it, and the same table dispatches. A request is
authenticated before its body is read, its body is bounded while it is read and parsed strictly, and every way out
leads through an audit record.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import hashlib
import json
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import parse_qsl

import msgspec
from cryptography.hazmat.primitives import serialization
from starlette.types import Receive, Scope, Send

import policy
from audit.chain import BUNDLE as FULL_TILE
from audit.log import Unavailable
from audit.witness import MAX_BODY as MAX_SUBMISSION
from audit.witness import Answer
from keystore import Bounds, Import, Key, KeySpec, KeyUsage, ListFilter, NewKey, Rotation, Wrapping
from policy import Caller
from policy.explain import shown
from service.admission import SOURCES, Buckets
from service.containment import Containment, NewFreeze
from service.decisions import HOP
from service.drills import Drills, ExitDrill
from service.exceptions import Excepting, NewException
from service.grants import Granting, NewGrant
from service.health import Health
from service.identity import Authenticator, Unidentified
from service.identity.hops import HopRefused, Ways
from service.ids import uuid7
from service.keyrequests import KeyRequests
from service.kms import APPROVAL_REQUIRED, Ask, ItemResult, Kms, Unusable, WouldAllow
from service.outcome import EtagMismatch, EtagMissing, NotFound, PageTokenInvalid, RequestInvalid
from service.policychanges import PolicyChanges
from service.protocols import wire
from service.protocols.dataplane import PLANES, Plane
from service.protocols.jwk import jwk
from service.protocols.problems import (
    DeletionIsScheduled,
    Disconnected,
    IdempotencyInProgress,
    IdempotencyKeyMissing,
    IdempotencyKeyReused,
    MethodNotAllowed,
    PayloadTooLarge,
    Problem,
    UnsupportedMediaType,
    meaning,
    problem_of,
)
from service.protocols.strict_json import Invalid, Malformed, convert, loads
from service.quorum import Standing
from service.requests import Observer
from service.rows import Idempotency, InProgress, NewToken, Replay, Reused
from service.sovereignty import Sovereignty
from service.tracing import Tracing
from service.turns import Turns
from service.work import Work

JSON: Final = "application/json"
PROBLEM_JSON: Final = "application/problem+json"
_UUID: Final = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
_KEY: Final = rf"(?P<key>{_UUID}|alias/[a-z0-9][a-z0-9._-]{{0,127}})"
_CLIENT_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_TRACEPARENT: Final = re.compile(r"00-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")
_IDEMPOTENCY: Final = re.compile(r'"?([\x21\x23-\x5b\x5d-\x7e]{1,128})"?')
_TAG: Final = re.compile(r"tag\.[A-Za-z0-9_.:-]{1,64}")
_TENANT: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_COUNT: Final = re.compile(r"(?:0|[1-9][0-9]{0,14})")
_TEXT: Final = ("text/plain",)
_ETAG: Final = re.compile(r'"([0-9]{1,15})"')


@dataclass(frozen=True, slots=True)
class Limits:
    """How large a request may be, in bytes."""

    body: int = 1_048_576
    batch_body: int = 4_194_304


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer: a JSON value, or bytes with their own media type, all at once or in pieces that are sent as they come."""

    body: Any
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    media: str = JSON


@dataclass(slots=True)
class Call:
    """One request after identification: what a handler needs."""

    app: Native
    kms: Kms
    ask: Ask
    path: Mapping[str, str]
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: Any
    digest: bytes  # SHA-256 of method, path and body, for idempotency
    claim: tuple[str, str, str] | None = None  # tenant, caller and Idempotency-Key while the request runs


Handler = Callable[[Call], Awaitable[Reply]]

# What stops something, and what tells how the node is: when a node is flooded, it is needed most.
URGENT: Final = frozenset(
    {
        "freeze",
        "disable_key",
        "compromise_key",
        "schedule_deletion",
        "revoke_version",
        "revoke_grant",
        "revoke_exception",
        "revoke_token",
        "revoke_approval",
        "drain_hsm",
        "metrics",
    }
)
# Refusals that a caller can have as often as it likes: beyond so many a second, of a tenant or address, they come late, by
# so many seconds at the most. Under overload the others are to blame as well.
PACE: Final = 100.0
PACED: Final = {"unauthenticated": 5.0, "rate_limited": 5.0, "overloaded": 2.0}


@dataclass(frozen=True, slots=True)
class Route:
    """One operation of the API, as it is served and as it is described."""

    method: str
    path: str
    op: str  # its name in the audit record
    handler: Handler
    summary: str
    answer: type[msgspec.Struct] | None = None
    body: type[msgspec.Struct] | None = None
    body_optional: bool = False
    query: tuple[str, ...] = ()
    status: int = 200
    public: bool = False  # answers without a credential, and makes no record
    anonymous: bool = False  # answers without a credential, recorded; knows no dry run
    text: int = 0  # the body is text of at most so many bytes, and never JSON
    idempotent: bool = False  # needs Idempotency-Key
    if_match: str = ""  # "required", "honoured" or ""
    item: type[msgspec.Struct] | None = None  # of a batch
    media: tuple[str, ...] = (JSON,)


# ---- data plane --------------------------------------------------------------------------------------------------


def _single(plane: Plane) -> Handler:
    async def handle(call: Call) -> Reply:
        return Reply(plane.show(await plane.do(call.kms, call.ask, plane.work(call.body, call.path.get("key", "")))))

    return handle


def _batch(plane: Plane) -> Handler:
    async def handle(call: Call) -> Reply:
        works: list[Work | Unusable] = []
        references: list[str | None] = []
        assert plane.item is not None
        for raw in call.body.items:
            try:
                item = convert(raw, plane.item)
                works.append(plane.work(item, getattr(item, "key", "")))
                references.append(getattr(item, "reference", None))
            except (Invalid, RequestInvalid) as error:
                reference = raw.get("reference") if isinstance(raw, dict) else None
                references.append(reference if isinstance(reference, str) and _CLIENT_ID.fullmatch(reference) else None)
                works.append(Unusable(meaning(error)[1], error))
        call.kms.rates.charge(call.ask.caller.tenant, len(works) - 1)
        batch_id, results = await call.kms.batch(call.ask, plane.op, works)
        shown, failed, errors = [], 0, dict[str, Exception]()
        for reference, result in zip(references, results, strict=True):
            entry: dict[str, Any] = {"status": 200, "receipt": result.receipt.header()}
            if reference is not None:
                entry["reference"] = reference
            if result.error is None:
                entry["result"] = plane.show(result.value)
            else:
                errors.setdefault(meaning(result.error)[1], result.error)
                told = _item_answer(call.ask, result)
                failed += isinstance(told, Problem)
                entry |= {
                    "status": told.status,
                    "problem" if isinstance(told, Problem) else "result": told.body,
                }
            shown.append(entry)
        for code, met in errors.items():  # once each: what ails one item ails many
            call.app.observer.failed(call.ask, plane.op, code, met)
        return Reply({"batch_id": batch_id, "results": shown}, headers=(("x-batch-failed", str(failed)),))

    return handle


def _item_answer(ask: Ask, result: ItemResult) -> Reply | Problem:
    error = result.error
    if ask.dry_run and isinstance(error, WouldAllow | policy.Denied):
        told = dry_run_answer(error)
        if told is not None:
            return told
    assert error is not None
    return problem_of(error, request_id=ask.request_id, decision_id=result.decision_id)


async def _random(call: Call) -> Reply:
    data = await call.kms.random(call.ask, call.body.length)
    return Reply({"random": base64.b64encode(data).decode()})


# ---- keys --------------------------------------------------------------------------------------------------------


def _key_reply(call: Call, key: Key, status: int = 200, **headers: str) -> Reply:
    missing = call.kms.tier_missing(key)
    etag = (("etag", f'"{key.kv}"'), *((k, v) for k, v in headers.items()))
    return Reply(wire.key_json(key, missing=missing), status, etag)


async def _create_key(call: Call) -> Reply:
    b: wire.CreateKeyBody = call.body
    expand = call.kms.places
    home = expand("/home", [b.home])
    if home != frozenset({b.home}):
        raise RequestInvalid(("/home", "not_a_region", "name one region"))
    spec = KeySpec(b.spec)
    rotation = b.rotation or wire.RotationBody()
    new = NewKey.of(
        tenant=call.ask.caller.tenant or "",
        spec=spec,
        usage=None if b.usage is None else KeyUsage(b.usage),
        suite=None if b.suite is None else int(b.suite, 16),
        tier=b.tier,
        home=b.home,
        residency=home if b.residency is None else expand("/residency", b.residency),
        execution=home if b.execution is None else expand("/execution", b.execution),
        reach=home if b.reach is None else expand("/reach", b.reach),
        egress=home if b.egress is None else expand("/egress", b.egress),
        failover=expand("/failover", b.failover),
        purposes=tuple(b.purposes),
        description=b.description,
        tags=b.tags,
        rotation=_rotation(rotation),
        origin=b.origin,
    )
    key = await call.kms.create_key(call.ask, new, alias=b.alias)
    return _key_reply(call, key, 201, location=f"/v1/keys/{key.id}")


def _rotation(b: wire.RotationBody) -> Rotation:
    age = None if b.max_age is None else wire.seconds("/rotation/max_age", b.max_age)
    if age is not None and age < 3_600:
        raise RequestInvalid(("/rotation/max_age", "too_short", "at least PT1H"))
    return Rotation(max_age=age, max_uses=b.max_uses)


async def _get_key(call: Call) -> Reply:
    return _key_reply(call, await call.kms.get_key(call.ask, call.path["key"]))


async def _list_keys(call: Call) -> Reply:
    limit = _page_size(call)
    chosen = {k: v for k, v in call.query.items() if k not in {"page_size", "page_token", "dry_run"}}
    after = _page_token(call, chosen)
    tags = {k[4:]: v for k, v in chosen.items() if k.startswith("tag.")}
    wanted = ListFilter(
        state=_one_of(chosen, "state", _STATES),
        tier=None if "tier" not in chosen else int(_one_of(chosen, "tier", ("1", "2", "3")) or 0),
        usage=_one_of(chosen, "usage", ("encrypt", "sign", "mac")),
        region=chosen.get("region"),
        tags=tags,
    )
    keys = await call.kms.list_keys(call.ask, wanted, after=None if after is None else _uuid(after), limit=limit + 1)
    shown = [wire.key_json(k, missing=call.kms.tier_missing(k)) for k in keys[:limit]]
    return _page(call, shown, str(keys[limit - 1].id) if len(keys) > limit else None, chosen)


_STATES: Final = (
    "pending_import",
    "enabled",
    "disabled",
    "deactivated",
    "compromised",
    "pending_deletion",
    "destroyed",
)


def _one_of(query: Mapping[str, str], name: str, allowed: tuple[str, ...]) -> str | None:
    value = query.get(name)
    if value is not None and value not in allowed:
        raise RequestInvalid((f"?{name}", "not_allowed", "one of " + ", ".join(allowed)))
    return value


def _page_size(call: Call) -> int:
    text = call.query.get("page_size", "50")
    if not re.fullmatch(r"[1-9][0-9]{0,2}", text) or int(text) > 500:
        raise RequestInvalid(("?page_size", "out_of_range", "1 to 500"))
    return int(text)


def _token_for(call: Call, after: str, chosen: Mapping[str, str]) -> str:
    bound = hashlib.sha256(json.dumps([call.ask.caller.tenant, sorted(chosen.items()), after]).encode()).hexdigest()[
        :16
    ]
    return base64.urlsafe_b64encode(f"{bound}.{after}".encode()).rstrip(b"=").decode()


def _page_token(call: Call, chosen: Mapping[str, str]) -> str | None:
    """The position a token stands for. It is bound to tenant and filter; the tenant itself is the caller's, always."""
    text = call.query.get("page_token")
    if text is None:
        return None
    try:
        _, _, after = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode().partition(".")
    except ValueError:
        raise PageTokenInvalid from None
    if text != _token_for(call, after, chosen):
        raise PageTokenInvalid
    return after


def _uuid(text: str) -> uuid.UUID:
    try:
        return uuid.UUID(text)
    except ValueError:
        raise PageTokenInvalid from None


def _page(call: Call, items: list[Any], after: str | None, chosen: Mapping[str, str]) -> Reply:
    token = None if after is None else _token_for(call, after, chosen)
    headers = () if token is None else (("link", f'<?page_token={token}>; rel="next"'),)
    return Reply({"items": items, "next_page_token": token}, headers=headers)


async def _patch_key(call: Call) -> Reply:
    b: wire.PatchKeyBody = call.body
    changes = {k: v for k, v in msgspec.to_builtins(b).items() if v is not msgspec.UNSET}
    if not changes:
        raise RequestInvalid(("", "empty", "name at least one field to change"))
    rotation = None if isinstance(b.rotation, msgspec.UnsetType) else _rotation(b.rotation)

    def plan(key: Key) -> Any:
        return call.kms.keystore.plan_update(
            key,
            description=None if isinstance(b.description, msgspec.UnsetType) else b.description,
            tags=None if isinstance(b.tags, msgspec.UnsetType) else b.tags,
            rotation=rotation,
            min_decrypt_version=_fence(key, b.min_decrypt_version, "/min_decrypt_version"),
            min_encrypt_version=_fence(key, b.min_encrypt_version, "/min_encrypt_version"),
        )

    return _key_reply(call, await call.kms.update_key(call.ask, call.path["key"], changes, plan))


def _fence(key: Key, given: int | str | msgspec.UnsetType, pointer: str) -> int | None:
    if isinstance(given, msgspec.UnsetType):
        return None
    number = given if isinstance(given, int) else key.latest_number - int(given.partition("-")[2] or 0)
    if not 1 <= number <= key.latest_number:
        raise RequestInvalid((pointer, "out_of_range", "a fence lies between 1 and the latest version"))
    return number


def _lifecycle(change: Callable[[Kms, Ask, str], Awaitable[Key]]) -> Handler:
    async def handle(call: Call) -> Reply:
        return _key_reply(call, await change(call.kms, call.ask, call.path["key"]))

    return handle


async def _rotate(call: Call) -> Reply:
    key = await call.kms.rotate_key(call.ask, call.path["key"])
    return _key_reply(call, key)


async def _import_parameters(call: Call) -> Reply:
    b: wire.ImportParametersBody = call.body
    wrapping = Wrapping(b.wrapping)
    made = await call.kms.import_parameters(call.ask, call.path["key"], wrapping, b.wrapping_key_spec)
    return Reply(
        {
            "key_id": str(made.key_id),
            "wrapping": str(made.wrapping),
            "wrapping_key_spec": made.wrapping_key_spec,
            "wrapping_public_key": base64.b64encode(made.public).decode(),
            "import_token": made.token,
            "import_path": made.path,
            "expires_at": wire.moment(made.expires_at),
        }
    )


async def _import_key(call: Call) -> Reply:
    b: wire.ImportBody = call.body
    public = b.public_key
    if public is not None and not public.startswith("-----"):
        spki: bytes | None = wire.binary("/public_key", public)
    else:
        spki = None if public is None else public.encode()
    wanted = Import(
        token=b.import_token,
        wrapped=wire.binary("/wrapped_key", b.wrapped_key),
        check_value=b.key_check_value,
        public=spki,
        expires_at=None if b.expires_at is None else _moment("/expires_at", b.expires_at),
    )
    return _key_reply(call, await call.kms.import_key(call.ask, call.path["key"], wanted))


async def _schedule_deletion(call: Call) -> Reply:
    wait = wire.seconds("/wait", call.body.wait)
    if not 7 * 86_400 <= wait <= 90 * 86_400:
        raise RequestInvalid(("/wait", "out_of_range", "P7D to P90D"))
    return _key_reply(call, await call.kms.schedule_deletion(call.ask, call.path["key"], wait))


async def _destroy(call: Call) -> Reply:
    _remember_waiting(call)
    return _waiting(await call.app.requests.destroy(call.ask, call.path["key"]))


async def _set_key_policy(call: Call) -> Reply:
    b: wire.KeyPolicyBody = call.body
    places = {
        name: call.kms.places(f"/{name}", named)
        for name in ("residency", "execution", "reach", "egress", "failover")
        if (named := getattr(b, name)) is not None
    }
    purposes = None if b.purposes is None else tuple(b.purposes)
    _remember_waiting(call)
    bounds = Bounds(
        tier=b.tier,
        purposes=purposes,
        min_decrypt_version=b.min_decrypt_version,
        min_encrypt_version=b.min_encrypt_version,
        **places,
    )
    return _waiting(await call.app.requests.set_policy(call.ask, call.path["key"], bounds))


async def _create_grant(call: Call) -> Reply:
    b: wire.GrantBody = call.body
    wanted = NewGrant(
        grantee=b.grantee,
        operations=tuple(b.operations),
        ends=_moment("/expires_at", b.expires_at),
        purpose=b.purpose,
        context_equals=b.context_equals,
        context_subset=b.context_subset,
        max_uses=b.max_uses,
    )
    _remember_made(call, f"/v1/keys/{call.path['key']}/grants")
    made = await call.app.granting.create(call.ask, call.path["key"], wanted)
    return Reply(wire.grant_json(made), 201, (("location", f"/v1/keys/{made.grant.key}/grants/{made.grant.id}"),))


async def _list_grants(call: Call) -> Reply:
    found = await call.app.granting.every(call.ask, call.path["key"])
    return Reply({"items": [wire.grant_json(standing) for standing in found]})


async def _revoke_grant(call: Call) -> Reply:
    await call.app.granting.revoke(call.ask, call.path["key"], call.path["grant"])
    return Reply(None, 204)


async def _versions(call: Call) -> Reply:
    key = await call.kms.get_key(call.ask, call.path["key"])
    return Reply({"items": [wire.version_json(v) for v in key.versions]})


async def _revoke_version(call: Call) -> Reply:
    return _key_reply(call, await call.kms.revoke_version(call.ask, call.path["key"], int(call.path["version"])))


async def _public_key(call: Call) -> Reply:
    text = call.query.get("version")
    if text is not None and not re.fullmatch(r"[1-9][0-9]{0,7}", text):
        raise RequestInvalid(("?version", "out_of_range", "a version number from 1"))
    key, version, spki = await call.kms.public_key(
        call.ask, call.path["key"], version=None if text is None else int(text)
    )
    public = serialization.load_der_public_key(spki)
    if "application/jwk+json" in call.headers.get("accept", "") or call.headers.get("accept") == JSON:
        return Reply(jwk(public, kid=f"{key.id}.{version}"), media="application/jwk+json")
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return Reply(pem, media="application/x-pem-file")


async def _list_aliases(call: Call) -> Reply:
    limit = _page_size(call)
    after = _page_token(call, {})
    found = await call.kms.list_aliases(call.ask, after=after, limit=limit + 1)
    items = [{"alias": name, "key_id": str(key)} for name, key in found[:limit]]
    return _page(call, items, found[limit - 1][0] if len(found) > limit else None, {})


async def _put_alias(call: Call) -> Reply:
    key = await call.kms.put_alias(call.ask, call.path["name"], call.body.key)
    return Reply({"alias": call.path["name"], "key_id": str(key.id)})


async def _delete_alias(call: Call) -> Reply:
    await call.kms.delete_alias(call.ask, call.path["name"])
    return Reply(None, 204)


async def _delete_key(call: Call) -> Reply:
    raise DeletionIsScheduled


# ---- installation, policy, tokens, audit ---------------------------------------------------------------------------


async def _tenants(call: Call) -> Reply:
    return Reply({"items": await call.kms.list_tenants(call.ask)})


async def _regions(call: Call) -> Reply:
    return Reply({"items": await call.kms.list_regions(call.ask)})


async def _hsms(call: Call) -> Reply:
    return Reply({"items": [wire.hsm_json(member) for member in await call.kms.list_hsms(call.ask)]})


async def _drain_hsm(call: Call) -> Reply:
    return Reply(wire.hsm_json(await call.kms.drain_hsm(call.ask, call.path["name"])))


async def _undrain_hsm(call: Call) -> Reply:
    return Reply(wire.hsm_json(await call.kms.undrain_hsm(call.ask, call.path["name"])))


async def _start_drill(call: Call) -> Reply:
    b: wire.DrillBody = call.body
    wanted = ExitDrill(
        b.source,
        b.to,
        observe_s=wire.seconds("/observe", b.observe),
        rate=b.rate,
        window_s=wire.seconds("/window", b.window),
    )
    if wanted.observe_s > 86_400 or wanted.window_s > 86_400:
        raise RequestInvalid(("/observe", "out_of_range", "at most P1D"))
    operation = str(uuid.uuid4())
    headers = (("location", f"/v1/operations/{operation}"),)
    claim = call.claim

    def remember(connection: Any, _: Any) -> None:
        if claim is not None:
            answer = json.dumps({"id": operation, "kind": "drill", "state": "running"}).encode()
            call.app.idempotency.finish(connection, *claim, 202, answer, headers)

    call.ask.remember = remember
    drill = await call.app.drills.start(call.ask, wanted, operation_id=operation)
    return Reply(wire.operation_json(drill), 202, headers)


async def _list_drills(call: Call) -> Reply:
    return Reply({"items": [wire.operation_json(d) for d in await call.app.drills.every(call.ask)]})


async def _get_drill(call: Call) -> Reply:
    return Reply(wire.operation_json(await call.app.drills.show(call.ask, call.path["operation"])))


async def _get_operation(call: Call) -> Reply:
    found = await call.app.drills.show(call.ask, call.path["operation"], op="get_operation")
    return Reply(wire.operation_json(found))


async def _drill_report(call: Call) -> Reply:
    return Reply(await call.app.drills.report(call.ask, call.path["operation"]))


async def _abort_drill(call: Call) -> Reply:
    return Reply(wire.operation_json(await call.app.drills.abort(call.ask, call.path["operation"])))


async def _confirm_drill(call: Call) -> Reply:
    return Reply(wire.operation_json(await call.app.drills.confirm(call.ask, call.path["operation"])))


async def _freeze(call: Call) -> Reply:
    b: wire.FreezeBody = call.body
    _remember_freeze(call)
    began = None if b.began is None else _moment("/began", b.began)
    wanted = NewFreeze(b.scope.kind, b.scope.value, b.reason.code, mode=b.mode, began=began)
    made = await call.app.containment.freeze(call.ask, wanted)
    return Reply(wire.contained_json(made), 201, _freeze_location(made.freeze.id))


async def _freeze_drill(call: Call) -> Reply:
    _remember_freeze(call)
    made = await call.app.containment.drill(call.ask, call.body.key)
    return Reply(wire.contained_json(made), 201, _freeze_location(made.freeze.id))


def _remember_freeze(call: Call) -> None:
    """Store the freeze's id as the idempotent answer: the rest of it is not known before other workers obey."""
    _remember_made(call, "/v1/freezes")


def _remember_made(call: Call, path: str) -> None:
    """Store the id of what is made as the idempotent answer, and where it is found under a path."""
    claim = call.claim

    def remember(connection: Any, _: Any) -> None:
        if claim is not None:
            made = call.ask.decision_id or ""
            location = (("location", f"{path}/{made}"),)
            call.app.idempotency.finish(connection, *claim, 201, json.dumps({"id": made}).encode(), location)

    call.ask.remember = remember


def _freeze_location(freeze_id: str) -> tuple[tuple[str, str], ...]:
    return (("location", f"/v1/freezes/{freeze_id}"),)


async def _list_freezes(call: Call) -> Reply:
    found = await call.app.containment.every(call.ask)
    return Reply({"items": [wire.freeze_json(freeze, lifted_at) for freeze, lifted_at in found]})


async def _get_freeze(call: Call) -> Reply:
    return Reply(wire.contained_json(await call.app.containment.show(call.ask, call.path["freeze"])))


async def _lift_freeze(call: Call) -> Reply:
    _remember_waiting(call)
    return _waiting(await call.app.containment.lift(call.ask, call.path["freeze"]))


async def _request_exception(call: Call) -> Reply:
    b: wire.ExceptionBody = call.body
    wanted = NewException(
        keys=tuple(b.keys),
        kind=b.kind,
        places=tuple(b.places),
        purpose=b.purpose,
        legal_basis=b.legal_basis,
        legal_ref=b.legal_ref,
        ends=_moment("/not_after", b.not_after),
        begins=None if b.not_before is None else _moment("/not_before", b.not_before),
    )
    _remember_waiting(call)
    return _waiting(await call.app.excepting.request(call.ask, wanted))


async def _list_exceptions(call: Call) -> Reply:
    return Reply({"items": [wire.exception_json(found) for found in await call.app.excepting.every(call.ask)]})


async def _get_exception(call: Call) -> Reply:
    return Reply(wire.exception_json(await call.app.excepting.show(call.ask, call.path["exception"])))


async def _revoke_exception(call: Call) -> Reply:
    await call.app.excepting.revoke(call.ask, call.path["exception"])
    return Reply(None, 204)


def _waiting(standing: Standing) -> Reply:
    """The answer to what was asked for and takes approvals."""
    shown = {**wire.approval_json(standing), "code": APPROVAL_REQUIRED}
    return Reply(shown, 202, _approval_location(standing.asked.id))


def _remember_waiting(call: Call) -> None:
    """Store the request's id as the idempotent answer: how it stands may be another thing by then."""
    claim = call.claim

    def remember(connection: Any, _: Any) -> None:
        if claim is not None:
            answer = {"id": call.ask.decision_id, "state": "open", "code": APPROVAL_REQUIRED}
            headers = _approval_location(call.ask.decision_id or "")
            call.app.idempotency.finish(connection, *claim, 202, json.dumps(answer).encode(), headers)

    call.ask.remember = remember


def _approval_location(approval_id: str) -> tuple[tuple[str, str], ...]:
    return (("location", f"/v1/approvals/{approval_id}"),)


async def _list_approvals(call: Call) -> Reply:
    found = await call.app.containment.quorum.every(call.ask)
    return Reply({"items": [wire.approval_json(standing) for standing in found]})


async def _get_approval(call: Call) -> Reply:
    return Reply(wire.approval_json(await call.app.containment.quorum.show(call.ask, call.path["approval"])))


async def _sign_approval(call: Call) -> Reply:
    b: wire.SignatureBody = call.body
    quorum, signature = call.app.containment.quorum, bytes.fromhex(b.signature)
    return Reply(wire.approval_json(await quorum.sign(call.ask, call.path["approval"], b.approver, signature)))


async def _revoke_approval(call: Call) -> Reply:
    b: wire.SignatureBody = call.body
    quorum, signature = call.app.containment.quorum, bytes.fromhex(b.signature)
    return Reply(wire.approval_json(await quorum.revoke(call.ask, call.path["approval"], b.approver, signature)))


async def _cancel_approval(call: Call) -> Reply:
    return Reply(wire.approval_json(await call.app.containment.quorum.cancel(call.ask, call.path["approval"])))


async def _get_compliance(call: Call) -> Reply:
    limit, after = _page_size(call), _page_token(call, {})
    found = await call.kms.get_compliance(call.ask, after=after, limit=limit)
    told = wire.compliance_json(found)
    page = _page(call, told["items"], told["items"][-1]["key_id"] if found.more else None, {})
    return dataclasses.replace(page, body={**told, **page.body})


async def _get_sovereignty(call: Call) -> Reply:
    return Reply(wire.sovereignty_json(await call.app.sovereignty.report(call.ask)))


def _policy_json(p: policy.Policy, applied: str | None) -> dict[str, Any]:
    about = {"digest": p.digest, "version": p.version, "development": p.development, "files": dict(p.files)}
    return about | {"applied": applied}


async def _get_policy(call: Call) -> Reply:
    return Reply(_policy_json(*await call.kms.get_policy(call.ask)))


async def _reload_policy(call: Call) -> Reply:
    return Reply(_policy_json(await call.kms.reload_policy(call.ask), None))


async def _plan_policy(call: Call) -> Reply:
    b: wire.PlanBody = call.body
    if (b.from_ is None) is not (b.to is None):
        raise RequestInvalid(("/to", "missing", "a period has a begin and an end"))
    period = None if b.from_ is None or b.to is None else (_moment("/from", b.from_), _moment("/to", b.to))
    return Reply(await call.app.policy_changes.plan(call.ask, _bundle_files(b.files), period=period))


async def _apply_policy(call: Call) -> Reply:
    b: wire.ApplyBody = call.body
    files, changes = _bundle_files(b.files), call.app.policy_changes
    _remember_waiting(call)
    return _waiting(await changes.apply(call.ask, files, replaces=b.replaces))


async def _rollback_policy(call: Call) -> Reply:
    b: wire.RollbackBody = call.body or wire.RollbackBody()
    _remember_waiting(call)
    return _waiting(await call.app.policy_changes.rollback(call.ask, to=b.to, replaces=b.replaces))


def _bundle_files(files: Mapping[str, str]) -> Mapping[str, bytes]:
    return {path: content.encode() for path, content in files.items()}


async def _get_decision(call: Call) -> Reply:
    record, told = await call.kms.explain_decision(call.ask, call.path["decision"])
    return Reply({"id": record["id"], "record": record, **shown(told)})


async def _simulate_policy(call: Call) -> Reply:
    b: wire.SimulateBody = call.body
    files = _bundle_files(b.files)
    since, until = _moment("/from", b.from_), _moment("/to", b.to)
    return Reply(dataclasses.asdict(await call.kms.simulate_policy(call.ask, files, since=since, until=until)))


async def _transfers(call: Call) -> Reply:
    since, until, tenant = _instant(call.query, "from"), _instant(call.query, "to"), call.query.get("tenant")
    if tenant is not None and not _TENANT.fullmatch(tenant):
        raise RequestInvalid(("?tenant", "not_a_tenant", "the name of a tenant"))
    found = await call.kms.transfers(
        call.ask, tenant=tenant, since=since or 0, until=call.ask.arrived if until is None else until
    )
    return Reply(wire.transfers_json(found))


async def _transfer_agreements(call: Call) -> Reply:
    found = await call.kms.transfer_agreements(call.ask)
    now, own = call.ask.arrived // 1_000_000, call.ask.caller.tenant
    return Reply({"items": [wire.agreement_json(a, now=now, own=own) for a in found]})


def _token_json(token: Any) -> dict[str, Any]:
    return {
        "id": token.id,
        "role": token.role,
        "scopes": sorted(token.scopes),
        "created_at": wire.moment(token.created_at),
        "expires_at": wire.moment(token.expires_at),
    }


async def _create_token(call: Call) -> Reply:
    caller = call.ask.caller
    lifetime = wire.seconds("/expires_in", call.body.expires_in)
    if not 60 <= lifetime <= 90 * 86_400:
        raise RequestInvalid(("/expires_in", "out_of_range", "PT60S to P90D"))
    role = next(iter(sorted(caller.roles)), "")
    new = NewToken(
        tenant=caller.tenant or "",
        role=role,
        scopes=frozenset(call.body.scopes),
        lifetime_s=lifetime,
        created_by=caller.id,
    )
    token, secret = await call.kms.create_token(call.ask, new)
    return Reply({**_token_json(token), "token": secret}, 201)


async def _list_tokens(call: Call) -> Reply:
    return Reply({"items": [_token_json(t) for t in await call.kms.list_tokens(call.ask)]})


async def _revoke_token(call: Call) -> Reply:
    await call.kms.revoke_token(call.ask, call.path["id"])
    return Reply(None, 204)


async def _records(call: Call) -> Reply:
    limit = _page_size(call)
    names = {"key", "actor", "op", "out", "from", "to"}
    chosen = {k: v for k, v in call.query.items() if k in names}
    after = _page_token(call, chosen)
    position: tuple[str, int] | None = None
    if after is not None:
        log, _, seq = after.rpartition(":")
        if not seq.isdigit():
            raise PageTokenInvalid
        position = (log, int(seq))
    found = await call.kms.search_records(
        call.ask,
        key=chosen.get("key"),
        actor=chosen.get("actor"),
        op=chosen.get("op"),
        out=_one_of(chosen, "out", ("ok", "denied", "failed", "error")),
        since=_instant(chosen, "from"),
        until=_instant(chosen, "to"),
        after=position,
        limit=limit + 1,
    )
    items = [
        {"log": f.log, "seq": f.seq, "leaf": f.leaf.hex(), "time": wire.moment(f.t), "record": f.record}
        for f in found[:limit]
    ]
    last = found[limit - 1] if len(found) > limit else None
    return _page(call, items, None if last is None else f"{last.log}:{last.seq}", chosen)


def _instant(query: Mapping[str, str], name: str) -> int | None:
    text = query.get(name)
    return None if text is None else _moment(f"?{name}", text)


def _moment(pointer: str, text: str) -> int:
    try:
        return wire.microseconds(text)
    except ValueError:
        raise RequestInvalid((pointer, "invalid_time", "RFC 3339 UTC: 2026-01-31T12:00:00.000Z")) from None


async def _audit_status(call: Call) -> Reply:
    return Reply(await call.kms.audit_status(call.ask))


_NOTE: Final = "text/plain; charset=utf-8"
_TILE_MEDIA: Final = "application/octet-stream"
# A tile never changes; it is for this caller alone.
_IMMUTABLE: Final = (("cache-control", "private, max-age=31536000, immutable"),)


async def _checkpoint(call: Call) -> Reply:
    size = call.path.get("size")
    note = await call.kms.audit_checkpoint(call.ask, None if size is None else int(size))
    return Reply(note, media=_NOTE)


async def _consistency(call: Call) -> Reply:
    old, new = _size(call.query, "from"), _size(call.query, "to")
    if old is None or not old or (new is not None and new < old):
        raise RequestInvalid(("?from", "invalid_size", "the size of an older checkpoint, 1 or more"))
    return Reply(await call.kms.audit_consistency(call.ask, old, new), media=_NOTE)


def _size(query: Mapping[str, str], name: str) -> int | None:
    text = query.get(name)
    if text is not None and not _COUNT.fullmatch(text):
        raise RequestInvalid((f"?{name}", "invalid_size", "a decimal number without sign or leading zeroes"))
    return None if text is None else int(text)


async def _proof(call: Call) -> Reply:
    found = await call.kms.audit_proof(call.ask, call.path["chain"], int(call.path["seq"]))
    return Reply(found, media=_NOTE)


async def _tile(call: Call) -> Reply:
    """C2SP tlog-tiles: a full tile never changes, so it may be kept for ever; a partial one is soon of no use."""
    index, width = tile_place(call.path["tile"])
    level = None if "level" not in call.path else int(call.path["level"])
    if "chain" in call.path:
        found = await call.kms.chain_tile(call.ask, call.path["chain"], level, index, width)
    else:
        found = await call.kms.root_tile(call.ask, level, index, width)
    return Reply(found, headers=_IMMUTABLE if width == FULL_TILE else (), media=_TILE_MEDIA)


def tile_place(name: str) -> tuple[int, int]:
    """Index and width of a tile by its name `x001/x234/067[.p/W]`; NotFound for any other spelling of them."""
    path, partial, width = name.partition(".p/")
    groups = path.split("/")
    if (len(groups) > 1 and groups[0] == "x000") or (partial and int(width) >= FULL_TILE):
        raise NotFound("no such tile")
    return int("".join(g.removeprefix("x") for g in groups)), int(width) if partial else FULL_TILE


async def _tenant_bundle(call: Call) -> Reply:
    found = await call.kms.tenant_bundle(call.ask, call.path["tenant"], since=_instant(call.query, "from") or 0)

    async def lines() -> AsyncIterator[bytes]:
        yield found.header
        while (piece := await asyncio.to_thread(next, found.pieces, None)) is not None:
            if piece:
                yield piece

    return Reply(lines(), media="application/x-ndjson")


def _said(answer: Answer) -> Reply:
    """What a witness answers, to the byte: C2SP knows no problem documents."""
    return Reply(answer.body, answer.status, media=answer.media)


async def _add_checkpoint(call: Call) -> Reply:
    return _said(await call.kms.witness_checkpoint(call.ask, call.body))


async def _witnessed(call: Call) -> Reply:
    return _said(await call.kms.witnessed_checkpoint(call.ask.caller.source, call.path["origin"]))


async def _whoami(call: Call) -> Reply:
    c = await call.kms.whoami(call.ask)
    return Reply(
        {
            "id": c.id,
            "kind": c.kind,
            "tenant": c.tenant,
            "roles": sorted(c.roles),
            "places": sorted(c.places),
            "proof": c.proof,
            "authn": c.authn,
        }
    )


async def _metrics(call: Call) -> Reply:
    await call.kms.metrics_allowed(call.ask)
    shown = await asyncio.to_thread(call.app.observer.exposition)  # some are read from the database
    return Reply(shown, media="text/plain; version=0.0.4; charset=utf-8")


async def _livez(call: Call) -> Reply:
    return Reply({"status": "ok"})


async def _readyz(call: Call) -> Reply:
    ready, details = await call.app.health.ready(full=call.ask.caller.tenant is None and call.ask.caller.proof > 0)
    return Reply(details, 200 if ready else 503)


async def _openapi(call: Call) -> Reply:
    from service.protocols.openapi import document

    return Reply(document())


ANONYMOUS: Final = Caller(
    id="none:",
    kind="workload",
    tenant=None,
    roles=frozenset(),
    places=frozenset(),
    proof=0,
    authn="none",
)

_PAGE: Final = ("page_size", "page_token")

ROUTES: Final[tuple[Route, ...]] = (
    *(Route("POST", p.path, p.op, _single(p), p.summary, body=p.body, answer=p.answer) for p in PLANES.values()),
    *(
        Route(
            "POST",
            f"/v1/batch/{kind}",
            p.op,
            _batch(p),
            f"Up to 500 items of {kind}; a bad item harms no other",
            body=wire.BatchBody,
            item=p.item,
            answer=wire.BatchAnswer,
        )
        for kind, p in PLANES.items()
        if p.item is not None
    ),
    Route(
        "POST",
        "/v1/random",
        "random",
        _random,
        "Random bytes from the HSM",
        wire.RandomAnswer,
        wire.RandomBody,
    ),
    Route(
        "POST",
        "/v1/keys",
        "create_key",
        _create_key,
        "Create a key",
        wire.KeyAnswer,
        wire.CreateKeyBody,
        status=201,
        idempotent=True,
    ),
    Route(
        "GET",
        "/v1/keys",
        "list_keys",
        _list_keys,
        "List keys",
        wire.KeyList,
        query=(*_PAGE, "state", "tier", "usage", "region", "tag.*"),
    ),
    Route("GET", "/v1/keys/{key}", "get_key", _get_key, "A key's metadata", wire.KeyAnswer),
    Route(
        "PATCH",
        "/v1/keys/{key}",
        "update_key",
        _patch_key,
        "Change description, tags, rotation, fences",
        wire.KeyAnswer,
        wire.PatchKeyBody,
        if_match="required",
    ),
    Route("DELETE", "/v1/keys/{key}", "get_key", _delete_key, "Refused: deletion is scheduled", status=405),
    Route(
        "POST",
        "/v1/keys/{key}/rotate",
        "rotate_key",
        _rotate,
        "Make a new version",
        wire.KeyAnswer,
        wire.WhyBody,
        body_optional=True,
        idempotent=True,
        if_match="honoured",
    ),
    Route(
        "POST",
        "/v1/keys/{key}/import-parameters",
        "import_parameters",
        _import_parameters,
        "A wrapping key and a token for one import; earlier tokens of the key are spent",
        wire.ImportParametersAnswer,
        wire.ImportParametersBody,
        if_match="honoured",
    ),
    Route(
        "POST",
        "/v1/keys/{key}/import",
        "import_key",
        _import_key,
        "Add imported material as the key's next version",
        wire.KeyAnswer,
        wire.ImportBody,
        idempotent=True,
        if_match="honoured",
    ),
    *(
        Route(
            "POST",
            f"/v1/keys/{{key}}/{name}",
            op,
            _lifecycle(change),
            summary,
            wire.KeyAnswer,
            wire.WhyBody,
            body_optional=True,
            if_match=match,
        )
        for name, op, change, summary, match in (
            # Stopping a key must not fail because somebody else changed it meanwhile.
            ("disable", "disable_key", Kms.disable_key, "Stop every use of a key", "honoured"),
            ("enable", "enable_key", Kms.enable_key, "Put a disabled key back into use", "required"),
            (
                "mark-compromised",
                "compromise_key",
                Kms.mark_compromised,
                "Mark a key compromised, for ever",
                "honoured",
            ),
            (
                "cancel-deletion",
                "cancel_deletion",
                Kms.cancel_deletion,
                "Take a scheduled deletion back",
                "required",
            ),
        )
    ),
    Route(
        "POST",
        "/v1/keys/{key}/schedule-deletion",
        "schedule_deletion",
        _schedule_deletion,
        "Stop a key now, destroy it after 7 to 90 days",
        wire.KeyAnswer,
        wire.DeletionBody,
        idempotent=True,
        if_match="required",
    ),
    Route(
        "POST",
        "/v1/keys/{key}/destroy",
        "destroy_key",
        _destroy,
        "Ask for the destruction of a key without a waiting time: done once a quorum has signed the request",
        wire.ApprovalAnswer,
        wire.WhyBody,
        body_optional=True,
        status=202,
        idempotent=True,
        if_match="required",
    ),
    Route(
        "POST",
        "/v1/keys/{key}/policy",
        "set_key_policy",
        _set_key_policy,
        "Ask for another tier, other places or purposes of a key: done once a quorum has signed the request",
        wire.ApprovalAnswer,
        wire.KeyPolicyBody,
        status=202,
        idempotent=True,
        if_match="required",
    ),
    Route(
        "POST",
        "/v1/keys/{key}/grants",
        "create_grant",
        _create_grant,
        "Let a workload of the tenant use a key, until an end",
        wire.GrantAnswer,
        wire.GrantBody,
        status=201,
        idempotent=True,
    ),
    Route("GET", "/v1/keys/{key}/grants", "list_grants", _list_grants, "Grants of a key, newest first", wire.GrantList),
    Route(
        "DELETE",
        "/v1/keys/{key}/grants/{grant}",
        "revoke_grant",
        _revoke_grant,
        "Take a grant back: it counts nowhere a second later",
        status=204,
    ),
    Route("GET", "/v1/keys/{key}/versions", "list_versions", _versions, "A key's versions", wire.VersionList),
    Route(
        "POST",
        "/v1/keys/{key}/versions/{version}/revoke",
        "revoke_version",
        _revoke_version,
        "Take one version out of use",
        wire.KeyAnswer,
        wire.WhyBody,
        body_optional=True,
        if_match="honoured",
    ),
    Route(
        "GET",
        "/v1/keys/{key}/public-key",
        "get_public_key",
        _public_key,
        "The public key as PEM, or as JWK by Accept",
        query=("version",),
        media=("application/x-pem-file", "application/jwk+json"),
    ),
    Route("GET", "/v1/aliases", "list_aliases", _list_aliases, "List aliases", wire.AliasList, query=_PAGE),
    Route(
        "PUT",
        "/v1/aliases/{name}",
        "put_alias",
        _put_alias,
        "Point an alias to a key, atomically",
        wire.AliasAnswer,
        wire.AliasBody,
    ),
    Route("DELETE", "/v1/aliases/{name}", "delete_alias", _delete_alias, "Remove an alias", status=204),
    Route("GET", "/v1/tenants", "list_tenants", _tenants, "Tenants of the charter", wire.ObjectList),
    Route("GET", "/v1/regions", "list_regions", _regions, "Places of the charter", wire.ObjectList),
    Route("GET", "/v1/hsms", "list_hsms", _hsms, "State of this node's HSMs", wire.HsmList),
    Route(
        "POST",
        "/v1/hsms/{name}/drain",
        "drain_hsm",
        _drain_hsm,
        "Give an HSM no more calls, on every worker",
        wire.HsmAnswer,
        wire.WhyBody,
        body_optional=True,
    ),
    Route(
        "POST",
        "/v1/hsms/{name}/undrain",
        "undrain_hsm",
        _undrain_hsm,
        "Let an HSM serve again",
        wire.HsmAnswer,
        wire.WhyBody,
        body_optional=True,
    ),
    Route(
        "POST",
        "/v1/drills",
        "start_drill",
        _start_drill,
        "Exchange one HSM for another, proven and measured",
        wire.OperationAnswer,
        wire.DrillBody,
        status=202,
        idempotent=True,
    ),
    Route("GET", "/v1/drills", "list_drills", _list_drills, "Drills, newest first", wire.OperationList),
    Route("GET", "/v1/drills/{operation}", "get_drill", _get_drill, "A drill", wire.OperationAnswer),
    Route("GET", "/v1/drills/{operation}/report", "drill_report", _drill_report, "What the audit log says of a drill"),
    *(
        Route(
            "POST",
            f"/v1/drills/{{operation}}/{name}",
            f"{name}_drill",
            handler,
            summary,
            wire.OperationAnswer,
            wire.WhyBody,
            body_optional=True,
        )
        for name, handler, summary in (
            ("abort", _abort_drill, "Put both HSMs back; at any point before it is confirmed"),
            ("confirm", _confirm_drill, "Accept the exchange: the old HSM is drained"),
        )
    ),
    Route(
        "GET",
        "/v1/operations/{operation}",
        "get_operation",
        _get_operation,
        "Where a long-running operation stands",
        wire.OperationAnswer,
    ),
    Route(
        "POST",
        "/v1/freezes",
        "freeze",
        _freeze,
        "Stop every operation in a scope, on every worker and node",
        wire.ContainedAnswer,
        wire.FreezeBody,
        status=201,
        idempotent=True,
    ),
    Route(
        "POST",
        "/v1/freezes/drill",
        "freeze_drill",
        _freeze_drill,
        "Freeze a canary key, measure how long every worker takes to obey, and lift it again",
        wire.ContainedAnswer,
        wire.FreezeDrillBody,
        status=201,
        idempotent=True,
    ),
    Route("GET", "/v1/freezes", "list_freezes", _list_freezes, "Freezes, newest first", wire.FreezeList),
    Route(
        "GET",
        "/v1/freezes/{freeze}",
        "get_freeze",
        _get_freeze,
        "A freeze: who obeys it, when it was contained, what succeeded last in its scope",
        wire.ContainedAnswer,
    ),
    Route(
        "POST",
        "/v1/freezes/{freeze}/lift",
        "lift_freeze",
        _lift_freeze,
        "Ask for the lift of a freeze: done once a quorum of approvers has signed the request",
        wire.ApprovalAnswer,
        wire.WhyBody,
        body_optional=True,
        status=202,
        idempotent=True,
    ),
    Route(
        "GET",
        "/v1/compliance",
        "get_compliance",
        _get_compliance,
        "Keys that do not meet their tier, what is missing and since when; tiers and suppliers as the charter has them",
        wire.ComplianceAnswer,
        query=_PAGE,
    ),
    Route(
        "GET",
        "/v1/sovereignty/metrics",
        "get_sovereignty",
        _get_sovereignty,
        "Systems under sovereign control, time to exit, diversity, time to detect and contain: each with what to count again",
        wire.SovereigntyAnswer,
    ),
    Route(
        "POST",
        "/v1/exceptions",
        "create_exception",
        _request_exception,
        "Ask for an exception from reach or egress: it counts once a quorum with the data-protection officer has signed it",
        wire.ApprovalAnswer,
        wire.ExceptionBody,
        status=202,
        idempotent=True,
    ),
    Route("GET", "/v1/exceptions", "list_exceptions", _list_exceptions, "Exceptions, newest first", wire.ExceptionList),
    Route(
        "GET",
        "/v1/exceptions/{exception}",
        "get_exception",
        _get_exception,
        "An exception: what was signed, and by whom",
        wire.ExceptionAnswer,
    ),
    Route(
        "DELETE",
        "/v1/exceptions/{exception}",
        "revoke_exception",
        _revoke_exception,
        "Take an exception back: it counts nowhere a second later",
        status=204,
    ),
    Route("GET", "/v1/approvals", "list_approvals", _list_approvals, "Requests for approval", wire.ApprovalList),
    Route(
        "GET",
        "/v1/approvals/{approval}",
        "get_approval",
        _get_approval,
        "A request for approval: what exactly is asked, and who has approved it",
        wire.ApprovalAnswer,
    ),
    Route(
        "POST",
        "/v1/approvals/{approval}/signatures",
        "sign_approval",
        _sign_approval,
        "Add an approver's signature; the one that completes the quorum executes the request",
        wire.ApprovalAnswer,
        wire.SignatureBody,
    ),
    Route(
        "POST",
        "/v1/approvals/{approval}/revocations",
        "revoke_approval",
        _revoke_approval,
        "Take an approval back, by its approver's signature over the kind `revoke-` and the request's kind",
        wire.ApprovalAnswer,
        wire.SignatureBody,
    ),
    Route(
        "POST",
        "/v1/approvals/{approval}/cancel",
        "cancel_approval",
        _cancel_approval,
        "Withdraw a request for approval",
        wire.ApprovalAnswer,
        wire.WhyBody,
        body_optional=True,
    ),
    Route("GET", "/v1/policy", "get_policy", _get_policy, "The policy in force", wire.PolicyAnswer),
    Route(
        "POST",
        "/v1/policy/reload",
        "reload_policy",
        _reload_policy,
        "Load the bundle anew; the old one stays if the new one is refused",
        wire.PolicyAnswer,
        wire.WhyBody,
        body_optional=True,
    ),
    Route(
        "POST",
        "/v1/policy/plan",
        "plan_policy",
        _plan_policy,
        "What a draft bundle comes to: files, meaning, proofs, who would be locked out, and a recorded period under it",
        wire.PlanAnswer,
        wire.PlanBody,
    ),
    Route(
        "POST",
        "/v1/policy/apply",
        "apply_policy",
        _apply_policy,
        "Ask for a draft bundle to be put in force: done once a quorum of approvers has signed exactly that",
        wire.ApprovalAnswer,
        wire.ApplyBody,
        status=202,
        idempotent=True,
    ),
    Route(
        "POST",
        "/v1/policy/rollback",
        "rollback_policy",
        _rollback_policy,
        "Ask for the content of an earlier bundle under a new version, by the same quorum",
        wire.ApprovalAnswer,
        wire.RollbackBody,
        body_optional=True,
        status=202,
        idempotent=True,
    ),
    Route(
        "GET",
        "/v1/policy/decisions/{decision}",
        "get_decision",
        _get_decision,
        "Why a recorded decision came out so: every rule and condition, and what would flip it",
        wire.DecisionAnswer,
    ),
    Route(
        "POST",
        "/v1/policy/simulate",
        "simulate_policy",
        _simulate_policy,
        "Decide a recorded period again under a draft bundle, and tell what would differ",
        wire.ReplayAnswer,
        wire.SimulateBody,
    ),
    Route(
        "GET",
        "/v1/transfers",
        "list_transfers",
        _transfers,
        "What crossed from one jurisdiction into another in a period, and what was refused there",
        wire.TransferList,
        query=("from", "to", "tenant"),
    ),
    Route(
        "GET",
        "/v1/transfer-agreements",
        "list_transfer_agreements",
        _transfer_agreements,
        "The registered agreements that let data cross, in force or not",
        wire.AgreementList,
    ),
    Route(
        "POST",
        "/v1/tokens",
        "create_token",
        _create_token,
        "Make a scoped API token; its secret is shown once",
        wire.TokenAnswer,
        wire.TokenBody,
        status=201,
    ),
    Route("GET", "/v1/tokens", "list_tokens", _list_tokens, "List API tokens", wire.TokenList),
    Route("DELETE", "/v1/tokens/{id}", "revoke_token", _revoke_token, "Revoke an API token", status=204),
    Route(
        "GET",
        "/v1/audit/records",
        "search_records",
        _records,
        "Search audit records, newest first",
        wire.RecordList,
        query=(*_PAGE, "key", "actor", "op", "out", "from", "to"),
    ),
    Route("GET", "/v1/audit/status", "audit_status", _audit_status, "State of this worker's chain"),
    Route("GET", "/v1/audit/checkpoint", "audit_checkpoint", _checkpoint, "The newest C2SP checkpoint", media=_TEXT),
    Route(
        "GET",
        "/v1/audit/checkpoint/{size}",
        "audit_checkpoint",
        _checkpoint,
        "The C2SP checkpoint of a size",
        media=_TEXT,
    ),
    Route(
        "GET",
        "/v1/audit/consistency",
        "audit_consistency",
        _consistency,
        "That one checkpoint extends another: RFC 6962 proof, spelt as in C2SP tlog-witness",
        query=("from", "to"),
        media=_TEXT,
    ),
    Route(
        "GET",
        "/v1/audit/{chain}/{seq}/proof",
        "audit_proof",
        _proof,
        "C2SP tlog-proof of the root log's entry that commits a record; `extra` leads from there to the record",
        media=_TEXT,
    ),
    Route(
        "GET",
        "/v1/audit/tenants/{tenant}/bundle",
        "tenant_bundle",
        _tenant_bundle,
        "All records of a tenant, and the proof that none is missing",
        query=("from",),
        media=("application/x-ndjson",),
    ),
    *(
        Route("GET", f"/v1/audit/{log}tile/{kind}/{{tile}}", "audit_tile", _tile, about + of, media=(_TILE_MEDIA,))
        for log, of in (("", " of the root log"), ("{chain}/", " of a chain"))
        for kind, about in (("{level}", "A C2SP hash tile"), ("entries", "A C2SP entry bundle"))
    ),
    Route(
        "POST",
        "/witness/add-checkpoint",
        "witness_checkpoint",
        _add_checkpoint,
        "Cosign another log's checkpoint: C2SP tlog-witness",
        anonymous=True,
        text=MAX_SUBMISSION,
        media=_TEXT,
    ),
    Route(
        "GET",
        "/witness/{origin}/checkpoint",
        "witness_checkpoint",
        _witnessed,
        "The newest checkpoint that was cosigned here, by the SHA-256 of its log's origin in hex",
        public=True,
        media=_TEXT,
    ),
    Route("GET", "/v1/whoami", "whoami", _whoami, "What the service makes of your credential", wire.WhoAnswer),
    Route("GET", "/livez", "health", _livez, "The process lives", public=True),
    Route("GET", "/readyz", "health", _readyz, "The node can serve", public=True),
    Route("GET", "/metrics", "metrics", _metrics, "Prometheus metrics", media=("text/plain",)),
    Route("GET", "/openapi.json", "openapi", _openapi, "This API", public=True),
)


def _pattern(path: str) -> re.Pattern[str]:
    """The exact paths of a template: no percent-encoding, no case folding, no trailing slash."""
    parts = {
        "{key}": _KEY,
        "{version}": r"(?P<version>[1-9][0-9]{0,7})",
        "{name}": r"(?P<name>[a-z0-9][a-z0-9._-]{0,127})",
        "{id}": r"(?P<id>[A-Za-z0-9]{8})",
        "{decision}": rf"(?P<decision>{_UUID})",
        "{operation}": rf"(?P<operation>{_UUID})",
        "{freeze}": rf"(?P<freeze>{_UUID})",
        "{approval}": rf"(?P<approval>{_UUID})",
        "{grant}": rf"(?P<grant>{_UUID})",
        "{exception}": rf"(?P<exception>{_UUID})",
        "{size}": rf"(?P<size>{_COUNT.pattern})",
        "{chain}": r"(?P<chain>[a-z0-9][a-z0-9-]{0,17}-[0-9]{1,5})",
        "{seq}": rf"(?P<seq>{_COUNT.pattern})",
        "{tenant}": r"(?P<tenant>[a-z0-9][a-z0-9._-]{0,63})",
        "{origin}": r"(?P<origin>[0-9a-f]{64})",
        "{level}": r"(?P<level>[0-9]|[1-5][0-9]|6[0-3])",
        "{tile}": r"(?P<tile>(?:x[0-9]{3}/){0,4}[0-9]{3}(?:\.p/[1-9][0-9]{0,2})?)",
    }
    return re.compile("".join(parts.get(p, re.escape(p)) for p in re.split(r"(\{[a-z]+\})", path)))


class Native:
    """The ASGI application of the native API."""

    def __init__(
        self,
        kms: Kms,
        identity: Authenticator,
        *,
        ways: Ways,
        drills: Drills,
        containment: Containment,
        requests: KeyRequests,
        granting: Granting,
        excepting: Excepting,
        policy_changes: PolicyChanges,
        sovereignty: Sovereignty,
        idempotency: Idempotency,
        health: Health,
        observer: Observer,
        limits: Limits,
        turns: Turns,
        clock: Callable[[], int],
        tracing: Tracing | None = None,
    ) -> None:
        self.turns, self._refused = (
            turns,
            Buckets(rate=PACE, burst=int(PACE), sources=SOURCES, monotonic=time.monotonic),
        )
        self.kms, self.identity, self.idempotency, self.drills = kms, identity, idempotency, drills
        self.ways, self.granting, self.excepting = ways, granting, excepting
        self.containment, self.requests, self.policy_changes = containment, requests, policy_changes
        self.sovereignty, self.tracing = sovereignty, tracing
        self.health, self.observer, self.limits, self._clock = health, observer, limits, clock
        self._exact = {(r.method, r.path): r for r in ROUTES if "{" not in r.path}
        self._patterns = [(r, _pattern(r.path)) for r in ROUTES if "{" in r.path]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        arrived = self._clock()
        ask = Ask(caller=ANONYMOUS, request_id=uuid7(arrived), arrived=arrived)
        source = (scope.get("client") or ("",))[0]
        route, path, allowed = self._route(scope)
        answer: Reply | Problem | None = None
        place: str | None = None
        try:
            try:
                if route is not None and (route.public or route.anonymous):
                    ask.caller = dataclasses.replace(ANONYMOUS, source=source)
                else:
                    ask.caller = await self.identity.identify(scope)
                    if route is None or not self._urgent(ask, route):
                        place = await self._admitted(ask, scope)
                if route is None:
                    raise MethodNotAllowed(allowed) if allowed else NotFound("no such path")
                call = await self._call(ask, route, path, scope, receive)
                answer = self._replayed(call, route) or await self._handled(call, route)
            except Exception as error:
                answer = await self._failed(ask, route, source, error)
            if place is not None and not isinstance(answer.body, AsyncIterator):
                self.turns.leave(place)  # a reader that is slow keeps nobody waiting
                place = None
            if isinstance(answer, Problem) and (most := PACED.get(answer.body["code"])):
                await self._paced(ask.caller.tenant or source, most)
            await self._send(send, ask, answer)
        finally:
            if place is not None:
                self.turns.leave(place)
            if ask.traced is not None:
                record = None if ask.receipt is None else f"{ask.receipt.log}/{ask.receipt.seq}"
                ask.traced.end(
                    None if answer is None else answer.status,
                    request_id=ask.request_id,
                    decision=ask.decision_id,
                    record=record,
                )
        self.observer.observe(ask, source, scope["method"], answer.status, self._clock())

    async def _admitted(self, ask: Ask, scope: Scope) -> str:
        """Whose place among the requests under way this one has taken; RateLimited or Overloaded before its body is read."""
        tenant = ask.caller.tenant
        self.kms.rates.admit(tenant)
        if scope["extensions"].get("crowded"):
            raise self.turns.crowded()
        who = tenant or ""
        if not self.turns.enter(who):
            await self.turns.wait(who)
        return who

    def _route(self, scope: Scope) -> tuple[Route | None, Mapping[str, str], tuple[str, ...]]:
        method, path = scope["method"], scope["path"]
        raw = scope.get("raw_path") or path.encode()
        if b"%" in raw:  # nothing in the API needs it, and it is how paths are smuggled
            return None, {}, ()
        if (route := self._exact.get((method, path))) is not None:
            return route, {}, ()
        for candidate, pattern in self._patterns:
            if candidate.method == method and (match := pattern.fullmatch(path)):
                return candidate, match.groupdict(), ()
        allowed = {m for m, p in self._exact if p == path}
        allowed |= {other.method for other, pattern in self._patterns if pattern.fullmatch(path)}
        return None, {}, tuple(sorted(allowed))

    async def _paced(self, who: str, most: float) -> None:
        """Hold back the answer to one of a flood of refusals: a connection that waits for it sends nothing meanwhile."""
        if late := self._refused.late(who, most=most):
            await asyncio.sleep(late)

    def _urgent(self, ask: Ask, route: Route) -> bool:
        """Whether a request stops something, or tells how the node is: no load and no limit keeps it out."""
        return route.op in URGENT and self.kms.rates.urgent(ask.caller.id)

    async def _call(self, ask: Ask, route: Route, path: Mapping[str, str], scope: Scope, receive: Receive) -> Call:
        """Everything that is checked before the operation begins."""
        headers = _headers(scope)
        client = headers.get("x-client-request-id")
        if client is not None and not _CLIENT_ID.fullmatch(client):
            raise Malformed("x-client-request-id")
        ask.client_request_id = client
        if (match := _TRACEPARENT.fullmatch(headers.get("traceparent", ""))) is not None:
            ask.trace = match.group(1)
        if not route.public:
            self._begin(ask, route, None if match is None else match.group())
        query = _query(scope, route)
        ask.dry_run = query.get("dry_run") == "true"
        told = [] if route.public or route.anonymous else self.ways.announced(scope)
        raw = await self._read(route, headers, receive)
        ask.hops = await self.ways.proven(scope, told, raw)
        ask.caller = policy.behind(ask.caller, ask.hops.origin)
        body = _body(route, headers, raw)
        reason = getattr(body, "reason", None)
        ask.reason = None if reason is None else reason.code
        ask.if_match = _if_match(route, headers)
        digest = hashlib.sha256(f"{route.method} {scope['path']}\n".encode() + raw).digest()
        return Call(self, self.kms, ask, path, query, headers, body, digest)

    def _begin(self, ask: Ask, route: Route, parent: str | None) -> None:
        """The request's span, if it is sampled."""
        if self.tracing is None:
            return
        ask.traced = self.tracing.begin(
            route.op, method=route.method, route=route.path, parent=parent, arrived=ask.arrived
        )
        if ask.traced is not None:
            ask.trace = ask.traced.trace

    async def _read(self, route: Route, headers: Mapping[str, str], receive: Receive) -> bytes:
        """The body, counted while it arrives; PayloadTooLarge before it is in memory."""
        limit = route.text or (self.limits.batch_body if route.item is not None else self.limits.body)
        declared = headers.get("content-length", "0")
        if not declared.isdigit():
            raise Malformed("content-length")
        if int(declared) > limit:
            raise PayloadTooLarge(limit)
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Disconnected
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > limit:
                raise PayloadTooLarge(limit)
            chunks.append(chunk)
            if not message.get("more_body"):
                return b"".join(chunks)

    def _replayed(self, call: Call, route: Route) -> Reply | None:
        """The stored answer of the same request, or None after claiming the Idempotency-Key for this one."""
        if not route.idempotent or call.ask.dry_run:
            return None
        match = _IDEMPOTENCY.fullmatch(call.headers.get("idempotency-key", ""))
        if match is None:
            raise IdempotencyKeyMissing
        claim = (call.ask.caller.tenant or "", call.ask.caller.id, match.group(1))
        begun = self.idempotency.begin(*claim, call.digest)
        match begun:
            case Replay():
                headers = (("idempotency-replayed", "true"), *begun.headers)
                return Reply(json.loads(begun.body), begun.status, headers)
            case Reused():
                raise IdempotencyKeyReused
            case InProgress():
                raise IdempotencyInProgress
            case _:
                call.claim = claim

        def remember(connection: Any, key: Key) -> None:
            reply = _key_reply(call, key, route.status)
            headers = (*reply.headers, ("location", f"/v1/keys/{key.id}")) if route.status == 201 else reply.headers
            self.idempotency.finish(connection, *claim, reply.status, json.dumps(reply.body).encode(), headers)

        call.ask.remember = remember
        return None

    async def _handled(self, call: Call, route: Route) -> Reply:
        try:
            return await route.handler(call)
        except BaseException:
            if call.claim is not None and not call.ask.executed:
                await self._give_back(call.claim)
            raise

    async def _give_back(self, claim: tuple[str, str, str]) -> None:
        """Let the Idempotency-Key be used again; if the database refuses even that, it is so once the claim has ended."""
        try:
            await asyncio.to_thread(self.idempotency.abandon, *claim)
        except Exception as error:  # the request failed for another reason, and that one is told
            self.observer.unasked("idempotency key", error)

    async def _failed(self, ask: Ask, route: Route | None, source: str, error: Exception) -> Reply | Problem:
        """The answer to a request that failed; if nothing recorded it yet, it is recorded now."""
        if ask.dry_run and isinstance(error, WouldAllow | policy.Denied):
            told = dry_run_answer(error)
            if told is not None:
                return told
        out, code = meaning(error)
        if (
            ask.receipt is None
            and not ask.counted
            and code != "audit_unavailable"
            and not (route is not None and route.public)
        ):
            try:
                if route is None or ask.caller is ANONYMOUS:
                    why = error.reason if isinstance(error, Unidentified) else code
                    ask.receipt = await self.kms.unidentified(
                        source=source,
                        request_id=ask.request_id,
                        arrived=ask.arrived,
                        why=why,
                        stranger=ask.caller is ANONYMOUS,
                    )
                    ask.counted = ask.receipt is None
                else:
                    rule = f"{HOP}{error.reason}" if isinstance(error, HopRefused) else None
                    await self.kms.refused(ask, route.op, out, code, rule=rule)
            except Unavailable as unavailable:
                error = unavailable
        if isinstance(error, HopRefused):
            self.observer.conflict(ask, error.reason)
        self.observer.failed(ask, route.op if route is not None else "none", code, error)
        return problem_of(error, request_id=ask.request_id, decision_id=ask.decision_id, executed=ask.executed)

    async def _send(self, send: Send, ask: Ask, answer: Reply | Problem) -> None:
        headers: list[tuple[str, str]] = [("x-request-id", ask.request_id)]
        if all(name != "cache-control" for name, _ in answer.headers):
            headers.append(("cache-control", "no-store"))
        if ask.receipt is not None:
            headers.append(("audit-receipt", ask.receipt.header()))
        if ask.client_request_id is not None:
            headers.append(("x-client-request-id", ask.client_request_id))
        headers += [("x-content-type-options", "nosniff"), *answer.headers]
        if isinstance(answer, Reply) and ask.caller.tenant is not None:
            headers += self.kms.rates.told(ask.caller.tenant)
        if isinstance(answer, Reply) and isinstance(answer.body, AsyncIterator):
            await self._stream(send, answer, [*headers, ("content-type", answer.media)])
            return
        if isinstance(answer, Problem):
            payload, media = msgspec.json.encode(answer.body), PROBLEM_JSON
        elif isinstance(answer.body, bytes):
            payload, media = answer.body, answer.media
        else:
            payload = b"" if answer.body is None else msgspec.json.encode(answer.body)
            media = answer.media
        if payload:
            headers.append(("content-type", media))
        headers.append(("content-length", str(len(payload))))
        await send(
            {
                "type": "http.response.start",
                "status": answer.status,
                "headers": [(k.encode(), v.encode()) for k, v in headers],
            }
        )
        await send({"type": "http.response.body", "body": payload})

    async def _stream(self, send: Send, answer: Reply, headers: list[tuple[str, str]]) -> None:
        """Send pieces as they come, without a length: an error between them ends the connection, not the answer."""
        encoded = [(k.encode(), v.encode()) for k, v in headers]
        await send({"type": "http.response.start", "status": answer.status, "headers": encoded})
        async for piece in answer.body:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def dry_run_answer(error: WouldAllow | policy.Denied) -> Reply | None:
    """What a dry run tells; None where the real request would say no more than `not_found`."""
    decision = error.decision
    if decision.code == "not_found":
        return None
    shown: dict[str, Any] = {"policy": decision.digest[:12]}
    if decision.allowed:
        return Reply({"would": "allow", "decision": shown})
    shown |= {"code": decision.code, "rule": decision.rule_code or "DEFAULT"}
    return Reply({"would": "deny", "decision": shown})


def _headers(scope: Scope) -> dict[str, str]:
    return {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}  # ASGI gives names in lower case


def _query(scope: Scope, route: Route) -> dict[str, str]:
    """Query parameters: known names only, each once, plain ASCII without percent-escapes beyond the necessary."""
    raw = scope.get("query_string", b"").decode("latin-1")
    found: dict[str, str] = {}
    if not raw:
        return found
    if len(raw) > 4_096:
        raise RequestInvalid(("?", "too_long", "at most 4,096 characters"))
    try:
        pairs = parse_qsl(raw, keep_blank_values=True, strict_parsing=True, max_num_fields=32, errors="strict")
    except ValueError:
        raise RequestInvalid(("?", "malformed", "name=value pairs")) from None
    tried = route.method != "GET" and not route.anonymous
    allowed = {*route.query, "dry_run"} if tried else set(route.query)
    for name, value in pairs:
        known = name in allowed or ("tag.*" in allowed and _TAG.fullmatch(name) is not None)
        if not known:
            raise RequestInvalid(("?", "unknown_parameter", "see the API document for this route's parameters"))
        if name in found:
            raise RequestInvalid((f"?{name}", "repeated", "once only"))
        if not value.isascii() or not value.isprintable() or len(value) > 1_024:
            raise RequestInvalid((f"?{name}", "not_printable", "printable ASCII, at most 1,024 characters"))
        found[name] = value
    if found.get("dry_run", "false") not in {"true", "false"}:
        raise RequestInvalid(("?dry_run", "not_allowed", "true or false"))
    return found


def _body(route: Route, headers: Mapping[str, str], raw: bytes) -> Any:
    """The body as the route's Struct; Malformed, UnsupportedMediaType or Invalid otherwise."""
    if route.text:
        if headers.get("content-encoding", "identity") != "identity":
            raise UnsupportedMediaType
        return raw
    if route.body is None:
        if raw:
            raise Malformed("body")
        return None
    if not raw and route.body_optional:
        return route.body()
    media, _, parameters = headers.get("content-type", "").partition(";")
    charset = parameters.strip().lower()
    if media.strip().lower() != JSON or charset not in {"", "charset=utf-8", 'charset="utf-8"'}:
        raise UnsupportedMediaType
    if headers.get("content-encoding", "identity") != "identity":
        raise UnsupportedMediaType
    return convert(loads(raw), route.body)


def _if_match(route: Route, headers: Mapping[str, str]) -> int | None:
    text = headers.get("if-match")
    if text is None or not route.if_match or text == "*":
        if route.if_match == "required" and text is None:
            raise EtagMissing("If-Match is required")
        return None
    match = _ETAG.fullmatch(text)
    if match is None:
        raise EtagMismatch("not an ETag of this service")
    return int(match.group(1))
