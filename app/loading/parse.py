"""How the text of each table becomes typed columns: SELECT lists for the decoder, with the rule a row breaks.

A parsed table has a column `bad`: null, or the position of the first broken rule in the plan's `rules`.
"""

from __future__ import annotations

from dataclasses import dataclass

from app.loading.cdm import DEATH_CONCEPT, DELETED, EventTable, VocabularyTable

BAD_ID = "unparsable_id"
BAD_TIME = "unparsable_time"
NO_TIME = "missing_time"
OUT_OF_RANGE = "time_out_of_range"
NUL_BYTE = "nul_byte"
TOO_LONG = "name_too_long"
MAX_SYNONYM = 2_600
"""Bytes of a synonym at the most."""
BAD_FLAG = "unparsable_flag"
YES, NO = "('1', 't', 'true', 'y', 'yes')", "('0', 'f', 'false', 'n', 'no')"


@dataclass(frozen=True, slots=True)
class Rule:
    """A condition that rejects a row."""

    condition: str
    rule: str
    column: str | None


@dataclass(frozen=True, slots=True)
class Plan:
    """How to parse one table."""

    query: str
    """A SELECT over `{source}`, which holds the CDM's columns as text, blank ones null."""
    rules: tuple[Rule, ...]


class _Parser:
    """Gathers expressions in layers, so that none is computed twice: a layer may name the columns below it."""

    def __init__(self) -> None:
        self.parsed: dict[str, str] = {}
        self.derived: dict[str, str] = {}
        self.columns: dict[str, str] = {}
        self.rules: list[Rule] = []

    def parse(self, macro: str, column: str, rule: str | None = BAD_ID, *, required: bool = False) -> str:
        """Name of a text column as a value; a text that is none breaks `rule`, a missing one too where `required`."""
        name = f"p_{column}"
        self.parsed[name] = f"{macro}({column})"
        if required:
            self.rules.append(Rule(f"{name} IS NULL", BAD_ID, column))
        elif rule is not None:
            self.rules.append(Rule(f"{column} IS NOT NULL AND {name} IS NULL", rule, column))
        return name

    def derive(self, name: str, expression: str) -> str:
        """Name of a value made of parsed ones."""
        self.derived[name] = expression
        return name

    def plan(self, *, deletions: bool = False) -> Plan:
        """The whole; with `deletions` a column `deleted`, and rows of which it is true need a key and no more."""

        def listed(columns: dict[str, str]) -> str:
            return "".join(f", {expression} AS {name}" for name, expression in columns.items())

        cases = " ".join(f"WHEN {rule.condition} THEN {i}" for i, rule in enumerate(self.rules))
        if deletions:
            said = f"lower({DELETED})"
            self.parsed["p_deleted"] = f"CASE WHEN {said} IN {YES} THEN true WHEN {said} IN {NO} THEN false END"
            self.columns[DELETED] = "coalesce(p_deleted, false)"
            self.rules.append(Rule(f"{DELETED} IS NOT NULL AND p_deleted IS NULL", BAD_FLAG, DELETED))
            cases = f"WHEN p_deleted AND {self.columns['key']} IS NOT NULL THEN NULL {cases} WHEN "
            cases += f"{self.rules[-1].condition} THEN {len(self.rules) - 1}"
        columns = listed(self.columns | {"bad": f"CAST(CASE {cases} END AS UTINYINT)"}).removeprefix(", ")
        inner = f"SELECT *{listed(self.parsed)} FROM ({{source}})"
        return Plan(f"SELECT {columns} FROM (SELECT *{listed(self.derived)} FROM ({inner}))", tuple(self.rules))


