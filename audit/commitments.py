"""What the root log and its signed checkpoints commit, held against the chains themselves. Pure.

Read the root log first, then each chain with `watch` after every commit group, then `settle`: sizes, roots, the map of the
tenants' heads, and what the chains' marks say of the root log must all agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from audit.chain import Bad, Chain, Verifier
from audit.checkpoint import (
    BadNote,
    Checkpoint,
    Note,
    NoteKey,
    parse_checkpoint,
    parse_note,
    verified,
)
from audit.event import Heads
from audit.proof import TenantMap
from audit.rootlog import Commit, RootLog
from audit.tlogpolicy import WitnessPolicy

SKEW_US: Final = 5_000_000
Tell = Callable[[str, str, str], None]  # code, where, why


@dataclass(frozen=True, slots=True)
class Opened:
    """A checkpoint that the log's key signed, and the witnesses that cosigned it, each with its time (s)."""

    checkpoint: Checkpoint
    witnesses: dict[NoteKey, int]
    cosigners: frozenset[NoteKey] = frozenset()
    unknown: int = 0  # signature lines of nobody known

    @property
    def signers(self) -> frozenset[NoteKey]:
        """Whoever cosigned: witnesses and cosigners."""
        return self.cosigners | self.witnesses.keys()


def open_note(data: bytes, origin: str, keys: Sequence[NoteKey], policy: WitnessPolicy) -> Opened:
    """Open a signed checkpoint with its cosignatures; BadNote if the log did not sign it or any known key falsely."""
    note = parse_note(data)
    signed = verified(note, [*keys, *policy.known])
    if not set(signed) & set(keys):
        raise BadNote("no signature of the log's key")
    found = parse_checkpoint(note.text)
    if found.origin != origin:
        raise BadNote(f"a checkpoint of {found.origin}, not of {origin}")
    witnesses = {key: _time_of(note, key) for key in signed if key in policy.witnesses.values()}
    known = {(key.name, key.id) for key in [*keys, *policy.known]}
    return Opened(
        found,
        witnesses,
        frozenset(signed) & frozenset(policy.cosigners),
        sum((s.name, s.id) not in known for s in note.signatures),
    )


def _time_of(note: Note, key: NoteKey) -> int:
    return max(int.from_bytes(s.value[:8], "big") for s in note.signatures if (s.name, s.id) == (key.name, key.id))


@dataclass(slots=True)
class _Watched:
    """One chain while it is read: the tenants that moved up to each size that was committed."""

    sizes: dict[int, str]  # committed size -> root
    seqs: dict[int, int]  # committed size -> number of the root log's entry
    start: int = 0
    good: bool = True
    reached: int = 0
    last: int = 0  # the last committed size that was confirmed
    moved: dict[int, dict[str, tuple[int, str]]] = field(default_factory=dict)
    times: dict[int, int] = field(default_factory=dict)


