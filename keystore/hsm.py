"""The seam between the keystore and an HSM: what a key row needs done inside one.

Implementations: `keystore.pkcs11` (any PKCS#11 token), `tests/fakes/hsm.py` (memory, verified by the same contract
test in `tests/contracts/test_hsm.py`).
"""

from __future__ import annotations

import enum
import uuid
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable


class Material(enum.StrEnum):
    """What is wrapped: PKCS#11 key type and size, hence what may be done with it."""

    KDK_512 = "KDK_512"  # GENERIC_SECRET of exactly 64 bytes, SIGN only: key derivation of suites 0x0001, 0x0004
    KDK_256 = "KDK_256"  # the same of exactly 32 bytes, imported only: suites 0x0005, 0x0006
    AES_256 = "AES_256"  # ENCRYPT and DECRYPT in the token: suite 0x0002
    HMAC_256 = "HMAC_256"
    HMAC_512 = "HMAC_512"
    EC_P256 = "EC_P256"
    EC_P384 = "EC_P384"
    RSA_3072 = "RSA_3072"
    RSA_4096 = "RSA_4096"
    ED25519 = "ED25519"
    TRANSPORT_RSA_3072 = "TRANSPORT_RSA_3072"  # UNWRAP only: opens what a customer wrapped for one import
    TRANSPORT_RSA_4096 = "TRANSPORT_RSA_4096"


class SignScheme(enum.StrEnum):
    """A signature scheme; `data` is a digest of the hash's exact length except for ED25519, which takes the message."""

    RSA_PSS_SHA_256 = "RSA_PSS_SHA_256"
    RSA_PSS_SHA_384 = "RSA_PSS_SHA_384"
    RSA_PSS_SHA_512 = "RSA_PSS_SHA_512"
    RSA_PKCS1_SHA_256 = "RSA_PKCS1_SHA_256"
    RSA_PKCS1_SHA_384 = "RSA_PKCS1_SHA_384"
    RSA_PKCS1_SHA_512 = "RSA_PKCS1_SHA_512"
    ECDSA_SHA_256 = "ECDSA_SHA_256"
    ECDSA_SHA_384 = "ECDSA_SHA_384"
    ECDSA_SHA_512 = "ECDSA_SHA_512"
    ED25519 = "ED25519"


class HsmUnavailable(Exception):
    """No session, login or token just now; the operation was not executed and may be retried.

    `ckr` is the name of the PKCS#11 return value behind it, if there is one; `retry_after` is in seconds.
    """

    executed = False

    def __init__(self, reason: str, *, ckr: str = "", retry_after: int = 1) -> None:
        super().__init__(reason)
        self.ckr, self.retry_after = ckr, retry_after


class HsmLocked(HsmUnavailable):
    """The token refused its PIN. Nothing tries again before a restart: each try brings the token nearer to its lock."""

    def __init__(self, reason: str, *, ckr: str = "") -> None:
        super().__init__(reason, ckr=ckr, retry_after=60)


class HsmEmpty(HsmUnavailable):
    """The token answers, but does not hold the installation's keys, or not the root KEK that was asked for."""


class HsmTimeout(HsmUnavailable):
    """The HSM did not answer within the deadline. Whether it acted is unknown, so `executed` says that it may have."""

    executed = True


class HsmFault(Exception):
    """The HSM failed an operation on our own keys; `ckr` is the CKR name only."""

    executed = False

    def __init__(self, ckr: str) -> None:
        super().__init__(f"HSM answered {ckr}")
        self.ckr = ckr


class InvalidCiphertext(Exception):
    """The one answer for every way in which a ciphertext can be wrong."""


class RowDamaged(Exception):
    """A stored key row does not carry the MAC of this HSM: changed outside the service, or of another installation."""


class UnsupportedByHsm(Exception):
    """The token cannot make or use this kind of key; the message names the missing mechanism."""


class SelfTestFailed(Exception):
    """The token broke a rule of the start-up self-test; the message names the rule."""


@dataclass(frozen=True, slots=True)
class Wrapped:
    """A key as it leaves the token: wrapped under the root KEK (KWP, RFC 5649)."""

    blob: bytes = field(repr=False)
    mechanism: str
    kek: uuid.UUID
    public: bytes = b""  # SubjectPublicKeyInfo (DER) for asymmetric keys


@dataclass(frozen=True, slots=True)
class StoredKey:
    """One key version as the HSM needs it. `binding` is the exact byte string that `mac` covers."""

    object_id: uuid.UUID
    material: Material
    blob: bytes = field(repr=False)
    mechanism: str
    kek: uuid.UUID
    public: bytes
    binding: bytes = field(repr=False)
    mac: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class HsmStatus:
    """What an operator may see of one token."""

    name: str
    region: str
    vendor: str
    state: str  # "UP", "DOWN", "LOCKED"
    token_label: str
    token_serial: str
    firmware: str
    root_kek: uuid.UUID
    epoch: int
    cached_keys: int
    sessions_open: int
    sessions_max: int
    specs: tuple[str, ...]  # materials this token can make
    missing: tuple[tuple[str, str], ...]  # (material, reason) for those it cannot
    waivers: tuple[str, ...]  # self-test rules waived by a test profile


class OaepHash(enum.StrEnum):
    """The hash of RSAES-OAEP and of its MGF1 (RFC 8017, 7.1)."""

    SHA_1 = "SHA_1"
    SHA_256 = "SHA_256"


