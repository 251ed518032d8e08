"""The notary on a real database: it signs what it re-read, once, in order, and nothing that does not verify."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from audit_lab import ORIGIN, Lab, now, op
from sqlalchemy import Connection

from audit import checkpoint as cp
from audit.chain import Bad
from audit.notary import Notary, coverage
from audit.proof import TenantMap
from audit.rootlog import RootLog
from databases import unguarded

pytestmark = pytest.mark.anyio


class Interrupted(Exception):
    """As if the process died here."""


def held(_: Connection) -> None:
    """The lease is ours."""


def notary_of(made: Lab) -> Notary:
    return Notary(made.engine, origin=ORIGIN, signer=made.signer, clock=now)


async def records(made: Lab, count: int = 20, node: str = "n0") -> None:
    writer = made.writer(node=node)
    await writer.start()
    for i in range(count):
        await writer.append(op(f"t{i % 3}"))
    await writer.close()


def entries(made: Lab) -> list[bytes]:
    with made.engine.connect() as connection:
        return list(connection.execute(sa.text("SELECT entry FROM audit_root ORDER BY seq")).scalars())


def key_of(made: Lab) -> cp.NoteKey:
    return cp.key_of(ORIGIN, made.signer.public_key())


async def test_a_checkpoint_commits_every_chain_and_every_tenant(made: Lab) -> None:
    await records(made)
    await records(made, 5, "n1")
    signed = notary_of(made).round(1, held)
    assert signed is not None
    found = cp.open_checkpoint(signed.note, ORIGIN, [key_of(made)])
    root = RootLog(ORIGIN)
    heads = [root.check(entry) for entry in entries(made)][-1]
    assert heads is not None
    assert (found.size, found.root) == (1, root.chain.frontier.root())
    assert {log: c.size for log, c in root.newest.items()} == {f"{ORIGIN}/n0-0": 22, f"{ORIGIN}/n1-0": 7}
    tenants: dict[str, dict[str, tuple[int, str]]] = {}
    with made.engine.connect() as connection:
        for t, log, count, leaf in connection.execute(sa.text("SELECT tenant, log_id, count, leaf FROM audit_tenant")):
            tenants.setdefault(t, {})[log] = (count, leaf.hex())
    assert tenants["t0"][f"{ORIGIN}/n0-0"][0] == 7
    rebuilt = TenantMap()
    for tenant, heads_of in tenants.items():
        rebuilt.put(tenant, heads_of)
    assert rebuilt.root().hex() == heads.tenants


async def test_nothing_new_is_not_signed_again_and_growth_is(made: Lab) -> None:
    await records(made)
    notary = notary_of(made)
    assert notary.round(1, held) is not None
    assert notary.round(1, held) is None
    assert coverage(made.engine, now()).exposed_s == 0
    await records(made, 3)
    assert coverage(made.engine, now() + 5_000_000).exposed_s >= 5
    second = notary.round(1, held)
    assert second is not None
    assert second.checkpoint.size == 2


async def test_another_notary_goes_on_where_the_last_one_stopped(made: Lab) -> None:
    await records(made)
    first, second = notary_of(made), notary_of(made)
    first.round(1, held)
    await records(made, 4)
    second.round(2, held)
    await records(made, 4)
    third = first.round(3, held)
    assert third is not None
    assert third.checkpoint.size == len(entries(made))
    root = RootLog(ORIGIN)
    assert [h.epoch for e in entries(made) if (h := root.check(e)) is not None] == [1, 2, 3]


async def test_a_crash_between_persist_and_sign_signs_the_same_body(made: Lab) -> None:
    await records(made)
    fences: list[int] = []

    def dies(_: Connection) -> None:
        fences.append(1)
        if len(fences) == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        notary_of(made).round(1, dies)
    (before,) = entries(made)
    signed = notary_of(made).round(2, held)
    assert signed is not None
    assert entries(made)[0] == before
    root = RootLog(ORIGIN)
    for entry in entries(made):
        root.check(entry)
    assert signed.checkpoint.root == root.chain.frontier.root()


async def test_a_lost_lease_leaves_no_entry(made: Lab) -> None:
    await records(made)

    def lost(_: Connection) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        notary_of(made).round(1, lost)
    assert entries(made) == []


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        ("UPDATE audit_batch SET entries = replace(entries, 'encrypt', 'decrypt') WHERE first_seq = 5", "E_LINK"),
        ("UPDATE audit_batch SET seal = zeroblob(64) WHERE first_seq = 5", "E_SEAL"),
        ("DELETE FROM audit_batch WHERE first_seq = 5", "E_SEQ"),
        ("DELETE FROM audit_batch WHERE first_seq > 5", "E_TRUNC"),
    ],
)
async def test_what_does_not_verify_is_never_signed(made: Lab, damage: str, code: str) -> None:
    await records(made)
    with made.engine.begin() as connection:
        unguarded(connection)
        if "replace" in damage:
            row = connection.execute(sa.text("SELECT entries FROM audit_batch WHERE first_seq = 5")).scalar_one()
            edited = bytes(row).replace(b"encrypt", b"decrypt")
            connection.execute(sa.text("UPDATE audit_batch SET entries = :e WHERE first_seq = 5"), {"e": edited})
        else:
            connection.execute(sa.text(damage))
    notary = notary_of(made)
    with pytest.raises(Bad) as caught:
        notary.round(1, held)
    assert caught.value.code in {code, "E_DERIVED"}
    with pytest.raises(Bad):
        notary.round(1, held)
    assert entries(made) == []


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        ("DELETE FROM audit_root", "E_TRUNC"),
        ("UPDATE audit_root SET leaf = zeroblob(32)", "E_DERIVED"),
        ("UPDATE audit_checkpoint SET note = replace(note, 'kms', 'kmz')", "E_SIG"),
        ("DELETE FROM audit_shard", "E_MISSING"),
        ("DELETE FROM audit_batch; DELETE FROM audit_snapshot", "E_ROOT"),
    ],
)
async def test_a_new_notary_refuses_a_database_that_lost_what_was_signed(made: Lab, damage: str, code: str) -> None:
    await records(made)
    assert notary_of(made).round(1, held) is not None
    with made.engine.begin() as connection:
        unguarded(connection)
        for statement in damage.split("; "):
            connection.execute(sa.text(statement))
        connection.execute(sa.text("UPDATE audit_checkpoint SET note = CAST(note AS BLOB)"))
    with pytest.raises(Bad) as caught:
        notary_of(made).round(2, held)
    assert caught.value.code == code
