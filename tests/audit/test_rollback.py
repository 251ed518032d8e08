"""What an anchor holds must be a prefix of the root log: old copies, cut ends, forks and new histories are refused."""

from __future__ import annotations

import shutil
import stat
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import sqlalchemy as sa
from audit_lab import ORIGIN, Lab, MemorySigner, now, op
from sqlalchemy import Connection

from audit import checkpoint as cp
from audit.anchors import Anchor, AnchorUnusable, NodeFiles, TokenObject, WriteOnce
from audit.log import RolledBack
from audit.notary import Notary, newest
from audit.rollback import Guard, Watched
from databases import unguarded
from service.database import open_engine

pytestmark = pytest.mark.anyio


class Drawer:
    """Two devices that keep what they are given."""

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}
        self.writes, self.away = 0, False

    def get(self) -> Sequence[tuple[str, bytes]]:
        if self.away:
            raise OSError("no HSM is up")
        return list(self.held.items())

    def put(self, data: bytes) -> None:
        self.writes += 1
        self.held = {"hsm-1": data, "hsm-2": data}


def node_files(directory: Path) -> Anchor:
    (directory / "files").mkdir()
    return NodeFiles(directory / "files", "n0")


def write_once(directory: Path) -> Anchor:
    (directory / "worm").mkdir()
    return WriteOnce(directory / "worm")


def token_object(_: Path) -> Anchor:
    return TokenObject(Drawer())


ANCHORS: list[Callable[[Path], Anchor]] = [node_files, write_once, token_object]


@pytest.fixture(params=ANCHORS)
def anchor(request: pytest.FixtureRequest, tmp_path: Path) -> Anchor:
    made: Anchor = request.param(tmp_path)
    return made


def held(_: Connection) -> None:
    """The lease is ours."""


def guard_of(made: Lab, *anchors: Anchor, origin: str = ORIGIN, **options: float) -> Guard:
    watched = [Watched(a) for a in anchors]
    return Guard(
        made.engine,
        origin=origin,
        known_keys=made.signer.known_keys,
        watched=watched,
        monotonic=time.monotonic,
        **options,
    )


async def signed(made: Lab, rounds: int = 2) -> Notary:
    """Records, and a checkpoint after each few."""
    notary = Notary(made.engine, origin=ORIGIN, signer=made.signer, clock=now)
    for _ in range(rounds):
        writer = made.writer()
        await writer.start()
        await writer.append(op())
        await writer.close()
        assert notary.round(1, held) is not None
    return notary


def backup(made: Lab, name: str = "backup.db") -> Path:
    """A copy of the whole database, as an operator would make it."""
    path = made.directory / name
    path.unlink(missing_ok=True)
    with made.engine.connect() as connection:
        connection.exec_driver_sql("ROLLBACK")
        connection.exec_driver_sql(f"VACUUM INTO '{path}'")
        connection.exec_driver_sql("BEGIN")
    return path


def restore(made: Lab, path: Path) -> None:
    made.engine.dispose()
    for old in made.directory.glob("audit.db*"):
        old.unlink()
    shutil.copy(path, made.path)
    made.engine = open_engine(f"sqlite:///{made.path}")


def forge(made: Lab, *statements: str) -> None:
    with made.engine.begin() as connection:
        unguarded(connection)
        for statement in statements:
            connection.execute(sa.text(statement))


async def test_an_anchor_keeps_the_newest_note_durably_and_never_an_older_one(made: Lab, anchor: Anchor) -> None:
    assert list(anchor.newest()) == []
    await signed(made, 3)
    with made.engine.connect() as connection:
        notes = [s.note for size in (1, 2, 3) if (s := newest(connection, size)) is not None]
    anchor.keep(notes[1])
    anchor.keep(notes[1])
    anchor.keep(notes[0])
    assert {h.note for h in anchor.newest()} == {notes[1]}
    anchor.keep(notes[2])
    assert {h.note for h in anchor.newest()} == {notes[2]}


