"""Persons who are to be forgotten: a keyed memory of whom never to load again, and what goes when one of them goes.

The memory holds HMAC-SHA256 of ids and source values under a secret that is a file of the store's home, not a row: with
the database alone nobody can tell, by trying ids, who was forgotten.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.errors import StoreError
from app.store.vocabulary import recount

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from app.settings import Settings

RULE = "forgotten"
"""The rule by which rows of such persons are left out of later loads."""
SECRET_FILE = "forget.key"  # noqa: S105 - a file's name
SCHEMAS = ("omop", "label", "model", "ops")
KEYS = ("cohort_member_id", "image_occurrence_id", "person_id")
"""Columns that lead to a person, in the order in which tables with them are emptied."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Whom never to load again."""

    tokens: frozenset[bytes] = frozenset()
    secret: bytes = field(default=b"", repr=False)

    def __bool__(self) -> bool:
        return bool(self.tokens)

    def has_person(self, person_id: int) -> bool:
        """True for the id of someone forgotten."""
        return bool(self.tokens) and token(self.secret, "person_id", str(person_id)) in self.tokens

    def has_value(self, person_source_value: str) -> bool:
        """True for the source value of someone forgotten, whatever id they have now."""
        return bool(self.tokens) and token(self.secret, "person_source_value", person_source_value) in self.tokens


def token(secret: bytes, kind: str, value: str) -> bytes:
    """What is kept in the place of an id or a source value."""
    return hmac.digest(secret, f"{kind}\0{value}".encode(), "sha256")


def _key_id(secret: bytes) -> str:
    return hashlib.sha256(b"lachesis memory of the forgotten\0" + secret).hexdigest()[:16]


def read_secret(settings: Settings, *, make: bool) -> bytes | None:
    """The secret of the home; None where there is none and none is to be made.

    Raises:
        StoreError: no home to keep it in, or others may read it.
    """
    if settings.home is None:
        if not make:
            return None
        raise StoreError(
            "Expected a home to keep the secret of the forgotten in, found none; set LACHESIS_HOME to a folder that "
            "every host which loads can read."
        )
    path = settings.home / SECRET_FILE
    if make and not path.exists():
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:  # another job was faster
            pass
        else:
            with os.fdopen(descriptor, "wb") as file:
                file.write(secrets.token_hex(32).encode() + b"\n")
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            found = file.read().strip()
    except FileNotFoundError:
        return None
    if mode & 0o077:
        raise StoreError(
            f"Expected {path} to be readable by its owner alone, found mode {mode:04o}; run chmod 600 on it."
        )
    return found


def read_memory(connection: Connection, settings: Settings) -> Memory:
    """Whom no load may bring back; nobody, and no secret needed, where none was forgotten.

    Raises:
        StoreError: persons were forgotten, but this host lacks the secret, or has another.
    """
    from sqlalchemy import text

    rows = connection.execute(text("SELECT token, key_id FROM ops.forgotten")).all()
    if not rows:
        return Memory()
    secret = read_secret(settings, make=False)
    if secret is None or any(row.key_id != _key_id(secret) for row in rows):
        raise StoreError(
            f"Expected the secret by which persons were forgotten in HOME/{SECRET_FILE} on this host, found "
            f"{'none' if secret is None else 'another'}; copy it from the home in which they were forgotten."
        )
    return Memory(frozenset(bytes(row.token) for row in rows), secret)


def remember(
    connection: Connection, settings: Settings, persons: Iterable[int], values: Iterable[str], job_id: int | None
) -> int:
    """Keep the tokens of ids and source values; how many are new."""
    from sqlalchemy import text

    secret = read_secret(settings, make=True) or b""
    tokens = {token(secret, "person_id", str(person)) for person in persons}
    tokens |= {token(secret, "person_source_value", value) for value in values}
    done = connection.execute(
        text(
            "INSERT INTO ops.forgotten (token, key_id, job_id) SELECT t, :key_id, :job_id "
            "FROM unnest(CAST(:tokens AS bytea[])) t ON CONFLICT (token) DO NOTHING"
        ),
        {"tokens": sorted(tokens), "key_id": _key_id(secret), "job_id": job_id},
    )
    return int(done.rowcount)


