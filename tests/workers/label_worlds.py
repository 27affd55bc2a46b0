"""Small stores that hypothesis draws: persons, their scans, a rule of follow-up and tasks, and what becomes of them."""

from __future__ import annotations

import dataclasses
import datetime as dt
import itertools
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import strategies as st
from sqlalchemy import Connection

from app.tasks import TaskSpec
from app.tasks.concept_set import ConceptSetItem
from app.tasks.spec import DEATH, DOMAINS
from tests.app.store.records import Records
from tests.reference import labels as oracle

START = dt.datetime(1969, 12, 28)
"""Times fall on both sides of 1970."""
FAR = 29_220
"""80 years in days: more seconds than fit in 32 bits."""
DAY = dt.timedelta(days=1)

ROOT, CHILD, GRANDCHILD, OTHER, WITHDRAWN, LAB, SOURCE = 100, 101, 102, 103, 104, 300, 2_000_000_001
INPATIENT, WARD, EMERGENCY, OFFICE = 9201, 8717, 262, 9202
GRAM, CODED = 8713, 45
CONCEPTS = (ROOT, CHILD, GRANDCHILD, OTHER, WITHDRAWN, LAB, INPATIENT, WARD, EMERGENCY, OFFICE)
ANCESTORS = [(ROOT, CHILD, 1), (ROOT, GRANDCHILD, 2), (CHILD, GRANDCHILD, 1), (ROOT, ROOT, 0), (INPATIENT, WARD, 1)]
ANCESTORS += [(ROOT, WITHDRAWN, 1)]
WORDS = oracle.Vocabulary(
    descendants={
        ROOT: frozenset({CHILD, GRANDCHILD, WITHDRAWN}),
        CHILD: frozenset({GRANDCHILD}),
        INPATIENT: frozenset({WARD}),
    },
    source_concepts={f"SNOMED/c{c}": c for c in CONCEPTS} | {f"ICD10CM/c{SOURCE}": SOURCE},
    maps_to={SOURCE: frozenset({CHILD})},
    invalid=frozenset({WITHDRAWN}),
)
PERSON_IDS = (1, 2, -7, 2**53 + 1, -(2**63) + 5)
HORIZONS = (1, 2, 400, FAR)

Moment = tuple[dt.datetime, bool]


@dataclass
class World:
    """A store as one draws it."""

    persons: dict[int, oracle.Person]
    scans: dict[int, list[Moment]]
    tasks: list[TaskSpec]
    follow_up: str
    cut: dt.date | None

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """How hypothesis shows it: line by line what is not as usual, so that a case that shrank can be read."""
        printer.text(self.shown())

    def shown(self) -> str:
        lines = [f"follow-up {self.follow_up}, data cut {self.cut}"]
        for number, person in self.persons.items():
            lines.append(f"person {number}")
            lines += [f"  scan {_shown(*scan)}" for scan in self.scans[number]]
            lines += [f"  period {first} to {last}" for first, last in person.periods]
            lines += [
                f"  visit {v.key} of {v.concept}: {_shown(v.start, v.start_date_only)} to "
                f"{v.end and _shown(v.end, v.end_date_only)}"
                for v in person.visits
            ]
            for e in person.events:
                usual = {"time", "concept", "date_only"}
                more = {
                    f.name: getattr(e, f.name)
                    for f in dataclasses.fields(e)
                    if f.name not in usual and getattr(e, f.name) != f.default
                }
                lines.append(f"  event {_shown(e.time, e.date_only)} {e.concept} {more or ''}".rstrip())
        plain = {f.name: f.default for f in dataclasses.fields(TaskSpec)}
        for task in self.tasks:
            fields = {k: v for k, v in dataclasses.asdict(task).items() if v != plain[k]}
            lines.append(f"task {fields}")
        return "\n" + "\n".join(lines)

    def write(self, records: Records) -> None:
        """Into a store that has the vocabulary alone."""
        for number, person in self.persons.items():
            records.person(number, birth=str(person.events[0].time) if person.events else None)
            for first, last in person.periods:
                records.period(number, first, last)
            for v in person.visits:
                records.visit(
                    number, v.start, v.end, v.concept,
                    key=v.key, date_only=v.start_date_only, end_date_only=v.end_date_only,
                )  # fmt: skip
            for e in person.events:
                if e.domain != "visit":
                    records.event(
                        number, e.time, e.concept, date_only=e.date_only, domain=DOMAINS[e.domain],
                        source=e.source_concept, value=e.value, unit=e.unit, coded=e.value_concept, visit=e.visit,
                    )  # fmt: skip
            for n, (time, date_only) in enumerate(self.scans[number]):
                name = f"{number}_{n}.nii"
                records.scan(number, time, date_only=date_only, path=name, image_key=f"i/{name}")
        records.pack()

    def expected(self) -> dict[tuple[int, dt.datetime, bool, str], tuple[oracle.Member, oracle.Label]]:
        """What the oracle says, by person, index and task; scans of one moment have equal labels."""
        found = {}
        for number, person in self.persons.items():
            whole = in_whole_seconds(person)
            for time, date_only in self.scans[number]:
                member = oracle.follow(whole, time, date_only, self.follow_up, self.cut)
                for task in self.tasks:
                    found[number, time, date_only, task.name] = member, oracle.label(task, member, whole, WORDS)
        return found


