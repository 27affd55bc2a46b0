"""How it got there: jobs and their attempts, workers, schedules, sources, loads and rejects."""

from __future__ import annotations

import datetime as dt
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Computed,
    Date,
    Float,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    SmallInteger,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import Mapped

from app.schema.base import MOMENT, NAIVE, NOW, Base, column

STATES = ("queued", "running", "retry_wait", "succeeded", "failed", "cancelled", "dead")
_STATES = ", ".join(f"'{state}'" for state in STATES)
_DEVICES = (  # as Postgres writes it, so that drift is seen
    "CASE WHEN (kind = ANY (ARRAY['pretrain'::text, 'embed'::text])) "
    "THEN (COALESCE(((args ->> 'gpus'::text))::smallint, (1)::smallint))::integer ELSE 0 END"
)


class Job(Base):
    """A request with a life."""

    __tablename__ = "job"
    __table_args__ = (
        CheckConstraint(f"state IN ({_STATES})", name="state"),
        Index(
            "ix_job_queue_ready",
            "queue",
            "priority",
            "job_id",
            postgresql_where=text("state IN ('queued', 'retry_wait', 'running')"),
        ),
        Index("ix_job_shard", "parent_job_id", "shard", postgresql_where=text("shard IS NOT NULL")),
        Index(
            "uq_job_dedupe_key",
            "dedupe_key",
            unique=True,
            postgresql_where=text("state IN ('queued', 'running', 'retry_wait')"),
        ),
        UniqueConstraint("schedule_id", "scheduled_for"),
        {
            "schema": "ops",
            "comment": "Every stage is a job: what was asked for, who holds it, how it ended.",
        },
    )

    job_id: Mapped[int] = column("Key", BigInteger, Identity(), primary_key=True)
    kind: Mapped[str] = column("Stage: load, cohort, tasks, label, pretrain, embed, evaluate, report, …", Text)
    queue: Mapped[str] = column("load, label, gpu or eval", Text)
    name: Mapped[str | None] = column("Name of what it makes", Text)
    args: Mapped[dict[str, Any]] = column("Arguments of the stage", JSONB, server_default=text("'{}'"))
    result: Mapped[dict[str, Any] | None] = column("What the stage returned: ids and counts", JSONB)
    state: Mapped[str] = column(
        "queued, running, retry_wait, succeeded, failed, cancelled or dead", Text, server_default=text("'queued'")
    )
    priority: Mapped[int] = column("Smaller goes first", SmallInteger, server_default=text("100"))
    run_after: Mapped[dt.datetime] = column("Not before", MOMENT, server_default=NOW)
    attempt: Mapped[int] = column("Claims so far", Integer, server_default=text("0"))
    crash_count: Mapped[int] = column("Attempts that ended without a word", Integer, server_default=text("0"))
    max_attempts: Mapped[int] = column("Claims at the most", Integer, server_default=text("10"))
    fence: Mapped[int] = column(
        "Token of the newest claim; older ones may write nothing", BigInteger, server_default=text("0")
    )
    worker_id: Mapped[str | None] = column("Who holds it", Text)
    lease_until: Mapped[dt.datetime | None] = column("Free for others after this", MOMENT)
    heartbeat_at: Mapped[dt.datetime | None] = column("Last sign of life", MOMENT)
    progress_at: Mapped[dt.datetime | None] = column("Last sign of work", MOMENT)
    deadline_at: Mapped[dt.datetime | None] = column("To be stopped at", MOMENT)
    cancel_requested_at: Mapped[dt.datetime | None] = column("Cancel asked for", MOMENT)
    dedupe_key: Mapped[str | None] = column("At most one open job a key", Text)
    error_class: Mapped[str | None] = column("Class of the error that ended it", Text)
    error_message: Mapped[str | None] = column("The error, one sentence", Text)
    exit_code: Mapped[int | None] = column("What the command line returns: 0, 1, 2 or 3", SmallInteger)
    code_version: Mapped[str | None] = column("Version of Lachesis that claimed it", Text)
    created_by: Mapped[str | None] = column("Operating-system user or token name", Text)
    created_at: Mapped[dt.datetime] = column("When", MOMENT, server_default=NOW)
    published_at: Mapped[dt.datetime | None] = column("Last nudge through Redis", MOMENT)
    started_at: Mapped[dt.datetime | None] = column("First claim", MOMENT)
    finished_at: Mapped[dt.datetime | None] = column("End", MOMENT)
    parent_job_id: Mapped[int | None] = column(
        "Job that queued it (demo, run, or the one it is a shard of)", BigInteger
    )
    shard: Mapped[int | None] = column("Which share of its parent's work it is; null for work of its own", SmallInteger)
    schedule_id: Mapped[int | None] = column("Schedule that queued it", ForeignKey("ops.schedule.schedule_id"))
    scheduled_for: Mapped[dt.datetime | None] = column("For which occurrence", MOMENT)
    num_devices: Mapped[int] = column(
        "Devices of one host that it needs at once", SmallInteger, Computed(_DEVICES, persisted=True)
    )


