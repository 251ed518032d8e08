"""What a freeze stops in its scope.

Revision: 0007
Follows: 0006
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("policy_freeze") as table:
        table.add_column(sa.Column("mode", sa.String(length=16), server_default="halt", nullable=False))


def downgrade() -> None:
    with op.batch_alter_table("policy_freeze") as table:
        table.drop_column("mode")
