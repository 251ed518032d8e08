"""Imported keys: open imports, fingerprints of imported material, and what a version says of its import.

Revision: 0002
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "keystore_import",
        sa.Column("import_id", sa.String(length=36), nullable=False),
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("key_id", sa.String(length=36), nullable=False),
        sa.Column("wrapping", sa.String(length=64), nullable=False),
        sa.Column("path", sa.String(length=16), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.Column("object_id", sa.String(length=36), nullable=False),
        sa.Column("material", sa.String(length=32), nullable=False),
        sa.Column("mechanism", sa.String(length=64), nullable=False),
        sa.Column("kek", sa.String(length=36), nullable=False),
        sa.Column("blob", sa.LargeBinary(), nullable=False),
        sa.Column("sealed", sa.LargeBinary(), nullable=False),
        sa.Column("public", sa.LargeBinary(), nullable=False),
        sa.Column("mac", sa.LargeBinary(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("spent_at", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("import_id"),
    )
    op.create_index("keystore_import_key", "keystore_import", ["key_id"], unique=False)
    op.create_index("keystore_import_expires", "keystore_import", ["expires_at"], unique=False)
    op.create_table(
        "keystore_material",
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("fingerprint", sa.LargeBinary(length=32), nullable=False),
        sa.Column("key_id", sa.String(length=36), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "fingerprint"),
    )
    op.add_column("keystore_version", sa.Column("import_path", sa.String(length=16), nullable=True))
    op.add_column("keystore_version", sa.Column("import_expires_at", sa.BigInteger(), nullable=True))


def downgrade() -> None:
    op.drop_column("keystore_version", "import_expires_at")
    op.drop_column("keystore_version", "import_path")
    op.drop_table("keystore_material")
    op.drop_index("keystore_import_expires", table_name="keystore_import")
    op.drop_index("keystore_import_key", table_name="keystore_import")
    op.drop_table("keystore_import")
