"""`keystore.Hsm` on a PKCS#11 token."""

from __future__ import annotations

import hashlib
import hmac
import os
import statistics
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ed25519, utils
from cryptography.hazmat.primitives.serialization import load_der_public_key

from keystore.hsm import (
    HsmFault,
    HsmStatus,
    HsmUnavailable,
    InvalidCiphertext,
    Material,
    RowDamaged,
    SignScheme,
    StoredKey,
    UnsupportedByHsm,
    Wrapped,
)
from keystore.pkcs11 import selftest
from keystore.pkcs11.binding import Module, Session, gcm, mechanism, module, pss
from keystore.pkcs11.errors import CkError
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
    sign_parts,
    spki,
)
from keystore.pkcs11.sessions import TokenSessions, Unwrap
from keystore.pkcs11.vendors import VENDORS, Vendor

FAST_US: Final = 200.0  # a call quicker than this costs less inline than a thread hop
ROOT, ROW_MAC, AUDIT = "root-kek", "row-mac", "audit"


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
    sessions: int = 8
    environment: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def profile(self) -> Vendor:
        """The vendor's profile; HsmUnavailable names the known ones."""
        if self.vendor not in VENDORS:
            raise HsmUnavailable(f"unknown HSM vendor {self.vendor!r}; known: {', '.join(sorted(VENDORS))}")
        return VENDORS[self.vendor]

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

    def label(self, role: str, version: int = 1) -> str:
        """CKA_LABEL, for people; often public, so nothing of a tenant stands in it."""
        return f"skms/{self.installation}/{role}/{version}"


