"""Counting records and repairing files, against Python's csv module, over all kinds of bytes."""

from __future__ import annotations

import csv
import gzip
import io
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.errors import InputError
from app.loading import records
from app.loading.repair import Broken, repair, split_record
from app.loading.repair import records as read_records
from tests.reference.loading import count_records

CELL = st.text(st.sampled_from('ab",;\t\n\r é'), max_size=6)
TABLE = st.integers(1, 4).flatmap(lambda width: st.lists(st.lists(CELL, min_size=width, max_size=width), min_size=1))


def written(table: list[list[str]], delimiter: str, end: str) -> bytes:
    """A table as a well-formed CSV file."""
    text = io.StringIO(newline="")
    has_return = any("\r" in cell for row in table for cell in row)  # the csv module leaves it bare
    quoting = csv.QUOTE_ALL if has_return else csv.QUOTE_MINIMAL
    csv.writer(text, delimiter=delimiter, lineterminator=end, quoting=quoting).writerows(table)
    return text.getvalue().encode()


def scanned(folder: Path, data: bytes, delimiter: str, block: int, *, zipped: bool = False) -> records.Scan:
    path = folder / ("a.csv.gz" if zipped else "a.csv")
    path.write_bytes(gzip.compress(data) if zipped else data)
    with patch.object(records, "BLOCK", block):
        return records.scan(path, path.name, delimiter, lambda: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("records")


@given(TABLE, st.sampled_from(",;\t"), st.sampled_from(["\n", "\r\n"]), st.integers(4, 40), st.booleans())
@settings(max_examples=150, deadline=None)
def test_records_of_a_well_formed_file_are_counted_as_the_csv_module_counts_them(
    folder: Path, table: list[list[str]], delimiter: str, end: str, block: int, zipped: bool
) -> None:
    data = written(table, delimiter, end)
    found = scanned(folder, data, delimiter, block, zipped=zipped)
    assert not found.malformed
    assert found.records == count_records(data, delimiter)
    assert found.quoted == (b'"' in data)


PACKED = (records.GZIP_MAGIC, records.ZSTD_MAGIC)


@given(st.binary(max_size=60).filter(lambda b: b'"' not in b and not b.startswith(PACKED)), st.integers(4, 20))
@settings(max_examples=150, deadline=None)
def test_lines_without_quotes_are_counted_whatever_the_bytes(folder: Path, data: bytes, block: int) -> None:
    try:
        text = data.decode()
    except UnicodeDecodeError:
        with pytest.raises(InputError, match="UTF-8"):
            scanned(folder, data, ",", block)
        return
    found = scanned(folder, data, ",", block)
    held = data.removeprefix(b"\xef\xbb\xbf") if block >= 3 else data
    lines = [line for line in held.split(b"\n") if line.strip(b"\r")]
    assert found.lines == len(lines) or "\r" in text  # lone carriage returns are read line by line
    assert found.has_nul == ("\0" in text)


@given(st.text(st.sampled_from('a",\n'), max_size=30))
@settings(max_examples=300, deadline=None)
def test_a_file_called_well_formed_is_one_that_a_strict_reader_accepts(folder: Path, text: str) -> None:
    found = scanned(folder, text.encode(), ",", 8)
    if found.malformed:
        return
    assert found.records == count_records(text.encode())
    assert scanned(folder, text.encode(), ",", 1 << 20) == found


@given(st.text(st.sampled_from('a",\nb'), max_size=40))
@settings(max_examples=300, deadline=None)
def test_no_line_gets_lost_in_repair(text: str) -> None:
    lines = text.split("\n")
    seen = 0
    for record in read_records(iter(lines), ",", '"'):
        seen += 1 if isinstance(record, Broken) else sum(field.count("\n") for field in record) + 1
    held = [line for line in lines if line]
    inside = len(lines) - len(held)  # blank lines may stand inside quotes
    assert len(held) <= seen <= len(held) + inside


@given(TABLE, st.sampled_from(",;\t"))
@settings(max_examples=100, deadline=None)
def test_repair_keeps_every_field_of_a_sound_file(folder: Path, table: list[list[str]], delimiter: str) -> None:
    table = [[cell.replace("\r", "") for cell in row] for row in table]
    (folder / "sound.csv").write_bytes(written([["h"] * len(table[0]), *table], delimiter, "\r\n"))
    done = repair(
        folder / "sound.csv", "sound.csv", folder / "out.csv", delimiter=delimiter, quote='"',
        width=len(table[0]), check=lambda: None,
    )  # fmt: skip
    with (folder / "out.csv").open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    expected = [[cell.replace("\n", " ") for cell in row] for row in table]
    assert done.broken == []
    assert done.records == len(table)
    assert rows == expected


def test_a_record_splits_as_the_standard_says() -> None:
    assert split_record('a,"b ""c"", d",', ",", '"') == ["a", 'b "c", d', ""]
    assert split_record('5" needle,x', ",", '"') == ['5" needle', "x"]
    assert split_record('a,"open', ",", '"') is None
    with pytest.raises(Broken):
        split_record('"a"b,c', ",", '"')


@pytest.mark.parametrize("cut", [1, 9, 40])
def test_a_gzip_file_that_is_cut_short_is_refused(folder: Path, cut: int) -> None:
    path = folder / "cut.csv.gz"
    path.write_bytes(gzip.compress(b"a,b\n" * 1000)[:-cut])
    with pytest.raises(InputError, match="truncated"):
        records.scan(path, path.name, ",", lambda: None)
