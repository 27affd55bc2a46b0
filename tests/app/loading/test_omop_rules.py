"""Every rule of loading, on small extracts: what is rejected, what is kept and flagged, what is refused as a whole."""

from __future__ import annotations

import datetime as dt
import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


REJECTS = "SELECT file, record, column_name, rule, row_key FROM ops.reject ORDER BY record"

BadRow = tuple[str, str | None, str, str | None]

BAD_ROWS: dict[str, BadRow] = {
    "key": ("x99,1,300,2015-01-01,,,,0,,0", "condition_occurrence_id", "unparsable_id", None),
    "key with a fraction": ("99.5,1,300,2015-01-01,,,,0,,0", "condition_occurrence_id", "unparsable_id", None),
    "key in exponents": ("1e3,1,300,2015-01-01,,,,0,,0", "condition_occurrence_id", "unparsable_id", None),
    "key too large": (
        "9223372036854775808,1,300,2015-01-01,,,,0,,0", "condition_occurrence_id", "unparsable_id", None
    ),
    "key empty": (",1,300,2015-01-01,,,,0,,0", "condition_occurrence_id", "unparsable_id", None),
    "person": ("99,one,300,2015-01-01,,,,0,,0", "person_id", "unparsable_id", "99"),
    "unknown person": ("99,77,300,2015-01-01,,,,0,,0", "person_id", "unknown_person", "99"),
    "concept": ("99,1,ICD10,2015-01-01,,,,0,,0", "condition_concept_id", "unparsable_id", "99"),
    "negative concept": ("99,1,-300,2015-01-01,,,,0,,0", "condition_concept_id", "unparsable_id", "99"),
    "source concept": ("99,1,300,2015-01-01,,,,0,,E11", "condition_source_concept_id", "unparsable_id", "99"),
    "visit": ("99,1,300,2015-01-01,,,,0,v1,0", "visit_occurrence_id", "unparsable_id", "99"),
    "no time": ("99,1,300,,,,,0,,0", "condition_start_date", "missing_time", "99"),
    "date in words": ("99,1,300,yesterday,,,,0,,0", "condition_start_date", "unparsable_time", "99"),
    "30 February": ("99,1,300,2015-02-30,,,,0,,0", "condition_start_date", "unparsable_time", "99"),
    "month first": ("99,1,300,01/02/2015,,,,0,,0", "condition_start_date", "unparsable_time", "99"),
    "infinity": ("99,1,300,infinity,,,,0,,0", "condition_start_date", "unparsable_time", "99"),
    "hour 25": ("99,1,300,2015-01-01,2015-01-01 25:00:00,,,0,,0", "condition_start_datetime", "unparsable_time", "99"),
    "end in words": ("99,1,300,2015-01-01,,soon,,0,,0", "condition_end_date", "unparsable_time", "99"),
    "before 1800": ("99,1,300,1799-12-31,,,,0,,0", "condition_start_date", "time_out_of_range", "99"),
    "hour 24": ("99,1,300,2015-01-01,2015-01-01 24:00:00,,,0,,0", "condition_start_datetime", "unparsable_time", "99"),
    "after 2300": ("99,1,300,2301-01-01,,,,0,,0", "condition_start_date", "time_out_of_range", "99"),
}  # fmt: skip
BAD_SHAPES: dict[str, BadRow] = {
    "NUL": ("99,1,300,2015-01-01,,,,0,,\0", None, "nul_byte", None),
    "a field too many": ("99,1,300,2015-01-01,,,,0,,0,extra", None, "wrong_number_of_fields", None),
    "a field too few": ("99,1,300,2015-01-01", None, "wrong_number_of_fields", None),
    "text after a quote": ('99,1,300,"2015-01-01"x,,,,0,,0', None, "malformed_quotes", None),
}  # fmt: skip


