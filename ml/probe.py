"""Heads on frozen embeddings: ridge Cox, and logistic at a horizon. Fit on train, choose on tuning, judged elsewhere.

The same features are made, the same penalties tried and the same choice taken for every arm.

Shape suffixes: N = scan, D = feature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve
from scipy.special import expit

from ml.metrics import FollowUp, Outcomes
from ml.survival import BaselineHazard, Bools, Floats, baseline_hazard, fit_cox, partial_log_likelihood

PENALTIES = (30_000.0, 10_000.0, 3_000.0, 1_000.0, 300.0, 100.0, 30.0, 10.0, 3.0, 1.0)
"""Tried from the largest; each starts at the solution of the one before."""
DEFAULT_PENALTY = 300.0
"""Taken where tuning has too few events to choose by."""
PATIENCE = 3
"""Penalties in a row that may be worse on tuning before smaller ones are left out."""
MIN_TUNING_EVENTS = 5
COVARIATE_PENALTY = 1.0
"""Ridge of age and sex, standardised: enough to keep them finite, too small to hide them."""

INPUTS = ("image", "age+sex", "age+sex+image", "voxels")


@dataclass(frozen=True, kw_only=True, slots=True)
class Design:
    """Features of all scans of a task, standardised by its train rows."""

    x: Floats
    """(N, D)"""
    penalised: Bools
    """(D,) True for image features, whose penalty is chosen; age and sex keep a small fixed one."""

    def penalty(self, size: float) -> Floats:
        """(D,) ridge of each feature."""
        return np.where(self.penalised, size, COVARIATE_PENALTY)


def standardise(x: Floats, train: Bools) -> Floats:
    """Columns with mean 0 and SD 1 over the train rows; those that are constant there are left out."""
    mean, sd = x[train].mean(0), x[train].std(0)
    varied = sd > 1e-8 * np.maximum(1.0, np.abs(mean))
    return np.asarray((x[:, varied] - mean[varied]) / sd[varied])


def impute(x: Floats, train: Bools) -> Floats:
    """Unknown values (NaN) become the train mean, and a column each says where they were unknown."""
    unknown = np.isnan(x)
    known = np.where(unknown, 0.0, x)
    count = (~unknown[train]).sum(0)
    mean = np.divide(known[train].sum(0), count, out=np.zeros(x.shape[1]), where=count > 0)
    return np.hstack([np.where(unknown, mean, x), unknown[:, unknown.any(0)].astype(np.float64)])


def design(inputs: str, train: Bools, *, covariates: Floats, image: Floats | None, voxels: Floats | None) -> Design:
    """Features of one kind of inputs.

    Args:
        inputs: one of INPUTS.
        train: (N,) rows to standardise by.
        covariates: (N, 2) age in years and 1 for female, NaN where unknown.
        image: (N, D) embedding, for inputs with an image.
        voxels: (N, 2) mean and SD of the voxels, for `voxels`.

    Raises:
        ValueError: an input that was not given, or one that is not known.
    """
    parts: list[tuple[Floats, bool]] = []
    if inputs in ("age+sex", "age+sex+image"):
        parts.append((standardise(impute(covariates, train), train), False))
    if inputs in ("image", "age+sex+image"):
        parts.append((standardise(_given(inputs, image), train), True))
    if inputs == "voxels":
        parts.append((standardise(_given(inputs, voxels), train), False))
    if not parts:
        raise ValueError(f"Expected inputs among {', '.join(INPUTS)}, got {inputs!r}.")
    penalised = np.concatenate([np.full(x.shape[1], tuned) for x, tuned in parts])
    return Design(x=np.hstack([x for x, _ in parts]), penalised=penalised)


def _given(inputs: str, x: Floats | None) -> Floats:
    if x is None:
        raise ValueError(f"Expected features for the inputs {inputs!r}, got none.")
    return np.asarray(x, np.float64)


@dataclass(frozen=True, kw_only=True, slots=True)
class CoxHead:
    """A fitted Cox head and what it says of all scans."""

    log_hazard: Floats
    """(N,) larger means sooner."""
    baseline: BaselineHazard
    penalty: float | None
    """Chosen ridge; None where nothing was to be chosen."""
    tuned: bool
    """False where tuning had too few events, and the default was taken."""


@dataclass(slots=True)
class _Choice:
    """Walks the penalties from the largest, keeps the best on tuning, and ends after three that were worse."""

    best: float = -np.inf
    linear: Floats | None = None
    penalty: float | None = None
    worse: int = 0

    def offer(self, score: float, linear: Floats, penalty: float) -> bool:
        """Take a fit into account; False where no smaller penalty need be tried."""
        if self.linear is None or score > self.best:
            self.best, self.linear, self.penalty, self.worse = score, linear, penalty, 0
        else:
            self.worse += 1
        return self.worse < PATIENCE


def _penalties(features: Design, tuning_events: int) -> tuple[tuple[float, ...], bool]:
    """What to try, and whether tuning allows a choice (or there is none to make)."""
    if not features.penalised.any():
        return (DEFAULT_PENALTY,), True
    tuned = tuning_events >= MIN_TUNING_EVENTS
    return (PENALTIES if tuned else (DEFAULT_PENALTY,)), tuned


def cox_head(features: Design, outcomes: Outcomes, train: Bools, tuning: Bools) -> CoxHead:
    """Fit ridge Cox on train for each penalty, keep the one with the best partial likelihood on tuning.

    Competing events censor. Raises ValueError where train has no event.
    """
    x, time, event = features.x, outcomes.time, outcomes.event
    sizes, tuned = _penalties(features, int(event[tuning].sum()))
    choice, start = _Choice(), np.zeros(x.shape[1])
    for size in sizes:
        if x.shape[1]:
            fit = fit_cox(x[train], time[train], event[train], penalty=features.penalty(size), start=start)
            start = fit.coefficients
        log_hazard = x @ start
        score = partial_log_likelihood(log_hazard[tuning], time[tuning], event[tuning]) if len(sizes) > 1 else 0.0
        if not choice.offer(score, log_hazard, size):
            break
    if choice.linear is None:
        raise ValueError("Expected a penalty to try, got none.")
    baseline = baseline_hazard(choice.linear[train], time[train], event[train])
    penalty = choice.penalty if features.penalised.any() else None
    return CoxHead(log_hazard=choice.linear, baseline=baseline, penalty=penalty, tuned=tuned)


@dataclass(frozen=True, kw_only=True, slots=True)
class LogisticHead:
    """A fitted logistic head at one horizon."""

    probability: Floats
    """(N,) of the event by the horizon."""
    penalty: float | None
    tuned: bool


def binary_at(outcomes: Outcomes, known: FollowUp, horizon_days: int) -> tuple[Bools, Floats]:
    """Event by the horizon (N,), and the IPCW weight (N,): 0 where that is unknown (docs/science.md 2)."""
    by_then = outcomes.time <= horizon_days
    event = outcomes.event & by_then
    certain = by_then & (outcomes.event | outcomes.competing) | (outcomes.time >= horizon_days)
    left = known.censoring.before(np.minimum(outcomes.time, horizon_days))
    return event, np.divide(1.0, left, out=np.zeros(len(outcomes)), where=certain & (left > 0))


def logistic_head(
    features: Design, outcomes: Outcomes, known: FollowUp, horizon_days: int, train: Bools, tuning: Bools
) -> LogisticHead:
    """Fit ridge logistic regression of the event by the horizon; the penalty with the best tuning likelihood stays.

    Scans censored before the horizon carry no weight; those that are certain carry 1 / G(t-), scaled to mean 1.

    Raises:
        ValueError: where train has only one class.
    """
    event, weight = binary_at(outcomes, known, horizon_days)
    weight = weight / weight[train & (weight > 0)].mean()
    sizes, tuned = _penalties(features, int(event[tuning].sum()))
    choice, start = _Choice(), np.zeros(features.x.shape[1] + 1)
    for size in sizes:
        start = fit_logistic(
            features.x[train], event[train], penalty=features.penalty(size), weights=weight[train], start=start
        )
        linear = start[0] + features.x @ start[1:]
        score = float(weight[tuning] @ (event[tuning] * linear[tuning] - np.logaddexp(0, linear[tuning])))
        if not choice.offer(score, linear, size):
            break
    if choice.linear is None:
        raise ValueError("Expected a penalty to try, got none.")
    penalty = choice.penalty if features.penalised.any() else None
    return LogisticHead(probability=expit(choice.linear), penalty=penalty, tuned=tuned)


def fit_logistic(
    x: Floats,
    event: Bools,
    *,
    penalty: float | Floats,
    weights: Floats | None = None,
    start: Floats | None = None,
    tolerance: float = 1e-9,
    max_iterations: int = 100,
) -> NDArray[np.float64]:
    """Ridge logistic regression by Newton's method: intercept (free) and coefficients, (1 + D,).

    Maximises log-likelihood − Σ penalty·β²/2: scikit-learn's LogisticRegression with C = 1 / penalty.

    Raises:
        ValueError: one class only, or coefficients that do not settle.
    """
    weight = np.ones(len(x)) if weights is None else weights
    used = weight > 0
    if not event[used].any() or event[used].all():
        raise ValueError("Expected scans with and without the event, got one kind only; such a head cannot be fitted.")
    wide = np.hstack([np.ones((int(used.sum()), 1)), x[used]])
    target, weight = event[used].astype(np.float64), weight[used]
    ridge = np.concatenate(([0.0], np.broadcast_to(np.asarray(penalty, np.float64), x.shape[1:])))
    beta = np.zeros(wide.shape[1]) if start is None else start.copy()
    value = _penalised(wide, target, weight, ridge, beta)
    # as in ml.survival: the gradient is exact, the information need only be near, and is kept while steps shrink fast
    exact, factor, last = wide.shape[1] < 64, None, np.inf
    for _ in range(max_iterations):
        p = expit(wide @ beta)
        if factor is None:
            factor = _information_factor(wide, weight * p * (1 - p), ridge, exact)
        step = cho_solve(factor, (weight * (target - p)) @ wide - ridge * beta)
        beta, value, size = _halve(wide, target, weight, ridge, beta, step, value)
        size /= 1.0 + float(np.abs(beta).max())
        if size <= tolerance:
            return np.asarray(beta)
        if size > 0.01 or size > 0.2 * last:
            exact, factor = exact or size <= 0.01, None
        last = size
    raise ValueError(f"Expected logistic coefficients to settle within {max_iterations} steps; give a larger penalty.")


def _information_factor(x: Floats, curvature: Floats, ridge: Floats, exact: bool) -> tuple[Any, bool]:
    """Cholesky factor of the information, from float32 products unless `exact`. Raises ValueError where singular."""
    for dtype in (np.float64,) if exact else (np.float32, np.float64):
        scaled: NDArray[Any] = x.astype(dtype)
        scaled *= np.sqrt(curvature).astype(dtype)[:, None]
        information = (scaled.T @ scaled).astype(np.float64)
        information[np.diag_indices_from(information)] += ridge
        try:
            factor: tuple[Any, bool] = cho_factor(information, lower=True)
        except LinAlgError:
            continue
        return factor
    raise ValueError("Expected features that are not collinear, got some; give a penalty above 0.")


def _penalised(x: Floats, target: Floats, weight: Floats, ridge: Floats, beta: Floats) -> float:
    linear = x @ beta
    return float(weight @ (target * linear - np.logaddexp(0, linear)) - 0.5 * (ridge @ beta**2))


def _halve(
    x: Floats, target: Floats, weight: Floats, ridge: Floats, beta: Floats, step: Floats, value: float
) -> tuple[Floats, float, float]:
    """The step, halved until the likelihood does not fall: new coefficients, likelihood, size of the step."""
    for _ in range(40):
        reached = _penalised(x, target, weight, ridge, beta + step)
        if reached >= value - 1e-9 * (1 + abs(value)):
            return beta + step, reached, float(np.abs(step).max())
        step = step / 2
    return beta, value, 0.0
