from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ml.hazards import choose_edges, last_day_at_risk, null_log_hazard, time_at_risk


def test_pieces_are_octiles_of_event_times_and_the_last_is_open() -> None:
    days = np.arange(1.0, 801.0)
    edges = choose_edges(days, 8)
    np.testing.assert_allclose(edges[1:-1], np.quantile(days, np.arange(1, 8) / 8))
    assert edges[0] == 0
    assert edges[-1] == np.inf


def test_tied_and_near_edges_merge() -> None:
    assert choose_edges(np.array([5.0] * 90 + [100.0] * 10), 8).tolist() == [0, 5, np.inf]
    assert choose_edges(np.array([0.25, 0.5, 0.75, 40.0]), 2).tolist() == [0, np.inf], "less than a day from the start"
    with pytest.raises(ValueError, match="found none"):
        choose_edges(np.zeros(0))


@settings(deadline=None)  # the first call of torch is slow
@given(st.lists(st.floats(0.001, 4000), min_size=1, max_size=60), st.integers(1, 12))
def test_edges_always_increase_by_a_day_or_more(days: list[float], pieces: int) -> None:
    edges = choose_edges(np.array(days), pieces)
    assert (np.diff(edges) >= 1).all()
    assert 2 <= len(edges) <= pieces + 1


@given(st.floats(0, 400), st.floats(0, 900))
def test_pieces_share_out_all_the_time_at_risk(opens: float, stay: float) -> None:
    edges = np.array([0.0, 100.0, 365.0, np.inf])
    days = time_at_risk(np.array(opens), np.array(opens + stay), edges[:-1], edges[1:])
    assert days.sum() == pytest.approx(stay, abs=1e-9)
    assert (days[:2] <= [100, 265]).all() and (days >= 0).all()


def test_the_null_model_is_events_over_person_days() -> None:
    np.testing.assert_allclose(null_log_hazard(np.array([9.5]), np.array([999.0])), np.log(10 / 1000))
    assert last_day_at_risk(np.arange(1.0, 101.0)) == pytest.approx(90.1)
