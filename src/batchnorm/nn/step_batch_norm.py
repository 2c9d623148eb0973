"""Batch normalization with statistics for each time step of sequences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from batchnorm.errors import InputError
from batchnorm.moments import Moments
from batchnorm.nn.batch_norm import OPTIONS, _BatchNorm
from batchnorm.ops import recurrent as ops

# The only options of a layer that have a meaning here.
_KNOWN = ("source", "update", "trains_affine", "running", "running_var_kind")


class StepBatchNorm(_BatchNorm):
    """Batch normalization of sequences with one pool, and one set of running statistics, for each time step.

    ``y = (x - mean_t) / sqrt(var_t + eps) * weight + bias`` with the mean and *biased* variance of step t over the
    sequences that are not over; gamma and beta are shared by all steps. In inference step t uses its running
    statistics (variance *unbiased*), and steps that training has never reached, or beyond ``max_steps``, those of the
    last one that it has. A step with one sequence left gives beta, and leaves the running statistics alone.

    Args:
        num_features: C.
        max_steps: steps with running statistics of their own.
        eps, momentum, affine, bias, source, update: as of `BatchNorm1d`.
        running: as of `BatchNorm1d`, "debiased" by default: late steps are seen seldom, and would else stay near
            the mean 0 and variance 1 that they begin with.

    Buffers:
        running_mean, running_var: (max_steps, C); num_steps_tracked: (max_steps, 1), batches that reached each step.

    Shape:
        input (frames, C): the rows of step 0, then those of step 1, ...; ``sizes[t]`` rows of step t, which never
        rise (``PackedSequence.data`` and ``batch_sizes``; None: all are one step's). ``step`` is the number of the
        first step.

    Raises:
        InputError: sizes that do not fit, one sequence in training, an option without a meaning here.

    Source: Cooijmans et al. 2016, Recurrent batch normalization, section 3.

    Example:
        >>> layer = StepBatchNorm(2, max_steps=10)
        >>> layer(torch.randn(5, 2), sizes=[3, 2]).shape
        torch.Size([5, 2])
    """

    num_steps_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        max_steps: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        running: str = "debiased",
        **options: Any,
    ) -> None:
        self.max_steps = max_steps
        if momentum is None:
            running = "cumulative"
        super().__init__(num_features, eps, momentum, affine, True, device, dtype, running=running, **options)
        assert self.running_mean is not None
        assert self.running_var is not None
        shape = (max_steps, num_features)
        self.running_mean = self.running_mean.expand(shape).clone()
        self.running_var = self.running_var.expand(shape).clone()
        self.register_buffer("num_steps_tracked", torch.zeros(max_steps, 1, dtype=torch.long, device=device))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "max_steps":  # set once, by the constructor
            self.__dict__.setdefault(name, value)
            return
        if name in OPTIONS and name not in _KNOWN and value != OPTIONS[name]:
            raise InputError(f"StepBatchNorm: {name} has no meaning for statistics by time step; got {value!r}")
        if name == "_accumulator" and value is not None:
            raise InputError("accumulate: statistics by time step (StepBatchNorm) are not merged over micro-batches")
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        return super().extra_repr().replace(", running='debiased'", "")

    def reset_running_stats(self) -> None:
        super().reset_running_stats()
        if "num_steps_tracked" in self._buffers:
            self.num_steps_tracked.zero_()

    def forward(  # type: ignore[override]
        self, input: Tensor, sizes: Sequence[int] | None = None, step: int = 0
    ) -> Tensor:
        """BN(input), step by step; see the class."""
        sizes = [len(input)] if sizes is None else sizes
        if input.ndim != 2 or input.shape[1] != self.num_features or sum(sizes) != len(input):
            raise InputError(
                f"StepBatchNorm: expected an input (frames, {self.num_features}) with {sum(sizes)} frames, the sum of "
                f"sizes; got {tuple(input.shape)}"
            )
        y, mean, var = ops.normalize_steps(input, sizes, self.normalization(sizes, step))
        if self.updates_statistics:
            if not self.normalizes_by_batch:
                mean, var = ops.statistics(input.detach(), sizes)
            self.take_in(mean, var, sizes, step)
        return y

    @staticmethod
    def can_be_fused(norms: Iterable[StepBatchNorm]) -> bool:
        """Whether a recurrence may normalize in place of these layers: where their calls have no other effect."""
        norms = list(norms)
        return len({norm.normalizes_by_batch for norm in norms}) < 2 and not any(
            norm._forward_hooks or norm._forward_pre_hooks or (norm.updates_statistics and not norm.normalizes_by_batch)
            for norm in norms
        )

    def normalization(self, sizes: Sequence[int], step: int) -> ops.StepNormalization:
        """What normalizes these steps, for a kernel."""
        weight, bias = self._affine()
        if not self.normalizes_by_batch:
            return ops.StepNormalization(weight, bias, self.eps, *self.statistics_at(step, len(sizes)))
        if self.training and sizes[0] < 2:
            raise InputError(
                "Expected more than 1 sequence when training with a pool for each time step, got 1: the variance of "
                "one value is 0; use a larger batch, batch_norm='sequence', or .eval()"
            )
        return ops.StepNormalization(weight, bias, self.eps)

    def statistics_at(self, step: int, count: int) -> tuple[Tensor, Tensor]:
        """Running mean and variance, (count, C) in float64, of the steps from ``step`` on."""
        assert self.running_mean is not None
        assert self.running_var is not None
        wide = torch.float32 if self.running_mean.device.type == "mps" else torch.float64
        reached = (self.num_steps_tracked > 0).sum()
        row = torch.arange(step, step + count, device=reached.device).minimum(reached - 1).clamp(min=0)
        return self.running_mean[row].to(wide), self.running_var[row].to(wide)

    @torch.no_grad()
    def input_moments(  # type: ignore[override]
        self, input: Tensor, sizes: Sequence[int] | None = None, step: int = 0
    ) -> Moments:
        """The moments of each step of an input, (max_steps, C), with no values in the steps that it does not reach."""
        sizes = [len(input)] if sizes is None else sizes
        mean, var = ops.statistics(input.detach(), sizes)
        count = min(len(sizes), max(self.max_steps - step, 0))
        whole = Moments.empty((self.max_steps, self.num_features), device=mean.device)
        counts, rows = whole.count[:, :1].clone(), slice(step, step + count)
        counts[rows] = torch.tensor(sizes[:count], dtype=mean.dtype, device=mean.device)[:, None]
        whole.mean[rows] = mean[:count].double()
        whole.m2[rows] = var[:count].double() * counts[rows]
        return Moments(counts, whole.mean, whole.m2)

    @torch.no_grad()
    def take_in(self, mean: Tensor, var: Tensor, sizes: Sequence[int], step: int) -> None:
        """Mixes the statistics (steps, C) of a batch, *biased* variance, into those of the steps from ``step`` on."""
        count = min(len(sizes), self.max_steps - step)
        if self.num_batches_tracked is not None and step == 0:
            self.num_batches_tracked.add_(1)
        if count <= 0:
            return
        rows = slice(step, step + count)
        counts = torch.tensor(sizes[:count], dtype=mean.dtype, device=mean.device)[:, None]
        mean, var, taken = mean[:count], var[:count], counts > 1
        if self.running_var_kind == "unbiased":
            var = var * counts / (counts - 1).clamp(min=1)
        tracked = self.num_steps_tracked[rows]
        tracked.add_(taken)
        share = self._share(tracked.clamp(min=1).to(mean.dtype))
        for running, batch in ((self.running_mean, mean), (self.running_var, var)):
            assert running is not None
            before = running[rows]
            before.copy_(torch.where(taken, (1 - share) * before + share * batch, before))

    def _share(self, t: Tensor) -> Tensor | float:
        """The share of a batch in the running statistics of a step that it is the t-th to reach."""
        if self.momentum is None or self.running == "cumulative":
            return 1 / t
        if self.running == "debiased" and self.momentum > 0:
            return (self.momentum / (1 - (1 - self.momentum) ** t)).clamp(max=1)  # at t = 1, but for rounding
        return self.momentum
