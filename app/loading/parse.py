"""How the text of each table becomes typed columns: SELECT lists for the decoder, with the rule a row breaks.

A parsed table has a column `bad`: null, or the position of the first broken rule in the plan's `rules`.
"""

from __future__ import annotations

from dataclasses import dataclass

from app.loading.cdm import DEATH_CONCEPT, EventTable, VocabularyTable

BAD_ID = "unparsable_id"
BAD_TIME = "unparsable_time"
NO_TIME = "missing_time"
OUT_OF_RANGE = "time_out_of_range"
NUL_BYTE = "nul_byte"


@dataclass(frozen=True, slots=True)
class Rule:
    """A condition that rejects a row."""

    condition: str
    rule: str
    column: str | None


@dataclass(frozen=True, slots=True)
class Plan:
    """How to parse one table."""

    select: str
    rules: tuple[Rule, ...]


def _plan(columns: dict[str, str], rules: list[Rule]) -> Plan:
    """The parsed columns, and `bad` from the rules, which may name them."""
    cases = " ".join(f"WHEN {rule.condition} THEN {i}" for i, rule in enumerate(rules))
    bad = f"CAST(CASE {cases} END AS UTINYINT)"
    listed = ", ".join(f"{expression} AS {name}" for name, expression in columns.items())
    return Plan(f"SELECT {listed}, {bad} AS bad", tuple(rules))


def _required(parsed: str, column: str) -> Rule:
    return Rule(f"{parsed} IS NULL", BAD_ID, column)


def _optional(parsed: str, column: str, rule: str = BAD_ID) -> Rule:
    return Rule(f"{column} IS NOT NULL AND {parsed} IS NULL", rule, column)


def _time(date: str, datetime: str) -> tuple[str, str]:
    """The moment of a date and a datetime column, and whether only its day is known."""
    moment = f"coalesce(moment({datetime}), moment({date}))"
    clock = f"coalesce(length({datetime}) > 10, false)"
    return moment, clock


def event_plan(table: EventTable, *, midnight_is_time: bool) -> Plan:
    """Columns key, person_id, time, date_only, concept_id, source_concept_id, value_as_number, value_as_concept_id,
    unit_concept_id, end_time, end_date_only, visit_occurrence_id, flag (bits: 1 number, 2 end out of range), bad."""
    moment, clock = _time(table.date, table.datetime)
    date_only = _date_only(moment, clock, midnight_is_time=midnight_is_time)
    columns = {
        "key": f"strict_int({table.key})",
        "person_id": "strict_int(person_id)",
        "time": f"CASE WHEN {date_only} THEN end_of_day({moment}) ELSE {moment} END",
        "date_only": date_only,
        "concept_id": f"coalesce(concept({table.concept}), 0)" if table.concept else str(DEATH_CONCEPT),
    }
    rules = [
        _required(f"strict_int({table.key})", table.key),
        _required("strict_int(person_id)", "person_id"),
        _optional(f"moment({table.date})", table.date, BAD_TIME),
        _optional(f"moment({table.datetime})", table.datetime, BAD_TIME),
        Rule(f"{moment} IS NULL", NO_TIME, table.date),
        Rule(f"NOT in_range({moment})", OUT_OF_RANGE, table.date),
    ]
    if table.concept:
        rules.append(_optional(f"concept({table.concept})", table.concept))
    for name, source in (
        ("source_concept_id", table.source_concept),
        ("value_as_concept_id", table.value_concept),
        ("unit_concept_id", table.unit),
    ):
        if source:
            columns[name] = f"concept({source})"
            rules.append(_optional(f"concept({source})", source))
        else:
            columns[name] = "CAST(NULL AS INTEGER)"
    if not table.source_concept:
        columns["source_concept_id"] = "0"
    else:
        columns["source_concept_id"] = f"coalesce({columns['source_concept_id']}, 0)"
    return _plan(columns | _rest(table, rules, midnight_is_time=midnight_is_time), rules)


def _date_only(moment: str, clock: str, *, midnight_is_time: bool) -> str:
    if midnight_is_time:
        return f"NOT {clock} AND is_midnight({moment})"
    return f"is_midnight({moment})"


