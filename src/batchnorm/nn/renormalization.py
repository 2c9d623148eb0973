"""Batch renormalization: the batch normalizes, and a constant affine map takes it to the running statistics."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchnorm.errors import InputError
from batchnorm.ops import autograd
from batchnorm.views import is_traced


@dataclass(frozen=True)
class Renorm:
    """Limits of batch renormalization, and how they open.

    ``y = gamma * ((x - mean)/s * r + d) + beta`` with ``r = clip(s/s_run, 1/r_max, r_max)``,
    ``d = clip((mean - running_mean)/s_run, -d_max, d_max)``, both without gradient; ``s = sqrt(var + eps)`` with the
    *biased* variance of the batch, ``s_run = sqrt(running_var + eps)`` with what the layer keeps for inference. So
    without clipping the output in training is that of inference.

    Args:
        r_max: final limit of r, at least 1 (1: never rescale).
        d_max: final limit of d, at least 0 (0: never shift); `math.inf` for no limit, as for r_max.
        warmup: steps until the limits are final. The layer is plain batch normalization for the first eighth of
            them; then d's limit rises linearly until five eighths, r's until the end. The default is the schedule
            of the paper: plain until 5,000, d_max at 25,000, r_max at 40,000. 0: the limits hold at once.

    Raises:
        InputError: r_max < 1, d_max < 0 or warmup < 0.

    Source: Ioffe 2017, Batch Renormalization, Algorithm 1 and section 3.

    Example:
        >>> Renorm().limits(torch.tensor(15_000))
        (tensor(1.5714, dtype=torch.float64), tensor(2.5000, dtype=torch.float64))
    """

    r_max: float = 3.0
    d_max: float = 5.0
    warmup: int = 40_000

    def __post_init__(self) -> None:
        if not (self.r_max >= 1 and self.d_max >= 0 and 0 <= self.warmup < math.inf):
            raise InputError(f"{self}: expected r_max >= 1, d_max >= 0 and a finite warmup >= 0")

    def limits(self, step: Tensor | int) -> tuple[Any, Any]:
        """(r_max, d_max) after so many steps: numbers of a number, float64 tensors of an integer tensor."""
        r, d = (self._risen(step, end) for end in (self.warmup, self.warmup * 5 / 8))
        r_max, d_max = 1 + (self.r_max - 1) * r, self.d_max * d
        if isinstance(r, Tensor):  # where: infinity times 0
            return torch.where(r > 0, r_max, 1.0), torch.where(d > 0, d_max, 0.0)
        return r_max if r > 0 else 1.0, d_max if d > 0 else 0.0

    def _risen(self, step: Tensor | int, end: float) -> Any:
        """From 0 to 1 between an eighth of the warm-up and this step."""
        start, k = self.warmup / 8, step.to(torch.float64) if isinstance(step, Tensor) else step
        if not self.warmup:
            return torch.ones_like(k) if isinstance(k, Tensor) else 1.0
        share = (k - start) / (end - start)
        return share.clamp(0, 1) if isinstance(share, Tensor) else min(max(share, 0.0), 1.0)

    def corrections(
        self, mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor, eps: float, step: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(r, d), from the batch's mean and *biased* variance (C,)."""
        recorded = torch.compiler.is_compiling() or is_traced(step) or autograd.is_transformed()
        known = step.device.type == "cpu" and not recorded
        r_max, d_max = self.limits(int(step) if known else step)  # reading it back costs nothing on a CPU
        if not known:
            r_max, d_max = r_max.to(mean.dtype), d_max.to(mean.dtype)
        scale = torch.rsqrt(running_var.to(mean.dtype) + eps)
        r = ((var + eps).sqrt() * scale).clamp(1 / r_max, r_max)
        d = ((mean - running_mean.to(mean.dtype)) * scale).clamp(-d_max, d_max)
        return r, d


def effective(
    weight: Tensor | None, bias: Tensor | None, r: Tensor, d: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """gamma r and gamma d + beta: with these as weight and bias, batch normalization is renormalization.

    In float32 or wider: a bfloat16 gamma has too few digits to hold the product. Differentiable in weight and bias.
    """
    if dtype in (torch.bfloat16, torch.float16):
        dtype = torch.float32
    gamma = None if weight is None else weight.to(r.dtype)
    scale, shift = (r, d) if gamma is None else (gamma * r, gamma * d)
    if bias is not None:
        shift = shift + bias.to(shift.dtype)
    return scale.to(dtype), shift.to(dtype)


class MeasuredStatistics(autograd.PopulationStatistics):
    """`autograd.BatchStatistics` where mean and biased variance of x have been measured before."""

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> Any:
        return *autograd._gradients(ctx, dy, population=False), None, None, None, None, None, None


class TransformedMeasuredStatistics(autograd.TransformedPopulationStatistics):
    """The same in forward mode, which torch.compile does not trace."""

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> Any:
        return *autograd._gradients(ctx, dy, population=False), None, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return autograd._tangent(ctx, tangents[:4], population=False), None


def by_measured(x: Tensor, *arguments: Any) -> Tensor:
    """`MeasuredStatistics` on weight, bias, residual, mean, variance, and the settings: y."""
    transformed = not torch.compiler.is_compiling() and autograd.is_transformed()
    function = TransformedMeasuredStatistics if transformed else MeasuredStatistics
    y: Tensor = function.apply(x, *arguments)[0]
    return y
