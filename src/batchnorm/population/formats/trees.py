"""Nested states of JAX's libraries: Flax linen and nnx, as Python objects or files of `flax.serialization`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from batchnorm.errors import DataError, InputError, MissingDependencyError
from batchnorm.population.formats.conventions import CONVENTIONS, Names
from batchnorm.population.formats.keras import bfloat16, natural
from batchnorm.population.formats.records import Array, Checkpoint, ForeignBatchNorm


def array(value: Any) -> Array:
    """An array of any library in NumPy; bfloat16 as float32."""
    for method in ("get_value", "detach", "asnumpy", "numpy"):  # of nnx, torch, MindSpore, Paddle and Jittor
        if hasattr(value, method) and not isinstance(value, np.ndarray):
            value = value.float() if method == "detach" and "bfloat16" in str(value.dtype) else value
            value = value.cpu() if method == "numpy" and hasattr(value, "cpu") else value
            value = getattr(value, method)()
    if "bfloat16" in str(getattr(value, "dtype", "")):
        return np.asarray(value.astype(np.float32))
    made = np.asarray(value)
    return bfloat16(made) if made.dtype == np.dtype("V2") else made


def flat(tree: Mapping[Any, Any], path: str = "") -> dict[str, Any]:
    """The leaves of a nested mapping by their path; ``{"value": leaf}``, as orbax restores variables, is a leaf."""
    found: dict[str, Any] = {}
    for key, child in tree.items():
        at = f"{path}/{key}" if path else str(key)
        if isinstance(child, Mapping) and set(child) == {"value"} and not isinstance(child["value"], Mapping):
            child = child["value"]
        if isinstance(child, Mapping):
            found |= flat(child, at)
        elif isinstance(child, (list, tuple)):
            found |= flat(dict(enumerate(child)), at)
        elif child is not None:
            found[at] = child
    return found


def owners(leaves: Iterable[str], names: Names, separator: str = "/") -> list[str]:
    """The paths that have a mean and a variance, sorted by their numbers."""
    keys = {tuple(leaf.rpartition(separator)[::2]) for leaf in leaves}
    found = {owner for owner, last in keys if last == names.mean and (owner, names.var) in keys}
    return sorted(found, key=natural)


def is_state(value: Any) -> bool:
    """Whether it is a tree, or a TrainState, that this module reads."""
    return isinstance(value, Mapping) or (hasattr(value, "params") and hasattr(value, "batch_stats"))


def read_flax(tree: Any) -> Checkpoint:
    """The batch normalizations of linen variables, of a TrainState, or of an nnx state."""
    if not isinstance(tree, Mapping):
        tree = {"params": tree.params, "batch_stats": tree.batch_stats}
    variables = _with_batch_stats(tree)
    if variables is None:
        return _merged(tree)
    statistics, affine = flat(variables["batch_stats"]), flat(variables.get("params", {}))
    names = CONVENTIONS["flax"].names
    found = [_layer(path, statistics, affine, "flax") for path in owners(statistics, names)]
    if not found:
        raise DataError("load_flax: batch_stats hold no batch normalization")
    return Checkpoint("flax", "variables of Flax linen", tuple(found), _numbered(found), _NOTE)


_NOTE = ("Flax does not save momentum and epsilon; its defaults 0.99 and 1e-5 are taken",)


def _with_batch_stats(tree: Mapping[Any, Any]) -> Mapping[Any, Any] | None:
    """The mapping that holds batch_stats: the tree itself, or one inside (a TrainState in a dictionary)."""
    if isinstance(tree.get("batch_stats"), Mapping):
        return tree
    inside = [v for v in tree.values() if isinstance(v, Mapping)]
    found = (_with_batch_stats(each) for each in inside)
    return next((each for each in found if each is not None), None)


def _merged(tree: Mapping[Any, Any]) -> Checkpoint:
    """An nnx state: scale, bias, mean and var beside each other."""
    leaves = flat(tree)
    found = [_layer(path, leaves, leaves, "nnx") for path in owners(leaves, CONVENTIONS["nnx"].names)]
    if not found:
        raise DataError(
            f"load_flax: got variables {sorted(map(str, tree))}; expected 'params' and 'batch_stats', or an nnx state "
            "with 'mean' and 'var'"
        )
    return Checkpoint("nnx", "state of Flax nnx", tuple(found), _numbered(found), _NOTE)


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


def _numbered(found: list[ForeignBatchNorm]) -> bool:
    """Whether all are numbered layers of one module, so that their names tell their order."""
    if len(found) < 2:
        return True
    stems = {re.sub(r"\d+$", "", f.name) for f in found}
    return len(stems) == 1 and all(re.search(r"\d$", f.name) for f in found)


# Files of flax.serialization


def read_msgpack(path: Path) -> Any:
    """The tree of a file of `flax.serialization.to_bytes`.

    Extension 1 is an array, packed as (shape, dtype, bytes), 2 a complex number, 3 a number of NumPy, packed as 1.
    """
    try:
        import msgpack  # type: ignore[import-untyped]
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
    if (path / "_METADATA").exists() or (path / "_CHECKPOINT_METADATA").exists() or any(path.glob("*/_METADATA")):
        raise InputError(
            f"{path} is a checkpoint of orbax, which needs JAX to be read. Restore it there, "
            "tree = orbax.checkpoint.StandardCheckpointer().restore(path), and pass the tree, or write it with "
            "flax.serialization.to_bytes(tree) and pass that file"
        )
    if (path / "saved_model.pb").exists():
        raise InputError(
            f"{path} is a SavedModel of TensorFlow. Load it there and write model.save('model.keras') or "
            "model.save_weights('model.weights.h5'), and pass that file"
        )
    raise InputError(f"{path} is a folder; expected a file")
