"""Mechanism and attribute numbers, and the templates: every flag is said, because defaults differ and some are unsafe.

Omitted ENCRYPT, DECRYPT, SIGN and VERIFY default to true on SoftHSM; a KEK without MODIFIABLE=False can be given DECRYPT
later, and then AES-ECB opens its blobs; without UNWRAP_TEMPLATE whoever has the PIN unwraps a blob as readable.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from keystore.hsm import Material, SignScheme
from keystore.pkcs11.binding import Session, gcm
from keystore.pkcs11.vendors import Vendor

KWP_NAME: Final = "AES_KEY_WRAP_KWP"  # as stored in rows


class A:
    """CKA_* numbers."""

    CLASS, TOKEN, PRIVATE, LABEL, APPLICATION, VALUE, TRUSTED = 0x0, 0x1, 0x2, 0x3, 0x10, 0x11, 0x86
    KEY_TYPE, ID, SENSITIVE, ENCRYPT, DECRYPT, WRAP, UNWRAP = 0x100, 0x102, 0x103, 0x104, 0x105, 0x106, 0x107
    SIGN, SIGN_RECOVER, VERIFY, DERIVE = 0x108, 0x109, 0x10A, 0x10C
    MODULUS, MODULUS_BITS, PUBLIC_EXPONENT, PRIVATE_EXPONENT = 0x120, 0x121, 0x122, 0x123
    PRIME_1, PRIME_2, EXPONENT_1, EXPONENT_2, COEFFICIENT = 0x124, 0x125, 0x126, 0x127, 0x128
    VALUE_LEN, EXTRACTABLE, MODIFIABLE = 0x161, 0x162, 0x170
    EC_PARAMS, EC_POINT = 0x180, 0x181
    TRUSTED, WRAP_WITH_TRUSTED = 0x86, 0x210
    ALWAYS_AUTHENTICATE, UNWRAP_TEMPLATE = 0x202, 0x40000212


class CKO:
    """Object classes."""

    DATA, PUBLIC_KEY, PRIVATE_KEY, SECRET_KEY = 0, 2, 3, 4


class CKK:
    """Key types."""

    RSA, EC, GENERIC_SECRET, AES, EC_EDWARDS = 0x0, 0x3, 0x10, 0x1F, 0x40


class CKM:
    """Mechanisms."""

    RSA_PKCS_KEY_PAIR_GEN, RSA_PKCS, RSA_PKCS_OAEP, RSA_PKCS_PSS = 0x0, 0x1, 0x9, 0xD
    SHA_1, SHA256, SHA384, SHA512 = 0x220, 0x250, 0x260, 0x270
    SHA256_HMAC, SHA384_HMAC, SHA512_HMAC = 0x251, 0x261, 0x271
    GENERIC_SECRET_KEY_GEN, EC_KEY_PAIR_GEN, ECDSA = 0x350, 0x1040, 0x1041
    EC_EDWARDS_KEY_PAIR_GEN, EDDSA = 0x1055, 0x1057
    AES_KEY_GEN, AES_ECB, AES_GCM = 0x1080, 0x1081, 0x1087


HMAC: Final[Mapping[str, int]] = {"sha256": CKM.SHA256_HMAC, "sha384": CKM.SHA384_HMAC, "sha512": CKM.SHA512_HMAC}
PSS: Final[Mapping[str, tuple[int, int, int]]] = {  # hash, MGF1, salt length = digest length
    "256": (CKM.SHA256, 0x2, 32),
    "384": (CKM.SHA384, 0x3, 48),
    "512": (CKM.SHA512, 0x4, 64),
}
# DigestInfo prefixes of RFC 8017, 9.2 note 1.
DIGEST_INFO: Final[Mapping[str, bytes]] = {
    "256": bytes.fromhex("3031300d060960864801650304020105000420"),
    "384": bytes.fromhex("3041300d060960864801650304020205000430"),
    "512": bytes.fromhex("3051300d060960864801650304020305000440"),
}
_P256: Final = bytes.fromhex("06082a8648ce3d030107")
_P384: Final = bytes.fromhex("06052b81040022")
_ED25519_OID: Final = bytes.fromhex("06032b6570")
_ED25519_STRING: Final = b"\x13\x0cedwards25519"
ED25519_PARAMS: Final = (_ED25519_OID, _ED25519_STRING)  # CKA_EC_PARAMS: modules spell the curve in two ways

_NO_USE: Final[Mapping[int, Any]] = {
    A.ENCRYPT: False,
    A.DECRYPT: False,
    A.WRAP: False,
    A.UNWRAP: False,
    A.SIGN: False,
    A.VERIFY: False,
    A.DERIVE: False,
}
_NO_PRIVATE_USE: Final[Mapping[int, Any]] = {
    A.DECRYPT: False,
    A.UNWRAP: False,
    A.SIGN: False,
    A.DERIVE: False,
}

_INSTALLATION_KEY: Final[Mapping[int, Any]] = {
    A.CLASS: CKO.SECRET_KEY,
    A.TOKEN: True,
    A.PRIVATE: True,
    A.SENSITIVE: True,
    A.MODIFIABLE: False,
    **_NO_USE,
}
# Of CKM_RSA_PKCS_OAEP: the hash, and MGF1 over the same hash (CKG_MGF1_*).
OAEP: Final[Mapping[str, tuple[int, int]]] = {"sha1": (CKM.SHA_1, 0x1), "sha256": (CKM.SHA256, 0x2)}


@dataclass(frozen=True, slots=True)
class Kind:
    """How a material is made and used in a token."""

    object_class: int
    key_type: int
    length: int  # bytes of a secret key; bits of an RSA modulus
    usage: tuple[int, ...]
    generate: int
    use: int  # a mechanism that must be there for the key to be of use
    params: bytes = b""


KINDS: Final[Mapping[Material, Kind]] = {
    Material.KDK_512: Kind(
        CKO.SECRET_KEY, CKK.GENERIC_SECRET, 64, (A.SIGN,), CKM.GENERIC_SECRET_KEY_GEN, CKM.SHA512_HMAC
    ),
    Material.KDK_256: Kind(
        CKO.SECRET_KEY, CKK.GENERIC_SECRET, 32, (A.SIGN,), CKM.GENERIC_SECRET_KEY_GEN, CKM.SHA256_HMAC
    ),
    Material.AES_256: Kind(CKO.SECRET_KEY, CKK.AES, 32, (A.ENCRYPT, A.DECRYPT), CKM.AES_KEY_GEN, CKM.AES_GCM),
    Material.HMAC_256: Kind(
        CKO.SECRET_KEY, CKK.GENERIC_SECRET, 32, (A.SIGN,), CKM.GENERIC_SECRET_KEY_GEN, CKM.SHA256_HMAC
    ),
    Material.HMAC_512: Kind(
        CKO.SECRET_KEY, CKK.GENERIC_SECRET, 64, (A.SIGN,), CKM.GENERIC_SECRET_KEY_GEN, CKM.SHA512_HMAC
    ),
    Material.EC_P256: Kind(CKO.PRIVATE_KEY, CKK.EC, 0, (A.SIGN,), CKM.EC_KEY_PAIR_GEN, CKM.ECDSA, _P256),
    Material.EC_P384: Kind(CKO.PRIVATE_KEY, CKK.EC, 0, (A.SIGN,), CKM.EC_KEY_PAIR_GEN, CKM.ECDSA, _P384),
    Material.ED25519: Kind(
        CKO.PRIVATE_KEY, CKK.EC_EDWARDS, 0, (A.SIGN,), CKM.EC_EDWARDS_KEY_PAIR_GEN, CKM.EDDSA, _ED25519_OID
    ),
    Material.RSA_3072: Kind(CKO.PRIVATE_KEY, CKK.RSA, 3_072, (A.SIGN,), CKM.RSA_PKCS_KEY_PAIR_GEN, CKM.RSA_PKCS_PSS),
    Material.RSA_4096: Kind(CKO.PRIVATE_KEY, CKK.RSA, 4_096, (A.SIGN,), CKM.RSA_PKCS_KEY_PAIR_GEN, CKM.RSA_PKCS_PSS),
    Material.TRANSPORT_RSA_3072: Kind(
        CKO.PRIVATE_KEY, CKK.RSA, 3_072, (A.UNWRAP,), CKM.RSA_PKCS_KEY_PAIR_GEN, CKM.RSA_PKCS_OAEP
    ),
    Material.TRANSPORT_RSA_4096: Kind(
        CKO.PRIVATE_KEY, CKK.RSA, 4_096, (A.UNWRAP,), CKM.RSA_PKCS_KEY_PAIR_GEN, CKM.RSA_PKCS_OAEP
    ),
}

MECHANISM_NAMES: Final[Mapping[int, str]] = {v: f"CKM_{k}" for k, v in vars(CKM).items() if isinstance(v, int)}


def unused(material: Material) -> Mapping[int, Any]:
    """Every usage flag of the kind, off."""
    return _NO_USE if KINDS[material].object_class == CKO.SECRET_KEY else _NO_PRIVATE_USE


def in_use(material: Material, vendor: Vendor, public: bytes = b"") -> dict[int, Any]:
    """Template of a customer key as it is unwrapped for use: its usage and nothing else, never to be read or wrapped.

    `public` is the public half (SubjectPublicKeyInfo, DER): some modules want the EC point of a private key they unwrap.
    """
    kind = KINDS[material]
    made = {
        A.CLASS: kind.object_class,
        A.KEY_TYPE: kind.key_type,
        A.TOKEN: False,
        A.PRIVATE: True,
        A.SENSITIVE: True,
        A.EXTRACTABLE: False,
        **unused(material),
        **dict.fromkeys(kind.usage, True),
    }
    if vendor.seals_by == "unwrap":  # else a copy would be needed, three more calls for each key that is not cached
        made[A.MODIFIABLE] = False
    if vendor.value_len_on_unwrap and kind.object_class == CKO.SECRET_KEY:
        made[A.VALUE_LEN] = kind.length
    if kind.key_type == CKK.EC:
        made |= {number: _ec_point(public) for number in vendor.unwrap_extras}
    return made


def _ec_point(public: bytes) -> bytes:
    """CKA_EC_POINT of a SubjectPublicKeyInfo: the uncompressed point in a DER OCTET STRING."""
    key = serialization.load_der_public_key(public)
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ValueError("not an elliptic curve's public key")
    point = key.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
    return bytes([0x04, len(point)]) + point  # P-384: 97 bytes; a length below 128 is one byte


def at_birth(material: Material, object_id: uuid.UUID) -> dict[int, Any]:
    """Template of a secret key between birth and wrap: extractable for that moment, then destroyed."""
    kind = KINDS[material]
    return {
        A.CLASS: kind.object_class,
        A.KEY_TYPE: kind.key_type,
        A.ID: object_id.bytes,
        A.TOKEN: False,
        A.PRIVATE: True,
        A.SENSITIVE: True,
        A.EXTRACTABLE: True,
        **unused(material),
        **dict.fromkeys(kind.usage, True),
        A.VALUE_LEN: kind.length,
    }


def on_arrival(material: Material, object_id: uuid.UUID, vendor: Vendor, public: bytes = b"") -> dict[int, Any]:
    """Template of an imported key between its arrival in the token and its wrap, as `at_birth` for one born there."""
    return {**in_use(material, vendor, public), A.ID: object_id.bytes, A.EXTRACTABLE: True}


def transport_templates(bits: int) -> tuple[dict[int, Any], dict[int, Any]]:
    """Templates (public, private) of an RSA pair that opens one thing and is destroyed; it can not leave the token."""
    common = {A.KEY_TYPE: CKK.RSA, A.TOKEN: False}
    public: dict[int, Any] = {
        A.CLASS: CKO.PUBLIC_KEY,
        **common,
        A.PRIVATE: False,
        A.ENCRYPT: False,
        A.WRAP: False,
        A.VERIFY: False,
    }
    public |= {A.MODULUS_BITS: bits, A.PUBLIC_EXPONENT: b"\x01\x00\x01"}
    private = {A.CLASS: CKO.PRIVATE_KEY, **common, A.PRIVATE: True, A.SENSITIVE: True, A.EXTRACTABLE: False}
    return public, {**private, **_NO_PRIVATE_USE, A.UNWRAP: True}


def ephemeral_kek(vendor: Vendor) -> dict[int, Any]:
    """Template of the AES key that a customer drew to wrap one key for import: it unwraps, and nothing else."""
    made = {
        A.CLASS: CKO.SECRET_KEY,
        A.KEY_TYPE: CKK.AES,
        A.TOKEN: False,
        A.PRIVATE: True,
        A.SENSITIVE: True,
        A.EXTRACTABLE: False,
        **_NO_USE,
        A.UNWRAP: True,
    }
    return made | ({A.VALUE_LEN: 32} if vendor.value_len_on_unwrap else {})


def pair_at_birth(
    material: Material, object_id: uuid.UUID, vendor: Vendor, *, token: bool = False, label: str = ""
) -> tuple[dict[int, Any], dict[int, Any]]:
    """Templates (public, private) of a pair. A token pair (the audit key) is never extractable."""
    kind = KINDS[material]
    public: dict[int, Any] = {
        A.CLASS: CKO.PUBLIC_KEY,
        A.KEY_TYPE: kind.key_type,
        A.ID: object_id.bytes,
        A.TOKEN: token,
        A.PRIVATE: False,
        A.ENCRYPT: False,
        A.WRAP: False,
        A.VERIFY: A.SIGN in kind.usage,
    }
    if kind.key_type == CKK.RSA:
        public |= {A.MODULUS_BITS: kind.length, A.PUBLIC_EXPONENT: b"\x01\x00\x01"}
    else:
        named = vendor.edwards_params == "string" and material is Material.ED25519
        public[A.EC_PARAMS] = _ED25519_STRING if named else kind.params
    private = {
        A.CLASS: CKO.PRIVATE_KEY,
        A.KEY_TYPE: kind.key_type,
        A.ID: object_id.bytes,
        A.TOKEN: token,
        A.PRIVATE: True,
        A.SENSITIVE: True,
        A.EXTRACTABLE: not token,
        **unused(material),
        **dict.fromkeys(kind.usage, True),
    }
    if token:
        public |= {A.LABEL: label, A.MODIFIABLE: False}
        private |= {A.LABEL: label, A.MODIFIABLE: False}
    return public, private


def root_kek(object_id: uuid.UUID, label: str, *, sealed: bool = False) -> dict[int, Any]:
    """Template of the root KEK: wraps and unwraps, and what it unwraps can never be read or wrapped again.

    It leaves its token only under a key that the security officer made trusted, unless `sealed`: then never.
    """
    return {
        **_INSTALLATION_KEY,
        A.KEY_TYPE: CKK.AES,
        A.ID: object_id.bytes,
        A.LABEL: label,
        A.VALUE_LEN: 32,
        A.WRAP: True,
        A.UNWRAP: True,
        A.UNWRAP_TEMPLATE: {A.SENSITIVE: True, A.EXTRACTABLE: False},
        **_transferable(sealed),
    }


def row_mac_key(object_id: uuid.UUID, label: str, *, sealed: bool = False) -> dict[int, Any]:
    """Template of the row-MAC key: HMAC only. MACs are compared outside, never by C_Verify."""
    return {
        **_INSTALLATION_KEY,
        A.KEY_TYPE: CKK.GENERIC_SECRET,
        A.ID: object_id.bytes,
        A.LABEL: label,
        A.VALUE_LEN: 64,
        A.SIGN: True,
        **_transferable(sealed),
    }


def _transferable(sealed: bool) -> dict[int, Any]:
    return {A.EXTRACTABLE: False} if sealed else {A.EXTRACTABLE: True, A.WRAP_WITH_TRUSTED: True}


def transport_pair(object_id: uuid.UUID, label: str, *, token: bool = False) -> tuple[dict[int, Any], dict[int, Any]]:
    """Templates (public, private) of the RSA-3072 pair to which another token wraps: its private half only unwraps."""
    public = {
        **transport_public(object_id, label),
        A.TOKEN: token,
        A.MODULUS_BITS: 3_072,
        A.PUBLIC_EXPONENT: b"\x01\x00\x01",
    }
    private = {
        A.CLASS: CKO.PRIVATE_KEY,
        A.KEY_TYPE: CKK.RSA,
        A.ID: object_id.bytes,
        A.LABEL: label,
        A.TOKEN: token,
        A.PRIVATE: True,
        A.SENSITIVE: True,
        A.EXTRACTABLE: False,
        **_NO_PRIVATE_USE,
        A.UNWRAP: True,
    }
    return public, private


def transport_public(object_id: uuid.UUID, label: str) -> dict[int, Any]:
    """What every public half of a transport pair has: it wraps and does nothing else."""
    return {
        A.CLASS: CKO.PUBLIC_KEY,
        A.KEY_TYPE: CKK.RSA,
        A.ID: object_id.bytes,
        A.LABEL: label,
        A.PRIVATE: False,
        A.ENCRYPT: False,
        A.VERIFY: False,
        A.WRAP: True,
    }


def sealed_with(session: Session, key: int, vendor: Vendor, aad: bytes, data: bytes) -> tuple[bytes, bytes]:
    """(IV, ciphertext and tag), AES-256-GCM, with the IV made where the vendor wants it made.

    12 random bytes of ours, or the token's own: written over our zeros, or found before or behind the ciphertext. Never a
    counter: a restored database repeats it. ValueError if a token that was to make the IV did not, or not of 12 bytes.
    """
    given = {"caller": os.urandom(12), "zero": bytes(12)}.get(vendor.gcm_iv, b"")
    how = gcm(vendor.gcm, given, aad)
    made = session.encrypt(key, how, data)
    iv = bytes(how.keep.iv.raw)
    match vendor.gcm_iv:
        case "append":
            iv, made = made[-12:], made[:-12]
        case "prepend":
            iv, made = made[:12], made[12:]
    if iv == bytes(12) or len(made) != len(data) + 16:
        raise ValueError("the token made no IV of 12 bytes")
    return iv, made


def spki(material: Material, attributes: Mapping[int, bytes], vendor: Vendor) -> bytes:
    """SubjectPublicKeyInfo (DER) of a public key's attributes."""
    public: rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey
    if KINDS[material].key_type == CKK.RSA:
        e, n = (int.from_bytes(attributes[a], "big") for a in (A.PUBLIC_EXPONENT, A.MODULUS))
        public = rsa.RSAPublicNumbers(e, n).public_key()
    else:
        point = attributes[A.EC_POINT]
        if vendor.ec_point == "der":
            point = _octets(point)
        if material is Material.ED25519:
            public = ed25519.Ed25519PublicKey.from_public_bytes(point)
        else:
            curve = ec.SECP256R1() if material is Material.EC_P256 else ec.SECP384R1()
            public = ec.EllipticCurvePublicKey.from_encoded_point(curve, point)
    return public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _octets(der: bytes) -> bytes:
    """The content of a short DER OCTET STRING; ValueError for anything else."""
    if len(der) < 2 or der[0] != 0x04 or der[1] > 0x7F or len(der) != 2 + der[1]:
        raise ValueError("not a DER OCTET STRING")
    return der[2:]


def sign_parts(scheme: SignScheme, data: bytes) -> tuple[int, str, bytes]:
    """(mechanism, PSS hash or "", what is signed)."""
    bits = scheme[-3:]
    if scheme.startswith("RSA_PSS"):
        return CKM.RSA_PKCS_PSS, bits, data
    if scheme.startswith("RSA_PKCS1"):
        return CKM.RSA_PKCS, "", DIGEST_INFO[bits] + data
    if scheme is SignScheme.ED25519:
        return CKM.EDDSA, "", data
    return CKM.ECDSA, "", data
