"""Values of any library as NumPy arrays, and nested states as flat ones."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from batchnorm.population.formats.conventions import Names
from batchnorm.population.formats.records import Array


def array(value: Any) -> Array:
    """An array of any library in NumPy; bfloat16 as float32."""
    if isinstance(value, np.ndarray):
        return bfloat16(value) if value.dtype == np.dtype("V2") else _plain(value)
    if hasattr(value, "get_value"):  # nnx
        value = value.get_value()
    if hasattr(value, "detach") and hasattr(value, "cpu"):  # torch and Paddle
        value = value.detach().cpu()
        if "bfloat16" in str(value.dtype).lower():
            value = value.float() if hasattr(value, "float") else value.astype("float32")
    for method in ("asnumpy", "numpy"):  # MindSpore; torch, Paddle, Jittor, tinygrad
        if hasattr(value, method):
            return _plain(np.asarray(getattr(value, method)()))
    if "bfloat16" in str(getattr(value, "dtype", "")):
        value = value.astype(np.float32)
    return _plain(np.asarray(value))


def _plain(value: Array) -> Array:
    """Without types that other packages add to NumPy."""
    return value.astype(np.float32) if value.dtype.name == "bfloat16" else value


def bfloat16(value: Array) -> Array:
    """float32 of the 16 bits of bfloat16, which NumPy knows as two bytes without a type (``|V2``)."""
    return (value.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def vector(value: Any) -> Array:
    """An array (C,), also where the library keeps (1, C, 1, 1) or (1, 1, 1, C)."""
    made = array(value)
    return made.reshape(-1) if made.ndim > 1 and made.size == max(made.shape) else made


def flat(tree: Mapping[Any, Any], separator: str = "/", path: str = "") -> dict[str, Any]:
    """The leaves of a nested mapping by their path; ``{"value": leaf}``, as orbax restores variables, is a leaf."""
    found: dict[str, Any] = {}
    for key, child in tree.items():
        at = f"{path}{separator}{key}" if path else str(key)
        if isinstance(child, Mapping) and set(child) == {"value"} and not isinstance(child["value"], Mapping):
            child = child["value"]
        if isinstance(child, Mapping):
            found |= flat(child, separator, at)
        elif isinstance(child, (list, tuple)):
            found |= flat(dict(enumerate(child)), separator, at)
        elif child is not None:
            found[at] = child
    return found


def nested(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays named by paths, with slashes or else dots, as a nested dictionary."""
    separator = "/" if any("/" in name for name in arrays) else "."
    tree: dict[str, Any] = {}
    for name, value in arrays.items():
        *parents, last = name.split(separator)
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


def owners(leaves: Iterable[str], names: Names, separator: str = "/") -> list[str]:
    """The paths that have a mean and a variance, sorted by their numbers."""
    keys = {leaf.rpartition(separator)[::2] for leaf in leaves}
    found = {owner for owner, last in keys if last == names.mean and (owner, names.var) in keys}
    return sorted(found, key=natural)


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts BatchNorm_2 before BatchNorm_10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def numbered(names: list[str]) -> bool:
    """Whether all are numbered parts of one module, so that their names tell their order."""
    stems = {re.sub(r"\d+$", "", name) for name in names}
    return len(names) < 2 or (len(stems) == 1 and all(re.search(r"\d$", name) for name in names))
