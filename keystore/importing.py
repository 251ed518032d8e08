"""Import of keys that were made elsewhere: wrapping keys, tokens, and what material is refused.

A key of origin `external` begins without a version. The service hands out a wrapping key and a token for one import; the
customer wraps the key and sends both back; the material is checked and becomes the next version. Where the token itself
can open what was wrapped, the material is never in clear outside it ("hsm"); else it is opened in this process and
handed to the token at once ("software"). Formats: docs/import.md.
"""

from __future__ import annotations

import base64
import dataclasses
import enum
import functools
import hashlib
import hmac
import itertools
import math
import os
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, hpke, serialization
from cryptography.hazmat.primitives.asymmetric import ec, mlkem, padding, rsa, x25519
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap_with_padding
from sqlalchemy import Connection

from keystore import envelope as ev
from keystore import rowmac
from keystore.catalog import Catalog, ImportRow
from keystore.hsm import (
    Hsm,
    HsmFault,
    HsmUnavailable,
    InvalidCiphertext,
    Material,
    OaepHash,
    RowDamaged,
    SignScheme,
    StoredKey,
    Wrapped,
    importer_of,
)
from keystore.key import EXTERNAL, Imported, InputRefused, Key, KeySpec, KeyState, KeyUsage, KeyVersion
from keystore.store import Keystore, Plan, check_state, material_of, verify_signature

LIFETIME_S: Final = 24 * 3_600
ATTEMPTS: Final = 5
KEPT_US: Final = 30 * 86_400 * 1_000_000  # so long a spent or expired token is told apart from an invented one
CHECK_LABEL: Final = b"skms/kcv/1"
_FINGERPRINT_LABEL: Final = b"skms/import/fingerprint/1"
_TOKEN: Final = re.compile(r"skms_import_([A-Za-z0-9_-]{64})")
HPKE: Final = hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)
HSM, SOFTWARE = "hsm", "software"


class Wrapping(enum.StrEnum):
    """How a customer wraps a key for import. PKCS#1 v1.5 is none of them: its padding is an oracle."""

    RSAES_OAEP_SHA_1 = "RSAES_OAEP_SHA_1"
    RSAES_OAEP_SHA_256 = "RSAES_OAEP_SHA_256"
    RSA_AES_KEY_WRAP_SHA_1 = "RSA_AES_KEY_WRAP_SHA_1"
    RSA_AES_KEY_WRAP_SHA_256 = "RSA_AES_KEY_WRAP_SHA_256"
    HPKE = "HPKE_MLKEM768_X25519_SHA256_AES_256_GCM"

    @property
    def oaep(self) -> OaepHash | None:
        """The hash of its RSAES-OAEP; None for HPKE."""
        return None if self is Wrapping.HPKE else OaepHash(self.partition("_SHA_")[1][1:] + self.partition("_SHA_")[2])

    @property
    def two_steps(self) -> bool:
        """Whether RSA carries an AES key, and that the material (AES-KWP, RFC 5649)."""
        return self.startswith("RSA_AES")


TRANSPORTS: Final[Mapping[str, Material]] = MappingProxyType(
    {"RSA_3072": Material.TRANSPORT_RSA_3072, "RSA_4096": Material.TRANSPORT_RSA_4096}
)
_RSA_BITS: Final[Mapping[str, int]] = MappingProxyType({"RSA_3072": 3_072, "RSA_4096": 4_096})
SECRET_BYTES: Final[Mapping[Material, int]] = MappingProxyType(
    {Material.KDK_256: 32, Material.KDK_512: 64, Material.HMAC_256: 32, Material.HMAC_512: 64}
)
_CURVES: Final[Mapping[KeySpec, type[ec.EllipticCurve]]] = MappingProxyType(
    {KeySpec.EC_P256: ec.SECP256R1, KeySpec.EC_P384: ec.SECP384R1}
)
_PROOF: Final[Mapping[KeySpec, SignScheme]] = MappingProxyType(
    {
        KeySpec.EC_P256: SignScheme.ECDSA_SHA_256,
        KeySpec.EC_P384: SignScheme.ECDSA_SHA_384,
        KeySpec.RSA_3072: SignScheme.RSA_PSS_SHA_256,
        KeySpec.RSA_4096: SignScheme.RSA_PSS_SHA_256,
    }
)


