"""How long a cohort is followed, under each rule: medians as observed and by reverse Kaplan-Meier."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datetime as dt

RULES = {"observation_period": "period_end", "last_event": "last_time", "data_cut": "cut_end"}
"""Rule → the field of a member that holds where it would end follow-up, before death and data cut are heeded."""

DAY_SECONDS = 86_400
ROUNDING = 1e-12


def summarise(members: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Follow-up of members under each rule that ends it for at least one of them after its index.

    Args:
        members: each with index_time, death_time, `earliest` (of death and data cut) and the fields of `RULES`.

    Returns:
        One dictionary a rule: rule, scans, persons, deaths (scans whose follow-up death ends), median_days,
        lower_days and upper_days (quartiles) as observed, and reverse_km_median_days, the median of the time to
        censoring with death as what hides it (Schemper and Smith, 1996); null where more than half die first.
    """
    known = list(members)
    return [summary for rule, field in RULES.items() if (summary := _of_rule(rule, field, known))]


def _of_rule(rule: str, field: str, members: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    days, died, persons = [], [], set()
    for member in members:
        ends: list[dt.datetime] = [end for end in (member[field], member["earliest"]) if end is not None]
        if member[field] is None or min(ends) <= member["index_time"]:
            continue
        days.append((min(ends) - member["index_time"]).total_seconds() / DAY_SECONDS)
        died.append(member["death_time"] is not None and member["death_time"] <= min(ends))
        persons.add(member["person_id"])
    if not days:
        return None
    lower, median, upper = quartiles(days)
    reverse = reverse_median(days, died)
    return {
        "rule": rule,
        "scans": len(days),
        "persons": len(persons),
        "deaths": sum(died),
        "median_days": round(median, 2),
        "lower_days": round(lower, 2),
        "upper_days": round(upper, 2),
        "reverse_km_median_days": None if reverse is None else round(reverse, 2),
    }


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The three quartiles, by linear interpolation."""
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    return at(0.25), at(0.5), at(0.75)


def reverse_median(days: Sequence[float], died: Sequence[bool]) -> float | None:
    """The first day on which at most half are still followed, by Kaplan-Meier with censoring as the event.

    Deaths of a day leave the risk set after its censorings, as censorings do in a usual curve.
    """
    ordered = sorted(zip(days, died, strict=True))
    at_risk, survival, i = len(ordered), 1.0, 0
    while i < len(ordered):
        day = ordered[i][0]
        here = _same_day(ordered, i)
        censored = sum(not dead for dead in here)
        survival *= 1 - censored / at_risk
        if censored and survival <= 0.5 + ROUNDING:
            return day
        at_risk -= len(here)
        i += len(here)
    return None


def _same_day(ordered: Sequence[tuple[float, bool]], start: int) -> list[bool]:
    end = start
    while end < len(ordered) and ordered[end][0] == ordered[start][0]:
        end += 1
    return [dead for _, dead in ordered[start:end]]
