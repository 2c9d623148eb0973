"""Formulas that compilers generate code of: small inputs of compiled networks on the CPU.

A call of an operator out of compiled code costs several microseconds, as much as a small input takes, and its loops
are not joined with those around it. As in the kernels, float32 elements are normalized in float64 and 16-bit ones in
float32, and sums are float64. No tensor is changed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.kernels.aten import activate, derivative

LIMIT, LIMIT_OF_16_BITS = 65536, 8192
"""Elements of x up to which generated code is faster than the operators, by measurement: it converts one 16-bit
element at a time."""


def takes(x: Tensor, pool_size: int = 0, mask: Tensor | None = None) -> bool:
    """Whether these formulas are for x, which a compiler traces; the batch must be one pool."""
    if x.device.type != "cpu" or mask is not None or 0 < pool_size < x.shape[0]:
        return False
    if x.dtype == torch.float32:
        return 0 < x.numel() <= LIMIT
    return x.dtype in (torch.bfloat16, torch.float16) and 0 < x.numel() <= LIMIT_OF_16_BITS


def gates_by_output(x: Tensor, activation: str) -> bool:
    """Whether the output says where the derivative is 1 and where 0, without the float16 that round to a kink."""
    return activation in ("relu", "relu6") and x.dtype != torch.float16


def _axes(x: Tensor) -> list[int]:
    return [axis for axis in range(x.ndim) if axis != 1]


def _row(vector: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """(C,) or (1, C) as x broadcasts it.

    Inductor puts the formula of a vector into the loop over all elements, roots and divisions, too, unless the vector
    must lie in memory, as for `as_strided`.
    """
    vector = vector.reshape(-1).to(dtype)
    laid_out = vector.as_strided(vector.shape, (1,)) if vector.is_contiguous() else vector
    return laid_out.reshape(-1, *(1,) * (x.ndim - 2))


def _wide(t: Tensor) -> Tensor:
    """What elements are normalized in."""
    return t.double() if t.dtype == torch.float32 else t.float()


def normalize(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str,
    slope: float,
    own: bool = False,
) -> Tensor:
    """activation((x - mean) / sqrt(var + eps) * gamma + beta + residual), by its own statistics or by others."""
    return activate(_pre_activation(x, mean, var, weight, bias, residual, eps, own), activation, slope).to(x.dtype)


def _pre_activation(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    own: bool,
) -> Tensor:
    """In float32; as in the kernels, the product of mean and scale is in the shift, and a constant channel has none."""
    values = _wide(x)
    scale = torch.rsqrt(var.double().reshape(-1) + eps)
    if weight is not None:
        scale = scale * weight.double()
    if own:
        scale = torch.where(var.reshape(-1) == 0, 0.0, scale)
    if x.dtype == torch.float16:
        z = (values - _row(mean, x, values.dtype)) * _row(scale, x, values.dtype)
        shift = bias
    else:
        z = values * _row(scale, x, values.dtype)
        shift = -mean.double().reshape(-1) * scale
        shift = shift if bias is None else shift + bias.double()
    if shift is not None:
        z = z + _row(shift, x, values.dtype)
    return (z if residual is None else z + residual).float()


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`normalize` by the statistics of x, and these: mean and biased variance, (1, C) in float64."""
    wide = x.float().double()
    mean = wide.mean(_axes(x))
    var = (wide - mean.reshape(-1, *(1,) * (x.ndim - 2))).square().mean(_axes(x))
    return normalize(x, mean, var, weight, bias, residual, eps, activation, slope, True), mean[None], var[None]


def gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    var: Tensor,
    y: Tensor | None,
    eps: float,
    activation: str,
    slope: float,
    population: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, d_residual, d_gamma and d_beta by the compact formula; statistics are constants in ``population``.

    The output y is needed where `gates_by_output`.
    """
    dz = dy.float()
    if y is not None:
        dz = torch.where((y > 0) & (y < 6) if activation == "relu6" else y > 0, dz, 0.0)
    elif activation != "identity":
        dz = dz * derivative(
            _pre_activation(x, mean, var, weight, bias, residual, eps, not population), activation, slope
        )
    inverse = torch.rsqrt(var.double().reshape(-1) + eps)
    scale = inverse if weight is None else inverse * weight.double()
    centered = x.float().double() - _row(mean, x, torch.float64)
    sums, products = dz.double().sum(_axes(x)), (dz.double() * centered).sum(_axes(x))
    dtype = torch.float64 if x.dtype == torch.float32 else torch.float32
    inner = dz.to(dtype)
    if not population:
        count = x.numel() // x.shape[1]
        inner = (
            inner - _row(sums / count, x, dtype) - centered.to(dtype) * _row(products * inverse**2 / count, x, dtype)
        )
    return (_row(scale, x, dtype) * inner).to(x.dtype), dz.to(x.dtype), products * inverse, sums
