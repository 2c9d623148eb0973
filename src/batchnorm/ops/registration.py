"""Registers the implementations: ATen for every device, Triton for CUDA, then the native library for the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from batchnorm.errors import InputError
from batchnorm.kernels import aten, cpu
from batchnorm.moments import merge_axis
from batchnorm.ops import autograd, cuda, recomputation
from batchnorm.ops.schemas import ACTIVATIONS, ARGUMENTS, LIBRARY, by_name, empty_like, signs_size
from batchnorm.pools import Pool, Pools, merge_moments


def _nothing(x: Tensor) -> Tensor:
    return x.new_empty(0)


def _no_signs(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=torch.uint8)


def _in_names(a: Any) -> dict[str, Any]:
    """The arguments as the keywords of `aten`: the activation by its name, and the size of a pool as the pool."""
    settings = {**a._asdict(), "activation": ACTIVATIONS[a.activation]}
    settings["pool"] = settings.pop("pool_size")
    return settings


def _normalize(a: Any) -> tuple[Tensor, Tensor]:
    settings = _in_names(a)
    save_signs = settings.pop("save_signs")
    del settings["own"]  # it is all one here
    y = aten.normalize(**settings)
    return _like(y, a.x), _pack(a, a.mean, a.var) if save_signs else _no_signs(a.x)


def _forward(a: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    settings = _in_names(a)
    save_signs = settings.pop("save_signs")
    y, mean, var = aten.forward(**settings)
    return _like(y, a.x), mean, var, _pack(a, mean, var) if save_signs else _no_signs(a.x)


def _like(y: Tensor, x: Tensor) -> Tensor:
    """y with the strides that the fake kernels promise."""
    out = empty_like(x)
    return y if out.stride() == y.stride() else out.copy_(y)


def _pack(a: Any, mean: Tensor, var: Tensor) -> Tensor:
    """One bit an element, in the order of the tensor's elements."""
    affine = (a.weight, a.bias, a.residual)
    z = aten.normalize(a.x, mean, var, *affine, a.pool_size, a.eps, "identity", a.slope)
    on = aten.derivative(z, ACTIVATIONS[a.activation], 0.0).ne(0).flatten()
    weights = 2 ** torch.arange(8, device=z.device, dtype=torch.uint8)
    bits = torch.nn.functional.pad(on.to(torch.uint8), (0, -on.numel() % 8)).reshape(-1, 8)
    packed = (bits * weights).sum(1, dtype=torch.uint8)
    return torch.nn.functional.pad(packed, (0, signs_size(a.x) - packed.numel()))


def _gated(a: Any, *settled: str) -> dict[str, Any]:
    """The arguments of a backward as keywords, without those settled here, after the signs have been applied to dy.

    Where there are signs, no activation is left.
    """
    settings = _in_names(a)
    signs = settings.pop("signs")
    for name in settled:
        settings.pop(name)
    if signs is None or not signs.numel():
        return settings
    shifts = torch.arange(8, device=a.x.device, dtype=torch.uint8)
    on = (signs[:, None] >> shifts & 1).flatten()[: a.x.numel()].reshape(a.x.shape).bool()
    off = a.slope if settings["activation"] == "leaky_relu" else 0.0
    return {**settings, "dy": torch.where(on, a.dy, a.dy * off), "activation": "identity"}


def _backward_reduce(a: Any) -> tuple[Tensor, Tensor]:
    return aten.backward_reduce(**_gated(a))


def _backward_apply(a: Any) -> tuple[Tensor, Tensor]:
    settings = _gated(a, "want_residual")
    dx, dz = aten.backward_apply(**settings)
    if not a.want_residual:
        return _like(dx, a.x), _nothing(a.x)
    dz = _like(dz, a.x)
    return _like(dx, a.x), dz.clone() if dz is settings["dy"] else dz


def _count_moments(a: Any) -> Tensor:
    moments = torch.ops.batchnorm.moments.default(a.x, a.pool_size, a.mask)
    return torch.stack((Pools(a.x, a.pool_size, a.mask).counts(), *moments))


def _normalize_merged(a: Any) -> tuple[Tensor, ...]:
    counts, means, m2s = a.parts.unbind(1)
    counts, means, m2s = merge_moments(counts, means, m2s, Pool(groups=a.groups))
    one = len(a.parts) == 1  # rank
    count, mean, m2 = (counts[0], means[0], m2s[0]) if one else merge_axis(counts, means, m2s, 0)
    var = m2 / torch.where(count > 0, count, 1.0)
    same = {name: value for name, value in a._asdict().items() if name in ARGUMENTS["normalize"]._fields}
    y, signs = torch.ops.batchnorm.normalize.default(mean=mean, var=var, **same)
    if not a.groups and one:  # then they are rows of the parts, which a result may not be
        count, mean = count.clone(), mean.clone()
    return y, count, mean, var, signs


