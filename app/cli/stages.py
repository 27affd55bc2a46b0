"""One command a stage: each queues a job, follows it and ends with the job's exit code."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app.cli.options import AsJson, Detach, DryRun, Inline, existing, iso_date, one_of, queue
from app.errors import InputError

FOLLOW_UPS = ("observation_period", "last_event", "data_cut")
ARMS = ("base", "mtl", "visit", "tte")


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
    from_: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="CSV of scans: image_occurrence_id, series_uid, study_uid or person_id[,acquired_at][,split].",
        ),
    ] = None,
    from_omop_cohort: Annotated[
        str | None, typer.Option(help="SCHEMA.TABLE:ID: scans made while their person was in that OMOP cohort.")
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
      lachesis cohort mine --from my_patients.csv
      lachesis cohort embolism --from-omop-cohort results.cohort:17
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
        "from": existing(from_, "a CSV file of scans") if from_ else None,
        "from_omop_cohort": from_omop_cohort,
    }
    if from_ and from_omop_cohort:
        raise InputError("Expected either --from or --from-omop-cohort, got both; give one of the two.")
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
    source_concepts: Annotated[
        bool,
        typer.Option("--source-concepts", help="Choose among source concepts, too, as children of what they map to."),
    ] = False,
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
    from app.tasks import chosen_tasks

    if (size is None) == (not task and not file):
        raise InputError("Expected either --size or at least one --task or --file; give one of the two.")
    specs = chosen_tasks(task or [], [Path(existing(f, "a task file")) for f in file or []])
    if source_concepts and size is None:
        raise InputError("Expected --source-concepts beside --size only; tasks by name or file say source_codes.")
    args = {"name": name, "cohort": cohort, "size": size, "ban": ban, "specs": [s.to_dict() for s in specs]}
    args["source_concepts"] = source_concepts
    queue("tasks", args, name, detach=detach, inline=inline, dry_run=dry_run, as_json=as_json)


def label(
    name: Annotated[str, typer.Argument(help="Name of the label set.")],
    cohort: Annotated[str | None, typer.Option(help="Cohort; that of the current version by default.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Task set; that of the current version by default.")] = None,
    allow_unknown_concepts: Annotated[
        bool,
        typer.Option(
            "--allow-unknown-concepts", help="Label although the vocabulary lacks over 0.1 % of a source's events."
        ),
    ] = False,
    shards: Annotated[
        int | None, typer.Option(help="Jobs that share the work; default one per 20 M events.", min=1, max=64)
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Compute every member, also those an earlier version has labels of.")
    ] = False,
    detach: Detach = False,
    inline: Inline = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Materialise time-to-event labels of a cohort for a task set; any number of workers share a large one.

    Without --cohort and --tasks, a name that has labels is made again: with the newest cohort and task set of the names
    they were made of. Only members whose inputs differ are computed; the result is that of computing all.

    Examples:
      lachesis label chest --cohort chest --tasks pretraining
      lachesis label outcomes --cohort chest --tasks outcomes --detach
      lachesis label outcomes
    """
    args = {"name": name, "cohort": cohort, "tasks": tasks, "allow_unknown_concepts": allow_unknown_concepts}
    queue(
        "label",
        args | {"shards": shards, "full": full},
        name,
        detach=detach,
        inline=inline,
        dry_run=dry_run,
        as_json=as_json,
    )


