"""Views: events under OMOP's names, labels in long form.

Revision 0005, after 0004.
"""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

CODED = {"value_as_concept_id": "Coded value"}
MEASURED = {"value_as_number": "Numeric value", **CODED, "unit_concept_id": "Unit of value_as_number"}

# view: (domain, prefix of the concept, prefix of start and end (None: one time), values, comment)
EVENTS: dict[str, tuple[str, str, str, bool, dict[str, str]]] = {
    "condition_occurrence": ("c", "condition", "condition_start", True, {}),
    "drug_exposure": ("d", "drug", "drug_exposure_start", True, {}),
    "procedure_occurrence": ("p", "procedure", "procedure", False, {}),
    "device_exposure": ("e", "device", "device_exposure_start", True, {}),
    "measurement": ("m", "measurement", "measurement", False, MEASURED),
    "observation": ("o", "observation", "observation", False, MEASURED),
    "specimen": ("s", "specimen", "specimen", False, {}),
    "visit_detail": ("w", "visit_detail", "visit_detail_start", True, {}),
}


def event_view(view: str) -> list[str]:
    """Statements that give OMOP's column names back to one domain of omop.event."""
    domain, concept, start, ends, values = EVENTS[view]
    columns = {
        f"{view}_id": ("source_row_id", "Primary key of the row in the extract"),
        "person_id": ("person_id", "Whose event"),
        f"{concept}_concept_id": ("concept_id", "Standard concept, 0 where unmapped"),
        f"{start}_date": ("time::date", "Day"),
        f"{start}_datetime": ("time", "Time, naive local; 23:59:59 where date_only"),
        "date_only": ("date_only", "True where the source gives no time of day"),
    }
    if ends:
        end = start.removesuffix("_start") + "_end"
        columns[f"{end}_date"] = ("end_time::date", "Last day")
        columns[f"{end}_datetime"] = ("end_time", "End, naive local; 23:59:59 where only the day is known")
    columns |= {name: (name, comment) for name, comment in values.items()}
    columns["visit_occurrence_id"] = ("visit_occurrence_id", "Visit, null where the extract names none that exists")
    columns[f"{concept}_source_concept_id"] = ("source_concept_id", "Source concept, 0 where none")
    columns["load_id"] = ("load_id", "The load that brought this row")
    listed = ", ".join(f"{expression} AS {name}" for name, (expression, _) in columns.items())
    return [
        f"CREATE VIEW omop.{view} AS SELECT {listed} FROM omop.event WHERE domain = '{domain}'",
        f"COMMENT ON VIEW omop.{view} IS 'OMOP {view.upper()} as loaded, read from omop.event'",
        *(
            f"COMMENT ON COLUMN omop.{view}.{name} IS '{comment.replace(chr(39), chr(39) * 2)}'"
            for name, (_, comment) in columns.items()
        ),
    ]


DEATH = """
CREATE VIEW omop.death AS
SELECT DISTINCT ON (person_id) person_id, time::date AS death_date, time AS death_datetime, date_only, load_id
FROM omop.event WHERE concept_id = 4306655 AND domain = 'x' ORDER BY person_id, time
"""

