"""A customer's side of an import, from docs/import.md alone. It imports nothing of the product."""

from __future__ import annotations

import hashlib
import hmac
import os
from typing import Any

from cryptography.hazmat.primitives import hashes, hpke, serialization
from cryptography.hazmat.primitives.asymmetric import mlkem, padding, rsa, x25519
from cryptography.hazmat.primitives.keywrap import aes_key_wrap_with_padding

HPKE_NAME = "HPKE_MLKEM768_X25519_SHA256_AES_256_GCM"
WRAPPINGS = (
    *("RSAES_OAEP_SHA_1", "RSAES_OAEP_SHA_256", "RSA_AES_KEY_WRAP_SHA_1", "RSA_AES_KEY_WRAP_SHA_256"),
    HPKE_NAME,
)


def oaep(public: bytes, sha: str, data: bytes) -> bytes:
    key = serialization.load_der_public_key(public)
    assert isinstance(key, rsa.RSAPublicKey)
    algorithm = hashes.SHA1() if sha == "1" else hashes.SHA256()
    return key.encrypt(data, padding.OAEP(padding.MGF1(algorithm), algorithm, None))


def wrap(wrapping: str, public: bytes, material: bytes, *, info: bytes = b"") -> bytes:
    if wrapping == HPKE_NAME:
        suite = hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)
        lattice = mlkem.MLKEM768PublicKey.from_public_bytes(public[:1184])
        both = hpke.MLKEM768X25519PublicKey(lattice, x25519.X25519PublicKey.from_public_bytes(public[1184:]))
        return suite.encrypt(material, both, info=info)
    sha = wrapping.rsplit("_", 1)[1]
    if wrapping.startswith("RSAES"):
        return oaep(public, sha, material)
    ephemeral = os.urandom(32)
    return oaep(public, sha, ephemeral) + aes_key_wrap_with_padding(ephemeral, material)


def info(tenant: str, key_id: bytes, spec: str, expires_s: int) -> bytes:
    fields = (b"skms/import/1", tenant.encode(), key_id, spec.encode(), expires_s.to_bytes(8, "big"))
    return b"".join(len(f).to_bytes(4, "big") + f for f in fields)


def check_value(secret: bytes) -> str:
    return hmac.new(secret, b"skms/kcv/1", "sha256").hexdigest()[:16]


def public_check_value(spki: bytes) -> str:
    return hashlib.sha256(spki).hexdigest()[:16]


def pkcs8(private: Any) -> bytes:
    made: bytes = private.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return made


def spki(private: Any) -> bytes:
    made: bytes = private.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return made
