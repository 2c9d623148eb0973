"""The operators on ATen: for every device and dtype without kernels of its own, and differentiable throughout.

Statistics are summed in float64 (float32 where the device lacks it). The same functions, called with gradients
enabled, are what second and higher derivatives are made of.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from batchnorm.moments import merge_axis
from batchnorm.pools import Pool, Pools, is_exported


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for bfloat16 and float16, else the dtype itself."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def activate(z: Tensor, activation: str, slope: float) -> Tensor:  # one after the other: TorchScript looks up no name
    """The activation at z."""
    if activation == "identity":
        return z
    if activation == "relu":
        return torch.relu(z)
    if activation == "relu6":
        return F.relu6(z)
    if activation == "leaky_relu":
        return F.leaky_relu(z, slope)
    if activation == "silu":
        return F.silu(z)
    if activation == "gelu":
        return F.gelu(z)
    if activation == "hardswish":
        return F.hardswish(z)
    if activation == "sigmoid":
        return torch.sigmoid(z)
    if activation == "tanh":
        return torch.tanh(z)
    if activation == "elu":
        return F.elu(z)
    if activation == "mish":
        return F.mish(z)
    assert activation == "gelu_tanh"
    return F.gelu(z, approximate="tanh")


def derivative(z: Tensor, activation: str, slope: float) -> Tensor:
    """The activation's derivative at z, itself differentiable; at a kink what torch takes."""
    if activation == "identity":
        return torch.ones_like(z)
    if activation == "relu":
        return (z > 0).to(z.dtype)
    if activation == "relu6":
        return ((z > 0) & (z < 6)).to(z.dtype)
    if activation == "leaky_relu":
        return torch.where(z > 0, torch.ones_like(z), slope)  # two numbers alone would make float32
    if activation == "silu":
        s = torch.sigmoid(z)
        return s * (1 + z * (1 - s))
    if activation == "gelu":
        cdf = 0.5 * torch.erfc(-z * math.sqrt(0.5))
        return cdf + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    if activation == "hardswish":
        inner = torch.where(z < 3, z / 3 + 0.5, torch.ones_like(z))
        return torch.where(z <= -3, torch.zeros_like(z), inner)
    if activation == "sigmoid":
        s = torch.sigmoid(z)
        return s * (1 - s)
    if activation == "tanh":
        return 1 - torch.tanh(z) ** 2
    if activation == "elu":
        return torch.exp(z.clamp(max=0))
    if activation == "mish":
        t = torch.tanh(F.softplus(z))
        return t + z * torch.sigmoid(z) * (1 - t * t)
    if activation == "gelu_tanh":
        slope, s = math.sqrt(8 / math.pi), torch.sigmoid(math.sqrt(8 / math.pi) * z * (1 + 0.044715 * z * z))
        return s + z * slope * (1 + 3 * 0.044715 * z * z) * s * (1 - s)
    raise AssertionError(activation)


def batch_statistics(x: Tensor, pools: Pools) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every pool and channel, in two passes."""
    x = pools.clean(x)
    mean = pools.mean(x)
    centered = x.to(compute_dtype(x.dtype)) - pools.expand(mean, compute_dtype(x.dtype))
    # The rounding error of the mean: its square belongs to the variance no more than to the mean.
    rest = pools.mean(centered)
    if pools.weights is not None:  # x * w / w is not x, and a pool of one value is to have exactly its value
        mean, centered = mean + rest, centered - pools.expand(rest, centered.dtype)
        rest = pools.mean(centered)
    return mean, (pools.mean(centered.square()) - rest.square()).clamp_min(0)


def standardized(x: Tensor, mean: Tensor, var: Tensor, eps: float, pools: Pools) -> tuple[Tensor, Tensor]:
    """xhat = (x - mean) / sqrt(var + eps), and 1 / sqrt(var + eps), in the compute dtype."""
    dtype = compute_dtype(x.dtype)
    wide = dtype if is_exported() else pools.wide  # some tools have no roots in float64
    inv_std = torch.rsqrt(var.to(wide) + eps)
    scale = pools.expand(inv_std, dtype)
    return (pools.clean(x).to(dtype) - pools.expand(mean, dtype)) * scale, scale


def pre_activation(
    xhat: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, pools: Pools
) -> Tensor:
    """z = gamma * xhat + beta + residual."""
    if weight is not None:
        xhat = xhat * pools.expand(weight, xhat.dtype)
    if bias is not None:
        xhat = xhat + pools.expand(bias, xhat.dtype)
    return xhat if residual is None else xhat + pools.clean(residual).to(xhat.dtype)


def gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    var: Tensor,
    pool: Pool | int,
    eps: float,
    activation: str,
    slope: float,
    population: bool,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, d_residual, d_gamma and d_beta by the compact formula (MATH: Gradient), differentiable."""
    pools = Pools(x, pool, mask)
    xhat, scale = standardized(x, mean, var, eps, pools)
    dz = pools.clean(dy).to(xhat.dtype)
    if activation != "identity":
        z = pre_activation(xhat, weight, bias, residual, pools)
        dz = dz * derivative(z, activation, slope)
    sum_dz, sum_dz_xhat = pools.own(dz), pools.own(dz * xhat)
    inner = dz if weight is None else dz * pools.expand(weight, xhat.dtype)
    if not population:
        gamma: Tensor | float = 1.0 if weight is None else weight.to(sum_dz.dtype)
        mean_dz, mean_dz_xhat = (pools.share(pools.merge(gamma * each)) for each in (sum_dz, sum_dz_xhat))
        inner = inner - pools.expand(mean_dz, xhat.dtype)
        inner = inner - xhat * pools.expand(mean_dz_xhat, xhat.dtype)
    dx = pools.clean(scale * inner).to(x.dtype)
    return dx, dz.to(x.dtype), sum_dz_xhat.sum(0), sum_dz.sum(0)


