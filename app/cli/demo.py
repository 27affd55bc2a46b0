"""`simulate` and `demo`: the main job from extract to report, on a simulated cohort or on real input."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from app.errors import InputError
from app.settings import Settings, read_settings

SOURCE = "demo"
"""A demo replaces the one before it; beside a real source with the same person ids it is refused."""

SIMULATED_TASKS = ("hf", "copd", "cancer", "death")

Run = Callable[..., dict[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What one demo runs on."""

    omop: Path
    images: Path
    root: Path | None
    encoder: str
    arbitrary_pairing: bool
    task_args: dict[str, Any]
    """Arguments that choose the tasks judged."""
    size: int
    """Pretraining tasks."""
    top: int
    """Pretraining tasks judged beside them, those with most held-out events."""
    truth: Path | None
    seed: int
    recipe: dict[str, str]


def simulate(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder to write; made if absent, refused if not empty.")
    ],
    persons: Annotated[int, typer.Option(help="Persons, one scan each.", min=10)] = 1500,
    seed: Annotated[int, typer.Option(help="Seed; the same seed writes the same bytes.")] = 0,
) -> None:
    """Write a simulated OMOP extract and CT phantoms with known hazards; "simulated" stands on everything.

    Examples:
      lachesis simulate /tmp/cohort --persons 1500 --seed 1
      lachesis simulate sim && lachesis load omop sim/omop --source simulated
    """
    write_simulation(folder, persons, seed)
    typer.echo(
        f"{folder}: {persons} simulated persons and scans; "
        f"tasks in {folder / 'tasks'}, true hazards in {folder / 'truth.csv'}"
    )


def write_simulation(folder: Path, persons: int, seed: int) -> None:
    """Simulate into an empty folder, with a progress bar."""
    from app.cli.follow import bar
    from app.loading.simulate import simulate as write

    if folder.exists() and any(folder.iterdir()):
        raise InputError(
            f"Expected an empty folder for the simulated cohort, found files in {folder}; name another one."
        )
    with bar("simulate", persons, "persons") as advance:
        write(folder, persons=persons, seed=seed, report=advance)


def demo(
    omop: Annotated[Path | None, typer.Option(help="A real OMOP extract; default: simulate one.")] = None,
    images: Annotated[Path | None, typer.Option(help="Manifest of its scans.")] = None,
    root: Annotated[Path | None, typer.Option(help="Folder the manifest's paths are relative to.")] = None,
    encoder: Annotated[str, typer.Option(help="Encoder to train.")] = "tiny",
    arbitrary_pairing: Annotated[
        bool, typer.Option("--arbitrary-pairing", help="The scans are not these persons' own; every page will say so.")
    ] = False,
    persons: Annotated[int, typer.Option(help="Persons to simulate.", min=200)] = 1500,
    size: Annotated[int, typer.Option(help="Pretraining tasks.", min=1)] = 64,
    seed: Annotated[int, typer.Option(help="Seed of simulation and training.")] = 0,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value of the recipe, e.g. epochs=4.")] = None,
) -> None:
    """Run the main job: load, cohort, tasks, label, pretrain, embed, evaluate, report.

    Examples:
      lachesis demo
      lachesis demo --omop /data/omop --images manifest.csv --root /mnt/pacs
    """
    from app.cli.options import existing
    from app.cli.stages import settings_of_recipe

    if (omop is None) != (images is None):
        raise InputError("Expected --omop and --images together, got one of them; give both, or neither to simulate.")
    if omop and images:
        existing(omop, "a folder of OMOP files")
        existing(images, "a manifest of scans")
    started = time.monotonic()
    settings = home_for_demo()
    recipe = settings_of_recipe(set_ or [])
    if omop and images:
        plan = real_plan(omop, images, root, encoder, arbitrary_pairing, size, seed, recipe)
    else:
        plan = simulated_plan(settings, encoder, persons, size, seed, recipe)
    report = run_flow(settings, plan)
    conclude(settings, report, time.monotonic() - started)


def home_for_demo() -> Settings:
    """The store here, made and started if there is none."""
    from app.embedded import ensure_up

    settings = read_settings()
    settings = replace(settings, home=settings.home_to_be)
    ensure_up(settings, create=True)
    return settings


def simulated_plan(
    settings: Settings, encoder: str, persons: int, size: int, seed: int, recipe: dict[str, str]
) -> Plan:
    """Simulate unless this very cohort lies there already."""
    from app.tasks import read_task_file

    folder = settings.home_to_be / "demo" / f"simulated-{persons}-seed{seed}"
    if not (folder / "manifest.csv").exists():
        write_simulation(folder, persons, seed)
    specs = [read_task_file(folder / "tasks" / f"{name}.toml").to_dict() for name in SIMULATED_TASKS]
    return Plan(
        omop=folder / "omop",
        images=folder / "manifest.csv",
        root=None,
        encoder=encoder,
        arbitrary_pairing=False,
        task_args={"specs": specs},
        size=size,
        top=0,
        truth=folder / "truth.csv",
        seed=seed,
        recipe=recipe,
    )


