"""Archived parts of a chain: signed, compressed, written once, readable without the database. Pure.

DIR/<origin>/<chain>/tile/entries/<N>.gz       entry bundles of 256 (C2SP tlog-tiles), gzip
DIR/<origin>/<chain>/tile/0/<N>                their hash tiles
DIR/<origin>/<chain>/seals/<from>-<to>.jsonl.gz    seals of the commit groups that end in the segment, gzip
DIR/<origin>/<chain>/segments/<from>-<to>.json     what the audit key signed: line 1 the manifest, line 2 the signature

A segment holds whole tiles, records `from` to `to` - 1. Commit groups end where they like: the last group that ends within
the segment ends at `at` <= `to`, and the manifest says in which state the chain was there. From that state on a verifier
can check what the database kept, without the archive.
"""

from __future__ import annotations

import gzip
import hashlib
import hmac
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from audit.chain import BUNDLE, MAX_ENTRY, Bad, Batch, Verifier, certified, pack, segment_statement, unpack
from audit.event import encode_plain
from audit.tiles import ENTRIES, tile_path

MAX_RECORDS: Final = 65_536  # of one segment
_MAX_BUNDLE: Final = BUNDLE * (MAX_ENTRY + 2)
_MAX_SEALS: Final = MAX_RECORDS * 1_024
_NAME: Final = re.compile(r"([0-9]{1,16})-([0-9]{1,16})\.json")
_SEAL_FIELDS: Final = {"day", "epoch", "first", "head", "n", "seal", "t"}


@dataclass(frozen=True, slots=True)
class Segment:
    """A manifest and its signature. `digests` has the SHA-256 of each file by its path below the chain's folder."""

    log: str
    first: int
    to: int
    at: int
    t: int  # time of the last record of `at` (us)
    uri: str
    state: dict[str, Any]
    digests: dict[str, str]
    seal: bytes = b""

    @property
    def manifest(self) -> bytes:
        """What is signed, as canonical JSON."""
        return encode_plain(
            {
                "at": self.at,
                "files": [[path, digest] for path, digest in sorted(self.digests.items())],
                "from": self.first,
                "log": self.log,
                "state": self.state,
                "t": self.t,
                "to": self.to,
                "uri": self.uri,
                "v": 1,
            }
        )

    @property
    def sha256(self) -> str:
        """Of the manifest: what the `prune` record names."""
        return hashlib.sha256(self.manifest).hexdigest()

    @property
    def statement(self) -> bytes:
        """What the audit key signs."""
        return segment_statement(self.log, self.first, self.to, self.at, self.sha256)

    @property
    def path(self) -> str:
        """Of the manifest, below the chain's folder."""
        return f"segments/{self.first}-{self.to}.json"

    @property
    def where(self) -> str:
        """For findings."""
        return f"{self.log}/{self.first}"

    def file(self) -> bytes:
        """The manifest's file."""
        return self.manifest + b"\n" + self.seal.hex().encode() + b"\n"

    def verifier(self, keys: Sequence[bytes]) -> Verifier:
        """A verifier that goes on after the segment; Bad if no audit key vouches for it."""
        if not certified(keys, self.seal, self.statement):
            raise Bad("E_SEAL", self.where, "no trusted audit key signed this archived segment")
        try:
            return Verifier.resumed(self.log, keys, self.state)
        except (ValueError, KeyError, TypeError):
            raise Bad("E_SCHEMA", self.where, "the state in the signed manifest cannot be used") from None


def parse_segment(manifest: bytes, seal: bytes, where: str) -> Segment:
    """A segment from its manifest's bytes; Bad E_CANON if they are not the one spelling. Its signature is not checked."""
    try:
        raw = json.loads(manifest)
        found = Segment(
            log=str(raw["log"]),
            first=int(raw["from"]),
            to=int(raw["to"]),
            at=int(raw["at"]),
            t=int(raw["t"]),
            uri=str(raw["uri"]),
            state=dict(raw["state"]),
            digests={str(path): str(digest) for path, digest in raw["files"]},
            seal=seal,
        )
        good = found.manifest == manifest
    except (ValueError, KeyError, TypeError, RecursionError):
        good = False
    if not good:
        raise Bad("E_CANON", where, "not the manifest of a segment")
    return found


