"""The survival likelihood as a textbook has it: one scan and one task at a time, float64, from S(t) and f(t)."""

from __future__ import annotations

import math
from collections.abc import Sequence


def cumulative_hazard(rates: Sequence[float], edges: Sequence[float], start: float, end: float) -> float:
    """∫ λ(u) du from start to end, for a hazard that is `rates[p]` a day in (edges[p], edges[p + 1]]."""
    total = 0.0
    for rate, low, high in zip(rates, edges[:-1], edges[1:], strict=True):
        if end > low and start < high:
            total += rate * max(0.0, min(end, high) - max(start, low))
    return total


def negative_log_likelihood(
    log_rates: Sequence[float], edges: Sequence[float], start: float, time: float, event: bool
) -> float:
    """−log of f(time) where the outcome was observed, of S(time) where it was not, given event-free at `start`."""
    rates = [math.exp(rate) for rate in log_rates]
    log_survival = -cumulative_hazard(rates, edges, start, time)
    if not event:
        return -log_survival
    piece = next(p for p in range(len(rates)) if edges[p] < time <= edges[p + 1])
    return -(math.log(rates[piece]) + log_survival)


def binary_cross_entropy(logit: float, label: bool) -> float:
    """−log of the probability given to what happened."""
    probability = 1 / (1 + math.exp(-logit))
    return -math.log(probability if label else 1 - probability)


def discrete_likelihood(
    log_odds: Sequence[float], edges: Sequence[float], start: float, time: float, event: bool
) -> float:
    """−log of surviving each piece lived through at least half and, where observed, of the outcome in its piece."""
    total = 0.0
    for odds, low, high in zip(log_odds, edges[:-1], edges[1:], strict=True):
        chance = 1 / (1 + math.exp(-odds))
        lived = max(0.0, min(time, high) - max(start, low))
        if event and low < time <= high:
            total -= math.log(chance)
        elif lived >= (high - low) / 2:
            total -= math.log(1 - chance)
    return total


def partial_likelihood(
    risk: Sequence[float], opens: Sequence[float], until: Sequence[float], event: Sequence[bool]
) -> float:
    """−log of Cox's partial likelihood: for each outcome, its share of the risk of all who were at risk then."""
    total = 0.0
    for i, observed in enumerate(event):
        if observed:
            at_risk = [j for j in range(len(risk)) if opens[j] < until[i] <= until[j]]
            total -= risk[i] - math.log(sum(math.exp(risk[j]) for j in at_risk))
    return total
