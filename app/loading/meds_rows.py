"""Decode MEDS shards with DuckDB, reject rows, and tell births, static facts and events apart.

Tables that are made: `m` (events, one row each), `m_code`, `m_unit`, `m_static`, `t_person`, `m_reject`. A row is named
by its number over all shards in the order of their names, which is its `source_row_id`, too: the same files give the
same numbers, and legal duplicates stay apart.
"""

from __future__ import annotations

import datetime as dt
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from app.errors import InputError
from app.loading.decode import parquet_text, sql_name, sql_text
from app.loading.extract import TableFile
from app.loading.forgotten import note
from app.loading.meds_files import CODES, DATA, SPLITS, split_of, types_of
from app.loading.parse import BAD_ID, BAD_TIME, NO_TIME, NUL_BYTE, OUT_OF_RANGE, Rule
from app.loading.validate import AFTER_DEATH, one
from app.loading.zones import zone_macro
from app.store.forgetting import RULE, Memory
from app.store.loads import FileRecord, Reject

if TYPE_CHECKING:
    import duckdb

Read = tuple[TableFile, FileRecord]

MAX_CODE = 1000
"""Characters of a code: longer ones are text that went astray, and no index holds them."""

LETTERS = {
    "c": ("condition", "condition_occurrence"),
    "d": ("drug", "drug_exposure"),
    "p": ("procedure", "procedure_occurrence"),
    "e": ("device", "device_exposure"),
    "m": ("measurement",),
    "o": ("observation",),
    "s": ("specimen",),
    "v": ("visit", "visit_occurrence"),
    "w": ("visit_detail",),
    "x": ("death",),
}
"""Letter of omop.event.domain → words of a column `table`, as converters from OMOP write it."""

BIRTH, DEATH, GENDER, RACE, ETHNICITY = "birth", "death", "gender", "race", "ethnicity"
DEMOGRAPHICS = (GENDER, RACE, ETHNICITY)
KIND = (
    "CASE WHEN code = 'MEDS_BIRTH' OR code LIKE 'MEDS_BIRTH//%' THEN 'birth' "
    "WHEN code = 'MEDS_DEATH' OR code LIKE 'MEDS_DEATH//%' THEN 'death' "
    "WHEN regexp_full_match(code, '(?i)(gender|sex)/.+') THEN 'gender' "
    "WHEN regexp_full_match(code, '(?i)race/.+') THEN 'race' "
    "WHEN regexp_full_match(code, '(?i)ethnicity/.+') THEN 'ethnicity' END"
)

ROW_RULES = (
    Rule("person_id IS NULL", BAD_ID, "subject_id"),
    Rule("time_given AND time IS NULL", BAD_TIME, "time"),
    Rule("NOT in_range(time)", OUT_OF_RANGE, "time"),
    Rule("code IS NULL OR trim(code) = ''", "missing_code", "code"),
    Rule("contains(code, chr(0))", NUL_BYTE, "code"),
    Rule(f"length(code) > {MAX_CODE}", "code_too_long", "code"),
)
LATER_RULES = (
    Rule("", NO_TIME, "time"),
    Rule("", "second_birth", "code"),
    Rule("", "second_death", "code"),
    Rule("", RULE, "subject_id"),
)
HARMLESS = frozenset({"second_birth", "second_death", RULE})


@dataclass(slots=True)
class Books:
    """What the books say of one table of a delivery."""

    table: str
    files: list[FileRecord]
    rejects_by_rule: dict[str, int] = field(default_factory=dict)
    flags_by_rule: dict[str, int] = field(default_factory=dict)
    first_time: dt.datetime | None = None
    last_time: dt.datetime | None = None

    @property
    def num_read(self) -> int:
        return sum(file.records for file in self.files)

    @property
    def num_rejected(self) -> int:
        return sum(self.rejects_by_rule.values())

    @property
    def num_loaded(self) -> int:
        return self.num_read - self.num_rejected

    @property
    def num_gated(self) -> int:
        """Rejected rows that count at the gate."""
        return sum(count for rule, count in self.rejects_by_rule.items() if rule not in HARMLESS)

    def reject(self, rule: str, count: int = 1) -> None:
        """Count rejected rows."""
        if count:
            self.rejects_by_rule[rule] = self.rejects_by_rule.get(rule, 0) + count