# Every view of labels reads this one. Precedence of the five statuses: docs/science.md, section 2.
MEMBER_TASK = """
CREATE VIEW label.member_task AS
SELECT y.label_set_id, t.position, t.name AS task, m.cohort_member_id, m.person_id, m.image_occurrence_id, m.index_time,
       m.split, v.status,
       CASE
           WHEN v.status = 'ineligible' THEN coalesce(
               CASE WHEN NOT m.eligible THEN m.reason END,
               CASE WHEN t.position = ANY (y.ineligible_tasks) THEN 'ineligible for this task' END,
               CASE WHEN w.follow_up IS NULL THEN 'no follow-up' END,
               'follow-up ends before the risk window opens')
           WHEN v.status = 'prior' THEN 'outcome before the risk window opens'
       END AS reason,
       CASE v.status WHEN 'event' THEN 1::int2 WHEN 'competing' THEN 0::int2 WHEN 'censored' THEN 0::int2 END AS event,
       CASE v.status WHEN 'event' THEN y.event_seconds[w.found]
                     WHEN 'competing' THEN y.death_seconds
                     WHEN 'censored' THEN w.follow_up END AS seconds,
       w.opens AS start_seconds
FROM label.tte y
JOIN label.label_set s ON s.label_set_id = y.label_set_id
JOIN label.task t ON t.task_set_id = s.task_set_id
JOIN label.cohort_member m ON m.cohort_member_id = y.cohort_member_id
CROSS JOIN LATERAL (
    SELECT array_position(y.event_tasks, t.position) AS found,
           CASE WHEN y.window_tasks = '{}' THEN t.start_seconds
                ELSE coalesce(y.window_seconds[array_position(y.window_tasks, t.position)], t.start_seconds)
           END AS opens,
           CASE WHEN t.follow_up = 'data_cut' THEN coalesce(y.data_cut_seconds, y.follow_up_seconds)
                ELSE y.follow_up_seconds END AS follow_up
) w
CROSS JOIN LATERAL (
    SELECT CASE
        WHEN NOT m.eligible OR w.follow_up IS NULL OR w.follow_up <= w.opens
             OR t.position = ANY (y.ineligible_tasks) THEN 'ineligible'
        WHEN t.prior = 'exclude' AND t.position = ANY (y.prior_tasks) THEN 'prior'
        WHEN w.found IS NOT NULL THEN 'event'
        WHEN t.death = 'competing' AND y.death_seconds <= w.follow_up THEN 'competing'
        ELSE 'censored'
    END AS status
) v
"""

TTE_LONG = """
SELECT {name} AS label_set, l.task, l.cohort_member_id, l.person_id, l.image_occurrence_id, l.index_time, l.split,
       l.status, l.reason, l.event, l.seconds / 86400.0::float8 AS time_days
FROM label.label_set s JOIN label.member_task l USING (label_set_id) WHERE {which}
"""

OUTCOME = """
SELECT {name} AS label_set, t.name AS task, m.cohort_member_id, m.person_id, m.image_occurrence_id, m.index_time,
       m.split, m.index_time + make_interval(secs => u.seconds) AS outcome_time,
       u.seconds / 86400.0::float8 AS time_days
FROM label.label_set s
JOIN label.tte y USING (label_set_id)
JOIN label.cohort_member m USING (cohort_member_id)
CROSS JOIN LATERAL unnest(y.event_tasks, y.event_seconds) u(position, seconds)
JOIN label.task t ON t.task_set_id = s.task_set_id AND t.position = u.position
WHERE {which}
"""

TASK_COUNT = """
SELECT {name} AS label_set, t.name AS task, c.split, c.status, c.n, c.persons, c.person_days
FROM label.label_set s
JOIN label.task_status_count c USING (label_set_id)
JOIN label.task t ON t.task_set_id = s.task_set_id AND t.position = c.position
WHERE {which}
"""

CURRENT = {"name": "s.name", "which": "s.is_current"}
ASKED = {"name": "$1", "which": "s.label_set_id = label.find_label_set($1)"}

MEMBER_COLUMNS = (
    "cohort_member_id bigint, person_id bigint, image_occurrence_id bigint, index_time timestamp, split text"
)
LABEL_VIEWS = {
    "tte_long": (
        TTE_LONG,
        f"label_set text, task text, {MEMBER_COLUMNS}, status text, reason text, event int2, time_days float8",
        "Labels, one row a member and task, ineligible members too; ask for one task or one member",
    ),
    "outcome": (
        OUTCOME,
        f"label_set text, task text, {MEMBER_COLUMNS}, outcome_time timestamp, time_days float8",
        "Observed outcomes (status event), one row each",
    ),
    "task_count": (
        TASK_COUNT,
        "label_set text, task text, split text, status text, n int, persons int, person_days float8",
        "Members by task, split and status, as counted when the label set was stored",
    ),
}

FIND_LABEL_SET = """
CREATE FUNCTION label.find_label_set(name text) RETURNS integer LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT s.label_set_id FROM label.label_set s
    WHERE (s.is_current AND s.name = $1) OR s.name || '@' || s.version = $1
    ORDER BY s.name = $1 DESC LIMIT 1
$$
"""

