"""Rows encoded by arrays are, byte for byte, those that are encoded one by one, and Postgres reads them back."""

from __future__ import annotations

import struct
import threading
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, text

from app.store import timelines
from app.store.copy import Field, Text, ahead, copy_in, copy_out, dates, encode, encode_mixed, timestamps
from tests.reference.loading import encode_row, pack_timelines

CODES = {"q": np.int64, "i": np.int32, "h": np.int16, "f": np.float32, "d": np.float64, "?": np.bool_, "B": np.uint8}
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "q": st.integers(-(2**63), 2**63 - 1),
    "i": st.integers(-(2**31), 2**31 - 1),
    "h": st.integers(-(2**15), 2**15 - 1),
    "f": st.floats(width=32, allow_nan=False),
    "d": st.floats(allow_nan=False),
    "?": st.booleans(),
    "B": st.integers(0, 255),
    "s": st.text(max_size=9).map(str.encode),
}


@st.composite
def columns(draw: st.DrawFn, codes: str) -> list[tuple[str, list[Any]]]:
    count = draw(st.integers(0, 12))
    chosen = draw(st.lists(st.sampled_from(codes), min_size=1, max_size=5))
    return [
        (code, draw(st.lists(st.one_of(st.none(), VALUES[code]), min_size=count, max_size=count))) for code in chosen
    ]


def as_field(code: str, values: list[Any]) -> Field | Text:
    valid = np.array([value is not None for value in values], np.bool_)
    if code == "s":
        held = [value or b"" for value in values]
        offsets = np.concatenate([[0], np.cumsum([len(value) for value in held])]).astype(np.int64)
        return Text(np.frombuffer(b"".join(held), np.uint8), offsets, valid)
    return Field(np.array([0 if value is None else value for value in values], CODES[code]), valid)


def one_by_one(given: list[tuple[str, list[Any]]]) -> bytes:
    codes = [code for code, _ in given]
    rows = zip(*(values for _, values in given), strict=True)
    return b"".join(encode_row(list(zip(codes, row, strict=True))) for row in rows)


@given(columns("qihfd?B"))
@settings(max_examples=150, deadline=None)
def test_rows_of_fixed_width_are_those_encoded_one_by_one(given: list[tuple[str, list[Any]]]) -> None:
    fields = [as_field(code, values) for code, values in given]
    assert encode([field for field in fields if isinstance(field, Field)]) == one_by_one(given)
    assert encode_mixed(fields) == one_by_one(given)


@given(columns("qi?ss"))
@settings(max_examples=150, deadline=None)
def test_rows_with_text_are_those_encoded_one_by_one(given: list[tuple[str, list[Any]]]) -> None:
    assert encode_mixed([as_field(code, values) for code, values in given]) == one_by_one(given)


EVENT = st.tuples(st.integers(-3, 3), st.integers(-(10**10), 10**10), st.booleans(), st.integers(0, 2**31 - 1))


@given(st.lists(EVENT, max_size=40), st.integers(1, 7))
@settings(max_examples=150, deadline=None)
def test_timelines_are_those_packed_one_by_one_however_the_rows_are_cut(
    events: list[tuple[int, int, bool, int]], size: int
) -> None:
    rows = sorted((person, seconds * 2 + date_only, concept) for person, seconds, date_only, concept in events)
    batches = [
        (
            np.array([r[0] for r in part], np.int64),
            np.array([r[1] for r in part], np.int64),
            np.array([r[2] for r in part], np.int32),
        )
        for part in (rows[i : i + size] for i in range(0, len(rows), size))
    ]
    expected = b"".join(
        encode_row([("q", person), ("i", count), ("s", times), ("s", concepts), ("s", digest)])
        for person, (count, times, concepts, digest) in sorted(pack_timelines(events).items())
    )
    assert b"".join(timelines.pack(batches)) == expected


def test_postgres_reads_what_was_encoded_and_gives_it_back(engine: Engine) -> None:
    import datetime as dt

    moments = [dt.datetime(1800, 1, 1), dt.datetime(1970, 1, 1), dt.datetime(2262, 5, 6, 7, 8, 9, 10)]
    micros = np.array([int((m - dt.datetime(1970, 1, 1)) / dt.timedelta(microseconds=1)) for m in moments], np.int64)
    days = np.array([(m.date() - dt.date(1970, 1, 1)).days for m in moments], np.int32)
    names = Text(np.frombuffer('ä,"\n'.encode(), np.uint8), np.array([0, 5, 5, 5], np.int64), np.array([1, 1, 0], bool))
    fields = [Field(timestamps(micros)), Field(dates(days)), Field(np.array([1, 2, 3], np.int32)), names]
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE public.t (moment timestamp, day date, id int, name text)")
        copy_in(connection, "public.t", ["moment", "day", "id", "name"], [encode_mixed(fields)])
        found = connection.execute(text("SELECT moment, day, id, name FROM public.t ORDER BY id")).all()
        names_read = ['ä,"\n', "", None]
        assert [tuple(row) for row in found] == [
            (moment, moment.date(), i + 1, name)
            for i, (moment, name) in enumerate(zip(moments, names_read, strict=True))
        ]
        layout = [("id", "i4"), ("moment", "i8")]
        (rows,) = copy_out(connection, "SELECT id, moment FROM public.t ORDER BY id", layout)
    assert rows["id"].tolist() == [1, 2, 3] and rows["moment"].tolist() == timestamps(micros).tolist()


def test_many_rows_come_out_in_blocks_whole_and_in_order(engine: Engine) -> None:
    query = "SELECT g::bigint AS id, (g % 7)::int AS rest FROM generate_series(1, 400000) g"
    with engine.connect() as connection:
        blocks = list(copy_out(connection, query, [("id", "i8"), ("rest", "i4")]))
    assert len(blocks) > 1
    ids = np.concatenate([block["id"] for block in blocks])
    assert np.array_equal(ids, np.arange(1, 400_001))
    assert np.array_equal(np.concatenate([block["rest"] for block in blocks]), ids % 7)


def test_work_ahead_keeps_order_hands_on_errors_and_stops_when_left() -> None:
    assert list(ahead(iter(range(100)), 3)) == list(range(100))

    def failing() -> Any:
        yield 1
        raise ValueError("no more")

    taken = ahead(failing())
    assert next(taken) == 1
    with pytest.raises(ValueError, match="no more"):
        next(taken)
    endless = ahead(iter(int, 1), 2)
    assert next(endless) == 0
    endless.close()  # type: ignore[attr-defined]
    time.sleep(0.05)
    assert not [thread for thread in threading.enumerate() if thread.name == "ahead"]


def test_the_header_is_the_one_postgres_writes(engine: Engine) -> None:
    from app.store.copy import HEADER, TRAILER
    from app.store.session import raw

    with (
        engine.connect() as connection,
        raw(connection).cursor().copy("COPY (SELECT 1) TO STDOUT (FORMAT binary)") as c,
    ):
        data = b"".join(bytes(block) for block in c)
    assert data == HEADER + struct.pack(">hii", 1, 4, 1) + TRAILER
