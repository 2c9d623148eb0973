"""How a layer's running statistics take in a batch, where more than a plain moving average is asked for.

Only tensor operations: no value is read back to Python, so the same code runs eagerly, compiled and exported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from batchnorm.ops.schemas import statistics_dtype

if TYPE_CHECKING:
    from batchnorm.nn.batch_norm import _BatchNorm

ESTIMATORS = ("ema", "debiased", "cumulative")
VARIANCES = ("unbiased", "biased")
NONFINITE = ("propagate", "skip", "skip_channel")


def recomputing() -> bool:
    """Whether a backward is running: a forward inside it is a recomputation, not a new batch."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class Accumulator:
    """Moments of the micro-batches so far, (rows, C), merged in place (Chan, Golub & LeVeque 1983)."""

    def __init__(self, like: Tensor) -> None:
        wide, shape = statistics_dtype(like.device), (-1, like.shape[-1])
        self.mean = torch.zeros(like.shape, dtype=wide, device=like.device).reshape(shape)
        self.m2 = torch.zeros_like(self.mean)
        self.count = self.mean.new_zeros((len(self.mean), 1))

    def add(self, mean: Tensor, var: Tensor, count: Tensor, row: int = 0) -> None:
        """Merges a batch of ``count`` values a channel into the rows from ``row`` on; ``var`` is biased."""
        rows = slice(row, row + len(mean))
        total = self.count[rows] + count
        delta, share = mean - self.mean[rows], count / total.clamp(min=1)
        self.m2[rows] += var * count + delta * self.count[rows] * share * delta
        self.mean[rows] += delta * share
        self.count[rows] = total


def update(layer: _BatchNorm, mean: Tensor, var: Tensor, count: Tensor, row: int = 0) -> None:
    """Mixes mean and *biased* variance (rows, C) of ``count`` (rows, 1) values a channel into the buffers.

    The share of the batch is the momentum m ("ema"), m / (1 - (1 - m)^t) ("debiased"), which makes the buffer the
    moving average from zero divided by 1 - (1 - m)^t (Kingma & Ba 2015, section 3), or 1/t ("cumulative"); t counts
    the batches that a channel took in. A layer keeps one row of statistics, or one for each domain or time step: those
    from ``row`` on are updated. What has no values changes nothing.
    """
    running_mean, running_var, batches = layer.running_mean, layer.running_var, layer.num_batches_tracked
    if running_mean is None or running_var is None:
        return
    channels, rows = running_mean.shape[-1], slice(row, row + len(mean))
    if layer.running_var_kind == "unbiased":
        var = var * torch.where(count > 1, count / (count - 1), 1.0)
    accepted = counted = count > 0
    skipped: Tensor | int = 0  # of the batches counted
    if layer.nonfinite != "propagate":
        finite = torch.isfinite(mean.to(running_mean.dtype)) & torch.isfinite(var.to(running_var.dtype))
        by_channel = layer.nonfinite == "skip_channel"
        refused = ~finite if by_channel else (~finite).any(1, keepdim=True)
        counter = layer.num_batches_skipped.view(-1, channels if by_channel else 1)[rows]
        counter.add_((refused & counted).to(counter.dtype))
        accepted = counted & ~refused
        if layer.nonfinite == "skip":
            counted = accepted
        else:
            skipped = counter
    if batches is not None:
        batches = batches.view(-1, 1)[rows]
        batches.add_(counted.to(batches.dtype))
    share = _share(layer, batches, skipped, mean)
    for running, batch in ((running_mean, mean), (running_var, var)):
        kept = running.view(-1, channels)[rows]
        mixed = (1 - share) * kept.to(batch.dtype) + share * batch
        kept.copy_(torch.where(accepted, mixed, kept.to(mixed.dtype)))


def debiased(momentum: float, t: Any) -> Any:
    """The share of batch t, from 1 up, in a moving average that is divided by 1 - (1 - m)^t."""
    return momentum / (1 - (1 - momentum) ** t)


def _share(layer: _BatchNorm, batches: Tensor | None, skipped: Tensor | int, like: Tensor) -> Tensor | float:
    """The share of the batch in the new running statistics."""
    momentum = None if layer.running == "cumulative" else layer.momentum
    if batches is None:
        return 0.0 if momentum is None else momentum
    t = (batches - skipped).clamp(min=1).to(like.dtype)
    if momentum is None:
        return 1.0 / t
    if layer.running == "debiased" and momentum > 0:
        return torch.as_tensor(debiased(momentum, t)).clamp(max=1)  # at t = 1, but for rounding
    return momentum
