"""Keys of people: what signs approvals and bundles, and what verifies them.

A person signs with an Ed25519 key in a PEM file, or with an Ed25519 or P-256 key on a card; public keys are PEM files.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from policy.signing import ED25519, PersonKey, algorithm, one_form

if TYPE_CHECKING:
    from keystore.pkcs11 import CardKey

Sign = Callable[[bytes], bytes]  # what a person says -> its signature; KeyFileRefused


class KeyFileRefused(Exception):
    """A file holds no such key; the message says which file and why, and nothing of what is in it."""


def private_key(path: Path, password: bytes | None = None) -> Ed25519PrivateKey:
    """The private key in a file; KeyFileRefused."""
    key = _read(path, "a private key in PEM, or not with this password", lambda d: load_pem_private_key(d, password))
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyFileRefused(f"key {path}: not an Ed25519 key")
    return key


def public_key(path: Path, wanted: str = ED25519) -> PersonKey:
    """The public key in a file, of the algorithm that it is enrolled with; KeyFileRefused."""
    key = _read(path, "a public key in PEM", load_pem_public_key)
    if algorithm(key) != wanted:
        other = f': it is for algorithm = "{algorithm(key)}"' if algorithm(key) else ""
        raise KeyFileRefused(f"key {path}: not an {wanted} key{other}")
    return key  # type: ignore[return-value]  # `algorithm` knows no other


def by_file(path: Path, password: bytes | None = None) -> Sign:
    """Sign with the private key in a file."""
    return lambda said: private_key(path, password).sign(said)


def by_card(where: CardKey, pin: Callable[[], bytes]) -> Sign:
    """Sign with a key on a card."""
    from keystore.hsm import SignScheme
    from keystore.pkcs11 import CardRefused, sign_on_card

    def sign(said: bytes) -> bytes:
        try:
            scheme, made = sign_on_card(where, pin, said)
            return made if scheme is SignScheme.ED25519 else one_form(made)
        except (CardRefused, ValueError) as error:
            raise KeyFileRefused(str(error)) from None

    return sign


def _read(path: Path, what: str, load: Callable[[bytes], object]) -> object:
    try:
        return load(path.read_bytes())
    except OSError as error:
        raise KeyFileRefused(f"key {path}: {error.strerror}") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise KeyFileRefused(f"key {path}: not {what}") from None
