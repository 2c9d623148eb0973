"""Files that hold named arrays, opened without the framework that wrote them, and without executing a pickle.

Each function returns a dictionary of arrays by name.
"""

from __future__ import annotations

import io
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from batchnorm.errors import DataError, InputError
from batchnorm.population.formats.conventions import CONVENTIONS
from batchnorm.population.formats.records import Array
from batchnorm.population.formats.values import bfloat16

JITTOR_END = b"HCAJSLHD"  # what Jittor writes behind its pickle and the pickle's SHA-1


def safetensors(path: Path) -> tuple[dict[str, Array], str]:
    """The arrays of a safetensors file, and the format that its metadata names."""
    from safetensors import SafetensorError, safe_open
    from safetensors.numpy import load_file

    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            half = any(file.get_slice(key).get_dtype() == "BF16" for key in file.keys())  # noqa: SIM118 - no mapping
        arrays = _with_bfloat16(path) if half else dict(load_file(path))
    except (SafetensorError, ValueError, OSError) as error:
        raise DataError(f"{path} is no safetensors file that can be read: {error}") from error
    return arrays, str(metadata.get("format", ""))


def _with_bfloat16(path: Path) -> dict[str, Array]:
    """By torch, since NumPy has no bfloat16."""
    from safetensors.torch import load_file

    tensors = load_file(path).items()
    return {key: (value.float() if value.is_floating_point() else value).numpy() for key, value in tensors}


def are_arrays(names: Sequence[str]) -> bool:
    """Whether a zip archive of these names is an ``.npz``."""
    return bool(names) and all(name.endswith(".npy") for name in names)


def npz(path: Path) -> dict[str, Array]:
    """The arrays of an ``.npz``, without those of Python objects, which are pickles: Chainer's missing weights."""
    arrays, refused = {}, []
    try:
        with np.load(path, allow_pickle=False) as file:
            for name in file.files:
                try:
                    arrays[name] = file[name]
                except ValueError as error:
                    if "Object arrays" not in str(error):
                        raise
                    refused.append(name)
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is no .npz of arrays that can be read: {error}") from error
    if refused and not arrays:
        raise DataError(f"{path} holds Python objects alone ({', '.join(refused[:5])}), which are pickles, not read")
    return arrays


def chainer_hdf5(path: Path) -> dict[str, Array]:
    """The vectors of batch normalizations in a file of `chainer.serializers.save_hdf5`; empty for any other file."""
    from batchnorm.population.formats.keras import h5py

    names = (*CONVENTIONS["chainer"].names, "N")
    arrays: dict[str, Array] = {}

    def visit(name: str, node: Any) -> None:
        if hasattr(node, "shape") and name.rpartition("/")[2] in names and "avg_mean" in node.parent:
            arrays[name] = np.asarray(node)

    try:
        with h5py("load_statistics").File(path, "r") as file:
            file.visititems(visit)
    except OSError:  # told by the reader of Keras' files
        return {}
    return arrays


def torch_file(path: Path) -> Any:
    """What `torch.load` reads with ``weights_only=True``."""
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise DataError(
            f"{path} is no file of torch that can be read without executing code; save model.state_dict(): {error}"
        ) from error


# Pickles of arrays


class _Type:
    """A dtype in a pickle: its code, and its byte order, which follows in its state."""

    def __init__(self, code: Any, *_: Any) -> None:
        if not (isinstance(code, str) and re.fullmatch(r"[<>|=]?([biufc]\d{1,2}|\?)", code)):
            raise pickle.UnpicklingError(f"it asks for arrays of {code!r}; expected numbers")
        self.made = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        if state[1] in ("<", ">"):
            self.made = self.made.newbyteorder(state[1])


class _Vector:
    """An array in a pickle. NumPy's own is not used: given any state it could hold pointers to objects."""

    def __init__(self, *_: Any) -> None:
        self.made: Array = np.zeros(0)

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, content = state
        if not isinstance(content, bytes):
            raise pickle.UnpicklingError("it holds an array of objects")
        self.made = np.frombuffer(content, kind.made).reshape(shape, order="F" if fortran else "C")


def _from_buffer(content: Any, kind: _Type, shape: Any, order: str) -> _Vector:
    """As pickles of protocol 5 make arrays."""
    vector = _Vector()
    vector.__setstate__((1, shape, kind, order == "F", bytes(content)))
    return vector


def _scalar(kind: _Type, content: bytes) -> Any:
    return np.frombuffer(content, kind.made)[0]


def _encode(text: str, encoding: str) -> bytes:
    """As pickles of protocol 2 hold bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding!r}")
    return text.encode("latin1")


def _same(value: Any) -> Any:
    return value


_ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Vector,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): dict,
    **{(module, "tuple"): tuple for module in ("builtins", "__builtin__")},  # Paddle's (name, array) of a tensor
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Vector for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
    ("jittor", "jittor_core.Var"): _same,
    **{(module, "Var"): _same for module in ("jittor_core", "jittor.jittor_core", "jittor_core.jittor_core")},
}


class _ArraysAlone(pickle.Unpickler):
    """Makes arrays of numbers, by the functions above, and nothing else: no other name is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _ADMITTED[module, name]


