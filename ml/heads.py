"""Heads: an embedding into numbers. Any encoder takes any head.

Shape suffixes: B = scan, D = embedding, P = piece, K = task or binary label, R = rank.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Standardise(nn.Module):
    """(h − mean) / SD by running train statistics, without weights of its own.

    Raw pooled features have a mean many times their deviation and stall a head. Training and evaluation divide by the
    same running numbers, so that a batch of one is as good as any and both modes agree.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, width: int, momentum: float = 0.05) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))

    @torch.no_grad()
    def set(self, embedding_ND: Tensor) -> None:
        """Start from the statistics of some train volumes."""
        self.mean.copy_(embedding_ND.mean(0))
        self.variance.copy_(embedding_ND.var(0, correction=0))

    @torch.no_grad()
    def update(self, embedding_BD: Tensor) -> None:
        """Move towards a batch, unless it holds a number that is not finite.

        Spread is measured about the running mean, so that a single scan is a batch, too.
        """
        weight = torch.where(torch.isfinite(embedding_BD).all(), self.momentum, 0.0)
        clean_BD = torch.nan_to_num(embedding_BD)
        self.variance.lerp_((clean_BD - self.mean).square().mean(0), weight)
        self.mean.lerp_(clean_BD.mean(0), weight)

    def forward(self, embedding_BD: Tensor) -> Tensor:
        h_BD = embedding_BD.float()
        if self.training:
            self.update(h_BD.detach())
        return (h_BD - self.mean) * (self.variance + 1e-6).rsqrt()


class HazardHead(nn.Module):
    """Log-hazards a day of low rank: Z = reshape(W1 h + b1, P × R), l_pk = w_k·Z_p + c_k (docs/science.md 3)."""

    def __init__(self, width: int, pieces: int, tasks: int, *, rank: int, sd: float, standardise: nn.Module) -> None:
        super().__init__()
        self.pieces, self.rank = pieces, rank
        self.standardise = standardise
        self.time = nn.Linear(width, pieces * rank)
        self.task = nn.Linear(rank, tasks)
        nn.init.normal_(self.task.weight, 0.0, sd)

    def start_at(self, log_hazard_K: Tensor) -> None:
        """Begin at the null model: one constant rate a task."""
        with torch.no_grad():
            self.task.bias.copy_(log_hazard_K)

    def forward(self, embedding_BD: Tensor) -> Tensor:
        z_BPR = self.time(self.standardise(embedding_BD)).view(-1, self.pieces, self.rank)
        log_hazard_BPK: Tensor = self.task(z_BPR)
        return log_hazard_BPK


class BinaryHead(nn.Module):
    """One logit a label (arms `mtl` and `visit`)."""

    def __init__(self, width: int, labels: int, *, sd: float, standardise: nn.Module) -> None:
        super().__init__()
        self.standardise = standardise
        self.task = nn.Linear(width, labels)
        # over √width: features of a volume agree with each other, and a wide head would start far from the null model
        nn.init.normal_(self.task.weight, 0.0, sd / math.sqrt(width))

    def start_at(self, logit_K: Tensor) -> None:
        """Begin at the null model: each label's train frequency."""
        with torch.no_grad():
            self.task.bias.copy_(logit_K)

    def forward(self, embedding_BD: Tensor) -> Tensor:
        logit_BK: Tensor = self.task(self.standardise(embedding_BD))
        return logit_BK
