"""Keys in use: each in the HSM of its own region, never another.

Reading never calls an HSM. Before the first use of a row its MAC is checked; before the first unwrap of a version the
HSM checks that version's MAC. Changes are plans: nothing is changed until a plan's `write` commits, in the transaction
of the record that reports it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import hmac
import os
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType, TracebackType
from typing import Any, Final, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa, utils
from cryptography.hazmat.primitives.serialization import load_der_public_key
from sqlalchemy import Connection

from keystore import envelope as ev
from keystore import rowmac
from keystore.catalog import Catalog, ListFilter, Located, Placed, SecretRow, Uses
from keystore.envelope import Envelope, Purpose
from keystore.hsm import (
    Hsm,
    HsmFault,
    HsmStatus,
    HsmUnavailable,
    Importer,
    InvalidCiphertext,
    Material,
    RowDamaged,
    SignScheme,
    StoredKey,
    UnsupportedByHsm,
    Wrapped,
)
from keystore.key import (
    API_STATE,
    EXTERNAL,
    TRANSITIONS,
    USAGE_OF_SPEC,
    AlgorithmMismatch,
    DigestLength,
    InputRefused,
    Key,
    KeyDestroyed,
    KeyLimitReached,
    KeyNotFound,
    KeySpec,
    KeyState,
    KeyUsage,
    KeyVersion,
    Rotation,
    UsageMismatch,
    VersionFenced,
    WrongState,
)

MIN_WAIT_S: Final = 7 * 86_400
MAX_WAIT_S: Final = 90 * 86_400
STRICT_LIMIT: Final = 3_865_470_566  # encryptions under one key with random IVs (SP 800-38D; 90 % of 2^32)
_STRICT_BLOCK: Final = 2**20
STRICT_ROTATE: Final = STRICT_LIMIT - 64 * _STRICT_BLOCK  # rotate while 64 workers may each still hold a lease
_BLOCK: Final = 1_024
_LEASES_PER_ROTATION: Final = 64  # a rotation by count comes at most 1/64 too early for each worker
_DATA_KEY: Final = range(16, 65)  # bytes
_DRAW: Final = 1_024  # random bytes that a batch asks the HSM for at a time
_CACHE: Final = 20_000  # key rows held in memory

_SCHEMES: Final[Mapping[KeySpec, frozenset[str]]] = MappingProxyType(
    {
        KeySpec.EC_P256: frozenset({"ECDSA_SHA_256"}),
        KeySpec.EC_P384: frozenset({"ECDSA_SHA_384"}),
        KeySpec.ED25519: frozenset({"ED25519"}),
        KeySpec.RSA_3072: frozenset(s for s in SignScheme if s.startswith("RSA_")),
        KeySpec.RSA_4096: frozenset(s for s in SignScheme if s.startswith("RSA_")),
    }
)
_MACS: Final[Mapping[KeySpec, tuple[str, str]]] = MappingProxyType(
    {KeySpec.HMAC_256: ("HMAC_SHA_256", "sha256"), KeySpec.HMAC_512: ("HMAC_SHA_512", "sha512")}
)
_HASHES: Final[Mapping[str, hashes.HashAlgorithm]] = MappingProxyType(
    {"256": hashes.SHA256(), "384": hashes.SHA384(), "512": hashes.SHA512()}
)
IMPORTABLE: Final = frozenset(KeySpec) - {KeySpec.ED25519}
_HALF: Final[Mapping[KeySpec, int]] = MappingProxyType({KeySpec.EC_P256: 32, KeySpec.EC_P384: 48})


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that is to be made. All places are regions."""

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
    purposes: tuple[str, ...]
    description: str = ""
    tags: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    rotation: Rotation = field(default_factory=Rotation)
    origin: str = "hsm"  # or EXTERNAL: then it has no version before the first import

    @classmethod
    def of(cls, *, spec: KeySpec, usage: KeyUsage | None, suite: int | None, **facts: Any) -> NewKey:
        """Fill in what the spec implies; InputRefused where the request contradicts it."""
        external = facts.get("origin") == EXTERNAL
        implied = USAGE_OF_SPEC[spec]
        if usage not in {None, implied}:
            raise InputRefused("/usage", "not_for_spec", f"{spec} keys are for {implied}")
        if implied is not KeyUsage.ENCRYPT:
            if suite is not None:
                raise InputRefused("/suite", "not_for_spec", "only encryption keys have a suite")
            suite = 0
        elif external:
            suite = ev.IMPORTED if suite is None else suite
            if suite not in {ev.IMPORTED, ev.SINGLE}:
                # 0x0002 commits to the context only where nobody knows the key.
                raise InputRefused("/suite", "not_for_imported", "0x0005 for 32 bytes, 0x0001 for 64 bytes")
        elif suite is None:
            suite = ev.SINGLE
        elif suite not in {ev.SINGLE, ev.STRICT}:
            raise InputRefused("/suite", "unknown", "0x0001 or 0x0002; 0x0005 is for imported keys")
        if external and spec not in IMPORTABLE:
            raise InputRefused("/spec", "not_importable", "importable: " + ", ".join(sorted(IMPORTABLE)))
        if external and facts["rotation"] != Rotation():
            raise InputRefused("/rotation", "not_for_imported", "an imported key gets new versions by import only")
        if len(set(facts["purposes"])) != len(facts["purposes"]):
            raise InputRefused("/purposes", "repeated", "each purpose once")
        tags = MappingProxyType(dict(facts.pop("tags", {})))
        return cls(spec=spec, usage=implied, suite=suite, tags=tags, **facts)

    @property
    def material(self) -> Material:
        """What is made in the token."""
        return material_of(self.spec, self.suite)

    def parameters(self) -> dict[str, object]:
        """The request as it stands in the intent's hash."""
        shown: dict[str, object] = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            match value:
                case frozenset():
                    shown[f.name] = sorted(value)
                case Mapping():
                    shown[f.name] = dict(value)
                case _:
                    shown[f.name] = str(value)
        return shown


FENCES: Final = ("min_decrypt_version", "min_encrypt_version")


def _fence_fits(key: Key, name: str, fence: int | None) -> None:
    if fence is not None and not 1 <= fence <= key.latest_number:
        raise InputRefused(f"/{name}", "out_of_range", "a fence lies between 1 and the latest version")


