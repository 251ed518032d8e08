"""A software authenticator (WebAuthn Level 2, 6.3.3), and the client data that a browser makes beside it."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, SECP256R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256

from service.webauthn import Assertion, encoded, pem

UP, UV = 0x01, 0x04


@dataclass
class Authenticator:
    """One credential; `counter` None: it does not count."""

    origin: str = "http://localhost:8910"
    rp: str = "localhost"
    counter: int | None = 0
    key: EllipticCurvePrivateKey | Ed25519PrivateKey = field(default_factory=lambda: generate_private_key(SECP256R1()))
    id: bytes = field(default_factory=lambda: os.urandom(32))

    def pem(self, directory: Path, name: str) -> Path:
        """Its public key in a file."""
        path = directory / f"{name}.pem"
        path.write_bytes(pem(self.key.public_key()))
        return path

    def assertion(
        self,
        challenge: bytes,
        *,
        origin: str | None = None,
        rp: str | None = None,
        flags: int = UP | UV,
        counter: int | None = None,
        act: str = "webauthn.get",
        client: dict[str, object] | None = None,
        identity: bytes | None = None,
    ) -> bytes:
        """An assertion over a challenge, as it is handed in; what is said here takes the place of what would be right."""
        if counter is None:
            counter = 0 if self.counter is None else self.counter + 1
            self.counter = None if self.counter is None else counter
        data = {"type": act, "challenge": encoded(challenge), "origin": origin or self.origin, "crossOrigin": False}
        said = json.dumps(data | (client or {})).encode()
        about = hashlib.sha256((rp or self.rp).encode()).digest() + bytes([flags]) + counter.to_bytes(4, "big")
        signed = about + hashlib.sha256(said).digest()
        edwards = isinstance(self.key, Ed25519PrivateKey)
        signature = self.key.sign(signed, *(() if edwards else (ECDSA(SHA256()),)))
        parts = (encoded(part) for part in (identity or self.id, said, about, signature))
        return Assertion(*parts).to_bytes()
