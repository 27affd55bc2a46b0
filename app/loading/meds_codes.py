"""Map the codes of a MEDS data set to concepts: of the vocabulary where it has them, else of a site's own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from app.loading import vocabulary_kept
from app.loading.cdm import DEATH_CONCEPT
from app.loading.meds_rows import DEATH, DEMOGRAPHICS
from app.store import codes_meds
from app.store.codes_meds import Found, LocalConcept

if TYPE_CHECKING:
    import duckdb
    from sqlalchemy import Connection

    from app.settings import Settings
    from app.store.vocabulary import Release

DOMAINS = {
    "c": "Condition",
    "d": "Drug",
    "p": "Procedure",
    "e": "Device",
    "m": "Measurement",
    "o": "Observation",
    "s": "Specimen",
    "v": "Visit",
}
LETTER_OF_DOMAIN = {domain: letter for letter, domain in DOMAINS.items()}
KIND_DOMAINS = dict(zip(DEMOGRAPHICS, ("Gender", "Race", "Ethnicity"), strict=True))

OWN_WORDS = {
    "gender": {"m": 8507, "male": 8507, "f": 8532, "female": 8532},
    "race": {"white": 8527, "asian": 8515, "black": 8516, "black or african american": 8516},
    "ethnicity": {
        "hispanic": 38003563,
        "hispanic or latino": 38003563,
        "not hispanic": 38003564,
        "not hispanic or latino": 38003564,
    },
}
"""Demographics in words, as data sets that were not made from OMOP have them."""


@dataclass(slots=True)
class Codes:
    """What each code means in this store."""

    ids: dict[str, int]
    """Code → its number in `m_code`."""
    kinds: dict[str, str | None]
    own: dict[str, Found] = field(default_factory=dict)
    """Code → the concept that it names."""
    target: dict[str, Found] = field(default_factory=dict)
    """Code → the standard concept that the former maps to, where it does."""
    several: int = 0
    """Codes that map to several standard concepts, of which the lowest id is taken."""

    def digest(self) -> bytes:
        """Over what codes mean by the vocabulary: a newer vocabulary makes a delivery another one."""
        hashed = hashlib.sha256()
        for code in sorted(self.own):
            found, target = self.own[code], self.target.get(code)
            if found.concept_id < codes_meds.FIRST_LOCAL:
                hashed.update(f"{code}\t{found.concept_id}\t{target.concept_id if target else ''}\n".encode())
        return hashed.digest()

    def concept_of(self, code: str) -> Found:
        """The concept that events of a code have."""
        return self.target.get(code) or self.own[code]


def read(connection: duckdb.DuckDBPyConnection) -> Codes:
    """The codes of `m_code`."""
    rows = connection.execute("SELECT code, code_id, kind FROM m_code ORDER BY code_id").fetchall()
    return Codes({code: key for code, key, _ in rows}, {code: kind for code, _, kind in rows})


def look_up(
    store: Connection,
    decoder: duckdb.DuckDBPyConnection,
    settings: Settings,
    release: Release | None,
    codes: Codes,
    *,
    final: bool,
) -> None:
    """Fill in what the vocabulary, in the store or beside it, says of every code.

    Args:
        store: a connection to the store.
        decoder: holds `m_code`.
        settings: where the vocabulary beside the store lies.
        release: it, or None.
        codes: filled in; codes without a concept stay out of it.
        final: codes are concepts already, so that none is followed to what it maps to.
    """
    found = codes_meds.find_codes(store, codes.ids)
    beside = release is not None and not release.is_full
    if beside and release is not None:
        vocabulary_kept.views(decoder, settings, release)
        _look_beside(decoder, found)
    codes.own, codes.target, codes.several = {}, {}, 0
    for code in codes.ids:
        given = codes_meds.id_in(code)
        if given is not None:
            codes.own[code] = Found(given, True, "")
        elif code in found:
            codes.own[code] = found[code][0]
        elif code in codes_meds.OWN_CODES:
            concept = codes_meds.OWN_CODES[code]
            codes.own[code] = Found(concept, True, codes_meds.OWN_DOMAINS[concept])
        own = codes.own.get(code)
        if own is None or own.concept_id >= codes_meds.FIRST_LOCAL:  # which keeps the code as it was written
            word = _own_word(code, codes.kinds[code])
            codes.target |= {code: word} if word else {}
    _name_domains(store, codes)
    if not final:
        _follow(store, decoder, codes, beside=beside)


def _own_word(code: str, kind: str | None) -> Found | None:
    """The standard concept that a demographic in words means."""
    word = code.rpartition("/")[2].strip().lower().replace("_", " ")
    concept = OWN_WORDS.get(kind or "", {}).get(word)
    return None if concept is None else Found(concept, True, KIND_DOMAINS[str(kind)])


def _look_beside(decoder: duckdb.DuckDBPyConnection, found: dict[str, list[Found]]) -> None:
    """Add what the vocabulary beside the store has."""
    rows = decoder.execute(
        "SELECT m.code, k.concept_id, coalesce(k.standard_concept = 'S', false), k.domain_id, "
        "k.invalid_reason IS NULL FROM m_code m JOIN k_concept k "
        "ON k.vocabulary_id = split_part(m.code, '/', 1) "
        "AND k.concept_code = substr(m.code, strpos(m.code, '/') + 1) WHERE strpos(m.code, '/') > 1"
    ).fetchall()
    for code, concept_id, standard, domain_id, valid in rows:
        if concept_id not in {f.concept_id for f in found.get(code, [])} and codes_meds.parts(code)[0] != "MEDS":
            found.setdefault(code, []).append(Found(concept_id, standard, domain_id, valid))
            found[code].sort(key=lambda row: row.rank)


def _name_domains(store: Connection, codes: Codes) -> None:
    """The domains of concepts that codes named by id."""
    unnamed = {code: found.concept_id for code, found in codes.own.items() if not found.domain_id}
    names = codes_meds.find_names(store, set(unnamed.values()))
    for code, concept_id in unnamed.items():
        domain = names[concept_id].domain_id if concept_id in names else "Observation"
        codes.own[code] = Found(concept_id, True, domain)


def _follow(store: Connection, decoder: duckdb.DuckDBPyConnection, codes: Codes, *, beside: bool) -> None:
    """Follow concepts that are not standard to the standard ones they map to."""
    sources = {f.concept_id for f in codes.own.values() if not f.standard}
    if not sources:
        return
    targets = codes_meds.find_targets(store, sorted(sources))
    if beside:
        vocabulary_kept.add_seeds(decoder, "m_source", sorted(sources))
        for source, target in decoder.execute(
            "SELECT concept_id_1, concept_id_2 FROM k_concept_relationship WHERE concept_id_1 IN (FROM m_source) "
            "AND relationship_id = 'Maps to' AND invalid_reason IS NULL AND concept_id_2 <> 0"
        ).fetchall():
            targets[source] = sorted({*targets.get(source, []), target})
    wanted = {ids[0] for ids in targets.values()}
    domains = {concept: named.domain_id for concept, named in codes_meds.find_names(store, wanted).items()}
    if beside:
        vocabulary_kept.add_seeds(decoder, "m_source", sorted(wanted))
        query = "SELECT concept_id, domain_id FROM k_concept WHERE concept_id IN (FROM m_source)"
        domains |= dict(decoder.execute(query).fetchall())
    for code, found in codes.own.items():
        ids = targets.get(found.concept_id)
        if ids and not found.standard:
            codes.target[code] = Found(ids[0], True, domains.get(ids[0], found.domain_id))
            codes.several += len(ids) > 1


def allocate(
    store: Connection,
    decoder: duckdb.DuckDBPyConnection,
    codes: Codes,
    described: Mapping[str, tuple[str | None, list[str]]],
) -> int:
    """Give every code without a concept one of the site's own; how many are new. To be called under the lock."""
    letters = dict(
        decoder.execute(
            "SELECT code, min(tab) FROM m JOIN m_code USING (code_id) WHERE tab IS NOT NULL GROUP BY 1"
        ).fetchall()
    )
    first = codes_meds.next_local(store)
    new: list[LocalConcept] = []
    for code in sorted(codes.ids):
        kind = codes.kinds[code]
        if code in codes.own or code in ("MEDS_BIRTH", "MEDS_DEATH"):
            continue
        vocabulary, rest = codes_meds.parts(code)
        domain = KIND_DOMAINS.get(kind or "") or DOMAINS.get(letters.get(code, "")) or "Observation"
        if vocabulary == "Visit":
            domain = "Visit"
        name = described.get(code, (None, []))[0] or code
        new.append(LocalConcept(first + len(new), name, domain, vocabulary, rest))
        codes.own[code] = Found(new[-1].concept_id, False, domain)
    codes_meds.add_concepts(store, new)
    named = {codes.own[code].concept_id: text for code, (text, _) in described.items() if text and code in codes.own}
    codes_meds.rename_local(store, named)
    return len(new)


