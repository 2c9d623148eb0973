"""The operators with gradients: reverse and forward mode, any order, and under vmap.

The first derivative runs on the kernels. If a derivative of the derivative may be asked for, the same gradient is
made of differentiable operations instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from batchnorm.kernels import aten
from batchnorm.ops import generated
from batchnorm.ops.context import is_graphed, is_in_forward_mode
from batchnorm.ops.fusion import Fusion
from batchnorm.ops.schemas import ACTIVATIONS, PIECEWISE_LINEAR
from batchnorm.pools import Pool, Pools, all_gather, merge, merge_moments, sum_over_ranks

_ops = torch.ops.batchnorm


class Settings(NamedTuple):
    """What is not a tensor: samples a pool (0: all), eps, the activation's name and its slope."""

    pool_size: int
    eps: float
    activation: str
    slope: float

    def arguments(self) -> tuple[int, float, int, float]:
        """As the operators take them."""
        return self.pool_size, self.eps, ACTIVATIONS.index(self.activation), self.slope


def _saves_signs(residual: Tensor | None, activation: str, mask: Tensor | None = None) -> bool:
    """Whether one bit an element stands in for the residual in the backward.

    Not in a graph: the bits lie in the memory order of x, and a compiler may make x again in another.
    """
    return residual is not None and activation in PIECEWISE_LINEAR and mask is None and not is_graphed()


def _save(
    ctx: Any,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    settings: Settings,
    statistics: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor | None, ...]:
    """Keeps what the backward needs, and no more: the residual only where one bit an element is not enough for it."""
    has_signs = False
    if residual is not None:
        has_signs = _saves_signs(residual, settings.activation, mask)
        if has_signs or settings.activation == "identity":
            residual = None
    tensors = (x, weight, bias, residual, mask)
    ctx.save_for_backward(*tensors)
    ctx.statistics = statistics  # mean, biased variance and signs: made here, so nobody else can change them
    ctx.settings = settings
    ctx.has_signs = has_signs
    if has_signs:  # the bits lie in the order of x
        ctx.format = suggest_memory_format(x)
    ctx.set_materialize_grads(False)
    ctx.wanted = ctx.needs_input_grad[:4]
    return tensors


def _saved(ctx: Any) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """x, weight, bias, residual, mask; x in its own memory order, which hooks on saved tensors may have changed."""
    x, weight, bias, residual, mask = ctx.saved_tensors
    if ctx.has_signs and suggest_memory_format(x) != ctx.format:
        x = x.contiguous(memory_format=ctx.format)
    return x, weight, bias, residual, mask


def _gate(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: tuple[Tensor, Tensor, Tensor],
    settings: Settings,
) -> Tensor:
    """The derivative of a piecewise linear activation, from its bits: a constant of both modes."""
    mean, var, signs = statistics
    with torch.no_grad():
        one, zero = torch.ones_like(mean), torch.zeros_like(mean)
        args = (x, weight, bias, None, signs, mean, var, one, zero, zero)
        gate: Tensor = _ops.backward_apply.default(torch.ones_like(x), *args, *settings.arguments(), False)[0]
    return gate


def _gradients(ctx: Any, dy: Tensor | None, population: bool) -> tuple[Tensor | None, ...]:
    """With respect to x, weight, bias and residual."""
    if dy is None:
        return None, None, None, None
    saved, (mean, var, signs) = _saved(ctx), ctx.statistics
    signs = signs if ctx.has_signs else None
    return gradients(dy, *saved, signs, mean, var, ctx.settings, population, ctx.wanted)


def gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    signs: Tensor | None,
    mean: Tensor,
    var: Tensor,
    settings: Settings,
    population: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """With respect to x, weight, bias and residual, those wanted; differentiable where grad mode says so."""
    want_x, _, _, want_residual = wanted
    if torch.is_grad_enabled() or is_in_forward_mode():
        if signs is not None:
            dy = dy * _gate(x, weight, bias, (mean, var, signs), settings)
            settings = settings._replace(activation="identity")
        if not population:
            mean, var = aten.batch_statistics(x, Pools(x, settings.pool_size, mask))
        d_x, d_residual, d_weight, d_bias = aten.gradients(
            dy, x, weight, bias, residual, mean, var, *settings, population, mask
        )
    else:
        passes_through = settings.activation == "identity" and mask is None  # then the residual's gradient is dy itself
        d_x, d_residual, d_weight, d_bias = _ops.backward.default(
            dy,
            x,
            weight,
            bias,
            residual,
            signs,
            mean,
            var,
            *settings.arguments(),
            population,
            want_x,
            want_residual and not passes_through,
            mask,
        )
        if passes_through:
            d_residual = dy
    return _asked((d_x, d_residual, d_weight, d_bias), weight, bias, wanted)


def _asked(
    found: Sequence[Tensor], weight: Tensor | None, bias: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Of the gradients of x, residual, weight and bias those wanted, in the order of the arguments."""
    d_x, d_residual, d_weight, d_bias = found
    want_x, want_weight, want_bias, want_residual = wanted
    return (
        d_x if want_x else None,
        _cast(d_weight, weight) if want_weight else None,
        _cast(d_bias, bias) if want_bias else None,
        d_residual if want_residual else None,
    )


class _Saved(NamedTuple):
    """What a backward reads beside dy."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    mask: Tensor | None
    signs: Tensor | None
    mean: Tensor
    var: Tensor


def gradients_operator(a: Any) -> tuple[Tensor, ...]:
    """`gradients` as the operator that C++ calls where its own backward will not do."""
    settings = Settings(a.pool_size, a.eps, ACTIVATIONS[a.activation], a.slope)
    saved = _Saved(a.x, a.weight, a.bias, a.residual, a.mask, a.signs, a.mean, a.var)
    found: tuple[Tensor | None, ...]
    if a.groups:
        count = a.mean.new_full(a.mean.shape, a.x.numel() // a.groups)
        found = merged_gradients(a.dy, saved, settings, Pool(groups=a.groups), count, a.wanted)
    elif a.factors is not None:
        found = _renormalized_gradients(a.dy, saved, settings, a.factors, a.wanted)
    else:
        found = gradients(a.dy, *saved, settings, a.population, a.wanted)
    return tuple(a.x.new_empty(0) if each is None else each for each in found)


def normalized_again(a: Any) -> Tensor:
    """activation(BN(x)) by operations that have derivatives; the statistics are given, or else those of x."""
    mean, var = (a.mean, a.var) if a.population else aten.batch_statistics(a.x, Pools(a.x, 0, None))
    activation = ACTIVATIONS[a.activation]
    return aten.normalize(a.x, mean, var, a.weight, a.bias, None, 0, a.eps, activation, a.slope)


def _renormalized_gradients(
    dy: Tensor, saved: _Saved, settings: Settings, factors: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """`gradients` through gamma r and gamma d + beta, of which r and d are constants."""
    want_x, want_weight, want_bias, want_residual = wanted
    r, d = factors
    weight, bias = saved.weight, saved.bias
    made = Fusion(weight, bias).renormalized(r, d, saved.x.dtype)
    saved = saved._replace(weight=made.weight, bias=made.bias)
    d_x, d_scale, d_shift, d_residual = gradients(
        dy, *saved, settings, False, (want_x, want_weight, want_weight or want_bias, want_residual)
    )
    d_weight = d_bias = None
    if want_weight:
        assert d_scale is not None
        assert d_shift is not None
        d_weight = _cast(d_scale.to(r.dtype) * r + d_shift.to(d.dtype) * d, weight)
    if want_bias:
        assert d_shift is not None
        d_bias = _cast(d_shift, bias)
    return d_x, d_weight, d_bias, d_residual


def _cast(gradient: Tensor, parameter: Tensor | None) -> Tensor:
    assert parameter is not None
    return gradient if gradient.dtype == parameter.dtype else gradient.to(parameter.dtype)


def _tangent(ctx: Any, tangents: tuple[Tensor | None, ...], population: bool) -> Tensor:
    """Of the output, from those of x, weight, bias and residual."""
    x, weight, bias, residual, _ = ctx.saved_tensors
    mean, var, _ = ctx.statistics
    settings: Settings = ctx.settings
    if not population:
        mean, var = aten.batch_statistics(x, Pools(x, settings.pool_size))
    if ctx.has_signs:
        linear = settings._replace(activation="identity")
        d_z = aten.tangent(tangents, x, weight, bias, None, mean, var, *linear, population)
        return d_z * _gate(x, weight, bias, ctx.statistics, settings)
    return aten.tangent(tangents, x, weight, bias, residual, mean, var, *settings, population)


def _fold(x: Tensor | None, dim: int | None, size: int, channel: int) -> Tensor | None:
    """Joins the mapped axis to the channels: (..., C, ...) and (size,) to (..., size * C, ...)."""
    if x is None:
        return None
    x = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.movedim(0, channel).flatten(channel, channel + 1)


def _unfold(x: Tensor, size: int, channel: int) -> Tensor:
    """The inverse of `_fold`; the mapped axis comes first."""
    unfolded: Tensor = x.unflatten(channel, (size, x.shape[channel] // size))
    return unfolded.movedim(channel, 0)


class BatchStatistics(torch.autograd.Function):
    """activation(BN(x) + residual) by the statistics of x; also returns mean, biased variance and signs."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        pool_size: int,
        eps: float,
        activation: str,
        slope: float,
    ) -> tuple[Tensor, ...]:
        settings = Settings(pool_size, eps, activation, slope)
        y, mean, var, signs = _ops.forward.default(
            x, weight, bias, residual, *settings.arguments(), _saves_signs(residual, activation, mask), mask
        )
        ctx.mark_non_differentiable(mean, var, signs)
        _save(ctx, x, weight, bias, residual, mask, settings, (mean, var, signs))
        return y, mean, var, signs

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> Any:
        return *_gradients(ctx, dy, False), None, None, None, None, None


class Generated(torch.autograd.Function):
    """`BatchStatistics`, or by given statistics `PopulationStatistics`, of formulas that a compiler makes code of."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        eps: float,
        activation: str,
        slope: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.settings, ctx.population = (eps, activation, slope), mean is not None
        fusion = Fusion(weight, bias, residual, eps, activation, slope)
        if mean is None or var is None:
            y, mean, var = generated.forward(x, fusion)
        else:
            mean, var = mean.clone(), var.clone()  # running statistics may move on before the backward
            y = generated.normalize(x, mean, var, fusion)
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        gate = y if generated.gates_by_output(x, activation) else None
        ctx.save_for_backward(x, weight, bias, residual, mean, var, gate)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> Any:
        if dy is None:
            return (None,) * 9
        x, weight, bias, residual, mean, var, gate = ctx.saved_tensors
        fusion = Fusion(weight, bias, residual, *ctx.settings)
        found = generated.gradients(dy, x, mean, var, gate, fusion, ctx.population)
        return *_asked(found, weight, bias, ctx.needs_input_grad[:4]), *(None,) * 5


class EagerBatchStatistics(torch.autograd.Function):
    """`BatchStatistics` where nothing is traced or transformed: y alone goes through autograd, the rest into a list.

    Each output of a function costs as much as a small kernel, and so does each look at its signature.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        settings: Settings,
        measured: list[Tensor],
    ) -> Tensor:
        y: Tensor
        y, mean, var, signs = _ops.forward.default(
            x, weight, bias, residual, *settings.arguments(), _saves_signs(residual, settings.activation, mask), mask
        )
        measured += (mean, var, signs)
        _save(ctx, x, weight, bias, residual, mask, settings, (mean, var, signs))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        return *_gradients(ctx, dy, False), None, None, None


# `Function.apply` without its Python part, which looks for transforms: there are none here.
eager_batch_statistics = super(torch.autograd.Function, EagerBatchStatistics).apply


class PopulationStatistics(torch.autograd.Function):
    """activation(BN(x) + residual) by given statistics (C,) or (pools, C), which are constants."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mean: Tensor,
        var: Tensor,
        pool_size: int,
        eps: float,
        activation: str,
        slope: float,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        settings = Settings(pool_size, eps, activation, slope)
        save_signs = _saves_signs(residual, activation, mask)
        y, signs = _ops.normalize.default(x, mean, var, weight, bias, residual, *settings.arguments(), save_signs, mask)
        ctx.mark_non_differentiable(signs)
        if any(ctx.needs_input_grad):  # running statistics may move on before the backward
            mean, var = mean.clone(), var.clone()
        _save(ctx, x, weight, bias, residual, mask, settings, (mean, var, signs))
        return y, signs

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> Any:
        return *_gradients(ctx, dy, True), *(None,) * 7


class TransformedBatchStatistics(torch.autograd.Function):
    """`BatchStatistics` under functorch's transforms and in forward mode."""

    @staticmethod
    def forward(
        x: Tensor, weight: Any, bias: Any, residual: Any, pool_size: int, eps: float, activation: str, slope: float
    ) -> tuple[Tensor, ...]:
        settings = Settings(pool_size, eps, activation, slope)
        result: tuple[Tensor, ...] = _ops.forward.default(
            x, weight, bias, residual, *settings.arguments(), _saves_signs(residual, activation)
        )
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, mean, var, signs = output
        ctx.mark_non_differentiable(mean, var, signs)
        x, weight, bias, residual, *settings = inputs
        saved = _save(ctx, x, weight, bias, residual, None, Settings(*settings), (mean, var, signs))
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> Any:
        return *_gradients(ctx, dy, False), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _tangent(ctx, tangents[:4], population=False), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, *rest: Any) -> Any:
        size = info.batch_size
        weight, bias, residual, *settings = rest
        y, mean, var, signs = TransformedBatchStatistics.apply(
            _fold(x, in_dims[0], size, 1),
            _fold(weight, in_dims[1], size, 0),
            _fold(bias, in_dims[2], size, 0),
            _fold(residual, in_dims[3], size, 1),
            *settings,
        )
        folded = (_unfold(y, size, 1), _unfold(mean, size, 1), _unfold(var, size, 1), signs)
        return folded, (0, 0, 0, None)


class TransformedPopulationStatistics(torch.autograd.Function):
    """`PopulationStatistics` under functorch's transforms and in forward mode."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Any,
        bias: Any,
        residual: Any,
        mean: Tensor,
        var: Tensor,
        pool_size: int,
        eps: float,
        activation: str,
        slope: float,
    ) -> tuple[Tensor, ...]:
        settings = Settings(pool_size, eps, activation, slope)
        save_signs = _saves_signs(residual, activation)
        result: tuple[Tensor, ...] = _ops.normalize.default(
            x, mean, var, weight, bias, residual, *settings.arguments(), save_signs
        )
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, residual, mean, var, *settings = inputs
        signs = output[1]
        ctx.mark_non_differentiable(signs)
        statistics = (mean.clone(), var.clone(), signs)
        saved = _save(ctx, x, weight, bias, residual, None, Settings(*settings), statistics)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> Any:
        return *_gradients(ctx, dy, True), None, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _tangent(ctx, tangents[:4], population=True), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, *rest: Any) -> Any:
        size = info.batch_size
        weight, bias, residual, mean, var, *settings = rest
        y, signs = TransformedPopulationStatistics.apply(
            _fold(x, in_dims[0], size, 1),
            _fold(weight, in_dims[1], size, 0),
            _fold(bias, in_dims[2], size, 0),
            _fold(residual, in_dims[3], size, 1),
            _fold(mean, in_dims[4], size, mean.ndim - 1 - (in_dims[4] is not None)),
            _fold(var, in_dims[5], size, var.ndim - 1 - (in_dims[5] is not None)),
            *settings,
        )
        return (_unfold(y, size, 1), signs), (0, None)


class MeasuredStatistics(PopulationStatistics):
    """`BatchStatistics` where mean and biased variance of x have been measured before."""

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> Any:
        return *_gradients(ctx, dy, population=False), *(None,) * 7


class TransformedMeasuredStatistics(TransformedPopulationStatistics):
    """`MeasuredStatistics` under functorch's transforms and in forward mode."""

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> Any:
        return *_gradients(ctx, dy, population=False), *(None,) * 6

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _tangent(ctx, tangents[:4], population=False), None


def _merged(
    ctx: Any,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    pool: Pool,
    settings: Settings,
) -> tuple[Tensor, ...]:
    """y, count, mean and var of pools that reach over channels or ranks; what the backward reads is saved.

    The kernels sum over samples and space; these sums are merged, and become the coefficients of the values.
    """
    parts = _ops.count_moments.default(x, pool.size, mask)
    parts = parts[None] if pool.process_group is None else all_gather(parts, pool)
    groups = pool.groups
    if groups and x.is_cpu:  # whose kernels merge ranks alone
        counts, means, m2s = parts.unbind(1)
        parts = torch.stack(merge_moments(counts, means, m2s, Pool(groups=groups)), 1)
        groups = 0
    y, count, mean, var, signs = _ops.normalize_merged.default(
        x, parts, weight, bias, residual, *settings.arguments(), groups,
        _saves_signs(residual, settings.activation, mask), mask,
    )  # fmt: skip
    _save(ctx, x, weight, bias, residual, mask, settings, (mean, var, signs))
    ctx.pool, ctx.count = pool, count
    return y, count, mean, var


def _merged_backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    tensors, (mean, var, signs) = _saved(ctx), ctx.statistics
    if dy is None:  # other ranks may wait for this one's sums
        dy = torch.zeros_like(tensors[0])
    saved = _Saved(*tensors, signs if ctx.has_signs else None, mean, var)
    return merged_gradients(dy, saved, ctx.settings, ctx.pool, ctx.count, ctx.wanted)


class MergedStatistics(torch.autograd.Function):
    """activation(BN(x) + residual) where the pools reach over channels or ranks; also the statistics."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        pool: Pool,
        eps: float,
        activation: str,
        slope: float,
    ) -> tuple[Tensor, ...]:
        settings = Settings(pool.size, eps, activation, slope)
        y, count, mean, var = _merged(ctx, x, weight, bias, residual, mask, pool, settings)
        ctx.mark_non_differentiable(count, mean, var)
        return y, count, mean, var

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> Any:
        return *_merged_backward(ctx, dy), *(None,) * 5


class EagerMergedStatistics(torch.autograd.Function):
    """`MergedStatistics` where nothing is traced or transformed: y goes through autograd, the rest into a list."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        pool: Pool,
        settings: Settings,
        measured: list[Tensor],
    ) -> Tensor:
        y, *statistics = _merged(ctx, x, weight, bias, residual, mask, pool, settings)
        measured += statistics
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        return *_merged_backward(ctx, dy), *(None,) * 4


eager_merged_statistics = super(torch.autograd.Function, EagerMergedStatistics).apply


def merged_gradients(
    dy: Tensor, saved: _Saved, settings: Settings, pool: Pool, count: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """`gradients` where the pools reach over channels or ranks and hold ``count`` values, (pools, C)."""
    x, weight, bias, residual, mask, signs, mean, var = saved
    want_residual = wanted[3]
    if torch.is_grad_enabled():
        if signs is not None:
            dy = dy * _gate(x, weight, bias, (mean, var, signs), settings)
            settings = settings._replace(activation="identity")
        mean, var = aten.batch_statistics(x, Pools(x, pool, mask))
        d_x, d_residual, d_weight, d_bias = aten.gradients(
            dy, x, weight, bias, residual, mean, var, pool, *settings[1:], False, mask
        )
    else:
        given = (dy, x, weight, bias, residual, signs, mean, var)
        sums, d_weight, d_bias = _ops.reduce_merged.default(*given, *settings.arguments(), mask)
        if pool.groups:
            sums = merge(sums.flatten(0, 1), Pool(groups=pool.groups)).unflatten(0, (2, len(mean)))
        sums = sum_over_ranks(sums, pool)
        d_x, d_residual = _ops.backward_merged.default(*given, sums, count, *settings.arguments(), want_residual, mask)
    return _asked((d_x, d_residual, d_weight, d_bias), weight, bias, wanted)
