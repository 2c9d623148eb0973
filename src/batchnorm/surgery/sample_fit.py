"""Batch normalization replaced by normalization of each sample: gamma and beta that agree best on data.

No normalization of samples computes what running statistics do. Layer by layer, in the order of the data, the new layer
gets the gamma and beta of the least squares fit of the old network's output there, given what arrives in the new one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import InputError, SurgeryError
from batchnorm.ops.context import eager
from batchnorm.population.feeding import feed
from batchnorm.surgery.comparison import copy_of, random_state_kept, tensors_of
from batchnorm.undo import in_mode

KINDS = ("group_norm", "layer_norm", "instance_norm")
_DEFAULT_GROUPS = 32  # Wu and He 2018, table 3


@dataclass(frozen=True)
class SampleFit:
    """What a fit found.

    Attributes:
        affine: gamma and beta by the name of the layer, float64.
        kinds: the class of the new layer and its groups, by name.
        difference: root mean square difference of the outputs from the old network's in evaluation, over the standard
            deviation of these, on the batches of the fit.
    """

    affine: dict[str, tuple[Tensor, Tensor]]
    kinds: dict[str, tuple[type[nn.Module], int]]
    difference: float


def kind_for(layer: Any, to: str, axes: set[int], groups: int | None) -> tuple[type[nn.Module], int] | str:
    """The class that takes a layer's place, with its groups of channels; or why none does.

    Args:
        layer: batch normalization.
        to: one of `KINDS`.
        axes: the numbers of axes of its inputs.
        groups: for GroupNorm; by default 32, or the largest divisor of both 32 and the channels.
    """
    channels = int(layer.num_features)
    if to == "group_norm":
        number = math.gcd(_DEFAULT_GROUPS, channels) if groups is None else groups
        if channels % number:
            return f"has {channels} channels, which {number} groups do not divide"
        if axes == {2} and number == channels:
            number = 1 if groups is None else number
        if axes == {2} and number == channels:
            return "gets one value a channel: a group of one channel would be zero; give fewer groups"
        return nn.GroupNorm, number
    if groups is not None:
        return f"was given groups={groups}, which goes with to='group_norm' alone"
    if to == "layer_norm":
        if axes != {2}:
            return "gets inputs with axes behind the channels, whose sizes LayerNorm fixes; to='group_norm', groups=1"
        return nn.LayerNorm, 1
    kinds = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}
    (rank,) = axes if len(axes) == 1 else (0,)
    if rank not in kinds:
        return "gets inputs without axes behind the channels (or of several ranks), where InstanceNorm has no pool"
    return kinds[rank], channels


def made(kind: type[nn.Module], channels: int, groups: int, eps: float, affine: bool) -> nn.Module:
    if kind is nn.GroupNorm:
        return nn.GroupNorm(groups, channels, eps, affine)
    if kind is nn.LayerNorm:
        return nn.LayerNorm(channels, eps, affine)
    return kind(channels, eps=eps, affine=affine)


def fit_samples(
    net: nn.Module,
    layers: Mapping[str, _BatchNorm],
    to: str,
    batches: Iterable[Any],
    groups: int | None = None,
) -> SampleFit:
    """Fit a normalization of samples for each layer; ``net`` is left alone.

    Two passes over the batches for each layer: one of the old network in evaluation mode, one of the new so far.

    Raises:
        InputError: no batches, or a layer that they do not reach.
        SurgeryError: a layer for whose inputs there is no such class.
    """
    data = [batches] if isinstance(batches, Tensor) else list(batches)
    if not data:
        raise InputError("convert: got no batches to fit on; expected at least one")
    old, new = copy_of(net, training=False), copy_of(net, training=False)
    with random_state_kept(net), torch.no_grad(), eager():
        order, axes = _order(old, layers, data[0])
        kinds: dict[str, tuple[type[nn.Module], int]] = {}
        reasons = []
        for name in layers:
            if name not in axes:
                raise InputError(f"convert: the batches do not reach '{name}'; give some that pass all layers")
            found = kind_for(layers[name], to, axes[name], groups)
            if isinstance(found, str):
                reasons.append(f"'{name}' {found}")
            else:
                kinds[name] = found
        if reasons:
            raise SurgeryError(f"convert: {'; '.join(reasons)}. Nothing was changed.")
        affine = {name: _fit_layer(old, new, name, kinds[name], data) for name in order}
        return SampleFit(affine, kinds, _difference(old, new, data))


def _order(net: nn.Module, layers: Mapping[str, _BatchNorm], batch: Any) -> tuple[list[str], dict[str, set[int]]]:
    """The layers in the order of the data, and how many axes their inputs have."""
    axes: dict[str, set[int]] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda module, args: axes.setdefault(name, set()).add(args[0].dim())

    handles = [net.get_submodule(name).register_forward_pre_hook(note(name)) for name in layers]
    feed(net, batch)
    for handle in handles:
        handle.remove()
    return list(axes), axes


def _fit_layer(
    old: nn.Module, new: nn.Module, name: str, kind: tuple[type[nn.Module], int], data: list[Any]
) -> tuple[Tensor, Tensor]:
    """Put the new layer into ``new``, with the gamma and beta that it returns."""
    layer: Any = new.get_submodule(name)
    plain = made(kind[0], layer.num_features, kind[1], layer.eps, affine=False).to(layer.running_mean.device)
    line = _Line()
    for batch in data:
        with _seen(old, name, of_output=True) as outputs:
            feed(old, batch)
        with _seen(new, name, of_output=False) as inputs:
            feed(new, batch)
        for x, y in zip(inputs, outputs, strict=True):
            line.add(plain(x), y)
    gamma, beta = line.best()
    module = made(kind[0], layer.num_features, kind[1], layer.eps, affine=True).to(layer.running_mean.device)
    module.load_state_dict({"weight": gamma, "bias": beta})
    parent, _, key = name.rpartition(".")
    new.get_submodule(parent)._modules[key] = in_mode(module.to(layer.running_mean.dtype), False)
    return gamma, beta


class _Line:
    """Sums of a least squares fit of ``y`` by ``gamma z + beta``, channel by channel, about the means so far."""

    def __init__(self) -> None:
        self.count = 0.0
        self.z = self.y = self.zz = self.zy = torch.zeros((), dtype=torch.float64)

    def add(self, z: Tensor, y: Tensor) -> None:
        z, y = (t.double().movedim(1, 0).flatten(1) for t in (z, y))
        count, old = float(z.shape[1]), self.count
        mean_z, mean_y = z.mean(1), y.mean(1)
        self.count += count
        share = old * count / self.count
        dz, dy = mean_z - self.z, mean_y - self.y
        self.zz = self.zz + (z - mean_z[:, None]).square().sum(1) + dz * dz * share
        self.zy = self.zy + ((z - mean_z[:, None]) * (y - mean_y[:, None])).sum(1) + dz * dy * share
        self.z, self.y = self.z + dz * count / self.count, self.y + dy * count / self.count

    def best(self) -> tuple[Tensor, Tensor]:
        """gamma is 0 where z does not vary."""
        varies = self.zz > 1e-12 * self.count
        gamma = torch.where(varies, self.zy / torch.where(varies, self.zz, 1.0), 0.0)
        return gamma, self.y - gamma * self.z


@contextmanager
def _seen(net: nn.Module, name: str, *, of_output: bool) -> Iterator[list[Tensor]]:
    """The inputs or outputs of a module, call by call."""
    found: list[Tensor] = []
    module = net.get_submodule(name)

    def note(module: nn.Module, args: Any, output: Any) -> None:
        found.append((output if of_output else args[0]).detach().clone())

    handle = module.register_forward_hook(note)
    try:
        yield found
    finally:
        handle.remove()


def _difference(old: nn.Module, new: nn.Module, data: list[Any]) -> float:
    off = spread = 0.0
    for batch in data:
        pairs = zip(tensors_of(feed(old, batch)), tensors_of(feed(new, batch)), strict=True)
        for (_, expected), (_, given) in pairs:
            if expected.is_floating_point() and expected.ndim:
                a, b = expected.double(), given.double()
                off += float((a - b).square().sum())
                spread += float((a - (a.mean(0) if len(a) > 1 else a.mean())).square().sum())
    return math.sqrt(off / spread) if spread else 0.0 if not off else math.inf
