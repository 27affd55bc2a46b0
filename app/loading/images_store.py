"""Writing scans: rows of omop.image_occurrence and what their source says of itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from app.errors import InputError
from app.loading.images_header import STAMP

if TYPE_CHECKING:
    from sqlalchemy import Connection

COLUMNS = (
    *("person_id", "acquired_at", "date_only", "acquired_at_source", "study_uid", "series_uid", "image_key"),
    *("root", "path", "format", "rows", "columns", "slices", "spacing_mm", "slice_thickness_mm"),
    *("kernel", "orientation", "hu_state", "verdict", "reasons", "details"),
)
KEY = ("person_id", "acquired_at", "image_key")
GONE = "gone_from_source"
"""Reason of a scan that its source no longer has."""
CONTENT = ("root", "path", "format", "rows", "columns", "slices", "spacing_mm")
"""Where one of these, or the stamp of the files, changes, the digest of the voxels is no longer known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What a load says of its source's scans."""

    arbitrary_pairing: bool
    simulated: bool
    only: bool
    """True where these scans are all that the source shows: what was said of earlier ones no longer holds."""


def describe(connection: Connection, source_id: int, roots: Mapping[str, str], facts: Facts) -> None:
    """Keep where roots lie on this host and what is said of the source's scans.

    A source that also holds an extract stays simulated where that extract is.
    """
    from sqlalchemy import bindparam, text
    from sqlalchemy.dialects.postgresql import JSONB

    statement = text(
        "UPDATE ops.source s SET arbitrary_pairing = :arbitrary OR (s.arbitrary_pairing AND NOT :only), "
        "simulated = :simulated OR (s.simulated AND (NOT :only OR EXISTS (SELECT FROM ops.load l "
        "WHERE l.source_id = s.source_id AND l.state = 'published' AND l.kind <> 'images'))), "
        "details = s.details || jsonb_build_object('roots', coalesce(s.details -> 'roots', '{}'::jsonb) || :roots) "
        "WHERE s.source_id = :source_id"
    ).bindparams(bindparam("roots", type_=JSONB))
    connection.execute(
        statement,
        {
            "arbitrary": facts.arbitrary_pairing,
            "simulated": facts.simulated,
            "only": facts.only,
            "roots": dict(roots),
            "source_id": source_id,
        },
    )


def root_folder(connection: Connection, source_id: int, root: str) -> str | None:
    """The folder that a source's root was last loaded from."""
    from sqlalchemy import text

    statement = text("SELECT details -> 'roots' ->> :root FROM ops.source WHERE source_id = :source_id")
    found: str | None = connection.scalar(statement, {"root": root, "source_id": source_id})
    return found


def keep_root(connection: Connection, source_id: int, root: str, folder: str | None, load_id: int) -> None:
    """Give earlier scans under a root which now is another folder a root of their own, `<root>_<load_id>`, so that
    their paths do not lead to other scans."""
    from sqlalchemy import text

    values = {
        "source_id": source_id,
        "root": root,
        "folder": folder,
        "kept": f"{root}_{load_id}",
        "load_id": load_id,
        "gone": GONE,
    }
    moved = connection.execute(
        text(
            "UPDATE omop.image_occurrence i SET root = :kept FROM ops.load l WHERE l.load_id = i.load_id "
            "AND l.source_id = :source_id AND i.root = :root AND (i.load_id <> :load_id OR :gone = ANY(i.reasons))"
        ),
        values,
    )
    if not moved.rowcount:
        return
    connection.execute(
        text(
            "UPDATE ops.source SET details = jsonb_set(details, ARRAY['roots', CAST(:kept AS text)], "
            "to_jsonb(CAST(:folder AS text))) WHERE source_id = :source_id"
        ),
        values,
    )


def current_keys(connection: Connection, source_id: int) -> dict[tuple[int, Any, str], int]:
    """Keys of the scans a source shows now → image_occurrence_id."""
    from sqlalchemy import text

    rows = connection.execute(
        text(
            "SELECT i.person_id, i.acquired_at, i.image_key, i.image_occurrence_id FROM omop.image_occurrence i "
            "JOIN ops.load l USING (load_id) WHERE l.source_id = :source_id AND NOT :gone = ANY(i.reasons)"
        ),
        {"source_id": source_id, "gone": GONE},
    )
    return {(row[0], row[1], row[2]): row[3] for row in rows}


def shown_load(connection: Connection, source_id: int, content_sha256: bytes) -> int | None:
    """The load of this content whose scans are all still shown as it wrote them, if there is one."""
    from sqlalchemy import text

    found: int | None = connection.scalar(
        text(
            "SELECT l.load_id FROM ops.load l WHERE l.source_id = :source_id AND l.kind = 'images' "
            "AND l.state = 'published' AND l.content_sha256 = :digest AND l.num_loaded = (SELECT count(*) "
            "FROM omop.image_occurrence i WHERE i.load_id = l.load_id AND NOT :gone = ANY(i.reasons))"
        ),
        {"source_id": source_id, "digest": content_sha256, "gone": GONE},
    )
    return found


