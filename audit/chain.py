"""The chain: entries, leaf hashes, tenant links, Merkle frontier, bundles, and the statements that are signed. Pure.

One hash per record is enough for everything: leaf = SHA-256(00 || entry) is the RFC 6962 leaf *and* what the next entry
names as its predecessor, so chain and tree cannot tell two stories (CVE-2022-36111). Each entry of a tenant also names
that tenant's previous one, from which a tenant can prove that nothing of its own is missing.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import re
from binascii import hexlify
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import load_der_public_key

from audit import event
from audit.event import MAX_INT, MAX_RECORD, BadRecord, Record, UnknownVersion, decode, in_order, tenant_of

_sha256 = hashlib.sha256
ZERO: Final = "0" * 64  # "no previous record"
MAX_ENTRY: Final = 65_535  # the length field of a tlog-tiles bundle
BUNDLE: Final = 256  # entries of a full tile bundle (C2SP tlog-tiles)
DAY_US: Final = 86_400_000_000
_UINT: Final = rb"(0|[1-9][0-9]{0,15})"
_LOG: Final = re.compile(r"[a-z0-9][a-z0-9._/-]{0,127}")
_FRAME: Final = re.compile(
    rb'\{"c":\{"l":"([a-z0-9][a-z0-9._/-]{0,127})","n":'
    + _UINT
    + rb',"p":"([0-9a-f]{64})","t":'
    + _UINT
    + rb'(?:,"tn":'
    + _UINT
    + rb',"tp":"([0-9a-f]{64})")?\},"r":(\{.*\})\}',
    re.DOTALL,
)
# What follows `"t":` in an entry that needs no closer look; numbers stay below 2^53 by their form.
_SMALL: Final = rb"(?:0|[1-8][0-9]{0,15}|9[0-9]{0,14})"
_TIME_AND_LINK: Final = b"(" + _SMALL + b')(,"tn":' + _SMALL + rb',"tp":"[0-9a-f]{64}")?\},"r":'
_LINKED: Final = re.compile(_TIME_AND_LINK + rb"\{.*\}\}", re.DOTALL)
_PLAIN: Final = re.compile(_TIME_AND_LINK + event.PLAIN_OPERATION + rb"\}")


class Bad(Exception):
    """The first thing that is wrong: a code, where (log/number), and the cause in words."""

    def __init__(self, code: str, where: str, why: str) -> None:
        super().__init__(f"{code} {where}: {why}")
        self.code, self.where, self.why = code, where, why


class Receipt(NamedTuple):
    """Where a record stands: chain, number in it, leaf hash. Durable before anybody sees it."""

    log: str
    seq: int
    leaf: bytes

    def header(self) -> str:
        """The value of `Audit-Receipt` (RFC 9651 dictionary)."""
        return f'log="{self.log}", seq={self.seq}, leaf=:{base64.b64encode(self.leaf).decode()}:'


def leaf_hash(entry: bytes) -> bytes:
    """RFC 6962 leaf."""
    return hashlib.sha256(b"\0" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """RFC 6962 inner node."""
    return hashlib.sha256(b"\1" + left + right).digest()


def pack(entries: Iterable[bytes]) -> bytes:
    """C2SP tlog-tiles entry bundle: a big-endian uint16 length before each entry."""
    return b"".join(len(e).to_bytes(2, "big") + e for e in entries)


def unpack(bundle: bytes) -> list[bytes]:
    """The entries of a bundle; ValueError if it is cut."""
    found, at, end = list[bytes](), 0, len(bundle)
    try:
        while at < end:
            to = at + 2 + (bundle[at] << 8 | bundle[at + 1])
            found.append(bundle[at + 2 : to])
            at = to
    except IndexError:
        at = -1
    if at != end:
        raise ValueError("a bundle ends in the middle of an entry")
    return found


@dataclass(slots=True)
class Frontier:
    """The roots of the full subtrees of a growing RFC 6962 tree: O(log n) state, one amortised hash per append.

    With a `base` it covers the leaves from there on only, until what stands before is known: so parts of one log can be
    hashed apart and joined.
    """

    n: int = 0
    roots: list[bytes] = field(default_factory=list)
    base: int = 0

    def push(self, leaf: bytes) -> None:
        """Append a leaf hash."""
        self._add(leaf, 1)

    def extend(self, leaves: Sequence[bytes]) -> None:
        """Append leaf hashes, level by level: half the cost of `push` for each."""
        hashes, width, at, right = list(leaves), 1, self.n, list[bytes]()
        while hashes:
            if at & width:  # the first one is a right child: of what stands before it, or of what is not known here
                if at - width >= self.base:
                    hashes.insert(0, self.roots.pop())
                    at -= width
                else:
                    self.roots.append(hashes.pop(0))
                    at += width
            if len(hashes) & 1:
                right.append(hashes.pop())
            pairs = iter(hashes)
            hashes = [_sha256(b"\1" + left + other).digest() for left, other in zip(pairs, pairs, strict=True)]
            width *= 2
        self.roots += reversed(right)
        self.n += len(leaves)

    def _add(self, root: bytes, width: int) -> None:
        """Append a full subtree of so many leaves."""
        self.n += width
        k = self.n // width
        while not k & 1 and self.n - 2 * width >= self.base:
            root, k, width = _sha256(b"\1" + self.roots.pop() + root).digest(), k >> 1, 2 * width
        self.roots.append(root)

    def copy(self) -> Frontier:
        """The same, to go on with apart."""
        return Frontier(self.n, list(self.roots), self.base)

    def join(self, right: Frontier) -> None:
        """Append the range that begins where this one ends; ValueError if it begins elsewhere."""
        if right.base != self.n:
            raise ValueError(f"a range from {right.base} on does not follow {self.n} leaves")
        at = right.base
        for root in right.roots:
            width = at & -at or 1 << right.n.bit_length()
            while at + width > right.n:
                width >>= 1
            self._add(root, width)
            at += width

    def root(self) -> bytes:
        """The tree's root; SHA-256 of nothing for the empty tree."""
        if not self.roots:
            return hashlib.sha256(b"").digest()
        found = self.roots[-1]
        for left in reversed(self.roots[:-1]):
            found = node_hash(left, found)
        return found


