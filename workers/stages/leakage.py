"""Stage `leakage`: checks that no future shows in features, no past in labels, no scan in two splits."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from app.errors import InputError
from app.store import leakage as store
from app.store.leakage import NEAR_SHARE, SLACK_DAYS, Answer, Check, pair
from app.store.scan_days import count_scan_days
from app.store.work import Work
from workers.bridge import LabelSetInfo, find_label_set
from workers.stages import leakage_controls, leakage_features, leakage_labels

if TYPE_CHECKING:
    from sqlalchemy import Connection

LABELS_LOOK_FORWARD = Check(
    name="labels_look_forward",
    asks="no outcome stands at or before the opening of its risk window",
    mend="label again: `lachesis label NAME --full`; rows of label.tte were changed by hand",
)
SCANS_MEET_RECORDS = Check(
    name="scans_meet_records",
    asks=f"{NEAR_SHARE:.0%} of scans have a CT procedure or a visit of their person within a day",
    mend="ask for records and images shifted by the same offset a person, and load them again",
)
PERSONS_IN_ONE_SPLIT = Check(
    name="persons_in_one_split",
    asks="a person's scans are in one split",
    mend="make the cohort again: `lachesis cohort NAME`; a list with splits must give a person one",
)
VOLUMES_IN_ONE_SPLIT = Check(
    name="volumes_in_one_split",
    asks="no file, series or content is in two splits",
    mend="make the cohort again, which keeps persons who share scans together, or load each scan for one person",
)


def leakage(work: Work) -> dict[str, Any]:
    """Check `args["labels"]`, the features of its cohort and the embeddings of `args["checkpoints"]`.

    Answers go to label.leakage_check.

    Raises:
        UnknownName: no such label set or checkpoint.
        InputError: a checkpoint has not embedded the cohort.
    """
    with work.connect() as connection:
        connection = connection.execution_options(isolation_level="REPEATABLE READ")
        info = find_label_set(connection, str(work.args.get("labels")))
        answers = ask(work, connection, info)
        connection.rollback()
    with work.transaction() as connection:
        store.keep(connection, info.label_set_id, answers, work.job_id)
    count = Counter(answer.verdict for answer in answers)
    verdicts = {verdict: count[verdict] for verdict in ("passed", "failed", "not_checked")}
    said = f"these {verdicts['passed']} checks passed" if verdicts["passed"] else "no check passed"
    said += f", {verdicts['failed']} failed, {verdicts['not_checked']} could not be made"
    checks = [asdict(answer) for answer in answers]
    return {"labels": info.name, "version": info.version, **verdicts, "checks": checks, "summary": said}


def ask(work: Work, connection: Connection, info: LabelSetInfo) -> list[Answer]:
    """All checks, one after the other."""
    checkpoints = [str(name) for name in work.args.get("checkpoints") or ()]
    if len(set(checkpoints)) < len(checkpoints):
        raise InputError("Expected each checkpoint once, got one twice; name others.")
    return [
        leakage_features.features_look_back(work, connection, info.cohort_id),
        labels_look_forward(connection, info.label_set_id),
        leakage_labels.labels_need_no_past(work, connection, info),
        scans_meet_records(connection, info.cohort_id),
        persons_in_one_split(connection, info.cohort_id),
        volumes_in_one_split(connection, info.cohort_id),
        leakage_features.no_feature_is_too_good(work, connection, info),
        leakage_controls.null_outcomes_tell_nothing(work, connection, info, checkpoints),
        leakage_controls.permuted_volumes_tell_nothing(connection, info.label_set_id),
    ]


def labels_look_forward(connection: Connection, label_set_id: int) -> Answer:
    """No outcome stands at or before the opening of its risk window."""
    rows, wrong = pair(connection, store.EARLY_OUTCOMES, label_set=label_set_id)
    return LABELS_LOOK_FORWARD.counted(rows, wrong, f"{wrong:,} of {rows:,} outcomes stand too early")


def scans_meet_records(connection: Connection, cohort_id: int) -> Answer:
    """Scans have a CT procedure or a visit near their day."""
    from sqlalchemy import text

    scans = [(row[0], row[1]) for row in connection.execute(text(store.SCAN_DAYS), {"cohort": cohort_id})]
    days = count_scan_days(connection, scans, slack_days=SLACK_DAYS)
    missing = days.scans - days.with_ct_or_visit
    found = f"{missing:,} of {days.scans:,} scans have neither; {days.with_ct:,} have a CT procedure (by {days.ct_by})"
    bound = int(np.floor(round((1 - NEAR_SHARE) * days.scans, 6)))
    return SCANS_MEET_RECORDS.counted(days.scans, missing, found, bound=bound)


def persons_in_one_split(connection: Connection, cohort_id: int) -> Answer:
    """No person has scans in two splits."""
    rows, wrong = pair(connection, store.SPLIT_PERSONS, cohort=cohort_id)
    return PERSONS_IN_ONE_SPLIT.counted(rows, wrong, f"{wrong:,} of {rows:,} persons are in several splits")


def volumes_in_one_split(connection: Connection, cohort_id: int) -> Answer:
    """No file, series or content is in two splits."""
    rows, wrong = pair(connection, store.SHARED_VOLUMES, cohort=cohort_id)
    found = f"{wrong:,} of {rows:,} files, series and digests of content are in several splits"
    return VOLUMES_IN_ONE_SPLIT.counted(rows, wrong, found)