BINARY = """
CREATE FUNCTION label.binary(label_set text, horizon_days int)
RETURNS TABLE (task text, cohort_member_id bigint, person_id bigint, image_occurrence_id bigint, index_time timestamp,
               split text, status text, label int2)
LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT l.task, l.cohort_member_id, l.person_id, l.image_occurrence_id, l.index_time, l.split, b.status,
           CASE b.status WHEN 'event' THEN 1::int2 WHEN 'negative' THEN 0::int2 END
    FROM label.member_task l
    CROSS JOIN LATERAL (SELECT CASE
        WHEN l.event IS NULL THEN l.status
        WHEN l.event = 1 AND l.seconds <= $2 * 86400::int8 THEN 'event'
        WHEN l.status = 'competing' OR l.seconds >= $2 * 86400::int8 THEN 'negative'
        ELSE 'censored' END AS status) b
    WHERE l.label_set_id = label.find_label_set($1)
$$
"""

COMMENTS = {
    "label_set": "Label set, by its name",
    "label_set_id": "Label set",
    "position": "Position of the task in its set",
    "task": "Task",
    "cohort_member_id": "Member",
    "person_id": "Person",
    "image_occurrence_id": "Scan",
    "index_time": "Acquisition of the scan, naive local time",
    "split": "train, tuning or held_out",
    "status": "ineligible, prior, event, competing or censored: the first of these that holds",
    "reason": "Why ineligible or prior",
    "event": "1 event, 0 competing or censored, null prior or ineligible",
    "seconds": "Seconds from the index to the event, the competing death or the end of follow-up",
    "start_seconds": "Opening of the risk window, seconds from the index",
    "time_days": "Days from the index to event, competing death or end of follow-up; null prior or ineligible",
    "outcome_time": "When the outcome was recorded, naive local time",
    "n": "Scans",
    "persons": "Persons",
    "person_days": "Days at risk inside the window",
    "death_date": "Day of death",
    "death_datetime": "Time of death, naive local; 23:59:59 where date_only",
    "date_only": "True where the source gives no time of day",
    "load_id": "The load that brought this row",
}


def comment(schema: str, view: str, text: str, columns: list[str]) -> None:
    """Comment a view and each of its columns."""
    op.execute(f"COMMENT ON VIEW {schema}.{view} IS '{text}'")
    for column in columns:
        op.execute(f"COMMENT ON COLUMN {schema}.{view}.{column} IS '{COMMENTS[column]}'")


def upgrade() -> None:
    for view in EVENTS:
        for statement in event_view(view):
            op.execute(statement)
    op.execute(DEATH)
    columns = ["person_id", "death_date", "death_datetime", "date_only", "load_id"]
    comment("omop", "death", "Deaths, one row a person (the earliest recorded), read from omop.event", columns)
    op.execute(FIND_LABEL_SET)
    op.execute("COMMENT ON FUNCTION label.find_label_set IS 'Label set meant by NAME (its current version) or NAME@2'")
    op.execute(MEMBER_TASK)
    columns = ["label_set_id", "position", "task", "cohort_member_id", "person_id", "image_occurrence_id", "index_time"]
    columns += ["split", "status", "reason", "event", "seconds", "start_seconds"]
    comment(
        "label", "member_task", "What label.tte_long and label.binary read: every version, times in seconds", columns
    )
    for view, (statement, columns, text) in LABEL_VIEWS.items():
        op.execute(f"CREATE VIEW label.{view} AS {statement.format(**CURRENT)}")
        comment("label", view, text, [column.split()[0] for column in columns.split(", ")])
        op.execute(
            f"CREATE FUNCTION label.{view}(label_set text) RETURNS TABLE ({columns}) LANGUAGE sql STABLE PARALLEL SAFE "
            f"AS $$ {statement.format(**ASKED)} $$"
        )
        op.execute(f"COMMENT ON FUNCTION label.{view}(text) IS '{text}; of NAME or NAME@2'")
    op.execute(BINARY)
    text = "Labels at a horizon: event by then 1, observed until then without it 0 (a competing death too), else null"
    op.execute(f"COMMENT ON FUNCTION label.binary IS '{text}'")


def downgrade() -> None:
    op.execute("DROP FUNCTION label.binary")
    for view in reversed(LABEL_VIEWS):
        op.execute(f"DROP FUNCTION label.{view}(text)")
        op.execute(f"DROP VIEW label.{view}")
    op.execute("DROP VIEW label.member_task")
    op.execute("DROP FUNCTION label.find_label_set")
    op.execute("DROP VIEW omop.death")
    for view in reversed(EVENTS):
        op.execute(f"DROP VIEW omop.{view}")
