"""A new generation begins with what was lost, changes nothing of what stood, and can be begun again after any crash."""

from __future__ import annotations

import time

import pytest
import sqlalchemy as sa
from audit_lab import ORIGIN, Lab, now, op
from sqlalchemy import Connection
from test_rollback import backup, forge, guard_of, held, node_files, note_of, restore, signed

from audit.anchors import Anchor, NodeFiles
from audit.chain import Bad
from audit.event import Recovery
from audit.export import export
from audit.generation import (
    RecoveryRefused,
    digest_of,
    open_generation,
    opened,
    recovery_of,
)
from audit.log import Log, OpenFacts, RolledBack
from audit.notary import Notary
from audit.rootlog import RootLog, next_origin, split_origin
from audit.stored import verify_database
from audit.verify import Report, Trust, verify_export

pytestmark = pytest.mark.anyio
SECOND = f"{ORIGIN}/g2"
INSTALLATION = "7d0c2f8e-5b0a-4b58-9f0e-2f6a3c1d9e11"
APPROVALS = [("alice", "aa" * 64), ("bob", "bb" * 64)]


class Interrupted(Exception):
    """As if the process died here."""


async def rolled_back(made: Lab) -> Anchor:
    """A database of two entries, and an anchor that has seen four."""
    await signed(made)
    anchor = node_files(made.directory)
    guard_of(made, anchor).keep(leads=True)
    old = backup(made)
    await signed(made)
    guard_of(made, anchor).keep(leads=True)
    restore(made, old)
    return anchor


def asked(made: Lab, anchor: Anchor, origin: str = ORIGIN) -> Recovery:
    found = guard_of(made, anchor, origin=origin).survey()
    return recovery_of(found, installation=INSTALLATION, asked=now())


def open_it(made: Lab, recovery: Recovery, *, stored: str = ORIGIN, dies_at: int = 0) -> None:
    """Open and sign, or die in front of one of the transactions."""
    calls: list[int] = []

    def fence(_: Connection) -> None:
        calls.append(1)
        if len(calls) == dies_at:
            raise Interrupted

    with made.engine.connect() as connection:
        resumed = opened(connection, recovery)
    if not resumed:
        open_generation(made.engine, recovery, APPROVALS, stored=stored, epoch=7, fence=fence, now=now())
    Notary(made.engine, origin=recovery.origin, signer=made.signer, clock=now).round(7, fence)


def writer(made: Lab, origin: str) -> Log:
    return Log(
        made.engine,
        origin=origin,
        node="n0",
        slots=4,
        lock_dir=made.directory / "locks",
        signer=made.signer,
        open_facts=OpenFacts(cfg="0" * 64, dist="0" * 64, ver="1.0"),
        clock=now,
        monotonic=time.monotonic,
        deadline_s=60.0,
    )


def verify(made: Lab, origin: str) -> Report:
    return verify_database(made.engine, Trust(origin, made.trust.keys))


async def test_a_recovery_embeds_the_lost_checkpoint_and_names_the_range(made: Lab) -> None:
    anchor = await rolled_back(made)
    recovery = asked(made, anchor)
    assert (recovery.predecessor, recovery.origin) == (ORIGIN, SECOND)
    assert recovery.anchored.encode() == anchor.newest()[0].note
    assert recovery.stands[0] == 2
    assert recovery.lost == (0, 4)  # no anchor vouches for the two entries that are there
    older = NodeFiles(made.directory / "files", "n1")
    with made.engine.connect() as connection:
        note = connection.execute(sa.text("SELECT note FROM audit_checkpoint WHERE size = 1")).scalar_one()
    older.keep(note)
    assert asked(made, anchor).lost == (1, 4)


async def test_nothing_is_recovered_where_nothing_is_wrong(made: Lab) -> None:
    await signed(made)
    anchor = node_files(made.directory)
    with pytest.raises(RecoveryRefused, match="nothing to recover from"):
        asked(made, anchor)
    guard_of(made, anchor).keep(leads=True)
    with pytest.raises(RecoveryRefused, match="nothing to recover from"):
        asked(made, anchor)


async def test_the_new_generation_serves_and_both_verify(made: Lab) -> None:
    anchor = await rolled_back(made)
    recovery = asked(made, anchor)
    open_it(made, recovery)
    guard = guard_of(made, anchor, origin=SECOND)
    guard.start()
    guard.keep(leads=True)
    log = writer(made, SECOND)
    await log.start()
    await log.append(op())
    await log.close()
    notary = Notary(made.engine, origin=SECOND, signer=made.signer, clock=now)
    assert notary.round(8, held) is not None
    guard.check()
    second, first = verify(made, SECOND), verify(made, ORIGIN)
    assert (second.findings, first.findings) == ([], [])
    assert set(second.logs) == {f"{SECOND}/n0-0"}
    assert set(first.logs) == {f"{ORIGIN}/n0-0"}
    trust = Trust(SECOND, made.trust.keys)
    export(made.engine, made.directory / "export", trust)
    for origin in (SECOND, ORIGIN):
        offline, _ = verify_export(made.directory / "export", Trust(origin, made.trust.keys))
        assert {f.code for f in offline.findings} == {"U_NOANCHOR"}, origin  # nothing of the auditor's own was given
        assert set(offline.logs) == {f"{origin}/n0-0"}
    root = RootLog(SECOND)
    with made.engine.connect() as connection:
        for entry in connection.execute(sa.text("SELECT entry FROM audit_root ORDER BY seq")).scalars():
            root.check(entry)
    assert root.recovers == recovery
    with pytest.raises(RolledBack, match=r"set \[node\] origin"):
        guard_of(made, anchor).start()  # a node whose configuration was forgotten


