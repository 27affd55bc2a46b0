"""One command a stage: each queues a job, follows it and ends with the job's exit code."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated, Any

import typer

from app.errors import InputError, UnknownName

Detach = Annotated[bool, typer.Option("--detach", help="Print the job's id and return at once.")]
Inline = Annotated[bool, typer.Option("--inline", help="Run in the foreground, without a broker or a worker.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be queued, and queue nothing.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Source = Annotated[
    str | None, typer.Option(help="Where the extract comes from; a snapshot replaces what this source loaded before.")
]

FOLLOW_UPS = ("observation_period", "last_event", "data_cut")
ARMS = ("base", "mtl", "visit", "tte")


def queue(
    kind: str, args: dict[str, Any], name: str | None, *, detach: bool, inline: bool, dry_run: bool, as_json: bool
) -> None:
    """Queue one job and follow it, or say what would be queued."""
    if dry_run:
        typer.echo(jsonlib.dumps({"kind": kind, "name": name, "args": args}, indent=2, default=str))
        return
    from app.cli.follow import submit_and_follow
    from app.settings import read_settings

    submit_and_follow(read_settings(), kind, args, name, detach=detach, inline=inline, as_json=as_json)


def one_of(option: str, value: str, known: tuple[str, ...]) -> str:
    """`value`, if it is one of `known`; else InputError with the nearest."""
    if value not in known:
        raise UnknownName(f"value of {option}", value, known)
    return value


def existing(path: Path, what: str) -> str:
    """The absolute path of something that must be there."""
    if not path.exists():
        raise InputError(f"Expected {what} at {path}, found nothing there; give the path of one that exists.")
    return str(path.absolute())


load = typer.Typer(no_args_is_help=True, help="Load an extract, a vocabulary or scans.", rich_markup_mode=None)


@load.command("omop")
def load_omop(
    path: Annotated[Path, typer.Argument(help="Folder of OMOP CDM 5.3/5.4 files: CSV, csv.gz, TSV or Parquet.")],
    source: Source = None,
    mode: Annotated[
        str, typer.Option(help="snapshot: what is in the folder replaces what this source loaded before.")
    ] = "snapshot",
    max_rejects: Annotated[
        float, typer.Option(help="Largest share of rejected rows of an event table.", min=0, max=1)
    ] = 0.05,
    allow_shrink: Annotated[
        bool, typer.Option("--allow-shrink", help="Publish although over 5 % of rows or persons vanish.")
    ] = False,
    data_cut: Annotated[str | None, typer.Option(help="Last day of the data, YYYY-MM-DD.")] = None,
    midnight_is_time: Annotated[
        bool, typer.Option("--midnight-is-time", help="Read 00:00:00 as a time, not as a date without one.")
    ] = False,
    delimiter: Annotated[
        str | None, typer.Option(help="Delimiter of the text files, where the header does not tell.")
    ] = None,
    detach: Detach = False,
    inline: Inline = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Load a folder of OMOP CDM files; every rejected row is explained, loading it again changes nothing.

    Examples:
      lachesis load omop /data/omop_2026_11 --source hospital
      lachesis load omop . --data-cut 2026-10-31 --max-rejects 0.01
    """
    one_of("--mode", mode, ("snapshot",))
    args: dict[str, Any] = {
        "what": "omop",
        "path": existing(path, "a folder of OMOP files"),
        "source": source or "omop",
        "mode": mode,
        "max_rejects": max_rejects,
        "allow_shrink": allow_shrink,
        "data_cut": iso_date("--data-cut", data_cut),
        "midnight_is_time": midnight_is_time,
        "delimiter": delimiter,
    }
    queue("load", args, args["source"], detach=detach, inline=inline, dry_run=dry_run, as_json=as_json)


