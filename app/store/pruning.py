"""What nothing needs any more: stops, embeddings without a checkpoint, files without a row, and what attempts left."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.errors import InputError
from app.store import artifacts, named_files
from app.store.cache_room import CacheRoom, folder
from app.store.incoming import Place, remove_without_job, without_job
from app.store.places import place
from app.store.removing_checkpoints import drop_embeddings
from app.store.runs import runs_folder

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

    from app.settings import Settings

DAY_SECONDS = 86_400.0
ENDED = "('succeeded', 'failed', 'cancelled', 'dead')"
KINDS = {
    "stops": "stops on the way of ended trainings, beyond those kept",
    "files": "files among the artifacts that no row names",
    "unfinished": "files that killed processes left half-written",
    "attempts": "files that attempts at ended jobs left on this host",
    "volumes": "cached volumes that were not used for long",
    "incoming": "vectors on their way to be embeddings, of jobs that have ended",
    "embeddings": "embeddings whose checkpoint is gone",
}
"""What may go, in words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What counts as not needed."""

    stops: int = artifacts.KEPT_STOPS
    """Stops on the way that each ended training keeps, beside its best."""
    days: float = 7
    """Files younger than this stay, and what attempts at jobs left that ended since."""
    volumes_days: float | None = None
    """Cached volumes unused for so long go; None: they stay."""
    force: bool = False
    """Although most files among the artifacts are named by no row."""


@dataclass(frozen=True, slots=True)
class Item:
    """One thing that may go."""

    kind: str
    """One of `KINDS`."""
    name: str
    size: int
    """Bytes."""
    key: int = 0
    """Of the job or checkpoint."""
    cohort: int = 0
    """Of vectors on their way."""


def look(connection: Connection, settings: Settings, options: Options) -> list[Item]:
    """All that may go, of each kind in an order of its own. Raises ArtifactsAway where a bucket is away."""
    files = _files(connection, settings, options)
    return [
        *_stops(connection, options),
        *files,
        *_unfinished_volumes(settings, options),
        *_attempts(connection, settings, options),
        *_volumes(settings, options),
        *(Item("incoming", name, size, at.checkpoint_id, at.cohort_id) for at, name, size in without_job(connection)),
        *_embeddings(connection),  # last, for others who read embeddings all the time may keep them
    ]


def _stops(connection: Connection, options: Options) -> list[Item]:
    from sqlalchemy import text

    statement = f"""
    SELECT s.* FROM ({artifacts.SUPERFLUOUS}) s JOIN ops.job j USING (job_id) WHERE j.state IN {ENDED} ORDER BY 1
    """
    rows = connection.execute(text(statement), {"job": None, "keep": options.stops})
    return [Item("stops", f"{row.name}@{row.epoch}", row.num_bytes, row.job_id) for row in rows]


def _embeddings(connection: Connection) -> list[Item]:
    from sqlalchemy import text

    rows = connection.execute(
        text(
            "SELECT c.relname AS name, pg_total_relation_size(c.oid) AS size FROM pg_inherits i "
            "JOIN pg_class c ON c.oid = i.inhrelid WHERE i.inhparent = to_regclass('model.embedding') "
            "AND c.relname ~ '^embedding_[0-9]+$' AND NOT EXISTS (SELECT FROM model.checkpoint k "
            "WHERE 'embedding_' || k.checkpoint_id = c.relname) ORDER BY 1"
        )
    )
    return [Item("embeddings", row.name, int(row.size or 0), int(row.name.rpartition("_")[2])) for row in rows]


def _files(connection: Connection, settings: Settings, options: Options) -> list[Item]:
    """Files no row names, and those that were not written to their end, both only of our kinds."""
    listed = [one for kind in named_files.KINDS for one in place(settings).listing(kind)]
    named = named_files.named(connection)  # after the listing: what is named meanwhile is not taken for unnamed
    now, items = time.time(), []
    for one in listed:
        age = (now - one.modified) / DAY_SECONDS
        if Path(one.key).name.startswith("."):
            if age > max(1.0, options.days):
                items.append(Item("unfinished", one.key, one.size))
        elif one.key not in named and age >= options.days:
            items.append(Item("files", one.key, one.size))
    return items


def mostly_unnamed(connection: Connection, settings: Settings, items: Sequence[Item]) -> bool:
    """Whether these files are more than those that rows name: the place may be another store's."""
    unnamed = sum(item.kind == "files" for item in items)
    return unnamed > 0 and unnamed > len(named_files.named(connection))


def _unfinished_volumes(settings: Settings, options: Options) -> list[Item]:
    return [
        Item("unfinished", str(path), size)
        for path, size, age in _cache_parts(folder(settings))
        if age > max(1.0, options.days)
    ]


