"""Embeddings of scans: the vectors that are searched, and the files of exact numbers behind them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from app.errors import InputError
from app.store.artifacts import Checkpoint

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from sqlalchemy import Connection, RowMapping

    from app.store.copy import Field


def add_partition(connection: Connection, checkpoint_id: int, width: int) -> None:
    """Make the partition of a checkpoint where it is absent; nobody else adds to it until the transaction ends."""
    from sqlalchemy import text

    connection.execute(text("SELECT model.add_embedding_partition(:c, :w)"), {"c": checkpoint_id, "w": width})


def replace_embeddings(
    connection: Connection, checkpoint_id: int, images: NDArray[np.int64], vectors: NDArray[np.float32]
) -> None:
    """Put the vectors of some scans under one checkpoint, in place of older ones, by COPY.

    Args:
        connection: its transaction holds the change.
        checkpoint_id: the partition, which must exist (model.add_embedding_partition).
        images: (N,) image_occurrence_id, distinct.
        vectors: (N, D) standardised, finite, not zero, within the range of a half.
    """
    import numpy as np
    from sqlalchemy import text

    from app.store.copy import Field, copy_in, encode

    connection.execute(
        text("DELETE FROM model.embedding WHERE checkpoint_id = :c AND image_occurrence_id = ANY(:i)"),
        {"c": checkpoint_id, "i": [int(i) for i in images]},
    )
    columns = ("checkpoint_id", "image_occurrence_id", "embedding")
    chunks = range(0, len(images), _ROWS)
    keys = (np.full(len(images), checkpoint_id, np.int32), images.astype(np.int64))
    rows = (encode([*(Field(key[i : i + _ROWS]) for key in keys), halfvecs(vectors[i : i + _ROWS])]) for i in chunks)
    copy_in(connection, "model.embedding", columns, rows)
    connection.execute(
        text(
            "INSERT INTO model.embedded_scan (checkpoint_id, image_occurrence_id, sha256) "
            "SELECT :c, i.image_occurrence_id, o.sha256 FROM unnest(CAST(:i AS bigint[])) i (image_occurrence_id) "
            "LEFT JOIN omop.image_occurrence o USING (image_occurrence_id) "
            "ON CONFLICT (checkpoint_id, image_occurrence_id) DO UPDATE SET sha256 = excluded.sha256"
        ),
        {"c": checkpoint_id, "i": [int(i) for i in images]},
    )


_ROWS = 1_000
"""Vectors encoded at once."""


def halfvecs(vectors_BD: NDArray[np.float32]) -> Field:
    """Vectors as a column of halfvec in binary COPY form: the dimension, a zero and the halves, big-endian."""
    import numpy as np

    from app.store.copy import Field

    width = vectors_BD.shape[1]
    rows = np.zeros(len(vectors_BD), [("width", ">i2"), ("zero", ">i2"), ("half", ">f2", (width,))])
    rows["width"], rows["half"] = width, vectors_BD
    return Field(rows.view(f"V{rows.dtype.itemsize}"))


@dataclass(frozen=True, slots=True)
class Contents:
    """What is known of the contents of some scans, in no order."""

    content: list[str]
    """(N,) equal where scans are equal."""
    person: NDArray[np.int64]
    """(N,) whose scan."""
    num_unread: int
    """How many are told by their place alone, since their voxels were not read yet."""


_CONTENTS = """
SELECT person_id, coalesce(encode(sha256, 'hex'), load.source_id || ' ' || root || ' ' || path || ' '
                           || coalesce(details ->> 'files', '')) AS content, sha256 IS NULL AS unread
FROM omop.image_occurrence LEFT JOIN ops.load USING (load_id)
WHERE image_occurrence_id = ANY(CAST(:images AS bigint[]))
"""


def contents(connection: Connection, images: NDArray[np.int64]) -> Contents:
    """Digests of scans' voxels as recorded, or their places where nobody has read them yet."""
    import numpy as np
    from sqlalchemy import text

    rows = connection.execute(text(_CONTENTS), {"images": images.tolist()}).all()
    return Contents(
        content=[row.content for row in rows],
        person=np.array([row.person_id for row in rows], np.int64),
        num_unread=sum(row.unread for row in rows),
    )


def embedded_files(connection: Connection, checkpoint_id: int) -> list[tuple[str, str]]:
    """(path, sha256) of the embeddings of a checkpoint, of any cohort, newest first."""
    from sqlalchemy import text

    statement = "SELECT path, sha256 FROM model.embedding_set WHERE checkpoint_id = :c ORDER BY created_at DESC"
    return [(row.path, row.sha256) for row in connection.execute(text(statement), {"c": checkpoint_id})]


def embedding_set(connection: Connection, checkpoint: Checkpoint, cohort_id: int) -> RowMapping:
    """The embedding of a cohort by a checkpoint. Raises InputError saying which command makes it."""
    from sqlalchemy import text

    row = (
        connection.execute(
            text("SELECT * FROM model.embedding_set WHERE checkpoint_id = :c AND cohort_id = :k"),
            {"c": checkpoint.checkpoint_id, "k": cohort_id},
        )
        .mappings()
        .first()
    )
    if row is None:
        cohort = connection.execute(
            text("SELECT name FROM label.cohort WHERE cohort_id = :k"), {"k": cohort_id}
        ).scalar()
        raise InputError(
            f"Expected embeddings of cohort {cohort!r} by checkpoint {checkpoint.name!r}, found none; "
            f"run `lachesis embed {checkpoint.name} --cohort {cohort}` first."
        )
    return row
