"""Moments that carry a zone, as the clock of one place showed them.

The zone rules are Python's (IANA), far into the future too, where DuckDB's own library lets some rules end.
"""

from __future__ import annotations

import datetime as dt
from functools import lru_cache
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np

from app.errors import InputError

FIRST, LAST = dt.datetime(1799, 1, 1), dt.datetime(2302, 1, 1)
"""Times outside are rejected later; they keep the offset of the nearest time inside."""
_EPOCH = dt.datetime(1970, 1, 1)


def read_zone(name: str) -> dt.tzinfo:
    """The zone of a name such as `America/New_York`, or of a fixed offset such as `+05:30`.

    Raises:
        InputError: no zone has that name.
    """
    import re

    if fixed := re.fullmatch(r"([+-])(\d\d):(\d\d)", name):
        offset = dt.timedelta(hours=int(fixed[2]), minutes=int(fixed[3]))
        return dt.timezone(-offset if fixed[1] == "-" else offset)
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError) as error:
        raise InputError(
            f"Expected the name of a time zone, such as America/New_York, got {name!r}; see the IANA list."
        ) from error


@lru_cache(maxsize=16)
def transitions(name: str) -> tuple[Any, Any]:
    """When a zone's offset from UTC changes, and to what.

    Returns:
        starts: (n,) int64 microseconds since 1970-01-01 UTC, ascending, the first before all others.
        offsets: (n,) int64 microseconds that hold from each start on.
    """
    zone = read_zone(name)

    def offset(moment: dt.datetime) -> dt.timedelta:
        return moment.replace(tzinfo=dt.UTC).astimezone(zone).utcoffset() or dt.timedelta()

    starts, offsets = [np.iinfo(np.int64).min], [offset(FIRST)]
    here, step = FIRST, dt.timedelta(days=2)
    while here < LAST:
        after = here + step
        if offset(after) != offsets[-1]:
            low, high = here, after
            while high - low > dt.timedelta(seconds=1):
                middle = low + (high - low) // 2
                middle = middle.replace(microsecond=0)
                low, high = (middle, high) if offset(middle) == offsets[-1] else (low, middle)
            starts.append((high - _EPOCH) // dt.timedelta(microseconds=1))
            offsets.append(offset(high))
            here = high
        else:
            here = after
    return np.array(starts), np.array([o // dt.timedelta(microseconds=1) for o in offsets])


def local(name: str, micros: Any) -> Any:
    """Wall clock of a zone for moments in UTC; both (n,) int64 microseconds since 1970-01-01."""
    starts, offsets = transitions(name)
    return micros + offsets[np.searchsorted(starts, micros, side="right") - 1]


def zone_macro(name: str, macro: str) -> str:
    """SQL that makes `macro(TIMESTAMP in UTC)` in DuckDB: the naive wall clock of a zone.

    Offsets stand in lists by year: the one a year begins with, then each change in it and what holds from there on.
    """
    starts, offsets = transitions(name)
    years = np.arange(FIRST.year, LAST.year + 1)
    begins = np.array([(dt.datetime(int(y), 1, 1) - _EPOCH) // dt.timedelta(microseconds=1) for y in years])
    ends = np.append(begins[1:], np.iinfo(np.int64).max)
    first = np.searchsorted(starts, begins, side="right") - 1
    changes = [np.flatnonzero((starts > b) & (starts < e)) for b, e in zip(begins, ends, strict=True)]
    depth = max(map(len, changes))
    place = f"greatest(least(year(t), {LAST.year}), {FIRST.year}) - {FIRST.year - 1}"

    def listed(values: Any) -> str:
        return f"CAST([{', '.join(str(int(v)) for v in values)}] AS BIGINT[])[{place}]"

    cases = ""
    for i in reversed(range(depth)):
        moment = listed(starts[c[i]] if len(c) > i else np.iinfo(np.int64).max for c in changes)
        offset = listed(offsets[c[i]] if len(c) > i else 0 for c in changes)
        cases += f" WHEN epoch_us(t) >= {moment} THEN {offset}"
    base = listed(offsets[first])
    offset = f"CASE{cases} ELSE {base} END" if cases else base
    return f"CREATE OR REPLACE MACRO {macro}(t) AS t + to_microseconds({offset})"
