"""Signed notes, checkpoints, cosignatures and proof files, as C2SP spells them: bytes in, facts out. Pure.

A checkpoint is the origin, size and root of the root log, signed as a note. Whoever holds one can detect every later
change of anything it covers. Parsers accept exactly one spelling of each value: two spellings of one checkpoint would
be two checkpoints to somebody who compares bytes.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, mldsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key

from audit.chain import check_signature

ED25519, ECDSA, COSIGNATURE, ML_DSA_44 = 0x01, 0x02, 0x04, 0x06  # C2SP signed-note, signature types
MAX_NOTE: Final = 1_000_000
MAX_SIGNATURES: Final = 64  # C2SP: at least 16
PROOF_HEADER: Final = "c2sp.org/tlog-proof@v1"
_DASH: Final = "\u2014 "
_NUMBER: Final = re.compile(r"0|[1-9][0-9]{0,15}")
_SIZE_MAX: Final = 2**53 - 1
_VKEY_BYTES: Final = {ED25519: 32, COSIGNATURE: 32, ML_DSA_44: 1312}
_COSIGNATURE_BYTES: Final = {COSIGNATURE: 72, ML_DSA_44: 8 + 2420}  # the time (s), then the signature


class BadNote(ValueError):
    """Not a note, checkpoint or proof of this format; the message names the line."""


class BadSignature(BadNote):
    """A note whose text nobody trusted has signed, or that carries a false signature of a trusted key."""


def decode_base64(text: str, what: str) -> bytes:
    """Standard base64 in its one spelling; BadNote otherwise: decoders ignore trailing bits, so it is encoded again."""
    try:
        found = base64.b64decode(text.encode("ascii"), validate=True)
    except ValueError:
        raise BadNote(f"{what} is not base64") from None
    if base64.b64encode(found).decode() != text:
        raise BadNote(f"{what} is not the canonical base64")
    return found


def decode_number(text: str, what: str) -> int:
    """A decimal number without sign, space or leading zero; BadNote otherwise. `int` alone takes ` 12` and `1_2`."""
    if not _NUMBER.fullmatch(text) or int(text) > _SIZE_MAX:
        raise BadNote(f"{what} is not a decimal number below 2^53 without leading zeroes")
    return int(text)


# ---- keys ----------------------------------------------------------------------------------------------------------


def _good_name(name: str) -> bool:
    return bool(name) and "+" not in name and not any(c.isspace() or ord(c) < 0x20 for c in name)


@dataclass(frozen=True, slots=True)
class NoteKey:
    """A key that signs notes: its name, signature type, and 32 (Ed25519) or 1312 bytes (ML-DSA-44) or an SPKI (P-256)."""

    name: str
    type: int
    material: bytes

    @property
    def id(self) -> bytes:
        """The four bytes that stand before its signatures (C2SP signed-note, "Signatures")."""
        if self.type == ECDSA:
            return hashlib.sha256(self.material).digest()[:4]
        return hashlib.sha256(self.name.encode() + b"\n" + bytes([self.type]) + self.material).digest()[:4]

    @property
    def spki(self) -> bytes:
        """SubjectPublicKeyInfo (DER)."""
        if self.type == ECDSA:
            return self.material
        public = ed25519.Ed25519PublicKey.from_public_bytes(self.material)
        return public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

    def verifies(self, text: bytes, signature: bytes) -> bool:
        """Whether it signed this note text; a cosignature also needs its time (8 bytes) before the signature."""
        if self.type not in _COSIGNATURE_BYTES:
            return check_signature(self.spki, signature, text)
        if len(signature) != _COSIGNATURE_BYTES[self.type] or signature[0] & 0x80:  # a time beyond 2^63 - 1
            return False
        seconds, value = int.from_bytes(signature[:8], "big"), signature[8:]
        if self.type == COSIGNATURE:
            return check_signature(self.spki, value, cosigned(text, seconds))
        try:
            _ml_dsa(self.material).verify(value, cosigned_message(self.name, parse_checkpoint(text), seconds))
        except (BadNote, InvalidSignature):
            return False
        return True


def cosigned(text: bytes, seconds: int) -> bytes:
    """What a witness signs of a checkpoint (C2SP tlog-cosignature, Ed25519)."""
    return b"cosignature/v1\ntime %d\n" % seconds + text


def cosigned_message(cosigner: str, checkpoint: Checkpoint, seconds: int) -> bytes:
    """What an ML-DSA-44 cosigner signs of a checkpoint (C2SP tlog-cosignature, `cosigned_message`); BadNote if it cannot.

    Unlike the Ed25519 message it names the cosigner; a checkpoint is the subtree from leaf 0.
    """
    name, origin = cosigner.encode(), checkpoint.origin.encode()
    if not 0 < len(name) < 256 or not 0 < len(origin) < 256 or len(checkpoint.root) != 32:
        raise BadNote("a cosigner's name and an origin are 1 to 255 bytes, a root 32")
    start, times = 0, seconds.to_bytes(8, "big")
    tree = start.to_bytes(8, "big") + checkpoint.size.to_bytes(8, "big") + checkpoint.root
    return b"subtree/v1\n\0" + bytes([len(name)]) + name + times + bytes([len(origin)]) + origin + tree


def _ml_dsa(material: bytes) -> mldsa.MLDSA44PublicKey:
    try:
        return mldsa.MLDSA44PublicKey.from_public_bytes(material)
    except UnsupportedAlgorithm:
        raise BadNote(
            "ML-DSA-44 is unknown to this OpenSSL: use `cryptography` built with OpenSSL 3.5 or later"
        ) from None
    except ValueError:
        raise BadNote("not an ML-DSA-44 public key") from None


def key_of(name: str, spki: bytes) -> NoteKey:
    """The note key of a public key; BadNote unless it is Ed25519 or ECDSA P-256 and the name may name a key."""
    if not _good_name(name):
        raise BadNote(f"{name!r} cannot name a key")
    try:
        public = load_der_public_key(spki)
    except (ValueError, UnsupportedAlgorithm):
        raise BadNote("not a SubjectPublicKeyInfo") from None
    if isinstance(public, ed25519.Ed25519PublicKey):
        return NoteKey(name, ED25519, public.public_bytes_raw())
    if isinstance(public, ec.EllipticCurvePublicKey) and isinstance(public.curve, ec.SECP256R1):
        return NoteKey(name, ECDSA, public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))
    raise BadNote("notes are signed with Ed25519 or ECDSA P-256")


def parse_vkey(text: str) -> NoteKey:
    """A verifier key `name+id+base64(type || key)`, of type Ed25519, cosignature or ML-DSA-44; BadNote otherwise."""
    parts = text.split("+", 2)
    if len(parts) != 3 or not _good_name(parts[0]):
        raise BadNote("not a verifier key: name+id+key")
    encoded = decode_base64(parts[2], "the verifier key")
    if not encoded or len(encoded) - 1 != _VKEY_BYTES.get(encoded[0]):
        raise BadNote("a verifier key of another type than Ed25519, cosignature/v1 or ML-DSA-44")
    key = NoteKey(parts[0], encoded[0], encoded[1:])
    if key.id.hex() != parts[1]:
        raise BadNote("the verifier key's id is not that of its key")
    if key.type == ML_DSA_44:
        _ml_dsa(key.material)
    return key


def format_vkey(key: NoteKey) -> str:
    """The verifier key of an Ed25519 or ML-DSA-44 key: what other tools are configured with."""
    encoded = base64.b64encode(bytes([key.type]) + key.material).decode()
    return f"{key.name}+{key.id.hex()}+{encoded}"


# ---- notes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Signature:
    """One signature line."""

    name: str
    id: bytes
    value: bytes

    def line(self) -> bytes:
        """As it stands in a note."""
        return f"{_DASH}{self.name} {base64.b64encode(self.id + self.value).decode()}\n".encode()


@dataclass(frozen=True, slots=True)
class Note:
    """A text, its last newline included, and the signatures below it. Nothing is verified yet."""

    text: bytes
    signatures: tuple[Signature, ...]

    def encode(self) -> bytes:
        """The bytes of the note."""
        return self.text + b"\n" + b"".join(s.line() for s in self.signatures)

    def signed_by(self, key: NoteKey, value: bytes) -> Note:
        """The same note with one more signature."""
        return Note(self.text, (*self.signatures, Signature(key.name, key.id, value)))


def with_cosignatures(note: bytes, lines: bytes | None) -> bytes:
    """A stored note with the signature lines of its witnesses, which are stored beside it, one after the other."""
    return note + (lines or b"")


def parse_note(data: bytes) -> Note:
    """Take a note apart; BadNote if it is not one. C2SP signed-note, "Format"."""
    if len(data) > MAX_NOTE:
        raise BadNote("a note of more than 1,000,000 bytes")
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise BadNote("not UTF-8") from None
    if any(c < " " and c != "\n" for c in text):
        raise BadNote("a control character")
    # The text may hold empty lines: the last one ends it.
    body, separator, below = text.rpartition("\n\n")
    if not separator or not below.endswith("\n"):
        raise BadNote("no signature lines after an empty line")
    lines = below[:-1].split("\n")
    if len(lines) > MAX_SIGNATURES:
        raise BadNote(f"more than {MAX_SIGNATURES} signatures")
    return Note(f"{body}\n".encode(), tuple(_signature(line) for line in lines))


def _signature(line: str) -> Signature:
    name, separator, encoded = line.removeprefix(_DASH).partition(" ")
    if not line.startswith(_DASH) or not separator or not _good_name(name):
        raise BadNote("a signature line is not `\u2014 name base64`")
    raw = decode_base64(encoded, f"the signature of {name}")
    if len(raw) < 5:
        raise BadNote(f"the signature of {name} is too short")
    return Signature(name, raw[:4], raw[4:])


def verified(note: Note, keys: Iterable[NoteKey]) -> tuple[NoteKey, ...]:
    """The trusted keys that signed a note, each once; BadSignature if none did, or one of them falsely.

    Signatures of unknown keys are ignored, also where only the name or only the id is known.
    """
    known = {(k.name, k.id): k for k in keys}
    found: dict[NoteKey, None] = {}
    for signature in note.signatures:
        key = known.get((signature.name, signature.id))
        if key is None:
            continue
        if not key.verifies(note.text, signature.value):
            raise BadSignature(f"the signature of {key.name} is false")
        found[key] = None
    if not found:
        raise BadSignature("no signature of a trusted key")
    return tuple(found)


# ---- checkpoints ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Size and root of the log named by its origin."""

    origin: str
    size: int
    root: bytes

    def text(self) -> bytes:
        """The note text that is signed: three lines, no extensions."""
        return f"{self.origin}\n{self.size}\n{base64.b64encode(self.root).decode()}\n".encode()


