"""The native API's JSON: one bounded msgspec Struct per body, unknown fields refused; keys as they are shown.

Times are RFC 3339 UTC with milliseconds, durations ISO 8601 (days, hours, minutes, seconds), binary is padded base64.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from keystore import Admin, Key, KeyVersion, MemberStatus
from policy import Freeze, Gap
from policy.sovereignty import CRITERIA, YEAR_US
from policy.transfers import Agreement, instant
from service.compliance import Report
from service.containment import Contained
from service.exceptions import Standing as Excepted
from service.grants import Standing as Granted
from service.outcome import RequestInvalid
from service.quorum import Standing
from service.rows import Operation
from service.sovereignty import QUERIES, Figures
from service.transfers import Transfers

MAX_PLAINTEXT: Final = 65_536
BASE64_LIMIT: Final = 4 * ((MAX_PLAINTEXT + 2) // 3)
CIPHERTEXT_LIMIT: Final = 90_000  # text of the largest envelope: 8 + 4/3 (65,536 + 121)
PREFIX: Final = "skms:v1:"

Base64 = Annotated[str, Meta(max_length=BASE64_LIMIT, extra_json_schema={"contentEncoding": "base64"})]
CiphertextText = Annotated[str, Meta(max_length=CIPHERTEXT_LIMIT, pattern="^skms:v1:[A-Za-z0-9_-]+$")]
KeyName = Annotated[
    str,
    Meta(
        max_length=134,
        pattern="^([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}|alias/[a-z0-9][a-z0-9._-]{0,127})$",
    ),
]
AliasName = Annotated[str, Meta(pattern="^[a-z0-9][a-z0-9._-]{0,127}$")]
PlaceName = Annotated[str, Meta(min_length=1, max_length=64, pattern="^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Places = Annotated[list[PlaceName], Meta(min_length=1, max_length=64)]
Purpose = Annotated[str, Meta(pattern="^[a-z0-9][a-z0-9._-]{0,63}$")]
Word = Annotated[str, Meta(pattern="^[a-z0-9][a-z0-9-]{0,63}$")]
VersionNumber = Annotated[int, Meta(ge=1, le=16_777_215)]
Duration = Annotated[
    str, Meta(max_length=32, pattern="^P([0-9]{1,5}D)?(T([0-9]{1,5}H)?([0-9]{1,5}M)?([0-9]{1,6}S)?)?$")
]
Fence = VersionNumber | Annotated[str, Meta(pattern="^latest(-[0-9]{1,5})?$")]
Context = dict[str, str]
Suite = Literal["0x0001", "0x0002", "0x0005"]
Spec = Literal["AES_256", "HMAC_256", "HMAC_512", "RSA_3072", "RSA_4096", "EC_P256", "EC_P384", "ED25519"]
SignAlgorithm = Literal[
    "RSA_PSS_SHA_256",
    "RSA_PSS_SHA_384",
    "RSA_PSS_SHA_512",
    "RSA_PKCS1_SHA_256",
    "RSA_PKCS1_SHA_384",
    "RSA_PKCS1_SHA_512",
    "ECDSA_SHA_256",
    "ECDSA_SHA_384",
    "ECDSA_SHA_512",
    "ED25519",
]
MacAlgorithm = Literal["HMAC_SHA_256", "HMAC_SHA_512"]


class Reason(Struct, forbid_unknown_fields=True):
    """Why the caller needs this; only `code` is recorded."""

    code: Word
    reference: Annotated[str, Meta(max_length=256)] | None = None


class Use(Struct, forbid_unknown_fields=True, kw_only=True):
    """What every data-plane body also takes."""

    context: Context = {}
    purpose: Purpose | None = None
    reason: Reason | None = None
    destination: list[PlaceName] = []


class EncryptBody(Use, kw_only=True):
    plaintext: Base64
    version: VersionNumber | None = None


class DecryptBody(Use, kw_only=True):
    ciphertext: CiphertextText
    expect_key: KeyName | None = None


class RewrapBody(Use, kw_only=True):
    ciphertext: CiphertextText
    to_key: KeyName | None = None
    to_context: Context | None = None


class DataKeyBody(Use, kw_only=True):
    length: Annotated[int, Meta(ge=16, le=64)] = msgspec.field(name="bytes", default=32)
    answer: Literal["wrapped", "both"] = msgspec.field(name="return", default="wrapped")


class UnwrapBody(Use, kw_only=True):
    wrapped_key: CiphertextText
    expect_key: KeyName | None = None


class SignBody(Use, kw_only=True):
    algorithm: SignAlgorithm
    message: Base64 | None = None
    digest: Annotated[str, Meta(max_length=88)] | None = None
    format: Literal["der", "raw"] = "der"


class VerifyBody(SignBody, kw_only=True):
    signature: Annotated[str, Meta(max_length=1_024)]
    version: VersionNumber | None = None


class MacBody(Use, kw_only=True):
    message: Base64
    algorithm: MacAlgorithm


class VerifyMacBody(MacBody, kw_only=True):
    mac: Annotated[str, Meta(max_length=128)]
    version: VersionNumber | None = None


class RandomBody(Struct, forbid_unknown_fields=True):
    length: Annotated[int, Meta(ge=1, le=1_024)] = msgspec.field(name="bytes", default=32)


Reference = Annotated[str, Meta(max_length=128, pattern="^[A-Za-z0-9._:-]{1,128}$")]


class EncryptItem(EncryptBody, kw_only=True):
    key: KeyName
    reference: Reference | None = None


class DecryptItem(DecryptBody, kw_only=True):
    reference: Reference | None = None


class RewrapItem(RewrapBody, kw_only=True):
    reference: Reference | None = None


class DataKeyItem(DataKeyBody, kw_only=True):
    key: KeyName
    reference: Reference | None = None


class UnwrapItem(UnwrapBody, kw_only=True):
    reference: Reference | None = None


class SignItem(SignBody, kw_only=True):
    key: KeyName
    reference: Reference | None = None


class VerifyItem(VerifyBody, kw_only=True):
    key: KeyName
    reference: Reference | None = None


class MacItem(MacBody, kw_only=True):
    key: KeyName
    reference: Reference | None = None


# Items stay raw here and are converted one by one: a bad item fails alone.
class BatchBody(Struct, forbid_unknown_fields=True):
    items: Annotated[list[Any], Meta(min_length=1, max_length=500)]


class RotationBody(Struct, forbid_unknown_fields=True):
    max_age: Duration | None = None
    max_uses: Annotated[int, Meta(ge=1, le=3_865_470_566)] | None = None


Tags = Annotated[
    dict[Annotated[str, Meta(pattern="^[A-Za-z0-9_.:-]{1,64}$")], Annotated[str, Meta(max_length=256)]],
    Meta(max_length=50),
]


class CreateKeyBody(Struct, forbid_unknown_fields=True, kw_only=True):
    spec: Spec
    usage: Literal["encrypt", "sign", "mac"] | None = None
    tier: Annotated[int, Meta(ge=1, le=3)]
    home: PlaceName
    residency: Places | None = None
    execution: Places | None = None
    reach: Places | None = None
    egress: Places | None = None
    failover: list[PlaceName] = []
    purposes: Annotated[list[Purpose], Meta(min_length=1, max_length=32)] = msgspec.field(
        default_factory=lambda: ["default"]
    )
    alias: AliasName | None = None
    origin: Literal["hsm", "external"] = "hsm"
    suite: Suite | None = None
    rotation: RotationBody | None = None
    description: Annotated[str, Meta(max_length=1_024)] = ""
    tags: Tags = {}


class KeyPolicyBody(Struct, forbid_unknown_fields=True, kw_only=True):
    """New values of what bounds a key; what is left out stays. `residency` never widens."""

    tier: Annotated[int, Meta(ge=1, le=3)] | None = None
    residency: Places | None = None
    execution: Places | None = None
    reach: Places | None = None
    egress: Places | None = None
    failover: list[PlaceName] | None = None
    purposes: Annotated[list[Purpose], Meta(min_length=1, max_length=32)] | None = None
    min_decrypt_version: VersionNumber | None = None
    min_encrypt_version: VersionNumber | None = None
    reason: Reason | None = None


class PatchKeyBody(Struct, forbid_unknown_fields=True, kw_only=True):
    """New values; what is left out stays. A fence only rises here: `POST /v1/keys/{key}/policy` lowers it, by a quorum."""

    description: Annotated[str, Meta(max_length=1_024)] | UnsetType = UNSET
    tags: Tags | UnsetType = UNSET
    rotation: RotationBody | UnsetType = UNSET
    min_decrypt_version: Fence | UnsetType = UNSET
    min_encrypt_version: Fence | UnsetType = UNSET


BundleName = Annotated[str, Meta(pattern=r"\A[0-9a-f]{12,64}\Z")]


class SimulateBody(Struct, kw_only=True):
    """A draft bundle, whole: path -> content; and the recorded period that it is to decide again."""

    files: Annotated[dict[str, str], Meta(min_length=1, max_length=4_096)]
    from_: str = msgspec.field(name="from")
    to: str


class PlanBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """A draft bundle, whole: path -> content; and, if both are named, the recorded period that it is to decide again."""

    files: Annotated[dict[str, str], Meta(min_length=1, max_length=4_096)]
    from_: str | None = msgspec.field(name="from", default=None)
    to: str | None = None


class ApplyBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """A draft bundle, whole; `replaces` is the digest (or its first 12 to 64 hex) of the bundle that it was planned for."""

    files: Annotated[dict[str, str], Meta(min_length=1, max_length=4_096)]
    replaces: BundleName | None = None
    reason: Reason | None = None


class RollbackBody(Struct, forbid_unknown_fields=True):
    """`to`: a bundle that was in force, by the first 12 to 64 hex of its digest; the one before if not given."""

    to: BundleName | None = None
    replaces: BundleName | None = None
    reason: Reason | None = None


class WhyBody(Struct, forbid_unknown_fields=True):
    reason: Reason | None = None


class GrantBody(Struct, forbid_unknown_fields=True):
    """Who may do what with the key, until when. The encryption context must be exactly, or hold, what is given here."""

    grantee: Annotated[str, Meta(min_length=1, max_length=512)]
    operations: Annotated[list[Annotated[str, Meta(min_length=1, max_length=64)]], Meta(min_length=1, max_length=16)]
    expires_at: Annotated[str, Meta(max_length=40)]
    purpose: Purpose | None = None
    context_equals: Context | None = None
    context_subset: Context | None = None
    max_uses: Annotated[int, Meta(ge=1, le=1_000_000_000)] | None = None
    reason: Reason | None = None


class ExceptionBody(Struct, forbid_unknown_fields=True):
    """What is waived for which keys, where and why: `reach` lets callers be there, `egress` plaintexts. Left out
    `not_before`: from now on."""

    keys: Annotated[list[Annotated[str, Meta(min_length=1, max_length=134)]], Meta(min_length=1, max_length=100)]
    kind: Annotated[str, Meta(max_length=32)]
    places: Annotated[list[Annotated[str, Meta(min_length=1, max_length=64)]], Meta(min_length=1, max_length=64)]
    purpose: Purpose
    legal_basis: Annotated[str, Meta(min_length=1, max_length=64)]
    legal_ref: Annotated[str, Meta(min_length=1, max_length=512)]
    not_after: Annotated[str, Meta(max_length=40)]
    not_before: Annotated[str, Meta(max_length=40)] | None = None
    reason: Reason | None = None


class ScopeBody(Struct, forbid_unknown_fields=True):
    """What a freeze stops: a kind, and which one of it. A region may be a jurisdiction or a group of the charter."""

    kind: Literal["everything", "key", "tag", "tenant", "region", "tier", "caller", "hsm"]
    value: Annotated[str, Meta(max_length=512)] = ""


class FreezeBody(Struct, forbid_unknown_fields=True):
    """`mode`: stop everything, only what gives data or material out, or every use while operators go on."""

    scope: ScopeBody
    reason: Reason
    mode: Literal["halt", "no-release", "admin-only"] = "halt"
    began: Moment | None = None  # the incident, for the time it took to detect


class FreezeDrillBody(Struct, forbid_unknown_fields=True):
    """A key that carries the tag `canary` with the value `true`."""

    key: Annotated[str, Meta(min_length=1, max_length=134)]
    reason: Reason | None = None


class SignatureBody(Struct, forbid_unknown_fields=True):
    """A signature (hex) over `skms-approval/v1`, the request's kind and its digest, each followed by a newline.

    By Ed25519 or by ECDSA on P-256 with SHA-256, as r and s of 32 bytes each with the smaller s. Of an approver with
    `webauthn` it is an assertion whose challenge is the digest itself (of a revocation: SHA-256 of those lines), as compact
    JSON with the sorted names authenticatorData, clientDataJSON, rawId and signature, each in base64url without padding.
    """

    approver: Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
    signature: Annotated[str, Meta(pattern=r"^(?:[0-9a-f]{2}){64,4096}$")]


class DeletionBody(Struct, forbid_unknown_fields=True):
    wait: Duration = "P30D"
    reason: Reason | None = None


WrappingName = Literal[
    "RSA_AES_KEY_WRAP_SHA_256",
    "RSA_AES_KEY_WRAP_SHA_1",
    "RSAES_OAEP_SHA_256",
    "RSAES_OAEP_SHA_1",
    "HPKE_MLKEM768_X25519_SHA256_AES_256_GCM",
]
WrappingKeySpec = Literal["RSA_3072", "RSA_4096"]
Moment = Annotated[
    str, Meta(max_length=40, pattern="^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:.]{8,16}(Z|[+-][0-9]{2}:[0-9]{2})$")
]


class ImportParametersBody(Struct, forbid_unknown_fields=True):
    # RSAES_PKCS1_V1_5 is not there: its padding is an oracle
    wrapping: WrappingName
    wrapping_key_spec: WrappingKeySpec | None = None
    reason: Reason | None = None


class ImportBody(Struct, forbid_unknown_fields=True, kw_only=True):
    import_token: Annotated[str, Meta(max_length=128, pattern="^skms_import_[A-Za-z0-9_-]{64}$")]
    wrapped_key: Annotated[str, Meta(max_length=8_192, extra_json_schema={"contentEncoding": "base64"})]
    key_check_value: Annotated[str, Meta(pattern="^[0-9a-f]{16}$")]
    public_key: Annotated[str, Meta(max_length=2_048)] | None = None
    expires_at: Moment | None = None
    reason: Reason | None = None


HsmName = Annotated[str, Meta(pattern="^[a-z0-9][a-z0-9-]{0,17}$")]


class DrillBody(Struct, forbid_unknown_fields=True, kw_only=True):
    kind: Literal["exit"]
    source: HsmName = msgspec.field(name="from")
    to: HsmName
    observe: Duration = "PT30S"
    window: Duration = "PT60S"
    rate: Annotated[int, Meta(ge=1, le=10_000)] = 500
    reason: Reason | None = None


class AliasBody(Struct, forbid_unknown_fields=True):
    key: KeyName


class TokenBody(Struct, forbid_unknown_fields=True):
    scopes: Annotated[list[Annotated[str, Meta(pattern="^[A-Za-z]{1,32}$")]], Meta(min_length=1, max_length=32)]
    expires_in: Duration = "P30D"


_EPOCH: Final = datetime.fromtimestamp(0, UTC)
_DURATION: Final = re.compile(r"P(?:(\d+)D)?(?:T(?:(\d+)H)?(?:(\d+)M)?(?:(\d+)S)?)?")


def seconds(pointer: str, text: str) -> int:
    """Seconds of an ISO 8601 duration of days, hours, minutes and seconds; RequestInvalid names the field."""
    match = _DURATION.fullmatch(text)
    if match is None or text in {"P", "PT"} or text.endswith("T"):
        raise RequestInvalid((pointer, "invalid_duration", "use days, hours, minutes, seconds: P30D, PT12H"))
    days, hours, minutes, secs = (int(g or 0) for g in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + secs


def duration(total: int) -> str:
    """The ISO 8601 form of a number of seconds, in whole days where it is that."""
    if total and total % 86_400 == 0:
        return f"P{total // 86_400}D"
    return f"PT{total}S"


def transfers_json(found: Transfers) -> dict[str, Any]:
    """A report of transfers as it is answered."""
    items = [
        {
            "agreement": kind.agreement or None,
            "from": kind.origin,
            "to": kind.destination,
            "tenant": kind.tenant,
            "purpose": kind.purpose,
            "crossed": count.crossed,
            "refused": dict(sorted(count.refused.items())),
            "first": moment(count.first),
            "last": moment(count.last),
        }
        for kind, count in found.counts.items()
    ]
    return {"items": items, "stored_since": None if found.stored_since is None else moment(found.stored_since)}


def agreement_json(agreement: Agreement, *, now: int, own: str | None) -> dict[str, Any]:
    """A registered agreement as its tenant `own` sees it, or (None) the installation; `now` in seconds."""
    here, there = agreement.crossing
    return {
        "id": agreement.id,
        "from": here,
        "to": there,
        "tenants": sorted(t for t in agreement.tenants if own in {None, t}),
        "legal_basis": agreement.legal_basis,
        "legal_ref": agreement.legal_ref,
        "purposes": sorted(agreement.purposes),
        "parties": list(agreement.parties),
        "not_before": instant(agreement.begins),
        "not_after": instant(agreement.ends),
        "in_force": agreement.begins <= now < agreement.ends,
    }


def moment(us: int) -> str:
    """RFC 3339 UTC with milliseconds of a time in microseconds."""
    return datetime.fromtimestamp(us // 1_000 / 1_000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def microseconds(text: str) -> int:
    """Microseconds of an RFC 3339 time; ValueError for another spelling."""
    at = datetime.fromisoformat(text)
    if at.tzinfo is None or len(text) > 40:
        raise ValueError("a time without zone")
    return (at - _EPOCH) // timedelta(microseconds=1)  # not by `timestamp`: a float has no room for microseconds


def binary(pointer: str, text: str) -> bytes:
    """The bytes of strict padded base64; RequestInvalid names the field, never its content."""
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        raise RequestInvalid((pointer, "invalid_base64", "standard padded base64 is required")) from None
    if base64.b64encode(data).decode() != text:
        raise RequestInvalid((pointer, "invalid_base64", "standard padded base64 is required"))
    return data


def envelope_text(envelope: bytes) -> str:
    """`skms:v1:` and unpadded base64url."""
    return PREFIX + base64.urlsafe_b64encode(envelope).rstrip(b"=").decode()


def key_json(key: Key, *, missing: list[str] | None = None, uses: dict[int, int] | None = None) -> dict[str, Any]:
    """A key as the API shows it."""
    return {
        "id": str(key.id),
        "spec": str(key.spec),
        "usage": str(key.usage),
        "tier": key.tier,
        "home": key.home,
        "residency": sorted(key.residency),
        "execution": sorted(key.execution),
        "reach": sorted(key.reach),
        "egress": sorted(key.egress),
        "failover": sorted(key.failover),
        "purposes": list(key.purposes),
        "state": key.api_state,
        "suite": f"0x{key.suite:04x}" if key.suite else None,
        "origin": key.origin,
        "protection": "hsm",
        "description": key.description,
        "tags": dict(key.tags),
        "rotation": {
            "max_age": None if key.rotation.max_age is None else duration(key.rotation.max_age),
            "max_uses": key.rotation.max_uses,
        },
        "versions": [version_json(v) for v in key.versions],
        "latest_version": key.latest_number or None,
        "min_decrypt_version": key.min_decrypt_version,
        "min_encrypt_version": key.min_encrypt_version,
        "tier_status": {"met": not missing, "missing": missing or []},
        "created_at": moment(key.created_at),
        "updated_at": moment(key.updated_at),
        "delete_at": None if key.delete_at is None else moment(key.delete_at),
    }


def version_json(version: KeyVersion) -> dict[str, Any]:
    """A key version as the API shows it; `uses` never counts too few."""
    return {
        "version": version.number,
        "state": API_VERSION_STATE[str(version.state)],
        "created_at": moment(version.created_at),
        "uses": version.uses,
        "import_path": None if version.imported is None else version.imported.path,
        "expires_at": None
        if version.imported is None or version.imported.expires_at is None
        else moment(version.imported.expires_at),
    }


def freeze_json(freeze: Freeze, lifted_at: int | None) -> dict[str, Any]:
    """A freeze as the API shows it."""
    return {
        "id": freeze.id,
        "scope": {"kind": freeze.scope.kind, "value": freeze.scope.value},
        "tenant": freeze.tenant,
        "reason": freeze.reason,
        "officer": freeze.officer,
        "drill": freeze.drill,
        "mode": freeze.mode,
        "since": moment(freeze.at),
        "began": None if freeze.began is None else moment(freeze.began),
        "lifted_at": None if lifted_at is None else moment(lifted_at),
    }


def grant_json(standing: Granted) -> dict[str, Any]:
    """A grant as the API shows it."""
    grant = standing.grant
    return {
        "id": grant.id,
        "key_id": grant.key,
        "grantee": grant.grantee,
        "operations": list(grant.operations),
        "purpose": grant.purpose,
        "context_equals": grant.context_equals,
        "context_subset": grant.context_subset,
        "max_uses": grant.max_uses,
        "uses": standing.uses if grant.max_uses is not None else None,
        "state": standing.state,
        "granter": grant.granter,
        "created_at": moment(grant.at),
        "expires_at": moment(grant.ends),
        "revoked_at": None if grant.revoked_at is None else moment(grant.revoked_at),
    }


def exception_json(standing: Excepted) -> dict[str, Any]:
    """An exception as the API shows it: `request` and `approvals` are what was signed, and by whom."""
    waiver = standing.waiver
    return {
        "id": waiver.id,
        "tenant": waiver.tenant,
        "keys": list(waiver.keys),
        "kind": waiver.kind,
        "places": list(waiver.places),
        "purpose": waiver.purpose,
        "legal_basis": waiver.legal_basis,
        "legal_ref": waiver.legal_ref,
        "tier": waiver.tier,
        "state": standing.state,
        "not_before": moment(waiver.begins),
        "not_after": moment(waiver.ends),
        "created_at": moment(waiver.at),
        "revoked_at": None if waiver.revoked_at is None else moment(waiver.revoked_at),
        "request": json.loads(waiver.request),
        "approvals": dict(waiver.approvals or {}),
    }


def sovereignty_json(found: Figures) -> dict[str, Any]:
    """The figures, and for each what it is counted from."""
    size, root = found.checkpoint or (None, None)
    spread, contained = found.diversity, found.containment
    return {
        "at": moment(found.at),
        "policy": found.policy,
        "checkpoint": None if size is None else {"size": size, "root": root},
        "critical_systems": {
            "query": QUERIES["critical_systems"],
            "total": found.control.critical,
            "sovereign": found.control.sovereign,
            "share": found.control.share,
            "criteria": [
                {"criterion": name, "meaning": CRITERIA[name], "unmet": count}
                for name, count in found.control.gaps.items()
            ],
            "systems": [
                {"name": s.name, "tenant": s.tenant, "critical": s.critical, "gaps": list(s.gaps)}
                for s in found.systems
            ],
        },
        "exit": {
            "query": QUERIES["exit"],
            "since": moment(max(0, found.at - YEAR_US)),
            "vendors": [
                {
                    "vendor": e.vendor,
                    "succeeded": e.succeeded,
                    "failed": e.failed,
                    "mean_s": e.mean_s,
                    "max_s": e.max_s,
                    "refused": e.refused,
                }
                for e in found.exits
            ],
        },
        "suppliers": {
            "query": QUERIES["suppliers"],
            "keys": spread.keys,
            "approved": spread.approved,
            "diversity": spread.index,
            "suppliers": [
                {"supplier": name, "share": share, "loss": spread.loss[name]} for name, share in spread.share.items()
            ],
        },
        "containment": {
            "query": QUERIES["containment"],
            "since": moment(max(0, found.at - YEAR_US)),
            "detected": dataclasses.asdict(contained.detected),
            "real": dataclasses.asdict(contained.real),
            "drills": dataclasses.asdict(contained.drills),
            "open": contained.open,
            "drilled": contained.drilled,
        },
        "deployments": {"query": QUERIES["deployments"], "active": found.nodes, "attested": 0, "tested": 0},
    }


def compliance_json(found: Report) -> dict[str, Any]:
    """Which keys do not meet their tier, and what the tiers and suppliers are."""
    known = found.policy.registry.suppliers
    return {
        "at": moment(found.at),
        "policy": found.policy.digest[:12],
        "policy_since": None if found.since is None else moment(found.since),
        "tiers": [
            {"tier": t.tier, "labels": dict(t.labels), "keys": t.keys, "below": t.below, "elsewhere": t.elsewhere}
            for t in found.tiers
        ],
        "suppliers": [
            {
                "name": name,
                "jurisdiction": about.jurisdiction,
                "hsms": [hsm for hsm, supplier in found.hsms.items() if supplier == name],
                "labels": [
                    {
                        "label": label,
                        "level": entry.level,
                        "evidence": entry.evidence,
                        "valid_until": entry.valid_until,
                        "ended": entry.ends <= found.at,
                    }
                    for label, entry in about.labels.items()
                ],
            }
            for name, about in known.items()
        ],
        "hsms_without_supplier": [hsm for hsm, supplier in found.hsms.items() if supplier not in known],
        "items": [
            {
                "key_id": str(below.key.id),
                "tenant": below.key.placed.tenant,
                "tier": below.key.placed.tier,
                "home": below.key.placed.home,
                "state": below.key.state,
                "missing": [_gap_json(gap, found.since) for gap in below.gaps],
            }
            for below in found.below
        ],
    }


def _gap_json(gap: Gap, policy_since: int | None) -> dict[str, Any]:
    since = gap.since if gap.since is not None or not gap.charter else policy_since
    return {
        "what": gap.what,
        "supplier": gap.supplier,
        "label": gap.label,
        "level": gap.level,
        "wanted": gap.wanted,
        "evidence": gap.evidence,
        "valid_until": gap.valid_until,
        "since": None if since is None else moment(since),
    }


def contained_json(found: Contained) -> dict[str, Any]:
    """A freeze, and how far it got."""
    reach, last = found.reach, found.last_success
    at = reach.contained_at
    return {
        **freeze_json(found.freeze, found.lifted_at),
        "contained_at": None if at is None else moment(at),
        "seconds_to_contain": None if at is None else (at - found.freeze.at) / 1e6,
        "acknowledged": len(reach.acknowledged),
        "silent": [{"worker": s.worker, "node": s.node, "until": moment(s.until)} for s in reach.silent],
        "last_success": None
        if last is None
        else {
            "at": moment(last.t),
            "op": last.record["op"],
            "key": last.record.get("key"),
            "log": last.log,
            "seq": last.seq,
        },
    }


def approval_json(standing: Standing) -> dict[str, Any]:
    """A request for approval; `request` is exactly what is signed, `digest` the SHA-256 that stands for it."""
    asked = standing.asked
    return {
        "id": asked.id,
        "state": standing.state,
        "kind": asked.kind,
        "request": dataclasses.asdict(asked),
        "digest": asked.digest(),
        "needed": standing.needed,
        "approvers": list(standing.approvers),
        "missing": list(standing.missing),
        "created_at": moment(asked.created),
        "expires_at": moment(asked.expires),
    }


def operation_json(operation: Operation) -> dict[str, Any]:
    """A long-running operation as the API shows it."""
    return {
        "id": operation.id,
        "kind": operation.kind,
        "state": operation.state,
        "step": operation.step,
        "progress": {"done": operation.done, "total": operation.total},
        "created_at": moment(operation.created_at),
        "updated_at": moment(operation.updated_at),
        "parameters": {k: v for k, v in operation.parameters.items() if k != "admin"},
        "result": dict(operation.outcome) or None,
    }


def hsm_json(member: MemberStatus) -> dict[str, Any]:
    """An HSM as the API shows it; counters are those of the worker that answers."""
    token = member.token
    return {
        "name": member.name,
        "region": member.region,
        "admin": str(member.admin),
        "state": member.state,
        "drained": member.admin is Admin.DRAINED and member.in_flight == 0,
        "in_flight": member.in_flight,
        "last_error": member.last_error,
        "failovers": member.failovers,
        "vendor": token.vendor if token else None,
        "token_label": token.token_label if token else None,
        "token_serial": token.token_serial if token else None,
        "firmware": token.firmware if token else None,
        "root_kek": str(token.root_kek) if token else None,
        "epoch": token.epoch if token else None,
        "cached_keys": token.cached_keys if token else None,
        "sessions_open": token.sessions_open if token else None,
        "sessions_max": token.sessions_max if token else None,
        "specs": list(token.specs) if token else [],
        "missing": [{"material": name, "reason": reason} for name, reason in token.missing] if token else [],
        "waivers": list(token.waivers) if token else [],
    }


API_VERSION_STATE: Final = {
    "preactive": "pending_import",
    "active": "enabled",
    "suspended": "disabled",
    "deactivated": "revoked",
    "compromised": "compromised",
    "destroyed": "destroyed",
}


# ---- answers: for the API document; handlers build them as plain dictionaries --------------------------------------


class Named(Struct, kw_only=True):
    key_id: str
    key_version: int


class EncryptAnswer(Named, kw_only=True):
    ciphertext: str
    suite: str


class DecryptAnswer(Named, kw_only=True):
    plaintext: str


class RewrapAnswer(EncryptAnswer, kw_only=True):
    source: Named = msgspec.field(name="from")
    to: Named


class DataKeyAnswer(Named, kw_only=True):
    wrapped_key: str
    plaintext_key: str | UnsetType = UNSET


class UnwrapAnswer(Named, kw_only=True):
    plaintext_key: str


class SignAnswer(Named, kw_only=True):
    signature: str


class MacAnswer(Named, kw_only=True):
    mac: str


class CheckAnswer(Named, kw_only=True):
    valid: bool


class RandomAnswer(Struct):
    random: str


class BatchResult(Struct):
    status: int
    reference: str | UnsetType = UNSET
    receipt: str | UnsetType = UNSET
    result: dict[str, Any] | UnsetType = UNSET
    problem: dict[str, Any] | UnsetType = UNSET


class BatchAnswer(Struct):
    batch_id: str
    results: list[BatchResult]


class VersionAnswer(Struct):
    version: int
    state: str
    created_at: str
    uses: int
    import_path: str | None
    expires_at: str | None


class TierStatus(Struct):
    met: bool
    missing: list[str]


class RotationAnswer(Struct):
    max_age: str | None
    max_uses: int | None


class KeyAnswer(Struct):
    id: str
    spec: str
    usage: str
    tier: int
    home: str
    residency: list[str]
    execution: list[str]
    reach: list[str]
    egress: list[str]
    failover: list[str]
    purposes: list[str]
    state: str
    suite: str | None
    origin: str
    protection: str
    description: str
    tags: dict[str, str]
    rotation: RotationAnswer
    versions: list[VersionAnswer]
    latest_version: int | None
    min_decrypt_version: int
    min_encrypt_version: int
    tier_status: TierStatus
    created_at: str
    updated_at: str
    delete_at: str | None


class ImportParametersAnswer(Struct):
    key_id: str
    wrapping: str
    wrapping_key_spec: str | None
    wrapping_public_key: str
    import_token: str
    import_path: str
    expires_at: str


class KeyList(Struct):
    items: list[KeyAnswer]
    next_page_token: str | None


class VersionList(Struct):
    items: list[VersionAnswer]


class AliasAnswer(Struct):
    alias: str
    key_id: str


class AliasList(Struct):
    items: list[AliasAnswer]
    next_page_token: str | None


class Progress(Struct):
    done: int
    total: int


class OperationAnswer(Struct):
    id: str
    kind: str
    state: Literal["running", "succeeded", "failed", "cancelled"]
    step: str
    progress: Progress
    created_at: str
    updated_at: str
    parameters: dict[str, Any]
    result: dict[str, Any] | None


class OperationList(Struct):
    items: list[OperationAnswer]


class FreezeAnswer(Struct):
    id: str
    scope: ScopeBody
    tenant: str | None
    reason: str
    officer: str
    drill: bool
    mode: str
    since: str
    began: str | None
    lifted_at: str | None


class GrantAnswer(Struct):
    """`uses` are counted for grants with `max_uses` alone."""

    id: str
    key_id: str
    grantee: str
    operations: list[str]
    purpose: str
    context_equals: dict[str, str] | None
    context_subset: dict[str, str] | None
    max_uses: int | None
    uses: int | None
    state: Literal["live", "ended", "used_up", "revoked"]
    granter: str
    created_at: str
    expires_at: str
    revoked_at: str | None


class GrantList(Struct):
    items: list[GrantAnswer]


class ExceptionAnswer(Struct):
    id: str
    tenant: str
    keys: list[str]
    kind: Literal["reach", "egress"]
    places: list[str]
    purpose: str
    legal_basis: str
    legal_ref: str
    tier: int
    state: Literal["live", "not_yet", "ended", "revoked"]
    not_before: str
    not_after: str
    created_at: str
    revoked_at: str | None
    request: dict[str, Any]
    approvals: dict[str, str]


class ExceptionList(Struct):
    items: list[ExceptionAnswer]


class TierBarAnswer(Struct):
    tier: int
    labels: dict[str, int]
    keys: int
    below: int
    elsewhere: int


class SupplierLabelAnswer(Struct):
    label: str
    level: int
    evidence: str
    valid_until: str
    ended: bool


class SupplierAnswer(Struct):
    name: str
    jurisdiction: str
    hsms: list[str]
    labels: list[SupplierLabelAnswer]


class GapAnswer(Struct):
    what: str
    supplier: str | None
    label: str | None
    level: int | None
    wanted: int | None
    evidence: str | None
    valid_until: str | None
    since: str | None


class BelowTierAnswer(Struct):
    key_id: str
    tenant: str
    tier: int
    home: str
    state: str
    missing: list[GapAnswer]


class SovereigntyCheckpoint(Struct):
    size: int
    root: str


class CriterionShown(Struct):
    criterion: str
    meaning: str
    unmet: int


class SystemShown(Struct):
    name: str
    tenant: str
    critical: bool
    gaps: list[str]


class SystemsShown(Struct):
    query: str
    total: int
    sovereign: int
    share: float | None
    criteria: list[CriterionShown]
    systems: list[SystemShown]


class ExitShown(Struct):
    vendor: str
    succeeded: int
    failed: int
    mean_s: float | None
    max_s: float | None
    refused: int


class ExitsShown(Struct):
    query: str
    since: str
    vendors: list[ExitShown]


class SupplierShare(Struct):
    supplier: str
    share: float
    loss: float


class SuppliersShown(Struct):
    query: str
    keys: int
    approved: int
    diversity: float | None
    suppliers: list[SupplierShare]


class TimesShown(Struct):
    count: int
    median_s: float | None
    p90_s: float | None
    max_s: float | None


class ContainmentShown(Struct):
    query: str
    since: str
    detected: TimesShown
    real: TimesShown
    drills: TimesShown
    open: int
    drilled: bool


class DeploymentsShown(Struct):
    query: str
    active: int
    attested: int
    tested: int


class SovereigntyAnswer(Struct):
    at: str
    policy: str
    checkpoint: SovereigntyCheckpoint | None
    critical_systems: SystemsShown
    exit: ExitsShown
    suppliers: SuppliersShown
    containment: ContainmentShown
    deployments: DeploymentsShown


class ComplianceAnswer(Struct):
    at: str
    policy: str
    policy_since: str | None
    tiers: list[TierBarAnswer]
    suppliers: list[SupplierAnswer]
    hsms_without_supplier: list[str]
    items: list[BelowTierAnswer]
    next_page_token: str | None


class FreezeList(Struct):
    items: list[FreezeAnswer]


class SilentWorker(Struct):
    worker: str
    node: str
    until: str


class LastSuccess(Struct):
    at: str
    op: str
    key: str | None
    log: str
    seq: int


class ContainedAnswer(FreezeAnswer):
    contained_at: str | None
    seconds_to_contain: float | None
    acknowledged: int
    silent: list[SilentWorker]
    last_success: LastSuccess | None


class ApprovalAnswer(Struct):
    id: str
    state: Literal["open", "executed", "cancelled", "expired", "outdated"]
    kind: str
    request: dict[str, Any]
    digest: str
    needed: int
    approvers: list[str]
    missing: list[str]  # groups of which somebody must approve yet
    created_at: str
    expires_at: str
    code: Literal["approval_required"] | UnsetType = UNSET  # of the answer to who asked


class ApprovalList(Struct):
    items: list[ApprovalAnswer]


class HsmAnswer(Struct):
    name: str
    region: str
    admin: Literal["active", "fallback", "drained"]
    state: Literal["UP", "DOWN", "LOCKED", "SUSPECT", "EMPTY", "FOREIGN"]
    drained: bool
    in_flight: int
    last_error: str
    failovers: int
    vendor: str | None
    token_label: str | None
    token_serial: str | None
    firmware: str | None
    root_kek: str | None
    epoch: int | None
    cached_keys: int | None
    sessions_open: int | None
    sessions_max: int | None
    specs: list[str]
    missing: list[dict[str, str]]
    waivers: list[str]


class HsmList(Struct):
    items: list[HsmAnswer]


class ObjectList(Struct):
    items: list[dict[str, Any]]


class RecordList(Struct):
    items: list[dict[str, Any]]
    next_page_token: str | None


class PolicyAnswer(Struct):
    digest: str
    version: int
    development: bool
    files: dict[str, str]
    applied: str | None


class PlanAnswer(Struct):
    """What a draft comes to against the bundle in force; `replay` if a period was named."""

    replaces: dict[str, Any]
    draft: dict[str, Any]
    files: list[dict[str, Any]]
    members: list[dict[str, Any]]
    locked_out: list[dict[str, Any]]
    unproved: str | None
    refuted: list[dict[str, Any]]
    undecided: list[str]
    changes: list[dict[str, Any]]
    proved: int | UnsetType = UNSET
    seconds: float | UnsetType = UNSET
    dead_rules: list[str] | UnsetType = UNSET
    redundant_rules: list[str] | UnsetType = UNSET
    replay: ReplayAnswer | UnsetType = UNSET


class DecisionAnswer(Struct):
    """A recorded decision, made again; `fixes` are the smallest changes of facts that would have it allowed.

    `transfers` are the borders that data crosses, with every agreement about them and what it lacks.
    """

    id: str
    record: dict[str, Any]
    decision: dict[str, Any]
    request: dict[str, Any]
    rules: list[dict[str, Any]]
    fixes: list[dict[str, Any]]
    transfers: list[dict[str, Any]]
    grants: list[dict[str, Any]]
    exceptions: list[dict[str, Any]]


class TransferAnswer(Struct):
    """Operations of one agreement (null: none covered them), border, tenant and purpose.

    `refused` counts those that did not cross, by rule (`SOV-TRANSFER`: no agreement in force) or else by error code.
    """

    agreement: str | None
    from_: str = msgspec.field(name="from")
    to: str
    tenant: str
    purpose: str
    crossed: int
    refused: dict[str, int]
    first: str
    last: str


class TransferList(Struct):
    """`stored_since`: what was recorded before is in the archive and not counted; null if all is at hand."""

    items: list[TransferAnswer]
    stored_since: str | None


class AgreementAnswer(Struct):
    id: str
    from_: str = msgspec.field(name="from")
    to: str
    tenants: list[str]
    legal_basis: str
    legal_ref: str
    purposes: list[str]
    parties: list[str]
    not_before: str
    not_after: str
    in_force: bool


class AgreementList(Struct):
    items: list[AgreementAnswer]


class ReplayAnswer(Struct):
    """A recorded period under a draft; `changed` are decisions that their own bundle now makes otherwise: none, ever."""

    decisions: int
    identical: int
    changed: list[str]
    unmade: dict[str, int]
    newly_allowed: int
    newly_denied: int
    differences: list[dict[str, Any]]
    radius: dict[str, dict[str, int]]


class TokenAnswer(Struct):
    id: str
    role: str
    scopes: list[str]
    created_at: str
    expires_at: str
    token: str | UnsetType = UNSET


class TokenList(Struct):
    items: list[TokenAnswer]


class WhoAnswer(Struct):
    id: str
    kind: str
    tenant: str | None
    roles: list[str]
    places: list[str]
    proof: int
    authn: str


class Jwk(Struct):
    kty: str
    kid: str


class ProblemAnswer(Struct):
    """RFC 9457."""

    type: str
    title: str
    status: int
    code: str
    retryable: bool
    executed: bool
    request_id: str


class DryRunAnswer(Struct):
    would: Literal["allow", "deny"]
    decision: dict[str, Any]
