"""A store with a labelled cohort and two embeddings of it, written row by row: what `evaluate` and `report` read."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from sqlalchemy import Engine, insert

from app.schema import label, model, omop, ops
from app.settings import Settings
from app.store import artifacts

YEAR = 365.25 * 86_400
INDEX = dt.datetime(2015, 6, 1, 12)
SPLITS = ("train", "tuning", "held_out")


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """What was written, as arrays."""

    person: NDArray[np.int64]
    latent: NDArray[np.float64]
    """(N, 2) what the outcomes depend on; the embedding `seeing` shows it, `blind` does not."""
    split: NDArray[np.int64]
    time: NDArray[np.float64]
    """(N, 3) seconds; tasks heart and lung depend on the latents, rare almost never happens."""
    event: NDArray[np.bool_]


def draw(scans: int, seed: int, copies: int = 1) -> Judged:
    """Persons with `copies` equal scans each."""
    rng = np.random.default_rng(seed)
    persons = scans // copies
    person = np.repeat(np.arange(1, persons + 1), copies)
    latent = rng.normal(size=(persons, 2))
    split = rng.choice(3, persons, p=(0.6, 0.15, 0.25))
    rate = np.column_stack([0.10 * np.exp(latent[:, 0]), 0.10 * np.exp(latent[:, 1]), np.full(persons, 1e-4)])
    onset = rng.exponential(1 / rate) * YEAR
    end = rng.uniform(1, 8, persons)[:, None] * YEAR
    time = np.floor(np.minimum(onset, end))
    event = onset <= end
    row = person - 1
    return Judged(person=person, latent=latent[row], split=split[row], time=time[row], event=event[row])


def write(
    engine: Engine,
    settings: Settings,
    drawn: Judged,
    *,
    simulated: bool = False,
    arbitrary: bool = False,
    shared: int = 0,
) -> None:
    """The rows of source, persons, scans, cohort, tasks, labels, checkpoints and embeddings."""
    with engine.begin() as connection:

        def add(table: Any, rows: list[dict[str, Any]]) -> None:
            connection.execute(insert(table), rows)

        add(
            ops.Source,
            [
                {"name": "made", "simulated": simulated, "arbitrary_pairing": False},
                {"name": "scans", "simulated": False, "arbitrary_pairing": arbitrary},
            ],
        )
        load = {
            "kind": "omop",
            "mode": "snapshot",
            "state": "published",
            "files": [],
            "content_sha256": b"",
            "num_read": 0,
            "num_loaded": 0,
            "num_rejected": 0,
        }
        add(ops.Load, [{**load, "source_id": k, "table_name": name} for k, name in ((1, "person"), (2, "images"))])
        persons = np.unique(drawn.person).tolist()
        birth = dt.datetime(1950, 1, 1)
        add(
            omop.Person,
            [
                {
                    "person_id": p,
                    "birth_time": birth + dt.timedelta(days=137 * (p % 90)),
                    "gender_concept_id": 8507 + 25 * (p % 2),
                    "load_id": 1,
                }
                for p in persons
            ],
        )
        scans = range(1, len(drawn.person) + 1)
        add(
            omop.ImageOccurrence,
            [
                {
                    "person_id": int(p),
                    "acquired_at": INDEX,
                    "date_only": False,
                    "acquired_at_source": "manifest",
                    "image_key": f"k{n}",
                    "root": "images",
                    "path": f"{n}.nii",
                    "format": "nifti",
                    "verdict": "ok",
                    "reasons": [],
                    "load_id": 2,
                }
                for n, p in zip(scans, drawn.person, strict=True)
            ],
        )
        add(
            label.Cohort,
            [
                {
                    "name": "c",
                    "version": 1,
                    "is_current": True,
                    "definition": {},
                    "follow_up": "data_cut",
                    "attrition": [{"step": "scans loaded", "scans": len(scans), "persons": len(persons)}],
                    "digest": b"",
                }
            ],
        )
        add(
            label.CohortMember,
            [
                {
                    "cohort_id": 1,
                    "person_id": int(p),
                    "image_occurrence_id": n,
                    "index_time": INDEX,
                    "index_date_only": False,
                    "split": SPLITS[s],
                    "eligible": True,
                }
                for n, p, s in zip(scans, drawn.person, drawn.split, strict=True)
            ],
        )
        add(
            label.TaskSet,
            [{"name": "t", "version": 1, "is_current": True, "kind": "clinical", "definition": {}, "digest": b""}],
        )
        add(
            label.Task,
            [
                {
                    "task_set_id": 1,
                    "position": k,
                    "name": name,
                    "title": name.title(),
                    "start_seconds": 0,
                    "occurrence": "first",
                    "prior": "exclude",
                    "death": "censor",
                    "follow_up": "cohort",
                    "horizons_days": [365, 1095],
                    "definition": {},
                }
                for k, name in enumerate(("heart", "lung", "rare"))
            ],
        )
        add(
            label.LabelSet,
            [
                {
                    "name": "outcomes",
                    "version": 1,
                    "is_current": True,
                    "cohort_id": 1,
                    "task_set_id": 1,
                    "digest": b"",
                    "data_digest": b"",
                    "num_members": len(scans),
                    "num_events": int(drawn.event.sum()),
                }
            ],
        )
        add(label.Tte, [tte(n, drawn) for n in scans])
        add(ops.Job, [{"kind": "pretrain", "queue": "gpu"}])
        curve = {"train_loss": 1.0, "tuning_loss": 0.9, "tuning_gain": 0.1}
        add(
            ops.TrainingStep,
            [
                {"job_id": 1, "step": step, "name": name, "epoch": 0, "value": at + step / 100}
                for name, at in curve.items()
                for step in range(1, 11)
            ],
        )
        for name, arm, job in (("seeing", "tte", 1), ("blind", "untrained", None)):
            add_embedding(connection, settings, drawn, name, arm, shared, job)


def tte(member: int, drawn: Judged) -> dict[str, Any]:
    """Labels of one member."""
    row = member - 1
    events = np.flatnonzero(drawn.event[row])
    return {
        "label_set_id": 1,
        "cohort_member_id": member,
        "event_tasks": events.tolist(),
        "event_seconds": drawn.time[row, events].astype(int).tolist(),
        "prior_tasks": [],
        "ineligible_tasks": [],
        "window_tasks": [],
        "window_seconds": [],
        "visit_tasks": [],
        "follow_up_seconds": int(drawn.time[row].max()),
    }


def add_embedding(
    connection: Any, settings: Settings, drawn: Judged, name: str, arm: str, shared: int, job: int | None
) -> None:
    """A checkpoint and its embedding of the cohort."""
    rng = np.random.default_rng(len(name))
    noise = rng.normal(size=(int(drawn.person.max()), 8))[drawn.person - 1]
    vectors = np.hstack([drawn.latent, noise]) if arm == "tte" else np.hstack([noise, noise[:, :2]])
    checkpoint = artifacts.add_checkpoint(
        connection,
        {
            "name": name,
            "sha256": name.encode().hex().ljust(64, "0"),
            "arm": arm,
            "encoder": "tiny",
            "width": 10,
            "recipe": {},
            "seed": 0,
            "step": 10,
            "num_steps": 10,
            "is_final": True,
            "path": "x",
            "num_bytes": 1,
            "code_version": "0.1.0",
            "job_id": job,
        },
    )
    file = Path(str(settings.home)) / f"{name}.safetensors"
    count = len(drawn.person)
    save_file(
        {
            "image_occurrence_id": np.arange(1, count + 1, dtype=np.int64),
            "embedding": np.ascontiguousarray(vectors, np.float32),
            "mean": np.zeros(10),
            "sd": np.ones(10),
            "voxel_stats": rng.normal(size=(int(drawn.person.max()), 2)).astype(np.float32)[drawn.person - 1],
            "padding_share": np.zeros(count, np.float32),
            "z_coverage": np.ones(count, np.float32),
        },
        str(file),
    )
    path, sha256 = artifacts.publish(settings, file, "embeddings")
    connection.execute(
        insert(model.EmbeddingSet),
        [
            {
                "checkpoint_id": checkpoint,
                "cohort_id": 1,
                "path": path,
                "sha256": sha256,
                "mean": [0.0] * 10,
                "sd": [1.0] * 10,
                "num_scans": count,
                "num_failed": 0,
                "shared_volumes": shared,
            }
        ],
    )


def write_truth(path: Path, drawn: Judged) -> Path:
    """The file of true log hazards, as a simulation writes it."""
    lines = ["person_id,task,log_hazard,log_hazard_image"]
    for person, latent in zip(drawn.person.tolist(), drawn.latent, strict=True):
        for task, value in zip(("heart", "lung"), latent, strict=True):
            lines.append(f"{person},{task},{value:.6f},{value:.6f}")
    path.write_text("\n".join(lines) + "\n")
    return path
