"""What differs between two versions of labels, why, and what came of it: one statement a question.

Members are matched by person and scan, tasks by name. Why is read from what each version kept (digests, facts of the
members, concepts by task, definitions); what came of it is read from the labels themselves (app/store/label_cells.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from app.errors import InputError, UnknownName
from app.store import names

if TYPE_CHECKING:
    from sqlalchemy import Connection

_SET = """
SELECT s.label_set_id, s.name || '@' || s.version AS name, s.cohort_id, c.name || '@' || c.version AS cohort,
       s.task_set_id, t.name || '@' || t.version AS tasks, s.num_members AS members, s.num_events AS events,
       s.vocabulary_version, encode(s.digest, 'hex') AS digest, encode(s.rules_digest, 'hex') AS rules_digest,
       s.created_at, c.definition AS cohort_rule
FROM label.label_set s JOIN label.cohort c USING (cohort_id) JOIN label.task_set t USING (task_set_id)
WHERE s.label_set_id = :id
"""

_VERSIONS = """
SELECT name, version FROM label.label_set WHERE CAST(:name AS text) IS NULL OR name = :name
ORDER BY is_current DESC, label_set_id DESC
"""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two label sets, the former first: rows of `_SET`."""

    before: dict[str, Any]
    after: dict[str, Any]

    @property
    def ids(self) -> dict[str, int]:
        """Parameters of the statements below."""
        return {"a": self.before["label_set_id"], "b": self.after["label_set_id"]}


def chosen(connection: Connection, first: str | None, second: str | None) -> Pair:
    """Two label sets by name; of one name its previous and current version, of none those of the newest with two.

    Raises:
        UnknownName: there is no such label set.
        InputError: the name has one version.
    """
    from sqlalchemy import text

    if first is None or (second is None and "@" not in first):
        known = connection.execute(text(_VERSIONS), {"name": first}).all()
        if not known:
            if first is not None:
                names.find(connection, "label set", first)  # raises, with the nearest name
            raise InputError("Expected two versions of labels, found none; make labels first.")
        with_two = [row.name for row in known if sum(r.name == row.name for r in known) > 1]
        if not with_two:
            said = f"of {first!r}, found one" if first else "of one name, found none with two"
            raise InputError(f"Expected two versions of labels {said}; name two label sets to compare.")
        own = [row.version for row in known if row.name == with_two[0]]
        current, previous = own[0], max((v for v in own if v < own[0]), default=own[1])
        first, second = f"{with_two[0]}@{previous}", f"{with_two[0]}@{current}"
    elif second is None:
        second = first.partition("@")[0]
    found = [names.find(connection, "label set", name).id for name in (first, second)]
    sides = [dict(connection.execute(text(_SET), {"id": key}).mappings().one()) for key in found]
    return Pair(*sides)


# One row a member of either, matched by person and scan; `known` where both versions kept digests.
MEMBERS = """
WITH a AS (
    SELECT m.*, y.event_tasks, d.timeline_digest, d.input_digest, d.label_digest
    FROM label.tte y JOIN label.cohort_member m USING (cohort_member_id)
    LEFT JOIN label.member_digest d USING (label_set_id, cohort_member_id) WHERE y.label_set_id = :a
), b AS (
    SELECT m.*, y.event_tasks, d.timeline_digest, d.input_digest, d.label_digest
    FROM label.tte y JOIN label.cohort_member m USING (cohort_member_id)
    LEFT JOIN label.member_digest d USING (label_set_id, cohort_member_id) WHERE y.label_set_id = :b
)
SELECT coalesce(a.person_id, b.person_id) AS person_id, a.cohort_member_id AS before, b.cohort_member_id AS after,
       coalesce(cardinality(a.event_tasks), 0) AS events_before,
       coalesce(cardinality(b.event_tasks), 0) AS events_after,
       a.input_digest IS NOT NULL AND b.input_digest IS NOT NULL AS known,
       a.input_digest IS DISTINCT FROM b.input_digest AS inputs,
       a.label_digest IS NULL OR a.label_digest IS DISTINCT FROM b.label_digest AS labels,
       a.timeline_digest IS DISTINCT FROM b.timeline_digest AS timeline,
       a.death_time IS DISTINCT FROM b.death_time AS death,
       (a.follow_up_end, a.data_cut_end) IS DISTINCT FROM (b.follow_up_end, b.data_cut_end) AS follow_up,
       (a.index_time, a.index_date_only) IS DISTINCT FROM (b.index_time, b.index_date_only) AS scan,
       (a.eligible, a.reason) IS DISTINCT FROM (b.eligible, b.reason) AS eligibility,
       a.split IS DISTINCT FROM b.split AS split
FROM a FULL JOIN b USING (person_id, image_occurrence_id) ORDER BY 1, b.cohort_member_id, a.cohort_member_id
"""

