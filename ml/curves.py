"""What a page draws of predictions: survival by risk group, and predicted against observed risk at a horizon.

Shape suffixes: N = scan, T = distinct time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ml.metrics import INTERVAL, Outcomes, draw_persons
from ml.pairs import risk_ranks
from ml.survival import Floats, StepCurve, kaplan_meier

REPLICATES = 200
"""Of the intervals drawn; a picture needs no more."""


def risk_groups(risk: Floats, groups: int) -> NDArray[np.int64]:
    """(N,) group from 0 (lowest risk), as near to equal sizes as ties allow: equal risks share a group.

    Groups may thus be of unequal size, or fewer than asked for.
    """
    ranks = risk_ranks(risk)
    size = np.bincount(ranks)[1:]
    middle = np.cumsum(size) - size / 2  # a tied block goes where its middle lies
    cut = np.minimum((middle * groups / len(risk)).astype(np.int64), groups - 1)
    _, dense = np.unique(cut, return_inverse=True)
    return np.asarray(dense[ranks - 1], np.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupCurve:
    """Kaplan–Meier of one risk group."""

    group: int
    """0 is the lowest risk."""
    curve: StepCurve
    n: int
    num_events: int

    def at_risk(self, time: Floats) -> NDArray[np.int64]:
        """Scans still followed at each of the times."""
        after = np.concatenate((self.curve.at_risk, [0.0]))
        return np.asarray(after[np.searchsorted(self.curve.times, time, "left")], np.int64)


def group_curves(outcomes: Outcomes, risk: Floats, groups: int = 3) -> list[GroupCurve]:
    """Kaplan–Meier by predicted-risk group, lowest risk first; competing events censor."""
    group = risk_groups(risk, groups)
    return [
        GroupCurve(
            group=int(g),
            curve=kaplan_meier(outcomes.time[group == g], outcomes.event[group == g]),
            n=int((group == g).sum()),
            num_events=int(outcomes.event[group == g].sum()),
        )
        for g in np.unique(group)
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationPoint:
    """Predicted against observed risk in one group."""

    predicted: float
    """Mean predicted risk by the horizon."""
    observed: float
    """1 − Kaplan–Meier at the horizon."""
    low: float
    high: float
    """95 % interval of the observed risk, bootstrap by person."""
    n: int
    num_events: int
    """Events by the horizon."""


def calibration(
    outcomes: Outcomes, predicted: Floats, horizon_days: float, groups: int, seed: int = 0
) -> list[CalibrationPoint]:
    """Predicted against observed net risk by the horizon, in groups of predicted risk, lowest first.

    Args:
        outcomes: N scans; competing events censor, as net predictions mean it.
        predicted: (N,) net risk by the horizon.
        horizon_days: days from the index, within follow-up.
        groups: how many, at most.
        seed: of the bootstrap.
    """
    group = risk_groups(predicted, groups)
    persons, person = np.unique(outcomes.person, return_inverse=True)
    drawn = draw_persons(len(persons), REPLICATES, seed)
    points = []
    for g in np.unique(group):
        rows = np.flatnonzero(group == g)
        time, event = outcomes.time[rows], outcomes.event[rows]
        replicates = [
            1.0 - float(kaplan_meier(time, event, weights).at(horizon_days))
            for weights in drawn[person[rows]].T
            if weights.any()
        ]
        low, high = np.percentile(replicates, INTERVAL)
        points.append(
            CalibrationPoint(
                predicted=float(predicted[rows].mean()),
                observed=1.0 - float(kaplan_meier(time, event).at(horizon_days)),
                low=float(low),
                high=float(high),
                n=len(rows),
                num_events=int((event & (time <= horizon_days)).sum()),
            )
        )
    return points
