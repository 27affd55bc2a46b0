"""Real extracts load as they are, and every record is accounted for."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from app.loading.cdm import EVENTS
from app.loading.extract import find_extract
from app.loading.omop import load
from app.store.work import InlineWork
from tests.app.loading.extracts import rows
from tests.reference.loading import pack_timelines, rows_of_file

Make = Callable[..., InlineWork]

EXTRACTS = (
    "omop_gibleed_broadsea_5.3",
    "omop_synthea27nj_5.4",
    "omop_synthea27nj_parquet_5.4",
    "omop_mimic_iv_demo_5.3_partial",
)
VISIT_COLUMNS = "visit_occurrence_id, visit_start_datetime, visit_end_datetime, date_only, end_date_only"
EVENT_COLUMNS = (
    "person_id, time, date_only, concept_id, source_concept_id, value_as_number, value_as_concept_id, unit_concept_id, "
    "end_time, visit_occurrence_id, domain, source_row_id"
)


def independent(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Every table's rows as Python's own readers see them."""
    _, files = find_extract(folder)
    return {table: [row for part in parts for row in rows_of_file(part.path)] for table, parts in files.items()}


@pytest.mark.parametrize("name", EXTRACTS)
def test_every_record_of_a_real_extract_is_loaded_or_rejected_and_packed(
    name: str, real_data: Path, work: Make, engine: Engine
) -> None:
    result = load(work(path=str(real_data / name)))
    counted = independent(real_data / name)
    loads = rows(engine, "SELECT table_name, num_read, num_loaded, num_rejected FROM ops.load")
    assert {table for table, *_ in loads} == set(counted) - set(result["ignored"])
    persons = {int(row["person_id"]) for row in counted["person"]}
    for table, read, loaded, rejected in loads:
        assert read == len(counted[table]) == loaded + rejected, table
        if table in EVENTS or table == "observation_period":
            known = sum(int(row["person_id"]) in persons for row in counted[table])
            assert loaded == known, table
    events = {table: loaded for table, _, loaded, _ in loads if table in EVENTS}
    assert rows(engine, "SELECT count(*) FROM omop.event") == [(sum(events.values()),)]
    assert rows(engine, "SELECT count(*) FROM ops.reject") == [(sum(rejected for *_, rejected in loads),)]
    concepts = Counter(
        int(row[EVENTS[table].concept]) for table in events if EVENTS[table].concept for row in counted[table]
    )
    found = rows(engine, "SELECT concept_id, count(*) FROM omop.event WHERE domain <> 'x' GROUP BY 1")
    assert dict(found) == dict(concepts)
    stored = rows(
        engine, "SELECT person_id, floor(extract(epoch FROM time))::bigint, date_only, concept_id FROM omop.event"
    )
    packed = rows(engine, "SELECT person_id, num_events, times, concepts, digest FROM omop.timeline")
    assert {person: (n, bytes(t), bytes(c), bytes(d)) for person, n, t, c, d in packed} == pack_timelines(stored)


def test_both_forms_of_one_extract_give_equal_rows(real_data: Path, work: Make, engine: Engine) -> None:
    seen = []
    for name in ("omop_synthea27nj_5.4", "omop_synthea27nj_parquet_5.4"):
        result = load(work(path=str(real_data / name)))
        assert not result["unchanged"]
        seen.append(
            [
                rows(engine, f"SELECT {EVENT_COLUMNS} FROM omop.event ORDER BY domain, source_row_id"),
                rows(engine, "SELECT * FROM omop.timeline ORDER BY person_id"),
                rows(engine, "SELECT person_id, birth_time, person_source_value FROM omop.person ORDER BY 1"),
                rows(engine, "SELECT * FROM omop.concept ORDER BY 1"),
                rows(engine, f"SELECT {VISIT_COLUMNS} FROM omop.visit_occurrence ORDER BY visit_occurrence_id"),
            ]
        )
    assert seen[0] == seen[1]
    assert len(rows(engine, "SELECT inhrelid FROM pg_inherits WHERE inhparent = 'omop.event'::regclass")) == 9