def _judge_bad_rows(bad: dict[str, BadRow], folder: Path, work: Make, engine: Engine) -> None:
    """Bad rows among sound ones: each is rejected at its place, and all sound ones are loaded."""
    lines, expected = list(CONDITIONS[:8]), []
    for line, column, rule, key in bad.values():
        lines.append(line.replace("99,", f"{len(lines) + 1000},", 1) if key else line)
        found_key = str(len(lines) + 999) if key else None
        expected.append(("condition_occurrence.csv", len(lines) - 1, column, rule, found_key))
    lines += CONDITIONS[8:]
    result = load(work(path=str(extract(folder, condition_occurrence=lines)), max_rejects=1))
    assert dict(zip(bad, rows(engine, REJECTS), strict=True)) == dict(zip(bad, expected, strict=True))
    assert (result["events"], result["rejected"]) == (20, len(bad))
    counts = "SELECT num_read, num_loaded, num_rejected FROM ops.load WHERE table_name = 'condition_occurrence'"
    assert rows(engine, counts) == [(20 + len(bad), 20, len(bad))]
    assert one(engine, "SELECT sum(num_events) FROM omop.timeline") == 20


def test_rows_whose_values_cannot_be_are_rejected_with_place_rule_column_and_key(
    tmp_path: Path, work: Make, engine: Engine
) -> None:
    _judge_bad_rows(BAD_ROWS, tmp_path, work, engine)


def test_records_of_another_shape_are_rejected_and_the_others_keep_their_numbers(
    tmp_path: Path, work: Make, engine: Engine
) -> None:
    _judge_bad_rows(BAD_SHAPES | BAD_ROWS, tmp_path, work, engine)


def test_one_bad_row_of_21_passes_the_gate_of_5_percent(tmp_path: Path, work: Make, engine: Engine) -> None:
    line, column, rule, key = BAD_ROWS["concept"]
    load(work(path=str(extract(tmp_path, condition_occurrence=conditions(line)))))
    assert rows(engine, REJECTS) == [("condition_occurrence.csv", 21, column, rule, key)]


def test_a_key_that_comes_twice_with_other_content_is_rejected_wholly(
    tmp_path: Path, work: Make, engine: Engine
) -> None:
    folder = extract(tmp_path, condition_occurrence=conditions("3,1,999,2015-01-01,,,,0,,0"))
    load(work(path=str(folder), max_rejects=0.2))
    assert [row[1:] for row in rows(engine, REJECTS)] == [
        (3, "condition_occurrence_id", "duplicate_key", "3"),
        (21, "condition_occurrence_id", "duplicate_key", "3"),
    ]
    assert one(engine, "SELECT count(*) FROM omop.event") == 19


def test_a_copy_of_a_row_is_loaded_once_and_does_not_count_at_the_gate(
    tmp_path: Path, work: Make, engine: Engine
) -> None:
    folder = extract(tmp_path, condition_occurrence=[*CONDITIONS, *CONDITIONS[1:]])
    load(work(path=str(folder), max_rejects=0))
    assert one(engine, "SELECT count(*) FROM omop.event") == 20
    assert {row[3] for row in rows(engine, REJECTS)} == {"duplicate_row"}
    assert min(row[1] for row in rows(engine, REJECTS)) == 21


def test_of_two_deaths_the_earlier_one_stays(tmp_path: Path, work: Make, engine: Engine) -> None:
    deaths = [DEATH_HEADER, "1,2019-05-02,,0,0", "1,2019-05-01,2019-05-01 07:00:00,0,321"]
    load(work(path=str(extract(tmp_path, death=deaths)), max_rejects=1))
    assert rows(engine, "SELECT death_datetime, date_only FROM omop.death") == [(dt.datetime(2019, 5, 1, 7), False)]
    assert rows(engine, "SELECT concept_id, value_as_concept_id FROM omop.event WHERE domain = 'x'") == [(4306655, 321)]
    assert rows(engine, REJECTS) == [("death.csv", 1, "person_id", "duplicate_key", "1")]


