"""Fit heads on frozen embeddings and judge them: tasks × inputs × metrics, intervals by person, paired differences.

Shape suffixes: N = scan, D = feature, P = held-out person, B = replicate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from ml.labelling import CENSORED, COMPETING, EVENT
from ml.metrics import (
    FEW_EVENTS,
    METRICS,
    Estimate,
    FollowUp,
    Judged,
    Outcomes,
    at_horizon,
    difference,
    draw_persons,
    estimate,
    follow_up,
    mean_of,
    too_few,
)
from ml.pairs import Weights
from ml.probe import Design, cox_head, design, logistic_head
from ml.survival import Bools, Floats

TRAIN, TUNING, HELD_OUT = range(3)
ONE_SCAN = "one_scan_a_person"
"""Subgroup: the earliest held-out scan of each person alone."""

TRUTHS = ("truth", "truth-image")
"""Inputs of the optimum: true log hazards given everything, and as expected from what the image shows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class People:
    """N scans and what is known of them at the index."""

    person: NDArray[np.int64]
    """(N,) any numbers; equal ones are one person."""
    split: NDArray[np.int8]
    """(N,) TRAIN, TUNING or HELD_OUT; one split a person."""
    index_seconds: NDArray[np.int64]
    """(N,) moment of the scan."""
    covariates: Floats
    """(N, 2) age in years, 1 for female; NaN where unknown."""
    images: Mapping[str, Floats]
    """Arm → (N, D) embedding, finite."""
    voxels: Floats | None = None
    """(N, 2) mean and SD of the voxels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One task asked of the N scans."""

    name: str
    horizons_days: Sequence[int]
    status: NDArray[np.int8]
    """(N,) as in ml.labelling: EVENT, COMPETING, CENSORED are at risk."""
    time_days: Floats
    """(N,) event or end of follow-up; read only where at risk."""
    truth: Mapping[str, Floats] = field(default_factory=dict)
    """One of TRUTHS → (N,) true log hazard, for simulated cohorts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """What was judged, and how; the fields of a row of model.metric that name it."""

    arm: str | None
    head: str
    inputs: str
    metric: str
    horizon_days: int | None = None
    subgroup: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One number about predictions, or why there is none."""

    key: Key
    task: str | None
    """None for a mean over tasks, whose metric is called mean_…"""
    reference_arm: str | None = None
    reference_inputs: str | None = None
    value: float | None
    low: float | None
    high: float | None
    n: int
    num_persons: int
    num_events: int
    flags: tuple[str, ...] = ()
    reason: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Predicted:
    """Numbers a head gave to the held-out scans of a task."""

    arm: str | None
    head: str
    inputs: str
    task: str
    horizon_days: int | None
    kind: str
    """risk_score, net or cumulative_incidence."""
    rows: NDArray[np.int64]
    """(M,) which of the N scans."""
    value: Floats
    """(M,)"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Everything an evaluation found."""

    results: list[Result]
    predictions: list[Predicted]
    replicates: int
    num_estimable: int
    """Tasks with enough events in train and held out."""


@dataclass(frozen=True, slots=True)
class _Task:
    """The scans at risk in one question, and what its train split tells."""

    question: Question
    rows: NDArray[np.int64]
    outcomes: Outcomes
    train: Bools
    tuning: Bools
    held_out: Bools
    reason: str | None

    @property
    def judged_rows(self) -> NDArray[np.int64]:
        return self.rows[self.held_out]


@dataclass(frozen=True, slots=True)
class _Found:
    """An estimate with its counts."""

    estimate: Estimate
    n: int
    num_persons: int
    num_events: int
    flags: tuple[str, ...] = ()