def features(
    cohort: Annotated[str, typer.Argument(help="Cohort whose scans' features to make.")],
    tasks: Annotated[str | None, typer.Option(help="Count the events of these tasks, too.")] = None,
    window: Annotated[list[int] | None, typer.Option(help="Days before the scan to count in; default 30, 365.")] = None,
    values: Annotated[int, typer.Option(help="Last values of so many measurements.", min=0, max=1000)] = 20,
    detach: Detach = False,
    inline: Inline = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Make what is known of each scan's person at its index: age, sex, counts by window, last values, open visits.

    Examples:
      lachesis features chest
      lachesis features chest --tasks outcomes --window 90 --window 365 --values 50
    """
    args = {"cohort": cohort, "tasks": tasks, "windows": window or None, "values": values}
    queue("features", args, cohort, detach=detach, inline=inline, dry_run=dry_run, as_json=as_json)


def pretrain(
    arm: Annotated[str | None, typer.Argument(help="base, mtl, visit or tte.")] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            help="tiny, densenet121, resnet18, resnet50, resnet152, swinunetr or your own: `lachesis ls encoders`."
        ),
    ] = None,
    labels: Annotated[str | None, typer.Option(help="Label set to learn from.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the checkpoint; default ENCODER-ARM-sSEED.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, order and augmentation.")] = 0,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value of the recipe, e.g. epochs=4.")] = None,
    recipe: Annotated[str | None, typer.Option(help="A preset of the encoder's recipe: paper or paper_lung.")] = None,
    shuffle_volumes: Annotated[
        bool, typer.Option("--shuffle-volumes", help="A control: permute volumes among persons first.")
    ] = False,
    continue_: Annotated[
        str | None, typer.Option("--continue", help="Checkpoint whose finished training goes on, by --epochs more.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="How many more, with --continue.", min=1)] = None,
    gpus: Annotated[int, typer.Option(help="Devices of one host that share each step.", min=1, max=64)] = 1,
    detach: Detach = False,
    inline: Inline = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Train an encoder by what the records say of the time after each scan.

    Arms: `tte` learns when each task's outcome comes; `mtl` whether clinical outcomes come by their horizons; `visit`
    which codes the scan's own visit has; `base` nothing: it keeps the given weights (untrained without any).

    A job that is stopped or killed goes on from its last stop. Settings are those of the encoder's recipe; every one,
    curves, and what happens when something breaks: docs/pretraining.md and docs/encoders.md.

    Examples:
      lachesis pretrain tte --encoder tiny --labels pretraining --name tiny-tte
      lachesis pretrain mtl --encoder densenet121 --labels outcomes --seed 3 --set batch=4 --set epochs=10
      lachesis pretrain tte --encoder resnet18 --labels pretraining --set weights=resnet18.safetensors --set select=best
      lachesis pretrain tte --encoder tiny --labels pretraining --set objective=discrete --set ema=0.99 --detach
      lachesis pretrain --continue tiny-tte --epochs 10
    """
    if continue_ is not None:
        if epochs is None or arm or encoder or labels or set_ or seed or shuffle_volumes:
            raise InputError(
                "Expected --continue CHECKPOINT with --epochs N and, if wanted, --name alone: all else is that of the "
                f"training which goes on; to start another from its weights, --set weights={continue_}."
            )
        more = {"continue": continue_, "epochs": epochs, "name": name, "gpus": gpus}
        queue("pretrain", more, name or continue_, detach=detach, inline=inline, dry_run=dry_run, as_json=as_json)
        return
    if epochs is not None:
        raise InputError("Expected --epochs with --continue alone; for a new training give --set epochs=N.")
    if not (arm and encoder and labels):
        raise InputError(
            "Expected ARM, --encoder and --labels, as in `lachesis pretrain tte --encoder tiny --labels pretraining`, "
            "or --continue CHECKPOINT --epochs N."
        )
    one_of("ARM", arm, ARMS)
    checkpoint = name or f"{encoder}-{arm}-s{seed}"
    args = {
        "arm": arm,
        "encoder": encoder,
        "labels": labels,
        "name": checkpoint,
        "seed": seed,
        "set": settings_of_recipe(set_ or [], recipe),
        "shuffle_volumes": shuffle_volumes,
        "gpus": gpus,
    }
    queue("pretrain", args, checkpoint, detach=detach, inline=inline, dry_run=dry_run, as_json=as_json)


def settings_of_recipe(pairs: list[str], preset: str | None = None) -> dict[str, str]:
    """`key=value` pairs as a dictionary, with the name of a preset as its key `recipe`."""
    bad = next((pair for pair in pairs if "=" not in pair), None)
    if bad is not None:
        raise InputError(f"Expected --set key=value, got {bad!r}; for instance --set epochs=4.")
    return ({"recipe": preset} if preset else {}) | dict(pair.split("=", 1) for pair in pairs)


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
    for command in (cohort, tasks, label, features, pretrain, embed, evaluate, report):
        app.command()(command)
