"""MEDS data sets: what becomes what, what is rejected, and what a delivery does to the store."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Engine, text

from app.errors import InputError
from app.loading import omop
from app.loading.meds import load
from app.store.codes_meds import parts, written
from app.store.work import InlineWork
from tests.app.loading.extracts import CONTENT, extract, one, rows
from tests.app.loading.meds_sets import at, data_set, person, shard

Make = Callable[..., InlineWork]


def add_concepts(engine: Engine, *concepts: tuple[int, str, str, str, str | None]) -> None:
    """Rows of concept: id, domain, vocabulary, code, standard."""
    statement = text("INSERT INTO omop.concept VALUES (:i, 'a name', :d, :v, 'x', :s, :c, NULL, NULL, NULL)")
    with engine.begin() as connection:
        for i, d, v, c, s in concepts:
            connection.execute(statement, {"i": i, "d": d, "v": v, "c": c, "s": s})


def test_rows_become_persons_events_and_static_facts(tmp_path: Path, work: Make, engine: Engine) -> None:
    folder = data_set(tmp_path, {"train/0": person(1), "held_out/0": person(2)})
    result = load(work(path=str(folder)))
    assert (result["persons"], result["events"], result["static_facts"], result["births"]) == (2, 8, 4, 2)
    assert "--follow-up last_event" in result["summary"]
    assert rows(engine, "SELECT person_id, birth_time, gender_concept_id, split FROM omop.person ORDER BY 1") == [
        (1, dt.datetime(1950, 1, 1), 8507, "train"),
        (2, dt.datetime(1950, 1, 2), 8507, "held_out"),
    ]
    events = "SELECT e.time, concept_code, value_as_number, e.domain FROM omop.event e LEFT JOIN omop.concept USING "
    assert rows(engine, events + "(concept_id) WHERE person_id = 1 ORDER BY source_row_id") == [
        (at(1), "LAB//SpO2", 0.5, "o"),
        (at(1), "LAB//SpO2", 0.5, "o"),
        (at(2), "I26.9", None, "o"),
        (at(20), None, None, "x"),
    ]
    assert rows(engine, "SELECT person_id, death_datetime FROM omop.death") == [(1, at(20)), (2, at(20))]
    facts = "SELECT concept_code, value_as_number, fills, at_birth FROM omop.static_fact JOIN omop.concept USING "
    assert rows(engine, facts + "(concept_id) WHERE person_id = 1 ORDER BY source_row_id") == [
        ("GENDER//M", None, "gender", False),
        ("HEIGHT", 180.5, None, False),
    ]
    assert rows(engine, "SELECT count(*), sum(num_events) FROM omop.timeline") == [(2, 8)]


def test_every_row_is_loaded_or_rejected_and_named_by_file_record_and_rule(
    tmp_path: Path, work: Make, engine: Engine
) -> None:
    bad = [
        (None, at(1), "A", None),
        (3, at(1), None, None),
        (3, at(1), "  ", None),
        (3, at(1, year=1799), "A", None),
        (3, at(1, year=2301), "A", None),
        (3, at(1), "A\0", None),
        (3, at(1), "A" * 1001, None),
        (3, None, "MEDS_BIRTH", None),
        (1, at(3, year=1960), "MEDS_BIRTH", None),
        (1, at(21), "MEDS_DEATH", None),
        (3, at(1), "A", float("nan")),
        (3, at(1), "A", float("inf")),
    ]
    folder = data_set(tmp_path, {"0": person(1), "1": bad})
    result = load(work(path=str(folder), max_rejects=0.5))
    assert (result["rejected"], result["persons"]) == (10, 2)
    assert rows(engine, "SELECT file, record, rule, column_name FROM ops.reject ORDER BY reject_id") == [
        ("data/1.parquet", 1, "unparsable_id", "subject_id"),
        ("data/1.parquet", 2, "missing_code", "code"),
        ("data/1.parquet", 3, "missing_code", "code"),
        ("data/1.parquet", 4, "time_out_of_range", "time"),
        ("data/1.parquet", 5, "time_out_of_range", "time"),
        ("data/1.parquet", 6, "nul_byte", "code"),
        ("data/1.parquet", 7, "code_too_long", "code"),
        ("data/1.parquet", 8, "missing_time", "time"),
        ("data/1.parquet", 9, "second_birth", "code"),
        ("data/1.parquet", 10, "second_death", "code"),
    ]
    assert one(engine, "SELECT flags_by_rule ->> 'number_unusable' FROM ops.load") == "1"
    assert one(engine, "SELECT flags_by_rule ->> 'person_in_several_files' FROM ops.load") is None
    assert rows(engine, "SELECT num_read, num_loaded, num_rejected FROM ops.load") == [(19, 9, 10)]


def test_the_gate_and_the_guard_stop_and_change_nothing(tmp_path: Path, work: Make, engine: Engine) -> None:
    load(work(path=str(data_set(tmp_path / "a", {"0": person(1), "1": person(2)}))))
    before = rows(engine, CONTENT), one(engine, "SELECT count(*) FROM ops.load")
    with pytest.raises(InputError, match=r"at most 5\.0% of the rows to be rejected, found 1 of 15"):
        load(work(path=str(data_set(tmp_path / "b", {"0": person(1), "1": [*person(2), (3, at(1), None, None)]}))))
    with pytest.raises(InputError, match="rows 14 → 7; 1 of 2 persons would vanish"):
        load(work(path=str(data_set(tmp_path / "c", {"0": person(1)}))))
    assert (rows(engine, CONTENT), one(engine, "SELECT count(*) FROM ops.load")) == before
    assert rows(engine, "SELECT load_id, record, rule FROM ops.reject") == [(None, 8, "missing_code")]


def test_loading_again_changes_nothing_and_earlier_files_go_back(tmp_path: Path, work: Make, engine: Engine) -> None:
    first = data_set(tmp_path / "a", {"0": person(1), "1": person(2)})
    load(work(path=str(first)))
    told = "SELECT person_id, time, concept_id, value_as_number, source_row_id FROM omop.event ORDER BY source_row_id"
    before = rows(engine, told)
    assert load(work(path=str(first)))["unchanged"]
    second = data_set(tmp_path / "b", {"0": person(1), "1": person(2), "2": [(3, at(1), "NEW", 1.0)]})
    assert load(work(path=str(second)))["persons"] == 3
    assert load(work(path=str(first), allow_shrink=True))["persons"] == 2
    assert rows(engine, told) == before
    assert rows(engine, "SELECT DISTINCT gender_concept_id FROM omop.person") == [(8507,)]
    assert rows(engine, "SELECT count(*) FROM pg_inherits WHERE inhparent = 'omop.event'::regclass") == [(1,)]


def test_a_concept_of_ones_own_stays_with_its_code_over_loads_and_sources(
    tmp_path: Path, work: Make, engine: Engine
) -> None:
    told = "SELECT concept_id FROM omop.concept WHERE vocabulary_id = 'ICD10CM' AND concept_code = 'I26.9'"
    load(work(path=str(data_set(tmp_path / "a", {"0": person(1)})), source="one"))
    before = rows(engine, told)
    load(work(path=str(data_set(tmp_path / "b", {"0": [*person(2), (2, at(1), "A", None)]})), source="two"))
    assert rows(engine, told) == before and before[0][0] > 2_000_000_000
    assert one(engine, "SELECT count(*) = count(DISTINCT (vocabulary_id, concept_code)) FROM omop.concept")
    assert one(engine, "SELECT count(DISTINCT concept_id) FROM omop.event WHERE source_concept_id = :c", c=before[0][0])


def test_codes_of_the_vocabulary_become_its_concepts_and_map_to_standard_ones(
    tmp_path: Path, work: Make, engine: Engine
) -> None:
    folder = data_set(tmp_path, {"0": person(1)})
    load(work(path=str(folder)))
    add_concepts(
        engine,
        (35208031, "Condition", "ICD10CM", "I26.9", None),
        (440417, "Condition", "SNOMED", "59282003", "S"),
    )
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO omop.concept_relationship VALUES (35208031, 440417, 'Maps to')"))
    assert not load(work(path=str(folder)))["unchanged"], "a better vocabulary makes the delivery another one"
    told = "SELECT concept_id, source_concept_id, domain FROM omop.event WHERE time = :t"
    assert rows(engine, told, t=at(2)) == [(440417, 35208031, "c")]
    assert load(work(path=str(folder)))["unchanged"]


def test_parent_codes_become_ancestors_through_all_levels(tmp_path: Path, work: Make, engine: Engine) -> None:
    codes = [
        {"code": "A", "description": "An A", "parent_codes": ["B", "C"]},
        {"code": "B", "description": None, "parent_codes": ["C"]},
        {"code": "C", "description": None, "parent_codes": ["D/1", "A"]},
        {"code": None, "description": "nothing", "parent_codes": None},
    ]
    folder = data_set(tmp_path, {"0": [(1, at(1), "A", None)]}, codes)
    load(work(path=str(folder)))
    pair = (
        "SELECT d.concept_code, a.concept_code, min_levels_of_separation, max_levels_of_separation "
        "FROM omop.concept_ancestor JOIN omop.concept d ON d.concept_id = descendant_concept_id "
        "JOIN omop.concept a ON a.concept_id = ancestor_concept_id WHERE d.concept_code = 'A' ORDER BY 3, 2"
    )
    assert rows(engine, pair) == [("A", "A", 0, 0), ("A", "B", 1, 1), ("A", "C", 1, 2), ("A", "1", 2, 3)]
    assert one(engine, "SELECT concept_name FROM omop.concept WHERE concept_code = 'A'") == "An A"
    assert rows(engine, "SELECT num_read, num_loaded, flags_by_rule FROM ops.load WHERE table_name = 'codes'") == [
        (4, 3, {"parent_circle": 1})
    ]


def test_visits_with_ends_come_from_visit_codes(tmp_path: Path, work: Make, engine: Engine) -> None:
    events = [
        (1, at(1), "Visit/IP", None),
        (1, at(1), "HR", 70.0),
        (1, at(9), "Visit/OP", None),
        (1, at(10), "HR", 71.0),
    ]
    more = {"end": [at(5), None, None, None], "visit_id": ["12", "12", None, "x"], "table": ["visit", "m", "v", None]}
    shard(tmp_path / "data" / "0.parquet", events, more)
    load(work(path=str(tmp_path)))
    visits = rows(
        engine,
        "SELECT visit_concept_id, visit_start_datetime, visit_end_datetime FROM omop.visit_occurrence ORDER BY 2",
    )
    assert visits == [(9201, at(1), at(5)), (9202, at(9), None)]
    told = "SELECT visit_occurrence_id FROM omop.event ORDER BY source_row_id"
    (first,), (second,), (third,), (fourth,) = rows(engine, told)
    assert (first, second, fourth) == (12, 12, None) and third == one(
        engine, "SELECT visit_occurrence_id FROM omop.visit_occurrence WHERE visit_concept_id = 9202"
    )
    assert one(engine, "SELECT flags_by_rule ->> 'unknown_visit' FROM ops.load") == "1"


@pytest.mark.parametrize("midnight_is_time", [False, True])
def test_midnight_is_a_date_unless_it_is_said_to_be_a_time(
    tmp_path: Path, work: Make, engine: Engine, midnight_is_time: bool
) -> None:
    folder = data_set(tmp_path, {"0": [(1, dt.datetime(2015, 3, 1), "A", None)]})
    load(work(path=str(folder), midnight_is_time=midnight_is_time))
    assert rows(engine, "SELECT time, date_only FROM omop.event") == [
        (dt.datetime(2015, 3, 1) if midnight_is_time else dt.datetime(2015, 3, 1, 23, 59, 59), not midnight_is_time)
    ]


def test_other_types_of_the_same_values_are_read_alike(tmp_path: Path, work: Make, engine: Engine) -> None:
    table = pa.table(
        {
            "subject_id": pa.array([1, 1], pa.uint8()),
            "time": pa.array([at(1), at(2)], pa.timestamp("ns", tz="UTC")),
            "code": pa.array(["A", "B"]).dictionary_encode(),
            "numeric_value": pa.array([1.5, None], pa.float64()),
            "clarity": pa.array([["x"], None], pa.list_(pa.string())),
        }
    )
    (tmp_path / "data").mkdir()
    pq.write_table(table, tmp_path / "data" / "0.parquet")
    load(work(path=str(tmp_path)))
    assert rows(engine, "SELECT person_id, time, value_as_number FROM omop.event ORDER BY 2") == [
        (1, at(1), 1.5),
        (1, at(2), None),
    ]


def test_a_person_in_two_shards_and_unsorted_rows_are_loaded_and_counted(
    tmp_path: Path, work: Make, engine: Engine
) -> None:
    load(work(path=str(data_set(tmp_path, {"0": [(1, at(2), "A", None), (1, at(1), "A", None)], "1": person(1)}))))
    flags = one(engine, "SELECT flags_by_rule FROM ops.load")
    assert (flags["person_in_several_files"], flags["rows_unsorted"]) == (1, 1)
    assert one(engine, "SELECT num_events FROM omop.timeline") == 6


def test_splits_come_from_their_file_before_the_folders(tmp_path: Path, work: Make, engine: Engine) -> None:
    folder = data_set(tmp_path, {"train/0": person(1), "tuning/0": person(2)}, [{"code": "HEIGHT"}])
    splits = pa.table({"subject_id": [1, 9, 1], "split": ["held_out", "train", "held_out"]})
    pq.write_table(splits, folder / "metadata" / "subject_splits.parquet")
    (folder / "metadata" / "dataset.json").write_text(json.dumps({"dataset_name": "N", "meds_version": "0.4.1"}))
    result = load(work(path=str(folder)))
    assert result["about"] == {"dataset_name": "N", "meds_version": "0.4.1"}
    assert rows(engine, "SELECT person_id, split FROM omop.person ORDER BY 1") == [(1, "held_out"), (2, None)]
    assert rows(engine, "SELECT rule FROM ops.reject ORDER BY record") == [("unknown_person",), ("duplicate_row",)]
    assert one(engine, "SELECT details -> 'meds' ->> 'dataset_name' FROM ops.source") == "N"


def test_what_is_no_meds_is_refused_with_what_to_do(tmp_path: Path, work: Make) -> None:
    def refused(folder: Path) -> str:
        with pytest.raises(InputError) as caught:
            load(work(path=str(folder)))
        return str(caught.value)

    (tmp_path / "empty").mkdir()
    assert "found no Parquet file" in refused(tmp_path / "empty")
    (tmp_path / "reader").mkdir()
    (tmp_path / "reader" / "meds_reader.length").touch()
    assert "binary database that meds_reader makes" in refused(tmp_path / "reader")
    (tmp_path / "old" / "data").mkdir(parents=True)
    pq.write_table(pa.table({"patient_id": [1]}), tmp_path / "old" / "data" / "0.parquet")
    assert "MEDS before 0.3" in refused(tmp_path / "old")
    (tmp_path / "torn" / "data").mkdir(parents=True)
    (tmp_path / "torn" / "data" / "0.parquet").write_bytes(b"PAR1")
    assert "a damaged one" in refused(tmp_path / "torn")
    (tmp_path / "file").touch()
    assert "found the file" in refused(tmp_path / "file")
    odd = data_set(tmp_path / "json", {"0": person(1)}, [{"code": "A"}])
    (odd / "metadata" / "dataset.json").write_text("[]")
    assert "JSON object" in refused(odd)


def test_sources_of_omop_and_meds_do_not_mix_and_persons_never_do(tmp_path: Path, work: Make, engine: Engine) -> None:
    omop.load(work(path=str(extract(tmp_path / "omop")), source="hospital"))
    folder = data_set(tmp_path / "meds", {"0": [(77, at(1), "A", None)]})
    with pytest.raises(InputError, match="`load omop` brought"):
        load(work(path=str(folder), source="hospital"))
    load(work(path=str(folder), source="other"))
    with pytest.raises(InputError, match="`load meds` brought"):
        omop.load(work(path=str(extract(tmp_path / "omop")), source="other"))
    with pytest.raises(InputError, match="1 of person that another source brought"):
        load(work(path=str(data_set(tmp_path / "b", {"0": person(1)})), source="third"))


def test_nothing_of_a_load_that_is_stopped_midway_stays(
    tmp_path: Path, work: Make, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(work(path=str(data_set(tmp_path / "a", {"0": person(1)}))))
    before = rows(engine, CONTENT), rows(engine, "SELECT concept_code FROM omop.concept ORDER BY 1")
    stopping = work(path=str(data_set(tmp_path / "b", {"0": [*person(1), (1, at(3), "NEW", None)]})))

    def stop(done: int, total: int | None = None, unit: str = "", note: str = "") -> None:
        if note == "writing static_fact":
            raise KeyboardInterrupt

    monkeypatch.setattr(stopping, "progress", stop)
    with pytest.raises(KeyboardInterrupt):
        load(stopping)
    assert (rows(engine, CONTENT), rows(engine, "SELECT concept_code FROM omop.concept ORDER BY 1")) == before


@pytest.mark.parametrize(
    ("folder", "counts"),
    [
        ("meds_aces_sample/meds_sample", (100, 77_442, 100, 0)),
        ("meds_femr_synthetic/synthetic", (200, 1_989, 400, 200)),
        ("meds_transforms_example/data", (6, 50, 12, 0)),
        ("meds_reference_from_omop/synthea27nj", (28, 24_727, 28, 28)),
    ],
)
def test_real_data_sets_are_loaded_without_loss(
    real_data: Path, work: Make, engine: Engine, folder: str, counts: tuple[int, ...]
) -> None:
    result = load(work(path=str(real_data / folder)))
    assert tuple(result[name] for name in ("persons", "events", "static_facts", "births")) == counts
    assert result["rejected"] == 0
    assert one(engine, "SELECT num_read FROM ops.load WHERE table_name = 'data'") == sum(counts[1:])
    assert one(engine, "SELECT sum(num_events) FROM omop.timeline") == counts[1]
    with pytest.raises(InputError, match="binary database"):
        load(work(path=str(real_data / "meds_femr_synthetic" / "synthetic_meds")))


@given(st.text(max_size=30), st.text(max_size=30))
def test_a_code_and_its_vocabulary_and_rest_are_each_others_inverse(left: str, right: str) -> None:
    for code in (left, f"{left}/{right}", f"{left}//{right}"):
        vocabulary, rest = parts(code)
        assert written(vocabulary, rest) in (code, None)
        assert written(vocabulary, rest) == code or code.startswith("OMOP_CONCEPT/")
