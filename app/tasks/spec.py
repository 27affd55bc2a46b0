"""What a clinical question is: the fields of a task file and the rules between them."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from app.errors import InputError
from app.tasks.concept_set import ConceptSetItem

DEATH = 4306655
"""The concept under which a load stores deaths."""

DOMAINS = {
    "condition": "c",
    "drug": "d",
    "procedure": "p",
    "device": "e",
    "measurement": "m",
    "observation": "o",
    "specimen": "s",
    "visit": "v",
    "visit_detail": "w",
    "death": "x",
}
"""A task file's word → `omop.event.domain`."""

CHOICES = {
    "occurrence": ("first", "next"),
    "prior": ("exclude", "keep"),
    "same_day": ("exclude", "after"),
    "follow_up": ("cohort", "data_cut"),
    "death": ("censor", "competing"),
    "clock": ("index", "discharge"),
}

ANY_UNIT = "any"
"""Bounds that hold whatever the unit is."""
MAX_CONCEPT = 2**31 - 1
DAY_SECONDS = 86_400
MAX_DAYS = 73_000


class FieldError(InputError):
    """A field has a value it cannot have; whoever knows the file adds where."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True, kw_only=True, slots=True)
class ValueRule:
    """A bound on `value_as_number` in one unit, or a coded value; a row passes if it meets all that is given."""

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    unit: int | str | None = None
    """Unit of the bounds: a concept id (0: rows without one), `UCUM/g/dL`, or `any`; no bound goes without."""
    value_concepts: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskSpec:
    """One clinical question (docs/science.md, section 2); a file needs no more than `name` and `concepts`.

    The outcome is the earliest row of omop.event inside the risk window that carries one of the concepts or source
    codes and meets `domains`, `values` and `visit_concepts`, where given.
    """

    name: str
    title: str | None = None
    concepts: tuple[int, ...] = ()
    """Concept ids."""
    vocabulary_codes: tuple[str, ...] = ()
    """Concepts by code, `SNOMED/46621007`; a code that is not standard means what it maps to."""
    source_codes: tuple[str, ...] = ()
    """Codes as the source wrote them, `ICD10CM/I27.0`; they match source_concept_id, without descendants."""
    descendants: bool = True
    """Narrower concepts count, too; also of those that are excluded."""
    exclude_concepts: tuple[int, ...] = ()
    """Concepts that do not count although they are narrower ones of those that do."""
    exclude_vocabulary_codes: tuple[str, ...] = ()
    """The same by code."""
    concept_set: tuple[ConceptSetItem, ...] = ()
    """Items of a concept set; files name its JSON (`concept_set = "pe.json"`), `concept_set_id` which of several."""
    domains: tuple[str, ...] = ()
    """Only rows of these tables: condition, drug, procedure, …; default all."""
    values: tuple[ValueRule, ...] = ()
    """Only rows whose value meets one of these."""
    visit_concepts: tuple[int, ...] = ()
    """With concepts: only rows of such visits; without: the starts of such visits are the outcome."""
    occurrence: str = "first"
    """first: the first occurrence is meant, so prior defaults to exclude; next: it defaults to keep."""
    prior: str = "exclude"
    """What history before the window opens does: exclude the member, or keep it."""
    prior_days: int | None = None
    """How far back from the index history counts; default without limit."""
    same_day: str = "exclude"
    """Date-only rows of the index day: exclude (no outcome; they count as history) or after (at 23:59:59)."""
    start_seconds: int = 0
    """Opening of the risk window, seconds from the clock; outcomes come strictly later. Files say start_days, too."""
    clock: str = "index"
    """discharge: the window opens that long after discharge from the visit that holds the index (readmission)."""
    washout_days: int | None = None
    """Days of record needed before the index; members with fewer are ineligible."""
    min_follow_up_days: int | None = None
    """Days of follow-up needed after the index, unless death ended it; members with fewer are ineligible."""
    follow_up: str = "cohort"
    """cohort: the cohort's follow-up; data_cut: until the data cut, where one is known."""
    death: str = "censor"
    """censor or competing."""
    horizons_days: tuple[int, ...] = (365,)

    def __post_init__(self) -> None:
        check(self)

    @property
    def by_statement(self) -> bool:
        """True where concepts alone do not tell its rows, so that a statement selects them."""
        return bool(self.source_codes or self.domains or self.values or self.visit_concepts)

    @property
    def by_codes(self) -> bool:
        """True where concepts or codes are given, not visits alone."""
        return bool(self.concepts or self.vocabulary_codes or self.source_codes or self.concept_set)

    @property
    def enumerated(self) -> bool:
        """True where the concepts are listed one by one when the task set is made: exclusions need the whole list."""
        return bool(self.exclude_concepts or self.exclude_vocabulary_codes or self.concept_set)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, JSON-able; `from_dict` reads them back."""
        plain: dict[str, Any] = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> TaskSpec:
        """A task of plain values, as a file or `to_dict` gives them. Raises FieldError."""
        given = dict(fields)
        if "start_days" in given:
            if "start_seconds" in given:
                raise FieldError("start_days", "Expected start_days or start_seconds, got both; give one.")
            days = _number("start_days", given.pop("start_days"))
            if not 0 <= days <= MAX_DAYS:
                raise FieldError("start_days", f"expected 0 to {MAX_DAYS} days for 'start_days', got {days:g}.")
            given["start_seconds"] = round(days * DAY_SECONDS)
        known = [f.name for f in dataclasses.fields(cls)]
        for field in given:
            if field not in known:
                near = difflib.get_close_matches(str(field), [*known, "start_days"], n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}."
                raise FieldError(str(field), f"unknown field {str(field)!r}; {hint}")
        if "name" not in given:
            raise FieldError("name", "expected a field 'name', found none; add one.")
        if given.get("occurrence") == "next":
            given.setdefault("prior", "keep")
        return cls(**{field: _read(field, value) for field, value in given.items()})


def _number(field: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise FieldError(field, f"expected a number for {field!r}, got {value!r}.")
    return float(value)


def _whole(field: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise FieldError(field, f"expected a whole number from {low} to {high} for {field!r}, got {value!r}.")
    return value


def _text(field: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise FieldError(field, f"expected text for {field!r}, got {value!r}.")
    return value


def _code(field: str, value: Any) -> str:
    text = _text(field, value)
    if not re.fullmatch(r"[^/]+/.+", text):
        raise FieldError(field, f"expected VOCABULARY/CODE in {field!r}, got {text!r}.")
    return text


def _value_rule(field: str, value: Any) -> ValueRule:
    if isinstance(value, ValueRule):
        return value
    if not isinstance(value, Mapping):
        raise FieldError(field, f"expected tables such as {{ below = 7, unit = 8713 }} in {field!r}, got {value!r}.")
    known = [f.name for f in dataclasses.fields(ValueRule)]
    for key in value:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}."
            raise FieldError(field, f"unknown field {str(key)!r} in {field!r}; {hint}")
    bounds = {k: _number(k, value[k]) for k in ("above", "at_least", "below", "at_most") if value.get(k) is not None}
    unit = value.get("unit")
    if isinstance(unit, str):
        unit = unit if unit == ANY_UNIT else _code("unit", unit)
    elif unit is not None:
        unit = _whole("unit", unit, 0, MAX_CONCEPT)
    coded = _list("value_concepts", value.get("value_concepts", ()), lambda f, v: _whole(f, v, 0, MAX_CONCEPT))
    if bounds and unit is None:
        raise FieldError(
            field, f"expected a unit beside the bounds of {field!r}, found none; 0 means rows without one."
        )
    if not bounds and not coded:
        raise FieldError(field, f"expected a bound or value_concepts in {field!r}, found neither.")
    return ValueRule(**bounds, unit=unit, value_concepts=coded)


def _list(field: str, value: Any, item: Any) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise FieldError(field, f"expected a list for {field!r}, got {value!r}.")
    return tuple(dict.fromkeys(item(field, v) for v in value))


def _concept(field: str, value: Any) -> int:
    return _whole(field, value, 1, MAX_CONCEPT)


def _concept_set_item(field: str, value: Any) -> ConceptSetItem:
    """An item as `to_dict` gives it; a file's name is read before."""
    if isinstance(value, ConceptSetItem):
        return value
    try:
        return ConceptSetItem(**value)
    except TypeError:
        raise FieldError(
            field, f"expected the name of a concept set's JSON file for {field!r}, got {value!r}."
        ) from None