class JobAttempt(Base):
    """One claim of a job."""

    __tablename__ = "job_attempt"
    __table_args__ = {"schema": "ops", "comment": "Each claim of a job: where it ran and how it ended."}

    job_id: Mapped[int] = column("Job", ForeignKey("ops.job.job_id", ondelete="CASCADE"), primary_key=True)
    fence: Mapped[int] = column("Its fence", BigInteger, primary_key=True, autoincrement=False)
    worker_id: Mapped[str] = column("Worker", Text)
    host: Mapped[str] = column("Host", Text)
    pid: Mapped[int] = column("Process that did the work", Integer)
    started_at: Mapped[dt.datetime] = column("Claimed", MOMENT, server_default=NOW)
    finished_at: Mapped[dt.datetime | None] = column("Ended", MOMENT)
    outcome: Mapped[str | None] = column("succeeded, failed, cancelled, preempted, waiting, crashed or lost", Text)
    exit_code: Mapped[int | None] = column("Exit code of a child process", Integer)
    signal: Mapped[int | None] = column("Signal that ended it", Integer)
    start_step: Mapped[int | None] = column("Step a resumed training started at", BigInteger)
    peak_rss_bytes: Mapped[int | None] = column("Largest memory", BigInteger)
    error_message: Mapped[str | None] = column("The error, one sentence", Text)
    devices: Mapped[list[str] | None] = column("Devices of the host that are its alone while it runs", ARRAY(Text))


class JobProgress(Base):
    """How far a job is."""

    __tablename__ = "job_progress"
    __table_args__ = {"schema": "ops", "comment": "How far each job is; one narrow row each, overwritten."}

    job_id: Mapped[int] = column("Job", ForeignKey("ops.job.job_id", ondelete="CASCADE"), primary_key=True)
    done: Mapped[int] = column("Done", BigInteger)
    total: Mapped[int | None] = column("Of", BigInteger)
    unit: Mapped[str] = column("What is counted", Text, server_default=text("''"))
    note: Mapped[str] = column("What is being done", Text, server_default=text("''"))
    since: Mapped[dt.datetime] = column("Start of this count", MOMENT, server_default=NOW)
    updated_at: Mapped[dt.datetime] = column("When", MOMENT, server_default=NOW)


class JobEvent(Base):
    """A change of a job's state."""

    __tablename__ = "job_event"
    __table_args__ = (
        Index(None, "job_id"),
        {"schema": "ops", "comment": "Every change of a job's state, appended by a trigger."},
    )

    job_event_id: Mapped[int] = column("Key", BigInteger, Identity(), primary_key=True)
    job_id: Mapped[int] = column("Job", ForeignKey("ops.job.job_id", ondelete="CASCADE"))
    at: Mapped[dt.datetime] = column("When", MOMENT, server_default=NOW)
    from_state: Mapped[str | None] = column("From", Text)
    to_state: Mapped[str] = column("To", Text)
    fence: Mapped[int] = column("Fence then", BigInteger)
    detail: Mapped[str | None] = column("Why", Text)


class JobLog(Base):
    """A line a stage wrote."""

    __tablename__ = "job_log"
    __table_args__ = (
        Index(None, "job_id", "job_log_id"),
        {"schema": "ops", "comment": "What stages said; read with lachesis logs."},
    )

    job_log_id: Mapped[int] = column("Key", BigInteger, Identity(), primary_key=True)
    job_id: Mapped[int] = column("Job", ForeignKey("ops.job.job_id", ondelete="CASCADE"))
    fence: Mapped[int] = column("Attempt", BigInteger)
    at: Mapped[dt.datetime] = column("When", MOMENT, server_default=NOW)
    level: Mapped[str] = column("info, warning or error", Text, server_default=text("'info'"))
    message: Mapped[str] = column("The line", Text)


