"""Follow-up of a cohort under each rule, against lifelines."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine

from app.store import cohorts
from app.store.follow_up import quartiles, reverse_median, summarise
from app.store.work import InlineWork
from tests.app.store.records import Records, rows

followed = st.lists(st.tuples(st.integers(1, 12).map(float), st.booleans()), min_size=1, max_size=40)


@settings(deadline=None)
@given(followed)
def test_the_reverse_median_is_that_of_lifelines(pairs: list[tuple[float, bool]]) -> None:
    from lifelines import KaplanMeierFitter

    days, died = zip(*pairs, strict=True)
    # who dies on a day was followed through it: a hair later than the censorings of that day
    curve = KaplanMeierFitter().fit([d + 1e-9 * dead for d, dead in pairs], [not dead for dead in died])
    steps = curve.survival_function_["KM_estimate"]
    reached = [float(day) for day, survival in steps.items() if survival <= 0.5 + 1e-12]
    found = reverse_median(days, died)
    assert found == (round(reached[0], 6) if reached else None)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=30))
def test_quartiles_are_those_of_numpy(values: list[float]) -> None:
    assert quartiles(values) == pytest.approx(np.percentile(values, [25, 50, 75]))


def test_each_rule_is_summarised_over_the_members_that_it_follows() -> None:
    day = dt.datetime(2020, 1, 1)

    def member(person: int, period: int | None, last: int | None, death: int | None = None) -> dict[str, Any]:
        at = {days: None if days is None else day + dt.timedelta(days=days) for days in (period, last, death)}
        ends = {"period_end": at[period], "last_time": at[last], "cut_end": None}
        return {"person_id": person, "index_time": day, "death_time": at[death], "earliest": at[death], **ends}

    period, last = summarise([member(1, 10, 4), member(1, 20, 0), member(2, 30, 8, 8), member(3, None, 5)])
    assert (period["rule"], period["scans"], period["persons"], period["deaths"]) == ("observation_period", 3, 2, 1)
    assert (period["median_days"], period["lower_days"], period["upper_days"]) == (10, 9, 15)
    assert (last["rule"], last["scans"], last["deaths"], last["median_days"]) == ("last_event", 3, 1, 5)
    assert period["reverse_km_median_days"] == 10


def test_a_cohort_keeps_its_follow_up_under_every_rule(engine: Engine, work: Callable[..., InlineWork]) -> None:
    with engine.begin() as connection:
        records = Records(connection)
        records.person(1)
        records.scan(1, "2020-01-01 00:00:01")
        records.period(1, "2019-01-01", "2020-01-31")
        records.event(1, "2020-01-11 00:00:01", 7)
    cohorts.build(work(name="c", data_cut="2020-12-31"))
    (cohort,) = rows(engine, "SELECT follow_up_summary FROM label.cohort")
    found = {s["rule"]: s["median_days"] for s in cohort.follow_up_summary}
    assert found == {
        "observation_period": pytest.approx(31, abs=0.01),
        "last_event": 10,
        "data_cut": pytest.approx(366, abs=0.01),
    }
