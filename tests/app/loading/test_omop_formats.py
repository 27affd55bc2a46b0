"""One table in every container, encoding and dialect that is read gives the same rows, and the books say how."""

from __future__ import annotations

import datetime as dt
import gzip
import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sqlalchemy import Engine

from app.loading.layouts import VERSIONS, layouts
from app.loading.omop import load
from app.store.work import InlineWork
from tests.app.loading.extracts import (
    CONDITION_HEADER,
    CONDITIONS,
    PERIODS,
    PERSONS,
    conditions,
    extract,
    one,
    rows,
    write,
)

Make = Callable[..., InlineWork]
Files = dict[str, bytes]

TEXT = "\n".join(CONDITIONS) + "\n"
BCP = "\r\n".join(
    line.replace(",,", ",NULL,").replace(",,", ",NULL,").replace(":00,", ":00.000,").replace(",", "|")
    for line in CONDITIONS
)
CP1252 = "\n".join(["note," + CONDITIONS[0], *(f"Müller – „x“,{line}" for line in CONDITIONS[1:])])


def zst(data: bytes) -> bytes:
    return bytes(pa.compress(data, codec="zstd", asbytes=True))


def zipped(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


def by_order(version: str, *, delimiter: str = "\t", layout: int = 0, tail: str = "") -> bytes:
    """The conditions without a header, in a version's order, with source codes that are numbers."""
    given = [dict(zip(CONDITION_HEADER.split(","), line.split(","), strict=True)) for line in CONDITIONS[1:]]
    more = {"condition_source_value": "4019", "visit_occurrence_id": "7", "condition_source_concept_id": "44"}
    names = layouts("condition_occurrence", version)[layout]
    lines = [delimiter.join((row | more).get(name, "") for name in names) + tail for row in given]
    return ("\n".join(lines) + "\n").encode()


DIALECTS: dict[str, tuple[Files, dict[str, Any], str]] = {
    "psv": ({"condition_occurrence.psv": TEXT.replace(",", "|").encode()}, {}, "bar"),
    "zstd": ({"condition_occurrence.csv.zst": zst(TEXT.encode())}, {}, "comma"),
    "zstd, two frames": (
        {"condition_occurrence.csv.zst": zst(TEXT[:300].encode()) + zst(TEXT[300:].encode())}, {}, "comma",
    ),
    "utf-16 with a mark": ({"condition_occurrence.csv": TEXT.encode("utf-16")}, {}, "comma, utf-16-le"),
    "utf-16 little endian, bare": ({"condition_occurrence.csv": TEXT.encode("utf-16-le")}, {}, "comma, utf-16-le"),
    "utf-16 big endian, bare": ({"condition_occurrence.csv": TEXT.encode("utf-16-be")}, {}, "comma, utf-16-be"),
    "utf-16 big endian with a mark": (
        {"condition_occurrence.csv": b"\xfe\xff" + TEXT.encode("utf-16-be")}, {"encoding": "utf-8"}, "comma, utf-16-be",
    ),
    "windows-1252": (
        {"condition_occurrence.csv": CP1252.encode("cp1252")}, {"encoding": "windows-1252"}, "comma, cp1252",
    ),
    "latin-1": (
        {"condition_occurrence.csv": CP1252.replace("–", "-").replace("„x“", "x").encode("latin-1")},
        {"encoding": "latin-1"}, "comma, iso8859-1",
    ),
    "bcp dump": (
        {"condition_occurrence.txt": BCP.encode("utf-16")}, {}, "bar, utf-16-le, CRLF, NULL is missing",
    ),
    "bars without quotes, inches inside": (
        {"condition_occurrence.txt": "\n".join(
            ["note,", *['5 1/2" tube; long,'] * 20][i].replace(",", "|") + line.replace(",", "|")
            for i, line in enumerate(CONDITIONS)
        ).encode()}, {}, "bar",
    ),
    "single quotes": (
        {"condition_occurrence.csv": "\n".join(
            ["note," + CONDITIONS[0], *(f"'a, b',{line}" for line in CONDITIONS[1:])]).encode()},
        {"quote": "'"}, "comma, quoted by '",
    ),
    "quotes that are text": (
        {"condition_occurrence.csv": "\n".join(
            ["note," + CONDITIONS[0], *(f'"a,{line}' for line in CONDITIONS[1:])]).encode()},
        {"quote": "none"}, "comma",
    ),
    "lone carriage returns": (
        {"condition_occurrence.csv": TEXT.replace("\n", "\r").encode()}, {}, "comma, mixed line ends",
    ),
    "control character": (
        {"condition_occurrence.csv": TEXT.replace(",", "\x01").encode()}, {"delimiter": "\\x01"}, "'\\x01'",
    ),
    "a null text of its own": (
        {"condition_occurrence.csv": "\n".join(
            [CONDITIONS[0], *(line.replace(",,", ",n/a,") for line in CONDITIONS[1:])]).encode()},
        {"null": "n/a"}, "comma, n/a is missing",
    ),
    "gzip that is called csv": ({"condition_occurrence.csv": gzip.compress(TEXT.encode())}, {}, "comma"),
    "zip of a table": ({"condition_occurrence.zip": zipped({"export.csv": TEXT.encode()})}, {}, "comma"),
    "zip of shards": (
        {"condition_occurrence.csv.zip": zipped({
            "a.csv": "\n".join(CONDITIONS[:9]).encode(), "__MACOSX/._a.csv": b"\0",
            "b.csv": "\n".join([CONDITION_HEADER, *CONDITIONS[9:]]).encode("utf-16"),
        })}, {}, "comma|comma, utf-16-le",
    ),
    "no header, 5.2": (
        {"condition_occurrence.csv": by_order("5.2")}, {"cdm": "5.2"}, "tab, no header, columns of CDM 5.2",
    ),
    "no header, 5.3": (
        {"condition_occurrence.csv": by_order("5.3")}, {"cdm": "5.3"}, "tab, no header, columns of CDM 5.3",
    ),
    "no header, order of 5.3.1": (
        {"condition_occurrence.csv": by_order("5.3", layout=1)}, {"cdm": "5.3"}, "tab, no header, columns of CDM 5.3",
    ),
    "no header, bars at the end": (
        {"condition_occurrence.txt": by_order("5.4", delimiter="|", tail="|")}, {"cdm": "5.4"},
        "bar, no header, columns of CDM 5.4",
    ),
    "no header, zstd and utf-16": (
        {"condition_occurrence.tsv.zst": zst(by_order("5.4").decode().encode("utf-16"))}, {"cdm": "5.4"},
        "tab, utf-16-le, no header, columns of CDM 5.4",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DIALECTS)
def test_one_table_however_it_is_written_gives_the_same_rows_and_the_books_say_how(
    what: str, tmp_path: Path, work: Make, engine: Engine
) -> None:
    files, options, dialect = DIALECTS[what]
    folder = write(tmp_path, {"person": PERSONS, "observation_period": PERIODS, **files})
    result = load(work(path=str(folder), **options))
    assert (result["events"], result["rejected"]) == (20, 0)
    assert rows(engine, "SELECT source_row_id, person_id, concept_id, time, date_only FROM omop.event ORDER BY 1") == [
        (i, i % 5 + 1, 300 + i, dt.datetime(2015, 3, i, 10), False) for i in range(1, 21)
    ]
    found = one(engine, "SELECT files FROM ops.load WHERE table_name = 'condition_occurrence'")
    assert "|".join(file["dialect"] for file in found) == dialect
    assert sum(file["records"] for file in found) == 20
    assert dialect.split("|")[0] in result["summary"]
    if what.startswith("no header"):
        assert rows(engine, "SELECT DISTINCT source_concept_id FROM omop.event") == [(44,)]
    assert load(work(path=str(folder), **options))["unchanged"]
    assert not any((tmp_path / "work").rglob("*"))


def test_one_zip_of_a_whole_extract_is_read_and_its_litter_passed_over(
    tmp_path: Path, work: Make, engine: Engine
) -> None:
    tables = {"PERSON": PERSONS, "OBSERVATION_PERIOD": PERIODS, "drug_era": ["drug_era_id", "1", "2"]}
    member = {f"omop/{name}.csv": "\n".join(lines).encode() for name, lines in tables.items()}
    bad = "\n".join(conditions("x,1,1,2015-01-01,,,,0,,0")).encode()
    litter = {"__MACOSX/omop/._PERSON.csv": b"\0", "omop/.DS_Store": b"\0", "omop/Thumbs.db": b""}
    litter["omop/notes.csv"] = b"a\n1\n"
    (tmp_path / "e.zip").write_bytes(
        zipped({**member, **litter, "omop/condition_occurrence.csv.gz": gzip.compress(bad)})
    )
    result = load(work(path=str(tmp_path / "e.zip"), max_rejects=0.1))
    assert (result["events"], result["ignored"], result["unknown_files"]) == (20, {"drug_era": 2}, {"notes.csv": 1})
    assert "ignored: drug_era 2 rows" in result["summary"]
    assert rows(engine, "SELECT file, record, rule FROM ops.reject") == [
        ("omop/condition_occurrence.csv.gz", 21, "unparsable_id")
    ]
    (tmp_path / "folder").mkdir()
    (tmp_path / "e.zip").rename(tmp_path / "folder" / "delivery.zip")
    again = load(work(path=str(tmp_path / "folder"), max_rejects=0.1, source="omop"))
    assert (again["unchanged"], again["events"]) == (False, 20)  # names are others: a new delivery, the same rows


def test_records_keep_their_numbers_in_every_container(tmp_path: Path, work: Make, engine: Engine) -> None:
    lines = [*CONDITIONS[:5], "x,1,1,2015-01-01,,,,0,,0", *CONDITIONS[5:9], "9,short", *CONDITIONS[9:]]
    data = "\n".join(lines).encode()
    made = {
        "a": {"condition_occurrence.csv.gz": gzip.compress(data)},
        "b": {"condition_occurrence.csv.zst": zst(data)},
        "c": {"condition_occurrence.zip": zipped({"c.csv": data})},
        "d": {"condition_occurrence.csv": data.decode().encode("utf-16")},
        "e": {"condition_occurrence.csv.gz": gzip.compress(data.replace(b"\n", b"\r\n"))},
    }
    for name, files in made.items():
        folder = write(tmp_path / name, {"person": PERSONS, "observation_period": PERIODS, **files})
        load(work(path=str(folder), max_rejects=0.2))
        newest = one(engine, "SELECT max(load_id) FROM ops.load WHERE table_name = 'condition_occurrence'")
        found = rows(engine, "SELECT record, rule FROM ops.reject WHERE load_id = :id ORDER BY 1", id=newest)
        assert found == [(5, "unparsable_id"), (10, "wrong_number_of_fields")], name
        counts = rows(engine, "SELECT num_read, num_loaded, num_rejected FROM ops.load WHERE load_id = :id", id=newest)
        assert counts == [(22, 20, 2)], name


def test_words_that_look_like_missing_values_stay_words_unless_they_are_said_to_be_none(
    tmp_path: Path, work: Make, engine: Engine
) -> None:
    persons = [
        PERSONS[0],
        *(f"{i},8507,1950,NULL,\\N,null,0,{v}" for i, v in enumerate(("NULL", "None", "", "\\N", "n/a"), 1)),
    ]
    header = (
        "concept_id,concept_name,domain_id,vocabulary_id,concept_class_id,standard_concept,concept_code,"
        "valid_start_date,valid_end_date,invalid_reason"
    )
    concepts = [header, "1,NA,Condition,None,x,NULL,null,19700101,20991231,NULL", "2,NULL,Drug,SNOMED,x,S,n/a,,,\\N"]
    folder = extract(tmp_path, person=persons, concept=concepts)
    load(work(path=str(folder)))
    stored = "SELECT person_source_value FROM omop.person ORDER BY person_id"
    assert [row[0] for row in rows(engine, stored)] == ["NULL", "None", None, None, "n/a"]
    columns = "concept_name, vocabulary_id, standard_concept, concept_code, invalid_reason"
    names = f"SELECT {columns} FROM omop.concept ORDER BY concept_id"
    expected = [("NA", "None", None, "null", None), ("NULL", "SNOMED", "S", "n/a", None)]
    assert rows(engine, names) == expected
    load(work(path=str(folder), null="NULL"))
    assert [row[0] for row in rows(engine, stored)] == [None, "None", None, None, "n/a"]
    assert rows(engine, names) == expected


ZONED = ["2015-01-01T23:00:00-05:00", "2015-07-01 02:30:00Z", "2015-07-01 02:30:00.9999999+0200", "2015-07-01 02:30"]


def test_times_with_a_zone_keep_their_clock_or_become_that_of_a_named_zone(
    tmp_path: Path, work: Make, engine: Engine
) -> None:
    lines = [CONDITION_HEADER, *(f"{i},1,300,,{time},,,0,,0" for i, time in enumerate(ZONED, 1))]
    folder = extract(tmp_path, condition_occurrence=lines)
    (folder / "visit_occurrence").mkdir()
    far = dt.datetime(2202, 8, 26, 12, 0, 0, 1, tzinfo=dt.UTC)
    table = {
        "visit_occurrence_id": pa.array([1, 2], pa.int64()),
        "person_id": pa.array([1, 1], pa.int64()),
        "visit_concept_id": [9201, 9201],
        "visit_start_datetime": pa.array([far, None], pa.timestamp("us", "Africa/Casablanca")),
        "visit_start_date": pa.array([None, dt.date(2202, 8, 26)], pa.date32()),
    }
    pq.write_table(pa.table(table), folder / "visit_occurrence" / "part-0.parquet")
    found = "SELECT source_row_id, time FROM omop.event WHERE domain = :d ORDER BY 1"
    load(work(path=str(folder)))
    assert [row[1] for row in rows(engine, found, d="c")] == [
        dt.datetime(2015, 1, 1, 23),
        dt.datetime(2015, 7, 1, 2, 30),
        dt.datetime(2015, 7, 1, 2, 30, 0, 999_999),
        dt.datetime(2015, 7, 1, 2, 30),
    ]
    last = dt.datetime(2202, 8, 26, 23, 59, 59)
    assert [row[1] for row in rows(engine, found, d="v")] == [dt.datetime(2202, 8, 26, 13, 0, 0, 1), last]
    load(work(path=str(folder), timezone="America/New_York"))
    assert [row[1] for row in rows(engine, found, d="c")] == [
        dt.datetime(2015, 1, 1, 23),
        dt.datetime(2015, 6, 30, 22, 30),
        dt.datetime(2015, 6, 30, 20, 30, 0, 999_999),
        dt.datetime(2015, 7, 1, 2, 30),
    ]
    assert [row[1] for row in rows(engine, found, d="v")] == [dt.datetime(2202, 8, 26, 8, 0, 0, 1), last]


def test_fractions_of_seconds_are_cut_alike_in_rows_timelines_and_sql(
    tmp_path: Path, work: Make, engine: Engine
) -> None:
    import numpy as np

    from app.store.outcomes import CODED

    times = ["1960-03-01 10:00:00.7", "1960-03-01 10:00:00.5", "2015-03-01 10:00:00.999999", "2015-03-01 10:00:01"]
    lines = [CONDITION_HEADER, *(f"{i},1,{300 + i},,{time},,,0,,0" for i, time in enumerate(times, 1))]
    load(work(path=str(extract(tmp_path, condition_occurrence=lines))))
    coded = CODED.format(time="time", date_only="date_only")
    by_sql = [row[0] for row in rows(engine, f"SELECT {coded} FROM omop.event ORDER BY time, concept_id")]
    packed = one(engine, "SELECT times FROM omop.timeline WHERE person_id = 1")
    epoch = dt.datetime(1970, 1, 1)
    expected = [(dt.datetime.fromisoformat(t[:19]) - epoch) // dt.timedelta(seconds=1) * 2 for t in times]
    assert sorted(by_sql) == sorted(expected) == sorted(np.frombuffer(packed, "<i8").tolist())


def test_identifiers_are_never_rounded(tmp_path: Path, work: Make, engine: Engine) -> None:
    big = 2**53
    given = (f"-{2**63}", f"{big + 1}", "12.0", f"{big + 3}.0", "1e3")
    persons = [PERSONS[0], *(f"{person},8507,1950,1,1,0,0," for person in given)]
    folder = extract(tmp_path, person=persons, observation_period=[PERIODS[0]])
    (folder / "condition_occurrence.csv").unlink()
    table = {
        "condition_occurrence_id": pa.array([1.0, float(big), 2.5, 3.0], pa.float64()),
        "person_id": pa.array([12.0, 12.0, 12.0, float(big + 2)], pa.float64()),
        "condition_concept_id": [300] * 4,
        "condition_start_date": [dt.date(2015, 1, 1)] * 4,
    }
    pq.write_table(pa.table(table), folder / "condition_occurrence.parquet")
    load(work(path=str(folder), max_rejects=1))
    stored = rows(engine, "SELECT person_id FROM omop.person ORDER BY 1")
    assert stored == [(-(2**63),), (12,), (big + 1,)]
    assert rows(engine, "SELECT source_row_id, person_id FROM omop.event") == [(1, 12)]
    rejects = rows(engine, "SELECT table_name, record, rule, column_name FROM ops.reject ORDER BY 1, 2")
    assert rejects == [
        ("condition_occurrence", 2, "unparsable_id", "condition_occurrence_id"),
        ("condition_occurrence", 3, "unparsable_id", "condition_occurrence_id"),
        ("condition_occurrence", 4, "unparsable_id", "person_id"),
        ("person", 4, "unparsable_id", "person_id"),
        ("person", 5, "unparsable_id", "person_id"),
    ]


def test_every_layout_holds_the_columns_that_a_table_needs() -> None:
    from app.loading.cdm import COLUMNS, required_columns

    for version in VERSIONS:
        for table in COLUMNS:
            for layout in layouts(table, version):
                assert len(set(layout)) == len(layout) and set(layout) <= COLUMNS[table], (table, version)
                assert all(set(group) & set(layout) for group in required_columns(table)), (table, version)


def test_clocks_of_zones_are_those_of_the_standard_library(tmp_path: Path) -> None:
    import random
    from zoneinfo import ZoneInfo

    import duckdb

    from app.loading.zones import transitions, zone_macro

    connection, chosen = duckdb.connect(), random.Random(1)
    epoch = dt.datetime(1970, 1, 1)
    for name in ("America/New_York", "Africa/Casablanca", "Australia/Lord_Howe", "UTC"):
        seconds = [chosen.randrange(500 * 365 * 86400) for _ in range(2000)]
        moments = [dt.datetime(1800, 1, 1) + dt.timedelta(seconds=s) for s in seconds]
        edges = [epoch + dt.timedelta(microseconds=int(start)) for start in transitions(name)[0][1:]]
        moments += [edge + dt.timedelta(microseconds=shift) for edge in edges for shift in (-1, 0)]
        connection.execute(zone_macro(name, "here"))
        connection.register("given", pa.table({"t": pa.array(moments, pa.timestamp("us"))}))
        found = [row[0] for row in connection.execute("SELECT here(t) FROM given").fetchall()]
        zone = ZoneInfo(name)
        assert found == [t.replace(tzinfo=dt.UTC).astimezone(zone).replace(tzinfo=None) for t in moments], name
