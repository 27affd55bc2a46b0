"""What is out of date: members whose labels were made of other data, cohorts that would be chosen otherwise, embeddings
of content that has changed.

A member's labels rest on its person's timeline, birth, observation periods and visits, and on its scan. A digest of
these is kept when labels are made (`label.member_digest`), so that one statement finds who differs now. Values, units
and ends of events are in no timeline: a task that asks for them may change without its members counting as changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from app.store.work import Work

_SECONDS = "extract(epoch FROM {})::int8"

DIGESTS = f"""
WITH member AS (SELECT * FROM label.cohort_member WHERE cohort_id = :cohort),
known AS (SELECT DISTINCT person_id FROM member),
period AS (
    SELECT person_id, string_agg(start_date - DATE '2000-01-01' || ' ' || end_date - DATE '2000-01-01', ','
                                 ORDER BY start_date, end_date) AS periods
    FROM known JOIN omop.observation_period USING (person_id) GROUP BY 1
), visit AS (
    SELECT person_id, string_agg(v.visit_concept_id || ' ' || {_SECONDS.format("v.visit_start_datetime")} || ' ' ||
                                 coalesce({_SECONDS.format("v.visit_end_datetime")}::text, ''), ','
                                 ORDER BY v.visit_start_datetime, v.visit_end_datetime, v.visit_concept_id) AS visits
    FROM known JOIN omop.visit_occurrence v USING (person_id) GROUP BY 1
)
SELECT m.cohort_member_id, m.person_id, m.image_occurrence_id, substring(sha256(convert_to(ROW(
           encode(t.digest, 'hex'), {_SECONDS.format("p.birth_time")}, o.periods, v.visits, i.image_key,
           {_SECONDS.format("i.acquired_at")}, i.date_only, 'gone_from_source' = ANY (i.reasons)
       )::text, 'UTF8')) FROM 1 FOR 16) AS digest
FROM member m
LEFT JOIN omop.person p USING (person_id)
LEFT JOIN omop.timeline t USING (person_id)
LEFT JOIN period o USING (person_id)
LEFT JOIN visit v USING (person_id)
LEFT JOIN omop.image_occurrence i USING (image_occurrence_id)
"""

CHANGED = f"""
SELECT n.cohort_member_id, n.person_id, n.image_occurrence_id FROM ({DIGESTS}) n
LEFT JOIN label.member_digest d ON d.label_set_id = :label_set AND d.cohort_member_id = n.cohort_member_id
WHERE d.digest IS DISTINCT FROM n.digest ORDER BY n.cohort_member_id
"""


@dataclass(frozen=True, slots=True)
class ChangedMember:
    """A member whose labels were made of other data than there is now."""

    cohort_member_id: int
    person_id: int
    image_occurrence_id: int | None


@dataclass(frozen=True, slots=True)
class Made:
    """What the stage knows of one member when its labels are made; each a sha256."""

    timeline: bytes | None
    inputs: bytes
    labels: bytes


KEEP = """
INSERT INTO label.member_digest (label_set_id, cohort_member_id, digest)
SELECT %(label_set)s, * FROM unnest(%(members)s::int8[], %(digests)s::bytea[])
ON CONFLICT (label_set_id, cohort_member_id) DO UPDATE SET digest = excluded.digest
"""


Digests = list[tuple[int, bytes]]
"""(cohort_member_id, digest of what its labels rest on), each once."""


def read_digests(connection: Connection, cohort_id: int) -> Digests:
    """What the labels of a cohort's members rest on, as the transaction that reads their inputs sees it."""
    from sqlalchemy import text

    rows = connection.execute(text(DIGESTS), {"cohort": cohort_id})
    return [(row.cohort_member_id, bytes(row.digest)) for row in rows]


def renew_digests(connection: Connection, label_set_id: int, found: Digests) -> None:
    """Note that a set is what it would be now: what differs since it was made does not matter to it."""
    from app.store.session import raw

    values = {"label_set": label_set_id, "members": [m for m, _ in found], "digests": [d for _, d in found]}
    raw(connection).execute(KEEP.encode(), values)


def keep_digests(connection: Connection, label_set_id: int, found: Digests, made: Mapping[int, Made]) -> None:
    """Keep what the labels of a new set are made of."""
    from app.store.copy import copy_in

    columns = ("label_set_id", "cohort_member_id", "digest", "timeline_digest", "input_digest", "label_digest")
    copy_in(connection, "label.member_digest", columns, [digest_rows(label_set_id, found, made)])


def digest_rows(label_set_id: int, found: Digests, made: Mapping[int, Made]) -> bytes:
    """Rows of label.member_digest in binary COPY form, of digests and what the stage knows of their members."""
    import numpy as np

    from app.store.copy import Field, encode_mixed, texts

    if not found:
        return b""
    members = np.array([member for member, _ in found], np.int64)
    of = [made[member] for member in members.tolist()]
    columns: list[list[bytes | None]] = [[digest for _, digest in found], [one.timeline for one in of]]
    columns += [[one.inputs for one in of], [one.labels for one in of]]
    sets = Field(np.full(len(found), label_set_id, np.int32))
    return encode_mixed([sets, Field(members), *map(texts, columns)])


