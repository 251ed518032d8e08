"""A public key as JWK (RFC 7517, RFC 7518, RFC 8037)."""

from __future__ import annotations

import base64
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

_CURVES: Final = {"secp256r1": ("P-256", 32), "secp384r1": ("P-384", 48)}


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _number(value: int) -> str:
    return _b64(value.to_bytes((value.bit_length() + 7) // 8, "big"))


def jwk(public: Any, *, kid: str) -> dict[str, str]:
    """The JWK of an RSA, EC (P-256, P-384) or Ed25519 public key; TypeError for any other."""
    match public:
        case rsa.RSAPublicKey():
            numbers = public.public_numbers()
            own = {"kty": "RSA", "n": _number(numbers.n), "e": _number(numbers.e)}
        case ec.EllipticCurvePublicKey():
            curve, size = _CURVES[public.curve.name]
            point = public.public_numbers()
            own = {
                "kty": "EC",
                "crv": curve,
                "x": _b64(point.x.to_bytes(size, "big")),
                "y": _b64(point.y.to_bytes(size, "big")),
            }
        case ed25519.Ed25519PublicKey():
            own = {"kty": "OKP", "crv": "Ed25519", "x": _b64(public.public_bytes_raw())}
        case _:
            raise TypeError(f"no JWK form for {type(public).__name__}")
    return {**own, "kid": kid, "use": "sig"}
