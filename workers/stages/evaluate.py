"""Stage `evaluate`: embeddings and labels → heads, held-out predictions and metrics, in one transaction."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from app.errors import InputError
from app.store import artifacts, embeddings, evaluations, stale
from app.store.work import Work
from ml.evaluate import HELD_OUT, Evaluation, People, Predicted, Question, Result
from ml.labelling import LabelArrays, task_outcomes
from workers.bridge import LabelSetInfo, Members, find_label_set, read_labels, read_members

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from sqlalchemy import Connection

TRUTH_COLUMNS = {"truth": "log_hazard", "truth-image": "log_hazard_image"}
"""Inputs of the optimum → its column in the file of true log hazards."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Embedded:
    """A checkpoint's float32 embedding of the cohort."""

    checkpoint: artifacts.Checkpoint
    image: NDArray[np.int64]
    """(N,) image_occurrence_id, ascending."""
    embedding: NDArray[np.float32]
    voxels: NDArray[np.float32] | None
    """(N, 2) mean and SD of the voxels; None where the vectors were made elsewhere."""
    shared_volumes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Gathered:
    """All that one evaluation reads."""

    info: LabelSetInfo
    labels: LabelArrays
    members: Members
    arms: dict[str, Embedded]
    """Arm or reference → its embedding; the first is judged."""
    flags: list[str] = field(default_factory=list)


