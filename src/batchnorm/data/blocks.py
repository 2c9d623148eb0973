"""The moments of a stream of blocks of values, feature by feature, in float64 and in the memory of one block."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from batchnorm.moments import Moments

# The float64 copy of a piece stays in the cache: 64 K values are 512 KB.
_PIECE = 1 << 16

_Array = np.ndarray[Any, np.dtype[Any]]


class FeatureSums:
    """Count, mean and M2 of each feature of what has been added, and how many values were not finite.

    Pieces are measured in two passes (mean, then squared distances, corrected for the rounding of the mean) and are
    merged by the formula of Chan, Golub & LeVeque 1983. Values that are not finite are counted and left out.
    """

    def __init__(self, features: int) -> None:
        self.count = np.zeros(features)
        self.mean = np.zeros(features)
        self.low = np.zeros(features)
        self.m2 = np.zeros(features)
        self.nonfinite = np.zeros(features, dtype=np.int64)

    def add_column(self, feature: int, values: _Array) -> None:
        """Take in values (n,) of one feature."""
        for start in range(0, len(values), _PIECE):
            piece = values[start : start + _PIECE].astype(np.float64, copy=False)
            self._merge(slice(feature, feature + 1), *_of_column(piece))

    def add_rows(self, first: int, values: _Array) -> None:
        """Take in values (n, C) or (n, C, s) of the features first .. first + C - 1."""
        features = values.shape[1]
        place = slice(first, first + features)
        if values.ndim == 2 and values.flags.f_contiguous and not values.flags.c_contiguous:
            for k in range(features):
                self.add_column(first + k, values[:, k])
            return
        rows = max(1, _PIECE * len(values) // max(1, values.size))
        for start in range(0, len(values), rows):
            piece = values[start : start + rows].astype(np.float64, copy=False)
            self._merge(place, *_of_rows(piece if piece.ndim == 3 else piece[:, :, None]))

    def moments(self) -> tuple[Moments, torch.Tensor]:
        """What has been measured, as `Moments` of shape (C,), and the low parts of the means."""
        moments = Moments(*(torch.from_numpy(value.copy()) for value in (self.count, self.mean, self.m2)))
        return moments, torch.from_numpy(self.low.copy())

    def _merge(self, place: slice, count: Any, mean: Any, low: Any, m2: Any, nonfinite: Any) -> None:
        mine = (self.count[place], self.mean[place], self.low[place], self.m2[place])
        merged = merge(mine, (count, mean, low, m2))
        self.count[place], self.mean[place], self.low[place], self.m2[place] = merged
        self.nonfinite[place] += nonfinite


def merge(a: tuple[Any, ...], b: tuple[Any, ...]) -> tuple[Any, ...]:
    """Chan's merge of (count, mean, low part of the mean, M2), arrays of NumPy.

    The mean is the sum of two float64 numbers. So the distance of two means is exact to its own rounding, and M2 loses
    nothing to a mean that is large beside the spread, however often parts are merged.
    """
    (count_a, mean_a, low_a, m2_a), (count_b, mean_b, low_b, m2_b) = a, b
    count = count_a + count_b
    share = count_b / np.where(count > 0, count, 1.0)
    with np.errstate(all="ignore"):  # values near the largest float64: M2 overflows, which is refused later
        delta = (mean_b - mean_a) + (low_b - low_a)
        m2 = m2_a + m2_b + delta * count_a * share * delta
        step = low_a + delta * share
        mean = mean_a + step  # and what this rounding loses, by Knuth's two-sum
        back = mean - mean_a
        low = (mean_a - (mean - back)) + (step - back)
    # An empty side adds nothing, not even a rounding.
    keep_a, keep_b = count_b == 0, count_a == 0
    mean, low = (
        np.where(keep_a, x, np.where(keep_b, y, z)) for x, y, z in ((mean_a, mean_b, mean), (low_a, low_b, low))
    )
    return count, mean, np.where(np.isfinite(low), low, 0.0), m2


def _of_column(x: _Array) -> tuple[Any, ...]:
    """(count, mean, low part of the mean, M2, values that are not finite) of float64 values (n,)."""
    with np.errstate(all="ignore"):
        mean = x.sum() / len(x)
        centered = x - mean
        m2 = np.dot(centered, centered)
        if not np.isfinite(m2):
            finite = np.isfinite(x)
            bad = len(x) - int(finite.sum())
            if bad == len(x):
                return 0.0, 0.0, 0.0, 0.0, bad
            if bad:
                return (*_of_column(x[finite])[:-1], bad)
        rest = centered.sum()
        return float(len(x)), mean, rest / len(x), max(m2 - rest * rest / len(x), 0.0), 0


def _of_rows(x: _Array) -> tuple[Any, ...]:
    """The same of float64 values (n, C, s), each of shape (C,)."""
    with np.errstate(all="ignore"):
        values = x.shape[0] * x.shape[2]
        count: Any = float(values)
        mean = x.sum((0, 2)) / max(count, 1)
        centered = x - mean[:, None]
        m2 = _squares(centered)
        bad = np.zeros(x.shape[1], dtype=np.int64)
        if not np.isfinite(m2).all():
            finite = np.isfinite(x)
            bad = values - finite.sum((0, 2))
            count = (values - bad).astype(np.float64)
            mean = np.where(finite, x, 0.0).sum((0, 2)) / np.maximum(count, 1)
            centered = np.where(finite, x - mean[:, None], 0.0)
            m2 = _squares(centered)
        rest = centered.sum((0, 2))
        m2 = np.maximum(m2 - rest * rest / np.maximum(count, 1), 0.0)
        return np.broadcast_to(count, m2.shape), mean, rest / np.maximum(count, 1), m2, bad


def _squares(centered: _Array) -> Any:
    return np.einsum("ncs,ncs->c", centered, centered)
