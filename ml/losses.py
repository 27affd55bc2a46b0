"""Losses in nats, always float32 or wider, whatever the encoder computes in.

Shape suffixes: B = scan, P = piece, G = rule (tasks with equal rules share one), K = task or binary label, E = cell
(scan and task) that differs from what is shared. A loss sums over its scans; denominators are of the whole step and of
the whole train split, so that neither gradient accumulation nor a batch with few events changes its scale.

Both losses over pieces are Σ f(l)·weight − event·l: f is exp and the weight days at risk for a piecewise constant
hazard; f is softplus and the weight whether the piece counts for a discrete one. Of most cells the weight is that of
their scan and rule, so no tensor of scan × piece × task holds weights or outcomes; what is kept for the backward pass
is the gradient itself, which the forward pass knows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """What multiplies f(l) of each piece, once a rule and scan, and apart for the cells that differ."""

    shared_BGP: Tensor
    rule_K: Tensor
    """(K,) rule of each task."""
    scan_E: Tensor
    task_E: Tensor
    """No pair of scan and task comes twice."""
    cell_EP: Tensor
    event_E: Tensor
    """True where the cell's outcome was observed …"""
    piece_E: Tensor
    """… in this piece."""


def _shared(weights: Weights) -> Tensor:
    """(B, P, K or 1) the shared weight of each task; one column serves all where there is one rule."""
    shared_BPG = weights.shared_BGP.transpose(1, 2)
    return shared_BPG if shared_BPG.shape[2] == 1 else shared_BPG[:, :, weights.rule_K]


class _OverPieces(torch.autograd.Function):
    """(B,) Σ f(l)·weight − event·l. Its gradient, f′(l)·weight − event, is made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, logit_BPK: Tensor, weights: Weights, discrete: bool) -> Tensor:
        f, slope = (nn.functional.softplus, torch.sigmoid) if discrete else (torch.exp, torch.exp)
        shared = _shared(weights)
        grad_BPK = slope(logit_BPK).mul_(shared)
        cell_EP = logit_BPK[weights.scan_E, :, weights.task_E]
        grad_BPK[weights.scan_E, :, weights.task_E] = slope(cell_EP) * weights.cell_EP
        if discrete:
            per_scan_B = (f(logit_BPK) * shared).sum((1, 2))
            there_EP = shared.expand_as(logit_BPK)[weights.scan_E, :, weights.task_E]
            per_scan_B.index_add_(0, weights.scan_E, (f(cell_EP) * (weights.cell_EP - there_EP)).sum(1))
        else:
            per_scan_B = grad_BPK.sum((1, 2))
        event = weights.event_E
        scan, piece, task = weights.scan_E[event], weights.piece_E[event], weights.task_E[event]
        per_scan_B.index_add_(0, scan, -logit_BPK[scan, piece, task])
        grad_BPK[scan, piece, task] -= 1
        ctx.save_for_backward(grad_BPK)
        return per_scan_B

    @staticmethod
    def backward(ctx: Any, upstream_B: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (grad_BPK,) = ctx.saved_tensors
        return grad_BPK * upstream_B.view(-1, 1, 1), None, None


def over_pieces(logit_BPK: Tensor, weights: Weights, *, discrete: bool = False) -> Tensor:
    """Negative log-likelihood a scan: (B,) in nats.

    Args:
        logit_BPK: log-hazards a day (piecewise constant hazard), or log-odds of an outcome in the piece (`discrete`).
        weights: days at risk in each piece, or 1 where the piece counts and 0 where not.
        discrete: which of both.

    Raises:
        ValueError: shapes differ.
    """
    wanted = (len(weights.shared_BGP), weights.shared_BGP.shape[2], len(weights.rule_K))
    if tuple(logit_BPK.shape) != wanted:
        raise ValueError(f"Expected logits of shape {wanted}, got {tuple(logit_BPK.shape)}.")
    logits = logit_BPK if logit_BPK.dtype.itemsize > 4 else logit_BPK.float()
    made: Tensor = _OverPieces.apply(logits, weights, discrete)  # type: ignore[no-untyped-call]
    return made


def constant_over_pieces(logit_K: Tensor, weights: Weights, *, discrete: bool = False) -> Tensor:
    """`over_pieces` of logits that are one number a task: (B,), without a tensor of scan × piece × task."""
    f_K = nn.functional.softplus(logit_K) if discrete else logit_K.exp()
    of_rule_G = f_K.new_zeros(weights.shared_BGP.shape[1]).index_add_(0, weights.rule_K, f_K)
    total_BG = weights.shared_BGP.sum(2)
    rule_E = weights.rule_K[weights.task_E]
    more_E = (weights.cell_EP.sum(1) - total_BG[weights.scan_E, rule_E]) * f_K[weights.task_E]
    more_E = more_E - weights.event_E * logit_K[weights.task_E]
    return (total_BG @ of_rule_G).index_add(0, weights.scan_E, more_E)


def cox(risk_BK: Tensor, opens_BK: Tensor, until_BK: Tensor, scan_E: Tensor, task_E: Tensor) -> Tensor:
    """Negative log partial likelihood of a batch by the scan of each outcome: (B,) in nats; ties as Breslow has them.

    Each task has a baseline of its own; the risk set of an outcome is the scans of this batch under risk then. With few
    scans a batch it is a rough estimate: it learns nothing of a lone scan.

    Args:
        risk_BK: log-hazard ratios.
        opens_BK: days from the index at which the risk window opens.
        until_BK: days to the outcome or end of follow-up; `opens_BK` where the cell carries nothing.
        scan_E: scans of the observed outcomes …
        task_E: … and their tasks.

    Raises:
        ValueError: shapes differ.
    """
    if risk_BK.shape != until_BK.shape:
        raise ValueError(f"Expected risks of shape {tuple(until_BK.shape)}, got {tuple(risk_BK.shape)}.")
    risks = risk_BK if risk_BK.dtype.itemsize > 4 else risk_BK.float()
    time_E = until_BK[scan_E, task_E]
    at_risk_BE = (opens_BK[:, task_E] < time_E) & (time_E <= until_BK[:, task_E])
    of_task_BE = risks[:, task_E]
    all_E = of_task_BE.masked_fill(~at_risk_BE, -torch.inf).logsumexp(0)
    return risks.new_zeros(len(risks)).index_add(0, scan_E, all_E - risks[scan_E, task_E])


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
