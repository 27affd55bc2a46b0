"""`lachesis load …`: one command a kind of input; each queues a job of the queue `load`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli.options import AsJson, Detach, DryRun, Inline, existing, iso_date, one_of, queue
from app.errors import InputError, UnknownName

Source = Annotated[
    str | None, typer.Option(help="Where the extract comes from; a snapshot replaces what this source loaded before.")
]

MaxRejects = Annotated[float, typer.Option(help="Largest share of rejected rows of an event table.", min=0, max=1)]
AllowShrink = Annotated[
    bool, typer.Option("--allow-shrink", help="Publish although over 5 % of rows or persons vanish.")
]
DataCut = Annotated[str | None, typer.Option(help="Last day of the data, YYYY-MM-DD.")]
MidnightIsTime = Annotated[
    bool, typer.Option("--midnight-is-time", help="Read 00:00:00 as a time, not as a date without one.")
]
ShiftDates = Annotated[
    Path | None, typer.Option(help="Move each person's dates by an offset of their own, by the key in this file.")
]

load = typer.Typer(no_args_is_help=True, help="Load an extract, a vocabulary or scans.", rich_markup_mode=None)


@load.command("omop")
def load_omop(
    path: Annotated[
        str,
        typer.Argument(
            help="Folder or zip of OMOP CDM 5.2 to 5.4 files, or a Postgres: service=NAME or postgresql://user@host/db."
        ),
    ],
    source: Source = None,
    mode: Annotated[
        str,
        typer.Option(
            help="snapshot: the folder replaces what this source loaded before; append: it adds rows; upsert: it adds "
            "rows, replaces those of known keys, and removes those marked in a column deleted."
        ),
    ] = "snapshot",
    max_rejects: MaxRejects = 0.05,
    allow_shrink: AllowShrink = False,
    data_cut: DataCut = None,
    midnight_is_time: MidnightIsTime = False,
    delimiter: Annotated[
        str | None, typer.Option(help="Delimiter of the text files, where the header does not tell.")
    ] = None,
    null: Annotated[
        str | None,
        typer.Option(help="Text of a missing value, in text columns, too; elsewhere \\N and NULL are known."),
    ] = None,
    encoding: Annotated[
        str | None, typer.Option(help="Encoding of the text files, such as windows-1252; UTF-8 and UTF-16 are told.")
    ] = None,
    quote: Annotated[str | None, typer.Option(help="Quote character of the text files, or none.")] = None,
    cdm: Annotated[
        str | None, typer.Option(help="5.2, 5.3 or 5.4: the order of columns in files without a header.")
    ] = None,
    timezone: Annotated[
        str | None,
        typer.Option(
            help="Zone, such as America/New_York, to whose clock times with a zone are set; else theirs stays."
        ),
    ] = None,
    shift_dates: ShiftDates = None,
    cdm_schema: Annotated[str | None, typer.Option(help="Of a database: the schema of the CDM's tables.")] = None,
    vocabulary_schema: Annotated[
        str | None, typer.Option(help="Of a database: the schema of concept and its like; default the CDM's.")
    ] = None,
    detach: Detach = False,
    inline: Inline = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Load OMOP CDM files or a database's tables; every rejected row is explained, loading again changes nothing.

    Examples:
      lachesis load omop /data/omop_2026_12_new --source hospital --mode upsert
      lachesis load omop service=warehouse --cdm-schema cdm_54 --vocabulary-schema vocab
    """
    from app.loading.dialect import Reading

    one_of("--mode", mode, ("snapshot", "append", "upsert"))
    args: dict[str, Any] = {
        "what": "omop",
        **place(path, cdm_schema, vocabulary_schema),
        "source": source or "omop",
        "mode": mode,
        "max_rejects": max_rejects,
        "allow_shrink": allow_shrink,
        "data_cut": iso_date("--data-cut", data_cut),
        "midnight_is_time": midnight_is_time,
        "delimiter": delimiter,
        "null": null,
        "encoding": encoding,
        "quote": quote,
        "cdm": cdm,
        "timezone": timezone,
        "shift_dates": key_file(shift_dates),
    }
    Reading.of(args)
    queue("load", args, args["source"], detach=detach, inline=inline, dry_run=dry_run, as_json=as_json)


