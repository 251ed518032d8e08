"""Archive and prune: nothing leaves before it is read back, recorded and provable; nothing is lost or doubled."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from audit_lab import INDEX_KEY, ORIGIN, Lab, MemorySigner, now, op
from sqlalchemy import Connection

from audit import tables, verify
from audit.archive import ArchiveFailed, Archiver, Retention, archive
from audit.chain import DAY_US, Bad, Receipt, leaf_hash, tree_hash, unpack
from audit.evidence import check_record_proof
from audit.export import export
from audit.index import Indexer
from audit.notary import Notary
from audit.proof import check_inclusion, inclusion_proof
from audit.proofs import Prover
from audit.report import Evidence, Source, Wanted, make
from audit.search import Search
from audit.segments import Archive, Segment
from audit.stored import verify_database
from audit.tables import archive_table, batch_table
from audit.tenantbundle import check_bundle
from audit.tree import ChainEntries, Pruned, in_tree
from postgres import Cluster
from service import rows
from service.database import open_engine
from service.jobs import archive_once
from service.rows import Lease

pytestmark = pytest.mark.anyio

LOG = f"{ORIGIN}/n0-0"
OLD = 100 * DAY_US
YEAR = Retention(default=30)


class Stored(Lab):
    """As `Lab`, on any database, with what archiving needs."""

    def __init__(self, directory: Path, url: str) -> None:
        self.directory, self.signer, self.engine = directory, MemorySigner(), open_engine(url)
        with self.engine.begin() as connection:
            tables.tables.create_all(connection)
        self.search = Search(self.engine, INDEX_KEY)
        self.to = directory / "archive"

    async def records(self, count: int, *, age: int = OLD, tenants: tuple[str, ...] = ("t0", "t1", "t2")) -> None:
        """A writer's life of so many records, an age ago, in groups of 50."""
        writer = self.writer(clock=lambda: now() - age)
        await writer.start()
        for at in range(0, count, 50):
            await writer.append_many([op(tenants[i % len(tenants)]) for i in range(at, min(at + 50, count))])
        await writer.close()

    def notarise(self) -> Notary:
        notary = Notary(self.engine, origin=ORIGIN, signer=self.signer, clock=now)
        notary.round(1, lambda _: None)
        return notary

    def archiver(self, retention: Retention = YEAR, **options: Any) -> Archiver:
        made = {"directory": self.to, "signer": self.signer, "at_once": 300, **options}
        return Archiver(self.engine, origin=ORIGIN, retention=retention, clock=now, **made)

    async def archive(self, archiver: Archiver | None = None, hold: Callable[[], Any] | None = None) -> list[Segment]:
        """As the job does it, with a writer of its own."""
        writer = self.writer(node="n9")
        await writer.start()
        try:
            return await archive(
                archiver or self.archiver(),
                lambda record, change: writer.append(record, change=change),
                hold or (lambda: lambda _: None),
                node="n9",
                actor="internal:test",
            )
        finally:
            await writer.close()

    def codes(self, *, archived: bool = False) -> list[str]:
        report = verify_database(self.engine, self.trust, self.to if archived else None)
        return [f.code for f in report.findings]

    def count(self) -> int:
        """Records of the chain that the database holds."""
        with self.engine.connect() as connection:
            chosen = sa.select(batch_table.c.entries).where(batch_table.c.shard == 1)
            return sum(len(unpack(entries)) for entries in connection.execute(chosen).scalars())

    def prunes(self) -> list[tuple[int, int]]:
        found = self.search.records(op="archive_records", limit=100)
        return sorted((f.record["from"], f.record["to"]) for f in found if f.record["out"] == "ok")

    def leaves(self) -> list[bytes]:
        """Every leaf of the chain, from the archive and then from the database."""
        there = Archive(self.to, LOG)
        segments = there.segments()
        entries = list(there.entries(0, segments[-1].at)) if segments else []
        with self.engine.connect() as connection:
            chosen = sa.select(batch_table.c.entries).where(batch_table.c.shard == 1).order_by(batch_table.c.first_seq)
            for bundle in connection.execute(chosen).scalars():
                entries += unpack(bundle)
        return entries


@pytest.fixture(params=["sqlite", "postgresql"])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stored]:
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path}/audit.db"
    else:
        cluster: Cluster = request.getfixturevalue("postgres")
        url = cluster.fresh("archive")
    stored = Stored(tmp_path, url)
    yield stored
    stored.engine.dispose()


