"""What `lachesis ls` and `lachesis show` ask: one statement a kind, newest first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from app.errors import UnknownName

if TYPE_CHECKING:
    from sqlalchemy import Connection


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """How a kind of thing is listed and found."""

    listing: str
    """Statement of all of them; `:limit` bounds it."""
    one: str
    """Statement of one, by `:name` (text)."""
    parts: tuple[tuple[str, str], ...] = ()
    """Further tables shown below it: (title, statement by `:name`); `:limit` bounds long ones, null does not."""
    count: str = ""
    """Statement that counts the rows of `one`, where they may be many."""
    versions: str = ""
    """Statement of all versions, older ones too, where a name has several; `:limit` bounds it."""


def _of(alias: str) -> str:
    """Condition that a row is what `:name` means: NAME its current version, NAME@2 its second."""
    return f"(({alias}.is_current AND {alias}.name = :name) OR {alias}.name || '@' || {alias}.version = :name)"


# A number names a delivery by its job first; a load by its own key where no job of that number loaded anything.
_LOADS_NAMED = """
(l.job_id::text = :name
 OR l.load_id::text = :name AND NOT EXISTS (SELECT FROM ops.load d WHERE d.job_id::text = :name))
"""
_REJECTS_NAMED = """
(r.job_id::text = :name OR r.load_id::text = :name
 AND NOT EXISTS (SELECT FROM ops.job j WHERE j.job_id::text = :name AND j.kind = 'load'))
"""

# Concept 0 is counted where rows have concepts and times: not for persons, vocabulary or scans.
_CONCEPT_0 = """
CASE WHEN l.first_time IS NOT NULL AND l.kind <> 'images' AND l.table_name <> 'death' AND l.num_loaded > 0
     THEN (100.0 * coalesce((l.flags_by_rule ->> 'concept_zero')::bigint, 0) / l.num_loaded)::float8
END AS concept_0_percent
"""

_LOADS = f"""
SELECT l.load_id, l.job_id, s.name AS source, l.table_name AS "table", l.mode, l.state,
       l.num_read AS read, l.num_loaded AS loaded, l.num_shown AS shown, l.num_rejected AS rejected, {_CONCEPT_0},
       l.first_time::date AS "from", l.last_time::date AS "to", l.created_at
FROM ops.load l JOIN ops.source s USING (source_id)
"""

_LOAD = f"""
SELECT l.load_id, l.job_id, s.name AS source, l.kind, l.table_name AS "table", l.mode, l.state, l.num_read AS read,
       l.num_loaded AS loaded, l.num_shown AS shown, l.num_rejected AS rejected, l.num_same AS already_so,
       l.num_deleted AS deletions, l.delivery_id, {_CONCEPT_0}, l.first_time, l.last_time, l.created_at,
       l.superseded_at, (
           SELECT max(n.load_id) FROM ops.load n WHERE n.source_id = l.source_id AND n.table_name = l.table_name
           AND n.load_id > l.load_id AND n.created_at <= l.superseded_at
       ) AS superseded_by
FROM ops.load l JOIN ops.source s USING (source_id)
"""

_DELIVERY = f"""
SELECT l.load_id, l.table_name AS "table", l.kind, l.mode, l.num_read AS read, l.num_loaded AS loaded,
       l.num_rejected AS rejected, l.rejects_by_rule, l.flags_by_rule, {_CONCEPT_0}, l.first_time, l.last_time
FROM ops.load l WHERE l.job_id = :job ORDER BY l.load_id
"""

LOAD = Kind(
    listing=_LOADS + "ORDER BY l.load_id DESC LIMIT :limit",
    one=_LOAD + f"WHERE {_LOADS_NAMED} ORDER BY l.load_id",
    parts=(
        (
            "files",
            f"""
SELECT l.table_name AS "table", f.value ->> 'name' AS file, f.value ->> 'dialect' AS dialect,
       (f.value ->> 'records')::bigint AS records, (f.value ->> 'bytes')::bigint AS bytes,
       left(f.value ->> 'sha256', 12) AS sha256
FROM ops.load l, jsonb_array_elements(l.files) f
WHERE {_LOADS_NAMED} ORDER BY 1, 2
""",
        ),
        (
            "what the delivery changed",
            f"""
SELECT c.table_name AS "table", c.num_before AS before, c.num_after AS after, c.num_added AS added,
       c.num_changed AS changed, c.num_removed AS removed
FROM ops.load_change c WHERE c.delivery_id IN (SELECT l.delivery_id FROM ops.load l WHERE {_LOADS_NAMED}) ORDER BY 1
""",
        ),
        *(
            (
                f"{what} by rule",
                f"""
