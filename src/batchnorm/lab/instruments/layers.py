"""What single layers show: the distribution of their outputs, the norms of their gradients and weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.errors import InputError
from batchnorm.lab.instruments.objective import Loss, Objective, layers_in_order, norm
from batchnorm.training.results import PERCENTILES


@dataclass(frozen=True)
class Activations:
    """The distribution of one layer's output over a batch.

    Args:
        percentiles: of all values, or of one unit's.
        counts, edges: of the histogram; ``len(edges) == len(counts) + 1``.
        mean, std: of the values; the *biased* standard deviation.
    """

    percentiles: tuple[float, ...]
    counts: tuple[int, ...]
    edges: tuple[float, ...]
    mean: float
    std: float


def activations(
    net: nn.Module,
    batch: Any,
    layers: Sequence[str] | None = None,
    *,
    unit: int | None = None,
    percentiles: Sequence[float] = PERCENTILES,
    bins: int = 30,
    loss: Loss | None = None,
) -> dict[str, Activations]:
    """Percentiles and a histogram of what layers put out, to be recorded over a training.

    Cost: one forward (two where `layers` is None, to find them). Nothing of the network changes; see `Objective`.

    Args:
        net: any network, in the mode that is asked about: training mode shows the batch's normalization.
        batch: ``(x, y)``, or what `loss` takes.
        layers: names of modules that return a tensor; by default those with trained parameters. The input of an
            activation is the output of the layer before it.
        unit: one place of axis 1, such as a channel; by default all values together.
        percentiles: in percent; by default the 15th, 50th and 85th of Figure 1 in Ioffe & Szegedy (2015).
        bins: of the histogram, from the smallest to the largest value.
        loss: what runs the network, by default ``batch_loss``.

    Returns:
        By name, in the order of the calls. A layer called several times shows all its outputs together.

    Raises:
        InputError: an unknown name, or a layer that returned no tensor in this forward.
    """
    objective = Objective(net, batch, loss)
    names = list(layers_in_order(objective)) if layers is None else list(layers)
    known = dict(net.named_modules())
    for name in names:
        if name not in known:
            raise InputError(f"activations: no layer {name!r}; expected some of {[n for n in known if n]}")
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str, output: Any) -> None:
        if isinstance(output, Tensor):
            values = output.detach() if unit is None else output.detach().select(1, unit)
            seen.setdefault(name, []).append(values.flatten().double())

    hooks = [
        known[name].register_forward_hook(lambda module, args, output, name=name: keep(name, output)) for name in names
    ]
    try:
        with torch.no_grad():
            objective(objective.parameters)
    finally:
        for hook in hooks:
            hook.remove()
    missing = [name for name in names if name not in seen]
    if missing and layers is not None:
        raise InputError(f"activations: {missing} returned no tensor in this forward")
    return {name: _distribution(torch.cat(values), percentiles, bins) for name, values in seen.items()}


def _distribution(values: Tensor, percentiles: Sequence[float], bins: int) -> Activations:
    finite = values[torch.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)
    edges = torch.linspace(low, high, bins + 1, dtype=torch.float64)
    counts = torch.histc(finite, bins, low, high) if len(finite) else torch.zeros(bins)
    levels = torch.tensor(list(percentiles), dtype=torch.float64, device=values.device) / 100
    return Activations(
        percentiles=tuple(torch.quantile(values, levels).tolist()),
        counts=tuple(int(count) for count in counts),
        edges=tuple(edges.tolist()),
        mean=float(values.mean()),
        std=float(values.std(correction=0)),
    )


def gradient_norms(net: nn.Module, batch: Any, *, loss: Loss | None = None) -> dict[str, float]:
    """||dL/dW|| of each layer that owns trained parameters, in the order of the calls.

    Cost: one forward-backward and one forward. Nothing of the network changes; see `Objective`.

    Args:
        net: any network, in the mode in which it trains.
        batch: ``(x, y)``, or what `loss` takes.
        loss: ``loss(net, batch)``, a scalar; by default the mean cross-entropy.
    """
    objective = Objective(net, batch, loss)
    order = layers_in_order(objective)
    _, gradient = objective.gradient()
    return {name: norm({n: gradient[n] for n in owned}) for name, owned in order.items()}


@dataclass(frozen=True)
class WeightScale:
    """||W|| of a layer, and learning_rate / ||W||^2.

    The loss does not depend on the scale of a weight that batch normalization follows: its direction moves as if the
    learning rate were learning_rate / ||W||^2 and the norm 1.
    """

    norm: float
    effective_learning_rate: float


def weight_scales(net: nn.Module, learning_rate: float) -> dict[str, WeightScale]:
    """Weight norm and effective learning rate of each layer with a weight of two axes or more.

    Cost: no forward. The effective learning rate means something only for weights whose scale normalization cancels.

    Source: van Laarhoven 2017; Hoffer et al. 2018.

    Examples:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.constant_(layer.weight, 2.0)
        >>> round(weight_scales(nn.Sequential(layer), 0.4)["0"].effective_learning_rate, 6)
        0.05
    """
    found = {}
    for name, module in net.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim >= 2:
            length = norm({"weight": weight.detach()})
            found[name] = WeightScale(length, learning_rate / length**2 if length else float("inf"))
    return found
