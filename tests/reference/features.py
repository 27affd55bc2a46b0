"""Features the slow, obvious way: event by event, in plain Python."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

DAY = dt.timedelta(days=1)


@dataclass(frozen=True, kw_only=True)
class Event:
    """One row of a person's record."""

    time: dt.datetime
    date_only: bool
    concept: int
    domain: str = "c"
    value: float | None = None
    unit: int = 0
    visit: int | None = None


@dataclass(frozen=True, kw_only=True)
class Visit:
    """One visit; without an end it is a moment."""

    key: int
    concept: int
    start: dt.datetime
    end: dt.datetime | None
    date_only: bool = False
    end_date_only: bool = False


def is_before(time: dt.datetime, date_only: bool, index: dt.datetime, *, index_date_only: bool) -> bool:
    if date_only or index_date_only:
        return time.date() < index.date()
    return time < index


def is_open(visit: Visit, index: dt.datetime, *, index_date_only: bool) -> bool:
    if not is_before(visit.start, visit.date_only, index, index_date_only=index_date_only):
        return False
    end, end_date_only = (visit.start, visit.date_only) if visit.end is None else (visit.end, visit.end_date_only)
    return end.date() >= index.date() if index_date_only or end_date_only else end >= index


def features(
    events: Sequence[Event],
    visits: Sequence[Visit],
    index: dt.datetime,
    *,
    index_date_only: bool,
    windows: Sequence[int],
    groups: Mapping[str, Callable[[Event], bool]],
    pairs: Sequence[tuple[int, int]],
) -> dict[str, float]:
    """Every feature but age and sex; what is nought is left out. Of values of one second the later row is the last."""
    before = [e for e in events if is_before(e.time, e.date_only, index, index_date_only=index_date_only)]
    open_visits = [v for v in visits if is_open(v, index, index_date_only=index_date_only)]
    keys = {v.key for v in open_visits}
    shown = [e for e in before if not (e.domain == "c" and e.visit in keys)]
    found: dict[str, float] = {}
    for name, wanted in {"events": lambda e: True, **groups}.items():
        chosen = [e for e in shown if wanted(e)]
        for days in (*windows, None):
            count = sum(days is None or index - e.time <= days * DAY for e in chosen)
            if count:
                found[f"{name}_{days}d" if days else f"{name}_ever"] = count
    if shown:
        found["days_since_first_event"] = (index - min(e.time for e in shown)) / DAY
        found["days_since_last_event"] = (index - max(e.time for e in shown)) / DAY
    for concept, unit in pairs:
        values = [
            (e.time, n, e)
            for n, e in enumerate(before)
            if e.domain == "m" and e.value is not None and (e.concept, e.unit) == (concept, unit)
        ]
        if values:
            last = max(values)[2]
            found[f"value_{concept}_{unit}"] = float(last.value or 0)
            found[f"value_days_{concept}_{unit}"] = (index - last.time) / DAY
    if open_visits:
        found["visit_open"] = 1.0
        found["visit_open_days"] = max((index - v.start) / DAY for v in open_visits)
        found |= {f"visit_open_{v.concept}": 1.0 for v in open_visits}
    return found
