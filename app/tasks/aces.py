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
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}," if mark is not None else ""
        raise InputError(f"Expected YAML in {path.name}{where} found something else; mend it.") from None
    except (OSError, UnicodeDecodeError) as error:
        why = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise InputError(f"Expected an ACES file at {path}, could not read it: {why}.") from None
    predicates = content.get("predicates") if isinstance(content, Mapping) else None
    if not isinstance(predicates, Mapping):
        raise InputError(f"Expected `predicates` in {path.name}, found none; give a file of ACES predicates.")
    return _fields(_alternatives(predicates, name, path.name, 0), name, path.name)


def _alternatives(predicates: Mapping[str, Any], name: str, file: str, depth: int) -> list[Plain]:
    given = predicates.get(name)
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
    """One set of codes with its intervals; several with values cannot be told apart in one task."""
    codes = frozenset(code for one in plain for code in one.codes)
    bounded = [one.bounds for one in plain if one.bounds]
    if bounded and (len(bounded) < len(plain) or any(one.codes != codes for one in plain)):
        raise _meaningless(name, file, "values of several codes", "make a task of each")
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
