"""Rows of model.metric as tables: tasks down, what was judged across."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from app.report.rows import Part

Row = Mapping[str, Any]

METRIC_TITLES = {
    "harrell_c": "Harrell's C",
    "uno_c": "Uno's C",
    "auroc": "AUROC",
    "ibs_skill": "Brier skill (1 − IBS / IBS of Kaplan–Meier)",
    "ibs": "Integrated Brier score (smaller is better)",
}
INPUT_TITLES = {
    "voxels": "mean and SD of the voxels",
    "age+sex": "age + sex",
    "truth": "true hazard",
    "truth-image": "true hazard, as far as the image shows it",
}
HEAD_TITLES = {"cox": "Cox"}
FLAG_MARKS = {
    "few_events": ("†", "fewer than 50 events"),
    "untuned": ("‡", "too few tuning events to choose a penalty: the default was taken"),
    "interval_not_estimable": ("§", "too many resamples leave it undefined for an interval"),
}
MEAN = "mean over tasks"


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """One thing judged: a model, or a difference of two."""

    title: str
    inputs: str
    order: tuple[Any, ...]
    is_difference: bool
    trained: bool
    """True where the image model has been trained."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One number with its interval."""

    value: float | None
    low: float | None
    high: float | None
    marks: str
    reason: str | None
    is_difference: bool

    @property
    def text(self) -> str:
        if self.value is None:
            return "n. e."
        return number(self.value, signed=self.is_difference)

    @property
    def interval(self) -> str:
        if self.low is None or self.high is None:
            return ""
        signed = self.is_difference
        return f"{number(self.low, signed=signed)} to {number(self.high, signed=signed)}"

    @property
    def decided(self) -> str:
        """`above` or `below` where the interval of a difference leaves zero out."""
        if not self.is_difference or self.low is None or self.high is None:
            return ""
        return "above" if self.low > 0 else "below" if self.high < 0 else ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A metric over tasks (down) and models (across)."""

    metric: str
    head: str
    horizon_days: int | None
    columns: Sequence[Column]
    rows: Sequence[tuple[str, Sequence[Cell | None]]]

    @property
    def title(self) -> str:
        horizon = f" at {self.horizon_days:,} days" if self.horizon_days is not None else ""
        return f"{METRIC_TITLES.get(self.metric, self.metric)}{horizon}, {HEAD_TITLES.get(self.head, self.head)} head"

    def only(self, *inputs: str) -> Table:
        """The same with the columns of some inputs."""
        kept = [k for k, one in enumerate(self.columns) if one.inputs in inputs]
        return replace(
            self,
            columns=[self.columns[k] for k in kept],
            rows=[(name, [cells[k] for k in kept]) for name, cells in self.rows],
        )

    @property
    def alone(self) -> Table:
        """The image alone, beside what needs no image and what is best possible."""
        return self.only("voxels", "age+sex", "image", "truth-image", "truth")

    @property
    def beside(self) -> Table:
        """What the image adds to age and sex."""
        return self.only("age+sex", "age+sex+image")


def number(value: float, *, signed: bool = False) -> str:
    """Three decimals, a true minus sign."""
    rounded = round(value, 3) + 0.0  # no minus before zero
    text = f"{rounded:+.3f}" if signed and rounded else f"{rounded:.3f}"
    return text.replace("-", "−")


def column(row: Row) -> Column:
    """The column a metric row belongs to."""
    inputs, name, reference = row["inputs"], row["checkpoint"], row["reference"]
    what = str(INPUT_TITLES.get(inputs, inputs))
    title = what if name is None else str(name) if inputs == "image" else f"{name} + age + sex"
    difference = reference is not None or row["reference_inputs"] is not None
    if reference is not None:
        title = f"{title} − {reference}"
    elif difference:
        title = f"{title} − {INPUT_TITLES.get(row['reference_inputs'], row['reference_inputs'])}"
    ranks = ("voxels", "age+sex", "image", "age+sex+image", "truth-image", "truth")
    rank = ranks.index(inputs) if inputs in ranks else len(ranks)
    trained = row["arm"] not in (None, "untrained", "base")
    order = (rank if rank != 3 else 2.5, trained, row["checkpoint_id"] or 0, difference, reference or "")
    return Column(title=title, inputs=inputs, order=order, is_difference=difference, trained=trained)


def cell(row: Row) -> Cell:
    """A metric row as it stands in a table."""
    marks = "".join(mark for flag, (mark, _) in FLAG_MARKS.items() if flag in row["flags"])
    return Cell(
        value=row["value"],
        low=row["ci_low"],
        high=row["ci_high"],
        marks=marks,
        reason=row["reason"],
        is_difference=row["reference"] is not None or row["reference_inputs"] is not None,
    )


def latest(metrics: Sequence[Row]) -> list[Row]:
    """Rows of all scans (no subgroup)."""
    return [row for row in metrics if row["subgroup"] is None]


def estimable_tasks(part: Part) -> list[str]:
    """Tasks with at least one value, in the label set's order."""
    known = {row["task"] for row in latest(part.metrics) if row["value"] is not None}
    return [task.name for task in part.tasks if task.name in known]


def tables(part: Part) -> list[Table]:
    """Every metric that has at least one value; the primary one first."""
    grouped: dict[tuple[str, str, int | None], list[Row]] = {}
    for row in latest(part.metrics):
        # true hazards stand beside the Cox heads
        head = "cox" if row["head"] == "given" else row["head"]
        metric = row["metric"].removeprefix("mean_")
        grouped.setdefault((metric, head, row["horizon_days"]), []).append(row)
    order = list(METRIC_TITLES)
    keys = sorted(
        grouped,
        key=lambda k: (order.index(k[0]) if k[0] in order else len(order), k[1], k[2] if k[2] is not None else 0),
    )
    return [made for key in keys if (made := table(part, *key, grouped[key])) is not None]


