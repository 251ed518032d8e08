"""The RFC 6962 trees of the chains and of the root log, as hash tiles that are computed once and kept in a table.

With them a proof reads one tile a level instead of every record. What the table holds is derived and trusted by nobody:
each tile is checked against the committed root before a hash of it is used. A table that is wrong is emptied and made
again from the stored entries; if these lead to another root too, Bad says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

import sqlalchemy as sa
from sqlalchemy import Connection, Engine
from sqlalchemy.dialects import postgresql, sqlite

from audit.chain import BUNDLE, Bad, leaf_hash, node_hash, tree_hash, unpack
from audit.tables import archive_table, batch_table, root_table, tile_table

T = TypeVar("T")

PAGE: Final = 16  # batches read at once: no transaction stays open while somebody reads slowly
_STORED_AT_ONCE: Final = 64  # tiles of one short transaction, so that the writer never waits for it


class Pruned(Exception):
    """These records were moved to an archive, and deleted here."""

    def __init__(self, log: str, first: int, to: int, uri: str) -> None:
        super().__init__(f"records {first} to {to - 1} of {log} were archived to {uri}: ask whoever keeps the archive")
        self.log, self.first, self.to, self.uri = log, first, to, uri


class _Stale(Exception):
    """The table of tiles does not fit the committed root."""


# ---- the entries of a log --------------------------------------------------------------------------------------------


class Entries(Protocol):
    """The stored entries of one log."""

    @property
    def log(self) -> str: ...

    def read(self, engine: Engine, lo: int, hi: int) -> Iterator[bytes]:
        """Entries lo to hi - 1 in order; Bad if one of them is not there."""


@dataclass(frozen=True, slots=True)
class ChainEntries:
    """The entries of a writer's chain, out of its batches."""

    log: str
    shard: int

    def read(self, engine: Engine, lo: int, hi: int) -> Iterator[bytes]:
        """Read page by page, each page in a transaction of its own: what is committed never changes.

        Pruned if they were archived.
        """
        at = lo
        while at < hi:
            with engine.connect() as connection:
                rows = self._page(connection, at, hi)
                archived = self.pruned(connection) if not rows or rows[0].first_seq > at else None
            if archived is not None and at < archived.to:
                raise archived
            if not rows:
                raise Bad("E_TRUNC", f"{self.log}/{at}", f"{hi} records were committed")
            for row in rows:
                entries = self._unpacked(row, at)
                yield from entries[at - row.first_seq : hi - row.first_seq]
                at = min(hi, row.first_seq + len(entries))

    def pruned(self, connection: Connection) -> Pruned | None:
        """What of this chain is in the archive alone: from its first record to the first that is stored here."""
        kept = sa.select(sa.func.min(batch_table.c.first_seq)).where(batch_table.c.shard == self.shard)
        mine = archive_table.c.log == self.log
        last = sa.select(archive_table.c.at_seq, archive_table.c.uri).where(mine)
        row = connection.execute(last.order_by(archive_table.c.from_seq.desc()).limit(1)).first()
        if row is None:
            return None
        first = connection.execute(kept).scalar()
        gone = row.at_seq if first is None else min(first, row.at_seq)
        return Pruned(self.log, 0, gone, row.uri) if gone else None

    def _page(self, connection: Connection, at: int, hi: int) -> list[Any]:
        mine = batch_table.c.shard == self.shard
        newest = sa.select(sa.func.max(batch_table.c.first_seq)).where(mine, batch_table.c.first_seq <= at)
        first = connection.execute(newest).scalar()
        chosen = sa.select(batch_table.c.first_seq, batch_table.c.entries).where(
            mine, batch_table.c.first_seq >= (at if first is None else first), batch_table.c.first_seq < hi
        )
        return list(connection.execute(chosen.order_by(batch_table.c.first_seq).limit(PAGE)))

    def _unpacked(self, row: Any, at: int) -> list[bytes]:
        try:
            entries = unpack(row.entries)
        except ValueError as error:
            raise Bad("E_PARSE", f"{self.log}/{row.first_seq}", str(error)) from None
        if not row.first_seq <= at < row.first_seq + len(entries):
            raise Bad("E_SEQ", f"{self.log}/{at}", f"the next stored batch begins at {row.first_seq}")
        return entries


@dataclass(frozen=True, slots=True)
class RootEntries:
    """The entries of the root log, whose name is the origin."""

    log: str

    def read(self, engine: Engine, lo: int, hi: int) -> Iterator[bytes]:
        """As `ChainEntries.read`."""
        at = lo
        while at < hi:
            chosen = sa.select(root_table.c.seq, root_table.c.entry).where(
                root_table.c.seq >= at, root_table.c.seq < min(hi, at + BUNDLE)
            )
            with engine.connect() as connection:
                rows = list(connection.execute(chosen.order_by(root_table.c.seq)))
            if not rows or rows[0].seq != at:
                raise Bad("E_TRUNC", f"{self.log}/{at}", f"the root log had {hi} entries")
            for row in rows:
                if row.seq != at:
                    raise Bad("E_SEQ", f"{self.log}/{at}", f"the next stored entry is {row.seq}")
                yield bytes(row.entry)
                at += 1


# ---- trees -----------------------------------------------------------------------------------------------------------


def in_tree(engine: Engine, entries: Entries, size: int, root: bytes, use: Callable[[Tree], T]) -> T:
    """What `use` makes of the tree that these entries form; Bad E_ROOT if it does not have this root."""
    for _ in range(2):
        tree = Tree(engine, entries, size)
        try:
            if tree.subtree(0, size) != root:
                raise _Stale
            return use(tree)
        except _Stale:
            with engine.execution_options(reading=False).begin() as connection:
                connection.execute(sa.delete(tile_table).where(tile_table.c.log == entries.log))
    raise Bad("E_ROOT", f"{entries.log}/{size}", "the stored entries have another root than was committed")


