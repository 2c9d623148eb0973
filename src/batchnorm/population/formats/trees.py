"""Nested states of JAX's libraries: Flax linen and nnx, as Python objects or files of `flax.serialization`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from batchnorm.errors import DataError, InputError, MissingDependencyError
from batchnorm.population.formats.conventions import CONVENTIONS
from batchnorm.population.formats.records import Array, Checkpoint, ForeignBatchNorm
from batchnorm.population.formats.values import array, bfloat16, flat, natural, nested, numbered, owners


def of_module(value: Any) -> Any:
    """The state of a module of nnx; any other value as it is."""
    if not any(kind.__module__.startswith("flax.nnx") and kind.__name__ == "Module" for kind in type(value).__mro__):
        return value
    return sys.modules["flax.nnx"].state(value)


def is_state(value: Any) -> bool:
    """Whether it is a TrainState: an object whose fields are parameters and, in one of the others, batch statistics."""
    return hasattr(value, "params") and (hasattr(value, "batch_stats") or is_dataclass(value))


def _fields(state: Any) -> dict[str, Any]:
    names = [each.name for each in fields(state)] if is_dataclass(state) else ["params", "batch_stats"]
    return {name: getattr(state, name) for name in names}


def of_split(parts: Sequence[Any]) -> Mapping[Any, Any] | None:
    """What a model was split into, as one mapping; None where it is something else.

    `nnx.split` gives a graph and states whose paths are those of one model; of linen people keep the pair of params and
    batch_stats.
    """
    states = [part for part in parts if isinstance(part, Mapping)]
    of_nnx = any(type(part).__module__.startswith("flax.nnx") for part in parts)
    if of_nnx and states:
        return nested({path: value for state in states for path, value in flat(state).items()})
    if len(states) == len(parts) == 2 and owners(flat(_plain(states[1])), CONVENTIONS["flax"].names):
        return {"params": _plain(states[0]), "batch_stats": _plain(states[1])}
    return None


def read(tree: Any) -> Checkpoint | None:
    """The batch normalizations of linen variables, of a TrainState, or of an nnx state; None where it is none.

    A tree that holds several models, such as one and its moving average, names each layer with the model's path.
    """
    tree = _plain(tree)
    models = list(_with_batch_stats(tree, {}, ""))
    if not models:
        return _merged(tree)
    names, layers = CONVENTIONS["flax"].names, []
    for place, params, batch_stats in models:
        statistics, affine = flat(batch_stats), flat(params)
        prefix = f"{place}/" if place and len(models) > 1 else ""
        read = [_layer(path, statistics, affine, "flax") for path in owners(statistics, names)]
        layers += [replace(f, name=prefix + f.name) for f in read]
    return Checkpoint("flax", "variables of Flax linen", tuple(layers), numbered([f.name for f in layers]), _NOTE)


_NOTE = ("Flax does not save momentum and epsilon; its defaults 0.99 and 1e-5 are taken",)


def _plain(tree: Any) -> Mapping[Any, Any]:
    """A nested mapping: of the fields of an object, or of a flat one, as `flax.traverse_util.flatten_dict` makes it."""
    if not isinstance(tree, Mapping):
        return _fields(tree)
    if tree and all(isinstance(key, tuple) for key in tree):
        return nested({"/".join(map(str, key)): value for key, value in tree.items()})
    if any(str(key).startswith(("batch_stats/", "batch_stats.")) for key in tree):
        return nested({str(key): value for key, value in tree.items()})
    return tree


def _with_batch_stats(tree: Mapping[Any, Any], params: Any, place: str) -> Iterator[tuple[str, Any, Any]]:
    """The path, params and batch_stats of each model, of the tree itself or of those inside, such as a TrainState.

    batch_stats may lie deeper than params, as in a TrainState with a field for the state of the model.
    """
    params = tree.get("params", params)
    if isinstance(tree.get("batch_stats"), Mapping):
        yield place, params if isinstance(params, Mapping) else {}, tree["batch_stats"]
        return
    for key, value in tree.items():
        each = _fields(value) if is_state(value) else value
        if isinstance(each, Mapping):
            yield from _with_batch_stats(each, params, f"{place}/{key}" if place else str(key))


def _merged(tree: Mapping[Any, Any]) -> Checkpoint | None:
    """An nnx state: scale, bias, mean and var beside each other."""
    leaves = flat(tree)
    found = [_layer(path, leaves, leaves, "nnx") for path in owners(leaves, CONVENTIONS["nnx"].names)]
    if not found:
        return None
    return Checkpoint("nnx", "state of Flax nnx", tuple(found), numbered([f.name for f in found]), _NOTE)


def _layer(path: str, statistics: Mapping[str, Any], affine: Mapping[str, Any], framework: str) -> ForeignBatchNorm:
    row = CONVENTIONS[framework]

    def vector(leaves: Mapping[str, Any], name: str) -> Array | None:
        key = f"{path}/{name}" if path else name
        return array(leaves[key]) if key in leaves else None

    mean, var = vector(statistics, row.names.mean), vector(statistics, row.names.var)
    gamma, beta = vector(affine, row.names.gamma), vector(affine, row.names.beta)
    assert mean is not None
    assert var is not None
    assert row.decay is not None
    return ForeignBatchNorm(path, mean, var, gamma, beta, row.decay, row.eps, row.variance)


# Files of flax.serialization, and folders

WRITE_KERAS = (
    "Load it there and write model.save('model.keras') or model.save_weights('model.weights.h5'), and pass that file"
)


def read_msgpack(path: Path) -> Any:
    """The tree of a file of `flax.serialization.to_bytes`.

    Extension 1 is an array, packed as (shape, dtype, bytes), 2 a complex number, 3 a number of NumPy, packed as 1.
    """
    try:
        import msgpack
    except ImportError as error:
        raise MissingDependencyError("load_flax: files need msgpack; pip install msgpack, or pass a dict") from error

    def unpack(code: int, data: bytes) -> Any:
        if code == 2:
            return complex(*msgpack.unpackb(data))
        if code not in (1, 3):
            raise ValueError(f"extension {code} is no array")
        shape, dtype, content = msgpack.unpackb(data, raw=True)
        if dtype == b"bfloat16":
            return bfloat16(np.frombuffer(content, "V2")).reshape(shape)
        return np.frombuffer(content, np.dtype(dtype.decode())).reshape(shape)

    try:
        tree = msgpack.unpackb(path.read_bytes(), ext_hook=unpack, raw=False, strict_map_key=False)
    except (OSError, ValueError, TypeError, msgpack.UnpackException) as error:
        raise DataError(f"load_flax: {path} is no file of flax.serialization: {error!r}") from error
    if not isinstance(tree, Mapping):
        raise DataError(f"load_flax: {path} holds a {type(tree).__name__}; expected a nested dictionary")
    return _joined(tree)


def _joined(tree: Any) -> Any:
    """The tree with arrays whole that Flax cut into chunks, as it does from 1 GiB on."""
    if not isinstance(tree, Mapping):
        return tree
    if "__msgpack_chunked_array__" in tree:
        shape = [tree["shape"][str(i)] for i in range(len(tree["shape"]))]
        return np.concatenate([tree["chunks"][str(i)] for i in range(len(tree["chunks"]))]).reshape(shape)
    return {key: _joined(value) for key, value in tree.items()}


def refuse_folder(path: Path) -> None:
    """Raises for a folder, with what to do instead."""
    if (path / "saved_model.pb").exists():
        raise InputError(
            f"{path} is a SavedModel of TensorFlow. {WRITE_KERAS}. What model.export wrote is no such model: there, "
            "with s = tf.saved_model.load(path), numpy.savez('model.npz', **{v.name: v.numpy() for v in s.variables})"
        )
    inside = sorted((each.name for each in path.iterdir() if each.is_file()), key=natural)
    if any(name.endswith(".index") for name in inside):
        raise InputError(f"{path} holds a checkpoint of TensorFlow. {WRITE_KERAS}")
    raise InputError(f"{path} is a folder; expected a file" + (f", such as {inside[-1]}" if inside else ""))
