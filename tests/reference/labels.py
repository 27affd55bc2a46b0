"""Labels the slow, obvious way, one member and task at a time, from docs/science.md sections 1 and 2 alone."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from app.tasks import TaskSpec, ValueRule
from app.tasks.concept_set import ConceptSetItem

DAY = dt.timedelta(days=1)
SECOND = dt.timedelta(seconds=1)
TRANSFER = dt.timedelta(hours=24)


@dataclass(frozen=True)
class Event:
    """A row of omop.event."""

    time: dt.datetime
    concept: int
    date_only: bool = False
    domain: str = "condition"
    source_concept: int = 0
    value: float | None = None
    unit: int | None = None
    value_concept: int | None = None
    visit: int | None = None


@dataclass(frozen=True)
class Visit:
    """A row of omop.visit_occurrence."""

    key: int
    concept: int
    start: dt.datetime
    end: dt.datetime | None
    start_date_only: bool = False
    end_date_only: bool = False

    @property
    def stop(self) -> dt.datetime:
        return self.end or self.start

    @property
    def stop_date_only(self) -> bool:
        return self.end_date_only if self.end else self.start_date_only


@dataclass(frozen=True)
class Person:
    """All that is recorded of a person."""

    events: Sequence[Event] = ()
    visits: Sequence[Visit] = ()
    periods: Sequence[tuple[dt.date, dt.date]] = ()
    death: dt.datetime | None = None
    death_date_only: bool = False


@dataclass(frozen=True)
class Member:
    """A scan, with the end of its follow-up under the cohort's rule."""

    index: dt.datetime
    index_date_only: bool = False
    end: dt.datetime | None = None
    cut_end: dt.datetime | None = None
    eligible: bool = True
    observed_from: dt.datetime | None = None


@dataclass(frozen=True)
class Label:
    """What became of one member under one task."""

    status: str
    seconds: int | None
    prior: bool
    opens: int
    in_visit: bool


@dataclass(frozen=True)
class Vocabulary:
    """Concepts and what they include."""

    descendants: Mapping[int, frozenset[int]] = field(default_factory=dict)
    source_concepts: Mapping[str, int] = field(default_factory=dict)
    """VOCABULARY/CODE → its concept."""
    maps_to: Mapping[int, frozenset[int]] = field(default_factory=dict)
    """Concept that is not standard → what it maps to."""
    invalid: frozenset[int] = frozenset()
    """Concepts that a concept set does not take as descendants."""

    def expand(self, concepts: Sequence[int], *, descendants: bool) -> set[int]:
        found = set(concepts)
        if descendants:
            for concept in concepts:
                found |= self.descendants.get(concept, frozenset())
        return found

    def of(self, task: TaskSpec) -> set[int]:
        """Standard concepts of a task, less what it excludes."""

        def named(concepts: Sequence[int], codes: Sequence[str]) -> set[int]:
            of_codes = [self.source_concepts[code] for code in codes]
            mapped = [to for concept in of_codes for to in self.maps_to.get(concept, ())]
            return self.expand([*concepts, *of_codes, *mapped], descendants=task.descendants)

        kept = named(task.concepts, task.vocabulary_codes) | self.of_items(
            i for i in task.concept_set if not i.excluded
        )
        away = named(task.exclude_concepts, task.exclude_vocabulary_codes)
        return kept - away - self.of_items(i for i in task.concept_set if i.excluded)

    def of_items(self, items: Iterable[ConceptSetItem]) -> set[int]:
        """Concepts of items of a concept set, each read by itself."""
        found: set[int] = set()
        for item in items:
            one = {item.concept_id} | (self.expand([item.concept_id], descendants=item.descendants) - self.invalid)
            found |= one
            if item.mapped:
                found |= {concept for concept, to in self.maps_to.items() if to & one}
        return found


def end_of_day(day: dt.date) -> dt.datetime:
    return dt.datetime.combine(day, dt.time()) + DAY - SECOND


