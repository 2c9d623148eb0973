"""Inference example weighing over training batch sizes (Summers & Dinneen 2020, section 3.1)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from batchnorm import tune_example_weight
from batchnorm.lab.experiment import Experiment, Measure, Panel
from batchnorm.lab.fitting import train
from batchnorm.lab.results import Finding, Table, Trial, difference
from batchnorm.lab.settings import Config
from batchnorm.lab.task import Task
from batchnorm.training.datasets import Dataset
from batchnorm.training.loop import evaluate


@dataclass(frozen=True)
class ExampleWeighingConfig(Config):
    """Args: sizes: of the batches of the training; the number of samples seen is that of `steps` batches of 32."""

    sizes: tuple[int, ...] = (4, 8, 16, 32, 64, 128)


def trial(config: ExampleWeighingConfig, task: Task) -> Trial:
    out = Trial(task.seed)
    half = len(task.data.x_test) // 2
    validation = (task.data.x_test[:half], task.data.y_test[:half])
    losses: dict[str, list[float]] = {"alpha 0": [], "alpha tuned": []}
    accuracies: dict[str, list[float]] = {"alpha 0": [], "alpha tuned": []}
    alphas = []
    for size in config.sizes:
        net = task.normalized()
        train(net, task, batch_size=size, steps=max(1, config.steps * 32 // size), every=None, lr=config.lr * size / 32)
        for arm in losses:
            if arm == "alpha tuned":
                alphas.append(tune_example_weight(net.eval(), [validation]).best)
            loss, accuracy, _ = evaluate(net, _held_out(task, half))
            losses[arm].append(loss)
            accuracies[arm].append(accuracy)
    out.curve("alpha", "alpha tuned", config.sizes, alphas)
    for arm in losses:
        out.curve("loss", arm, config.sizes, losses[arm])
        out.add(
            arm,
            loss=losses[arm][0],
            last=losses[arm][-1],
            accuracy=accuracies[arm][0],
            last_accuracy=accuracies[arm][-1],
        )
    return out


def _held_out(task: Task, half: int) -> Dataset:
    """The data with the second half of the test part alone."""
    return dataclasses.replace(task.data, x_test=task.data.x_test[half:], y_test=task.data.y_test[half:])


def verdict(config: ExampleWeighingConfig, table: Table) -> list[Finding]:
    findings = []
    for measure, size in (("loss", config.sizes[0]), ("last", config.sizes[-1])):
        gain = difference(table("alpha 0", measure), table("alpha tuned", measure))
        findings.append(
            Finding(
                {"more": "reproduced", "tie": "tie", "less": "not reproduced"}[gain.kind],  # type: ignore[arg-type]
                f"Training batch {size}: test loss falls by {gain.text(' nats', digits=4)} "
                f"from {table.mean('alpha 0', measure):.4f}.",
            )
        )
    return findings


EXPERIMENT = Experiment(
    name="example_weighing",
    title="Inference example weighing",
    question="Does it help inference to count an example's own statistics, and how does that depend on the training "
    "batch?",
    setting="Networks trained with batches of each size on as many samples, with the learning rate in proportion. "
    "Alpha, the weight of an example's own mean and second moment, is chosen on half of the test part by its loss; "
    "shown is the other half.",
    criterion="The test loss falls at the smallest and at the largest training batch (95 % interval of the paired "
    "difference). The source reports gains at all sizes.",
    source="Summers & Dinneen 2020, section 3.1.",
    config=ExampleWeighingConfig(network="convnet", data="mnist5k", steps=1000, lr=0.1),
    quick={"data": "digits", "steps": 150},
    smoke={"data": "digits", "steps": 2, "sizes": (4, 8)},
    seconds=(4, 88),
    trial=trial,
    verdict=verdict,
    panels=(
        Panel("loss", "Test loss", x="training batch size", y="test loss (nats)", xscale="log", yscale="log"),
        Panel("alpha", "Chosen weight", x="training batch size", y="alpha", xscale="log"),
    ),
    measures={
        "loss": Measure("loss, smallest batch", 1, ".4f"),
        "accuracy": Measure("accuracy, smallest batch (%)", 100),
        "last": Measure("loss, largest batch", 1, ".4f"),
        "last_accuracy": Measure("accuracy, largest batch (%)", 100),
    },
    caption="First panel: loss on the half of the test part that alpha was not chosen on. Second: the alpha chosen on "
    "the other half. Median and range over the seeds.",
)
