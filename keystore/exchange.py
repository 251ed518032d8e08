"""Exchange of one HSM for another of its group: proof, key version by key version, that the new one can do it all."""

from __future__ import annotations

import hmac
import os
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from sqlalchemy import Connection

from keystore.catalog import Catalog
from keystore.group import Admin, HsmGroup
from keystore.hsm import (
    Hsm,
    HsmEmpty,
    HsmFault,
    HsmUnavailable,
    InvalidCiphertext,
    Material,
    RowDamaged,
    SignScheme,
    StoredKey,
    UnsupportedByHsm,
)
from keystore.key import Key
from keystore.store import Keystore, material_of, verify_raw

_CANARY: Final = b"skms/exchange/canary/1"
_HASHES: Final[Mapping[Material, str]] = MappingProxyType(
    {
        Material.KDK_512: "sha512",
        Material.KDK_256: "sha256",
        Material.HMAC_512: "sha512",
        Material.HMAC_256: "sha256",
    }
)
_SCHEMES: Final[Mapping[Material, tuple[SignScheme, int]]] = MappingProxyType(
    {
        Material.EC_P256: (SignScheme.ECDSA_SHA_256, 32),
        Material.EC_P384: (SignScheme.ECDSA_SHA_384, 48),
        Material.ED25519: (SignScheme.ED25519, 32),
        Material.RSA_3072: (SignScheme.RSA_PSS_SHA_256, 32),
        Material.RSA_4096: (SignScheme.RSA_PSS_SHA_256, 32),
    }
)


@dataclass(frozen=True, slots=True)
class Proof:
    """What was found of one key version: nothing wrong, or why the new HSM cannot take it over."""

    tenant: str
    key: uuid.UUID
    number: int  # 0: the tenant's audit key
    wrong: str = ""


class Exchange:
    """Whether `target` can take over every key of its region from `source`. Both are members of one group."""

    def __init__(self, catalog: Catalog, keystore: Keystore, group: HsmGroup, source: str, target: str) -> None:
        self._catalog, self._keystore, self._group = catalog, keystore, group
        self.source, self.target = source, target

    def check(self) -> int:
        """How many key versions there are to prove.

        HsmUnavailable unless both HSMs are up and serve; UnsupportedByHsm with kinds and counts of keys that the target
        cannot hold.
        """
        for name in (self.source, self.target):
            self._group.on(name)
            if self._group.member(name).admin is Admin.DRAINED:
                raise HsmUnavailable(f"HSM {name} is drained: undrain it first")
        lacking: Counter[str] = Counter()
        total = 0
        for spec, suite, _, count in self._catalog.region_inventory(self._group.region):
            total += count
            reason = self._group.on(self.target).missing(material_of(spec, suite))
            if reason is not None:
                lacking[reason] += count
        if lacking:
            told = "; ".join(f"{count} key versions: {reason}" for reason, count in sorted(lacking.items()))
            raise UnsupportedByHsm(f"HSM {self.target} cannot take over from {self.source}: {told}")
        return total

    def epoch(self) -> int:
        """The number of changes so far: what changes after it is proven again."""
        return self._catalog.epoch()

    def secrets(self) -> list[Proof]:
        """Prove the tenants' audit keys."""
        region = self._group.region
        return [
            self._proven(tenant, key.object_id, 0, key)
            for tenant in self._catalog.region_secrets(region)
            for key in self._keystore.tenant_secret_keys(tenant, region)
        ]

    def chunk(self, after: uuid.UUID | None, limit: int) -> tuple[list[Proof], uuid.UUID | None]:
        """(proofs of the versions of the next keys, the last of these keys); None at the end."""
        keys = self._catalog.region_keys(self._group.region, after=after, limit=limit)
        return self._of(keys), keys[-1].id if keys else None

    def changed(self, epoch: int) -> list[Proof]:
        """Prove the keys that were made or changed after an epoch."""
        keys = self._catalog.changed_since(epoch)
        return self._of(k for k in keys if k.home == self._group.region)

    def open_changes(self, c: Connection, epoch: int) -> int:
        """How many keys of the region changed after an epoch, as a transaction sees it."""
        return self._catalog.changes_of(c, self._group.region, epoch)

    def _of(self, keys: Iterable[Key]) -> list[Proof]:
        found: list[Proof] = []
        for key in keys:
            try:
                stored: Sequence[tuple[int, StoredKey]] = self._keystore.stored_versions(key)
            except RowDamaged:
                found.append(Proof(key.tenant, key.id, key.latest.number, "row_damaged"))
                continue
            found += [self._proven(key.tenant, key.id, number, one) for number, one in stored]
        return found

    def _proven(self, tenant: str, key: uuid.UUID, number: int, stored: StoredKey) -> Proof:
        source, target = self._group.on(self.source), self._group.on(self.target)
        return Proof(tenant, key, number, difference(source, target, stored))


def difference(source: Hsm, target: Hsm, key: StoredKey) -> str:
    """How a key differs on two HSMs: "" if both do the same with it."""
    try:
        return "" if _same(source, target, key) else "differs"
    except (HsmEmpty, RowDamaged, HsmFault, InvalidCiphertext, UnsupportedByHsm) as error:
        return type(error).__name__


def _same(source: Hsm, target: Hsm, key: StoredKey) -> bool:
    """Whether the target does with a key what the source does, or what its public key asks for."""
    if key.material in _HASHES:
        name = _HASHES[key.material]
        return hmac.compare_digest(source.hmac(key, name, _CANARY), target.hmac(key, name, _CANARY))
    if key.material is Material.AES_256:
        # Two messages of the key's 2^32: counted nowhere, and far below the margin of its limit.
        there, back = source.gcm_seal(key, _CANARY, _CANARY), target.gcm_seal(key, _CANARY, _CANARY)
        opened = target.gcm_open(key, there[0], _CANARY, there[1]), source.gcm_open(key, back[0], _CANARY, back[1])
        return opened == (_CANARY, _CANARY)
    scheme, length = _SCHEMES[key.material]
    data = os.urandom(length)
    return verify_raw(key.public, scheme, data, target.sign(key, scheme, data))