@dataclass(frozen=True, slots=True)
class Bounds:
    """What bounds the use of a key, or new values of some of it; None leaves one as it is. All places are regions.

    The fences (`min_…_version`) are the oldest versions that open and protect.
    """

    tier: int | None = None
    residency: frozenset[str] | None = None
    execution: frozenset[str] | None = None
    reach: frozenset[str] | None = None
    egress: frozenset[str] | None = None
    failover: frozenset[str] | None = None
    purposes: tuple[str, ...] | None = None
    min_decrypt_version: int | None = None
    min_encrypt_version: int | None = None

    @classmethod
    def of(cls, key: Key) -> Bounds:
        """All that bounds a key now."""
        return cls(**{f.name: getattr(key, f.name) for f in dataclasses.fields(cls)})

    def shown(self) -> dict[str, Any]:
        """The new values as JSON, sets in order."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            name: sorted(value) if isinstance(value, frozenset) else list(value) if isinstance(value, tuple) else value
            for name, value in found.items()
            if value is not None
        }

    def on(self, key: Key) -> Key:
        """The key with these bounds, not yet under a MAC. InputRefused, KeyDestroyed."""
        if key.state is KeyState.DESTROYED:
            raise KeyDestroyed(f"key {key.id} was destroyed")
        if self.residency is not None and not self.residency <= key.residency:
            raise InputRefused("/residency", "widens", "residency never widens: make a key there and rewrap")
        if self.purposes is not None and len(set(self.purposes)) != len(self.purposes):
            raise InputRefused("/purposes", "repeated", "each purpose once")
        for name in FENCES:
            _fence_fits(key, name, getattr(self, name))
        bounded = dataclasses.replace(key, **{name: getattr(self, name) for name in self.shown()})
        if bounded == key:
            raise InputRefused("", "unchanged", "name at least one new value")
        return bounded


@dataclass(frozen=True, slots=True)
class Plan:
    """A change that is ready: `write` makes it durable, `applied` makes this process see it at once."""

    key: Key | None
    write: Callable[[Connection], None]
    applied: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Sealed:
    """A ciphertext and what made it."""

    ciphertext: bytes
    version: int
    suite: int


def material_of(spec: KeySpec, suite: int) -> Material:
    """The kind of object a spec needs in the token."""
    if spec is KeySpec.AES_256:
        return {ev.STRICT: Material.AES_256, ev.IMPORTED: Material.KDK_256}.get(suite, Material.KDK_512)
    return Material(str(spec))


def check_use(key: Key, number: int, direction: Literal["protect", "process"], *, now: int) -> None:
    """Whether state, fences and expiry let a version protect or process; the stricter of key and version counts.

    `now` is in microseconds. Raises KeyDestroyed, WrongState or VersionFenced.
    """
    if key.state is KeyState.DESTROYED:
        raise KeyDestroyed(f"key {key.id} was destroyed")
    usable = {KeyState.ACTIVE} if direction == "protect" else {KeyState.ACTIVE, KeyState.DEACTIVATED}
    if key.state not in usable or key.delete_at is not None:
        raise WrongState(key.id, key.api_state)
    version = key.version(number)
    fence = key.min_decrypt_version
    if direction == "protect":  # nothing is sealed that could not be opened again
        fence = max(fence, key.min_encrypt_version)
    if number < fence or version.state is not KeyState.ACTIVE:
        raise VersionFenced(f"version {number} of key {key.id} is fenced or revoked")
    if expired(version, now):
        raise WrongState(key.id, API_STATE[KeyState.SUSPENDED])


def expired(version: KeyVersion, now: int) -> bool:
    """Whether imported material has reached the end that its owner gave it."""
    end = None if version.imported is None else version.imported.expires_at
    return end is not None and end <= now


def _key_id(name: str) -> uuid.UUID:
    try:
        key_id = uuid.UUID(name)
    except ValueError:
        raise KeyNotFound("no such key") from None
    if str(key_id) != name:
        raise KeyNotFound("no such key")
    return key_id


def _block(key: Key, number: int, least: int = 1) -> Uses:
    """How many uses of a version are counted at a time, at least what waits for them."""
    strict = key.suite == ev.STRICT
    block = _STRICT_BLOCK if strict else _BLOCK
    if key.rotation.max_uses is not None:
        block = max(1, min(block, key.rotation.max_uses // _LEASES_PER_ROTATION))
    return Uses(key.id, number, max(block, least), STRICT_LIMIT if strict else None)


@dataclass(slots=True)
class _Genuine:
    """A key row whose MAC was right, and those of its versions that were used, ready for the HSM."""

    key: Key
    row: bytes
    stored: dict[int, StoredKey] = field(default_factory=dict)


@dataclass(slots=True)
class _Lease:
    """Uses of one version that are committed in the database and not yet made."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    left: int = 0


def outdate_counts(connection: Connection) -> None:
    """A restored database may have counted fewer nonces than were used: keys whose suite counts them rotate (SP 800-38D)."""
    Catalog.raise_uses(connection, ev.STRICT, STRICT_ROTATE)


