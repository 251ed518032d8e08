"""JSON read strictly: one meaning or none, bounded before it is parsed, and never echoed.

Refused: anything but UTF-8, doubled names, NaN and infinities, numbers beyond 64 bits, lone surrogates, depth, and
floods of tiny values (CVE-2025-6203, CVE-2025-59043). The counts are of bytes, so refusing costs no parse.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final, TypeVar

import msgspec

S = TypeVar("S", bound=msgspec.Struct)

MAX_DEPTH: Final = 16
MAX_VALUES: Final = 50_000
MAX_DIGITS: Final = 19
_NO_BRACKET: Final = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[^\[\]{}"]+', re.DOTALL)
_ONE_KIND: Final = bytes.maketrans(b"{}", b"[]")
_PATH: Final = re.compile(r" - at `(?:key in )?\$?(.*)`$")
_STEP: Final = re.compile(r"\.([A-Za-z_][A-Za-z0-9_]*)|\[(\d+|\.\.\.)\]")
_UNKNOWN: Final = re.compile(r"^Object contains unknown field")
_MISSING: Final = re.compile(r"^Object missing required field `([A-Za-z_]+)`")


class Malformed(Exception):
    """Not well-formed. `place` names a header or "body", never content."""

    def __init__(self, place: str = "body") -> None:
        super().__init__(f"{place} is not well-formed")
        self.place = place


class Invalid(Exception):
    """Well-formed, but not what the operation takes: JSON pointers with codes, never values."""

    def __init__(self, errors: list[dict[str, str]]) -> None:
        super().__init__(", ".join(f"{e['pointer']}: {e['code']}" for e in errors))
        self.errors = errors


class _Doubled(ValueError):
    pass


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Doubled
    return found


def _constant(_: str) -> Any:
    raise ValueError("not a JSON number")


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS or digits == "-0":
        raise ValueError("integer out of range")
    return int(digits)


def _float(digits: str) -> float:
    if len(digits) > 40:
        raise ValueError("number too long")
    value = float(digits)
    if value in {float("inf"), float("-inf")}:
        raise ValueError("number out of range")
    return value


def loads(body: bytes, *, max_depth: int = MAX_DEPTH, max_values: int = MAX_VALUES) -> Any:
    """The value of a JSON text; Malformed for anything else."""
    commas, opened = body.count(b","), body.count(b"[") + body.count(b"{")
    if commas + opened > max_values or body[:1] in {b"\xef", b"\xfe", b"\xff", b"\0"} or b"\0" in body:
        raise Malformed
    try:
        text = body.decode("utf-8")
        if opened > max_depth:
            _bound_depth(body, max_depth)
        value = json.loads(
            text, object_pairs_hook=_pairs, parse_constant=_constant, parse_int=_integer, parse_float=_float
        )
        if "\\u" in text:  # only an escape can bring a lone surrogate in
            json.dumps(value, ensure_ascii=False).encode()
    except _Doubled:
        raise Invalid([{"pointer": "", "code": "duplicate_name", "detail": "names must not repeat"}]) from None
    except (ValueError, RecursionError):
        raise Malformed from None
    return value


def _bound_depth(body: bytes, most: int) -> None:
    """Refuse nesting beyond `most` without recursion: what is left of the brackets when the innermost go, `most` times."""
    left = _NO_BRACKET.sub(b"", body).translate(_ONE_KIND)
    for _ in range(most):
        left = left.replace(b"[]", b"")
    if left:  # what does not fit together is refused by the parser as well
        raise ValueError("too deep")


def convert(value: Any, kind: type[S]) -> S:
    """The value as a Struct; Invalid names each wrong field by JSON pointer."""
    try:
        return msgspec.convert(value, kind, strict=True)
    except msgspec.ValidationError as error:
        raise Invalid([_explain(str(error))]) from None


def _explain(message: str) -> dict[str, str]:
    """msgspec's message as pointer, code and a detail of ours: its own text may name what the caller sent."""
    place = _PATH.search(message)
    pointer = "" if place is None else _pointer(place[1])
    if (missing := _MISSING.match(message)) is not None:
        return {"pointer": f"{pointer}/{missing[1]}", "code": "required", "detail": "this field is required"}
    if _UNKNOWN.match(message):
        return {"pointer": pointer, "code": "unknown_field", "detail": "the object has a field it must not have"}
    if message.startswith("Expected") and ", got" in message:
        return {"pointer": pointer, "code": "wrong_type", "detail": "another type is expected; see the API document"}
    return {"pointer": pointer, "code": "not_allowed", "detail": "the value is not allowed; see the API document"}


def _pointer(path: str) -> str:
    """msgspec's `.a[0].b` as `/a/0/b`; a map's own names are the caller's and are left out."""
    return "".join("/" + (name or ("*" if index == "..." else index)) for name, index in _STEP.findall(path))
