"""What a training minimises: a head for an embedding, and the loss of what it says about a batch.

`objective_of` chooses by the targets' kind and the recipe. Shape suffixes: B = scan, P = piece, G = rule, K = task or
binary label, E = cell that differs from what is shared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from ml.config import Recipe
from ml.heads import BinaryHead, HazardHead, Standardise
from ml.losses import Weights, binary, constant_over_pieces, cox, over_pieces
from ml.targets import BinaryTargets
from ml.tte_targets import TteTargets

Batch = Mapping[str, Tensor]


class Objective(Protocol):
    """A head and a loss that fit each other."""

    def head(self, width: int) -> HazardHead | BinaryHead:
        """A new head for embeddings of this width, at the null model."""
        ...

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Scalar: sum over the scans of a batch, on the scale that the recipe's `reduction` says."""
        ...

    def null_loss(self, batch: Batch) -> Tensor:
        """What the null model, which knows the train rates alone, loses on the same batch."""
        ...


class OverPieces:
    """A hazard a task in each piece of time: constant inside it (a day), or discrete (one chance a piece)."""

    def __init__(self, recipe: Recipe, targets: TteTargets, device: torch.device) -> None:
        self.recipe, self.targets, self.discrete = recipe, targets, targets.objective == "discrete"
        self.edges = torch.as_tensor(targets.edges, dtype=torch.float32, device=device)
        self.rule_K = torch.from_numpy(targets.stretches.rule_of).to(device)
        self.null_K = torch.from_numpy(targets.null).float().to(device)
        self.unit = _unit(recipe, targets, (len(targets.edges) - 1) * targets.width)

    def head(self, width: int) -> HazardHead:
        """Low-rank logits (B, P, K)."""
        return _hazard_head(self.recipe, self.targets, width, len(self.targets.edges) - 1)

    def weights(self, batch: Batch) -> Weights:
        """Days at risk in each piece, or whether the piece counts: at least half of it was at risk, or it is the
        outcome's."""
        low, high = self.edges[:-1], self.edges[1:]
        shared = _days(batch["opens"], batch["until"], low, high)
        cell = _days(batch["cell_opens"], batch["cell_until"], low, high)
        event, until = batch["cell_event"], batch["cell_until"]
        piece = torch.bucketize(until, self.edges[1:-1])
        if self.discrete:
            event = event & (until <= self.edges[-1])
            shared, cell = ((days >= (high - low) / 2).to(days.dtype) for days in (shared, cell))
            cell = cell.maximum(nn.functional.one_hot(piece, len(low)) * event.unsqueeze(1))
        return Weights(
            shared_BGP=shared,
            rule_K=self.rule_K,
            scan_E=batch["cell_scan"],
            task_E=batch["cell_task"],
            cell_EP=cell,
            event_E=event,
            piece_E=piece,
        )

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Negative log-likelihood."""
        return over_pieces(output, self.weights(batch), discrete=self.discrete).sum() / self.unit

    def null_loss(self, batch: Batch) -> Tensor:
        """Of one rate (or chance a piece) a task."""
        return constant_over_pieces(self.null_K, self.weights(batch), discrete=self.discrete).sum() / self.unit


class Cox:
    """A log-hazard ratio a task; the loss compares the scans of a batch with each other."""

    def __init__(self, recipe: Recipe, targets: TteTargets, device: torch.device) -> None:
        self.recipe, self.targets = recipe, targets
        self.rule_K = torch.from_numpy(targets.stretches.rule_of).to(device)
        self.unit = _unit(recipe, targets, targets.width)

    def head(self, width: int) -> HazardHead:
        """Logits (B, 1, K)."""
        return _hazard_head(self.recipe, self.targets, width, 1)

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Negative log partial likelihood."""
        event, place = batch["cell_event"], (batch["cell_scan"], batch["cell_task"])
        opens, until = (batch[name][:, self.rule_K] for name in ("opens", "until"))
        opens, until = opens.index_put(place, batch["cell_opens"]), until.index_put(place, batch["cell_until"])
        return cox(output[:, 0], opens, until, place[0][event], place[1][event]).sum() / self.unit

    def null_loss(self, batch: Batch) -> Tensor:
        """Of a model that tells no scan from another."""
        return self.loss(batch["until"].new_zeros(len(batch["until"]), 1, len(self.rule_K)), batch)


class Binary:
    """One logit a label."""

    def __init__(self, recipe: Recipe, targets: BinaryTargets, device: torch.device) -> None:
        self.recipe, self.targets = recipe, targets
        self.null_K = torch.from_numpy(targets.null).float().to(device)
        self.unit = _unit(recipe, targets, targets.width)

    def head(self, width: int) -> BinaryHead:
        """Logits (B, K)."""
        standardise = _standardise(self.recipe, width)
        head = BinaryHead(width, self.targets.width, sd=self.recipe.head_sd, standardise=standardise)
        head.start_at(torch.from_numpy(self.targets.null))
        return head

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy of the known labels."""
        return binary(output, batch["label"], batch["known"]).sum() / self.unit

    def null_loss(self, batch: Batch) -> Tensor:
        """Of each label's train frequency."""
        return self.loss(self.null_K.expand(batch["label"].shape), batch)


def objective_of(recipe: Recipe, targets: TteTargets | BinaryTargets, device: torch.device) -> Objective:
    """The objective of a training."""
    if isinstance(targets, BinaryTargets):
        return Binary(recipe, targets, device)
    return Cox(recipe, targets, device) if targets.objective == "cox" else OverPieces(recipe, targets, device)


def _days(opens: Tensor, until: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Days of (opens, until] inside each piece, the pieces as the last axis."""
    return (until.unsqueeze(-1).minimum(high) - opens.unsqueeze(-1).maximum(low)).clamp_(min=0)


def _unit(recipe: Recipe, targets: TteTargets | BinaryTargets, outputs: int) -> float:
    """What the loss of a scan is divided by: outcomes (or known labels) a train scan, or the number of outputs."""
    return float(outputs) if recipe.reduction == "mean" else targets.per_scan


def _standardise(recipe: Recipe, width: int) -> nn.Module:
    return Standardise(width, recipe.momentum) if recipe.standardise == "running" else nn.Identity()


def _hazard_head(recipe: Recipe, targets: TteTargets, width: int, pieces: int) -> HazardHead:
    head = HazardHead(
        width, pieces, targets.width, rank=recipe.rank, sd=recipe.head_sd, standardise=_standardise(recipe, width)
    )
    head.start_at(torch.from_numpy(targets.null))
    return head
