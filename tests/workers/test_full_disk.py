"""A cache whose disk becomes full: while it is filled, and in a run that has to decode a volume again."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from app.errors import InputError, StoreError
from app.store.places import place
from app.store.work import InlineWork
from ml.config import read_recipe
from tests.workers.small_cohort import SMALL, insert_cohort
from workers.bridge import find_label_set, read_scans
from workers.scan_volumes import prepare
from workers.stages.pretrain import pretrain


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, with a little more room than always has to stay."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=260m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path) -> None:
    """Leave no page free, also while others write."""
    with (disk / "ballast").open("wb") as file:
        for piece in (1 << 20, 4096):
            with suppress(OSError):
                while True:
                    os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, piece)


ARGS = {"arm": "tte", "encoder": "tiny", "labels": "outcomes", "name": "t", "seed": 0, "set": {**SMALL, "epochs": "1"}}


def test_finished_weights_wait_for_room_among_the_artifacts(
    engine: Engine, work: Callable[..., InlineWork], disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ml.keeping.WAIT_SECONDS", 0.0)
    monkeypatch.setattr("workers.stages.pretrain_stops.PAUSE_SECONDS", 0.3)
    with engine.begin() as connection:
        insert_cohort(connection, tmp_path / "scans")
    made = work(**ARGS)
    made.settings = replace(made.settings, artifacts=str(disk / "artifacts"))
    said: list[str] = []

    def log(message: str) -> None:
        said.append(message)
        if "finished weights" in message:
            (disk / "ballast").unlink()

    def progress(done: int, total: int | None = None, unit: str = "", note: str = "") -> None:
        if (unit, done) == ("step", 1):
            fill(disk)

    made.progress = progress  # type: ignore[method-assign]
    made.log = log  # type: ignore[method-assign]
    assert pretrain(made)["steps"] > 0
    assert any("The finished weights cannot be written (No space left on device)" in message for message in said)
    with engine.connect() as connection:
        (row,) = connection.execute(text("SELECT path, sha256 FROM model.checkpoint WHERE is_final")).all()
    place(made.settings).get(row.path, row.sha256)
    said.clear()
    monkeypatch.setattr("workers.stages.pretrain_stops.END_SECONDS", 0.0)
    made.args = {**ARGS, "name": "other"}
    made.log = lambda message: None  # type: ignore[method-assign]
    with pytest.raises(StoreError, match=r"Expected to write the finished weights.*No space left on device"):
        pretrain(made)


def test_a_disk_that_becomes_full_is_told_and_what_is_whole_stays(
    engine: Engine, work: Callable[..., InlineWork], disk: Path, tmp_path: Path
) -> None:
    with engine.begin() as connection:
        insert_cohort(connection, tmp_path / "scans")
    made = work()
    made.settings = replace(made.settings, cache=disk / "cache")
    with engine.connect() as connection:
        scans = read_scans(connection, made.settings, find_label_set(connection, "outcomes").cohort_id)
    recipe = read_recipe("tiny", {"shape_zyx": SMALL["shape_zyx"]})

    def progress(done: int, total: int | None = None, unit: str = "", note: str = "") -> None:
        if done >= 7 and not (disk / "ballast").exists():
            fill(disk)

    made.progress = progress  # type: ignore[method-assign]
    with pytest.raises(InputError, match="The disk of the cache became full on the way; volumes that are whole stay"):
        prepare(made, recipe, scans)
    whole = list(disk.rglob("*.npy"))
    assert 7 <= len(whole) < 59 and len({file.stat().st_size for file in whole}) == 1
    assert not [part for part in (disk / "cache").glob("*/.*") if part.is_file()]
    (disk / "ballast").unlink()
    made.progress = lambda *_, **__: None  # type: ignore[method-assign]
    volumes = prepare(made, recipe, scans)
    assert len(volumes.cached) == len(scans)
    image = next(iter(volumes.cached))
    before = volumes.read(image)
    file = volumes.cache.folder / volumes.cached[image].file
    file.unlink()
    fill(disk)
    with pytest.raises(InputError, match="became full on the way"):
        volumes.read(image)
    (disk / "ballast").unlink()
    assert (volumes.read(image) == before).all()