def test_the_flags_of_gibleed_are_those_counted_by_hand_and_loading_it_again_changes_nothing(
    real_data: Path, work: Make, engine: Engine
) -> None:
    result = load(work(path=str(real_data / "omop_gibleed_broadsea_5.3")))
    assert (result["persons"], result["events"], result["rejected"]) == (2694, 217_015, 2649)
    flags = dict(rows(engine, "SELECT table_name, flags_by_rule FROM ops.load WHERE flags_by_rule <> '{}'"))
    outside = {table: found["outside_observation_period"] for table, found in flags.items()}
    assert outside == {
        "condition_occurrence": 85,
        "drug_exposure": 80,
        "measurement": 4,
        "procedure_occurrence": 15,
        "observation": 3,
    }
    assert flags["condition_occurrence"]["source_concept_absent"] == 27
    assert flags["drug_exposure"]["source_concept_absent"] == 35
    assert flags["drug_exposure"]["before_birth"] == 1
    assert flags["condition_occurrence"]["unknown_visit"] == 64_717
    assert rows(engine, "SELECT bool_and(date_only), bool_and(time::time = '23:59:59') FROM omop.event") == [
        (True, True)
    ]
    assert rows(engine, "SELECT DISTINCT rule, column_name FROM ops.reject") == [("unknown_person", "person_id")]
    state = "SELECT (SELECT max(load_id) FROM ops.load), (SELECT max(xmin::text::bigint) FROM omop.person)"
    before = rows(engine, state)
    assert load(work(path=str(real_data / "omop_gibleed_broadsea_5.3")))["unchanged"] is True
    assert rows(engine, state) == before


def test_identifiers_of_64_bits_survive_to_the_last_digit(real_data: Path, work: Make, engine: Engine) -> None:
    folder = real_data / "omop_mimic_iv_demo_5.3_partial"
    load(work(path=str(folder)))
    counted = independent(folder)
    assert {row[0] for row in rows(engine, "SELECT person_id FROM omop.person")} == {
        int(row["person_id"]) for row in counted["person"]
    }
    stored = rows(engine, "SELECT source_row_id, person_id FROM omop.event WHERE domain = 'p'")
    assert dict(stored) == {
        int(r["procedure_occurrence_id"]): int(r["person_id"]) for r in counted["procedure_occurrence"]
    }
    assert min(row[0] for row in stored) < -(2**53) and max(row[0] for row in stored) > 2**53
    visits = {int(row["visit_occurrence_id"]) for row in counted["visit_occurrence"]}
    linked = rows(engine, "SELECT source_row_id, visit_occurrence_id FROM omop.event WHERE domain = 'c'")
    expected = {
        int(row["condition_occurrence_id"]): int(row["visit_occurrence_id"])
        for row in counted["condition_occurrence"]
        if row["visit_occurrence_id"] and int(row["visit_occurrence_id"]) in visits
    }
    assert {key: visit for key, visit in linked if visit is not None} == expected


def test_parquet_with_time_zones_loads_by_wall_clock(real_data: Path, work: Make, engine: Engine) -> None:
    folder = real_data / "omop_carpentries_parquet"
    result = load(work(path=str(folder), max_rejects=1))
    assert result["persons"] == 8
    measurements = independent(folder)["measurement"]
    ids = Counter(row["measurement_id"] for row in measurements)
    once = {
        row["measurement_id"]: (row["measurement_date"], row["measurement_datetime"])
        for row in measurements
        if ids[row["measurement_id"]] == 1
    }
    stored = rows(engine, "SELECT source_row_id, time, date_only FROM omop.event WHERE domain = 'm'")
    assert {key for key, *_ in stored} == set(once) and len(once) < len(ids)  # this extract uses ids twice
    for key, time, date_only in stored:
        day, zoned = once[key]
        moment = zoned.replace(tzinfo=None) if zoned else dt.datetime.combine(day, dt.time())
        assert date_only == (moment.time() == dt.time())
        assert time == (moment.replace(hour=23, minute=59, second=59) if date_only else moment)
