"""Archiving and pruning: whole tiles of a chain go to signed, write-once files, and only then leave the database.

In this order: verify the chain from storage up to what a signed checkpoint commits; write the files; sign their manifest
in the HSM; read every file back and verify it completely; commit the `prune` record together with the segment's row; then
delete. Killed anywhere, a repeated run finds what is done: the same files are written with the same bytes, the row exists
or not, and what it covers is deleted after the files were read back once more.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import Connection, Engine

from audit import event
from audit.chain import BUNDLE, DAY_US, Bad, Batch, Frontier, Verifier, leaf_hash, pack, parse_frame, unpack
from audit.checkpoint import BadNote, key_of, open_checkpoint
from audit.event import BadRecord, UnknownVersion
from audit.forward import positions
from audit.log import Change, Signer
from audit.notary import Fence, newest
from audit.rootlog import MAX_SHARDS
from audit.segments import (
    MAX_RECORDS,
    Archive,
    Segment,
    bundle_path,
    compressed,
    hashes_path,
    seal_line,
    seals_path,
)
from audit.stored import archived, beginning, segment_of, stored_batches
from audit.tables import archive_table, batch_table, index_table, intent_table, prune, root_table, shard_table
from audit.tree import ChainEntries, in_tree

AT_ONCE: Final = 4_096  # records deleted in one transaction: writers wait for it
FOREVER: Final = 0


class ArchiveFailed(Exception):
    """The archive cannot be written or is not what was written; nothing was deleted. The message says what to do."""


@dataclass(frozen=True, slots=True)
class Retention:
    """How many days records stay in the database: `default` (0: for ever), a tenant's own if that is longer, and those
    of tenants under legal hold for as long as they are.
    """

    default: int
    tenants: Mapping[str, int] = field(default_factory=dict)
    held: frozenset[str] = frozenset()

    def cutoff(self, tenant: str | None, now: int) -> int:
        """Records of a tenant (None: of nobody) before this time (us, a UTC midnight) may go; 0 if none may."""
        own = self.default if tenant is None else self.tenants.get(tenant, self.default)
        if FOREVER in (self.default, own) or tenant in self.held:
            return 0
        return max(0, now // DAY_US - max(self.default, own)) * DAY_US

    @property
    def policy(self) -> str:
        """What a `prune` record calls it: the default, and the hash of everything."""
        described = repr((self.default, sorted(self.tenants.items()), sorted(self.held)))
        return f"retention:{self.default}d:{hashlib.sha256(described.encode()).hexdigest()[:16]}"


class Archiver:
    """Archives the chains of one log below a directory. Use under a lease; `fence` of each call holds it to that."""

    def __init__(
        self,
        engine: Engine,
        *,
        origin: str,
        signer: Signer,
        directory: Path,
        retention: Retention,
        clock: Callable[[], int],
        sinks: tuple[str, ...] = (),
        at_once: int = AT_ONCE,
    ) -> None:
        """`sinks` are the configured receivers of the log: what one of them still waits for stays."""
        self._engine, self._origin, self._signer = engine, origin, signer
        self._reading = engine.execution_options(reading=True)
        self._directory, self._retention, self._clock, self._at_once = directory, retention, clock, at_once
        self._sinks = sinks

    # ---- what may go -------------------------------------------------------------------------------------------------

    def planned(self, before: int | None = None) -> list[Segment]:
        """Segments that may go, unsigned, without their files: verified from storage, and committed by a checkpoint.

        Only whole UTC days before `before` (us). Bad if anything stored does not verify.
        """
        now = self._clock()
        latest = now if before is None else min(now, before)
        with self._reading.connect() as connection:
            committed = self._committed(connection)
            rows = connection.execute(sa.select(shard_table).order_by(shard_table.c.shard)).mappings().all()
            found = []
            for row in rows:
                if row["log_id"] in committed:
                    found += self._plan(connection, row, *committed[row["log_id"]], latest // DAY_US * DAY_US, now)
        return found

    def _committed(self, connection: Connection) -> dict[str, tuple[int, str]]:
        """How far the newest signed checkpoint reaches: chain -> (records, root). Bad if the root log is not its tree."""
        signed = newest(connection)
        if signed is None:
            return {}
        where = f"{self._origin}/{signed.checkpoint.size}"
        try:
            checkpoint = open_checkpoint(
                signed.note, self._origin, [key_of(self._origin, spki) for spki in self._signer.known_keys()]
            )
        except BadNote as bad:
            raise Bad("E_SIG", where, str(bad)) from None
        tree = Frontier()
        covered = root_table.c.seq < checkpoint.size
        for leaf in connection.execute(
            sa.select(root_table.c.leaf).where(covered).order_by(root_table.c.seq)
        ).scalars():
            tree.push(leaf)
        if (tree.n, tree.root()) != (checkpoint.size, checkpoint.root):
            raise Bad("E_ROOT", where, "the stored root log is not the one whose checkpoint was signed")
        found: dict[str, tuple[int, str]] = {}
        for seq in range(checkpoint.size - 1, -1, -1):
            heads = self._heads(connection, seq)
            for log, size, root in heads.shards:
                found.setdefault(log, (size, root))
            if heads.full and len(heads.shards) < MAX_SHARDS:  # it lists every chain: nothing older is newer
                break
        return found

    def _heads(self, connection: Connection, seq: int) -> event.Heads:
        row = connection.execute(sa.select(root_table).where(root_table.c.seq == seq)).mappings().one()
        where = f"{self._origin}/{seq}"
        if leaf_hash(row["entry"]) != row["leaf"]:
            raise Bad("E_DERIVED", where, "stored column leaf differs from the entry")
        try:
            return event.decode_heads(parse_frame(row["entry"], where).body)
        except BadRecord as bad:
            raise Bad(bad.code, where, str(bad)) from None
        except UnknownVersion:
            raise Bad("U_VERSION", where, "an entry of a later version: use the newer program") from None

    def _plan(self, connection: Connection, row: Any, size: int, root: str, latest: int, now: int) -> list[Segment]:
        log, shard = row["log_id"], row["shard"]
        verifier, last = beginning(connection, shard, log, self._signer.known_keys())
        done = archived(connection, log)
        if done and (last is None or done[-1].first != last.first):
            return []  # what was archived before is still stored: it goes first
        first_open = connection.execute(
            sa.select(sa.func.min(intent_table.c.seq)).where(intent_table.c.shard == shard)
        ).scalar()
        sent = positions(connection)
        unsent = min((sent.get(name, {}).get(log, 0) for name in self._sinks), default=size)
        verifier.chain.touched = set()
        walk = _Walk(verifier, first=last.to if last is not None else 0, uri=self._uri(log))
        for batch in stored_batches(connection, shard, log, after=verifier.chain.n):
            if verifier.chain.n >= size:
                break
            ends = batch.first + batch.n
            keeps = (
                ends >= min(size, row["next_seq"]) or (first_open is not None and ends > first_open) or ends > unsent
            )
            walk.take(batch)
            if keeps or not self._may_go(batch, verifier, latest, now):
                walk.stop()
            verifier.chain.touched.clear()
        if (verifier.chain.n, verifier.chain.frontier.root().hex()) != (size, root):
            raise Bad("E_ROOT", f"{log}/{size}", "the root log committed another root of this chain")
        return walk.segments()

    def _may_go(self, batch: Batch, verifier: Verifier, latest: int, now: int) -> bool:
        tenants = {None, *(verifier.chain.touched or ())}
        return all(batch.t < min(latest, self._retention.cutoff(tenant, now)) for tenant in tenants)

    def _uri(self, log: str) -> str:
        return (self._directory.absolute() / log).as_uri()

    # ---- writing -----------------------------------------------------------------------------------------------------

    def write(self, planned: Segment) -> Segment:
        """Write a segment's files, sign, and read all of it back. ArchiveFailed or Bad: then nothing may be deleted."""
        planned = self._adopted(planned)
        with self._reading.connect() as connection:
            shard = self._shard(connection, planned.log)
            first = self._before(connection, planned)
            batches = list(stored_batches(connection, shard, planned.log, after=first))
        ending = [b for b in batches if b.first < planned.at]
        entries = [e for b in batches if b.first < planned.to for e in unpack(b.entries)]
        entries = entries[planned.first - first : planned.to - first]
        if len(entries) != planned.to - planned.first:
            raise Bad("E_TRUNC", planned.where, "the database no longer holds the records that were planned")
        files = {seals_path(planned.first, planned.to): compressed(b"".join(seal_line(b) for b in ending))}
        for at in range(0, len(entries), BUNDLE):
            number, bundle = (planned.first + at) // BUNDLE, entries[at : at + BUNDLE]
            files[bundle_path(number)] = compressed(pack(bundle))
            files[hashes_path(number)] = b"".join(leaf_hash(e) for e in bundle)
        base = self._directory / planned.log
        for path, data in files.items():
            _put(base / path, data)
        segment = replace(planned, digests={path: hashlib.sha256(data).hexdigest() for path, data in files.items()})
        segment = self._signed(segment)
        self.check(segment)
        return segment

    def _adopted(self, planned: Segment) -> Segment:
        """What an interrupted run signed already, where that is less than what is planned now."""
        for there in Archive(self._directory, planned.log).segments():
            if there.first == planned.first:
                if there.to > planned.to:
                    raise ArchiveFailed(
                        f"{there.path} was written by an interrupted run and reaches beyond what may go now: "
                        f"run again when records up to {there.to} may go"
                    )
                there.verifier(self._signer.known_keys())
                return replace(there, digests={}, seal=b"")
        return planned

    def _signed(self, segment: Segment) -> Segment:
        """Signed by the audit key; what an earlier run signed stays, because ECDSA would sign it anew each time."""
        path = self._directory / segment.log / segment.path
        if path.exists():
            with contextlib.suppress(ValueError):
                manifest, seal, _ = path.read_bytes().split(b"\n")
                if manifest == segment.manifest:
                    return replace(segment, seal=bytes.fromhex(seal.decode("ascii")))
        signed = replace(segment, seal=self._signer.sign(segment.statement))
        _put(path, signed.file())
        return signed

    def check(self, segment: Segment) -> None:
        """Read a segment back and verify all of it: hashes, links, seals, the signed state. Bad names what is wrong."""
        keys, archive = self._signer.known_keys(), Archive(self._directory, segment.log)
        signed = segment.verifier(keys)
        with self._reading.connect() as connection:
            before = [s for s in archived(connection, segment.log) if s.to <= segment.first]
            shard = self._shard(connection, segment.log)
        verifier = before[-1].verifier(keys) if before else Verifier(segment.log, keys)
        there = {s.first: s for s in archive.segments()}.get(segment.first)
        if there is None or there.file() != segment.file():
            raise Bad("E_DERIVED", segment.where, f"{segment.path} in the archive is not what was signed")
        archive.check_files(segment)
        for batch in archive.batches([segment], verifier.chain.n):
            verifier.batch(batch)
        if verifier.state() != signed.state():
            raise Bad("E_ROOT", segment.where, "the archived records do not lead to the state that was signed")
        rest = list(archive.entries(segment.at, segment.to))
        hashes = b"".join(
            (self._directory / segment.log / hashes_path(n)).read_bytes()
            for n in range(segment.first // BUNDLE, segment.to // BUNDLE)
        )
        for entry in rest:
            verifier.chain.check(entry, full=False)
        if hashes != b"".join(leaf_hash(e) for e in archive.entries(segment.first, segment.to)):
            raise Bad("E_DERIVED", segment.where, "the archived hash tiles are not those of the entries")
        # The database keeps the hash tiles of what leaves it: proofs of all other records need them.
        tree, root = ChainEntries(segment.log, shard), verifier.chain.frontier.root()
        in_tree(self._engine, tree, segment.to, root, lambda _: None)

    # ---- recording and pruning ---------------------------------------------------------------------------------------

    def record(self, segment: Segment, *, node: str, actor: str) -> event.Prune:
        """What is recorded before anything is deleted."""
        return event.Prune(
            id=str(uuid.UUID(bytes=os.urandom(16), version=4)),
            ts=self._clock(),
            node=node,
            actor=event.actor_field(actor),
            authn="internal",
            op="archive_records",
            out="ok",
            log=segment.log,
            from_=segment.first,
            to=segment.to,
            at=segment.at,
            hash=segment.sha256,
            policy=self._retention.policy,
        )

    def change(self, segment: Segment, fence: Fence) -> Change:
        """The segment's row, which commits with its record. A segment has one row, so one record says `ok`."""

        def write(connection: Connection) -> None:
            fence(connection)
            values = {
                "log": segment.log,
                "from_seq": segment.first,
                "to_seq": segment.to,
                "at_seq": segment.at,
                "sha256": bytes.fromhex(segment.sha256),
                "uri": segment.uri,
                "manifest": segment.manifest,
                "seal": segment.seal,
            }
            connection.execute(sa.insert(archive_table), [values])

        return Change(write, lambda: None)

    def pending(self) -> list[Segment]:
        """Segments that are archived and recorded, and whose records the database still holds."""
        with self._reading.connect() as connection:
            c = archive_table.c
            earliest = (
                sa.select(sa.func.min(batch_table.c.first_seq))
                .where(batch_table.c.shard == shard_table.c.shard, shard_table.c.log_id == c.log)
                .scalar_subquery()
            )
            chosen = sa.select(archive_table).where(c.at_seq > earliest).order_by(c.log, c.from_seq)
            return [segment_of(row) for row in connection.execute(chosen).mappings()]

    def prune(self, segment: Segment, fence: Fence) -> int:
        """Delete what a recorded segment covers, oldest first; how many batches. Call `check` or `write` before."""
        with self._reading.connect() as connection:
            shard = self._shard(connection, segment.log)
            recorded = [s for s in archived(connection, segment.log) if s.first == segment.first]
            chosen = sa.select(sa.func.min(batch_table.c.first_seq)).where(batch_table.c.shard == shard)
            begin = int(connection.execute(chosen).scalar() or 0)
        if [s.manifest for s in recorded] != [segment.manifest]:
            raise ArchiveFailed(f"{segment.where}: no prune record names this segment: nothing was deleted")
        deleted = 0
        while begin < segment.at:
            begin = min(begin + self._at_once, segment.at)
            with self._engine.begin() as connection:
                fence(connection)
                deleted += self._delete(connection, shard, begin, segment.at)
        return deleted

    def _delete(self, connection: Connection, shard: int, to: int, at: int) -> int:
        i, gone = index_table.c, prune(connection, shard, below=to, stands_from=at)
        connection.execute(sa.delete(index_table).where(i.shard == shard, i.first_seq < to))
        return gone

    def _shard(self, connection: Connection, log: str) -> int:
        return int(connection.execute(sa.select(shard_table.c.shard).where(shard_table.c.log_id == log)).scalar_one())

    def _before(self, connection: Connection, segment: Segment) -> int:
        """The number of the first record that the database holds before this segment."""
        return max((s.at for s in archived(connection, segment.log) if s.to <= segment.first), default=0)


_End = tuple[int, int, dict[str, Any]]  # number of the next record, time of the last one, state


class _Walk:
    """Follows a verifier through a chain and notes where segments may end: the last group boundary before a tile's."""

    def __init__(self, verifier: Verifier, *, first: int, uri: str) -> None:
        self._verifier, self._uri = verifier, uri
        self._first, self._to = first, first
        self._at = verifier.chain.n
        self._end: _End | None = None
        self._next: tuple[int, _End] | None = None
        self._open, self._found = True, list[Segment]()

    def take(self, batch: Batch) -> None:
        """Verify the next group, and note the end that it makes possible if it may go: `stop` says that it may not."""
        self._settle()
        verifier, end = self._verifier, batch.first + batch.n
        tile = end // BUNDLE * BUNDLE
        crosses = self._open and tile > self._to
        before = self._state() if crosses and tile != end else None
        verifier.batch(batch)
        if crosses:
            found = before or self._state()
            if found[0] > self._at:  # a group longer than what is before it: the next one may end better
                self._next = (tile, found)

    def stop(self) -> None:
        """The group that was taken stays, and so does all after it."""
        self._open, self._next = False, None

    def segments(self) -> list[Segment]:
        """What may go."""
        self._settle()
        self._cut()
        return self._found

    def _state(self) -> _End:
        return self._verifier.chain.n, self._verifier.chain.t, self._verifier.state()

    def _settle(self) -> None:
        """The group noted last may go."""
        if self._next is None:
            return
        tile, end = self._next
        if tile - self._first > MAX_RECORDS:
            self._cut()
        self._to, self._end, self._next = tile, end, None

    def _cut(self) -> None:
        if self._end is not None:
            at, t, state = self._end
            log = self._verifier.chain.log
            self._found.append(Segment(log, self._first, self._to, at, t, self._uri, state, {}))
            self._first, self._at, self._end = self._to, at, None


async def archive(
    archiver: Archiver,
    append: Callable[[event.Record, Change], Awaitable[object]],
    hold: Callable[[], Fence],
    *,
    node: str,
    actor: str,
    before: int | None = None,
) -> list[Segment]:
    """Archive, record and prune all that may go; the segments that were pruned.

    `hold` takes or renews the lease and gives its fence, or raises. ArchiveFailed or Bad: what was not pruned by then is
    in the database still, and a repeated run goes on.
    """
    done = []

    async def prune(segment: Segment) -> None:
        await asyncio.to_thread(archiver.prune, segment, hold())
        done.append(segment)

    for segment in await asyncio.to_thread(archiver.pending):
        await asyncio.to_thread(archiver.check, segment)
        await prune(segment)
    while planned := await asyncio.to_thread(archiver.planned, before):
        for wanted in planned:
            fence = hold()
            segment = await asyncio.to_thread(archiver.write, wanted)
            await append(archiver.record(segment, node=node, actor=actor), archiver.change(segment, fence))
            await prune(segment)
            if segment.to != wanted.to:
                break  # those after it begin elsewhere
    return done


def _put(path: Path, data: bytes) -> None:
    """Write a file once, durably: it appears whole or not at all. ArchiveFailed if other bytes are there already."""
    try:
        if path.exists():
            if path.read_bytes() != data:
                raise ArchiveFailed(f"{path} exists and holds something else: choose another directory")
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(part, path)  # unlike a rename it never replaces anything
        except FileExistsError:
            if path.read_bytes() != data:
                raise ArchiveFailed(f"{path} exists and holds something else: choose another directory") from None
        finally:
            part.unlink()
        with _directory(path.parent) as fd:
            os.fsync(fd)
    except OSError as error:
        raise ArchiveFailed(
            f"{path}: {error.strerror}: nothing was deleted; free space or mend it, then run again"
        ) from None


@contextlib.contextmanager
def _directory(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)
