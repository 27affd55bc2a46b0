"""Who may do what: a reader reads, and finds no way to do more."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from app.embedded import Store
from app.errors import InputError, StoreError
from app.store.query import ask


@pytest.fixture
def reader(store: Store) -> Iterator[psycopg.Connection[tuple[object, ...]]]:
    """A session of the reader with its read-only default turned off, as an attacker would have it."""
    assert store.reader_url is not None
    with psycopg.connect(store.reader_url, autocommit=True) as connection:
        connection.execute("SET default_transaction_read_only = off")
        yield connection


WRITES = [
    "INSERT INTO ops.source (name) VALUES ('x')",
    "UPDATE ops.job SET state = 'cancelled'",
    "DELETE FROM ops.job_log",
    "TRUNCATE omop.event",
    "DROP VIEW label.tte_long",
    "CREATE TABLE omop.x (y int)",
    "CREATE TABLE public.x (y int)",
    "CREATE TEMPORARY TABLE x (y int)",
    "CREATE SCHEMA mine",
    "CREATE FUNCTION public.f() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "CREATE ROLE more SUPERUSER",
    "ALTER ROLE lachesis_reader SUPERUSER",
    "SELECT lo_create(0)",
    "SELECT lo_from_bytea(0, 'x')",
    "SELECT model.add_embedding_partition(1, 3)",
    "SELECT model.index_embedding_partition(1)",
    "COPY (SELECT 1) TO '/tmp/stolen'",
    "COPY (SELECT 1) TO PROGRAM 'true'",
    "SELECT pg_read_file('/etc/passwd')",
    "ALTER SYSTEM SET fsync = off",
    "VACUUM FULL omop.person",
    "DO $$ BEGIN LOCK TABLE ops.job IN ACCESS EXCLUSIVE MODE; END $$",
    "SELECT nextval('ops.job_job_id_seq')",
]


@pytest.mark.parametrize("statement", WRITES)
def test_a_reader_cannot_write(reader: psycopg.Connection[tuple[object, ...]], statement: str) -> None:
    if statement.startswith("VACUUM"):  # a warning, not an error
        warnings: list[str] = []
        reader.add_notice_handler(lambda notice: warnings.append(notice.message_primary or ""))
        reader.execute(statement)
        assert any("permission denied" in warning for warning in warnings)
        return
    with pytest.raises((psycopg.errors.InsufficientPrivilege, psycopg.errors.FeatureNotSupported)):
        reader.execute(statement)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    "statement",
    [
        "SET ROLE lachesis",
        "SET ROLE lachesis_worker",
        "SET SESSION AUTHORIZATION lachesis",
        "SET ROLE pg_read_all_data",
        "DO $$ BEGIN EXECUTE 'RESET ROLE'; EXECUTE 'SET ROLE lachesis'; END $$",
        "SELECT set_config('role', 'lachesis', false)",
        "GRANT lachesis_worker TO lachesis_reader",
    ],
)
def test_a_reader_cannot_become_another_role(reader: psycopg.Connection[tuple[object, ...]], statement: str) -> None:
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        reader.execute(statement)  # type: ignore[call-overload]


@pytest.mark.parametrize("statement", ["RESET ROLE", "SET ROLE NONE", "RESET SESSION AUTHORIZATION", "DISCARD ALL"])
def test_a_reader_that_resets_its_role_is_the_reader_still(
    reader: psycopg.Connection[tuple[object, ...]], statement: str
) -> None:
    reader.execute(statement)  # type: ignore[call-overload]
    assert reader.execute("SELECT current_user::text, session_user::text").fetchone() == ("lachesis_reader",) * 2


@pytest.mark.parametrize(
    "column",
    [
        "omop.person.person_source_value",
        "omop.image_occurrence.path",
        "omop.image_occurrence.series_uid",
        "omop.image_occurrence.image_key",
        "model.checkpoint.path",
        "ops.job.args",
        "ops.load.files",
        "ops.reject.row_key",
    ],
)
def test_a_reader_sees_no_source_value_path_or_uid(reader: psycopg.Connection[tuple[object, ...]], column: str) -> None:
    table, name = column.rsplit(".", 1)
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        reader.execute(f"SELECT {name} FROM {table}")  # type: ignore[call-overload]


def test_a_reader_sees_the_rest(reader: psycopg.Connection[tuple[object, ...]]) -> None:
    for statement in (
        "SELECT person_id, birth_time FROM omop.person",
        "SELECT * FROM omop.event",
        "SELECT * FROM omop.condition_occurrence",
        "SELECT * FROM label.tte_long",
        "SELECT * FROM label.label_concept",
        "SELECT * FROM label.outcome",
        "SELECT * FROM label.task_count",
        "SELECT * FROM model.metric",
        "SELECT image_occurrence_id, acquired_at FROM omop.image_occurrence",
        "SELECT job_id, state, error_message FROM ops.job",
    ):
        reader.execute(statement)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    "asked",
    ["tte_long('x')", "tte_at('x')", "outcome('x')", "task_count('x')", "binary('x', 365)", "incidence('x', 'y')"],
)
def test_a_reader_may_ask_for_labels_and_hears_that_a_name_is_unknown(
    reader: psycopg.Connection[tuple[object, ...]], asked: str
) -> None:
    with pytest.raises(psycopg.errors.UndefinedObject, match="Expected a label set, found none called 'x'"):
        reader.execute(f"SELECT * FROM label.{asked}")  # type: ignore[call-overload]


def test_by_default_a_reader_is_read_only_and_bounded_in_time(store: Store) -> None:
    assert store.reader_url is not None
    with psycopg.connect(store.reader_url) as connection:
        row = connection.execute(
            "SELECT current_setting('default_transaction_read_only'), current_setting('statement_timeout')"
        ).fetchone()
    assert row == ("on", "1min")


def test_a_statement_of_a_persons_own_gives_columns_and_rows(store: Store) -> None:
    assert store.reader_url is not None
    with ask(store.reader_url, "SELECT i AS n, NULL AS nothing FROM generate_series(1, 2500) i -- all") as answer:
        assert answer.columns == ["n", "nothing"]
        assert sum(row[0] for row in answer.rows) == 2500 * 2501 // 2
    with ask(store.reader_url, "SELECT 1 AS one WHERE false;") as answer:
        assert answer.columns == ["one"]
        assert list(answer.rows) == []


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("SELECT 1; DROP TABLE omop.person", "Expected one statement, found several"),
        ("SELEC 1", "syntax error"),
        ("SELECT * FROM omop.person", "name the columns you need"),
        ("SELECT nothing FROM omop.person", 'column "nothing" does not exist'),
        ("SET work_mem = '1GB'", "gives none"),
        ("SELECT 1 / (i - 2000) FROM generate_series(1, 3000) i", "division by zero"),
    ],
)
def test_a_statement_that_is_refused_is_one_sentence_and_exit_code_two(
    store: Store, statement: str, message: str
) -> None:
    assert store.reader_url is not None
    with pytest.raises(InputError, match=message) as refused, ask(store.reader_url, statement) as answer:
        list(answer.rows)
    assert "\n" not in str(refused.value)


def test_a_reader_without_a_server_is_told_so() -> None:
    with pytest.raises(StoreError, match="does not answer"), ask("postgresql://reader@127.0.0.1:1/x", "SELECT 1"):
        pass
