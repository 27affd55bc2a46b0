"""Judging as a whole: what is estimable, what is compared with what, and on which scans."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ml.evaluate import HELD_OUT, ONE_SCAN, TRAIN, Evaluation, Key, People, Question, Result, evaluate
from ml.labelling import CENSORED, COMPETING, EVENT, INELIGIBLE, PRIOR


def people(n: int = 900, seed: int = 0, copies: int = 1) -> tuple[People, np.ndarray]:
    """Scans whose `seeing` embedding shows the latent that outcomes depend on; `blind` does not."""
    rng = np.random.default_rng(seed)
    persons = n // copies
    latent = rng.normal(size=persons)
    row = np.repeat(np.arange(persons), copies)
    split = rng.choice(3, persons, p=(0.6, 0.15, 0.25)).astype(np.int8)
    noise = rng.normal(size=(persons, 10))
    made = People(
        person=row * 7 + 3,
        split=split[row],
        index_seconds=np.arange(n) * 10,
        covariates=np.column_stack([rng.normal(60, 10, persons), rng.integers(0, 2, persons)])[row],
        images={"seeing": np.column_stack([latent, noise])[row], "blind": noise[row]},
    )
    return made, latent[row]


def question(latent: np.ndarray, name: str = "q", rate: float = 0.1, seed: int = 1, copies: int = 1) -> Question:
    rng = np.random.default_rng(seed)
    few = len(latent) // copies
    onset = np.repeat(rng.exponential(1 / rate, few), copies) * np.exp(-latent)
    end = np.repeat(rng.uniform(1, 8, few), copies)
    status = np.where(onset <= end, EVENT, CENSORED).astype(np.int8)
    return Question(name=name, horizons_days=[365], status=status, time_days=np.minimum(onset, end) * 365.25)


def run(made: People, *questions: Question, reference: str | None = "blind") -> Evaluation:
    return evaluate(made, questions, replicates=200, seed=0, arm="seeing", reference=reference)


def one(found: Evaluation, **wanted: object) -> Result:
    """The result that has these fields, and none of the others that would make it a difference."""
    fields = {"reference_arm": None, "reference_inputs": None, **wanted}
    key = Key(
        arm=fields.pop("arm", "seeing"), head=fields.pop("head", "cox"), inputs=fields.pop("inputs", "image"),
        metric=fields.pop("metric", "harrell_c"), horizon_days=fields.pop("horizon", None),
        subgroup=fields.pop("subgroup", None),
    )  # fmt: skip
    (result,) = (r for r in found.results if r.key == key and all(getattr(r, name) == v for name, v in fields.items()))
    return result


def test_a_difference_is_paired_and_narrower_than_its_parts() -> None:
    made, latent = people()
    found = run(made, question(latent))
    ours, theirs = one(found, task="q"), one(found, task="q", arm="blind")
    paired = one(found, task="q", reference_arm="blind")
    assert paired.value == pytest.approx(ours.value - theirs.value)
    assert paired.low > 0.1
    same = evaluate(
        replace(made, images={"seeing": made.images["seeing"], "blind": made.images["seeing"]}),
        [question(latent)], replicates=200, seed=0, arm="seeing", reference="blind",
    )  # fmt: skip
    nothing = one(same, task="q", reference_arm="blind")
    assert (nothing.value, nothing.low, nothing.high) == (0, 0, 0)


def test_means_leave_out_what_cannot_be_estimated_and_say_how_many_events_they_rest_on() -> None:
    made, latent = people()
    rare = question(latent, "rare", rate=1e-5)
    found = run(made, question(latent, "a"), question(latent, "b", seed=2), rare)
    assert found.num_estimable == 2
    mean = one(found, task=None, metric="mean_harrell_c")
    parts = [one(found, task=name) for name in ("a", "b")]
    assert mean.value == pytest.approx(np.mean([p.value for p in parts]))
    assert mean.num_events == sum(p.num_events for p in parts)
    missing = one(found, task="rare")
    assert missing.value is None and missing.low is None and "in train" in str(missing.reason)
    assert all((r.value is None) == (r.reason is not None) for r in found.results)


def test_nineteen_events_in_train_are_too_few_and_twenty_are_enough() -> None:
    made, latent = people()
    asked = question(latent)
    train = np.flatnonzero((made.split == TRAIN) & (asked.status == EVENT))
    for kept, estimable in ((19, 0), (20, 1)):
        status = asked.status.copy()
        status[train[kept:]] = CENSORED
        assert run(made, replace(asked, status=status)).num_estimable == estimable


def test_prior_and_ineligible_scans_are_never_looked_at() -> None:
    made, latent = people()
    asked = question(latent)
    out = np.arange(len(latent)) % 5 == 0
    status = np.where(out, np.where(latent > 0, PRIOR, INELIGIBLE), asked.status).astype(np.int8)
    plain = run(made, replace(asked, status=status, time_days=np.where(out, np.nan, asked.time_days)))
    wild = replace(made, images={k: np.where(out[:, None], 1e6, v) for k, v in made.images.items()})
    other = run(wild, replace(asked, status=status, time_days=np.where(out, 1e6, asked.time_days)))
    assert one(plain, task="q").value == one(other, task="q").value
    assert one(plain, task="q").n == int((~out & (made.split == HELD_OUT)).sum())
    assert all(not out[p.rows].any() for p in plain.predictions)


def test_a_competing_event_censors_the_cox_head() -> None:
    made, latent = people()
    asked = replace(question(latent), horizons_days=[1095])
    status = np.where((asked.status == CENSORED) & (latent < 0), COMPETING, asked.status).astype(np.int8)
    competing, censored = run(made, replace(asked, status=status)), run(made, asked)
    assert one(competing, task="q").value == one(censored, task="q").value
    wanted = {"task": "q", "metric": "auroc", "horizon": 1095}
    assert one(competing, **wanted).value != one(censored, **wanted).value
    kinds = {p.kind for p in competing.predictions if p.head == "logistic"}
    assert kinds == {"cumulative_incidence"}


def test_copied_scans_keep_the_width_of_every_interval() -> None:
    made, latent = people(600)
    rows = np.repeat(np.arange(600), 10)
    copied = replace(
        made, person=made.person[rows], split=made.split[rows], index_seconds=np.arange(6000),
        covariates=made.covariates[rows], images={k: v[rows] for k, v in made.images.items()},
    )  # fmt: skip
    asked = question(latent)
    many = replace(asked, status=asked.status[rows], time_days=asked.time_days[rows])
    narrow, wide = one(run(made, asked), task="q"), one(run(copied, many), task="q")
    assert wide.n == 10 * narrow.n and wide.num_persons == narrow.num_persons
    width, expected = wide.high - wide.low, narrow.high - narrow.low
    assert width == pytest.approx(expected, rel=0.1)


def test_one_scan_a_person_takes_the_earliest() -> None:
    made, latent = people(900, copies=2)
    asked = question(latent, copies=2)
    found = run(made, asked)
    alone = one(found, task="q", subgroup=ONE_SCAN)
    assert alone.n == alone.num_persons == one(found, task="q").n // 2
    late = made.images["seeing"].copy()
    late[1::2] = 0.0  # what the later scan of each person shows
    first = run(replace(made, index_seconds=np.arange(900)), asked)
    assert one(first, task="q", subgroup=ONE_SCAN).value == alone.value


def test_a_horizon_beyond_follow_up_has_a_reason_for_both_heads() -> None:
    made, latent = people()
    found = run(made, replace(question(latent), horizons_days=[365, 9000]))
    for head in ("cox", "logistic"):
        result = one(found, task="q", metric="auroc", horizon=9000, head=head)
        assert result.value is None and str(result.reason).startswith("horizon_beyond_follow_up: 9000 days")
    assert not [p for p in found.predictions if p.horizon_days == 9000]


def test_without_held_out_scans_or_embeddings_it_refuses_in_one_sentence() -> None:
    made, latent = people()
    with pytest.raises(ValueError, match="held-out scans"):
        run(replace(made, split=np.zeros(900, np.int8)), question(latent))
    with pytest.raises(ValueError, match="embeddings of unknown"):
        run(made, question(latent), reference="unknown")


def test_inputs_that_tell_nothing_rank_nobody() -> None:
    made, latent = people()
    unknown = replace(made, covariates=np.full((900, 2), np.nan), voxels=np.ones((900, 2)))
    found = run(unknown, question(latent))
    for inputs in ("age+sex", "voxels"):
        result = one(found, task="q", arm=None, inputs=inputs)
        assert (result.value, result.low, result.high) == (0.5, 0.5, 0.5)
        skill = one(found, task="q", arm=None, inputs=inputs, metric="ibs_skill")
        assert abs(skill.value) < 0.01


def test_no_tuning_scans_is_flagged_and_still_judged() -> None:
    made, latent = people()
    split = np.where(made.split == 1, TRAIN, made.split).astype(np.int8)
    result = one(run(replace(made, split=split), question(latent)), task="q")
    assert "untuned" in result.flags and result.value > 0.6
