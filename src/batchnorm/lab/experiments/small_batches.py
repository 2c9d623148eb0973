"""Small training batches: batch norm, renormalization, ghost batches, group norm, and batch + group."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm import Renorm
from batchnorm.lab.experiment import Config, Experiment, Measure, Panel
from batchnorm.lab.fitting import train
from batchnorm.lab.results import Finding, Table, Trial
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
    found: dict[str, list[float]] = {}
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
            found.setdefault(arm, []).append(history.final)
            if history.diverged_at is not None:
                out.diverged[f"{arm}, batch {size}"] = history.diverged_at
    for arm, accuracies in found.items():
        out.curve("accuracy", arm, config.sizes, accuracies)
        out.add(arm, **{f"batch {size}": a for size, a in zip(config.sizes, accuracies, strict=True)})
    return out


def group_norm(layer: _BatchNorm, groups: int) -> nn.Module:
    """Group normalization of as many channels."""
    return nn.GroupNorm(math.gcd(groups, layer.num_features), layer.num_features, eps=layer.eps)


def verdict(config: SmallBatchesConfig, table: Table) -> list[Finding]:
    small, large = f"batch {config.sizes[0]}", f"batch {config.sizes[-1]}"
    ghost = f"ghost {config.ghost}"
    return [
        expect_more(table, small, "renormalization", "batch norm", f"Final accuracy at {small} (%)"),
        expect_more(table, small, "group norm", "batch norm", f"Final accuracy at {small} (%)"),
        expect_more(table, large, "batch norm", "group norm", f"Final accuracy at {large} (%)"),
        compare(table, small, "batch + group", "batch norm", f"Final accuracy at {small} (%)"),
        compare(table, large, ghost, "batch norm", f"Final accuracy at {large} (%)"),
        compare(table, large, "renormalization", "batch norm", f"Final accuracy at {large} (%)"),
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
    config=SmallBatchesConfig(steps=2000, lr=0.5),
    quick={"steps": 150, "sizes": (2, 4, 8, 32)},
    smoke={"data": "digits", "steps": 1},
    seconds=(14, 150),
    trial=trial,
    verdict=verdict,
    panels=(Panel("accuracy", "Final test accuracy", x="training batch size", xscale="log", scale=100),),
    measures={f"batch {size}": Measure(f"batch {size} (%)", 100) for size in (2, 4, 8, 16, 32)},
    caption="Test accuracy under the moving averages at the end; median and range over the seeds.",
)
