"""The device code of `kernels/triton.py`.

A tensor is rows x channels x columns. Planar (N, C, *space): a row is a sample, columns are its space, and a program
works on one channel. Interleaved (N, C) and channels last: a row holds every channel, and a program works on a block
of B of them. A pool is a run of ``pool_rows`` rows. Tiles of A x B elements are numbered inside a pool; a program takes
a run of them. So each statistic is a vector of W values: W = 1 (planar) or B (interleaved).

Elements are computed in float32 (float64 ones in float64); what is summed over a program, merged or handed on is
float64. Every sum has a fixed order. Partial results lie in a float64 workspace (quantities, pools, splits, channels).
Integers that are multiples of ALIGN come divided by it, so that the compiler can tell that rows start at whole vectors.

``valid`` is a mask (N, *space) or None: what it leaves out comes in as 0, counts for nothing and is written as 0. A
tile's ``mask`` says which of its elements there are, ``some`` which of these are valid.
"""

# Only the branch that a constant chooses is compiled: an else after a return is needed, and no `and` with a value.
# ruff: noqa: RET505, SIM102, SIM108
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, no-any-return"
from __future__ import annotations

import triton
import triton.language as tl

GEOMETRY = ("rows", "channels", "columns", "pool_rows", "splits", "tiles")
# Their values come from shapes: no new compilation for each.
VARIES = [
    *GEOMETRY, "parts", "stat_row", "x_row", "x_channel", "dy_row", "dy_channel", "pools", "count", "pool_count",
    "ranks", "size",
]  # fmt: skip

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
def _among(
    valid, mask, count, row, row_there, column_block, columns, PLANAR: tl.constexpr, B: tl.constexpr
):  # fmt: skip
    """Which elements of a tile are valid, and how many of a channel."""
    if valid is None:
        return mask, count
    else:
        if PLANAR:
            column = column_block * B + tl.arange(0, B)
            found = tl.load(valid + (row[:, None] * columns + column[None, :]), mask, 0).to(tl.int32)
        else:
            found = tl.load(valid + row[:, None], row_there[:, None], 0).to(tl.int32)
        return mask & (found != 0), tl.sum(tl.sum(found, 1), 0).to(tl.int64)


@triton.jit
def _wide(value, like):
    """A value in the dtype that elements of this pointer are computed in."""
    if like.dtype.element_ty == tl.float64:
        return tl.cast(value, tl.float64)
    else:
        return tl.cast(value, tl.float32)


@triton.jit
def _read(pointer, at, mask, some, valid, x, PLANAR: tl.constexpr):
    """A tile's valid elements, else 0. Planar, whole vectors are read and masked afterwards."""
    if valid is None or not PLANAR:
        return _wide(tl.load(pointer + at, some, 0.0), x)
    else:
        return tl.where(some, _wide(tl.load(pointer + at, mask, 0.0), x), 0.0)


@triton.jit
def _write(pointer, at, value, mask, some, valid):
    """Stores a tile, 0 where it is not valid."""
    if valid is not None:
        value = tl.where(some, value, 0.0)
    tl.store(pointer + at, value.to(pointer.dtype.element_ty), mask)


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


@triton.jit
def _gathered(pool, part, channel, pools, channels):
    """The same where the parts are ranks, (parts, 3, pools, channels)."""
    return (tl.cast(part, tl.int64) * 3 * pools + pool) * channels + channel, tl.cast(pools, tl.int64) * channels


# ---------------------------------------------------------------------------------------------- activations


@triton.jit
def _exp_of_minus_twice(z):
    return tl.exp(-2.0 * tl.abs(z))


@triton.jit
def _exp_less_one(z):
    """exp(z) - 1 of z up to 0; by its series, but for less than a rounding of float64, where that would cancel."""
    s = tl.maximum(z, -0.25)
    series = 1.0 + s * (1 / 9) * (1.0 + s * (1 / 10) * (1.0 + s * (1 / 11) * (1.0 + s * (1 / 12))))
    series = 1.0 + s * (1 / 5) * (1.0 + s * (1 / 6) * (1.0 + s * (1 / 7) * (1.0 + s * (1 / 8) * series)))
    series = s * (1.0 + s * (1 / 2) * (1.0 + s * (1 / 3) * (1.0 + s * (1 / 4) * series)))
    return tl.where(z > -0.25, series, tl.exp(z) - 1.0)


