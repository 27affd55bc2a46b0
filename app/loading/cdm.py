"""OMOP CDM 5.2 to 5.4 as this loader reads it: the tables, their columns, and where an event's parts stand.

Columns are those of all versions' field lists (https://ohdsi.github.io/CommonDataModel/), so that a header cell is
known by name whichever version wrote it.
"""

from __future__ import annotations

from dataclasses import dataclass

DEATH_CONCEPT = 4306655


@dataclass(frozen=True, kw_only=True, slots=True)
class EventTable:
    """Where one OMOP table keeps the parts of an event; None where it has no such column."""

    name: str
    domain: str
    """Its letter in omop.event.domain."""
    key: str
    concept: str | None
    date: str
    datetime: str
    source_concept: str | None = None
    end_date: str | None = None
    end_datetime: str | None = None
    number: str | None = None
    value_concept: str | None = None
    unit: str | None = None
    visit: str | None = "visit_occurrence_id"

    @property
    def required(self) -> tuple[str, ...]:
        """Columns without which no row can be read; of date and datetime either will do."""
        return tuple(dict.fromkeys(c for c in (self.key, "person_id", self.concept) if c))


def _table(name: str, domain: str, stem: str, start: str, end: str | None = None, **more: str | None) -> EventTable:
    return EventTable(
        name=name,
        domain=domain,
        key=f"{name}_id",
        concept=f"{stem}_concept_id",
        source_concept=f"{stem}_source_concept_id",
        date=f"{start}_date",
        datetime=f"{start}_datetime",
        end_date=f"{end}_date" if end else None,
        end_datetime=f"{end}_datetime" if end else None,
        **more,
    )


_MEASURED = {"number": "value_as_number", "value_concept": "value_as_concept_id", "unit": "unit_concept_id"}

VISIT = _table("visit_occurrence", "v", "visit", "visit_start", "visit_end")
EVENT_TABLES: tuple[EventTable, ...] = (
    VISIT,
    _table("condition_occurrence", "c", "condition", "condition_start", "condition_end"),
    _table("drug_exposure", "d", "drug", "drug_exposure_start", "drug_exposure_end"),
    _table("procedure_occurrence", "p", "procedure", "procedure", "procedure_end"),
    _table("device_exposure", "e", "device", "device_exposure_start", "device_exposure_end"),
    _table("measurement", "m", "measurement", "measurement", **_MEASURED),
    _table("observation", "o", "observation", "observation", **_MEASURED),
    EventTable(
        name="specimen",
        domain="s",
        key="specimen_id",
        concept="specimen_concept_id",
        date="specimen_date",
        datetime="specimen_datetime",
        visit=None,
    ),
    _table("visit_detail", "w", "visit_detail", "visit_detail_start", "visit_detail_end"),
    EventTable(
        name="death",
        domain="x",
        key="person_id",
        concept=None,
        date="death_date",
        datetime="death_datetime",
        value_concept="cause_concept_id",
        visit=None,
    ),
)
EVENTS = {table.name: table for table in EVENT_TABLES}


@dataclass(frozen=True, kw_only=True, slots=True)
class VocabularyTable:
    """A vocabulary table as it is kept: (column, kind) with kind int, text or date, and its primary key."""

    name: str
    columns: tuple[tuple[str, str], ...]
    key: tuple[str, ...]
    optional: tuple[str, ...] = ()
    """Columns that may be null or absent."""

    @property
    def required(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.columns if name not in self.optional)


_VALID = (("valid_start_date", "date"), ("valid_end_date", "date"), ("invalid_reason", "text"))
_OPTIONAL = tuple(name for name, _ in _VALID)

VOCABULARY_TABLES: tuple[VocabularyTable, ...] = (
    VocabularyTable(
        name="concept",
        columns=(
            ("concept_id", "int"),
            ("concept_name", "text"),
            ("domain_id", "text"),
            ("vocabulary_id", "text"),
            ("concept_class_id", "text"),
            ("standard_concept", "text"),
            ("concept_code", "text"),
            *_VALID,
        ),
        key=("concept_id",),
        optional=("standard_concept", *_OPTIONAL),
    ),
    VocabularyTable(
        name="concept_ancestor",
        columns=(
            ("ancestor_concept_id", "int"),
            ("descendant_concept_id", "int"),
            ("min_levels_of_separation", "int"),
            ("max_levels_of_separation", "int"),
        ),
        key=("ancestor_concept_id", "descendant_concept_id"),
    ),
    VocabularyTable(
        name="concept_relationship",
        columns=(("concept_id_1", "int"), ("concept_id_2", "int"), ("relationship_id", "text"), *_VALID),
        key=("concept_id_1", "concept_id_2", "relationship_id"),
        optional=_OPTIONAL,
    ),
    VocabularyTable(
        name="concept_synonym",
        columns=(("concept_id", "int"), ("concept_synonym_name", "text"), ("language_concept_id", "int")),
        key=("concept_id", "concept_synonym_name", "language_concept_id"),
    ),
)
VOCABULARY = {table.name: table for table in VOCABULARY_TABLES}

