"""Task sets: clinical questions by file or name, or pretraining tasks chosen by entropy."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from app.errors import InputError
from app.store import entropy, entropy_counts, names
from app.store.codes import resolve
from app.store.outcomes import without_resolved
from app.store.work import Work
from app.tasks.spec import TaskSpec

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from app.settings import Settings

MAX_TASKS = 32_767
"""Positions are int2."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskSet:
    """A task set before it is stored."""

    kind: str
    """pretraining or clinical."""
    specs: Sequence[TaskSpec]
    resolved: Sequence[dict[str, Any]]
    definition: dict[str, Any]
    cohort_id: int | None = None
    candidates: Sequence[entropy.Candidate] = ()
    persons: int = 0

    def digest(self) -> bytes:
        """sha256 of the tasks and how they were chosen."""
        tasks = [spec.to_dict() | {"resolved": r} for spec, r in zip(self.specs, self.resolved, strict=True)]
        weighed = [
            (c.concept_id, c.persons, c.base_persons, c.num_train_events, c.verdict)
            for c in self.candidates
        ]  # fmt: skip
        content = [self.kind, self.cohort_id, self.definition, tasks, weighed]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()


def build(work: Work) -> dict[str, Any]:
    """Stage `tasks`: store `args["specs"]`, or choose `args["size"]` tasks; the same again changes nothing.

    Raises:
        InputError: a code is not in the vocabulary (unless args["allow_absent"]), or names clash.
        UnknownName: no such cohort or banned task set.
    """
    args = work.args
    name = names.check_name("task set", args.get("name"))
    size, specs = args.get("size"), [TaskSpec.from_dict(fields) for fields in args.get("specs") or []]
    if (size is None) == (not specs):
        raise InputError("Expected either a size or specs of the tasks; give one of the two.")
    with work.connect() as connection:
        connection = connection.execution_options(isolation_level="REPEATABLE READ")
        cohort = names.find(connection, "cohort", str(args.get("cohort")))
        if size is None:
            chosen = given(
                connection,
                specs,
                allow_absent=bool(args.get("allow_absent")),
                ban=args.get("ban"),
                settings=work.settings,
            )
        else:
            source = bool(args.get("source_concepts"))
            chosen = by_entropy(work, connection, cohort, int(size), args.get("ban"), source_concepts=source)
        connection.rollback()
    work.check()
    if size is not None and len(chosen.specs) < size:
        work.log(f"Asked for {size} tasks, found {len(chosen.specs)} with enough events after a train person's index.")
    with work.transaction() as connection:
        result = store(connection, name, chosen, work.job_id)
    absent = [spec.name for spec, r in zip(chosen.specs, chosen.resolved, strict=True) if r["absent"]]
    verdicts = dict(Counter(c.verdict for c in chosen.candidates))
    made = {"kind": chosen.kind, "tasks": len(chosen.specs), "absent": absent, "candidates": verdicts}
    return result | made | ({"asked": int(size)} if size is not None else {})


def given(
    connection: Connection, specs: Sequence[TaskSpec], *, allow_absent: bool, ban: str | None, settings: Settings
) -> TaskSet:
    """A set of given tasks."""
    if ban:
        raise InputError("Expected --ban beside --size only; tasks that are given by name or file are not banned.")
    twice = [name for name, times in Counter(spec.name for spec in specs).items() if times > 1]
    if twice:
        raise InputError(f"Expected every task once in a set, got {twice[0]!r} twice; leave one out or rename it.")
    if len(specs) > MAX_TASKS:
        raise InputError(f"Expected at most {MAX_TASKS:,} tasks in a set, got {len(specs):,}.")
    resolved = resolve(connection, specs, allow_absent=allow_absent, settings=settings)
    return TaskSet(kind="clinical", specs=specs, resolved=resolved, definition={"given": [s.name for s in specs]})


def by_entropy(
    work: Work,
    connection: Connection,
    cohort: names.Version,
    size: int,
    ban: str | None,
    *,
    source_concepts: bool = False,
) -> TaskSet:
    """The `size` most informative tasks, by the train persons of a cohort; also of source concepts where asked."""
    if not 1 <= size <= MAX_TASKS:
        raise InputError(f"Expected a size from 1 to {MAX_TASKS:,}, got {size:,}.")
    ban_set = names.find(connection, "task set", ban) if ban else None
    banned = entropy.banned_by(connection, ban_set.id, source_concepts=source_concepts) if ban_set else set()
    counts, persons = entropy_counts.count(
        connection, cohort.id, lambda done, total: work.progress(done, total, "persons", "weigh")
    )
    of_source = entropy_counts.source_counts(connection, cohort.id, counts, persons) if source_concepts else []
    candidates = entropy.weigh([*counts, *of_source], persons, size, banned)
    chosen = [c.concept_id for c in candidates if c.verdict == "chosen"]
    sources = {row[0] for row in of_source}
    specs = pretraining_specs(connection, chosen, sources)
    return TaskSet(
        kind="pretraining",
        specs=specs,
        resolved=[meaning(concept, is_source=concept in sources) for concept in chosen],
        definition={
            "size": size,
            "ban": f"{ban_set.name}@{ban_set.version}" if ban_set else None,
            "cohort": f"{cohort.name}@{cohort.version}",
            "train_persons": persons,
            **({"source_concepts": True} if source_concepts else {}),
        },
        cohort_id=cohort.id,
        candidates=candidates,
        persons=persons,
    )


def meaning(concept: int, *, is_source: bool) -> dict[str, Any]:
    """What a pretraining task means, as `resolve` says it of given ones."""
    return {
        "concepts": [] if is_source else [concept],
        "source_concepts": [concept] if is_source else [],
        "units": [],
        "absent": [],
        "by_statement": is_source,
    }


