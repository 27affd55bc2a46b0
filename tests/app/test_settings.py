"""The environment, read once."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.errors import InputError
from app.settings import read_settings


def test_the_nearest_home_above_the_current_folder_is_found(tmp_path: Path) -> None:
    (tmp_path / ".lachesis").mkdir()
    below = tmp_path / "a" / "b"
    below.mkdir(parents=True)
    assert read_settings({}, below).home == tmp_path / ".lachesis"
    assert read_settings({}, below).home_is_named is False


def test_a_named_home_wins_over_one_that_is_found(tmp_path: Path) -> None:
    (tmp_path / ".lachesis").mkdir()
    settings = read_settings({"LACHESIS_HOME": str(tmp_path / "other")}, tmp_path)
    assert settings.home == tmp_path / "other" and settings.home_is_named


def test_an_empty_variable_means_unset(tmp_path: Path) -> None:
    settings = read_settings({"LACHESIS_DATABASE_URL": "", "LACHESIS_HOME": "", "LACHESIS_ROOT_PACS": ""}, tmp_path)
    assert settings.database_url is None and settings.home is None and not settings.roots


def test_root_folders_are_known_by_their_names_in_lower_case() -> None:
    assert read_settings({"LACHESIS_ROOT_PACS": "/mnt/pacs"}).roots == {"pacs": Path("/mnt/pacs")}


def test_a_postgres_that_does_not_come_in_wheels_is_refused() -> None:
    with pytest.raises(InputError, match="16 or 18, got '15'"):
        read_settings({"LACHESIS_POSTGRES": "15"})


def test_a_url_of_another_kind_is_refused_without_repeating_its_password() -> None:
    for name in ("LACHESIS_DATABASE_URL", "LACHESIS_REDIS_URL", "LACHESIS_READER_URL"):
        for url in ("mysql://me:hush@db/store", "hush"):
            with pytest.raises(InputError, match=f"Expected {name} to begin with") as refused:
                read_settings({name: url})
            assert "hush" not in str(refused.value)
