"""How it got there: jobs, workers, schedules, sources, loads and rejects.

Revision 0001, after None.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

TABLES = (
    "schedule",
    "source",
    "worker",
    "job",
    "load",
    "job_attempt",
    "job_event",
    "job_log",
    "job_progress",
    "reject",
    "training_step",
)


def upgrade() -> None:
    op.execute("CREATE EXTENSION IF NOT EXISTS vector")
    op.execute("CREATE SCHEMA IF NOT EXISTS ops")
    op.execute("COMMENT ON TABLE ops.alembic_version IS 'Version of this schema'")
    op.execute("COMMENT ON COLUMN ops.alembic_version.version_num IS 'Newest revision of migrations/ that was applied'")

    op.create_table(
        "schedule",
        sa.Column("schedule_id", sa.Integer(), sa.Identity(always=False), nullable=False, comment="Key"),
        sa.Column("name", sa.Text(), nullable=False, comment="Name"),
        sa.Column("cron", sa.Text(), nullable=False, comment="Cron expression"),
        sa.Column("timezone", sa.Text(), server_default=sa.text("'UTC'"), nullable=False, comment="Its time zone"),
        sa.Column("kind", sa.Text(), nullable=False, comment="Stage or pipeline"),
        sa.Column(
            "args",
            postgresql.JSONB(astext_type=sa.Text()),
            server_default=sa.text("'{}'"),
            nullable=False,
            comment="Arguments",
        ),
        sa.Column(
            "policy",
            sa.Text(),
            server_default=sa.text("'skip'"),
            nullable=False,
            comment="For missed occurrences: skip or latest",
        ),
        sa.Column("enabled", sa.Boolean(), server_default=sa.text("true"), nullable=False, comment="On or off"),
        sa.Column(
            "created_at",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
            comment="When",
        ),
        sa.PrimaryKeyConstraint("schedule_id", name=op.f("pk_schedule")),
        sa.UniqueConstraint("name", name=op.f("uq_schedule_name")),
        schema="ops",
        comment="Standing orders; an occurrence runs at most once.",
    )
    op.create_table(
        "source",
        sa.Column("source_id", sa.Integer(), sa.Identity(always=False), nullable=False, comment="Key"),
        sa.Column("name", sa.Text(), nullable=False, comment="Name (--source)"),
        sa.Column("data_cut", sa.Date(), nullable=True, comment="Last day of its data, where known"),
        sa.Column("data_cut_source", sa.Text(), nullable=True, comment="option or cdm_source"),
        sa.Column(
            "simulated",
            sa.Boolean(),
            server_default=sa.text("false"),
            nullable=False,
            comment="True for simulated data; said on every page",
        ),
        sa.Column(
            "arbitrary_pairing",
            sa.Boolean(),
            server_default=sa.text("false"),
            nullable=False,
            comment="True where scans were paired with persons arbitrarily",
        ),
        sa.Column(
            "details",
            postgresql.JSONB(astext_type=sa.Text()),
            server_default=sa.text("'{}'"),
            nullable=False,
            comment="cdm_source's row and the like",
        ),
        sa.Column(
            "created_at",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
            comment="When",
        ),
        sa.PrimaryKeyConstraint("source_id", name=op.f("pk_source")),
        sa.UniqueConstraint("name", name=op.f("uq_source_name")),
        schema="ops",
        comment="Where extracts come from; a snapshot replaces what its source loaded before.",
    )
    op.create_table(
        "worker",
        sa.Column("worker_id", sa.Text(), nullable=False, comment="host:pid:start"),
        sa.Column("host", sa.Text(), nullable=False, comment="Host"),
        sa.Column("pid", sa.Integer(), nullable=False, comment="Process"),
        sa.Column("queues", postgresql.ARRAY(sa.Text()), nullable=False, comment="Queues it serves"),
        sa.Column(
            "started_at",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
            comment="Since",
        ),
        sa.Column(
            "heartbeat_at",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
            comment="Last sign of life",
        ),
        sa.Column("stopped_at", postgresql.TIMESTAMP(timezone=True), nullable=True, comment="Stopped in order"),
        sa.Column("code_version", sa.Text(), nullable=False, comment="Version of Lachesis"),
        sa.Column("device", sa.Text(), nullable=True, comment="Device, e.g. cpu or the GPU's name"),
        sa.PrimaryKeyConstraint("worker_id", name=op.f("pk_worker")),
        schema="ops",
        comment="Workers and their last sign of life.",
    )
    op.create_table(
        "job",
        sa.Column("job_id", sa.BigInteger(), sa.Identity(always=False), nullable=False, comment="Key"),
        sa.Column(
            "kind",
            sa.Text(),
            nullable=False,
            comment="Stage: load, cohort, tasks, label, pretrain, embed, evaluate, report, …",
        ),
        sa.Column("queue", sa.Text(), nullable=False, comment="load, label, gpu or eval"),
        sa.Column("name", sa.Text(), nullable=True, comment="Name of what it makes"),
        sa.Column(
            "args",
            postgresql.JSONB(astext_type=sa.Text()),
            server_default=sa.text("'{}'"),
            nullable=False,
            comment="Arguments of the stage",
        ),
        sa.Column(
            "result",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=True,
            comment="What the stage returned: ids and counts",
        ),
        sa.Column(
            "state",
            sa.Text(),
            server_default=sa.text("'queued'"),
            nullable=False,
            comment="queued, running, retry_wait, succeeded, failed, cancelled or dead",
        ),
        sa.Column(
            "priority", sa.SmallInteger(), server_default=sa.text("100"), nullable=False, comment="Smaller goes first"
        ),
        sa.Column(
            "run_after",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
            comment="Not before",
        ),
        sa.Column("attempt", sa.Integer(), server_default=sa.text("0"), nullable=False, comment="Claims so far"),
        sa.Column(
            "crash_count",
            sa.Integer(),
            server_default=sa.text("0"),
            nullable=False,
            comment="Attempts that ended without a word",
        ),
        sa.Column(
            "max_attempts", sa.Integer(), server_default=sa.text("10"), nullable=False, comment="Claims at the most"
        ),
        sa.Column(
            "fence",
            sa.BigInteger(),
            server_default=sa.text("0"),
            nullable=False,
            comment="Token of the newest claim; older ones may write nothing",
        ),
        sa.Column("worker_id", sa.Text(), nullable=True, comment="Who holds it"),
        sa.Column(
            "lease_until", postgresql.TIMESTAMP(timezone=True), nullable=True, comment="Free for others after this"
        ),
        sa.Column("heartbeat_at", postgresql.TIMESTAMP(timezone=True), nullable=True, comment="Last sign of life"),
        sa.Column("progress_at", postgresql.TIMESTAMP(timezone=True), nullable=True, comment="Last sign of work"),
        sa.Column("deadline_at", postgresql.TIMESTAMP(timezone=True), nullable=True, comment="To be stopped at"),
        sa.Column(
            "cancel_requested_at", postgresql.TIMESTAMP(timezone=True), nullable=True, comment="Cancel asked for"
        ),
        sa.Column("dedupe_key", sa.Text(), nullable=True, comment="At most one open job a key"),
        sa.Column("error_class", sa.Text(), nullable=True, comment="Class of the error that ended it"),
        sa.Column("error_message", sa.Text(), nullable=True, comment="The error, one sentence"),
        sa.Column("exit_code", sa.SmallInteger(), nullable=True, comment="What the command line returns: 0, 1, 2 or 3"),
        sa.Column("code_version", sa.Text(), nullable=True, comment="Version of Lachesis that claimed it"),
        sa.Column("created_by", sa.Text(), nullable=True, comment="Operating-system user or token name"),
        sa.Column(
            "created_at",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
            comment="When",
        ),
        sa.Column(
            "published_at", postgresql.TIMESTAMP(timezone=True), nullable=True, comment="Last nudge through Redis"
        ),
        sa.Column("started_at", postgresql.TIMESTAMP(timezone=True), nullable=True, comment="First claim"),
        sa.Column("finished_at", postgresql.TIMESTAMP(timezone=True), nullable=True, comment="End"),
        sa.Column("parent_job_id", sa.BigInteger(), nullable=True, comment="Job that queued it (demo, run)"),
        sa.Column("schedule_id", sa.Integer(), nullable=True, comment="Schedule that queued it"),
        sa.Column("scheduled_for", postgresql.TIMESTAMP(timezone=True), nullable=True, comment="For which occurrence"),
        sa.CheckConstraint(
            "state IN ('queued', 'running', 'retry_wait', 'succeeded', 'failed', 'cancelled', 'dead')",
            name=op.f("ck_job_state"),
        ),
        sa.ForeignKeyConstraint(
            ["schedule_id"], ["ops.schedule.schedule_id"], name=op.f("fk_job_schedule_id_schedule")
        ),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_job")),
        sa.UniqueConstraint("schedule_id", "scheduled_for", name=op.f("uq_job_schedule_id_scheduled_for")),
        schema="ops",
        comment="Every stage is a job: what was asked for, who holds it, how it ended.",
    )
    op.create_index(
        "ix_job_queue_ready",
        "job",
        ["queue", "priority", "job_id"],
        unique=False,
        schema="ops",
        postgresql_where=sa.text("state IN ('queued', 'retry_wait', 'running')"),
    )
    op.create_index(
        "uq_job_dedupe_key",
        "job",
        ["dedupe_key"],
        unique=True,
        schema="ops",
        postgresql_where=sa.text("state IN ('queued', 'running', 'retry_wait')"),
    )
    op.create_table(
        "load",
        sa.Column("load_id", sa.Integer(), sa.Identity(always=False), nullable=False, comment="Key"),
        sa.Column("source_id", sa.Integer(), nullable=False, comment="Source"),
        sa.Column("job_id", sa.BigInteger(), nullable=True, comment="The job; groups the tables of a delivery"),
        sa.Column("kind", sa.Text(), nullable=False, comment="omop, vocabulary, images, …"),
        sa.Column("mode", sa.Text(), nullable=False, comment="snapshot, append or upsert"),
        sa.Column("table_name", sa.Text(), nullable=False, comment="Table of the extract, e.g. condition_occurrence"),
        sa.Column(
            "state",
            sa.Text(),
            nullable=False,
            comment="published while its rows are the ones seen, superseded afterwards",
        ),
        sa.Column(
            "files",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=False,
            comment="[{name, sha256, bytes, records, dialect}]",
        ),
        sa.Column("content_sha256", sa.LargeBinary(), nullable=False, comment="Digest over the files' digests"),
        sa.Column("num_read", sa.BigInteger(), nullable=False, comment="Records read"),
        sa.Column("num_loaded", sa.BigInteger(), nullable=False, comment="Rows loaded"),
        sa.Column("num_rejected", sa.BigInteger(), nullable=False, comment="Rows rejected"),
        sa.Column(
            "rejects_by_rule",
            postgresql.JSONB(astext_type=sa.Text()),
            server_default=sa.text("'{}'"),
            nullable=False,
            comment="Rejected rows by rule",
        ),
        sa.Column(
            "flags_by_rule",
            postgresql.JSONB(astext_type=sa.Text()),
            server_default=sa.text("'{}'"),
            nullable=False,
            comment="Loaded, but remarkable, by rule",
        ),
        sa.Column("first_time", postgresql.TIMESTAMP(), nullable=True, comment="Earliest event"),
        sa.Column("last_time", postgresql.TIMESTAMP(), nullable=True, comment="Latest event"),
        sa.Column("partition_name", sa.Text(), nullable=True, comment="Partition of omop.event that holds its rows"),
        sa.Column(
            "created_at",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
            comment="When",
        ),
        sa.Column(
            "superseded_at", postgresql.TIMESTAMP(timezone=True), nullable=True, comment="When its rows were replaced"
        ),
        sa.CheckConstraint("state IN ('published', 'superseded')", name=op.f("ck_load_state")),
        sa.CheckConstraint("num_read = num_loaded + num_rejected", name=op.f("ck_load_counts")),
        sa.ForeignKeyConstraint(["source_id"], ["ops.source.source_id"], name=op.f("fk_load_source_id_source")),
        sa.PrimaryKeyConstraint("load_id", name=op.f("pk_load")),
        schema="ops",
        comment="One table of a delivery: files, counts (read = loaded + rejected), flags by rule.",
    )
    op.create_index(op.f("ix_load_job_id"), "load", ["job_id"], unique=False, schema="ops")
    op.create_index(
        "ix_load_published",
        "load",
        ["source_id", "table_name"],
        unique=False,
        schema="ops",
        postgresql_where=sa.text("state = 'published'"),
    )
    op.create_table(
        "job_attempt",
        sa.Column("job_id", sa.BigInteger(), nullable=False, comment="Job"),
        sa.Column("fence", sa.BigInteger(), autoincrement=False, nullable=False, comment="Its fence"),
        sa.Column("worker_id", sa.Text(), nullable=False, comment="Worker"),
        sa.Column("host", sa.Text(), nullable=False, comment="Host"),
        sa.Column("pid", sa.Integer(), nullable=False, comment="Process that did the work"),
        sa.Column(
            "started_at",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
            comment="Claimed",
        ),
        sa.Column("finished_at", postgresql.TIMESTAMP(timezone=True), nullable=True, comment="Ended"),
        sa.Column(
            "outcome", sa.Text(), nullable=True, comment="succeeded, failed, cancelled, preempted, crashed or lost"
        ),
        sa.Column("exit_code", sa.Integer(), nullable=True, comment="Exit code of a child process"),
        sa.Column("signal", sa.Integer(), nullable=True, comment="Signal that ended it"),
        sa.Column("start_step", sa.BigInteger(), nullable=True, comment="Step a resumed training started at"),
        sa.Column("peak_rss_bytes", sa.BigInteger(), nullable=True, comment="Largest memory"),
        sa.Column("error_message", sa.Text(), nullable=True, comment="The error, one sentence"),
        sa.ForeignKeyConstraint(
            ["job_id"], ["ops.job.job_id"], name=op.f("fk_job_attempt_job_id_job"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "fence", name=op.f("pk_job_attempt")),
        schema="ops",
        comment="Each claim of a job: where it ran and how it ended.",
    )
    op.create_table(
        "job_event",
        sa.Column("job_event_id", sa.BigInteger(), sa.Identity(always=False), nullable=False, comment="Key"),
        sa.Column("job_id", sa.BigInteger(), nullable=False, comment="Job"),
        sa.Column(
            "at",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
            comment="When",
        ),
        sa.Column("from_state", sa.Text(), nullable=True, comment="From"),
        sa.Column("to_state", sa.Text(), nullable=False, comment="To"),
        sa.Column("fence", sa.BigInteger(), nullable=False, comment="Fence then"),
        sa.Column("detail", sa.Text(), nullable=True, comment="Why"),
        sa.ForeignKeyConstraint(
            ["job_id"], ["ops.job.job_id"], name=op.f("fk_job_event_job_id_job"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_event_id", name=op.f("pk_job_event")),
        schema="ops",
        comment="Every change of a job's state, appended by a trigger.",
    )
    op.create_index(op.f("ix_job_event_job_id"), "job_event", ["job_id"], unique=False, schema="ops")
    op.create_table(
        "job_log",
        sa.Column("job_log_id", sa.BigInteger(), sa.Identity(always=False), nullable=False, comment="Key"),
        sa.Column("job_id", sa.BigInteger(), nullable=False, comment="Job"),
        sa.Column("fence", sa.BigInteger(), nullable=False, comment="Attempt"),
        sa.Column(
            "at",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
            comment="When",
        ),
        sa.Column(
            "level", sa.Text(), server_default=sa.text("'info'"), nullable=False, comment="info, warning or error"
        ),
        sa.Column("message", sa.Text(), nullable=False, comment="The line"),
        sa.ForeignKeyConstraint(["job_id"], ["ops.job.job_id"], name=op.f("fk_job_log_job_id_job"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_log_id", name=op.f("pk_job_log")),
        schema="ops",
        comment="What stages said; read with lachesis logs.",
    )
    op.create_index(
        op.f("ix_job_log_job_id_job_log_id"), "job_log", ["job_id", "job_log_id"], unique=False, schema="ops"
    )
    op.create_table(
        "job_progress",
        sa.Column("job_id", sa.BigInteger(), nullable=False, comment="Job"),
        sa.Column("done", sa.BigInteger(), nullable=False, comment="Done"),
        sa.Column("total", sa.BigInteger(), nullable=True, comment="Of"),
        sa.Column("unit", sa.Text(), server_default=sa.text("''"), nullable=False, comment="What is counted"),
        sa.Column("note", sa.Text(), server_default=sa.text("''"), nullable=False, comment="What is being done"),
        sa.Column(
            "since",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
            comment="Start of this count",
        ),
        sa.Column(
            "updated_at",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
            comment="When",
        ),
        sa.ForeignKeyConstraint(
            ["job_id"], ["ops.job.job_id"], name=op.f("fk_job_progress_job_id_job"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_job_progress")),
        schema="ops",
        comment="How far each job is; one narrow row each, overwritten.",
    )
    op.create_table(
        "reject",
        sa.Column("reject_id", sa.BigInteger(), sa.Identity(always=False), nullable=False, comment="Key"),
        sa.Column("load_id", sa.Integer(), nullable=True, comment="Load; null where the delivery stopped"),
        sa.Column("job_id", sa.BigInteger(), nullable=True, comment="The job"),
        sa.Column("table_name", sa.Text(), nullable=False, comment="Table"),
        sa.Column("file", sa.Text(), nullable=False, comment="File name"),
        sa.Column(
            "record", sa.BigInteger(), nullable=True, comment="Record number in the file, from 1, header not counted"
        ),
        sa.Column("rule", sa.Text(), nullable=False, comment="Rule it broke"),
        sa.Column(
            "row_key", sa.Text(), nullable=True, comment="Primary key of the row, where it is readable as a number"
        ),
        sa.Column("column_name", sa.Text(), nullable=True, comment="Column"),
        sa.ForeignKeyConstraint(
            ["load_id"], ["ops.load.load_id"], name=op.f("fk_reject_load_id_load"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("reject_id", name=op.f("pk_reject")),
        schema="ops",
        comment="Rows not loaded: where, which rule; never a value.",
    )
    op.create_index(op.f("ix_reject_job_id"), "reject", ["job_id"], unique=False, schema="ops")
    op.create_index(op.f("ix_reject_load_id"), "reject", ["load_id"], unique=False, schema="ops")
    op.create_table(
        "training_step",
        sa.Column("job_id", sa.BigInteger(), nullable=False, comment="Job"),
        sa.Column("step", sa.BigInteger(), autoincrement=False, nullable=False, comment="Optimiser step"),
        sa.Column(
            "name",
            sa.Text(),
            nullable=False,
            comment="train_loss, tuning_loss, tuning_gain, learning_rate, volumes_per_second",
        ),
        sa.Column("epoch", sa.Integer(), nullable=False, comment="Epoch"),
        sa.Column("value", sa.Float(), nullable=False, comment="Value; losses in nats per event"),
        sa.Column(
            "at",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
            comment="When",
        ),
        sa.ForeignKeyConstraint(
            ["job_id"], ["ops.job.job_id"], name=op.f("fk_training_step_job_id_job"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "step", "name", name=op.f("pk_training_step")),
        schema="ops",
        comment="Loss curves of pretraining, one row a reported step.",
    )


def downgrade() -> None:
    # the schema stays: it holds the version table; the extension may serve others
    for table in reversed(TABLES):
        op.drop_table(table, schema="ops")