def _cache_parts(cache: Path) -> Iterator[tuple[Path, int, float]]:
    """(path, bytes, age in days) of half-written volumes: ROOT/RECIPE/.STEM.PID."""
    for path in sorted(cache.glob("[!.]*/.*")):
        with contextlib.suppress(OSError):
            status = path.lstat()
            if path.is_file():
                yield path, status.st_size, (time.time() - status.st_mtime) / DAY_SECONDS


def _attempts(connection: Connection, settings: Settings, options: Options) -> list[Item]:
    from sqlalchemy import text

    runs = runs_folder(settings)
    folders = {int(path.name): path for path in runs.glob("*") if path.name.isdecimal() and path.is_dir()}
    ended = connection.execute(
        text(
            f"SELECT job_id FROM ops.job WHERE job_id = ANY(:ids) AND state IN {ENDED} "
            "AND finished_at < clock_timestamp() - make_interval(secs => :seconds) ORDER BY 1"
        ),
        {"ids": list(folders), "seconds": options.days * DAY_SECONDS},
    ).scalars()
    return [Item("attempts", str(folders[job]), bytes_below(folders[job]), job) for job in ended]


def _volumes(settings: Settings, options: Options) -> list[Item]:
    if options.volumes_days is None:
        return []
    room = CacheRoom(folder(settings), settings.cache_bytes)
    count, size = room.remove((), options.volumes_days, dry_run=True)
    return [Item("volumes", f"{count:,} volumes", size, count)] if count else []


def bytes_below(root: Path) -> int:
    """Bytes of all files below a folder; links are not followed."""
    total = 0
    for path in root.rglob("*"):
        with contextlib.suppress(OSError):
            if path.is_file() and not path.is_symlink():
                total += path.lstat().st_size
    return total


def take(engine: Engine, settings: Settings, options: Options, items: Iterable[Item]) -> list[Item]:
    """Remove what `look` found and is not needed still; what was removed.

    Each thing is looked at again under a lock, so that a job which begins meanwhile keeps what it uses.

    Raises:
        InputError: most files among the artifacts are named by no row, and nothing was removed; or others read
            embeddings all the time, and all else was.
    """
    found = list(items)
    with engine.connect() as connection:
        if not options.force and mostly_unnamed(connection, settings, found):
            raise InputError(
                "Expected most files among the artifacts to be named by rows of this store, found more without; check "
                "that LACHESIS_ARTIFACTS is not another store's, then take them by --force."
            )
    gone: list[Item] = []
    for item in found:
        if _TAKE[item.kind](engine, settings, options, item):
            gone.append(item)
    return gone


def _take_stop(engine: Engine, settings: Settings, options: Options, item: Item) -> bool:
    """All superfluous stops of one training go at its first."""
    with engine.begin() as connection:
        if not _has_ended(connection, item.key):
            return False
        keys = artifacts.forget_stops(connection, item.key, options.stops)
    with engine.connect() as connection:
        named_files.remove(connection, settings, keys)
    return True


def _has_ended(connection: Connection, job_id: int) -> bool:
    """Whether a job has ended, and cannot be tried again before this transaction ends."""
    from sqlalchemy import text

    statement = text(f"SELECT 1 FROM ops.job WHERE job_id = :job AND state IN {ENDED} FOR UPDATE")
    return connection.execute(statement, {"job": job_id}).first() is not None


def _take_embeddings(engine: Engine, settings: Settings, options: Options, item: Item) -> bool:
    with engine.begin() as connection:
        drop_embeddings(connection, [item.key])
    return True


def _take_incoming(engine: Engine, settings: Settings, options: Options, item: Item) -> bool:
    with engine.begin() as connection:
        return remove_without_job(connection, Place(item.key, item.cohort))


def _take_file(engine: Engine, settings: Settings, options: Options, item: Item) -> bool:
    with engine.connect() as connection:
        return bool(named_files.remove(connection, settings, [item.name]))


def _take_unfinished(engine: Engine, settings: Settings, options: Options, item: Item) -> bool:
    path = Path(item.name)
    if not path.is_absolute():
        return place(settings).remove(item.name)
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
        return True
    return False


def _take_attempt(engine: Engine, settings: Settings, options: Options, item: Item) -> bool:
    with engine.begin() as connection:
        if not _has_ended(connection, item.key):
            return False
        shutil.rmtree(item.name, ignore_errors=True)
    return not Path(item.name).exists()


def _take_volumes(engine: Engine, settings: Settings, options: Options, item: Item) -> bool:
    room = CacheRoom(folder(settings), settings.cache_bytes)
    return room.remove((), options.volumes_days or 0)[0] > 0


_TAKE: dict[str, Any] = {
    "stops": _take_stop,
    "embeddings": _take_embeddings,
    "files": _take_file,
    "unfinished": _take_unfinished,
    "attempts": _take_attempt,
    "volumes": _take_volumes,
    "incoming": _take_incoming,
}
