"""Curves of trainings by epoch, for `lachesis plot curves`: one run a name, with the runs that it goes on from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from app.errors import InputError, UnknownName
from app.store.artifacts import find_checkpoint

if TYPE_CHECKING:
    from sqlalchemy import Connection

NAMES = ("train_loss", "tuning_loss", "tuning_gain", "tuning_probe_c")

# Steps an epoch are those of the run asked for: a training that is carried on keeps them.
_RUN = """
SELECT c.checkpoint_id, c.name, c.arm, c.job_id, c.parent_id, c.recipe ? 'continues' AS continues,
       greatest(1, c.num_steps)::float8 / greatest(1, coalesce((c.recipe -> 'settings' ->> 'epochs')::int, 1)) AS steps
FROM model.checkpoint c WHERE c.checkpoint_id = :id
"""
_POINTS = """
SELECT t.name, t.step, t.value FROM ops.training_step t WHERE t.job_id = :job AND t.name = ANY(:names)
ORDER BY t.step, t.name
"""


def read(connection: Connection, names: list[str]) -> list[dict[str, Any]]:
    """Points of trainings: run, arm, name (of `NAMES`), step, epoch (with its fraction), value; by run, then step.

    Raises:
        UnknownName: there is no such checkpoint, and none on the way to it.
        InputError: nothing was trained for it, or one run is named twice.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    jobs: set[int | None] = set()
    for name in names:
        run = _run(connection, _meant(connection, name))
        points = _points(connection, run)
        if not points:
            raise InputError(f"Expected curves of checkpoint {name!r}, found none: nothing was trained for it.")
        if run["job_id"] in jobs:
            raise InputError(f"Expected each training once, got that of {name!r} twice; leave one out.")
        jobs.add(run["job_id"])
        said = run["name"] if run["name"] not in found else f"{run['name']} ({run['checkpoint_id']})"
        found[said] = [
            {"run": said, "arm": run["arm"], "name": what, "step": step, "epoch": step / run["steps"], "value": value}
            for what, step, value in points
        ]
    return [point for points in found.values() for point in points]


def _meant(connection: Connection, name: str) -> int:
    """A finished training, else the newest stop of one that is on its way."""
    try:
        return find_checkpoint(connection, name).checkpoint_id
    except UnknownName as unknown:
        try:
            return find_checkpoint(connection, f"{name}@last").checkpoint_id
        except InputError:
            raise unknown from None


def _run(connection: Connection, checkpoint_id: int) -> dict[str, Any]:
    from sqlalchemy import text

    return dict(connection.execute(text(_RUN), {"id": checkpoint_id}).mappings().one())


def _points(connection: Connection, run: dict[str, Any]) -> list[tuple[str, int, float]]:
    """(name, step, value) of a run; those of what it goes on from come first, up to where it begins."""
    from sqlalchemy import text

    rows = connection.execute(text(_POINTS), {"job": run["job_id"], "names": list(NAMES)})
    own = [(str(row.name), int(row.step), float(row.value)) for row in rows]
    if not run["continues"] or run["parent_id"] is None:
        return own
    first = own[0][1] if own else 0
    before = _points(connection, _run(connection, run["parent_id"]))
    return [point for point in before if not own or point[1] < first] + own
