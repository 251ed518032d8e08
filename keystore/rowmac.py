"""What the row MACs cover. Key wrap has no AAD: without a MAC two swapped rows encrypt under another tenant's key.

Every field is length-prefixed, so no two rows share an encoding. The key row covers each of its versions by the hash of
that version's row: one MAC, one call to the HSM, says that a key and all its versions are what the service wrote. An old
version row put back (a revoked version made usable again) no longer fits.

Format 1, of the first release, gave each version a MAC of its own and had the key row cover those. Such rows are still
read; they become format 2 with their next change. Which format a row has shows in its versions: with or without a MAC.
"""

from __future__ import annotations

import hashlib
import json
import struct
import uuid
from typing import Final

from keystore.hsm import Material, RowDamaged
from keystore.key import Key, KeyUsage, KeyVersion

_KEY_LABEL_1: Final = b"skms/row/key/1"
_KEY_LABEL: Final = b"skms/row/key/2"
_VERSION_LABEL: Final = b"skms/row/version/1"
_SECRET_LABEL: Final = b"skms/row/tenant-secret/1"
_HSM_LABEL: Final = b"skms/row/hsm/1"
_ROOT_LABEL: Final = b"skms/row/root-kek/1"
_AUDIT_KEY_LABEL: Final = b"skms/row/audit-key/1"


def encode(label: bytes, *fields: bytes | str | int | None) -> bytes:
    """Label and fields, each with its length; None is another field than an empty one."""
    out = [struct.pack(">I", len(label)), label]
    for value in fields:
        raw = b"\0" if value is None else b"\1" + (value if isinstance(value, bytes) else str(value).encode())
        out += [struct.pack(">I", len(raw)), raw]
    return b"".join(out)


def _set(values: frozenset[str]) -> str:
    return json.dumps(sorted(values))


def has_version_macs(key: Key) -> bool:
    """Whether the row is of format 1; RowDamaged if only some of its versions carry a MAC."""
    carrying = [bool(v.mac) for v in key.versions]
    if any(carrying) and not all(carrying):
        raise RowDamaged(f"row of key {key.id} was changed outside the service: versions of two formats")
    return any(carrying)


def key_row(key: Key, material: Material) -> bytes:
    """Everything that gives a key its meaning: owner, kind, places, purposes, state, fences, versions."""
    places = (key.residency, key.execution, key.reach, key.egress, key.failover, key.shared_with)
    first = has_version_macs(key)
    versions = (
        (v.mac for v in key.versions)
        if first
        else (hashlib.sha256(version_row(key.tenant, key.id, material, key.usage, v)).digest() for v in key.versions)
    )
    return encode(
        _KEY_LABEL_1 if first else _KEY_LABEL,
        *(key.id.bytes, key.tenant, key.spec, key.usage, key.suite, key.tier, key.home),
        *(_set(p) for p in places),
        json.dumps(list(key.purposes)),
        *(key.state, key.kv, key.created_at, key.updated_at, key.origin, int(key.non_exportable)),
        *(key.description, json.dumps(dict(key.tags), sort_keys=True)),
        *(key.rotation.max_age, key.rotation.max_uses),
        *(key.min_decrypt_version, key.min_encrypt_version, key.delete_at, len(key.versions)),
        *versions,
    )


def version_row(tenant: str, key_id: uuid.UUID, material: Material, usage: KeyUsage, version: KeyVersion) -> bytes:
    """What a wrapped blob is, whose, and in which state."""
    return encode(
        _VERSION_LABEL,
        *(tenant, key_id.bytes, version.number, material, usage, version.state, version.created_at),
        *(version.object_id.bytes, version.kek.bytes, version.mechanism, version.blob, version.public),
        *_imported(version),
    )


def _imported(version: KeyVersion) -> tuple[str | int | None, ...]:
    """A block of its own for imported material; nothing otherwise, so that rows from before it stay as they are."""
    known = version.imported
    return () if known is None else ("imported", known.path, known.expires_at)


def secret_row(
    tenant: str, generation: int, region: str, object_id: uuid.UUID, mechanism: str, kek: uuid.UUID, blob: bytes
) -> bytes:
    """A tenant's wrapped audit key."""
    return encode(_SECRET_LABEL, tenant, generation, region, object_id.bytes, mechanism, kek.bytes, blob)


def hsm_row(name: str, region: str, admin: str, changed_at: int) -> bytes:
    """What operators want of an HSM."""
    return encode(_HSM_LABEL, name, region, admin, changed_at)


def root_row(region: str, version: int, changed_at: int) -> bytes:
    """Which version of a region's root KEK new keys are wrapped under."""
    return encode(_ROOT_LABEL, region, version, changed_at)


def audit_key_row(region: str, hsm: str, public: bytes, since: int) -> bytes:
    """An audit key that HSMs of the region have vouched for."""
    return encode(_AUDIT_KEY_LABEL, region, hsm, public, since)
