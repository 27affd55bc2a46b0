"""Which encoders there are, found without importing any: ours, those of installed packages, those of single files.

An encoder is a function that returns a torch module (B, 1, Z, Y, X) → (B, D) or a feature map that is pooled. A TOML
file of its name may lie beside it: the recipe's settings that differ from the defaults, and a table `about`.
"""

from __future__ import annotations

import difflib
import importlib
import os
import re
import stat
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

GROUP = "lachesis.encoders"
"""Entry points of this group are encoders of installed packages."""
FILES = "LACHESIS_ENCODERS"
"""Environment variable of a worker: Python files, a colon between them, each an encoder of the file's name."""
FOLDER = Path(__file__).parent / "encoders"
RECIPES = Path(__file__).parent / "recipes"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
ABOUT = {"width": int, "weights": int, "text": str, "spare": list}
"""What a recipe's table `about` may hold: D, number of weights, one line, and beginnings of names of tensors that a
weights file may hold though the encoder has no use for them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """An encoder that can be built here."""

    name: str
    source: str
    """lachesis, a package and its version, or a file's name."""
    load: Callable[[], Callable[..., Any]] = field(repr=False)
    """Imports its function."""
    toml: Path | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the recipe that differ from the defaults. Raises ValueError for a broken file."""
        return {key: value for key, value in _read(self.toml).items() if key != "about"}

    @property
    def about(self) -> dict[str, Any]:
        """What is known of it without building it: width, weights, text, spare."""
        about = _read(self.toml).get("about", {})
        wrong = [key for key, value in about.items() if key not in ABOUT or not isinstance(value, ABOUT[key])]
        if wrong:
            kinds = ", ".join(f"{key} ({kind.__name__})" for key, kind in ABOUT.items())
            raise ValueError(f"Expected {kinds} in the table `about` of {self.name}.toml, got {', '.join(wrong)}.")
        return dict(about)

    @property
    def width(self) -> int | None:
        width = self.about.get("width")
        return width if isinstance(width, int) else None


def _read(toml: Path | None) -> dict[str, Any]:
    if toml is None:
        return {}
    try:
        return tomllib.loads(toml.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"Expected a recipe that can be read at {toml.name}, got: {error}.") from None


def encoders() -> dict[str, Known]:
    """Every encoder of this machine by name, ours first.

    Raises:
        ValueError: two have one name, or a file that is named is none.
    """
    return dict(_found(os.environ.get(FILES, "")))


@lru_cache(maxsize=8)
def _found(files: str) -> dict[str, Known]:
    found: dict[str, Known] = {}
    for known in (*_ours(), *_of_packages(), *_of_files(files)):
        if not NAME.fullmatch(known.name):
            raise ValueError(f"Expected letters, digits, _, . and - in the name of an encoder, got {known.name!r}.")
        if known.name in found:
            raise ValueError(
                f"Expected one encoder named {known.name!r}, found two: of {found[known.name].source} and of "
                f"{known.source}; rename yours."
            )
        found[known.name] = known
    return found


def find(name: str) -> Known:
    """The encoder of a name. Raises ValueError for an unknown one, with the nearest."""
    known = encoders()
    if name not in known:
        raise ValueError(f"No encoder named {name!r}.{hint(name, known)}")
    return known[name]


def hint(name: str, known: Iterable[str]) -> str:
    """The nearest of the known names, or all of them, as the end of an error."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(names)}."


def _ours() -> Iterator[Known]:
    for file in sorted(FOLDER.glob("[!_]*.py")):
        name = file.stem
        yield Known(
            name=name, source="lachesis", load=_function_of(f"ml.encoders.{name}", name), toml=_there(RECIPES, name)
        )


def _function_of(module: str, name: str) -> Callable[[], Callable[..., Any]]:
    def load() -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return function

    return load


def _there(folder: Path | None, name: str) -> Path | None:
    return file if folder and (file := folder / f"{name}.toml").is_file() else None


def _of_packages() -> Iterator[Known]:
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        source = f"{point.dist.name} {point.dist.version}" if point.dist else point.module
        yield Known(name=point.name, source=source, load=_point(point), toml=_there(_folder(point), point.name))


def _point(point: EntryPoint) -> Callable[[], Callable[..., Any]]:
    def load() -> Callable[..., Any]:
        try:
            function: Callable[..., Any] = point.load()
        except (ImportError, AttributeError) as error:
            raise ValueError(f"Expected the encoder {point.name} at {point.value}, got {error}.") from None
        return function

    return load


def _folder(point: EntryPoint) -> Path | None:
    """The folder of an entry point's module; no module is imported."""
    top, *inner = point.module.split(".")
    spec = find_spec(top)
    if spec is None:
        return None
    if not spec.submodule_search_locations:
        return Path(spec.origin).parent if spec.origin else None
    package = Path(spec.submodule_search_locations[0]).joinpath(*inner)
    return package if package.is_dir() else package.parent


def _of_files(files: str) -> Iterator[Known]:
    for text in filter(None, files.split(os.pathsep)):
        file = Path(text).expanduser().absolute()
        if file.suffix != ".py" or not file.is_file():
            raise ValueError(f"Expected Python files in {FILES}, a colon between them, found none at {text!r}.")
        yield Known(name=file.stem, source=file.name, load=_of_file(file), toml=_there(file.parent, file.stem))


def _of_file(file: Path) -> Callable[[], Callable[..., Any]]:
    """Runs the file as a module; only if nobody but its owner, who is this user or root, can change it."""

    def load() -> Callable[..., Any]:
        status = file.stat()
        if status.st_uid not in (0, os.geteuid()) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ValueError(
                f"Expected {file.name} to be writable by you alone, for its code is run here; `chmod go-w` it."
            )
        name = f"lachesis_encoder_{file.stem}"
        spec = spec_from_file_location(name, file)
        if spec is None or spec.loader is None:
            raise ValueError(f"Expected a Python file, got {file.name}.")
        module = module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        function = getattr(module, file.stem, None)
        if not callable(function):
            raise ValueError(f"Expected a function named {file.stem} in {file.name}, found none.")
        return function  # type: ignore[no-any-return]

    return load
