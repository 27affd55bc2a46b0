"""Small MEDS data sets, made row by row, for tests of loading and exporting."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Row = tuple[int | None, dt.datetime | None, str | None, float | None]

SCHEMA = pa.schema(
    [("subject_id", pa.int64()), ("time", pa.timestamp("us")), ("code", pa.string()), ("numeric_value", pa.float32())]
)


def at(day: int, hour: int = 8, year: int = 2015) -> dt.datetime:
    """A moment in March."""
    return dt.datetime(year, 3, day, hour)


def person(subject: int) -> list[Row]:
    """A male person born 1950 with two statics, a birth and four events, two of them the same."""
    return [
        (subject, None, "GENDER//M", None),
        (subject, None, "HEIGHT", 180.5),
        (subject, dt.datetime(1950, 1, subject), "MEDS_BIRTH", None),
        (subject, at(1), "LAB//SpO2", 0.5),
        (subject, at(1), "LAB//SpO2", 0.5),
        (subject, at(2), "ICD10CM/I26.9", None),
        (subject, at(20), "MEDS_DEATH", None),
    ]


def shard(path: Path, rows: Sequence[Row], more: Mapping[str, Sequence[Any]] | None = None) -> Path:
    """One file of events; `more` are further columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(zip(*rows, strict=True)) or [(), (), (), ()]
    table = pa.table([pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], SCHEMA)
    for name, values in (more or {}).items():
        table = table.append_column(name, pa.array(values))
    pq.write_table(table, path)
    return path


def data_set(folder: Path, shards: Mapping[str, Sequence[Row]], codes: Sequence[Mapping[str, Any]] = ()) -> Path:
    """Shards by name (`train/0`), and `codes.parquet` where there are any."""
    for name, rows in shards.items():
        shard(folder / "data" / f"{name}.parquet", rows)
    if codes:
        (folder / "metadata").mkdir(exist_ok=True)
        schema = pa.schema(
            [("code", pa.string()), ("description", pa.string()), ("parent_codes", pa.list_(pa.string()))]
        )
        pq.write_table(pa.Table.from_pylist(list(codes), schema), folder / "metadata" / "codes.parquet")
    return folder


def read_events(folder: Path) -> list[dict[str, Any]]:
    """Every row of a data set's shards, in order."""
    found = []
    for path in sorted((folder / "data").rglob("*.parquet")):
        found += pq.read_table(path, partitioning=None).to_pylist()
    return found
