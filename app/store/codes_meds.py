"""MEDS codes and concepts: how one is written as the other, and what the vocabulary has of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlalchemy import Connection

FIRST_LOCAL = 2_000_000_000
"""From here on ids are a site's own (OMOP reserves them); no vocabulary has them."""
LOCAL_VOCABULARY = "MEDS"
"""Vocabulary of codes that name none themselves."""
PERSON_KINDS = ("Gender", "Race", "Ethnicity")
"""Vocabularies of what columns of omop.person hold; a code that begins so says which of them it fills."""
BY_ID = "OMOP_CONCEPT/"
"""Before a concept id: a concept that no vocabulary in the store names."""
UNITS = "UCUM"
LOCAL_UNITS = "MEDS unit"
TABLE_OF_LETTER = {
    "c": "condition",
    "d": "drug_exposure",
    "p": "procedure",
    "e": "device_exposure",
    "m": "measurement",
    "o": "observation",
    "s": "specimen",
    "v": "visit",
    "w": "visit_detail",
    "x": "death",
}
"""Letter of omop.event.domain → word of the column `table`, as other converters from OMOP write it."""
BATCH = 20_000

OWN_CODES = {
    "Visit/IP": 9201,
    "Visit/OP": 9202,
    "Visit/ER": 9203,
    "Visit/ERIP": 262,
    "Gender/M": 8507,
    "Gender/F": 8532,
}
"""Codes that mean something to labels and cohorts, known in a store without a vocabulary, too."""

OWN_DOMAINS = {9201: "Visit", 9202: "Visit", 9203: "Visit", 262: "Visit", 8507: "Gender", 8532: "Gender"}


@dataclass(frozen=True, slots=True)
class Found:
    """A concept that a code names."""

    concept_id: int
    standard: bool
    domain_id: str
    valid: bool = True

    @property
    def rank(self) -> tuple[bool, bool, bool, int]:
        """Smallest first: of a vocabulary before a site's own, standard, valid, lowest id."""
        return self.concept_id >= FIRST_LOCAL, not self.standard, not self.valid, self.concept_id


def parts(code: str) -> tuple[str, str]:
    """(vocabulary_id, concept_code) of a code: `ICD10CM/I26.9` names its vocabulary, `LAB//SpO2` and `HR` do not."""
    vocabulary, bar, rest = code.partition("/")
    if bar and vocabulary and vocabulary != LOCAL_VOCABULARY and rest and not rest.startswith("/"):
        return vocabulary, rest
    return LOCAL_VOCABULARY, code


def written(vocabulary_id: str, concept_code: str) -> str | None:
    """The code that names a concept; None where reading it would give another (vocabulary_id, concept_code)."""
    code = concept_code if vocabulary_id == LOCAL_VOCABULARY else f"{vocabulary_id}/{concept_code}"
    return code if parts(code) == (vocabulary_id, concept_code) and id_in(code) is None else None


def id_in(code: str) -> int | None:
    """The concept id that `OMOP_CONCEPT/<id>` names, or `Race/OMOP_CONCEPT/<id>` and the like."""
    for kind in PERSON_KINDS:
        code = code.removeprefix(f"{kind}/") if code.startswith(f"{kind}/{BY_ID}") else code
    if code.startswith(BY_ID):
        digits = code.removeprefix(BY_ID)
        if digits.isascii() and digits.isdigit() and len(digits) <= 10 and int(digits) < 2**31:
            return int(digits)
    return None


def batches(items: Iterable[str]) -> Iterator[list[str]]:
    """Lists of at most `BATCH` items."""
    held: list[str] = []
    for item in items:
        held.append(item)
        if len(held) == BATCH:
            yield held
            held = []
    if held:
        yield held


_NAMED = """
SELECT w.code, c.concept_id, c.standard_concept = 'S', c.domain_id, c.invalid_reason IS NULL
FROM unnest(CAST(:codes AS text[]), CAST(:vocabularies AS text[]), CAST(:rests AS text[])) w(code, vocabulary, rest)
JOIN omop.concept c ON c.vocabulary_id = w.vocabulary AND c.concept_code = w.rest
"""


