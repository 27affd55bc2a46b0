"""Files and folders of a delivery, on disk or inside zip archives: an archive counts as a folder.

Members are unpacked one by one, when they are read, under names of our own: what an archive calls them never becomes a
path. Names that climb out of the archive, links, encrypted members and bombs are refused.
"""

from __future__ import annotations

import shutil
import stat
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from app.errors import InputError

BOMB_BYTES = 1 << 30
BOMB_RATIO = 200
"""What unpacks to more bytes than this, and to more than so many times its size, is no extract."""
JUNK = frozenset({"thumbs.db", "desktop.ini", "__macosx"})


def is_junk(name: str) -> bool:
    """Litter of operating systems and of writers: hidden files, `_SUCCESS`, `__MACOSX`, `Thumbs.db`."""
    return name.startswith((".", "_")) or name.lower() in JUNK


def refuse_bomb(name: str, size: int, packed: int) -> None:
    """Raise InputError where `packed` bytes unpack to an implausible `size`."""
    if size > BOMB_BYTES and size > BOMB_RATIO * max(packed, 1):
        raise InputError(
            f"Expected {name} to unpack to at most {BOMB_RATIO} times its {packed:,} bytes, found {size:,} or more; "
            "unpack it yourself if it can be trusted."
        )


@dataclass(slots=True)
class Stage:
    """A folder for unpacked members and for text that is written anew in UTF-8."""

    folder: Path
    check: Callable[[], None] = lambda: None
    count: int = 0

    def new(self) -> Path:
        """A path that is not there yet."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.count += 1
        return self.folder / f"staged{self.count}"


class Place(ABC):
    """A file or a folder of a delivery."""

    label: str
    """Path relative to what was given, as messages and books name it."""

    @property
    def name(self) -> str:
        return self.label.rpartition("/")[2]

    @property
    @abstractmethod
    def is_folder(self) -> bool: ...

    @property
    @abstractmethod
    def is_file(self) -> bool: ...

    @property
    @abstractmethod
    def size(self) -> int:
        """Bytes of a file, packed where it is in an archive."""

    @property
    @abstractmethod
    def path(self) -> Path:
        """A file on disk that holds the bytes of a file."""

    @abstractmethod
    def children(self) -> list[Place]:
        """What lies in a folder, by name."""


@dataclass(slots=True)
class DiskPlace(Place):
    """On disk."""

    at: Path
    label: str
    stage: Stage

    @property
    def name(self) -> str:
        return self.at.name

    @property
    def is_folder(self) -> bool:
        return self.at.is_dir()

    @property
    def is_file(self) -> bool:
        return self.at.is_file()

    @property
    def size(self) -> int:
        return self.at.stat().st_size

    @property
    def path(self) -> Path:
        return self.at

    def children(self) -> list[Place]:
        return [
            place(below, f"{self.label}/{below.name}".lstrip("/"), self.stage) for below in sorted(self.at.iterdir())
        ]


def place(path: Path, label: str, stage: Stage) -> Place:
    """The place of a path; a `.zip` file is a folder."""
    if path.name.lower().endswith(".zip") and path.is_file():
        return ZipFolder(Archive(path, label or path.name, stage), (), label or "")
    return DiskPlace(path, label, stage)


@dataclass(slots=True)
class Archive:
    """A zip archive, whose list of members is read and judged when it is first needed."""

    at: Path
    label: str
    stage: Stage
    _members: dict[tuple[str, ...], zipfile.ZipInfo] | None = None
    _unpacked: dict[tuple[str, ...], Path] = field(default_factory=dict)

    def members(self) -> dict[tuple[str, ...], zipfile.ZipInfo]:
        """Files by the parts of their names, without litter.

        Raises:
            InputError: no whole zip file, or a name that leads out of it, comes twice, or is a link.
        """
        if self._members is None:
            try:
                with zipfile.ZipFile(self.at) as opened:
                    infos = opened.infolist()
            except (zipfile.BadZipFile, OSError, EOFError) as error:
                raise InputError(
                    f"Expected a whole zip file in {self.label}, found one that is truncated or damaged; copy it again."
                ) from error
            self._members = self._listed(infos)
        return self._members

    def _listed(self, infos: list[zipfile.ZipInfo]) -> dict[tuple[str, ...], zipfile.ZipInfo]:
        listed: dict[tuple[str, ...], zipfile.ZipInfo] = {}
        for info in infos:
            name = info.filename.replace("\\", "/")
            parts = tuple(part for part in name.split("/") if part not in ("", "."))
            if name.startswith("/") or ".." in parts or (parts and parts[0][1:2] == ":"):
                raise InputError(
                    f"Expected names inside {self.label}, found one that leads out of it; "
                    "do not trust this archive, and have it made again."
                )
            if name.endswith("/") or not parts or any(map(is_junk, parts)):
                continue
            if stat.S_ISLNK(info.external_attr >> 16):
                raise InputError(f"Expected files in {self.label}, found a link; pack the files themselves.")
            if parts in listed:
                raise InputError(f"Expected each name once in {self.label}, found one twice; pack it again.")
            listed[parts] = info
        return listed

    def unpack(self, parts: tuple[str, ...], label: str) -> Path:
        """A member as a file on disk, unpacked once.

        Raises:
            InputError: encrypted, damaged, an unknown method, a bomb, or no room for it.
        """
        if parts not in self._unpacked:
            info = self.members()[parts]
            refuse_bomb(label, info.file_size, info.compress_size)
            if info.flag_bits & 1:
                raise InputError(f"Expected {label} without a password, found an encrypted member; decrypt it.")
            into = self.stage.new()
            room = shutil.disk_usage(into.parent).free
            if info.file_size > room:
                raise InputError(
                    f"Expected room for {info.file_size:,} bytes of {label}, found {room:,} free; make room."
                )
            self._copy(info, into, label)
            self._unpacked[parts] = into
        return self._unpacked[parts]

    def _copy(self, info: zipfile.ZipInfo, into: Path, label: str) -> None:
        try:
            with zipfile.ZipFile(self.at) as opened, opened.open(info) as member, into.open("xb") as out:
                while block := member.read(1 << 20):
                    self.stage.check()
                    out.write(block)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise InputError(f"Expected a whole {label}, found it damaged in its archive; copy it again.") from error
        except (NotImplementedError, RuntimeError) as error:
            raise InputError(
                f"Expected {label} packed as zip's deflate, found another method; unpack it, or pack it again."
            ) from error


@dataclass(slots=True)
class ZipFolder(Place):
    """An archive, or a folder in one."""

    archive: Archive
    parts: tuple[str, ...]
    label: str

    @property
    def name(self) -> str:
        return self.parts[-1] if self.parts else self.archive.at.name

    @property
    def is_folder(self) -> bool:
        return True

    @property
    def is_file(self) -> bool:
        return False

    @property
    def size(self) -> int:
        return self.archive.at.stat().st_size

    @property
    def path(self) -> Path:
        return self.archive.at

    def children(self) -> list[Place]:
        depth = len(self.parts)
        below = sorted({m[: depth + 1] for m in self.archive.members() if m[:depth] == self.parts and len(m) > depth})
        made: list[Place] = []
        for parts in below:
            label = f"{self.label}/{parts[-1]}".lstrip("/")
            is_member = parts in self.archive.members()
            made.append((ZipMember if is_member else ZipFolder)(self.archive, parts, label))
        return made


@dataclass(slots=True)
class ZipMember(Place):
    """A file in an archive."""

    archive: Archive
    parts: tuple[str, ...]
    label: str

    @property
    def is_folder(self) -> bool:
        return False

    @property
    def is_file(self) -> bool:
        return True

    @property
    def size(self) -> int:
        return self.archive.members()[self.parts].compress_size

    @property
    def path(self) -> Path:
        return self.archive.unpack(self.parts, self.label)

    def children(self) -> list[Place]:
        return []
