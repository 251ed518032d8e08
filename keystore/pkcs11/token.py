"""`keystore.Hsm` on a PKCS#11 token."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import statistics
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ed25519, utils
from cryptography.hazmat.primitives.serialization import load_der_public_key

from keystore.hsm import (
    HsmEmpty,
    HsmFault,
    HsmLocked,
    HsmStatus,
    HsmUnavailable,
    InvalidCiphertext,
    Material,
    OaepHash,
    RowDamaged,
    SignScheme,
    StoredKey,
    UnsupportedByHsm,
    Wrapped,
)
from keystore.pkcs11 import selftest
from keystore.pkcs11.binding import Module, Session, gcm, mechanism, module, pss
from keystore.pkcs11.errors import CkError
from keystore.pkcs11.importing import Arrivals
from keystore.pkcs11.mechanisms import (
    CKK,
    CKM,
    CKO,
    HMAC,
    KINDS,
    KWP_NAME,
    MECHANISM_NAMES,
    PSS,
    A,
    at_birth,
    in_use,
    pair_at_birth,
    sealed_with,
    sign_parts,
    spki,
)
from keystore.pkcs11.recovery import recovery_of
from keystore.pkcs11.sessions import TokenSessions, Unwrap
from keystore.pkcs11.vendors import VENDORS, ProfileInvalid, Vendor, profile

FAST_US: Final = 200.0  # a call quicker than this costs less inline than a thread hop
ROOT, ROW_MAC, AUDIT = "root-kek", "row-mac", "audit"
MAX_ROOTS: Final = 1_000  # root KEKs that a region has in its life: how far a row's KEK id is searched for
CHECKED_ROWS: Final = 4_096  # row MACs remembered as right
MAX_DATA: Final = 2_048  # bytes of a data object
MAX_OBJECTS: Final = 16  # data objects of one role: one, and what crashes left


@dataclass(frozen=True, slots=True)
class TokenConfig:
    """Which token, and how to get at it."""

    name: str
    region: str
    vendor: str
    module: Path
    token_label: str
    pin_file: Path
    lock_dir: Path  # the node's state directory, shared by its workers
    installation: uuid.UUID
    token_serial: str = ""
    token_dir: Path | None = None  # fills `{token_dir}` in the profile's pReserved
    sessions: int = 8
    environment: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def profile(self) -> Vendor:
        """The vendor's profile; HsmUnavailable names the known ones, or what is wrong with the file."""
        try:
            return profile(self.vendor)
        except KeyError:
            known = ", ".join(sorted(VENDORS))
            raise HsmUnavailable(
                f"HSM {self.name}: unknown vendor {self.vendor!r}; known: {known}, or the absolute path of a profile"
            ) from None
        except ProfileInvalid as error:
            raise HsmUnavailable(f"HSM {self.name}: {error}") from None

    def reserved(self) -> bytes | None:
        """pReserved of C_Initialize; HsmUnavailable if it needs the token's directory and that is not given."""
        template = self.profile().reserved
        if "{token_dir}" not in template:
            return template.encode() or None
        if self.token_dir is None:
            raise HsmUnavailable(f"HSM {self.name}: vendor {self.vendor!r} needs the option token_dir")
        directory = str(self.token_dir)
        if "'" in directory:
            raise HsmUnavailable(f"HSM {self.name}: token_dir must not contain a quotation mark")
        return template.replace("{token_dir}", directory).encode()

    def pin(self) -> bytes:
        """The user PIN from its file; HsmUnavailable if that cannot be read."""
        try:
            return self.pin_file.read_bytes().rstrip(b"\r\n")
        except OSError as error:
            raise HsmUnavailable(f"PIN file {self.pin_file}: {error.strerror}") from None

    def object_id(self, role: str, version: int = 1) -> uuid.UUID:
        """CKA_ID of one of the installation's own token objects: the only thing they are searched by.

        Every region has a root KEK of its own, and all HSMs of a region hold the same.
        """
        return uuid.uuid5(self.installation, f"skms/{self.region}/{role}/{version}")

    def root_version(self, kek: uuid.UUID) -> int:
        """Which version of the region's root KEK has this id; RowDamaged if none has."""
        slot = (self.installation, self.region, kek)
        if slot not in _root_versions:
            known = {self.object_id(ROOT, version): version for version in range(1, MAX_ROOTS + 1)}
            if kek not in known:
                raise RowDamaged(f"a row names the root KEK {kek}, which is none of region {self.region}")
            _root_versions[slot] = known[kek]
        return _root_versions[slot]

    def label(self, role: str, version: int = 1) -> str:
        """CKA_LABEL, for people; often public, so nothing of a tenant stands in it."""
        return f"skms/{self.installation}/{role}/{version}"


