"""Moving averages of the statistics against exact ones, over training."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm import calibrate
from batchnorm.lab.experiment import Experiment, Measure, Panel
from batchnorm.lab.fitting import Batch, train
from batchnorm.lab.results import Finding, Table, Trial, difference, points
from batchnorm.lab.settings import Config
from batchnorm.lab.task import Task
from batchnorm.training.loop import evaluate

KINDS = ("plain", "debiased")
State = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class MomentumConfig(Config):
    """Args: momenta: shares of the new batch; readings: over the training."""

    momenta: tuple[float, ...] = (0.001, 0.01, 0.1, 0.5, 1)
    readings: int = 40


class Averages:
    """Moving averages with many momenta beside each other. The layers' own momentum is 1, so that their buffers hold
    the last batch's statistics (the variance unbiased)."""

    def __init__(self, net: nn.Module, momenta: tuple[float, ...]) -> None:
        self.layers = [module for module in net.modules() if isinstance(module, _BatchNorm)]
        for layer in self.layers:
            layer.momentum = 1.0
        start = [(torch.zeros(layer.num_features), torch.ones(layer.num_features)) for layer in self.layers]
        self.momenta = momenta
        self.states: dict[float, State] = {m: [(a.double(), b.double()) for a, b in start] for m in momenta}
        self.batches = 0

    def take(self) -> None:
        """Mix in the statistics of the last batch."""
        batch = self.last()
        self.batches += 1
        for momentum, state in self.states.items():
            self.states[momentum] = [
                tuple(old.lerp(new.double(), momentum) for old, new in zip(layer, last, strict=True))  # type: ignore[misc]
                for layer, last in zip(state, batch, strict=True)
            ]

    def last(self) -> State:
        """What the layers hold."""
        return [(layer.running_mean.clone(), layer.running_var.clone()) for layer in self.layers]  # type: ignore[union-attr]

    def estimate(self, momentum: float, kind: str) -> State:
        """The moving average; debiased: without the share of its start, 0 and 1."""
        share = (1 - momentum) ** self.batches if kind == "debiased" else 0.0
        return [((mean / (1 - share)), (var - share) / (1 - share)) for mean, var in self.states[momentum]]

    def put(self, state: State) -> None:
        """Make the layers hold it."""
        for layer, (mean, var) in zip(self.layers, state, strict=True):
            layer.running_mean.copy_(mean)  # type: ignore[union-attr]
            layer.running_var.copy_(var)  # type: ignore[union-attr]


def trial(config: MomentumConfig, task: Task) -> Trial:
    out = Trial(task.seed)
    net = task.normalized()
    averages = Averages(net, config.momenta)
    arms = {f"momentum {m:g}": m for m in config.momenta}
    found: dict[str, dict[str, list[float]]] = {kind: {arm: [] for arm in ["exact", *arms]} for kind in KINDS}
    steps: list[int] = []

    def watch(step: int, batch: Batch) -> None:
        if step:
            averages.take()
        if step and step % config.every(config.readings) == 0:
            steps.append(step)
            held = averages.last()
            calibrate(net, task.data.x_train.split(config.batch_size), samples=2000)
            exact = evaluate(net, task.data)[1]
            for kind in KINDS:
                found[kind]["exact"].append(exact)
                for arm, momentum in arms.items():
                    averages.put(averages.estimate(momentum, kind))
                    found[kind][arm].append(evaluate(net, task.data)[1])
            averages.put(held)

    train(net, task, before_step=watch, every=None)
    for kind in KINDS:
        for arm, accuracies in found[kind].items():
            out.curve(kind, arm, steps, accuracies)
            tenth = max(1, len(steps) // 10)
            out.add(arm, **{f"early {kind}": statistics.fmean(accuracies[:tenth]), f"end {kind}": accuracies[-1]})
    return out


def verdict(config: MomentumConfig, table: Table) -> list[Finding]:
    findings = []
    slowest = f"momentum {min(config.momenta):g}"
    gain = difference(table(slowest, "early debiased"), table(slowest, "early plain"))
    findings.append(
        Finding(
            {"more": "reproduced", "tie": "tie", "less": "not reproduced"}[gain.kind],  # type: ignore[arg-type]
            f"Debiasing the slowest average ({slowest}) in the first tenth of the training: {points(gain)} of "
            "accuracy.",
        )
    )
    for momentum in config.momenta:
        arm = f"momentum {momentum:g}"
        cost = difference(table(arm, "end plain"), table("exact", "end plain"))
        findings.append(Finding("note", f"{arm} against exact statistics at the end: {points(cost)}."))
    fastest = f"momentum {max(config.momenta):g}"
    cost = difference(table("exact", "end plain"), table(fastest, "end plain"))
    findings.append(
        Finding(
            {"more": "reproduced", "tie": "tie", "less": "not reproduced"}[cost.kind],  # type: ignore[arg-type]
            f"Exact statistics against the fastest average ({fastest}), at the end: {points(cost)}.",
        )
    )
    return findings


EXPERIMENT = Experiment(
    name="momentum",
    title="Moving averages against exact statistics",
    question="How far is the accuracy under moving averages from that under exact statistics, for each momentum, "
    "with and without debiasing?",
    setting="One training; at each reading the same weights are evaluated under exact statistics (pooled over 2,000 "
    "training samples) and under moving averages with several momenta, which are the share of the new batch.",
    criterion="Debiasing helps the slowest average early; at the end, exact statistics beat the fastest average, "
    "which is the last batch alone (95 % intervals of the paired differences).",
    source="Ioffe & Szegedy 2015, section 3.1 (moving averages while training); Kingma & Ba 2015, section 3 "
    "(debiasing).",
    config=MomentumConfig(steps=10_000),
    quick={"steps": 1500, "readings": 25},
    smoke={"steps": 6, "readings": 3, "data": "digits"},
    seconds=(3, 23),
    trial=trial,
    verdict=verdict,
    panels=(
        Panel("plain", "Plain moving averages", scale=100),
        Panel("debiased", "Debiased", scale=100),
    ),
    measures={
        "early plain": Measure("early (%)", 100),
        "early debiased": Measure("early, debiased (%)", 100),
        "end plain": Measure("end (%)", 100),
        "end debiased": Measure("end, debiased (%)", 100),
    },
    caption="Test accuracy of the same weights under each estimate; median and range over the seeds.",
)
