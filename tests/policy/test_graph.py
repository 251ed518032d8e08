"""The key graph: where material is usable, by which path, and what contradicts a key's bounds."""

from __future__ import annotations

import itertools
import random
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from policy.bundle import SHIPPED
from policy.graph import UNKNOWN, Bound, Edge, KeyGraph, graph_of, root
from policy.places import Charter, Registry

DE, FR, US = frozenset({"eu-de-1"}), frozenset({"eu-fr-1"}), frozenset({"us-mkt-1"})


def charter(**copies: dict[str, Any]) -> Charter:
    read = yaml.safe_load((Path(SHIPPED) / "charter.yaml").read_text())
    return Charter.model_validate({**read, "copies": {name.replace("_", "-"): about for name, about in copies.items()}})


def test_a_chain_of_three_is_usable_where_its_end_is_and_says_how() -> None:
    edges = [Edge("key", "kek", "wrap"), Edge("kek", "root", "wrap"), Edge("root", "vault", "backup")]
    graph = KeyGraph({"root": DE, "vault": FR}, edges)
    assert graph.usable("key") == DE | FR
    assert graph.path("key", "eu-fr-1") == "key -wrap-> kek -wrap-> root -backup-> vault in eu-fr-1"
    assert graph.path("key", "eu-de-1") == "key -wrap-> kek -wrap-> root in eu-de-1"
    assert [leak.path for leak in graph.leaks("key", DE)] == [graph.path("key", "eu-fr-1")]
    assert graph.leaks("key", DE | FR) == ()


def test_material_does_not_flow_from_a_key_to_its_holder() -> None:
    graph = KeyGraph({"key": US, "root": DE}, [Edge("key", "root", "wrap")])
    assert graph.usable("root") == DE
    assert graph.usable("key") == DE | US


def test_keys_that_wrap_each_other_are_usable_wherever_one_of_them_is() -> None:
    edges = [Edge("a", "b", "wrap"), Edge("b", "c", "wrap"), Edge("c", "a", "wrap"), Edge("c", "far", "escrow")]
    graph = KeyGraph({"a": DE, "far": US}, edges)
    assert {graph.usable(node) for node in "abc"} == {DE | US}
    assert graph.path("a", "us-mkt-1") == "a -wrap-> b -wrap-> c -escrow-> far in us-mkt-1"
    assert graph.path("b", "eu-de-1") == "b -wrap-> c -wrap-> a in eu-de-1"
    itself = KeyGraph({"a": DE}, [Edge("a", "a", "wrap")])
    assert itself.path("a", "eu-de-1") == "a in eu-de-1"


def test_what_nobody_placed_is_in_no_residency() -> None:
    graph = KeyGraph({"root": DE}, [Edge("key", "root", "wrap"), Edge("root", "somewhere", "escrow")])
    assert graph.usable("key") == DE | {UNKNOWN}
    assert [leak.place for leak in graph.leaks("key", DE | FR | US)] == [UNKNOWN]
    assert graph.usable("a stranger") == {UNKNOWN}
    assert KeyGraph({"root": frozenset()}, []).usable("root") == {UNKNOWN}
    with pytest.raises(ValueError, match="not usable in us-mkt-1"):
        graph.path("key", "us-mkt-1")


def test_a_derived_key_is_no_wider_and_no_weaker() -> None:
    graph = KeyGraph({"parent": DE}, [Edge("child", "parent", "derive")])
    parent = Bound(DE | FR, 2)
    assert list(graph.wrong({"parent": parent, "child": Bound(DE, 1)})) == []
    wider, weaker = Bound(DE | US, 2), Bound(DE, 3)
    assert list(graph.wrong({"parent": parent, "child": wider})) == [
        ("child", "wider than parent, from which it is derived: us-mkt-1")
    ]
    assert list(graph.wrong({"parent": parent, "child": weaker})) == [
        ("child", "weaker than parent, from which it is derived: tier 3 of 2")
    ]
    assert list(graph.wrong({"child": Bound(DE, 2)})) == [
        ("child", "derived from parent, whose bounds or its own are unknown")
    ]
    elsewhere = list(graph.wrong({"parent": parent, "child": Bound(FR, 2)}))
    assert elsewhere == [("child", "usable outside its residency: child -derive-> parent in eu-de-1")]


