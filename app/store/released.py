"""Labels and splits as an extract releases them: kept beside ours, never mixed with them."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sqlalchemy import Connection

COLUMNS = (
    *("impression_id", "person_id", "image_occurrence_id", "task", "kind", "horizon_days", "status"),
    *("released_time", "time_days", "load_id"),
)


def known_persons(connection: Connection, persons: Iterable[int]) -> set[int]:
    """Those that the store holds."""
    from sqlalchemy import text

    statement = text("SELECT person_id FROM omop.person WHERE person_id = ANY (:persons)")
    return set(connection.execute(statement, {"persons": sorted(set(persons))}).scalars())


def has_persons(connection: Connection, source_id: int | None) -> bool:
    """Whether a source shows persons."""
    from sqlalchemy import text

    statement = text("SELECT EXISTS (SELECT FROM omop.person JOIN ops.load USING (load_id) WHERE source_id = :source)")
    return bool(connection.scalar(statement, {"source": source_id}))


def last_events(connection: Connection, persons: Iterable[int]) -> dict[int, dt.datetime]:
    """Person → time of the last event of any kind; persons without events are absent."""
    from sqlalchemy import text

    statement = text(
        "SELECT p.person_id, (SELECT max(e.time) FROM omop.event e WHERE e.person_id = p.person_id) "
        "FROM unnest(CAST(:persons AS int8[])) p (person_id)"
    )
    rows = connection.execute(statement, {"persons": sorted(set(persons))})
    return {person: last for person, last in rows if last is not None}


def put_splits(connection: Connection, splits: Mapping[int, str]) -> int:
    """Write persons' own splits; how many changed."""
    from sqlalchemy import text

    statement = text(
        "UPDATE omop.person p SET split = s.split FROM unnest(CAST(:persons AS int8[]), CAST(:splits AS text[])) "
        "s (person_id, split) WHERE s.person_id = p.person_id AND p.split IS DISTINCT FROM s.split"
    )
    return connection.execute(statement, {"persons": list(splits), "splits": list(splits.values())}).rowcount


def images_by_path(connection: Connection, source_id: int, root: str) -> dict[tuple[int, str], int]:
    """(person_id, path below the root) → image_occurrence_id of a source's scans."""
    from sqlalchemy import text

    statement = text(
        "SELECT i.person_id, i.path, i.image_occurrence_id FROM omop.image_occurrence i JOIN ops.load l "
        "USING (load_id) WHERE l.source_id = :source AND i.root = :root"
    )
    rows = connection.execute(statement, {"source": source_id, "root": root})
    return {(person, path): image for person, path, image in rows}


def put_labels(connection: Connection, source_id: int, rows: Iterable[Sequence[Any]]) -> int:
    """Replace what a source released by rows in the order of COLUMNS; how many."""
    from sqlalchemy import text

    from app.store.session import raw

    connection.execute(
        text(
            "DELETE FROM label.released_label r USING ops.load l WHERE l.load_id = r.load_id AND l.source_id = :source"
        ),
        {"source": source_id},
    )
    count = 0
    with raw(connection).cursor().copy(f"COPY label.released_label ({', '.join(COLUMNS)}) FROM STDIN") as copy:
        for row in rows:
            copy.write_row(row)
            count += 1
    return count