def _domain(field: str, value: Any) -> str:
    return _choice(field, value, tuple(DOMAINS))


def _choice(field: str, value: Any, known: tuple[str, ...]) -> str:
    if value not in known:
        near = difflib.get_close_matches(str(value), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise FieldError(field, f"expected {' or '.join(known)} for {field!r}, got {value!r}{hint}")
    return str(value)


def _flag(field: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise FieldError(field, f"expected true or false for {field!r}, got {value!r}.")
    return value


def _read(field: str, value: Any) -> Any:
    """One field, checked by itself."""
    if value is None and field in ("title", "prior_days", "washout_days", "min_follow_up_days"):
        return None
    if field in CHOICES:
        return _choice(field, value, CHOICES[field])
    lists = {
        "concepts": _concept,
        "visit_concepts": _concept,
        "vocabulary_codes": _code,
        "source_codes": _code,
        "exclude_concepts": _concept,
        "exclude_vocabulary_codes": _code,
        "concept_set": _concept_set_item,
        "domains": _domain,
        "values": _value_rule,
        "horizons_days": lambda f, v: _whole(f, v, 1, MAX_DAYS),
    }
    if field in lists:
        return _list(field, value, lists[field])
    if field == "descendants":
        return _flag(field, value)
    if field in ("prior_days", "washout_days", "min_follow_up_days"):
        return _whole(field, value, 0, MAX_DAYS)
    if field == "start_seconds":
        return _whole(field, value, 0, MAX_DAYS * DAY_SECONDS)
    return _text(field, value)


def check(spec: TaskSpec) -> None:
    """The rules between fields. Raises FieldError."""
    if not spec.by_codes and not spec.visit_concepts:
        raise FieldError(
            "concepts",
            "expected concepts, vocabulary_codes, source_codes, concept_set or visit_concepts, found none; name one.",
        )
    for field in ("exclude_concepts", "exclude_vocabulary_codes"):
        if getattr(spec, field) and not (spec.concepts or spec.vocabulary_codes or spec.concept_set):
            raise FieldError(
                field, f"expected concepts, vocabulary_codes or a concept_set beside {field!r}, found none."
            )
    if DEATH in spec.concepts and spec.death == "competing":
        raise FieldError("death", "expected death = 'censor' where death is the outcome, got 'competing'.")
    if spec.prior_days is not None and spec.prior == "keep":
        raise FieldError("prior_days", "expected prior = 'exclude' beside prior_days, got 'keep'; drop one of the two.")
    if not spec.horizons_days:
        raise FieldError("horizons_days", "expected at least one horizon in 'horizons_days', found none.")
