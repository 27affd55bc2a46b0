"""Stage `pretrain`: labels and volumes → an encoder, kept as checkpoints, the last of which is final."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from app.errors import InputError, Preempted, StoreError, UnknownName
from app.store import artifacts, stale
from app.store.names import check_name
from app.store.work import Work
from ml.config import Recipe, from_dict, read_recipe
from ml.labelling import LabelArrays
from ml.weight_names import PICKLES
from workers.bridge import (
    TRAIN,
    TUNING,
    LabelSetInfo,
    Members,
    Scan,
    find_label_set,
    read_labels,
    read_members,
    read_scans,
)
from workers.holder import device
from workers.ranks import check_devices, ranks
from workers.scan_volumes import ScanVolumes, permuted_images, prepare

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from sqlalchemy import Connection

    from ml.parallel import World
    from ml.pretrain import Result
    from ml.targets import BinaryTargets
    from ml.training import Data
    from ml.tte_targets import TteTargets

ARMS = ("base", "mtl", "visit", "tte")
KEEP = 3
"""Stops on the way that stay."""
FLUSH_POINTS = 12
"""Numbers of the loss curves written at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Everything that decides what a training makes, and the rows it reads."""

    name: str
    arm: str
    recipe: Recipe
    seed: int
    shuffled: bool
    weights: Path | None
    loaded: dict[str, Any] | None
    """What of the weights is loaded and what is not, by names."""
    parent_id: int | None
    info: LabelSetInfo
    labels: LabelArrays
    members: Members
    scans: list[Scan]
    facts: dict[str, Any]
    """Names and digests of the inputs; equal facts make equal weights."""
    continues: Continued | None = None
    """The training that this one carries on."""
    gpus: int = 1
    """Devices that share the work; they do not decide what is made."""

    @property
    def identity(self) -> str:
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()


def pretrain(work: Work) -> dict[str, Any]:
    """Train `args["arm"]`, or keep the start weights (`base`); an identical finished training is left as it is.

    Args of the job: arm, encoder, labels, name, seed, set (recipe settings as text), shuffle_volumes; or continue (a
    finished training), epochs (how many more) and name.

    Raises:
        InputError: a setting, name or input that cannot be used.
    """
    plan = _plan(work)
    with work.connect() as connection:
        finished = _finished(connection, plan)
    if finished is not None:
        work.log(f"unchanged: checkpoint {plan.name} was made from the same labels, recipe and seed")
        return {**finished, "unchanged": True}

    seen = np.isin(plan.members.split, (TRAIN, TUNING))
    rows = np.flatnonzero(plan.members.eligible & seen)
    wanted = set(plan.members.image[seen if plan.shuffled else rows].tolist())
    volumes = prepare(work, plan.recipe, [s for s in plan.scans if s.image_occurrence_id in wanted])
    data = _data(plan, rows, volumes)
    described = _describe(plan, data, volumes)
    result = _train(work, plan, data, described)
    if result.file is None:  # never of a finished training
        raise Preempted
    steps = (result.step, result.num_steps)
    made = _publish(work, plan, described, result.file, steps=steps, validation=result.validation)
    return {
        "checkpoint_id": made.checkpoint_id,
        "name": plan.name,
        "arm": plan.arm,
        "steps": result.step,
        "num_train": len(data.train),
        "num_tuning": len(data.tuning),
        "num_tasks": described["num_tasks"],
        "validation": {k: v for k, v in result.validation.items() if k != "epochs"},
        "unchanged": False,
        **volumes.failures(),
    }


def _plan(work: Work) -> Plan:
    """Read and check everything that decides what will be made; nothing is written."""
    with work.connect() as connection:
        args, continues = _asked(connection, work)
        arm, name = str(args["arm"]), check_name("checkpoint", args["name"])
        if arm not in ARMS:
            raise UnknownName("arm", arm, ARMS)
        seed, shuffled = int(args.get("seed") or 0), bool(args.get("shuffle_volumes"))
        recipe = _recipe(args)
        info = find_label_set(connection, str(args["labels"]))
        stale.warn(work, connection, info.label_set_id)
        labels, members = read_labels(connection, info), read_members(connection, info.cohort_id)
        scans = read_scans(connection, work.settings, info.cohort_id)
        weights, parent_id = _weights(connection, work, recipe.weights)
    recipe, loaded = _fit(work, recipe, weights)
    if not np.array_equal(labels.member, members.member):
        raise InputError(
            f"Expected labels for each member of the cohort {info.cohort!r}, found other members in {info.name!r}; "
            f"run `lachesis label {info.name} --cohort {info.cohort} --tasks {info.task_set}` again."
        )
    stored_arm = "untrained" if arm == "base" and weights is None else arm
    facts = {
        "settings": recipe.to_dict(),
        "arm": stored_arm,
        "seed": seed,
        "shuffled": shuffled,
        "label_set": f"{info.name}@{info.version}",
        "label_digest": info.digest,
        "images_digest": hashlib.sha256(members.image.tobytes() + members.split.tobytes()).hexdigest(),
        "weights_sha256": artifacts.file_digest(weights) if weights else None,
    }
    if continues is not None:
        continues.check(facts)
        facts["continues"] = continues.parent.sha256
    return Plan(
        name=name,
        arm=stored_arm,
        recipe=recipe,
        seed=seed,
        shuffled=shuffled,
        weights=weights,
        loaded=loaded,
        parent_id=parent_id if continues is None else continues.parent.checkpoint_id,
        info=info,
        labels=labels,
        members=members,
        scans=scans,
        facts=facts,
        continues=continues,
        gpus=int(args.get("gpus") or 1),
    )


def _recipe(args: Mapping[str, Any]) -> Recipe:
    try:
        if "settings" in args:
            return from_dict(args["settings"])
        return read_recipe(str(args["encoder"]), args.get("set") or {})
    except ValueError as error:
        raise InputError(str(error)) from None


@dataclass(frozen=True, slots=True)
class Continued:
    """A finished training that goes on."""

    parent: artifacts.Checkpoint
    stop: Path
    """Its state at its end."""

    def check(self, facts: Mapping[str, Any]) -> None:
        """Raise InputError where its labels or scans are no longer those it learnt from."""
        for key, words in (("label_digest", "labels"), ("images_digest", "scans or splits")):
            if facts[key] != self.parent.recipe.get(key):
                raise InputError(
                    f"Expected the {words} that {self.parent.name!r} learnt from, found others; start a training from "
                    f"its weights instead: `--set weights={self.parent.name}`."
                )


_END = "SELECT path, sha256 FROM model.checkpoint WHERE job_id = :job AND NOT is_final ORDER BY step DESC LIMIT 1"


def _asked(connection: Connection, work: Work) -> tuple[dict[str, Any], Continued | None]:
    """The arguments of the job; of one that continues a training, those of that training, with more epochs."""
    from sqlalchemy import text

    args = dict(work.args)
    if not args.get("continue"):
        return args, None
    parent = artifacts.find_checkpoint(connection, str(args["continue"]))
    job = "SELECT job_id FROM model.checkpoint WHERE checkpoint_id = :id AND is_final"
    job_id = connection.execute(text(job), {"id": parent.checkpoint_id}).scalar()
    end = connection.execute(text(_END), {"job": job_id}).first()
    if end is None:
        raise InputError(
            f"Expected a finished training whose last state was kept, found none of {parent.name!r}; "
            f"`--set weights={parent.name}` starts another from its weights."
        )
    settings = parent.recipe["settings"]
    asked = {
        "gpus": args.get("gpus"),
        "arm": parent.arm,
        "labels": parent.recipe["label_set"],
        "name": args.get("name") or parent.name,
        "seed": parent.seed,
        "shuffle_volumes": parent.shuffled,
        "settings": settings | {"epochs": settings["epochs"] + int(args["epochs"])},
    }
    return asked, Continued(parent, artifacts.fetch(work.settings, end.path, end.sha256))


def _weights(connection: Any, work: Work, given: str) -> tuple[Path | None, int | None]:
    """The file that `weights` names, and the checkpoint where it is one of ours."""
    if not given:
        return None, None
    file = Path(given).expanduser()
    if file.is_absolute() or file.suffix in (".safetensors", *PICKLES):
        if not file.is_file():
            raise InputError("Expected a safetensors file for weights, found none there; give its absolute path.")
        return file, None
    parent = artifacts.find_checkpoint(connection, given)
    return artifacts.fetch(work.settings, parent.path, parent.sha256), parent.checkpoint_id


def _fit(work: Work, recipe: Recipe, weights: Path | None) -> tuple[Recipe, dict[str, Any] | None]:
    """The recipe with the input that the weights were trained on, and what of them will be loaded; both are logged.

    Raises:
        InputError: no such encoder, or weights that do not fit it; told ahead of hours of work.
    """
    from ml.weights import take_declared, try_encoder

    try:
        settled = recipe if weights is None else take_declared(recipe, weights, work.args.get("set") or {})
        matched = try_encoder(settled, weights)
    except ValueError as error:
        raise InputError(str(error)) from None
    taken = [key for key, value in settled.to_dict().items() if recipe.to_dict()[key] != value]
    if taken:
        work.log(f"taken from the weights: {', '.join(f'{key}={getattr(settled, key)}' for key in taken)}")
    if matched is None:
        return settled, None
    work.log(str(matched))
    return settled, matched.to_dict()


def _finished(connection: Any, plan: Plan) -> dict[str, Any] | None:
    """The newest finished checkpoint of this name, if it was made from the same inputs."""
    from sqlalchemy import text

    row = connection.execute(
        text(
            "SELECT checkpoint_id, name, arm, step AS steps, recipe ->> 'identity' AS identity FROM model.checkpoint "
            "WHERE name = :name AND is_final ORDER BY checkpoint_id DESC LIMIT 1"
        ),
        {"name": plan.name},
    ).mappings()
    found = row.first()
    if found is None or found["identity"] != plan.identity:
        return None
    return {key: value for key, value in found.items() if key != "identity"}


def _data(plan: Plan, rows: NDArray[np.int64], volumes: ScanVolumes) -> Data:
    """Rows whose volume can be read, and their targets. Raises InputError where there is nothing to learn."""
    from ml.training import Data

    members = plan.members
    permuted = permuted_images(members, plan.seed) if plan.shuffled else {}
    source = {
        row: permuted.get(image, image) for row, image in zip(rows.tolist(), members.image[rows].tolist(), strict=True)
    }
    readable = rows[[source[row] in volumes.cached for row in rows.tolist()]]
    train, tuning = (readable[members.split[readable] == split] for split in (TRAIN, TUNING))
    if len(train) == 0:
        raise InputError(
            f"Expected eligible train members in the cohort {plan.info.cohort!r}, found none; "
            f"`lachesis show cohort {plan.info.cohort}` says why they were left out."
        )
    every = len(train)
    if plan.arm == "tte" and plan.recipe.drop_without_events:
        train = train[np.diff(plan.labels.events.ptr)[train] > 0]
    try:
        targets = _targets(plan, train)
    except ValueError as error:
        raise InputError(f"{error} The label set is {plan.info.name!r}.") from None
    return Data(
        volume=lambda row: volumes.read(source[row]),
        train=train,
        tuning=tuning,
        targets=targets,
        num_dropped=every - len(train),
    )


def _targets(plan: Plan, train: NDArray[np.int64]) -> TteTargets | BinaryTargets:
    from ml.targets import MtlTargets, VisitTargets
    from ml.tte_targets import TteTargets

    if plan.arm == "mtl":
        return MtlTargets(plan.labels, train, plan.info.horizons_days)
    if plan.arm == "visit":
        return VisitTargets(plan.labels, train)
    recipe = plan.recipe
    return TteTargets(plan.labels, train, recipe.pieces, objective=recipe.objective, death=recipe.death)


def _describe(plan: Plan, data: Data, volumes: ScanVolumes) -> dict[str, Any]:
    """The complete recipe as stored: settings, inputs by name and digest, tasks, pieces, counts, versions."""
    import torch

    from ml.hazards import last_day_at_risk
    from ml.labelling import DAY_SECONDS
    from ml.tte_targets import TteTargets

    targets = data.targets
    follow_up = plan.labels.follow_up_seconds[data.train] / DAY_SECONDS
    described: dict[str, Any] = {
        **plan.facts,
        "identity": plan.identity,
        "loaded": plan.loaded,
        "cohort": plan.info.cohort,
        "task_set": plan.info.task_set,
        "tasks": plan.info.task_names,
        "num_tasks": len(plan.info.task_names),
        "num_train": len(data.train),
        "num_tuning": len(data.tuning),
        "num_without_events": data.num_dropped,
        "num_unreadable": len(volumes.failed),
        "per_scan": targets.per_scan,
        "torch": torch.__version__,
        "device": device(),  # asked of the driver's files: forks of this process use the devices
        "num_devices": plan.gpus,
    }
    if isinstance(targets, TteTargets):
        last = targets.edges[-1]
        described["pieces_days"] = [*targets.edges[:-1].tolist(), None if np.isinf(last) else last]  # None: open
        described["last_day_at_risk"] = last_day_at_risk(follow_up)
    elif plan.arm == "mtl":
        described["horizons_days"] = plan.info.horizons_days
        described["absent_tasks"] = _absent(plan, targets)
    return described


def _absent(plan: Plan, targets: BinaryTargets) -> list[str]:
    """Clinical tasks without a positive label at any train scan."""
    ends = np.cumsum([len(days) for days in plan.info.horizons_days])
    positive = np.split(targets.positive, ends[:-1])
    return [name for name, counts in zip(plan.info.task_names, positive, strict=True) if not counts.sum()]


def _train(work: Work, plan: Plan, data: Data, described: dict[str, Any]) -> Result:
    from torch import OutOfMemoryError

    from ml.pretrain import Diverged, Silent, keep_untrained, pretrain

    facts = {"name": plan.name, "arm": plan.arm, "described": described}
    common: dict[str, Any] = {"seed": plan.seed, "folder": work.folder, "facts": facts, "weights": plan.weights}
    if plan.arm in ("base", "untrained"):
        work.progress(0, None, "", "embedding train volumes")
        return keep_untrained(plan.recipe, data, **common)
    stops = _stops(work)
    work.started_at_step(stops.step)
    _check_passes(plan, len(data.train))
    if plan.gpus > 1 and not check_devices(plan.gpus):
        work.log(f"There is no accelerator on this host: {plan.gpus} processes share the processor.")
    watcher = Watcher(work, plan, described)
    extends = stops.last is None and plan.continues is not None
    if plan.continues is not None and stops.last is None:
        stops = replace(stops, last=plan.continues.stop)
    common |= {"resume": stops.last, "best": stops.best, "extends": extends}

    def follow(world: World) -> None:
        pretrain(plan.recipe, data, observer=Silent(), world=world, **common)

    try:
        with ranks(plan.gpus, work.folder, follow) as world:
            result = pretrain(plan.recipe, data, observer=watcher, world=world, **common)
    except Diverged as error:
        scans = ", ".join(map(str, plan.members.image[error.rows][:20].tolist()))
        raise InputError(f"{error} Their image_occurrence_id: {scans}.") from None
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError | OutOfMemoryError) or "allocate memory" in str(error)):
            raise
        raise InputError(too_large(plan.recipe, str(error))) from None
    watcher.flush()
    if not result.finished:
        raise Preempted
    return result


def _check_passes(plan: Plan, num_train: int) -> None:
    """Raise InputError where a step has fewer passes than there are devices to share them."""
    recipe = plan.recipe
    passes = -(-min(recipe.volumes_per_step, num_train) // recipe.batch)
    if passes < plan.gpus:
        raise InputError(
            f"Expected a step of {plan.gpus} passes or more for --gpus {plan.gpus}, got {passes}; use "
            f"--set accumulate={plan.gpus} with a batch of {max(1, recipe.volumes_per_step // plan.gpus)}."
        )


def too_large(recipe: Recipe, said: str) -> str:
    """What to do where memory did not suffice: the same batch would not fit the next time either."""
    batch = recipe.batch
    smaller = (
        f"--set batch={batch // 2} --set accumulate={2 * recipe.accumulate} keeps the step as it is"
        if batch > 1
        else "a smaller --set shape_zyx, or a smaller encoder"
    )
    smaller = smaller if recipe.recompute else f"--set recompute=true keeps less on the way, and {smaller}"
    return (
        f"Expected a forward and backward pass of {batch} volumes of {list(recipe.shape_zyx)} to fit into memory, and "
        f"it did not ({said.splitlines()[0] if said else 'no memory'}); {smaller}."
    )


@dataclass(frozen=True, slots=True)
class Stops:
    """Where a job's training stood."""

    step: int = 0
    last: Path | None = None
    best: Path | None = None


