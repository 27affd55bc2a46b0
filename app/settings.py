"""Where things are: one frozen `Settings`, read once from the environment and the current folder."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from app.errors import InputError

POSTGRES_VERSIONS = ("16", "18")
POSTGRES_SCHEMES = ("postgresql", "postgresql+psycopg")
REDIS_SCHEMES = ("redis", "rediss", "unix")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the environment says; no field is a secret but the URLs, which are never printed."""

    home: Path | None
    """The folder of the embedded store, or None where there is none here."""
    home_is_named: bool = False
    """True where LACHESIS_HOME names it, so that any command may create it."""
    database_url: str | None = None
    """An external Postgres; nothing is started then."""
    redis_url: str | None = None
    reader_url: str | None = None
    artifacts: str | None = None
    """Folder (a path or a file:// URL) in which checkpoints and reports are kept; default HOME/artifacts."""
    cache: Path | None = None
    """Folder of cached volumes; default HOME/cache."""
    cache_bytes: int | None = None
    """The most that cached volumes may take; None: as much as the disk has."""
    postgres_version: int = 18
    role_prefix: str = "lachesis"
    roots: Mapping[str, Path] = field(default_factory=dict)
    """LACHESIS_ROOT_<NAME>: where this host keeps the files of a root name."""
    encoders: str | None = None
    """Python files, a colon between them, each an encoder of its own (docs/encoders.md); workers run them."""
    devices: str | None = None
    """LACHESIS_DEVICES: devices that jobs of a worker may use (workers/devices.py); None for all it sees."""

    @property
    def home_to_be(self) -> Path:
        """The home, or where a new one would be made: `.lachesis/` in the current folder."""
        return self.home or Path.cwd() / ".lachesis"


def find_home(start: Path) -> Path | None:
    """The nearest `.lachesis/` in `start` or one of its parents."""
    return next((p / ".lachesis" for p in (start, *start.parents) if (p / ".lachesis").is_dir()), None)


def read_settings(environ: Mapping[str, str] | None = None, folder: Path | None = None) -> Settings:
    """Read the settings; the only reader of the process's environment.

    Raises:
        InputError: a variable has a value that is none of those it may have.
    """
    env = os.environ if environ is None else environ
    named = env.get("LACHESIS_HOME")
    home = Path(named).expanduser().absolute() if named else find_home(folder or Path.cwd())
    postgres = env.get("LACHESIS_POSTGRES") or POSTGRES_VERSIONS[-1]
    if postgres not in POSTGRES_VERSIONS:
        raise InputError(f"Expected LACHESIS_POSTGRES to be {' or '.join(POSTGRES_VERSIONS)}, got {postgres!r}.")
    prefix = "LACHESIS_ROOT_"
    return Settings(
        home=home,
        home_is_named=bool(named),
        database_url=_url(env, "LACHESIS_DATABASE_URL", POSTGRES_SCHEMES),
        redis_url=_url(env, "LACHESIS_REDIS_URL", REDIS_SCHEMES),
        reader_url=_url(env, "LACHESIS_READER_URL", POSTGRES_SCHEMES),
        artifacts=env.get("LACHESIS_ARTIFACTS") or None,
        cache=Path(env["LACHESIS_CACHE"]).expanduser().absolute() if env.get("LACHESIS_CACHE") else None,
        cache_bytes=_size(env, "LACHESIS_CACHE_SIZE"),
        postgres_version=int(postgres),
        role_prefix=env.get("LACHESIS_ROLE_PREFIX") or "lachesis",
        roots={k[len(prefix) :].lower(): Path(v) for k, v in env.items() if k.startswith(prefix) and v},
        encoders=_paths(env.get("LACHESIS_ENCODERS")),
        devices=env.get("LACHESIS_DEVICES") or None,
    )


def _paths(text: str | None) -> str | None:
    """Absolute paths, for a worker may stand in another folder."""
    return os.pathsep.join(str(Path(p).expanduser().absolute()) for p in (text or "").split(os.pathsep) if p) or None


def _size(env: Mapping[str, str], name: str) -> int | None:
    """Bytes of a number with a unit."""
    given = env.get(name)
    if not given:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGTP]?)(I?)B", given.strip().upper())
    if match is None or float(match[1]) == 0:
        raise InputError(f"Expected a size like 200GB or 1.5TB in {name}, got {given!r}.")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGTP".index(match[2] or " "))


def _url(env: Mapping[str, str], name: str, schemes: tuple[str, ...]) -> str | None:
    """A URL of one of these schemes; what was found instead is not repeated, for it may hold a password."""
    url = env.get(name) or None
    scheme = None if url is None else url.partition("://")[0]
    if url is not None and (scheme == url or scheme not in schemes):
        raise InputError(f"Expected {name} to begin with {schemes[0]}://, found another beginning; give a URL.")
    return url
