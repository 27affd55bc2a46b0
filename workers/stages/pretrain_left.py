"""What a training that was killed left behind: half-written files, and files among the artifacts that have no row.

A stop becomes a file of the attempt, then one among the artifacts, then a row; a superseded one loses its row first.
Between two of these steps a kill leaves a file that nothing names. The next attempt removes it: it finds the attempt's
own file, or its note of superseded ones, in the folders of earlier attempts on this host.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from app.store import named_files
from app.store.places import digest_of, place
from app.store.work import Work

KIND = "checkpoints"
NOTE = "superseded"
LOG = "log"
"""The one file of an earlier attempt that stays."""


@contextmanager
def superseded(work: Work, keys: Sequence[str]) -> Iterator[None]:
    """While it lasts, a note in the attempt's folder names artifacts that lose their rows and then go."""
    if not keys:
        yield
        return
    note = work.folder / NOTE
    note.write_text("\n".join(keys))
    yield
    note.unlink()


def clear(work: Work) -> None:
    """Remove what earlier attempts at this job left on this host when they were killed; their logs stay."""
    if work.job_id is None:
        return
    keys = [key for folder in _earlier(work) for file in folder.iterdir() for key in _take(work, file)]
    with work.connect() as connection:
        gone = named_files.remove(connection, work.settings, keys)
    if gone:
        work.log(f"removed {len(gone)} files of an attempt that was ended before it could name them")


def _earlier(work: Work) -> list[Path]:
    """Folders of attempts at this job that lost it before this one began."""
    others = work.folder.parent.iterdir()
    return [one for one in others if one.name.isdecimal() and int(one.name) < work.fence and one.is_dir()]


def _take(work: Work, file: Path) -> list[str]:
    """Delete a file of an earlier attempt; keys of artifacts that it stands for, unfinished ones among them."""
    keys: list[str] = []
    if file.name == NOTE:
        keys = file.read_text().split()
    elif file.suffix == ".safetensors" and not file.name.startswith("."):
        digest = digest_of(file)
        keys = [one.key for one in place(work.settings).listing(f"{KIND}/{digest[:2]}") if digest in one.key]
    if file.name != LOG and file.is_file():
        file.unlink()
    return keys
