"""Predicates of ACES task files, where they mean the same as a task's codes and values; all else is refused.

ACES names events by predicates and a cohort by a trigger and windows. Here the scan is the trigger and the risk window
is the task's, so only a predicate is read: exact codes, bounds of values, and `or` of such.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.errors import InputError

DEATH_CODES = {"MEDS_DEATH", "DEATH"}
LOCAL_VOCABULARY = "MEDS"
"""Vocabulary of codes that name none."""
BOUNDS = {"value_min", "value_max", "value_min_inclusive", "value_max_inclusive"}
MAX_DEPTH = 20
OPEN = "???"
"""What a benchmark's file says where each data set has codes of its own."""
ANY_DEATH = re.compile(r"\^?MEDS_DEATH(\.\*)?\$?")
"""Patterns that mean death and no other code."""


@dataclass(frozen=True, slots=True)
class Plain:
    """Codes, any of them, with at most one interval of values."""

    codes: frozenset[str]
    bounds: tuple[tuple[str, float], ...]


def read_predicate(path: Path, name: str) -> dict[str, Any]:
    """What a predicate means as fields of a task: source_codes or concepts, and values.

    Raises:
        InputError: naming the file and what in it has no meaning here.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise InputError(f"Expected an ACES file at {path}, could not read it: {why}.") from None
    predicates = _content(text, path.name).get("predicates")
    if not isinstance(predicates, Mapping):
        raise InputError(f"Expected `predicates` in {path.name}, found none; give a file of ACES predicates.")
    return _fields(_alternatives(predicates, name, path.name, 0), name, path.name)


def refusal(text: str, file: str) -> InputError:
    """What to say of an ACES file given for a task file: the task that asks for what its label window does."""
    content = _content(text, file)
    windows, predicates = content.get("windows"), content.get("predicates")
    several = windows.values() if isinstance(windows, Mapping) else ()
    label = next((one["label"] for one in several if isinstance(one, Mapping) and "label" in one), None)
    if label is None:
        label = next(iter(predicates), None) if isinstance(predicates, Mapping) else None
    task = f'name = "…", aces = "{file}", predicate = "{label or "…"}"'
    return InputError(
        f"Expected a task file in TOML, found YAML in {file}; of ACES only a predicate is read, so write a task file "
        f"beside it with {task}: the scan is the trigger, start_days and horizons_days stand for the windows "
        "(docs/tasks.md)."
    )


def _content(text: str, file: str) -> Mapping[str, Any]:
    """A YAML file's top level, empty where it is no mapping. Raises InputError naming the line."""
    import yaml

    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}," if mark is not None else ""
        raise InputError(f"Expected YAML in {file}{where} found something else; mend it.") from None
    return content if isinstance(content, Mapping) else {}


def _alternatives(predicates: Mapping[str, Any], name: str, file: str, depth: int) -> list[Plain]:
    given = predicates.get(name)
    if OPEN in (given, given.get("code") if isinstance(given, Mapping) else None):
        raise InputError(f"Expected codes in predicate {name!r} of {file}, found {OPEN}; fill in those of your data.")
    if not isinstance(given, Mapping) or depth > MAX_DEPTH:
        known = ", ".join(map(str, predicates))
        raise InputError(f"Expected a predicate {name!r} in {file}, found {known}; name one of them.")
    if "expr" in given:
        match = re.fullmatch(r"\s*or\(([^()]*)\)\s*", str(given["expr"]))
        if match is None:
            raise _meaningless(
                name, file, f"expr: {given['expr']}", "an outcome is any of several rows, not all of them"
            )
        parts = [part.strip() for part in match.group(1).split(",")]
        return [plain for part in parts for plain in _alternatives(predicates, part, file, depth + 1)]
    strange = sorted(set(map(str, given)) - BOUNDS - {"code"})
    if strange:
        raise _meaningless(name, file, strange[0], "only codes and bounds of values are read")
    return [Plain(_codes(given.get("code"), name, file), _bounds(given, name, file))]


def _codes(code: Any, name: str, file: str) -> frozenset[str]:
    if isinstance(code, Mapping) and set(code) == {"any"} and isinstance(code["any"], list):
        return frozenset(map(str, code["any"]))
    if isinstance(code, str) and code:
        return frozenset({code})
    if isinstance(code, Mapping) and set(code) == {"regex"} and ANY_DEATH.fullmatch(str(code["regex"])):
        return frozenset({"MEDS_DEATH"})
    said = next(iter(code)) if isinstance(code, Mapping) and code else repr(code)
    raise _meaningless(name, file, f"code: {said}", "spell the codes out under `any`")


def _bounds(given: Mapping[str, Any], name: str, file: str) -> tuple[tuple[str, float], ...]:
    found = []
    for end, open_, closed in (("min", "above", "at_least"), ("max", "below", "at_most")):
        value = given.get(f"value_{end}")
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"Expected a number as value_{end} of {name!r} in {file}, found {value!r}; mend it.")
        found.append((closed if given.get(f"value_{end}_inclusive") else open_, float(value)))
    return tuple(found)


def _fields(plain: list[Plain], name: str, file: str) -> dict[str, Any]:
    """One set of codes with its intervals; codes whose values differ cannot be told apart in one task."""
    bounds: dict[str, set[tuple[tuple[str, float], ...]]] = {}
    for one in plain:
        for code in one.codes:
            bounds.setdefault(code, set()).add(one.bounds)
    for code, found in bounds.items():
        if () in found:  # whatever the value
            bounds[code] = {()}
    codes, shared = frozenset(bounds), next(iter(bounds.values()))
    if any(found != shared for found in bounds.values()):
        raise _meaningless(name, file, "codes with different values", "make a task of each")
    bounded = [one.bounds for one in plain if one.bounds in shared and one.bounds]
    fields: dict[str, Any] = {}
    if source := sorted(_source_code(code) for code in codes - DEATH_CODES):
        fields["source_codes"] = source
    if codes & DEATH_CODES:
        from app.tasks.spec import DEATH

        fields["concepts"] = [DEATH]
    if bounded:
        fields["values"] = [{**dict(bounds), "unit": "any"} for bounds in dict.fromkeys(bounded)]
    return fields


def _source_code(code: str) -> str:
    """VOCABULARY/CODE of a MEDS code; `LAB//SpO2` and `HR` name no vocabulary."""
    vocabulary, bar, rest = code.partition("/")
    return code if bar and vocabulary and rest and not rest.startswith("/") else f"{LOCAL_VOCABULARY}/{code}"


def _meaningless(name: str, file: str, what: str, why: str) -> InputError:
    return InputError(f"Expected what a task can mean in predicate {name!r} of {file}, found {what}; {why}.")
