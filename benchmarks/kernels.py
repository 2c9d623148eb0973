"""The kernel figures: outputs preallocated, buffers rotated beyond the cache.

torch's backward and everybody's inference have no variant with preallocated outputs (torch's own `out=` computes into
fresh memory and copies). They run with their outputs held in a ring, under a C library that hands freed memory out
again (`REUSING`), so that no figure here contains the cost of fresh pages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import batchnorm.ops  # noqa: F401  (registers the operators)
from batchnorm.kernels import cpu
from batchnorm.ops.schemas import ACTIVATIONS

from . import oracle
from .cases import CONVOLUTIONS, DENSE, EPS, SMALL, Case, draw, grid
from .machine import cache_bytes
from .rows import Row, compare
from .timing import alternate, rotating

REUSING = {
    "GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776:glibc.malloc.top_pad=67108864"
}
"""The environment that these figures need: freed memory is kept and used again, pages are touched once."""

_ops, _aten = torch.ops.batchnorm, torch.ops.aten
Call = Callable[[int], Any]


@dataclass(frozen=True, eq=False)
class Set:
    """One of the sets of buffers that are rotated."""

    x: Tensor
    dy: Tensor
    out: Tensor


class Kernels:
    """The contestants of a case as calls on the i-th set, and what they make of the first."""

    def __init__(self, case: Case) -> None:
        self.case, self.data = case, draw(case)
        self.count = min(max(2, -(-max(4 * cache_bytes(), 256 << 20) // (3 * case.bytes))), 64)
        first = Set(self.data.x, self.data.dy, torch.empty_like(self.data.x))
        others = [Set(*(t.clone() for t in (first.x, first.dy, first.out))) for _ in range(self.count - 1)]
        self.sets = [first, *others]
        self.ring: list[Any] = [None] * self.count
        channels = self.data.x.shape[1]
        self.mean, self.var, self.sum, self.centered = torch.empty(4, 1, 1, channels, dtype=torch.float64)
        self.saved = torch.empty(2, channels)
        self.population = torch.zeros(channels), torch.ones(channels)
        self.activation = ACTIVATIONS.index(case.activation or "identity")

    def of(self, direction: str) -> dict[str, Call]:
        """The limit first: "copy", or "add" for a pass that reads two tensors."""
        if direction == "forward":
            return {"copy": self.copy, "torch": self.torch_forward, "ours": self.forward}
        if direction == "backward":
            self.torch_forward(0)  # the statistics
            self.forward(0)
            return {"add": self.add, "torch": self.torch_backward, "ours": self.backward}
        return {"copy": self.copy, "torch": self.torch_inference, "ours": self.inference}

    def result(self, name: str, direction: str) -> dict[str, Tensor]:
        """What the contestant's call on the first set has made."""
        if direction == "forward":
            return {"y": self.sets[0].out}
        if direction == "inference":
            return {"y": self.ring[0]}
        if name == "torch":
            dx, d_weight, d_bias = self.ring[0]
            return {"dx": dx, "weight": d_weight, "bias": d_bias}
        return {
            "dx": self.sets[0].out,
            "weight": (self.centered / (self.var + EPS).sqrt()).flatten(),
            "bias": self.sum.flatten(),
        }

    def copy(self, i: int) -> None:
        self.sets[i].out.copy_(self.sets[i].x)

    def add(self, i: int) -> None:
        torch.add(self.sets[i].x, self.sets[i].dy, out=self.sets[i].out)

    def torch_forward(self, i: int) -> None:
        s, d = self.sets[i], self.data
        _aten.native_batch_norm.out(
            s.x, d.weight, d.bias, None, None, True, 0.1, EPS, out=s.out, save_mean=self.saved[0],
            save_invstd=self.saved[1],
        )  # fmt: skip

    def forward(self, i: int) -> None:
        s, d = self.sets[i], self.data
        _ops.forward_out.default(
            s.x, d.weight, d.bias, None, s.out, self.mean[0], self.var[0], 0, EPS, self.activation, 0.0
        )

    def torch_backward(self, i: int) -> None:
        s, d = self.sets[i], self.data
        self.ring[i] = _aten.native_batch_norm_backward.default(
            s.dy, s.x, d.weight, None, None, self.saved[0], self.saved[1], True, EPS, [True, True, True]
        )

    def backward(self, i: int) -> None:
        s, d = self.sets[i], self.data
        _ops.backward_out.default(
            s.dy, s.x, d.weight, d.bias, self.mean[0], self.var[0], s.out, self.sum[0], self.centered[0], 0, EPS,
            self.activation, 0.0,
        )  # fmt: skip

    def torch_inference(self, i: int) -> None:
        d = self.data
        y = torch.batch_norm(self.sets[i].x, d.weight, d.bias, *self.population, False, 0.1, EPS, False)
        self.ring[i] = torch.relu_(y)

    def inference(self, i: int) -> None:
        d = self.data
        self.ring[i] = _ops.normalize.default(
            self.sets[i].x, *self.population, d.weight, d.bias, None, 0, EPS, self.activation, 0.0, False
        )[0]


def measure(case: Case, directions: tuple[str, ...], seconds: float) -> Iterator[Row]:
    """The rows of a case: of the contestants whose result is right."""
    kernels = Kernels(case)
    with torch.no_grad():
        for direction in directions:
            calls = kernels.of(direction)
            errors, failed = {}, []
            for name, call in list(calls.items())[1:]:
                call(0)
                try:
                    errors[name] = oracle.check(case, name, kernels.result(name, direction), direction == "inference")
                except oracle.WrongResultError as wrong:
                    failed.append({"contestant": name, "absent": str(wrong)})
                    del calls[name]
            kernels.ring = [None] * kernels.count
            runs = {name: rotating(call, kernels.count, direction) for name, call in calls.items()}
            # Each buffer of a ring has to be there before a figure is without its pages.
            for run in runs.values():
                for _ in range(kernels.count):
                    run()
            times, rounds = alternate(runs, seconds)
            columns = {"suite": "kernel", **case.columns(), "direction": direction, "rounds": rounds}
            yield from compare(columns, times, errors, limit=next(iter(calls)))
            yield from ({**columns, **each} for each in failed)


def cases(quick: bool) -> list[tuple[Case, tuple[str, ...]]]:
    """Training of every shape, and inference with an activation of the convolutions'."""
    both, dtypes = ("forward", "backward"), ("float32", "bfloat16")
    shapes = (CONVOLUTIONS[2], DENSE) if quick else (*CONVOLUTIONS, DENSE, *SMALL)
    training = [(case, both) for case in grid(shapes, dtypes, ("bn",))]
    convolutions = CONVOLUTIONS[2:3] if quick else CONVOLUTIONS
    return training + [(case, ("inference",)) for case in grid(convolutions, dtypes, ("bn+relu",))]


def available() -> str | None:
    """None, or why there are no kernel figures."""
    return None if cpu.available() else f"kernel figures need the native library: {cpu.error}"
