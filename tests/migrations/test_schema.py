"""The migrations build what the models say, on every version of Postgres, and go back again."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import Engine, text

from app.embedded import Store, ensure_up
from app.errors import StoreError
from app.settings import Settings
from app.store import schema_version
from app.store.session import make_engine
from tests.migrations.rows import add_checkpoint, add_labels

UNCOMMENTED = """
SELECT n.nspname, c.relname, a.attname
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
WHERE n.nspname IN ('omop', 'label', 'model', 'ops') AND c.relkind IN ('r', 'p', 'v', 'm')
  AND (obj_description(c.oid, 'pg_class') IS NULL OR col_description(c.oid, a.attnum) IS NULL)
"""


def add_rows(engine: Engine) -> None:
    """Rows in every schema, a partition of events and one of embeddings."""
    with engine.begin() as connection:
        add_labels(connection)
        checkpoint = add_checkpoint(connection, "tiny", 3)
        for statement in (
            "INSERT INTO ops.job (kind, queue) VALUES ('load', 'load')",
            "INSERT INTO ops.source (name) VALUES ('hospital')",
            "INSERT INTO ops.load (source_id, kind, mode, table_name, state, files, content_sha256, num_read, "
            "num_loaded, num_rejected) VALUES (1, 'omop', 'snapshot', 'death', 'published', '[]', '', 1, 1, 0)",
            "CREATE TABLE omop.event_1 PARTITION OF omop.event FOR VALUES IN (1)",
            "INSERT INTO omop.event (person_id, time, date_only, concept_id, source_concept_id, domain, source_row_id, "
            "load_id) VALUES (7, '2020-01-02 23:59:59', true, 4306655, 0, 'x', 7, 1)",
            f"SELECT model.add_embedding_partition({checkpoint}, 3)",
            f"INSERT INTO model.embedding VALUES ({checkpoint}, 1, '[1,2,3]')",
        ):
            connection.execute(text(statement))


@pytest.mark.parametrize("version", [16, 18])
def test_a_new_store_has_no_drift_and_every_column_a_comment(new_home: Callable[..., Settings], version: int) -> None:
    store = ensure_up(new_home(version=version))
    with psycopg.connect(store.database_url) as connection:
        assert connection.info.server_version // 10_000 == version
        assert connection.execute(UNCOMMENTED).fetchall() == []
    assert schema_version.drift(store.database_url) == []
    add_rows(make_engine(store.database_url))
    with psycopg.connect(store.database_url) as connection:
        assert connection.execute("SELECT person_id, death_date::text FROM omop.death").fetchall() == [
            (7, "2020-01-02")
        ]
        assert len(connection.execute("SELECT * FROM model.neighbours(1, 'tiny', 3)").fetchall()) == 0
        assert len(connection.execute("SELECT * FROM label.tte_long").fetchall()) == 28


def test_drift_is_seen(database_url: str, engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE omop.person ADD COLUMN shoe_size int"))
        connection.execute(text("COMMENT ON COLUMN ops.job.kind IS 'Something else'"))
    found = schema_version.drift(database_url)
    assert len(found) == 2
    assert "shoe_size" in found[0] + found[1]


def test_partitions_are_no_drift(database_url: str, engine: Engine) -> None:
    add_rows(engine)
    assert schema_version.drift(database_url) == []


def test_a_store_with_rows_goes_down_and_up_again(database_url: str, engine: Engine) -> None:
    from alembic import command

    add_rows(engine)
    for revision in ("0004", "base"):
        with engine.begin() as connection:
            config = schema_version.alembic_config(connection=connection, role_prefix="lachesis")
            command.downgrade(config, revision)
        schema_version.upgrade(database_url, role_prefix="lachesis")
        assert schema_version.drift(database_url) == []
        assert schema_version.revision_of(database_url) == schema_version.NEEDED
    with engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM omop.event")).scalar() == 0
        assert connection.execute(text(UNCOMMENTED)).all() == []


def test_the_version_that_is_needed_is_the_newest_revision() -> None:
    from alembic.script import ScriptDirectory

    script = ScriptDirectory.from_config(schema_version.alembic_config())
    assert script.get_heads() == [schema_version.NEEDED]


@pytest.fixture
def empty_url(store: Store) -> str:
    """URL of an empty database."""
    admin = store.database_url.replace("/lachesis?", "/postgres?", 1)
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute("DROP DATABASE IF EXISTS bare")
        connection.execute("CREATE DATABASE bare")
    return store.database_url.replace("/lachesis?", "/bare?", 1)


def test_a_database_with_a_schema_of_somebody_else_is_refused_untouched(empty_url: str) -> None:
    with psycopg.connect(empty_url) as connection:
        connection.execute("CREATE SCHEMA model")
        connection.execute("CREATE TABLE model.car (wheels int)")
    with pytest.raises(StoreError, match="schema 'model' that is not ours"):
        schema_version.upgrade(empty_url, role_prefix="lachesis")
    with psycopg.connect(empty_url) as connection:
        found = connection.execute("SELECT nspname::text FROM pg_namespace WHERE nspname IN ('omop', 'label', 'ops')")
        assert found.fetchall() == []


def test_an_upgrade_that_fails_leaves_nothing(empty_url: str) -> None:
    with pytest.raises(ValueError, match="LACHESIS_ROLE_PREFIX"):
        schema_version.upgrade(empty_url, role_prefix='x"; DROP')
    assert schema_version.revision_of(empty_url) is None
    schema_version.upgrade(empty_url, role_prefix="other")
    assert schema_version.drift(empty_url) == []


def test_a_newer_database_is_refused(database_url: str) -> None:
    with psycopg.connect(database_url) as connection:
        connection.execute("UPDATE ops.alembic_version SET version_num = '9999'")
    with pytest.raises(StoreError, match="install a newer Lachesis"):
        schema_version.upgrade(database_url, role_prefix="lachesis")


def test_views_and_functions_show_nothing_that_readers_may_not_see() -> None:
    """Views run with their owner's rights, so none may show what readers may not see."""
    hidden = {"person_source_value", "study_uid", "series_uid", "image_key"}
    folder = Path(schema_version.__file__).parents[2] / "migrations" / "versions"
    views = (folder / "0005_views.py").read_text() + (folder / "0006_functions.py").read_text()
    assert not hidden & set(re.findall(r"\w+", views))
