"""Commands within this process, as a shell would run them."""

from __future__ import annotations

from typing import NamedTuple

from typer.testing import CliRunner

from app.cli import _register, app
from app.embedded import environment
from app.errors import LachesisError
from app.settings import Settings


class Ran(NamedTuple):
    """What a command left."""

    code: int
    out: str
    err: str


def lachesis(settings: Settings, *arguments: str) -> Ran:
    """Run a command on a store; an error of ours becomes its exit code and sentence, as in `app.cli.main`."""
    if not app.registered_commands:
        _register()
    result = CliRunner().invoke(app, list(arguments), env={**environment(settings), "COLUMNS": "200"})
    if isinstance(result.exception, LachesisError):
        return Ran(result.exception.exit_code, result.stdout, f"lachesis: {result.exception}\n")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Ran(result.exit_code, result.stdout, result.stderr)
