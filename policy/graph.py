"""The key graph: where the material of each key is usable, by whom it is wrapped, backed up and held in escrow.

Material of K under W is usable wherever W is, and so wherever whatever W is under is: the least fixed point over the edges,
so a cycle of keys that wrap each other is no special case. What is usable in a place is so by a path, which is named.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from policy.places import Registry

EdgeKind = Literal["wrap", "backup", "escrow", "derive"]
UNKNOWN: Final = "?"  # where a holder is that nobody placed: no name of the charter, so in no residency


class Edge(NamedTuple):
    """Whoever has the holder can use the material: it is wrapped under it, kept in it, or derived from it."""

    material: str
    holder: str
    kind: EdgeKind


@dataclass(frozen=True, slots=True)
class Bound:
    """What a key's owner allows: where its material may exist, and its tier (1 is the strictest)."""

    residency: frozenset[str]
    tier: int


class Leak(NamedTuple):
    """A place outside a key's residency in which its material is usable, and how it comes there."""

    key: str
    place: str
    path: str


class KeyGraph:
    """The graph, computed once; never changed. `places` is where holders themselves are."""

    def __init__(self, places: Mapping[str, frozenset[str]], edges: Iterable[Edge]) -> None:
        self._own = dict(places)
        self._edges = tuple(edges)
        under: dict[str, list[Edge]] = defaultdict(list)  # by holder
        held = {edge.material for edge in self._edges}
        for edge in self._edges:
            under[edge.holder].append(edge)
        self._usable: dict[str, set[str]] = {}
        self._by: dict[tuple[str, str], Edge] = {}  # of a node and a place: the edge by which it was found first
        waiting: deque[tuple[str, frozenset[str]]] = deque()
        for node in {*self._own, *under}:
            # A holder that nobody placed and that is under nothing could be anywhere.
            own = self._own.get(node) or (frozenset() if node in held else frozenset({UNKNOWN}))
            self._usable[node] = set(own)
            if own:
                waiting.append((node, frozenset(own)))
        while waiting:
            holder, new = waiting.popleft()
            for edge in under.get(holder, ()):
                known = self._usable.setdefault(edge.material, set())
                found = new - known
                if not found:
                    continue
                known |= found
                for place in found:
                    self._by[edge.material, place] = edge
                waiting.append((edge.material, found))

    def usable(self, node: str) -> frozenset[str]:
        """Where a node's material is usable, which is the `target` (K5) of what is moved under it; UNKNOWN for a stranger."""
        return frozenset(self._usable.get(node) or {UNKNOWN})

    def path(self, node: str, place: str) -> str:
        """How a node's material comes to be usable in a place, as people read it. ValueError if it is not."""
        if place not in self.usable(node):
            raise ValueError(f"{node} is not usable in {place}")
        told, at = [node], node
        while (edge := self._by.get((at, place))) is not None:  # each was found later than the one it leads to
            told.append(f"-{edge.kind}-> {edge.holder}")
            at = edge.holder
        return " ".join(told) + f" in {place}"

    def leaks(self, node: str, residency: frozenset[str]) -> tuple[Leak, ...]:
        """Each place outside a residency in which a node's material is usable."""
        outside = sorted(self.usable(node) - residency)
        return tuple(Leak(node, place, self.path(node, place)) for place in outside)

    def wrong(self, bounds: Mapping[str, Bound]) -> Iterator[tuple[str, str]]:
        """(key, what is wrong) of every key that its edges contradict: usable outside residency, or derived and wider or weaker.

        A key derived from one without bounds here has nothing to be compared with, which is wrong too.
        """
        for key, bound in bounds.items():
            for leak in self.leaks(key, bound.residency):
                yield key, f"usable outside its residency: {leak.path}"
        for edge in self._edges:
            if edge.kind == "derive":
                yield from ((edge.material, what) for what in _derived(edge, bounds))


def _derived(edge: Edge, bounds: Mapping[str, Bound]) -> Iterator[str]:
    child, parent = bounds.get(edge.material), bounds.get(edge.holder)
    if child is None or parent is None:
        yield f"derived from {edge.holder}, whose bounds or its own are unknown"
        return
    if not child.residency <= parent.residency:
        yield f"wider than {edge.holder}, from which it is derived: {', '.join(sorted(child.residency - parent.residency))}"
    if child.tier > parent.tier:
        yield f"weaker than {edge.holder}, from which it is derived: tier {child.tier} of {parent.tier}"


def root(region: str) -> str:
    """The node of a region's root KEK. No name in the charter has a colon."""
    return f"root:{region}"


def graph_of(registry: Registry, regions: Iterable[str], tokens: Mapping[str, str]) -> KeyGraph:
    """What holds the material of every key of these regions: HSMs, backup tokens, and the copies that the charter names.

    `tokens` are those that are stored away, by name, and their regions: where one is, the charter says, else its region.
    """
    copies = registry.copies
    places = {root(region): frozenset({region}) for region in regions}
    edges = []
    for name, about in copies.items():
        places[name] = registry.expand(about.places)
        edges.append(Edge(about.of if about.of in copies else root(about.of), name, about.kind))
    for name, region in tokens.items():
        places.setdefault(name, frozenset({region}))
        edges.append(Edge(root(region), name, "backup"))
    return KeyGraph(places, edges)
