"""Batch normalization of Haiku: parameters and state by their paths, as arrays, or in an ``.npz`` of both.

Haiku has no files of its own. The ``.npz`` has ``params/<module>/<name>`` and ``state/<module>/<name>``.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from batchnorm.errors import InputError
from batchnorm.population.formats import containers
from batchnorm.population.formats.conventions import CONVENTIONS
from batchnorm.population.formats.records import Array, Checkpoint, ForeignBatchNorm
from batchnorm.population.formats.values import array, flat, natural, numbered, vector

_AVERAGES = "/~/{}_ema/{}"
_PART = re.compile(r"((?:.*?/)??)(params|state)/(.*)")


def is_of(leaves: Iterable[str]) -> bool:
    """Whether arrays by their paths have the averages of Haiku's batch normalization."""
    return any(name.endswith("/mean_ema/average") for name in leaves)


def is_state(state: Mapping[Any, Any]) -> bool:
    """Whether a nested state has them."""
    return is_of(flat(state))


def of_pair(params: Mapping[Any, Any], state: Mapping[Any, Any]) -> Checkpoint:
    """From the pair that `haiku.transform_with_state` makes."""
    return of_leaves({f"params/{k}": v for k, v in flat(params).items()} | flat(state), "parameters and state of Haiku")


def of_leaves(leaves: Mapping[str, Any], kind: str) -> Checkpoint:
    """From arrays by their paths.

    ``average`` of ``mean_ema`` and ``var_ema`` is what inference uses: ``hidden`` divided by 1 - decay^counter.
    """
    plain = _plain(leaves)
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


def _plain(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays by the module's path, without ``params`` and ``state``, and what both lie in where that is one place."""
    parts = {name: _PART.match(name) for name in leaves}
    places = {m[1] for name, m in parts.items() if m is not None and m[2] == "state" and is_of([name])} or {""}
    if len(places) < 2:
        inside = {m[3]: leaves[name] for name, m in parts.items() if m is not None and {m[1]} == places}
        return {name: value for name, value in leaves.items() if parts[name] is None} | inside
    return {name if m is None else (m[1] or "") + m[3]: leaves[name] for name, m in parts.items()}


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


def write(layers: list[tuple[str, ForeignBatchNorm]]) -> bytes:
    """An ``.npz`` of the batch normalizations alone, under their names there."""
    arrays: dict[str, Array] = {}
    for name, f in layers:
        shape = (*(1 for _ in range(f.rank - 1)), -1)
        own = {key: value for key, value in _vectors(name, f).items() if value is not None}
        arrays |= {key: value.reshape(shape) if value.ndim else value for key, value in own.items()}
    return _npz(arrays)


def into(template: Path, pairs: Mapping[str, ForeignBatchNorm]) -> bytes:
    """The ``.npz`` of a whole model, with the vectors of the layers named in ``pairs`` replaced."""
    if not zipfile.is_zipfile(template):
        raise InputError(f"{template} is no .npz; of Haiku like= takes params and state as numpy.savez writes them")
    arrays = containers.npz(template)
    bare = {key.removeprefix("params/").removeprefix("state/"): key for key in arrays}
    for name, f in pairs.items():
        for key, value in _vectors(name, f).items():
            at = bare.get(key.removeprefix("params/").removeprefix("state/"))
            if at is None and value is not None:
                raise InputError(f"{template} has no {key}, which layer {f.name!r} has")
            if at is not None:
                value = np.ones(f.mean.shape) * key.endswith("scale") if value is None else value
                arrays[at] = value.astype(arrays[at].dtype).reshape(arrays[at].shape)
    return _npz(arrays)


def _vectors(name: str, f: ForeignBatchNorm) -> dict[str, Array | None]:
    """By their paths; None for gamma and beta that it does not have."""
    t = f.counter()
    found: dict[str, Array | None] = {f"params/{name}/scale": f.gamma, f"params/{name}/offset": f.beta}
    for kind, average in (("mean", f.mean), ("var", f.var)):
        values = {"average": average, "hidden": (average * (1 - f.decay**t)).astype(np.float32)}
        values["counter"] = np.asarray(t, np.int32)
        found |= {f"state/{name}{_AVERAGES.format(kind, key)}": value for key, value in values.items()}
    return found


def _npz(arrays: Mapping[str, Array]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **dict(arrays))  # type: ignore[arg-type]
    return buffer.getvalue()
