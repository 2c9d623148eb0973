"""Batch normalization as functions: validate once, choose an implementation, call it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from batchnorm.batch import POOLS, Batch, batch_of, with_equal_steps
from batchnorm.errors import DtypeError, InputError
from batchnorm.moments import Moments
from batchnorm.ops import normalization as ops
from batchnorm.ops.context import Way, is_mapped, is_recorded, way
from batchnorm.ops.fusion import Fusion
from batchnorm.ops.schemas import ACTIVATIONS
from batchnorm.pools import Pool, is_alone
from batchnorm.running import Estimator, Population
from batchnorm.sources import Given, OfBatch, Source, by_step, of_one_step

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
        weight: gamma, (C,), or None for 1; with ``pool="frame"`` also (steps, C), a row for each of the first time
            steps, of which later ones have the last.
        bias: beta, as weight, or None for 0.
        training: whether the batch's statistics normalize.
        momentum: share of the *new* statistics in the running ones.
        eps: added to the variance, inside the root.
        activation: "relu", "relu6", "leaky_relu", "silu", "gelu" (exact), "hardswish", "sigmoid", "tanh",
            "elu" (of alpha 1), "mish", "gelu_tanh" (the approximation) or None.
        negative_slope: of "leaky_relu".
        residual: added before the activation, of the shape of x.
        mask: boolean, True = valid, (N, *space) or (N, 1, *space), or what broadcasts to it. Valid values alone are in
            the pools; nothing is read at the others, and y is zero there.
        lengths: integers (N,), the valid lengths of the last axis: a mask.
        weights: (N, *space) or what broadcasts to it, >= 0: how often each value counts in mean and variance
            (frequency weights: the variance kept is M2/(W - 1), W their sum). A value without weight is not valid.
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

    Examples:
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
    if not (given or ghost_size or channel_groups or isinstance(input, PackedSequence) or input.is_nested):
        fusion = Fusion(weight, bias, residual, eps, activation, negative_slope)
        y = _plain_call(input, running_mean, running_var, use_batch, momentum, fusion)
        if y is not None:
            return y
        batch, steps = Batch(input, residual), 0
    else:
        _check_pool(pool, ghost_size)
        batch = batch_of(input, residual, mask, lengths, weights, pool, batch_first, bool(ghost_size))
        fusion = Fusion(weight, bias, batch.residual, eps, activation, negative_slope)
        _check_rows(batch.x, running_mean, running_var, pool == "frame")
        check(batch.x, None, None, of_one_step(fusion) if pool == "frame" else fusion, False)
        _check_defined(running_mean, running_var, use_batch)
        steps = len(running_mean) if running_mean is not None and pool == "frame" else 0
    carry = _fresh_carry(running_mean) if use_batch else None
    population = Population(running_mean, running_var, Estimator(momentum), max_steps=steps, carry=carry)
    source: Source = OfBatch() if use_batch else Given(*population.read(batch.steps))
    options = (ghost_size, channel_groups, process_group, "batch_norm", 0)
    batch, pools = pools_of(batch, options, use_batch)
    if use_batch:
        check_pools(batch, eps, pools)
    fusion = fusion.with_residual(batch.residual)
    if pool == "frame" and any(t is not None and t.ndim == 2 for t in (weight, bias)):
        y, measured = by_step(source, batch, pools, fusion)
    else:
        y, measured = source.normalize(batch, pools, fusion)
    if measured is not None and running_mean is not None:
        population.take(measured, pools)
    result: Tensor = batch.restore(y)
    return result


def _plain_call(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_batch: bool,
    momentum: float,
    fusion: Fusion,
) -> Tensor | None:
    """`torch.nn.functional.batch_norm` and its fusion in one call where there is one, else None, after checks."""
    if not math.isfinite(momentum):
        raise InputError(f"batch_norm: momentum must be finite, got {momentum}")
    weight, bias, residual, eps, activation, slope = fusion
    updates = use_batch and running_mean is not None and running_var is not None
    y = ops.in_one_call(
        x, residual, weight, bias, running_mean, running_var, None,
        _fresh_carry(running_mean) if updates else None, momentum, eps, activation, slope, use_batch, updates,
    )  # fmt: skip
    if y is not None:
        return y
    if x.numel() == 0 and x.ndim < 2:  # torch takes what is empty in any shape
        return ops.in_one_node(x, fusion, running_mean, running_var, use_batch, momentum)
    check(x, running_mean, running_var, fusion, use_batch)
    _check_both(running_mean, running_var, use_batch)
    if is_recorded(x):
        return ops.in_one_node(x, fusion, running_mean, running_var, use_batch, momentum)
    if is_mapped():
        return None
    carry = _fresh_carry(running_mean) if updates else None
    return ops.in_two_calls(x, fusion, running_mean, running_var, None, momentum, use_batch, updates, carry)


def moments(input: Tensor) -> Moments:
    """Count, mean and sum of squared deviations of every channel of x, in float64.

    Args:
        input: x, of shape (N, C, *space), floating point.

    Returns:
        `Moments` with mean and m2 of shape (C,).

    Raises:
        InputError: fewer than two axes.
        DtypeError: not a floating-point tensor.

    Examples:
        >>> moments(torch.tensor([[1.0], [3.0]])).variance(unbiased=False)
        tensor([1.], dtype=torch.float64)
    """
    check(input, None, None, Fusion(eps=0.0), False)
    mean, m2 = torch.ops.batchnorm.moments.default(input.detach(), 0)
    count = torch.tensor(input.numel() // max(input.shape[1], 1))
    return Moments(count, mean[0], m2[0])


def evaluate() -> str:
    """The advice for too few values where running statistics can normalize."""
    return "use a larger batch, or .eval()"


def check(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    fusion: Fusion,
    use_batch: bool,
    advice: Callable[[], str] = evaluate,
) -> None:
    """Raises for anything that `batch_norm` cannot take; changes nothing. ``advice`` helps where values are too few."""
    shape, dtype, device = x.shape, x.dtype, x.device
    weight, bias, residual, eps, activation, _ = fusion
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
        raise _too_few(shape, advice)


def _too_few(shape: torch.Size, advice: Callable[[], str]) -> InputError:
    return InputError(
        f"Expected more than 1 value per channel when training, got input size {torch.Size(shape)}: "
        f"the variance of one value is 0; {advice()}"
    )


def _check_rows(x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, by_step: bool) -> None:
    """Raises unless the running statistics are one row (C,), or one a time step where they are kept so."""
    if (running_mean is None) != (running_var is None):
        raise InputError("running_mean and running_var must either both be None or neither be None")
    if running_mean is None or running_var is None:
        return
    if not by_step:
        check(x, running_mean, running_var, Fusion(eps=0.0), False)
        return
    for name, value in (("running_mean", running_mean), ("running_var", running_var)):
        if value.ndim != 2 or value.shape[1] != x.shape[1] or not len(value):
            raise InputError(
                f"{name} is {tuple(value.shape)}; with pool='frame' it has a row for each of the first time steps, "
                f"(max_steps, {x.shape[1]})"
            )


def _check_pool(pool: str | None, ghost_size: int) -> None:
    if pool not in POOLS:
        raise InputError(f"unknown pool {pool!r}; choose one of {', '.join(map(str, POOLS))}")
    if pool == "frame" and ghost_size:
        raise InputError("ghost_size does not go with pool='frame', whose pools are the time steps")


def _check_defined(running_mean: Tensor | None, running_var: Tensor | None, use_batch: bool) -> None:
    if not use_batch and (running_mean is None or running_var is None):
        raise DtypeError("running_mean and running_var must be defined in evaluation mode; pass them")


def _check_both(running_mean: Tensor | None, running_var: Tensor | None, use_batch: bool) -> None:
    """Raises where one of the two is missing, or both are and have to normalize."""
    if use_batch and (running_mean is None) != (running_var is None):
        raise InputError(
            "running_mean and running_var must either both be None or neither be None: "
            f"{'running_mean' if running_mean is None else 'running_var'} is None"
        )
    if not use_batch and (running_mean is None or running_var is None):
        name = "running_mean" if running_mean is None else "running_var"
        raise DtypeError(f"{name} must be defined in evaluation mode; it is None: pass it, or training=True")


def _fresh_carry(running_mean: Tensor | None) -> Tensor | None:
    """What rounding left of float64 statistics: nothing yet.

    With it the function rounds them once, as the layer does. Those of other dtypes are mixed in float64 anyway.
    """
    if running_mean is None or running_mean.dtype != torch.float64 or way(running_mean) is not Way.EAGER:
        return None
    return running_mean.new_zeros((2, *running_mean.shape))


Options = tuple[int, int, Any, str, int]
"""ghost_size, channel_groups, process_group, the layer's name in errors, and its `Pool.place`."""


