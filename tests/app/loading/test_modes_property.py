"""Any sequence of deliveries leaves what one snapshot of the resulting whole extract does, byte for byte."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, text

from app.loading.omop import load
from app.store.work import InlineWork
from tests.app.loading.extracts import CONDITION_HEADER, DEATH_HEADER, PERIODS, PERSONS, VISIT_HEADER, rows, write

Make = Callable[..., InlineWork]

HEADERS = {
    "person": PERSONS[0],
    "observation_period": PERIODS[0],
    "visit_occurrence": VISIT_HEADER,
    "condition_occurrence": CONDITION_HEADER,
    "death": DEATH_HEADER,
}
SHOWN = (
    "SELECT person_id, birth_time, gender_concept_id FROM omop.person ORDER BY 1",
    "SELECT person_id, time, date_only, concept_id, source_concept_id, end_time, "
    "visit_occurrence_id, unknown_visit_id, domain, source_row_id FROM omop.event ORDER BY domain, source_row_id",
    "SELECT person_id, num_events, times, concepts, digest FROM omop.timeline ORDER BY 1",
    "SELECT observation_period_id, person_id, start_date, end_date FROM omop.observation_period ORDER BY 1",
    "SELECT visit_occurrence_id, person_id, visit_concept_id, visit_start_datetime, visit_end_datetime "
    "FROM omop.visit_occurrence ORDER BY 1",
)
CLEAR = (
    "DO $$ DECLARE p text; BEGIN FOR p IN SELECT inhrelid::regclass::text FROM pg_inherits "
    "WHERE inhparent = 'omop.event'::regclass LOOP EXECUTE 'DROP TABLE ' || p; END LOOP; END $$",
    "TRUNCATE omop.person, omop.observation_period, omop.visit_occurrence, omop.timeline, ops.reject, ops.load_change, "
    "ops.load, ops.source CASCADE",
)

Rows = dict[int, str]
Whole = dict[str, Rows]

PERSON_IDS = st.integers(1, 4)
DAYS = st.integers(1, 3)


def person(key: int) -> st.SearchStrategy[str]:
    return DAYS.map(lambda day: f"{key},8507,1950,2,{day},8527,0,p{key}")


def period(key: int) -> st.SearchStrategy[str]:
    return st.tuples(PERSON_IDS, DAYS).map(lambda x: f"{key},{x[0]},2010-01-0{x[1]},2020-12-31,0")


def visit(key: int) -> st.SearchStrategy[str]:
    return st.tuples(PERSON_IDS, DAYS).map(lambda x: f"{key},{x[0]},9201,2015-01-0{x[1]},,2015-01-05,,0,,")


def condition(key: int) -> st.SearchStrategy[str]:
    drawn = st.tuples(PERSON_IDS, DAYS, st.sampled_from(["", "1", "2", "3", "9"]), st.integers(300, 301))
    return drawn.map(lambda x: f"{key},{x[0]},{x[3]},2015-01-0{x[1]},,,,0,{x[2]},0")


def death(key: int) -> st.SearchStrategy[str]:
    return DAYS.map(lambda day: f"{key},2018-01-0{day},,0,")


MADE = {
    "person": (person, 4),
    "observation_period": (period, 4),
    "visit_occurrence": (visit, 3),
    "condition_occurrence": (condition, 8),
    "death": (death, 4),
}


@st.composite
def tables(draw: st.DrawFn, *, whole: bool) -> Whole:
    """Lines by table and key; a snapshot holds PERSON."""
    found: Whole = {}
    for table, (make, keys) in MADE.items():
        if (whole and table == "person") or draw(st.booleans()):
            chosen = draw(st.sets(st.integers(1, keys), min_size=int(whole and table == "person")))
            found[table] = {key: draw(make(key)) for key in sorted(chosen)}
    return found or {"death": {}}


@st.composite
def delivery(draw: st.DrawFn) -> tuple[str, Whole, dict[str, set[int]]]:
    """Mode, rows, and by table the keys that an upsert deletes."""
    mode = draw(st.sampled_from(["snapshot", "append", "upsert", "upsert"]))
    found = draw(tables(whole=mode == "snapshot"))
    deleted = {table: draw(st.sets(st.integers(1, MADE[table][1]), max_size=2)) for table in found}
    return mode, found, deleted if mode == "upsert" else {}


def of_person(table: str, line: str) -> int:
    return int(line.split(",")[0 if table in ("person", "death") else 1])


def apply(now: Whole, mode: str, found: Whole, deleted: dict[str, set[int]]) -> Whole:
    """What an extract is after a delivery, in the obvious way: rows of unknown persons are rejected, and gone."""
    result = {table: dict(lines) for table, lines in now.items()}
    for table, lines in found.items():
        before = {} if mode == "snapshot" else dict(result.get(table, {}))
        for key in deleted.get(table, set()) - set(lines):
            before.pop(key, None)
        for key, line in lines.items():
            if mode == "append" and key in before:
                continue
            before[key] = line
        result[table] = before
        if table == "person":
            persons = set(before)
            for other in result:
                result[other] = {k: v for k, v in result[other].items() if of_person(other, v) in persons}
        else:
            persons = set(result.get("person", {}))
            kept = {k: v for k, v in before.items() if of_person(table, v) in persons}
            if mode == "upsert":  # a rejected row leaves the one that is shown
                was = now.get(table, {})
                for key in set(before) - set(kept):
                    if key in was and of_person(table, was[key]) in persons:
                        kept[key] = was[key]
            result[table] = kept
    return result


def write_delivery(folder: Path, found: Whole, deleted: dict[str, set[int]] | None = None) -> Path:
    files: dict[str, list[str]] = {}
    for table, lines in found.items():
        mark = deleted is not None
        files[table] = [HEADERS[table] + (",deleted" if mark else "")]
        files[table] += [line + ("," if mark else "") for line in lines.values()]
        width = HEADERS[table].count(",")
        files[table] += [f"{key}{',' * width},1" for key in sorted((deleted or {}).get(table, set()) - set(lines))]
    return write(folder, files)


def state(engine: Engine) -> list[Any]:
    return [rows(engine, statement) for statement in SHOWN]


often = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
Deliveries = list[tuple[str, Whole, dict[str, set[int]]]]


@settings(often, max_examples=8)
@given(first=tables(whole=True), later=st.lists(delivery(), min_size=1, max_size=4))
def test_any_sequence_of_deliveries_ends_as_the_whole_extract_does(
    first: Whole, later: Deliveries, work: Make, engine: Engine
) -> None:
    check_deliveries(first, later, work, engine)


@pytest.mark.long
@settings(often, max_examples=200)
@given(first=tables(whole=True), later=st.lists(delivery(), min_size=1, max_size=4))
def test_hundreds_of_sequences_of_deliveries_end_as_the_whole_extract_does(
    first: Whole, later: Deliveries, work: Make, engine: Engine
) -> None:
    check_deliveries(first, later, work, engine)


def check_deliveries(first: Whole, later: Deliveries, work: Make, engine: Engine) -> None:
    """Deliver one after the other, and the whole of it at once: the same is shown, and the books agree."""
    folder = Path(tempfile.mkdtemp())
    try:
        with engine.begin() as connection:
            for statement in CLEAR:
                connection.execute(text(statement))
        whole: Whole = {}
        options = {"max_rejects": 1, "allow_shrink": True, "source": "one"}
        for i, (mode, found, deleted) in enumerate([("snapshot", first, {}), *later]):
            path = write_delivery(folder / str(i), found, deleted if mode == "upsert" else None)
            load(work(path=str(path), mode=mode, **options))
            whole = apply(whole, mode, found, deleted)
            check_books(engine)
            load(work(path=str(path), mode=mode, **options))
        after = state(engine)
        persons = whole.get("person", {})
        with engine.begin() as connection:
            for statement in CLEAR:
                connection.execute(text(statement))
        if persons:
            load(work(path=str(write_delivery(folder / "whole", whole)), **options))
        assert after == state(engine)
    finally:
        shutil.rmtree(folder)


def check_books(engine: Engine) -> None:
    """The books count what is shown, load by load, and their changes add up."""
    books = "SELECT load_id, num_shown FROM ops.load WHERE table_name IN ('person', 'condition_occurrence', 'death', "
    books += "'visit_occurrence', 'observation_period') AND num_shown > 0 ORDER BY 1"
    counted = (
        "SELECT load_id, count(*) FROM (SELECT load_id FROM omop.event UNION ALL SELECT load_id FROM omop.person "
        "UNION ALL SELECT load_id FROM omop.observation_period) x GROUP BY 1 ORDER BY 1"
    )
    assert rows(engine, books) == rows(engine, counted)
    wrong = "SELECT count(*) FROM ops.load_change WHERE num_after <> num_before + num_added - num_removed"
    assert rows(engine, wrong) == [(0,)]
    latest = (
        "SELECT DISTINCT ON (table_name) table_name, num_after FROM ops.load_change "
        "ORDER BY table_name, delivery_id DESC"
    )
    for table, after in rows(engine, latest):
        relation = f"omop.{table}"
        assert rows(engine, f"SELECT count(*) FROM {relation}") == [(after,)], table
