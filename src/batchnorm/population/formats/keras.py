"""Files of Keras: archives, weights and HDF5 models of Keras 3 and of Keras 2 (tf_keras, TensorFlow before 2.16).

Keras 3 keeps the *biased* variance everywhere. Keras 2 keeps the *unbiased* one in its fused layer, which it takes for
inputs of four and five axes, and the biased one elsewhere (tf_keras 2.21.0, `batch_normalization.py`).
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from batchnorm.errors import DataError, MissingDependencyError
from batchnorm.population.formats.records import Array, Checkpoint, ForeignBatchNorm
from batchnorm.population.formats.values import bfloat16, natural

NAMES = ("gamma", "beta", "moving_mean", "moving_variance")
RENORM = ("moving_stddev", "renorm_mean", "renorm_stddev")
DECAY, EPS = 0.99, 1e-3
_STEPS = "inside TimeDistributed"  # marks among the settings of a layer: this, and the config that they are of
CONFIG = "config"
_AUTOMATIC = re.compile(r"batch_normalization(_\d+)?")


@dataclass(frozen=True)
class Group:
    """The variables of one layer in a file of weights: ``path/vars/0``, ``path/vars/1``, ..."""

    path: str
    label: str | None  # the layer's own name, which Keras 3 writes since 3.6
    arrays: tuple[Array, ...]
    at: str = ""  # the group's own name


# Opening


def read(path: Path) -> Checkpoint:
    """The batch normalizations of a Keras file: ``.keras``, ``.weights.h5``, ``.weights.json`` (shards) or ``.h5``."""
    try:
        if zipfile.is_zipfile(path):
            return _archive(path)
        if path.read_bytes()[:1] == b"{":
            return _of_weights(_shards(path), "3", "sharded weights")
        with h5py("load_keras").File(path, "r") as file:
            if names_layers(file):
                return _named(file)
            groups = groups_of(file)
        if not groups:
            raise ValueError("it is no file of weights, and names no layers")
        if all(group.label is None for group in groups):
            return _of_weights(groups, "", ".weights.h5")
        return _of_weights(groups, "3", ".weights.h5")
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is no Keras file that can be read: {error}") from error


def h5py(verb: str) -> Any:
    """The package h5py, which reads and writes HDF5."""
    try:
        import h5py
    except ImportError as error:
        raise MissingDependencyError(f"{verb}: Keras files need h5py; pip install h5py") from error
    return h5py


def _archive(path: Path) -> Checkpoint:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        config = json.loads(archive.read("config.json"))
        metadata = json.loads(archive.read("metadata.json")) if "metadata.json" in names else {}
        if "model.weights.npz" in names:
            raise ValueError(
                "its weights are an .npz of pickled dictionaries, which are not read (nor does Keras 3.15 read them); "
                "save the model with weights_format='h5'"
            )
        content = io.BytesIO(archive.read("model.weights.h5"))
    with h5py("load_keras").File(content, "r") as file:
        groups = groups_of(file)
    return _configured(groups, config, str(metadata.get("keras_version", "3")))


def names_layers(file: Any) -> bool:
    attributes = file.get("model_weights", file).attrs
    return "layer_names" in attributes or "layer_names0" in attributes


def _strings(group: Any, key: str) -> list[str]:
    """A list among the attributes of a group, which Keras cuts into ``key0``, ``key1``, ... where it passes 63 KB."""
    cut = sorted((name for name in group.attrs if re.fullmatch(rf"{key}\d+", name)), key=natural)
    pieces = [key] if key in group.attrs else cut
    return [text(each) for piece in pieces for each in group.attrs[piece]]


def groups_of(file: Any) -> list[Group]:
    """All groups ``vars`` of a file of weights, that of the root included."""
    found: list[Group] = []

    def visit(name: str, node: Any) -> None:
        if name.rpartition("/")[2] != "vars" or not hasattr(node, "keys"):
            return
        label = node.attrs.get("name")
        keys = sorted((key for key in node if key.isdigit()), key=int)
        path = name.rpartition("/")[0].replace("_layer_checkpoint_dependencies", "layers")  # as Keras 2.13 had it
        arrays = tuple(array_of(node[key]) for key in keys)
        found.append(Group(path, None if label is None else text(label), arrays, name))

    file.visititems(visit)
    return found


def _shards(path: Path) -> list[Group]:
    """The groups of all files that a ``.weights.json`` names; the variables of one layer may lie in two of them."""
    parts: dict[str, tuple[str | None, dict[int, Array]]] = {}
    index = json.loads(path.read_text())["weight_map"]
    for name in sorted({file for files in index.values() for file in files}):
        if Path(name).name != name:
            raise ValueError(f"the shard {name!r} lies in another folder")
        with h5py("load_keras").File(path.parent / name, "r") as file:

            def visit(where: str, node: Any) -> None:
                parent, _, key = where.rpartition("/")
                if parent.rpartition("/")[2] != "vars" or not key.isdigit():
                    return
                label = node.parent.attrs.get("name")
                owner = parts.setdefault(parent.rpartition("/")[0], (None if label is None else text(label), {}))
                owner[1][int(key)] = array_of(node)

            file.visititems(visit)
    return [Group(at, label, tuple(array for _, array in sorted(v.items()))) for at, (label, v) in parts.items()]


def array_of(node: Any) -> Array:
    value = np.asarray(node)
    if text(node.attrs.get("dtype", "")) == "bfloat16" or value.dtype.str == "|V2":  # an .h5 has no attribute
        return bfloat16(value)
    return value


def text(value: Any) -> str:
    """A string of an HDF5 attribute."""
    return value.decode() if isinstance(value, bytes) else str(value)


# Archives, which have a config


def _configured(groups: list[Group], config: dict[str, Any], version: str) -> Checkpoint:
    framework = _framework(version)
    found = []
    for name, group, settings in configured(groups, config):
        keys = kept(settings)
        if len(group.arrays) < len(keys):
            raise ValueError(f"{name} has {len(group.arrays)} vectors; expected {', '.join(keys)}")
        layer = _layer(name, dict(zip(keys, group.arrays, strict=False)), settings, version)
        by_step = framework == "keras3" and settings.get(_STEPS, False)
        obstacle = layer.obstacle or (BY_STEP if by_step else None)
        found.append(replace(layer, aliases=(group.path, *filter(None, [group.label])), obstacle=obstacle))
    seen = {f.aliases[0] for f in found}
    rest = [
        replace(layer, variance=_variance({}, version, layer.obstacle))
        for layer in _recognized(groups)
        if layer.name not in seen
    ]
    notes = (_NOT_IN_CONFIG.format(", ".join(f.name for f in rest)),) if rest else ()
    ordered = not rest or (not found and _tell_order(rest))
    return Checkpoint(framework, f".keras archive of Keras {version}", (*found, *rest), ordered, notes)


def configured(groups: list[Group], config: dict[str, Any]) -> Iterator[tuple[str, Group, dict[str, Any]]]:
    """The name, variables and settings of each batch normalization of a model's config, once where it is shared.

    Its layers lie under the names of their attributes or, in lists, their classes.
    """
    by_path, by_label = {g.path: g for g in groups}, {g.label: g for g in groups if g.label}
    seen = set()
    for path, name, settings in _walk(_entries(config["config"]), "", ""):
        group = by_path.get(path) or by_label.get(str(settings.get("name")))
        if group is None:
            stem = path.rpartition("/")[0]
            group = by_path.get(f"{stem}/{settings.get('name')}")
        if group is None:
            raise ValueError(f"the config has a batch normalization {name!r}, but there are no weights at {path}")
        if group.path not in seen:
            seen.add(group.path)
            yield name, group, settings


def kept(settings: Mapping[str, Any]) -> list[str]:
    """The names of the vectors that a layer of these settings has, in their order."""
    options = {"gamma": settings.get("scale", True), "beta": settings.get("center", True)}
    return [key for key in NAMES if options.get(key, True)]


_NOT_IN_CONFIG = "the model's config does not have {}; for momentum and epsilon Keras' 0.99 and 1e-3 are taken"


def _framework(version: str) -> str:
    return "keras2" if version.split(".")[0] in ("1", "2") else "keras3"


def _walk(config: Mapping[str, Any], path: str, name: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The batch normalizations of a config: where their weights lie, their name, their settings."""
    for key, value in config.items():
        at = f"{path}/{key}" if path else key
        if _is_layer(value):
            yield from _visit(value, at, name)
        elif isinstance(value, list):
            seen: dict[str, int] = {}
            for each in filter(_is_layer, value):
                kind = _snake(each["class_name"])
                number = seen[kind] = seen.get(kind, -1) + 1
                yield from _visit(each, f"{at}/{kind}_{number}" if number else f"{at}/{kind}", name)