_EVENT_TAIL = "provider_id visit_occurrence_id visit_detail_id"
_COLUMNS = {
    "person": (
        "person_id gender_concept_id year_of_birth month_of_birth day_of_birth birth_datetime death_datetime "
        "race_concept_id ethnicity_concept_id location_id provider_id care_site_id person_source_value "
        "gender_source_value gender_source_concept_id race_source_value race_source_concept_id "
        "ethnicity_source_value ethnicity_source_concept_id"
    ),
    "observation_period": (
        "observation_period_id person_id observation_period_start_date observation_period_end_date "
        "period_type_concept_id"
    ),
    "visit_occurrence": (
        "visit_occurrence_id person_id visit_concept_id visit_start_date visit_start_datetime visit_end_date "
        "visit_end_datetime visit_type_concept_id provider_id care_site_id visit_source_value "
        "visit_source_concept_id admitted_from_concept_id admitted_from_source_value discharged_to_concept_id "
        "discharged_to_source_value preceding_visit_occurrence_id admitting_source_concept_id "
        "admitting_source_value discharge_to_concept_id discharge_to_source_value"
    ),
    "visit_detail": (
        "visit_detail_id person_id visit_detail_concept_id visit_detail_start_date visit_detail_start_datetime "
        "visit_detail_end_date visit_detail_end_datetime visit_detail_type_concept_id provider_id care_site_id "
        "visit_detail_source_value visit_detail_source_concept_id admitted_from_concept_id "
        "admitted_from_source_value discharged_to_concept_id discharged_to_source_value "
        "preceding_visit_detail_id parent_visit_detail_id visit_occurrence_id admitting_source_concept_id "
        "admitting_source_value discharge_to_concept_id discharge_to_source_value visit_detail_parent_id"
    ),
    "condition_occurrence": (
        "condition_occurrence_id person_id condition_concept_id condition_start_date condition_start_datetime "
        "condition_end_date condition_end_datetime condition_type_concept_id condition_status_concept_id "
        f"stop_reason {_EVENT_TAIL} condition_source_value condition_source_concept_id "
        "condition_status_source_value"
    ),
    "drug_exposure": (
        "drug_exposure_id person_id drug_concept_id drug_exposure_start_date drug_exposure_start_datetime "
        "drug_exposure_end_date drug_exposure_end_datetime verbatim_end_date drug_type_concept_id stop_reason "
        f"refills quantity days_supply sig route_concept_id lot_number {_EVENT_TAIL} drug_source_value "
        "drug_source_concept_id route_source_value dose_unit_source_value"
    ),
    "procedure_occurrence": (
        "procedure_occurrence_id person_id procedure_concept_id procedure_date procedure_datetime "
        "procedure_end_date procedure_end_datetime procedure_type_concept_id modifier_concept_id quantity "
        f"{_EVENT_TAIL} procedure_source_value procedure_source_concept_id modifier_source_value"
    ),
    "device_exposure": (
        "device_exposure_id person_id device_concept_id device_exposure_start_date "
        "device_exposure_start_datetime device_exposure_end_date device_exposure_end_datetime "
        f"device_type_concept_id unique_device_id production_id quantity {_EVENT_TAIL} device_source_value "
        "device_source_concept_id unit_concept_id unit_source_value unit_source_concept_id"
    ),
    "measurement": (
        "measurement_id person_id measurement_concept_id measurement_date measurement_datetime measurement_time "
        "measurement_type_concept_id operator_concept_id value_as_number value_as_concept_id unit_concept_id "
        f"range_low range_high {_EVENT_TAIL} measurement_source_value measurement_source_concept_id "
        "unit_source_value unit_source_concept_id value_source_value measurement_event_id "
        "meas_event_field_concept_id"
    ),
    "observation": (
        "observation_id person_id observation_concept_id observation_date observation_datetime "
        "observation_type_concept_id value_as_number value_as_string value_as_concept_id qualifier_concept_id "
        f"unit_concept_id {_EVENT_TAIL} observation_source_value observation_source_concept_id "
        "unit_source_value qualifier_source_value value_source_value observation_event_id "
        "obs_event_field_concept_id"
    ),
    "specimen": (
        "specimen_id person_id specimen_concept_id specimen_type_concept_id specimen_date specimen_datetime "
        "quantity unit_concept_id anatomic_site_concept_id disease_status_concept_id specimen_source_id "
        "specimen_source_value unit_source_value anatomic_site_source_value disease_status_source_value"
    ),
    "death": (
        "person_id death_date death_datetime death_type_concept_id cause_concept_id cause_source_value "
        "cause_source_concept_id"
    ),
    "cdm_source": (
        "cdm_source_name cdm_source_abbreviation cdm_holder source_description source_documentation_reference "
        "cdm_etl_reference source_release_date cdm_release_date cdm_version cdm_version_concept_id "
        "vocabulary_version"
    ),
}
DELETED = "deleted"
"""A column of ours: in a file of an upsert it marks rows that are to go."""

