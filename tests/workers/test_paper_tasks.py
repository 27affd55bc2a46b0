"""Where the eight clinical tasks differ from the paper's own: one constructed person a difference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from sqlalchemy import Engine

from app.store import cohorts, tasks
from app.store.work import InlineWork
from app.tasks import CLINICAL, builtin
from app.tasks.spec import DEATH
from tests.app.store.records import Records, rows
from workers.stages.label import label

Make = Callable[..., InlineWork]

SCAN = "2020-01-10 10:00:00"
LATE_SCAN = {"death within a minute": "2020-01-10 23:59:30"}
"""Follow-up must end on a later day."""
CODES = {
    "pulmonary_hypertension": "70995007",
    "atelectasis": "46621007",
    "cardiomegaly": "8186001",
    "consolidation": "95436008",
    "edema": "267038008",
    "pleural_effusion": "60046008",
}
CONCEPT = {task: 1000 + n for n, task in enumerate(CODES)}
ICD = {code: 2000 + n for n, code in enumerate(builtin("paper_pulmonary_hypertension").source_codes)}
HYPERTENSION = ICD["ICD10CM/I27.0"]
OFFICE, EMERGENCY, INPATIENT, BOTH = 9202, 9203, 9201, 262

Write = Callable[[Records, int], None]


def code(time: str, task: str, *, date_only: bool = False) -> Write:
    """A row with the task's concept, and for the paper's pulmonary hypertension with a code of its list."""
    source = HYPERTENSION if task == "pulmonary_hypertension" else 0
    return lambda r, p: r.event(p, time, CONCEPT[task], date_only=date_only, source=source)


def visits(*stays: tuple[str, str, int], death: str | None = None) -> Write:
    def write(records: Records, person: int) -> None:
        for start, end, concept in stays:
            records.visit(person, start, end, concept)
        if death is not None:
            records.death(person, death)

    return write


OF_CODES: list[tuple[str, str, Write, str, str]] = [
    row
    for task in CODES
    for row in (
        (f"{task}: history", task, lambda r, p, task=task: (code("2019-05-01 08:00:00", task)(r, p),
         code("2020-03-01 08:00:00", task)(r, p)), "prior", "event 50.917"),
        (f"{task}: the day of the scan", task, code("2020-01-10 23:59:59", task, date_only=True), "prior", "censored"),
        (f"{task}: within a day", task, code("2020-01-10 12:00:00", task), "event 0.083", "censored"),
        (f"{task}: a day later to the second", task, code("2020-01-11 10:00:00", task), "event 1", "event 1"),
    )
]  # fmt: skip

DIFFERENCES: list[tuple[str, str, Write, str, str]] = [
    *OF_CODES,
    (
        "a diagnosis that the source did not code by the paper's list",
        "pulmonary_hypertension",
        lambda r, p: r.event(p, "2020-03-01 08:00:00", CONCEPT["pulmonary_hypertension"]),
        "event 50.917",
        "censored",
    ),
    (
        "a code of the paper's list without a standard concept",
        "pulmonary_hypertension",
        lambda r, p: r.event(p, "2020-03-01 08:00:00", 0, source=HYPERTENSION),
        "censored",
        "event 50.917",
    ),
    (
        "the same code in a table other than conditions",
        "pulmonary_hypertension",
        lambda r, p: r.event(
            p, "2020-03-01 08:00:00", CONCEPT["pulmonary_hypertension"], source=HYPERTENSION, domain="o"
        ),
        "event 50.917",
        "censored",
    ),
    ("death within a minute", "mortality", lambda r, p: r.death(p, "2020-01-11 00:00:10"), "event 0", "ineligible"),
    (
        "death after observation ended, before the data cut",
        "mortality",
        lambda r, p: r.death(p, "2021-06-01 10:00:00"),
        "event 508",
        "censored",
    ),
    (
        "the admission that the scan leads to",
        "readmission",
        visits(("2020-01-10 08:00:00", "2020-01-10 12:00:00", EMERGENCY),
               ("2020-01-10 13:00:00", "2020-01-14 12:00:00", INPATIENT)),
        "censored",
        "event 0.125",
    ),
    (
        "a stay by way of the emergency room (262)",
        "readmission",
        visits(("2020-02-10 10:00:00", "2020-02-12 12:00:00", BOTH)),
        "event 31",
        "censored",
    ),
    (
        "a transfer within 24 hours of discharge",
        "readmission",
        visits(("2020-01-09 08:00:00", "2020-01-12 12:00:00", INPATIENT),
               ("2020-01-13 10:00:00", "2020-01-15 12:00:00", INPATIENT)),
        "censored",
        "event 3",
    ),
    (
        "death in hospital",
        "readmission",
        visits(("2020-01-09 08:00:00", "2020-01-20 12:00:00", INPATIENT), death="2020-01-18 10:00:00"),
        "ineligible",
        "censored",
    ),
    (
        "an admission within a day of a scan outside hospital",
        "readmission",
        visits(("2020-01-10 20:00:00", "2020-01-12 12:00:00", INPATIENT)),
        "censored",
        "event 0.417",
    ),
]  # fmt: skip


@pytest.fixture
def said(engine: Engine, work: Make) -> Mapping[tuple[int, str], str]:
    """(person, task) → status, and days for an event."""
    with engine.begin() as connection:
        records = Records(connection)
        words = {CONCEPT[task]: ("SNOMED", number, "S") for task, number in CODES.items()}
        words |= {concept: (*named.split("/"), None) for named, concept in ICD.items()}  # type: ignore[misc]
        for concept, (vocabulary, number, standard) in words.items():
            records.do(
                "INSERT INTO omop.concept (concept_id, concept_name, domain_id, vocabulary_id, concept_class_id, "
                "standard_concept, concept_code) VALUES (:id, 'x', 'Condition', :vocabulary, 'x', :standard, :code)",
                id=concept, vocabulary=vocabulary, standard=standard, code=number,
            )  # fmt: skip
        for person, (what, _, write, _, _) in enumerate(DIFFERENCES, 1):
            records.person(person)
            records.period(person, "2015-01-01", "2020-12-31")
            records.scan(person, LATE_SCAN.get(what, SCAN))
            write(records, person)
        records.pack()
    cohorts.build(work(name="c", data_cut="2022-12-31"))
    named = [name for task in CLINICAL for name in (task, f"paper_{task}")]
    tasks.build(work(name="t", cohort="c", specs=[builtin(name).to_dict() for name in named]))
    label(work(name="l", cohort="c", tasks="t", allow_unknown_concepts=True))

    def brief(row: Any) -> str:
        return f"event {round(row.time_days, 3):g}" if row.status == "event" else str(row.status)

    return {(r.person_id, r.task): brief(r) for r in rows(engine, "SELECT * FROM label.tte_long")}


def test_ours_and_the_papers_differ_where_it_is_said_and_as_it_is_said(said: Mapping[tuple[int, str], str]) -> None:
    found = {
        what: (said[person, task], said[person, f"paper_{task}"])
        for person, (what, task, _, _, _) in enumerate(DIFFERENCES, 1)
    }
    assert found == {what: (ours, papers) for what, _, _, ours, papers in DIFFERENCES}


def test_death_is_an_outcome_of_no_code_task() -> None:
    assert all(DEATH not in builtin(task).concepts for task in CODES)
