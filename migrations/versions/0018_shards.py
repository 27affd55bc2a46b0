"""Label sets that several jobs make together; no index of arrays that nobody asks; tasks weighed, by name.

Revision 0018, after 0017.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import ARRAY

from migrations.roles import role

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

TASK_CHOICE = """
SELECT s.task_set_id, s.name AS task_set, s.version, c.rank, coalesce(k.concept_name, t.title) AS name, c.concept_id,
       k.vocabulary_id || '/' || k.concept_code AS code, c.persons / p.train::float8 AS prevalence,
       c.base_persons / p.train::float8 AS base_prevalence, c.num_train_events,
       c.num_train_events / p.train::float8 AS event_rate, c.entropy, c.verdict, t.position
FROM label.task_set s
JOIN label.task_candidate c USING (task_set_id)
CROSS JOIN LATERAL (SELECT nullif((s.definition ->> 'train_persons')::int, 0) AS train) p
LEFT JOIN omop.concept k ON k.concept_id = c.concept_id
LEFT JOIN label.task t ON t.task_set_id = s.task_set_id AND t.concept_id = c.concept_id
"""
TASK_CHOICE_COMMENTS = {
    "task_set_id": "Set",
    "task_set": "Set, by its name",
    "version": "Its version",
    "rank": "Order by score, most informative first, ties by concept_id",
    "name": "Name of the concept, where the vocabulary has it",
    "concept_id": "Concept",
    "code": "VOCABULARY/CODE of the concept",
    "prevalence": "Share of the train persons who ever have it or a descendant",
    "base_prevalence": "The same of its rarest parent; 1 where it has none",
    "num_train_events": "Train persons who have it between an index and the end of follow-up",
    "event_rate": "Their share of the train persons",
    "entropy": "Score: base · (q ln q + (1-q) ln(1-q)), q = prevalence / base_prevalence",
    "verdict": "chosen; or why not: too_few_events, beyond_size or banned",
    "position": "Position of the task in the set, where chosen",
}


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


def create_view() -> None:
    """Concepts weighed as tasks, with their names and shares."""
    op.execute(f"CREATE VIEW label.task_choice AS {TASK_CHOICE}")
    op.execute(
        "COMMENT ON VIEW label.task_choice IS 'Concepts weighed as pretraining tasks, by name, with the verdict'"
    )
    for column, meaning in TASK_CHOICE_COMMENTS.items():
        op.execute(f"COMMENT ON COLUMN label.task_choice.{column} IS '{meaning}'")
    op.execute(f"GRANT SELECT ON label.task_choice TO {role('api')}, {role('reader')}, {role('worker')}")


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
    create_view()
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
    op.execute("DROP VIEW label.task_choice")
    op.drop_table("shard_tte", schema="label")
    op.drop_table("shard", schema="label")
    for column, (before, _) in COMMENTS.items():
        op.execute(f"COMMENT ON COLUMN ops.job.{column} IS '{before}'")
    op.execute(f"COMMENT ON COLUMN ops.job_attempt.outcome IS '{OUTCOMES[0]}'")
    op.drop_index("ix_job_shard", "job", schema="ops")
    op.execute(f"REVOKE SELECT (shard) ON ops.job FROM {role('api')}, {role('reader')}")
    op.drop_column("job", "shard", schema="ops")
    op.create_index("ix_tte_event_tasks", "tte", ["event_tasks"], schema="label", postgresql_using="gin")
