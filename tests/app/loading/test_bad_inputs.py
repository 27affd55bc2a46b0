"""Bad files: each is refused in one sentence that names file and remedy, or its bad rows are rejected by rule.

Whatever comes, nothing is half loaded: a refused delivery leaves the store as it was, and read = loaded + rejected.
"""

from __future__ import annotations

import gzip
import io
import os
import stat
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine

from app.errors import InputError
from app.loading import places
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
    extract,
    one,
    rows,
    write,
)

Make = Callable[..., InlineWork]
TEXT = "\n".join(CONDITIONS).encode()
C = "condition_occurrence"


def zipped(members: Mapping[str, bytes], *, link: bool = False, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in members.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = method
            info.external_attr = ((stat.S_IFLNK if link else stat.S_IFREG) | 0o644) << 16
            archive.writestr(info, data)
    return out.getvalue()


def encrypted(members: Mapping[str, bytes]) -> bytes:
    """A zip whose members are marked as encrypted."""
    data = bytearray(zipped(members))
    for magic, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = data.find(magic)
        while start >= 0:
            data[start + at] |= 1
            start = data.find(magic, start + 4)
    return bytes(data)


def damaged(members: Mapping[str, bytes]) -> bytes:
    """A zip whose first member does not match its checksum."""
    data = bytearray(zipped(members, method=zipfile.ZIP_STORED))
    data[data.find(b"condition_occurrence_id") + 5] ^= 1
    return bytes(data)


def utf16_cut() -> bytes:
    return "\n".join(CONDITIONS).encode("utf-16")[:-1]


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "bytes that are no UTF-8 far into a file": (
        {C: TEXT + b"\n21,1,300,2015-01-01,,,,0,,caf\xe9\n"}, {}, (f"{C}.csv", "line 22", "--encoding"),
    ),
    "a wrong encoding that was named": (
        {C: TEXT + b"\n21,1,300,2015-01-01,,,,0,,\x81\n"},
        {"encoding": "windows-1252"},
        (f"{C}.csv", "cp1252", "line 22"),
    ),
    "UTF-16 that ends within a character": ({C: utf16_cut()}, {}, (f"{C}.csv", "utf-16-le")),
    "a lone surrogate in UTF-16": (
        {C: "\n".join(CONDITIONS).encode("utf-16") + b"\x00\xd8\n\0"}, {}, (f"{C}.csv", "utf-16-le", "line 21"),
    ),
    "an encoding that does not exist": ({}, {"encoding": "klingon"}, ("--encoding", "klingon")),
    "an encoding that is none of text": ({}, {"encoding": "rot13"}, ("--encoding", "rot13")),
    "two characters as delimiter": ({}, {"delimiter": "||"}, ("--delimiter",)),
    "two characters as quote": ({}, {"quote": "''"}, ("--quote",)),
    "a version that is not read": ({}, {"cdm": "6.0"}, ("--cdm", "5.2, 5.3, 5.4")),
    "a zone that does not exist": ({}, {"timezone": "Mars/Olympus"}, ("time zone", "Mars/Olympus")),
    "truncated gzip": ({f"{C}.csv.gz": gzip.compress(TEXT)[:-9]}, {}, (f"{C}.csv.gz", "truncated")),
    "gzip that is none": ({f"{C}.csv.gz": TEXT}, {}, (f"{C}.csv.gz", "gzip")),
    "truncated zstd": ({f"{C}.csv.zst": pa.compress(TEXT, codec="zstd", asbytes=True)[:-5]}, {}, (f"{C}.csv.zst",)),
    "zstd that is none": ({f"{C}.csv.zst": TEXT}, {}, (f"{C}.csv.zst", "zstd")),
    "a zip that is called csv": ({C: zipped({"a.csv": TEXT})}, {}, (f"{C}.csv", "found zip", ".zip")),
    "Parquet that is called csv": ({C: b"PAR1" + b"\0" * 40}, {}, (f"{C}.csv", "found Parquet")),
    "text that is called Parquet": ({f"{C}.parquet": TEXT}, {}, (f"{C}.parquet", "Parquet")),
    "a zip that is none": ({f"{C}.zip": TEXT}, {}, (f"{C}.zip", "damaged")),
    "a truncated zip": ({f"{C}.zip": zipped({"a.csv": TEXT})[:-30]}, {}, (f"{C}.zip", "truncated")),
    "a zip with a wrong checksum": ({f"{C}.zip": damaged({"a.csv": TEXT})}, {}, (f"{C}.zip/a.csv", "damaged")),
    "an encrypted zip": ({f"{C}.zip": encrypted({"a.csv": TEXT})}, {}, (f"{C}.zip/a.csv", "password")),
    "a zip that climbs out": ({f"{C}.zip": zipped({"../../a.csv": TEXT})}, {}, (f"{C}.zip", "out of it")),
    "a zip with an absolute name": ({f"{C}.zip": zipped({"/etc/a.csv": TEXT})}, {}, (f"{C}.zip", "out of it")),
    "a zip with a drive's letter": ({f"{C}.zip": zipped({"C:\\a.csv": TEXT})}, {}, (f"{C}.zip", "out of it")),
    "a zip with a link": ({f"{C}.zip": zipped({"a.csv": b"/etc/passwd"}, link=True)}, {}, (f"{C}.zip", "link")),
    "a zip bomb": ({f"{C}.zip": zipped({"a.csv": b"0" * (1 << 20)})}, {}, (f"{C}.zip/a.csv", "times its")),
    "a gzip bomb": ({f"{C}.csv.gz": gzip.compress(TEXT + b"\n" * (1 << 20))}, {}, (f"{C}.csv.gz", "times its")),
    "a zstd bomb": (
        {f"{C}.csv.zst": pa.compress(TEXT + b"\n" * (1 << 22), codec="zstd", asbytes=True)}, {},
        (f"{C}.csv.zst", "times its"),
    ),
    "an empty file": ({C: b""}, {}, (f"{C}.csv", "empty")),
    "a file of blank lines": ({C: b"\n\r\n\n"}, {}, (f"{C}.csv", "empty")),
    "an empty gzip": ({f"{C}.csv.gz": gzip.compress(b"")}, {}, (f"{C}.csv.gz", "empty")),
    "a column twice": ({C: TEXT.replace(b"condition_end_date", b"person_id")}, {}, (f"{C}.csv", "person_id", "twice")),
    "a header of other names": ({C: TEXT.replace(b"_id", b"_nr")}, {}, (f"{C}.csv", "column")),
    "a file without a header": ({C: TEXT.split(b"\n", 1)[1]}, {}, (f"{C}.csv", "10 columns", "--cdm")),
    "a file without a header and a column too few": (
        {C: TEXT.split(b"\n", 1)[1]}, {"cdm": "5.4"}, (f"{C}.csv", "Expected 16 columns", "found 10", "6 are missing"),
    ),
    "a file without a header of another version": (
        {"death": b"1\t2015-01-01\t\t0\t0\t\t0\n", "measurement": b"\t".join([b"1"] * 23)}, {"cdm": "5.3"},
        ("measurement.csv", "Expected 20 columns", "--cdm 5.4"),
    ),
    "a file without a header in another order": (
        {"death": b"2015-01-01\t1\t\t0\t0\t\t0\n"}, {"cdm": "5.4"}, ("death.csv", "person_id in column 1", "--cdm"),
    ),
    "a header that a version cannot explain": (
        {"death": b"pat\tdied\n1\t2015-01-01\n"}, {"cdm": "5.4"}, ("death.csv", "Expected 7 columns"),
    ),
    "a table in two forms": ({C: TEXT, f"{C}.zip": zipped({"a.csv": TEXT})}, {}, (f"{C}.zip", "remove one")),
    "a spreadsheet": ({"death.xlsx": b"PK"}, {}, ("death.xlsx", "convert it")),
    "no person who can be used": ({"person": [PERSONS[0], "x,8507,1950,1,1,0,0,a"]}, {}, ("PERSON", "unparsable_id 1")),
    "persons cut to their header": ({"person": [PERSONS[0]]}, {}, ("PERSON", "it is empty")),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_a_bad_file_is_refused_in_one_sentence_that_names_it_and_nothing_is_loaded(
    what: str, tmp_path: Path, work: Make, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(work(path=str(extract(tmp_path / "sound"))))
    before = rows(engine, CONTENT), rows(engine, "SELECT relname FROM pg_class WHERE relname LIKE 'event%' ORDER BY 1")
    tables, options, said = REFUSED[what]
    if "bomb" in what:
        for module in ("app.loading.places", "app.loading.records"):
            monkeypatch.setattr(f"{module}.BOMB_BYTES", 1 << 19)
    files: dict[str, Any] = {"person": PERSONS, "observation_period": PERIODS}
    folder = write(tmp_path / "bad", files | tables)
    with pytest.raises(InputError) as refused:
        load(work(path=str(folder), **options))
    message = str(refused.value)
    assert message.startswith("Expected ") and "\n" not in message and message.endswith("."), message
    for word in said:
        assert word in message, message
    assert refused.value.exit_code == 2
    after = rows(engine, CONTENT), rows(engine, "SELECT relname FROM pg_class WHERE relname LIKE 'event%' ORDER BY 1")
    assert after == before
    assert not any((tmp_path / "work").rglob("*"))


@pytest.mark.parametrize("kind", ["pipe", "link to nowhere"])
def test_a_table_that_is_no_regular_file_is_refused_not_passed_over(kind: str, tmp_path: Path, work: Make) -> None:
    folder = write(tmp_path, {"person": PERSONS, "observation_period": PERIODS})
    if kind == "pipe":
        os.mkfifo(folder / f"{C}.csv")
    else:
        (folder / f"{C}.csv").symlink_to(folder / "gone.csv")
    with pytest.raises(InputError, match=f"regular file in {C}"):
        load(work(path=str(folder)))


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, work: Make, engine: Engine) -> None:
    folder = extract(tmp_path)
    doing = work(path=str(folder))

    def progress(done: int, total: int | None = None, unit: str = "", note: str = "") -> None:
        if note.startswith(f"reading {C}"):
            (folder / f"{C}.csv").write_bytes(TEXT.replace(b",300", b",301"))

    doing.progress = progress  # type: ignore[method-assign]
    with pytest.raises(InputError, match="changed while it was read"):
        load(doing)
    assert one(engine, "SELECT count(*) FROM omop.event") == 0


def test_a_member_is_never_written_under_a_name_of_its_archive(tmp_path: Path) -> None:
    names = {"omop/person.csv": b"x", "omop/..hidden/person.csv": b"y", "a b;rm -rf.csv": b"z"}
    (tmp_path / "e.zip").write_bytes(zipped(names))
    stage = places.Stage(tmp_path / "stage")
    archive = places.Archive(tmp_path / "e.zip", "e.zip", stage)
    made = [archive.unpack(parts, "x") for parts in archive.members()]
    assert {path.parent for path in made} == {tmp_path / "stage"}
    assert {path.name for path in made} == {f"staged{i + 1}" for i in range(len(made))}


Row = tuple[str, str]
CONDITION_ROWS: dict[str, Row] = {
    "a NUL": ("99,1,300,2015-01-01,,,,0,,\0", "nul_byte"),
    "a field too many": ("99,1,300,2015-01-01,,,,0,,0,9", "wrong_number_of_fields"),
    "a field too few": ("99,1,300,2015-01-01", "wrong_number_of_fields"),
    "psql's end of data": ("\\.", "wrong_number_of_fields"),
    "text behind a quote": ('99,1,300,"2015-01-01"x,,,,0,,0', "malformed_quotes"),
    "an id with a fraction": ("99.5,1,300,2015-01-01,,,,0,,0", "unparsable_id"),
    "an id in exponents": ("1e3,1,300,2015-01-01,,,,0,,0", "unparsable_id"),
    "an id after a blank": (" 99,1,300,2015-01-01,,,,0,,0", "unparsable_id"),
    "an id with a plus": ("+99,1,300,2015-01-01,,,,0,,0", "unparsable_id"),
    "an id in hexadecimal": ("0x10,1,300,2015-01-01,,,,0,,0", "unparsable_id"),
    "an id with an underscore": ("1_000,1,300,2015-01-01,,,,0,,0", "unparsable_id"),
    "an id in Arabic digits": ("٣٤,1,300,2015-01-01,,,,0,,0", "unparsable_id"),
    "an id beyond 64 bits": ("9223372036854775808,1,300,2015-01-01,,,,0,,0", "unparsable_id"),
    "a concept beyond 32 bits": ("99,1,2147483648,2015-01-01,,,,0,,0", "unparsable_id"),
    "an unknown person": ("99,77,300,2015-01-01,,,,0,,0", "unknown_person"),
    "year 0": ("99,1,300,0000-01-01,,,,0,,0", "time_out_of_range"),
    "year 1": ("99,1,300,0001-01-01,,,,0,,0", "time_out_of_range"),
    "year 9999": ("99,1,300,9999-12-31,,,,0,,0", "time_out_of_range"),
    "year 10000": ("99,1,300,10000-01-01,,,,0,,0", "unparsable_time"),
    "before Christ": ("99,1,300,0044-03-15 BC,,,,0,,0", "unparsable_time"),
    "infinity": ("99,1,300,infinity,,,,0,,0", "unparsable_time"),
    "30 February": ("99,1,300,2015-02-30,,,,0,,0", "unparsable_time"),
    "29 February of a common year": ("99,1,300,2015-02-29,,,,0,,0", "unparsable_time"),
    "day and month in doubt": ("99,1,300,01/02/03,,,,0,,0", "unparsable_time"),
    "now": ("99,1,300,now,,,,0,,0", "unparsable_time"),
    "hour 24": ("99,1,300,,2015-01-01 24:00:00,,,0,,0", "unparsable_time"),
    "a leap second": ("99,1,300,,2016-12-31 23:59:60,,,0,,0", "unparsable_time"),
    "no time": ("99,1,300,,,,,0,,0", "missing_time"),
    "a text for a missing value that is not known": ("99,1,NA,2015-01-01,,,,0,,0", "unparsable_id"),
}  # fmt: skip
LATER_ROWS: dict[str, Row] = {"a quote that never closes": ('99,1,300,"2015-01-01,,,,0,,0', "malformed_quotes")}


@pytest.mark.parametrize("end", ["\n", "\r\n", ""], ids=["lf", "crlf", "no end of the last line"])
def test_bad_rows_are_rejected_each_at_its_place_and_all_others_loaded(
    end: str, tmp_path: Path, work: Make, engine: Engine
) -> None:
    lines, expected = list(CONDITIONS[:4]), []
    for number, (line, rule) in enumerate((CONDITION_ROWS | LATER_ROWS).values(), 1000):
        lines.append(line.replace("99,", f"{number},", 1) if line.startswith("99,") else line)
        expected.append((len(lines) - 1, rule))
    lines += CONDITIONS[4:]
    data = (end or "\n").join(lines).encode() + end.encode()
    load(work(path=str(extract(tmp_path, condition_occurrence=data)), max_rejects=1))
    found = rows(engine, "SELECT record, rule FROM ops.reject ORDER BY record")
    assert dict(zip(CONDITION_ROWS | LATER_ROWS, found, strict=True)) == dict(
        zip(CONDITION_ROWS | LATER_ROWS, expected, strict=True)
    )
    assert one(engine, "SELECT count(*) FROM omop.event") == 20
    counts = "SELECT num_read, num_loaded, num_rejected FROM ops.load WHERE table_name = 'condition_occurrence'"
    assert rows(engine, counts) == [(20 + len(expected), 20, len(expected))]


SOUND: dict[str, str] = {
    "a date of eight digits": "99,1,300,20150101,,,,0,,0",
    "a time with T and Z": "99,1,300,,2015-01-01T10:00:00Z,,,0,,0",
    "a time of milliseconds": "99,1,300,,2026-11-03 00:00:00.000,,,0,,0",
    "the year 2202": "99,1,300,2202-08-26,,,,0,,0",
    "29 February of a leap year": "99,1,300,2016-02-29,,,,0,,0",
    "an id with a decimal point": "99.0,1.0,300.0,2015-01-01,,,,0,7.0,0.0",
    "concept 0": "99,1,0,2015-01-01,,,,0,,0",
    "a missing concept": "99,1,,2015-01-01,,,,0,,NULL",
    "an end before the start": "99,1,300,2015-01-02,,2015-01-01,,0,,0",
    "a visit that nobody knows": "99,1,300,2015-01-01,,,,0,123456,0",
    "before birth": "99,1,300,1849-01-01,,,,0,,0",
    "the future": "99,1,300,2299-12-31,,,,0,,0",
}


def test_what_only_looks_bad_is_kept(tmp_path: Path, work: Make, engine: Engine) -> None:
    lines = [CONDITION_HEADER, *(line.replace("99", str(i), 1) for i, line in enumerate(SOUND.values(), 1))]
    result = load(work(path=str(extract(tmp_path, condition_occurrence=lines)), max_rejects=0))
    assert (result["events"], result["rejected"]) == (len(SOUND), 0)


def test_numbers_that_no_measurement_has_become_null_and_are_counted(
    tmp_path: Path, work: Make, engine: Engine
) -> None:
    values = ("1e40", "NaN", "inf", "-Infinity", "7,5", ">10", "0x10")
    lines = [MEASUREMENT_HEADER, *(f'{i},1,3000,2015-01-01,,"{v}",,,,0' for i, v in enumerate(values, 1))]
    lines.append("99,1,3000,2015-01-01,,-7.25,,,,0")
    load(work(path=str(extract(tmp_path, measurement=lines))))
    flags = one(engine, "SELECT flags_by_rule FROM ops.load WHERE table_name = 'measurement'")
    assert flags["number_unusable"] == len(values)
    assert rows(engine, "SELECT value_as_number FROM omop.measurement WHERE value_as_number IS NOT NULL") == [(-7.25,)]


def test_the_order_of_rows_and_files_changes_nothing(tmp_path: Path, work: Make, engine: Engine) -> None:
    deaths = [DEATH_HEADER, "1,2019-05-02,,0,1", "1,2019-05-01,,0,2"]
    twins = ["3,1,999,2015-01-01,,,,0,,0", "4,5,304,2015-03-04,2015-03-04 10:00:00,,,0,,0"]
    seen = []
    for name, order in (("a", 1), ("b", -1)):
        lines = [*CONDITIONS[1:], *twins][::order]
        folder = write(tmp_path / name, {"person": [PERSONS[0], *PERSONS[1:][::order]], "observation_period": PERIODS,
                                         "death": [deaths[0], *deaths[1:][::order]]})  # fmt: skip
        shards = {f"part-{i}.csv": [CONDITION_HEADER, *lines[i::3]] for i in range(3)}
        write(folder / C, shards)
        load(work(path=str(folder), max_rejects=1))
        seen.append(
            [
                rows(engine, "SELECT source_row_id, person_id, time, concept_id FROM omop.event ORDER BY 1, 2"),
                rows(engine, "SELECT person_id, digest FROM omop.timeline ORDER BY 1"),
                rows(
                    engine,
                    "SELECT num_loaded, rejects_by_rule FROM ops.load WHERE state = 'published' ORDER BY table_name",
                ),
            ]
        )
    assert seen[0] == seen[1]


MUTATION = st.tuples(st.integers(0, len(TEXT) - 1), st.sampled_from([*b'",\n\r\t\\;|\x00\xe9 09N-']), st.integers(0, 2))


@given(mutations=st.lists(MUTATION, min_size=1, max_size=4))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_happens_to_its_bytes_a_file_is_accounted_for_or_refused(
    tmp_path: Path, work: Make, engine: Engine, mutations: list[tuple[int, int, int]]
) -> None:
    data = bytearray(TEXT)
    for at, byte, kind in mutations:
        if kind == 0:
            data[at % len(data)] = byte
        elif kind == 1:
            data.insert(at % len(data), byte)
        else:
            del data[at % len(data)]
    folder = extract(tmp_path / "x", condition_occurrence=bytes(data))
    before = rows(engine, CONTENT)
    try:
        load(work(path=str(folder), max_rejects=1, allow_shrink=True))
    except InputError as refused:
        assert str(refused).startswith("Expected ")
        assert rows(engine, CONTENT) == before
        return
    ((read, loaded, rejected, load_id),) = rows(
        engine,
        "SELECT num_read, num_loaded, num_rejected, load_id FROM ops.load "
        "WHERE table_name = 'condition_occurrence' AND state = 'published'",
    )
    assert read == loaded + rejected
    assert one(engine, "SELECT count(*) FROM omop.event WHERE load_id = :id", id=load_id) == loaded
    assert one(engine, "SELECT count(*) FROM ops.reject WHERE load_id = :id", id=load_id) == rejected
