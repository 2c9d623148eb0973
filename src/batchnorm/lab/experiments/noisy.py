"""Batch norm with noise after it (Santurkar et al. 2018, section 2.1)."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.lab.experiment import ACCURACY, FINAL, Experiment, Panel, accuracy_panel
from batchnorm.lab.fitting import Batch, train
from batchnorm.lab.instruments import activations
from batchnorm.lab.results import Finding, Table, Trial
from batchnorm.lab.settings import Config
from batchnorm.lab.task import Task, replace_norms
from batchnorm.lab.verdicts import compare, divergences, expect_more


@dataclass(frozen=True)
class NoisyConfig(Config):
    """Args: shift: largest mean of the noise; scale: largest factor; spread: of both from sample to sample."""

    shift: float = 0.5
    scale: float = 1.25
    spread: float = 0.1


class Noise(nn.Module):
    """x s + m in training; means of m and s are drawn for each unit and step, m and s for each value about them.

    ``m ~ U(mu - spread, mu + spread)``, ``mu ~ U(-shift, shift)``; ``s ~ N(sigma, spread^2)``, ``sigma ~ U(1, scale)``.
    """

    def __init__(self, shift: float, scale: float, spread: float) -> None:
        super().__init__()
        self.shift, self.scale, self.spread = shift, scale, spread

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        shape = (1, x.shape[1], *[1] * (x.ndim - 2))
        mean = torch.empty(shape).uniform_(-self.shift, self.shift)
        factor = torch.empty(shape).uniform_(1.0, self.scale)
        shifts = mean + torch.empty_like(x).uniform_(-self.spread, self.spread)
        return x * (factor + self.spread * torch.randn_like(x)) + shifts


def trial(config: NoisyConfig, task: Task) -> Trial:
    out = Trial(task.seed)

    def noisy(layer: _BatchNorm) -> nn.Module:
        return nn.Sequential(OrderedDict(norm=layer, noise=Noise(config.shift, config.scale, config.spread)))

    nets = {
        "batch norm": task.normalized(),
        "noisy batch norm": replace_norms(task.normalized(), noisy),
        "without": task.plain(),
    }
    for arm, net in nets.items():
        seen: list[tuple[int, float]] = []

        def watch(step: int, batch: Batch, net: nn.Module = net, seen: list[tuple[int, float]] = seen) -> None:
            if step % config.every() == 0:
                seen.append((step, activations(net, batch, [task.probe], unit=0)[task.probe].mean))

        train(net, task, before_step=watch).note(out, arm)
        out.curve("mean", arm, *zip(*seen, strict=True))
    return out


def verdict(config: NoisyConfig, table: Table) -> list[Finding]:
    return [
        expect_more(table, "best", "noisy batch norm", "without", "Best test accuracy (%)"),
        compare(table, "best", "noisy batch norm", "batch norm", "What the noise costs (%)"),
        *divergences(table),
    ]


EXPERIMENT = Experiment(
    name="noisy",
    title="Noisy batch norm",
    question="Is it the steadiness of the distributions that makes batch norm help?",
    setting="Behind each batch norm layer, noise whose mean and scale are drawn anew at each step gives every unit an "
    "unsteady distribution in training (none in evaluation).",
    criterion="The network with noisy batch norm is still better than the one without batch norm (95 % interval of the "
    "paired difference of best accuracies). In the source it does almost as well as batch norm.",
    source="Santurkar et al. 2018, section 2.1 and appendix A.",
    config=NoisyConfig(steps=15_000),
    quick={"steps": 1500},
    smoke={"steps": 4, "data": "digits"},
    seconds=(8, 78),
    trial=trial,
    verdict=verdict,
    panels=(accuracy_panel(), Panel("mean", "Mean of a unit's input over the batch", y="mean, in training mode")),
    measures={"best": ACCURACY, "final": FINAL},
    caption="First panel: test accuracy. Second: what one unit of the last hidden layer receives, its mean over a "
    "training batch; median and range over the seeds.",
)