def find_codes(connection: Connection, codes: Iterable[str]) -> dict[str, list[Found]]:
    """What omop.concept has of codes, each list best first."""
    from sqlalchemy import text

    found: dict[str, list[Found]] = {}
    for batch in batches(codes):
        split = [parts(code) for code in batch]
        values = {"codes": batch, "vocabularies": [v for v, _ in split], "rests": [r for _, r in split]}
        for code, concept_id, standard, domain_id, valid in connection.execute(text(_NAMED), values):
            found.setdefault(code, []).append(Found(concept_id, bool(standard), domain_id, bool(valid)))
    for rows in found.values():
        rows.sort(key=lambda row: row.rank)
    return found


_MAPS_TO = """
SELECT concept_id_1, concept_id_2 FROM omop.concept_relationship
WHERE concept_id_1 = ANY (CAST(:ids AS int[])) AND relationship_id = 'Maps to' AND invalid_reason IS NULL
AND concept_id_2 <> 0 ORDER BY 1, 2
"""


def find_targets(connection: Connection, concepts: Sequence[int]) -> dict[int, list[int]]:
    """Concept → the standard concepts that it maps to, ascending."""
    from sqlalchemy import text

    found: dict[int, list[int]] = {}
    for source, target in connection.execute(text(_MAPS_TO), {"ids": list(concepts)}):
        found.setdefault(source, []).append(target)
    return found


@dataclass(frozen=True, slots=True)
class Named:
    """A concept of the store, in words."""

    vocabulary_id: str
    concept_code: str
    concept_name: str
    domain_id: str


_NAMES = """
SELECT concept_id, vocabulary_id, concept_code, concept_name, domain_id FROM omop.concept
WHERE concept_id = ANY (CAST(:ids AS int[]))
"""


def find_names(connection: Connection, concepts: Iterable[int]) -> dict[int, Named]:
    """What omop.concept says of concepts."""
    from sqlalchemy import text

    rows = connection.execute(text(_NAMES), {"ids": list(concepts)})
    return {row[0]: Named(*row[1:]) for row in rows}


_PARENTS = """
SELECT descendant_concept_id, ancestor_concept_id FROM omop.concept_ancestor
WHERE descendant_concept_id = ANY (CAST(:ids AS int[])) AND min_levels_of_separation = 1 ORDER BY 1, 2
"""


def find_parents(connection: Connection, concepts: Iterable[int]) -> dict[int, list[int]]:
    """Concept → the concepts one level above it."""
    from sqlalchemy import text

    found: dict[int, list[int]] = {}
    for child, parent in connection.execute(text(_PARENTS), {"ids": list(concepts)}):
        found.setdefault(child, []).append(parent)
    return found


_ABOVE = """
SELECT descendant_concept_id, ancestor_concept_id, min_levels_of_separation, max_levels_of_separation
FROM omop.concept_ancestor WHERE descendant_concept_id = ANY (CAST(:ids AS int[]))
AND ancestor_concept_id <> descendant_concept_id
"""


def find_ancestors(connection: Connection, concepts: Iterable[int]) -> dict[int, dict[int, tuple[int, int]]]:
    """Concept → {ancestor: (least, most levels)}, without itself."""
    from sqlalchemy import text

    found: dict[int, dict[int, tuple[int, int]]] = {}
    for child, ancestor, least, most in connection.execute(text(_ABOVE), {"ids": list(concepts)}):
        found.setdefault(child, {})[ancestor] = (least, most)
    return found


def next_local(connection: Connection) -> int:
    """The first id of a site's own that is free. To be called under the publishing lock."""
    from sqlalchemy import text

    highest = connection.scalar(
        text("SELECT max(concept_id) FROM omop.concept WHERE concept_id >= :first"), {"first": FIRST_LOCAL}
    )
    return FIRST_LOCAL + 1 if highest is None else int(highest) + 1


