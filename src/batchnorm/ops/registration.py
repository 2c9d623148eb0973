"""Registers the implementations: ATen for every device, Triton for CUDA, then the native library for the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels import aten, cpu
from batchnorm.moments import merge_axis
from batchnorm.ops import autograd, cuda
from batchnorm.ops.schemas import ACTIVATIONS, LIBRARY, empty_like, signs_size
from batchnorm.pools import Pool, Pools, merge_moments


def _nothing(x: Tensor) -> Tensor:
    return x.new_empty(0)


def _mask(args: tuple[Any, ...], at: int) -> Tensor | None:
    """The last argument, which is left out where it is None."""
    return args[at] if len(args) > at else None


def _no_signs(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=torch.uint8)


def _normalize(x: Tensor, mean: Tensor, var: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    (weight, bias, residual, pool_size, eps, activation, slope, save_signs), mask = args[:8], _mask(args, 8)
    y = aten.normalize(x, mean, var, weight, bias, residual, pool_size, eps, ACTIVATIONS[activation], slope, mask)
    return _like(y, x), _pack(x, mean, var, *args) if save_signs else _no_signs(x)


def _forward(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (weight, bias, residual, pool_size, eps, activation, slope, save_signs), mask = args[:8], _mask(args, 8)
    y, mean, var = aten.forward(x, weight, bias, residual, pool_size, eps, ACTIVATIONS[activation], slope, mask)
    signs = _pack(x, mean, var, *args) if save_signs else _no_signs(x)
    return _like(y, x), mean, var, signs


def _like(y: Tensor, x: Tensor) -> Tensor:
    """y with the strides that the fake kernels promise."""
    out = empty_like(x)
    return y if out.stride() == y.stride() else out.copy_(y)


def _pack(x: Tensor, mean: Tensor, var: Tensor, *args: Any) -> Tensor:
    """One bit an element, in the order of the tensor's elements."""
    weight, bias, residual, pool_size, eps, activation, slope = args[:7]
    z = aten.normalize(x, mean, var, weight, bias, residual, pool_size, eps, "identity", slope)
    on = aten.derivative(z, ACTIVATIONS[activation], 0.0).ne(0).flatten()
    weights = 2 ** torch.arange(8, device=x.device, dtype=torch.uint8)
    bits = torch.nn.functional.pad(on.to(torch.uint8), (0, -on.numel() % 8)).reshape(-1, 8)
    packed = (bits * weights).sum(1, dtype=torch.uint8)
    return torch.nn.functional.pad(packed, (0, signs_size(x) - packed.numel()))


def _gate(dy: Tensor, x: Tensor, signs: Tensor | None, activation: int, slope: float) -> Any:
    """dy and the activation that is left, after the bits have been applied where there are some."""
    if signs is None or not signs.numel():
        return dy, ACTIVATIONS[activation]
    shifts = torch.arange(8, device=x.device, dtype=torch.uint8)
    on = (signs[:, None] >> shifts & 1).flatten()[: x.numel()].reshape(x.shape).bool()
    off = slope if ACTIVATIONS[activation] == "leaky_relu" else 0.0
    return torch.where(on, dy, dy * off), "identity"


def _backward_reduce(dy: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    (weight, bias, residual, signs, mean, var, pool_size, eps, activation, slope), mask = args[:10], _mask(args, 10)
    dy, left = _gate(dy, x, signs, activation, slope)
    return aten.backward_reduce(dy, x, weight, bias, residual, mean, var, pool_size, eps, left, slope, mask)


def _backward_apply(dy: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    weight, bias, residual, signs, mean, var, k1, k2, k3 = args[:9]
    (pool_size, eps, activation, slope, want_residual), mask = args[9:14], _mask(args, 14)
    dy, left = _gate(dy, x, signs, activation, slope)
    dx, dz = aten.backward_apply(
        dy, x, weight, bias, residual, mean, var, k1, k2, k3, pool_size, eps, left, slope, mask
    )
    return _like(dx, x), _like(dz, x) if want_residual else _nothing(x)


def _count_moments(x: Tensor, pool_size: int, mask: Tensor | None = None) -> Tensor:
    moments = torch.ops.batchnorm.moments.default(x, pool_size, mask)
    return torch.stack((Pools(x, pool_size, mask).counts(), *moments))


def _normalize_merged(x: Tensor, parts: Tensor, *args: Any) -> tuple[Tensor, ...]:
    (*settings, groups, save_signs), mask = args[:9], _mask(args, 9)
    counts, means, m2s = parts.unbind(1)
    counts, means, m2s = merge_moments(counts, means, m2s, Pool(groups=groups))
    one = len(parts) == 1  # rank
    count, mean, m2 = (counts[0], means[0], m2s[0]) if one else merge_axis(counts, means, m2s, 0)
    var = m2 / torch.where(count > 0, count, 1.0)
    y, signs = torch.ops.batchnorm.normalize.default(x, mean, var, *settings, save_signs, mask)
    return y, count, mean, var, signs


def _backward_merged(dy: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    weight, bias, residual, signs, mean, var, sums, count = args[:8]
    inv_std = torch.rsqrt(var + args[9])
    k1 = inv_std if weight is None else weight.to(var.dtype) * inv_std
    count = torch.where(count > 0, count, 1.0)
    coefficients = (k1.expand_as(mean), -(inv_std**3) * sums[1] / count, -inv_std * sums[0] / count)
    saved = (weight, bias, residual, signs, mean, var)
    results: tuple[Tensor, Tensor] = torch.ops.batchnorm.backward_apply.default(dy, x, *saved, *coefficients, *args[8:])
    return results


def _backward(dy: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight, bias, residual, signs, mean, var = args[:6]
    (pool_size, eps, activation, slope, population, want_x, want_residual), mask = args[6:13], _mask(args, 13)
    dy, left = _gate(dy, x, signs, activation, slope)
    dx, dz, d_weight, d_bias = aten.gradients(
        dy, x, weight, bias, residual, mean, var, pool_size, eps, left, slope, population, mask
    )
    if dz is dy:
        dz = dz.clone()
    return (
        _like(dx, x) if want_x else _nothing(x),
        _like(dz, x) if want_residual else _nothing(x),
        _nothing(x) if weight is None else d_weight.to(weight.dtype),
        _nothing(x) if bias is None else d_bias.to(bias.dtype),
    )


_operators: dict[str, Callable[..., Any]] = {
    "moments": aten.moments,
    "normalize": _normalize,
    "forward": _forward,
    "backward_reduce": _backward_reduce,
    "backward_apply": _backward_apply,
    "backward": _backward,
    "count_moments": _count_moments,
    "normalize_merged": _normalize_merged,
    "backward_merged": _backward_merged,
    "update_statistics": aten.update_statistics,
}
for _name, _function in _operators.items():
    LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    # Gradients are the autograd functions' affair: nothing to do here, and no time to lose.
    LIBRARY.impl(_name, torch.library.fallthrough_kernel, "Autograd")
    LIBRARY.impl(_name, cuda.implementation(_name, _function), "CUDA")
LIBRARY.impl("gradients", autograd.gradients_operator, "CompositeImplicitAutograd")

cpu.load()
