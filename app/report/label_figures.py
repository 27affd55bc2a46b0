"""Figures of labels and cohorts, from the rows of `app.store.plots`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from app.report.figures import COLOURS, FAINT, STYLE, blank, svg
from app.report.rows import SMALL_CELL, LabelRows

Rows = Sequence[Mapping[str, Any]]

ARMS = {
    "tte": "outcomes after the index (tte)",
    "visit": "codes of the visit (visit)",
    "at index": "history at the index",
}
MAX_BARS = 20


def drawn(labels: LabelRows) -> list[str]:
    """The figures of a report's section on labels, as SVG."""
    made = [
        svg(draw("density", labels.by_arm), "Label density by arm"),
        svg(draw("events", labels.by_task), "Scans with an outcome by task"),
        svg(draw("follow_up", labels.followed), "Follow-up by split"),
    ]
    for title, curves in labels.incidences.items():
        made.append(svg(draw("incidence", title, curves), f"Cumulative incidence: {title}"))
    return made


def density(by_arm: Rows) -> Figure:
    """Share of scans with at most so many labels, a curve an arm (Huo et al. 2025, figure 3)."""
    figure = blank(6.4, 3.6)
    axes = figure.subplots()
    for colour, (arm, label) in zip(COLOURS, ARMS.items(), strict=False):
        points = [(row["outcomes"], row["scans"]) for row in by_arm if row["arm"] == arm]
        total = sum(scans for _, scans in points)
        if not total:
            continue
        shares = [done / total for done in accumulate(scans for _, scans in points)]
        counts = [outcomes for outcomes, _ in points]
        mean = sum(outcomes * scans for outcomes, scans in points) / total
        axes.step(
            [counts[0], *counts], [0, *shares], where="post", color=colour, lw=1.7, label=f"{label}, mean {mean:,.1f}"
        )
    _share(axes, "Share of scans with at most so many labels", "labels a scan")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="lower right")
    return figure


def events(by_task: Rows) -> Figure:
    """Scans with an outcome: all tasks by rank, and those with most by name."""
    figure = blank(9.2, max(3.2, 0.9 + 0.21 * min(len(by_task), MAX_BARS)))
    left, right = figure.subplots(1, 2)
    counts = [row["events"] for row in by_task]
    left.step(range(1, len(counts) + 1), counts, where="mid", color=COLOURS[0], lw=1.7)
    left.axhline(20, color=FAINT, lw=0.8, ls=(0, (3, 3)))
    left.annotate(
        "20: fewer cannot be estimated", (len(counts), 20), color=FAINT, fontsize=7.5, ha="right", va="bottom"
    )
    left.set_yscale("symlog", linthresh=1)
    left.set_ylim(bottom=0)
    left.set_title(f"Scans with an outcome, {len(counts):,} tasks by rank")
    left.set_xlabel("task, most events first")
    most = by_task[:MAX_BARS]
    right.barh([str(row["title"])[:44] for row in most], [row["events"] for row in most], color=COLOURS[0], height=0.65)
    right.invert_yaxis()
    right.grid(axis="y", visible=False)
    right.tick_params(axis="y", length=0, labelsize=7.5)
    right.set_title("Those with most")
    right.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    return figure


def follow_up(by_split: Rows) -> Figure:
    """Share of scans still followed, a curve a split, whatever ends it."""
    figure = blank(6.4, 3.6)
    axes = figure.subplots()
    for colour, split in zip(COLOURS, ("train", "tuning", "held_out"), strict=False):
        points = [(row["days"], row["scans"]) for row in by_split if row["split"] == split]
        total = sum(scans for _, scans in points)
        if total < SMALL_CELL:
            continue
        left = [1 - done / total for done in accumulate(scans for _, scans in points)]
        label = f"{split.replace('_', ' ')}, {total:,} scans"
        axes.step([0, *(days for days, _ in points)], [1, *left], where="post", color=colour, lw=1.7, label=label)
    _share(axes, "Share of scans still followed", "days from the scan")
    axes.set_xlim(left=0)
    axes.legend(loc="upper right")
    return figure


def incidence(title: str, curves: Mapping[str, tuple[Rows, Rows]]) -> Figure:
    """Cumulative incidence of a task: death competing (solid), and 1 − Kaplan–Meier (dashed); numbers at risk below.

    Args:
        title: the task.
        curves: group → rows of label.incidence with death competing, and with death censored.
    """
    figure = blank(6.6, 3.9 + 0.22 * len(curves))
    axes = figure.subplots()
    end = max((_end(competing) for competing, _ in curves.values()), default=1.0)
    marks = [end * k / 5 for k in range(6)]
    for row, (colour, (group, (competing, censored))) in enumerate(zip(COLOURS, curves.items(), strict=False)):
        if not competing or competing[0]["at_risk"] < SMALL_CELL:
            continue
        _step(axes, competing, end, color=colour, lw=1.7, label=f"{group}: death competing")
        _step(axes, censored, end, color=colour, lw=1.1, ls=(0, (3, 2)), label=f"{group}: 1 − Kaplan–Meier")
        for mark in marks:
            axes.text(
                mark, -0.14 - 0.065 * row, _at_risk(competing, mark), color=colour, fontsize=7.5, ha="center", va="top",
                transform=axes.get_xaxis_transform(),
            )  # fmt: skip
    _share(axes, title, "")
    axes.set_xlabel("days from the scan, and scans still at risk", labelpad=9 + 15 * len(curves))
    axes.set_xticks(marks, [f"{mark:,.0f}" for mark in marks])
    axes.set_xlim(0, end)
    highest = [r["incidence"] for pair in curves.values() for rows in pair for r in rows if r["time_days"] <= end]
    axes.set_ylim(0, min(1.02, max(highest, default=1.0) * 1.25 + 0.005))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left")
    return figure


def _step(axes: Axes, curve: Rows, end: float, **look: Any) -> None:
    shown = [row for row in curve if row["time_days"] <= end]
    axes.step([0, *(r["time_days"] for r in shown)], [0, *(r["incidence"] for r in shown)], where="post", **look)


def _end(curve: Rows) -> float:
    """The last day on which a tenth is at risk: beyond it a curve is drawn from too few."""
    most = max((row["at_risk"] for row in curve), default=0)
    return max((float(row["time_days"]) for row in curve if row["at_risk"] >= most / 10), default=1.0) or 1.0


def _at_risk(curve: Rows, day: float) -> str:
    left = next((int(row["at_risk"]) for row in curve if row["time_days"] >= day), 0)
    return f"{left:,}" if left >= SMALL_CELL or left == 0 else f"<{SMALL_CELL}"


def _share(axes: Axes, title: str, what: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(what)
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


FIGURES: dict[str, Callable[..., Figure]] = {
    "density": density,
    "events": events,
    "follow_up": follow_up,
    "incidence": incidence,
}


def draw(name: str, *args: Any) -> Figure:
    """One of `FIGURES`, in the house's style."""
    with matplotlib.rc_context(STYLE):
        return FIGURES[name](*args)
