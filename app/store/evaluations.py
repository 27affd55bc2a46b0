"""Predictions, metrics and reports: rows written by one evaluation, rows read for a page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sqlalchemy import Connection

PREDICTION_COLUMNS = (
    "checkpoint_id", "head", "inputs", "label_set_id", "position", "cohort_member_id", "split", "horizon_days", "kind",
    "value", "seed", "job_id",
)  # fmt: skip

_DELETE_PREDICTIONS = """
DELETE FROM model.prediction WHERE label_set_id = :label_set_id AND checkpoint_id IS NOT DISTINCT FROM :checkpoint_id
  AND head = :head AND inputs = :inputs
"""

_DELETE_METRICS = """
DELETE FROM model.metric WHERE label_set_id = :label_set_id AND checkpoint_id IS NOT DISTINCT FROM :checkpoint_id
  AND reference_checkpoint_id IS NOT DISTINCT FROM :reference_checkpoint_id AND head = :head AND inputs = :inputs
  AND reference_inputs IS NOT DISTINCT FROM :reference_inputs
"""


def replace_evaluation(
    connection: Connection,
    label_set_id: int,
    metrics: Sequence[Mapping[str, Any]],
    predictions: Iterable[Sequence[Any]],
    predicted: Iterable[tuple[int | None, str, str]],
) -> None:
    """Put metrics and predictions in place of earlier ones of the same checkpoints, heads and inputs.

    Two evaluations of one label set wait for each other, since both write the rows without a checkpoint.

    Args:
        connection: its transaction holds the change.
        label_set_id: labels they were judged by.
        metrics: columns of model.metric; a difference replaces the earlier one from the same reference alone.
        predictions: values of PREDICTION_COLUMNS.
        predicted: (checkpoint_id, head, inputs) whose predictions these are.
    """
    from sqlalchemy import insert, text

    from app.schema.model import Metric
    from app.store.session import raw

    connection.execute(text("SELECT pg_advisory_xact_lock(hashtext('model.metric'), :s)"), {"s": label_set_id})
    what = ("checkpoint_id", "reference_checkpoint_id", "head", "inputs", "reference_inputs")
    for values in sorted({tuple(row[name] for name in what) for row in metrics}, key=repr):
        connection.execute(
            text(_DELETE_METRICS), {**dict(zip(what, values, strict=True)), "label_set_id": label_set_id}
        )
    for checkpoint_id, head, inputs in sorted(set(predicted), key=repr):
        given = {"checkpoint_id": checkpoint_id, "head": head, "inputs": inputs, "label_set_id": label_set_id}
        connection.execute(text(_DELETE_PREDICTIONS), given)
    if metrics:
        connection.execute(insert(Metric), [dict(row) for row in metrics])
    statement = f"COPY model.prediction ({', '.join(PREDICTION_COLUMNS)}) FROM STDIN"
    with raw(connection).cursor() as cursor, cursor.copy(statement) as copy:
        for row in predictions:
            copy.write_row(row)


_CAVEATS = """
SELECT coalesce(bool_or(s.simulated), false) AS simulated,
       coalesce(bool_or(s.arbitrary_pairing), false) AS arbitrary_pairing
FROM ops.source s WHERE s.source_id IN (
    SELECT l.source_id FROM ops.load l WHERE l.load_id IN (
        SELECT i.load_id FROM label.cohort_member m JOIN omop.image_occurrence i USING (image_occurrence_id)
        WHERE m.cohort_id = :c
        UNION
        SELECT p.load_id FROM label.cohort_member m JOIN omop.person p ON p.person_id = m.person_id
        WHERE m.cohort_id = :c))