@pytest.fixture
def lite(tmp_path: Path) -> Stored:
    """On SQLite alone: what is asked does not depend on the database."""
    return Stored(tmp_path, f"sqlite:///{tmp_path}/audit.db")


async def test_what_a_sink_still_waits_for_stays(lite: Stored) -> None:
    await lite.records(700)
    await lite.records(40, age=0)
    lite.notarise()
    with lite.engine.begin() as connection:
        values = {"name": "siem", "log_id": LOG, "seq": 400, "at": 0}
        connection.execute(sa.insert(tables.sink_table), [values])
    assert lite.archiver(sinks=("siem", "new")).planned() == []  # a new one has sent nothing yet
    (segment,) = lite.archiver(sinks=("siem",)).planned()
    assert segment.to == 256
    (segment,) = lite.archiver(sinks=()).planned()  # a sink that is configured no more waits for nothing
    assert segment.to == 512


async def test_old_days_are_archived_recorded_and_pruned_and_everything_goes_on(made: Stored) -> None:
    await made.records(700)
    await made.records(40, age=0)
    Indexer(made.engine, INDEX_KEY).round()
    before, whole = made.leaves(), made.search.records(tenant="t1", limit=2_000)
    assert made.search.stored_since() is None
    notary = made.notarise()
    (segment,) = await made.archive()
    assert made.search.stored_since() == json.loads(before[segment.at])["c"]["t"]
    assert (segment.first, segment.to) == (0, 512)
    assert 512 - 50 <= segment.at <= 512
    assert made.prunes() == [(0, 512)]
    assert made.count() == len(before) - segment.at
    assert made.leaves() == before
    # Without the archive the verifier says what it cannot tell, with it everything is verified.
    assert made.codes() == ["U_PRUNED"]
    assert made.codes(archived=True) == []
    # Proofs need the hash tiles of what is gone.
    size, leaves = len(before), [leaf_hash(entry) for entry in before]
    root = tree_hash(leaves)
    path = in_tree(made.engine, ChainEntries(LOG, 1), size, root, lambda t: inclusion_proof(size - 1, size, t.subtree))
    check_inclusion(size - 1, size, leaves[-1], path, root)
    # Searches find what is there, the notary goes on and restarts, a writer takes over and writes.
    assert made.search.records(tenant="t1", limit=2_000) == [f for f in whole if f.seq >= segment.at]
    notary.round(1, lambda _: None)
    await made.records(30, age=0)
    notary.round(1, lambda _: None)
    assert made.notarise().refused is None
    assert made.codes(archived=True) == []