def _shown(time: dt.datetime, date_only: bool) -> str:
    return str(time.date()) if date_only else str(time)


def in_whole_seconds(person: oracle.Person) -> oracle.Person:
    """Times count to the second that has begun."""
    return replace(
        person,
        events=[replace(e, time=e.time.replace(microsecond=0)) for e in person.events],
        death=person.death and person.death.replace(microsecond=0),
    )


def write_vocabulary(connection: Connection) -> Records:
    """A store with concepts, and nobody in it."""
    records = Records(connection)
    records.concepts(CONCEPTS)
    records.concepts([SOURCE], "ICD10CM", None)
    records.ancestors(ANCESTORS)
    records.do("UPDATE omop.concept SET invalid_reason = 'D' WHERE concept_id = :id", id=WITHDRAWN)
    records.do(
        "INSERT INTO omop.concept_relationship (concept_id_1, concept_id_2, relationship_id) "
        "VALUES (:a, :b, 'Maps to')",
        a=SOURCE, b=CHILD,
    )  # fmt: skip
    return records


day_numbers = st.one_of(st.integers(0, 9), st.sampled_from([400, FAR]))
seconds_of_day = st.sampled_from([0, 1, 43_199, 43_200, 43_200, 43_201, 86_398, 86_399])


@st.composite
def moments(draw: st.DrawFn, *, fractions: bool = False) -> Moment:
    """A time on a coarse grid, so that ties and shared days are common; often a day alone."""
    day = START + draw(day_numbers) * DAY
    if draw(st.integers(0, 2)) == 2:
        return day + dt.timedelta(seconds=86_399), True
    time = day + dt.timedelta(seconds=draw(seconds_of_day))
    return time + dt.timedelta(microseconds=draw(st.sampled_from([0, 0, 0, 600_000])) if fractions else 0), False


@st.composite
def visits(draw: st.DrawFn, key: int) -> oracle.Visit:
    """Also without an end, overlapping, a day apart, and ending before they start."""
    start, start_date_only = draw(moments())
    length = draw(st.sampled_from([None, 0, 1, 4 * 3600, 86_400, 86_401, 3 * 86_400, 400 * 86_400, -3600, -200_000]))
    end, end_date_only = None, False
    if length is not None:
        end = start + dt.timedelta(seconds=length)
        end_date_only = draw(st.booleans())
        end = oracle.end_of_day(end.date()) if end_date_only else end
    kind = draw(st.sampled_from([INPATIENT, WARD, EMERGENCY, OFFICE]))
    return oracle.Visit(key, kind, start, end, start_date_only, end_date_only)


@st.composite
def events(draw: st.DrawFn, visit_keys: list[int]) -> oracle.Event:
    time, date_only = draw(moments(fractions=True))
    concept = draw(st.sampled_from([ROOT, CHILD, GRANDCHILD, OTHER, WITHDRAWN, LAB, SOURCE, 0, DEATH]))
    lab = concept == LAB
    return oracle.Event(
        time,
        concept,
        date_only,
        draw(st.sampled_from(["condition", "procedure", "drug", "device", "visit_detail"])),
        draw(st.sampled_from([0, SOURCE])),
        draw(st.sampled_from([None, 6.9, 7.1, 12.0])) if lab else None,
        draw(st.sampled_from([None, GRAM])) if lab else None,
        draw(st.sampled_from([None, CODED])) if lab else None,
        draw(st.sampled_from([None, *visit_keys])),
    )


@st.composite
def persons(draw: st.DrawFn, visit_keys: itertools.count[int]) -> oracle.Person:
    """Somebody of whom little or nothing may be known."""
    stays = [draw(visits(next(visit_keys))) for _ in range(draw(st.integers(0, 3)))]
    rows = draw(st.lists(events([v.key for v in stays]), max_size=6))
    death, death_date_only = draw(st.none() | moments(fractions=True)) or (None, False)
    if death is not None:
        rows.append(oracle.Event(death, DEATH, death_date_only, "death"))
    rows += [oracle.Event(v.start, v.concept, v.start_date_only, "visit", visit=v.key) for v in stays]
    periods = []
    for _ in range(draw(st.sampled_from([1, 0, 2, 3]))):
        first = START.date() + draw(st.integers(-2, 9)) * DAY
        periods.append((first, first + draw(st.sampled_from([0, 1, 2, 10, 400, FAR])) * DAY))
    return oracle.Person(rows, stays, periods, death, death_date_only)


