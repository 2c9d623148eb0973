"""Weights of Darknet: numbers without names, which only the network's ``.cfg`` tells apart.

The layout is that of ``load_weights`` in Darknet's ``parser.c``: three integers of version, the number of images seen
(eight bytes from version 0.2 on), then float32: of a convolution biases, scales, rolling mean and rolling variance (the
last three where it normalizes), weights; of a connected layer biases, weights, then the three.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from batchnorm.errors import DataError, InputError
from batchnorm.population.formats.conventions import CONVENTIONS
from batchnorm.population.formats.records import Array, Checkpoint, ForeignBatchNorm

_OBSTACLE = "Darknet divides by the unbiased standard deviation in training as well"
_EPS = 1e-6
_HEADS = ("yolo", "Gaussian_yolo", "region", "detection", "iseg", "cost", "softmax")
_NO_WEIGHTS = (*_HEADS, "soft", "dropout", "activation", "logistic", "l2norm", "normalization", "lrn")


def is_header(start: bytes) -> bool:
    """Whether the first bytes are versions that Darknet and its forks write: 0.1 and 0.2, revisions below 10."""
    major, minor, revision = np.frombuffer(start[:12], "<i4") if len(start) >= 12 else (-1, -1, -1)
    return bool(major == 0 and 1 <= minor <= 2 and 0 <= revision < 10)


@dataclass(frozen=True)
class _Shape:
    """Channels, height and width of a layer's output."""

    c: int
    h: int
    w: int

    @property
    def size(self) -> int:
        return self.c * self.h * self.w


def read(path: Path) -> Checkpoint:
    """The batch normalizations of a file of weights, by the ``.cfg`` of the same name beside it."""
    note = "Darknet divides by sqrt(var) + 1e-6: var is given as (sqrt(var) + 1e-6)^2, and eps is 0"
    found = tuple(norm for norm, _ in _found(path))
    return Checkpoint("darknet", f".weights by {path.with_suffix('.cfg').name}", found, True, (note,))


def _found(path: Path) -> list[tuple[ForeignBatchNorm, _Places]]:
    """The batch normalizations, and where their numbers lie."""
    config = path.with_suffix(".cfg")
    if not config.exists():
        raise InputError(
            f"{path.name} looks like weights of Darknet, which have no names. Put the network's configuration beside "
            f"it as {config.name}"
        )
    content = path.read_bytes()
    numbers = content[_start(content) :]
    if len(numbers) % 4:
        raise DataError(f"{path} has {len(numbers)} bytes of weights; expected float32 numbers")
    reader = _Reader(np.frombuffer(numbers, "<f4"), path)
    found = list(_layers(_sections(config), reader, config))
    if reader.left:
        raise DataError(f"{path} has {reader.left} numbers more than {config.name} has places for")
    return found


def into(template: Path, pairs: Mapping[str, ForeignBatchNorm]) -> bytes:
    """The bytes of weights, with the numbers of the layers named in ``pairs`` replaced."""
    places = {norm.name: each for norm, each in _found(template)}
    content = bytearray(template.read_bytes())
    start = _start(content)
    for name, f in pairs.items():
        gamma, beta, mean, var = f.filled()
        root = np.sqrt(var.astype(np.float64) + f.eps) - _EPS
        at = places[name]
        if at.beta is None and f.beta is not None and f.beta.any():
            raise InputError(f"a [batchnorm] section of Darknet has no beta, and layer {f.name!r} has one")
        vectors = [(at.vectors, np.concatenate([gamma, mean, np.maximum(root, 0) ** 2]))]
        vectors += [] if at.beta is None else [(at.beta, beta)]
        for offset, values in vectors:
            bits = values.astype("<f4").tobytes()
            content[start + 4 * offset : start + 4 * offset + len(bits)] = bits
    return bytes(content)


class _Places(NamedTuple):
    """Where numbers of a layer begin: those of beta, and those of gamma, mean and variance."""

    beta: int | None
    vectors: int


_Norm = tuple[ForeignBatchNorm, _Places]


def _start(content: bytes | bytearray) -> int:
    """Where the numbers begin, behind three integers and the images seen, of eight bytes from version 0.2 on."""
    return 20 if int(np.frombuffer(content[4:8], "<i4")[0]) >= 2 else 16


class _Reader:
    """Takes numbers from the front."""

    def __init__(self, numbers: Array, path: Path) -> None:
        self._numbers, self._path = numbers, path
        self._at = 0

    @property
    def at(self) -> int:
        """How many were taken."""
        return self._at

    @property
    def left(self) -> int:
        return len(self._numbers) - self._at

    def take(self, count: int) -> Array:
        if count > self.left:
            raise DataError(f"{self._path} ends within a layer: it has {self.left} numbers where {count} are expected")
        self._at += count
        return self._numbers[self._at - count : self._at]


