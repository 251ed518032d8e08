"""Anti-rollback: what anchors hold must be a prefix of the root log in the database, or nothing is served.

A copy of the database from last week verifies; so does a history that was written anew with a stolen key. Both differ
from what anchors outside the database have seen: they name a size that is not there, or another root at a size that is.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import sqlalchemy as sa
from msgspec import structs
from sqlalchemy import Connection, Engine

from audit import frontiers
from audit.anchors import Anchor, AnchorUnusable, Held, Source, checkpoint_in
from audit.chain import Bad, Frontier, leaf_hash, parse_frame
from audit.checkpoint import BadNote, Checkpoint, key_of, parse_note, verified
from audit.event import Recovery
from audit.log import RolledBack
from audit.notary import HALT_S, Signed, newest
from audit.observed import Observation, Observations
from audit.rootlog import RootLog, split_origin
from audit.tables import root_table

_log: Final = logging.getLogger("skms.audit")
REMEMBERED: Final = 8_192  # sizes whose roots are kept: more than two hours of checkpoints


@dataclass(slots=True)
class Watched:
    """A source, and how it is used. `every_s` is how often an anchor is fed; `leader` if by the notary alone."""

    source: Source
    required: bool = True
    every_s: float = 0.0
    leader: bool = False
    held: Sequence[Held] = ()
    read_at: float | None = None
    kept_at: float | None = None
    failing_since: float | None = None
    failure: str = ""

    def failed(self, now: float, error: AnchorUnusable) -> None:
        """Note that it could not be read or written."""
        if self.failing_since is None:
            self.failing_since = now
            _log.error("anchor unusable", extra={"facts": {"anchor": self.source.name, "error": str(error)}})
        self.failure = str(error)


@dataclass(frozen=True, slots=True)
class Disagreement:
    """A signed checkpoint that the database's root log does not contain."""

    where: str
    note: bytes
    checkpoint: Checkpoint
    why: str


@dataclass(slots=True)
class Findings:
    """What the sources say of the database: which checkpoints it lacks, up to which size one agrees with it.

    `origin` is that of the stored root log, empty if it has no entry; `broken` says at which entry it cannot be read on.
    """

    origin: str
    size: int
    root: bytes
    broken: Bad | None = None
    observed: Observation | None = None  # by a witness; its note is the newest that anchors hold of this generation
    wrong: list[Disagreement] = field(default_factory=list)
    agreed: int = 0

    def worst(self) -> Disagreement | None:
        """The newest checkpoint that the database lacks."""
        by_age = [(split_origin(d.checkpoint.origin)[1], d.checkpoint.size, d) for d in self.wrong]
        return max(by_age, key=lambda item: item[:2])[2] if by_age else None


