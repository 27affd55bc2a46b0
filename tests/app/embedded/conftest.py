"""Homes of their own for tests that kill servers."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.embedded import stop
from app.errors import StoreError
from app.settings import Settings


@pytest.fixture
def new_home() -> Iterator[Callable[..., Settings]]:
    """A factory of settings that name a home which is not there yet; its servers are ended afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="lachesis-home-"))
    folder.chmod(0o711)
    made: list[Settings] = []

    def make(name: str = "home", *, version: int = 18) -> Settings:
        made.append(Settings(home=folder / name, home_is_named=True, postgres_version=version))
        return made[-1]

    yield make
    for settings in made:
        try:
            stop(settings)
        except StoreError:
            continue
    shutil.rmtree(folder, ignore_errors=True)