class Keystore:
    """The keys of one installation. Thread-safe."""

    def __init__(
        self,
        catalog: Catalog,
        hsms: Mapping[str, Hsm],
        *,
        installation: uuid.UUID,
        clock: Callable[[], int],
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._catalog, self._hsms, self._clock, self._random = catalog, dict(hsms), clock, random
        self._installation = installation
        self._lock = threading.Lock()  # guards the maps below; never held during a call to database or HSM
        self._keys: dict[uuid.UUID, Key] = {}
        self._aliases: dict[tuple[str, str], uuid.UUID] = {}
        self._genuine: dict[uuid.UUID, _Genuine] = {}
        self._generation = 0  # rises when cached rows may have become old; what was read before is not cached after
        catalog.prepare()
        self._epoch = catalog.epoch()
        self._leases: dict[uuid.UUID, _Lease] = {}
        self._secrets: dict[str, tuple[int, bytes]] = {}
        self._secrets_lock = threading.Lock()

    # ---- reading: no HSM call ----------------------------------------------------------------------------------

    @property
    def regions(self) -> frozenset[str]:
        """Regions with an HSM here."""
        return frozenset(self._hsms)

    def find(self, tenant: str, name: str) -> Key:
        """A tenant's key by UUID or `alias/<name>`; KeyNotFound for unknown, malformed and foreign alike."""
        key = self.by_id(self._id_of(tenant, name))
        if key.tenant != tenant:
            raise KeyNotFound("no such key")
        return key

    def at_hand(self, tenant: str, name: str) -> Key | None:
        """What `find` answers, or None if it has to ask the database. KeyNotFound as there."""
        alias = name.removeprefix("alias/")
        key_id = _key_id(name) if alias == name else self._aliases.get((tenant, alias))
        key = None if key_id is None else self._keys.get(key_id)
        if key is not None and key.tenant != tenant:
            raise KeyNotFound("no such key")
        return key

    def by_id_at_hand(self, key_id: uuid.UUID) -> Key | None:
        """What `by_id` answers, or None if it has to ask the database."""
        return self._keys.get(key_id)

    def _id_of(self, tenant: str, name: str) -> uuid.UUID:
        if not name.startswith("alias/"):
            return _key_id(name)
        slot = (tenant, name.removeprefix("alias/"))
        found = self._aliases.get(slot)
        if found is None:
            generation = self._generation
            found = self._catalog.alias(*slot)
            with self._lock:
                if generation == self._generation:
                    if len(self._aliases) >= _CACHE:
                        self._aliases.clear()
                    self._aliases[slot] = found
        return found

    def by_id(self, key_id: uuid.UUID) -> Key:
        """A key by id, whoever owns it: the caller compares the tenant. KeyNotFound if there is none."""
        key = self._keys.get(key_id)
        if key is not None:
            return key
        generation = self._generation
        key = self._catalog.key(key_id)
        with self._lock:
            # A change that became visible while we read makes what we read old news: do not keep it.
            if generation == self._generation:
                if len(self._keys) >= _CACHE:
                    self._keys.clear()
                self._keys[key_id] = key
        return key

    def current(self, key: Key) -> bool:
        """Whether this value is what the catalog holds, as far as this process knows. Memory only."""
        known = self._keys.get(key.id)
        return known is key or (known is not None and known.kv == key.kv)

    def list(self, tenant: str, *, filters: ListFilter, after: uuid.UUID | None, limit: int) -> list[Key]:
        """Up to `limit` keys of a tenant, in the order of ids."""
        return self._catalog.keys(tenant, filters, after=after, limit=limit)

    def placed(self, tenant: str | None) -> Sequence[tuple[Placed, int]]:
        """The different places of keys that are not destroyed, a tenant's or (None) everybody's, and how many have them."""
        return self._catalog.placed(tenant)

    def located(self, wanted: Sequence[Placed], *, after: str | None, limit: int) -> Sequence[Located]:
        """Up to `limit` keys after an id that are not destroyed and have one of these places, in the order of ids."""
        return self._catalog.located(wanted, after=after, limit=limit)

    def aliases(self, tenant: str, *, after: str | None, limit: int) -> Sequence[tuple[str, uuid.UUID]]:
        """Up to `limit` aliases of a tenant, in the order of names."""
        return self._catalog.aliases(tenant, after=after, limit=limit)

    def poll(self) -> bool:
        """Notice what other workers changed. Their changes count from here on, at the latest."""
        seen, epoch = self._epoch, self._catalog.epoch()
        if epoch == seen:
            return False
        changed = self._catalog.changed_since(seen)
        with self._lock:
            self._generation += 1
            self._keys.clear()
            self._aliases.clear()
            self._epoch = epoch
        for key in changed:
            self._evict(key)
        return True

    def due_rotations(self, now: int) -> Sequence[Key]:
        """Keys of this node's regions whose newest version is too old or used too often."""
        return self._catalog.rotations_due(now, homes=self.regions, strict=(ev.STRICT, STRICT_ROTATE))

    def due_expiries(self, now: int) -> Sequence[Key]:
        """Enabled keys of this node's regions whose newest material was imported with an end that has come."""
        return self._catalog.expiries_due(now, homes=self.regions)

    def due_deletions(self, now: int) -> Sequence[Key]:
        """Keys of this node's regions whose waiting time is over."""
        return self._catalog.deletions_due(now, homes=self.regions)

    def hsm_status(self) -> Sequence[HsmStatus]:
        """The state of every HSM of this node."""
        return [hsm.status() for hsm in self._hsms.values()]

    # ---- data plane: after a decision ----------------------------------------------------------------------------

    def seal(
        self,
        key: Key,
        plaintext: bytes,
        context: Mapping[str, str],
        *,
        purpose: Purpose = Purpose.ENCRYPT,
        version: int | None = None,
    ) -> Sealed:
        """Encrypt under the key's suite. Raises ContextRefused, UsageMismatch and what `check_use` raises."""
        number, stored = self._prepare_seal(key, plaintext, context, purpose, version)
        if key.suite == ev.STRICT:
            return self._seal_strict(key, number, stored, plaintext, context, purpose)
        noise = self._random(44)
        salt, iv = noise[:32], noise[32:]
        suite = key.suite
        aad = self._aad(key, number, suite, purpose, context)
        secret = self._hsm(key.home).hmac(stored, ev.HASH_OF[suite], ev.single_input(salt, aad, suite))
        derived = ev.single_keys(secret, suite)
        return _sealed(key, number, suite, purpose, salt, b"", iv, derived, plaintext, aad)

    def open(self, key: Key, envelope: Envelope, context: Mapping[str, str], *, purpose: Purpose) -> bytes:
        """The plaintext; one InvalidCiphertext for whatever is wrong with the envelope."""
        stored = self._prepare_open(key, envelope, purpose)
        aad = self._aad(key, envelope.version, envelope.suite, purpose, context)
        hsm = self._hsm(key.home)
        if envelope.suite == ev.STRICT:
            data = hsm.gcm_open(stored, envelope.iv, hashlib.sha256(aad).digest(), envelope.sealed)
            if not hmac.compare_digest(data[:32], ev.COMMITMENT):
                raise InvalidCiphertext
            return data[32:]
        suite = envelope.suite
        if suite == key.suite:
            secret = hsm.hmac(stored, ev.HASH_OF[suite], ev.single_input(envelope.salt, aad, suite))
            derived = ev.single_keys(secret, suite)
        else:
            secret = hsm.hmac(stored, ev.HASH_OF[suite], ev.batch_input(envelope.salt, suite))
            derived = ev.item_keys(secret, envelope.index, aad)
        return ev.open_with(derived, envelope, aad)

    def batch(self) -> Batch:
        """Seal and open many: one derivation for each key, version and salt."""
        return Batch(self)

    def sign(
        self,
        key: Key,
        algorithm: str,
        *,
        message: bytes | None = None,
        digest: bytes | None = None,
        form: str = "der",
        version: int | None = None,
    ) -> tuple[bytes, int]:
        """(signature, version). ECDSA as DER or raw r||s by `form`."""
        number = key.latest_number if version is None else version
        self._for(key, KeyUsage.SIGN)
        self._usable(key, number, "protect")
        scheme, data = _signed_data(key, algorithm, message, digest, form)
        stored = self._stored(key, number)
        self._count(key, number)
        raw = self._hsm(key.home).sign(stored, scheme, data)
        if key.spec in _HALF and form == "der":
            half = _HALF[key.spec]
            raw = utils.encode_dss_signature(int.from_bytes(raw[:half], "big"), int.from_bytes(raw[half:], "big"))
        return raw, number

    def verify(
        self,
        key: Key,
        signature: bytes,
        algorithm: str,
        *,
        message: bytes | None = None,
        digest: bytes | None = None,
        form: str = "der",
        version: int | None = None,
    ) -> bool:
        """Whether a signature is right, in software under the public key of the MAC'd row."""
        number = key.latest_number if version is None else version
        self._for(key, KeyUsage.SIGN)
        self._usable(key, number, "process")
        scheme, data = _signed_data(key, algorithm, message, digest, form)
        return verify_signature(key.spec, self.public_key(key, number), scheme, data, signature, form)

    def mac(self, key: Key, message: bytes, algorithm: str, *, version: int | None = None) -> tuple[bytes, int]:
        """(HMAC, version)."""
        number = key.latest_number if version is None else version
        name = self._mac_name(key, algorithm, message)
        self._usable(key, number, "protect")
        stored = self._stored(key, number)
        self._count(key, number)
        return self._hsm(key.home).hmac(stored, name, message), number

    def verify_mac(self, key: Key, message: bytes, value: bytes, algorithm: str, *, version: int | None = None) -> bool:
        """Whether an HMAC is right: computed again and compared in constant time.

        Never by C_Verify: one vendor answers a wrong HMAC as if the device had failed.
        """
        number = key.latest_number if version is None else version
        name = self._mac_name(key, algorithm, message)
        self._usable(key, number, "process")
        made = self._hsm(key.home).hmac(self._stored(key, number), name, message)
        return hmac.compare_digest(made, value)

    def public_key(self, key: Key, version: int | None = None) -> bytes:
        """SubjectPublicKeyInfo (DER) of a signing key's version."""
        self._for(key, KeyUsage.SIGN)
        if key.state is KeyState.DESTROYED:
            raise KeyDestroyed(f"key {key.id} was destroyed")
        return self._stored(key, key.latest.number if version is None else version).public

    def random(self, region: str, length: int) -> bytes:
        """Random bytes from the HSM of a region."""
        return self._hsm(region).random(length)

    # ---- tenants' audit keys -------------------------------------------------------------------------------------

    def has_tenant_secret(self, tenant: str) -> bool:
        """Whether the tenant's audit key was made already, by an HSM of this node."""
        return self._held(self._catalog.secrets(tenant)) is not None

    def tenant_secret(self, tenant: str) -> tuple[int, bytes]:
        """(generation, 32 bytes) of a tenant's audit key, made on first use.

        The bytes are an HMAC under the wrapped key, which itself never leaves the HSM. Generations that only the HSM
        of another node can open stay that node's; this node makes its own and names it in its records.
        """
        with self._secrets_lock:
            if tenant not in self._secrets:
                self._secrets[tenant] = self._load_secret(tenant)
            return self._secrets[tenant]

    def _load_secret(self, tenant: str) -> tuple[int, bytes]:
        rows = self._catalog.secrets(tenant)
        for _ in range(5):  # another node may take the number that we wanted
            held = self._held(rows)
            if held is not None:
                row, hsm = held
                return row.generation, hsm.hmac(stored_secret(row), "sha256", b"skms/audit-context/v1")
            self._catalog.insert_secret(self._new_secret(tenant, 1 + max((r.generation for r in rows), default=0)))
            rows = self._catalog.secrets(tenant)
        raise HsmUnavailable(f"no audit key of tenant {tenant} could be stored")

    def _held(self, rows: Sequence[SecretRow]) -> tuple[SecretRow, Hsm] | None:
        """The newest row that an HSM of this node made."""
        return next(((row, self._hsms[row.region]) for row in rows if row.region in self._hsms), None)

    def _new_secret(self, tenant: str, generation: int) -> SecretRow:
        (region, hsm), object_id = next(iter(self._hsms.items())), self._uuid()
        made = hsm.generate(Material.HMAC_256, object_id)
        row = SecretRow(tenant, generation, region, object_id, made.mechanism, made.kek, made.blob, b"")
        return dataclasses.replace(row, mac=hsm.row_mac(secret_binding(row)))

    def tenant_secret_keys(self, tenant: str, region: str) -> Sequence[StoredKey]:
        """Every generation of a tenant's audit key that an HSM of the region wrapped."""
        return [stored_secret(row) for row in self._catalog.secrets(tenant) if row.region == region]

    def stored_versions(self, key: Key) -> Sequence[tuple[int, StoredKey]]:
        """(number, version for the HSM) of every version of a key that has material; RowDamaged as for a use."""
        return [(v.number, self._stored(key, v.number)) for v in key.versions if v.blob]

    # ---- control plane -------------------------------------------------------------------------------------------

    def supports(self, new: NewKey) -> None:
        """Refuse what cannot be made here: no HSM in the home region, or one that lacks the mechanism."""
        hsm = self._hsms.get(new.home)
        if hsm is None:
            raise InputRefused("/home", "no_hsm", "this installation has no HSM in that region")
        reason = hsm.missing(new.material)
        if reason is None and new.origin == EXTERNAL and not isinstance(hsm, Importer):
            reason = f"HSM {hsm.name} takes no keys that were made elsewhere"
        if reason is not None:
            raise UnsupportedByHsm(reason)

    def plan_create(self, new: NewKey, *, alias: str | None = None) -> Plan:
        """Make the first version in the HSM of the home region; a key to be imported waits for its own."""
        self.supports(new)
        now, key_id, external = self._clock(), self._uuid(), new.origin == EXTERNAL
        versions = () if external else (self._new_version(1, new.home, new.material, now),)
        facts = {f.name: getattr(new, f.name) for f in dataclasses.fields(new)}
        key = Key(
            id=key_id,
            shared_with=frozenset(),
            state=KeyState.PREACTIVE if external else KeyState.ACTIVE,
            kv=1,
            created_at=now,
            updated_at=now,
            versions=versions,
            **facts,
        )
        key = self._maced(key)

        def write(c: Connection) -> None:
            self._catalog.insert(c, key)
            if alias is not None:
                self._catalog.put_alias(c, key.tenant, alias, key.id, fresh=True)

        return self._plan(key, write)

    def plan_rotate(self, key: Key) -> Plan:
        """Add a version; WrongState unless the key is enabled, InputRefused for an imported one."""
        if key.origin == EXTERNAL:
            raise InputRefused("", "not_for_imported", "an imported key gets a new version by another import only")
        check_state(key, KeyState.ACTIVE)
        self._authentic(key)
        now, number = self._clock(), self.next_number(key)
        version = self._new_version(number, key.home, _material(key), now)
        return self._update(key, (number,), versions=(*key.versions, version))

    # For imports, which make versions their own way.

    def plan_add_version(self, key: Key, version: KeyVersion, *, state: KeyState) -> Plan:
        """Add a version that was made elsewhere; the key is in `state` then."""
        self._authentic(key)
        return self._update(key, (version.number,), versions=(*key.versions, version), state=state)

    def next_number(self, key: Key) -> int:
        """The number of the next version; KeyLimitReached if the envelope cannot name it."""
        if key.latest_number == ev.MAX_VERSION:
            raise KeyLimitReached(f"key {key.id} has all the versions the envelope can name")
        return key.latest_number + 1

    def authentic(self, key: Key) -> None:
        """RowDamaged unless the key's row is as the service wrote it."""
        self._authentic(key)

    def hsm_of(self, region: str) -> Hsm:
        """The HSM of a region; HsmUnavailable if this node has none."""
        return self._hsm(region)

    def now(self) -> int:
        """Microseconds since the epoch."""
        return self._clock()

    def new_id(self) -> uuid.UUID:
        """A random id."""
        return self._uuid()

    def plan_rewrap(self, key: Key, old: uuid.UUID, rewrap: Callable[[StoredKey], Wrapped]) -> Plan:
        """Replace the blobs of the versions under the root KEK `old` by what `rewrap` makes of them."""
        self._authentic(key)
        versions, numbers = [], []
        for version in key.versions:
            if version.kek == old and version.blob:
                made = rewrap(self._stored(key, version.number))
                numbers.append(version.number)
                version = dataclasses.replace(version, mechanism=made.mechanism, kek=made.kek, blob=made.blob)  # noqa: PLW2901 - the same version, under the other root KEK
            versions.append(version)
        return self._update(key, numbers, versions=tuple(versions))

    def plan_transition(self, key: Key, state: KeyState) -> Plan:
        """Change the state along SP 800-57; WrongState where there is no such transition.

        Destruction is none of these: it comes after a waiting time and erases (`plan_destroy`).
        """
        if key.state is KeyState.DESTROYED:
            raise KeyDestroyed(f"key {key.id} was destroyed")
        waiting = key.delete_at is not None
        allowed = state in TRANSITIONS[key.state] - {KeyState.DESTROYED}
        if state is KeyState.ACTIVE:  # nothing becomes active without material, or with material that has expired
            allowed = allowed and bool(key.versions) and not expired(key.versions[-1], self._clock())
        if not allowed or (waiting and state is not KeyState.COMPROMISED):
            raise WrongState(key.id, key.api_state)
        self._authentic(key)
        return self._update(key, (), state=state)

    def plan_schedule_deletion(self, key: Key, *, wait_s: int) -> Plan:
        """Stop the key now and destroy it `wait_s` seconds from now (7 to 90 days)."""
        if not MIN_WAIT_S <= wait_s <= MAX_WAIT_S:
            raise InputRefused("/wait", "out_of_range", "P7D to P90D")
        check_state(key, KeyState.PREACTIVE, KeyState.ACTIVE, KeyState.SUSPENDED, KeyState.COMPROMISED)
        self._authentic(key)
        state = KeyState.SUSPENDED if key.state is KeyState.ACTIVE else key.state
        return self._update(key, (), state=state, delete_at=self._clock() + wait_s * 1_000_000)

    def plan_cancel_deletion(self, key: Key) -> Plan:
        """Take the deletion back: the key is disabled then, or again compromised or waiting for its import."""
        if key.state is KeyState.DESTROYED:
            raise KeyDestroyed(f"key {key.id} was destroyed")
        if key.delete_at is None:
            raise WrongState(key.id, key.api_state)
        self._authentic(key)
        return self._update(key, (), delete_at=None)

    def plan_destroy(self, key: Key, *, approved: bool = False) -> Plan:
        """Destroy every copy, once the waiting time is over or if a quorum `approved` it; WrongState before."""
        if key.state is KeyState.DESTROYED:
            raise KeyDestroyed(f"key {key.id} was destroyed")
        waited = key.delete_at is not None and key.delete_at <= self._clock()
        if not waited and not approved:
            raise WrongState(key.id, key.api_state)
        self._authentic(key)
        emptied = tuple(dataclasses.replace(v, state=KeyState.DESTROYED, blob=b"") for v in key.versions)
        numbers = tuple(v.number for v in emptied)
        return self._update(key, numbers, erase=True, versions=emptied, state=KeyState.DESTROYED, delete_at=None)

    def plan_bounds(self, key: Key, bounds: Bounds) -> Plan:
        """Change what bounds the use of a key; whether it meets its tier then is the caller's to see to. InputRefused."""
        bounded = bounds.on(key)
        self._authentic(key)
        return self._update(key, (), **{name: getattr(bounded, name) for name in bounds.shown()})

    def plan_revoke_version(self, key: Key, number: int) -> Plan:
        """Take one version out of use, for ever. The newest cannot be revoked: rotate first."""
        check_state(key, KeyState.ACTIVE, KeyState.SUSPENDED)
        if not 1 <= number <= key.latest_number:
            raise KeyNotFound("no such version")
        if number == key.latest_number:
            raise InputRefused("/version", "newest", "rotate first: the newest version cannot be revoked")
        version = key.version(number)
        if version.state is not KeyState.ACTIVE:
            raise WrongState(key.id, "revoked")
        self._authentic(key)
        changed = dataclasses.replace(version, state=KeyState.DEACTIVATED)
        versions = tuple(changed if v.number == number else v for v in key.versions)
        return self._update(key, (number,), versions=versions)

    def plan_update(
        self,
        key: Key,
        *,
        description: str | None = None,
        tags: Mapping[str, str] | None = None,
        rotation: Rotation | None = None,
        min_decrypt_version: int | None = None,
        min_encrypt_version: int | None = None,
    ) -> Plan:
        """Change metadata; None leaves a field as it is. A fence only rises: what lowers one is `plan_bounds`."""
        if key.state is KeyState.DESTROYED:
            raise KeyDestroyed(f"key {key.id} was destroyed")
        if rotation is not None and key.origin == EXTERNAL:
            raise InputRefused("/rotation", "not_for_imported", "an imported key gets new versions by import only")
        self._authentic(key)
        changes: dict[str, Any] = {
            "description": description,
            "tags": None if tags is None else MappingProxyType(dict(tags)),
            "rotation": rotation,
            "min_decrypt_version": min_decrypt_version,
            "min_encrypt_version": min_encrypt_version,
        }
        for name in FENCES:
            _fence_fits(key, name, changes[name])
            if changes[name] is not None and changes[name] < getattr(key, name):
                raise InputRefused(f"/{name}", "lowers", "what lowers a fence takes approvals: `skms key set-policy`")
        return self._update(key, (), **{k: v for k, v in changes.items() if v is not None})

    def plan_put_alias(self, tenant: str, alias: str, key: Key) -> Plan:
        """Point an alias to a key, whether it exists or not."""
        if key.tenant != tenant:
            raise KeyNotFound("no such key")
        if key.state is KeyState.DESTROYED:
            raise KeyDestroyed(f"key {key.id} was destroyed")
        return Plan(
            key,
            lambda c: self._catalog.put_alias(c, tenant, alias, key.id, fresh=False),
            self._forget_alias(tenant, alias),
        )

    def plan_delete_alias(self, tenant: str, alias: str) -> Plan:
        """Remove an alias; the key stays."""
        key = self.find(tenant, f"alias/{alias}")
        return Plan(
            key, lambda c: self._catalog.delete_alias(c, tenant, alias, key.id), self._forget_alias(tenant, alias)
        )

    def _forget_alias(self, tenant: str, alias: str) -> Callable[[], None]:
        def applied() -> None:
            with self._lock:
                self._generation += 1
                self._aliases.pop((tenant, alias), None)

        return applied

    # ---- inside --------------------------------------------------------------------------------------------------

    def _uuid(self) -> uuid.UUID:
        return uuid.UUID(bytes=self._random(16), version=4)

    def _hsm(self, region: str) -> Hsm:
        """The HSM of a region; never another one's."""
        try:
            return self._hsms[region]
        except KeyError:
            raise HsmUnavailable(f"this node has no HSM of region {region}") from None

    def _usable(self, key: Key, number: int, direction: Literal["protect", "process"]) -> None:
        """As `check_use`, also for a newer row, if this process knows one: its handles were evicted already."""
        now = self._clock()
        check_use(key, number, direction, now=now)
        known = self._keys.get(key.id)
        if known is not None and known.kv > key.kv:
            check_use(known, number, direction, now=now)

    def _for(self, key: Key, usage: KeyUsage) -> None:
        if key.usage is not usage:
            raise UsageMismatch(f"key {key.id} is for {key.usage}")

    def _mac_name(self, key: Key, algorithm: str, message: bytes) -> str:
        self._for(key, KeyUsage.MAC)
        known, name = _MACS[key.spec]
        if algorithm != known:
            raise AlgorithmMismatch(f"{key.spec} keys compute {known}")
        if len(message) > ev.MAX_PLAINTEXT:
            raise InputRefused("/message", "too_long", f"at most {ev.MAX_PLAINTEXT} bytes")
        return name

    def _aad(self, key: Key, number: int, suite: int, purpose: Purpose, context: Mapping[str, str]) -> bytes:
        return ev.encode_aad(
            tenant=key.tenant,
            region=key.home,
            key_id=key.id,
            version=number,
            suite=suite,
            purpose=purpose,
            context=context,
        )

    def _prepare_seal(
        self, key: Key, plaintext: bytes, context: Mapping[str, str], purpose: Purpose, version: int | None
    ) -> tuple[int, StoredKey]:
        self._for(key, KeyUsage.ENCRYPT)
        number = key.latest_number if version is None else version
        self._usable(key, number, "protect")
        if len(plaintext) > ev.MAX_PLAINTEXT:
            raise InputRefused("/plaintext", "too_long", f"at most {ev.MAX_PLAINTEXT} bytes")
        if purpose is Purpose.DATAKEY and len(plaintext) not in _DATA_KEY:
            raise InputRefused("/bytes", "out_of_range", "16 to 64")
        ev.refuse_context(context)
        stored = self._stored(key, number)
        self._count(key, number)
        return number, stored

    def _prepare_open(self, key: Key, envelope: Envelope, purpose: Purpose) -> StoredKey:
        suites = {key.suite, ev.BATCH_OF.get(key.suite)}
        wrong = envelope.key_id != key.id or envelope.suite not in suites or envelope.purpose != purpose
        if key.usage is not KeyUsage.ENCRYPT or wrong or envelope.version > key.latest_number:
            raise InvalidCiphertext
        self._usable(key, envelope.version, "process")
        return self._stored(key, envelope.version)

    def _seal_strict(
        self,
        key: Key,
        number: int,
        stored: StoredKey,
        plaintext: bytes,
        context: Mapping[str, str],
        purpose: Purpose,
    ) -> Sealed:
        digest = hashlib.sha256(self._aad(key, number, ev.STRICT, purpose, context)).digest()
        iv, sealed = self._hsm(key.home).gcm_seal(stored, digest, ev.COMMITMENT + plaintext)
        if len(iv) != 12 or not any(iv):
            # A token that was to write the IV and did not: every message would have the same nonce.
            raise HsmFault("CKR_OK with an unusable IV")
        made = Envelope(ev.STRICT, key.id, purpose, number, b"", b"", iv, b"", sealed)
        return Sealed(made.to_bytes(), number, ev.STRICT)

    def _stored(self, key: Key, number: int) -> StoredKey:
        """A version for the HSM; RowDamaged unless the MAC of the key's row is right, and so covers the version."""
        genuine = self._authentic(key)
        found = genuine.stored.get(number)
        if found is None:
            version = key.version(number)
            binding, mac = genuine.row, key.mac
            if version.mac:
                binding, mac = _binding(key, version), version.mac
                self._check_row(key, binding, mac)
            found = StoredKey(
                object_id=version.object_id,
                material=_material(key),
                blob=version.blob,
                mechanism=version.mechanism,
                kek=version.kek,
                public=version.public,
                binding=binding,
                mac=mac,
            )
            genuine.stored[number] = found
        return found

    def _authentic(self, key: Key) -> _Genuine:
        """Check the row's MAC before its first use in this process; RowDamaged if it is not ours."""
        known = self._genuine.get(key.id)
        if known is not None and known.key is key:
            return known
        if known is not None and known.key == key:  # the same row, read again
            known.key = key
            return known
        row = rowmac.key_row(key, _material(key))
        self._check_row(key, row, key.mac)
        return self._trust(key, row)

    def _check_row(self, key: Key, binding: bytes, mac: bytes) -> None:
        try:
            self._hsm(key.home).check_row(binding, mac)
        except RowDamaged:
            raise RowDamaged(f"row of key {key.id} was changed outside the service") from None

    def _trust(self, key: Key, row: bytes) -> _Genuine:
        made = _Genuine(key, row)
        with self._lock:
            if len(self._genuine) >= _CACHE:
                self._genuine.clear()
            self._genuine[key.id] = made
        return made

    def counted(self, key: Key, version: int | None = None) -> bool:
        """Whether one more use of a version (the latest one) can be counted without the database, or there is no such version."""
        number = key.latest_number if version is None else version
        if not 1 <= number <= len(key.versions):
            return True
        lease = self._leases.get(key.version(number).object_id)
        return lease is not None and lease.left > 0

    def count_ahead(self, wanted: Sequence[tuple[Key, int, int]]) -> Sequence[Exception | None]:
        """Let uses of versions be counted without the database for a while: at least so many of each.

        What is wrong with each, or None: KeyLimitReached, KeyNotFound, an error of the database. One transaction for all,
        since many keys that come into use together would wait for each other's.
        """
        granted = self._catalog.lease_each([_block(key, number, least) for key, number, least in wanted])
        told = list[Exception | None]()
        for (key, number, _), uses in zip(wanted, granted, strict=True):
            try:
                if isinstance(uses, Exception):
                    raise uses
                leased = self._granted(key, number, uses)
            except Exception as error:
                told.append(error)
                continue
            lease = self._lease_of(key, number)
            with lease.lock:
                lease.left += leased
            told.append(None)
        return told

    def _lease_of(self, key: Key, number: int) -> _Lease:
        object_id = key.version(number).object_id
        with self._lock:
            return self._leases.setdefault(object_id, _Lease())

    def _count(self, key: Key, number: int) -> None:
        """Count one use before it happens. Leases are committed first, so a crash never counts too few."""
        lease = self._lease_of(key, number)
        with lease.lock:
            if lease.left == 0:
                (granted,) = self._catalog.lease_uses([_block(key, number)])
                lease.left = self._granted(key, number, granted)
            lease.left -= 1

    def _granted(self, key: Key, number: int, granted: int | None) -> int:
        if granted is None:
            raise KeyNotFound("no such key")
        if granted == 0:
            raise KeyLimitReached(f"version {number} of key {key.id} must not encrypt any more; rotate it")
        self._show_uses(key, number, granted)
        return granted

    def _show_uses(self, key: Key, number: int, granted: int) -> None:
        """Let the cached row tell the uses that were just leased."""
        with self._lock:
            known = self._keys.get(key.id)
            if known is None or known.kv != key.kv:
                return
            counted = dataclasses.replace(known.version(number), uses=known.version(number).uses + granted)
            versions = tuple(counted if v.number == number else v for v in known.versions)
            self._keys[key.id] = dataclasses.replace(known, versions=versions)

    def _new_version(self, number: int, region: str, material: Material, now: int) -> KeyVersion:
        """A new version, without its MAC."""
        object_id = self._uuid()
        made = self._hsm(region).generate(material, object_id)
        return KeyVersion(number, KeyState.ACTIVE, now, object_id, made.mechanism, made.kek, made.blob, made.public)

    def _maced(self, key: Key) -> Key:
        """The key with a new MAC of its row, which covers its versions."""
        key = dataclasses.replace(key, versions=tuple(dataclasses.replace(v, mac=b"") for v in key.versions))
        return dataclasses.replace(key, mac=self._hsm(key.home).row_mac(rowmac.key_row(key, _material(key))))

    def _update(self, key: Key, numbers: Sequence[int], *, erase: bool = False, **changes: Any) -> Plan:
        """The key with these changes; `numbers` are the versions that are new or changed."""
        now = max(self._clock(), key.updated_at)
        if rowmac.has_version_macs(key):
            # The new MAC will vouch for every version: a damaged one must not get a right MAC by being written again.
            for version in key.versions:
                self._check_row(key, _binding(key, version), version.mac)
            numbers = range(1, len(changes.get("versions", key.versions)) + 1)
        new = self._maced(dataclasses.replace(key, kv=key.kv + 1, updated_at=now, **changes))
        changed = [v for v in new.versions if v.number in numbers]

        def write(c: Connection) -> None:
            if erase:
                self._catalog.erase(c, key.id)
            self._catalog.update(c, new, was=key.kv, versions=changed)

        return self._plan(new, write)

    def _plan(self, key: Key, write: Callable[[Connection], None]) -> Plan:
        def applied() -> None:
            with self._lock:
                self._generation += 1
                known = self._keys.get(key.id)
                if known is None or known.kv < key.kv:
                    self._keys[key.id] = key
            self._trust(key, rowmac.key_row(key, _material(key)))  # this process made its MAC
            self._evict(key)

        return Plan(key, write, applied)

    def _evict(self, key: Key) -> None:
        """Take what may not be used any more out of the HSM's cache, at once."""
        hsm = self._hsms.get(key.home)
        if hsm is not None:
            for version in _stopped(key, self._clock()):
                hsm.forget(version.object_id)


class Batch:
    """Seals and opens many envelopes with one derivation for each key, version and salt.

    The secrets live until the block ends and are overwritten then; the server draws the salt, and no two requests
    share one (docs/envelope.md). An item's index is its place among what this batch sealed.
    """

    def __init__(self, store: Keystore) -> None:
        self._store = store
        self._lock = threading.RLock()
        self._salts: dict[tuple[uuid.UUID, int], bytes] = {}
        self._secrets: dict[tuple[uuid.UUID, int, bytes], bytearray] = {}
        self._index = 0
        self._noise = b""
        self._ended = False

    def __enter__(self) -> Batch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._ended = True
            for secret in self._secrets.values():
                secret[:] = bytes(len(secret))
            self._secrets.clear()
            self._salts.clear()
            self._noise = b""

    def seal(
        self,
        key: Key,
        plaintext: bytes,
        context: Mapping[str, str],
        *,
        purpose: Purpose = Purpose.ENCRYPT,
        version: int | None = None,
    ) -> Sealed:
        """As `Keystore.seal`, in the batch suite of the key's own."""
        store = self._store
        if key.suite == ev.STRICT:
            return store.seal(key, plaintext, context, purpose=purpose, version=version)
        number, stored = store._prepare_seal(key, plaintext, context, purpose, version)
        suite = ev.BATCH_OF[key.suite]
        aad = store._aad(key, number, suite, purpose, context)
        with self._lock:
            salt = self._salts.get((key.id, number))
            if salt is None:
                salt = self._salts[key.id, number] = self._draw(32)
            index, iv = self._index.to_bytes(4, "big"), self._draw(12)
            self._index += 1
            derived = ev.item_keys(self._secret(key, stored, number, salt), index, aad)
        return _sealed(key, number, suite, purpose, salt, index, iv, derived, plaintext, aad)

    def open(self, key: Key, envelope: Envelope, context: Mapping[str, str], *, purpose: Purpose) -> bytes:
        """As `Keystore.open`."""
        store = self._store
        if envelope.suite not in ev.BATCH_OF.values():
            return store.open(key, envelope, context, purpose=purpose)
        stored = store._prepare_open(key, envelope, purpose)
        aad = store._aad(key, envelope.version, envelope.suite, purpose, context)
        with self._lock:
            secret = self._secret(key, stored, envelope.version, envelope.salt)
            derived = ev.item_keys(secret, envelope.index, aad)
        return ev.open_with(derived, envelope, aad)

    def _secret(self, key: Key, stored: StoredKey, number: int, salt: bytes) -> bytearray:
        if self._ended:
            raise RuntimeError("this batch has ended and its secrets are gone")
        slot = (key.id, number, salt)
        if slot not in self._secrets:
            suite = ev.BATCH_OF[key.suite]
            made = self._store._hsm(key.home).hmac(stored, ev.HASH_OF[suite], ev.batch_input(salt, suite))
            self._secrets[slot] = bytearray(made)
        return self._secrets[slot]

    def _draw(self, length: int) -> bytes:
        """Random bytes that were never given out before, asked for many at a time: a token call costs a round trip."""
        if len(self._noise) < length:
            self._noise = self._store._random(_DRAW)
        drawn, self._noise = self._noise[:length], self._noise[length:]
        return drawn


def verify_raw(spki: bytes, scheme: SignScheme, data: bytes, signature: bytes) -> bool:
    """Whether an HSM's signature (raw r||s for ECDSA) is right under a public key."""
    public = _public_key(spki)
    spec = (
        KeySpec.EC_P384 if isinstance(public, ec.EllipticCurvePublicKey) and public.key_size == 384 else KeySpec.EC_P256
    )
    return verify_signature(spec, spki, scheme, data, signature, "raw")


def check_state(key: Key, *allowed: KeyState) -> None:
    """WrongState (or KeyDestroyed) unless the key is in one of these states and not waiting for deletion."""
    if key.state is KeyState.DESTROYED:
        raise KeyDestroyed(f"key {key.id} was destroyed")
    if key.state not in allowed or key.delete_at is not None:
        raise WrongState(key.id, key.api_state)


def _material(key: Key) -> Material:
    return material_of(key.spec, key.suite)


def _binding(key: Key, version: KeyVersion) -> bytes:
    return rowmac.version_row(key.tenant, key.id, _material(key), key.usage, version)


def secret_binding(row: SecretRow) -> bytes:
    return rowmac.secret_row(row.tenant, row.generation, row.region, row.object_id, row.mechanism, row.kek, row.blob)


def stored_secret(row: SecretRow) -> StoredKey:
    return StoredKey(
        object_id=row.object_id,
        material=Material.HMAC_256,
        blob=row.blob,
        mechanism=row.mechanism,
        kek=row.kek,
        public=b"",
        binding=secret_binding(row),
        mac=row.mac,
    )


def _stopped(key: Key, now: int) -> Iterator[KeyVersion]:
    """The versions that cannot be used in any direction."""
    for version in key.versions:
        try:
            check_use(key, version.number, "process", now=now)
        except (KeyDestroyed, WrongState, VersionFenced):
            yield version


def _sealed(
    key: Key,
    number: int,
    suite: int,
    purpose: Purpose,
    salt: bytes,
    index: bytes,
    iv: bytes,
    derived: bytes,
    plaintext: bytes,
    aad: bytes,
) -> Sealed:
    commitment, sealed = ev.seal_with(derived, iv, plaintext, aad)
    made = Envelope(suite, key.id, purpose, number, salt, index, iv, commitment, sealed)
    return Sealed(made.to_bytes(), number, suite)


def _signed_data(
    key: Key, algorithm: str, message: bytes | None, digest: bytes | None, form: str
) -> tuple[SignScheme, bytes]:
    """The scheme, and what is signed: a digest of the hash's length, or the message for Ed25519."""
    if algorithm not in _SCHEMES[key.spec]:
        raise AlgorithmMismatch(f"{key.spec} keys sign with {', '.join(sorted(_SCHEMES[key.spec]))}")
    if (message is None) == (digest is None):
        raise InputRefused("/message", "one_of", "send either message or digest")
    if form not in {"der", "raw"}:
        raise InputRefused("/format", "unknown", "der or raw")
    scheme = SignScheme(algorithm)
    if message is not None and len(message) > ev.MAX_PLAINTEXT:
        raise InputRefused("/message", "too_long", f"at most {ev.MAX_PLAINTEXT} bytes; send its digest")
    if scheme is SignScheme.ED25519:
        if message is None:
            raise InputRefused("/digest", "not_for_algorithm", "ED25519 signs the message itself")
        return scheme, message
    algorithm_hash = _HASHES[scheme[-3:]]
    if digest is None:
        h = hashes.Hash(algorithm_hash)
        h.update(message or b"")
        return scheme, h.finalize()
    if len(digest) != algorithm_hash.digest_size:
        raise DigestLength(algorithm_hash.digest_size)
    return scheme, digest


# Parsing an RSA key costs more than verifying with it.
_public_key = functools.lru_cache(maxsize=1_024)(load_der_public_key)


def verify_signature(spec: KeySpec, spki: bytes, scheme: SignScheme, data: bytes, signature: bytes, form: str) -> bool:
    """Whether a signature over a digest (or message, for Ed25519) is right; ECDSA as DER or raw r||s by `form`."""
    public = _public_key(spki)
    try:
        match public:
            case ed25519.Ed25519PublicKey():
                public.verify(signature, data)
            case ec.EllipticCurvePublicKey():
                if form == "raw":
                    half = _HALF[spec]
                    if len(signature) != 2 * half:
                        return False
                    r, s = int.from_bytes(signature[:half], "big"), int.from_bytes(signature[half:], "big")
                    signature = utils.encode_dss_signature(r, s)
                public.verify(signature, data, ec.ECDSA(utils.Prehashed(_HASHES[scheme[-3:]])))
            case rsa.RSAPublicKey():
                algorithm = _HASHES[scheme[-3:]]
                pss = padding.PSS(padding.MGF1(algorithm), algorithm.digest_size)
                scheme_padding = pss if "PSS" in scheme else padding.PKCS1v15()
                public.verify(signature, data, scheme_padding, utils.Prehashed(algorithm))
            case _:
                raise RowDamaged("a public key of another kind than its spec")
    except InvalidSignature:
        return False
    return True