@load.command("images")
def load_images(
    path: Annotated[Path, typer.Argument(help="MANIFEST.csv (person_id,acquired_at,path), or a folder with --match.")],
    root: Annotated[str | None, typer.Option(help="[NAME=]DIR that the manifest's paths are relative to.")] = None,
    match: Annotated[str | None, typer.Option(help="How a folder's files name their person: person_id.")] = None,
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
    detach: Detach = False,
    inline: Inline = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Load scans: headers only, NIfTI files and DICOM series folders.

    Examples:
      lachesis load images manifest.csv --root pacs=/mnt/pacs
      lachesis load images /data/nifti --match person_id
    """
    args: dict[str, Any] = {
        "what": "images",
        "path": existing(path, "a manifest or a folder of scans"),
        "root": root_option(root),
        "match": one_of("--match", match, ("person_id",)) if match else None,
        "source": source or "images",
        "arbitrary_pairing": arbitrary_pairing,
        "mode": one_of("--mode", mode, ("upsert", "snapshot")),
        "allow_shrink": allow_shrink,
    }
    if path.is_dir() and not match:
        raise InputError(
            f"Expected a manifest or --match person_id, got the folder {path}; say how its files name their person."
        )
    queue("load", args, args["source"], detach=detach, inline=inline, dry_run=dry_run, as_json=as_json)


def root_option(value: str | None) -> dict[str, str] | None:
    """`NAME=DIR` or `DIR` as {name: absolute folder}."""
    if value is None:
        return None
    name, _, folder = value.rpartition("=")
    return {name or "images": existing(Path(folder), "the root folder of the scans")}


def iso_date(option: str, value: str | None) -> str | None:
    """A date as it was given, checked."""
    import datetime as dt

    if value is None:
        return None
    try:
        return dt.date.fromisoformat(value).isoformat()
    except ValueError:
        raise InputError(f"Expected a date YYYY-MM-DD for {option}, got {value!r}.") from None


def cohort(
    name: Annotated[str, typer.Argument(help="Name of the cohort.")],
    follow_up: Annotated[
        str, typer.Option(help="End of follow-up: observation_period, last_event or data_cut.")
    ] = "observation_period",
    data_cut: Annotated[str | None, typer.Option(help="Last day of the data, YYYY-MM-DD.")] = None,
    per: Annotated[str, typer.Option(help="One member a study, or a series.")] = "study",
    where: Annotated[
        str | None, typer.Option(help='SQL condition on scan i and person p, e.g. "i.slices > 40".')
    ] = None,
    min_age: Annotated[float | None, typer.Option(help="Youngest age at the scan, years.", min=0)] = None,
    verdict: Annotated[
        str | None, typer.Option(help="Only scans of this verdict (ok); default all but unusable.")
    ] = None,
    split_time: Annotated[str | None, typer.Option(help="Held out = scans from this day on, YYYY-MM-DD.")] = None,
    detach: Detach = False,
    inline: Inline = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Choose scans: index time, end of follow-up, split; attrition is counted and stored.

    Examples:
      lachesis cohort chest
      lachesis cohort adults --min-age 18 --follow-up data_cut --data-cut 2026-10-31
    """
    args = {
        "name": name,
        "follow_up": one_of("--follow-up", follow_up, FOLLOW_UPS),
        "data_cut": iso_date("--data-cut", data_cut),
        "per": one_of("--per", per, ("study", "series")),
        "where": where,
        "min_age": min_age,
        "verdict": verdict and one_of("--verdict", verdict, ("ok", "suspect", "unusable")),
        "split_time": iso_date("--split-time", split_time),
    }
    queue("cohort", args, name, detach=detach, inline=inline, dry_run=dry_run, as_json=as_json)


def tasks(
    name: Annotated[str, typer.Argument(help="Name of the task set.")],
    cohort: Annotated[str, typer.Option(help="Cohort whose train persons weigh the concepts.")],
    size: Annotated[
        int | None, typer.Option(help="Choose so many pretraining tasks by entropy.", min=1, max=32767)
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="A clinical task by name; `clinical` means the eight.")] = None,
    file: Annotated[list[Path] | None, typer.Option(help="A task file.")] = None,
    ban: Annotated[
        str | None, typer.Option(help="Task set whose concepts, with descendants, may not be chosen.")
    ] = None,
    detach: Detach = False,
    inline: Inline = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Choose clinical questions: by entropy for pretraining, or by name or file.

    Examples:
      lachesis tasks pretraining --cohort chest --size 1024
      lachesis tasks outcomes --cohort chest --task clinical --file gi_bleed.toml
    """
    from app.tasks import builtin, clinical_task_names, read_task_file

    if (size is None) == (not task and not file):
        raise InputError("Expected either --size or at least one --task or --file; give one of the two.")
    names = [n for given in task or [] for n in (clinical_task_names() if given == "clinical" else [given])]
    specs = [builtin(n) for n in names] + [read_task_file(Path(existing(f, "a task file"))) for f in file or []]
    args = {"name": name, "cohort": cohort, "size": size, "ban": ban, "specs": [s.to_dict() for s in specs]}
    queue("tasks", args, name, detach=detach, inline=inline, dry_run=dry_run, as_json=as_json)


def label(
    name: Annotated[str, typer.Argument(help="Name of the label set.")],
    cohort: Annotated[str, typer.Option(help="Cohort.")],
    tasks: Annotated[str, typer.Option(help="Task set.")],
    detach: Detach = False,
    inline: Inline = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Materialise time-to-event labels of a cohort for a task set.

    Examples:
      lachesis label chest --cohort chest --tasks pretraining
      lachesis label outcomes --cohort chest --tasks outcomes --detach
    """
    queue(
        "label",
        {"name": name, "cohort": cohort, "tasks": tasks},
        name,
        detach=detach,
        inline=inline,
        dry_run=dry_run,
        as_json=as_json,
    )


def pretrain(
    arm: Annotated[str, typer.Argument(help="base, mtl, visit or tte.")],
    encoder: Annotated[str, typer.Option(help="tiny, densenet121, resnet152 or swinunetr.")],
    labels: Annotated[str, typer.Option(help="Label set to learn from.")],
    name: Annotated[str | None, typer.Option(help="Name of the checkpoint; default ENCODER-ARM-sSEED.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, order and augmentation.")] = 0,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value of the recipe, e.g. epochs=4.")] = None,
    shuffle_volumes: Annotated[
        bool, typer.Option("--shuffle-volumes", help="A control: permute volumes among persons first.")
    ] = False,
    detach: Detach = False,
    inline: Inline = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Train an encoder. `base` trains nothing: it keeps the given weights (untrained where none are given).

    Examples:
      lachesis pretrain tte --encoder tiny --labels pretraining --name tiny-tte
      lachesis pretrain mtl --encoder densenet121 --labels outcomes --seed 3 --set batch=4 --set epochs=10
    """
    one_of("ARM", arm, ARMS)
    checkpoint = name or f"{encoder}-{arm}-s{seed}"
    args = {
        "arm": arm,
        "encoder": encoder,
        "labels": labels,
        "name": checkpoint,
        "seed": seed,
        "set": settings_of_recipe(set_ or []),
        "shuffle_volumes": shuffle_volumes,
    }
    queue("pretrain", args, checkpoint, detach=detach, inline=inline, dry_run=dry_run, as_json=as_json)


def settings_of_recipe(pairs: list[str]) -> dict[str, str]:
    """`key=value` pairs as a dictionary."""
    bad = next((pair for pair in pairs if "=" not in pair), None)
    if bad is not None:
        raise InputError(f"Expected --set key=value, got {bad!r}; for instance --set epochs=4.")
    return dict(pair.split("=", 1) for pair in pairs)


def embed(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint: name, id or hash prefix.")],
    cohort: Annotated[str, typer.Option(help="Cohort whose scans to embed.")],
    detach: Detach = False,
    inline: Inline = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Turn the scans of a cohort into standardised vectors, searchable by SQL.

    Examples:
      lachesis embed tiny-tte --cohort chest
      lachesis embed 3f2a91 --cohort chest --detach
    """
    args = {"checkpoint": checkpoint, "cohort": cohort}
    queue("embed", args, checkpoint, detach=detach, inline=inline, dry_run=dry_run, as_json=as_json)


def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint: name, id or hash prefix.")],
    labels: Annotated[str, typer.Option(help="Label set of the tasks to judge by.")],
    against: Annotated[str | None, typer.Option(help="Checkpoint to subtract, paired by person.")] = None,
    truth: Annotated[Path | None, typer.Option(help="CSV of true log-hazards (simulated cohorts).")] = None,
    replicates: Annotated[int, typer.Option(help="Bootstrap replicates.", min=100)] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    detach: Detach = False,
    inline: Inline = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Fit heads on frozen embeddings (train), choose on tuning, judge on held out, with intervals by person.

    Examples:
      lachesis evaluate tiny-tte --labels outcomes
      lachesis evaluate tiny-tte --labels outcomes --against tiny-base
    """
    args = {
        "checkpoint": checkpoint,
        "labels": labels,
        "against": against,
        "truth": existing(truth, "a file of true log-hazards") if truth else None,
        "replicates": replicates,
        "seed": seed,
    }
    queue("evaluate", args, checkpoint, detach=detach, inline=inline, dry_run=dry_run, as_json=as_json)


def report(
    labels: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Label set; default the newest one with metrics.")
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Where to write the page, too.")] = None,
    detach: Detach = False,
    inline: Inline = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Write one self-contained HTML page of everything known about a label set.

    Examples:
      lachesis report outcomes -o report.html
      lachesis report
    """
    args = {"labels": labels, "output": str(output.absolute()) if output else None}
    queue("report", args, labels, detach=detach, inline=inline, dry_run=dry_run, as_json=as_json)


def register(app: typer.Typer) -> None:
    """Add the stages to the command line, in the order data flows."""
    app.add_typer(load, name="load")
    for command in (cohort, tasks, label, pretrain, embed, evaluate, report):
        app.command()(command)
