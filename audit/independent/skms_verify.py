#!/usr/bin/env python3
"""Check an exported audit log offline with nothing but Python's standard library and this one file.

    python3 skms_verify.py DIR --trust trust.txt [--receipts FILE] [--checkpoint FILE] [--policy FILE] [--json]

Shares no code with the service or with `skms-verify`, so that a mistake in one of them shows as a disagreement. It reads
the format alone: frames and records are matched by regular expressions that accept the one canonical spelling and nothing
else, and the signatures (RFC 8032, FIPS 186-5) are computed here. All data and keys are public: nothing in here has to
resist timing.

Exit status: 0 intact, 1 tampered (E_ codes), 2 cannot tell (U_ codes), 3 usage.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NoReturn

INTACT, TAMPERED, CANNOT_TELL, USAGE = 0, 1, 2, 3
ZERO: Final = "0" * 64
BUNDLE: Final = 256
MAX_INT: Final = 2**53 - 1
MAX_RECORD: Final = 32_768
DAY_US: Final = 86_400_000_000
_sha256 = hashlib.sha256


class Bad(Exception):
    """The first thing that is wrong with a log: code, place, cause."""

    def __init__(self, code: str, where: str, why: str) -> None:
        super().__init__(f"{code} {where}: {why}")
        self.code, self.where, self.why = code, where, why


class Unusable(Exception):
    """A file the auditor gave cannot be used: usage, not tampering."""


# ---- Ed25519 (RFC 8032) ----------------------------------------------------------------------------------------------

P: Final = 2**255 - 19
L: Final = 2**252 + 27742317777372353535851937790883648493
D: Final = -121665 * pow(121666, -1, P) % P
D2: Final = 2 * D % P
ROOT_M1: Final = pow(2, (P - 1) // 4, P)
Affine = tuple[int, int]
Extended = tuple[int, int, int, int]
Prepared = tuple[int, int, int]  # y + x, y - x, 2dxy


def _ed_decode(data: bytes) -> Affine | None:
    """A point from its 32 bytes (RFC 8032, 5.1.3); None if they encode none."""
    y = int.from_bytes(data, "little")
    sign, y = y >> 255, y & (2**255 - 1)
    if len(data) != 32 or y >= P:
        return None
    u, v = (y * y - 1) % P, (D * y * y + 1) % P
    x = u * v**3 * pow(u * v**7 % P, (P - 5) // 8, P) % P
    if v * x * x % P == P - u:
        x = x * ROOT_M1 % P
    if (v * x * x - u) % P or (x == 0 and sign):
        return None
    return (P - x if x & 1 != sign else x), y


def _ed_add(a: Extended, b: Prepared) -> Extended:
    x, y, z, t = a
    m, n, c, d = (y - x) * b[1] % P, (y + x) * b[0] % P, t * b[2] % P, z + z
    e, f, g, h = n - m, d - c, d + c, n + m
    return e * f % P, g * h % P, f * g % P, e * h % P


def _ed_prepare(points: list[Extended]) -> list[Prepared]:
    """Many points at once with one inversion (Montgomery)."""
    product, before = 1, []
    for point in points:
        before.append(product)
        product = product * point[2] % P
    inverse, made = pow(product, -1, P), []
    for point, left in zip(reversed(points), reversed(before), strict=True):
        z = inverse * left % P
        inverse = inverse * point[2] % P
        x, y = point[0] * z % P, point[1] * z % P
        made.append((y + x, y - x, D2 * x * y % P))
    return made[::-1]


class EdMultiples:
    """The multiples d * 2^(width * i) of one point: a multiplication is one addition per digit, none doubled."""

    def __init__(self, point: Affine, width: int) -> None:
        self.width, self.mask = width, (1 << width) - 1
        base: Extended = (point[0], point[1], 1, point[0] * point[1] % P)
        flat: list[Extended] = []
        for _ in range(-(-256 // width)):
            (step,) = _ed_prepare([base])
            for _ in range(self.mask):
                flat.append(base)
                base = _ed_add(base, step)
        ready = _ed_prepare(flat)
        self.rows = [ready[i : i + self.mask] for i in range(0, len(ready), self.mask)]

    def add_to(self, total: Extended, scalar: int) -> Extended:
        """total + scalar * point."""
        for row in self.rows:
            digit = scalar & self.mask
            if digit:
                total = _ed_add(total, row[digit - 1])
            scalar >>= self.width
        return total


ED_BASE: Final = _ed_decode((4 * pow(5, -1, P) % P).to_bytes(32, "little"))


def _width(uses: int) -> int:
    return 8 if uses > 800 else 4  # where the larger table pays for itself


@lru_cache(maxsize=2)
def _ed_base(width: int) -> EdMultiples:
    assert ED_BASE is not None
    return EdMultiples(ED_BASE, width)


class Ed25519:
    """A public key; `uses` is how often it will be asked, which decides how large a table is worth making."""

    def __init__(self, public: bytes, uses: int = 1) -> None:
        self.public, self.width = public, _width(uses)
        point = _ed_decode(public)
        self.minus = None if point is None else EdMultiples((P - point[0], point[1]), self.width)

    def verifies(self, signature: bytes, message: bytes) -> bool:
        """RFC 8032, 5.1.7 without cofactor: the encoding of sB - hA must be R."""
        s = int.from_bytes(signature[32:], "little")
        if self.minus is None or len(signature) != 64 or s >= L:
            return False
        h = int.from_bytes(hashlib.sha512(signature[:32] + self.public + message).digest(), "little") % L
        x, y, z, _ = self.minus.add_to(_ed_base(self.width).add_to((0, 1, 1, 0), s), h)
        inverse = pow(z, -1, P)
        x, y = x * inverse % P, y * inverse % P
        return (y | (x & 1) << 255).to_bytes(32, "little") == signature[:32]


# ---- ECDSA P-256 over SHA-256 (FIPS 186-5, SEC 1) ------------------------------------------------------------------------

Q: Final = 2**256 - 2**224 + 2**192 + 2**96 - 1
N: Final = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
B: Final = 0x5AC635D8AA3A93E7B3EBBD55769886BC651D06B0CC53B0F63BCE3C3E27D2604B
G: Final = (
    0x6B17D1F2E12C4247F8BCE6E563A440F277037D812DEB33A0F4A13945D898C296,
    0x4FE342E2FE1A7F9B8EE7EB4A7C0F9E162BCE33576B315ECECBB6406837BF51F5,
)
Jacobian = tuple[int, int, int]  # z = 0: the point at infinity


def _p_double(a: Jacobian) -> Jacobian:
    x, y, z = a
    delta, gamma = z * z % Q, y * y % Q
    beta, alpha = x * gamma % Q, 3 * (x - delta) * (x + delta) % Q
    x3 = (alpha * alpha - 8 * beta) % Q
    return x3, (alpha * (4 * beta - x3) - 8 * gamma * gamma) % Q, 2 * y * z % Q


def _p_add(a: Jacobian, b: Affine) -> Jacobian:
    x, y, z = a
    if not z:
        return b[0], b[1], 1
    zz = z * z % Q
    h, r = (b[0] * zz - x) % Q, (b[1] * zz * z - y) % Q
    if not h:
        return (1, 1, 0) if r else _p_double(a)
    hh = h * h % Q
    hhh, v = h * hh % Q, x * hh % Q
    x3 = (r * r - hhh - 2 * v) % Q
    return x3, (r * (v - x3) - y * hhh) % Q, z * h % Q


def _p_affine(a: Jacobian) -> Affine:
    inverse = pow(a[2], -1, Q)
    square = inverse * inverse % Q
    return a[0] * square % Q, a[1] * square * inverse % Q


class PMultiples:
    """As EdMultiples, on P-256, by four bits."""

    def __init__(self, point: Affine) -> None:
        self.rows: list[list[Affine]] = []
        for _ in range(64):
            row, total = [], (point[0], point[1], 1)
            for _ in range(15):
                row.append(_p_affine(total))
                total = _p_add(total, point)
            self.rows.append(row)
            point = _p_affine(total)

    def add_to(self, total: Jacobian, scalar: int) -> Jacobian:
        """total + scalar * point."""
        for row in self.rows:
            if scalar & 15:
                total = _p_add(total, row[(scalar & 15) - 1])
            scalar >>= 4
        return total


@lru_cache(maxsize=1)
def _p_base() -> PMultiples:
    return PMultiples(G)


def _der_integers(data: bytes) -> tuple[int, int] | None:
    """r and s of a DER signature, in its one encoding."""
    found, at = [], 2
    if len(data) < 8 or data[0] != 0x30 or data[1] != len(data) - 2:
        return None
    for _ in range(2):
        if at + 2 > len(data) or data[at] != 0x02 or not 1 <= data[at + 1] <= 33:
            return None
        raw = data[at + 2 : at + 2 + data[at + 1]]
        if len(raw) != data[at + 1] or raw[0] & 0x80 or (len(raw) > 1 and not raw[0] and not raw[1] & 0x80):
            return None
        found.append(int.from_bytes(raw, "big"))
        at += 2 + len(raw)
    return (found[0], found[1]) if at == len(data) else None


class P256:
    """A public key on P-256."""

    def __init__(self, x: int, y: int) -> None:
        self.point = (x, y)
        self.table: PMultiples | None = None

    def verifies(self, signature: bytes, message: bytes) -> bool:
        """SEC 1, 4.1.4."""
        pair = _der_integers(signature)
        if pair is None or not 0 < pair[0] < N or not 0 < pair[1] < N or not _on_curve(*self.point):
            return False
        r, s = pair
        if self.table is None:
            self.table = PMultiples(self.point)
        e, w = int.from_bytes(_sha256(message).digest(), "big"), pow(s, -1, N)
        total = self.table.add_to(_p_base().add_to((1, 1, 0), e * w % N), r * w % N)
        return total[2] != 0 and _p_affine(total)[0] % N == r


def _on_curve(x: int, y: int) -> bool:
    return x < Q and y < Q and (y * y - x * x * x + 3 * x - B) % Q == 0


ED_SPKI: Final = bytes.fromhex("302a300506032b6570032100")
P_SPKI: Final = bytes.fromhex("3059301306072a8648ce3d020106082a8648ce3d03010703420004")
Key = Ed25519 | P256


def load_key(spki: bytes, uses: int = 1) -> Key:
    """The public key in a SubjectPublicKeyInfo; Unusable if it is of another kind."""
    if len(spki) == 44 and spki.startswith(ED_SPKI):
        return Ed25519(spki[12:], uses)
    if len(spki) == 91 and spki.startswith(P_SPKI):
        return P256(int.from_bytes(spki[27:59], "big"), int.from_bytes(spki[59:], "big"))
    raise Unusable("a trusted key is neither Ed25519 nor ECDSA P-256 (SubjectPublicKeyInfo)")


# ---- trees (RFC 6962) ------------------------------------------------------------------------------------------------


class Tree:
    """A growing tree: its root at any time, and the hashes its tiles hold."""

    def __init__(self) -> None:
        self.n = 0
        self.roots: list[bytes] = []
        self.levels: list[list[bytes]] = [[]]  # hashes of complete subtrees of 256^level leaves

    def push(self, leaf: bytes) -> None:
        """Append a leaf hash."""
        self.levels[0].append(leaf)
        self.n = k = self.n + 1
        height, roots = 0, self.roots
        while not k & 1:
            leaf = _sha256(b"\1" + roots.pop() + leaf).digest()
            k >>= 1
            height += 1
            if not height & 7:
                if height >> 3 == len(self.levels):
                    self.levels.append([])
                self.levels[height >> 3].append(leaf)
        roots.append(leaf)

    def root(self) -> bytes:
        """The root."""
        if not self.roots:
            return _sha256(b"").digest()
        found = self.roots[-1]
        for left in self.roots[-2::-1]:
            found = _sha256(b"\1" + left + found).digest()
        return found


def root_from_inclusion(index: int, size: int, leaf: bytes, path: list[bytes]) -> bytes | None:
    """The root that an audit path leads to (RFC 9162, 2.1.3.2); None if its length does not fit."""
    if not 0 <= index < size:
        return None
    fn, sn, found = index, size - 1, leaf
    for sibling in path:
        if sn == 0 or len(sibling) != 32:
            return None
        if fn & 1 or fn == sn:
            found = _sha256(b"\1" + sibling + found).digest()
            while not fn & 1 and fn:
                fn, sn = fn >> 1, sn >> 1
        else:
            found = _sha256(b"\1" + found + sibling).digest()
        fn, sn = fn >> 1, sn >> 1
    return found if sn == 0 else None


def consistent(old: int, size: int, old_root: bytes, root: bytes, path: list[bytes]) -> bool:
    """Whether a proof shows that one tree extends the other (RFC 9162, 2.1.4.2)."""
    if old == size:
        return not path and old > 0 and old_root == root
    if not 0 < old < size or not path or any(len(node) != 32 for node in path):
        return False
    nodes = [old_root, *path] if not old & (old - 1) else path
    fn, sn = old - 1, size - 1
    while fn & 1:
        fn, sn = fn >> 1, sn >> 1
    older = newer = nodes[0]
    for node in nodes[1:]:
        if sn == 0:
            return False
        if fn & 1 or fn == sn:
            older, newer = _sha256(b"\1" + node + older).digest(), _sha256(b"\1" + node + newer).digest()
            while not fn & 1 and fn:
                fn, sn = fn >> 1, sn >> 1
        else:
            newer = _sha256(b"\1" + newer + node).digest()
        fn, sn = fn >> 1, sn >> 1
    return sn == 0 and older == old_root and newer == root


# ---- records: the one canonical spelling of each kind, as a regular expression -------------------------------------------


def _below_2_53() -> str:
    """Decimal numbers from 0 to 2^53 - 1, without leading zeroes."""
    top = str(MAX_INT)
    less = [
        f"{top[:i]}[{'1' if i == 0 else '0'}-{int(top[i]) - 1}][0-9]{{{15 - i}}}" for i in range(16) if top[i] > "0"
    ]
    return "(?:0|[1-9][0-9]{0,14}|" + "|".join([*less, top]) + ")"


UINT: Final = _below_2_53()


def _quoted(pattern: str) -> str:
    return f'"{pattern}"'


def _list(pattern: str, most: int) -> str:
    return rf'\[(?:"{pattern}"(?:,"{pattern}"){{0,{most - 1}}})?\]'


HEX32, HEX64, HEX = _quoted("[0-9a-f]{32}"), _quoted("[0-9a-f]{64}"), _quoted("(?:[0-9a-f]{2}){1,2048}")
UUID: Final = "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
LOG: Final = "[a-z0-9][a-z0-9._/-]{0,127}"
CODE, PLACE = _quoted("[A-Za-z0-9._:-]{1,64}"), _quoted("[a-z0-9][a-z0-9._-]{0,62}")
_PLAIN = r"[ !#-\[\]-~]"  # printable ASCII that JSON does not escape
_CTX = '"[A-Za-z0-9_.:-]{1,64}":"h[0-9]{1,9}:[0-9a-f]{32}"'
BASE: Final = {"id": _quoted(UUID), "node": PLACE, "ts": UINT, "v": "1"}
ASKED: Final = {
    **BASE,
    "actor": rf'"(?:{_PLAIN}{{1,512}}|(?:{_PLAIN}|\\["\\]){{1,512}})"',
    "alg": CODE,
    "appr": _list("[A-Za-z0-9._:-]{1,64}", 16),
    "authn": '"(?:mtls|oidc|k8s|token|sigv4|vault|internal|none)"',
    "batch": _quoted(UUID),
    "bi": UINT,
    "creg": PLACE,
    "creq": _quoted("[A-Za-z0-9._:-]{1,128}"),
    "ctx": rf"(?P<ctx>\{{(?:{_CTX}(?:,{_CTX}){{0,127}})?\}})",
    "dest": _list("[a-z0-9][a-z0-9._-]{0,62}", 64),
    "dry": "(?:true|false)",
    "ev": HEX64,
    "exc": CODE,
    "facts": HEX32,
    "frz": UINT,
    "grant": CODE,
    "hops": _list("[A-Za-z0-9._:-]{1,64}", 16),
    "hsm": CODE,
    "in_len": UINT,
    "intent": _quoted(f"(?P<intent>{UUID})"),
    "key": _quoted(UUID),
    "kind": '"(?P<kind>op|intent|outcome|auth|admin|withheld)"',
    "kv": UINT,
    "kver": UINT,
    "op": '"(?P<op>[a-z][a-z0-9_]{0,63})"',
    "orig": _list("[a-z0-9][a-z0-9._-]{0,62}", 64),
    "out": '"(?P<out>ok|denied|failed|error)"',
    "out_len": UINT,
    "pol": HEX32,
    "purpose": _quoted("[a-z0-9][a-z0-9._-]{0,63}"),
    "reason": CODE,
    "region": PLACE,
    "req": _quoted(UUID),
    "rh": HEX64,
    "rule": _list("[A-Za-z0-9._:/@-]{1,128}", 8),
    "src": _quoted("[0-9a-f.:]{2,45}"),
    "tenant": '"(?P<tenant>[a-z0-9][a-z0-9._-]{0,63})"',
    "tier": UINT,
    "trace": HEX32,
    "us": UINT,
    "via": _list("[a-z0-9][a-z0-9._-]{0,62}", 64),
    "why": '"(?P<why>[A-Za-z0-9._:-]{1,64})"',
    "x": HEX,
}
NEEDS: Final = {
    "op": ("op", "out"),
    "intent": ("op",),
    "outcome": ("op", "out", "intent"),
    "auth": ("why",),
    "admin": ("op",),
    "withheld": ("intent",),
    "prune": ("op", "out"),
}
OTHERS: Final[dict[str, tuple[dict[str, str], set[str]]]] = {  # kind -> its fields, and which of them may be absent
    "open": (
        {
            "cert": '"(?P<cert>(?:[0-9a-f]{2}){1,2048})"',
            "cfg": HEX64,
            "clk": CODE,
            "dist": HEX64,
            "epoch": f"(?P<epoch>{UINT})",
            "pub": '"(?P<pub>[0-9a-f]{64})"',
            "ver": CODE,
        },
        set(),
    ),
    "close": ({"count": f"(?P<count>{UINT})", "epoch": f"(?P<epoch>{UINT})"}, set()),
    "mark": ({"root": rf'\[(?P<size>{UINT}),"(?P<root>[0-9a-f]{{64}})"\]'}, {"root"}),
    "suppressed": (
        {"count": UINT, "from": UINT, "src": _quoted("[0-9a-f.:]{2,45}"), "to": UINT, "why": CODE},
        {"src"},
    ),
    "clock": ({"now": UINT, "was": UINT}, set()),
    "prune": (
        {**ASKED, "at": UINT, "from": UINT, "hash": HEX64, "log": _quoted(LOG), "policy": CODE, "to": UINT},
        set(ASKED) - {*BASE, "kind"},
    ),
}


def _object(fields: dict[str, str], optional: set[str]) -> str:
    """An object with these fields in order, and `v`, which every record has, as the pivot of its commas."""
    made, seen = [], False
    for name in sorted(fields):
        member = f'"{name}":{fields[name]}'
        if name == "v":
            made.append(member)
            seen = True
            continue
        member = f",{member}" if seen else f"{member},"
        made.append(f"(?:{member})?" if name in optional else member)
    return r"\{" + "".join(made) + r"\}"


ASKED_RECORD: Final = re.compile(_object(ASKED, set(ASKED) - {*BASE, "kind"}).encode())
OTHER_RECORDS: Final = [
    re.compile(_object({**BASE, **fields, "kind": f'"(?P<kind>{kind})"'}, optional).encode())
    for kind, (fields, optional) in OTHERS.items()
]
CTX_NAME: Final = re.compile(rb'"([^"]+)":"')
# From the entry's time to its end, for the kinds that nearly all records are of.
FAST: Final = re.compile(
    rf'(?P<t>{UINT})(?:,"tn":(?P<tn>{UINT}),"tp":"(?P<tp>[0-9a-f]{{64}})")?\}},"r":'.encode()
    + ASKED_RECORD.pattern
    + rb"\}"
)
FRAME: Final = re.compile(
    rf'\{{"c":\{{"l":"({LOG})","n":({UINT}),"p":"([0-9a-f]{{64}})","t":({UINT})'
    rf'(?:,"tn":({UINT}),"tp":"([0-9a-f]{{64}})")?\}},"r":(\{{.*\}})\}}'.encode(),
    re.DOTALL,
)
Match = re.Match[bytes]


def _complete(found: Match) -> bool:
    """What a regular expression does not say: the fields a kind needs, and a context's names in order, once each."""
    kind = found["kind"].decode()
    return all(found[name] is not None for name in NEEDS[kind]) and (found["ctx"] is None or _in_order(found["ctx"]))