async def test_an_export_after_pruning_verifies_with_the_archive_and_says_what_it_lacks_without(
    lite: Stored, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await lite.records(700)
    (receipt,) = [f for f in lite.search.records(limit=700) if f.seq == 300]
    lite.notarise()
    (segment,) = await lite.archive()
    await lite.records(300, age=0)
    out, receipts = tmp_path / "export", tmp_path / "receipts"
    export(lite.engine, out, lite.trust)
    receipts.write_text(Receipt(receipt.log, receipt.seq, receipt.leaf).header() + "\n")
    command = [str(out), "--trust", str(out / "trust.txt"), "--receipts", str(receipts)]
    assert verify.main([*command, "--archive", str(lite.to)]) == verify.CANNOT_TELL
    assert capsys.readouterr().out.startswith(f"U_NOANCHOR {ORIGIN}/n9-0: "), "the receipt is of the other chain"
    command.append("--accept-unanchored")
    assert verify.main(command) == verify.CANNOT_TELL
    assert f"U_PRUNED {LOG}/0: records 0 to {segment.at - 1}" in capsys.readouterr().out
    assert verify.main([*command, "--archive", str(lite.to)]) == verify.INTACT
    receipts.write_text(Receipt(receipt.log, receipt.seq, bytes(32)).header() + "\n")
    assert verify.main([*command, "--archive", str(lite.to)]) == verify.TAMPERED
    assert "E_RECEIPT" in capsys.readouterr().out
    spoil(lite.to / LOG / "tile/entries/001.gz")
    assert verify.main([*command, "--archive", str(lite.to)]) == verify.TAMPERED
    for name in ("pruned.json", "lead"):
        kept = (out / LOG / name).read_bytes()
        spoil(out / LOG / name)
        assert verify.main(command) == verify.TAMPERED
        (out / LOG / name).write_bytes(kept)


async def test_a_report_of_a_pruned_export_counts_what_is_there_and_says_that_it_is_not_all(
    lite: Stored, tmp_path: Path
) -> None:
    await lite.records(700)
    await lite.records(40, age=0)
    lite.notarise()
    assert len(await lite.archive()) == 1
    lite.notarise()
    out = tmp_path / "export"
    export(lite.engine, out, lite.trust)
    evidence = Evidence(Source(out, out / "trust.txt", lite.trust))
    shown = make(evidence, Wanted(chain=LOG))
    assert shown.total is not None
    assert shown.total.value == lite.count(), "what stands in the archive alone is not counted"
    assert (shown.integrity, shown.completeness) == ("intact", "not shown")
    assert [(f.code, f.where) for f in shown.findings if f.code == "U_PRUNED"] == [("U_PRUNED", f"{LOG}/0")]


async def test_what_is_archived_is_answered_with_where_it_lies(made: Stored) -> None:
    await made.records(600)
    await made.records(60, age=0, tenants=("t1", "late"))
    made.notarise()
    (segment,) = await made.archive()
    made.notarise()
    prover = Prover(made.engine, origin=ORIGIN)
    asked: list[Callable[[], object]] = [
        lambda: prover.record("n0-0", 7, tenant=None),
        lambda: prover.entries("n0-0", 0, 256),
        lambda: prover.bundle("t1"),
        lambda: prover.bundle("t1", since=1),
    ]
    for ask in asked:
        with pytest.raises(Pruned) as caught:
            ask()
        assert (caught.value.log, caught.value.to, caught.value.uri) == (LOG, segment.at, (made.to / LOG).as_uri())
        assert str(caught.value).startswith(f"records 0 to {segment.at - 1} of {LOG} were archived to file://")
    # What is left is proven as before: a record, a tenant that began later, and a period that begins after.
    asked_for = prover.record("n0-0", segment.at + 1, tenant=None)
    assert asked_for is not None
    assert check_record_proof(asked_for, made.trust).frame.n == segment.at + 1
    for tenant, since, count in (("late", 0, 30), ("t1", now() - DAY_US, 30)):
        bundle = prover.bundle(tenant, since=since)
        lines = b"".join([bundle.header, *bundle.pieces]).splitlines(keepends=True)
        verdict = check_bundle(lines, made.trust, tenant=tenant, since=since)
        assert (verdict.report.findings, verdict.in_period) == ([], count), tenant


async def test_a_second_run_goes_on_where_the_first_ended(made: Stored) -> None:
    await made.records(600)
    made.notarise()
    await made.archive()
    await made.records(500)
    before = made.leaves()
    made.notarise()
    (second,) = await made.archive()
    assert (second.first, second.to) == (512, 1_024)
    assert made.leaves() == before
    assert made.prunes() == [(0, 512), (512, 1_024)]
    assert made.codes(archived=True) == []
    assert await made.archive() == []


async def test_only_what_a_signed_checkpoint_covers_is_archived(lite: Stored) -> None:
    await lite.records(600)
    assert await lite.archive() == [], "no checkpoint yet"
    lite.notarise()
    await lite.records(600)
    (segment,) = await lite.archive()
    assert segment.to == 512


@pytest.mark.parametrize(
    ("retention", "gone"),
    [
        (Retention(default=30), 1_024),
        (Retention(default=0), 0),
        (Retention(default=101), 0),
        (Retention(default=30, tenants={"slow": 200}), 512),
        (Retention(default=30, tenants={"slow": 0}), 512),
        (Retention(default=30, tenants={"slow": 1}), 1_024),
        (Retention(default=30, held=frozenset({"slow"})), 512),
        (Retention(default=30, held=frozenset({"t0"})), 0),
    ],
)
async def test_a_range_goes_only_when_every_tenant_in_it_allows(lite: Stored, retention: Retention, gone: int) -> None:
    await lite.records(600, tenants=("t0",))
    await lite.records(500, tenants=("t1", "slow"))
    lite.notarise()
    assert sum(s.to - s.first for s in await lite.archive(lite.archiver(retention))) == gone


class Killed(Exception):
    """As if the process ended here."""


class DyingSigner(MemorySigner):
    """Ends the process before it signs, or not."""

    def __init__(self, signer: MemorySigner) -> None:
        self._key = signer._key

    def sign(self, statement: bytes) -> bytes:
        raise Killed


def dying_hold(after: int) -> Callable[[], Callable[[Connection], None]]:
    """A lease whose fence ends the process when it is asked for the so-manieth time."""
    left = [after]

    def fence(_: Connection) -> None:
        if not left[0]:
            raise Killed
        left[0] -= 1

    return lambda: fence


@contextlib.contextmanager
def ends() -> Iterator[None]:
    """What is run inside dies, however the death is reported."""
    with pytest.raises(Exception) as caught:  # noqa: PT011  (a change that dies is reported by its writer)
        yield
    assert isinstance(caught.value, Killed) or isinstance(caught.value.__cause__, Killed), caught.value


@pytest.mark.parametrize("step", ["before signing", "before the record", "before deleting", "while deleting"])
async def test_killed_at_any_step_a_repeated_run_completes_and_loses_and_doubles_nothing(
    made: Stored, step: str
) -> None:
    await made.records(700)
    made.notarise()
    before = made.leaves()
    with ends():
        if step == "before signing":
            await made.archive(made.archiver(signer=DyingSigner(made.signer)))
        else:
            times = {"before the record": 0, "before deleting": 1, "while deleting": 2}[step]
            await made.archive(hold=dying_hold(times))
    assert (made.count() < len(before)) == (step == "while deleting")
    assert not set(made.codes(archived=True)) & {"U_PRUNED"}
    assert not [c for c in made.codes() if c.startswith("E_")]
    notary = made.notarise()
    assert notary.refused is None
    (segment,) = await made.archive()
    assert (segment.first, segment.to) == (0, 512)
    assert made.prunes() == [(0, 512)]
    assert made.leaves() == before
    assert made.codes(archived=True) == []


async def test_a_run_adopts_what_an_earlier_one_signed_even_if_more_may_go_now(lite: Stored) -> None:
    await lite.records(600)
    lite.notarise()
    with ends():
        await lite.archive(hold=dying_hold(0))
    await lite.records(600)
    lite.notarise()
    assert [(s.first, s.to) for s in await lite.archive()] == [(0, 512), (512, 1_024)]
    assert lite.codes(archived=True) == []


def spoil(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


FILES = ["tile/entries/001.gz", "tile/0/001", "seals/0-512.jsonl.gz", "segments/0-512.json"]


@pytest.mark.parametrize("file", FILES)
async def test_a_segment_damaged_before_the_read_back_is_refused_and_nothing_deleted(lite: Stored, file: str) -> None:
    await lite.records(700)
    lite.notarise()
    with ends():
        await lite.archive(hold=dying_hold(1))  # recorded, not deleted
    spoil(lite.to / LOG / file)
    count = lite.count()
    with pytest.raises((Bad, ArchiveFailed)):
        await lite.archive()
    assert lite.count() == count


@pytest.mark.parametrize("file", FILES)
async def test_a_segment_damaged_later_is_found_by_the_verifier(lite: Stored, file: str) -> None:
    await lite.records(700)
    lite.notarise()
    await lite.archive()
    spoil(lite.to / LOG / file)
    codes = lite.codes(archived=True)
    assert codes
    assert all(c.startswith("E_") for c in codes)
    shutil.rmtree(lite.to / LOG)
    assert lite.codes(archived=True) == ["E_MISSING"]


async def test_a_directory_that_takes_nothing_means_that_nothing_is_deleted(lite: Stored) -> None:
    await lite.records(600)
    lite.notarise()
    (lite.to).write_bytes(b"a file stands where the directory should")
    count = lite.count()
    with pytest.raises(ArchiveFailed, match="nothing was deleted"):
        await lite.archive()
    assert lite.count() == count
    assert lite.prunes() == []
    lite.to.unlink()
    other = lite.to / LOG / "tile" / "entries" / "000.gz"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"written by somebody else")
    with pytest.raises(ArchiveFailed, match="holds something else"):
        await lite.archive()
    assert lite.count() == count


async def test_of_two_archivers_at_once_one_has_the_lease(lite: Stored) -> None:
    await lite.records(600)
    lite.notarise()
    with lite.engine.begin() as connection:
        rows.tables.create_all(connection)
    writer = lite.writer(node="n9")
    await writer.start()
    lease = Lease(lite.engine, clock=now)
    runs = [
        archive_once(lite.archiver(), lease, writer, owner=f"worker {i}", node="n9", by="archiver") for i in range(2)
    ]
    done = await asyncio.gather(*runs, return_exceptions=True)
    assert sorted(type(d).__name__ for d in done) == ["ArchiverBusy", "list"]
    assert lite.prunes() == [(0, 512)]
    await writer.close()
    assert lite.codes(archived=True) == []


async def test_an_archived_record_costs_at_most_200_bytes_and_its_hash(lite: Stored) -> None:
    chooser = random.Random(1)
    keys = [str(uuid.UUID(int=chooser.getrandbits(128))) for _ in range(200)]
    writer = lite.writer(clock=lambda: now() - OLD)
    await writer.start()
    for _ in range(16):
        group = [
            op(
                f"tenant-{chooser.randrange(20)}",
                op=chooser.choice(["encrypt", "decrypt"]),
                actor=f"spiffe://bank.example/ns/prod/sa/service-{chooser.randrange(50)}",
                authn="mtls",
                src=f"10.0.0.{chooser.randrange(250)}",
                req=str(uuid.UUID(int=chooser.getrandbits(128))),
                key=chooser.choice(keys),
                kver=1,
                alg="AES_256_GCM",
                in_len=chooser.randrange(4_096),
                region="eu-de-1",
                hsm="a",
                rule=("allow-app",),
                pol="0123456789abcdef0123456789abcdef",
                us=chooser.randrange(3_000),
            )
            for _ in range(64)
        ]
        await writer.append_many(group)
    await writer.close()
    lite.notarise()
    (segment,) = await lite.archive()
    size = sum(p.stat().st_size for p in (lite.to / LOG).rglob("*") if p.is_file())
    each = size / (segment.to - segment.first)
    print(f"an archived record: {each:.0f} bytes, hash tile and seals included")
    assert each <= 200 + 32


async def test_whoever_lost_the_lease_records_and_deletes_nothing(made: Stored) -> None:
    await made.records(600)
    made.notarise()
    with ends():
        await made.archive(hold=dying_hold(0))
    assert made.prunes() == []
    first, second = made.archiver(), made.archiver()
    one, two = first.planned()[0], second.planned()[0]
    one, two = first.write(one), second.write(two)  # both wrote: the same bytes
    assert one.file() == two.file()
    assert [(s.first, s.to) for s in await made.archive()] == [(0, 512)]
    with pytest.raises(sa.exc.IntegrityError), made.engine.begin() as connection:
        second.change(two, lambda _: None).write(connection)


async def test_nothing_is_deleted_without_its_record(lite: Stored) -> None:
    await lite.records(600)
    lite.notarise()
    archiver = lite.archiver()
    segment = archiver.write(archiver.planned()[0])
    with pytest.raises(ArchiveFailed, match="no prune record"):
        archiver.prune(segment, lambda _: None)


async def test_a_deletion_that_does_not_go_through_pruning_is_refused(made: Stored) -> None:
    await made.records(600)
    made.notarise()
    await made.archive()
    for statement in ("DELETE FROM audit_batch", "DELETE FROM audit_snapshot", "UPDATE audit_batch SET n = n"):
        with pytest.raises(sa.exc.DBAPIError, match="append-only"), made.engine.begin() as connection:
            connection.execute(sa.text(statement))


async def test_a_database_whose_archive_row_is_gone_or_changed_is_found(lite: Stored) -> None:
    await lite.records(600)
    lite.notarise()
    await lite.archive()
    with lite.engine.connect() as connection:
        row = dict(connection.execute(sa.select(archive_table)).mappings().one())
    changes = {
        "log": f"{ORIGIN}/n9-0",
        "from_seq": 1,
        "to_seq": row["to_seq"] + 256,
        "at_seq": row["at_seq"] + 1,
        "sha256": bytes(32),
        "uri": "file:///elsewhere",
        "manifest": row["manifest"].replace(b'"t0"', b'"t9"'),
        "seal": bytes(64),
    }
    assert set(changes) == {c.name for c in archive_table.columns}
    for name, value in changes.items():
        with lite.engine.begin() as connection:
            connection.execute(sa.update(archive_table).values({name: value}))
        assert any(c.startswith("E_") for c in lite.codes()), name
        with lite.engine.begin() as connection:
            connection.execute(sa.update(archive_table).values(row))
    with lite.engine.begin() as connection:
        connection.execute(sa.delete(archive_table))
    assert "E_SEQ" in lite.codes()