def parse_checkpoint(text: bytes) -> Checkpoint:
    """The checkpoint a note text spells; BadNote if it is none. Extension lines are refused: nobody could audit them."""
    lines = text.decode().split("\n")
    if len(lines) != 4 or lines[3] or not lines[0]:
        raise BadNote("a checkpoint is three lines: origin, size, root")
    size = decode_number(lines[1], "the tree size")
    root = decode_base64(lines[2], "the root")
    if len(root) != 32:
        raise BadNote("the root is not 32 bytes")
    return Checkpoint(lines[0], size, root)


def open_checkpoint(data: bytes, origin: str, keys: Sequence[NoteKey]) -> Checkpoint:
    """The checkpoint of this origin in a note that a trusted key of the log signed; BadNote or BadSignature."""
    note = parse_note(data)
    verified(note, keys)
    found = parse_checkpoint(note.text)
    if found.origin != origin:
        raise BadNote(f"a checkpoint of {found.origin}, not of {origin}")
    return found


# ---- proof files ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LogProof:
    """C2SP tlog-proof: an entry's place in the tree of a checkpoint. `extra` is not authenticated by it."""

    index: int
    path: tuple[bytes, ...]
    checkpoint: bytes
    extra: bytes | None = None

    def encode(self) -> bytes:
        """The bytes of a `.tlog-proof` file."""
        lines = [PROOF_HEADER]
        if self.extra is not None:
            lines.append(f"extra {base64.b64encode(self.extra).decode()}")
        lines.append(f"index {self.index}")
        lines += [base64.b64encode(node).decode() for node in self.path]
        return "\n".join([*lines, "", ""]).encode() + self.checkpoint


def parse_proof(data: bytes) -> LogProof:
    """Take a proof file apart; BadNote if it is not one. Its checkpoint is not opened."""
    head, separator, checkpoint = data.partition(b"\n\n")
    try:
        lines = head.decode("ascii").split("\n")
    except UnicodeDecodeError:
        raise BadNote("a proof file is ASCII up to its checkpoint") from None
    if not separator or lines.pop(0) != PROOF_HEADER:
        raise BadNote(f"a proof file begins with {PROOF_HEADER}")
    extra = None
    if lines and lines[0].startswith("extra "):
        extra = decode_base64(lines.pop(0).removeprefix("extra "), "the extra data")
    if not lines or not lines[0].startswith("index "):
        raise BadNote("a proof file names an index")
    index = decode_number(lines.pop(0).removeprefix("index "), "the index")
    path = tuple(decode_base64(line, "a hash of the proof") for line in lines)
    if len(path) > 63 or any(len(node) != 32 for node in path):
        raise BadNote("a proof is at most 63 hashes of 32 bytes")
    return LogProof(index, path, checkpoint, extra)
