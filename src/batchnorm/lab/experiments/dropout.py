"""Dropout before and after batch norm: the variance shift (Li et al. 2019)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm import calibrate
from batchnorm.lab.experiment import Experiment, Measure, Panel
from batchnorm.lab.fitting import train
from batchnorm.lab.results import Finding, Table, Trial
from batchnorm.lab.settings import Config
from batchnorm.lab.task import Task, replace_norms
from batchnorm.lab.verdicts import compare, expect_more
from batchnorm.training.loop import evaluate


@dataclass(frozen=True)
class DropoutConfig(Config):
    """Args: rates: shares of the values that are dropped."""

    rates: tuple[float, ...] = (0.0, 0.1, 0.3, 0.5)


def trial(config: DropoutConfig, task: Task) -> Trial:
    out = Trial(task.seed)
    arms = {
        "dropout before": lambda layer, p: nn.Sequential(nn.Dropout(p), layer),
        "dropout after": lambda layer, p: nn.Sequential(layer, nn.Dropout(p)),
    }
    for arm, wrap in arms.items():
        accuracies, shifts, mended = [], [], []
        for rate in config.rates:
            net = replace_norms(task.normalized(), lambda layer, wrap=wrap, rate=rate: wrap(layer, rate))  # type: ignore[misc]
            train(net, task, every=None)
            accuracies.append(evaluate(net, task.data)[1])
            shifts.append(_variance_shift(net, task.data.x_train[:1000]))
            calibrate(net, task.data.x_train.split(config.batch_size), samples=2000)
            mended.append(evaluate(net, task.data)[1])
        out.curve("accuracy", arm, config.rates, accuracies)
        out.curve("accuracy", f"{arm}, calibrated", config.rates, mended)
        out.curve("shift", arm, config.rates, shifts)
        out.add(arm, accuracy=accuracies[-1], shift=shifts[-1])
        out.add(f"{arm}, calibrated", accuracy=mended[-1])
    return out


def _variance_shift(net: nn.Module, x: Tensor) -> float:
    """Mean over channels and layers of running variance / variance at inference (both unbiased)."""
    ratios: list[Tensor] = []

    def measure(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        flat = args[0].movedim(1, -1).flatten(0, -2)
        ratios.append((layer.running_var + layer.eps) / (flat.var(0) + layer.eps))  # type: ignore[operator]

    hooks = [m.register_forward_pre_hook(measure) for m in net.modules() if isinstance(m, _BatchNorm)]
    net.eval()
    with torch.no_grad():
        net(x)
    for hook in hooks:
        hook.remove()
    return float(torch.cat(ratios).median())


def verdict(config: DropoutConfig, table: Table) -> list[Finding]:
    rate = f"dropout {config.rates[-1]:g}"
    calibrated = f"Statistics measured again, {rate}: accuracy (%)"
    shift = f"Running / inference variance, {rate}"
    return [
        expect_more(table, "shift", "dropout before", "dropout after", shift, scale=1, unit="", digits=2),
        expect_more(table, "accuracy", "dropout before, calibrated", "dropout before", calibrated),
        compare(table, "accuracy", "dropout after", "dropout before", f"Accuracy at {rate} (%)"),
    ]


EXPERIMENT = Experiment(
    name="dropout",
    title="Dropout before batch norm",
    question="Does dropout before batch norm spoil the statistics for inference?",
    setting="Dropout directly before or directly behind every batch norm layer of the network of Figure 1. In "
    "training dropout raises the variance that the moving averages see; in inference it is off.",
    criterion="Before batch norm, the running variance is larger beside the variance at inference than behind it, "
    "and statistics measured again without dropout raise the accuracy (95 % intervals of the paired differences).",
    source="Li, Chen, Hu & Yang 2019, Understanding the Disharmony between Dropout and Batch Normalization.",
    config=DropoutConfig(steps=10_000),
    quick={"steps": 800},
    smoke={"steps": 2, "rates": (0.0, 0.5), "data": "digits"},
    seconds=(9, 165),
    trial=trial,
    verdict=verdict,
    panels=(
        Panel("accuracy", "Test accuracy", x="dropout", scale=100),
        Panel("shift", "Variance shift", x="dropout", y="running / inference variance", yscale="log"),
    ),
    measures={
        "accuracy": Measure("accuracy, most dropout (%)", 100),
        "shift": Measure("running / inference variance", 1, ".2f"),
    },
    caption="First panel: under the moving averages, and under statistics measured again without dropout (calibrated). "
    "Second: median over the channels; 1 is no shift.",
)
