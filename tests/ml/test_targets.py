from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ml.labelling import CENSORED, COMPETING, DAY_SECONDS, EVENT, task_outcomes
from ml.targets import MtlTargets, VisitTargets, outcomes
from ml.tte_targets import Stretches, TteTargets, with_death
from tests.ml.arrays import exponential_labels, label_arrays, sparse


def messy_labels(seed: int, n: int = 12, k: int = 5) -> Any:
    """Labels with everything that can be in them."""
    rng = np.random.default_rng(seed)
    follow_up = rng.integers(-1, 2000 * DAY_SECONDS, n)
    cut = np.maximum(follow_up, rng.integers(-1, 3000 * DAY_SECONDS, n))
    windows = rng.random((n, k)) < 0.2
    opens = rng.integers(0, 500 * DAY_SECONDS, (n, k))
    start = rng.integers(0, 3, k) * 30 * DAY_SECONDS
    to_cut = rng.random(k) < 0.3
    begin = np.where(windows, opens, start)
    end = np.where(to_cut, cut[:, None], follow_up[:, None])
    seconds = begin + rng.integers(1, 1000 * DAY_SECONDS, (n, k))
    event = (rng.random((n, k)) < 0.5) & (seconds <= end)
    death = np.where(rng.random(n) < 0.4, np.maximum(follow_up, cut), -1)
    return label_arrays(
        event,
        seconds,
        eligible=rng.random(n) < 0.9,
        priors=sparse(rng.random((n, k)) < 0.3),
        ineligibles=sparse(rng.random((n, k)) < 0.1),
        windows=sparse(windows, opens),
        visits=sparse(rng.random((n, k)) < 0.3),
        follow_up_seconds=follow_up,
        data_cut_seconds=cut,
        death_seconds=death,
        start_seconds=start,
        excludes_prior=rng.random(k) < 0.5,
        competing=rng.random(k) < 0.5,
        to_data_cut=to_cut,
    )


LISTS = ("events", "priors", "ineligibles", "windows")
some_lists = st.sets(st.sampled_from(LISTS))
"""Those that name no cell: pretraining tasks mostly have outcomes and nothing else."""


def without(labels: Any, lists: set[str]) -> Any:
    """The labels with some of their lists empty."""
    none = np.zeros((len(labels.member), len(labels.start_seconds)), np.bool_)
    empty = {name: sparse(none, none.astype(np.int64) if name in ("events", "windows") else None) for name in lists}
    return replace(labels, **empty)


@settings(deadline=None)  # the first call of torch is slow
@given(st.integers(0, 10_000))
def test_dense_batches_agree_with_the_outcomes_of_each_task(seed: int) -> None:
    labels = messy_labels(seed)
    rows = np.random.default_rng(seed).permutation(12)[:7]
    batch = outcomes(labels, rows)
    for k in range(5):
        one = task_outcomes(labels, k)
        used = np.isin(one.status[rows], (EVENT, COMPETING, CENSORED))
        np.testing.assert_array_equal(batch.at_risk_BK[:, k], used)
        np.testing.assert_array_equal(batch.event_BK[:, k], one.status[rows] == EVENT)
        np.testing.assert_allclose(batch.time_BK[used, k], one.time_days[rows][used], rtol=1e-6)
        np.testing.assert_allclose(batch.start_BK[:, k], one.start_days[rows], rtol=1e-6)