def merge_periods(periods: Sequence[tuple[dt.date, dt.date]]) -> list[tuple[dt.date, dt.date]]:
    """Periods at most one day apart as one."""
    merged: list[tuple[dt.date, dt.date]] = []
    for start, end in sorted(periods):
        if merged and (start - merged[-1][1]).days <= 1:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def follow(person: Person, index: dt.datetime, index_date_only: bool, rule: str, cut: dt.date | None) -> Member:
    """The member a scan becomes under a cohort's rule of follow-up."""
    cut_end = end_of_day(cut) if cut else None
    period = next(
        (p for p in merge_periods(person.periods) if p[0] <= index.date() <= p[1]),
        None,
    )
    rule_end = {
        "observation_period": end_of_day(period[1]) if period else None,
        "last_event": max((e.time for e in person.events), default=None),
        "data_cut": cut_end,
    }[rule]
    if rule == "observation_period":
        observed = dt.datetime.combine(period[0], dt.time()) if period else None
    else:
        observed = min((e.time for e in person.events), default=None)
    end = None if rule_end is None else min(t for t in (rule_end, person.death, cut_end) if t is not None)
    return Member(
        index=index,
        index_date_only=index_date_only,
        end=end,
        cut_end=None if cut_end is None else min(t for t in (cut_end, person.death) if t is not None),
        eligible=end is not None and end >= index and end.date() > index.date(),
        observed_from=observed,
    )


def holds(start: dt.datetime, start_day: bool, stop: dt.datetime, stop_day: bool, member: Member) -> bool:
    """Does a span hold the index? Where only days are known, days decide."""
    after = start.date() <= member.index.date() if start_day or member.index_date_only else start <= member.index
    before = stop.date() >= member.index.date() if stop_day or member.index_date_only else stop >= member.index
    return after and before


def visit_of_index(person: Person, member: Member) -> Visit | None:
    """The visit that holds the index; of several the one that started last."""
    found = [v for v in person.visits if holds(v.start, v.start_date_only, v.stop, v.stop_date_only, member)]
    return min(found, key=lambda v: (-v.start.timestamp(), v.end or dt.datetime.max, v.key), default=None)


@dataclass
class Stay:
    """Inpatient visits without a gap of more than 24 hours."""

    start: dt.datetime
    start_date_only: bool
    stop: dt.datetime
    stop_date_only: bool


def stays(person: Person, concepts: set[int]) -> list[Stay]:
    found: list[Stay] = []
    wanted = [v for v in person.visits if v.concept in concepts]
    for v in sorted(wanted, key=lambda v: (v.start, v.stop, v.start_date_only)):
        if found and v.start <= found[-1].stop + TRANSFER:
            if (v.stop, v.stop_date_only) > (found[-1].stop, found[-1].stop_date_only):
                found[-1].stop, found[-1].stop_date_only = v.stop, v.stop_date_only
        else:
            found.append(Stay(v.start, v.start_date_only, v.stop, v.stop_date_only))
    return found


def discharge(person: Person, member: Member, concepts: set[int]) -> dt.datetime | None:
    """When the clock of a readmission starts; None: at the index."""
    visit = visit_of_index(person, member)
    ends = [
        s.stop
        for s in stays(person, concepts)
        if holds(s.start, s.start_date_only, s.stop, s.stop_date_only, member)
        or (visit is not None and member.index <= s.start <= visit.stop + TRANSFER)
    ]
    return max(ends) if ends else visit.stop if visit else None


def value_meets(event: Event, rule: ValueRule) -> bool:
    """Does a row's value meet one value rule?"""
    if rule.value_concepts and event.value_concept not in rule.value_concepts:
        return False
    if rule.unit is None:
        return True
    return (
        event.value is not None
        and rule.unit in ("any", event.unit or 0)
        and (rule.above is None or event.value > rule.above)
        and (rule.at_least is None or event.value >= rule.at_least)
        and (rule.below is None or event.value < rule.below)
        and (rule.at_most is None or event.value <= rule.at_most)
    )


