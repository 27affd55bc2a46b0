"""What a newcomer reads first: every command's help, and how quickly it comes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.main import get_command

HEAVY = ("torch", "monai", "numba", "duckdb", "celery", "pandas", "matplotlib", "sksurv", "sqlalchemy", "alembic")


def commands() -> list[tuple[str, object]]:
    """(words, command) of every command, sub-commands included."""
    from app.cli import _register, app

    if not app.registered_commands:
        _register()
    found: list[tuple[str, object]] = []

    def walk(command: object, words: str) -> None:
        children = getattr(command, "commands", None)
        if children:
            for name, child in children.items():
                walk(child, f"{words} {name}".strip())
        else:
            found.append((words, command))

    walk(get_command(app), "")
    return found


def test_every_command_shows_two_examples() -> None:
    listed = commands()
    assert len(listed) > 20
    for words, command in listed:
        text = command.help or ""  # type: ignore[attr-defined]
        examples = [line for line in text.split("Examples:")[-1].splitlines() if "lachesis" in line]
        assert "Examples:" in text and len(examples) >= 2, f"lachesis {words} shows fewer than two examples"


def test_examples_stand_on_lines_of_their_own() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "app.cli", "load", "omop", "--help"], capture_output=True, text=True, check=True
    )
    examples = done.stdout.partition("Examples:\n")[2].partition("\n\n")[0].splitlines()
    assert len(examples) == 2 and all(line.strip().startswith("lachesis load omop ") for line in examples)


def test_every_option_says_what_it_does() -> None:
    for words, command in commands():
        for parameter in command.params:  # type: ignore[attr-defined]
            if parameter.name != "help":
                assert parameter.help, f"lachesis {words}: {parameter.name} has no help"


def modules_after(arguments: list[str]) -> set[str]:
    """Top-level modules that are loaded after `lachesis ARGUMENTS` in a fresh process."""
    code = (
        "import sys, json\n"
        "from app.cli import main\n"
        "try:\n    main(json.loads(sys.argv[1]))\nexcept SystemExit:\n    pass\n"
        "sys.stderr.write('\\nMODULES ' + json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(arguments)], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stderr.rpartition("MODULES ")[2]))


@pytest.mark.parametrize(
    "arguments", [["--help"], ["pretrain", "--help"], ["load", "omop", "--help"], ["jobs", "--help"]]
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    assert not modules_after(arguments) & set(HEAVY)


def test_an_unknown_command_suggests_and_exits_2() -> None:
    done = subprocess.run([sys.executable, "-m", "app.cli", "pretrian"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pretrain" in done.stderr