@dataclass(frozen=True, slots=True)
class Parameters:
    """What a customer needs for one import."""

    key_id: uuid.UUID
    wrapping: Wrapping
    wrapping_key_spec: str | None  # None for HPKE
    public: bytes  # SubjectPublicKeyInfo (DER); for HPKE the ML-KEM-768 and the X25519 key, 1,184 and 32 bytes
    token: str = field(repr=False)
    expires_at: int  # microseconds
    path: str


@dataclass(frozen=True, slots=True)
class Import:
    """One import as it was asked for."""

    token: str = field(repr=False)
    wrapped: bytes = field(repr=False)
    check_value: str  # hex of 8 bytes
    public: bytes | None = None  # SubjectPublicKeyInfo of an asymmetric key, PEM or DER
    expires_at: int | None = None  # microseconds; the end of the material


class _Refused(InputRefused):
    """Material or token refused; it counts as a failed attempt."""


class Imports:
    """Imports of one installation's keys. Keeps nothing: all state is in the tables."""

    def __init__(self, store: Keystore, catalog: Catalog) -> None:
        self._store, self._catalog = store, catalog

    # ---- parameters ----------------------------------------------------------------------------------------------

    def plan_parameters(self, key: Key, wrapping: Wrapping, rsa_spec: str | None) -> tuple[Parameters, Plan]:
        """Make a wrapping key and a token for one import of this key; tokens made before are spent.

        WrongState, InputRefused; UnsupportedByHsm where the HSM takes no keys from outside.
        """
        _check_importable(key)
        if wrapping is Wrapping.HPKE and rsa_spec is not None:
            raise InputRefused("/wrapping_key_spec", "not_for_wrapping", "HPKE has one kind of key")
        if key.usage is KeyUsage.SIGN and wrapping.oaep is not None and not wrapping.two_steps:
            raise InputRefused("/wrapping", "not_for_spec", "a private key is too long for RSAES-OAEP alone")
        self._store.authentic(key)
        spec = None if wrapping is Wrapping.HPKE else rsa_spec or "RSA_3072"
        now = self._store.now()
        expires_at = (now // 1_000_000 + LIFETIME_S) * 1_000_000
        row = self._wrapping_key(key, wrapping, spec, expires_at)
        token = _token_text(row.import_id, self._hsm(key).row_mac(_token_row(key, row)))
        made = Parameters(key.id, wrapping, spec, row.public, token, expires_at, row.path)
        return made, Plan(key, lambda c: self._catalog.insert_import(c, row, now=now), lambda: None)

    def _wrapping_key(self, key: Key, wrapping: Wrapping, spec: str | None, expires_at: int) -> ImportRow:
        hsm, import_id = self._hsm(key), self._store.new_id()
        inside = spec is not None and wrapping.oaep is not None and importer_of(hsm).opens(wrapping.oaep)
        material = TRANSPORTS[spec] if inside and spec is not None else Material.KDK_512
        made = hsm.generate(material, import_id)
        public, sealed = made.public, b""
        if not inside:
            clear, public = _software_pair(spec)
            sealed = self._sealer(hsm, key, import_id, made).seal(clear)
        row = ImportRow(
            import_id=import_id,
            tenant=key.tenant,
            key_id=key.id,
            wrapping=str(wrapping),
            path=HSM if inside else SOFTWARE,
            expires_at=expires_at,
            object_id=import_id,
            material=material,
            mechanism=made.mechanism,
            kek=made.kek,
            blob=made.blob,
            sealed=sealed,
            public=public,
        )
        return dataclasses.replace(row, mac=hsm.row_mac(_row(row)))

    def _sealer(self, hsm: Hsm, key: Key, import_id: uuid.UUID, made: Wrapped) -> _Sealer:
        binding = rowmac.encode(b"skms/row/import-seal/1", key.tenant, key.id.bytes, import_id.bytes, made.blob)
        mac = hsm.row_mac(binding)
        stored = StoredKey(
            import_id, Material.KDK_512, made.blob, made.mechanism, made.kek, b"", binding=binding, mac=mac
        )
        return _Sealer(hsm, stored, import_id)

    # ---- import --------------------------------------------------------------------------------------------------

    def plan_import(self, key: Key, wanted: Import) -> Plan:
        """Open, check and add the material as the key's next version.

        InputRefused names what is wrong; whatever does not open is one answer. Each refusal counts: after five the
        token is spent and its wrapping key erased.
        """
        _check_importable(key)
        now = self._store.now()
        if wanted.expires_at is not None and wanted.expires_at <= now:
            raise InputRefused("/expires_at", "in_the_past", "the material would have expired already")
        public = _public_of(key.spec, wanted.public)
        self._store.authentic(key)
        row = self._genuine(key, wanted.token, now)
        if not self._catalog.try_import(row.import_id, limit=ATTEMPTS):
            raise _spent()
        try:
            version, fingerprint = self._admit(key, row, wanted, public, now)
        except (InputRefused, InvalidCiphertext) as error:
            if self._spent_meanwhile(row):
                raise _spent() from None
            self._catalog.end_attempt(row.import_id, counts=True, limit=ATTEMPTS, now=now)
            self._hsm(key).forget(row.object_id)
            if isinstance(error, InputRefused):
                raise
            raise _not_openable() from None
        except (HsmUnavailable, HsmFault):
            self._catalog.end_attempt(row.import_id, counts=False, limit=ATTEMPTS, now=now)
            raise
        return self._plan(key, row, version, fingerprint, now)

    def _spent_meanwhile(self, row: ImportRow) -> bool:
        """Whether another import with the same token was first: then that, and not its traces, is the reason."""
        found = self._catalog.import_row(row.import_id)
        return found is None or found.spent

    def _plan(self, key: Key, row: ImportRow, version: KeyVersion, fingerprint: bytes, now: int) -> Plan:
        state = KeyState.ACTIVE if key.state is KeyState.PREACTIVE else key.state
        change = self._store.plan_add_version(key, version, state=state)

        def write(c: Connection) -> None:
            # The token first: of two imports with one token exactly one gets past this line.
            if not self._catalog.spend_import(c, row.import_id, now=now):
                raise _spent()
            if not self._catalog.put_material(c, key.tenant, fingerprint, key.id, version.number):
                raise _reused()
            change.write(c)

        def applied() -> None:
            change.applied()
            self._hsm(key).forget(row.object_id)

        return Plan(change.key, write, applied)

    def _genuine(self, key: Key, token: str, now: int) -> ImportRow:
        """The row of a token that was made for this key; InputRefused without telling more than its owner may know."""
        match = _TOKEN.fullmatch(token)
        raw = b"" if match is None else base64.urlsafe_b64decode(match[1])
        row = None if not raw else self._catalog.import_row(uuid.UUID(bytes=raw[:16]))
        if row is None or row.tenant != key.tenant or row.key_id != key.id:
            raise _Refused("/import_token", "invalid", "not a token of an import of this key")
        hsm = self._hsm(key)
        if not hmac.compare_digest(hsm.row_mac(_token_row(key, row)), raw[16:]):
            raise _Refused("/import_token", "invalid", "not a token of an import of this key")
        if row.spent:
            raise _spent()
        if row.expires_at <= now:
            raise _Refused("/import_token", "expired", "ask for import parameters again")
        if not hmac.compare_digest(hsm.row_mac(_row(row)), row.mac):
            raise RowDamaged(f"row of import {row.import_id} was changed outside the service")
        return row

    def _admit(self, key: Key, row: ImportRow, wanted: Import, public: bytes, now: int) -> tuple[KeyVersion, bytes]:
        """The version and the fingerprint of its material; InvalidCiphertext or InputRefused for anything wrong."""
        hsm, object_id = self._hsm(key), self._store.new_id()
        made = self._opened(key, row, wanted.wrapped, object_id, public)
        number = self._store.next_number(key)
        version = KeyVersion(
            number=number,
            state=KeyState.ACTIVE,
            created_at=now,
            object_id=object_id,
            mechanism=made.mechanism,
            kek=made.kek,
            blob=made.blob,
            public=public,
            imported=Imported(row.path, wanted.expires_at),
        )
        material = material_of(key.spec, key.suite)
        binding = rowmac.version_row(key.tenant, key.id, material, key.usage, version)
        stored = StoredKey(
            object_id=object_id,
            material=material,
            blob=made.blob,
            mechanism=made.mechanism,
            kek=made.kek,
            public=public,
            binding=binding,
            mac=hsm.row_mac(binding),
        )
        try:
            identity = self._proven(hsm, key, stored, wanted.check_value)
        finally:
            hsm.forget(object_id)
        fingerprint = hsm.row_mac(rowmac.encode(_FINGERPRINT_LABEL, key.tenant, identity))
        if self._catalog.material_known(key.tenant, fingerprint):
            raise _reused()
        return version, fingerprint

    def _opened(self, key: Key, row: ImportRow, wrapped: bytes, object_id: uuid.UUID, public: bytes) -> Wrapped:
        wrapping, hsm = Wrapping(row.wrapping), self._hsm(key)
        material = material_of(key.spec, key.suite)
        stored = StoredKey(
            object_id=row.object_id,
            material=row.material,
            blob=row.blob,
            mechanism=row.mechanism,
            kek=row.kek,
            public=row.public,
            binding=_row(row),
            mac=row.mac,
        )
        if row.path == HSM and wrapping.oaep is not None:
            outer, inner = _split(wrapping, wrapped, _modulus_bytes(row.public))
            return importer_of(hsm).admit_wrapped(
                stored, wrapping.oaep, outer, material, object_id, inner=inner, public=public
            )
        private = _Sealer(hsm, stored, row.import_id).open(row.sealed)
        info = hpke_info(key.tenant, key.id, key.spec, row.expires_at // 1_000_000)
        clear = _open_in_software(wrapping, private, wrapped, info)
        examine(key.spec, material, clear, public)
        return importer_of(hsm).admit_clear(material, clear, object_id, public=public)

    def _proven(self, hsm: Hsm, key: Key, stored: StoredKey, check_value: str) -> bytes:
        """What identifies the material, once its check value is right and it is of use."""
        if key.usage is KeyUsage.SIGN:
            _check(hashlib.sha256(stored.public).digest()[:8], check_value)
            _prove_pair(hsm, key, stored)
            return hashlib.sha256(stored.public).digest()
        made = hsm.hmac(stored, "sha256", CHECK_LABEL)[:8]
        _check(made, check_value)
        if made in known_weak(SECRET_BYTES[stored.material]):
            raise _weak("a pattern, not a random key")
        return hsm.hmac(stored, "sha256", _FINGERPRINT_LABEL)

    # ---- housekeeping --------------------------------------------------------------------------------------------

    def sweep(self, now: int) -> int:
        """Erase the wrapping keys of expired tokens; how many."""
        return self._catalog.spend_expired_imports(now, kept_us=KEPT_US)

    def _hsm(self, key: Key) -> Hsm:
        return self._store.hsm_of(key.home)


# ---- tokens, rows, sealed software keys ----------------------------------------------------------------------------


def _check_importable(key: Key) -> None:
    if key.origin != EXTERNAL:
        raise InputRefused("", "not_external", "only a key created with origin external takes imported material")
    check_state(key, KeyState.PREACTIVE, KeyState.ACTIVE, KeyState.SUSPENDED)


def _token_row(key: Key, row: ImportRow) -> bytes:
    return rowmac.encode(
        b"skms/import/token/1",
        *(key.tenant, key.id.bytes, key.spec, key.suite, row.wrapping, row.import_id.bytes, row.expires_at),
    )


def _token_text(import_id: uuid.UUID, code: bytes) -> str:
    return "skms_import_" + base64.urlsafe_b64encode(import_id.bytes + code).decode()  # 48 bytes: no padding


def _row(row: ImportRow) -> bytes:
    return rowmac.encode(
        b"skms/row/import/1",
        *(row.import_id.bytes, row.tenant, row.key_id.bytes, row.wrapping, row.path, row.expires_at),
        *(row.object_id.bytes, row.material, row.mechanism, row.kek.bytes, row.blob, row.sealed, row.public),
    )


@dataclass(frozen=True, slots=True)
class _Sealer:
    """Seals the private half of one software wrapping key under a key that only the HSM can derive."""

    hsm: Hsm
    stored: StoredKey
    import_id: uuid.UUID

    def _key(self) -> bytes:
        return self.hsm.hmac(self.stored, "sha512", ev.kdf_input(b"skms/import/seal/1", self.import_id.bytes))[:32]

    def seal(self, clear: bytes) -> bytes:
        try:
            iv = os.urandom(12)  # this key seals one message
            return iv + AESGCM(self._key()).encrypt(iv, clear, self.import_id.bytes)
        finally:
            self.hsm.forget(self.stored.object_id)

    def open(self, sealed: bytes) -> bytes:
        try:
            return AESGCM(self._key()).decrypt(sealed[:12], sealed[12:], self.import_id.bytes)
        except InvalidTag:
            raise RowDamaged(f"row of import {self.import_id} was changed outside the service") from None
        finally:
            self.hsm.forget(self.stored.object_id)


def _software_pair(spec: str | None) -> tuple[bytes, bytes]:
    """(private, public) of a wrapping key for one import; HPKE's private form is two seeds, 64 and 32 bytes."""
    if spec is not None:
        private = rsa.generate_private_key(65_537, _RSA_BITS[spec])
        return (
            private.private_bytes(
                serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ),
            private.public_key().public_bytes(
                serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
            ),
        )
    lattice, curve = mlkem.MLKEM768PrivateKey.generate(), x25519.X25519PrivateKey.generate()
    return (
        lattice.private_bytes_raw() + curve.private_bytes_raw(),
        lattice.public_key().public_bytes_raw() + curve.public_key().public_bytes_raw(),
    )


def hpke_info(tenant: str, key_id: uuid.UUID, spec: str, expires_s: int) -> bytes:
    """What HPKE binds an import to: `info` of RFC 9180. `expires_s` is the token's end, in seconds since the epoch."""
    fields = (b"skms/import/1", tenant.encode(), key_id.bytes, spec.encode(), expires_s.to_bytes(8, "big"))
    return b"".join(len(f).to_bytes(4, "big") + f for f in fields)


# ---- opening -------------------------------------------------------------------------------------------------------


def _modulus_bytes(spki: bytes) -> int:
    public = serialization.load_der_public_key(spki)
    assert isinstance(public, rsa.RSAPublicKey)
    return public.key_size // 8


def _split(wrapping: Wrapping, wrapped: bytes, size: int) -> tuple[bytes, bytes | None]:
    """(what RSA opens, what the AES key in it opens); InvalidCiphertext for another length."""
    outer, inner = wrapped[:size], wrapped[size:]
    if len(outer) != size or bool(inner) is not wrapping.two_steps or len(inner) % 8:
        raise InvalidCiphertext
    return outer, inner or None


def _open_in_software(wrapping: Wrapping, private: bytes, wrapped: bytes, info: bytes) -> bytes:
    """The material; InvalidCiphertext for whatever does not open, without a difference."""
    try:
        if wrapping.oaep is None:
            lattice = mlkem.MLKEM768PrivateKey.from_seed_bytes(private[:64])
            pair = hpke.MLKEM768X25519PrivateKey(lattice, x25519.X25519PrivateKey.from_private_bytes(private[64:]))
            return HPKE.decrypt(wrapped, pair, info=info)
        key = serialization.load_der_private_key(private, None)
        assert isinstance(key, rsa.RSAPrivateKey)
        algorithm = hashes.SHA1() if wrapping.oaep is OaepHash.SHA_1 else hashes.SHA256()  # noqa: S303 - MGF and label only
        outer, inner = _split(wrapping, wrapped, key.key_size // 8)
        clear = key.decrypt(outer, padding.OAEP(padding.MGF1(algorithm), algorithm, None))
        if inner is None:
            return clear
        if len(clear) != 32:
            raise InvalidCiphertext
        return aes_key_unwrap_with_padding(clear, inner)
    except (ValueError, InvalidTag, InvalidUnwrap):
        raise InvalidCiphertext from None


# ---- judging -------------------------------------------------------------------------------------------------------


def _spent() -> InputRefused:
    return _Refused("/import_token", "used", "a token is good for one import; ask for import parameters again")


def _not_openable() -> InputRefused:
    return _Refused("/wrapped_key", "not_openable", "it does not open under this token's wrapping key")


def _reused() -> InputRefused:
    return _Refused("/wrapped_key", "reused_material", "this tenant has imported the same material before")


def _weak(why: str, pointer: str = "/wrapped_key") -> InputRefused:
    return _Refused(pointer, "weak_material", why)


def _check(made: bytes, given: str) -> None:
    if not hmac.compare_digest(made.hex().encode(), given.encode()):
        raise _Refused("/key_check_value", "check_value_mismatch", "the material is not the one this value stands for")


@functools.lru_cache(maxsize=2)
def known_weak(length: int) -> frozenset[bytes]:
    """Check values of secrets that are patterns: one or two bytes repeated, and counting up or down.

    For material that is only ever inside the token: there, a secret can be compared but not looked at.
    """
    patterns = [bytes((a, b)) * (length // 2) for a in range(256) for b in range(256)]
    patterns += [bytes((start + step * i) % 256 for i in range(length)) for start in range(256) for step in (1, -1)]
    return frozenset(hmac.digest(p, CHECK_LABEL, "sha256")[:8] for p in patterns)


def is_pattern(secret: bytes) -> bool:
    """Whether a secret repeats itself with a period of at most half its length, or counts."""
    size = len(secret)
    for period in range(1, size // 2 + 1):
        if secret.startswith((secret[:period] * size)[:size]):
            return True
    steps = {(b - a) % 256 for a, b in itertools.pairwise(secret)}
    return len(steps) == 1


def examine(spec: KeySpec, material: Material, clear: bytes, public: bytes) -> None:
    """Refuse material in clear that is of another kind or length, weak, or not the private half of `public`."""
    if material in SECRET_BYTES:
        if len(clear) != SECRET_BYTES[material]:
            raise _Refused("/wrapped_key", "wrong_length", f"{SECRET_BYTES[material]} bytes are required")
        if is_pattern(clear):
            raise _weak("a pattern, not a random key")
        return
    try:
        private = serialization.load_der_private_key(clear, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise InvalidCiphertext from None  # no PKCS#8, or a key whose numbers do not fit together
    if not isinstance(private, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        raise _Refused("/wrapped_key", "not_for_spec", f"not a private key of {spec}")
    own = private.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    if own != public:
        raise _mismatch()
    if isinstance(private, rsa.RSAPrivateKey):
        numbers = private.private_numbers()
        # FIPS 186-5, A.1.1: primes that are close together are found by Fermat's method.
        if abs(numbers.p - numbers.q) <= 1 << (private.key_size // 2 - 100):
            raise _weak("the primes are too close together")


def _public_of(spec: KeySpec, given: bytes | None) -> bytes:
    """SubjectPublicKeyInfo (DER) of the public half that came with an asymmetric key; empty for secrets."""
    if spec not in _PROOF:
        if given is not None:
            raise InputRefused("/public_key", "not_for_spec", "only asymmetric keys have a public half")
        return b""
    if given is None:
        raise InputRefused("/public_key", "required", "an asymmetric key comes with its public half")
    public = _load_public(given)
    if isinstance(public, rsa.RSAPublicKey) and spec in {KeySpec.RSA_3072, KeySpec.RSA_4096}:
        _check_rsa(public, int(spec[-4:]))
    elif not (isinstance(public, ec.EllipticCurvePublicKey) and isinstance(public.curve, _CURVES.get(spec, ()))):
        raise InputRefused("/public_key", "not_for_spec", f"not a public key of {spec}")
    return public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _load_public(given: bytes) -> rsa.RSAPublicKey | ec.EllipticCurvePublicKey:
    """The key in PEM or DER. A point at infinity or off its curve, or explicit curve parameters, are no key."""
    load = serialization.load_pem_public_key if given.startswith(b"-----") else serialization.load_der_public_key
    try:
        public = load(given)
    except (ValueError, UnsupportedAlgorithm):
        raise InputRefused("/public_key", "invalid", "a SubjectPublicKeyInfo is required, in PEM or DER") from None
    if not isinstance(public, rsa.RSAPublicKey | ec.EllipticCurvePublicKey):
        raise InputRefused("/public_key", "not_for_spec", "an RSA or EC key is required")
    return public


# Odd primes of the ROCA fingerprint (CVE-2017-15361): moduli of the flawed generator are powers of 65537 modulo each.
_ROCA_PRIMES: Final = tuple(p for p in range(3, 168) if all(p % q for q in range(2, p)))


@functools.lru_cache(maxsize=1)
def _roca_residues() -> Mapping[int, frozenset[int]]:
    return {p: frozenset(pow(65_537, i, p) for i in range(p)) for p in _ROCA_PRIMES}


def is_roca(modulus: int) -> bool:
    """Whether a modulus has the shape of CVE-2017-15361. A random one has it with a chance of about 2^-28."""
    return all(modulus % p in residues for p, residues in _roca_residues().items())


def _check_rsa(public: rsa.RSAPublicKey, bits: int) -> None:
    numbers = public.public_numbers()
    if public.key_size != bits:
        raise InputRefused("/public_key", "wrong_length", f"a modulus of {bits} bits is required")
    if numbers.e != 65_537:
        raise _weak("the public exponent must be 65537", "/public_key")
    if is_roca(numbers.n):
        raise _weak("a modulus of the flawed generator of CVE-2017-15361", "/public_key")
    if math.gcd(numbers.n, _small_primes()) != 1:
        raise _weak("the modulus has a small factor", "/public_key")
    if _fermat(numbers.n):
        raise _weak("the primes are too close together", "/public_key")


@functools.lru_cache(maxsize=1)
def _small_primes() -> int:
    """The product of all primes below 2^16."""
    sieve = bytearray([1]) * 65_536
    for n in range(2, 256):
        if sieve[n]:
            sieve[n * n :: n] = bytes(len(range(n * n, 65_536, n)))
    return math.prod(n for n in range(2, 65_536) if sieve[n])


def _fermat(modulus: int) -> bool:
    """Whether a few steps of Fermat's method factor it: equal or very close primes."""
    a = math.isqrt(modulus - 1) + 1
    for _ in range(64):
        rest = a * a - modulus
        if math.isqrt(rest) ** 2 == rest:
            return True
        a += 1
    return False


def _mismatch() -> InputRefused:
    return _Refused("/public_key", "key_mismatch", "not the public half of the wrapped key")


def _prove_pair(hsm: Hsm, key: Key, stored: StoredKey) -> None:
    """Let the imported key sign inside the HSM; the signature must be right under the public half that came with it."""
    scheme = _PROOF[key.spec]
    digest = hashlib.new("sha384" if scheme is SignScheme.ECDSA_SHA_384 else "sha256", os.urandom(32)).digest()
    try:
        signature = hsm.sign(stored, scheme, digest)
    except HsmFault:
        raise _mismatch() from None  # a key of another size or curve than its public half cannot sign this
    if not verify_signature(key.spec, stored.public, scheme, digest, signature, "raw"):
        raise _mismatch()
