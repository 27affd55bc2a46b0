"""Export scripts: the columns that are loaded, and files that load as the tables themselves do."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import duckdb
import pytest
from sqlalchemy import Engine

from app.embedded.binaries import postgres_programs
from app.errors import UnknownName
from app.loading.cdm import COLUMNS, used_columns
from app.loading.omop import Options, _plan, load
from app.loading.queries import DIALECTS, VERSIONS, Export, script
from app.store.work import InlineWork
from tests.app.loading.databases import fill_database
from tests.app.loading.test_database import cdm_url, forget_loads, rich, stored  # noqa: F401

Make = Callable[..., InlineWork]


@pytest.mark.parametrize("table", sorted(COLUMNS))
def test_the_columns_that_leave_a_database_are_those_that_are_parsed(table: str) -> None:
    query = _plan(table, Options(path=Path(), source="x")).query
    named = set(re.findall(r"\w+", re.sub(r"AS \w+", "", query))) & COLUMNS[table]
    assert set(used_columns(table)) == named


@pytest.mark.parametrize("dialect", sorted(DIALECTS))
@pytest.mark.parametrize("version", VERSIONS)
def test_a_script_names_every_table_and_column_of_its_version(dialect: str, version: str) -> None:
    export = Export(cdm_schema="c", vocabulary_schema="v", version=version)
    text = script(dialect, export)
    for table in COLUMNS:
        assert f"{'v' if table.startswith('concept') else 'c'}.{table}" in text
        assert all(column in text for column in export.columns(table))
    assert ("discharged_to_concept_id" in text) == ("procedure_end_date" in text) == (version == "5.4")


def test_an_unknown_dialect_suggests_the_nearest() -> None:
    with pytest.raises(UnknownName, match="sqlserver"):
        script("sqlservr", Export(cdm_schema="c", vocabulary_schema="v", version="5.4"))


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """An extract with every table and column that a script of CDM 5.4 names."""
    folder = rich(tmp_path / "files")
    export = Export(cdm_schema="", vocabulary_schema="", version="5.4")
    for table in COLUMNS:
        path = folder / f"{table}.csv"
        lines = path.read_text().rstrip("\n").split("\n") if path.exists() else [",".join(export.columns(table))]
        missing = [c for c in export.columns(table) if c not in lines[0].split(",")]
        lines = [",".join([lines[0], *missing]), *(line + "," * len(missing) for line in lines[1:])]
        path.write_text("\n".join(lines) + "\n")
    yield folder


def test_the_script_for_postgres_exports_what_the_tables_give(
    full: Path,
    tmp_path: Path,
    work: Make,
    engine: Engine,
    cdm_url: str,  # noqa: F811
) -> None:
    load(work(path=str(full), max_rejects=1))
    expected = stored(engine)
    forget_loads(engine)
    fill_database(cdm_url, full, "cdm", "vocab")
    export = Export(cdm_schema="cdm", vocabulary_schema="vocab", version="5.4")
    (tmp_path / "export.sql").write_text(script("postgres", export))
    folder = tmp_path / "exported"
    folder.mkdir()
    psql = [str(postgres_programs(None, 18) / "psql"), "-X", "-q", cdm_url, "-f", str(tmp_path / "export.sql")]
    done = subprocess.run(psql, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr
    assert {path.name for path in folder.iterdir()} == {f"{table}.csv" for table in COLUMNS}
    load(work(path=str(folder), max_rejects=1))
    assert stored(engine) == expected


def test_the_script_for_duckdb_exports_what_the_tables_give(
    full: Path, tmp_path: Path, work: Make, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(work(path=str(full), max_rejects=1))
    expected = stored(engine)
    forget_loads(engine)
    folder = tmp_path / "exported"
    folder.mkdir()
    monkeypatch.chdir(folder)
    with duckdb.connect() as connection:
        connection.execute("CREATE SCHEMA cdm; CREATE SCHEMA vocab")
        for table in COLUMNS:
            where = f"{'vocab' if table.startswith('concept') else 'cdm'}.{table}"
            source = f"read_csv('{full / table}.csv', header = true, all_varchar = true, delim = ',', quote = '\"')"
            connection.execute(f"CREATE TABLE {where} AS FROM {source}")
        connection.execute(script("duckdb", Export(cdm_schema="cdm", vocabulary_schema="vocab", version="5.4")))
    load(work(path=str(folder), max_rejects=1))
    assert stored(engine) == expected


def test_lines_of_a_script_for_oracle_are_short_enough_for_its_client() -> None:
    text = script("oracle", Export(cdm_schema="c", vocabulary_schema="v", version="5.4"))
    assert max(map(len, text.splitlines())) < 2500
    assert text.index("SET TRANSACTION READ ONLY") > text.index("ALTER SESSION")
