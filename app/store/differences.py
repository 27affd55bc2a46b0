"""What changed between two deliveries of a source, from what each wrote into the books when it was published."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from app.errors import InputError, UnknownName

if TYPE_CHECKING:
    from sqlalchemy import Connection

DELIVERIES = """
SELECT l.delivery_id, min(l.job_id) AS job_id, l.source_id, s.name AS source, min(l.mode) AS mode,
       min(l.created_at) AS created_at
FROM ops.load l JOIN ops.source s USING (source_id)
WHERE l.kind NOT IN ('images', 'inspect') AND (CAST(:source AS text) IS NULL OR s.name = :source)
GROUP BY l.delivery_id, l.source_id, s.name ORDER BY l.delivery_id
"""

# A number names a delivery by its job first, else by one of its loads.
NAMED = """
SELECT delivery_id FROM ops.load
WHERE kind NOT IN ('images', 'inspect') AND (job_id::text = :name OR load_id::text = :name
       AND NOT EXISTS (SELECT FROM ops.load d WHERE d.job_id::text = :name))
ORDER BY load_id LIMIT 1
"""

CHANGES = """
SELECT delivery_id, table_name, num_before, num_after, num_added, num_changed, num_removed FROM ops.load_change
WHERE source_id = :source ORDER BY delivery_id, table_name
"""


@dataclass(frozen=True, slots=True)
class Delivery:
    """One published delivery."""

    delivery_id: int
    job_id: int | None
    source_id: int
    source: str
    mode: str
    created_at: Any

    @property
    def name(self) -> str:
        return f"job {self.job_id}" if self.job_id is not None else f"load {self.delivery_id}"


def deliveries(connection: Connection, source: str | None) -> list[Delivery]:
    """Published deliveries, oldest first; of one source, or of all."""
    from sqlalchemy import text

    return [Delivery(*row) for row in connection.execute(text(DELIVERIES), {"source": source})]


def chosen(connection: Connection, first: str | None, second: str | None, source: str | None) -> list[Delivery]:
    """The deliveries from one to another, both included; by default the last two of the source.

    Raises:
        InputError: there are no two, or they are of two sources.
        UnknownName: no delivery has that number.
    """
    from sqlalchemy import text

    known = deliveries(connection, source)
    if first is None or second is None:
        if not known:
            raise InputError("Expected two deliveries to compare, found none; load an extract first.")
        own = [d for d in known if d.source_id == known[-1].source_id]
        if first is None and len(own) < 2:
            raise InputError(
                f"Expected two deliveries of source {own[-1].source}, found one; load the next one, or name another "
                "source with --source."
            )
        if first is None:
            return own[-2:]
        second = str(own[-1].job_id or own[-1].delivery_id)
    ends = []
    for name in (first, second):
        found = connection.scalar(text(NAMED), {"name": name})
        match = [d for d in deliveries(connection, None) if d.delivery_id == found]
        if not match:
            raise UnknownName("delivery", name, [str(d.job_id or d.delivery_id) for d in known])
        ends += match
    if ends[0].source_id != ends[1].source_id:
        raise InputError(
            f"Expected two deliveries of one source, got one of {ends[0].source} and one of {ends[1].source}; "
            "compare deliveries of the same source."
        )
    low, high = sorted(d.delivery_id for d in ends)
    span = [d for d in deliveries(connection, ends[0].source) if low <= d.delivery_id <= high]
    return span if ends[0].delivery_id <= ends[1].delivery_id else span[::-1]


def difference(connection: Connection, span: list[Delivery]) -> dict[str, Any]:
    """Rows before, after, added, changed, removed, by table, from the first of some deliveries to the last.

    Before and after are exact. The others are exact for deliveries that follow each other, and where none of several
    changed or removed rows; else they are sums over the steps, in which a row that changes twice counts twice.
    """
    from sqlalchemy import text

    back = span[0].delivery_id > span[-1].delivery_id
    older, newer = (span[-1], span[0]) if back else (span[0], span[-1])
    rows = connection.execute(text(CHANGES), {"source": older.source_id}).all()
    steps = [row for row in rows if older.delivery_id < row.delivery_id <= newer.delivery_id]
    tables = []
    for table in sorted({row.table_name for row in rows if row.delivery_id <= newer.delivery_id}):
        own = [row for row in steps if row.table_name == table]
        until = [row for row in rows if row.table_name == table and row.delivery_id <= older.delivery_id]
        before = until[-1].num_after if until else own[0].num_before
        counts = [sum(getattr(row, f"num_{what}") for row in own) for what in ("added", "changed", "removed")]
        ends = (before, own[-1].num_after if own else before)
        if back:
            counts, ends = counts[::-1], ends[::-1]
        line = dict(zip(("before", "after", "added", "changed", "removed"), (*ends, *counts), strict=True))
        exact = len(own) <= 1 or not any(row.num_changed or row.num_removed for row in own)
        tables.append({"table": table, **line, "exact": exact})
    return {
        "source": older.source,
        "from": span[0].name,
        "to": span[-1].name,
        "mode": newer.mode,
        "steps": len(span) - 1,
        "exact": all(line["exact"] for line in tables),
        "tables": tables,
    }
