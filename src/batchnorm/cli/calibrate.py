"""`batchnorm calibrate`: exact population statistics."""

from __future__ import annotations

from typing import Annotated

import typer

from batchnorm.cli import options
from batchnorm.cli.networks import Given, save
from batchnorm.cli.settings import setting
from batchnorm.training.config import BATCH_SIZE, SEED

EXAMPLES = (
    "`batchnorm calibrate --network mymodels:resnet --weights net.pt --data train.npz --out calibrated.safetensors`"
)


def calibrate(
    out: options.WeightsOut,
    network: options.Factory = None,
    data: options.TrainingData = None,
    run: options.Run = None,
    weights: options.Weights = None,
    labels: options.Labels = None,
    method: Annotated[str, setting("method")] = "pooled",
    batch_size: options.BatchSize = BATCH_SIZE,
    seed: Annotated[int, typer.Option(help="Of the split, where the data has none.")] = SEED,
    arguments: options.Arguments = None,
) -> None:
    """Compute exact population statistics of a network's batch norm layers over data.

    Data needs no labels. With labels its training part is used, as `batchnorm train` splits it; without, all of it.
    """
    import torch

    from batchnorm import calibrate as compute
    from batchnorm.training.samples import Parts

    options.at_least_one("calibrate", "--batch-size", batch_size)
    given = Given("calibrate", network, run, weights, arguments)
    net, inputs = given.with_inputs_of(data, labels, seed, any_labels=True)
    parts = torch.arange(len(inputs.x)).split(batch_size)
    batches = Parts(inputs.x, [part for part in parts if len(part) == batch_size or method != "ioffe"])
    compute(net, batches, method=method)  # type: ignore[arg-type]  # which checks it
    save(net, out)


def register(app: typer.Typer) -> None:
    """Make it a command of the application."""
    app.command(epilog=EXAMPLES)(calibrate)
