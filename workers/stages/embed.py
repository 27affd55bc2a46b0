"""Stage `embed`: a checkpoint and a cohort → standardised vectors, in Postgres for search and in a file for heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from app.errors import InputError, StoreError
from app.store import artifacts, embedding_index, embeddings, named_files, names
from app.store.embedding_index import Judged
from app.store.places import place as place_of
from app.store.work import Work
from workers.bridge import TRAIN, Members, Scan, read_members, read_scans
from workers.scan_volumes import ScanVolumes, permuted_images, prepare
from workers.stages.embed_unfinished import Unfinished

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from sqlalchemy import Connection

    from ml.checkpoint import Trained


KEY = ("checkpoint_id", "cohort_id")


@dataclass(frozen=True, kw_only=True, slots=True)
class Vectors:
    """Standardised embeddings of N scans, by ascending image_occurrence_id."""

    images: NDArray[np.int64]
    embedding: NDArray[np.float32]
    mean: NDArray[np.float64]
    sd: NDArray[np.float64]
    num_new: int
    """Distinct volumes that were embedded now."""
    num_resumed: int = 0
    """Distinct volumes that an attempt which was stopped had embedded."""


def embed(work: Work) -> dict[str, Any]:
    """Embed the scans of `args["cohort"]` by `args["checkpoint"]`; a complete earlier embedding is left as it is.

    Volumes that the checkpoint embedded before, for this cohort or another, are not embedded again.

    Equal volumes are embedded once. Scans that cannot be read are counted and left out. A checkpoint whose volumes were
    permuted among persons embeds them permuted in the same way.

    Raises:
        InputError: unknown names, no scan, or too many unreadable ones.
        ValueError: a vector that cannot be searched for (zero, not finite, beyond a half's range).
    """
    with work.connect() as connection:
        checkpoint = artifacts.find_checkpoint(connection, str(work.args["checkpoint"]))
        cohort_id = names.find(connection, "cohort", str(work.args["cohort"])).id
        if checkpoint.arm == artifacts.EXTERNAL:
            raise InputError(
                f"Expected a checkpoint with weights, got {checkpoint.name!r}, whose vectors were made elsewhere; "
                "bring those of further scans with `lachesis load embeddings`."
            )
        kept = _complete(connection, work, checkpoint.checkpoint_id, cohort_id)
        members = read_members(connection, cohort_id)
        scans = read_scans(connection, work.settings, cohort_id)
    if kept is not None:
        work.log(f"unchanged: checkpoint {checkpoint.name} has embedded this cohort already")
        return {**kept, "name": checkpoint.name, "unchanged": True}

    place_of(work.settings).require()
    trained = _load(work, checkpoint)
    volumes = prepare(work, trained.recipe, scans)
    if checkpoint.shuffled:
        volumes = volumes.permuted(permuted_images(members, checkpoint.seed))
    unfinished = Unfinished(work.folder, checkpoint.sha256, checkpoint.width)
    vectors = _vectors(work, trained, volumes, members, _kept(work, checkpoint, trained), unfinished)
    shared = _shared(scans, volumes)
    file = _write(work.folder / "embedding.safetensors", vectors, volumes)
    path, sha256 = artifacts.publish(work.settings, file, "embeddings")
    row = {
        "checkpoint_id": checkpoint.checkpoint_id,
        "cohort_id": cohort_id,
        "path": path,
        "sha256": sha256,
        "mean": vectors.mean.tolist(),
        "sd": vectors.sd.tolist(),
        "num_scans": len(vectors.images),
        "num_failed": len(volumes.failed),
        "shared_volumes": shared,
        "job_id": work.job_id,
    }
    work.progress(0, None, "", "writing embeddings")
    with work.transaction() as connection:
        named_files.hold(connection, work.settings, file, path, sha256)
        judged = store(connection, checkpoint.width, row, vectors)
    file.unlink()
    unfinished.remove()
    counts = {key: row[key] for key in ("checkpoint_id", "cohort_id", "num_scans", "shared_volumes")}
    distinct = len({cached.content_sha256 for cached in volumes.cached.values()})
    return {
        **counts,
        "name": checkpoint.name,
        "distinct_volumes": distinct,
        "width": checkpoint.width,
        "newly_embedded": vectors.num_new,
        "resumed": vectors.num_resumed,
        **told_of_index(work, judged),
        "unchanged": False,
        **volumes.failures(),
    }


def _complete(connection: Connection, work: Work, checkpoint_id: int, cohort_id: int) -> dict[str, Any] | None:
    """The earlier embedding, where no scan was missing and its file is still there."""
    from sqlalchemy import text

    row = (
        connection.execute(
            text(
                "SELECT checkpoint_id, cohort_id, num_scans, num_failed, shared_volumes, path FROM model.embedding_set "
                "WHERE checkpoint_id = :checkpoint AND cohort_id = :cohort AND num_failed = 0"
            ),
            {"checkpoint": checkpoint_id, "cohort": cohort_id},
        )
        .mappings()
        .first()
    )
    if row is None or not artifacts.is_kept(work.settings, row["path"]):
        return None
    return {key: value for key, value in row.items() if key != "path"}


def _load(work: Work, checkpoint: artifacts.Checkpoint) -> Trained:
    """The encoder on its device. Raises InputError for a file that is not one of ours."""
    import torch

    from ml.checkpoint import load_encoder
    from ml.data import threads_for
    from ml.embed import pick_device, place

    try:
        trained = load_encoder(artifacts.fetch(work.settings, checkpoint.path, checkpoint.sha256))
    except ValueError as error:
        raise InputError(f"Checkpoint {checkpoint.name!r} cannot be used: {error}") from None
    torch.set_num_threads(threads_for(trained.recipe))
    place(trained.encoder, pick_device())
    return trained


def _vectors(
    work: Work,
    trained: Trained,
    volumes: ScanVolumes,
    members: Members,
    kept: Mapping[str, NDArray[np.float32]],
    unfinished: Unfinished,
) -> Vectors:
    """Embed each distinct content once, spread it over its scans, standardise by the train mean and SD.

    Contents of `kept` have their standardised vectors from an earlier embedding by this checkpoint, those of
    `unfinished` their raw ones from an attempt that was stopped.
    """
    from ml.embed import standardise, statistics

    images = np.array(sorted(volumes.cached), np.int64)
    contents = [volumes.cached[image].content_sha256 for image in images.tolist()]
    first: dict[str, int] = {}
    for image, content in zip(images.tolist(), contents, strict=True):
        first.setdefault(content, image)
    new = {content: image for content, image in first.items() if content not in kept}
    raw, num_resumed = _embed_new(work, trained, volumes, new, unfinished)
    place = {content: position for position, content in enumerate(new)}
    if trained.mean is not None and trained.sd is not None:
        mean, sd = trained.mean.double().numpy(), trained.sd.double().numpy()
    else:  # a stop on the way keeps no statistics, and nothing of it is taken over
        train = np.isin(images, members.image[members.eligible & (members.split == TRAIN)])
        mean, sd = statistics(raw[[place[c] for c, is_train in zip(contents, train, strict=True) if is_train]]
                              if train.any() else raw)  # fmt: skip
    made = standardise(raw, mean, sd)
    del raw
    embedding = np.empty((len(images), made.shape[1]), np.float32)
    for row, content in enumerate(contents):
        embedding[row] = made[place[content]] if content in place else kept[content]
    return Vectors(
        images=images,
        embedding=embedding,
        mean=mean,
        sd=sd,
        num_new=len(new) - num_resumed,
        num_resumed=num_resumed,
    )


def _embed_new(
    work: Work, trained: Trained, volumes: ScanVolumes, new: Mapping[str, int], unfinished: Unfinished
) -> tuple[NDArray[np.float32], int]:
    """Raw vectors of contents in their order, and how many of them were there."""
    from ml.embed import embed as embed_volumes

    there = unfinished.read()
    content_of = {image: content for content, image in new.items()}
    known = {image: there[content] for image, content in content_of.items() if content in there}
    num_made = 0

    def keep(made: Sequence[int], raw_BD: NDArray[np.float32]) -> None:
        nonlocal num_made
        num_made += len(made)
        unfinished.add([content_of[image] for image in made], raw_BD)

    raw = embed_volumes(
        trained.encoder,
        trained.recipe,
        volumes.read,
        list(new.values()),
        lambda done, total: work.progress(done, total, "volume", "embedding"),
        known=known,
        keep=keep,
    )
    return raw, len(new) - num_made


def _kept(work: Work, checkpoint: artifacts.Checkpoint, trained: Trained) -> dict[str, NDArray[np.float32]]:
    """Content → vector of what this checkpoint has embedded for any cohort, where its files are intact."""
    from safetensors.numpy import load_file

    if trained.mean is None:
        return {}
    with work.connect() as connection:
        files = embeddings.embedded_files(connection, checkpoint.checkpoint_id)
    found: dict[str, NDArray[np.float32]] = {}
    for path, sha256 in files:
        try:
            tensors = load_file(artifacts.fetch(work.settings, path, sha256))
        except (StoreError, OSError):
            continue
        if "content" in tensors:
            digests = (bytes(row).hex() for row in tensors["content"])
            found = dict(zip(digests, tensors["embedding"], strict=True)) | found
    return found


def _shared(scans: list[Scan], volumes: ScanVolumes) -> int:
    from ml.embed import shared_volumes

    read = [scan for scan in scans if scan.image_occurrence_id in volumes.cached]
    contents = [volumes.cached[scan.image_occurrence_id].content_sha256 for scan in read]
    return shared_volumes(contents, np.array([scan.person_id for scan in read], np.int64))


def _write(file: Path, vectors: Vectors, volumes: ScanVolumes) -> Path:
    """The exact numbers for heads, as safetensors; beside them what is known of the voxels alone."""
    from safetensors.numpy import save_file

    cached = [volumes.cached[image] for image in vectors.images.tolist()]
    tensors = {
        "image_occurrence_id": vectors.images,
        "embedding": vectors.embedding,
        "content": np.array([list(bytes.fromhex(c.content_sha256)) for c in cached], np.uint8),
        "mean": vectors.mean,
        "sd": vectors.sd,
        "voxel_stats": np.array([(c.mean_hu, c.sd_hu) for c in cached], np.float32),
        "padding_share": np.array([c.padding_share for c in cached], np.float32),
        "z_coverage": np.array([c.z_coverage for c in cached], np.float32),
    }
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, file)
    return file


def store(connection: Connection, width: int, row: dict[str, Any], vectors: Vectors) -> Judged | None:
    """Vectors, index and the row of the set in the caller's transaction; how the index is searched, if there is one."""
    from sqlalchemy import text
    from sqlalchemy.dialects.postgresql import insert

    from app.schema.model import EmbeddingSet

    checkpoint = {"c": row["checkpoint_id"], "w": width}
    connection.execute(text("SELECT model.add_embedding_partition(:c, :w)"), checkpoint)
    embeddings.replace_embeddings(connection, row["checkpoint_id"], vectors.images, vectors.embedding)
    judged = embedding_index.index(connection, row["checkpoint_id"], vectors.images)
    statement = insert(EmbeddingSet).values(**row, recall=judged and judged.recall)
    newer: dict[str, Any] = {key: statement.excluded[key] for key in row if key not in KEY}
    newer |= {"recall": statement.excluded.recall, "created_at": text("clock_timestamp()")}
    connection.execute(statement.on_conflict_do_update(index_elements=list(KEY), set_=newer))
    return judged


def told_of_index(work: Work, judged: Judged | None) -> dict[str, Any]:
    """For a job's result: the index; it is logged where it finds too few of the nearest, and what to do."""
    if judged is not None and judged.recall < embedding_index.LEAST_RECALL:
        work.log(
            f"The index finds {judged.recall:.1%} of the nearest scans, fewer than {embedding_index.LEAST_RECALL:.0%}, "
            "even at its widest: search among fewer scans (a cohort, a split), which is exact."
        )
    return {
        "indexed": judged is not None,
        "recall": judged and judged.recall,
        "ef_search": judged and judged.ef_search,
    }
