"""The operators' schemas and fake kernels. C++ and Triton register implementations; this is what they implement.

Throughout: ``x`` has shape (N, C, *space); statistics are float64 of shape (pools, C), where a pool is a run of
``pool_size`` samples (0: all of them) and variances are biased; ``weight`` and ``bias`` have shape (C,);
``activation`` is an index into `ACTIVATIONS`; ``signs`` holds one bit for each element where the activation's
derivative is that of its linear part, and is empty where not asked for; ``mask``, boolean of shape (N, *space), says
which positions are in the pools: nothing is read at the others, and zeros are written there (not together with signs).
Moments to be merged are one tensor (3, pools, C) of count, mean and m2; ``parts`` are those of all ranks, (ranks, 3,
pools, C), and ``groups`` the number of groups of adjacent channels that share statistics as well (0: none do).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

LIBRARY = torch.library.Library("batchnorm", "DEF")

ACTIVATIONS = (
    "identity",
    "relu",
    "relu6",
    "leaky_relu",
    "silu",
    "gelu",
    "hardswish",
    "sigmoid",
    "tanh",
)

# Activations whose derivative takes two values: with a residual, one bit an element is enough for the backward.
PIECEWISE_LINEAR = ("relu", "relu6", "leaky_relu")

_AFFINE = "Tensor? weight, Tensor? bias, Tensor? residual"
_FUSION = "int pool_size, float eps, int activation, float slope"
_SAVED = "Tensor? signs, Tensor mean, Tensor var"
_MASK = "Tensor? mask=None"

LIBRARY.define(f"moments(Tensor x, int pool_size, {_MASK}) -> (Tensor mean, Tensor m2)")
LIBRARY.define(
    f"normalize(Tensor x, Tensor mean, Tensor var, {_AFFINE}, {_FUSION}, bool save_signs, {_MASK})"
    " -> (Tensor y, Tensor signs)"
)
LIBRARY.define(
    f"forward(Tensor x, {_AFFINE}, {_FUSION}, bool save_signs, {_MASK})"
    " -> (Tensor y, Tensor mean, Tensor var, Tensor signs)"
)
LIBRARY.define(
    f"backward_reduce(Tensor dy, Tensor x, {_AFFINE}, {_SAVED}, {_FUSION}, {_MASK})"
    " -> (Tensor sum_dz, Tensor sum_dz_centered)"
)
LIBRARY.define(
    f"backward_apply(Tensor dy, Tensor x, {_AFFINE}, {_SAVED}, Tensor k1, Tensor k2, Tensor k3, {_FUSION},"
    f" bool want_residual, {_MASK}) -> (Tensor dx, Tensor d_residual)"
)
LIBRARY.define(
    f"backward(Tensor dy, Tensor x, {_AFFINE}, {_SAVED}, {_FUSION}, bool population, bool want_x,"
    f" bool want_residual, {_MASK}) -> (Tensor dx, Tensor d_residual, Tensor d_weight, Tensor d_bias)"
)
# Where pools reach over channel groups or ranks: count, mean and m2 are gathered, merged where they normalize, and the
# sums of gamma dz and gamma dz (x - mean) where they make dx.
LIBRARY.define(f"count_moments(Tensor x, int pool_size, {_MASK}) -> Tensor")
LIBRARY.define(
    f"normalize_merged(Tensor x, Tensor parts, {_AFFINE}, {_FUSION}, int groups, bool save_signs, {_MASK})"
    " -> (Tensor y, Tensor count, Tensor mean, Tensor var, Tensor signs)"
)
LIBRARY.define(
    f"backward_merged(Tensor dy, Tensor x, {_AFFINE}, {_SAVED}, Tensor sums, Tensor count, {_FUSION},"
    f" bool want_residual, {_MASK}) -> (Tensor dx, Tensor d_residual)"
)
# The same gradients, of any order: what the C++ backward calls where it cannot do without Python.
LIBRARY.define(
    f"gradients(Tensor dy, Tensor x, {_AFFINE}, {_SAVED}, {_FUSION}, bool population, bool[] wanted)"
    " -> (Tensor d_x, Tensor d_weight, Tensor d_bias, Tensor d_residual)"
)
LIBRARY.define(
    "update_statistics(Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked,"
    " Tensor mean, Tensor var, SymInt count, SymInt pool_count, float? momentum, bool unbiased) -> ()"
)

# Into preallocated tensors: what benchmarks measure where the cost of fresh memory is to be left out.
LIBRARY.define(f"forward_out(Tensor x, {_AFFINE}, Tensor(a!) y, Tensor(b!) mean, Tensor(c!) var, {_FUSION}) -> ()")
LIBRARY.define(
    "backward_out(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, Tensor(a!) dx,"
    f" Tensor(b!) sum_dz, Tensor(c!) sum_dz_centered, {_FUSION}) -> ()"
)


def statistics_dtype(device: torch.device) -> torch.dtype:
    """float64, but float32 on devices that lack it."""
    return torch.float32 if device.type == "mps" else torch.float64


def pool_count(samples: int, pool_size: int) -> int:
    """Number of pools of ``pool_size`` samples (0: one pool of all); the last may be smaller."""
    if pool_size <= 0 or samples <= pool_size:
        return 1
    return (samples + pool_size - 1) // pool_size


def signs_size(x: Tensor) -> int:
    """Bytes that hold one bit an element, each plane or row from a whole byte on."""
    n, c = x.shape[0], x.shape[1]
    inner = x[0, 0].numel() if x.numel() else 0
    return max(n * c * ((inner + 7) // 8), n * inner * ((c + 7) // 8), c * ((n * inner + 7) // 8))


def empty_like(x: Tensor) -> Tensor:
    """A result: of the shape and dtype of x, channels last where x is, else contiguous, as torch's own."""
    return torch.empty_like(x, memory_format=suggest_memory_format(x))