SELECT l.table_name AS "table", e.key AS rule, e.value::bigint AS rows
FROM ops.load l, jsonb_each_text(l.{what}_by_rule) e
WHERE {_LOADS_NAMED} ORDER BY 1, 2
""",
            )
            for what in ("rejects", "flags")
        ),
    ),
)

REJECT = Kind(
    listing="""
SELECT coalesce(r.load_id::text, '-') AS load_id, r.job_id, r.table_name AS "table", r.rule, count(*) AS rows
FROM ops.reject r GROUP BY 1, 2, 3, 4 ORDER BY 2 DESC, 3, 4 LIMIT :limit
""",
    one=f"""
SELECT r.table_name AS "table", r.file, r.record, r.column_name AS "column", r.rule, r.row_key
FROM ops.reject r WHERE {_REJECTS_NAMED} ORDER BY r.table_name, r.file, r.record, r.reject_id LIMIT :limit
""",
    count=f"SELECT count(*) FROM ops.reject r WHERE {_REJECTS_NAMED}",
)

_TABLE_OF_DOMAIN = """
CASE e.domain WHEN 'c' THEN 'condition_occurrence' WHEN 'd' THEN 'drug_exposure' WHEN 'p' THEN 'procedure_occurrence'
     WHEN 'e' THEN 'device_exposure' WHEN 'm' THEN 'measurement' WHEN 'o' THEN 'observation' WHEN 's' THEN 'specimen'
     WHEN 'v' THEN 'visit_occurrence' WHEN 'w' THEN 'visit_detail' WHEN 'x' THEN 'death' ELSE e.domain::text END
"""

PERSON = Kind(
    listing="""
SELECT person_id, birth_time, gender_concept_id, num_events
FROM omop.person LEFT JOIN omop.timeline USING (person_id) ORDER BY person_id LIMIT :limit
""",
    one="""
SELECT p.person_id, p.birth_time, p.gender_concept_id, g.concept_name AS gender, p.race_concept_id,
       p.ethnicity_concept_id, p.split, s.name AS source, p.load_id, coalesce(t.num_events, 0) AS num_events
FROM omop.person p LEFT JOIN ops.load l USING (load_id) LEFT JOIN ops.source s USING (source_id)
LEFT JOIN omop.timeline t USING (person_id) LEFT JOIN omop.concept g ON g.concept_id = p.gender_concept_id
WHERE p.person_id::text = :name
""",
    parts=(
        (
            "observation periods",
            """
SELECT observation_period_id, start_date, end_date, load_id FROM omop.observation_period
WHERE person_id = CAST(:name AS bigint) ORDER BY start_date
""",
        ),
        (
            "scans",
            """
SELECT image_occurrence_id, acquired_at, date_only, acquired_at_source, slices, slice_thickness_mm, verdict, reasons,
       load_id
FROM omop.image_occurrence WHERE person_id = CAST(:name AS bigint) ORDER BY 2
""",
        ),
        (
            "timeline",
            f"""
SELECT e.time, e.date_only, {_TABLE_OF_DOMAIN} AS "table", e.source_row_id AS row_id, e.concept_id, c.concept_name,
       e.value_as_number AS value, e.end_time, e.visit_occurrence_id AS visit, e.load_id
FROM omop.event e LEFT JOIN omop.concept c USING (concept_id)
WHERE e.person_id = CAST(:name AS bigint) ORDER BY e.time, e.concept_id, e.domain, e.source_row_id LIMIT :limit
""",
        ),
    ),
)

COHORT = Kind(
    versions="""
SELECT c.name, c.version, c.is_current AS current, c.follow_up, c.data_cut, count(m.*) AS scans,
       count(DISTINCT m.person_id) AS persons, count(*) FILTER (WHERE m.eligible) AS eligible,
       (SELECT string_agg(l.name || '@' || l.version, ', ' ORDER BY l.label_set_id) FROM label.label_set l
        WHERE l.cohort_id = c.cohort_id) AS labels, encode(substr(c.digest, 1, 6), 'hex') AS digest, c.created_at
FROM label.cohort c LEFT JOIN label.cohort_member m USING (cohort_id)
GROUP BY c.cohort_id ORDER BY c.cohort_id DESC LIMIT :limit
""",
    listing="""
SELECT c.name, c.version, c.follow_up, c.data_cut, count(m.*) AS scans, count(DISTINCT m.person_id) AS persons,
       count(*) FILTER (WHERE m.eligible) AS eligible, c.created_at
