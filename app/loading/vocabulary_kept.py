"""The vocabulary kept beside the store: sorted Parquet files, and what of them the concepts in use need."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.loading.cdm import VOCABULARY
from app.loading.decode import sql_text
from app.loading.validate import one
from app.store.released_words import kept_file
from app.store.vocabulary import Release

if TYPE_CHECKING:
    import duckdb

    from app.settings import Settings

ORDER = {
    "concept": "concept_id",
    "concept_ancestor": "descendant_concept_id, ancestor_concept_id",
    "concept_relationship": "concept_id_1, concept_id_2, relationship_id",
    "concept_synonym": "concept_id, concept_synonym_name, language_concept_id",
}
"""How the kept files are sorted: by what is asked of them, so that a few concepts touch a few row groups."""

MAPPINGS = "('Maps to', 'Mapped from')"


def views(decoder: duckdb.DuckDBPyConnection, settings: Settings, release: Release) -> None:
    """Make the views `k_<table>` over the kept files; empty ones for tables that the release lacks.

    Raises:
        StoreError: a file is not on this host.
    """
    for table, spec in VOCABULARY.items():
        path = kept_file(settings, release, table)
        if path is None:
            types = {"int": "INTEGER", "date": "DATE", "text": "VARCHAR"}
            listed = ", ".join(f"NULL::{types[kind]} AS {name}" for name, kind in spec.columns)
            decoder.execute(f"CREATE OR REPLACE VIEW k_{table} AS SELECT {listed} WHERE false")
        else:
            decoder.execute(f"CREATE OR REPLACE VIEW k_{table} AS FROM read_parquet({sql_text(str(path))})")


def add_seeds(decoder: duckdb.DuckDBPyConnection, table: str, concepts: Iterable[int]) -> None:
    """Make a DuckDB table of concept ids."""
    import numpy as np
    import pyarrow as pa

    ids = np.fromiter(concepts, np.int32)
    decoder.register("given_ids", pa.table({"concept_id": ids}))
    decoder.execute(f"CREATE OR REPLACE TABLE {table} AS SELECT concept_id FROM given_ids")
    decoder.unregister("given_ids")


def select(decoder: duckdb.DuckDBPyConnection) -> int:
    """Make `v_<table>`: what the concepts of `v_seed` need, without those of `v_done`.

    Kept are the concepts themselves, those that they map to, and all that stand above these, with every ancestor row
    from a kept concept up, `Maps to` and `Mapped from` among kept ones, and their synonyms. Kept concepts are closed
    upwards, so that the order in which concepts come into use makes no difference.

    Returns:
        Number of kept concepts that the release has. `v_keep` holds them with those that it lacks.
    """
    decoder.execute("CREATE OR REPLACE TABLE v_keep AS SELECT DISTINCT concept_id FROM v_seed")
    decoder.execute(
        "INSERT INTO v_keep SELECT DISTINCT concept_id_2 FROM k_concept_relationship r "
        "WHERE r.concept_id_1 IN (SELECT concept_id FROM v_seed) AND relationship_id = 'Maps to' "
        "AND invalid_reason IS NULL AND concept_id_2 NOT IN (SELECT concept_id FROM v_keep) "
        "AND concept_id_2 NOT IN (SELECT concept_id FROM v_done)"
    )
    decoder.execute("CREATE OR REPLACE TABLE v_concept_ancestor AS FROM k_concept_ancestor WHERE false")
    decoder.execute("CREATE OR REPLACE TABLE v_next AS FROM v_keep")
    while one(decoder, "SELECT count(*) FROM v_next")[0]:
        decoder.execute(
            "CREATE OR REPLACE TABLE v_rows AS FROM k_concept_ancestor "
            "WHERE descendant_concept_id IN (SELECT concept_id FROM v_next)"
        )
        decoder.execute("INSERT INTO v_concept_ancestor FROM v_rows")
        decoder.execute(
            "CREATE OR REPLACE TABLE v_next AS SELECT DISTINCT ancestor_concept_id AS concept_id FROM v_rows "
            "WHERE ancestor_concept_id NOT IN (SELECT concept_id FROM v_keep) "
            "AND ancestor_concept_id NOT IN (SELECT concept_id FROM v_done)"
        )
        decoder.execute("INSERT INTO v_keep FROM v_next")
    kept = "SELECT concept_id FROM v_keep"
    for table, condition in (
        ("concept", f"concept_id IN ({kept})"),
        ("concept_synonym", f"concept_id IN ({kept})"),
        (
            "concept_relationship",
            f"relationship_id IN {MAPPINGS} AND concept_id_1 IN ({kept} UNION FROM v_done) "
            f"AND concept_id_2 IN ({kept} UNION FROM v_done) "
            f"AND (concept_id_1 IN ({kept}) OR concept_id_2 IN ({kept}))",
        ),
    ):
        decoder.execute(f"CREATE OR REPLACE TABLE v_{table} AS FROM k_{table} WHERE {condition}")
    return int(one(decoder, "SELECT count(*) FROM v_concept")[0])


def write_parquet(connection: duckdb.DuckDBPyConnection, table: str, into: Path, where: str = "true") -> None:
    """Write the decoded table `t_<table>`, sorted, compressed."""
    listed = ", ".join(name for name, _ in VOCABULARY[table].columns)
    connection.execute(
        f"COPY (SELECT {listed} FROM t_{table} WHERE {where} ORDER BY {ORDER[table]}) "
        f"TO {sql_text(str(into))} (FORMAT parquet, COMPRESSION zstd)"
    )


def has_twins(path: Path, table: str) -> bool:
    """True where a key comes twice in a file that is sorted by it."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    keys = ORDER[table].split(", ")
    last: list[object] | None = None
    for batch in pq.ParquetFile(path).iter_batches(1_000_000, columns=keys):
        columns = [batch.column(name) for name in keys]
        if not batch.num_rows:
            continue
        if last is not None and last == [column[0].as_py() for column in columns]:
            return True
        same: Any = None
        for column in columns:
            equal = pc.equal(column.slice(1), column.slice(0, batch.num_rows - 1))
            same = equal if same is None else pc.and_(same, equal)
        if batch.num_rows > 1 and pc.any(same).as_py():
            return True
        last = [column[-1].as_py() for column in columns]
    return False