def compressed(data: bytes) -> bytes:
    """The same bytes for the same data, so that a repeated run writes what is there already."""
    return gzip.compress(data, 9, mtime=0)


def _expanded(data: bytes, limit: int) -> bytes:
    """ValueError if it is not one gzip member, or beyond the limit."""
    try:
        stream = zlib.decompressobj(31)
        found = stream.decompress(data, limit)
    except zlib.error as error:
        raise ValueError(str(error)) from None
    if not stream.eof or stream.unused_data:
        raise ValueError("cut, too large or followed by something")
    return found


def bundle_path(number: int) -> str:
    """Of a compressed entry bundle."""
    return tile_path(ENTRIES, number) + ".gz"


def hashes_path(number: int) -> str:
    """Of its hash tile."""
    return tile_path(0, number)


def seals_path(first: int, to: int) -> str:
    """Of a segment's seals."""
    return f"seals/{first}-{to}.jsonl.gz"


def seal_line(batch: Batch) -> bytes:
    """A line of `seals.jsonl`."""
    line = {
        "day": batch.day,
        "epoch": batch.epoch,
        "first": batch.first,
        "head": batch.head.hex(),
        "n": batch.n,
        "seal": batch.seal.hex(),
        "t": batch.t,
    }
    return encode_plain(line) + b"\n"