async def test_another_checkpoint_of_the_same_size_is_never_kept(made: Lab, anchor: Anchor) -> None:
    await signed(made, 1)
    with made.engine.connect() as connection:
        found = newest(connection)
    assert found is not None
    anchor.keep(found.note)
    with pytest.raises(AnchorUnusable, match="another checkpoint of size 1"):
        anchor.keep(note_of(made.signer, 1, bytes(32)))
    assert {h.note for h in anchor.newest()} == {found.note}


def note_of(signer: MemorySigner, size: int, root: bytes, origin: str = ORIGIN) -> bytes:
    text = cp.Checkpoint(origin, size, root).text()
    return cp.Note(text, ()).signed_by(cp.key_of(origin, signer.public_key()), signer.sign(text)).encode()


async def test_a_database_that_every_anchor_agrees_with_starts_and_grows(made: Lab, anchor: Anchor) -> None:
    guard = guard_of(made, anchor)
    guard.start()
    notary = await signed(made)
    guard.check()
    guard.keep(leads=True)
    writer = made.writer()
    await writer.start()
    await writer.close()
    notary.round(1, held)
    guard.check()
    guard_of(made, anchor).start()
    assert guard_of(made, anchor).findings().size == 3


async def test_an_old_copy_of_the_database_is_refused_at_start_and_while_running(made: Lab, anchor: Anchor) -> None:
    await signed(made)
    old = backup(made)
    await signed(made)
    guard = guard_of(made, anchor)
    guard.start()
    guard.keep(leads=True)
    restore(made, old)
    with pytest.raises(RolledBack, match="4 entries, the database has 2") as caught:
        guard_of(made, anchor).start()
    assert anchor.newest()[0].where in str(caught.value)
    running = guard_of(made)  # it had started, and its anchors were read, before the copy came
    running.watched = (Watched(anchor),)
    with pytest.raises(RolledBack):
        running.check()
    with pytest.raises(RolledBack):
        running.check()


async def test_a_running_process_notices_by_itself_that_the_root_log_was_cut_or_rewritten(made: Lab) -> None:
    await signed(made)
    for damage in ("DELETE FROM audit_root WHERE seq = 1", "UPDATE audit_root SET entry = x'00' WHERE seq = 1"):
        guard = guard_of(made)
        guard.start()
        kept = backup(made)
        forge(made, damage)
        with pytest.raises(RolledBack, match="this process"):
            guard.check()
        restore(made, kept)


@pytest.mark.parametrize(
    "damage",
    ["DELETE FROM audit_root WHERE seq >= 1", "DELETE FROM audit_root; DELETE FROM audit_checkpoint"],
)
async def test_a_cut_root_log_is_refused(made: Lab, anchor: Anchor, damage: str) -> None:
    await signed(made)
    guard = guard_of(made, anchor)
    guard.start()
    guard.keep(leads=True)
    forge(made, *damage.split("; "))
    with pytest.raises(RolledBack):
        guard_of(made, anchor).start()


async def test_a_stolen_key_with_a_new_history_of_any_length_is_refused(made: Lab, anchor: Anchor) -> None:
    await signed(made)
    guard = guard_of(made, anchor)
    guard.start()
    guard.keep(leads=True)
    with made.engine.begin() as connection:
        unguarded(connection)
        for table in ("batch", "snapshot", "root", "shard", "checkpoint", "tenant", "intent"):
            connection.execute(sa.text(f"DELETE FROM audit_{table}"))
    await signed(made, 2)  # the same size, another root
    assert made.verify() == []
    with pytest.raises(RolledBack, match="another root at 2 entries"):
        guard_of(made, anchor).start()
    await signed(made, 2)  # and longer
    with pytest.raises(RolledBack, match="another root at 2 entries"):
        guard_of(made, anchor).start()