def tree_hash(leaves: Sequence[bytes]) -> bytes:
    """The root over leaf hashes."""
    f = Frontier()
    for leaf in leaves:
        f.push(leaf)
    return f.root()


# ---- what is signed ------------------------------------------------------------------------------------------------


def _statement(kind: str, *parts: object) -> bytes:
    return "\n".join([f"skms-audit-{kind}/v1", *map(str, parts), ""]).encode()


def writer_statement(log: str, epoch: int, n: int, previous: str, public: str) -> bytes:
    """What the HSM signs to certify a writer's key: it may seal this log from record n on, in this epoch."""
    return _statement("writer", log, epoch, n, previous, public)


def seal_statement(log: str, epoch: int, first: int, count: int, head: str) -> bytes:
    """What a writer signs over each commit group."""
    return _statement("seal", log, epoch, first, count, head)


def snapshot_statement(log: str, epoch: int, n: int, blob: bytes) -> bytes:
    """What a writer signs over a snapshot of the chain's state."""
    return _statement("snapshot", log, epoch, n, hashlib.sha256(blob).hexdigest())


def segment_statement(log: str, first: int, to: int, at: int, digest: str) -> bytes:
    """What the audit key signs over an archived segment: its records, and the SHA-256 of its manifest."""
    return _statement("segment", log, first, to, at, digest)