def event_plan(table: EventTable, *, midnight_is_time: bool, deletions: bool = False) -> Plan:
    """Columns key, person_id, time, date_only, concept_id, source_concept_id, value_as_number, value_as_concept_id,
    unit_concept_id, end_time, end_date_only, visit_occurrence_id, flag (bits: 1 number, 2 end out of range), bad."""
    parser = _Parser()
    key = parser.parse("strict_int", table.key, required=True)
    person = parser.parse("strict_int", "person_id", required=True)
    start, date_only = _time(parser, "start", table.date, table.datetime, midnight_is_time=midnight_is_time)
    parser.rules.append(Rule(f"{start} IS NULL", NO_TIME, table.date))
    parser.rules.append(Rule(f"NOT in_range({start})", OUT_OF_RANGE, table.date))
    concept = f"coalesce({parser.parse('concept', table.concept)}, 0)" if table.concept else str(DEATH_CONCEPT)
    null = "CAST(NULL AS INTEGER)"
    source = f"coalesce({parser.parse('concept', table.source_concept)}, 0)" if table.source_concept else "0"
    parser.columns = {
        "key": key,
        "person_id": person,
        "time": f"CASE WHEN {date_only} THEN end_of_day({start}) ELSE {start} END",
        "date_only": date_only,
        "concept_id": concept,
        "source_concept_id": source,
        "value_as_concept_id": parser.parse("concept", table.value_concept) if table.value_concept else null,
        "unit_concept_id": parser.parse("concept", table.unit) if table.unit else null,
    }
    _rest(parser, table, midnight_is_time=midnight_is_time)
    return parser.plan(deletions=deletions)


def _time(parser: _Parser, name: str, date: str, datetime: str, *, midnight_is_time: bool) -> tuple[str, str]:
    """Names of the moment of a date and a datetime column, and of whether only its day is known."""
    days = parser.parse("moment", date, BAD_TIME)
    moment = parser.derive(f"{name}_moment", f"coalesce({parser.parse('moment', datetime, BAD_TIME)}, {days})")
    midnight = f"is_midnight(coalesce(p_{datetime}, {days}))"
    if midnight_is_time:
        midnight = f"coalesce(length({datetime}), 0) <= 10 AND {midnight}"
    return moment, parser.derive(f"{name}_date_only", f"coalesce({midnight}, false)")


def _rest(parser: _Parser, table: EventTable, *, midnight_is_time: bool) -> None:
    """The columns of an event that only some tables have."""
    flags = []
    number = "CAST(NULL AS FLOAT)"
    if table.number:
        number = parser.parse("number", table.number, None)
        flags.append(f"CASE WHEN {table.number} IS NOT NULL AND {number} IS NULL THEN 1 ELSE 0 END")
    end, end_only = "CAST(NULL AS TIMESTAMP)", "false"
    if table.end_date and table.end_datetime:
        moment, end_only = _time(parser, "end", table.end_date, table.end_datetime, midnight_is_time=midnight_is_time)
        end = f"CASE WHEN NOT in_range({moment}) THEN NULL WHEN {end_only} THEN end_of_day({moment}) ELSE {moment} END"
        flags.append(f"CASE WHEN NOT in_range({moment}) THEN 2 ELSE 0 END")
    visit = "CAST(NULL AS BIGINT)"
    if table.visit:
        visit = f"p_{table.key}" if table.visit == table.key else parser.parse("loose_int", table.visit)
    parser.columns |= {
        "value_as_number": number,
        "end_time": end,
        "end_date_only": end_only,
        "visit_occurrence_id": visit,
        "flag": f"CAST({' + '.join(flags) or '0'} AS UTINYINT)",
    }
    if table.name == "visit_occurrence":
        to, to_before = (parser.parse("concept", c) for c in ("discharged_to_concept_id", "discharge_to_concept_id"))
        parser.columns["discharged_to_concept_id"] = f"coalesce({to}, {to_before})"
        preceding = parser.parse("loose_int", "preceding_visit_occurrence_id")
        parser.columns["preceding_visit_occurrence_id"] = preceding


