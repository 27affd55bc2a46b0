"""Rows as the store gives them, made by hand: what a page is built from."""

from __future__ import annotations

from typing import Any

from app.report import rows

REFUSED = "too_few_events: 4 held out, 20 needed"


def metric(task: str | None, value: float | None, **change: Any) -> dict[str, Any]:
    """A row of model.metric with the names of its checkpoints."""
    name = change.get("metric", "harrell_c")
    row = {
        "checkpoint_id": 2, "checkpoint": "tiny-tte", "reference_checkpoint_id": None, "reference": None, "head": "cox",
        "inputs": "image", "reference_inputs": None, "task": task, "metric": name, "horizon_days": None,
        "subgroup": None, "arm": "tte", "value": value, "ci_low": None if value is None else value - 0.04,
        "ci_high": None if value is None else value + 0.04, "n": 200, "num_persons": 200, "num_events": 60,
        "replicates": 1000, "shared_volumes": 0, "flags": [], "reason": None if value is not None else REFUSED,
        "seed": 0,
    }  # fmt: skip
    return {**row, **change}


UNTRAINED = {"checkpoint_id": 1, "checkpoint": "tiny-untrained", "arm": "untrained"}
NOBODY = {"checkpoint_id": None, "checkpoint": None, "arm": None}


def task_metrics(task: str | None, value: float | None) -> list[dict[str, Any]]:
    """Everything about one task, or about the mean (None)."""
    name = "harrell_c" if task is not None else "mean_harrell_c"
    lower = None if value is None else value - 0.1
    difference = None if value is None else 0.1
    return [
        metric(task, value, metric=name),
        metric(task, lower, metric=name, **UNTRAINED),
        metric(task, difference, metric=name, reference_checkpoint_id=1, reference="tiny-untrained"),
        metric(task, lower, metric=name, inputs="age+sex", **NOBODY),
        metric(task, value, metric=name, inputs="age+sex+image"),
        metric(task, difference, metric=name, inputs="age+sex+image", reference_inputs="age+sex"),
        metric(task, lower, metric=name, inputs="voxels", **NOBODY),
        metric(task, value and value + 0.1, metric=name, head="given", inputs="truth-image", **NOBODY),
        metric(task, value and value + 0.1, metric=name, head="given", inputs="truth", **NOBODY),
    ]


def task_row(name: str, events: int = 60) -> rows.TaskRow:
    counts = {("train", "event"): 3 * events, ("tuning", "event"): events, ("held_out", "event"): events}
    return rows.TaskRow(
        name=name, title=f"Task {name}", horizons_days=[365], counts={**counts, ("held_out", "censored"): 140}
    )


def panels(name: str) -> rows.TaskPanels:
    """Three risk groups, the highest of which is small at the end."""
    curves = [
        rows.Curve(
            label=f"group {k}", times=[100, 400, 900], survival=[0.9 - 0.2 * k, 0.8 - 0.2 * k, 0.7 - 0.2 * k],
            at_risk=[60, 40, (30, 12, 7)[k]], n=60, num_events=20,
        )
        for k in range(3)
    ]  # fmt: skip
    points = [
        rows.Point(predicted=0.1, observed=0.12, low=0.05, high=0.2, n=90),
        rows.Point(predicted=0.45, observed=0.4, low=0.3, high=0.5, n=9),
    ]
    return rows.TaskPanels(
        name=name,
        title=f"Task {name}",
        curves=[rows.CurvePanel(title="tiny-tte", marks=[0, 450, 900], curves=curves)],
        calibrations=[rows.CalibrationPanel(title="Calibration", horizon_days=365, points=points)],
    )


CURVE = [{"time_days": 10.0 * k, "at_risk": 100 - k, "incidence": k / 100} for k in range(100)]


def part(estimable: int = 1, refused: int = 0, **change: Any) -> rows.Part:
    """A label set with so many estimable tasks and so many others."""
    known = [f"a{k}" for k in range(estimable)]
    others = [f"z{k}" for k in range(refused)]
    metrics = [row for name in known for row in task_metrics(name, 0.65)]
    metrics += [row for name in others for row in task_metrics(name, None)]
    metrics += task_metrics(None, 0.65 if known else None)
    curve = [{"step": s, "name": n, "epoch": 0, "value": 1 / s} for s in (1, 2) for n in ("train_loss", "tuning_gain")]
    training = {
        "checkpoint_id": 2, "name": "tiny-tte", "sha256": "abc", "arm": "tte", "encoder": "tiny", "width": 64,
        "seed": 0, "step": 2, "num_steps": 2, "shuffled": False, "code_version": "0.1.0", "curve": curve,
    }  # fmt: skip
    given: dict[str, Any] = {
        "label_set": "outcomes", "version": 1, "kind": "clinical", "task_set": "outcomes", "flags": ["simulated"],
        "cohort": {"name": "chest", "version": 1, "follow_up": "observation_period", "data_cut": None,
                   "attrition": [{"step": "scans loaded", "scans": 900, "persons": 800}],
                   "splits": [{"split": "held_out", "scans": 200, "persons": 200, "eligible": 190}], "unreadable": 0},
        "metrics": metrics, "tasks": [*map(task_row, known), *(task_row(name, 4) for name in others)],
        "num_tasks": estimable + refused, "panels": [panels(name) for name in known], "training": [training],
        "labels": rows.LabelRows(
            by_arm=[{"arm": "tte", "outcomes": k, "scans": 50} for k in (0, 2)],
            by_task=[{"position": 0, "task": "bleed", "title": "Bleed", "events": 100}],
            followed=[{"split": "train", "days": k, "scans": 1, "deaths": 0} for k in range(100)],
            incidences={"Bleed": {"all scans": (CURVE, CURVE)}},
            follow_up_days=[float(k) for k in range(101)],
        ),
    }  # fmt: skip
    return rows.Part(**{**given, **change})