def _visit(layer: dict[str, Any], path: str, name: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    settings = layer["config"]
    own = name + str(settings.get("name", path.rpartition("/")[2]))
    kind = layer["class_name"].rpartition(">")[2]
    if kind == "BatchNormalization" or "moving_variance_initializer" in settings:
        synchronized = settings.get("synchronized") or kind.startswith("Sync")
        yield path, own, {**settings, "synchronized": synchronized, CONFIG: settings}
    else:
        for at, inner, found in _walk(settings, path, own + "/"):
            yield at, inner, {**found, _STEPS: found.get(_STEPS, False) or kind == "TimeDistributed"}


def _entries(config: Any) -> Mapping[str, Any]:
    """A config as a mapping: that of Sequential was a list before Keras 2.2.3."""
    return {"layers": config} if isinstance(config, list) else config


def _is_layer(value: Any) -> bool:
    return isinstance(value, dict) and "class_name" in value and isinstance(value.get("config"), dict)


def _snake(name: str) -> str:
    """Keras' `to_snake_case`."""
    name = re.sub(r"\W+", "", name)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


# Weights alone


_UNSAVED = (
    "a file of weights does not hold momentum and epsilon; Keras' 0.99 and 1e-3 are taken",
    "it does not say which layers are frozen (trainable=False); frozen=True loads them so",
)


def _of_weights(groups: list[Group], version: str, kind: str) -> Checkpoint:
    found = _recognized(groups)
    notes = list(_UNSAVED)
    inside = [f.name for f in found if f.obstacle is None and re.search(r"(^|/)layer(/|$)", f.name)]
    if inside:
        notes.append(f"if TimeDistributed of Keras 3 wraps {', '.join(inside)}, its training differs from that here")
    if not version:
        notes.append("it does not say whether Keras 3 before 3.6 or Keras 2 wrote it; Keras 3 is assumed")
    doubtful = [layer for group in _sorted(groups) if _doubtful(group) for layer in _as_norm(group)]
    return Checkpoint("keras3", kind, tuple(found), _tell_order(found), tuple(notes), tuple(doubtful))


def _recognized(groups: list[Group]) -> list[ForeignBatchNorm]:
    """The groups that can be nothing else than a batch normalization, in the order of creation where it is told."""
    found = [layer for group in _sorted(groups) if not _doubtful(group) for layer in _as_norm(group)]
    if found and all(f.aliases and _AUTOMATIC.fullmatch(f.aliases[0]) for f in found):
        return sorted(found, key=lambda f: natural(f.aliases[0]))
    return found


def _sorted(groups: list[Group]) -> list[Group]:
    return sorted(groups, key=lambda g: natural(g.path))


def _doubtful(group: Group) -> bool:
    """Whether it has two vectors, as a layer normalization has, and no name that Keras gives a batch normalization."""
    called = _AUTOMATIC.fullmatch(group.path.rpartition("/")[2]) or _AUTOMATIC.fullmatch(group.label or "")
    return len(group.arrays) == 2 and not called


def _as_norm(group: Group) -> list[ForeignBatchNorm]:
    """What holds as many vectors of one length as a batch normalization, with three more where it renormalizes."""
    arrays = group.arrays
    alike = bool(arrays) and all(a.shape == arrays[0].shape and a.size == max(a.shape, default=0) for a in arrays)
    if not alike or group.path.startswith("optimizer/") or len(arrays) not in (2, 3, 4, 5, 6, 7):
        return []
    virtual = arrays[0].ndim > 1  # (1, ..., C), with an axis of virtual batches
    renorm = len(arrays) > 4
    own = [a.reshape(-1) for a in (arrays[: len(arrays) - 3] if renorm else arrays)]
    by_step = BY_STEP if _TIME_DISTRIBUTED.search(group.path) else None
    layer = ForeignBatchNorm(
        group.path,
        own[-2],
        own[-1],
        own[0] if len(own) == 4 else None,
        own[1] if len(own) == 4 else None,
        loose=tuple(own[:1]) if len(own) == 3 else (),
        aliases=() if group.label is None else (group.label,),
        obstacle=RENORM_RULE if renorm else _VIRTUAL.format("") if virtual else by_step,
    )
    return [layer]


def _tell_order(found: list[ForeignBatchNorm]) -> bool:
    """Whether the paths of one container or the numbers of creation tell the order, and do not disagree."""
    if len(found) < 2:
        return True
    paths = [f.name for f in found if re.match(r"(.*/)?layers/", f.name)]
    contained = len(paths) == len(found) and len({re.sub(r"_\d+$", "", path) for path in paths}) == 1
    numbered = all(f.aliases and _AUTOMATIC.fullmatch(f.aliases[0]) for f in found)
    if contained and numbered:
        return sorted(paths, key=natural) == [f.name for f in found]
    return contained or numbered


# Models and weights whose groups have names: Keras 2, and Keras 3 where it writes .h5


def _named(file: Any) -> Checkpoint:
    """Groups lie in the order of the model, vectors have names."""
    config, version = config_of(file)
    found, without = [], []
    for name, owner, paths, settings in named(file, config):
        if config and not settings:
            without.append(name)
        made = _layer(name, {key: array_of(file[path]) for key, path in paths.items()}, settings, version)
        by_step = BY_STEP if settings.get(_STEPS) and _framework(version) == "keras3" else None
        aliases = (owner, owner.rpartition("/")[2])
        found.append(replace(made, aliases=aliases, obstacle=made.obstacle or by_step))
    notes = (_NOT_IN_CONFIG.format(", ".join(without)),) if without else () if config else _UNSAVED
    kind = f".h5 {'model' if config else 'weights'} of Keras {version}"
    return Checkpoint(_framework(version), kind, tuple(found), True, notes)


def config_of(file: Any) -> tuple[dict[str, Any], str]:
    """The config of a model, empty in a file of weights, and the version of Keras."""
    config = json.loads(text(file.attrs["model_config"])) if "model_config" in file.attrs else {}
    weights = file.get("model_weights", file)
    return config, text(weights.attrs.get("keras_version", file.attrs.get("keras_version", "2")))


def named(file: Any, config: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, str], dict[str, Any]]]:
    """The name, the owner of the vectors, their paths by name, and the settings of each batch normalization."""
    weights = file.get("model_weights", file)
    entries = [(name, own) for _, name, own in _walk(_entries(config.get("config", {})), "", "")]
    for layer in _strings(weights, "layer_names"):
        group = weights[layer.replace("/", "_") if layer not in weights else layer]
        parts: dict[str, dict[str, str]] = {}
        for name in _strings(group, "weight_names"):
            owner, _, key = name.split(":")[0].rpartition("/")
            parts.setdefault(owner or layer, {})[key] = f"{group.name}/{name}"
        for owner, paths in parts.items():
            if "moving_mean" in paths and "moving_variance" in paths:
                yield layer if len(parts) == 1 else owner, owner, paths, _settings(owner, layer, entries)


