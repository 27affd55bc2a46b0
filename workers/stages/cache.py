"""Stage `cache`: volumes of a cohort's scans, made ahead of the trainings and embeddings that read them."""

from __future__ import annotations

from typing import Any

from app.errors import InputError
from app.store import names
from app.store.work import Work
from ml.config import read_recipe
from workers.bridge import read_scans
from workers.scan_volumes import prepare


def cache(work: Work) -> dict[str, Any]:
    """Decode what the cache lacks of the scans of `args["cohort"]`, as `args["encoder"]` with `args["set"]` sees them.

    Raises:
        InputError: unknown names or settings, no room, no scan, or too many unreadable ones.
    """
    try:
        recipe = read_recipe(str(work.args["encoder"]), work.args.get("set") or {})
    except ValueError as error:
        raise InputError(str(error)) from None
    with work.connect() as connection:
        cohort = names.find(connection, "cohort", str(work.args["cohort"]))
        scans = read_scans(connection, work.settings, cohort.id)
    volumes = prepare(work, recipe, scans)
    return {
        "cohort": str(work.args["cohort"]),
        "recipe": volumes.cache.folder.name,
        "num_scans": len(scans),
        "num_volumes": len({cached.file for cached in volumes.cached.values()}),
        "num_made": volumes.num_made,
        "unchanged": volumes.num_made == 0 and not volumes.failed,
        **volumes.failures(),
    }
