"""Task files: TOML whose every mistake is answered with file, line and field."""

from __future__ import annotations

import re
import tomllib

from app.errors import InputError
from app.tasks.spec import FieldError, TaskSpec


def spec_from_toml(text: str, source: str) -> TaskSpec:
    """The task that a file's text describes; `source` names the file in errors. Raises InputError."""
    try:
        fields = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{source}: expected TOML, {_lower(str(error))}; mend it and try again.") from None
    try:
        return TaskSpec.from_dict(fields)
    except FieldError as error:
        raise InputError(f"{source}, line {line_of(text, error.field)}, field {error.field!r}: {error}") from None


def line_of(text: str, field: str) -> int:
    """The line on which a field is given, from 1; 1 where it is missing."""
    key = re.escape(field)
    given = re.compile(rf"""^\s*(\[+\s*)?["']?{key}["']?\s*(\]|=|\.)|[{{,]\s*["']?{key}["']?\s*=""")
    return next((number for number, line in enumerate(text.splitlines(), 1) if given.search(line)), 1)


def _lower(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]