def tangent(
    tangents: tuple[Tensor | None, ...],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    var: Tensor,
    pool: Pool | int,
    eps: float,
    activation: str,
    slope: float,
    population: bool,
    mask: Tensor | None = None,
) -> Tensor:
    """The forward-mode derivative of activation(gamma * xhat + beta + residual), from those of its four tensors."""
    dx, d_weight, d_bias, d_residual = tangents
    pools = Pools(x, pool, mask)
    xhat, scale = standardized(x, mean, var, eps, pools)
    dz = torch.zeros_like(xhat)
    if dx is not None:
        inner = pools.clean(dx).to(xhat.dtype)
        if not population:
            inner = inner - pools.expand(pools.mean(inner), xhat.dtype)
            inner = inner - xhat * pools.expand(pools.mean(inner * xhat), xhat.dtype)
        dz = scale * inner
        if weight is not None:
            dz = dz * pools.expand(weight, xhat.dtype)
    if d_weight is not None:
        dz = dz + xhat * pools.expand(d_weight, xhat.dtype)
    if d_bias is not None:
        dz = dz + pools.expand(d_bias, xhat.dtype)
    if d_residual is not None:
        dz = dz + pools.clean(d_residual).to(xhat.dtype)
    if activation != "identity":
        z = pre_activation(xhat, weight, bias, residual, pools)
        dz = dz * derivative(z, activation, slope)
    return pools.clean(dz).to(x.dtype)


# ------------------------------------------------------------------------------------------- the operators