def zone_of(kind: str) -> str | None:
    """The zone of a type `timestamp[us, tz=UTC]`."""
    return kind.split("tz=", 1)[1].rstrip("]") if kind.startswith("timestamp") and "tz=" in kind else None


def zone_name(zone: str) -> str:
    """What the macro of a zone's clock is called."""
    return f"zone_{zone.encode().hex()}"


def know_zones(connection: duckdb.DuckDBPyConnection, files: Iterable[TableFile]) -> None:
    """Make the macros of the zones that files' columns have.

    Raises:
        InputError: there is no such zone.
    """
    for zone in {zone for file in files for kind in file.types if (zone := zone_of(kind))}:
        connection.execute(zone_macro(zone, zone_name(zone)))


def column(types: dict[str, str], name: str, kind: str) -> str:
    """A column of a shard as BIGINT, TIMESTAMP, VARCHAR, DOUBLE or BOOLEAN; null where it has none.

    Raises:
        InputError: its type cannot hold such values.
    """
    given = types.get(name)
    if given is None or given == "null":
        return f"CAST(NULL AS {kind})"
    quoted = sql_name(name)
    if any(given.startswith(nested) for nested in ("list", "large_list", "struct", "map", "binary", "fixed_size")):
        raise InputError(f"Expected plain values in the column {name}, found {given}; give it as MEDS has it.")
    zone = zone_of(given)
    text = f"blank({parquet_text(name, given, {zone: zone_name(zone)} if zone else {})})"
    if kind == "BIGINT":
        whole = given.startswith(("int", "uint"))
        return f"TRY_CAST({quoted} AS BIGINT)" if whole else f"strict_int({text})"
    if kind == "TIMESTAMP":
        plain = given in ("timestamp[s]", "timestamp[ms]", "timestamp[us]") or given.startswith("date")
        return f"CAST({quoted} AS TIMESTAMP)" if plain else f"moment({text})"
    if kind == "VARCHAR":
        return f"CAST({quoted} AS VARCHAR)" if "string" in given else text
    return f"TRY_CAST({quoted} AS {kind})"


def make_codes(connection: duckdb.DuckDBPyConnection, links: Sequence[tuple[Read, str]]) -> None:
    """Number every code and unit of some shards, in the order of the codes: tables `m_code`, `m_unit`."""
    know_zones(connection, [file for (file, _), _ in links])
    connection.execute("CREATE TABLE d_code (code VARCHAR); CREATE TABLE d_unit (unit VARCHAR)")
    for (file, _), link in links:
        types, source = types_of(file), f"read_parquet({sql_text(link)})"
        for name in ("code", "source_code", "value_code"):
            if name in types:
                connection.execute(f"INSERT INTO d_code SELECT DISTINCT {column(types, name, 'VARCHAR')} FROM {source}")
        if "unit" in types:
            connection.execute(f"INSERT INTO d_unit SELECT DISTINCT {column(types, 'unit', 'VARCHAR')} FROM {source}")
    usable = f"code IS NOT NULL AND trim(code) <> '' AND NOT contains(code, chr(0)) AND length(code) <= {MAX_CODE}"
    connection.execute(
        f"CREATE TABLE m_code AS SELECT CAST(row_number() OVER (ORDER BY code) AS INTEGER) AS code_id, code, "
        f"{KIND} AS kind FROM (SELECT DISTINCT code FROM d_code WHERE {usable})"
    )
    connection.execute(
        "CREATE TABLE m_unit AS SELECT CAST(row_number() OVER (ORDER BY unit) AS INTEGER) AS unit_id, unit "
        "FROM (SELECT DISTINCT trim(unit) AS unit FROM d_unit WHERE trim(unit) <> '' AND length(unit) <= 100)"
    )
    connection.execute("DROP TABLE d_code; DROP TABLE d_unit")


