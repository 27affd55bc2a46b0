"""Labels in one plain statement over the rows of an extract: slow, and written from docs/science.md alone.

It reads omop.event, observation_period, visit_occurrence, image_occurrence and the vocabulary, and tasks as their files
give them; nothing that the engine made. Times stay timestamps until the end.
"""

from __future__ import annotations

LABELS = """
WITH RECURSIVE task AS MATERIALIZED (
    SELECT (n - 1)::int AS position, f AS field, f ->> 'name' AS name,
           (f ->> 'start_seconds')::int8 * interval '1 second' AS delay, f ->> 'prior' = 'exclude' AS excludes,
           (f ->> 'prior_days')::int * interval '1 day' AS look_back, f ->> 'same_day' = 'exclude' AS no_same_day,
           f ->> 'clock' = 'discharge' AS after_discharge,
           nullif((f ->> 'washout_days')::int, 0) * interval '1 day' AS washout,
           (f ->> 'min_follow_up_days')::int * interval '1 day' AS min_follow_up,
           f ->> 'follow_up' = 'data_cut' AS to_cut, f ->> 'death' = 'competing' AS competes
    FROM jsonb_array_elements(CAST(:tasks AS jsonb)) WITH ORDINALITY t(f, n)
),

-- What a task means: concepts, source concepts, kinds of visits, units.
code AS (
    SELECT vocabulary_id || '/' || concept_code AS code, concept_id FROM omop.concept
    UNION SELECT vocabulary_id || '/' || concept_code, concept_id_2 FROM omop.concept k
          JOIN omop.concept_relationship r ON r.concept_id_1 = k.concept_id AND r.relationship_id = 'Maps to'
          WHERE standard_concept IS DISTINCT FROM 'S'
),
item AS (
    SELECT position, (i ->> 'concept_id')::int AS concept, (i ->> 'excluded')::bool AS away,
           (i ->> 'descendants')::bool AS narrower, (i ->> 'mapped')::bool AS mapped
    FROM task, jsonb_array_elements(field -> 'concept_set') i
),
of_item AS (
    SELECT position, concept, away, mapped FROM item
    UNION SELECT position, descendant_concept_id, away, mapped FROM item
          JOIN omop.concept_ancestor ON ancestor_concept_id = concept
          JOIN omop.concept k ON k.concept_id = descendant_concept_id WHERE narrower AND k.invalid_reason IS NULL
),
named AS (
    SELECT position, c::int AS concept, false AS away FROM task, jsonb_array_elements_text(field -> 'concepts') c
    UNION ALL SELECT position, concept_id, false FROM task, jsonb_array_elements_text(field -> 'vocabulary_codes') c
              JOIN code ON code.code = c
    UNION ALL SELECT position, c::int, true FROM task, jsonb_array_elements_text(field -> 'exclude_concepts') c
    UNION ALL SELECT position, concept_id, true
              FROM task, jsonb_array_elements_text(field -> 'exclude_vocabulary_codes') c JOIN code ON code.code = c
),
meant AS (
    SELECT position, concept, away FROM named
    UNION SELECT position, descendant_concept_id, away FROM named JOIN task USING (position)
          JOIN omop.concept_ancestor ON ancestor_concept_id = concept WHERE (field ->> 'descendants')::bool
    UNION SELECT position, concept, away FROM of_item
    UNION SELECT position, concept_id_1, away FROM of_item JOIN omop.concept_relationship r ON concept_id_2 = concept
          WHERE mapped AND relationship_id = 'Maps to' AND r.invalid_reason IS NULL
),
coded AS (
    SELECT position FROM named UNION SELECT position FROM item
),
wanted AS MATERIALIZED (
    SELECT position, concept FROM meant WHERE NOT away
    EXCEPT SELECT position, concept FROM meant WHERE away
),
source AS MATERIALIZED (
    SELECT position, concept_id AS concept FROM task, jsonb_array_elements_text(field -> 'source_codes') c
    JOIN omop.concept ON vocabulary_id || '/' || concept_code = c
),
kind AS MATERIALIZED (
    SELECT position, c::int AS concept FROM task, jsonb_array_elements_text(field -> 'visit_concepts') c
    UNION SELECT position, descendant_concept_id FROM task, jsonb_array_elements_text(field -> 'visit_concepts') c
          JOIN omop.concept_ancestor ON ancestor_concept_id = c::int WHERE (field ->> 'descendants')::bool
),

-- Scans with their follow-up. A period is reached from another that it overlaps or touches.
scan AS MATERIALIZED (
    SELECT image_occurrence_id AS scan, person_id AS person, acquired_at AS at, date_only AS day_alone,
           date_trunc('day', acquired_at) AS midnight, date_trunc('day', acquired_at) + interval '1 day' AS next_day
    FROM omop.image_occurrence
),
reached (scan, person, first, last) AS (
    SELECT scan, person, start_date, end_date FROM scan JOIN omop.observation_period ON person_id = person
    WHERE at::date >= start_date AND at::date <= end_date
    UNION
    SELECT scan, person, o.start_date, o.end_date FROM reached JOIN omop.observation_period o ON o.person_id = person
    WHERE o.start_date <= last + 1 AND o.end_date + 1 >= first
),
happened AS MATERIALIZED (
    SELECT person_id AS person, date_trunc('second', time) AS time, date_only AS day_alone, concept_id AS concept,
           source_concept_id AS source, value_as_number AS value, value_as_concept_id AS coded,
           coalesce(unit_concept_id, 0) AS unit, visit_occurrence_id AS visit, domain
    FROM omop.event
),
death AS (
    SELECT person, min(time) AS died, bool_and(day_alone) AS day_alone FROM happened WHERE domain = 'x' GROUP BY 1
),
follow AS (
    SELECT s.*, died, d.day_alone AS died_some_time, cut,
           CASE CAST(:follow_up AS text)
               WHEN 'observation_period' THEN (SELECT max(last) FROM reached r WHERE r.scan = s.scan)
                                              + interval '1 day' - interval '1 second'
               WHEN 'last_event' THEN (SELECT max(time) FROM happened h WHERE h.person = s.person)
               WHEN 'data_cut' THEN cut END AS rule_end,
           CASE CAST(:follow_up AS text)
               WHEN 'observation_period' THEN (SELECT min(first)::timestamp FROM reached r WHERE r.scan = s.scan)
               ELSE (SELECT min(time) FROM happened h WHERE h.person = s.person) END AS seen_from
    FROM scan s LEFT JOIN death d USING (person)
    CROSS JOIN (SELECT CAST(:cut AS date) + interval '1 day' - interval '1 second' AS cut) c
),
member AS MATERIALIZED (
    SELECT *, CASE WHEN rule_end IS NOT NULL THEN least(rule_end, died, cut) END AS ends,
           CASE WHEN cut IS NOT NULL THEN least(cut, died) END AS cut_ends,
           rule_end IS NOT NULL AND least(rule_end, died, cut) >= next_day AS eligible
    FROM follow
),

-- Visits; a span holds the index by days where no more is known. Stays: visits at most 24 hours apart.
visit AS MATERIALIZED (
    SELECT visit_occurrence_id AS visit, person_id AS person, visit_concept_id AS concept, date_only AS start_day,
           visit_start_datetime AS start, visit_end_datetime AS given_end,
           coalesce(visit_end_datetime, visit_start_datetime) AS stop,
           CASE WHEN visit_end_datetime IS NULL THEN date_only ELSE end_date_only END AS stop_day
    FROM omop.visit_occurrence
),
holding AS MATERIALIZED (
    SELECT DISTINCT ON (scan) scan, v.* FROM member m JOIN visit v USING (person)
    WHERE (start <= at OR (start_day OR day_alone) AND start < next_day)
      AND (stop >= at OR (stop_day OR day_alone) AND stop >= midnight)
    ORDER BY scan, start DESC, given_end, visit
),
admission AS MATERIALIZED (
    SELECT position, v.*, row_number() OVER (PARTITION BY position, person
                                             ORDER BY start, stop, start_day, visit) AS nth
    FROM task JOIN kind USING (position) JOIN visit v USING (concept) WHERE after_discharge
),
opening AS (
    SELECT position, person, nth, start, start_day FROM admission a
    WHERE NOT EXISTS (SELECT FROM admission b WHERE b.position = a.position AND b.person = a.person AND b.nth < a.nth
                      AND a.start - b.stop <= interval '24 hours')
),
stay AS MATERIALIZED (
    SELECT o.position, o.person, o.start, o.start_day, l.stop, l.stop_day FROM opening o
    CROSS JOIN LATERAL (
        SELECT stop, stop_day FROM admission a
        WHERE a.position = o.position AND a.person = o.person AND a.nth >= o.nth
          AND NOT EXISTS (SELECT FROM opening p WHERE p.position = o.position AND p.person = o.person
                          AND p.nth > o.nth AND p.nth <= a.nth)
        ORDER BY stop DESC, stop_day DESC LIMIT 1
    ) l
),
discharge AS (
    SELECT t.position, m.scan, coalesce((
               SELECT max(s.stop) FROM stay s WHERE s.position = t.position AND s.person = m.person
               AND ((s.start <= at OR (s.start_day OR m.day_alone) AND s.start < next_day)
                    AND (s.stop >= at OR (s.stop_day OR m.day_alone) AND s.stop >= midnight)
                    OR s.start >= at AND s.start - h.stop <= interval '24 hours')), h.stop) AS left_at
    FROM task t CROSS JOIN member m LEFT JOIN holding h USING (scan) WHERE after_discharge
),

-- Rows that are outcomes of a task, whenever they happened.
outcome AS MATERIALIZED (
    SELECT position, person, time, day_alone FROM task t CROSS JOIN happened e
    WHERE (EXISTS (SELECT FROM coded n WHERE n.position = t.position)
           OR EXISTS (SELECT FROM source s WHERE s.position = t.position))
      AND (EXISTS (SELECT FROM wanted w WHERE w.position = t.position AND w.concept = e.concept)
           OR EXISTS (SELECT FROM source s WHERE s.position = t.position AND s.concept = e.source))
      AND (field -> 'domains' = '[]' OR EXISTS (
               SELECT FROM jsonb_array_elements_text(field -> 'domains') d WHERE CASE d
                   WHEN 'device' THEN 'e' WHEN 'visit_detail' THEN 'w' WHEN 'death' THEN 'x' ELSE left(d, 1)
               END = e.domain))
      AND (field -> 'visit_concepts' = '[]' OR EXISTS (
               SELECT FROM visit v JOIN kind k USING (concept) WHERE v.visit = e.visit AND k.position = t.position))
      AND (field -> 'values' = '[]' OR EXISTS (
               SELECT FROM jsonb_array_elements(field -> 'values') r
               WHERE (r -> 'value_concepts' = '[]' OR r -> 'value_concepts' @> to_jsonb(e.coded))
                 AND (r ->> 'unit' IS NULL OR e.value IS NOT NULL
                      AND (r ->> 'unit' = 'any' OR r ->> 'unit' = e.unit::text)
                      AND coalesce(e.value > (r ->> 'above')::real, true)
                      AND coalesce(e.value >= (r ->> 'at_least')::real, true)
                      AND coalesce(e.value < (r ->> 'below')::real, true)
                      AND coalesce(e.value <= (r ->> 'at_most')::real, true))))
    UNION ALL
    SELECT t.position, v.person, v.start, v.start_day
    FROM task t JOIN kind k USING (position) JOIN visit v USING (concept)
    WHERE NOT after_discharge AND NOT EXISTS (SELECT FROM coded n WHERE n.position = t.position)
      AND NOT EXISTS (SELECT FROM source s WHERE s.position = t.position)
    UNION ALL
    SELECT position, person, start, start_day FROM stay s
    WHERE NOT EXISTS (SELECT FROM coded n WHERE n.position = s.position)
      AND NOT EXISTS (SELECT FROM source c WHERE c.position = s.position)
),

-- Each scan under each task.
cell AS (
    SELECT t.*, m.*, d.left_at, greatest(coalesce(d.left_at, at) + delay, at) AS opens,
           CASE WHEN to_cut THEN coalesce(cut_ends, ends) ELSE ends END AS until
    FROM task t CROSS JOIN member m LEFT JOIN discharge d USING (position, scan)
),
seen AS (
    SELECT c.*,
           EXISTS (SELECT FROM outcome o WHERE o.position = c.position AND o.person = c.person
                   AND (o.time <= opens OR no_same_day AND o.day_alone AND o.time >= midnight AND o.time < next_day)
                   AND (look_back IS NULL OR o.time >= at - look_back)) AS has_prior,
           (SELECT min(o.time) FROM outcome o WHERE o.position = c.position AND o.person = c.person
            AND o.time > opens AND o.time <= until
            AND NOT (no_same_day AND o.day_alone AND o.time >= midnight AND o.time < next_day)) AS first,
           EXISTS (SELECT FROM outcome o WHERE o.position = c.position AND o.person = c.person AND CASE
                   WHEN h.visit IS NULL THEN o.time >= midnight AND o.time < next_day
                   ELSE o.time >= CASE WHEN h.start_day THEN date_trunc('day', h.start) ELSE h.start END
                        AND (o.time <= h.stop OR o.day_alone AND o.time::date = h.stop::date) END) AS in_visit,
           coalesce(at - seen_from < washout, washout IS NOT NULL)
               OR coalesce(until - at < min_follow_up AND until IS DISTINCT FROM died, false)
               OR coalesce(died <= left_at OR died_some_time AND died::date = left_at::date, false) AS barred
    FROM cell c LEFT JOIN holding h USING (scan)
),
judged AS (
    SELECT *, CASE
        WHEN NOT eligible OR until <= opens OR barred THEN 'ineligible'
        WHEN excludes AND has_prior THEN 'prior'
        WHEN first IS NOT NULL THEN 'event'
        WHEN competes AND died <= until THEN 'competing'
        ELSE 'censored' END AS status
    FROM seen
)
SELECT scan, person AS person_id, name AS task, eligible, ends, cut_ends, status, has_prior, in_visit,
       extract(epoch FROM opens - at)::int8 AS opens,
       extract(epoch FROM CASE status WHEN 'event' THEN first WHEN 'competing' THEN died WHEN 'censored' THEN until END
                          - at)::int8 AS seconds
FROM judged
"""
"""Parameters: tasks (JSON list of `TaskSpec.to_dict`), follow_up, cut (a date or null). One row a scan and task."""