@triton.jit
def _exp_up_to_forty(z):
    """exp(z), cut where mish(z) is z: above 20 in float32, above 40 in float64."""
    return tl.exp(tl.where(z > 40.0 if z.dtype == tl.float64 else z > 20.0, 20.0, z))


@triton.jit
def _inner_of_gelu(z):
    """Twice what the approximation of gelu takes the tanh of."""
    return z * (1.5957691216057308 + 0.07135481627260025 * z * z)


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
        # Lambert's continued fraction where 1 - exp would cancel; what it leaves out is below a rounding of float64.
        s = tl.minimum(z * z, 1.0)
        series = z * (135135 + s * (17325 + s * (378 + s))) / (135135 + s * (62370 + s * (3150 + s * 28)))
        e = _exp_of_minus_twice(z)
        rest = (1.0 - e) / (1.0 + e)
        z = tl.where(tl.abs(z) < 0.25, series, tl.where(z < 0, -rest, rest))
    elif ACTIVATION == "elu":
        z = tl.where(z > 0, z, _exp_less_one(tl.where(z > 0, 0.0, z)))
    elif ACTIVATION == "mish":
        e = _exp_up_to_forty(z)
        z = z * (e * (e + 2.0) / (e * (e + 2.0) + 2.0))
    elif ACTIVATION == "gelu_tanh":
        z = z / (1.0 + tl.exp(-_inner_of_gelu(z)))
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
    elif ACTIVATION == "elu":
        dy = tl.where(z > 0, dy, dy * tl.exp(tl.where(z > 0, 0.0, z)))
    elif ACTIVATION == "mish":
        e = _exp_up_to_forty(z)
        below = 1.0 / (e * (e + 2.0) + 2.0)
        inside = tl.where(z > 40.0, 40.0, z)  # beyond, the other factors leave nothing
        dy = dy * (below * (e * (e + 2.0) + inside * (4.0 * e * (1.0 + e)) * below))
    elif ACTIVATION == "gelu_tanh":
        z = tl.where(z > 30.0, 30.0, tl.where(z < -30.0, -30.0, z))  # beyond, all but 0 or 1 is gone
        u = _inner_of_gelu(z)
        e = tl.exp(-tl.abs(u))
        s = tl.where(u > 0, 1.0, e) / (1.0 + e)
        dy = dy * (s + z * (1.5957691216057308 + 0.2140644488178008 * z * z) * (e / ((1.0 + e) * (1.0 + e))))
    return dy


# ---------------------------------------------------------------------------------------------- statistics


