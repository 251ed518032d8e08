"""Proofs that somebody takes away and checks alone: of one record, and that one checkpoint extends another. Pure.

A proof of a record is a C2SP tlog-proof of the root log's entry that commits its chain; `extra` holds that entry, the
record and the path inside the chain, one a line. None of it is believed: leaves are computed from the entries, and what
was proven is compared with what was asked for (CVE-2026-22703: a valid proof of *another* entry).
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Final

from audit.chain import Bad, Frame, Receipt, leaf_hash, parse_frame
from audit.checkpoint import (
    BadNote,
    Checkpoint,
    LogProof,
    decode_base64,
    decode_number,
    parse_proof,
)
from audit.commitments import open_note
from audit.event import BadRecord, Heads, UnknownVersion, decode_heads
from audit.proof import BadProof, check_consistency, check_inclusion
from audit.verify import Trust

_MAX_PATH: Final = 63


def trusted_checkpoint(note: bytes, trust: Trust) -> Checkpoint:
    """The checkpoint of the trusted log in a signed note.

    Bad E_SIG if no trusted key signed it, E_WITNESS if it lacks the witnesses that the trust file asks for.
    """
    try:
        opened = open_note(note, trust.origin, trust.note_keys(), trust.policy)
    except BadNote as bad:
        raise Bad("E_SIG", trust.origin, str(bad)) from None
    if missing := trust.policy.missing(opened.signers):
        raise Bad("E_WITNESS", f"{trust.origin}/{opened.checkpoint.size}", f"the checkpoint lacks {missing}")
    return opened.checkpoint


def committed(proof: LogProof, entry: bytes, trust: Trust) -> tuple[Checkpoint, Frame, Heads]:
    """The checkpoint, and what the root log's entry says that it proves; Bad names what does not hold."""
    found = trusted_checkpoint(proof.checkpoint, trust)
    where = f"{trust.origin}/{proof.index}"
    frame = parse_frame(entry, where)
    if frame.log != trust.origin:
        raise Bad("E_ORIGIN", where, f"the entry belongs to {frame.log}")
    if frame.n != proof.index:
        raise Bad("E_SEQ", where, f"the proof holds entry {frame.n}")
    try:
        check_inclusion(proof.index, found.size, leaf_hash(entry), proof.path, found.root)
        return found, frame, decode_heads(frame.body)
    except BadProof as bad:
        raise Bad("E_ROOT", where, f"the entry is not in the checkpoint of {found.size}: {bad}") from None
    except BadRecord as bad:
        raise Bad(bad.code, where, str(bad)) from None
    except UnknownVersion as later:
        raise Bad("U_VERSION", where, str(later)) from None


# ---- one record ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RecordProof:
    """That a record stands in its chain, the chain in the root log, and the root log under a checkpoint."""

    entry: bytes  # the record's
    path: tuple[bytes, ...]  # in its chain
    heads: bytes  # the root log's entry that commits the chain
    place: LogProof  # of that entry; its `extra` is not used

    def encode(self) -> bytes:
        """The bytes of a `.tlog-proof` file."""
        extra = b"\n".join([self.heads, self.entry, *(base64.b64encode(node) for node in self.path)])
        return LogProof(self.place.index, self.place.path, self.place.checkpoint, extra).encode()


@dataclass(frozen=True, slots=True)
class Proven:
    """What a proof of a record proved."""

    frame: Frame  # of the record
    leaf: bytes
    checkpoint: Checkpoint
    committed: int  # records of the chain under this checkpoint
    by: int  # the entry of the root log that says so


def parse_record_proof(data: bytes) -> RecordProof:
    """Take a proof of a record apart; BadNote if it is none."""
    place = parse_proof(data)
    heads, _, rest = (place.extra or b"").partition(b"\n")
    entry, *path = rest.split(b"\n")
    if not entry or len(path) > _MAX_PATH:
        raise BadNote("the extra data of a record's proof is the root log's entry, the record's, and at most 63 hashes")
    try:
        nodes = tuple(decode_base64(node.decode("ascii"), "a hash of the inner path") for node in path)
    except UnicodeDecodeError:
        raise BadNote("a hash of the inner path is not base64") from None
    return RecordProof(entry, nodes, heads, place)


