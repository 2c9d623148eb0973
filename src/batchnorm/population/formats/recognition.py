"""What a file or a state is, by its content."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from batchnorm.errors import DataError, InputError
from batchnorm.population.formats import caffe, containers, darknet, equinox, haiku, keras, orbax, states, trees
from batchnorm.population.formats.conventions import CONVENTIONS, Convention, framework_key
from batchnorm.population.formats.records import Checkpoint, ForeignBatchNorm
from batchnorm.population.formats.values import nested

_TABLE_END = bytes.fromhex("57fb808b247547db")  # of the .index file of a TensorFlow checkpoint


def read(source: Any, framework: str | None = None, decay: float | None = None) -> Checkpoint:
    """The batch normalizations of a file, a folder or a state.

    Args:
        source: a path, a nested dictionary, a pair (parameters or model, state), or an object that holds one.
        framework: whose it is; None: by its content.
        decay: share of the old statistics, for files from whose raw averages inference must be computed.
    """
    asked = None if framework is None else framework_key(framework)
    found = _file(Path(source), asked, decay) if isinstance(source, (str, os.PathLike)) else _state(source, asked)
    return found if asked is None else _as(found, asked)


def _state(source: Any, asked: str | None) -> Checkpoint:
    source = trees.of_module(source)
    if isinstance(source, tuple) and len(source) == 2:
        if hasattr(source[1], "get") and not isinstance(source[1], Mapping):
            return _known(equinox.of_pair(*source), source[0])
        if all(isinstance(each, Mapping) for each in source) and haiku.is_state(source[1]):
            return _known(haiku.of_pair(*source), source[1])
    if isinstance(source, tuple):
        source = trees.of_split(source) or source
    if not isinstance(source, Mapping) and not trees.is_state(source):
        raise InputError(
            f"got a {type(source).__name__}; expected a path, a dictionary of arrays, a state of Flax, or a pair "
            "(params, state) of Haiku, (params, batch_stats) of Flax or (model, state) of Equinox"
        )
    found = trees.read(source)
    if found is None and isinstance(source, Mapping):
        found = states.read(source, "dictionary of arrays", _alike(asked), ordered=True)
    return _known(found, source)


def _known(found: Checkpoint | None, names: Any, kind: str = "the state") -> Checkpoint:
    if found is None or not found.layers:
        raise states.nothing(kind, names if isinstance(names, Mapping) else [type(names).__name__])
    return found


def _alike(asked: str | None) -> str | None:
    """The framework asked for, where its arrays have names that `states` knows."""
    return None if asked in (None, "keras2", "keras3", "flax", "nnx", "equinox") else asked


def _file(path: Path, asked: str | None, decay: float | None) -> Checkpoint:
    if path.is_dir():
        return _folder(path)
    try:
        with path.open("rb") as file:
            start = file.read(16)
            file.seek(-min(8, path.stat().st_size), os.SEEK_END)
            end = file.read(8)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error})") from error
    if start.startswith(b"\x89HDF") and (arrays := containers.chainer_hdf5(path)):
        return _known(states.read(arrays, "HDF5", "chainer", ordered=True), arrays, str(path))
    if start.startswith(b"\x93NUMPY") or (start.startswith(b"{") and containers.npy_header(path)):
        return equinox.of_leaves(containers.npy_sequence(path)[1], decay)
    if start.startswith((b"\x89HDF", b"{")):
        return _known(keras.read(path), {}, str(path))
    if start.startswith(b"PK\x03\x04"):
        return _zip(path, asked)
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
        return _safetensors(path, asked)
    if end == _TABLE_END:
        raise InputError(f"{path} is the index of a TensorFlow checkpoint. {trees.WRITE_KERAS}")
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return _pickle(path, asked)
    if start[:1] and (0x80 <= start[0] <= 0x8F or start[0] in (0xDE, 0xDF)):  # a map of msgpack
        tree = trees.read_msgpack(path)
        found = trees.read(tree) or states.read(tree, "file of msgpack", _alike(asked))
        return _known(found, tree, str(path))
    if start[:1] == b"\x0a" or start[:2] == b"\xa2\x06":
        return _protobuf(path)
    if darknet.is_header(start) and (asked == "darknet" or path.suffix == ".weights"):
        return _known(darknet.read(path), {}, str(path))
    if path.suffix == ".onnx":
        raise DataError(
            f"{path} is an ONNX model, from which no statistics are loaded; `batchnorm fold {path}` folds them into "
            "its layers, and to train on, load the file of the framework that exported it"
        )
    raise DataError(f"{path} is no file that is known: it starts with {start!r}")


def _folder(path: Path) -> Checkpoint:
    """A checkpoint of orbax; any other folder is refused with what to do instead."""
    if not orbax.items(path):
        trees.refuse_folder(path)
    tree = orbax.read(path)
    kind = "folder of orbax"
    found = trees.read(tree) or states.read(tree, kind)
    return _known(None if found is None else replace(found, kind=f"{kind}, {found.kind}"), tree, str(path))


def _zip(path: Path, asked: str | None) -> Checkpoint:
    """A Keras archive, a file of torch, or an ``.npz``."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise DataError(f"{path} is no zip archive that can be read: {error}") from error
    if "config.json" in names:
        return _known(keras.read(path), {}, str(path))
    if any(name.endswith("data.pkl") for name in names):
        return _of_torch(containers.torch_file(path), path, asked)
    if containers.are_arrays(names):
        arrays = containers.npz(path)
        found = states.read(arrays, ".npz", _alike(asked))
        if found is not None and found.framework == "torch" and asked is None:  # torch writes none
            found = states.read(arrays, ".npz", "mlx")
        return _known(found or trees.read(nested(arrays)), arrays, str(path))
    raise DataError(f"{path} is a zip archive of {', '.join(sorted(names)[:5])}; expected one of Keras, torch or NumPy")


