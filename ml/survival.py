"""Survival by hand: Kaplan–Meier, the censoring distribution, and ridge Cox by Newton's method, in float64.

Shape suffixes: N = scan, D = feature, T = distinct time. Times are days from the index; `event` is True where the
outcome was observed. Checked against scikit-survival, lifelines and R in tests/ml/test_survival.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numba
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ties = Literal["breslow", "efron"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCurve:
    """A right-continuous step function that starts at 1."""

    times: Floats
    """(T,) distinct times, ascending, at which anything happened."""
    values: Floats
    """(T,) value from each time on."""
    at_risk: Floats
    """(T,) scans (weights) still followed just before each time."""

    def at(self, time: ArrayLike) -> Floats:
        """Value at `time` (right-continuous)."""
        return self._step(time, "right")

    def before(self, time: ArrayLike) -> Floats:
        """Left limit at `time`: what held just before."""
        return self._step(time, "left")

    def _step(self, time: ArrayLike, side: Literal["left", "right"]) -> Floats:
        padded = np.concatenate(([1.0], self.values))
        return padded[np.searchsorted(self.times, np.asarray(time, np.float64), side)]


def check_outcomes(time: ArrayLike, event: ArrayLike) -> tuple[Floats, Bools]:
    """Times and events as arrays of one length. Raises ValueError for lengths, NaN or infinity."""
    times, events = np.asarray(time, np.float64), np.asarray(event).astype(bool)
    if times.ndim != 1 or times.shape != events.shape:
        raise ValueError(f"Expected time and event of one length, got shapes {times.shape} and {events.shape}.")
    if not np.isfinite(times).all():
        raise ValueError(f"Expected finite times, got {int((~np.isfinite(times)).sum())} that are not; leave them out.")
    return times, events


def _weights(weights: ArrayLike | None, n: int) -> Floats:
    if weights is None:
        return np.ones(n)
    given = np.asarray(weights, np.float64)
    if given.shape != (n,) or not (given >= 0).all():
        raise ValueError(f"Expected {n} weights of at least 0, got shape {given.shape} or a negative one.")
    return given


def _counts(time: Floats, event: Bools, weight: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """Distinct times, and at each: events, censorings, at risk just before."""
    times, place = np.unique(time, return_inverse=True)
    events: Floats = np.bincount(place, weight * event, len(times)).astype(np.float64)
    others: Floats = np.bincount(place, weight * ~event, len(times)).astype(np.float64)
    at_risk: Floats = np.cumsum((events + others)[::-1])[::-1]
    return times, events, others, at_risk


def _product(numerator: Floats, denominator: Floats) -> Floats:
    share = np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)
    return np.asarray(np.cumprod(1.0 - share), np.float64)


def kaplan_meier(time: ArrayLike, event: ArrayLike, weights: ArrayLike | None = None) -> StepCurve:
    """Kaplan–Meier estimate of survival (Kaplan & Meier 1958).

    Args:
        time: (N,) days, finite.
        event: (N,) True where the outcome was observed.
        weights: (N,) at least 0; integers repeat a scan.
    """
    times, events = check_outcomes(time, event)
    distinct, happened, _, at_risk = _counts(times, events, _weights(weights, len(times)))
    return StepCurve(times=distinct, values=_product(happened, at_risk), at_risk=at_risk)


def censoring_distribution(time: ArrayLike, event: ArrayLike, weights: ArrayLike | None = None) -> StepCurve:
    """G(t) = P(not yet censored at t), the Kaplan–Meier estimate of censoring.

    At a tie events come before censorings, so those who had the event at t are no longer at risk of censoring at t.
    Weights of scans take the left limit G(t-) (`before`), since a censoring at t itself does not hide an event at t.
    """
    times, events = check_outcomes(time, event)
    distinct, happened, censored, at_risk = _counts(times, events, _weights(weights, len(times)))
    return StepCurve(times=distinct, values=_product(censored, at_risk - happened), at_risk=at_risk)


@dataclass(frozen=True, kw_only=True, slots=True)
class CoxFit:
    """A fitted ridge Cox model."""

    coefficients: Floats
    """(D,) log hazard ratios."""
    penalty: Floats
    """(D,) ridge of each coefficient."""
    log_likelihood: float
    """Partial log-likelihood on the training scans, without the penalty."""
    iterations: int

    def log_hazard(self, x: ArrayLike) -> Floats:
        """(N,) linear predictor of (N, D) features; larger means sooner."""
        return np.asarray(x, np.float64) @ self.coefficients


@dataclass(frozen=True, slots=True)
class _Terms:
    """The sorted data of a partial likelihood: G risk sets, M terms of the sum over events, E events."""

    x: Floats  # (N, D) features, time descending
    weight: Floats  # (N,)
    ends: NDArray[np.int64]  # (G,) how many scans each risk set holds
    event_row: NDArray[np.int64]  # (E,) rows with events
    event_group: NDArray[np.int64]  # (E,) their risk sets
    group: NDArray[np.int64]  # (M,) risk set of each term, ascending
    share: Floats  # (M,) part of the tied events that has left the risk set already (Efron); 0 for Breslow
    count: Floats  # (M,) weight of the term
    group_of: NDArray[np.int64]  # (N,) first risk set that holds a scan


@dataclass(frozen=True, slots=True)
class _Point:
    """What one value of the coefficients makes of the terms."""

    beta: Floats
    value: float  # penalised log-likelihood
    risk: Floats  # (N,) weight × hazard ratio, up to a constant
    inside: Floats  # (M,) its sum over each term's risk set, up to the same constant


def _terms(x: Floats, time: Floats, event: Bools, weight: Floats, ties: Ties) -> _Terms:
    order = np.argsort(-time, kind="stable")
    time, event, weight = time[order], event[order] & (weight[order] > 0), weight[order]
    event_times = -np.unique(-time[event])
    if not len(event_times):
        raise ValueError("Expected at least one event, got none; such a task cannot be fitted.")
    # rows of time >= t belong to the risk set at t; those before the first event belong to none
    ends = np.searchsorted(-time, -event_times, "right").astype(np.int64)
    n = int(ends[-1])
    group_of = np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0))
    rows = np.flatnonzero(event[:n])
    groups = group_of[rows]
    tied = np.bincount(groups, minlength=len(ends))
    weights = np.bincount(groups, weight[rows], len(ends))
    if ties == "breslow":
        group = np.arange(len(ends))
        share: Floats = np.zeros(len(ends))
        count: Floats = weights.astype(np.float64)
    else:
        group = np.repeat(np.arange(len(ends)), tied)
        within = np.arange(len(group)) - np.repeat(np.cumsum(tied) - tied, tied)
        share, count = within / tied[group], (weights / tied)[group]
    return _Terms(x[order[:n]], weight[:n], ends, rows, groups, group, share, count, group_of)


def _point(terms: _Terms, ridge: Floats, beta: Floats) -> _Point:
    eta = terms.x @ beta
    top = float(eta.max())
    risk = terms.weight * np.exp(eta - top)
    total = np.cumsum(risk)[terms.ends - 1]
    tied = np.bincount(terms.event_group, risk[terms.event_row], len(terms.ends))
    inside = total[terms.group] - terms.share * tied[terms.group]
    rows = terms.event_row
    value = terms.weight[rows] @ eta[rows] - terms.count @ (np.log(inside) + top)
    return _Point(beta, float(value) - 0.5 * float(ridge @ beta**2), risk, inside)


def _often(terms: _Terms, point: _Point) -> Floats:
    """(N,) how often, and with which weight, each scan stands in a risk set."""
    rate = terms.count / point.inside
    later = np.cumsum(np.bincount(terms.group, rate, len(terms.ends))[::-1])[::-1]
    often = later[terms.group_of]
    leaving = np.bincount(terms.group, rate * terms.share, len(terms.ends))
    often[terms.event_row] -= leaving[terms.event_group]
    return np.maximum(often, 0.0)


def _gradient(terms: _Terms, ridge: Floats, point: _Point, often: Floats) -> Floats:
    residual = -point.risk * often
    residual[terms.event_row] += terms.weight[terms.event_row]
    return residual @ terms.x - ridge * point.beta


def _information(terms: _Terms, ridge: Floats, point: _Point, often: Floats, dtype: type) -> Floats:
    """(D, D) observed information plus the ridge; `dtype` float32 where a near answer suffices."""
    scaled: NDArray[Any] = terms.x.astype(dtype)
    scaled *= np.sqrt(point.risk * often).astype(dtype)[:, None]
    spread: NDArray[Any] = np.empty((len(terms.group), terms.x.shape[1]), dtype)
    scale = np.sqrt(terms.count) / point.inside
    _risk_means(terms.x, point.risk, terms.ends, terms.event_row, terms.group, terms.share, scale, spread)
    information = (scaled.T @ scaled).astype(np.float64) - spread.T @ spread
    information[np.diag_indices_from(information)] += ridge
    return np.asarray(information)


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _risk_means(
    x: Floats,
    risk: Floats,
    ends: NDArray[np.int64],
    event_row: NDArray[np.int64],
    group: NDArray[np.int64],
    share: Floats,
    scale: Floats,
    out: Floats,
) -> None:
    """Row m of `out` = scale × Σ over the risk set of term m of risk × x, in one pass over the rows."""
    width = x.shape[1]
    total, leaving = np.zeros(width), np.zeros(width)
    row, event, term = 0, 0, 0
    for g in range(len(ends)):
        leaving[:] = 0.0
        while row < ends[g]:
            r = risk[row]
            for d in range(width):
                total[d] += r * x[row, d]
            if event < len(event_row) and event_row[event] == row:
                for d in range(width):
                    leaving[d] += r * x[row, d]
                event += 1
            row += 1
        while term < len(group) and group[term] == g:
            for d in range(width):
                out[term, d] = scale[term] * (total[d] - share[term] * leaving[d])
            term += 1


def fit_cox(
    x: ArrayLike,
    time: ArrayLike,
    event: ArrayLike,
    *,
    penalty: float | ArrayLike,
    weights: ArrayLike | None = None,
    ties: Ties = "breslow",
    start: ArrayLike | None = None,
    tolerance: float = 1e-9,
    max_iterations: int = 100,
) -> CoxFit:
    """Ridge Cox regression by Newton's method with step halving.

    Maximises log partial likelihood − Σ penalty·β²/2 (the `alpha` of scikit-survival's CoxPHSurvivalAnalysis). Tied
    events by Breslow (1974) or Efron (1977), weighted ones as R's survival::coxph does.

    Args:
        x: (N, D) features; standardise them, since one ridge serves all.
        time: (N,) days, finite.
        event: (N,) True where observed, at least one.
        penalty: ridge, at least 0; one number or (D,).
        weights: (N,) at least 0.
        ties: breslow or efron.
        start: (D,) where to begin, such as the solution of a larger penalty.
        tolerance: largest Newton step, relative to 1 + |β|, at which to stop.
        max_iterations: Newton steps at most.

    Raises:
        ValueError: shapes, NaN, no event, or no finite maximum (collinear or separating features without a ridge).
    """
    features = np.asarray(x, np.float64)
    times, events = check_outcomes(time, event)
    if features.ndim != 2 or len(features) != len(times):
        raise ValueError(f"Expected features of shape ({len(times)}, D), got {features.shape}.")
    if not np.isfinite(features).all():
        raise ValueError("Expected finite features, got NaN or infinity; impute or leave those scans out.")
    ridge = np.broadcast_to(np.asarray(penalty, np.float64), features.shape[1:]).copy()
    if not (ridge >= 0).all():
        raise ValueError("Expected a penalty of at least 0, got a negative one.")
    terms = _terms(features, times, events, _weights(weights, len(times)), ties)
    beta = np.zeros(features.shape[1]) if start is None else np.asarray(start, np.float64).copy()
    if len(terms.x) < features.shape[1] and (ridge > 0).all():
        return _fit_in_row_space(terms, ridge, beta, tolerance, max_iterations)
    return _newton(terms, ridge, beta, tolerance, max_iterations)


def _fit_in_row_space(terms: _Terms, ridge: Floats, start: Floats, tolerance: float, limit: int) -> CoxFit:
    """More features than scans: the ridge solution lies in the space of the scans, so rotate and solve it there."""
    scale = np.sqrt(ridge)
    _, _, basis = np.linalg.svd(terms.x / scale, full_matrices=False)
    turned = _Terms(terms.x / scale @ basis.T, *(getattr(terms, name) for name in _Terms.__slots__[1:]))
    fit = _newton(turned, np.ones(len(basis)), basis @ (start * scale), tolerance, limit)
    return CoxFit(
        coefficients=fit.coefficients @ basis / scale,
        penalty=ridge,
        log_likelihood=fit.log_likelihood,
        iterations=fit.iterations,
    )


def _newton(terms: _Terms, ridge: Floats, beta: Floats, tolerance: float, limit: int) -> CoxFit:
    """Newton's method that keeps its factor while the steps shrink fast.

    The gradient is exact at every step; the information need only be near, so wide problems take it in float32, and
    steps below 1 % take the one they have. Where that shrinks them too little, a fresh one in float64 follows.
    """
    point = _point(terms, ridge, beta)
    dtype: type = np.float32 if len(beta) >= 64 else np.float64
    factor, last = None, np.inf
    for iteration in range(1, limit + 1):
        often = _often(terms, point)
        gradient = _gradient(terms, ridge, point, often)
        if factor is None:
            factor, dtype = _factor(terms, ridge, point, often, dtype)
        step = cho_solve(factor, gradient)
        size = float(np.max(np.abs(step), initial=0.0)) / (1.0 + float(np.max(np.abs(point.beta), initial=0.0)))
        point = _line_search(terms, ridge, point, step)
        if size <= tolerance:
            likelihood = point.value + 0.5 * float(ridge @ point.beta**2)
            return CoxFit(coefficients=point.beta, penalty=ridge, log_likelihood=likelihood, iterations=iteration)
        if size > 0.01:
            factor = None
        elif size > 0.2 * last:
            factor, dtype = None, np.float64
        last = size
    raise ValueError(
        f"Expected the Cox coefficients to settle within {limit} steps, they did not; give a larger penalty."
    )


def _factor(terms: _Terms, ridge: Floats, point: _Point, often: Floats, dtype: type) -> tuple[Any, type]:
    """Cholesky factor of the information, in float64 where float32 does not reach. Raises ValueError where singular."""
    while True:
        try:
            information = _information(terms, ridge, point, often, dtype)
            return cho_factor(information, lower=True, overwrite_a=True), dtype
        except LinAlgError:
            if dtype is np.float64:
                raise ValueError(
                    "Expected features that determine the Cox coefficients, got collinear ones; give a penalty above 0."
                ) from None
            dtype = np.float64


def _line_search(terms: _Terms, ridge: Floats, point: _Point, step: Floats) -> _Point:
    """Where the Newton step leads, halved until the penalised likelihood does not fall."""
    slack = 1e-9 * (1.0 + abs(point.value))
    for _ in range(40):
        reached = _point(terms, ridge, point.beta + step)
        if reached.value >= point.value - slack:
            return reached
        step = 0.5 * step
    return point


def partial_log_likelihood(
    log_hazard: ArrayLike, time: ArrayLike, event: ArrayLike, weights: ArrayLike | None = None, ties: Ties = "breslow"
) -> float:
    """Cox's log partial likelihood of log hazards (N,), which tuning maximises. Raises ValueError without events."""
    times, events = check_outcomes(time, event)
    column = np.asarray(log_hazard, np.float64)[:, None]
    return _point(_terms(column, times, events, _weights(weights, len(times)), ties), np.zeros(1), np.ones(1)).value


@dataclass(frozen=True, kw_only=True, slots=True)
class BaselineHazard:
    """Breslow's cumulative baseline hazard: a step function from 0."""

    times: Floats
    """(T,) distinct event times, days."""
    cumulative: Floats
    """(T,) cumulative hazard of a scan with log hazard 0."""

    def at(self, time: ArrayLike) -> Floats:
        """Cumulative hazard at `time`, right-continuous."""
        padded = np.concatenate(([0.0], self.cumulative))
        return padded[np.searchsorted(self.times, np.asarray(time, np.float64), "right")]

    def survival(self, log_hazard: ArrayLike, time: ArrayLike) -> Floats:
        """(N, T) probability of no event by each time, in a world without competing events."""
        return np.exp(-np.exp(np.asarray(log_hazard, np.float64))[:, None] * self.at(time)[None, :])


def baseline_hazard(
    log_hazard: ArrayLike, time: ArrayLike, event: ArrayLike, weights: ArrayLike | None = None
) -> BaselineHazard:
    """Breslow's estimate (1972) of the cumulative baseline hazard under fitted log hazards (N,)."""
    times, events = check_outcomes(time, event)
    weight = _weights(weights, len(times))
    distinct, place = np.unique(times, return_inverse=True)
    risk = np.bincount(place, weight * np.exp(np.asarray(log_hazard, np.float64)), len(distinct))
    at_risk = np.cumsum(risk[::-1])[::-1]
    happened = np.bincount(place, weight * events, len(distinct))
    kept = happened > 0
    return BaselineHazard(times=distinct[kept], cumulative=np.cumsum(happened[kept] / at_risk[kept]))
