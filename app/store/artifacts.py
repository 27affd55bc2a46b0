"""Checkpoints, embeddings and the files behind them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.errors import InputError, UnknownName
from app.store.places import digest_of, place

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from sqlalchemy import Connection, RowMapping

    from app.settings import Settings


EXTERNAL = "external"
"""Arm of vectors that were made elsewhere: no weights stand behind them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A row of model.checkpoint, as far as stages need it."""

    checkpoint_id: int
    name: str
    sha256: str
    arm: str
    encoder: str
    width: int
    recipe: dict[str, Any]
    seed: int
    path: str
    label_set_id: int | None
    cohort_id: int | None
    shuffled: bool


_COLUMNS = """
SELECT checkpoint_id, name, sha256, arm, encoder, width, recipe, seed, path, label_set_id, cohort_id, shuffled
FROM model.checkpoint WHERE checkpoint_id = :id
"""


def find_checkpoint(connection: Connection, name: str) -> Checkpoint:
    """The checkpoint meant by NAME, NAME@EPOCH, NAME@best, NAME@last, an alias, an id or the beginning of a digest.

    Raises:
        UnknownName: there is none.
        InputError: an epoch that is not kept, or a beginning of several digests.
    """
    from sqlalchemy import text
    from sqlalchemy.exc import DBAPIError

    try:
        with connection.begin_nested():
            found = connection.execute(text("SELECT model.find_checkpoint(:name)"), {"name": name}).scalar_one()
    except DBAPIError as error:
        state = getattr(error.orig, "sqlstate", None)
        if state == "22023":
            raise InputError(str(error.orig).splitlines()[0]) from None
        if state != "P0002":
            raise
        known = connection.execute(text("SELECT DISTINCT name FROM model.checkpoint WHERE is_final")).scalars()
        raise UnknownName("checkpoint", name, known) from None
    return Checkpoint(**connection.execute(text(_COLUMNS), {"id": found}).mappings().one())


def publish(settings: Settings, file: Path, kind: str) -> tuple[str, str]:
    """Put a file under its digest among the artifacts; (its key there, sha256).

    Writing it again is a no-op, so that two attempts at one job cannot harm each other.

    Raises:
        OSError: it could not be written, or does not read back as written; ArtifactsAway where a bucket is away.
        StoreError: there is no place for it, or we may not write there.
    """
    digest = digest_of(file)
    key = f"{kind}/{digest[:2]}/{digest}{file.suffix}"
    place(settings).put(file, key, digest)
    return key, digest


def fetch(settings: Settings, key: str, sha256: str) -> Path:
    """A published file on this host, its content checked. Raises StoreError where it is missing or altered."""
    return place(settings).get(key, sha256)


def is_kept(settings: Settings, key: str) -> bool:
    """Whether a published file is still there."""
    return place(settings).size(key) is not None


def add_checkpoint(connection: Connection, values: Mapping[str, Any]) -> int:
    """Insert a row of model.checkpoint; its key. Where it is the best of its job, no other is."""
    from sqlalchemy import insert, update

    from app.schema.model import Checkpoint as Table

    if values.get("is_best"):
        others = update(Table).where(Table.job_id == values["job_id"], Table.is_best)
        connection.execute(others.values(is_best=False))
    return int(connection.execute(insert(Table).values(**values).returning(Table.checkpoint_id)).scalar_one())


_FORGET = """
DELETE FROM model.checkpoint c
WHERE c.job_id = :job AND NOT c.is_final AND NOT c.is_best AND c.checkpoint_id NOT IN (
    SELECT checkpoint_id FROM model.checkpoint WHERE job_id = :job AND NOT is_final
    ORDER BY step DESC, checkpoint_id DESC LIMIT :keep)
  AND NOT EXISTS (SELECT FROM model.embedding_set e WHERE e.checkpoint_id = c.checkpoint_id)
  AND NOT EXISTS (SELECT FROM model.alias a WHERE a.checkpoint_id = c.checkpoint_id)
  AND NOT EXISTS (SELECT FROM model.checkpoint p WHERE p.parent_id = c.checkpoint_id)