values = st.lists(
    st.sampled_from(
        [
            {"below": 7.1, "unit": GRAM},
            {"at_most": 7.1, "above": 6.9, "unit": "any"},
            {"at_least": 7.1, "unit": 0},
            {"value_concepts": [CODED]},
            {"above": 1, "unit": "any", "value_concepts": [CODED]},
            {"below": 12, "unit": f"SNOMED/c{LAB}"},
        ]
    ),
    max_size=2,
)


def _item(concept: int, **flags: bool) -> ConceptSetItem:
    return ConceptSetItem(concept_id=concept, **flags)


what = st.one_of(
    st.lists(st.sampled_from([ROOT, CHILD, OTHER, LAB, DEATH]), min_size=1, max_size=2, unique=True).map(
        lambda c: {"concepts": c}
    ),
    st.sampled_from(
        [
            {"vocabulary_codes": [f"SNOMED/c{CHILD}"]},
            {"source_codes": [f"ICD10CM/c{SOURCE}"]},
            {"source_codes": [f"ICD10CM/c{SOURCE}"], "concepts": [OTHER]},
            {"concepts": [ROOT], "exclude_concepts": [CHILD]},
            {"concepts": [ROOT], "exclude_vocabulary_codes": [f"SNOMED/c{GRANDCHILD}"]},
            {"visit_concepts": [INPATIENT]},
            {"visit_concepts": [INPATIENT, EMERGENCY]},
            {"vocabulary_codes": [f"ICD10CM/c{SOURCE}"]},
            {"source_codes": [f"ICD10CM/c{SOURCE}"], "concepts": [ROOT], "exclude_concepts": [CHILD]},
        ]
    ),
    st.sampled_from(
        [
            [_item(ROOT, descendants=True)],
            [_item(ROOT, descendants=True), _item(CHILD, excluded=True)],
            [_item(ROOT), _item(CHILD, descendants=True, mapped=True)],
            [_item(CHILD, mapped=True), _item(ROOT, descendants=True, excluded=True)],
            [_item(ROOT, descendants=True, mapped=True), _item(CHILD, mapped=True, excluded=True)],
        ]
    ).flatmap(
        lambda items: st.sampled_from([{}, {"concepts": [OTHER]}, {"exclude_concepts": [GRANDCHILD]}]).map(
            lambda more: {"concept_set": items} | more
        )
    ),
)


@st.composite
def specs(draw: st.DrawFn, name: str) -> TaskSpec:
    """A task with any of its fields."""
    fields: dict[str, Any] = {"name": name} | draw(what)
    fields["prior"] = draw(st.sampled_from(["exclude", "keep"]))
    fields["same_day"] = draw(st.sampled_from(["exclude", "after"]))
    fields["start_seconds"] = draw(st.sampled_from([0, 0, 1, 43_199, 86_400, 172_800]))
    fields["follow_up"] = draw(st.sampled_from(["cohort", "data_cut"]))
    fields["descendants"] = draw(st.sampled_from([True, True, False]))
    fields["washout_days"] = draw(st.sampled_from([None, None, 0, 1, 5]))
    fields["min_follow_up_days"] = draw(st.sampled_from([None, None, 0, 1, 5, 400]))
    if fields["prior"] == "exclude":
        fields["prior_days"] = draw(st.sampled_from([None, None, 0, 1, 3]))
    if DEATH not in fields.get("concepts", []):
        fields["death"] = draw(st.sampled_from(["censor", "competing"]))
    if draw(st.integers(0, 3)) == 3:
        fields["clock"] = "discharge"
        fields.setdefault("visit_concepts", draw(st.sampled_from([[], [INPATIENT], [OFFICE, EMERGENCY]])))
    if fields.keys() & {"concepts", "vocabulary_codes", "source_codes", "concept_set"}:
        fields["domains"] = draw(st.sampled_from([[], [], ["procedure", "visit_detail"], ["device", "death"]]))
        fields.setdefault("visit_concepts", draw(st.sampled_from([[], [], [], [INPATIENT]])))
        fields["values"] = draw(values) if LAB in fields.get("concepts", [LAB]) else []
    return TaskSpec.from_dict(fields)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """A store with one to three persons, some scanned several times, and one to four tasks."""
    keys = itertools.count(-2)
    numbers = draw(st.lists(st.sampled_from(PERSON_IDS), min_size=1, max_size=3, unique=True))
    follow_up = draw(st.sampled_from(["observation_period", "last_event", "data_cut"]))
    needed = st.sampled_from([4, 8, 400, FAR]).map(lambda n: START.date() + n * DAY)
    return World(
        persons={n: draw(persons(keys)) for n in numbers},
        scans={n: draw(st.lists(moments(), min_size=1, max_size=3)) for n in numbers},
        tasks=[draw(specs(f"task{n}")) for n in range(draw(st.integers(1, 4)))],
        follow_up=follow_up,
        cut=draw(needed if follow_up == "data_cut" else st.none() | needed),
    )
