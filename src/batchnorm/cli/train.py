"""`batchnorm train`: Procedure 2 of Ioffe & Szegedy (2015), end to end."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batchnorm.cli.options import assignments
from batchnorm.cli.settings import with_settings
from batchnorm.errors import InputError
from batchnorm.progress import training_bar
from batchnorm.training.config import TrainConfig

if TYPE_CHECKING:
    from batchnorm.training.results import TrainResult

EXAMPLES = """**Examples**

`batchnorm train` - the default: Figure 1 of Ioffe & Szegedy on 5,000 MNIST digits

`batchnorm train --network convnet --data digits --steps 500`

`batchnorm train --network lstm --data japanese-vowels`

`batchnorm train --data table.npz --lr 0.05 --out runs/table`

`batchnorm train --network mymodels:resnet --data mydata:load --baseline`

`batchnorm train --resume runs/figure1-mnist5k-1` - go on after Ctrl-C, to the same bits

`torchrun --nproc-per-node 2 -m batchnorm train --batch-size 64` - on two ranks, which share each batch
"""


@with_settings(TrainConfig)
def train(
    context: typer.Context,
    resume: Annotated[
        Path | None,
        typer.Option(help="A run folder to go on from; only --steps may be given with it."),
    ] = None,
    **settings: Any,
) -> None:
    """Train a network with batch norm, and make it a proven network for inference.

    Procedure 2 of Ioffe & Szegedy (2015), end to end: insert batch norm and drop the biases that it
    makes redundant, train, compute exact population statistics, freeze, fold, verify, and export
    (safetensors, torch.export, ONNX). The run folder gets all of these, metrics.json,
    certificate.json, a checkpoint, plots, and report.html, which says how it went.
    """
    if resume is not None:
        _refuse_beside_resume(context)
    from batchnorm.report import write_report
    from batchnorm.training.files import CHECKPOINT, going_on_from
    from batchnorm.writing import alone_in

    with contextlib.nullcontext() if _is_other_rank() else training_bar() as progress:
        if resume is not None:
            from batchnorm.training import resume as go_on

            result = go_on(resume, steps=settings["steps"], progress=progress)
        else:
            from batchnorm.training import train as run

            settings["arguments"] = assignments(settings["arguments"])
            result = run(TrainConfig(**settings), progress=progress)
        if progress is None:  # the first rank reports
            return
        progress.stage("writing the report")
        with alone_in(result.folder), going_on_from(result.folder, result.folder / CHECKPOINT):
            report = write_report(result, result.folder)
    _print_result(result, report)
    if not result.ok:
        raise typer.Exit(1)


def _is_other_rank() -> bool:
    """Whether torchrun has started this process beside a first one."""
    return os.environ.get("RANK", "0") != "0" and os.environ.get("WORLD_SIZE", "1") != "1"


def _refuse_beside_resume(context: typer.Context) -> None:
    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = [name for name, source in sources.items() if source and source.name == "COMMANDLINE"]
    extra = [f"--{name.replace('_', '-')}" for name in given if name not in ("resume", "steps")]
    if extra:
        raise InputError(
            f"train --resume: {', '.join(extra)} cannot be changed in the middle of a run. "
            "Leave it out (only --steps may be given), or start a new run."
        )


def _print_result(result: TrainResult, report: Path) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from batchnorm.report import verdict

    console = Console(highlight=False)
    findings = Table.grid(padding=(0, 2))
    styles = {"win": "bold green", "tie": "bold yellow", "loss": "bold red", "check": "bold green", "note": "bold"}
    for finding in verdict(result):
        findings.add_row(Text(finding.kind, styles[finding.kind]), Text(finding.text))
    console.print(findings)
    for export in result.exports:
        console.print(Text(f"  {result.folder / export.file}: {export.status}"))
    console.print(Text(f"\nReport: {report}"))


def register(app: typer.Typer) -> None:
    """Make it a command of the application."""
    app.command(epilog=EXAMPLES)(train)