def find_persons(connection: Connection, by: str, values: Sequence[str]) -> dict[int, str | None]:
    """Persons in the store who are meant → their source values.

    Args:
        connection: to the store.
        by: person_id or person_source_value.
        values: of that column, as text.
    """
    from sqlalchemy import text

    rows = connection.execute(
        text(
            f"SELECT person_id, person_source_value FROM omop.person WHERE {_column(by)} = ANY "
            f"(CAST(:values AS {'bigint[]' if by == 'person_id' else 'text[]'}))"
        ),
        {"values": list(values)},
    )
    return {row[0]: row[1] for row in rows}


def _column(by: str) -> str:
    return {"person_id": "person_id", "person_source_value": "person_source_value"}[by]


def choose(connection: Connection, persons: Sequence[int]) -> None:
    """Make temporary tables of what goes: `gone_person`, `gone_image_occurrence`, `gone_cohort_member`."""
    from sqlalchemy import text

    statements = (
        "CREATE TEMPORARY TABLE gone_person ON COMMIT DROP AS SELECT unnest(CAST(:persons AS bigint[])) AS person_id",
        "CREATE TEMPORARY TABLE gone_image_occurrence ON COMMIT DROP AS SELECT image_occurrence_id, sha256 "
        "FROM omop.image_occurrence WHERE person_id IN (SELECT person_id FROM gone_person)",
        "CREATE TEMPORARY TABLE gone_cohort_member ON COMMIT DROP AS SELECT cohort_member_id, cohort_id, split "
        "FROM label.cohort_member WHERE person_id IN (SELECT person_id FROM gone_person)",
    )
    for statement in statements:
        connection.execute(text(statement), {"persons": list(persons)} if ":persons" in statement else {})


def tables(connection: Connection) -> list[tuple[str, str]]:
    """(table, column) of every table whose rows lead to a person, in the order in which they are emptied."""
    from sqlalchemy import text

    rows = connection.execute(
        text(
            "SELECT n.nspname || '.' || c.relname, array_agg(a.attname::text) FROM pg_class c "
            "JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_attribute a ON a.attrelid = c.oid "
            "WHERE n.nspname = ANY (:schemas) AND c.relkind IN ('r', 'p') AND NOT c.relispartition "
            "AND a.attname = ANY (:keys) AND NOT a.attisdropped GROUP BY 1 ORDER BY 1"
        ),
        {"schemas": list(SCHEMAS), "keys": list(KEYS)},
    ).all()
    found = [(str(table), max(columns, key=KEYS.index)) for table, columns in rows]
    last = {"label.cohort_member": 1, "omop.image_occurrence": 2, "omop.person": 3}  # others may refer to them
    return sorted(found, key=lambda item: (last.get(item[0], 0), KEYS.index(item[1]), item[0]))


def _gone(column: str) -> str:
    return f"{column} IN (SELECT {column} FROM gone_{column.removesuffix('_id')})"


def count_rows(connection: Connection) -> dict[str, int]:
    """Rows of each table that would go."""
    counts = {}
    for table, column in tables(connection):
        found = connection.exec_driver_sql(f"SELECT count(*) FROM {table} WHERE {_gone(column)}").scalar_one()
        counts[table] = int(found)
    return {table: count for table, count in counts.items() if count}


def remove_rows(connection: Connection) -> dict[str, int]:
    """Delete them; how many of each table. Counts that were stored are brought down, or made anew."""
    _count_down_labels(connection)
    _count_down_loads(connection)
    sources = connection.exec_driver_sql(
        "SELECT DISTINCT l.source_id FROM ops.load l JOIN omop.person p USING (load_id) "
        "WHERE p.person_id IN (SELECT person_id FROM gone_person)"
    ).all()
    counts = {}
    for table, column in tables(connection):
        counts[table] = int(connection.exec_driver_sql(f"DELETE FROM {table} WHERE {_gone(column)}").rowcount)
    blanked = connection.exec_driver_sql(
        "UPDATE ops.reject SET row_key = NULL WHERE table_name IN ('person', 'death', 'data', 'subject_splits') "
        "AND row_key IN (SELECT person_id::text FROM gone_person)"
    )
    counts["ops.reject (keys)"] = int(blanked.rowcount)
    for (source_id,) in sources:
        recount(connection, source_id)
    return {table: count for table, count in counts.items() if count}


