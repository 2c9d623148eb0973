"""The specification: every formula of batch normalization in float64 NumPy, step by step.

Nothing here is fast and nothing is clever: this is what the implementations are compared with.
Arrays have any shape with the channels on `axis`, (N, C, *space) by default and (N, H, W, C) with
`axis=-1`; the pool of a channel is everything else. Symbols are those of the papers: `mean` and
`var` of a pool of m values (`var` always *biased*, 1/m, unless a name says otherwise),
s = sqrt(var + eps), xhat = (x - mean)/s, `gamma` and `beta` one per channel, `dy` the gradient
that arrives.

Sources, cited by name below:
    Ioffe & Szegedy 2015, Batch Normalization. Algorithm 1 (the transform), Algorithm 2 (inference).
    Chan, Golub & LeVeque 1983, Algorithms for Computing the Sample Variance.
    Kingma & Ba 2015, Adam, section 3 (the correction of a moving average's start).
    Hoffer, Hubara & Soudry 2017, Train longer, generalize better, Algorithm 1 (ghost batches).
    Ioffe 2017, Batch Renormalization, Algorithm 1.
    Summers & Dinneen 2020, Four Things Everyone Should Know to Improve Batch Normalization.
    Schneider et al. 2020, Improving robustness against common corruptions by covariate shift
        adaptation.
    Hendrycks & Gimpel 2016, Gaussian Error Linear Units.
    Cooijmans et al. 2016, Recurrent Batch Normalization.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Transform:
    """What the forward pass makes. `mean`, `var` (biased) and `inv_std` are one per pool."""

    y: Array
    mean: Array
    var: Array
    inv_std: Array
    xhat: Array


@dataclass(frozen=True, eq=False)
class Gradients:
    """What the backward pass makes."""

    dx: Array
    dgamma: Array
    dbeta: Array


@dataclass(frozen=True, eq=False)
class StepwiseGradients(Gradients):
    """The backward pass with the intermediate gradients of Ioffe & Szegedy 2015, section 3."""

    dxhat: Array
    dvar: Array
    dmean: Array


@dataclass(frozen=True, eq=False)
class WeightedGradients(Gradients):
    """The backward pass of a weighted pool; `dweights` has the shape of the weights."""

    dweights: Array


@dataclass(frozen=True, eq=False)
class FusedGradients(Gradients):
    """The backward pass of act(batch_norm(x) + residual)."""

    dresidual: Array


@dataclass(frozen=True, eq=False)
class Renormalized:
    """What batch renormalization makes; `r` and `d` are constants for the gradient."""

    y: Array
    mean: Array
    var: Array
    xhat: Array
    r: Array
    d: Array


@dataclass(frozen=True, eq=False)
class Moments:
    """(n, mean, M2): how many values, their mean, and the sum of squared distances from it."""

    count: Array
    mean: Array
    m2: Array


@dataclass(frozen=True, eq=False)
class Statistics:
    """A mean and a variance for inference; the function that makes it says which variance."""

    mean: Array
    var: Array


@dataclass(frozen=True, eq=False)
class Affine:
    """y = scale * x + shift, one of each per channel."""

    scale: Array
    shift: Array


@dataclass(frozen=True, eq=False)
class Folded:
    """The weight and bias of the layer that a batch norm was folded into."""

    weight: Array
    bias: Array


def _array(values: ArrayLike) -> Array:
    return np.asarray(values, dtype=np.float64)


def pool_axes(ndim: int, axis: int = 1) -> tuple[int, ...]:
    """The axes that one pool spans: all but the channels'."""
    return tuple(a for a in range(ndim) if a != axis % ndim)


def along(values: ArrayLike, ndim: int, axis: int = 1) -> Array:
    """One value per channel, shaped to broadcast over an array whose channels lie on `axis`."""
    shape = [1] * ndim
    shape[axis] = -1
    return _array(values).reshape(shape)


def _per_channel(values: ArrayLike | None, default: float, x: Array, axis: int) -> Array:
    return along(np.full(x.shape[axis], default) if values is None else values, x.ndim, axis)


# Transform


def batch_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    axis: int = 1,
) -> Transform:
    """Normalize by the batch's own statistics, biased variance (Ioffe & Szegedy 2015, Alg. 1)."""
    x = _array(x)
    pool = pool_axes(x.ndim, axis)
    mean = x.mean(axis=pool)
    var = ((x - along(mean, x.ndim, axis)) ** 2).mean(axis=pool)
    inv_std = 1 / np.sqrt(var + eps)
    xhat = (x - along(mean, x.ndim, axis)) * along(inv_std, x.ndim, axis)
    y = _per_channel(gamma, 1, x, axis) * xhat + _per_channel(beta, 0, x, axis)
    return Transform(y, mean, var, inv_std, xhat)


def inference(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    axis: int = 1,
) -> Transform:
    """Normalize by given statistics: gamma (x - mean)/sqrt(var + eps) + beta, `var` as it is."""
    x = _array(x)
    mean, var = _array(mean), _array(var)
    inv_std = 1 / np.sqrt(var + eps)
    xhat = (x - along(mean, x.ndim, axis)) * along(inv_std, x.ndim, axis)
    y = _per_channel(gamma, 1, x, axis) * xhat + _per_channel(beta, 0, x, axis)
    return Transform(y, mean, var, inv_std, xhat)


