"""Stage `pretrain`: labels and volumes → an encoder, kept as checkpoints, the last of which is final."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from app.errors import InputError, Preempted
from app.store.places import place
from app.store.work import Work
from ml.config import Recipe
from workers.bridge import (
    TRAIN,
    TUNING,
)
from workers.holder import device
from workers.ranks import check_devices, lacking, ranks
from workers.scan_volumes import ScanVolumes, permuted_images, prepare
from workers.stages.pretrain_left import clear
from workers.stages.pretrain_plan import Plan, read_plan
from workers.stages.pretrain_stops import Watcher, find_stops, publish_end

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ml.keeping import Result
    from ml.parallel import World
    from ml.targets import BinaryTargets
    from ml.training import Data
    from ml.tte_targets import TteTargets


def pretrain(work: Work) -> dict[str, Any]:
    """Train `args["arm"]`, or keep the start weights (`base`); an identical finished training is left as it is.

    Args of the job: arm, encoder, labels, name, seed, set (recipe settings as text), shuffle_volumes; or continue (a
    finished training), epochs (how many more) and name.

    Raises:
        InputError: a setting, name or input that cannot be used.
    """
    clear(work)
    plan = read_plan(work)
    with work.connect() as connection:
        finished = _finished(connection, plan)
    if finished is not None:
        work.log(f"unchanged: checkpoint {plan.name} was made from the same labels, recipe and seed")
        return {**finished, "unchanged": True}

    place(work.settings).require()  # before hours of training that could not be kept
    seen = np.isin(plan.members.split, (TRAIN, TUNING))
    rows = np.flatnonzero(plan.members.eligible & seen)
    wanted = set(plan.members.image[seen if plan.shuffled else rows].tolist())
    volumes = prepare(work, plan.recipe, [s for s in plan.scans if s.image_occurrence_id in wanted])
    data = _data(plan, rows, volumes)
    described = _describe(plan, data, volumes)
    result = _train(work, plan, data, described)
    if result.file is None:  # never of a finished training
        raise Preempted
    made = publish_end(work, plan, described, result.file, result)
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
        volume=lambda row, out=None: volumes.read(source[row], out),
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
    from ml.keeping import Silent
    from ml.pretrain import keep_untrained, pretrain

    facts = {"name": plan.name, "arm": plan.arm, "described": described}
    common: dict[str, Any] = {"seed": plan.seed, "folder": work.folder, "facts": facts, "weights": plan.weights}
    if plan.arm in ("base", "untrained"):
        work.progress(0, None, "", "embedding train volumes")
        with _explained(plan):
            return keep_untrained(plan.recipe, data, **common)
    step, kept = find_stops(work, plan.continues.stop if plan.continues is not None else None)
    work.started_at_step(step)
    _check_passes(plan, len(data.train))
    if plan.gpus > 1 and not check_devices(plan.gpus):
        work.log(f"There is no accelerator on this host: {plan.gpus} processes share the processor.")
    watcher = Watcher(work, plan, described)
    common["kept"] = kept

    def follow(world: World) -> None:
        pretrain(plan.recipe, data, observer=Silent(), world=world, **common)

    with _explained(plan), ranks(plan.gpus, work.folder, follow) as world:
        result = pretrain(plan.recipe, data, observer=watcher, world=world, **common)
    watcher.flush()
    if not result.finished:
        raise Preempted
    return result


@contextmanager
def _explained(plan: Plan) -> Iterator[None]:
    """Have what no further attempt could mend end the job with what to do."""
    from ml.keeping import Diverged

    try:
        yield
    except Diverged as error:
        scans = ", ".join(map(str, plan.members.image[error.rows][:20].tolist()))
        raise InputError(f"{error} Their image_occurrence_id: {scans}.") from None
    except (MemoryError, RuntimeError) as error:
        if lacking(error) != "memory":
            raise
        raise InputError(too_large(plan.recipe, str(error))) from None


def _check_passes(plan: Plan, num_train: int) -> None:
    """Raise InputError where a step has fewer passes than there are devices to share them."""
    recipe = plan.recipe
    passes = recipe.passes_in_step(num_train)
    if passes < plan.gpus:
        raise InputError(
            f"Expected a step of {plan.gpus} passes or more for --gpus {plan.gpus}, got {passes}; use "
            f"--set accumulate={plan.gpus} with a batch of {max(1, recipe.volumes_in_step(num_train) // plan.gpus)}."
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
