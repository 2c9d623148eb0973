"""How inputs of a layer become the operators' (N, C, *space): sequences, their lengths, time steps; and the way back.

A packed sequence or a jagged tensor holds the valid frames alone, so all of them are an ordinary dense pool. In time
order the frames of one step stand beside one another, so a step is a pool of as many rows as there are sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from batchnorm import functional
from batchnorm.errors import InputError
from batchnorm.pools import Pool, all_reduce_max

POOLS = (None, "sequence", "frame")


@dataclass(frozen=True)
class View:
    """An input as the operators see it.

    Attributes:
        x: (N, C, *space), or frames (frames, C).
        mask: its valid positions, or None.
        weights: how often each counts, or None.
        scale: rows of x that a sample of the layer's input is (a ghost batch counts samples).
        steps: time steps that x holds one after the other, where each is a pool; else 0.
        back: makes of a result like x what the layer returns.
        residual: as x, or None.
    """

    x: Tensor
    mask: Tensor | None
    weights: Tensor | None
    scale: int
    steps: int
    back: Callable[[Tensor], Any]
    residual: Tensor | None = None


def view(
    given: Any,
    residual: Any,
    mask: Tensor | None,
    lengths: Tensor | None,
    weights: Tensor | None,
    pool: str | None,
    batch_first: bool,
    ghosts: bool,
) -> View:
    """The view of an input: a tensor, a `PackedSequence`, or a nested tensor of jagged layout."""
    if isinstance(given, PackedSequence) or given.is_nested:
        extra = {"mask": mask, "lengths": lengths}
        name = next((name for name, value in extra.items() if value is not None), None)
        if name is not None:
            raise InputError(f"got {name} beside a {type(given).__name__}, which knows its own lengths; leave it out")
        if weights is not None:
            raise InputError(f"got weights beside a {type(given).__name__}; give a padded tensor with lengths instead")
    if isinstance(given, PackedSequence):
        return _packed(given, residual, pool)
    if given.is_nested:
        return _jagged(given, residual, pool)
    if pool is None:
        x = given
        masked, weighed = functional.positions(x, mask, lengths, weights)
        return replace(plain(x, residual), mask=masked, weights=weighed)
    return _padded(given, residual, mask, lengths, weights, pool, batch_first, ghosts)


def equal_steps(seen: View, pool: Pool) -> View:
    """The same with as many time steps as the rank that has the most; the others' are not valid."""
    most = all_reduce_max(seen.steps, pool, seen.x.device)
    samples = max(len(seen.x) // seen.steps, 1) if seen.steps else 1
    missing = most * samples - len(seen.x)
    if not missing:
        return seen

    def padded(t: Tensor | None) -> Tensor | None:
        # Not torch.cat, which takes an empty vector out of the graph: this rank would miss a collective backward.
        return None if t is None else F.pad(t, (*(0, 0) * (t.ndim - 1), 0, missing))

    mask = seen.x.new_ones(len(seen.x), dtype=torch.bool) if seen.mask is None else seen.mask
    x = padded(seen.x)
    assert x is not None
    residual, weights = padded(seen.residual), padded(seen.weights)
    return replace(seen, x=x, residual=residual, mask=padded(mask), weights=weights, steps=most)


def plain(x: Tensor, residual: Tensor | None) -> View:
    """An input (N, C, *space) as it is."""
    return View(x, None, None, 1, 0, _same, residual)


def _same(y: Tensor) -> Tensor:
    return y


def _padded(
    given: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    weights: Tensor | None,
    pool: str,
    batch_first: bool,
    ghosts: bool,
) -> View:
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
        mask = functional.within(lengths, samples, steps, given.device)
        mask = mask if batch_first else mask.t()
    masked, weighed = functional.positions(turned_back, mask, None, weights)
    by_time = pool == "frame"
    turned = batch_first if by_time else ghosts and not batch_first  # what is one pool must stand together

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
    return View(x, rows(masked), rows(weighed), 1 if by_time else steps, steps if by_time else 0, back, rows(residual))


def _packed(given: PackedSequence, residual: Any, pool: str | None) -> View:
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
        return View(given.data, None, None, 1, 0, back, added)
    sizes = given.batch_sizes
    steps, most = len(sizes), int(sizes[0])
    there = (torch.arange(most) < sizes[:, None]).flatten().to(given.data.device)
    index = there.nonzero().squeeze(1)

    def rows(data: Tensor) -> Tensor:
        padded = data.new_zeros((steps * most, *data.shape[1:]))
        return padded.index_copy(0, index, data)

    return View(
        rows(given.data), there, None, 1, steps, lambda y: back(y[index]), None if added is None else rows(added)
    )


def _jagged(given: Tensor, residual: Tensor | None, pool: str | None) -> View:
    if given.layout is not torch.jagged:
        raise InputError("got a nested tensor of strided layout; make it with layout=torch.jagged")
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

    return View(values(given), None, None, 1, 0, back, None if residual is None else values(residual))