async def test_what_was_kept_of_an_earlier_generation_cannot_be_changed_unseen(made: Lab) -> None:
    anchor = await rolled_back(made)
    open_it(made, asked(made, anchor))
    kept = backup(made)
    for damage, code in (
        ("DELETE FROM audit_past_root WHERE seq = 1", "E_ROOT"),
        ("DELETE FROM audit_past_root WHERE seq = 1; DELETE FROM audit_past_checkpoint", "E_ROOT"),
        ("DELETE FROM audit_past_root WHERE seq = 0", "E_SEQ"),
        ("UPDATE audit_past_root SET leaf = zeroblob(32)", "E_DERIVED"),
        ("UPDATE audit_past_checkpoint SET note = x'00'", "E_SIG"),
    ):
        forge(made, *damage.split("; "))
        assert code in {f.code for f in verify(made, ORIGIN).findings}, damage
        restore(made, kept)


@pytest.mark.parametrize("dies_at", [1, 2, 3])
async def test_a_recovery_that_dies_twice_at_any_step_is_done_by_a_third_try(made: Lab, dies_at: int) -> None:
    anchor = await rolled_back(made)
    recovery = asked(made, anchor)
    for step in (dies_at, 1):
        with pytest.raises(Interrupted):
            open_it(made, recovery, dies_at=step)
    open_it(made, recovery)
    guard_of(made, anchor, origin=SECOND).start()
    assert verify(made, ORIGIN).findings == []
    with pytest.raises(sa.exc.IntegrityError), made.engine.begin() as connection:  # the triggers are back
        connection.execute(sa.text("DELETE FROM audit_root"))


async def test_a_database_from_before_a_recovery_leads_to_a_third_generation(made: Lab) -> None:
    anchor = await rolled_back(made)
    before = backup(made)
    open_it(made, asked(made, anchor))
    guard_of(made, anchor, origin=SECOND).keep(leads=True)
    restore(made, before)
    with pytest.raises(RolledBack, match="generation 2"):
        guard_of(made, anchor, origin=SECOND).start()
    recovery = asked(made, anchor, origin=SECOND)
    assert (recovery.predecessor, recovery.origin) == (SECOND, f"{ORIGIN}/g3")
    assert (recovery.stands[0], recovery.lost[0]) == (0, 0)
    open_it(made, recovery)
    guard_of(made, anchor, origin=f"{ORIGIN}/g3").start()


async def test_a_fork_at_the_same_size_can_be_recovered_from(made: Lab) -> None:
    await signed(made)
    anchor = node_files(made.directory)
    anchor.keep(note_of(made.signer, 2, bytes(32)))
    recovery = asked(made, anchor)
    assert (recovery.lost, recovery.stands[0]) == ((0, 2), 2)
    open_it(made, recovery)
    guard_of(made, anchor, origin=SECOND).start()


async def test_a_generation_that_nobody_opened_is_not_served(made: Lab) -> None:
    with pytest.raises(RolledBack, match="was not opened"):
        guard_of(made, origin=SECOND).start()


async def test_only_the_first_entry_of_a_later_generation_is_a_recovery(made: Lab) -> None:
    recovery = asked(made, await rolled_back(made))
    with pytest.raises(Bad, match="E_SCHEMA"):
        RootLog(SECOND).append([], tenants=bytes(32), epoch=1, full=True, t=now())
    with pytest.raises(Bad, match="E_SCHEMA"):
        RootLog(ORIGIN).open(recovery, APPROVALS, epoch=1, t=now())
    with pytest.raises(Bad, match="E_ORIGIN"):
        RootLog(f"{ORIGIN}/g3").open(recovery, APPROVALS, epoch=1, t=now())
    with pytest.raises(Bad, match="no officer approves it twice"):
        RootLog(SECOND).open(recovery, [APPROVALS[0], APPROVALS[0]], epoch=1, t=now())
    root = RootLog(SECOND)
    root.open(recovery, APPROVALS, epoch=1, t=now())
    with pytest.raises(Bad, match="E_SCHEMA"):
        root.open(recovery, APPROVALS, epoch=1, t=now())


def test_an_origin_has_one_spelling_of_its_generation() -> None:
    assert split_origin(ORIGIN) == (ORIGIN, 1)
    assert split_origin(f"{ORIGIN}/g12") == (ORIGIN, 12)
    assert next_origin(ORIGIN) == SECOND
    assert next_origin(f"{ORIGIN}/g9") == f"{ORIGIN}/g10"
    for bad in (f"{ORIGIN}/g1", f"{ORIGIN}/g0", f"{ORIGIN}/g02", f"{ORIGIN}/x", "kms.example"):
        with pytest.raises(ValueError, match="no origin"):
            split_origin(bad)


async def test_the_digest_binds_every_field(made: Lab) -> None:
    from msgspec.structs import replace

    recovery = asked(made, await rolled_back(made))
    changed = [
        replace(recovery, **{name: value})
        for name, value in {
            "anchor": "elsewhere",
            "anchored": recovery.anchored + " ",
            "asked": recovery.asked + 1,
            "installation": "7d0c2f8e-5b0a-4b58-9f0e-2f6a3c1d9e12",
            "lost": (0, 3),
            "origin": f"{ORIGIN}/g4",
            "predecessor": f"{ORIGIN}/g3",
            "stands": (2, "0" * 64),
        }.items()
    ]
    assert set(recovery.__struct_fields__) == {
        "anchor", "anchored", "asked", "installation", "lost", "origin", "predecessor", "stands"
    }  # fmt: skip
    assert len({digest_of(r) for r in [recovery, *changed]}) == 9
