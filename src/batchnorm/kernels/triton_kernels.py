"""The device code of `kernels/triton.py`.

A tensor is rows x channels x columns. Planar (N, C, *space): a row is a sample, columns are its space, and a program
works on one channel. Interleaved (N, C) and channels last: a row holds every channel, and a program works on a block
of B of them. A pool is a run of ``pool_rows`` rows. Tiles of A x B elements are numbered inside a pool; a program takes
a run of them. So each statistic is a vector of W values: W = 1 (planar) or B (interleaved).

Elements are computed in float32; what is summed over a program, merged or handed on is float64. Every sum has a fixed
order. Partial results lie in a float64 workspace (quantities, pools, splits, channels). Integers that are multiples
of ALIGN come divided by it, so that the compiler can tell that rows start at whole vectors.
"""

# Only the branch that a constant chooses is compiled: an else after a return is needed.
# ruff: noqa: RET505, SIM108
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, no-any-return"
from __future__ import annotations

import triton
import triton.language as tl

GEOMETRY = ("rows", "channels", "columns", "pool_rows", "splits", "tiles")
# Their values come from shapes: no new compilation for each.
VARIES = [*GEOMETRY, "parts", "stat_row", "x_row", "x_channel", "dy_row", "dy_channel", "pools", "count", "pool_count"]

# ---------------------------------------------------------------------------------------------- places


@triton.jit
def _place(blocks, splits, REVERSED: tl.constexpr):
    """Block of channels, split and pool of this program; reversed: the one that wrote last comes first."""
    pid = tl.program_id(0)
    if REVERSED:
        pid = tl.num_programs(0) - 1 - pid
    return (pid % blocks).to(tl.int64), pid // blocks % splits, (pid // blocks // splits).to(tl.int64)


@triton.jit
def _blocks(channels, PLANAR: tl.constexpr, B: tl.constexpr):
    """How many blocks of channels there are."""
    if PLANAR:
        return channels
    else:
        return tl.cdiv(channels, B)


@triton.jit
def _channels(block, channels, PLANAR: tl.constexpr, B: tl.constexpr):
    """The W channels of a block, and which of them there are."""
    if PLANAR:
        channel = block + tl.arange(0, 1)
    else:
        channel = block * B + tl.arange(0, B)
    return channel, channel < channels


