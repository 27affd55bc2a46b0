"""Hazards by pieces of time: where pieces begin and end, and the model that knows the train rates alone.

Shape suffixes: B = scan, P = piece, K = task. Times are days from the index; a piece is (start, end].
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

OPEN = float("inf")


def choose_edges(event_days: NDArray[np.float64], pieces: int = 8) -> NDArray[np.float64]:
    """Edges of pieces at quantiles of event times (octiles by default), the last piece open.

    Args:
        event_days: (E,) times of observed outcomes at train scans, over all tasks.
        pieces: how many are wanted; edges closer than one day merge, so there may be fewer.

    Returns:
        (P + 1,) increasing by a day or more, from 0 to infinity.

    Raises:
        ValueError: without any event.
    """
    if event_days.size == 0:
        raise ValueError("Expected observed outcomes at train scans to choose pieces of time by, found none.")
    edges = [0.0]
    for edge in np.quantile(event_days, np.linspace(0, 1, pieces + 1)[1:-1]):
        if edge >= edges[-1] + 1:
            edges.append(float(edge))
    return np.array([*edges, OPEN])


def time_at_risk(
    opens: NDArray[np.float64], until: NDArray[np.float64], low: NDArray[np.float64], high: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Days of (opens, until] that lie inside (low, high]; shapes are broadcast."""
    days: NDArray[np.float64] = np.maximum(np.minimum(until, high) - np.maximum(opens, low), 0)
    return days


def last_day_at_risk(end_days: NDArray[np.float64], share: float = 0.1) -> float:
    """The time up to which at least `share` of the train scans are at risk: no curve is drawn beyond it.

    Args:
        end_days: (N,) days of follow-up of each train scan.
        share: smallest share still at risk.
    """
    if end_days.size == 0:
        raise ValueError("Expected the follow-up of train scans, found none.")
    return float(np.quantile(end_days, 1 - share))


def null_log_hazard(num_events: NDArray[np.float64], person_days: NDArray[np.float64]) -> NDArray[np.float64]:
    """log((events + 1/2) / (person-days + 1)): (K,) each task's constant log-hazard a day at train scans."""
    return np.log((num_events + 0.5) / (person_days + 1.0))


def null_log_odds(num_events: NDArray[np.float64], pieces_at_risk: NDArray[np.float64]) -> NDArray[np.float64]:
    """log of (events + 1/2) to (pieces lived through + 1/2): (K,) each task's constant log-odds a piece."""
    return np.log((num_events + 0.5) / (pieces_at_risk - num_events + 0.5))