def pretraining_specs(connection: Connection, concepts: Sequence[int], sources: Collection[int] = ()) -> list[TaskSpec]:
    """One task a concept, by the paper's rule: next occurrence after the index, history kept.

    Of those in `sources` rows count that the source wrote so, whatever standard concept they have.
    """
    from sqlalchemy import text

    statement = """
        SELECT concept_id, vocabulary_id || '/' || concept_code AS code, concept_name FROM omop.concept
        WHERE concept_id = ANY (CAST(:ids AS int[])) ORDER BY concept_id
    """
    rows = {row.concept_id: row for row in connection.execute(text(statement), {"ids": list(concepts)})}
    codes = Counter(row.code for row in rows.values())
    specs = []
    for concept in concepts:
        row = rows.get(concept)
        name = f"concept/{concept}" if row is None or codes[row.code] > 1 else row.code
        specs.append(
            TaskSpec(
                name=name,
                title=row.concept_name if row is not None and row.concept_name else None,
                concepts=() if concept in sources else (concept,),
                source_codes=(row.code,) if concept in sources and row is not None else (),
                occurrence="next",
                prior="keep",
                same_day="after",
            )
        )
    return specs


def specs_of(connection: Connection, *, task_set: str | None = None, labels: str | None = None) -> list[TaskSpec]:
    """The tasks of a task set or of a label set (NAME or NAME@2), as they were given. Raises UnknownName."""
    from sqlalchemy import text

    if labels is not None:
        statement = text("SELECT task_set_id FROM label.label_set WHERE label_set_id = :id")
        task_set_id = connection.scalar(statement, {"id": names.find(connection, "label set", labels).id})
    else:
        task_set_id = names.find(connection, "task set", str(task_set)).id
    rows = connection.execute(
        text("SELECT definition FROM label.task WHERE task_set_id = :id ORDER BY position"), {"id": task_set_id}
    ).scalars()
    return [TaskSpec.from_dict(without_resolved(definition)) for definition in rows]


TASK_COLUMNS = (
    "task_set_id, position, name, title, concept_id, start_seconds, occurrence, prior, death, follow_up, "
    "horizons_days, definition, prevalence, entropy, num_train_events"
)
DEFINITIONS_DIGEST = """
UPDATE label.task_set SET definitions_digest = (
    SELECT sha256(convert_to(coalesce(string_agg(definition::text, E'\\n' ORDER BY position), ''), 'UTF8'))
    FROM label.task WHERE task_set_id = :task_set_id)
WHERE task_set_id = :task_set_id
"""
CANDIDATE_COLUMNS = "task_set_id, concept_id, rank, persons, base_persons, entropy, num_train_events, verdict"


def store(connection: Connection, name: str, chosen: TaskSet, job_id: int | None) -> dict[str, Any]:
    """Write a version of a task set, unless the current one is the same already."""
    from sqlalchemy import text

    from app.store.session import raw

    digest = chosen.digest()
    names.lock(connection, "task set", name)
    current = names.find_current(connection, "task set", name)
    if current is not None and current.digest == digest:
        return {"task_set_id": current.id, "name": name, "version": current.version, "unchanged": True}
    row = {
        "name": name,
        "version": names.move(connection, "task set", name),
        "kind": chosen.kind,
        "cohort_id": chosen.cohort_id,
        "definition": json.dumps(chosen.definition),
        "digest": digest,
        "job_id": job_id,
    }
    task_set_id = connection.execute(
        text(
            "INSERT INTO label.task_set (name, version, is_current, kind, cohort_id, definition, digest, "
            "job_id) VALUES (:name, :version, true, :kind, :cohort_id, CAST(:definition AS jsonb), :digest, "
            ":job_id) RETURNING task_set_id"
        ),
        row,
    ).scalar_one()
    with raw(connection).cursor().copy(f"COPY label.task ({TASK_COLUMNS}) FROM STDIN") as copy:
        for fields in task_rows(chosen):
            copy.write_row([task_set_id, *fields])
    connection.execute(text(DEFINITIONS_DIGEST), {"task_set_id": task_set_id})
    with raw(connection).cursor().copy(f"COPY label.task_candidate ({CANDIDATE_COLUMNS}) FROM STDIN") as copy:
        for c in chosen.candidates:
            fields = [c.concept_id, c.rank, c.persons, c.base_persons, c.entropy, c.num_train_events, c.verdict]
            copy.write_row([task_set_id, *fields])
    connection.execute(text("ANALYZE label.task"))
    return {"task_set_id": task_set_id, "name": name, "version": row["version"], "unchanged": False}


def task_rows(chosen: TaskSet) -> list[list[Any]]:
    """Rows of label.task, from position on."""
    weights: dict[int | None, entropy.Candidate] = {c.concept_id: c for c in chosen.candidates}
    rows = []
    for position, (spec, resolved) in enumerate(zip(chosen.specs, chosen.resolved, strict=True)):
        alone = resolved["concepts"][0] if len(resolved["concepts"]) == 1 and not spec.by_statement else None
        source = resolved["source_concepts"][0] if len(resolved["source_concepts"]) == 1 else None
        weight = weights.get(alone if alone is not None else source if not resolved["concepts"] else None)
        rows.append(
            [
                position, spec.name, spec.title, alone, spec.start_seconds, spec.occurrence, spec.prior, spec.death,
                spec.follow_up, list(spec.horizons_days), json.dumps(spec.to_dict() | {"resolved": resolved}),
                weight and weight.persons / chosen.persons, weight and weight.entropy,
                weight and weight.num_train_events,
            ]
        )  # fmt: skip
    return rows
