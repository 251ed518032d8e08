"""The chain: entries, leaf hashes, tenant links, Merkle frontier, bundles, and the statements that are signed. Pure.

One hash per record is enough for everything: leaf = SHA-256(00 || entry) is the RFC 6962 leaf *and* what the next entry
names as its predecessor, so chain and tree cannot tell two stories (CVE-2022-36111). Each entry of a tenant also names
that tenant's previous one, from which a tenant can prove that nothing of its own is missing.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import load_der_public_key

from audit import event
from audit.event import MAX_INT, MAX_RECORD, BadRecord, Record, UnknownVersion, decode, tenant_of

ZERO: Final = "0" * 64  # "no previous record"
MAX_ENTRY: Final = 65_535  # the length field of a tlog-tiles bundle
BUNDLE: Final = 256  # entries of a full tile bundle (C2SP tlog-tiles)
DAY_US: Final = 86_400_000_000
_UINT: Final = rb"(0|[1-9][0-9]{0,15})"
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


class Bad(Exception):
    """The first thing that is wrong: a code, where (log/number), and the cause in words."""

    def __init__(self, code: str, where: str, why: str) -> None:
        super().__init__(f"{code} {where}: {why}")
        self.code, self.where, self.why = code, where, why


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
    found, at = [], 0
    while at < len(bundle):
        size = int.from_bytes(bundle[at : at + 2], "big")
        found.append(bundle[at + 2 : at + 2 + size])
        at += 2 + size
    if at != len(bundle):
        raise ValueError("a bundle ends in the middle of an entry")
    return found


@dataclass(slots=True)
class Frontier:
    """The roots of the full subtrees of a growing RFC 6962 tree: O(log n) state, one amortised hash per append."""

    n: int = 0
    roots: list[bytes] = field(default_factory=list)

    def push(self, leaf: bytes) -> None:
        """Append a leaf hash."""
        self.n += 1
        k = self.n
        while not k & 1:
            leaf, k = node_hash(self.roots.pop(), leaf), k >> 1
        self.roots.append(leaf)

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


class Chain:
    """The state of one chain: the same for the writer that appends and the verifier that checks."""

    def __init__(self, log: str) -> None:
        self.log, self.n, self.previous, self.t = log, 0, ZERO, 0
        self.frontier = Frontier()
        self.tenants: dict[str, tuple[int, str]] = {}  # tenant -> (records so far, leaf of its last one here)
        self._below: dict[str, tuple[int, str]] = {}

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
        if frame.previous != self.previous:
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

    def _check_tenant(self, frame: Frame, tenant: str | None, where: str) -> None:
        if (tenant is None) != (frame.tn is None):
            raise Bad("E_SCHEMA", where, "a tenant's record carries tn and tp, any other carries neither")
        if tenant is None:
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
        self.frontier.push(leaf)
        self.n, self.previous, self.t = self.n + 1, leaf.hex(), t


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


class Verifier:
    """Checks the batches of one chain in order: entries, links, epochs, certificates, seals, every stored column."""

    def __init__(self, log: str, audit_key: bytes, chain: Chain | None = None) -> None:
        self.chain = chain or Chain(log)
        self._key = audit_key
        self.epoch = 0
        self.writer: str | None = None  # hex of the newest certified writer key
        self.unknown = 0  # records of a later version
        self.intents: dict[str, int] = {}  # open intents -> record number
        self.leaves_of: dict[int, str] = {}  # leaf of each wanted record
        self.wanted: frozenset[int] = frozenset()
        self._opened = 0
        self._closed = False

    def resume(self, opened: int) -> None:
        """Go on in the middle of an epoch that opened at this record."""
        self._opened = opened

    def batch(self, b: Batch, *, full: bool = True) -> None:
        """Check the next batch; Bad at the first thing that is wrong."""
        start = self.chain.n
        where = f"{self.chain.log}/{start}"
        if b.log != self.chain.log:
            raise Bad("E_ORIGIN", where, f"batch belongs to {b.log}")
        if b.first != start:
            raise Bad("E_SEQ", where, f"batch begins at {b.first}")
        try:
            entries = unpack(b.entries)
        except ValueError as error:
            raise Bad("E_PARSE", where, str(error)) from None
        if not entries:
            raise Bad("E_SCHEMA", where, "an empty batch")
        for entry in entries:
            at, previous = self.chain.n, self.chain.previous
            try:
                record = self.chain.check(entry, full=full)
            except UnknownVersion:
                self.unknown += 1
                record = None
            if at in self.wanted:
                self.leaves_of[at] = self.chain.previous
            if isinstance(record, event.Open):
                self._open(record, at, previous, b)
            elif full:
                self._follow(record, at)
        if full:
            self._columns(b, start)

    def _open(self, record: event.Open, at: int, previous: str, b: Batch) -> None:
        where = f"{self.chain.log}/{at}"
        statement = writer_statement(self.chain.log, record.epoch, at, previous, record.pub)
        if not check_signature(self._key, bytes.fromhex(record.cert), statement):
            raise Bad("E_CERT", where, "the audit key did not certify this writer")
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
            case event.Outcome():
                self.intents.pop(record.intent, None)

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
