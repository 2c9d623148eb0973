"""Where samples are read from: arrays in memory, and files that are read row by row, in bounded memory."""

from __future__ import annotations

import math
import os
import tempfile
import weakref
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt

from batchnorm.data.features import Column, columns_of, few, holds_numbers
from batchnorm.data.files import ARROW, PARQUET, File
from batchnorm.errors import DataError, MissingDependencyError
from batchnorm.memory import free_memory
from batchnorm.writing import in_bytes

Array = npt.NDArray[Any]

BLOCK = 8 << 20  # bytes that are read at a time
LARGEST_IN_MEMORY = 2 << 30  # bytes of samples in float64, where memory allows
ARROW_FILES = PARQUET + ARROW


class Source(Protocol):
    """Samples that are read by their places."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, *sample)."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of what `read` returns."""

    def read(self, places: Array) -> Array:
        """The samples at these places (int64), in their order."""


class InMemory:
    """An array, or a memory map that somebody else has opened."""

    columns: tuple[str, ...] = ()  # the names of the features of a table

    def __init__(self, array: Array) -> None:
        self.array = array

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.array.dtype

    def read(self, places: Array) -> Array:
        return np.asarray(self.array[places])


class RowsOfFile:
    """Rows of fixed size in a file, read with plain reads: a memory map would count as this process's memory.

    Args:
        file: open for reading; it may be closed afterwards.
        offset: of the first row, in bytes.
        shape, dtype: of the whole array, in C order.
        name: for messages.
    """

    def __init__(self, file: IO[bytes], offset: int, shape: tuple[int, ...], dtype: np.dtype[Any], name: str) -> None:
        self._offset, self.shape, self.dtype, self._name = offset, shape, dtype, name
        self._number = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._number)
        self._row = dtype.itemsize * math.prod(shape[1:])

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    columns: tuple[str, ...] = ()

    def read(self, places: Array) -> Array:
        found = np.empty((len(places), *self.shape[1:]), self.dtype)
        into = memoryview(found.reshape(-1).view(np.uint8).data) if found.size else memoryview(b"")
        ends = np.flatnonzero(np.diff(places) != 1) + 1  # runs of neighbours are one read
        for start, end in zip([0, *ends.tolist()], [*ends.tolist(), len(places)], strict=True):
            if end > start:
                self._fill(into[start * self._row : end * self._row], self._offset + int(places[start]) * self._row)
        return found

    def _fill(self, into: memoryview, offset: int) -> None:
        while into:
            try:
                done = os.preadv(self._number, [into], offset)
            except OSError as error:
                raise DataError(f"data {self._name}: it cannot be read ({error.strerror or error}).") from error
            if not done:
                raise DataError(f"data {self._name}: it has become shorter while it was read.")
            into, offset = into[done:], offset + done


