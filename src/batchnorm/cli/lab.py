"""`batchnorm lab`: experiments."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batchnorm.cli.options import assignment
from batchnorm.cli.settings import text_of
from batchnorm.errors import InputError
from batchnorm.progress import trials_bar

if TYPE_CHECKING:
    from batchnorm.lab import Experiment, Result
    from batchnorm.lab.settings import Config

EXAMPLES = """**Examples**

`batchnorm lab list` - the experiments, with the question of each and how long it takes

`batchnorm lab figure1 --quick` - one experiment, short

`batchnorm lab all --quick` - all of them, about 6 minutes on two cores; without --quick about an hour and a half

`batchnorm lab landscape --network mymodels:resnet --data mydata:load --set steps=500` - on your own network

`batchnorm lab ghost --network mymodels:small --data digits --set width=32` - an argument of your factory

`batchnorm lab explain --set layer=3.norm --set channel=7` - walk one mini-batch through a layer, with real numbers

`batchnorm lab play` - a page to play with: pools, one layer, running averages, folding, a network that learns

`batchnorm lab play --network mymodels:resnet --checkpoint net.pt --data mydata:load` - the same on your own network

`batchnorm lab explain --run runs/figure1-mnist5k-1 --set channel=3` - the same on the network and data of a run
"""


def lab(
    names: Annotated[
        list[str], typer.Argument(help="Experiments, `all`, `list`, `explain` or `play`.", metavar="NAME...")
    ],
    quick: Annotated[bool, typer.Option("--quick", help="Shorter settings.")] = False,
    seeds: Annotated[int, typer.Option(help="How many, from 0 up; 5 or more for a verdict.")] = 5,
    network: Annotated[str | None, typer.Option(help=text_of("network"), show_default="each experiment's own")] = None,
    data: Annotated[str | None, typer.Option(help=text_of("data"), show_default="each experiment's own")] = None,
    insert: Annotated[bool, typer.Option("--insert", help="Put batch norm into a --network that has none.")] = False,
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", "--weights", help="Weights of --network, for `play` alone.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="A setting of every experiment named, NAME=VALUE as in steps=500, or an argument of the factory of "
            "--network; may be repeated.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the page and of the finished seeds.")] = Path("runs/lab"),
    workers: Annotated[
        int | None, typer.Option(help="Processes; each seed computes on one thread.", show_default="one a core")
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(
            help="The folder of a run of `batchnorm train`, instead of --network and --data. `explain` and `play` take "
            "its trained network; experiments train the same network on the same data."
        ),
    ] = None,
) -> None:
    """Run experiments that show what batch norm does, and whether the papers' claims hold here.

    Each experiment has a question, a setting, and a number that counts as reproducing its claim. It is run over seeds,
    and the page says what came of it, ties and failures included. A training that diverges is recorded, not fatal.
    Finished seeds are kept in the folder: after Ctrl-C, the same command goes on from them.
    """
    from batchnorm.lab.experiments import EXPERIMENTS, find

    if names == ["list"]:
        _list_experiments(list(EXPERIMENTS.values()))
        return
    if run is not None and (network is not None or data is not None or checkpoint is not None or insert):
        raise InputError("lab: --network, --data, --checkpoint and --insert do not go with --run; a run has its own.")
    changes = _changes(names, assignments, network)
    changes |= {key: value for key, value in (("network", network), ("data", data)) if value is not None}
    if insert:
        changes["insert"] = True
    if names == ["play"]:
        typer.echo(f"Page: {_play(out, checkpoint, changes, run)}")
        return
    if checkpoint is not None:
        raise InputError("lab: --checkpoint is for `lab play`; experiments train their networks themselves.")
    if names == ["explain"]:
        typer.echo(f"Page: {_explain(out, changes, run)}")
        return
    if run is not None:
        from batchnorm.lab.of_runs import settings_of_run

        changes = settings_of_run(run) | changes
    chosen = list(EXPERIMENTS.values()) if names == ["all"] else [find(name) for name in names]
    settings = [(experiment, experiment.configure(quick=quick, **changes)) for experiment in chosen]

    from batchnorm.lab import run_all
    from batchnorm.report import write_gallery

    with trials_bar("seeds;") as progress:
        results = run_all(settings, seeds=seeds, folder=out, workers=workers or os.cpu_count() or 1, progress=progress)
    name = "gallery" if names == ["all"] else "-".join(names)
    page = write_gallery(out / f"{name}{'-quick' if quick else ''}.html", chosen, results)
    _print_findings(chosen, results)
    typer.echo(f"\nPage: {page}")


def _changes(names: list[str], assignments: list[str] | None, network: str | None) -> dict[str, Any]:
    """What --set says: settings of what is to run, and arguments of the network's factory."""
    from batchnorm.cli.networks import has_argument
    from batchnorm.lab.experiments import EXPERIMENTS, find
    from batchnorm.lab.explanation import ExplainConfig
    from batchnorm.lab.playing import PlayConfig

    given = dict(assignment(text) for text in assignments or ())
    if network is None:
        return given
    other: dict[str, list[Config]] = {"explain": [ExplainConfig()], "play": [PlayConfig()]}
    every = [experiment.config for experiment in EXPERIMENTS.values()] if names == ["all"] else None
    configs = every or other.get(names[0]) or [find(name).config for name in names]
    settings = {field.name for config in configs for field in dataclasses.fields(config)}
    arguments = {name: given.pop(name) for name in list(given) if name not in settings and has_argument(network, name)}
    return given | ({"arguments": arguments} if arguments else {})


def _explain(out: Path, changes: dict[str, Any], run: Path | None) -> Path:
    from batchnorm.lab.explanation import explain_built_in
    from batchnorm.lab.of_runs import explain_run
    from batchnorm.report.explain_page import write_explanation

    found, source = explain_built_in(**changes) if run is None else explain_run(run, **changes)
    return write_explanation(out / "explain.html", found, source=source)


def _play(out: Path, checkpoint: Path | None, changes: dict[str, Any], run: Path | None) -> Path:
    from batchnorm.lab.of_runs import play_run
    from batchnorm.lab.playing import lesson, play_built_in
    from batchnorm.report.play_page import write_play

    if run is not None:
        found = play_run(run, **changes)
    else:
        found = play_built_in(checkpoint=checkpoint, **changes) if changes or checkpoint else lesson()
    return write_play(out / "play.html", found)


def _list_experiments(experiments: list[Experiment]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "question", "quick", "full", box=None, padding=(0, 2, 0, 0))
    for experiment in experiments:
        quick, full = (f"{5 * seconds / 60:.0f} min" if seconds > 9 else "<1 min" for seconds in experiment.seconds)
        table.add_row(experiment.name, experiment.question, quick, full)
    console = Console(highlight=False)
    console.print(table)
    console.print("\nMinutes of one core, for five seeds.")


def _print_findings(experiments: list[Experiment], results: list[Result]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    styles = {"reproduced": "bold green", "tie": "bold yellow", "not reproduced": "bold red", "note": "bold"}
    console = Console(highlight=False)
    for experiment, result in zip(experiments, results, strict=True):
        console.print(Text(f"\n{experiment.title}", "bold"))
        rows = Table.grid(padding=(0, 2))
        for finding in result.findings:
            rows.add_row(Text(finding.kind, styles[finding.kind]), Text(finding.text))
        console.print(rows)


def register(app: typer.Typer) -> None:
    """Make it a command of the application."""
    app.command(epilog=EXAMPLES)(lab)
