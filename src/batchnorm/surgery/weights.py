"""Which axis of a weight is which, and whether a forward applies its weight just once."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

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
    if not isinstance(layer, (nn.Linear, _ConvNd)):
        return False
    axes = 0 if isinstance(layer, nn.Linear) else len(layer.kernel_size)

    def scaled(once: nn.Linear | _ConvNd, x: Tensor, draw: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        size = once.out_features if isinstance(once, nn.Linear) else once.out_channels
        scale, shift = draw(size), draw(size)
        expected = once(x) * scale.reshape(-1, *[1] * axes) + shift.reshape(-1, *[1] * axes)
        return scale_outputs(once, once.weight, scale), _bias(once, scale) * scale + shift, x, expected

    return _computes(layer, scaled)


def reads_inputs_once(layer: nn.Module) -> bool:
    """Whether a linear layer with a forward of its own gives ``W (s x + t) + b`` as ``W' = W s, b' = b + W t``."""
    if not isinstance(layer, nn.Linear):
        return False

    def moved(once: nn.Linear | _ConvNd, x: Tensor, draw: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        scale, shift = draw(x.shape[-1]), draw(x.shape[-1])
        bias = _bias(once, once.weight[:, 0]) + once.weight @ shift
        return once.weight * scale, bias, x, once(x * scale + shift)

    return _computes(layer, moved)


def _computes(layer: nn.Linear | _ConvNd, change: Callable[..., tuple[Tensor, ...]]) -> bool:
    """Whether a layer gives what is expected of other weights, for random numbers.

    Args:
        layer: the layer.
        change: gives weight, bias, input and expected output, of a copy, an input and a source of random numbers.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    try:
        if _has_inner_state(layer):
            return False
        once, other = (copy.deepcopy(layer).to("cpu", torch.float64).eval() for _ in range(2))
        if isinstance(layer, nn.Linear):
            x = draw(3, layer.in_features)
        else:
            space = [d * (k - 1) + 3 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
            x = draw(2, layer.in_channels, *space)
        with torch.no_grad():
            weight, bias, given, expected = change(once, x, draw)
            other.weight, other.bias = nn.Parameter(weight), nn.Parameter(bias)
            limit = 1e-4 * float(expected.abs().max())
            return bool(torch.allclose(other(given), expected, rtol=1e-4, atol=limit))
    except Exception:  # whatever a forward of any kind raises
        return False


def _bias(layer: nn.Linear | _ConvNd, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if layer.bias is None else layer.bias


def _has_inner_state(layer: nn.Module) -> bool:
    """Whether submodules have tensors or hooks: then they do more than pad."""
    children = [module for module in layer.modules() if module is not layer]
    return any(
        has_hooks(child) or child._parameters or child._buffers or isinstance(child, _RANDOM) for child in children
    )
