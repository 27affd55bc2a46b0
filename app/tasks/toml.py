"""Task files: TOML whose every mistake is answered with file, line and field."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from app.errors import InputError
from app.tasks.aces import read_predicate
from app.tasks.concept_set import read_concept_set
from app.tasks.spec import FieldError, TaskSpec


def specs_from_toml(text: str, source: str, folder: Path | None = None) -> list[TaskSpec]:
    """The tasks that a file's text describes: one, or several under `[[task]]`.

    Args:
        text: TOML.
        source: names the file in errors.
        folder: where files that it names are.

    Raises:
        InputError: naming file, line and field.
    """
    try:
        fields = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{source}: expected TOML, {_lower(str(error))}; mend it and try again.") from None
    several = fields.pop("task", None)
    if several is None:
        return [_spec(fields, text, source, folder, 0)]
    if fields or not isinstance(several, list) or not all(isinstance(one, dict) for one in several):
        stray = next(iter(fields), "task")
        raise InputError(
            f"{source}, line {line_of(text, stray)}, field {stray!r}: "
            "expected every task under its own [[task]]; move it."
        )
    begins = [number for number, line in enumerate(text.splitlines()) if re.match(r"\s*\[\[\s*task\s*\]\]", line)]
    begins += [0] * (len(several) - len(begins))
    return [_spec(one, text, source, folder, begin) for one, begin in zip(several, begins, strict=False)]


def spec_from_toml(text: str, source: str, folder: Path | None = None) -> TaskSpec:
    """The one task that a file's text describes. Raises InputError."""
    specs = specs_from_toml(text, source, folder)
    if len(specs) != 1:
        raise InputError(f"Expected one task in {source}, found {len(specs)}; keep one, or read them together.")
    return specs[0]


def _spec(fields: dict[str, Any], text: str, source: str, folder: Path | None, begin: int) -> TaskSpec:
    """One task, whose fields are given from line `begin` (from 0) on."""
    try:
        return TaskSpec.from_dict(with_concept_set(with_predicate(fields, folder), folder))
    except FieldError as error:
        rest = "\n".join(text.splitlines()[begin:])
        line = begin + line_of(rest, error.field)
        raise InputError(f"{source}, line {line}, field {error.field!r}: {error}") from None


def with_predicate(fields: dict[str, Any], folder: Path | None) -> dict[str, Any]:
    """The fields with what the predicate of the ACES file that `aces` names means. Raises FieldError."""
    given = dict(fields)
    file, name = given.pop("aces", None), given.pop("predicate", None)
    if file is None and name is None:
        return given
    if not isinstance(file, str) or not isinstance(name, str):
        raise FieldError("aces" if name else "predicate", "expected the names of a file and of a predicate in it.")
    named = sorted({"concepts", "vocabulary_codes", "source_codes", "concept_set", "values"} & given.keys())
    if named:
        raise FieldError(named[0], f"expected either a predicate or {named[0]!r}, got both; drop one of the two.")
    try:
        found = read_predicate((folder or Path()) / file, name)
    except InputError as error:
        raise FieldError("aces", _lower(str(error))) from None
    return {"descendants": False, **given, **found}


def with_concept_set(fields: dict[str, Any], folder: Path | None) -> dict[str, Any]:
    """The fields with the items of the file that `concept_set` names. Raises FieldError."""
    given = dict(fields)
    set_id = given.pop("concept_set_id", None)
    name = given.get("concept_set")
    if set_id is not None and (isinstance(set_id, bool) or not isinstance(set_id, int) or name is None):
        raise FieldError("concept_set_id", "expected a whole number beside concept_set for 'concept_set_id'.")
    if isinstance(name, str):
        try:
            given["concept_set"] = read_concept_set((folder or Path()) / name, set_id)
        except InputError as error:
            raise FieldError("concept_set", _lower(str(error))) from None
    elif name is not None:
        raise FieldError(
            "concept_set", f"expected the name of a concept set's JSON file for 'concept_set', got {name!r}."
        )
    return given


def line_of(text: str, field: str) -> int:
    """The line on which a field is given, from 1; 1 where it is missing."""
    key = re.escape(field)
    given = re.compile(rf"""^\s*(\[+\s*)?["']?{key}["']?\s*(\]|=|\.)|[{{,]\s*["']?{key}["']?\s*=""")
    return next((number for number, line in enumerate(text.splitlines(), 1) if given.search(line)), 1)


def _lower(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]
