"""The second question: which statistics normalize a batch.

A source has one method, `normalize`. It gives the output and the statistics of the batch, or None where it has not
measured them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from batchnorm.batch import Batch, Measured
from batchnorm.errors import InputError
from batchnorm.kernels.aten import compute_dtype
from batchnorm.ops import normalization as ops
from batchnorm.ops.context import can_read, is_recomputing
from batchnorm.ops.fusion import Fusion
from batchnorm.pools import Pool
from batchnorm.running import Population


class Source(Protocol):
    """What every source of statistics can do."""

    def normalize(self, batch: Batch, pool: Pool, fusion: Fusion) -> tuple[Tensor, Measured | None]:
        """y of the shape of ``batch.x``, and the statistics of the batch where they have been measured."""


class OfBatch:
    """The batch's own statistics, through which the gradient runs."""

    def normalize(self, batch: Batch, pool: Pool, fusion: Fusion) -> tuple[Tensor, Measured]:
        """y, and the statistics of every pool."""
        y, mean, var, counts = ops.by_batch(batch.x, pool, fusion, batch.mask, batch.weights)
        return y, Measured(batch, pool, mean, var, counts)


class Given(NamedTuple):
    """Statistics that are constants: those of the population, (C,), or of each time step, (steps, C)."""

    mean: Tensor
    var: Tensor

    def normalize(self, batch: Batch, pool: Pool, fusion: Fusion) -> tuple[Tensor, None]:
        """y; nothing is measured."""
        size = pool.size if batch.steps else 0
        return ops.by_statistics(batch.x, self.mean, self.var, fusion, size, batch.mask), None


def of_one_step(fusion: Fusion) -> Fusion:
    """The fusion with gamma and beta (C,) of the first time step, where there are rows of them; for checks."""
    weight, bias = (t[0] if t is not None and t.ndim == 2 else t for t in (fusion.weight, fusion.bias))
    return fusion._replace(weight=weight, bias=bias)


def by_step(
    source: Source, batch: Batch, pool: Pool, fusion: Fusion, last: Tensor | None = None
) -> tuple[Tensor, Measured | None]:
    """`Source.normalize` with gamma and beta (rows, C) of each time step.

    Args:
        source, batch, pool, fusion: as of `Source.normalize`; steps beyond the rows have the last one.
        last: the last row that may be used; None for all.
    """
    x, dtype = batch.x, batch.x.dtype
    wide = torch.promote_types(dtype, torch.float32)  # one rounding, behind gamma and beta
    alone = Fusion(None, None, None, fusion.eps)
    if isinstance(source, Given):
        source = Given(*(t.to(torch.promote_types(t.dtype, wide)) for t in source))
    y, measured = source.normalize(batch._replace(x=x.to(wide), residual=None), pool, alone)
    y = y.unflatten(0, (batch.steps, -1))
    for parameter, apply in ((fusion.weight, torch.mul), (fusion.bias, torch.add)):
        if parameter is None:
            continue
        row = torch.arange(batch.first, batch.first + batch.steps, device=x.device).clamp(0, len(parameter) - 1)
        row = row if last is None else row.minimum(last)
        y = apply(y, parameter.to(wide)[row][:, None])
    y = y.flatten(0, 1)
    if fusion.residual is not None:
        y = y + fusion.residual
    y = ops.finish(y, fusion.with_residual(None))
    if batch.mask is not None:
        y = torch.where(batch.mask[:, None], y, 0.0)
    return y.to(dtype), measured


@torch.no_grad()
def measure(batch: Batch, pool: Pool) -> Measured:
    """The statistics of every pool of a batch, outside the graph."""
    return Measured(batch, pool, *ops.measure(batch.x, pool, batch.mask, batch.weights))


