"""What the database holds of the log: read batch by batch, restored from a snapshot, verified column by column."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Engine

from audit.chain import (
    Bad,
    Batch,
    Chain,
    Frontier,
    Verifier,
    certified,
    chain_of,
    check_seal,
    parse_frame,
    snapshot_of,
    snapshot_statement,
    unpack,
    writer_statement,
)
from audit.checkpoint import BadNote, Signature, open_checkpoint, parse_checkpoint, parse_note, with_cosignatures
from audit.commitments import Commitments, Opened, open_note
from audit.event import Recovery
from audit.rootlog import RootLog, next_origin, other_generation
from audit.segments import Segment, parse_segment, verified_archive
from audit.tables import (
    archive_table,
    batch_table,
    checkpoint_table,
    frontier_table,
    intent_table,
    past_checkpoint_table,
    past_root_table,
    root_table,
    shard_table,
    snapshot_table,
    tenant_table,
    witness_table,
)
from audit.verify import Report, Trust, check_chain


@contextmanager
def snapshot(engine: Engine) -> Iterator[Connection]:
    """A connection whose whole transaction sees one moment: whoever checks a live log must not see it move."""
    options = {} if engine.dialect.name == "sqlite" else {"isolation_level": "REPEATABLE READ"}
    with engine.execution_options(reading=True).connect() as connection:
        yield connection.execution_options(**options)


def stored_batches(connection: Connection, shard: int, log: str, *, after: int = 0) -> Iterator[Batch]:
    chosen = (
        sa.select(batch_table)
        .where(batch_table.c.shard == shard, batch_table.c.first_seq >= after)
        .order_by(batch_table.c.first_seq, batch_table.c.day)
        .execution_options(yield_per=64)
    )
    with connection.execute(chosen) as result:  # who stops halfway must not leave a cursor on the server
        for row in result.mappings():
            yield Batch(
                log=log,
                first=row["first_seq"],
                n=row["n"],
                epoch=row["epoch"],
                t=row["t"],
                entries=row["entries"],
                head=row["head"],
                seal=row["seal"],
                day=row["day"],
            )


def restore(blob: bytes, seal: bytes, epoch: int, name: str, audit_keys: Sequence[bytes]) -> Verifier | None:
    """A verifier that goes on from a snapshot, if its writer was certified and sealed it; None otherwise."""
    try:
        state = json.loads(blob)
        chain = chain_of(state)
        opened, previous = state["opened"]
        pub, cert = str(state["pub"]), bytes.fromhex(state["cert"])
    except (ValueError, KeyError, TypeError):
        return None
    if chain.log != name:
        return None
    vouched = certified(audit_keys, cert, writer_statement(name, epoch, opened, previous, pub))
    if not vouched or not check_seal(pub, seal, snapshot_statement(name, epoch, chain.n, blob)):
        return None
    verifier = Verifier(name, audit_keys, chain)
    verifier.epoch, verifier.writer = epoch, pub
    verifier.resume(opened)
    return verifier


def segment_of(row: Any) -> Segment:
    """A stored row of an archived segment; Bad E_DERIVED if its columns say other things than its manifest."""
    found = parse_segment(row["manifest"], row["seal"], f"{row['log']}/{row['from_seq']}")
    stored = (row["log"], row["from_seq"], row["to_seq"], row["at_seq"], row["sha256"].hex(), row["uri"])
    if stored != (found.log, found.first, found.to, found.at, found.sha256, found.uri):
        raise Bad("E_DERIVED", found.where, "the row of an archived segment differs from its manifest")
    return found


def archived(connection: Connection, log: str) -> list[Segment]:
    """The segments of a chain that were archived, in order. Signatures are not checked."""
    chosen = sa.select(archive_table).where(archive_table.c.log == log).order_by(archive_table.c.from_seq)
    return [segment_of(row) for row in connection.execute(chosen).mappings()]


def beginning(connection: Connection, shard: int, log: str, keys: Sequence[bytes]) -> tuple[Verifier, Segment | None]:
    """A verifier where the stored records of a chain begin, and the archived segment before them, if there is one.

    Rows that an interrupted pruning left behind stand before that. Bad if no audit key vouches for the segment.
    """
    first = connection.execute(sa.select(sa.func.min(batch_table.c.first_seq)).where(batch_table.c.shard == shard))
    begin = first.scalar()
    chosen = sa.select(archive_table).where(archive_table.c.log == log, archive_table.c.at_seq >= (begin or 0))
    row = connection.execute(chosen.order_by(archive_table.c.at_seq).limit(1)).mappings().first()
    if row is None or begin == 0:
        return Verifier(log, keys), None
    segment = segment_of(row)
    return segment.verifier(keys), segment


# ---- the whole database ----------------------------------------------------------------------------------------------


def verify_database(engine: Engine, trust: Trust, archive: Path | None = None, *, held: bytes | None = None) -> Report:
    """Recompute and compare every stored column of every audit table; the first bad record of each chain is named.

    With the archive's directory, what was pruned is verified too; else U_PRUNED says what it was. `held` is a signed
    checkpoint from outside this database; BadNote if the log did not sign it.
    """
    with snapshot(engine) as connection:
        return verify_connection(connection, trust, archive, held=held)


def verify_connection(
    connection: Connection, trust: Trust, archive: Path | None = None, *, held: bytes | None = None
) -> Report:
    """As `verify_database`, on a connection: what it sees in its transaction."""
    report = Report()
    anchor = None if held is None else open_note(held, trust.origin, trust.note_keys(), trust.policy)
    shards = connection.execute(sa.select(shard_table).order_by(shard_table.c.shard)).mappings().all()
    if not shards:
        report.add("E_MISSING", trust.origin, "the database holds no chain")
    known = {row["shard"] for row in shards}
    for table in (batch_table, snapshot_table, intent_table):
        stray = connection.execute(sa.select(sa.func.count()).where(table.c.shard.not_in(known))).scalar()
        if stray:
            report.add("E_DERIVED", table.name, f"{stray} rows belong to no chain")
    names = [row["log_id"] for row in shards]
    if connection.execute(sa.select(sa.func.count()).where(archive_table.c.log.not_in(names))).scalar():
        report.add("E_DERIVED", archive_table.name, "rows belong to no chain")
    shards = [row for row in shards if not other_generation(row["log_id"], trust.origin)]  # each under its own origin
    kept = kept_of(connection, trust.origin)
    root, wrong = _verify_root(connection, trust, report, kept, anchor)
    for row in shards:
        _verify_shard(connection, row, trust, report, root, archive)
    for bad in wrong:
        report.add(bad.code, bad.where, bad.why)
    heads = root.settle((row["log_id"] for row in shards), report.add, tenants=not wrong)
    if heads is not None and kept.recovery is None:
        _verify_tenants(connection, heads, root, report)
        _verify_frontiers(connection, root, report)
    _verify_peers(connection, trust, report)
    report.overdue()
    return report


def past_origins(connection: Connection) -> list[str]:
    """The generations that were put aside by recoveries."""
    return sorted(connection.execute(sa.select(past_root_table.c.origin).distinct()).scalars())


@dataclass(frozen=True, slots=True)
class Kept:
    """Where a generation's root log stands, and the recovery that ended it."""

    root: sa.Select[Any]
    checkpoints: sa.Select[Any]
    recovery: Recovery | None = None

    def lost(self, size: int) -> bool:
        """Whether nobody vouches for a checkpoint of this size, as the recovery says."""
        return self.recovery is not None and self.recovery.lost[0] < size <= self.recovery.lost[1]


