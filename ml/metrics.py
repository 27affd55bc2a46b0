"""What a prediction is worth on scans it has not seen, with intervals that resample persons.

A metric is a function of what is judged and of the weights of persons, (P, B) → (B,): a column of ones gives the value,
a column of resampled counts a bootstrap replicate. NaN marks a replicate in which it is undefined; a result never
carries NaN, it carries a reason.

Shape suffixes: N = scan, P = person, B = replicate, T = grid time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ml.pairs import Weights, case_control, concordance
from ml.survival import Bools, Floats, StepCurve, censoring_distribution, kaplan_meier

MIN_EVENTS = 20
"""Fewer events, or fewer scans without, are not estimable."""
FEW_EVENTS = 50
"""Fewer are flagged."""
LEAST_SHARE = 0.1
"""τ is the largest time at which the censoring distribution and the share at risk are at least this."""
GRID_POINTS = 100
INTERVAL = (2.5, 97.5)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcomes:
    """What became of N scans in one task."""

    time: Floats
    """(N,) days, finite."""
    event: Bools
    """(N,) True where the outcome was observed."""
    competing: Bools
    """(N,) True where a competing event was; elsewhere without an event the scan is censored."""
    person: NDArray[np.int64]
    """(N,) 0 to P - 1, the row of the weights."""

    def __len__(self) -> int:
        return len(self.time)

    def take(self, rows: NDArray[np.int64] | Bools) -> Outcomes:
        """Some of the scans; persons keep their numbers."""
        return Outcomes(
            time=self.time[rows], event=self.event[rows], competing=self.competing[rows], person=self.person[rows]
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class FollowUp:
    """What the train split of a task says about its follow-up; fixed for all replicates."""

    net: StepCurve
    """G where competing events censor, too: for Uno's C and the Brier score of net predictions."""
    censoring: StepCurve
    """G of censoring alone: for horizons, where a competing event is a known outcome."""
    survival: StepCurve
    """Kaplan–Meier of the outcome: the prediction without features."""
    tau: float
    """Largest time, days, with net G at least 0.1 and at least 10 % of train at risk; nothing is judged beyond."""
    grid: Floats
    """(T,) times, days, from the 5th percentile of event times to tau."""


