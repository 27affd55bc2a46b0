"""Scripts that export a CDM from other databases as files that `load omop` reads: just the columns that are loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from app.errors import UnknownName
from app.loading.cdm import COLUMNS, VOCABULARY, used_columns

ONLY_IN_54 = {
    "procedure_occurrence": ("procedure_end_date", "procedure_end_datetime"),
    "visit_occurrence": ("discharged_to_concept_id",),
}
"""Columns that CDM 5.3 does not have."""
ONLY_IN_53 = {"visit_occurrence": ("discharge_to_concept_id",)}
VERSIONS = ("5.3", "5.4")
TEXT = frozenset(
    [
        "person_source_value",
        "concept_name",
        "domain_id",
        "vocabulary_id",
        "concept_class_id",
        "standard_concept",
        "concept_code",
        "invalid_reason",
        "relationship_id",
        "concept_synonym_name",
        "cdm_source_name",
        "cdm_holder",
        "cdm_version",
        "vocabulary_version",
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """What is to be exported: schemas as SQL names them, and the CDM's version."""

    cdm_schema: str
    vocabulary_schema: str
    version: str

    def columns(self, table: str) -> list[str]:
        """The columns of a table that this version has and that are loaded."""
        absent = (ONLY_IN_54 if self.version == "5.3" else ONLY_IN_53).get(table, ())
        return [column for column in used_columns(table) if column not in absent]

    def name(self, table: str) -> str:
        """A table with its schema."""
        return f"{self.vocabulary_schema if table in VOCABULARY else self.cdm_schema}.{table}"


def script(dialect: str, export: Export) -> str:
    """A script that writes one file, or one folder of files, a table.

    Raises:
        UnknownName: no such dialect or version.
    """
    if dialect not in DIALECTS:
        raise UnknownName("dialect", dialect, DIALECTS)
    if export.version not in VERSIONS:
        raise UnknownName("version of the CDM", export.version, VERSIONS)
    head, each, tail = DIALECTS[dialect]
    return "\n".join([*head, *(each(export, table) for table in COLUMNS), *tail]) + "\n"


def _is_moment(column: str) -> bool:
    return column.endswith("_datetime")


def _is_day(column: str) -> bool:
    return column.endswith("_date")


def _postgres(export: Export, table: str) -> str:
    listed = ", ".join(export.columns(table))  # psql reads a backslash command to the end of its line
    query = f"SELECT {listed} FROM {export.name(table)}"
    return f"\\copy ({query}) TO '{table}.csv' WITH (FORMAT csv, HEADER true, ENCODING 'UTF8')"


def _duckdb(export: Export, table: str) -> str:
    listed = ", ".join(export.columns(table))
    return f"COPY (SELECT {listed} FROM {export.name(table)}) TO '{table}.parquet' (FORMAT parquet);"


def _snowflake(export: Export, table: str) -> str:
    def value(column: str) -> str:
        return f"CAST({column} AS TIMESTAMP_NTZ) AS {column}" if _is_moment(column) else column

    listed = ", ".join(map(value, export.columns(table)))
    return (
        f"COPY INTO @lachesis_extract/{table}/part FROM (SELECT {listed} FROM {export.name(table)} "
        "AT (TIMESTAMP => $moment)) FILE_FORMAT = (TYPE = PARQUET) HEADER = TRUE;"
    )


def _bigquery(export: Export, table: str) -> str:
    def value(column: str) -> str:
        return f"CAST(CAST({column} AS DATETIME) AS STRING) AS {column}" if _is_moment(column) else column

    listed = ", ".join(map(value, export.columns(table)))
    return (
        f"EXPORT DATA OPTIONS (uri = 'gs://BUCKET/omop/{table}/part-*.parquet', format = 'PARQUET', "
        f"compression = 'SNAPPY', overwrite = true) AS\n"
        f"SELECT {listed} FROM `{export.name(table)}` FOR SYSTEM_TIME AS OF moment;"
    )


