"""The labels of INSPECT as they are released, in long form, and the unit that their times are in.

Times to event are released without a unit, and readers of them disagree. A censored time is, by the labelers' rule, the
time from the study to the person's last event; so the unit is what makes these times agree with the record.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from app.loading.inspect_files import Row

UNITS = {"seconds": 1, "minutes": 60, "hours": 3_600, "days": 86_400}
"""Unit → its seconds."""
HORIZONS = {"1": 30, "6": 180, "12": 365}
"""Months of a label → the days that the labelers used."""
TASKS = {"ph": "pulmonary_hypertension"}
"""Released name in lower case → the task's name here, where it differs."""
FEWEST = 5
"""Studies without which the unit is not told."""
CLOSE = 0.05
"""The median deviation at which a unit is believed."""


@dataclass(frozen=True, slots=True)
class Released:
    """One label of one study."""

    impression_id: str
    task: str
    kind: str
    """tte, horizon or diagnosis."""
    horizon_days: int | None
    status: str
    """event, negative or censored."""
    time: float | None
    """Of a tte label, in the unit of the release."""


def labels(row: Row) -> tuple[list[Released], int]:
    """The labels of one record, and how many of its cells cannot be understood. An empty cell is no label."""
    made = [_label(row, column) for column, text in row.values.items() if text and _is_label(column)]
    found = [label for label in made if label is not None]
    return found, len(made) - len(found)


_HORIZON = re.compile(r"(\d+)_month_(\w+)")


def _is_label(column: str) -> bool:
    match = _HORIZON.fullmatch(column)
    return column.startswith(("tte_", "pe_")) or (match is not None and match[1] in HORIZONS)


def _label(row: Row, column: str) -> Released | None:
    """The label of one column; None where its text is none."""
    impression, text = row.values["impression_id"], row.values[column]
    if column.startswith("tte_"):
        name = column.removeprefix("tte_")
        time, censored = _number(text), _truth(row.values.get(f"is_censored_{name}", ""))
        if time is None or censored not in ("event", "negative"):
            return None
        return Released(impression, _task(name), "tte", None, "censored" if censored == "event" else "event", time)
    status = _truth(text)
    if status is None:
        return None
    if match := _HORIZON.fullmatch(column):
        return Released(impression, _task(match[2]), "horizon", HORIZONS[match[1]], status, None)
    return Released(impression, column, "diagnosis", None, status, None)


def _task(name: str) -> str:
    return TASKS.get(name, name)


def _truth(text: str) -> str | None:
    """event, negative or censored; None where it is none of them."""
    words = {"true": "event", "1": "event", "1.0": "event", "false": "negative", "0": "negative", "0.0": "negative"}
    return {**words, "censored": "censored"}.get(text.lower())


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


@dataclass(frozen=True, slots=True)
class Unit:
    """What the released times are in."""

    name: str | None
    """None where it cannot be told."""
    studies: int
    """Censored studies that could be compared with the record."""
    deviation: float | None
    """Median relative deviation from the record in that unit, or in the nearest one."""
    is_given: bool = False
    """True where it was said, not found."""

    @property
    def seconds(self) -> int | None:
        """Seconds of one unit."""
        return UNITS[self.name] if self.name else None

    def __str__(self) -> str:
        if self.is_given:
            return f"tte_* is read as {self.name}, as --tte-unit says{self._beside()}"
        if self.name is None:
            few = f"only {self.studies} censored studies can be compared with the record"
            why = few if self.studies < FEWEST else "none of its censored times agree with the record"
            return f"the unit of tte_* cannot be told, because {why}; say --tte-unit"
        return f"tte_* is in {self.name}{self._beside()}"

    def _beside(self) -> str:
        if self.deviation is None:
            return ""
        off = f"median off by {self.deviation:.2%}"
        return f" (censored times of {self.studies:,} studies against the last event: {off})"


def unit_of(pairs: Iterable[tuple[float, float]], given: str | None = None) -> Unit:
    """The unit in which released times agree best with the record.

    Args:
        pairs: (released time, seconds from the study to the person's last event) of censored studies.
        given: the unit, where it is known.
    """
    ratios = [math.log(seconds / released) for released, seconds in pairs if released > 0 and seconds > 0]
    off = {name: _deviation(ratios, seconds) for name, seconds in UNITS.items()} if ratios else {}
    if given:
        return Unit(given, len(ratios), off.get(given), is_given=True)
    if not off:
        return Unit(None, 0, None)
    best = min(off, key=lambda name: off[name])
    believed = len(ratios) >= FEWEST and off[best] <= CLOSE
    return Unit(best if believed else None, len(ratios), off[best])


def _deviation(ratios: Sequence[float], seconds: int) -> float:
    return math.expm1(min(50.0, median(abs(ratio - math.log(seconds)) for ratio in ratios)))