def _in_order(ctx: bytes) -> bool:
    names = CTX_NAME.findall(ctx)
    return names == sorted(set(names))


class Later(Exception):
    """A canonical record of a later version."""

    def __init__(self, tenant: bytes | None) -> None:
        super().__init__()
        self.tenant = tenant


def match_record(body: bytes, where: str) -> Match:
    """The record that these bytes spell; Bad E_PARSE, E_CANON or E_SCHEMA, or Later."""
    found = ASKED_RECORD.fullmatch(body)
    if found is not None and _complete(found):
        return found
    for pattern in OTHER_RECORDS:
        found = pattern.fullmatch(body)
        if found is not None and (found["kind"] != b"prune" or _complete(found)):
            return found
    raise refusal(body, where)


def refusal(body: bytes, where: str) -> Bad | Later:
    """What is wrong with bytes that are no record of version 1: no JSON, not canonical, later, or other fields."""
    try:
        value = json.loads(body.decode(), parse_constant=_reject, parse_float=lambda _: None, parse_int=_whole)
    except (ValueError, RecursionError) as error:
        return Bad("E_PARSE", where, f"the record is not JSON: {error}"[:200])
    if not _in_profile(value, 4):
        return Bad("E_CANON", where, "a value that has no place in a record, or nesting deeper than 4")
    try:
        again = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return Bad("E_CANON", where, "a lone surrogate")
    if again != body:
        return Bad("E_CANON", where, "the bytes are not the canonical encoding")
    if isinstance(value, dict):
        version, tenant = value.get("v"), value.get("tenant")
        if type(version) is int and version > 1 and (tenant is None or isinstance(tenant, str)):
            return Later(None if tenant is None else tenant.encode())
    return Bad("E_SCHEMA", where, "not a record of this version: a field is missing, unknown or out of bounds")


