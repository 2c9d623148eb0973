"""Batch + group normalization at batch 2 (Summers & Dinneen 2020, section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass

from batchnorm.lab.experiment import ACCURACY, FINAL, Config, Experiment, Measure, accuracy_panel
from batchnorm.lab.experiments.small_batches import group_norm
from batchnorm.lab.fitting import train
from batchnorm.lab.results import Finding, Table, Trial
from batchnorm.lab.task import Task
from batchnorm.lab.verdicts import compare, divergences, expect_more
from batchnorm.training.loop import evaluate


@dataclass(frozen=True)
class BatchGroupConfig(Config):
    """Args: groups: of channels."""

    groups: int = 8


def trial(config: BatchGroupConfig, task: Task) -> Trial:
    out = Trial(task.seed)
    nets = {
        "batch norm": task.normalized(),
        "batch + group": task.normalized(channel_groups=config.groups),
        "group norm": task.with_norm(lambda layer: group_norm(layer, config.groups)),
    }
    for arm, net in nets.items():
        train(net, task).note(out, arm, loss=evaluate(net, task.data)[0])
    return out


def verdict(config: BatchGroupConfig, table: Table) -> list[Finding]:
    return [
        expect_more(table, "final", "batch + group", "batch norm", "Final test accuracy (%)"),
        expect_more(table, "final", "batch + group", "group norm", "Final test accuracy (%)"),
        compare(table, "loss", "batch + group", "batch norm", "Final test loss", scale=1, unit="", digits=4),
        *divergences(table),
    ]


EXPERIMENT = Experiment(
    name="batch_group",
    title="Batch + group at batch 2",
    question="Does it help the smallest batch to share statistics among channels too?",
    setting="A small convolution network on batches of two, with batch norm, with group norm, and with pools over "
    "the batch and over groups of channels.",
    criterion="Batch + group gives a higher final accuracy than batch norm and than group norm (95 % intervals of "
    "the paired differences).",
    source="Summers & Dinneen 2020, section 3.3.",
    config=BatchGroupConfig(network="convnet", data="mnist5k", steps=15_000, batch_size=2, lr=0.01),
    quick={"data": "digits", "steps": 1800},
    smoke={"data": "digits", "steps": 2},
    seconds=(9, 150),
    trial=trial,
    verdict=verdict,
    panels=(accuracy_panel(),),
    measures={"best": ACCURACY, "final": FINAL, "loss": Measure("final test loss", 1, ".4f")},
    caption="Test accuracy in evaluation mode; median and range over the seeds.",
)
