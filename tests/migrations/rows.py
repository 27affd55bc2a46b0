"""Rows for tests of the schema, written by hand."""

from __future__ import annotations

from sqlalchemy import Connection, text

DAY = 86_400


def add_labels(connection: Connection) -> None:
    """Label set `outcomes`, two versions, of one cohort of seven members and four tasks.

    Tasks: 0 plain (window from day 0, prior excluded, death censors), 1 late (window from day 30, prior kept, death
    competes), 2 readmission (window where the member's discharge is), 3 mortality (followed to the data cut).
    Members: 1 outcomes of all tasks; 2 nothing until day 100; 3 dies on day 50; 4 has history; 5 is ineligible;
    6 ends on day 20; 7 is ineligible for readmission alone and has no data cut.
    """
    connection.execute(
        text("""
        INSERT INTO label.cohort (name, version, is_current, definition, attrition, follow_up, digest)
        VALUES ('chest', 1, true, '{}', '[]', 'observation_period', '');
        INSERT INTO label.task_set (name, version, is_current, kind, definition, digest)
        VALUES ('clinical', 1, true, 'clinical', '{}', '');
        INSERT INTO label.label_set (name, version, is_current, cohort_id, task_set_id, digest, data_digest,
                                     num_members, num_events)
        VALUES ('outcomes', 1, false, 1, 1, '', '', 7, 0), ('outcomes', 2, true, 1, 1, '', '', 7, 4);
    """)
    )
    task = text("""
        INSERT INTO label.task (task_set_id, position, name, start_seconds, occurrence, prior, death, follow_up,
                                horizons_days, definition)
        VALUES (1, :position, :name, :start, 'first', :prior, :death, :follow_up, '{365}', '{}')
    """)
    for position, (name, start, prior, death, follow_up) in enumerate(
        [
            ("plain", 0, "exclude", "censor", "cohort"),
            ("late", 30 * DAY, "keep", "competing", "cohort"),
            ("readmission", 0, "keep", "competing", "cohort"),
            ("mortality", 0, "exclude", "censor", "data_cut"),
        ]
    ):
        connection.execute(
            task,
            {
                "position": position,
                "name": name,
                "start": start,
                "prior": prior,
                "death": death,
                "follow_up": follow_up,
            },
        )
    member = text("""
        INSERT INTO label.cohort_member (cohort_id, person_id, image_occurrence_id, index_time, index_date_only, split,
                                         eligible, reason)
        VALUES (1, :n * 10, :n * 100, '2020-01-01 12:00', false, 'train', :eligible, :reason)
    """)
    labels = text("""
        INSERT INTO label.tte VALUES (2, :member, :event_tasks, :event_seconds, :prior_tasks, :ineligible_tasks,
            :window_tasks, :window_seconds, '{}', :follow_up, :data_cut, :death)
    """)
    none = {"event_tasks": [], "event_seconds": [], "prior_tasks": [], "ineligible_tasks": [], "death": None}
    none |= {"window_tasks": [], "window_seconds": [], "follow_up": 100 * DAY, "data_cut": 200 * DAY}
    died = {"follow_up": 50 * DAY, "data_cut": 50 * DAY, "death": 50 * DAY, "window_tasks": [2]}
    rows = {
        1: {"event_tasks": [0, 1, 2, 3], "event_seconds": [DAY, 31 * DAY, 5 * DAY, 150 * DAY]},
        2: {},
        3: {**died, "window_seconds": [10 * DAY], "event_tasks": [3], "event_seconds": [50 * DAY]},
        4: {"prior_tasks": [0, 1], "event_tasks": [1], "event_seconds": [40 * DAY]},
        5: {"follow_up": None, "data_cut": None},
        6: {"follow_up": 20 * DAY, "window_tasks": [2], "window_seconds": [20 * DAY]},
        7: {"ineligible_tasks": [2], "data_cut": None},
    }
    for n, row in rows.items():
        reason = "index outside every observation period" if n == 5 else None
        connection.execute(member, {"n": n, "eligible": n != 5, "reason": reason})
        connection.execute(labels, {**none, **row, "member": n})


def add_checkpoint(connection: Connection, name: str, width: int) -> int:
    """A finished checkpoint without a file."""
    statement = text("""
        INSERT INTO model.checkpoint (name, sha256, arm, encoder, width, recipe, seed, step, num_steps, is_final, path,
                                      num_bytes, code_version)
        VALUES (:name, encode(sha256(convert_to(:name, 'UTF8')), 'hex'), 'tte', 'tiny', :width, '{}', 0, 1, 1, true, '',
                0, '')
        RETURNING checkpoint_id
    """)
    return int(connection.execute(statement, {"name": name, "width": width}).scalar_one())


_SCANS = """
INSERT INTO ops.source (name, details) VALUES ('s', '{}');
INSERT INTO ops.load (source_id, kind, mode, table_name, state, files, content_sha256, num_read, num_loaded,
                      num_rejected)
VALUES (1, 'images', 'snapshot', 'image_occurrence', 'published', '[]', '', 0, 0, 0);
INSERT INTO omop.person (person_id, gender_concept_id, birth_time, load_id)
SELECT n, CASE WHEN n % 2 = 0 THEN 8507 ELSE 8532 END, TIMESTAMP '2019-06-01' - n % 80 * interval '1 year', 1
FROM generate_series(1, :n) n;
INSERT INTO omop.image_occurrence (person_id, acquired_at, date_only, acquired_at_source, image_key, root, path, format,
                                   verdict, load_id)
SELECT n, '2020-01-01 12:00', false, 'manifest', n, 'images', n, 'nifti',
       CASE WHEN n % 3 = 0 THEN 'suspect' WHEN n % 100 = 1 THEN 'unusable' ELSE 'ok' END, 1
FROM generate_series(1, :n) n ORDER BY n;
INSERT INTO label.cohort (name, version, is_current, definition, attrition, follow_up, digest)
VALUES ('chest', 1, true, '{}', '[]', 'observation_period', '');
INSERT INTO label.cohort_member (cohort_id, person_id, image_occurrence_id, index_time, index_date_only, split,
                                 eligible)
SELECT 1, n, n, '2020-01-01 12:00', false, CASE WHEN n % 4 = 0 THEN 'held_out' ELSE 'train' END, true
FROM generate_series(1, :n) n;
ANALYZE omop.person, omop.image_occurrence, label.cohort_member;
"""


def add_scans(connection: Connection, n: int) -> None:
    """Persons and scans 1 to n, cohort `chest`: even ones are men, each third scan is suspect, each fourth held out."""
    for statement in _SCANS.replace(":n", str(n)).split(";\n"):
        if statement.strip():
            connection.exec_driver_sql(statement.replace("%", "%%"))
