"""Tenant bundles: all records of one tenant, and why none is missing. Written by the service, checked by the tenant. Pure.

The first line is a canonical JSON object: the tenant, its heads in every chain, their proof in the tenants' map, the root
log's entry that commits the map, and that entry's C2SP tlog-proof. Every further line is one entry, byte for byte, chain
after chain. Each entry names the tenant's previous one in its chain and the checkpoint commits the newest, so a record
that is withheld anywhere breaks a number, a link or the map. Of other tenants a bundle holds nothing but hashes.

A bundle of a period begins with the tenant's last record *before* it, which shows that none between was left out, and
reaches to the checkpoint: only the newest record is committed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from audit.chain import ZERO, Bad, Frame, leaf_hash, parse_frame
from audit.checkpoint import BadNote, Checkpoint, parse_proof
from audit.event import BadRecord, UnknownVersion, decode, encode_plain, tenant_of
from audit.evidence import committed
from audit.proof import BadProof, check_map
from audit.verify import Report, Trust

FORMAT: Final = "skms-tenant-bundle/v1"
MEDIA: Final = "application/x-ndjson"
_MAX_HEADER: Final = 1_048_576
_FIELDS: Final = {"bundle", "entry", "from", "heads", "map", "proof", "tenant"}


@dataclass(frozen=True, slots=True)
class Header:
    """The first line: whose bundle, since when (us, 0 for everything), the heads, and the proof of them."""

    tenant: str
    since: int
    heads: tuple[tuple[str, int, str], ...]  # chain, records of the tenant in it, leaf of the last one
    path: tuple[bytes, ...]  # in the tenants' map
    entry: bytes  # of the root log
    proof: bytes  # C2SP tlog-proof of it

    def encode(self) -> bytes:
        """The line, its newline included."""
        plain = {
            "bundle": FORMAT,
            "entry": self.entry.decode(),
            "from": self.since,
            "heads": [list(head) for head in self.heads],
            "map": [node.hex() for node in self.path],
            "proof": self.proof.decode(),
            "tenant": self.tenant,
        }
        return encode_plain(plain) + b"\n"


def parse_header(line: bytes) -> Header:
    """Take the first line apart; Bad E_PARSE or E_CANON if it is none of ours."""
    try:
        row = json.loads(line)
        good = isinstance(row, dict) and set(row) == _FIELDS and row["bundle"] == FORMAT
        if not good or encode_plain(row) + b"\n" != line:
            raise Bad("E_CANON", "bundle/header", f"not the first line of a {FORMAT}")
        return Header(
            tenant=_text(row["tenant"]),
            since=_number(row["from"]),
            heads=tuple((_text(log), _number(count), _text(leaf)) for log, count, leaf in row["heads"]),
            path=tuple(bytes.fromhex(node) for node in row["map"]),
            entry=_text(row["entry"]).encode(),
            proof=_text(row["proof"]).encode(),
        )
    except (ValueError, TypeError, RecursionError):
        raise Bad("E_PARSE", "bundle/header", f"not the first line of a {FORMAT}") from None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("not a string")
    return value


def _number(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError("not a number")
    return value


def tenant_of_entry(entry: bytes, where: str) -> tuple[Frame, str | None]:
    """The frame of an entry and the tenant its record belongs to; Bad if it is no entry."""
    frame = parse_frame(entry, where)
    try:
        tenant = tenant_of(decode(frame.body))
    except BadRecord as bad:
        raise Bad(bad.code, where, str(bad)) from None
    except UnknownVersion as later:
        tenant = later.tenant
    if (tenant is None) != (frame.tn is None):
        raise Bad("E_SCHEMA", where, "a tenant's record carries tn and tp, any other carries neither")
    return frame, tenant


# ---- checking --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Verdict:
    """What was found in a bundle; `report` holds what is wrong with it."""

    report: Report
    header: Header | None = None
    checkpoint: Checkpoint | None = None
    until: int = 0  # when the notary began to read what the checkpoint covers (us)
    in_period: int = 0  # records since `header.since`


@dataclass(slots=True)
class _Chain:
    """One chain of the bundle while its entries are read."""

    log: str
    count: int
    leaf: str
    since: int
    first: int = -1  # numbers in the chain of the first and last entry of the bundle
    last: int = -1
    next: int = 0  # tenant number that must come next
    previous: str = ZERO
    t: int = 0
    records: int = 0
    leaves: dict[int, str] = field(default_factory=dict)  # of records a receipt names

    def take(self, entry: bytes, tenant: str, wanted: Mapping[int, str]) -> bool:
        """Check the next entry; whether it is of the period. Bad names it and what is wrong with it."""
        where = f"{self.log}/{parse_frame(entry, self.log).n}"
        frame, owner = tenant_of_entry(entry, where)
        if frame.tn is None or owner != tenant:
            raise Bad("E_SCHEMA", where, f"not a record of {tenant}")
        if not self.records and frame.tn:
            if frame.t >= self.since:
                raise Bad("E_TSEQ", where, f"the tenant's records before its record {frame.tn} are missing")
            self.next, self.previous = frame.tn, frame.tp or ZERO
        if frame.tn != self.next:
            raise Bad("E_TSEQ", where, f"the tenant's record {frame.tn} stands where {self.next} belongs")
        if frame.tp != self.previous:
            raise Bad("E_TLINK", where, f"does not follow the tenant's record {self.next - 1}")
        if frame.n <= self.last:
            raise Bad("E_SEQ", where, f"stands after record {self.last}")
        if frame.t < self.t:
            raise Bad("E_TIME", where, f"time runs backwards by {self.t - frame.t} us")
        self.previous = leaf_hash(entry).hex()
        if frame.n in wanted:
            self.leaves[frame.n] = self.previous
        self.first = frame.n if self.first < 0 else self.first
        self.last, self.t, self.next, self.records = frame.n, frame.t, frame.tn + 1, self.records + 1
        return frame.t >= self.since

    def end(self) -> None:
        """Bad unless the entries led to the committed head."""
        where = f"{self.log}/{self.last + 1}"
        if not self.records:
            raise Bad("E_MISSING", self.log, f"the checkpoint commits {self.count} records of the tenant in this chain")
        if self.next < self.count:
            raise Bad("E_TRUNC", where, f"ends at the tenant's record {self.next - 1} of {self.count}")
        if self.next > self.count:
            raise Bad("E_TSEQ", where, f"the checkpoint commits {self.count} records of the tenant, not {self.next}")
        if self.previous != self.leaf:
            raise Bad("E_TLINK", f"{self.log}/{self.last}", "the checkpoint commits another newest record")

    def receipts(self, wanted: Mapping[int, str], report: Report) -> None:
        """Note each receipt whose record is not here."""
        for seq, leaf in sorted(wanted.items()):
            where = f"{self.log}/{seq}"
            if self.leaves.get(seq) == leaf:
                continue
            if seq > self.last:
                report.add("E_TRUNC", where, f"a receipt names this record; the bundle ends at {self.last}")
            elif seq < self.first and self.since:
                report.add("U_NOANCHOR", where, "a receipt names a record before the period of this bundle")
            else:
                report.add("E_RECEIPT", where, "no record of the tenant here is the one the receipt was given for")


def check_bundle(
    lines: Iterable[bytes],
    trust: Trust,
    *,
    tenant: str | None = None,
    since: int | None = None,
    until: int | None = None,
    receipts: Mapping[str, Mapping[int, str]] | None = None,
) -> Verdict:
    """Check a bundle line by line, in constant memory.

    `tenant`, `since` and `until` (us) are what was asked for, if known: a bundle is complete for the period that its
    first line names, and whoever wrote that line may have named a shorter one.
    """
    verdict = Verdict(Report())
    report, receipts = verdict.report, receipts or {}
    stream = iter(lines)
    try:
        header = _header(next(stream, b""), trust, verdict)
        if tenant not in {None, header.tenant}:
            raise Bad("E_SCHEMA", "bundle/header", f"a bundle of {header.tenant}, not of {tenant}")
        if since is not None and header.since > since:
            raise Bad("E_TRUNC", "bundle/header", "begins later than was asked for")
        if until is not None and verdict.until < until:
            raise Bad("E_TRUNC", "bundle/header", "its checkpoint is older than the end of what was asked for")
        chains = _entries(stream, header, receipts, verdict)
    except Bad as bad:
        report.add(bad.code, bad.where, bad.why)
        return verdict
    for log in sorted(set(receipts) - set(chains)):
        report.add(
            "E_MISSING", log, "a receipt names a record of this chain; no record of the tenant is committed in it"
        )
    for log, chain in chains.items():
        chain.receipts(receipts.get(log, {}), report)
    report.anchored = True
    return verdict


def _header(line: bytes, trust: Trust, verdict: Verdict) -> Header:
    if len(line) > _MAX_HEADER or not line.endswith(b"\n"):
        raise Bad("E_PARSE", "bundle/header", "the first line is missing, cut or too long")
    header = parse_header(line)
    try:
        proof = parse_proof(header.proof)
    except BadNote as bad:
        raise Bad("E_PARSE", "bundle/header", str(bad)) from None
    checkpoint, frame, heads = committed(proof, header.entry, trust)
    named = [log for log, _, _ in header.heads]
    where = f"{trust.origin}/{frame.n}"
    if named != sorted(set(named)):
        raise Bad("E_TMAP", where, "the tenant's chains are not listed once each and in order")
    try:
        own = {log: (count, leaf) for log, count, leaf in header.heads}
        check_map(header.tenant, own, header.path, bytes.fromhex(heads.tenants))
    except BadProof as bad:
        raise Bad("E_TMAP", where, f"the tenants' map commits other heads of {header.tenant}: {bad}") from None
    verdict.header, verdict.checkpoint, verdict.until = header, checkpoint, frame.t
    return header


def _entries(
    stream: Iterator[bytes], header: Header, receipts: Mapping[str, Mapping[int, str]], verdict: Verdict
) -> dict[str, _Chain]:
    left = [_Chain(log, count, leaf, header.since) for log, count, leaf in header.heads]
    done: dict[str, _Chain] = {}
    report = verdict.report
    for line in stream:
        entry = line.removesuffix(b"\n")
        if entry == line:
            raise Bad("E_PARSE", f"bundle/{report.records + 1}", "the last line is cut")
        log = parse_frame(entry, f"bundle/{report.records + 1}").log
        while left and left[0].log != log:
            _close(left.pop(0), done, report)
        if not left:
            raise Bad("E_SEQ", log, "a record that no head of the tenant leads to, or out of order")
        verdict.in_period += left[0].take(entry, header.tenant, receipts.get(log, {}))
        report.records += 1
    for chain in left:
        _close(chain, done, report)
    return done


def _close(chain: _Chain, done: dict[str, _Chain], report: Report) -> None:
    chain.end()
    report.logs[chain.log] = chain.records
    done[chain.log] = chain
