"""States and files of named arrays: the families of frameworks whose vectors have names of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from batchnorm.errors import DataError, InputError
from batchnorm.population.formats.conventions import CONVENTIONS
from batchnorm.population.formats.records import Array, Checkpoint, ForeignBatchNorm
from batchnorm.population.formats.values import array, flat, natural, numbered, owners, vector

_ROWS = (
    "this package's layers with domains or time steps keep a row of statistics for each; "
    "net.load_state_dict(torch.load(file)) takes them all"
)
_HETERO = (
    "HeteroBatchNorm of PyTorch Geometric keeps statistics for each type, divides by sqrt(max(var, eps)) and lets no "
    "gradient through its statistics"
)
_UNSAVED = "{title} does not save momentum and epsilon; its defaults {decay} and {eps} are taken"
_TORCH_ALIKE = ("torch", "tinygrad", "mlx", "jittor", "pyg")


def read(tree: Mapping[Any, Any], kind: str, framework: str | None = None, ordered: bool = False) -> Checkpoint | None:
    """The batch normalizations of named arrays, flat or nested; None where their names are of no family.

    Args:
        tree: arrays of any library by name.
        kind: of the file or state, in words.
        framework: whose it is, where the container tells or the caller says.
        ordered: whether the names come in the order of the model.
    """
    tree = {key: value for key, value in tree.items() if key != "StructuredToParameterName@@"}
    leaves = flat(tree, "." if _dotted(tree) else "/")
    separator = "/" if any("/" in name for name in leaves) else "."
    found = _family(leaves, separator) if framework is None else framework
    if found is not None and found != "haiku" and not owners(leaves, CONVENTIONS[found].names, separator):
        found = _family(leaves, separator)  # not what the caller said, which is told there
    if _is_haiku(leaves):
        return _haiku(leaves, kind)
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
    if framework == "mlx":
        notes.append("the variance is unbiased since a release after 0.29.4; before, running_var='biased' is right")
    return tuple(notes)


def _layer(path: str, leaves: Mapping[str, Any], separator: str, framework: str) -> ForeignBatchNorm:
    row = CONVENTIONS[framework]

    def named(name: str) -> Array | None:
        key = f"{path}{separator}{name}" if path else name
        return vector(leaves[key]) if key in leaves else None

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


# Haiku


def _is_haiku(leaves: Mapping[str, Any]) -> bool:
    return any(name.endswith("/mean_ema/average") for name in leaves)


def of_haiku(params: Mapping[Any, Any], state: Mapping[Any, Any]) -> Checkpoint:
    """From the pair that `haiku.transform_with_state` makes."""
    return _haiku({f"params/{k}": v for k, v in flat(params).items()} | flat(state), "parameters and state of Haiku")


def _haiku(leaves: Mapping[str, Any], kind: str) -> Checkpoint:
    """``average`` of ``mean_ema`` and ``var_ema`` is what inference uses: ``hidden`` divided by 1 - decay^counter."""
    plain = {name.removeprefix("params/").removeprefix("state/"): value for name, value in leaves.items()}
    row, found = CONVENTIONS["haiku"], []
    suffix = "/~/mean_ema/average"
    for path in sorted((n.removesuffix(suffix) for n in plain if n.endswith(suffix)), key=natural):
        ema = f"{path}/~/{{}}_ema/{{}}"
        mean, var = (vector(plain[ema.format(kind, "average")]) for kind in ("mean", "var"))
        gamma, beta = (vector(plain[f"{path}/{k}"]) if f"{path}/{k}" in plain else None for k in row.names[:2])
        batches = int(array(plain[ema.format("mean", "counter")]))
        decay = _decay(plain, ema, batches)
        layer = ForeignBatchNorm(path, mean, var, gamma, beta, decay, row.eps, row.variance, row.running, batches)
        found.append(layer)
    names = [f.name for f in found]
    note = "Haiku does not save its decay rate, which follows from its counter and averages, nor epsilon; 1e-5 is taken"
    return Checkpoint("haiku", kind, tuple(found), numbered(names), (note,))


def _decay(leaves: Mapping[str, Any], ema: str, batches: int) -> float:
    """d of hidden = average (1 - d^t), the mean over channels; NaN where hidden and average do not tell it."""
    pairs = [
        (array(leaves[ema.format(kind, "hidden")]), array(leaves[ema.format(kind, "average")]))
        for kind in ("mean", "var")
    ]
    hidden, average = (np.concatenate([np.ravel(each) for each in side]) for side in zip(*pairs, strict=True))
    large = np.abs(average) > 1e-3
    if batches < 1 or not large.any():
        return float("nan")
    left = float(np.mean(1 - hidden[large].astype(np.float64) / average[large]))
    if left < 1e-4:  # nothing is left of it in float32
        return float("nan")
    return float(round(left ** (1 / batches), 6))


# Equinox


def of_equinox(model: Any, state: Any) -> Checkpoint:
    """From an Equinox model and its `State`: layers are found as attributes, settings are theirs."""
    found = [_equinox(path, layer, state.get) for path, layer in _modules(model, "")]
    return Checkpoint("equinox", "model and state of Equinox", tuple(found), True)


def _modules(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Objects that have the fields of Equinox' BatchNorm, by their path."""
    if hasattr(value, "batch_state_index") and hasattr(value, "ema_state_index"):
        yield path, value
        return
    if isinstance(value, (list, tuple)):
        inside = {str(i): each for i, each in enumerate(value)}
    elif isinstance(value, Mapping):
        inside = {str(key): each for key, each in value.items()}
    elif hasattr(value, "__dataclass_fields__"):
        inside = {key: getattr(value, key, None) for key in value.__dataclass_fields__}
    else:
        return
    for key, each in inside.items():
        yield from _modules(each, f"{path}.{key}" if path else key)