def add_codes(connection: duckdb.DuckDBPyConnection, codes: Sequence[str]) -> None:
    """Number codes that only the metadata name."""
    import pyarrow as pa

    connection.register("more", pa.table({"code": pa.array(codes, pa.string())}))
    connection.execute(
        "INSERT INTO m_code "
        "SELECT CAST((SELECT count(*) FROM m_code) + row_number() OVER (ORDER BY code) AS INTEGER), "
        f"code, {KIND} FROM (SELECT DISTINCT code FROM more ANTI JOIN m_code USING (code))"
    )
    connection.unregister("more")


def letter_of(name: str) -> str:
    """The domain's letter that a column `table` says; null where it says none."""
    cases = " ".join(
        f"WHEN lower({name}) IN ({', '.join(map(sql_text, words))}) THEN '{letter}'"
        for letter, words in LETTERS.items()
    )
    return f"CASE {cases} END"


def decode(
    connection: duckdb.DuckDBPyConnection,
    links: Sequence[tuple[Read, str]],
    *,
    midnight_is_time: bool,
    check: Callable[[int], None],
) -> None:
    """Make `m` of every row, `bad` where a rule rejects it; `check` is told of rows done, and may raise to stop."""
    first = 0
    for i, ((file, record), link) in enumerate(links):
        check(record.records)
        query = _decode_query(file, link, first, midnight_is_time=midnight_is_time)
        connection.execute(f"CREATE TABLE m AS {query}" if i == 0 else f"INSERT INTO m {query}")
        (rows,) = one(connection, f'SELECT count(*) FROM m WHERE "row" > {first}')
        if rows != record.records:
            raise InputError(f"Expected {record.records} rows in {file.name}, decoded {rows}; write the file again.")
        first += record.records


def _decode_query(file: TableFile, link: str, first: int, *, midnight_is_time: bool) -> str:
    types = types_of(file)
    own = column(types, "date_only", "BOOLEAN")
    own_end = column(types, "end_date_only", "BOOLEAN")
    guess = "false" if midnight_is_time else "is_midnight({})"
    numbers = column(types, "numeric_value", "DOUBLE")
    texts = [column(types, name, "VARCHAR") for name in ("text_value", "value_text") if name in types]
    visit = f"blank({column(types, 'visit_id', 'VARCHAR')})"
    cases = " ".join(f"WHEN {rule.condition} THEN {i}" for i, rule in enumerate(ROW_RULES))
    given = (
        f'SELECT file_row_number + {first + 1} AS "row", {column(types, "subject_id", "BIGINT")} AS person_id, '
        f"{sql_name('time')} IS NOT NULL AS time_given, {column(types, 'time', 'TIMESTAMP')} AS time, "
        f"{column(types, 'code', 'VARCHAR')} AS code, {own} AS own_day, {own_end} AS own_end_day, "
        f"{column(types, 'end', 'TIMESTAMP')} AS end_time, {numbers} AS number, "
        f"{column(types, 'source_code', 'VARCHAR')} AS source_code, {column(types, 'value_code', 'VARCHAR')} AS "
        f"value_code, trim({column(types, 'unit', 'VARCHAR')}) AS unit, {column(types, 'table', 'VARCHAR')} AS tab, "
        f"coalesce({column(types, 'unmapped', 'BOOLEAN')}, false) AS unmapped, {visit} AS visit, "
        f"coalesce({', '.join(texts) or 'NULL'}) IS NOT NULL AS has_text "
        f"FROM read_parquet({sql_text(link)}, file_row_number = true)"
    )
    finite = "CASE WHEN number IS NOT NULL AND NOT isnan(number) THEN TRY_CAST(number AS FLOAT) END"
    day = f"coalesce(own_day, {guess.format('time')}, false)"
    end_day = f"coalesce(own_end_day, {guess.format('end_time')}, false)"
    named = "SELECT code_id, code AS name, kind FROM m_code"
    return (
        f"SELECT \"row\", person_id, CASE WHEN {day} AND k.kind IS DISTINCT FROM 'birth' THEN end_of_day(time) "
        f"ELSE time END AS time, {day} AS date_only, k.code_id, s.code_id AS source_code_id, "
        f"v.code_id AS value_code_id, CASE WHEN isfinite({finite}) THEN {finite} END AS number, u.unit_id, "
        f"CASE WHEN NOT in_range(end_time) THEN NULL WHEN {end_day} THEN end_of_day(end_time) ELSE end_time END AS "
        f"end_time, {end_day} AS end_date_only, coalesce(TRY_CAST(visit AS BIGINT), "
        f"CAST(md5_number_lower(visit) >> 2 AS BIGINT)) AS visit_id, {letter_of('tab')} AS tab, unmapped, "
        f"CAST(CASE WHEN number IS NOT NULL AND NOT isnan(number) AND NOT coalesce(isfinite({finite}), false) "
        "THEN 1 ELSE 0 END + CASE WHEN NOT in_range(end_time) THEN 2 ELSE 0 END + CASE WHEN has_text THEN 4 ELSE 0 END "
        f"AS UTINYINT) AS flag, CAST(CASE {cases} END AS UTINYINT) AS bad "
        f"FROM ({given}) g LEFT JOIN ({named}) k ON k.name = code LEFT JOIN ({named}) s ON s.name = source_code "
        f"LEFT JOIN ({named}) v ON v.name = value_code LEFT JOIN (SELECT unit_id, unit AS name FROM m_unit) u "
        "ON u.name = unit"
    )


