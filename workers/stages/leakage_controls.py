"""Checks of leakage by controls: outcomes permuted among persons, and encoders trained on permuted volumes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from app.store import leakage as store
from app.store.leakage import Answer, Check
from app.store.work import Work
from workers.bridge import LabelSetInfo

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from ml.metrics import Estimate

PERMUTATIONS = 5
"""An interval of 95 % misses .5 now and then; that most of five do is no accident."""
REPLICATES = 500
MOST_TASKS = 8
SEED = 0

NULL_OUTCOMES = Check(
    name="null_outcomes_tell_nothing",
    asks=f"with outcomes permuted among persons, .5 lies in the interval of the mean C in most of {PERMUTATIONS} "
    "permutations",
    mend="name checkpoints that have embedded the cohort with --checkpoint; where it fails, look for persons or scans "
    "in two splits",
)
PERMUTED_VOLUMES = Check(
    name="permuted_volumes_tell_nothing",
    asks="encoders trained on permuted volumes have a mean C within .05 of .5, and .5 in its interval",
    mend="train a control: `lachesis pretrain … --shuffle-volumes`, then embed and evaluate it",
)


def null_outcomes_tell_nothing(
    work: Work, connection: Connection, info: LabelSetInfo, checkpoints: Sequence[str]
) -> Answer:
    """The usual Cox head on train embeddings tells nothing about outcomes that were permuted among persons."""
    if not checkpoints:
        return NULL_OUTCOMES.not_made("no checkpoint was named; name those to check with --checkpoint")
    rows, wrong, said = 0, 0, []
    for name in checkpoints:
        scores = null_scores(work, connection, info, name)
        known = [(score.value, score.interval()) for score in scores if score.value is not None]
        if not known:
            said.append(f"{name}: {scores[0].reason}")
            continue
        off = sum(interval is None or not interval[0] <= 0.5 <= interval[1] for _, interval in known)
        rows += 1
        wrong += off > len(known) // 2
        mean = float(np.mean([value for value, _ in known if value is not None]))
        said.append(f"{name}: mean C {mean:.3f}, .5 in {len(known) - off} of {len(known)} intervals")
    if not rows:
        return NULL_OUTCOMES.not_made("; ".join(said))
    return NULL_OUTCOMES.counted(rows, wrong, "; ".join(said))


def null_scores(work: Work, connection: Connection, info: LabelSetInfo, checkpoint: str) -> list[Estimate]:
    """Mean C of a checkpoint's embeddings on the tasks with most held-out events, once a permutation."""
    from ml import controls
    from workers.stages import evaluate

    gathered = evaluate.gather(connection, work, f"{info.name}@{info.version}", {"arm": checkpoint})
    people, rows = evaluate.people_of(gathered)
    positions = evaluate.choose(gathered, MOST_TASKS)
    questions = [evaluate.question(gathered, rows, position, {}) for position in positions]
    return controls.null_scores(
        replace(people, voxels=None), questions, arm="arm", permutations=PERMUTATIONS, replicates=REPLICATES, seed=SEED,
        report=lambda done, total: work.progress(done, total, "fits", f"permuted outcomes, {checkpoint}"),
    )  # fmt: skip


def permuted_volumes_tell_nothing(connection: Connection, label_set_id: int) -> Answer:
    """Encoders trained on permuted volumes tell nothing."""
    from sqlalchemy import text

    rows = connection.execute(text(store.CONTROLS), {"label_set": label_set_id}).all()
    if not rows:
        return PERMUTED_VOLUMES.not_made("no such encoder was evaluated on these labels")
    wrong = [row for row in rows if abs(row.value - 0.5) > 0.05 or not row.ci_low <= 0.5 <= row.ci_high]
    said = "; ".join(f"{row.name}: mean C {row.value:.3f} ({row.ci_low:.3f} to {row.ci_high:.3f})" for row in rows)
    return PERMUTED_VOLUMES.counted(len(rows), len(wrong), said)