def in_blocks(source: Source) -> Iterator[tuple[int, Array]]:
    """All samples in their order, some megabytes at a time, each block with the place of its first sample."""
    rows = max(1, BLOCK // max(1, source.dtype.itemsize * math.prod(source.shape[1:])))
    for start in range(0, source.shape[0], rows):
        yield start, source.read(np.arange(start, min(start + rows, source.shape[0])))


def fits_in_memory(shape: tuple[int, ...]) -> bool:
    """Whether an array of that shape can be prepared in memory: in float64, in a quarter of what is free."""
    free = free_memory()
    return 8 * math.prod(shape) <= min(LARGEST_IN_MEMORY, free / 4 if free is not None else math.inf)


def too_large(name: str, part: str, shape: tuple[int, ...], dtype: np.dtype[Any], remedy: str) -> DataError:
    """The error of an array that memory has no room for, with sizes."""
    free = free_memory()
    have = "" if free is None else f", and {in_bytes(free)} of memory are free"
    size = in_bytes(dtype.itemsize * math.prod(shape))
    return DataError(f"data {name}: {part} of shape {shape} and dtype {dtype} needs {size}{have}. {remedy}")


def open_npy(path: Path) -> Source:
    """The array of a .npy file, which is read when it is asked for; ValueError where the header lies or is damaged."""
    with path.open("rb") as file:
        shape, fortran, dtype = read_header(file)
        offset = file.tell()
        size = dtype.itemsize * math.prod(shape)
        held = os.fstat(file.fileno()).st_size - offset
        if held < size:
            raise ValueError(
                f"its header claims {shape} of {dtype}, {in_bytes(size)}, and the file holds {in_bytes(held)}"
            )
        rows = RowsOfFile(file, offset, shape, dtype, str(path))
    if fortran and len(shape) > 1:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        return InMemory(np.ascontiguousarray(array) if fits_in_memory(shape) else array)
    return InMemory(rows.read(np.arange(shape[0]))) if shape and fits_in_memory(shape) else rows


def open_member(archive: zipfile.ZipFile, member: str, name: str) -> Source:
    """An array of a .npz file; one that is larger than memory is unpacked to a temporary file."""
    with archive.open(member) as stream:
        shape, fortran, dtype = read_header(stream)
        size = dtype.itemsize * math.prod(shape)
        if not shape or (fits_in_memory(shape) and size <= archive.getinfo(member).file_size):
            with archive.open(member) as again:
                return InMemory(np.lib.format.read_array(again, allow_pickle=False))
        if archive.getinfo(member).file_size < size:
            raise ValueError(f"its header claims {shape} of {dtype}, {in_bytes(size)}, and the file holds less")
        if fortran and len(shape) > 1:
            raise too_large(name, f"array {member!r}", shape, dtype, "Save it in C order, which is read in parts.")
        row = dtype.itemsize * math.prod(shape[1:])
        spool = Spool(name)
        for start in range(0, shape[0], rows := max(1, BLOCK // max(1, row))):
            count = min(rows, shape[0] - start)
            content = stream.read(count * row)
            spool.add(np.frombuffer(content, dtype).reshape(count, *shape[1:]))
        return spool.finish()


def read_header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, Fortran order and dtype of what `numpy.save` wrote; ValueError for objects."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if dtype.hasobject:
        raise ValueError("Object arrays cannot be loaded when allow_pickle=False")
    return tuple(int(size) for size in shape), fortran, dtype


def _holds(dtype: np.dtype[Any], rows: Array) -> bool:
    """Whether rows can take that dtype: floats are rounded, but no integer and no text becomes another."""
    if np.can_cast(rows.dtype, dtype, "safe"):
        return True
    if not np.can_cast(rows.dtype, dtype, "same_kind"):
        return False
    return rows.dtype.kind == "f" or bool((rows.astype(dtype) == rows).all())


class Spool:
    """Rows that arrive one after another: in memory while they are few, then in a temporary file without a name.

    They keep the dtype of the first, where it holds the values of the others; texts may become longer.

    Args:
        name: for messages.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._parts: list[Array] = []
        self._file: IO[bytes] | None = None
        self._rows = 0
        self._like: Array | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing has arrived."""
        return self._like is None

    def add(self, rows: Array) -> None:
        """Take more rows; all are of one shape and get the dtype of the first."""
        if self._like is None:
            self._like = rows[:0].copy()
        if rows.shape[1:] != self._like.shape[1:]:
            raise DataError(
                f"data {self._name}: a sample of shape {rows.shape[1:]} follows those of shape {self._like.shape[1:]}; "
                "expected one shape. Pad or crop them."
            )
        texts = rows.dtype.kind == self._like.dtype.kind and rows.dtype.kind in "US"
        if texts and self._file is None:
            self._like = self._like.astype(np.promote_types(rows.dtype, self._like.dtype))
        elif not _holds(self._like.dtype, rows):
            raise DataError(f"data {self._name}: dtype {rows.dtype} follows {self._like.dtype}; expected one dtype.")
        self._rows += len(rows)
        rows = np.ascontiguousarray(rows, self._like.dtype)
        if self._file is None:
            self._parts.append(rows.copy())
            if not fits_in_memory((self._rows, *self._like.shape[1:])):
                self._spill()
        else:
            self._write(rows)

    def finish(self) -> InMemory | RowsOfFile:
        """All rows."""
        if self._like is None:
            raise DataError(f"data {self._name}: it has no samples.")
        if self._file is None:
            return InMemory(np.concatenate(self._parts))
        with self._file as file:
            file.flush()
            return RowsOfFile(file, 0, (self._rows, *self._like.shape[1:]), self._like.dtype, self._name)

    def _spill(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="batchnorm-")  # noqa: SIM115, it lives as long as its rows
        assert self._like is not None
        for part in self._parts:
            self._write(np.ascontiguousarray(part, self._like.dtype))
        self._parts.clear()

    def _write(self, rows: Array) -> None:
        assert self._file is not None
        try:
            self._file.write(rows.data if rows.size else b"")
        except OSError as error:
            raise DataError(
                f"data {self._name}: it does not fit into memory, and of its copy in {tempfile.gettempdir()} "
                f"{in_bytes(self._file.tell())} could be written ({error.strerror or error}). Let TMPDIR name a folder "
                "with more room, or give the samples as a .npy file, which is read where it lies."
            ) from error


def open_table(
    path: Path, target: str | None, *, labelled: bool = True, columns: Sequence[str] = ()
) -> dict[str, Source]:
    """x and y of a Parquet or Arrow file: the columns of numbers, and the column of labels or targets.

    Args:
        path: the file.
        target: the column of labels; None: the one that is called y, label, target or class.
        labelled: whether there has to be such a column; without it labels that cannot be used are left out.
        columns: those of the features, in the order in which they are wanted; (): all others, as they stand.

    Raises:
        DataError: no such column, or a column of features that holds no numbers.
        MissingDependencyError: pyarrow is not installed.
    """
    x, y = Spool(str(path)), Spool(str(path))
    blocks = File(path).blocks(numbers=False)
    usable = True
    try:
        for block in blocks:
            label, features = _label_and_features(path, block.schema, target, labelled, columns)
            _refuse_missing(path, block, features)
            x.add(_rows_of_columns(path, columns_of(block, features, str(path))))
            if label is not None:
                try:
                    _refuse_missing(path, block, [label])
                    y.add(_labels(path, block, label))
                except DataError:
                    if labelled:
                        raise
                    usable = False
    except MissingDependencyError:
        raise
    except DataError as error:
        text = str(error)
        raise error if text.startswith("data ") else DataError(f"data {text}") from error
    samples = x.finish()
    if len(samples.shape) == 2 and samples.shape[1] == len(features):
        samples.columns = tuple(features)
    return {"x": samples} if not labelled and (y.is_empty or not usable) else {"x": samples, "y": y.finish()}


def column_names_of(path: Path) -> list[str]:
    """The names of the columns of a Parquet or Arrow file; none of one that cannot be read."""
    try:
        return list(next(iter(File(path).blocks(numbers=False))).schema.names)
    except (DataError, OSError, StopIteration):
        return []


def _label_and_features(
    path: Path, schema: Any, target: str | None, labelled: bool, columns: Sequence[str]
) -> tuple[str | None, list[str]]:
    """The names of the column of labels, and of the others (or of `columns`), which all hold numbers."""
    names = list(schema.names)
    likely = [n for n in ("y", "label", "target", "class") if n in names and n not in columns]
    label = target if target is not None else next(iter(likely), None)
    if (label is None and labelled) or (label is not None and label not in names):
        raise DataError(
            f"data {path}: no column {label or 'y, label, target or class'}, it has {', '.join(names[:20])}. Name "
            "the column of the labels with --labels."
        )
    if absent := [name for name in columns if name not in names]:
        raise DataError(
            f"data {path}: it lacks {len(absent)} of the run's features: {few(absent)}; its columns are {few(names)}."
        )
    features = list(columns) or [name for name in names if name != label]
    if columns:
        names = [*features, label] if label is not None else features
    if not features or (label is not None and len(names) - len(features) > 1):
        what = "no column but" if not features else "several columns"
        raise DataError(f"data {path}: {what} {label!r}; expected columns of numbers beside one of labels.")
    for name in features:
        kind = schema.field(schema.names.index(name)).type
        if not holds_numbers(kind):
            raise DataError(
                f"data {path}: column {name!r} holds {kind}; expected numbers, or lists of one length. Leave it out, "
                "or encode it as numbers."
            )
    return label, features


def _refuse_missing(path: Path, block: Any, names: Iterable[str]) -> None:
    for name in names:
        if missing := block.column(block.schema.names.index(name)).null_count:
            raise DataError(f"data {path}: column {name!r} has {missing} missing values. Drop or impute them.")


def _rows_of_columns(path: Path, columns: Sequence[Column]) -> Array:
    """(N, features), or what a single column of arrays holds."""
    values = [column.values() for column in columns]
    if len(values) == 1 and values[0].ndim > 1:
        return values[0]
    for column, array in zip(columns, values, strict=True):
        if array.ndim > 2:
            raise DataError(
                f"data {path}: column {column.name!r} holds arrays of shape {array.shape[1:]}, and there are other "
                "columns of features. Leave one or the others out."
            )
    return np.column_stack(values)


def _labels(path: Path, block: Any, name: str) -> Array:
    """Labels as they are, texts as texts; decimals, and lists of targets, are floats."""
    column = block.column(block.schema.names.index(name))
    kind = str(column.type)
    if holds_numbers(column.type) and ("decimal" in kind or "list" in kind or "tensor" in kind):
        (found,) = columns_of(block, [name], str(path))
        return found.values()
    values = np.asarray(column.to_numpy(zero_copy_only=False))
    if values.dtype.kind != "O":
        return values
    if not all(isinstance(value, str | bytes) for value in values):
        raise DataError(f"data {path}: column {name!r} holds {kind}; expected numbers or texts as labels.")
    return np.array([value if isinstance(value, str) else value.decode(errors="backslashreplace") for value in values])


def of_items(
    items: Iterable[Any], name: str, as_array: Callable[[str, Any], Array], *, batched: bool, labelled: bool = True
) -> dict[str, Source]:
    """x and y of the items of a DataLoader, an IterableDataset or a generator.

    Args:
        items: (x, y), or mappings with x and y; samples, or batches.
        name: of the data, for messages.
        as_array: makes arrays of x and y.
        batched: whether labels in one axis are those of a batch; a single label is always that of a sample.
        labelled: whether there have to be labels; without them items may also be samples alone.
    """
    x, y = Spool(name), Spool(name)
    are_batches: bool | None = None
    for item in items:
        parts = pair(item, name, labelled=labelled)
        rows = as_array("x", parts[0])
        usable = labelled or is_label(parts[1], as_array, batched=batched)
        labels = as_array("y", parts[1]) if usable else None
        if are_batches is None:
            are_batches = _is_batch(rows, labels, name, batched)
        x.add(rows if are_batches else rows[None])
        if labels is not None:
            y.add(labels if are_batches else labels[None])
    return {"x": x.finish()} if not labelled and y.is_empty else {"x": x.finish(), "y": y.finish()}


def is_label(y: Any, as_array: Callable[[str, Any], Array], *, batched: bool = False) -> bool:
    """Whether what stands beside a sample is a class or targets, and not nothing, a mask or boxes."""
    try:
        return y is not None and as_array("y", y).ndim <= 1 + batched
    except DataError:
        return False


def _is_batch(x: Array, y: Array | None, name: str, batched: bool) -> bool:
    """Whether the first item of a stream is a batch of samples."""
    if y is None:
        return batched and x.ndim > 1
    if y.ndim == 0 or batched:
        return y.ndim > 0
    if x.ndim < 2 or len(x) != len(y):
        return False
    if y.dtype.kind == "f":
        raise DataError(
            f"data {name}: its items, x of shape {x.shape} and y of shape {y.shape}, may be samples or batches. Return "
            "a DataLoader of them: with batch_size=None if they are batches, with a size if they are samples."
        )
    return True


def pair(item: Any, name: str, *, labelled: bool = True) -> tuple[Any, Any]:
    """x and y of an item of a data set; without `labelled` also those of a sample alone, whose y is None."""
    if isinstance(item, Mapping) and {"x", "y"} <= set(item):
        return item["x"], item["y"]
    if isinstance(item, tuple | list) and len(item) == 2:
        return item[0], item[1]
    if not labelled:
        if isinstance(item, Mapping) and "x" in item:
            return item["x"], None
        if isinstance(item, tuple | list) and len(item) == 1:
            return item[0], None
        if hasattr(item, "__array__"):
            return item, None
    kind = type(item).__name__
    if isinstance(item, Mapping):
        kind += f" with {', '.join(map(repr, item)) or 'nothing'}"
    elif isinstance(item, tuple | list):
        kind += f" of {len(item)}"
    raise DataError(f"data {name}: it gives a {kind}, expected (x, y), or a dict with x and y, for each sample.")


class ItemsOfDataset:
    """A data set with `__getitem__` and `__len__`, whose samples are asked for when they are needed.

    Its labels are read in one pass before; its samples may differ from one time to the next, as augmented ones do.
    """

    def __init__(
        self, dataset: Any, like: Array, name: str, as_array: Callable[[str, Any], Array], *, labelled: bool = True
    ) -> None:
        self._dataset, self._name, self._as_array, self._labelled = dataset, name, as_array, labelled
        self.shape, self.dtype = (len(dataset), *like.shape), like.dtype

    def read(self, places: Array) -> Array:
        found = np.empty((len(places), *self.shape[1:]), self.dtype)
        for row, place in zip(found, places.tolist(), strict=True):
            sample = self._as_array("x", pair(self._dataset[place], self._name, labelled=self._labelled)[0])
            if sample.shape != row.shape:
                raise DataError(
                    f"data {self._name}: sample {place} has shape {sample.shape}, sample 0 {row.shape}; expected one "
                    "shape. Pad or crop them."
                )
            if not _holds(self.dtype, sample):
                raise DataError(
                    f"data {self._name}: sample {place} has dtype {sample.dtype}, sample 0 {self.dtype}; expected one "
                    "dtype."
                )
            row[...] = sample
        return found
