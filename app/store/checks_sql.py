"""The checks of loaded data, as a table: what each asks, among which rows, and which rows break it.

Checks of events are conditions over one shared join, so that all of them are counted in one pass; every other check is
a statement that lists the rows it minds. Only what changes a label, a feature or a follow-up is asked.
"""

from __future__ import annotations

from dataclasses import dataclass

TABLES = {
    "c": "condition_occurrence",
    "d": "drug_exposure",
    "p": "procedure_occurrence",
    "e": "device_exposure",
    "m": "measurement",
    "o": "observation",
    "s": "specimen",
    "v": "visit_occurrence",
    "w": "visit_detail",
    "x": "death",
}
"""Letter of omop.event.domain → table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One question to the data; violations over denominator is a share, judged by two thresholds."""

    name: str
    asks: str
    why: str
    """What it does to labels."""
    mend: str
    warn: float = 0.0
    """A larger share is a warning."""
    fail: float | None = 0.01
    """A larger share is a failure; None: never one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EventCheck(Check):
    """A condition on a row of omop.event, asked table by table."""

    minds: str
    """Condition that a sound row does not meet; over e (event), p (person), d (death), o (periods), c (concept), s
    (source)."""
    among: str = "true"
    """Condition on the rows that can be asked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowCheck(Check):
    """A statement that lists the rows it minds, of one table."""

    table: str
    rows: str
    """Statement; `{loads:x}` is a condition that x is a load of the source."""
    total: str
    """Statement that counts the rows that could be minded."""
    measure: str = "count(*)"
    """Violations, over the listed rows."""


EVENTS_FROM = """omop.event e
LEFT JOIN omop.person p ON p.person_id = e.person_id
LEFT JOIN (
    SELECT person_id, min(time)::date AS day FROM omop.event WHERE domain = 'x' GROUP BY 1
) d ON d.person_id = e.person_id
LEFT JOIN (
    SELECT person_id, range_agg(daterange(start_date, end_date, '[]')) AS days
    FROM omop.observation_period WHERE end_date >= start_date GROUP BY 1
) o ON o.person_id = e.person_id
LEFT JOIN omop.concept c ON c.concept_id = e.concept_id
LEFT JOIN (
    SELECT l.load_id, s.data_cut FROM ops.load l JOIN ops.source s USING (source_id)
) s ON s.load_id = e.load_id
WHERE {loads:e.load_id}"""

EVENT_COLUMNS = (
    "e.person_id, e.time, e.date_only, e.domain, e.source_row_id, e.concept_id, e.source_concept_id, e.load_id"
)

