"""Records: what may stand in the log, and its exact bytes.

One Struct per kind, every string bounded, unknown fields refused: an allow-list, so that no secret can slip in by a
new field. A field without a value is left out. The bytes of a record are RFC 8785 in a profile (ASCII keys, no floats,
|integer| < 2^53, no lone surrogates) in which every canonical JSON encoder agrees.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import operator
import re
import struct
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeVar

import msgspec
from msgspec import Meta, inspect

T = TypeVar("T")

VERSION: Final = 1
MAX_RECORD: Final = 32_768  # bytes of one encoded record
MAX_INT: Final = 2**53 - 1  # RFC 8785: beyond it, readers of JSON disagree
MAX_DEPTH: Final = 4

OPERATIONS: Final[frozenset[str]] = frozenset(
    """
    encrypt decrypt rewrap data_key unwrap_data_key sign verify mac verify_mac random create_key get_key list_keys
    update_key rotate_key enable_key disable_key compromise_key schedule_deletion cancel_deletion complete_deletion
    import_parameters import_key destroy_key set_key_policy
    list_versions revoke_version get_public_key get_impact put_alias delete_alias list_aliases list_tenants
    list_regions list_hsms get_policy reload_policy search_records audit_status
    audit_checkpoint audit_consistency audit_proof audit_tile tenant_bundle export_records create_token list_tokens
    revoke_token get_decision whoami get_operation start stop hsm_lost hsm_back watermark bundle_active
    tenant_audit_key seal unseal row_damaged health metrics openapi drain_hsm undrain_hsm start_drill list_drills
    rotate_root rewrap_root retire_root get_drill drill_report abort_drill confirm_drill drill_key drill_step ceremony
    confirm_clock simulate_policy skip_record archive_records witness_checkpoint freeze list_freezes get_freeze
    freeze_drill lift_drill lift_freeze list_approvals get_approval sign_approval cancel_approval
    list_transfers list_transfer_agreements get_compliance get_sovereignty
    create_grant list_grants revoke_grant create_exception list_exceptions get_exception revoke_exception
    check_key_graph plan_policy apply_policy rollback_policy revoke_approval
    """.split()  # noqa: SIM905  (sixty quoted words would not read better)
)
DATA_PLANE: Final[frozenset[str]] = frozenset(
    {
        *("encrypt", "decrypt", "rewrap", "data_key", "unwrap_data_key"),
        *("sign", "verify", "mac", "verify_mac", "random"),
    }
)
OUTCOMES: Final[frozenset[str]] = frozenset({"ok", "denied", "failed", "error"})
AUTHENTICATIONS: Final[frozenset[str]] = frozenset(
    {"mtls", "oidc", "k8s", "token", "sigv4", "vault", "internal", "none"}
)

_CONTEXT_NAME: Final = re.compile(r"\A[A-Za-z0-9_.:-]{1,64}\Z")
_HASHED_NAME: Final = re.compile(r"\An[0-9]+:[0-9a-f]{32}\Z")
_ACTOR: Final = re.compile(r"\A[\x20-\x7e]{1,512}\Z")


class BadRecord(ValueError):
    """Not a record of ours. `code` is E_PARSE (no JSON), E_CANON (another spelling) or E_SCHEMA (other fields)."""

    def __init__(self, code: str, why: str) -> None:
        super().__init__(why)
        self.code = code


class UnknownVersion(Exception):
    """A record of a later format: canonical, but this program does not know its fields."""

    def __init__(self, version: int, kind: str, tenant: str | None) -> None:
        super().__init__(f"record version {version}, kind {kind}")
        self.version, self.kind, self.tenant = version, kind, tenant


# ---- types of fields -----------------------------------------------------------------------------------------------

if TYPE_CHECKING:  # a caller passes plain strings; the closed lists are enforced on the bytes
    Operation = str
    Out = str
    Authn = str
else:
    Operation = Literal[tuple(sorted(OPERATIONS))]
    Out = Literal[tuple(sorted(OUTCOMES))]
    Authn = Literal[tuple(sorted(AUTHENTICATIONS))]

UInt = Annotated[int, Meta(ge=0, le=MAX_INT)]
Uuid = Annotated[str, Meta(pattern=r"\A[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\Z")]
Hex32 = Annotated[str, Meta(pattern=r"\A[0-9a-f]{32}\Z")]
Hex64 = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Hex = Annotated[str, Meta(pattern=r"\A(?:[0-9a-f]{2}){1,2048}\Z")]
Code = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9._:-]{1,64}\Z")]  # one word: a code, algorithm, version, name
RuleId = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9._:/@-]{1,128}\Z")]
Place = Annotated[str, Meta(pattern=r"\A[a-z0-9][a-z0-9._-]{0,62}\Z")]
Tenant = Annotated[str, Meta(pattern=r"\A[a-z0-9][a-z0-9._-]{0,63}\Z")]
Actor = Annotated[str, Meta(pattern=r"\A[\x20-\x7e]{1,512}\Z")]
Purpose = Annotated[str, Meta(pattern=r"\A[a-z0-9][a-z0-9._-]{0,63}\Z")]
Address = Annotated[str, Meta(pattern=r"\A[0-9a-f.:]{2,45}\Z")]
ClientId = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9._:-]{1,128}\Z")]
ContextName = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9_.:-]{1,64}\Z")]
ContextValue = Annotated[str, Meta(pattern=r"\Ah[0-9]{1,9}:[0-9a-f]{32}\Z")]
Context = Annotated[dict[ContextName, ContextValue], Meta(max_length=128)]
Rules = Annotated[tuple[RuleId, ...], Meta(max_length=8)]
Ids = Annotated[tuple[Code, ...], Meta(max_length=16)]
Places = Annotated[tuple[Place, ...], Meta(max_length=64)]
Root = tuple[UInt, Hex64]
LogName = Annotated[str, Meta(pattern=r"\A[a-z0-9][a-z0-9._/-]{0,127}\Z")]


def _version() -> int:
    return VERSION


class Base(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    omit_defaults=True,
    tag_field="kind",
):
    """What every record has: `id` is random and is the decision's id, `ts` when the request arrived (us)."""

    # a factory, because `omit_defaults` would leave out a plain default
    v: Annotated[int, Meta(ge=VERSION, le=VERSION)] = msgspec.field(default_factory=_version)
    id: Uuid
    ts: UInt
    node: Place