def _of_torch(content: Any, path: Path, asked: str | None) -> Checkpoint:
    if hasattr(content, "state_dict"):
        content = content.state_dict()
    if not isinstance(content, Mapping):
        raise DataError(f"{path} holds a {type(content).__name__}; expected a state_dict")
    state = _of_model(content)
    return _known(states.read(state, "file of torch", _alike(asked), ordered=True), state, str(path))


def _of_model(content: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """The state of the model in a dictionary that holds more, such as a step and the state of an optimizer."""

    def has_means(value: Any) -> bool:
        means = ("running_mean", "_mean", "moving_mean")
        return isinstance(value, Mapping) and any(str(key).endswith(means) for key in value)

    inside = [] if has_means(content) else [value for value in content.values() if has_means(value)]
    return inside[0] if len(inside) == 1 else content


def _safetensors(path: Path, asked: str | None) -> Checkpoint:
    arrays, form = containers.safetensors(path)
    told = {"ms": "mindspore", "mlx": "mlx"}.get(form)
    found = states.read(arrays, ".safetensors", _alike(asked) or told)
    counted = any(name.endswith("num_batches_tracked") for name in arrays)
    if found is not None and found.framework == "torch" and asked is None and not counted and form != "pt":
        found = states.read(arrays, ".safetensors", "mlx")
    return _known(found or trees.read(nested(arrays)), arrays, str(path))


def _pickle(path: Path, asked: str | None) -> Checkpoint:
    """Of Paddle or Jittor, or of torch before 1.6, which it reads itself."""
    with path.open("rb") as file:
        start = file.read(64)
    if b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." in start:  # torch's magic number
        return _of_torch(containers.torch_file(path), path, asked)
    tree, jittor = containers.pickled(path)
    if isinstance(tree, list) and len(tree) == 2 and all(isinstance(each, Mapping) for each in tree):
        pair = _state(tuple(tree), asked)
        return replace(pair, kind=f"pickle of arrays, {pair.kind}")
    if not isinstance(tree, Mapping):
        raise DataError(f"{path} holds a {type(tree).__name__}; expected a dictionary of arrays, or a pair of them")
    tree = _of_model(tree)
    found = states.read(tree, "pickle of arrays", _alike(asked) or ("jittor" if jittor else None), ordered=True)
    return _known(found or trees.read(tree), tree, str(path))


def _protobuf(path: Path) -> Checkpoint:
    """A model of Caffe or a checkpoint of MindSpore."""
    content = path.read_bytes()
    layers = caffe.layers_of(content)
    if layers is not None:
        return _known(caffe.read(layers, path), {layer.name: layer for layer in layers}, str(path))
    try:
        arrays = containers.mindspore(content)
    except (ValueError, KeyError, StopIteration, UnicodeDecodeError, AttributeError, TypeError) as error:
        raise DataError(f"{path} is no checkpoint of MindSpore that can be read: {error!r}") from error
    return _known(states.read(arrays, "checkpoint", "mindspore", ordered=True), arrays, str(path))


def _as(found: Checkpoint, framework: str) -> Checkpoint:
    """The same layers, by another framework's convention where the file leaves it open."""
    if framework == found.framework:
        return found
    mine, asked = CONVENTIONS[found.framework], CONVENTIONS[framework]
    if mine.names != asked.names:
        raise InputError(f"got framework={framework!r}, but the content is that of {mine.title} ({found.kind})")
    layers, doubtful = (tuple(_turned(f, asked) for f in side) for side in (found.layers, found.doubtful))
    notes = tuple(note for note in found.notes if not note.endswith("is assumed"))
    return replace(found, framework=framework, layers=layers, doubtful=doubtful, notes=notes)


def _turned(layer: ForeignBatchNorm, asked: Convention) -> ForeignBatchNorm:
    if layer.obstacle == keras.BY_STEP and asked is CONVENTIONS["keras2"]:
        layer = replace(layer, obstacle=None)
    return replace(layer, variance="biased" if layer.obstacle else asked.variance)
