"""What a page is made of: plain rows and short lists of numbers, so that it can be written without arrays or models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SMALL_CELL = 11
"""Counts from 1 to 10 of persons are not shown."""

NOT_AN_EVALUATION = {
    "arbitrary_pairing": "scans were paired with persons arbitrarily: no number here says what an image foretells",
    "shared_volumes": "scans of different persons have the same content, so train and held out may share volumes",
    "shuffled": "volumes were permuted among persons before training: this is a control",
}
"""Flag → why a section is not an evaluation."""

SIMULATED = "simulated: every person, scan and outcome here was made by a random number generator"


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskRow:
    """A task and its scans: status counts by split, as label.task_count has them."""

    name: str
    title: str
    horizons_days: Sequence[int]
    counts: Mapping[tuple[str, str], int]
    """(split, status) → scans."""

    def count(self, split: str, *statuses: str) -> int:
        """Scans of a split that have one of the statuses."""
        return sum(self.counts.get((split, status), 0) for status in statuses)


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """Kaplan–Meier of one group: a step function from 1, and the numbers at risk under the axis."""

    label: str
    times: Sequence[float]
    """Days."""
    survival: Sequence[float]
    at_risk: Sequence[int]
    """At the panel's `marks`."""
    n: int
    num_events: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CurvePanel:
    """Curves by predicted-risk group of one checkpoint in one task, lowest risk first."""

    title: str
    marks: Sequence[float]
    """Days at which numbers at risk stand."""
    curves: Sequence[Curve]


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """Predicted against observed risk of one group."""

    predicted: float
    observed: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationPanel:
    """Calibration of one checkpoint in one task at one horizon."""

    title: str
    horizon_days: int
    points: Sequence[Point]


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskPanels:
    """What is drawn of one task."""

    name: str
    title: str
    curves: Sequence[CurvePanel]
    calibrations: Sequence[CalibrationPanel]


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelRows:
    """What is drawn of the labels themselves, as `app.store.plots` reads it."""

    by_arm: Sequence[Mapping[str, Any]]
    by_task: Sequence[Mapping[str, Any]]
    followed: Sequence[Mapping[str, Any]]
    incidences: Mapping[str, Mapping[str, Any]]
    """Task title → group → curves with death competing and with death censored."""
    follow_up_days: Sequence[float]
    """0th to 100th percentile of follow-up of eligible scans; empty where there is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """All that is known of one label set."""

    label_set: str
    version: int
    kind: str
    task_set: str
    cohort: Mapping[str, Any]
    """name, version, follow_up, data_cut, attrition, splits."""
    flags: Sequence[str]
    """simulated, arbitrary_pairing, shared_volumes."""
    metrics: Sequence[Mapping[str, Any]]
    """Rows of model.metric, with `checkpoint` and `reference` names."""
    tasks: Sequence[TaskRow]
    """Those judged."""
    num_tasks: int
    """Tasks of the label set, judged or not."""
    panels: Sequence[TaskPanels] = ()
    labels: LabelRows | None = None
    training: Sequence[Mapping[str, Any]] = ()
    """Checkpoints with `curve`."""

    @property
    def simulated(self) -> bool:
        return "simulated" in self.flags

    @property
    def warnings(self) -> list[str]:
        """Why this is not an evaluation, one sentence each."""
        return [text for flag, text in NOT_AN_EVALUATION.items() if flag in self.flags]


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """A report."""

    name: str
    made_at: str
    parts: Sequence[Part]
    versions: Mapping[str, str] = field(default_factory=dict)
