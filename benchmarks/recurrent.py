"""Training steps of recurrent layers: torch.nn's, ours in each form, loops over a cell written in PyTorch, and the
matrix products that all of them need."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm as bn

from .rows import Row, compare
from .targets import judge
from .timing import Phases, alternate

FORMS: dict[str, dict[str, Any]] = {
    "ours sequence": {"batch_norm": "sequence"},
    "ours frame": {"batch_norm": "frame"},
    "ours recurrent": {"batch_norm": "frame", "recurrent": True},
}
LOOPS = {"loop sequence": "ours sequence", "loop frame": "ours frame", "loop recurrent": "ours recurrent"}
HOISTED = "loop recurrent, W_ih x before it"
PRODUCTS = "matrix products"


@dataclass(frozen=True)
class Size:
    """Sequences in a batch, their steps, and units, which the input has as many of."""

    samples: int = 64
    steps: int = 100
    hidden: int = 128

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.steps, self.samples, self.hidden


def cases(quick: bool) -> list[tuple[str, Size, str | None]]:
    """Cell, size, and what grows, if anything does."""
    found: list[tuple[str, Size, str | None]] = [("LSTM", Size(), None)]
    if quick:
        return found
    found += [(cell, Size(), None) for cell in ("GRU", "RNN")]
    found += [("LSTM", Size(steps=steps), "steps") for steps in (10, 25, 100, 200, 1000)]
    found += [("LSTM", Size(samples=samples), "samples") for samples in (16, 256)]
    found += [("LSTM", Size(hidden=hidden), "hidden") for hidden in (32, 64, 256)]
    return found + [("LSTM", Size(steps=steps, hidden=hidden), "hidden") for steps, hidden in ((25, 512), (10, 1024))]


class Loop(nn.Module):
    """The same as one of ours, as one writes it in PyTorch: a loop over a cell, with statistics kept as torch does.

    The cell normalizes as in published code of Cooijmans et al.: both products inside, statistics of each step. For
    "sequence" the product with the input and its normalization must come before the loop; ``hoisted``: the product
    alone does.
    """

    def __init__(self, layer: bn.LSTM, hoisted: bool = False) -> None:
        super().__init__()
        self.layer, self.recurrent = layer, layer.options.recurrent
        self.by_sequence = layer.options.batch_norm == "sequence"
        self.hoisted = hoisted or self.by_sequence

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        layer = self.layer
        h, c = x.new_zeros(2, x.shape[1], layer.hidden_size)
        if self.hoisted:
            x = x @ layer.weight_ih_l0.t()
        if self.by_sequence:
            x = self._normalize(x.flatten(0, 1), layer.norm_ih_l0).unflatten(0, x.shape[:2])
        outputs = []
        for t, frame in enumerate(x):
            h, c = self._cell(frame, h, c, t)
            outputs.append(h)
        return torch.stack(outputs), None

    def _cell(self, x: Tensor, h: Tensor, c: Tensor, t: int) -> tuple[Tensor, Tensor]:
        layer = self.layer
        of_state = h @ layer.weight_hh_l0.t()
        if not self.hoisted:
            x = x @ layer.weight_ih_l0.t()
        if not self.by_sequence:
            x = self._normalize(x, layer.norm_ih_l0, t)
        if self.recurrent:
            of_state = self._normalize(of_state, layer.norm_hh_l0, t)
        i, f, g, o = (x + of_state).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        shown = self._normalize(c, layer.norm_c_l0, t) if self.recurrent else c
        return torch.sigmoid(o) * torch.tanh(shown), c

    @staticmethod
    def _normalize(x: Tensor, norm: nn.Module, t: int | None = None) -> Tensor:
        mean, var = (v if t is None else v[t] for v in (norm.running_mean, norm.running_var))
        return F.batch_norm(x, mean, var, norm.weight, norm.bias, True, norm.momentum, norm.eps)


def build(cell: str, hidden: int) -> dict[str, nn.Module]:
    """The contestants."""
    torch.manual_seed(0)
    found: dict[str, nn.Module] = {"torch": getattr(nn, cell)(hidden, hidden)}
    for name, options in FORMS.items():
        found[name] = getattr(bn, cell)(hidden, hidden, max_steps=1000, **options)
    if cell == "LSTM":
        found |= {name: Loop(found[of]) for name, of in LOOPS.items()}
        found[HOISTED] = Loop(found["ours recurrent"], hoisted=True)
    return found


def agree(cell: str) -> dict[str, float]:
    """How far each form's gradient of the input is from float64's, relative; torch's own beside it."""
    x = torch.randn(20, 16, 32)
    dy = torch.randn(20, 16, 32)

    def gradient(net: nn.Module, dtype: torch.dtype) -> Tensor:
        given = x.detach().clone().to(dtype).requires_grad_()
        net.to(dtype)(given)[0].backward(dy.to(dtype))
        assert given.grad is not None
        return given.grad.double()

    found = {}
    for name, net in build(cell, 32).items():
        narrow, true = gradient(net, torch.float32), gradient(net, torch.float64)
        found[name] = float((narrow - true).norm() / true.norm())
    return found


def measure(cell: str, size: Size, axis: str | None, seconds: float) -> Iterator[Row]:
    """The rows of a cell: of the contestants whose gradients are as float64's."""
    columns = {"suite": "recurrent", "cell": cell, "shape": list(size.shape), "dtype": "float32", "order": "dense"}
    if axis:
        columns["axis"] = axis
    errors = agree(cell)
    x, dy = torch.randn(size.shape), torch.randn(size.shape)
    runs: dict[str, Callable[[], Phases]] = {}
    for name, net in build(cell, size.hidden).items():
        if errors[name] <= 1e-5:
            runs[name] = _timed(net, x, dy)
        else:
            yield {
                **columns,
                "contestant": name,
                "absent": f"{name}: gradients are off by {errors[name]:.3g}, no figure",
            }
    limit = PRODUCTS if cell == "LSTM" else None
    wrong = {name: errors[name] for name in runs}
    if limit:
        runs[limit] = _products(size)
    times, rounds = alternate(runs, seconds, least=3)
    for row in compare({**columns, "rounds": rounds}, times, wrong, limit):
        loop = next((loop for loop, of in LOOPS.items() if of == row["contestant"] and loop in times), None)
        if loop is not None:
            row["x_loop"] = times[loop]["step"] / (row["ms"] / 1e3)
        yield {**row, "targets": judge(row)}


def _timed(net: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], Phases]:
    def run() -> Phases:
        net.zero_grad()
        begin = time.perf_counter()
        net(x)[0].backward(dy)
        return {"step": time.perf_counter() - begin}

    return run


def _products(size: Size) -> Callable[[], Phases]:
    """The five matrix products of a training step of an LSTM, those of all steps at once where they can be."""
    steps, samples, hidden = size.shape
    x, h = torch.randn(2, steps * samples, hidden)
    gates, weight = torch.randn(steps * samples, 4 * hidden), torch.randn(4 * hidden, hidden)
    of_weight = torch.empty_like(weight)

    def run() -> Phases:
        begin = time.perf_counter()
        torch.mm(x, weight.t(), out=gates)
        for z, y in zip(gates.split(samples), h.split(samples), strict=True):
            torch.mm(y, weight.t(), out=z)
        for z, y in zip(gates.split(samples), h.split(samples), strict=True):
            torch.mm(z, weight, out=y)
        for y in (x, h):
            torch.mm(gates.t(), y, out=of_weight)
        took = time.perf_counter() - begin
        h.normal_(std=0.1)  # or the values would grow
        return {"step": took}

    return run