FROM label.cohort c LEFT JOIN label.cohort_member m USING (cohort_id)
WHERE c.is_current GROUP BY c.cohort_id ORDER BY c.cohort_id DESC LIMIT :limit
""",
    one=f"""
SELECT cohort_id, name, version, is_current AS current, follow_up, data_cut, definition, job_id, created_at
FROM label.cohort c WHERE {_of("c")}
""",
    parts=(
        (
            "attrition",
            f"""
SELECT s.value ->> 'step' AS step, s.value ->> 'scans' AS scans, s.value ->> 'persons' AS persons
FROM label.cohort c, jsonb_array_elements(c.attrition) WITH ORDINALITY s(value, n)
WHERE {_of("c")} ORDER BY s.n
""",
        ),
        (
            "follow-up by rule, days",
            f"""
SELECT s.value ->> 'rule' AS rule, s.value ->> 'rule' = c.follow_up AS used, (s.value ->> 'scans')::int AS scans,
       (s.value ->> 'persons')::int AS persons, (s.value ->> 'deaths')::int AS deaths,
       (s.value ->> 'median_days')::float8 AS median, (s.value ->> 'lower_days')::float8 AS lower_quartile,
       (s.value ->> 'upper_days')::float8 AS upper_quartile,
       (s.value ->> 'reverse_km_median_days')::float8 AS reverse_km_median
FROM label.cohort c, jsonb_array_elements(c.follow_up_summary) WITH ORDINALITY s(value, n)
WHERE {_of("c")} ORDER BY s.n
""",
        ),
        (
            "splits",
            f"""
SELECT m.split, count(*) AS scans, count(DISTINCT m.person_id) AS persons,
       count(*) FILTER (WHERE m.eligible) AS eligible
FROM label.cohort c JOIN label.cohort_member m USING (cohort_id)
WHERE {_of("c")} GROUP BY 1 ORDER BY 1
""",
        ),
    ),
)

TASK = Kind(
    versions="""
SELECT s.name AS task_set, s.version, s.is_current AS current, s.kind, count(t.*) AS tasks,
       (SELECT string_agg(l.name || '@' || l.version, ', ' ORDER BY l.label_set_id) FROM label.label_set l
        WHERE l.task_set_id = s.task_set_id) AS labels, encode(substr(s.digest, 1, 6), 'hex') AS digest, s.created_at
FROM label.task_set s LEFT JOIN label.task t USING (task_set_id)
GROUP BY s.task_set_id ORDER BY s.task_set_id DESC LIMIT :limit
""",
    listing="""
SELECT s.name AS task_set, s.version, s.kind, count(t.*) AS tasks, s.created_at
FROM label.task_set s LEFT JOIN label.task t USING (task_set_id)
WHERE s.is_current GROUP BY s.task_set_id ORDER BY s.task_set_id DESC LIMIT :limit
""",
    one=f"""
SELECT task_set_id, name, version, is_current AS current, kind, definition, job_id, created_at
FROM label.task_set s WHERE {_of("s")}
""",
    parts=(
        (
            "tasks",
            f"""
SELECT t.position, t.name, t.title, t.concept_id, t.prior, t.death, t.follow_up, t.horizons_days,
       t.prevalence, t.entropy, t.num_train_events
FROM label.task_set s JOIN label.task t USING (task_set_id)
WHERE {_of("s")} ORDER BY t.position LIMIT :limit
""",
        ),
        (
            "weighed",
            f"""
SELECT c.rank, c.name, c.concept_id, c.code, c.prevalence, c.base_prevalence, c.num_train_events, c.event_rate,
       c.entropy, c.verdict
FROM label.task_set s JOIN label.task_choice c USING (task_set_id) WHERE {_of("s")} ORDER BY c.rank LIMIT :limit
""",
        ),
    ),
)

_LABEL_SETS = "label.label_set l JOIN label.cohort c USING (cohort_id) JOIN label.task_set t USING (task_set_id)"

LABEL = Kind(
    versions=f"""
SELECT l.name, l.version, l.is_current AS current, c.name || '@' || c.version AS cohort,
       t.name || '@' || t.version AS tasks, l.num_members AS members, l.num_events AS outcomes,
       encode(substr(l.digest, 1, 6), 'hex') AS digest,
       (SELECT count(*) FROM model.checkpoint k WHERE k.label_set_id = l.label_set_id) AS checkpoints,
       (SELECT count(*) FROM model.metric k WHERE k.label_set_id = l.label_set_id) AS metrics, l.created_at
FROM {_LABEL_SETS} ORDER BY l.label_set_id DESC LIMIT :limit
""",
    listing=f"""
