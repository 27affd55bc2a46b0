"""Small extracts, written by hand or line by line, for tests of loading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, text

PERSONS = [
    "person_id,gender_concept_id,year_of_birth,month_of_birth,day_of_birth,race_concept_id,ethnicity_concept_id,person_source_value",
    *(f"{i},8507,19{50 + i},2,{i},8527,0,p{i}" for i in range(1, 6)),
]
PERIODS = [
    "observation_period_id,person_id,observation_period_start_date,observation_period_end_date,period_type_concept_id",
    *(f"{i},{i},2010-01-01,2020-12-31,0" for i in range(1, 6)),
]
CONDITION_HEADER = (
    "condition_occurrence_id,person_id,condition_concept_id,condition_start_date,condition_start_datetime,"
    "condition_end_date,condition_end_datetime,condition_type_concept_id,visit_occurrence_id,condition_source_concept_id"
)
CONDITIONS = [
    CONDITION_HEADER,
    *(f"{i},{i % 5 + 1},{300 + i},2015-03-{i:02d},2015-03-{i:02d} 10:00:00,,,0,,0" for i in range(1, 21)),
]
MEASUREMENT_HEADER = (
    "measurement_id,person_id,measurement_concept_id,measurement_date,measurement_datetime,value_as_number,"
    "value_as_concept_id,unit_concept_id,visit_occurrence_id,measurement_source_concept_id"
)
VISIT_HEADER = (
    "visit_occurrence_id,person_id,visit_concept_id,visit_start_date,visit_start_datetime,visit_end_date,"
    "visit_end_datetime,visit_type_concept_id,discharged_to_concept_id,preceding_visit_occurrence_id"
)
DEATH_HEADER = "person_id,death_date,death_datetime,death_type_concept_id,cause_concept_id"


def write(folder: Path, tables: Mapping[str, Sequence[str] | bytes]) -> Path:
    """Files by name; lines end with a line feed."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in tables.items():
        data = content if isinstance(content, bytes) else ("\n".join(content) + "\n").encode()
        (folder / (name if "." in name else f"{name}.csv")).write_bytes(data)
    return folder


def extract(folder: Path, **tables: Sequence[str] | bytes) -> Path:
    """Five persons observed 2010 to 2020 and their 20 conditions, unless `tables` says otherwise."""
    base: dict[str, Sequence[str] | bytes] = {
        "person": PERSONS,
        "observation_period": PERIODS,
        "condition_occurrence": CONDITIONS,
    }
    return write(folder, base | tables)


def conditions(*lines: str) -> list[str]:
    """The 20 sound conditions and some more lines."""
    return [*CONDITIONS, *lines]


CONTENT = """
SELECT (SELECT count(*) FROM omop.person), (SELECT count(*) FROM omop.event), (SELECT count(*) FROM omop.timeline),
       (SELECT count(*) FROM omop.concept), (SELECT count(*) FROM omop.visit_occurrence),
       (SELECT coalesce(sum(hashtext(e::text)::bigint), 0) FROM omop.event e)
"""
"""What a load that is refused must leave as it was."""


def rows(engine: Engine, statement: str, **values: Any) -> list[tuple[Any, ...]]:
    """What the store answers."""
    with engine.connect() as connection:
        return [tuple(row) for row in connection.execute(text(statement), values)]


def one(engine: Engine, statement: str, **values: Any) -> Any:
    """The one value that the store answers."""
    ((value,),) = rows(engine, statement, **values)
    return value