def occurrences(task: TaskSpec, person: Person, words: Vocabulary) -> list[tuple[dt.datetime, bool]]:
    """(time, date_only) of all rows that are the task's outcome, anywhere in the record."""
    kinds = words.expand(task.visit_concepts, descendants=task.descendants)
    sources = {words.source_concepts[code] for code in task.source_codes}
    if not task.by_codes:
        if task.clock == "discharge":
            return [(s.start, s.start_date_only) for s in stays(person, kinds)]
        return [(v.start, v.start_date_only) for v in person.visits if v.concept in kinds]
    wanted = words.of(task)
    kind_of = {v.key: v.concept for v in person.visits}
    return [
        (e.time, e.date_only)
        for e in person.events
        if (e.concept in wanted or e.source_concept in sources)
        and (not task.domains or e.domain in task.domains)
        and (not kinds or (e.visit is not None and kind_of.get(e.visit) in kinds))
        and (not task.values or any(value_meets(e, rule) for rule in task.values))
    ]


def label(task: TaskSpec, member: Member, person: Person, words: Vocabulary) -> Label:
    """One member under one task."""
    rows = occurrences(task, person, words)
    kinds = words.expand(task.visit_concepts, descendants=task.descendants)
    clock = discharge(person, member, kinds) if task.clock == "discharge" else None
    opens = max((clock or member.index) + dt.timedelta(seconds=task.start_seconds), member.index)
    end = (member.cut_end or member.end) if task.follow_up == "data_cut" else member.end
    prior = any(is_history(task, member, opens, row) for row in rows)
    result = {
        "prior": prior,
        "opens": round((opens - member.index).total_seconds()),
        "in_visit": any(is_in_visit(person, member, row) for row in rows),
    }
    if not member.eligible or end is None or end <= opens or is_barred(task, member, person, end, clock):
        return Label(status="ineligible", seconds=None, **result)
    if prior and task.prior == "exclude":
        return Label(status="prior", seconds=None, **result)
    ahead = [
        time
        for time, date_only in rows
        if opens < time <= end and not (date_only and time.date() == member.index.date() and task.same_day == "exclude")
    ]
    if ahead:
        return Label(status="event", seconds=round((min(ahead) - member.index).total_seconds()), **result)
    if task.death == "competing" and person.death is not None and person.death <= end:
        seconds = round((person.death - member.index).total_seconds())
        return Label(status="competing", seconds=seconds, **result)
    return Label(status="censored", seconds=round((end - member.index).total_seconds()), **result)


def is_history(task: TaskSpec, member: Member, opens: dt.datetime, row: tuple[dt.datetime, bool]) -> bool:
    """Up to the opening of the window, or of the index day where that is all that is known of a row."""
    time, date_only = row
    same_day = date_only and time.date() == member.index.date() and task.same_day == "exclude"
    near = task.prior_days is None or time >= member.index - task.prior_days * DAY
    return (time <= opens or same_day) and near


def is_barred(task: TaskSpec, member: Member, person: Person, end: dt.datetime, clock: dt.datetime | None) -> bool:
    """Ineligible for this task alone: too little record, too little follow-up, or death in hospital."""
    seen_from = member.observed_from or dt.datetime.max
    if task.washout_days and (member.index < seen_from or member.index - seen_from < task.washout_days * DAY):
        return True
    if task.min_follow_up_days and end != person.death and end - member.index < task.min_follow_up_days * DAY:
        return True
    if clock is not None and person.death is not None:
        return person.death <= clock or (person.death_date_only and person.death.date() == clock.date())
    return False


def binary(found: Label, horizon_days: int) -> str:
    """What a label says at a horizon."""
    if found.seconds is None:
        return found.status
    if found.status == "event" and found.seconds <= horizon_days * 86_400:
        return "event"
    if found.status == "competing" or found.seconds >= horizon_days * 86_400:
        return "negative"
    return "censored"


def is_in_visit(person: Person, member: Member, row: tuple[dt.datetime, bool]) -> bool:
    """Within the visit that holds the index, else on the index day; a date-only row by its day."""
    time, date_only = row
    visit = visit_of_index(person, member)
    if visit is None:
        return time.date() == member.index.date()
    start = dt.datetime.combine(visit.start.date(), dt.time()) if visit.start_date_only else visit.start
    if date_only and time.date() == visit.stop.date():
        return time >= start
    return start <= time <= visit.stop