def _stops(work: Work) -> Stops:
    """The newest intact stop on the way of this job, and the best one; neither where there is none."""
    from sqlalchemy import text

    if work.job_id is None:
        return Stops()
    with work.connect() as connection:
        rows = connection.execute(
            text(
                "SELECT step, path, sha256, is_best FROM model.checkpoint WHERE job_id = :job AND NOT is_final "
                "ORDER BY step DESC, checkpoint_id DESC"
            ),
            {"job": work.job_id},
        ).all()
    found = Stops()
    for step, path, sha256, is_best in rows:
        try:
            file = artifacts.fetch(work.settings, path, sha256)
        except StoreError as error:
            work.log(f"the checkpoint of step {step} cannot be used: {error}")
            continue
        if found.last is None:
            found = replace(found, step=step, last=file)
        if is_best:
            found = replace(found, best=file)
    return found


class Watcher:
    """Turns news of a training into rows: progress, loss curves, stops on the way."""

    def __init__(self, work: Work, plan: Plan, described: dict[str, Any]) -> None:
        self.work, self.plan, self.described = work, plan, described
        self.points: list[dict[str, Any]] = []
        self.preempted = False

    def stop(self) -> bool:
        """True once the worker is asked to stop; Cancelled and FenceLost pass through."""
        try:
            self.work.check()
        except Preempted:
            self.preempted = True
        return self.preempted

    def progress(self, step: int, total: int, epoch: int) -> None:
        try:
            self.work.progress(step, total, "step", f"epoch {min(epoch + 1, self.plan.recipe.epochs)}")
        except Preempted:
            self.preempted = True

    def curve(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        self.points += [{"step": step, "epoch": epoch, "name": name, "value": v} for name, v in values.items()]
        if len(self.points) >= FLUSH_POINTS:
            self.flush()

    def flush(self) -> None:
        """Write the points of the loss curves that wait; those of steps taken again replace the older ones."""
        from sqlalchemy.dialects.postgresql import insert

        from app.schema.ops import TrainingStep

        if self.points and self.work.job_id is not None:
            rows = [{**point, "job_id": self.work.job_id} for point in self.points]
            statement = insert(TrainingStep)
            replace = {"value": statement.excluded.value, "epoch": statement.excluded.epoch}
            statement = statement.on_conflict_do_update(index_elements=["job_id", "step", "name"], set_=replace)
            with self.work.transaction() as connection:
                connection.execute(statement, rows)
        self.points = []

    def alarm(self, message: str) -> None:
        self.work.log(message)

    def keep(self, file: Path, step: int, total: int, *, is_best: bool) -> Path:
        self.flush()
        kept = _publish(self.work, self.plan, self.described, file, steps=(step, total), is_best=is_best)
        if self.work.job_id is not None:
            with self.work.transaction() as connection:
                superseded = artifacts.forget_stops(connection, self.work.job_id, KEEP)
            artifacts.remove(self.work.settings, superseded)
        return kept.file


@dataclass(frozen=True, slots=True)
class Published:
    """A checkpoint among the artifacts."""

    checkpoint_id: int
    file: Path


def _publish(
    work: Work,
    plan: Plan,
    described: dict[str, Any],
    file: Path,
    *,
    steps: tuple[int, int],
    validation: dict[str, Any] | None = None,
    is_best: bool = False,
) -> Published:
    """Put a checkpoint among the artifacts, then write its row; final where there is a validation."""
    from app import __version__
    from ml import checkpoint

    path, sha256 = artifacts.publish(work.settings, file, "checkpoints")
    values = {
        "name": plan.name,
        "sha256": sha256,
        "arm": plan.arm,
        "encoder": plan.recipe.encoder,
        "width": checkpoint.facts(file)["width"],
        "recipe": described,
        "seed": plan.seed,
        "step": steps[0],
        "num_steps": steps[1],
        "epoch": steps[0] * plan.recipe.epochs // steps[1] if steps[1] else 0,
        "is_best": is_best,
        "is_final": validation is not None,
        "parent_id": plan.parent_id,
        "label_set_id": plan.info.label_set_id,
        "cohort_id": plan.info.cohort_id,
        "shuffled": plan.shuffled,
        "path": path,
        "num_bytes": file.stat().st_size,
        "validation": validation or {},
        "code_version": __version__,
        "job_id": work.job_id,
        "fence": work.fence,
    }
    with work.transaction() as connection:
        checkpoint_id = artifacts.add_checkpoint(connection, values)
    file.unlink()
    return Published(checkpoint_id, artifacts.root(work.settings) / path)