def judge(connection: duckdb.DuckDBPyConnection, books: Books, memory: Memory) -> None:
    """Reject rows, and take births and static facts out of `m`, so that events are left.

    Args:
        connection: a decoder with the table `m`.
        books: their rejects are counted.
        memory: whose rows are left out.
    """
    base = len(ROW_RULES)
    if memory:
        connection.execute("CREATE VIEW t_subject AS SELECT person_id FROM m")
        note(connection, "t_subject", memory)
        connection.execute("DROP VIEW t_subject")
        connection.execute(f"UPDATE m SET bad = {base + 3} WHERE person_id IN (FROM forgotten_person)")
    of_kind = "SELECT code_id FROM m_code WHERE kind = '{}'"
    connection.execute(
        f"UPDATE m SET bad = {base} WHERE bad IS NULL AND time IS NULL "
        f"AND (code_id IN ({of_kind.format(BIRTH)}) OR code_id IN ({of_kind.format(DEATH)}))"
    )
    for i, kind in ((1, BIRTH), (2, DEATH)):
        connection.execute(
            f'UPDATE m SET bad = {base + i} WHERE "row" IN (SELECT "row" FROM (SELECT "row", row_number() OVER '
            f'(PARTITION BY person_id ORDER BY time, "row") AS n FROM m WHERE bad IS NULL '
            f"AND code_id IN ({of_kind.format(kind)})) WHERE n > 1)"
        )
    connection.execute(
        'CREATE TABLE m_reject AS SELECT "row", CAST(bad AS INTEGER) AS code, person_id FROM m WHERE bad IS NOT NULL'
    )
    rules = (*ROW_RULES, *LATER_RULES)
    for code, count in connection.execute("SELECT code, count(*) FROM m_reject GROUP BY 1 ORDER BY 1").fetchall():
        books.reject(rules[code].rule, count)
    connection.execute("DELETE FROM m WHERE bad IS NOT NULL")
    connection.execute(
        f'CREATE TABLE m_birth AS SELECT "row", person_id, time FROM m WHERE code_id IN ({of_kind.format(BIRTH)})'
    )
    demographic = f"k.kind IN ({', '.join(map(sql_text, DEMOGRAPHICS))})"
    connection.execute(
        f'CREATE TABLE m_static AS SELECT m."row", m.person_id, m.code_id, m.number, m.unit_id, '
        f"CASE WHEN {demographic} THEN k.kind END AS kind, m.time IS NOT NULL AS at_birth, m.flag "
        f"FROM m LEFT JOIN m_birth b ON b.person_id = m.person_id JOIN m_code k ON k.code_id = m.code_id "
        f"WHERE m.time IS NULL OR ({demographic} AND (m.time = b.time OR "
        "(m.date_only AND CAST(m.time AS DATE) = CAST(b.time AS DATE))))"
    )
    connection.execute(
        "CREATE TABLE t_person AS SELECT p.person_id, p.person_id AS key, b.time AS birth_time, "
        "CAST(NULL AS VARCHAR) AS split FROM (SELECT DISTINCT person_id FROM m) p LEFT JOIN m_birth b USING (person_id)"
    )
    connection.execute('DELETE FROM m WHERE "row" IN (SELECT "row" FROM m_birth UNION ALL SELECT "row" FROM m_static)')


