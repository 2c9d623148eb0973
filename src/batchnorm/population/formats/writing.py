"""Batch normalizations as other frameworks' files, by the conventions' names."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from batchnorm.errors import InputError, MissingDependencyError
from batchnorm.population.formats import caffe, darknet, equinox, haiku, keras_templates
from batchnorm.population.formats.containers import field, varint
from batchnorm.population.formats.conventions import CONVENTIONS, framework_key
from batchnorm.population.formats.keras import h5py
from batchnorm.population.formats.records import Array, ForeignBatchNorm

Layers = list[tuple[str, ForeignBatchNorm]]  # by their names there

_BY_SUFFIX = {
    ".weights.h5": "keras3",
    ".h5": "keras2",
    ".msgpack": "flax",
    ".pdparams": "paddle",
    ".ckpt": "mindspore",
    ".eqx": "equinox",
    ".caffemodel": "caffe",
    ".weights": "darknet",
}
_ALONE: dict[str, tuple[str, Callable[[Layers], bytes]]] = {
    "haiku": (".npz", haiku.write),
    "equinox": (".eqx", equinox.write),
    "caffe": (".caffemodel", caffe.write),
}
_ENDINGS = (".keras", *_BY_SUFFIX, ".hdf5", ".npz", ".pkl", ".safetensors")
_INTO: dict[str, Callable[[Path, Mapping[str, ForeignBatchNorm]], bytes]] = {
    "haiku": haiku.into,
    "equinox": equinox.into,
    "caffe": caffe.into,
    "darknet": darknet.into,
    "keras2": keras_templates.into,
    "keras3": keras_templates.into,
}
_NAMED = ("torch", "tinygrad", "mlx", "jittor", "pyg", "paddle", "mindspore", "chainer")


def framework_of(path: Path, framework: str | None, verb: str) -> str:
    """Whose file is to be written: as said, or as the name's end tells."""
    if framework is not None:
        return framework_key(framework)
    if path.suffix == ".keras":
        raise InputError(
            f"{verb}: {path.name} is to be a whole model of Keras; give like=, the model's .keras file, of which all "
            "but the batch normalizations stays, or write a .weights.h5"
        )
    for end, key in _BY_SUFFIX.items():
        if path.name.endswith(end):
            return key
    raise InputError(
        f"{verb}: {path.name} does not tell whose file it is; give framework=, or a name that ends in "
        f"{', '.join(_BY_SUFFIX)}"
    )


def content(layers: Layers, framework: str, path: Path, verb: str) -> bytes:
    """The bytes of the file."""
    write: Callable[[Layers, str], bytes]
    if framework in ("keras2", "keras3"):
        write = _keras3 if framework == "keras3" else _keras2
    elif framework in ("flax", "nnx"):
        write = _msgpack
    elif framework in _ALONE:
        end, write_alone = _ALONE[framework]
        if path.suffix != end:
            raise InputError(
                f"{verb}: {path.name}: files of {CONVENTIONS[framework].title} that are written end in {end}"
            )
        return write_alone(layers)
    elif framework in _NAMED:
        ends: dict[str, Callable[[Layers, str], bytes]] = {".safetensors": _safetensors, ".npz": _npz}
        ends |= {".pdparams": _pdparams} if framework == "paddle" else {}
        ends |= {".ckpt": _mindspore} if framework == "mindspore" else {}
        if path.suffix not in ends:
            raise InputError(
                f"{verb}: {path.name}: files of {CONVENTIONS[framework].title} that are written end in "
                f"{', '.join(ends)}"
            )
        write = ends[path.suffix]
    else:
        raise InputError(
            f"{verb}: weights of Darknet lie between those of the convolutions; give like=, a file of the same "
            "network, whose other numbers stay"
        )
    return write(layers, framework)


def content_like(template: Path, path: Path, framework: str, pairs: Mapping[str, ForeignBatchNorm], verb: str) -> bytes:
    """The bytes of the template, a file of a whole model, with the layers named in ``pairs`` replaced.

    They are a file of the template's kind, so the name of ``path`` must not promise another.
    """
    theirs, ours = (_ending(each.name) for each in (template, path))
    if theirs and ours and theirs != ours:
        raise InputError(
            f"{verb}: {path.name} would be a file as like={template.name} is; give it a name that ends in {theirs}"
        )
    if framework not in _INTO:
        raise InputError(
            f"{verb}: like= is for {', '.join(CONVENTIONS[key].title for key in _INTO)}; a file of "
            f"{CONVENTIONS[framework].title} holds layers by name, and the framework takes those it has"
        )
    return _INTO[framework](template, pairs)


def _ending(name: str) -> str:
    """What a file's name says of its kind; nothing if that is not told."""
    return next((end.replace(".hdf5", ".h5") for end in _ENDINGS if name.endswith(end)), "")


def arrays(layers: Layers, framework: str, separator: str = ".") -> dict[str, Array]:
    """The vectors under the framework's names, its counter included."""
    row = CONVENTIONS[framework]
    named: dict[str, Array] = {}
    for name, f in layers:
        prefix = f"{name}{separator}" if name else ""
        pairs = zip(row.names, (f.gamma, f.beta, f.mean, f.var), strict=True)
        named |= {prefix + key: value for key, value in pairs if value is not None}
        if row.counter and f.batches is not None:
            named[prefix + row.counter] = np.asarray(f.batches, np.int64)
    return named


