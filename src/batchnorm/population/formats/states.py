"""States and files of named arrays: the families of frameworks whose vectors have names of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from batchnorm.errors import DataError
from batchnorm.population.formats import haiku
from batchnorm.population.formats.conventions import CONVENTIONS
from batchnorm.population.formats.records import Array, Checkpoint, ForeignBatchNorm
from batchnorm.population.formats.values import bfloat16, flat, numbered, owners, vector

_ROWS = (
    "this package's layers with domains or time steps keep a row of statistics for each; "
    "net.load_state_dict(torch.load(file)) takes them all"
)
_HETERO = (
    "HeteroBatchNorm of PyTorch Geometric keeps statistics for each type, divides by sqrt(max(var, eps)) and lets no "
    "gradient through its statistics"
)
_UNSAVED = "{title} does not save momentum and epsilon; its defaults {decay} and {eps} are taken"
_BY_OPTION = {"paddle": "use_global_stats=True", "mindspore": "use_batch_statistics=False"}
_TORCH_ALIKE = ("torch", "tinygrad", "mlx", "jittor", "pyg")


def read(tree: Mapping[Any, Any], kind: str, framework: str | None = None, ordered: bool = False) -> Checkpoint | None:
    """The batch normalizations of named arrays, flat or nested; None where their names are of no family.

    Args:
        tree: arrays of any library by name.
        kind: of the file or state, in words.
        framework: whose it is, where the container tells or the caller says.
        ordered: whether the names come in the order of the model.
    """
    tree = {_bare(key): value for key, value in tree.items() if key != "StructuredToParameterName@@"}
    if haiku.is_state(tree):
        return haiku.of_leaves(flat(tree), kind)
    leaves = flat(tree, "." if _dotted(tree) else "/")
    separator = "/" if any("/" in name for name in leaves) else "."
    found = _family(leaves, separator) if framework is None else framework
    if found is not None and found != "haiku" and not owners(leaves, CONVENTIONS[found].names, separator):
        found = _family(leaves, separator)  # not what the caller said, which is told there
    if found is None:
        return None
    names = CONVENTIONS[found].names
    at = owners(leaves, names, separator)
    if not at:
        return None
    if ordered:
        first = {name.rpartition(separator)[0]: i for i, name in reversed(list(enumerate(leaves)))}
        at = sorted(at, key=first.__getitem__)
    layers = tuple(_layer(path, leaves, separator, found) for path in at)
    return Checkpoint(found, kind, layers, ordered or numbered(at), _notes(found))


def _bare(key: Any) -> Any:
    """A name without the number of an output, which TensorFlow's variables have."""
    return key.removesuffix(":0") if isinstance(key, str) else key


def _dotted(tree: Mapping[Any, Any]) -> bool:
    """Whether the path of a nested state is written with dots: where a key has none of Keras' or JAX's slashes."""
    return not any("/" in str(key) for key in tree)


def _family(leaves: Mapping[str, Any], separator: str) -> str | None:
    last = {name.rpartition(separator)[2] for name in leaves}
    if {"_mean", "_variance"} <= last:
        return "paddle"
    if {"avg_mean", "avg_var"} <= last:
        return "chainer"
    if {"moving_mean", "moving_variance"} <= last:
        return "mindspore" if separator == "." else "keras3"
    if {"running_mean", "running_var"} <= last:
        return "torch"
    return None


def _notes(framework: str) -> tuple[str, ...]:
    row = CONVENTIONS[framework]
    if row.keeps_settings:
        notes = [f"{row.title} does not save momentum and epsilon; those of the layers stay"]
    else:
        notes = [_UNSAVED.format(title=row.title, decay=row.decay, eps=row.eps)]
    if framework in _BY_OPTION:
        notes.append(
            f"it does not say which layers train with {_BY_OPTION[framework]}; "
            "bn.set_mode(layer, source='running', update='never') makes one so"
        )
    if framework == "mlx":
        notes.append("the variance is unbiased since a release after 0.29.4; before, running_var='biased' is right")
    return tuple(notes)


def _layer(path: str, leaves: Mapping[str, Any], separator: str, framework: str) -> ForeignBatchNorm:
    row = CONVENTIONS[framework]

    def named(name: str) -> Array | None:
        key = f"{path}{separator}{name}" if path else name
        if key not in leaves:
            return None
        made = vector(leaves[key])
        return bfloat16(made) if framework == "paddle" and made.dtype == np.uint16 else made  # as Paddle writes it

    gamma, beta, mean, var = (named(name) for name in row.names)
    assert mean is not None
    assert var is not None
    batches = named(row.counter) if row.counter else None
    obstacle = None
    if framework in _TORCH_ALIKE and mean.ndim > 1:
        obstacle = _HETERO if batches is None or batches.ndim == 0 else _ROWS
    layer = ForeignBatchNorm(path, mean, var, gamma, beta, row.decay or 0.0, row.eps, row.variance, row.running)
    counted = None if batches is None else int(batches.reshape(-1)[0])
    return replace(layer, batches=counted, obstacle=obstacle)


def nothing(kind: str, names: Any) -> DataError:
    """The error for arrays in which no batch normalization is known."""
    shown = ", ".join(sorted(map(str, names))[:8])
    return DataError(
        f"{kind}: no batch normalization is known by these names: {shown}. Expected a mean and a variance beside each "
        "other, such as running_mean and running_var, moving_mean and moving_variance, or batch_stats of mean and var"
    )
