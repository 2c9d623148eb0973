"""The operators' schemas and fake kernels. C++ and Triton register implementations; this is what they implement.

Throughout: ``x`` has shape (N, C, *space); statistics are float64 of shape (pools, C), where a pool is a run of
``pool_size`` samples (0: all of them) and variances are biased; ``weight`` and ``bias`` have shape (C,);
``activation`` is an index into `ACTIVATIONS`; ``signs`` holds one bit for each element where the activation's
derivative is that of its linear part, and is empty where not asked for; ``mask``, boolean of shape (N, *space), says
which positions are in the pools: nothing is read at the others, and zeros are written there (not together with signs).
Moments to be merged are one tensor (3, pools, C) of count, mean and m2; ``parts`` are those of all ranks, (ranks, 3,
pools, C), and ``groups`` the number of groups of adjacent channels that share statistics as well (0: none do).
``carry``, of shape (2, *running_mean.shape), holds what rounding left of the running mean and variance: each statistic
is value + carry. It is float64 beside float64, else float32, and counts as 0 where value + carry does not round to the
value, because somebody else has then written the value. `normalize` gives the bits of `forward` if it is told that the
statistics are x's ``own``.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from typing import Any

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
    "elu",
    "mish",
    "gelu_tanh",
)

# Activations whose derivative takes two values: with a residual, one bit an element is enough for the backward.
PIECEWISE_LINEAR = ("relu", "relu6", "leaky_relu")

_AFFINE = "Tensor? weight, Tensor? bias, Tensor? residual"
_FUSION = "int pool_size, float eps, int activation, float slope"
_SAVED = "Tensor? signs, Tensor mean, Tensor var"
_MASK = "Tensor? mask=None"

ARGUMENTS: dict[str, Any] = {}  # of each operator, as a named tuple: the one place that names them, in order


def _define(name: str, arguments: str, results: str) -> None:
    """Defines an operator, and how its implementations get its arguments.

    Each reads tensors in whatever memory order they come; a compiler need not reorder what it hands them.
    """
    schema = f"{name}({arguments}) -> {results}"
    LIBRARY.define(schema, tags=(torch.Tag.flexible_layout,))
    given = torch._C.parse_schema(f"batchnorm::{schema}").arguments
    optional = [each.default_value for each in given if each.has_default_value()]  # the last ones
    ARGUMENTS[name] = namedtuple(name, [each.name for each in given], defaults=optional)


def by_name(name: str, implementation: Callable[[Any], Any]) -> Callable[..., Any]:
    """An implementation that takes the arguments as attributes, as the dispatcher calls it."""
    arguments = ARGUMENTS[name]

    def call(*args: Any, **kwargs: Any) -> Any:
        return implementation(arguments(*args, **kwargs))

    return call


_define("moments", f"Tensor x, int pool_size, {_MASK}", "(Tensor mean, Tensor m2)")
_define(
    "normalize",
    f"Tensor x, Tensor mean, Tensor var, {_AFFINE}, {_FUSION}, bool save_signs, {_MASK}, bool own=False",
    "(Tensor y, Tensor signs)",
)
_define(
    "forward",
    f"Tensor x, {_AFFINE}, {_FUSION}, bool save_signs, {_MASK}",
    "(Tensor y, Tensor mean, Tensor var, Tensor signs)",
)
_define(
    "backward_reduce",
    f"Tensor dy, Tensor x, {_AFFINE}, {_SAVED}, {_FUSION}, {_MASK}",
    "(Tensor sum_dz, Tensor sum_dz_centered)",
)
_define(
    "backward_apply",
    f"Tensor dy, Tensor x, {_AFFINE}, {_SAVED}, Tensor k1, Tensor k2, Tensor k3, {_FUSION}, bool want_residual,"
    f" {_MASK}",
    "(Tensor dx, Tensor d_residual)",
)
_define(
    "backward",
    f"Tensor dy, Tensor x, {_AFFINE}, {_SAVED}, {_FUSION}, bool population, bool want_x, bool want_residual, {_MASK}",
    "(Tensor dx, Tensor d_residual, Tensor d_weight, Tensor d_bias)",
)
# If pools reach over channel groups or ranks: count, mean and m2 are gathered, merged where they normalize, and the
# sums of gamma dz and gamma dz (x - mean) where they make dx. `reduce_merged` gives the latter, (2, pools, C), and the
# gradients of this rank's gamma and beta.
_define("count_moments", f"Tensor x, int pool_size, {_MASK}", "Tensor")
_define(
    "normalize_merged",
    f"Tensor x, Tensor parts, {_AFFINE}, {_FUSION}, int groups, bool save_signs, {_MASK}",
    "(Tensor y, Tensor count, Tensor mean, Tensor var, Tensor signs)",
)
_define(
    "reduce_merged",
    f"Tensor dy, Tensor x, {_AFFINE}, {_SAVED}, {_FUSION}, {_MASK}",
    "(Tensor sums, Tensor d_weight, Tensor d_bias)",
)
_define(
    "backward_merged",
    f"Tensor dy, Tensor x, {_AFFINE}, {_SAVED}, Tensor sums, Tensor count, {_FUSION}, bool want_residual, {_MASK}",
    "(Tensor dx, Tensor d_residual)",
)
# The same gradients, of any order: the C++ backward calls this where it cannot do without Python.
_define(
    "gradients",
    f"Tensor dy, Tensor x, {_AFFINE}, {_SAVED}, {_FUSION}, bool population, bool[] wanted,"
    f" {_MASK}, int groups=0, Tensor? factors=None",
    "(Tensor d_x, Tensor d_weight, Tensor d_bias, Tensor d_residual)",
)
# The output of a batch normalization as a function of its input that has derivatives, for C++ as well.
_define(
    "normalize_again",
    "Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps, int activation, float slope,"
    " bool population",
    "Tensor",
)
# Raises, for C++, since an operand of an output that is to be made again has changed.
_define("refuse", "Tensor mean", "Tensor mean_again")
_define(
    "update_statistics",
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked,"
    " Tensor mean, Tensor var, SymInt count, SymInt pool_count, float? momentum, bool unbiased,"
    " Tensor(d!)? carry=None",
    "()",
)
# The same of rows of statistics that are given as they are: mean and var of (rows, C), momentum and accepted of shapes
# that expand to it. Rows that are not accepted stay as they are.
_define(
    "mix_statistics",
    "Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, Tensor var, Tensor momentum, Tensor accepted,"
    " Tensor(c!)? carry=None",
    "()",
)

# Into preallocated tensors: benchmarks measure them, where the cost of fresh memory is to be left out.
_define("forward_out", f"Tensor x, {_AFFINE}, Tensor(a!) y, Tensor(b!) mean, Tensor(c!) var, {_FUSION}", "()")
_define(
    "backward_out",
    "Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, Tensor(a!) dx, Tensor(b!) sum_dz,"
    f" Tensor(c!) sum_dz_centered, {_FUSION}",
    "()",
)


def statistics_dtype(device: torch.device) -> torch.dtype:
    """float64, but float32 on devices that lack it."""
    return torch.float32 if device.type == "mps" else torch.float64


def carry_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the carry beside running statistics of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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


def _fake(name: str, fake: Callable[[Any], Any]) -> None:
    torch.library.register_fake(f"batchnorm::{name}", by_name(name, fake), lib=LIBRARY)


def _two_statistics(a: Any) -> tuple[Tensor, Tensor]:
    return _statistics(a.x, a.pool_size), _statistics(a.x, a.pool_size)


def _or_empty(like: Tensor, x: Tensor, wanted: bool) -> Tensor:
    """A result like ``like``; empty where it is not wanted."""
    if not wanted:
        return x.new_empty(0)
    return empty_like(x) if like is x else torch.empty_like(like)


def _input_gradients(a: Any) -> tuple[Tensor, Tensor]:
    return empty_like(a.x), _or_empty(a.x, a.x, a.want_residual)


def _all_gradients(a: Any) -> tuple[Tensor, ...]:
    of_input = _or_empty(a.x, a.x, a.want_x), _or_empty(a.x, a.x, a.want_residual)
    return *of_input, *(_or_empty(each, a.x, each is not None) for each in (a.weight, a.bias))


def _nothing(a: Any) -> None:
    return None


_fake("moments", _two_statistics)
_fake("normalize", lambda a: (empty_like(a.x), _signs(a.x, a.save_signs)))
_fake("forward", lambda a: (empty_like(a.x), *_two_statistics(a), _signs(a.x, a.save_signs)))
_fake("count_moments", lambda a: torch.stack((_statistics(a.x, a.pool_size),) * 3))
_fake(
    "normalize_merged",
    lambda a: (empty_like(a.x), _statistics(a.x, a.pool_size), *_two_statistics(a), _signs(a.x, a.save_signs)),
)
_fake("backward_reduce", _two_statistics)
_fake("backward_apply", _input_gradients)
_fake(
    "reduce_merged",
    lambda a: (
        torch.stack((_statistics(a.x, a.pool_size),) * 2),
        *(_or_empty(each, a.x, each is not None) for each in (a.weight, a.bias)),
    ),
)
_fake("backward_merged", _input_gradients)
_fake("backward", _all_gradients)
for _name in ("update_statistics", "mix_statistics", "forward_out", "backward_out"):
    _fake(_name, _nothing)