_root_versions: dict[tuple[uuid.UUID, str, uuid.UUID], int] = {}
_locked: dict[tuple[str, str, str], str] = {}  # (module, label, serial) of tokens that refused their PIN, and why


def connect(config: TokenConfig, loaded: Module | None = None) -> TokenSessions:
    """Load the module, find the token, log in. HsmUnavailable with the reason.

    HsmLocked if the token refused its PIN, now or earlier in this process: a second try is never made.
    """
    vendor = config.profile()
    where = (str(config.module), config.token_label, config.token_serial)
    if where in _locked:
        raise HsmLocked(_locked[where])
    os.environ.update({**vendor.environment, **config.environment})
    if loaded is None:
        if not config.module.is_file():
            usual = "".join(f"; usual place: {path}" for path in vendor.modules if path.is_file())
            raise HsmUnavailable(f"PKCS#11 module {config.module} does not exist: install the HSM's client{usual}")
        try:
            loaded = module(str(config.module), config.reserved())
        except CkError as error:
            raise HsmUnavailable(f"PKCS#11 module {config.module} does not start: {error}", ckr=error.name) from error
    loaded.can_close_session, loaded.find_limit = vendor.can_close_session, vendor.find_limit
    loaded.serialised = vendor.serialised_calls
    config.lock_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = config.lock_dir / "hsm-start.lock" if vendor.serialised_start else None
    sessions = TokenSessions(
        recovery_of(loaded, call_limit=vendor.call_limit, lock=lock),
        label=config.token_label,
        serial=config.token_serial or None,
        pin=config.pin,
        size=min(config.sessions, vendor.max_sessions),
        read_only=vendor.read_only_sessions,
        user_type=vendor.user_type,
        bad_input=vendor.bad_input_codes,
    )
    try:
        sessions.start()
    except HsmLocked as refused:
        _locked[where] = str(refused)
        raise
    return sessions


def open_token(config: TokenConfig, loaded: Module | None = None) -> Pkcs11Hsm:
    """A token that passed its self-test and holds the installation's keys.

    HsmUnavailable if it cannot be reached or lacks them, SelfTestFailed if it breaks a rule.
    """
    hsm = Pkcs11Hsm(config, connect(config, loaded))
    try:
        hsm.check()
    except BaseException:
        hsm.close()
        raise
    return hsm