def changed_members(connection: Connection, label_set_id: int) -> list[ChangedMember] | None:
    """Members of a label set whose data differ now; None where the set is older than the digests, and nobody knows."""
    from sqlalchemy import text

    row = connection.execute(
        text(
            "SELECT s.cohort_id, s.num_members, EXISTS (SELECT FROM label.member_digest d WHERE d.label_set_id = "
            "s.label_set_id) AS kept FROM label.label_set s WHERE s.label_set_id = :label_set"
        ),
        {"label_set": label_set_id},
    ).one()
    if row.num_members and not row.kept:
        return None
    found = connection.execute(text(CHANGED), {"label_set": label_set_id, "cohort": row.cohort_id})
    return [ChangedMember(*member) for member in found]


COMPARED = ("index_time", "index_date_only", "follow_up_end", "data_cut_end", "death_time")


def changed_cohort(connection: Connection, cohort_id: int) -> dict[str, int]:
    """How a cohort would differ if it were chosen now by the same rule: members changed, gone, new.

    Of a cohort made from a list, the scans that became its members are looked at again: a list is not kept.
    """
    from sqlalchemy import text

    from app.store.cohorts import MEMBERS, scans_where

    rule = connection.execute(
        text("SELECT definition FROM label.cohort WHERE cohort_id = :cohort"), {"cohort": cohort_id}
    ).scalar_one()
    values = {key: rule.get(key) for key in ("verdict", "min_age", "per", "data_cut", "follow_up")}
    values["ids"] = scans_where(connection, rule["where"]) if rule.get("where") else None
    columns = ", ".join(COMPARED)
    before = {
        (row[0], row[1]): tuple(row[2:])
        for row in connection.execute(
            text(
                f"SELECT person_id, image_occurrence_id, {columns} FROM label.cohort_member WHERE cohort_id = :cohort"
            ),
            {"cohort": cohort_id},
        )
    }
    values["listed"] = [image for _, image in before] if rule.get("from") else None
    now = {
        (row["person_id"], row["image_occurrence_id"]): tuple(row[c] for c in COMPARED)
        for row in connection.execute(text(MEMBERS), values).mappings()
    }
    return {
        "changed": sum(key in before and before[key] != facts for key, facts in now.items()),
        "gone": len(before.keys() - now.keys()),
        "new": len(now.keys() - before.keys()),
    }


SINCE = """
SELECT l.delivery_id, l.job_id FROM ops.load l
WHERE l.created_at > :made AND (CAST(:persons AS bigint[]) IS NULL OR l.source_id IN (
    SELECT o.source_id FROM omop.person p JOIN ops.load o USING (load_id)
    WHERE p.person_id = ANY (CAST(:persons AS bigint[]))
    UNION SELECT o.source_id FROM omop.image_occurrence i JOIN ops.load o USING (load_id)
    WHERE i.person_id = ANY (CAST(:persons AS bigint[]))))
ORDER BY l.load_id LIMIT 1
"""


def since(connection: Connection, made: Any, persons: list[int] | None = None) -> str | None:
    """The first delivery after a moment, of the sources of some persons: since then things may be out of date."""
    from sqlalchemy import text

    row = connection.execute(text(SINCE), {"made": made, "persons": persons}).first()
    if row is None and persons is not None:  # the persons are gone, and so is whose they were
        return since(connection, made)
    if row is None:
        return None
    return f"job {row.job_id}" if row.job_id is not None else f"load {row.delivery_id}"


def stale_labels(connection: Connection) -> list[dict[str, Any]]:
    """Current label sets with changed members, or of a cohort or task set that is no longer current."""
    from sqlalchemy import text

    sets = connection.execute(
        text(
            "SELECT s.label_set_id, s.name, s.version, c.name AS cohort, c.is_current AS cohort_is_current, "
            "t.is_current AS tasks_are_current, s.num_members, s.created_at FROM label.label_set s "
            "JOIN label.cohort c USING (cohort_id) JOIN label.task_set t USING (task_set_id) "
            "WHERE s.is_current ORDER BY s.label_set_id DESC"
        )
    ).all()
    rows = []
    for row in sets:
        changed = changed_members(connection, row.label_set_id)
        why = [] if row.cohort_is_current else ["newer cohort"]
        why += [] if row.tasks_are_current else ["newer tasks"]
        why += ["made before members were followed"] if changed is None else []
        if changed or why:
            persons = [member.person_id for member in changed or ()]
            rows.append(
                {
                    "name": row.name,
                    "version": row.version,
                    "cohort": row.cohort,
                    "members": row.num_members,
                    "changed_members": None if changed is None else len(changed),
                    "changed_persons": None if changed is None else len(set(persons)),
                    "since": since(connection, row.created_at, persons) if changed else None,
                    "also": ", ".join(why),
                }
            )
    return rows