def test_times_of_day_midnights_and_dates(tmp_path: Path, work: Make, engine: Engine) -> None:
    lines = [
        CONDITION_HEADER,
        "1,1,300,2015-01-01,2015-01-01 10:11:12.5,2015-01-03,,0,,0",
        "2,1,300,2015-01-01,2015-01-01 00:00:00,2015-01-03,2015-01-03 04:00,0,,0",
        "3,1,300,2015-01-01,,,,0,,0",
        "4,1,300,,2015-01-01T23:00:00-05:00,,,0,,0",
        "5,1,300,20150101,2015-01-01,9999-12-31,,0,,0",
        "6,1,300,2015-01-01 00:00:00,\\N,NULL,,0,,0",
    ]
    folder = extract(tmp_path, condition_occurrence=lines)
    load(work(path=str(folder)))
    day, last = dt.datetime(2015, 1, 1), dt.datetime(2015, 1, 1, 23, 59, 59)
    found = rows(engine, "SELECT source_row_id, time, date_only, end_time FROM omop.event ORDER BY 1")
    assert found == [
        (
            1,
            day.replace(hour=10, minute=11, second=12, microsecond=500_000),
            False,
            dt.datetime(2015, 1, 3, 23, 59, 59),
        ),
        (2, last, True, dt.datetime(2015, 1, 3, 4)),
        (3, last, True, None),
        (4, day.replace(hour=23), False, None),
        (5, last, True, None),
        (6, last, True, None),
    ]
    assert one(engine, "SELECT flags_by_rule ->> 'end_out_of_range' FROM ops.load WHERE partition_name <> ''") == "1"
    load(work(path=str(folder), midnight_is_time=True))
    found = rows(engine, "SELECT source_row_id, time, date_only FROM omop.event ORDER BY 1")
    assert found[1] == (2, day, False) and found[2] == (3, last, True) and found[4] == (5, last, True)


def test_what_a_real_extract_has_is_kept_and_flagged(tmp_path: Path, work: Make, engine: Engine) -> None:
    lines = [
        MEASUREMENT_HEADER,
        "1,1,3000,2015-01-01,,7.25,,8840,10,0",
        "2,1,0,2015-01-02,,>10,,,,0",
        "3,1,3001,2015-01-03,,NaN,4181412.0,,99,0",
        "4,1,3001,1940-01-01,,1e40,,,,0",
        "5,1,3001,2019-06-02,,-1,,,,0",
        "6,1,3001,2021-01-01,,,,,,2000000001",
        "7,1,3001,2290-01-01,,,,,,0",
    ]
    visits = [VISIT_HEADER, "10,1,9202,2015-01-01,2015-01-01 08:00:00,2014-12-31,,0,8536,"]
    concepts = [
        "concept_id,concept_name,domain_id,vocabulary_id,concept_class_id,standard_concept,concept_code,"
        "valid_start_date,valid_end_date,invalid_reason",
        "3000,A,Measurement,LOINC,Lab Test,S,1-1,19700101,20991231,",
        "9202,Outpatient,Visit,None,Visit,S,OP,1970-01-01,2099-12-31,",
    ]
    folder = write(
        tmp_path,
        {
            "person": PERSONS,
            "observation_period": PERIODS,
            "measurement": lines,
            "visit_occurrence": visits,
            "death": [DEATH_HEADER, "1,2019-06-01,,0,"],
            "concept": concepts,
        },
    )
    load(work(path=str(folder)))
    flags = dict(rows(engine, "SELECT table_name, flags_by_rule FROM ops.load"))
    assert flags["measurement"] == {
        "concept_zero": 1,
        "number_unusable": 3,
        "in_the_future": 1,
        "before_birth": 1,
        "after_death": 3,
        "outside_observation_period": 3,
        "concept_absent": 5,
        "source_concept_absent": 1,
        "unknown_visit": 1,
    }
    assert flags["visit_occurrence"] == {"end_before_start": 1}
    measured = rows(
        engine,
        "SELECT value_as_number, value_as_concept_id, unit_concept_id, visit_occurrence_id FROM omop.measurement "
        "WHERE measurement_id IN (1, 3) ORDER BY measurement_id",
    )
    assert measured == [(7.25, None, 8840, 10), (None, 4181412, None, None)]
    assert rows(engine, "SELECT vocabulary_id, valid_end_date FROM omop.concept WHERE concept_id = 9202") == [
        ("None", dt.date(2099, 12, 31))
    ]
    assert rows(engine, "SELECT visit_start_datetime, visit_end_datetime, date_only, end_date_only, "
                        "discharged_to_concept_id FROM omop.visit_occurrence") == [
        (dt.datetime(2015, 1, 1, 8), dt.datetime(2014, 12, 31, 23, 59, 59), False, True, 8536)
    ]  # fmt: skip


