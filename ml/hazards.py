"""Piecewise-constant hazards: where pieces of time begin and end, and a follow-up cut into them.

Shape suffixes: B = scan, P = piece, K = task. Times are days from the index; a piece is (start, end].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

OPEN = float("inf")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pieces:
    """Time at risk and outcome in each piece, ready for the loss."""

    exposure_BPK: Tensor
    """Days at risk inside the piece, from the opening of the risk window; 0 once follow-up has ended."""
    event_BPK: Tensor
    """1 in the one piece in which the outcome was observed, else 0."""


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


def cut(time_BK: Tensor, start_BK: Tensor, event_BK: Tensor, at_risk_BK: Tensor, edges: Tensor) -> Pieces:
    """Cut each follow-up at `edges`.

    Args:
        time_BK: days from the index to outcome or end of follow-up.
        start_BK: opening of the risk window, days from the index, 0 or later.
        event_BK: True where the outcome was observed.
        at_risk_BK: False for cells that carry nothing (prior, ineligible).
        edges: (P + 1,) from `choose_edges`.
    """
    start_1P1, end_1P1 = edges[:-1].view(1, -1, 1), edges[1:].view(1, -1, 1)
    time_B1K, from_B1K = time_BK.unsqueeze(1), start_BK.unsqueeze(1)
    exposure_BPK = (time_B1K.minimum(end_1P1) - from_B1K.maximum(start_1P1)).clamp(min=0)
    inside_BPK = (start_1P1 < time_B1K) & (time_B1K <= end_1P1)
    event_BPK = inside_BPK & (event_BK & at_risk_BK).unsqueeze(1)
    return Pieces(exposure_BPK=exposure_BPK * at_risk_BK.unsqueeze(1), event_BPK=event_BPK.to(exposure_BPK.dtype))


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