SELECT l.name, l.version, c.name AS cohort, t.name AS tasks, l.num_members AS members, l.num_events AS outcomes,
       encode(substr(l.digest, 1, 6), 'hex') AS digest, l.created_at
FROM {_LABEL_SETS} WHERE l.is_current ORDER BY l.label_set_id DESC LIMIT :limit
""",
    one=f"""
SELECT l.label_set_id, l.name, l.version, l.is_current AS current, c.name || '@' || c.version AS cohort,
       t.name || '@' || t.version AS tasks, l.num_members, l.num_events,
       l.vocabulary_version, encode(l.digest, 'hex') AS digest, encode(l.data_digest, 'hex') AS data_digest, l.job_id,
       l.created_at
FROM {_LABEL_SETS} WHERE {_of("l")}
""",
    parts=(
        (
            "members by task, split and status",
            f"""
SELECT t.name AS task, c.split, c.status, c.n, c.persons, round(c.person_days::numeric, 1) AS person_days
FROM label.label_set s
JOIN label.task_status_count c USING (label_set_id)
JOIN label.task t ON t.task_set_id = s.task_set_id AND t.position = c.position
WHERE {_of("s")} ORDER BY t.position, c.split, c.status LIMIT 200
""",
        ),
    ),
)

FEATURE = Kind(
    listing="""
SELECT c.name AS cohort, c.version, count(d.*) AS features, s.definition ->> 'tasks' AS tasks, s.created_at
FROM label.feature_set s JOIN label.cohort c USING (cohort_id) LEFT JOIN label.feature_definition d USING (cohort_id)
GROUP BY c.name, c.version, s.definition, s.created_at ORDER BY s.created_at DESC LIMIT :limit
""",
    one=f"""
SELECT c.name AS cohort, c.version, s.definition, s.job_id, s.created_at
FROM label.feature_set s JOIN label.cohort c USING (cohort_id) WHERE {_of("c")}
""",
    parts=(
        (
            "features",
            f"""
SELECT d.name, m.split, d.kind, d.description, count(*) AS scans,
       round((100.0 * count(f.value) / count(*)), 1)::float8 AS known_percent, avg(v.value)::float8 AS mean,
       percentile_cont(0.25) WITHIN GROUP (ORDER BY v.value) AS lower_quartile,
       percentile_cont(0.5) WITHIN GROUP (ORDER BY v.value) AS median,
       percentile_cont(0.75) WITHIN GROUP (ORDER BY v.value) AS upper_quartile, d.absent_is_zero
FROM (
    SELECT c.cohort_id, d.name, d.kind, d.description, d.absent_is_zero
    FROM label.cohort c JOIN label.feature_definition d USING (cohort_id)
    WHERE {_of("c")} ORDER BY d.name LIMIT :limit
) d JOIN label.cohort_member m USING (cohort_id)
LEFT JOIN label.feature f ON f.cohort_member_id = m.cohort_member_id AND f.name = d.name
CROSS JOIN LATERAL (SELECT coalesce(f.value, CASE WHEN d.absent_is_zero THEN 0 END) AS value) v
GROUP BY d.name, m.split, d.kind, d.description, d.absent_is_zero ORDER BY d.name, m.split
""",
        ),
    ),
)

CHECKPOINT = Kind(
    listing="""
SELECT checkpoint_id, name, left(sha256, 12) AS sha256, arm, encoder, epoch, step, num_steps, is_final AS final,
       is_best AS best, shuffled, seed, created_at
FROM model.checkpoint ORDER BY checkpoint_id DESC LIMIT :limit
""",
    one="""
SELECT k.*, (SELECT string_agg(e.epoch || CASE WHEN e.is_best THEN ' (best)' ELSE '' END, ', ' ORDER BY e.step)
             FROM model.checkpoint e WHERE e.job_id = k.job_id AND NOT e.is_final) AS kept_epochs,
       (SELECT p.name || ' (' || p.checkpoint_id || ')' FROM model.checkpoint p WHERE p.checkpoint_id = k.parent_id)
           AS parent,
       (SELECT l.name || '@' || l.version FROM label.label_set l WHERE l.label_set_id = k.label_set_id) AS label_set,
       (SELECT c.name || '@' || c.version FROM label.cohort c WHERE c.cohort_id = k.cohort_id) AS cohort,
       (SELECT string_agg(DISTINCT a.alias, ', ') FROM model.alias a
        WHERE a.checkpoint_id = k.checkpoint_id AND a.valid_to IS NULL) AS aliases
FROM model.checkpoint k
WHERE k.checkpoint_id::text = :name
""",
)

METRIC = Kind(
    listing="""
