"""femr's own next-occurrence times for some timelines: run apart, with femr's folder on the path.

Reads JSON from stdin: {"ancestors": {code: [codes]}, "persons": [{"events": [[seconds, code]], "indices": [seconds]}]}.
Writes, for each person and index, [censoring in seconds, {code: seconds}]. Only femr's `SurvivalCalculator` is used:
what its module imports beside (transformers, datasets, …) is replaced by empty modules.
"""

from __future__ import annotations

import datetime as dt
import json
import sys
import types
from collections.abc import Sequence
from typing import Any

EPOCH = dt.datetime(1970, 1, 1)


class Anything(types.ModuleType):
    """A module that has whatever is asked of it."""

    __path__: Sequence[str] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def main() -> None:
    femr = types.ModuleType("femr")
    femr.__path__ = [f"{sys.argv[1]}/femr"]
    sys.modules["femr"] = femr
    models = types.ModuleType("femr.models")
    models.__path__ = [f"{sys.argv[1]}/femr/models"]
    sys.modules["femr.models"] = femr.models = models  # type: ignore[attr-defined]
    for name in ("datasets", "meds", "torch", "femr.index", "femr.models.config", "femr.pat_utils", "femr.stat_utils"):
        sys.modules[name] = Anything(name)
    from femr.models.tasks import SurvivalCalculator  # type: ignore[import-not-found]

    given = json.load(sys.stdin)

    class Ontology:
        def get_all_parents(self, code: str) -> set[str]:
            return {code, *given["ancestors"].get(code, [])}

    found = []
    for person in given["persons"]:
        events = [
            {"time": EPOCH + dt.timedelta(seconds=at), "measurements": [{"code": code}]}
            for at, code in person["events"]
        ]
        answers = []
        calculator = SurvivalCalculator(Ontology(), {"patient_id": 1, "events": events})
        for index in person["indices"]:  # ascending: it forgets what is past
            censored, times = calculator.get_future_events_for_time(EPOCH + dt.timedelta(seconds=index))
            answers.append([censored.total_seconds(), {code: time.total_seconds() for code, time in times.items()}])
        found.append(answers)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
