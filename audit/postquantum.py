"""The ML-DSA-44 key that signs checkpoints beside the audit key, in a file: few HSMs have ML-DSA yet.

Whoever breaks the audit key's curve later cannot forge what this key signed too. It replaces nothing: a file can be
copied, an HSM's key cannot, so a verifier asks for both.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from cryptography.exceptions import InternalError, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from audit.checkpoint import ML_DSA_44, BadNote, Checkpoint, NoteKey, cosigned_message
from audit.notary import CannotCosign

_UNKNOWN: Final = "ML-DSA-44 is unknown to this OpenSSL: use `cryptography` built with OpenSSL 3.5 or later"


class UnusableKey(Exception):
    """A key file that cannot be made or used: the message names it, the cause and the remedy."""


class PostQuantumKey:
    """A key in memory, under the name of the log whose checkpoints it signs: one for all its generations."""

    def __init__(self, name: str, private: MLDSA44PrivateKey) -> None:
        self._private = private
        self.key = NoteKey(name, ML_DSA_44, private.public_key().public_bytes_raw())

    def cosign(self, checkpoint: Checkpoint, seconds: int) -> bytes:
        """The bytes of a signature line after the key id: the time, then the signature; CannotCosign on failure."""
        try:
            made = self._private.sign(cosigned_message(self.key.name, checkpoint, seconds))
        except (BadNote, ValueError, UnsupportedAlgorithm, InternalError) as error:
            raise CannotCosign(f"signing failed ({type(error).__name__})") from None
        return seconds.to_bytes(8, "big") + made


def create(path: Path, name: str) -> PostQuantumKey:
    """Make a key in a new file (PKCS#8 PEM, mode 0600); UnusableKey if the file is there or ML-DSA is not."""
    try:
        private = MLDSA44PrivateKey.generate()
    except UnsupportedAlgorithm:
        raise UnusableKey(_UNKNOWN) from None
    data = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UnusableKey(f"{path} cannot be made: {error.strerror}; name a new file") from None
    return PostQuantumKey(name, private)


def load(path: Path, name: str) -> PostQuantumKey:
    """Read a key file; UnusableKey unless it is an ML-DSA-44 key that its owner alone can read."""
    try:
        with path.open("rb") as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                raise UnusableKey(f"{path} can be read by others than its owner: chmod 600, or make a new key")
            private = load_pem_private_key(file.read(65_536), None)
    except OSError as error:
        raise UnusableKey(f"{path} cannot be read: {error.strerror}") from None
    except UnsupportedAlgorithm:
        raise UnusableKey(f"{path}: {_UNKNOWN}") from None
    except (ValueError, TypeError):
        raise UnusableKey(f"{path} is no private key in PEM: make one by `skms audit post-quantum-key`") from None
    if not isinstance(private, MLDSA44PrivateKey):
        raise UnusableKey(f"{path} is not an ML-DSA-44 key: make one by `skms audit post-quantum-key`")
    return PostQuantumKey(name, private)