@load.command("vocabulary")
def load_vocabulary(
    path: Annotated[
        Path,
        typer.Argument(help="An Athena download, folder or .zip; or vocabulary tables as a database exports them."),
    ],
    full: Annotated[
        bool, typer.Option("--full", help="Bring every concept into the store, not only those in use and above them.")
    ] = False,
    max_rejects: Annotated[float, typer.Option(help="Largest share of rejected rows of a table.", min=0, max=1)] = 0.05,
    detach: Detach = False,
    inline: Inline = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Load a vocabulary: it is kept beside the store, and completes the concepts in use at every later load.

    Examples:
      lachesis load vocabulary /data/athena_2025_02
      lachesis load vocabulary vocabulary_download_v5.zip --full
    """
    args = {
        "what": "vocabulary",
        "path": existing(path, "a folder or a .zip of vocabulary files"),
        "full": full,
        "max_rejects": max_rejects,
    }
    queue("load", args, "vocabulary", detach=detach, inline=inline, dry_run=dry_run, as_json=as_json)


def place(path: str, cdm_schema: str | None, vocabulary_schema: str | None) -> dict[str, str | None]:
    """Arguments that name a folder that exists here, or a database by an address without a password."""
    from app.loading.database import clean_address, is_address

    if not Path(path).exists() and is_address(path):
        schemas = {"cdm_schema": cdm_schema, "vocabulary_schema": vocabulary_schema}
        return {"database": clean_address(path), **schemas}
    if cdm_schema or vocabulary_schema:
        raise InputError("Expected --cdm-schema and --vocabulary-schema beside a database, got them beside a folder.")
    return {"path": existing(Path(path), "a folder of OMOP files or a database's address")}


@load.command("meds")
def load_meds(
    path: Annotated[Path, typer.Argument(help="Folder of a MEDS 0.3 or 0.4 data set: data/**/*.parquet, metadata/.")],
    source: Source = None,
    max_rejects: Annotated[float, typer.Option(help="Largest share of rejected rows.", min=0, max=1)] = 0.05,
    allow_shrink: AllowShrink = False,
    data_cut: DataCut = None,
    midnight_is_time: MidnightIsTime = False,
    shift_dates: ShiftDates = None,
    detach: Detach = False,
    inline: Inline = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Load a MEDS data set; codes become concepts, every rejected row is explained. It replaces what its source showed.

    Examples:
      lachesis load meds /data/mimic_meds --source mimic
      lachesis load meds . --data-cut 2026-10-31 --midnight-is-time
    """
    args: dict[str, Any] = {
        "what": "meds",
        "path": existing(path, "a folder of MEDS files"),
        "source": source or "meds",
        "max_rejects": max_rejects,
        "allow_shrink": allow_shrink,
        "data_cut": iso_date("--data-cut", data_cut),
        "midnight_is_time": midnight_is_time,
        "shift_dates": key_file(shift_dates),
    }
    queue("load", args, args["source"], detach=detach, inline=inline, dry_run=dry_run, as_json=as_json)


@load.command("images")
def load_images(
    path: Annotated[
        Path, typer.Argument(help="MANIFEST.csv (person_id,acquired_at,path[,mask]), or a folder with --match.")
    ],
    root: Annotated[str | None, typer.Option(help="[NAME=]DIR that the manifest's paths are relative to.")] = None,
    match: Annotated[
        str | None,
        typer.Option(help="How a folder's scans name their person: person_id, person_source_value or FILE.csv."),
    ] = None,
    source: Source = None,
    arbitrary_pairing: Annotated[
        bool, typer.Option("--arbitrary-pairing", help="The scans are not these persons' own; every page will say so.")
    ] = False,
    mode: Annotated[
        str, typer.Option(help="upsert: add and update; snapshot: also take away what is no longer named.")
    ] = "upsert",
    allow_shrink: Annotated[
        bool, typer.Option("--allow-shrink", help="Let a snapshot take away over 5 % of the source's scans.")
    ] = False,
    allow_conflicts: Annotated[
        bool, typer.Option("--allow-conflicts", help="Load although over 1 % of headers contradict their persons.")
    ] = False,
    shift_dates: ShiftDates = None,
    detach: Detach = False,
    inline: Inline = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Load scans: headers only, NIfTI files and DICOM series folders.

    Examples:
      lachesis load images manifest.csv --root pacs=/mnt/pacs
      lachesis load images /mnt/pacs --match person_source_value
    """
    args: dict[str, Any] = {
        "what": "images",
        "path": existing(path, "a manifest or a folder of scans"),
        "root": root_option(root),
        "match": match_option(match),
        "source": source or "images",
        "arbitrary_pairing": arbitrary_pairing,
        "mode": one_of("--mode", mode, ("upsert", "snapshot")),
        "allow_shrink": allow_shrink,
        "allow_conflicts": allow_conflicts,
        "shift_dates": key_file(shift_dates),
    }
    if path.is_dir() and not match:
        raise InputError(
            f"Expected a manifest or --match, got the folder {path}; say how its scans name their person: "
            "--match person_id, person_source_value or FILE.csv."
        )
    queue("load", args, args["source"], detach=detach, inline=inline, dry_run=dry_run, as_json=as_json)


@load.command("key")
def load_key(
    file: Annotated[Path, typer.Argument(help="Where to write the key; it must not be there yet.")],
) -> None:
    """Make a key for --shift-dates, in a file that only you may read; keep it, and keep it apart from the store.

    Examples:
      lachesis load key ~/shift.key
      lachesis load key ~/shift.key && lachesis load omop /data/omop --shift-dates ~/shift.key
    """
    from app.loading.shift import make_key

    made = make_key(file)
    typer.echo(f"{file}: key {made.key_id}")


@load.command("queries")
def load_queries(
    dialect: Annotated[str, typer.Argument(help="postgres, duckdb, sqlserver, oracle, snowflake or bigquery.")],
    cdm_schema: Annotated[str, typer.Option(help="Schema (BigQuery: project.dataset) of the CDM's tables.")] = "cdm",
    vocabulary_schema: Annotated[
        str | None, typer.Option(help="Schema of concept and its like; default the CDM's.")
    ] = None,
    cdm_version: Annotated[str, typer.Option(help="5.3 or 5.4.")] = "5.4",
) -> None:
    """Print a script that exports a CDM as files that `load omop` reads: the columns it loads, as of one moment.

    Examples:
      lachesis load queries sqlserver --cdm-schema cdm_54.dbo > export.sh
      lachesis load queries postgres --cdm-schema cdm --vocabulary-schema vocab > export.sql
    """
    from app.loading.queries import Export, script

    schemas = {"cdm_schema": cdm_schema, "vocabulary_schema": vocabulary_schema or cdm_schema}
    typer.echo(script(dialect, Export(**schemas, version=cdm_version)), nl=False)


def key_file(path: Path | None) -> str | None:
    """The absolute path of a key file, whose key can be read here."""
    from app.loading.shift import read_key

    if path is None:
        return None
    read_key(path)
    return str(path.absolute())


@load.command("inspect")
def load_inspect(
    path: Annotated[Path, typer.Argument(help="Folder of the release: splits, labels, study mapping, CTPA/.")],
    ehr: Annotated[
        Path | None, typer.Option(help="Folder of the record's OMOP tables, where it is not below PATH.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the volumes, where it is not CTPA below PATH.")] = None,
    source: Source = None,
    tte_unit: Annotated[
        str | None, typer.Option(help="Unit of the released tte_*: seconds, minutes, hours or days; else found out.")
    ] = None,
    max_rejects: MaxRejects = 0.05,
    allow_shrink: AllowShrink = False,
    data_cut: DataCut = None,
    detach: Detach = False,
    inline: Inline = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Load Stanford's INSPECT as it is released: record, CT volumes' headers, splits and labels.

    Examples:
      lachesis load inspect /data/inspect
      lachesis load inspect /data/aimi --ehr /data/redivis/inspect_ehr --images /nfs/CTPA
    """
    args: dict[str, Any] = {
        "what": "inspect",
        "path": existing(path, "the folder of the release"),
        "ehr": existing(ehr, "a folder of OMOP files") if ehr else None,
        "images": existing(images, "a folder of volumes") if images else None,
        "source": source or "inspect",
        "tte_unit": one_of("--tte-unit", tte_unit, ("seconds", "minutes", "hours", "days")) if tte_unit else None,
        "max_rejects": max_rejects,
        "allow_shrink": allow_shrink,
        "data_cut": iso_date("--data-cut", data_cut),
    }
    queue("load", args, args["source"], detach=detach, inline=inline, dry_run=dry_run, as_json=as_json)


@load.command("embeddings")
def load_embeddings(
    file: Annotated[Path, typer.Argument(help="Parquet, CSV, npz or safetensors: a scan's name and its vector.")],
    encoder: Annotated[str, typer.Option(help="Name of the checkpoint that the vectors become.")],
    cohort: Annotated[str, typer.Option(help="Cohort whose train scans the vectors are standardised by.")],
    match: Annotated[
        str | None,
        typer.Option(help="What names a scan: image_occurrence_id, series_uid or path; else the file tells."),
    ] = None,
    max_rejects: Annotated[float, typer.Option(help="Largest share of rejected vectors.", min=0, max=1)] = 0.05,
    detach: Detach = False,
    inline: Inline = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Load vectors that another encoder made; evaluate and neighbours then take them like any checkpoint's.

    Examples:
      lachesis load embeddings merlin.parquet --encoder merlin --cohort chest
      lachesis load embeddings ct_fm.npz --encoder ct-fm --cohort chest --match series_uid
    """
    from app.loading.embeddings_read import MATCHES

    args: dict[str, Any] = {
        "path": existing(file, "a file of vectors"),
        "encoder": plain_name(encoder),
        "cohort": cohort,
        "match": one_of("--match", match, MATCHES) if match else None,
        "max_rejects": max_rejects,
    }
    queue("load_embeddings", args, encoder, detach=detach, inline=inline, dry_run=dry_run, as_json=as_json)


def plain_name(name: str) -> str:
    """A name that no alias, stop or id can be mistaken for."""
    if not name.strip() or "@" in name or name.isdigit():
        raise InputError(f"Expected a name without @ that is no number for --encoder, got {name!r}.")
    return name


def match_option(value: str | None) -> str | None:
    """A way of matching, or the absolute path of a matching file, checked line by line."""
    from app.loading.images import MATCHES
    from app.loading.images_link import read_match_file

    if value is None or value in MATCHES:
        return value
    if not Path(value).is_file():
        raise UnknownName("value of --match", value, (*MATCHES, "FILE.csv"))
    read_match_file(Path(value))
    return str(Path(value).absolute())


def root_option(value: str | None) -> dict[str, str] | None:
    """`NAME=DIR` or `DIR` as {name: absolute folder}."""
    if value is None:
        return None
    name, _, folder = value.rpartition("=")
    return {name or "images": existing(Path(folder), "the root folder of the scans")}


def register(app: typer.Typer) -> None:
    """Add `load` and its commands."""
    app.add_typer(load, name="load")
