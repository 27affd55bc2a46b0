"""A control of the whole way from embedding to C: outcomes permuted among persons, which nothing can tell.

Shape suffix: N = scan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ml.evaluate import HELD_OUT, TRAIN, TUNING, People, Question
from ml.labelling import CENSORED, COMPETING, EVENT
from ml.metrics import (
    Estimate,
    Judged,
    Outcomes,
    draw_persons,
    estimate,
    follow_up,
    mean_of,
    too_few,
)
from ml.probe import cox_head, design


def permute_persons(person: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """(N,) whose outcome each scan gets: all scans of a person get those of one other person, in turn."""
    ids, who = np.unique(person, return_inverse=True)
    order = np.argsort(who, kind="stable")
    count = np.bincount(who, minlength=len(ids))
    begin = np.cumsum(count) - count
    nth = np.empty(len(person), np.int64)
    nth[order] = np.arange(len(person)) - np.repeat(begin, count)
    donor = np.random.default_rng(seed).permutation(len(ids))[who]
    return order[begin[donor] + nth % count[donor]]


def null_scores(
    people: People,
    questions: Sequence[Question],
    *,
    arm: str,
    permutations: int,
    replicates: int,
    seed: int,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[Estimate]:
    """Mean Harrell's C on held-out persons of the Cox head on an arm's embeddings, once a permutation of the outcomes.

    A task without 20 events in train, or 20 events and 20 event-free scans held out, is left out of the mean.
    """
    held_out = people.split == HELD_OUT
    persons, number = np.zeros(0, np.int64), np.zeros(len(people.person), np.int64)
    persons, number[held_out] = np.unique(people.person[held_out], return_inverse=True)
    drawn = draw_persons(len(persons), replicates, seed)
    scores = []
    for k in range(permutations):
        donor = permute_persons(people.person, seed + 1 + k)
        by_task = []
        for n, question in enumerate(questions):
            report(k * len(questions) + n, permutations * len(questions))
            by_task.append(_score(people, question, donor, number, drawn, arm))
        scores.append(mean_of(by_task))
    return scores


def _score(
    people: People,
    question: Question,
    donor: NDArray[np.int64],
    number: NDArray[np.int64],
    drawn: NDArray[np.uint16],
    arm: str,
) -> Estimate:
    status, time = question.status[donor], question.time_days[donor]
    rows = np.flatnonzero(np.isin(status, (EVENT, COMPETING, CENSORED)) & np.isfinite(time))
    outcomes = Outcomes(
        time=time[rows].astype(np.float64),
        event=status[rows] == EVENT,
        competing=status[rows] == COMPETING,
        person=number[rows],
    )
    split = people.split[rows]
    train, judged = split == TRAIN, split == HELD_OUT
    event = outcomes.event
    reason = too_few(int(event[train].sum()), 10**9, "in train")
    reason = reason or too_few(int(event[judged].sum()), int((~event[judged]).sum()))
    if reason:
        return Estimate(value=None, reason=reason)
    made = design("image", train, covariates=people.covariates[rows], image=people.images[arm][rows], voxels=None)
    head = cox_head(made, outcomes, train, split == TUNING)
    known = follow_up(outcomes.take(train))
    return estimate(
        "harrell_c", Judged(outcomes=outcomes.take(judged), follow_up=known, risk=head.log_hazard[judged]), drawn
    )
