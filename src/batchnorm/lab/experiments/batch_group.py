"""Batch + group normalization at batch 2 (Summers & Dinneen 2020, section 3.3)."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from batchnorm.lab.experiment import Experiment, Measure, accuracy_panel
from batchnorm.lab.experiments.small_batches import group_norm
from batchnorm.lab.fitting import exact_accuracy, train
from batchnorm.lab.results import Finding, Table, Trial
from batchnorm.lab.settings import Config
from batchnorm.lab.task import Task
from batchnorm.lab.verdicts import compare, divergences, expect_more


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
        history = train(net, task)
        last = history.train_loss[-max(1, config.steps // 10) :]
        history.note(out, arm, train_loss=statistics.fmean(last), exact=exact_accuracy(net, task.data))
    return out


def verdict(config: BatchGroupConfig, table: Table) -> list[Finding]:
    return [
        expect_more(table, "exact", "batch + group", "batch norm", "Test accuracy under exact statistics (%)"),
        expect_more(table, "exact", "batch + group", "group norm", "Test accuracy under exact statistics (%)"),
        compare(table, "final", "batch + group", "batch norm", "Under moving averages (%)"),
        compare(table, "train_loss", "batch + group", "batch norm", "Training loss (nats)", scale=1, unit="", digits=3),
        *divergences(table),
    ]


EXPERIMENT = Experiment(
    name="batch_group",
    title="Batch + group at batch 2",
    question="Does it help the smallest batch to share statistics among channels too?",
    setting="A small convolution network on batches of two, with batch norm, with group norm, and with pools over "
    "the batch and over groups of channels. Moving averages remember some ten batches, here twenty samples, so the "
    "trained networks are compared under exact statistics, measured over the training part.",
    criterion="Batch + group gives a higher accuracy under exact statistics than batch norm and than group norm (95 "
    "% intervals of the paired differences).",
    source="Summers & Dinneen 2020, section 3.3.",
    config=BatchGroupConfig(network="convnet", data="mnist5k", steps=15_000, batch_size=2, lr=0.01),
    quick={"data": "digits", "steps": 1500},
    smoke={"data": "digits", "steps": 2},
    seconds=(10, 147),
    trial=trial,
    verdict=verdict,
    panels=(accuracy_panel(),),
    measures={
        "exact": Measure("exact statistics (%)", 100),
        "final": Measure("moving averages (%)", 100),
        "train_loss": Measure("training loss, last tenth (nats)", 1, ".3f"),
    },
    caption="Test accuracy under the moving averages; median and range over the seeds.",
)
