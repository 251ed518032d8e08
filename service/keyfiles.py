"""Ed25519 keys (RFC 8032) of people, in PEM files: what signs approvals and bundles, and what verifies them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key


class KeyFileRefused(Exception):
    """A file holds no such key; the message says which file and why, and nothing of what is in it."""


def private_key(path: Path, password: bytes | None = None) -> Ed25519PrivateKey:
    """The private key in a file; KeyFileRefused."""
    key = _read(path, "a private key in PEM, or not with this password", lambda d: load_pem_private_key(d, password))
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyFileRefused(f"key {path}: not an Ed25519 key")
    return key


def public_key(path: Path) -> Ed25519PublicKey:
    """The public key in a file; KeyFileRefused."""
    key = _read(path, "a public key in PEM", load_pem_public_key)
    if not isinstance(key, Ed25519PublicKey):
        raise KeyFileRefused(f"key {path}: not an Ed25519 key")
    return key


def _read(path: Path, what: str, load: Callable[[bytes], object]) -> object:
    try:
        return load(path.read_bytes())
    except OSError as error:
        raise KeyFileRefused(f"key {path}: {error.strerror}") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise KeyFileRefused(f"key {path}: not {what}") from None