def vectors(f: ForeignBatchNorm) -> dict[str, Array]:
    """Keras' names and what lies under them, in the order of ``layer.weights``."""
    pairs = zip(CONVENTIONS["keras3"].names, (f.gamma, f.beta, f.mean, f.var), strict=True)
    return {key: array for key, array in pairs if array is not None}


def tree(layers: Layers, framework: str = "flax") -> dict[str, Any]:
    """Nested variables of Flax: of linen in two collections, of nnx in one."""
    variables: dict[str, Any] = {"params": {}, "batch_stats": {}} if framework == "flax" else {}
    for name, f in layers:
        affine: dict[str, Any] = {"scale": f.gamma, "bias": f.beta}
        statistics: dict[str, Any] = {"mean": f.mean, "var": f.var}
        parts = [(variables, affine | statistics)]
        if framework == "flax":
            parts = [(variables["params"], affine), (variables["batch_stats"], statistics)]
        for node, entries in parts:
            for key in filter(None, name.split("/")):
                node = node.setdefault(key, {})
            node.update({key: value for key, value in entries.items() if value is not None})
    return variables


def _keras3(layers: Layers, _: str) -> bytes:
    """Groups ``vars`` at the paths of the layers, with the layer's name as attribute, and one at the root."""
    buffer = io.BytesIO()
    with h5py("save_statistics").File(buffer, "w") as file:
        file.create_group("vars")
        for i, (name, f) in enumerate(layers):
            group = file.create_group(name).create_group("vars")
            group.attrs["name"] = f"batch_normalization_{i}" if i else "batch_normalization"
            for j, array in enumerate(vectors(f).values()):
                group.create_dataset(str(j), data=array)
    return buffer.getvalue()


def _keras2(layers: Layers, _: str) -> bytes:
    buffer = io.BytesIO()
    with h5py("save_statistics").File(buffer, "w") as file:
        file.attrs["layer_names"] = [name.encode() for name, _ in layers]
        for name, f in layers:
            group = file.create_group(name.replace("/", "_"))
            group.attrs["weight_names"] = [f"{name}/{key}:0".encode() for key in vectors(f)]
            for key, array in vectors(f).items():
                group.create_dataset(f"{name}/{key}:0", data=array)
    return buffer.getvalue()


def _msgpack(layers: Layers, framework: str) -> bytes:
    """As `flax.serialization.to_bytes`: an array is extension 1, packed as (shape, dtype, bytes)."""
    try:
        import msgpack
    except ImportError as error:
        raise MissingDependencyError("save_statistics: files of Flax need msgpack; pip install msgpack") from error

    def pack(value: Any) -> Any:
        return msgpack.ExtType(1, msgpack.packb((value.shape, value.dtype.name, value.tobytes()), use_bin_type=True))

    packed: bytes = msgpack.packb(tree(layers, framework), default=pack, strict_types=True)
    return packed


def _safetensors(layers: Layers, framework: str) -> bytes:
    from safetensors.numpy import save

    form = {"mlx": "mlx", "mindspore": "ms"}.get(framework, "pt")
    metadata = None if framework == "tinygrad" else {"format": form}
    return save({key: np.ascontiguousarray(value) for key, value in arrays(layers, framework).items()}, metadata)


def _npz(layers: Layers, framework: str) -> bytes:
    buffer, separator = io.BytesIO(), "/" if framework == "chainer" else "."
    named: dict[str, Any] = dict(arrays([(n.replace(".", separator), f) for n, f in layers], framework, separator))
    if framework == "chainer":
        named |= {f"{n.replace('.', '/')}/N": np.asarray(f.batches or 0) for n, f in layers}
    np.savez(buffer, **named)
    return buffer.getvalue()


def _pdparams(layers: Layers, framework: str) -> bytes:
    return pickle.dumps(arrays(layers, framework), 4)


def _mindspore(layers: Layers, framework: str) -> bytes:
    """The messages that `containers.mindspore` reads."""

    def tensor(array: Array) -> bytes:
        dims = b"".join(b"\x08" + varint(size) for size in array.shape)
        return dims + field(2, b"Float32") + field(3, array.astype("<f4").tobytes())

    named = arrays(layers, framework)
    return b"".join(field(1, field(1, key.encode()) + field(2, tensor(value))) for key, value in named.items())


def default_names(names: list[str], framework: str, given: Mapping[str, str]) -> list[str]:
    """The layers' names there: as given, else ours, or, of Keras 3, the paths in a Sequential model."""
    made = []
    for i, name in enumerate(names):
        if framework == "keras3":
            own = f"layers/batch_normalization_{i}" if i else "layers/batch_normalization"
        elif framework == "haiku":
            own = name.replace(".", "/") or "batch_norm"
        elif framework == "caffe":
            own = name.replace(".", "/") or "bn"
        elif framework in ("flax", "nnx"):
            own = name.replace(".", "/") or ("BatchNorm_0" if framework == "flax" else "")
        elif framework == "keras2":
            own = name or "batch_normalization"
        else:
            own = name
        made.append(given.get(name, own))
    return made
