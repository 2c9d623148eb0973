"""The input layer: feature standardization, fitted in one pass over batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.errors import InputError
from batchnorm.moments import Moments
from batchnorm.nn.leaves import recorded_call


class Standardize(nn.Module):
    """Standardize each feature by statistics fitted once, before training: y = (x - mean)/std.

    The first layer of a network for tabular or raw data. Unlike batch normalization nothing is
    trained, and training and inference do the same. Fitting merges the moments of the batches, so
    it takes one pass, needs no more memory than a batch, and does not depend on how the data are
    cut. `std` is the square root of the *biased* variance (1/n), as in scikit-learn's
    StandardScaler. A feature that is constant up to float64's rounding has the scale 1: it becomes
    0, and `inverse` gives the constant back. Before `fit` the layer is the identity.

    Arguments:
        num_features: number of features C.
        feature_axis: where they lie in the input; 1 for (N, C, *space), -1 for (N, *space, C).
        device: where the statistics are kept.

    Buffers (in the state_dict; float64, also after `.half()` or `.float()`):
        mean, var: (C,), the variance biased.
        count: how many values each feature was fitted on.

    Shape: any with C entries on `feature_axis`; the output has the input's shape and dtype (the
    default dtype for integers). The arithmetic is float64, rounded once.

    Raises:
        InputError: another number of features than C, or, in `fit` and `partial_fit`, a value that
            is not finite. The statistics are then what they were before.

    >>> layer = Standardize(2).fit([torch.tensor([[1.0, 7.0], [3.0, 7.0]])])
    >>> layer(torch.tensor([[5.0, 7.0]]))
    tensor([[3., 0.]])
    """

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        feature_axis: int = 1,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if num_features < 1:
            raise InputError(f"Standardize: got num_features={num_features}; expected at least 1")
        self.num_features = num_features
        self.feature_axis = feature_axis
        options: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.register_buffer("mean", torch.zeros(num_features, **options))
        self.register_buffer("var", torch.ones(num_features, **options))
        self.register_buffer("count", torch.zeros((), **options))

    def fit(self, batches: Tensor | Iterable[Any]) -> Standardize:
        """Forget what was fitted, then fit to all batches in one pass.

        Arguments:
            batches: a tensor (one batch), or an iterable of tensors or of tuples and lists whose
                first element is the input, such as a DataLoader of (x, y).

        Returns:
            The layer itself.

        Raises:
            InputError: see the class; or no batch at all.
        """
        whole = None
        for i, batch in enumerate([batches] if isinstance(batches, Tensor) else batches):
            part = self._moments(batch, f"batch {i}")
            whole = part if whole is None else whole + part
        if whole is None or not whole.count:
            raise InputError("Standardize.fit: got no data; expected at least one sample")
        return self._store(whole)

    def partial_fit(self, batch: Any) -> Standardize:
        """Fit to one more batch, on top of those before; see `fit`."""
        part = self._moments(batch, "the batch")
        return self._store(Moments(self.count, self.mean, self.var * self.count) + part)

    def forward(self, x: Tensor) -> Tensor:
        """(x - mean)/std, feature by feature."""
        if (recorded := recorded_call(self, (x,))) is not None:
            return recorded  # type: ignore[return-value]
        self._check(x, "Standardize")
        return _affine(x, self.feature_axis, lambda v, at: (v - at(self.mean)) / at(self._scale()))

    def inverse(self, y: Tensor) -> Tensor:
        """What `forward` made y of: y std + mean."""
        self._check(y, "Standardize.inverse")
        return _affine(y, self.feature_axis, lambda v, at: v * at(self._scale()) + at(self.mean))

    def extra_repr(self) -> str:
        return f"{self.num_features}, feature_axis={self.feature_axis}"

    def _scale(self) -> Tensor:
        return _scale(self.mean, self.var)

    def _moments(self, batch: Any, name: str) -> Moments:
        x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(x, Tensor):
            raise InputError(
                f"Standardize: {name} is of type {type(x).__name__}; expected a tensor, or a tuple "
                "or list that starts with one"
            )
        self._check(x, f"Standardize: {name}")
        return _finite_moments(x.detach(), self.feature_axis, f"Standardize: {name}")

    def _check(self, x: Tensor, called: str) -> None:
        fits = -x.ndim <= self.feature_axis < x.ndim
        if not fits or x.shape[self.feature_axis] != self.num_features:
            raise InputError(
                f"{called}: got an input of shape {tuple(x.shape)}; expected {self.num_features} "
                f"features on axis {self.feature_axis}"
            )

    def _store(self, moments: Moments) -> Standardize:
        self.mean.copy_(moments.mean)
        self.var.copy_(moments.variance(unbiased=False))
        self.count.copy_(moments.count)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Standardize:
        # Half precision would spoil a mean that is large beside its spread: follow to another
        # device, but keep float64.
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, exact in before.items():
            moved = self._buffers[name]
            if exact is not None and moved is not None and moved.dtype != exact.dtype:
                self._buffers[name] = exact.to(moved.device)
        return self


def standardize(x: Tensor, *, feature_axis: int = 1) -> Tensor:
    """Standardize each feature of `x` by its own statistics: (x - mean)/std.

    What `Standardize(C).fit(x)(x)` gives: `std` from the *biased* variance (1/n), constant features
    become 0, the arithmetic is float64, the result has the dtype of `x` (the default dtype for
    integers).

    Arguments:
        x: (N, C, *space), or any shape with the features on `feature_axis`.
        feature_axis: the axis of the features.

    Raises:
        InputError: no such axis, or a value that is not finite.

    >>> standardize(torch.tensor([[1.0, 7.0], [3.0, 7.0]]))
    tensor([[-1.,  0.],
            [ 1.,  0.]])
    """
    moments = _finite_moments(x, feature_axis, "standardize")
    mean, scale = moments.mean, _scale(moments.mean, moments.variance(unbiased=False))
    return _affine(x, feature_axis, lambda v, at: (v - at(mean)) / at(scale))


def _affine(x: Tensor, axis: int, map_: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]) -> Tensor:
    """Apply `map_` in float64; its second argument shapes per-feature values to fit its first."""
    shape = [1] * x.ndim
    shape[axis] = -1
    dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
    return map_(x.to(torch.float64), lambda values: values.to(torch.float64).view(shape)).to(dtype)


def _scale(mean: Tensor, var: Tensor) -> Tensor:
    """The standard deviation, and 1 for features that are constant up to float64's rounding."""
    std = var.sqrt()
    return torch.where(std > 8 * torch.finfo(torch.float64).eps * mean.abs(), std, 1.0)


def _finite_moments(x: Tensor, axis: int, called: str) -> Moments:
    moments = Moments.of(x, axis)
    bad = ~(torch.isfinite(moments.mean) & torch.isfinite(moments.m2))
    if bad.any():
        raise InputError(
            f"{called}: features {bad.nonzero().flatten().tolist()[:8]} have values that are not "
            "finite; remove or impute them first"
        )
    return moments
