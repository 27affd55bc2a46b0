"""One figure of several checkpoints side by side, task by task, judged by the same labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from app.errors import InputError, UnknownName
from app.store import names
from app.store.artifacts import find_checkpoint

if TYPE_CHECKING:
    from sqlalchemy import Connection

# The label set that judged most of them, the newest of these.
_LABELS = """
SELECT s.name || '@' || s.version FROM model.metric m JOIN label.label_set s USING (label_set_id)
WHERE m.checkpoint_id = ANY(:ids) GROUP BY s.label_set_id
ORDER BY count(DISTINCT m.checkpoint_id) DESC, max(m.metric_id) DESC LIMIT 1
"""

_FIGURES = """
SELECT m.checkpoint_id, m.reference_checkpoint_id, m.task, m.horizon_days, m.value, m.ci_low, m.ci_high, m.reason, m.n,
       m.num_events, m.flags
FROM model.metric m
WHERE m.label_set_id = :labels AND m.checkpoint_id = ANY(:ids) AND m.metric IN (:metric, 'mean_' || :metric)
  AND m.split = 'held_out' AND m.head = :head AND m.inputs = :inputs AND m.reference_inputs IS NULL
  AND m.subgroup IS NULL AND (m.reference_checkpoint_id IS NULL OR m.reference_checkpoint_id = :first
                              OR m.checkpoint_id = :first AND m.reference_checkpoint_id = ANY(:ids))
ORDER BY m.task NULLS FIRST, m.horizon_days, m.metric_id
"""

_KNOWN = """
SELECT DISTINCT {0} FROM model.metric WHERE label_set_id = :labels AND checkpoint_id = ANY(:ids)
  AND split = 'held_out' AND subgroup IS NULL
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """Which figure."""

    metric: str = "harrell_c"
    head: str = "cox"
    inputs: str = "image"


def compare(connection: Connection, given: Sequence[str], labels: str | None, figure: Figure) -> dict[str, Any]:
    """A row a task and horizon (the mean over tasks first) with the figures of each checkpoint, in the order given.

    Differences from the first are those that an evaluation resampled in pairs by person, null where none did.

    Raises:
        UnknownName: no such checkpoint, label set, metric, head or inputs among their figures.
        InputError: one of them was not judged by these labels, or comes twice.
    """
    from sqlalchemy import text

    found = [find_checkpoint(connection, name) for name in given]
    ids = [one.checkpoint_id for one in found]
    if len(set(ids)) < len(ids):
        raise InputError(f"Expected each checkpoint once, got {', '.join(given)}; leave one out.")
    chosen = labels or connection.execute(text(_LABELS), {"ids": ids}).scalar()
    if chosen is None:
        raise InputError(
            f"Expected figures of {given[0]!r}, found none; run `lachesis evaluate {given[0]} --labels L`."
        )
    label_set = names.find(connection, "label set", chosen)
    values = {"labels": label_set.id, "ids": ids}
    _check_known(connection, figure, values)
    asked = values | {"first": ids[0], "metric": figure.metric, "head": figure.head, "inputs": figure.inputs}
    rows = connection.execute(text(_FIGURES), asked).mappings().all()
    said = f"{label_set.name}@{label_set.version}"
    judged = {row["checkpoint_id"] for row in rows if row["reference_checkpoint_id"] is None}
    for name, key in zip(given, ids, strict=True):
        if key not in judged:
            raise InputError(
                f"Expected {figure.metric} of {name!r} by labels {said} ({figure.head}, "
                f"{figure.inputs}), found none; run `lachesis evaluate {name} --labels {said}`."
            )
    return {
        "labels": said,
        "metric": figure.metric,
        "head": figure.head,
        "inputs": figure.inputs,
        "checkpoints": [
            {"checkpoint_id": one.checkpoint_id, "name": name, "arm": one.arm, "encoder": one.encoder, "seed": one.seed}
            for name, one in zip(given, found, strict=True)
        ],
        "flags": sorted({flag for row in rows for flag in row["flags"] if row["task"] is None}),
        "rows": _side_by_side(rows, ids),
    }


def _check_known(connection: Connection, figure: Figure, values: dict[str, Any]) -> None:
    """Raise UnknownName for a metric, head or inputs that no figure of these checkpoints has."""
    from sqlalchemy import text

    for what, asked in (("metric", figure.metric), ("head", figure.head), ("inputs", figure.inputs)):
        known = {
            str(one).removeprefix("mean_") for one in connection.execute(text(_KNOWN.format(what)), values).scalars()
        }
        if known and asked not in known:
            raise UnknownName(what, asked, known)


def _side_by_side(rows: Sequence[Any], ids: Sequence[int]) -> list[dict[str, Any]]:
    found: dict[tuple[str | None, int | None], dict[str, Any]] = {}
    for row in rows:
        blank = {"value": None, "ci_low": None, "ci_high": None, "reason": None, "difference": None}
        key = row["task"], row["horizon_days"]
        line = found.setdefault(
            key, {"task": key[0], "horizon_days": key[1], "n": row["n"], "num_events": row["num_events"],
                  "figures": [dict(blank) for _ in ids]},
        )  # fmt: skip
        reference = row["reference_checkpoint_id"]
        turned = row["checkpoint_id"] == ids[0]  # others were subtracted from the first
        one = line["figures"][ids.index(reference if reference is not None and turned else row["checkpoint_id"])]
        numbers = {name: row[name] for name in ("value", "ci_low", "ci_high", "reason")}
        if reference is None:
            one.update(numbers)
        else:
            one["difference"] = _turned(numbers) if turned else numbers
    return list(found.values())


def _turned(numbers: dict[str, Any]) -> dict[str, Any]:
    """A difference the other way round."""
    value, low, high = (None if numbers[key] is None else -numbers[key] for key in ("value", "ci_low", "ci_high"))
    return numbers | {"value": value, "ci_low": high, "ci_high": low}
