"""What came from outside: persons, one stream of events, vocabulary and scans, in OMOP's own words."""

from __future__ import annotations

import datetime as dt
from typing import Any

from sqlalchemy import (
    CHAR,
    REAL,
    BigInteger,
    Boolean,
    CheckConstraint,
    Computed,
    Date,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    PrimaryKeyConstraint,
    Text,
    UniqueConstraint,
    literal_column,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.dialects.postgresql import CHAR as PG_CHAR
from sqlalchemy.orm import Mapped

from app.schema.base import NAIVE, Base, column


class Person(Base):
    """One person."""

    __tablename__ = "person"
    __table_args__ = (
        Index(None, "person_source_value"),
        Index(None, "load_id"),
        {"schema": "omop", "comment": "One row a person, as loaded; birth is birth_time."},
    )

    person_id: Mapped[int] = column(
        "The extract's person_id; the pseudonym used everywhere", BigInteger, primary_key=True, autoincrement=False
    )
    birth_time: Mapped[dt.datetime | None] = column(
        "Birth, naive local time; missing parts are the first of the year or month", NAIVE
    )
    gender_concept_id: Mapped[int] = column("OMOP gender concept, 0 unknown", Integer, server_default=text("0"))
    race_concept_id: Mapped[int] = column("OMOP race concept, 0 unknown", Integer, server_default=text("0"))
    ethnicity_concept_id: Mapped[int] = column("OMOP ethnicity concept, 0 unknown", Integer, server_default=text("0"))
    person_source_value: Mapped[str | None] = column("The source's own identifier; never shown to readers", Text)
    split: Mapped[str | None] = column("The extract's own split (train, tuning, held_out), where it has one", Text)
    load_id: Mapped[int] = column("The load that brought this row", ForeignKey("ops.load.load_id"))


class ObservationPeriod(Base):
    """A span of time in which the record can be trusted."""

    __tablename__ = "observation_period"
    __table_args__ = (
        Index(None, "person_id"),
        Index(None, "load_id"),
        {"schema": "omop", "comment": "Spans in which a person's record can be trusted to hold what happened."},
    )

    observation_period_id: Mapped[int] = column("The extract's id", BigInteger, primary_key=True, autoincrement=False)
    person_id: Mapped[int] = column("Whose period", BigInteger)
    start_date: Mapped[dt.date] = column("First day", Date)
    end_date: Mapped[dt.date] = column("Last day", Date)
    load_id: Mapped[int] = column("The load that brought this row", ForeignKey("ops.load.load_id"))


class VisitOccurrence(Base):
    """A visit, with its end."""

    __tablename__ = "visit_occurrence"
    __table_args__ = (
        Index(None, "person_id", "visit_start_datetime"),
        Index(None, "load_id"),
        {"schema": "omop", "comment": "Visits with their ends; their starts are events, too."},
    )

    visit_occurrence_id: Mapped[int] = column("The extract's id", BigInteger, primary_key=True, autoincrement=False)
    person_id: Mapped[int] = column("Whose visit", BigInteger)
    visit_concept_id: Mapped[int] = column("Kind of visit (9201 inpatient, 262 emergency and inpatient, …)", Integer)
    visit_start_date: Mapped[dt.date] = column(
        "Day of the start", Date, Computed("visit_start_datetime::date", persisted=True), nullable=False
    )
    visit_start_datetime: Mapped[dt.datetime] = column(
        "Start, naive local time; 23:59:59 where only a date is known", NAIVE
    )
    visit_end_date: Mapped[dt.date | None] = column(
        "Day of the end", Date, Computed("visit_end_datetime::date", persisted=True)
    )
    visit_end_datetime: Mapped[dt.datetime | None] = column("End, likewise", NAIVE)
    date_only: Mapped[bool] = column("True where start is known as a date only", Boolean)
    end_date_only: Mapped[bool] = column("True where the end is known as a date only", Boolean)
    discharged_to_concept_id: Mapped[int | None] = column("Where to", Integer)
    preceding_visit_occurrence_id: Mapped[int | None] = column("The visit before, as the extract says", BigInteger)
    load_id: Mapped[int] = column("The load that brought this row", ForeignKey("ops.load.load_id"))


class Event(Base):
    """One row of a timeline. Partitioned by load; (load_id, domain, source_row_id) finds its source."""

    __tablename__ = "event"
    __table_args__ = (
        Index(None, "person_id", "time"),
        Index(None, "concept_id", "person_id", "time"),
        {
            "schema": "omop",
            "comment": "All clinical facts as one stream, one row each; partitioned by load_id.",
            "postgresql_partition_by": "LIST (load_id)",
        },
    )
    __mapper_args__ = {"primary_key": ["load_id", "domain", "source_row_id"]}

    person_id: Mapped[int] = column("Whose event", BigInteger)
    time: Mapped[dt.datetime] = column("Start, naive local time; 23:59:59 of the day where date_only", NAIVE)
    date_only: Mapped[bool] = column("True where the source gives no time of day", Boolean)
    concept_id: Mapped[int] = column("Standard concept, 0 where unmapped", Integer)
    source_concept_id: Mapped[int] = column("Source concept, 0 where none", Integer)
    value_as_number: Mapped[float | None] = column("Numeric value (measurement, observation)", REAL)
    value_as_concept_id: Mapped[int | None] = column("Coded value", Integer)
    unit_concept_id: Mapped[int | None] = column("Unit of value_as_number", Integer)
    end_time: Mapped[dt.datetime | None] = column("End, where the table has one", NAIVE)
    visit_occurrence_id: Mapped[int | None] = column("Visit, null where the extract names none that exists", BigInteger)
    domain: Mapped[str] = column(
        "Its table: c condition, d drug, p procedure, e device, m measurement, o observation, s specimen, "
        "v visit, w visit_detail, x death",
        PG_CHAR(1),
    )
    source_row_id: Mapped[int] = column("Primary key of the row in its table (person_id for death)", BigInteger)
    load_id: Mapped[int] = column("The load that brought this row; the partition key", Integer)
    unknown_visit_id: Mapped[int | None] = column(
        "Visit that the extract names and does not hold; it becomes visit_occurrence_id when it comes", BigInteger
    )


class StaticFact(Base):
    """A fact without a time."""

    __tablename__ = "static_fact"
    __table_args__ = (
        CheckConstraint("fills IN ('gender', 'race', 'ethnicity')", name="fills"),
        Index(None, "person_id"),
        PrimaryKeyConstraint("load_id", "source_row_id"),
        {
            "schema": "omop",
            "comment": "Facts about a person without a time, as MEDS has them; no events, so no label sees them.",
        },
    )

    person_id: Mapped[int] = column("Whose fact", BigInteger)
    source_row_id: Mapped[int] = column("Number of the row in its delivery", BigInteger)
    concept_id: Mapped[int] = column("Concept of its code", Integer)
    value_as_number: Mapped[float | None] = column("Numeric value", REAL)
    unit_concept_id: Mapped[int | None] = column("Unit of value_as_number", Integer)
    fills: Mapped[str | None] = column(
        "Column of omop.person that it fills: gender, race or ethnicity; null where it fills none", Text
    )
    at_birth: Mapped[bool] = column("True where the source gives the time of birth, not none", Boolean)
    load_id: Mapped[int] = column("The load that brought this row", ForeignKey("ops.load.load_id"))


class Timeline(Base):
    """A person's events, packed."""

    __tablename__ = "timeline"
    __table_args__ = {
        "schema": "omop",
        "comment": "Each person's events packed and sorted by (time, concept): what the label engine reads.",
    }

    person_id: Mapped[int] = column("Whose timeline", BigInteger, primary_key=True, autoincrement=False)
    num_events: Mapped[int] = column("Number of events", Integer)
    times: Mapped[bytes] = column(
        "int64 little-endian: seconds since 1970-01-01 00:00 times 2, plus 1 where date_only", LargeBinary
    )
    concepts: Mapped[bytes] = column("int32 little-endian concept ids", LargeBinary)
    digest: Mapped[bytes] = column("First 16 bytes of sha256(times ‖ concepts)", LargeBinary)


class Concept(Base):
    """A coded idea in a vocabulary."""

    __tablename__ = "concept"
    __table_args__ = (
        Index(None, "vocabulary_id", "concept_code"),
        Index("ix_concept_words", text("omop.search_words(concept_name)"), postgresql_using="gin"),
        Index(
            "ix_concept_code",
            literal_column("lower(concept_code)").label("lower_code"),
            postgresql_ops={"lower_code": "text_pattern_ops"},
        ),
        {"schema": "omop", "comment": "OMOP CONCEPT."},
    )

    concept_id: Mapped[int] = column("Concept", Integer, primary_key=True, autoincrement=False)
    concept_name: Mapped[str] = column("Name", Text)
    domain_id: Mapped[str] = column("Domain", Text)
    vocabulary_id: Mapped[str] = column("Vocabulary", Text)
    concept_class_id: Mapped[str] = column("Class", Text)
    standard_concept: Mapped[str | None] = column("S standard, C classification, null source", CHAR(1))
    concept_code: Mapped[str] = column("Code in its vocabulary", Text)
    valid_start_date: Mapped[dt.date | None] = column("Valid from", Date)
    valid_end_date: Mapped[dt.date | None] = column("Valid to", Date)
    invalid_reason: Mapped[str | None] = column("D deleted, U updated", Text)


class ConceptAncestor(Base):
    """Broader concepts of a concept."""

    __tablename__ = "concept_ancestor"
    __table_args__ = (
        Index(None, "descendant_concept_id"),
        {"schema": "omop", "comment": "OMOP CONCEPT_ANCESTOR."},
    )

    ancestor_concept_id: Mapped[int] = column("The broader concept", Integer, primary_key=True, autoincrement=False)
    descendant_concept_id: Mapped[int] = column("The narrower concept", Integer, primary_key=True, autoincrement=False)
    min_levels_of_separation: Mapped[int] = column("Shortest path", Integer)
    max_levels_of_separation: Mapped[int] = column("Longest path", Integer)


class ConceptRelationship(Base):
    """Relations between concepts."""

    __tablename__ = "concept_relationship"
    __table_args__ = (
        Index(None, "concept_id_2", "relationship_id"),
        {"schema": "omop", "comment": "OMOP CONCEPT_RELATIONSHIP."},
    )

    concept_id_1: Mapped[int] = column("From", Integer, primary_key=True, autoincrement=False)
    concept_id_2: Mapped[int] = column("To", Integer, primary_key=True, autoincrement=False)
    relationship_id: Mapped[str] = column("Kind, e.g. Maps to", Text, primary_key=True)
    valid_start_date: Mapped[dt.date | None] = column("Valid from", Date)
    valid_end_date: Mapped[dt.date | None] = column("Valid to", Date)
    invalid_reason: Mapped[str | None] = column("D deleted, U updated", Text)


class ConceptSynonym(Base):
    """Other names of a concept."""

    __tablename__ = "concept_synonym"
    __table_args__ = (
        PrimaryKeyConstraint("concept_id", "concept_synonym_name", "language_concept_id"),
        Index("ix_concept_synonym_words", text("omop.search_words(concept_synonym_name)"), postgresql_using="gin"),
        {"schema": "omop", "comment": "OMOP CONCEPT_SYNONYM."},
    )

    concept_id: Mapped[int] = column("Concept", Integer, autoincrement=False)
    concept_synonym_name: Mapped[str] = column("Other name", Text)
    language_concept_id: Mapped[int] = column("Language", Integer)


class Vocabulary(Base):
    """A vocabulary and its version."""

    __tablename__ = "vocabulary"
    __table_args__ = {"schema": "omop", "comment": "OMOP VOCABULARY of the vocabulary that was loaded last."}

    vocabulary_id: Mapped[str] = column("Vocabulary, e.g. SNOMED; None is the whole", Text, primary_key=True)
    vocabulary_name: Mapped[str] = column("Name", Text)
    vocabulary_reference: Mapped[str | None] = column("Where it is described", Text)
    vocabulary_version: Mapped[str | None] = column("Its version", Text)
    vocabulary_concept_id: Mapped[int | None] = column("Concept that stands for it", Integer)


class ConceptCount(Base):
    """How often a source names a concept."""

    __tablename__ = "concept_count"
    __table_args__ = (
        PrimaryKeyConstraint("source_id", "concept_id"),
        Index(None, "concept_id"),
        {
            "schema": "omop",
            "comment": "How often a source's events name a concept; kept by every load. "
            "Persons of two sources never mix.",
        },
    )

    source_id: Mapped[int] = column("Source", ForeignKey("ops.source.source_id"))
    concept_id: Mapped[int] = column("Concept, in the vocabulary or not; 0 unmapped", Integer)
    num_events: Mapped[int] = column("Events with this concept_id", BigInteger)
    num_persons: Mapped[int] = column("Persons who have such an event", BigInteger)
    num_source_events: Mapped[int] = column("Events with this source_concept_id", BigInteger)
    num_value_events: Mapped[int] = column("Events whose coded value or unit it is", BigInteger)


class ConceptCompleted(Base):
    """A concept that was looked up."""

    __tablename__ = "concept_completed"
    __table_args__ = {
        "schema": "omop",
        "comment": "Concepts looked up in the current vocabulary release, found or not: later loads need not again.",
    }

    concept_id: Mapped[int] = column("Concept", Integer, primary_key=True, autoincrement=False)


class ImageOccurrence(Base):
    """One CT series."""

    __tablename__ = "image_occurrence"
    __table_args__ = (
        CheckConstraint("verdict IN ('ok', 'suspect', 'unusable')", name="verdict"),
        UniqueConstraint("person_id", "acquired_at", "image_key"),
        Index(None, "sha256"),
        Index(None, "load_id"),
        {
            "schema": "omop",
            "comment": "One row a CT series: whose, when, where its files are, its geometry and a verdict.",
        },
    )

    image_occurrence_id: Mapped[int] = column("Key", BigInteger, Identity(), primary_key=True)
    person_id: Mapped[int] = column("Whose scan", BigInteger)
    acquired_at: Mapped[dt.datetime] = column("Acquisition, naive local time; 23:59:59 where date_only", NAIVE)
    date_only: Mapped[bool] = column("True where only the date is known", Boolean)
    acquired_at_source: Mapped[str] = column(
        "Where acquired_at came from: manifest, AcquisitionDateTime, SeriesDate, …", Text
    )
    study_uid: Mapped[str | None] = column("Study instance UID", Text)
    series_uid: Mapped[str | None] = column("Series instance UID", Text)
    image_key: Mapped[str] = column("Series UID, else root and path: what makes a series the same one again", Text)
    root: Mapped[str] = column("Name of the folder under which path lies; a host maps it by LACHESIS_ROOT_<NAME>", Text)
    path: Mapped[str] = column("File or series folder, relative to its root", Text)
    format: Mapped[str] = column("nifti or dicom", Text)
    rows: Mapped[int | None] = column("Voxels along the first in-plane axis as stored", Integer)
    columns: Mapped[int | None] = column("Voxels along the second in-plane axis as stored", Integer)
    slices: Mapped[int | None] = column("Number of slices", Integer)
    spacing_mm: Mapped[list[float] | None] = column("Spacing as stored (row, column, slice), mm", ARRAY(REAL))
    slice_thickness_mm: Mapped[float | None] = column("Slice thickness, mm", REAL)
    kernel: Mapped[str | None] = column("Convolution kernel", Text)
    orientation: Mapped[str | None] = column("axial, coronal, sagittal or oblique, or a NIfTI axis code", Text)
    hu_state: Mapped[str] = column("hu, rescaled, not_hu or unknown", Text, server_default=text("'unknown'"))
    verdict: Mapped[str] = column("ok, suspect or unusable", Text)
    reasons: Mapped[list[str]] = column("Why the verdict is not ok", ARRAY(Text), server_default=text("'{}'"))
    sha256: Mapped[bytes | None] = column("Digest of the content, known once voxels are first read", LargeBinary)
    details: Mapped[dict[str, Any]] = column("Other header facts", JSONB, server_default=text("'{}'"))
    load_id: Mapped[int] = column("The load that brought this row", ForeignKey("ops.load.load_id"))
