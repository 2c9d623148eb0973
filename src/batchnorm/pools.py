"""Which values share one mean and one variance: sums over pools, their merge, and the way back to the values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from batchnorm.errors import InputError, SynchronizationError
from batchnorm.exchanges import refuse_mixture, waiting
from batchnorm.moments import merge_axis


@dataclass(frozen=True)
class Pool:
    """The pool of a value of channel c and sample n: those of c's channel group in n's run of samples, on all ranks.

    Attributes:
        size: samples of a run, the last of which may be shorter; 0 for all samples.
        groups: number of groups of adjacent channels; 0 where each channel is alone.
        process_group: of torch.distributed, or None for this process alone.
        layer: the layer's name in errors.
        place: which layer of its process group it is, as `exchanges.agree` counts; 0: unknown.
        ranks: the process group whose ranks' pools are one batch of the population, where each rank normalizes by its
            own pools (ghost batches); None for this process alone.
    """

    size: int = 0
    groups: int = 0
    process_group: Any = None
    layer: str = "batch_norm"
    ranks: Any = None
    place: int = 0

    @property
    def is_merged(self) -> bool:
        """Whether sums over samples and space are not all: those of other channels or ranks join."""
        return bool(self.groups) or self.process_group is not None


class Pools:
    """The pools of x (N, C, *space): sums over them of shape (pools, C), and what such statistics broadcast as.

    Args:
        x: the values.
        pool: which of them share statistics; a number is a `Pool.size`.
        mask: boolean (N, *space), True = valid: only these are in the pools.
        weights: (N, *space), >= 0: how often each counts in means.
    """

    def __init__(self, x: Tensor, pool: Pool | int, mask: Tensor | None = None, weights: Tensor | None = None) -> None:
        self.pool = Pool(pool) if isinstance(pool, int) else pool
        self.samples, self.channels, self.device = x.shape[0], x.shape[1], x.device
        self.space = tuple(range(2, x.ndim))
        self.size = self.pool.size if 0 < self.pool.size < self.samples else 0
        self.pools = (self.samples + self.size - 1) // self.size if self.size else 1
        self.wide = torch.float32 if x.device.type == "mps" else torch.float64
        self.shape = (self.samples, self.channels) + (1,) * len(self.space)
        self.mask = None if mask is None else mask.reshape(x.shape[0], 1, *x.shape[2:])
        self.weights = None if weights is None else self.clean(weights.reshape(x.shape[0], 1, *x.shape[2:]))
        self.count = self._count(math.prod(x.shape[2:]))

    def _count(self, inner: int) -> Tensor | int:
        """Values (or weights) of each pool: a number, (pools, 1) or, merged, (pools, C)."""
        count: Tensor | int
        if self.weights is not None:
            count = self._gather(self.weights.to(self.wide))
        elif self.mask is not None:
            count = self._gather(self.mask.to(self.wide))
        elif self.pools == 1:
            count = self.samples * inner
        else:
            last = self.samples - (self.pools - 1) * self.size
            count = torch.full((self.pools, 1), self.size * inner, dtype=self.wide, device=self.device)
            count[-1] = last * inner  # a fill: numbers of a list would be copied, which waits for a device
        if not self.pool.is_merged:
            return count
        if not isinstance(count, Tensor):
            count = torch.full((1, 1), count, dtype=self.wide, device=self.device)
        return self.merge(count.expand(self.pools, self.channels))

    def counts(self) -> Tensor:
        """Values (or weights) of every channel of each pool, (pools, C)."""
        count = self.count
        if not isinstance(count, Tensor):
            count = torch.full((1, 1), count, dtype=self.wide, device=self.device)
        return count.to(self.wide).expand(self.pools, self.channels)

    def clean(self, values: Tensor) -> Tensor:
        """Zero where the mask is not True, whatever stood there."""
        return values if self.mask is None else torch.where(self.mask, values, 0)

    def _gather(self, values: Tensor) -> Tensor:
        """(N, C, *space) to (pools, C), in float64."""
        if self.pools == 1:
            return values.sum((0, *self.space), dtype=self.wide)[None]
        each = values.sum(self.space, dtype=self.wide) if self.space else values.to(self.wide)
        index = torch.arange(self.samples, device=values.device) // self.size
        return each.new_zeros((self.pools, each.shape[1])).index_add(0, index, each)

    def own(self, values: Tensor) -> Tensor:
        """Sums of the valid values over samples and space, (pools, C), in float64."""
        return self._gather(self.clean(values))

    def merge(self, sums: Tensor) -> Tensor:
        """`merge` in these pools."""
        return merge(sums, self.pool)

    def share(self, sums: Tensor) -> Tensor:
        """Merged sums over the number of values; an empty pool's are 0."""
        if not isinstance(self.count, Tensor):
            # Dynamo of torch 2.10 knows no sym_max of numbers, and makes one of a max where the number is a symbol.
            mean: Tensor = sums / (max(self.count, 1) if isinstance(self.count, int) else torch.sym_max(self.count, 1))
            return mean
        return sums / torch.where(self.count > 0, self.count, 1.0)

    def mean(self, values: Tensor) -> Tensor:
        """Of each pool, weighted; an empty pool's is 0."""
        if self.weights is not None:
            values = values * self.weights  # promoted: a bfloat16 product would be rounded
        return self.share(self.merge(self.own(values)))

    def expand(self, statistic: Tensor, dtype: torch.dtype) -> Tensor:
        """(pools, C) or (C,) to what broadcasts against (N, C, *space)."""
        if statistic.ndim == 1 or self.pools == 1:
            return statistic.reshape(1, self.channels, *self.shape[2:]).to(dtype)
        each = statistic.repeat_interleave(self.size, 0)[: self.samples]
        return each.reshape(self.shape).to(dtype)


