"""Figures of trainings, from the rows of `app.store.curves`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from app.report.figures import COLOURS, FAINT, STYLE, blank

DASHES = ("-", (0, (5, 2)), (0, (2, 2)), (0, (6, 2, 1, 2)))
"""Lines of runs beyond the number of colours."""


def curves(points: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss (thin on train, thick on tuning), gain over the null model and the probe's C by epoch, a colour a run.

    Losses of several arms are of other sizes: those are drawn less their first.
    """
    with matplotlib.rc_context(STYLE):
        runs = list(dict.fromkeys(point["run"] for point in points))
        figure = blank(11.4, 3.5 + 0.2 * -(-len(runs) // 3))
        loss, gain, probe = figure.subplots(1, 3)
        is_mixed = len({point["arm"] for point in points}) > 1
        for k, run in enumerate(runs):
            look: dict[str, Any] = {"color": COLOURS[k % len(COLOURS)], "ls": DASHES[k // len(COLOURS) % len(DASHES)]}
            own = [point for point in points if point["run"] == run]
            _line(loss, own, "train_loss", less_first=is_mixed, lw=0.9, alpha=0.45, **look)
            _line(loss, own, "tuning_loss", less_first=is_mixed, lw=1.9, label=run, **look)
            for axes, name in ((gain, "tuning_gain"), (probe, "tuning_probe_c")):
                _line(axes, own, name, lw=1.9, marker="o", ms=3, label=run, **look)
        loss.set_title("Loss on train (thin) and tuning" + (", less the first" if is_mixed else ""))
        gain.set_title("Gain over the null model on tuning")
        probe.set_title("Harrell's C of the probe on tuning")
        gain.axhline(0, color=FAINT, lw=0.8, ls=(0, (3, 3)))
        probe.axhline(0.5, color=FAINT, lw=0.8, ls=(0, (3, 3)))
        for axes in (loss, gain, probe):
            axes.set_xlabel("epochs")
            axes.set_xlim(left=0)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        handles = {h.get_label(): h for axes in (loss, gain, probe) for h in axes.get_legend_handles_labels()[0]}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
        return figure


def _line(axes: Axes, points: Sequence[Mapping[str, Any]], name: str, *, less_first: bool = False, **look: Any) -> None:
    found = [(point["epoch"], point["value"]) for point in points if point["name"] == name]
    if found:
        epochs, values = zip(*found, strict=True)
        axes.plot(epochs, [value - values[0] for value in values] if less_first else values, **look)
