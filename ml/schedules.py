"""The learning rate of each step: a function of the step, and of the plateaus met so far."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ml.config import Recipe

FACTOR, PATIENCE, THRESHOLD = 0.5, 1, 1e-4
"""Of the schedule `plateau`: the rate halves once the mean train loss of two epochs in a row was not 0.01 % better."""


def learning_rate(recipe: Recipe, step: int, num_steps: int, scale: float = 1.0) -> float:
    """The rate of a step: up over the warm-up, then as the schedule says.

    `one_cycle` climbs from 1/25 by a cosine and falls by one to near 0; `cosine` climbs from 0 by a line and falls to
    1/100; `plateau` climbs by a line and stays, times `scale`.
    """
    warm = max(1.0, recipe.warm_up * num_steps)
    one_cycle = recipe.schedule == "one_cycle"
    if recipe.schedule == "plateau":
        return recipe.learning_rate * scale * min(1.0, (step + 1) / warm)
    if step < warm:
        share = (1 - math.cos(math.pi * step / warm)) / 2 if one_cycle else (step + 1) / (warm + 1)
        low = 1 / 25 if one_cycle else 0.0
    else:
        share = (1 + math.cos(math.pi * (step - warm) / max(1.0, num_steps - warm))) / 2
        low = 1e-4 if one_cycle else 0.01
    return recipe.learning_rate * (low + (1 - low) * share)


@dataclass(slots=True)
class Plateau:
    """How far epochs that did not improve have lowered the rate."""

    scale: float = 1.0
    best: float = math.inf
    bad_epochs: int = 0

    def note(self, loss: float) -> None:
        """Judge an epoch by its mean train loss."""
        if loss < self.best - THRESHOLD * abs(self.best) or math.isinf(self.best):
            self.best, self.bad_epochs = loss, 0
            return
        self.bad_epochs += 1
        if self.bad_epochs > PATIENCE:
            self.scale, self.bad_epochs = self.scale * FACTOR, 0
