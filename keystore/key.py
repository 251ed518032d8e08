"""What a key is: its facts, its versions, its states and the transitions between them (NIST SP 800-57 part 1, 7)."""

from __future__ import annotations

import enum
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final


class KeySpec(enum.StrEnum):
    """The algorithm and size of a key, by its name in the API."""

    AES_256 = "AES_256"
    HMAC_256 = "HMAC_256"
    HMAC_512 = "HMAC_512"
    EC_P256 = "EC_P256"
    EC_P384 = "EC_P384"
    RSA_3072 = "RSA_3072"
    RSA_4096 = "RSA_4096"
    ED25519 = "ED25519"


class KeyUsage(enum.StrEnum):
    """The one thing a key is for; a key never has two (SP 800-57 part 1, 5.2)."""

    ENCRYPT = "encrypt"
    SIGN = "sign"
    MAC = "mac"


USAGE_OF_SPEC: Mapping[KeySpec, KeyUsage] = MappingProxyType(
    {
        KeySpec.AES_256: KeyUsage.ENCRYPT,
        KeySpec.HMAC_256: KeyUsage.MAC,
        KeySpec.HMAC_512: KeyUsage.MAC,
        KeySpec.EC_P256: KeyUsage.SIGN,
        KeySpec.EC_P384: KeyUsage.SIGN,
        KeySpec.RSA_3072: KeyUsage.SIGN,
        KeySpec.RSA_4096: KeyUsage.SIGN,
        KeySpec.ED25519: KeyUsage.SIGN,
    }
)


class KeyState(enum.StrEnum):
    """States of SP 800-57 part 1. `pending_deletion` is `SUSPENDED` or `COMPROMISED` with a `delete_at`."""

    PREACTIVE = "preactive"
    ACTIVE = "active"
    SUSPENDED = "suspended"
    DEACTIVATED = "deactivated"
    COMPROMISED = "compromised"
    DESTROYED = "destroyed"


EXTERNAL: Final = "external"  # origin of a key whose material is imported; "hsm" for all others

TRANSITIONS: Mapping[KeyState, frozenset[KeyState]] = MappingProxyType(
    {
        KeyState.PREACTIVE: frozenset({KeyState.ACTIVE, KeyState.DESTROYED, KeyState.COMPROMISED}),
        KeyState.ACTIVE: frozenset(
            {KeyState.SUSPENDED, KeyState.DEACTIVATED, KeyState.COMPROMISED, KeyState.DESTROYED}
        ),
        KeyState.SUSPENDED: frozenset(
            {KeyState.ACTIVE, KeyState.DEACTIVATED, KeyState.COMPROMISED, KeyState.DESTROYED}
        ),
        KeyState.DEACTIVATED: frozenset({KeyState.COMPROMISED, KeyState.DESTROYED}),
        KeyState.COMPROMISED: frozenset({KeyState.DESTROYED}),
        KeyState.DESTROYED: frozenset(),
    }
)

API_STATE: Mapping[KeyState, str] = MappingProxyType(
    {
        KeyState.PREACTIVE: "pending_import",
        KeyState.ACTIVE: "enabled",
        KeyState.SUSPENDED: "disabled",
        KeyState.DEACTIVATED: "deactivated",
        KeyState.COMPROMISED: "compromised",
        KeyState.DESTROYED: "destroyed",
    }
)


class KeyNotFound(Exception):
    """No such key in this tenant; a foreign key gives the same answer as none."""


class KeyDestroyed(Exception):
    """The key was destroyed; its metadata remains, its material does not."""


class WrongState(Exception):
    """The key's state does not allow this operation or transition."""

    def __init__(self, key_id: uuid.UUID, state: str) -> None:
        super().__init__(f"key {key_id} is {state}")
        self.key_id, self.state = key_id, state


class VersionFenced(Exception):
    """The version lies below the key's fence, was revoked, or does not exist."""


class StaleKey(Exception):
    """The key changed since it was read: another writer was first (ETag mismatch)."""


