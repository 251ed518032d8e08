"""The customer's side of an import: read a key, wrap it for the service, compute its check value. docs/import.md."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, hpke, serialization
from cryptography.hazmat.primitives.asymmetric import mlkem, padding, rsa, x25519
from cryptography.hazmat.primitives.keywrap import aes_key_wrap_with_padding

from keystore.importing import CHECK_LABEL, HPKE, Wrapping, hpke_info
from service.cli.client import USAGE, Failed


@dataclass(frozen=True, slots=True)
class Material:
    """A key as it is to be wrapped, and what goes beside it. Secret."""

    data: bytes = field(repr=False)
    check_value: str
    public: bytes | None  # SubjectPublicKeyInfo (DER) of a private key

    @classmethod
    def read(cls, usage: str, data: bytes) -> Material:
        """The bytes of a secret, or a private key as PEM or PKCS#8 without a password; Failed for anything else."""
        if usage != "sign":
            return cls(data, hmac.digest(data, CHECK_LABEL, "sha256")[:8].hex(), None)
        load = serialization.load_pem_private_key if data.startswith(b"-----") else serialization.load_der_private_key
        try:
            private = load(data, None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise Failed(USAGE, "--material: a private key is required, as PEM or PKCS#8 without a password") from None
        public = private.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        pkcs8 = private.private_bytes(
            serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return cls(pkcs8, hashlib.sha256(public).digest()[:8].hex(), public)


def body_of(parameters: Mapping[str, Any], key: Mapping[str, Any], tenant: str, material: Material) -> dict[str, Any]:
    """The body of an import: the material wrapped as the import parameters say."""
    wrapping = Wrapping(parameters["wrapping"])
    public = base64.b64decode(parameters["wrapping_public_key"])
    expires_s = int(datetime.fromisoformat(parameters["expires_at"]).timestamp())
    if wrapping.oaep is None:
        info = hpke_info(tenant, uuid.UUID(key["id"]), key["spec"], expires_s)
        wrapped = _hpke(public, material.data, info)
    else:
        wrapped = _rsa(wrapping, public, material.data)
    body = {
        "import_token": parameters["import_token"],
        "wrapped_key": base64.b64encode(wrapped).decode(),
        "key_check_value": material.check_value,
    }
    if material.public is not None:
        body["public_key"] = base64.b64encode(material.public).decode()
    return body


def _hpke(public: bytes, data: bytes, info: bytes) -> bytes:
    lattice = mlkem.MLKEM768PublicKey.from_public_bytes(public[:1_184])
    curve = x25519.X25519PublicKey.from_public_bytes(public[1_184:])
    return HPKE.encrypt(data, hpke.MLKEM768X25519PublicKey(lattice, curve), info=info)


def _rsa(wrapping: Wrapping, public: bytes, data: bytes) -> bytes:
    key = serialization.load_der_public_key(public)
    if not isinstance(key, rsa.RSAPublicKey):
        raise Failed(USAGE, "the service sent a wrapping key that is not RSA")
    algorithm = hashes.SHA1() if wrapping.endswith("SHA_1") else hashes.SHA256()  # noqa: S303 - the hash of OAEP
    oaep = padding.OAEP(padding.MGF1(algorithm), algorithm, None)
    if not wrapping.two_steps:
        if len(data) > 64:
            raise Failed(USAGE, f"{wrapping}: this key is too long; use RSA_AES_KEY_WRAP_SHA_256")
        return key.encrypt(data, oaep)
    ephemeral = os.urandom(32)
    return key.encrypt(ephemeral, oaep) + aes_key_wrap_with_padding(ephemeral, data)