EVENT_CHECKS: tuple[EventCheck, ...] = (
    EventCheck(
        name="event_without_person",
        asks="Events of persons that the store does not hold",
        minds="p.person_id IS NULL",
        fail=0.0,
        why="They are in no timeline, so their outcomes are missed.",
        mend="Load a whole extract, with PERSON and its events from the same day.",
    ),
    EventCheck(
        name="event_before_birth",
        asks="Events before the person's birth",
        minds="e.time < p.birth_time",
        why="They count as history: first occurrences become prior, and leave the task.",
        mend="Correct birth or event in the source; a mother's record may be mixed with her child's.",
    ),
    EventCheck(
        name="event_after_death",
        asks="Events on a day after the person's death",
        among="d.day IS NOT NULL AND e.domain <> 'x'",
        minds="e.time::date > d.day",
        fail=0.05,
        why="Follow-up ends at death, so an outcome after it never counts; a wrong death cuts follow-up short.",
        mend="Look at a few: late billing is harmless, visits mean that the death is wrong.",
    ),
    EventCheck(
        name="event_in_future",
        asks="Events after the data cut, or after today where no data cut is known",
        minds="e.time >= coalesce(s.data_cut + 1, now()::date + 1)",
        why="Planned or mistyped events become outcomes that nobody observed, and stretch follow-up.",
        mend="Correct the year; where all dates are shifted, say --data-cut when loading.",
    ),
    EventCheck(
        name="event_outside_period",
        asks="Events in none of the person's observation periods",
        minds="NOT coalesce(o.days @> e.time::date, false)",
        warn=0.01,
        fail=0.10,
        why="Follow-up ends with the period that holds the index: such outcomes are missed, and persons look censored.",
        mend="Derive observation periods anew from first and last event, or make cohorts with --follow-up data_cut.",
    ),
    EventCheck(
        name="concept_zero",
        asks="Events without a standard concept (concept 0)",
        among="e.domain <> 'x'",
        minds="e.concept_id = 0",
        warn=0.05,
        fail=0.25,
        why="No task by concept sees them: the outcome looks absent where only its mapping is.",
        mend="Map the commonest source codes first; the statement below lists source_concept_id.",
    ),
    EventCheck(
        name="concept_unknown",
        asks="Events whose concept the store's vocabulary does not hold",
        among="e.concept_id <> 0 AND e.domain <> 'x'",
        minds="c.concept_id IS NULL",
        fail=0.05,
        why="They have no ancestors, so tasks that take in descendants miss them.",
        mend="Load the vocabulary release that the extract was mapped with: lachesis load vocabulary DIR.",
    ),
    EventCheck(
        name="concept_not_standard",
        asks="Events with a concept that is not a standard one",
        among="c.concept_id IS NOT NULL AND e.concept_id <> 0",
        minds="c.standard_concept IS DISTINCT FROM 'S'",
        fail=0.05,
        why="Ancestors are those of standard concepts, so tasks by ancestor miss them.",
        mend="Map such concepts by 'Maps to' in the extract; a newer vocabulary may have retired them.",
    ),
    EventCheck(
        name="visit_missing",
        asks="Events without a visit that the store holds",
        among="e.domain NOT IN ('v', 'x', 's')",
        minds="e.visit_occurrence_id IS NULL",
        warn=0.20,
        fail=None,
        why="The arm `visit` and features of the open visit know an event's visit only by its id or day.",
        mend="Deliver visit_occurrence_id, and every visit in VISIT_OCCURRENCE.",
    ),
    EventCheck(
        name="end_before_start",
        asks="Events that end before they start",
        among="e.end_time IS NOT NULL AND e.domain <> 'v'",
        minds="e.end_time::date < e.time::date OR NOT e.date_only AND e.end_time < e.time",
        why="Labels use starts, but swapped columns would shift every one of them.",
        mend="Correct the end; where most rows do this, start and end are swapped.",
    ),
    EventCheck(
        name="unit_missing",
        asks="Measurements with a number and no unit",
        among="e.domain = 'm' AND e.value_as_number IS NOT NULL",
        minds="coalesce(e.unit_concept_id, 0) = 0",
        warn=0.10,
        fail=0.50,
        why="Tasks with values name their unit and pass these rows over.",
        mend="Map units to UCUM concepts in unit_concept_id.",
    ),
)

CT = "c.concept_name ~* '\\m(ct|computed tomograph\\w*|tomograph\\w*, computed)\\M'"
"""A procedure that is a CT by its name."""

_SCANS = "omop.image_occurrence i WHERE {scans:i}"
_VISIT_DAYS = "i.acquired_at::date BETWEEN v.visit_start_date AND coalesce(v.visit_end_date, v.visit_start_date)"

