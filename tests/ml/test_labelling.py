"""The kernel against the slow oracle, over timelines that hypothesis draws."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.tasks import TaskSpec
from ml.labelling import (
    DAY_SECONDS,
    NEVER,
    STATUSES,
    ConceptTasks,
    LabelArrays,
    Labeller,
    MemberRows,
    SparseLabels,
    TaskRules,
    merge_events,
    task_outcomes,
)
from tests.reference import labels as oracle

EPOCH = dt.datetime(1970, 1, 1)
CONCEPTS = [-2_000_000_000, -1, 1, 2, 2_000_000_000]

# A coarse grid around 1970 and one 80 years later: ties, shared days, times before the epoch, spans beyond int32.
days = st.one_of(st.integers(-3, 9), st.sampled_from([400, 29_220]))
moments = st.tuples(days, st.sampled_from([0, 1, 43_199, 43_200, 86_398, 86_399, None])).map(
    lambda t: (EPOCH + dt.timedelta(days=t[0], seconds=86_399 if t[1] is None else t[1]), t[1] is None)
)
events = st.lists(
    st.tuples(moments, st.sampled_from(CONCEPTS)).map(lambda t: oracle.Event(t[0][0], t[1], t[0][1])), max_size=9
)


@st.composite
def members(draw: st.DrawFn) -> oracle.Member:
    index, date_only = draw(moments)
    end, cut = draw(moments)[0], draw(st.none() | moments.map(lambda m: m[0]))
    return oracle.Member(
        index=index,
        index_date_only=date_only,
        end=end,
        cut_end=cut,
        eligible=draw(st.booleans()) or end > index,
        observed_from=draw(st.none() | moments.map(lambda m: m[0])),
    )


@st.composite
def specs(draw: st.DrawFn) -> TaskSpec:
    prior = draw(st.sampled_from(["exclude", "keep"]))
    return TaskSpec(
        name="t",
        concepts=tuple(c for c in draw(st.lists(st.sampled_from([1, 2]), min_size=1, max_size=2, unique=True))),
        prior=prior,
        prior_days=draw(st.none() | st.integers(0, 3)) if prior == "exclude" else None,
        same_day=draw(st.sampled_from(["exclude", "after"])),
        start_seconds=draw(st.sampled_from([0, 1, 43_199, 86_400, 172_800])),
        washout_days=draw(st.none() | st.integers(0, 3)),
        min_follow_up_days=draw(st.none() | st.integers(0, 3)),
        follow_up=draw(st.sampled_from(["cohort", "data_cut"])),
        death=draw(st.sampled_from(["censor", "competing"])),
    )


@st.composite
def persons(draw: st.DrawFn) -> tuple[oracle.Person, list[oracle.Member]]:
    """A person with scans, whose follow-up a death ends."""
    death = draw(st.none() | moments)
    person = oracle.Person(events=draw(events), death=death and death[0], death_date_only=bool(death and death[1]))
    scans = draw(st.lists(members(), max_size=3))
    if person.death is not None:
        scans = [
            replace(m, end=min(m.end or person.death, person.death), cut_end=m.cut_end and min(m.cut_end, person.death))
            for m in scans
        ]
    return person, scans


Cohort = list[tuple[oracle.Person, list[oracle.Member]]]


def seconds(time: dt.datetime) -> int:
    return round((time - EPOCH).total_seconds())


def rules_of(tasks: list[TaskSpec]) -> TaskRules:
    def each(value: Any) -> np.ndarray[Any, Any]:
        return np.array([value(t) for t in tasks], np.int64)

    return TaskRules(
        start_seconds=each(lambda t: t.start_seconds),
        look_back_seconds=each(lambda t: NEVER // 2 if t.prior_days is None else t.prior_days * DAY_SECONDS),
        same_day_after=each(lambda t: t.same_day == "after").astype(bool),
        excludes_prior=each(lambda t: t.prior == "exclude").astype(bool),
        competing=each(lambda t: t.death == "competing").astype(bool),
        to_data_cut=each(lambda t: t.follow_up == "data_cut").astype(bool),
        washout_seconds=each(lambda t: (t.washout_days or 0) * DAY_SECONDS),
        min_follow_up_seconds=each(
            lambda t: -NEVER if t.min_follow_up_days is None else t.min_follow_up_days * DAY_SECONDS
        ),
        clock=np.full(len(tasks), -1),
    )


def rows_of(cohort: Cohort) -> MemberRows:
    flat = [(n, person, member) for n, (person, scans) in enumerate(cohort) for member in scans]

    def each(value: Any) -> np.ndarray[Any, Any]:
        return np.array([value(*entry) for entry in flat], np.int64)

    index = each(lambda n, p, m: seconds(m.index))
    day = index // DAY_SECONDS * DAY_SECONDS
    return MemberRows(
        index=index,
        end=each(lambda n, p, m: seconds(m.end)),
        cut_end=each(lambda n, p, m: seconds(m.cut_end or m.end)),
        death=each(lambda n, p, m: NEVER if p.death is None else seconds(p.death)),
        eligible=each(lambda n, p, m: m.eligible).astype(bool),
        observed_from=np.minimum(each(lambda n, p, m: seconds(m.observed_from or m.index)), index),
        visit_from=day,
        visit_to=day + 86_399,
        split=each(lambda n, p, m: n % 3).astype(np.int8),
        person_row=each(lambda n, p, m: n),
        clocks=np.zeros((len(flat), 0, 2), np.int64),
    )


def packed(cohort: Cohort) -> tuple[Any, Any, Any]:
    coded = [sorted((seconds(e.time) * 2 + e.date_only, e.concept) for e in person.events) for person, _ in cohort]
    flat = [pair for person in coded for pair in person]
    return (
        np.array([t for t, _ in flat], np.int64),
        np.array([c for _, c in flat], np.int32),
        np.concatenate([[0], np.cumsum([len(person) for person in coded])]).astype(np.int64),
    )


def run(tasks: list[TaskSpec], cohort: Cohort) -> tuple[LabelArrays, SparseLabels, Labeller]:
    pairs = np.array([(c, k) for k, t in enumerate(tasks) for c in t.concepts], np.int64).reshape(-1, 2)
    labeller = Labeller(rules_of(tasks), ConceptTasks.of_pairs(pairs[:, 0], pairs[:, 1]))
    rows, (times, concepts, ptr) = rows_of(cohort), packed(cohort)
    lists = labeller.label(times, concepts, ptr, rows)
    rules = rules_of(tasks)
    arrays = LabelArrays(
        member=np.arange(len(rows.index)),
        eligible=rows.eligible,
        events=lists.events,
        priors=lists.priors,
        ineligibles=lists.ineligibles,
        windows=lists.windows,
        visits=lists.visits,
        follow_up_seconds=rows.end - rows.index,
        data_cut_seconds=rows.cut_end - rows.index,
        death_seconds=np.where(rows.death == NEVER, -1, rows.death - rows.index),
        start_seconds=rules.start_seconds,
        excludes_prior=rules.excludes_prior,
        competing=rules.competing,
        to_data_cut=rules.to_data_cut,
    )
    return arrays, lists, labeller


def expected_of(task: TaskSpec, person: oracle.Person, member: oracle.Member) -> oracle.Label:
    observed = member.observed_from or member.index
    return oracle.label(task, replace(member, observed_from=min(observed, member.index)), person, oracle.Vocabulary())


@settings(max_examples=400, deadline=None)
@given(st.lists(specs(), min_size=1, max_size=4), st.lists(persons(), max_size=4))
def test_the_kernel_agrees_with_the_oracle(tasks: list[TaskSpec], cohort: Cohort) -> None:
    arrays, _, labeller = run(tasks, cohort)
    flat = [(n, person, member) for n, (person, scans) in enumerate(cohort) for member in scans]
    tally = np.zeros_like(labeller.counts)
    met: set[tuple[int, int, int]] = set()
    for k, task in enumerate(tasks):
        outcomes = task_outcomes(arrays, k)
        for row, (n, person, member) in enumerate(flat):
            want = expected_of(task, person, member)
            assert STATUSES[outcomes.status[row]] == want.status
            time = outcomes.time_days[row] * DAY_SECONDS
            assert want.seconds is None if np.isnan(time) else round(time) == want.seconds
            for sparse, has in ((arrays.priors, want.prior), (arrays.visits, want.in_visit)):
                assert (k in sparse.task[sparse.ptr[row] : sparse.ptr[row + 1]]) == has
            status = STATUSES.index(want.status)
            tally[n % 3, status, 0, k] += 1
            tally[n % 3, status, 1, k] += (n, status, k) not in met
            met.add((n, status, k))
            if want.seconds is not None:
                tally[n % 3, status, 2, k] += want.seconds - want.opens
    assert (labeller.counts == tally).all()


@settings(max_examples=100, deadline=None)
@given(specs(), st.lists(persons(), min_size=1, max_size=3), events)
def test_later_events_change_no_history_and_earlier_ones_change_only_history(
    task: TaskSpec, cohort: Cohort, more: list[oracle.Event]
) -> None:
    before, *_ = run([task], cohort)
    person, scans = cohort[0]
    if not scans:
        return
    window = scans[0].index + dt.timedelta(seconds=task.start_seconds)
    later = [e for e in more if e.time > window and e.time.date() > scans[0].index.date()]
    earlier = [e for e in more if e.time <= scans[0].index and e.time.date() < scans[0].index.date()]
    same_scan = [(person, scans[:1]), *cohort[1:]]
    base, *_ = run([task], same_scan)
    after, *_ = run([task], [(replace(person, events=[*person.events, *later]), scans[:1]), *cohort[1:]])
    assert after.priors.task.tolist() == base.priors.task.tolist()
    kept = [replace(task, prior="keep", prior_days=None)]
    base, *_ = run(kept, same_scan)
    after, *_ = run(kept, [(replace(person, events=[*person.events, *earlier]), scans[:1]), *cohort[1:]])
    assert after.events.task.tolist() == base.events.task.tolist()
    assert after.events.seconds is not None and base.events.seconds is not None
    assert after.events.seconds.tolist() == base.events.seconds.tolist()
    assert len(before.member) == sum(len(s) for _, s in cohort)


def test_output_lists_grow_as_needed() -> None:
    """Far more entries than the lists first have room for."""
    tasks = [TaskSpec(name=f"t{k}", concepts=(k + 1,), prior="keep", same_day="after") for k in range(1500)]
    person = oracle.Person(
        events=[oracle.Event(EPOCH + dt.timedelta(days=d), k + 1) for k in range(1500) for d in (1, 3)]
    )
    member = oracle.Member(index=EPOCH + dt.timedelta(days=2), end=EPOCH + dt.timedelta(days=9))
    arrays, *_ = run(tasks, [(person, [member] * 40)])
    assert arrays.events.ptr.tolist() == arrays.priors.ptr.tolist() == list(range(0, 1500 * 41, 1500))
    assert arrays.events.task.tolist() == list(range(1500)) * 40
    assert set(arrays.events.seconds.tolist()) == {DAY_SECONDS}  # type: ignore[union-attr]


def test_a_follow_up_of_eighty_years_keeps_every_second() -> None:
    far = EPOCH + dt.timedelta(days=29_220, seconds=7)
    person = oracle.Person(events=[oracle.Event(far, 1)])
    member = oracle.Member(index=EPOCH, end=far)
    arrays, *_ = run([TaskSpec(name="t", concepts=(1,))], [(person, [member])])
    assert arrays.events.seconds is not None and arrays.events.seconds.tolist() == [29_220 * DAY_SECONDS + 7]


@pytest.mark.parametrize(("late", "status"), [(0, "ineligible"), (1, "censored")])
def test_a_follow_up_that_ends_as_the_window_opens_was_never_at_risk(late: int, status: str) -> None:
    task = TaskSpec(name="t", concepts=(1,), start_seconds=86_400)
    member = oracle.Member(index=EPOCH, end=EPOCH + dt.timedelta(seconds=86_400 + late))
    arrays, _, labeller = run([task], [(oracle.Person(), [member])])
    assert labeller.counts[0, :, 0, 0].tolist() == [int(s == status) for s in STATUSES]
    assert STATUSES[task_outcomes(arrays, 0).status[0]] == status
    assert labeller.counts[0, :, 2, 0].sum() == late


def test_no_tasks_and_no_members_are_no_error() -> None:
    arrays, *_ = run([], [(oracle.Person(), [oracle.Member(index=EPOCH, end=EPOCH)])])
    assert arrays.events.ptr.tolist() == [0, 0]
    arrays, *_ = run([TaskSpec(name="t", concepts=(1,))], [])
    assert arrays.events.ptr.tolist() == [0]


def test_arrays_that_do_not_fit_are_refused() -> None:
    rows, (times, concepts, ptr) = rows_of([]), packed([])
    labeller = run([], [])[2]
    with pytest.raises(ValueError, match="as many times as concepts"):
        labeller.label(np.zeros(3, np.int64), concepts, ptr, rows)
    with pytest.raises(ValueError, match="position from 0 to"):
        task_outcomes(run([], [])[0], 0)
    assert len(times) == 0


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=12), st.lists(st.integers(0, 3), max_size=8))
def test_merged_events_stay_with_their_person(events_: list[tuple[int, int]], more: list[int]) -> None:
    events_.sort()
    ptr = np.searchsorted([p for p, _ in events_], np.arange(5))
    more.sort()
    times, concepts, merged = merge_events(
        np.array([t for _, t in events_], np.int64), np.ones(len(events_), np.int32), ptr,
        np.array(more, np.int64), np.arange(len(more), dtype=np.int64) + 100, np.full(len(more), -1, np.int32),
    )  # fmt: skip
    for person in range(4):
        stretch = times[merged[person] : merged[person + 1]].tolist()
        own = [t for p, t in events_ if p == person]
        added = [100 + n for n, p in enumerate(more) if p == person]
        assert stretch == own + added
    assert (concepts == -1).sum() == len(more)
