"""`batchnorm bench`: this package's layer beside torch's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from batchnorm.cli import options
from batchnorm.errors import InputError
from batchnorm.progress import waiting

EXAMPLES = """**Examples**

`batchnorm bench` - a few usual shapes

`batchnorm bench 64,256,28,28 4096,512 --dtype bfloat16 --threads 1`

`batchnorm bench --run runs/figure1-mnist5k-1` - the shapes of the layers of a run, in its batch size
"""


def bench(
    shapes: Annotated[
        list[str] | None, typer.Argument(help="Shapes (N, C, *space), as in 32,64,56,56.", metavar="SHAPE...")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="torch's choice")] = None,
    seconds: Annotated[float, typer.Option(help="For each phase of each shape.")] = 0.5,
    as_json: options.Json = False,
    run: Annotated[
        Path | None,
        typer.Option(help="The folder of a run of `batchnorm train`, instead of shapes: those of its layers."),
    ] = None,
) -> None:
    """Measure this package's layer beside torch's here: first whether it is right, then how fast.

    Both take turns in one process; times are medians, the ratio is how many times as fast ours is, errors are against
    float64 in units in the last place. If our layer is off by more than 16 units and by more than torch's there is
    no figure, and the exit code is 1. Other work on the machine shows in the times. After Ctrl-C what has been measured
    is shown.
    """
    from dataclasses import asdict

    import torch

    from batchnorm.lab.speed import SHAPES, Timing, compare

    if threads is not None:
        options.at_least_one("bench", "--threads", threads)
        torch.set_num_threads(threads)
    if run is not None and shapes:
        raise InputError("bench: give either shapes or --run.")
    wanted: Sequence[Sequence[int]] = SHAPES
    if run is not None:
        from batchnorm.lab.of_runs import shapes_of_run

        wanted = shapes_of_run(run)
    elif shapes:
        wanted = [options.sizes_of("bench", text) for text in shapes]
    found: list[Timing] = []
    try:
        with waiting("measuring"):
            found.extend(compare(wanted, dtype=dtype, device=device, seconds=seconds))
    finally:
        if as_json:
            typer.echo(json.dumps([{**asdict(timing), "ratio": timing.ratio} for timing in found], indent=2))
        elif found:
            _print_timings(found)
    if not all(timing.is_right for timing in found):
        raise typer.Exit(1)


def _print_timings(found: list[Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("shape", "phase"):
        table.add_column(name)
    for name in ("torch ms", "ours ms", "ratio", "torch error", "our error"):
        table.add_column(name, justify="right")
    for item in found:
        figures = (f"{item.torch:.3f}", f"{item.ours:.3f}", f"{item.ratio:.2f}") if item.is_right else ("wrong", "", "")
        shape = ",".join(map(str, item.shape))
        table.add_row(shape, item.phase, *figures, f"{item.torch_error:.2g}", f"{item.our_error:.2g}")
    Console(highlight=False).print(table)


def register(app: typer.Typer) -> None:
    """Make it a command of the application."""
    app.command(epilog=EXAMPLES)(bench)
