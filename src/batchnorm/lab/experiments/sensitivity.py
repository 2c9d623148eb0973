"""How much initialization and learning rate matter (Ioffe & Szegedy 2015, section 3.3)."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from torch import nn

from batchnorm.lab.experiment import Experiment, Measure, Panel
from batchnorm.lab.fitting import train
from batchnorm.lab.results import Finding, Table, Trial
from batchnorm.lab.settings import Config
from batchnorm.lab.task import Task
from batchnorm.lab.verdicts import compare, expect_more


@dataclass(frozen=True)
class SensitivityConfig(Config):
    """Args: rates, spreads: of the grid; enough: the accuracy from which a cell counts as trained."""

    rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1, 3)
    spreads: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1, 3)
    enough: float = 0.8


def trial(config: SensitivityConfig, task: Task) -> Trial:
    out = Trial(task.seed)
    for arm, build in (("batch norm", task.normalized), ("without", task.plain)):
        cells = []
        for spread in config.spreads:
            row = []
            for rate in config.rates:
                net = _spread(build(), spread)
                history = train(net, task, lr=rate, every=None)
                row.append(history.final)
                if history.diverged_at is not None:
                    out.diverged[f"{arm}, learning rate {rate:g}, spread {spread:g}"] = history.diverged_at
            cells.append(row)
        out.map("accuracy", arm, config.rates, config.spreads, cells)
        flat = [value for row in cells for value in row]
        trained = sum(value >= config.enough for value in flat) / len(flat)
        out.add(arm, trained=trained, best=max(flat), mean=statistics.fmean(flat))
    return out


def _spread(net: nn.Module, spread: float) -> nn.Module:
    """All weights of two axes and more drawn from N(0, spread^2), in place."""
    for parameter in net.parameters():
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=spread)
    return net


def verdict(config: SensitivityConfig, table: Table) -> list[Finding]:
    enough = f"{100 * config.enough:.0f} %"
    return [
        expect_more(table, "trained", "batch norm", "without", f"Share of the grid that reached {enough} accuracy (%)"),
        compare(table, "best", "batch norm", "without", "The best cell (%)"),
    ]


EXPERIMENT = Experiment(
    name="sensitivity",
    title="Initialization and learning rate",
    question="Does batch norm make training less sensitive to the initial weights and to the learning rate?",
    setting="The network of Figure 1 with Gaussian initial weights over a grid of spreads and learning rates, a short "
    "training for each cell; a training that diverges counts as guessing.",
    criterion="A larger share of the grid reaches 80 % test accuracy with batch norm (95 % interval of the paired "
    "difference).",
    source="Ioffe & Szegedy 2015, section 3.3; Santurkar et al. 2018, section 3.",
    config=SensitivityConfig(steps=1500),
    quick={"steps": 250, "rates": (0.01, 0.1, 1, 10), "spreads": (0.003, 0.03, 0.3, 3)},
    smoke={"steps": 2, "rates": (0.1, 1), "spreads": (0.1, 1), "data": "digits"},
    seconds=(8, 163),
    trial=trial,
    verdict=verdict,
    panels=(
        Panel(
            "accuracy",
            "Test accuracy (%)",
            kind="map",
            x="learning rate",
            y="initial spread",
            scale=100,
            limits=(0, 100),
        ),
    ),
    measures={
        "trained": Measure("cells of 80 % and more (%)", 100, ".0f"),
        "best": Measure("best cell (%)", 100),
        "mean": Measure("mean over the grid (%)", 100),
    },
    caption="Final test accuracy, mean over the seeds, by learning rate and by the standard deviation of the initial "
    "weights.",
)
