"""Codes that no row of the store uses, looked up in the vocabulary that is kept beside it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from app.errors import ArtifactsAway, StoreError
from app.store.places import place
from app.store.vocabulary import Release, current_release

if TYPE_CHECKING:
    from pathlib import Path

    import duckdb
    from sqlalchemy import Connection

    from app.settings import Settings


@dataclass(frozen=True, slots=True)
class ReleasedWords:
    """What a release says of codes and concepts."""

    known: set[int] = field(default_factory=set)
    by_code: dict[str, list[tuple[int, str | None]]] = field(default_factory=dict)
    """Code → its concepts, each with its `standard_concept`."""
    maps_to: dict[int, list[int]] = field(default_factory=dict)
    """Concept that is not standard → what it maps to."""


_BY_CODE = """
SELECT vocabulary_id || '/' || concept_code, concept_id, standard_concept FROM read_parquet($file)
WHERE vocabulary_id || '/' || concept_code IN (SELECT unnest($codes)) ORDER BY ALL
"""
_BY_ID = "SELECT concept_id FROM read_parquet($file) WHERE concept_id IN (SELECT unnest($ids))"
_MAPS_TO = """
SELECT DISTINCT concept_id_1, concept_id_2 FROM read_parquet($file)
WHERE concept_id_1 IN (SELECT unnest($ids)) AND relationship_id = 'Maps to' AND invalid_reason IS NULL
  AND concept_id_2 <> 0 ORDER BY ALL
"""


def look_up(connection: Connection, settings: Settings, ids: Collection[int], codes: Collection[str]) -> ReleasedWords:
    """What the kept vocabulary release says of some concepts and codes; nothing where none was loaded.

    Raises:
        StoreError: its files are not on this host.
    """
    found = ReleasedWords()
    release = current_release(connection)
    if release is None or not (ids or codes):
        return found
    import duckdb

    with duckdb.connect() as reader:
        return _read(reader, settings, release, ids, codes)


def _read(
    reader: duckdb.DuckDBPyConnection,
    settings: Settings,
    release: Release,
    ids: Collection[int],
    codes: Collection[str],
) -> ReleasedWords:
    found = ReleasedWords()
    concepts = kept_file(settings, release, "concept")
    if concepts is not None:
        found.known.update(row[0] for row in _rows(reader, _BY_ID, concepts, ids=list(ids)))
        for code, concept, standard in _rows(reader, _BY_CODE, concepts, codes=list(codes)):
            found.by_code.setdefault(code, []).append((concept, standard))
    others = [c for named in found.by_code.values() for c, standard in named if standard != "S"]
    mappings = kept_file(settings, release, "concept_relationship")
    if others and mappings is not None:
        for source, target in _rows(reader, _MAPS_TO, mappings, ids=others):
            found.maps_to.setdefault(source, []).append(target)
    return found


def _rows(
    reader: duckdb.DuckDBPyConnection, statement: str, file: Path, **values: Sequence[object]
) -> list[tuple[Any, ...]]:
    return reader.execute(statement, {"file": str(file), **values}).fetchall()


def kept_file(settings: Settings, release: Release, table: str) -> Path | None:
    """A table's file beside the store, None where the release lacks it. Raises StoreError."""
    kept = release.files.get(table)
    if kept is None:
        return None
    here, key = place(settings), str(kept["path"])
    path = here.path(key)
    if path.is_file() and path.stat().st_size == kept["bytes"]:  # the digest of large tables would take longer
        return path
    try:
        return here.get(key, str(kept["sha256"]))
    except ArtifactsAway:
        raise
    except StoreError:
        raise StoreError(
            f"Expected the vocabulary {release.version} beside the store, found {table} missing or cut short; "
            "set LACHESIS_ARTIFACTS to where it is, or run `lachesis load vocabulary` again."
        ) from None
