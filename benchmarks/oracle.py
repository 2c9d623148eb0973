"""The gate: a result is compared with the float64 reference before anything is timed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchnorm import reference

from .cases import EPS, Case, Data, draw
from .targets import OURS

KINKS = {"relu": (0,), "leaky_relu": (0,), "relu6": (0, 6), "hardswish": (-3, 3)}
"""Where the derivatives of activations jump."""

LIMIT = 16.0
"""Units in the last place that our result may be off; eager bf16 rounds three times."""

BLOCK = 1 << 20  # elements of x that are worked on at once, by one thread


class WrongResultError(Exception):
    """A contestant's result is not batch normalization's."""


def check(case: Case, name: str, result: Mapping[str, Tensor], population: bool = False) -> float:
    """The result's largest error, in units in the last place of 1 + |true|; of root m + |true|, for sums of m terms.

    Others than ours may add up m terms in float32, whose roundings walk off by some root m units: torch does so in
    channels_last. That is no wrong result, only a worse one; its error stands in the row.

    Args:
        case: what was computed, on `draw(case)`.
        name: whose result it is.
        result: some of y, dx and residual (shaped as x), weight and bias (their gradients, (C,)).
        population: whether mean 0 and variance 1 normalized, and not the batch's own.

    Raises:
        WrongResultError: it is above `LIMIT` (others: and what a walk adds), or not a number.
    """
    truth, slack = _truth(case.shape, case.dtype, case.fusion, population)
    unit, root = torch.finfo(case.torch_dtype).eps, math.sqrt(case.pool)
    # Sums of float64 elements are taken in float64 by everybody, where roundings walk off, too.
    own_walk = root if case.dtype == "float64" else 0.0
    limit = LIMIT + (own_walk if name in OURS else _walk(case))
    errors = {}
    for key, given in result.items():
        scale = root if key in ("weight", "bias") else 1.0
        allowed = slack.get(key if name in OURS else f"{key} of others", slack.get(key))
        errors[key] = _error(given.detach(), truth[key], allowed, scale) / unit
    for key, error in errors.items():
        if not error <= limit:  # NaN, too
            raise WrongResultError(f"{name}: {key} is off by {error:.3g} units in the last place, no figure")
    return max(errors.values())


def _error(given: Tensor, true: Tensor, slack: Tensor | None, scale: float) -> float:
    """The largest |given - true| beyond `slack`, over scale + |true|; NaN if there is one."""
    if given.shape != true.shape:
        return math.inf
    width, axis = (_width(given), 1) if given.ndim > 1 else (given.numel(), 0)
    worst = []
    for start in range(0, given.shape[axis], width):
        part, exact = (t.narrow(axis, start, min(width, t.shape[axis] - start)) for t in (given, true))
        off = (part.double() - exact).abs()
        if slack is not None:
            off -= slack.narrow(axis, start, exact.shape[axis])
        worst.append(float(off.div_(exact.abs().add_(scale)).amax()))
    return math.nan if any(map(math.isnan, worst)) else max(0.0, *worst)


def _walk(case: Case) -> float:
    """What a float32 sum over a pool may be off by (four deviations), in units in the last place of the dtype."""
    return 4 * math.sqrt(case.pool) * torch.finfo(torch.float32).eps / torch.finfo(case.torch_dtype).eps


def _to_kink(z: Any, activation: str) -> Any:
    """How far each z lies from the nearest place where the derivative jumps."""
    return np.min([abs(z - kink) for kink in KINKS.get(activation, (np.inf,))], axis=0)


def _width(x: Tensor) -> int:
    """Channels a block."""
    return max(1, min(x.shape[1], BLOCK * x.shape[1] // x.numel()))


@lru_cache(maxsize=1)
def _truth(shape: tuple[int, ...], dtype: str, fusion: str, population: bool) -> tuple[dict[str, Tensor], ...]:
    """The float64 results, and how far off each may be besides: where relu's kink is near, either side is right."""
    case = Case(shape, dtype, "planar" if len(shape) > 2 else "dense", fusion)
    data, width = draw(case), _width(draw(case).x)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        parts = list(
            pool.map(lambda c: _truth_of(case, data, slice(c, c + width), population), range(0, shape[1], width))
        )
    return tuple(
        {key: torch.cat([part[i][key] for part in parts], dim=min(parts[0][i][key].ndim - 1, 1)) for key in parts[0][i]}
        for i in range(2)
    )


def _truth_of(case: Case, data: Data, channels: slice, population: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`_truth` of a run of channels, which know nothing of one another."""
    # The truth of float64 is taken in more digits, since NumPy's sums are off by some units of it, too.
    wide = np.longdouble if case.dtype == "float64" else np.float64
    x, residual, dy = (t[:, channels].double().numpy().astype(wide) for t in (data.x, data.residual, data.dy))
    weight, bias = (t[channels].double().numpy().astype(wide) for t in (data.weight, data.bias))
    fusion = {"activation": case.activation, "residual": residual if case.adds else None, "eps": EPS}
    if population:
        fusion |= {"mean": weight * 0, "var": weight * 0 + 1}
    z = reference.fused(x, weight, bias, **{**fusion, "activation": None})
    g = reference.fused_backward(dy, x, weight, bias, **fusion)
    truth = {
        "y": reference.activation(z, case.activation), "dx": g.dx, "weight": g.dgamma, "bias": g.dbeta,
        "residual": g.dresidual,
    }  # fmt: skip
    tensors = {
        key: torch.from_numpy(np.asarray(value, np.float64)) for key, value in truth.items() if value is not None
    }
    if not case.activation:
        return tensors, {}
    pool, unit = reference.pool_axes(x.ndim), torch.finfo(case.torch_dtype).eps
    xhat = x if population else reference.batch_norm(x, eps=EPS).xhat
    scale = reference.along(abs(weight) / (1 if population else x.std(axis=pool)), x.ndim)
    distance = _to_kink(z, case.activation) / (unit * (1 + abs(z) + (abs(residual) if case.adds else 0)))
    slack = {}
    for width, whose in ((4, ""), (4 + _walk(case), " of others")):
        doubt = abs(dy) * (distance < width)
        slack |= {f"weight{whose}": (doubt * abs(xhat)).sum(axis=pool), f"bias{whose}": doubt.sum(axis=pool)}
    # What a sum is off by, every element of dx is, over m.
    of_sums = [reference.along(slack[f"{key} of others"] / case.pool, x.ndim) for key in ("weight", "bias")]
    slack |= {"dx": scale * (doubt + of_sums[0] * abs(xhat) + of_sums[1]), "residual": doubt}
    return tensors, {key: torch.from_numpy(np.asarray(value, np.float64)) for key, value in slack.items()}
