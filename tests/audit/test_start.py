"""A start reads the root log from a stored frontier on, however long the log is, and trusts no frontier by itself."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from audit_lab import ORIGIN, Lab, now, op
from sqlalchemy import Connection
from test_rollback import forge, guard_of, held, node_files, note_of, signed

from audit.chain import Bad, Frontier
from audit.frontiers import store
from audit.log import RolledBack
from audit.notary import Notary
from audit.rootlog import RootLog
from audit.tables import checkpoint_table, root_table

pytestmark = pytest.mark.anyio


class Reads:
    """Counts the entries of the root log that are fetched, by running each query once more to count its rows."""

    def __init__(self, made: Lab) -> None:
        self.entries = 0
        sa.event.listen(made.engine, "after_cursor_execute", self._seen)

    def _seen(self, connection: Connection, _c: object, statement: str, parameters: object, *_: object) -> None:
        if statement.startswith("SELECT") and "FROM audit_root" in statement and "max(" not in statement:
            cursor = connection.connection.dbapi_connection.cursor()
            cursor.execute(f"SELECT count(*) FROM ({statement})", parameters)
            self.entries += cursor.fetchone()[0]


async def lengthened(made: Lab, count: int) -> None:
    """Records, one round, `count` heartbeats as if days had passed, and a checkpoint over all of it."""
    await signed(made, 1)
    root, rows = RootLog(ORIGIN), list[dict[str, object]]()
    with made.engine.connect() as connection:
        (first,) = connection.execute(sa.select(root_table.c.entry)).scalars()
    heads = root.check(first)
    assert heads is not None
    for seq in range(1, count + 1):
        entry = root.append([], tenants=bytes.fromhex(heads.tenants), epoch=1, full=False, t=now())
        rows.append({"seq": seq, "entry": entry, "leaf": bytes.fromhex(root.chain.previous)})
    note = note_of(made.signer, root.chain.n, root.chain.frontier.root())
    with made.engine.begin() as connection:
        connection.execute(sa.insert(root_table), rows)
        connection.execute(sa.insert(checkpoint_table), [{"size": root.chain.n, "at": root.chain.t, "note": note}])
    await signed(made, 2)  # a new notary's first entry lists every chain


def last_row(made: Lab) -> int:
    with made.engine.connect() as connection:
        return int(connection.execute(sa.text("SELECT max(size) FROM audit_frontier")).scalar_one())


async def started(made: Lab) -> int:
    """Start a guard and a notary; how many entries of the root log they read."""
    reads = Reads(made)
    anchor = node_files(made.directory) if not (made.directory / "files").exists() else None
    guard = guard_of(made, *([] if anchor is None else [anchor]))
    guard.start()
    assert Notary(made.engine, origin=ORIGIN, signer=made.signer, clock=now).round(9, held) is not None
    guard.check()
    return reads.entries


async def test_a_start_reads_what_is_new_of_a_log_of_many_entries(made: Lab) -> None:
    await lengthened(made, 50_000)
    assert await started(made) < 30
    assert made.verify() == []


@pytest.mark.parametrize(
    "damage",
    [
        "DELETE FROM audit_frontier",
        "UPDATE audit_frontier SET roots = zeroblob(length(roots))",
        "UPDATE audit_frontier SET roots = x'00'",
        "UPDATE audit_frontier SET size = size - 1",
    ],
)
async def test_a_spoilt_or_missing_frontier_is_slower_and_nothing_else(made: Lab, damage: str) -> None:
    await lengthened(made, 500)
    forge(made, damage)
    found = made.verify()
    assert found == ([] if damage.startswith("DELETE") else ["E_DERIVED"])
    assert await started(made) > 1_000


async def test_a_frontier_of_another_tree_is_never_begun_from(made: Lab) -> None:
    await lengthened(made, 500)
    size, other = last_row(made), Frontier()
    for i in range(size):
        other.push(i.to_bytes(32, "big"))
    with made.engine.begin() as connection:
        store(connection, other)
    assert await started(made) > 1_000


async def test_an_entry_changed_after_the_frontier_is_refused_at_start(made: Lab) -> None:
    await lengthened(made, 500)
    anchor = node_files(made.directory)
    guard = guard_of(made, anchor)
    guard.start()
    guard.keep(leads=True)
    size = last_row(made)
    forge(made, f"UPDATE audit_root SET entry = CAST(replace(entry, 'heads', 'headz') AS BLOB) WHERE seq = {size}")
    with pytest.raises(RolledBack, match="another root"):
        guard_of(made, anchor).start()
    with pytest.raises(Bad):
        Notary(made.engine, origin=ORIGIN, signer=made.signer, clock=now).round(9, held)


async def test_a_forged_checkpoint_gives_no_frontier_any_weight(made: Lab) -> None:
    await lengthened(made, 500)
    with made.engine.begin() as connection:
        newest = connection.execute(sa.text("SELECT max(size) FROM audit_checkpoint")).scalar_one()
        forged = {"n": note_of(made.signer, newest, bytes(32)), "s": newest}
        connection.execute(sa.text("UPDATE audit_checkpoint SET note = :n WHERE size = :s"), forged)
    guard = guard_of(made)
    guard.start()
    with pytest.raises(Bad) as caught:
        Notary(made.engine, origin=ORIGIN, signer=made.signer, clock=now).round(9, held)
    assert caught.value.code == "E_ROOT"


async def test_an_entry_changed_before_the_frontier_is_found_by_verification(made: Lab) -> None:
    await lengthened(made, 500)
    forge(made, "UPDATE audit_root SET entry = CAST(replace(entry, 'heads', 'headz') AS BLOB) WHERE seq = 7")
    assert await started(made) < 30
    assert made.verify() != []


async def test_records_before_and_after_a_start_are_committed_alike(made: Lab) -> None:
    await lengthened(made, 500)
    writer = made.writer(node="n1")
    await writer.start()
    await writer.append(op("tax"))
    await writer.close()
    assert await started(made) < 30
    assert made.verify() == []