def folders_of_load(connection: Connection, source_id: int, load_id: int) -> set[str]:
    """Where the scans of a load are on this host: the folders of their roots."""
    from sqlalchemy import text

    rows = connection.execute(
        text(
            "SELECT DISTINCT s.details -> 'roots' ->> i.root FROM omop.image_occurrence i, ops.source s "
            "WHERE i.load_id = :load_id AND s.source_id = :source_id"
        ),
        {"load_id": load_id, "source_id": source_id},
    )
    return {str(row[0]) for row in rows}


def refuse_collisions(connection: Connection, source_id: int, keys: Iterable[tuple[int, Any, str]]) -> None:
    """Refuse scans that another source shows: two sources never take each other's rows.

    Raises:
        InputError: naming how many and whose.
    """
    from sqlalchemy import text

    persons, times, images = zip(*keys, strict=True) if (keys := list(keys)) else ((), (), ())
    row = connection.execute(
        text(
            "SELECT count(*), min(s.name) FROM omop.image_occurrence i JOIN ops.load l USING (load_id) "
            "JOIN ops.source s USING (source_id) JOIN unnest(CAST(:persons AS int8[]), CAST(:times AS timestamp[]), "
            "CAST(:images AS text[])) k (person_id, acquired_at, image_key) USING (person_id, acquired_at, image_key) "
            "WHERE l.source_id <> :source_id AND NOT :gone = ANY(i.reasons)"
        ),
        {
            "persons": list(persons),
            "times": list(times),
            "images": list(images),
            "source_id": source_id,
            "gone": GONE,
        },
    ).one()
    if row[0]:
        raise InputError(
            f"Expected scans that no other source shows, found {row[0]:,} that source {row[1]!r} shows; load them "
            "under that name with --source, or give their folder a root name of its own with --root NAME=DIR."
        )


def put(connection: Connection, load_id: int, rows: Iterable[Sequence[Any]]) -> None:
    """Insert scans, or bring known ones up to date under their old key."""
    from psycopg.types.json import Jsonb
    from sqlalchemy import text

    from app.store.session import raw

    names = ", ".join(COLUMNS)
    connection.execute(
        text(
            f"CREATE TEMPORARY TABLE incoming_image ON COMMIT DROP AS SELECT {names} FROM omop.image_occurrence LIMIT 0"
        )
    )
    with raw(connection).cursor().copy(f"COPY incoming_image ({names}) FROM STDIN") as copy:
        for *values, details in rows:
            copy.write_row((*values, Jsonb(details)))
    updates = ", ".join(f"{c} = excluded.{c}" for c in (*COLUMNS, "load_id") if c not in KEY)
    old, new = (", ".join(f"{table}.{c}" for c in CONTENT) for table in ("i", "excluded"))
    connection.execute(
        text(
            f"INSERT INTO omop.image_occurrence AS i ({names}, load_id) SELECT {names}, :load_id FROM incoming_image "
            f"ON CONFLICT (person_id, acquired_at, image_key) DO UPDATE SET {updates}, "
            f"sha256 = CASE WHEN ({old}) IS NOT DISTINCT FROM ({new}) "
            f"AND coalesce(i.details ->> '{STAMP}' = excluded.details ->> '{STAMP}', true) THEN i.sha256 END"
        ),
        {"load_id": load_id},
    )


def remove(connection: Connection, images: list[int]) -> int:
    """Delete scans; those that cohorts or embeddings refer to stay as unusable. How many stay."""
    from sqlalchemy import text

    connection.execute(
        text(
            "DELETE FROM omop.image_occurrence i WHERE image_occurrence_id = ANY(:images) "
            "AND NOT EXISTS (SELECT FROM label.cohort_member m WHERE m.image_occurrence_id = i.image_occurrence_id) "
            "AND NOT EXISTS (SELECT FROM model.embedding e WHERE e.image_occurrence_id = i.image_occurrence_id)"
        ),
        {"images": images},
    )
    kept = connection.execute(
        text(
            "UPDATE omop.image_occurrence SET verdict = 'unusable', reasons = reasons || CAST(:gone AS text) "
            "WHERE image_occurrence_id = ANY(:images)"
        ),
        {"images": images, "gone": GONE},
    )
    return int(kept.rowcount)


def supersede_others(connection: Connection, source_id: int, load_id: int) -> None:
    """Earlier loads of the source none of whose scans is shown any more are no longer the ones seen."""
    from sqlalchemy import text

    from app.store.loads import supersede

    rows = connection.execute(
        text(
            "SELECT l.load_id FROM ops.load l WHERE l.source_id = :source_id AND l.kind = 'images' "
            "AND l.state = 'published' AND l.load_id <> :load_id AND NOT EXISTS (SELECT FROM omop.image_occurrence i "
            "WHERE i.load_id = l.load_id AND NOT :gone = ANY(i.reasons))"
        ),
        {"source_id": source_id, "load_id": load_id, "gone": GONE},
    )
    supersede(connection, [int(row[0]) for row in rows])
