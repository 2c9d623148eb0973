"""Recurrences, and normalization with a pool for each time step: which implementation runs, and gradients.

Sequences lie as `batchnorm.kernels.recurrent` says: step t has ``sizes[t]`` rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.kernels import recurrent as aten


class StepNormalization(NamedTuple):
    """Normalization of each step's rows: by their own statistics where mean and variance (steps, C) are None."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    mean: Tensor | None = None
    var: Tensor | None = None


class Recurrence(NamedTuple):
    """The sequence of hidden states (frames, H), the last of each sequence, and the statistics of each step."""

    output: Tensor
    h_n: Tensor
    c_n: Tensor | None
    of_hh: tuple[Tensor, Tensor] | None = None
    of_c: tuple[Tensor, Tensor] | None = None


def normalize_steps(x: Tensor, sizes: Sequence[int], by: StepNormalization) -> tuple[Tensor, Tensor, Tensor]:
    """y, and the mean and biased variance (steps, C) that normalized."""
    weight, bias, eps, mean, var = by
    if mean is None or var is None:
        mean, var = aten.step_statistics(x, sizes)
    return aten.normalize_steps(x, sizes, mean, var, weight, bias, eps), mean.detach(), var.detach()


def statistics(x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each step, (steps, C)."""
    return aten.step_statistics(x, sizes)


def recurrence(
    cell: str,
    gates: Tensor,
    sizes: Sequence[int],
    weight_hh: Tensor,
    bias_hn: Tensor | None,
    weight_hr: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    by_hh: StepNormalization | None,
    by_c: StepNormalization | None,
) -> Recurrence:
    """The hidden states of a cell of `aten.CELLS`, with W_hh h (and the cell before its tanh) normalized."""
    of_hh, of_c = _Recorder(by_hh), _Recorder(by_c)
    states, cells = aten.recurrence(cell, gates, sizes, weight_hh, bias_hn, weight_hr, h0, c0, of_hh, of_c)
    h_n, c_n = last(states, sizes), None if cells is None else last(cells, sizes)
    return Recurrence(states, h_n, c_n, of_hh.statistics(), of_c.statistics())


class _Recorder:
    """Normalizes step after step, and keeps the statistics."""

    def __init__(self, by: StepNormalization | None) -> None:
        self.by = by
        self.kept: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x: Tensor, t: int) -> Tensor:
        by = self.by
        if by is None:
            return x
        if by.mean is not None and by.var is not None:
            by = by._replace(mean=by.mean[t : t + 1], var=by.var[t : t + 1])
        y, *statistics = normalize_steps(x, [len(x)], by)
        self.kept.append((statistics[0], statistics[1]))
        return y

    def statistics(self) -> tuple[Tensor, Tensor] | None:
        if not self.kept:
            return None
        means, variances = zip(*self.kept, strict=True)
        return torch.cat(means), torch.cat(variances)


def last(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """The row of each sequence's last step, (N, C)."""
    if sizes[-1] == sizes[0]:
        return x[-sizes[0] :]
    return x[torch.tensor(last_rows(sizes), device=x.device)]


def last_rows(sizes: Sequence[int]) -> list[int]:
    """Where each sequence's last frame lies."""
    rows = [0] * sizes[0]
    begin = 0
    for size in sizes:
        rows[:size] = range(begin, begin + size)
        begin += size
    return rows
