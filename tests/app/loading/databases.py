"""A second real database with a CDM in it, made of an extract's files."""

from __future__ import annotations

import csv
import gzip
import io
from pathlib import Path

import psycopg

from app.loading.cdm import COLUMNS, VOCABULARY
from app.loading.dialect import Reading
from app.loading.extract import read_extract

TEXT = {
    "concept_code",
    "concept_name",
    "domain_id",
    "vocabulary_id",
    "concept_class_id",
    "relationship_id",
    "unique_device_id",
    "production_id",
}


def kind_of(column: str) -> str:
    """The type that the CDM gives a column."""
    if column in TEXT or "source_id" in column or ("value" in column and not column.endswith("_id")):
        return "numeric" if column == "value_as_number" else "varchar"
    for ending, kind in (("_datetime", "timestamp"), ("_date", "date"), ("_id", "bigint"), ("_of_birth", "integer")):
        if column.endswith(ending) or "_concept_id" in column:
            return "bigint" if "_concept_id" in column else kind
    return "integer" if "levels" in column else "varchar"


def fill_database(url: str, folder: Path, schema: str, vocabulary: str, **kinds: str) -> None:
    """Create the two schemas and a table for each file of an extract, rows as they are.

    Args:
        url: of the database.
        folder: a folder of CSV files.
        schema, vocabulary: where tables of the CDM, and those of the vocabulary, go.
        kinds: other types than the CDM's, by column.
    """
    with psycopg.connect(url) as connection:
        for name in dict.fromkeys((schema, vocabulary)):
            connection.execute(f"CREATE SCHEMA IF NOT EXISTS {name}")
        for table, files in read_extract(folder, Reading(), folder).files.items():
            where = f"{vocabulary if table in VOCABULARY else schema}.{table}"
            (file,) = files
            columns = [column for column in file.columns if column in COLUMNS[table]]
            listed = ", ".join(f"{column} {kinds.get(column) or kind_of(column)}" for column in columns)
            connection.execute(f"CREATE TABLE {where} ({listed})".encode())
            data = file.path.read_bytes()
            text = (gzip.decompress(data) if file.path.suffix == ".gz" else data).decode("utf-8-sig")
            rows = csv.reader(io.StringIO(text, newline=""), delimiter=file.delimiter or ",")
            next(rows)
            statement = f"COPY {where} ({', '.join(columns)}) FROM STDIN"
            with connection.cursor().copy(statement.encode()) as copy:
                for row in rows:
                    values = dict(zip(file.columns, row, strict=True))
                    copy.write_row([values[column] or None for column in columns])
