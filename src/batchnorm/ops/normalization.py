"""Normalization by the operators: each function looks at the way of the call once and takes what serves it."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from batchnorm.kernels import aten, cpu
from batchnorm.ops import autograd, generated, recomputation
from batchnorm.ops.autograd import Settings
from batchnorm.ops.by_torch import by_torch
from batchnorm.ops.context import Way, is_compiled, is_in_forward_mode, is_recorded, is_traced_by_jit, way
from batchnorm.ops.fusion import Fusion
from batchnorm.ops.schemas import ACTIVATIONS
from batchnorm.pools import Pool, Pools, merge_moments

_NARROW = (torch.bfloat16, torch.float16)
_KINDS: dict[str | None, int] = {None: 0, **{name: index for index, name in enumerate(ACTIVATIONS)}}


class Normalized(NamedTuple):
    """An output, and the statistics of every pool that made it: mean and biased variance, (pools, C).

    ``counts`` are the numbers (or weights) of the values of every pool, (pools, C), where they were made on the way.
    """

    y: Tensor
    mean: Tensor
    var: Tensor
    counts: Tensor | None = None


Convolution = tuple[Any, ...]
"""x, kernels, bias, stride, padding and dilation of a depthwise convolution, and `Arguments` of a layer before it."""

Windows = tuple[Any, ...]
"""x, kernel size, stride and padding of windows; whether sizes are rounded up; whether means are asked, or the largest
values."""

Input = Tensor | list[Tensor] | Convolution | Windows
"""The input of a call: as it is; in parts along the channels; with a depthwise convolution before or windows behind."""


class Beside(NamedTuple):
    """What few calls in C++ have: which positions are valid, channels that share statistics, or renormalization.

    Attributes:
        mask: boolean (N, *space), or what broadcasts to it.
        lengths: integers (N,), the valid lengths of the last axis, in place of a mask.
        frames: of each sample, where x holds the frames of sequences; negative where time comes first.
        groups: of adjacent channels that share statistics; 0: each channel is alone.
        r, d: buffers (C,) of renormalization, which take in the corrections of this batch.
        r_max, d_max: their limits; None: the buffers hold the corrections already.
    """

    mask: Tensor | None = None
    lengths: Tensor | None = None
    frames: int = 0
    groups: int = 0
    r: Tensor | None = None
    d: Tensor | None = None
    r_max: float | None = None
    d_max: float | None = None


Arguments = tuple[Any, ...]
"""Those of `in_one_call`, in its order."""

_ACTIVATION = 10


def in_codes(arguments: Arguments) -> Arguments | None:
    """The arguments as C++ takes them, with a number for the activation; None for one that it does not know."""
    kind = _KINDS.get(arguments[_ACTIVATION])
    return None if kind is None else (*arguments[:_ACTIVATION], kind, *arguments[_ACTIVATION + 1 :])


def in_one_call(
    x: Input,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    carry: Tensor | None,
    momentum: float | None,
    eps: float,
    activation: str | None,
    slope: float,
    use_batch: bool,
    update: bool,
    pool_size: int = 0,
    keep: bool | None = None,
    unbiased: bool = True,
    skipped: Tensor | None = None,
    beside: Beside | None = None,
) -> Tensor | None:
    """A plain eager call on the CPU as one call of C++: y, or None, with nothing done, where this is no such call.

    ``keep`` says whether the output is kept for the backward (None: except in `recompute_outputs`); ``unbiased``, which
    variance the running one takes in; ``skipped`` counts the batches that are refused because they are not finite
    (None: none are); ``beside`` holds what few calls have.

    C++ raises no errors about its arguments: it returns None, and the way through Python raises them. If this torch has
    no such function in C++, torch's own operator takes small calls.
    """
    if is_compiled():
        return None
    if cpu.call is None:
        if pool_size or not isinstance(x, Tensor) or skipped is not None or beside is not None:
            return None
        if not (unbiased and x.numel() < cpu.torch_below):
            return None
        return by_torch(
            x, residual, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps, activation, slope,
            use_batch, update,
        )  # fmt: skip
    kind = _KINDS.get(activation)
    if kind is None:
        return None
    y: Tensor | None = cpu.call(
        x, residual, weight, bias, running_mean, running_var, num_batches_tracked, carry, momentum, eps, kind, slope,
        use_batch, update, pool_size, keep, unbiased, skipped, beside,
    )  # fmt: skip
    return y


def in_one_node(
    x: Tensor,
    fusion: Fusion,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_batch: bool,
    momentum: float,
) -> Tensor:
    """The same call for a recorder: `torch.nn.functional.batch_norm`, and what is fused as operations of its own."""
    if use_batch and is_traced_by_jit():
        x = _checked_when_run(x)
    weight, bias = fusion.weight, fusion.bias
    own = [t for t in (weight, bias) if t is not None] or [x]
    narrow = any(isinstance(t, Tensor) and t.dtype in _NARROW for t in own)
    if narrow and running_mean is not None and running_mean.dtype is torch.float32:
        # torch wants all four vectors alike; and where x is not like them, exporters to ONNX that fuse the layer into a
        # convolution make weights of float32 beside inputs of float16.
        weight, bias = (t.float() if isinstance(t, Tensor) else t for t in (weight, bias))
        y = F.batch_norm(x.float(), running_mean, running_var, weight, bias, use_batch, momentum, fusion.eps)
        return finish(y.type_as(x), fusion)
    y = F.batch_norm(x, running_mean, running_var, weight, bias, use_batch, momentum, fusion.eps)
    return finish(y, fusion)


def _checked_when_run(x: Tensor) -> Tensor:
    """x, and in what torch.jit.trace records a check of each later batch: a trace does not keep those in Python."""
    global _check
    if _check is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is deprecated, and so is this recorder
            _check = torch.jit.script(_more_than_one_value)
    checked: Tensor = _check(x)
    return checked


_check: Any = None


def _more_than_one_value(x: Tensor) -> Tensor:
    if x.numel() == x.size(1):
        raise ValueError("Expected more than 1 value per channel when training")
    return x


def count_one(batches: Tensor, x: Tensor | fx.Proxy) -> None:
    """Counts a batch, or records that it is counted if torch.fx records the call on x: then nothing is counted now."""
    if isinstance(x, fx.Proxy):
        tracer: Any = x.tracer
        tracer.create_proxy("call_method", "add_", (fx.Proxy(tracer.create_arg(batches), tracer), 1), {})
    else:
        batches.add_(1)


_ALL = Pool()


def in_two_calls(
    x: Tensor,
    fusion: Fusion,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    use_batch: bool,
    update: bool,
    carry: Tensor | None = None,
) -> Tensor:
    """The same call through Python: the operator that normalizes, then the one that mixes the statistics in."""
    count = x.shape[0] * math.prod(x.shape[2:])
    if use_batch:
        y, mean, var, _ = by_batch(x, _ALL, fusion)
    else:
        assert running_mean is not None
        assert running_var is not None
        y = by_statistics(x, running_mean, running_var, fusion)
    if not update or count == 1:  # one value has no variance
        return y
    if not use_batch:
        mean, var = torch.ops.batchnorm.moments.default(x.detach(), 0)
        var = var / max(count, 1)
    if count:
        if momentum is None and num_batches_tracked is None:
            momentum = 0.0
        # A compiler joins the update with its neighbours' loops.
        joined = is_compiled() and x.device.type == "cpu"
        mix = aten.update_statistics if joined else torch.ops.batchnorm.update_statistics.default
        mix(running_mean, running_var, num_batches_tracked, mean, var, count, count, momentum, True, carry)
    elif num_batches_tracked is not None:  # torch counts an empty batch all the same
        num_batches_tracked.add_(1)
    return y


def finish(y: Tensor, fusion: Fusion) -> Tensor:
    """The residual and the activation as operations of their own."""
    if fusion.residual is not None:
        y = y + fusion.residual
    return aten.activate(y, fusion.activation or "identity", fusion.slope)


def by_batch(
    x: Tensor, pool: Pool, fusion: Fusion, mask: Tensor | None = None, weights: Tensor | None = None
) -> Normalized:
    """Normalizes by the statistics of the pools of x, through which the gradient runs.

    Args:
        x: (N, C, *space).
        pool: the values that share statistics.
        fusion: see `Fusion`.
        mask: boolean (N, *space): only valid values are in the pools, and the others become zeros.
        weights: (N, *space), >= 0: how often each value counts.
    """
    how = way(x)
    if weights is not None or how is Way.RECORDED or (pool.is_merged and how is Way.TRANSFORMED):
        # Of operations that torch itself differentiates, in the weights too, and that other runtimes know.
        dtype, (gamma, beta, residual) = x.dtype, fusion.tensors()
        if weights is not None and how is not Way.RECORDED:
            x, weights = _in_float64(x), _in_float64(weights)
            gamma, beta, residual = (None if t is None else _in_float64(t) for t in (gamma, beta, residual))
        y, mean, var = aten.forward(x, gamma, beta, residual, pool, *fusion.settings(), mask, weights)
        return Normalized(y.to(dtype), mean.detach(), var.detach(), Pools(x, pool, mask, weights).counts().detach())
    if pool.is_merged and how is Way.EAGER:
        found: list[Tensor] = []
        settings = Settings(pool.size, *fusion.settings())
        y = autograd.eager_merged_statistics(x, *fusion.tensors(), mask, pool, settings, found)
        counts, mean, var = found
        return Normalized(y, mean, var, counts)
    if pool.is_merged:
        y, counts, mean, var = autograd.MergedStatistics.apply(x, *fusion.tensors(), mask, pool, *fusion.settings())
        return Normalized(y, mean, var, counts)
    if how is Way.EAGER:
        return _by_batch_eagerly(x, pool.size, fusion, mask)
    if how is Way.COMPILED and generated.takes(x, pool.size, mask):
        return Normalized(*autograd.Generated.apply(x, *fusion.tensors(), None, None, *fusion.settings()))
    if how is Way.COMPILED:
        y, mean, var, _ = autograd.BatchStatistics.apply(x, *fusion.tensors(), mask, pool.size, *fusion.settings())
    elif mask is not None:  # of operations that have every derivative
        y, mean, var = aten.forward(x, *fusion.tensors(), pool.size, *fusion.settings(), mask)
    else:
        y, mean, var, _ = autograd.TransformedBatchStatistics.apply(x, *fusion.tensors(), pool.size, *fusion.settings())
    return Normalized(y, mean.detach(), var.detach())


def _in_float64(t: Tensor) -> Tensor:
    """A tensor with the digits that weighted sums need, where the device has them."""
    return t if t.device.type == "mps" else t.double()


def _by_batch_eagerly(x: Tensor, pool_size: int, fusion: Fusion, mask: Tensor | None) -> Normalized:
    weight, bias, residual = fusion.tensors()
    settings = Settings(pool_size, *fusion.settings())
    measured: list[Tensor] = []
    y = autograd.eager_batch_statistics(x, weight, bias, residual, mask, settings, measured)
    if residual is None and recomputation.is_active():
        recomputation.note(y, (x, weight, bias), measured[:2], settings.arguments(), mask, True)
    return Normalized(y, measured[0], measured[1])


def _by_rows(x: Tensor, mean: Tensor, var: Tensor, fusion: Fusion) -> Tensor:
    """Pools of equal size, one after the other in x, each by its row of statistics (pools, C).

    For torch.jit.trace, where sizes are tensors: batch and number of pools stay free in the recording.
    """
    weight, bias = fusion.weight, fusion.bias
    shape = (mean.shape[0], 1, -1, *(1,) * (x.dim() - 2))
    scale = torch.rsqrt(var + fusion.eps) if weight is None else torch.rsqrt(var + fusion.eps) * weight
    y = (x.reshape(mean.shape[0], -1, *x.shape[1:]) - mean.reshape(shape)) * scale.reshape(shape)
    y = y.reshape(x.shape)
    return y if bias is None else y + bias.reshape(-1, *(1,) * (x.dim() - 2))


def by_statistics(
    x: Tensor, mean: Tensor, var: Tensor, fusion: Fusion, pool_size: int = 0, mask: Tensor | None = None
) -> Tensor:
    """Normalizes by given statistics, which are constants.

    Args:
        x: (N, C, *space).
        mean, var: (C,), or (pools, C) for pools of ``pool_size`` samples; the variance is the *biased* one of a batch,
            or what the layer keeps.
        fusion: see `Fusion`.
        pool_size: samples of a pool; 0 for all.
        mask: as for `by_batch`.
    """
    how = way(x)
    if mean.dim() > 1 and mask is None and is_traced_by_jit():
        return finish(_by_rows(x, mean, var, fusion), fusion)
    if how is Way.RECORDED and mask is None and not pool_size:
        return in_one_node(x, fusion, mean, var, False, 0.0)
    if how is Way.RECORDED or (how is Way.TRANSFORMED and mask is not None):
        return aten.normalize(x, mean, var, *fusion.tensors(), pool_size, *fusion.settings(), mask)
    settings = Settings(pool_size, *fusion.settings())
    y: Tensor
    if how is Way.TRANSFORMED:
        y = autograd.TransformedPopulationStatistics.apply(x, *fusion.tensors(), mean, var, *settings)[0]
        return y
    if how is Way.COMPILED and mean.dim() == 1 and generated.takes(x, pool_size, mask):
        y = autograd.Generated.apply(x, *fusion.tensors(), mean, var, *fusion.settings())[0]
        return y
    y = autograd.PopulationStatistics.apply(x, *fusion.tensors(), mean, var, *settings, mask)[0]
    if fusion.residual is None and recomputation.is_active():
        operands = (x, fusion.weight, fusion.bias)
        recomputation.note(y, operands, (mean.clone(), var.clone()), settings.arguments(), mask, False)
    return y


def by_measured(x: Tensor, mean: Tensor, var: Tensor, fusion: Fusion) -> Tensor:
    """Normalizes by the statistics (1, C) of x itself, measured before, through which the gradient runs."""
    transformed = way(x) is Way.TRANSFORMED
    function = autograd.TransformedMeasuredStatistics if transformed else autograd.MeasuredStatistics
    y: Tensor = function.apply(x, *fusion.tensors(), mean, var, 0, *fusion.settings())[0]
    return y


def can_use_measured(x: Tensor, pool: Pool, mask: Tensor | None, weights: Tensor | None) -> bool:
    """Whether `by_measured` takes these pools."""
    return not (pool.is_merged or mask is not None or weights is not None or is_recorded(x))


def needs_every_derivative(x: Tensor) -> bool:
    """Whether statistics that depend on x must be made of operations that torch differentiates, or records."""
    return (torch.is_grad_enabled() and x.requires_grad) or is_in_forward_mode() or is_recorded(x)


@torch.no_grad()
def measure(
    x: Tensor, pool: Pool, mask: Tensor | None = None, weights: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance of every pool, and the number (or weight) of its values; each (pools, C)."""
    if weights is None and not is_recorded(x):
        mean, m2 = torch.ops.batchnorm.moments.default(x.detach(), pool.size, mask)
        count, mean, m2 = merge_moments(Pools(x, pool.size, mask).counts(), mean, m2, pool)
        return mean, m2 / torch.where(count > 0, count, 1.0), count
    if weights is not None and not is_recorded(x):
        x, weights = _in_float64(x), _in_float64(weights)
    pools = Pools(x, pool, mask, weights)
    mean, var = aten.batch_statistics(x, pools)
    return mean, var, pools.counts()