ROW_CHECKS: tuple[RowCheck, ...] = (
    RowCheck(
        name="event_twice",
        table="event",
        asks="Events that repeat person, table, time, concept, value and unit",
        rows="SELECT e.person_id, e.domain, e.time, e.concept_id, count(*) AS copies FROM omop.event e "
        "WHERE {loads:e.load_id} GROUP BY e.person_id, e.domain, e.time, e.concept_id, e.value_as_number, "
        "e.value_as_concept_id, e.unit_concept_id HAVING count(*) > 1",
        total="SELECT count(*) FROM omop.event e WHERE {loads:e.load_id}",
        measure="coalesce(sum(copies - 1), 0)",
        warn=0.05,
        fail=None,
        why="Labels take the first and are the same; counts as features, and label density, are not.",
        mend="Nothing for labels; look whether the extract joined a table twice.",
    ),
    RowCheck(
        name="volume_drop",
        table="event",
        asks="Months with less than a quarter of the events of the twelve months before",
        rows="SELECT f.domain, f.month::date, f.events, round(f.usual) AS usual FROM ("
        "SELECT g.domain, g.month, coalesce(m.events, 0) AS events, g.last, avg(coalesce(m.events, 0)) OVER "
        "(PARTITION BY g.domain ORDER BY g.month ROWS BETWEEN 12 PRECEDING AND 1 PRECEDING) AS usual "
        "FROM (SELECT domain, max(month) AS last, generate_series(min(month), max(month), interval '1 month') "
        "AS month FROM ({monthly}) a GROUP BY domain) g LEFT JOIN ({monthly}) m USING (domain, month)) f "
        "WHERE f.usual >= 100 AND f.events < 0.25 * f.usual AND f.month < f.last",
        total="SELECT count(*) FROM ({monthly}) m",
        why="An outage of a feed looks like health: outcomes are missed, persons look censored.",
        mend="Ask the source for the missing months; else end the data before them with --data-cut.",
    ),
    RowCheck(
        name="table_ends_early",
        table="event",
        asks="Tables that end over 180 days before another one (by the month that 99.9 % of events precede)",
        rows="SELECT t.domain, t.last::date, t.latest::date FROM (SELECT q.domain, min(q.month) AS last, "
        "max(min(q.month)) OVER () AS latest, max(q.total) AS total FROM (SELECT m.*, sum(m.events) OVER "
        "(PARTITION BY m.domain ORDER BY m.month) AS seen, sum(m.events) OVER (PARTITION BY m.domain) AS total "
        "FROM ({monthly}) m WHERE m.domain <> 'x') q WHERE q.seen >= 0.999 * q.total GROUP BY q.domain) t "
        "WHERE t.total >= 100 AND t.last < t.latest - interval '180 days'",
        total="SELECT count(DISTINCT m.domain) FROM ({monthly}) m WHERE m.domain <> 'x'",
        fail=None,
        why="Outcomes of that table stop while follow-up goes on: persons look event-free.",
        mend="Deliver the table whole, or set --data-cut to its last day.",
    ),
    RowCheck(
        name="birth_missing",
        table="person",
        asks="Persons without a birth",
        rows="SELECT p.person_id FROM omop.person p WHERE {loads:p.load_id} AND p.birth_time IS NULL",
        total="SELECT count(*) FROM omop.person p WHERE {loads:p.load_id}",
        why="They have no age: --min-age leaves them out, and age is what every model must beat.",
        mend="Deliver year_of_birth.",
    ),
    RowCheck(
        name="birth_implausible",
        table="person",
        asks="Persons born before 1850, or after the data cut or today",
        rows="SELECT p.person_id, p.birth_time FROM omop.person p JOIN ops.load l USING (load_id) "
        "JOIN ops.source s USING (source_id) WHERE {loads:p.load_id} AND (p.birth_time < '1850-01-01' "
        "OR p.birth_time >= coalesce(s.data_cut + 1, now()::date + 1))",
        total="SELECT count(*) FROM omop.person p WHERE {loads:p.load_id} AND p.birth_time IS NOT NULL",
        why="Age is wrong by decades, and with it every model that uses it.",
        mend="Correct the year of birth; where all dates are shifted, say --data-cut when loading.",
    ),
    RowCheck(
        name="gender_missing",
        table="person",
        asks="Persons of unknown gender",
        rows="SELECT p.person_id FROM omop.person p WHERE {loads:p.load_id} AND p.gender_concept_id IN (0, 8551)",
        total="SELECT count(*) FROM omop.person p WHERE {loads:p.load_id}",
        warn=0.01,
        fail=0.10,
        why="The baseline age+sex and subgroups by sex lack them.",
        mend="Map gender to 8507 or 8532.",
    ),
    RowCheck(
        name="person_without_events",
        table="person",
        asks="Persons without any event",
        rows="SELECT p.person_id FROM omop.person p LEFT JOIN omop.timeline t USING (person_id) "
        "WHERE {loads:p.load_id} AND coalesce(t.num_events, 0) = 0",
        total="SELECT count(*) FROM omop.person p WHERE {loads:p.load_id}",
        warn=0.05,
        fail=0.50,
        why="They are followed without anything that could happen: outcomes look rarer than they are.",
        mend="Check that PERSON and the event tables are of the same persons.",
    ),
    RowCheck(
        name="person_without_period",
        table="person",
        asks="Persons without an observation period",
        rows="SELECT p.person_id FROM omop.person p WHERE {loads:p.load_id} "
        "AND NOT EXISTS (SELECT FROM omop.observation_period o WHERE o.person_id = p.person_id)",
        total="SELECT count(*) FROM omop.person p WHERE {loads:p.load_id}",
        fail=0.10,
        why="With follow-up by observation period all their scans are ineligible.",
        mend="Deliver OBSERVATION_PERIOD, or make cohorts with --follow-up last_event or data_cut.",
    ),
    RowCheck(
        name="period_overlap",
        table="observation_period",
        asks="Observation periods that overlap an earlier one of the person",
        rows="SELECT q.observation_period_id, q.person_id, q.start_date, q.end_date FROM (SELECT o.*, max(o.end_date) "
        "OVER (PARTITION BY o.person_id ORDER BY o.start_date, o.observation_period_id "
        "ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS seen "
        "FROM omop.observation_period o WHERE {loads:o.load_id}) q WHERE q.start_date <= q.seen",
        total="SELECT count(*) FROM omop.observation_period o WHERE {loads:o.load_id}",
        fail=0.10,
        why="They are merged, so follow-up is right; but their making may be wrong elsewhere, too.",
        mend="Derive observation periods anew, one a span.",
    ),
    RowCheck(
        name="period_ends_before_start",
        table="observation_period",
        asks="Observation periods that end before they start",
        rows="SELECT o.observation_period_id, o.person_id, o.start_date, o.end_date FROM omop.observation_period o "
        "WHERE {loads:o.load_id} AND o.end_date < o.start_date",
        total="SELECT count(*) FROM omop.observation_period o WHERE {loads:o.load_id}",
        why="No scan lies in such a period, so its person is ineligible.",
        mend="Correct the period in the extract.",
    ),
    RowCheck(
        name="period_ends_after_cut",
        table="observation_period",
        asks="Observation periods that end after the data cut, or after today where no data cut is known",
        rows="SELECT o.observation_period_id, o.person_id, o.end_date FROM omop.observation_period o "
        "JOIN ops.load l USING (load_id) JOIN ops.source s USING (source_id) WHERE {loads:o.load_id} "
        "AND o.end_date > coalesce(s.data_cut, now()::date)",
        total="SELECT count(*) FROM omop.observation_period o WHERE {loads:o.load_id}",
        fail=0.05,
        why="Persons look observed and event-free in days that nobody has seen yet.",
        mend="End periods with the data; where all dates are shifted, say --data-cut when loading.",
    ),
    RowCheck(
        name="death_twice",
        table="death",
        asks="Persons with deaths on several days",
        rows="SELECT e.person_id, min(e.time) AS first, max(e.time) AS last FROM omop.event e "
        "WHERE {loads:e.load_id} AND e.concept_id = 4306655 GROUP BY e.person_id "
        "HAVING min(e.time)::date < max(e.time)::date",
        total="SELECT count(DISTINCT e.person_id) FROM omop.event e WHERE {loads:e.load_id} AND e.concept_id = 4306655",
        why="The earliest ends follow-up; where it is wrong, outcomes after it are lost.",
        mend="Keep one death a person in the extract.",
    ),
    RowCheck(
        name="visit_ends_before_start",
        table="visit_occurrence",
        asks="Visits that end before they start",
        rows="SELECT v.visit_occurrence_id, v.person_id, v.visit_start_datetime, v.visit_end_datetime "
        "FROM omop.visit_occurrence v WHERE {loads:v.load_id} AND (v.visit_end_date < v.visit_start_date "
        "OR NOT v.date_only AND v.visit_end_datetime < v.visit_start_datetime)",
        total="SELECT count(*) FROM omop.visit_occurrence v WHERE {loads:v.load_id} "
        "AND v.visit_end_datetime IS NOT NULL",
        why="Readmission counts from discharge: the clock would start before admission.",
        mend="Correct the end of the visit.",
    ),
    RowCheck(
        name="visit_without_end",
        table="visit_occurrence",
        asks="Inpatient visits without an end",
        rows="SELECT v.visit_occurrence_id, v.person_id, v.visit_start_datetime FROM omop.visit_occurrence v "
        "WHERE {loads:v.load_id} AND v.visit_concept_id IN (9201, 262) AND v.visit_end_datetime IS NULL",
        total="SELECT count(*) FROM omop.visit_occurrence v WHERE {loads:v.load_id} "
        "AND v.visit_concept_id IN (9201, 262)",
        warn=0.01,
        fail=0.10,
        why="Readmission then counts from the scan, so the stay itself may look like one.",
        mend="Deliver visit_end_date; only stays that are open at the data cut may lack it.",
    ),
    RowCheck(
        name="scan_outside_period",
        table="image_occurrence",
        asks="Scans in none of the person's observation periods",
        rows=f"SELECT i.image_occurrence_id, i.person_id, i.acquired_at FROM {_SCANS} AND NOT EXISTS (SELECT FROM "
        "omop.observation_period o WHERE o.person_id = i.person_id "
        "AND i.acquired_at::date BETWEEN o.start_date AND o.end_date)",
        total=f"SELECT count(*) FROM {_SCANS}",
        warn=0.01,
        fail=0.10,
        why="With follow-up by observation period such scans are ineligible.",
        mend="Check whether scans and record carry the same date shift; else derive periods anew.",
    ),
    RowCheck(
        name="scan_before_birth",
        table="image_occurrence",
        asks="Scans before the person's birth",
        rows=f"SELECT i.image_occurrence_id, i.person_id, i.acquired_at FROM {_SCANS} AND EXISTS (SELECT FROM "
        "omop.person p WHERE p.person_id = i.person_id AND i.acquired_at < p.birth_time)",
        total=f"SELECT count(*) FROM {_SCANS}",
        fail=0.0,
        why="The scan is another person's, or its dates are shifted: every label of it is wrong.",
        mend="Check how scans were matched to persons, and whether both carry the same date shift.",
    ),
    RowCheck(
        name="scan_after_death",
        table="image_occurrence",
        asks="Scans on a day after the person's death",
        rows=f"SELECT i.image_occurrence_id, i.person_id, i.acquired_at FROM {_SCANS} AND EXISTS (SELECT FROM "
        "omop.event e WHERE e.person_id = i.person_id AND e.domain = 'x' AND i.acquired_at::date > e.time::date)",
        total=f"SELECT count(*) FROM {_SCANS}",
        fail=0.0,
        why="The scan is another person's, or dates are shifted: it has no follow-up.",
        mend="Check how scans were matched to persons, and whether both carry the same date shift.",
    ),
    RowCheck(
        name="scan_without_ct_procedure",
        table="image_occurrence",
        asks="Scans without a CT procedure in the record within a day",
        rows=f"SELECT i.image_occurrence_id, i.person_id, i.acquired_at FROM {_SCANS} AND NOT EXISTS (SELECT FROM "
        "omop.event e JOIN omop.concept c USING (concept_id) WHERE e.person_id = i.person_id "
        "AND e.time BETWEEN i.acquired_at - interval '1 day' AND i.acquired_at::date + interval '2 days' "
        f"AND {CT})",
        total=f"SELECT count(*) FROM {_SCANS} AND EXISTS (SELECT FROM omop.event e "
        f"JOIN omop.concept c USING (concept_id) WHERE {CT})",
        warn=0.05,
        fail=0.50,
        why="Scans and record may carry different date shifts; then outcomes are counted from the wrong day.",
        mend="Compare one person's scans with their procedures; load scans with the record's date shift.",
    ),
    RowCheck(
        name="scan_without_visit",
        table="image_occurrence",
        asks="Scans on a day without a visit",
        rows=f"SELECT i.image_occurrence_id, i.person_id, i.acquired_at FROM {_SCANS} AND NOT EXISTS (SELECT FROM "
        f"omop.visit_occurrence v WHERE v.person_id = i.person_id AND {_VISIT_DAYS})",
        total=f"SELECT count(*) FROM {_SCANS} AND EXISTS (SELECT FROM omop.visit_occurrence)",
        warn=0.10,
        fail=None,
        why="Labels of the visit fall back to the day; readmission counts from the scan.",
        mend="Deliver outpatient and emergency visits, too; else check the date shift.",
    ),
    RowCheck(
        name="scan_time_weak",
        table="image_occurrence",
        asks="Scans whose time is not that of acquisition, series or manifest",
        rows=f"SELECT i.image_occurrence_id, i.person_id, i.acquired_at_source FROM {_SCANS} "
        "AND i.acquired_at_source <> 'manifest' AND i.acquired_at_source NOT LIKE 'Acquisition%' "
        "AND i.acquired_at_source NOT LIKE 'Series%'",
        total=f"SELECT count(*) FROM {_SCANS}",
        fail=None,
        why="An order lies before the scan, a report after it: what happened between changes sides of the index.",
        mend="Give acquired_at in a manifest, from the archive's headers.",
    ),
    RowCheck(
        name="scan_date_only",
        table="image_occurrence",
        asks="Scans of which only the day is known",
        rows=f"SELECT i.image_occurrence_id, i.person_id, i.acquired_at FROM {_SCANS} AND i.date_only",
        total=f"SELECT count(*) FROM {_SCANS}",
        warn=0.10,
        fail=None,
        why="Events of that day are neither features nor outcomes.",
        mend="Give the time of day in a manifest, from the archive's headers.",
    ),
    RowCheck(
        name="scan_of_several_persons",
        table="image_occurrence",
        asks="Scans whose file or series another person has, too, or whose slices name several persons",
        rows="SELECT i.image_occurrence_id, i.person_id, coalesce(h.num_persons, 1) AS num_persons FROM "
        "omop.image_occurrence i LEFT JOIN omop.shared_scan h USING (image_occurrence_id) WHERE {scans:i} "
        "AND (h.num_persons > 1 OR 'mixed_persons' = ANY (i.reasons))",
        total=f"SELECT count(*) FROM {_SCANS}",
        fail=0.0,
        why="One of them has another person's image; nothing learnt or judged from it holds.",
        mend="Check the matching; where pairs are arbitrary by intent, load with --arbitrary-pairing.",
    ),
    RowCheck(
        name="scan_unusable",
        table="image_occurrence",
        asks="Scans with the verdict unusable",
        rows=f"SELECT i.image_occurrence_id, i.person_id, i.reasons FROM {_SCANS} AND i.verdict = 'unusable'",
        total=f"SELECT count(*) FROM {_SCANS}",
        warn=0.05,
        fail=0.50,
        why="Cohorts leave them out; where that depends on scanner or ward, the cohort is selected.",
        mend="`lachesis show load` of the scans says how to mend each reason.",
    ),
)

MONTHLY = (
    "SELECT e.domain, date_trunc('month', e.time) AS month, count(*) AS events FROM omop.event e "
    "WHERE {loads:e.load_id} GROUP BY 1, 2"
)
"""Events by table and month."""
