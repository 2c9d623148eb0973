"""Samples as a network takes them: what is done to the values of a file, and samples that are prepared when read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchnorm.errors import DataError
from batchnorm.training.sources import BLOCK, Array, Source, in_blocks


@dataclass(frozen=True)
class Preparation:
    """What is done to raw samples before they reach the network; the exported networks expect it done.

    Args:
        channels_last: samples (N, H, W, C) become (N, C, H, W).
        add_channel: samples (N, H, W) become (N, 1, H, W).
        scale: all values are divided by it.
        shift: is subtracted from the features of a table, in float64; () where nothing is.
        keep: integers stay integers.
        columns: the names of a table's features, in their order; () where they have none. Other tables are read in it.
    """

    channels_last: bool = False
    add_channel: bool = False
    scale: float = 1.0
    shift: tuple[float, ...] = ()
    keep: bool = False
    columns: tuple[str, ...] = ()

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise DataError for raw samples of a shape (N, ...) to which this cannot be done."""
        axes = 4 if self.channels_last else 3 if self.add_channel else None
        expected = "images (N, H, W, C)" if self.channels_last else "images (N, H, W)"
        if self.shift and shape[1:] != (len(self.shift),):
            axes, expected = -1, f"a table of {len(self.shift)} features"
        if axes is not None and len(shape) != axes:
            raise DataError(f"data {name}: x has shape {shape}, and the data of the run was {expected}.")

    def __call__(self, x: Array) -> Tensor:
        """The samples (N, ...) as a tensor."""
        if self.channels_last:
            x = x.transpose(0, 3, 1, 2)
        if self.add_channel:
            x = x[:, None]
        if self.shift:
            x = x.astype(np.float64) - np.asarray(self.shift)
        if self.scale != 1:
            x = x / self.scale
        if self.keep and x.dtype.kind != "f":
            return torch.from_numpy(np.ascontiguousarray(x))
        return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))


class Samples:
    """Samples that are read and prepared when they are asked for, with as much of a tensor's face as training needs.

    Args:
        source: of the raw samples.
        places: which of them, in which order.
        preparation: what is done to them.
    """

    def __init__(self, source: Source, places: Array, preparation: Preparation) -> None:
        self._source, self._places, self._preparation = source, places, preparation
        like = preparation(source.read(places[:1]))
        self.shape = torch.Size((len(places), *like.shape[1:]))
        self.dtype, self.ndim = like.dtype, like.ndim

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, places: slice | Tensor) -> Tensor:
        """The samples at these places, as a tensor."""
        chosen = self._places[places if isinstance(places, slice) else places.cpu().numpy()]
        return self._preparation(self._source.read(chosen))

    def split(self, size: int) -> Parts:
        """Batches of `size` samples, the last one smaller; read anew in each pass."""
        return Parts(self, torch.arange(len(self)).split(size))

    def blocks(self) -> Parts:
        """All samples, some megabytes at a time."""
        return self.split(max(1, BLOCK // max(1, self.dtype.itemsize * math.prod(self.shape[1:]))))

    def is_floating_point(self) -> bool:
        """Whether the prepared samples are floats."""
        return self.dtype.is_floating_point


class Parts:
    """Batches of samples at given places, with their labels where these are given; read anew in each pass."""

    def __init__(
        self, samples: Samples | Tensor, places: Any, device: Any = None, labels: Tensor | None = None
    ) -> None:
        self._samples, self._places, self._device, self._labels = samples, list(places), device, labels

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Any]:
        for places in self._places:
            x = self._samples[places].to(self._device)
            yield x if self._labels is None else (x, self._labels[places])

    def every(self, size: int, first: int) -> Parts:
        """Each `size`-th batch, from number `first` on."""
        return Parts(self._samples, self._places[first::size], self._device, self._labels)

    @property
    def samples(self) -> int:
        """How many samples all batches have."""
        return sum(map(len, self._places))


@dataclass(frozen=True)
class Survey:
    """What one pass over raw samples finds.

    Args:
        unusable: values that are NaN, infinite or beyond float32.
        unusable_samples: samples with such values; the first of them is `first`.
        largest: the largest absolute value of the samples that count.
        mean, std, reach: by feature of a table (N, features), of the samples that count: mean and standard deviation
            in float64, and the largest absolute value; empty for other shapes.
    """

    unusable: int
    unusable_samples: int
    first: int
    largest: float
    mean: Array
    std: Array
    reach: Array


def survey(source: Source, counts: Array) -> Survey:
    """One pass over all samples; `counts` says by place which of them the figures are of."""
    unusable = unusable_samples = 0
    first, largest = -1, 0.0
    table = len(source.shape) == 2
    features = source.shape[1] if table else 0
    n, mean, m2, reach = 0, np.zeros(features), np.zeros(features), np.zeros(features)
    for start, block in in_blocks(source):
        if block.dtype.kind == "f":
            bad = ~(np.abs(block) <= np.finfo(np.float32).max)
            if bad.any():
                rows = np.flatnonzero(bad.reshape(len(block), -1).any(axis=1))
                unusable, unusable_samples = unusable + int(bad.sum()), unusable_samples + len(rows)
                first = start + int(rows[0]) if first < 0 else first
                continue
        part = block[counts[start : start + len(block)]].astype(np.float64)
        if not len(part):
            continue
        largest = max(largest, float(np.abs(part).max()))
        if table:
            shift = part.mean(0) - mean
            total = n + len(part)
            m2 += ((part - part.mean(0)) ** 2).sum(0) + shift**2 * n * len(part) / total
            mean, n = mean + shift * len(part) / total, total
            reach = np.maximum(reach, np.abs(part).max(0))
    return Survey(unusable, unusable_samples, first, largest, mean, np.sqrt(m2 / max(1, n)), reach)
