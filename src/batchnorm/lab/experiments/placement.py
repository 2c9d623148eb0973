"""Batch norm before or after the activation (Ioffe & Szegedy 2015, section 3.2)."""

from __future__ import annotations

from batchnorm.lab.experiment import ACCURACY, FINAL, Experiment, Measure, accuracy_panel
from batchnorm.lab.fitting import train
from batchnorm.lab.results import Finding, Table, Trial
from batchnorm.lab.settings import Config
from batchnorm.lab.task import Task
from batchnorm.lab.verdicts import compare, divergences, expect_more


def trial(config: Config, task: Task) -> Trial:
    out = Trial(task.seed)
    nets = {
        "before activation": task.normalized(),
        "after activation": task.normalized(placement="after_activation"),
        "without": task.plain(),
    }
    for arm, net in nets.items():
        history = train(net, task)
        history.note(out, arm, steps=history.first_step_at(0.9))
    return out


def verdict(config: Config, table: Table) -> list[Finding]:
    return [
        expect_more(table, "best", "before activation", "after activation", "Best test accuracy (%)"),
        compare(
            table, "best", "after activation", "without", "After the activation against without: best accuracy (%)"
        ),
        *divergences(table),
    ]


EXPERIMENT = Experiment(
    name="placement",
    title="Before or after the activation",
    question="Is batch norm better before the activation, as the paper has it, or after?",
    setting="The same network, from the same weights, with batch norm on either side of each activation.",
    criterion="Before the activation the best accuracy is higher (95 % interval of the paired difference). The paper "
    "argues for it and does not measure it.",
    source="Ioffe & Szegedy 2015, section 3.2.",
    config=Config(steps=20_000),
    quick={"steps": 2500},
    smoke={"steps": 4, "data": "digits"},
    seconds=(8, 98),
    trial=trial,
    verdict=verdict,
    panels=(accuracy_panel(),),
    measures={"best": ACCURACY, "final": FINAL, "steps": Measure("steps to 90 %", 1, ",.0f")},
    caption="Test accuracy under the moving averages; median and range over the seeds.",
)
