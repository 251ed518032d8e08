"""The root log: one chain over all chains. Each entry says how far they reached, and where each tenant's records end.

Its frame is that of every entry, its name is the origin itself; only its checkpoints are signed. Pure: the notary
appends by the same rules by which a verifier checks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from audit import event
from audit.chain import Bad, Chain, Frontier, parse_frame
from audit.event import VERSION, BadRecord, Heads, Recover, Recovery, UnknownVersion

MAX_SHARDS: Final = 256  # of one entry
_NO_TENANT: Final = "0" * 64  # the root of an empty map
_GENERATION: Final = re.compile(r"(.*/audit)(?:/g([1-9][0-9]{0,8}))?")
_CHAIN: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,127}")


def split_origin(origin: str) -> tuple[str, int]:
    """(name without generation, generation) of a log: `kms.example/audit/g2` is the second; ValueError otherwise."""
    match = _GENERATION.fullmatch(origin)
    if match is None or match[2] == "1":
        raise ValueError(f"{origin!r} is no origin of this service")
    return match[1], int(match[2] or 1)


def next_origin(origin: str) -> str:
    """The origin of the generation after this one."""
    base, generation = split_origin(origin)
    return f"{base}/g{generation + 1}"


def other_generation(log: str, origin: str) -> bool:
    """Whether a chain belongs to another generation of the log with this origin."""
    theirs = log.rpartition("/")[0]
    try:
        return theirs != origin and split_origin(theirs)[0] == split_origin(origin)[0]
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class Commit:
    """A chain's size and root (hex), and the number of the root log's entry that says so."""

    size: int
    root: str
    seq: int


class RootLog:
    """The state of the root log after the entries that were checked or appended so far."""

    def __init__(self, origin: str) -> None:
        self.origin, self.epoch = origin, 0
        self.chain = Chain(origin)
        self.newest: dict[str, Commit] = {}
        self.unknown = 0  # entries of a later version
        self.recovers: Recovery | None = None  # how this generation began, if it is not the first

    @classmethod
    def resumed(cls, origin: str, frontier: Frontier, entries: Iterable[bytes]) -> RootLog:
        """The state before these entries, which together list every chain; Bad if they do not even look so.

        Right only if the entries, checked next, lead to a root that was signed: then the links they name are right too.
        """
        made, where = cls(origin), f"{origin}/{frontier.n}"
        for i, entry in enumerate(entries):
            frame = parse_frame(entry, where)
            try:
                heads = event.decode_heads(frame.body)
            except (BadRecord, UnknownVersion) as bad:
                raise Bad("E_SCHEMA", where, str(bad)) from None
            if not i:
                made.chain.n, made.chain.previous, made.chain.t = frontier.n, frame.previous, frame.t
                made.chain.frontier, made.epoch = Frontier(frontier.n, list(frontier.roots)), heads.epoch
            if not heads.full or frame.t != made.chain.t:
                break
            made.newest |= {log: Commit(size, root, frame.n) for log, size, root in heads.shards}
        if not made.newest:
            raise Bad("E_SCHEMA", where, "no entry that lists every chain")
        return made

    def check(self, entry: bytes) -> Heads | None:
        """Verify the next entry and take it in; None if it is of a later version. Bad names it."""
        seq = self.chain.n
        where = f"{self.origin}/{seq}"
        frame = parse_frame(entry, where)
        self.chain.check(entry, full=False)
        if frame.tn is not None:
            raise Bad("E_SCHEMA", where, "an entry of the root log belongs to no tenant")
        try:
            heads = event.decode_heads(frame.body)
        except BadRecord as bad:
            raise Bad(bad.code, where, str(bad)) from None
        except UnknownVersion:
            self.unknown += 1
            return None
        self._recovery(heads, seq, where)
        if heads.epoch < self.epoch:
            raise Bad("E_EPOCH", where, f"epoch {heads.epoch} after epoch {self.epoch}")
        self._shards(heads, seq, where)
        self.epoch = heads.epoch
        return heads

    def _recovery(self, heads: Heads, seq: int, where: str) -> None:
        """A later generation begins by saying why, and by whom it was approved; no other entry does."""
        later = _GENERATION.fullmatch(self.origin)
        if isinstance(heads, Recover) != bool(seq == 0 and later is not None and later[2]):
            raise Bad(
                "E_SCHEMA", where, "a generation after the first begins with a recover entry, nothing else is one"
            )
        if not isinstance(heads, Recover):
            return
        told = heads.recovers
        try:
            follows = told.origin == self.origin == next_origin(told.predecessor)
        except ValueError:  # no origin of an audit log at all
            follows = False
        if not follows:
            raise Bad("E_ORIGIN", where, f"the recover entry opens {told.origin} after {told.predecessor}")
        if heads.shards or heads.tenants != _NO_TENANT or len({name for name, _ in heads.appr}) != len(heads.appr):
            raise Bad("E_SCHEMA", where, "a recover entry commits nothing, and no officer approves it twice")
        self.recovers = told

    def _shards(self, heads: Heads, seq: int, where: str) -> None:
        names = [log for log, _, _ in heads.shards]
        if names != sorted(set(names)):
            raise Bad("E_SCHEMA", where, "the chains are not listed once each and in order")
        for log, size, root in heads.shards:
            if not log.startswith(f"{self.origin}/") or not _CHAIN.fullmatch(log[len(self.origin) + 1 :]):
                raise Bad("E_ORIGIN", where, f"{log} is no chain of this log")
            before = self.newest.get(log)
            if before is not None and size < before.size:
                raise Bad("E_ROOTSEQ", where, f"{log} shrinks from {before.size} to {size} records")
            if before is not None and size == before.size and root != before.root:
                raise Bad("E_FORK", where, f"{log} has another root than before at {size} records")
        omitted = sorted(set(self.newest) - set(names))
        if heads.full and omitted and len(self.newest) <= MAX_SHARDS:
            raise Bad("E_ROOTSEQ", where, f"an entry that lists every chain omits {omitted[0]}")
        self.newest |= {log: Commit(size, root, seq) for log, size, root in heads.shards}

    def append(
        self, shards: Sequence[tuple[str, int, str]], *, tenants: bytes, epoch: int, full: bool, t: int
    ) -> bytes:
        """Make the next entry, and take it in by the same checks as a verifier's; Bad if they refuse it."""
        heads = Heads(epoch=epoch, full=full, shards=tuple(sorted(shards)), tenants=tenants.hex(), v=VERSION)
        staged = self.chain.stage()
        entry = staged.append(event.encode_heads(heads), t, None)
        self.check(entry)
        return entry

    def open(self, recovery: Recovery, approvals: Sequence[tuple[str, str]], *, epoch: int, t: int) -> bytes:
        """Make the first entry of a later generation, and take it in; Bad if a verifier would refuse it."""
        recover = Recover(
            appr=tuple(approvals), recovers=recovery, epoch=epoch, full=False, shards=(), tenants=_NO_TENANT, v=VERSION
        )
        entry = self.chain.stage().append(event.encode_heads(recover), t, None)
        self.check(entry)
        return entry

    def copy(self) -> RootLog:
        """An independent copy, to append to before COMMIT."""
        made = RootLog(self.origin)
        made.chain.adopt(self.chain.stage())
        made.epoch, made.newest, made.unknown = self.epoch, dict(self.newest), self.unknown
        made.recovers = self.recovers
        return made


def parts(shards: Iterable[tuple[str, int, str]]) -> list[list[tuple[str, int, str]]]:
    """Chains in order, in groups that one entry may list; one empty group if there is none."""
    ordered = sorted(shards)
    return [ordered[i : i + MAX_SHARDS] for i in range(0, len(ordered), MAX_SHARDS)] or [[]]
