"""Stage `embed`: a checkpoint and a cohort → standardised vectors, in Postgres for search and in a file for heads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from app.errors import InputError, StoreError
from app.store import artifacts, embedding_index, embeddings, named_files, names
from app.store.embedding_index import Judged
from app.store.incoming import ROWS, Place
from app.store.places import place as place_of
from app.store.work import Work
from workers.bridge import TRAIN, Members, Scan, read_members, read_scans
from workers.scan_volumes import ScanVolumes, permuted_images, prepare
from workers.stages.embed_earlier import find_earlier
from workers.stages.embed_incoming import Incoming, Order
from workers.stages.embed_located import Located, locate_published
from workers.stages.embed_unfinished import Unfinished

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from sqlalchemy import Connection

    from ml.checkpoint import Trained


KEY = ("checkpoint_id", "cohort_id")


@dataclass(frozen=True, kw_only=True, slots=True)
class Vectors:
    """Where the embeddings of contents are, and what standardises those that are raw."""

    known: Located
    """Standardised, of earlier embeddings."""
    raw: Located
    mean: NDArray[np.float64]
    sd: NDArray[np.float64]
    num_new: int
    """Distinct volumes that were embedded now."""
    num_resumed: int
    """Distinct volumes that an attempt which was stopped had embedded."""

    def take(self, contents: Sequence[str]) -> NDArray[np.float32]:
        """(B, D) standardised vectors."""
        from ml.embed import standardise

        made_BD = np.empty((len(contents), self.raw.width), np.float32)
        is_raw = np.array([content in self.raw for content in contents], np.bool_)
        raw = [content for content, one in zip(contents, is_raw, strict=True) if one]
        made_BD[is_raw] = standardise(self.raw.take(raw), self.mean, self.sd)
        made_BD[~is_raw] = self.known.take([c for c, one in zip(contents, is_raw, strict=True) if not one])
        return made_BD


def embed(work: Work) -> dict[str, Any]:
    """Embed the scans of `args["cohort"]` by `args["checkpoint"]`; a complete earlier embedding is left as it is.

    Volumes that the checkpoint embedded before, for this cohort or another, are not embedded again; scans whose content
    on record is another one than was embedded are.

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
        members = read_members(connection, cohort_id)
        earlier = find_earlier(connection, work, checkpoint, cohort_id, members)
        scans = read_scans(connection, work.settings, cohort_id)
    if earlier is not None and earlier.is_complete:
        work.log(f"unchanged: checkpoint {checkpoint.name} has embedded this cohort already")
        return {**earlier.result(), "name": checkpoint.name, "unchanged": True}
    if earlier is not None:
        work.log(
            f"embedded before: {earlier.num_missing:,} scans are missing, {earlier.num_stale:,} have changed since"
        )

    place_of(work.settings).require()
    trained = _load(work, checkpoint)
    volumes = prepare(work, trained.recipe, scans)
    own = {image: cached.content_sha256 for image, cached in volumes.cached.items()}
    if checkpoint.shuffled:
        volumes = volumes.permuted(permuted_images(members, checkpoint.seed))
    order = _order(volumes, own)
    # what is on record of a scan says nothing of its mask
    anew = checkpoint.shuffled or trained.mean is None or volumes.by_masks
    incoming = Incoming(work, Place(checkpoint.checkpoint_id, cohort_id), order, anew=anew)
    unfinished = Unfinished(work.folder, checkpoint.sha256, checkpoint.width)
    known = _known(work, checkpoint, trained, order)
    vectors = _vectors(work, trained, volumes, members, known, unfinished, incoming)
    result = _publish(work, volumes, vectors, incoming, _shared(scans, volumes))
    unfinished.remove()
    return {"name": checkpoint.name, **result, "unchanged": False, **volumes.failures()}


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


def _order(volumes: ScanVolumes, own: Mapping[int, str]) -> Order:
    images = sorted(volumes.cached)
    if not images:
        raise InputError("Expected scans that can be read, found none.")
    return Order(
        images=np.array(images, np.int64),
        embedded=[volumes.embedded(image) for image in images],
        own=[own.get(image, volumes.cached[image].content_sha256) for image in images],
    )


def _known(work: Work, checkpoint: artifacts.Checkpoint, trained: Trained, order: Order) -> Located:
    """What this checkpoint has embedded for any cohort, where its files are intact."""
    if trained.mean is None:  # a stop on the way keeps no statistics, and nothing of it is taken over
        return Located(checkpoint.width)
    with work.connect() as connection:
        files = embeddings.embedded_files(connection, checkpoint.checkpoint_id)

    def fetched() -> Iterator[Path]:
        for path, sha256 in files:
            try:
                yield artifacts.fetch(work.settings, path, sha256)
            except (StoreError, OSError):
                continue

    return locate_published(fetched(), order.first().keys(), checkpoint.width)


def _vectors(
    work: Work,
    trained: Trained,
    volumes: ScanVolumes,
    members: Members,
    known: Located,
    unfinished: Unfinished,
    incoming: Incoming,
) -> Vectors:
    """Embed each distinct content that is not known once; standardise by the train mean and SD.

    Where the checkpoint keeps these, vectors go on their way while others are made; else when all are made.
    """
    from ml.embed import embed_each, standardise, statistics_of

    new = {content: image for content, image in incoming.order.first().items() if content not in known}
    there = unfinished.locate(new)
    content_of = {image: content for content, image in new.items()}
    fixed = None if trained.mean is None or trained.sd is None else (_float64(trained.mean), _float64(trained.sd))
    incoming.begin(lambda content: fixed is not None and (content in there or content in known))
    num_made = 0

    def keep(made: Sequence[int], raw_BD: NDArray[np.float32]) -> None:
        nonlocal num_made
        num_made += len(made)
        contents = [content_of[image] for image in made]
        unfinished.add(contents, raw_BD)
        if fixed is not None:
            incoming.add(contents, standardise(raw_BD, *fixed))

    embed_each(
        trained.encoder,
        trained.recipe,
        volumes.read,
        list(new.values()),
        keep,
        lambda done, total: work.progress(done, total, "volume", "embedding"),
        known={new[content] for content in there},
    )
    incoming.flush()
    raw = unfinished.locate(new)
    mean, sd = fixed or statistics_of(lambda: _train_blocks(incoming.order, members, raw))
    return Vectors(known=known, raw=raw, mean=mean, sd=sd, num_new=num_made, num_resumed=len(new) - num_made)


