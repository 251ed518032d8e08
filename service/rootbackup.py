"""The drill of a root KEK's backup: does the token that was stored away open what the serving one made?

A backup that was never opened is a hope. Canaries of every kind and real rows, chosen at random, are used on both tokens
and must come out the same; nothing is changed on either.
"""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass

from keystore import Catalog, Hsm, Key, Keystore, difference
from keystore.hsm import Material, StoredKey
from keystore.pkcs11 import CeremonyRefused, Transcript, open_token
from service.compliance import spread
from service.config import Config
from service.database import migrate, open_engine
from service.wiring import bundle_at_start, serving_tokens, token_configs


def check_join(config: Config, name: str) -> None:
    """CeremonyRefused with the path if some key's material would leave its residency by the root KEK's coming to this token.

    BundleRefused if the policy in force, which says where the token is, cannot be told.
    """
    token = next((t for t in token_configs(config) if t.name == name), None)
    if token is None:
        raise CeremonyRefused(f"the configuration names no HSM {name!r}")
    engine = open_engine(config.database.url)
    try:
        migrate(engine, lock_dir=config.node.state_dir)
        bundle, _ = bundle_at_start(config, engine)
        kinds = [kind for kind, _ in Catalog(engine).placed(None)]
    finally:
        engine.dispose()
    if told := spread(bundle.registry, kinds, token.region, name):
        raise CeremonyRefused(
            f"{name}: material would leave its key's residency: {told}: keep the token elsewhere, or move those keys first"
        )


@dataclass(frozen=True, slots=True)
class Verified:
    """What the drill found. `wrong` names what differs, and how; empty: the backup opens everything that was tried."""

    hsm: str
    against: str
    canaries: int
    versions: int
    wrong: tuple[str, ...]


def verify(config: Config, name: str, *, sample: int, transcript: Transcript) -> Verified:
    """Try a backup token against the first serving token of its region: canaries, and `sample` keys of the database.

    CeremonyRefused, HsmUnavailable or SelfTestFailed with the reason.
    """
    backup = next((t for t in token_configs(config) if t.name == name), None)
    if backup is None:
        raise CeremonyRefused(f"the configuration names no HSM {name!r}")
    serving = next((t for t in serving_tokens(config) if t.region == backup.region and t.name != name), None)
    if serving is None:
        raise CeremonyRefused(f"no other HSM of region {backup.region} is there to compare {name} with")
    check_join(config, name)
    source = open_token(serving)
    target = open_token(backup)
    engine = open_engine(config.database.url)
    try:
        migrate(engine, lock_dir=config.node.state_dir)
        catalog = Catalog(engine)
        version = next((row.version for row in catalog.roots() if row.region == backup.region), 1)
        source.use_root(version)
        target.use_root(version)
        store = Keystore(
            catalog,
            {backup.region: source},
            installation=config.node.installation,
            clock=lambda: time.time_ns() // 1_000,
        )
        wrong, canaries = [], 0
        for material in Material:
            if source.missing(material) is None and not material.startswith("TRANSPORT"):
                canaries += 1
                if told := difference(source, target, _canary(source, material)):
                    wrong.append(f"canary {material}: {told}")
        versions = 0
        for key in _some(catalog, backup.region, sample):
            for number, stored in store.stored_versions(key):
                versions += 1
                if told := difference(source, target, stored):
                    wrong.append(f"{key.id}/{number}: {told}")
    finally:
        engine.dispose()
        source.close()
        target.close()
    transcript.add("verified", hsm=name, against=serving.name, canaries=canaries, versions=versions, wrong=wrong)
    return Verified(name, serving.name, canaries, versions, tuple(wrong))


def _canary(hsm: Hsm, material: Material) -> StoredKey:
    object_id = uuid.uuid4()
    made = hsm.generate(material, object_id)
    binding = b"skms/backup/canary" + object_id.bytes + made.blob
    return StoredKey(
        *(object_id, material, made.blob, made.mechanism, made.kek, made.public),
        *(binding, hsm.row_mac(binding)),
    )


def _some(catalog: Catalog, region: str, sample: int) -> list[Key]:
    """Keys at random places of the region."""
    found: dict[uuid.UUID, Key] = {}
    for _ in range(sample):
        for key in catalog.region_keys(region, after=uuid.uuid4(), limit=1):
            found[key.id] = key
    for key in catalog.region_keys(region, after=None, limit=sample):
        if len(found) >= sample:
            break
        found[key.id] = key
    return list(found.values())