def person_plan(*, deletions: bool = False) -> Plan:
    """Columns key, person_id, birth_time, the three concepts, person_source_value, bad."""
    parser = _Parser()
    key = parser.parse("strict_int", "person_id", required=True)
    given = parser.parse("moment", "birth_datetime", BAD_TIME)
    year = parser.parse("loose_int", "year_of_birth", BAD_TIME)
    month, day = (f"coalesce(nullif(loose_int({part}_of_birth), 0), 1)" for part in ("month", "day"))
    text = f"printf('%04d-%02d-%02d', {year}, {month}, {day})"
    parts = parser.derive("parts", f"CASE WHEN {year} <> 0 THEN moment({text}) END")
    birth = parser.derive("birth", f"coalesce({given}, CASE WHEN {year} <> 0 THEN moment({text}) END)")
    parser.rules.append(Rule(f"{given} IS NULL AND {year} <> 0 AND {parts} IS NULL", BAD_TIME, "year_of_birth"))
    parser.rules.append(Rule(f"NOT in_range({birth})", OUT_OF_RANGE, "year_of_birth"))
    concepts = ("gender_concept_id", "race_concept_id", "ethnicity_concept_id")
    parser.columns = {"key": key, "person_id": key, "birth_time": birth}
    parser.columns |= {name: f"coalesce({parser.parse('concept', name)}, 0)" for name in concepts}
    parser.columns["person_source_value"] = "person_source_value"
    parser.rules.append(Rule("contains(person_source_value, chr(0))", NUL_BYTE, "person_source_value"))
    return parser.plan(deletions=deletions)


def period_plan(*, deletions: bool = False) -> Plan:
    """Columns key, person_id, start_date, end_date, bad."""
    parser = _Parser()
    parser.columns = {
        "key": parser.parse("strict_int", "observation_period_id", required=True),
        "person_id": parser.parse("strict_int", "person_id", required=True),
    }
    for name in ("start_date", "end_date"):
        column = f"observation_period_{name}"
        moment = parser.parse("moment", column, BAD_TIME)
        parser.rules.append(Rule(f"{moment} IS NULL", NO_TIME, column))
        parser.rules.append(Rule(f"NOT in_range({moment})", OUT_OF_RANGE, column))
        parser.columns[name] = f"CAST({moment} AS DATE)"
    return parser.plan(deletions=deletions)


def vocabulary_plan(table: VocabularyTable) -> Plan:
    """The table's own columns, and bad; text that must be there is at least empty."""
    parser = _Parser()
    for name, kind in table.columns:
        if kind == "int":
            parser.columns[name] = parser.parse("concept", name, required=True)
        elif kind == "date":
            parser.columns[name] = f"CAST({parser.parse('moment', name, BAD_TIME)} AS DATE)"
        else:
            parser.columns[name] = name if name in table.optional else f"coalesce({name}, '')"
            parser.rules.append(Rule(f"contains({name}, chr(0))", NUL_BYTE, name))
    if table.name == "concept_synonym":  # it is part of a key, and an index holds no longer one
        parser.rules.append(Rule(f"strlen(concept_synonym_name) > {MAX_SYNONYM}", TOO_LONG, "concept_synonym_name"))
    if table.name == "concept":
        parser.columns["standard_concept"] = "CASE WHEN length(standard_concept) = 1 THEN standard_concept END"
    if "invalid_reason" in parser.columns:
        parser.columns["invalid_reason"] = "CASE WHEN length(invalid_reason) = 1 THEN invalid_reason END"
    return parser.plan()


def source_plan() -> Plan:
    """What an extract says of itself."""
    parser = _Parser()
    parser.columns = {name: name for name in ("cdm_source_name", "cdm_version", "vocabulary_version", "cdm_holder")}
    parser.columns["source_release_date"] = f"CAST({parser.parse('moment', 'source_release_date', None)} AS DATE)"
    parser.rules.append(Rule("cdm_source_name IS NULL", "missing_name", "cdm_source_name"))
    return parser.plan()
