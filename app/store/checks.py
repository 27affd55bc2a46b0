"""Ask the store's data the questions of checks_sql.py, and keep the answers in ops.data_check."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from app.errors import UnknownName
from app.store.checks_sql import (
    EVENT_CHECKS,
    EVENT_COLUMNS,
    EVENTS_FROM,
    MONTHLY,
    ROW_CHECKS,
    TABLES,
    Check,
    EventCheck,
)

if TYPE_CHECKING:
    from sqlalchemy import Connection

STATUSES = ("fail", "warn", "pass", "not_applicable")
"""Worst first; not applicable where there is no row that could be minded."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The answer to one check about one table."""

    check: Check
    table: str
    denominator: int
    violations: int
    sql: str
    """Statement that lists the rows, as a reader may run it."""

    @property
    def share(self) -> float | None:
        """Violations over denominator; None where that is 0."""
        return self.violations / self.denominator if self.denominator else None

    @property
    def status(self) -> str:
        """pass, warn, fail or not_applicable."""
        if self.share is None:
            return "not_applicable"
        if self.check.fail is not None and self.share > self.check.fail:
            return "fail"
        return "warn" if self.share > self.check.warn else "pass"

    def to_json(self) -> dict[str, Any]:
        """All that is known of it."""
        return {
            "check": self.check.name,
            "table": self.table,
            "asks": self.check.asks,
            "status": self.status,
            "denominator": self.denominator,
            "violations": self.violations,
            "share": self.share,
            "warn_above": self.check.warn,
            "fail_above": self.check.fail,
            "why": self.check.why,
            "mend": self.check.mend,
            "sql": self.sql,
        }


@dataclass(frozen=True, slots=True)
class Scope:
    """Whose rows are asked: those of some loads, or all."""

    source: str | None
    loads: tuple[int, ...] = ()

    def fill(self, statement: str) -> str:
        """A statement whose `{monthly}`, `{loads:x}` and `{scans:i}` are written out."""
        statement = statement.replace("{monthly}", MONTHLY)
        statement = re.sub(r"\{loads:([\w.]+)\}", lambda m: self._loads(m[1]), statement)
        return re.sub(r"\{scans:(\w+)\}", lambda m: self._scans(m[1]), statement)

    def _loads(self, column: str) -> str:
        return "true" if self.source is None else f"{column} IN ({', '.join(map(str, self.loads))})"

    def _scans(self, alias: str) -> str:
        """Scans that the source brought, or that are of its persons."""
        if self.source is None:
            return "true"
        persons = f"SELECT FROM omop.person q WHERE q.person_id = {alias}.person_id AND {self._loads('q.load_id')}"
        return f"({self._loads(f'{alias}.load_id')} OR EXISTS ({persons}))"


def scope_of(connection: Connection, source: str | None) -> Scope:
    """The loads of a source. Raises UnknownName where nothing was loaded from it."""
    from sqlalchemy import text

    if source is None:
        return Scope(None)
    query = text("SELECT load_id FROM ops.load JOIN ops.source USING (source_id) WHERE name = :name ORDER BY 1")
    loads = tuple(connection.execute(query, {"name": source}).scalars())
    if not loads:
        known = connection.execute(text("SELECT DISTINCT name FROM ops.source JOIN ops.load USING (source_id)"))
        raise UnknownName("source", source, known.scalars())
    return Scope(source, loads)


def run(connection: Connection, scope: Scope, report: Callable[[int], None] = lambda n: None) -> list[Finding]:
    """Every check, worst first; `report` is called with the number of checks just done."""
    findings = _events(connection, scope)
    report(len(EVENT_CHECKS))
    for check in ROW_CHECKS:
        listing = scope.fill(check.rows)
        denominator = _value(connection, scope.fill(check.total))
        violations = _value(connection, f"SELECT {check.measure} FROM ({listing}) q") if denominator else 0
        findings.append(Finding(check, check.table, denominator, violations, listing))
        report(1)
    return sorted(findings, key=lambda f: (STATUSES.index(f.status), -(f.share or 0)))


def num_checks() -> int:
    """How many checks there are."""
    return len(EVENT_CHECKS) + len(ROW_CHECKS)


def _value(connection: Connection, statement: str) -> int:
    return int(connection.exec_driver_sql(statement.replace("%", "%%")).scalar_one() or 0)


def _events(connection: Connection, scope: Scope) -> list[Finding]:
    """The checks of events, all in one pass."""
    counts = ", ".join(
        f"count(*) FILTER (WHERE {c.among}), count(*) FILTER (WHERE ({c.among}) AND ({c.minds}))" for c in EVENT_CHECKS
    )
    source = scope.fill(EVENTS_FROM)
    statement = f"SELECT e.domain, {counts} FROM {source} GROUP BY e.domain ORDER BY 1"
    findings = []
    for domain, *found in connection.exec_driver_sql(statement.replace("%", "%%")):
        for check, denominator, violations in zip(EVENT_CHECKS, found[::2], found[1::2], strict=True):
            if denominator:
                sql = event_listing(scope, check, domain)
                findings.append(Finding(check, TABLES.get(domain, domain), denominator, violations, sql))
    return findings


def event_listing(scope: Scope, check: EventCheck, domain: str) -> str:
    """The statement that lists the rows of one table that an event check minds."""
    where = f"e.domain = '{domain}' AND ({check.among}) AND ({check.minds})"
    return " ".join(f"SELECT {EVENT_COLUMNS} FROM {scope.fill(EVENTS_FROM)} AND {where}".split())


def keep(connection: Connection, scope: Scope, findings: Sequence[Finding]) -> dt.datetime:
    """Write the answers to ops.data_check; when they were asked."""
    from sqlalchemy import text

    (asked_at,) = connection.execute(text("SELECT clock_timestamp()")).one()
    statement = text(
        "INSERT INTO ops.data_check (checked_at, source, name, table_name, asks, num_rows, num_violations, "
        "warn_above, fail_above, status, list_sql) VALUES (:checked_at, :source, :name, :table, :asks, :denominator, "
        ":violations, :warn, :fail, :status, :sql)"
    )
    values = [
        {
            "checked_at": asked_at,
            "source": scope.source,
            "name": finding.check.name,
            "table": finding.table,
            "asks": finding.check.asks,
            "denominator": finding.denominator,
            "violations": finding.violations,
            "warn": finding.check.warn,
            "fail": finding.check.fail,
            "status": finding.status,
            "sql": finding.sql,
        }
        for finding in findings
    ]
    if values:
        connection.execute(statement, values)
    return dt.datetime.fromisoformat(str(asked_at))


def by_month(connection: Connection, scope: Scope) -> list[tuple[str, dt.date, int]]:
    """(table, month, events), for a plot."""
    statement = f"SELECT m.domain, m.month::date, m.events FROM ({scope.fill(MONTHLY)}) m ORDER BY 1, 2"
    return [(TABLES.get(domain, domain), month, n) for domain, month, n in connection.exec_driver_sql(statement)]