@settings(deadline=None)  # the first call of torch is slow
@given(st.integers(0, 10_000), some_lists)
def test_totals_over_scans_are_the_sums_of_their_dense_batches(seed: int, empty: set[str]) -> None:
    labels = without(messy_labels(seed), empty)
    rows = np.random.default_rng(seed).permutation(12)[:9]
    batch = outcomes(labels, rows)
    num_events, person_days, times = Stretches(labels).totals(rows)
    np.testing.assert_array_equal(num_events, batch.event_BK.sum(0))
    exposure = np.maximum(batch.time_BK - batch.start_BK, 0) * batch.at_risk_BK
    np.testing.assert_allclose(person_days, exposure.sum(0, dtype=np.float64), rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(np.sort(times), np.sort(batch.time_BK[batch.event_BK]), rtol=1e-6)


@settings(deadline=None)  # the first call of torch is slow
@given(st.integers(0, 10_000), some_lists)
def test_what_is_shared_and_the_cells_that_differ_make_up_the_dense_batch(seed: int, empty: set[str]) -> None:
    labels = without(messy_labels(seed), empty)
    rows = np.random.default_rng(seed).permutation(12)[:9]
    dense, stretches = outcomes(labels, rows), Stretches(labels)
    opens, until = (a[:, stretches.rule_of].copy() for a in stretches.shared(rows))
    event = np.zeros(opens.shape, np.bool_)
    cells = stretches.cells(rows)
    assert len(np.unique(cells.row * 5 + cells.task)) == len(cells.row)
    for into, values in ((opens, cells.opens), (until, cells.until), (event, cells.event)):
        into[cells.row, cells.task] = values
    np.testing.assert_array_equal(event, dense.event_BK)
    exposure = np.maximum(dense.time_BK - dense.start_BK, 0) * dense.at_risk_BK
    np.testing.assert_allclose((until - opens) / DAY_SECONDS, exposure, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose((opens / DAY_SECONDS)[exposure > 0], dense.start_BK[exposure > 0], rtol=1e-5)


@settings(deadline=None)  # the first call of torch is slow
@given(st.integers(0, 10_000))
def test_death_as_an_outcome_is_the_first_death_inside_follow_up(seed: int) -> None:
    labels = messy_labels(seed)
    more = with_death(labels)
    one = task_outcomes(more, 5)
    died = labels.eligible & (labels.death_seconds > 0) & (labels.death_seconds <= labels.follow_up_seconds)
    np.testing.assert_array_equal(one.status == EVENT, died)
    np.testing.assert_array_equal(one.time_days[died], labels.death_seconds[died] / DAY_SECONDS)
    for k in range(5):
        np.testing.assert_array_equal(task_outcomes(more, k).status, task_outcomes(labels, k).status)


@settings(deadline=None)  # the first call of torch is slow
@given(st.integers(0, 10_000))
def test_binary_labels_at_a_horizon_follow_their_definition(seed: int) -> None:
    labels = messy_labels(seed)
    rows = np.arange(12)
    try:
        targets = MtlTargets(labels, rows, [[365], [30, 365], [365], [900], [365]])
    except ValueError:
        return  # no positive label in this draw
    batch = targets.batch(rows)
    for position, (k, days) in enumerate(((0, 365), (1, 30), (1, 365), (2, 365), (3, 900), (4, 365))):
        one = task_outcomes(labels, k)
        for i in rows:
            event = one.status[i] == EVENT and one.time_days[i] <= days
            end = (labels.data_cut_seconds if labels.to_data_cut[k] else labels.follow_up_seconds)[i] / DAY_SECONDS
            negative = one.status[i] == COMPETING or (one.status[i] in (EVENT, CENSORED) and end >= days)
            assert batch["known"][i, position] == (event or negative)
            assert bool(batch["label"][i, position]) == event


def test_the_null_model_counts_the_cells_that_train() -> None:
    labels = exponential_labels(300, 4)
    targets = TteTargets(labels, np.arange(200))
    batch = outcomes(labels, np.arange(200))
    np.testing.assert_allclose(targets.num_events, batch.event_BK.sum(0))
    np.testing.assert_allclose(
        targets.null, np.log((batch.event_BK.sum(0) + 0.5) / (batch.time_BK.sum(0, dtype=np.float64) + 1)), rtol=1e-6
    )
    assert targets.per_scan == batch.event_BK.sum() / 200
    rates = np.exp(targets.null)
    lost = (rates * batch.time_BK - batch.event_BK * targets.null).sum() / batch.event_BK.sum()
    assert targets.null_loss == pytest.approx(lost, rel=1e-5)
    assert len(targets.edges) == 9


def test_visit_labels_are_the_codes_of_the_visit() -> None:
    seen = np.random.default_rng(0).random((20, 3)) < 0.4
    labels = exponential_labels(20, 3, visits=sparse(seen))
    batch = VisitTargets(labels, np.arange(15)).batch(np.array([4, 2, 19]))
    np.testing.assert_array_equal(batch["label"], seen[[4, 2, 19]])
    assert batch["known"].all()


def test_nothing_to_learn_is_said_so() -> None:
    labels = label_arrays(np.zeros((5, 2), np.bool_), np.zeros((5, 2)))
    with pytest.raises(ValueError, match="found none"):
        TteTargets(labels, np.arange(5))
    with pytest.raises(ValueError, match="found none"):
        VisitTargets(labels, np.arange(5))