def rejects(connection: duckdb.DuckDBPyConnection, reads: Sequence[Read]) -> Iterator[Reject]:
    """Every rejected row of the shards, by file and record."""
    starts, first = [], 0
    for _, record in reads:
        starts.append(first)
        first += record.records
    rules = (*ROW_RULES, *LATER_RULES)
    cursor = connection.cursor()
    cursor.execute('SELECT "row", code, CAST(person_id AS VARCHAR) FROM m_reject ORDER BY 1')
    while rows := cursor.fetchmany(10_000):
        for row, code, key in rows:
            file = bisect_right(starts, row - 1) - 1
            yield Reject(
                table_name=DATA,
                file=reads[file][0].name,
                record=row - starts[file],
                rule=rules[code].rule,
                row_key=None if rules[code].rule == RULE else key,
                column_name=rules[code].column,
            )


def assign_visits(connection: duckdb.DuckDBPyConnection) -> None:
    """Make `t_visit_occurrence` out of rows that are visits, and `m_visit_key(row, visit_id)` for those without an id.

    Needs `m_map(code_id, concept_id, own_id, letter)`. A visit without an id gets one from its person, time and code:
    the same rows give the same ids.
    """
    connection.execute(
        'CREATE TABLE m_visit AS SELECT m."row", m.person_id, m.code_id, m.time, m.end_time, m.date_only, '
        "m.end_date_only, m.visit_id AS given, k.concept_id FROM m JOIN m_map k USING (code_id) "
        "WHERE coalesce(m.tab, k.letter) = 'v'"
    )
    connection.execute(
        "CREATE TABLE m_visit_key AS SELECT \"row\", CAST(md5_number_lower(concat_ws('/', person_id, time, code, n)) "
        '>> 2 AS BIGINT) AS visit_id FROM (SELECT v."row", person_id, time, code, '
        'row_number() OVER (PARTITION BY person_id, time, v.code_id ORDER BY v."row") AS n '
        "FROM m_visit v JOIN m_code USING (code_id) WHERE given IS NULL)"
    )
    connection.execute(
        "CREATE TABLE t_visit_occurrence AS SELECT DISTINCT ON (key) * FROM ("
        "SELECT coalesce(given, k.visit_id) AS key, person_id, concept_id, time, end_time, date_only, end_date_only, "
        "CAST(NULL AS INTEGER) AS discharged_to_concept_id, CAST(NULL AS BIGINT) AS preceding_visit_occurrence_id, "
        '"row" FROM m_visit LEFT JOIN m_visit_key k USING ("row")) ORDER BY key, "row"'
    )


