"""Exports: every chain and the root log as C2SP tlog-tiles, with seals and signed checkpoints, for a verifier that trusts
nobody.

DIR/trust.txt                            a convenience: compare it with the ceremony's report
DIR/<origin>/<chain>/tile/...            entry bundles and hash tiles of one chain; beside them `seals.jsonl`
DIR/<origin>/tile/...                    the root log
DIR/<origin>/checkpoint                  the newest signed note, cosignatures of witnesses included
DIR/<origin>/checkpoints.jsonl           every stored note: {"at":us,"note":text,"tst":base64 of an RFC 3161 token}
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Engine

from audit import event
from audit.chain import BUNDLE, leaf_hash, pack, unpack
from audit.checkpoint import with_cosignatures
from audit.segments import LEAD, PRUNED, seal_line
from audit.stored import Kept, beginning, kept_of, past_origins, snapshot, stored_batches
from audit.tables import shard_table
from audit.tiles import ENTRIES, HashTiles, tile_path
from audit.verify import Trust


@dataclass(frozen=True, slots=True)
class ExportSummary:
    """What an export holds."""

    directory: Path
    logs: dict[str, int]  # chain -> records
    checkpoints: int = 0
    root_entries: int = 0

    @property
    def records(self) -> int:
        """All records."""
        return sum(self.logs.values())


def export(engine: Engine, directory: Path, trust: Trust) -> ExportSummary:
    """Write every chain, the root log of each generation and its checkpoints, as the database had them at one moment."""
    directory.mkdir(parents=True, exist_ok=True)
    logs: dict[str, int] = {}
    with snapshot(engine) as connection:
        for row in connection.execute(sa.select(shard_table).order_by(shard_table.c.shard)).mappings().all():
            logs[row["log_id"]] = _export_chain(connection, row, directory / row["log_id"], trust)
        checkpoints, entries = _export_root(connection, directory / trust.origin, kept_of(connection, trust.origin))
        for origin in past_origins(connection):
            _export_root(connection, directory / origin, kept_of(connection, origin))
    lines = ["# Compare with the ceremony's report before you trust it.", f"origin {trust.origin}"]
    lines += [f"key {base64.b64encode(k).decode()}" for k in trust.keys]
    (directory / "trust.txt").write_text("\n".join(lines) + "\n")
    return ExportSummary(directory, logs, checkpoints, entries)


def _export_chain(connection: Connection, row: Any, directory: Path, trust: Trust) -> int:
    """How many records were exported. Of a pruned chain, those from the last archived segment on."""
    directory.mkdir(parents=True, exist_ok=True)
    _, segment = beginning(connection, row["shard"], row["log_id"], trust.keys)
    at, to = (0, 0) if segment is None else (segment.at, segment.to)
    tiles, lead = _Tiles(directory, first=to), list[bytes]()
    with (directory / "seals.jsonl").open("wb") as seals:
        for batch in stored_batches(connection, row["shard"], row["log_id"], after=at):
            seals.write(seal_line(batch))
            entries = unpack(batch.entries)
            archived = max(0, to - batch.first)
            lead += entries[:archived]
            tiles.push(entries[archived:])
    tiles.partial()
    if segment is not None:
        (directory / PRUNED).write_bytes(segment.file())
        (directory / LEAD).write_bytes(pack(lead))
    return tiles.count - at


def _export_root(connection: Connection, directory: Path, kept: Kept) -> tuple[int, int]:
    """The root log of a generation and its checkpoints; how many there are of each."""
    sizes = kept.checkpoints.order_by(None).subquery()
    newest = connection.execute(sa.select(sa.func.max(sizes.c.size))).scalar()
    tiles = _Tiles(directory)
    for row in connection.execute(kept.root.execution_options(yield_per=BUNDLE)).mappings():
        directory.mkdir(parents=True, exist_ok=True)
        tiles.push([row["entry"]])
        if tiles.count == newest:  # an entry may stand beyond the newest checkpoint: both sizes have their tiles
            tiles.partial()
    tiles.partial()
    count = _export_checkpoints(connection, directory, kept) if newest is not None else 0
    return count, tiles.count


def _export_checkpoints(connection: Connection, directory: Path, kept: Kept) -> int:
    directory.mkdir(parents=True, exist_ok=True)
    count, note = 0, b""
    with (directory / "checkpoints.jsonl").open("wb") as lines:
        for row in connection.execute(kept.checkpoints.execution_options(yield_per=BUNDLE)).mappings():
            note = with_cosignatures(row["note"], row["cosigs"])
            line = {"at": row["at"], "note": note.decode(errors="replace")}
            if row["tst"] is not None:
                line["tst"] = base64.b64encode(row["tst"]).decode()
            lines.write(event.encode_plain(line) + b"\n")
            count += 1
    (directory / "checkpoint").write_bytes(note)
    return count


class _Tiles:
    """Writes entry bundles and hash tiles as they fill up."""

    def __init__(self, directory: Path, first: int = 0) -> None:
        # The hash tiles of a pruned chain need what is in the archive.
        self._directory, self._hashes = directory, HashTiles() if first == 0 else None
        self._pending: list[bytes] = []
        self.count = first

    def push(self, entries: Iterable[bytes]) -> None:
        for entry in entries:
            self._pending.append(entry)
            self.count += 1
            if self._hashes is not None:
                self._write(self._hashes.push([leaf_hash(entry)]))
            if len(self._pending) == BUNDLE:
                self._write([(tile_path(ENTRIES, self.count // BUNDLE - 1), pack(self._pending))])
                self._pending.clear()

    def partial(self) -> None:
        """Write the tiles that are not full at this size."""
        if self._hashes is not None:
            self._write(self._hashes.partial())
        if self._pending:
            path = tile_path(ENTRIES, self.count // BUNDLE, len(self._pending))
            self._write([(path, pack(self._pending))])

    def _write(self, made: Iterable[tuple[str, bytes]]) -> None:
        for name, data in made:
            path = self._directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