def kept_of(connection: Connection, origin: str) -> Kept:
    """Where the root log of the newest generation stands, or that of an earlier one."""
    if origin not in past_origins(connection):
        return Kept(
            sa.select(root_table).order_by(root_table.c.seq),
            sa.select(checkpoint_table).order_by(checkpoint_table.c.size),
        )
    follower = next_origin(origin)
    there = (past_root_table.c.origin == follower) & (past_root_table.c.seq == 0)
    first = connection.execute(sa.select(past_root_table.c.entry).where(there)).scalar()
    if first is None:
        first = connection.execute(sa.select(root_table.c.entry).where(root_table.c.seq == 0)).scalar()
    root = RootLog(follower)
    if first is not None:
        with suppress(Bad):  # said under its own origin
            root.check(first)
    past, signed = past_root_table, past_checkpoint_table
    return Kept(
        sa.select(past).where(past.c.origin == origin).order_by(past.c.seq),
        sa.select(signed).where(signed.c.origin == origin).order_by(signed.c.size),
        root.recovers,
    )


def _verify_root(
    connection: Connection, trust: Trust, report: Report, kept: Kept, anchor: Opened | None
) -> tuple[Commitments, list[Bad]]:
    """The root log and its checkpoints by themselves; what is wrong with them, to be said after the chains."""
    root, wrong = Commitments(trust.origin), list[Bad]()
    try:
        for row in connection.execute(kept.root).mappings():
            where = f"{trust.origin}/{root.size}"
            if row["seq"] != root.size:
                raise Bad("E_SEQ", where, f"the next stored entry is {row['seq']}")
            root.entry(row["entry"])
            if row["leaf"].hex() != root.root.chain.previous:
                raise Bad("E_DERIVED", where, "stored column leaf differs from the entry")
        told = kept.recovery
        if (
            told is not None
            and told.predecessor == trust.origin
            and told.stands != (root.size, root.roots[root.size].hex())
        ):
            raise Bad("E_ROOT", f"{trust.origin}/{root.size}", f"the recovery kept {told.stands[0]} entries")
    except Bad as bad:
        root.complete = False
        wrong.append(bad)
    if root.root.unknown:
        report.add("U_VERSION", trust.origin, f"{root.root.unknown} entries of the root log are of a later version")
    try:
        rows = connection.execute(kept.checkpoints).mappings().all()
        for row in rows:
            if kept.lost(row["size"]):  # of a tree that is not here any more: all it must be is signed
                _signed(row, trust)
        rows = [row for row in rows if not kept.lost(row["size"])]
        notes = ((f"{trust.origin}/{r['size']}", with_cosignatures(r["note"], r["cosigs"])) for r in rows)
        newest = root.checkpoints(notes, trust.note_keys(), trust.policy, report.add)
        if anchor is not None:
            root.extends(anchor.checkpoint, newest)
            report.anchored = True
        if kept.recovery is None:  # what was cosigned last may be what was lost
            root.quorum(newest, trust.policy)
        for row, opened in zip(rows, root.opened, strict=True):
            _verify_checkpoint(row, opened, root, trust, report)
    except Bad as bad:
        wrong.append(bad)
    return root, wrong


