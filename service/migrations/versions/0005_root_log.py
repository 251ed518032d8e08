"""The root log (entries, checkpoints, what witnesses hold, where each tenant's records end); retired root KEKs.

Revision: 0005
Follows: 0004
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    _root_log()
    _derived()
    _past_generations()
    _outside()
    _retired_roots()
    _append_only()


def _root_log() -> None:
    """Entries, signed checkpoints, and where each tenant's records end."""
    op.create_table(
        "audit_root",
        sa.Column("seq", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("entry", sa.LargeBinary(), nullable=False),
        sa.Column("leaf", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("seq"),
    )
    op.create_table(
        "audit_checkpoint",
        sa.Column("size", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("note", sa.LargeBinary(), nullable=False),
        sa.Column("cosigs", sa.LargeBinary(), nullable=True),
        sa.Column("tst", sa.LargeBinary(), nullable=True),
        sa.PrimaryKeyConstraint("size"),
    )
    op.create_table(
        "audit_tenant",
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("log_id", sa.String(length=128), nullable=False),
        sa.Column("count", sa.BigInteger(), nullable=False),
        sa.Column("leaf", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "log_id"),
    )


def _derived() -> None:
    """Hash tiles and frontiers of the trees, and the search index: made again from the entries where they are wrong."""
    op.create_table(
        "audit_frontier",
        sa.Column("size", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("roots", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("size"),
    )
    op.create_table(
        "audit_tile",
        sa.Column("log", sa.String(length=128), nullable=False),
        sa.Column("level", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("idx", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("width", sa.Integer(), nullable=False),
        sa.Column("hashes", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("log", "level", "idx"),
    )
    op.create_table(
        "audit_index",
        sa.Column("shard", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("key_id", sa.String(length=16), nullable=False),
        sa.Column("first_seq", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("t_min", sa.BigInteger(), nullable=False),
        sa.Column("t_max", sa.BigInteger(), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("mac", sa.LargeBinary(), nullable=False),
        sa.Column("facts", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("shard", "key_id", "first_seq"),
    )


def _past_generations() -> None:
    """What a recovery keeps of the root log before it."""
    op.create_table(
        "audit_past_root",
        sa.Column("origin", sa.String(length=128), nullable=False),
        sa.Column("seq", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("entry", sa.LargeBinary(), nullable=False),
        sa.Column("leaf", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("origin", "seq"),
    )
    op.create_table(
        "audit_past_checkpoint",
        sa.Column("origin", sa.String(length=128), nullable=False),
        sa.Column("size", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("note", sa.LargeBinary(), nullable=False),
        sa.Column("cosigs", sa.LargeBinary(), nullable=True),
        sa.Column("tst", sa.LargeBinary(), nullable=True),
        sa.PrimaryKeyConstraint("origin", "size"),
    )


def _outside() -> None:
    """What sinks and archives took, and what is witnessed of other logs."""
    op.create_table(
        "audit_sink",
        sa.Column("name", sa.String(length=18), nullable=False),
        sa.Column("log_id", sa.String(length=128), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("refused", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("name", "log_id"),
    )
    op.create_table(
        "audit_witness",
        sa.Column("origin", sa.String(length=128), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("root", sa.LargeBinary(), nullable=False),
        sa.Column("note", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("origin"),
    )
    op.create_table(
        "audit_archive",
        sa.Column("log", sa.String(length=128), nullable=False),
        sa.Column("from_seq", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("to_seq", sa.BigInteger(), nullable=False),
        sa.Column("at_seq", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.LargeBinary(), nullable=False),
        sa.Column("uri", sa.Text(), nullable=False),
        sa.Column("manifest", sa.LargeBinary(), nullable=False),
        sa.Column("seal", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("log", "from_seq"),
    )


def _retired_roots() -> None:
    """Root KEKs that nothing is wrapped by any more."""
    op.create_table(
        "keystore_retired_root",
        sa.Column("kek", sa.String(length=36), nullable=False),
        sa.Column("retired_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("kek"),
    )


def _append_only() -> None:
    """Refuse changes of the root log, and on PostgreSQL let nothing but pruning delete records."""
    if op.get_bind().dialect.name == "sqlite":
        # Against accidents, not against the owner of the database: that is what signed checkpoints are for.
        for verb in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER audit_root_{verb.lower()} BEFORE {verb} ON audit_root "
                "BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END"
            )
    else:
        op.execute(
            "CREATE OR REPLACE FUNCTION audit_append_only() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            "IF TG_OP = 'DELETE' AND current_setting('skms.pruning', true) = 'on' THEN RETURN NULL; END IF; "
            "RAISE EXCEPTION 'the audit log is append-only'; END $$"
        )
        for name in ("batch", "snapshot", "root"):
            op.execute(
                f"CREATE TRIGGER audit_{name}_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_{name} "
                "FOR EACH STATEMENT EXECUTE FUNCTION audit_append_only()"
            )


def downgrade() -> None:
    for name in (
        "audit_frontier",
        "audit_tile",
        "audit_index",
        "audit_archive",
        "audit_past_checkpoint",
        "audit_past_root",
        "keystore_retired_root",
        "audit_tenant",
        "audit_witness",
        "audit_checkpoint",
        "audit_root",
        "audit_sink",
    ):
        op.drop_table(name)