@runtime_checkable
class Importer(Protocol):
    """Optional ability of an `Hsm`: to take in keys that were made elsewhere. Stateless, as `Hsm` is.

    What is admitted comes back wrapped under the root KEK, like a key born inside; its clear object is destroyed before
    the call ends. InvalidCiphertext for whatever does not open, InputRefused for material of another kind or length.
    """

    def opens(self, oaep: OaepHash) -> bool:
        """Whether the token itself opens RSAES-OAEP with this hash: tried, not read from its list."""

    def admit_wrapped(
        self,
        transport: StoredKey,
        oaep: OaepHash,
        wrapped: bytes,
        material: Material,
        object_id: uuid.UUID,
        *,
        inner: bytes | None,
        public: bytes,
    ) -> Wrapped:
        """Open `wrapped` under a transport key inside the token; it is never in clear outside.

        With `inner` (AES-KWP, RFC 5649), `wrapped` is an AES-256 key that opens it. `public` is the
        SubjectPublicKeyInfo that a private key must belong to, or empty.
        """

    def admit_clear(self, material: Material, clear: bytes, object_id: uuid.UUID, *, public: bytes) -> Wrapped:
        """Take in a secret's bytes, or a private key as PKCS#8 (DER), which this process holds in clear."""


@runtime_checkable
class DataKeeper(Protocol):
    """Optional ability of an `Hsm`: to keep a few public bytes under a name, outside every backup of the database."""

    def data_objects(self, role: str) -> tuple[bytes, ...]:
        """What the installation's data objects of this role hold: one, or two after a crash in `keep_data_object`."""

    def keep_data_object(self, role: str, data: bytes) -> None:
        """Store at most 2,048 bytes, durable on return, in place of what was held: the new before the old goes.

        UnsupportedByHsm if the token takes no such object. Seldom: a token's memory wears.
        """


class Hsm(Protocol):
    """One token. Thread-safe. Any method may raise HsmUnavailable or HsmFault.

    Methods that take a `StoredKey` check its row MAC before the first unwrap (RowDamaged, before any C_UnwrapKey)
    and keep the unwrapped session object in an LRU cache, pinned while used.
    """

    @property
    def name(self) -> str: ...

    @property
    def region(self) -> str: ...

    @property
    def state(self) -> str:
        """UP, DOWN or LOCKED as far as known, without calling the token."""

    @property
    def fast(self) -> bool:
        """True if a call is quick enough (measured at start: < 200 us) to run inline on the event loop."""

    def missing(self, material: Material) -> str | None:
        """Why this token cannot hold `material`, or None if it can."""

    def use_root(self, version: int) -> None:
        """Wrap new keys under this version of the region's root KEK from now on; HsmEmpty if it is not held."""

    def generate(self, material: Material, object_id: uuid.UUID) -> Wrapped:
        """Make a key inside the token, wrap it under the root KEK, destroy the clear object.

        UnsupportedByHsm with the reason if the token lacks it.
        """

    def row_mac(self, data: bytes) -> bytes:
        """HMAC-SHA-256 of a row's encoding under the token's row-MAC key."""

    def check_row(self, binding: bytes, mac: bytes) -> None:
        """RowDamaged unless `mac` is the row MAC of `binding`. A row once found right may cost no further call."""

    def hmac(self, key: StoredKey, algorithm: str, data: bytes) -> bytes:
        """HMAC with `algorithm` "sha256", "sha384" or "sha512" under a KDK or HMAC key."""

    def gcm_seal(self, key: StoredKey, aad: bytes, data: bytes) -> tuple[bytes, bytes]:
        """AES-256-GCM in the token: (12-byte IV, ciphertext and 16-byte tag)."""

    def gcm_open(self, key: StoredKey, iv: bytes, aad: bytes, data: bytes) -> bytes:
        """The plaintext; InvalidCiphertext if the tag is wrong (never HsmFault, whatever code the vendor uses)."""

    def sign(self, key: StoredKey, scheme: SignScheme, data: bytes) -> bytes:
        """The signature: PKCS#1 for RSA, raw r||s for ECDSA, 64 bytes for Ed25519."""

    def random(self, length: int) -> bytes:
        """Random bytes from the token."""

    def audit_public_key(self) -> bytes:
        """SubjectPublicKeyInfo (DER) of the audit key: Ed25519, or P-256 where the token lacks it."""

    def audit_sign(self, statement: bytes) -> bytes:
        """Sign with the audit key: Ed25519, or ECDSA P-256 over SHA-256 as DER."""

    def forget(self, object_id: uuid.UUID) -> None:
        """Evict a key from the cache at once: it was disabled, destroyed or revoked."""

    def canary(self) -> None:
        """Prove through the real path that the token works: wrap, unwrap, HMAC, known answer, same serial."""

    def status(self) -> HsmStatus:
        """State without calling the token."""

    def close(self) -> None:
        """Release what the process holds. Never C_Logout."""


def importer_of(hsm: Hsm) -> Importer:
    """The HSM as an importer; UnsupportedByHsm if it takes no keys from outside."""
    if not isinstance(hsm, Importer):
        raise UnsupportedByHsm(f"HSM {hsm.name} takes no keys that were made elsewhere")
    return hsm