def _signed(row: Any, trust: Trust) -> None:
    try:
        open_note(row["note"], trust.origin, trust.note_keys(), trust.policy)
    except BadNote as bad:
        raise Bad("E_SIG", f"{trust.origin}/{row['size']}", str(bad)) from None


def _verify_checkpoint(row: Any, opened: Opened, root: Commitments, trust: Trust, report: Report) -> None:
    """The columns beside a note: its size, the time of the newest entry it covers, and who cosigned."""
    where = f"{trust.origin}/{row['size']}"
    if opened.checkpoint.size != row["size"] or row["at"] != root.written(row["size"]):
        raise Bad("E_DERIVED", where, "size or at of a stored checkpoint differ from the note and the root log")
    if {s.name for s in _signatures(row["note"], where)} != {trust.origin}:
        raise Bad("E_DERIVED", where, "the log's own note carries the signature of another key")
    if row["tst"] is not None and hashlib.sha256(parse_note(row["note"]).text).digest() not in row["tst"]:
        raise Bad("E_ANCHOR", where, "the time-stamp token is of another checkpoint")
    if row["cosigs"] is not None and (opened.unknown or not opened.signers):
        # Only an auditor who demands witnesses names all of them; a node's configuration may have named others before.
        if trust.policy.asks:
            raise Bad("E_WITNESS", where, "a cosignature of no witness that is trusted")
        report.add("U_KEY", where, "cosignatures of witnesses whose keys are not in the trust file")


def _signatures(note: bytes, where: str) -> tuple[Signature, ...]:
    try:
        return parse_note(note).signatures
    except BadNote as bad:
        raise Bad("E_SIG", where, str(bad)) from None


def _verify_tenants(
    connection: Connection, heads: Mapping[str, Mapping[str, tuple[int, str]]], root: Commitments, report: Report
) -> None:
    """The table that bundles are made from must be what the newest entry's map commits."""
    stored: dict[str, dict[str, tuple[int, str]]] = {}
    for row in connection.execute(sa.select(tenant_table)).mappings():
        if other_generation(row["log_id"], root.origin):
            continue
        stored.setdefault(row["tenant"], {})[row["log_id"]] = (row["count"], row["leaf"].hex())
    for tenant in sorted(stored.keys() | heads.keys()):
        if stored.get(tenant) != heads.get(tenant):
            report.add("E_DERIVED", f"{root.origin}/{root.size - 1}", f"audit_tenant differs for tenant {tenant}")
            return


def _verify_frontiers(connection: Connection, root: Commitments, report: Report) -> None:
    """Where starts begin to read must be places of this tree."""
    for size, roots in connection.execute(sa.select(frontier_table).order_by(frontier_table.c.size)):
        found = Frontier(size, [bytes(roots[i : i + 32]) for i in range(0, len(roots), 32)])
        if size not in root.roots or len(roots) != 32 * size.bit_count() or found.root() != root.roots[size]:
            report.add("E_DERIVED", f"{root.origin}/{size}", "a stored frontier differs from the root log")


def _verify_peers(connection: Connection, trust: Trust, report: Report) -> None:
    """What this service, as a witness, holds of other logs."""
    for row in connection.execute(sa.select(witness_table)).mappings():
        where = f"witness of {row['origin']}"
        keys = [key for key in trust.peers if key.name == row["origin"]]
        try:
            note = parse_note(row["note"])
            held = open_checkpoint(row["note"], row["origin"], keys) if keys else parse_checkpoint(note.text)
        except (BadNote, ValueError) as bad:
            report.add("E_SIG", where, str(bad))
            continue
        if (held.origin, held.size, held.root) != (row["origin"], row["size"], row["root"]):
            report.add("E_DERIVED", where, "origin, size or root differ from the note")
        elif not keys:
            report.add("U_KEY", where, "no key of that log is configured")