def evaluate(work: Work) -> dict[str, Any]:
    """Judge `args["checkpoint"]` by `args["labels"]`, paired with `args["against"]` where that is given.

    Raises:
        InputError: unknown names, no embeddings, no held-out scan, or true hazards that lack a person.
    """
    from ml.evaluate import evaluate as judge

    args = work.args
    names = {"arm": str(args["checkpoint"])}
    if args.get("against"):
        names["reference"] = str(args["against"])
    with work.connect() as connection:
        gathered = gather(connection, work, str(args["labels"]), names)
    people, rows = people_of(gathered)
    positions = choose(gathered, args.get("top"))
    truth = read_truth(Path(args["truth"])) if args.get("truth") else {}
    questions = [question(gathered, rows, position, truth) for position in positions]
    work.log(f"judging {len(questions)} tasks on {int((people.split == HELD_OUT).sum())} held-out scans")
    try:
        evaluation = judge(
            people,
            questions,
            replicates=int(args.get("replicates") or 1000),
            seed=int(args.get("seed") or 0),
            arm="arm",
            reference="reference" if "reference" in names else None,
            report=lambda done, total: work.progress(done, total, "tasks", "judging"),
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    return store(work, gathered, evaluation, rows)


def gather(connection: Connection, work: Work, labels: str, names: Mapping[str, str]) -> Gathered:
    """Read labels, members and embeddings. Raises InputError for what is missing."""
    info = find_label_set(connection, labels)
    stale.warn(work, connection, info.label_set_id)
    arms = {arm: read_embedding(connection, work, name, info.cohort_id) for arm, name in names.items()}
    checkpoints = [e.checkpoint.checkpoint_id for e in arms.values()]
    if len(set(checkpoints)) < len(checkpoints):
        raise InputError(
            f"Expected two checkpoints to compare, got {names['arm']!r} twice; name another with --against."
        )
    flags = evaluations.caveats(connection, info.cohort_id)
    if any(e.shared_volumes for e in arms.values()) and "shared_volumes" not in flags:
        flags.append("shared_volumes")
    if any(e.checkpoint.shuffled for e in arms.values()):
        flags.append("shuffled")
    return Gathered(
        info=info,
        labels=read_labels(connection, info),
        members=read_members(connection, info.cohort_id),
        arms=arms,
        flags=flags,
    )


def read_embedding(connection: Connection, work: Work, name: str, cohort_id: int) -> Embedded:
    """The embedding of a cohort by a checkpoint, its file checked."""
    from safetensors.numpy import load_file

    checkpoint = artifacts.find_checkpoint(connection, name)
    row = embeddings.embedding_set(connection, checkpoint, cohort_id)
    arrays = load_file(artifacts.fetch(work.settings, row["path"], row["sha256"]))
    return Embedded(
        checkpoint=checkpoint,
        image=arrays["image_occurrence_id"],
        embedding=arrays["embedding"],
        voxels=arrays.get("voxel_stats"),
        shared_volumes=int(row["shared_volumes"]),
    )


def people_of(gathered: Gathered) -> tuple[People, NDArray[np.int64]]:
    """The members with an embedding in every arm, and their rows among all members."""
    members = gathered.members
    kept = np.ones(len(members.member), np.bool_)
    for arm in gathered.arms.values():
        kept &= np.isin(members.image, arm.image)
    rows = np.flatnonzero(kept)
    image = members.image[rows]
    first = next(iter(gathered.arms.values()))
    people = People(
        person=members.person[rows],
        split=members.split[rows],
        index_seconds=members.index_seconds[rows],
        covariates=np.column_stack([members.age_years, members.female])[rows],
        images={
            name: arm.embedding[np.searchsorted(arm.image, image)].astype(np.float64)
            for name, arm in gathered.arms.items()
        },
        voxels=None if first.voxels is None else first.voxels[np.searchsorted(first.image, image)].astype(np.float64),
    )
    return people, rows


def choose(gathered: Gathered, top: int | None) -> list[int]:
    """Positions of the tasks to judge: all, or the `top` with most held-out events (ties by position)."""
    tasks = len(gathered.info.task_names)
    if top is None:
        return list(range(tasks))
    events = gathered.labels.events
    member = np.repeat(np.arange(len(gathered.labels.member)), np.diff(events.ptr))
    held_out = gathered.members.split[member] == HELD_OUT
    count = np.bincount(events.task[held_out], minlength=tasks)
    return sorted(np.argsort(-count, kind="stable")[: int(top)].tolist())


def question(gathered: Gathered, rows: NDArray[np.int64], position: int, truth: Mapping[str, Truth]) -> Question:
    """One task at the rows judged. Raises InputError where a person's true hazard is missing."""
    name = gathered.info.task_names[position]
    outcomes = task_outcomes(gathered.labels, position)
    return Question(
        name=name,
        horizons_days=gathered.info.horizons_days[position],
        status=outcomes.status[rows],
        time_days=outcomes.time_days[rows],
        truth=truth_of(truth[name], gathered.members.person[rows]) if name in truth else {},
    )


@dataclass(frozen=True, slots=True)
class Truth:
    """True log hazards of one task: inputs → person → value."""

    by_inputs: dict[str, dict[int, float]]


def read_truth(path: Path) -> dict[str, Truth]:
    """Task → true log hazards, from a CSV with columns person_id, task, log_hazard and maybe log_hazard_image.

    Raises:
        InputError: no such file, other columns, or a cell that is no number.
    """
    if not path.is_file():
        raise InputError(f"Expected a file of true log hazards at {path}, found none; give --truth a file that exists.")
    found: dict[str, Truth] = {}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        if not {"person_id", "task", "log_hazard"} <= set(columns):
            raise InputError(f"Expected columns person_id, task, log_hazard in {path.name}, got {', '.join(columns)}.")
        given = {inputs: column for inputs, column in TRUTH_COLUMNS.items() if column in columns}
        for record, row in enumerate(reader, 1):
            truth = found.setdefault(row["task"], Truth({inputs: {} for inputs in given}))
            try:
                for inputs, column in given.items():
                    truth.by_inputs[inputs][int(row["person_id"])] = float(row[column])
            except (TypeError, ValueError):
                raise InputError(
                    f"Expected numbers in record {record} of {path.name}, got something else; write the file again."
                ) from None
    return found


def truth_of(truth: Truth, person: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
    """(N,) true log hazards by inputs, in the order of the scans."""
    arrays = {}
    for inputs, by_person in truth.by_inputs.items():
        values = np.array([by_person.get(int(p), np.nan) for p in person])
        if np.isnan(values).any():
            raise InputError(
                f"Expected a true log hazard of each of {len(person)} scans, {int(np.isnan(values).sum())} have none; "
                "give the file that was simulated with this extract."
            )
        arrays[inputs] = values
    return arrays


def store(work: Work, gathered: Gathered, evaluation: Evaluation, rows: NDArray[np.int64]) -> dict[str, Any]:
    """Write all rows in one transaction; ids and counts."""
    metrics = [metric_row(work, gathered, evaluation, result) for result in evaluation.results]
    predicted = {(_checkpoint_id(gathered, p.arm), p.head, p.inputs) for p in evaluation.predictions}
    with work.transaction() as connection:
        evaluations.replace_evaluation(
            connection,
            gathered.info.label_set_id,
            metrics,
            prediction_rows(work, gathered, evaluation.predictions, rows),
            predicted | {(row["checkpoint_id"], row["head"], row["inputs"]) for row in metrics},
        )
    judged = {result.task for result in evaluation.results if result.task is not None}
    return {
        "label_set_id": gathered.info.label_set_id,
        "checkpoint_id": gathered.arms["arm"].checkpoint.checkpoint_id,
        "tasks": len(judged),
        "estimable": evaluation.num_estimable,
        "metrics": len(metrics),
        "predictions": sum(len(p.rows) for p in evaluation.predictions),
        "mean_harrell_c": headline(evaluation.results, None),
        "mean_harrell_c_difference": headline(evaluation.results, "reference"),
        "flags": gathered.flags,
    }


def headline(results: Sequence[Result], reference: str | None) -> list[float] | None:
    """Mean Harrell's C of the image-only Cox head, or its paired difference: [value, low, high]."""
    for r in results:
        same = (r.key.metric, r.key.arm, r.key.head, r.key.inputs, r.key.subgroup)
        wanted = same == ("mean_harrell_c", "arm", "cox", "image", None) and r.reference_arm == reference
        if wanted and r.value is not None and r.low is not None and r.high is not None:
            return [r.value, r.low, r.high]
    return None


def _checkpoint_id(gathered: Gathered, arm: str | None) -> int | None:
    return None if arm is None else gathered.arms[arm].checkpoint.checkpoint_id


def metric_row(work: Work, gathered: Gathered, evaluation: Evaluation, result: Result) -> dict[str, Any]:
    """A result as columns of model.metric."""
    arm = gathered.arms[result.key.arm].checkpoint if result.key.arm else None
    return {
        "checkpoint_id": arm and arm.checkpoint_id,
        "reference_checkpoint_id": _checkpoint_id(gathered, result.reference_arm),
        "label_set_id": gathered.info.label_set_id,
        "head": result.key.head,
        "inputs": result.key.inputs,
        "reference_inputs": result.reference_inputs,
        "task": result.task,
        "metric": result.key.metric,
        "horizon_days": result.key.horizon_days,
        "split": "held_out",
        "subgroup": result.key.subgroup,
        "arm": arm and arm.arm,
        "value": result.value,
        "ci_low": result.low,
        "ci_high": result.high,
        "n": result.n,
        "num_persons": result.num_persons,
        "num_events": result.num_events,
        "replicates": evaluation.replicates,
        "unit": "person",
        "shared_volumes": max(e.shared_volumes for e in gathered.arms.values()),
        "flags": [*gathered.flags, *result.flags],
        "reason": result.reason,
        "seed": arm and arm.seed,
        "job_id": work.job_id,
    }


def prediction_rows(
    work: Work, gathered: Gathered, predictions: Sequence[Predicted], rows: NDArray[np.int64]
) -> Iterator[tuple[Any, ...]]:
    """Predictions as rows for COPY."""
    position = {name: place for place, name in enumerate(gathered.info.task_names)}
    for p in predictions:
        arm = gathered.arms[p.arm].checkpoint if p.arm else None
        members = gathered.members.member[rows[p.rows]]
        for member, value in zip(members.tolist(), p.value.tolist(), strict=True):
            yield (
                arm and arm.checkpoint_id, p.head, p.inputs, gathered.info.label_set_id, position[p.task], member,
                "held_out", p.horizon_days, p.kind, value, arm and arm.seed, work.job_id,
            )  # fmt: skip
