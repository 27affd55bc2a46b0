"""INSPECT as it is released: record, scans, splits and labels, and the unit of its times."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from app.errors import InputError
from app.loading import inspect, rules
from app.loading.inspect_labels import unit_of
from app.store.work import InlineWork
from tests.app.loading.extracts import one, rows
from tests.app.loading.release import WITHOUT_RECORD, WITHOUT_TIME, WITHOUT_VOLUME, Person, release

Make = Callable[..., InlineWork]


def load(work: Make, folder: Path, **more: Any) -> dict[str, Any]:
    return inspect.load(work(path=str(folder), source="inspect", **more))


def studies(persons: list[Person]) -> int:
    return sum(len(person.studies) for person in persons)


def test_a_release_becomes_persons_scans_splits_and_labels(work: Make, engine: Engine, tmp_path: Path) -> None:
    persons = release(tmp_path)
    result = load(work, tmp_path)
    total = studies(persons)
    assert one(engine, "SELECT count(*) FROM omop.person") == len(persons)
    assert one(engine, "SELECT count(*) FROM omop.image_occurrence") == total - 2
    assert rows(engine, "SELECT DISTINCT acquired_at_source FROM omop.image_occurrence") == [("procedure_datetime",)]
    assert rows(engine, "SELECT DISTINCT slice_thickness_mm FROM omop.image_occurrence") == [(1.25,)]
    assert dict(rows(engine, "SELECT person_id, split FROM omop.person")) == {
        p.person_id: {"train": "train", "valid": "tuning", "test": "held_out"}[p.split] for p in persons
    }
    assert one(engine, "SELECT count(DISTINCT impression_id) FROM label.released_label") == total
    assert result["tte_unit"] == "minutes" and "tte_* is in minutes" in result["summary"]


def test_each_study_that_is_left_out_says_why(work: Make, engine: Engine, tmp_path: Path) -> None:
    release(tmp_path)
    load(work, tmp_path)
    found = rows(engine, "SELECT table_name, rule, count(*) FROM ops.reject GROUP BY 1, 2 ORDER BY 1, 2")
    assert found == [
        ("image_occurrence", "duplicate_row", 1),
        ("image_occurrence", "missing_file", 1),
        ("image_occurrence", "no_acquisition_time", 1),
        ("image_occurrence", "unknown_person", 1),
        ("released_label", "duplicate_row", 1),
        ("split", "unknown_person", 1),
    ]
    assert {rule for _, rule, _ in found} <= set(rules.REJECTS)
    assert rows(engine, "SELECT load_id FROM ops.load WHERE num_read <> num_loaded + num_rejected") == []
    assert rows(engine, f"SELECT * FROM omop.image_occurrence WHERE person_id = {WITHOUT_RECORD}") == []


def test_labels_of_studies_without_a_volume_or_a_time_are_kept_without_a_scan(
    work: Make, engine: Engine, tmp_path: Path
) -> None:
    release(tmp_path)
    load(work, tmp_path)
    without = rows(engine, "SELECT DISTINCT person_id FROM label.released_label WHERE image_occurrence_id IS NULL")
    assert {person for (person,) in without} == {100 + WITHOUT_TIME, 100 + WITHOUT_VOLUME}
    wrong = (
        "SELECT count(*) FROM label.released_label r JOIN omop.image_occurrence i USING (image_occurrence_id) "
        "WHERE i.person_id <> r.person_id OR i.path NOT LIKE '%' || translate(r.impression_id, 'i_', '') || '.nii.gz'"
    )
    assert one(engine, wrong) == 0


def test_released_labels_are_those_of_the_record_in_days(work: Make, engine: Engine, tmp_path: Path) -> None:
    persons = {p.person_id: p for p in release(tmp_path)}
    load(work, tmp_path)
    found = rows(
        engine,
        "SELECT person_id, impression_id, status, time_days FROM label.released_label "
        "WHERE kind = 'tte' AND task = 'pulmonary_hypertension'",
    )
    assert len(found) == studies(list(persons.values()))
    for person, impression, status, days in found:
        time, censored = persons[person].tte("PH", persons[person].studies[int(impression[-1])])
        assert status == ("censored" if censored else "event")
        assert days == pytest.approx(time.total_seconds() / 86_400)
    horizons = rows(
        engine,
        "SELECT DISTINCT task, horizon_days FROM label.released_label WHERE kind = 'horizon' ORDER BY 1, 2",
    )
    assert horizons == [
        *(("mortality", days) for days in (30, 180, 365)),
        ("pulmonary_hypertension", 365),
        *(("readmission", days) for days in (30, 180, 365)),
    ]
    assert rows(engine, "SELECT DISTINCT task FROM label.released_label WHERE kind = 'diagnosis'") == [
        ("pe_positive_nlp",)
    ]


@pytest.mark.parametrize(("unit", "seconds"), [("seconds", 1), ("minutes", 60), ("hours", 3600), ("days", 86_400)])
def test_the_unit_of_released_times_is_found_from_the_record(
    work: Make, engine: Engine, tmp_path: Path, unit: str, seconds: int
) -> None:
    release(tmp_path, unit_seconds=seconds)
    result = load(work, tmp_path)
    assert result["tte_unit"] == unit
    assert result["tte_unit_deviation"] < 0.001
    assert one(engine, "SELECT max(time_days) FROM label.released_label") == pytest.approx(
        one(engine, "SELECT max(released_time) FROM label.released_label") * seconds / 86_400
    )


def test_a_unit_that_agrees_with_nothing_is_not_guessed_and_may_be_said(
    work: Make, engine: Engine, tmp_path: Path
) -> None:
    release(tmp_path, unit_seconds=700)
    result = load(work, tmp_path)
    assert result["tte_unit"] is None and "cannot be told" in result["summary"]
    assert one(engine, "SELECT count(time_days) FROM label.released_label") == 0
    said = load(work, tmp_path, tte_unit="minutes")
    assert said["tte_unit"] == "minutes" and "as --tte-unit says" in said["summary"] and not said["unchanged"]
    assert one(engine, "SELECT count(time_days) FROM label.released_label") > 0


def test_few_studies_do_not_tell_the_unit() -> None:
    assert unit_of([(1.0, 60.0)] * 4).name is None
    assert unit_of([(1.0, 60.0)] * 5).name == "minutes"
    assert unit_of([(0.0, 60.0), (5.0, -1.0)]).studies == 0
    assert unit_of([(1.0, 61.0)] * 5).name == "minutes" and unit_of([(1.0, 70.0)] * 5).name is None


def test_loading_a_release_again_changes_nothing(work: Make, engine: Engine, tmp_path: Path) -> None:
    release(tmp_path)
    load(work, tmp_path)
    content = "SELECT count(*), max(released_label_id) FROM label.released_label"
    before = rows(engine, content), one(engine, "SELECT count(*) FROM ops.load")
    again = load(work, tmp_path)
    assert again["unchanged"] and again["summary"].startswith("unchanged: ")
    assert (rows(engine, content), one(engine, "SELECT count(*) FROM ops.load")) == before


def test_a_volume_that_comes_later_gets_its_labels(work: Make, engine: Engine, tmp_path: Path) -> None:
    release(tmp_path)
    load(work, tmp_path)
    image = f"PE{100 + WITHOUT_VOLUME}0.nii.gz"
    shutil.copy(tmp_path / "CTPA" / "PE1010.nii.gz", tmp_path / "CTPA" / image)
    assert not load(work, tmp_path)["unchanged"]
    missing = "SELECT DISTINCT person_id FROM label.released_label WHERE image_occurrence_id IS NULL"
    assert rows(engine, missing) == [(100 + WITHOUT_TIME,)]
    assert rows(engine, "SELECT count(*) FROM ops.load WHERE table_name = 'split' GROUP BY state") == [(1,), (1,)]


def test_splits_come_back_when_the_record_was_loaded_anew(work: Make, engine: Engine, tmp_path: Path) -> None:
    from app.loading import omop

    release(tmp_path)
    load(work, tmp_path)
    person = tmp_path / "EHR" / "person.csv"
    person.write_text(person.read_text().replace("1950", "1951"))
    omop.load(work(path=str(tmp_path / "EHR"), source="inspect"))
    assert one(engine, "SELECT count(split) FROM omop.person") == 0
    assert not load(work, tmp_path)["unchanged"]
    assert one(engine, "SELECT count(split) FROM omop.person") == 12


def test_record_and_volumes_may_lie_elsewhere(work: Make, engine: Engine, tmp_path: Path) -> None:
    release(tmp_path / "a")
    for name in ("EHR", "CTPA"):
        shutil.move(tmp_path / "a" / name, tmp_path / name)
    with pytest.raises(InputError, match="Expected the OMOP tables of the record"):
        load(work, tmp_path / "a")
    load(work, tmp_path / "a", ehr=str(tmp_path / "EHR"), images=str(tmp_path / "CTPA"))
    scans = one(engine, "SELECT count(*) FROM omop.image_occurrence")
    assert scans > 10
    later = load(work, tmp_path / "a")
    assert "as source inspect shows it" in later["summary"] and "none loaded" in later["summary"]
    assert one(engine, "SELECT count(*) FROM omop.image_occurrence") == scans


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("splits_20250611.tsv", None, "Expected splits_YYYYMMDD.tsv"),
        ("labels_20250611.tsv", b"id\tx\n1\t2\n", "Expected the column impression_id in labels_20250611.tsv"),
        ("study_mapping_20250611.tsv", b"\xff\xfe\x00", "Expected text in UTF-8 in study_mapping_20250611.tsv"),
        ("labels_20250611.csv", b"impression_id\n", "Expected one file of labels, found 2"),
    ],
)
def test_a_release_that_cannot_be_used_is_refused_in_one_sentence_before_anything_is_written(
    work: Make, engine: Engine, tmp_path: Path, name: str, change: bytes | None, message: str
) -> None:
    release(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    if change is not None:
        (tmp_path / name).write_bytes(change)
    with pytest.raises(InputError, match=message) as refused:
        load(work, tmp_path)
    assert "\n" not in str(refused.value)
    assert one(engine, "SELECT count(*) FROM omop.person") == 0


def test_a_newer_release_of_a_file_wins(work: Make, engine: Engine, tmp_path: Path) -> None:
    release(tmp_path)
    older = tmp_path / "splits_20240101.tsv"
    older.write_text("impression_id\tperson_id\tsplit\ni101_0\t101\ttest\n")
    load(work, tmp_path)
    assert one(engine, "SELECT count(split) FROM omop.person") == 12


def test_rows_that_make_no_sense_are_rejected_by_rule(work: Make, engine: Engine, tmp_path: Path) -> None:
    release(tmp_path)
    with (tmp_path / "splits_20250611.tsv").open("a") as file:
        file.write("i101_0\t101\ttest\nx\t102\tholdout\nx\tabc\ttrain\nx\t1\n")
    with (tmp_path / "labels_20250611.tsv").open("a") as file:
        file.write("nowhere" + "\tmaybe" * 25 + "\n")
    mapping = tmp_path / "study_mapping_20250611.tsv"
    mapping.write_text(
        mapping.read_text() + "z1\t101\t../secret\tn\t1\t2012-01-01\t\tx\nz2\t101\t\tn\t1\t2012-01-01\t\tx\n"
    )
    load(work, tmp_path)
    found = dict(rows(engine, "SELECT rule, count(*) FROM ops.reject WHERE table_name = 'split' GROUP BY 1"))
    assert found == {
        "conflicting_split": 3,
        "unknown_split": 1,
        "unparsable_id": 1,
        "unknown_person": 1,
        "wrong_number_of_fields": 1,
    }
    assert one(engine, "SELECT split FROM omop.person WHERE person_id = 101") is None
    reasons = rows(engine, "SELECT DISTINCT rule FROM ops.reject WHERE table_name <> 'split'")
    assert {"unknown_study", "path_outside_root", "missing_path"} <= {rule for (rule,) in reasons}
    known = {*rules.REJECTS, *rules.FLAGS}
    assert {rule for (rule,) in rows(engine, "SELECT rule FROM ops.reject")} <= known


def test_cells_that_are_no_labels_are_counted(work: Make, engine: Engine, tmp_path: Path) -> None:
    release(tmp_path)
    labels = tmp_path / "labels_20250611.tsv"
    header, first, *rest = labels.read_text().splitlines()
    cells = first.split("\t")
    cells[1], cells[-2] = "perhaps", "soon"
    labels.write_text("\n".join([header, "\t".join(cells), *rest]) + "\n")
    assert load(work, tmp_path)["unparsable_labels"] == 2
    flags = one(engine, "SELECT flags_by_rule FROM ops.load WHERE table_name = 'released_label'")
    assert flags == {"unparsable_label": 2} and set(flags) <= set(rules.FLAGS)
