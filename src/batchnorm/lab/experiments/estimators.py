"""Procedure 2: how the population's statistics are estimated (Ioffe & Szegedy 2015, Algorithm 2)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm import calibrate
from batchnorm.lab.experiment import Experiment, Measure, Panel
from batchnorm.lab.fitting import train
from batchnorm.lab.results import Finding, Table, Trial
from batchnorm.lab.settings import Config
from batchnorm.lab.task import Task
from batchnorm.lab.verdicts import compare, expect_more
from batchnorm.training.loop import batch_order, evaluate


@dataclass(frozen=True)
class EstimatorsConfig(Config):
    """Args: sizes: of the batches that are measured; samples: of the training part that are measured, 0 for all."""

    sizes: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    samples: int = 0


def _moving(net: nn.Module, batches: list[Tensor]) -> None:
    net.train()
    with torch.no_grad():
        for batch in batches:
            net(batch)


ESTIMATORS: dict[str, Callable[[nn.Module, list[Tensor]], object]] = {
    "moving average": _moving,
    "ioffe": lambda net, batches: calibrate(net, batches, method="ioffe"),
    "pooled": lambda net, batches: calibrate(net, batches),
    "sequential": lambda net, batches: calibrate(net, batches, method="sequential"),
}


def trial(config: EstimatorsConfig, task: Task) -> Trial:
    out = Trial(task.seed)
    net = task.normalized()
    train(net, task, every=None)
    x = task.data.x_train[batch_order(len(task.data.x_train), task.seed, 1)]
    x = x[: config.samples or None]
    truth = copy.deepcopy(net)
    calibrate(truth, [x], method="sequential")
    for name, estimate in ESTIMATORS.items():
        errors, accuracies = [], []
        for size in config.sizes:
            copied = copy.deepcopy(net)
            batches = [batch for batch in x.split(size) if len(batch) == size]
            estimate(copied, batches)
            errors.append(_error(copied, truth))
            accuracies.append(evaluate(copied, task.data)[1])
        out.curve("error", name, config.sizes, errors)
        out.curve("accuracy", name, config.sizes, accuracies)
        out.add(name, small=accuracies[0], large=accuracies[-1], error_small=errors[0], error_large=errors[-1])
    return out


def _error(net: nn.Module, truth: nn.Module) -> float:
    """Root mean square over all channels of the relative error of the running variance."""
    layers = [[m for m in n.modules() if isinstance(m, _BatchNorm)] for n in (net, truth)]
    ratios = [(a.running_var + a.eps) / (b.running_var + b.eps) - 1 for a, b in zip(*layers, strict=True)]
    return float(torch.cat(ratios).double().square().mean().sqrt())


def verdict(config: EstimatorsConfig, table: Table) -> list[Finding]:
    small, large = config.sizes[0], config.sizes[-1]
    return [
        expect_more(
            table, "error_large", "moving average", "pooled", f"Error of the variance at batch {large} (%)", unit=" %"
        ),
        expect_more(table, "small", "sequential", "moving average", f"Accuracy from batches of {small} (%)"),
        compare(table, "small", "sequential", "ioffe", f"Accuracy from batches of {small} (%)"),
        compare(table, "large", "sequential", "ioffe", f"Accuracy from batches of {large} (%)"),
    ]


EXPERIMENT = Experiment(
    name="estimators",
    title="Procedure 2: which estimator?",
    question="How good are estimates of the population's statistics from batches of a given size?",
    setting="One trained network; its statistics are estimated anew from batches of each size: by the moving average "
    "(momentum 0.1), by the mean of the batches' unbiased variances (ioffe, Algorithm 2, line 10), by pooled "
    "moments, and layer by layer under the final statistics of the layers before (sequential). The truth is the last "
    "from all samples in one batch: the statistics under which inference runs.",
    criterion="The moving average errs more than pooled moments at the largest size; at the smallest, where a "
    "layer's input in training is not what it is in inference, the sequential estimate gives the higher accuracy.",
    source="Ioffe & Szegedy 2015, Algorithm 2 (that the sequential one is needed is our own claim).",
    config=EstimatorsConfig(steps=5000),
    quick={"steps": 1000, "samples": 1600},
    smoke={"steps": 3, "sizes": (4, 16), "samples": 32, "data": "digits"},
    seconds=(3, 21),
    trial=trial,
    verdict=verdict,
    panels=(
        Panel(
            "error",
            "Error of the variance",
            x="batch size",
            y="relative error (%)",
            scale=100,
            xscale="log",
            yscale="log",
            limits=(0.1, None),
        ),
        Panel("accuracy", "Accuracy under the estimate", x="batch size", xscale="log", scale=100),
    ),
    measures={
        "error_small": Measure("error, smallest batch (%)", 100),
        "error_large": Measure("error, largest batch (%)", 100),
        "small": Measure("accuracy, smallest batch (%)", 100),
        "large": Measure("accuracy, largest batch (%)", 100),
    },
    caption="First panel: root mean square over all channels of the relative error of the variance (unbiased). Second: "
    "test accuracy under the estimate. The sequential estimate does not depend on the batch size, and its error lies "
    "below the first panel, except for 64: the incomplete last batch is left out, and 64 does not divide the samples.",
)