def allocate_units(store: Connection, decoder: duckdb.DuckDBPyConnection, *, beside: bool) -> None:
    """Make `m_unit_map(unit_id, concept_id)`: units of UCUM, else of the site's own. To be called under the lock."""
    units = dict(decoder.execute("SELECT unit, unit_id FROM m_unit ORDER BY unit").fetchall())
    found = {}
    for unit in units:
        for vocabulary in (codes_meds.UNITS, codes_meds.LOCAL_UNITS):
            found[f"{vocabulary}/{unit}"] = unit
    known = codes_meds.find_codes(store, found)
    concepts: dict[str, int] = {}
    for code, rows in known.items():
        unit = found[code]
        concepts[unit] = min(concepts.get(unit, rows[0].concept_id), rows[0].concept_id)
    if beside:
        query = "SELECT unit, min(concept_id) FROM m_unit JOIN k_concept ON vocabulary_id = ? AND concept_code = unit"
        concepts |= dict(decoder.execute(f"{query} GROUP BY 1", [codes_meds.UNITS]).fetchall())
    first = codes_meds.next_local(store)
    new: list[LocalConcept] = []
    for unit in units:
        if (given := codes_meds.id_in(unit)) is not None:
            concepts[unit] = given
        elif unit not in concepts:
            new.append(LocalConcept(first + len(new), unit, "Unit", codes_meds.LOCAL_UNITS, unit))
            concepts[unit] = new[-1].concept_id
    codes_meds.add_concepts(store, new)
    _table(decoder, "m_unit_map", "unit_id", ((units[unit], concept) for unit, concept in concepts.items()))


