"""What the database proves to others: checkpoints, growth, single records, tiles, and a tenant's whole record.

Reads only what the root log committed and a checkpoint covers. Every proof is checked here before it leaves, against
what is stored at this moment: a damaged database gives Bad, never a proof that fails in somebody else's hands.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import Connection, Engine

from audit.chain import BUNDLE, ZERO, Bad, leaf_hash, pack, parse_frame
from audit.checkpoint import Checkpoint, LogProof, with_cosignatures
from audit.event import Heads, decode_heads
from audit.evidence import Growth, RecordProof
from audit.notary import newest
from audit.proof import BadProof, TenantMap, check_inclusion, consistency_proof, inclusion_proof
from audit.tables import batch_table, checkpoint_table, root_table, shard_table, tenant_table
from audit.tenantbundle import Header, tenant_of_entry
from audit.tree import ChainEntries, Entries, RootEntries, Tree, in_tree

_log: Final = logging.getLogger("skms.audit")
_ENTRIES: Final = 16  # of the root log that are read at once
_CHUNK: Final = 262_144  # bytes of a bundle that are sent at once


class NotCovered(Exception):
    """No checkpoint covers it yet: ask again in a second."""


@dataclass(frozen=True, slots=True)
class Commit:
    """What the newest entry of the root log that lists a chain says of it."""

    index: int
    entry: bytes
    size: int
    root: bytes


@dataclass(frozen=True, slots=True)
class Bundle:
    """A tenant's bundle: its first line, and the rest in pieces that are read while they are sent."""

    header: bytes
    pieces: Iterator[bytes]