def _reject(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _whole(digits: str) -> int | None:
    return int(digits) if len(digits) <= 17 else None


def _in_profile(value: object, depth: int) -> bool:
    if isinstance(value, dict):
        return depth > 0 and all(k.isascii() and _in_profile(v, depth - 1) for k, v in value.items())
    if isinstance(value, list):
        return depth > 0 and all(_in_profile(v, depth - 1) for v in value)
    return type(value) in (str, bool) or (type(value) is int and abs(value) <= MAX_INT)


# ---- files of an export ----------------------------------------------------------------------------------------------


def tile_path(level: int | str, number: int, width: int) -> str:
    """C2SP tlog-tiles: `tile/0/x001/x234/067`, `.p/W` if it is not full."""
    groups = [f"{number % 1000:03d}"]
    while number := number // 1000:
        groups.insert(0, f"x{number % 1000:03d}")
    return f"tile/{level}/{'/'.join(groups)}" + ("" if width == BUNDLE else f".p/{width}")


def read_bundle(directory: Path, number: int, width: int, log: str) -> list[bytes]:
    """The entries of one bundle."""
    where, name = f"{log}/{number * BUNDLE}", tile_path("entries", number, width)
    try:
        data = (directory / name).read_bytes()
    except OSError:
        raise Bad("E_TRUNC", where, f"entry bundle {name} is missing") from None
    found, at, end = [], 0, len(data)
    while at < end:
        stop = at + 2 + (data[at] << 8 | data[at + 1] if at + 1 < end else end)
        found.append(data[at + 2 : stop])
        at = stop
    if at != end:
        raise Bad("E_PARSE", where, "a bundle ends in the middle of an entry")
    if len(found) != width:
        raise Bad("E_TRUNC", where, f"entry bundle holds {len(found)} entries, not {width}")
    return found


def check_tiles(directory: Path, tree: Tree, log: str) -> None:
    """Every hash tile of this tree, if the export holds hash tiles; Bad E_TRUNC or E_DERIVED."""
    if not (directory / "tile" / "0").is_dir():
        return
    for level, hashes in enumerate(tree.levels):
        for number in range(-(-len(hashes) // BUNDLE)):
            part = hashes[number * BUNDLE : (number + 1) * BUNDLE]
            name = tile_path(level, number, len(part))
            try:
                stored = (directory / name).read_bytes()
            except OSError:
                raise Bad("E_TRUNC", f"{log}/{name}", "the hash tile is missing") from None
            if stored != b"".join(part):
                raise Bad("E_DERIVED", f"{log}/{name}", "the hash tile differs from the entries")


# ---- one chain -------------------------------------------------------------------------------------------------------

SEAL: Final = re.compile(
    rf'\{{"day":({UINT}),"epoch":({UINT}),"first":({UINT}),"head":"((?:[0-9a-f]{{2}})+)","n":({UINT}),'
    rf'"seal":"((?:[0-9a-f]{{2}})+)","t":({UINT})\}}'.encode()
)
Seal = tuple[int, int, int, str, int, bytes, int]  # day, epoch, first, head, n, seal, t


def read_seals(directory: Path, log: str) -> list[Seal]:
    """The lines of seals.jsonl."""
    try:
        lines = (directory / "seals.jsonl").read_bytes().split(b"\n")
    except OSError:
        raise Bad("E_MISSING", f"{log}/0", "seals.jsonl is missing") from None
    last, found = lines.pop(), []
    for number, line in enumerate([*lines, last] if last else lines):
        match = SEAL.fullmatch(line)
        if match is None or (last and number == len(lines)):
            raise Bad("E_CANON", f"{log}/seal {number}", "a line of seals.jsonl is not one of ours")
        day, epoch, first, head, n, seal, t = match.groups()
        found.append((int(day), int(epoch), int(first), head.decode(), int(n), bytes.fromhex(seal.decode()), int(t)))
    return found


class Chain:
    """Checks one exported chain from its first record to its last."""

    def __init__(self, log: str, keys: list[Key], committed: dict[int, tuple[str, int]], wanted: Iterable[int]) -> None:
        self.log, self.keys = log, keys
        self.n, self.previous, self.t = 0, ZERO, 0
        self.tree = Tree()
        self.tenants: dict[bytes, tuple[int, str]] = {}
        self.committed, self.wanted = committed, set(wanted)  # size -> root, and the root log's entry that says so
        self._sizes = sorted(committed, reverse=True)
        self.moved: dict[int, dict[str, tuple[int, str]]] = {}  # committed size -> heads of the tenants that moved
        self.marks: list[tuple[int, int, str]] = []  # record number, and the size and root of the root log it saw
        self.leaves: dict[int, str] = {}  # of the records that are wanted
        self.later = 0
        self.good = False
        self._start = b'{"c":{"l":"%s","n":' % log.encode()
        self._touched: set[bytes] = set()
        self._epoch = self._opened = 0
        self._writer: Ed25519 | None = None
        self._closed = False

    def run(self, directory: Path) -> None:
        """Check everything; Bad at the first thing that is wrong."""
        seals = read_seals(directory, self.log)
        uses = Counter(seal[1] for seal in seals)
        entries = self._entries(directory, sum(seal[4] for seal in seals))
        for seal in seals:
            _, epoch, first, _, n, _, _ = seal
            where = f"{self.log}/{self.n}"
            if first != self.n:
                raise Bad("E_SEQ", where, f"batch begins at {first}")
            if n == 0:
                raise Bad("E_SCHEMA", where, "an empty batch")
            for _ in range(n):
                self._entry(next(entries), first, uses[epoch])
            self._columns(seal)
            self._hold()
        check_tiles(directory, self.tree, self.log)
        self.good = True

    def _entries(self, directory: Path, count: int) -> Iterator[bytes]:
        for number in range(-(-count // BUNDLE)):
            yield from read_bundle(directory, number, min(BUNDLE, count - number * BUNDLE), self.log)

    def _entry(self, entry: bytes, first: int, uses: int) -> None:
        start = b'%s%d,"p":"%s","t":' % (self._start, self.n, self.previous.encode())
        found = None
        if entry.startswith(start) and len(entry) <= MAX_RECORD:
            found = FAST.fullmatch(entry, len(start))
        if found is None:
            self._slowly(entry, first, uses)
            return
        t, tn, tp, ctx, _, kind, op, out, tenant, _ = found.groups()
        ordinary = (
            kind == b"op" and op is not None and out is not None
        )  # nearly every record; the table knows the others
        if not (ordinary or _complete(found)) or (ctx is not None and not _in_order(ctx)):
            self._slowly(entry, first, uses)
            return
        us = int(t)
        if us < self.t:
            raise Bad("E_TIME", f"{self.log}/{self.n}", f"time runs backwards by {self.t - us} us")
        self._take(entry, us, tenant, tn, tp)
        if self._closed:
            self._not_after_close(f"{self.log}/{self.n - 1}")

    def _slowly(self, entry: bytes, first: int, uses: int) -> None:
        """An entry that the fast path does not know: another kind, or something wrong."""
        at, where = self.n, f"{self.log}/{self.n}"
        frame = FRAME.fullmatch(entry)
        if frame is None:
            code = "E_SCHEMA" if entry.startswith(b'{"c":{') and entry.endswith(b"}") else "E_PARSE"
            raise Bad(code, where, "not an entry of this format")
        log, n, previous, t, tn, tp, body = frame.groups()
        if len(body) > MAX_RECORD:
            raise Bad("E_SCHEMA", where, "record too large")
        if log.decode() != self.log:
            raise Bad("E_ORIGIN", where, f"record belongs to {log.decode()}")
        if int(n) != self.n:
            raise Bad("E_SEQ", where, f"sequence number {int(n)}")
        if previous.decode() != self.previous:
            raise Bad("E_LINK", where, f"previous-hash does not match record {self.n - 1}")
        if int(t) < self.t:
            raise Bad("E_TIME", where, f"time runs backwards by {self.t - int(t)} us")
        before = self.previous
        try:
            record = match_record(body, where)
        except Later as later:
            self._take(entry, int(t), later.tenant, tn, tp)
            self.later += 1
            self._not_after_close(where)
            return
        kind = record["kind"].decode()
        self._take(entry, int(t), record["tenant"] if kind in NEEDS else None, tn, tp)
        if kind == "open":
            self._open(record, at, before, first, uses)
            return
        self._not_after_close(where)
        if kind == "close":
            if int(record["epoch"]) != self._epoch or int(record["count"]) != at - self._opened + 1:
                raise Bad("E_EPOCH", where, "close names another epoch or count")
            self._closed = True
        elif kind == "mark" and record["size"] is not None:
            self.marks.append((at, int(record["size"]), record["root"].decode()))

    def _not_after_close(self, where: str) -> None:
        if self._closed:
            raise Bad("E_EPOCH", where, f"record after the close of epoch {self._epoch}")

    def _take(self, entry: bytes, t: int, tenant: bytes | None, tn: bytes | None, tp: bytes | None) -> None:
        leaf = _sha256(b"\0" + entry).digest()
        self.tree.push(leaf)
        self.previous = spelled = leaf.hex()
        if tenant is not None:
            count, last = self.tenants.get(tenant, (0, ZERO))
            if tn is None or tp is None:
                raise Bad("E_SCHEMA", f"{self.log}/{self.n}", "a tenant's record carries tn and tp")
            if int(tn) != count:
                raise Bad("E_TSEQ", f"{self.log}/{self.n}", f"tenant sequence {int(tn)}, expected {count}")
            if tp.decode() != last:
                raise Bad("E_TLINK", f"{self.log}/{self.n}", f"does not follow the tenant's record {count - 1}")
            self.tenants[tenant] = (count + 1, spelled)
            self._touched.add(tenant)
        elif tn is not None:
            raise Bad("E_SCHEMA", f"{self.log}/{self.n}", "a record of no tenant carries tn and tp")
        if self.n in self.wanted:
            self.leaves[self.n] = spelled
        self.n += 1
        self.t = t

    def _hold(self) -> None:
        """Compare with what the root log committed, at the end of each group."""
        while self._sizes and self._sizes[-1] <= self.n:
            size = self._sizes.pop()
            root, seq = self.committed[size]
            if size != self.n or self.tree.root().hex() != root:
                raise Bad("E_ROOT", f"{self.log}/{size}", f"entry {seq} of the root log committed another root")
            self.moved[size] = {name.decode(): self.tenants[name] for name in self._touched}
            self._touched.clear()

    def _open(self, record: Match, at: int, before: str, first: int, uses: int) -> None:
        where, epoch, public = f"{self.log}/{at}", int(record["epoch"]), record["pub"].decode()
        statement = f"skms-audit-writer/v1\n{self.log}\n{epoch}\n{at}\n{before}\n{public}\n".encode()
        certificate = bytes.fromhex(record["cert"].decode())
        if not any(key.verifies(certificate, statement) for key in self.keys):
            raise Bad("E_CERT", where, "no trusted audit key certified this writer")
        if epoch <= self._epoch:
            raise Bad("E_EPOCH", where, f"epoch {epoch} after epoch {self._epoch}")
        if at != first:
            raise Bad("E_EPOCH", where, "a writer opens with a batch of its own")
        self._epoch, self._opened, self._closed = epoch, at, False
        self._writer = Ed25519(bytes.fromhex(public), uses)

    def _columns(self, seal: Seal) -> None:
        day, epoch, first, head, n, signature, t = seal
        where, last = f"{self.log}/{first}", f"{self.log}/{self.n - 1}"
        if self._writer is None:
            raise Bad("E_CERT", where, "no certified writer")
        if epoch != self._epoch:
            raise Bad("E_EPOCH", where, f"batch says epoch {epoch}, its writer's is {self._epoch}")
        for name, stored, computed in (("t", t, self.t), ("head", head, self.previous), ("day", day, self.t // DAY_US)):
            if stored != computed:
                raise Bad("E_DERIVED", last, f"stored column {name} differs from the entries")
        statement = f"skms-audit-seal/v1\n{self.log}\n{epoch}\n{first}\n{n}\n{self.previous}\n".encode()
        if not self._writer.verifies(signature, statement):
            raise Bad("E_SEAL", where, "not sealed by the certified writer of this epoch")


# ---- the map of the tenants' heads -----------------------------------------------------------------------------------


@dataclass(slots=True)
class _Branch:
    sides: list[_Branch | tuple[bytes, bytes] | None]  # a leaf is (key, hash)
    hash: bytes = bytes(32)


class TenantMap:
    """The sparse Merkle tree whose root each entry of the root log names."""

    def __init__(self) -> None:
        self.top: _Branch | tuple[bytes, bytes] | None = None
        self.heads: dict[str, dict[str, tuple[int, str]]] = {}

    def move(self, log: str, heads: dict[str, tuple[int, str]]) -> None:
        """Let these tenants' records in one chain end here."""
        for tenant, head in heads.items():
            of = self.heads.setdefault(tenant, {})
            of[log] = head
            key = _sha256(tenant.encode()).digest()
            listed = ",".join(f'["{name}",{count},"{leaf}"]' for name, (count, leaf) in sorted(of.items()))
            hashed = _sha256(b"\2" + key + f"[{listed}]".encode()).digest()
            self.top = self._put(self.top, key, hashed, 0)

    def _put(
        self, at: _Branch | tuple[bytes, bytes] | None, key: bytes, leaf: bytes, depth: int
    ) -> _Branch | tuple[bytes, bytes]:
        if at is None or (isinstance(at, tuple) and at[0] == key):
            return key, leaf
        if isinstance(at, tuple):
            branch = _Branch([None, None])
            branch.sides[_bit(at[0], depth)] = at
            at = branch
        side = _bit(key, depth)
        at.sides[side] = self._put(at.sides[side], key, leaf, depth + 1)
        at.hash = _sha256(b"\3" + self._hash(at.sides[0]) + self._hash(at.sides[1])).digest()
        return at

    @staticmethod
    def _hash(at: _Branch | tuple[bytes, bytes] | None) -> bytes:
        if at is None:
            return bytes(32)
        return at[1] if isinstance(at, tuple) else at.hash

    def root(self) -> str:
        """The root, in hex."""
        return self._hash(self.top).hex()


def _bit(key: bytes, depth: int) -> int:
    return key[depth >> 3] >> (7 - depth % 8) & 1


# ---- the root log ----------------------------------------------------------------------------------------------------


def _shard(group: str) -> str:
    """`[chain, size, root]`, its size not 0; `group` opens each value: to be captured or not."""
    return rf'\[{group}"{LOG}"),{group}(?!0){UINT}),{group}"[0-9a-f]{{64}}")\]'


HEADS: Final = re.compile(
    rf'\{{"epoch":({UINT}),"full":(true|false),"kind":"heads","shards":'
    rf'\[((?:{_shard("(?:")}(?:,{_shard("(?:")}){{0,255}})?)\],"tenants":"([0-9a-f]{{64}})","v":1\}}'.encode()
)
SHARD: Final = re.compile(_shard("(").encode())
GENERATION: Final = re.compile(r"(.*/audit)(?:/g([1-9][0-9]{0,8}))?")


def _fits(value: object, pattern: str) -> bool:
    return isinstance(value, str) and re.fullmatch(pattern, value, re.DOTALL) is not None


def _size_and(value: object, second: Callable[[object], bool]) -> bool:
    return isinstance(value, list) and len(value) == 2 and _is_uint(value[0]) and second(value[1])


def _is_uint(value: object) -> bool:
    return type(value) is int and value >= 0


RECOVER: Final = {"appr", "epoch", "full", "kind", "recovers", "shards", "tenants", "v"}
RECOVERS: Final = {"anchor", "anchored", "asked", "installation", "lost", "origin", "predecessor", "stands"}


def is_recovery(entry: dict[str, Any]) -> bool:
    """Whether canonical JSON is the entry that begins a generation: it commits nothing, and says what was lost."""
    if set(entry) != RECOVER:
        return False
    told, approvals = entry["recovers"], entry["appr"]
    if not isinstance(told, dict) or set(told) != RECOVERS:
        return False
    if not isinstance(approvals, list) or not all(isinstance(a, list) and len(a) == 2 for a in approvals):
        return False
    signed = all(_fits(a, "[A-Za-z0-9._:-]{1,64}") and _fits(b, "(?:[0-9a-f]{2}){1,2048}") for a, b in approvals)
    return (
        (entry["kind"], entry["shards"], entry["tenants"]) == ("recover", [], ZERO)
        and type(entry["full"]) is bool
        and type(entry["v"]) is int
        and entry["v"] == 1
        and _is_uint(entry["epoch"])
        and 2 <= len(approvals) <= 16
        and signed
        and len({a for a, _ in approvals}) == len(approvals)
        and _fits(told["anchor"], ".{1,1024}")
        and _fits(told["anchored"], ".{1,8192}")
        and _is_uint(told["asked"])
        and _fits(told["installation"], UUID)
        and _size_and(told["lost"], _is_uint)
        and _size_and(told["stands"], lambda root: _fits(root, "[0-9a-f]{64}"))
        and _fits(told["origin"], LOG)
        and _fits(told["predecessor"], LOG)
    )


CHAIN_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,127}")
NO_CHAIN: Final = re.compile(r"tile|g[0-9]+")


@dataclass(frozen=True, slots=True)
class Heads:
    """What one entry says: each listed chain's size and root, and the map's root."""

    seq: int
    shards: tuple[tuple[str, int, str], ...]
    tenants: str


class RootLog:
    """Checks the entries of the root log by themselves; what they say of the chains is compared afterwards."""

    def __init__(self, origin: str) -> None:
        self.origin = origin
        self.tree = Tree()
        self.previous, self.t, self.epoch = ZERO, 0, 0
        self.newest: dict[str, tuple[int, str]] = {}
        self.heads: list[Heads] = []
        self.roots: dict[int, bytes] = {0: self.tree.root()}  # size -> root
        self.later = 0
        self.complete = True  # whether every entry was readable

    def check(self, entry: bytes) -> None:
        """Check the next entry."""
        seq = self.tree.n
        where = f"{self.origin}/{seq}"
        frame = FRAME.fullmatch(entry)
        if frame is None:
            code = "E_SCHEMA" if entry.startswith(b'{"c":{') and entry.endswith(b"}") else "E_PARSE"
            raise Bad(code, where, "not an entry of this format")
        log, n, previous, t, tn, _, body = frame.groups()
        if len(body) > MAX_RECORD:
            raise Bad("E_SCHEMA", where, "record too large")
        if log.decode() != self.origin:
            raise Bad("E_ORIGIN", where, f"entry belongs to {log.decode()}")
        if int(n) != seq:
            raise Bad("E_SEQ", where, f"sequence number {int(n)}")
        if previous.decode() != self.previous:
            raise Bad("E_LINK", where, f"previous-hash does not match entry {seq - 1}")
        if int(t) < self.t:
            raise Bad("E_TIME", where, f"time runs backwards by {self.t - int(t)} us")
        if tn is not None:
            raise Bad("E_SCHEMA", where, "an entry of the root log belongs to no tenant")
        leaf = _sha256(b"\0" + entry).digest()
        self.tree.push(leaf)
        self.previous, self.t, self.roots[seq + 1] = leaf.hex(), int(t), self.tree.root()
        later = GENERATION.fullmatch(self.origin)
        begins = seq == 0 and later is not None and later[2] is not None
        found = HEADS.fullmatch(body)
        if found is None:
            problem = refusal(body, where)
            if isinstance(problem, Later):
                self.later += 1
            elif begins and problem.code == "E_SCHEMA" and is_recovery(json.loads(body)):
                self._begin(json.loads(body), where)
            else:
                raise problem
            return
        if begins:
            raise Bad("E_SCHEMA", where, "a generation after the first begins with a recover entry")
        epoch, full, listed, tenants = int(found[1]), found[2] == b"true", found[3], found[4].decode()
        if epoch < self.epoch:
            raise Bad("E_EPOCH", where, f"epoch {epoch} after epoch {self.epoch}")
        self.epoch = epoch
        shards = tuple(
            (name.decode().strip('"'), int(size), root.decode().strip('"'))
            for name, size, root in SHARD.findall(listed)
        )
        self._shards(shards, full, where)
        self.heads.append(Heads(seq, shards, tenants))

    def _begin(self, entry: dict[str, Any], where: str) -> None:
        """The first entry of a generation after the first: what was lost, and who approved it."""
        told = entry["recovers"]
        before = GENERATION.fullmatch(told["predecessor"])
        follows = before is not None and f"{before[1]}/g{int(before[2] or 1) + 1}" == self.origin
        if told["origin"] != self.origin or not follows:
            raise Bad("E_ORIGIN", where, f"opens {told['origin']} after {told['predecessor']}")
        self.epoch = entry["epoch"]
        self.heads.append(Heads(0, (), ZERO))

    def _shards(self, shards: tuple[tuple[str, int, str], ...], full: bool, where: str) -> None:
        names = [name for name, _, _ in shards]
        if names != sorted(set(names)):
            raise Bad("E_SCHEMA", where, "the chains are not listed once each and in order")
        for name, size, root in shards:
            if not name.startswith(f"{self.origin}/") or not CHAIN_NAME.fullmatch(name[len(self.origin) + 1 :]):
                raise Bad("E_ORIGIN", where, f"{name} is no chain of this log")
            before = self.newest.get(name, (0, ""))
            if size < before[0]:
                raise Bad("E_ROOTSEQ", where, f"{name} shrinks from {before[0]} to {size} records")
            if size == before[0] and root != before[1]:
                raise Bad("E_FORK", where, f"{name} has another root than before at {size} records")
        omitted = sorted(set(self.newest) - set(names))
        if full and omitted and len(self.newest) <= BUNDLE:
            raise Bad("E_ROOTSEQ", where, f"an entry that lists every chain omits {omitted[0]}")
        self.newest |= {name: (size, root) for name, size, root in shards}


def stored_size(directory: Path, log: str) -> int:
    """How many entries the root log's bundles hold: their names say it."""
    full = 0
    while (directory / tile_path("entries", full, BUNDLE)).is_file():
        full += 1
    partial = directory / tile_path("entries", full, BUNDLE + 1).rpartition("/")[0]
    widths = (
        [int(p.name) for p in partial.iterdir() if re.fullmatch(r"[1-9][0-9]{0,2}", p.name)] if partial.is_dir() else []
    )
    if any(width >= BUNDLE for width in widths):
        raise Bad("E_SCHEMA", f"{log}/{full * BUNDLE}", "a partial bundle of 256 entries or more")
    return full * BUNDLE + max(widths, default=0)


# ---- signed notes and checkpoints (C2SP) ---------------------------------------------------------------------------------


class BadNote(ValueError):
    """Not a note or checkpoint of this format, or falsely signed."""


def _base64(text: str) -> bytes:
    """Standard base64 in its one spelling."""
    try:
        found = base64.b64decode(text.encode("ascii"), validate=True)
    except ValueError:
        raise BadNote("not base64") from None
    if base64.b64encode(found).decode() != text:
        raise BadNote("not canonical base64")
    return found


def _is_name(name: str) -> bool:
    return bool(name) and "+" not in name and not any(c.isspace() or ord(c) < 32 for c in name)


@dataclass(frozen=True, slots=True)
class NoteKey:
    """A key that signs notes: the log's own (types 1 and 2) or a witness's (type 4)."""

    name: str
    id: bytes
    key: Key
    witness: bool

    def verifies(self, text: bytes, signature: bytes) -> bool:
        """Whether it signed this text; a cosignature carries its time (8 bytes) before the signature."""
        if not self.witness:
            return self.key.verifies(signature, text)
        if len(signature) != 72 or signature[0] & 0x80:
            return False
        seconds = int.from_bytes(signature[:8], "big")
        return self.key.verifies(signature[8:], b"cosignature/v1\ntime %d\n" % seconds + text)


def log_key(origin: str, spki: bytes, uses: int) -> NoteKey:
    """The note key of an audit key: its name is the origin."""
    key = load_key(spki, uses)
    if isinstance(key, P256):
        return NoteKey(origin, _sha256(spki).digest()[:4], key, witness=False)
    return NoteKey(origin, _sha256(origin.encode() + b"\n\x01" + key.public).digest()[:4], key, witness=False)


def parse_vkey(text: str) -> NoteKey:
    """A verifier key `name+id+base64(type || key)` of Ed25519, plain (1) or of a witness (4)."""
    parts = text.split("+", 2)
    if len(parts) != 3 or not _is_name(parts[0]):
        raise BadNote("not a verifier key: name+id+key")
    raw = _base64(parts[2])
    if len(raw) != 33 or raw[0] not in {1, 4}:
        raise BadNote("a verifier key of another type than Ed25519 or cosignature/v1")
    identity = _sha256(parts[0].encode() + b"\n" + raw).digest()[:4]
    if identity.hex() != parts[1]:
        raise BadNote("the verifier key's id is not that of its key")
    return NoteKey(parts[0], identity, Ed25519(raw[1:], 1), witness=raw[0] == 4)


def open_note(data: bytes, keys: Iterable[NoteKey]) -> tuple[bytes, list[NoteKey]]:
    """A note's text and which of these keys signed it; BadNote if it is no note or one of them signed falsely."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise BadNote("not UTF-8") from None
    if len(data) > 1_000_000 or any(c < " " and c != "\n" for c in text):
        raise BadNote("too large, or a control character")
    body, separator, below = text.rpartition("\n\n")
    if not separator or not below.endswith("\n"):
        raise BadNote("no signature lines after an empty line")
    lines = below[:-1].split("\n")
    if len(lines) > 64:
        raise BadNote("more than 64 signatures")
    signed, known, found = f"{body}\n".encode(), {(k.name, k.id): k for k in keys}, []
    signatures = []
    for line in lines:
        dash, name, encoded = [*line.split(" ", 2), "", ""][:3]
        raw = _base64(encoded) if dash == "\u2014" and _is_name(name) else b""
        if len(raw) < 5:
            raise BadNote("a line below the empty line is no signature")
        signatures.append((name, raw))
    for name, raw in signatures:
        key = known.get((name, raw[:4]))
        if key is not None:
            if not key.verifies(signed, raw[4:]):
                raise BadNote(f"the signature of {name} is false")
            if key not in found:
                found.append(key)
    return signed, found


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Size and root that the log signed, and the witnesses that signed too."""

    size: int
    root: bytes
    witnesses: frozenset[str]


_CHECKPOINT: Final = re.compile(rf"([^\n]+)\n({UINT})\n([A-Za-z0-9+/]{{43}}=)\n")


def open_checkpoint(data: bytes, trust: Trust) -> Checkpoint:
    """The checkpoint of the trusted origin in a note that one of its keys signed."""
    text, signers = open_note(data, [*trust.log_keys, *trust.witnesses.values()])
    if not any(key in trust.log_keys for key in signers):
        raise BadNote("no signature of a trusted audit key")
    found = _CHECKPOINT.fullmatch(text.decode())
    if found is None:
        raise BadNote("a checkpoint is three lines: origin, size, root")
    if found[1] != trust.origin:
        raise BadNote(f"a checkpoint of {found[1]}, not of {trust.origin}")
    present = frozenset(name for name, key in trust.witnesses.items() if key in signers)
    return Checkpoint(int(found[2]), _base64(found[3]), present)


# ---- what the auditor trusts -----------------------------------------------------------------------------------------


@dataclass(slots=True)
class Trust:
    """Origin, audit keys, witnesses by the auditor's names for them, and the rule how many must have signed."""

    origin: str
    spkis: list[bytes]
    witnesses: dict[str, NoteKey] = field(default_factory=dict)
    quorum: Callable[[frozenset[str]], bool] | None = None
    log_keys: list[NoteKey] = field(default_factory=list)


def _lines(path: Path, what: str) -> Iterator[tuple[str, list[str]]]:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise Unusable(f"{what} {path}: {error}") from None
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split("#")[0].split() if what == "trust file" else line.split()
        if words and not words[0].startswith("#"):
            yield f"{what} {path}, line {number}", words


def _witness(trust: Trust, where: str, name: str, vkey: str) -> None:
    try:
        key = parse_vkey(vkey)
    except BadNote as error:
        raise Unusable(f"{where}: {error}") from None
    if name in trust.witnesses or key in trust.witnesses.values():
        raise Unusable(f"{where}: a witness stands twice")
    trust.witnesses[name] = key


def _at_least(count: int, members: list[Callable[[frozenset[str]], bool]]) -> Callable[[frozenset[str]], bool]:
    return lambda signed: sum(member(signed) for member in members) >= count


def _is_in(name: str) -> Callable[[frozenset[str]], bool]:
    return lambda signed: name in signed


def load_trust(path: Path) -> Trust:
    """Lines `origin NAME`, `key BASE64SPKI`, `witness NAME VKEY`, `quorum K`; `#` begins a comment."""
    trust, quorum = Trust("", []), None
    for where, words in _lines(path, "trust file"):
        match words:
            case ["origin", name] if not trust.origin:
                trust.origin = name
            case ["key", text]:
                try:
                    trust.spkis.append(base64.b64decode(text, validate=True))
                except ValueError:
                    raise Unusable(f"{where}: not base64") from None
                load_key(trust.spkis[-1])
            case ["witness", name, vkey]:
                _witness(trust, where, name, vkey)
            case ["quorum", count] if quorum is None and re.fullmatch("[1-9][0-9]{0,2}", count):
                quorum = int(count)
            case _:
                raise Unusable(f"{where}: expected `origin`, `key`, `witness` or `quorum`")
    if not trust.origin or not trust.spkis:
        raise Unusable(f"trust file {path}: needs one origin and at least one key")
    if quorum is not None:
        if quorum > len(trust.witnesses):
            raise Unusable(f"trust file {path}: a quorum of {quorum} of {len(trust.witnesses)} witnesses")
        trust.quorum = _at_least(quorum, [_is_in(name) for name in trust.witnesses])
    return trust


def load_policy(path: Path, trust: Trust) -> None:
    """Take witnesses and quorum from a C2SP tlog-policy file; its log lines are left to the trust file."""
    trust.witnesses, trust.quorum = {}, None
    rules: dict[str, Callable[[frozenset[str]], bool]] = {}
    grouped: set[str] = set()
    decided = False
    for where, words in _lines(path, "policy"):
        match words:
            case ["log", _] | ["log", _, _]:
                pass
            case ["witness", name, vkey] | ["witness", name, vkey, _] if name not in rules and name != "none":
                _witness(trust, where, name, vkey)
                if not trust.witnesses[name].witness:
                    raise Unusable(f"{where}: a witness signs with a cosignature key (type 04)")
                rules[name] = _is_in(name)
            case ["group", name, count, *members] if name not in rules and name != "none" and members:
                if not set(members) <= set(rules) - grouped or len(set(members)) < len(members):
                    raise Unusable(f"{where}: a member is not known by then, or stands in a group already")
                grouped |= set(members)
                least = {"any": "1", "all": str(len(members))}.get(count, count)
                if not re.fullmatch("[1-9][0-9]{0,3}", least) or int(least) > len(members):
                    raise Unusable(f"{where}: a group needs any, all, or a number of its members")
                rules[name] = _at_least(int(least), [rules[m] for m in members])
            case ["quorum", name] if not decided and (name == "none" or name in rules):
                decided = True
                trust.quorum = None if name == "none" else rules[name]
            case _:
                raise Unusable(f"{where}: not a line of a tlog-policy")
    if not decided:
        raise Unusable(f"policy {path}: names no quorum")


RECEIPT: Final = re.compile(rf'log="([a-z0-9._/-]{{1,128}})", seq=({UINT}), leaf=:([A-Za-z0-9+/]{{43}}=):')


def load_receipts(path: Path) -> dict[str, dict[int, str]]:
    """`Audit-Receipt` values, one a line: chain -> number -> leaf."""
    found: dict[str, dict[int, str]] = {}
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Unusable(f"receipts {path}: {error}") from None
    for number, line in enumerate(lines, 1):
        text = re.sub(r"(?i)^audit-receipt:", "", line.strip()).strip()
        if not text:
            continue
        match = RECEIPT.fullmatch(text)
        if match is None:
            raise Unusable(f"receipts {path}, line {number}: not an Audit-Receipt value")
        leaf = base64.b64decode(match[3]).hex()
        if found.setdefault(match[1], {}).setdefault(int(match[2]), leaf) != leaf:
            where = f"{match[1]}/{match[2]}"
            raise Unusable(f"E_FORK {where}: two receipts name different records here, so two histories were told")
    return found


# ---- the whole export ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Report:
    """What was found, and how much was checked."""

    findings: list[tuple[str, str, str]] = field(default_factory=list)
    logs: dict[str, int] = field(default_factory=dict)
    roots: dict[str, str] = field(default_factory=dict)
    anchored: bool = False
    anchors: set[str] = field(default_factory=set)  # chains that a receipt speaks for

    def add(self, code: str, where: str, why: str) -> None:
        """Note a finding."""
        self.findings.append((code, where, why))

    @property
    def status(self) -> int:
        """The exit status."""
        if any(code.startswith("E_") for code, _, _ in self.findings):
            return TAMPERED
        return CANNOT_TELL if any(code.startswith("U_") for code, _, _ in self.findings) else INTACT


class Export:
    """One export, and everything that is checked of it."""

    def __init__(
        self, directory: Path, trust: Trust, receipts: dict[str, dict[int, str]], held: Checkpoint | None
    ) -> None:
        self.base, self.trust, self.receipts, self.held = directory / trust.origin, trust, receipts, held
        self.report = Report()
        self.root: RootLog | None = None
        self.chains: dict[str, Chain] = {}

    def check(self) -> Report:
        """Check root log, chains, their agreement, checkpoints, receipts."""
        origin, report = self.trust.origin, self.report
        root_findings = self._read_root()
        names = []
        if self.base.is_dir():
            names = sorted(p.name for p in self.base.iterdir() if p.is_dir() and not NO_CHAIN.fullmatch(p.name))
        logs = [f"{origin}/{name}" for name in names]
        for log in sorted(set(self.receipts) - set(logs)):
            report.add("E_MISSING", log, "a receipt knows this chain; the export lacks it")
        if not logs and not report.findings:
            report.add("E_MISSING", origin, "the export holds no chain of this origin")
        for log in logs:
            self._check_chain(log)
        for finding in root_findings:
            report.add(finding.code, finding.where, finding.why)
        if self.root is None:
            self._compare_marks(RootLog(origin))
        else:
            self._compare(self.root)
            self._compare_marks(self.root)
            if not root_findings and not self.root.later:
                self._compare_tenants(self.root)
        unanchored = [] if report.anchored else [log for log in logs if log not in report.anchors]
        report.anchored = report.anchored or (not unanchored and bool(report.anchors))
        for log in [] if report.anchored else unanchored if report.anchors else [origin]:
            report.add("U_NOANCHOR", log, "no receipt and no checkpoint of the auditor's: a cut end would not show")
        return report

    # ---- the root log and its checkpoints

    def _read_root(self) -> list[Bad]:
        """Check the root log and its checkpoints by themselves."""
        origin = self.trust.origin
        if not (self.base / "tile").is_dir() and not (self.base / "checkpoint").exists():
            if self.held is not None or self.trust.quorum is not None:
                return [Bad("E_MISSING", origin, "the export holds no root log")]
            return []
        self.root, found = RootLog(origin), []
        try:
            self._read_entries(self.root)
        except Bad as bad:
            found.append(bad)
        if self.root.later:
            self.report.add("U_VERSION", origin, f"{self.root.later} entries of a later version than 1")
        self.root.complete = not found
        try:
            self._read_checkpoints(self.root)
        except Bad as bad:
            found.append(bad)
        return found

    def _read_entries(self, root: RootLog) -> None:
        size = stored_size(self.base, root.origin)
        for number in range(-(-size // BUNDLE)):
            for entry in read_bundle(self.base, number, min(BUNDLE, size - number * BUNDLE), root.origin):
                root.check(entry)
        check_tiles(self.base, root.tree, root.origin)

    def _read_checkpoints(self, root: RootLog) -> None:
        """Open every signed note in order of size, and hold it against the root log."""
        lines, copy = self._read("checkpoints.jsonl").split(b"\n"), self._read("checkpoint")
        newest, note, cut = Checkpoint(-1, b"", frozenset()), b"", lines.pop()
        for number, line in enumerate([*lines, cut] if cut else lines):
            where = f"{root.origin}/checkpoints.jsonl {number}"
            if number == len(lines):
                raise Bad("E_CANON", where, "the last line is cut")
            note = _note_in(line, where)
            try:
                found = open_checkpoint(note, self.trust)
            except BadNote as error:
                raise Bad("E_SIG", where, str(error)) from None
            if found.size <= newest.size:
                raise Bad("E_SEQ", where, f"a checkpoint of {found.size} after one of {newest.size}")
            self._hold(root, found, "E_ROOT")
            newest = found
        if copy != note:
            raise Bad("E_DERIVED", f"{root.origin}/checkpoint", "not the newest note of checkpoints.jsonl")
        if self.held is not None:
            self._hold(root, self.held, "E_FORK")
            self.report.anchored = True
        if self.trust.quorum is not None and not self.trust.quorum(newest.witnesses):
            where = f"{root.origin}/{max(newest.size, 0)}"
            raise Bad("E_WITNESS", where, "the newest checkpoint lacks its quorum of witnesses")

    def _read(self, name: str) -> bytes:
        try:
            return (self.base / name).read_bytes()
        except OSError:
            raise Bad("E_MISSING", f"{self.trust.origin}/{name}", "the file is missing") from None

    def _hold(self, root: RootLog, found: Checkpoint, code: str) -> None:
        where = f"{root.origin}/{found.size}"
        if found.size in root.roots:
            if root.roots[found.size] != found.root:
                raise Bad(code, where, "a checkpoint of another root was signed")
        elif root.complete:
            raise Bad("E_TRUNC", f"{root.origin}/{root.tree.n}", f"a checkpoint of {found.size} entries was signed")

    # ---- chains, and what the root log says of them

    def _check_chain(self, log: str) -> None:
        report, wanted = self.report, self.receipts.get(log, {})
        committed: dict[int, tuple[str, int]] = {}
        for entry in [] if self.root is None else self.root.heads:
            for name, size, root in entry.shards:
                if name == log:
                    committed.setdefault(size, (root, entry.seq))
        chain = Chain(log, [key.key for key in self.trust.log_keys], committed, wanted)
        self.chains[log] = chain
        report.anchors |= {log} if wanted else set()
        if (self.base / log.rpartition("/")[2] / "pruned.json").exists():
            report.add("U_PRUNED", f"{log}/0", "begins in an archive: nothing of this chain is checked here")
            return
        try:
            chain.run(self.base / log.rpartition("/")[2])
        except Bad as bad:
            report.add(bad.code, bad.where, bad.why)
            report.logs[log] = chain.n
            return
        report.logs[log], report.roots[log] = chain.n, chain.tree.root().hex()
        if chain.later:
            report.add("U_VERSION", log, f"{chain.later} records of a later version than 1")
        for number, leaf in wanted.items():
            if number >= chain.n:
                report.add("E_TRUNC", f"{log}/{chain.n}", f"a receipt names record {number}")
            elif chain.leaves.get(number) != leaf:
                report.add("E_RECEIPT", f"{log}/{number}", "the record is not the one the receipt was given for")

    def _compare(self, root: RootLog) -> None:
        """Every chain that the root log names must be there, and as long."""
        for log, (size, _) in sorted(root.newest.items()):
            chain = self.chains.get(log)
            if chain is None:
                self.report.add("E_MISSING", log, f"the root log committed {size} records of it")
            elif chain.good and chain.n < size:
                self.report.add("E_TRUNC", f"{log}/{chain.n}", f"the root log committed {size} records")

    def _compare_marks(self, root: RootLog) -> None:
        """What records say they saw of the root log."""
        for log, chain in self.chains.items():
            for at, size, seen in chain.marks if chain.good else ():
                if not root.tree.n:
                    why = f"record {log}/{at} saw a checkpoint of {size} entries; no root log is here"
                    self.report.add("E_MISSING", root.origin, why)
                    return
                if size not in root.roots:
                    if root.complete:
                        why = f"record {log}/{at} saw a checkpoint of {size} entries"
                        self.report.add("E_TRUNC", f"{root.origin}/{root.tree.n}", why)
                        return
                elif root.roots[size].hex() != seen:
                    why = f"the record saw another root of the root log at {size} entries"
                    self.report.add("E_FORK", f"{log}/{at}", why)
                    return

    def _compare_tenants(self, root: RootLog) -> None:
        """The map of the tenants' heads at each entry of the root log, as far as the chains are good."""
        tenants = TenantMap()
        for entry in root.heads:
            for log, size, _ in entry.shards:
                chain = self.chains.get(log)
                if chain is None or size not in chain.moved:
                    return  # said already
                tenants.move(log, chain.moved[size])
            if tenants.root() != entry.tenants:
                where = f"{root.origin}/{entry.seq}"
                self.report.add("E_TMAP", where, "the map of the tenants' heads has another root")
                return


def _note_in(line: bytes, where: str) -> bytes:
    """The note in a line of checkpoints.jsonl."""
    try:
        row = json.loads(line.decode(), parse_float=lambda _: None, parse_int=_whole)
        again = json.dumps(row, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        good = again == line and set(row) in ({"at", "note"}, {"at", "note", "tst"}) and type(row["at"]) is int
        if good and all(isinstance(row[name], str) for name in set(row) - {"at"}):
            return str(row["note"]).encode()
    except (ValueError, TypeError, RecursionError):
        pass
    raise Bad("E_CANON", where, "not a line of checkpoints.jsonl")


def as_json(report: Report) -> str:
    """The report for machines, in the form that `skms-verify --json` has."""
    shown = {
        "verdict": {INTACT: "intact", TAMPERED: "tampered", CANNOT_TELL: "cannot tell"}[report.status],
        "records": sum(report.logs.values()),
        "logs": {log: {"records": n, "root": report.roots.get(log)} for log, n in report.logs.items()},
        "anchored": report.anchored,
        "findings": [{"code": code, "where": where, "why": why} for code, where, why in report.findings],
    }
    return json.dumps(shown, indent=2, sort_keys=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Check an exported audit log. Exit: 0 intact, 1 tampered, 2 cannot tell, 3 usage."
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="an export of `skms audit export`")
    parser.add_argument("--trust", type=Path, required=True, help="origin and audit keys, from the ceremony's report")
    parser.add_argument("--receipts", type=Path, help="Audit-Receipt values, one a line")
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint you kept from earlier")
    parser.add_argument("--policy", type=Path, help="witnesses and quorum, as a C2SP tlog-policy file")
    parser.add_argument("--accept-unanchored", action="store_true", help="be content with integrity alone")
    parser.add_argument("--json", action="store_true", help="report as JSON")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    try:
        given = _parser().parse_args(argv)
    except SystemExit as stop:
        return INTACT if stop.code in {0, None} else USAGE
    try:
        if not given.directory.is_dir():
            raise Unusable(f"{given.directory} is not a directory")
        trust = load_trust(given.trust)
        if given.policy is not None:
            load_policy(given.policy, trust)
        listed = given.directory / trust.origin / "checkpoints.jsonl"
        uses = listed.stat().st_size // 300 if listed.is_file() else 1
        trust.log_keys = [log_key(trust.origin, spki, uses) for spki in trust.spkis]
        receipts = {} if given.receipts is None else load_receipts(given.receipts)
        held = None
        if given.checkpoint is not None:
            try:
                held = open_checkpoint(given.checkpoint.read_bytes(), trust)
            except (OSError, BadNote) as error:
                raise Unusable(f"checkpoint {given.checkpoint}: {error}") from None
    except Unusable as error:
        print(f"skms_verify: {error}", file=sys.stderr)
        return USAGE
    report = Export(given.directory, trust, receipts, held).check()
    if given.accept_unanchored:
        report.findings = [f for f in report.findings if f[0] != "U_NOANCHOR"]
    if given.json:
        print(as_json(report))
        return report.status
    for code, where, why in report.findings:
        print(f"{code} {where}: {why}")
    if report.status == INTACT:
        for log, count in report.logs.items():
            print(f"intact {log}: {count} records, root {report.roots[log]}")
    return report.status


if __name__ == "__main__":
    sys.exit(main())