def connect(config: TokenConfig, loaded: Module | None = None) -> TokenSessions:
    """Load the module, find the token, log in."""
    vendor = config.profile()
    os.environ.update(config.environment)
    if loaded is None:
        if not config.module.is_file():
            raise HsmUnavailable(f"PKCS#11 module {config.module} does not exist: install the HSM's client")
        try:
            loaded = module(str(config.module), vendor.reserved)
        except CkError as error:
            raise HsmUnavailable(f"PKCS#11 module {config.module} does not start: {error}") from error
    config.lock_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    sessions = TokenSessions(
        loaded,
        label=config.token_label,
        serial=config.token_serial or None,
        pin=config.pin,
        size=min(config.sessions, vendor.max_sessions),
        read_only=vendor.read_only_sessions,
        lock=config.lock_dir / "hsm-start.lock" if vendor.serialised_start else None,
    )
    sessions.start()
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
        self._root_id = config.object_id(ROOT)
        self._kwp = self._vendor.kwp
        self._mechanisms = self._listed()
        self._missing: dict[Material, str | None] = {}
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

    # ---- start ---------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Find the installation's keys, run the self-test, probe the kinds, measure the speed."""
        sessions = self._sessions
        kek = self._root(sessions.home)
        self._row_mac_key(sessions.home)
        selftest.run(selftest.Subject(sessions.home, self._vendor, kek))
        self._audit_public = self.audit_public_key()
        for material in (Material.EC_P256, Material.EC_P384, Material.ED25519):
            self._missing[material] = self._probe(material)
        times = []
        for _ in range(15):
            begun = time.perf_counter()
            self.row_mac(b"speed")
            times.append((time.perf_counter() - begun) * 1e6)
        self._fast = statistics.median(times) < FAST_US

    def _listed(self) -> frozenset[int]:
        _, token = self._sessions.module.find_slot(self._config.token_label, self._config.token_serial or None)
        return frozenset(int(m) for m in token.slot.get_mechanisms())

    def _probe(self, material: Material) -> str | None:
        """Make, wrap, unwrap and use a pair of the kind; why that fails, or None."""
        if (reason := self._unlisted(material)) is not None:
            return reason
        try:
            made = self._birth(material, uuid.uuid4())
            template = in_use(material, self._vendor)
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
        absent = [m for m in (kind.generate, kind.use, self._kwp) if m not in self._mechanisms]
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

    def _find(self, session: Session, role: str, object_class: int) -> int:
        wanted = {A.CLASS: object_class, A.ID: self._config.object_id(role).bytes, A.TOKEN: True}
        found = session.find(wanted)
        if len(found) == 1:
            return found[0]
        if not self._sessions.logged_in():
            raise CkError(0x101, "C_FindObjects")  # logged out, a token shows no private objects
        where = f"token {self._config.token_label!r}"
        if not found:
            raise HsmUnavailable(f"{where} holds no {role} key of this installation: run `skms hsm init`")
        raise HsmUnavailable(f"{where} holds more than one {role} key of this installation: remove all but one")

    def _root(self, _: Session) -> int:
        return self._sessions.token_object(b"root", lambda s: self._find(s, ROOT, CKO.SECRET_KEY))

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
            root = self._root(session)
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
            return Wrapped(blob, KWP_NAME, self._root_id, public)

        # Nothing is on the token if this fails: the objects are the session's, so it may run again.
        return self._sessions.run(act)

    def _public(self, session: Session, material: Material, handle: int) -> bytes:
        wanted = (A.MODULUS, A.PUBLIC_EXPONENT) if KINDS[material].key_type == CKK.RSA else (A.EC_POINT,)
        return spki(material, {number: session.get(handle, number) for number in wanted}, self._vendor)

    def row_mac(self, data: bytes) -> bytes:
        """HMAC-SHA-256 under the row-MAC key."""
        return self._sessions.run(lambda s, _: s.sign(self._row_mac_key(s), mechanism(CKM.SHA256_HMAC), data, 64))

    def hmac(self, key: StoredKey, algorithm: str, data: bytes) -> bytes:
        """HMAC under a KDK or HMAC key."""
        number = HMAC[algorithm]
        return self._sessions.run(lambda s, h: s.sign(h, mechanism(number), data, 64), key=self._unwrap(key))

    def gcm_seal(self, key: StoredKey, aad: bytes, data: bytes) -> tuple[bytes, bytes]:
        """(IV, ciphertext and tag), AES-256-GCM in the token. A retry takes a fresh IV."""
        written = self._vendor.gcm_iv != "caller"

        def act(session: Session, handle: int) -> tuple[bytes, bytes]:
            # 12 random bytes, or zeros for the token to write over; never a counter: a restored database repeats it.
            how = gcm(CKM.AES_GCM, bytes(12) if written else os.urandom(12), aad)
            sealed = session.encrypt(handle, how, data)
            iv = bytes(how.keep.iv.raw)
            if iv == bytes(12):
                raise HsmFault("CKR_GENERAL_ERROR")  # the token was to write the IV and did not: nonce reuse
            return iv, sealed

        return self._sessions.run(act, key=self._unwrap(key))

    def gcm_open(self, key: StoredKey, iv: bytes, aad: bytes, data: bytes) -> bytes:
        """The plaintext; InvalidCiphertext whatever code the vendor has for a bad tag."""
        if len(iv) != 12 or len(data) < 16:
            raise InvalidCiphertext  # some tokens leave the operation active after such input
        return self._sessions.run(
            lambda s, h: s.decrypt(h, gcm(CKM.AES_GCM, iv, aad), data), key=self._unwrap(key), judges_input=True
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
            root_kek=self._root_id,
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

    # ---- inside --------------------------------------------------------------------------------------------------

    def _unwrap(self, key: StoredKey) -> Unwrap:
        return Unwrap(key.object_id.bytes, self._loader(key))

    def _loader(self, key: StoredKey) -> Callable[[Session], int]:
        def load(home: Session) -> int:
            # Key wrap has no AAD: the MAC says whose key this is and of what kind, before the token sees the blob.
            made = home.sign(self._row_mac_key(home), mechanism(CKM.SHA256_HMAC), key.binding, 64)
            if not hmac.compare_digest(made, key.mac):
                raise RowDamaged(f"row of key version {key.object_id} was changed outside the service")
            if key.kek != self._root_id or key.mechanism != KWP_NAME or not key.blob:
                raise RowDamaged(f"row of key version {key.object_id} names another root KEK or mechanism")
            template = in_use(key.material, self._vendor)
            return home.unwrap(mechanism(self._kwp), self._root(home), key.blob, template)

        return load
