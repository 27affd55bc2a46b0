"""Deltas (append, upsert) against what their source shows: what is already so, what changes, what goes.

Afterwards `t_<table>` holds the rows to write, and `x_<table>` (key, person_id) the shown rows that go: those that are
replaced, and those that the delta says are deleted. Both are found by primary key alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from app.loading import rows
from app.loading.cdm import EVENTS
from app.loading.context import append
from app.loading.validate import NEEDS_UPSERT, Judged, key_text, one
from app.store import shown as store
from app.store.loads import Shown, load_ids, partitions

if TYPE_CHECKING:
    import duckdb
    import numpy as np
    from numpy.typing import NDArray
    from sqlalchemy import Connection

MODES = ("snapshot", "append", "upsert")
KEYED = (*store.KEPT, *(table for table in EVENTS if table not in store.KEPT))
"""Tables whose rows have a primary key and are counted one by one; of vocabulary a load replaces the one before."""


def is_delta(mode: str) -> bool:
    """Whether a delivery adds to what is shown, rather than replaces it."""
    return mode != "snapshot"


def split_deletions(connection: duckdb.DuckDBPyConnection, table: str, *, upsert: bool) -> int:
    """Move the rows that only say what goes from `t_<table>` to `d_<table>` (key); how many records they are."""
    connection.execute(f"CREATE TABLE d_{table} (key BIGINT)")
    if not upsert:
        return 0
    connection.execute(f"INSERT INTO d_{table} SELECT DISTINCT key FROM t_{table} WHERE deleted AND bad IS NULL")
    (count,) = one(connection, f"SELECT count(*) FROM t_{table} WHERE deleted AND bad IS NULL")
    connection.execute(f"DELETE FROM t_{table} WHERE deleted AND bad IS NULL")
    connection.execute(f"ALTER TABLE t_{table} DROP COLUMN deleted")
    return int(count)


def settle(
    store_connection: Connection,
    connection: duckdb.DuckDBPyConnection,
    judged: Judged,
    shown: Shown,
    *,
    mode: str,
    num_deletions: int,
) -> None:
    """Compare the sound rows of a delta's table with the shown ones; sets `num_loaded`, `num_same`, `num_deleted`.

    A row that is shown with the same content is `num_same` and written no second time. One with other content replaces
    the shown row in an upsert, and is rejected in an append. A deletion of a row that is not shown changes nothing.

    Args:
        store_connection: a transaction of the store, for temporary tables; nothing else is written.
        connection: the decoder, with `t_<table>` and `d_<table>`.
        judged: the table, rejects removed.
        shown: what the source shows.
        mode: append or upsert.
        num_deletions: records that `split_deletions` moved.
    """
    table = judged.table
    connection.execute(f"CREATE TABLE o_{table} (key BIGINT, person_id BIGINT, same BOOLEAN)")
    connection.execute(f"CREATE TABLE x_{table} (key BIGINT, person_id BIGINT)")
    if load_ids(shown, table):
        _find(store_connection, connection, table, shown)
    # a key that is written and deleted by one delivery is written: a correction often comes as both
    connection.execute(
        f"INSERT INTO x_{table} SELECT key, person_id FROM g_{table} WHERE key NOT IN (SELECT key FROM t_{table})"
        if _exists(connection, f"g_{table}")
        else "SELECT 1"
    )
    (gone,) = one(connection, f"SELECT count(*) FROM x_{table}")
    judged.num_same = _remove(connection, table, "same")
    if mode == "upsert":
        connection.execute(f"INSERT INTO x_{table} SELECT key, person_id FROM o_{table} WHERE NOT same")
    else:
        code = len(judged.rules) - 1
        connection.execute(
            f"INSERT INTO r_{table} SELECT rowid, {code}, {key_text(table)} FROM t_{table} "
            f"WHERE key IN (SELECT key FROM o_{table} WHERE NOT same)"
        )
        if count := _remove(connection, table, "NOT same"):
            judged.rejects_by_rule[NEEDS_UPSERT] = count
    judged.num_deleted = min(int(gone), num_deletions)
    judged.num_same += num_deletions - judged.num_deleted
    (judged.num_loaded,) = one(connection, f"SELECT count(*) FROM t_{table}")


def _exists(connection: duckdb.DuckDBPyConnection, table: str) -> bool:
    return bool(one(connection, f"SELECT count(*) FROM duckdb_tables() WHERE table_name = '{table}'")[0])


def _remove(connection: duckdb.DuckDBPyConnection, table: str, which: str) -> int:
    """Delete incoming rows whose shown row is `which`; how many."""
    where = f"WHERE key IN (SELECT key FROM o_{table} WHERE {which})"
    (count,) = one(connection, f"SELECT count(*) FROM t_{table} {where}")
    if count:
        connection.execute(f"DELETE FROM t_{table} {where}")
    return int(count)


def _find(store_connection: Connection, connection: duckdb.DuckDBPyConnection, table: str, shown: Shown) -> None:
    """Fill `o_<table>` with the shown rows of incoming keys, and make `g_<table>` of those of deleted keys."""
    ids, parts = load_ids(shown, table), partitions(shown, table)
    found = []
    if table in EVENTS:
        columns: Sequence[str] = rows.event_columns(table)
        chunks = (chunk for chunk, _ in rows.events(connection, table, 0, unknown_visits=False))
        store.stage_rows(store_connection, f"in_event_{table}", "omop.event", columns, chunks)
        found.append(list(store.find_events(store_connection, parts, f"in_event_{table}", columns)))
    if table in store.KEPT:
        columns, make = rows.KEPT[table]
        chunks = (chunk for chunk, _ in make(connection, 0))
        store.stage_rows(store_connection, f"in_{table}", f"omop.{table}", columns, chunks)
        found.append(list(store.find_kept(store_connection, table, f"in_{table}", ids)))
    for batches in found:
        append(connection, f"o_{table}", batches, "key, person_id, same = 1")
    if len(found) > 1:  # a visit is the same where its event and its row are
        connection.execute(
            f"CREATE OR REPLACE TABLE o_{table} AS SELECT key, min(person_id) AS person_id, bool_and(same) AS same "
            f"FROM o_{table} GROUP BY key"
        )
    store.stage_keys(store_connection, f"gone_{table}", keys(connection, f"SELECT key FROM d_{table}"))
    relations, key = (parts, "source_row_id") if table in EVENTS else ([f"omop.{table}"], store.KEPT[table][0])
    connection.execute(f"CREATE TABLE g_{table} (key BIGINT, person_id BIGINT)")
    gone = store.find_keys(store_connection, relations, key, f"gone_{table}", ids)
    append(connection, f"g_{table}", gone, "key, person_id")


def keys(connection: duckdb.DuckDBPyConnection, query: str) -> Iterator[NDArray[np.int64]]:
    """One int64 column of a query, in batches."""
    from app.loading.decode import query_batches

    for batch in query_batches(connection, query, 65_536):
        yield batch.column(0).to_numpy()


def changes_nothing(connection: duckdb.DuckDBPyConnection, judged: dict[str, Judged]) -> bool:
    """Whether no row of a delta's keyed tables is to be written or to go."""
    return all(
        found.num_loaded == 0 and not one(connection, f"SELECT count(*) FROM x_{table}")[0]
        for table, found in judged.items()
        if table in KEYED
    )