RETURNING path
"""


def forget_stops(connection: Connection, job_id: int, keep: int) -> list[str]:
    """Delete a training's stops on the way but for the newest `keep`, the best and those that something refers to.

    Returns:
        paths of artifacts that no row names any more; `remove` them once the transaction has committed.
    """
    from sqlalchemy import text

    paths = set(connection.execute(text(_FORGET), {"job": job_id, "keep": keep}).scalars())
    named = text("SELECT path FROM model.checkpoint WHERE path = ANY(:paths)")
    return sorted(paths - set(connection.execute(named, {"paths": list(paths)}).scalars()))


def remove(settings: Settings, paths: Iterable[str]) -> None:
    """Delete published files that no row names any more."""
    here = place(settings)
    for path in paths:
        here.remove(path)


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
    from sqlalchemy import text

    from app.store.copy import copy_in

    connection.execute(
        text("DELETE FROM model.embedding WHERE checkpoint_id = :c AND image_occurrence_id = ANY(:i)"),
        {"c": checkpoint_id, "i": [int(i) for i in images]},
    )
    columns = ("checkpoint_id", "image_occurrence_id", "embedding")
    chunks = range(0, len(images), _ROWS)
    rows = (_rows(checkpoint_id, images[i : i + _ROWS], vectors[i : i + _ROWS]) for i in chunks)
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


def _rows(checkpoint_id: int, images: NDArray[np.int64], vectors: NDArray[np.float32]) -> bytes:
    """Rows of model.embedding in binary COPY form; a halfvec is its dimension, a zero and its halves, big-endian."""
    import numpy as np

    layout = [("fields", ">i2"), ("l0", ">i4"), ("checkpoint_id", ">i4"), ("l1", ">i4"), ("image", ">i8")]
    layout += [("l2", ">i4"), ("width", ">i2"), ("zero", ">i2"), ("half", ">f2", (vectors.shape[1],))]  # type: ignore[list-item]
    rows = np.zeros(len(images), np.dtype(layout))
    rows["fields"], rows["l0"], rows["l1"], rows["l2"] = 3, 4, 8, 4 + 2 * vectors.shape[1]
    rows["checkpoint_id"], rows["image"], rows["width"], rows["half"] = checkpoint_id, images, vectors.shape[1], vectors
    return rows.tobytes()


_RECALL = """
SELECT avg((SELECT count(*) FROM unnest(found.images) f(image) WHERE f.image = ANY(exact.images))::float8
           / greatest(cardinality(exact.images), 1))
FROM unnest(CAST(:images AS bigint[])) q(image)
CROSS JOIN LATERAL (SELECT coalesce(array_agg(n.image_occurrence_id), '{}') AS images
                    FROM model.neighbours(q.image, :checkpoint, 10) n) found
CROSS JOIN LATERAL (
    SELECT coalesce(array_agg(x.image_occurrence_id), '{}') AS images FROM (
        SELECT e.image_occurrence_id FROM model.embedding e, model.embedding o
        WHERE o.checkpoint_id = :id AND o.image_occurrence_id = q.image
          AND e.checkpoint_id = :id AND e.image_occurrence_id <> q.image
        ORDER BY (e.embedding <=> o.embedding) + 0, e.image_occurrence_id LIMIT 10) x) exact
"""


def measure_recall(connection: Connection, checkpoint_id: int, images: Iterable[int]) -> float:
    """Share of the ten exactly nearest scans that the index finds, a mean over some scans."""
    from sqlalchemy import text

    values = {"images": list(images), "checkpoint": str(checkpoint_id), "id": checkpoint_id}
    return float(connection.execute(text(_RECALL), values).scalar() or 0.0)


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