def inference_affine(
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
) -> Affine:
    """Inference as one affine map (Ioffe & Szegedy 2015, Algorithm 2, line 11).

    y = gamma/sqrt(Var + eps) * x + (beta - gamma E/sqrt(Var + eps))
    """
    mean, var = _array(mean), _array(var)
    scale = (np.ones_like(mean) if gamma is None else _array(gamma)) / np.sqrt(var + eps)
    return Affine(scale, (0.0 if beta is None else _array(beta)) - scale * mean)


def ghost_slices(samples: int, ghost_size: int) -> list[slice]:
    """The samples of each ghost batch; the last one may be smaller."""
    return [slice(i, min(i + ghost_size, samples)) for i in range(0, samples, ghost_size)]


def ghost_batch_norm(
    x: ArrayLike,
    ghost_size: int,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    axis: int = 1,
) -> Transform:
    """Normalize each run of `ghost_size` samples by itself (Hoffer et al. 2017, Algorithm 1).

    Statistics have the shape (ghosts, C).
    """
    x = _array(x)
    parts = [batch_norm(x[ghost], gamma, beta, eps=eps, axis=axis) for ghost in ghost_slices(len(x), ghost_size)]
    return Transform(
        y=np.concatenate([p.y for p in parts]),
        mean=np.stack([p.mean for p in parts]),
        var=np.stack([p.var for p in parts]),
        inv_std=np.stack([p.inv_std for p in parts]),
        xhat=np.concatenate([p.xhat for p in parts]),
    )


def group_batch_norm(
    x: ArrayLike,
    groups: int,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    axis: int = 1,
) -> Transform:
    """Pool over the batch and each of `groups` runs of channels (Summers & Dinneen 2020).

    Statistics have the shape (groups,); gamma and beta stay one per channel.
    """
    x = _array(x)
    parts = [batch_norm(g.reshape(-1, 1), eps=eps) for g in np.split(x, groups, axis=axis)]
    shape = np.split(x, groups, axis=axis)[0].shape
    xhat = np.concatenate([p.xhat.reshape(shape) for p in parts], axis=axis)
    return Transform(
        y=_per_channel(gamma, 1, x, axis) * xhat + _per_channel(beta, 0, x, axis),
        mean=np.concatenate([p.mean for p in parts]),
        var=np.concatenate([p.var for p in parts]),
        inv_std=np.concatenate([p.inv_std for p in parts]),
        xhat=xhat,
    )


def _present(weights: ArrayLike, x: Array, axis: int) -> tuple[Array, Array, Array]:
    """Weights shaped like x, their sum W, and x with zeros where the weight is zero."""
    w = _array(weights)
    if w.ndim == x.ndim - 1:
        w = np.expand_dims(w, axis % x.ndim)
    w = np.broadcast_to(w, x.shape)
    return w, w.sum(axis=pool_axes(x.ndim, axis)), np.where(w > 0, x, 0.0)


def weighted_batch_norm(
    x: ArrayLike,
    weights: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    axis: int = 1,
) -> Transform:
    """Normalize by weighted statistics: mean = sum w x/W, var = sum w (x - mean)^2/W, W = sum w.

    `weights` are >= 0, of shape (N, *space) or with a one for the channels; a mask is weights in
    {0, 1}. A value of weight zero is absent: whatever it holds (NaN included) reaches nothing, and
    its output is zero. A pool without weight has mean 0 and variance 0.
    """
    x = _array(x)
    w, total, x = _present(weights, x, axis)
    pool, divisor = pool_axes(x.ndim, axis), np.where(total > 0, total, 1.0)
    mean = (w * x).sum(axis=pool) / divisor
    var = (w * (x - along(mean, x.ndim, axis)) ** 2).sum(axis=pool) / divisor
    inv_std = 1 / np.sqrt(var + eps)
    xhat = (x - along(mean, x.ndim, axis)) * along(inv_std, x.ndim, axis)
    xhat = np.where(w > 0, xhat, 0.0)
    y = _per_channel(gamma, 1, x, axis) * xhat + _per_channel(beta, 0, x, axis)
    return Transform(np.where(w > 0, y, 0.0), mean, var, inv_std, xhat)


def labelled_batch_norm(
    x: ArrayLike,
    labels: ArrayLike,
    weights: ArrayLike | None = None,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
) -> Transform:
    """Normalize each value of x (N, C, *space) by the weighted mean and variance of the values with its label.

    Which values share statistics is all that tells ghost batches, groups of channels, time steps, ranks and masks
    apart. Of a negative label, or of no weight: absent, with an output of zero. `mean`, `var` and `inv_std` are those
    of each value's pool, shaped like x.
    """
    x, labels = _array(x), np.broadcast_to(np.asarray(labels), np.shape(x))
    w = np.where(labels >= 0, 1.0 if weights is None else np.broadcast_to(_array(weights), x.shape), 0.0)
    x = np.where(w > 0, x, 0.0)
    mean, var = np.zeros(x.shape), np.zeros(x.shape)
    for label in np.unique(labels[w > 0]):
        pool = (labels == label) & (w > 0)
        mean[pool] = (w[pool] * x[pool]).sum() / w[pool].sum()
        var[pool] = (w[pool] * (x[pool] - mean[pool]) ** 2).sum() / w[pool].sum()
    inv_std = 1 / np.sqrt(var + eps)
    xhat = np.where(w > 0, (x - mean) * inv_std, 0.0)
    y = _per_channel(gamma, 1, x, 1) * xhat + _per_channel(beta, 0, x, 1)
    return Transform(np.where(w > 0, y, 0.0), mean, var, inv_std, xhat)


