"""The writer: durable before it answers, one group at a time, fenced, and honest about what it cannot tell."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sqlalchemy as sa
from audit_lab import Lab, intent, now, op, outcome

from audit import event, log, verify
from audit.stored import stored_batches

pytestmark = pytest.mark.anyio


async def test_receipts_name_durable_records_and_the_log_verifies(made: Lab) -> None:
    writer = made.writer()
    await writer.start()
    receipts = await asyncio.gather(*(writer.append(op(f"t{i % 3}")) for i in range(200)))
    assert [r.seq for r in receipts] == list(range(1, 201))
    assert writer.groups < 200, "records were not committed in groups"
    await writer.close()
    assert made.verify() == []
    found = made.search.records(tenant="t1", limit=500)
    assert len(found) == 67
    assert {f.record["tenant"] for f in found} == {"t1"}


async def test_A_change_commits_with_its_record_and_a_failing_one_harms_no_neighbour(made: Lab) -> None:
    writer = made.writer()
    await writer.start()
    seen: list[str] = []

    def change(name: str) -> log.Change:
        return log.Change(
            write=lambda c: c.execute(sa.text("INSERT INTO things VALUES (:n)"), {"n": name}) and None,
            applied=lambda: seen.append(name),
        )

    first, second = intent(), intent()
    await writer.append(first)
    await writer.append(second)
    await writer.append(outcome(first), change=change("a"))
    results = await asyncio.gather(
        writer.append(op()),
        writer.append(outcome(second), change=change("a")),  # the same name again: refused by the table
        writer.append(op()),
        return_exceptions=True,
    )
    assert isinstance(results[1], log.ChangeFailed)
    assert isinstance(results[0], log.Receipt)
    assert isinstance(results[2], log.Receipt)
    assert seen == ["a"]
    (undone,) = made.search.records(op="rotate_key", out="error")
    assert undone.record["why"] == "change_undone"
    await writer.close()
    assert made.verify() == []


async def test_A_zombie_writer_is_fenced_and_writes_nothing_more(made: Lab) -> None:
    zombie = made.writer()
    await zombie.start()
    await zombie.append(op())
    heir = made.writer(locks="other-locks")  # as a node whose lock was lost would see it
    await heir.start()
    with pytest.raises(log.Fenced):
        await zombie.append(op())
    assert zombie.state == "FENCED"
    await heir.append(op())
    await heir.close()
    await zombie.close()
    assert made.verify() == []


async def test_two_workers_take_two_slots(made: Lab) -> None:
    one, two = made.writer(), made.writer()
    await one.start()
    await two.start()
    assert {one.name, two.name} == {"kms.example/audit/n0-0", "kms.example/audit/n0-1"}
    await asyncio.gather(*(w.append(op()) for w in (one, two) for _ in range(20)))
    await one.close()
    await two.close()
    assert made.verify() == []


async def test_S_04_a_removed_database_answers_unavailable_within_two_seconds(made: Lab, tmp_path: Path) -> None:
    writer = made.writer()
    await writer.start()
    await writer.append(op())
    aside = tmp_path / "aside.db"
    made.path.rename(aside)
    begun = time.monotonic()
    with pytest.raises(log.Unavailable):
        await writer.append(op())
    assert time.monotonic() - begun < 15  # at once, and not after its deadline
    assert writer.state == "DEGRADED"
    aside.rename(made.path)
    await writer.append(op())
    assert writer.state == "RUNNING"
    await writer.close()
    assert made.verify() == []


async def test_S_04_a_locked_database_is_late_and_the_record_that_lands_is_withheld(made: Lab) -> None:
    writer = made.writer(deadline_s=0.3)
    await writer.start()
    blocker = sqlite3.connect(made.path, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    record = op()
    with pytest.raises(log.Unavailable):
        await writer.append(record)
    blocker.execute("ROLLBACK")
    blocker.close()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        kinds = [f.record["kind"] for f in made.search.records(limit=10)]
        if "withheld" in kinds:
            break
        await asyncio.sleep(0.05)
    (withheld,) = [f.record for f in made.search.records(limit=10) if f.record["kind"] == "withheld"]
    assert withheld["intent"] == record.id
    await writer.close()
    assert made.verify() == []


async def test_an_intent_that_a_crash_left_open_is_settled_at_the_next_start(made: Lab) -> None:
    crashed = made.writer()
    await crashed.start()
    left = intent()
    await crashed.append(left)
    # No close: the process is gone. Its lock with it.
    crashed._lock_file.close()
    heir = made.writer()
    await heir.start()
    (settled,) = [f.record for f in made.search.records(op="rotate_key") if f.record["kind"] == "outcome"]
    assert (settled["intent"], settled["out"], settled["why"]) == (left.id, "error", "interrupted")
    await heir.close()
    assert made.verify() == []


async def test_a_restart_goes_on_from_a_snapshot_and_refuses_a_spoilt_tail(made: Lab) -> None:
    first = made.writer()
    await first.start()
    for _ in range(30):
        await first.append(op())
    await first.close()
    second = made.writer()
    await second.start()
    await second.append(op())
    second._lock_file.close()  # as if killed: no snapshot of its own
    with sqlite3.connect(made.path) as db:
        db.execute("DROP TRIGGER audit_batch_update")
        db.execute(
            "UPDATE audit_batch SET head = zeroblob(32) WHERE first_seq = (SELECT max(first_seq) FROM audit_batch)"
        )
    from audit.chain import Bad

    with pytest.raises(Bad):
        await made.writer().start()


async def test_the_clock_stepping_back_is_recorded_and_far_forward_is_refused(made: Lab) -> None:
    shift = 0

    def clock() -> int:
        return now() + shift

    writer = made.writer(clock=clock)
    await writer.start()
    await writer.append(op())
    shift = -3_600_000_000
    await writer.append(op())
    assert any(f.record["kind"] == "clock" for f in made.search.records(limit=10))
    shift = 3_600_000_000
    with pytest.raises(log.Unavailable, match="clock"):
        await writer.append(op())
    shift = -3_600_000_000
    await writer.append(op())
    await writer.close()
    assert made.verify() == []


async def test_searching_pages_through_everything_once(made: Lab) -> None:
    writer = made.writer()
    await writer.start()
    for i in range(60):
        await writer.append(op(f"t{i % 2}"))
    seen: list[int] = []
    after: tuple[str, int] | None = None
    while page := made.search.records(tenant="t0", after=after, limit=7):
        seen += [f.seq for f in page]
        after = (page[-1].log, page[-1].seq)
    assert seen == sorted(set(seen), reverse=True)
    assert len(seen) == 30
    await writer.close()


async def test_R1_kill_9_of_a_writer_loses_no_receipt(made: Lab, tmp_path: Path) -> None:
    script = f"""