class Commitments:
    """The root log of one origin, and what it says of every chain."""

    def __init__(self, origin: str) -> None:
        self.root, self.heads = RootLog(origin), list[tuple[int, int, Heads]]()  # (seq, t, entry)
        self.roots: dict[int, bytes] = {0: self.root.chain.frontier.root()}  # of each size
        self._at = {0: 0}  # when the newest entry was written, of each size (us)
        self.opened: list[Opened] = []  # the checkpoints that `checkpoints` found good
        self.complete = True  # whether every entry was readable
        self._chains: dict[str, _Watched] = {}
        self._marks: list[tuple[str, int, int, str]] = []
        self._before: dict[str, dict[str, tuple[int, str]]] = {}  # the tenants' heads where this goes on

    def resume(
        self,
        chain: Chain,
        roots: dict[int, bytes],
        epoch: int,
        newest: Mapping[str, tuple[int, str, int]],
        heads: dict[str, dict[str, tuple[int, str]]],
    ) -> None:
        """Go on after entries that were checked before, of which these roots are known, and the tenants' heads at the last."""
        self.root.chain, self.root.epoch = chain, epoch
        self.root.newest = {log: Commit(*commit) for log, commit in newest.items()}
        self.roots, self._at, self._before = roots, {chain.n: chain.t}, heads

    @property
    def origin(self) -> str:
        """Whose root log this is."""
        return self.root.origin

    @property
    def size(self) -> int:
        """Entries that were checked."""
        return self.root.chain.n

    def written(self, size: int) -> int | None:
        """When the newest entry of a tree of this size was written (us); None if there is none."""
        return self._at.get(size) if size else None

    # ---- the root log

    def entry(self, entry: bytes) -> None:
        """Check the next entry and take it in; Bad names it."""
        seq = self.root.chain.n
        heads = self.root.check(entry)
        self.roots[self.size] = self.root.chain.frontier.root()
        self._at[self.size] = self.root.chain.t
        if heads is not None:
            self.heads.append((seq, self.root.chain.t, heads))
            for log, size, root in heads.shards:
                watched = self._chains.setdefault(log, _Watched({}, {}))
                watched.sizes.setdefault(size, root)
                watched.seqs.setdefault(size, seq)

    def hold(self, found: Checkpoint, code: str) -> None:
        """Bad (`code`) if a checkpoint is of another tree, E_TRUNC if of a longer one."""
        if found.size in self.roots:
            if self.roots[found.size] != found.root:
                raise Bad(code, f"{self.origin}/{found.size}", "a checkpoint of another root was signed")
        elif self.complete:
            raise Bad("E_TRUNC", f"{self.origin}/{self.size}", f"a checkpoint of {found.size} entries was signed")

    def checkpoints(
        self, notes: Iterable[tuple[str, bytes]], keys: Sequence[NoteKey], policy: WitnessPolicy, tell: Tell
    ) -> Opened | None:
        """Check signed notes in ascending order of size, each with its place; the newest, or None if there is none."""
        newest: Opened | None = None
        for where, note in notes:
            try:
                found = open_note(note, self.origin, keys, policy)
            except BadNote as bad:
                raise Bad("E_SIG", where, str(bad)) from None
            size, last = found.checkpoint.size, -1 if newest is None else newest.checkpoint.size
            if size <= last:
                raise Bad("E_SEQ", where, f"a checkpoint of {size} after one of {last}")
            self.hold(found.checkpoint, "E_ROOT")
            self._hold_times(found, tell)
            self.opened.append(found)
            newest = found
        return newest

    def extends(self, held: Checkpoint, newest: Opened | None) -> None:
        """Bad E_FORK or E_TRUNC unless all this extends a checkpoint that somebody else kept."""
        self.hold(held, "E_FORK")
        size = 0 if newest is None else newest.checkpoint.size
        if self.complete and size < held.size:
            raise Bad("E_TRUNC", f"{self.origin}/{size}", f"the checkpoint of {held.size} entries is gone")

    def quorum(self, newest: Opened | None, policy: WitnessPolicy) -> None:
        """Bad E_WITNESS if the newest checkpoint lacks the witnesses or cosigners that the policy asks for."""
        if missing := policy.missing(() if newest is None else newest.signers):
            size = 0 if newest is None else newest.checkpoint.size
            raise Bad("E_WITNESS", f"{self.origin}/{size}", f"the newest checkpoint lacks {missing}")

    def _hold_times(self, found: Opened, tell: Tell) -> None:
        """A witness cannot have seen what was not written yet, but by the difference of two clocks."""
        size = found.checkpoint.size
        at = self._at.get(size, 0)
        for key, seconds in found.witnesses.items():
            if at > (seconds + 1) * 1_000_000 + SKEW_US:
                tell("W_SKEW", f"{self.origin}/{size - 1}", f"written after {key.name} signed it, by the log's clock")

    # ---- the chains

    def sizes(self, log: str) -> list[int]:
        """The sizes of a chain that were committed."""
        watched = self._chains.get(log)
        return [] if watched is None else list(watched.sizes)

    def watch(self, log: str, verifier: Verifier) -> Callable[[Chain], None]:
        """What to call after each commit group of a chain. Bad E_ROOT at the first root that is not the committed one."""
        watched = self._chains.setdefault(log, _Watched({}, {}))
        chain = verifier.chain
        watched.start = watched.reached = watched.last = chain.n
        watched.good = False  # until `seen`: whoever does not finish is not held against
        chain.touched = set(chain.tenants)
        pending = sorted(size for size in watched.sizes if size >= chain.n)
        pending.reverse()

        def after(chain: Chain) -> None:
            while pending and pending[-1] <= chain.n:
                size = pending.pop()
                bracket = f"records [{watched.last},{size}) are not those of entry {watched.seqs[size]} of the root log"
                if size != chain.n or chain.frontier.root().hex() != watched.sizes[size]:
                    raise Bad("E_ROOT", f"{log}/{size}", bracket)
                watched.last = size
                watched.moved[size] = {tenant: chain.head(tenant) for tenant in chain.touched or ()}
                watched.times[size] = chain.t
                chain.touched = set()

        after(chain)
        return after

    def seen(self, log: str, verifier: Verifier) -> None:
        """A chain was read to its end and found good by itself."""
        watched = self._chains[log]
        watched.good, watched.reached = True, verifier.chain.n
        self._marks += [(log, at, size, root) for at, size, root in verifier.marks]

    def settle(self, logs: Iterable[str], tell: Tell, *, tenants: bool) -> dict[str, dict[str, tuple[int, str]]] | None:
        """Compare all; the tenants' heads at the last entry if they are the committed ones, None if that is unknown."""
        there = set(logs)
        for log, watched in sorted(self._chains.items()):
            if not watched.sizes:
                continue
            if log not in there:
                tell("E_MISSING", log, f"the root log committed {max(watched.sizes)} records of it")
            elif watched.good and watched.reached < max(watched.sizes):
                why = f"the root log committed {max(watched.sizes)} records"
                tell("E_TRUNC", f"{log}/{watched.reached}", why)
        self._settle_marks(tell)
        self._settle_times(tell)
        return self._settle_tenants(tell) if tenants and not self.root.unknown else None

    def _settle_marks(self, tell: Tell) -> None:
        if self._marks and not self.size:
            log, at, size, _ = self._marks[0]
            tell("E_MISSING", self.origin, f"record {log}/{at} saw a checkpoint of {size} entries; no root log is here")
            return
        for log, at, size, root in self._marks:
            if size not in self.roots:
                if size <= self.size:
                    tell(
                        "U_PRUNED",
                        f"{log}/{at}",
                        f"saw {size} entries of the root log: older than what the state holds",
                    )
                    return
                if self.complete:
                    tell(
                        "E_TRUNC", f"{self.origin}/{self.size}", f"record {log}/{at} saw a checkpoint of {size} entries"
                    )
                    return
            elif self.roots[size].hex() != root:
                tell("E_FORK", f"{log}/{at}", f"the record saw another root of the root log at {size} entries")
                return

    def _settle_times(self, tell: Tell) -> None:
        """No record is younger than the entry that commits it, but by the difference of two clocks."""
        for _, t, heads in self.heads:
            for log, size, _ in heads.shards:
                ahead = self._chains[log].times.get(size, 0) - t
                if ahead > SKEW_US:
                    tell("W_SKEW", f"{log}/{size - 1}", f"{ahead // 1_000_000} s ahead of the entry that commits it")
                    return

    def _settle_tenants(self, tell: Tell) -> dict[str, dict[str, tuple[int, str]]] | None:
        """Rebuild the tenants' map entry by entry. Where a chain was not read from its beginning, once all are known."""
        found = {tenant: dict(of) for tenant, of in self._before.items()}
        tree, unread = TenantMap(), set[str]()
        for tenant, of in found.items():
            tree.put(tenant, of)
        for seq, _, heads in self.heads:
            for log, size, _ in heads.shards:
                watched = self._chains[log]
                if size not in watched.moved:
                    if size > watched.start or not watched.good:
                        return None  # said already: cut, missing, or bad before this size
                    unread.add(log)
                    continue
                unread.discard(log)
                for tenant, head in watched.moved[size].items():
                    of = found.setdefault(tenant, {})
                    of[log] = head
                    tree.put(tenant, of)
            if not unread and tree.root().hex() != heads.tenants:
                tell("E_TMAP", f"{self.origin}/{seq}", "the map of the tenants' heads has another root")
                return None
        return None if unread else found
