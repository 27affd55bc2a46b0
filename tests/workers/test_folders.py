"""Where attempts keep their files."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.errors import StoreError
from app.settings import Settings
from app.store.runs import runs_folder


def test_runs_lie_in_the_home_else_beside_the_artifacts(tmp_path: Path) -> None:
    assert runs_folder(Settings(home=tmp_path)) == tmp_path / "runs"
    assert runs_folder(Settings(home=None, artifacts=str(tmp_path / "artifacts"))) == tmp_path / "runs"


def test_without_either_they_lie_in_a_temporary_folder_of_this_user_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = runs_folder(Settings(home=None)).parent
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o755)
    with pytest.raises(StoreError, match="only its user"):
        runs_folder(Settings(home=None))
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(StoreError, match="only its user"):
        runs_folder(Settings(home=None))
