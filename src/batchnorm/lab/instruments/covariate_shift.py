"""Internal covariate shift: how a layer's gradient changes when the layers before it are updated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from batchnorm.errors import InputError
from batchnorm.lab.instruments.objective import Loss, Objective, distance, dot, layers_in_order, norm

MOST_LAYERS = 9  # so that a probe costs ten forward-backwards at most


@dataclass(frozen=True)
class CovariateShift:
    """What `covariate_shift` found, for each layer in the order of the calls.

    Args:
        layers: names of the layers.
        norms: ||G - G'||.
        relative_norms: ||G - G'|| / ||G||; 0 where both are 0.
        cosines: of the angle between G and G'; 1 is no shift, and also where either is 0.
    """

    layers: tuple[str, ...]
    norms: tuple[float, ...]
    relative_norms: tuple[float, ...]
    cosines: tuple[float, ...]


def covariate_shift(
    net: nn.Module,
    batch: Any,
    learning_rate: float,
    *,
    layers: Sequence[str] | None = None,
    loss: Loss | None = None,
) -> CovariateShift:
    """Internal covariate shift of layers: G = dL/dW_i as it is, G' with only the *preceding* layers updated.

    The update is a gradient step on the same batch; layer i itself and all later ones stay where they are. "Preceding"
    is what a forward calls before; gamma and beta of a normalization after layer i move for the layers behind it only.

    Cost: one forward-backward for each layer, but for the first one called, whose shift is 0, and one for all: 10 at
    most by default. One more forward finds the order. Nothing of the network changes; see `Objective`.

    Args:
        net: any network, in the mode in which it trains.
        batch: ``(x, y)``, or what `loss` takes.
        learning_rate: of the update.
        layers: names of modules that own the parameters; by default those with a weight of two axes or more (linear
            layers, convolutions), and if they are more than nine, nine of them in equal distances.
        loss: ``loss(net, batch)``, a scalar; by default the mean cross-entropy.

    Raises:
        InputError: a name that owns no trained parameters.

    Source: Santurkar et al. 2018, Definition 2.1.
    """
    objective = Objective(net, batch, loss)
    order = layers_in_order(objective)
    chosen = _spread(_weighted(objective, order)) if layers is None else list(layers)
    for name in chosen:
        if name not in order:
            raise InputError(f"covariate_shift: {name!r} owns no trained parameters; these do: {list(order)}")
    _, gradient = objective.gradient()
    first = next(iter(order))
    norms, relative, cosines = [], [], []
    for name in chosen:
        own = {n: gradient[n] for n in order[name]}
        moved = own if name == first else _moved(objective, gradient, order, name, learning_rate)
        length, shift = norm(own), distance(own, moved)
        norms.append(shift)
        relative.append(shift / length if length else 0.0)
        product = length * norm(moved)
        cosines.append(dot(own, moved) / product if product else 1.0)
    return CovariateShift(tuple(chosen), tuple(norms), tuple(relative), tuple(cosines))


def _moved(
    objective: Objective, gradient: dict[str, Any], order: dict[str, list[str]], layer: str, learning_rate: float
) -> dict[str, Any]:
    """The layer's gradient with all layers before it updated."""
    parameters = dict(objective.parameters)
    for name, owned in order.items():
        if name == layer:
            break
        for n in owned:
            parameters[n] = parameters[n] - learning_rate * gradient[n]
    _, there = objective.gradient(parameters)
    return {n: there[n] for n in order[layer]}


def _weighted(objective: Objective, order: dict[str, list[str]]) -> list[str]:
    return [name for name, owned in order.items() if any(objective.parameters[n].ndim >= 2 for n in owned)]


def _spread(names: list[str]) -> list[str]:
    if len(names) <= MOST_LAYERS:
        return names
    last = len(names) - 1
    return [names[round(i * last / (MOST_LAYERS - 1))] for i in range(MOST_LAYERS)]
