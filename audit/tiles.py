"""C2SP tlog-tiles: where a tile stands, and the hash tiles over a tree's leaves. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from audit.chain import BUNDLE, tree_hash

ENTRIES: Final = "entries"  # in place of a level: the bundles of entries


def tile_path(level: int | str, number: int, width: int = BUNDLE) -> str:
    """The path of a hash tile or, with `ENTRIES`, of an entry bundle: `tile/0/x001/x234/067`, `.p/W` if not full."""
    digits = f"{number:03d}"
    digits = digits.zfill((len(digits) + 2) // 3 * 3)
    groups = [digits[i : i + 3] for i in range(0, len(digits), 3)]
    path = "/".join(["x" + g for g in groups[:-1]] + [groups[-1]])
    return f"tile/{level}/{path}" + ("" if width == BUNDLE else f".p/{width}")


class HashTiles:
    """The hash tiles of a growing tree: those that are full as they fill up, the others on demand."""

    def __init__(self) -> None:
        self._levels: list[list[bytes]] = []  # per level the hashes of its last tile, which is not full
        self._full: list[int] = []  # per level the number of full tiles

    def push(self, leaves: Iterable[bytes]) -> Iterator[tuple[str, bytes]]:
        """Append leaf hashes; (path, bytes) of each tile that they fill."""
        for leaf in leaves:
            yield from self._push(0, leaf)

    def _push(self, level: int, found: bytes) -> Iterator[tuple[str, bytes]]:
        if level == len(self._levels):
            self._levels.append([])
            self._full.append(0)
        pending = self._levels[level]
        pending.append(found)
        if len(pending) == BUNDLE:
            yield tile_path(level, self._full[level]), b"".join(pending)
            root = tree_hash(pending)
            pending.clear()
            self._full[level] += 1
            yield from self._push(level + 1, root)

    def partial(self) -> Iterator[tuple[str, bytes]]:
        """(path, bytes) of the tiles that are not full at this size."""
        for level, pending in enumerate(self._levels):
            if pending:
                yield tile_path(level, self._full[level], len(pending)), b"".join(pending)
