"""The quick way through entries of the usual form takes nothing that the careful way would refuse."""

from __future__ import annotations

import random
import uuid

import pytest
from audit_lab import op
from hypothesis import given
from hypothesis import strategies as st

from audit import event
from audit.chain import Bad, Chain, Frontier, leaf_hash, tree_hash

IDENTITY = str(uuid.UUID(int=7))
FULL = op(
    "t1",
    actor="mtls:spiffe://a/b",
    authn="mtls",
    src="10.0.0.1",
    req=IDENTITY,
    creq="c-1",
    trace="0" * 32,
    x="00ff",
    key=IDENTITY,
    kver=1,
    kv=2,
    alg="aes",
    in_len=3,
    out_len=2**51,
    batch=IDENTITY,
    ctx={"a": "h1:" + "0" * 32, "b.c": "h12:" + "1" * 32},
    bi=0,
    dry=False,
    reason="r",
    rh="0" * 64,
    region="eu-de-1",
    creg="eu-fr-1",
    hsm="h:1",
    tier=1,
    why="x.y",
    rule=("a/b", "c@d"),
    us=12,
    pol="0" * 32,
    grant="g",
    exc="e",
    frz=1,
    appr=("a", "b"),
    ev="1" * 64,
    intent=IDENTITY,
)
RECORDS = [FULL, op(None), op("t2", why="late"), op("t1", ctx={"a": "h1:" + "0" * 32}), op("t1", rule=("r",), us=0)]
BODIES = [event.encode(record) for record in RECORDS]
TEXTS = [
    b'"',
    b"\\",
    b",",
    b":",
    b"{",
    b"}",
    b"[",
    b"]",
    b"0",
    b"9",
    b"-",
    b"\\u0061",
    b"\n",
    b" ",
    b"\x00",
    b"\x7f",
    b"\xc3\xa9",
    b"v",
]
TEXTS += [
    b"9007199254740991",
    b"9007199254740992",
    b"1.0",
    b"null",
    b"true",
    b'"kind":"op",',
    b'"v":1',
    b'"v":2',
    b'"dry":true,',
]


def mutated(body: bytes, chooser: random.Random) -> bytes:
    at, other = chooser.randrange(len(body)), chooser.choice(BODIES)
    to = min(len(body), at + chooser.choice([0, 0, 1, 1, 2, 9, 40]))
    begin = chooser.randrange(len(other))
    piece = other[begin : begin + chooser.choice([1, 5, 60])]
    return body[:at] + chooser.choice([*TEXTS, piece, body[at:to] * 2]) + body[to:]


def first_of(body: bytes, tenant: str | None, *, quick: bool) -> tuple[str, dict[str, tuple[int, str]]]:
    """What becomes of these bytes as the second entry of a chain: leaf of the head or the code, and the tenants' heads."""
    chain = Chain("kms.example/audit/n0-0")
    chain.append(BODIES[1], 1_790_000_000_000_000, None)
    made = chain.stage().append(body, 1_790_000_000_000_000, tenant)
    try:
        if not quick:
            chain.check(made)
        elif not chain.take_usual(chain.look([made], full=True), 0):
            return "odd", {}
    except Bad as bad:
        return bad.code, {}
    except event.UnknownVersion:
        pass
    return chain.previous, chain.tenants


@pytest.mark.parametrize("seed", range(3))
def test_what_the_quick_way_takes_the_careful_way_takes_alike(seed: int) -> None:
    chooser, taken = random.Random(seed), 0
    for _ in range(2_500):
        body = chooser.choice(BODIES)
        for _ in range(chooser.choice([0, 1, 1, 1, 2, 3])):
            body = mutated(body, chooser)
        tenant = chooser.choice(["t1", "t1", "t2", None])
        quick = first_of(body, tenant, quick=True)
        if quick[0] != "odd":
            taken += 1
            assert quick == first_of(body, tenant, quick=False), body
    assert taken > 100


@pytest.mark.parametrize("body", BODIES)
def test_usual_records_go_the_quick_way(body: bytes) -> None:
    tenant = event.tenant_of(event.decode(body))
    assert first_of(body, tenant, quick=True) == first_of(body, tenant, quick=False)


@pytest.mark.parametrize("names", ["ba", "aa", "bb", "aba"])
def test_names_out_of_order_or_doubled_are_for_the_careful_way(names: str) -> None:
    pairs = ",".join(f'"{name}":"h1:{"0" * 32}"' for name in names)
    body = BODIES[3].replace(b'{"a":"h1:' + b"0" * 32 + b'"}', f"{{{pairs}}}".encode())
    assert body != BODIES[3]
    assert first_of(body, "t1", quick=True)[0] == "odd"
    assert first_of(body, "t1", quick=False)[0] == "E_CANON"


@pytest.mark.parametrize("full", [True, False])
def test_a_wrong_frame_is_for_the_careful_way_and_what_stands_before_it_is_taken(full: bool) -> None:
    writer, entries = Chain("kms.example/audit/n0-0"), list[bytes]()
    for i in range(8):
        entries.append(writer.append(BODIES[3], 1_790_000_000_000_000 + i, "t1"))
    for n in range(1, 8):
        for old, new in ((b'"n":%d' % n, b'"n":9'), (b"n0-0", b"n0-1"), (b'"t":17', b'"t":16'), (b'"tn":', b'"tn":1')):
            chain, wrong = Chain("kms.example/audit/n0-0"), entries[n].replace(old, new, 1)
            chain.check(entries[0], full=full)
            taken = chain.take_usual(chain.look([*entries[1:n], wrong, *entries[n:]], full=full), 0)
            stopped = taken == n - 1
            assert chain.n == taken + 1
            assert stopped or (not full and b"tn" in old)
            careful = Chain("kms.example/audit/n0-0")
            for entry in entries[:n]:
                careful.check(entry, full=full)
            if stopped:
                assert (chain.previous, chain.t, chain.tenants) == (careful.previous, careful.t, careful.tenants)
                assert chain.frontier == careful.frontier


@given(st.lists(st.integers(0, 300), max_size=6), st.integers(0, 600))
def test_leaves_at_once_make_the_tree_that_they_make_one_by_one(sizes: list[int], base: int) -> None:
    leaves = [leaf_hash(i.to_bytes(4, "big")) for i in range(base, base + sum(sizes))]
    once, one_by_one, at = Frontier(base, [], base), Frontier(base, [], base), 0
    for size in sizes:
        once.extend(leaves[at : at + size])
        for leaf in leaves[at : at + size]:
            one_by_one.push(leaf)
        at += size
        assert once == one_by_one
    assert base or once.root() == tree_hash(leaves)