def _statistics(x: Tensor, pool_size: int) -> Tensor:
    pools = pool_count(x.shape[0], pool_size)
    return x.new_empty((pools, x.shape[1]), dtype=statistics_dtype(x.device))


def _signs(x: Tensor, save: bool) -> Tensor:
    return x.new_empty((signs_size(x) if save else 0,), dtype=torch.uint8)


def _fake(name: str):  # type: ignore[no-untyped-def]
    return torch.library.register_fake(f"batchnorm::{name}", lib=LIBRARY)


@_fake("moments")
def _(x, pool_size, mask=None):  # type: ignore[no-untyped-def]
    return _statistics(x, pool_size), _statistics(x, pool_size)


@_fake("normalize")
def _(x, mean, var, weight, bias, residual, pool_size, eps, activation, slope, save_signs, mask=None):  # type: ignore[no-untyped-def]
    return empty_like(x), _signs(x, save_signs)


@_fake("forward")
def _(x, weight, bias, residual, pool_size, eps, activation, slope, save_signs, mask=None):  # type: ignore[no-untyped-def]
    return empty_like(x), _statistics(x, pool_size), _statistics(x, pool_size), _signs(x, save_signs)


@_fake("count_moments")
def _(x, pool_size, mask=None):  # type: ignore[no-untyped-def]
    return x.new_empty((3, *_statistics(x, pool_size).shape), dtype=statistics_dtype(x.device))


@_fake("normalize_merged")
def _(x, parts, weight, bias, residual, pool_size, eps, activation, slope, groups, save_signs, mask=None):  # type: ignore[no-untyped-def]
    return empty_like(x), *(_statistics(x, pool_size) for _ in range(3)), _signs(x, save_signs)


@_fake("backward_merged")
def _(  # type: ignore[no-untyped-def]
    dy, x, weight, bias, residual, signs, mean, var, sums, count, pool_size, eps, activation, slope, want, mask=None
):  # fmt: skip
    return empty_like(x), empty_like(x) if want else x.new_empty(0)


@_fake("backward_reduce")
def _(dy, x, weight, bias, residual, signs, mean, var, pool_size, *rest):  # type: ignore[no-untyped-def]
    return _statistics(x, pool_size), _statistics(x, pool_size)


@_fake("backward_apply")
def _(dy, x, weight, bias, residual, signs, mean, var, k1, k2, k3, pool_size, eps, activation, slope, want, mask=None):  # type: ignore[no-untyped-def]
    return empty_like(x), empty_like(x) if want else x.new_empty(0)


@_fake("backward")
def _(  # type: ignore[no-untyped-def]
    dy,
    x,
    weight,
    bias,
    residual,
    signs,
    mean,
    var,
    pool_size,
    eps,
    activation,
    slope,
    frozen,
    want_x,
    want_residual,
    mask=None,
):
    return tuple(
        (empty_like(x) if like is x else torch.empty_like(like)) if wanted else x.new_empty(0)
        for like, wanted in (
            (x, want_x),
            (x, want_residual),
            (weight, weight is not None),
            (bias, bias is not None),
        )
    )


@_fake("backward_out")
@_fake("forward_out")
@_fake("update_statistics")
def _(*args):  # type: ignore[no-untyped-def]
    return None
