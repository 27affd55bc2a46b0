"""Stage `load`: hand the work to the loader it names."""

from __future__ import annotations

import importlib
from typing import Any

from app.errors import UnknownName
from app.loading import LOADERS
from app.store.work import Work


def load(work: Work) -> dict[str, Any]:
    """Load what `args["what"]` names."""
    what = str(work.args.get("what"))
    if what not in LOADERS:
        raise UnknownName("loader", what, LOADERS)
    result: dict[str, Any] = importlib.import_module(LOADERS[what]).load(work)
    return result
