"""The third question: how the statistics of the population are estimated from batches.

A `Population` reads and updates the buffers of running statistics, one row for each domain and time step. Estimators,
the biased and the unbiased variance, the refusal of statistics that are not finite, domains and steps are here alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.batch import Measured
from batchnorm.errors import InputError
from batchnorm.kernels import aten
from batchnorm.moments import merge_axis
from batchnorm.ops.context import can_read, is_mapped, is_opaque
from batchnorm.ops.schemas import statistics_dtype
from batchnorm.pools import Pool, merge, merge_moments

ESTIMATORS = ("ema", "debiased", "cumulative")
MIXED = ("ema", "debiased", "cumulative")
"""The estimates that are ``(1 - share) old + share new``, which the operators and the C++ call compute."""
VARIANCES = ("unbiased", "biased")
NONFINITE = ("propagate", "skip", "skip_channel")


class Estimator(NamedTuple):
    """How running statistics take in a batch.

    Attributes:
        momentum: the share of the new statistics; None for the cumulative average.
        kind: one of `ESTIMATORS`.
        variance: one of `VARIANCES`.
        nonfinite: one of `NONFINITE`.
        in_turn: whether ghost batches are taken in one after the other, or else merged.
    """

    momentum: float | None = 0.1
    kind: str = "ema"
    variance: str = "unbiased"
    nonfinite: str = "propagate"
    in_turn: bool = False


PLAIN = Estimator()


class Accumulator:
    """Moments of the micro-batches so far, (rows, C), merged in place (Chan, Golub & LeVeque 1983)."""

    def __init__(self, like: Tensor) -> None:
        wide, shape = statistics_dtype(like.device), (-1, like.shape[-1])
        self.mean = torch.zeros(like.shape, dtype=wide, device=like.device).reshape(shape)
        self.m2 = torch.zeros_like(self.mean)
        self.count = self.mean.new_zeros((len(self.mean), 1))

    def add(self, mean: Tensor, var: Tensor, count: Tensor, row: int = 0) -> None:
        """Merges a batch of ``count`` values a channel into the rows from ``row`` on; ``var`` is biased."""
        rows = slice(row, row + len(mean))
        total = self.count[rows] + count
        delta, share = mean - self.mean[rows], count / total.clamp(min=1)
        self.m2[rows] += var * count + delta * self.count[rows] * share * delta
        self.mean[rows] += delta * share
        self.count[rows] = total

    @property
    def var(self) -> Tensor:
        """The *biased* variance (rows, C); 0 in rows without values."""
        return self.m2 / torch.where(self.count > 0, self.count, 1.0)


@dataclass
class Population:
    """The running statistics of a layer, and how they are estimated.

    Args:
        mean: (C,), or with leading axes for domains and time steps; None where none are kept.
        var: as mean, of the kind that the estimator says.
        estimator: see `Estimator`.
        batches: the number of batches taken in, of the shape of mean without its last axis; None: not counted.
        skipped: of these, the batches refused as not finite; see ``nonfinite``.
        domain: the set of statistics in use, where there are several; else None.
        max_steps: time steps that have statistics of their own; 0: they are not told apart.
        accumulator: collects the statistics of the batches in place of the buffers.
        layer: the layer's class in errors.
        carry: what rounding left of mean and var, (2, *mean.shape), updated with them; None: it is lost.
    """

    mean: Tensor | None
    var: Tensor | None
    estimator: Estimator = PLAIN
    batches: Tensor | None = None
    skipped: Tensor | None = None
    domain: int | None = None
    max_steps: int = 0
    accumulator: Accumulator | None = None
    layer: str = "batch_norm"
    carry: Tensor | None = None

    def read(self, steps: int = 0, first: int = 0) -> tuple[Tensor, Tensor]:
        """Mean and variance of the domain, (C,), or of so many steps from the ``first`` on, (steps, C).

        A step beyond those that training has reached has the statistics of the last one reached.
        """
        mean, var, batches = self.mean, self.var, self.batches
        if mean is None or var is None:
            raise InputError(
                f"{self.layer}: source='running', but the layer tracks no running statistics; "
                "construct it with track_running_stats=True, or set source='auto'"
            )
        if self.domain is not None:
            mean, var = mean[self.domain], var[self.domain]
            batches = None if batches is None else batches[self.domain]
        if steps:
            row = torch.arange(first, first + steps, device=mean.device).clamp(0, len(mean) - 1)
            if batches is not None:
                row = row.minimum((batches > 0).sum() - 1).clamp(0, len(mean) - 1)
            mean, var = mean[row], var[row]
        return mean, var

    def last_row(self) -> Tensor | None:
        """The last time step that training has reached, or None where that is not counted."""
        batches = self.batches_of_domain
        return None if batches is None or not batches.ndim else ((batches > 0).sum() - 1).clamp(min=0)

    @property
    def batches_of_domain(self) -> Tensor | None:
        """The number of batches that the domain in use has taken in."""
        return self.batches if self.batches is None or self.domain is None else self.batches[self.domain]

    def rows(self, steps: int = 0, first: int = 0) -> tuple[int, int]:
        """The rows that an input of so many steps updates, from the ``first`` on: the first row, and their number."""
        domain = self.domain or 0
        if not steps:
            return domain, 1
        first = min(first, self.max_steps)
        return domain * self.max_steps + first, min(steps, self.max_steps - first)

    def take(self, measured: Measured, pool: Pool) -> None:
        """Takes in the statistics of a batch. A pool of one value has no variance, and changes nothing."""
        with torch.no_grad():  # as a decorator of a method Dynamo does not trace it
            self._take(measured, pool)

    def _take(self, measured: Measured, pool: Pool) -> None:
        number = measured.number
        if number == 1 and self.accumulator is None:
            return
        if number == 0 and self.domain is None:
            # Nothing to mix in; torch counts the batch all the same.
            if self.batches is not None and self.accumulator is None:
                self.batches.add_(1)
            return
        if self._is_simple(measured, pool):
            if number is None:
                number = int(measured.counts[0, 0])
                if number <= 1:
                    return
            self._mix_by_operator(measured, pool, number)
            return
        if self.estimator.in_turn and len(measured.mean) > 1 and self.accumulator is None:
            self._take_in_turn(measured)
            return
        row, rows = self.rows(measured.batch.steps, measured.batch.first)
        if measured.batch.steps:
            counts, mean, var = measured.counts[:rows], measured.mean[:rows], measured.var[:rows]
            values = counts if measured.batch.weights is None else measured.values[:rows]
        else:
            counts, mean, var, values = _merged(measured, pool)
        if number is None:
            counts = torch.where(values > 1, counts, 0.0)
        self.mix(counts[:, :1], mean, var, row)

    def _is_simple(self, measured: Measured, pool: Pool) -> bool:
        """Whether one operator can mix these statistics in."""
        estimator, batch = self.estimator, measured.batch
        if estimator.kind not in MIXED:
            return False
        has_rows = self.domain is not None or batch.steps
        if has_rows or estimator.in_turn or estimator.nonfinite != "propagate" or self.accumulator is not None:
            return False
        if batch.weights is not None or pool.ranks is not None or is_mapped():
            return False
        if estimator.kind == "debiased" and not can_read(measured.mean):
            return False
        if batch.mask is None and pool.process_group is None:
            return not (pool.groups and pool.size)
        return not pool.groups and len(measured.mean) == 1 and can_read(measured.mean)

    def _mix_by_operator(self, measured: Measured, pool: Pool, number: int) -> None:
        """The operator: mixes the statistics of all pools into one row, and counts one batch."""
        estimator, batches = self.estimator, self.batches
        momentum = momentum_of_next(estimator.kind, estimator.momentum, batches)
        pool_number = pool.size * math.prod(measured.batch.x.shape[2:]) or number
        unbiased = estimator.variance == "unbiased"
        torch.ops.batchnorm.update_statistics.default(
            self.mean, self.var, batches, measured.mean, measured.var, number, pool_number, momentum, unbiased,
            self.carry,
        )  # fmt: skip

    def _take_in_turn(self, measured: Measured) -> None:
        """Each ghost batch as a batch of its own, k of them decaying as one: momentum 1 - (1 - p)^(1/k)."""
        ghosts, momentum, row = len(measured.mean), self.estimator.momentum, self.rows()[0]
        assert momentum is not None
        share = 1 - (1 - momentum) ** (1 / ghosts)
        each = replace(self, estimator=self.estimator._replace(momentum=share))
        before = None if self.batches is None else self.batches.clone()
        counts = torch.where(measured.values > 1, measured.counts, 0.0)
        for k in range(ghosts):
            each.mix(counts[k : k + 1, :1], measured.mean[k : k + 1], measured.var[k : k + 1], row)
        if self.batches is not None and before is not None:  # one batch
            self.batches.copy_(torch.where(self.batches > before, before + 1, before))

    def mix(self, count: Tensor, mean: Tensor, var: Tensor, row: int = 0) -> None:
        """Mixes mean and *biased* variance (rows, C) of ``count`` (rows, 1) values into the rows from ``row`` on.

        The share of the batch is the momentum m ("ema"), m / (1 - (1 - m)^t) ("debiased"), which makes the buffer the
        moving average from zero divided by 1 - (1 - m)^t (Kingma & Ba 2015, section 3), or 1/t ("cumulative"); t counts
        the batches that a channel took in. A row without values stays as it is. No value is read back to Python, so the
        same code runs eagerly, compiled and exported.
        """
        if self.accumulator is not None:
            self.accumulator.add(mean, var, count, row)
            return
        if self.mean is None or self.var is None:
            return
        channels, rows = self.mean.shape[-1], slice(row, row + len(mean))
        if self.estimator.variance == "unbiased":
            var = var * torch.where(count > 1, count / (count - 1), 1.0)
        accepted = counted = count > 0
        skipped: Tensor | int = 0  # of the batches counted
        if self.estimator.nonfinite != "propagate":
            accepted, counted, skipped = self._refuse(mean, var, counted, rows)
        batches = self.batches
        if batches is not None:
            batches = batches.view(-1, 1)[rows]
            batches.add_(counted.to(batches.dtype))
        share = self._share(batches, skipped, mean)
        share = share if isinstance(share, Tensor) else torch.full((1, 1), share, dtype=mean.dtype, device=mean.device)
        running_mean, running_var = self.mean.view(-1, channels)[rows], self.var.view(-1, channels)[rows]
        carry = None if self.carry is None else self.carry.view(2, -1, channels)[:, rows]
        if is_opaque(mean):
            torch.ops.batchnorm.mix_statistics.default(running_mean, running_var, mean, var, share, accepted, carry)
        else:
            aten.mix_statistics(running_mean, running_var, mean, var, share, accepted, carry)

    def _refuse(self, mean: Tensor, var: Tensor, counted: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor | int]:
        """The rows or channels that are accepted, those that count a batch, and the batches that these have skipped."""
        assert self.mean is not None
        assert self.var is not None
        assert self.skipped is not None
        finite = torch.isfinite(mean.to(self.mean.dtype)) & torch.isfinite(var.to(self.var.dtype))
        by_channel = self.estimator.nonfinite == "skip_channel"
        refused = ~finite if by_channel else (~finite).any(1, keepdim=True)
        counter = self.skipped.view(-1, self.mean.shape[-1] if by_channel else 1)[rows]
        counter.add_((refused & counted).to(counter.dtype))
        accepted = counted & ~refused
        return (accepted, counted, counter) if by_channel else (accepted, accepted, 0)

    def _share(self, batches: Tensor | None, skipped: Tensor | int, like: Tensor) -> Tensor | float:
        """The share of the batch in the new running statistics."""
        momentum = None if self.estimator.kind == "cumulative" else self.estimator.momentum
        if batches is None:
            return 0.0 if momentum is None else momentum
        t = (batches - skipped).clamp(min=1).to(like.dtype)
        if momentum is None:
            return 1.0 / t
        if self.estimator.kind == "debiased" and momentum > 0:
            return torch.as_tensor(_debiased(momentum, t)).clamp(max=1)  # at t = 1, but for rounding
        return momentum


def _debiased(momentum: float, t: Any) -> Any:
    """The share of batch t, from 1 up, in a moving average that is divided by 1 - (1 - m)^t."""
    return momentum / (1 - (1 - momentum) ** t)


def momentum_of_next(kind: str, momentum: float | None, batches: Tensor | None) -> float | None:
    """The share of the batch after ``batches`` in an estimate of `MIXED`; None for 1 / t, which the operators count."""
    if kind == "cumulative":
        momentum = None
    if momentum is None:
        return None if batches is not None else 0.0
    if kind == "debiased" and momentum and batches is not None:
        return float(min(1.0, _debiased(momentum, int(batches) + 1)))
    return momentum


def _merged(measured: Measured, pool: Pool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All pools of a channel on all ``pool.ranks`` as one, (1, C): count, mean, *biased* variance, number of values."""
    count, mean, var = measured.counts, measured.mean, measured.var
    values = count if measured.batch.weights is None else measured.values
    if len(mean) == 1 and pool.ranks is None:
        return count, mean, var, values
    number = values.sum(0, keepdim=True)
    count, mean, m2 = (each[None] for each in merge_axis(count, mean, var * count, 0))
    ranks = Pool(process_group=pool.ranks, layer=pool.layer, place=pool.place)
    if pool.ranks is not None and measured.batch.weights is not None:
        number = merge(number, ranks)
    count, mean, m2 = merge_moments(count, mean, m2, ranks)
    var = m2 / torch.where(count > 0, count, 1.0)
    return count, mean, var, count if measured.batch.weights is None else number
