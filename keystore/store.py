"""Keys in use: each in the HSM of its own region, never another.

Reading never calls an HSM. Before the first use of a row its MAC is checked; before the first unwrap of a version the
HSM checks that version's MAC. Changes are plans: nothing is changed until a plan's `write` commits, in the transaction
of the record that reports it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import os
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
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
from keystore.catalog import Catalog, ListFilter, SecretRow
from keystore.envelope import Envelope, Purpose
from keystore.hsm import (
    Hsm,
    HsmStatus,
    InvalidCiphertext,
    Material,
    RowDamaged,
    SignScheme,
    StoredKey,
    UnsupportedByHsm,
)
from keystore.key import (
    API_STATE,
    TRANSITIONS,
    USAGE_OF_SPEC,
    Key,
    KeyDestroyed,
    KeyNotFound,
    KeySpec,
    KeyState,
    KeyUsage,
    KeyVersion,
    Rotation,
    StaleKey,
    VersionFenced,
    WrongState,
)

DAY_US: Final = 86_400_000_000
MIN_WAIT_S: Final = 7 * 86_400
MAX_WAIT_S: Final = 90 * 86_400
STRICT_LIMIT: Final = 3_865_470_566  # encryptions under one key with random IVs (SP 800-38D; 90 % of 2^32)
STRICT_WARN: Final = 2**31
_STRICT_BLOCK: Final = 2**20
_BLOCK: Final = 1_024
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
_HALF: Final[Mapping[KeySpec, int]] = MappingProxyType({KeySpec.EC_P256: 32, KeySpec.EC_P384: 48})


class InputRefused(Exception):
    """A field that the keystore cannot accept, by JSON pointer; never its value."""

    def __init__(self, pointer: str, code: str, detail: str) -> None:
        super().__init__(f"{pointer}: {detail}")
        self.pointer, self.code, self.detail = pointer, code, detail


class UsageMismatch(Exception):
    """The key is not for this use."""


class KeyLimitReached(Exception):
    """The key version has reached the number of encryptions that are safe; rotate the key."""


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
    rotation: Rotation = Rotation()

    @classmethod
    def of(cls, *, spec: KeySpec, usage: KeyUsage | None, suite: int | None, **facts: Any) -> NewKey:
        """Fill in what the spec implies; InputRefused where the request contradicts it."""
        implied = USAGE_OF_SPEC[spec]
        if usage not in {None, implied}:
            raise InputRefused("/usage", "not_for_spec", f"{spec} keys are for {implied}")
        if implied is not KeyUsage.ENCRYPT:
            if suite is not None:
                raise InputRefused("/suite", "not_for_spec", "only encryption keys have a suite")
            suite = 0
        elif suite is None:
            suite = ev.SINGLE
        if len(set(facts["purposes"])) != len(facts["purposes"]):
            raise InputRefused("/purposes", "repeated", "each purpose once")
        return cls(spec=spec, usage=implied, suite=suite, **facts)

    @property
    def material(self) -> Material:
        """What is made in the token."""
        return material_of(self.spec, self.suite)

    def parameters(self) -> dict[str, object]:
        """The request as it stands in the intent's hash."""
        shown: dict[str, object] = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            shown[f.name] = sorted(value) if isinstance(value, frozenset) else str(value)
        return shown


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
        return Material.AES_256 if suite == ev.STRICT else Material.KDK_512
    return Material(str(spec))