def moments(x: Tensor, pool: Pool | int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations, (pools, C)."""
    pools = Pools(x, pool, mask)
    mean, var = batch_statistics(x, pools)
    return mean, var * pools.count


def normalize(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    pool: Pool | int,
    eps: float,
    activation: str,
    slope: float,
    mask: Tensor | None = None,
) -> Tensor:
    """activation((x - mean) / sqrt(var + eps) * gamma + beta + residual)."""
    return _normalize(x, mean, var, weight, bias, residual, eps, activation, slope, Pools(x, pool, mask))


def _normalize(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str,
    slope: float,
    pools: Pools,
) -> Tensor:
    xhat, _ = standardized(x, mean, var, eps, pools)
    z = pre_activation(xhat, weight, bias, residual, pools)
    return pools.clean(activate(z, activation, slope)).to(x.dtype)


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    pool: Pool | int,
    eps: float,
    activation: str,
    slope: float,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`normalize` by the batch's own statistics; returns those as well. Differentiable, in ``weights`` too."""
    pools = Pools(x, pool, mask, weights)
    mean, var = batch_statistics(x, pools)
    return _normalize(x, mean, var, weight, bias, residual, eps, activation, slope, pools), mean, var


def _dz_and_centered(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: str,
    slope: float,
    pools: Pools,
) -> tuple[Tensor, Tensor]:
    """The gradient before the activation, and x - mean, at the valid positions and zero elsewhere."""
    xhat, _ = standardized(x, mean, var, eps, pools)
    dz = pools.clean(dy).to(xhat.dtype)
    if activation != "identity":
        z = pre_activation(xhat, weight, bias, residual, pools)
        dz = dz * derivative(z, activation, slope)
    return dz, pools.clean(x).to(xhat.dtype) - pools.expand(mean, xhat.dtype)


def backward_reduce(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    var: Tensor,
    pool: Pool | int,
    eps: float,
    activation: str,
    slope: float,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sums over each pool of dz and dz * (x - mean)."""
    pools = Pools(x, pool, mask)
    dz, centered = _dz_and_centered(dy, x, weight, bias, residual, mean, var, eps, activation, slope, pools)
    return pools.own(dz), pools.own(dz * centered)


def backward_apply(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    var: Tensor,
    k1: Tensor,
    k2: Tensor,
    k3: Tensor,
    pool: Pool | int,
    eps: float,
    activation: str,
    slope: float,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """dx = k1 * dz + k2 * (x - mean) + k3, and dz."""
    pools = Pools(x, pool, mask)
    dz, centered = _dz_and_centered(dy, x, weight, bias, residual, mean, var, eps, activation, slope, pools)
    q1, q2, q3 = (pools.expand(k, dz.dtype) for k in (k1, k2, k3))
    return pools.clean(q1 * dz + q2 * centered + q3).to(x.dtype), dz.to(x.dtype)


def mixed(
    running: Tensor, batch: Tensor, momentum: float | Tensor, carry: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(1 - momentum) * running + momentum * batch, of running + carry where there is a carry: the value and the carry.

    The value is not rounded to the running statistic's dtype yet where there is no carry. The sum is one in two parts
    (Knuth's two-sum), and starts from the one of the two that has the larger share.
    """
    old = running.to(batch.dtype)
    if carry is None:
        return (1 - momentum) * old + momentum * batch, None
    rest = carry.to(batch.dtype)
    rest = torch.where((old + rest).to(running.dtype) == running, rest, 0.0)
    is_small = torch.as_tensor(momentum <= 0.5, device=old.device)
    base = torch.where(is_small, old, batch)
    change = torch.where(is_small, rest + momentum * ((batch - old) - rest), (1 - momentum) * ((old - batch) + rest))
    total = base + change
    added = total - base
    lost = (base - (total - added)) + (change - added)
    # The difference of two infinite values is no number, where their weighted sum is infinite.
    value = torch.where(torch.isfinite(total), total, (1 - momentum) * old + momentum * batch).to(running.dtype)
    kept = value.to(batch.dtype)
    left = ((total - kept) + lost).to(carry.dtype)
    left = torch.where(torch.isfinite(left), left, 0.0)
    # Rounding the carry may have brought the sum to the middle between two values, and so to the other one.
    moved = (kept + left.to(batch.dtype)).to(running.dtype) != value
    return value, torch.where(moved, left * (1 - 2.0**-22), left)


def _mix(
    running: Tensor, batch: Tensor, momentum: float | Tensor, carry: Tensor | None, accepted: Tensor | None = None
) -> None:
    """`mixed` in place, where accepted."""
    value, left = mixed(running, batch, momentum, carry)
    running.copy_(value if accepted is None else torch.where(accepted, value, running.to(value.dtype)))
    if carry is not None and left is not None:
        carry.copy_(left if accepted is None else torch.where(accepted, left, carry))


def mix_statistics(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    momentum: Tensor,
    accepted: Tensor,
    carry: Tensor | None = None,
) -> None:
    """running = (1 - momentum) * running + momentum * batch where accepted, of rows (rows, C)."""
    carries = (None, None) if carry is None else carry.unbind()
    _mix(running_mean, mean, momentum, carries[0], accepted)
    _mix(running_var, var, momentum, carries[1], accepted)


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
    """running = (1 - momentum) * running + momentum * batch; no value is read back to Python."""
    share: float | Tensor = 1.0 if momentum is None else momentum
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
        if momentum is None:
            share = 1.0 / num_batches_tracked.to(mean.dtype)
    pools = mean.shape[0] if mean.ndim == 2 else 1
    if pools == 1:
        merged, m2 = mean.reshape(-1), var.reshape(-1) * count
    else:
        counts = torch.full_like(mean, float(pool_count))
        counts[-1] = count - (pools - 1) * pool_count
        _, merged, m2 = merge_axis(counts, mean, var * counts, 0)
    merged_var = m2 / (count - 1 if unbiased and count > 1 else count)
    carries = (None, None) if carry is None else carry.unbind()
    for running, batch, rest in ((running_mean, merged, carries[0]), (running_var, merged_var, carries[1])):
        if running is not None:
            _mix(running, batch, share, rest)