class Asked(Base, frozen=True, kw_only=True):
    """A record about something that was asked: who, what, where, why. Each kind says which fields it must have."""

    # who
    tenant: Tenant | None = None
    actor: Actor | None = None
    authn: Authn | None = None
    src: Address | None = None
    req: Uuid | None = None  # our request id
    creq: ClientId | None = None  # the client's
    trace: Hex32 | None = None
    x: Hex | None = None  # {actor, src, creq} under the tenant's audit key, which then are absent
    # what
    op: Operation | None = None
    key: Uuid | None = None
    kver: UInt | None = None
    kv: UInt | None = None
    alg: Code | None = None
    in_len: UInt | None = None
    out_len: UInt | None = None
    ctx: Context | None = None
    batch: Uuid | None = None
    bi: UInt | None = None
    dry: bool | None = None
    reason: Code | None = None
    rh: Hex64 | None = None
    # where
    region: Place | None = None
    creg: Place | None = None
    hsm: Code | None = None
    tier: UInt | None = None
    # why
    out: Out | None = None
    why: Code | None = None
    rule: Rules | None = None
    pol: Hex32 | None = None
    facts: Hex32 | None = None  # digest of all facts of the decision but the actor and the time (policy.written)
    dest: Places | None = None  # declared destinations, beside the caller's own places
    hops: Ids | None = None  # the forwarders it came through, the first one first
    via: Places | None = None  # where they can be, beside this node
    orig: Places | None = None  # where the caller of the first one can be, as that one proved
    purpose: Purpose | None = None  # as the request named it
    grant: Code | None = None
    exc: Code | None = None
    frz: UInt | None = None
    appr: Ids | None = None
    ev: Hex64 | None = None
    # other
    us: UInt | None = None
    intent: Uuid | None = None  # the record this one refers to


class Open(Base, frozen=True, kw_only=True, tag="open"):
    """A writer took over: `cert` is the HSM's signature over the writer's key `pub`."""

    epoch: UInt
    pub: Hex64
    cert: Hex
    cfg: Hex64
    dist: Hex64
    ver: Code
    clk: Code


class Close(Base, frozen=True, kw_only=True, tag="close"):
    """The writer stopped in order; `count` is the number of records of its epoch, `open` and this one included."""

    epoch: UInt
    count: UInt


class Mark(Base, frozen=True, kw_only=True, tag="mark"):
    """Nothing happened, and the writer was alive."""

    root: Root | None = None


class Op(Asked, frozen=True, kw_only=True, tag="op"):
    """A data-plane operation, a read, or a dry run: allowed, denied or failed."""

    op: Operation
    out: Out


