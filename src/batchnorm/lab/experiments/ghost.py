"""Ghost batches: the size of the pool as a regularizer (Summers & Dinneen 2020, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass

from batchnorm.lab.experiment import Experiment, Measure, Panel
from batchnorm.lab.fitting import train
from batchnorm.lab.results import Finding, Table, Trial
from batchnorm.lab.settings import Config
from batchnorm.lab.task import Task
from batchnorm.lab.verdicts import compare, divergences, expect_more
from batchnorm.training.loop import evaluate


@dataclass(frozen=True)
class GhostConfig(Config):
    """Args: sizes: of the ghost batches."""

    sizes: tuple[int, ...] = (2, 4, 8, 16, 32)


def trial(config: GhostConfig, task: Task) -> Trial:
    out = Trial(task.seed)
    whole = task.normalized()
    train(whole, task).note(out, "batch norm", loss=evaluate(whole, task.data)[0])
    found = []
    for size in config.sizes:
        arm = f"ghost {size}"
        net = task.normalized(ghost_size=size)
        train(net, task).note(out, arm, loss=evaluate(net, task.data)[0])
        found.append(out.values[arm])
    for panel in ("final", "loss"):
        out.curve(panel, "ghost", config.sizes, [values[panel] for values in found])
        out.curve(panel, "batch norm", config.sizes, [out.values["batch norm"][panel]] * len(config.sizes))
    return out


def verdict(config: GhostConfig, table: Table) -> list[Finding]:
    middle = f"ghost {sorted(config.sizes)[len(config.sizes) // 2]}"
    smallest = f"ghost {min(config.sizes)}"
    return [
        expect_more(table, "final", middle, "batch norm", "Final test accuracy (%)"),
        expect_more(table, "loss", "batch norm", middle, "Final test loss", scale=1, unit="", digits=4),
        compare(table, "final", smallest, "batch norm", "The smallest ghost batch: final accuracy (%)"),
        *divergences(table),
    ]


EXPERIMENT = Experiment(
    name="ghost",
    title="Ghost batches",
    question="Is it better to normalize parts of the batch by themselves?",
    setting="A small convolution network on batches of 64, normalized whole or in ghost batches of each size; the "
    "running statistics take in the whole batch.",
    criterion="The ghost batch of middle size gives a higher final accuracy and a lower test loss than the whole "
    "batch (95 % intervals of the paired differences).",
    source="Hoffer, Hubara & Soudry 2017; Summers & Dinneen 2020, section 3.2.",
    config=GhostConfig(network="convnet", data="mnist5k", steps=1500, batch_size=64),
    quick={"data": "digits", "steps": 250, "sizes": (2, 8, 32)},
    smoke={"data": "digits", "steps": 2, "sizes": (8, 16, 32), "batch_size": 32},
    seconds=(6, 228),
    trial=trial,
    verdict=verdict,
    panels=(
        Panel("final", "Final test accuracy", x="samples of a ghost batch", xscale="log", scale=100),
        Panel("loss", "Final test loss", x="samples of a ghost batch", y="test loss (nats)", xscale="log"),
    ),
    measures={"final": Measure("final test accuracy (%)", 100), "loss": Measure("final test loss", 1, ".4f")},
    caption="The line of batch norm is the whole batch of 64; median and range over the seeds.",
)
