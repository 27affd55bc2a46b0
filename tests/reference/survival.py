"""Slow, obvious twins of what ml/survival.py and ml/metrics.py compute: pair by pair, scan by scan."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def pair_counts(
    time: Sequence[float],
    event: Sequence[bool],
    risk: Sequence[float],
    person: Sequence[int],
    opened: Sequence[float],
    drawn: Sequence[int],
) -> tuple[float, float]:
    """Concordant and comparable pairs, by looking at every pair of drawn copies of scans of different persons."""
    scans = range(len(time))
    concordant = comparable = 0.0
    for i in scans:
        for j in scans:
            later = time[i] < time[j] or (time[i] == time[j] and not event[j])
            if not event[i] or not later or person[i] == person[j]:
                continue
            pair = opened[i] * drawn[person[i]] * drawn[person[j]]
            comparable += pair
            concordant += pair * (1.0 if risk[i] > risk[j] else 0.5 if risk[i] == risk[j] else 0.0)
    return concordant, comparable


def case_control_counts(
    case: Sequence[float], control: Sequence[float], risk: Sequence[float], person: Sequence[int], drawn: Sequence[int]
) -> tuple[float, float]:
    """Weighted case-control pairs of different persons, by looking at every pair."""
    right = total = 0.0
    for i in range(len(case)):
        for j in range(len(case)):
            if person[i] == person[j]:
                continue
            pair = case[i] * control[j] * drawn[person[i]] * drawn[person[j]]
            total += pair
            right += pair * (1.0 if risk[i] > risk[j] else 0.5 if risk[i] == risk[j] else 0.0)
    return right, total


def survival_at(time: Sequence[float], event: Sequence[bool], at: float, *, left: bool = False) -> float:
    """Kaplan–Meier by its definition; `left` stops just before `at`."""
    value = 1.0
    for t in sorted(set(time)):
        if t > at or (left and t == at):
            break
        at_risk = sum(u >= t for u in time)
        value *= 1 - sum(u == t and e for u, e in zip(time, event, strict=True)) / at_risk
    return value


def censoring_at(time: Sequence[float], event: Sequence[bool], at: float, *, left: bool = False) -> float:
    """G by its definition: at a tie the events leave before the censorings are counted."""
    value = 1.0
    for t in sorted(set(time)):
        if t > at or (left and t == at):
            break
        events = sum(u == t and e for u, e in zip(time, event, strict=True))
        censored = sum(u == t and not e for u, e in zip(time, event, strict=True))
        at_risk = sum(u >= t for u in time) - events
        if at_risk:
            value *= 1 - censored / at_risk
    return value


def partial_log_likelihood(
    x: NDArray[np.float64],
    time: NDArray[np.float64],
    event: NDArray[np.bool_],
    beta: NDArray[np.float64],
    ties: str,
) -> float:
    """Cox's log partial likelihood, one event time after the other."""
    eta = x @ beta
    total = 0.0
    for t in np.unique(time[event]):
        tied = np.flatnonzero(event & (time == t))
        risk = np.exp(eta[time >= t]).sum()
        own = np.exp(eta[tied]).sum()
        total += eta[tied].sum()
        for k in range(len(tied)):
            total -= np.log(risk - (k / len(tied) * own if ties == "efron" else 0.0))
    return total
