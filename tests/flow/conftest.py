"""A store of one's own, used from outside as a person would: by commands alone."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True, slots=True)
class Shell:
    """A shell whose LACHESIS_HOME is a temporary folder."""

    home: Path

    @property
    def environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("LACHESIS_")}
        return {**kept, "LACHESIS_HOME": str(self.home)}

    def popen(self, *words: object, **options: Any) -> subprocess.Popen[str]:
        """Start a command and do not wait."""
        command = [sys.executable, "-m", "app.cli", *map(str, words)]
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore Ctrl-C
        return subprocess.Popen(command, env=self.environment, text=True, preexec_fn=heard, **{**pipe, **options})

    def run(self, *words: object, seconds: float = 600) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, whatever it is."""
        with self.popen(*words) as process:
            out, err = process.communicate(timeout=seconds)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def do(self, *words: object, seconds: float = 600) -> str:
        """Run a command that must succeed; what it printed."""
        done = self.run(*words, seconds=seconds)
        assert done.returncode == 0, f"lachesis {' '.join(map(str, words))} exited {done.returncode}:\n{done.stderr}"
        return done.stdout

    def rows(self, statement: str, **values: Any) -> list[dict[str, Any]]:
        """What the store answers to its owner."""
        from sqlalchemy import text

        from app.embedded import ensure_up
        from app.settings import read_settings
        from app.store.session import make_engine

        engine = make_engine(ensure_up(read_settings(self.environment)).database_url)
        with engine.connect() as connection:
            return [dict(row) for row in connection.execute(text(statement), values).mappings()]

    def value(self, statement: str, **values: Any) -> Any:
        """The one value a statement yields."""
        (row,) = self.rows(statement, **values)
        (found,) = row.values()
        return found


@pytest.fixture(scope="module")
def shell() -> Iterator[Shell]:
    """One store for the tests of a file."""
    folder = Path(tempfile.mkdtemp(prefix="lachesis-"))
    folder.chmod(0o755)
    one = Shell(folder / "home")
    try:
        yield one
    finally:
        one.run("down")
        shutil.rmtree(folder, ignore_errors=True)
