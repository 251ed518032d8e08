"""Witnesses, C2SP tlog-witness: ours are asked to cosign each checkpoint, and we cosign those of other logs.

A witness vouches that a log only grew since it last looked. Whoever would show two trees to two readers, or go back to
an old one, needs every witness of a quorum to help. The last checkpoint of each log is stored, in the transaction that
compared it, before its cosignature leaves.
"""

from __future__ import annotations

import base64
import hashlib
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import IntegrityError

from audit.chain import Bad, node_hash
from audit.checkpoint import (
    COSIGNATURE,
    BadNote,
    BadSignature,
    Checkpoint,
    Note,
    NoteKey,
    cosigned,
    decode_base64,
    decode_number,
    parse_checkpoint,
    parse_note,
    verified,
    with_cosignatures,
)
from audit.notary import newest
from audit.proof import BadProof, Subtree, check_consistency, consistency_proof
from audit.tables import checkpoint_table, root_table, witness_table
from audit.tlogpolicy import WitnessPolicy

MAX_BODY: Final = 16_384
MAX_PROOF: Final = 63
TIMEOUT_S: Final = 1.0
SKEW_S: Final = 300
SIZE_TYPE: Final = "text/x.tlog.size"
_EMPTY_ROOT: Final = hashlib.sha256().digest()


@dataclass(frozen=True, slots=True)
class Answer:
    """What a witness answers: HTTP status, media type, body."""

    status: int
    body: bytes = b""
    media: str = "text/plain"


class Endpoint(Protocol):
    """A witness that can be asked.

    `add` answers within about `TIMEOUT_S` or raises OSError; a body of more than 16 KiB is an OSError too. The witness
    has stored what it cosigned before it answers 200.
    """

    def add(self, body: bytes) -> Answer: ...


# ---- the request -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Submission:
    """An add-checkpoint request: the size the witness last saw, the proof from there, and the signed checkpoint."""

    old: int
    proof: tuple[bytes, ...]
    note: Note

    def encode(self) -> bytes:
        """The body of the request."""
        lines = [f"old {self.old}", *(base64.b64encode(node).decode() for node in self.proof), "", ""]
        return "\n".join(lines).encode() + self.note.encode()


def parse_submission(body: bytes) -> Submission:
    """Take a request apart; BadNote if it is none."""
    head, separator, note = body.partition(b"\n\n")
    if len(body) > MAX_BODY or not separator:
        raise BadNote("a request is at most 16 KiB: old size, proof, an empty line, a checkpoint")
    try:
        first, *hashes = head.decode("ascii").split("\n")
    except UnicodeDecodeError:
        raise BadNote("old size and proof are ASCII") from None
    if not first.startswith("old ") or len(hashes) > MAX_PROOF:
        raise BadNote(f"a request begins with `old SIZE` and at most {MAX_PROOF} hashes")
    proof = tuple(decode_base64(line, "a hash of the proof") for line in hashes)
    if any(len(node) != 32 for node in proof):
        raise BadNote("a hash of the proof is not 32 bytes")
    return Submission(decode_number(first.removeprefix("old "), "the old size"), proof, parse_note(note))


# ---- serving ---------------------------------------------------------------------------------------------------------


