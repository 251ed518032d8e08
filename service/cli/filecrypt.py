"""Files of any size under a data key: constant memory, chunked and authenticated (C2SP chunked-encryption, Cobblestone).

File = `SKF1` || u32 length || envelope of the data key (purpose datakey) || stream. The stream's context is SHA-512 of
everything before it. That the end is missing shows only when the stream ends, so the output gets its name after that.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Final

from cryptography.cobblestone import Cobblestone256Decryptor, Cobblestone256Encryptor
from cryptography.exceptions import InvalidTag

MAGIC: Final = b"SKF1"
CHUNK: Final = 1 << 20
MAX_ENVELOPE: Final = 4_096  # a wrapped data key takes 149 bytes


class NotProtected(Exception):
    """Not a file of this format, or changed, cut or extended since."""


def head_of(envelope: bytes) -> bytes:
    """Everything before the stream."""
    return MAGIC + len(envelope).to_bytes(4, "big") + envelope


def read_envelope(source: BinaryIO) -> bytes:
    """The wrapped data key of a protected file; NotProtected if there is none."""
    if source.read(4) != MAGIC:
        raise NotProtected("not a file protected by skms")
    length = int.from_bytes(source.read(4), "big")
    envelope = source.read(length) if 0 < length <= MAX_ENVELOPE else b""
    if len(envelope) != length or not length:
        raise NotProtected("the file's head is damaged")
    return envelope


def encrypt(
    source: BinaryIO, target: BinaryIO, *, key: bytes, envelope: bytes, progress: Callable[[int], None]
) -> None:
    """Protect a stream under a 32-byte data key that `envelope` wraps."""
    head = head_of(envelope)
    target.write(head)
    cipher = Cobblestone256Encryptor(key, hashlib.sha512(head).digest())
    while chunk := source.read(CHUNK):
        target.write(cipher.update(chunk))
        progress(len(chunk))
    target.write(cipher.finalize())


def decrypt(
    source: BinaryIO, target: BinaryIO, *, key: bytes, envelope: bytes, progress: Callable[[int], None]
) -> None:
    """Restore what `encrypt` protected; NotProtected if a bit of it changed, or its end is missing."""
    cipher = Cobblestone256Decryptor(key, hashlib.sha512(head_of(envelope)).digest())
    try:
        while chunk := source.read(CHUNK):
            target.write(cipher.update(chunk))
            progress(len(chunk))
        target.write(cipher.finalize())
    except (InvalidTag, ValueError):
        raise NotProtected("the file was changed or cut") from None


@contextlib.contextmanager
def atomic(target: Path, *, force: bool) -> Iterator[BinaryIO]:
    """A file that has its name only once it is whole and durable; nothing is left of one that failed."""
    if target.exists() and not force:
        raise FileExistsError(f"{target} exists; --force replaces it")
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.part")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
