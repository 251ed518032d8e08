"""Data-plane operations as values: what is asked, apart from who asks and how it came in.

A protocol turns each request or batch item into one of these; `Kms` decides, does and records them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from keystore import Key

NO_CONTEXT: Mapping[str, str] = {}


@dataclass(frozen=True, slots=True)
class Use:
    """Why and for where: facts of the policy that the caller declares. They can only narrow what is allowed."""

    purpose: str | None = None  # one of the key's; None = its only one
    reason: str | None = None  # a reason code; None = the default of the tenant
    destination: tuple[str, ...] = ()  # places beside the caller's own that a plaintext may reach


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One operation. `op` is its name in the audit record."""

    op: ClassVar[str]
    use: Use = Use()
    context: Mapping[str, str] = field(default_factory=lambda: NO_CONTEXT)

    @property
    def size(self) -> int | None:
        """Bytes that came in, for the record."""
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Encrypt(Work):
    op: ClassVar[str] = "encrypt"
    key: str
    plaintext: bytes = field(repr=False)
    version: int | None = None

    @property
    def size(self) -> int | None:
        return len(self.plaintext)


@dataclass(frozen=True, slots=True, kw_only=True)
class Open(Work):
    """Decrypt, or unwrap a data key: the two differ in purpose and permission only."""

    envelope: bytes = field(repr=False)
    expect_key: str | None = None

    @property
    def size(self) -> int | None:
        return len(self.envelope)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decrypt(Open):
    op: ClassVar[str] = "decrypt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Unwrap(Open):
    op: ClassVar[str] = "unwrap_data_key"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewrap(Work):
    op: ClassVar[str] = "rewrap"
    envelope: bytes = field(repr=False)
    to_key: str | None = None
    to_context: Mapping[str, str] | None = None

    @property
    def size(self) -> int | None:
        return len(self.envelope)


@dataclass(frozen=True, slots=True, kw_only=True)
class MakeDataKey(Work):
    op: ClassVar[str] = "data_key"
    key: str
    length: int = 32
    with_plaintext: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Sign(Work):
    op: ClassVar[str] = "sign"
    key: str
    algorithm: str
    form: str = "der"
    message: bytes | None = field(default=None, repr=False)
    digest: bytes | None = field(default=None, repr=False)

    @property
    def size(self) -> int | None:
        return len(self.message or self.digest or b"")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verify(Sign):
    op: ClassVar[str] = "verify"
    signature: bytes = field(repr=False)
    version: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Mac(Work):
    op: ClassVar[str] = "mac"
    key: str
    algorithm: str
    message: bytes = field(repr=False)

    @property
    def size(self) -> int | None:
        return len(self.message)


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyMac(Mac):
    op: ClassVar[str] = "verify_mac"
    mac: bytes = field(repr=False)
    version: int | None = None


@dataclass(frozen=True, slots=True)
class Ciphertext:
    """An envelope and the key version that made it."""

    key: Key
    version: int
    suite: int
    envelope: bytes


@dataclass(frozen=True, slots=True)
class Plaintext:
    """What an envelope held. `data` is secret."""

    key: Key
    version: int
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class DataKey:
    """A wrapped data key and, if asked for, its bytes."""

    key: Key
    version: int
    envelope: bytes
    plaintext: bytes | None = field(repr=False)


@dataclass(frozen=True, slots=True)
class Rewrapped:
    """A ciphertext under its new key, version or context."""

    source: Key
    source_version: int
    made: Ciphertext


@dataclass(frozen=True, slots=True)
class Signature:
    """A signature or MAC and the version that made it."""

    key: Key
    version: int
    value: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Checked:
    """Whether a signature or MAC is right."""

    key: Key
    version: int
    valid: bool
