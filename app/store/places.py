"""Where published files lie: a folder that every host mounts, or a bucket of an object store.

Files go under keys (`KIND/ab/SHA256.suffix`) made of their own content, so that two attempts at one job write the same
bytes under the same key and neither can harm the other. A key is either whole or not there: a folder gets its file by
a rename, a bucket by a request that ends in one step. Each place reads back what it wrote before anybody may name it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

from app.errors import InputError, StoreError

if TYPE_CHECKING:
    from app.settings import Settings


@dataclass(frozen=True, slots=True)
class Published:
    """A file at a place."""

    key: str
    size: int
    modified: float
    """Seconds since 1970."""


class Place(Protocol):
    """Files under keys. Each method raises ArtifactsAway where the place does not answer for now."""

    def put(self, file: Path, key: str, sha256: str) -> None:
        """Write a file under its key and read it back; nothing happens where it is there. Raises OSError."""

    def get(self, key: str, sha256: str) -> Path:
        """The file on this host, its content checked. Raises StoreError where it is missing or altered."""

    def path(self, key: str) -> Path:
        """Where the file, or this host's copy of it, lies once it was put or got."""

    def size(self, key: str) -> int | None:
        """Bytes of a file, None where there is none."""

    def remove(self, key: str) -> bool:
        """Delete a file; whether there was one."""

    def listing(self, kind: str = "") -> Iterator[Published]:
        """Every file whose key begins with `kind/`, or every file; unfinished ones of a folder are among them."""

    def name(self, key: str) -> str:
        """What a person calls the file: its path or URL."""

    def require(self) -> None:
        """Write, read and delete a small file. Raises StoreError or OSError where one of these is not possible."""


def place(settings: Settings) -> Place:
    """The place that LACHESIS_ARTIFACTS names, HOME/artifacts by default.

    Raises:
        StoreError: neither says where, or a URL of another kind.
    """
    url = settings.artifacts
    if url is None:
        if settings.home is None:
            raise StoreError("Expected a place for artifacts, found none; set LACHESIS_ARTIFACTS or LACHESIS_HOME.")
        return FolderPlace(settings.home / "artifacts")
    scheme = url.partition("://")[0] if "://" in url else "file"
    if scheme == "s3":
        from app.store.object_place import ObjectPlace

        bucket, prefix = _bucket(url)
        return ObjectPlace(bucket, prefix, cache_folder(settings) / ".artifacts")
    if scheme != "file":
        raise StoreError(
            f"Expected a folder, a file:// or an s3:// URL in LACHESIS_ARTIFACTS, found a URL of the kind {scheme}; "
            "name a folder that every host mounts, or a bucket of a store that speaks S3."
        )
    return FolderPlace(Path(url.removeprefix("file://")))


def _bucket(url: str) -> tuple[str, str]:
    """Bucket and prefix; what else a URL may hold is not repeated, for it may be a password."""
    parts = urlsplit(url)
    if not parts.netloc or "@" in parts.netloc or ":" in parts.netloc or parts.query or parts.fragment:
        raise StoreError(
            "Expected LACHESIS_ARTIFACTS to be s3://BUCKET/PREFIX, found more or less than that; name the server in "
            "AWS_ENDPOINT_URL and the keys in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        )
    return parts.netloc, parts.path.strip("/")


def cache_folder(settings: Settings) -> Path:
    """LACHESIS_CACHE, else HOME/cache, else `cache` among the artifacts. Raises InputError where none is named."""
    if settings.cache is not None:
        return settings.cache
    if settings.home is not None:
        return settings.home / "cache"
    if settings.artifacts and settings.artifacts.startswith("s3://"):
        raise InputError("Expected a folder for cached files of the bucket, found none; set LACHESIS_CACHE.")
    return place(settings).path("cache")


class FolderPlace:
    """A folder that every host mounts."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, key: str) -> Path:
        return self.root / key

    def put(self, file: Path, key: str, sha256: str) -> None:
        target = self.root / key
        if target.exists() and digest_of(target) == sha256:  # one that was damaged is mended
            return
        write_copy(file, target, sha256)

    def get(self, key: str, sha256: str) -> Path:
        path = self.root / key
        if not path.is_file():
            raise StoreError(
                f"Expected the artifact {key} on this host, found none; set LACHESIS_ARTIFACTS to where it is."
            )
        if digest_of(path) != sha256:
            raise altered(key)
        return path

    def size(self, key: str) -> int | None:
        path = self.root / key
        return path.stat().st_size if path.is_file() else None

    def remove(self, key: str) -> bool:
        path = self.root / key
        was = path.is_file()
        path.unlink(missing_ok=True)
        return was

    def listing(self, kind: str = "") -> Iterator[Published]:
        for path in sorted((self.root / kind).rglob("*")):
            if path.is_file():
                status = path.stat()
                yield Published(path.relative_to(self.root).as_posix(), status.st_size, status.st_mtime)

    def name(self, key: str) -> str:
        return str((self.root / key).absolute())

    def require(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        path = self.root / f".check.{uuid.uuid4().hex}"
        try:
            path.write_bytes(b"lachesis")
            path.read_bytes()
        except PermissionError as error:
            raise StoreError(
                f"Expected to write among the artifacts in {self.root}, got {error.strerror}; let the worker's user "
                "write there, or set LACHESIS_ARTIFACTS to another folder."
            ) from None
        finally:
            path.unlink(missing_ok=True)


def digest_of(path: Path) -> str:
    """sha256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def altered(key: str) -> StoreError:
    """What is said of a file whose content is not that of its key."""
    return StoreError(f"The artifact {key} is not what was stored (sha256 differs); restore it from a backup.")


def write_copy(file: Path, target: Path, sha256: str) -> None:
    """Copy a file so that its name is there only when all of it is safely on the disk and reads back as written."""
    with arriving(target) as part:
        shutil.copyfile(file, part)
        if digest_of(part) != sha256:
            raise OSError(errno.EIO, f"{part.name} does not read back as written")


@contextmanager
def arriving(target: Path) -> Iterator[Path]:
    """A name beside the target's to write to; it is renamed to the target where all went well, else it is gone."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        yield part
        with part.open("rb") as handle:
            os.fsync(handle.fileno())
        part.rename(target)
    finally:
        part.unlink(missing_ok=True)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
