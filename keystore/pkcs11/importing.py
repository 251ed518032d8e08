"""Keys that come into a token from outside: opened there or created there, wrapped under the root KEK, destroyed.

The object that arrives is a session object, extractable for the one moment until it is wrapped, as a key is between its
birth and its wrap. Nothing of it stays on the token, so every step may run again.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

from keystore.hsm import HsmFault, InvalidCiphertext, Material, OaepHash, Wrapped
from keystore.key import InputRefused
from keystore.pkcs11.binding import Session, mechanism, oaep
from keystore.pkcs11.errors import CkError
from keystore.pkcs11.mechanisms import (
    CKK,
    CKM,
    CKO,
    KINDS,
    KWP_NAME,
    OAEP,
    A,
    ephemeral_kek,
    on_arrival,
    transport_templates,
)
from keystore.pkcs11.sessions import TokenSessions, Unwrap
from keystore.pkcs11.vendors import Vendor

_HASH: Final = {OaepHash.SHA_1: "sha1", OaepHash.SHA_256: "sha256"}
_KEY_SIZE_RANGE: Final = 0x62
_RSA_PARTS: Final = {
    A.PRIVATE_EXPONENT: "d",
    A.PRIME_1: "p",
    A.PRIME_2: "q",
    A.EXPONENT_1: "dmp1",
    A.EXPONENT_2: "dmq1",
    A.COEFFICIENT: "iqmp",
}


@dataclass(slots=True)
class Arrivals:
    """How keys arrive in one token. `root` gives the handle and the id of the root KEK in force."""

    sessions: TokenSessions
    vendor: Vendor
    root: Callable[[Session], tuple[int, uuid.UUID]]
    _opens: dict[OaepHash, bool] = field(default_factory=dict)

    def opens(self, hash_: OaepHash) -> bool:
        """Whether the token opens RSAES-OAEP with this hash: tried once, with a pair made for it."""
        if hash_ not in self._opens:
            self._opens[hash_] = self._try(hash_)
        return self._opens[hash_]

    def _try(self, hash_: OaepHash) -> bool:
        algorithm = hashes.SHA1() if hash_ is OaepHash.SHA_1 else hashes.SHA256()  # noqa: S303 - as AWS names it

        def act(session: Session, _: int) -> bool:
            made = list(session.generate_pair(mechanism(CKM.RSA_PKCS_KEY_PAIR_GEN), *transport_templates(2_048)))
            try:
                n, e = (int.from_bytes(session.get(made[0], a), "big") for a in (A.MODULUS, A.PUBLIC_EXPONENT))
                public = rsa.RSAPublicNumbers(e, n).public_key()
                sealed = public.encrypt(os.urandom(32), padding.OAEP(padding.MGF1(algorithm), algorithm, None))
                template = on_arrival(Material.HMAC_256, uuid.uuid4(), self.vendor)
                made.append(session.unwrap(_oaep(hash_), made[1], sealed, template))
            finally:
                for handle in made:
                    session.destroy(handle)
            return True

        try:
            return self.sessions.run(act, judges_input=True)
        except (InvalidCiphertext, HsmFault):
            return False

    def wrapped(
        self,
        transport: Unwrap,
        hash_: OaepHash,
        data: bytes,
        material: Material,
        object_id: uuid.UUID,
        *,
        inner: bytes | None,
        public: bytes,
    ) -> Wrapped:
        """Open inside the token; see `keystore.hsm.Importer.admit_wrapped`."""
        arriving = self._template(material, object_id, public)

        def arrive(session: Session, handle: int) -> int:
            if inner is None:
                return session.unwrap(_oaep(hash_), handle, data, arriving)
            kek = session.unwrap(_oaep(hash_), handle, data, ephemeral_kek(self.vendor))
            try:
                return session.unwrap(mechanism(self.vendor.kwp), kek, inner, arriving)
            finally:
                session.destroy(kek)

        return self.sessions.run(
            lambda s, h: self._settled(s, arrive(s, h), material, public), key=transport, judges_input=True
        )

    def clear(self, material: Material, clear: bytes, object_id: uuid.UUID, *, public: bytes) -> Wrapped:
        """Create in the token; see `keystore.hsm.Importer.admit_clear`."""
        attributes = {**self._template(material, object_id, public), **_values(material, clear)}
        return self.sessions.run(lambda s, _: self._settled(s, s.create(attributes), material, public))

    def _template(self, material: Material, object_id: uuid.UUID, public: bytes) -> dict[int, Any]:
        return on_arrival(material, object_id, self.vendor, public)

    def _settled(self, session: Session, arrived: int, material: Material, public: bytes) -> Wrapped:
        """The arrived key under the root KEK; its clear object is gone then."""
        try:
            _check(session, arrived, material, public)
            root, root_id = self.root(session)
            blob = session.wrap(mechanism(self.vendor.kwp), root, arrived)
        finally:
            session.destroy(arrived)
        kind = KINDS[material]
        if kind.object_class == CKO.SECRET_KEY and len(blob) != kind.length + 8:
            raise _wrong_length(kind.length)
        return Wrapped(blob, KWP_NAME, root_id, public)


def _oaep(hash_: OaepHash) -> Any:
    return oaep(CKM.RSA_PKCS_OAEP, *OAEP[_HASH[hash_]])


def _wrong_length(length: int) -> InputRefused:
    return InputRefused("/wrapped_key", "wrong_length", f"{length} bytes are required")


def _check(session: Session, arrived: int, material: Material, public: bytes) -> None:
    """Refuse a secret of another length, and a private key that shows another public half than it came with."""
    kind = KINDS[material]
    if kind.object_class == CKO.SECRET_KEY:
        # SoftHSM reads 0 for any unwrapped secret, and pads a shorter one with zeros when it wraps it.
        told = int.from_bytes(session.get(arrived, A.VALUE_LEN, 8), "little")
        if told not in {0, kind.length} or not _long_enough(session, arrived, kind.length):
            raise _wrong_length(kind.length)
    elif kind.key_type == CKK.RSA:
        expected = serialization.load_der_public_key(public)
        assert isinstance(expected, rsa.RSAPublicKey)
        if int.from_bytes(session.get(arrived, A.MODULUS), "big") != expected.public_numbers().n:
            raise InputRefused("/public_key", "key_mismatch", "not the public half of the wrapped key")


def _long_enough(session: Session, arrived: int, length: int) -> bool:
    """Whether the token takes the secret for an HMAC whose digest has this length, where it insists on that."""
    number = CKM.SHA256_HMAC if length == 32 else CKM.SHA512_HMAC
    try:
        session.sign(arrived, mechanism(number), b"length", 64)
    except CkError as error:
        if error.rv == _KEY_SIZE_RANGE:
            return False
        raise
    return True


def _values(material: Material, clear: bytes) -> dict[int, bytes]:
    """The value attributes of a secret, or of a private key in PKCS#8 that was examined before."""
    kind = KINDS[material]
    if kind.object_class == CKO.SECRET_KEY:
        return {A.VALUE: clear}
    private = serialization.load_der_private_key(clear, None)
    if isinstance(private, ec.EllipticCurvePrivateKey):
        value = private.private_numbers().private_value
        return {A.EC_PARAMS: kind.params, A.VALUE: value.to_bytes((private.key_size + 7) // 8, "big")}
    assert isinstance(private, rsa.RSAPrivateKey)
    numbers = private.private_numbers()
    public = numbers.public_numbers
    parts = {a: getattr(numbers, name) for a, name in _RSA_PARTS.items()}
    parts |= {A.MODULUS: public.n, A.PUBLIC_EXPONENT: public.e}
    return {a: n.to_bytes((n.bit_length() + 7) // 8, "big") for a, n in parts.items()}