class Cosigner:
    """A witness's own key. It cosigns, and signs nothing else: no log's key, no audit key."""

    def __init__(self, name: str, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.key = NoteKey(name, COSIGNATURE, private.public_key().public_bytes_raw())

    def sign(self, text: bytes, seconds: int) -> bytes:
        """The cosignature's bytes: its time, then the signature."""
        return seconds.to_bytes(8, "big") + self._private.sign(cosigned(text, seconds))


class _Retry(Exception):
    """Another process stored a checkpoint of this log meanwhile."""


class Witness:
    """Cosigns checkpoints of the configured logs (origin -> their keys), each only if it extends the last one."""

    def __init__(
        self,
        engine: Engine,
        cosigner: Cosigner,
        logs: Mapping[str, Sequence[NoteKey]],
        *,
        clock: Callable[[], int],
    ) -> None:
        self._engine, self._cosigner, self._logs, self._clock = engine, cosigner, dict(logs), clock
        self._by_hash = {hashlib.sha256(origin.encode()).hexdigest(): origin for origin in logs}

    def add(self, body: bytes) -> Answer:
        """Answer an add-checkpoint request; a cosignature is answered only after COMMIT."""
        try:
            asked = parse_submission(body)
            checkpoint = parse_checkpoint(asked.note.text)
        except BadNote as bad:
            return Answer(400, f"{bad}\n".encode())
        keys = self._logs.get(checkpoint.origin)
        if keys is None:
            return Answer(404, b"not a log that is witnessed here\n")
        try:
            verified(asked.note, keys)
        except BadSignature as bad:
            return Answer(403, f"{bad}\n".encode())
        if asked.old > checkpoint.size:
            return Answer(400, b"the old size is larger than the checkpoint\n")
        for _ in range(2):
            try:
                with self._engine.begin() as connection:
                    return self._decide(connection, asked, checkpoint, keys)
            except _Retry:
                continue
        return Answer(503, b"another checkpoint of this log is being stored\n")

    def latest(self, origin_hash: str) -> Answer:
        """The last checkpoint of a log that was cosigned, by the SHA-256 of its origin in hex."""
        origin = self._by_hash.get(origin_hash)
        if origin is not None:
            with self._engine.execution_options(reading=True).connect() as connection:
                chosen = sa.select(witness_table.c.note).where(witness_table.c.origin == origin)
                found: bytes | None = connection.execute(chosen).scalar()
            if found is not None:
                return Answer(200, found)
        return Answer(404, b"no checkpoint of such a log\n")

    def _decide(
        self, connection: Connection, asked: Submission, checkpoint: Checkpoint, keys: Sequence[NoteKey]
    ) -> Answer:
        chosen = sa.select(witness_table).where(witness_table.c.origin == checkpoint.origin).with_for_update()
        last = connection.execute(chosen).mappings().first()
        size = 0 if last is None else int(last["size"])
        if asked.old != size:
            return Answer(409, b"%d\n" % size, SIZE_TYPE)
        if last is not None and checkpoint.size == size and checkpoint.root != last["root"]:
            return Answer(409, b"%d\n" % size, SIZE_TYPE)  # v1.0.0; 422 in the draft
        try:
            _check(asked, checkpoint, _EMPTY_ROOT if last is None else last["root"])
        except BadProof as bad:
            return Answer(422, f"{bad}\n".encode())
        before = 0 if last is None else _time_in(last["note"], self._cosigner.key)
        seconds = max(self._clock() // 1_000_000, before)  # time never goes back
        # Only what was verified is stored and shown: lines of strangers could be anything.
        signed = Note(asked.note.text, tuple(s for s in asked.note.signatures if _is_of(s.name, s.id, keys)))
        cosignature = self._cosigner.sign(signed.text, seconds)
        made = signed.signed_by(self._cosigner.key, cosignature)
        values = {"size": checkpoint.size, "root": checkpoint.root, "note": made.encode()}
        if last is not None:
            there = (witness_table.c.origin == checkpoint.origin) & (witness_table.c.size == size)
            if connection.execute(sa.update(witness_table).where(there).values(**values)).rowcount != 1:
                raise _Retry  # what was not stored is not cosigned
        else:
            try:
                connection.execute(sa.insert(witness_table), [{"origin": checkpoint.origin, **values}])
            except IntegrityError:
                raise _Retry from None
        return Answer(200, made.signatures[-1].line())


def _is_of(name: str, identity: bytes, keys: Sequence[NoteKey]) -> bool:
    return any((key.name, key.id) == (name, identity) for key in keys)


def _check(asked: Submission, checkpoint: Checkpoint, old_root: bytes) -> None:
    if asked.old == 0:
        if asked.proof or (checkpoint.size == 0 and checkpoint.root != _EMPTY_ROOT):
            raise BadProof("from size 0 the proof is empty, and so is the root of an empty tree")
        return
    check_consistency(asked.old, checkpoint.size, old_root, checkpoint.root, asked.proof)


def _time_in(note: bytes, key: NoteKey) -> int:
    """When a witness cosigned this note (s); 0 if it did not."""
    found = [s for s in parse_note(note).signatures if (s.name, s.id) == (key.name, key.id)]
    return max((int.from_bytes(s.value[:8], "big") for s in found if len(s.value) == 72), default=0)


# ---- being witnessed -------------------------------------------------------------------------------------------------


class Ahead(Exception):
    """A witness saw more of this log than the database holds: it was rolled back."""

    def __init__(self, size: int, who: str) -> None:
        super().__init__(f"witness {who} saw {size} entries of the root log: the database is an older one")
        self.size, self.who = size, who


class Forked(Exception):
    """A witness saw another tree of this log: two histories were signed."""

    def __init__(self, size: int, who: str) -> None:
        super().__init__(f"witness {who} saw another tree at {size} entries of the root log")
        self.size, self.who = size, who


class Refused(Exception):
    """A witness gave no cosignature that counts; it is asked again in the next round."""


class Levels:
    """The full subtrees of a growing tree by level, 64 bytes a leaf: any proof in O(log n) hashes."""

    def __init__(self) -> None:
        self._levels: list[bytearray] = [bytearray()]

    @property
    def size(self) -> int:
        """How many leaves it has."""
        return len(self._levels[0]) // 32

    def push(self, leaf: bytes) -> None:
        """Append a leaf hash, and complete the subtrees that end with it."""
        at, found = self.size, leaf
        for level in range(at.bit_length() + 1):
            if level == len(self._levels):
                self._levels.append(bytearray())
            self._levels[level] += found
            if not at >> level & 1:
                return
            found = node_hash(self._at(level, (at >> level) - 1), found)

    def _at(self, level: int, number: int) -> bytes:
        return bytes(self._levels[level][number * 32 : number * 32 + 32])

    def subtree(self, lo: int, hi: int) -> bytes:
        """The hash of leaves lo to hi - 1, for ranges of the RFC 6962 tree (`audit.proof.Subtree`)."""
        width = hi - lo
        if width & (width - 1) == 0 and lo % width == 0:
            return self._at(width.bit_length() - 1, lo // width)
        half = 1 << ((width - 1).bit_length() - 1)
        return node_hash(self.subtree(lo, lo + half), self.subtree(lo + half, hi))


@dataclass(slots=True)
class Seen:
    """What one witness last cosigned of our log, and how it has behaved since this process started."""

    size: int = 0
    time: int = 0  # s, its own clock
    failures: int = 0
    problem: str = ""
    running: threading.Thread | None = None
    observed: Ahead | Forked | None = None  # stays until a person has looked


@dataclass(slots=True)
class Push:
    """One round: the cosignature lines that came in time, by witness."""

    lines: dict[str, bytes] = field(default_factory=dict)


class Pusher:
    """Asks every witness of a policy to cosign a checkpoint, all at the same time."""

    def __init__(
        self,
        policy: WitnessPolicy,
        endpoints: Mapping[str, Endpoint],
        *,
        clock: Callable[[], int],
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self.policy, self._endpoints, self._clock, self._timeout_s = policy, dict(endpoints), clock, timeout_s
        self.seen = {name: Seen() for name in endpoints}

    def push(self, note: bytes, subtree: Subtree) -> Push:
        """The cosignatures that arrive within the timeout; a witness that still hangs is left out of later rounds.

        Raises Ahead or Forked if any witness showed that this database is not the log it knows, also in a later round.
        """
        made, parsed = Push(), parse_note(note)
        checkpoint = parse_checkpoint(parsed.text)
        for name, seen in self.seen.items():
            if seen.running is None or not seen.running.is_alive():
                arguments = (name, seen, parsed, checkpoint, subtree, made)
                # A daemon: nobody waits at exit for a witness that hangs.
                seen.running = threading.Thread(target=self._ask, args=arguments, name=f"witness-{name}", daemon=True)
                seen.running.start()
        deadline = time.monotonic() + self._timeout_s
        for seen in self.seen.values():
            if seen.running is not None:
                seen.running.join(max(0.0, deadline - time.monotonic()))
                if seen.running.is_alive():
                    seen.failures, seen.problem = seen.failures + 1, f"no answer within {self._timeout_s:g} s"
        for seen in self.seen.values():
            if seen.observed is not None:
                raise seen.observed
        return Push(dict(made.lines))

    def _ask(self, name: str, seen: Seen, note: Note, checkpoint: Checkpoint, subtree: Subtree, made: Push) -> None:
        try:
            line, at = self._cosignature(name, seen, note, checkpoint, subtree)
        except (Ahead, Forked) as observed:
            seen.observed, seen.problem = observed, str(observed)
        except (Refused, OSError, BadNote) as refused:
            seen.failures, seen.problem = seen.failures + 1, str(refused) or type(refused).__name__
        else:
            seen.size, seen.time, seen.problem = checkpoint.size, at, ""
            made.lines[name] = line

    def _cosignature(
        self, name: str, seen: Seen, note: Note, checkpoint: Checkpoint, subtree: Subtree
    ) -> tuple[bytes, int]:
        old = seen.size
        for _ in range(2):  # what we remember may be of before its or our restart: once more from what it says
            if old > checkpoint.size:
                raise Ahead(old, name)
            proof = consistency_proof(old, checkpoint.size, subtree) if old else []
            answer = self._endpoints[name].add(Submission(old, tuple(proof), note).encode())
            if answer.status == 200:
                return self._checked(name, seen, note, answer.body)
            if answer.status == 409 and answer.media.partition(";")[0].strip() == SIZE_TYPE:
                said = _size_in(answer.body)
                if said > checkpoint.size:
                    raise Ahead(said, name)
                if said == old == checkpoint.size:
                    raise Forked(said, name)
                old = said
            elif answer.status in {409, 422} and old:
                # Our proof is right for our tree: the tree that the witness saw at `old` is another.
                raise Forked(old, name)
            else:
                raise Refused(f"status {answer.status}")
        raise Refused("it names another size each time it is asked")

    def _checked(self, name: str, seen: Seen, note: Note, body: bytes) -> tuple[bytes, int]:
        key = self.policy.witnesses[name]
        answered = parse_note(note.text + b"\n" + body)
        verified(answered, [key])
        line = next(s for s in answered.signatures if (s.name, s.id) == (key.name, key.id))
        at = int.from_bytes(line.value[:8], "big")
        if at < seen.time or abs(at - self._clock() // 1_000_000) > SKEW_S:
            raise Refused("its time goes back, or is more than 5 minutes off")
        return line.line(), at


def _size_in(body: bytes) -> int:
    try:
        text = body.decode("ascii")
    except UnicodeDecodeError:
        raise Refused("the size in its answer is not a number") from None
    if not text.endswith("\n"):
        raise Refused("the size in its answer does not end with a newline")
    return decode_number(text[:-1], "the size in its answer")


class HttpEndpoint:
    """A witness at an HTTPS submission prefix."""

    def __init__(self, prefix: str, context: ssl.SSLContext, *, timeout_s: float = TIMEOUT_S) -> None:
        self._url, self._context, self._timeout_s = f"{prefix.rstrip('/')}/add-checkpoint", context, timeout_s

    def add(self, body: bytes) -> Answer:
        """POST it. Redirects and proxies of the environment are not followed."""
        import httpx  # a twentieth of a worker's imports, and not every node pushes

        deadline = time.monotonic() + self._timeout_s
        try:
            with (
                httpx.Client(verify=self._context, timeout=self._timeout_s, trust_env=False) as client,
                client.stream("POST", self._url, content=body) as answer,
            ):
                found = b""
                for part in answer.iter_raw():
                    found += part
                    if len(found) > MAX_BODY or time.monotonic() > deadline:
                        raise OSError("its answer is too large or too slow")
                return Answer(answer.status_code, found, answer.headers.get("content-type", ""))
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise OSError(type(error).__name__) from None


class Witnessing:
    """The newest stored checkpoint, shown to the witnesses; their cosignatures stored beside it."""

    def __init__(self, engine: Engine, pusher: Pusher) -> None:
        self._engine, self.pusher, self._levels = engine, pusher, Levels()
        self.shown = b""  # the note that was pushed last
        self.witnessed = 0  # the largest size that a quorum cosigned

    def round(self, fence: Callable[[Connection], None]) -> int | None:
        """Push once; the size that was pushed, None without a checkpoint.

        Bad E_ROOT if the stored entries do not lead to the checkpoint: that is never shown to anybody. Ahead and Forked
        as `Pusher.push`; cosignatures that others gave in the same round are not stored then.
        """
        with self._engine.execution_options(reading=True).connect() as connection:
            signed = newest(connection)
            if signed is None:
                return None
            size = signed.checkpoint.size
            chosen = sa.select(root_table.c.leaf).where(root_table.c.seq >= self._levels.size, root_table.c.seq < size)
            for leaf in connection.execute(chosen.order_by(root_table.c.seq)).scalars():
                self._levels.push(leaf)
        if self._levels.size < size or self._levels.subtree(0, size) != signed.checkpoint.root:
            self._levels = Levels()  # the rows may have been put right since: they are read again
            raise Bad("E_ROOT", f"{signed.checkpoint.origin}/{size}", "the stored entries lead to another root")
        self.shown = signed.note
        pushed = self.pusher.push(signed.note, self._levels.subtree)
        if pushed.lines:
            self._store(signed.note, size, pushed.lines, fence)
        return size

    def _store(self, note: bytes, size: int, lines: Mapping[str, bytes], fence: Callable[[Connection], None]) -> None:
        """Add cosignatures to those that are stored, one for each witness: the newest."""
        there = (checkpoint_table.c.size == size) & (checkpoint_table.c.note == note)
        keys = self.pusher.policy.witnesses
        with self._engine.begin() as connection:
            fence(connection)
            stored: bytes = connection.execute(sa.select(checkpoint_table.c.cosigs).where(there)).scalar() or b""
            before = parse_note(with_cosignatures(note, stored)).signatures[len(parse_note(note).signatures) :]
            fresh = [keys[name] for name in lines]
            kept = [s.line() for s in before if not _is_of(s.name, s.id, fresh)]
            cosigs = b"".join([*kept, *(lines[name] for name in sorted(lines))])
            connection.execute(sa.update(checkpoint_table).where(there).values(cosigs=cosigs))
        present = parse_note(with_cosignatures(note, cosigs)).signatures
        signers = [key for key in keys.values() if any((s.name, s.id) == (key.name, key.id) for s in present)]
        if self.pusher.policy.satisfied(signers):
            self.witnessed = max(self.witnessed, size)
