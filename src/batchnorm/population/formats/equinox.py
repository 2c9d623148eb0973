"""Batch normalization of Equinox: a model and its state, as objects, or as leaves in a file without names."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from batchnorm.errors import InputError
from batchnorm.population.formats import containers
from batchnorm.population.formats.conventions import CONVENTIONS
from batchnorm.population.formats.records import Array, Checkpoint, ForeignBatchNorm
from batchnorm.population.formats.values import array


def of_pair(model: Any, state: Any) -> Checkpoint:
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


_UNTRAINED = (
    "it has seen no batch; the variance of Equinox starts from 1, and this 1 is divided by 1 - decay^t together with "
    "the batches that follow"
)
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
    if not batches:
        return replace(hidden, running="debiased", batches=0, obstacle=_UNTRAINED)
    mean, var = (v.astype(np.float64) / (1 - hidden.decay**batches) for v in (hidden.mean, hidden.var))
    return replace(hidden, mean=mean, var=var, running="debiased", batches=batches)


def of_leaves(arrays: list[Array], decay: float | None) -> Checkpoint:
    """From `tree_serialise_leaves((model, state))`, which writes no names.

    A layer's leaves are weight, bias and the flag ``inference``; its state is counter, mean and variance. They are
    matched in order and by size; a layer with ``channelwise_affine=False`` has a state alone.
    """
    row = CONVENTIONS["equinox"]
    assert row.decay is not None
    affine, states = _places(arrays)
    matched = _matched([arrays[at].size for at in affine], [arrays[at + 1].size for at in states])
    if not states or matched is None:
        raise InputError(
            f"the file holds {len(arrays)} arrays without names, of which {len(affine)} look like a batch "
            f"normalization's weights and {len(states)} like its state in mode='batch', and it is not certain which "
            "belong together. Pass the pair itself, load_statistics(net, (model, state))"
        )
    found = []
    for i, (behind, own) in enumerate(zip(states, matched, strict=True)):
        gamma, beta = (None, None) if own is None else arrays[affine[own] : affine[own] + 2]
        count, mean, var = arrays[behind : behind + 3]
        layer = ForeignBatchNorm(str(i), mean, var, gamma, beta, row.decay if decay is None else decay, row.eps)
        found.append(debiased(layer, int(count)))
    notes = ("Equinox' file holds no names, momentum and epsilon; its defaults 0.99 and 1e-5 are taken",)
    return Checkpoint("equinox", "leaves of Equinox", tuple(found), True, notes)


def _places(arrays: list[Array]) -> tuple[list[int], list[int]]:
    """Where weights and states of batch normalizations begin."""
    kinds = [(a.shape, "b" if a.dtype.kind == "b" else "f" if _is_float(a) else a.dtype.kind) for a in arrays]
    affine, states = [], []
    for i in range(len(arrays) - 2):
        (a, _), (b, _), (c, _) = kinds[i : i + 3]
        types = "".join(kind for _, kind in kinds[i : i + 3])
        if types == "ffb" and a == b and len(a) == 1 and c == ():
            affine.append(i)
        if types == "iff" and a == () and b == c and len(b) == 1:
            states.append(i)
    return affine, states


def _matched(affine: list[int], states: list[int]) -> list[int | None] | None:
    """For each state the number of its weights, or None where it has none; None where there is not just one way."""
    if len(affine) == len(states):
        return list(range(len(states)))
    ways = [chosen for chosen in (_first(affine, states), _last(affine, states)) if chosen is not None]
    return ways[0] if len(ways) == 2 and ways[0] == ways[1] else None


def _first(affine: list[int], states: list[int]) -> list[int | None] | None:
    """The match in order whose weights come as early as they can."""
    matched: list[int | None] = []
    at = 0
    for size in states:
        fits = at < len(affine) and affine[at] == size
        matched.append(at if fits else None)
        at += fits
    return matched if at == len(affine) else None


def _last(affine: list[int], states: list[int]) -> list[int | None] | None:
    """The match in order whose weights come as late as they can."""
    turned = _first(affine[::-1], states[::-1])
    return turned and [None if at is None else len(affine) - 1 - at for at in turned[::-1]]


def _is_float(value: Array) -> bool:
    """Whether it holds floating-point numbers; bfloat16 has no type of NumPy's."""
    return bool(value.dtype.kind == "f" or value.dtype.str == "|V2")


def write(layers: list[tuple[str, ForeignBatchNorm]]) -> bytes:
    """The leaves of (model, state) of a model that holds these batch normalizations and no other arrays, in order."""
    affine, states = [], []
    for _, f in layers:
        weight, bias, *averages = _leaves(f)
        affine += [*([] if f.gamma is None and f.beta is None else [weight, bias]), np.asarray(False)]
        states += averages
    return _sequence([*affine, *states])


def into(template: Path, pairs: Mapping[str, ForeignBatchNorm]) -> bytes:
    """The leaves of a whole model, with those of the layers of the given numbers replaced."""
    header, arrays = containers.npy_sequence(template)
    affine, states = _places(arrays)
    matched = _matched([arrays[at].size for at in affine], [arrays[at + 1].size for at in states])
    assert matched is not None  # it was read
    for name, f in pairs.items():
        weight, bias, *averages = _leaves(f)
        own = matched[int(name)]
        parts = [(states[int(name)], averages)] + ([] if own is None else [(affine[own], [weight, bias])])
        for at, values in parts:
            arrays[at : at + len(values)] = [
                value.astype(arrays[at + i].dtype).reshape(arrays[at + i].shape) for i, value in enumerate(values)
            ]
    return header + _sequence(arrays)


def _leaves(f: ForeignBatchNorm) -> list[Array]:
    """gamma, beta, the number of batches, and the averages before they are divided by 1 - decay^t."""
    t = f.counter()
    gamma, beta, mean, var = f.filled()
    raw = [(value * (1 - f.decay**t)).astype(np.float32) for value in (mean, var)]
    return [gamma, beta, np.asarray(t, np.int32), *raw]


def _sequence(arrays: list[Array]) -> bytes:
    buffer = io.BytesIO()
    for each in arrays:
        np.save(buffer, each)
    return buffer.getvalue()