def warning(connection: Connection, label_set_id: int) -> str | None:
    """One line for whoever uses a label set that is out of date; None where it is not.

    Of an older version it is said that there is a newer one: who names it by number knows.
    """
    from sqlalchemy import text

    row = connection.execute(
        text(
            "SELECT s.name, s.version, s.is_current, s.num_members, s.created_at, c.is_current AS cohort_is_current, "
            "t.is_current AS tasks_are_current, (SELECT version FROM label.label_set o WHERE o.name = s.name AND "
            "o.is_current) AS newest FROM label.label_set s JOIN label.cohort c USING (cohort_id) "
            "JOIN label.task_set t USING (task_set_id) WHERE s.label_set_id = :id"
        ),
        {"id": label_set_id},
    ).one()
    name = f"{row.name}@{row.version}"
    if not row.is_current:
        return f"Labels {name} are not the current version, which is {row.name}@{row.newest}."
    why = [] if row.cohort_is_current else ["their cohort has a newer version"]
    why += [] if row.tasks_are_current else ["their task set has a newer version"]
    changed = changed_members(connection, label_set_id)
    if changed:
        persons = [member.person_id for member in changed]
        first = since(connection, row.created_at, persons)
        moment = f" since {first}" if first else ""
        why.insert(0, f"{len(changed):,} of {row.num_members:,} members have other data{moment}")
    if not why:
        return None
    return f"Labels {name} are out of date: {', '.join(why)}; `lachesis label {row.name}` makes them again."


def warn(work: Work, connection: Connection, label_set_id: int) -> None:
    """Say once in the job's log that the labels it uses are out of date, where they are."""
    said = warning(connection, label_set_id)
    if said is not None:
        work.log(said)


def stale_cohorts(connection: Connection) -> list[dict[str, Any]]:
    """Current cohorts that the same rule would choose otherwise now."""
    from sqlalchemy import text

    cohorts = connection.execute(
        text(
            "SELECT c.cohort_id, c.name, c.version, c.created_at, (SELECT count(*) FROM label.cohort_member m "
            "WHERE m.cohort_id = c.cohort_id) AS members FROM label.cohort c WHERE c.is_current "
            "ORDER BY c.cohort_id DESC"
        )
    ).all()
    rows = []
    for row in cohorts:
        found = changed_cohort(connection, row.cohort_id)
        if any(found.values()):
            counts = {f"{what}_members": count for what, count in found.items()}
            facts = {"name": row.name, "version": row.version, "members": row.members}
            rows.append(facts | counts | {"since": since(connection, row.created_at)})
    return rows


EMBEDDED = """
SELECT c.checkpoint_id, c.name, c.label_set_id, c.created_at, e.made, e.scans, e.changed, s.is_current
FROM model.checkpoint c
LEFT JOIN label.label_set s USING (label_set_id)
LEFT JOIN LATERAL (
    SELECT count(*) AS scans, (SELECT min(created_at) FROM model.embedding_set WHERE checkpoint_id = c.checkpoint_id)
               AS made,
           count(*) FILTER (WHERE i.image_occurrence_id IS NULL OR i.sha256 IS DISTINCT FROM b.sha256
                            OR 'gone_from_source' = ANY (i.reasons)) AS changed
    FROM model.embedded_scan b LEFT JOIN omop.image_occurrence i USING (image_occurrence_id)
    WHERE b.checkpoint_id = c.checkpoint_id
) e ON true
WHERE c.is_final OR e.scans > 0 ORDER BY c.checkpoint_id DESC
"""


def stale_checkpoints(connection: Connection) -> list[dict[str, Any]]:
    """Checkpoints whose labels are out of date, or whose embeddings are of content that has changed since."""
    from sqlalchemy import text

    of_set: dict[int, list[ChangedMember] | None] = {}
    rows = []
    for row in connection.execute(text(EMBEDDED)).all():
        if row.label_set_id is not None and row.label_set_id not in of_set:
            of_set[row.label_set_id] = changed_members(connection, row.label_set_id)
        changed = of_set.get(row.label_set_id) if row.label_set_id is not None else []
        newer = row.label_set_id is not None and not row.is_current
        if changed or newer or row.changed:
            moment = row.created_at if changed else row.made
            rows.append(
                {
                    "checkpoint_id": row.checkpoint_id,
                    "name": row.name,
                    "changed_members": None if changed is None else len(changed),
                    "newer_labels": newer,
                    "embedded_scans": row.scans,
                    "changed_scans": row.changed,
                    "since": since(connection, moment) if changed or row.changed else None,
                }
            )
    return rows


STALE: dict[str, Callable[[Connection], list[dict[str, Any]]]] = {
    "label": stale_labels,
    "cohort": stale_cohorts,
    "checkpoint": stale_checkpoints,
}
"""Kinds that can be out of date."""


def add_stale(connection: Connection, kind: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of versions with `stale`: whether it is out of date; null of older versions, which nothing will mend."""
    found = {(row["name"], row["version"]) for row in STALE[kind](connection)}
    return [row | {"stale": (row["name"], row["version"]) in found if row["current"] else None} for row in rows]
