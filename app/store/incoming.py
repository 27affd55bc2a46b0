"""Embeddings on their way: written a block at a time where nobody looks, moved together when all of them are there."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from app.store import locks
from app.store.embeddings import halfvecs

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from sqlalchemy import Connection

ROWS = 1_000
"""Vectors of a block."""
ASKED = 50_000
"""Scans that one statement names."""
_LEAST, _MOST = -(2**63), 2**63 - 1
"""Ids of scans lie between."""
TABLE = "model.incoming_embedding"
COLUMNS = ("checkpoint_id", "cohort_id", "image_occurrence_id", "sha256", "embedding")


@dataclass(frozen=True, slots=True)
class Place:
    """Whose embeddings: several jobs may be at them, each a block at a time."""

    checkpoint_id: int
    cohort_id: int

    @property
    def values(self) -> dict[str, int]:
        return {"checkpoint": self.checkpoint_id, "cohort": self.cohort_id}


def write_block(
    connection: Connection,
    place: Place,
    images: NDArray[np.int64],
    contents: Sequence[str],
    vectors_BD: NDArray[np.float32],
) -> None:
    """Put the vectors of some scans (B,) in place of earlier ones that wait, by COPY.

    Args:
        connection: its transaction holds the block.
        place: whose they are.
        images: image_occurrence_id, distinct.
        contents: hexadecimal digest of each scan's content.
        vectors_BD: standardised, finite, not zero, within the range of a half.
    """
    import numpy as np
    from sqlalchemy import text

    from app.store.copy import Field, copy_in, encode

    lock(connection, place)
    connection.execute(
        text(
            f"DELETE FROM {TABLE} WHERE checkpoint_id = :checkpoint AND cohort_id = :cohort "
            "AND image_occurrence_id = ANY(:images)"
        ),
        place.values | {"images": images.tolist()},
    )
    checkpoint, cohort = (np.full(len(images), key, np.int32) for key in (place.checkpoint_id, place.cohort_id))
    digests = np.frombuffer(bytes.fromhex("".join(contents)), "V32")
    fields = [Field(checkpoint), Field(cohort), Field(images), Field(digests), halfvecs(vectors_BD)]
    copy_in(connection, TABLE, COLUMNS, [encode(fields)])


def lock(connection: Connection, place: Place) -> None:
    """Until the transaction ends no other may write here."""
    locks.hold(connection, f"incoming embeddings {place.checkpoint_id} {place.cohort_id}")


_WANTED = "unnest(CAST(:images AS bigint[]), CAST(:contents AS bytea[])) w(image_occurrence_id, sha256)"


def _wanted(images: NDArray[np.int64], contents: Sequence[str]) -> dict[str, list[int] | list[bytes]]:
    return {"images": images.tolist(), "contents": [bytes.fromhex(content) for content in contents]}


def keep_only(connection: Connection, place: Place, images: NDArray[np.int64], contents: Sequence[str]) -> None:
    """Delete what waits here and is not the content of one of these scans, which ascend."""
    from sqlalchemy import text

    lock(connection, place)
    statement = text(
        f"DELETE FROM {TABLE} i WHERE checkpoint_id = :checkpoint AND cohort_id = :cohort "
        "AND image_occurrence_id >= :low AND image_occurrence_id < :high AND NOT EXISTS "
        f"(SELECT FROM {_WANTED} WHERE w.image_occurrence_id = i.image_occurrence_id AND w.sha256 = i.sha256)"
    )
    ends = [_LEAST, *images[ASKED::ASKED].tolist(), _MOST]
    for number, (low, high) in enumerate(itertools.pairwise(ends)):
        some = slice(number * ASKED, (number + 1) * ASKED)
        values = place.values | _wanted(images[some], contents[some])
        connection.execute(statement, values | {"low": low, "high": high})


_WAITS = f"""EXISTS (SELECT FROM {TABLE} i WHERE i.checkpoint_id = :checkpoint AND i.cohort_id = :cohort
                    AND i.image_occurrence_id = w.image_occurrence_id AND i.sha256 = w.sha256)"""
_SEEN = """EXISTS (SELECT FROM model.embedded_scan s JOIN model.embedding e USING (checkpoint_id, image_occurrence_id)
                   WHERE s.checkpoint_id = :checkpoint AND s.image_occurrence_id = w.image_occurrence_id
                   AND s.sha256 = w.sha256)"""


def missing(
    connection: Connection, place: Place, images: NDArray[np.int64], contents: Sequence[str], *, anew: bool
) -> list[int]:
    """Those of ascending scans whose embedding neither waits here nor is seen already (unless all are made `anew`)."""
    from sqlalchemy import text

    statement = f"SELECT w.image_occurrence_id FROM {_WANTED} WHERE NOT {_WAITS}"
    statement += "" if anew else f" AND NOT {_SEEN}"
    found: list[int] = []
    for start in range(0, len(images), ASKED):
        some = slice(start, start + ASKED)
        values = place.values | _wanted(images[some], contents[some])
        found += connection.execute(text(f"{statement} ORDER BY 1"), values).scalars()
    return found


_MOVE = (
    "SELECT model.add_embedding_partition(:checkpoint, :width)",  # and nobody else moves to it meanwhile
    f"DELETE FROM model.embedding e USING {TABLE} i WHERE i.checkpoint_id = :checkpoint AND i.cohort_id = :cohort "
    "AND e.checkpoint_id = :checkpoint AND e.image_occurrence_id = i.image_occurrence_id",
    "INSERT INTO model.embedding (checkpoint_id, image_occurrence_id, embedding) "
    f"SELECT checkpoint_id, image_occurrence_id, embedding FROM {TABLE} "
    "WHERE checkpoint_id = :checkpoint AND cohort_id = :cohort",
    "INSERT INTO model.embedded_scan (checkpoint_id, image_occurrence_id, sha256) "
    f"SELECT checkpoint_id, image_occurrence_id, sha256 FROM {TABLE} "
    "WHERE checkpoint_id = :checkpoint AND cohort_id = :cohort "
    "ON CONFLICT (checkpoint_id, image_occurrence_id) DO UPDATE SET sha256 = excluded.sha256",
    f"DELETE FROM {TABLE} WHERE checkpoint_id = :checkpoint AND cohort_id = :cohort",
)


def move(connection: Connection, place: Place, width: int) -> int:
    """Let what waits be seen, in place of older embeddings of these scans; how many."""
    from sqlalchemy import text

    lock(connection, place)
    counts = [connection.execute(text(statement), place.values | {"width": width}).rowcount for statement in _MOVE]
    return int(counts[-1])


_WITHOUT_JOB = f"""
SELECT i.checkpoint_id, i.cohort_id, k.name || ' on ' || c.name || '@' || c.version AS name,
       sum(pg_column_size(i)) AS bytes
FROM {TABLE} i JOIN model.checkpoint k USING (checkpoint_id) JOIN label.cohort c ON c.cohort_id = i.cohort_id
WHERE NOT EXISTS (SELECT FROM ops.job WHERE kind = 'embed' AND state IN ('queued', 'running', 'retry_wait'))
GROUP BY 1, 2, 3 ORDER BY 1, 2
"""


def without_job(connection: Connection) -> list[tuple[Place, str, int]]:
    """What waits here though no job embeds: whose, in words, bytes."""
    from sqlalchemy import text

    rows = connection.execute(text(_WITHOUT_JOB))
    return [(Place(row.checkpoint_id, row.cohort_id), row.name, int(row.bytes)) for row in rows]


def remove_without_job(connection: Connection, place: Place) -> bool:
    """Delete what waits here, unless a job embeds by now; a job makes it again from the exact numbers."""
    from sqlalchemy import text

    lock(connection, place)
    if place not in [one for one, _, _ in without_job(connection)]:
        return False
    statement = f"DELETE FROM {TABLE} WHERE checkpoint_id = :checkpoint AND cohort_id = :cohort"
    return connection.execute(text(statement), place.values).rowcount > 0
