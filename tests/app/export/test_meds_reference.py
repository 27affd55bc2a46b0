"""Our export of Synthea27Nj beside what meds_etl 0.3.11 made of it: every difference by a named rule, counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from app.loading import omop
from app.store.work import InlineWork
from tests.app.export.test_meds import write
from tests.app.loading.meds_sets import read_events

Row = tuple[Any, ...]


def day(moment: Any) -> Any:
    """The day of a time: every time of this extract is a date, which we keep at its end and meds_etl at its start."""
    return None if moment is None else moment.date()


def told(row: dict[str, Any]) -> Row:
    """A row as far as both tell it."""
    number = row["numeric_value"]
    visit = row["visit_id"]
    return (
        row["subject_id"],
        day(row["time"]),
        row["code"],
        None if number is None else round(float(number), 4),
        day(row["end"]),
        row["table"],
        None if visit is None else str(visit),
    )


@pytest.fixture
def both(
    real_data: Path, tmp_path: Path, work: Callable[..., InlineWork], engine: Engine
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Our rows and the reference's."""
    omop.load(work(path=str(real_data / "omop_synthea27nj_5.4")))
    write(engine, tmp_path / "out")
    return read_events(tmp_path / "out"), read_events(real_data / "meds_reference_from_omop" / "synthea27nj")


def test_every_difference_has_a_rule_and_a_count(both: tuple[list[dict[str, Any]], list[dict[str, Any]]]) -> None:
    ours, theirs = both
    left, right = Counter(map(told, ours)), Counter(map(told, theirs))
    assert (sum(left.values()), sum(right.values()), sum((left & right).values())) == (24_835, 24_783, 24_752)
    assert Counter(rule(row) for row in (left - right).elements()) == {
        "gender: its concept is not in the extract's vocabulary, and meds_etl leaves it out": 28,
        "race: likewise": 24,
        "ethnicity: static here, at birth there": 28,
        "number: none in value_as_number, so none here; meds_etl reads it out of value_source_value": 3,
    }
    assert Counter(rule(row) for row in (right - left).elements()) == {
        "ethnicity: static here, at birth there": 28,
        "number: none in value_as_number, so none here; meds_etl reads it out of value_source_value": 3,
    }


def rule(row: Row) -> str:
    """Which rule explains a row that only one of the two has."""
    subject, time, code, number, _end, table, _visit = row
    if table == "person" and code.startswith("Gender/"):
        return "gender: its concept is not in the extract's vocabulary, and meds_etl leaves it out"
    if table == "person" and code.startswith("Race/"):
        return "race: likewise"
    if table == "person" and code.startswith("Ethnicity/"):
        return "ethnicity: static here, at birth there"
    if table == "measurement" and code == "LOINC/38265-5" and (number is None or number < 0):
        return "number: none in value_as_number, so none here; meds_etl reads it out of value_source_value"
    return f"unexplained: {subject} {time} {code}"


def test_times_of_day_units_and_texts_differ_by_rule_too(
    both: tuple[list[dict[str, Any]], list[dict[str, Any]]],
) -> None:
    ours, theirs = both
    # a date without a time stands at the end of its day here, and at its start there; births are midnights in both
    clocks = [Counter(str(row["time"].time()) for row in found if row["time"]) for found in both]
    assert clocks == [{"23:59:59": 24_727, "00:00:00": 28}, {"00:00:00": 24_783}]
    ends = [Counter(str(row["end"].time()) for row in found if row["end"]) for found in both]
    assert ends == [{"23:59:59": 6_488}, {"00:00:00": 6_488}]
    # a unit is its concept here, and the source's own word there; so units without a concept are missing here
    units = [Counter(row["unit"] for row in found if row["unit"]) for found in both]
    assert units[0] - units[1] == {"OMOP_CONCEPT/8541": 936}, "a concept that the extract's vocabulary lacks: /min"
    assert units[1] - units[0] == {
        "/min": 936,
        "{score}": 471,
        "U/L": 156,
        "kU/L": 75,
        "{nominal}": 24,
        "n/a": 7,
        "{T-score}": 3,
    }
    # source texts are not kept here; the cause of a death is, and meds_etl leaves it out
    assert not any("text_value" in row for row in ours)
    assert sum(row["text_value"] is not None for row in theirs) == 45
    assert Counter(row["table"] for row in ours if row["value_code"]) == {"death": 3}