"""

_SPLIT_BY_PERSON = """
SELECT coalesce((definition #>> '{split,shared_volumes}')::boolean, false) FROM label.cohort WHERE cohort_id = :c
"""


def caveats(connection: Connection, cohort_id: int) -> list[str]:
    """What must be said beside every number of a cohort: simulated, arbitrary_pairing, shared_volumes."""
    from sqlalchemy import text

    row = connection.execute(text(_CAVEATS), {"c": cohort_id}).mappings().one()
    found = [name for name in ("simulated", "arbitrary_pairing") if row[name]]
    if connection.execute(text(_SPLIT_BY_PERSON), {"c": cohort_id}).scalar():
        found.append("shared_volumes")
    return found


_METRICS = """
SELECT m.*, c.name AS checkpoint, r.name AS reference
FROM model.metric m
LEFT JOIN model.checkpoint c ON c.checkpoint_id = m.checkpoint_id
LEFT JOIN model.checkpoint r ON r.checkpoint_id = m.reference_checkpoint_id
WHERE m.label_set_id = :s AND m.split = 'held_out' ORDER BY m.metric_id
"""


def read_metrics(connection: Connection, label_set_id: int) -> list[dict[str, Any]]:
    """Metrics of a label set on held-out scans, with the names of their checkpoints, oldest first.

    Where a name was trained anew, the metrics of its older checkpoints stay: those are called `NAME (checkpoint ID)`.
    """
    from sqlalchemy import text

    rows = [dict(row) for row in connection.execute(text(_METRICS), {"s": label_set_id}).mappings()]
    newest: dict[str, int] = {}
    sides = (("checkpoint", "checkpoint_id"), ("reference", "reference_checkpoint_id"))
    for row in rows:
        for name, key in sides:
            if row[name] is not None:
                newest[row[name]] = max(newest.get(row[name], 0), row[key])
    for row in rows:
        for name, key in sides:
            if row[name] is not None and row[key] != newest[row[name]]:
                row[name] = f"{row[name]} (checkpoint {row[key]})"
    return rows


_PREDICTIONS = """
SELECT cohort_member_id, value FROM model.prediction
WHERE label_set_id = :s AND position = :p AND checkpoint_id IS NOT DISTINCT FROM CAST(:c AS integer)
  AND head = :head AND inputs = :inputs AND split = 'held_out'
  AND horizon_days IS NOT DISTINCT FROM CAST(:h AS integer)
ORDER BY cohort_member_id
"""


def read_predictions(
    connection: Connection,
    label_set_id: int,
    position: int,
    *,
    checkpoint_id: int | None,
    head: str,
    inputs: str,
    horizon_days: int | None = None,
) -> dict[int, float]:
    """Held-out predictions of one task: cohort_member_id → value."""
    from sqlalchemy import text

    given = {"s": label_set_id, "p": position, "c": checkpoint_id, "head": head, "inputs": inputs, "h": horizon_days}
    return {int(member): float(value) for member, value in connection.execute(text(_PREDICTIONS), given)}


def newest_evaluated(connection: Connection) -> str | None:
    """Name of the label set that was evaluated last, as `NAME` or `NAME@version`; None where none was."""
    from sqlalchemy import text

    return connection.execute(
        text(
            "SELECT CASE WHEN s.is_current THEN s.name ELSE s.name || '@' || s.version END "
            "FROM model.metric m JOIN label.label_set s USING (label_set_id) ORDER BY m.metric_id DESC LIMIT 1"
        )
    ).scalar()


_CURVE = """
SELECT t.step, t.name, t.epoch, t.value FROM ops.training_step t
WHERE t.job_id = :j AND t.name IN ('train_loss', 'tuning_loss', 'tuning_gain') ORDER BY t.name, t.step
"""


def read_training(connection: Connection, checkpoint_ids: Sequence[int]) -> list[dict[str, Any]]:
    """Checkpoints with their loss curves: their columns, and `curve`, a list of {step, name, epoch, value}."""
    from sqlalchemy import text

    rows = connection.execute(
        text(
            "SELECT checkpoint_id, name, left(sha256, 12) AS sha256, arm, encoder, width, seed, step, num_steps, "
            "shuffled, validation, recipe, code_version, created_at, job_id FROM model.checkpoint "
            "WHERE checkpoint_id = ANY(:ids) ORDER BY checkpoint_id"
        ),
        {"ids": list(checkpoint_ids)},
    ).mappings()
    found = [dict(row) for row in rows]
    for row in found:
        curve = connection.execute(text(_CURVE), {"j": row["job_id"]}).mappings() if row["job_id"] else ()
        row["curve"] = [dict(point) for point in curve]
    return found


def read_cohort(connection: Connection, cohort_id: int) -> dict[str, Any]:
    """A cohort with its attrition, its members by split and how many of its scans no encoder could read."""
    from sqlalchemy import text

    row = connection.execute(
        text(
            "SELECT name, version, follow_up, data_cut, attrition, definition, created_at FROM label.cohort "
            "WHERE cohort_id = :c"
        ),
        {"c": cohort_id},
    ).mappings()
    splits = connection.execute(
        text(
            "SELECT split, count(*) AS scans, count(DISTINCT person_id) AS persons, "
            "count(*) FILTER (WHERE eligible) AS eligible FROM label.cohort_member WHERE cohort_id = :c GROUP BY split "
            "ORDER BY array_position('{train,tuning,held_out}', split)"
        ),
        {"c": cohort_id},
    ).mappings()
    unreadable = connection.execute(
        text("SELECT coalesce(max(num_failed), 0) FROM model.embedding_set WHERE cohort_id = :c"), {"c": cohort_id}
    ).scalar_one()
    return {**row.one(), "splits": [dict(split) for split in splits], "unreadable": int(unreadable)}


def add_report(connection: Connection, *, name: str, path: str, sha256: str, job_id: int | None) -> int:
    """Insert a row of model.report; its key."""
    from sqlalchemy import insert

    from app.schema.model import Report

    values = {"name": name, "path": path, "sha256": sha256, "job_id": job_id}
    return int(connection.execute(insert(Report).values(**values).returning(Report.report_id)).scalar_one())
