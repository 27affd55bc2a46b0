"""Losses in nats, always float32 or wider, whatever the encoder computes in.

Shape suffixes: B = scan, P = piece, K = task or binary label. A loss sums over its scans and divides by denominators
that the caller knows of the whole step and of the whole train split, so that neither gradient accumulation nor a batch
with few events changes its scale.
"""

from __future__ import annotations

from torch import Tensor, nn

from ml.hazards import Pieces


def piecewise_exponential(log_hazard_BPK: Tensor, pieces: Pieces) -> Tensor:
    """Negative log-likelihood of a piecewise-constant hazard a scan: (B,) Σ exp(l)·exposure − event·l, in nats.

    The survival likelihood λ^δ S of docs/science.md section 3 with log S = −Σ λ·exposure; cells without exposure and
    event carry nothing.

    Raises:
        ValueError: shapes differ.
    """
    if log_hazard_BPK.shape != pieces.exposure_BPK.shape:
        raise ValueError(
            f"Expected log-hazards of shape {tuple(pieces.exposure_BPK.shape)}, got {tuple(log_hazard_BPK.shape)}."
        )
    logits = log_hazard_BPK if log_hazard_BPK.dtype.itemsize > 4 else log_hazard_BPK.float()
    return (logits.exp() * pieces.exposure_BPK - pieces.event_BPK * logits).sum((1, 2))


def binary(logit_BK: Tensor, label_BK: Tensor, known_BK: Tensor) -> Tensor:
    """Cross-entropy a scan over its known labels: (B,) in nats.

    Args:
        logit_BK: any float.
        label_BK: 1 or 0.
        known_BK: False where the label is censored, prior or ineligible.

    Raises:
        ValueError: shapes differ.
    """
    if logit_BK.shape != label_BK.shape:
        raise ValueError(f"Expected logits of shape {tuple(label_BK.shape)}, got {tuple(logit_BK.shape)}.")
    logits = logit_BK if logit_BK.dtype.itemsize > 4 else logit_BK.float()
    each = nn.functional.binary_cross_entropy_with_logits(logits, label_BK.to(logits.dtype), reduction="none")
    return (each * known_BK).sum(1)
