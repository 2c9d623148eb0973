"""Batch normalization in the checkpoints of Keras and Flax: read into our layers, and written back.

Both keep the *biased* variance and call the share of the *old* statistics momentum. Only batch normalization is
translated; nothing of Keras, TensorFlow, Flax or JAX is needed, and no pickle is read.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from batchnorm.errors import DataError, InputError, MissingDependencyError
from batchnorm.nn import modes
from batchnorm.nn.batch_norm import _BatchNorm

Net = TypeVar("Net", bound=nn.Module)

KERAS = {"decay": 0.99, "eps": 1e-3}
FLAX = {"decay": 0.99, "eps": 1e-5}
_KERAS_NAMES = ("gamma", "beta", "moving_mean", "moving_variance")


@dataclass(frozen=True)
class ForeignBatchNorm:
    """One batch normalization of another framework, in our words.

    gamma and beta are None where it has none (Keras' ``scale=False``, ``center=False``); ``var`` is *biased*;
    ``decay`` is the share of the old statistics.
    """

    name: str
    mean: np.ndarray[Any, Any]
    var: np.ndarray[Any, Any]
    gamma: np.ndarray[Any, Any] | None
    beta: np.ndarray[Any, Any] | None
    decay: float = KERAS["decay"]
    eps: float = KERAS["eps"]


def load_keras(
    net: Net,
    path: str | os.PathLike[str],
    *,
    layers: Mapping[str, str] | None = None,
    decay: float | None = None,
    eps: float | None = None,
) -> Net:
    """Load the batch normalizations of a Keras file into those of ``net``, in place.

    Statistics, gamma and beta are copied; ``momentum = 1 - Keras' momentum``, ``eps = Keras' epsilon`` and
    ``running_var_kind = "biased"``, so training goes on by Keras' convention. Layers of torch.nn become ours.

    Args:
        net: the network.
        path: a ``.keras`` archive, a ``.weights.h5`` of Keras 3, or an ``.h5`` of Keras 2 (a model or its weights).
        layers: our names to Keras' (the first column of `read_keras`). By default the layers are matched in order, if
            the file tells the order of its model and numbers and sizes agree.
        decay: Keras' ``momentum``, and
        eps: Keras' ``epsilon``, where the file holds weights alone; by default Keras' own 0.99 and 1e-3.

    Returns:
        The network.

    Raises:
        DataError: a file that holds no batch normalization or cannot be read.
        InputError: layers that do not match (numbers, names, sizes, gamma or beta on one side alone, a negative
            variance, values that are not finite); the network is then as it was.
        MissingDependencyError: h5py is not installed.
    """
    found = read_keras(path)
    found = [replace(f, decay=decay or f.decay, eps=f.eps if eps is None else eps) for f in found]
    return _load(net, found, layers, "load_keras", ordered=_in_model_order(found))


def load_flax(
    net: Net,
    variables: Mapping[str, Any] | str | os.PathLike[str],
    *,
    layers: Mapping[str, str] | None = None,
    decay: float = FLAX["decay"],
    eps: float = FLAX["eps"],
) -> Net:
    """Load the batch normalizations of Flax variables into those of ``net``, in place.

    As `load_keras`, from ``{"params": {... "scale", "bias"}, "batch_stats": {... "mean", "var"}}``.

    Args:
        net: the network.
        variables: the nested dict, with arrays of any library, or a file of ``flax.serialization.to_bytes``.
        layers: our names to Flax' paths, joined by "/". By default in order, which Flax' dicts tell only where all are
            numbered layers of one module (``BatchNorm_0``, ``BatchNorm_1``, ...) or all have different sizes.
        decay: ``momentum`` and
        eps: ``epsilon`` of the modules, which Flax does not save; by default Flax' own 0.99 and 1e-5.

    Raises:
        DataError: no batch normalization in the variables, or a file that cannot be read.
        InputError: as `load_keras`, or an order that cannot be told.
        MissingDependencyError: msgpack is not installed (for files).
    """
    tree = variables if isinstance(variables, Mapping) else _read_msgpack(Path(variables))
    found = [replace(f, decay=decay, eps=eps) for f in read_flax(tree)]
    return _load(net, found, layers, "load_flax", ordered=_numbered(found))


def to_keras(net: nn.Module) -> dict[str, list[np.ndarray[Any, Any]]]:
    """The batch normalizations of ``net``, each as the list that Keras' ``layer.set_weights`` takes.

    gamma, beta (where there are any), moving mean, moving variance; the variance is *biased* where the layer keeps it
    so (``running_var_kind``), else it is what torch keeps, *unbiased*. Pass ``momentum=layer.decay, epsilon=layer.eps``
    to Keras' constructor.
    """
    return {name: [a for a in (f.gamma, f.beta, f.mean, f.var) if a is not None] for name, f in _ours(net, "to_keras")}


def save_keras(net: nn.Module, path: str | os.PathLike[str], *, layers: Mapping[str, str] | None = None) -> None:
    """Write the batch normalizations of ``net`` as a Keras 2 ``.h5`` of weights, for ``load_weights(by_name=True)``.

    Args:
        net: the network.
        path: of the file; it is written beside and moved.
        layers: our names to Keras'; by default ours.

    Raises:
        InputError: no batch normalization, or names that ``net`` does not have.
        MissingDependencyError: h5py is not installed.
    """
    h5py = _h5py("save_keras")
    names = dict(layers or {})
    if unknown := names.keys() - {name for name, _ in _ours(net, "save_keras")}:
        raise InputError(f"save_keras: the network has no batch normalization {sorted(unknown)}")
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        found = [(names.get(name, name) or "batch_normalization", f) for name, f in _ours(net, "save_keras")]
        file.attrs["layer_names"] = [name.encode() for name, _ in found]
        for name, f in found:
            group = file.create_group(name.replace("/", "_"))
            arrays = {
                k: a for k, a in zip(_KERAS_NAMES, (f.gamma, f.beta, f.mean, f.var), strict=True) if a is not None
            }
            group.attrs["weight_names"] = [f"{name}/{key}:0".encode() for key in arrays]
            for key, array in arrays.items():
                group.create_dataset(f"{name}/{key}:0", data=array)
    _write(Path(path), buffer.getvalue())


def to_flax(net: nn.Module, *, layers: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The batch normalizations of ``net`` as Flax variables: ``{"params": ..., "batch_stats": ...}``, nested.

    Names of modules become nested keys; ``layers`` maps our names to Flax' paths, joined by "/". The variance is
    *biased* where the layer keeps it so, else what torch keeps. Flax takes ``momentum=layer.decay,
    epsilon=layer.eps`` in its constructor.
    """
    variables: dict[str, Any] = {"params": {}, "batch_stats": {}}
    for name, f in _ours(net, "to_flax"):
        path = (layers or {}).get(name, name.replace(".", "/") or "BatchNorm_0").split("/")
        for kind, entries in (
            ("params", {"scale": f.gamma, "bias": f.beta}),
            ("batch_stats", {"mean": f.mean, "var": f.var}),
        ):
            node = variables[kind]
            for key in path:
                node = node.setdefault(key, {})
            node.update({key: value for key, value in entries.items() if value is not None})
    return variables


# Reading


def read_keras(path: str | os.PathLike[str]) -> list[ForeignBatchNorm]:
    """The batch normalizations of a Keras file, in the order of its model."""
    path = Path(path)
    h5py = _h5py("load_keras")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                config = json.loads(archive.read("config.json"))
                weights = io.BytesIO(archive.read("model.weights.h5"))
            with h5py.File(weights, "r") as file:
                found = list(_keras3(file, config))
        else:
            with h5py.File(path, "r") as file:
                found = list(_keras3_weights(file) if "layers" in file else _keras2(file))
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"load_keras: {path} is no Keras file that can be read: {error!r}") from error
    if not found:
        raise DataError(f"load_keras: {path} holds no batch normalization")
    return found