def check_signature(spki: bytes, signature: bytes, statement: bytes) -> bool:
    """Whether the audit key signed a statement: Ed25519, or ECDSA P-256 over SHA-256 (DER), by its SPKI."""
    public = load_der_public_key(spki)
    try:
        if isinstance(public, ed25519.Ed25519PublicKey):
            public.verify(signature, statement)
        elif isinstance(public, ec.EllipticCurvePublicKey) and isinstance(public.curve, ec.SECP256R1):
            public.verify(signature, statement, ec.ECDSA(hashes.SHA256()))
        else:
            return False
    except InvalidSignature:
        return False
    return True


def certified(keys: Sequence[bytes], signature: bytes, statement: bytes) -> bool:
    """Whether one of several audit keys signed a statement: each HSM of a group has its own."""
    return any(check_signature(key, signature, statement) for key in keys)


def check_seal(public: str, signature: bytes, statement: bytes) -> bool:
    """Whether the writer with this Ed25519 key (hex) signed a statement."""
    try:
        ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(signature, statement)
    except (InvalidSignature, ValueError):
        return False
    return True


# ---- the chain -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Frame:
    """One entry taken apart: what the sequencer wrote, and the record's bytes."""

    log: str
    n: int
    previous: str
    t: int
    tn: int | None
    tp: str | None
    body: bytes


def parse_frame(entry: bytes, where: str) -> Frame:
    """The frame of an entry; Bad E_PARSE or E_SCHEMA if it has none. No JSON parser."""
    if len(entry) > MAX_ENTRY:
        raise Bad("E_SCHEMA", where, "entry too large")
    match = _FRAME.fullmatch(entry)
    if match is None:
        code = "E_SCHEMA" if entry.startswith(b'{"c":{') and entry.endswith(b"}") else "E_PARSE"
        raise Bad(code, where, "not an entry of this format")
    log, n, previous, t, tn, tp, body = match.groups()
    if len(body) > MAX_RECORD:
        raise Bad("E_SCHEMA", where, "record too large")
    numbers = [int(n), int(t), *([] if tn is None else [int(tn)])]
    if any(number > MAX_INT for number in numbers):
        raise Bad("E_SCHEMA", where, "number beyond 2^53")
    return Frame(
        log.decode(),
        int(n),
        previous.decode(),
        int(t),
        None if tn is None else int(tn),
        None if tp is None else tp.decode(),
        body,
    )


@dataclass(frozen=True, slots=True)
class Look:
    """Entries seen once: their hashes, also in hexadecimal, and what was found in those of the usual form."""

    leaves: list[bytes]
    heads: list[bytes]
    found: Sequence[re.Match[bytes] | None]
    full: bool


