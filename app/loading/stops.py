"""What loaders of deliveries share: what stops one, how it is said, and a last day of the data that comes later."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import TYPE_CHECKING

from app.errors import InputError
from app.loading import context
from app.store.loads import describe_source, find_source

if TYPE_CHECKING:
    from app.store.work import Work

SHRINK = 0.05
"""A delivery that removes a larger share of a table's rows, of persons or of scans stops."""


class Stopped(InputError):
    """A guard stops a delivery in its publishing transaction; its rejects are to be kept."""


def told(by_rule: Mapping[str, int]) -> str:
    """Counts by rule: `unparsable_id 12, duplicate_row 3`."""
    return ", ".join(f"{rule} {count:,}" for rule, count in by_rule.items())


def rejects_at(work: Work) -> str:
    """Where a job's rejects can be read."""
    return "ops.reject" if work.job_id is None else f"`lachesis show rejects {work.job_id}`"


def keep_cut(work: Work, source: str, given: dt.date | None) -> dt.date | None:
    """The last day of a source's data, where nothing else is new: `given`, kept where it is another one."""
    with work.connect() as connection:
        source_id = find_source(connection, source) or 0
        row = context.source_row(connection, source_id)
    if given is None or given == row.data_cut:
        return row.data_cut
    with work.transaction() as connection:
        describe_source(
            connection, source_id, data_cut=given, data_cut_source="option", simulated=row.simulated, details={}
        )
    return given