@dataclass(frozen=True)
class Renorm:
    """Limits of batch renormalization, and how they open.

    ``y = gamma * ((x - mean)/s * r + d) + beta`` with ``r = clip(s/s_run, 1/r_max, r_max)``,
    ``d = clip((mean - running_mean)/s_run, -d_max, d_max)``, both without gradient; ``s = sqrt(var + eps)`` with the
    *biased* variance of the batch, ``s_run = sqrt(running_var + eps)`` with the variance that the layer keeps for
    inference. So without clipping the output in training is that of inference.

    Args:
        r_max: final limit of r, at least 1 (1: never rescale).
        d_max: final limit of d, at least 0 (0: never shift); `math.inf` for no limit, as for r_max.
        warmup: steps until the limits are final. The layer is plain batch normalization for the first eighth of
            them; then d's limit rises linearly until five eighths, r's until the end. The default is the schedule
            of the paper: plain until 5,000, d_max at 25,000, r_max at 40,000. 0: the limits hold at once.

    Raises:
        InputError: r_max < 1, d_max < 0 or warmup < 0.

    Source: Ioffe 2017, Batch Renormalization, Algorithm 1 and section 3.

    Examples:
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
        known = can_read(step)  # which costs nothing on a CPU
        r_max, d_max = self.limits(int(step) if known else step)
        if not known:
            r_max, d_max = r_max.to(mean.dtype), d_max.to(mean.dtype)
        scale = torch.rsqrt(running_var.to(mean.dtype) + eps)
        # torch.sqrt does not always round float64 correctly, rsqrt does: so C++ has the same bits.
        r = (scale / torch.rsqrt(var + eps)).clamp(1 / r_max, r_max)
        d = ((mean - running_mean.to(mean.dtype)) * scale).clamp(-d_max, d_max)
        return r, d


class Renormalized(NamedTuple):
    """The batch's statistics, and a constant affine map that takes its output to that of the population.

    Args:
        renorm: the limits.
        population: whose statistics the map leads to.
        r, d: buffers (C,) that hold the corrections of the last batch. A recomputation reads them, since the population
            has moved on.
    """

    renorm: Renorm
    population: Population
    r: Tensor
    d: Tensor

    def normalize(self, batch: Batch, pool: Pool, fusion: Fusion) -> tuple[Tensor, Measured]:
        """y, and the statistics of the one pool of every channel."""
        if pool.size or batch.steps:
            raise InputError("renorm corrects one pool a channel; it does not go with ghost_size or pool='frame'")
        measured = measure(batch, pool)
        with torch.no_grad():
            r, d = self._corrections(measured, fusion.eps)
        fusion = fusion.renormalized(r, d, batch.x.dtype)
        if ops.can_use_measured(batch.x, pool, batch.mask, batch.weights):  # measured once is enough
            return ops.by_measured(batch.x, measured.mean, measured.var, fusion), measured
        return OfBatch().normalize(batch, pool, fusion)

    def _corrections(self, measured: Measured, eps: float) -> tuple[Tensor, Tensor]:
        """r and d of this batch; a recomputation takes those of the forward that it repeats."""
        mean, var = measured.mean[0], measured.var[0]
        if not is_recomputing():
            batches = self.population.batches_of_domain
            assert batches is not None
            r, d = self.renorm.corrections(mean, var, *self.population.read(), eps, batches)
            self.r.copy_(r)
            self.d.copy_(d)
        return self.r.to(mean.dtype, copy=True), self.d.to(mean.dtype, copy=True)


class Weighed(NamedTuple):
    """The population's statistics, mixed with those of each example (Summers & Dinneen 2020).

    Args:
        mean, var: of the population, (C,).
        share: alpha in [0, 1], how much the example's own count.
    """

    mean: Tensor
    var: Tensor
    share: float

    def normalize(self, batch: Batch, pool: Pool, fusion: Fusion) -> tuple[Tensor, None]:
        """y; the pools of the batch are not measured."""
        x = batch.x
        if not x.numel():
            return Given(self.mean, self.var).normalize(batch, pool, fusion)
        if batch.mask is not None:
            raise InputError("example_weight does not go with a mask, lengths or packed sequences yet")
        if ops.needs_every_derivative(x):
            return ops.finish(self._differentiable(x, fusion), fusion), None
        example_mean, m2 = torch.ops.batchnorm.moments.default(x.detach(), 1)
        example_var = m2 / max(x.shape[2:].numel(), 1)
        mean, var = mix(self.mean.to(m2.dtype), self.var.to(m2.dtype), example_mean, example_var, self.share)
        return ops.by_statistics(x, mean, var, fusion, 1), None

    def _differentiable(self, x: Tensor, fusion: Fusion) -> Tensor:
        """The same of ATen's operators: here the statistics depend on x, and its gradient counts that."""
        dtype, space = compute_dtype(x.dtype), tuple(range(2, x.ndim))

        def along(vector: Tensor) -> Tensor:
            return vector.to(dtype).reshape(1, -1, *(1 for _ in space))

        wide = x.to(dtype)
        if space:
            # In operators that every tool of deployment has: some lack var_mean, or var's correction.
            example_mean = torch.mean(wide, space, keepdim=True)
            example_var = torch.mean((wide - example_mean).square(), space, keepdim=True)
        else:
            example_var, example_mean = torch.zeros_like(wide), wide
        mean, var = mix(along(self.mean), along(self.var), example_mean, example_var, self.share)
        y = (wide - mean) * torch.rsqrt(var + fusion.eps)
        if fusion.weight is not None:
            y = y * along(fusion.weight)
        if fusion.bias is not None:
            y = y + along(fusion.bias)
        return y.to(x.dtype)


def mix(mean: Tensor, var: Tensor, example_mean: Tensor, example_var: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Mean and variance of a mixture that draws from the example with probability ``weight`` (alpha).

    mean_i = (1-a) E + a E_i and var_i = (1-a) Var + a Var_i + a (1-a) (E - E_i)^2, which is the paper's second moment
    minus mean_i^2 without its cancellation, so never negative. ``example_var`` is biased.
    """
    delta = example_mean - mean
    return mean + weight * delta, var + weight * (example_var - var) + weight * (1 - weight) * delta.square()
