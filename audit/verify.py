"""`skms-verify`: check an exported log offline, with no trust in the operator.

Imports nothing but the chain, the record format and `cryptography`: no database, no web library. Exit status: 0 intact,
1 tampered (E_ codes), 2 cannot tell (U_ codes), 3 usage. Integrity and completeness are two verdicts: without a receipt,
a state from an earlier run or a checkpoint from elsewhere nobody can tell whether the end of the log was cut.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from msgspec import convert

from audit import event
from audit.chain import (
    BUNDLE,
    Bad,
    Batch,
    Chain,
    Frontier,
    Level,
    Receipt,
    Verifier,
    Writer,
    leaf_hash,
    parse_frame,
    tree_hash,
    unpack,
)
from audit.checkpoint import ML_DSA_44, BadNote, NoteKey, key_of, parse_checkpoint, parse_note, parse_vkey
from audit.commitments import SKEW_US, Commitments, Opened, open_note
from audit.event import VERSION, BadRecord, UnknownVersion, encode_plain
from audit.saved import BadState, Resume, Saved, SavedChain, WriterPlace, digests, plain, saved_root
from audit.saved import decode as decode_state
from audit.segments import LEAD, PRUNED, Archive, Segment, exported_segment, verified_archive
from audit.tiles import ENTRIES, tile_path
from audit.tlogpolicy import BadPolicy, WitnessPolicy, any_of, parse_policy

if TYPE_CHECKING:
    from audit.timestamp import Authority

_INTENT_US: Final = 3_600_000_000  # an intent may stay open so long
PART: Final = 65_536  # records, at most, that are checked apart from the others by several processes
_LEAST: Final = 4_096  # of a short chain
INTACT, TAMPERED, CANNOT_TELL, USAGE = 0, 1, 2, 3
_RECEIPT: Final = re.compile(r'log="([a-z0-9._/-]{1,128})", seq=(0|[1-9][0-9]{0,15}), leaf=:([A-Za-z0-9+/]{43}=):')
_NO_CHAIN: Final = re.compile(r"tile|g[0-9]+")
SEALS: Final = "seals.jsonl"
_SEAL_FIELDS: Final = {"day", "epoch", "first", "head", "n", "seal", "t"}


@dataclass(frozen=True, slots=True)
class Finding:
    """Something a verifier has to say: code, where, why."""

    code: str
    where: str
    why: str

    def __str__(self) -> str:
        return f"{self.code} {self.where}: {self.why}"


@dataclass(slots=True)
class Report:
    """What was checked and what was found. The first bad record of each chain ends that chain's check."""

    findings: list[Finding] = field(default_factory=list)
    records: int = 0
    logs: dict[str, int] = field(default_factory=dict)  # chain -> records
    roots: dict[str, str] = field(default_factory=dict)  # chain -> RFC 6962 root
    anchored: bool = False  # whether something from outside shows where every chain must at least end
    anchors: set[str] = field(default_factory=set)  # chains of which a receipt or a state shows that
    resumed: dict[str, int] = field(default_factory=dict)  # chain, root log -> entries that only an earlier run checked
    timestamps: int = 0  # RFC 3161 tokens that were verified
    newest: int = 0  # time of the newest record (us)
    intents: list[tuple[str, int, int]] = field(default_factory=list)  # chain, number and time of each open intent

    def add(self, code: str, where: str, why: str) -> None:
        """Note a finding."""
        self.findings.append(Finding(code, where, why))

    def overdue(self) -> None:
        """Warn of intents that stand open for more than an hour, by the newest record of all chains."""
        for log, at, t in self.intents:
            if self.newest - t > _INTENT_US:
                self.add("W_INTENT", f"{log}/{at}", "an intent stands open for more than an hour")

    def settle_anchors(self, origin: str, logs: Sequence[str]) -> None:
        """Say U_NOANCHOR of each chain whose end could have been cut unseen; of the origin if that is so of all."""
        why = "no receipt, earlier state or checkpoint of yours: whether the end was cut cannot be told (--accept-unanchored)"
        unanchored = [] if self.anchored else [log for log in logs if log not in self.anchors]
        self.anchored = self.anchored or (not unanchored and bool(self.anchors))
        for log in (unanchored if self.anchors else [origin]) if not self.anchored else ():
            self.add("U_NOANCHOR", log, why)

    @property
    def exit_status(self) -> int:
        """1 if anything is tampered, else 2 if anything cannot be told, else 0."""
        if any(f.code.startswith("E_") for f in self.findings):
            return TAMPERED
        return CANNOT_TELL if any(f.code.startswith("U_") for f in self.findings) else INTACT

    def as_json(self) -> str:
        """The report for machines."""
        verdict = {INTACT: "intact", TAMPERED: "tampered", CANNOT_TELL: "cannot tell"}[self.exit_status]
        shown = {
            "verdict": verdict,
            "records": self.records,
            "logs": {name: {"records": n, "root": self.roots.get(name)} for name, n in self.logs.items()},
            "anchored": self.anchored,
            "resumed": self.resumed,
            "timestamps": self.timestamps,
            "findings": [{"code": f.code, "where": f.where, "why": f.why} for f in self.findings],
        }
        return json.dumps(shown, indent=2, sort_keys=True)


@dataclass(frozen=True, slots=True)
class Trust:
    """What the auditor trusts: the log's origin, its audit keys (SubjectPublicKeyInfo), and its witnesses."""

    origin: str
    keys: tuple[bytes, ...]
    policy: WitnessPolicy = WitnessPolicy()  # noqa: RUF009  (frozen)
    peers: tuple[NoteKey, ...] = ()  # logs that this service is a witness of
    authorities: tuple[Authority, ...] = ()  # of RFC 3161 time stamps; none: they are not looked at

    def note_keys(self) -> list[NoteKey]:
        """The audit keys, as those of the root log's checkpoints."""
        return [key_of(self.origin, spki) for spki in self.keys]


