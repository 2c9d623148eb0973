"""Recurrences with normalizations inside: schemas, gradients, choice of implementation.

Sequences lie as `batchnorm.kernels.recurrent` says: step t has ``sizes[t]`` rows. The C++ core serves float32 and
float64 on the CPU (16-bit values are taken to float32), and ATen all else: other devices, projections, functorch's
transforms and derivatives of derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.kernels import aten as kernel
from batchnorm.kernels import cpu
from batchnorm.kernels import recurrent as aten
from batchnorm.ops.context import Way, way
from batchnorm.ops.schemas import LIBRARY

_KEPT = {"RNN_TANH": 0, "RNN_RELU": 0, "LSTM": 5, "GRU": 4}  # as in csrc/core/recurrent.h
_SETTINGS = "bool normalize_hh, bool normalize_c, bool population, float eps_hh, float eps_c"

LIBRARY.define(
    "recurrence(int cell, Tensor gates, Tensor sizes, Tensor weight_hh, Tensor? bias_hn, Tensor h0, Tensor? c0,"
    " Tensor? gamma_hh, Tensor? gamma_c, Tensor? beta_c, Tensor? mean_hh, Tensor? var_hh, Tensor? mean_c,"
    f" Tensor? var_c, {_SETTINGS}) -> (Tensor output, Tensor kept, Tensor cells, Tensor hh, Tensor mean_hh,"
    " Tensor var_hh, Tensor mean_c, Tensor var_c)"
)
LIBRARY.define(
    "recurrence_backward(Tensor d_output, Tensor? d_c_n, int cell, Tensor sizes, Tensor weight_hh, Tensor h0,"
    " Tensor? c0, Tensor? gamma_hh, Tensor? gamma_c, Tensor output, Tensor kept, Tensor cells, Tensor hh,"
    f" Tensor mean_hh, Tensor var_hh, Tensor mean_c, Tensor var_c, {_SETTINGS}) -> (Tensor d_gates, Tensor d_hh,"
    " Tensor d_h0, Tensor d_c0, Tensor d_gamma_hh, Tensor d_beta_hh, Tensor d_gamma_c, Tensor d_beta_c)"
)
_ops = torch.ops.batchnorm


def _fake(name: str):  # type: ignore[no-untyped-def]
    return torch.library.register_fake(f"batchnorm::{name}", lib=LIBRARY)


@_fake("recurrence")
def _(cell, gates, sizes, weight_hh, *rest):  # type: ignore[no-untyped-def]
    normalize_hh, normalize_c, population = rest[-5:-2]
    (frames, width), hidden = gates.shape, weight_hh.shape[1]
    kept = _KEPT[aten.CELLS[cell]]
    rows = [len(sizes) if wanted and not population else 0 for wanted in (normalize_hh, normalize_c)]
    return (
        gates.new_empty(frames, hidden),
        gates.new_empty(frames if kept else 0, kept * hidden),
        gates.new_empty(frames if aten.CELLS[cell] == "LSTM" else 0, hidden),
        gates.new_empty(frames if normalize_hh else 0, width),
        *(gates.new_empty(rows[0], width, dtype=torch.float64) for _ in range(2)),
        *(gates.new_empty(rows[1], hidden, dtype=torch.float64) for _ in range(2)),
    )


@_fake("recurrence_backward")
def _(d_output, d_c_n, cell, sizes, weight_hh, h0, *rest):  # type: ignore[no-untyped-def]
    (frames, hidden), width = d_output.shape, len(weight_hh)
    own = rest[-5] or aten.CELLS[cell] == "GRU"
    sums = (d_output.new_empty(n, dtype=torch.float64) for n in (width, width, hidden, hidden))
    return (
        d_output.new_empty(frames, width),
        d_output.new_empty(frames if own else 0, width),
        h0.new_empty(h0.shape),
        h0.new_empty(len(h0) if aten.CELLS[cell] == "LSTM" else 0, hidden),
        *sums,
    )


class StepNormalization(NamedTuple):
    """Normalization of each step's rows: by their own statistics where mean and variance (steps, C) are None."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    mean: Tensor | None = None
    var: Tensor | None = None


class States(NamedTuple):
    """Hidden states (frames, H), the last of each sequence (N, H), and mean and biased variance of each step."""

    output: Tensor
    h_n: Tensor
    c_n: Tensor | None
    of_hh: tuple[Tensor, Tensor] | None = None
    of_c: tuple[Tensor, Tensor] | None = None


