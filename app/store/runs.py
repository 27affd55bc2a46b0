"""The folder of a host in which attempts at jobs keep their files: `runs/<job>/<fence>/`."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from app.errors import StoreError

if TYPE_CHECKING:
    from app.settings import Settings


def runs_folder(settings: Settings) -> Path:
    """Where attempts keep their files: HOME/runs, beside the artifacts, or a temporary folder of this user."""
    if settings.home is not None:
        return settings.home / "runs"
    artifacts = (settings.artifacts or "").removeprefix("file://")
    if artifacts and "://" not in artifacts:
        return Path(artifacts).absolute().parent / "runs"
    return _private_folder() / "runs"


def _private_folder() -> Path:
    """A folder of this user alone among everybody's temporary ones. Raises StoreError where another has its name."""
    folder = Path(tempfile.gettempdir()) / f"lachesis-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077 or not stat.S_ISDIR(status.st_mode):
        raise StoreError(
            f"Expected {folder} to be a folder that only its user can enter, it is not; remove it, or set "
            "LACHESIS_ARTIFACTS to a folder beside which attempts may keep their files."
        )
    return folder