class Guard:
    """Compares the database with all sources. One for each process; call it from one thread at a time or several."""

    def __init__(
        self,
        engine: Engine,
        *,
        origin: str,
        known_keys: Callable[[], Sequence[bytes]],
        watched: Sequence[Watched],
        monotonic: Callable[[], float],
        observed: Observations | None = None,
        reread_s: float = 60.0,
        halt_s: float = HALT_S,
    ) -> None:
        self._engine = engine.execution_options(reading=True)
        self._origin, (self._base, _) = origin, split_origin(origin)
        self._known_keys, self._monotonic = known_keys, monotonic
        self._reread, self._halt = reread_s, halt_s
        self.watched, self._observed = tuple(watched), observed
        self._lock = threading.Lock()
        self._tree, self._last = Frontier(), b""
        self._roots: OrderedDict[int, bytes] = OrderedDict()
        self._stored = ""  # the origin of the stored root log
        self._recovered: Recovery | None = None
        self._opened: dict[bytes, Checkpoint] = {}  # notes whose signature was found right
        self.rolled_back: RolledBack | None = None

    # ---- what the service asks -------------------------------------------------------------------------------------

    def start(self) -> None:
        """Check before anything is served or written. RolledBack; AnchorUnusable if a required source cannot be read."""
        self._judge(self.survey())

    def survey(self) -> Findings:
        """Read every source, and compare. AnchorUnusable if a required one cannot be read."""
        for w in self.watched:
            self._read(w, self._monotonic())
            if w.failing_since is not None and w.required:
                raise AnchorUnusable(
                    f"{w.failure}. Without it nobody can tell whether the database was rolled back: make it readable, or "
                    "say `required = false` in its [[audit.anchor]]"
                )
        return self.findings()

    def check(self) -> None:
        """Check again while serving: sources that fail are noted (`late`). RolledBack, and so at every later call."""
        if self.rolled_back is not None:
            raise self.rolled_back
        now = self._monotonic()
        for w in self.watched:
            if w.read_at is None or now - w.read_at >= min(w.every_s, self._reread):
                self._read(w, now)
        self._judge(self.findings())

    def late(self) -> str | None:
        """Why nothing more may be served: a required source has been out of reach for too long."""
        now = self._monotonic()
        for w in self.watched:
            if w.required and w.failing_since is not None and now - w.failing_since > self._halt:
                return f"anchor out of reach for {now - w.failing_since:.0f} s: {w.failure}"
        return None

    def keep(self, *, leads: bool) -> None:
        """Give the newest stored checkpoint to every anchor whose turn it is; RolledBack if it is none of this tree."""
        now = self._monotonic()
        due = [w for w in self.watched if hasattr(w.source, "keep") and self._due(w, now, leads=leads)]
        if not due:
            return
        with self._engine.connect() as connection:
            signed = newest(connection)
            if signed is None:
                return
            due = [w for w in due if not self._fresh(connection, w, signed)]
        self._ours(signed)
        for w in due:
            self._keep(w, signed.note, now)

    def _fresh(self, connection: Connection, w: Watched, signed: Signed) -> bool:
        """Whether somebody else has fed it a while ago: a token's memory wears with every write."""
        if not w.every_s or not w.held:
            return False
        ours = [c.size for h in w.held if (c := self._verified(h)).origin == self._origin]
        before = newest(connection, max(ours)) if ours else None
        return before is not None and signed.at - before.at < w.every_s * 1e6

    def _due(self, w: Watched, now: float, *, leads: bool) -> bool:
        return (leads or not w.leader) and (w.kept_at is None or now - w.kept_at >= w.every_s)

    def _keep(self, w: Watched, note: bytes, now: float) -> None:
        anchor: Anchor = w.source  # type: ignore[assignment]  # only a source with `keep` is ever due
        try:
            anchor.keep(note)
        except AnchorUnusable as error:
            w.failed(now, error)
            return
        w.kept_at, w.failing_since = now, None

    def _ours(self, signed: Signed) -> None:
        """A checkpoint in the database is evidence only if it is signed and of the tree that was read."""
        found = self._verified(Held("the database", signed.note))
        with self._lock:
            self._advance()
            root = self._root_at(found.size)
        if found.origin != self._origin or root != found.root:
            self._stop("the database", found, "the newest checkpoint stored is of another tree than the root log")

    # ---- reading ---------------------------------------------------------------------------------------------------

    def _read(self, w: Watched, now: float) -> None:
        try:
            held = w.source.newest()
            for h in held:
                self._verified(h)
        except AnchorUnusable as error:
            w.failed(now, error)
            return
        w.held, w.read_at = held, now
        w.failing_since = None

    def _verified(self, held: Held) -> Checkpoint:
        """The checkpoint, if an audit key of this installation signed it; AnchorUnusable otherwise."""
        if held.note in self._opened:
            return self._opened[held.note]
        try:
            found = checkpoint_in(held.note)
            base, _ = split_origin(found.origin)
            verified(parse_note(held.note), [key_of(found.origin, spki) for spki in self._known_keys()])
        except BadNote as bad:
            raise AnchorUnusable(f"{held.where} holds no checkpoint of ours: {bad}") from None
        if base != self._base:
            raise AnchorUnusable(f"{held.where} belongs to the log {found.origin}, not to {self._origin}")
        if len(self._opened) >= REMEMBERED:
            self._opened.clear()
        self._opened[held.note] = found
        return found

    def _advance(self) -> None:
        """Read the entries that were added to the root log; what this process has seen of it must still be there."""
        with self._engine.connect() as connection:
            newest_seq = connection.execute(sa.select(sa.func.max(root_table.c.seq))).scalar()
            stored = 0 if newest_seq is None else int(newest_seq) + 1
            n = self._tree.n
            if stored < n or (n and _leaf(connection, n - 1) != self._last):
                seen = Checkpoint(self._origin, n, self._tree.root())
                self._stop("this process", seen, f"the root log has {stored} entries, and had others")
            if not n and stored:
                self._first(connection)
                self._resume(connection)
                n = self._tree.n
            for leaf in _leaves(connection, n, self._origin):
                self._tree.push(leaf)
                self._last = leaf
                if self._tree.n > stored - REMEMBERED:
                    self._roots[self._tree.n] = self._tree.root()
            while len(self._roots) > REMEMBERED:
                self._roots.popitem(last=False)

    def _resume(self, connection: Connection) -> None:
        """Begin at a stored frontier before everything that the sources hold, if it leads to the newest signed root."""
        try:
            signed = newest(connection)
            if signed is None or self._verified(Held("the database", signed.note)).origin != self._stored:
                return
            held = [c for w in self.watched for h in w.held if (c := self._verified(h)).origin == self._stored]
            begin = frontiers.stored_before(connection, min(c.size for c in [signed.checkpoint, *held]))
            if begin is None:
                return
            wanted, roots = {c.size for c in held}, dict[int, bytes]()
            tree, leaf = Frontier(begin.n, list(begin.roots)), b""
            for leaf in _leaves(connection, begin.n, self._stored, until=signed.checkpoint.size):
                tree.push(leaf)
                if tree.n in wanted or tree.n > signed.checkpoint.size - REMEMBERED:
                    roots[tree.n] = tree.root()
        except (Bad, AnchorUnusable) as bad:  # said where it counts, after the full read
            _log.error("no stored frontier can be used", extra={"facts": {"error": str(bad)}})
            return
        if (tree.n, tree.root()) != (signed.checkpoint.size, signed.checkpoint.root):
            _log.error("a stored frontier does not fit: the whole root log is read", extra={"facts": {"size": begin.n}})
            return
        self._tree, self._last = tree, leaf
        self._roots.update(roots)

    def _first(self, connection: Connection) -> None:
        """The first entry says of which generation the root log is; Bad if it is none."""
        entry = connection.execute(sa.select(root_table.c.entry).where(root_table.c.seq == 0)).scalar()
        where = f"{self._origin}/0"
        if entry is None:
            raise Bad("E_SEQ", where, "the first entry of the root log is missing")
        root = RootLog(parse_frame(entry, where).log)
        root.check(entry)
        self._stored, self._recovered = root.origin, root.recovers

    def _root_at(self, size: int) -> bytes | None:
        """The root of the stored root log at a size; None if it is not that long."""
        if size > self._tree.n:
            return None
        if size not in self._roots:
            tree = Frontier()
            with self._engine.connect() as connection:
                for leaf in _leaves(connection, 0, self._origin, until=size):
                    tree.push(leaf)
            self._roots[size] = tree.root()
        return self._roots[size]

    # ---- judging ---------------------------------------------------------------------------------------------------

    def findings(self) -> Findings:
        """Compare the database with what the sources held when they were last read."""
        with self._lock:
            broken: Bad | None = None
            try:
                self._advance()  # after the sources were read: they hold only what had been committed before
            except Bad as bad:
                broken = bad
            found = Findings(self._stored, self._tree.n, self._tree.root(), broken)
            for w in self.watched:
                for held in w.held:
                    self._compare(held, found)
            found.observed = self._seen(found.origin or self._origin)
        return found

    def _seen(self, origin: str) -> Observation | None:
        """What a witness saw of a generation, beside the newest checkpoint of it that was signed."""
        seen = None if self._observed is None else self._observed.of(origin)
        if seen is None:
            return None
        held = [Held("what a witness saw", seen.note.encode()), *(h for w in self.watched for h in w.held)]
        ours = [(found.size, h.note) for h in held if (found := self._verified(h)).origin == origin]
        return structs.replace(seen, note=max(ours)[1].decode())

    def _compare(self, held: Held, found: Findings) -> None:
        theirs = self._verified(held)
        theirs_is = split_origin(theirs.origin)[1]
        ours_is = split_origin(found.origin)[1] if found.origin else 0
        if theirs_is < ours_is:
            self._earlier(held, theirs)
            return
        if found.origin and theirs_is > ours_is:
            why = f"it holds generation {theirs_is}, the database {ours_is}"
        elif theirs.size > found.size:
            why = f"it holds a checkpoint of {theirs.size} entries, the database has {found.size}"
        elif self._root_at(theirs.size) != theirs.root:
            why = f"it holds another root at {theirs.size} entries than the database"
        else:
            found.agreed = max(found.agreed, theirs.size)
            return
        found.wrong.append(Disagreement(held.where, held.note, theirs, why))

    def _earlier(self, held: Held, theirs: Checkpoint) -> None:
        """A checkpoint from before the recovery: what was lost is known, unless it reaches further than what is known."""
        named = None if self._recovered is None else checkpoint_in(self._recovered.anchored.encode())
        if named is not None and theirs.origin == named.origin and theirs.size > named.size:
            facts = {"anchor": held.where, "size": theirs.size, "named": named.size}
            _log.critical("more was lost than the recovery names", extra={"facts": facts})

    def _judge(self, found: Findings) -> None:
        if (worst := found.worst()) is not None:
            self._stop(worst.where, worst.checkpoint, worst.why)
        if found.broken is not None:
            raise found.broken
        if found.observed is not None:
            self._refuse(str(found.observed))
        if found.origin and found.origin != self._origin:
            self._refuse(
                f"the root log in the database is {found.origin}, the configuration says {self._origin}: after a "
                "recovery, set [node] origin in the configuration of every node"
            )
        if not found.origin and split_origin(self._origin)[1] > 1:
            self._refuse(f"{self._origin} was not opened: `skms audit recover` opens a generation")

    def _stop(self, where: str, seen: Checkpoint, why: str) -> None:
        self._refuse(f"{where} and the database disagree about {seen.origin}: {why}")

    def _refuse(self, why: str) -> None:
        self.rolled_back = RolledBack(
            f"ROLLED_BACK: {why}. No key operation is served. See docs/audit-recovery.md before you change anything"
        )
        _log.critical("rolled back", extra={"facts": {"reason": why}})
        raise self.rolled_back


def _leaf(connection: Connection, seq: int) -> bytes | None:
    entry = connection.execute(sa.select(root_table.c.entry).where(root_table.c.seq == seq)).scalar()
    return None if entry is None else leaf_hash(entry)


def _leaves(connection: Connection, start: int, origin: str, *, until: int | None = None) -> Iterator[bytes]:
    """The leaf hashes of the stored entries from a number on, recomputed; Bad if an entry is missing."""
    chosen = sa.select(root_table.c.seq, root_table.c.entry).where(root_table.c.seq >= start)
    if until is not None:
        chosen = chosen.where(root_table.c.seq < until)
    chosen = chosen.order_by(root_table.c.seq).execution_options(yield_per=1_000)
    expected = start
    with connection.execute(chosen) as result:
        for seq, entry in result:
            if seq != expected:
                raise Bad("E_SEQ", f"{origin}/{expected}", f"the next stored entry is {seq}")
            expected += 1
            yield leaf_hash(entry)
