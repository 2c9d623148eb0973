"""Small training batches: batch norm, renormalization, ghost batches, group norm, and batch + group."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm import Renorm
from batchnorm.lab.experiment import Experiment, Measure, Panel
from batchnorm.lab.fitting import exact_accuracy, train
from batchnorm.lab.results import Finding, Table, Trial
from batchnorm.lab.settings import Config
from batchnorm.lab.task import Task
from batchnorm.lab.verdicts import compare, expect_more


@dataclass(frozen=True)
class SmallBatchesConfig(Config):
    """Args: sizes: of the training batches; groups: of channels; ghost: samples of a ghost batch."""

    sizes: tuple[int, ...] = (2, 4, 8, 16, 32)
    groups: int = 4
    ghost: int = 4


def trial(config: SmallBatchesConfig, task: Task) -> Trial:
    out = Trial(task.seed)
    moving: dict[str, list[float]] = {}
    exact: dict[str, list[float]] = {}
    for size in config.sizes:
        steps = max(1, config.steps * 32 // size)
        nets = {
            "batch norm": task.normalized(),
            "renormalization": task.normalized(renorm=Renorm(warmup=steps // 2)),
            f"ghost {config.ghost}": task.normalized(ghost_size=config.ghost),
            "batch + group": task.normalized(channel_groups=config.groups),
            "group norm": task.with_norm(lambda layer: group_norm(layer, config.groups)),
        }
        for arm, net in nets.items():
            history = train(net, task, batch_size=size, steps=steps, lr=config.lr * size / 32, every=None)
            moving.setdefault(arm, []).append(history.final)
            diverged = history.diverged_at is not None
            exact.setdefault(arm, []).append(history.guessing if diverged else exact_accuracy(net, task.data))
            if history.diverged_at is not None:
                out.diverged[f"{arm}, batch {size}"] = history.diverged_at
    for panel, found in (("moving", moving), ("exact", exact)):
        for arm, accuracies in found.items():
            out.curve(panel, arm, config.sizes, accuracies)
            out.add(arm, **{f"{panel} {size}": a for size, a in zip(config.sizes, accuracies, strict=True)})
    return out


def group_norm(layer: _BatchNorm, groups: int) -> nn.Module:
    """Group normalization of as many channels."""
    return nn.GroupNorm(math.gcd(groups, layer.num_features), layer.num_features, eps=layer.eps)


def verdict(config: SmallBatchesConfig, table: Table) -> list[Finding]:
    least, most, ghost = config.sizes[0], config.sizes[-1], f"ghost {config.ghost}"
    small, large = f"moving {least}", f"moving {most}"
    at_least, at_most = f"Final accuracy at batch {least} (%)", f"Final accuracy at batch {most} (%)"
    return [
        expect_more(table, small, "renormalization", "batch norm", at_least),
        expect_more(table, small, "group norm", "batch norm", at_least),
        expect_more(table, large, "batch norm", "group norm", at_most),
        compare(table, small, "batch + group", "batch norm", at_least),
        compare(table, f"exact {least}", "batch norm", "group norm", f"Under exact statistics at batch {least} (%)"),
        compare(table, large, ghost, "batch norm", at_most),
        compare(table, large, "renormalization", "batch norm", at_most),
    ]


EXPERIMENT = Experiment(
    name="small_batches",
    title="Small batches",
    question="What becomes of batch norm when the batch is small, and do renormalization and group norm mend it?",
    setting="The network of Figure 1, trained on as many samples with batches of each size, the learning rate in "
    "proportion to the size. Renormalization opens its limits to r = 3, d = 5 in the first half of the training; "
    "ghost 4 normalizes parts of four samples; group norm and batch + group have four groups of channels.",
    criterion="At the smallest batch, renormalization and group norm are each better than batch norm; at the "
    "largest, batch norm is better than group norm (95 % intervals of the paired differences).",
    source="Ioffe 2017, section 4; Wu & He 2018, Figure 1.",
    config=SmallBatchesConfig(steps=1000, lr=0.5),
    quick={"steps": 100, "sizes": (2, 8, 32)},
    smoke={"data": "digits", "steps": 1},
    seconds=(15, 283),
    trial=trial,
    verdict=verdict,
    panels=(
        Panel("moving", "Under moving averages", x="training batch size", xscale="log", scale=100),
        Panel("exact", "Under exact statistics", x="training batch size", xscale="log", scale=100),
    ),
    measures={
        "moving 2": Measure("batch 2 (%)", 100),
        "exact 2": Measure("batch 2, exact (%)", 100),
        "moving 32": Measure("batch 32 (%)", 100),
        "exact 32": Measure("batch 32, exact (%)", 100),
    },
    caption="Final test accuracy, under the moving averages of the training and under statistics measured over the "
    "training part afterwards; median and range over the seeds.",
)
