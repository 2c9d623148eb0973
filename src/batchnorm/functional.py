"""Batch normalization as functions: validate once, choose an implementation, call it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from batchnorm.errors import DtypeError, InputError
from batchnorm.kernels import aten
from batchnorm.moments import Moments
from batchnorm.ops import autograd
from batchnorm.ops.schemas import ACTIVATIONS

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
) -> Tensor:
    """Batch normalization with `torch.nn.functional.batch_norm`'s signature first, and fusions as keywords.

    ``y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)``, where ``var`` is the *biased*
    variance. In training, mean and variance are the batch's, over all axes but the second, and the running
    statistics become ``(1 - momentum) * running + momentum * batch``, the variance kept there being the *unbiased*
    one. Otherwise they are the running statistics.

    Args:
        input: x, of shape (N, C, *space), floating point, on any device and in any memory format.
        running_mean: (C,), or None; updated in place in training.
        running_var: (C,), or None; updated in place in training.
        weight: gamma, (C,), or None for 1.
        bias: beta, (C,), or None for 0.
        training: whether the batch's statistics normalize.
        momentum: share of the *new* statistics in the running ones.
        eps: added to the variance, inside the root.
        activation: "relu", "relu6", "leaky_relu", "silu", "gelu" (exact), "hardswish", "sigmoid", "tanh" or None.
        negative_slope: of "leaky_relu".
        residual: added before the activation, of the shape of x.

    Returns:
        y, of the shape, dtype and memory format of x.

    Raises:
        InputError: shapes that do not fit, one value per channel in training, an unknown activation.
        DtypeError: dtypes or devices that do not fit.

    Source: Ioffe & Szegedy 2015, Algorithm 1.

    Example:
        >>> x = torch.randn(8, 3, 4, 4)
        >>> y = batch_norm(x, None, None, training=True, activation="relu")
        >>> bool((y >= 0).all()), y.shape
        (True, torch.Size([8, 3, 4, 4]))
    """
    use_batch = bool(training)
    if input.numel() == 0 and input.ndim < 2:  # torch takes what is empty in any shape
        y = F.batch_norm(input, running_mean, running_var, weight, bias, use_batch, momentum, eps)
        return finish(y, residual, activation, negative_slope)
    check(input, running_mean, running_var, weight, bias, residual, activation, eps, use_batch)
    if not math.isfinite(momentum):
        raise InputError(f"batch_norm: momentum must be finite, got {momentum}")
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
) -> Tensor:
    """Normalizes by given statistics (C,), which are constants."""
    if is_traced(x):
        y = F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
        return finish(y, residual, activation, slope)
    return autograd.by_population(x, weight, bias, residual, mean, var, 0, eps, activation or "identity", slope)


def update(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    var: Tensor,
    x: Tensor,
    momentum: float | None,
    unbiased: bool = True,
) -> None:
    """Mixes the batch's statistics into the running ones, in place, and counts one batch."""
    count = x.shape[0] * math.prod(x.shape[2:])
    if count == 0:  # nothing to mix in; torch counts the batch all the same
        if num_batches_tracked is not None:
            num_batches_tracked.add_(1)
        return
    torch.ops.batchnorm.update_statistics.default(
        running_mean, running_var, num_batches_tracked, mean, var, count, count, momentum, unbiased
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


def is_traced(x: Tensor) -> bool:
    """Whether the call is being recorded for other runtimes, which know ATen's operators but not these."""
    return torch.compiler.is_exporting() or bool(torch.jit.is_tracing())  # type: ignore[attr-defined]