def test_persons_are_born_as_well_as_is_known(tmp_path: Path, work: Make, engine: Engine) -> None:
    persons = [
        "person_id,gender_concept_id,year_of_birth,month_of_birth,day_of_birth,birth_datetime,race_concept_id",
        "1,8507,1950,,,,",
        "2,8532,1950,7,0,,8527",
        "-3,,1950,7,9,1951-01-02 03:04:05,",
        "4,0,,,,,0",
        "5,0,1950,13,1,,0",
        "6,0,1650,1,1,,0",
    ]
    load(work(path=str(extract(tmp_path, person=persons, condition_occurrence=[CONDITION_HEADER]))))
    assert rows(engine, "SELECT person_id, birth_time, gender_concept_id FROM omop.person ORDER BY 1 DESC") == [
        (4, None, 0),
        (2, dt.datetime(1950, 7, 1), 8532),
        (1, dt.datetime(1950, 1, 1), 8507),
        (-3, dt.datetime(1951, 1, 2, 3, 4, 5), 0),
    ]
    found = [row[3:] for row in rows(engine, REJECTS) if row[0] == "person.csv"]
    assert found == [("unparsable_time", "5"), ("time_out_of_range", "6")]


@pytest.mark.parametrize(
    ("encode", "name"),
    [
        (lambda t: "\r\n".join(t).encode(), "condition_occurrence.csv"),
        (lambda t: b"\xef\xbb\xbf" + "\n".join(t).encode(), "CONDITION_OCCURRENCE.CSV"),
        (lambda t: "\n".join(t).replace(",", "\t").upper().encode(), "Condition_Occurrence.tsv"),
        (lambda t: gzip.compress("\n".join(t[:9]).encode() + b"\n") + gzip.compress("\n".join(t[9:]).encode()),
         "condition_occurrence.csv.gz"),
        (lambda t: ("\r\n".join(t[:5]) + "\n" + "\n\n".join(t[5:]) + "\n").encode(), "condition_occurrence.csv"),
        (lambda t: "\n".join(",".join(f'"{c}"' for c in line.split(",")) for line in t).encode(),
         "condition_occurrence.csv"),
        (lambda t: "\n".join(t).replace(",", ";").encode(), "condition_occurrence.txt"),
        (lambda t: "\n".join(["note," + t[0], *(f'"a ""b"",\nc",{line}' for line in t[1:])]).encode(),
         "condition_occurrence.csv"),
        (lambda t: "\n".join(["note\t" + t[0].replace(",", "\t"), *('5" x\t' + x.replace(",", "\t") for x in t[1:])])
         .encode(), "condition_occurrence.csv"),
        (lambda t: "\n".join([t[0], *(f"{line}," for line in t[1:])]).encode(), "condition_occurrence.csv"),
        (lambda t: "\n".join(t).replace("condition_start_date,", "\"date(condition_start_date,'unixepoch')\",")
         .encode(), "condition_occurrence.csv"),
    ],
    ids=["crlf", "bom", "tab", "gzip-members", "mixed", "quoted", "semicolon", "newlines", "inches", "trailing", "sql"],
)  # fmt: skip
def test_one_table_in_many_dialects_gives_the_same_rows(
    encode: Callable[[list[str]], bytes], name: str, tmp_path: Path, work: Make, engine: Engine
) -> None:
    folder = write(tmp_path, {"person": PERSONS, "observation_period": PERIODS, name: encode(CONDITIONS)})
    result = load(work(path=str(folder)))
    assert (result["events"], result["rejected"]) == (20, 0)
    assert rows(engine, "SELECT source_row_id, person_id, concept_id, time, date_only FROM omop.event ORDER BY 1") == [
        (i, i % 5 + 1, 300 + i, dt.datetime(2015, 3, i, 10), False) for i in range(1, 21)
    ]


