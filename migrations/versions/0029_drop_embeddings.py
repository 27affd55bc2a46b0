"""Embeddings of a checkpoint that is gone can be dropped by those who may make them.

Revision 0029, after 0028.
"""

from __future__ import annotations

from alembic import op

from migrations.roles import role

revision = "0029"
down_revision = "0028"
branch_labels = None
depends_on = None

# Making a partition takes the same lock on the same number, so that none is dropped while it is filled.
DROP_PARTITION = """
CREATE FUNCTION model.drop_embedding_partition(checkpoint_id integer) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    part text := 'embedding_' || $1;
BEGIN
    PERFORM pg_advisory_xact_lock(4210002, $1);
    IF EXISTS (SELECT FROM model.checkpoint c WHERE c.checkpoint_id = $1) THEN
        RAISE EXCEPTION 'Checkpoint % is there still, and its embeddings with it.', $1
            USING ERRCODE = 'object_in_use';
    END IF;
    IF to_regclass('model.' || part) IS NULL THEN
        RETURN false;
    END IF;
    EXECUTE format('DROP TABLE model.%I', part);
    RETURN true;
END $$
"""


def upgrade() -> None:
    op.execute(DROP_PARTITION)
    op.execute(
        "COMMENT ON FUNCTION model.drop_embedding_partition IS "
        "'Drop the partition of embeddings of a checkpoint that is gone; whether there was one'"
    )
    op.execute("REVOKE EXECUTE ON FUNCTION model.drop_embedding_partition FROM PUBLIC")
    op.execute(f"GRANT EXECUTE ON FUNCTION model.drop_embedding_partition TO {role('worker')}")


def downgrade() -> None:
    op.execute("DROP FUNCTION model.drop_embedding_partition")