@dataclass(frozen=True, slots=True)
class LocalConcept:
    """A concept of a site's own, to be added."""

    concept_id: int
    name: str
    domain_id: str
    vocabulary_id: str
    concept_code: str


def add_concepts(connection: Connection, concepts: Iterable[LocalConcept]) -> int:
    """Add concepts by COPY; how many."""
    from app.store.session import raw

    count = 0
    statement = (
        "COPY omop.concept (concept_id, concept_name, domain_id, vocabulary_id, concept_class_id, concept_code) "
        "FROM STDIN"
    )
    with raw(connection).cursor().copy(statement) as copy:
        for c in concepts:
            copy.write_row((c.concept_id, c.name, c.domain_id, c.vocabulary_id, "MEDS code", c.concept_code))
            count += 1
    return count


def rename_local(connection: Connection, names: Mapping[int, str]) -> None:
    """Give local concepts the descriptions of a newer delivery."""
    from sqlalchemy import text

    statement = text(
        "UPDATE omop.concept c SET concept_name = n.name FROM unnest(CAST(:ids AS int[]), CAST(:names AS text[])) "
        "n(id, name) WHERE c.concept_id = n.id AND c.concept_class_id = 'MEDS code' AND c.concept_name <> n.name"
    )
    connection.execute(statement, {"ids": list(names), "names": list(names.values())})


_WIDEN = """
INSERT INTO omop.concept_ancestor AS t
SELECT s.a, d.descendant_concept_id, min(s.least + d.min_levels_of_separation),
       max(s.most + d.max_levels_of_separation)
FROM unnest(CAST(:above AS int[]), CAST(:below AS int[]), CAST(:least AS int[]), CAST(:most AS int[]))
     s(a, c, least, most)
JOIN omop.concept_ancestor d ON d.ancestor_concept_id = s.c
WHERE d.descendant_concept_id >= :first AND d.descendant_concept_id <> s.a
GROUP BY 1, 2
ON CONFLICT (ancestor_concept_id, descendant_concept_id) DO UPDATE SET
    min_levels_of_separation = least(t.min_levels_of_separation, excluded.min_levels_of_separation),
    max_levels_of_separation = greatest(t.max_levels_of_separation, excluded.max_levels_of_separation)
WHERE (t.min_levels_of_separation, t.max_levels_of_separation) IS DISTINCT FROM
      (least(t.min_levels_of_separation, excluded.min_levels_of_separation),
       greatest(t.max_levels_of_separation, excluded.max_levels_of_separation))
"""

_ADD = """
INSERT INTO omop.concept_ancestor AS t
SELECT a, c, least, most
FROM unnest(CAST(:above AS int[]), CAST(:below AS int[]), CAST(:least AS int[]), CAST(:most AS int[]))
     s(a, c, least, most)
ON CONFLICT (ancestor_concept_id, descendant_concept_id) DO UPDATE SET
    min_levels_of_separation = excluded.min_levels_of_separation,
    max_levels_of_separation = excluded.max_levels_of_separation
WHERE (t.min_levels_of_separation, t.max_levels_of_separation) IS DISTINCT FROM
      (excluded.min_levels_of_separation, excluded.max_levels_of_separation)
"""


def add_ancestors(connection: Connection, rows: Sequence[tuple[int, int, int, int]]) -> None:
    """Add (ancestor, descendant, least, most levels), and let local concepts further down inherit them."""
    from sqlalchemy import text

    for start in range(0, len(rows), BATCH):
        above, below, least, most = zip(*rows[start : start + BATCH], strict=True)
        values = {"above": list(above), "below": list(below), "least": list(least), "most": list(most)}
        connection.execute(text(_ADD), values)
    for start in range(0, len(rows), BATCH):
        above, below, least, most = zip(*rows[start : start + BATCH], strict=True)
        values = {"above": list(above), "below": list(below), "least": list(least), "most": list(most)}
        connection.execute(text(_WIDEN), values | {"first": FIRST_LOCAL})