SELECT s.name AS label_set, m.task, m.metric, m.horizon_days, c.name AS checkpoint, r.name AS minus, m.head, m.inputs,
       round(m.value::numeric, 4) AS value, round(m.ci_low::numeric, 4) AS ci_low,
       round(m.ci_high::numeric, 4) AS ci_high, m.n, m.num_events AS events, m.reason
FROM model.metric m JOIN label.label_set s USING (label_set_id)
LEFT JOIN model.checkpoint c ON c.checkpoint_id = m.checkpoint_id
LEFT JOIN model.checkpoint r ON r.checkpoint_id = m.reference_checkpoint_id
ORDER BY m.metric_id DESC LIMIT :limit
""",
    one="SELECT * FROM model.metric WHERE metric_id::text = :name",
)

JOB = Kind(
    listing="""
SELECT j.job_id, j.kind, j.name, j.state, j.attempt, p.done, p.total, p.unit, j.created_at, j.finished_at,
       j.error_message
FROM ops.job j LEFT JOIN ops.job_progress p USING (job_id) WHERE j.shard IS NULL ORDER BY j.job_id DESC LIMIT :limit
""",
    one="SELECT * FROM ops.job WHERE job_id::text = :name",
    parts=(
        (
            "attempts",
            """
SELECT fence, host, pid, devices, started_at, finished_at, outcome, exit_code, signal, start_step, error_message
FROM ops.job_attempt WHERE job_id::text = :name ORDER BY fence
""",
        ),
        (
            "shards",
            """
SELECT j.shard, j.job_id, j.state, p.done, p.total, p.unit, j.attempt, a.host, j.started_at, j.finished_at,
       j.error_message
FROM ops.job j LEFT JOIN ops.job_progress p USING (job_id)
LEFT JOIN ops.job_attempt a ON a.job_id = j.job_id AND a.fence = j.fence
WHERE j.parent_job_id::text = :name AND j.shard IS NOT NULL ORDER BY j.shard, j.job_id
""",
        ),
        (
            "states",
            """
SELECT at, from_state, to_state, fence, detail FROM ops.job_event
WHERE job_id::text = :name ORDER BY job_event_id
""",
        ),
    ),
)

KINDS: dict[str, Kind] = {
    "load": LOAD,
    "reject": REJECT,
    "person": PERSON,
    "cohort": COHORT,
    "task": TASK,
    "label": LABEL,
    "feature": FEATURE,
    "checkpoint": CHECKPOINT,
    "metric": METRIC,
    "job": JOB,
}


def kind_named(word: str) -> tuple[str, Kind]:
    """A kind by its singular or plural. Raises UnknownName."""
    singular = word if word in KINDS else word.removesuffix("s")
    if singular not in KINDS:
        raise UnknownName("kind", word, KINDS)
    return singular, KINDS[singular]


def listing(connection: Connection, kind: Kind, limit: int, *, versions: bool = False) -> list[dict[str, Any]]:
    """Rows of the newest `limit` things of a kind; with `versions` older ones of a name, too."""
    from sqlalchemy import text

    statement = kind.versions if versions else kind.listing
    return [dict(row) for row in connection.execute(text(statement), {"limit": limit}).mappings()]


def details(connection: Connection, statement: str, name: str, limit: int | None = None) -> list[dict[str, Any]]:
    """Rows of one statement about one thing; of long tables `limit` at the most."""
    from sqlalchemy import text

    return [dict(row) for row in connection.execute(text(statement), {"name": name, "limit": limit}).mappings()]


def count(connection: Connection, kind: Kind, name: str) -> int:
    """How many rows there are of one thing."""
    from sqlalchemy import text

    return int(connection.scalar(text(kind.count), {"name": name}) or 0)


def delivery(connection: Connection, job_id: int) -> list[dict[str, Any]]:
    """What one job loaded, a row a table."""
    from sqlalchemy import text

    return [dict(row) for row in connection.execute(text(_DELIVERY), {"job": job_id}).mappings()]


def is_load(connection: Connection, name: str) -> bool:
    """Whether a load, or a job that loads, has this id; it may have nothing rejected."""
    from sqlalchemy import text

    statement = (
        "SELECT EXISTS (SELECT FROM ops.load WHERE load_id::text = :name) "
        "OR EXISTS (SELECT FROM ops.job WHERE job_id::text = :name AND kind = 'load')"
    )
    return bool(connection.scalar(text(statement), {"name": name}))


def names(connection: Connection, word: str) -> list[str]:
    """Known names of a kind, for suggestions."""
    rows = listing(connection, KINDS[word], 500)
    return [str(next(iter(row.values()))) for row in rows] + [str(row["name"]) for row in rows if row.get("name")]