def _settings(owner: str, layer: str, entries: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """What the config says of a layer that lies in, or is, one of the model: nothing where that is not told.

    Layers of equal names may lie in different models inside the model, and a wrapper may stand around a layer.
    """
    inside = [(name, own) for name, own in entries if f"{name}/".startswith(f"{layer}/")]
    if len(inside) > 1:
        words = owner.split("/")
        shared = [len({*words} & {*name.split("/")}) if words[-1] in name.split("/") else 0 for name, _ in inside]
        inside = [each for each, count in zip(inside, shared, strict=True) if count == max(shared) > 0]
    return inside[0][1] if len(inside) == 1 else {}


# Settings


RENORM_RULE = (
    "renorm=True: Keras averages the standard deviation, and keeps further statistics for training, "
    "where Renorm uses the running variance"
)


_VIRTUAL = (
    "virtual_batch_size{}: Keras takes every (N/size)-th example into one virtual batch and keeps the mean of their "
    "variances, where ghost_size takes adjacent examples"
)
BY_STEP = (
    "TimeDistributed of Keras 3 normalizes each time step by its own statistics and updates the moving ones once a "
    "step (Keras 2 pools all steps)"
)
_TIME_DISTRIBUTED = re.compile(r"(^|/)time_distributed(_\d+)?/layer(/|$)")


def _layer(name: str, arrays: Mapping[str, Array], settings: Mapping[str, Any], version: str) -> ForeignBatchNorm:
    vectors = [arrays.get(key) for key in NAMES]
    obstacle = None
    if settings.get("renorm") or "renorm_mean" in arrays:
        obstacle = RENORM_RULE
    if settings.get("virtual_batch_size") is not None:
        obstacle = _VIRTUAL.format(f"={settings['virtual_batch_size']}")
        vectors = [v.reshape(-1) if v is not None and v.size == max(v.shape) else v for v in vectors]
    gamma, beta, mean, var = vectors
    assert mean is not None
    assert var is not None
    return ForeignBatchNorm(
        name,
        mean,
        var,
        gamma,
        beta,
        float(settings.get("momentum", DECAY)),
        float(settings.get("epsilon", EPS)),
        _variance(settings, version, obstacle),
        frozen=settings.get("trainable", True) is False,
        obstacle=obstacle,
    )


def _variance(settings: Mapping[str, Any], version: str, obstacle: str | None) -> str:
    """The kind that is kept: "fused" where Keras 2 decides by the number of axes."""
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if numbers[:1] >= (3,):
        return "biased"
    if (2, 1) <= numbers < (2, 4) and version.endswith(tuple("0123456789")) and "tf" not in version:
        return "unbiased"  # Keras of several backends, 2.1 to 2.3: m / (m - 1 - epsilon) in each layer
    axis = settings.get("axis", -1)
    axes = axis if isinstance(axis, list) else [axis]
    policy = settings.get("dtype")
    dtype = policy.get("config", {}).get("name") if isinstance(policy, dict) else policy
    plain = obstacle is None and not settings.get("synchronized") and settings.get("fused") is not False
    fused = plain and len(axes) == 1 and axes[0] in (-4, -3, -1, 1, 3, 4) and dtype != "float64"
    return "fused" if fused else "biased"
