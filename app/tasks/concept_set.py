"""Concept sets as ATLAS exports them: JSON items of concepts, each with descendants, mapped codes, or taken away."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.errors import InputError

MAX_CONCEPT = 2**31 - 1
FLAGS = {"includeDescendants": "descendants", "isExcluded": "excluded", "includeMapped": "mapped"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ConceptSetItem:
    """One line of a concept set."""

    concept_id: int
    descendants: bool = False
    excluded: bool = False
    """Its concepts are taken away from those of the other items."""
    mapped: bool = False
    """Codes that map to its concepts count, too."""


def read_concept_set(path: Path, set_id: int | None = None) -> tuple[ConceptSetItem, ...]:
    """The items of a concept set.

    Args:
        path: JSON with `items`, with `expression.items`, or with several sets, each with an `id`.
        set_id: which of several sets is meant; None where there is one.

    Raises:
        InputError: naming the file and the item.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise InputError(
            f"Expected the JSON of a concept set in {path.name}, line {error.lineno} is none; export it again."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        why = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise InputError(f"Expected a concept set at {path}, could not read it: {why}.") from None
    items = _items(_chosen(content, set_id, path.name), path.name)
    read = tuple(_item(item, number, path.name) for number, item in enumerate(items, 1))
    if not any(not item.excluded for item in read):
        raise InputError(f"Expected an item that is not excluded in {path.name}, found none; add one.")
    return tuple(dict.fromkeys(read))


def _chosen(content: Any, set_id: int | None, name: str) -> Any:
    """The one set that is meant."""
    if isinstance(content, Mapping) and isinstance(content.get("ConceptSets"), list):
        content = content["ConceptSets"]  # a whole cohort definition
    if not isinstance(content, list):
        return content
    if set_id is None and len(content) == 1:
        return content[0]
    found = [one for one in content if isinstance(one, Mapping) and one.get("id") == set_id]
    if set_id is None or len(found) != 1:
        ids = ", ".join(str(one.get("id")) for one in content if isinstance(one, Mapping))
        raise InputError(
            f"Expected one concept set in {name}, found those with the ids {ids}; name one with concept_set_id."
        )
    return found[0]


def _items(content: Any, name: str) -> list[Any]:
    for keys in (("items",), ("expression", "items")):
        found = content
        for key in keys:
            found = found.get(key) if isinstance(found, Mapping) else None
        if isinstance(found, list) and found:
            return found
    raise InputError(f"Expected `items` with concepts in {name}, found none; export the concept set's expression.")


def _item(item: Any, number: int, name: str) -> ConceptSetItem:
    concept = item.get("concept") if isinstance(item, Mapping) else None
    if isinstance(concept, Mapping):
        concept = next((value for key, value in concept.items() if key.upper() == "CONCEPT_ID"), None)
    elif isinstance(item, Mapping):
        concept = item.get("conceptId", item.get("concept_id"))
    if isinstance(concept, bool) or not isinstance(concept, int) or not 0 < concept <= MAX_CONCEPT:
        raise InputError(f"Expected concept.CONCEPT_ID in item {number} of {name}, found no such number; mend it.")
    flags = {}
    for key, field in FLAGS.items():
        value = item.get(key, False)
        if value is not None and not isinstance(value, bool):
            raise InputError(f"Expected true or false as {key} in item {number} of {name}, found {value!r}; mend it.")
        flags[field] = bool(value)
    return ConceptSetItem(concept_id=concept, **flags)