CAUSES = ("timeline", "death", "follow_up", "scan", "eligibility", "split")

# Loads published between the two, and how many persons of some have rows of each.
LOADS = """
SELECT l.load_id, l.job_id, s.name AS source, l.table_name AS "table", l.mode, l.num_loaded AS loaded, l.created_at,
       CASE l.table_name
       WHEN 'person' THEN (SELECT count(*) FROM omop.person o
                           WHERE o.load_id = l.load_id AND o.person_id = ANY (CAST(:persons AS bigint[])))
       WHEN 'observation_period' THEN (
           SELECT count(DISTINCT o.person_id) FROM omop.observation_period o
           WHERE o.load_id = l.load_id AND o.person_id = ANY (CAST(:persons AS bigint[])))
       WHEN 'image_occurrence' THEN (
           SELECT count(DISTINCT o.person_id) FROM omop.image_occurrence o
           WHERE o.load_id = l.load_id AND o.person_id = ANY (CAST(:persons AS bigint[])))
       ELSE (SELECT count(DISTINCT e.person_id) FROM omop.event e
             WHERE e.load_id = l.load_id AND e.person_id = ANY (CAST(:persons AS bigint[])))
       END AS persons
FROM ops.load l JOIN ops.source s USING (source_id)
WHERE l.created_at > :since AND l.created_at <= :until ORDER BY l.load_id
"""

# Tasks of either, matched by name, with the concepts that each version kept.
TASKS = """
WITH a AS (
    SELECT t.*, k.concepts FROM label.label_set s JOIN label.task t USING (task_set_id)
    LEFT JOIN label.label_concept k USING (label_set_id, position) WHERE s.label_set_id = :a
), b AS (
    SELECT t.*, k.concepts FROM label.label_set s JOIN label.task t USING (task_set_id)
    LEFT JOIN label.label_concept k USING (label_set_id, position) WHERE s.label_set_id = :b
)
SELECT name AS task, a.position AS before, b.position AS after,
       CASE WHEN a.definition IS DISTINCT FROM b.definition THEN a.definition - 'resolved' - 'title' END AS former,
       CASE WHEN a.definition IS DISTINCT FROM b.definition THEN b.definition - 'resolved' - 'title' END AS latter,
       CASE WHEN a.concepts IS DISTINCT FROM b.concepts
            THEN ARRAY(SELECT unnest(b.concepts) EXCEPT SELECT unnest(a.concepts) ORDER BY 1) END AS added,
       CASE WHEN a.concepts IS DISTINCT FROM b.concepts
            THEN ARRAY(SELECT unnest(a.concepts) EXCEPT SELECT unnest(b.concepts) ORDER BY 1) END AS removed,
       a.position IS NOT NULL AND b.position IS NOT NULL
           AND (a.start_seconds, a.prior, a.death, a.follow_up) IS DISTINCT FROM
               (b.start_seconds, b.prior, b.death, b.follow_up) AS read_otherwise
FROM a FULL JOIN b USING (name) ORDER BY coalesce(b.position, a.position), name
"""

# Whether either version kept no concepts although it has tasks: then nobody knows what they meant.
KEPT_CONCEPTS = """
SELECT bool_and(EXISTS (SELECT FROM label.label_meaning k WHERE k.label_set_id = s.label_set_id)
                OR NOT EXISTS (SELECT FROM label.task t WHERE t.task_set_id = s.task_set_id))
FROM label.label_set s WHERE s.label_set_id IN (:a, :b)
"""

# Scans by task and status, as each version counted them when it was stored.
COUNTS = """
WITH counted AS (
    SELECT s.label_set_id, t.name, sum(c.n) FILTER (WHERE c.status = 'event') AS events,
           sum(c.n) FILTER (WHERE c.status IN ('event', 'competing', 'censored')) AS at_risk
    FROM label.label_set s JOIN label.task t USING (task_set_id)
    LEFT JOIN label.task_status_count c USING (label_set_id, position)
    WHERE s.label_set_id IN (:a, :b) GROUP BY 1, 2
)
SELECT name AS task, coalesce(a.events, 0)::int AS events_before, coalesce(b.events, 0)::int AS events_after,
       coalesce(a.at_risk, 0)::int AS at_risk_before, coalesce(b.at_risk, 0)::int AS at_risk_after
FROM (SELECT * FROM counted WHERE label_set_id = :a) a
FULL JOIN (SELECT * FROM counted WHERE label_set_id = :b) b USING (name)
"""