COLUMNS: dict[str, frozenset[str]] = {
    **{name: frozenset([*columns.split(), DELETED]) for name, columns in _COLUMNS.items()},
    **{table.name: frozenset(name for name, _ in table.columns) for table in VOCABULARY_TABLES},
}
"""Every column of every table that is read, of all versions, and `deleted`."""

TEXT_COLUMNS: dict[str, dict[str, str]] = {
    "person": {"person_source_value": "words"},
    "cdm_source": dict.fromkeys(("cdm_source_name", "cdm_holder", "cdm_version", "vocabulary_version"), "words"),
    **{
        table.name: {name: "" for name, kind in table.columns if kind == "text" and name not in table.optional}
        for table in VOCABULARY_TABLES
    },
}
"""Columns whose text may be `NULL` or `None` and mean it, with the macro that tells missing values; none where no text
is missing: a vocabulary's names and codes always have a value."""

OTHER_TABLES = frozenset(
    [
        "attribute_definition",
        "care_site",
        "cohort",
        "cohort_attribute",
        "cohort_definition",
        "concept_class",
        "condition_era",
        "cost",
        "domain",
        "dose_era",
        "drug_era",
        "drug_strength",
        "episode",
        "episode_event",
        "fact_relationship",
        "location",
        "metadata",
        "note",
        "note_nlp",
        "payer_plan_period",
        "provider",
        "relationship",
        "source_to_concept_map",
        "vocabulary",
    ]
)
"""CDM tables that are left aside, and named in the result."""


def required_columns(table: str) -> tuple[tuple[str, ...], ...]:
    """What a header must hold: one column out of each group."""
    if table in EVENTS:
        event = EVENTS[table]
        return (*((name,) for name in event.required), (event.date, event.datetime))
    if table in VOCABULARY:
        return tuple((name,) for name in VOCABULARY[table].required)
    if table == "person":
        return (("person_id",), ("gender_concept_id",), ("year_of_birth", "birth_datetime"))
    if table == "observation_period":
        columns = "observation_period_id person_id observation_period_start_date observation_period_end_date"
        return tuple((name,) for name in columns.split())
    return (("cdm_source_name",),)


_PERSON = (
    "person_id gender_concept_id year_of_birth month_of_birth day_of_birth birth_datetime race_concept_id "
    "ethnicity_concept_id person_source_value"
)


def used_columns(table: str) -> tuple[str, ...]:
    """The columns of a table that are loaded, of all versions of the CDM."""
    if table in VOCABULARY:
        return tuple(name for name, _ in VOCABULARY[table].columns)
    if table in EVENTS:
        t = EVENTS[table]
        columns = [t.key, "person_id", t.concept, t.source_concept, t.date, t.datetime, t.end_date, t.end_datetime]
        columns += [t.number, t.value_concept, t.unit, t.visit]
        if table == "visit_occurrence":
            columns += ["discharged_to_concept_id", "discharge_to_concept_id", "preceding_visit_occurrence_id"]
        return tuple(dict.fromkeys(column for column in columns if column))
    if table == "person":
        return tuple(_PERSON.split())
    if table == "observation_period":
        return tuple(name for (name,) in required_columns(table))
    return ("cdm_source_name", "cdm_holder", "cdm_version", "vocabulary_version", "source_release_date")
