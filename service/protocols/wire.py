"""The native API's JSON: one bounded msgspec Struct per body, unknown fields refused; keys as they are shown.

Times are RFC 3339 UTC with milliseconds, durations ISO 8601 (days, hours, minutes, seconds), binary is padded base64.
"""

from __future__ import annotations

import base64
import re
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from keystore import Key, KeyVersion
from service.outcome import RequestInvalid

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
Fence = Annotated[int, Meta(ge=1, le=16_777_215)] | Annotated[str, Meta(pattern="^latest(-[0-9]{1,5})?$")]
Context = dict[str, str]
Suite = Literal["0x0001", "0x0002"]
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
    suite: Suite | None = None
    rotation: RotationBody | None = None
    description: Annotated[str, Meta(max_length=1_024)] = ""
    tags: Tags = {}


class PatchKeyBody(Struct, forbid_unknown_fields=True, kw_only=True):
    description: Annotated[str, Meta(max_length=1_024)] | UnsetType = UNSET
    tags: Tags | UnsetType = UNSET
    rotation: RotationBody | UnsetType = UNSET
    min_decrypt_version: Fence | UnsetType = UNSET
    min_encrypt_version: Fence | UnsetType = UNSET


class WhyBody(Struct, forbid_unknown_fields=True):
    reason: Reason | None = None


class DeletionBody(Struct, forbid_unknown_fields=True):
    wait: Duration = "P30D"
    reason: Reason | None = None


class AliasBody(Struct, forbid_unknown_fields=True):
    key: KeyName


class TokenBody(Struct, forbid_unknown_fields=True):
    scopes: Annotated[list[Annotated[str, Meta(pattern="^[A-Za-z]{1,32}$")]], Meta(min_length=1, max_length=32)]
    expires_in: Duration = "P30D"


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


def moment(us: int) -> str:
    """RFC 3339 UTC with milliseconds of a time in microseconds."""
    return datetime.fromtimestamp(us // 1_000 / 1_000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def microseconds(text: str) -> int:
    """Microseconds of an RFC 3339 time; ValueError for another spelling."""
    at = datetime.fromisoformat(text)
    if at.tzinfo is None or len(text) > 40:
        raise ValueError("a time without zone")
    return int(at.timestamp() * 1_000_000)


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
        "latest_version": key.latest.number,
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
    latest_version: int
    min_decrypt_version: int
    min_encrypt_version: int
    tier_status: TierStatus
    created_at: str
    updated_at: str
    delete_at: str | None


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
