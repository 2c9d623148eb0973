"""Files that may be larger than memory, as parts that are read block by block: .npy, Parquet, Arrow."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from batchnorm.data.features import check_schema
from batchnorm.errors import DataError, MissingDependencyError

ARRAYS, PARQUET, ARROW = (".npy",), (".parquet", ".pq"), (".arrow", ".ipc", ".feather", ".arrows")
KNOWN = ARRAYS + PARQUET + ARROW

# Bytes of an array, and rows and bytes of a table, that are in memory at a time.
_BYTES = 8 << 20
_ROWS = 1 << 16
_TABLE_BYTES = 16 << 20
_BUFFER = 1 << 16  # bytes of a column that are read from a Parquet file at a time


@dataclass(frozen=True)
class File:
    """A part of a data set in a file of its own."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path)

    def blocks(self, columns: Sequence[str] | None = None, *, numbers: bool = True) -> Iterator[Any]:
        """The rows from the first to the last: arrays, or batches of Arrow with the columns asked for.

        Args:
            columns: the columns to read, by default all.
            numbers: refuse a table with a column that holds no numbers before it is read.

        Raises:
            DataError: the file is damaged, or lacks a column; the message names file and column.
            MissingDependencyError: the file needs pyarrow.
        """
        suffix = self.path.suffix.lower()
        if suffix in ARRAYS:
            return _array_blocks(self.path)
        read = _parquet_blocks if suffix in PARQUET else _arrow_blocks
        return _readable(self.path, read(self.path, columns, numbers))

    def column_groups(self, columns: Sequence[str] | None = None) -> list[list[str]] | None:
        """Columns that are best read by themselves, where their order among one another does not matter; None: all.

        A reader of Parquet holds a page and a dictionary of each column that it reads, which lie apart in the file.

        Raises:
            DataError: a column is missing, or holds no numbers.
        """
        if self.path.suffix.lower() not in PARQUET:
            return None
        (schema,) = _readable(self.path, _schema_of(self.path))
        return [[name] for name in check_schema(schema, columns, str(self.path))]


def find_files(given: Any) -> list[File]:
    """The files that a path, a folder, a pattern such as "part-*.parquet", or a list of these names, in order.

    Raises:
        DataError: there is no such file, its kind is not known, or it is named twice.
    """
    each = [given] if isinstance(given, str | os.PathLike) else list(given)
    paths = [path for one in each for path in _expand(one)]
    if not paths:
        raise DataError("got no file to read")
    seen: dict[tuple[int, int], Path] = {}
    for path in paths:
        if path.suffix.lower() not in KNOWN:
            raise DataError(f"{path}: the kind of this file is not known; expected one of {', '.join(KNOWN)}")
        status = path.stat()
        place = (status.st_dev, status.st_ino)
        if place in seen:
            again = "" if seen[place] == path else f", which is the same file as {seen[place]}"
            raise DataError(f"{path} would be read twice{again}; each part of a data set counts once")
        seen[place] = path
    return [File(path) for path in paths]


def _expand(given: str | os.PathLike[str]) -> list[Path]:
    path = Path(given)
    if path.is_dir():
        found = sorted(
            file
            for file in path.rglob("*")
            if file.suffix.lower() in KNOWN and file.is_file() and not _is_hidden(file.relative_to(path))
        )
        if not found:
            raise DataError(f"{path}: the folder holds no file of a kind that can be read ({', '.join(KNOWN)})")
        return found
    if path.is_file():
        return [path]
    if path.exists():
        raise DataError(f"{path}: it is neither a file nor a folder")
    found = sorted(Path(name) for name in glob.glob(str(given)) if Path(name).is_file())
    if not found:
        raise DataError(f"{path}: there is no such file")
    return found


def _is_hidden(path: Path) -> bool:
    """Whether a writer keeps this for itself, as _metadata and .part-0.crc: readers pass over these names."""
    return any(part.startswith((".", "_")) for part in path.parts)


def _open_array(path: Path) -> np.memmap[Any, Any]:
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, OSError, EOFError, OverflowError, SyntaxError, TypeError) as error:
        raise DataError(f"{path}: it is no .npy file that can be read ({error})") from error
    if array.ndim < 2:
        raise DataError(f"{path}: the array has the shape {array.shape}; expected samples on axis 0, and features")
    return array


def _array_blocks(path: Path) -> Iterator[np.ndarray[Any, Any]]:
    array = _open_array(path)
    row = max(1, array.nbytes // max(1, len(array)))
    rows = max(1, _BYTES // row)
    if array.flags.c_contiguous and array.size:
        # Plain reads into memory of our own: pages of a memory map would count as this process's.
        with open(path, "rb") as file:
            file.seek(array.offset)
            for start in range(0, len(array), rows):
                shape = (min(rows, len(array) - start), *array.shape[1:])
                yield np.fromfile(file, dtype=array.dtype, count=int(np.prod(shape))).reshape(shape)
        return
    for start in range(0, len(array), rows):
        yield np.asarray(array[start : start + rows])


def _parquet(path: Path) -> Any:
    parquet = arrow_module("pyarrow.parquet", str(path))
    # Nothing is read ahead, and pages come through a small buffer, so that memory is that of a few pages a column.
    return parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER)


def _schema_of(path: Path) -> Iterator[Any]:
    with _parquet(path) as file:
        yield file.schema_arrow


def _parquet_blocks(path: Path, columns: Sequence[str] | None, numbers: bool) -> Iterator[Any]:
    with _parquet(path) as file:
        if numbers:
            check_schema(file.schema_arrow, columns, str(path))
        # Without threads: each would hold pages of its own, and parts are what is shared out.
        wanted = None if columns is None else list(columns)
        rows = _rows_at_a_time(file.schema_arrow, wanted)
        yield from file.iter_batches(batch_size=rows, columns=wanted, use_threads=False)


def _rows_at_a_time(schema: Any, columns: Sequence[str] | None) -> int:
    """Rows of which memory holds some megabytes, however many columns there are."""
    fields = [field for field in schema if columns is None or field.name in columns]
    values = sum(max(1, getattr(field.type, "list_size", 1)) for field in fields)
    return max(1, min(_ROWS, _TABLE_BYTES // (8 * max(1, values))))


def _arrow_blocks(path: Path, columns: Sequence[str] | None, numbers: bool) -> Iterator[Any]:
    """Batches of the file format (which Feather is, too) or of the stream format."""
    ipc = arrow_module("pyarrow.ipc", str(path))
    pa = arrow_module("pyarrow", str(path))
    with pa.OSFile(str(path)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        if is_file:
            reader = ipc.open_file(source)
            batches = (reader.get_batch(k) for k in range(reader.num_record_batches))
        else:
            reader = ipc.open_stream(source)
            batches = iter(reader)
        if numbers:
            check_schema(reader.schema, columns, str(path))
        rows = _rows_at_a_time(reader.schema, columns)
        for batch in batches:
            for start in range(0, batch.num_rows, rows):
                piece = batch.slice(start, rows)
                yield piece if columns is None else piece.select(list(columns))


def _readable(path: Path, blocks: Iterator[Any]) -> Iterator[Any]:
    """The blocks of a file; an error of the reader's says which file."""
    pa = arrow_module("pyarrow", str(path))
    try:
        yield from blocks
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: it cannot be read ({str(error).splitlines()[0]})") from error


def arrow_module(name: str, what: str) -> Any:
    """A module of pyarrow.

    Raises:
        MissingDependencyError: it is not installed.
    """
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(
            f"{what}: reading it needs pyarrow, which is not installed: pip install pyarrow"
        ) from error