def _count_down_labels(connection: Connection) -> None:
    connection.exec_driver_sql(
        "CREATE TEMPORARY TABLE gone_count ON COMMIT DROP AS SELECT t.label_set_id, t.position, t.split, t.status, "
        "count(*)::int AS n, count(DISTINCT t.person_id)::int AS persons, "
        "coalesce(sum(t.seconds - t.start_seconds), 0) / 86400.0::float8 AS days FROM label.member_task t "
        "WHERE t.cohort_member_id IN (SELECT cohort_member_id FROM gone_cohort_member) GROUP BY 1, 2, 3, 4"
    )
    connection.exec_driver_sql(
        "UPDATE label.status_count c SET (n, persons, person_days) = ("
        "SELECT array_agg(u.n - coalesce(g.n, 0) ORDER BY u.place), "
        "array_agg(u.persons - coalesce(g.persons, 0) ORDER BY u.place), "
        "array_agg(greatest(u.days - coalesce(g.days, 0), 0) ORDER BY u.place) "
        "FROM unnest(c.n, c.persons, c.person_days) WITH ORDINALITY u(n, persons, days, place) LEFT JOIN gone_count g "
        "ON (g.label_set_id, g.split, g.status, g.position) = (c.label_set_id, c.split, c.status, u.place - 1)) "
        "WHERE (c.label_set_id, c.split, c.status) IN (SELECT label_set_id, split, status FROM gone_count)"
    )
    connection.exec_driver_sql("DELETE FROM label.status_count WHERE 0 = ALL (n)")
    connection.exec_driver_sql(
        "UPDATE label.label_set s SET num_members = num_members - g.n, num_events = num_events - g.events FROM ("
        "SELECT label_set_id, count(*) AS n, sum(cardinality(event_tasks)) AS events FROM label.tte "
        "WHERE cohort_member_id IN (SELECT cohort_member_id FROM gone_cohort_member) GROUP BY 1) g "
        "WHERE s.label_set_id = g.label_set_id"
    )


_WITHOUT_A_ROW = """
AND (birth_time IS NOT NULL OR NOT EXISTS (SELECT FROM ops.load l WHERE l.load_id = t.load_id AND l.kind = 'meds'))
"""
"""MEDS has no row of a person but that of birth."""


def _count_down_loads(connection: Connection) -> None:
    """Their rows were read and are now left out: read = loaded + rejected still holds."""
    read = ("omop.event", "omop.person", "omop.observation_period", "omop.image_occurrence", "omop.static_fact")
    parts = " UNION ALL ".join(
        f"SELECT load_id, count(*) AS n FROM {table} t WHERE person_id IN (SELECT person_id FROM gone_person) "
        f"{_WITHOUT_A_ROW if table == 'omop.person' else ''} GROUP BY 1"
        for table in read
    )
    connection.exec_driver_sql(
        "UPDATE ops.load l SET num_loaded = num_loaded - g.n, num_shown = num_shown - g.n, "
        "num_rejected = num_rejected + g.n, "
        f"rejects_by_rule = rejects_by_rule || jsonb_build_object('{RULE}', "
        f"coalesce((rejects_by_rule ->> '{RULE}')::bigint, 0) + g.n) "
        f"FROM (SELECT load_id, sum(n)::bigint AS n FROM ({parts}) p GROUP BY 1) g WHERE l.load_id = g.load_id"
    )


def redact_conditions(connection: Connection, persons: Iterable[int]) -> int:
    """Take the ids out of conditions that name persons (`cohort --where`); how many conditions."""
    from sqlalchemy import text

    ids = {str(person) for person in persons}
    changed = 0
    for table, key, column in (("label.cohort", "cohort_id", "definition"), ("ops.job", "job_id", "args")):
        found = connection.execute(
            text(f"SELECT {key}, {column} ->> 'where' FROM {table} WHERE {column} ->> 'where' LIKE '%person_id%'")
        ).all()
        for row, condition in found:
            told = re.sub(r"-?\b\d+\b", lambda m: "[forgotten]" if m[0] in ids else m[0], condition)
            if told != condition:
                connection.execute(
                    text(
                        f"UPDATE {table} SET {column} = jsonb_set({column}, '{{where}}', "
                        f"to_jsonb(CAST(:told AS text))) WHERE {key} = :row"
                    ),
                    {"told": told, "row": row},
                )
                changed += 1
    return changed


