"""Label sets that several jobs make together; no index of arrays that nobody asks.

Revision 0018, after 0017.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import context, op
from sqlalchemy.dialects.postgresql import ARRAY

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None

WRITES = "SELECT, INSERT, UPDATE, DELETE"
ARRAYS = {
    "event_tasks": sa.SmallInteger(),
    "event_seconds": sa.BigInteger(),
    "prior_tasks": sa.SmallInteger(),
    "ineligible_tasks": sa.SmallInteger(),
    "window_tasks": sa.SmallInteger(),
    "window_seconds": sa.BigInteger(),
    "visit_tasks": sa.SmallInteger(),
}

# The parent's row is locked before its shards are looked at: of two that end at once, the later sees both ended.
END_OF_JOB = """
CREATE FUNCTION ops.note_end_of_shards() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF NEW.shard IS NULL THEN
        DELETE FROM label.shard WHERE job_id = NEW.job_id;
        RETURN NULL;
    END IF;
    PERFORM FROM ops.job WHERE job_id = NEW.parent_job_id FOR NO KEY UPDATE;
    UPDATE ops.job p SET run_after = clock_timestamp()
    WHERE p.job_id = NEW.parent_job_id AND p.state = 'retry_wait' AND (NEW.state <> 'succeeded' OR NOT EXISTS (
        SELECT FROM ops.job s WHERE s.parent_job_id = NEW.parent_job_id AND s.shard IS NOT NULL
        AND s.state IN ('queued', 'running', 'retry_wait')));
    RETURN NULL;
END $$
"""
TRIGGER = """
CREATE TRIGGER note_end_of_shards AFTER UPDATE OF state ON ops.job FOR EACH ROW
WHEN (OLD.state IS DISTINCT FROM NEW.state AND NEW.state IN ('succeeded', 'failed', 'cancelled', 'dead')
      AND (NEW.shard IS NOT NULL OR NEW.kind = 'label'))
EXECUTE FUNCTION ops.note_end_of_shards()
"""

COMMENTS = {
    "parent_job_id": ("Job that queued it (demo, run)", "Job that queued it (demo, run, or the one it is a shard of)"),
}
OUTCOMES = (
    "succeeded, failed, cancelled, preempted, crashed or lost",
    "succeeded, failed, cancelled, preempted, waiting, crashed or lost",
)


def role(name: str) -> str:
    """A role of ours under the prefix in use."""
    return f"{context.config.attributes.get('role_prefix', 'lachesis')}_{name}"


def create_tables() -> None:
    """Where shards keep their labels until all are there."""
    op.create_table(
        "shard",
        sa.Column("job_id", sa.BigInteger(), nullable=False, comment="Job that makes the set"),
        sa.Column("shard", sa.SmallInteger(), autoincrement=False, nullable=False, comment="Which share, from 0"),
        sa.Column("data_digest", sa.LargeBinary(), nullable=False, comment="sha256 over what its labels were made of"),
        sa.Column(
            "counts",
            sa.LargeBinary(),
            nullable=False,
            comment="Members, persons and seconds at risk by split, status and task, as the engine counts",
        ),
        sa.ForeignKeyConstraint(["job_id"], ["ops.job.job_id"], name=op.f("fk_shard_job_id_job"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "shard", name=op.f("pk_shard")),
        schema="label",
        comment="Shares of label sets that are being made by several jobs; gone when the set is stored.",
    )
    op.create_table(
        "shard_tte",
        sa.Column("job_id", sa.BigInteger(), autoincrement=False, nullable=False, comment="Job that makes the set"),
        sa.Column("shard", sa.SmallInteger(), autoincrement=False, nullable=False, comment="Which share"),
        sa.Column("cohort_member_id", sa.BigInteger(), autoincrement=False, nullable=False, comment="Member"),
        sa.Column("digest", sa.LargeBinary(), nullable=False, comment="sha256 over the scan and the arrays"),
        *(sa.Column(name, ARRAY(kind), nullable=False, comment="As in label.tte") for name, kind in ARRAYS.items()),
        *(
            sa.Column(name, sa.BigInteger(), nullable=True, comment="As in label.tte")
            for name in ("follow_up_seconds", "data_cut_seconds", "death_seconds")
        ),
        sa.ForeignKeyConstraint(
            ["job_id", "shard"],
            ["label.shard.job_id", "label.shard.shard"],
            name="fk_shard_tte_shard",
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("job_id", "shard", "cohort_member_id", name=op.f("pk_shard_tte")),
        schema="label",
        comment="Labels of shares, as label.tte will hold them; nobody reads them.",
    )
    for column in ("event_tasks", "event_seconds", "prior_tasks", "visit_tasks"):
        op.execute(f"ALTER TABLE label.shard_tte ALTER {column} SET STORAGE EXTERNAL")
    op.execute(f"GRANT {WRITES} ON label.shard, label.shard_tte TO {role('worker')}")


def upgrade() -> None:
    op.drop_index("ix_tte_event_tasks", "tte", schema="label")
    op.add_column(
        "job",
        sa.Column(
            "shard",
            sa.SmallInteger(),
            nullable=True,
            comment="Which share of its parent's work it is; null for work of its own",
        ),
        schema="ops",
    )
    op.create_index(
        "ix_job_shard", "job", ["parent_job_id", "shard"], schema="ops", postgresql_where=sa.text("shard IS NOT NULL")
    )
    op.execute(f"GRANT SELECT (shard) ON ops.job TO {role('api')}, {role('reader')}")
    for column, (_, now) in COMMENTS.items():
        op.execute(f"COMMENT ON COLUMN ops.job.{column} IS '{now}'")
    op.execute(f"COMMENT ON COLUMN ops.job_attempt.outcome IS '{OUTCOMES[1]}'")
    create_tables()
    op.execute(END_OF_JOB)
    op.execute(
        "COMMENT ON FUNCTION ops.note_end_of_shards IS "
        "'Wakes a job when its last shard has ended; forgets the shares of a job that has ended'"
    )
    op.execute("REVOKE EXECUTE ON FUNCTION ops.note_end_of_shards FROM PUBLIC")
    op.execute(TRIGGER)


def downgrade() -> None:
    op.execute("DROP TRIGGER note_end_of_shards ON ops.job")
    op.execute("DROP FUNCTION ops.note_end_of_shards")
    op.drop_table("shard_tte", schema="label")
    op.drop_table("shard", schema="label")
    for column, (before, _) in COMMENTS.items():
        op.execute(f"COMMENT ON COLUMN ops.job.{column} IS '{before}'")
    op.execute(f"COMMENT ON COLUMN ops.job_attempt.outcome IS '{OUTCOMES[0]}'")
    op.drop_index("ix_job_shard", "job", schema="ops")
    op.execute(f"REVOKE SELECT (shard) ON ops.job FROM {role('api')}, {role('reader')}")
    op.drop_column("job", "shard", schema="ops")
    op.create_index("ix_tte_event_tasks", "tte", ["event_tasks"], schema="label", postgresql_using="gin")
