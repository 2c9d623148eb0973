"""Running statistics of averaged models: merged as populations, not averaged number by number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import InputError

Net = TypeVar("Net", bound=nn.Module)


def average_statistics(
    net: Net, models: Sequence[nn.Module | Mapping[str, Tensor]], *, weights: Sequence[float] | None = None
) -> Net:
    """Give the batch normalizations of ``net`` the statistics of all ``models`` together, in place.

    ``mean = sum w_i mean_i`` and ``var = sum w_i (var_i + (mean_i - mean)^2)``, w_i the share of model i: the law of
    total variance, which the average of the variances lacks the second part of. For SWA and EMA of models; it is what
    the models' running statistics know. `calibrate` measures what the averaged weights really do.

    Args:
        net: the averaged network; an `AveragedModel` may be given as it is.
        models: networks, or their state_dicts, with the same batch normalizations; ``net`` itself may be among them.
        weights: shares, >= 0, of any sum; for EMA ``average_statistics(ema, [ema, net], weights=[0.999, 0.001])``.
            By default ``num_batches_tracked`` of each layer, and their sum is what the layer then has tracked.

    Returns:
        The network. ``running_var`` is of the kind (biased or unbiased) that the models keep.

    Raises:
        InputError: models that lack a layer or have another number of channels, weights that do not fit. Nothing is
            changed then.

    Source: Izmailov et al. 2018 (SWA), whose statistics torch averages blindly with ``use_buffers=True``.
    """
    net_ = _unwrapped(net)
    layers = {name: m for name, m in net_.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None}
    if not layers or not models:
        raise InputError(f"average_statistics: got {len(layers)} layers with running statistics, {len(models)} models")
    if weights is not None and (len(weights) != len(models) or min(weights) < 0 or sum(weights) <= 0):
        raise InputError(f"average_statistics: got weights={list(weights)} for {len(models)} models; expected as many")
    states = [_state(model) for model in models]
    new = {name: _merged(name, layer, states, weights) for name, layer in layers.items()}
    with torch.no_grad():
        for name, (mean, var, batches) in new.items():
            layer = layers[name]
            layer.running_mean.copy_(mean)  # type: ignore[union-attr]
            layer.running_var.copy_(var)  # type: ignore[union-attr]
            if layer.num_batches_tracked is not None and weights is None:
                layer.num_batches_tracked.copy_(batches)
    return net


def _unwrapped(net: nn.Module) -> nn.Module:
    wrappers = (torch.optim.swa_utils.AveragedModel, nn.parallel.DistributedDataParallel, nn.DataParallel)
    return _unwrapped(net.module) if isinstance(net, wrappers) else net


def _state(model: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return dict(_unwrapped(model).named_buffers()) if isinstance(model, nn.Module) else model


def _merged(
    name: str, layer: _BatchNorm, states: list[Mapping[str, Tensor]], weights: Sequence[float] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, var, batches) of a layer over all models, in float64."""
    prefix = f"{name}." if name else ""

    def stack(key: str) -> Tensor:
        for i, state in enumerate(states):
            if prefix + key not in state:
                raise InputError(f"average_statistics: model {i} has no {prefix + key}")
        found = [state[prefix + key].double() for state in states]
        if any(value.shape != found[0].shape for value in found):
            raise InputError(f"average_statistics: {prefix + key} has shapes {[tuple(v.shape) for v in found]}")
        return torch.stack(found)

    means, variances = stack("running_mean"), stack("running_var")
    if means.shape[1] != layer.num_features:
        raise InputError(f"average_statistics: layer {name!r} has {layer.num_features} channels, got {means.shape[1]}")
    counts = stack("num_batches_tracked") if weights is None else means.new_tensor(weights)
    if counts.sum() <= 0:
        raise InputError(f"average_statistics: layer {name!r} has tracked no batch in any model; give weights=")
    share = (counts / counts.sum())[:, None]
    mean = (share * means).sum(0)
    return mean, (share * (variances + (means - mean).square())).sum(0), counts.sum()
