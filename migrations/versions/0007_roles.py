"""Roles, which belong to the cluster: made where absent, never dropped; rights on this database.

Revision 0007, after 0006.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from migrations.roles import role

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

SCHEMAS = ("omop", "label", "model", "ops")
ROLES = ("loader", "worker", "api", "reader", "public")

# What readers may not see: identifiers of the source, paths, UIDs, and free-form fields that may hold them.
HIDDEN = {
    "omop.person": {"person_source_value"},
    "omop.image_occurrence": {"study_uid", "series_uid", "image_key", "root", "path", "details"},
    "model.checkpoint": {"root", "path"},
    "model.embedding_set": {"root", "path"},
    "model.report": {"root", "path"},
    "ops.job": {"args", "result"},
    "ops.load": {"files", "partition_name"},
    "ops.reject": {"file", "row_key"},
    "ops.source": {"details"},
    "ops.schedule": {"args"},
    "ops.alembic_version": {"version_num"},
}

SMALL = 11
PUBLIC_VIEWS = {
    "label.task_count_public": (
        f"SELECT label_set, task, split, status, CASE WHEN persons >= {SMALL} THEN n END AS n, "
        f"CASE WHEN persons >= {SMALL} THEN persons END AS persons FROM label.task_count",
        f"label.task_count with cells under {SMALL} persons left empty",
        {
            "label_set": "Label set",
            "task": "Task",
            "split": "Split",
            "status": "Status",
            "n": f"Scans; null under {SMALL} persons",
            "persons": f"Persons; null under {SMALL}",
        },
    ),
    "model.metric_public": (
        "SELECT s.name AS label_set, c.name AS checkpoint, m.arm, m.head, m.inputs, m.task, m.metric, m.horizon_days, "
        "m.split, m.value, m.ci_low, m.ci_high, m.flags "
        "FROM model.metric m JOIN label.label_set s USING (label_set_id) "
        "LEFT JOIN model.checkpoint c ON c.checkpoint_id = m.checkpoint_id "
        f"WHERE s.is_current AND m.subgroup IS NULL AND m.num_persons >= {SMALL} AND m.num_events >= {SMALL}",
        f"Metrics of current label sets that rest on {SMALL} persons and events or more",
        {
            "label_set": "Label set",
            "checkpoint": "Checkpoint; null for inputs without an image model",
            "arm": "Arm",
            "head": "Head",
            "inputs": "Inputs",
            "task": "Task; null for a mean over tasks",
            "metric": "Metric",
            "horizon_days": "Horizon, where the metric has one",
            "split": "Split judged",
            "value": "Value",
            "ci_low": "Lower end of the 95 % interval",
            "ci_high": "Upper end",
            "flags": "What to beware of",
        },
    ),
}

WRITES = "SELECT, INSERT, UPDATE, DELETE"


def create_role(name: str) -> None:
    """Make a role where it is absent; another database of the cluster may be making it at this moment."""
    op.execute(
        f"DO $$ BEGIN CREATE ROLE {name} NOLOGIN NOINHERIT; "
        "EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL; END $$"
    )


def relations(kinds: str) -> list[str]:
    """Our relations of some kinds (r table, p partitioned, v view), partitions left out."""
    rows = op.get_bind().execute(
        sa.text(
            "SELECT n.nspname || '.' || c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
            "WHERE n.nspname = ANY (:schemas) AND c.relkind::text = ANY (:kinds) AND NOT c.relispartition ORDER BY 1"
        ),
        {"schemas": list(SCHEMAS), "kinds": list(kinds)},
    )
    return [row[0] for row in rows]


def visible(relation: str) -> str:
    """Columns of a table that readers may see."""
    hidden = HIDDEN.get(relation, set())
    rows = op.get_bind().execute(
        sa.text(
            "SELECT quote_ident(attname) FROM pg_attribute "
            "WHERE attrelid = to_regclass(:relation) AND attnum > 0 AND NOT attisdropped ORDER BY attnum"
        ),
        {"relation": relation},
    )
    return ", ".join(row[0] for row in rows if row[0].strip('"') not in hidden)


def grant_reading(to: str) -> None:
    """Rows of everything, without the hidden columns."""
    for table in relations("rp"):
        columns = visible(table)
        if columns:
            op.execute(f"GRANT SELECT ({columns}) ON {table} TO {to}")
    for view in relations("v"):
        op.execute(f"GRANT SELECT ON {view} TO {to}")


def close_doors() -> None:
    """Take from PUBLIC what lets a session write without owning a table."""
    database = op.get_bind().scalar(sa.text("SELECT quote_ident(current_database())"))
    for statement in (
        f"REVOKE TEMPORARY ON DATABASE {database} FROM PUBLIC",
        "REVOKE EXECUTE ON FUNCTION pg_catalog.lo_creat(integer), pg_catalog.lo_create(oid), "
        "pg_catalog.lo_from_bytea(oid, bytea), pg_catalog.lo_put(oid, bigint, bytea), "
        "pg_catalog.lowrite(integer, bytea) FROM PUBLIC",
        "REVOKE CREATE ON SCHEMA public FROM PUBLIC",
    ):
        # whoever does not own the database cannot; large objects and temporary tables hold none of our rows
        op.execute(f"DO $$ BEGIN {statement}; EXCEPTION WHEN insufficient_privilege THEN NULL; END $$")
    for schema in SCHEMAS:
        op.execute(f"REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA {schema} FROM PUBLIC")


def grant_rights() -> None:
    """Who may do what."""
    loader, worker, api, reader, public = map(role, ROLES)
    everybody = ", ".join((loader, worker, api, reader, public))
    op.execute(f"GRANT USAGE ON SCHEMA {', '.join(SCHEMAS)} TO {everybody}")
    op.execute(f"GRANT {WRITES} ON ALL TABLES IN SCHEMA omop, ops TO {loader}")
    op.execute(f"GRANT CREATE ON SCHEMA omop TO {loader}")
    op.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA omop TO {worker}")
    op.execute(f"GRANT UPDATE (sha256, verdict, reasons) ON omop.image_occurrence TO {worker}")
    op.execute(f"GRANT {WRITES} ON ALL TABLES IN SCHEMA label, model, ops TO {worker}")
    op.execute(f"GRANT SELECT, INSERT, UPDATE ON ops.job, ops.schedule TO {api}")
    for name in (api, reader):
        grant_reading(name)
    for name in (loader, worker):
        op.execute(f"REVOKE INSERT, UPDATE, DELETE ON ops.alembic_version FROM {name}")
    looking = (
        "label.find_label_set, label.tte_long, label.outcome, label.task_count, label.binary, model.find_checkpoint, "
    )
    looking += "model.neighbours_sql, model.neighbours"
    op.execute(f"GRANT EXECUTE ON FUNCTION {looking} TO {loader}, {worker}, {api}, {reader}")
    op.execute(f"GRANT EXECUTE ON FUNCTION model.add_embedding_partition, model.index_embedding_partition TO {worker}")
    for view in PUBLIC_VIEWS:
        op.execute(f"GRANT SELECT ON {view} TO {public}")


def upgrade() -> None:
    for view, (statement, text, columns) in PUBLIC_VIEWS.items():
        op.execute(f"CREATE VIEW {view} AS {statement}")
        op.execute(f"COMMENT ON VIEW {view} IS '{text}'")
        for column, meaning in columns.items():
            op.execute(f"COMMENT ON COLUMN {view}.{column} IS '{meaning}'")
    for name in ROLES:
        create_role(role(name))
    close_doors()
    grant_rights()
    for name, seconds in (("reader", 60), ("public", 10)):
        # whoever made the role sets these; a role that others made keeps its own
        op.execute(
            f"DO $$ BEGIN ALTER ROLE {role(name)} SET default_transaction_read_only = on; "
            f"ALTER ROLE {role(name)} SET statement_timeout = '{seconds}s'; "
            f"ALTER ROLE {role(name)} SET idle_in_transaction_session_timeout = '60s'; "
            "EXCEPTION WHEN insufficient_privilege THEN NULL; END $$"
        )


def downgrade() -> None:
    everybody = ", ".join(map(role, ROLES))
    for schema in SCHEMAS:
        op.execute(f"REVOKE ALL ON ALL TABLES IN SCHEMA {schema} FROM {everybody}")
        op.execute(f"REVOKE ALL ON ALL FUNCTIONS IN SCHEMA {schema} FROM {everybody}")
        op.execute(f"GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA {schema} TO PUBLIC")
        op.execute(f"REVOKE ALL ON SCHEMA {schema} FROM {everybody}")
    for table in relations("rp"):
        columns = visible(table)
        if columns:
            op.execute(f"REVOKE SELECT ({columns}) ON {table} FROM {everybody}")
    op.execute(f"REVOKE UPDATE (sha256, verdict, reasons) ON omop.image_occurrence FROM {everybody}")
    for view in PUBLIC_VIEWS:
        op.execute(f"DROP VIEW {view}")