def _is_native(x: Tensor) -> bool:
    """Whether the C++ core takes a call with this tensor."""
    return cpu.available() and x.device.type == "cpu" and x.is_floating_point() and way(x) in (Way.EAGER, Way.COMPILED)


def recurrence(call: aten.Recurrence, by_hh: StepNormalization | None, by_c: StepNormalization | None) -> States:
    """The hidden states, with W_hh h (and the cell before its tanh) normalized."""
    cell, gates, sizes, weight_hh, bias_hn, weight_hr, h0, c0 = call
    if weight_hr is not None or not sizes[-1] or not _is_native(gates):
        return _recur_on_aten(call, by_hh, by_c)
    dtype = torch.float64 if weight_hh.dtype == torch.float64 else torch.float32
    gamma_hh, _, eps_hh, *of_hh = by_hh or _NOTHING
    gamma_c, beta_c, eps_c, *of_c = by_c or _NOTHING
    inputs = (gates, weight_hh, bias_hn, h0, c0, gamma_hh, gamma_c, beta_c)
    tensors = (None if x is None else x.to(dtype) for x in inputs)
    output, c_n, *measured = _Recurrence.apply(*tensors, *of_hh, *of_c, cell, sizes, eps_hh, eps_c)
    output, c_n = output.to(gates.dtype), c_n.to(gates.dtype) if cell == "LSTM" else None
    return States(
        output,
        last(output, sizes),
        c_n,
        (measured[0], measured[1]) if by_hh is not None else None,
        (measured[2], measured[3]) if by_c is not None else None,
    )


_NOTHING = (None,) * 5


class _Recurrence(torch.autograd.Function):
    """`recurrence` in the C++ core: output, c_n, and the batch's statistics; eps None: not normalized."""

    @staticmethod
    def forward(
        ctx: Any,
        gates: Tensor,
        weight_hh: Tensor,
        bias_hn: Tensor | None,
        h0: Tensor,
        c0: Tensor | None,
        gamma_hh: Tensor | None,
        gamma_c: Tensor | None,
        beta_c: Tensor | None,
        mean_hh: Tensor | None,
        var_hh: Tensor | None,
        mean_c: Tensor | None,
        var_c: Tensor | None,
        cell: str,
        sizes: Sequence[int],
        eps_hh: float | None,
        eps_c: float | None,
    ) -> tuple[Tensor, ...]:
        number, steps, given = aten.CELLS.index(cell), torch.tensor(sizes), (mean_hh, var_hh, mean_c, var_c)
        population = mean_hh is not None or mean_c is not None
        settings = (eps_hh is not None, eps_c is not None, population, eps_hh or 0.0, eps_c or 0.0)
        inputs = (gates, weight_hh, bias_hn, h0, c0, gamma_hh, gamma_c, beta_c)
        output, kept, cells, hh, *made = _ops.recurrence.default(number, gates, steps, *inputs[1:], *given, *settings)
        used = [own if statistic is None else statistic for own, statistic in zip(made, given, strict=True)]
        ctx.save_for_backward(*inputs, output, steps, kept, cells, hh, *used)
        ctx.call = number, settings, cell, sizes, eps_hh, eps_c
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*made)
        return output, last(cells, sizes).clone() if cell == "LSTM" else cells.new_empty(0), *made

    @staticmethod
    def backward(ctx: Any, d_output: Tensor | None, d_c_n: Tensor | None, *_: Any) -> Any:
        gates, weight_hh, bias_hn, h0, c0, gamma_hh, gamma_c, beta_c, output, steps, *states = ctx.saved_tensors
        number, settings, cell, sizes, eps_hh, eps_c = ctx.call
        inputs = (gates, weight_hh, bias_hn, h0, c0, gamma_hh, gamma_c, beta_c)
        rest = (None,) * 8
        if torch.is_grad_enabled():
            statistics = states[-4:] if settings[2] else (None,) * 4

            def again(*inputs: Any) -> tuple[Tensor, ...]:
                gates, weight_hh, bias_hn, h0, c0, gamma_hh, gamma_c, beta_c = inputs
                of_hh = None if eps_hh is None else StepNormalization(gamma_hh, None, eps_hh, *statistics[:2])
                of_c = None if eps_c is None else StepNormalization(gamma_c, beta_c, eps_c, *statistics[2:])
                call = aten.Recurrence(cell, gates, sizes, weight_hh, bias_hn, None, h0, c0)
                result = _recur_on_aten(call, of_hh, of_c)
                return result.output, output if result.c_n is None else result.c_n

            return *_differentiate(again, inputs, ctx.needs_input_grad, (d_output, d_c_n)), *rest
        d_output = torch.zeros_like(output) if d_output is None else d_output
        d_c_n = d_c_n if cell == "LSTM" else None
        d_gates, d_hh, d_h0, d_c0, d_gamma_hh, d_beta_hh, d_gamma_c, d_beta_c = _ops.recurrence_backward.default(
            d_output, d_c_n, number, steps, weight_hh, h0, c0, gamma_hh, gamma_c, output, *states, *settings
        )
        d_hh = d_hh if len(d_hh) else d_gates
        d_bias = None
        if bias_hn is not None:
            hidden = len(bias_hn)
            d_bias = d_beta_hh[-hidden:] if eps_hh is not None else d_hh[:, -hidden:].sum(0)
        found = (
            d_gates,
            _weight_gradient(d_hh, output, h0, sizes) if ctx.needs_input_grad[1] else None,
            d_bias,
            d_h0,
            d_c0,
            d_gamma_hh,
            d_gamma_c,
            d_beta_c,
        )
        return *(None if x is None or d is None else d.to(x.dtype) for x, d in zip(inputs, found, strict=True)), *rest


