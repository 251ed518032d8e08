"""When the incident began that a freeze answers to.

Revision: 0009
Follows: 0008
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("policy_freeze") as table:
        table.add_column(sa.Column("began", sa.BigInteger(), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("policy_freeze") as table:
        table.drop_column("began")