def _table(decoder: duckdb.DuckDBPyConnection, name: str, key: str, rows: Iterable[tuple[int, int]]) -> None:
    import pyarrow as pa

    held = list(rows)
    columns = {key: [r[0] for r in held], "concept_id": [r[1] for r in held]}
    decoder.register("given_map", pa.table({n: pa.array(v, pa.int32()) for n, v in columns.items()}))
    decoder.execute(f"CREATE OR REPLACE TABLE {name} AS FROM given_map")
    decoder.unregister("given_map")


def make_map(decoder: duckdb.DuckDBPyConnection, codes: Codes) -> None:
    """Make `m_map(code_id, concept_id, own_id, letter)`."""
    import pyarrow as pa

    rows: list[tuple[int, int, int, str]] = []
    for code, key in codes.ids.items():
        if code == "MEDS_BIRTH":
            continue
        own = codes.own[code].concept_id if code in codes.own else 0
        if codes.kinds[code] == DEATH:
            rows.append((key, DEATH_CONCEPT, own, "x"))
            continue
        found = codes.concept_of(code)
        rows.append((key, found.concept_id, own, LETTER_OF_DOMAIN.get(found.domain_id, "o")))
    columns = list(zip(*rows, strict=True)) or [(), (), (), ()]
    kinds = (pa.int32(), pa.int32(), pa.int32(), pa.string())
    names = ("code_id", "concept_id", "own_id", "letter")
    arrays = {n: pa.array(c, k) for n, c, k in zip(names, columns, kinds, strict=True)}
    decoder.register("given_map", pa.table(arrays))
    decoder.execute("CREATE OR REPLACE TABLE m_map AS FROM given_map")
    decoder.unregister("given_map")


Above = dict[int, tuple[int, int]]


def ancestors(
    store: Connection, codes: Codes, described: Mapping[str, tuple[str | None, list[str]]]
) -> tuple[list[tuple[int, int, int, int]], int]:
    """Rows of concept_ancestor that parent codes make, and how many parents were left out because they close a circle.

    Rows are made for concepts of the site's own and for those of which the store knows no ancestor: what a vocabulary
    says of its own concepts stays.
    """
    parents: dict[int, list[int]] = {}
    for code, (_, above) in described.items():
        child = codes.concept_of(code).concept_id if code in codes.own else None
        if child is not None:
            held = [codes.concept_of(p).concept_id for p in above if p in codes.own]
            parents[child] = sorted({*parents.get(child, []), *held} - {child})
    nodes = {*parents, *(p for above in parents.values() for p in above)}
    known = codes_meds.find_ancestors(store, nodes)
    made = {n for n in nodes if n >= codes_meds.FIRST_LOCAL or n not in known}
    closed, circles = _close(parents, known, made)
    rows = [(n, n, 0, 0) for n in sorted(made) if n in parents or n >= codes_meds.FIRST_LOCAL]
    rows += [(a, n, *closed[n][a]) for n in sorted(made) for a in sorted(closed[n])]
    return rows, circles


def _close(
    parents: Mapping[int, list[int]], known: Mapping[int, Above], made: set[int]
) -> tuple[dict[int, Above], int]:
    """Ancestors of every node of `made` with least and most levels, and the number of parents that close a circle."""
    done: dict[int, Above] = {n: dict(above) for n, above in known.items() if n not in made}
    open_: set[int] = set()
    circles = 0
    for start in sorted(made):
        stack = [start]
        while stack:
            node = stack[-1]
            if node in done:
                stack.pop()
                continue
            open_.add(node)
            waiting = [p for p in parents.get(node, []) if p not in done and p not in open_]
            if waiting:
                stack += waiting
                continue
            above: Above = {}
            for parent in parents.get(node, []):
                if parent not in done:
                    circles += 1
                    continue
                for ancestor, (least, most) in {parent: (0, 0), **done[parent]}.items():
                    before = above.get(ancestor, (least + 1, most + 1))
                    above[ancestor] = (min(before[0], least + 1), max(before[1], most + 1))
            above.pop(node, None)
            done[node] = above
            open_.discard(node)
            stack.pop()
    return done, circles
