"""Models of Caffe (``.caffemodel``): BatchNorm layers, and the Scale layers behind them that hold gamma and beta.

Numbers of fields are those of ``caffe.proto`` (BVLC): NetParameter{layer = 100}; LayerParameter{name = 1, type = 2,
bottom = 3, top = 4, blobs = 7, batch_norm_param = 139}; BatchNormParameter{moving_average_fraction = 2, eps = 3};
BlobProto{data = 5, double_data = 8, shape = 7}.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from batchnorm.errors import DataError
from batchnorm.population.formats.containers import fields
from batchnorm.population.formats.conventions import CONVENTIONS
from batchnorm.population.formats.records import Array, Checkpoint, ForeignBatchNorm

_LAYER = 100
_FORGOTTEN = 1e-12  # a share of the start that no float32 average shows


@dataclass(frozen=True)
class _Layer:
    name: str
    kind: str
    bottoms: tuple[str, ...]
    tops: tuple[str, ...]
    blobs: tuple[bytes, ...]
    settings: bytes


def layers_of(content: bytes) -> list[_Layer] | None:
    """The layers of a model; None where the bytes are no model of Caffe."""
    try:
        entries = list(fields(content))
        layers = [_layer(value) for number, value in entries if number == _LAYER and isinstance(value, bytes)]
    except (ValueError, UnicodeDecodeError):
        return None
    return layers if layers and all(layer.kind for layer in layers) else None


def _layer(message: bytes) -> _Layer:
    found: dict[int, list[Any]] = {}
    for number, value in fields(message):
        found.setdefault(number, []).append(value)
    texts = {number: tuple(value.decode() for value in found.get(number, ())) for number in (1, 2, 3, 4)}
    name, kind = ("".join(texts[number][-1:]) for number in (1, 2))
    settings = b"".join(found.get(139, ()))
    return _Layer(name, kind, texts[3], texts[4], tuple(found.get(7, ())), settings)


def read(layers: list[_Layer], path: Path) -> Checkpoint:
    """The batch normalizations among the layers of a model."""
    found = [_norm(layers, i, path) for i, layer in enumerate(layers) if layer.kind == "BatchNorm"]
    return Checkpoint("caffe", ".caffemodel", tuple(found), True)


def _norm(layers: list[_Layer], at: int, path: Path) -> ForeignBatchNorm:
    layer = layers[at]
    if len(layer.blobs) != 3:
        raise DataError(
            f"{path}: layer {layer.name!r} has {len(layer.blobs)} blobs; expected mean, variance and factor"
        )
    sums, factor = [_vector(blob) for blob in layer.blobs[:2]], float(_vector(layer.blobs[2])[0])
    settings = {number: struct.unpack("<f", value)[0] for number, value in fields(layer.settings) if number in (2, 3)}
    row = CONVENTIONS["caffe"]
    decay, eps = _decimal(settings.get(2, row.decay)), _decimal(settings.get(3, row.eps))
    mean, var = (each / factor if factor else np.zeros_like(each) for each in sums)
    gamma, beta = _scale(layers, at)
    return ForeignBatchNorm(
        layer.name, mean, var, gamma, beta, decay, eps, row.variance, row.running, _batches(factor, decay)
    )


def _scale(layers: list[_Layer], at: int) -> tuple[Array | None, Array | None]:
    """gamma and beta of the layer that reads the normalized values first, if it is a Scale or a Bias."""
    top = layers[at].tops[-1:]
    reader = next((layer for layer in layers[at + 1 :] if top and top[0] in layer.bottoms), None)
    if reader is None or len(reader.bottoms) != 1 or reader.kind not in ("Scale", "Bias") or not reader.blobs:
        return None, None
    vectors = [_vector(blob) for blob in reader.blobs]
    if reader.kind == "Bias":
        return None, vectors[0]
    return vectors[0], vectors[1] if len(vectors) > 1 else np.zeros_like(vectors[0])


def _batches(factor: float, decay: float) -> int:
    """t of factor = 1 + decay + ... + decay^(t - 1)."""
    if not 0 < decay < 1:
        return round(factor)
    left = max(1 - factor * (1 - decay), _FORGOTTEN)
    return round(math.log(left) / math.log(decay))


def _decimal(value: float | None) -> float:
    """A number of float32 as it was written: 0.999 instead of 0.99900001."""
    assert value is not None
    return float(str(np.float32(value)))


def _vector(blob: bytes) -> Array:
    """The numbers of a blob as (n,): packed, or one field each."""
    singles: list[Array] = []
    for number, value in fields(blob):
        if number in (5, 8):
            singles.append(np.frombuffer(value, "<f4" if number == 5 else "<f8"))
    return np.concatenate(singles).astype(np.float64) if singles else np.zeros(0)