class Unusable(Exception):
    """A file the verifier was given cannot be used: usage, not tampering."""


def load_trust(path: Path, policy: Path | None = None) -> Trust:
    """Read a trust file, and a C2SP tlog-policy for its witnesses; Unusable names the line.

    Lines: `origin NAME`, `key BASE64-SPKI`, `witness NAME VKEY`, `quorum NUMBER`, `cosigner VKEY` (an ML-DSA-44 key that
    must have signed the newest checkpoint too); `#` begins a comment.
    """
    origin, keys, witnesses, quorum = "", list[bytes](), dict[str, NoteKey](), 0
    cosigners = list[NoteKey]()
    for number, line in enumerate(_text(path, "trust file").splitlines(), 1):
        try:
            match line.split("#")[0].split():
                case []:
                    continue
                case ["origin", name] if not origin:
                    origin = name
                case ["key", text]:
                    keys.append(base64.b64decode(text, validate=True))
                case ["witness", name, vkey] if name not in witnesses:
                    witnesses[name] = _key_of_type(vkey, post_quantum=False)
                case ["cosigner", vkey]:
                    cosigners.append(_key_of_type(vkey, post_quantum=True))
                case ["quorum", count] if not quorum and re.fullmatch(r"[1-9][0-9]{0,2}", count):
                    quorum = int(count)
                case _:
                    raise ValueError(
                        "expected `origin NAME`, `key BASE64`, `witness NAME VKEY`, `quorum NUMBER` or `cosigner VKEY`"
                    )
        except ValueError as error:
            raise Unusable(f"trust file {path}, line {number}: {error}") from None
    if not origin or not keys:
        raise Unusable(f"trust file {path}: needs one origin and at least one key")
    try:
        wanted = any_of(witnesses, quorum) if quorum else WitnessPolicy(witnesses)
        if policy is not None:
            wanted = parse_policy(_text(policy, "policy"))
        trust = Trust(origin, tuple(keys), replace(wanted, cosigners=tuple(cosigners)))
        trust.note_keys()
    except BadPolicy as bad:
        raise Unusable(f"{policy or path}: {bad}") from None
    except BadNote as bad:
        raise Unusable(f"trust file {path}: {bad}") from None
    return trust


def _key_of_type(vkey: str, *, post_quantum: bool) -> NoteKey:
    key = parse_vkey(vkey)
    if (key.type == ML_DSA_44) != post_quantum:
        raise BadNote("an ML-DSA-44 key (type 06) stands in a line `cosigner`, and no other key does")
    return key


def _text(path: Path, what: str) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise Unusable(f"{what} {path}: {error}") from None


# ---- an export on disk -----------------------------------------------------------------------------------------------