def _reduce_merged(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    sums = torch.ops.batchnorm.backward_reduce.default(*a)
    d_weight, d_bias = (sums[1] * torch.rsqrt(a.var + a.eps)).sum(0), sums[0].sum(0)
    gamma = 1.0 if a.weight is None else a.weight.to(a.var.dtype)
    return (
        gamma * torch.stack(sums),
        _nothing(a.x) if a.weight is None else d_weight.to(a.weight.dtype),
        _nothing(a.x) if a.bias is None else d_bias.to(a.bias.dtype),
    )


def _backward_merged(a: Any) -> tuple[Tensor, Tensor]:
    inv_std = torch.rsqrt(a.var + a.eps)
    k1 = inv_std if a.weight is None else a.weight.to(a.var.dtype) * inv_std
    count = torch.where(a.count > 0, a.count, 1.0)
    coefficients = {
        "k1": k1.expand_as(a.mean),
        "k2": -(inv_std**3) * a.sums[1] / count,
        "k3": -inv_std * a.sums[0] / count,
    }
    same = {name: value for name, value in a._asdict().items() if name in ARGUMENTS["backward_apply"]._fields}
    results: tuple[Tensor, Tensor] = torch.ops.batchnorm.backward_apply.default(**coefficients, **same)
    return results


def _backward(a: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    settings = _gated(a, "want_x", "want_residual")
    dx, dz, d_weight, d_bias = aten.gradients(**settings)
    if dz is settings["dy"]:
        dz = dz.clone()
    return (
        _like(dx, a.x) if a.want_x else _nothing(a.x),
        _like(dz, a.x) if a.want_residual else _nothing(a.x),
        _nothing(a.x) if a.weight is None else d_weight.to(a.weight.dtype),
        _nothing(a.x) if a.bias is None else d_bias.to(a.bias.dtype),
    )


_operators: dict[str, Callable[[Any], Any]] = {
    "moments": lambda a: aten.moments(a.x, a.pool_size, a.mask),
    "normalize": _normalize,
    "forward": _forward,
    "backward_reduce": _backward_reduce,
    "backward_apply": _backward_apply,
    "backward": _backward,
    "count_moments": _count_moments,
    "normalize_merged": _normalize_merged,
    "reduce_merged": _reduce_merged,
    "backward_merged": _backward_merged,
    "update_statistics": lambda a: aten.update_statistics(**a._asdict()),
    "mix_statistics": lambda a: aten.mix_statistics(**a._asdict()),
}
for _name, _function in _operators.items():
    LIBRARY.impl(_name, by_name(_name, _function), "CompositeExplicitAutograd")
    # Gradients are the autograd functions' affair: nothing to do here, and no time to lose.
    LIBRARY.impl(_name, torch.library.fallthrough_kernel, "Autograd")
    LIBRARY.impl(_name, by_name(_name, cuda.implementation(_name, _function)), "CUDA")
LIBRARY.impl("gradients", by_name("gradients", autograd.gradients_operator), "CompositeImplicitAutograd")
LIBRARY.impl("normalize_again", by_name("normalize_again", autograd.normalized_again), "CompositeImplicitAutograd")


def _batching(name: str) -> None:
    """vmap of an operator that changes running statistics in place: the operator for each, on views of the buffers."""
    operator, fields = getattr(torch.ops.batchnorm, name).default, ARGUMENTS[name]._fields
    changed = [i for i, each in enumerate(operator._schema.arguments) if each.alias_info is not None]

    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[None, None]:
        for i in changed:
            if i < len(args) and args[i] is not None and in_dims[i] is None:
                raise InputError(
                    f"vmap: batchnorm::{name} would write the statistics of {info.batch_size} batches into one "
                    f"{fields[i]}; map the buffers, too (torch.func.stack_module_state), or set update='never'"
                )
        for k in range(info.batch_size):
            each = zip(args, in_dims, strict=True)
            operator(*(value if dim is None else value.select(dim, k) for value, dim in each))
        return None, None

    torch.library.register_vmap(f"batchnorm::{name}", rule, lib=LIBRARY)


def _stacking(name: str) -> None:
    """vmap of an operator that changes nothing: the operator for each, their results stacked.

    Compiled graphs need it, which call the operators themselves; in eager mode autograd functions have rules of their
    own, which fold the mapped axis into the channels.
    """
    operator = getattr(torch.ops.batchnorm, name).default
    several = len(operator._schema.returns) > 1

    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        rows = []
        for k in range(info.batch_size):
            each = zip(args, in_dims, strict=True)
            rows.append(operator(*(value if dim is None else value.select(dim, k) for value, dim in each)))
        if not several:
            return torch.stack(rows), 0
        results = tuple(torch.stack(column) for column in zip(*rows, strict=True))
        return results, (0,) * len(results)

    torch.library.register_vmap(f"batchnorm::{name}", rule, lib=LIBRARY)


for _name in ("update_statistics", "mix_statistics"):
    _batching(_name)
for _name in _operators.keys() - {"update_statistics", "mix_statistics"}:
    _stacking(_name)

cpu.load()
LIBRARY.impl("refuse", by_name("refuse", recomputation.refuse), "CompositeImplicitAutograd")
