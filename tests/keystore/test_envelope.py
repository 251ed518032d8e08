"""The ciphertext format: vectors, the parser's one form, and that every change of anything fails alike."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import random
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st
from keystore_lab import Lab, fingerprint

from keystore import (
    ContextRefused,
    Envelope,
    InvalidCiphertext,
    Key,
    KeySpec,
    Purpose,
    context_of,
    from_text,
    inspect,
    to_text,
)
from keystore import envelope as ev
from vectors import make_envelope

VECTORS_FILE = Path(make_envelope.__file__).with_name("envelope.json")
VECTORS: list[dict[str, Any]] = json.loads(VECTORS_FILE.read_text())["vectors"]
SUITES = ("single", "strict", "batch", "imported", "imported batch")


def new_of(lab: Lab, suite: str) -> Key:
    """A key whose single calls or batches make envelopes of this suite."""
    return lab.imported() if suite.startswith("imported") else lab.new(suite=2 if suite == "strict" else 1)


def sealed_as(lab: Lab, suite: str, data: bytes, context: dict[str, str]) -> tuple[Key, bytes]:
    key = new_of(lab, suite)
    if not suite.endswith("batch"):
        return key, lab.store.seal(key, data, context).ciphertext
    with lab.store.batch() as batch:
        return key, batch.seal(key, data, context).ciphertext


def refusal(lab: Lab, key: Key, blob: bytes, context: dict[str, str], purpose: Purpose = Purpose.ENCRYPT) -> str:
    """The one error, as a caller could tell it apart; AssertionError if the envelope opens."""
    try:
        lab.store.open(key, Envelope.parse(blob), context, purpose=purpose)
    except Exception as error:  # the class is what is tested
        return f"{type(error).__name__}: {error}"
    raise AssertionError("opened")


def product_bytes(vector: dict[str, Any]) -> bytes:
    """The vector's envelope as the product's pure half makes it."""
    suite, key = int(vector["suite"], 16), bytes.fromhex(vector["key"])
    salt, iv, plaintext = (bytes.fromhex(vector[n]) for n in ("salt", "iv", "plaintext"))
    purpose = Purpose[vector["purpose"].upper()]
    facts = {"key_id": uuid.UUID(vector["key_id"]), "version": vector["version"], "suite": suite, "purpose": purpose}
    aad = ev.encode_aad(tenant=vector["tenant"], region=vector["region"], context=vector["context"], **facts)
    assert hashlib.sha256(aad).hexdigest() == vector["aad_sha256"]
    index = b"" if vector["index"] is None else vector["index"].to_bytes(4, "big")
    if suite == ev.STRICT:
        sealed = AESGCM(key).encrypt(iv, ev.COMMITMENT + plaintext, hashlib.sha256(aad).digest())
        return Envelope(suite, facts["key_id"], purpose, 7, b"", b"", iv, b"", sealed).to_bytes()
    prf = hmac.digest
    if suite in ev.BATCH_OF:
        derived = ev.single_keys(prf(key, ev.single_input(salt, aad, suite), ev.HASH_OF[suite]), suite)
    else:
        derived = ev.item_keys(prf(key, ev.batch_input(salt, suite), ev.HASH_OF[suite]), index, aad)
    commitment, sealed = ev.seal_with(derived, iv, plaintext, aad)
    return Envelope(suite, facts["key_id"], purpose, 7, salt, index, iv, commitment, sealed).to_bytes()


def test_the_stored_vectors_are_those_of_the_second_implementation() -> None:
    assert VECTORS_FILE.read_text() == make_envelope.text()


def test_the_published_vectors_are_among_them_bit_for_bit() -> None:
    made = {v["name"]: v for v in VECTORS}
    one, batch = made["published"], made["published-batch"]
    assert one["aad_sha256"] == "bff7bc529c4501c2f074aac6878ef2b9a70f1e91de4e55d8835f64fe42c66c48"
    assert one["envelope"].startswith("534b01000100112233445566778899aabbccddeeff01000007")
    assert one["envelope"].endswith(
        "7c63a0a2450d0734302890630a5eabcf357355144639d3bbec651bf4328076a5c7211be1d62c1efdbf00e98480c1a979639022d67c"
    )
    assert len(bytes.fromhex(one["envelope"])) == 122
    assert batch["envelope"].endswith(
        "6071872e6af35f987d51f2585d1ae98788d4ae127eb4d863ab37388350faa84d0dc3897c8551572f52345be96b2779d5f85dc32418"
    )
    digests = [fingerprint(bytes.fromhex(v["envelope"])) for v in (one, batch)]
    assert digests == [
        "578add4b3d3de93274454fff91dbe96ba5eeaf1c6bb42104f63cadf19e5b6a4d",
        "bb4b13f61786d91075e1c987ecd71846aee976abfd36e64bbe0f4b2914db5294",
    ]
    assert {(v["suite"], v["index"]) for v in VECTORS} >= {("0x0004", 0), ("0x0004", 3), ("0x0004", 499)}


@pytest.mark.parametrize("vector", VECTORS, ids=[v["name"] for v in VECTORS])
def test_the_product_makes_every_vector_and_parses_it_back(vector: dict[str, Any]) -> None:
    blob = bytes.fromhex(vector["envelope"])
    assert product_bytes(vector) == blob
    assert Envelope.parse(blob).to_bytes() == blob
    assert from_text(to_text(blob)) == blob
    opened = make_envelope.open_envelope(
        blob, bytes.fromhex(vector["key"]), vector["context"], tenant="acme", region="eu-de-1"
    )
    assert opened.hex() == vector["plaintext"]


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("purpose", [Purpose.ENCRYPT, Purpose.DATAKEY])
def test_the_second_implementation_opens_what_the_keystore_seals(lab: Lab, suite: str, purpose: Purpose) -> None:
    key, context, data = new_of(lab, suite), {"é": "1", "a": "🔑"}, os.urandom(32)
    clear = lab.hsm.hidden[-1]
    with lab.store.batch() as batch:
        sealer = batch if suite.endswith("batch") else lab.store
        blob = sealer.seal(key, data, context, purpose=purpose).ciphertext
    assert make_envelope.open_envelope(blob, clear, context, tenant="acme", region="eu-de-1") == data
    assert (
        len(blob) - len(data)
        == {"single": 117, "strict": 85, "batch": 121, "imported": 117, "imported batch": 121}[suite]
    )


@pytest.mark.parametrize("suite", SUITES)
def test_every_single_bit_every_truncation_and_every_addition_fails_alike(lab: Lab, suite: str) -> None:
    key, blob = sealed_as(lab, suite, b"hello", {"row": "42"})
    assert lab.store.open(key, Envelope.parse(blob), {"row": "42"}, purpose=Purpose.ENCRYPT) == b"hello"
    flipped = [blob[: i // 8] + bytes([blob[i // 8] ^ 1 << i % 8]) + blob[i // 8 + 1 :] for i in range(len(blob) * 8)]
    cut = [blob[:n] for n in range(len(blob))] + [blob + b"\0", b"\0" + blob, blob + blob]
    answers = {refusal(lab, key, bad, {"row": "42"}) for bad in flipped + cut}
    assert answers == {"InvalidCiphertext: "}


@pytest.mark.parametrize("suite", SUITES)
def test_another_context_tenant_region_key_version_or_purpose_fails_alike(lab: Lab, suite: str) -> None:
    context = {"row": "42", "table": "t"}
    key, blob = sealed_as(lab, suite, b"hello", context)
    contexts: list[dict[str, str]] = [
        {},
        {"row": "42"},
        {"row": "43", "table": "t"},
        {"row": "42", "tabl": "et"},
        {"row4": "2", "table": "t"},
        {"row": "t", "table": "42"},
        {**context, "x": ""},
        {"row": "42", "table": "T"},
        {"row": "42", "table": "\ud800"},
        {**context, "": ""},
        {**context, "a": "x" * 10_000},
    ]
    answers = {refusal(lab, key, blob, c) for c in contexts}
    answers |= {refusal(lab, key, blob, context, p) for p in Purpose if p is not Purpose.ENCRYPT}

    # The same material in the hands of another tenant, of another key, under another version: rows of a forger who
    # could make right MACs. In the same HSM, so that only the ciphertext itself can tell.
    lab.hsm.next_secret = lab.hsm.hidden[-1]
    if suite.startswith("imported"):  # one tenant imports one material once: the twin is the other tenant's
        twins = [lab.imported(material=lab.hsm.hidden[-1], tenant="evil")]
    else:
        twins = [lab.new(tenant="evil", suite=key.suite), lab.new(suite=key.suite)]
    for twin in twins:
        parsed = Envelope.parse(blob)
        relabelled = replace(parsed, key_id=twin.id).to_bytes()
        answers.add(refusal(lab, twin, relabelled, context))
        answers.add(refusal(lab, twin, blob, context))
    imported = suite.startswith("imported")
    second = lab.import_into(key, os.urandom(32)) if imported else lab.apply(lab.store.plan_rotate(key))
    answers.add(refusal(lab, second, replace(Envelope.parse(blob), version=2).to_bytes(), context))
    answers.add(refusal(lab, second, replace(Envelope.parse(blob), version=3).to_bytes(), context))
    assert answers == {"InvalidCiphertext: "}
    assert lab.store.open(second, Envelope.parse(blob), context, purpose=Purpose.ENCRYPT) == b"hello"


def test_the_region_is_bound_to_the_ciphertext() -> None:
    facts: dict[str, Any] = {"tenant": "acme", "key_id": uuid.UUID(int=1), "version": 1, "suite": 1}
    facts |= {"purpose": Purpose.ENCRYPT, "context": {}}
    assert ev.encode_aad(region="eu-de-1", **facts) != ev.encode_aad(region="eu-fr-1", **facts)


@pytest.mark.parametrize("purpose", [Purpose.ENCRYPT, Purpose.DATAKEY])
def test_data_and_data_keys_do_not_open_as_each_other(lab: Lab, purpose: Purpose) -> None:
    key = lab.new()
    other = Purpose.DATAKEY if purpose is Purpose.ENCRYPT else Purpose.ENCRYPT
    blob = lab.store.seal(key, bytes(32), {}, purpose=purpose).ciphertext
    assert lab.store.open(key, Envelope.parse(blob), {}, purpose=purpose) == bytes(32)
    assert refusal(lab, key, blob, {}, other) == "InvalidCiphertext: "
    forged = replace(Envelope.parse(blob), purpose=other).to_bytes()
    assert refusal(lab, key, forged, {}, other) == "InvalidCiphertext: "


def test_an_envelope_of_another_suite_than_its_keys_never_reaches_the_hsm(lab: Lab) -> None:
    single, strict, signing = lab.new(), lab.new(suite=2), lab.new(KeySpec.EC_P256)
    lab.store.find("acme", str(single.id))
    for key, other in ((single, strict), (strict, single), (signing, single)):
        blob = replace(Envelope.parse(lab.seal(other).ciphertext), key_id=key.id).to_bytes()
        before = dict(lab.hsm.calls)
        assert refusal(lab, key, blob, {}) == "InvalidCiphertext: "
        assert dict(lab.hsm.calls) == before


def test_one_text_form_only() -> None:
    blob = bytes.fromhex(VECTORS[0]["envelope"])
    for size in (len(blob), len(blob) + 1, len(blob) + 2):
        data = blob + bytes(size - len(blob))
        text = to_text(data)
        assert from_text(text) == data
        spellings = [text + "=", text + "==", text + "\n", " " + text, text.replace("skms", "SKMS"), text[:-1] + "é"]
        spellings += [text.replace("v1", "v2"), text[8:], "skms:v1:", "", text[:8] + "+" + text[9:]]
        alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
        if size % 3:  # unused bits of the last letter: another spelling of the same bytes
            spellings.append(text[:-1] + alphabet[alphabet.index(text[-1]) ^ 1])
        for bad in spellings:
            with pytest.raises(InvalidCiphertext):
                from_text(bad)


def parsed_again(data: bytes) -> bytes | None:
    """The bytes of what the parser made of `data`; None if it refused. Any other error passes through."""
    try:
        return Envelope.parse(data).to_bytes()
    except InvalidCiphertext:
        return None


def spelled_again(text: str) -> str | None:
    try:
        return to_text(from_text(text))
    except InvalidCiphertext:
        return None


def shapes() -> Iterator[bytes]:
    """Ciphertexts of every length 0..200: noise, noise after a right header, and a right one cut or padded."""
    noise = random.Random(14)
    for length in range(201):
        yield noise.randbytes(length)
        for vector in VECTORS[:3]:
            blob = bytes.fromhex(vector["envelope"])
            yield (blob[:25] + noise.randbytes(200))[:length]
            yield (blob + bytes(200))[:length]


def test_W_14_ciphertexts_of_every_length_to_200_give_one_error(lab: Lab) -> None:
    key = lab.new()
    for blob in shapes():
        if blob in {bytes.fromhex(v["envelope"]) for v in VECTORS[:3]}:
            continue
        assert refusal(lab, key, blob, {"row": "42"}) == "InvalidCiphertext: "


@given(st.binary(max_size=200))
def test_W_14_the_parser_answers_any_bytes_with_one_error_or_the_same_bytes(data: bytes) -> None:
    for blob in (data, b"SK\x01\x00\x01" + data, b"SK\x01\x00\x02" + data, b"SK\x01\x00\x04" + data):
        assert parsed_again(blob) in {blob, None}


@given(st.text(max_size=300))
def test_the_text_parser_never_raises_anything_else(text: str) -> None:
    for spelled in (text, "skms:v1:" + text):
        assert spelled_again(spelled) in {spelled, None}


@pytest.mark.parametrize("suite", [0, 3, 7, 0x11, 0x21, 0xF0, 0xFFFF])
def test_an_unknown_suite_is_refused(suite: int) -> None:
    blob = bytes.fromhex(VECTORS[0]["envelope"])
    with pytest.raises(InvalidCiphertext):
        Envelope.parse(blob[:3] + suite.to_bytes(2, "big") + blob[5:])


def test_plaintexts_end_at_64_kib_in_the_parser_too(lab: Lab) -> None:
    for suite in SUITES:
        key, blob = sealed_as(lab, suite, bytes(65_536), {})
        assert len(lab.store.open(key, Envelope.parse(from_text(to_text(blob))), {}, purpose=Purpose.ENCRYPT)) == 65_536
        with pytest.raises(InvalidCiphertext):
            Envelope.parse(blob + b"\0")


REFUSED: list[tuple[str, dict[str, str]]] = [
    ("empty_name", {"": "x"}),
    ("reserved_name", {"skms:aad": "x"}),
    ("not_nfc", {"name": "e\u0301"}),
    ("not_nfc", {"e\u0301": "value"}),
    ("lone_surrogate", {"name": "\ud800"}),
    ("lone_surrogate", {"\udfff": "value"}),
    ("too_many_pairs", {f"pair{i}": "" for i in range(129)}),
    ("too_large", {"n": "x" * 8_192}),
    ("too_large", {"é" * 100: "é" * 4_000}),
]


@pytest.mark.parametrize(("code", "context"), REFUSED, ids=[f"{c}-{i}" for i, (c, _) in enumerate(REFUSED)])
def test_what_may_not_be_bound_is_refused_without_naming_it(lab: Lab, code: str, context: dict[str, str]) -> None:
    key = lab.new()
    with pytest.raises(ContextRefused) as caught:
        lab.seal(key, context=context)
    assert (caught.value.pointer, caught.value.code) == ("/context", code)
    shown = str(caught.value) + caught.value.detail
    assert not any(len(t) > 1 and t in shown for pair in context.items() for t in pair)


def test_the_limits_themselves_are_allowed(lab: Lab) -> None:
    key = lab.new()
    for context in ({str(i): "" for i in range(128)}, {"n": "x" * 8_191}, {"\u00e9": "ok"}, {"v": ""}):
        blob = lab.seal(key, context=context).ciphertext
        assert lab.store.open(key, Envelope.parse(blob), context, purpose=Purpose.ENCRYPT) == b"hello"


def test_a_name_given_twice_is_refused() -> None:
    assert context_of([("a", "1"), ("b", "2")]) == {"a": "1", "b": "2"}
    with pytest.raises(ContextRefused):
        context_of([("a", "1"), ("a", "1")])


def test_opening_takes_a_context_as_given_even_if_it_could_not_be_sealed_today() -> None:
    key, context = make_envelope.KEYS[1], {"e\u0301": "skms:aad", "skms:aad": "x"}
    blob = make_envelope.seal(1, key, "encrypt", b"old", context, iv=make_envelope.IV, salt=make_envelope.SALT)
    facts = {"key_id": uuid.UUID(make_envelope.KEY_ID), "version": 7, "suite": 1, "purpose": Purpose.ENCRYPT}
    aad = ev.encode_aad(tenant="acme", region="eu-de-1", context=context, **facts)
    parsed = Envelope.parse(blob)
    derived = hmac.digest(key, ev.single_input(parsed.salt, aad), "sha512")
    assert ev.open_with(derived, parsed, aad) == b"old"


def test_the_order_of_pairs_does_not_matter_but_where_names_end_does(lab: Lab) -> None:
    key = lab.new()
    blob = lab.seal(key, context={"b": "2", "a": "1"}).ciphertext
    assert lab.store.open(key, Envelope.parse(blob), {"a": "1", "b": "2"}, purpose=Purpose.ENCRYPT) == b"hello"
    assert refusal(lab, key, blob, {"a": "1b", "": "2"}) == "InvalidCiphertext: "


def test_the_commitment_is_compared_before_the_tag() -> None:
    blob = bytes.fromhex(VECTORS[0]["envelope"])
    parsed = Envelope.parse(blob)
    with pytest.raises(InvalidCiphertext):
        ev.open_with(bytes(32) + bytes(32), parsed, b"")
    # A raw AES-GCM ciphertext opens under two keys; ours carries what only one key and AAD derive.
    assert ev.open_with(bytes(32) + b"c" * 32, two_keys(bytes(32), b"c" * 32), b"") == b"x"
    with pytest.raises(InvalidCiphertext):
        ev.open_with(bytes(32) + b"d" * 32, two_keys(bytes(32), b"c" * 32), b"")


@pytest.mark.parametrize("prefix", [bytes(31) + b"\1", b"\1" + bytes(31), b"x" * 32])
def test_a_strict_ciphertext_without_its_32_zero_bytes_is_refused(lab: Lab, prefix: bytes) -> None:
    key, iv = lab.new(suite=2), b"i" * 12
    facts: dict[str, Any] = {"tenant": "acme", "region": "eu-de-1", "key_id": key.id, "version": 1, "suite": 2}
    aad = hashlib.sha256(ev.encode_aad(**facts, purpose=Purpose.ENCRYPT, context={})).digest()
    for first, right in ((bytes(32), True), (prefix, False)):
        sealed = AESGCM(lab.hsm.secrets[-1]).encrypt(iv, first + b"hello", aad)
        blob = Envelope(2, key.id, Purpose.ENCRYPT, 1, b"", b"", iv, b"", sealed).to_bytes()
        if right:
            assert lab.store.open(key, Envelope.parse(blob), {}, purpose=Purpose.ENCRYPT) == b"hello"
        else:
            assert refusal(lab, key, blob, {}) == "InvalidCiphertext: "


def two_keys(key: bytes, commitment: bytes) -> Envelope:
    sealed = AESGCM(key).encrypt(bytes(12), b"x", b"")
    return Envelope(1, uuid.UUID(int=1), Purpose.ENCRYPT, 1, bytes(32), b"", bytes(12), commitment, sealed)


def test_inspect_reads_an_envelope_offline() -> None:
    for vector in VECTORS:
        blob = bytes.fromhex(vector["envelope"])
        for given_as in (blob, to_text(blob), to_text(blob) + "\n"):
            info = inspect(given_as)
            assert (info.suite, info.key_id, info.purpose) == (vector["suite"], vector["key_id"], vector["purpose"])
            assert (info.version, info.batch_index) == (7, vector["index"])
            assert info.plaintext_bytes == len(vector["plaintext"]) // 2
            assert (info.salt, info.iv) == (vector["salt"], vector["iv"])
    for bad in (b"", "", "skms:v1:AAAA", b"SK" * 100, "x" * 500):
        with pytest.raises(InvalidCiphertext):
            inspect(bad)


def test_ten_thousand_round_trips_of_random_sizes_and_contexts(lab: Lab) -> None:
    noise = random.Random(10_000)
    keys = [lab.new(), lab.new(suite=2)]
    letters = "abcXYZ09 -_/éß漢🔑\n\"'"
    with lab.store.batch() as batch:
        for _ in range(10_000):
            key, sealer = noise.choice(keys), noise.choice((lab.store, batch))
            size = noise.choice((0, 1, noise.randrange(64), noise.randrange(2_048), noise.randrange(65_537)))
            data = noise.randbytes(size)
            context = {
                "n" + "".join(noise.choices(letters, k=noise.randrange(8))): "".join(
                    noise.choices(letters, k=noise.randrange(20))
                )
                for _ in range(noise.randrange(5))
            }
            blob = sealer.seal(key, data, context).ciphertext
            assert (
                noise.choice((lab.store, batch)).open(key, Envelope.parse(blob), context, purpose=Purpose.ENCRYPT)
                == data
            )
