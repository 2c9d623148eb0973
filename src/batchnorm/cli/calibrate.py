"""`batchnorm calibrate`: exact population statistics."""

from __future__ import annotations

from typing import Annotated

import typer

from batchnorm.cli import options
from batchnorm.cli.networks import build, save
from batchnorm.cli.settings import setting
from batchnorm.training.config import BATCH_SIZE, SEED

EXAMPLES = (
    "`batchnorm calibrate --network mymodels:resnet --weights net.pt --data train.npz --out calibrated.safetensors`"
)


def calibrate(
    network: options.Factory,
    data: options.TrainingData,
    out: options.WeightsOut,
    weights: options.Weights = None,
    labels: options.Labels = None,
    method: Annotated[str, setting("method")] = "pooled",
    batch_size: options.BatchSize = BATCH_SIZE,
    seed: Annotated[int, typer.Option(help="Of the split, where the data has none.")] = SEED,
) -> None:
    """Compute exact population statistics of a network's batch norm layers over data."""
    from batchnorm import calibrate as compute
    from batchnorm.training import load_data

    samples = load_data(data, seed=seed, labels=labels)
    net = build(network, samples.input_shape, samples.num_classes, weights)
    size = len(samples.x_train)
    starts = range(0, size - batch_size + 1 if method == "ioffe" else size, max(1, batch_size))
    batches = [samples.x_train[i : i + batch_size] for i in starts]
    compute(net, batches, method=method)  # type: ignore[arg-type]  # which checks it
    save(net, out)


def register(app: typer.Typer) -> None:
    """Make it a command of the application."""
    app.command(epilog=EXAMPLES)(calibrate)
