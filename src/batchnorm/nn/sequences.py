"""Sequences as frames in time order, which a recurrence reads, and the way back to what the user gave.

A padded tensor, with or without lengths or a mask, one sequence alone, a packed sequence and a jagged tensor all become
`Frames`: those of step 0, then those of step 1, ..., and of each step those of the longest sequence first, as in a
`torch.nn.utils.rnn.PackedSequence`. `batchnorm.batch.batch_of_steps` makes of them a batch with a pool for each step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from batchnorm.errors import InputError
from batchnorm.kernels.recurrent import steps_of


@dataclass(frozen=True)
class Frames:
    """The frames of a batch of sequences.

    Attributes:
        data: (frames, features), in time order.
        sizes: the frames of each step, which never rise.
        sequences: how many sequences were given; some may have no frame.
        restore: makes of a result (frames, outputs) the output that belongs to the input.
        order: the sequences that have frames, the longest first; None: all, as they were given.
        is_alone: whether one sequence was given without an axis for the batch.
    """

    data: Tensor
    sizes: list[int]
    sequences: int
    restore: Callable[[Tensor], Any]
    order: Tensor | None = None
    is_alone: bool = False

    def begin(self, state: Tensor) -> Tensor:
        """The state (layers, sequences, H) that was given, in the order of the frames."""
        return state if self.order is None else state.index_select(1, self.order)

    def end(self, state: Tensor, given: Tensor) -> Tensor:
        """The last state in the order of the sequences. Those without a frame end in the state that was given."""
        if self.order is not None:
            state = given.to(state.dtype).index_copy(1, self.order, state)
        return state.squeeze(1) if self.is_alone else state

    def packed(self) -> PackedSequence:
        """The frames as torch.nn's layers read them, without the order of the sequences."""
        return PackedSequence(self.data, torch.tensor(self.sizes))


def frames_of(
    given: Any, lengths: Tensor | Sequence[int] | None, mask: Tensor | None, batch_first: bool, called: str
) -> Frames:
    """The frames of an input.

    Args:
        given: (T, N, features), (N, T, features) if ``batch_first``, (T, features), a `PackedSequence`, or a nested
            tensor (N, *, features) of jagged layout.
        lengths: the valid steps of each sequence, (N,); None: all.
        mask: the same as a boolean (N, T), with the padding last; or None.
        batch_first: see above.
        called: the layer, in errors.

    Raises:
        InputError: an input of other axes or without a step, lengths or a mask that do not fit it.
    """
    told = lengths is not None or mask is not None
    if isinstance(given, Tensor) and given.is_nested:
        if told:
            raise InputError(f"{called}: got lengths or mask beside a nested tensor, which knows its own lengths")
        return _of_jagged(given, called)
    if told and (isinstance(given, PackedSequence) or given.dim() != 3):
        raise InputError(f"{called}: lengths= and mask= belong to a padded input of 3 axes")
    if isinstance(given, PackedSequence):
        return _of_packed(given)
    if told:
        return _of_padded(given, _lengths(given, lengths, mask, batch_first, called), batch_first)
    if given.dim() not in (2, 3):
        raise InputError(f"{called}: expected an input of 2 axes (one sequence) or 3, got {tuple(given.shape)}")
    if given.dim() == 2:
        _check_steps(len(given), given, called)
        return Frames(given, [1] * len(given), 1, lambda y: y, is_alone=True)
    _check_steps(given.shape[1 if batch_first else 0], given, called)
    return _of_equal(given, batch_first)


def reversed_frames(sizes: Sequence[int], device: torch.device) -> Tensor:
    """Where each frame's counterpart lies if every sequence is read from its own end; its own inverse."""
    lasts = [0] * sizes[0]  # the last step of each sequence
    starts = [0]
    for t, size in enumerate(sizes):
        lasts[:size] = [t] * size
        starts.append(starts[-1] + size)
    step = steps_of(sizes, torch.device("cpu"))
    start = torch.tensor(starts)
    row = torch.arange(starts[-1]) - start[step]
    return (start[torch.tensor(lasts, dtype=torch.long)[row] - step] + row).to(device)


def _check_steps(steps: int, given: Tensor, called: str) -> None:
    if not steps:
        raise InputError(f"{called}: expected a step or more, got {tuple(given.shape)}")


