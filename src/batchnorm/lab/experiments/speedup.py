"""The speed-up table of Ioffe & Szegedy (2015), section 4.2."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from batchnorm.lab.experiment import ACCURACY, Experiment, Measure, accuracy_panel
from batchnorm.lab.fitting import History, train
from batchnorm.lab.results import Finding, Table, Trial
from batchnorm.lab.settings import Config
from batchnorm.lab.task import Task
from batchnorm.lab.verdicts import divergences, expect_more, median_ratio


@dataclass(frozen=True)
class SpeedupConfig(Config):
    """Args: factors: of the learning rate, for the networks with batch norm."""

    factors: tuple[float, ...] = (1, 5, 30)


def trial(config: SpeedupConfig, task: Task) -> Trial:
    out = Trial(task.seed)
    histories: dict[str, History] = {"without": train(task.plain(), task)}
    for factor in config.factors:
        histories[f"batch norm ×{factor:g}"] = train(task.normalized(), task, lr=factor * config.lr)
    middle = sorted(config.factors)[len(config.factors) // 2]
    histories[f"batch norm ×{middle:g} sigmoid"] = train(sigmoids(task.normalized()), task, lr=middle * config.lr)
    histories["without sigmoid"] = train(sigmoids(task.plain()), task)
    target = histories["without"].best
    for arm, history in histories.items():
        history.note(out, arm, steps=history.first_step_at(target))
    return out


def sigmoids(net: nn.Module) -> nn.Module:
    """Sigmoids in place of all ReLUs, in place."""
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.Sigmoid())
    return net


def verdict(config: SpeedupConfig, table: Table) -> list[Finding]:
    findings = [_sooner(table, f"batch norm ×{factor:g}") for factor in config.factors]
    middle = sorted(config.factors)[len(config.factors) // 2]
    findings.append(
        expect_more(
            table, "best", f"batch norm ×{middle:g} sigmoid", "without sigmoid", "Sigmoids train with batch norm (%)"
        )
    )
    return [*findings, *divergences(table)]


def _sooner(table: Table, arm: str) -> Finding:
    seeds = len(table.trials)
    reached = sum(math.isfinite(steps) for steps in table(arm, "steps"))
    if not reached:
        return Finding("not reproduced", f"{arm}: never reached the best accuracy of the network without.")
    sooner = sum(a < b for a, b in zip(table(arm, "steps"), table("without", "steps"), strict=True))
    share = median_ratio(table, "steps", arm, "without")
    return Finding(
        "reproduced" if sooner == seeds else "tie" if sooner else "not reproduced",
        f"{arm}: reached the best accuracy of the network without in {reached} of {seeds} seeds, sooner in {sooner}"
        + (f"; there in {100 * share:.0f} % of its steps (median)." if math.isfinite(share) else "."),
    )


EXPERIMENT = Experiment(
    name="speedup",
    title="Higher learning rates",
    question="In how many steps does batch norm reach the best accuracy of the network without it, at 1, 5 and 30 "
    "times its learning rate, and does it make sigmoids trainable?",
    setting="A small ReLU convolution network in place of Inception, digits in place of ImageNet; constant learning "
    "rates, no dropout, the same initial weights and batches for all.",
    criterion="Each of ×1, ×5 and ×30 reaches the best accuracy of the network without batch norm in fewer steps, in "
    "every seed (in the paper in 43 %, 7 % and 9 % of the steps); with sigmoids, batch norm makes the difference "
    "between training and not.",
    source="Ioffe & Szegedy 2015, section 4.2.2 and Figure 3.",
    config=SpeedupConfig(network="convnet", data="mnist5k", steps=2000, batch_size=32, lr=0.02),
    quick={"data": "digits", "steps": 600},
    smoke={"data": "digits", "steps": 8},
    seconds=(11, 203),
    trial=trial,
    verdict=verdict,
    panels=(accuracy_panel(),),
    measures={"best": ACCURACY, "steps": Measure("steps to best of ‘without’", 1, ",.0f")},
    caption="Test accuracy under the moving averages; median and range over the seeds.",
)
