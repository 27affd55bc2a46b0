"""Room for cached volumes: how much there is, what running jobs use, and which files go where it runs short.

Volumes lie in ROOT/RECIPE/*.npy. A job that uses some holds a lease: a locked file in ROOT/.in_use that names them and
says how much is still to be written. Its lock ends with its process, however that ends, and with it the lease.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.errors import InputError, UnknownName
from app.store.places import cache_folder

if TYPE_CHECKING:
    from app.settings import Settings

SPARE_BYTES = 256 << 20
"""What stays free on the disk: servers, logs and checkpoints live there, too."""


def folder(settings: Settings) -> Path:
    """LACHESIS_CACHE, else HOME/cache, else `cache` among the artifacts."""
    return cache_folder(settings)


@dataclass(frozen=True, slots=True)
class Volume:
    """One cached file."""

    name: str
    """RECIPE/FILE."""
    size: int
    used: float
    """When it was last used, seconds since 1970."""


class Lease:
    """Files that this process uses; ends with `close` or the process."""

    def __init__(self, root: Path) -> None:
        (root / ".in_use").mkdir(parents=True, exist_ok=True)
        self.path = root / ".in_use" / uuid.uuid4().hex
        self.since = time.time()
        self.file = self.path.open("w")
        fcntl.flock(self.file, fcntl.LOCK_EX)
        self.note([], 0)

    def note(self, files: Iterable[str], reserved_bytes: int) -> None:
        """Say which files (RECIPE/FILE) are used, and how much is still to be written."""
        said = {"since": self.since, "reserved": reserved_bytes, "files": sorted(set(files))}
        self.file.seek(0)
        self.file.write(json.dumps(said))
        self.file.truncate()
        self.file.flush()

    def close(self) -> None:
        self.path.unlink(missing_ok=True)
        self.file.close()

    def __del__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            self.close()


class CacheRoom:
    """The folder of cached volumes and the most it may hold."""

    def __init__(self, root: Path, most_bytes: int | None = None) -> None:
        self.root, self.most_bytes = root, most_bytes

    def claim(self, files: Iterable[str], need_bytes: int, what: str) -> tuple[Lease, int]:
        """Make room for volumes to come, by removing those unused for longest; a lease, and how many were removed.

        Args:
            files: cached volumes (RECIPE/FILE) that will be used.
            need_bytes: of those that will be made.
            what: what they are, for the sentence of the error.

        Raises:
            InputError: they do not fit; nothing was removed.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        mine = set(files)
        with self._locked():
            volumes, leases = self.volumes(), self._leases()
            used, reserved, young = mine | in_use(leases), sum(one["reserved"] for one in leases), _young(leases)
            free = shutil.disk_usage(self.root).free - SPARE_BYTES - reserved
            total = sum(volume.size for volume in volumes) + reserved
            spare = [v for v in sorted(volumes, key=lambda v: v.used) if v.name not in used and v.used < young]
            short = need_bytes - free if need_bytes else 0
            if self.most_bytes is not None:
                short = max(short, total + need_bytes - self.most_bytes)
            if short > 0 and need_bytes and short > sum(volume.size for volume in spare):
                raise InputError(self._no_room(what, need_bytes, free, total, sum(v.size for v in spare)))
            removed = self._remove_oldest(spare, short)
            lease = Lease(self.root)
            lease.note(mine, need_bytes)
        return lease, removed

    def _no_room(self, what: str, need: int, free: int, total: int, spare: int) -> str:
        limits = [f"{gb(max(0, free))} are free on its disk"]
        if self.most_bytes is not None:
            limits.append(f"LACHESIS_CACHE_SIZE is {gb(self.most_bytes)}, of which {gb(total - spare)} are in use")
        return (
            f"Expected room in the cache for {what} ({gb(need)}), but {' and '.join(limits)}; {gb(spare)} can be "
            "removed. Set LACHESIS_CACHE to a folder on a larger disk or raise LACHESIS_CACHE_SIZE, take a smaller "
            "cohort or --set shape_zyx, or end jobs that use other volumes."
        )

    def _remove_oldest(self, spare: Iterable[Volume], short: int) -> int:
        removed = 0
        for volume in spare:
            if short <= 0:
                break
            (self.root / volume.name).unlink(missing_ok=True)
            short -= volume.size
            removed += 1
        return removed

    def remove(self, recipes: Iterable[str] = (), unused_days: float = 0, *, dry_run: bool = False) -> tuple[int, int]:
        """Remove volumes that no running job uses; how many, and their bytes. Raises UnknownName.

        Args:
            recipes: only those of these folders (or beginnings of their names); all by default.
            unused_days: only those not used for so long.
            dry_run: remove none; how many would be.
        """
        wanted = [self._recipe(name) for name in recipes]
        if not self.root.is_dir():
            return 0, 0
        with self._locked():
            leases = self._leases()
            used, before = in_use(leases), min(time.time() - 86_400 * unused_days, _young(leases))
            gone = [
                volume
                for volume in self.volumes()
                if volume.name not in used
                and volume.used <= before
                and (not wanted or volume.name.split("/")[0] in wanted)
            ]
            if not dry_run:
                for volume in gone:
                    (self.root / volume.name).unlink(missing_ok=True)
                self._remove_facts()
        return len(gone), sum(volume.size for volume in gone)

    def _recipe(self, name: str) -> str:
        known = [folder.name for folder in self._folders()]
        found = [one for one in known if one.startswith(name)]
        if len(found) != 1:
            raise UnknownName("recipe in the cache", name, known)
        return found[0]

    def _remove_facts(self) -> None:
        """What is said of volumes that are gone, and folders without any."""
        for folder in self._folders():
            for facts in folder.glob("*.json"):
                file = str(read_json(facts).get("file") or "")
                if facts.name != "recipe.json" and not (folder / Path(file).name).is_file():
                    facts.unlink(missing_ok=True)
            if not any(folder.glob("*.npy")) and not any(folder.glob(".*")):
                (folder / "recipe.json").unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    folder.rmdir()

    def listing(self) -> list[dict[str, Any]]:
        """A row a recipe: its folder, what it says, how many volumes, their bytes, how many are in use, last used."""
        volumes = self.volumes()
        with self._locked() if self.root.is_dir() else contextlib.nullcontext():
            used = in_use(self._leases())
        rows = []
        for folder in self._folders():
            own = [volume for volume in volumes if volume.name.startswith(f"{folder.name}/")]
            rows.append(
                {
                    "recipe": folder.name,
                    "settings": read_json(folder / "recipe.json"),
                    "volumes": len(own),
                    "bytes": sum(volume.size for volume in own),
                    "in_use": sum(volume.name in used for volume in own),
                    "last_used": max((volume.used for volume in own), default=None),
                }
            )
        return rows

    def volumes(self) -> list[Volume]:
        """Every cached file."""
        found = []
        for folder in self._folders():
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.endswith(".npy") and not entry.name.startswith("."):
                        with contextlib.suppress(FileNotFoundError):
                            stat = entry.stat()
                            found.append(Volume(f"{folder.name}/{entry.name}", stat.st_size, stat.st_mtime))
        return found

    def _folders(self) -> list[Path]:
        if not self.root.is_dir():
            return []
        return sorted(path for path in self.root.iterdir() if path.is_dir() and not path.name.startswith("."))

    def _leases(self) -> list[dict[str, Any]]:
        """What jobs that run say; what others left is removed. Only while locked."""
        found = []
        for path in (self.root / ".in_use").glob("*"):
            try:
                with path.open() as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink(missing_ok=True)
            except BlockingIOError:
                found.append({"since": 0.0, "reserved": 0, "files": [], **read_json(path)})
            except FileNotFoundError:
                continue
        return found

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.root / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def in_use(leases: Iterable[dict[str, Any]]) -> set[str]:
    """Files that leases name."""
    return {name for lease in leases for name in lease["files"]}


def _young(leases: Iterable[dict[str, Any]]) -> float:
    """Files younger than this may have been made by a job that is still making others."""
    return min((lease["since"] for lease in leases if lease["reserved"]), default=float("inf"))


def read_json(path: Path) -> dict[str, Any]:
    """An object, or an empty one where there is none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def gb(size: float) -> str:
    """Bytes as people read them."""
    return f"{size / 1e9:,.2f} GB" if size < 1e11 else f"{size / 1e9:,.0f} GB"