class TrainingStep(Base):
    """A point of a loss curve."""

    __tablename__ = "training_step"
    __table_args__ = {"schema": "ops", "comment": "Loss curves of pretraining, one row a reported step."}

    job_id: Mapped[int] = column("Job", ForeignKey("ops.job.job_id", ondelete="CASCADE"), primary_key=True)
    step: Mapped[int] = column("Optimiser step", BigInteger, primary_key=True, autoincrement=False)
    name: Mapped[str] = column(
        "train_loss, tuning_loss, tuning_gain, learning_rate, volumes_per_second", Text, primary_key=True
    )
    epoch: Mapped[int] = column("Epoch", Integer)
    value: Mapped[float] = column("Value; losses in nats per event", Float)
    at: Mapped[dt.datetime] = column("When", MOMENT, server_default=NOW)


class Worker(Base):
    """A process that claims jobs."""

    __tablename__ = "worker"
    __table_args__ = {"schema": "ops", "comment": "Workers and their last sign of life."}

    worker_id: Mapped[str] = column("host:pid:start", Text, primary_key=True)
    host: Mapped[str] = column("Host", Text)
    pid: Mapped[int] = column("Process", Integer)
    queues: Mapped[list[str]] = column("Queues it serves", ARRAY(Text))
    started_at: Mapped[dt.datetime] = column("Since", MOMENT, server_default=NOW)
    heartbeat_at: Mapped[dt.datetime] = column("Last sign of life", MOMENT, server_default=NOW)
    stopped_at: Mapped[dt.datetime | None] = column("Stopped in order", MOMENT)
    code_version: Mapped[str] = column("Version of Lachesis", Text)
    device: Mapped[str | None] = column("Device, e.g. cpu or the GPU's name", Text)
    encoders: Mapped[list[str] | None] = column("Encoders it can build; null of a worker that did not say", ARRAY(Text))
    devices: Mapped[list[str] | None] = column("Devices of its host that its jobs may use; null: unsaid", ARRAY(Text))


class Schedule(Base):
    """When to queue what."""

    __tablename__ = "schedule"
    __table_args__ = {"schema": "ops", "comment": "Standing orders; an occurrence runs at most once."}

    schedule_id: Mapped[int] = column("Key", Integer, Identity(), primary_key=True)
    name: Mapped[str] = column("Name", Text, unique=True)
    cron: Mapped[str] = column("Cron expression", Text)
    timezone: Mapped[str] = column("Its time zone", Text, server_default=text("'UTC'"))
    kind: Mapped[str] = column("Stage or pipeline", Text)
    args: Mapped[dict[str, Any]] = column("Arguments", JSONB, server_default=text("'{}'"))
    policy: Mapped[str] = column("For missed occurrences: skip or latest", Text, server_default=text("'skip'"))
    enabled: Mapped[bool] = column("On or off", Boolean, server_default=text("true"))
    created_at: Mapped[dt.datetime] = column("When", MOMENT, server_default=NOW)


class Source(Base):
    """A place extracts come from."""

    __tablename__ = "source"
    __table_args__ = {
        "schema": "ops",
        "comment": "Where extracts come from; a snapshot replaces what its source loaded before.",
    }

    source_id: Mapped[int] = column("Key", Integer, Identity(), primary_key=True)
    name: Mapped[str] = column("Name (--source)", Text, unique=True)
    data_cut: Mapped[dt.date | None] = column("Last day of its data, where known", Date)
    data_cut_source: Mapped[str | None] = column("option or cdm_source", Text)
    simulated: Mapped[bool] = column(
        "True for simulated data; said on every page", Boolean, server_default=text("false")
    )
    arbitrary_pairing: Mapped[bool] = column(
        "True where scans were paired with persons arbitrarily", Boolean, server_default=text("false")
    )
    details: Mapped[dict[str, Any]] = column("cdm_source's row and the like", JSONB, server_default=text("'{}'"))
    created_at: Mapped[dt.datetime] = column("When", MOMENT, server_default=NOW)