import asyncio, sys
sys.path[:0] = {[str(parent) for parent in Path(__file__).parents[:3]]!r}
from audit_lab import Lab, op
async def main():
    from audit_lab import ORIGIN
    lab = Lab.__new__(Lab)
    from service.database import open_engine
    from pathlib import Path
    lab.directory, lab.path = Path({str(tmp_path)!r}), Path({str(made.path)!r})
    lab.engine = open_engine("sqlite:///{made.path}")
    class Signer:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey as K
        key = K.from_private_bytes(bytes.fromhex({made.signer._key.private_bytes_raw().hex()!r}))
        def public_key(self): return bytes.fromhex({made.signer.public_key().hex()!r})
        def known_keys(self): return (self.public_key(),)
        def sign(self, s): return self.key.sign(s)
    lab.signer = Signer()
    w = lab.writer()
    await w.start()
    while True:
        for r in await asyncio.gather(*(w.append(op(f"t{{i}}")) for i in range(16))):
            print(r.seq, r.leaf.hex())
        sys.stdout.flush()
asyncio.run(main())
"""
    receipts: dict[int, str] = {}
    chooser = random.Random(5)
    for _ in range(8):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=os.environ)
        assert process.stdout is not None
        first = await asyncio.to_thread(process.stdout.readline)  # it writes by now, however busy the machine is
        await asyncio.sleep(chooser.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        printed, _ = process.communicate()
        for line in (first + printed).decode().splitlines():
            seq, _, leaf = line.partition(" ")
            if len(leaf) == 64:
                receipts[int(seq)] = leaf
    assert len(receipts) > 100
    heir = made.writer()
    await heir.start()
    await heir.close()
    report = verify.Report()
    with made.engine.connect() as connection:
        (row,) = connection.execute(sa.text("SELECT shard, log_id FROM audit_shard")).all()
        verify.check_chain(row[1], stored_batches(connection, row[0], row[1]), made.trust, report, wanted=receipts)
    assert report.findings == []


def test_every_operation_of_the_api_is_in_the_closed_list() -> None:
    from service.protocols.native import ROUTES

    assert {r.op for r in ROUTES} <= event.OPERATIONS
