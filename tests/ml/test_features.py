"""Counts of events before the index, against plain loops."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ml.features import EVER, Counter, Events, Moments
from ml.labelling import ConceptTasks

DAY = 86_400
GROUPS = {0: {1, 2}, 1: {2, -2}}
"""Group → its concepts; -2 is that of rows a statement chose."""
WINDOWS = (2 * DAY, EVER)

moment = st.integers(-3 * DAY // 3600, 6 * DAY // 3600).map(lambda hour: hour * 3600)
day_alone = st.booleans()
event = st.tuples(moment, day_alone, st.sampled_from([0, 1, 2, 3]))


def coded(second: int, alone: bool) -> int:
    return (second // DAY * DAY + DAY - 1) * 2 + 1 if alone else second * 2


Row = tuple[int, int]


def packed(stretches: Sequence[Sequence[Row]]) -> Events:
    rows = [row for stretch in stretches for row in sorted(stretch)]
    return Events(
        ptr=np.cumsum([0, *map(len, stretches)]).astype(np.int64),
        time=np.array([time for time, _ in rows], np.int64),
        concept=np.array([concept for _, concept in rows], np.int32),
    )


def plain(rows: Sequence[Row], chosen: Sequence[Row], index: int, alone: bool) -> tuple[list[list[int]], list[int]]:
    """Counts by group and window, and seconds of the events before the index."""

    def before(row: Row) -> bool:
        second, is_day = row[0] // 2, row[0] % 2
        return second // DAY < index // DAY if is_day or alone else second < index

    shown, extra = list(filter(before, rows)), list(filter(before, chosen))
    counts = [[sum(index - time // 2 <= window for time, _ in shown) for window in WINDOWS]]
    for concepts in GROUPS.values():
        mine = [row for row in shown + extra if row[1] in concepts]
        counts.append([sum(index - time // 2 <= window for time, _ in mine) for window in WINDOWS])
    return counts, [time // 2 for time, _ in shown]


@st.composite
def people(draw: st.DrawFn) -> list[tuple[list[Row], list[Row], list[Row], int, bool]]:
    """Persons with one scan each: events, which of them are hidden, chosen rows, index, whether only its day is known.

    An index is often at the very second of an event.
    """
    made = []
    for _ in range(draw(st.integers(1, 4))):
        rows = [(coded(second, alone), concept) for second, alone, concept in draw(st.lists(event, max_size=12))]
        hidden = [row for row in rows if draw(st.integers(0, 3)) == 0]
        chosen = [(time, -2) for time, _ in rows if draw(st.booleans())]
        index = draw(st.one_of(moment, st.sampled_from([time // 2 for time, _ in rows] or [0])))
        made.append((rows, hidden, chosen, index, draw(day_alone)))
    return made


@settings(max_examples=300, deadline=None)
@given(people(), st.booleans())
def test_counts_are_those_of_plain_loops_with_and_without_the_future(
    drawn: list[tuple[list[Row], list[Row], list[Row], int, bool]], truncated: bool
) -> None:
    concepts = [(concept, group) for group, of in GROUPS.items() for concept in of]
    groups = ConceptTasks.of_pairs(*np.array(concepts, np.int64).T)
    index = np.array([one[3] for one in drawn], np.int64)
    events, row = packed([one[0] for one in drawn]), np.arange(len(drawn))
    if truncated:
        events = events.before(row, index)
    moments = Moments(index_seconds=index, index_date_only=np.array([one[4] for one in drawn]), row=row)
    counter = Counter(groups, len(GROUPS), np.array(WINDOWS, np.int64))
    found = counter.count(moments, events, packed([one[1] for one in drawn]), packed([one[2] for one in drawn]))
    for n, (rows, hidden, chosen, at, alone) in enumerate(drawn):
        shown = list(rows)
        for row_hidden in hidden:
            shown.remove(row_hidden)
        counts, seconds = plain(shown, chosen, at, alone)
        assert found.counts[n].tolist() == counts
        first, last = found.first_days[n], found.last_days[n]
        if seconds:
            assert (first, last) == pytest.approx(((at - min(seconds)) / DAY, (at - max(seconds)) / DAY))
        else:
            assert np.isnan([first, last]).all()


def test_several_scans_share_a_persons_events() -> None:
    rows = [(coded(hour * 3600, False), 1) for hour in range(10)]
    index = np.array([0, 3 * 3600, 20 * 3600], np.int64)
    moments = Moments(index_seconds=index, index_date_only=np.zeros(3, np.bool_), row=np.zeros(3, np.int64))
    empty = np.zeros(0, np.int64)
    counter = Counter(ConceptTasks.of_pairs(empty, empty), 0, np.array([EVER], np.int64))
    found = counter.count(moments, packed([rows]), Events.none(3), Events.none(3))
    assert found.counts[:, 0, 0].tolist() == [0, 3, 10]