def silent(part: Part) -> list[tuple[str, str]]:
    """Metrics without a value in any of the estimable tasks: (title, why)."""
    shown = {(t.metric, t.head, t.horizon_days) for t in tables(part)}
    known = set(estimable_tasks(part))
    reasons: dict[tuple[str, str, int | None], str] = {}
    for row in latest(part.metrics):
        head = "cox" if row["head"] == "given" else row["head"]
        key = (row["metric"], head, row["horizon_days"])
        if row["task"] in known and key not in shown and row["reason"]:
            reasons.setdefault(key, row["reason"])
    return [
        (Table(metric=metric, head=head, horizon_days=horizon, columns=(), rows=()).title, reason)
        for (metric, head, horizon), reason in reasons.items()
    ]


def table(part: Part, metric: str, head: str, horizon: int | None, rows: Sequence[Row]) -> Table | None:
    """One metric; None where no task has a value."""
    columns = sorted({column(row) for row in rows}, key=lambda c: c.order)
    cells = {(row["task"], column(row).title): cell(row) for row in rows}
    titles = {task.name: task.title for task in part.tasks}
    lines: list[tuple[str, Sequence[Cell | None]]] = []
    for name in [*estimable_tasks(part), None]:
        line = [cells.get((name, c.title)) for c in columns]
        if any(one is not None and one.value is not None for one in line):
            lines.append((MEAN if name is None else titles.get(name, name), line))
    if not lines:
        return None
    return Table(metric=metric, head=head, horizon_days=horizon, columns=columns, rows=lines)


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """A task that cannot be judged."""

    title: str
    train_events: int
    held_out_events: int
    held_out_free: int
    reason: str


def refusals(part: Part) -> list[Refusal]:
    """Tasks without a single value, with their counts and why."""
    known = set(estimable_tasks(part))
    found = []
    for task in part.tasks:
        if task.name in known:
            continue
        reasons = [row["reason"] for row in latest(part.metrics) if row["task"] == task.name and row["reason"]]
        found.append(
            Refusal(
                title=task.title,
                train_events=task.count("train", "event"),
                held_out_events=task.count("held_out", "event"),
                held_out_free=task.count("held_out", "censored", "competing"),
                reason=reasons[0] if reasons else "not judged",
            )
        )
    return found


def find(
    part: Part,
    metric: str,
    *,
    inputs: str,
    task: str | None = None,
    head: str = "cox",
    arm: Sequence[str] | None = None,
) -> list[Row]:
    """Rows of a metric that are no difference, newest last."""
    return [
        row
        for row in latest(part.metrics)
        if row["metric"] == metric
        and row["inputs"] == inputs
        and row["task"] == task
        and row["head"] == head
        and row["reference"] is None
        and row["reference_inputs"] is None
        and (arm is None or row["arm"] in arm)
    ]


def differences(part: Part, metric: str, task: str | None = None) -> list[Row]:
    """Paired differences of image-only Cox heads between checkpoints."""
    return [
        row
        for row in latest(part.metrics)
        if row["metric"] == metric and row["inputs"] == "image" and row["head"] == "cox" and row["task"] == task
        and row["reference"] is not None
    ]  # fmt: skip


def gap_closed(part: Part, difference: Row) -> float | None:
    """Share of (what the image could show − reference) that the difference closes; None where unknown or no gap."""
    best = find(part, "mean_harrell_c", inputs="truth-image", head="given")
    base = [r for r in find(part, "mean_harrell_c", inputs="image") if r["checkpoint"] == difference["reference"]]
    if not best or not base or None in (best[-1]["value"], base[-1]["value"], difference["value"]):
        return None
    gap = float(best[-1]["value"]) - float(base[-1]["value"])
    return float(difference["value"]) / gap if gap > 0.01 else None


def summary(part: Part) -> list[dict[str, str]]:
    """Mean Harrell's C of what was judged, one row each, for a terminal.

    Keys grow in length, since that is the order in which jsonb gives them back.
    """
    wanted = [
        ("image, {}", find(part, "mean_harrell_c", inputs="image")),
        ("difference, {}", differences(part, "mean_harrell_c")),
        ("voxels: mean and SD", find(part, "mean_harrell_c", inputs="voxels")),
        ("age + sex", find(part, "mean_harrell_c", inputs="age+sex")),
        ("true hazard, as far as the image shows", find(part, "mean_harrell_c", inputs="truth-image", head="given")),
        ("true hazard", find(part, "mean_harrell_c", inputs="truth", head="given")),
    ]
    lines = []
    for title, rows in wanted:
        for row in sorted(rows, key=lambda r: column(r).order):
            shown = cell(row)
            lines.append(
                {
                    "set": part.label_set,
                    "inputs": title.format(column(row).title),
                    "mean C": shown.text if shown.value is not None else "not estimable",
                    "95 % interval": shown.interval or "-",
                    "estimable tasks": str(len(estimable_tasks(part))),
                }
            )
    return lines


def readable(reason: str) -> str:
    """A stored reason as a sentence."""
    code, _, detail = reason.partition(": ")
    return f"{re.sub('_', ' ', code)}: {detail}" if detail else re.sub("_", " ", code)
