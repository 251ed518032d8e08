"""Exports in the form of C2SP tlog-tiles: what a verifier needs stands where it looks for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from audit_lab import ORIGIN, Lab, now, op
from sqlalchemy import Connection

from audit import checkpoint as cp
from audit.chain import BUNDLE, leaf_hash, tree_hash, unpack
from audit.export import export
from audit.notary import Notary
from audit.tiles import ENTRIES, HashTiles, tile_path

pytestmark = pytest.mark.anyio


def held(_: Connection) -> None:
    """The lease is ours."""


def root_of_tiles(directory: Path, size: int) -> bytes:
    """The root from hash tiles alone: each level's tiles must be the hashes of the one below."""
    below: list[bytes] = []
    level, width = 0, size
    while width:
        found: list[bytes] = []
        for number in range((width + BUNDLE - 1) // BUNDLE):
            data = (directory / tile_path(level, number, min(BUNDLE, width - number * BUNDLE))).read_bytes()
            found += [data[i : i + 32] for i in range(0, len(data), 32)]
        assert len(found) == width
        if level:
            assert found == [tree_hash(below[i * BUNDLE : (i + 1) * BUNDLE]) for i in range(width)]
        else:
            leaves = found
        below, level, width = found, level + 1, width // BUNDLE
    return tree_hash(leaves)


async def test_an_export_holds_root_log_checkpoints_and_tiles_of_both(made: Lab, tmp_path: Path) -> None:
    notary = Notary(made.engine, origin=ORIGIN, signer=made.signer, clock=now)
    for count in (300, 7):
        writer = made.writer()
        await writer.start()
        await writer.append_many([op(f"t{i % 3}") for i in range(count)])
        await writer.close()
        assert notary.round(1, held) is not None
    made_export = export(made.engine, tmp_path / "export", made.trust)
    assert (made_export.checkpoints, made_export.root_entries) == (2, 2)
    base = tmp_path / "export" / ORIGIN
    lines = [json.loads(line) for line in (base / "checkpoints.jsonl").read_text().splitlines()]
    assert (base / "checkpoint").read_text() == lines[-1]["note"]
    key = cp.key_of(ORIGIN, made.signer.public_key())
    found = [cp.open_checkpoint(line["note"].encode(), ORIGIN, [key]) for line in lines]
    assert [c.size for c in found] == [1, 2]
    assert found[-1].root == root_of_tiles(base, 2)
    (entries,) = (p for p in (base / "tile/entries").rglob("2"))
    newest = json.loads(unpack(entries.read_bytes())[-1])["r"]
    ((log, size, root),) = newest["shards"]
    assert (log, size) == (f"{ORIGIN}/n0-0", 311)
    assert root_of_tiles(base / "n0-0", size).hex() == root


def test_hash_tiles_of_many_levels_lead_to_the_root(tmp_path: Path) -> None:
    leaves = [leaf_hash(b"%d" % i) for i in range(BUNDLE * BUNDLE + 3 * BUNDLE + 5)]
    tiles = HashTiles()
    for name, data in [*tiles.push(leaves), *tiles.partial()]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    assert root_of_tiles(tmp_path, len(leaves)) == tree_hash(leaves)
    assert (tmp_path / "tile/2/000.p/1").is_file()
    assert tile_path(ENTRIES, 1_234_067, 3) == "tile/entries/x001/x234/067.p/3"
