"""Stage `leakage`: checks that no future shows in features, no past in labels, no scan in two splits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from app.store import leakage as store
from app.store.leakage import Answer, counted, pair
from app.store.scan_days import count_scan_days
from app.store.work import Work
from ml.labelling import CENSORED, EVENT, LabelArrays, task_outcomes
from workers.bridge import LabelSetInfo, find_label_set, read_labels
from workers.stages.features import asked_before, compute

if TYPE_CHECKING:
    from sqlalchemy import Connection

TOO_GOOD = 0.95
"""A single feature that tells who has the outcome better than this was probably recorded after it."""
FEWEST = 20
"""Events, and scans without, below which no share is estimated."""
MAX_TASKS = 50

Row = tuple[int, str, float]


def leakage(work: Work) -> dict[str, Any]:
    """Check `args["labels"]` and the features of its cohort; answers go to label.leakage_check.

    Raises:
        UnknownName: no such label set.
    """
    with work.connect() as connection:
        connection = connection.execution_options(isolation_level="REPEATABLE READ")
        info = find_label_set(connection, str(work.args.get("labels")))
        answers = list(ask(work, connection, info))
        connection.rollback()
    with work.transaction() as connection:
        store.keep(connection, info.label_set_id, answers, work.job_id)
    count = {verdict: sum(a.verdict == verdict for a in answers) for verdict in ("passed", "failed", "not_checked")}
    said = f"{count['passed']} checks passed, {count['failed']} failed, {count['not_checked']} could not be made"
    listed = [{field: getattr(a, field) for field in Answer.__dataclass_fields__} for a in answers]
    return {"labels": info.name, "version": info.version, **count, "checks": listed, "summary": said}


def ask(work: Work, connection: Connection, info: LabelSetInfo) -> list[Answer]:
    """All checks, one after the other."""
    asked, rows = store.stored_features(connection, info.cohort_id)
    labels = read_labels(connection, info)
    return [
        features_look_back(work, connection, info.cohort_id, asked, rows),
        labels_look_forward(connection, info.label_set_id),
        labels_of_the_future_alone(connection, info.label_set_id),
        scans_meet_records(connection, info.cohort_id),
        counted(
            "persons_in_one_split", "a person's scans are in one split",
            *pair(connection, store.SPLIT_PERSONS, cohort=info.cohort_id), "persons are in several splits",
        ),
        counted(
            "volumes_in_one_split", "no file, series or content is in two splits",
            *pair(connection, store.SHARED_VOLUMES, cohort=info.cohort_id), "volumes are in several splits",
        ),
        no_feature_is_too_good(info, labels, rows),
        controls_know_nothing(connection, info.label_set_id),
    ]  # fmt: skip


def features_look_back(
    work: Work, connection: Connection, cohort_id: int, asked: dict[str, Any] | None, rows: list[Row]
) -> Answer:
    """Features made anew without anything from the index on are those that are stored."""
    name, asks = "features_look_back", "features do not change when all events from the index on are taken away"
    if asked is None:
        return not_checked(name, asks, "the cohort has no features; `lachesis features COHORT` makes them")
    found = compute(work, connection, cohort_id, asked_before(connection, asked), truncate=True)
    keys = found.members.member.tolist()
    anew = {(keys[n], feature): value for feature, values in found.values.items() for n, value in values}
    stored = {(member, feature): value for member, feature, value in rows}
    wrong = sum(not same(anew.get(key), stored.get(key)) for key in anew.keys() | stored.keys())
    return counted(name, asks, len(anew.keys() | stored.keys()), wrong, "values of features differ")


def same(one: float | None, other: float | None) -> bool:
    """Equal as the four bytes of a real tell."""
    if one is None or other is None:
        return one is other
    return bool(np.float32(one) == np.float32(other))


def labels_look_forward(connection: Connection, label_set_id: int) -> Answer:
    """No outcome stands at or before the opening of its risk window."""
    return counted(
        "labels_look_forward", "no outcome stands at or before the opening of its risk window",
        *pair(connection, store.EARLY_OUTCOMES, label_set=label_set_id), "outcomes stand too early",
    )  # fmt: skip


def labels_of_the_future_alone(connection: Connection, label_set_id: int) -> Answer:
    """Outcomes found anew in rows after the index are those that are stored."""
    values = {"label_set": label_set_id, "members": store.SAMPLE_MEMBERS, "tasks": store.SAMPLE_TASKS}
    return counted(
        "labels_need_no_past", "outcomes do not change when all events up to the index are taken away",
        *pair(connection, store.RELABELLED, **values), "sampled outcomes differ",
    )  # fmt: skip


def scans_meet_records(connection: Connection, cohort_id: int) -> Answer:
    """Scans have a CT procedure or a visit on their day."""
    from sqlalchemy import text

    scans = [(row[0], row[1]) for row in connection.execute(text(store.SCAN_DAYS), {"cohort": cohort_id})]
    days = count_scan_days(connection, scans)
    bound = int((1 - store.SAME_DAY_SHARE) * days.scans)
    asks = f"{store.SAME_DAY_SHARE:.0%} of scans have a CT procedure or a visit of their person that day"
    missing = days.scans - days.with_ct_or_visit
    what = "scans have neither: records and images may carry different date shifts"
    return counted("scans_meet_records", asks, days.scans, missing, what, bound=bound)


def no_feature_is_too_good(info: LabelSetInfo, labels: LabelArrays, rows: list[Row]) -> Answer:
    """No single feature tells almost surely who has an outcome."""
    name, asks = "no_feature_is_too_good", f"no single feature tells an outcome with an AUC over {TOO_GOOD}"
    if not rows:
        return not_checked(name, asks, "the cohort has no features; `lachesis features COHORT` makes them")
    if len(info.task_names) > MAX_TASKS:
        return not_checked(name, asks, f"over {MAX_TASKS} tasks; ask a label set of clinical ones")
    place = {int(member): n for n, member in enumerate(labels.member.tolist())}
    columns: dict[str, NDArray[np.float64]] = {}
    for member, feature, value in rows:
        columns.setdefault(feature, np.zeros(len(place)))[place[member]] = value
    tried, suspects = 0, []
    for position, task in enumerate(info.task_names):
        status = task_outcomes(labels, position).status
        event, none = status == EVENT, status == CENSORED
        if min(event.sum(), none.sum()) < FEWEST:
            continue
        for feature, column in columns.items():
            tried += 1
            area = auc(column[event], column[none])
            if max(area, 1 - area) > TOO_GOOD:
                suspects.append(f"{feature} for {task} ({max(area, 1 - area):.3f})")
    answer = counted(name, asks, tried, len(suspects), "pairs of feature and task are too good")
    if not suspects:
        return answer
    return Answer(
        name=name, asks=asks, num_rows=tried, num_violations=len(suspects), verdict="failed",
        found=f"{answer.found}: {', '.join(suspects[:5])}",
    )  # fmt: skip


def auc(event: NDArray[np.float64], none: NDArray[np.float64]) -> float:
    """Chance that a scan with the event has the larger value, ties half."""
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([event, none]))
    return float((ranks[: len(event)].sum() - len(event) * (len(event) + 1) / 2) / (len(event) * len(none)))


def controls_know_nothing(connection: Connection, label_set_id: int) -> Answer:
    """Encoders trained on permuted volumes tell nothing."""
    from sqlalchemy import text

    name = "permuted_volumes_tell_nothing"
    asks = "encoders trained on permuted volumes have a mean C within .05 of .5, and .5 in its interval"
    rows = connection.execute(text(store.CONTROLS), {"label_set": label_set_id}).all()
    if not rows:
        said = "no such encoder was evaluated; `lachesis pretrain … --shuffle-volumes`, embed and evaluate one"
        return not_checked(name, asks, said)
    wrong = [row for row in rows if abs(row.value - 0.5) > 0.05 or not row.ci_low <= 0.5 <= row.ci_high]
    return counted(name, asks, len(rows), len(wrong), "permuted encoders tell something")


def not_checked(name: str, asks: str, why: str) -> Answer:
    """A check that could not be made."""
    return Answer(name=name, asks=asks, num_rows=0, num_violations=0, verdict="not_checked", found=why)