def test_a_key_that_is_only_wrapped_is_not_held_to_its_holders_bounds() -> None:
    for kind in ("wrap", "backup", "escrow"):
        graph = KeyGraph({"kek": DE}, [Edge("key", "kek", kind)])
        assert list(graph.wrong({"kek": Bound(DE, 1), "key": Bound(DE | FR, 3)})) == []
        assert list(graph.wrong({"key": Bound(DE, 2)})) == []


NODES = [f"n{i}" for i in range(7)]


@given(
    st.dictionaries(st.sampled_from(NODES), st.sets(st.sampled_from("pqr"), min_size=1).map(frozenset)),
    st.lists(st.tuples(st.sampled_from(NODES), st.sampled_from(NODES)), max_size=14),
)
def test_it_is_what_walking_every_path_finds(places: dict[str, frozenset[str]], pairs: list[tuple[str, str]]) -> None:
    graph = KeyGraph(places, [Edge(a, b, "wrap") for a, b in pairs])
    materials = {a for a, _ in pairs}
    for node in {*places, *itertools.chain(*pairs)}:
        reached, waiting = {node}, [node]
        while waiting:
            at = waiting.pop()
            for a, b in pairs:
                if a == at and b not in reached:
                    reached.add(b)
                    waiting.append(b)
        found = set().union(*(places.get(n, () if n in materials else {UNKNOWN}) for n in reached))
        assert graph.usable(node) == (found or {UNKNOWN})
        for place in found:
            assert graph.path(node, place).endswith(f" in {place}")


@pytest.mark.alone
def test_ten_thousand_keys_take_less_than_a_second() -> None:
    chosen = random.Random(7)
    regions = [f"r{i}" for i in range(20)]
    places = {root(r): frozenset({r}) for r in regions} | {f"vault{i}": frozenset({r}) for i, r in enumerate(regions)}
    edges = [Edge(root(r), f"vault{i}", "backup") for i, r in enumerate(reversed(regions))]
    for i in range(10_000):
        under = f"k{chosen.randrange(i)}" if i and chosen.random() < 0.5 else root(chosen.choice(regions))
        edges.append(Edge(f"k{i}", under, "wrap"))
    edges += [Edge(f"k{chosen.randrange(10_000)}", f"k{chosen.randrange(10_000)}", "wrap") for _ in range(1_000)]
    begun = time.process_time()
    graph = KeyGraph(places, edges)
    bounds = {f"k{i}": Bound(frozenset({chosen.choice(regions)}), 2) for i in range(10_000)}
    wrong = list(graph.wrong(bounds))
    assert time.process_time() - begun < 1.0
    assert wrong


def test_the_charters_copies_and_the_backup_tokens_make_the_graph() -> None:
    copies = charter(
        vault={"kind": "backup", "of": "eu-de-1", "places": ["eu-de-2"]},
        notary={"kind": "escrow", "of": "vault", "places": ["FR"]},
    )
    graph = graph_of(Registry(copies, {}), ["eu-de-1", "no-1"], {"vault": "eu-de-1", "drawer": "no-1"})
    assert graph.usable(root("eu-de-1")) == {"eu-de-1", "eu-de-2", "eu-fr-1"}
    assert graph.path(root("eu-de-1"), "eu-fr-1") == "root:eu-de-1 -backup-> vault -escrow-> notary in eu-fr-1"
    assert graph.usable(root("no-1")) == {"no-1"}


@pytest.mark.parametrize(
    ("about", "reason"),
    [
        ({"kind": "backup", "of": "eu-xx-1", "places": ["DE"]}, "neither a region nor another copy"),
        ({"kind": "backup", "of": "eu-de-1", "places": ["Mars"]}, "no place, jurisdiction or group"),
        ({"kind": "backup", "of": "eu-de-1", "places": []}, "at least 1"),
        ({"kind": "rumour", "of": "eu-de-1", "places": ["DE"]}, "wrap"),
    ],
)
def test_a_charter_names_no_such_copy(about: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        charter(vault=about)
    with pytest.raises(ValidationError, match="no region's name"):
        charter(eu_de_2={"kind": "backup", "of": "eu-de-1", "places": ["DE"]})