class Chain:
    """The state of one chain: the same for the writer that appends and the verifier that checks."""

    def __init__(self, log: str) -> None:
        self.log, self.n, self.previous, self.t = log, 0, ZERO, 0
        self.frontier = Frontier()
        self.tenants: dict[str, tuple[int, str]] = {}  # tenant -> (records so far, leaf of its last one here)
        self.touched: set[str] | None = None  # if wanted: tenants whose head moved since this was last emptied
        self.learned: dict[str, tuple[int, int, str]] | None = None  # in the middle of a log: see `in_the_middle`
        self.assumed: tuple[str, int] | None = None  # likewise: previous, t
        self.leaves: list[bytes] | None = None  # if wanted: the leaf hashes since this was last emptied
        self._below: dict[str, tuple[int, str]] = {}

    @classmethod
    def in_the_middle(cls, log: str, n: int) -> Chain:
        """The state before entry n of a log, of which nothing is known: it is taken from the entries as they come.

        What was taken on trust is for the caller to compare with the state at the end of the part before: `assumed` by
        entry n, and `learned` by each tenant's first record, tenant -> (record number, tn, tp).
        """
        chain = cls(log)
        chain.n, chain.previous, chain.learned = n, "", {}
        chain.frontier = Frontier(n, [], n)
        return chain

    def head(self, tenant: str) -> tuple[int, str]:
        """(records so far, last leaf) of a tenant in this chain."""
        return self.tenants.get(tenant) or self._below.get(tenant) or (0, ZERO)

    def stage(self) -> Chain:
        """A copy to build one commit group on, adopted only after COMMIT. Costs O(log n), not O(tenants)."""
        staged = Chain(self.log)
        staged.n, staged.previous, staged.t = self.n, self.previous, self.t
        staged.frontier = Frontier(self.frontier.n, list(self.frontier.roots))
        staged._below = self.tenants
        return staged

    def adopt(self, staged: Chain) -> None:
        """Take over a committed stage."""
        self.n, self.previous, self.t, self.frontier = staged.n, staged.previous, staged.t, staged.frontier
        self.tenants.update(staged.tenants)

    def append(self, body: bytes, t: int, tenant: str | None) -> bytes:
        """Frame an encoded record: concatenation and one hash; time never runs backwards."""
        t = max(t, self.t)
        count, leaf = self.head(tenant) if tenant is not None else (0, ZERO)
        link = b"" if tenant is None else b',"tn":%d,"tp":"%s"' % (count, leaf.encode())
        c = b'"l":"%s","n":%d,"p":"%s","t":%d%s' % (self.log.encode(), self.n, self.previous.encode(), t, link)
        entry = b'{"c":{' + c + b'},"r":' + body + b"}"
        self._take(entry, t, tenant)
        return entry

    def check(self, entry: bytes, *, full: bool = True) -> Record | None:
        """Verify the next entry; its record, or None where only the links are checked.

        Bad names the code, this entry and the cause. UnknownVersion is raised after the links were checked.
        """
        where = f"{self.log}/{self.n}"
        frame = parse_frame(entry, where)
        if frame.log != self.log:
            raise Bad("E_ORIGIN", where, f"record belongs to {frame.log}")
        if frame.n != self.n:
            raise Bad("E_SEQ", where, f"sequence number {frame.n}")
        if not self.previous:
            self.assumed = frame.previous, frame.t
        elif frame.previous != self.previous:
            raise Bad("E_LINK", where, f"previous-hash does not match record {self.n - 1}")
        if frame.t < self.t:
            raise Bad("E_TIME", where, f"time runs backwards by {self.t - frame.t} us")
        record: Record | None = None
        tenant: str | None = None
        unknown: UnknownVersion | None = None
        if full:
            try:
                record = decode(frame.body)
                tenant = tenant_of(record)
            except BadRecord as bad:
                raise Bad(bad.code, where, str(bad)) from None
            except UnknownVersion as later:
                unknown, tenant = later, later.tenant
            self._check_tenant(frame, tenant, where)
        self._take(entry, frame.t, tenant)
        if unknown is not None:
            raise unknown
        return record

    def hash(self, entries: Iterable[bytes]) -> None:
        """Take in the next entries by their hashes alone: what they say is not looked at."""
        self._advance([_sha256(b"\0" + entry).digest() for entry in entries], self.t, {})

    def look(self, entries: Sequence[bytes], *, full: bool) -> Look:
        """See which of the next entries have the usual form, whatever their links to tenants and their times are."""
        leaves = [_sha256(b"\0" + entry).digest() for entry in entries]
        heads = list(map(hexlify, leaves))
        if not _LOG.fullmatch(self.log):
            return Look(leaves, heads, [None] * len(leaves), full)
        # What an entry begins with is known before it is read: each names the hash of the one before it.
        begin = b'{"c":{"l":"%b","n":%%d,"p":"%%b","t":' % self.log.encode()
        previous = itertools.chain([self.previous.encode() or b"?"], heads)
        begins = list(map(begin.__mod__, zip(itertools.count(self.n), previous)))
        begins.pop()
        form = _PLAIN.fullmatch if full else _LINKED.fullmatch
        found = list(map(form, entries, map(len, begins)))
        if not all(map(bytes.startswith, entries, begins)) or max(map(len, entries), default=0) > MAX_RECORD:
            rows = zip(entries, begins, found, strict=True)
            found = [f if e.startswith(b) and len(e) <= MAX_RECORD else None for e, b, f in rows]
        return Look(leaves, heads, found, full)

    def take_usual(self, look: Look, at: int) -> int:
        """Take in entries from one on, up to the first that needs a closer look: which it is.

        What is taken here `check` would take: the same rules for entries of the usual form, without an object for each.
        """
        t, moved, to = b"%d" % self.t, dict[bytes, tuple[int, bytes]](), at
        rows = zip(itertools.islice(look.found, at, None), itertools.islice(look.heads, at, None), strict=True)
        for found, leaf in rows:
            if found is None:
                break
            now = found[1]
            if now < t or len(now) != len(t):
                break
            if look.full:
                _, link, ctx, tenant = found.groups()
                if ctx is not None and not in_order(ctx):
                    break
                if tenant is not None:
                    head = moved.get(tenant) or self._known(tenant)
                    if head is None or link != b',"tn":%d,"tp":"%b"' % head:
                        break
                    moved[tenant] = head[0] + 1, leaf
                elif link is not None:
                    break
            t = now
            to += 1
        self._advance(look.leaves[at:to], int(t), moved)
        return to

    def _known(self, tenant: bytes) -> tuple[int, bytes] | None:
        """The head of a tenant as an entry names it; None if it is to be learned."""
        name = tenant.decode()
        if self.learned is not None and name not in self.tenants:
            return None
        count, leaf = self.head(name)
        return count, leaf.encode()

    def _advance(self, leaves: Sequence[bytes], t: int, heads: Mapping[bytes, tuple[int, bytes]]) -> None:
        if not leaves:
            return
        for tenant, (count, leaf) in heads.items():
            self.tenants[tenant.decode()] = count, leaf.decode()
            if self.touched is not None:
                self.touched.add(tenant.decode())
        self.frontier.extend(leaves)
        self.n, self.previous, self.t = self.n + len(leaves), leaves[-1].hex(), t
        if self.leaves is not None:
            self.leaves += leaves

    def _check_tenant(self, frame: Frame, tenant: str | None, where: str) -> None:
        if (tenant is None) != (frame.tn is None):
            raise Bad("E_SCHEMA", where, "a tenant's record carries tn and tp, any other carries neither")
        if tenant is None:
            return
        if self.learned is not None and tenant not in self.tenants and frame.tn is not None and frame.tp is not None:
            self.learned[tenant] = self.n, frame.tn, frame.tp
            self.tenants[tenant] = frame.tn, frame.tp
            return
        count, leaf = self.head(tenant)
        if frame.tn != count:
            raise Bad("E_TSEQ", where, f"tenant sequence {frame.tn}, expected {count}")
        if frame.tp != leaf:
            raise Bad("E_TLINK", where, f"does not follow the tenant's record {count - 1}")

    def _take(self, entry: bytes, t: int, tenant: str | None) -> None:
        leaf = leaf_hash(entry)
        if tenant is not None:
            self.tenants[tenant] = (self.head(tenant)[0] + 1, leaf.hex())
            if self.touched is not None:
                self.touched.add(tenant)
        self.frontier.push(leaf)
        self.n, self.previous, self.t = self.n + 1, leaf.hex(), t
        if self.leaves is not None:
            self.leaves.append(leaf)


