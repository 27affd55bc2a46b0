"""A small vocabulary as Athena writes it, made up: tab-separated, quotes literal, `None` and `NA` as names."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

HEADERS = {
    "CONCEPT": "concept_id concept_name domain_id vocabulary_id concept_class_id standard_concept concept_code "
    "valid_start_date valid_end_date invalid_reason",
    "CONCEPT_ANCESTOR": "ancestor_concept_id descendant_concept_id min_levels_of_separation max_levels_of_separation",
    "CONCEPT_RELATIONSHIP": "concept_id_1 concept_id_2 relationship_id valid_start_date valid_end_date invalid_reason",
    "CONCEPT_SYNONYM": "concept_id concept_synonym_name language_concept_id",
    "VOCABULARY": "vocabulary_id vocabulary_name vocabulary_reference vocabulary_version vocabulary_concept_id",
    "DOMAIN": "domain_id domain_name domain_concept_id",
    "CONCEPT_CLASS": "concept_class_id concept_class_name concept_class_concept_id",
    "RELATIONSHIP": "relationship_id relationship_name is_hierarchical defines_ancestry reverse_relationship_id "
    "relationship_concept_id",
    "DRUG_STRENGTH": "drug_concept_id ingredient_concept_id amount_value",
}
VALID = ("19700101", "20991231", "")
LONG = "Finding of " + "very " * 60 + "long name"


def concept(
    key: int, name: str, code: str, *, vocabulary: str = "SNOMED", standard: str = "S", domain: str = "Condition"
) -> tuple[str, ...]:
    """A row of CONCEPT."""
    return (str(key), name, domain, vocabulary, "Clinical Finding", standard, code, *VALID)


# 10 ← 20 ← 301, 302; 10 ← 30 ← 303; 90 and 91 are used by nobody; ICD code 500 maps to 301
CONCEPTS = [
    concept(10, "Clinical finding", "404684003"),
    concept(20, 'Finding with "literal quotes', "F-20"),
    concept(30, "NA", "None"),
    *(concept(300 + i, f"Disorder {i} of gut/bowel", f"D-{i:03d}") for i in range(1, 21)),
    concept(90, "Nobody has this", "N-90"),
    concept(91, LONG, "N-91"),
    concept(500, "Gut disorder, coded", "K92.2", vocabulary="ICD10CM", standard=""),
    ("600", "Old gut", "Condition", "SNOMED", "Clinical Finding", "", "O-1", "19700101", "20200131", "U"),
    ("8507", "MALE", "Gender", "Gender", "Gender", "S", "M", *VALID),
    ("8527", "null", "Race", "Race", "Race", "S", "5", *VALID),
]
PARENTS = {20: 10, 30: 10, 301: 20, 302: 20, **{300 + i: 30 for i in range(3, 21)}, 90: 10, 91: 90}


def ancestors(parents: Mapping[int, int]) -> list[tuple[str, ...]]:
    """The closure of a tree, each concept its own ancestor, as CONCEPT_ANCESTOR has it."""
    rows = []
    for key in {*parents, *parents.values()}:
        above, distance = key, 0
        while True:
            rows.append((str(above), str(key), str(distance), str(distance)))
            if above not in parents:
                break
            above, distance = parents[above], distance + 1
    return rows


TABLES: dict[str, list[tuple[str, ...]]] = {
    "CONCEPT": CONCEPTS,
    "CONCEPT_ANCESTOR": ancestors(PARENTS),
    "CONCEPT_RELATIONSHIP": [
        ("500", "301", "Maps to", *VALID),
        ("301", "500", "Mapped from", *VALID),
        ("600", "302", "Maps to", *VALID),
        ("301", "20", "Is a", *VALID),
        ("90", "10", "Is a", *VALID),
    ],
    "CONCEPT_SYNONYM": [("301", "First gut trouble", "4180186"), ("90", "None", "4180186")],
    "VOCABULARY": [
        ("None", "OMOP Standardized Vocabularies", "", "v5.0 27-FEB-25", "44819096"),
        ("SNOMED", "Systematic Nomenclature", "https://example.org", "2024-09-01", "44819097"),
    ],
    "DOMAIN": [("Condition", "Condition", "19")],
    "CONCEPT_CLASS": [("Clinical Finding", "Clinical Finding", "1")],
    "RELATIONSHIP": [("Maps to", "Non-standard to Standard", "0", "0", "Mapped from", "44818977")],
    "DRUG_STRENGTH": [],
}


def write(
    folder: Path,
    changes: Mapping[str, Sequence[tuple[str, ...]] | None] | None = None,
    *,
    version: str = "v5.0 27-FEB-25",
    line_end: str = "\n",
) -> Path:
    """A download's folder; a table that `changes` maps to None is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    for table, rows in {**TABLES, **(changes or {})}.items():
        if rows is None:
            continue
        lines = ["\t".join(HEADERS[table].split()), *("\t".join(row) for row in rows)]
        text = (line_end.join(lines) + line_end).replace("v5.0 27-FEB-25", version)
        (folder / f"{table}.csv").write_bytes(text.encode())
    return folder


def zipped(folder: Path, into: Path) -> Path:
    """The files of a folder in a zip."""
    with zipfile.ZipFile(into, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, path.name)
    return into