def evaluate(
    people: People,
    questions: Sequence[Question],
    *,
    replicates: int,
    seed: int,
    arm: str,
    reference: str | None = None,
    report: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Judge every question on the held-out scans.

    A task is estimable with 20 events in train, and 20 events and 20 event-free scans held out; the others give
    results with a reason. All metrics share the same resamples of held-out persons, so that any two can be paired.

    Args:
        people: scans and inputs; `images` holds `arm` and `reference`.
        questions: tasks.
        replicates: bootstrap replicates.
        seed: of the bootstrap.
        arm: whose embeddings are judged.
        reference: whose result is subtracted, on the same head, inputs and resamples.
        report: called with (tasks done, tasks).

    Raises:
        ValueError: no held-out scan, or an arm without embeddings.
    """
    arms = [name for name in (arm, reference) if name is not None]
    missing = [name for name in arms if name not in people.images]
    if missing:
        raise ValueError(f"Expected embeddings of {', '.join(missing)}, got none.")
    persons, number = _number_held_out(people)
    drawn = draw_persons(persons, replicates, seed)
    found: dict[str, dict[Key, _Found]] = {}
    predictions: list[Predicted] = []
    estimable = 0
    for done, question in enumerate(questions):
        task = _task(question, people, number)
        estimable += task.reason is None
        found[question.name] = _judge(task, people, arms, drawn, predictions)
        if report is not None:
            report(done + 1, len(questions))
    pairs = _pairs(arm, reference)
    results = [r for name, by_key in found.items() for r in _results(name, by_key, pairs)]
    results += _means(found, pairs)
    return Evaluation(results=results, predictions=predictions, replicates=replicates, num_estimable=estimable)


def _number_held_out(people: People) -> tuple[int, NDArray[np.int64]]:
    """How many held-out persons there are, and each scan's number among them (0 for scans of other splits)."""
    held_out = people.split == HELD_OUT
    if not held_out.any():
        raise ValueError("Expected held-out scans to judge by, got none; choose a cohort with more persons.")
    number = np.zeros(len(people.person), np.int64)
    distinct, number[held_out] = np.unique(people.person[held_out], return_inverse=True)
    return len(distinct), number


def _task(question: Question, people: People, number: NDArray[np.int64]) -> _Task:
    at_risk = np.isin(question.status, (EVENT, COMPETING, CENSORED)) & np.isfinite(question.time_days)
    rows = np.flatnonzero(at_risk)
    status, split = question.status[rows], people.split[rows]
    outcomes = Outcomes(
        time=question.time_days[rows].astype(np.float64),
        event=status == EVENT,
        competing=status == COMPETING,
        person=number[rows],
    )
    train, held_out = split == TRAIN, split == HELD_OUT
    reason = too_few(int(outcomes.event[train].sum()), 10**9, "in train")
    judged = outcomes.event[held_out]
    reason = reason or too_few(int(judged.sum()), int((~judged).sum()))
    return _Task(question, rows, outcomes, train, split == TUNING, held_out, reason)


def _judge(
    task: _Task, people: People, arms: Sequence[str], drawn: Weights, predictions: list[Predicted]
) -> dict[Key, _Found]:
    """Every metric of every arm and input in one task."""
    candidates = _candidates(people, arms)
    if task.reason is not None:
        keys = [k for arm, inputs in candidates for k in _keys(arm, inputs, task.question)]
        keys += [k for truth in task.question.truth for k in _truth_keys(truth, task.question)]
        return {key: _refused(task, key, task.reason) for key in keys}
    known = follow_up(task.outcomes.take(task.train))
    found: dict[Key, _Found] = {}
    for arm, inputs in candidates:
        features = design(
            inputs,
            task.train,
            covariates=people.covariates[task.rows],
            image=None if arm is None else people.images[arm][task.rows],
            voxels=None if people.voxels is None else people.voxels[task.rows],
        )
        found.update(_judge_cox(task, features, known, people, drawn, arm, inputs, predictions))
        found.update(_judge_logistic(task, features, known, drawn, arm, inputs, predictions))
    for truth, log_hazard in task.question.truth.items():
        risk = log_hazard[task.judged_rows]
        predictions.append(_predicted(task, None, "given", truth, None, "risk_score", risk))
        for key in _truth_keys(truth, task.question):
            found[key] = _estimate(task, key, known, drawn, risk, None, people)
    return found


def _candidates(people: People, arms: Sequence[str]) -> list[tuple[str | None, str]]:
    """(arm, inputs) that get heads of their own."""
    found: list[tuple[str | None, str]] = [(arm, inputs) for arm in arms for inputs in ("image", "age+sex+image")]
    found.append((None, "age+sex"))
    if people.voxels is not None:
        found.append((None, "voxels"))
    return found


def _keys(arm: str | None, inputs: str, question: Question) -> Iterator[Key]:
    """Everything that is judged for one arm and input."""
    for name, metric in METRICS.items():
        if metric.at_horizon:
            for horizon in question.horizons_days:
                for head in ("cox", "logistic"):
                    yield Key(arm=arm, head=head, inputs=inputs, metric=name, horizon_days=horizon)
        else:
            yield Key(arm=arm, head="cox", inputs=inputs, metric=name)


def _truth_keys(truth: str, question: Question) -> Iterator[Key]:
    """What true hazards are judged by: discrimination alone."""
    for key in _keys(None, truth, question):
        if key.head == "cox" and not METRICS[key.metric].needs_survival:
            yield replace(key, head="given")


def _judge_cox(
    task: _Task,
    features: Design,
    known: FollowUp,
    people: People,
    drawn: Weights,
    arm: str | None,
    inputs: str,
    predictions: list[Predicted],
) -> dict[Key, _Found]:
    head = cox_head(features, task.outcomes, task.train, task.tuning)
    risk = head.log_hazard[task.held_out]
    survival = head.baseline.survival(risk, known.grid)
    predictions.append(_predicted(task, arm, "cox", inputs, None, "risk_score", risk))
    for horizon in task.question.horizons_days:
        if horizon <= known.tau:
            net = 1.0 - head.baseline.survival(risk, np.array([float(horizon)]))[:, 0]
            predictions.append(_predicted(task, arm, "cox", inputs, horizon, "net", net))
    flags = () if head.tuned else ("untuned",)
    found: dict[Key, _Found] = {}
    for key in _keys(arm, inputs, task.question):
        if key.head == "cox":
            found[key] = _estimate(task, key, known, drawn, risk, survival, people, flags)
    whole = Key(arm=arm, head="cox", inputs=inputs, metric="harrell_c")
    if _has_repeats(task):
        alone = replace(whole, subgroup=ONE_SCAN)
        found[alone] = _estimate(task, alone, known, drawn, risk, None, people, flags)
    return found


def _has_repeats(task: _Task) -> bool:
    persons = task.outcomes.person[task.held_out]
    return len(np.unique(persons)) < len(persons)


def _judge_logistic(
    task: _Task,
    features: Design,
    known: FollowUp,
    drawn: Weights,
    arm: str | None,
    inputs: str,
    predictions: list[Predicted],
) -> dict[Key, _Found]:
    found: dict[Key, _Found] = {}
    for horizon in task.question.horizons_days:
        key = Key(arm=arm, head="logistic", inputs=inputs, metric="auroc", horizon_days=horizon)
        reason = _why_no_logistic(task, known, horizon)
        if reason is not None:
            found[key] = _refused(task, key, reason)
            continue
        head = logistic_head(features, task.outcomes, known, horizon, task.train, task.tuning)
        risk = head.probability[task.held_out]
        kind = "cumulative_incidence" if task.outcomes.competing.any() else "net"
        predictions.append(_predicted(task, arm, "logistic", inputs, horizon, kind, risk))
        flags = () if head.tuned else ("untuned",)
        found[key] = _estimate(task, key, known, drawn, risk, None, None, flags)
    return found


def _why_no_logistic(task: _Task, known: FollowUp, horizon: int) -> str | None:
    if horizon > known.tau:
        return f"horizon_beyond_follow_up: {horizon} days asked, {known.tau:.0f} supported"
    return too_few(*at_horizon(task.outcomes.take(task.train), horizon), "in train")


def _predicted(
    task: _Task, arm: str | None, head: str, inputs: str, horizon: int | None, kind: str, value: Floats
) -> Predicted:
    return Predicted(
        arm=arm,
        head=head,
        inputs=inputs,
        task=task.question.name,
        horizon_days=horizon,
        kind=kind,
        rows=task.judged_rows,
        value=value,
    )


def _estimate(
    task: _Task,
    key: Key,
    known: FollowUp,
    drawn: Weights,
    risk: Floats,
    survival: Floats | None,
    people: People | None,
    flags: tuple[str, ...] = (),
) -> _Found:
    """One metric of one prediction, with counts and flags."""
    outcomes = task.outcomes.take(task.held_out)
    if key.subgroup == ONE_SCAN and people is not None:
        kept = _first_scans(people.index_seconds[task.judged_rows], outcomes.person)
        outcomes, risk = outcomes.take(kept), risk[kept]
    judged = Judged(outcomes=outcomes, follow_up=known, risk=risk, horizon_days=key.horizon_days, survival=survival)
    found = estimate(key.metric, judged, drawn)
    events = int(outcomes.event.sum()) if key.horizon_days is None else at_horizon(outcomes, key.horizon_days)[0]
    if found.value is not None and events < FEW_EVENTS:
        flags = (*flags, "few_events")
    if found.value is not None and found.interval() is None:
        flags = (*flags, "interval_not_estimable")
    return _Found(found, len(outcomes), len(np.unique(outcomes.person)), events, flags)


def _first_scans(index_seconds: NDArray[np.int64], person: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows of each person's earliest scan."""
    order = np.lexsort((np.arange(len(person)), index_seconds, person))
    first = np.diff(person[order], prepend=-1) != 0
    return np.sort(order[first])


def _refused(task: _Task, key: Key, reason: str) -> _Found:
    """A result without a value: its counts and why."""
    outcomes = task.outcomes.take(task.held_out)
    events = int(outcomes.event.sum()) if key.horizon_days is None else at_horizon(outcomes, key.horizon_days)[0]
    persons = len(np.unique(outcomes.person))
    return _Found(Estimate(value=None, reason=reason), len(outcomes), persons, events)


Pair = tuple[str | None, str, str | None, str]
"""(arm, inputs) minus (reference arm, reference inputs)."""


def _pairs(arm: str, reference: str | None) -> list[Pair]:
    """What is subtracted from what."""
    found: list[Pair] = [(arm, "age+sex+image", None, "age+sex")]
    if reference is not None:
        found.append((reference, "age+sex+image", None, "age+sex"))
        found += [(arm, inputs, reference, inputs) for inputs in ("image", "age+sex+image")]
    return found


def _paired(by_key: Mapping[Key, _Found], pairs: Sequence[Pair]) -> Iterator[tuple[Key, Pair, _Found]]:
    for arm, inputs, reference, reference_inputs in pairs:
        for key, ours in by_key.items():
            other = replace(key, arm=reference, inputs=reference_inputs)
            if (key.arm, key.inputs) == (arm, inputs) and other in by_key:
                theirs = by_key[other]
                flags = tuple(sorted({*ours.flags, *theirs.flags}))
                counts = (ours.n, ours.num_persons, ours.num_events, flags)
                yield (
                    key,
                    (arm, inputs, reference, reference_inputs),
                    _Found(difference(ours.estimate, theirs.estimate), *counts),
                )


def _result(key: Key, task: str | None, found: _Found, pair: Pair | None = None) -> Result:
    interval = found.estimate.interval()
    return Result(
        key=key,
        task=task,
        reference_arm=pair[2] if pair else None,
        reference_inputs=pair[3] if pair and pair[3] != pair[1] else None,
        value=found.estimate.value,
        low=interval[0] if interval else None,
        high=interval[1] if interval else None,
        n=found.n,
        num_persons=found.num_persons,
        num_events=found.num_events,
        flags=found.flags,
        reason=found.estimate.reason,
    )


def _results(task: str, by_key: Mapping[Key, _Found], pairs: Sequence[Pair]) -> Iterator[Result]:
    """Values and paired differences of one task."""
    for key, found in by_key.items():
        yield _result(key, task, found)
    for key, pair, found in _paired(by_key, pairs):
        yield _result(key, task, found, pair)


def _means(found: Mapping[str, Mapping[Key, _Found]], pairs: Sequence[Pair]) -> list[Result]:
    """Macro means over the estimable tasks, of values and of paired differences."""
    values: dict[tuple[Key, Pair | None], list[_Found]] = {}
    for by_key in found.values():
        for key, one in by_key.items():
            values.setdefault((key, None), []).append(one)
        for key, pair, one in _paired(by_key, pairs):
            values.setdefault((key, pair), []).append(one)
    results = []
    for (key, paired), several in values.items():
        known = [one for one in several if one.estimate.value is not None]
        counted = known or several
        mean = _Found(
            mean_of([one.estimate for one in several]),
            max(one.n for one in counted),
            max(one.num_persons for one in counted),
            sum(one.num_events for one in counted),
            tuple(sorted({flag for one in known for flag in one.flags})),
        )
        results.append(_result(replace(key, metric=f"mean_{key.metric}"), None, mean, paired))
    return results
