"""`batchnorm diagnose`: how far evaluation is from training, and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from batchnorm.cli import options
from batchnorm.cli.networks import Given
from batchnorm.training.config import BATCH_SIZE, SEED

EXAMPLES = """**Examples**

`batchnorm diagnose --network mymodels:resnet --weights net.pt --data train.npz --html diagnosis.html`

`batchnorm diagnose --network mymodels:resnet --weights net.pt --data mydata:load --batch-size 8 --in-order`
"""


def diagnose(
    network: options.Factory = None,
    data: options.TrainingData = None,
    run: options.Run = None,
    weights: options.Weights = None,
    labels: options.Labels = None,
    batch_size: Annotated[int, typer.Option(help="Samples a batch, as in training.")] = BATCH_SIZE,
    batches: Annotated[int, typer.Option(help="How many to read at most.")] = 50,
    in_order: Annotated[
        bool, typer.Option("--in-order", help="Batches in the order of the data, where training has it so.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the order, and of the split where the data has none.")] = SEED,
    html: Annotated[Path | None, typer.Option(help="Also write a page with a figure.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the tables.")] = False,
    arguments: options.Arguments = None,
) -> None:
    """Say how far a network's evaluation is from its training, which layers and what causes it, and what mends it.

    The network runs on the same batches as in training, in evaluation, and in evaluation with exact statistics. Every
    layer's running statistics are compared with the data's, and with what each cause would make of them: too few
    updates, other data, earlier weights, a noisy average, sorted batches, dropout. Nothing of the network is changed.
    Data needs no labels; with them loss and accuracy are compared, too, over the training part.
    """
    import torch

    from batchnorm import diagnose as examine
    from batchnorm.training.samples import Parts

    options.at_least_one("diagnose", "--batch-size", batch_size)
    options.at_least_one("diagnose", "--batches", batches)
    given = Given("diagnose", network, run, weights, arguments)
    net, inputs = given.with_inputs_of(data, labels, seed)
    size = len(inputs.x)
    order = torch.arange(size) if in_order else torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    parts = [part for part in order.split(batch_size) if len(part) == min(batch_size, size)][:batches]
    found = examine(net, Parts(inputs.x, parts, labels=inputs.y), progress=True)
    if html is not None:
        from batchnorm.report import write_diagnosis

        write_diagnosis(html, found, source=f"{network or run} on {inputs.name}, {batch_size} samples a batch.")
        typer.echo(f"Written: {html}", err=as_json)
    typer.echo(json.dumps(found.to_dict(), indent=2) if as_json else str(found))


def register(app: typer.Typer) -> None:
    """Make it a command of the application."""
    app.command(epilog=EXAMPLES)(diagnose)