@dataclass(frozen=True, slots=True)
class Why:
    """What the two versions were made of, compared."""

    members: Sequence[Any]
    """Rows of MEMBERS."""
    tasks: Sequence[Any]
    """Rows of TASKS."""
    concepts_known: bool
    cohort_rule: dict[str, list[Any]]
    """Field of the cohort's rule → [before, after], where they differ."""
    loads: list[dict[str, Any]]

    @property
    def matched(self) -> list[Any]:
        """Members of both."""
        return [m for m in self.members if m.before is not None and m.after is not None]

    @property
    def candidates(self) -> list[Any]:
        """Members of both whose labels may differ: those with another digest; all where tasks are read otherwise."""
        if any(task.before != task.after or task.read_otherwise for task in self.tasks):
            return self.matched
        return [m for m in self.matched if m.labels]


def compare(connection: Connection, pair: Pair) -> Why:
    """Ask what the two were made of."""
    from sqlalchemy import text

    members = connection.execute(text(MEMBERS), pair.ids).all()
    tasks = connection.execute(text(TASKS), pair.ids).all()
    known = bool(connection.scalar(text(KEPT_CONCEPTS), pair.ids))
    rules = [side["cohort_rule"] or {} for side in (pair.before, pair.after)]
    rule = {
        key: [rules[0].get(key), rules[1].get(key)]
        for key in sorted(rules[0].keys() | rules[1].keys())
        if rules[0].get(key) != rules[1].get(key)
    }
    touched = {m.person_id for m in members if m.before is None or m.after is None or m.inputs or m.timeline}
    since, until = sorted(side["created_at"] for side in (pair.before, pair.after))
    values = {"persons": sorted(touched), "since": since, "until": until}
    loads = [dict(row) for row in connection.execute(text(LOADS), values).mappings()] if touched else []
    return Why(members, tasks, known, rule, loads)


def of_members(why: Why) -> dict[str, Any]:
    """How many members are new, gone or made of other data, by cause; one member may have several."""
    matched = why.matched
    known = [m for m in matched if m.known]
    causes = {}
    for cause in CAUSES:
        found = [m for m in (known if cause == "timeline" else matched) if getattr(m, cause)]
        causes[cause] = {"members": len(found), "persons": len({m.person_id for m in found})}
    other = [m for m in known if m.inputs and not any(getattr(m, cause) for cause in CAUSES)]
    causes["visits, values or start of the record"] = {
        "members": len(other), "persons": len({m.person_id for m in other})
    }  # fmt: skip
    new = [m for m in why.members if m.before is None]
    gone = [m for m in why.members if m.after is None]
    return {
        "both": len(matched),
        "new": len(new),
        "gone": len(gone),
        "events_of_new": sum(m.events_after for m in new),
        "events_of_gone": sum(m.events_before for m in gone),
        "made_of_other_data": sum(m.inputs for m in known) if len(known) == len(matched) else None,
        "causes": {cause: counts for cause, counts in causes.items() if counts["members"]},
    }


def of_tasks(why: Why) -> dict[str, Any]:
    """Tasks that are new, gone, defined otherwise, or of the same definition with other concepts."""
    both = [t for t in why.tasks if t.before is not None and t.after is not None]
    defined, meant = [], []
    for task in both:
        former, latter = task.former or {}, task.latter or {}
        fields = {
            key: [former.get(key), latter.get(key)]
            for key in sorted(former.keys() | latter.keys())
            if former.get(key) != latter.get(key)
        }
        if fields:
            defined.append({"task": task.task, "fields": fields})
        if why.concepts_known and (task.added or task.removed):
            entry = {"task": task.task, "added": len(task.added), "removed": len(task.removed)}
            meant.append(entry | {"definition_too": bool(fields)})
    return {
        "both": len(both),
        "new": [t.task for t in why.tasks if t.before is None],
        "gone": [t.task for t in why.tasks if t.after is None],
        "defined_otherwise": defined,
        "other_concepts": meant if why.concepts_known else None,
    }


def task_named(why: Why, name: str) -> str:
    """A task that both have. Raises UnknownName."""
    both = [t.task for t in why.tasks if t.before is not None and t.after is not None]
    if name not in both:
        raise UnknownName("task of both", name, both)
    return name


def counts(connection: Connection, pair: Pair) -> dict[str, dict[str, int]]:
    """Task → scans with the outcome, and at risk, before and after."""
    from sqlalchemy import text

    rows = connection.execute(text(COUNTS), pair.ids).mappings()
    return {row["task"]: {key: row[key] for key in row if key != "task"} for row in rows}
