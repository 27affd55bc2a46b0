"""Every command that help and pages show can be typed: its words, options and values are read by the parser."""

from __future__ import annotations

import functools
import itertools
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer import Exit
from typer.exceptions import TyperException
from typer.main import get_command

from app.cli import app
from tests.app.cli.test_help import commands

ROOT = Path(__file__).parents[3]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
ENDS = ("|", "&&", ">", ";", "·", "&")


def words_of(line: str) -> list[list[str]]:
    """The words of each lachesis command in a line of a shell, without comment, pipe or variable before it."""
    words = shlex.split(line, comments=True)
    parts = [list(part) for ends, part in itertools.groupby(words, lambda word: word in ENDS) if not ends]
    parts = [list(itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), part)) for part in parts]
    return [part[1:] for part in parts if part and part[0].endswith("lachesis") and "…" not in part]


def shown(page: Path) -> list[list[str]]:
    """Commands in a page's blocks of code; a command whose quotes stay open goes on in the next lines."""
    found: list[list[str]] = []
    for language, block in re.findall(
        r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    ):
        if language not in ("", "sh", "bash"):
            continue
        waiting = ""
        for line in block.replace("\\\n", " ").splitlines():
            waiting = f"{waiting}\n{line}" if waiting else line
            if not re.match(r"\s*([A-Z_]+=\S+ )*\S*lachesis ", waiting):
                waiting = ""
                continue
            try:
                found += words_of(waiting)
            except ValueError:  # the quotes are open yet
                continue
            waiting = ""
        assert not waiting, f"{page.name}: quotes that never close in {waiting!r}"
    return found


@functools.cache
def tree() -> Any:
    """All commands; making them is most of the work."""
    commands()
    return get_command(app)


def read(words: list[str], where: str) -> None:
    """Read a command as a shell's would be, and run nothing; what the parser refuses fails the test."""
    command, name, context = tree(), "lachesis", None
    rest = words
    try:
        while True:
            context = command.make_context(name, list(rest), parent=context)
            if not hasattr(command, "resolve_command"):
                return
            name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
    except Exit:  # --help, --version
        return
    except TyperException as error:
        pytest.fail(f"{where} shows `lachesis {shlex.join(words)}`, which is refused: {error}")


def test_every_example_of_help_is_read() -> None:
    total = 0
    for words, command in commands():
        for line in (command.help or "").split("Examples:")[-1].splitlines():  # type: ignore[attr-defined]
            for example in words_of(line) if "lachesis" in line else []:
                read(example, f"lachesis {words} --help")
                total += 1
    assert total > 80


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_is_read(page: Path) -> None:
    for words in shown(page):
        read(words, page.name)


def test_the_pages_show_commands() -> None:
    assert sum(len(shown(page)) for page in PAGES) > 60


def test_a_command_that_is_no_more_is_noticed() -> None:
    with pytest.raises(pytest.fail.Exception, match="no-such-option"):
        read(["cohort", "chest", "--no-such-option"], "a page")
