"""The operators on CUDA devices (and under Triton's interpreter): chooses a tiling, allocates, launches.

Three schemes. *Single*: a pool's values of a block of channels are one tile; one program keeps them in registers.
*Whole*: one program reads them twice, the second time from cache. *Split*: many programs make partial results, and
each program of a second kernel merges those of its channels; where that would be too much to read for each, a small
kernel in between merges them once. No atomics, every sum in a fixed order: the same bits on every run.

Masks, ghost batches and statistics merged over channel groups and ranks go through the same kernels. Nothing here waits
for the device, reads a value back or tunes at run time.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch._prims_common import suggest_memory_format

from batchnorm.kernels import triton_kernels as kernels
from batchnorm.kernels import triton_table

VERSION: str = triton.__version__

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MOST_SPLITS = 1024
_MOST_RANKS = 64  # whose moments every program merges for itself
_PROCESSORS = 132  # where there is no device to ask
# A product and a sum are rounded once. Triton 3.9 warns if a launch does not say so: 3.10 will round twice by default.
_COMPILED = {"enable_fp_fusion": True}


class Walk(NamedTuple):
    """A tensor as rows x channels x columns, in pools of rows; see triton_kernels.py."""

    planar: bool
    rows: int
    channels: int
    columns: int
    pool_rows: int

    @property
    def pools(self) -> int:
        return -(-self.rows // self.pool_rows)


class Tiling(NamedTuple):
    """Tiles of A x B elements, `tiles` to a program and `splits` programs for each pool and block of channels."""

    A: int
    B: int
    tiles: int
    splits: int
    programs: int
    warps: int
    scheme: str  # "single", "whole" or "split"
    merge_first: bool  # whether partial results are merged by a kernel of its own


def _power(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def supports(x: Tensor, pool_size: int) -> bool:
    """Whether these kernels take x; a function of its shape and dtype alone, the same in forward and backward."""
    pools = -(-x.shape[0] // pool_size) if pool_size > 0 else 1
    return x.dtype in _DTYPES and x.numel() > 0 and pools * x.shape[1] < 1 << 30


def is_interleaved(x: Tensor) -> bool:
    """Whether the results for x have their channels side by side."""
    return math.prod(x.shape[2:]) == 1 or (suggest_memory_format(x) is not torch.contiguous_format and x.shape[1] > 1)


def walk(x: Tensor, pool_size: int) -> Walk:
    """How x is walked, which is the order of its results."""
    samples, channels, inner = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    pool = pool_size if 0 < pool_size < samples else samples
    if is_interleaved(x):
        return Walk(False, samples * inner, channels, channels, pool * inner)
    return Walk(True, samples, channels, inner, pool)


def strides(shape: tuple[int, ...], stride: tuple[int, ...], planar: bool) -> tuple[int, int] | None:
    """Row and channel stride of a tensor (N, C, *space) that can be walked in this order, else None."""
    rows = [(n, s) for n, s in zip(shape[2:], stride[2:], strict=True) if n > 1]
    if not planar and shape[0] > 1:
        rows.insert(0, (shape[0], stride[0]))
    for (_, outer), (n, inner) in itertools.pairwise(rows):
        if outer != n * inner:
            return None
    if planar:
        return (stride[0], stride[1]) if not rows or rows[-1][1] == 1 else None
    if shape[1] > 1 and stride[1] != 1:
        return None
    return (rows[-1][1] if rows else shape[1]), 0


@lru_cache(maxsize=64)
def _device(device: torch.device) -> tuple[int, str]:
    """Multiprocessors and compute capability."""
    if device.type != "cuda":
        return _PROCESSORS, "none"
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, f"{properties.major}.{properties.minor}"


def _column_block(columns: int, most: int) -> int:
    """The widest block of at most `most` columns that leaves at most an eighth of it idle; else the least idle."""
    blocks = [1 << k for k in range(3, _power(most).bit_length())]
    idle = {b: (-(-columns // b) * b - columns) / columns for b in blocks}
    good = [b for b in blocks if b >= 32 and idle[b] <= 0.125]
    return max(good) if good else min(blocks, key=lambda b: (idle[b], -b))


def tiling(kind: str, w: Walk, itemsize: int, processors: int, capability: str) -> Tiling:
    """The scheme and tiles of a pass: "forward" and "backward" make sums, a "map" does not."""
    knobs = triton_table.lookup(capability, kind, "planar" if w.planar else "interleaved", itemsize)
    sums = kind != "map"
    sector = max(32 // itemsize, 8)

    def blocks(B: int) -> int:
        return w.pools * (w.channels if w.planar else -(-w.channels // B))

    A, B = _power(w.pool_rows), max(_power(w.columns), 8)
    if not w.planar:
        B = min(B, 64, max(knobs.single // A, sector))
    if sums and knobs.single >= A * B:
        warps = min(max(A * B // (32 * knobs.each), 1), 16)
        return Tiling(A, B, 1, 1, blocks(B), warps, "single", False)

    B = _column_block(w.columns, min(knobs.tile, 1024)) if w.planar else max(min(_power(w.columns), 64), 8)
    A = min(_power(w.pool_rows), max(knobs.tile // B, 1))
    tiles = -(-w.pool_rows // A) * (-(-w.columns // B) if w.planar else 1)
    if not sums:
        splits = -(-tiles // knobs.run)
        return Tiling(A, B, knobs.run, splits, blocks(B) * splits, knobs.warps, "split", False)
    read = w.pool_rows * (w.columns if w.planar else min(B, w.columns)) * itemsize
    splits = min(max(knobs.waves * processors // blocks(B), 1), tiles, _MOST_SPLITS)
    if splits == 1 or (read <= knobs.whole and blocks(B) >= processors):
        return Tiling(A, B, tiles, 1, blocks(B), knobs.warps, "whole", False)
    run = -(-tiles // splits)
    splits = -(-tiles // run)
    partial = splits * (1 if w.planar else B) * 24
    return Tiling(A, B, run, splits, blocks(B) * splits, knobs.warps, "split", partial > knobs.merged)


class Plan(NamedTuple):
    """How a call is cut, and what all its launches share; None where an operand lies in no order of a walk."""

    walk: Walk
    tiling: Tiling
    format: torch.memory_format
    strides: tuple[tuple[int, int] | None, ...]  # of x and dy
    geometry: tuple[int, ...]
    options: dict[str, Any]


@lru_cache(maxsize=4096)
def _plan(
    kind: str,
    shape: torch.Size,
    stride: tuple[int, ...],
    dy_stride: tuple[int, ...] | None,
    itemsize: int,
    pool_size: int,
    device: torch.device,
) -> Plan:
    x = torch.empty_strided(shape, stride, device="meta")
    w = walk(x, pool_size)
    found = tuple(strides(shape, each, w.planar) for each in (stride, dy_stride) if each is not None)
    steps = [s for each in reversed(found) if each for s in each]
    t = tiling(kind, w, itemsize, *_device(device))
    align = math.gcd(8, w.columns, *steps)
    geometry = (w.rows, w.channels, w.columns // align, w.pool_rows, t.splits, t.tiles, *(s // align for s in steps))
    options = {"ALIGN": align, "PLANAR": w.planar, "A": t.A, "B": t.B, "num_warps": t.warps, **_COMPILED}
    return Plan(w, t, suggest_memory_format(x), found, geometry, options)


class _Call:
    """One call: x, dy and mask in an order that can be walked, and the plan."""

    def __init__(
        self, kind: str, x: Tensor, pool_size: int, mask: Tensor | None = None, dy: Tensor | None = None
    ) -> None:
        plan = self._planned(kind, x, dy, pool_size)
        if None in plan.strides:  # one copy, in the order of the results
            if plan.strides[0] is None:
                x = torch.empty_like(x, memory_format=plan.format).copy_(x)
            if dy is not None and plan.strides[1] is None:
                dy = torch.empty_like(x, memory_format=plan.format).copy_(dy)
            plan = self._planned(kind, x, dy, pool_size)
        self.x, self.dy = x, dy
        self.valid = None if mask is None else mask.contiguous()
        self.walk, self.tiling, self.format, _, self.geometry, self.options = plan
        self.grid = (self.tiling.programs,)

    @staticmethod
    def _planned(kind: str, x: Tensor, dy: Tensor | None, pool_size: int) -> Plan:
        other = None if dy is None else dy.stride()
        return _plan(kind, x.shape, x.stride(), other, x.element_size(), pool_size, x.device)

    def dense(self, t: Tensor | None) -> Tensor | None:
        """t in exactly the layout of the results."""
        if t is None or t.is_contiguous(memory_format=self.format):
            return t
        return t.contiguous(memory_format=self.format)

    def result(self) -> Tensor:
        return torch.empty_like(self.x, memory_format=self.format)

    def statistics(self, *leading: int) -> Tensor:
        """Float64, (*leading, pools, channels)."""
        size = (*leading, self.walk.pools, self.walk.channels)
        return torch.empty(size, dtype=torch.float64, device=self.x.device)

    def partials(self, quantities: int) -> Tensor:
        """A workspace for partial results; sums of the backward have the number of values behind them, if masked."""
        quantities = 3 if self.valid is not None else quantities
        size = (quantities, self.walk.pools, self.tiling.splits, self.walk.channels)
        return torch.empty(size, dtype=torch.float64, device=self.x.device)

    def given(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, int]:
        """Statistics (C,) or (pools, C), and the distance from one pool's to the next."""
        many = mean.numel() == self.walk.pools * self.walk.channels
        return mean.contiguous(), var.contiguous(), self.walk.channels if many else 0

    def merge_sums(self, partial: Tensor) -> Tensor:
        """The same of sums of the backward."""
        return self.merge(kernels.merge_sums, partial, QUANTITIES=len(partial))

    def merge(self, kernel: Any, partial: Tensor, **constants: int) -> Tensor:
        """Partial results of all splits as one."""
        merged = self.statistics(partial.shape[0])
        pools, parts, channels = partial.shape[1:]
        parts_block = _power(parts)
        width = max(min(4096 // parts_block, 16), 1)
        grid = (pools * -(-channels // width),)
        kernel[grid](
            partial, merged, pools, parts, channels, W=width, PARTS=parts_block, num_warps=8, **_COMPILED, **constants
        )
        return merged


def _guard(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: makes that the one of x."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _or_none(t: Tensor | None) -> Tensor | None:
    """None for an empty tensor."""
    return None if t is None or t.numel() == 0 else t


def _partial_moments(call: _Call) -> Tensor:
    partial = call.partials(3)
    kernels.partial_moments[call.grid](call.x, call.valid, partial, *call.geometry, **call.options)
    return partial


def count_moments(x: Tensor, pool_size: int, mask: Tensor | None = None) -> Tensor:
    """Number of values, mean and sum of squared deviations, float64 (3, pools, C)."""
    with _guard(x):
        call = _Call("forward", x, pool_size, mask)
        partial = _partial_moments(call)
        return partial[:, :, 0] if call.tiling.splits == 1 else call.merge(kernels.merge_moments, partial)


def moments(x: Tensor, pool_size: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations, float64 (pools, C)."""
    _, mean, m2 = count_moments(x, pool_size, mask)
    return mean.clone(), m2.clone()  # an operator's results share no memory


def normalize(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    pool_size: int,
    eps: float,
    activation: str,
    slope: float,
    signs: Tensor | None,
    mask: Tensor | None = None,
) -> Tensor:
    """y = activation((x - mean) / sqrt(var + eps) gamma + beta + residual); fills `signs` where given."""
    with _guard(x):
        call = _Call("map", x, pool_size, mask)
        y = call.result()
        mean, var, stat_row = call.given(mean, var)
        operands = (call.x, y, call.dense(residual), call.valid, signs, _contiguous(weight), _contiguous(bias))
        kernels.normalize[call.grid](
            *operands, mean, var, None, None, eps, slope, 0, stat_row, *call.geometry, ACTIVATION=activation, PARTS=0,
            **call.options,
        )  # fmt: skip
        return y


def normalize_merged(
    x: Tensor,
    parts: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    pool_size: int,
    eps: float,
    activation: str,
    slope: float,
    groups: int,
    signs: Tensor | None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`normalize` by the statistics that the ranks' `count_moments` (ranks, 3, pools, C) merge into.

    Returns y, the number of values, mean and biased variance. Every program merges its channels' parts itself; with
    groups of channels, or a great many ranks, a kernel of its own does.
    """
    with _guard(x):
        call = _Call("map", x, pool_size, mask)
        ranks, pools, channels = len(parts), *parts.shape[2:]
        y, parts = call.result(), parts.contiguous()
        count, mean, var = call.statistics(), call.statistics(), call.statistics()
        merged, inside = None, 0
        if groups or ranks > _MOST_RANKS:
            size = channels // groups if groups else 1
            kernels.merge_groups[(pools * (channels // size),)](
                parts, count, mean, var, ranks, pools, channels, size, PARTS=min(_power(ranks * size), 1024),
                num_warps=4, **_COMPILED,
            )  # fmt: skip
        else:
            merged, inside = parts, _power(ranks)
        operands = (call.x, y, call.dense(residual), call.valid, signs, _contiguous(weight), _contiguous(bias))
        kernels.normalize[call.grid](
            *operands, mean, var, None if merged is None else count, merged, eps, slope, ranks, channels,
            *call.geometry, ACTIVATION=activation, PARTS=inside, **call.options,
        )  # fmt: skip
        return y, count, mean, var


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    pool_size: int,
    eps: float,
    activation: str,
    slope: float,
    signs: Tensor | None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`normalize` by the batch's own statistics; returns those, the variance biased, as well."""
    with _guard(x):
        call = _Call("forward", x, pool_size, mask)
        y, mean, var = call.result(), call.statistics(), call.statistics()
        operands = (
            call.x, y, call.dense(residual), call.valid, signs, _contiguous(weight), _contiguous(bias), mean, var,
        )  # fmt: skip
        if call.tiling.scheme != "split":
            kernels.forward_whole[call.grid](
                *operands, eps, slope, *call.geometry, ACTIVATION=activation,
                SINGLE=call.tiling.scheme == "single", **call.options,
            )  # fmt: skip
            return y, mean, var
        partial, parts = _partial_moments(call), call.tiling.splits
        if call.tiling.merge_first:
            partial, parts = call.merge(kernels.merge_moments, partial), 1
        kernels.normalize[call.grid](
            *operands, None, partial, eps, slope, parts, call.walk.channels, *call.geometry, ACTIVATION=activation,
            PARTS=_power(parts), **call.options,
        )  # fmt: skip
        return y, mean, var


def backward_reduce(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    signs: Tensor | None,
    mean: Tensor,
    var: Tensor,
    pool_size: int,
    eps: float,
    activation: str,
    slope: float,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sums over each pool of dz and dz (x - mean), float64 (pools, C)."""
    with _guard(x):
        call = _Call("backward", x, pool_size, mask, dy)
        operands = _saved(call, weight, bias, residual, signs, mean, var)
        partial = call.partials(2)
        _sum(call, None, None, operands, partial, eps, slope, activation)
        merged = partial[:, :, 0] if call.tiling.splits == 1 else call.merge_sums(partial)
        return merged[0].clone(), merged[1].clone()


def backward_apply(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    signs: Tensor | None,
    mean: Tensor,
    var: Tensor,
    k1: Tensor,
    k2: Tensor,
    k3: Tensor,
    pool_size: int,
    eps: float,
    activation: str,
    slope: float,
    want_residual: bool,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """dx = k1 dz + k2 (x - mean) + k3, and dz where wanted."""
    with _guard(x):
        call = _Call("map", x, pool_size, mask, dy)
        *saved, stat_row = _saved(call, weight, bias, residual, signs, mean, var)
        dx = call.result()
        dz = call.result() if want_residual else None
        size = (call.walk.pools, call.walk.channels)
        coefficients = (k.expand(size).contiguous() for k in (k1, k2, k3))
        kernels.apply_gradients[call.grid](
            call.dy, call.x, dx, dz, None, None, *saved, None, None, *coefficients, eps, slope, 0, stat_row,
            *call.geometry, ACTIVATION=activation, PARTS=0, **call.options,
        )  # fmt: skip
        return dx, dz


def backward_merged(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    signs: Tensor | None,
    mean: Tensor,
    var: Tensor,
    sums: Tensor,
    count: Tensor,
    pool_size: int,
    eps: float,
    activation: str,
    slope: float,
    want_residual: bool,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """dx by batch statistics of pools whose sums of gamma dz and gamma dz (x - mean), (2, pools, C), are merged."""
    with _guard(x):
        call = _Call("map", x, pool_size, mask, dy)
        *saved, stat_row = _saved(call, weight, bias, residual, signs, mean, var)
        dx = call.result()
        dz = call.result() if want_residual else None
        kernels.apply_gradients[call.grid](
            call.dy, call.x, dx, dz, None, None, *saved, sums.contiguous(), count.contiguous(), None, None, None, eps,
            slope, 1, stat_row, *call.geometry, ACTIVATION=activation, PARTS=1, **call.options,
        )  # fmt: skip
        return dx, dz


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    signs: Tensor | None,
    mean: Tensor,
    var: Tensor,
    pool_size: int,
    eps: float,
    activation: str,
    slope: float,
    population: bool,
    want_x: bool,
    want_residual: bool,
    mask: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, d_residual, d_gamma and d_beta by batch statistics, or by those of a population, which are constants."""
    with _guard(x):
        parameters = weight is not None or bias is not None
        call = _Call("backward", x, pool_size, mask, dy)
        operands = _saved(call, weight, bias, residual, signs, mean, var)
        dx = call.result() if want_x else None
        dz = call.result() if want_residual else None
        d_weight = None if weight is None else torch.empty_like(weight, memory_format=torch.contiguous_format)
        d_bias = None if bias is None else torch.empty_like(bias, memory_format=torch.contiguous_format)
        if population or not want_x:  # one pass over the data makes all
            partial = call.partials(2) if parameters else None
            if partial is not None or want_x or want_residual:
                _sum(call, dx, dz, operands, partial, eps, slope, activation)
        else:
            partial = _batch_gradients(call, dx, dz, d_weight, d_bias, operands, eps, slope, activation)
        if partial is not None and parameters:
            pools, parts, channels = partial.shape[1:]
            block, width = _power(parts), max(min(4096 // _power(parts), 128), 1)
            kernels.parameter_gradients[(-(-channels // width),)](
                partial, operands[6], d_weight, d_bias, eps, pools, parts, operands[7], channels, W=width,
                PARTS=block, num_warps=4, **_COMPILED,
            )  # fmt: skip
        return dx, dz, d_weight, d_bias


def _saved(call: _Call, weight: Any, bias: Any, residual: Any, signs: Any, mean: Tensor, var: Tensor) -> Any:
    """What the backward reads beside dy and x, and the distance between the statistics of two pools."""
    signs = _or_none(signs)
    residual = None if signs is not None else call.dense(residual)
    return _contiguous(weight), _contiguous(bias), residual, call.valid, signs, *call.given(mean, var)


def _sum(
    call: _Call, dx: Tensor | None, dz: Tensor | None, operands: Any, partial: Tensor | None, eps: float,
    slope: float, activation: str,
) -> None:  # fmt: skip
    """Partial sums and, where wanted, the gradients by constant statistics in the same pass."""
    *saved, stat_row = operands
    kernels.partial_gradients[call.grid](
        call.dy, call.x, dx, dz, *saved, partial, eps, slope, stat_row, *call.geometry, ACTIVATION=activation,
        **call.options,
    )  # fmt: skip


def _batch_gradients(
    call: _Call, dx: Tensor | None, dz: Tensor | None, d_weight: Tensor | None, d_bias: Tensor | None, operands: Any,
    eps: float, slope: float, activation: str,
) -> Tensor | None:  # fmt: skip
    """dx and dz; with one pool d_gamma and d_beta too, with several the sums that they are made of."""
    *saved, stat_row = operands
    one = call.walk.pools == 1
    outputs = (dx, dz, d_weight if one else None, d_bias if one else None)
    if call.tiling.scheme != "split":
        sums = None if one else call.statistics(2)
        kernels.backward_whole[call.grid](
            call.dy, call.x, *outputs, *saved, sums, eps, slope, stat_row, *call.geometry, ACTIVATION=activation,
            SINGLE=call.tiling.scheme == "single", **call.options,
        )  # fmt: skip
        return None if sums is None else sums[:, :, None]
    partial, parts = call.partials(2), call.tiling.splits
    _sum(call, None, None, operands, partial, eps, slope, activation)
    if call.tiling.merge_first:
        partial, parts = call.merge_sums(partial)[:, :, None], 1
    kernels.apply_gradients[call.grid](
        call.dy, call.x, *outputs, *saved, partial, None, None, None, None, eps, slope, parts, stat_row,
        *call.geometry, ACTIVATION=activation, PARTS=_power(parts), **call.options,
    )  # fmt: skip
    return None if one else partial


def updates(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batches: Tensor | None,
    mean: Tensor,
    carry: Tensor | None = None,
) -> bool:
    """Whether `update_statistics` takes these buffers."""
    given = [t for t in (running_mean, running_var, batches, carry) if t is not None]
    return mean.dtype == torch.float64 and all(t.is_contiguous() and t.device == mean.device for t in given)


def update_statistics(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: int,
    pool_count: int,
    momentum: float | None,
    unbiased: bool,
    carry: Tensor | None = None,
) -> None:
    """running = (1 - momentum) running + momentum batch; without a momentum, the cumulative average."""
    with _guard(mean):
        pools = mean.shape[0] if mean.ndim == 2 else 1
        channels = mean.shape[-1]
        cumulative = momentum is None and num_batches_tracked is not None
        kernels.update_statistics[(-(-channels // 128),)](
            running_mean, running_var, num_batches_tracked, carry, mean.contiguous(), var.contiguous(),
            1.0 if momentum is None else momentum, count, count if pools == 1 else pool_count, pools, channels,
            CUMULATIVE=cumulative, UNBIASED=unbiased, W=128, num_warps=4, **_COMPILED,
        )  # fmt: skip
        if cumulative and num_batches_tracked is not None:  # every program has read it
            num_batches_tracked.add_(1)
