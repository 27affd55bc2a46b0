"""The piecewise exponential loss as its definition reads: every scan, piece and task with its own exposure."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Pieces:
    """Time at risk and outcome in each piece, ready for the loss."""

    exposure_BPK: Tensor
    """Days at risk inside the piece, from the opening of the risk window; 0 once follow-up has ended."""
    event_BPK: Tensor
    """1 in the one piece in which the outcome was observed, else 0."""


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


def piecewise_exponential(log_hazard_BPK: Tensor, pieces: Pieces) -> Tensor:
    """(B,) Σ exp(l)·exposure − event·l, in nats."""
    return (log_hazard_BPK.exp() * pieces.exposure_BPK - pieces.event_BPK * log_hazard_BPK).sum((1, 2))