_EMA = 'mode="ema" normalizes in training by the moving average, through which gradients flow'


def _equinox(path: str, layer: Any, get: Callable[[Any], Any]) -> ForeignBatchNorm:
    gamma, beta = (None if v is None else array(v) for v in (layer.weight, layer.bias))
    decay, eps = float(layer.momentum), float(layer.eps)
    if layer.batch_state_index is None:
        mean, var = map(array, get(layer.ema_state_index))
        return ForeignBatchNorm(path, mean, var, gamma, beta, decay, eps, obstacle=_EMA)
    mean, var = map(array, get(layer.batch_state_index))
    return debiased(ForeignBatchNorm(path, mean, var, gamma, beta, decay, eps), int(array(get(layer.batch_counter))))


def debiased(hidden: ForeignBatchNorm, batches: int) -> ForeignBatchNorm:
    """What inference uses of Equinox' raw averages: both divided by 1 - decay^t; the variance's starts from 1."""
    scale = 1 - hidden.decay**batches if batches else 1.0
    mean, var = (v.astype(np.float64) / scale for v in (hidden.mean, hidden.var))
    return replace(hidden, mean=mean, var=var, running="debiased", batches=batches)


def equinox_leaves(arrays: list[Array], decay: float | None) -> Checkpoint:
    """From `tree_serialise_leaves((model, state))`, which writes no names.

    A layer's leaves are weight, bias and the flag ``inference``; its state is counter, mean and variance. They are
    matched in order, if there are as many of one as of the other.
    """
    row = CONVENTIONS["equinox"]
    assert row.decay is not None
    kinds = [(a.shape, a.dtype.kind) for a in arrays]
    affine, states = [], []
    for i in range(len(arrays) - 2):
        (a, _), (b, _), (c, _) = kinds[i : i + 3]
        types = "".join(kind for _, kind in kinds[i : i + 3])
        if types in ("ffb",) and a == b and len(a) == 1 and c == ():
            affine.append(arrays[i : i + 2])
        if types in ("iff",) and a == () and b == c and len(b) == 1:
            states.append(arrays[i : i + 3])
    if not states or len(affine) != len(states):
        raise InputError(
            f"the file holds {len(arrays)} arrays without names, of which {len(affine)} look like a batch "
            f"normalization's weights and {len(states)} like its state in mode='batch'. Pass the pair itself, "
            "load_statistics(net, (model, state))"
        )
    found = []
    for i, ((gamma, beta), (count, mean, var)) in enumerate(zip(affine, states, strict=True)):
        layer = ForeignBatchNorm(str(i), mean, var, gamma, beta, row.decay if decay is None else decay, row.eps)
        found.append(debiased(layer, int(count)))
    notes = ("Equinox' file holds no names, momentum and epsilon; its defaults 0.99 and 1e-5 are taken",)
    return Checkpoint("equinox", "leaves of Equinox", tuple(found), True, notes)


def nothing(kind: str, names: Any) -> DataError:
    """The error for arrays in which no batch normalization is known."""
    shown = ", ".join(sorted(map(str, names))[:8])
    return DataError(
        f"{kind}: no batch normalization is known by these names: {shown}. Expected a mean and a variance beside each "
        "other, such as running_mean and running_var, moving_mean and moving_variance, or batch_stats of mean and var"
    )