def _rest(table: EventTable, rules: list[Rule], *, midnight_is_time: bool) -> dict[str, str]:
    """The columns of an event that only some tables have; appends their rules."""
    flags = []
    number = "CAST(NULL AS FLOAT)"
    if table.number:
        number = f"number({table.number})"
        flags.append(f"CASE WHEN {table.number} IS NOT NULL AND {number} IS NULL THEN 1 ELSE 0 END")
    end, end_only = "CAST(NULL AS TIMESTAMP)", "false"
    if table.end_date and table.end_datetime:
        moment, clock = _time(table.end_date, table.end_datetime)
        end_only = _date_only(moment, clock, midnight_is_time=midnight_is_time)
        end = f"CASE WHEN NOT in_range({moment}) THEN NULL WHEN {end_only} THEN end_of_day({moment}) ELSE {moment} END"
        end_only = f"coalesce({end_only}, false)"
        flags.append(f"CASE WHEN NOT in_range({moment}) THEN 2 ELSE 0 END")
        rules.append(_optional(f"moment({table.end_date})", table.end_date, BAD_TIME))
        rules.append(_optional(f"moment({table.end_datetime})", table.end_datetime, BAD_TIME))
    visit = "CAST(NULL AS BIGINT)"
    if table.visit and table.visit != table.key:
        visit = f"loose_int({table.visit})"
        rules.append(_optional(visit, table.visit))
    elif table.visit:
        visit = f"strict_int({table.visit})"
    columns = {
        "value_as_number": number,
        "end_time": end,
        "end_date_only": end_only,
        "visit_occurrence_id": visit,
        "flag": f"CAST({' + '.join(flags) or '0'} AS UTINYINT)",
    }
    if table.name == "visit_occurrence":
        to = "coalesce(discharged_to_concept_id, discharge_to_concept_id)"
        columns["discharged_to_concept_id"] = f"concept({to})"
        columns["preceding_visit_occurrence_id"] = "loose_int(preceding_visit_occurrence_id)"
        rules.append(Rule(f"{to} IS NOT NULL AND concept({to}) IS NULL", BAD_ID, "discharged_to_concept_id"))
        rules.append(_optional("loose_int(preceding_visit_occurrence_id)", "preceding_visit_occurrence_id"))
    return columns


def person_plan() -> Plan:
    """Columns key, person_id, birth_time, the three concepts, person_source_value, bad."""
    year, month, day = (f"nullif(loose_int({part}_of_birth), 0)" for part in ("year", "month", "day"))
    parts = f"make_timestamp({year}, coalesce({month}, 1), coalesce({day}, 1), 0, 0, 0)"
    sound = f"{year} BETWEEN 1 AND 9999 AND coalesce({month}, 1) BETWEEN 1 AND 12 AND coalesce({day}, 1) BETWEEN 1 AND "
    sound += f"day(last_day(make_date({year}, coalesce({month}, 1), 1)))"
    from_parts = f"CASE WHEN {year} BETWEEN 1 AND 9999 AND coalesce({month}, 1) BETWEEN 1 AND 12 THEN "
    from_parts += f"CASE WHEN {sound} THEN {parts} END END"
    birth = f"coalesce(moment(birth_datetime), {from_parts})"
    concepts = ("gender_concept_id", "race_concept_id", "ethnicity_concept_id")
    columns = {"key": "strict_int(person_id)", "person_id": "strict_int(person_id)", "birth_time": birth}
    columns |= {name: f"coalesce(concept({name}), 0)" for name in concepts}
    columns["person_source_value"] = "person_source_value"
    rules = [
        _required("strict_int(person_id)", "person_id"),
        _optional("moment(birth_datetime)", "birth_datetime", BAD_TIME),
        Rule(
            f"birth_datetime IS NULL AND year_of_birth IS NOT NULL AND {from_parts} IS NULL", BAD_TIME, "year_of_birth"
        ),
        Rule(f"NOT in_range({birth})", OUT_OF_RANGE, "year_of_birth"),
        *(_optional(f"concept({name})", name) for name in concepts),
        Rule("contains(person_source_value, chr(0))", NUL_BYTE, "person_source_value"),
    ]
    return _plan(columns, rules)


def period_plan() -> Plan:
    """Columns key, person_id, start_date, end_date, bad."""
    start, end = "observation_period_start_date", "observation_period_end_date"
    columns = {
        "key": "strict_int(observation_period_id)",
        "person_id": "strict_int(person_id)",
        "start_date": f"CAST(moment({start}) AS DATE)",
        "end_date": f"CAST(moment({end}) AS DATE)",
    }
    rules = [
        _required("strict_int(observation_period_id)", "observation_period_id"),
        _required("strict_int(person_id)", "person_id"),
    ]
    for column in (start, end):
        rules.append(Rule(f"{column} IS NULL", NO_TIME, column))
        rules.append(Rule(f"moment({column}) IS NULL", BAD_TIME, column))
        rules.append(Rule(f"NOT in_range(moment({column}))", OUT_OF_RANGE, column))
    return _plan(columns, rules)


def vocabulary_plan(table: VocabularyTable) -> Plan:
    """The table's own columns, and bad; text that must be there is at least empty."""
    columns, rules = {}, []
    for name, kind in table.columns:
        if kind == "int":
            columns[name] = f"concept({name})"
            rules.append(_required(f"concept({name})", name))
        elif kind == "date":
            columns[name] = f"CAST(moment({name}) AS DATE)"
            rules.append(_optional(f"moment({name})", name, BAD_TIME))
        else:
            columns[name] = name if name in table.optional else f"coalesce({name}, '')"
            rules.append(Rule(f"contains({name}, chr(0))", NUL_BYTE, name))
    if table.name == "concept":
        columns["standard_concept"] = "CASE WHEN length(standard_concept) = 1 THEN standard_concept END"
    return _plan(columns, rules)


def source_plan() -> Plan:
    """What an extract says of itself."""
    columns = {name: name for name in ("cdm_source_name", "cdm_version", "vocabulary_version", "cdm_holder")}
    columns["source_release_date"] = "CAST(moment(source_release_date) AS DATE)"
    return _plan(columns, [Rule("cdm_source_name IS NULL", "missing_name", "cdm_source_name")])