def renormalize(
    x: ArrayLike,
    running_mean: ArrayLike,
    running_var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    r_max: float = 3.0,
    d_max: float = 5.0,
    eps: float = 1e-5,
    axis: int = 1,
) -> Renormalized:
    """Batch renormalization (Ioffe 2017, Algorithm 1): y = gamma (xhat r + d) + beta.

    r = clip(s/s_run, 1/r_max, r_max) and d = clip((mean - mean_run)/s_run, -d_max, d_max), both
    without gradient, with s_run = sqrt(var_run + eps). Without clipping y is what inference gives.
    """
    x = _array(x)
    plain = batch_norm(x, eps=eps, axis=axis)
    s = np.sqrt(plain.var + eps)
    s_run = np.sqrt(_array(running_var) + eps)
    r = np.clip(s / s_run, 1 / r_max, r_max)
    d = np.clip((plain.mean - _array(running_mean)) / s_run, -d_max, d_max)
    corrected = plain.xhat * along(r, x.ndim, axis) + along(d, x.ndim, axis)
    y = _per_channel(gamma, 1, x, axis) * corrected + _per_channel(beta, 0, x, axis)
    return Renormalized(y, plain.mean, plain.var, plain.xhat, r, d)


def renormalization_limits(step: int) -> tuple[float, float]:
    """(r_max, d_max) at a training step (Ioffe 2017).

    Plain batch norm, (1, 0), until step 5,000; then linearly to r_max = 3 at 40,000 and d_max = 5
    at 25,000.
    """

    def rise(end: int) -> float:
        return min(max((step - 5_000) / (end - 5_000), 0.0), 1.0)

    return 1 + 2 * rise(40_000), 5 * rise(25_000)


# Gradient


def backward_stepwise(
    dy: ArrayLike,
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    axis: int = 1,
) -> StepwiseGradients:
    """The chain rule, one line for each of Ioffe & Szegedy 2015, section 3."""
    dy, x = _array(dy), _array(x)
    forward, pool = batch_norm(x, eps=eps, axis=axis), pool_axes(x.ndim, axis)
    m = x.size / x.shape[axis]
    centered = x - along(forward.mean, x.ndim, axis)
    s = np.sqrt(forward.var + eps)

    dxhat = dy * _per_channel(gamma, 1, x, axis)
    dvar = (dxhat * centered).sum(axis=pool) * (-1 / 2) * (forward.var + eps) ** (-3 / 2)
    dmean = -dxhat.sum(axis=pool) / s + dvar * (-2 * centered).mean(axis=pool)
    dx = dxhat / along(s, x.ndim, axis) + along(dvar, x.ndim, axis) * 2 * centered / m + along(dmean, x.ndim, axis) / m
    dgamma = (dy * forward.xhat).sum(axis=pool)
    return StepwiseGradients(dx, dgamma, dy.sum(axis=pool), dxhat, dvar, dmean)


def backward(
    dy: ArrayLike,
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    axis: int = 1,
) -> Gradients:
    """The compact form: dx = gamma/(m s) (m dy - sum dy - xhat sum(dy xhat)). Exact for eps > 0."""
    dy, x = _array(dy), _array(x)
    forward, pool = batch_norm(x, eps=eps, axis=axis), pool_axes(x.ndim, axis)
    m = x.size / x.shape[axis]
    dbeta, dgamma = dy.sum(axis=pool), (dy * forward.xhat).sum(axis=pool)
    inner = m * dy - along(dbeta, x.ndim, axis) - forward.xhat * along(dgamma, x.ndim, axis)
    scale = _per_channel(gamma, 1, x, axis) * along(forward.inv_std, x.ndim, axis)
    return Gradients(scale / m * inner, dgamma, dbeta)


def backward_frozen(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    axis: int = 1,
) -> Gradients:
    """Statistics given, as at inference: dx = gamma dy/s; dgamma with the xhat of these."""
    dy = _array(dy)
    forward, pool = inference(x, mean, var, eps=eps, axis=axis), pool_axes(dy.ndim, axis)
    dx = _per_channel(gamma, 1, dy, axis) * dy * along(forward.inv_std, dy.ndim, axis)
    return Gradients(dx, (dy * forward.xhat).sum(axis=pool), dy.sum(axis=pool))


def backward_variance_detached(
    dy: ArrayLike,
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    axis: int = 1,
) -> Gradients:
    """Batch statistics, no gradient through the variance: dx = gamma/s (dy - mean dy)."""
    dy, x = _array(dy), _array(x)
    forward, pool = batch_norm(x, eps=eps, axis=axis), pool_axes(x.ndim, axis)
    scale = _per_channel(gamma, 1, x, axis) * along(forward.inv_std, x.ndim, axis)
    dx = scale * (dy - dy.mean(axis=pool, keepdims=True))
    return Gradients(dx, (dy * forward.xhat).sum(axis=pool), dy.sum(axis=pool))


