"""The ciphertext format: header, suites, AAD, key derivation, and one strict parser. Pure; no HSM, no key store.

Integers are big-endian. The header is 25 bytes (magic `SK`, format 1, suite, key id, purpose, key version); the suite's
fields follow in fixed order. The parser accepts exactly one form of every envelope and answers everything else with one
`InvalidCiphertext`.
"""

from __future__ import annotations

import base64
import enum
import functools
import hashlib
import hmac
import re
import struct
import unicodedata
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from keystore.hsm import InvalidCiphertext
from keystore.key import InputRefused

_U32: Final = struct.Struct(">I").pack
SINGLE: Final = 0x0001  # a message key per message, derived in the HSM, AES-256-GCM in process, committing
STRICT: Final = 0x0002  # AES-256-GCM inside the token
BATCH: Final = 0x0004  # as 0x0001, one derivation per key, version and batch
IMPORTED: Final = 0x0005  # as 0x0001, for an imported key of 32 bytes
IMPORTED_BATCH: Final = 0x0006  # as 0x0004, for an imported key of 32 bytes

BATCH_OF: Final[Mapping[int, int]] = {SINGLE: BATCH, IMPORTED: IMPORTED_BATCH}  # by the suite of the key
HASH_OF: Final[Mapping[int, str]] = {SINGLE: "sha512", BATCH: "sha512", IMPORTED: "sha256", IMPORTED_BATCH: "sha256"}

MAX_PLAINTEXT: Final = 65_536
MAX_CONTEXT: Final = 8_192  # bytes of names plus values
MAX_PAIRS: Final = 128
MAX_VERSION: Final = 2**24 - 1
TEXT_PREFIX: Final = "skms:v1:"
COMMITMENT: Final = bytes(32)  # suite 0x0002: the zero bytes that are encrypted before the plaintext

_HEADER: Final = struct.Struct(">2sBH16sI")
_FIELDS: Final[Mapping[int, tuple[int, int, int, int]]] = {  # salt, index, IV, commitment
    SINGLE: (32, 0, 12, 32),
    STRICT: (0, 0, 12, 0),
    BATCH: (32, 4, 12, 32),
    IMPORTED: (32, 0, 12, 32),
    IMPORTED_BATCH: (32, 4, 12, 32),
}
_TEXT: Final = re.compile(r"skms:v1:([A-Za-z0-9_-]{34,87600})")


class Purpose(enum.IntEnum):
    """What an envelope holds; each is opened by its own operation only."""

    ENCRYPT = 1
    DATAKEY = 2
    WRAP = 3
    BACKUP = 4


class ContextRefused(InputRefused):
    """A context that must not be bound to new ciphertexts. `code` says why; it never holds a name or value."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__("/context", code, detail)


@dataclass(frozen=True, slots=True)
class Envelope:
    """A parsed envelope. `sealed` is ciphertext and 16-byte tag."""

    suite: int
    key_id: uuid.UUID
    purpose: Purpose
    version: int
    salt: bytes
    index: bytes
    iv: bytes
    commitment: bytes
    sealed: bytes = field(repr=False)

    def to_bytes(self) -> bytes:
        """The one byte form of this envelope."""
        head = _HEADER.pack(b"SK", 1, self.suite, self.key_id.bytes, self.purpose << 24 | self.version)
        return head + self.salt + self.index + self.iv + self.commitment + self.sealed

    @classmethod
    def parse(cls, data: bytes) -> Envelope:
        """The envelope in `data`; InvalidCiphertext for anything that is not exactly one."""
        if len(data) < _HEADER.size:
            raise InvalidCiphertext
        magic, form, suite, key_id, word = _HEADER.unpack_from(data)
        purpose, version = word >> 24, word & MAX_VERSION
        if (magic, form) != (b"SK", 1) or suite not in _FIELDS or not 1 <= purpose <= 4 or not version:
            raise InvalidCiphertext
        parts, at = [], _HEADER.size
        for length in _FIELDS[suite]:
            parts.append(data[at : at + length])
            at += length
        hidden = len(COMMITMENT) if suite == STRICT else 0
        if not 16 + hidden <= len(data) - at <= MAX_PLAINTEXT + 16 + hidden:
            raise InvalidCiphertext
        salt, index, iv, commitment = parts
        return cls(suite, uuid.UUID(bytes=key_id), Purpose(purpose), version, salt, index, iv, commitment, data[at:])


def to_text(envelope: bytes) -> str:
    """`skms:v1:` and unpadded base64url."""
    return TEXT_PREFIX + base64.urlsafe_b64encode(envelope).rstrip(b"=").decode()


def from_text(text: str) -> bytes:
    """The bytes of an envelope's text form; InvalidCiphertext for another spelling of the same bytes."""
    match = _TEXT.fullmatch(text)
    if match is None or len(match[1]) % 4 == 1:
        raise InvalidCiphertext
    data = base64.urlsafe_b64decode(match[1] + "=" * (-len(match[1]) % 4))
    if to_text(data) != text:
        raise InvalidCiphertext
    return data


@dataclass(frozen=True, slots=True)
class EnvelopeInfo:
    """What an envelope says about itself, without any key. Nothing here is authenticated before it is opened."""

    suite: str
    key_id: str
    purpose: str
    version: int
    plaintext_bytes: int
    batch_index: int | None
    salt: str  # hex; equal in all items of one batch; empty where the suite has none
    iv: str
    commitment: str


