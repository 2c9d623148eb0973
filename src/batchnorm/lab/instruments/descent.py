"""How far a gradient can be trusted: the loss and the gradient along the step that it proposes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from batchnorm.errors import InputError
from batchnorm.lab.instruments.objective import Loss, Objective, distance, norm, step

FACTORS = (0.5, 2**-0.5, 1.0, 2**0.5, 2.0, 2**1.5, 4.0)  # of the learning rate: [1/2, 4] in equal ratios


@dataclass(frozen=True)
class Descent:
    """What `descent` found. Losses in nats where the loss is the cross-entropy.

    Args:
        learning_rates: the step sizes eta.
        loss, gradient_norm: L(theta) and ||g|| at the start.
        losses: L(theta - eta g); their range is the loss band.
        gradient_distances: ||g - grad L(theta - eta g)||, the gradient predictiveness (smaller: more predictive).
        smoothness: max over eta of ||g - grad L(theta - eta g)|| / (eta ||g||), the effective beta-smoothness; 0 where
            g is 0.
    """

    learning_rates: tuple[float, ...]
    loss: float
    gradient_norm: float
    losses: tuple[float, ...]
    gradient_distances: tuple[float, ...]
    smoothness: float


def descent(
    net: nn.Module,
    batch: Any,
    learning_rate: float,
    *,
    factors: tuple[float, ...] = FACTORS,
    loss: Loss | None = None,
) -> Descent:
    """Loss band, gradient predictiveness and effective beta-smoothness along the gradient, on one batch.

    Cost: ``1 + len(factors)`` forward-backwards, 8 by default. Nothing of the network changes; see `Objective`.

    Args:
        net: any network, in the mode in which it trains.
        batch: ``(x, y)``, or what `loss` takes.
        learning_rate: of the training; the steps are `factors` times it.
        factors: of the learning rate; the paper's range is [1/2, 4].
        loss: ``loss(net, batch)``, a scalar; by default the mean cross-entropy.

    Raises:
        InputError: a step size that is not above 0, or a loss that is no scalar.

    Source: Santurkar, Tsipras, Ilyas & Madry 2018, section 3.1 and Figure 4.

    Examples:
        >>> import torch
        >>> net = nn.Linear(1, 1, bias=False)
        >>> found = descent(net, torch.tensor([[2.0]]), 0.1, loss=lambda net, x: net(x).square().sum() / 2)
        >>> round(found.smoothness, 4)  # the loss is (2 w)^2/2, its second derivative 4
        4.0
    """
    rates = tuple(factor * learning_rate for factor in factors)
    if not rates or not all(rate > 0 for rate in rates):
        raise InputError(f"descent: learning_rate={learning_rate} times {factors}; expected step sizes above 0")
    objective = Objective(net, batch, loss)
    start, gradient = objective.gradient()
    length = norm(gradient)
    losses, distances = [], []
    for rate in rates:
        value, there = objective.gradient(step(objective.parameters, gradient, rate))
        losses.append(value)
        distances.append(distance(gradient, there))
    smoothness = max(d / (rate * length) for d, rate in zip(distances, rates, strict=True)) if length else 0.0
    return Descent(rates, start, length, tuple(losses), tuple(distances), smoothness)