def backward_mean_detached(
    dy: ArrayLike,
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    axis: int = 1,
) -> Gradients:
    """Batch statistics, no gradient through the mean: dx = gamma/s (dy - xhat mean(dy xhat)).

    The mean is a constant wherever it stands, inside the variance too.
    """
    dy, x = _array(dy), _array(x)
    forward, pool = batch_norm(x, eps=eps, axis=axis), pool_axes(x.ndim, axis)
    scale = _per_channel(gamma, 1, x, axis) * along(forward.inv_std, x.ndim, axis)
    dx = scale * (dy - forward.xhat * (dy * forward.xhat).mean(axis=pool, keepdims=True))
    return Gradients(dx, (dy * forward.xhat).sum(axis=pool), dy.sum(axis=pool))


def ghost_backward(
    dy: ArrayLike,
    x: ArrayLike,
    ghost_size: int,
    gamma: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    axis: int = 1,
) -> Gradients:
    """The compact form inside each ghost batch; dgamma and dbeta are summed over ghosts."""
    dy, x = _array(dy), _array(x)
    parts = [backward(dy[ghost], x[ghost], gamma, eps=eps, axis=axis) for ghost in ghost_slices(len(x), ghost_size)]
    return Gradients(
        dx=np.concatenate([p.dx for p in parts]),
        dgamma=np.sum([p.dgamma for p in parts], axis=0),
        dbeta=np.sum([p.dbeta for p in parts], axis=0),
    )


def group_backward(
    dy: ArrayLike,
    x: ArrayLike,
    groups: int,
    gamma: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    axis: int = 1,
) -> Gradients:
    """Channel groups: gamma varies inside the pool, so gamma dy goes inside the sums.

    dx = 1/(m s) (m g - sum g - xhat sum(g xhat)) with g = gamma dy, over each group's pool of m
    values.
    """
    dy, x = _array(dy), _array(x)
    forward, pool = group_batch_norm(x, groups, eps=eps, axis=axis), pool_axes(x.ndim, axis)
    g = dy * _per_channel(gamma, 1, x, axis)
    parts = [
        backward(gi.reshape(-1, 1), xi.reshape(-1, 1), eps=eps).dx.reshape(xi.shape)
        for gi, xi in zip(np.split(g, groups, axis=axis), np.split(x, groups, axis=axis), strict=True)
    ]
    dgamma = (dy * forward.xhat).sum(axis=pool)
    return Gradients(np.concatenate(parts, axis=axis), dgamma, dy.sum(axis=pool))


def weighted_backward(
    dy: ArrayLike,
    x: ArrayLike,
    weights: ArrayLike,
    gamma: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    axis: int = 1,
) -> WeightedGradients:
    """The gradient of `weighted_batch_norm`.

    dx_i = gamma/s (dy_i - w_i/W (sum dy + xhat_i sum(dy xhat))); dgamma and dbeta are not weighted
    again. dw_i = -sum over channels of gamma/W (xhat_i sum dy + (xhat_i^2 - var/(var + eps))/2
    sum(dy xhat)). Values of weight zero are absent: their dy counts for nothing, their dx and dw
    are zero.
    """
    x = _array(x)
    forward = weighted_batch_norm(x, weights, eps=eps, axis=axis)
    w, total, _ = _present(weights, x, axis)
    dy = np.where(w > 0, _array(dy), 0.0)
    pool, divisor = pool_axes(x.ndim, axis), along(np.where(total > 0, total, 1.0), x.ndim, axis)
    dbeta, dgamma = dy.sum(axis=pool), (dy * forward.xhat).sum(axis=pool)
    sum_dy, sum_dy_xhat = along(dbeta, x.ndim, axis), along(dgamma, x.ndim, axis)
    gamma_full, inv_std = _per_channel(gamma, 1, x, axis), along(forward.inv_std, x.ndim, axis)

    dx = gamma_full * inv_std * (dy - w / divisor * (sum_dy + forward.xhat * sum_dy_xhat))
    share = along(forward.var, x.ndim, axis) * inv_std**2
    dw = gamma_full / divisor * (forward.xhat * sum_dy + (forward.xhat**2 - share) / 2 * sum_dy_xhat)
    dw = -np.where(w > 0, dw, 0.0).sum(axis=axis, keepdims=True)
    return WeightedGradients(dx, dgamma, dbeta, dw.reshape(np.shape(weights)))


