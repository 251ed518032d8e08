"""What every C2SP tlog-witness must do, ours or another: subclass it and say how to reach one that knows LOG."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from audit.chain import tree_hash
from audit.checkpoint import ED25519, Checkpoint, Note, NoteKey, parse_note, verified
from audit.proof import consistency_proof, subtree_of
from audit.witness import SIZE_TYPE, Answer, Endpoint, Submission

ORIGIN = "log.example/audit"
_LOG = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"a log of a test").digest())
LOG = NoteKey(ORIGIN, ED25519, _LOG.public_key().public_bytes_raw())
LEAVES = [hashlib.sha256(b"\0%d" % i).digest() for i in range(20)]
OTHER = [hashlib.sha256(b"\0other %d" % i).digest() for i in range(20)]


def note_of(size: int, leaves: list[bytes] = LEAVES, *, origin: str = ORIGIN, key: Ed25519PrivateKey = _LOG) -> Note:
    text = Checkpoint(origin, size, tree_hash(leaves[:size])).text()
    return Note(text, ()).signed_by(LOG, key.sign(text))


def submission(old: int, size: int, leaves: list[bytes] = LEAVES) -> bytes:
    proof = consistency_proof(old, size, subtree_of(leaves[:size])) if 0 < old <= size else []
    return Submission(old, tuple(proof), note_of(size, leaves)).encode()


class WitnessContract(ABC):
    """What a subclass says of its witness, and what is asked of every one."""

    @abstractmethod
    def endpoint(self) -> Endpoint:
        """Return a witness that trusts LOG and has seen none of its checkpoints."""

    @abstractmethod
    def key(self) -> NoteKey:
        """Return the cosignature key of that witness."""

    def test_it_cosigns_a_first_checkpoint_and_each_that_extends_the_last(self) -> None:
        witness = self.endpoint()
        for old, size in ((0, 3), (3, 8), (8, 8), (8, 20)):
            answer = witness.add(submission(old, size))
            assert answer.status == 200
            assert verified(parse_note(note_of(size).text + b"\n" + answer.body), [self.key()]) == (self.key(),)

    def test_another_old_size_is_answered_with_the_one_it_has(self) -> None:
        witness = self.endpoint()
        assert self.size_told(witness.add(submission(3, 8))) == b"0\n"
        witness.add(submission(0, 5))
        assert self.size_told(witness.add(submission(0, 8))) == b"5\n"
        assert self.size_told(witness.add(submission(3, 8))) == b"5\n"

    def test_a_fork_gets_no_cosignature_at_the_same_size_nor_at_a_larger_one(self) -> None:
        witness = self.endpoint()
        witness.add(submission(0, 5))
        assert witness.add(submission(5, 5, OTHER)).status in {409, 422}
        assert witness.add(submission(5, 9, OTHER)).status == 422
        assert witness.add(submission(5, 9)).status == 200

    def test_a_proof_from_nothing_must_be_empty(self) -> None:
        bad = Submission(0, (bytes(32),), note_of(4)).encode()
        assert self.endpoint().add(bad).status == 422

    def test_an_unknown_log_and_an_untrusted_or_false_signature_are_refused(self) -> None:
        witness, stranger = self.endpoint(), Ed25519PrivateKey.generate()
        assert witness.add(Submission(0, (), note_of(4, origin="other.example")).encode()).status == 404
        assert witness.add(Submission(0, (), note_of(4, key=stranger)).encode()).status == 403
        unsigned = Note(note_of(4).text, ()).signed_by(self.key(), bytes(72))
        assert witness.add(Submission(0, (), unsigned).encode()).status == 403

    def test_a_malformed_request_is_refused_and_changes_nothing(self) -> None:
        witness, good = self.endpoint(), submission(0, 4)
        for bad in (
            b"",
            b"old 0",
            b"old 0\n",
            good.replace(b"old 0", b"old 00"),
            good.replace(b"old 0", b"old  0"),
            good.replace(b"old 0", b"old +0"),
            good.replace(b"old 0", b"old -1"),
            good.replace(b"old 0", b"Old 0"),
            good.replace(b"old 0\n", b"old 0\r\n"),
            good.replace(b"old 0\n", b"old 0\n!\n"),
            good.replace(b"old 0\n", b"old 0\nAAAA\n"),
            good.replace(b"old 0\n", b"old 0\n" + 64 * (43 * b"A" + b"=\n")),
            good.replace(b"old 0\n", b"old 0\n" + 42 * b"A" + b"B=\n"),  # trailing bits
            good[:-1],
            good.replace(b"\n4\n", b"\n04\n"),
            submission(5, 4),
        ):
            assert witness.add(bad).status == 400, bad
        assert witness.add(good).status == 200

    @staticmethod
    def size_told(answer: Answer) -> bytes:
        assert (answer.status, answer.media.partition(";")[0]) == (409, SIZE_TYPE)
        return answer.body
