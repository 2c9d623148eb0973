"""Checkpoints of orbax: folders of arrays that tensorstore reads, and of JSON that names them.

``_METADATA`` of a folder has ``tree_metadata``: for each leaf the keys of its path and the type of its value. The array
is named by the keys, joined by dots, in zarr (version 3 where ``use_zarr3``), in one database of OCDBT where
``use_ocdbt`` (orbax-checkpoint 0.12.8). Neither orbax nor JAX is needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from batchnorm.errors import DataError, MissingDependencyError
from batchnorm.population.formats.records import Array
from batchnorm.population.formats.values import array, natural

_METADATA = "_METADATA"
_SEARCHED = ("", "*/", "*/*/")  # the folder itself, its items or its steps, the items of its steps


def items(path: Path) -> list[Path]:
    """The folders of arrays of a checkpoint; of a manager's folder those of the last step; none of any other folder."""
    for depth in _SEARCHED:
        found = [each.parent for each in path.glob(f"{depth}{_METADATA}")]
        if not found:
            continue
        steps = {each.relative_to(path).parts[0] for each in found if depth}
        last = max(steps, key=natural, default=None)
        if depth == "*/" and not all(_is_step(step) for step in steps):
            return sorted(found)  # items beside each other
        return sorted(each for each in found if last is None or each.relative_to(path).parts[0] == last)
    return []


def _is_step(name: str) -> bool:
    """Whether a folder is named as a step: a number, perhaps behind a prefix, as in checkpoint_10."""
    return name[-1:].isdigit()


def read(path: Path) -> dict[str, Any]:
    """The vectors and scalars of a checkpoint as a nested dictionary; larger arrays are left out.

    Items that were saved beside each other, such as params and batch_stats, are entries of one dictionary.
    """
    found = items(path)
    if len(found) == 1:
        return _item(found[0])
    return {each.name: _item(each) for each in found}


def _item(path: Path) -> dict[str, Any]:
    try:
        metadata = json.loads((path / _METADATA).read_text())
        entries = list(metadata["tree_metadata"].values())
        paths = [[str(key["key"]) for key in entry["key_metadata"]] for entry in entries]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path / _METADATA} does not name the leaves of a checkpoint of orbax: {error!r}") from error
    tree: dict[str, Any] = {}
    wanted = [keys for keys, entry in zip(paths, entries, strict=True) if keys and _may_be_vector(entry)]
    for keys, value in _arrays(path, wanted, metadata):
        node = tree
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        node[keys[-1]] = value
    return tree


def _may_be_vector(entry: Any) -> bool:
    """Whether a leaf is an array, and none that is told to have several axes."""
    value = entry.get("value_metadata", {})
    kind, shape = str(value.get("value_type", "")), value.get("write_shape") or []
    return kind in ("jax.Array", "np.ndarray", "scalar") and sum(size > 1 for size in shape) <= 1


def _arrays(path: Path, leaves: list[list[str]], metadata: Any) -> Iterator[tuple[list[str], Array]]:
    try:
        import tensorstore
    except ImportError as error:
        raise MissingDependencyError(
            f"{path} is a checkpoint of orbax, whose arrays tensorstore reads: pip install tensorstore. Or restore it "
            f"where orbax is, tree = orbax.checkpoint.StandardCheckpointer().restore({str(path)!r}), and pass the "
            "tree, or write it with flax.serialization.to_bytes(tree) and pass that file"
        ) from error
    base = f"{path.resolve().as_uri()}/"
    for keys in leaves:
        name = ".".join(keys)
        store: dict[str, Any] = {"driver": "file", "path": str(path.resolve() / name)}
        if metadata.get("use_ocdbt", (path / "manifest.ocdbt").exists()):
            store = {"driver": "ocdbt", "base": base, "path": name}
        driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
        try:
            opened = tensorstore.open({"driver": driver, "kvstore": store}, read=True, open=True).result()
            if sum(size > 1 for size in opened.shape) <= 1:
                yield keys, array(opened.read().result())
        except (ValueError, OSError) as error:
            raise DataError(f"{path}: the array {name} cannot be read: {error}") from error
