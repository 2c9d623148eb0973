"""A short training run, with what was measured on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm import calibrate
from batchnorm.lab.results import Trial
from batchnorm.training.datasets import Dataset
from batchnorm.training.loop import Probe, batch_indices, evaluate

Batch = tuple[Tensor, Tensor]


@dataclass
class History:
    """What a training run showed.

    Args:
        steps: updates done before each measurement; 0 is the untrained network.
        accuracy: on the test part in eval mode, fractions.
        percentiles: of the probed unit, where a probe was given.
        train_loss: of every batch, nats.
        diverged_at: the step whose loss was not finite, where one was; the training ended there.
        guessing: the accuracy of a guess, 1/classes.
    """

    guessing: float
    steps: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    percentiles: list[list[float]] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    diverged_at: int | None = None

    @property
    def best(self) -> float:
        """The largest measured accuracy."""
        return max(self.accuracy)

    @property
    def final(self) -> float:
        """The last accuracy; that of guessing where the training diverged."""
        return self.guessing if self.diverged_at is not None else self.accuracy[-1]

    def first_step_at(self, accuracy: float) -> float:
        """The first measured step with at least this accuracy; infinity if none has it."""
        reached = (step for step, value in zip(self.steps, self.accuracy, strict=True) if value >= accuracy)
        return next(reached, math.inf)

    def note(self, trial: Trial, arm: str, **values: float) -> None:
        """Write accuracy, curve and divergence of an arm into a trial."""
        trial.add(arm, best=self.best, final=self.final, **values)
        trial.curve("accuracy", arm, self.steps, self.accuracy)
        if self.diverged_at is not None:
            trial.diverged[arm] = self.diverged_at


def fit(
    net: nn.Module,
    data: Dataset,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    every: int | None = None,
    groups: Iterable[Any] | None = None,
    momentum: float = 0.0,
    probe: str | None = None,
    before_step: Callable[[int, Batch], object] | None = None,
) -> History:
    """Train on mean cross-entropy by SGD at a constant learning rate, in place.

    Args:
        every: steps between two measurements; by default at the end alone.
        groups: of the parameters, for SGD; by default all.
        momentum: of SGD.
        probe: a module, the percentiles of whose unit 0 are measured.
        before_step: called with the number of updates done and the batch.
    """
    optimizer = torch.optim.SGD(groups or net.parameters(), lr=lr, momentum=momentum)
    history = History(1 / data.num_classes)
    where = None if probe is None else Probe(probe, axis=1)
    measure(history, net, data, 0, where)
    for step in range(steps):
        at = batch_indices(len(data.x_train), batch_size, seed, step)
        x, y = data.x_train[at], data.y_train[at]
        if before_step is not None:
            before_step(step, (x, y))
        optimizer.zero_grad()
        loss = cross_entropy(net(x), y)
        value = float(loss.detach())
        if not math.isfinite(value):
            history.diverged_at = step + 1
            break
        loss.backward()
        optimizer.step()
        history.train_loss.append(value)
        if step + 1 == steps or (every is not None and (step + 1) % every == 0):
            measure(history, net, data, step + 1, where)
    return history


def measure(history: History, net: nn.Module, data: Dataset, step: int, probe: Probe | None = None) -> None:
    """Append accuracy and percentiles on the test part, in eval mode."""
    _, accuracy, percentiles = evaluate(net, data, probe)
    history.steps.append(step)
    history.accuracy.append(accuracy)
    if probe is not None:
        history.percentiles.append(percentiles)


def exact_accuracy(net: nn.Module, data: Dataset) -> float:
    """Test accuracy after `calibrate` on the training part, in batches of 500; without batch norm as it is."""
    if any(isinstance(module, _BatchNorm) for module in net.modules()):
        calibrate(net, data.x_train.split(500))
    return evaluate(net, data)[1]


def train(net: nn.Module, task: Any, **options: Any) -> History:
    """`fit` with the settings of a task, of which `options` replace some."""
    config = task.config
    settings: dict[str, Any] = {
        "steps": config.steps,
        "batch_size": config.batch_size,
        "lr": config.lr,
        "seed": task.seed,
        "every": config.every(),
    }
    return fit(net, task.data, **{**settings, **options})
