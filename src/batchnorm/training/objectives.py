"""What a training makes small, and what it is judged by: cross-entropy and accuracy, or squared error and R2."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from batchnorm.training.datasets import Dataset


class Classification:
    """Cross-entropy in nats; judged by the accuracy, a fraction."""

    score = "accuracy"
    unit = "cross-entropy (nats)"

    def loss(self, output: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
        """The mean over the batch, or the sum."""
        return cross_entropy(output, y, reduction=reduction)

    def tally(self, output: Tensor, y: Tensor) -> Tensor:
        """Sums over a batch of the test part: the loss, and right answers; float64."""
        right = (output.argmax(dim=1) == y).sum()
        return torch.stack([cross_entropy(output.double(), y, reduction="sum"), right.double()]).cpu()

    def judge(self, tally: Tensor, samples: int) -> tuple[float, float]:
        """Mean loss and accuracy out of summed tallies."""
        return float(tally[0]) / samples, int(tally[1]) / samples


@dataclass(frozen=True)
class Regression:
    """Mean squared error in units of each target's variance in training; judged by R2, the mean over the targets.

    Args:
        std: of each target over the training part, (K,) float64.
        spread: sums of the squared differences of the test targets from their means, (K,) float64.
    """

    std: Tensor
    spread: Tensor

    score = "R²"
    unit = "squared error (variances)"

    @classmethod
    def of(cls, data: Dataset) -> Regression:
        """The objective of a data set."""
        test = data.y_test.double()
        spread = ((test - test.mean(0)) ** 2).sum(0)
        return cls(data.y_train.double().std(0, unbiased=False), spread)

    def loss(self, output: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
        """The mean over batch and targets, or the sum over the batch of the means over the targets."""
        mean = (((output.reshape(y.shape) - y) / self.std.to(y)) ** 2).mean()
        return mean if reduction == "mean" else mean * len(y)

    def tally(self, output: Tensor, y: Tensor) -> Tensor:
        """Sums of squared errors over a batch of the test part, (K,) float64."""
        return ((output.reshape(y.shape).double() - y.double()) ** 2).sum(0).cpu()

    def judge(self, tally: Tensor, samples: int) -> tuple[float, float]:
        """Mean loss and R2 = 1 - squared errors / squared differences from the mean."""
        loss = float((tally / self.std**2).mean()) / samples
        return loss, float((1 - tally / self.spread.clamp(min=torch.finfo(torch.float64).tiny)).mean())


def objective_of(data: Dataset) -> Classification | Regression:
    """The objective of the data's task."""
    return Regression.of(data) if data.task == "regression" else Classification()