def flag(connection: duckdb.DuckDBPyConnection, books: Books, reads: Sequence[Read]) -> None:
    """Count what is remarkable, and find the span of times. Needs `m_map` and the tables of `assign_visits`."""
    death = "SELECT person_id, min(time) AS death_time, arg_min(date_only, time) AS death_date_only FROM m JOIN m_code "
    death += f"USING (code_id) WHERE kind = '{DEATH}' GROUP BY 1"
    connection.execute(
        "CREATE TABLE life AS SELECT p.person_id, p.birth_time, d.death_time, d.death_date_only "
        f"FROM t_person p LEFT JOIN ({death}) d USING (person_id)"
    )
    counts = {
        "number_unusable": "t.flag & 1 = 1",
        "end_out_of_range": "t.flag & 2 = 2",
        "text_left_out": "t.flag & 4 = 4",
        "end_before_start": "t.end_time < t.time",
        "in_the_future": "t.time > now()::TIMESTAMP + INTERVAL 1 DAY",
        "before_birth": "t.time < p.birth_time AND NOT (t.date_only AND t.time::DATE = p.birth_time::DATE)",
        "after_death": AFTER_DEATH,
        "concept_local": "k.own_id >= 2000000000",
        "concept_zero": "k.concept_id = 0 OR t.unmapped",
    }
    listed = ", ".join(f"count_if({condition})" for condition in counts.values())
    row = one(
        connection,
        f"SELECT min(t.time), max(t.time), {listed} FROM m t JOIN life p USING (person_id) "
        "JOIN m_map k USING (code_id)",
    )
    books.first_time, books.last_time = row[0], row[1]
    flags = dict(zip(counts, row[2:], strict=True))
    flags["static_fact"], static_text = one(connection, "SELECT count(*), count_if(flag & 4 = 4) FROM m_static")
    flags["text_left_out"] = (flags["text_left_out"] or 0) + (static_text or 0)
    (flags["unknown_visit"],) = one(
        connection,
        "SELECT count(*) FROM m WHERE visit_id IS NOT NULL "
        "AND NOT EXISTS (FROM t_visit_occurrence v WHERE v.key = m.visit_id)",
    )
    (flags["visit_again"],) = one(
        connection, "SELECT (SELECT count(*) FROM m_visit) - (SELECT count(*) FROM t_visit_occurrence)"
    )
    flags |= _of_shards(connection, reads)
    books.flags_by_rule = {name: int(count) for name, count in flags.items() if count}


def _of_shards(connection: duckdb.DuckDBPyConnection, reads: Sequence[Read]) -> dict[str, int]:
    """Persons in several shards, and rows that stand before an earlier one of their person or apart from it."""
    edges, first = [], 0
    for _, record in reads:
        edges.append(first)
        first += record.records
    number = " + ".join(f'CAST("row" > {edge} AS INTEGER)' for edge in edges)
    (several,) = one(
        connection,
        f"SELECT count(*) FROM (SELECT person_id FROM m GROUP BY 1 HAVING min({number}) <> max({number}))",
    )
    (unsorted,) = one(
        connection,
        "SELECT count(*) FROM (SELECT person_id, time, lag(person_id) OVER w AS before, lag(time) OVER w AS earlier "
        'FROM m WINDOW w AS (ORDER BY "row")) WHERE person_id = before AND time < earlier',
    )
    return {"person_in_several_files": several, "rows_unsorted": unsorted}


