"""What the row MACs cover. Key wrap has no AAD: without a MAC two swapped rows encrypt under another tenant's key.

Every field is length-prefixed, so no two rows share an encoding. The key row covers the MACs of its versions too: an
old version row put back with its once right MAC (a revoked version made usable again) no longer fits the key row.
"""

from __future__ import annotations

import json
import struct
import uuid
from typing import Final

from keystore.hsm import Material
from keystore.key import Key, KeyUsage, KeyVersion

_KEY_LABEL: Final = b"skms/row/key/1"
_VERSION_LABEL: Final = b"skms/row/version/1"
_SECRET_LABEL: Final = b"skms/row/tenant-secret/1"


def _encode(label: bytes, *fields: bytes | str | int | None) -> bytes:
    out = [struct.pack(">I", len(label)), label]
    for value in fields:
        raw = b"\0" if value is None else b"\1" + (value if isinstance(value, bytes) else str(value).encode())
        out += [struct.pack(">I", len(raw)), raw]
    return b"".join(out)


def _set(values: frozenset[str]) -> str:
    return json.dumps(sorted(values))


def key_row(key: Key) -> bytes:
    """Everything that gives a key its meaning: owner, kind, places, purposes, state, fences."""
    places = (key.residency, key.execution, key.reach, key.egress, key.failover, key.shared_with)
    return _encode(
        _KEY_LABEL,
        *(key.id.bytes, key.tenant, key.spec, key.usage, key.suite, key.tier, key.home),
        *(_set(p) for p in places),
        json.dumps(list(key.purposes)),
        *(key.state, key.kv, key.created_at, key.updated_at, key.origin, int(key.non_exportable)),
        *(key.description, json.dumps(dict(key.tags), sort_keys=True)),
        *(key.rotation.max_age, key.rotation.max_uses),
        *(key.min_decrypt_version, key.min_encrypt_version, key.delete_at, len(key.versions)),
        *(v.mac for v in key.versions),
    )


def version_row(tenant: str, key_id: uuid.UUID, material: Material, usage: KeyUsage, version: KeyVersion) -> bytes:
    """What a wrapped blob is, whose, and in which state."""
    return _encode(
        _VERSION_LABEL,
        *(tenant, key_id.bytes, version.number, material, usage, version.state, version.created_at),
        *(version.object_id.bytes, version.kek.bytes, version.mechanism, version.blob, version.public),
    )


def secret_row(
    tenant: str, generation: int, region: str, object_id: uuid.UUID, mechanism: str, kek: uuid.UUID, blob: bytes
) -> bytes:
    """A tenant's wrapped audit key."""
    return _encode(_SECRET_LABEL, tenant, generation, region, object_id.bytes, mechanism, kek.bytes, blob)
