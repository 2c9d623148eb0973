"""`batchnorm adapt`: batch norm for shifted data."""

from __future__ import annotations

from typing import Annotated

import typer

from batchnorm.cli import options
from batchnorm.cli.networks import Given, save
from batchnorm.cli.settings import setting
from batchnorm.training.config import BATCH_SIZE

EXAMPLES = """**Examples**

`batchnorm adapt --network mymodels:resnet --weights net.pt --data shifted.npz --out adapted.safetensors`

`batchnorm adapt --network mymodels:resnet --weights net.pt --data camera.npy --prior 0 --out adapted.safetensors`
"""


def adapt(
    data: Annotated[str, setting("data", more="Labels are not looked at, and need not be there.")],
    out: options.WeightsOut,
    network: options.Factory = None,
    run: options.Run = None,
    weights: options.Weights = None,
    labels: Annotated[
        str | None,
        typer.Option(
            help="The column of a table that is no feature. Default: y, label, target or class, or that of --run."
        ),
    ] = None,
    prior: Annotated[float, typer.Option(help="What the old statistics count, in samples; 0: nothing.")] = 16,
    method: Annotated[
        str, typer.Option(help="statistics; or tent, which also trains gamma and beta on the entropy of the outputs.")
    ] = "statistics",
    lr: Annotated[float, typer.Option(help="Learning rate, of tent.")] = 1e-3,
    batch_size: options.BatchSize = BATCH_SIZE,
    arguments: options.Arguments = None,
) -> None:
    """Adapt a trained network's batch norm to new, shifted data without labels.

    Mean and variance become N/(N + n) of the old and n/(N + n) of the new ones, N being --prior and n the number of
    samples (Schneider et al. 2020); tent: Wang et al. 2021. Everything else stays. All samples of the data are used.
    """
    import torch

    from batchnorm import adapt as adapt_to
    from batchnorm.training import load_run
    from batchnorm.training.datasets import load_samples
    from batchnorm.training.samples import Parts

    options.at_least_one("adapt", "--batch-size", batch_size)
    given = Given("adapt", network, run, weights, arguments)
    if run is not None:
        held = load_run(run)
        net, samples = held.network, load_samples(data, held.preparation, labels or held.label_column(data))
    else:
        samples = load_samples(data, labels=labels)
        net = given.build(tuple(samples.shape[1:]), None)
    given.tried(net, samples[torch.arange(min(2, len(samples)))])
    batches = Parts(samples, torch.arange(len(samples)).split(batch_size))
    adapt_to(net, batches, prior=prior, method=method, learning_rate=lr)  # type: ignore[arg-type]  # which checks it
    save(net, out)


def register(app: typer.Typer) -> None:
    """Make it a command of the application."""
    app.command(epilog=EXAMPLES)(adapt)