def inspect(ciphertext: str | bytes) -> EnvelopeInfo:
    """Read an envelope offline; InvalidCiphertext if it is none."""
    e = Envelope.parse(from_text(ciphertext.strip()) if isinstance(ciphertext, str) else ciphertext)
    hidden = 16 + (len(COMMITMENT) if e.suite == STRICT else 0)
    index = int.from_bytes(e.index, "big") if e.index else None
    return EnvelopeInfo(
        suite=f"0x{e.suite:04x}",
        key_id=str(e.key_id),
        purpose=e.purpose.name.lower(),
        version=e.version,
        plaintext_bytes=len(e.sealed) - hidden,
        batch_index=index,
        salt=e.salt.hex(),
        iv=e.iv.hex(),
        commitment=e.commitment.hex(),
    )


def context_of(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The context of a list of pairs; ContextRefused if a name stands twice (a later one must not win unseen)."""
    context: dict[str, str] = {}
    for name, value in pairs:
        if name in context:
            raise ContextRefused("duplicate_name", "each name once")
        context[name] = value
    return context


def refuse_context(context: Mapping[str, str]) -> None:
    """Refuse what no new ciphertext may be bound to. Decrypt never asks: a newer Unicode table must lock nobody out."""
    if len(context) > MAX_PAIRS:
        raise ContextRefused("too_many_pairs", f"at most {MAX_PAIRS} pairs")
    size = 0
    for text in (*context, *context.values()):
        if text.isascii():
            size += len(text)
            continue
        try:
            size += len(text.encode())
        except UnicodeEncodeError:
            raise ContextRefused("lone_surrogate", "not valid Unicode text") from None
        if unicodedata.normalize("NFC", text) != text:
            raise ContextRefused("not_nfc", "text must be in Unicode normal form C")
    if size > MAX_CONTEXT:
        raise ContextRefused("too_large", f"names and values: at most {MAX_CONTEXT} bytes")
    for name in context:
        if not name:
            raise ContextRefused("empty_name", "names must not be empty")
        if name.startswith("skms:"):
            raise ContextRefused("reserved_name", "names beginning with skms: are reserved")


def encode_aad(
    *,
    tenant: str,
    region: str,
    key_id: uuid.UUID,
    version: int,
    suite: int,
    purpose: Purpose,
    context: Mapping[str, str],
) -> bytes:
    """The AAD: every field length-prefixed, pairs sorted by the raw UTF-8 bytes of their names.

    InvalidCiphertext for a context that is no Unicode text: nothing was ever sealed with one.
    """
    try:
        pairs = sorted((n.encode(), v.encode()) for n, v in context.items())
    except UnicodeEncodeError:
        raise InvalidCiphertext from None
    parts = [_aad_head(tenant, region, key_id.bytes, version, suite, purpose), _field(_U32(len(pairs)))]
    parts += [_field(part) for pair in pairs for part in pair]
    return b"".join(parts)


def _field(data: bytes) -> bytes:
    return _U32(len(data)) + data


@functools.lru_cache(maxsize=4_096)  # one for each version that is in use
def _aad_head(tenant: str, region: str, key_id: bytes, version: int, suite: int, purpose: Purpose) -> bytes:
    fields = [b"skms/aad/1", tenant.encode(), region.encode(), key_id]
    fields += [_U32(version), struct.pack(">H", suite), purpose.name.lower().encode()]
    return b"".join(map(_field, fields))


def kdf_input(label: bytes, data: bytes, bits: int = 512) -> bytes:
    """Input of the one block of SP 800-108r1 counter mode with this many bits of output."""
    return b"\0\0\0\1" + label + b"\0" + data + struct.pack(">I", bits)


def _bits(suite: int) -> int:
    return 256 if HASH_OF[suite] == "sha256" else 512


def single_input(salt: bytes, aad: bytes, suite: int = SINGLE) -> bytes:
    """What the HSM authenticates to derive the secret of one message (suites 0x0001, 0x0005)."""
    return kdf_input(b"skms/v1/enc", salt + hashlib.sha256(aad).digest(), _bits(suite))


def batch_input(salt: bytes, suite: int = BATCH) -> bytes:
    """What the HSM authenticates to derive the secret of a batch (suites 0x0004, 0x0006)."""
    return kdf_input(b"skms/v1/batch", salt, _bits(suite))


def single_keys(secret: bytes, suite: int) -> bytes:
    """64 bytes, key and commitment of one message: what the HSM derived, or for 0x0005 HKDF-Expand of it."""
    return secret if suite == SINGLE else hmac.digest(secret, b"skms/v1/enc-keys\0\1", "sha512")


def item_keys(secret: bytes | bytearray, index: bytes, aad: bytes) -> bytes:
    """64 bytes, key and commitment of one batch item: HKDF-Expand (RFC 5869) with SHA-512, one block."""
    info = b"skms/v1/item\0" + index + hashlib.sha256(aad).digest()
    return hmac.digest(secret, info + b"\1", "sha512")


def seal_with(derived: bytes, iv: bytes, plaintext: bytes, aad: bytes) -> tuple[bytes, bytes]:
    """(commitment, ciphertext and tag) under 64 derived bytes."""
    return derived[32:], AESGCM(derived[:32]).encrypt(iv, plaintext, aad)


def open_with(derived: bytes, envelope: Envelope, aad: bytes) -> bytes:
    """The plaintext. The commitment is compared first: a ciphertext must not mean two things under two keys."""
    if not hmac.compare_digest(derived[32:], envelope.commitment):
        raise InvalidCiphertext
    try:
        return AESGCM(derived[:32]).decrypt(envelope.iv, envelope.sealed, aad)
    except InvalidTag:
        raise InvalidCiphertext from None