class Load(Base):
    """One table of one delivery."""

    __tablename__ = "load"
    __table_args__ = (
        Index(None, "job_id"),
        Index("ix_load_published", "source_id", "table_name", postgresql_where=text("state = 'published'")),
        CheckConstraint("state IN ('published', 'superseded')", name="state"),
        Index(None, "delivery_id"),
        CheckConstraint("num_read = num_loaded + num_rejected + num_same + num_deleted", name="counts"),
        {
            "schema": "ops",
            "comment": "One table of a delivery: files, counts (read = loaded + rejected), flags by rule.",
        },
    )

    load_id: Mapped[int] = column("Key", Integer, Identity(), primary_key=True)
    source_id: Mapped[int] = column("Source", ForeignKey("ops.source.source_id"))
    job_id: Mapped[int | None] = column("The job; groups the tables of a delivery", BigInteger)
    kind: Mapped[str] = column("omop, vocabulary, images, …", Text)
    mode: Mapped[str] = column("snapshot, append or upsert", Text)
    table_name: Mapped[str] = column("Table of the extract, e.g. condition_occurrence", Text)
    state: Mapped[str] = column("published while its rows are the ones seen, superseded afterwards", Text)
    files: Mapped[list[Any]] = column("[{name, sha256, bytes, records, dialect}]", JSONB)
    content_sha256: Mapped[bytes] = column("Digest over the files' digests", LargeBinary)
    num_read: Mapped[int] = column("Records read", BigInteger)
    num_loaded: Mapped[int] = column("Rows loaded", BigInteger)
    num_rejected: Mapped[int] = column("Rows rejected", BigInteger)
    rejects_by_rule: Mapped[dict[str, Any]] = column("Rejected rows by rule", JSONB, server_default=text("'{}'"))
    flags_by_rule: Mapped[dict[str, Any]] = column(
        "Loaded, but remarkable, by rule", JSONB, server_default=text("'{}'")
    )
    first_time: Mapped[dt.datetime | None] = column("Earliest event", NAIVE)
    last_time: Mapped[dt.datetime | None] = column("Latest event", NAIVE)
    partition_name: Mapped[str | None] = column("Partition of omop.event that holds its rows", Text)
    created_at: Mapped[dt.datetime] = column("When", MOMENT, server_default=NOW)
    superseded_at: Mapped[dt.datetime | None] = column("When its rows were replaced", MOMENT)
    delivery_id: Mapped[int | None] = column("Smallest load_id of its delivery: groups the loads", Integer)
    num_same: Mapped[int] = column(
        "Records of a delta that say what is already shown", BigInteger, server_default=text("0")
    )
    num_deleted: Mapped[int] = column("Records of a delta that take a row away", BigInteger, server_default=text("0"))
    num_shown: Mapped[int | None] = column(
        "Rows of it that are still seen; null where they are not counted one by one (vocabulary, scans)", BigInteger
    )


class LoadChange(Base):
    """What a delivery changed in one table."""

    __tablename__ = "load_change"
    __table_args__ = {
        "schema": "ops",
        "comment": "What a delivery changed, table by table, against what its source showed before.",
    }

    delivery_id: Mapped[int] = column("Delivery", Integer, primary_key=True, autoincrement=False)
    table_name: Mapped[str] = column("Table", Text, primary_key=True)
    source_id: Mapped[int] = column("Source", ForeignKey("ops.source.source_id"))
    num_before: Mapped[int] = column("Rows its source showed before", BigInteger)
    num_after: Mapped[int] = column("Rows its source showed after", BigInteger)
    num_added: Mapped[int] = column("Rows whose primary key was not shown before", BigInteger)
    num_changed: Mapped[int] = column("Rows of a known key with other content", BigInteger)
    num_removed: Mapped[int] = column("Rows whose key is no longer shown", BigInteger)