def real_plan(
    omop: Path,
    images: Path,
    root: Path | None,
    encoder: str,
    arbitrary: bool,
    size: int,
    seed: int,
    recipe: dict[str, str],
) -> Plan:
    """Judge every clinical task, and the five pretraining tasks with most held-out events."""
    from app.tasks import builtin, clinical_task_names

    return Plan(
        omop=omop.absolute(),
        images=images.absolute(),
        root=root.absolute() if root else None,
        encoder=encoder,
        arbitrary_pairing=arbitrary,
        task_args={"specs": [builtin(name).to_dict() for name in clinical_task_names()], "allow_absent": True},
        size=size,
        top=5,
        truth=None,
        seed=seed,
        recipe=recipe,
    )


def run_flow(settings: Settings, plan: Plan) -> dict[str, Any]:
    """Queue the stages one after the other; the result of the report."""
    from app.cli.follow import submit_and_follow

    def run(kind: str, made: str, /, **args: Any) -> dict[str, Any]:
        return submit_and_follow(settings, kind, args, made, detach=False, inline=False, as_json=False)

    load_and_label(run, plan)
    base, trained = f"{plan.encoder}-untrained-s{plan.seed}", f"{plan.encoder}-tte-s{plan.seed}"
    for arm, name in (("base", base), ("tte", trained)):
        training = {
            "encoder": plan.encoder,
            "labels": "pretraining",
            "name": name,
            "seed": plan.seed,
            "set": plan.recipe,
        }
        run("pretrain", name, arm=arm, **training)
        run("embed", name, checkpoint=name, cohort="demo")
    truth = str(plan.truth) if plan.truth else None
    judged = {"checkpoint": trained, "against": base, "seed": plan.seed, "replicates": 1000}
    run("evaluate", trained, labels="outcomes", truth=truth, **judged)
    if plan.top:
        run("evaluate", trained, labels="pretraining", top=plan.top, **judged)
    sets = ["outcomes", "pretraining"] if plan.top else ["outcomes"]
    return run("report", "demo", labels=sets, name="demo")


def load_and_label(run: Run, plan: Plan) -> None:
    """From files to labels."""
    root = {"images": str(plan.root)} if plan.root else None
    run(
        "load",
        SOURCE,
        what="omop",
        path=str(plan.omop),
        source=SOURCE,
        mode="snapshot",
        max_rejects=0.05,
        allow_shrink=True,
    )
    run(
        "load",
        SOURCE,
        what="images",
        path=str(plan.images),
        root=root,
        source=f"{SOURCE}-images",
        arbitrary_pairing=plan.arbitrary_pairing,
        mode="snapshot",
        allow_shrink=True,
    )
    run("cohort", "demo", name="demo", follow_up="observation_period", per="study")
    run("tasks", "pretraining", name="pretraining", cohort="demo", size=plan.size)
    run("tasks", "outcomes", name="outcomes", cohort="demo", **plan.task_args)
    for name in ("pretraining", "outcomes"):
        run("label", name, name=name, cohort="demo", tasks=name)


QUERIES = (
    "SELECT task, status, sum(n) AS scans FROM label.task_count WHERE label_set = 'outcomes' "
    "GROUP BY 1, 2 ORDER BY 1, 2",
    "SELECT task, metric, inputs, arm, round(value::numeric, 3) AS value, ci_low, ci_high, reason FROM model.metric "
    "WHERE metric LIKE '%harrell_c' ORDER BY task, inputs",
    "SELECT n.* FROM model.embedding e, model.neighbours(e.image_occurrence_id, e.checkpoint_id::text, 5) n LIMIT 5",
)


def conclude(settings: Settings, report: dict[str, Any], seconds: float) -> None:
    """The table, the report's path and three queries to try."""
    from app.cli.look import print_table

    print_table(
        report.get("summary", []), "Held out, mean Harrell's C of the Cox head (95 % interval, bootstrap by person)"
    )
    for note in report.get("notes", []):
        typer.echo(f"  {note}")
    typer.echo(f"\nReport: {report['file']}")
    typer.echo(
        f"The whole flow took {seconds:.0f} s. The store stays up; `lachesis down` stops it. Three queries to try:\n"
    )
    command = "lachesis" if sys.argv[0].endswith("__main__.py") else sys.argv[0]
    for query in QUERIES:
        typer.echo(f'  {command} sql "{query}"')


def register(app: typer.Typer) -> None:
    """Add `simulate` and `demo`."""
    app.command()(simulate)
    app.command()(demo)
