"""What differs between two checkpoints: what they are, their recipes, labels and tasks, losses, and figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from app.errors import InputError
from app.store.artifacts import find_checkpoint

if TYPE_CHECKING:
    from sqlalchemy import Connection

_CHECKPOINT = """
SELECT c.checkpoint_id, c.name, c.sha256, c.arm, c.encoder, c.width, c.seed, c.shuffled, c.step, c.num_steps, c.epoch,
       c.is_final AS final, c.num_bytes, c.code_version, c.created_at, c.recipe,
       CASE WHEN c.validation <> '{}' THEN c.validation ELSE coalesce((
           SELECT jsonb_object_agg(t.name, t.value) FROM ops.training_step t
           WHERE t.job_id = c.job_id AND t.step = c.step AND t.name LIKE 'tuning%'), '{}') END AS validation,
       (SELECT p.name || ', checkpoint ' || p.checkpoint_id FROM model.checkpoint p
        WHERE p.checkpoint_id = c.parent_id) AS parent,
       (SELECT k.name || '@' || k.version FROM label.cohort k WHERE k.cohort_id = c.cohort_id) AS cohort,
       (SELECT l.name || '@' || l.version FROM label.label_set l WHERE l.label_set_id = c.label_set_id) AS label_set
FROM model.checkpoint c WHERE c.checkpoint_id = :id
"""

_BEFORE = """
SELECT coalesce(
    (SELECT max(p.checkpoint_id) FROM model.checkpoint p
     WHERE p.name = c.name AND p.is_final AND p.checkpoint_id < c.checkpoint_id AND p.job_id IS DISTINCT FROM c.job_id),
    c.parent_id)
FROM model.checkpoint c WHERE c.checkpoint_id = :id
"""

_SIDE = """
max(m.value) FILTER (WHERE m.checkpoint_id = :{0}) AS value_{0},
max(m.ci_low) FILTER (WHERE m.checkpoint_id = :{0}) AS ci_low_{0},
max(m.ci_high) FILTER (WHERE m.checkpoint_id = :{0}) AS ci_high_{0},
max(m.reason) FILTER (WHERE m.checkpoint_id = :{0}) AS reason_{0},
bool_or(m.checkpoint_id = :{0}) AS judged_{0}
"""
_FIGURES = f"""
SELECT s.name || '@' || s.version AS label_set, m.task, m.metric, m.horizon_days, m.split, m.head, m.inputs,
       {_SIDE.format("a")}, {_SIDE.format("b")}
FROM model.metric m JOIN label.label_set s USING (label_set_id)
WHERE m.checkpoint_id IN (:a, :b) AND m.reference_checkpoint_id IS NULL AND m.reference_inputs IS NULL
  AND m.subgroup IS NULL
GROUP BY 1, 2, 3, 4, 5, 6, 7
"""

_PAIRED = """
SELECT s.name || '@' || s.version AS label_set, m.task, m.metric, m.horizon_days, m.split, m.head, m.inputs,
       CASE WHEN m.checkpoint_id = :b THEN m.value ELSE -m.value END AS difference,
       CASE WHEN m.checkpoint_id = :b THEN m.ci_low ELSE -m.ci_high END AS ci_low,
       CASE WHEN m.checkpoint_id = :b THEN m.ci_high ELSE -m.ci_low END AS ci_high, m.p_value
FROM model.metric m JOIN label.label_set s USING (label_set_id)
WHERE (m.checkpoint_id, m.reference_checkpoint_id) IN ((:a, :b), (:b, :a)) AND m.subgroup IS NULL
  AND m.reference_inputs IS NULL
ORDER BY m.task NULLS FIRST, m.metric_id
"""

COMPARED = (
    *("arm", "encoder", "width", "seed", "shuffled", "parent", "label_set", "cohort", "step", "num_steps", "epoch"),
    *("final", "num_bytes", "code_version"),
)
OWN = ("settings", "tasks", "identity", "arm", "seed", "shuffled", "label_set", "cohort")
"""Fields of a stored recipe that are compared apart, or are columns of the checkpoint."""


def chosen(connection: Connection, first: str, second: str | None) -> tuple[int, int]:
    """Keys of two checkpoints; of one alone, what stood under its name before it (else what it goes on from) and it.

    Raises:
        UnknownName: there is no such checkpoint.
        InputError: nothing was before the one that is named.
    """
    from sqlalchemy import text

    one = find_checkpoint(connection, first).checkpoint_id
    if second is not None:
        return one, find_checkpoint(connection, second).checkpoint_id
    before = connection.execute(text(_BEFORE), {"id": one}).scalar()
    if before is None:
        raise InputError(
            f"Expected two checkpoints, got {first!r} alone, which is the first of its name and goes on from none; "
            "name another."
        )
    return int(before), one


def compare(connection: Connection, pair: tuple[int, int]) -> dict[str, Any]:
    """All that differs, and figures side by side; differences are those of the second less the first."""
    from sqlalchemy import text

    a, b = (dict(connection.execute(text(_CHECKPOINT), {"id": key}).mappings().one()) for key in pair)
    values = dict(zip("ab", pair, strict=True))
    figures = [_with_difference(row) for row in connection.execute(text(_FIGURES), values).mappings()]
    figures.sort(key=_order)
    recipes = a["recipe"], b["recipe"]
    facts = _differing(*({key: one[key] for key in COMPARED} for one in (a, b)))
    facts += _differing(*({k: v for k, v in one.items() if k not in OWN} for one in recipes))
    tasks = [set(one.get("tasks") or ()) for one in recipes]
    return {
        "a": _named(a),
        "b": _named(b),
        "same_weights": a["sha256"] == b["sha256"],
        "facts": facts,
        "settings": _differing(*(one.get("settings") or {} for one in recipes)),
        "tasks": {"only_a": sorted(tasks[0] - tasks[1]), "only_b": sorted(tasks[1] - tasks[0])},
        "validation": _losses(a["validation"], b["validation"]),
        "figures": [{k: v for k, v in row.items() if not k.startswith("judged")} for row in figures
                    if row["judged_a"] and row["judged_b"]],
        "judged_by_one": {side: sorted({row["label_set"] for row in figures if row[f"judged_{side}"]}
                                       - {row["label_set"] for row in figures if row[f"judged_{other}"]})
                          for side, other in ("ab", "ba")},
        "paired": [dict(row) for row in connection.execute(text(_PAIRED), values).mappings()],
    }  # fmt: skip


def _named(one: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("checkpoint_id", "name", "epoch", "final", "sha256", "arm", "encoder", "created_at")
    return {key: one[key] for key in keys}


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of what the two do not have alike; a field that one lacks is null there."""
    return [
        {"what": key, "a": a.get(key), "b": b.get(key)} for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)
    ]


def _losses(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Losses and other numbers of the validation, equal ones, too."""
    rows = []
    for key in dict.fromkeys([*a, *b]):
        one, other = a.get(key), b.get(key)
        if all(
            value is None or (isinstance(value, int | float) and not isinstance(value, bool)) for value in (one, other)
        ):
            difference = None if one is None or other is None else other - one
            rows.append({"what": key, "a": one, "b": other, "difference": difference})
    return rows


def _with_difference(row: Mapping[Any, Any]) -> dict[str, Any]:
    a, b = row["value_a"], row["value_b"]
    return {**row, "difference": None if a is None or b is None else b - a}


def _order(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Means over tasks first, then tasks by name."""
    return (
        row["label_set"], row["task"] is not None, row["task"] or "", row["metric"], row["horizon_days"] or 0,
        row["split"], row["head"], row["inputs"],
    )  # fmt: skip
