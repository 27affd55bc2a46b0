"""Find the files of a MEDS data set, and read what their schemas say.

The layout is that of MEDS 0.3 and 0.4 (https://github.com/Medical-Event-Data-Standard/meds): `data/**/*.parquet`, and
beside it `metadata/codes.parquet`, `metadata/subject_splits.parquet` and `metadata/dataset.json`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.errors import InputError
from app.loading.extract import TableFile

DATA, CODES, SPLITS = "data", "codes", "subject_splits"
REQUIRED = {DATA: ("subject_id", "time", "code"), CODES: ("code",), SPLITS: ("subject_id", "split")}
SPLIT_NAMES = ("train", "tuning", "held_out")
ABOUT = ("dataset_name", "dataset_version", "etl_name", "etl_version", "meds_version", "created_at")
MAX_ABOUT = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSet:
    """The files of a MEDS data set."""

    shards: list[TableFile]
    """In the order of their names."""
    codes: TableFile | None = None
    splits: TableFile | None = None
    about: dict[str, str] = field(default_factory=dict)
    """What `dataset.json` says of name and versions."""
    left: list[str] = field(default_factory=list)
    """Files that are not read."""

    @property
    def tables(self) -> dict[str, list[TableFile]]:
        """Files by the name that the books call them."""
        found = {DATA: self.shards}
        if self.codes:
            found[CODES] = [self.codes]
        if self.splits:
            found[SPLITS] = [self.splits]
        return found


def types_of(file: TableFile) -> dict[str, str]:
    """Column → its type, as Arrow names it."""
    return dict(zip(file.cells, file.types, strict=True))


def split_of(file: TableFile) -> str | None:
    """The split that a shard's folder names (`data/train/0.parquet`)."""
    return next((part for part in reversed(Path(file.name).parts[:-1]) if part in SPLIT_NAMES), None)


def read_data_set(folder: Path) -> DataSet:
    """Find the files and read every schema.

    Raises:
        InputError: it is no folder, holds no shards, a meds_reader database or several data sets, or a file lacks a
            column or is no Parquet.
    """
    if not folder.is_dir():
        raise InputError(f"Expected a folder of MEDS files, found the file {folder.name}; give its folder.")
    root, data = find_root(folder)
    metadata = root / "metadata"
    found = {name: metadata / f"{name}.parquet" for name in (CODES, SPLITS)}
    held = {name: read_schema(path, folder, name) for name, path in found.items() if path.is_file()}
    shards = [read_schema(path, folder, DATA) for path in parquet_files(data)]
    return DataSet(
        shards=shards,
        codes=held.get(CODES),
        splits=held.get(SPLITS),
        about=read_about(metadata, folder),
        left=sorted(
            path.relative_to(folder).as_posix() for path in parquet_files(metadata) if path not in found.values()
        )
        if metadata.is_dir()
        else [],
    )


def find_root(folder: Path) -> tuple[Path, Path]:
    """The data set's folder and that of its shards: `DIR/data`, `DIR/data/data`, or DIR itself with shards in it."""
    for root in (folder / "data", folder, *sorted(p for p in folder.iterdir() if p.is_dir() and p.name != "data")):
        _refuse_reader(root)
        data = root / "data"
        if data.is_dir() and next(parquet_files(data), None) is not None:
            return root, data
    if next(parquet_files(folder), None) is not None:
        return folder, folder
    raise InputError(
        f"Expected MEDS shards in {folder.name}/data (data/train/0.parquet, …), found no Parquet file; "
        "give the folder that holds data and metadata."
    )


def _refuse_reader(folder: Path) -> None:
    if (folder / "meds_reader.length").exists() or (folder / "meds_reader.version").exists():
        raise InputError(
            f"Expected MEDS in {folder.name}, found the binary database that meds_reader makes out of MEDS; "
            "give the folder of Parquet files that it was made from."
        )


def parquet_files(folder: Path) -> Iterator[Path]:
    """Parquet files below a folder, hidden ones and those of archives' litter left out, by name."""
    for path in sorted(folder.rglob("*.parquet")):
        if path.is_file() and not any(part.startswith((".", "_")) for part in path.relative_to(folder).parts):
            yield path


def read_schema(path: Path, folder: Path, table: str) -> TableFile:
    """The columns of one file.

    Raises:
        InputError: it is no whole Parquet file, or lacks a column of its table.
    """
    import pyarrow
    import pyarrow.parquet

    name = path.relative_to(folder).as_posix()
    try:
        schema = pyarrow.parquet.read_schema(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(
            f"Expected a whole Parquet file in {name}, found another or a damaged one; copy it."
        ) from error
    names, types = tuple(schema.names), tuple(_type(column.type) for column in schema)
    lacking = [column for column in REQUIRED[table] if column not in names]
    if lacking:
        older = " (patient_id: MEDS before 0.3)" if "patient_id" in names else ""
        raise InputError(
            f"Expected the columns {', '.join(REQUIRED[table])} in {name}, found no {' and no '.join(lacking)}{older}; "
            "give a data set in MEDS 0.3 or 0.4."
        )
    return TableFile(table=table, path=path, name=name, columns=names, cells=names, delimiter=None, types=types)


def _type(kind: Any) -> str:
    """The type's name; of a dictionary that of its values."""
    import pyarrow as pa

    return str(kind.value_type if pa.types.is_dictionary(kind) else kind)


def read_about(metadata: Path, folder: Path) -> dict[str, str]:
    """What a data set says of its name and versions; empty where it says nothing.

    Raises:
        InputError: the file is no JSON object.
    """
    path = metadata / "dataset.json"
    if not path.is_file():
        return {}
    name = path.relative_to(folder).as_posix()
    try:
        said = json.loads(path.read_bytes()[:MAX_ABOUT])
    except ValueError as error:
        raise InputError(f"Expected JSON in {name}, found something else; correct the file or remove it.") from error
    if not isinstance(said, dict):
        raise InputError(f"Expected a JSON object in {name}, found another value; correct the file or remove it.")
    return {key: str(said[key])[:200] for key in ABOUT if said.get(key)}
