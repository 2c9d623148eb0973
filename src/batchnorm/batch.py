"""A batch as the operators take it: x (N, C, *space) with its mask, weights and time steps, and the way back.

Images, frames of sequences, packed sequences and jagged tensors all become a `Batch`. A packed sequence or a jagged
tensor holds the valid frames alone, so all of them are one dense pool. In time order the frames of one step stand
beside one another, so a step is a pool of as many rows as there are sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from batchnorm.errors import DtypeError, InputError
from batchnorm.ops.context import Way, is_compiled, way
from batchnorm.pools import Pool, Pools, largest

POOLS = (None, "sequence", "frame")


def _same(y: Tensor) -> Tensor:
    return y


class Batch(NamedTuple):
    """An input as the operators take it.

    Attributes:
        x: (N, C, *space), or frames (frames, C).
        residual: as x, or None.
        mask: the valid positions (N, *space), or None for all.
        weights: how often each counts in mean and variance, (N, *space), or None for once.
        scale: rows of x that a sample of the layer's input is (a ghost batch counts samples).
        steps: time steps that x holds one after the other, where each is a pool; else 0.
        first: the number of the first of them.
        restore: makes of a result like x the output that belongs to the input.
    """

    x: Tensor
    residual: Tensor | None = None
    mask: Tensor | None = None
    weights: Tensor | None = None
    scale: int = 1
    steps: int = 0
    first: int = 0
    restore: Callable[[Tensor], Any] = _same


def is_plain(batch: Batch) -> bool:
    """Whether all values count alike, in pools that the input does not set.

    It is no property, since Dynamo of torch 2.10 traces none of a named tuple.
    """
    return batch.mask is None and batch.weights is None and not batch.steps


@dataclass
class Measured:
    """The statistics of every pool of a batch.

    Attributes:
        batch: whose they are.
        pool: the values that share them.
        mean: (pools, C).
        var: (pools, C), *biased*.
    """

    batch: Batch
    pool: Pool
    mean: Tensor
    var: Tensor
    _counts: Tensor | None = None

    @property
    def counts(self) -> Tensor:
        """The number of values of each pool, or their weight; (pools, C)."""
        if self._counts is None:
            x, mask, weights = self.batch.x, self.batch.mask, self.batch.weights
            self._counts = Pools(x, self.pool, mask, weights).counts()
        return self._counts

    @property
    def values(self) -> Tensor:
        """The number of values of each pool, however much they weigh; (pools, C)."""
        if self.batch.weights is None:
            return self.counts
        return Pools(self.batch.x, self.pool, self.batch.mask).counts()

    @property
    def number(self) -> int | None:
        """The number of values of a channel over all pools, where the shape of x tells it, else None."""
        if not is_plain(self.batch) or self.pool.process_group is not None or self.pool.ranks is not None:
            return None
        x, groups = self.batch.x, self.pool.groups
        return x.shape[0] * math.prod(x.shape[2:]) * (x.shape[1] // groups if groups else 1)


def batch_of(
    given: Any,
    residual: Any = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    weights: Tensor | None = None,
    pool: str | None = None,
    batch_first: bool = True,
    ghosts: bool = False,
) -> Batch:
    """The batch of an input: a tensor, a `PackedSequence`, or a nested tensor of jagged layout.

    Args:
        given, residual, mask, lengths, weights, pool, batch_first: see `batchnorm.functional.batch_norm`.
        ghosts: whether ghost batches are cut from it, whose samples have to stand together.

    Raises:
        InputError, DtypeError: shapes or dtypes that do not fit.
    """
    if not isinstance(given, (Tensor, PackedSequence)):  # a proxy of torch.fx
        return Batch(given, residual)
    if isinstance(given, PackedSequence) or given.is_nested:
        extra = {"mask": mask, "lengths": lengths}
        name = next((name for name, value in extra.items() if value is not None), None)
        if name is not None:
            raise InputError(f"got {name} beside a {type(given).__name__}, which knows its own lengths; leave it out")
        if weights is not None:
            raise InputError(f"got weights beside a {type(given).__name__}; give a padded tensor with lengths instead")
        return _packed(given, residual, pool) if isinstance(given, PackedSequence) else _jagged(given, residual, pool)
    if pool is None:
        return Batch(given, residual, *positions(given, mask, lengths, weights))
    return _padded(given, residual, mask, lengths, weights, pool, batch_first, ghosts)


def with_equal_steps(batch: Batch, pool: Pool) -> Batch:
    """The same with as many time steps as the rank that has the most; the others' are not valid."""
    frames = len(batch.x)
    most = largest(batch.steps, pool, batch.x.device)
    samples = max(frames // batch.steps, 1) if batch.steps else 1
    missing = most * samples - frames
    if not missing:
        return batch

    def padded(t: Tensor | None) -> Tensor | None:
        # Not torch.cat, which takes an empty vector out of the graph: this rank would miss a collective backward.
        return None if t is None else F.pad(t, (*(0, 0) * (t.ndim - 1), 0, missing))

    mask = batch.x.new_ones(frames, dtype=torch.bool) if batch.mask is None else batch.mask
    x = padded(batch.x)
    assert x is not None
    residual, weights = padded(batch.residual), padded(batch.weights)
    restore = batch.restore
    return batch._replace(
        x=x, residual=residual, mask=padded(mask), weights=weights, steps=most, restore=lambda y: restore(y[:frames])
    )


def batch_of_steps(x: Tensor, residual: Tensor | None, sizes: Sequence[int], first: int = 0) -> Batch:
    """Frames (frames, C) in time order, each step a pool: ``sizes[t]`` rows of step ``first + t``."""
    steps, most = len(sizes), max(sizes, default=0)
    if min(sizes, default=0) == most:
        return Batch(x, residual, steps=steps, first=first)
    there = (torch.arange(most) < torch.tensor(sizes)[:, None]).flatten()
    index = there.nonzero().squeeze(1).to(x.device)

    def rows(data: Tensor) -> Tensor:
        return data.new_zeros((steps * most, *data.shape[1:])).index_copy(0, index, data)

    added = None if residual is None else rows(residual)
    return Batch(rows(x), added, there.to(x.device), steps=steps, first=first, restore=lambda y: y[index])


def _padded(
    given: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    weights: Tensor | None,
    pool: str,
    batch_first: bool,
    ghosts: bool,
) -> Batch:
    """Frames of (batch, time, channels), or of (time, batch, channels) where the batch is not first."""
    if given.ndim != 3:
        raise InputError(
            f"pool={pool!r} takes sequences ({'batch, time' if batch_first else 'time, batch'}, channels), "
            f"got an input {tuple(given.shape)}"
        )
    samples, steps = (given.shape[0], given.shape[1]) if batch_first else (given.shape[1], given.shape[0])
    first, second = given.shape[:2]
    turned_back = given.transpose(1, 2)  # (N, C, L) where the batch is first
    if lengths is not None:
        if mask is not None:
            raise InputError("got mask and lengths, two ways to say what is valid; give one of them")
        mask = within(lengths, samples, steps, given.device)
        mask = mask if batch_first else mask.t()
    masked, weighed = positions(turned_back, mask, None, weights)
    by_time = pool == "frame"
    turned = batch_first if by_time else ghosts and not batch_first  # the values of a pool must stand together

    def rows(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        t = t.transpose(0, 1) if turned else t
        return t.flatten(0, 1)

    def back(y: Tensor) -> Tensor:
        ours: Tensor = y.unflatten(0, (second, first) if turned else (first, second))
        return ours.transpose(0, 1) if turned else ours

    if residual is not None and residual.shape != given.shape:
        raise InputError(f"residual is {tuple(residual.shape)}, expected {tuple(given.shape)}, that of the input")
    x = rows(given)
    assert x is not None
    scale, count = (1, steps) if by_time else (steps, 0)
    return Batch(x, rows(residual), rows(masked), rows(weighed), scale, count, restore=back)


def _packed(given: PackedSequence, residual: Any, pool: str | None) -> Batch:
    added: Tensor | None = None
    if residual is not None:
        if not isinstance(residual, PackedSequence):
            raise InputError(f"got a residual of type {type(residual).__name__} beside a PackedSequence; pack it alike")
        if not torch.equal(residual.batch_sizes, given.batch_sizes):
            raise InputError("the residual is a PackedSequence of other lengths than the input")
        added = residual.data

    def back(y: Tensor) -> PackedSequence:
        return PackedSequence(y, given.batch_sizes, given.sorted_indices, given.unsorted_indices)

    if pool != "frame":
        return Batch(given.data, added, restore=back)
    batch = batch_of_steps(given.data, added, given.batch_sizes.tolist())
    return batch._replace(restore=lambda y: back(batch.restore(y)))


def _jagged(given: Tensor, residual: Tensor | None, pool: str | None) -> Batch:
    if given.layout is not torch.jagged:
        raise InputError(
            "got a nested tensor of strided layout; make it with layout=torch.jagged. torch.nn.TransformerEncoder "
            "makes one of padded input, unless it is constructed with enable_nested_tensor=False"
        )
    if given.ndim != 3:
        raise InputError(
            f"expected a nested tensor (batch, *, channels) or (batch, channels, *), got {given.ndim} axes"
        )
    ragged = given._ragged_idx  # type: ignore[attr-defined]
    if pool == "frame":
        raise InputError("pool='frame' does not take nested tensors; give a PackedSequence or a tensor with lengths")

    def values(t: Tensor) -> Tensor:
        flat = t.values()
        return flat if ragged == 1 else flat.unsqueeze(0)

    def back(y: Tensor) -> Tensor:
        flat = y if ragged == 1 else y.squeeze(0)
        offsets = given.offsets()  # type: ignore[attr-defined]
        return torch.nested.nested_tensor_from_jagged(flat, offsets, jagged_dim=ragged)

    return Batch(values(given), None if residual is None else values(residual), restore=back)


def positions(
    x: Tensor, mask: Tensor | None, lengths: Tensor | None, weights: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The mask and the weights, each (N, *space) or None, of `batch_norm`'s arguments."""
    mask = valid(x, mask, lengths)
    if weights is None:
        return mask, None
    weights = weighing(x, weights)
    return weights > 0 if mask is None else mask & (weights > 0), weights


def valid(x: Tensor, mask: Tensor | None, lengths: Tensor | None) -> Tensor | None:
    """The mask (N, *space) that ``mask=`` or ``lengths=`` of `batch_norm` stand for."""
    space = x.shape[2:]
    if lengths is not None:
        if mask is not None:
            raise InputError("got mask and lengths, two ways to say what is valid; give one of them")
        if not space:
            raise InputError(f"lengths are of the last axis of (N, C, L), got an input {tuple(x.shape)}")
        mask = within(lengths, x.shape[0], space[-1], x.device)
        return mask.reshape(x.shape[0], *(1,) * (len(space) - 1), space[-1]).expand(x.shape[0], *space)
    if mask is None:
        return None
    if mask.dtype is not torch.bool:
        raise DtypeError(f"mask must be boolean, True = valid, got {mask.dtype}; write mask.bool(), or weights=")
    return _broadcast(x, mask, "mask")


def within(lengths: Tensor, samples: int, length: int, device: torch.device) -> Tensor:
    """The mask (N, L) of the first ``lengths[n]`` positions of each sample."""
    lengths = torch.as_tensor(lengths)
    if lengths.is_floating_point() or lengths.dtype is torch.bool or tuple(lengths.shape) != (samples,):
        raise InputError(
            f"lengths must be integers of shape ({samples},), one a sample, "
            f"got {lengths.dtype} of shape {tuple(lengths.shape)}"
        )
    if (
        not is_compiled()
        and lengths.device.type == "cpu"  # to look at those of another device would wait for it
        and lengths.numel()
        and not 0 <= int(lengths.min()) <= int(lengths.max()) <= length
    ):
        raise InputError(f"lengths must be between 0 and {length}, got {lengths.tolist()}")
    lengths = lengths.to(device, non_blocking=device.type == "cuda")  # staged by the driver before it returns
    return torch.arange(length, device=device) < lengths[:, None]


def weighing(x: Tensor, weights: Tensor) -> Tensor:
    """The weights (N, *space) that ``weights=`` of `batch_norm` stand for."""
    if not weights.is_floating_point():
        raise DtypeError(f"weights must be floating-point, got {weights.dtype}")
    if way(x) is Way.EAGER:
        least = weights.detach()
        if not bool((torch.isfinite(least) & (least >= 0)).all()):
            raise InputError("weights must be finite and not negative")
    return _broadcast(x, weights, "weights")


def _broadcast(x: Tensor, given: Tensor, name: str) -> Tensor:
    """A mask or weights as (N, *space)."""
    target = (x.shape[0], *x.shape[2:])
    shaped = given
    if given.ndim == x.ndim and given.ndim > len(target):
        if given.shape[1] != 1:
            raise InputError(
                f"{name} of shape {tuple(given.shape)} differs between channels; expected {target}, or one in place of "
                "the channels"
            )
        shaped = given.squeeze(1)
    try:
        shaped = shaped.expand(target)
    except RuntimeError:
        raise InputError(
            f"{name} of shape {tuple(given.shape)} does not fit an input {tuple(x.shape)}; "
            f"expected {target}, or what broadcasts to it"
        ) from None
    if given.device != x.device:
        raise DtypeError(f"{name} is on {given.device}, the input on {x.device}; move one of them with .to()")
    return shaped
