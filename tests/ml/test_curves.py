"""What a page draws: risk groups, their survival, calibration."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sksurv.nonparametric import kaplan_meier_estimator

from ml.curves import calibration, group_curves, risk_groups
from ml.metrics import Outcomes


@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.integers(1, 5))
@settings(deadline=None)
def test_equal_risks_share_a_group_and_groups_follow_the_risk(risks: list[int], groups: int) -> None:
    risk = np.array(risks, float)
    found = risk_groups(risk, groups)
    assert set(found) == set(range(found.max() + 1)) and found.max() < groups
    for one, two in zip(*np.meshgrid(range(len(risk)), range(len(risk))), strict=True):
        assert (found[one][risk[one] == risk[two]] == found[two][risk[one] == risk[two]]).all()
        assert (found[one][risk[one] < risk[two]] <= found[two][risk[one] < risk[two]]).all()


def test_distinct_risks_make_groups_of_equal_size() -> None:
    found = risk_groups(np.random.default_rng(0).normal(size=99), 3)
    assert np.bincount(found).tolist() == [33, 33, 33]


def drawn(n: int, seed: int) -> tuple[Outcomes, np.ndarray]:
    rng = np.random.default_rng(seed)
    risk = rng.normal(size=n)
    onset, end = rng.exponential(np.exp(-risk) * 1000), rng.uniform(300, 2500, n)
    return Outcomes(
        time=np.minimum(onset, end), event=onset <= end, competing=np.zeros(n, bool), person=np.arange(n)
    ), risk


def test_each_group_has_its_own_kaplan_meier_and_numbers_at_risk() -> None:
    outcomes, risk = drawn(300, 1)
    made = group_curves(outcomes, risk)
    for one in made:
        rows = risk_groups(risk, 3) == one.group
        at, expected = kaplan_meier_estimator(outcomes.event[rows], outcomes.time[rows])
        np.testing.assert_allclose(one.curve.at(at), expected, atol=1e-12)
        marks = np.array([0.0, 500.0, 1e6])
        assert one.at_risk(marks).tolist() == [(outcomes.time[rows] >= mark).sum() for mark in marks]
        assert (one.n, one.num_events) == (rows.sum(), outcomes.event[rows].sum())


def test_true_risks_are_calibrated_and_doubled_ones_are_not() -> None:
    outcomes, risk = drawn(4000, 2)
    truth = 1 - np.exp(-np.exp(risk) * 730 / 1000)
    points = calibration(outcomes, truth, 730.0, 8)
    assert len(points) == 8 and sum(p.low <= p.predicted <= p.high for p in points) >= 6
    assert [p.predicted for p in points] == sorted(p.predicted for p in points)
    wrong = calibration(outcomes, truth / 2, 730.0, 8)
    assert all(p.predicted < p.low for p in wrong)
    assert [p.observed for p in wrong] == pytest.approx([p.observed for p in points])


def test_scans_of_one_person_do_not_narrow_the_calibration_interval() -> None:
    outcomes, risk = drawn(200, 3)
    truth = 1 - np.exp(-np.exp(risk) * 0.73)
    rows = np.repeat(np.arange(200), 6)
    one, six = calibration(outcomes, truth, 730.0, 2), calibration(outcomes.take(rows), truth[rows], 730.0, 2)
    assert [(p.low, p.high) for p in one] == [(p.low, p.high) for p in six]
