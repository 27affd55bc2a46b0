"""The commands of servers, as a person or a script meets them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
import typer
from typer.testing import CliRunner, Result

from app.cli import servers
from app.embedded import Store, ensure_up, psql_command
from app.errors import InputError, StoreError
from app.settings import Settings

Run = Callable[..., Result]
ROWS = "SELECT i AS n, NULLIF(i, 2) AS or_null, 'a,b' AS text, i > 1 AS more FROM generate_series(1, 3) i"


@pytest.fixture
def run(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Run a command on the session's store; errors of ours are raised."""
    monkeypatch.setenv("LACHESIS_HOME", str(store.settings.home))
    app = typer.Typer(rich_markup_mode=None)
    servers.register(app)

    def call(*arguments: str, code: int = 0, **options: str) -> Result:
        result = CliRunner().invoke(app, list(arguments), **options)  # type: ignore[arg-type]
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        return result

    yield call


def lachesis(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The whole program in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", "from app.cli import main; main()", *arguments],
        cwd=Path(__file__).resolve().parents[3],
        env={**os.environ, "LACHESIS_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_sql_writes_csv_with_one_header_line_and_lf_line_ends(run: Run) -> None:
    assert run("sql", ROWS, "--csv").stdout_bytes == (
        b'n,or_null,text,more\n1,1,"a,b",false\n2,,"a,b",true\n3,3,"a,b",true\n'
    )


def test_sql_writes_a_header_where_there_is_no_row(run: Run) -> None:
    assert run("sql", "SELECT 1 AS one WHERE false", "--csv").stdout == "one\n"


def test_sql_writes_json_that_any_reader_takes(run: Run) -> None:
    statement = (
        "SELECT 1.5::numeric AS a, 'NaN'::float8 AS b, timestamp '2020-01-02 03:04:05' AS c, '\\x0a'::bytea AS d"
    )
    assert json.loads(run("sql", statement, "--json").stdout) == {
        "columns": ["a", "b", "c", "d"],
        "rows": [{"a": 1.5, "b": None, "c": "2020-01-02 03:04:05", "d": "0a"}],
    }


def test_sql_shows_a_table_that_can_be_read_and_says_how_to_get_the_rest(run: Run) -> None:
    shown = run("sql", "SELECT i AS number FROM generate_series(1, 100000) i")
    assert "number" in shown.stdout
    assert 1000 < shown.stdout.count("\n") < 1010
    assert "the first 1000 rows" in shown.stderr


def test_sql_reads_a_file_and_writes_one_whole_or_not_at_all(run: Run, tmp_path: Path) -> None:
    question, answer = tmp_path / "question.sql", tmp_path / "answer.csv"
    question.write_text("-- how many\n" + ROWS + ";\n")
    run("sql", "-f", str(question), "-o", str(answer))
    assert answer.read_text().count("\n") == 4
    question.write_text("SELECT 1 / (i - 2000) AS x FROM generate_series(1, 3000) i")
    with pytest.raises(InputError, match="division by zero"):
        run("sql", "-f", str(question), "-o", str(answer))
    assert answer.read_text().count("\n") == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answer.csv", "question.sql"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sql"], "Expected one statement, or -f FILE"),
        (["sql", "SELECT 1", "--csv", "--json"], "found both"),
        (["sql", "-f", "/nothing/here.sql"], "could not read it"),
        (["sql", "SELECT 1 AS x", "-o", "/nothing/here.csv"], "cannot be written"),
        (["sql", "DELETE FROM ops.job RETURNING job_id"], "read-only transaction"),
        (["worker", "--queues", "load,gpus"], "found 'gpus'"),
    ],
)
def test_wrong_use_is_one_sentence_and_exit_code_two(run: Run, arguments: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(*arguments)


def test_status_says_what_runs_and_the_schema_is_checked(run: Run, store: Store) -> None:
    found = json.loads(run("status", "--json").stdout)
    assert found["home"] == str(store.settings.home)
    assert found["postgres"] and found["redis"]
    assert found["schema"] == found["schema_needed"]
    assert "nothing differs" in run("db", "check").stdout
    assert "as before" in run("db", "upgrade").stdout
    assert json.loads(run("db", "current", "--json").stdout)["schema"] == found["schema"]


def test_external_servers_without_a_login_for_readers_are_said_so(
    run: Run, database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LACHESIS_DATABASE_URL", database_url)
    monkeypatch.setenv("LACHESIS_REDIS_URL", redis_url)
    with pytest.raises(StoreError, match="LACHESIS_READER_URL"):
        run("sql", "SELECT 1")


def test_an_external_database_is_upgraded_by_the_command_alone(
    run: Run, store: Store, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    admin = store.database_url.replace("/lachesis?", "/postgres?", 1)
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute("CREATE DATABASE external")
    monkeypatch.setenv("LACHESIS_DATABASE_URL", store.database_url.replace("/lachesis?", "/external?", 1))
    monkeypatch.setenv("LACHESIS_REDIS_URL", redis_url)
    with pytest.raises(StoreError, match="lachesis db upgrade"):
        run("sql", "SELECT 1")
    assert "from absent to" in run("db", "upgrade").stdout
    assert "nothing was started" in run("up").stdout
    with psycopg.connect(os.environ["LACHESIS_DATABASE_URL"]) as connection:
        connection.execute("DROP VIEW label.tte_long")
        connection.execute("ALTER TABLE omop.person DROP COLUMN split")
    assert "split" in run("db", "check", code=1).stdout


def test_a_password_reaches_psql_by_its_environment_alone() -> None:
    url = "postgresql+psycopg://owner:s%20e%27cret@db.example:5433/lachesis"
    command, more = psql_command(Settings(home=None, database_url=url))
    assert more == {"PGPASSWORD": "s e'cret"} and "cret" not in " ".join(command)
    assert {"host=db.example", "port=5433", "user=owner", "dbname=lachesis"} == set(command[1].split())
    assert psql_command(Settings(home=None, database_url="postgresql://db.example/lachesis"))[1] == {}


def test_up_down_status_psql_and_ls_from_a_shell(new_home: Callable[..., Settings]) -> None:
    home = new_home().home
    assert home is not None
    assert "made a store" in lachesis(home, "up").stderr
    assert lachesis(home, "psql", "--", "-Atc", "SELECT current_user").stdout == "lachesis\n"
    assert lachesis(home, "ls", "jobs").returncode == 0
    assert lachesis(home, "status").returncode == 0
    assert lachesis(home, "down").stdout == "Ended Postgres, Redis.\n"
    assert lachesis(home, "status").returncode == 4
    assert lachesis(home, "down").stdout == "Nothing ran.\n"


def test_a_listing_on_a_running_store_is_light(store: Store) -> None:
    code = (
        "import sys; from app.embedded import ensure_up; from app.settings import read_settings; "
        "ensure_up(read_settings()); "
        "print([m for m in ('alembic', 'sqlalchemy', 'psutil', 'duckdb', 'celery', 'torch') if m in sys.modules])"
    )
    environment = {**os.environ, "LACHESIS_HOME": str(store.settings.home)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).resolve().parents[3],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_ensure_up_of_a_store_that_answers_takes_milliseconds(store: Store) -> None:
    import time

    start = time.monotonic()
    for _ in range(10):
        ensure_up(store.settings)
    assert (time.monotonic() - start) / 10 < 0.1


def test_every_help_has_two_examples() -> None:
    commands = [servers.up, servers.down, servers.status, servers.psql, servers.sql, servers.worker]
    commands += [servers.db_upgrade, servers.db_current, servers.db_check]
    for command in commands:
        text = command.__doc__ or ""
        assert text.split("Examples:")[1].count("lachesis ") >= 2, command.__name__
