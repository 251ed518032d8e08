"""Which version of a region's root KEK is current.

Revision: 0004
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "keystore_root",
        sa.Column("region", sa.String(length=64), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("changed_at", sa.BigInteger(), nullable=False),
        sa.Column("mac", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("region"),
    )
    op.create_index("keystore_version_kek", "keystore_version", ["kek"])


def downgrade() -> None:
    op.drop_index("keystore_version_kek", "keystore_version")
    op.drop_table("keystore_root")