def check_use(key: Key, number: int, direction: Literal["protect", "process"]) -> None:
    """Whether state and fences let a version protect or process; the stricter of key and version counts.

    Raises KeyDestroyed, WrongState or VersionFenced.
    """
    if key.state is KeyState.DESTROYED:
        raise KeyDestroyed(f"key {key.id} was destroyed")
    if key.state is not KeyState.ACTIVE or key.delete_at is not None:
        raise WrongState(key.id, key.api_state)
    version = key.version(number)
    fence = key.min_encrypt_version if direction == "protect" else key.min_decrypt_version
    if number < fence or version.state not in {KeyState.ACTIVE}:
        raise VersionFenced(f"version {number} of key {key.id} is fenced or revoked")


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
        self._lock = threading.Lock()
        self._keys: dict[uuid.UUID, Key] = {}
        self._aliases: dict[tuple[str, str], uuid.UUID] = {}
        self._genuine: dict[uuid.UUID, Key] = {}  # rows whose MAC was checked, by identity of the row
        self._epoch = catalog.epoch()
        self._leases: dict[uuid.UUID, int] = {}
        self._secrets: dict[str, tuple[int, bytes]] = {}

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

    def _id_of(self, tenant: str, name: str) -> uuid.UUID:
        if not name.startswith("alias/"):
            try:
                key_id = uuid.UUID(name)
            except ValueError:
                raise KeyNotFound("no such key") from None
            if str(key_id) != name:
                raise KeyNotFound("no such key")
            return key_id
        slot = (tenant, name.removeprefix("alias/"))
        found = self._aliases.get(slot)
        if found is None:
            with self._lock:
                epoch = self._epoch
            found = self._catalog.alias(*slot)
            with self._lock:
                if epoch == self._epoch:
                    self._aliases[slot] = found
        return found

    def by_id(self, key_id: uuid.UUID) -> Key:
        """A key by id, whoever owns it: the caller compares the tenant. KeyNotFound if there is none."""
        key = self._keys.get(key_id)
        if key is not None:
            return key
        with self._lock:
            epoch = self._epoch
        key = self._catalog.key(key_id)
        with self._lock:
            # A change that became visible while we read makes what we read old news: do not keep it.
            if epoch == self._epoch:
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

    def aliases(self, tenant: str, *, after: str | None, limit: int) -> Sequence[tuple[str, uuid.UUID]]:
        """Up to `limit` aliases of a tenant, in the order of names."""
        return self._catalog.aliases(tenant, after=after, limit=limit)

    def poll(self) -> bool:
        """Notice what other workers changed. Their changes count from here on, at the latest."""
        epoch = self._catalog.epoch()
        with self._lock:
            if epoch == self._epoch:
                return False
            before, self._keys = self._keys, {}
            self._aliases.clear()
            self._epoch = epoch
        for key in before.values():
            if key.state is KeyState.ACTIVE and key.delete_at is None:
                continue
            self._evict(key)
        return True

    def due_rotations(self, now: int) -> Sequence[Key]:
        """Keys whose newest version is too old or used too often."""
        return [k for k in self._catalog.rotating() if _rotation_due(k, now)]

    def due_deletions(self, now: int) -> Sequence[Key]:
        """Keys whose waiting time is over."""
        return self._catalog.deletions_due(now)

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
        prepared = self._prepare_seal(key, plaintext, context, version)
        if key.suite == ev.STRICT:
            return self._seal_strict(key, prepared, plaintext, context, purpose)
        salt = self._random(32)
        aad = self._aad(key, prepared.number, ev.SINGLE, purpose, context)
        derived = self._hsm(key).hmac(self._stored(key, prepared), "sha512", ev.single_input(salt, aad))
        return self._sealed(key, prepared, ev.SINGLE, purpose, salt, b"", derived, plaintext, aad)

    def open(self, key: Key, envelope: Envelope, context: Mapping[str, str], *, purpose: Purpose) -> bytes:
        """The plaintext; one InvalidCiphertext for whatever is wrong with the envelope."""
        stored = self._prepare_open(key, envelope, purpose)
        aad = self._aad(key, envelope.version, envelope.suite, purpose, context)
        hsm = self._hsm(key)
        if envelope.suite == ev.STRICT:
            data = hsm.gcm_open(stored, envelope.iv, hashlib.sha256(aad).digest(), envelope.sealed)
            if not hmac.compare_digest(data[:32], ev.COMMITMENT):
                raise InvalidCiphertext
            return data[32:]
        if envelope.suite == ev.SINGLE:
            derived = hsm.hmac(stored, "sha512", ev.single_input(envelope.salt, aad))
        else:
            secret = hsm.hmac(stored, "sha512", ev.batch_input(envelope.salt))
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
        number = version or key.latest.number
        self._for(key, KeyUsage.SIGN)
        check_use(key, number, "protect")
        scheme, data = _signed_data(key, algorithm, message, digest)
        self._authentic(key)
        self._count(key, key.version(number))
        raw = self._hsm(key).sign(self._stored(key, key.version(number)), scheme, data)
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
        number = version or key.latest.number
        self._for(key, KeyUsage.SIGN)
        check_use(key, number, "process")
        scheme, data = _signed_data(key, algorithm, message, digest)
        return _verify(key.spec, self.public_key(key, number), scheme, data, signature, form)

    def mac(self, key: Key, message: bytes, algorithm: str, *, version: int | None = None) -> tuple[bytes, int]:
        """(HMAC, version)."""
        number = version or key.latest.number
        name = self._mac_name(key, algorithm)
        check_use(key, number, "protect")
        self._authentic(key)
        self._count(key, key.version(number))
        return self._hsm(key).hmac(self._stored(key, key.version(number)), name, message), number

    def verify_mac(self, key: Key, message: bytes, value: bytes, algorithm: str, *, version: int | None = None) -> bool:
        """Whether an HMAC is right: computed again and compared in constant time, never by C_Verify (hsm.md 1.4)."""
        number = version or key.latest.number
        name = self._mac_name(key, algorithm)
        check_use(key, number, "process")
        self._authentic(key)
        made = self._hsm(key).hmac(self._stored(key, key.version(number)), name, message)
        return hmac.compare_digest(made, value)

    def public_key(self, key: Key, version: int | None = None) -> bytes:
        """SubjectPublicKeyInfo (DER) of a signing key's version."""
        self._for(key, KeyUsage.SIGN)
        if key.state is KeyState.DESTROYED:
            raise KeyDestroyed(f"key {key.id} was destroyed")
        found = key.version(version or key.latest.number)
        self._authentic(key)
        self._authentic_version(key, found)
        return found.public

    def random(self, region: str, length: int) -> bytes:
        """Random bytes from the HSM of a region."""
        return self._hsms[region].random(length)

    # ---- tenants' audit keys -------------------------------------------------------------------------------------

    def has_tenant_secret(self, tenant: str) -> bool:
        """Whether the tenant's audit key was made already."""
        return self._catalog.secret(tenant) is not None

    def tenant_secret(self, tenant: str) -> tuple[int, bytes]:
        """(generation, 32 bytes) of a tenant's audit key, made on first use. Never the wrapped key itself."""
        if tenant not in self._secrets:
            if self._catalog.secret(tenant) is None:
                self._catalog.insert_secret(self._new_secret(tenant))
            row = self._catalog.secret(tenant)
            assert row is not None
            binding = rowmac.secret_row(tenant, row.generation, row.object_id, row.mechanism, row.kek, row.blob)
            stored = StoredKey(
                row.object_id, Material.HMAC_256, row.blob, row.mechanism, row.kek, b"", binding, row.mac
            )
            secret = self._of_kek(row.kek).hmac(stored, "sha256", b"skms/audit-context/v1")
            self._secrets[tenant] = (row.generation, secret)
        return self._secrets[tenant]

    def _new_secret(self, tenant: str) -> SecretRow:
        hsm, object_id = next(iter(self._hsms.values())), self._uuid()
        made = hsm.generate(Material.HMAC_256, object_id)
        mac = hsm.row_mac(rowmac.secret_row(tenant, 1, object_id, made.mechanism, made.kek, made.blob))
        return SecretRow(tenant, 1, object_id, made.mechanism, made.kek, made.blob, mac)

    def _of_kek(self, kek: uuid.UUID) -> Hsm:
        for hsm in self._hsms.values():
            if hsm.status().root_kek == kek:
                return hsm
        raise RowDamaged("no HSM here holds the root KEK of this row")

    # ---- control plane -------------------------------------------------------------------------------------------

    def supports(self, new: NewKey) -> None:
        """Refuse what cannot be made here: no HSM in the home region, or one that lacks the mechanism."""
        hsm = self._hsms.get(new.home)
        if hsm is None:
            raise InputRefused("/home", "no_hsm", "this installation has no HSM in that region")
        reason = hsm.missing(new.material)
        if reason is not None:
            raise UnsupportedByHsm(reason)

    def plan_create(self, new: NewKey, *, alias: str | None = None) -> Plan:
        """Make the first version in the HSM of the home region."""
        self.supports(new)
        now, key_id = self._clock(), self._uuid()
        version = self._new_version(new.tenant, key_id, new.home, new.material, 1, now)
        facts = {f.name: getattr(new, f.name) for f in dataclasses.fields(new)}
        key = Key(
            id=key_id,
            shared_with=frozenset(),
            state=KeyState.ACTIVE,
            kv=1,
            created_at=now,
            updated_at=now,
            versions=(version,),
            **facts,
        )
        key = self._maced(key)

        def write(c: Connection) -> None:
            self._catalog.insert(c, key)
            if alias is not None:
                self._catalog.put_alias(c, key.tenant, alias, key.id, fresh=True)

        return self._plan(key, write)

    def plan_rotate(self, key: Key) -> Plan:
        """Add a version; WrongState unless the key is enabled."""
        check_state(key, KeyState.ACTIVE)
        self._authentic(key)
        now, number = self._clock(), key.latest.number + 1
        if number > ev.MAX_VERSION:
            raise KeyLimitReached(f"key {key.id} has all the versions the envelope can name")
        version = self._new_version(key.tenant, key.id, key.home, _material(key), number, now)
        return self._update(key, (version,), versions=(*key.versions, version))

    def plan_transition(self, key: Key, state: KeyState) -> Plan:
        """Change the state along SP 800-57; WrongState where there is no such transition."""
        pending = key.delete_at is not None
        allowed = state in TRANSITIONS[key.state] and (not pending or state is KeyState.COMPROMISED)
        if not allowed:
            raise WrongState(key.id, key.api_state)
        self._authentic(key)
        return self._update(key, (), state=state)

    def plan_schedule_deletion(self, key: Key, *, wait_s: int) -> Plan:
        """Stop the key now and destroy it `wait_s` seconds from now (7 to 90 days)."""
        if not MIN_WAIT_S <= wait_s <= MAX_WAIT_S:
            raise InputRefused("/wait", "out_of_range", "P7D to P90D")
        if key.delete_at is not None or key.state not in {
            KeyState.ACTIVE,
            KeyState.SUSPENDED,
            KeyState.COMPROMISED,
        }:
            raise WrongState(key.id, key.api_state)
        self._authentic(key)
        state = KeyState.COMPROMISED if key.state is KeyState.COMPROMISED else KeyState.SUSPENDED
        return self._update(key, (), state=state, delete_at=self._clock() + wait_s * 1_000_000)

    def plan_cancel_deletion(self, key: Key) -> Plan:
        """Take the deletion back: the key is disabled then, or compromised again."""
        if key.delete_at is None or key.state is KeyState.DESTROYED:
            raise WrongState(key.id, key.api_state)
        self._authentic(key)
        return self._update(key, (), delete_at=None)

    def plan_destroy(self, key: Key) -> Plan:
        """Destroy every copy, once the waiting time is over; WrongState before."""
        if key.delete_at is None or key.delete_at > self._clock() or key.state is KeyState.DESTROYED:
            raise WrongState(key.id, key.api_state)
        self._authentic(key)
        emptied = tuple(
            self._maced_version(key.tenant, key.id, key.home, _material(key), v, state=KeyState.DESTROYED, blob=b"")
            for v in key.versions
        )
        plan = self._update(key, emptied, versions=emptied, state=KeyState.DESTROYED, delete_at=None)

        def write(c: Connection) -> None:
            self._catalog.erase(c, key.id)
            plan.write(c)

        return Plan(plan.key, write, plan.applied)

    def plan_revoke_version(self, key: Key, number: int) -> Plan:
        """Take one version out of use, for ever. The newest cannot be revoked: rotate first."""
        check_state(key, KeyState.ACTIVE, KeyState.SUSPENDED)
        if not 1 <= number <= key.latest.number:
            raise KeyNotFound("no such version")
        if number == key.latest.number:
            raise InputRefused("/version", "newest", "rotate first: the newest version cannot be revoked")
        version = key.version(number)
        if version.state is not KeyState.ACTIVE:
            raise WrongState(key.id, "revoked")
        self._authentic(key)
        self._authentic_version(key, version)
        changed = self._maced_version(key.tenant, key.id, key.home, _material(key), version, state=KeyState.DEACTIVATED)
        versions = tuple(changed if v.number == number else v for v in key.versions)
        return self._update(key, (changed,), versions=versions)

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
        """Change metadata; None leaves a field as it is."""
        if key.state is KeyState.DESTROYED:
            raise KeyDestroyed(f"key {key.id} was destroyed")
        self._authentic(key)
        changes: dict[str, Any] = {
            "description": description,
            "tags": None if tags is None else MappingProxyType(dict(tags)),
            "rotation": rotation,
            "min_decrypt_version": min_decrypt_version,
            "min_encrypt_version": min_encrypt_version,
        }
        for name in ("min_decrypt_version", "min_encrypt_version"):
            fence = changes[name]
            if fence is not None and not 1 <= fence <= key.latest.number:
                raise InputRefused(f"/{name}", "out_of_range", "a fence lies between 1 and the latest version")
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
        return Plan(key, lambda c: self._catalog.delete_alias(c, tenant, alias), self._forget_alias(tenant, alias))

    def _forget_alias(self, tenant: str, alias: str) -> Callable[[], None]:
        def applied() -> None:
            with self._lock:
                self._aliases.pop((tenant, alias), None)

        return applied

    # ---- inside --------------------------------------------------------------------------------------------------

    def _uuid(self) -> uuid.UUID:
        return uuid.UUID(bytes=self._random(16), version=4)

    def _hsm(self, key: Key) -> Hsm:
        return self._hsms[key.home]

    def _for(self, key: Key, usage: KeyUsage) -> None:
        if key.usage is not usage:
            raise UsageMismatch(f"key {key.id} is for {key.usage}")

    def _mac_name(self, key: Key, algorithm: str) -> str:
        self._for(key, KeyUsage.MAC)
        known, name = _MACS[key.spec]
        if algorithm != known:
            raise InputRefused("/algorithm", "not_for_spec", f"{key.spec} keys compute {known}")
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

    def _prepare_seal(self, key: Key, plaintext: bytes, context: Mapping[str, str], version: int | None) -> KeyVersion:
        self._for(key, KeyUsage.ENCRYPT)
        number = version or key.latest.number
        check_use(key, number, "protect")
        if len(plaintext) > ev.MAX_PLAINTEXT:
            raise InputRefused("/plaintext", "too_long", f"at most {ev.MAX_PLAINTEXT} bytes")
        ev.refuse_context(context)
        self._authentic(key)
        chosen = key.version(number)
        self._count(key, chosen)
        return chosen

    def _prepare_open(self, key: Key, envelope: Envelope, purpose: Purpose) -> StoredKey:
        suites = {ev.STRICT} if key.suite == ev.STRICT else {ev.SINGLE, ev.BATCH}
        wrong = envelope.key_id != key.id or envelope.suite not in suites or envelope.purpose != purpose
        if key.usage is not KeyUsage.ENCRYPT or wrong or envelope.version > key.latest.number:
            raise InvalidCiphertext
        check_use(key, envelope.version, "process")
        self._authentic(key)
        return self._stored(key, key.version(envelope.version))

    def _seal_strict(
        self, key: Key, version: KeyVersion, plaintext: bytes, context: Mapping[str, str], purpose: Purpose
    ) -> Sealed:
        aad = self._aad(key, version.number, ev.STRICT, purpose, context)
        iv, sealed = self._hsm(key).gcm_seal(
            self._stored(key, version), hashlib.sha256(aad).digest(), ev.COMMITMENT + plaintext
        )
        made = Envelope(ev.STRICT, key.id, purpose, version.number, b"", b"", iv, b"", sealed)
        return Sealed(made.to_bytes(), version.number, ev.STRICT)

    def _sealed(
        self,
        key: Key,
        version: KeyVersion,
        suite: int,
        purpose: Purpose,
        salt: bytes,
        index: bytes,
        derived: bytes,
        plaintext: bytes,
        aad: bytes,
    ) -> Sealed:
        iv = self._random(12)
        commitment, sealed = ev.seal_with(derived, iv, plaintext, aad)
        made = Envelope(suite, key.id, purpose, version.number, salt, index, iv, commitment, sealed)
        return Sealed(made.to_bytes(), version.number, suite)

    def _stored(self, key: Key, version: KeyVersion) -> StoredKey:
        material = _material(key)
        return StoredKey(
            version.object_id,
            material,
            version.blob,
            version.mechanism,
            version.kek,
            version.public,
            rowmac.version_row(key.tenant, key.id, material, version),
            version.mac,
        )

    def _authentic(self, key: Key) -> None:
        """Check the row's MAC before its first use in this process; RowDamaged if it is not ours."""
        if self._genuine.get(key.id) is key:
            return
        if not hmac.compare_digest(self._hsm(key).row_mac(rowmac.key_row(key)), key.mac):
            raise RowDamaged(f"row of key {key.id} was changed outside the service")
        with self._lock:
            if len(self._genuine) >= _CACHE:
                self._genuine.clear()
            self._genuine[key.id] = key

    def _authentic_version(self, key: Key, version: KeyVersion) -> None:
        binding = rowmac.version_row(key.tenant, key.id, _material(key), version)
        if not hmac.compare_digest(self._hsm(key).row_mac(binding), version.mac):
            raise RowDamaged(f"row of version {version.number} of key {key.id} was changed outside the service")

    def _count(self, key: Key, version: KeyVersion) -> None:
        """Count one use before it happens. Leases are committed first, so a crash never counts too few."""
        with self._lock:
            left = self._leases.get(version.object_id, 0)
            if left > 0:
                self._leases[version.object_id] = left - 1
                return
            block = _STRICT_BLOCK if key.suite == ev.STRICT else _BLOCK
            if key.rotation.max_uses is not None:
                block = max(1, min(block, key.rotation.max_uses // 64))
            total = self._catalog.lease_uses(key.id, version.number, block)
            if key.suite == ev.STRICT and total > STRICT_LIMIT:
                raise KeyLimitReached(f"version {version.number} of key {key.id} must not encrypt any more; rotate it")
            self._leases[version.object_id] = block - 1

    def _new_version(
        self, tenant: str, key_id: uuid.UUID, region: str, material: Material, number: int, now: int
    ) -> KeyVersion:
        object_id = self._uuid()
        made = self._hsms[region].generate(material, object_id)
        version = KeyVersion(number, KeyState.ACTIVE, now, object_id, made.mechanism, made.kek, made.blob, made.public)
        return self._maced_version(tenant, key_id, region, material, version)

    def _maced_version(
        self,
        tenant: str,
        key_id: uuid.UUID,
        region: str,
        material: Material,
        version: KeyVersion,
        **changes: Any,
    ) -> KeyVersion:
        changed = dataclasses.replace(version, **changes)
        mac = self._hsms[region].row_mac(rowmac.version_row(tenant, key_id, material, changed))
        return dataclasses.replace(changed, mac=mac)

    def _maced(self, key: Key) -> Key:
        return dataclasses.replace(key, mac=self._hsm(key).row_mac(rowmac.key_row(key)))

    def _update(self, key: Key, changed: Sequence[KeyVersion], **changes: Any) -> Plan:
        now = max(self._clock(), key.updated_at)
        new = self._maced(dataclasses.replace(key, kv=key.kv + 1, updated_at=now, **changes))
        return self._plan(new, lambda c: self._catalog.update(c, new, was=key.kv, versions=changed))

    def _plan(self, key: Key, write: Callable[[Connection], None]) -> Plan:
        def applied() -> None:
            with self._lock:
                self._keys[key.id] = key
                self._genuine[key.id] = key  # this process made the MAC
            if key.state is not KeyState.ACTIVE or key.delete_at is not None:
                self._evict(key)

        return Plan(key, write, applied)

    def _evict(self, key: Key) -> None:
        hsm = self._hsms.get(key.home)
        if hsm is not None:
            for version in key.versions:
                hsm.forget(version.object_id)


class Batch:
    """Seals and opens many envelopes with one derivation for each key, version and salt.

    The secrets live until the block ends; the server draws the salt, and no two requests share one (crypto.md 2).
    """

    def __init__(self, store: Keystore) -> None:
        self._store = store
        self._salts: dict[tuple[uuid.UUID, int], bytes] = {}
        self._secrets: dict[tuple[uuid.UUID, int, bytes], bytes] = {}
        self._index = 0

    def __enter__(self) -> Batch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._secrets.clear()
        self._salts.clear()

    def seal(
        self,
        key: Key,
        plaintext: bytes,
        context: Mapping[str, str],
        *,
        purpose: Purpose = Purpose.ENCRYPT,
        version: int | None = None,
    ) -> Sealed:
        """As `Keystore.seal`, in suite 0x0004 where the key's suite is 0x0001."""
        store = self._store
        if key.suite == ev.STRICT:
            return store.seal(key, plaintext, context, purpose=purpose, version=version)
        chosen = store._prepare_seal(key, plaintext, context, version)
        slot = (key.id, chosen.number)
        if slot not in self._salts:
            self._salts[slot] = store._random(32)
        salt = self._salts[slot]
        index = self._index.to_bytes(4, "big")
        self._index += 1
        aad = store._aad(key, chosen.number, ev.BATCH, purpose, context)
        derived = ev.item_keys(self._secret(key, store._stored(key, chosen), chosen.number, salt), index, aad)
        return store._sealed(key, chosen, ev.BATCH, purpose, salt, index, derived, plaintext, aad)

    def open(self, key: Key, envelope: Envelope, context: Mapping[str, str], *, purpose: Purpose) -> bytes:
        """As `Keystore.open`."""
        store = self._store
        if envelope.suite != ev.BATCH:
            return store.open(key, envelope, context, purpose=purpose)
        stored = store._prepare_open(key, envelope, purpose)
        aad = store._aad(key, envelope.version, ev.BATCH, purpose, context)
        secret = self._secret(key, stored, envelope.version, envelope.salt)
        return ev.open_with(ev.item_keys(secret, envelope.index, aad), envelope, aad)

    def _secret(self, key: Key, stored: StoredKey, number: int, salt: bytes) -> bytes:
        slot = (key.id, number, salt)
        if slot not in self._secrets:
            self._secrets[slot] = self._store._hsm(key).hmac(stored, "sha512", ev.batch_input(salt))
        return self._secrets[slot]


def check_state(key: Key, *allowed: KeyState) -> None:
    """WrongState (or KeyDestroyed) unless the key is in one of these states and not waiting for deletion."""
    if key.state is KeyState.DESTROYED:
        raise KeyDestroyed(f"key {key.id} was destroyed")
    if key.state not in allowed or key.delete_at is not None:
        raise WrongState(key.id, key.api_state)


def _material(key: Key) -> Material:
    return material_of(key.spec, key.suite)


def _rotation_due(key: Key, now: int) -> bool:
    latest, rotation = key.latest, key.rotation
    aged = rotation.max_age is not None and now - latest.created_at >= rotation.max_age * 1_000_000
    used = rotation.max_uses is not None and latest.uses >= rotation.max_uses
    return aged or used or (key.suite == ev.STRICT and latest.uses >= STRICT_LIMIT - _STRICT_BLOCK)


def _signed_data(key: Key, algorithm: str, message: bytes | None, digest: bytes | None) -> tuple[SignScheme, bytes]:
    """The scheme, and what is signed: a digest of the hash's length, or the message for Ed25519."""
    if algorithm not in _SCHEMES[key.spec]:
        allowed = ", ".join(sorted(_SCHEMES[key.spec]))
        raise InputRefused("/algorithm", "not_for_spec", f"{key.spec} keys sign with {allowed}")
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
        raise InputRefused("/digest", "wrong_length", f"{algorithm_hash.digest_size} bytes for {scheme}")
    return scheme, digest


def _verify(spec: KeySpec, spki: bytes, scheme: SignScheme, data: bytes, signature: bytes, form: str) -> bool:
    public = load_der_public_key(spki)
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


__all__ = ["API_STATE", "Batch", "InputRefused", "KeyLimitReached", "Keystore", "NewKey", "Plan", "Sealed", "StaleKey"]