def _verify_shard(
    connection: Connection, row: Any, trust: Trust, report: Report, root: Commitments | None, archive: Path | None
) -> None:
    log = row["log_id"]
    if log != f"{trust.origin}/{row['node']}-{row['slot']}":
        report.add("E_ORIGIN", str(log), "log_id, node and slot of the shard row disagree, or the origin is another")
        return
    snapshots = {
        s["at_seq"]: s
        for s in connection.execute(sa.select(snapshot_table).where(snapshot_table.c.shard == row["shard"])).mappings()
    }

    def compare(chain: Chain) -> None:
        snapshot = snapshots.pop(chain.n, None)
        if snapshot is not None:
            _verify_snapshot(snapshot, chain, log, report, trust)

    try:
        start, groups = _from_the_beginning(connection, row, trust, report, archive)
    except Bad as bad:
        report.add(bad.code, bad.where, bad.why)
        return
    verifier = check_chain(log, groups, trust, report, root=root, after=compare, start=start)
    if verifier is None:
        return
    for at in snapshots:
        report.add("E_DERIVED", f"{log}/{at}", "a snapshot stands where no batch ends")
    where = f"{log}/{verifier.chain.n}"
    head = bytes.fromhex(verifier.chain.previous) if verifier.chain.n else b""
    if row["next_seq"] > verifier.chain.n:
        report.add("E_TRUNC", where, f"the shard row says {row['next_seq']} records")
    elif (row["next_seq"], row["head"]) != (verifier.chain.n, head):
        report.add("E_DERIVED", where, "next_seq or head of the shard row differ from the entries")
    elif row["epoch"] != verifier.epoch:
        report.add("E_EPOCH", where, f"the shard row says epoch {row['epoch']}, the last writer's is {verifier.epoch}")
    stored = {
        r.id: r.seq for r in connection.execute(sa.select(intent_table).where(intent_table.c.shard == row["shard"]))
    }
    if stored != verifier.intents:
        report.add("E_DERIVED", where, "the table of open intents differs from the entries")


def _from_the_beginning(
    connection: Connection, row: Any, trust: Trust, report: Report, archive: Path | None
) -> tuple[Verifier, Iterator[Batch]]:
    """A verifier and the groups that it has to check; Bad if an archived segment is not what was signed."""
    log, shard = row["log_id"], row["shard"]
    verifier, segment = beginning(connection, shard, log, trust.keys)
    before: list[Segment] = []
    to = 0
    for found in archived(connection, log):
        found.verifier(trust.keys)
        if found.first != to:
            raise Bad("E_SEQ", f"{log}/{to}", f"the next archived segment begins at {found.first}")
        before, to = [*before, found], found.to
    groups = stored_batches(connection, shard, log, after=verifier.chain.n)
    if segment is None:
        return verifier, groups
    _verify_leftovers(connection, shard, verifier.chain)
    if archive is None:
        report.add(
            "U_PRUNED", f"{log}/0", f"records 0 to {segment.at - 1} are archived at {segment.uri} (--archive DIR)"
        )
        return verifier, groups
    kept = [s for s in before if s.at <= segment.at]
    return Verifier(log, trust.keys), itertools.chain(verified_archive(archive, kept, segment), groups)


def _verify_leftovers(connection: Connection, shard: int, chain: Chain) -> None:
    """What an interrupted pruning left must lead to the state that was signed."""
    found: Chain | None = None
    chosen = sa.select(batch_table.c.first_seq, batch_table.c.entries).where(
        batch_table.c.shard == shard, batch_table.c.first_seq < chain.n
    )
    for first, entries in connection.execute(chosen.order_by(batch_table.c.first_seq)):
        for entry in unpack(entries):
            if found is None:
                found, frame = Chain(chain.log), parse_frame(entry, f"{chain.log}/{first}")
                found.n, found.previous = int(first), frame.previous
            found.check(entry, full=False)
    if found is not None and (found.n, found.previous) != (chain.n, chain.previous):
        raise Bad("E_LINK", f"{chain.log}/{chain.n}", "rows before it do not lead to the state that was archived")


def _verify_snapshot(snapshot: Any, chain: Chain, log: str, report: Report, trust: Trust) -> None:
    where = f"{log}/{snapshot['at_seq']}"
    restored = restore(snapshot["blob"], snapshot["seal"], snapshot["epoch"], log, trust.keys)
    if restored is None:
        report.add("E_SEAL", where, "snapshot not sealed by a certified writer")
    elif snapshot_of(restored.chain) != snapshot_of(chain):
        report.add("E_DERIVED", where, "snapshot differs from the entries")
