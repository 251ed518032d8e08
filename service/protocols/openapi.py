"""The API document (OpenAPI 3.1), made from `ROUTES` and the wire types, and committed as `openapi.yaml`.

`python -m service.protocols.openapi > openapi.yaml` writes it; a test holds the committed file to what is served.
"""

from __future__ import annotations

import functools
import re
import sys
from typing import Any, Final

import msgspec
import yaml

from service.protocols import wire
from service.protocols.native import ROUTES, Route
from service.protocols.problems import ERRORS

VERSION: Final = "1.0.0"
_REF: Final = "#/components/schemas/{name}"

_PARAMETERS: Final[dict[str, dict[str, Any]]] = {
    "key": {
        "description": "A key's UUID, or `alias/<name>`.",
        "schema": {
            "type": "string",
            "pattern": "^([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}|alias/[a-z0-9][a-z0-9._-]{0,127})$",
        },
    },
    "version": {"schema": {"type": "integer", "minimum": 1, "maximum": 16_777_215}},
    "name": {"schema": {"type": "string", "pattern": "^[a-z0-9][a-z0-9._-]{0,127}$"}},
    "id": {"schema": {"type": "string", "pattern": "^[A-Za-z0-9]{8}$"}},
    "size": {"schema": {"type": "integer", "minimum": 0, "maximum": 999_999_999_999_999}},
    "chain": {
        "description": "Node and slot of a writer: what a receipt's `log` ends with.",
        "schema": {"type": "string", "pattern": "^[a-z0-9][a-z0-9-]{0,17}-[0-9]{1,5}$"},
    },
    "seq": {"schema": {"type": "integer", "minimum": 0, "maximum": 999_999_999_999_999}},
    "tenant": {"schema": {"type": "string", "pattern": "^[a-z0-9][a-z0-9._-]{0,63}$"}},
    "level": {"schema": {"type": "integer", "minimum": 0, "maximum": 63}},
    "tile": {
        "description": "Index and width as in C2SP tlog-tiles: `067`, `x001/x234/067`, `.p/<W>` if not full.",
        "schema": {"type": "string", "pattern": "^(x[0-9]{3}/){0,4}[0-9]{3}(\\.p/[1-9][0-9]{0,2})?$"},
    },
    "origin": {
        "description": "SHA-256 of the origin of a log, in hex.",
        "schema": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
    },
    "operation": {"schema": {"type": "string", "format": "uuid", "pattern": "^[0-9a-f-]{36}$"}},
    "approval": {"schema": {"type": "string", "format": "uuid", "pattern": "^[0-9a-f-]{36}$"}},
    "exception": {"schema": {"type": "string", "format": "uuid", "pattern": "^[0-9a-f-]{36}$"}},
    "grant": {"schema": {"type": "string", "format": "uuid", "pattern": "^[0-9a-f-]{36}$"}},
    "freeze": {"schema": {"type": "string", "format": "uuid", "pattern": "^[0-9a-f-]{36}$"}},
    "decision": {"schema": {"type": "string", "format": "uuid", "pattern": "^[0-9a-f-]{36}$"}},
}
_QUERY: Final[dict[str, dict[str, Any]]] = {
    "page_size": {"type": "integer", "minimum": 1, "maximum": 500, "default": 50},
    "page_token": {"type": "string", "maxLength": 1024, "pattern": "^[A-Za-z0-9_-]+$"},
    "state": {
        "type": "string",
        "enum": [
            "pending_import",
            "enabled",
            "disabled",
            "deactivated",
            "compromised",
            "pending_deletion",
            "destroyed",
        ],
    },
    "tier": {"type": "integer", "minimum": 1, "maximum": 3},
    "usage": {"type": "string", "enum": ["encrypt", "sign", "mac"]},
    "region": {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"},
    "version": {"type": "integer", "minimum": 1, "maximum": 16_777_215},
    "key": {"type": "string", "pattern": "^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$"},
    "actor": {"type": "string", "minLength": 1, "maxLength": 512, "pattern": "^[ -~]+$"},
    "op": {"type": "string", "pattern": "^[a-z_]{1,32}$"},
    "out": {"type": "string", "enum": ["ok", "denied", "failed", "error"]},
    "from": {"type": "string", "format": "date-time"},
    "to": {"type": "string", "format": "date-time"},
    "tenant": {"type": "string", "pattern": "^[a-z0-9][a-z0-9._-]{0,63}$"},
}

_SIZE: Final = {"type": "integer", "minimum": 1, "maximum": 999_999_999_999_999}
_SIZES: Final[dict[str, dict[str, Any]]] = {"from": _SIZE, "to": _SIZE}  # of checkpoints, where others are times


def _header(name: str, description: str, schema: dict[str, Any], *, required: bool) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": required, "description": description, "schema": schema}


def _parameters(route: Route) -> list[dict[str, Any]]:
    found = [
        {"name": name, "in": "path", "required": True, **_PARAMETERS[name]}
        for name in re.findall(r"\{([a-z]+)\}", route.path)
    ]
    sizes = route.op == "audit_consistency"
    known = _SIZES if sizes else _QUERY
    found += [
        {"name": name, "in": "query", "required": sizes and name == "from", "schema": known[name]}
        for name in route.query
        if name != "tag.*"
    ]
    if route.method != "GET" and not route.anonymous:
        found.append({"name": "dry_run", "in": "query", "required": False, "schema": {"type": "boolean"}})
    if route.idempotent:
        schema = {"type": "string", "pattern": "^[!#-\\[\\]-~]{1,128}$"}
        found.append(_header("Idempotency-Key", "One per intended change; kept for 24 hours.", schema, required=True))
    if route.if_match:
        schema = {"type": "string", "pattern": '^"[0-9]{1,15}"$'}
        text = "The ETag that the key had when you read it."
        found.append(_header("If-Match", text, schema, required=route.if_match == "required"))
    return found


def _responses(route: Route) -> dict[str, Any]:
    success: dict[str, Any] = {"description": route.summary}
    if route.media != ("application/json",):
        success["content"] = {media: {} for media in route.media}
    elif route.answer is not None:
        ref: dict[str, Any] = {"$ref": _REF.format(name=route.answer.__name__)}
        if route.method != "GET":
            ref = {"anyOf": [ref, {"$ref": _REF.format(name="DryRunAnswer")}]}
        success["content"] = {"application/json": {"schema": ref}}
    elif route.status != 204:
        success["content"] = {"application/json": {"schema": {"type": "object"}}}
    problem = {"$ref": "#/components/responses/Problem"}
    responses = {str(route.status): success} if route.status < 400 else {}
    if route.status in {201, 202, 204}:  # a dry run or a replay
        responses["200"] = {
            "description": "A dry run",
            "content": {"application/json": {"schema": {"$ref": _REF.format(name="DryRunAnswer")}}},
        }
    if route.path == "/readyz":
        responses["503"] = success
    if route.op == "witness_checkpoint":
        responses |= _witness_responses()
    for status in sorted({row.status for row in ERRORS.values()}) if not route.public else ():
        responses.setdefault(str(status), problem)
    return responses


def _witness_responses() -> dict[str, Any]:
    """C2SP's own answers are text; everything else that can go wrong is a problem."""
    text: dict[str, Any] = {"text/plain": {}}
    problem = {"application/problem+json": {"schema": {"$ref": _REF.format(name="ProblemAnswer")}}}
    sized: dict[str, Any] = {"text/x.tlog.size": {}}
    refusal = "A refusal as C2SP tlog-witness says it, or a problem"
    return {
        str(status): {"description": refusal, "content": (sized if status == 409 else text) | problem}
        for status in (400, 403, 404, 409, 422, 429, 503)
    }


def _operation(route: Route) -> dict[str, Any]:
    name = re.sub(r"[^a-z]+", "_", route.path.removeprefix("/v1").lower()).strip("_")
    operation: dict[str, Any] = {
        "operationId": f"{route.method.lower()}_{name}",
        "summary": route.summary,
        "responses": _responses(route),
    }
    if parameters := _parameters(route):
        operation["parameters"] = parameters
    if route.public or route.anonymous:
        operation["security"] = []
    if route.text:
        bounded = {"type": "string", "maxLength": route.text}
        operation["requestBody"] = {"required": True, "content": {"text/plain": {"schema": bounded}}}
    if route.body is not None:
        schema: dict[str, Any] = {"$ref": _REF.format(name=route.body.__name__)}
        if route.item is not None:
            item = {"$ref": _REF.format(name=route.item.__name__)}
            schema = {
                "type": "object",
                "properties": {"items": {"type": "array", "minItems": 1, "maxItems": 500, "items": item}},
                "required": ["items"],
                "additionalProperties": False,
            }
        operation["requestBody"] = {
            "required": not route.body_optional,
            "content": {"application/json": {"schema": schema}},
        }
    return operation


def _types() -> list[type[msgspec.Struct]]:
    found: dict[str, type[msgspec.Struct]] = {}
    for route in ROUTES:
        for kind in (route.body, route.item, route.answer):
            if kind is not None and kind is not wire.BatchBody:
                found[kind.__name__] = kind
    for kind in (wire.ProblemAnswer, wire.DryRunAnswer):
        found[kind.__name__] = kind
    return [found[name] for name in sorted(found)]


@functools.cache
def document() -> dict[str, Any]:
    """The API document as it is served at `/openapi.json`."""
    _, components = msgspec.json.schema_components(_types(), ref_template=_REF)
    paths: dict[str, Any] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    codes = sorted(ERRORS)
    components["ProblemAnswer"]["properties"]["code"] = {"type": "string", "enum": codes}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Sovereign KMS",
            "version": VERSION,
            "description": (
                "Keys in your own HSMs, every use decided by your policy, every use recorded. "
                "Callers are identified by a client certificate (SPIFFE X.509-SVID) or a bearer token (OIDC or API token). "
                "Every answer that made a record carries `Audit-Receipt`."
            ),
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "security": [{"mtls": []}, {"bearer": []}],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "mtls": {"type": "mutualTLS", "description": "An X.509-SVID of a configured trust domain."},
                "bearer": {"type": "http", "scheme": "bearer"},
            },
            "responses": {
                "Problem": {
                    "description": "RFC 9457 problem; `code` is the contract",
                    "content": {"application/problem+json": {"schema": {"$ref": _REF.format(name="ProblemAnswer")}}},
                }
            },
        },
    }


def main() -> None:
    """Write the document as YAML to standard output."""
    sys.stdout.write("# Written by `make openapi` from service/protocols/native.py; do not edit.\n")
    yaml.safe_dump(document(), sys.stdout, sort_keys=False, width=110, allow_unicode=True)


if __name__ == "__main__":
    main()