class Archive:
    """The archive of one chain below a directory."""

    def __init__(self, directory: Path, log: str) -> None:
        self._base, self.log = directory / log, log

    def segments(self) -> list[Segment]:
        """Every segment, in order; Bad if one is missing between others. Signatures are not checked."""
        folder = self._base / "segments"
        names = [p for p in folder.iterdir() if _NAME.fullmatch(p.name)] if folder.is_dir() else []
        found = sorted((self._segment(path) for path in names), key=lambda s: s.first)
        to = 0
        for segment in found:
            if segment.log != self.log or segment.first != to or segment.path != f"segments/{to}-{segment.to}.json":
                raise Bad("E_SEQ", f"{self.log}/{to}", f"the next archived segment is {segment.path}")
            to = segment.to
        return found

    def _segment(self, path: Path) -> Segment:
        where = f"{self.log}/{path.stem}"
        try:
            manifest, seal, rest = path.read_bytes().split(b"\n")
            return parse_segment(manifest, bytes.fromhex(seal.decode("ascii")) if not rest else b"", where)
        except (OSError, ValueError):
            raise Bad("E_CANON", where, f"{path.name} is not the manifest of a segment") from None

    def check_files(self, segment: Segment) -> None:
        """Bad E_DERIVED unless every file of a segment has the hash that was signed."""
        for path, digest in segment.digests.items():
            if not hmac.compare_digest(hashlib.sha256(self._read(path, segment.first)).hexdigest(), digest):
                raise Bad("E_DERIVED", segment.where, f"the archived file {path} is not the one that was signed")

    def batches(self, segments: Sequence[Segment], begin: int) -> Iterator[Batch]:
        """The commit groups of adjoining segments, the first of which begins with record `begin`."""
        at, kept = begin, _Kept(self, begin)
        for segment in segments:
            for row in self._seals(segment):
                if row["first"] != at:
                    raise Bad("E_SEQ", f"{self.log}/{at}", f"the next archived seal is of record {row['first']}")
                at += row["n"]
                yield Batch(
                    log=self.log,
                    first=row["first"],
                    n=row["n"],
                    epoch=row["epoch"],
                    t=row["t"],
                    entries=pack(kept.take(row["n"], segment.to)),
                    head=bytes.fromhex(row["head"]),
                    seal=bytes.fromhex(row["seal"]),
                    day=row["day"],
                )

    def entries(self, first: int, to: int) -> Iterator[bytes]:
        """Records `first` to `to` - 1."""
        for number in range(first // BUNDLE, -(-to // BUNDLE)):
            low = number * BUNDLE
            yield from self.bundle(number)[max(0, first - low) : to - low]

    def bundle(self, number: int) -> list[bytes]:
        """The 256 entries of a bundle; Bad if it is missing or damaged."""
        first, path = number * BUNDLE, bundle_path(number)
        try:
            found = unpack(_expanded(self._read(path, first), _MAX_BUNDLE))
        except ValueError as error:
            raise Bad("E_PARSE", f"{self.log}/{first}", f"archived bundle {path}: {error}") from None
        if len(found) != BUNDLE:
            raise Bad("E_TRUNC", f"{self.log}/{first}", f"archived bundle {path} holds {len(found)} entries")
        return found

    def _read(self, path: str, seq: int) -> bytes:
        try:
            return (self._base / path).read_bytes()
        except OSError:
            raise Bad("E_TRUNC", f"{self.log}/{seq}", f"the archived file {path} cannot be read") from None

    def _seals(self, segment: Segment) -> Iterator[dict[str, Any]]:
        path = seals_path(segment.first, segment.to)
        try:
            lines = _expanded(self._read(path, segment.first), _MAX_SEALS).splitlines(keepends=True)
            rows = [json.loads(line) for line in lines]
            good = all(
                isinstance(row, dict)
                and set(row) == _SEAL_FIELDS
                and all(type(row[k]) is int and 0 <= row[k] < 2**53 for k in ("day", "epoch", "first", "n", "t"))
                and all(re.fullmatch(r"(?:[0-9a-f]{2})+", row[k]) for k in ("head", "seal"))
                and encode_plain(row) + b"\n" == line
                for row, line in zip(rows, lines, strict=True)
            )
        except (ValueError, TypeError, RecursionError):
            good = False
        if not good:
            raise Bad("E_CANON", segment.where, f"archived seals {path} are not ours")
        yield from rows


class _Kept:
    """Entries in order, bundle by bundle."""

    def __init__(self, archive: Archive, begin: int) -> None:
        self._archive, self._at = archive, begin
        self._bundle: tuple[int, list[bytes]] = (-1, [])

    def take(self, count: int, to: int) -> list[bytes]:
        if self._at + count > to:
            raise Bad("E_SEQ", f"{self._archive.log}/{self._at}", "an archived seal reaches beyond its segment")
        found = []
        for seq in range(self._at, self._at + count):
            number = seq // BUNDLE
            if number != self._bundle[0]:
                self._bundle = (number, self._archive.bundle(number))
            found.append(self._bundle[1][seq % BUNDLE])
        self._at += count
        return found


def verified_archive(directory: Path, segments: Sequence[Segment], last: Segment) -> Iterator[Batch]:
    """The groups of a chain up to `last`; Bad if the archive's manifests, or its files, are others than the ones known.

    The files' hashes are compared after their groups, so that a finding names the record wherever it can.
    """
    archive = Archive(directory, last.log)
    there = [s for s in archive.segments() if s.at <= last.at]
    if [s.manifest for s in there] != [s.manifest for s in segments]:
        raise Bad("E_MISSING", f"{last.log}/0", f"the archive lacks segments up to record {last.at}, or has others")
    yield from archive.batches(there, 0)
    for segment in there:
        archive.check_files(segment)


# ---- an export of a chain whose beginning is archived ----------------------------------------------------------------


PRUNED: Final = "pruned.json"  # the manifest's file of the last segment that the database no longer holds
LEAD: Final = "lead"  # bundle of records `at` to `to` - 1: they stand in the last archived tile


def exported_segment(directory: Path, log: str) -> Segment | None:
    """The segment after which an exported chain begins; None if it begins with record 0."""
    path = directory / PRUNED
    if not path.is_file():
        return None
    where = f"{log}/0"
    try:
        manifest, seal, rest = path.read_bytes().split(b"\n")
        found = parse_segment(manifest, bytes.fromhex(seal.decode("ascii")) if not rest else b"", where)
    except (OSError, ValueError):
        raise Bad("E_CANON", where, f"{PRUNED} is not the manifest of a segment") from None
    if found.log != log:
        raise Bad("E_ORIGIN", where, f"{PRUNED} belongs to {found.log}")
    return found
