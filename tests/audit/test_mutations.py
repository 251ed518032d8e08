"""Random changes of every stored column of every audit table, as the owner of a database could make them: all are found.

MUTATIONS is their number on SQLite (default 400), MUTATIONS_POSTGRESQL on PostgreSQL (default 60); `make mutations`
makes 10,000 on each.
"""

from __future__ import annotations

import os
import random
from typing import Any, Final

import pytest
import sqlalchemy as sa
from audit_lab import ORIGIN, Lab, intent, now, op, outcome
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import Connection, Engine

from audit import checkpoint as cp
from audit import tables
from audit.notary import Notary
from audit.stored import verify_connection
from audit.tlogpolicy import any_of
from audit.verify import Trust
from databases import unguarded
from service.database import open_engine

pytestmark = pytest.mark.anyio

TABLES: Final = (
    tables.batch_table,
    tables.shard_table,
    tables.snapshot_table,
    tables.intent_table,
    tables.root_table,
    tables.checkpoint_table,
    tables.tenant_table,
    tables.witness_table,
)
# What the loss of a row of these takes away stands elsewhere too, or (witness) is for anchors outside to notice.
LOST_UNNOTICED: Final = {"audit_snapshot", "audit_checkpoint", "audit_witness"}


class Mutations:
    """One stored value becomes another one, or a row goes."""

    def __init__(self, connection: Connection, seed: int) -> None:
        self.db, self.chooser = connection, random.Random(seed)
        self.rows = {t: [dict(r) for r in connection.execute(sa.select(t)).mappings()] for t in TABLES}
        assert all(self.rows.values()), "every table has a row to change"
        self.touched: set[str] = set()

    def one(self) -> str:
        """Apply one; says what was done."""
        table = self.chooser.choice(TABLES)
        row = self.chooser.choice(self.rows[table])
        there = sa.and_(*(column == row[column.name] for column in table.primary_key))
        if table.name not in LOST_UNNOTICED and self.chooser.random() < 0.05:
            self.db.execute(sa.delete(table).where(there))
            return f"deleted a row of {table.name}"
        column = self.chooser.choice(list(row))
        value = self._other(row[column], [r[column] for r in self.rows[table]])
        self.db.execute(sa.update(table).where(there).values({column: value}))
        self.touched.add(f"{table.name}.{column}")
        return f"{table.name}.{column}: {row[column]!r:.60} -> {value!r:.60}"

    def _other(self, value: Any, column: list[Any]) -> Any:
        others = [other for other in column if other != value]
        if others and self.chooser.random() < 0.2:
            return self.chooser.choice(others)
        match value:
            case None:
                return b"\0"
            case int():
                return value + self.chooser.choice([-1, 1, 7, 86_400, 2**30])
            case bytes() if not value:
                return b"\0"
            case bytes():
                return self._bytes(value)
        at = self.chooser.randrange(len(value))
        return value[:at] + chr((ord(value[at]) + 1) % 127 or 1) + value[at + 1 :]

    def _bytes(self, value: bytes) -> bytes:
        at = self.chooser.randrange(len(value))
        return self.chooser.choice(
            [
                value[:at],
                value + bytes([self.chooser.randrange(256)]),
                value[:at] + value[at + 1 :],
                value[:at] + bytes([value[at] ^ 1 << self.chooser.randrange(8)]) + value[at + 1 :],
            ]
        )


def cosigned(note: bytes, key: Ed25519PrivateKey, name: str, at: int) -> bytes:
    """The line that a witness adds."""
    text = cp.parse_note(note).text
    seconds = at // 1_000_000
    witness = cp.NoteKey(name, cp.COSIGNATURE, key.public_key().public_bytes_raw())
    value = seconds.to_bytes(8, "big") + key.sign(cp.cosigned(text, seconds))
    return cp.Signature(witness.name, witness.id, value).line()


async def filled(made: Lab, engine: Engine) -> tuple[Trust, bytes]:
    """Something in every table and column; whom to trust, and the newest checkpoint, which somebody keeps."""
    made.engine = engine
    notary = Notary(engine, origin=ORIGIN, signer=made.signer, clock=now)

    def held(_: Connection) -> None:
        """The lease is ours."""

    writer = made.writer()
    await writer.start()
    for i in range(4):
        await writer.append(op(f"t{i % 2}"))
    notary.round(1, held)
    await writer.append(intent())
    done = intent()
    await writer.append_many([done, op(), op()])
    await writer.append(outcome(done))
    await writer.close()
    notary.round(1, held)
    heir = made.writer()
    await heir.start()
    await heir.append(intent())
    await heir.close()
    signed = notary.round(1, held)
    assert signed is not None
    witness, peer = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    peer_key = cp.NoteKey("peer.example/audit", cp.ED25519, peer.public_key().public_bytes_raw())
    theirs = cp.Checkpoint(peer_key.name, 7, b"\7" * 32)
    note = cp.Note(theirs.text(), ()).signed_by(peer_key, peer.sign(theirs.text())).encode()
    table = tables.checkpoint_table
    with engine.begin() as connection:
        for row in connection.execute(sa.select(table)).mappings().all():
            line = cosigned(row["note"], witness, "w1", row["at"])
            connection.execute(sa.update(table).where(table.c.size == row["size"]).values(cosigs=line))
        values = {"origin": theirs.origin, "size": theirs.size, "root": theirs.root, "note": note}
        connection.execute(sa.insert(tables.witness_table), [values])
    seen_by = cp.NoteKey("w1", cp.COSIGNATURE, witness.public_key().public_bytes_raw())
    trust = Trust(ORIGIN, made.trust.keys, any_of({"w1": seen_by}, 1), (peer_key,))
    return trust, signed.note


def mutated(connection: Connection, trust: Trust, kept: bytes, count: int) -> tuple[set[str], list[str]]:
    """Make `count` changes, each alone, and verify after each; which columns were touched, and what went unnoticed."""
    assert verify_connection(connection, trust, held=kept).findings == []
    mutations, missed, trials = Mutations(connection, seed=20_261_125), list[str](), 0
    while trials < count:
        trial = connection.begin_nested()
        try:
            what = mutations.one()
        except (sa.exc.IntegrityError, sa.exc.DataError):
            trial.rollback()
            continue
        trials += 1
        report = verify_connection(connection, trust, held=kept)
        trial.rollback()
        if report.exit_status != 1:
            missed.append(what)
    return mutations.touched, missed


async def test_random_mutations_on_sqlite_and_none_undetected(made: Lab) -> None:
    trust, kept = await filled(made, made.engine)
    with made.engine.connect() as connection:
        unguarded(connection)
        count = int(os.environ.get("MUTATIONS", "400"))
        touched, missed = mutated(connection, trust, kept, count)
        connection.rollback()
    assert missed == []
    columns = {f"{table.name}.{column.name}" for table in TABLES for column in table.columns}
    assert touched <= columns
    assert len(touched) > len(columns) / 2
    assert count < 1000 or touched == columns


async def test_random_mutations_on_postgresql_and_none_undetected(made: Lab, postgres: Any) -> None:
    engine = open_engine(postgres.fresh("mutations"))
    with engine.begin() as connection:
        tables.tables.create_all(connection)
    trust, kept = await filled(made, engine)
    with engine.connect() as connection:
        unguarded(connection)
        touched, missed = mutated(connection, trust, kept, int(os.environ.get("MUTATIONS_POSTGRESQL", "60")))
        connection.rollback()
    engine.dispose()
    assert missed == []
    assert len(touched) > 20
