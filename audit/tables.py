"""The tables of the audit log, on SQLite and PostgreSQL. What they hold is trusted by nobody: it is checked when read."""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa
from sqlalchemy import Connection

tables: Final = sa.MetaData()

shard_table: Final = sa.Table(
    "audit_shard",
    tables,
    sa.Column("shard", sa.Integer, primary_key=True),
    sa.Column("log_id", sa.String(128), nullable=False, unique=True),
    sa.Column("node", sa.String(64), nullable=False),
    sa.Column("slot", sa.Integer, nullable=False),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    sa.Column("next_seq", sa.BigInteger, nullable=False),
    sa.Column("head", sa.LargeBinary, nullable=False),
)
batch_table: Final = sa.Table(
    "audit_batch",
    tables,
    sa.Column("day", sa.Integer, nullable=False, primary_key=True),
    sa.Column("shard", sa.Integer, nullable=False, primary_key=True),
    sa.Column("first_seq", sa.BigInteger, nullable=False, primary_key=True),
    sa.Column("n", sa.Integer, nullable=False),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    sa.Column("t", sa.BigInteger, nullable=False),
    sa.Column("entries", sa.LargeBinary, nullable=False),
    sa.Column("head", sa.LargeBinary, nullable=False),
    sa.Column("seal", sa.LargeBinary, nullable=False),
)
sa.Index("audit_batch_chain", batch_table.c.shard, batch_table.c.first_seq)
sa.Index("audit_batch_time", batch_table.c.t)
snapshot_table: Final = sa.Table(
    "audit_snapshot",
    tables,
    sa.Column("shard", sa.Integer, primary_key=True),
    sa.Column("at_seq", sa.BigInteger, primary_key=True),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    sa.Column("blob", sa.LargeBinary, nullable=False),
    sa.Column("seal", sa.LargeBinary, nullable=False),
)
intent_table: Final = sa.Table(
    "audit_intent",
    tables,
    sa.Column("id", sa.String(36), primary_key=True),
    sa.Column("shard", sa.Integer, nullable=False),
    sa.Column("seq", sa.BigInteger, nullable=False),
)
root_table: Final = sa.Table(
    "audit_root",
    tables,
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("entry", sa.LargeBinary, nullable=False),
    sa.Column("leaf", sa.LargeBinary, nullable=False),
)
checkpoint_table: Final = sa.Table(
    "audit_checkpoint",
    tables,
    sa.Column("size", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("at", sa.BigInteger, nullable=False),  # when the notary began to read what it covers
    sa.Column("note", sa.LargeBinary, nullable=False),
    sa.Column("cosigs", sa.LargeBinary),  # of witnesses
    sa.Column("tst", sa.LargeBinary),  # RFC 3161
)
witness_table: Final = sa.Table(
    "audit_witness",
    tables,
    sa.Column("origin", sa.String(128), primary_key=True),
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Column("root", sa.LargeBinary, nullable=False),
    sa.Column("note", sa.LargeBinary, nullable=False),
)
# Derived from the chains and committed by the root log's map: written with each of its entries, for bundles.
tenant_table: Final = sa.Table(
    "audit_tenant",
    tables,
    sa.Column("tenant", sa.String(64), primary_key=True),
    sa.Column("log_id", sa.String(128), primary_key=True),
    sa.Column("count", sa.BigInteger, nullable=False),
    sa.Column("leaf", sa.LargeBinary, nullable=False),
)
# How far each receiver outside has the chains: the next record to send, and one that it refuses.
sink_table: Final = sa.Table(
    "audit_sink",
    tables,
    sa.Column("name", sa.String(18), primary_key=True),
    sa.Column("log_id", sa.String(128), primary_key=True),
    sa.Column("seq", sa.BigInteger, nullable=False),
    sa.Column("at", sa.BigInteger, nullable=False),
    sa.Column("refused", sa.BigInteger),
)

# Root logs and checkpoints of generations before the newest recovery: what stood of them, as it stood.
past_root_table: Final = sa.Table(
    "audit_past_root",
    tables,
    sa.Column("origin", sa.String(128), primary_key=True),
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("entry", sa.LargeBinary, nullable=False),
    sa.Column("leaf", sa.LargeBinary, nullable=False),
)
past_checkpoint_table: Final = sa.Table(
    "audit_past_checkpoint",
    tables,
    sa.Column("origin", sa.String(128), primary_key=True),
    sa.Column("size", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("at", sa.BigInteger, nullable=False),
    sa.Column("note", sa.LargeBinary, nullable=False),
    sa.Column("cosigs", sa.LargeBinary),
    sa.Column("tst", sa.LargeBinary),
)
# Derived from the entries and checked against a committed root before use: what a proof reads instead of every record.
tile_table: Final = sa.Table(
    "audit_tile",
    tables,
    sa.Column("log", sa.String(128), primary_key=True),
    sa.Column("level", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("idx", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("width", sa.Integer, nullable=False),
    sa.Column("hashes", sa.LargeBinary, nullable=False),
)

# Where a start begins to read the root log; used only if the entries from there on lead to a signed root.
frontier_table: Final = sa.Table(
    "audit_frontier",
    tables,
    sa.Column("size", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("roots", sa.LargeBinary, nullable=False),
)

# Derived, authenticated by a key of the HSM, and what is missing is read from the entries: see audit.index.
index_table: Final = sa.Table(
    "audit_index",
    tables,
    sa.Column("shard", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("key_id", sa.String(16), primary_key=True),
    sa.Column("first_seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("t_min", sa.BigInteger, nullable=False),
    sa.Column("t_max", sa.BigInteger, nullable=False),
    sa.Column("digest", sa.LargeBinary, nullable=False),
    sa.Column("mac", sa.LargeBinary, nullable=False),
    sa.Column("facts", sa.LargeBinary, nullable=False),
)

# The manifests are signed by the audit key; the other columns repeat what they say.
archive_table: Final = sa.Table(
    "audit_archive",
    tables,
    sa.Column("log", sa.String(128), primary_key=True),
    sa.Column("from_seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("to_seq", sa.BigInteger, nullable=False),
    sa.Column("at_seq", sa.BigInteger, nullable=False),  # the database keeps what stands from here on
    sa.Column("sha256", sa.LargeBinary, nullable=False),
    sa.Column("uri", sa.Text, nullable=False),
    sa.Column("manifest", sa.LargeBinary, nullable=False),
    sa.Column("seal", sa.LargeBinary, nullable=False),
)

# Against accidents, not against the owner of the database: that is what chain and seals are for.
APPEND_ONLY: Final = tuple(
    f"CREATE TRIGGER audit_{name}_{verb.lower()} BEFORE {verb} ON audit_{name} "
    f"BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END"
    for name in ("batch", "snapshot", "root")
    for verb in ("UPDATE", "DELETE")
)
# PostgreSQL, where a row trigger would miss TRUNCATE. Deleting is let through in a transaction that says so.
APPEND_ONLY_POSTGRESQL: Final = (
    (
        "CREATE OR REPLACE FUNCTION audit_append_only() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "IF TG_OP = 'DELETE' AND current_setting('skms.pruning', true) = 'on' THEN RETURN NULL; END IF; "
        "RAISE EXCEPTION 'the audit log is append-only'; END $$"
    ),
    *(
        f"CREATE TRIGGER audit_{name}_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_{name} "
        "FOR EACH STATEMENT EXECUTE FUNCTION audit_append_only()"
        for name in ("batch", "snapshot", "root")
    ),
    # Runs with the rights of the schema's owner, so that the service's own role cannot delete a record: at most what a
    # segment in audit_archive covers goes.
    """DO $make$ BEGIN EXECUTE format($text$
CREATE OR REPLACE FUNCTION audit_prune(of_shard integer, below bigint, stands_from bigint) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = %%I, pg_temp AS $body$
DECLARE gone bigint;
BEGIN
    IF NOT EXISTS (
        SELECT FROM audit_archive a JOIN audit_shard s ON s.log_id = a.log
        WHERE s.shard = of_shard AND a.at_seq = stands_from AND below <= stands_from
    ) THEN
        RAISE EXCEPTION 'the audit log is append-only: no archived segment covers this';
    END IF;
    PERFORM set_config('skms.pruning', 'on', true);
    DELETE FROM audit_snapshot WHERE shard = of_shard AND at_seq <= stands_from;
    DELETE FROM audit_batch WHERE shard = of_shard AND first_seq < below;
    GET DIAGNOSTICS gone = ROW_COUNT;
    PERFORM set_config('skms.pruning', 'off', true);
    RETURN gone;
END $body$
$text$, current_schema()); END $make$""",
    "REVOKE ALL ON FUNCTION audit_prune(integer, bigint, bigint) FROM PUBLIC",
)
for _dialect, _statements in (("sqlite", APPEND_ONLY), ("postgresql", APPEND_ONLY_POSTGRESQL)):
    for _statement in _statements:
        # `%%`: one of them would be a placeholder of DDL's
        sa.event.listen(tables, "after_create", sa.DDL(_statement).execute_if(dialect=_dialect))  # type: ignore[no-untyped-call]  # SQLAlchemy has no annotation here


def prune(connection: Connection, shard: int, *, below: int, stands_from: int) -> int:
    """Delete the batches before a number, and the snapshots before the one that an archived segment lets stand; how many.

    The only way that deletes records.
    """
    if connection.dialect.name == "postgresql":
        return int(connection.execute(sa.select(sa.func.audit_prune(shard, below, stands_from))).scalar_one())
    b, s = batch_table.c, snapshot_table.c
    lifted = [f"audit_{name}_delete" for name in ("batch", "snapshot")]
    for name in lifted:
        connection.execute(sa.text(f"DROP TRIGGER {name}"))
    connection.execute(sa.delete(snapshot_table).where(s.shard == shard, s.at_seq <= stands_from))
    gone = connection.execute(sa.delete(batch_table).where(b.shard == shard, b.first_seq < below)).rowcount
    for statement in APPEND_ONLY:  # an error before this ends the transaction, and the triggers are there again
        if statement.split()[2] in lifted:
            connection.execute(sa.text(statement))
    return int(gone)
