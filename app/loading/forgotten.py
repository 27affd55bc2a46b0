"""Leave out of a delivery whom the store was told to forget (`lachesis forget`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from app.store.forgetting import Memory

if TYPE_CHECKING:
    import duckdb


def note(connection: duckdb.DuckDBPyConnection, table: str, memory: Memory) -> None:
    """Add the forgotten among the persons of a decoded table to `forgotten_person`, before the table is judged.

    Args:
        connection: a decoder.
        table: in DuckDB, with a column person_id; of `t_person` source values count, too.
        memory: whom to leave out; costs nothing where nobody is.
    """
    if not memory:
        return
    import numpy as np
    import pyarrow as pa

    connection.execute("CREATE TABLE IF NOT EXISTS met_person (person_id BIGINT)")
    found = connection.execute(
        f"SELECT DISTINCT person_id FROM {table} t WHERE person_id IS NOT NULL "
        "AND NOT EXISTS (FROM met_person m WHERE m.person_id = t.person_id)"
    ).fetchnumpy()["person_id"]
    gone = {person for person in found.tolist() if memory.has_person(person)}
    if table == "t_person":
        values = connection.execute(
            "SELECT person_id, person_source_value FROM t_person WHERE person_id IS NOT NULL "
            "AND person_source_value IS NOT NULL"
        ).fetchall()
        gone |= {person for person, value in values if memory.has_value(value)}
    for name, persons in (("met_person", found), ("forgotten_person", np.array(sorted(gone), np.int64))):
        connection.register("met_now", pa.table({"person_id": pa.array(persons, pa.int64())}))
        connection.execute(f"INSERT INTO {name} FROM met_now")
        connection.unregister("met_now")
