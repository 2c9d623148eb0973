"""Running statistics of averaged models: merged as populations, not averaged number by number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import InputError, SynchronizationError
from batchnorm.pools import Pool, all_gather, is_alone
from batchnorm.population.state_dicts import as_tensor, renamed_state

Net = TypeVar("Net", bound=nn.Module)


def average_statistics(
    net: Net, models: Sequence[nn.Module | Mapping[str, Any]], *, weights: Sequence[float] | None = None
) -> Net:
    """Give the batch normalizations of ``net`` the statistics of all ``models`` together, in place.

    ``mean = sum w_i mean_i`` and ``var = sum w_i (var_i + (mean_i - mean)^2)``, w_i the share of model i: the law of
    total variance, which the average of the variances lacks the second part of. For SWA and EMA of models; it is what
    the models' running statistics know. `calibrate` measures what the averaged weights really do.

    Args:
        net: the averaged network; an `AveragedModel` may be given as it is.
        models: networks, or their state_dicts (of tensors or arrays; names may have a wrapper's prefix), with the same
            batch normalizations; ``net`` itself may be among them.
        weights: shares, >= 0, of any sum; for EMA ``average_statistics(ema, [ema, net], weights=[0.999, 0.001])``.
            By default ``num_batches_tracked`` of each layer, and their sum is what the layer then has tracked.

    Returns:
        The network. ``running_var`` is of the kind (biased or unbiased) that the models keep.

    Raises:
        InputError: models that lack a layer or have another number of channels, weights that do not fit. Nothing is
            changed then.

    Source: Izmailov et al. 2018 (SWA), whose statistics torch averages blindly with ``use_buffers=True``.
    """
    layers = _layers(net)
    if not layers or not models:
        raise InputError(f"average_statistics: got {len(layers)} layers with running statistics, {len(models)} models")
    if weights is not None and (len(weights) != len(models) or min(weights) < 0 or sum(weights) <= 0):
        raise InputError(f"average_statistics: got weights={list(weights)} for {len(models)} models; expected as many")
    states = [_state(model, net, layers) for model in models]
    new = {name: _merged(name, layer, states, weights) for name, layer in layers.items()}
    for name, (mean, var, batches) in new.items():
        _write(layers[name], mean, var)
        if layers[name].num_batches_tracked is not None and weights is None:
            layers[name].num_batches_tracked.copy_(batches)  # type: ignore[union-attr]
    return net


@torch.no_grad()
def sync_running_statistics(net: Net, process_group: Any = "world") -> Net:
    """Merge the running statistics of all ranks by the batches that each has tracked, in place.

    As `average_statistics` of the ranks' networks, for data-parallel training in which each rank normalizes by its own
    batch (`DistributedDataParallel` overwrites the others' statistics with those of rank 0, which saw a part of the
    data): call it before evaluation and before a checkpoint, on every rank. Each rank's ``num_batches_tracked`` stays
    its own number, so that merging again, also after further training, counts no batch twice. Layers with
    ``process_group=`` have equal statistics already, and keep them.

    Args:
        net: the network, with torch's layers or this package's; a wrapped one may be given as it is.
        process_group: "world" or a group of torch.distributed, every rank of which makes this call.

    Returns:
        The network. A layer (or domain, or time step) that no rank has tracked a batch of is left as it is.

    Raises:
        InputError: no layer with running statistics.
        SynchronizationError: a rank that does not make the call within the group's timeout, or has other layers.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(2))
        >>> sync_running_statistics(net) is net  # a process alone is the world
        True
    """
    layers = _layers(net)
    if not layers:
        raise InputError(f"sync_running_statistics: {type(net).__name__} has no layer with running statistics")
    if is_alone(process_group):
        return net
    keys = [
        (f"{name}." if name else "") + key
        for name, layer in layers.items()
        for key in ("running_mean", "running_var", "num_batches_tracked")
        if getattr(layer, key) is not None
    ]
    buffers = dict(_unwrapped(net).named_buffers())
    own = torch.cat([buffers[key].flatten().to(buffers[keys[0]].device, torch.float64) for key in keys])
    pool = Pool(process_group=process_group, layer="sync_running_statistics")
    lengths = all_gather(own.new_tensor([own.numel()]), pool)
    if (lengths != own.numel()).any():
        raise SynchronizationError(
            f"sync_running_statistics: the ranks keep {lengths.flatten().int().tolist()} statistics; "
            "expected the same layers on all. Nothing was changed"
        )
    sizes = [buffers[key].numel() for key in keys]
    states = [
        {key: part.view_as(buffers[key]) for key, part in zip(keys, rank.split(sizes), strict=True)}
        for rank in all_gather(own, pool)
    ]
    for name, layer in layers.items():
        counted = layer.num_batches_tracked is not None
        if counted and not any(state[f"{name}.num_batches_tracked".lstrip(".")].any() for state in states):
            continue
        mean, var, _ = _merged(name, layer, states, None if counted else [1.0] * len(states))
        _write(layer, mean, var)
    return net


def _layers(net: nn.Module) -> dict[str, _BatchNorm]:
    modules = _unwrapped(net).named_modules()
    return {name: m for name, m in modules if isinstance(m, _BatchNorm) and m.running_mean is not None}


@torch.no_grad()
def _write(layer: _BatchNorm, mean: Tensor, var: Tensor) -> None:
    layer.running_mean.copy_(mean)  # type: ignore[union-attr]
    layer.running_var.copy_(var)  # type: ignore[union-attr]


def _unwrapped(net: nn.Module) -> nn.Module:
    wrappers = (torch.optim.swa_utils.AveragedModel, nn.parallel.DistributedDataParallel, nn.DataParallel)
    return _unwrapped(net.module) if isinstance(net, wrappers) else net


def _state(model: nn.Module | Mapping[str, Any], net: nn.Module, layers: Mapping[str, nn.Module]) -> Mapping[str, Any]:
    if isinstance(model, nn.Module):
        return dict(_unwrapped(model).named_buffers())
    needed = [f"{name}.running_mean".removeprefix(".") for name in layers]
    return renamed_state(model, _unwrapped(net), needed) or {key: as_tensor(value) for key, value in model.items()}


def _merged(
    name: str, layer: _BatchNorm, states: Sequence[Mapping[str, Tensor]], weights: Sequence[float] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, var, batches) of a layer over all models, in float64."""
    prefix = f"{name}." if name else ""

    def stack(key: str) -> Tensor:
        for i, state in enumerate(states):
            if prefix + key not in state:
                raise InputError(f"average_statistics: model {i} has no {prefix + key}")
            value = state[prefix + key]
            if not isinstance(value, Tensor) or value.is_complex() or value.is_quantized:
                kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise InputError(f"average_statistics: model {i} has {prefix + key} as {kind}; expected real numbers")
        found = [state[prefix + key].double() for state in states]
        if any(value.shape != found[0].shape for value in found):
            raise InputError(f"average_statistics: {prefix + key} has shapes {[tuple(v.shape) for v in found]}")
        return torch.stack(found)

    means, variances = stack("running_mean"), stack("running_var")
    assert layer.running_mean is not None
    if means.shape[1:] != layer.running_mean.shape:
        raise InputError(
            f"average_statistics: layer {name!r} has {layer.num_features} channels and statistics of shape "
            f"{tuple(layer.running_mean.shape)}, got {tuple(means.shape[1:])}"
        )
    counts = stack("num_batches_tracked") if weights is None else means.new_tensor(weights)
    if counts.sum() <= 0:
        raise InputError(f"average_statistics: layer {name!r} has tracked no batch in any model; give weights=")
    total = counts.sum(0)  # a domain or time step that none has tracked is the same in all
    share = torch.where(total > 0, counts / torch.where(total > 0, total, 1.0), 1 / len(counts))
    share = share.reshape(*share.shape, *[1] * (means.ndim - share.ndim))
    mean = (share * means).sum(0)
    return mean, (share * (variances + (means - mean).square())).sum(0), total
