"""The loss around a point, on a plane through it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.errors import InputError
from batchnorm.lab.instruments.objective import Loss, Objective, Parameters


@dataclass(frozen=True)
class LossSurface:
    """Losses at ``theta + offsets[i] d1 + offsets[j] d2``: ``losses[i][j]``."""

    offsets: tuple[float, ...]
    losses: tuple[tuple[float, ...], ...]


def loss_surface(
    net: nn.Module,
    batch: Any,
    *,
    radius: float = 1.0,
    points: int = 5,
    seed: int = 0,
    directions: tuple[Parameters, Parameters] | None = None,
    loss: Loss | None = None,
) -> LossSurface:
    """The loss of one batch on a grid around the network's parameters, in a plane of two directions.

    By default both are random and normalized filter by filter: each row of a direction has the norm of the row of the
    weight that it moves, so that networks of other scales can be compared; parameters of one axis stay.

    Cost: ``points**2`` forwards without backward, by default 25, which take no longer than ten forward-backwards.
    Nothing of the network changes; see `Objective`.

    Args:
        net: any network, in the mode in which it trains.
        batch: ``(x, y)``, or what `loss` takes.
        radius: the largest offset, in units of the directions.
        points: along each axis; odd, so that the network itself is the middle.
        seed: of the random directions; the global generators are not used.
        directions: two mappings from names of parameters to tensors of their shape; parameters left out stay.
        loss: ``loss(net, batch)``, a scalar; by default the mean cross-entropy.

    Raises:
        InputError: an even or too small number of points, or a radius that is not above 0.

    Source: Li, Xu, Taylor, Studer & Goldstein 2018, Visualizing the Loss Landscape of Neural Nets, section 4.
    """
    if points < 3 or points % 2 == 0 or not radius > 0:
        raise InputError(f"loss_surface: points={points}, radius={radius}; expected an odd number >= 3, and > 0")
    objective = Objective(net, batch, loss)
    d1, d2 = directions or _filter_normalized(objective.parameters, seed)
    offsets = torch.linspace(-radius, radius, points, dtype=torch.float64).tolist()
    with torch.no_grad():
        losses = tuple(
            tuple(float(objective(_at(objective.parameters, d1, d2, a, b))) for b in offsets) for a in offsets
        )
    return LossSurface(tuple(offsets), losses)


def _at(parameters: Parameters, d1: Parameters, d2: Parameters, a: float, b: float) -> Parameters:
    moved = dict(parameters)
    for offset, direction in ((a, d1), (b, d2)):
        for name, tensor in direction.items():
            moved[name] = moved[name] + offset * tensor
    return moved


def _filter_normalized(parameters: Parameters, seed: int) -> tuple[Parameters, Parameters]:
    generator = torch.Generator().manual_seed(seed)

    def direction() -> Parameters:
        return {name: _like(value, generator) for name, value in parameters.items() if value.ndim >= 2}

    return direction(), direction()


def _like(weight: Tensor, generator: torch.Generator) -> Tensor:
    """A random tensor whose rows (axis 0) have the norms of the weight's rows."""
    random = torch.randn(weight.shape, generator=generator, dtype=torch.float32).to(weight)
    rows = tuple(range(1, weight.ndim))
    ours, wanted = (tensor.square().sum(dim=rows, keepdim=True).sqrt() for tensor in (random, weight))
    scaled: Tensor = random * (wanted / ours.clamp(min=torch.finfo(weight.dtype).tiny))
    return scaled
