"""Clinical questions as files: `TaskSpec`, its checked reading from TOML, and the ones that come with Lachesis."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from app.errors import InputError, UnknownName
from app.tasks.aces import refusal
from app.tasks.spec import TaskSpec, ValueRule
from app.tasks.toml import specs_from_toml

FOLDER = Path(__file__).parent

CLINICAL = (
    "mortality",
    "readmission",
    "pulmonary_hypertension",
    "atelectasis",
    "cardiomegaly",
    "consolidation",
    "edema",
    "pleural_effusion",
)
"""The paper's eight, in its order; each also as `paper_<name>`, with the paper's own rules."""


def read_task_file(path: Path) -> TaskSpec:
    """A task file with one task, checked. Raises InputError as `read_task_files` does."""
    specs = read_task_files(path)
    if len(specs) != 1:
        raise InputError(f"Expected one task in {path}, found {len(specs)}; keep one.")
    return specs[0]


def read_task_files(path: Path) -> list[TaskSpec]:
    """A task file, checked: one task, or several under `[[task]]`; files that it names are beside it.

    Raises:
        InputError: the file cannot be read, or a field is unknown or has a value it cannot have; the message names
            file, line and field.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else (error.strerror or str(error))
        raise InputError(f"Expected a task file at {path}, could not read it: {why}.") from None
    if path.suffix.lower() in (".yaml", ".yml"):
        raise refusal(text, path.name)
    return specs_from_toml(text, str(path), path.parent)


def builtin(name: str) -> TaskSpec:
    """A task that comes with Lachesis. Raises UnknownName."""
    known = {path.stem: path for path in FOLDER.glob("*.toml")}
    if name not in known:
        raise UnknownName("task", name, [*known, "clinical"])
    return read_task_file(known[name])


def clinical_task_names() -> list[str]:
    """The eight clinical tasks, with our rules."""
    return list(CLINICAL)


def chosen_tasks(names: Iterable[str], files: Iterable[Path]) -> list[TaskSpec]:
    """Tasks by name (`clinical` means the eight), then those of files. Raises UnknownName or InputError."""
    named = [task for name in names for task in (clinical_task_names() if name == "clinical" else [name])]
    return [*map(builtin, named), *(spec for file in files for spec in read_task_files(file))]


__all__ = [
    "TaskSpec",
    "ValueRule",
    "builtin",
    "chosen_tasks",
    "clinical_task_names",
    "read_task_file",
    "read_task_files",
]
