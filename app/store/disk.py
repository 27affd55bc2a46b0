"""What takes space: tables, artifacts by kind, cached volumes by recipe, and what else lies in the home."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.store import named_files
from app.store.cache_room import CacheRoom, folder
from app.store.places import place
from app.store.pruning import bytes_below
from app.store.runs import runs_folder

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from app.settings import Settings

TABLES = """
SELECT n.nspname || '.' || r.relname AS name, sum(coalesce(pg_table_size(c.oid), 0))::bigint AS table_bytes,
       sum(coalesce(pg_indexes_size(c.oid), 0))::bigint AS index_bytes,
       (sum(c.reltuples) FILTER (WHERE c.reltuples >= 0 AND c.relkind <> 'p'))::bigint AS rows,
       count(*) FILTER (WHERE c.relispartition) AS partitions
FROM pg_class c
JOIN pg_class r ON r.oid = coalesce(pg_partition_root(c.oid), c.oid)
JOIN pg_namespace n ON n.oid = r.relnamespace
WHERE n.nspname IN ('omop', 'label', 'model', 'ops') AND c.relkind IN ('r', 'p', 'm')
GROUP BY 1 ORDER BY sum(coalesce(pg_total_relation_size(c.oid), 0)) DESC, 1
"""

PARTITIONS = """
SELECT n.nspname || '.' || c.relname AS name, coalesce(pg_total_relation_size(c.oid), 0) AS bytes,
       nullif(c.reltuples, -1)::bigint AS rows, obj_description(c.oid, 'pg_class') AS what
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname IN ('omop', 'label', 'model', 'ops') AND c.relkind = 'r' AND c.relispartition
ORDER BY 2 DESC, 1
"""


def database(connection: Connection) -> dict[str, Any]:
    """Bytes of the database; a row a table, largest first (rows by statistics, if any), and a row a partition."""
    from sqlalchemy import text

    tables = [dict(row) for row in connection.execute(text(TABLES)).mappings()]
    return {
        "bytes": int(connection.execute(text("SELECT pg_database_size(current_database())")).scalar_one()),
        "tables": [{"name": t["name"], "bytes": t["table_bytes"] + t["index_bytes"], **t} for t in tables],
        "partitions": [dict(row) for row in connection.execute(text(PARTITIONS)).mappings()],
    }


def files(connection: Connection, settings: Settings) -> dict[str, Any]:
    """Bytes and files among the artifacts, a row a kind and how much of it no row names; how many named are missing.

    Raises:
        ArtifactsAway: a bucket does not answer.
    """
    count, size, unnamed = Counter[str](), Counter[str](), Counter[str]()
    listed = [one for kind in named_files.KINDS for one in place(settings).listing(kind)]
    named = named_files.named(connection)
    for one in listed:
        kind = one.key.partition("/")[0]
        count[kind] += 1
        size[kind] += one.size
        unnamed[kind] += 0 if one.key in named else one.size
    kinds = [
        {"name": kind, "bytes": size[kind], "files": count[kind], "unnamed_bytes": unnamed[kind]}
        for kind in sorted(count, key=lambda kind: -size[kind])
    ]
    missing = len(named - {one.key for one in listed})
    where = place(settings).name("").rstrip("/")
    return {"bytes": sum(size.values()), "place": where, "kinds": kinds, "missing_files": missing}


def volumes(settings: Settings) -> dict[str, Any]:
    """Bytes of cached volumes, a row a recipe, and of copies of a bucket's files."""
    root = folder(settings)
    recipes = CacheRoom(root, settings.cache_bytes).listing()
    copies = bytes_below(root / ".artifacts")
    return {
        "bytes": sum(one["bytes"] for one in recipes) + copies,
        "folder": str(root),
        "recipes": sorted(recipes, key=lambda one: -one["bytes"]),
        "copies_bytes": copies,
    }


def rest(settings: Settings) -> dict[str, Any]:
    """Bytes of what attempts left on this host, and of the other folders of the home."""
    runs = runs_folder(settings)
    parts = {"runs": bytes_below(runs)}
    elsewhere = {path.resolve() for path in (runs, folder(settings), place(settings).path(""))}
    if settings.home is not None and settings.home.is_dir():
        for path in sorted(settings.home.iterdir()):
            if path.is_dir() and path.resolve() not in elsewhere and path.name not in ("postgres", "redis", "sock"):
                parts[path.name] = bytes_below(path)
    found = [{"name": name, "bytes": size} for name, size in parts.items() if size]
    return {"bytes": sum(parts.values()), "folders": sorted(found, key=lambda one: -one["bytes"])}


def free(settings: Settings) -> dict[str, int]:
    """Folder → bytes free on its disk, of the home and of the cache where that lies on another."""
    found: dict[int, tuple[str, int]] = {}
    for path in (settings.home, folder(settings)):
        if path is not None:
            near = next(one for one in (path, *path.parents) if one.exists())
            found.setdefault(near.stat().st_dev, (str(path), shutil.disk_usage(near).free))
    return dict(found.values())


def servers(root: Path, database_bytes: int) -> dict[str, Any]:
    """Bytes of an embedded Postgres beside the database (write-ahead log, templates), and of Redis."""
    postgres, redis = bytes_below(root / "postgres"), bytes_below(root / "redis")
    parts = {"write-ahead log and templates": max(0, postgres - database_bytes), "redis": redis}
    found = [{"name": name, "bytes": size} for name, size in parts.items() if size]
    return {"bytes": sum(parts.values()), "folders": found}
