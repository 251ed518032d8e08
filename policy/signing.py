"""What people sign with: Ed25519 (RFC 8032) or ECDSA on P-256 with SHA-256 (FIPS 186-5), as most cards can.

Each signature has one form of 64 bytes. Of the two ECDSA signatures (r, s) and (r, n - s), which anybody makes out of each
other, only the one with the smaller s is right; DER is no form at all.
"""

from __future__ import annotations

from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

PersonKey = Ed25519PublicKey | EllipticCurvePublicKey

ED25519: Final = "Ed25519"
ES256: Final = "ES256"
SIZE: Final = 64  # bytes of a signature: Ed25519's R and S, ECDSA's r and s, big endian
_ORDER: Final = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # of P-256: SP 800-186, 3.2.1.3


def algorithm(key: object) -> str:
    """What a public key verifies; empty for a key that nobody signs with here."""
    if isinstance(key, Ed25519PublicKey):
        return ED25519
    return ES256 if isinstance(key, EllipticCurvePublicKey) and isinstance(key.curve, SECP256R1) else ""


def identity(key: PersonKey) -> bytes:
    """The key itself, however its file spelt it: two approvers or signers with one are one."""
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def one_form(made: bytes) -> bytes:
    """An ECDSA signature (r, s) as a token makes it, in the form that is right here; ValueError if it is none."""
    s = int.from_bytes(made[32:], "big")
    if len(made) != SIZE or not 0 < s < _ORDER:
        raise ValueError("not an ECDSA signature on P-256")
    return made[:32] + min(s, _ORDER - s).to_bytes(32, "big")


def verifies(key: PersonKey, signature: bytes, said: bytes) -> bool:
    """Whether a signature is right, and in the one form that it has."""
    if len(signature) != SIZE:
        return False
    try:
        if isinstance(key, Ed25519PublicKey):
            key.verify(signature, said)
            return True
        r, s = (int.from_bytes(half, "big") for half in (signature[:32], signature[32:]))
        key.verify(encode_dss_signature(r, s), said, ECDSA(SHA256()))
    except InvalidSignature:
        return False
    return 2 * s < _ORDER
