"""Recurrences, and normalization with a pool for each time step: schemas, gradients, choice of implementation.

Sequences lie as `batchnorm.kernels.recurrent` says: step t has ``sizes[t]`` rows. The C++ core serves float32 and
float64 on the CPU (16-bit values are taken to float32), and ATen all else: other devices, projections, functorch's
transforms and derivatives of derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from batchnorm.kernels import cpu
from batchnorm.kernels import recurrent as aten
from batchnorm.ops.schemas import LIBRARY

_KEPT = {"RNN_TANH": 0, "RNN_RELU": 0, "LSTM": 5, "GRU": 4}  # as in csrc/core/recurrent.h
_SETTINGS = "bool normalize_hh, bool normalize_c, bool population, float eps_hh, float eps_c"

LIBRARY.define(
    "normalize_steps(Tensor x, Tensor sizes, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, float eps)"
    " -> (Tensor y, Tensor mean, Tensor var)"
)
LIBRARY.define(
    "normalize_steps_backward(Tensor dy, Tensor x, Tensor sizes, Tensor? weight, Tensor mean, Tensor var, float eps,"
    " bool population) -> (Tensor dx, Tensor d_weight, Tensor d_bias)"
)
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


@_fake("normalize_steps")
def _(x, sizes, weight, bias, mean, var, eps):  # type: ignore[no-untyped-def]
    shape = (len(sizes), x.shape[1]) if mean is None else (0, 0)
    return (x.new_empty(x.shape), *(x.new_empty(shape, dtype=torch.float64) for _ in range(2)))


@_fake("normalize_steps_backward")
def _(dy, x, *rest):  # type: ignore[no-untyped-def]
    return (x.new_empty(x.shape), *(x.new_empty(x.shape[1], dtype=torch.float64) for _ in range(2)))


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


class Recurrence(NamedTuple):
    """Hidden states (frames, H), the last of each sequence (N, H), and mean and biased variance of each step."""

    output: Tensor
    h_n: Tensor
    c_n: Tensor | None
    of_hh: tuple[Tensor, Tensor] | None = None
    of_c: tuple[Tensor, Tensor] | None = None


def _is_native(x: Tensor) -> bool:
    """Whether the C++ core takes a call with this tensor."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False
    transformed = forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
    return cpu.available() and x.device.type == "cpu" and x.is_floating_point() and not transformed


# ---------------------------------------------------------------------------------------- normalization by step


