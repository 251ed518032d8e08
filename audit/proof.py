"""Proofs: RFC 6962 inclusion and consistency, and the sparse Merkle map of the tenants' heads. Pure.

Whoever checks a proof computes the leaf from the record that was asked for, never from the proof (CVE-2026-22703).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from audit.chain import node_hash, tree_hash
from audit.event import encode_plain

Subtree = Callable[[int, int], bytes]
"""The hash of leaves lo to hi - 1, asked for ranges of the RFC 6962 tree only."""


class BadProof(ValueError):
    """The proof does not prove it."""


def subtree_of(leaves: Sequence[bytes]) -> Subtree:
    """Subtree hashes over leaf hashes in memory."""
    return lambda lo, hi: tree_hash(leaves[lo:hi])


def _split(n: int) -> int:
    """The largest power of two below n (RFC 6962, 2.1)."""
    return 1 << ((n - 1).bit_length() - 1)


def inclusion_proof(index: int, size: int, subtree: Subtree) -> list[bytes]:
    """The audit path of a leaf in the tree of this size (RFC 6962, 2.1.1); ValueError if it is not in it."""
    if not 0 <= index < size:
        raise ValueError(f"leaf {index} is not in a tree of {size}")
    ranges, lo, hi = [], 0, size
    while hi - lo > 1:
        middle = lo + _split(hi - lo)
        if index < middle:
            ranges.append((middle, hi))
            hi = middle
        else:
            ranges.append((lo, middle))
            lo = middle
    return [subtree(a, b) for a, b in reversed(ranges)]


def consistency_proof(old: int, size: int, subtree: Subtree) -> list[bytes]:
    """That the tree of `size` leaves extends the tree of `old` (RFC 6962, 2.1.2); ValueError unless 0 < old <= size."""
    if not 0 < old <= size:
        raise ValueError(f"a tree of {size} does not extend one of {old}")
    ranges, lo, hi, whole = [], 0, size, True
    while old != hi:
        middle = lo + _split(hi - lo)
        if old <= middle:
            ranges.append((middle, hi))
            hi = middle
        else:
            ranges.append((lo, middle))
            lo, whole = middle, False
    if not whole:
        ranges.append((lo, hi))
    return [subtree(a, b) for a, b in reversed(ranges)]


def root_from_inclusion(index: int, size: int, leaf: bytes, path: Sequence[bytes]) -> bytes:
    """The root that an audit path leads to; BadProof if its length does not fit the place."""
    if not 0 <= index < size or any(len(x) != 32 for x in (leaf, *path)):
        raise BadProof("the index is outside the tree, or a hash is not 32 bytes")
    inner = (index ^ (size - 1)).bit_length()
    if len(path) != inner + (index >> inner).bit_count():
        raise BadProof("the proof has another length than its place in the tree")
    found = leaf
    for level, sibling in enumerate(path):
        left = level < inner and not index >> level & 1
        found = node_hash(found, sibling) if left else node_hash(sibling, found)
    return found


def check_inclusion(index: int, size: int, leaf: bytes, path: Sequence[bytes], root: bytes) -> None:
    """BadProof unless the leaf stands at this index of the tree."""
    if root_from_inclusion(index, size, leaf, path) != root:
        raise BadProof("the proof leads to another root")


def check_consistency(old: int, size: int, old_root: bytes, root: bytes, path: Sequence[bytes]) -> None:
    """BadProof unless the tree (size, root) extends (old, old_root). `old` = 0 is refused: it proves nothing."""
    if not 0 < old <= size or any(len(x) != 32 for x in (old_root, root, *path)):
        raise BadProof("the sizes do not follow each other, or a hash is not 32 bytes")
    if old == size:
        if path or old_root != root:
            raise BadProof("one size: the roots must be equal and the proof empty")
        return
    shift = (old & -old).bit_length() - 1
    inner = ((old - 1) ^ (size - 1)).bit_length()
    border = ((old - 1) >> inner).bit_count()
    nodes = [old_root, *path] if old == 1 << shift else list(path)
    if len(nodes) != 1 + inner - shift + border:
        raise BadProof("the proof has another length than its place in the tree")
    older = newer = nodes[0]
    for level, sibling in enumerate(nodes[1:]):
        if level < inner - shift and not (old - 1) >> shift >> level & 1:
            newer = node_hash(newer, sibling)
        else:
            older, newer = node_hash(sibling, older), node_hash(sibling, newer)
    if older != old_root or newer != root:
        raise BadProof("the proof leads to another root")


# ---- the tenants' heads ------------------------------------------------------------------------------------------------

EMPTY: Final = bytes(32)
Heads = Mapping[str, tuple[int, str]]
"""Of one tenant: chain -> (records in it, leaf of the last one in hex)."""


def map_key(tenant: str) -> bytes:
    """Where a tenant stands in the map."""
    return hashlib.sha256(tenant.encode()).digest()


def map_leaf(tenant: str, heads: Heads) -> bytes:
    """The leaf that commits a tenant's heads in all chains."""
    listed = [[log, count, leaf] for log, (count, leaf) in sorted(heads.items())]
    return hashlib.sha256(b"\2" + map_key(tenant) + encode_plain(listed)).digest()


