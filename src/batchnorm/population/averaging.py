"""Running statistics of averaged models: merged as populations, not averaged number by number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import InputError, SynchronizationError
from batchnorm.pools import Pool, all_gather, is_alone
from batchnorm.population.state_dicts import renamed_state

Net = TypeVar("Net", bound=nn.Module)

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def average_statistics(
    net: Net,
    models: Sequence[nn.Module | Mapping[str, Any] | Sequence[Any]],
    *,
    weights: Sequence[float] | None = None,
) -> Net:
    """Give the batch normalizations of ``net`` the statistics of all ``models`` together, in place.

    ``mean = sum w_i mean_i`` and ``var = sum w_i (var_i + (mean_i - mean)^2)``, w_i the share of model i: the law of
    total variance, which the average of the variances lacks the second part of. For SWA and EMA of models, and for
    rounds of federated learning; it is what the models' running statistics know. `calibrate` measures what the
    averaged weights really do.

    Args:
        net: the averaged network; an `AveragedModel` may be given as it is.
        models: networks with the same batch normalizations, ``net`` itself may be among them; or their states: dicts
            by key (which may have a wrapper's prefix) whose values are tensors, NumPy arrays, lists or numbers, or
            lists of all values in the order of ``net.state_dict()``. Of a state, the keys that `statistics_keys`
            names are read.
        weights: shares, >= 0, of any sum, such as the number of samples of each model; for EMA
            ``average_statistics(ema, [ema, net], weights=[0.999, 0.001])``. By default ``num_batches_tracked`` of each
            layer, and their sum is what the layer then has tracked.

    Returns:
        The network. ``running_var`` is of the kind (biased or unbiased) that the models keep.

    Raises:
        InputError: models that lack a key, or have another shape, no numbers, values that are not finite, a negative
            variance or count under it, weights that do not fit. The message names model and key. Nothing is changed
            then.

    Source: Izmailov et al. 2018 (SWA), whose statistics torch averages blindly with ``use_buffers=True``.

    Examples:
        >>> net = nn.Sequential(nn.BatchNorm1d(1))
        >>> states = [{"0.running_mean": [m], "0.running_var": [1.0]} for m in (-3.0, 3.0)]
        >>> average_statistics(net, states, weights=[10, 10])[0].running_var
        tensor([10.])
    """
    models = list(models)
    layers = _layers(net)
    if not layers or not models:
        raise InputError(f"average_statistics: got {len(layers)} layers with running statistics, {len(models)} models")
    shares = None if weights is None else _shares(weights, len(models))
    states = [_state(model, net, layers, number) for number, model in enumerate(models)]
    new = {name: _merged(name, layer, states, shares) for name, layer in layers.items()}
    for name, (mean, var, batches) in new.items():
        _write(layers[name], mean, var)
        if layers[name].num_batches_tracked is not None and shares is None:
            layers[name].num_batches_tracked.copy_(batches)  # type: ignore[union-attr]
    return net


def statistics_keys(net: nn.Module, kind: Literal["statistics", "affine", "all"] = "statistics") -> list[str]:
    """The keys of ``net.state_dict()`` that belong to its batch normalizations, in the order of the state.

    For those who average weights and treat batch norm apart: clients of federated learning that keep their own
    statistics (SiloBN) or all of batch norm (FedBN), EMA of weights, or differences of checkpoints.

    Args:
        net: a network with torch's layers, this package's, or subclasses of these. A layer that is used at several
            places has a key at each; the keys of a wrapped network are those of the wrapper.
        kind: "statistics" (running_mean, running_var, num_batches_tracked), "affine" (weight, bias), or "all" (both,
            and whatever else such a layer keeps).

    Returns:
        The keys; an empty list for a network without batch norm.

    Raises:
        InputError: another kind, or no network.

    Source: Andreux et al. 2020 (SiloBN); Li et al. 2021 (FedBN).

    Examples:
        >>> statistics_keys(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), "affine")
        ['1.weight', '1.bias']
    """
    if kind not in ("statistics", "affine", "all"):
        raise InputError(f"statistics_keys: got kind={kind!r}; expected 'statistics', 'affine' or 'all'")
    if not isinstance(net, nn.Module):
        raise InputError(f"statistics_keys: got a {type(net).__name__}; expected a torch.nn.Module")
    ends = {"statistics": _STATISTICS, "affine": ("weight", "bias")}.get(kind)
    mine = set()
    for name, module in net.named_modules(remove_duplicate=False):
        if isinstance(module, _BatchNorm):
            own = ends if ends is not None else [key for key in module.state_dict() if "_extra_state" not in key]
            mine |= {f"{name}.{end}".lstrip(".") for end in own}
    return [key for key in net.state_dict() if key in mine]


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

    Source: Chan, Golub & LeVeque 1983 (merging of moments).

    Examples:
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


def _shares(weights: Sequence[float], models: int) -> list[float]:
    try:
        shares = [float(weight) for weight in weights]
    except (TypeError, ValueError):
        shares = []
    if len(shares) != models or not all(math.isfinite(share) and share >= 0 for share in shares) or sum(shares) <= 0:
        raise InputError(
            f"average_statistics: got weights={weights!r} for {models} models; expected as many finite numbers >= 0, "
            "and one above 0"
        )
    return shares


def _state(model: Any, net: nn.Module, layers: Mapping[str, nn.Module], number: int) -> Mapping[str, Any]:
    """A model's state by key."""
    if isinstance(model, nn.Module):
        return dict(_unwrapped(model).named_buffers(remove_duplicate=False))
    if isinstance(model, Mapping):
        needed = [f"{name}.running_mean".removeprefix(".") for name in layers]
        return renamed_state(model, _unwrapped(net), needed) or model
    if isinstance(model, list | tuple):
        keys = list(_unwrapped(net).state_dict())
        if len(model) != len(keys):
            raise InputError(
                f"average_statistics: model {number} is a list of {len(model)} values; expected {len(keys)}, one for "
                "each key of net.state_dict() in its order, or a dict by key"
            )
        return dict(zip(keys, model, strict=True))
    raise InputError(
        f"average_statistics: model {number} is a {type(model).__name__}; expected a network, a dict of values by key, "
        "or a list of values in the order of net.state_dict()"
    )