def test_a_folder_of_shards_is_one_table(tmp_path: Path, work: Make, engine: Engine) -> None:
    folder = write(tmp_path, {"person": PERSONS, "observation_period": PERIODS})
    bad = "x,1,1,2015-01-01,,,,0,,0"
    write(
        folder / "condition_occurrence",
        {"part-0.csv": CONDITIONS[:8], "part-1.csv": [CONDITION_HEADER, bad, *CONDITIONS[8:]], "_SUCCESS.csv": b""},
    )
    write(folder / "__MACOSX", {"._person.csv": b"\0\1"})
    result = load(work(path=str(folder), max_rejects=0.05))
    assert result["events"] == 20
    assert rows(engine, REJECTS) == [
        ("condition_occurrence/part-1.csv", 1, "condition_occurrence_id", "unparsable_id", None)
    ]


def without(column: str) -> dict[str, Any]:
    return {"condition_occurrence": [CONDITION_HEADER.replace(column, "other")]}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "truncated gzip": (
        {"condition_occurrence.csv.gz": gzip.compress("\n".join(CONDITIONS * 50).encode())[:-60]},
        "condition_occurrence.csv.gz",
    ),
    "no person": ({"person": None}, "PERSON"),
    "no key": (without("condition_occurrence_id"), "condition_occurrence_id"),
    "no concept": (without("condition_concept_id"), "condition_concept_id"),
    "no time": (
        {"condition_occurrence": ["condition_occurrence_id,person_id,condition_concept_id", "1,1,1"]},
        "condition_start_date",
    ),
    "unknown delimiter": ({"condition_occurrence": [x.replace(",", "~") for x in CONDITIONS]}, "--delimiter"),
    "no header": ({"condition_occurrence": CONDITIONS[1:]}, "header"),
    "latin 1": ({"person": "\n".join([*PERSONS, "6,0,1950,1,1,0,0,M\xfc"]).encode("latin-1")}, "UTF-8"),
    "empty file": ({"condition_occurrence": b""}, "condition_occurrence.csv"),
    "broken parquet": ({"condition_occurrence.parquet": b"PAR1 no"}, "condition_occurrence.parquet"),
    "ambiguous header": (
        {
            "condition_occurrence": [
                CONDITION_HEADER.replace("condition_end_date,", '"coalesce(condition_end_date, condition_start_date)",')
            ]
        },
        "rename",
    ),
    "column twice": ({"condition_occurrence": [CONDITION_HEADER + ",person_id"]}, "person_id"),
    "two files": ({"condition_occurrence.csv.gz": gzip.compress(b"a")}, "remove one"),
    "another compression": (
        {"condition_occurrence": None, "condition_occurrence.csv.xz": b"x"},
        "csv.xz; convert it",
    ),
    "a spreadsheet": ({"death.xlsx": b"x"}, "found death.xlsx"),
    "no usable person": ({"person": [PERSONS[0], "x,8507,1950,1,1,0,0,a"]}, "(unparsable_id 1)"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_folder_that_cannot_be_used_is_refused_in_one_sentence_and_changes_nothing(
    what: str, tmp_path: Path, work: Make, engine: Engine
) -> None:
    load(work(path=str(extract(tmp_path / "sound"))))
    before = rows(engine, CONTENT)
    tables, said = REFUSED[what]
    files: dict[str, Any] = {"person": PERSONS, "observation_period": PERIODS, "condition_occurrence": CONDITIONS}
    if any(name.startswith("condition_occurrence.") for name in tables) and what != "two files":
        files.pop("condition_occurrence")
    files |= tables
    folder = write(tmp_path / "bad", {name: content for name, content in files.items() if content is not None})
    with pytest.raises(InputError) as refused:
        load(work(path=str(folder)))
    message = str(refused.value)
    assert said in message and message.startswith("Expected ") and "\n" not in message, message
    assert refused.value.exit_code == 2
    assert rows(engine, CONTENT) == before


def test_an_empty_folder_is_refused(tmp_path: Path, work: Make) -> None:
    with pytest.raises(InputError, match="found none"):
        load(work(path=str(tmp_path)))


def test_a_delimiter_that_the_header_does_not_tell_can_be_named(tmp_path: Path, work: Make, engine: Engine) -> None:
    folder = extract(tmp_path, condition_occurrence=[line.replace(",", "~") for line in CONDITIONS])
    assert load(work(path=str(folder), delimiter="~"))["events"] == 20


@pytest.mark.parametrize("style", ["condition_occurrence.{}", "`{}`", "[{}]"])
def test_a_header_may_name_its_table_or_quote_in_another_dialect(
    style: str, tmp_path: Path, work: Make, engine: Engine
) -> None:
    header = ",".join(style.format(cell) for cell in CONDITION_HEADER.split(","))
    assert load(work(path=str(extract(tmp_path, condition_occurrence=[header, *CONDITIONS[1:]]))))["events"] == 20
    assert rows(engine, "SELECT count(*), min(time) FROM omop.event") == [(20, dt.datetime(2015, 3, 1, 10))]


def test_shards_in_folders_of_a_table_are_read_and_files_of_no_table_are_named(tmp_path: Path, work: Make) -> None:
    folder = write(tmp_path, {"person": PERSONS, "cond_2015.csv": CONDITIONS, "extra.zip": b"x"})
    for year, lines in (("2014", CONDITIONS[:8]), ("2015", [CONDITION_HEADER, *CONDITIONS[8:]])):
        write(folder / "condition_occurrence" / f"year={year}", {"part-0.csv": lines, "_part-1.csv": b"x"})
    write(folder / "vocabulary", {"concept.csv": ["concept_id"]})
    result = load(work(path=str(folder)))
    assert (result["events"], result["ignored"]) == (20, {})
    assert result["unknown_files"] == {"cond_2015.csv": 20, "extra.zip": None, "vocabulary": None}
    assert "no table has that name: cond_2015.csv 20 rows, extra.zip, vocabulary" in result["summary"]


def test_what_data_frames_write_for_missing_ids_and_for_zones_is_understood(
    tmp_path: Path, work: Make, engine: Engine
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    nan, day = float("nan"), dt.datetime(2015, 1, 1, 18, 30, tzinfo=dt.UTC)
    folder = extract(tmp_path, visit_occurrence=[VISIT_HEADER, "10,1,9202,2015-01-01,,,,0,,"])
    (folder / "condition_occurrence.csv").unlink()
    table = {
        "condition_occurrence_id": [1, 2],
        "person_id": [1, 2],
        "condition_concept_id": [300.0, nan],
        "condition_start_date": [dt.date(2015, 1, 1)] * 2,
        "condition_start_datetime": pa.array([day, None], pa.timestamp("us", "-05:30")),
        "visit_occurrence_id": [10.0, nan],
    }
    pq.write_table(pa.table(table), folder / "condition_occurrence.parquet")
    load(work(path=str(folder), max_rejects=1))
    assert rows(engine, "SELECT * FROM ops.reject") == []
    found = "SELECT source_row_id, time, concept_id, visit_occurrence_id FROM omop.event WHERE domain = 'c' ORDER BY 1"
    last = dt.datetime(2015, 1, 1, 23, 59, 59)
    assert rows(engine, found) == [(1, dt.datetime(2015, 1, 1, 13), 300, 10), (2, last, 0, None)]
