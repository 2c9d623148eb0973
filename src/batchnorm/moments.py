"""Moments: how many values, their mean, and the sum of squared distances from it; a monoid."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from batchnorm.errors import DtypeError, InputError

# `of` works through the samples in chunks of about this many values, so that its float64 copies
# stay small whatever the size of the input.
_CHUNK = 1 << 22

_FORMAT, _VERSION = "batchnorm.Moments", 1


@dataclass(frozen=True, eq=False)
class Moments:
    """The moments (n, mean, M2) of pools of values, M2 = sum (x - mean)^2; float64 throughout.

    Moments of disjoint sets of values are merged with `+`:

        n = na + nb;  d = mean_b - mean_a;  mean = mean_a + d nb/n;  M2 = M2a + M2b + d^2 na nb/n

    which is associative and commutative up to rounding, with `Moments.empty` as the exact identity.
    So chunks, ghost batches, batches and ranks all merge by the same operation, and never lose
    digits as E[x^2] - E[x]^2 does.

    Args:
        count: number of values (or sum of their weights) of each pool; a number, or a tensor that
            broadcasts to the shape of `mean`.
        mean: tensor of any shape, one entry a pool: (C,), or (pools, C).
        m2: tensor of the same shape.

    Raises:
        InputError: shapes that do not fit together.

    Source: Chan, Golub & LeVeque 1983, Algorithms for Computing the Sample Variance.

    Examples:
        >>> x = torch.tensor([[1.0], [2.0], [3.0], [6.0]])
        >>> whole = Moments.of(x[:3]) + Moments.of(x[3:])
        >>> whole.mean.item(), whole.variance(unbiased=False).item()
        (3.0, 3.5)
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    def __post_init__(self) -> None:
        mean = torch.as_tensor(self.mean, dtype=torch.float64)
        m2 = torch.as_tensor(self.m2, dtype=torch.float64, device=mean.device)
        count = torch.as_tensor(self.count, dtype=torch.float64, device=mean.device)
        fits = count.ndim <= mean.ndim and all(
            a in (1, b) for a, b in zip(reversed(count.shape), reversed(mean.shape), strict=False)
        )
        if m2.shape != mean.shape or not fits:
            raise InputError(
                f"Moments: got count of shape {tuple(count.shape)}, mean of {tuple(mean.shape)} "
                f"and m2 of {tuple(m2.shape)}; expected mean and m2 of one shape, and a count "
                "that broadcasts to it"
            )
        for name, value in (("count", count), ("mean", mean), ("m2", m2)):
            object.__setattr__(self, name, value)

    @classmethod
    def of(
        cls,
        x: Tensor,
        channel_axis: int = 1,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Moments:
        """The moments of each channel of `x`, in two passes in float64.

        Arguments:
            x: (N, C, *space), or any shape with the channels on `channel_axis`; any real dtype.
            channel_axis: the axis of the channels; all others are pooled.
            mask: boolean, True = valid, shaped like `x` without its channels or with one in their
                place: (N, *space) or (N, 1, *space). A masked value reaches nothing, be it NaN.
            weights: real, >= 0, of a mask's shape. A value counts as often as its weight says, so
                the count is the sum of the weights; a weight of zero is a mask.

        Returns:
            Moments of shape (C,). A pool without values has count 0, mean 0 and m2 0.

        Raises:
            InputError: no such axis, a shape that does not fit, a negative or non-finite weight.
            DtypeError: complex `x`, or a mask that is not boolean.
        """
        if not -x.ndim <= channel_axis < x.ndim:
            raise InputError(
                f"Moments.of: got channel_axis={channel_axis} for an input of shape "
                f"{tuple(x.shape)}; expected an axis of the input"
            )
        if x.is_complex():
            raise DtypeError(f"Moments.of: got an input of {x.dtype}; expected a real dtype")
        x, axis = (x[None], 1) if x.ndim == 1 else (x, channel_axis % x.ndim)
        w = _weights(x, axis, mask, weights)
        if axis == 0:  # chunks are runs of samples, so these come first
            x, axis, w = x.movedim(0, 1), 1, None if w is None else w.movedim(0, 1)
        rows = max(1, _CHUNK * len(x) // max(1, x.numel()))
        chunks = torch.split(x, rows)
        of_weights = [None] * len(chunks) if w is None else torch.split(w, rows)
        return cls.merge_all(_two_pass(chunk, axis, part) for chunk, part in zip(chunks, of_weights, strict=True))

    @classmethod
    def empty(cls, shape: int | tuple[int, ...], *, device: torch.device | str | None = None) -> Moments:
        """The moments of no values at all, in pools of this shape: the identity of `merge`."""
        zeros = torch.zeros(shape, dtype=torch.float64, device=device)
        return cls(torch.zeros_like(zeros), zeros, zeros.clone())

    @classmethod
    def merge_all(cls, parts: Iterable[Moments]) -> Moments:
        """`merge` from the first to the last, always in this order: the same bits every time.

        Raises:
            InputError: nothing to merge. The shape is not known then; start from `Moments.empty`.
        """
        parts = iter(parts)
        first = next(parts, None)
        if first is None:
            raise InputError(
                "Moments.merge_all: got no moments; expected at least one "
                "(put Moments.empty(shape) first if there may be none)"
            )
        return reduce(Moments.merge, parts, first)

    def merge(self, other: Moments) -> Moments:
        """The moments of the values of both (Chan, Golub & LeVeque 1983).

        Raises:
            InputError: the pools have different shapes.
        """
        if self.mean.shape != other.mean.shape:
            raise InputError(
                f"Moments.merge: got pools of shape {tuple(self.mean.shape)} and "
                f"{tuple(other.mean.shape)}; expected the same shape"
            )
        count = self.count + other.count
        share = other.count / torch.where(count > 0, count, 1.0)
        delta = other.mean - self.mean
        # delta * count first: an empty side then adds an exact zero, however large delta is.
        between = delta * self.count * share * delta
        return Moments(count, self.mean + delta * share, self.m2 + other.m2 + between)

    def __add__(self, other: Moments) -> Moments:
        return self.merge(other) if isinstance(other, Moments) else NotImplemented

    def merge_axis(self, axis: int) -> Moments:
        """The moments of all pools along one axis, merged at once; the axis is gone.

        >>> Moments(2, torch.tensor([1.0, 3.0]), torch.tensor([0.5, 0.5])).merge_axis(0).m2.item()
        5.0
        """
        return Moments(*merge_axis(self.count.expand_as(self.mean), self.mean, self.m2, axis))

    def variance(self, *, unbiased: bool) -> Tensor:
        """M2/n (biased: what normalizes) or M2/(n - 1) (unbiased: what torch keeps for inference).

        Where n <= 1 there is no unbiased variance and M2/n is returned (0 for a single value), and
        0 where n = 0: never NaN, never infinite, for finite moments. With weights, n is their sum
        (frequency weights). Result: float64, of the shape of `mean`.
        """
        divisor = torch.where(self.count > 1, self.count - 1, self.count) if unbiased else self.count
        return self.m2 / torch.where(divisor > 0, divisor, 1.0)

    def std(self, *, unbiased: bool) -> Tensor:
        """The square root of `variance(unbiased=...)`."""
        return self.variance(unbiased=unbiased).sqrt()

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> Moments:
        """The moments of the values of all ranks of `group`: one all-gather, merged in rank order.

        Every rank gets the same bits. A rank without values takes part with `Moments.empty`. Where
        no process group is initialized this process is the world, and the result is `self`. Not
        differentiable.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return self
        count = self.count.expand_as(self.mean)
        mine = torch.stack([count, self.mean, self.m2]).detach()
        ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(ranks, mine, group=group)
        return Moments.merge_all(Moments(*rank.unbind()) for rank in ranks)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers in nested lists, as JSON can hold them: `from_dict` gives every bit back.

        Returns:
            ``format``, ``version``, ``shape`` and ``count_shape``, and flat lists ``count``, ``mean`` and ``m2`` of
            float64 numbers. JSON has no numbers that are not finite: these are the strings "nan", "inf" and "-inf".

        Examples:
            >>> state = Moments(2, torch.tensor([1.5]), torch.tensor([0.5])).to_dict()
            >>> state["count"], state["mean"], state["m2"]
            ([2.0], [1.5], [0.5])
        """
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "shape": list(self.mean.shape),
            "count_shape": list(self.count.shape),
            **{name: [_plain(v) for v in getattr(self, name).flatten().tolist()] for name in ("count", "mean", "m2")},
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Moments:
        """The moments that `to_dict` made a dict of, before or after JSON.

        Raises:
            InputError: another format or version, an entry that is missing or holds no numbers, a negative count or
                M2. The message names the entry.

        Examples:
            >>> a = Moments.of(torch.tensor([[1.0], [4.0]]))
            >>> torch.equal(Moments.from_dict(a.to_dict()).m2, a.m2)
            True
        """
        if not isinstance(state, Mapping):
            raise InputError(f"Moments.from_dict: got a {type(state).__name__}; expected what Moments.to_dict gives")
        if state.get("format") != _FORMAT or state.get("version") != _VERSION:
            raise InputError(
                f"Moments.from_dict: got format {state.get('format')!r}, version {state.get('version')!r}; "
                f"expected {_FORMAT!r}, version {_VERSION}"
            )
        values = {}
        for name, shape in (("count", "count_shape"), ("mean", "shape"), ("m2", "shape")):
            try:
                sizes = [operator.index(size) for size in state[shape]]
                flat = [_number(value) for value in state[name]]
                values[name] = torch.tensor(flat, dtype=torch.float64).reshape(sizes)
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                reason = f"there is no entry {error}" if isinstance(error, KeyError) else str(error)
                raise InputError(f"Moments.from_dict: {name!r} of shape {shape!r} cannot be read: {reason}") from error
            if name != "mean" and (values[name] < 0).any():
                raise InputError(f"Moments.from_dict: {name!r} has negative values; expected 0 or more")
        return cls(**values)

    def to(self, device: torch.device | str) -> Moments:
        """The same moments on another device."""
        return Moments(self.count.to(device), self.mean.to(device), self.m2.to(device))


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError(f"{value!r} is no number")
    if isinstance(value, str) and value not in ("nan", "inf", "-inf"):
        raise ValueError(f"{value!r} is no number")
    return float(value)


def merge_axis(count: Tensor, mean: Tensor, m2: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """`Moments.merge_axis` on tensors of one shape and of any dtype and device."""
    total = count.sum(axis, keepdim=True)
    share = count / torch.where(total > 0, total, 1.0)
    # A pool without values has no say, whatever its mean.
    merged = torch.where(count > 0, share * mean, 0.0).sum(axis, keepdim=True)
    between = torch.where(count > 0, count * (mean - merged).square(), 0.0)
    return total.squeeze(axis), merged.squeeze(axis), (m2 + between).sum(axis)


def _two_pass(x: Tensor, axis: int, weights: Tensor | None) -> Moments:
    """Mean first, then squared distances from it, in float64, corrected for the mean's rounding."""
    pool = [a for a in range(x.ndim) if a != axis]
    x = x.to(torch.float64)
    if weights is None:
        count = torch.tensor(x.numel() // max(1, x.shape[axis]), dtype=x.dtype, device=x.device)
        divisor = count.clamp(min=1)
        mean = x.sum(pool, keepdim=True) / divisor
        centered = x - mean
        weighted = centered
    else:
        count = weights.sum()
        divisor = torch.where(count > 0, count, 1.0)
        # A NaN or an infinity under a weight of zero must not reach the sums.
        x = torch.where(weights > 0, x, 0.0)
        mean = (weights * x).sum(pool, keepdim=True) / divisor
        centered = x - mean
        weighted = weights * centered
    rest = weighted.sum(pool)
    m2 = (weighted * centered).sum(pool) - rest.square() / divisor
    return Moments(count, mean.flatten() + rest / divisor, m2.clamp(min=0))


def _weights(x: Tensor, axis: int, mask: Tensor | None, weights: Tensor | None) -> Tensor | None:
    """Mask and weights as one float64 tensor with a one in place of the channels, or None."""
    product = None
    for name, given in (("mask", mask), ("weights", weights)):
        if given is None:
            continue
        pool = [*x.shape[:axis], 1, *x.shape[axis + 1 :]]
        without_channels = [*x.shape[:axis], *x.shape[axis + 1 :]]
        if list(given.shape) not in (pool, without_channels):
            raise InputError(
                f"Moments.of: got {name} of shape {tuple(given.shape)} for an input of shape "
                f"{tuple(x.shape)}; expected {tuple(without_channels)} or {tuple(pool)}"
            )
        if name == "mask" and given.dtype != torch.bool:
            raise DtypeError(f"Moments.of: got a mask of {given.dtype}; expected torch.bool, True = valid")
        if name == "weights" and not ((given >= 0) & torch.isfinite(given)).all():
            raise InputError("Moments.of: got weights that are negative or not finite")
        given = given.reshape(pool).to(torch.float64)
        product = given if product is None else product * given
    return product
