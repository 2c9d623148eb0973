"""Batch normalization as functions: validate once, choose an implementation, call it."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from batchnorm.errors import DtypeError, InputError
from batchnorm.kernels import aten
from batchnorm.moments import Moments, merge_axis
from batchnorm.ops import autograd
from batchnorm.ops.schemas import ACTIVATIONS
from batchnorm.pools import Pool, Pools, is_alone, merge_moments
from batchnorm.views import POOLS, View, equal_steps, is_traced, view

_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    weights: Tensor | None = None,
    ghost_size: int = 0,
    channel_groups: int = 0,
    process_group: Any = None,
    pool: Literal["sequence", "frame"] | None = None,
    batch_first: bool = True,
) -> Tensor:
    """Batch normalization with `torch.nn.functional.batch_norm`'s signature first, and fusions as keywords.

    ``y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)``, where ``var`` is the *biased*
    variance. In training, mean and variance are the batch's, over all axes but the second, and the running
    statistics become ``(1 - momentum) * running + momentum * batch``, the variance kept there being the *unbiased*
    one. Otherwise they are the running statistics.

    Args:
        input: x, of shape (N, C, *space), floating point, on any device and in any memory format. A ``PackedSequence``
            (frames of C channels), or a jagged nested tensor (N, *, C) or (N, C, *), comes out as it went in.
        running_mean: (C,), or None; updated in place in training. (max_steps, C) with ``pool="frame"``.
        running_var: as running_mean.
        weight: gamma, (C,), or None for 1.
        bias: beta, (C,), or None for 0.
        training: whether the batch's statistics normalize.
        momentum: share of the *new* statistics in the running ones.
        eps: added to the variance, inside the root.
        activation: "relu", "relu6", "leaky_relu", "silu", "gelu" (exact), "hardswish", "sigmoid", "tanh" or None.
        negative_slope: of "leaky_relu".
        residual: added before the activation, of the shape of x.
        mask: boolean, True = valid, (N, *space) or (N, 1, *space), or what broadcasts to it. Valid values alone are in
            the pools; nothing is read at the others, and y is zero there.
        lengths: integers (N,), the valid lengths of the last axis: a mask.
        weights: (N, *space) or what broadcasts to it, >= 0: how often each value counts in mean and variance
            (frequency weights: the variance kept is M2/(W - 1), W their sum). What has no weight is not valid.
            Differentiable. In training only.
        ghost_size: samples of a ghost batch, each normalized by its own statistics; the last may be smaller. The
            running statistics are those of the whole batch. In training only; 0: none.
        channel_groups: number of groups of adjacent channels that share statistics with each other as well ("batch
            and group"); 0: each channel for itself. In training only.
        process_group: "world" or a group of torch.distributed, whose ranks share statistics; each rank must make the
            call, with an empty batch if it has no other. In training only. Ghost batches stay on their rank; then the
            running statistics alone are shared.
        pool: "sequence" or "frame" make the input (batch, time, channels): all valid frames are one pool, or those of
            each time step are, with a row of running statistics for each; later steps use the last row, in evaluation.
        batch_first: of sequences; False for (time, batch, channels).

    Returns:
        y, of the shape, dtype and memory format of x.

    Raises:
        InputError: shapes that do not fit, one value per channel in training, an unknown activation.
        SynchronizationError: ranks that do not take part.
        DtypeError: dtypes or devices that do not fit.

    Source: Ioffe & Szegedy 2015, Algorithm 1; Hoffer et al. 2017 (ghost batches); Summers & Dinneen 2020 (groups);
        Laurent et al. 2016 (pool).

    Example:
        >>> x = torch.randn(8, 3, 4, 4)
        >>> y = batch_norm(x, None, None, training=True, activation="relu")
        >>> bool((y >= 0).all()), y.shape
        (True, torch.Size([8, 3, 4, 4]))
        >>> lengths = torch.tensor([5, 2])
        >>> batch_norm(torch.randn(2, 3, 5), None, None, training=True, lengths=lengths)[1, :, 2:].abs().sum()
        tensor(0.)
    """
    use_batch = bool(training)
    given = any(each is not None for each in (pool, mask, lengths, weights, process_group))
    sequences = isinstance(input, PackedSequence) or (isinstance(input, Tensor) and input.is_nested)
    if given or sequences or ghost_size or channel_groups:
        if pool not in POOLS:
            raise InputError(f"unknown pool {pool!r}; choose one of {', '.join(map(str, POOLS))}")
        if pool == "frame" and ghost_size:
            raise InputError("ghost_size does not go with pool='frame', whose pools are the time steps")
        seen = view(input, residual, mask, lengths, weights, pool, batch_first, bool(ghost_size))
        running = _rows(seen.x, running_mean, running_var, pool == "frame")
        settings = (eps, activation, negative_slope)
        shared = (ghost_size, channel_groups, process_group)
        result: Tensor = seen.back(_by_pools(seen, *running, weight, bias, use_batch, momentum, settings, shared))
        return result
    if not math.isfinite(momentum):
        raise InputError(f"batch_norm: momentum must be finite, got {momentum}")
    y = autograd.at_once(
        input, residual, weight, bias, running_mean, running_var, None, momentum, eps, activation, negative_slope,
        use_batch, use_batch and running_mean is not None and running_var is not None,
    )  # fmt: skip
    if y is not None:
        return y
    if input.numel() == 0 and input.ndim < 2:  # torch takes what is empty in any shape
        y = F.batch_norm(input, running_mean, running_var, weight, bias, use_batch, momentum, eps)
        return finish(y, residual, activation, negative_slope)
    check(input, running_mean, running_var, weight, bias, residual, activation, eps, use_batch)
    if use_batch:
        if (running_mean is None) != (running_var is None):
            raise InputError(
                "running_mean and running_var must either both be None or neither be None: "
                f"{'running_mean' if running_mean is None else 'running_var'} is None"
            )
        y, mean, var = by_batch(input, weight, bias, residual, eps, activation, negative_slope)
        if running_mean is not None:
            update(running_mean, running_var, None, mean, var, input, momentum)
        return y
    if running_mean is None or running_var is None:
        name = "running_mean" if running_mean is None else "running_var"
        raise DtypeError(f"{name} must be defined in evaluation mode; it is None: pass it, or training=True")
    return by_population(input, running_mean, running_var, weight, bias, residual, eps, activation, negative_slope)


def _by_pools(
    seen: View,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    use_batch: bool,
    momentum: float,
    settings: tuple[float, str | None, float],
    shared: tuple[int, int, Any],
) -> Tensor:
    """`batch_norm` where the pools are not simply the channels, by running statistics of one row or one a time step."""
    x, residual, frames, (eps, activation, slope) = seen.x, seen.residual, len(seen.x), settings
    check(x, None, None, weight, bias, residual, activation, eps, False)
    if not use_batch:
        if running_mean is None or running_var is None:
            raise DtypeError("running_mean and running_var must be defined in evaluation mode; pass them")
        row = torch.arange(seen.steps, device=x.device).clamp(max=len(running_mean) - 1) if seen.steps else 0
        mean, var, size = running_mean[row], running_var[row], frames // seen.steps if seen.steps else 0
        return by_population(x, mean, var, weight, bias, residual, eps, activation, slope, size, seen.mask)
    pool = pool_of(seen, *shared, "batch_norm")
    if seen.steps and pool.process_group is not None:
        seen = equal_steps(seen, pool)
        x, residual, pool = seen.x, seen.residual, pool_of(seen, *shared, "batch_norm")
    check_pools(x, eps, pool, seen.mask)
    y, measured = by_pools(x, weight, bias, residual, eps, activation, slope, pool, seen.mask, seen.weights)
    if running_mean is not None and running_var is not None:
        batch = measured if seen.steps else merged(measured, pool)
        _mix(running_mean, running_var, momentum, batch, alone=seen.mask is not None and seen.weights is None)
    return y[:frames]


def _rows(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, by_step: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The running statistics as (1, C), or as (max_steps, C) where they are kept by time step."""
    if (running_mean is None) != (running_var is None):
        raise InputError("running_mean and running_var must either both be None or neither be None")
    if running_mean is None or running_var is None:
        return None, None
    if not by_step:
        check(x, running_mean, running_var, None, None, None, None, 0.0, False)
        return running_mean[None], running_var[None]
    for name, value in (("running_mean", running_mean), ("running_var", running_var)):
        if value.ndim != 2 or value.shape[1] != x.shape[1] or not len(value):
            raise InputError(
                f"{name} is {tuple(value.shape)}; with pool='frame' it has a row for each of the first time steps, "
                f"(max_steps, {x.shape[1]})"
            )
    return running_mean, running_var


@torch.no_grad()
def _mix(running_mean: Tensor, running_var: Tensor, momentum: float, batch: Measured, alone: bool) -> None:
    """The statistics of a batch into the first rows of the running ones; what has no values changes nothing.

    Nor has one value, where the others of its pool are masked (``alone``): it tells nothing of the variance.
    """
    count, mean, var = (each[: len(running_mean)] for each in batch)
    unbiased = torch.where(count > 1, var * count / (count - 1), var)
    for running, new in ((running_mean, mean), (running_var, unbiased)):
        old = running[: len(new)]
        mixed = (1 - momentum) * old.to(new.dtype) + momentum * new
        old.copy_(torch.where(count > int(alone), mixed, old.to(mixed.dtype)))


class Measured(NamedTuple):
    """Of every pool: the number (or weight) of its values, their mean and biased variance; each (pools, C)."""

    counts: Tensor
    mean: Tensor
    var: Tensor


def moments(input: Tensor) -> Moments:
    """Count, mean and sum of squared deviations of every channel of x, in float64.

    Args:
        input: x, of shape (N, C, *space), floating point.

    Returns:
        `Moments` with mean and m2 of shape (C,).

    Raises:
        InputError: fewer than two axes.
        DtypeError: not a floating-point tensor.

    Example:
        >>> moments(torch.tensor([[1.0], [3.0]])).variance(unbiased=False)
        tensor([1.], dtype=torch.float64)
    """
    check(input, None, None, None, None, None, None, 0.0, False)
    mean, m2 = torch.ops.batchnorm.moments.default(input.detach(), 0)
    count = torch.tensor(input.numel() // max(input.shape[1], 1))
    return Moments(count, mean[0], m2[0])


def check(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    eps: float,
    use_batch: bool,
) -> None:
    """Raises for anything that `batch_norm` cannot take; changes nothing."""
    shape, dtype, device = x.shape, x.dtype, x.device
    if dtype not in _FLOATING:
        raise DtypeError(
            f"batch_norm: not implemented for '{_name(dtype)}': the input is {dtype} {tuple(shape)}; "
            "convert it to a floating-point dtype first, for example x.float()"
        )
    if len(shape) < 2:
        raise InputError(f"batch_norm: expected an input (N, C, *space), got {tuple(shape)}")
    channels = shape[1]
    for vector in (running_mean, running_var, weight, bias):
        if vector is not None and (vector.dtype is not dtype or vector.device != device or vector.numel() != channels):
            _check_vectors(
                x, {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
            )
    if residual is not None and (residual.shape != shape or residual.dtype != dtype):
        raise InputError(
            f"batch_norm: residual is {residual.dtype} {tuple(residual.shape)}, "
            f"expected that of the input, {dtype} {tuple(shape)}"
        )
    if activation is not None and activation not in ACTIVATIONS:
        raise InputError(f"unknown activation {activation!r}; choose one of {', '.join(ACTIVATIONS)}")
    if use_batch and not 0 < eps < math.inf:
        raise InputError(f"batch_norm eps must be positive during training, but got {eps}; and it must be finite")
    if not 0 <= eps < math.inf:
        raise InputError(f"batch_norm eps must be non-negative, but got {eps}; and it must be finite")
    if use_batch and shape[0] * math.prod(shape[2:]) == 1:
        raise InputError(
            f"Expected more than 1 value per channel when training, got input size {torch.Size(shape)}: "
            "the variance of one value is 0; use a larger batch, or .eval()"
        )


def pool_of(seen: View, ghost_size: int, channel_groups: int, process_group: Any, layer: str) -> Pool:
    """The `Pool` that these options and the view of an input make, after checks."""
    if ghost_size < 0:
        raise InputError(f"ghost_size must not be negative, got {ghost_size}")
    channels = seen.x.shape[1]
    if channel_groups and (channel_groups < 0 or channels % channel_groups):
        raise InputError(f"channel_groups={channel_groups} does not divide the {channels} channels into equal groups")
    if isinstance(process_group, str) and process_group != "world":
        raise InputError(f"process_group must be 'world' or a group of torch.distributed, got {process_group!r}")
    group = None if ghost_size or is_alone(process_group) else process_group
    return Pool(len(seen.x) // seen.steps if seen.steps else ghost_size * seen.scale, channel_groups, group, layer)


def check_pools(x: Tensor, eps: float, pool: Pool, mask: Tensor | None) -> None:
    """Raises where the batch's statistics cannot normalize; a pool of one value that a mask leaves gives beta."""
    if not 0 < eps < math.inf:
        raise InputError(f"batch_norm eps must be positive during training, but got {eps}; and it must be finite")
    values = x.shape[0] * math.prod(x.shape[2:]) * (x.shape[1] // pool.groups if pool.groups else 1)
    if values == 1 and pool.process_group is None and mask is None:
        raise InputError(
            f"Expected more than 1 value per channel when training, got input size {x.shape}: "
            "the variance of one value is 0; use a larger batch, or .eval()"
        )


def _check_vectors(x: Tensor, vectors: dict[str, Tensor | None]) -> None:
    """Raises for the first that does not fit x; a parameter may be wider than x."""
    for name, vector in vectors.items():
        if vector is None:
            continue
        if vector.numel() != x.shape[1]:
            raise DtypeError(
                f"{name} should contain {x.shape[1]} elements not {vector.numel()}: "
                f"the input is {tuple(x.shape)}, with its channels on axis 1"
            )
        if vector.device != x.device:
            raise DtypeError(
                f"Expected all tensors to be on the same device: input on {x.device}, {name} on {vector.device}; "
                "move one of them with .to()"
            )
        if vector.dtype != x.dtype:
            _check_mixed(name, vector.dtype, x.dtype)


def _check_mixed(name: str, given: torch.dtype, dtype: torch.dtype) -> None:
    """Parameters may be float32 (and statistics also float64) beside a narrower input."""
    if dtype in (torch.bfloat16, torch.float16) and given == torch.float32:
        return
    raise DtypeError(
        f"mixed dtype: expect {name} to have scalar type of {_name(dtype)}"
        f"{' or Float' if dtype in (torch.bfloat16, torch.float16) else ''}, got {_name(given)}"
    )


def _name(dtype: torch.dtype) -> str:
    """torch's own word for a dtype in its messages."""
    names = {
        torch.float32: "Float",
        torch.float64: "Double",
        torch.float16: "Half",
        torch.bfloat16: "BFloat16",
        torch.int64: "Long",
        torch.int32: "Int",
        torch.uint8: "Byte",
        torch.bool: "Bool",
        torch.complex64: "ComplexFloat",
        torch.complex128: "ComplexDouble",
    }
    return names.get(dtype, str(dtype).removeprefix("torch."))


def by_batch(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
    slope: float,
    pool_size: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalizes by the batch's own statistics; also returns mean and biased variance, (pools, C)."""
    y, mean, var, _ = autograd.by_batch(x, weight, bias, residual, pool_size, eps, activation or "identity", slope)
    return y, mean, var


def by_population(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
    slope: float,
    pool_size: int = 0,
    mask: Tensor | None = None,
) -> Tensor:
    """Normalizes by given statistics (C,) or (pools, C), which are constants."""
    kind = activation or "identity"
    if mean.dim() > 1 and mask is None and torch.jit.is_tracing():
        y = _by_rows(x, mean, var, weight, bias, eps)
        return finish(y, residual, activation, slope)
    if is_traced(x):
        if mask is not None or pool_size:
            return aten.normalize(x, mean, var, weight, bias, residual, pool_size, eps, kind, slope, mask)
        y = F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
        return finish(y, residual, activation, slope)
    return autograd.by_population(x, weight, bias, residual, mean, var, pool_size, eps, kind, slope, mask=mask)


def _by_rows(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Pools of equal size, one after the other in x, each by its row of statistics (pools, C).

    For `torch.jit.trace`, where sizes are tensors: batch and number of pools stay free in what is recorded.
    """
    shape = (mean.shape[0], 1, -1, *(1,) * (x.dim() - 2))
    scale = torch.rsqrt(var + eps) if weight is None else torch.rsqrt(var + eps) * weight
    y = (x.reshape(mean.shape[0], -1, *x.shape[1:]) - mean.reshape(shape)) * scale.reshape(shape)
    y = y.reshape(x.shape)
    return y if bias is None else y + bias.reshape(-1, *(1,) * (x.dim() - 2))


def by_pools(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
    slope: float,
    pool: Pool,
    mask: Tensor | None,
    weights: Tensor | None,
) -> tuple[Tensor, Measured]:
    """Normalizes by the statistics of any pools, and returns these."""
    settings = (eps, activation or "identity", slope)
    if weights is None and not is_traced(x):
        if not pool.is_merged:
            y, mean, var, *_ = autograd.by_batch(x, weight, bias, residual, pool.size, *settings, mask=mask)
            return y, Measured(Pools(x, pool.size, mask).counts(), mean.detach(), var.detach())
        if torch.compiler.is_compiling() or not autograd.is_transformed():
            y, *measured = autograd.MergedStatistics.apply(x, weight, bias, residual, mask, pool, *settings)
            return y, Measured(*measured)
    # Of operations that torch itself differentiates, in the weights too, and that other runtimes know.
    y, mean, var = aten.forward(x, weight, bias, residual, pool, *settings, mask, weights)
    return y, Measured(Pools(x, pool, mask, weights).counts().detach(), mean.detach(), var.detach())


@torch.no_grad()
def measure(x: Tensor, pool: Pool, mask: Tensor | None, weights: Tensor | None) -> Measured:
    """The statistics of any pools, outside the graph."""
    if weights is None and not is_traced(x):
        return Measured(*autograd.merged_statistics(x, pool, mask))
    pools = Pools(x, pool, mask, weights)
    mean, var = aten.batch_statistics(x, pools)
    return Measured(pools.counts(), mean, var)


@torch.no_grad()
def merged(measured: Measured, pool: Pool, ghosts: Any = None) -> Measured:
    """All pools of a channel as one, (1, C); ghost batches of all ranks where ``ghosts`` names a process group."""
    count, mean, var = measured
    if len(mean) == 1 and ghosts is None:
        return measured
    m2 = var * count
    count, mean, m2 = (each[None] for each in merge_axis(count, mean, m2, 0))
    count, mean, m2 = merge_moments(count, mean, m2, Pool(process_group=ghosts, layer=pool.layer))
    return Measured(count, mean, m2 / torch.where(count > 0, count, 1.0))


def update(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    var: Tensor,
    x: Tensor,
    momentum: float | None,
    unbiased: bool = True,
    pool_size: int = 0,
    count: int | None = None,
) -> None:
    """Mixes the batch's statistics, of all its pools, into the running ones, in place, and counts one batch.

    ``count`` says how many values a channel has where not all of x count.
    """
    inner = math.prod(x.shape[2:])
    if count is None:
        count = x.shape[0] * inner
    if count == 0:  # nothing to mix in; torch counts the batch all the same
        if num_batches_tracked is not None:
            num_batches_tracked.add_(1)
        return
    torch.ops.batchnorm.update_statistics.default(
        running_mean, running_var, num_batches_tracked, mean, var, count, pool_size * inner or count, momentum, unbiased
    )


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of the batch, (1, C), outside the graph."""
    mean, m2 = torch.ops.batchnorm.moments.default(x.detach(), 0)
    return mean, m2 / max(x.shape[0] * math.prod(x.shape[2:]), 1)


def finish(y: Tensor, residual: Tensor | None, activation: str | None, slope: float) -> Tensor:
    """What is fused elsewhere, as operations of its own."""
    if residual is not None:
        y = y + residual
    return aten.activate(y, activation or "identity", slope)
