"""Bytes and hashes: canonical encoding against another implementation, RFC 6962 trees, hostile entries."""

from __future__ import annotations

import hashlib
import json

import pytest
import rfc8785
from audit_lab import op
from hypothesis import given
from hypothesis import strategies as st

from audit import event
from audit.chain import Bad, Chain, Frontier, leaf_hash, node_hash, pack, tree_hash, unpack

TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20)
VALUE = st.recursive(
    st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.from_regex(r"\A[a-z]{1,5}\Z"), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.from_regex(r"\A[a-z]{1,5}\Z"), VALUE, max_size=4))
def test_the_encoding_is_rfc_8785_inside_its_profile(value: dict[str, object]) -> None:
    try:
        ours = event.encode_plain(value)
    except event.BadRecord:
        return  # nested too deep for the profile
    assert ours == rfc8785.dumps(value)


def test_rfc_6962_roots_of_the_reference_tree() -> None:
    data = ("", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f")
    roots = {
        1: "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        2: "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
        3: "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
        5: "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
        7: "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
        8: "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
    }
    leaves = [leaf_hash(bytes.fromhex(d)) for d in data]
    for size, root in roots.items():
        assert tree_hash(leaves[:size]).hex() == root
    assert Frontier().root() == hashlib.sha256(b"").digest()
    assert tree_hash(leaves[:2]) == node_hash(leaves[0], leaves[1])


def chain_of(count: int) -> list[bytes]:
    chain = Chain("kms.example/audit/n0-0")
    return [chain.append(event.encode(op(f"t{i % 3}")), 1_000 + i, f"t{i % 3}") for i in range(count)]


def first_bad(entries: list[bytes]) -> str:
    chain = Chain("kms.example/audit/n0-0")
    for entry in entries:
        try:
            chain.check(entry)
        except Bad as bad:
            return f"{bad.code} {bad.where.rsplit('/', 1)[1]}"
    return "intact"


def test_edits_deletions_swaps_and_spellings_are_named_with_their_place() -> None:
    entries = chain_of(40)
    edited = [*entries[:20], entries[20].replace(b'"ok"', b'"failed"'), *entries[21:]]
    assert first_bad(entries) == "intact"
    assert first_bad(edited) == "E_LINK 21"
    assert first_bad(entries[:20] + entries[21:]) == "E_SEQ 20"
    assert first_bad([*entries[:20], entries[21], entries[20], *entries[22:]]) == "E_SEQ 20"
    assert first_bad([*entries[:-1], entries[-1].replace(b'"out":"ok"', b'"out": "ok"')]) == "E_CANON 39"
    assert first_bad([*entries[:-1], entries[-1].replace(b'"tn":', b'"tm":')]) == "E_SCHEMA 39"
    other = Chain("kms.example/audit/n1-0").append(event.encode(op(None)), 1, None)
    assert first_bad([other]) == "E_ORIGIN 0"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ('{"kind":"mark","v":NaN}', "E_PARSE"),
        ('{"kind":"mark","v":1.0}', "E_CANON"),
        ('{"kind":"mark","v":-0}', "E_CANON"),
        ('{"kind":"mark","kind":"mark"}', "E_CANON"),
        ('{"kind":"\\u006dark"}', "E_CANON"),
        ('{"kind":' + "9" * 5_000 + "}", "E_CANON"),
        ("[" * 100_000, "E_PARSE"),
        ('{"kind":"mark","secret":1}', "E_SCHEMA"),
        ("{}", "E_SCHEMA"),
    ],
)
def test_hostile_records_end_as_codes(body: str, code: str) -> None:
    with pytest.raises(event.BadRecord) as caught:
        event.decode(body.encode())
    assert caught.value.code == code


def test_a_later_version_is_told_apart_from_a_forgery() -> None:
    record = json.loads(event.encode(op()))
    record |= {"v": 2, "novel": "field"}
    with pytest.raises(event.UnknownVersion):
        event.decode(event.encode_plain(record))


@given(st.lists(st.binary(max_size=300), max_size=20))
def test_bundles_come_apart_as_they_were_put_together(entries: list[bytes]) -> None:
    bundle = pack(entries)
    assert unpack(bundle) == entries
    if entries:
        with pytest.raises(ValueError, match="middle"):
            unpack(bundle[:-1] if bundle[-1:] and entries[-1] else bundle + b"\0\5x")


def test_A_tenant_link_shows_a_hidden_record() -> None:
    chain = Chain("kms.example/audit/n0-0")
    first = chain.append(event.encode(op("a")), 1, "a")
    forged = Chain("kms.example/audit/n0-0")
    forged.append(event.encode(op("a")), 1, "a")
    forged.tenants["a"] = (0, "0" * 64)  # as if the tenant had no record yet
    second = forged.append(event.encode(op("a")), 2, "a")
    assert first != second
    seen = Chain("kms.example/audit/n0-0")
    seen.check(first)
    seen.previous = forged_previous(second)
    with pytest.raises(Bad, match="E_TSEQ"):
        seen.check(second)


def forged_previous(entry: bytes) -> str:
    return str(json.loads(entry)["c"]["p"])


def test_L_09_equal_values_of_two_tenants_do_not_look_equal() -> None:
    context = {"row": "7", "odd name!": "7"}
    one, two = (event.hash_context(bytes([n]) * 32, 1, context) for n in (1, 2))
    assert one == event.hash_context(bytes([1]) * 32, 1, context)
    assert set(one.values()).isdisjoint(two.values())
    assert "odd name!" not in json.dumps(one)