def _of_equal(given: Tensor, batch_first: bool) -> Frames:
    """Sequences of one length."""
    x = given.transpose(0, 1) if batch_first else given
    steps, samples, _ = x.shape

    def back(y: Tensor) -> Tensor:
        y = y.unflatten(0, (steps, samples))
        return y.transpose(0, 1) if batch_first else y

    return Frames(x.flatten(0, 1), [samples] * steps, samples, back)


def _of_packed(given: PackedSequence) -> Frames:
    data, sizes, order, unsorted = given
    listed = sizes.tolist()
    return Frames(data, listed, listed[0], lambda y: PackedSequence(y, sizes, order, unsorted), order)


def _of_padded(given: Tensor, lengths: Tensor, batch_first: bool) -> Frames:
    """Sequences of these lengths, (N,) on the CPU; what stands behind them is zero in the output."""
    axis, samples = (0 if batch_first else 1), len(lengths)
    steps = given.shape[1 - axis]
    if not samples:
        return _of_equal(given, batch_first)
    there = None if bool(lengths.all()) else lengths.nonzero().squeeze(1).to(given.device)
    some = given if there is None else given.index_select(axis, there)
    if there is None or len(there):
        kept = lengths if there is None else lengths[lengths > 0]
        packed = pack_padded_sequence(some, kept, batch_first, enforce_sorted=False)
        frames = _of_packed(packed)
        back = _padded_again(frames.restore, batch_first, steps)
    else:
        frames = _of_equal(some, batch_first)
        back = frames.restore
    if there is None:
        return Frames(frames.data, frames.sizes, samples, back, frames.order)

    def spread(y: Tensor) -> Tensor:
        y = back(y)
        shape = [*y.shape]
        shape[axis] = samples
        return y.new_zeros(shape).index_copy(axis, there, y)

    order = there if frames.order is None else there[frames.order]
    return Frames(frames.data, frames.sizes, samples, spread, order)


def _padded_again(
    restore: Callable[[Tensor], PackedSequence], batch_first: bool, steps: int
) -> Callable[[Tensor], Tensor]:
    return lambda y: pad_packed_sequence(restore(y), batch_first, total_length=steps)[0]


def _of_jagged(given: Tensor, called: str) -> Frames:
    if given.layout is not torch.jagged or given.dim() != 3 or given._ragged_idx != 1:  # type: ignore[attr-defined]
        raise InputError(f"{called}: expected a nested tensor (N, *, input) with layout=torch.jagged")
    offsets = given.offsets()  # type: ignore[attr-defined]
    lengths = offsets.diff()
    frames = _of_padded(given.to_padded_tensor(0.0), lengths.cpu(), True)

    def back(y: Tensor) -> Tensor:
        y = frames.restore(y)
        there = torch.arange(y.shape[1], device=y.device) < lengths[:, None]
        return torch.nested.nested_tensor_from_jagged(y[there], offsets)

    return Frames(frames.data, frames.sizes, frames.sequences, back, frames.order)


def _lengths(
    given: Tensor, lengths: Tensor | Sequence[int] | None, mask: Tensor | None, batch_first: bool, called: str
) -> Tensor:
    """The lengths of the sequences of a padded input, (N,) on the CPU."""
    if lengths is not None and mask is not None:
        raise InputError(f"{called}: got lengths and mask, two names for one thing; give one of them")
    samples, steps = given.shape[:2] if batch_first else (given.shape[1], given.shape[0])
    if mask is not None:
        lengths = _lengths_of(mask, (samples, steps), called)
    counts = torch.as_tensor(lengths, dtype=torch.long, device="cpu")
    if counts.shape != (samples,) or not bool(((counts >= 0) & (counts <= steps)).all()):
        raise InputError(
            f"{called}: lengths must be {samples} numbers from 0 to {steps}, those of the input "
            f"{tuple(given.shape)}; got {counts.tolist()}"
        )
    return counts


def _lengths_of(mask: Tensor, shape: tuple[int, int], called: str) -> Tensor:
    """The length of each sequence from a mask (N, T) of valid frames, which come first."""
    if mask.dtype != torch.bool or tuple(mask.shape) != shape:
        raise InputError(f"{called}: mask must be boolean (N, T) = {shape}, got {mask.dtype} {tuple(mask.shape)}")
    lengths = mask.sum(1)
    if not torch.equal(mask, torch.arange(shape[1], device=mask.device) < lengths[:, None]):
        raise InputError(
            f"{called}: the valid frames of a mask must come before the padding, in every sequence; "
            "a recurrence cannot pass over a frame"
        )
    return lengths.cpu()
