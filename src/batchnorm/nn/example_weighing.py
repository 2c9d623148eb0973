"""Inference example weighing: an example's own statistics, mixed into those of the population."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from batchnorm import functional
from batchnorm.kernels.aten import compute_dtype
from batchnorm.ops import autograd
from batchnorm.views import is_traced


def mix(mean: Tensor, var: Tensor, example_mean: Tensor, example_var: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Mean and variance of a mixture that draws from the example with probability ``weight`` (alpha).

    mean_i = (1-a) E + a E_i and var_i = (1-a) Var + a Var_i + a (1-a) (E - E_i)^2, which is the paper's second moment
    minus mean_i^2 without its cancellation, so never negative. ``example_var`` is biased.
    """
    delta = example_mean - mean
    return mean + weight * delta, var + weight * (example_var - var) + weight * (1 - weight) * delta.square()


def by_example(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
    slope: float,
    example_weight: float,
) -> Tensor:
    """Normalizes every example by its mixture with the population (Summers & Dinneen 2020)."""
    derived = (torch.is_grad_enabled() and x.requires_grad) or forward_ad._current_level >= 0
    if derived or is_traced(x):
        y = _differentiable(x, mean, var, weight, bias, eps, example_weight)
        return functional.finish(y, residual, activation, slope)
    example_mean, m2 = torch.ops.batchnorm.moments.default(x.detach(), 1)
    example_var = m2 / max(x.shape[2:].numel(), 1)
    mean, var = mix(mean.to(m2.dtype), var.to(m2.dtype), example_mean, example_var, example_weight)
    return autograd.by_population(x, weight, bias, residual, mean, var, 1, eps, activation or "identity", slope)


def _differentiable(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    example_weight: float,
) -> Tensor:
    """The same of ATen's operators: here the statistics depend on x, and its gradient counts that."""
    dtype, space = compute_dtype(x.dtype), tuple(range(2, x.ndim))

    def along(vector: Tensor) -> Tensor:
        return vector.to(dtype).reshape(1, -1, *(1 for _ in space))

    wide = x.to(dtype)
    if space:
        example_var, example_mean = torch.var_mean(wide, space, correction=0, keepdim=True)
    else:
        example_var, example_mean = torch.zeros_like(wide), wide
    mixed_mean, mixed_var = mix(along(mean), along(var), example_mean, example_var, example_weight)
    y = (wide - mixed_mean) * torch.rsqrt(mixed_var + eps)
    if weight is not None:
        y = y * along(weight)
    if bias is not None:
        y = y + along(bias)
    return y.to(x.dtype)
