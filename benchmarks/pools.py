"""Training steps of pools: masks, packed sequences, ghost batches and channel groups, beside plain BN of the same
tensors."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import batchnorm as bn

from .oracle import LIMIT, WrongResultError
from .rows import Row
from .timing import Phases, alternate

PLANAR, SEQUENCES = (256, 64, 400), (128, 200, 256)  # (batch, channels, time), (batch, time, channels)
CONVOLUTIONS, DENSE = ((64, 64, 56, 56), (256, 256, 14, 14)), ((8192, 1024),)


@dataclass(frozen=True)
class Pools:
    """One case: `kind` is "masked", "packed", "ghosts" or "groups"; `amount` is the percentage of padding, samples of
    a ghost batch, or the number of groups."""

    kind: str
    shape: tuple[int, ...]
    amount: int
    dtype: str = "float32"
    order: str = "planar"


def cases(quick: bool) -> list[Pools]:
    dtypes, paddings, sizes = ("float32", "bfloat16"), (25, 50, 75), (8, 16, 32, 64)
    padded = [(PLANAR, "planar"), (SEQUENCES, "sequences")]
    masked = [Pools("masked", s, p, d, o) for s, o in padded for d in dtypes for p in paddings]
    packed = [Pools("packed", SEQUENCES, p, d, "sequences") for d in dtypes for p in (0, 75)]
    tensors = [(s, o) for s in CONVOLUTIONS for o in ("planar", "channels_last")] + [(s, "dense") for s in DENSE]
    ghosts = [Pools("ghosts", s, k, "float32", o) for s, o in tensors for k in sizes]
    groups = [Pools("groups", s, 8, "float32", o) for s, o in tensors]
    return [masked[2], masked[8], packed[1], ghosts[1], ghosts[-2]] if quick else masked + packed + ghosts + groups


def measure(case: Pools, seconds: float) -> Iterator[Row]:
    """A row with the time of forward and backward, and `x_plain`, how many times that of plain BN it is."""
    columns = {"suite": "pools", "kind": case.kind, "shape": list(case.shape), "amount": case.amount,
               "dtype": case.dtype, "order": case.order, "contestant": "ours"}  # fmt: skip
    plain, ours, check = _steps(case)
    try:
        error = check()
    except WrongResultError as wrong:
        yield {**columns, "absent": str(wrong)}
        return
    times, rounds = alternate({"plain": _timed(plain), "ours": _timed(ours)}, seconds)
    took = {name: phases["step"] for name, phases in times.items()}
    yield {**columns, "ms": took["ours"] * 1e3, "ms_plain": took["plain"] * 1e3, "rounds": rounds, "error": error,
           "x_plain": took["ours"] / took["plain"], "targets": _judged(case, took["ours"] / took["plain"])}  # fmt: skip


def _judged(case: Pools, ratio: float) -> list[dict[str, Any]]:
    bounds = {("masked", 75): ("75 % padding, of plain", 0.4), ("packed", 75): ("packed, of dense", 1.05)}
    title, bound = bounds.get((case.kind, case.amount), ("ghost batches, of plain", 1.15))
    if (case.kind in ("masked", "packed") and case.amount != 75) or case.kind == "groups":
        return []
    return [{"title": title, "metric": "x_plain", "bound": bound, "met": ratio <= bound}]


def _timed(step: Callable[[], Tensor]) -> Callable[[], Phases]:
    def run() -> Phases:
        begin = time.perf_counter()
        step()
        return {"step": time.perf_counter() - begin}

    return run


def _steps(case: Pools) -> tuple[Callable[[], Tensor], Callable[[], Tensor], Callable[[], float]]:
    """A step of plain BN, one of the pools, and what compares the second with float64 operators."""
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    x, dy = (torch.randn(case.shape).mul_(2).add_(1).to(dtype) for _ in range(2))
    if case.order == "channels_last":
        x, dy = (t.to(memory_format=torch.channels_last) for t in (x, dy))
    sequences = case.order == "sequences"
    channels = case.shape[2] if sequences else case.shape[1]
    kind = bn.BatchNorm2d if len(case.shape) == 4 else bn.BatchNorm1d
    options = {"pool": "sequence"} if sequences else {}

    def step(layer: Any, x: Tensor, dy: Tensor, **given: Tensor) -> Callable[[], Tensor]:
        x.requires_grad_()

        def run() -> Tensor:
            x.grad = None
            y: Tensor = layer(x, **given)
            y.backward(dy)
            return y

        return run

    if case.kind in ("ghosts", "groups"):
        options = {"ghost_size": case.amount} if case.kind == "ghosts" else {"channel_groups": case.amount}
        size = case.amount if case.kind == "ghosts" else case.shape[0]
        groups = case.amount if case.kind == "groups" else channels
        ours = step(kind(channels, **options), x, dy)

        def by_pool() -> float:
            y, errors = ours(), []
            for part, dpart, out, gradient in zip(*(t.split(size) for t in (x, dy, y, x.grad)), strict=True):
                of_group = part.detach().double().requires_grad_()
                right = F.group_norm(of_group.transpose(0, 1).reshape(1, channels, -1), groups, eps=1e-5)
                right = right.reshape(channels, len(part), *part.shape[2:]).transpose(0, 1)
                right.backward(dpart.double())
                errors += [_off(out, right, dtype), _off(gradient, of_group.grad, dtype)]
            return max(errors)

        return step(kind(channels), x, dy), ours, by_pool

    time_axis = 1 if sequences else 2
    steps, padding = case.shape[time_axis], case.amount / 100
    spread = min(padding, 1 - padding)
    share = (1 - padding) + spread * (2 * torch.rand(case.shape[0]) - 1)
    lengths = (share * steps).round().long().clamp(1, steps)
    there = torch.arange(steps) < lengths[:, None]
    if case.kind == "packed":
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        frames = packed.data.detach().clone().requires_grad_()
        sequence = PackedSequence(frames, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
        gradient, layer = torch.randn(frames.shape).to(dtype), bn.BatchNorm1d(channels, pool="sequence")

        def run() -> Tensor:
            frames.grad = None
            y: Tensor = layer(sequence).data
            y.backward(gradient)
            return y

        def of_frames() -> float:
            return _valid_error(run(), frames, gradient, dtype)

        return step(bn.BatchNorm1d(channels), packed.data.detach().clone(), gradient), run, of_frames
    ours = step(bn.BatchNorm1d(channels, **options), x, dy, lengths=lengths)

    def of_valid() -> float:
        y, rows = ours(), [t if sequences else t.transpose(1, 2) for t in (x.detach(), dy, x.grad)]
        y = y if sequences else y.transpose(1, 2)
        if y[~there].any() or rows[2][~there].any():
            raise WrongResultError("ours: padding is not zero, no figure")
        valid = rows[0][there]
        valid.grad = rows[2][there]
        return _valid_error(y[there], valid, rows[1][there], dtype)

    return step(bn.BatchNorm1d(channels, **options), x, dy), ours, of_valid


def _valid_error(y: Tensor, x: Tensor, dy: Tensor, dtype: torch.dtype) -> float:
    """Of y and of x's gradient, all rows of x (frames, C) being one pool."""
    exact = x.detach().double().requires_grad_()
    right = F.batch_norm(exact, None, None, training=True, eps=1e-5)
    right.backward(dy.double())
    assert x.grad is not None
    assert exact.grad is not None
    return max(_off(y, right, dtype), _off(x.grad, exact.grad, dtype))


def _off(given: Tensor, right: Tensor | None, dtype: torch.dtype) -> float:
    assert right is not None
    right = right.detach()
    error = float(((given.detach().double() - right).abs() / (1 + right.abs())).max()) / torch.finfo(dtype).eps
    if not error <= LIMIT:
        raise WrongResultError(f"ours: off by {error:.3g} units in the last place, no figure")
    return error
