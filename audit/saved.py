"""What an auditor keeps from a clean run of `skms-verify`, so that the next one reads only what came after it. Pure.

It is the auditor's own anchor: the next export must have the same records up to here. Of each chain it holds how much was
seen, and the state at the newest size that the root log had committed by then: the notary may commit sizes between that
one and what was seen, and they must be computed again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from audit.chain import Verifier, chain_of, snapshot_of
from audit.commitments import Commitments
from audit.event import Hex64, LogName, Tenant, UInt

FORMAT: Final = 2
ROOTS: Final = 4_096  # of the newest sizes of the root log, which records name as the newest they knew
Head = tuple[UInt, Hex64]


class BadState(ValueError):
    """Not a state that can be used; the message says why."""


class Place(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a chain or the root log can be gone on with: `audit.chain.snapshot_of`."""

    frontier: list[Hex64]
    log: LogName
    n: UInt
    p: Hex64
    t: UInt
    tenants: dict[Tenant, Head]


class WriterPlace(Place, frozen=True, forbid_unknown_fields=True):
    """The same of a chain: `audit.chain.Verifier.state`."""

    begun: dict[str, UInt]
    closed: bool
    epoch: UInt
    intents: dict[str, UInt]
    opened: UInt
    pub: str


class Resume(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A place in an exported chain: its state, where `seals.jsonl` stood (bytes), and the line before that."""

    state: WriterPlace
    seals: UInt
    seal: str


class SavedChain(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How many records of a chain were seen, the last one's leaf, and where to go on, if that can be told."""

    n: UInt
    p: Hex64
    resume: Resume | None


class SavedRoot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The root log: its state, roots by size, the newest checkpoint's size, each chain's newest commitment, all heads."""

    checkpoint: UInt
    epoch: UInt
    heads: dict[Tenant, dict[LogName, Head]]
    newest: dict[LogName, tuple[UInt, Hex64, UInt]]
    roots: list[Head]
    state: Place


class Saved(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All of it, with the SHA-256 of each audit key that was trusted."""

    keys: list[Hex64]
    logs: dict[LogName, SavedChain]
    origin: LogName
    root: SavedRoot | None
    v: Annotated[int, Meta(ge=FORMAT, le=FORMAT)] = FORMAT

    def encode(self) -> bytes:
        """Its bytes, as `decode` takes them."""
        return msgspec.json.encode(self, order="sorted") + b"\n"

    def commitments(self) -> Commitments:
        """The root log, to go on with; ValueError if there is none."""
        if self.root is None:
            raise ValueError("no root log was saved")
        made = Commitments(self.origin)
        roots = {size: bytes.fromhex(root) for size, root in self.root.roots}
        heads = {tenant: dict(of) for tenant, of in self.root.heads.items()}
        made.resume(chain_of(plain(self.root.state)), roots, self.root.epoch, self.root.newest, heads)
        return made


def plain(place: Place) -> dict[str, Any]:
    """A place as `chain_of` and `Verifier.resumed` take it."""
    found: dict[str, Any] = msgspec.to_builtins(place)
    return found


def digests(keys: Sequence[bytes]) -> list[str]:
    """How keys are named."""
    return sorted(hashlib.sha256(key).hexdigest() for key in keys)


def decode(data: bytes, origin: str, keys: Sequence[bytes]) -> Saved:
    """A saved state; BadState if it is none, of another log, or made with a key that is not trusted now."""
    try:
        found = msgspec.json.decode(data, type=Saved)
        for log, chain in found.logs.items():
            if chain.resume is not None:
                resumed = Verifier.resumed(log, keys, plain(chain.resume.state))
                if resumed.chain.n > chain.n or (resumed.chain.n == 0) != (chain.resume.seal == ""):
                    raise ValueError("resumes after its end")
        if found.root is not None:
            made = found.commitments()
            if made.roots.get(made.size) != made.root.chain.frontier.root() or found.root.checkpoint not in made.roots:
                raise ValueError("the root log's state and roots differ")
    except (msgspec.MsgspecError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadState(f"not a state of this program: {error}") from None
    if found.origin != origin:
        raise BadState(f"belongs to {found.origin!r}, not {origin!r}")
    if not set(found.keys) <= set(digests(keys)):
        raise BadState("was saved by a run that trusted an audit key which is not trusted now: begin anew without it")
    return found


def saved_root(made: Commitments, heads: dict[str, dict[str, tuple[int, str]]]) -> SavedRoot:
    """The root log after a clean run, with all heads at its newest entry."""
    checkpoint = max((o.checkpoint.size for o in made.opened), default=0)
    sizes = sorted({checkpoint, *sorted(made.roots)[-ROOTS:]})
    return SavedRoot(
        checkpoint,
        made.root.epoch,
        heads,
        {log: (c.size, c.root, c.seq) for log, c in sorted(made.root.newest.items())},
        [(size, made.roots[size].hex()) for size in sizes],
        msgspec.convert(snapshot_of(made.root.chain), Place),
    )
