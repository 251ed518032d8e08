"""The notary: re-reads what the writers stored, commits it in the root log, and has the HSM sign its checkpoint.

One process at a time holds the lease; the lease's epoch is fenced in the transaction of each entry, and the entry's
number is a primary key. An entry is durable before its checkpoint is signed: a crash between the two signs the same
bytes again. Whatever does not verify is never signed, and this notary signs nothing any more: only a person can tell
whether the disk or an attacker changed it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import sqlalchemy as sa
from sqlalchemy import Connection, Engine

from audit import frontiers
from audit.chain import Bad, Verifier
from audit.checkpoint import (
    BadNote,
    Checkpoint,
    Note,
    NoteKey,
    Signature,
    key_of,
    open_checkpoint,
    parse_checkpoint,
    parse_note,
)
from audit.log import Signer
from audit.proof import TenantMap
from audit.rootlog import RootLog, parts
from audit.stored import beginning, restore, stored_batches
from audit.tables import batch_table, checkpoint_table, root_table, shard_table, snapshot_table, tenant_table

HEARTBEAT_US: Final = 60_000_000
FULL_US: Final = 3_600_000_000
ALARM_S: Final = 10.0
HALT_S: Final = 600.0  # a stopped notary would widen the window without a checkpoint for ever

_log: Final = logging.getLogger("skms.audit")
Fence = Callable[[Connection], None]


@dataclass(frozen=True, slots=True)
class Signed:
    """A stored checkpoint: what it says, when the notary began to read what it covers (us), and the signed note."""

    checkpoint: Checkpoint
    at: int
    note: bytes


class CannotCosign(Exception):
    """A second signature could not be made; the message says why and holds no key."""


class PostQuantum(Protocol):
    """A second key, beside the HSM's: `cosign` gives a cosignature's bytes for a time (s), or raises CannotCosign."""

    @property
    def key(self) -> NoteKey: ...

    def cosign(self, checkpoint: Checkpoint, seconds: int) -> bytes: ...


class Notary:
    """Call `round` each second while this process holds the lease, with the lease's epoch and its fence."""

    def __init__(
        self,
        engine: Engine,
        *,
        origin: str,
        signer: Signer,
        clock: Callable[[], int],
        post_quantum: PostQuantum | None = None,
    ) -> None:
        self._post_quantum = post_quantum
        self._engine, self._origin, self._signer, self._clock = engine, origin, signer, clock
        self._reading = engine.execution_options(reading=True)
        self._root: RootLog | None = None
        self._chains: dict[str, Verifier] = {}
        self._tenants: dict[str, dict[str, tuple[int, str]]] = {}
        self._map = TenantMap()
        self._signed: Checkpoint | None = None
        self._full_at = self._last_at = 0
        self.refused: Bad | None = None  # why nothing is signed any more

    def round(self, epoch: int, fence: Fence) -> Signed | None:
        """Verify what is new, commit it and sign; the checkpoint, or None if nothing was due.

        Bad if anything stored does not verify: then, and at every later call, nothing is signed.
        """
        if self.refused is not None:
            raise self.refused
        try:
            return self._round(epoch, fence)
        except Bad as bad:
            self.refused = bad
            _log.critical("the notary refuses to sign", extra={"facts": {"code": bad.code, "where": bad.where}})
            raise

    def _round(self, epoch: int, fence: Fence) -> Signed | None:
        began = self._clock()
        keys = [key_of(self._origin, spki) for spki in self._signer.known_keys()]
        with self._reading.connect() as connection:
            root = self._current(connection, keys)
            for row in connection.execute(sa.select(shard_table).order_by(shard_table.c.shard)).mappings():
                self._advance(connection, row)
        grown = [log for log, v in self._chains.items() if v.chain.n != self._committed(log)]
        full = began - self._full_at >= FULL_US
        if grown or full or began - self._last_at >= HEARTBEAT_US:
            listed = list(self._chains) if full else grown
            root = self._append(listed, epoch=epoch, full=full, began=began, fence=fence)
        elif self._signed is not None and self._signed.size == root.chain.n:
            return None
        return self._sign(root, keys, fence)

    def _committed(self, log: str) -> int:
        assert self._root is not None
        commit = self._root.newest.get(log)
        return 0 if commit is None else commit.size

    # ---- reading -----------------------------------------------------------------------------------------------------

    def _current(self, connection: Connection, keys: Sequence[NoteKey]) -> RootLog:
        """The root log as it is stored; read and checked again whenever another notary appended to it."""
        last = connection.execute(sa.select(sa.func.max(root_table.c.seq))).scalar()
        stored = 0 if last is None else int(last) + 1
        if self._root is not None and stored == self._root.chain.n:
            return self._root
        if self._root is not None and stored < self._root.chain.n:
            raise Bad("E_TRUNC", f"{self._origin}/{stored}", f"the root log had {self._root.chain.n} entries")
        self._root = self._load(connection, keys)
        return self._root

    def _load(self, connection: Connection, keys: Sequence[NoteKey]) -> RootLog:
        """Check the root log, its newest checkpoint, and every chain up to what it committed."""
        last = newest(connection)
        root, tenants = self._resume(connection, last, keys) or self._read(
            connection, RootLog(self._origin), last, keys
        )
        self._restart(connection, root, tenants)
        return root

    def _resume(
        self, connection: Connection, last: Signed | None, keys: Sequence[NoteKey]
    ) -> tuple[RootLog, str] | None:
        """The root log from the newest entry on that lists every chain; None if that does not lead to what was signed."""
        frontier = None if last is None else frontiers.stored_before(connection, last.checkpoint.size)
        if frontier is None:
            return None
        chosen = sa.select(root_table.c.entry).where(root_table.c.seq >= frontier.n).order_by(root_table.c.seq)
        try:
            with connection.execute(chosen.execution_options(yield_per=16)) as found:
                root = RootLog.resumed(self._origin, frontier, found.scalars())
            return self._read(connection, root, last, keys)
        except Bad as bad:
            facts = {"code": bad.code, "where": bad.where}
            _log.error("a stored frontier does not fit: the whole root log is read", extra={"facts": facts})
            return None

    def _read(
        self, connection: Connection, root: RootLog, last: Signed | None, keys: Sequence[NoteKey]
    ) -> tuple[RootLog, str]:
        """Check the entries that follow, and the newest checkpoint; the root log and its tenants' map root."""
        tenants = ""
        chosen = sa.select(root_table).where(root_table.c.seq >= root.chain.n).order_by(root_table.c.seq)
        with connection.execute(chosen.execution_options(yield_per=1_000)) as found:
            for row in found.mappings():
                where = f"{self._origin}/{root.chain.n}"
                if row["seq"] != root.chain.n:
                    raise Bad("E_SEQ", where, f"the next stored entry is {row['seq']}")
                heads = root.check(row["entry"])
                if heads is None:
                    raise Bad("U_VERSION", where, "an entry of a later version: start the newer program")
                if row["leaf"].hex() != root.chain.previous:
                    raise Bad("E_DERIVED", where, "stored column leaf differs from the entry")
                tenants = heads.tenants
                if last is not None and last.checkpoint.size == root.chain.n:
                    self._hold(last, keys, root.chain.frontier.root())
        if last is not None and last.checkpoint.size > root.chain.n:
            raise Bad("E_TRUNC", f"{self._origin}/{root.chain.n}", f"a checkpoint of {last.checkpoint.size} was signed")
        return root, tenants

    def _restart(self, connection: Connection, root: RootLog, tenants: str) -> None:
        """Check every chain up to what the root log committed of it, and the map of the tenants."""
        self._chains, self._tenants, self._map = {}, {}, TenantMap()
        rows = {r["log_id"]: r for r in connection.execute(sa.select(shard_table)).mappings()}
        for log, commit in sorted(root.newest.items()):
            if log not in rows:
                raise Bad("E_MISSING", log, f"the root log committed {commit.size} records of it")
            verifier = self._start(connection, rows[log], commit.size)
            if (verifier.chain.n, verifier.chain.frontier.root().hex()) != (commit.size, commit.root):
                raise Bad(
                    "E_ROOT", f"{log}/{commit.size}", f"entry {commit.seq} of the root log committed another root"
                )
            for tenant in verifier.chain.tenants:
                self._tenants.setdefault(tenant, {})[log] = verifier.chain.head(tenant)
        for tenant, heads_of in self._tenants.items():
            self._map.put(tenant, heads_of)
        if root.chain.n and self._map.root().hex() != tenants:
            raise Bad("E_TMAP", f"{self._origin}/{root.chain.n - 1}", "the tenants' map has another root")

    def _hold(self, last: Signed, keys: Sequence[NoteKey], root: bytes) -> None:
        """Never sign what is not consistent with what was signed: the newest checkpoint must be of this tree."""
        where = f"{self._origin}/{last.checkpoint.size}"
        try:
            found = open_checkpoint(last.note, self._origin, keys)
        except BadNote as bad:
            raise Bad("E_SIG", where, str(bad)) from None
        if found != last.checkpoint or found.root != root:
            raise Bad("E_ROOT", where, "a checkpoint of another root was signed")
        held = self._signed
        if held is not None and held.size == found.size and held.root != root:
            raise Bad("E_FORK", where, "this notary signed another root at this size")
        self._signed = found

    def _start(self, connection: Connection, row: Any, size: int) -> Verifier:
        """A verifier of a chain at its committed size: from its newest well-sealed snapshot below, else from 0."""
        log, keys = row["log_id"], self._signer.known_keys()
        verifier, _ = beginning(connection, row["shard"], log, keys)
        chosen = sa.select(snapshot_table).where(
            snapshot_table.c.shard == row["shard"], snapshot_table.c.at_seq <= size
        )
        chosen = chosen.order_by(snapshot_table.c.at_seq.desc()).execution_options(yield_per=1)
        with connection.execute(chosen) as snapshots:
            for found in snapshots.mappings():
                restored = restore(found["blob"], found["seal"], found["epoch"], log, keys)
                if restored is not None and restored.chain.n <= size:
                    verifier = restored
                    break
        verifier.chain.touched = set()
        for batch in stored_batches(connection, row["shard"], log, after=verifier.chain.n):
            if verifier.chain.n >= size:
                break
            verifier.batch(batch)
        verifier.chain.touched.clear()
        self._chains[log] = verifier
        return verifier

    def _advance(self, connection: Connection, row: Any) -> None:
        """Check every batch that was stored since the last round."""
        log = row["log_id"]
        if not log.startswith(f"{self._origin}/"):
            return  # of an earlier origin, before a recovery
        verifier = self._chains.get(log)
        if verifier is None:
            verifier = self._start(connection, row, 0)
        if row["next_seq"] == verifier.chain.n:
            return
        for batch in stored_batches(connection, row["shard"], log, after=verifier.chain.n):
            verifier.batch(batch)
        where = f"{log}/{verifier.chain.n}"
        if row["next_seq"] > verifier.chain.n:
            raise Bad("E_TRUNC", where, f"the shard row says {row['next_seq']} records")
        if row["next_seq"] < self._committed(log):
            raise Bad("E_TRUNC", where, f"the shard row says {row['next_seq']} records, fewer than committed")

    # ---- committing and signing --------------------------------------------------------------------------------------

    def _append(self, listed: list[str], *, epoch: int, full: bool, began: int, fence: Fence) -> RootLog:
        """Make the entries durable, with the tenants' heads they commit."""
        assert self._root is not None
        root, first = self._root.copy(), self._root.chain.n
        rows: list[dict[str, object]] = []
        moved: dict[tuple[str, str], tuple[int, str]] = {}
        for part in parts((log, v.chain.n, v.chain.frontier.root().hex()) for log, v in self._of(listed)):
            for log, _, _ in part:
                chain = self._chains[log].chain
                for tenant in chain.touched or ():
                    heads = self._tenants.setdefault(tenant, {})
                    heads[log] = moved[tenant, log] = chain.head(tenant)
                    self._map.put(tenant, heads)
            entry = root.append(part, tenants=self._map.root(), epoch=epoch, full=full, t=began)
            rows.append({"seq": first + len(rows), "entry": entry, "leaf": bytes.fromhex(root.chain.previous)})
        with self._engine.begin() as connection:
            fence(connection)
            connection.execute(sa.insert(root_table), rows)
            if full and first:
                frontiers.store(connection, self._root.chain.frontier)
            for (tenant, log), (count, leaf) in moved.items():
                there = (tenant_table.c.tenant == tenant) & (tenant_table.c.log_id == log)
                connection.execute(sa.delete(tenant_table).where(there))
                values = {"tenant": tenant, "log_id": log, "count": count, "leaf": bytes.fromhex(leaf)}
                connection.execute(sa.insert(tenant_table), [values])
        for _, verifier in self._of(listed):
            verifier.chain.touched = set()
        self._root, self._last_at = root, began
        self._full_at = began if full else self._full_at
        return root

    def _of(self, logs: list[str]) -> list[tuple[str, Verifier]]:
        return [(log, v) for log in sorted(logs) if (v := self._chains[log]).chain.n]

    def _sign(self, root: RootLog, keys: Sequence[NoteKey], fence: Fence) -> Signed:
        at = root.chain.t  # of the entry, also where a crash lies between the two: so that a verifier can tell
        checkpoint = Checkpoint(self._origin, root.chain.n, root.chain.frontier.root())
        text = checkpoint.text()
        signature = self._signer.sign(text)
        # Each HSM of the region has an audit key of its own: which of them signed shows from the signature alone.
        key = next((k for k in keys if k.verifies(text, signature)), None)
        if key is None:
            raise Bad("E_SIG", f"{self._origin}/{checkpoint.size}", "the HSM's signature does not verify")
        note = Note(text, ()).signed_by(key, signature).encode()
        row = {"size": checkpoint.size, "at": at, "note": note, "cosigs": self._cosignature(checkpoint)}
        with self._engine.begin() as connection:
            fence(connection)
            connection.execute(sa.insert(checkpoint_table), [row])
        self._signed = checkpoint
        return Signed(checkpoint, at, note)

    def _cosignature(self, checkpoint: Checkpoint) -> bytes | None:
        """The post-quantum line. It stands beside the note: anchors, where room is scarce, hold the HSM's signature alone.

        Without it that signature still counts: a lost file must not stop the log.
        """
        second = self._post_quantum
        if second is None:
            return None
        try:
            value = second.cosign(checkpoint, self._clock() // 1_000_000)
            if not second.key.verifies(checkpoint.text(), value):
                raise CannotCosign("its signature does not verify")
        except CannotCosign as error:
            facts = {"size": checkpoint.size, "reason": str(error)}
            _log.error("a checkpoint has no post-quantum cosignature", extra={"facts": facts})
            return None
        return Signature(second.key.name, second.key.id, value).line()


# ---- what every worker sees ------------------------------------------------------------------------------------------


def newest(connection: Connection, size: int | None = None) -> Signed | None:
    """The newest stored checkpoint, or that of a size; None if there is none. Bad if it is unreadable."""
    chosen = sa.select(checkpoint_table).order_by(checkpoint_table.c.size.desc()).limit(1)
    if size is not None:
        chosen = chosen.where(checkpoint_table.c.size == size)
    row = connection.execute(chosen).mappings().first()
    if row is None:
        return None
    try:
        return Signed(_checkpoint_in(row["note"], row["size"]), int(row["at"]), row["note"])
    except BadNote as bad:
        raise Bad("E_SIG", f"checkpoint/{row['size']}", str(bad)) from None


def _checkpoint_in(data: bytes, size: int) -> Checkpoint:
    found = parse_checkpoint(parse_note(data).text)
    if found.size != size:
        raise BadNote(f"a checkpoint of {found.size} is stored as one of {size}")
    return found


@dataclass(frozen=True, slots=True)
class Coverage:
    """How far the newest checkpoint reaches: it, its age, and for how long a record has stood without one (s)."""

    signed: Signed | None
    age_s: float
    exposed_s: float


def coverage(engine: Engine, now: int) -> Coverage:
    """What is committed and what is not, as the database has it."""

    with engine.execution_options(reading=True).connect() as connection:
        signed = newest(connection)
        since = 0 if signed is None else signed.at
        oldest = connection.execute(sa.select(sa.func.min(batch_table.c.t)).where(batch_table.c.t > since)).scalar()
    exposed = 0.0 if oldest is None else max(0.0, (now - int(oldest)) / 1e6)
    return Coverage(signed, 0.0 if signed is None else max(0.0, (now - signed.at) / 1e6), exposed)
