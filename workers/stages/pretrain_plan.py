"""What a training is asked for: everything that decides what it makes, read and checked, and nothing written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from app.errors import InputError, UnknownName
from app.store import artifacts, stale
from app.store.names import check_name
from app.store.places import digest_of
from app.store.work import Work
from ml.config import Recipe, from_dict, read_recipe
from ml.labelling import LabelArrays
from ml.weight_names import PICKLES
from workers.bridge import LabelSetInfo, Members, Scan, find_label_set, read_labels, read_members, read_scans

if TYPE_CHECKING:
    from sqlalchemy import Connection

ARMS = ("base", "mtl", "visit", "tte")


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


def read_plan(work: Work) -> Plan:
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
        "weights_sha256": digest_of(weights) if weights else None,
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