class Intent(Asked, frozen=True, kw_only=True, tag="intent"):
    """What the control plane is about to do; durable before it acts."""

    op: Operation


class Outcome(Asked, frozen=True, kw_only=True, tag="outcome"):
    """What became of an intent; commits together with the change it reports."""

    op: Operation
    out: Out
    intent: Uuid


class Auth(Asked, frozen=True, kw_only=True, tag="auth"):
    """A request refused before its operation was known: unauthenticated, malformed, no route."""

    why: Code


class Admin(Asked, frozen=True, kw_only=True, tag="admin"):
    """Something without a caller: start, HSM lost or back, bundle active, watermark."""

    op: Operation


class Suppressed(Base, frozen=True, kw_only=True, tag="suppressed"):
    """`count` refusals of one source between two times (us) that got no record of their own."""

    src: Address | None = None
    why: Code
    count: UInt
    from_: UInt = msgspec.field(name="from")
    to: UInt


class Clock(Base, frozen=True, kw_only=True, tag="clock"):
    """The clock stepped: it should have read `was` and read `now` (us)."""

    was: UInt
    now: UInt


class Withheld(Asked, frozen=True, kw_only=True, tag="withheld"):
    """The record named by `intent` is durable, but its result was not released."""

    intent: Uuid


class Prune(Asked, frozen=True, kw_only=True, tag="prune"):
    """Records `from` to `to` - 1 of `log` are archived, and those before `at` leave the database after this record.

    `hash` is the SHA-256 of the signed manifest, `policy` the rule that let them go.
    """

    op: Operation
    out: Out
    log: LogName
    from_: UInt = msgspec.field(name="from")
    to: UInt
    at: UInt
    hash: Hex64
    policy: Code


class Heads(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="kind",
    tag="heads",
):
    """What the root log says: how far each listed chain reached, its RFC 6962 root, and the root of the tenants' map.

    Stands in the root log only, never in a writer's chain, so it is no `Record`.
    """

    epoch: UInt  # of the notary's lease
    full: bool  # lists every chain, not only those that grew
    shards: Annotated[tuple[tuple[LogName, Annotated[int, Meta(ge=1, le=MAX_INT)], Hex64], ...], Meta(max_length=256)]
    tenants: Hex64
    v: Annotated[int, Meta(ge=VERSION, le=VERSION)]


class Recovery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is given up and what goes on, as two officers approve it: the SHA-256 of its canonical bytes is signed."""

    anchor: Annotated[str, Meta(min_length=1, max_length=1_024)]  # where the checkpoint below was held
    anchored: Annotated[str, Meta(min_length=1, max_length=8_192)]  # the newest signed note that the database lacks
    asked: UInt  # when (us); approvals count for one hour
    installation: Uuid
    lost: tuple[UInt, UInt]  # entries of the predecessor's root log that nobody can vouch for: from, to (exclusive)
    origin: LogName  # of the new generation
    predecessor: LogName
    stands: Root  # what the database holds of the predecessor: kept, and vouched for up to the lost range


class Recover(Heads, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="recover"):
    """The first entry of a later generation's root log; it commits no chain yet."""

    appr: Annotated[tuple[tuple[Code, Hex], ...], Meta(min_length=2, max_length=16)]  # (officer, signature)
    recovers: Recovery


Record = Open | Close | Mark | Op | Intent | Outcome | Auth | Admin | Suppressed | Clock | Withheld | Prune

KINDS: Final[frozenset[str]] = frozenset(
    {"open", "close", "mark", "op", "intent", "outcome", "auth", "admin", "suppressed", "clock", "withheld", "prune"}
)

# ---- the plain spelling of an operation --------------------------------------------------------------------------------

_SMALL: Final = "(?:0|[1-8][0-9]{0,15}|9[0-9]{0,14})"  # most integers of `UInt`, and no others
_NAME_IN_CONTEXT: Final = re.compile(rb'"([^"]*)":')


