"""Theorems 4.1 and 4.2 of Santurkar et al. (2018) as equalities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.lab.experiment import Experiment, Measure, Panel
from batchnorm.lab.results import Finding, Table, Trial
from batchnorm.lab.settings import Config
from batchnorm.lab.task import Task
from batchnorm.lab.theorems import gradient_identity, smoothness_identity

THEOREMS = {"Theorem 4.1": gradient_identity, "Theorem 4.2": smoothness_identity}


@dataclass(frozen=True)
class EqualitiesConfig(Config):
    """Args: eps: at which both sides are compared, beside 0; exact: the gap up to which they count as equal."""

    eps: tuple[float, ...] = (1e-12, 1e-10, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    exact: float = 1e-9


def trial(config: EqualitiesConfig, task: Task) -> Trial:
    out = Trial(task.seed)
    net = task.normalized().double()
    layer = next(module for module in net.modules() if isinstance(module, _BatchNorm))
    with torch.no_grad():
        nn.init.uniform_(layer.weight, 0.5, 2.0)
    x, loss = _through(net, layer, task)
    weight, bias = layer.weight.detach(), layer.bias.detach()
    for name, theorem in THEOREMS.items():
        out.add(name, exact=theorem(x, weight, bias, loss, 0.0).gap, usual=theorem(x, weight, bias, loss, 1e-5).gap)
        out.curve("gap", name, config.eps, [theorem(x, weight, bias, loss, eps).gap for eps in config.eps])
    return out


def _through(net: nn.Module, layer: _BatchNorm, task: Task) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The input (m, C) of a layer on a real batch, and the loss as a function of what the layer puts out."""
    size = task.config.batch_size
    batch, labels = task.data.x_train[:size].double(), task.data.y_train[:size]
    seen: list[Tensor] = []
    given: dict[str, Tensor] = {}

    def replace(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if not given:
            seen.append(args[0].detach())
            return None
        return given["y"].reshape(seen[0].movedim(1, -1).shape).movedim(-1, 1)

    layer.register_forward_hook(replace)
    with torch.no_grad():
        net(batch)

    def loss(y: Tensor) -> Tensor:
        given["y"] = y
        return cross_entropy(net(batch), labels)

    return seen[0].movedim(1, -1).flatten(0, -2), loss


def verdict(config: EqualitiesConfig, table: Table) -> list[Finding]:
    findings = []
    for name in THEOREMS:
        worst = max(table(name, "exact"))
        findings.append(
            Finding(
                "reproduced" if worst < config.exact else "not reproduced",
                f"{name}: with eps = 0 the two sides differ by {worst:.0e} of the larger at most, over all channels "
                f"of a layer and all seeds; with eps = 1e-5 by {max(table(name, 'usual')):.0e}.",
            )
        )
    return findings


EXPERIMENT = Experiment(
    name="equalities",
    title="Two theorems, exactly",
    question="How tight are the bounds on the gradient (4.1) and on the curvature along it (4.2)?",
    setting="The first batch norm layer of an untrained network on a real batch in float64, with gamma drawn from "
    "U(0.5, 2), and the loss behind it. Left and right side of each theorem, channel by channel.",
    criterion="With eps = 0 they are equalities: both sides agree within 1e-9 of the larger.",
    source="Santurkar et al. 2018, Theorems 4.1 and 4.2.",
    config=EqualitiesConfig(steps=1),
    quick={"eps": (1e-12, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2)},
    smoke={"data": "digits", "eps": (1e-8, 1e-2), "batch_size": 8},
    seconds=(2, 5),
    trial=trial,
    verdict=verdict,
    panels=(
        Panel(
            "gap", "Gap between left and right side", x="eps", y="largest relative gap over the channels", xscale="log",
            yscale="log",
        ),
    ),
    measures={"exact": Measure("gap, eps = 0", 1, ".1e"), "usual": Measure("gap, eps = 1e-5", 1, ".1e")},
    caption="The gap is what eps takes from the normalized values: their length falls short of the square root of m.",
)  # fmt: skip
