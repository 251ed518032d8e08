"""The strict JSON reader alone: what it refuses, how fast, and that it never tells what it saw (W-01, W-02, W-04)."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.protocols.strict_json import Invalid, Malformed, convert, loads

BAD = [
    b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"-0", b"9" * 5_000, b'"\\ud800"', b'{"\\udfff":1}', b"\xff",
    b"\xef\xbb\xbf{}", '{"a":1}'.encode("utf-16"), '{"a":1}'.encode("utf-32"), b"{}x", b"", b" ", b"{", b"[" * 100_000,
    b'{"a":' * 50_000, b'{"a":1,}', b"{'a':1}", b"[1,2", b'"a', b"tru", b"\x00", b'"\x01"',
]  # fmt: skip


@pytest.mark.parametrize("body", BAD, ids=range(len(BAD)))
def test_W_01_what_has_no_one_meaning_is_refused(body: bytes) -> None:
    with pytest.raises(Malformed):
        loads(body)


@pytest.mark.parametrize("body", [b'{"a":1,"a":1}', b'{"a":{"b":1,"b":2}}', b'[{"a":1,"\\u0061":2}]'])
def test_W_02_names_must_not_repeat(body: bytes) -> None:
    with pytest.raises(Invalid, match="duplicate_name"):
        loads(body)


SIMPLE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(alphabet="abc", min_size=1), inner, max_size=4),
    max_leaves=10,
)


@given(SIMPLE)
def test_what_json_writes_is_read_back(value: Any) -> None:
    assert loads(json.dumps(value).encode()) == value
    assert loads(json.dumps(value, ensure_ascii=False).encode()) == value


@given(st.binary(max_size=200))
def test_bytes_never_raise_anything_else(body: bytes) -> None:
    try:
        read = loads(body)
    except (Malformed, Invalid):
        return
    assert loads(json.dumps(read).encode()) == read, "what was accepted is JSON"


FLOODS = {
    "depth 100k": b"[" * 100_000 + b"]" * 100_000,
    "1e6 tiny strings": b"[" + b'"",' * 1_000_000 + b'""]',
    "1 MB name": b'{"' + b"n" * 1_000_000 + b'":1}',
    "1e6 tiny objects": b"[" + b"{}," * 1_000_000 + b"{}]",
}


@pytest.mark.parametrize("name", sorted(FLOODS))
def test_W_04_floods_cost_neither_time_nor_memory(name: str) -> None:
    class Body(msgspec.Struct, forbid_unknown_fields=True):
        plaintext: str

    best = 1.0
    for _ in range(5):
        begun = time.thread_time()  # of this thread: others may use the machine
        with pytest.raises((Malformed, Invalid)):
            convert(loads(FLOODS[name]), Body)
        best = min(best, time.thread_time() - begun)
    assert best < 0.05, f"{name}: {best * 1e3:.0f} ms"


def test_W_04_the_largest_flood_takes_less_than_20_mb() -> None:
    script = (
        "import resource\n"
        "from service.protocols.strict_json import Malformed, Invalid, loads\n"
        "body = b'[' + b'\"\",' * 1_000_000 + b'\"\"]'\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    loads(body)\nexcept (Malformed, Invalid):\n    pass\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20_000


class Inner(msgspec.Struct, forbid_unknown_fields=True):
    code: str


class Outer(msgspec.Struct, forbid_unknown_fields=True):
    plaintext: str
    reason: Inner | None = None
    items: list[int] = []
    context: dict[str, str] = {}


@pytest.mark.parametrize(
    ("value", "pointer", "code"),
    [
        ({}, "/plaintext", "required"),
        ({"plaintext": 5}, "/plaintext", "wrong_type"),
        ({"plaintext": "SECRET", "MARK": 1}, "", "unknown_field"),
        ({"plaintext": "x", "reason": {"code": 1}}, "/reason/code", "wrong_type"),
        ({"plaintext": "x", "reason": {}}, "/reason/code", "required"),
        ({"plaintext": "x", "items": [1, "SECRET"]}, "/items/1", "wrong_type"),
        ({"plaintext": "x", "context": {"SECRET": 1}}, "/context/*", "wrong_type"),
    ],
)
def test_L_02_errors_name_the_field_and_never_the_value(value: Any, pointer: str, code: str) -> None:
    with pytest.raises(Invalid) as caught:
        convert(value, Outer)
    (error,) = caught.value.errors
    assert (error["pointer"], error["code"]) == (pointer, code)
    assert "SECRET" not in str(error)
    assert "MARK" not in str(error)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 16 + "]" * 16,
        '{"a":[' * 8 + "]}" * 8,
        '[{"a":"[[[[[[[[[[[[[[[[["},"\\"]{{{{{{{{{{{{{{{{{"]',
        "[[],[],{}]" * 1,
    ],
)
def test_nesting_up_to_the_bound_is_read_and_brackets_in_texts_do_not_count(text: str) -> None:
    assert loads(text.encode()) == json.loads(text)


@pytest.mark.parametrize("text", ["[" * 17 + "]" * 17, '{"a":[' * 9 + "]}" * 9, "[" * 16 + '{"a":1},[{}]' + "]" * 16])
def test_nesting_beyond_the_bound_is_malformed(text: str) -> None:
    assert json.loads(text) is not None
    with pytest.raises(Malformed):
        loads(text.encode())