class Tree:
    """The tree over the first `size` entries of a log. Use `in_tree`, which checks its root first."""

    def __init__(self, engine: Engine, entries: Entries, size: int) -> None:
        self._engine = engine.execution_options(reading=True)
        self._writing = engine.execution_options(reading=False)
        self._entries, self.size = entries, size
        self._tiles: dict[tuple[int, int], list[bytes]] = {}
        self._extend()

    def subtree(self, lo: int, hi: int) -> bytes:
        """The hash over leaves lo to hi - 1, of a range of the RFC 6962 tree."""
        width = hi - lo
        if width & (width - 1):
            middle = lo + (1 << (width.bit_length() - 1))
            return node_hash(self.subtree(lo, middle), self.subtree(middle, hi))
        level, height = divmod(width.bit_length() - 1, 8)
        first = lo >> 8 * level
        at = first % BUNDLE
        return tree_hash(self.tile(level, first // BUNDLE)[at : at + (1 << height)])

    def width(self, level: int, index: int) -> int:
        """How many hashes this tile has at this size; 0 if there is none."""
        return max(0, min(BUNDLE, (self.size >> 8 * level) - index * BUNDLE))

    def tile(self, level: int, index: int) -> list[bytes]:
        """The hashes of a tile (C2SP tlog-tiles).

        Those of the tiles that are not full make up the root, which `in_tree` checked; a full one has its hash above.
        """
        found = self._tiles.get((level, index))
        if found is None:
            found = self._load(level, index)
            if len(found) == BUNDLE and tree_hash(found) != self.tile(level + 1, index // BUNDLE)[index % BUNDLE]:
                raise _Stale
            self._tiles[level, index] = found
        return found

    def _load(self, level: int, index: int) -> list[bytes]:
        width = self.width(level, index)
        if not level and width < BUNDLE:  # these grow with every record: not worth a row
            return [leaf_hash(e) for e in self._entries.read(self._engine, index * BUNDLE, index * BUNDLE + width)]
        with self._engine.connect() as connection:
            stored = connection.execute(self._row(level, index)).scalar()
        if stored is None or len(stored) < 32 * width:
            raise _Stale
        return _hashes(stored)[:width]

    def _row(self, level: int, index: int) -> sa.Select[Any]:
        c = tile_table.c
        return sa.select(c.hashes).where(c.log == self._entries.log, c.level == level, c.idx == index)

    # ---- making tiles ------------------------------------------------------------------------------------------------

    def _extend(self) -> None:
        """Compute the tiles that the table lacks: level 0 from the entries, each other from the full tiles below."""
        there = sa.select(sa.func.max(tile_table.c.idx)).where(
            tile_table.c.log == self._entries.log, tile_table.c.level == 0
        )
        full = self.size // BUNDLE
        with self._engine.connect() as connection:
            last = connection.execute(there).scalar()
            have = 0 if last is None else int(last) + 1
            if have >= full:
                return
            above = self._above(connection, have)
        rows: dict[tuple[int, int], list[bytes]] = {}
        leaves: list[bytes] = []
        for entry in self._entries.read(self._engine, have * BUNDLE, full * BUNDLE):
            leaves.append(leaf_hash(entry))
            if len(leaves) == BUNDLE:
                rows[0, have] = leaves
                _push(above, rows, 1, tree_hash(leaves))
                leaves, have = [], have + 1
                if len(rows) >= _STORED_AT_ONCE:
                    self._store(rows)
                    rows = {}
        self._store(rows)

    def _above(self, connection: Connection, full: int) -> list[tuple[int, list[bytes]]]:
        """Per level from 1 on: full tiles, and the hashes of the one that is not full."""
        found = []
        level = 1
        while full:
            index, width = divmod(full, BUNDLE)
            stored = connection.execute(self._row(level, index)).scalar() if width else b""
            found.append((index, _hashes(stored or b"")[:width]))
            full, level = index, level + 1
        return found

    def _store(self, rows: dict[tuple[int, int], list[bytes]]) -> None:
        """Keep tiles; another worker may have kept the same ones or wider ones."""
        if not rows:
            return
        values = [
            {"log": self._entries.log, "level": level, "idx": index, "width": len(h), "hashes": b"".join(h)}
            for (level, index), h in sorted(rows.items())
        ]
        with self._writing.begin() as connection:
            dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
            insert = dialect.insert(tile_table)
            wider = insert.on_conflict_do_update(
                index_elements=["log", "level", "idx"],
                set_={"width": insert.excluded.width, "hashes": insert.excluded.hashes},
                where=tile_table.c.width < insert.excluded.width,
            )
            connection.execute(wider, values)


def _push(
    above: list[tuple[int, list[bytes]]], rows: dict[tuple[int, int], list[bytes]], level: int, found: bytes
) -> None:
    """Append the hash of a full tile to the level above it, and so on upwards."""
    if level > len(above):
        above.append((0, []))
    index, hashes = above[level - 1]
    hashes = [*hashes, found]
    rows[level, index] = hashes
    if len(hashes) == BUNDLE:
        above[level - 1] = (index + 1, [])
        _push(above, rows, level + 1, tree_hash(hashes))
    else:
        above[level - 1] = (index, hashes)


def _hashes(data: bytes) -> list[bytes]:
    return [bytes(data[i : i + 32]) for i in range(0, len(data), 32)]
