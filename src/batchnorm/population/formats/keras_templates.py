"""Batch normalizations written into a file of a whole model that Keras wrote: vectors, and what its config holds."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from batchnorm.errors import InputError
from batchnorm.population.formats import keras
from batchnorm.population.formats.records import Array, ForeignBatchNorm

_WEIGHTS, _CONFIG = "model.weights.h5", "config.json"


def into(template: Path, pairs: Mapping[str, ForeignBatchNorm]) -> bytes:
    """The bytes of the template with other vectors and settings of the layers that ``pairs`` names.

    An archive and an ``.h5`` of a model hold momentum, epsilon and ``trainable``, weights alone do not.
    """
    content = template.read_bytes()
    if content[:1] == b"{":
        raise InputError(f"{template} is the index of shards; write the weights into one .weights.h5, and give that")
    return _archive(content, pairs) if zipfile.is_zipfile(template) else _hdf5(content, pairs)


def _archive(content: bytes, pairs: Mapping[str, ForeignBatchNorm]) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(info, archive.read(info)) for info in archive.infolist()]
    by_name = {info.filename: data for info, data in members}
    config, weights = json.loads(by_name[_CONFIG]), io.BytesIO(by_name[_WEIGHTS])
    with keras.h5py("save_statistics").File(weights, "r+") as file:
        groups = keras.groups_of(file)
        inside = set()
        for name, group, settings in keras.configured(groups, config):
            inside.add(group.path)
            if name in pairs:
                _put(
                    file, dict(zip(keras.kept(settings), _paths(group), strict=False)), pairs[name], _paths(group)[-3:]
                )
                _set(settings, pairs[name])
        _put_groups(file, [group for group in groups if group.path not in inside], pairs)
    made = {**by_name, _CONFIG: json.dumps(config).encode(), _WEIGHTS: weights.getvalue()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for info, _ in members:
            archive.writestr(info, made[info.filename])
    return buffer.getvalue()


def _hdf5(content: bytes, pairs: Mapping[str, ForeignBatchNorm]) -> bytes:
    buffer = io.BytesIO(content)
    with keras.h5py("save_statistics").File(buffer, "r+") as file:
        if not keras.names_layers(file):
            _put_groups(file, keras.groups_of(file), pairs)
            return _flushed(file, buffer)
        config, _ = keras.config_of(file)
        for name, _, paths, settings in keras.named(file, config):
            if name in pairs:
                _put(file, paths, pairs[name], [paths[key] for key in keras.RENORM if key in paths])
                _set(settings, pairs[name])
        if config:
            file.attrs["model_config"] = json.dumps(config).encode()
        return _flushed(file, buffer)


def _flushed(file: Any, buffer: io.BytesIO) -> bytes:
    file.close()
    return buffer.getvalue()


def _paths(group: keras.Group) -> list[str]:
    return [f"{group.at}/{i}" for i in range(len(group.arrays))]


def _put_groups(file: Any, groups: list[keras.Group], pairs: Mapping[str, ForeignBatchNorm]) -> None:
    """Into groups of which the file says the number of vectors alone."""
    for group in groups:
        if group.path not in pairs:
            continue
        f, paths = pairs[group.path], _paths(group)
        own = paths[:-3] if len(paths) > 4 else paths
        trained = [key for key, value in (("gamma", f.gamma), ("beta", f.beta)) if value is not None]
        keys = ["gamma", "beta"] if len(own) == 4 else trained[: len(own) - 2]
        _put(file, dict(zip([*keys, *keras.NAMES[2:]], own, strict=True)), f, paths[len(own) :])


def _put(file: Any, paths: Mapping[str, str], f: ForeignBatchNorm, further: list[str]) -> None:
    """The vectors at their places; renormalization goes on from the same mean and standard deviation."""
    values: dict[str, Any] = dict(zip(keras.NAMES, (f.gamma, f.beta, f.mean, f.var), strict=True))
    for key in ("gamma", "beta"):
        if (key in paths) != (values[key] is not None):
            side = "the file's layer" if key in paths else f"layer {f.name!r}"
            raise InputError(
                f"save_statistics: {key} is in {side} alone, of {f.name!r} and {sorted(paths.values())[0]}"
            )
    moved = any(
        not np.array_equal(keras.array_of(file[paths[key]]).reshape(-1).astype(np.float32), values[key])
        for key in keras.NAMES[2:]
    )
    for key, path in paths.items():
        if key in values:
            _write(file[path], values[key])
    if moved and f.obstacle == keras.RENORM_RULE:
        stddev = np.sqrt(f.var + f.eps)
        for path, value in zip(further, (stddev, f.mean, stddev), strict=True):
            _write(file[path], value)


def _write(node: Any, value: Array | None) -> None:
    """In the type of the file: bfloat16 lies in it as two bytes, rounded to even."""
    made = np.asarray(value).reshape(node.shape)
    if node.dtype.str == "|V2":
        bits = made.astype("<f4").view("<u4").astype(np.uint64)
        node[...] = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").view("V2")
    else:
        node[...] = made.astype(node.dtype)


def _set(settings: Mapping[str, Any], f: ForeignBatchNorm) -> None:
    """Momentum, epsilon and ``trainable`` in the layer's config; a layer that is frozen for its rule keeps the last."""
    if not settings:
        return
    config = settings[keras.CONFIG]
    for key, value in (("momentum", round(f.decay, 12)), ("epsilon", f.eps)):
        if value == value and abs(float(settings.get(key, -1)) - value) > 1e-12:
            config[key] = value
    if f.obstacle is None and bool(settings.get("trainable", True)) == f.frozen:
        config["trainable"] = not f.frozen
