"""Files of torch.save read as tensors and plain containers, by an interpreter that can call nothing else.

The zip's members and the pickle's operations and names are compared with what torch.save writes for such values; the
names stand for functions of this module, so that no name of a file is ever looked up.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


OPERATIONS = _words(
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE "
    "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS BINPUT "
    "LONG_BINPUT MEMOIZE BINGET LONG_BINGET EMPTY_SET ADDITEMS GLOBAL STACK_GLOBAL BINPERSID REDUCE BUILD"
)
"""What pickles of tensors and plain containers consist of, in protocols 2 to 5."""

_PARTS = re.compile(
    r"data\.pkl|data/\d{1,9}|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id"
)
_LOCATION = re.compile(r"(cpu|cuda|mps|xpu)(:\d{1,2})?")
_DEEPEST, _MOST = 50, 100_000
_DTYPES = {
    name: value
    for name in _words(
        "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu "
        "complex32 complex64 complex128 bool uint8 int8 int16 int32 int64 uint16 uint32 uint64"
    )
    if (value := getattr(torch, name, None)) is not None
}
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
}


class NotPlainError(ValueError):
    """The data hold something else than tensors and plain containers."""


class LostValuesError(NotPlainError):
    """A tensor has fewer or other bytes than its dtype and sizes need."""


def zip_members(data: bytes) -> dict[str, bytes]:
    """The members of an uncompressed zip archive by name, without the folder that holds all of them.

    Raises:
        NotPlainError: no such archive, with the name of the member.
    """
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
    except Exception as error:  # zipfile raises more than BadZipFile on damaged directories
        raise NotPlainError(f"it is no zip archive ({error})") from error
    members: dict[str, bytes] = {}
    total, roots = 0, set()
    with archive:
        for info in archive.infolist():
            root, _, name = info.filename.partition("/")
            total += info.file_size
            roots.add(root)
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
                raise NotPlainError(f"member {info.filename!r} is compressed or encrypted")
            if not name or name in members or info.orig_filename != info.filename:
                raise NotPlainError(f"member {info.filename!r} has no name of its own inside one folder")
            if total > len(data) or len(roots) > 1:
                raise NotPlainError(f"member {info.filename!r} claims bytes or a folder that the archive does not have")
            try:
                members[name] = archive.read(info)
            except Exception as error:
                raise NotPlainError(f"member {info.filename!r} is damaged ({error})") from error
    if not members:
        raise NotPlainError("it is an empty zip archive")
    return members


def load_plain(data: bytes) -> Any:
    """What a file of torch.save holds, where it holds tensors, numbers, strings, tuples, lists and dicts.

    Raises:
        NotPlainError: it holds anything else.
    """
    members = zip_members(data)
    for name in members:
        if not _PARTS.fullmatch(name):
            raise NotPlainError(f"its member {name!r} is none that torch.save writes")
    if members.get("byteorder", b"little") != b"little":
        raise NotPlainError("its numbers are not little-endian")
    if "data.pkl" not in members:
        raise NotPlainError("its member 'data.pkl' is missing")
    pickled = members["data.pkl"]
    _check_operations(pickled)
    try:
        value = _Reader(pickled, members).load()
    except NotPlainError:
        raise
    except Exception as error:  # whatever a damaged pickle makes the interpreter raise
        raise NotPlainError(f"its pickle is damaged ({type(error).__name__}: {error})") from error
    _check_value(value)
    return value


def _check_operations(pickled: bytes) -> None:
    """Refuse operations that plain values do not need, and claims beyond the pickle's own length."""
    try:
        for operation, argument, _ in pickletools.genops(pickled):
            if operation.name not in OPERATIONS:
                raise NotPlainError(f"its pickle has the operation {operation.name}, which plain tensors do not need")
            if operation.name == "GLOBAL":
                _meaning(*str(argument).split(" ", 1))
            elif operation.name == "LONG_BINPUT" and int(str(argument)) > len(pickled):
                raise NotPlainError("its pickle claims more entries than it has bytes")
    except NotPlainError:
        raise
    except Exception as error:
        raise NotPlainError(f"its pickle is damaged ({error})") from error


@dataclass(frozen=True)
class _Storage:
    """Bytes of a storage, the dtype of its elements where the file says it, and the device that it was on."""

    data: bytearray
    dtype: torch.dtype | None
    location: str

    def tensor(self, dtype: torch.dtype | None, offset: Any, size: Any, stride: Any) -> Tensor:
        dtype = self.dtype or dtype
        numbers = (offset, *size, *stride)
        if dtype is None or not all(type(n) is int and n >= 0 for n in numbers) or len(size) != len(stride):
            raise NotPlainError("a tensor of its pickle has no sizes and strides of its own")
        if 0 in size:
            flat = torch.empty(0, dtype=dtype).new_empty(size)
        else:
            flat = torch.frombuffer(self.data, dtype=torch.uint8).view(dtype).as_strided(size, stride, offset)
        return flat if self.location == "cpu" else flat.to(self.location)


