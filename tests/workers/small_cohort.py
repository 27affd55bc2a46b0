"""A cohort made by hand, rows and NIfTI files: a ball in the chest whose size sets the hazard of two tasks."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from sqlalchemy import Connection, insert

from app.schema import label, omop, ops

DAY = 86_400
SIDE = 16
SMALL = {"shape_zyx": "16,16,16", "epochs": "3", "batch": "4", "rank": "8"}
"""Recipe settings that make the encoder tiny smaller still."""
INDEX = dt.datetime(2020, 1, 1, 12)


@dataclass(frozen=True)
class SmallCohort:
    folder: Path
    cohort_id: int
    label_set_id: int
    images: list[int]
    size: np.ndarray
    split: list[str]


def write_volume(path: Path, size: float, seed: int) -> None:
    """A noisy ball of soft tissue in lung, 9 mm a voxel."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, SIDE)] * 3, indexing="ij"))
    radius = np.sqrt((grid**2).sum(0))
    voxels = np.where(radius < 0.95, -800.0, -1000.0) + rng.normal(0, 20, radius.shape)
    voxels[radius < 0.3 + 0.35 * size] = 40
    nibabel.save(nibabel.Nifti1Image(np.rint(voxels).astype(np.int16), np.diag([9.0, 9.0, 9.0, 1.0])), path)


def insert_cohort(connection: Connection, folder: Path, persons: int = 60, *, seed: int = 0) -> SmallCohort:
    """Rows from ops.source to label.tte; person i has scan i; the last two persons share one file."""
    rng = np.random.default_rng(seed)
    size = rng.uniform(0, 1, persons)
    folder.mkdir(parents=True, exist_ok=True)
    files = [f"{min(i, persons - 2)}.nii" for i in range(persons)]
    for i in range(persons - 1):
        write_volume(folder / files[i], size[i], i)
    size[-1] = size[-2]
    load_id = _source(connection, folder)
    images = _scans(connection, load_id, files)
    split = ["train" if i % 10 < 7 else "tuning" if i % 10 == 7 else "held_out" for i in range(persons)]
    cohort_id, members = _cohort(connection, images, split)
    label_set_id = _labels(connection, cohort_id, members, size, rng)
    return SmallCohort(folder, cohort_id, label_set_id, images, size, split)


def _source(connection: Connection, folder: Path) -> int:
    source = connection.execute(
        insert(ops.Source)
        .values(name="images", details={"roots": {"images": str(folder)}})
        .returning(ops.Source.source_id)
    ).scalar_one()
    values = {"source_id": source, "kind": "images", "mode": "snapshot", "table_name": "image_occurrence"}
    counts = {"num_read": 0, "num_loaded": 0, "num_rejected": 0, "state": "published"}
    statement = insert(ops.Load).values(**values, **counts, files=[], content_sha256=b"").returning(ops.Load.load_id)
    return connection.execute(statement).scalar_one()


def _scans(connection: Connection, load_id: int, files: list[str]) -> list[int]:
    connection.execute(
        insert(omop.Person),
        [{"person_id": i + 1, "birth_time": dt.datetime(1950, 1, 1), "load_id": load_id} for i in range(len(files))],
    )
    rows = [
        {
            "person_id": i + 1,
            "acquired_at": INDEX,
            "date_only": False,
            "acquired_at_source": "manifest",
            "image_key": f"images/{file}",
            "root": "images",
            "path": file,
            "format": "nifti",
            "verdict": "ok",
            "load_id": load_id,
        }
        for i, file in enumerate(files)
    ]
    statement = insert(omop.ImageOccurrence).returning(omop.ImageOccurrence.image_occurrence_id)
    return [connection.execute(statement.values(**row)).scalar_one() for row in rows]


def _cohort(connection: Connection, images: list[int], split: list[str]) -> tuple[int, list[int]]:
    values = {"name": "chest", "version": 1, "is_current": True, "definition": {}, "attrition": []}
    statement = insert(label.Cohort).values(**values, follow_up="observation_period", digest=b"c")
    cohort_id = connection.execute(statement.returning(label.Cohort.cohort_id)).scalar_one()
    members = []
    for i, image in enumerate(images):
        row = {
            "cohort_id": cohort_id,
            "person_id": i + 1,
            "image_occurrence_id": image,
            "index_time": INDEX,
            "index_date_only": False,
            "follow_up_end": INDEX + dt.timedelta(days=2000),
            "split": split[i],
            "eligible": i != 0,
        }
        statement = insert(label.CohortMember).values(**row).returning(label.CohortMember.cohort_member_id)
        members.append(connection.execute(statement).scalar_one())
    return cohort_id, members


def _labels(
    connection: Connection, cohort_id: int, members: list[int], size: np.ndarray, rng: np.random.Generator
) -> int:
    values = {"name": "tasks", "version": 1, "is_current": True, "kind": "clinical", "definition": {}, "digest": b"t"}
    statement = insert(label.TaskSet).values(**values).returning(label.TaskSet.task_set_id)
    task_set_id = connection.execute(statement).scalar_one()
    rule = {"start_seconds": 0, "occurrence": "first", "prior": "exclude", "death": "censor", "follow_up": "cohort"}
    for position, name in enumerate(("a", "b")):
        row = {"task_set_id": task_set_id, "position": position, "name": name, "horizons_days": [365, 1095]}
        connection.execute(insert(label.Task).values(**row, **rule, definition={}))
    values = {"name": "outcomes", "version": 1, "is_current": True, "cohort_id": cohort_id, "digest": b"l"}
    counts = {"task_set_id": task_set_id, "num_members": len(members), "num_events": 0, "data_digest": b"d"}
    statement = insert(label.LabelSet).values(**values, **counts).returning(label.LabelSet.label_set_id)
    label_set_id = connection.execute(statement).scalar_one()
    for i, member in enumerate(members):
        end = 2000 * DAY
        times = [int(rng.exponential(DAY * 3000 / np.exp(3 * (size[i] - 0.5)))) + 1 for _ in range(2)]
        events = [k for k in range(2) if times[k] <= end]
        row = {
            "label_set_id": label_set_id,
            "cohort_member_id": member,
            "event_tasks": events,
            "event_seconds": [times[k] for k in events],
            "prior_tasks": [],
            "ineligible_tasks": [],
            "window_tasks": [],
            "window_seconds": [],
            "visit_tasks": [k for k in range(2) if size[i] > 0.5],
            "follow_up_seconds": end,
        }
        connection.execute(insert(label.Tte).values(**row))
    return label_set_id
