"""What a file or a state is, by its content."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from batchnorm.errors import DataError, InputError
from batchnorm.population.formats import keras, trees
from batchnorm.population.formats.conventions import CONVENTIONS, framework_key
from batchnorm.population.formats.records import Checkpoint


def read(source: Any, framework: str | None = None) -> Checkpoint:
    """The batch normalizations of a file, a folder or a state.

    Args:
        source: a path, a nested dictionary, or an object that holds one.
        framework: whose it is; None: by its content.
    """
    asked = None if framework is None else framework_key(framework)
    if isinstance(source, (str, os.PathLike)):
        found = _file(Path(source))
    elif trees.is_state(source):
        found = trees.read_flax(source)
    else:
        raise InputError(f"got a {type(source).__name__}; expected a path or a dictionary of arrays")
    if not found.layers:
        raise DataError(f"{source if isinstance(source, (str, os.PathLike)) else 'it'} holds no batch normalization")
    return found if asked is None else _as(found, asked)


def _file(path: Path) -> Checkpoint:
    if path.is_dir():
        trees.refuse_folder(path)
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if start.startswith((b"\x89HDF", b"PK\x03\x04", b"{")):
        return keras.read(path)
    if start[:1] and (0x80 <= start[0] <= 0x8F or start[0] in (0xDE, 0xDF)):  # a map of msgpack
        return trees.read_flax(trees.read_msgpack(path))
    raise DataError(f"{path} is no file that is known; expected one of Keras or Flax")


def _as(found: Checkpoint, framework: str) -> Checkpoint:
    """The same layers, by another framework's convention where the file leaves it open."""
    if framework == found.framework:
        return found
    mine, asked = CONVENTIONS[found.framework], CONVENTIONS[framework]
    if mine.names != asked.names:
        raise InputError(f"got framework={framework!r}, but the content is that of {mine.title} ({found.kind})")
    layers = tuple(replace(f, variance="biased" if f.obstacle else asked.variance) for f in found.layers)
    return replace(found, framework=framework, layers=layers)