_HAS_FLAG = hasattr(torch.compiler, "_is_exporting_flag")


def is_exported() -> bool:
    """Whether torch.export records the call, for tools that know other operators and dtypes.

    Dynamo of torch 2.10 answers True for ``torch.compiler.is_exporting()`` in every compilation, so its flag is read.
    """
    return torch.compiler._is_exporting_flag if _HAS_FLAG else torch.compiler.is_exporting()


def merge(sums: Tensor, pool: Pool) -> Tensor:
    """Sums (pools, C) with those of the other channels of a group, and of the other ranks; differentiable."""
    if pool.groups:
        grouped = sums.unflatten(1, (pool.groups, -1))
        sums = grouped.sum(2, keepdim=True).expand_as(grouped).flatten(1)
    return sums if pool.process_group is None else all_reduce(sums, pool)


def merge_moments(count: Tensor, mean: Tensor, m2: Tensor, pool: Pool) -> tuple[Tensor, Tensor, Tensor]:
    """The same of moments, each of shape (pools, C): one all-gather, merged in rank order."""
    if pool.groups:
        counts, means, m2s = (each.unflatten(-1, (pool.groups, -1)) for each in (count, mean, m2))
        size = means.shape[-1]
        count, mean, m2 = (each.repeat_interleave(size, -1) for each in merge_axis(counts, means, m2s, -1))
    if pool.process_group is not None:
        counts, means, m2s = all_gather(torch.stack((count, mean, m2)), pool).unbind(1)
        count, mean, m2 = merge_axis(counts, means, m2s, 0)
    return count, mean, m2


class _AllReduce(torch.autograd.Function):
    """The sum over ranks; its gradient is the sum over ranks of theirs."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, pool: Pool) -> Tensor:
        ctx.pool = pool
        total = values.detach().contiguous().clone()
        group = process_group(pool.process_group)
        with waiting(group, pool.layer, "all-reduce"):
            dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _AllReduce.apply(gradient, ctx.pool), None


def all_reduce(values: Tensor, pool: Pool) -> Tensor:
    """The sum over the ranks of the pool's process group, differentiable as often as need be."""
    total: Tensor = _AllReduce.apply(values, pool)
    return total


def sum_over_ranks(values: Tensor, pool: Pool) -> Tensor:
    """The same of values that nobody else reads and no gradient passes, which may be written over."""
    if pool.process_group is None:
        return values
    if torch.compiler.is_compiling():
        return all_reduce(values, pool)
    group = process_group(pool.process_group)
    values = values.contiguous()
    with waiting(group, pool.layer, "all-reduce"):
        dist.all_reduce(values, group=group)
    return values


def all_gather(values: Tensor, pool: Pool) -> Tensor:
    """Every rank's tensor of one shape, stacked in rank order.

    Raises:
        SynchronizationError: ranks are at different layers. Only eager calls on CPUs look: elsewhere it would wait.
    """
    group = process_group(pool.process_group)
    if pool.place and values.is_cpu:
        return _gather_of_one_layer(values, pool, group)
    gathered = values.new_empty((dist.get_world_size(group), *values.shape))
    with waiting(group, pool.layer, "all-gather"):
        dist.all_gather(list(gathered.unbind()), values.contiguous(), group=group)
    return gathered


def _gather_of_one_layer(values: Tensor, pool: Pool, group: Any) -> Tensor:
    """`all_gather` of values with the layer's place behind them, in one exchange."""
    mine = F.pad(values.reshape(-1), (0, 1), value=float(pool.place))
    gathered = mine.new_empty((dist.get_world_size(group), len(mine)))
    with waiting(group, pool.layer, "all-gather"):
        dist.all_gather(list(gathered.unbind()), mine, group=group)
    if not torch.compiler.is_compiling():  # a graph sends its place, too: other ranks may have none
        places = gathered[:, -1].tolist()
        if places.count(pool.place) != len(places):
            refuse_mixture(group, pool.layer, [int(place) for place in places])
    given: Tensor = gathered[:, :-1].unflatten(1, values.shape)
    return given


def largest(number: int, pool: Pool, device: torch.device) -> int:
    """The largest of the ranks' numbers, which is read at once on any device.

    Raises:
        SynchronizationError: ranks are at different layers.
    """
    return int(
        _gather_of_one_layer(torch.tensor([number], device=device), pool, process_group(pool.process_group)).max()
    )


def process_group(given: Any) -> Any:
    """The group of torch.distributed that an option names: "world", or a group itself.

    Raises:
        InputError: something else.
    """
    if not is_group(given):
        raise InputError(f"process_group must be None, 'world' or a group of torch.distributed, got {given!r}")
    return None if isinstance(given, str) else given


def is_group(given: Any) -> bool:
    """Whether an option names a group: None, "world", a group, or what torch gives those that are not in a new one."""
    if given is None or isinstance(given, str):
        return given in (None, "world")
    if not dist.is_available():
        return False
    is_outside = type(given) is int and given == dist.GroupMember.NON_GROUP_MEMBER  # torch's word for it is a number
    return is_outside or isinstance(given, dist.ProcessGroup)


def is_alone(given: Any) -> bool:
    """Whether there are no other ranks to merge with."""
    if given is None:
        return True
    group = process_group(given)
    if not (dist.is_available() and dist.is_initialized()):
        return True
    ranks = dist.get_world_size(group)
    if ranks < 1:
        raise SynchronizationError(
            "this process is not in the process group that it was told to share statistics with; "
            "give each process the group that has it as a member"
        )
    return ranks == 1