def read_splits(connection: duckdb.DuckDBPyConnection, read: Read, link: str, books: Books) -> list[Reject]:
    """Give persons the splits of `subject_splits.parquet`; the rejects of that file."""
    types = types_of(read[0])
    connection.execute(
        f'CREATE TABLE m_split AS SELECT file_row_number + 1 AS "row", {column(types, "subject_id", "BIGINT")} AS '
        f"person_id, {column(types, 'split', 'VARCHAR')} AS split "
        f"FROM read_parquet({sql_text(link)}, file_row_number = true)"
    )
    judged = connection.execute(
        "SELECT \"row\", person_id, CASE WHEN person_id IS NULL THEN 'unparsable_id' "
        "WHEN split IS NULL OR trim(split) = '' OR length(split) > 100 OR contains(split, chr(0)) THEN 'missing_name' "
        "WHEN NOT EXISTS (FROM t_person p WHERE p.person_id = s.person_id) THEN 'unknown_person' "
        "WHEN min(split) OVER w <> max(split) OVER w THEN 'duplicate_key' "
        "WHEN row_number() OVER (PARTITION BY person_id ORDER BY \"row\") > 1 THEN 'duplicate_row' END AS rule "
        "FROM m_split s WINDOW w AS (PARTITION BY person_id) QUALIFY rule IS NOT NULL ORDER BY 1"
    ).fetchall()
    found = []
    for row, person, rule in judged:
        books.reject(rule)
        key = None if person is None else str(person)
        column_name = "split" if rule == "missing_name" else "subject_id"
        found.append(
            Reject(table_name=SPLITS, file=read[0].name, record=row, rule=rule, row_key=key, column_name=column_name)
        )
    connection.execute('CREATE TABLE no_split ("row" BIGINT)')
    if found:
        connection.executemany("INSERT INTO no_split VALUES (?)", [[reject.record] for reject in found])
    connection.execute(
        "UPDATE t_person SET split = s.split FROM m_split s WHERE s.person_id = t_person.person_id "
        'AND s."row" NOT IN (SELECT "row" FROM no_split)'
    )
    return found


def splits_of_folders(connection: duckdb.DuckDBPyConnection, reads: Sequence[Read]) -> bool:
    """Give persons the split that their shard's folder names, where all shards lie in such; whether they do."""
    names = [split_of(file) for file, _ in reads]
    if None in names:
        return False
    cases, last = [], 0
    for name, (_, record) in zip(names, reads, strict=True):
        last += record.records
        cases.append(f"WHEN first_row <= {last} THEN '{name}'")
    connection.execute(
        f'UPDATE t_person SET split = CASE {" ".join(cases)} END FROM (SELECT person_id, min("row") AS first_row '
        'FROM (SELECT person_id, "row" FROM m UNION ALL SELECT person_id, "row" FROM m_static '
        'UNION ALL SELECT person_id, "row" FROM m_birth) GROUP BY 1) f WHERE f.person_id = t_person.person_id'
    )
    return True


def read_codes(read: Read, books: Books) -> tuple[dict[str, tuple[str | None, list[str]]], list[Reject]]:
    """Code → (description, parent codes) as `codes.parquet` has them; the first row of a code counts."""
    import pyarrow.parquet as pq

    file = read[0]
    known = [name for name in ("code", "description", "parent_codes") if name in file.cells]
    found: dict[str, tuple[str | None, list[str]]] = {}
    bad: list[Reject] = []
    record = 0
    for batch in pq.ParquetFile(file.path).iter_batches(65_536, columns=known):
        for row in batch.to_pylist():
            record += 1
            rule = _code_rule(row["code"], found)
            if rule:
                books.reject(rule)
                bad.append(Reject(table_name=CODES, file=file.name, record=record, rule=rule, column_name="code"))
                continue
            found[str(row["code"])] = _described(row)
    return found, bad


def _described(row: dict[str, Any]) -> tuple[str | None, list[str]]:
    said = row.get("description")
    parents = row.get("parent_codes") or []
    text = str(said).replace("\0", "").strip()[:MAX_CODE] if said is not None else None
    return text or None, [str(p) for p in parents if p and "\0" not in str(p) and len(str(p)) <= MAX_CODE]


def _code_rule(code: Any, found: dict[str, tuple[str | None, list[str]]]) -> str | None:
    if code is None or not str(code).strip():
        return "missing_code"
    if "\0" in str(code):
        return NUL_BYTE
    if len(str(code)) > MAX_CODE:
        return "code_too_long"
    return "duplicate_row" if str(code) in found else None
