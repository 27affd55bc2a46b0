"""The earlier embedding of a cohort by a checkpoint: whether it still is what embedding the cohort now would give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from app.errors import StoreError
from app.store import artifacts
from app.store.work import Work
from workers.scan_volumes import permuted_images

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from workers.bridge import Members


@dataclass(frozen=True, kw_only=True, slots=True)
class Earlier:
    """What was embedded before."""

    row: dict[str, Any]
    """Of model.embedding_set."""
    num_missing: int
    """Members it lacks."""
    num_stale: int
    """Members whose content has changed since, or is not known any more."""

    @property
    def is_complete(self) -> bool:
        return not (self.row["num_failed"] or self.num_missing or self.num_stale)

    def result(self) -> dict[str, Any]:
        """What the job that made it said of it."""
        return {key: self.row[key] for key in ("checkpoint_id", "cohort_id", "num_scans", "num_failed")} | {
            "shared_volumes": self.row["shared_volumes"]
        }


_ROW = """
SELECT checkpoint_id, cohort_id, num_scans, num_failed, shared_volumes, path, sha256 FROM model.embedding_set
WHERE checkpoint_id = :checkpoint AND cohort_id = :cohort
"""
_CONTENTS = """
SELECT m.image_occurrence_id, encode(i.sha256, 'hex') AS content
FROM label.cohort_member m LEFT JOIN omop.image_occurrence i USING (image_occurrence_id) WHERE m.cohort_id = :cohort
"""


def find_earlier(
    connection: Connection, work: Work, checkpoint: artifacts.Checkpoint, cohort_id: int, members: Members
) -> Earlier | None:
    """The earlier embedding, where its file is there and intact, compared with the digests of contents on record."""
    from sqlalchemy import text

    from ml import tensor_file

    values = {"checkpoint": checkpoint.checkpoint_id, "cohort": cohort_id}
    row = connection.execute(text(_ROW), values).mappings().first()
    if row is None:
        return None
    try:
        arrays = tensor_file.read(artifacts.fetch(work.settings, row["path"], row["sha256"]))
        images, contents = arrays["image_occurrence_id"].tolist(), arrays["content"]
    except (StoreError, OSError, KeyError, ValueError):
        return None
    embedded = {image: bytes(content).hex() for image, content in zip(images, contents, strict=True)}
    recorded: dict[int, str | None] = dict(connection.execute(text(_CONTENTS), values).tuples().all())
    source = permuted_images(members, checkpoint.seed) if checkpoint.shuffled else {}
    wanted = {image: recorded.get(source.get(image, image)) for image in recorded}
    return Earlier(
        row=dict(row),
        num_missing=len(wanted.keys() - embedded.keys()),
        num_stale=sum(image in embedded and embedded[image] != content for image, content in wanted.items()),
    )
