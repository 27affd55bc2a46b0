"""Whether scans meet the records of their persons: a CT procedure, or any visit, on the day of the scan or near it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sqlalchemy import Connection

CT_CODE = "77477000"
"""SNOMED CT's "Computerized tomography (procedure)"."""
CT_NAME = r"\m(CT|CAT scan|computed tomograph\w*|computeri[sz]ed (axial )?tomograph\w*)\M"


@dataclass(frozen=True, kw_only=True, slots=True)
class ScanDays:
    """How many scans have which record on their day."""

    scans: int
    with_ct: int
    with_ct_or_visit: int
    ct_by: str
    """How CT procedures were told: by the vocabulary's descendants, or by names."""

    @property
    def share(self) -> float:
        return self.with_ct_or_visit / self.scans if self.scans else 1.0


_DESCENDANTS = """
SELECT a.descendant_concept_id FROM omop.concept c
JOIN omop.concept_ancestor a ON a.ancestor_concept_id = c.concept_id
WHERE c.vocabulary_id = 'SNOMED' AND c.concept_code = :code
"""
_NAMED = "SELECT concept_id FROM omop.concept WHERE domain_id = 'Procedure' AND concept_name ~* :name"
_DAYS = """
WITH scan AS (
    SELECT person_id, day FROM unnest(CAST(:persons AS bigint[]), CAST(:days AS date[])) AS s (person_id, day)
), met AS (
    SELECT EXISTS (
               SELECT FROM omop.event e WHERE e.person_id = s.person_id AND e.domain = 'p'
               AND e.time >= s.day - CAST(:slack AS int) AND e.time < s.day + 1 + CAST(:slack AS int)
               AND e.concept_id = ANY (CAST(:ct AS int[]))
           ) AS ct,
           EXISTS (
               SELECT FROM omop.visit_occurrence v WHERE v.person_id = s.person_id
               AND v.visit_start_datetime < s.day + 1 + CAST(:slack AS int)
               AND coalesce(v.visit_end_date, v.visit_start_date) >= s.day - CAST(:slack AS int)
           ) AS visit
    FROM scan s
)
SELECT count(*), count(*) FILTER (WHERE ct), count(*) FILTER (WHERE ct OR visit) FROM met
"""


def count_scan_days(connection: Connection, scans: Sequence[tuple[int, Any]], *, slack_days: int = 0) -> ScanDays:
    """How many of (person_id, day) meet a CT procedure, or that or a visit, at most `slack_days` days away.

    CT procedures are those of SNOMED's concept and its descendants, where the vocabulary has these; else procedures
    whose concept's name says so.
    """
    from sqlalchemy import text

    ct, by = list(connection.execute(text(_DESCENDANTS), {"code": CT_CODE}).scalars()), f"SNOMED {CT_CODE}"
    if not ct:
        ct, by = list(connection.execute(text(_NAMED), {"name": CT_NAME}).scalars()), "concept name"
    persons, days = [person for person, _ in scans], [day for _, day in scans]
    row = connection.execute(text(_DAYS), {"persons": persons, "days": days, "ct": ct, "slack": slack_days}).one()
    return ScanDays(scans=row[0], with_ct=row[1], with_ct_or_visit=row[2], ct_by=by)