class Prover:
    """Answers from the database of one origin. Every method may be called from any thread."""

    def __init__(self, engine: Engine, *, origin: str) -> None:
        self.origin = origin
        self._engine = engine.execution_options(reading=True)

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def checkpoint(self, size: int | None = None) -> bytes | None:
        """The newest signed note, or that of a size, with its witnesses' lines; None if there is none of that size.

        NotCovered before the first one.
        """
        with self._engine.connect() as connection:
            if size is None:
                return self._newest(connection)[1]
            found = newest(connection, size)
            return None if found is None else self._note(connection, found.note, size)

    def growth(self, old: int, size: int | None = None) -> bytes | None:
        """That the checkpoint of `size` (the newest) extends the one of `old`; None unless both were signed."""
        with self._engine.connect() as connection:
            signed, note = self._newest(connection)
            if size is not None:
                found = newest(connection, size)
                if found is None:
                    return None
                signed, note = found.checkpoint, self._note(connection, found.note, size)
            if not 0 < old <= signed.size or newest(connection, old) is None:
                return None
        path = self._in_root(signed, lambda tree: consistency_proof(old, tree.size, tree.subtree))
        return Growth(old, tuple(path), note).encode()

    def _newest(self, connection: Connection) -> tuple[Checkpoint, bytes]:
        found = newest(connection)
        if found is None or not found.checkpoint.size:
            raise NotCovered("no checkpoint has been signed yet")
        return found.checkpoint, self._note(connection, found.note, found.checkpoint.size)

    def _note(self, connection: Connection, note: bytes, size: int) -> bytes:
        cosigned = sa.select(checkpoint_table.c.cosigs).where(checkpoint_table.c.size == size)
        return with_cosignatures(bytes(note), connection.execute(cosigned).scalar())

    def _in_root(self, signed: Checkpoint, use: Callable[[Tree], Any]) -> Any:
        return in_tree(self._engine, RootEntries(self.origin), signed.size, signed.root, use)

    # ---- records and tiles -------------------------------------------------------------------------------------------

    def record(self, chain: str, seq: int, *, tenant: str | None) -> bytes | None:
        """The proof of a record as a `.tlog-proof`; None if there is none, or it is not this tenant's (None: any).

        NotCovered if no checkpoint covers it yet; Pruned if it is in the archive alone.
        """
        with self._engine.connect() as connection:
            shard = self._shard(connection, chain)
            if shard is None or seq >= shard.next_seq:
                return None
            entries = ChainEntries(shard.log_id, shard.shard)
            where = f"{entries.log}/{seq}"
            (entry,) = entries.read(self._engine, seq, seq + 1)
            frame, owner = tenant_of_entry(entry, where)
            if tenant is not None and owner != tenant:
                return None
            signed, note = self._newest(connection)
            commit = self._commit(connection, entries.log, signed.size)
        if commit is None or commit.size <= seq:
            raise NotCovered(f"no checkpoint covers record {seq} of {chain} yet")
        if (frame.log, frame.n) != (entries.log, seq):
            raise Bad("E_SEQ", where, f"record {frame.n} of {frame.log} stands here")
        path = in_tree(
            self._engine, entries, commit.size, commit.root, lambda t: inclusion_proof(seq, t.size, t.subtree)
        )
        try:
            check_inclusion(seq, commit.size, leaf_hash(entry), path, commit.root)
        except BadProof as bad:
            raise Bad("E_ROOT", where, str(bad)) from None
        place = self._place(signed, note, commit.index, commit.entry)
        return RecordProof(entry, tuple(path), commit.entry, place).encode()

    def tile(self, chain: str | None, level: int, index: int, width: int) -> bytes | None:
        """A hash tile of a chain, or of the root log (None); None if it is not covered by a checkpoint."""
        return self._of_tree(chain, level, index, width, lambda tree, _: b"".join(tree.tile(level, index)[:width]))

    def entries(self, chain: str | None, index: int, width: int) -> bytes | None:
        """As `tile`, a bundle of entries; each is checked against its leaf. Pruned if they are in the archive alone."""

        def bundle(tree: Tree, source: Entries) -> bytes:
            first = index * BUNDLE
            found = list(source.read(self._engine, first, first + width))
            for entry, leaf in zip(found, tree.tile(0, index), strict=False):
                if leaf_hash(entry) != leaf:
                    raise Bad("E_ROOT", f"{source.log}/{first}", "an entry differs from what was committed")
            return pack(found)

        return self._of_tree(chain, 0, index, width, bundle)

    def _of_tree(
        self, chain: str | None, level: int, index: int, width: int, use: Callable[[Tree, Entries], bytes]
    ) -> bytes | None:
        source: Entries = RootEntries(self.origin)
        with self._engine.connect() as connection:
            signed, _ = self._newest(connection)
            size, root = signed.size, signed.root
            if chain is not None:
                shard = self._shard(connection, chain)
                commit = None if shard is None else self._commit(connection, shard.log_id, signed.size)
                if shard is None or commit is None:
                    return None
                source, size, root = ChainEntries(shard.log_id, shard.shard), commit.size, commit.root
        if index * BUNDLE + width > size >> 8 * level:
            return None
        return in_tree(self._engine, source, size, root, lambda tree: use(tree, source))

    def _shard(self, connection: Connection, chain: str) -> Any:
        return connection.execute(
            sa.select(shard_table).where(shard_table.c.log_id == f"{self.origin}/{chain}")
        ).first()

    def _commit(self, connection: Connection, log: str, size: int) -> Commit | None:
        """What the root log of this size last said of a chain. Each hour it lists them all, so this ends soon."""
        at = size
        while at:
            chosen = sa.select(root_table.c.seq, root_table.c.entry).where(root_table.c.seq < at)
            rows = connection.execute(chosen.order_by(root_table.c.seq.desc()).limit(_ENTRIES)).all()
            for row in rows:
                if log.encode() not in row.entry:
                    continue
                for name, count, root in self._heads(row.entry, row.seq).shards:
                    if name == log:
                        return Commit(row.seq, bytes(row.entry), count, bytes.fromhex(root))
            at = rows[-1].seq if rows else 0
        return None

    def _heads(self, entry: bytes, seq: int) -> Heads:
        where = f"{self.origin}/{seq}"
        try:
            return decode_heads(parse_frame(entry, where).body)
        except Exception as error:
            raise Bad("E_SCHEMA", where, f"not an entry of the root log ({type(error).__name__})") from None

    def _place(self, signed: Checkpoint, note: bytes, index: int, entry: bytes) -> LogProof:
        path = self._in_root(signed, lambda tree: inclusion_proof(index, tree.size, tree.subtree))
        try:
            check_inclusion(index, signed.size, leaf_hash(entry), path, signed.root)
        except BadProof as bad:
            raise Bad("E_ROOT", f"{self.origin}/{index}", str(bad)) from None
        return LogProof(index, tuple(path), note)

    # ---- a tenant's whole record -------------------------------------------------------------------------------------

    def bundle(self, tenant: str, *, since: int = 0) -> Bundle:
        """All records of a tenant since a time (us; 0: all) up to the newest checkpoint, with their proof.

        NotCovered while the newest entry of the root log has no checkpoint, or commits no record of the tenant; Pruned if
        records that it needs are in the archive alone.
        """
        with self._engine.connect() as connection:
            signed, note = self._newest(connection)
            row = connection.execute(sa.select(root_table).order_by(root_table.c.seq.desc()).limit(1)).first()
            if row is None or row.seq + 1 != signed.size:
                raise NotCovered("the newest entry of the root log is not signed yet")
            heads, shards = self._all_heads(connection), {}
            for shard in connection.execute(sa.select(shard_table)):
                shards[shard.log_id] = shard.shard
        if tenant not in heads:
            raise NotCovered(f"no checkpoint commits a record of {tenant} yet")
        tree = TenantMap()
        for name, its in heads.items():
            tree.put(name, its)
        if tree.root().hex() != self._heads(row.entry, row.seq).tenants:
            raise Bad("E_TMAP", f"{self.origin}/{row.seq}", "the stored heads of the tenants have another root")
        own = tuple((log, count, leaf) for log, (count, leaf) in sorted(heads[tenant].items()))
        proof = self._place(signed, note, row.seq, bytes(row.entry)).encode()
        header = Header(tenant, since, own, tuple(tree.proof(tenant)), bytes(row.entry), proof)
        for log, _, _ in own:
            if log not in shards:
                raise Bad("E_MISSING", log, "the root log committed records of it")
        sources = [(ChainEntries(log, shards[log]), count) for log, count, _ in own]
        for source, count in sources:
            with self._engine.connect() as connection:
                archived = source.pruned(connection)
            if archived is not None:  # said now: once the answer has begun nothing but its end can tell
                next(self._of_tenant(source, count, tenant, since), None)
        return Bundle(header.encode(), self._pieces(tenant, since, sources))

    def _all_heads(self, connection: Connection) -> dict[str, dict[str, tuple[int, str]]]:
        found: dict[str, dict[str, tuple[int, str]]] = {}
        for row in connection.execute(sa.select(tenant_table)).mappings():
            if row["log_id"].startswith(f"{self.origin}/"):
                found.setdefault(row["tenant"], {})[row["log_id"]] = (row["count"], row["leaf"].hex())
        return found

    def _pieces(self, tenant: str, since: int, sources: list[tuple[ChainEntries, int]]) -> Iterator[bytes]:
        """The lines of every chain, read as they are sent; Bad, which ends the answer early, if one is missing."""
        pending: list[bytes] = []
        size = 0
        try:
            for source, count in sources:
                for entry in self._of_tenant(source, count, tenant, since):
                    pending += (entry, b"\n")
                    size += len(entry) + 1
                    if size >= _CHUNK:
                        yield b"".join(pending)
                        pending, size = [], 0
        except Bad as bad:
            _log.critical("a tenant's bundle ends early", extra={"facts": {"code": bad.code, "where": bad.where}})
            raise
        yield b"".join(pending)

    def _of_tenant(self, source: ChainEntries, count: int, tenant: str, since: int) -> Iterator[bytes]:
        """A tenant's entries in a chain up to its committed head: the last before the period, then all of it."""
        start, end = self._range(source.shard, since)
        with self._engine.connect() as connection:
            archived = source.pruned(connection)
        kept = 0 if archived is None else archived.to
        start = max(start, kept)
        before = self._last_before(source, tenant, start, kept) if start > kept else None
        due: int | None = None if before is None else _number(before, source.log) + 1
        if before is None and not start:
            due = 0
        held = before
        needle = b'"tenant":"%s"' % tenant.encode()
        if due != count:
            for entry in source.read(self._engine, start, end):
                if needle not in entry:
                    continue
                frame, owner = tenant_of_entry(entry, source.log)
                if owner != tenant:
                    continue
                if due is None and frame.tn and archived is not None:
                    raise archived
                if due is not None and frame.tn != due:
                    raise Bad("E_TSEQ", f"{source.log}/{frame.n}", f"the tenant's record {frame.tn}, not {due}")
                due = (frame.tn or 0) + 1
                if frame.t < since:
                    held = entry
                else:
                    if held is not None:
                        yield held
                        held = None
                    yield entry
                if due == count:
                    break
        if due is None and archived is not None:
            raise archived
        if due != count:
            raise Bad("E_TRUNC", source.log, f"the root log committed {count} records of the tenant")
        if held is not None:
            yield held

    def _range(self, shard: int, since: int) -> tuple[int, int]:
        mine = batch_table.c.shard == shard
        with self._engine.connect() as connection:
            end = connection.execute(sa.select(shard_table.c.next_seq).where(shard_table.c.shard == shard)).scalar()
            first = sa.select(sa.func.min(batch_table.c.first_seq)).where(mine, batch_table.c.t >= since)
            found = connection.execute(first).scalar() if since else 0
        return int(end or 0) if found is None else int(found), int(end or 0)

    def _last_before(self, source: ChainEntries, tenant: str, start: int, kept: int) -> bytes | None:
        """The tenant's last entry before a record, searched backwards to the first that is kept here."""
        needle = b'"tenant":"%s"' % tenant.encode()
        hi = start
        while hi > kept:
            lo = max(kept, hi - BUNDLE)
            for entry in reversed(list(source.read(self._engine, lo, hi))):
                if needle in entry and tenant_of_entry(entry, source.log)[1] == tenant:
                    return entry
            hi = lo
        return None

    # ---- status ------------------------------------------------------------------------------------------------------

    def chains(self) -> list[dict[str, object]]:
        """Every chain of this origin with its size now."""
        with self._engine.connect() as connection:
            rows = connection.execute(sa.select(shard_table).order_by(shard_table.c.log_id)).all()
        return [
            {"log": r.log_id, "records": r.next_seq, "epoch": r.epoch, "head": r.head.hex() or ZERO}
            for r in rows
            if r.log_id.startswith(f"{self.origin}/")
        ]


def _number(entry: bytes, log: str) -> int:
    return parse_frame(entry, log).tn or 0