def _unwrapped(tree: Any) -> Any:
    """The tree with NumPy's arrays."""
    if isinstance(tree, _Vector):
        return tree.made
    if isinstance(tree, dict):
        return {key: _unwrapped(value) for key, value in tree.items()}
    if isinstance(tree, tuple) and len(tree) == 2 and isinstance(tree[0], str) and isinstance(tree[1], _Vector):
        return tree[1].made
    return [_unwrapped(each) for each in tree] if isinstance(tree, (list, tuple)) else tree


def pickled(path: Path) -> tuple[Any, bool]:
    """The arrays of a pickle that Paddle or Jittor wrote, and whether it was Jittor.

    Nothing in it is executed: names other than NumPy's constructors of arrays are refused.
    """
    content = path.read_bytes()
    jittor = content.endswith(JITTOR_END)
    try:
        tree = _ArraysAlone(io.BytesIO(content)).load()
    except Exception as error:  # a pickle can fail in any way
        raise InputError(
            f"{path} is a pickle that holds more than arrays, and it was not read: {error}. Write the arrays in its "
            "framework, numpy.savez('weights.npz', **{name: array}) or safetensors, and pass that file"
        ) from error
    return _unwrapped(tree), jittor


# MindSpore's checkpoints


_MINDSPORE_TYPES = {"Float32": "<f4", "Float64": "<f8", "Float16": "<f2", "Int32": "<i4", "Int64": "<i8", "Bool": "?"}


def fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf message: their numbers, and integers or bytes.

    Raises ValueError where the bytes are none.
    """
    return ((number, value) for number, value, _ in spans(message))


def spans(message: bytes) -> Iterator[tuple[int, Any, bytes]]:
    """As `fields`, each with the bytes of the whole field."""
    at = 0
    while at < len(message):
        start = at
        key, at = _varint(message, at)
        kind = key & 7
        value: Any
        if kind == 0:
            value, at = _varint(message, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            value, at = message[at : at + size], at + size
        elif kind == 2:
            size, at = _varint(message, at)
            value, at = message[at : at + size], at + size
        else:
            raise ValueError(f"wire type {kind}")
        if at > len(message) or not key >> 3:
            raise ValueError("cut off")
        yield key >> 3, value, message[start:at]


def field(number: int, value: bytes) -> bytes:
    """A field of bytes in a protobuf message."""
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value: int) -> bytes:
    """A number of a protobuf message."""
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(message) or shift > 63:
            raise ValueError("cut off")
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def mindspore(content: bytes) -> dict[str, Array]:
    """A checkpoint: ``repeated Value {tag = 1; TensorProto tensor = 2 {dims = 1; tensor_type = 2; content = 3}}``.

    Arrays of more than 512 MB lie in several values of one name. ValueError where the bytes are none.
    """
    parts: dict[str, tuple[list[int], str, list[bytes]]] = {}
    for number, value in fields(content):
        if number != 1 or not isinstance(value, bytes):
            continue
        entry = dict(fields(value))
        tensor = list(fields(entry[2]))
        dims = [d for n, v in tensor if n == 1 for d in (_packed(v) if isinstance(v, bytes) else [v])]
        kind, data = (next(v for n, v in tensor if n == number) for number in (2, 3))
        name = entry[1].decode()
        parts.setdefault(name, (dims, kind.decode(), []))[2].append(data)
    if not parts:
        raise ValueError("no arrays")
    return {name: _mindspore_array(*part) for name, part in parts.items()}


def _mindspore_array(dims: list[int], kind: str, data: list[bytes]) -> Array:
    content = b"".join(data)
    if kind == "BFloat16":
        return bfloat16(np.frombuffer(content, "V2")).reshape(dims)
    if kind not in _MINDSPORE_TYPES:  # what no batch normalization has
        return np.frombuffer(content, np.uint8)
    shape = () if dims == [0] else dims
    return np.frombuffer(content, _MINDSPORE_TYPES[kind]).reshape(shape)


def _packed(value: bytes) -> list[int]:
    numbers, at = [], 0
    while at < len(value):
        number, at = _varint(value, at)
        numbers.append(number)
    return numbers


# Equinox


_NPY = b"\x93NUMPY"


def npy_header(path: Path) -> bytes:
    """A first line before the arrays, in which people keep what the model is made of; nothing where there is none."""
    with path.open("rb") as file:
        line = file.readline()
        return line if not line.startswith(_NPY) and file.read(len(_NPY)) == _NPY else b""


def npy_sequence(path: Path) -> tuple[bytes, list[Array]]:
    """A first line, if any, and the arrays of a file in which one ``.npy`` follows another.

    `equinox.tree_serialise_leaves` writes such files.
    """
    header = npy_header(path)
    content = io.BytesIO(path.read_bytes()[len(header) :])
    arrays = []
    try:
        while content.tell() < len(content.getbuffer()):
            arrays.append(np.lib.format.read_array(content, allow_pickle=False))
    except (ValueError, EOFError, struct.error) as error:
        raise DataError(f"{path} is no sequence of .npy arrays: {error}") from error
    return header, arrays
