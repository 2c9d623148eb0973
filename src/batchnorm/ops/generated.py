"""Formulas that compilers generate code of: small inputs of compiled networks on the CPU.

A call of an operator out of compiled code costs several microseconds, as much as a small input takes, and its loops
are not joined with those around it. As in the kernels, elements are normalized in a type that has digits to spare, and
sums are float64. `aten` has the formulas for every other purpose, in the type of the elements. No tensor is changed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from batchnorm.kernels.aten import activate, derivative
from batchnorm.ops.fusion import Fusion

LIMIT, LIMIT_OF_16_BITS = 65536, 8192
"""Elements of x up to which generated code is faster than the operators, by measurement: it converts one 16-bit
element at a time."""


def takes(x: Tensor, pool_size: int = 0, mask: Tensor | None = None) -> bool:
    """Whether these formulas are for x, which a compiler traces.

    The batch must be one pool. The elements must lie in the order in which an output does, since formulas keep that
    of x.
    """
    if x.device.type != "cpu" or mask is not None or 0 < pool_size < x.shape[0]:
        return False
    if not x.is_contiguous(memory_format=suggest_memory_format(x)):
        return False
    if x.dtype == torch.float32:
        return 0 < x.numel() <= LIMIT
    return x.dtype in (torch.bfloat16, torch.float16) and 0 < x.numel() <= LIMIT_OF_16_BITS


def gates_by_output(x: Tensor, activation: str) -> bool:
    """Whether the output says where the derivative is 1. Outputs of float16 do not: small ones are rounded to 0."""
    return activation in ("relu", "relu6") and x.dtype != torch.float16


def _axes(x: Tensor) -> list[int]:
    return [axis for axis in range(x.ndim) if axis != 1]


def _row(vector: Tensor, x: Tensor) -> Tensor:
    """(C,) or (1, C) as x broadcasts it, in the type in which elements are normalized.

    Inductor puts the formula of a vector into the loop over all elements, roots and divisions, too, unless the vector
    must lie in memory, as for `as_strided`.
    """
    vector = vector.reshape(-1).to(_dtype(x))
    laid_out = vector.as_strided(vector.shape, (1,)) if vector.is_contiguous() else vector
    return laid_out.reshape(-1, *(1,) * (x.ndim - 2))


def _dtype(x: Tensor) -> torch.dtype:
    """What elements are normalized in: at least three times their digits."""
    return torch.float32 if x.dtype == torch.bfloat16 else torch.float64


def _scale(var: Tensor, fusion: Fusion) -> Tensor:
    """gamma / sqrt(var + eps), (C,) in float64."""
    inverse = torch.rsqrt(var.double().reshape(-1) + fusion.eps)
    return inverse if fusion.weight is None else inverse * fusion.weight.double()


def normalize(x: Tensor, mean: Tensor, var: Tensor, fusion: Fusion, own: bool = False) -> Tensor:
    """activation((x - mean) / sqrt(var + eps) * gamma + beta + residual), by its own statistics or by others."""
    _, activation, slope = fusion.settings()
    return activate(_pre_activation(x, mean, var, fusion, own), activation, slope).to(x.dtype)


def _pre_activation(x: Tensor, mean: Tensor, var: Tensor, fusion: Fusion, own: bool) -> Tensor:
    """In float32; as in the kernels, the product of mean and scale is in the shift, and a constant channel has none."""
    scale = _scale(var, fusion)
    if own:
        scale = torch.where(var.reshape(-1) == 0, 0.0, scale)
    shift = -mean.double().reshape(-1) * scale
    if fusion.bias is not None:
        shift = shift + fusion.bias.double()
    z = x.float().to(_dtype(x)) * _row(scale, x) + _row(shift, x)
    return (z if fusion.residual is None else z + fusion.residual).float()


def forward(x: Tensor, fusion: Fusion) -> tuple[Tensor, Tensor, Tensor]:
    """`normalize` by the statistics of x, and these: mean and biased variance, (1, C) in float64."""
    wide = x.float().double()
    mean = wide.mean(_axes(x))
    var = (wide - mean.reshape(-1, *(1,) * (x.ndim - 2))).square().mean(_axes(x))
    return normalize(x, mean, var, fusion, own=True), mean[None], var[None]


def gradients(
    dy: Tensor, x: Tensor, mean: Tensor, var: Tensor, y: Tensor | None, fusion: Fusion, population: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, d_residual, d_gamma and d_beta by the compact formula; statistics are constants in ``population``.

    The output y is needed where `gates_by_output`.
    """
    eps, activation, slope = fusion.settings()
    dz = dy.float()
    if y is not None:
        dz = torch.where((y > 0) & (y < 6) if activation == "relu6" else y > 0, dz, 0.0)
    elif activation != "identity":
        dz = dz * derivative(_pre_activation(x, mean, var, fusion, not population), activation, slope)
    centered = x.float().double() - mean.double().reshape(-1, *(1,) * (x.ndim - 2))
    sums, products = dz.double().sum(_axes(x)), (dz.double() * centered).sum(_axes(x))
    inverse = torch.rsqrt(var.double().reshape(-1) + eps)
    inner = dz.to(_dtype(x))
    if not population:
        count = x.numel() // x.shape[1]
        slopes = products * inverse**2 / count
        inner = inner - _row(sums / count, x) - centered.to(_dtype(x)) * _row(slopes, x)
    return (_row(_scale(var, fusion), x) * inner).to(x.dtype), dz.to(x.dtype), products * inverse, sums