def _differentiate(function: Any, inputs: Sequence[Tensor | None], wanted: Sequence[bool], given: Any) -> list[Any]:
    """The gradients of a differentiable function, themselves differentiable."""
    with torch.enable_grad():
        outputs = function(*inputs)
        leaves = [x for x, want in zip(inputs, wanted, strict=False) if want and x is not None]
        pairs = [(y, dy) for y, dy in zip(outputs, given, strict=True) if dy is not None and y.requires_grad]
        found = iter(
            torch.autograd.grad(
                [y for y, _ in pairs], leaves, [dy for _, dy in pairs], create_graph=True, allow_unused=True
            )
        )
    return [next(found) if want and x is not None else None for x, want in zip(inputs, wanted, strict=False)]


def _weight_gradient(d_hh: Tensor, output: Tensor, h0: Tensor, sizes: Sequence[int]) -> Tensor:
    """The sum over all frames of the gradient of W_hh h times the state before: one product."""
    n = sizes[0]
    before = output[:-n] if sizes[-1] == n else output[_rows_before(sizes)]
    return torch.addmm(d_hh[:n].t() @ h0, d_hh[n:].t(), before)


def _rows_before(sizes: Sequence[int]) -> Tensor:
    """Of each frame after the first step, where its sequence's frame before it lies."""
    step = aten.steps_of(sizes, torch.device("cpu"))
    rows = torch.arange(len(step))
    return (rows - torch.tensor([0, *sizes])[step])[sizes[0] :]


def _recur_on_aten(call: aten.Recurrence, by_hh: StepNormalization | None, by_c: StepNormalization | None) -> States:
    of_hh, of_c = _Recorder(by_hh), _Recorder(by_c)
    states, cells = aten.recurrence(call, of_hh, of_c)
    c_n = None if cells is None else last(cells, call.sizes)
    return States(states, last(states, call.sizes), c_n, of_hh.statistics(), of_c.statistics())


class _Recorder:
    """Normalizes step after step, and keeps the statistics."""

    def __init__(self, by: StepNormalization | None) -> None:
        self.by = by
        self.kept: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x: Tensor, t: int) -> Tensor:
        if self.by is None:
            return x
        weight, bias, eps, mean, var = self.by
        settings = (weight, bias, None, 0, eps, "identity", 0.0)
        if mean is not None and var is not None:
            mean, var = mean[t : t + 1], var[t : t + 1]
            y = kernel.normalize(x, mean, var, *settings)
        else:
            y, mean, var = kernel.forward(x, *settings)
        self.kept.append((mean.detach(), var.detach()))
        return y

    def statistics(self) -> tuple[Tensor, Tensor] | None:
        if not self.kept:
            return None
        means, variances = zip(*self.kept, strict=True)
        return torch.cat(means), torch.cat(variances)


def last(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """The row of each sequence's last step, (N, C); of one step x itself, since FSDP warns of views (torch 2.13)."""
    if len(sizes) == 1:
        return x
    if sizes[-1] == sizes[0]:
        return x[-sizes[0] :]
    rows = [0] * sizes[0]
    begin = 0
    for size in sizes:
        rows[:size] = range(begin, begin + size)
        begin += size
    return x[torch.tensor(rows, device=x.device)]