def _sqlserver(export: Export, table: str) -> str:
    def value(column: str) -> str:
        if column in TEXT:  # quoted here, since bcp quotes nothing; a null stays one
            return f"CHAR(34) + REPLACE({column}, CHAR(34), CHAR(34) + CHAR(34)) + CHAR(34)"
        if _is_moment(column):
            return f"CONVERT(varchar(19), {column}, 120)"
        return f"CONVERT(varchar(10), {column}, 23)" if _is_day(column) else column

    columns = export.columns(table)
    query = f"SELECT {', '.join(map(value, columns))} FROM {export.name(table)}"
    return (
        f'bcp "{query}" queryout {table}.body -S "$SERVER" -d "$DATABASE" -T -c -C 65001 -t , -r 0x0a\n'
        f"{{ echo {','.join(columns)}; cat {table}.body; }} > {table}.csv && rm {table}.body"
    )


def _oracle(export: Export, table: str) -> str:
    def value(column: str) -> str:
        if column in TEXT:
            return f"'\"' || REPLACE(REPLACE({column}, '\"', '\"\"'), CHR(10), ' ') || '\"'"
        if _is_moment(column):
            return f"TO_CHAR({column}, 'YYYY-MM-DD HH24:MI:SS')"
        return f"TO_CHAR({column}, 'YYYY-MM-DD')" if _is_day(column) else f"TO_CHAR({column})"

    columns = export.columns(table)
    listed = " || ',' ||\n  ".join(map(value, columns))  # SQL*Plus reads lines of limited length
    return f"SPOOL {table}.csv\nPROMPT {','.join(columns)}\nSELECT {listed}\nFROM {export.name(table)};\nSPOOL OFF"


Parts = tuple[tuple[str, ...], Callable[[Export, str], str], tuple[str, ...]]

DIALECTS: Mapping[str, Parts] = {
    "postgres": (
        (
            "-- psql -X -d DATABASE -f this_file; \\copy writes where psql runs.",
            "\\set ON_ERROR_STOP on",
            "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY;",
            "SET LOCAL DateStyle = 'ISO, YMD';",
            "SET LOCAL row_security = off;",
        ),
        _postgres,
        ("COMMIT;",),
    ),
    "duckdb": (
        ("-- duckdb DATABASE < this_file", "BEGIN TRANSACTION;"),
        _duckdb,
        ("COMMIT;",),
    ),
    "sqlserver": (
        (
            "#!/bin/sh",
            "# SERVER=… DATABASE=… sh this_file; DATABASE is best a snapshot, since each bcp is a session of its own.",
            "set -eu",
        ),
        _sqlserver,
        (),
    ),
    "oracle": (
        (
            "-- sqlplus -S /@SERVICE @this_file, or sql (SQLcl) likewise; with NLS_LANG=.AL32UTF8 in its environment.",
            "WHENEVER SQLERROR EXIT FAILURE",
            "SET ECHO OFF FEEDBACK OFF VERIFY OFF HEADING OFF PAGESIZE 0 LINESIZE 32767 TRIMSPOOL ON TERMOUT OFF",
            "SET DEFINE OFF TAB OFF",
            "ALTER SESSION SET NLS_NUMERIC_CHARACTERS = '.,';",
            "COMMIT;",
            "SET TRANSACTION READ ONLY;",
        ),
        _oracle,
        ("COMMIT;", "EXIT"),
    ),
    "snowflake": (
        (
            "-- snowsql -f this_file, or a worksheet; then GET each folder of the stage into a folder of its name.",
            "ALTER SESSION SET TIMEZONE = 'UTC';",
            "CREATE TEMPORARY STAGE lachesis_extract;",
            "SET moment = (SELECT CURRENT_TIMESTAMP());",
        ),
        _snowflake,
        tuple(f"GET @lachesis_extract/{table}/ file:///TARGET/{table}/;" for table in COLUMNS),
    ),
    "bigquery": (
        (
            "-- bq query --use_legacy_sql=false < this_file; then gcloud storage cp -r gs://BUCKET/omop .",
            "DECLARE moment TIMESTAMP DEFAULT CURRENT_TIMESTAMP();",
        ),
        _bigquery,
        (),
    ),
}
"""Dialect → what comes first, a statement for a table, what comes last."""
