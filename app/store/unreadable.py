"""Scans whose headers promise more than their voxels keep."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlalchemy import Connection

UNREADABLE = "unreadable_voxels"
"""Reason of a scan whose voxels could not be read; its verdict is then unusable."""


def mark_unreadable(connection: Connection, images: Sequence[int]) -> int:
    """Give scans the reason and the verdict; how many did not have them yet."""
    from sqlalchemy import text

    marked = connection.execute(
        text(
            "UPDATE omop.image_occurrence SET verdict = 'unusable', reasons = reasons || CAST(:reason AS text) "
            "WHERE image_occurrence_id = ANY(:images) AND NOT :reason = ANY(reasons)"
        ),
        {"images": list(images), "reason": UNREADABLE},
    )
    return int(marked.rowcount)


def clear_unreadable(connection: Connection, images: Sequence[int], unusable: Collection[str]) -> int:
    """Take reason and verdict back from scans that can be read now; how many had them.

    Args:
        connection: in a transaction.
        images: image_occurrence_id of scans whose voxels were read.
        unusable: the other reasons that make a scan unusable.
    """
    from sqlalchemy import text

    cleared = connection.execute(
        text(
            "UPDATE omop.image_occurrence SET reasons = array_remove(reasons, :reason), "
            "verdict = CASE WHEN array_remove(reasons, :reason) = '{}' THEN 'ok' "
            "WHEN array_remove(reasons, :reason) && CAST(:unusable AS text[]) THEN 'unusable' ELSE 'suspect' END "
            "WHERE image_occurrence_id = ANY(:images) AND :reason = ANY(reasons)"
        ),
        {"images": list(images), "reason": UNREADABLE, "unusable": sorted(unusable)},
    )
    return int(cleared.rowcount)