@pytest.mark.parametrize("content", [b"", b"rubbish", b"kms.example/audit\n1\nAAAA\n\n"])
async def test_a_damaged_anchor_file_is_named_and_never_taken_for_an_empty_one(made: Lab, content: bytes) -> None:
    await signed(made)
    anchor = node_files(made.directory)
    guard = guard_of(made, anchor)
    guard.keep(leads=True)
    path = made.directory / "files" / "n0.last-checkpoint"
    path.write_bytes(content)
    with pytest.raises(AnchorUnusable, match=str(path)):
        guard_of(made, anchor).start()
    guard.keep(leads=True)
    assert path.read_bytes() == content  # evidence


async def test_a_note_of_a_foreign_key_or_log_is_no_anchor_of_ours(made: Lab) -> None:
    await signed(made)
    anchor = node_files(made.directory)
    path = made.directory / "files" / "n1.last-checkpoint"
    path.write_bytes(note_of(MemorySigner(), 9, bytes(32)))
    with pytest.raises(AnchorUnusable, match="no signature of a trusted key"):
        guard_of(made, anchor).start()
    path.write_bytes(note_of(made.signer, 9, bytes(32), "other.example/audit"))
    with pytest.raises(AnchorUnusable, match="belongs to the log other"):
        guard_of(made, anchor).start()


async def test_another_nodes_file_counts_as_much_as_ones_own(made: Lab) -> None:
    await signed(made)
    folder = node_files(made.directory)
    theirs = NodeFiles(made.directory / "files", "n1")
    theirs.keep(note_of(made.signer, 7, bytes(32)))
    with pytest.raises(RolledBack, match=r"n1\.last-checkpoint"):
        guard_of(made, folder).start()


async def test_an_anchor_out_of_reach_refuses_a_start_unless_it_is_optional_and_halts_a_running_node(made: Lab) -> None:
    await signed(made)
    missing = WriteOnce(made.directory / "not-mounted")
    with pytest.raises(AnchorUnusable, match="required = false"):
        guard_of(made, missing).start()
    optional = guard_of(made)
    optional.watched = (Watched(missing, required=False),)
    optional.start()
    optional.check()
    assert optional.late() is None
    drawer = Drawer()
    running = guard_of(made, TokenObject(drawer), halt_s=0.0)
    running.start()
    drawer.away = True
    running.check()
    assert "no HSM is up" in str(running.late())
    drawer.away = False
    running.check()
    assert running.late() is None


async def test_a_token_is_written_once_an_hour_however_many_processes_lead(made: Lab) -> None:
    drawer = Drawer()
    for _ in range(3):
        await signed(made, 1)
        guard = guard_of(made)
        guard.watched = (Watched(TokenObject(drawer), every_s=3_600, leader=True),)
        guard.start()
        guard.keep(leads=False)
        guard.keep(leads=True)
        guard.keep(leads=True)
    assert drawer.writes == 1


async def test_a_write_once_file_is_read_only_and_an_interrupted_write_is_passed_over(made: Lab) -> None:
    await signed(made)
    anchor = write_once(made.directory)
    guard_of(made, anchor).keep(leads=True)
    (path,) = (made.directory / "worm").rglob("0000000000000002")
    assert stat.S_IMODE(path.stat().st_mode) == 0o444
    (path.parent / "0000000000000003").touch()
    assert [h.where for h in anchor.newest()] == [str(path)]


async def test_a_checkpoint_of_another_tree_is_never_anchored(made: Lab, anchor: Anchor) -> None:
    await signed(made)
    forged = note_of(made.signer, 2, bytes(32))
    with made.engine.begin() as connection:
        connection.execute(sa.text("UPDATE audit_checkpoint SET note = :n WHERE size = 2"), {"n": forged})
    guard = guard_of(made, anchor)
    guard.start()
    with pytest.raises(RolledBack, match="another tree"):
        guard.keep(leads=True)
    assert list(anchor.newest()) == []
