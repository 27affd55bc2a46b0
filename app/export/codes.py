"""Write concepts as MEDS codes, such that loading the codes gives the concepts back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from app.store import codes_meds
from app.store.codes_meds import BY_ID, LOCAL_UNITS, OWN_CODES, UNITS, Named

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from sqlalchemy import Connection

OWN = {concept: code for code, concept in OWN_CODES.items()}


class Namer:
    """Codes of concepts, asked of the store once each."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.named: dict[int, Named] = {}
        self.codes: dict[int, str] = {}
        self.units: dict[int, str] = {}
        self.used: set[int] = set()
        """Concepts whose codes were written."""
        self.said: dict[str, int] = {}
        """Codes that say which column of omop.person they fill, and their concepts."""

    def learn(self, concepts: Iterable[int]) -> None:
        """Look up the codes of concepts that are not known yet."""
        new = sorted({int(c) for c in concepts} - self.codes.keys())
        for start in range(0, len(new), codes_meds.BATCH):
            batch = new[start : start + codes_meds.BATCH]
            named = codes_meds.find_names(self.connection, batch)
            self.named |= named
            written = {c: codes_meds.written(n.vocabulary_id, n.concept_code) for c, n in named.items()}
            # two concepts may have one code: it names the one that loading would choose, the other goes by its id
            chosen = codes_meds.find_codes(self.connection, {code for code in written.values() if code})
            for concept in batch:
                code = written.get(concept)
                if code is not None and chosen[code][0].concept_id == concept and not code.startswith("MEDS_BIRTH"):
                    self.codes[concept] = code
                else:
                    self.codes[concept] = OWN.get(concept, f"{BY_ID}{concept}")

    def write(self, concepts: NDArray[np.int32], valid: NDArray[np.bool_] | None = None) -> Any:
        """Codes of concepts (N,) as an Arrow array, null where not `valid`; they are kept as used."""
        import pyarrow as pa

        distinct, back = np.unique(concepts if valid is None else concepts[valid], return_inverse=True)
        self.learn(distinct.tolist())
        self.used.update(distinct.tolist())
        values = pa.array([self.codes[int(c)] for c in distinct], pa.string())
        if valid is None:
            return values.take(pa.array(back))
        places = np.zeros(len(concepts), np.int64)
        places[valid] = back
        return values.take(pa.array(places, mask=~valid))

    def write_kind(self, kind: str, concepts: NDArray[np.int32]) -> list[str]:
        """Codes (N,) of concepts that a column of omop.person holds: each begins with its kind (`Gender/F`)."""
        self.learn(set(concepts.tolist()))
        codes = []
        for concept in concepts.tolist():
            code = self.codes[concept]
            codes.append(code if code.lower().startswith(f"{kind.lower()}/") else f"{kind}/{BY_ID}{concept}")
        self.said.update(zip(codes, concepts.tolist(), strict=True))
        return codes

    def write_units(self, concepts: NDArray[np.int32]) -> Any:
        """Units of concepts (N,) as an Arrow array; -1 and 0 are null."""
        import pyarrow as pa

        distinct, back = np.unique(concepts, return_inverse=True)
        for concept in distinct.tolist():
            if concept > 0 and concept not in self.units:
                self.learn([concept])
                self.units[concept] = self._unit(concept)
        values = pa.array([self.units.get(int(c)) for c in distinct], pa.string())
        return values.take(pa.array(back))

    def _unit(self, concept: int) -> str:
        """The unit's own code where loading it gives this concept, else its id."""
        named = self.named.get(concept)
        plain = named is not None and not self.codes[concept].startswith(BY_ID)
        if named is not None and plain and named.vocabulary_id in (UNITS, LOCAL_UNITS):
            return named.concept_code
        return f"{BY_ID}{concept}"

    def described(self) -> list[dict[str, Any]]:
        """Rows of `codes.parquet`: the codes that were written and all that stand above them."""
        parents: dict[int, list[int]] = {}
        level = self.used - {0}
        while level:
            found = codes_meds.find_parents(self.connection, level)
            parents |= {concept: found.get(concept, []) for concept in level}
            level = {p for above in found.values() for p in above} - parents.keys()
        self.learn(parents)
        rows = [
            {
                "code": self.codes[concept],
                "description": self.named[concept].concept_name if concept in self.named else None,
                "parent_codes": [self.codes[p] for p in above] or None,
            }
            for concept, above in parents.items()
        ]
        known = {row["code"] for row in rows}
        for code, concept in self.said.items():
            if code not in known:
                name = self.named[concept].concept_name if concept in self.named else None
                rows.append({"code": code, "description": name, "parent_codes": None})
        return sorted(rows, key=lambda row: str(row["code"]))