def _plain_of(kind: inspect.Type) -> str:
    """A regular expression for values of a field's type, spelled without escapes; TypeError for a type it cannot say."""
    match kind:
        case inspect.UnionType(types=types):
            (only,) = [t for t in types if not isinstance(t, inspect.NoneType)]
            return _plain_of(only)
        case inspect.LiteralType(values=values):
            usual = sorted(values, key=lambda value: (value not in DATA_PLANE, value))
            return '"(?:' + "|".join(re.escape(str(value)) for value in usual) + ')"'
        case inspect.StrType(pattern=str(pattern)):
            # Only `Actor` allows a quote and a backslash: with one of them it is not plain.
            return '"' + pattern.removeprefix(r"\A").removesuffix(r"\Z").replace(r"\x20-\x7e", r" !#-\[\]-~") + '"'
        case inspect.IntType(ge=0, le=le) if le == MAX_INT:
            return _SMALL
        case inspect.IntType(ge=ge, le=le) if ge == le:
            return str(ge)
        case inspect.BoolType():
            return "(?:true|false)"
        case inspect.VarTupleType(item_type=item, max_length=int(most)):
            return rf"\[{_plain_of(item)}(?:,{_plain_of(item)}){{0,{most - 1}}}\]"
        case inspect.DictType(key_type=key, value_type=value, max_length=int(most)):
            pair = f"{_plain_of(key)}:{_plain_of(value)}"
            return rf"\{{{pair}(?:,{pair}){{0,{most - 1}}}\}}"
    raise TypeError(f"no plain spelling of {kind}")


def _plain_operation() -> bytes:
    """Made from `Op` itself: its fields in order, each at most once. Groups: `ctx`, `tenant`."""
    found = inspect.type_info(Op)
    assert isinstance(found, inspect.StructType)
    fields = {f.encode_name: (f.required, _plain_of(f.type)) for f in found.fields}
    fields["kind"], version = (True, f'"{found.tag}"'), fields.pop("v")[1]
    fields["tenant"] = fields["tenant"][0], '"(' + fields["tenant"][1][1:-1] + ')"'
    fields["ctx"] = fields["ctx"][0], f"({fields['ctx'][1]})"
    made = {True: "", False: ""}  # what comes before the version, which every record has, and after it
    for name, (required, value) in sorted(fields.items()):
        text = f'{name}":{value},"' if name < "v" else f',"{name}":{value}'
        made[name < "v"] += text if required else f"(?:{text}|)"  # a branch is left at its first letter
    return (r'\{"' + made[True] + f'v":{version}' + made[False] + r"\}").encode()


PLAIN_OPERATION: Final = _plain_operation()
"""What nearly every data-plane record matches. Such bytes are good for `decode`, if their `ctx` is `in_order`.

Held against `decode` by tests; what does not match is not bad, it needs `decode`, which costs five times as much.
"""


_PLAIN_OPERATION: Final = re.compile(PLAIN_OPERATION)


def in_order(ctx: bytes) -> bool:
    """Whether the names in a plain `ctx` stand in order and once each."""
    if b"," not in ctx:
        return True
    names = _NAME_IN_CONTEXT.findall(ctx)
    return all(map(operator.lt, names, names[1:]))


_ENCODE: Final = msgspec.json.Encoder(order="sorted").encode
_DECODE: Final = msgspec.json.Decoder(Record).decode
_DECODE_HEADS: Final[Callable[[bytes], Heads]] = msgspec.json.Decoder(Heads | Recover).decode
_DECODE_RECOVERY: Final = msgspec.json.Decoder(Recovery).decode


def tenant_of(record: Record) -> str | None:
    """The tenant whose sequence the record belongs to, if any."""
    return record.tenant if isinstance(record, Asked) else None


def encode(record: Record) -> bytes:
    """The canonical bytes. BadRecord if a field is out of bounds: nothing is stored that a verifier would refuse."""
    try:
        body = _ENCODE(record)
        if _PLAIN_OPERATION.fullmatch(body) is None:
            _DECODE(body)
    except UnicodeEncodeError:
        raise BadRecord("E_SCHEMA", "a string holds a lone surrogate") from None
    except (msgspec.MsgspecError, RecursionError, TypeError) as error:
        raise BadRecord("E_SCHEMA", str(error)) from None
    if len(body) > MAX_RECORD:
        raise BadRecord("E_SCHEMA", f"record of {len(body)} bytes; at most {MAX_RECORD}")
    return body


def decode(body: bytes) -> Record:
    """The record that these bytes spell, if it is the one canonical spelling; else BadRecord or UnknownVersion.

    Parsing alone would take doubled keys, spaces, `1.0`, `-0`, `\\u0041` and `null`; encoding again finds them all.
    """
    record: Record = _strictly(_DECODE, body)
    return record


def encode_heads(heads: Heads) -> bytes:
    """The canonical bytes of a root log's entry; BadRecord if a field is out of bounds."""
    body = _ENCODE(heads)
    decode_heads(body)
    return body


def decode_heads(body: bytes) -> Heads:
    """As `decode`, for an entry of the root log."""
    return _strictly(_DECODE_HEADS, body)