class Pkcs11Hsm:
    """One token. Thread-safe."""

    def __init__(self, config: TokenConfig, sessions: TokenSessions) -> None:
        self._config, self._vendor, self._sessions = config, config.profile(), sessions
        self._root_version = 1
        self._checked: OrderedDict[bytes, None] = OrderedDict()
        self._checked_lock = threading.Lock()
        self._kwp = self._vendor.kwp
        self._mechanisms = self._listed()
        self._missing: dict[Material, str | None] = {}
        self._arrivals = Arrivals(sessions, self._vendor, self._root_in_force)
        self._fast = False
        self._serial = sessions.serial
        self._audit_public = b""

    @property
    def name(self) -> str:
        """The HSM's name in configuration, metrics and records."""
        return self._config.name

    @property
    def region(self) -> str:
        """The place where it stands."""
        return self._config.region

    @property
    def fast(self) -> bool:
        """Whether calls are quick enough for the event loop; measured at start."""
        return self._fast

    @property
    def state(self) -> str:
        """UP, DOWN or LOCKED, without calling the token."""
        return self._sessions.state

    @property
    def root_kek(self) -> uuid.UUID:
        """CKA_ID of the root KEK that new keys are wrapped under."""
        return self._config.object_id(ROOT, self._root_version)

    def use_root(self, version: int) -> None:
        """Wrap new keys under this version of the region's root KEK; HsmUnavailable if the token does not hold it."""
        self._sessions.run(lambda s, _: self._root(s, version))
        self._root_version = version

    # ---- start ---------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Find the installation's keys, run the self-test, probe the kinds, measure the speed."""
        sessions = self._sessions
        versions = self._roots(sessions.home)
        if self._root_version not in versions:
            # Which one is current is said by the installation's own rows (`use_root`); the oldest is there until then.
            self._root_version = min(versions, default=self._root_version)
        kek = self._root(sessions.home)
        self._row_mac_key(sessions.home)
        self._missing = dict(
            selftest.run(selftest.Subject(sessions.home, self._vendor, kek, self._mechanisms)).missing()
        )
        self._audit_public = self.audit_public_key()
        for material in (Material.EC_P256, Material.EC_P384, Material.ED25519):
            self._missing[material] = self._probe(material)
        times = []
        for _ in range(15):
            begun = time.perf_counter()
            self.row_mac(b"speed")
            times.append((time.perf_counter() - begun) * 1e6)
        self._fast = self._vendor.in_process and statistics.median(times) < FAST_US

    def _listed(self) -> frozenset[int]:
        _, token = self._sessions.module.find_slot(self._config.token_label, self._config.token_serial or None)
        return frozenset(int(m) for m in token.slot.get_mechanisms())

    def _probe(self, material: Material) -> str | None:
        """Make, wrap, unwrap and use a pair of the kind; why that fails, or None."""
        if (reason := self._unlisted(material)) is not None:
            return reason
        try:
            made = self._birth(material, uuid.uuid4())
            template = in_use(material, self._vendor, made.public)
            scheme = {
                Material.EC_P256: SignScheme.ECDSA_SHA_256,
                Material.EC_P384: SignScheme.ECDSA_SHA_384,
                Material.ED25519: SignScheme.ED25519,
            }[material]

            def use(session: Session, _: int) -> None:
                handle = session.unwrap(mechanism(self._kwp), self._root(session), made.blob, template)
                try:
                    number, _hash, data = sign_parts(scheme, bytes(48 if material is Material.EC_P384 else 32))
                    session.sign(handle, mechanism(number), data)
                finally:
                    session.destroy(handle)

            self._sessions.run(use)
        except HsmFault as fault:
            return f"{material}: the token lists its mechanisms but answers {fault.ckr}"
        except ValueError:
            return f"{material}: the token's public key has an unknown encoding"
        return None

    def _unlisted(self, material: Material) -> str | None:
        kind = KINDS[material]
        use = self._vendor.gcm if kind.use == CKM.AES_GCM else kind.use
        absent = [m for m in (kind.generate, use, self._kwp) if m not in self._mechanisms]
        if not absent:
            return None
        names = ", ".join(MECHANISM_NAMES.get(m, f"mechanism 0x{m:x}") for m in absent)
        return f"{material}: the token lacks {names}"

    def lists(self, *mechanisms: int) -> bool:
        """Whether the token lists all these mechanisms."""
        return self._mechanisms.issuperset(mechanisms)

    def missing(self, material: Material) -> str | None:
        """Why this token cannot hold such keys, or None."""
        if material not in self._missing:
            self._missing[material] = self._unlisted(material)
        return self._missing[material]

    # ---- the installation's own objects ----------------------------------------------------------------------------

    def _find(self, session: Session, role: str, object_class: int, version: int = 1) -> int:
        wanted = {A.CLASS: object_class, A.ID: self._config.object_id(role, version).bytes, A.TOKEN: True}
        found = session.find(wanted)
        if len(found) == 1:
            return found[0]
        if not self._sessions.logged_in():
            raise CkError(0x101, "C_FindObjects")  # logged out, a token shows no private objects
        where = f"token {self._config.token_label!r}"
        if not found:
            name = role if version == 1 else f"{role} (version {version})"
            raise HsmEmpty(f"{where} holds no {name} key of this installation: run `skms hsm init`")
        raise HsmUnavailable(f"{where} holds more than one {role} key of this installation: remove all but one")

    def _root(self, _: Session, version: int | None = None) -> int:
        number = self._root_version if version is None else version
        return self._sessions.token_object(b"root/%d" % number, lambda s: self._find(s, ROOT, CKO.SECRET_KEY, number))

    def _root_in_force(self, session: Session) -> tuple[int, uuid.UUID]:
        version = self._root_version
        return self._root(session, version), self._config.object_id(ROOT, version)

    def _roots(self, session: Session) -> list[int]:
        """The versions of the region's root KEK that the token holds."""
        found = []
        for handle in session.find(
            {A.CLASS: CKO.SECRET_KEY, A.KEY_TYPE: CKK.AES, A.TOKEN: True, A.WRAP: True}, MAX_ROOTS
        ):
            with contextlib.suppress(ValueError, RowDamaged):  # another installation's, or no id of ours at all
                found.append(self._config.root_version(uuid.UUID(bytes=session.get(handle, A.ID, 256))))
        return found

    def _row_mac_key(self, _: Session) -> int:
        return self._sessions.token_object(b"row-mac", lambda s: self._find(s, ROW_MAC, CKO.SECRET_KEY))

    def _audit_key(self, _: Session) -> int:
        return self._sessions.token_object(b"audit", lambda s: self._find(s, AUDIT, CKO.PRIVATE_KEY))

    # ---- keystore.Hsm --------------------------------------------------------------------------------------------

    def generate(self, material: Material, object_id: uuid.UUID) -> Wrapped:
        """Make a key inside the token, wrap it, destroy the clear object. UnsupportedByHsm with the reason."""
        if (reason := self.missing(material)) is not None:
            raise UnsupportedByHsm(reason)
        return self._birth(material, object_id)

    def _birth(self, material: Material, object_id: uuid.UUID) -> Wrapped:
        kind = KINDS[material]

        def act(session: Session, _: int) -> Wrapped:
            version = self._root_version
            root = self._root(session, version)
            if kind.object_class == CKO.SECRET_KEY:
                born = session.generate(mechanism(kind.generate), at_birth(material, object_id))
                others, public = [born], b""
            else:
                templates = pair_at_birth(material, object_id, self._vendor)
                pub, born = session.generate_pair(mechanism(kind.generate), *templates)
                others = [born, pub]
            try:
                if len(others) == 2:
                    public = self._public(session, material, others[1])
                blob = session.wrap(mechanism(self._kwp), root, born)
            finally:
                for handle in others:
                    session.destroy(handle)
            return Wrapped(blob, KWP_NAME, self._config.object_id(ROOT, version), public)

        # Nothing is on the token if this fails: the objects are the session's, so it may run again.
        return self._sessions.run(act)

    def _public(self, session: Session, material: Material, handle: int) -> bytes:
        wanted = (A.MODULUS, A.PUBLIC_EXPONENT) if KINDS[material].key_type == CKK.RSA else (A.EC_POINT,)
        return spki(material, {number: session.get(handle, number) for number in wanted}, self._vendor)

    def row_mac(self, data: bytes) -> bytes:
        """HMAC-SHA-256 under the row-MAC key."""
        return self._sessions.run(lambda s, _: s.sign(self._row_mac_key(s), mechanism(CKM.SHA256_HMAC), data, 64))

    def check_row(self, binding: bytes, mac: bytes) -> None:
        """RowDamaged unless `mac` is the row MAC of `binding`. What was right once is remembered, not asked again."""
        self._sessions.run(lambda s, _: self._check_row(s, binding, mac))

    def _check_row(self, session: Session, binding: bytes, mac: bytes) -> None:
        seen = hashlib.sha256(len(mac).to_bytes(4, "big") + mac + binding).digest()
        with self._checked_lock:
            if seen in self._checked:
                self._checked.move_to_end(seen)
                return
        # Computed and compared here, never by C_Verify: one vendor answers a wrong HMAC as if the device had failed.
        made = session.sign(self._row_mac_key(session), mechanism(CKM.SHA256_HMAC), binding, 64)
        if not hmac.compare_digest(made, mac):
            raise RowDamaged("a key row was changed outside the service: its row MAC is wrong")
        with self._checked_lock:
            self._checked[seen] = None
            if len(self._checked) > CHECKED_ROWS:
                self._checked.popitem(last=False)

    def hmac(self, key: StoredKey, algorithm: str, data: bytes) -> bytes:
        """HMAC under a KDK or HMAC key."""
        number = HMAC[algorithm]
        return self._sessions.run(lambda s, h: s.sign(h, mechanism(number), data, 64), key=self._unwrap(key))

    def gcm_seal(self, key: StoredKey, aad: bytes, data: bytes) -> tuple[bytes, bytes]:
        """(IV, ciphertext and tag), AES-256-GCM in the token. A retry takes a fresh IV."""
        if len(data) > self._vendor.max_gcm_bytes:
            raise UnsupportedByHsm(f"{self.name} encrypts at most {self._vendor.max_gcm_bytes} bytes in one call")

        def act(session: Session, handle: int) -> tuple[bytes, bytes]:
            try:
                return sealed_with(session, handle, self._vendor, aad, data)
            except ValueError:
                raise HsmFault("CKR_GENERAL_ERROR") from None  # the token was to make the IV and did not: nonce reuse

        return self._sessions.run(act, key=self._unwrap(key))

    def gcm_open(self, key: StoredKey, iv: bytes, aad: bytes, data: bytes) -> bytes:
        """The plaintext; InvalidCiphertext whatever code the vendor has for a bad tag."""
        if len(iv) != 12 or len(data) < 16:
            raise InvalidCiphertext  # some tokens leave the operation active after such input
        return self._sessions.run(
            lambda s, h: s.decrypt(h, gcm(self._vendor.gcm, iv, aad), data), key=self._unwrap(key), judges_input=True
        )

    def sign(self, key: StoredKey, scheme: SignScheme, data: bytes) -> bytes:
        """The signature over a digest (or message, for Ed25519)."""
        number, pss_hash, signed = sign_parts(scheme, data)

        def act(session: Session, handle: int) -> bytes:
            how = pss(number, *PSS[pss_hash]) if pss_hash else mechanism(number)
            return session.sign(handle, how, signed)

        return self._sessions.run(act, key=self._unwrap(key))

    def random(self, length: int) -> bytes:
        """Random bytes from the token."""
        return self._sessions.run(lambda s, _: s.random(length))

    def audit_public_key(self) -> bytes:
        """SubjectPublicKeyInfo (DER) of the audit key."""
        if self._audit_public:
            return self._audit_public
        identity = self._config.object_id(AUDIT).bytes

        def act(session: Session, _: int) -> bytes:
            handle = self._find(session, AUDIT, CKO.PUBLIC_KEY)
            edwards = bool(session.find({A.ID: identity, A.KEY_TYPE: CKK.EC_EDWARDS}))
            return self._public(session, Material.ED25519 if edwards else Material.EC_P256, handle)

        return self._sessions.run(act)

    def audit_sign(self, statement: bytes) -> bytes:
        """Sign with the audit key: Ed25519, or ECDSA P-256 over SHA-256 as DER."""
        if isinstance(load_der_public_key(self.audit_public_key()), ed25519.Ed25519PublicKey):
            return self._sessions.run(lambda s, _: s.sign(self._audit_key(s), mechanism(CKM.EDDSA), statement))
        digest = hashlib.sha256(statement).digest()
        raw = self._sessions.run(lambda s, _: s.sign(self._audit_key(s), mechanism(CKM.ECDSA), digest))
        return utils.encode_dss_signature(int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big"))

    def forget(self, object_id: uuid.UUID) -> None:
        """Evict a key from the cache at once."""
        self._sessions.forget(object_id.bytes)

    def canary(self) -> None:
        """The real path end to end: generate, wrap, unwrap, HMAC, destroy; and still the same token."""
        object_id = uuid.uuid4()
        made = self._birth(Material.HMAC_256, object_id)

        def act(session: Session, _: int) -> tuple[bytes, bytes]:
            handle = session.unwrap(
                mechanism(self._kwp), self._root(session), made.blob, in_use(Material.HMAC_256, self._vendor)
            )
            try:
                how = mechanism(CKM.SHA256_HMAC)
                return session.sign(handle, how, b"canary", 64), session.sign(handle, how, b"canary", 64)
            finally:
                session.destroy(handle)

        one, two = self._sessions.run(act)
        if len(one) != 32 or not hmac.compare_digest(one, two):
            raise HsmFault("CKR_GENERAL_ERROR")
        if self._sessions.serial != self._serial:
            raise HsmUnavailable(f"token {self._config.token_label!r} has another serial number than at start")

    def status(self) -> HsmStatus:
        """State without calling the token."""
        s = self._sessions
        specs = tuple(str(m) for m in Material if self.missing(m) is None)
        missing = tuple((str(m), reason) for m in Material if (reason := self.missing(m)) is not None)
        return HsmStatus(
            name=self.name,
            region=self.region,
            vendor=self._vendor.name,
            state=s.state,
            token_label=self._config.token_label,
            token_serial=self._serial,
            firmware=s.firmware,
            root_kek=self.root_kek,
            epoch=s.epoch,
            cached_keys=s.cached,
            sessions_open=s.opened,
            sessions_max=s.size,
            specs=specs,
            missing=missing,
            waivers=self._vendor.waivers,
        )

    def close(self) -> None:
        """Close the pool of sessions."""
        self._sessions.close()

    # ---- keystore.Importer ---------------------------------------------------------------------------------------

    def opens(self, oaep: OaepHash) -> bool:
        """Whether the token itself opens RSAES-OAEP with this hash."""
        return self._arrivals.opens(oaep)

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
        """Open what a customer wrapped, inside the token."""
        key = self._unwrap(transport)
        return self._arrivals.wrapped(key, oaep, wrapped, material, object_id, inner=inner, public=public)

    def admit_clear(self, material: Material, clear: bytes, object_id: uuid.UUID, *, public: bytes) -> Wrapped:
        """Take in a key that had to be opened outside the token."""
        return self._arrivals.clear(material, clear, object_id, public=public)

    # ---- keystore.DataKeeper -------------------------------------------------------------------------------------

    def data_objects(self, role: str) -> tuple[bytes, ...]:
        """What the data objects of a role hold."""
        names = self._data_names(role)
        return self._sessions.run(lambda s, _: tuple(s.get(h, A.VALUE) for h in s.find(names, MAX_OBJECTS)))

    def keep_data_object(self, role: str, data: bytes) -> None:
        """Store a few bytes: CKO_DATA, private, so that only who has logged in sees or changes it."""
        if len(data) > MAX_DATA:
            raise UnsupportedByHsm(f"HSM {self.name}: a data object of {len(data)} bytes; at most {MAX_DATA}")
        names = self._data_names(role)
        birth = {**names, A.TOKEN: True, A.PRIVATE: True, A.MODIFIABLE: False, A.VALUE: data}

        def act(_: Session, __: int) -> None:
            # The pool's sessions may be read-only. A new object, because SoftHSM changes no CKA_VALUE.
            session = self._sessions.module.open(self._sessions.slot, write=True)
            try:
                before = session.find(names, MAX_OBJECTS)
                session.create(birth)
                for handle in before:
                    session.destroy(handle)
            finally:
                session.close()

        try:
            self._sessions.run(act)
        except HsmFault as fault:
            reason = f"HSM {self.name} keeps no data objects: it answers {fault.ckr}"
            raise UnsupportedByHsm(reason) from None

    def _data_names(self, role: str) -> dict[int, object]:
        return {A.CLASS: CKO.DATA, A.APPLICATION: "skms", A.LABEL: self._config.label(role)}

    # ---- inside --------------------------------------------------------------------------------------------------

    def _unwrap(self, key: StoredKey) -> Unwrap:
        return Unwrap(key.object_id.bytes, self._loader(key))

    def _loader(self, key: StoredKey) -> Callable[[Session], int]:
        def load(home: Session) -> int:
            # Key wrap has no AAD: the MAC says whose key this is and of what kind, before the token sees the blob.
            self._check_row(home, key.binding, key.mac)
            if key.mechanism != KWP_NAME or not key.blob:
                raise RowDamaged(f"row of key version {key.object_id} names another mechanism, or has no key")
            root = self._root(home, self._config.root_version(key.kek))
            return home.unwrap(mechanism(self._kwp), root, key.blob, in_use(key.material, self._vendor, key.public))

        return load
