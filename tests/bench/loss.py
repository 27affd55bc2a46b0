"""Row `loss`: the loss of 8,192 tasks and its gradient, sparse as it trains, against every scan, piece and task dense.

From labels to the gradient of the logits: making the batch, too. Some 400 outcomes a scan, one rule, as in pretraining.
Both are shown to agree before they are timed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ml.config import Recipe
from ml.labelling import DAY_SECONDS, LabelArrays
from ml.objectives import OverPieces
from ml.targets import outcomes
from ml.tte_targets import TteTargets
from ml.volume_cache import cores
from tests.bench import Row, median_ratio
from tests.ml.arrays import label_arrays
from tests.reference import dense_losses

SCANS, TASKS, EVENTS = 64, 8_192, 400
BATCHES = (1, 8, 32)


def run() -> list[Row]:
    """How many times faster, by batch."""
    torch.set_num_threads(cores())
    targets = TteTargets(labels(), np.arange(SCANS))
    objective = OverPieces(Recipe(encoder="tiny"), targets, torch.device("cpu"))
    rows = []
    for batch in BATCHES:
        scans = np.arange(batch)
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(batch, len(targets.edges) - 1, TASKS, generator=generator) - 9
        ours, theirs = sparse(objective, scans, logits), dense(objective, scans, logits)
        torch.testing.assert_close(ours(), theirs(), rtol=1e-4, atol=1e-4)
        ratio, seconds, _ = median_ratio(ours, theirs)
        print(f"# loss: {1e3 * seconds:.3g} ms at batch {batch}", file=sys.stderr)
        target = 1.0 if batch >= 8 else 0.0
        rows.append(Row(row=f"loss-{batch}", figure=ratio, unit=f"x the dense loss at batch {batch}", target=target))
    return rows


def labels() -> LabelArrays:
    """Outcomes at some 5 % of scans and tasks, five years of follow-up."""
    rng = np.random.default_rng(0)
    event = rng.random((SCANS, TASKS)) < EVENTS / TASKS
    return label_arrays(event, rng.integers(1, 1826, (SCANS, TASKS)) * DAY_SECONDS)


def sparse(objective: OverPieces, rows: np.ndarray, logits: Tensor) -> Callable[[], Tensor]:
    """The gradient by the loss that trains."""

    def gradient() -> Tensor:
        leaf = logits.clone().requires_grad_()
        arrays = objective.targets.batch(rows)
        objective.loss(leaf, {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}).backward()
        assert leaf.grad is not None
        return leaf.grad

    return gradient


def dense(objective: OverPieces, rows: np.ndarray, logits: Tensor) -> Callable[[], Tensor]:
    """The gradient by the definition."""

    def gradient() -> Tensor:
        leaf = logits.clone().requires_grad_()
        o = outcomes(objective.targets.labels, rows)
        arrays = [torch.from_numpy(a) for a in (o.time_BK, o.start_BK, o.event_BK, o.at_risk_BK)]
        pieces = dense_losses.cut(*arrays, objective.edges)
        (dense_losses.piecewise_exponential(leaf, pieces).sum() / objective.unit).backward()
        assert leaf.grad is not None
        return leaf.grad

    return gradient
