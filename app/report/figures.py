"""Figures as inline SVG: text stays text, nothing is fetched, the same rows draw the same bytes."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from app.report.rows import SMALL_CELL, CalibrationPanel, CurvePanel, TaskPanels
from app.report.tables import Column, Table

INK, FAINT, GRID = "#1f2933", "#7b8794", "#e4e7eb"
COLOURS = ("#3a7ca5", "#e0a458", "#b3423a", "#5b8c5a", "#7a5195", "#8d6e63")
RISK = ("#3a7ca5", "#e0a458", "#b3423a")

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lachesis",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def svg(figure: Figure, title: str) -> str:
    """A figure as one `<svg>` element with a title, without metadata or links."""
    stream = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(stream, format="svg", metadata={"Date": None}, transparent=True)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    escaped = title.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return re.sub(r"<svg ", f'<svg role="img" aria-label="{escaped}" ', text, count=1)


def blank(width: float, height: float) -> Figure:
    """An empty figure, inches."""
    return Figure(figsize=(width, height), layout="constrained")


def _look(columns: Sequence[Column]) -> list[dict[str, Any]]:
    """Colour and marker of each model: what needs no image is grey, the untrained amber, the trained blue to violet."""
    trained = iter(("#2f6f97", "#5b8c5a", "#7a5195", "#b3423a", "#8d6e63"))
    fixed = {
        "voxels": {"color": "#b8c2cc", "marker": "s"},
        "age+sex": {"color": "#7b8794", "marker": "D"},
        "truth-image": {"color": INK, "marker": "|"},
        "truth": {"color": INK, "marker": "x"},
    }
    looks = []
    for column in columns:
        trained_look = {"color": next(trained, "#2f6f97"), "marker": "o"} if column.trained else None
        looks.append(fixed.get(column.inputs) or trained_look or {"color": "#d99536", "marker": "o"})
    return looks


def forest(table: Table) -> str:
    """Values with intervals, tasks down, the mean first; differences are left to the table."""
    shown = [k for k, column in enumerate(table.columns) if not column.is_difference]
    looks = _look([table.columns[k] for k in shown])
    lines = [(name, [cells[k] for k in shown]) for name, cells in reversed(table.rows)]
    lines = [lines[0], *reversed(lines[1:])]
    with matplotlib.rc_context(STYLE):
        figure = blank(8.6, 1.1 + len(lines) * (0.16 * len(shown) + 0.2))
        axes = figure.subplots()
        centres = []
        y = 0.0
        for number, (_, cells) in enumerate(lines):
            begin = y
            for look, one in zip(looks, cells, strict=True):
                if one is not None and one.value is not None:
                    if one.low is not None and one.high is not None:
                        axes.plot([one.low, one.high], [y, y], color=look["color"], lw=1.6, solid_capstyle="round")
                    axes.plot([one.value], [y], ls="", ms=5, **look)
                y += 1
            centres.append((begin + y - 1) / 2)
            if number == 0:
                axes.axhspan(begin - 0.9, y - 0.1, color="#f3f6f9", lw=0, zorder=0)
            y += 1.2
        axes.axvline(0.5, color=FAINT, lw=0.8, ls=(0, (3, 3)))
        axes.set_yticks(centres, [name for name, _ in lines])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.grid(axis="y", visible=False)
        axes.set_ylim(y - 1.2, -1)
        axes.set_xlabel(table.title)
        for look, place in zip(looks, shown, strict=True):
            axes.plot([], [], lw=1.6, ms=5, label=table.columns[place].title, **look)
        figure.legend(loc="outside upper left", ncols=3)
        return svg(figure, f"{table.title} by task, with 95 % intervals")


def task(panels: TaskPanels) -> str:
    """Curves by risk group, and calibration, side by side."""
    total = len(panels.curves) + len(panels.calibrations)
    with matplotlib.rc_context(STYLE):
        figure = blank(max(4.4, 3.5 * total), 3.8)
        axes = figure.subplots(1, total, squeeze=False)[0]
        for one, panel in zip(axes, panels.curves, strict=False):
            _curves(one, panel, _floor(panels.curves))
        for one, points in zip(axes[len(panels.curves) :], panels.calibrations, strict=True):
            _calibration(one, points)
        return svg(figure, f"{panels.title}: survival by predicted risk, and calibration")


def _curves(axes: Axes, panel: CurvePanel, floor: float) -> None:
    """Kaplan–Meier curves with numbers at risk below, in their colours; small cells are not shown."""
    colours = RISK if len(panel.curves) == 3 else COLOURS
    end = panel.marks[-1] if len(panel.marks) and panel.marks[-1] > 0 else 1.0
    below = axes.get_xaxis_transform()
    for row, (colour, curve) in enumerate(zip(colours, panel.curves, strict=False)):
        if curve.n >= SMALL_CELL:
            axes.step([0, *curve.times], [1, *curve.survival], where="post", color=colour, lw=1.7, label=curve.label)
        for mark, count in zip(panel.marks, curve.at_risk, strict=True):
            shown = str(count) if count >= SMALL_CELL or count == 0 else f"<{SMALL_CELL}"
            place = -0.12 - 0.065 * row
            axes.text(mark, place, shown, color=colour, transform=below, ha="center", va="top", fontsize=7.5)
    axes.set_title(panel.title)
    axes.set_ylim(floor, 1.005)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlim(0, end)
    axes.set_xticks(list(panel.marks), [f"{mark:,.0f}" for mark in panel.marks])
    axes.set_xlabel("days from the scan, and scans still followed", labelpad=7 + 12 * len(panel.curves))
    axes.legend(loc="lower left")


def _floor(panels: Sequence[CurvePanel]) -> float:
    """Where the shared survival axis begins: a tenth below the lowest curve."""
    lowest = [value for panel in panels for curve in panel.curves for value in curve.survival]
    return max(0.0, int(min([0.9, *lowest]) * 10) / 10 - 0.1)


def _calibration(axes: Axes, panel: CalibrationPanel) -> None:
    """Observed against predicted risk; a group is as wide as its ties make it."""
    shown = [p for p in panel.points if p.n >= SMALL_CELL]
    top = max([0.05, *(p.high for p in shown), *(p.predicted for p in shown)]) * 1.05
    axes.plot([0, top], [0, top], color=FAINT, lw=0.9, ls=(0, (3, 3)))
    for p in shown:
        axes.plot([p.predicted, p.predicted], [p.low, p.high], color=COLOURS[0], lw=1.4)
    axes.plot([p.predicted for p in shown], [p.observed for p in shown], "o", color=COLOURS[0], ms=4.5)
    axes.set_xlim(0, top)
    axes.set_ylim(0, top)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
        axis.set_major_locator(MaxNLocator(5))
    axes.set_title(panel.title)
    axes.set_xlabel(f"predicted risk by {panel.horizon_days:,} days")
    axes.set_ylabel("observed (1 − Kaplan–Meier)")


def training(checkpoints: Sequence[Mapping[str, Any]]) -> str | None:
    """Loss a step and gain over the null model; None where nothing was trained."""
    drawn = [c for c in checkpoints if c["curve"]]
    if not drawn:
        return None
    with matplotlib.rc_context(STYLE):
        figure = blank(8.6, 2.9)
        left, right = figure.subplots(1, 2)
        for k, checkpoint in enumerate(drawn):
            colour = COLOURS[k % len(COLOURS)]
            for name, style in (("train_loss", {"lw": 0.9, "alpha": 0.55}), ("tuning_loss", {"lw": 1.8})):
                points = [(p["step"], p["value"]) for p in checkpoint["curve"] if p["name"] == name]
                if points:
                    label = f"{checkpoint['name']}, {name.removesuffix('_loss')}"
                    left.plot(*zip(*points, strict=True), color=colour, label=label, **style)
            gain = [(p["step"], p["value"]) for p in checkpoint["curve"] if p["name"] == "tuning_gain"]
            if gain:
                right.plot(*zip(*gain, strict=True), color=colour, lw=1.8, marker="o", ms=3, label=checkpoint["name"])
        right.axhline(0, color=FAINT, lw=0.8, ls=(0, (3, 3)))
        left.set_title("Loss, nats per event")
        right.set_title("Gain over the null model on tuning, nats per event")
        for axes in (left, right):
            axes.set_xlabel("optimiser step")
            if axes.get_legend_handles_labels()[0]:
                axes.legend()
        return svg(figure, "Loss curves of pretraining")
