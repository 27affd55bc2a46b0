"""The command line: parse, call, print. No SQL and no logic; every listing stays free of heavy imports."""

from __future__ import annotations

import inspect
import sys

import typer

from app.errors import LachesisError, StoreError

app = typer.Typer(
    name="lachesis",
    help="A feature and label store with a training service for time-to-event pretraining of 3D CT encoders.\n\n"
    "Data flows one way, one verb a stage: load, cohort, tasks, label, pretrain, embed, evaluate, report.\n\n"
    "Try: lachesis demo · lachesis up · lachesis load omop EXTRACT · "
    "lachesis sql 'SELECT * FROM label.tte_long LIMIT 5'",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _register() -> None:
    from app.cli import (
        cache,
        check,
        compare,
        concepts,
        demo,
        diff,
        disk,
        export,
        forget,
        jobs,
        load,
        look,
        plot,
        promote,
        remove,
        servers,
        similar,
        stages,
    )

    for module in (
        load,
        stages,
        cache,
        look,
        similar,
        plot,
        concepts,
        check,
        compare,
        diff,
        export,
        promote,
        remove,
        disk,
        forget,
        jobs,
        servers,
        demo,
    ):
        module.register(app)
    _keep_examples(app)


def _keep_examples(group: typer.Typer) -> None:
    """Mark the examples in each command's help as lines that are not to be filled to a paragraph."""
    for command in group.registered_commands:
        text = inspect.getdoc(command.callback) or ""
        command.help = text.replace("\nExamples:\n", "\n\b\nExamples:\n")
    for child in group.registered_groups:
        if child.typer_instance:
            _keep_examples(child.typer_instance)


def _lost_the_database(error: Exception) -> bool:
    if "psycopg" not in sys.modules:
        return False
    from app.store.session import is_away

    return is_away(error)


def main(argv: list[str] | None = None) -> None:
    """Run one command; an error of ours is one sentence on stderr and its exit code."""
    _register()
    try:
        app(args=argv, prog_name="lachesis")
    except LachesisError as error:
        print(f"lachesis: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not _lost_the_database(error):
            raise
        print("lachesis: The database went away in the middle of this command; try it again.", file=sys.stderr)
        sys.exit(StoreError.exit_code)
