"""Batch normalization of the frames of sequences, with statistics for each time step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from batchnorm.batch import Batch, batch_of_steps
from batchnorm.errors import InputError
from batchnorm.moments import Moments
from batchnorm.nn import options as table
from batchnorm.nn.batch_norm import BatchNorm1d
from batchnorm.nn.leaves import recorded_call
from batchnorm.ops import recurrent as ops
from batchnorm.pools import Pool, is_alone

_FIXED = {"pool": "frame", "batch_first": False}


class StepBatchNorm(BatchNorm1d):
    """Batch normalization of sequences with one pool, and one set of running statistics, for each time step.

    ``y = (x - mean_t) / sqrt(var_t + eps) * weight + bias`` with the mean and *biased* variance of step t over the
    sequences that are not over; gamma and beta are shared by all steps. In inference step t uses its running
    statistics (variance *unbiased*), and steps that training has never reached, or beyond ``max_steps``, those of the
    last one that it has. A step with one sequence left gives beta, and leaves the running statistics alone.

    It is `BatchNorm1d` with ``pool="frame"``, and its buffers, for frames that lie as in a `PackedSequence`.

    Args:
        num_features: C.
        max_steps: steps with running statistics of their own.
        eps, momentum, affine, bias, source, update, running_var, nonfinite, process_group, domains: as of
            `BatchNorm1d`.
        running: as of `BatchNorm1d`, "debiased" by default: late steps are seen seldom, and would else stay near
            the mean 0 and variance 1 that they begin with.

    Buffers:
        running_mean, running_var: (max_steps, C); num_batches_tracked: (max_steps,), batches that reached each step.

    Shape:
        input (frames, C): the rows of step 0, then those of step 1, ...; ``sizes[t]`` rows of step t, which never
        rise (``PackedSequence.data`` and ``batch_sizes``; None: all are one step's). ``step`` is the number of the
        first step.

    Raises:
        InputError: sizes that do not fit, one sequence in training, an option without a meaning here.

    Source: Cooijmans et al. 2016, Recurrent batch normalization, section 3.

    Examples:
        >>> layer = StepBatchNorm(2, max_steps=10)
        >>> layer(torch.randn(5, 2), sizes=[3, 2]).shape
        torch.Size([5, 2])
    """

    reads_sizes = True

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
        if momentum is None:
            running = "cumulative"
        options = {**options, **_FIXED, "max_steps": max_steps, "running": running}
        super().__init__(num_features, eps, momentum, affine, True, device, dtype, **options)

    def __setattr__(self, name: str, value: Any) -> None:
        option = table.BY_NAME.get(name)
        if option is not None and not option.by_step and value != _FIXED.get(name, option.default):
            raise InputError(f"StepBatchNorm: {name} has no meaning for statistics by time step; got {value!r}")
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        shown = super().extra_repr()
        for fixed in ("running='debiased'", "pool='frame'", "batch_first=False"):
            shown = shown.replace(f", {fixed}", "")
        return shown

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Takes states whose batches of each step were counted apart, as (max_steps, 1)."""
        counted = state_dict.pop(prefix + "num_steps_tracked", None)
        if counted is not None:
            state_dict[prefix + "num_batches_tracked"] = counted.flatten()
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(  # type: ignore[override]
        self, input: Tensor, sizes: Sequence[int] | None = None, step: int = 0
    ) -> Tensor:
        """BN(input), step by step; see the class."""
        if isinstance(input, fx.Proxy):
            recorded = recorded_call(self, (input,), {"sizes": sizes, "step": step or None})
            if recorded is not None:
                return recorded
        batch = self._batch_of_steps(input, sizes, step)
        self.check_sequences(batch.steps and len(batch.x) // batch.steps)
        if not len(input) and not self.synchronizes:
            return input.clone()
        y: Tensor = self._normalize(batch)
        return y

    def _batch_of_steps(self, input: Tensor, sizes: Sequence[int] | None, step: int) -> Batch:
        sizes = [len(input)] if sizes is None else sizes
        if input.ndim != 2 or input.shape[1] != self.num_features or sum(sizes) != len(input):
            raise InputError(
                f"StepBatchNorm: expected an input (frames, {self.num_features}) with {sum(sizes)} frames, the sum of "
                f"sizes; got {tuple(input.shape)}"
            )
        return batch_of_steps(input, None, sizes, step)

    def check_sequences(self, samples: int) -> None:
        """Raises where there is one sequence, whose variance at a step would be 0, in training."""
        if samples == 1 and self.training and self.normalizes_by_batch and not self.synchronizes:
            raise InputError(
                "Expected more than 1 sequence when training with a pool for each time step, got 1: the variance of "
                "one value is 0; use a larger batch, batch_norm='sequence', or .eval()"
            )

    @property
    def synchronizes(self) -> bool:
        """Whether a forward exchanges statistics with other ranks, each of which must make the call."""
        if self._source is not None:  # which exchanges nothing
            return False
        return (self.normalizes_by_batch or self.updates_statistics) and not is_alone(self.process_group)

    def agreed_pool(self, x: Tensor) -> Pool:
        """The process group, what to call the layer in errors, and its place, once the ranks have compared it.

        Raises:
            SynchronizationError: they differ.
        """
        self._agree(x)
        return Pool(process_group=self.process_group, layer=self._name(), place=self._place)

    @staticmethod
    def can_be_fused(norms: Iterable[StepBatchNorm]) -> bool:
        """Whether a recurrence may normalize in place of these layers: where their calls have no other effect."""
        norms = list(norms)
        return len({norm.normalizes_by_batch for norm in norms}) < 2 and not any(
            norm._forward_hooks
            or norm._forward_pre_hooks
            or norm.synchronizes
            or norm._source is not None
            or (norm.updates_statistics and not norm.normalizes_by_batch)
            for norm in norms
        )

    def normalization(self, sizes: Sequence[int], step: int) -> ops.StepNormalization:
        """What normalizes these steps, for a kernel."""
        weight, bias, *_ = self._fusion(None)
        if self.normalizes_by_batch:
            self.check_sequences(sizes[0])
            return ops.StepNormalization(weight, bias, self.eps)
        mean, var = self._population().read(len(sizes), step)
        wide = torch.float32 if mean.device.type == "mps" else torch.float64
        return ops.StepNormalization(weight, bias, self.eps, mean.to(wide), var.to(wide))

    @torch.no_grad()
    def input_moments(  # type: ignore[override]
        self, input: Tensor, sizes: Sequence[int] | None = None, step: int = 0
    ) -> Moments:
        """The moments of each step of an input, (max_steps, C), with no values in the steps that it does not reach."""
        return self._moments(self._batch_of_steps(input, sizes, step))

    @torch.no_grad()
    def take(self, mean: Tensor, var: Tensor, sizes: Sequence[int], step: int) -> None:
        """Mixes the statistics (steps, C) of a batch, *biased* variance, into those of the steps from ``step`` on."""
        population = self._population()
        row, steps = population.rows(len(sizes), step)
        count = torch.tensor(sizes[:steps], dtype=mean.dtype, device=mean.device)[:, None]
        population.mix(torch.where(count > 1, count, 0.0), mean[:steps], var[:steps], row)