def pools_of(batch: Batch, options: Options, exchanges: bool) -> tuple[Batch, Pool]:
    """The `Pool` that these options and a batch make, after checks.

    Where ranks share the statistics of time steps and the call exchanges any, the batch gets as many steps as the rank
    that has the most.
    """
    pool = _pool_of(batch, *options)
    if not (exchanges and batch.steps and pool.process_group is not None):
        return batch, pool
    batch = with_equal_steps(batch, pool)
    return batch, _pool_of(batch, *options)


def _pool_of(batch: Batch, ghost_size: int, channel_groups: int, process_group: Any, layer: str, place: int) -> Pool:
    if ghost_size < 0:
        raise InputError(f"ghost_size must not be negative, got {ghost_size}")
    channels = batch.x.shape[1]
    if channel_groups and (channel_groups < 0 or channels % channel_groups):
        raise InputError(f"channel_groups={channel_groups} does not divide the {channels} channels into equal groups")
    if isinstance(process_group, str) and process_group != "world":
        raise InputError(f"process_group must be 'world' or a group of torch.distributed, got {process_group!r}")
    shared = None if is_alone(process_group) else process_group
    size = len(batch.x) // batch.steps if batch.steps else ghost_size * batch.scale
    group, ranks = (None, shared) if ghost_size else (shared, None)
    return Pool(size, channel_groups, group, layer, ranks, place)


def check_pools(batch: Batch, eps: float, pool: Pool, advice: Callable[[], str] = evaluate) -> None:
    """Raises where the batch's statistics cannot normalize; a pool of one value that a mask leaves gives beta."""
    if not 0 < eps < math.inf:
        raise InputError(f"batch_norm eps must be positive during training, but got {eps}; and it must be finite")
    x = batch.x
    values = x.shape[0] * math.prod(x.shape[2:]) * (x.shape[1] // pool.groups if pool.groups else 1)
    if values == 1 and pool.process_group is None and batch.mask is None:
        raise _too_few(x.shape, advice)


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
