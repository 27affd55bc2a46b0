"""Predicates of ACES files: what means the same is read, the rest refused with what has no meaning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from app.errors import InputError
from app.loading.meds import load
from app.store import cohorts, tasks
from app.store.work import InlineWork
from app.tasks import read_task_file
from app.tasks.aces import read_predicate
from tests.app.store.records import Records, rows
from workers.stages.label import label

Make = Callable[..., InlineWork]

PREDICATES = """
predicates:
  spo2: {code: LAB//SpO2}
  low: {code: LAB//SpO2, value_max: 90}
  high: {code: LAB//SpO2, value_min: 120, value_min_inclusive: true}
  odd: {expr: "or(low, high)"}
  embolism: {code: {any: [ICD10CM/I26.9, ICD9CM/415.19]}}
  dead_or_ill: {expr: "or(dead, embolism)"}
  dead: {code: MEDS_DEATH}
  both: {expr: "and(low, embolism)"}
  any_lab: {code: {regex: "LAB//.*"}}
  mixed: {expr: "or(low, embolism)"}
  elsewhere: {code: HR, other_cols: {ward: A}}
  circle: {expr: "or(circle, low)"}
  ill_1: {code: LAB//1//mg/dL, value_min: 1.3, value_min_inclusive: false, value_max: null}
  ill_2: {code: LAB//2//mg/dL, value_min: 1.3}
  ill: {expr: "or(ill_1, ill_2)"}
  measured: {expr: "or(low, spo2)"}
  gone: {code: {regex: "MEDS_DEATH.*"}}
  admission: ???
  level:
    code: ???
"""
ABOVE = {"above": 1.3, "unit": "any"}


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("spo2", {"source_codes": ["MEDS/LAB//SpO2"]}),
        ("low", {"source_codes": ["MEDS/LAB//SpO2"], "values": [{"below": 90.0, "unit": "any"}]}),
        (
            "odd",
            {
                "source_codes": ["MEDS/LAB//SpO2"],
                "values": [{"below": 90.0, "unit": "any"}, {"at_least": 120.0, "unit": "any"}],
            },
        ),
        ("embolism", {"source_codes": ["ICD10CM/I26.9", "ICD9CM/415.19"]}),
        ("ill", {"source_codes": ["MEDS/LAB//1//mg/dL", "MEDS/LAB//2//mg/dL"], "values": [ABOVE]}),
        ("measured", {"source_codes": ["MEDS/LAB//SpO2"]}),
        ("gone", {"concepts": [4306655]}),
        ("dead_or_ill", {"source_codes": ["ICD10CM/I26.9", "ICD9CM/415.19"], "concepts": [4306655]}),
    ],
)
def test_what_means_the_same_is_read(tmp_path: Path, name: str, fields: dict[str, Any]) -> None:
    (tmp_path / "p.yaml").write_text(PREDICATES)
    assert read_predicate(tmp_path / "p.yaml", name) == fields


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("both", "and"),
        ("any_lab", "regex"),
        ("mixed", "codes with different values"),
        ("admission", "fill in"),
        ("level", "fill in"),
        ("elsewhere", "other_cols"),
        ("circle", "predicate 'circle'"),
        ("nobody", "predicate 'nobody'"),
    ],
)
def test_what_means_something_else_is_refused_by_its_name(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "p.yaml").write_text(PREDICATES)
    (tmp_path / "t.toml").write_text(f'name = "x"\n\naces = "p.yaml"\npredicate = "{name}"\n')
    with pytest.raises(InputError, match=rf"line 3, field 'aces'.*{said}"):
        read_task_file(tmp_path / "t.toml")


def test_a_predicate_beside_codes_and_a_file_that_is_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("predicates: [\n")
    with pytest.raises(InputError, match="line 2"):
        read_predicate(tmp_path / "p.yaml", "x")
    (tmp_path / "t.toml").write_text('name = "x"\nconcepts = [1]\naces = "p.yaml"\npredicate = "low"\n')
    with pytest.raises(InputError, match="line 2, field 'concepts'"):
        read_task_file(tmp_path / "t.toml")


def test_a_file_of_aces_given_for_a_task_is_answered_with_the_task_to_write(real_data: Path) -> None:
    folder = real_data / "meds_aces_sample" / "sample_configs"
    with pytest.raises(InputError, match=r'aces = "abnormal_lab\.yaml", predicate = "abnormal_spo2".*windows'):
        read_task_file(folder / "abnormal_lab.yaml")


def test_a_file_of_predicates_alone_is_answered_with_one_of_them(tmp_path: Path) -> None:
    (tmp_path / "p.yml").write_text(PREDICATES)
    with pytest.raises(InputError, match=r'aces = "p\.yml", predicate = "spo2"'):
        read_task_file(tmp_path / "p.yml")


SAMPLES = {
    ("abnormal_lab.yaml", "abnormal_spo2"): None,
    ("imminent_mortality.yaml", "death"): None,
    ("inhospital_mortality.yaml", "death"): None,
    ("inhospital_mortality.yaml", "discharge_or_death"): "regex",
    ("intervention_weaning.yaml", "ventilation_end"): "and",
    ("long_term_recurrence.yaml", "myocardial_infarction"): None,
    ("readmission_risk.yaml", "admission"): "regex",
}
"""Predicates of ACES's sample tasks, and why one is refused."""


@pytest.mark.parametrize(("file", "name"), list(SAMPLES))
def test_each_sample_task_of_aces_is_read_or_refused(real_data: Path, file: str, name: str) -> None:
    path = real_data / "meds_aces_sample" / "sample_configs" / file
    why = SAMPLES[file, name]
    if why is None:
        assert read_predicate(path, name)
    else:
        with pytest.raises(InputError, match=why):
            read_predicate(path, name)


def test_the_outcomes_of_a_predicate_are_the_rows_that_it_names(
    engine: Engine, work: Make, real_data: Path, tmp_path: Path
) -> None:
    """Abnormal SpO2 in ACES's sample data: the first after a scan, counted in the files."""
    import duckdb

    folder = real_data / "meds_aces_sample"
    load(work(path=str(folder / "meds_sample"), source="aces", midnight_is_time=True))
    index = "2021-01-01 00:00:00"
    with engine.begin() as connection:
        records = Records(connection)
        people = [row[0] for row in connection.exec_driver_sql("SELECT person_id FROM omop.person ORDER BY 1")]
        middle = dict(
            connection.exec_driver_sql(
                "SELECT person_id, percentile_disc(0.5) WITHIN GROUP (ORDER BY time) FROM omop.event GROUP BY 1"
            ).fetchall()
        )
        for person in people:
            records.scan(person, middle.get(person, index))
    (tmp_path / "p.yaml").write_text(PREDICATES)
    (tmp_path / "t.toml").write_text(
        'name = "odd"\naces = "p.yaml"\npredicate = "odd"\noccurrence = "next"\nsame_day = "after"\n'
    )
    cohorts.build(work(name="c", follow_up="last_event"))
    tasks.build(work(name="t", cohort="c", specs=[read_task_file(tmp_path / "t.toml").to_dict()]))
    label(work(name="l", cohort="c", tasks="t"))
    ours = {row.person_id: row.outcome_time for row in rows(engine, "SELECT * FROM label.outcome")}
    shards = str(folder / "meds_sample" / "**" / "*.parquet")
    statement = (
        "SELECT subject_id, time FROM read_parquet($1) WHERE time IS NOT NULL "
        "AND code = 'LAB//SpO2' AND (numeric_value < 90 OR numeric_value >= 120)"
    )
    expected: dict[int, Any] = {}
    for person, time in duckdb.execute(statement, [shards]).fetchall():
        if time > middle[person]:
            expected[person] = min(time.replace(microsecond=0), expected.get(person, time))
    eligible = {r.person_id for r in rows(engine, "SELECT person_id FROM label.cohort_member WHERE eligible")}
    assert ours == {person: time for person, time in expected.items() if person in eligible} and len(ours) > 10