def _sections(config: Path) -> list[tuple[str, dict[str, str]]]:
    sections: list[tuple[str, dict[str, str]]] = []
    for line in config.read_text(errors="replace").splitlines():
        text = "".join(re.split("[#;]", line)[0].split())
        if text.startswith("["):
            sections.append((text.strip("[]"), {}))
        elif "=" in text and sections:
            key, _, value = text.partition("=")
            sections[-1][1][key] = value
    return sections


def _layers(sections: list[tuple[str, dict[str, str]]], reader: _Reader, config: Path) -> Iterator[_Norm]:
    """Walks the network with the weights, as long as there are any: files of the first layers alone are usual."""
    if not sections or sections[0][0] not in ("net", "network"):
        raise DataError(f"{config} does not start with [net]")
    net = sections[0][1]
    if "inputs" in net:
        now = _Shape(int(net["inputs"]), 1, 1)
    else:
        now = _Shape(*(int(net.get(key, 0)) for key in ("channels", "height", "width")))
    shapes: list[_Shape] = []
    for index, (kind, options) in enumerate(sections[1:]):
        if not reader.left:
            return
        try:
            after, norm = _layer(kind, options, now, shapes, reader)
        except (ValueError, IndexError, ZeroDivisionError) as error:
            raise DataError(f"{config}: section {index} [{kind}] cannot be read: {error}") from error
        if norm is not None:
            yield replace(norm[0], name=f"{kind}_{index}", aliases=(str(index),)), norm[1]
        now = after
        shapes.append(now)


def _layer(
    kind: str, options: dict[str, str], now: _Shape, shapes: list[_Shape], reader: _Reader
) -> tuple[_Shape, _Norm | None]:
    """The shape after a layer, and its batch normalization."""

    def number(key: str, default: int) -> int:
        return int(options.get(key, default))

    normalizes = bool(number("batch_normalize", 0))
    if kind in ("convolutional", "conv", "deconvolutional", "deconv"):
        filters, size, stride, groups = (
            number("filters", 1),
            number("size", 1),
            number("stride", 1),
            number("groups", 1),
        )
        pad = size // 2 if number("pad", 0) else number("padding", 0)
        after = _Shape(filters, *((side + 2 * pad - size) // stride + 1 for side in (now.h, now.w)))
        if kind.startswith("de"):
            after = _Shape(filters, *((side - 1) * stride + size - 2 * pad for side in (now.h, now.w)))
        start, biases = reader.at, reader.take(filters)
        norm = _norm(reader, biases, start) if normalizes else None
        reader.take(now.c // groups * filters * size * size)
        return after, norm
    if kind in ("connected", "conn"):
        outputs = number("output", 1)
        start, biases = reader.at, reader.take(outputs)
        reader.take(outputs * now.size)
        return _Shape(outputs, 1, 1), _norm(reader, biases, start) if normalizes else None
    if kind == "batchnorm":
        return now, _norm(reader, np.zeros(now.c, np.float32), None)  # whose beta Darknet neither trains nor saves
    return _without_weights(kind, number, options, now, shapes), None


def _norm(reader: _Reader, beta: Array, start: int | None) -> _Norm:
    row = CONVENTIONS["darknet"]
    places = _Places(start, reader.at)
    gamma, mean, var = (reader.take(len(beta)) for _ in range(3))
    shifted = (np.sqrt(var.astype(np.float64)) + _EPS) ** 2
    assert row.decay is not None
    return ForeignBatchNorm("", mean, shifted, gamma, beta, row.decay, 0.0, row.variance, obstacle=_OBSTACLE), places


def _without_weights(kind: str, number: Any, options: dict[str, str], now: _Shape, shapes: list[_Shape]) -> _Shape:
    if kind in ("maxpool", "max"):
        stride = number("stride", 1)
        size = number("size", stride)
        pad = number("padding", size - 1)
        return _Shape(now.c, *((side + pad - size) // stride + 1 for side in (now.h, now.w)))
    if kind in ("avgpool", "avg"):
        return _Shape(now.c, 1, 1)
    if kind == "route":
        indices = [int(each) for each in options["layers"].split(",")]
        parts = [shapes[each] for each in indices]
        return _Shape(sum(part.c for part in parts) // number("groups", 1), parts[0].h, parts[0].w)
    if kind == "upsample" and number("stride", 2) > 0:
        return _Shape(now.c, now.h * number("stride", 2), now.w * number("stride", 2))
    if kind == "reorg" and not number("reverse", 0):
        stride = number("stride", 1)
        return _Shape(now.c * stride * stride, now.h // stride, now.w // stride)
    if kind == "crop":
        return _Shape(now.c, number("crop_height", 1), number("crop_width", 1))
    if kind == "shortcut" or kind in _NO_WEIGHTS:
        return now
    raise ValueError("the weights of such a section are laid out in another way")
