"""What came from outside: persons, events, vocabulary and scans.

Revision 0002, after 0001.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

TABLES = (
    "concept",
    "concept_ancestor",
    "concept_relationship",
    "concept_synonym",
    "event",
    "timeline",
    "image_occurrence",
    "observation_period",
    "person",
    "visit_occurrence",
)


def upgrade() -> None:
    op.execute("CREATE SCHEMA IF NOT EXISTS omop")

    op.create_table(
        "concept",
        sa.Column("concept_id", sa.Integer(), autoincrement=False, nullable=False, comment="Concept"),
        sa.Column("concept_name", sa.Text(), nullable=False, comment="Name"),
        sa.Column("domain_id", sa.Text(), nullable=False, comment="Domain"),
        sa.Column("vocabulary_id", sa.Text(), nullable=False, comment="Vocabulary"),
        sa.Column("concept_class_id", sa.Text(), nullable=False, comment="Class"),
        sa.Column(
            "standard_concept", sa.CHAR(length=1), nullable=True, comment="S standard, C classification, null source"
        ),
        sa.Column("concept_code", sa.Text(), nullable=False, comment="Code in its vocabulary"),
        sa.Column("valid_start_date", sa.Date(), nullable=True, comment="Valid from"),
        sa.Column("valid_end_date", sa.Date(), nullable=True, comment="Valid to"),
        sa.Column("invalid_reason", sa.Text(), nullable=True, comment="D deleted, U updated"),
        sa.PrimaryKeyConstraint("concept_id", name=op.f("pk_concept")),
        schema="omop",
        comment="OMOP CONCEPT.",
    )
    op.create_index(
        op.f("ix_concept_vocabulary_id_concept_code"),
        "concept",
        ["vocabulary_id", "concept_code"],
        unique=False,
        schema="omop",
    )
    op.create_table(
        "concept_ancestor",
        sa.Column(
            "ancestor_concept_id", sa.Integer(), autoincrement=False, nullable=False, comment="The broader concept"
        ),
        sa.Column(
            "descendant_concept_id", sa.Integer(), autoincrement=False, nullable=False, comment="The narrower concept"
        ),
        sa.Column("min_levels_of_separation", sa.Integer(), nullable=False, comment="Shortest path"),
        sa.Column("max_levels_of_separation", sa.Integer(), nullable=False, comment="Longest path"),
        sa.PrimaryKeyConstraint("ancestor_concept_id", "descendant_concept_id", name=op.f("pk_concept_ancestor")),
        schema="omop",
        comment="OMOP CONCEPT_ANCESTOR.",
    )
    op.create_index(
        op.f("ix_concept_ancestor_descendant_concept_id"),
        "concept_ancestor",
        ["descendant_concept_id"],
        unique=False,
        schema="omop",
    )
    op.create_table(
        "concept_relationship",
        sa.Column("concept_id_1", sa.Integer(), autoincrement=False, nullable=False, comment="From"),
        sa.Column("concept_id_2", sa.Integer(), autoincrement=False, nullable=False, comment="To"),
        sa.Column("relationship_id", sa.Text(), nullable=False, comment="Kind, e.g. Maps to"),
        sa.Column("valid_start_date", sa.Date(), nullable=True, comment="Valid from"),
        sa.Column("valid_end_date", sa.Date(), nullable=True, comment="Valid to"),
        sa.Column("invalid_reason", sa.Text(), nullable=True, comment="D deleted, U updated"),
        sa.PrimaryKeyConstraint(
            "concept_id_1", "concept_id_2", "relationship_id", name=op.f("pk_concept_relationship")
        ),
        schema="omop",
        comment="OMOP CONCEPT_RELATIONSHIP.",
    )
    op.create_index(
        op.f("ix_concept_relationship_concept_id_2_relationship_id"),
        "concept_relationship",
        ["concept_id_2", "relationship_id"],
        unique=False,
        schema="omop",
    )
    op.create_table(
        "concept_synonym",
        sa.Column("concept_id", sa.Integer(), autoincrement=False, nullable=False, comment="Concept"),
        sa.Column("concept_synonym_name", sa.Text(), nullable=False, comment="Other name"),
        sa.Column("language_concept_id", sa.Integer(), nullable=False, comment="Language"),
        sa.PrimaryKeyConstraint(
            "concept_id", "concept_synonym_name", "language_concept_id", name=op.f("pk_concept_synonym")
        ),
        schema="omop",
        comment="OMOP CONCEPT_SYNONYM.",
    )
    op.create_table(
        "event",
        sa.Column("person_id", sa.BigInteger(), nullable=False, comment="Whose event"),
        sa.Column(
            "time",
            postgresql.TIMESTAMP(),
            nullable=False,
            comment="Start, naive local time; 23:59:59 of the day where date_only",
        ),
        sa.Column("date_only", sa.Boolean(), nullable=False, comment="True where the source gives no time of day"),
        sa.Column("concept_id", sa.Integer(), nullable=False, comment="Standard concept, 0 where unmapped"),
        sa.Column("source_concept_id", sa.Integer(), nullable=False, comment="Source concept, 0 where none"),
        sa.Column("value_as_number", sa.REAL(), nullable=True, comment="Numeric value (measurement, observation)"),
        sa.Column("value_as_concept_id", sa.Integer(), nullable=True, comment="Coded value"),
        sa.Column("unit_concept_id", sa.Integer(), nullable=True, comment="Unit of value_as_number"),
        sa.Column("end_time", postgresql.TIMESTAMP(), nullable=True, comment="End, where the table has one"),
        sa.Column(
            "visit_occurrence_id",
            sa.BigInteger(),
            nullable=True,
            comment="Visit, null where the extract names none that exists",
        ),
        sa.Column(
            "domain",
            sa.CHAR(length=1),
            nullable=False,
            comment="Its table: c condition, d drug, p procedure, e device, m measurement, o observation, s specimen, "
            "v visit, w visit_detail, x death",
        ),
        sa.Column(
            "source_row_id",
            sa.BigInteger(),
            nullable=False,
            comment="Primary key of the row in its table (person_id for death)",
        ),
        sa.Column("load_id", sa.Integer(), nullable=False, comment="The load that brought this row; the partition key"),
        schema="omop",
        comment="All clinical facts as one stream, one row each; partitioned by load_id.",
        postgresql_partition_by="LIST (load_id)",
    )
    op.create_index(
        op.f("ix_event_concept_id_person_id_time"),
        "event",
        ["concept_id", "person_id", "time"],
        unique=False,
        schema="omop",
    )
    op.create_index(op.f("ix_event_person_id_time"), "event", ["person_id", "time"], unique=False, schema="omop")
    op.create_table(
        "timeline",
        sa.Column("person_id", sa.BigInteger(), autoincrement=False, nullable=False, comment="Whose timeline"),
        sa.Column("num_events", sa.Integer(), nullable=False, comment="Number of events"),
        sa.Column(
            "times",
            sa.LargeBinary(),
            nullable=False,
            comment="int64 little-endian: seconds since 1970-01-01 00:00 times 2, plus 1 where date_only",
        ),
        sa.Column("concepts", sa.LargeBinary(), nullable=False, comment="int32 little-endian concept ids"),
        sa.Column("digest", sa.LargeBinary(), nullable=False, comment="First 16 bytes of sha256(times ‖ concepts)"),
        sa.PrimaryKeyConstraint("person_id", name=op.f("pk_timeline")),
        schema="omop",
        comment="Each person's events packed and sorted by (time, concept): what the label engine reads.",
    )
    op.create_table(
        "image_occurrence",
        sa.Column("image_occurrence_id", sa.BigInteger(), sa.Identity(always=False), nullable=False, comment="Key"),
        sa.Column("person_id", sa.BigInteger(), nullable=False, comment="Whose scan"),
        sa.Column(
            "acquired_at",
            postgresql.TIMESTAMP(),
            nullable=False,
            comment="Acquisition, naive local time; 23:59:59 where date_only",
        ),
        sa.Column("date_only", sa.Boolean(), nullable=False, comment="True where only the date is known"),
        sa.Column(
            "acquired_at_source",
            sa.Text(),
            nullable=False,
            comment="Where acquired_at came from: manifest, AcquisitionDateTime, SeriesDate, …",
        ),
        sa.Column("study_uid", sa.Text(), nullable=True, comment="Study instance UID"),
        sa.Column("series_uid", sa.Text(), nullable=True, comment="Series instance UID"),
        sa.Column(
            "image_key",
            sa.Text(),
            nullable=False,
            comment="Series UID, else root and path: what makes a series the same one again",
        ),
        sa.Column(
            "root",
            sa.Text(),
            nullable=False,
            comment="Name of the folder under which path lies; a host maps it by LACHESIS_ROOT_<NAME>",
        ),
        sa.Column("path", sa.Text(), nullable=False, comment="File or series folder, relative to its root"),
        sa.Column("format", sa.Text(), nullable=False, comment="nifti or dicom"),
        sa.Column("rows", sa.Integer(), nullable=True, comment="Voxels along the first in-plane axis as stored"),
        sa.Column("columns", sa.Integer(), nullable=True, comment="Voxels along the second in-plane axis as stored"),
        sa.Column("slices", sa.Integer(), nullable=True, comment="Number of slices"),
        sa.Column(
            "spacing_mm",
            postgresql.ARRAY(sa.REAL()),
            nullable=True,
            comment="Spacing as stored (row, column, slice), mm",
        ),
        sa.Column("slice_thickness_mm", sa.REAL(), nullable=True, comment="Slice thickness, mm"),
        sa.Column("kernel", sa.Text(), nullable=True, comment="Convolution kernel"),
        sa.Column(
            "orientation", sa.Text(), nullable=True, comment="axial, coronal, sagittal or oblique, or a NIfTI axis code"
        ),
        sa.Column(
            "hu_state",
            sa.Text(),
            server_default=sa.text("'unknown'"),
            nullable=False,
            comment="hu, rescaled, not_hu or unknown",
        ),
        sa.Column("verdict", sa.Text(), nullable=False, comment="ok, suspect or unusable"),
        sa.Column(
            "reasons",
            postgresql.ARRAY(sa.Text()),
            server_default=sa.text("'{}'"),
            nullable=False,
            comment="Why the verdict is not ok",
        ),
        sa.Column(
            "sha256", sa.LargeBinary(), nullable=True, comment="Digest of the content, known once voxels are first read"
        ),
        sa.Column(
            "details",
            postgresql.JSONB(astext_type=sa.Text()),
            server_default=sa.text("'{}'"),
            nullable=False,
            comment="Other header facts",
        ),
        sa.Column("load_id", sa.Integer(), nullable=False, comment="The load that brought this row"),
        sa.CheckConstraint("verdict IN ('ok', 'suspect', 'unusable')", name=op.f("ck_image_occurrence_verdict")),
        sa.ForeignKeyConstraint(["load_id"], ["ops.load.load_id"], name=op.f("fk_image_occurrence_load_id_load")),
        sa.PrimaryKeyConstraint("image_occurrence_id", name=op.f("pk_image_occurrence")),
        sa.UniqueConstraint(
            "person_id", "acquired_at", "image_key", name=op.f("uq_image_occurrence_person_id_acquired_at_image_key")
        ),
        schema="omop",
        comment="One row a CT series: whose, when, where its files are, its geometry and a verdict.",
    )
    op.create_index(op.f("ix_image_occurrence_load_id"), "image_occurrence", ["load_id"], unique=False, schema="omop")
    op.create_index(op.f("ix_image_occurrence_sha256"), "image_occurrence", ["sha256"], unique=False, schema="omop")
    op.create_table(
        "observation_period",
        sa.Column(
            "observation_period_id", sa.BigInteger(), autoincrement=False, nullable=False, comment="The extract's id"
        ),
        sa.Column("person_id", sa.BigInteger(), nullable=False, comment="Whose period"),
        sa.Column("start_date", sa.Date(), nullable=False, comment="First day"),
        sa.Column("end_date", sa.Date(), nullable=False, comment="Last day"),
        sa.Column("load_id", sa.Integer(), nullable=False, comment="The load that brought this row"),
        sa.ForeignKeyConstraint(["load_id"], ["ops.load.load_id"], name=op.f("fk_observation_period_load_id_load")),
        sa.PrimaryKeyConstraint("observation_period_id", name=op.f("pk_observation_period")),
        schema="omop",
        comment="Spans in which a person's record can be trusted to hold what happened.",
    )
    op.create_index(
        op.f("ix_observation_period_load_id"), "observation_period", ["load_id"], unique=False, schema="omop"
    )
    op.create_index(
        op.f("ix_observation_period_person_id"), "observation_period", ["person_id"], unique=False, schema="omop"
    )
    op.create_table(
        "person",
        sa.Column(
            "person_id",
            sa.BigInteger(),
            autoincrement=False,
            nullable=False,
            comment="The extract's person_id; the pseudonym used everywhere",
        ),
        sa.Column(
            "birth_time",
            postgresql.TIMESTAMP(),
            nullable=True,
            comment="Birth, naive local time; missing parts are the first of the year or month",
        ),
        sa.Column(
            "gender_concept_id",
            sa.Integer(),
            server_default=sa.text("0"),
            nullable=False,
            comment="OMOP gender concept, 0 unknown",
        ),
        sa.Column(
            "race_concept_id",
            sa.Integer(),
            server_default=sa.text("0"),
            nullable=False,
            comment="OMOP race concept, 0 unknown",
        ),
        sa.Column(
            "ethnicity_concept_id",
            sa.Integer(),
            server_default=sa.text("0"),
            nullable=False,
            comment="OMOP ethnicity concept, 0 unknown",
        ),
        sa.Column(
            "person_source_value",
            sa.Text(),
            nullable=True,
            comment="The source's own identifier; never shown to readers",
        ),
        sa.Column(
            "split",
            sa.Text(),
            nullable=True,
            comment="The extract's own split (train, tuning, held_out), where it has one",
        ),
        sa.Column("load_id", sa.Integer(), nullable=False, comment="The load that brought this row"),
        sa.ForeignKeyConstraint(["load_id"], ["ops.load.load_id"], name=op.f("fk_person_load_id_load")),
        sa.PrimaryKeyConstraint("person_id", name=op.f("pk_person")),
        schema="omop",
        comment="One row a person, as loaded; birth is birth_time.",
    )
    op.create_index(op.f("ix_person_load_id"), "person", ["load_id"], unique=False, schema="omop")
    op.create_index(
        op.f("ix_person_person_source_value"), "person", ["person_source_value"], unique=False, schema="omop"
    )
    op.create_table(
        "visit_occurrence",
        sa.Column(
            "visit_occurrence_id", sa.BigInteger(), autoincrement=False, nullable=False, comment="The extract's id"
        ),
        sa.Column("person_id", sa.BigInteger(), nullable=False, comment="Whose visit"),
        sa.Column(
            "visit_concept_id",
            sa.Integer(),
            nullable=False,
            comment="Kind of visit (9201 inpatient, 262 emergency and inpatient, …)",
        ),
        sa.Column(
            "visit_start_date",
            sa.Date(),
            sa.Computed("visit_start_datetime::date", persisted=True),
            nullable=False,
            comment="Day of the start",
        ),
        sa.Column(
            "visit_start_datetime",
            postgresql.TIMESTAMP(),
            nullable=False,
            comment="Start, naive local time; 23:59:59 where only a date is known",
        ),
        sa.Column(
            "visit_end_date",
            sa.Date(),
            sa.Computed("visit_end_datetime::date", persisted=True),
            nullable=True,
            comment="Day of the end",
        ),
        sa.Column("visit_end_datetime", postgresql.TIMESTAMP(), nullable=True, comment="End, likewise"),
        sa.Column("date_only", sa.Boolean(), nullable=False, comment="True where start is known as a date only"),
        sa.Column("end_date_only", sa.Boolean(), nullable=False, comment="True where the end is known as a date only"),
        sa.Column("discharged_to_concept_id", sa.Integer(), nullable=True, comment="Where to"),
        sa.Column(
            "preceding_visit_occurrence_id",
            sa.BigInteger(),
            nullable=True,
            comment="The visit before, as the extract says",
        ),
        sa.Column("load_id", sa.Integer(), nullable=False, comment="The load that brought this row"),
        sa.ForeignKeyConstraint(["load_id"], ["ops.load.load_id"], name=op.f("fk_visit_occurrence_load_id_load")),
        sa.PrimaryKeyConstraint("visit_occurrence_id", name=op.f("pk_visit_occurrence")),
        schema="omop",
        comment="Visits with their ends; their starts are events, too.",
    )
    op.create_index(op.f("ix_visit_occurrence_load_id"), "visit_occurrence", ["load_id"], unique=False, schema="omop")
    op.create_index(
        op.f("ix_visit_occurrence_person_id_visit_start_datetime"),
        "visit_occurrence",
        ["person_id", "visit_start_datetime"],
        unique=False,
        schema="omop",
    )

    op.execute("ALTER TABLE omop.timeline ALTER times SET STORAGE EXTERNAL, ALTER concepts SET STORAGE EXTERNAL")


def downgrade() -> None:
    for table in reversed(TABLES):
        op.drop_table(table, schema="omop")
    op.execute("DROP SCHEMA omop CASCADE")
