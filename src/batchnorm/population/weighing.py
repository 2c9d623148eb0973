"""The weight of an example's own statistics at inference, found on validation data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchnorm.errors import InputError
from batchnorm.nn import modes
from batchnorm.nn.batch_norm import BatchNorm
from batchnorm.population.feeding import feed, sample_count
from batchnorm.undo import Attributes, evaluating, kept

WEIGHTS = (0.0, 1 / 256, 1 / 128, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class ExampleWeightCurve:
    """The mean validation loss at each weight alpha, and the weight where it is least."""

    weights: tuple[float, ...]
    losses: tuple[float, ...]
    best: float


def tune_example_weight(
    net: nn.Module,
    validation_batches: Iterable[Any],
    *,
    weights: Sequence[float] = WEIGHTS,
    loss: Callable[[Any, Any], Tensor] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> ExampleWeightCurve:
    """Find the ``example_weight`` (alpha) with the least validation loss, and set it in every layer of ``net``.

    No weight is trained: the data are read once, each batch in evaluation mode at every alpha. See `by_example` for
    the formula: mean and variance of an example are mixed into the population's, (1 - alpha) E + alpha E_i.

    Args:
        net: the network; torch's layers become this package's, with the same parameters, buffers and keys.
        validation_batches: tuples (input, label), or whatever `forward` and `loss` take. Not the training data: their
            statistics are what the population's were measured on.
        weights: the alphas to try, in [0, 1]. Of equal losses the smaller alpha wins, so 0 if nothing is gained.
        loss: ``loss(output, batch)``, the mean over the samples of the batch; by default the cross entropy with
            ``batch[1]``.
        forward: ``forward(net, batch)``; by default a tuple feeds its first element.

    Returns:
        `ExampleWeightCurve`: weights, losses (means over all samples) and the best weight.

    Raises:
        InputError: no batches, no layer with running statistics, weights outside [0, 1], a loss that is not finite
            everywhere. The network is then as it was.

    Source: Summers & Dinneen 2020, Four Things Everyone Should Know to Improve Batch Normalization, section 3.1.

    Examples:
        >>> net = nn.Sequential(nn.BatchNorm1d(2))
        >>> labels = torch.tensor([0, 1])
        >>> curve = tune_example_weight(net, [(torch.randn(2, 2), labels) for _ in range(3)], weights=(0.0, 0.5))
        >>> net[0].example_weight == curve.best
        True
    """
    if not weights or not all(0 <= w <= 1 for w in weights):
        raise InputError(f"tune_example_weight: got weights={list(weights)}; expected numbers in [0, 1]")
    weights = tuple(sorted({float(w) for w in weights}))
    memories = modes.change(net, "tune_example_weight")
    layers = [layer for layer, _ in memories if layer.running_mean is not None]
    with kept(*memories, Attributes(layers, "example_weight"), if_it_fails=True), evaluating(net):
        if not layers:
            raise InputError("tune_example_weight: no layer keeps running statistics")
        curve = _curve(net, layers, validation_batches, weights, loss or _cross_entropy, forward or feed)
    _set(layers, [curve.best] * len(layers))
    return curve


@torch.no_grad()
def _curve(
    net: nn.Module,
    layers: list[BatchNorm],
    batches: Iterable[Any],
    weights: tuple[float, ...],
    loss: Callable[[Any, Any], Tensor],
    forward: Callable[[nn.Module, Any], Any],
) -> ExampleWeightCurve:
    totals, samples = [0.0] * len(weights), 0
    for batch in batches:
        size = sample_count(batch)
        for i, weight in enumerate(weights):
            _set(layers, [weight] * len(layers))
            totals[i] += float(loss(forward(net, batch), batch)) * size
        samples += size
    if not samples:
        raise InputError("tune_example_weight: got no batches; expected at least one")
    losses = tuple(total / samples for total in totals)
    finite = [value for value in losses if value == value]
    if not finite:
        raise InputError("tune_example_weight: the loss is NaN at every weight")
    return ExampleWeightCurve(weights, losses, weights[losses.index(min(finite))])


def _set(layers: list[BatchNorm], weights: list[float]) -> None:
    for layer, weight in zip(layers, weights, strict=True):
        layer.example_weight = weight


def _cross_entropy(output: Tensor, batch: Any) -> Tensor:
    if not (isinstance(batch, (tuple, list)) and len(batch) > 1):
        raise InputError("tune_example_weight: batches are not (input, label); give loss=")
    return F.cross_entropy(output, batch[1].to(output.device))