def trained_on(connection: Connection) -> list[str]:
    """Checkpoints that learnt from scans of these persons: their weights stay, and should be trained again."""
    from sqlalchemy import text

    rows = connection.execute(
        text(
            "SELECT DISTINCT c.name FROM model.checkpoint c LEFT JOIN label.label_set s USING (label_set_id) "
            "WHERE coalesce(c.cohort_id, s.cohort_id) IN "
            "(SELECT cohort_id FROM gone_cohort_member WHERE split IN ('train', 'tuning')) "
            "AND c.arm NOT IN ('base', 'untrained') ORDER BY 1"
        )
    )
    return [str(row[0]) for row in rows]


def embedding_files(connection: Connection) -> list[Any]:
    """(checkpoint_id, cohort_id, path, sha256) of embedding sets that hold a scan of these persons."""
    return list(
        connection.exec_driver_sql(
            "SELECT DISTINCT e.checkpoint_id, e.cohort_id, e.path, e.sha256 FROM model.embedding_set e "
            "WHERE e.cohort_id IN (SELECT cohort_id FROM gone_cohort_member) ORDER BY 1, 2"
        )
    )


def replace_embedding_file(connection: Connection, row: Any, path: str, sha256: str, num_scans: int) -> None:
    """Point an embedding set to the file without these persons."""
    from sqlalchemy import text

    connection.execute(
        text(
            "UPDATE model.embedding_set SET path = :path, sha256 = :sha256, num_scans = :n "
            "WHERE checkpoint_id = :checkpoint AND cohort_id = :cohort"
        ),
        {
            "path": path,
            "sha256": sha256,
            "n": num_scans,
            "checkpoint": row.checkpoint_id,
            "cohort": row.cohort_id,
        },
    )


def take_reports(connection: Connection) -> list[str]:
    """Delete the reports that were written while these persons' scans were judged; their files."""
    rows = connection.exec_driver_sql(
        "DELETE FROM model.report WHERE EXISTS (SELECT FROM gone_cohort_member) RETURNING path"
    )
    return [str(row[0]) for row in rows]


def unshared_contents(connection: Connection) -> list[str]:
    """Digests of voxels that no scan of another person has."""
    rows = connection.exec_driver_sql(
        "SELECT DISTINCT encode(g.sha256, 'hex') FROM gone_image_occurrence g WHERE g.sha256 IS NOT NULL "
        "AND NOT EXISTS (SELECT FROM omop.image_occurrence i WHERE i.sha256 = g.sha256 AND NOT EXISTS "
        "(SELECT FROM gone_image_occurrence o WHERE o.image_occurrence_id = i.image_occurrence_id))"
    )
    return [str(row[0]) for row in rows]


def plan_files(connection: Connection, artifacts: Iterable[str], contents: Iterable[str]) -> None:
    """Note the files that are to go, so that an attempt that dies after its commit is finished by the next."""
    from sqlalchemy import text

    rows = [{"kind": "artifact", "name": path} for path in artifacts]
    rows += [{"kind": "volume", "name": digest} for digest in contents]
    if rows:
        connection.execute(
            text("INSERT INTO ops.forgotten_file (kind, name) VALUES (:kind, :name) ON CONFLICT DO NOTHING"), rows
        )


def planned_files(connection: Connection) -> list[tuple[str, str]]:
    """(kind, name) of files that are to go; artifacts that a row still names stay."""
    rows = connection.exec_driver_sql(
        "SELECT kind, name FROM ops.forgotten_file WHERE kind <> 'artifact' OR name NOT IN "
        "(SELECT path FROM model.embedding_set UNION ALL SELECT path FROM model.report) ORDER BY 1, 2"
    )
    return [(str(kind), str(name)) for kind, name in rows]


def forget_files(connection: Connection) -> None:
    """Say that they are gone."""
    connection.exec_driver_sql("DELETE FROM ops.forgotten_file")


def running_jobs(connection: Connection, job_id: int | None) -> list[int]:
    """Other jobs that run now, and may write what they read before."""
    from sqlalchemy import text

    rows = connection.execute(
        text("SELECT job_id FROM ops.job WHERE state = 'running' AND job_id IS DISTINCT FROM :job ORDER BY 1"),
        {"job": job_id},
    )
    return [int(row[0]) for row in rows]


def secret_path(settings: Settings) -> Path | None:
    """Where the secret is kept."""
    return None if settings.home is None else settings.home / SECRET_FILE
