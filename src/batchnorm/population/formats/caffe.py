"""Models of Caffe (``.caffemodel``): BatchNorm layers, and the Scale layers behind them that hold gamma and beta.

Numbers of fields are those of ``caffe.proto`` (BVLC): NetParameter{layer = 100}; LayerParameter{name = 1, type = 2,
bottom = 3, top = 4, blobs = 7, batch_norm_param = 139}; BatchNormParameter{moving_average_fraction = 2, eps = 3};
BlobProto{data = 5, double_data = 8, shape = 7}.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from batchnorm.errors import DataError, InputError
from batchnorm.population.formats.containers import field, fields, spans, varint
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
    running = "cumulative" if decay == 1 else row.running
    return ForeignBatchNorm(
        layer.name, mean, var, gamma, beta, decay, eps, row.variance, running, _batches(factor, decay)
    )


def _behind(layers: list[_Layer], at: int) -> _Layer | None:
    """The Scale or Bias that reads a layer's output first."""
    top = layers[at].tops[-1:]
    reader = next((layer for layer in layers[at + 1 :] if top and top[0] in layer.bottoms), None)
    known = reader is not None and len(reader.bottoms) == 1 and reader.kind in ("Scale", "Bias") and reader.blobs
    return reader if known else None


def _scale(layers: list[_Layer], at: int) -> tuple[Array | None, Array | None]:
    """gamma and beta of the layer that reads the normalized values first, if it is a Scale or a Bias."""
    reader = _behind(layers, at)
    if reader is None:
        return None, None
    vectors = [_vector(blob) for blob in reader.blobs]
    if reader.kind == "Bias":
        return None, vectors[0]
    return vectors[0], vectors[1] if len(vectors) > 1 else np.zeros_like(vectors[0])


def write(layers: list[tuple[str, ForeignBatchNorm]]) -> bytes:
    """A model of the batch normalizations alone, each a BatchNorm and a Scale, which Caffe takes by their names."""
    return b"".join(_pair(name, f) for name, f in layers)


def scale_name(name: str) -> str:
    """What models of Caffe call the Scale behind a BatchNorm: scale1 behind bn1, else the name and _scale."""
    head, found, tail = name.rpartition("bn")
    return f"{head}scale{tail}" if found else f"{name}_scale"


def _pair(name: str, f: ForeignBatchNorm) -> bytes:
    settings = b"".join(
        varint(number << 3 | 5) + struct.pack("<f", value) for number, value in ((2, _fraction(f)), (3, f.eps))
    )
    norm = [(1, name), (2, "BatchNorm"), (3, f"{name}_in"), (4, name)]
    scale = [(1, scale_name(name)), (2, "Scale"), (3, name), (4, name)]
    gamma, beta, *_ = f.filled()
    made = []
    for texts, blobs, rest in (
        (norm, _averages(f), field(139, settings)),
        (scale, [gamma, beta], field(142, b"\x20\x01")),  # ScaleParameter{bias_term = 4}
    ):
        head = b"".join(field(number, text.encode()) for number, text in texts)
        made.append(field(_LAYER, head + b"".join(field(7, _blob(blob)) for blob in blobs) + rest))
    return b"".join(made)


def into(template: Path, pairs: Mapping[str, ForeignBatchNorm]) -> bytes:
    """The bytes of a whole model, with the blobs of the layers named in ``pairs`` replaced; all else stays as it is."""
    content = template.read_bytes()
    layers = layers_of(content) or []
    blobs: dict[str, list[Array]] = {}
    for i, layer in enumerate(layers):
        if layer.kind != "BatchNorm" or layer.name not in pairs:
            continue
        f = pairs[layer.name]
        blobs[layer.name] = _averages(f)
        behind = _behind(layers, i)
        if behind is None and (f.gamma is not None or f.beta is not None):
            raise InputError(f"{template}: no Scale lies behind {layer.name!r}, and layer {f.name!r} has gamma or beta")
        if behind is not None:
            gamma, beta, *_ = f.filled()
            own = [beta] if behind.kind == "Bias" else [gamma, beta][: len(behind.blobs)]
            if behind.kind == "Bias" and f.gamma is not None:
                raise InputError(f"{template}: {behind.name!r} takes beta alone, and layer {f.name!r} has gamma")
            blobs[behind.name] = own
    made, index = [], 0
    for number, value, whole in spans(content):
        if number != _LAYER:
            made.append(whole)
            continue
        name, index = layers[index].name, index + 1
        kept = b"".join(part for inner, _, part in spans(value) if inner != 7 or name not in blobs)
        made.append(field(_LAYER, kept + b"".join(field(7, _blob(blob)) for blob in blobs.get(name, ()))))
    return b"".join(made)


def _averages(f: ForeignBatchNorm) -> list[Array]:
    """Sums of means and variances, and their factor 1 + decay + ... + decay^(t - 1), which is t where decay is 1."""
    cumulative = f.running == "cumulative"
    factor = float(f.batches or 0) if cumulative else (1 - f.decay ** f.counter()) / (1 - f.decay)
    return [f.mean * factor, f.var * factor, np.asarray([factor])]


def _fraction(f: ForeignBatchNorm) -> float:
    return 1.0 if f.running == "cumulative" else f.decay


def _blob(vector: Array) -> bytes:
    """BlobProto{data = 5, packed; shape = 7 {dim = 1, packed}}."""
    return field(5, np.ravel(vector).astype("<f4").tobytes()) + field(7, field(1, varint(vector.size)))


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