def labelled_backward(
    dy: ArrayLike,
    x: ArrayLike,
    labels: ArrayLike,
    weights: ArrayLike | None = None,
    gamma: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
) -> WeightedGradients:
    """The gradient of `labelled_batch_norm`: gamma may vary inside a pool, so gamma dy is what is summed.

    dx_i = 1/s (gamma dy_i - w_i/W (sum gamma dy + xhat_i sum(gamma dy xhat))), and
    dw_i = -1/W (xhat_i sum gamma dy + (xhat_i^2 - var/(var + eps))/2 sum(gamma dy xhat)), one for each value.
    """
    x, labels = _array(x), np.broadcast_to(np.asarray(labels), np.shape(x))
    forward = labelled_batch_norm(x, labels, weights, eps=eps)
    w = np.where(labels >= 0, 1.0 if weights is None else np.broadcast_to(_array(weights), x.shape), 0.0)
    dy = np.where(w > 0, _array(dy), 0.0)
    scaled, xhat = _per_channel(gamma, 1, x, 1) * dy, forward.xhat
    dx, dw = np.zeros(x.shape), np.zeros(x.shape)
    for label in np.unique(labels[w > 0]):
        pool = (labels == label) & (w > 0)
        total, first, second = w[pool].sum(), scaled[pool].sum(), (scaled[pool] * xhat[pool]).sum()
        share = forward.var[pool] * forward.inv_std[pool] ** 2
        dx[pool] = forward.inv_std[pool] * (scaled[pool] - w[pool] / total * (first + xhat[pool] * second))
        dw[pool] = -(xhat[pool] * first + (xhat[pool] ** 2 - share) / 2 * second) / total
    axes = pool_axes(x.ndim)
    return WeightedGradients(dx, (dy * xhat).sum(axis=axes), dy.sum(axis=axes), dw)


def renormalize_backward(
    dy: ArrayLike,
    x: ArrayLike,
    running_mean: ArrayLike,
    running_var: ArrayLike,
    gamma: ArrayLike | None = None,
    *,
    r_max: float = 3.0,
    d_max: float = 5.0,
    eps: float = 1e-5,
    axis: int = 1,
) -> Gradients:
    """The gradient of `renormalize`: the compact form times r; dgamma = sum dy (xhat r + d)."""
    dy, x = _array(dy), _array(x)
    forward = renormalize(x, running_mean, running_var, r_max=r_max, d_max=d_max, eps=eps, axis=axis)
    plain = backward(dy, x, gamma, eps=eps, axis=axis)
    dgamma = (dy * forward.y).sum(axis=pool_axes(x.ndim, axis))
    return Gradients(plain.dx * along(forward.r, x.ndim, axis), dgamma, plain.dbeta)


# Activations, and the fused forms


def _sigmoid(z: Array) -> Array:
    # The form whose exponent is never positive: no overflow on either side.
    e = np.exp(-np.abs(z))
    return _array(np.where(z >= 0, 1 / (1 + e), e / (1 + e)))


def _normal_cdf(z: Array) -> Array:
    return _array([math.erfc(-t / math.sqrt(2)) / 2 for t in z.flat]).reshape(z.shape)


def _normal_density(z: Array) -> Array:
    return np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)


ACTIVATIONS = (
    "relu", "relu6", "leaky_relu", "silu", "gelu", "hardswish", "sigmoid", "tanh", "elu", "mish", "gelu_tanh"
)  # fmt: skip


_GELU_SCALE, _GELU_CUBE = math.sqrt(8 / math.pi), 0.044715  # of the approximation


def activation(z: ArrayLike, name: str | None) -> Array:
    """The activation `name`, or the identity for None.

    leaky_relu has the slope 0.01; gelu is the exact z Phi(z) (Hendrycks & Gimpel 2016); hardswish
    is z clip(z + 3, 0, 6)/6; silu is z sigmoid(z); elu has alpha 1 (Clevert et al. 2016); mish is
    z tanh(log(1 + exp(z))) (Misra 2020); gelu_tanh is gelu's approximation by tanh.
    """
    z = _array(z)
    match name:
        case None:
            return z
        case "relu":
            return np.maximum(z, 0)
        case "relu6":
            return np.clip(z, 0, 6)
        case "leaky_relu":
            return _array(np.where(z > 0, z, 0.01 * z))
        case "silu":
            return z * _sigmoid(z)
        case "gelu":
            return z * _normal_cdf(z)
        case "hardswish":
            return z * np.clip(z + 3, 0, 6) / 6
        case "sigmoid":
            return _sigmoid(z)
        case "tanh":
            return np.tanh(z)
        case "elu":
            return _array(np.where(z > 0, z, np.expm1(np.minimum(z, 0))))
        case "mish":
            return z * np.tanh(np.logaddexp(0, z))
        case "gelu_tanh":
            return z * _sigmoid(_GELU_SCALE * (z + _GELU_CUBE * z**3))
    raise ValueError(f"activation {name!r} is none of {ACTIVATIONS}")


def activation_gradient(z: ArrayLike, name: str | None) -> Array:
    """The derivative of `activation`; at a kink, the value that torch takes."""
    z = _array(z)
    match name:
        case None:
            return np.ones_like(z)
        case "relu":
            return np.where(z > 0, 1.0, 0.0)
        case "relu6":
            return np.where((z > 0) & (z < 6), 1.0, 0.0)
        case "leaky_relu":
            return np.where(z > 0, 1.0, 0.01)
        case "silu":
            return _sigmoid(z) * (1 + z * (1 - _sigmoid(z)))
        case "gelu":
            return _normal_cdf(z) + z * _normal_density(z)
        case "hardswish":
            return np.where(z <= -3, 0.0, np.where(z < 3, z / 3 + 0.5, 1.0))
        case "sigmoid":
            return _sigmoid(z) * (1 - _sigmoid(z))
        case "tanh":
            return 1 - np.tanh(z) ** 2
        case "elu":
            return _array(np.where(z > 0, 1.0, np.exp(np.minimum(z, 0))))
        case "mish":
            inner = np.tanh(np.logaddexp(0, z))
            return _array(inner + z * _sigmoid(z) * (1 - inner**2))
        case "gelu_tanh":
            gate = _sigmoid(_GELU_SCALE * (z + _GELU_CUBE * z**3))
            return gate + z * _GELU_SCALE * (1 + 3 * _GELU_CUBE * z**2) * gate * (1 - gate)
    raise ValueError(f"activation {name!r} is none of {ACTIVATIONS}")