def encode_recovery(recovery: Recovery) -> bytes:
    """The canonical bytes of a recovery, whose SHA-256 is approved; BadRecord if a field is out of bounds."""
    body = _ENCODE(recovery)
    decode_recovery(body)
    return body


def decode_recovery(body: bytes) -> Recovery:
    """As `decode`, for a recovery that stands alone."""
    return _strictly(_DECODE_RECOVERY, body)


def _strictly(parse: Callable[[bytes], T], body: bytes) -> T:
    try:
        record = parse(body)
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        _explain(body, str(error))
        raise BadRecord("E_SCHEMA", str(error)) from None
    if _ENCODE(record) != body:
        raise BadRecord("E_CANON", "the bytes are not the canonical encoding")
    return record


def _explain(body: bytes, why: str) -> None:
    """Say why the strict decoder refused: no JSON, another spelling or a later version; return if it is the schema."""
    try:
        parsed = json.loads(body, parse_constant=_no_constant, parse_float=_no_float, parse_int=_small_int)
        canonical = encode_plain(parsed) == body
    except BadRecord:
        raise
    except (ValueError, RecursionError):
        raise BadRecord("E_PARSE", why if len(why) < 200 else why[:200]) from None
    if not canonical:
        raise BadRecord("E_CANON", "the bytes are not the canonical encoding")
    if isinstance(parsed, dict):
        version, tenant = parsed.get("v"), parsed.get("tenant")
        if type(version) is int and version > VERSION and (tenant is None or isinstance(tenant, str)):
            raise UnknownVersion(version, str(parsed.get("kind")), tenant)


def _no_constant(name: str) -> Any:
    raise BadRecord("E_PARSE", f"{name} is not JSON")


def _no_float(_: str) -> Any:
    raise BadRecord("E_CANON", "a number with fraction or exponent")


def _small_int(digits: str) -> int:
    if len(digits) > 17:  # before int(): its cost is quadratic
        raise BadRecord("E_CANON", "an integer beyond 2^53")
    return int(digits)


def encode_plain(value: object) -> bytes:
    """Canonical bytes of a plain value; BadRecord (E_CANON) outside the profile.

    Uses no code in common with `encode`, so that the two can be held against each other.
    """
    _in_profile(value, MAX_DEPTH)
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise BadRecord("E_CANON", "a string holds a lone surrogate") from None


def _in_profile(value: object, depth: int) -> None:
    if isinstance(value, dict) and depth:
        if not all(type(name) is str and name.isascii() for name in value):
            raise BadRecord("E_CANON", "keys must be ASCII strings")
        for item in value.values():
            _in_profile(item, depth - 1)
    elif isinstance(value, list) and depth:
        for item in value:
            _in_profile(item, depth - 1)
    elif isinstance(value, dict | list):
        raise BadRecord("E_CANON", f"nested deeper than {MAX_DEPTH}")
    elif not (type(value) in (str, bool) or (type(value) is int and abs(value) <= MAX_INT)):
        raise BadRecord("E_CANON", f"{type(value).__name__} has no place in a record")


def as_dict(record: Record) -> dict[str, Any]:
    """The record as plain values, `kind` included, for an answer or a table."""
    plain: dict[str, Any] = json.loads(_ENCODE(record))
    return plain


def actor_field(identity: str) -> str:
    """An identity as `actor`: itself if printable ASCII of at most 512 characters, else `sha256:` and its hash."""
    if _ACTOR.match(identity):
        return identity
    return "sha256:" + hashlib.sha256(identity.encode("utf-8", "surrogatepass")).hexdigest()


def hash_context(secret: bytes, generation: int, context: Mapping[str, str]) -> dict[str, str]:
    """A context as `ctx`: values (and unusual names) as HMAC-SHA-256 under the tenant's audit key.

    Equal values of one tenant stay equal, so equality can be searched for; two tenants' values never look equal. A
    name that looks like one of our hashed names is hashed too, so that no client can forge one.
    """
    hashed = {}
    for name, value in context.items():
        raw = name.encode()
        shown = name
        if not _CONTEXT_NAME.match(name) or _HASHED_NAME.match(name):
            shown = f"n{generation}:{hmac.digest(secret, b'n' + raw, 'sha256').hex()[:32]}"
        bound = b"v" + struct.pack(">I", len(raw)) + raw + value.encode()
        hashed[shown] = f"h{generation}:{hmac.digest(secret, bound, 'sha256').hex()[:32]}"
    return hashed
