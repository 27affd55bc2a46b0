"""What is derived: cohorts, tasks and labels; a label looks forward from an index, a feature looks back."""

from __future__ import annotations

import datetime as dt
from decimal import Decimal
from typing import Any

from sqlalchemy import (
    REAL,
    BigInteger,
    Boolean,
    CheckConstraint,
    Date,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Identity,
    Index,
    Integer,
    LargeBinary,
    Numeric,
    SmallInteger,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import Mapped

from app.schema.base import MOMENT, NAIVE, NOW, Base, column

SPLIT = "split IN ('train', 'tuning', 'held_out')"


class Cohort(Base):
    """A rule and the members that met it."""

    __tablename__ = "cohort"
    __table_args__ = (
        UniqueConstraint("name", "version"),
        Index("ix_cohort_current", "name", unique=True, postgresql_where=text("is_current")),
        {"schema": "label", "comment": "Named, versioned sets of scans; a name means its current version."},
    )

    cohort_id: Mapped[int] = column("Key", Integer, Identity(), primary_key=True)
    name: Mapped[str] = column("Name", Text)
    version: Mapped[int] = column("1, 2, … of this name", Integer)
    is_current: Mapped[bool] = column("True for the version the name means", Boolean)
    definition: Mapped[dict[str, Any]] = column("Rule: follow_up, data_cut, per, where, salt, …", JSONB)
    attrition: Mapped[list[Any]] = column("Steps: [{step, scans, persons}]", JSONB)
    follow_up_summary: Mapped[list[Any]] = column(
        "Follow-up under each rule: [{rule, scans, persons, deaths, median_days, lower_days, upper_days, "
        "reverse_km_median_days}]",
        JSONB,
        server_default=text("'[]'::jsonb"),
    )
    follow_up: Mapped[str] = column("observation_period, last_event or data_cut", Text)
    data_cut: Mapped[dt.date | None] = column("Last day of the data, where known", Date)
    digest: Mapped[bytes] = column("sha256 of definition and members", LargeBinary)
    created_at: Mapped[dt.datetime] = column("When", MOMENT, server_default=NOW)
    job_id: Mapped[int | None] = column("The job that made it", BigInteger)


class CohortMember(Base):
    """One scan in a cohort."""

    __tablename__ = "cohort_member"
    __table_args__ = (
        CheckConstraint(SPLIT, name="split"),
        UniqueConstraint("cohort_id", "image_occurrence_id"),
        Index(None, "cohort_id", "person_id"),
        {"schema": "label", "comment": "One scan of a cohort: its index time, the end of its follow-up, its split."},
    )

    cohort_member_id: Mapped[int] = column("Key", BigInteger, Identity(), primary_key=True)
    cohort_id: Mapped[int] = column("Cohort", ForeignKey("label.cohort.cohort_id", ondelete="CASCADE"))
    person_id: Mapped[int] = column("Person", BigInteger)
    image_occurrence_id: Mapped[int] = column("Scan", BigInteger)
    index_time: Mapped[dt.datetime] = column("Acquisition, naive local time; the moment predicted from", NAIVE)
    index_date_only: Mapped[bool] = column("True where only the day of acquisition is known", Boolean)
    follow_up_end: Mapped[dt.datetime | None] = column(
        "End of follow-up under the cohort's rule, null where there is none", NAIVE
    )
    data_cut_end: Mapped[dt.datetime | None] = column(
        "Earlier of death and data cut, for tasks followed to the data cut", NAIVE
    )
    death_time: Mapped[dt.datetime | None] = column("Death, where recorded", NAIVE)
    split: Mapped[str] = column("train, tuning or held_out; one split a person", Text)
    eligible: Mapped[bool] = column("False where no task may use this member", Boolean)
    reason: Mapped[str | None] = column("Why not eligible", Text)


class TaskSet(Base):
    """An ordered list of tasks."""

    __tablename__ = "task_set"
    __table_args__ = (
        UniqueConstraint("name", "version"),
        Index("ix_task_set_current", "name", unique=True, postgresql_where=text("is_current")),
        {"schema": "label", "comment": "Named, versioned lists of tasks (clinical questions)."},
    )

    task_set_id: Mapped[int] = column("Key", Integer, Identity(), primary_key=True)
    name: Mapped[str] = column("Name", Text)
    version: Mapped[int] = column("1, 2, … of this name", Integer)
    is_current: Mapped[bool] = column("True for the version the name means", Boolean)
    kind: Mapped[str] = column("pretraining (chosen by entropy) or clinical (given)", Text)
    cohort_id: Mapped[int | None] = column("Cohort whose train persons chose the tasks", Integer)
    definition: Mapped[dict[str, Any]] = column("How it was asked for", JSONB)
    digest: Mapped[bytes] = column("sha256 of the tasks", LargeBinary)
    definitions_digest: Mapped[bytes] = column(
        "sha256 over its tasks as they are defined, codes resolved; empty until they are written",
        LargeBinary,
        server_default=text("''::bytea"),
    )
    created_at: Mapped[dt.datetime] = column("When", MOMENT, server_default=NOW)
    job_id: Mapped[int | None] = column("The job that made it", BigInteger)


class Task(Base):
    """One clinical question of a set."""

    __tablename__ = "task"
    __table_args__ = (
        UniqueConstraint("task_set_id", "name"),
        {
            "schema": "label",
            "comment": "One clinical question: which outcome, in which risk window, how history and death count.",
        },
    )

    task_set_id: Mapped[int] = column(
        "Set", ForeignKey("label.task_set.task_set_id", ondelete="CASCADE"), primary_key=True
    )
    position: Mapped[int] = column(
        "0, 1, … within the set; what event_tasks holds", SmallInteger, primary_key=True, autoincrement=False
    )
    name: Mapped[str] = column("Name, unique in the set", Text)
    title: Mapped[str | None] = column("Readable name", Text)
    concept_id: Mapped[int | None] = column("Concept of a one-concept task", Integer)
    start_seconds: Mapped[int] = column("Opening of the risk window, seconds from the index", BigInteger)
    occurrence: Mapped[str] = column("first or next", Text)
    prior: Mapped[str] = column("exclude or keep members with the outcome before the window", Text)
    death: Mapped[str] = column("censor or competing", Text)
    follow_up: Mapped[str] = column("cohort or data_cut", Text)
    horizons_days: Mapped[list[int]] = column("Horizons at which the task is judged, days", ARRAY(Integer))
    definition: Mapped[dict[str, Any]] = column("The whole task file", JSONB)
    prevalence: Mapped[float | None] = column("Share of train persons with the concept or a descendant ever", Float)
    entropy: Mapped[float | None] = column("Entropy score (most negative first)", Float)
    num_train_events: Mapped[int | None] = column("Train persons with the event after an index", Integer)


class TaskCandidate(Base):
    """Why a concept is, or is not, a pretraining task."""

    __tablename__ = "task_candidate"
    __table_args__ = {
        "schema": "label",
        "comment": "Concepts weighed as pretraining tasks, in order, with the verdict.",
    }

    task_set_id: Mapped[int] = column(
        "Set", ForeignKey("label.task_set.task_set_id", ondelete="CASCADE"), primary_key=True
    )
    concept_id: Mapped[int] = column("Concept", Integer, primary_key=True, autoincrement=False)
    rank: Mapped[int] = column("Order by score, ties by concept_id", Integer)
    persons: Mapped[int] = column("Train persons with it or a descendant ever", Integer)
    base_persons: Mapped[int] = column("The same for its rarest parent (all train persons where it has none)", Integer)
    entropy: Mapped[float] = column("Score: base · (q ln q + (1-q) ln(1-q))", Float)
    num_train_events: Mapped[int] = column("Train persons with it after an index", Integer)
    verdict: Mapped[str] = column("chosen, too_few_events, beyond_size or banned", Text)


class LabelSet(Base):
    """Labels of one cohort for one task set."""

    __tablename__ = "label_set"
    __table_args__ = (
        UniqueConstraint("name", "version"),
        Index("ix_label_set_current", "name", unique=True, postgresql_where=text("is_current")),
        {
            "schema": "label",
            "comment": "Named, versioned labels of a cohort for a task set; a name means its current version.",
        },
    )

    label_set_id: Mapped[int] = column("Key", Integer, Identity(), primary_key=True)
    name: Mapped[str] = column("Name", Text)
    version: Mapped[int] = column("1, 2, … of this name", Integer)
    is_current: Mapped[bool] = column("True for the version the name means", Boolean)
    cohort_id: Mapped[int] = column("Cohort", ForeignKey("label.cohort.cohort_id"))
    task_set_id: Mapped[int] = column("Task set", ForeignKey("label.task_set.task_set_id"))
    digest: Mapped[bytes] = column("sha256 over all arrays: equal labels, equal digest", LargeBinary)
    data_digest: Mapped[bytes] = column("sha256 over the members' timelines, periods, deaths and scans", LargeBinary)
    num_members: Mapped[int] = column("Members, ineligible ones too", Integer)
    num_events: Mapped[int] = column("Observed outcomes over all tasks", BigInteger)
    vocabulary_version: Mapped[str | None] = column(
        "Vocabulary release when it was made; null where none was loaded", Text
    )
    created_at: Mapped[dt.datetime] = column("When", MOMENT, server_default=NOW)
    job_id: Mapped[int | None] = column("The job that made it", BigInteger)
    rules_digest: Mapped[bytes | None] = column(
        "sha256 over the engine's rules and the tasks as concepts: of two versions with the same, a member with the "
        "same inputs has the same labels; null where nobody kept it",
        LargeBinary,
    )


class RemovedVersion(Base):
    """A version that was removed."""

    __tablename__ = "removed_version"
    __table_args__ = (
        CheckConstraint("kind IN ('cohort', 'task_set', 'label_set')", name="kind"),
        {
            "schema": "label",
            "comment": "Versions of cohorts, task sets and label sets that were removed, so that NAME@2 never means "
            "another.",
        },
    )

    kind: Mapped[str] = column("cohort, task_set or label_set", Text, primary_key=True)
    name: Mapped[str] = column("Name", Text, primary_key=True)
    version: Mapped[int] = column("Number that is not given again", Integer, primary_key=True, autoincrement=False)
    digest: Mapped[bytes] = column("What it was: the digest it had", LargeBinary)
    removed_at: Mapped[dt.datetime] = column("When", MOMENT, server_default=NOW)


class LabelMeaning(Base):
    """What the tasks of a label set meant, packed; the view label.label_concept shows it by task."""

    __tablename__ = "label_meaning"
    __table_args__ = {
        "schema": "label",
        "comment": "What concepts the tasks of a label set meant, packed: read it through label.label_concept.",
    }

    label_set_id: Mapped[int] = column(
        "Label set",
        ForeignKey("label.label_set.label_set_id", ondelete="CASCADE"),
        primary_key=True,
        autoincrement=False,
    )
    positions: Mapped[list[int]] = column(
        "Tasks, ascending, one entry a concept; read them through label.label_concept", ARRAY(SmallInteger)
    )
    concepts: Mapped[list[int]] = column(
        "The concepts beside them whose events were outcomes, descendants included, ascending by task", ARRAY(Integer)
    )


class Tte(Base):
    """Labels of one member, sparse."""

    __tablename__ = "tte"
    __table_args__ = (
        {
            "schema": "label",
            "comment": "Labels as sparse arrays, one row a member; read them through label.tte_long or label.outcome.",
        },
    )

    label_set_id: Mapped[int] = column(
        "Label set", ForeignKey("label.label_set.label_set_id", ondelete="CASCADE"), primary_key=True
    )
    cohort_member_id: Mapped[int] = column("Member", BigInteger, primary_key=True, autoincrement=False)
    event_tasks: Mapped[list[int]] = column(
        "Positions of tasks whose outcome was observed (status event), ascending", ARRAY(SmallInteger)
    )
    event_seconds: Mapped[list[int]] = column("Their times, seconds from the index", ARRAY(BigInteger))
    prior_tasks: Mapped[list[int]] = column(
        "Tasks with history before the window opens, ascending", ARRAY(SmallInteger)
    )
    ineligible_tasks: Mapped[list[int]] = column(
        "Tasks ineligible for this member alone, ascending", ARRAY(SmallInteger)
    )
    window_tasks: Mapped[list[int]] = column(
        "Tasks whose window opens elsewhere than at start_seconds, ascending", ARRAY(SmallInteger)
    )
    window_seconds: Mapped[list[int]] = column("Where, seconds from the index", ARRAY(BigInteger))
    visit_tasks: Mapped[list[int]] = column("Tasks seen in the visit that holds the index", ARRAY(SmallInteger))
    follow_up_seconds: Mapped[int | None] = column("End of follow-up, seconds from the index", BigInteger)
    data_cut_seconds: Mapped[int | None] = column("End for tasks followed to the data cut", BigInteger)
    death_seconds: Mapped[int | None] = column("Death, where recorded", BigInteger)


class MemberDigest(Base):
    """What the labels of one member were made of."""

    __tablename__ = "member_digest"
    __table_args__ = {
        "schema": "label",
        "comment": "What each member's labels were made of, so that changed members are found.",
    }

    label_set_id: Mapped[int] = column(
        "Label set", ForeignKey("label.label_set.label_set_id", ondelete="CASCADE"), primary_key=True
    )
    cohort_member_id: Mapped[int] = column("Member", BigInteger, primary_key=True, autoincrement=False)
    digest: Mapped[bytes] = column(
        "First 16 bytes of sha256 over the timeline, periods, visits, birth and scan at labelling", LargeBinary
    )
    timeline_digest: Mapped[bytes | None] = column(
        "Digest of the timeline at labelling; null where there was none", LargeBinary
    )
    input_digest: Mapped[bytes | None] = column(
        "sha256 over all that the labels of this member were made of but the tasks; null where nobody kept it",
        LargeBinary,
    )
    label_digest: Mapped[bytes | None] = column(
        "sha256 over who the member is and its arrays: equal labels, equal digest; null where nobody kept it",
        LargeBinary,
    )


class Shard(Base):
    """The share of a label set that one job has labelled, until the whole set is stored."""

    __tablename__ = "shard"
    __table_args__ = {
        "schema": "label",
        "comment": "Shares of label sets that are being made by several jobs; gone when the set is stored.",
    }

    job_id: Mapped[int] = column(
        "Job that makes the set", ForeignKey("ops.job.job_id", ondelete="CASCADE"), primary_key=True
    )
    shard: Mapped[int] = column("Which share, from 0", SmallInteger, primary_key=True, autoincrement=False)
    data_digest: Mapped[bytes] = column("sha256 over what its labels were made of", LargeBinary)
    counts: Mapped[bytes] = column(
        "Members, persons and seconds at risk by split, status and task, as the engine counts", LargeBinary
    )


class ShardTte(Base):
    """Labels of one member of a share, sparse."""

    __tablename__ = "shard_tte"
    __table_args__ = (
        ForeignKeyConstraint(
            ["job_id", "shard"],
            ["label.shard.job_id", "label.shard.shard"],
            name="fk_shard_tte_shard",
            ondelete="CASCADE",
        ),
        {"schema": "label", "comment": "Labels of shares, as label.tte will hold them; nobody reads them."},
    )

    job_id: Mapped[int] = column("Job that makes the set", BigInteger, primary_key=True, autoincrement=False)
    shard: Mapped[int] = column("Which share", SmallInteger, primary_key=True, autoincrement=False)
    cohort_member_id: Mapped[int] = column("Member", BigInteger, primary_key=True, autoincrement=False)
    digest: Mapped[bytes] = column("sha256 over the scan and the arrays", LargeBinary)
    event_tasks: Mapped[list[int]] = column("As in label.tte", ARRAY(SmallInteger))
    event_seconds: Mapped[list[int]] = column("As in label.tte", ARRAY(BigInteger))
    prior_tasks: Mapped[list[int]] = column("As in label.tte", ARRAY(SmallInteger))
    ineligible_tasks: Mapped[list[int]] = column("As in label.tte", ARRAY(SmallInteger))
    window_tasks: Mapped[list[int]] = column("As in label.tte", ARRAY(SmallInteger))
    window_seconds: Mapped[list[int]] = column("As in label.tte", ARRAY(BigInteger))
    visit_tasks: Mapped[list[int]] = column("As in label.tte", ARRAY(SmallInteger))
    follow_up_seconds: Mapped[int | None] = column("As in label.tte", BigInteger)
    data_cut_seconds: Mapped[int | None] = column("As in label.tte", BigInteger)
    death_seconds: Mapped[int | None] = column("As in label.tte", BigInteger)


class StatusCount(Base):
    """How many members have which status; the views label.task_status_count and label.task_count show it by task."""

    __tablename__ = "status_count"
    __table_args__ = {
        "schema": "label",
        "comment": "Members by split and status, arrays by task; read label.task_count or label.task_status_count.",
    }

    label_set_id: Mapped[int] = column(
        "Label set", ForeignKey("label.label_set.label_set_id", ondelete="CASCADE"), primary_key=True
    )
    split: Mapped[str] = column("Split", Text, primary_key=True)
    status: Mapped[str] = column("event, competing, censored, prior or ineligible", Text, primary_key=True)
    n: Mapped[list[int]] = column("Scans, by the position of the task", ARRAY(Integer))
    persons: Mapped[list[int]] = column("Persons, by the position of the task", ARRAY(Integer))
    person_days: Mapped[list[float]] = column(
        "Days at risk inside the window, by the position of the task", ARRAY(Float)
    )


class Feature(Base):
    """What is known of a member at its index."""

    __tablename__ = "feature"
    __table_args__ = {"schema": "label", "comment": "Numbers known at the index; they look back only."}

    cohort_member_id: Mapped[int] = column(
        "Member", ForeignKey("label.cohort_member.cohort_member_id", ondelete="CASCADE"), primary_key=True
    )
    name: Mapped[str] = column("Feature", Text, primary_key=True)
    value: Mapped[float | None] = column("Value", REAL)


class ReleasedLabel(Base):
    """A label that came with an extract."""

    __tablename__ = "released_label"
    __table_args__ = (
        CheckConstraint("kind IN ('tte', 'horizon', 'diagnosis')", name="kind"),
        CheckConstraint("status IN ('event', 'negative', 'censored')", name="status"),
        Index(None, "image_occurrence_id", "task"),
        Index(None, "person_id"),
        Index(None, "load_id"),
        {
            "schema": "label",
            "comment": "Labels as an extract releases them, to compare with ours; never used for training.",
        },
    )

    released_label_id: Mapped[int] = column("Key", BigInteger, Identity(), primary_key=True)
    impression_id: Mapped[str] = column("The study, as the extract names it", Text)
    person_id: Mapped[int] = column("Whose study", BigInteger)
    image_occurrence_id: Mapped[int | None] = column(
        "Its scan; null where no volume is loaded",
        ForeignKey("omop.image_occurrence.image_occurrence_id", ondelete="SET NULL"),
    )
    task: Mapped[str] = column("Task, by its name here where there is one", Text)
    kind: Mapped[str] = column("tte (time to event), horizon (event by a horizon) or diagnosis (at the study)", Text)
    horizon_days: Mapped[int | None] = column("Horizon, where the label has one", Integer)
    status: Mapped[str] = column("event, negative or censored", Text)
    released_time: Mapped[float | None] = column("Time from the study, in the unit of the release", Float)
    time_days: Mapped[float | None] = column("The same in days; null where the unit is not known", Float)
    load_id: Mapped[int] = column("The load that brought this row", ForeignKey("ops.load.load_id"))


class FeatureSet(Base):
    """The features of a cohort as they were last made."""

    __tablename__ = "feature_set"
    __table_args__ = {"schema": "label", "comment": "Features of a cohort: how they were asked for, and their digest."}

    cohort_id: Mapped[int] = column(
        "Cohort", ForeignKey("label.cohort.cohort_id", ondelete="CASCADE"), primary_key=True, autoincrement=False
    )
    definition: Mapped[dict[str, Any]] = column("Task set, windows, number of last values", JSONB)
    digest: Mapped[bytes] = column("sha256 of definitions and values", LargeBinary)
    created_at: Mapped[dt.datetime] = column("When", MOMENT, server_default=NOW)
    job_id: Mapped[int | None] = column("The job that made them", BigInteger)
    row_checksum: Mapped[Decimal | None] = column(
        "Sum of hashes of its rows in label.feature; another sum: someone else changed them", Numeric
    )


class FeatureDefinition(Base):
    """What a feature is."""

    __tablename__ = "feature_definition"
    __table_args__ = {
        "schema": "label",
        "comment": "What each feature of a cohort is; the values are in label.feature.",
    }

    cohort_id: Mapped[int] = column(
        "Cohort", ForeignKey("label.feature_set.cohort_id", ondelete="CASCADE"), primary_key=True, autoincrement=False
    )
    name: Mapped[str] = column("Name, as in label.feature", Text, primary_key=True)
    kind: Mapped[str] = column("demographic, count, time, value or visit", Text)
    description: Mapped[str] = column("What it says, in words", Text)
    window_days: Mapped[int | None] = column("How far back it counts; null without limit", Integer)
    concept_id: Mapped[int | None] = column("Concept, where it is of one", Integer)
    unit_concept_id: Mapped[int | None] = column("Unit of a value; 0 none", Integer)
    absent_is_zero: Mapped[bool] = column("True where a member without a row has none of it, else unknown", Boolean)


class LeakageCheck(Base):
    """The answer of one check of leakage."""

    __tablename__ = "leakage_check"
    __table_args__ = (
        CheckConstraint("verdict IN ('passed', 'failed', 'not_checked')", name="verdict"),
        Index(None, "label_set_id", "checked_at"),
        {"schema": "label", "comment": "Answers to `lachesis check leakage`: one row a check and a time it was asked."},
    )

    leakage_check_id: Mapped[int] = column("Key", BigInteger, Identity(), primary_key=True)
    label_set_id: Mapped[int] = column("Label set", ForeignKey("label.label_set.label_set_id", ondelete="CASCADE"))
    checked_at: Mapped[dt.datetime] = column("When; the same for all checks of one job", MOMENT)
    name: Mapped[str] = column("The check", Text)
    asks: Mapped[str] = column("What it looks for", Text)
    num_rows: Mapped[int] = column("Rows that were looked at", BigInteger)
    num_violations: Mapped[int] = column("Rows that break it", BigInteger)
    verdict: Mapped[str] = column("passed, failed or not_checked", Text)
    found: Mapped[str] = column("What was found, or why it was not checked", Text)
    job_id: Mapped[int | None] = column("The job that asked", BigInteger)
    mend: Mapped[str] = column("What to do where it fails", Text, server_default=text("''"))