class AliasInUse(Exception):
    """The alias exists already in this tenant."""


class InputRefused(Exception):
    """A field that the keystore cannot accept, by JSON pointer; never its value."""

    def __init__(self, pointer: str, code: str, detail: str) -> None:
        super().__init__(f"{pointer}: {detail}")
        self.pointer, self.code, self.detail = pointer, code, detail


class AlgorithmMismatch(InputRefused):
    """The algorithm is not one of the key's spec."""

    def __init__(self, detail: str) -> None:
        super().__init__("/algorithm", "not_for_spec", detail)


class DigestLength(InputRefused):
    """The digest has another length than the algorithm's hash."""

    def __init__(self, expected: int) -> None:
        super().__init__("/digest", "wrong_length", f"{expected} bytes")


class UsageMismatch(Exception):
    """The key is not for this use."""


class KeyLimitReached(Exception):
    """The key, or its version, has reached what is safe; the message names the limit and the remedy."""


@dataclass(frozen=True, slots=True)
class Rotation:
    """When the scheduler makes a new version; None means never for that reason."""

    max_age: int | None = None  # seconds
    max_uses: int | None = None  # protect operations on the latest version


@dataclass(frozen=True, slots=True)
class Imported:
    """How a version's material came in from outside. Such material is external for ever: others may hold a copy."""

    path: str  # "hsm": opened inside the token only; "software": in this process's memory for a moment
    expires_at: int | None = None  # microseconds since the epoch; from then on the version is not used


@dataclass(frozen=True, slots=True)
class KeyVersion:
    """One version: its wrapped material and what the row MAC binds it to."""

    number: int
    state: KeyState
    created_at: int  # microseconds since the epoch
    object_id: uuid.UUID  # CKA_ID of the session object
    mechanism: str  # name of the wrapping mechanism, e.g. "AES_KEY_WRAP_KWP"
    kek: uuid.UUID  # CKA_ID of the root KEK
    blob: bytes = field(repr=False)  # b"" once destroyed
    public: bytes = b""  # SubjectPublicKeyInfo (DER) of an asymmetric key
    mac: bytes = field(default=b"", repr=False)
    imported: Imported | None = None  # None: made inside the HSM
    # Protect operations leased so far: never too few. Not under the MAC and no part of what a version is.
    uses: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Key:
    """A named thing of one tenant with versions. All places are leaf places (regions), never groups."""

    id: uuid.UUID
    tenant: str
    spec: KeySpec
    usage: KeyUsage
    suite: int
    tier: int
    home: str
    residency: frozenset[str]
    execution: frozenset[str]
    reach: frozenset[str]
    egress: frozenset[str]
    failover: frozenset[str]
    shared_with: frozenset[str]
    purposes: tuple[str, ...]
    state: KeyState
    kv: int  # rises by one with every change of this row; the ETag
    created_at: int
    updated_at: int
    versions: tuple[KeyVersion, ...]  # ascending; numbers start at 1; none while an import is pending
    origin: str = "hsm"  # or EXTERNAL
    non_exportable: bool = True
    description: str = ""
    tags: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    rotation: Rotation = Rotation()
    min_decrypt_version: int = 1
    min_encrypt_version: int = 1
    delete_at: int | None = None  # microseconds; set exactly while deletion is scheduled
    mac: bytes = field(default=b"", repr=False)

    @property
    def latest(self) -> KeyVersion:
        """The newest version; WrongState while an import is pending."""
        if not self.versions:
            raise WrongState(self.id, self.api_state)
        return self.versions[-1]

    @property
    def latest_number(self) -> int:
        """The number of the newest version; 0 while an import is pending."""
        return len(self.versions)

    @property
    def api_state(self) -> str:
        return "pending_deletion" if self.delete_at is not None else API_STATE[self.state]

    def version(self, number: int) -> KeyVersion:
        """The version with this number; `VersionFenced` if there is none."""
        if not 1 <= number <= len(self.versions):
            raise VersionFenced(f"key {self.id} has no version {number}")
        return self.versions[number - 1]