class _Reader(pickle._Unpickler):
    """Unpickling where each name stands for a function or a dtype of this module, and storages for bytes.

    It is Python's own interpreter in Python, because that of C leaves no operation to its subclasses.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, pickled: bytes, members: dict[str, bytes]) -> None:
        super().__init__(io.BytesIO(pickled))
        self._members = members
        self._storages: dict[str, bytearray] = {}

    def load_build(self) -> None:
        """The attributes of a state dict are its metadata; no other object gets any."""
        attributes = self.stack.pop()  # type: ignore[attr-defined]
        made = self.stack[-1]  # type: ignore[attr-defined]
        if type(made) is not OrderedDict or type(attributes) is not dict or attributes.keys() != {"_metadata"}:
            raise NotPlainError("its pickle gives attributes to something else than a state dict")
        _check_value(attributes["_metadata"])
        made._metadata = attributes["_metadata"]  # type: ignore[attr-defined]

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str) -> Any:
        return _meaning(module, name)

    def persistent_load(self, key: Any) -> _Storage:
        if not (isinstance(key, tuple) and len(key) == 5 and key[0] == "storage" and isinstance(key[1], _StorageKind)):
            raise NotPlainError("its pickle refers to something else than a storage")
        _, kind, number, location, count = key
        name = f"data/{number}"
        if name not in self._members or not isinstance(location, str) or not _LOCATION.fullmatch(location):
            raise NotPlainError(f"its storage {name!r} is missing or on an unknown device")
        if name not in self._storages:
            self._storages[name] = bytearray(self._members[name])
        data = self._storages[name]
        if type(count) is not int or count * kind.itemsize != len(data):
            raise LostValuesError(f"its storage {name!r} has {len(data)} bytes where {count} elements are claimed")
        if kind.dtype is torch.bool and data.strip(b"\0\1"):
            raise LostValuesError(f"its storage {name!r} has bytes that are no bools")
        return _Storage(data, kind.dtype, location)


@dataclass(frozen=True)
class _StorageKind:
    dtype: torch.dtype | None

    @property
    def itemsize(self) -> int:
        return 1 if self.dtype is None else int(self.dtype.itemsize)


def _tensor(storage: _Storage, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, *more: Any) -> Tensor:
    dtypes = [value for value in more if isinstance(value, torch.dtype)]
    if hooks or any(value for value in more if not isinstance(value, torch.dtype)) or type(grad) is not bool:
        raise NotPlainError("a tensor of its pickle carries hooks or metadata")
    dtype = dtypes[0] if dtypes else None
    if dtype is torch.bool and storage.dtype is None and storage.data.strip(b"\0\1"):
        raise NotPlainError("a storage of its pickle has bytes that are no bools")
    return storage.tensor(dtype, offset, size, stride).requires_grad_(grad)


def _with_attributes(make: Any, kind: Any, arguments: Any, attributes: Any) -> Tensor:
    """A tensor that carried attributes, as torch.export marks example inputs of open sizes; without them."""
    if make not in (_tensor, _parameter) or kind != "Tensor":
        raise NotPlainError("a tensor of its pickle is of a class of its own")
    return make(*arguments)  # type: ignore[no-any-return]


def _set(values: Any = ()) -> set[Any]:
    return set(values)


def _parameter(data: Tensor, grad: Any, hooks: Any) -> Tensor:
    if hooks or not isinstance(data, Tensor):
        raise NotPlainError("a parameter of its pickle carries hooks")
    return data.detach().requires_grad_(bool(grad))


def _device(kind: Any, index: Any = 0) -> torch.device:
    if not isinstance(kind, str) or not _LOCATION.fullmatch(kind) or type(index) is not int:
        raise NotPlainError("its pickle names an unknown device")
    return torch.device(kind, index) if index else torch.device(kind)


def _size(values: Any = ()) -> torch.Size:
    return torch.Size([int(value) for value in values])


def _meaning(module: str, name: str) -> Any:
    known: dict[tuple[str, str], Any] = {
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        ("torch._utils", "_rebuild_tensor_v3"): _tensor,
        ("torch._utils", "_rebuild_parameter"): _parameter,
        ("torch._tensor", "_rebuild_from_type_v2"): _with_attributes,
        ("torch", "Tensor"): "Tensor",
        ("__builtin__", "set"): _set,
        ("collections", "OrderedDict"): OrderedDict,
        ("torch", "device"): _device,
        ("torch", "Size"): _size,
        ("torch.storage", "UntypedStorage"): _StorageKind(None),
    }
    if (module, name) in known:
        return known[module, name]
    if module == "torch" and name in _DTYPES:
        return _DTYPES[name]
    if module in ("torch", "torch.storage") and name in _STORAGES:
        return _StorageKind(_STORAGES[name])
    raise NotPlainError(f"its pickle names {module}.{name}, which is neither a tensor nor a plain container")


def _check_value(value: Any) -> None:
    for item in _parts(value):
        if isinstance(item, dict):
            if not all(type(key) in (str, int) for key in item):
                raise NotPlainError("a dict has a key that is neither a string nor an integer")
        elif item is not None and not isinstance(
            item, (Tensor, bool, int, float, str, list, tuple, torch.dtype, torch.device)
        ):
            raise NotPlainError(f"it holds a {type(item).__name__}")


def plain_texts(value: Any) -> Iterator[str]:
    """All strings in a value of `load_plain`, keys included."""
    for item in _parts(value):
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            yield from (key for key in item if isinstance(key, str))


def _parts(value: Any) -> Iterator[Any]:
    count, waiting = 0, [(value, 0)]
    while waiting:
        item, depth = waiting.pop()
        count += 1
        if depth > _DEEPEST or count > _MOST:
            raise NotPlainError(
                f"its containers are nested more than {_DEEPEST} deep, or hold more than {_MOST} values"
            )
        yield item
        children = item.values() if isinstance(item, dict) else item if isinstance(item, (list, tuple)) else ()
        waiting += [(child, depth + 1) for child in children]