@triton.jit
def _run(split, tiles, pool_rows, columns, PLANAR: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """First tile of a split, and the one after its last."""
    whole = tl.cdiv(pool_rows, A)
    if PLANAR:
        whole = whole * tl.cdiv(columns, B)
    first = split * tiles
    return first, tl.minimum(first + tiles, whole)


@triton.jit
def _tile(tile, block, pool, rows, columns, pool_rows, PLANAR: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """Rows (A,) of a tile, which of them there are, its columns' block, and how many values a channel has in it."""
    if PLANAR:
        wide = tl.cdiv(columns, B)
        row_block, column_block = tile // wide, tile % wide
        height = tl.minimum(columns - column_block * B, B)
    else:
        row_block, column_block, height = tile, block, 1
    begin = pool * pool_rows
    end = tl.minimum(begin + pool_rows, rows)
    first = begin + row_block * A
    row = first + tl.arange(0, A)
    return row, row < end, column_block, tl.minimum(tl.maximum(end - first, 0), A) * height


@triton.jit
def _at(
    row, row_there, column_block, block, columns, row_stride, channel_stride, PLANAR: tl.constexpr, B: tl.constexpr
):
    """Offsets of a tile's elements, and which of them there are."""
    column = column_block * B + tl.arange(0, B)
    start = row * row_stride
    if PLANAR:
        start += block * channel_stride
    return start[:, None] + column[None, :], row_there[:, None] & (column < columns)[None, :]


@triton.jit
def _dense(channels, columns, PLANAR: tl.constexpr):
    """Row and channel stride of a result."""
    if PLANAR:
        return columns.to(tl.int64) * channels, columns
    else:
        return columns, columns


@triton.jit
def _bytes_at(
    row, row_there, column_block, block, channels, columns, PLANAR: tl.constexpr, B: tl.constexpr
):  # fmt: skip
    """Offsets of a tile's bits, eight columns a byte; each plane or row starts at a whole byte."""
    width = tl.cdiv(columns, 8)
    column = column_block * (B // 8) + tl.arange(0, B // 8)
    line = row
    if PLANAR:
        line = row * channels + block
    return line[:, None] * width + column[None, :], row_there[:, None] & (column < width)[None, :]


@triton.jit
def _pool_sum(tile, PLANAR: tl.constexpr):
    """(A, B) to (W,), in float64."""
    tile = tile.to(tl.float64)
    if PLANAR:
        return tl.sum(tl.sum(tile, 1), 0, keep_dims=True)
    else:
        return tl.sum(tile, 0)


@triton.jit
def _spread(statistic, PLANAR: tl.constexpr):
    """(W,) to what broadcasts against a tile; a scalar costs no exchange between threads."""
    if PLANAR:
        return tl.sum(statistic, 0)
    else:
        return statistic[None, :]


@triton.jit
def _store(pointer, value, mask):
    """Stores float64 values in the pointer's dtype; narrow ones by way of float32."""
    if pointer.dtype.element_ty != tl.float64:
        value = value.to(tl.float32)
    tl.store(pointer, value.to(pointer.dtype.element_ty), mask)


@triton.jit
def _workspace(pool, part, channel, pools, parts, channels):
    """Offset of a partial result, and the distance from one quantity to the next."""
    return (pool * parts + part) * channels + channel, tl.cast(pools, tl.int64) * parts * channels


# ---------------------------------------------------------------------------------------------- activations


@triton.jit
def _exp_of_minus_twice(z):
    return tl.exp(-2.0 * tl.abs(z))


@triton.jit
def _activate(z, slope, ACTIVATION: tl.constexpr):
    """The activation at z; NaN stays NaN."""
    if ACTIVATION == "relu":
        z = tl.where(z <= 0, 0.0, z)
    elif ACTIVATION == "relu6":
        z = tl.where(z <= 0, 0.0, tl.where(z >= 6, 6.0, z))
    elif ACTIVATION == "leaky_relu":
        z = tl.where(z > 0, z, z * slope)
    elif ACTIVATION == "silu":
        z = z / (1.0 + tl.exp(-z))
    elif ACTIVATION == "gelu":
        z = z * (0.5 + 0.5 * tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "hardswish":
        z = tl.where(z <= -3, 0.0, tl.where(z >= 3, z, z * (z + 3) * (1 / 6)))
    elif ACTIVATION == "sigmoid":
        z = 1.0 / (1.0 + tl.exp(-z))
    elif ACTIVATION == "tanh":
        # Taylor's series where 1 - exp would cancel; its next term is below a rounding.
        s = z * z
        series = 2 / 15 + s * (-17 / 315 + s * (62 / 2835 - s * (1382 / 155925)))
        series = z + z * s * (-1 / 3 + s * series)
        e = _exp_of_minus_twice(z)
        rest = (1.0 - e) / (1.0 + e)
        z = tl.where(tl.abs(z) < 0.25, series, tl.where(z < 0, -rest, rest))
    return z


@triton.jit
def _is_linear(z, ACTIVATION: tl.constexpr):
    """Where a piecewise linear activation has the slope of its linear part."""
    on = z > 0
    if ACTIVATION == "relu6":
        on = on & (z < 6)
    return on


@triton.jit
def _gate(dy, on, slope, ACTIVATION: tl.constexpr):
    """dy times the derivative of a piecewise linear activation."""
    if ACTIVATION == "leaky_relu":
        return tl.where(on, dy, dy * slope)
    else:
        return tl.where(on, dy, 0.0)


@triton.jit
def _through(dy, z, slope, ACTIVATION: tl.constexpr):
    """dy times the activation's derivative at z."""
    if ACTIVATION == "relu" or ACTIVATION == "relu6" or ACTIVATION == "leaky_relu":
        dy = _gate(dy, _is_linear(z, ACTIVATION), slope, ACTIVATION)
    elif ACTIVATION == "silu":
        s = 1.0 / (1.0 + tl.exp(-z))
        dy = dy * (s * (1.0 + z * (1.0 - s)))
    elif ACTIVATION == "gelu":
        cdf = 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)
        dy = dy * (cdf + z * tl.exp(-0.5 * z * z) * 0.3989422804014327)
    elif ACTIVATION == "hardswish":
        dy = dy * tl.where(z <= -3, 0.0, tl.where(z < 3, z * (1 / 3) + 0.5, 1.0))
    elif ACTIVATION == "sigmoid" or ACTIVATION == "tanh":
        # s (1 - s) = e / (1 + e)^2 with e = exp(-|z|); 1 - tanh^2 is four times that at 2 z.
        scale = 1.0 if ACTIVATION == "sigmoid" else 4.0
        e = tl.exp(-tl.abs(z)) if ACTIVATION == "sigmoid" else _exp_of_minus_twice(z)
        dy = dy * (scale * e / ((1.0 + e) * (1.0 + e)))
    return dy


# ---------------------------------------------------------------------------------------------- statistics


@triton.jit
def _moments(
    x, x_row, x_channel, first, last, block, pool, rows, columns, pool_rows,
    PLANAR: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Count, mean and m2 of a run of tiles, in float32 about the first tile's mean; and that tile itself."""
    row, there, column_block, count = _tile(first, block, pool, rows, columns, pool_rows, PLANAR, A, B)
    at, mask = _at(row, there, column_block, block, columns, x_row, x_channel, PLANAR, B)
    held = tl.load(x + at, mask, 0.0).to(tl.float32)
    about = (_pool_sum(held, PLANAR) / tl.maximum(count, 1)).to(tl.float32)
    origin = _spread(about, PLANAR)
    sums = tl.where(mask, held - origin, 0.0)
    squares = sums * sums
    for tile in range(first + 1, last):
        row, there, column_block, more = _tile(tile, block, pool, rows, columns, pool_rows, PLANAR, A, B)
        at, mask = _at(row, there, column_block, block, columns, x_row, x_channel, PLANAR, B)
        value = tl.load(x + at, mask, 0.0).to(tl.float32)
        value = tl.where(mask, value - origin, 0.0)
        sums += value
        squares += value * value
        count += more
    total = _pool_sum(sums, PLANAR)
    number = tl.maximum(count, 1).to(tl.float64)
    m2 = _pool_sum(squares, PLANAR) - total * total / number
    return count, about.to(tl.float64) + total / number, tl.where(m2 < 0, 0.0, m2), held


@triton.jit
def _merged_moments(partial, channel, present, pool, pools, parts, channels, PARTS: tl.constexpr):
    """Count, mean and m2 (W,) of all parts of a pool, in float64."""
    part = tl.arange(0, PARTS)
    at, plane = _workspace(pool, part[:, None], channel[None, :], pools, parts, channels)
    mask = (part < parts)[:, None] & present[None, :]
    counts = tl.load(partial + at, mask, 0.0)
    means = tl.load(partial + plane + at, mask, 0.0)
    count = tl.sum(counts, 0)
    mean = tl.sum(counts * means, 0) / tl.where(count > 0, count, 1.0)
    away = means - mean[None, :]
    return count, mean, tl.sum(tl.load(partial + 2 * plane + at, mask, 0.0) + counts * away * away, 0)


@triton.jit
def _merged_sums(partial, channel, present, pool, pools, parts, channels, PARTS: tl.constexpr):
    """Sums of dz and of dz (x - mean) (W,) over all parts of a pool, in float64."""
    part = tl.arange(0, PARTS)
    at, plane = _workspace(pool, part[:, None], channel[None, :], pools, parts, channels)
    mask = (part < parts)[:, None] & present[None, :]
    return tl.sum(tl.load(partial + at, mask, 0.0), 0), tl.sum(tl.load(partial + plane + at, mask, 0.0), 0)


@triton.jit
def _affine(mean, var, weight, bias, channel, present, eps, PLANAR: tl.constexpr):
    """mean in two parts, gamma / s and beta, float32 as `_spread`; and 1 / s, float64 (W,)."""
    inv_std = 1.0 / tl.sqrt(var + eps)
    center = mean.to(tl.float32)
    scale = inv_std
    if weight is not None:
        scale = inv_std * tl.load(weight + channel, present, 0.0).to(tl.float64)
    shift = tl.zeros_like(center)
    if bias is not None:
        shift = tl.load(bias + channel, present, 0.0).to(tl.float32)
    rest = (mean - center.to(tl.float64)).to(tl.float32)
    return (
        _spread(center, PLANAR), _spread(rest, PLANAR), _spread(scale.to(tl.float32), PLANAR),
        _spread(shift, PLANAR), inv_std,
    )  # fmt: skip


@triton.jit(do_not_specialize=VARIES)
def partial_moments(
    x, partial, rows, channels, columns, pool_rows, splits, tiles, x_row, x_channel,
    ALIGN: tl.constexpr, PLANAR: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Count, mean and m2 of each split."""
    columns, x_row, x_channel = columns * ALIGN, x_row * ALIGN, x_channel * ALIGN
    block, split, pool = _place(_blocks(channels, PLANAR, B), splits, False)
    channel, present = _channels(block, channels, PLANAR, B)
    first, last = _run(split, tiles, pool_rows, columns, PLANAR, A, B)
    count, mean, m2, _ = _moments(
        x, x_row, x_channel, first, last, block, pool, rows, columns, pool_rows, PLANAR, A, B
    )  # fmt: skip
    at, plane = _workspace(pool, split, channel, tl.cdiv(rows, pool_rows), splits, channels)
    tl.store(partial + at, tl.zeros_like(mean) + count, present)
    tl.store(partial + plane + at, mean, present)
    tl.store(partial + 2 * plane + at, m2, present)


@triton.jit(do_not_specialize=VARIES)
def merge_moments(partial, merged, pools, parts, channels, W: tl.constexpr, PARTS: tl.constexpr):
    """All parts of each pool as one: count, mean and m2."""
    blocks = tl.cdiv(channels, W)
    pool = (tl.program_id(0) // blocks).to(tl.int64)
    channel = tl.program_id(0) % blocks * W + tl.arange(0, W)
    present = channel < channels
    count, mean, m2 = _merged_moments(partial, channel, present, pool, pools, parts, channels, PARTS)
    at, plane = _workspace(pool, 0, channel, pools, 1, channels)
    tl.store(merged + at, count, present)
    tl.store(merged + plane + at, mean, present)
    tl.store(merged + 2 * plane + at, m2, present)


@triton.jit(do_not_specialize=VARIES)
def merge_sums(partial, merged, pools, parts, channels, W: tl.constexpr, PARTS: tl.constexpr):
    """All parts of each pool as one: the sums of dz and dz (x - mean)."""
    blocks = tl.cdiv(channels, W)
    pool = (tl.program_id(0) // blocks).to(tl.int64)
    channel = tl.program_id(0) % blocks * W + tl.arange(0, W)
    present = channel < channels
    sum_dz, sum_dz_centered = _merged_sums(partial, channel, present, pool, pools, parts, channels, PARTS)
    at, plane = _workspace(pool, 0, channel, pools, 1, channels)
    tl.store(merged + at, sum_dz, present)
    tl.store(merged + plane + at, sum_dz_centered, present)


# ---------------------------------------------------------------------------------------------- forward


@triton.jit
def _finish(
    value, y, residual, signs, center, rest, scale, shift, slope, row, there, column_block, block, channels, columns,
    ACTIVATION: tl.constexpr, PLANAR: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Normalizes, adds, activates and stores one tile."""
    dense_row, dense_channel = _dense(channels, columns, PLANAR)
    at, mask = _at(row, there, column_block, block, columns, dense_row, dense_channel, PLANAR, B)
    z = ((value - center) - rest) * scale + shift
    if residual is not None:
        z += tl.load(residual + at, mask, 0.0).to(tl.float32)
    if signs is not None:
        bits = tl.reshape(_is_linear(z, ACTIVATION).to(tl.int32), (A, B // 8, 8)) << tl.arange(0, 8)[None, None, :]
        bytes_at, bytes_mask = _bytes_at(row, there, column_block, block, channels, columns, PLANAR, B)
        tl.store(signs + bytes_at, tl.sum(bits, 2).to(tl.uint8), bytes_mask)
    tl.store(y + at, _activate(z, slope, ACTIVATION).to(y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=VARIES)
def normalize(
    x, y, residual, signs, weight, bias, mean, var, partial, eps: tl.float64, slope, parts, stat_row,
    rows, channels, columns, pool_rows, splits, tiles, x_row, x_channel,
    ACTIVATION: tl.constexpr, ALIGN: tl.constexpr, PLANAR: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """y by the statistics given (PARTS = 0), or by those merged of the parts, which are then written."""
    columns, x_row, x_channel = columns * ALIGN, x_row * ALIGN, x_channel * ALIGN
    block, split, pool = _place(_blocks(channels, PLANAR, B), splits, PARTS > 0)
    channel, present = _channels(block, channels, PLANAR, B)
    statistic = pool * stat_row + channel
    if PARTS == 0:
        mu = tl.load(mean + statistic, present, 0.0).to(tl.float64)
        v = tl.load(var + statistic, present, 1.0).to(tl.float64)
    else:
        pools = tl.cdiv(rows, pool_rows)
        count, mu, m2 = _merged_moments(partial, channel, present, pool, pools, parts, channels, PARTS)
        v = m2 / tl.where(count > 0, count, 1.0)
        if split == 0:
            tl.store(mean + statistic, mu, present)
            tl.store(var + statistic, v, present)
    center, rest, scale, shift, _inv_std = _affine(mu, v, weight, bias, channel, present, eps, PLANAR)
    first, last = _run(split, tiles, pool_rows, columns, PLANAR, A, B)
    for i in range(first, last):
        tile = i
        if PARTS > 0:  # what was read last is still in the cache
            tile = first + last - 1 - i
        row, there, column_block, _count = _tile(tile, block, pool, rows, columns, pool_rows, PLANAR, A, B)
        at, mask = _at(row, there, column_block, block, columns, x_row, x_channel, PLANAR, B)
        value = tl.load(x + at, mask, 0.0).to(tl.float32)
        _finish(
            value, y, residual, signs, center, rest, scale, shift, slope, row, there, column_block, block, channels,
            columns, ACTIVATION, PLANAR, A, B,
        )  # fmt: skip


@triton.jit(do_not_specialize=VARIES)
def forward_whole(
    x, y, residual, signs, weight, bias, mean, var, eps: tl.float64, slope,
    rows, channels, columns, pool_rows, splits, tiles, x_row, x_channel,
    ACTIVATION: tl.constexpr, ALIGN: tl.constexpr, PLANAR: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    SINGLE: tl.constexpr,
):  # fmt: skip
    """Moments and y, a pool's channels to a program; SINGLE: one tile, which is read once."""
    columns, x_row, x_channel = columns * ALIGN, x_row * ALIGN, x_channel * ALIGN
    block, split, pool = _place(_blocks(channels, PLANAR, B), splits, False)
    channel, present = _channels(block, channels, PLANAR, B)
    first, last = _run(split, tiles, pool_rows, columns, PLANAR, A, B)
    if SINGLE:
        first, last = 0, 1
    count, mu, m2, held = _moments(
        x, x_row, x_channel, first, last, block, pool, rows, columns, pool_rows, PLANAR, A, B
    )  # fmt: skip
    v = m2 / count.to(tl.float64)
    tl.store(mean + pool * channels + channel, mu, present)
    tl.store(var + pool * channels + channel, v, present)
    center, rest, scale, shift, _inv_std = _affine(mu, v, weight, bias, channel, present, eps, PLANAR)
    for i in range(first, last):
        tile = last - 1 - i
        row, there, column_block, _count = _tile(tile, block, pool, rows, columns, pool_rows, PLANAR, A, B)
        if SINGLE:
            value = held
        else:
            at, mask = _at(row, there, column_block, block, columns, x_row, x_channel, PLANAR, B)
            value = tl.load(x + at, mask, 0.0).to(tl.float32)
        _finish(
            value, y, residual, signs, center, rest, scale, shift, slope, row, there, column_block, block, channels,
            columns, ACTIVATION, PLANAR, A, B,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------- backward


@triton.jit
def _dz(
    dy, x, residual, signs, center, rest, scale, shift, slope, dy_row, dy_channel, x_row, x_channel,
    row, there, column_block, block, channels, columns,
    ACTIVATION: tl.constexpr, PLANAR: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """dz = dy activation'(z) and x - mean of one tile; both are 0 or harmless where there is no element."""
    at, mask = _at(row, there, column_block, block, columns, dy_row, dy_channel, PLANAR, B)
    dz = tl.load(dy + at, mask, 0.0).to(tl.float32)
    at, mask = _at(row, there, column_block, block, columns, x_row, x_channel, PLANAR, B)
    centered = (tl.load(x + at, mask, 0.0).to(tl.float32) - center) - rest
    centered = tl.where(mask, centered, 0.0)
    if signs is not None:
        bytes_at, bytes_mask = _bytes_at(row, there, column_block, block, channels, columns, PLANAR, B)
        eight = tl.load(signs + bytes_at, bytes_mask, 0).to(tl.int32)
        on = tl.reshape(eight[:, :, None] >> tl.arange(0, 8)[None, None, :] & 1, (A, B)) != 0
        dz = _gate(dz, on, slope, ACTIVATION)
    elif ACTIVATION != "identity":
        z = centered * scale + shift
        if residual is not None:
            dense_row, dense_channel = _dense(channels, columns, PLANAR)
            at, mask = _at(row, there, column_block, block, columns, dense_row, dense_channel, PLANAR, B)
            z += tl.load(residual + at, mask, 0.0).to(tl.float32)
        dz = _through(dz, z, slope, ACTIVATION)
    return dz, centered


@triton.jit
def _apply(
    dz, centered, dx, d_residual, k1, k2, k3, row, there, column_block, block, channels, columns,
    PLANAR: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Stores dx = k1 dz + k2 (x - mean) + k3 (k2 None: k1 dz), and dz, of one tile."""
    dense_row, dense_channel = _dense(channels, columns, PLANAR)
    at, mask = _at(row, there, column_block, block, columns, dense_row, dense_channel, PLANAR, B)
    if dx is not None:
        value = k1 * dz
        if k2 is not None:
            value += k2 * centered + k3
        tl.store(dx + at, value.to(dx.dtype.element_ty), mask)
    if d_residual is not None:
        tl.store(d_residual + at, dz.to(d_residual.dtype.element_ty), mask)


@triton.jit
def _batch_coefficients(sum_dz, sum_dz_centered, count, inv_std, weight, channel, present, PLANAR: tl.constexpr):
    """k1, k2 and k3 of batch statistics, float32 as `_spread`."""
    k1 = inv_std
    if weight is not None:
        k1 = inv_std * tl.load(weight + channel, present, 0.0).to(tl.float64)
    k2 = -k1 * inv_std * inv_std * sum_dz_centered / count
    k3 = -k1 * sum_dz / count
    return _spread(k1.to(tl.float32), PLANAR), _spread(k2.to(tl.float32), PLANAR), _spread(k3.to(tl.float32), PLANAR)


@triton.jit
def _store_parameters(d_weight, d_bias, sum_dz, sum_dz_centered, inv_std, channel, mask):
    if d_weight is not None:
        _store(d_weight + channel, sum_dz_centered * inv_std, mask)
    if d_bias is not None:
        _store(d_bias + channel, sum_dz, mask)


@triton.jit(do_not_specialize=VARIES)
def partial_gradients(
    dy, x, dx, d_residual, weight, bias, residual, signs, mean, var, partial, eps: tl.float64, slope, stat_row,
    rows, channels, columns, pool_rows, splits, tiles, dy_row, dy_channel, x_row, x_channel,
    ACTIVATION: tl.constexpr, ALIGN: tl.constexpr, PLANAR: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Sums of dz and dz (x - mean) of each split; with dx or d_residual, theirs for constant statistics as well."""
    columns, x_row, x_channel = columns * ALIGN, x_row * ALIGN, x_channel * ALIGN
    dy_row, dy_channel = dy_row * ALIGN, dy_channel * ALIGN
    block, split, pool = _place(_blocks(channels, PLANAR, B), splits, False)
    channel, present = _channels(block, channels, PLANAR, B)
    mu = tl.load(mean + pool * stat_row + channel, present, 0.0).to(tl.float64)
    v = tl.load(var + pool * stat_row + channel, present, 1.0).to(tl.float64)
    center, rest, scale, shift, _inv_std = _affine(mu, v, weight, bias, channel, present, eps, PLANAR)
    sums = tl.zeros((A, B), tl.float32)
    products = tl.zeros((A, B), tl.float32)
    first, last = _run(split, tiles, pool_rows, columns, PLANAR, A, B)
    for tile in range(first, last):
        row, there, column_block, _count = _tile(tile, block, pool, rows, columns, pool_rows, PLANAR, A, B)
        dz, centered = _dz(
            dy, x, residual, signs, center, rest, scale, shift, slope, dy_row, dy_channel, x_row, x_channel,
            row, there, column_block, block, channels, columns, ACTIVATION, PLANAR, A, B,
        )  # fmt: skip
        sums += dz
        products += dz * centered
        _apply(
            dz, centered, dx, d_residual, scale, None, None, row, there, column_block, block, channels, columns,
            PLANAR, B,
        )  # fmt: skip
    if partial is not None:
        at, plane = _workspace(pool, split, channel, tl.cdiv(rows, pool_rows), splits, channels)
        tl.store(partial + at, _pool_sum(sums, PLANAR), present)
        tl.store(partial + plane + at, _pool_sum(products, PLANAR), present)


@triton.jit(do_not_specialize=VARIES)
def apply_gradients(
    dy, x, dx, d_residual, d_weight, d_bias, weight, bias, residual, signs, mean, var, partial, k1, k2, k3,
    eps: tl.float64, slope, parts, stat_row,
    rows, channels, columns, pool_rows, splits, tiles, dy_row, dy_channel, x_row, x_channel,
    ACTIVATION: tl.constexpr, ALIGN: tl.constexpr, PLANAR: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """dx and d_residual by coefficients given (PARTS = 0), or by those of the sums merged of the parts."""
    columns, x_row, x_channel = columns * ALIGN, x_row * ALIGN, x_channel * ALIGN
    dy_row, dy_channel = dy_row * ALIGN, dy_channel * ALIGN
    block, split, pool = _place(_blocks(channels, PLANAR, B), splits, PARTS > 0)
    channel, present = _channels(block, channels, PLANAR, B)
    mu = tl.load(mean + pool * stat_row + channel, present, 0.0).to(tl.float64)
    v = tl.load(var + pool * stat_row + channel, present, 1.0).to(tl.float64)
    center, rest, scale, shift, inv_std = _affine(mu, v, weight, bias, channel, present, eps, PLANAR)
    if PARTS == 0:
        at = pool * channels + channel
        c1 = _spread(tl.load(k1 + at, present, 0.0).to(tl.float32), PLANAR)
        c2 = _spread(tl.load(k2 + at, present, 0.0).to(tl.float32), PLANAR)
        c3 = _spread(tl.load(k3 + at, present, 0.0).to(tl.float32), PLANAR)
    else:
        sum_dz, sum_dz_centered = _merged_sums(
            partial, channel, present, pool, tl.cdiv(rows, pool_rows), parts, channels, PARTS
        )
        count = (tl.minimum(rows - pool * pool_rows, pool_rows) * (columns if PLANAR else 1)).to(tl.float64)
        c1, c2, c3 = _batch_coefficients(sum_dz, sum_dz_centered, count, inv_std, weight, channel, present, PLANAR)
        if split == 0:
            _store_parameters(d_weight, d_bias, sum_dz, sum_dz_centered, inv_std, channel, present)
    first, last = _run(split, tiles, pool_rows, columns, PLANAR, A, B)
    for i in range(first, last):
        tile = i
        if PARTS > 0:
            tile = first + last - 1 - i
        row, there, column_block, _count = _tile(tile, block, pool, rows, columns, pool_rows, PLANAR, A, B)
        dz, centered = _dz(
            dy, x, residual, signs, center, rest, scale, shift, slope, dy_row, dy_channel, x_row, x_channel,
            row, there, column_block, block, channels, columns, ACTIVATION, PLANAR, A, B,
        )  # fmt: skip
        _apply(
            dz, centered, dx, d_residual, c1, c2, c3, row, there, column_block, block, channels, columns, PLANAR, B
        )  # fmt: skip


@triton.jit(do_not_specialize=VARIES)
def backward_whole(
    dy, x, dx, d_residual, d_weight, d_bias, weight, bias, residual, signs, mean, var, sums, eps: tl.float64, slope,
    stat_row, rows, channels, columns, pool_rows, splits, tiles, dy_row, dy_channel, x_row, x_channel,
    ACTIVATION: tl.constexpr, ALIGN: tl.constexpr, PLANAR: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    SINGLE: tl.constexpr,
):  # fmt: skip
    """Sums, dx and d_residual by batch statistics, a pool's channels to a program; SINGLE: one tile, read once."""
    columns, x_row, x_channel = columns * ALIGN, x_row * ALIGN, x_channel * ALIGN
    dy_row, dy_channel = dy_row * ALIGN, dy_channel * ALIGN
    block, split, pool = _place(_blocks(channels, PLANAR, B), splits, False)
    channel, present = _channels(block, channels, PLANAR, B)
    mu = tl.load(mean + pool * stat_row + channel, present, 0.0).to(tl.float64)
    v = tl.load(var + pool * stat_row + channel, present, 1.0).to(tl.float64)
    center, rest, scale, shift, inv_std = _affine(mu, v, weight, bias, channel, present, eps, PLANAR)
    first, last = _run(split, tiles, pool_rows, columns, PLANAR, A, B)
    if SINGLE:
        first, last = 0, 1
    row, there, column_block, _count = _tile(first, block, pool, rows, columns, pool_rows, PLANAR, A, B)
    dz, centered = _dz(
        dy, x, residual, signs, center, rest, scale, shift, slope, dy_row, dy_channel, x_row, x_channel,
        row, there, column_block, block, channels, columns, ACTIVATION, PLANAR, A, B,
    )  # fmt: skip
    total, products = dz, dz * centered
    for tile in range(first + 1, last):
        row, there, column_block, _count = _tile(tile, block, pool, rows, columns, pool_rows, PLANAR, A, B)
        more, centered_more = _dz(
            dy, x, residual, signs, center, rest, scale, shift, slope, dy_row, dy_channel, x_row, x_channel,
            row, there, column_block, block, channels, columns, ACTIVATION, PLANAR, A, B,
        )  # fmt: skip
        total += more
        products += more * centered_more
    sum_dz, sum_dz_centered = _pool_sum(total, PLANAR), _pool_sum(products, PLANAR)
    count = (tl.minimum(rows - pool * pool_rows, pool_rows) * (columns if PLANAR else 1)).to(tl.float64)
    c1, c2, c3 = _batch_coefficients(sum_dz, sum_dz_centered, count, inv_std, weight, channel, present, PLANAR)
    _store_parameters(d_weight, d_bias, sum_dz, sum_dz_centered, inv_std, channel, present)
    if sums is not None:
        at, plane = _workspace(pool, 0, channel, tl.cdiv(rows, pool_rows), 1, channels)
        tl.store(sums + at, sum_dz, present)
        tl.store(sums + plane + at, sum_dz_centered, present)
    for i in range(first, last):
        row, there, column_block, _count = _tile(last - 1 - i, block, pool, rows, columns, pool_rows, PLANAR, A, B)
        if not SINGLE:
            dz, centered = _dz(
                dy, x, residual, signs, center, rest, scale, shift, slope, dy_row, dy_channel, x_row, x_channel,
                row, there, column_block, block, channels, columns, ACTIVATION, PLANAR, A, B,
            )  # fmt: skip
        _apply(
            dz, centered, dx, d_residual, c1, c2, c3, row, there, column_block, block, channels, columns, PLANAR, B
        )  # fmt: skip


@triton.jit(do_not_specialize=VARIES)
def parameter_gradients(
    partial, var, d_weight, d_bias, eps: tl.float64, pools, parts, stat_row, channels,
    W: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """d_gamma = sum over pools of sum dz (x - mean) / s, and d_beta = sum dz."""
    channel = tl.program_id(0) * W + tl.arange(0, W)
    present = channel < channels
    gamma = tl.zeros((W,), tl.float64)
    beta = tl.zeros((W,), tl.float64)
    for pool in range(pools):
        sum_dz, sum_dz_centered = _merged_sums(
            partial, channel, present, tl.cast(pool, tl.int64), pools, parts, channels, PARTS
        )
        v = tl.load(var + tl.cast(pool, tl.int64) * stat_row + channel, present, 1.0).to(tl.float64)
        gamma += sum_dz_centered / tl.sqrt(v + eps)
        beta += sum_dz
    _store_parameters(d_weight, d_bias, beta, gamma, 1.0, channel, present)


# ---------------------------------------------------------------------------------------------- running statistics


@triton.jit(do_not_specialize=VARIES)
def update_statistics(
    running_mean, running_var, batches, mean, var, momentum: tl.float64, count, pool_count, pools, channels,
    CUMULATIVE: tl.constexpr, UNBIASED: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """running = (1 - momentum) running + momentum batch, the batch being all pools merged (Chan).

    CUMULATIVE: momentum is 1 / (batches + 1), and the counter is left to be raised afterwards.
    """
    channel = tl.program_id(0) * W + tl.arange(0, W)
    present = channel < channels
    share = momentum
    if CUMULATIVE:
        share = 1.0 / (tl.load(batches) + 1).to(tl.float64)
    elif batches is not None and tl.program_id(0) == 0:
        tl.store(batches, tl.load(batches) + 1)
    mu = tl.zeros((W,), tl.float64)
    m2 = tl.zeros((W,), tl.float64)
    n = tl.sum(mu, 0)
    for pool in range(pools):
        part = tl.minimum(pool_count, count - tl.cast(pool, tl.int64) * pool_count).to(tl.float64)
        at = tl.cast(pool, tl.int64) * channels + channel
        away = tl.load(mean + at, present, 0.0) - mu
        m2 += tl.load(var + at, present, 0.0) * part + away * away * (n * part / (n + part))
        n += part
        mu += away * (part / n)
    divisor = n
    if UNBIASED:
        divisor = tl.where(n > 1, n - 1, n)
    if running_mean is not None:
        old = tl.load(running_mean + channel, present, 0.0).to(tl.float64)
        _store(running_mean + channel, (1 - share) * old + share * mu, present)
    if running_var is not None:
        old = tl.load(running_var + channel, present, 0.0).to(tl.float64)
        _store(running_var + channel, (1 - share) * old + share * (m2 / divisor), present)
