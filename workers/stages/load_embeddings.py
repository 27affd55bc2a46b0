"""Stage `load_embeddings`: vectors that were made elsewhere become a checkpoint of arm `external`.

It stands behind no weights; heads, neighbours and reports take it like any other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from app import __version__
from app.errors import InputError
from app.loading.embeddings_read import Given, read_vectors, resolve, too_many
from app.loading.stops import told
from app.store import artifacts, embedding_index, embeddings, named_files, names
from app.store.embedding_index import Judged
from app.store.loads import (
    FileRecord,
    LoadRow,
    Reject,
    content_digest,
    lock_publishing,
    open_source,
    published_loads,
    record_load,
    record_rejects,
    supersede,
)
from app.store.places import digest_of
from app.store.work import Work
from workers.bridge import TRAIN, read_members
from workers.stages.embed import keep_set, told_of_index

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from sqlalchemy import Connection

TABLE = "embedding"
SOURCE = "embeddings of "
"""Begins the name of the source that a checkpoint's vectors are loads of."""

_SCANS = {
    "image_occurrence_id": "SELECT image_occurrence_id::text, image_occurrence_id FROM omop.image_occurrence",
    "series_uid": "SELECT series_uid, image_occurrence_id FROM omop.image_occurrence WHERE series_uid IS NOT NULL",
    # below its root, or below the folder that the root was last loaded from
    "path": "SELECT path, image_occurrence_id FROM omop.image_occurrence UNION "
    "SELECT rtrim(s.details -> 'roots' ->> i.root, '/') || '/' || i.path, i.image_occurrence_id "
    "FROM omop.image_occurrence i JOIN ops.load l USING (load_id) JOIN ops.source s USING (source_id) "
    "WHERE s.details -> 'roots' ? i.root",
}
"""What names a scan → names and scans."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Vectors:
    """Standardised embeddings of N scans."""

    images: NDArray[np.int64]
    embedding: NDArray[np.float32]
    mean: NDArray[np.float64]
    sd: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Delivery:
    """A file of vectors, judged."""

    encoder: str
    cohort_id: int
    file: FileRecord
    digest: bytes
    given: Given
    vectors: Vectors

    def row(self) -> LoadRow:
        return LoadRow(
            kind="embeddings",
            mode="snapshot",
            table_name=TABLE,
            files=[self.file],
            content_sha256=self.digest,
            rejects_by_rule=self.given.by_rule,
            num_read=self.given.num_read,
            num_loaded=len(self.vectors.images),
        )

    def rejects(self) -> Iterable[Reject]:
        for refusal in self.given.refusals:
            yield Reject(
                table_name=TABLE,
                file=self.file.name,
                record=refusal.record,
                rule=refusal.rule,
                column_name=refusal.column,
            )


class Kept(NamedTuple):
    """A file of the attempt, and what it was published as."""

    file: Path
    key: str
    sha256: str


def load_embeddings(work: Work) -> dict[str, Any]:
    """Load the vectors of a file as a checkpoint, standardised by the train scans of a cohort.

    Args (of the job): path, encoder, cohort, match (image_occurrence_id, series_uid, path or None), max_rejects.

    Raises:
        InputError: the file cannot be used, a name is unknown or taken, too much is rejected, or no train scan is left.
    """
    path, encoder = Path(str(work.args["path"])), str(work.args["encoder"])
    with work.connect() as connection:
        cohort = names.find(connection, "cohort", str(work.args["cohort"]))
        _refuse_trained(connection, encoder)
    if not path.is_file():
        raise InputError(f"Expected a file of vectors, found none; {path.name} is not on the worker's host.")
    work.progress(0, None, "", "reading vectors")
    sha256 = digest_of(path)
    given = read_vectors(path, work.args.get("match"))
    records = FileRecord(
        name=path.name, sha256=sha256, size=path.stat().st_size, records=given.num_read, dialect=path.suffix.lstrip(".")
    )
    digest = content_digest([records], f"{cohort.id} {given.match}")
    with work.connect() as connection:
        scans = _scans(connection, given.match)
        members = read_members(connection, cohort.id)
        kept = resolve(given, scans)
    if not kept or too_many(given, float(work.args.get("max_rejects", 0.05))):
        _stop(work, path.name, given)
    train = members.image[members.eligible & (members.split == TRAIN)]
    delivery = Delivery(
        encoder=encoder,
        cohort_id=cohort.id,
        file=records,
        digest=digest,
        given=given,
        vectors=standardised(kept, train, str(work.args["cohort"])),
    )
    return _publish(work, delivery)


def standardised(kept: dict[int, NDArray[np.float32]], train: NDArray[np.int64], cohort: str) -> Vectors:
    """Vectors of scans, standardised by mean and SD of those of `train`. Raises InputError where that cannot be."""
    from ml.embed import standardise, statistics

    images = np.array(list(kept), np.int64)
    raw = np.stack(list(kept.values()))
    is_train = np.isin(images, train)
    if is_train.sum() < 2:
        raise InputError(
            f"Expected vectors of two or more train scans of cohort {cohort!r} to standardise by, got "
            f"{int(is_train.sum())}; give the cohort whose scans these are."
        )
    try:
        mean, sd = statistics(raw[is_train])
        made = standardise(raw, mean, sd)
    except ValueError as error:
        raise InputError(str(error)) from None
    return Vectors(images=images, embedding=made, mean=mean, sd=sd)


def _refuse_trained(connection: Connection, encoder: str) -> None:
    """A name of trained weights is not taken over."""
    from sqlalchemy import text

    arm = connection.scalar(
        text("SELECT arm FROM model.checkpoint WHERE name = :n AND arm <> :external LIMIT 1"),
        {"n": encoder, "external": artifacts.EXTERNAL},
    )
    if arm is not None:
        raise InputError(f"Expected a name of its own for --encoder, got {encoder!r}, a checkpoint of arm {arm}.")


def _scans(connection: Connection, match: str) -> dict[str, list[int]]:
    from sqlalchemy import text

    found: dict[str, list[int]] = {}
    for key, image in connection.execute(text(_SCANS[match])):
        found.setdefault(key, []).append(image)
    return found


def _stop(work: Work, name: str, given: Given) -> None:
    """Keep the rejects under the job alone, then refuse."""
    rows = [
        Reject(table_name=TABLE, file=name, record=r.record, rule=r.rule, column_name=r.column) for r in given.refusals
    ]
    with work.transaction() as connection:
        record_rejects(connection, None, work.job_id, rows)
    raise InputError(
        f"Expected vectors of scans in the store, but {len(rows):,} of {given.num_read:,} are rejected "
        f"({told(given.by_rule)}); nothing was published. Mend the file, or raise --max-rejects."
    )


def _publish(work: Work, delivery: Delivery) -> dict[str, Any]:
    """All rows in one transaction; the same delivery again is left as it is."""
    vectors = delivery.vectors
    weights, numbers = _files(work, delivery)
    work.progress(0, None, "", "writing embeddings")
    result: dict[str, Any] = {
        "name": delivery.encoder,
        "read": delivery.given.num_read,
        "loaded": len(vectors.images),
        "rejected": len(delivery.given.refusals),
        "rejects_by_rule": delivery.given.by_rule,
        "width": vectors.embedding.shape[1],
    }
    with work.transaction() as connection:
        lock_publishing(connection, work.check)
        source_id = open_source(connection, SOURCE + delivery.encoder)
        before = published_loads(connection, source_id).get(TABLE, [])
        if any(load.content_sha256 == delivery.digest for load in before) and _current(connection, delivery):
            _count_shared_again(work, connection, delivery)
            return result | {"unchanged": True, "load_id": before[-1].load_id}
        for kept in (weights, numbers):
            named_files.hold(connection, work.settings, *kept)
        load_id = record_load(connection, source_id, work.job_id, delivery.row())
        record_rejects(connection, load_id, work.job_id, delivery.rejects())
        supersede(connection, [load.load_id for load in before])
        checkpoint_id = artifacts.add_checkpoint(connection, _checkpoint(work, delivery, weights))
        row = {
            "checkpoint_id": checkpoint_id,
            "cohort_id": delivery.cohort_id,
            "path": numbers.key,
            "sha256": numbers.sha256,
        }
        judged = _write(work, connection, row, vectors)
    for kept in (weights, numbers):
        kept.file.unlink()
    return result | {
        "unchanged": False,
        "load_id": load_id,
        "checkpoint_id": checkpoint_id,
        **told_of_index(work, judged),
    }


def _write(work: Work, connection: Connection, row: dict[str, Any], vectors: Vectors) -> Judged | None:
    """The vectors, their index, and the row of the set, which begins with `row`."""
    checkpoint_id = int(row["checkpoint_id"])
    embeddings.add_partition(connection, checkpoint_id, vectors.embedding.shape[1])
    embeddings.replace_embeddings(connection, checkpoint_id, vectors.images, vectors.embedding)
    judged = embedding_index.index(connection, checkpoint_id, vectors.images)
    row |= {"mean": vectors.mean.tolist(), "sd": vectors.sd.tolist(), "num_scans": len(vectors.images)}
    row |= {"num_failed": 0, "shared_volumes": _shared(work, connection, vectors.images), "job_id": work.job_id}
    keep_set(connection, row, judged)
    return judged


def _shared(work: Work, connection: Connection, images: NDArray[np.int64]) -> int:
    """Scans whose content another person has, too; it is said how far contents are known."""
    from ml.embed import shared_volumes

    contents = embeddings.contents(connection, images)
    if contents.num_unread:
        work.log(
            f"The voxels of {contents.num_unread:,} of {len(images):,} scans were never read: whether persons share "
            "them is told by their files' places alone; `lachesis cache build` reads them, then load this file again."
        )
    return shared_volumes(contents.content, contents.person)


def _current(connection: Connection, delivery: Delivery) -> bool:
    """Whether the newest checkpoint of the name holds an embedding of the cohort still."""
    from sqlalchemy import text

    return bool(
        connection.scalar(
            text(
                "SELECT EXISTS (SELECT FROM model.embedding_set WHERE cohort_id = :k AND checkpoint_id = "
                "(SELECT max(checkpoint_id) FROM model.checkpoint WHERE name = :n))"
            ),
            {"n": delivery.encoder, "k": delivery.cohort_id},
        )
    )


def _count_shared_again(work: Work, connection: Connection, delivery: Delivery) -> None:
    """Scans may have been read since."""
    from sqlalchemy import text

    connection.execute(
        text(
            "UPDATE model.embedding_set SET shared_volumes = :shared WHERE cohort_id = :k AND checkpoint_id = "
            "(SELECT max(checkpoint_id) FROM model.checkpoint WHERE name = :n)"
        ),
        {
            "shared": _shared(work, connection, delivery.vectors.images),
            "k": delivery.cohort_id,
            "n": delivery.encoder,
        },
    )


def _files(work: Work, delivery: Delivery) -> tuple[Kept, Kept]:
    """The checkpoint's file, which holds the standardisation alone, and the exact vectors."""
    import torch
    from safetensors.numpy import save_file

    from ml import checkpoint

    vectors = delivery.vectors
    file = work.folder / "checkpoint.safetensors"
    statistics = {
        "embedding.mean": torch.from_numpy(vectors.mean.astype(np.float32)),
        "embedding.sd": torch.from_numpy(vectors.sd.astype(np.float32)),
    }
    facts = {"external": delivery.encoder, "width": vectors.embedding.shape[1], "source_sha256": delivery.file.sha256}
    checkpoint.save(file, statistics, facts)
    weights = Kept(file, *artifacts.publish(work.settings, file, "checkpoints"))
    file = work.folder / "embedding.safetensors"
    arrays: dict[str, NDArray[Any]] = {"image_occurrence_id": vectors.images, "embedding": vectors.embedding}
    save_file({**arrays, "mean": vectors.mean, "sd": vectors.sd}, file)
    return weights, Kept(file, *artifacts.publish(work.settings, file, "embeddings"))


def _checkpoint(work: Work, delivery: Delivery, weights: Kept) -> dict[str, Any]:
    return {
        "name": delivery.encoder,
        "sha256": weights.sha256,
        "arm": artifacts.EXTERNAL,
        "encoder": delivery.encoder,
        "width": delivery.vectors.embedding.shape[1],
        "recipe": {"external": True, "match": delivery.given.match},
        "seed": 0,
        "step": 0,
        "num_steps": 0,
        "is_final": True,
        "cohort_id": delivery.cohort_id,
        "path": weights.key,
        "num_bytes": weights.file.stat().st_size,
        "code_version": __version__,
        "job_id": work.job_id,
        "fence": work.fence,
    }