def _bundles(directory: Path, count: int, log: str, first: int = 0) -> Iterator[list[bytes]]:
    """The entries of a log of so many, bundle by bundle, from the bundle with entry `first` on."""
    for number in range(first // BUNDLE, (count + BUNDLE - 1) // BUNDLE):
        width = min(BUNDLE, count - number * BUNDLE)
        path = directory / tile_path(ENTRIES, number, width)
        where = f"{log}/{number * BUNDLE}"
        try:
            found = unpack(path.read_bytes())
        except OSError:
            raise Bad("E_TRUNC", where, f"entry bundle {tile_path(ENTRIES, number, width)} is missing") from None
        except ValueError as error:
            raise Bad("E_PARSE", where, str(error)) from None
        if len(found) != width:
            raise Bad("E_TRUNC", where, f"entry bundle holds {len(found)} entries, not {width}")
        yield found


def _entries(directory: Path, count: int, log: str, first: int = 0) -> Iterator[bytes]:
    return itertools.chain.from_iterable(_bundles(directory, count, log, first))


class ExportedTiles:
    """Holds the hash tiles of an export against the leaves of a log, if it has hash tiles.

    What is wrong is kept until the end: a record that is wrong says more than the tile it is in.
    """

    def __init__(self, directory: Path, log: str, count: int, first: int = 0) -> None:
        self._directory, self._log, self._count = directory, log, count
        self._at, self._pending = first, list[bytes]()
        self._there = (directory / "tile" / "0").is_dir()
        self.wrong: Bad | None = None

    def push(self, leaves: Sequence[bytes]) -> None:
        """Compare the tiles that these leaves, which follow those before, fill up."""
        self._pending += leaves if self._there and self.wrong is None else ()
        while len(self._pending) >= BUNDLE - self._at % BUNDLE:
            self._compare(BUNDLE - self._at % BUNDLE)

    def flush(self) -> None:
        """Compare the leaves that fill no tile."""
        if self._pending:
            self._compare(len(self._pending))

    def _compare(self, count: int) -> None:
        number, begin = divmod(self._at, BUNDLE)
        try:
            found = self._read(0, number, self._count)
            if found[begin * 32 : (begin + count) * 32] != b"".join(self._pending[:count]):
                raise self._differs(0, number, self._count)
        except Bad as bad:
            self.wrong = self.wrong or bad
        del self._pending[:count]
        self._at += count

    def end(self, chain: Chain) -> None:
        """Bad at the first tile that is missing or is not that of the whole log, which has come to its end."""
        self.flush()
        if self.wrong is not None:
            raise self.wrong
        if not self._there or chain.n < BUNDLE:
            return
        level, count = 1, chain.n // BUNDLE
        hashes = self._level(1, count)
        # Full subtrees of 256 leaves are the leaves of the tree above: it has the roots that the chain has.
        above = Frontier()
        above.extend(hashes)
        if above.roots != chain.frontier.roots[: count.bit_count()]:
            hashes = [tree_hash(self._hashes(0, number, chain.n)) for number in range(count)]
            self._hold(1, hashes)
        while count >= BUNDLE:
            level, count = level + 1, count // BUNDLE
            hashes = [tree_hash(hashes[i * BUNDLE : (i + 1) * BUNDLE]) for i in range(count)]
            self._hold(level, hashes)

    def _hold(self, level: int, hashes: Sequence[bytes]) -> None:
        for number in range(-(-len(hashes) // BUNDLE)):
            if self._hashes(level, number, len(hashes)) != list(hashes[number * BUNDLE : (number + 1) * BUNDLE]):
                raise self._differs(level, number, len(hashes))

    def _level(self, level: int, count: int) -> list[bytes]:
        return [h for number in range(-(-count // BUNDLE)) for h in self._hashes(level, number, count)]

    def _hashes(self, level: int, number: int, count: int) -> list[bytes]:
        found = self._read(level, number, count)
        return [found[i : i + 32] for i in range(0, len(found), 32)]

    def _read(self, level: int, number: int, count: int) -> bytes:
        width = min(BUNDLE, count - number * BUNDLE)
        try:
            found = (self._directory / tile_path(level, number, width)).read_bytes()
        except OSError:
            name = tile_path(level, number, width)
            raise Bad("E_TRUNC", f"{self._log}/{name}", "the hash tile is missing") from None
        if len(found) != 32 * width:
            raise self._differs(level, number, count)
        return found

    def _differs(self, level: int, number: int, count: int) -> Bad:
        name = tile_path(level, number, min(BUNDLE, count - number * BUNDLE))
        return Bad("E_DERIVED", f"{self._log}/{name}", "the hash tile differs from the entries")


def _seals(directory: Path, log: str, after: Resume | None = None) -> list[Mapping[str, Any]]:
    found = []
    try:
        with (directory / SEALS).open("rb") as file:
            if after is not None:
                _hold_seal(file, log, after)
            lines = file.read().splitlines(keepends=True)
    except OSError:
        raise Bad("E_MISSING", f"{log}/0", "seals.jsonl is missing") from None
    for number, line in enumerate(lines):
        try:
            row = json.loads(line)
            good = (
                isinstance(row, dict)
                and set(row) == _SEAL_FIELDS
                and all(type(row[k]) is int and 0 <= row[k] < 2**53 for k in ("day", "epoch", "first", "n", "t"))
                and all(re.fullmatch(r"(?:[0-9a-f]{2})+", row[k]) for k in ("head", "seal"))
                and encode_plain(row) + b"\n" == line
            )
        except (ValueError, TypeError, RecursionError):
            good = False
        if not good:
            raise Bad("E_CANON", f"{log}/seal {number}", "a line of seals.jsonl is not one of ours")
        found.append(row)
    return found


def _hold_seal(file: BinaryIO, log: str, after: Resume) -> None:
    """Bad unless the seal before a place is the one that an earlier run saw; the file then stands at that place."""
    last, n = after.seal.encode(), after.state.n
    if file.seek(0, os.SEEK_END) < after.seals:
        raise Bad("E_TRUNC", f"{log}/{n}", f"an earlier run saw {n} records and more seals")
    file.seek(after.seals - len(last))
    if file.read(len(last)) != last:
        raise Bad("E_FORK", f"{log}/{max(n - 1, 0)}", "an earlier run saw another seal here")


def _hold_before(before: Sequence[bytes], chain: Chain) -> None:
    """Bad E_FORK unless these entries, of a bundle that was not full, are those that an earlier run saw."""
    seen = Frontier()
    seen.extend([leaf_hash(entry) for entry in before])
    if before and seen.roots != chain.frontier.roots[-len(seen.roots) :]:
        raise Bad("E_FORK", f"{chain.log}/{chain.n - 1}", "an earlier run saw other records up to here")


def _resumed(directory: Path, log: str, resume: Resume, verifier: Verifier) -> Iterator[Batch]:
    """The commit groups after a place; Bad E_FORK or E_TRUNC if what is there does not follow it.

    No bundle before it is opened: for those the earlier run vouches.
    """
    seals, chain = _seals(directory, log, resume), verifier.chain
    count = chain.n + sum(row["n"] for row in seals)
    entries = _entries(directory, count, log, chain.n)
    _hold_before(list(itertools.islice(entries, chain.n % BUNDLE)), chain)
    tiles = ExportedTiles(directory, log, count, chain.n)
    verifier.hand_on = tiles.push
    for group in _groups(log, seals, entries):
        if chain.n == resume.state.n and group.apart and f'"p":"{chain.previous}"'.encode() not in group.apart[0]:
            raise Bad("E_FORK", f"{log}/{max(chain.n - 1, 0)}", "an earlier run saw another record before the next one")
        yield group
    verifier.hand_on = None
    tiles.flush()
    if tiles.wrong is not None:
        raise tiles.wrong


def batches(directory: Path, log: str, after: Segment | None = None) -> Iterator[Batch]:
    """The commit groups of one exported chain, which may begin after an archived segment."""
    seals = _seals(directory, log)
    if after is None:
        bundles = _bundles(directory, sum(row["n"] for row in seals), log)
    else:
        count = after.at + sum(row["n"] for row in seals)
        bundles = itertools.chain(_lead(directory, after), _bundles(directory, count, log, after.to))
    yield from _groups(log, seals, itertools.chain.from_iterable(bundles))


def _whole(directory: Path, log: str, verifier: Verifier) -> Iterator[Batch]:
    """The commit groups of a chain from its beginning, for this verifier, which also sees the hash tiles."""
    seals = _seals(directory, log)
    count = sum(row["n"] for row in seals)
    tiles = ExportedTiles(directory, log, count)
    verifier.hand_on = tiles.push
    yield from _groups(log, seals, _entries(directory, count, log))
    verifier.hand_on = None
    tiles.end(verifier.chain)


def _groups(log: str, seals: Sequence[Mapping[str, Any]], entries: Iterator[bytes]) -> Iterator[Batch]:
    for row in seals:
        yield Batch(
            log=log,
            first=row["first"],
            n=row["n"],
            epoch=row["epoch"],
            t=row["t"],
            entries=b"",
            apart=list(itertools.islice(entries, row["n"])),
            head=bytes.fromhex(row["head"]),
            seal=bytes.fromhex(row["seal"]),
            day=row["day"],
        )


def _lead(directory: Path, after: Segment) -> Iterator[list[bytes]]:
    try:
        found = unpack((directory / LEAD).read_bytes())
    except OSError:
        raise Bad("E_TRUNC", f"{after.log}/{after.at}", f"{LEAD} is missing") from None
    except ValueError as error:
        raise Bad("E_PARSE", f"{after.log}/{after.at}", str(error)) from None
    if len(found) != after.to - after.at:
        raise Bad("E_TRUNC", f"{after.log}/{after.at}", f"{LEAD} holds {len(found)} entries, not {after.to - after.at}")
    yield found


def _from_the_beginning(
    directory: Path, log: str, trust: Trust, report: Report, archive: Path | None
) -> tuple[Verifier | None, Iterator[Batch]]:
    """Where to begin and what to check: all of it with the archive, else what it was pruned to. Bad as by `Segment`."""
    segment = exported_segment(directory / log, log)
    if segment is None:
        whole = Verifier(log, trust.keys)
        return whole, _whole(directory / log, log, whole)
    start = segment.verifier(trust.keys)
    if archive is None:
        report.add(
            "U_PRUNED", f"{log}/0", f"records 0 to {segment.at - 1} are archived at {segment.uri} (--archive DIR)"
        )
        return start, batches(directory / log, log, segment)
    before = [s for s in Archive(archive, log).segments() if s.at <= segment.at]
    for found in before:
        found.verifier(trust.keys)
    if not before or before[-1].manifest != segment.manifest:
        raise Bad("E_MISSING", f"{log}/0", f"the archive lacks the segment before record {segment.at}")
    return None, itertools.chain(verified_archive(archive, before, segment), batches(directory / log, log, segment))


def exported_logs(directory: Path, origin: str) -> list[str]:
    """Chains of this origin in an export."""
    base = directory / origin
    if not base.is_dir():
        return []
    # The root log's own tiles stand beside the chains, and so does a later generation of the log after a recovery.
    return sorted(f"{origin}/{p.name}" for p in base.iterdir() if p.is_dir() and not _NO_CHAIN.fullmatch(p.name))


_JSONL: Final = ({"at", "note"}, {"at", "note", "tst"})


def _size_of(directory: Path, origin: str, begun: int = 0) -> int:
    """How many entries the bundles of a directory hold: the full ones, and the widest partial one behind them."""
    full = begun // BUNDLE
    while (directory / tile_path(ENTRIES, full, BUNDLE)).is_file():
        full += 1
    partial = directory / tile_path(ENTRIES, full, 1)
    widths = [int(p.name) for p in partial.parent.glob("*") if re.fullmatch(r"[1-9][0-9]{0,2}", p.name)]
    if any(width >= BUNDLE for width in widths):
        raise Bad("E_SCHEMA", f"{origin}/{full * BUNDLE}", "a partial bundle of 256 entries or more")
    return full * BUNDLE + max(widths, default=0)


Stamped = list[tuple[str, bytes, str]]  # place, note, token


def _notes(directory: Path, origin: str, stamped: Stamped, since: int = 0) -> Iterator[tuple[str, bytes]]:
    """The signed notes of an export from a size on, each with its place; `stamped` gets those with a token."""
    try:
        lines = (directory / "checkpoints.jsonl").read_bytes().splitlines(keepends=True)
        newest = (directory / "checkpoint").read_bytes()
    except OSError as error:
        raise Bad("E_MISSING", f"{origin}/{Path(str(error.filename)).name}", "the file is missing") from None
    note = b""
    for number, line in enumerate(lines):
        where = f"{origin}/checkpoints.jsonl {number}"
        try:
            row = json.loads(line)
            good = isinstance(row, dict) and set(row) in _JSONL and encode_plain(row) + b"\n" == line
            good = good and type(row["at"]) is int and all(isinstance(row[k], str) for k in set(row) - {"at"})
        except (ValueError, RecursionError):
            good = False
        if not good:
            raise Bad("E_CANON", where, "not a line of ours")
        note = row["note"].encode()
        if since and _size_in(note) < since:
            continue
        yield where, note
        if "tst" in row:
            stamped.append((where, note, row["tst"]))
    if note != newest:
        raise Bad("E_DERIVED", f"{origin}/checkpoint", "not the newest note of checkpoints.jsonl")


def _size_in(note: bytes) -> int:
    """The size that a note names, without looking at anything else; 2^53 if it names none: then it is looked at."""
    line = note.split(b"\n", 2)[1:2]
    return int(line[0]) if line and re.fullmatch(rb"[1-9][0-9]{0,15}", line[0]) else 2**53


def _has_root(base: Path) -> bool:
    return (base / "tile").is_dir() or (base / "checkpoint").exists()


def read_root(
    directory: Path, trust: Trust, report: Report, held: bytes | None, saved: Saved | None = None
) -> tuple[Commitments, list[Bad]]:
    """Check the root log of an export and its checkpoints by themselves; what is wrong with them, to be said last.

    With a saved state only what came after it is checked.
    """
    made, found = Commitments(trust.origin) if saved is None else saved.commitments(), list[Bad]()
    since = 0 if saved is None or saved.root is None else saved.root.checkpoint
    base = directory / trust.origin
    if not _has_root(base):
        if held is not None or trust.policy.asks:
            found.append(Bad("E_MISSING", trust.origin, "the export holds no root log"))
        made.complete = False
        return made, found
    try:
        _read_entries(base, made)
    except Bad as bad:
        made.complete = False
        found.append(bad)
    if made.root.unknown:
        report.add("U_VERSION", trust.origin, f"{made.root.unknown} entries of a later version than {VERSION}")
    try:
        stamped: Stamped = []
        notes = _notes(base, trust.origin, stamped, since)
        newest = made.checkpoints(notes, trust.note_keys(), trust.policy, report.add)
        if since and (newest is None or newest.checkpoint.size < since):
            raise Bad("E_TRUNC", f"{trust.origin}/{since}", f"an earlier run saw a checkpoint of {since} entries")
        if held is not None:
            made.extends(_held(held, trust).checkpoint, newest)
            report.anchored = True
        made.quorum(newest, trust.policy)
        for where, note, token in stamped if trust.authorities else ():
            check_stamp(token, note, where, trust, made, report)
    except Bad as bad:
        found.append(bad)
    return made, found


def _read_entries(base: Path, made: Commitments) -> None:
    """Check the entries of the root log that are not checked yet, and their hash tiles."""
    chain, begun = made.root.chain, made.size
    size = _size_of(base, made.origin, begun)
    if size < begun:
        raise Bad("E_TRUNC", f"{made.origin}/{size}", f"an earlier run saw {begun} entries")
    chain.leaves = leaves = list[bytes]()
    entries = _entries(base, size, made.origin, begun)
    _hold_before(list(itertools.islice(entries, begun % BUNDLE)), chain)
    for entry in entries:
        if chain.n == begun and begun and f'"p":"{chain.previous}"'.encode() not in entry:
            raise Bad("E_FORK", f"{made.origin}/{begun - 1}", "an earlier run saw another entry before the next one")
        made.entry(entry)
    tiles = ExportedTiles(base, made.origin, size, begun)
    tiles.push(leaves)
    tiles.flush()
    if tiles.wrong is not None:
        raise tiles.wrong
    if not begun:
        tiles.end(chain)


def check_stamp(token: str, note: bytes, where: str, trust: Trust, made: Commitments, report: Report) -> None:
    """Bad E_ANCHOR unless a trusted authority stamped a checkpoint; W_SKEW if before it was written."""
    from audit.timestamp import BadTimestamp, verify_token

    text, why = parse_note(note).text, ""
    for authority in trust.authorities:
        try:
            seen = verify_token(base64.b64decode(token, validate=True), text, authority)
        except (BadTimestamp, ValueError) as bad:
            why = str(bad)
            continue
        report.timestamps += 1
        at = made.written(parse_checkpoint(text).size) or 0
        if at > (seen.timestamp() + 1) * 1_000_000 + SKEW_US:
            report.add("W_SKEW", where, "written after the time-stamping authority saw it, by the log's clock")
        return
    raise Bad("E_ANCHOR", where, f"the time-stamp token is not one of a trusted authority for this checkpoint: {why}")


def _held(note: bytes, trust: Trust) -> Opened:
    """The auditor's own checkpoint; Unusable if the log did not sign it: then it proves nothing."""
    try:
        return open_note(note, trust.origin, trust.note_keys(), trust.policy)
    except BadNote as bad:
        raise Unusable(f"--checkpoint: {bad}") from None


# ---- parts of a chain, checked apart -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Part:
    """Commit groups of one exported chain for a process of their own, and who is supposed to have written before them."""

    directory: Path
    log: str
    keys: tuple[bytes, ...]
    level: Level
    seals: tuple[Mapping[str, Any], ...]
    begin: int
    count: int  # entries of the whole chain
    writer: Writer
    wanted: frozenset[int]
    sizes: tuple[int, ...]

    def groups(self) -> Iterator[Batch]:
        """The commit groups."""
        entries = _entries(self.directory, self.count, self.log, self.begin)
        return _groups(self.log, self.seals, itertools.islice(entries, self.begin % BUNDLE, None))

    def check(self) -> Verifier | None:
        """The state at the end, as far as the part tells; None if anything is wrong, which is then told in order."""
        verifier = Verifier.in_the_middle(self.log, self.keys, self.begin, self.writer)
        verifier.wanted, verifier.sizes = self.wanted, sorted(self.sizes, reverse=True)
        tiles = self.tiles()
        verifier.hand_on = tiles.push
        try:
            for group in self.groups():
                verifier.batch(group, level=self.level)
        except Bad:
            return None
        tiles.flush()
        verifier.hand_on = None
        return verifier if tiles.wrong is None else None

    def tiles(self) -> ExportedTiles:
        """The hash tiles over its entries."""
        return ExportedTiles(self.directory, self.log, self.count, self.begin)


Parts = list[tuple[Part, "Future[Verifier | None]"]]


def start_parts(pool: Executor, whole: Part, size: int) -> Parts:
    """Have an exported chain checked by a pool, in parts of so many records or fewer. Bad if its seals cannot be read.

    Of `whole` the seals and what follows from them are not known yet.
    """
    directory, log = whole.directory, whole.log
    seals = _seals(directory, log)
    count = sum(row["n"] for row in seals)
    size = min(size, max(_LEAST, count // 16))
    last = max((s for s in whole.sizes if s <= count), default=0)  # a part ends there: the state there may be saved
    openings: dict[int, int] = {}
    found: Parts = []
    at = done = 0
    begun, writer = 0, Writer()
    for number, row in enumerate(seals, 1):
        openings.setdefault(row["epoch"], done)
        done += row["n"]
        if done - at < size and number < len(seals) and done != last:
            continue
        among = tuple(s for s in whole.sizes if at < s <= done)
        mine = tuple(seals[begun:number])
        part = replace(whole, seals=mine, begin=at, count=count, writer=writer, sizes=among)
        found.append((part, pool.submit(part.check)))
        if whole.level == "full":
            writer = _writer(directory, log, count, openings[row["epoch"]])
        at, begun = done, number
    return found


def _writer(directory: Path, log: str, count: int, opened: int) -> Writer:
    """Who opened an epoch there, by that record alone: whoever checks the part with it checks its certificate."""
    try:
        entry = next(itertools.islice(_entries(directory, count, log, opened), opened % BUNDLE, None))
        record = event.decode(parse_frame(entry, log).body)
    except (Bad, BadRecord, UnknownVersion, StopIteration):
        return Writer()
    return Writer(record.epoch, record.pub, opened) if isinstance(record, event.Open) else Writer()


def _go_on(verifier: Verifier, parts: Parts, after: Callable[[Chain], None], note: Callable[[], None]) -> None:
    """Join what was checked apart. A part that is bad, or does not follow, is gone through in order: Bad is the same then.

    This process does what no other has begun, so that it does not wait while there is work.
    """
    done: dict[int, Verifier | None] = {}
    wrong: list[Bad] = []
    for number, (part, future) in enumerate(parts):
        begun = not future.cancel()
        while begun and number not in done and not future.done():
            idle = next((n for n in range(len(parts) - 1, number, -1) if n not in done and parts[n][1].cancel()), None)
            if idle is None:
                break
            done[idle] = parts[idle][0].check()
        checked = done[number] if number in done else future.result() if begun else None
        if checked is not None and verifier.follows(checked):
            verifier.join(checked, after)
            note()
            continue
        tiles = part.tiles()
        verifier.hand_on = tiles.push
        for group in part.groups():
            verifier.batch(group, level=part.level)
            after(verifier.chain)
            note()
        tiles.flush()
        wrong += [tiles.wrong] if tiles.wrong is not None else []
    verifier.hand_on = None
    if parts:
        tiles = ExportedTiles(parts[0][0].directory, parts[0][0].log, parts[0][0].count, verifier.chain.n)
        tiles.wrong = wrong[0] if wrong else None
        tiles.end(verifier.chain)


# ---- checking --------------------------------------------------------------------------------------------------------


def check_chain(
    log: str,
    groups: Iterator[Batch],
    trust: Trust,
    report: Report,
    *,
    level: Level = "full",
    wanted: Mapping[int, str] | None = None,
    known: SavedChain | None = None,
    root: Commitments | None = None,
    start: Verifier | None = None,
    parts: Parts | None = None,
    after: Callable[[Chain], None] = lambda _: None,
    note: Callable[[Verifier], None] = lambda _: None,
) -> Verifier | None:
    """Check one chain and note the first thing that is wrong with it; the verifier's state if nothing is.

    `root` is what was committed of it; `start` goes on after what was archived; `parts` are its groups, checked apart;
    `after` sees the chain's state after each commit group, `note` the verifier's where all of it is right.
    """
    verifier = start or Verifier(log, trust.keys)
    begun, begun_leaf = verifier.chain.n, verifier.chain.previous
    anchor = None if known is None else known.n
    verifier.wanted = frozenset(wanted or ()) | ({anchor - 1} if anchor else frozenset())
    if wanted or anchor is not None:
        report.anchors.add(log)
    try:
        committed = None if root is None else root.watch(log, verifier)
        note(verifier)
        if parts is not None:
            _go_on(verifier, parts, committed or after, lambda: note(verifier))
            groups = iter(())
        for group in groups:
            verifier.batch(group, level=level)
            if committed is not None:
                committed(verifier.chain)
            after(verifier.chain)
            note(verifier)
    except Bad as bad:
        report.add(bad.code, bad.where, bad.why)
        report.logs[log] = verifier.chain.n
        report.records += verifier.chain.n
        return None
    if root is not None:
        root.seen(log, verifier)

    def leaf_of(number: int) -> str | None:
        return begun_leaf if number == begun - 1 else verifier.leaves_of.get(number)

    report.logs[log] = verifier.chain.n
    report.roots[log] = verifier.chain.frontier.root().hex()
    report.records += verifier.chain.n
    report.newest = max(report.newest, verifier.chain.t)
    report.intents += [(log, at, verifier.begun[identity]) for identity, at in verifier.intents.items()]
    if verifier.unknown:
        report.add("U_VERSION", log, f"{verifier.unknown} records of a later version than {VERSION}")
    if known is not None and anchor is not None:
        if verifier.chain.n < anchor:
            report.add("E_TRUNC", f"{log}/{verifier.chain.n}", f"an earlier run saw {anchor} records")
        elif anchor >= max(begun, 1) and leaf_of(anchor - 1) != known.p:
            report.add("E_FORK", f"{log}/{anchor - 1}", "an earlier run saw another record here")
    for number, leaf in (wanted or {}).items():
        if number >= verifier.chain.n:
            report.add("E_TRUNC", f"{log}/{verifier.chain.n}", f"a receipt names record {number}")
        elif number >= begun - 1 and leaf_of(number) != leaf:  # what is pruned cannot be told: the caller says so
            report.add("E_RECEIPT", f"{log}/{number}", "the record is not the one the receipt was given for")
    return verifier


def parse_receipt(text: str) -> Receipt:
    """What an `Audit-Receipt` value names; Unusable if it is none."""
    value = re.sub(r"(?i)^audit-receipt:", "", text.strip()).strip()  # HTTP writes its field names in any case
    match = _RECEIPT.fullmatch(value)
    if match is None:
        raise Unusable('not an Audit-Receipt value, as in log="kms.example/audit/n0-0", seq=17, leaf=:<base64>:')
    log, seq, leaf = match.groups()
    return Receipt(log, int(seq), base64.b64decode(leaf))


def load_receipts(path: Path) -> dict[str, dict[int, str]]:
    """Receipts, one `Audit-Receipt` value a line: chain -> number -> leaf (hex).

    Unusable if two of them name different records in one place: then two histories were told, whatever the log holds.
    """
    found: dict[str, dict[int, str]] = {}
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Unusable(f"receipts {path}: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            log, seq, leaf = parse_receipt(line)
        except Unusable as error:
            raise Unusable(f"receipts {path}, line {number}: {error}") from None
        if found.setdefault(log, {}).setdefault(seq, leaf.hex()) != leaf.hex():
            raise Unusable(f"E_FORK {log}/{seq}: two receipts name different records here, so two histories were told")
    return found


def _load_state(path: Path, trust: Trust) -> Saved:
    try:
        return decode_state(path.read_bytes(), trust.origin, trust.keys)
    except OSError as error:
        raise Unusable(f"state {path}: {error.strerror}") from None
    except BadState as bad:
        raise Unusable(f"state {path}: {bad}") from None


class _Run:
    """One check of an export, chain by chain."""

    def __init__(self, directory: Path, trust: Trust, level: Level, archive: Path | None, saved: Saved | None) -> None:
        self.directory, self.trust, self.level, self.archive, self.saved = directory, trust, level, archive, saved
        self.report = Report()
        self.receipts: Mapping[str, Mapping[int, str]] = {}
        self.root, self.wrong = Commitments(trust.origin), list[Bad]()
        self.logs = exported_logs(directory, trust.origin)
        self._kept: dict[str, SavedChain] = {}

    def known(self, log: str) -> SavedChain | None:
        """What an earlier run saw of a chain."""
        return None if self.saved is None else self.saved.logs.get(log)

    def read_root(self, held: bytes | None) -> None:
        """Check the root log, after what an earlier run saw if that is possible."""
        saved, base = self.saved, self.directory / self.trust.origin
        if saved is not None and saved.root is not None:
            if not _has_root(base):
                self.wrong.append(Bad("E_MISSING", self.trust.origin, "an earlier run saw a root log"))
            elif self._asked_before(saved, held):
                saved = None
        elif saved is not None and (_has_root(base) or self._asked_before(saved, held)):
            saved = None
        self.resuming = saved is not None
        if saved is not None and saved.root is not None:
            self.report.resumed[self.trust.origin] = saved.root.state.n
        given = saved if saved is not None and saved.root is not None else None
        self.root, wrong = read_root(self.directory, self.trust, self.report, held, given)
        self.wrong += wrong

    def _asked_before(self, saved: Saved, held: bytes | None) -> bool:
        """Whether a receipt or a checkpoint names what stands before the saved state: then everything is read."""
        if held is not None and saved.root is not None:
            size = _held(held, self.trust).checkpoint.size
            if size <= saved.root.state.n and size not in {size for size, _ in saved.root.roots}:
                return True
        for log, chain in saved.logs.items():
            begin = 0 if chain.resume is None else chain.resume.state.n
            if any(number < begin - 1 for number in self.receipts.get(log, ())):
                return True
        return False

    def resume(self, log: str) -> Resume | None:
        """Where to go on in a chain; None if it is read from its beginning."""
        known = self.known(log)
        if not self.resuming or known is None or known.resume is None or (self.directory / log / PRUNED).exists():
            return None
        return known.resume

    def chain(self, log: str, parts: Parts | None) -> None:
        """Check one chain."""
        resume = self.resume(log)
        try:
            if resume is None:
                start, groups = _from_the_beginning(self.directory, log, self.trust, self.report, self.archive)
            else:
                start = Verifier.resumed(log, self.trust.keys, plain(resume.state))
                groups = _resumed(self.directory / log, log, resume, start)
                self.report.resumed[log] = resume.state.n
        except Bad as bad:
            self.report.add(bad.code, bad.where, bad.why)
            return
        # The notary may yet commit any size after the newest that it has committed: that is where the next run goes on.
        last, found = max(self.root.sizes(log), default=None), list[dict[str, Any]]()
        if last is None and _has_root(self.directory / self.trust.origin):
            last = 0 if resume is None else resume.state.n

        def note(verifier: Verifier) -> None:
            if verifier.chain.n == last and not found:
                found.append(verifier.state())

        verifier = check_chain(
            log,
            groups,
            self.trust,
            self.report,
            level=self.level,
            wanted=self.receipts.get(log),
            known=self.known(log),
            root=self.root,
            start=start,
            parts=parts,
            note=note,
        )
        if verifier is not None and self.level == "full":
            state = found[0] if found else verifier.state() if last is None else None
            self._kept[log] = self._keep(log, verifier.chain, state, resume)

    def _keep(self, log: str, chain: Chain, state: dict[str, Any] | None, resume: Resume | None) -> SavedChain:
        """What to save of a good chain; nothing to go on with if it does not begin with record 0 here."""
        if state is None or (self.directory / log / PRUNED).exists():
            return SavedChain(chain.n, chain.previous, None)
        place, seals, seal = convert(state, WriterPlace), 0, ""
        n = 0
        if resume is not None:
            n, seals, seal = resume.state.n, resume.seals, resume.seal
        with (self.directory / log / SEALS).open("rb") as file:
            file.seek(seals)
            while n < place.n:
                line = file.readline()
                n, seals, seal = n + json.loads(line)["n"], seals + len(line), line.decode()
        return SavedChain(chain.n, chain.previous, Resume(place, seals, seal))

    def settle(self) -> Saved | None:
        """Compare the chains with the root log; what to save, if all of it is good."""
        report, trust = self.report, self.trust
        for bad in self.wrong:
            report.add(bad.code, bad.where, bad.why)
        heads = self.root.settle(self.logs, report.add, tenants=self.level == "full" and not self.wrong)
        report.overdue()
        clean = self.level == "full" and all(f.code.startswith("W_") for f in report.findings)
        report.settle_anchors(trust.origin, self.logs)
        if not clean:
            return None
        has_root = _has_root(self.directory / trust.origin)
        root = saved_root(self.root, heads) if has_root and heads is not None else None
        logs = self._kept
        if has_root and root is None:  # where a chain was not read from its beginning
            logs = {log: SavedChain(chain.n, chain.p, None) for log, chain in logs.items()}
        return Saved(digests(trust.keys), logs, trust.origin, root)


def verify_export(
    directory: Path,
    trust: Trust,
    *,
    level: Level = "full",
    receipts: Mapping[str, Mapping[int, str]] | None = None,
    state: Saved | None = None,
    held: bytes | None = None,
    archive: Path | None = None,
    pool: Executor | None = None,
    part: int = PART,
) -> tuple[Report, Saved | None]:
    """Check every chain of an export against itself and the root log; the report, and what a later run may go on from.

    `held` is a signed checkpoint that the auditor kept: what the export must extend; `archive` is where pruned records went;
    a `pool` shares the work in parts of so many records, but for a chain that is not read from its beginning. With the
    `state` of an earlier run only what came after it is read, unless a receipt or a checkpoint names something older.
    """
    run = _Run(directory, trust, level, archive, state)
    run.receipts = receipts or {}
    run.read_root(held)
    seen = () if state is None else state.logs
    for log in sorted({*seen, *run.receipts} - set(run.logs)):
        run.report.add("E_MISSING", log, "a receipt or an earlier run knows this chain; the export lacks it")
    if not run.logs and not run.report.findings:
        run.report.add("E_MISSING", trust.origin, "the export holds no chain of this origin")
    handed: dict[str, Parts] = {}
    for log in run.logs if pool is not None else ():
        known = run.known(log)
        wanted = frozenset({*run.receipts.get(log, ()), -1 if known is None else known.n - 1})
        with suppress(Bad):  # said below
            if pool is not None and run.resume(log) is None and exported_segment(directory / log, log) is None:
                sizes = tuple(run.root.sizes(log))
                chain = Part(directory / log, log, trust.keys, level, (), 0, 0, Writer(), wanted, sizes)
                handed[log] = start_parts(pool, chain, part)
    for log in run.logs:
        run.chain(log, handed.get(log))
    return run.report, run.settle()


def _jobs(text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,3}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of processes: 1 or more")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="skms-verify",
        description="Check an exported audit log offline. Exit: 0 intact, 1 tampered, 2 cannot tell.",
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="an export of `skms audit export`")
    parser.add_argument(
        "--trust",
        type=Path,
        required=True,
        help="origin and audit key you trust: get it from the ceremony, not the export",
    )
    parser.add_argument("--level", choices=["hash", "link", "full"], default="full")
    parser.add_argument("--jobs", type=_jobs, default=1, metavar="N", help="processes that share the work (default 1)")
    parser.add_argument("--receipts", type=Path, help="Audit-Receipt values, one a line")
    parser.add_argument("--checkpoint", type=Path, help="a signed checkpoint that you kept, or a witness gave you")
    parser.add_argument(
        "--timestamp-authority",
        type=Path,
        action="append",
        default=[],
        metavar="CERT",
        help="PEM file of an RFC 3161 authority and its root: its tokens are verified (may be given again)",
    )
    parser.add_argument("--policy", type=Path, help="witnesses and quorum, as a C2SP tlog-policy file")
    parser.add_argument("--since", type=Path, metavar="STATE", help="state saved by an earlier run")
    parser.add_argument("--save", type=Path, metavar="STATE", help="save the state if nothing is wrong")
    parser.add_argument("--archive", type=Path, metavar="DIR", help="where pruned records were archived")
    parser.add_argument("--accept-unanchored", action="store_true", help="be content with integrity alone")
    parser.add_argument("--json", action="store_true", help="report as JSON")
    return parser


def _authorities(paths: Sequence[Path]) -> tuple[Authority, ...]:
    if not paths:
        return ()
    from audit.timestamp import BadTimestamp, load_authority

    try:
        return tuple(load_authority(path) for path in paths)
    except BadTimestamp as bad:
        raise Unusable(f"--timestamp-authority {bad}") from None


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    given = sys.argv[1:] if argv is None else argv
    if given and given[0] in {"tenant", "check-proof"}:
        from audit.offline import main as check_one_file

        return check_one_file(given)
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as stop:
        return INTACT if stop.code in {0, None} else USAGE
    try:
        if not arguments.directory.is_dir():
            raise Unusable(f"{arguments.directory} is not a directory")
        trust = load_trust(arguments.trust, arguments.policy)
        trust = replace(trust, authorities=_authorities(arguments.timestamp_authority))
        receipts = None if arguments.receipts is None else load_receipts(arguments.receipts)
        state = None if arguments.since is None else _load_state(arguments.since, trust)
        if arguments.save is not None and arguments.level != "full":
            raise Unusable("--save needs --level full: only what was checked in full may be left out next time")
        held = None if arguments.checkpoint is None else _text(arguments.checkpoint, "checkpoint").encode()
        if held is not None:
            _held(held, trust)
    except Unusable as error:
        print(f"skms-verify: {error}", file=sys.stderr)
        return USAGE
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.jobs - 1, mp_context=spawn) if arguments.jobs > 1 else nullcontext() as pool:
        report, saved = verify_export(
            arguments.directory,
            trust,
            level=arguments.level,
            receipts=receipts,
            state=state,
            held=held,
            archive=arguments.archive,
            pool=pool,
        )
    if arguments.accept_unanchored:
        report.findings = [f for f in report.findings if f.code != "U_NOANCHOR"]
    if arguments.json:
        print(report.as_json())
    else:
        for finding in report.findings:
            print(finding)
        if report.exit_status == INTACT:
            for log, count in report.logs.items():
                before = report.resumed.get(log)
                told = "" if before is None else f"; the first {before} as the earlier run found them"
                print(f"intact {log}: {count} records, root {report.roots[log]}{told}")
    if arguments.save is not None and report.exit_status == INTACT and saved is not None:
        arguments.save.write_bytes(saved.encode())
    return report.exit_status


if __name__ == "__main__":
    sys.exit(main())