def _activated(z: Array, name: str | None, residual: ArrayLike | None) -> tuple[Array, Array]:
    """(y, z) of y = act(z + residual), z the argument of the activation."""
    z = z if residual is None else z + _array(residual)
    return activation(z, name), z


def fused(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    activation: str | None = None,
    residual: ArrayLike | None = None,
    mean: ArrayLike | None = None,
    var: ArrayLike | None = None,
    eps: float = 1e-5,
    axis: int = 1,
) -> Array:
    """act(batch_norm(x) + residual); with `mean` and `var` given, those statistics (inference)."""
    if mean is None or var is None:
        normalized = batch_norm(x, gamma, beta, eps=eps, axis=axis)
    else:
        normalized = inference(x, mean, var, gamma, beta, eps=eps, axis=axis)
    return _activated(normalized.y, activation, residual)[0]


def fused_backward(
    dy: ArrayLike,
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    activation: str | None = None,
    residual: ArrayLike | None = None,
    mean: ArrayLike | None = None,
    var: ArrayLike | None = None,
    eps: float = 1e-5,
    axis: int = 1,
) -> FusedGradients:
    """The gradient of `fused`: dz = dy act'(z), which the residual gets, then batch norm's."""
    if mean is None or var is None:
        normalized = batch_norm(x, gamma, beta, eps=eps, axis=axis)
    else:
        normalized = inference(x, mean, var, gamma, beta, eps=eps, axis=axis)
    _, z = _activated(normalized.y, activation, residual)
    dz = _array(dy) * activation_gradient(z, activation)
    if mean is None or var is None:
        g = backward(dz, x, gamma, eps=eps, axis=axis)
    else:
        g = backward_frozen(dz, x, mean, var, gamma, eps=eps, axis=axis)
    return FusedGradients(g.dx, g.dgamma, g.dbeta, dz)


# Moments