def snapshot_of(chain: Chain) -> dict[str, object]:
    """The chain's state as plain values; canonical JSON of it is what a snapshot stores."""
    return {
        "frontier": [root.hex() for root in chain.frontier.roots],
        "log": chain.log,
        "n": chain.n,
        "p": chain.previous,
        "t": chain.t,
        "tenants": {name: [count, leaf] for name, (count, leaf) in sorted(chain.tenants.items())},
    }


def chain_of(state: dict[str, object]) -> Chain:
    """The chain a snapshot describes; ValueError, KeyError or TypeError if it describes none."""
    chain = Chain(str(state["log"]))
    n, t, roots, tenants = state["n"], state["t"], state["frontier"], state["tenants"]
    if type(n) is not int or type(t) is not int or not isinstance(roots, list) or not isinstance(tenants, dict):
        raise ValueError("snapshot")
    chain.n, chain.t, chain.previous = n, t, str(state["p"])
    chain.frontier = Frontier(n, [bytes.fromhex(r) for r in roots])
    if len(roots) != n.bit_count():
        raise ValueError("snapshot frontier")
    chain.tenants = {str(k): (int(v[0]), str(v[1])) for k, v in tenants.items()}
    return chain


# ---- batch by batch, writer after writer -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Batch:
    """One committed group with every stored column."""

    log: str
    first: int
    n: int
    epoch: int
    t: int
    entries: bytes
    head: bytes
    seal: bytes
    day: int
    apart: Sequence[bytes] | None = None  # the entries, where they are unpacked already: `entries` then is empty

    def unpacked(self) -> Sequence[bytes]:
        """The entries one by one; ValueError if the bundle is cut."""
        return unpack(self.entries) if self.apart is None else self.apart