def statistics(x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each step, (steps, C)."""
    return aten.step_statistics(x, sizes)


def normalize_steps(x: Tensor, sizes: Sequence[int], by: StepNormalization) -> tuple[Tensor, Tensor, Tensor]:
    """y, and the mean and biased variance (steps, C) that normalized."""
    if not _is_native(x):
        return _normalize_on_aten(x, sizes, by)
    wide = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
    weight, bias = (None if v is None else v.to(wide) for v in (by.weight, by.bias))
    measured: list[Tensor] = []
    y: Tensor = _NormalizeSteps.apply(x.to(wide), weight, bias, by, sizes, measured)
    return y.to(x.dtype), measured[0], measured[1]


def _normalize_on_aten(x: Tensor, sizes: Sequence[int], by: StepNormalization) -> tuple[Tensor, Tensor, Tensor]:
    weight, bias, eps, mean, var = by
    if mean is None or var is None:
        mean, var = aten.step_statistics(x, sizes)
    return aten.normalize_steps(x, sizes, mean, var, weight, bias, eps), mean.detach(), var.detach()


class _NormalizeSteps(torch.autograd.Function):
    """`normalize_steps` in the C++ core; mean and variance go into a list."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        by: StepNormalization,
        sizes: Sequence[int],
        measured: list[Tensor],
    ) -> Tensor:
        y, mean, var = _ops.normalize_steps.default(x, torch.tensor(sizes), weight, bias, by.mean, by.var, by.eps)
        if by.mean is not None and by.var is not None:
            mean, var = by.mean, by.var
        ctx.save_for_backward(x, weight, bias)
        ctx.call = by, sizes, mean, var
        measured += (mean, var)
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        by, sizes, mean, var = ctx.call
        inputs = ctx.saved_tensors
        if torch.is_grad_enabled():

            def again(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
                return _normalize_on_aten(x, sizes, by._replace(weight=weight, bias=bias))[0]

            return *_differentiate(again, inputs, ctx.needs_input_grad, (dy,)), None, None, None
        x, weight, bias = inputs
        dx, d_weight, d_bias = _ops.normalize_steps_backward.default(
            dy, x, torch.tensor(sizes), weight, mean, var, by.eps, by.mean is not None
        )
        d_weight = None if weight is None else d_weight.to(x.dtype)
        return dx, d_weight, None if bias is None else d_bias.to(x.dtype), None, None, None


def _differentiate(function: Any, inputs: Sequence[Tensor | None], wanted: Sequence[bool], given: Any) -> list[Any]:
    """The gradients of a differentiable function, themselves differentiable."""
    with torch.enable_grad():
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        leaves = [x for x, want in zip(inputs, wanted, strict=False) if want and x is not None]
        pairs = [(y, dy) for y, dy in zip(outputs, given, strict=True) if dy is not None and y.requires_grad]
        found = iter(
            torch.autograd.grad(
                [y for y, _ in pairs], leaves, [dy for _, dy in pairs], create_graph=True, allow_unused=True
            )
        )
    return [next(found) if want and x is not None else None for x, want in zip(inputs, wanted, strict=False)]


# ---------------------------------------------------------------------------------------- recurrences


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
    if weight_hr is not None or not _is_native(gates):
        return _recur_on_aten(cell, gates, sizes, weight_hh, bias_hn, weight_hr, h0, c0, by_hh, by_c)
    dtype = torch.float64 if weight_hh.dtype == torch.float64 else torch.float32
    tensors = (gates, weight_hh, bias_hn, h0, c0, *_affine(by_hh)[:1], *_affine(by_c))
    measured: list[Tensor] = []
    output, c_n = _Recurrence.apply(
        *(None if x is None else x.to(dtype) for x in tensors), cell, sizes, by_hh, by_c, measured
    )
    output, c_n = output.to(gates.dtype), c_n.to(gates.dtype) if cell == "LSTM" else None
    return Recurrence(
        output,
        last(output, sizes),
        c_n,
        (measured[0], measured[1]) if by_hh is not None else None,
        (measured[2], measured[3]) if by_c is not None else None,
    )


def _affine(by: StepNormalization | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if by is None else (by.weight, by.bias)


class _Recurrence(torch.autograd.Function):
    """`recurrence` in the C++ core: output and c_n; the statistics go into a list."""

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
        cell: str,
        sizes: Sequence[int],
        by_hh: StepNormalization | None,
        by_c: StepNormalization | None,
        measured: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        steps = torch.tensor(sizes)
        given = [statistic for by in (by_hh, by_c) for statistic in ((None, None) if by is None else (by.mean, by.var))]
        population = any(statistic is not None for statistic in given)
        eps = [0.0 if by is None else by.eps for by in (by_hh, by_c)]
        settings = (by_hh is not None, by_c is not None, population, *eps)
        number = aten.CELLS.index(cell)
        output, kept, cells, hh, *made = _ops.recurrence.default(
            number, gates, steps, weight_hh, bias_hn, h0, c0, gamma_hh, gamma_c, beta_c, *given, *settings
        )
        used = [own if statistic is None else statistic for own, statistic in zip(made, given, strict=True)]
        measured += used
        ctx.save_for_backward(gates, weight_hh, bias_hn, h0, c0, gamma_hh, gamma_c, beta_c, output)
        ctx.call = cell, sizes, by_hh, by_c
        ctx.kernel = number, steps, settings, (kept, cells, hh, *used)
        ctx.set_materialize_grads(False)
        # Not `cells` itself, which the context holds: an output there would hold its context in turn.
        return output, last(cells, sizes).clone() if cell == "LSTM" else cells.new_empty(0)

    @staticmethod
    def backward(ctx: Any, d_output: Tensor | None, d_c_n: Tensor | None) -> Any:
        *inputs, output = ctx.saved_tensors
        cell, sizes, by_hh, by_c = ctx.call
        if torch.is_grad_enabled():

            def again(*inputs: Any) -> tuple[Tensor, ...]:
                gates, weight_hh, bias_hn, h0, c0, gamma_hh, gamma_c, beta_c = inputs
                of_hh = by_hh and by_hh._replace(weight=gamma_hh)
                of_c = by_c and by_c._replace(weight=gamma_c, bias=beta_c)
                result = _recur_on_aten(cell, gates, sizes, weight_hh, bias_hn, None, h0, c0, of_hh, of_c)
                return result.output, output if result.c_n is None else result.c_n

            return *_differentiate(again, inputs, ctx.needs_input_grad, (d_output, d_c_n)), *(None,) * 5
        _, weight_hh, bias_hn, h0, c0, gamma_hh, gamma_c, _ = inputs
        number, steps, settings, saved = ctx.kernel
        d_output = torch.zeros_like(output) if d_output is None else d_output
        d_c_n = d_c_n if cell == "LSTM" else None
        d_gates, d_hh, d_h0, d_c0, d_gamma_hh, d_beta_hh, d_gamma_c, d_beta_c = _ops.recurrence_backward.default(
            d_output, d_c_n, number, steps, weight_hh, h0, c0, gamma_hh, gamma_c, output, *saved, *settings
        )
        d_hh = d_hh if len(d_hh) else d_gates
        d_bias = None
        if bias_hn is not None:
            hidden = len(bias_hn)
            d_bias = d_beta_hh[-hidden:] if by_hh is not None else d_hh[:, -hidden:].sum(0)
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
        return *(None if x is None or d is None else d.to(x.dtype) for x, d in zip(inputs, found, strict=True)), *(
            None,
        ) * 5


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


def _recur_on_aten(
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
        y, mean, var = _normalize_on_aten(x, [len(x)], by)
        self.kept.append((mean, var))
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
    rows = [0] * sizes[0]
    begin = 0
    for size in sizes:
        rows[:size] = range(begin, begin + size)
        begin += size
    return x[torch.tensor(rows, device=x.device)]
