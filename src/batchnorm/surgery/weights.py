"""Which axis of a weight is which, and whether a forward applies its weight just once."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.dropout import _DropoutNd

from batchnorm.nn.outside import has_hooks

_RANDOM = (_DropoutNd, nn.RReLU)


def scale_outputs(layer: nn.Module, weight: Tensor, scale: Tensor) -> Tensor:
    """The weight with each output channel multiplied by its ``scale``.

    The output axis is the first, but a transposed convolution's weight is (in, out / groups, *k),
    with the groups along the first axis.
    """
    if not isinstance(layer, _ConvTransposeNd):
        return weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
    groups, kernel = layer.groups, weight.shape[2:]
    grouped = weight.reshape(groups, -1, weight.shape[1], *kernel)
    return (grouped * scale.reshape(groups, 1, -1, *[1] * len(kernel))).reshape(weight.shape)


def per_input(layer: nn.Module, weight: Tensor) -> Tensor:
    """A view of the weight as (groups, out / groups, in / groups, taps)."""
    if isinstance(layer, nn.Linear):
        return weight[None, :, :, None]
    assert isinstance(layer, _ConvNd)
    groups = layer.groups
    if isinstance(layer, _ConvTransposeNd):
        return weight.reshape(groups, -1, weight.shape[1], math.prod(weight.shape[2:])).transpose(1, 2)
    return weight.reshape(groups, -1, weight.shape[1], math.prod(weight.shape[2:]))


def applies_weights_once(layer: nn.Module) -> bool:
    """Whether scaling weight and bias of a linear or convolution layer with a forward of its own scales its output.

    So it is where the forward, or a submodule, pads, and not where the forward standardizes its weights. Known by the
    outputs for random numbers, before and after: ``W' = s W, b' = s b + t`` has to give ``s y + t``.
    """
    if not isinstance(layer, (nn.Linear, _ConvNd)) or _has_inner_state(layer):
        return False
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    try:
        once, scaled = (copy.deepcopy(layer).to("cpu", torch.float64).eval() for _ in range(2))
        if isinstance(layer, nn.Linear):
            x, size, axes = draw(3, layer.in_features), layer.out_features, 0
        else:
            space = [d * (k - 1) + 3 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
            x, size, axes = draw(2, layer.in_channels, *space), layer.out_channels, len(space)
        scale, shift = draw(size), draw(size)
        with torch.no_grad():
            old = torch.zeros_like(scale) if once.bias is None else once.bias
            scaled.weight = nn.Parameter(scale_outputs(layer, once.weight, scale))
            scaled.bias = nn.Parameter(old * scale + shift)
            y, expected = scaled(x), once(x)
            expected = expected * scale.reshape(-1, *[1] * axes) + shift.reshape(-1, *[1] * axes)
            return bool(torch.allclose(y, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())))
    except Exception:  # whatever a forward of any kind raises
        return False


def _has_inner_state(layer: nn.Module) -> bool:
    """Whether submodules have tensors or hooks: then they do more than pad."""
    children = [module for module in layer.modules() if module is not layer]
    return any(
        has_hooks(child) or child._parameters or child._buffers or isinstance(child, _RANDOM) for child in children
    )
