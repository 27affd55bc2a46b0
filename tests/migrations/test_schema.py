"""The migrations build what the models say."""

from __future__ import annotations

from sqlalchemy import Engine, text


def drift(engine: Engine) -> list[object]:
    """Differences between a database and the models, as alembic sees them."""
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    from app.schema import SCHEMAS, metadata

    def include_name(name: str | None, kind: str, _parents: object) -> bool:
        return name in SCHEMAS if kind == "schema" else True

    options = {
        "include_schemas": True,
        "include_name": include_name,
        "compare_type": True,
        "compare_server_default": True,
        "version_table": "alembic_version",
        "version_table_schema": "ops",
    }
    with engine.connect() as connection:
        return list(compare_metadata(MigrationContext.configure(connection, opts=options), metadata))


def test_models_and_migrations_do_not_differ(engine: Engine) -> None:
    assert drift(engine) == []


def test_every_table_view_and_column_has_a_comment(engine: Engine) -> None:
    statement = """
        SELECT n.nspname, c.relname, a.attname
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
        WHERE n.nspname IN ('omop', 'label', 'model', 'ops') AND c.relkind IN ('r', 'p', 'v', 'm')
          AND (obj_description(c.oid, 'pg_class') IS NULL OR col_description(c.oid, a.attnum) IS NULL)
    """
    with engine.connect() as connection:
        assert connection.execute(text(statement)).all() == []