def _float64(tensor: Any) -> NDArray[np.float64]:
    made: NDArray[np.float64] = tensor.double().numpy()
    return made


def _train_blocks(order: Order, members: Members, raw: Located) -> Iterator[NDArray[np.float32]]:
    """Raw vectors of eligible train scans; of all contents where there is no such scan."""
    train = np.isin(order.images, members.image[members.eligible & (members.split == TRAIN)])
    contents = [order.embedded[row] for row in np.flatnonzero(train)] or list(order.first())
    for start in range(0, len(contents), ROWS):
        yield raw.take(contents[start : start + ROWS])


def _shared(scans: list[Scan], volumes: ScanVolumes) -> int:
    from ml.embed import shared_volumes

    read = [scan for scan in scans if scan.image_occurrence_id in volumes.cached]
    contents = [volumes.cached[scan.image_occurrence_id].content_sha256 for scan in read]
    return shared_volumes(contents, np.array([scan.person_id for scan in read], np.int64))


def _write(work: Work, order: Order, volumes: ScanVolumes, vectors: Vectors) -> Path:
    """The exact numbers for heads, as safetensors; beside them what is known of the voxels alone."""
    from ml import tensor_file

    n, width = len(order.images), vectors.raw.width
    file = work.folder / "embedding.safetensors"
    arrays = tensor_file.create(
        file,
        {
            "image_occurrence_id": ("int64", (n,)),
            "embedding": ("float32", (n, width)),
            "content": ("uint8", (n, 32)),
            "mean": ("float64", (width,)),
            "sd": ("float64", (width,)),
            "voxel_stats": ("float32", (n, 2)),
            "padding_share": ("float32", (n,)),
            "z_coverage": ("float32", (n,)),
        },
    )
    arrays["image_occurrence_id"][:], arrays["mean"][:], arrays["sd"][:] = order.images, vectors.mean, vectors.sd
    for start in range(0, n, ROWS):
        work.progress(start, n, "scan", "writing the file of embeddings")
        rows = slice(start, min(start + ROWS, n))
        contents = order.embedded[rows]
        cached = [volumes.cached[image] for image in order.images[rows].tolist()]
        arrays["embedding"][rows] = vectors.take(contents)
        arrays["content"][rows] = np.frombuffer(bytes.fromhex("".join(contents)), np.uint8).reshape(-1, 32)
        arrays["voxel_stats"][rows] = [(one.mean_hu, one.sd_hu) for one in cached]
        arrays["padding_share"][rows] = [one.padding_share for one in cached]
        arrays["z_coverage"][rows] = [one.z_coverage for one in cached]
    del arrays
    return file


def _publish(work: Work, volumes: ScanVolumes, vectors: Vectors, incoming: Incoming, shared: int) -> dict[str, Any]:
    """The file, then all rows in one transaction; for the job's result."""
    order, place, width = incoming.order, incoming.place, vectors.raw.width
    with work.transaction() as connection:  # by itself, since others wait for it
        embeddings.add_partition(connection, place.checkpoint_id, width)
    incoming.fill(vectors.take)
    file = _write(work, order, volumes, vectors)
    path, sha256 = artifacts.publish(work.settings, file, "embeddings")
    row = {
        "checkpoint_id": place.checkpoint_id,
        "cohort_id": place.cohort_id,
        "path": path,
        "sha256": sha256,
        "mean": vectors.mean.tolist(),
        "sd": vectors.sd.tolist(),
        "num_scans": len(order.images),
        "num_failed": len(volumes.failed),
        "shared_volumes": shared,
        "job_id": work.job_id,
    }
    work.progress(0, None, "", "indexing embeddings")
    with work.transaction() as connection:
        written = incoming.publish(connection, vectors.take, width)
        judged = embedding_index.index(connection, place.checkpoint_id, order.images)
        named_files.hold(connection, work.settings, file, path, sha256)
        keep_set(connection, row, judged)
    file.unlink()
    return {
        **{key: row[key] for key in ("checkpoint_id", "cohort_id", "num_scans", "shared_volumes")},
        "distinct_volumes": len(order.first()),
        "width": width,
        "newly_embedded": vectors.num_new,
        "resumed": vectors.num_resumed,
        "written": written,
        **told_of_index(work, judged),
    }


def keep_set(connection: Connection, row: dict[str, Any], judged: Judged | None) -> None:
    """The row of the set, in place of an older one."""
    from sqlalchemy import text
    from sqlalchemy.dialects.postgresql import insert

    from app.schema.model import EmbeddingSet

    statement = insert(EmbeddingSet).values(**row, recall=judged and judged.recall)
    newer: dict[str, Any] = {key: statement.excluded[key] for key in row if key not in KEY}
    newer |= {"recall": statement.excluded.recall, "created_at": text("clock_timestamp()")}
    connection.execute(statement.on_conflict_do_update(index_elements=list(KEY), set_=newer))


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
