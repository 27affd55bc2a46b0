"""Simulated records: latents, hazards that are log-linear in them, and what a hospital would have written down.

Every person has random streams of their own, so that the first persons of a large cohort are those of a small one. A
person's events come from constant hazards a year, rate · exp(weights · biomarkers + age_weight · age), drawn over
exactly the time the observation period covers. Parameters: docs/science.md section 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from app.loading.simulate_phantom import BIOMARKERS

DAY = 86_400
YEAR_DAYS = 365.25
AGE_CORRELATION = 0.3
"""Correlation of each biomarker with age."""
MEAN_AGE, SD_AGE = 60.0, 10.0
MIN_FOLLOW_UP, MAX_FOLLOW_UP = 1.0, 8.0
"""Years of follow-up, uniform, unless death comes first."""
CODED_AT_VISIT, CODING_OFFSET = 0.3, 1.5
"""A finding is coded at the scan's visit with probability .3 · expit(log-linear part - 1.5)."""
FIRST_SCAN = (np.datetime64("2010-01-01", "s") - np.datetime64(0, "s")).astype(int)
SCAN_DAYS = 1096
PARAMETER_SEED = 7
"""The outcomes' parameters are the same for every cohort; only persons differ."""

DEATH_CONCEPT = 4306655
ROOT_CONCEPT, DISEASE_CONCEPT, CT_CONCEPT = 2_000_000_001, 2_000_000_201, 2_000_000_301
GROUP_CONCEPT, FINDING_CONCEPT = 2_000_000_010, 2_000_000_100


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Something that happens at a constant rate."""

    name: str
    title: str
    concept_id: int
    group_id: int
    """The broader concept it belongs to."""
    weights: tuple[float, ...]
    """(4,) log hazard ratio a standard deviation of each biomarker."""
    age_weight: float
    rate: float
    """A year, at average biomarkers and age."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """A broader concept."""

    concept_id: int
    title: str
    parent_id: int | None


@cache
def groups() -> tuple[Group, ...]:
    """The hierarchy above the outcomes: roots, and findings by what drives them."""
    names = (*BIOMARKERS, "two signs", "age")
    return (
        Group(concept_id=ROOT_CONCEPT, title="simulated finding", parent_id=None),
        Group(concept_id=DISEASE_CONCEPT, title="simulated disease", parent_id=None),
        *(
            Group(concept_id=GROUP_CONCEPT + i, title=f"simulated finding: {name}", parent_id=ROOT_CONCEPT)
            for i, name in enumerate(names, start=1)
        ),
    )


@cache
def findings() -> tuple[Outcome, ...]:
    """64 findings for pretraining: 24 with one biomarker, 20 with two, 20 with age alone."""
    rng = np.random.default_rng(PARAMETER_SEED)
    weights, age_weights, group = np.zeros((64, 4)), np.zeros(64), np.zeros(64, int)
    for k in range(64):
        if k < 24:
            weights[k, k % 4] = rng.uniform(0.7, 1.2)
            group[k] = 1 + k % 4
        elif k < 44:
            weights[k, rng.choice(4, 2, replace=False)] = rng.uniform(0.4, 0.9, 2)
            group[k] = 5
        else:
            group[k] = 6
        age_weights[k] = rng.uniform(0, 0.5 if k < 44 else 0.8)
    rates = np.exp(rng.uniform(np.log(0.01), np.log(0.25), 64))
    return tuple(
        Outcome(
            name=f"finding_{k + 1}",
            title=f"simulated finding {k + 1}",
            concept_id=FINDING_CONCEPT + k + 1,
            group_id=GROUP_CONCEPT + int(group[k]),
            weights=tuple(weights[k].tolist()),
            age_weight=float(age_weights[k]),
            rate=float(rates[k]),
        )
        for k in range(64)
    )


@cache
def clinical() -> tuple[Outcome, ...]:
    """The four outcomes that are judged; death is the last."""
    rows = (
        ("hf", "Heart failure (simulated)", DISEASE_CONCEPT + 1, (0.9, 0.5, 0.0, 0.0), 0.4, 0.06),
        ("copd", "COPD (simulated)", DISEASE_CONCEPT + 2, (0.0, 0.0, 1.1, 0.0), 0.3, 0.06),
        ("cancer", "Cancer (simulated)", DISEASE_CONCEPT + 3, (0.0, 0.0, 0.0, 1.1), 0.2, 0.05),
        ("death", "Death (simulated)", DEATH_CONCEPT, (0.6, 0.4, 0.4, 0.4), 0.7, 0.05),
    )
    return tuple(
        Outcome(
            name=name,
            title=title,
            concept_id=concept,
            group_id=DISEASE_CONCEPT,
            weights=weights,
            age_weight=age_weight,
            rate=rate,
        )
        for name, title, concept, weights, age_weight, rate in rows
    )


def log_hazards(outcomes: tuple[Outcome, ...], biomarkers: NDArray[np.float64], age: float) -> NDArray[np.float64]:
    """(K,) true log hazards a day, given everything."""
    weights = np.array([o.weights for o in outcomes])
    base = np.array([np.log(o.rate / YEAR_DAYS) for o in outcomes])
    age_weights = np.array([o.age_weight for o in outcomes])
    result: NDArray[np.float64] = base + weights @ biomarkers + age_weights * age
    return result


def expected_age(biomarkers: NDArray[np.float64]) -> float:
    """E[age | biomarkers], standardised: all five are jointly normal, so it is linear in the sum."""
    n, r = len(biomarkers), AGE_CORRELATION
    return float(r / (1 + (n - 1) * r * r) * biomarkers.sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class Person:
    """One simulated person; times are whole seconds since 1970, naive local time."""

    person_id: int
    biomarkers: NDArray[np.float64]
    age: float
    """Standardised age at the scan."""
    is_female: bool
    birth_day: int
    """Days since 1970."""
    period_start_day: int
    scan: int
    follow_up_end: int
    """The last second of the last day observed, or death."""
    death: int | None
    conditions: list[tuple[int, Outcome, bool]]
    """(time, what, coded at the scan's visit), by time."""


def person(seed: int, number: int) -> Person:
    """Draw one person; `number` counts from 0, and `person_id` is one more."""
    rng = np.random.default_rng([seed, number, 1])
    age = float(rng.standard_normal())
    noise = rng.standard_normal(len(BIOMARKERS))
    biomarkers = AGE_CORRELATION * age + np.sqrt(1 - AGE_CORRELATION**2) * noise
    scan = int(FIRST_SCAN + rng.integers(SCAN_DAYS) * DAY + rng.integers(8 * 3600, 18 * 3600))
    age_days = float(np.clip(MEAN_AGE + SD_AGE * age, 1, 110)) * YEAR_DAYS
    birth_day = scan // DAY - round(age_days)
    is_female = bool(rng.random() < 0.5)
    period_start_day = max(birth_day, scan // DAY - int(rng.uniform(1, 5) * YEAR_DAYS))
    planned_days = int(rng.uniform(MIN_FOLLOW_UP, MAX_FOLLOW_UP) * YEAR_DAYS)
    planned_end = (scan // DAY + planned_days + 1) * DAY - 1
    hazards = np.exp(log_hazards(clinical(), biomarkers, age)) / DAY
    first = _whole_seconds(scan, rng.exponential(1 / hazards))
    death = int(first[-1]) if first[-1] <= planned_end else None
    end = planned_end if death is None else death
    conditions = [(int(t), o, False) for t, o in zip(first[:-1], clinical()[:-1], strict=True) if t <= end]
    conditions += _finding_rows(rng, biomarkers, age, scan, end)
    conditions.sort(key=lambda row: (row[0], row[1].concept_id))
    return Person(
        person_id=number + 1,
        biomarkers=biomarkers,
        age=age,
        is_female=is_female,
        birth_day=birth_day,
        period_start_day=period_start_day,
        scan=scan,
        follow_up_end=end,
        death=death,
        conditions=conditions,
    )


def _whole_seconds(scan: int, after: NDArray[np.float64]) -> NDArray[np.int64]:
    """Times rounded up to whole seconds, never at midnight, which would read as a date without a time."""
    times = scan + np.ceil(np.minimum(after, 1e12)).astype(np.int64)
    result: NDArray[np.int64] = times - (times % DAY == 0)
    return result


def _finding_rows(
    rng: np.random.Generator, biomarkers: NDArray[np.float64], age: float, scan: int, end: int
) -> list[tuple[int, Outcome, bool]]:
    """Findings coded at the scan's visit, within the hour before the scan, and later ones as Poisson processes."""
    outcomes = findings()
    log_hazard = log_hazards(outcomes, biomarkers, age)
    linear = log_hazard - np.log([o.rate / YEAR_DAYS for o in outcomes])
    coded = rng.random(len(outcomes)) < CODED_AT_VISIT / (1 + np.exp(CODING_OFFSET - linear))
    before = rng.integers(300, 3300, len(outcomes))
    rows = [(scan - int(b), o, True) for c, b, o in zip(coded, before, outcomes, strict=True) if c]
    counts = rng.poisson(np.exp(log_hazard) / DAY * (end - scan))
    times = _whole_seconds(scan, rng.uniform(0, end - scan, int(counts.sum())))
    which = np.repeat(np.arange(len(outcomes)), counts)
    return rows + [(int(t), outcomes[k], False) for t, k in zip(times, which, strict=True)]