@triton.jit
def _moments(
    x, valid, x_row, x_channel, first, last, block, pool, rows, columns, pool_rows,
    PLANAR: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Count, mean and m2 of a run of tiles, about the first valid tile's mean; the first tile, and its valid places."""
    row, there, column_block, count = _tile(first, block, pool, rows, columns, pool_rows, PLANAR, A, B)
    at, mask = _at(row, there, column_block, block, columns, x_row, x_channel, PLANAR, B)
    held_some, count = _among(valid, mask, count, row, there, column_block, columns, PLANAR, B)
    held = _read(x, at, mask, held_some, valid, x, PLANAR)
    about = _wide(_pool_sum(held, PLANAR) / tl.maximum(count, 1), x)
    origin = _spread(about, PLANAR)
    sums = tl.where(held_some, held - origin, 0.0)
    squares = sums * sums
    for tile in range(first + 1, last):
        row, there, column_block, more = _tile(tile, block, pool, rows, columns, pool_rows, PLANAR, A, B)
        at, mask = _at(row, there, column_block, block, columns, x_row, x_channel, PLANAR, B)
        some, more = _among(valid, mask, more, row, there, column_block, columns, PLANAR, B)
        value = _read(x, at, mask, some, valid, x, PLANAR)
        if valid is not None:
            if count == 0:  # all so far was padding
                about = _wide(_pool_sum(value, PLANAR) / tl.maximum(more, 1), x)
                origin = _spread(about, PLANAR)
        value = tl.where(some, value - origin, 0.0)
        sums += value
        squares += value * value
        count += more
    total = _pool_sum(sums, PLANAR)
    number = tl.maximum(count, 1).to(tl.float64)
    m2 = _pool_sum(squares, PLANAR) - total * total / number
    return count, about.to(tl.float64) + total / number, tl.where(m2 < 0, 0.0, m2), held, held_some


@triton.jit
def _merged_moments(partial, at, plane, present, parts, PARTS: tl.constexpr):
    """Count, mean and m2 (W,) of all parts, in float64."""
    mask = (tl.arange(0, PARTS) < parts)[:, None] & present[None, :]
    counts = tl.load(partial + at, mask, 0.0)
    means = tl.where(counts > 0, tl.load(partial + plane + at, mask, 0.0), 0.0)
    count = tl.sum(counts, 0)
    mean = tl.sum(counts * means, 0) / tl.where(count > 0, count, 1.0)
    away = means - mean[None, :]
    return count, mean, tl.sum(tl.load(partial + 2 * plane + at, mask, 0.0) + counts * away * away, 0)


@triton.jit
def _merged_sum(
    partial, quantity: tl.constexpr, channel, present, pool, pools, parts, channels, PARTS: tl.constexpr
):  # fmt: skip
    """The sum (W,) of a quantity over all parts of a pool, in float64."""
    part = tl.arange(0, PARTS)
    at, plane = _workspace(pool, part[:, None], channel[None, :], pools, parts, channels)
    return tl.sum(tl.load(partial + quantity * plane + at, (part < parts)[:, None] & present[None, :], 0.0), 0)


@triton.jit
def _affine(mean, var, weight, bias, channel, present, eps, x, PLANAR: tl.constexpr):
    """mean in two parts, gamma / s and beta, wide as `_spread`; and 1 / s, float64 (W,)."""
    inv_std = 1.0 / tl.sqrt(var + eps)
    center = _wide(mean, x)
    scale = inv_std
    if weight is not None:
        scale = inv_std * tl.load(weight + channel, present, 0.0).to(tl.float64)
    shift = tl.zeros_like(center)
    if bias is not None:
        shift = _wide(tl.load(bias + channel, present, 0.0), x)
    rest = _wide(mean - center.to(tl.float64), x)
    return (
        _spread(center, PLANAR), _spread(rest, PLANAR), _spread(_wide(scale, x), PLANAR),
        _spread(shift, PLANAR), inv_std,
    )  # fmt: skip


@triton.jit(do_not_specialize=VARIES)
def partial_moments(
    x, valid, partial, rows, channels, columns, pool_rows, splits, tiles, x_row, x_channel,
    ALIGN: tl.constexpr, PLANAR: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Count, mean and m2 of each split."""
    columns, x_row, x_channel = columns * ALIGN, x_row * ALIGN, x_channel * ALIGN
    block, split, pool = _place(_blocks(channels, PLANAR, B), splits, False)
    channel, present = _channels(block, channels, PLANAR, B)
    first, last = _run(split, tiles, pool_rows, columns, PLANAR, A, B)
    count, mean, m2, _held, _some = _moments(
        x, valid, x_row, x_channel, first, last, block, pool, rows, columns, pool_rows, PLANAR, A, B
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
    at, plane = _workspace(pool, tl.arange(0, PARTS)[:, None], channel[None, :], pools, parts, channels)
    count, mean, m2 = _merged_moments(partial, at, plane, present, parts, PARTS)
    at, plane = _workspace(pool, 0, channel, pools, 1, channels)
    tl.store(merged + at, count, present)
    tl.store(merged + plane + at, mean, present)
    tl.store(merged + 2 * plane + at, m2, present)


@triton.jit(do_not_specialize=VARIES)
def merge_sums(
    partial, merged, pools, parts, channels, QUANTITIES: tl.constexpr, W: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """All parts of each pool as one: the sums of dz and dz (x - mean) and, masked, the number of values."""
    blocks = tl.cdiv(channels, W)
    pool = (tl.program_id(0) // blocks).to(tl.int64)
    channel = tl.program_id(0) % blocks * W + tl.arange(0, W)
    present = channel < channels
    at, plane = _workspace(pool, 0, channel, pools, 1, channels)
    for quantity in tl.static_range(QUANTITIES):
        total = _merged_sum(partial, quantity, channel, present, pool, pools, parts, channels, PARTS)
        tl.store(merged + quantity * plane + at, total, present)


# ---------------------------------------------------------------------------------------------- forward


@triton.jit
def _finish(
    value, x, y, residual, valid, signs, center, rest, scale, shift, slope, some,
    row, there, column_block, block, channels, columns,
    ACTIVATION: tl.constexpr, PLANAR: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Normalizes, adds, activates and stores one tile."""
    dense_row, dense_channel = _dense(channels, columns, PLANAR)
    at, mask = _at(row, there, column_block, block, columns, dense_row, dense_channel, PLANAR, B)
    z = ((value - center) - rest) * scale + shift
    if residual is not None:
        z += _read(residual, at, mask, some, valid, x, PLANAR)
    if signs is not None:
        bits = tl.reshape(_is_linear(z, ACTIVATION).to(tl.int32), (A, B // 8, 8)) << tl.arange(0, 8)[None, None, :]
        bytes_at, bytes_mask = _bytes_at(row, there, column_block, block, channels, columns, PLANAR, B)
        tl.store(signs + bytes_at, tl.sum(bits, 2).to(tl.uint8), bytes_mask)
    slope = _wide(tl.full((), slope, tl.float64), x)
    _write(y, at, _activate(z, slope, ACTIVATION), mask, some, valid)


@triton.jit(do_not_specialize=VARIES)
def normalize(
    x, y, residual, valid, signs, weight, bias, mean, var, counts, partial, eps: tl.float64, slope: tl.float64, parts,
    stat_row, rows, channels, columns, pool_rows, splits, tiles, x_row, x_channel,
    ACTIVATION: tl.constexpr, ALIGN: tl.constexpr, PLANAR: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """y by the statistics given (PARTS = 0), or by those merged of the parts, which are then written.

    With `counts`, the number of values is written as well, and parts are as `_gathered` says.
    """
    columns, x_row, x_channel = columns * ALIGN, x_row * ALIGN, x_channel * ALIGN
    block, split, pool = _place(_blocks(channels, PLANAR, B), splits, PARTS > 0)
    channel, present = _channels(block, channels, PLANAR, B)
    statistic = pool * stat_row + channel
    if PARTS == 0:
        mu = tl.load(mean + statistic, present, 0.0).to(tl.float64)
        v = tl.load(var + statistic, present, 1.0).to(tl.float64)
    else:
        pools, part = tl.cdiv(rows, pool_rows), tl.arange(0, PARTS)[:, None]
        if counts is None:
            where, plane = _workspace(pool, part, channel[None, :], pools, parts, channels)
        else:
            where, plane = _gathered(pool, part, channel[None, :], pools, channels)
        count, mu, m2 = _merged_moments(partial, where, plane, present, parts, PARTS)
        v = m2 / tl.where(count > 0, count, 1.0)
        if split == 0:
            tl.store(mean + statistic, mu, present)
            tl.store(var + statistic, v, present)
            if counts is not None:
                tl.store(counts + statistic, count, present)
    center, rest, scale, shift, _inv_std = _affine(mu, v, weight, bias, channel, present, eps, x, PLANAR)
    first, last = _run(split, tiles, pool_rows, columns, PLANAR, A, B)
    for i in range(first, last):
        tile = i
        if PARTS > 0:  # what was read last is still in the cache
            tile = first + last - 1 - i
        row, there, column_block, _count = _tile(tile, block, pool, rows, columns, pool_rows, PLANAR, A, B)
        at, mask = _at(row, there, column_block, block, columns, x_row, x_channel, PLANAR, B)
        some, _count = _among(valid, mask, _count, row, there, column_block, columns, PLANAR, B)
        value = _read(x, at, mask, some, valid, x, PLANAR)
        _finish(
            value, x, y, residual, valid, signs, center, rest, scale, shift, slope, some,
            row, there, column_block, block, channels, columns, ACTIVATION, PLANAR, A, B,
        )  # fmt: skip


@triton.jit(do_not_specialize=VARIES)
def forward_whole(
    x, y, residual, valid, signs, weight, bias, mean, var, eps: tl.float64, slope: tl.float64,
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
    count, mu, m2, held, held_some = _moments(
        x, valid, x_row, x_channel, first, last, block, pool, rows, columns, pool_rows, PLANAR, A, B
    )  # fmt: skip
    v = m2 / tl.maximum(count, 1).to(tl.float64)
    tl.store(mean + pool * channels + channel, mu, present)
    tl.store(var + pool * channels + channel, v, present)
    center, rest, scale, shift, _inv_std = _affine(mu, v, weight, bias, channel, present, eps, x, PLANAR)
    for i in range(first, last):
        tile = last - 1 - i
        row, there, column_block, _count = _tile(tile, block, pool, rows, columns, pool_rows, PLANAR, A, B)
        if SINGLE:
            value, some = held, held_some
        else:
            at, mask = _at(row, there, column_block, block, columns, x_row, x_channel, PLANAR, B)
            some, _count = _among(valid, mask, _count, row, there, column_block, columns, PLANAR, B)
            value = _read(x, at, mask, some, valid, x, PLANAR)
        _finish(
            value, x, y, residual, valid, signs, center, rest, scale, shift, slope, some,
            row, there, column_block, block, channels, columns, ACTIVATION, PLANAR, A, B,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------- backward


@triton.jit
def _dz(
    dy, x, residual, valid, signs, center, rest, scale, shift, slope, dy_row, dy_channel, x_row, x_channel,
    row, there, column_block, block, channels, columns, count,
    ACTIVATION: tl.constexpr, PLANAR: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """dz = dy activation'(z) and x - mean of one tile, 0 where it is not valid; where it is, and how often."""
    at, mask = _at(row, there, column_block, block, columns, dy_row, dy_channel, PLANAR, B)
    some, count = _among(valid, mask, count, row, there, column_block, columns, PLANAR, B)
    dz = _read(dy, at, mask, some, valid, x, PLANAR)
    at, mask = _at(row, there, column_block, block, columns, x_row, x_channel, PLANAR, B)
    centered = (_read(x, at, mask, some, valid, x, PLANAR) - center) - rest
    centered = tl.where(some, centered, 0.0)
    slope = _wide(tl.full((), slope, tl.float64), x)
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
            z += _read(residual, at, mask, some, valid, x, PLANAR)
        dz = _through(dz, z, slope, ACTIVATION)
    return dz, centered, some, count


@triton.jit
def _apply(
    dz, centered, dx, d_residual, valid, some, k1, k2, k3, row, there, column_block, block, channels, columns,
    PLANAR: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Stores dx = k1 dz + k2 (x - mean) + k3 (k2 None: k1 dz), and dz, of one tile."""
    dense_row, dense_channel = _dense(channels, columns, PLANAR)
    at, mask = _at(row, there, column_block, block, columns, dense_row, dense_channel, PLANAR, B)
    if dx is not None:
        value = k1 * dz
        if k2 is not None:
            value += k2 * centered + k3
        _write(dx, at, value, mask, some, valid)
    if d_residual is not None:
        _write(d_residual, at, dz, mask, some, valid)


@triton.jit
def _gamma(weight, channel, present):
    """gamma, float64 (W,)."""
    if weight is None:
        return tl.zeros_like(channel).to(tl.float64) + 1.0
    else:
        return tl.load(weight + channel, present, 0.0).to(tl.float64)


@triton.jit
def _coefficients(gamma, gamma_dz, gamma_dz_centered, count, inv_std, x, PLANAR: tl.constexpr):
    """k1, k2 and k3 of batch statistics, of the sums of gamma dz and gamma dz (x - mean); wide as `_spread`."""
    k2 = -inv_std * inv_std * inv_std * gamma_dz_centered / count
    k3 = -inv_std * gamma_dz / count
    return _spread(_wide(gamma * inv_std, x), PLANAR), _spread(_wide(k2, x), PLANAR), _spread(_wide(k3, x), PLANAR)


@triton.jit
def _store_parameters(d_weight, d_bias, sum_dz, sum_dz_centered, inv_std, channel, mask):
    if d_weight is not None:
        _store(d_weight + channel, sum_dz_centered * inv_std, mask)
    if d_bias is not None:
        _store(d_bias + channel, sum_dz, mask)


@triton.jit(do_not_specialize=VARIES)
def partial_gradients(
    dy, x, dx, d_residual, weight, bias, residual, valid, signs, mean, var, partial, eps: tl.float64, slope: tl.float64,
    stat_row, rows, channels, columns, pool_rows, splits, tiles, dy_row, dy_channel, x_row, x_channel,
    ACTIVATION: tl.constexpr, ALIGN: tl.constexpr, PLANAR: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Sums of dz and dz (x - mean) of each split, masked also the number of values; with dx or d_residual, theirs for
    constant statistics as well."""
    columns, x_row, x_channel = columns * ALIGN, x_row * ALIGN, x_channel * ALIGN
    dy_row, dy_channel = dy_row * ALIGN, dy_channel * ALIGN
    block, split, pool = _place(_blocks(channels, PLANAR, B), splits, False)
    channel, present = _channels(block, channels, PLANAR, B)
    mu = tl.load(mean + pool * stat_row + channel, present, 0.0).to(tl.float64)
    v = tl.load(var + pool * stat_row + channel, present, 1.0).to(tl.float64)
    center, rest, scale, shift, _inv_std = _affine(mu, v, weight, bias, channel, present, eps, x, PLANAR)
    sums = _wide(tl.zeros((A, B), tl.float32), x)
    products = sums
    counted = tl.cast(0, tl.int64)
    first, last = _run(split, tiles, pool_rows, columns, PLANAR, A, B)
    for tile in range(first, last):
        row, there, column_block, count = _tile(tile, block, pool, rows, columns, pool_rows, PLANAR, A, B)
        dz, centered, some, count = _dz(
            dy, x, residual, valid, signs, center, rest, scale, shift, slope, dy_row, dy_channel, x_row, x_channel,
            row, there, column_block, block, channels, columns, count, ACTIVATION, PLANAR, A, B,
        )  # fmt: skip
        sums += dz
        products += dz * centered
        counted += count
        _apply(
            dz, centered, dx, d_residual, valid, some, scale, None, None, row, there, column_block, block, channels,
            columns, PLANAR, B,
        )  # fmt: skip
    if partial is not None:
        at, plane = _workspace(pool, split, channel, tl.cdiv(rows, pool_rows), splits, channels)
        tl.store(partial + at, _pool_sum(sums, PLANAR), present)
        tl.store(partial + plane + at, _pool_sum(products, PLANAR), present)
        if valid is not None:
            tl.store(partial + 2 * plane + at, tl.zeros_like(mu) + counted, present)


@triton.jit(do_not_specialize=VARIES)
def apply_gradients(
    dy, x, dx, d_residual, d_weight, d_bias, weight, bias, residual, valid, signs, mean, var, partial, counts,
    k1, k2, k3, eps: tl.float64, slope: tl.float64, parts, stat_row,
    rows, channels, columns, pool_rows, splits, tiles, dy_row, dy_channel, x_row, x_channel,
    ACTIVATION: tl.constexpr, ALIGN: tl.constexpr, PLANAR: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """dx and d_residual by coefficients given (PARTS = 0), or by those of the sums merged of the parts.

    With `counts`, the number of values, there is one part, and its sums are of gamma dz.
    """
    columns, x_row, x_channel = columns * ALIGN, x_row * ALIGN, x_channel * ALIGN
    dy_row, dy_channel = dy_row * ALIGN, dy_channel * ALIGN
    block, split, pool = _place(_blocks(channels, PLANAR, B), splits, PARTS > 0)
    channel, present = _channels(block, channels, PLANAR, B)
    mu = tl.load(mean + pool * stat_row + channel, present, 0.0).to(tl.float64)
    v = tl.load(var + pool * stat_row + channel, present, 1.0).to(tl.float64)
    center, rest, scale, shift, inv_std = _affine(mu, v, weight, bias, channel, present, eps, x, PLANAR)
    if PARTS == 0:
        at = pool * channels + channel
        c1 = _spread(_wide(tl.load(k1 + at, present, 0.0), x), PLANAR)
        c2 = _spread(_wide(tl.load(k2 + at, present, 0.0), x), PLANAR)
        c3 = _spread(_wide(tl.load(k3 + at, present, 0.0), x), PLANAR)
    else:
        pools = tl.cdiv(rows, pool_rows)
        sum_dz = _merged_sum(partial, 0, channel, present, pool, pools, parts, channels, PARTS)
        sum_dz_centered = _merged_sum(partial, 1, channel, present, pool, pools, parts, channels, PARTS)
        gamma = _gamma(weight, channel, present)
        inside = gamma
        if counts is not None:
            count = tl.load(counts + pool * channels + channel, present, 1.0)
            inside = tl.zeros_like(gamma) + 1.0
        elif valid is not None:
            count = _merged_sum(partial, 2, channel, present, pool, pools, parts, channels, PARTS)
        else:
            count = tl.minimum(rows - pool * pool_rows, pool_rows) * (columns if PLANAR else 1)
            count = tl.zeros_like(gamma) + count
        c1, c2, c3 = _coefficients(
            gamma, inside * sum_dz, inside * sum_dz_centered, tl.maximum(count, 1.0), inv_std, x, PLANAR
        )  # fmt: skip
        if split == 0:
            _store_parameters(d_weight, d_bias, sum_dz, sum_dz_centered, inv_std, channel, present)
    first, last = _run(split, tiles, pool_rows, columns, PLANAR, A, B)
    for i in range(first, last):
        tile = i
        if PARTS > 0:
            tile = first + last - 1 - i
        row, there, column_block, _count = _tile(tile, block, pool, rows, columns, pool_rows, PLANAR, A, B)
        dz, centered, some, _count = _dz(
            dy, x, residual, valid, signs, center, rest, scale, shift, slope, dy_row, dy_channel, x_row, x_channel,
            row, there, column_block, block, channels, columns, _count, ACTIVATION, PLANAR, A, B,
        )  # fmt: skip
        _apply(
            dz, centered, dx, d_residual, valid, some, c1, c2, c3, row, there, column_block, block, channels, columns,
            PLANAR, B,
        )  # fmt: skip


@triton.jit(do_not_specialize=VARIES)
def backward_whole(
    dy, x, dx, d_residual, d_weight, d_bias, weight, bias, residual, valid, signs, mean, var, sums, eps: tl.float64,
    slope: tl.float64, stat_row,
    rows, channels, columns, pool_rows, splits, tiles, dy_row, dy_channel, x_row, x_channel,
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
    center, rest, scale, shift, inv_std = _affine(mu, v, weight, bias, channel, present, eps, x, PLANAR)
    first, last = _run(split, tiles, pool_rows, columns, PLANAR, A, B)
    if SINGLE:
        first, last = 0, 1
    row, there, column_block, counted = _tile(first, block, pool, rows, columns, pool_rows, PLANAR, A, B)
    dz, centered, some, counted = _dz(
        dy, x, residual, valid, signs, center, rest, scale, shift, slope, dy_row, dy_channel, x_row, x_channel,
        row, there, column_block, block, channels, columns, counted, ACTIVATION, PLANAR, A, B,
    )  # fmt: skip
    total, products = dz, dz * centered
    for tile in range(first + 1, last):
        row, there, column_block, count = _tile(tile, block, pool, rows, columns, pool_rows, PLANAR, A, B)
        more, centered_more, _some, count = _dz(
            dy, x, residual, valid, signs, center, rest, scale, shift, slope, dy_row, dy_channel, x_row, x_channel,
            row, there, column_block, block, channels, columns, count, ACTIVATION, PLANAR, A, B,
        )  # fmt: skip
        total += more
        products += more * centered_more
        counted += count
    sum_dz, sum_dz_centered = _pool_sum(total, PLANAR), _pool_sum(products, PLANAR)
    number = tl.maximum(counted, 1).to(tl.float64)
    gamma = _gamma(weight, channel, present)
    c1, c2, c3 = _coefficients(gamma, gamma * sum_dz, gamma * sum_dz_centered, number, inv_std, x, PLANAR)
    _store_parameters(d_weight, d_bias, sum_dz, sum_dz_centered, inv_std, channel, present)
    if sums is not None:
        at, plane = _workspace(pool, 0, channel, tl.cdiv(rows, pool_rows), 1, channels)
        tl.store(sums + at, sum_dz, present)
        tl.store(sums + plane + at, sum_dz_centered, present)
    for i in range(first, last):
        row, there, column_block, _count = _tile(last - 1 - i, block, pool, rows, columns, pool_rows, PLANAR, A, B)
        if not SINGLE:
            dz, centered, some, _count = _dz(
                dy, x, residual, valid, signs, center, rest, scale, shift, slope, dy_row, dy_channel, x_row, x_channel,
                row, there, column_block, block, channels, columns, _count, ACTIVATION, PLANAR, A, B,
            )  # fmt: skip
        _apply(
            dz, centered, dx, d_residual, valid, some, c1, c2, c3, row, there, column_block, block, channels, columns,
            PLANAR, B,
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
    for each in range(pools):
        pool = tl.cast(each, tl.int64)
        v = tl.load(var + pool * stat_row + channel, present, 1.0).to(tl.float64)
        beta += _merged_sum(partial, 0, channel, present, pool, pools, parts, channels, PARTS)
        sum_dz_centered = _merged_sum(partial, 1, channel, present, pool, pools, parts, channels, PARTS)
        gamma += sum_dz_centered / tl.sqrt(v + eps)
    _store_parameters(d_weight, d_bias, beta, gamma, 1.0, channel, present)


# ---------------------------------------------------------------------------------------------- channel groups


@triton.jit(do_not_specialize=VARIES)
def merge_groups(
    parts, counts, mean, var, ranks, pools, channels, size, PARTS: tl.constexpr
):  # fmt: skip
    """Statistics of groups of `size` adjacent channels, of all ranks: a pool's group to a program."""
    groups = channels // size
    pool, begin = (tl.program_id(0) // groups).to(tl.int64), tl.program_id(0) % groups * size
    each = tl.arange(0, PARTS)
    one = tl.zeros((1,), tl.int32) == 0
    at, plane = _gathered(pool, each[:, None] // size, begin + each[:, None] % size, pools, channels)
    count, mu, m2 = _merged_moments(parts, at, plane, one, ranks * size, PARTS)
    for start in range(PARTS, ranks * size, PARTS):
        at, plane = _gathered(
            pool, (start + each[:, None]) // size, begin + (start + each[:, None]) % size, pools, channels
        )  # fmt: skip
        more, its_mu, its_m2 = _merged_moments(parts, at, plane, one, ranks * size - start, PARTS)
        number = tl.where(count + more > 0, count + more, 1.0)
        away = its_mu - mu
        m2 += its_m2 + away * away * (count * more / number)
        mu += away * (more / number)
        count += more
    variance = m2 / tl.where(count > 0, count, 1.0)
    for start in range(0, size, PARTS):
        to, mask = pool * channels + begin + start + each, start + each < size
        tl.store(counts + to, tl.sum(count, 0) + tl.zeros((PARTS,), tl.float64), mask)
        tl.store(mean + to, tl.sum(mu, 0) + tl.zeros((PARTS,), tl.float64), mask)
        tl.store(var + to, tl.sum(variance, 0) + tl.zeros((PARTS,), tl.float64), mask)


# ---------------------------------------------------------------------------------------------- running statistics


@triton.jit
def _rounded(value, like):
    """float64 values as those of the element type of a pointer, in float64."""
    if like.dtype.element_ty == tl.float64:
        return value
    return value.to(tl.float32).to(like.dtype.element_ty).to(tl.float64)


@triton.jit
def _mix(running, carry, channel, present, share, batch):
    """running = (1 - share) running + share batch, of running + carry where there is a carry.

    The sum is one in two parts (Knuth), and starts from the one of the two that has the larger share.
    """
    old = tl.load(running + channel, present, 0.0).to(tl.float64)
    if carry is None:
        _store(running + channel, (1 - share) * old + share * batch, present)
    else:
        rest = tl.load(carry + channel, present, 0.0).to(tl.float64)
        rest = tl.where(_rounded(old + rest, running) == old, rest, 0.0)
        small = share <= 0.5
        base = tl.where(small, old, batch)
        change = tl.where(small, rest + share * ((batch - old) - rest), (1 - share) * ((old - batch) + rest))
        total = base + change
        added = total - base
        lost = (base - (total - added)) + (change - added)
        # The difference of two infinite values is no number, where their weighted sum is infinite.
        total = tl.where(total - total == 0, total, (1 - share) * old + share * batch)
        kept = _rounded(total, running)
        left = _rounded((total - kept) + lost, carry)
        left = tl.where(left - left == 0, left, 0.0)
        # Rounding the carry may have brought the sum to the middle between two values, and so to the other one.
        left = tl.where(_rounded(kept + left, running) == kept, left, left * (1 - 2.0**-22))
        _store(running + channel, total, present)
        _store(carry + channel, left, present)


@triton.jit(do_not_specialize=VARIES)
def update_statistics(
    running_mean, running_var, batches, carry, mean, var, momentum: tl.float64, count, pool_count, pools, channels,
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
        _mix(running_mean, carry, channel, present, share, mu)
    if running_var is not None:
        if carry is None:
            _mix(running_var, None, channel, present, share, m2 / divisor)
        else:
            _mix(running_var, carry + channels, channel, present, share, m2 / divisor)