def _numbers(value: Any, number: int, key: str) -> Tensor:
    """A value of a state in float64."""
    where = f"average_statistics: model {number} has {key}"
    if isinstance(value, Tensor):
        if value.is_complex() or value.is_quantized:
            raise InputError(f"{where} as {value.dtype}; expected real numbers")
        tensor = value.detach().double()
    else:
        kind = type(value).__name__
        try:
            array = np.asarray(value)
        except (TypeError, ValueError) as error:
            raise InputError(f"{where} as a {kind} of unequal parts; expected real numbers") from error
        if array.dtype.kind not in "biuf":
            raise InputError(f"{where} as a {kind} of {array.dtype}; expected real numbers")
        tensor = torch.from_numpy(array.astype(np.float64))
    if not torch.isfinite(tensor).all():
        raise InputError(f"{where} with values that are not finite")
    if not key.endswith("running_mean") and (tensor < 0).any():
        raise InputError(f"{where} with negative values")
    return tensor


def _merged(
    name: str, layer: _BatchNorm, states: Sequence[Mapping[str, Any]], weights: Sequence[float] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, var, batches) of a layer over all models, in float64."""
    prefix = f"{name}." if name else ""

    assert layer.running_mean is not None
    device = layer.running_mean.device

    def stack(key: str, like: Tensor) -> Tensor:
        found = []
        for i, state in enumerate(states):
            if prefix + key not in state:
                advice = "; give weights=" if key == "num_batches_tracked" else ""
                raise InputError(f"average_statistics: model {i} has no {prefix + key}{advice}")
            found.append(_numbers(state[prefix + key], i, prefix + key).to(device))
        shapes = [tuple(value.shape) for value in found]
        if len(set(shapes)) > 1:
            raise InputError(f"average_statistics: {prefix + key} has shapes {shapes}, by model; expected one shape")
        if shapes[0] != tuple(like.shape):
            raise InputError(
                f"average_statistics: {prefix + key}: layer {name!r} has {layer.num_features} channels and statistics "
                f"of shape {tuple(like.shape)}, got {shapes[0]}"
            )
        return torch.stack(found)

    assert layer.running_var is not None
    means, variances = stack("running_mean", layer.running_mean), stack("running_var", layer.running_var)
    tracked = layer.num_batches_tracked
    if weights is not None:
        counts = means.new_tensor(weights)
    elif tracked is None:
        raise InputError(f"average_statistics: layer {name!r} does not count its batches; give weights=")
    else:
        counts = stack("num_batches_tracked", tracked)
    if counts.sum() <= 0:
        raise InputError(f"average_statistics: layer {name!r} has tracked no batch in any model; give weights=")
    total = counts.sum(0)  # a domain or time step that none has tracked is the same in all
    share = torch.where(total > 0, counts / torch.where(total > 0, total, 1.0), 1 / len(counts))
    share = share.reshape(*share.shape, *[1] * (means.ndim - share.ndim))
    mean = (share * means).sum(0)
    return mean, (share * (variances + (means - mean).square())).sum(0), total
