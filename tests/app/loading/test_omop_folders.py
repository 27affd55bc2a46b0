"""Every real OMOP folder loads as it is, against counts that DuckDB makes of its files by plainly written SQL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pytest
from sqlalchemy import Engine

from app.loading.cdm import EVENTS, VOCABULARY
from app.loading.layouts import layouts
from app.loading.omop import load
from app.store.work import InlineWork
from tests.app.loading.extracts import rows

Make = Callable[..., InlineWork]

FOLDERS: dict[str, dict[str, Any]] = {
    "omop_gibleed_broadsea_5.3": {},
    "omop_synthea27nj_5.4": {},
    "omop_synthea27nj_parquet_5.4": {},
    "omop_mimic_iv_demo_5.3_partial": {},
    "omop_carpentries_parquet": {"max_rejects": 1},
    "omop_synpuf1k_partial": {"cdm": "5.4"},
}


def relation(folder: Path, table: str, cdm: str | None) -> str:
    """A table's file or files as DuckDB reads them by itself."""
    found = [p for p in folder.rglob("*") if p.name.split(".")[0].lower() == table and p.is_file()]
    if not found:
        return f"read_parquet('{next(folder.rglob(table))}/*.parquet')"
    (path,) = found
    if path.suffix == ".parquet":
        return f"read_parquet('{path}')"
    names = f", header = false, names = {list(layouts(table, cdm)[0])}" if cdm else ", header = true"
    delimiter = "\\t" if cdm else ","
    return f"read_csv('{path}', all_varchar = true, delim = '{delimiter}', quote = '\"'{names}, strict_mode = false)"


def fixed(connection: duckdb.DuckDBPyConnection, folder: Path, table: str, cdm: str | None) -> None:
    """The view `<table>`, lower-case names, SQL expressions in headers by the one name they hold."""
    source = relation(folder, table, cdm)
    cells = [row[0] for row in connection.execute(f"DESCRIBE SELECT * FROM {source}").fetchall()]
    named = [f'"{c}" AS {c.lower().removeprefix("date(").partition(",")[0]}' for c in cells if " " not in c]
    connection.execute(f"CREATE VIEW {table} AS SELECT {', '.join(named)} FROM {source}")


def loadable(table: str) -> str:
    """How many rows of a table are to be loaded: sound ones of known persons, each key once."""
    if table == "cdm_source":
        return "SELECT count(*) FROM cdm_source"
    if table in VOCABULARY:
        keys = ", ".join(VOCABULARY[table].key)
        return f"SELECT count(*) FROM (SELECT DISTINCT {keys} FROM {table})"
    if table == "person":
        return "SELECT count(DISTINCT person_id) FROM person WHERE TRY_CAST(person_id AS BIGINT) IS NOT NULL"
    known = "CAST(person_id AS BIGINT) IN (SELECT CAST(person_id AS BIGINT) FROM person)"
    if table == "death":
        return f"SELECT count(DISTINCT person_id) FROM death WHERE {known}"
    if table == "observation_period":
        return f"SELECT count(DISTINCT observation_period_id) FROM observation_period WHERE {known}"
    event = EVENTS[table]
    return (
        f"SELECT count(*) FROM (SELECT {event.key} FROM {table} WHERE {known} AND {event.date} IS NOT NULL "
        f"AND year(CAST({event.date} AS DATE)) BETWEEN 1800 AND 2300 "
        f"GROUP BY {event.key} HAVING count(DISTINCT hash({table})) = 1)"
    )


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_loads_what_plain_sql_counts_in_its_files(
    name: str, real_data: Path, work: Make, engine: Engine
) -> None:
    folder, options = real_data / name, FOLDERS[name]
    result = load(work(path=str(folder), **options))
    loads = rows(
        engine, "SELECT table_name, num_read, num_loaded, num_rejected FROM ops.load WHERE state = 'published'"
    )
    connection = duckdb.connect()
    for table, *_ in sorted(loads, key=lambda row: row[0] != "person"):
        fixed(connection, folder, table, options.get("cdm"))
    for table, read, loaded, rejected in loads:
        (records,) = connection.execute(f"SELECT count(*) FROM {table}").fetchone() or (None,)
        assert read == records == loaded + rejected, table
        (expected,) = connection.execute(loadable(table)).fetchone() or (None,)
        assert loaded == expected, table
    stored = dict(rows(engine, "SELECT table_name, num_rejected FROM ops.load WHERE num_rejected > 0"))
    assert dict(rows(engine, "SELECT table_name, count(*) FROM ops.reject GROUP BY 1")) == stored
    for table, counted in result["ignored"].items():
        source = relation(folder, table, None)
        if options.get("cdm"):
            source = source.replace("header = true", "header = false").replace("delim = ','", "delim = '\\t'")
        (records,) = connection.execute(f"SELECT count(*) FROM {source}").fetchone() or (None,)
        assert counted == records, table


def test_an_extract_without_a_header_asks_for_the_version_that_fits(real_data: Path, work: Make) -> None:
    from app.errors import InputError

    folder = str(real_data / "omop_synpuf1k_partial")
    with pytest.raises(InputError, match=r"11 columns without one, which fits CDM 5\.4; say --cdm 5\.4"):
        load(work(path=folder))
    with pytest.raises(InputError, match=r"Expected 10 columns in cdm_source\.csv under CDM 5\.2, found 11"):
        load(work(path=folder, cdm="5.2"))