def moments(x: ArrayLike, *, weights: ArrayLike | None = None, axis: int = 1) -> Moments:
    """The moments of each channel, in two passes; weighted: n = W, M2 = sum w (x - mean)^2."""
    x = _array(x)
    w, total, x = _present(np.ones(x.shape) if weights is None else weights, x, axis)
    pool = pool_axes(x.ndim, axis)
    mean = (w * x).sum(axis=pool) / np.where(total > 0, total, 1.0)
    return Moments(total, mean, (w * (x - along(mean, x.ndim, axis)) ** 2).sum(axis=pool))


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of both sets of values together (Chan, Golub & LeVeque 1983)."""
    n = a.count + b.count
    divisor = np.where(n > 0, n, 1.0)
    delta = b.mean - a.mean
    mean = a.mean + delta * b.count / divisor
    return Moments(n, mean, a.m2 + b.m2 + delta**2 * a.count * b.count / divisor)


def merge_all(parts: Sequence[Moments]) -> Moments:
    """`merge` from the first to the last."""
    whole = parts[0]
    for part in parts[1:]:
        whole = merge(whole, part)
    return whole


def variance(m: Moments, *, unbiased: bool) -> Array:
    """M2/n (biased) or M2/(n - 1) (unbiased); M2/n where n <= 1, and 0 where n = 0."""
    divisor = np.where(m.count > 1, m.count - 1, m.count) if unbiased else m.count
    return m.m2 / np.where(divisor > 0, divisor, 1.0)


def unbiased_weighted_variance(x: ArrayLike, weights: ArrayLike, *, reliability: bool = False, axis: int = 1) -> Array:
    """The biased weighted variance times a correction.

    Frequency weights (how often a value occurs): W/(W - 1). Reliability weights (how far it is
    trusted, the scale being free): 1/(1 - sum w^2/W^2).
    """
    x = _array(x)
    w, total, _ = _present(weights, x, axis)
    biased = weighted_batch_norm(x, weights, axis=axis).var
    if reliability:
        return _array(biased / (1 - (w**2).sum(axis=pool_axes(x.ndim, axis)) / total**2))
    return biased * total / (total - 1)


# Statistics for inference


def moving_average(running: ArrayLike, batch: ArrayLike, momentum: float) -> Array:
    """(1 - momentum) running + momentum batch: momentum is the share of the new, as in torch."""
    old, new = _array(running), _array(batch)
    return (1 - momentum) * old + momentum * new


def _batch_variance(x: Array, axis: int, unbiased: bool) -> Array:
    return variance(moments(x, axis=axis), unbiased=unbiased)


def running_statistics(
    batches: Iterable[ArrayLike],
    momentum: float = 0.1,
    *,
    unbiased: bool = True,
    axis: int = 1,
) -> Statistics:
    """Moving averages over the batches, from mean 0 and variance 1.

    Variance: of each batch, unbiased (torch) by default, biased (Keras, Flax) on request.
    """
    mean, var = np.zeros(()), np.ones(())
    for batch in batches:
        x = _array(batch)
        mean = moving_average(mean, x.mean(axis=pool_axes(x.ndim, axis)), momentum)
        var = moving_average(var, _batch_variance(x, axis, unbiased), momentum)
    return Statistics(mean, var)


def debiased_statistics(
    batches: Iterable[ArrayLike],
    momentum: float = 0.1,
    *,
    unbiased: bool = True,
    axis: int = 1,
) -> Statistics:
    """Moving averages from 0, divided by 1 - (1 - momentum)^t (Kingma & Ba 2015, section 3).

    After one batch they are that batch's statistics. Variance: as in `running_statistics`.
    """
    mean, var, t = np.zeros(()), np.zeros(()), 0
    for t, batch in enumerate(batches, start=1):  # noqa: B007 (t is used after the loop)
        x = _array(batch)
        mean = moving_average(mean, x.mean(axis=pool_axes(x.ndim, axis)), momentum)
        var = moving_average(var, _batch_variance(x, axis, unbiased), momentum)
    share = 1 - (1 - momentum) ** t
    return Statistics(mean / share, var / share)


def cumulative_statistics(batches: Iterable[ArrayLike], *, unbiased: bool = True, axis: int = 1) -> Statistics:
    """The plain average over batches: a moving average with momentum 1/t at batch t.

    Variance: as in `running_statistics`; the variance between the batches' means is not in it.
    """
    mean, var = np.zeros(()), np.ones(())
    for t, batch in enumerate(batches, start=1):
        x = _array(batch)
        mean = moving_average(mean, x.mean(axis=pool_axes(x.ndim, axis)), 1 / t)
        var = moving_average(var, _batch_variance(x, axis, unbiased), 1 / t)
    return Statistics(mean, var)


def ghost_momentum(momentum: float, ghosts: int) -> float:
    """1 - (1 - p)^(1/k): k updates of this momentum forget as much as one update of p."""
    return float(1 - (1 - momentum) ** (1 / ghosts))


def ioffe_statistics(batches: Iterable[ArrayLike], *, axis: int = 1) -> Statistics:
    """Ioffe & Szegedy 2015, Algorithm 2, line 10: E = mean of mu_B, Var = m/(m-1) mean of v_B.

    There all batches hold m values. For unequal ones each counts with its number of values: E[x] is
    the mean over all values, and Var[x] = sum m_B v_B / sum (m_B - 1), the unbiased variance
    *within* batches; with equal batches both are the paper's. A batch of one value adds nothing to
    the variance.
    """
    parts = [moments(_array(b), axis=axis) for b in batches]
    mean = np.sum([p.count * p.mean for p in parts], axis=0) / np.sum([p.count for p in parts], axis=0)
    within = np.sum([p.m2 for p in parts], axis=0)
    return Statistics(mean, within / np.sum([np.maximum(p.count - 1, 0) for p in parts], axis=0))


def pooled_statistics(batches: Iterable[ArrayLike], *, unbiased: bool, axis: int = 1) -> Statistics:
    """All batches as one pool: also the variance between batches, right for unequal ones."""
    whole = merge_all([moments(_array(b), axis=axis) for b in batches])
    return Statistics(whole.mean, variance(whole, unbiased=unbiased))


def weigh_example(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    alpha: float,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    axis: int = 1,
) -> Array:
    """Inference example weighing (Summers & Dinneen 2020).

    Per example i, over its space: mean_i = (1-a) E + a E_i[x], second_i = (1-a) (Var + E^2) + a
    E_i[x^2], var_i = max(second_i - mean_i^2, 0), y_i = gamma (x_i - mean_i)/sqrt(var_i + eps) +
    beta.
    """
    x = _array(x)
    space = tuple(a for a in pool_axes(x.ndim, axis) if a != 0)
    mean, var = along(mean, x.ndim, axis), along(var, x.ndim, axis)
    mean_i = (1 - alpha) * mean + alpha * x.mean(axis=space, keepdims=True)
    second_i = (1 - alpha) * (var + mean**2) + alpha * (x**2).mean(axis=space, keepdims=True)
    var_i = np.maximum(second_i - mean_i**2, 0)
    xhat = _array((x - mean_i) / np.sqrt(var_i + eps))
    return _per_channel(gamma, 1, x, axis) * xhat + _per_channel(beta, 0, x, axis)


@dataclass(frozen=True, eq=False)
class StepNormalization:
    """gamma and beta, and the statistics (steps, C) to normalize by: None for those of the batch."""

    gamma: ArrayLike
    beta: ArrayLike = 0.0
    mean: ArrayLike | None = None
    var: ArrayLike | None = None

    def __call__(self, x: Array, t: int, eps: float) -> Array:
        """The rows (n, C) of step t, normalized."""
        if self.mean is None or self.var is None:
            mean, var = x.mean(0), x.var(0)
        else:
            mean, var = _array(self.mean)[t], _array(self.var)[t]
        return _array((x - mean) / np.sqrt(var + eps) * _array(self.gamma) + _array(self.beta))


def recurrent(
    cell: str,
    x: ArrayLike,
    lengths: Sequence[int],
    weight_ih: ArrayLike,
    weight_hh: ArrayLike,
    of_ih: StepNormalization,
    *,
    pool: str,
    of_hh: StepNormalization | None = None,
    of_c: StepNormalization | None = None,
    bias_hn: ArrayLike = 0.0,
    weight_hr: ArrayLike | None = None,
    h0: ArrayLike | None = None,
    c0: ArrayLike | None = None,
    eps: float = 1e-5,
) -> Array:
    """Hidden states (T, N, H) of a batch-normalized recurrence over sequences x (T, N, C), zero past their ends.

    `cell` is "RNN_TANH", "RNN_RELU", "LSTM" or "GRU", with torch's order of gates. W_ih x is pooled over each
    step ("frame") or all of them ("sequence", Laurent et al. 2016); W_hh h and the cell before its output tanh
    over each step (Cooijmans et al. 2016, equations 6 to 8). Only the frames before a sequence's end are pooled.
    """
    x, weight_ih, weight_hh = _array(x), _array(weight_ih), _array(weight_hh)
    steps, samples, _ = x.shape
    valid = np.arange(steps)[:, None] < np.asarray(lengths)
    of_input = x @ weight_ih.T
    if pool == "sequence":
        of_input[valid] = of_ih(of_input[valid], 0, eps)
    else:
        for t in range(steps):
            of_input[t, valid[t]] = of_ih(of_input[t, valid[t]], t, eps)
    h = np.zeros((samples, weight_hh.shape[1])) if h0 is None else _array(h0).copy()
    c = np.zeros((samples, len(weight_hh) // 4)) if c0 is None else _array(c0).copy()
    out = np.zeros((steps, samples, h.shape[1]))
    for t in range(steps):
        on = valid[t]
        of_state = h[on] @ weight_hh.T
        if of_hh is not None:
            of_state = of_hh(of_state, t, eps)
        z = of_input[t, on] + of_state
        if cell == "LSTM":
            i, f, g, o = np.split(z, 4, 1)
            c[on] = _sigmoid(f) * c[on] + _sigmoid(i) * np.tanh(g)
            shown = c[on] if of_c is None else of_c(c[on], t, eps)
            new = _sigmoid(o) * np.tanh(shown)
            h[on] = new if weight_hr is None else new @ _array(weight_hr).T
        elif cell == "GRU":
            r, update, _ = (_sigmoid(part) for part in np.split(z, 3, 1))
            x_n, h_n = (np.split(part, 3, 1)[2] for part in (of_input[t, on], of_state))
            n = np.tanh(x_n + r * (h_n + _array(bias_hn)))
            h[on] = (1 - update) * n + update * h[on]
        else:
            h[on] = np.tanh(z) if cell == "RNN_TANH" else np.maximum(z, 0)
        out[t, on] = h[on]
    return out


def adapt_statistics(source: Statistics, target: Statistics, *, prior: float, samples: float) -> Statistics:
    """N/(N + n) source + n/(N + n) target, mean and var alike (Schneider et al. 2020).

    N = `prior` samples, n = `samples` of the target. Variance: of the kind that both arguments
    hold.
    """
    share = 0.0 if math.isinf(prior) else samples / (prior + samples)
    return Statistics(
        moving_average(source.mean, target.mean, share),
        moving_average(source.var, target.var, share),
    )


# Folding


def fold_after(
    weight: ArrayLike,
    bias: ArrayLike | None,
    affine: Affine,
    *,
    transposed: bool = False,
    groups: int = 1,
) -> Folded:
    """A linear or convolutional layer, then batch norm, as one layer.

    W' = W scale on the output axis, b' = b scale + shift, which is (b - E) gamma/s + beta. The
    weight is (out, in/groups, *kernel), or (in, out/groups, *kernel) when `transposed`: its output
    channel j of group g is g out/groups + j.
    """
    weight = _array(weight)
    if transposed:
        blocks = zip(np.split(weight, groups, axis=0), np.split(affine.scale, groups), strict=True)
        folded = np.concatenate([w * along(s, w.ndim, 1) for w, s in blocks], axis=0)
    else:
        folded = weight * along(affine.scale, weight.ndim, 0)
    b = np.zeros_like(affine.scale) if bias is None else _array(bias)
    return Folded(folded, b * affine.scale + affine.shift)


def fold_before(weight: ArrayLike, bias: ArrayLike | None, affine: Affine, *, groups: int = 1) -> Folded:
    """Batch norm, then a linear or convolutional layer without zero padding, as one layer.

    W' = W scale on the input axis, b' = b + sum over inputs and kernel of W shift. With padding it
    stays exact only if channel c is padded with -shift_c/scale_c, see `padding_value`.
    """
    weight = _array(weight)
    blocks = zip(
        np.split(weight, groups, axis=0),
        np.split(affine.scale, groups),
        np.split(affine.shift, groups),
        strict=True,
    )
    scaled, shifted = [], []
    for w, scale, shift in blocks:
        scaled.append(w * along(scale, w.ndim, 1))
        shifted.append((w * along(shift, w.ndim, 1)).sum(axis=tuple(range(1, w.ndim))))
    b = np.zeros(len(weight)) if bias is None else _array(bias)
    return Folded(np.concatenate(scaled), b + np.concatenate(shifted))


def padding_value(affine: Affine) -> Array:
    """What the input of the folded layer is padded with, so that the affine map makes it zero."""
    return -affine.shift / affine.scale
