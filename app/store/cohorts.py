"""Cohorts: which scans, their index time, the end of their follow-up, their split (docs/science.md, section 1)."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.errors import InputError
from app.store import names, splits
from app.store.cohort_lists import Listed, scans_of_file, scans_of_omop_cohort
from app.store.follow_up import summarise
from app.store.shifting import refuse_day
from app.store.work import Work

if TYPE_CHECKING:
    from sqlalchemy import Connection

PREFERENCE = """
    coalesce(i.orientation = 'axial' OR i.orientation ~ '^[RLAP]{2}[SI]$', false) DESC,
    coalesce(coalesce(i.slice_thickness_mm, i.spacing_mm[3]) BETWEEN 1 AND 3, false) DESC,
    i.slices DESC NULLS LAST,
    coalesce(i.kernel ~* '^(standard|stnd|soft|smooth|[abc]|[bhijq][a-z]?[1-4][0-9].*|fc0[0-9]|fc1[0-9])$', false) DESC,
    i.image_key, i.image_occurrence_id
"""
"""Which series of a study is its member: axial, 1 to 3 mm, most slices, soft kernel, then UID."""

SCANS = f"""
WITH scan AS MATERIALIZED (
    SELECT i.image_occurrence_id, i.person_id, i.acquired_at, i.date_only, i.image_key, p.split AS own_split,
           p.person_id IS NOT NULL AS known,
           i.verdict = CAST(:verdict AS text)
               OR (CAST(:verdict AS text) IS NULL AND i.verdict <> 'unusable') AS usable,
           CAST(:listed AS bigint[]) IS NULL OR i.image_occurrence_id = ANY (CAST(:listed AS bigint[])) AS listed,
           CAST(:ids AS bigint[]) IS NULL OR i.image_occurrence_id = ANY (CAST(:ids AS bigint[])) AS wanted,
           CAST(:min_age AS float8) IS NULL
               OR coalesce(i.acquired_at >= p.birth_time + :min_age * interval '1 year', false) AS old_enough,
           CASE WHEN CAST(:per AS text) = 'series' THEN i.image_occurrence_id::text
                ELSE coalesce('uid ' || i.study_uid, 'at ' || i.acquired_at) END AS study,
           row_number() OVER (ORDER BY {PREFERENCE}) AS preference,
           coalesce(CAST(:data_cut AS date), s.data_cut) AS data_cut
    FROM omop.image_occurrence i
    LEFT JOIN omop.person p USING (person_id)
    LEFT JOIN ops.load l ON l.load_id = p.load_id
    LEFT JOIN ops.source s USING (source_id)
), member AS (
    SELECT DISTINCT ON (person_id, study) * FROM scan
    WHERE known AND usable AND listed AND wanted AND old_enough
    ORDER BY person_id, study, preference
)
"""

PERIODS = """
    SELECT person_id, min(start_date)::timestamp AS period_start,
           max(end_date) + interval '1 day' - interval '1 second' AS period_end
    FROM (
        SELECT person_id, start_date, end_date,
               count(*) FILTER (WHERE before IS NULL OR start_date > before + 1) OVER run AS stretch
        FROM (
            SELECT person_id, start_date, end_date, max(end_date) OVER (
                       PARTITION BY person_id ORDER BY start_date, end_date
                       ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS before
            FROM omop.observation_period WHERE person_id IN (SELECT person_id FROM member)
        ) o WINDOW run AS (PARTITION BY person_id ORDER BY start_date, end_date)
    ) s GROUP BY person_id, stretch
"""
"""Observation periods of the persons in `member`, those at most one day apart merged."""

MEMBERS = f"""
{SCANS}, period AS ({PERIODS}), last AS (
    SELECT person_id, (SELECT max(e.time) FROM omop.event e WHERE e.person_id = m.person_id) AS last_time
    FROM (SELECT DISTINCT person_id FROM member) m
), ends AS (
    SELECT m.*, o.period_end, last.last_time, c.cut_end, d.death_datetime AS death_time,
           least(d.death_datetime, c.cut_end) AS earliest,
           CASE WHEN c.cut_end IS NOT NULL THEN least(d.death_datetime, c.cut_end) END AS data_cut_end,
           CASE CAST(:follow_up AS text) WHEN 'observation_period' THEN o.period_end
                                         WHEN 'last_event' THEN last.last_time
                                         WHEN 'data_cut' THEN c.cut_end END AS rule_end
    FROM member m
    CROSS JOIN LATERAL (SELECT m.data_cut + interval '1 day' - interval '1 second' AS cut_end) c
    LEFT JOIN omop.death d USING (person_id)
    LEFT JOIN last USING (person_id)
    LEFT JOIN period o ON o.person_id = m.person_id AND m.acquired_at BETWEEN o.period_start AND o.period_end
)
SELECT person_id, image_occurrence_id, acquired_at AS index_time, date_only AS index_date_only,
       CASE WHEN rule_end IS NOT NULL THEN least(rule_end, earliest) END AS follow_up_end, data_cut_end, death_time,
       data_cut, image_key, own_split, earliest, period_end, last_time, cut_end
FROM ends ORDER BY person_id, acquired_at, image_key, image_occurrence_id
"""

ATTRITION = f"""
{SCANS}
SELECT step, scans, persons FROM (
    SELECT 1 AS n, 'scans loaded' AS step, count(*) AS scans, count(DISTINCT person_id) AS persons FROM scan
    UNION ALL SELECT 2, 'of a known person', count(*), count(DISTINCT person_id) FROM scan WHERE known
    UNION ALL SELECT 3, 'of a wanted verdict', count(*), count(DISTINCT person_id) FROM scan WHERE known AND usable
    UNION ALL SELECT 4, 'in the list', count(*), count(DISTINCT person_id) FROM scan WHERE known AND usable AND listed
    UNION ALL SELECT 5, 'that meet --where', count(*), count(DISTINCT person_id) FROM scan
              WHERE known AND usable AND listed AND wanted
    UNION ALL SELECT 6, 'old enough', count(*), count(DISTINCT person_id) FROM scan
              WHERE known AND usable AND listed AND wanted AND old_enough
    UNION ALL SELECT 7, 'one a ' || CAST(:per AS text), count(*), count(DISTINCT person_id) FROM member
) steps ORDER BY n
"""

COLUMNS = (
    "cohort_id, person_id, image_occurrence_id, index_time, index_date_only, follow_up_end, data_cut_end, death_time, "
    "split, eligible, reason"
)

NO_END = {
    "observation_period": "index outside every observation period",
    "last_event": "no event recorded",
    "data_cut": "no data cut known",
}


def build(work: Work) -> dict[str, Any]:
    """Stage `cohort`: choose scans and store them as a version of `args["name"]`; the same again changes nothing.

    Raises:
        InputError: `where` is no condition, a list cannot be used, or `follow_up` is data_cut and none is known.
    """
    args = work.args
    name = names.check_name("cohort", args.get("name"))
    rule = {
        "follow_up": args.get("follow_up") or "observation_period",
        "data_cut": args.get("data_cut"),
        "per": args.get("per") or "study",
        "where": args.get("where"),
        "min_age": args.get("min_age"),
        "verdict": args.get("verdict"),
        "split_time": args.get("split_time"),
        "salt": args.get("salt") or "",
    }
    with work.connect() as connection:
        connection = connection.execution_options(isolation_level="REPEATABLE READ")
        if rule["data_cut"]:
            refuse_day(connection, "--data-cut")
        listed = read_list(connection, args)
        members, attrition, sharing = choose(connection, rule, listed)
        connection.rollback()
    work.check()
    if listed is not None:
        rule["from"] = listed.definition
        say_unmatched(work, listed)
        for member in members:
            member["own_split"] = listed.splits.get(member["person_id"], member["own_split"])
    rule["split"] = sharing.definition()
    give_splits(members, sharing, rule)
    say_cut(work, rule, members)
    for member in members:
        member["eligible"] = member["reason"] is None
    eligible = [m for m in members if m["eligible"]]
    attrition.append(step("eligible", eligible))
    if not eligible:
        work.log("The cohort has no eligible member; `lachesis show cohort` tells at which step scans were left out.")
    follow_up = summarise(members)
    with work.transaction() as connection:
        result = store(connection, name, rule, members, attrition, follow_up, work.job_id)
    if listed is not None:
        result |= {"rows_listed": listed.rows, "rows_unmatched": len(listed.unmatched)}
    return result | {
        "attrition": attrition,
        "follow_up": follow_up,
        "members": len(members),
        "persons": len({m["person_id"] for m in members}),
        "eligible": len(eligible),
        "splits": {s: sum(m["split"] == s for m in members) for s in ("train", "tuning", "held_out")},
    }


def read_list(connection: Connection, args: Mapping[str, Any]) -> Listed | None:
    """The scans that `from` or `from_omop_cohort` names; None where neither is given. Raises InputError."""
    file, omop_cohort = args.get("from"), args.get("from_omop_cohort")
    if file and omop_cohort:
        raise InputError("Expected either --from or --from-omop-cohort, got both; give one of the two.")
    if file:
        listed = scans_of_file(connection, Path(file))
    elif omop_cohort:
        listed = scans_of_omop_cohort(connection, str(omop_cohort))
    else:
        return None
    if listed.splits and args.get("split_time"):
        raise InputError("Expected either --split-time or a split in the list, got both; drop one of the two.")
    return listed


def say_unmatched(work: Work, listed: Listed) -> None:
    """Name the first lines that name no scan; never what stands in them."""
    if listed.unmatched:
        shown = ", ".join(map(str, listed.unmatched[:10])) + (", …" if len(listed.unmatched) > 10 else "")
        work.log(f"{len(listed.unmatched):,} of {listed.rows:,} rows of the list name no scan of the store: {shown}.")


def say_cut(work: Work, rule: Mapping[str, Any], members: list[dict[str, Any]]) -> None:
    """Name the data cuts that came with the extracts: they end follow-up although nobody asked for them here."""
    cuts = sorted({m["data_cut"] for m in members if m["data_cut"] is not None})
    if cuts and not rule["data_cut"]:
        days = str(cuts[0]) if len(cuts) == 1 else f"{cuts[0]} to {cuts[-1]}"
        work.log(f"No follow-up goes beyond the data cut that came with the extract, {days}; --data-cut gives another.")


def step(name: str, members: list[dict[str, Any]]) -> dict[str, Any]:
    """One step of attrition."""
    return {"step": name, "scans": len(members), "persons": len({m["person_id"] for m in members})}


def choose(
    connection: Connection, rule: dict[str, Any], listed: Listed | None = None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], splits.Sharing]:
    """Members without their splits, attrition, and who shares scans; reads only."""
    from sqlalchemy import text

    connection.execute(text("SET TRANSACTION READ ONLY"))
    values = {key: rule[key] for key in ("verdict", "min_age", "per", "data_cut")}
    values["ids"] = scans_where(connection, rule["where"]) if rule["where"] else None
    values["listed"] = None if listed is None else listed.scans
    attrition = [dict(row) for row in connection.execute(text(ATTRITION), values).mappings()]
    kept = {"in the list": listed, "that meet --where": rule["where"], "old enough": rule["min_age"]}
    attrition = [row for row in attrition if kept.get(row["step"], True) is not None]
    rows = connection.execute(text(MEMBERS), values | {"follow_up": rule["follow_up"]}).mappings()
    members = [dict(row) for row in rows]
    if rule["follow_up"] == "data_cut" and members and all(m["data_cut"] is None for m in members):
        raise InputError("Expected a data cut for --follow-up data_cut, found none with the extract; give --data-cut.")
    for member in members:
        member["reason"] = reason(member["index_time"], member["follow_up_end"], rule["follow_up"])
    return members, attrition, splits.find_sharing(connection)


def reason(index: dt.datetime, end: dt.datetime | None, follow_up: str) -> str | None:
    """Why no task may use a member; None where tasks may."""
    if end is None:
        return NO_END[follow_up]
    if end < index:
        return "follow-up ends before the index"
    if end.date() == index.date():
        return "follow-up ends on the index day"
    return None


def scans_where(connection: Connection, where: str) -> list[int]:
    """Scans that meet a condition of the user's own, which may read everything and write nothing.

    Raises:
        InputError: it is not one condition, or Postgres cannot evaluate it.
    """
    import psycopg

    from app.store.session import raw

    statement = (
        "SELECT i.image_occurrence_id FROM omop.image_occurrence i JOIN omop.person p USING (person_id)\n"
        f"WHERE (\n{where}\n)"
    )
    try:
        # prepared: Postgres then takes one statement and no more
        rows = raw(connection).execute(statement.encode(), prepare=True).fetchall()
    except (psycopg.Error, ValueError) as error:
        about_a_value = isinstance(error, psycopg.errors.DataError)  # its message may quote a row
        said = "a value cannot be computed" if about_a_value else str(error).splitlines()[0]
        raise InputError(
            f"Expected --where to be one SQL condition on i (scan) and p (person) that only reads: {said}."
        ) from None
    return [row[0] for row in rows]


def give_splits(members: list[dict[str, Any]], sharing: splits.Sharing, rule: dict[str, Any]) -> None:
    """Write `split` into every member; with a split time, what is held out starts there."""
    own = {m["person_id"]: m["own_split"] for m in members}
    if rule["split_time"] is None:
        split = splits.split_persons(own, sharing, rule["salt"])
    else:
        day = dt.datetime.fromisoformat(rule["split_time"])
        late_units = {sharing.unit.get(m["person_id"], m["person_id"]) for m in members if m["index_time"] >= day}
        unit = {person: sharing.unit.get(person, person) for person in own}
        places = {person: splits.fraction(unit[person], rule["salt"]) for person in own}
        split = splits.split_by_time({person: unit[person] in late_units for person in own}, places)
        for member in members:
            early = split[member["person_id"]] == "held_out" and member["index_time"] < day
            member["reason"] = member["reason"] or ("before the split time" if early else None)
    for member in members:
        member["split"] = split[member["person_id"]]


def digest_of(rule: dict[str, Any], members: list[dict[str, Any]]) -> bytes:
    """sha256 of the rule and the members, in their order (person, index, series)."""
    fields = "person_id image_occurrence_id image_key index_time index_date_only follow_up_end data_cut_end death_time"
    digest = hashlib.sha256(json.dumps(rule, sort_keys=True).encode())
    for member in members:
        digest.update("\t".join(str(member[field]) for field in (*fields.split(), "split", "reason")).encode() + b"\n")
    return digest.digest()


def store(
    connection: Connection,
    name: str,
    rule: dict[str, Any],
    members: list[dict[str, Any]],
    attrition: list[dict[str, Any]],
    follow_up: list[dict[str, Any]],
    job_id: int | None,
) -> dict[str, Any]:
    """Write a version of a cohort, unless the current one is the same already."""
    from sqlalchemy import text

    from app.store.session import raw

    digest = digest_of(rule, members)
    names.lock(connection, "cohort", name)
    current = names.find_current(connection, "cohort", name)
    if current is not None and current.digest == digest:
        return {"cohort_id": current.id, "name": name, "version": current.version, "unchanged": True}
    cuts = {m["data_cut"] for m in members}
    row = {
        "name": name,
        "version": names.move(connection, "cohort", name),
        "definition": json.dumps(rule),
        "attrition": json.dumps(attrition),
        "follow_up_summary": json.dumps(follow_up),
        "follow_up": rule["follow_up"],
        "data_cut": cuts.pop() if len(cuts) == 1 else rule["data_cut"],
        "digest": digest,
        "job_id": job_id,
    }
    cohort_id = connection.execute(
        text(
            "INSERT INTO label.cohort (name, version, is_current, definition, attrition, follow_up_summary, "
            "follow_up, data_cut, digest, job_id) VALUES (:name, :version, true, CAST(:definition AS jsonb), "
            "CAST(:attrition AS jsonb), CAST(:follow_up_summary AS jsonb), :follow_up, :data_cut, :digest, :job_id) "
            "RETURNING cohort_id"
        ),
        row,
    ).scalar_one()
    fields = COLUMNS.split(", ")[1:]
    with raw(connection).cursor().copy(f"COPY label.cohort_member ({COLUMNS}) FROM STDIN") as copy:
        for member in members:
            copy.write_row([cohort_id, *(member[field] for field in fields)])
    connection.execute(text("ANALYZE label.cohort_member"))
    return {"cohort_id": cohort_id, "name": name, "version": row["version"], "unchanged": False}
