"""What is derived: cohorts, tasks and labels.

Revision 0003, after 0002.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

TABLES = (
    "cohort",
    "task_set",
    "cohort_member",
    "label_set",
    "task",
    "task_candidate",
    "feature",
    "task_status_count",
    "tte",
)


def upgrade() -> None:
    op.execute("CREATE SCHEMA IF NOT EXISTS label")

    op.create_table(
        "cohort",
        sa.Column("cohort_id", sa.Integer(), sa.Identity(always=False), nullable=False, comment="Key"),
        sa.Column("name", sa.Text(), nullable=False, comment="Name"),
        sa.Column("version", sa.Integer(), nullable=False, comment="1, 2, … of this name"),
        sa.Column("is_current", sa.Boolean(), nullable=False, comment="True for the version the name means"),
        sa.Column(
            "definition",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=False,
            comment="Rule: follow_up, data_cut, per, where, salt, …",
        ),
        sa.Column(
            "attrition",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=False,
            comment="Steps: [{step, scans, persons}]",
        ),
        sa.Column("follow_up", sa.Text(), nullable=False, comment="observation_period, last_event or data_cut"),
        sa.Column("data_cut", sa.Date(), nullable=True, comment="Last day of the data, where known"),
        sa.Column("digest", sa.LargeBinary(), nullable=False, comment="sha256 of definition and members"),
        sa.Column(
            "created_at",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
            comment="When",
        ),
        sa.Column("job_id", sa.BigInteger(), nullable=True, comment="The job that made it"),
        sa.PrimaryKeyConstraint("cohort_id", name=op.f("pk_cohort")),
        sa.UniqueConstraint("name", "version", name=op.f("uq_cohort_name_version")),
        schema="label",
        comment="Named, versioned sets of scans; a name means its current version.",
    )
    op.create_index(
        "ix_cohort_current", "cohort", ["name"], unique=True, schema="label", postgresql_where=sa.text("is_current")
    )
    op.create_table(
        "task_set",
        sa.Column("task_set_id", sa.Integer(), sa.Identity(always=False), nullable=False, comment="Key"),
        sa.Column("name", sa.Text(), nullable=False, comment="Name"),
        sa.Column("version", sa.Integer(), nullable=False, comment="1, 2, … of this name"),
        sa.Column("is_current", sa.Boolean(), nullable=False, comment="True for the version the name means"),
        sa.Column("kind", sa.Text(), nullable=False, comment="pretraining (chosen by entropy) or clinical (given)"),
        sa.Column("cohort_id", sa.Integer(), nullable=True, comment="Cohort whose train persons chose the tasks"),
        sa.Column(
            "definition", postgresql.JSONB(astext_type=sa.Text()), nullable=False, comment="How it was asked for"
        ),
        sa.Column("digest", sa.LargeBinary(), nullable=False, comment="sha256 of the tasks"),
        sa.Column(
            "created_at",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
            comment="When",
        ),
        sa.Column("job_id", sa.BigInteger(), nullable=True, comment="The job that made it"),
        sa.PrimaryKeyConstraint("task_set_id", name=op.f("pk_task_set")),
        sa.UniqueConstraint("name", "version", name=op.f("uq_task_set_name_version")),
        schema="label",
        comment="Named, versioned lists of tasks (clinical questions).",
    )
    op.create_index(
        "ix_task_set_current", "task_set", ["name"], unique=True, schema="label", postgresql_where=sa.text("is_current")
    )
    op.create_table(
        "cohort_member",
        sa.Column("cohort_member_id", sa.BigInteger(), sa.Identity(always=False), nullable=False, comment="Key"),
        sa.Column("cohort_id", sa.Integer(), nullable=False, comment="Cohort"),
        sa.Column("person_id", sa.BigInteger(), nullable=False, comment="Person"),
        sa.Column("image_occurrence_id", sa.BigInteger(), nullable=False, comment="Scan"),
        sa.Column(
            "index_time",
            postgresql.TIMESTAMP(),
            nullable=False,
            comment="Acquisition, naive local time; the moment predicted from",
        ),
        sa.Column(
            "index_date_only", sa.Boolean(), nullable=False, comment="True where only the day of acquisition is known"
        ),
        sa.Column(
            "follow_up_end",
            postgresql.TIMESTAMP(),
            nullable=True,
            comment="End of follow-up under the cohort's rule, null where there is none",
        ),
        sa.Column(
            "data_cut_end",
            postgresql.TIMESTAMP(),
            nullable=True,
            comment="Earlier of death and data cut, for tasks followed to the data cut",
        ),
        sa.Column("death_time", postgresql.TIMESTAMP(), nullable=True, comment="Death, where recorded"),
        sa.Column("split", sa.Text(), nullable=False, comment="train, tuning or held_out; one split a person"),
        sa.Column("eligible", sa.Boolean(), nullable=False, comment="False where no task may use this member"),
        sa.Column("reason", sa.Text(), nullable=True, comment="Why not eligible"),
        sa.CheckConstraint("split IN ('train', 'tuning', 'held_out')", name=op.f("ck_cohort_member_split")),
        sa.ForeignKeyConstraint(
            ["cohort_id"],
            ["label.cohort.cohort_id"],
            name=op.f("fk_cohort_member_cohort_id_cohort"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("cohort_member_id", name=op.f("pk_cohort_member")),
        sa.UniqueConstraint(
            "cohort_id", "image_occurrence_id", name=op.f("uq_cohort_member_cohort_id_image_occurrence_id")
        ),
        schema="label",
        comment="One scan of a cohort: its index time, the end of its follow-up, its split.",
    )
    op.create_index(
        op.f("ix_cohort_member_cohort_id_person_id"),
        "cohort_member",
        ["cohort_id", "person_id"],
        unique=False,
        schema="label",
    )
    op.create_table(
        "label_set",
        sa.Column("label_set_id", sa.Integer(), sa.Identity(always=False), nullable=False, comment="Key"),
        sa.Column("name", sa.Text(), nullable=False, comment="Name"),
        sa.Column("version", sa.Integer(), nullable=False, comment="1, 2, … of this name"),
        sa.Column("is_current", sa.Boolean(), nullable=False, comment="True for the version the name means"),
        sa.Column("cohort_id", sa.Integer(), nullable=False, comment="Cohort"),
        sa.Column("task_set_id", sa.Integer(), nullable=False, comment="Task set"),
        sa.Column(
            "digest", sa.LargeBinary(), nullable=False, comment="sha256 over all arrays: equal labels, equal digest"
        ),
        sa.Column(
            "data_digest",
            sa.LargeBinary(),
            nullable=False,
            comment="sha256 over the members' timelines, periods, deaths and scans",
        ),
        sa.Column("num_members", sa.Integer(), nullable=False, comment="Members, ineligible ones too"),
        sa.Column("num_events", sa.BigInteger(), nullable=False, comment="Observed outcomes over all tasks"),
        sa.Column(
            "created_at",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
            comment="When",
        ),
        sa.Column("job_id", sa.BigInteger(), nullable=True, comment="The job that made it"),
        sa.ForeignKeyConstraint(["cohort_id"], ["label.cohort.cohort_id"], name=op.f("fk_label_set_cohort_id_cohort")),
        sa.ForeignKeyConstraint(
            ["task_set_id"], ["label.task_set.task_set_id"], name=op.f("fk_label_set_task_set_id_task_set")
        ),
        sa.PrimaryKeyConstraint("label_set_id", name=op.f("pk_label_set")),
        sa.UniqueConstraint("name", "version", name=op.f("uq_label_set_name_version")),
        schema="label",
        comment="Named, versioned labels of a cohort for a task set; a name means its current version.",
    )
    op.create_index(
        "ix_label_set_current",
        "label_set",
        ["name"],
        unique=True,
        schema="label",
        postgresql_where=sa.text("is_current"),
    )
    op.create_table(
        "task",
        sa.Column("task_set_id", sa.Integer(), nullable=False, comment="Set"),
        sa.Column(
            "position",
            sa.SmallInteger(),
            autoincrement=False,
            nullable=False,
            comment="0, 1, … within the set; what event_tasks holds",
        ),
        sa.Column("name", sa.Text(), nullable=False, comment="Name, unique in the set"),
        sa.Column("title", sa.Text(), nullable=True, comment="Readable name"),
        sa.Column("concept_id", sa.Integer(), nullable=True, comment="Concept of a one-concept task"),
        sa.Column(
            "start_seconds",
            sa.BigInteger(),
            nullable=False,
            comment="Opening of the risk window, seconds from the index",
        ),
        sa.Column("occurrence", sa.Text(), nullable=False, comment="first or next"),
        sa.Column(
            "prior", sa.Text(), nullable=False, comment="exclude or keep members with the outcome before the window"
        ),
        sa.Column("death", sa.Text(), nullable=False, comment="censor or competing"),
        sa.Column("follow_up", sa.Text(), nullable=False, comment="cohort or data_cut"),
        sa.Column(
            "horizons_days",
            postgresql.ARRAY(sa.Integer()),
            nullable=False,
            comment="Horizons at which the task is judged, days",
        ),
        sa.Column("definition", postgresql.JSONB(astext_type=sa.Text()), nullable=False, comment="The whole task file"),
        sa.Column(
            "prevalence",
            sa.Float(),
            nullable=True,
            comment="Share of train persons with the concept or a descendant ever",
        ),
        sa.Column("entropy", sa.Float(), nullable=True, comment="Entropy score (most negative first)"),
        sa.Column(
            "num_train_events", sa.Integer(), nullable=True, comment="Train persons with the event after an index"
        ),
        sa.ForeignKeyConstraint(
            ["task_set_id"],
            ["label.task_set.task_set_id"],
            name=op.f("fk_task_task_set_id_task_set"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("task_set_id", "position", name=op.f("pk_task")),
        sa.UniqueConstraint("task_set_id", "name", name=op.f("uq_task_task_set_id_name")),
        schema="label",
        comment="One clinical question: which outcome, in which risk window, how history and death count.",
    )
    op.create_table(
        "task_candidate",
        sa.Column("task_set_id", sa.Integer(), nullable=False, comment="Set"),
        sa.Column("concept_id", sa.Integer(), autoincrement=False, nullable=False, comment="Concept"),
        sa.Column("rank", sa.Integer(), nullable=False, comment="Order by score, ties by concept_id"),
        sa.Column("persons", sa.Integer(), nullable=False, comment="Train persons with it or a descendant ever"),
        sa.Column(
            "base_persons",
            sa.Integer(),
            nullable=False,
            comment="The same for its rarest parent (all train persons where it has none)",
        ),
        sa.Column("entropy", sa.Float(), nullable=False, comment="Score: base · (q ln q + (1-q) ln(1-q))"),
        sa.Column("num_train_events", sa.Integer(), nullable=False, comment="Train persons with it after an index"),
        sa.Column("verdict", sa.Text(), nullable=False, comment="chosen, too_few_events, beyond_size or banned"),
        sa.ForeignKeyConstraint(
            ["task_set_id"],
            ["label.task_set.task_set_id"],
            name=op.f("fk_task_candidate_task_set_id_task_set"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("task_set_id", "concept_id", name=op.f("pk_task_candidate")),
        schema="label",
        comment="Concepts weighed as pretraining tasks, in order, with the verdict.",
    )
    op.create_table(
        "feature",
        sa.Column("cohort_member_id", sa.BigInteger(), nullable=False, comment="Member"),
        sa.Column("name", sa.Text(), nullable=False, comment="Feature"),
        sa.Column("value", sa.REAL(), nullable=True, comment="Value"),
        sa.ForeignKeyConstraint(
            ["cohort_member_id"],
            ["label.cohort_member.cohort_member_id"],
            name=op.f("fk_feature_cohort_member_id_cohort_member"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("cohort_member_id", "name", name=op.f("pk_feature")),
        schema="label",
        comment="Numbers known at the index; they look back only.",
    )
    op.create_table(
        "task_status_count",
        sa.Column("label_set_id", sa.Integer(), nullable=False, comment="Label set"),
        sa.Column("position", sa.SmallInteger(), autoincrement=False, nullable=False, comment="Task"),
        sa.Column("split", sa.Text(), nullable=False, comment="Split"),
        sa.Column("status", sa.Text(), nullable=False, comment="event, competing, censored, prior or ineligible"),
        sa.Column("n", sa.Integer(), nullable=False, comment="Scans"),
        sa.Column("persons", sa.Integer(), nullable=False, comment="Persons"),
        sa.Column("person_days", sa.Float(), nullable=False, comment="Days at risk inside the window"),
        sa.ForeignKeyConstraint(
            ["label_set_id"],
            ["label.label_set.label_set_id"],
            name=op.f("fk_task_status_count_label_set_id_label_set"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("label_set_id", "position", "split", "status", name=op.f("pk_task_status_count")),
        schema="label",
        comment="Members by task, split and status, stored when a label set commits.",
    )
    op.create_table(
        "tte",
        sa.Column("label_set_id", sa.Integer(), nullable=False, comment="Label set"),
        sa.Column("cohort_member_id", sa.BigInteger(), autoincrement=False, nullable=False, comment="Member"),
        sa.Column(
            "event_tasks",
            postgresql.ARRAY(sa.SmallInteger()),
            nullable=False,
            comment="Positions of tasks whose outcome was observed (status event), ascending",
        ),
        sa.Column(
            "event_seconds",
            postgresql.ARRAY(sa.BigInteger()),
            nullable=False,
            comment="Their times, seconds from the index",
        ),
        sa.Column(
            "prior_tasks",
            postgresql.ARRAY(sa.SmallInteger()),
            nullable=False,
            comment="Tasks with history before the window opens, ascending",
        ),
        sa.Column(
            "ineligible_tasks",
            postgresql.ARRAY(sa.SmallInteger()),
            nullable=False,
            comment="Tasks ineligible for this member alone, ascending",
        ),
        sa.Column(
            "window_tasks",
            postgresql.ARRAY(sa.SmallInteger()),
            nullable=False,
            comment="Tasks whose window opens elsewhere than at start_seconds, ascending",
        ),
        sa.Column(
            "window_seconds", postgresql.ARRAY(sa.BigInteger()), nullable=False, comment="Where, seconds from the index"
        ),
        sa.Column(
            "visit_tasks",
            postgresql.ARRAY(sa.SmallInteger()),
            nullable=False,
            comment="Tasks seen in the visit that holds the index",
        ),
        sa.Column(
            "follow_up_seconds", sa.BigInteger(), nullable=True, comment="End of follow-up, seconds from the index"
        ),
        sa.Column("data_cut_seconds", sa.BigInteger(), nullable=True, comment="End for tasks followed to the data cut"),
        sa.Column("death_seconds", sa.BigInteger(), nullable=True, comment="Death, where recorded"),
        sa.ForeignKeyConstraint(
            ["label_set_id"],
            ["label.label_set.label_set_id"],
            name=op.f("fk_tte_label_set_id_label_set"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("label_set_id", "cohort_member_id", name=op.f("pk_tte")),
        schema="label",
        comment="Labels as sparse arrays, one row a member; read them through label.tte_long or label.outcome.",
    )
    op.create_index("ix_tte_event_tasks", "tte", ["event_tasks"], unique=False, schema="label", postgresql_using="gin")
    # pglz would take longer than everything else that writing labels does
    for column in ("event_tasks", "event_seconds", "prior_tasks", "visit_tasks"):
        op.execute(f"ALTER TABLE label.tte ALTER {column} SET STORAGE EXTERNAL")


def downgrade() -> None:
    for table in reversed(TABLES):
        op.drop_table(table, schema="label")
    op.execute("DROP SCHEMA label CASCADE")