class VocabularyRelease(Base):
    """A vocabulary that was loaded."""

    __tablename__ = "vocabulary_release"
    __table_args__ = (
        Index("ix_vocabulary_release_current", "is_current", unique=True, postgresql_where=text("is_current")),
        {
            "schema": "ops",
            "comment": "Vocabularies that were loaded; the current one completes the store's concepts at every load.",
        },
    )

    vocabulary_release_id: Mapped[int] = column("Key", Integer, Identity(), primary_key=True)
    version: Mapped[str] = column("As the download calls it, e.g. v5.0 27-FEB-25", Text)
    is_current: Mapped[bool] = column("True for the one that completes loads", Boolean)
    is_full: Mapped[bool] = column("True where all of it is in the store (--full)", Boolean)
    digest: Mapped[bytes] = column("sha256 over the files' digests", LargeBinary)
    files: Mapped[dict[str, Any]] = column(
        "Table: {path among the artifacts, sha256, rows} of what is kept beside the store", JSONB
    )
    job_id: Mapped[int | None] = column("The job that loaded it", BigInteger)
    created_at: Mapped[dt.datetime] = column("When", MOMENT, server_default=NOW)


class Reject(Base):
    """A row that was not loaded, and why."""

    __tablename__ = "reject"
    __table_args__ = (
        Index(None, "load_id"),
        Index(None, "job_id"),
        {"schema": "ops", "comment": "Rows not loaded: where, which rule; never a value."},
    )

    reject_id: Mapped[int] = column("Key", BigInteger, Identity(), primary_key=True)
    load_id: Mapped[int | None] = column(
        "Load; null where the delivery stopped", ForeignKey("ops.load.load_id", ondelete="CASCADE")
    )
    job_id: Mapped[int | None] = column("The job", BigInteger)
    table_name: Mapped[str] = column("Table", Text)
    file: Mapped[str] = column("File name", Text)
    record: Mapped[int | None] = column("Record number in the file, from 1, header not counted", BigInteger)
    rule: Mapped[str] = column("Rule it broke", Text)
    row_key: Mapped[str | None] = column("Primary key of the row, where it is readable as a number", Text)
    column_name: Mapped[str | None] = column("Column", Text)


class DataCheck(Base):
    """The answer of one check of loaded data."""

    __tablename__ = "data_check"
    __table_args__ = (
        CheckConstraint("status IN ('pass', 'warn', 'fail', 'not_applicable')", name="status"),
        Index(None, "checked_at"),
        {
            "schema": "ops",
            "comment": "Answers to `lachesis check data`: one row a check, a table and a time it was asked.",
        },
    )

    data_check_id: Mapped[int] = column("Key", BigInteger, Identity(), primary_key=True)
    checked_at: Mapped[dt.datetime] = column("When; the same for all checks of one `lachesis check data`", MOMENT)
    source: Mapped[str | None] = column("Source that was asked about; null for the whole store", Text)
    name: Mapped[str] = column("The check", Text)
    table_name: Mapped[str] = column("Table that was asked about", Text)
    asks: Mapped[str] = column("What it looks for", Text)
    num_rows: Mapped[int] = column("Rows that could break it (denominator)", BigInteger)
    num_violations: Mapped[int] = column("Rows that break it", BigInteger)
    warn_above: Mapped[float] = column("A larger share is a warning", Float)
    fail_above: Mapped[float | None] = column("A larger share is a failure; null: never one", Float)
    status: Mapped[str] = column("pass, warn, fail or not_applicable", Text)
    list_sql: Mapped[str] = column("Statement that lists the rows that break it", Text)


class Forgotten(Base):
    """Someone never to load again."""

    __tablename__ = "forgotten"
    __table_args__ = {
        "schema": "ops",
        "comment": "Persons who were forgotten, as tokens that only the home's secret can make: loads leave them out.",
    }

    token: Mapped[bytes] = column("HMAC-SHA256 of an id or a source value", LargeBinary, primary_key=True)
    key_id: Mapped[str] = column("Which secret: first digits of a digest of it", Text)
    job_id: Mapped[int | None] = column("The job that forgot them", BigInteger)
    forgotten_at: Mapped[dt.datetime] = column("When", MOMENT, server_default=NOW)


class ForgottenFile(Base):
    """A file that is still to go."""

    __tablename__ = "forgotten_file"
    __table_args__ = (
        CheckConstraint("kind IN ('artifact', 'volume')", name="kind"),
        {
            "schema": "ops",
            "comment": "Files of forgotten persons that are still to be deleted; empty but while a job does it.",
        },
    )

    kind: Mapped[str] = column("artifact or volume", Text, primary_key=True)
    name: Mapped[str] = column("Path among the artifacts, or digest of the voxels", Text, primary_key=True)