def _inner(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\3" + left + right).digest()


def _bit(key: bytes, depth: int) -> int:
    return key[depth >> 3] >> (7 - (depth & 7)) & 1


@dataclass(slots=True)
class _Leaf:
    key: bytes
    hash: bytes


@dataclass(slots=True)
class _Node:
    below: list[_Node | _Leaf | None]
    hash: bytes = EMPTY

    def rehash(self) -> None:
        self.hash = _inner(*(EMPTY if x is None else x.hash for x in self.below))


class TenantMap:
    """A sparse Merkle tree over SHA-256(tenant); a subtree of one leaf is that leaf, an empty one 32 zero bytes."""

    def __init__(self) -> None:
        self._top: _Node | _Leaf | None = None

    def root(self) -> bytes:
        """The commitment to every tenant's heads."""
        return EMPTY if self._top is None else self._top.hash

    def put(self, tenant: str, heads: Heads) -> None:
        """Set a tenant's heads. Leaves are never removed: a log only grows."""
        self._top = _put(self._top, _Leaf(map_key(tenant), map_leaf(tenant, heads)), 0)

    def proof(self, tenant: str) -> list[bytes]:
        """The siblings from the top down to this tenant's leaf; KeyError if it has none."""
        key, at = map_key(tenant), self._top
        path: list[bytes] = []
        while isinstance(at, _Node):
            side = _bit(key, len(path))
            other = at.below[1 - side]
            path.append(EMPTY if other is None else other.hash)
            at = at.below[side]
        if at is None or at.key != key:
            raise KeyError(tenant)
        return path


def _put(at: _Node | _Leaf | None, leaf: _Leaf, depth: int) -> _Node | _Leaf:
    if at is None or (isinstance(at, _Leaf) and at.key == leaf.key):
        return leaf
    if isinstance(at, _Leaf):
        node = _Node([None, None])
        node.below[_bit(at.key, depth)] = at
    else:
        node = at
    side = _bit(leaf.key, depth)
    node.below[side] = _put(node.below[side], leaf, depth + 1)
    node.rehash()
    return node


def check_map(tenant: str, heads: Heads, path: Sequence[bytes], root: bytes) -> None:
    """BadProof unless the map with this root commits exactly these heads of the tenant."""
    if len(path) > 256 or any(len(x) != 32 for x in path):
        raise BadProof("a map proof is at most 256 hashes of 32 bytes")
    key, found = map_key(tenant), map_leaf(tenant, heads)
    for depth in reversed(range(len(path))):
        found = _inner(path[depth], found) if _bit(key, depth) else _inner(found, path[depth])
    if found != root:
        raise BadProof("the proof leads to another map root")
