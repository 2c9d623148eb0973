"""The input layer: feature standardization, fitted in one pass over batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm import data
from batchnorm.data.columns import NonFinite, check_choice
from batchnorm.data.sources import is_dataset
from batchnorm.data.waiting import TIMEOUT
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

    Args:
        num_features: number of features C.
        feature_axis: where they lie in the input; 1 for (N, C, *space), -1 for (N, *space, C).
        device: where the statistics are kept.

    Buffers (in the state_dict; float64, also after `.half()` or `.float()`):
        mean, var: (C,), the variance biased.
        count: how many values each feature was fitted on; one number, or (C,) where values were skipped.

    Shape: any with C entries on `feature_axis`; the output has the input's shape and dtype (the
    default dtype for integers). The arithmetic is float64, rounded once.

    Raises:
        InputError: another number of features than C, or, in `fit` and `partial_fit`, a value that
            is not finite (DataError for a data set). The statistics are then what they were before.

    Source: LeCun, Bottou, Orr & Müller 1998, Efficient BackProp, section 4.3; Chan, Golub & LeVeque 1983 (merging).

    Examples:
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

    @classmethod
    def from_moments(
        cls,
        moments: Moments | data.ColumnMoments | Mapping[str, Any],
        *,
        feature_axis: int = 1,
        device: torch.device | str | None = None,
    ) -> Standardize:
        """A layer with the statistics of moments that were measured elsewhere.

        Args:
            moments: of every feature, shape (C,): `Moments`, what `data.moments` gives, or the dict that ``to_dict``
                of one of these gives, before or after JSON.
            feature_axis: where the features lie in the input.
            device: where the statistics are kept.

        Raises:
            InputError: another shape, a feature without values, or moments that are not finite. The message names it.

        Examples:
            >>> a, b = Moments.of(torch.tensor([[1.0], [2.0]])), Moments.of(torch.tensor([[6.0]]))
            >>> Standardize.from_moments(a.merge(b)).mean
            tensor([3.], dtype=torch.float64)
        """
        if isinstance(moments, Mapping):
            is_columns = moments.get("format") == "batchnorm.ColumnMoments"
            moments = data.ColumnMoments.from_dict(moments) if is_columns else Moments.from_dict(moments)
        if isinstance(moments, data.ColumnMoments):
            moments = moments.moments
        if not isinstance(moments, Moments) or moments.mean.ndim != 1 or not moments.mean.numel():
            shape = f"moments of shape {tuple(moments.mean.shape)}" if isinstance(moments, Moments) else type(moments)
            raise InputError(f"Standardize.from_moments: got {shape}; expected moments of shape (C,), C >= 1")
        layer = cls(moments.mean.numel(), feature_axis=feature_axis, device=device)
        return layer._store(_usable(moments, "Standardize.from_moments"))

    def fit(
        self,
        batches: Any,
        *,
        columns: Sequence[str] | None = None,
        nonfinite: NonFinite = "error",
        timeout: float = TIMEOUT,
    ) -> Standardize:
        """Forget what was fitted, then fit to all batches, or to a data set where it lies, in one pass.

        Args:
            batches: a tensor (one batch), or an iterable of tensors or of tuples and lists whose first element is the
                input, such as a DataLoader of (x, y); or a data set as `data.moments` takes it: files (.npy, Parquet,
                Arrow) of any size, arrays and tables, and the data sets of Ray, Spark and Dask.
            columns: of a data set, the columns that are the features, in this order; by default all.
            nonfinite: "error" refuses NaN and infinity (and nulls); "skip" leaves out these values alone.
            timeout: seconds to wait for an engine.

        Returns:
            The layer itself.

        Raises:
            InputError: see the class; or no batch at all.
            DataError: what is wrong with a data set; the message names part and column.
        """
        check_choice("Standardize.fit", nonfinite)
        if is_dataset(batches):
            found = data.moments(
                batches, columns=columns, feature_axis=self.feature_axis, nonfinite=nonfinite, timeout=timeout
            )
            if found.moments.mean.numel() != self.num_features:
                named = "" if found.columns is None else f" ({', '.join(found.columns[:8])}, ...)"
                raise InputError(
                    f"Standardize.fit: the data set has {found.moments.mean.numel()} features{named}; expected "
                    f"{self.num_features}. Name those to read by columns=[...]"
                )
            return self._store(_usable(found.moments, "Standardize.fit"))
        if columns is not None:
            raise InputError("Standardize.fit: got columns= for batches of tensors; it names columns of a data set")
        whole = None
        for i, batch in enumerate([batches] if isinstance(batches, Tensor) else batches):
            part = self._moments(batch, f"batch {i}", nonfinite)
            whole = part if whole is None else whole + part
        if whole is None or not whole.count.any():
            raise InputError("Standardize.fit: got no data; expected at least one sample")
        return self._store(_usable(whole, "Standardize.fit"))

    def partial_fit(self, batch: Any, *, nonfinite: NonFinite = "error") -> Standardize:
        """Fit to one more batch of tensors, on top of those before; see `fit`."""
        check_choice("Standardize.partial_fit", nonfinite)
        part = self._moments(batch, "the batch", nonfinite)
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

    def _moments(self, batch: Any, name: str, nonfinite: NonFinite) -> Moments:
        x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(x, Tensor):
            raise InputError(
                f"Standardize: {name} is of type {type(x).__name__}; expected a tensor, or a tuple "
                "or list that starts with one"
            )
        self._check(x, f"Standardize: {name}")
        return _finite_moments(x.detach(), self.feature_axis, f"Standardize: {name}", skip=nonfinite == "skip")

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
        count = moments.count.flatten()
        one = not count.numel() or bool((count == count[0]).all())
        self.count = (count[:1].sum() if one else count.clone()).to(self.mean.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        given = state_dict.get(f"{prefix}count")
        if isinstance(given, Tensor) and given.shape in ((), self.mean.shape):  # each feature may have its own
            self.count = self.count.new_empty(given.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)

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

    Args:
        x: (N, C, *space), or any shape with the features on `feature_axis`.
        feature_axis: the axis of the features.

    Returns:
        The standardized values, of the shape of `x`.

    Raises:
        InputError: no such axis, or a value that is not finite.

    Source: LeCun, Bottou, Orr & Müller 1998, Efficient BackProp, section 4.3.

    Examples:
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
    return torch.where(std > 8 * torch.finfo(torch.float64).eps * mean.abs(), std, torch.ones_like(std))


def _finite_moments(x: Tensor, axis: int, called: str, skip: bool = False) -> Moments:
    moments = Moments.of(x, axis)
    bad = ~(torch.isfinite(moments.mean) & torch.isfinite(moments.m2))
    if bad.any() and skip:
        moments = _of_finite(x.movedim(axis, 0).flatten(1).to(torch.float64))
        bad = ~(torch.isfinite(moments.mean) & torch.isfinite(moments.m2))
    if bad.any():
        finite = torch.isfinite(x).movedim(axis, 0).flatten(1)
        counts = (~finite).sum(1)
        listed = {k: n for k, n in enumerate(counts.tolist()) if n}
        if not listed:
            raise InputError(
                f"{called}: features {bad.nonzero().flatten().tolist()[:8]} have a variance that overflows"
            )
        raise InputError(
            f"{called}: features {list(listed)[:8]} have values that are not finite (by feature: "
            f"{dict(list(listed.items())[:8])}); remove or impute them first, or leave them out by nonfinite='skip'"
        )
    return moments


def _of_finite(x: Tensor) -> Moments:
    """The moments of the finite values of each row."""
    finite = torch.isfinite(x)
    count = finite.sum(1).to(torch.float64)
    divisor = count.clamp(min=1)
    mean = torch.where(finite, x, 0.0).sum(1) / divisor
    centered = torch.where(finite, x - mean[:, None], 0.0)
    rest = centered.sum(1)
    m2 = (centered.square().sum(1) - rest.square() / divisor).clamp(min=0)
    return Moments(count, mean + rest / divisor, m2)


def _usable(moments: Moments, called: str) -> Moments:
    """The same, once every feature has values and finite moments."""
    count = moments.count.expand_as(moments.mean)
    for what, bad in (
        ("no values", ~(count > 0)),
        ("moments that are not finite", ~(torch.isfinite(moments.mean) & torch.isfinite(moments.m2))),
        ("a negative M2", moments.m2 < 0),
    ):
        if bad.any():
            raise InputError(f"{called}: features {bad.nonzero().flatten().tolist()[:8]} have {what}")
    return moments
