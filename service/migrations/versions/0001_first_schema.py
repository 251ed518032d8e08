"""The first schema: keys, audit log, tokens, idempotent answers, leases.

Revision: 0001
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "keystore_alias",
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("alias", sa.String(length=128), nullable=False),
        sa.Column("key_id", sa.String(length=36), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "alias"),
    )
    op.create_table(
        "keystore_epoch",
        sa.Column("one", sa.Integer(), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("one"),
    )
    op.create_table(
        "keystore_key",
        sa.Column("key_id", sa.String(length=36), nullable=False),
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("spec", sa.String(length=16), nullable=False),
        sa.Column("usage", sa.String(length=16), nullable=False),
        sa.Column("suite", sa.Integer(), nullable=False),
        sa.Column("tier", sa.Integer(), nullable=False),
        sa.Column("home", sa.String(length=64), nullable=False),
        sa.Column("places", sa.Text(), nullable=False),
        sa.Column("purposes", sa.Text(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("kv", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("updated_at", sa.BigInteger(), nullable=False),
        sa.Column("origin", sa.String(length=16), nullable=False),
        sa.Column("non_exportable", sa.Boolean(), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("tags", sa.Text(), nullable=False),
        sa.Column("max_age", sa.BigInteger(), nullable=True),
        sa.Column("max_uses", sa.BigInteger(), nullable=True),
        sa.Column("min_decrypt_version", sa.Integer(), nullable=False),
        sa.Column("min_encrypt_version", sa.Integer(), nullable=False),
        sa.Column("delete_at", sa.BigInteger(), nullable=True),
        sa.Column("mac", sa.LargeBinary(), nullable=False),
        sa.Column("changed", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("key_id"),
    )
    op.create_index("keystore_key_changed", "keystore_key", ["changed"], unique=False)
    op.create_index("keystore_key_delete_at", "keystore_key", ["delete_at"], unique=False)
    op.create_index("keystore_key_tenant", "keystore_key", ["tenant", "key_id"], unique=False)
    op.create_table(
        "keystore_tenant_secret",
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("region", sa.String(length=64), nullable=False),
        sa.Column("object_id", sa.String(length=36), nullable=False),
        sa.Column("mechanism", sa.String(length=64), nullable=False),
        sa.Column("kek", sa.String(length=36), nullable=False),
        sa.Column("blob", sa.LargeBinary(), nullable=False),
        sa.Column("mac", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "generation"),
    )
    op.create_table(
        "keystore_version",
        sa.Column("key_id", sa.String(length=36), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("object_id", sa.String(length=36), nullable=False),
        sa.Column("mechanism", sa.String(length=64), nullable=False),
        sa.Column("kek", sa.String(length=36), nullable=False),
        sa.Column("blob", sa.LargeBinary(), nullable=False),
        sa.Column("public", sa.LargeBinary(), nullable=False),
        sa.Column("mac", sa.LargeBinary(), nullable=False),
        sa.Column("uses", sa.BigInteger(), server_default="0", nullable=False),
        sa.PrimaryKeyConstraint("key_id", "number"),
        sa.UniqueConstraint("object_id"),
    )
    op.create_table(
        "audit_batch",
        sa.Column("day", sa.Integer(), nullable=False),
        sa.Column("shard", sa.Integer(), nullable=False),
        sa.Column("first_seq", sa.BigInteger(), nullable=False),
        sa.Column("n", sa.Integer(), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("t", sa.BigInteger(), nullable=False),
        sa.Column("entries", sa.LargeBinary(), nullable=False),
        sa.Column("head", sa.LargeBinary(), nullable=False),
        sa.Column("seal", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("day", "shard", "first_seq"),
    )
    op.create_index("audit_batch_chain", "audit_batch", ["shard", "first_seq"], unique=False)
    op.create_index("audit_batch_time", "audit_batch", ["t"], unique=False)
    op.create_table(
        "audit_intent",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("shard", sa.Integer(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "audit_shard",
        sa.Column("shard", sa.Integer(), nullable=False),
        sa.Column("log_id", sa.String(length=128), nullable=False),
        sa.Column("node", sa.String(length=64), nullable=False),
        sa.Column("slot", sa.Integer(), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("next_seq", sa.BigInteger(), nullable=False),
        sa.Column("head", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("shard"),
        sa.UniqueConstraint("log_id"),
    )
    op.create_table(
        "audit_snapshot",
        sa.Column("shard", sa.Integer(), nullable=False),
        sa.Column("at_seq", sa.BigInteger(), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("blob", sa.LargeBinary(), nullable=False),
        sa.Column("seal", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("shard", "at_seq"),
    )
    op.create_table(
        "service_api_token",
        sa.Column("token_id", sa.String(length=8), nullable=False),
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("role", sa.String(length=16), nullable=False),
        sa.Column("scopes", sa.Text(), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.Column("created_by", sa.String(length=600), nullable=False),
        sa.Column("revoked_at", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("token_id"),
    )
    op.create_table(
        "service_idempotency",
        sa.Column("claim", sa.LargeBinary(), nullable=False),
        sa.Column("request", sa.LargeBinary(), nullable=False),
        sa.Column("state", sa.String(length=8), nullable=False),
        sa.Column("status", sa.Integer(), nullable=True),
        sa.Column("body", sa.LargeBinary(), nullable=True),
        sa.Column("headers", sa.Text(), nullable=True),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("claim"),
    )
    op.create_table(
        "service_lease",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("owner", sa.String(length=128), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("until", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_table(
        "service_setting",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    if op.get_bind().dialect.name == "sqlite":
        # Against accidents, not against the owner of the database: that is what chain and seals are for.
        for name in ("batch", "snapshot"):
            for verb in ("UPDATE", "DELETE"):
                op.execute(
                    f"CREATE TRIGGER audit_{name}_{verb.lower()} BEFORE {verb} ON audit_{name} "
                    "BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END"
                )


def downgrade() -> None:
    op.drop_table("service_setting")
    op.drop_table("service_lease")
    op.drop_table("service_idempotency")
    op.drop_table("service_api_token")
    op.drop_table("audit_snapshot")
    op.drop_table("audit_shard")
    op.drop_table("audit_intent")
    op.drop_index("audit_batch_time", table_name="audit_batch")
    op.drop_index("audit_batch_chain", table_name="audit_batch")
    op.drop_table("audit_batch")
    op.drop_table("keystore_version")
    op.drop_table("keystore_tenant_secret")
    op.drop_index("keystore_key_tenant", table_name="keystore_key")
    op.drop_index("keystore_key_delete_at", table_name="keystore_key")
    op.drop_index("keystore_key_changed", table_name="keystore_key")
    op.drop_table("keystore_key")
    op.drop_table("keystore_epoch")
    op.drop_table("keystore_alias")