def _keras3(file: Any, config: dict[str, Any]) -> Iterator[ForeignBatchNorm]:
    """Follows the model's config, whose layers lie under names that Keras makes of their classes, numbered."""
    for name, group, settings in _walk(file, config["config"], ""):
        options = {"gamma": settings.get("scale", True), "beta": settings.get("center", True)}
        keys = [key for key in _KERAS_NAMES if options.get(key, True)]
        arrays = {key: np.asarray(group["vars"][str(i)]) for i, key in enumerate(keys)}
        yield _of_keras(name, arrays, settings)


def _walk(group: Any, config: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    seen: dict[str, int] = {}
    for layer in config.get("layers", ()):
        kind, settings = layer["class_name"], layer["config"]
        key = _snake(kind)
        number = seen[key] = seen.get(key, -1) + 1
        stored = group.get("layers", {})
        place = stored.get(f"{key}_{number}" if number else key, stored.get(settings.get("name", key)))
        name = prefix + settings.get("name", key)
        if kind == "BatchNormalization" and place is not None:
            yield name, place, settings
        elif "layers" in settings and place is not None:
            yield from _walk(place, settings, name + "/")


def _snake(name: str) -> str:
    """Keras' `to_snake_case`."""
    name = re.sub(r"\W+", "", name)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


def _keras3_weights(file: Any) -> Iterator[ForeignBatchNorm]:
    """Weights without a config: what is called batch_normalization and holds four vectors."""
    groups: list[tuple[str, Any]] = []

    def visit(name: str, node: Any) -> None:
        parts = name.split("/")
        if parts[-1] == "vars" and re.fullmatch(r"batch_normalization(_\d+)?", parts[-2]) and len(node):
            groups.append((name.removesuffix("/vars"), node))

    file.visititems(visit)
    for name, group in sorted(groups, key=lambda pair: _natural(pair[0])):
        if len(group) != 4:
            raise ValueError(f"{name} holds {len(group)} vectors, which do not tell gamma from beta; use a .keras file")
        arrays = {key: np.asarray(group[str(i)]) for i, key in enumerate(_KERAS_NAMES)}
        yield _of_keras(name, arrays, {})


def _keras2(file: Any) -> Iterator[ForeignBatchNorm]:
    """A model or weights of Keras 2: groups in the order of the model, vectors with names."""
    weights = file.get("model_weights", file)
    config = json.loads(_text(file.attrs["model_config"])) if "model_config" in file.attrs else {}
    settings = {entry["config"].get("name"): entry["config"] for entry in _entries(config.get("config", {}))}
    for layer in map(_text, weights.attrs["layer_names"]):
        group = weights[layer.replace("/", "_") if layer not in weights else layer]
        parts: dict[str, dict[str, Any]] = {}
        for name in map(_text, group.attrs["weight_names"]):
            owner, _, key = name.split(":")[0].rpartition("/")
            parts.setdefault(owner or layer, {})[key] = np.asarray(group[name])
        for owner, arrays in parts.items():
            if "moving_mean" in arrays:
                own = settings.get(layer if len(parts) == 1 else owner.rpartition("/")[2], {})
                yield _of_keras(layer if len(parts) == 1 else owner, arrays, own)


def _entries(config: Any) -> Iterator[dict[str, Any]]:
    for entry in config if isinstance(config, list) else config.get("layers", ()):
        yield entry
        yield from _entries(entry["config"])


def _of_keras(name: str, arrays: dict[str, Any], settings: dict[str, Any]) -> ForeignBatchNorm:
    gamma, beta, mean, var = (arrays.get(key) for key in _KERAS_NAMES)
    assert mean is not None
    assert var is not None
    decay, eps = settings.get("momentum", KERAS["decay"]), settings.get("epsilon", KERAS["eps"])
    return ForeignBatchNorm(name, mean, var, gamma, beta, decay, eps)


def read_flax(variables: Mapping[str, Any]) -> list[ForeignBatchNorm]:
    """The batch normalizations of Flax variables, by their numbers."""
    if "batch_stats" not in variables:
        raise DataError(f"load_flax: got variables {list(variables)}; expected 'params' and 'batch_stats'")
    statistics = {path: node for path, node in _nodes(variables["batch_stats"]) if {"mean", "var"} <= node.keys()}
    affine = dict(_nodes(variables.get("params", {})))
    if not statistics:
        raise DataError("load_flax: batch_stats hold no batch normalization")
    found = []
    for path in sorted(statistics, key=_natural):
        node, own = statistics[path], affine.get(path, {})
        gamma, beta = (np.asarray(own[key]) if key in own else None for key in ("scale", "bias"))
        found.append(ForeignBatchNorm(path, np.asarray(node["mean"]), np.asarray(node["var"]), gamma, beta))
    return found


def _nodes(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield path, tree
    for key, child in tree.items():
        if isinstance(child, Mapping):
            yield from _nodes(child, f"{path}/{key}" if path else key)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts BatchNorm_2 before BatchNorm_10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _in_model_order(found: list[ForeignBatchNorm]) -> bool:
    """Weights of Keras 3 without a config, known by their paths, tell the order only within one container."""
    paths = [f.name for f in found if re.match(r"layers/|.*/layers/", f.name)]
    return len({re.sub(r"_\d+$", "", path) for path in paths}) <= 1


def _numbered(found: list[ForeignBatchNorm]) -> bool:
    """Whether all are the numbered layers of one module, so that their names tell their order."""
    stems = {re.sub(r"_\d+$", "", f.name) for f in found}
    return len(stems) == 1 and all(re.search(r"_\d+$", f.name) for f in found)


def _read_msgpack(path: Path) -> Any:
    """A file of flax.serialization: arrays are extension 1, packed as (shape, dtype, bytes)."""
    try:
        import msgpack  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingDependencyError("load_flax: files need msgpack; pip install msgpack, or pass a dict") from error

    def unpack(code: int, data: bytes) -> Any:
        if code != 1:
            raise ValueError(f"extension {code} is no array")
        shape, dtype, content = msgpack.unpackb(data, raw=True)
        return np.frombuffer(content, np.dtype(dtype.decode())).reshape(shape)

    try:
        return msgpack.unpackb(path.read_bytes(), ext_hook=unpack, raw=False, strict_map_key=False)
    except (OSError, ValueError, TypeError, msgpack.UnpackException) as error:
        raise DataError(f"load_flax: {path} is no file of flax.serialization: {error!r}") from error


# Matching and writing


def _load(net: Net, found: list[ForeignBatchNorm], names: Mapping[str, str] | None, verb: str, ordered: bool) -> Net:
    modes.check(net, verb)
    layers = {n: m for n, m in net.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    pairs = _by_name(layers, found, names, verb) if names is not None else _in_order(layers, found, verb, ordered)
    for name, foreign in pairs:
        _check(verb, name, layers[name], foreign)
    modes.set_mode(net)  # torch's layers become ours
    with torch.no_grad():
        for name, foreign in pairs:
            _copy(layers[name], foreign)
    return net


def _by_name(
    layers: Mapping[str, nn.Module], found: list[ForeignBatchNorm], names: Mapping[str, str], verb: str
) -> list[tuple[str, ForeignBatchNorm]]:
    by_name = {f.name: f for f in found}
    if unknown := names.keys() - layers.keys():
        raise InputError(f"{verb}: the network has no batch normalization {sorted(unknown)}, but {sorted(layers)}")
    if missing := set(names.values()) - by_name.keys():
        raise InputError(f"{verb}: the checkpoint has no batch normalization {sorted(missing)}, but {sorted(by_name)}")
    return [(ours, by_name[theirs]) for ours, theirs in names.items()]


def _in_order(
    layers: Mapping[str, nn.Module], found: list[ForeignBatchNorm], verb: str, ordered: bool
) -> list[tuple[str, ForeignBatchNorm]]:
    if len(layers) != len(found):
        raise InputError(
            f"{verb}: the network has {len(layers)} batch normalizations, the checkpoint {len(found)} "
            f"({[f.name for f in found]}); give layers={{ours: theirs}}"
        )
    if not ordered:
        sizes = {f.mean.size: f for f in found}
        if len(sizes) != len(found):
            raise InputError(
                f"{verb}: the names {[f.name for f in found]} do not tell their order in the network, nor do their "
                "sizes; give layers={ours: theirs}"
            )
        channels = [int(layer.running_mean.numel()) for layer in layers.values()]  # type: ignore[operator]
        found = [sizes.get(count, found[0]) for count in channels]
    return list(zip(layers, found, strict=True))


def _check(verb: str, name: str, layer: Any, foreign: ForeignBatchNorm) -> None:
    what = f"{verb}: layer {name!r} and {foreign.name!r} do not match: "
    if layer.running_mean is None:
        raise InputError(what + "the layer keeps no running statistics")
    expected: Iterable[tuple[str, Any, Any]] = (
        ("running_mean", layer.running_mean, foreign.mean),
        ("running_var", layer.running_var, foreign.var),
        ("weight", layer.weight, foreign.gamma),
        ("bias", layer.bias, foreign.beta),
    )
    for key, ours, theirs in expected:
        if (ours is None) != (theirs is None):
            raise InputError(f"{what}{key} is {'missing' if ours is None else 'there'} in ours alone")
        if ours is None:
            continue
        if tuple(ours.shape) != theirs.shape:
            raise InputError(f"{what}{key} has shape {tuple(ours.shape)} in ours, {theirs.shape} in the checkpoint")
        if not np.isfinite(theirs).all() or (key == "running_var" and (theirs < 0).any()):
            raise InputError(f"{what}its {key} has values that are negative or not finite")
    if not (0 <= foreign.decay <= 1 and 0 <= foreign.eps < math.inf):
        raise InputError(f"{what}momentum {foreign.decay} or epsilon {foreign.eps} is out of range")


def _copy(layer: nn.Module, foreign: ForeignBatchNorm) -> None:
    assert isinstance(layer, _BatchNorm)
    for ours, theirs in (
        (layer.running_mean, foreign.mean),
        (layer.running_var, foreign.var),
        (layer.weight, foreign.gamma),
        (layer.bias, foreign.beta),
    ):
        if ours is not None:
            ours.copy_(torch.from_numpy(np.array(theirs, dtype=np.float64)))
    layer.momentum, layer.eps, layer.running_var_kind = 1 - foreign.decay, foreign.eps, "biased"


def _ours(net: nn.Module, verb: str) -> list[tuple[str, ForeignBatchNorm]]:
    def array(value: Any) -> Any:
        return None if value is None else value.detach().cpu().float().numpy().copy()

    for name, layer in net.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and getattr(layer.running_mean, "ndim", 1) > 1:
            raise InputError(
                f"{verb}: layer {name!r} keeps {tuple(layer.running_mean.shape)} statistics, those of domains or time "  # type: ignore[union-attr]
                "steps, and other frameworks one set; bn.convert(net, domains=0) keeps those of the domain in use"
            )
    found = [
        (name, ForeignBatchNorm(name, array(m.running_mean), array(m.running_var), array(m.weight), array(m.bias)))
        for name, m in net.named_modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
    ]
    if not found:
        raise InputError(f"{verb}: the network has no batch normalization with running statistics")
    return found


def _h5py(verb: str) -> Any:
    try:
        import h5py
    except ImportError as error:
        raise MissingDependencyError(f"{verb}: Keras files need h5py; pip install h5py") from error
    return h5py


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _write(path: Path, content: bytes) -> None:
    """Writes beside and moves, so that no half file is left."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    os.replace(file.name, path)
