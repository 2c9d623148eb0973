"""How inputs become the operators' (N, C, *space): masks, weights, sequences, time steps; and the way back.

A packed sequence or a jagged tensor holds the valid frames alone, so all of them are an ordinary dense pool. In time
order the frames of one step stand beside one another, so a step is a pool of as many rows as there are sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from batchnorm.errors import DtypeError, InputError
from batchnorm.ops import autograd
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
        first: the number of the first of them.
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
    first: int = 0


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
        masked, weighed = positions(x, mask, lengths, weights)
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


def frames(x: Tensor, residual: Tensor | None, sizes: Sequence[int], first: int = 0) -> View:
    """Frames (frames, C) in time order, each step a pool: ``sizes[t]`` rows of step ``first + t``."""
    steps, most = len(sizes), max(sizes, default=0)
    if min(sizes, default=0) == most:
        return replace(plain(x, residual), steps=steps, first=first)
    there = (torch.arange(most) < torch.tensor(sizes)[:, None]).flatten()
    index = there.nonzero().squeeze(1).to(x.device)

    def rows(data: Tensor) -> Tensor:
        return data.new_zeros((steps * most, *data.shape[1:])).index_copy(0, index, data)

    added = None if residual is None else rows(residual)
    return View(rows(x), there.to(x.device), None, 1, steps, lambda y: y[index], added, first)


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
        mask = within(lengths, samples, steps, given.device)
        mask = mask if batch_first else mask.t()
    masked, weighed = positions(turned_back, mask, None, weights)
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
    seen = frames(given.data, added, given.batch_sizes.tolist())
    return replace(seen, back=lambda y: back(seen.back(y)))


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
        not torch.compiler.is_compiling()
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
    if not torch.compiler.is_compiling() and not is_traced(x) and not autograd.is_transformed():
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


def is_traced(x: Tensor) -> bool:
    """Whether the call is being recorded for other runtimes, which know ATen's operators but not these."""
    if not isinstance(x, Tensor):  # a proxy of torch.fx
        return True
    return torch.compiler.is_exporting() or bool(torch.jit.is_tracing())  # type: ignore[attr-defined]
