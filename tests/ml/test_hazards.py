from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ml.hazards import choose_edges, cut, last_day_at_risk, null_log_hazard


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


@settings(deadline=None)  # the first call of torch is slow
@given(
    st.lists(st.tuples(st.integers(0, 400), st.integers(1, 900), st.booleans(), st.booleans()), min_size=1, max_size=6)
)
def test_a_cut_keeps_all_the_exposure_and_each_event_once(cells: list[tuple[int, int, bool, bool]]) -> None:
    start = torch.tensor([[float(s) for s, *_ in cells]], dtype=torch.float64)
    time = start + torch.tensor([[float(d) for _, d, *_ in cells]], dtype=torch.float64)
    event = torch.tensor([[e for *_, e, _ in cells]])
    at_risk = torch.tensor([[r for *_, r in cells]])
    edges = torch.tensor([0.0, 100.0, 365.0, float("inf")], dtype=torch.float64)
    pieces = cut(time, start, event, at_risk, edges)
    torch.testing.assert_close(pieces.exposure_BPK.sum(1), (time - start) * at_risk)
    assert (pieces.event_BPK.sum(1) == (event & at_risk)).all()


def test_a_piece_is_open_on_the_left_and_closed_on_the_right() -> None:
    edges = torch.tensor([0.0, 10.0, float("inf")])
    time = torch.tensor([[10.0, 10.5]])
    yes = torch.ones(1, 2, dtype=torch.bool)
    assert cut(time, torch.zeros(1, 2), yes, yes, edges).event_BPK[0].tolist() == [[1, 0], [0, 1]]


def test_the_null_model_is_events_over_person_days() -> None:
    np.testing.assert_allclose(null_log_hazard(np.array([9.5]), np.array([999.0])), np.log(10 / 1000))
    assert last_day_at_risk(np.arange(1.0, 101.0)) == pytest.approx(90.1)