Level = Literal["hash", "link", "full"]


@dataclass(frozen=True, slots=True)
class Reached:
    """The state at a size that was asked for: of a part, its own range, and the tenants' heads since the last such size."""

    frontier: Frontier
    previous: str
    t: int
    moved: dict[str, tuple[int, str]]


@dataclass(frozen=True, slots=True)
class Writer:
    """Who writes at a record: epoch, key (hex), and the record that opened the epoch."""

    epoch: int = 0
    key: str | None = None
    opened: int = 0


class Verifier:
    """Checks the batches of one chain in order: entries, links, epochs, certificates, seals, every stored column.

    Levels: `hash` recomputes leaves and roots alone, `link` also what the frames say, `full` all of it.
    """

    def __init__(self, log: str, audit_keys: Sequence[bytes], chain: Chain | None = None) -> None:
        self.chain = chain or Chain(log)
        self._keys = tuple(audit_keys)
        self.epoch = 0
        self.writer: str | None = None  # hex of the newest certified writer key
        self.unknown = 0  # records of a later version
        self.intents: dict[str, int] = {}  # open intents -> record number
        self.begun: dict[str, int] = {}  # open intents -> time of the record (us)
        self.marks: list[tuple[int, int, str]] = []  # (record number, size, root) of each checkpoint a mark names
        self.leaves_of: dict[int, str] = {}  # leaf of each wanted record
        self.wanted: frozenset[int] = frozenset()
        self.hand_on: Callable[[Sequence[bytes]], None] | None = None  # sees the leaf hashes of each batch
        self.sizes: list[int] = []  # at which a part notes its state, descending
        self.reached: list[Reached] = []
        self._settled: list[str] = []  # intents from before a part, whose outcome is in it
        self._base = (self.chain.n, Writer())
        self._opened = 0
        self._closed = False

    @classmethod
    def in_the_middle(cls, log: str, audit_keys: Sequence[bytes], n: int, writer: Writer) -> Verifier:
        """For a part of a log from record n on, which this writer is supposed to have written before: see `join`."""
        made = cls(log, audit_keys, Chain.in_the_middle(log, n))
        made.epoch, made.writer, made._opened = writer.epoch, writer.key, writer.opened
        made._base = n, writer
        made.chain.touched = set()
        return made

    @property
    def now(self) -> Writer:
        """Who writes here."""
        return Writer(self.epoch, self.writer, self._opened)

    def resume(self, opened: int) -> None:
        """Go on in the middle of an epoch that opened at this record."""
        self._opened = opened

    def state(self) -> dict[str, Any]:
        """All of this as plain values, for whoever goes on here later: see `resumed`."""
        return {
            **snapshot_of(self.chain),
            "begun": dict(sorted(self.begun.items())),
            "closed": self._closed,
            "epoch": self.epoch,
            "intents": dict(sorted(self.intents.items())),
            "opened": self._opened,
            "pub": self.writer or "",
        }

    @classmethod
    def resumed(cls, log: str, audit_keys: Sequence[bytes], state: dict[str, Any]) -> Verifier:
        """The verifier that had a state. ValueError, KeyError or TypeError if none had it."""
        chain = chain_of(state)
        if chain.log != log:
            raise ValueError("the state of another chain")
        made = cls(log, audit_keys, chain)
        made.epoch, made.writer, made._opened = int(state["epoch"]), str(state["pub"]) or None, int(state["opened"])
        made._closed = bool(state["closed"])
        made.intents = {str(name): int(seq) for name, seq in state["intents"].items()}
        made.begun = {str(name): int(state["begun"][name]) for name in made.intents}
        return made

    def batch(self, b: Batch, *, level: Level = "full") -> None:
        """Check the next batch; Bad at the first thing that is wrong."""
        full = level == "full"
        start = self.chain.n
        where = f"{self.chain.log}/{start}"
        if b.log != self.chain.log:
            raise Bad("E_ORIGIN", where, f"batch belongs to {b.log}")
        if b.first != start:
            raise Bad("E_SEQ", where, f"batch begins at {b.first}")
        try:
            entries = b.unpacked()
        except ValueError as error:
            raise Bad("E_PARSE", where, str(error)) from None
        if not entries:
            raise Bad("E_SCHEMA", where, "an empty batch")
        if (self.wanted or self.hand_on is not None) and self.chain.leaves is None:
            self.chain.leaves = []
        if level == "hash":
            self.chain.hash(entries)
        else:
            self._entries(entries, b, full=full)
        self._note_leaves(start)
        if full:
            self._columns(b, start)
        if self.sizes:
            self._note()

    def _entries(self, entries: Sequence[bytes], b: Batch, *, full: bool) -> None:
        """Check the entries of a batch: those of the usual form together, each other one by itself."""
        chain, look, done = self.chain, self.chain.look(entries, full=full), 0
        while done < len(entries):
            if not self._closed:
                done = chain.take_usual(look, done)
            for entry in entries[done : done + 1]:
                self._entry(entry, b, full=full)
            done += 1

    def _entry(self, entry: bytes, b: Batch, *, full: bool) -> None:
        at, previous = self.chain.n, self.chain.previous
        record: Record | None = None
        try:
            record = self.chain.check(entry, full=full)
        except UnknownVersion:
            self.unknown += 1
        if isinstance(record, event.Open):
            self._open(record, at, previous, b)
        elif full:
            self._follow(record, at)

    def _note_leaves(self, start: int) -> None:
        """Keep the leaves that are wanted, and hand all of them on."""
        leaves = self.chain.leaves
        if leaves is None:
            return
        if self.wanted:
            self.leaves_of |= {at: leaf.hex() for at, leaf in enumerate(leaves, start) if at in self.wanted}
        if self.hand_on is not None:
            self.hand_on(leaves)
        leaves.clear()

    def _note(self) -> None:
        """Note the state at the sizes that were asked for; those within a group are passed over."""
        chain = self.chain
        while self.sizes and self.sizes[-1] <= chain.n:
            if self.sizes.pop() == chain.n:
                moved = {tenant: chain.tenants[tenant] for tenant in chain.touched or ()}
                self.reached.append(Reached(chain.frontier.copy(), chain.previous, chain.t, moved))
                chain.touched = set()

    def _open(self, record: event.Open, at: int, previous: str, b: Batch) -> None:
        where = f"{self.chain.log}/{at}"
        if not previous and self.chain.assumed is not None:
            previous = self.chain.assumed[0]
        statement = writer_statement(self.chain.log, record.epoch, at, previous, record.pub)
        if not certified(self._keys, bytes.fromhex(record.cert), statement):
            raise Bad("E_CERT", where, "no trusted audit key certified this writer")
        if record.epoch <= self.epoch:
            raise Bad("E_EPOCH", where, f"epoch {record.epoch} after epoch {self.epoch}")
        if at != b.first:
            raise Bad("E_EPOCH", where, "a writer opens with a batch of its own")
        self.epoch, self.writer, self._opened, self._closed = record.epoch, record.pub, at, False

    def _follow(self, record: Record | None, at: int) -> None:
        where = f"{self.chain.log}/{at}"
        if self._closed:
            raise Bad("E_EPOCH", where, f"record after the close of epoch {self.epoch}")
        match record:
            case event.Close():
                if record.epoch != self.epoch or record.count != at - self._opened + 1:
                    raise Bad("E_EPOCH", where, "close names another epoch or count")
                self._closed = True
            case event.Intent():
                self.intents[record.id] = at
                self.begun[record.id] = self.chain.t
            case event.Outcome():
                if self.intents.pop(record.intent, None) is None and self.chain.learned is not None:
                    self._settled.append(record.intent)
                self.begun.pop(record.intent, None)
            case event.Mark(root=(size, root)):
                self.marks.append((at, size, root))

    def _columns(self, b: Batch, start: int) -> None:
        """Recompute and compare every column that is stored beside the entries."""
        where = f"{self.chain.log}/{start}"
        if self.writer is None:
            raise Bad("E_CERT", where, "no certified writer")
        if b.epoch != self.epoch:
            raise Bad("E_EPOCH", where, f"batch says epoch {b.epoch}, its writer's is {self.epoch}")
        count = self.chain.n - start
        derived = {
            "n": (b.n, count),
            "t": (b.t, self.chain.t),
            "head": (b.head.hex(), self.chain.previous),
            "day": (b.day, self.chain.t // DAY_US),
        }
        for name, (stored, computed) in derived.items():
            if stored != computed:
                at = where if name == "n" else f"{self.chain.log}/{self.chain.n - 1}"
                raise Bad("E_DERIVED", at, f"stored column {name} differs from the entries")
        statement = seal_statement(self.chain.log, b.epoch, start, count, self.chain.previous)
        if not check_seal(self.writer, b.seal, statement):
            raise Bad("E_SEAL", where, "not sealed by the certified writer of this epoch")

    # ---- parts that were checked apart

    def follows(self, part: Verifier) -> bool:
        """Whether all that a good part took on trust is so here."""
        begin, writer = part._base
        if begin != self.chain.n or writer != self.now or (self._closed and part._opened != begin):
            return False
        assumed = part.chain.assumed
        if assumed is not None and (assumed[0] != self.chain.previous or assumed[1] < self.chain.t):
            return False
        return all((tn, tp) == self.chain.head(tenant) for tenant, (_, tn, tp) in (part.chain.learned or {}).items())

    def join(self, part: Verifier, after: Callable[[Chain], None]) -> None:
        """Go on at the end of a good part that follows; `after` sees the chain at each size that was asked for."""
        chain, last = self.chain, part.chain
        before = chain.frontier.copy()
        moved = {tenant: last.tenants[tenant] for tenant in last.touched or ()}
        for at in [*part.reached, Reached(last.frontier, last.previous, last.t, moved)]:
            chain.frontier = before.copy()
            chain.frontier.join(at.frontier)
            chain.n, chain.previous, chain.t = at.frontier.n, at.previous, at.t
            chain.tenants |= at.moved
            if chain.touched is not None:
                chain.touched |= at.moved.keys()
            after(chain)
        self.epoch, self.writer, self._opened, self._closed = part.epoch, part.writer, part._opened, part._closed
        for intent in part._settled:
            self.intents.pop(intent, None)
            self.begun.pop(intent, None)
        self.intents |= part.intents
        self.begun |= part.begun
        self.marks += part.marks
        self.leaves_of |= part.leaves_of
        self.unknown += part.unknown