def follow_up(train: Outcomes) -> FollowUp:
    """Censoring, survival, τ and grid of a task's train split. Raises ValueError without an event."""
    if not train.event.any():
        raise ValueError("Expected at least one event in train, got none; such a task cannot be judged.")
    net = censoring_distribution(train.time, train.event)
    enough = (net.values >= LEAST_SHARE) & (net.at_risk >= LEAST_SHARE * len(train))
    tau = float(net.times[np.flatnonzero(enough)[-1]]) if enough.any() else 0.0
    first = float(np.percentile(train.time[train.event], 5))
    return FollowUp(
        net=net,
        censoring=censoring_distribution(train.time, train.event | train.competing),
        survival=kaplan_meier(train.time, train.event),
        tau=tau,
        grid=np.linspace(min(first, tau), tau, GRID_POINTS),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """One prediction beside what came true."""

    outcomes: Outcomes
    follow_up: FollowUp
    risk: Floats
    """(N,) larger means sooner, or likelier by the horizon."""
    horizon_days: int | None = None
    survival: Floats | None = None
    """(N, T) predicted probability of no event by each grid time; needed by ibs."""


MetricFunction = Callable[[Judged, Weights], Floats]


def _ratio(numerator: NDArray[Any], denominator: NDArray[Any]) -> Floats:
    out: Floats = np.full(len(numerator), np.nan)
    np.divide(numerator, denominator, out=out, where=denominator > 0)
    return out


def harrell_c(judged: Judged, weights: Weights) -> Floats:
    """Harrell's C (Harrell et al. 1996): share of comparable pairs in which the earlier event had the larger risk.

    Ties in risk count half; a competing event censors. Depends on the censoring: compare within one cohort only.
    """
    o = judged.outcomes
    return _ratio(*concordance(o.time, o.event, judged.risk, o.person, np.ones(len(o)), weights))


def uno_c(judged: Judged, weights: Weights) -> Floats:
    """Uno's C (Uno et al. 2011): Harrell's with pairs weighted by G(t-)^-2, for events before τ; G from train."""
    o, known = judged.outcomes, judged.follow_up
    left = known.net.before(o.time)
    use = o.event & (o.time < known.tau) & (left > 0)
    pair_weight = np.where(use, 1.0 / np.where(use, left, 1.0) ** 2, 0.0)
    return _ratio(*concordance(o.time, o.event, judged.risk, o.person, pair_weight, weights))


def _cases_and_controls(judged: Judged) -> tuple[Floats, Floats]:
    """IPCW weights at the horizon (docs/science.md 2): event by h against followed to h, or a competing event by h."""
    o, known, horizon = judged.outcomes, judged.follow_up, float(judged.horizon_days or 0)
    by_then = o.time <= horizon
    left = known.censoring.before(np.minimum(o.time, horizon))
    inverse = np.divide(1.0, left, out=np.zeros(len(o)), where=left > 0)
    case = np.where(o.event & by_then, inverse, 0.0)
    free = (~o.event & (o.time >= horizon)) | (o.event & ~by_then) | (o.competing & by_then)
    return case, np.where(free, inverse, 0.0)


def auroc(judged: Judged, weights: Weights) -> Floats:
    """Cumulative/dynamic AUROC at the horizon, weighted by inverse probability of censoring (Uno et al. 2007).

    Cases had the event by the horizon, controls were followed to it without one (or had a competing event first).
    Scans censored before it count through the weights of the others, 1 / G(t-); they are not simply dropped.
    """
    o = judged.outcomes
    return _ratio(*case_control(*_cases_and_controls(judged), judged.risk, o.person, weights))


def brier_of_scans(outcomes: Outcomes, known: FollowUp, survival: Floats) -> Floats:
    """(N,) each scan's share of the integrated Brier score of (N, T) survival on the grid (Graf et al. 1999)."""
    grid = known.grid
    after = known.net.at(grid)
    still = outcomes.time[:, None] > grid
    left = known.net.before(outcomes.time)
    inverse = np.divide(1.0, left, out=np.zeros(len(outcomes)), where=left > 0)
    happened = ~still & outcomes.event[:, None]
    score = happened * survival**2 * inverse[:, None] + still * (1 - survival) ** 2 / after
    return np.asarray(np.trapezoid(score, grid, axis=1) / (grid[-1] - grid[0]))


def _mean_over_scans(scores: Floats, outcomes: Outcomes, weights: Weights) -> Floats:
    persons = len(weights)
    total = np.bincount(outcomes.person, scores, persons) @ weights
    return _ratio(total, np.bincount(outcomes.person, minlength=persons).astype(np.float64) @ weights)


def _survival(judged: Judged) -> Floats:
    if judged.survival is None:
        raise ValueError("Expected predicted survival on the grid for the Brier score, got none; give a Cox head's.")
    return judged.survival


def ibs(judged: Judged, weights: Weights) -> Floats:
    """Integrated Brier score from the grid's first time to τ, IPCW with G of train; smaller is better."""
    scores = brier_of_scans(judged.outcomes, judged.follow_up, _survival(judged))
    return _mean_over_scans(scores, judged.outcomes, weights)


def ibs_skill(judged: Judged, weights: Weights) -> Floats:
    """1 − IBS / IBS of the train split's Kaplan–Meier curve: 0 is no better than no features, 1 is perfect."""
    known, outcomes = judged.follow_up, judged.outcomes
    same_for_all = np.broadcast_to(known.survival.at(known.grid), (len(outcomes), len(known.grid)))
    null = _mean_over_scans(brier_of_scans(outcomes, known, same_for_all), outcomes, weights)
    return 1.0 - _ratio(ibs(judged, weights), null)


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """How a metric is computed and what it needs."""

    function: MetricFunction
    at_horizon: bool = False
    needs_survival: bool = False
    on_grid: bool = False
    """True where it is undefined when τ does not lie beyond the grid's first time."""


METRICS: dict[str, Metric] = {
    "harrell_c": Metric(function=harrell_c),
    "uno_c": Metric(function=uno_c, on_grid=True),
    "auroc": Metric(function=auroc, at_horizon=True),
    "ibs": Metric(function=ibs, needs_survival=True, on_grid=True),
    "ibs_skill": Metric(function=ibs_skill, needs_survival=True, on_grid=True),
}


def why_not(metric: Metric, outcomes: Outcomes, known: FollowUp, horizon_days: int | None) -> str | None:
    """Why a metric cannot be estimated here; None where it can."""
    if metric.at_horizon and horizon_days is not None:
        if horizon_days > known.tau:
            return f"horizon_beyond_follow_up: {horizon_days} days asked, {known.tau:.0f} supported"
        events, free = at_horizon(outcomes, horizon_days)
    else:
        if metric.on_grid and known.grid[-1] <= known.grid[0]:
            return f"follow_up_too_short: {known.tau:.0f} days supported, the first events come later"
        events, free = int(outcomes.event.sum()), int((~outcomes.event).sum())
    return too_few(events, free)


def too_few(events: int, free: int, split: str = "held out") -> str | None:
    """The reason where there are fewer than 20 events, or fewer than 20 scans without."""
    if events < MIN_EVENTS:
        return f"too_few_events: {events} {split}, {MIN_EVENTS} needed"
    if free < MIN_EVENTS:
        return f"too_few_event_free: {free} {split}, {MIN_EVENTS} needed"
    return None


def at_horizon(outcomes: Outcomes, horizon_days: int) -> tuple[int, int]:
    """Events by the horizon, and scans known to be free of it then."""
    by_then = outcomes.time <= horizon_days
    free = (~outcomes.event & (outcomes.time >= horizon_days)) | (outcomes.event & ~by_then)
    free |= outcomes.competing & by_then
    return int((outcomes.event & by_then).sum()), int(free.sum())


def draw_persons(num_persons: int, replicates: int, seed: int) -> Weights:
    """(P, B) how often each of B resamples drew each of P persons, with replacement; the same seed, the same draws."""
    generator = np.random.default_rng(seed)
    drawn = np.empty((num_persons, replicates), np.uint16)
    for k in range(replicates):
        drawn[:, k] = np.bincount(generator.integers(0, num_persons, num_persons), minlength=num_persons)
    return drawn


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A value with its bootstrap replicates, or the reason why there is none."""

    value: float | None
    replicates: Floats = field(default_factory=lambda: np.zeros(0))
    """(B,) NaN where undefined."""
    reason: str | None = None

    def interval(self) -> tuple[float, float] | None:
        """Percentile interval of 95 %; None where over 1 % of the replicates are undefined."""
        finite = self.replicates[np.isfinite(self.replicates)]
        if self.value is None or not len(finite) or len(finite) < 0.99 * len(self.replicates):
            return None
        low, high = np.percentile(finite, INTERVAL)
        return float(low), float(high)


def estimate(name: str, judged: Judged, drawn: Weights) -> Estimate:
    """A metric of METRICS with its replicates.

    Args:
        name: one of METRICS.
        judged: prediction and outcomes.
        drawn: (P, B) draws of persons, shared by all that is to be compared in pairs.
    """
    metric = METRICS[name]
    reason = why_not(metric, judged.outcomes, judged.follow_up, judged.horizon_days)
    if reason is not None:
        return Estimate(value=None, reason=reason)
    value = float(metric.function(judged, np.ones((len(drawn), 1), np.uint16))[0])
    if not np.isfinite(value):
        return Estimate(value=None, reason="no_comparable_pairs: no two scans of different persons can be compared")
    return Estimate(value=value, replicates=metric.function(judged, drawn))


def difference(ours: Estimate, theirs: Estimate) -> Estimate:
    """Ours − theirs, paired: replicate by replicate on the same resamples."""
    if ours.value is None or theirs.value is None:
        return Estimate(value=None, reason=ours.reason or theirs.reason)
    return Estimate(value=ours.value - theirs.value, replicates=ours.replicates - theirs.replicates)


def mean_of(estimates: list[Estimate]) -> Estimate:
    """The mean over the tasks that can be estimated, replicate by replicate on the same resamples."""
    known = [e for e in estimates if e.value is not None]
    if not known:
        return Estimate(value=None, reason="no_estimable_task: none of the tasks can be estimated")
    value = float(np.mean([e.value for e in known if e.value is not None]))
    return Estimate(value=value, replicates=np.mean([e.replicates for e in known], axis=0))
