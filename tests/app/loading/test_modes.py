"""Deltas: whatever sequence of snapshots, appends and upserts comes, the store is that of one whole extract."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import Engine

from app.errors import InputError
from app.loading.omop import load
from app.store.work import InlineWork
from tests.app.loading.extracts import (
    CONDITION_HEADER,
    CONDITIONS,
    CONTENT,
    DEATH_HEADER,
    MEASUREMENT_HEADER,
    PERIODS,
    PERSONS,
    VISIT_HEADER,
    conditions,
    extract,
    one,
    rows,
    write,
)

Make = Callable[..., InlineWork]

BOOKS = """
SELECT table_name, mode, state, num_loaded, num_same, num_deleted, num_rejected, num_shown FROM ops.load
WHERE table_name = 'condition_occurrence' ORDER BY load_id
"""
CHANGES = """
SELECT num_before, num_after, num_added, num_changed, num_removed FROM ops.load_change
WHERE table_name = 'condition_occurrence' ORDER BY delivery_id
"""


def delta(folder: Path, *lines: str, header: str = CONDITION_HEADER) -> str:
    """A folder with conditions alone."""
    return str(write(folder, {"condition_occurrence": [header, *lines]}))


def test_an_append_adds_rows_and_counts_those_that_are_there(tmp_path: Path, work: Make, engine: Engine) -> None:
    load(work(path=str(extract(tmp_path / "a"))))
    path = delta(tmp_path / "b", CONDITIONS[1], "21,1,301,2016-01-01,,,,0,,0", "22,1,302,2016-01-01,,,,0,,0")
    result = load(work(path=path, mode="append"))
    assert (result["unchanged"], result["events"], result["persons"]) == (False, 2, 5)
    assert "2 rows added, 0 changed, 0 removed, 1 already so, 0 rejected" in result["summary"]
    assert rows(engine, BOOKS) == [
        ("condition_occurrence", "snapshot", "published", 20, 0, 0, 0, 20),
        ("condition_occurrence", "append", "published", 2, 1, 0, 0, 2),
    ]
    assert rows(engine, CHANGES) == [(0, 20, 20, 0, 0), (20, 22, 2, 0, 0)]
    assert one(engine, "SELECT sum(num_events) FROM omop.timeline") == 22
    assert one(engine, "SELECT count(DISTINCT load_id) FROM omop.event") == 2


def test_an_append_rejects_changed_rows_and_names_upsert(tmp_path: Path, work: Make, engine: Engine) -> None:
    load(work(path=str(extract(tmp_path / "a"))))
    before = rows(engine, CONTENT)
    path = delta(tmp_path / "b", "1,1,999,2016-01-01,,,,0,,0")
    with pytest.raises(InputError, match="key_shown_needs_upsert 1"):
        load(work(path=path, mode="append"))
    assert rows(engine, CONTENT) == before
    result = load(work(path=path, mode="append", max_rejects=1))
    assert (result["unchanged"], result["rejected"]) == (True, 1)
    assert rows(engine, CONTENT) == before


def test_an_upsert_replaces_adds_and_deletes(tmp_path: Path, work: Make, engine: Engine) -> None:
    load(work(path=str(extract(tmp_path / "a"))))
    header = CONDITION_HEADER + ",deleted"
    lines = (
        "1,3,999,2016-01-01,,,,0,,0,",  # moves from person 2 to 3, too
        "21,1,301,2016-01-01,,,,0,,0,no",
        "2,,,,,,,,,,true",
        "77,,,,,,,,,,1",
        CONDITIONS[3] + ",0",
    )
    path = delta(tmp_path / "b", *lines, header=header)
    result = load(work(path=path, mode="upsert"))
    assert "1 rows added, 1 changed, 1 removed, 2 already so, 0 rejected" in result["summary"]
    assert rows(engine, BOOKS)[1] == ("condition_occurrence", "upsert", "published", 2, 2, 1, 0, 2)
    assert rows(engine, BOOKS)[0][-1] == 18
    assert rows(engine, CHANGES)[1] == (20, 20, 1, 1, 1)
    keys = [row[0] for row in rows(engine, "SELECT condition_occurrence_id FROM omop.condition_occurrence ORDER BY 1")]
    assert keys == [1, *range(3, 22)]
    assert rows(engine, "SELECT person_id, concept_id FROM omop.event WHERE source_row_id = 1") == [(3, 999)]
    assert load(work(path=path, mode="upsert"))["unchanged"]
    assert len(rows(engine, BOOKS)) == 2


def test_a_flag_of_deletion_that_says_neither_is_rejected(tmp_path: Path, work: Make, engine: Engine) -> None:
    load(work(path=str(extract(tmp_path / "a"))))
    path = delta(tmp_path / "b", CONDITIONS[1] + ",perhaps", header=CONDITION_HEADER + ",deleted")
    with pytest.raises(InputError, match="unparsable_flag 1"):
        load(work(path=path, mode="upsert"))


def test_an_upsert_that_deletes_much_stops(tmp_path: Path, work: Make, engine: Engine) -> None:
    load(work(path=str(extract(tmp_path / "a"))))
    header = CONDITION_HEADER + ",deleted"
    path = delta(tmp_path / "b", *(f"{i},,,,,,,,,,1" for i in (1, 2)), header=header)
    with pytest.raises(InputError, match=r"an upsert to remove .* condition_occurrence 20 → 18"):
        load(work(path=path, mode="upsert"))
    assert load(work(path=path, mode="upsert", allow_shrink=True))["unchanged"] is False
    assert one(engine, "SELECT sum(num_events) FROM omop.timeline") == 18


def test_a_death_is_withdrawn_and_a_person_goes_with_all_rows(tmp_path: Path, work: Make, engine: Engine) -> None:
    measurements = [MEASUREMENT_HEADER, "1,1,3000,2015-01-01,,7,,,10,0", "2,2,3000,2015-01-01,,7,,,10,0"]
    deaths = [DEATH_HEADER, "1,2016-01-01,,0,", "2,2016-01-01,,0,"]
    load(work(path=str(extract(tmp_path / "a", measurement=measurements, death=deaths))))
    withdrawn = write(tmp_path / "b", {"death": [DEATH_HEADER + ",deleted", "2,,,,,yes"]})
    result = load(work(path=str(withdrawn), mode="upsert", allow_shrink=True))
    assert "1 removed" in result["summary"]
    assert rows(engine, "SELECT person_id FROM omop.death") == [(1,)]
    gone = write(tmp_path / "c", {"person": [PERSONS[0] + ",deleted", "1,,,,,,,,yes"]})
    with pytest.raises(InputError, match="person 5 → 4"):
        load(work(path=str(gone), mode="upsert"))
    result = load(work(path=str(gone), mode="upsert", allow_shrink=True))
    assert result["persons"] == 4 and result["rows_of_vanished_persons"] == 7
    for table in ("person", "event", "timeline", "observation_period", "death", "measurement"):
        assert one(engine, f"SELECT count(*) FROM omop.{table} WHERE person_id = 1") == 0, table
    shown = "SELECT sum(num_shown) FROM ops.load WHERE partition_name IS NOT NULL"
    assert one(engine, shown) == one(engine, "SELECT count(*) FROM omop.event")


def test_a_visit_that_comes_later_is_found_by_the_events_that_named_it(
    tmp_path: Path, work: Make, engine: Engine
) -> None:
    load(work(path=str(extract(tmp_path / "a", condition_occurrence=conditions("21,1,300,2017-01-01,,,,0,10,0")))))
    visit = "SELECT visit_occurrence_id, unknown_visit_id FROM omop.event WHERE source_row_id = 21 AND domain = 'c'"
    assert rows(engine, visit) == [(None, 10)]
    visits = write(tmp_path / "b", {"visit_occurrence": [VISIT_HEADER, "10,1,9202,2017-01-01,,2017-01-02,,0,,"]})
    load(work(path=str(visits), mode="append"))
    assert rows(engine, visit) == [(10, None)]
    gone = write(tmp_path / "c", {"visit_occurrence": [VISIT_HEADER + ",deleted", "10,,,,,,,,,,1"]})
    load(work(path=str(gone), mode="upsert", allow_shrink=True))
    assert rows(engine, visit) == [(None, 10)]


def test_a_delta_brings_persons_and_changes_them(tmp_path: Path, work: Make, engine: Engine) -> None:
    load(work(path=str(extract(tmp_path / "a"))))
    new = write(
        tmp_path / "b",
        {
            "person": [PERSONS[0], "6,8532,1960,2,6,8527,0,p6", "1,8532,1951,2,1,8527,0,p1"],
            "observation_period": [PERIODS[0], "6,6,2010-01-01,2020-12-31,0", "1,1,2010-01-01,2021-12-31,0"],
            "condition_occurrence": [CONDITION_HEADER, "21,6,301,2016-01-01,,,,0,,0", "22,7,301,2016-01-01,,,,0,,0"],
        },
    )
    result = load(work(path=str(new), mode="upsert", max_rejects=0.6))
    assert (result["persons"], result["rejected"]) == (6, 1)
    assert rows(engine, "SELECT gender_concept_id FROM omop.person WHERE person_id IN (1, 6)") == [(8532,), (8532,)]
    assert str(one(engine, "SELECT end_date FROM omop.observation_period WHERE person_id = 1")) == "2021-12-31"
    assert rows(engine, "SELECT rule, row_key FROM ops.reject") == [("unknown_person", "22")]


def test_many_appends_leave_few_partitions_and_each_row_its_load(tmp_path: Path, work: Make, engine: Engine) -> None:
    load(work(path=str(extract(tmp_path / "a", condition_occurrence=conditions()))))
    for i in range(24):
        load(work(path=delta(tmp_path / f"d{i}", f"{100 + i},1,301,2016-01-01,,,,0,,0"), mode="append"))
    assert one(engine, "SELECT count(*) FROM pg_inherits WHERE inhparent = 'omop.event'::regclass") <= 6
    assert one(engine, "SELECT count(DISTINCT load_id) FROM omop.event") == 25
    assert one(engine, "SELECT num_events FROM omop.timeline WHERE person_id = 1") == 28
    per_load = "SELECT load_id, count(*) FROM omop.event GROUP BY 1 ORDER BY 1"
    books = "SELECT load_id, num_shown FROM ops.load WHERE partition_name IS NOT NULL ORDER BY 1"
    assert rows(engine, per_load) == rows(engine, books)
    load(work(path=str(extract(tmp_path / "z")), allow_shrink=True))
    assert one(engine, "SELECT count(*) FROM pg_inherits WHERE inhparent = 'omop.event'::regclass") == 1
    states = "SELECT count(*) FROM ops.load WHERE state = 'published' AND table_name = 'condition_occurrence'"
    assert one(engine, states) == 1
    assert rows(engine, CHANGES)[-1] == (44, 20, 0, 0, 24)