def check_record_proof(data: bytes, trust: Trust, *, asked: Receipt | None = None) -> Proven:
    """What a proof proves under the trusted keys; Bad if it proves nothing, or another record than was asked for."""
    try:
        proof = parse_record_proof(data)
    except BadNote as bad:
        raise Bad("E_PARSE", trust.origin, str(bad)) from None
    checkpoint, _, heads = committed(proof.place, proof.heads, trust)
    frame = parse_frame(proof.entry, trust.origin)
    where, leaf = f"{frame.log}/{frame.n}", leaf_hash(proof.entry)
    if asked is not None and (frame.log, frame.n) != (asked.log, asked.seq):
        raise Bad("E_RECEIPT", f"{asked.log}/{asked.seq}", f"the proof is of {where}")
    if asked is not None and leaf != asked.leaf:
        raise Bad("E_RECEIPT", where, "the record is not the one the receipt was given for")
    shard = next((s for s in heads.shards if s[0] == frame.log), None)
    if shard is None:
        raise Bad("E_MISSING", where, f"entry {proof.place.index} of the root log does not commit this chain")
    _, size, root = shard
    if frame.n >= size:
        raise Bad("E_TRUNC", where, f"the checkpoint commits {size} records of this chain")
    try:
        check_inclusion(frame.n, size, leaf, proof.path, bytes.fromhex(root))
    except BadProof as bad:
        raise Bad("E_ROOT", where, str(bad)) from None
    return Proven(frame, leaf, checkpoint, size, proof.place.index)


# ---- growth ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Growth:
    """That a checkpoint extends a tree of `old` entries, spelt as the body of C2SP tlog-witness `add-checkpoint`."""

    old: int
    path: tuple[bytes, ...]
    checkpoint: bytes

    def encode(self) -> bytes:
        """`old N`, the hashes, an empty line, the checkpoint."""
        lines = [f"old {self.old}", *(base64.b64encode(node).decode() for node in self.path), "", ""]
        return "\n".join(lines).encode() + self.checkpoint


def parse_growth(data: bytes) -> Growth:
    """Take a consistency proof apart; BadNote if it is none."""
    head, separator, checkpoint = data.partition(b"\n\n")
    try:
        first, *lines = head.decode("ascii").split("\n")
    except UnicodeDecodeError:
        raise BadNote("a consistency proof is ASCII up to its checkpoint") from None
    if not separator or not first.startswith("old ") or len(lines) > _MAX_PATH:
        raise BadNote("a consistency proof is `old N`, at most 63 hashes, an empty line and a checkpoint")
    path = tuple(decode_base64(line, "a hash of the proof") for line in lines)
    return Growth(decode_number(first.removeprefix("old "), "the old size"), path, checkpoint)


def check_growth(data: bytes, old: bytes, trust: Trust) -> tuple[Checkpoint, Checkpoint]:
    """The old checkpoint and the new one that extends it; Bad E_FORK or E_TRUNC if it does not."""
    before = trusted_checkpoint(old, trust)
    try:
        proof = parse_growth(data)
    except BadNote as bad:
        raise Bad("E_PARSE", trust.origin, str(bad)) from None
    after = trusted_checkpoint(proof.checkpoint, trust)
    where = f"{trust.origin}/{before.size}"
    if after.size < before.size:
        raise Bad("E_TRUNC", where, f"the newer checkpoint is of {after.size} entries, yours of {before.size}")
    try:
        check_consistency(before.size, after.size, before.root, after.root, proof.path)
    except BadProof as bad:
        raise Bad("E_FORK", where, f"the checkpoint of {after.size} does not extend yours: {bad}") from None
    return before, after
