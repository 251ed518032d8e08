"""On PostgreSQL, pruning by a function of the schema's owner: the service's role needs no right to delete records.

Revision: 0010
Follows: 0009
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    if op.get_bind().dialect.name != "postgresql":
        return
    op.execute(
        sa.text(
            r"""
DO $make$ BEGIN EXECUTE format($text$
CREATE OR REPLACE FUNCTION audit_prune(of_shard integer, below bigint, stands_from bigint) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = %I, pg_temp AS $body$
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
$text$, current_schema()); END $make$
"""
        )
    )
    op.execute("REVOKE ALL ON FUNCTION audit_prune(integer, bigint, bigint) FROM PUBLIC")


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP FUNCTION audit_prune(integer, bigint, bigint)")
