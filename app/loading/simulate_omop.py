"""The OMOP CDM 5.4 tables of a simulated cohort, row by row."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from app.loading import simulate_ehr as ehr

Row = Sequence[object]

FEMALE, MALE, OUTPATIENT, EHR_TYPE = 8532, 8507, 9202, 32817
VOCABULARY = "Lachesis simulated"
_EPOCH = dt.datetime(1970, 1, 1)
_FIRST_DAY, _LAST_DAY = "1970-01-01", "2099-12-31"
HOUR = 3600


@dataclass(frozen=True, slots=True)
class Table:
    """One file of the extract."""

    name: str
    columns: tuple[str, ...]
    rows: Callable[[Sequence[ehr.Person]], Iterable[Row]]


def moment(seconds: int, separator: str = " ") -> str:
    """Seconds since 1970 as local date and time."""
    return (_EPOCH + dt.timedelta(seconds=seconds)).isoformat(separator)


def day(seconds: int) -> str:
    """Their date."""
    return moment(seconds)[:10]


def _persons(drawn: Sequence[ehr.Person]) -> Iterable[Row]:
    for p in drawn:
        birth = day(p.birth_day * ehr.DAY)
        year, month, date = birth.split("-")
        gender = FEMALE if p.is_female else MALE
        source = f"simulated-{p.person_id}"
        yield p.person_id, gender, int(year), int(month), int(date), f"{birth} 00:00:00", 0, 0, source


def _periods(drawn: Sequence[ehr.Person]) -> Iterable[Row]:
    for p in drawn:
        yield p.person_id, p.person_id, day(p.period_start_day * ehr.DAY), day(p.follow_up_end), EHR_TYPE


def _visits(drawn: Sequence[ehr.Person]) -> Iterable[Row]:
    for p in drawn:
        start, end = p.scan - HOUR, min(p.scan + HOUR, p.follow_up_end)
        yield (p.person_id, p.person_id, OUTPATIENT, day(start), moment(start), day(end), moment(end), EHR_TYPE)


def _procedures(drawn: Sequence[ehr.Person]) -> Iterable[Row]:
    for p in drawn:
        yield p.person_id, p.person_id, ehr.CT_CONCEPT, day(p.scan), moment(p.scan), EHR_TYPE, p.person_id, "SIM-CT"


def _conditions(drawn: Sequence[ehr.Person]) -> Iterable[Row]:
    key = 0
    for p in drawn:
        for time, outcome, at_visit in p.conditions:
            key += 1
            visit = p.person_id if at_visit else None
            yield (
                key,
                p.person_id,
                outcome.concept_id,
                day(time),
                moment(time),
                EHR_TYPE,
                visit,
                f"SIM-{outcome.name.upper()}",
            )


def _deaths(drawn: Sequence[ehr.Person]) -> Iterable[Row]:
    for p in drawn:
        if p.death is not None:
            yield p.person_id, day(p.death), moment(p.death), EHR_TYPE


def _concepts(_: Sequence[ehr.Person]) -> Iterable[Row]:
    borrowed = (
        (0, "No matching concept", "Metadata", "None", "Undefined", None, "No matching concept"),
        (FEMALE, "FEMALE", "Gender", "Gender", "Gender", "S", "F"),
        (MALE, "MALE", "Gender", "Gender", "Gender", "S", "M"),
        (OUTPATIENT, "Outpatient Visit", "Visit", "Visit", "Visit", "S", "OP"),
        (EHR_TYPE, "EHR", "Type Concept", "Type Concept", "Type Concept", "S", "OMOP4976890"),
        (ehr.DEATH_CONCEPT, "Death", "Observation", "SNOMED", "Event", "S", "419620001"),
    )
    own = [(g.concept_id, g.title, "Condition", "Simulated group") for g in ehr.groups()]
    own += [(o.concept_id, o.title, "Condition", "Simulated finding") for o in ehr.findings()]
    own += [(o.concept_id, o.title, "Condition", "Simulated disease") for o in ehr.clinical()[:-1]]
    own.append((ehr.CT_CONCEPT, "Computed tomography of chest (simulated)", "Procedure", "Simulated procedure"))
    for row in borrowed:
        yield (*row, _FIRST_DAY, _LAST_DAY, None)
    for concept, name, domain, kind in own:
        yield (
            concept,
            name,
            domain,
            VOCABULARY,
            kind,
            "S",
            f"SIM-{concept - 2_000_000_000}",
            _FIRST_DAY,
            _LAST_DAY,
            None,
        )


def _ancestors(_: Sequence[ehr.Person]) -> Iterable[Row]:
    """Every concept with itself and all broader ones, with the number of steps between."""
    parent: dict[int, int | None] = {g.concept_id: g.parent_id for g in ehr.groups()}
    parent |= {o.concept_id: o.group_id for o in (*ehr.findings(), *ehr.clinical()[:-1])}
    parent |= {ehr.CT_CONCEPT: None, ehr.DEATH_CONCEPT: None}
    for concept in sorted(parent):
        ancestor: int | None = concept
        level = 0
        while ancestor is not None:
            yield ancestor, concept, level, level
            ancestor, level = parent[ancestor], level + 1


def _source(_: Sequence[ehr.Person]) -> Iterable[Row]:
    # No release date: follow-up ends by person, so that there is no day up to which the whole source is complete.
    description = "Made by a random number generator; no person stands behind it (docs/science.md section 5)"
    yield "Lachesis simulated cohort", "SIMULATED", "Lachesis", description, "5.4", VOCABULARY


TABLES = (
    Table(
        "person",
        (
            "person_id",
            "gender_concept_id",
            "year_of_birth",
            "month_of_birth",
            "day_of_birth",
            "birth_datetime",
            "race_concept_id",
            "ethnicity_concept_id",
            "person_source_value",
        ),
        _persons,
    ),
    Table(
        "observation_period",
        (
            "observation_period_id",
            "person_id",
            "observation_period_start_date",
            "observation_period_end_date",
            "period_type_concept_id",
        ),
        _periods,
    ),
    Table(
        "visit_occurrence",
        (
            "visit_occurrence_id",
            "person_id",
            "visit_concept_id",
            "visit_start_date",
            "visit_start_datetime",
            "visit_end_date",
            "visit_end_datetime",
            "visit_type_concept_id",
        ),
        _visits,
    ),
    Table(
        "procedure_occurrence",
        (
            "procedure_occurrence_id",
            "person_id",
            "procedure_concept_id",
            "procedure_date",
            "procedure_datetime",
            "procedure_type_concept_id",
            "visit_occurrence_id",
            "procedure_source_value",
        ),
        _procedures,
    ),
    Table(
        "condition_occurrence",
        (
            "condition_occurrence_id",
            "person_id",
            "condition_concept_id",
            "condition_start_date",
            "condition_start_datetime",
            "condition_type_concept_id",
            "visit_occurrence_id",
            "condition_source_value",
        ),
        _conditions,
    ),
    Table("death", ("person_id", "death_date", "death_datetime", "death_type_concept_id"), _deaths),
    Table(
        "concept",
        (
            "concept_id",
            "concept_name",
            "domain_id",
            "vocabulary_id",
            "concept_class_id",
            "standard_concept",
            "concept_code",
            "valid_start_date",
            "valid_end_date",
            "invalid_reason",
        ),
        _concepts,
    ),
    Table(
        "concept_ancestor",
        (
            "ancestor_concept_id",
            "descendant_concept_id",
            "min_levels_of_separation",
            "max_levels_of_separation",
        ),
        _ancestors,
    ),
    Table(
        "cdm_source",
        (
            "cdm_source_name",
            "cdm_source_abbreviation",
            "cdm_holder",
            "source_description",
            "cdm_version",
            "vocabulary_version",
        ),
        _source,
    ),
)
