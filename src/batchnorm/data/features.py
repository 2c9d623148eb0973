"""The features of a block of rows: an array, a table of Arrow, pandas or polars, or a dict of columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchnorm.errors import DataError

_Array = np.ndarray[Any, np.dtype[Any]]

_NUMBERS = "?bhilqBHILQefdg"  # of NumPy's types, those that are real numbers


@dataclass(frozen=True)
class Column:
    """One column of a block.

    Args:
        name: its name; "" for the features of an array.
        type: the type of its values, as its own library calls it.
        chunks: its values, in pieces of shape (n,), or (n, ...) for a column of arrays.
    """

    name: str
    type: str
    chunks: tuple[_Array, ...]

    @property
    def is_scalar(self) -> bool:
        return all(chunk.ndim == 1 for chunk in self.chunks)

    def values(self) -> _Array:
        """All pieces as one array."""
        return self.chunks[0] if len(self.chunks) == 1 else np.concatenate(self.chunks)


def row_count(block: Any) -> int:
    """The rows of a block."""
    if isinstance(block, Mapping):
        return len(next(iter(block.values()))) if block else 0
    return int(block.num_rows) if hasattr(block, "num_rows") else len(block)


def column_names(block: Any) -> list[str] | None:
    """The names of a block's columns; None for an array."""
    if isinstance(block, np.ndarray):
        return None
    if isinstance(block, Mapping):
        return [str(name) for name in block]
    if hasattr(block, "schema") and hasattr(block, "num_rows"):
        return list(block.schema.names)
    return [str(name) for name in block.columns]


def columns_of(block: Any, columns: Sequence[str] | None, part: str) -> list[Column]:
    """The columns asked for, or all, in the order asked for.

    Raises:
        DataError: a column that is not there or holds no numbers; the message names the part and the column.
    """
    if isinstance(block, np.ndarray):
        if columns is not None:
            raise DataError(f"{part}: got columns={list(columns)} for an array, which has no named columns")
        return [_checked(Column("", str(block.dtype), (block,)), part)]
    wanted = _wanted(column_names(block) or [], columns, part)
    read = _reader(block)
    return [_checked(read(block, name, part), part) for name in wanted]


def check_schema(schema: Any, columns: Sequence[str] | None, part: str) -> list[str]:
    """The columns of a schema of Arrow that are asked for, or all.

    Raises:
        DataError: as of `columns_of`.
    """
    wanted = _wanted(list(schema.names), columns, part)
    for name in wanted:
        kind = schema.field(name).type
        if not holds_numbers(kind):
            raise _not_numbers(name, str(kind), part)
    return wanted


def _wanted(there: list[str], columns: Sequence[str] | None, part: str) -> list[str]:
    twice = sorted({name for name in there if there.count(name) > 1})
    if twice:
        raise DataError(f"{part}: several columns are called {twice[0]!r}; give each a name of its own")
    wanted = there if columns is None else list(columns)
    missing = [name for name in wanted if name not in there]
    if missing:
        raise DataError(f"{part}: there is no column {missing[0]!r}; its columns are {few(there)}")
    if not wanted:
        raise DataError(f"{part}: the table has no columns")
    return wanted


def to_tensors(columns: list[Column], dtype: torch.dtype, part: str) -> Tensor | dict[str, Tensor]:
    """What a network is fed of some columns: one tensor, or a dict of them.

    Columns of numbers are the features (n, C), in `dtype`. A single column of arrays is (n, ...). If columns of
    arrays stand beside others, all are kept apart, by name. Whole numbers in arrays stay whole numbers.
    """
    for column in columns:
        bad = sum(int((~np.isfinite(chunk)).sum()) for chunk in column.chunks if chunk.dtype.kind == "f")
        if bad:
            raise DataError(
                f"{part}: column {column.name!r} has {bad} value(s) that are not finite; "
                "remove or impute them before the network is calibrated"
            )
    if all(column.is_scalar for column in columns):
        rows = np.stack([column.values().astype(np.float64, copy=False) for column in columns], axis=1)
        return torch.from_numpy(rows).to(dtype)
    tensors = {column.name: _tensor(column.values(), dtype) for column in columns}
    return next(iter(tensors.values())) if len(tensors) == 1 else tensors


def _tensor(values: _Array, dtype: torch.dtype) -> Tensor:
    tensor = torch.from_numpy(np.array(values, order="C"))  # copied: what an engine hands over is read-only
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def few(names: Sequence[str], most: int = 8) -> str:
    """The first names, for an error."""
    shown = ", ".join(repr(name) for name in names[:most])
    return f"{shown}, ... ({len(names)} in all)" if len(names) > most else shown or "none"


def _checked(column: Column, part: str) -> Column:
    for chunk in column.chunks:
        if chunk.dtype.char not in _NUMBERS:
            raise _not_numbers(column.name, column.type, part)
    return column


def _not_numbers(name: str, type_: str, part: str) -> DataError:
    what = f"column {name!r} is" if name else "its values are"
    return DataError(
        f"{part}: {what} of type {type_}; expected real numbers. Convert the values, or name the columns that are "
        "to be read by columns=[...]"
    )


def _reader(block: Any) -> Any:
    if isinstance(block, Mapping):
        return _from_mapping
    if hasattr(block, "schema") and hasattr(block, "num_rows"):
        return _from_arrow
    if type(block).__module__.split(".")[0] == "polars":
        return lambda frame, name, part: _from_arrow(frame.select(name).to_arrow(), name, part)
    return _from_pandas


def _from_mapping(block: Mapping[str, Any], name: str, part: str) -> Column:
    values = np.asarray(block[name])
    return Column(name, str(values.dtype), (values,))


def _from_pandas(frame: Any, name: str, part: str) -> Column:
    series = frame[name]
    type_ = str(series.dtype)
    if isinstance(series.dtype, np.dtype):
        if series.dtype.char == "O" and len(series) and isinstance(series.iloc[0], np.ndarray | list | tuple):
            return Column(name, "arrays", (_stacked(list(series), name, part),))
        return Column(name, type_, (series.to_numpy(),))
    from pandas.api.types import is_numeric_dtype

    if not is_numeric_dtype(series.dtype):  # Int64, Float64, boolean, and those of Arrow, are numbers
        raise _not_numbers(name, type_, part)
    return Column(name, type_, (series.to_numpy(dtype=np.float64, na_value=np.nan),))


def _stacked(rows: list[Any], name: str, part: str) -> _Array:
    try:
        return np.stack([np.asarray(row) for row in rows])
    except ValueError as error:
        raise DataError(f"{part}: column {name!r} holds arrays of several shapes; expected one shape") from error


def _from_arrow(table: Any, name: str, part: str) -> Column:
    column = table.column(name)
    if not holds_numbers(column.type):
        raise _not_numbers(name, str(column.type), part)
    chunks = column.chunks if hasattr(column, "chunks") else [column]
    arrays = tuple(_numpy(chunk, name, part) for chunk in chunks if len(chunk))
    return Column(name, str(column.type), arrays or (np.empty(0),))


def holds_numbers(kind: Any) -> bool:
    """Whether a type of Arrow is of numbers, or of lists or tensors of them."""
    import pyarrow as pa
    from pyarrow import types

    if types.is_fixed_size_list(kind) or types.is_list(kind) or types.is_large_list(kind):
        return holds_numbers(kind.value_type)
    if isinstance(kind, pa.BaseExtensionType):
        return "tensor" in str(kind).lower()
    return bool(types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind))


def _numpy(chunk: Any, name: str, part: str) -> _Array:
    """An array of Arrow as one of NumPy, without a copy where there are no nulls; a null becomes NaN."""
    import pyarrow as pa
    from pyarrow import types

    kind = chunk.type
    if types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind):
        plain = not chunk.null_count and not types.is_boolean(kind)
        return _as_it_lies(chunk) if plain else _with_nan(chunk)
    if types.is_decimal(kind):
        return _with_nan(chunk.cast(pa.float64()))
    if isinstance(kind, pa.BaseExtensionType):
        if chunk.null_count:
            raise DataError(f"{part}: column {name!r} has {chunk.null_count} null(s) among its arrays")
        for convert in ("to_numpy_ndarray", "to_numpy"):
            if hasattr(chunk, convert):
                options = {} if convert == "to_numpy_ndarray" else {"zero_copy_only": False}
                values = np.asarray(getattr(chunk, convert)(**options))
                return values if values.dtype.char != "O" else _stacked(list(values), name, part)
    if types.is_fixed_size_list(kind) or types.is_list(kind) or types.is_large_list(kind):
        return _of_lists(chunk, name, part)
    raise _not_numbers(name, str(kind), part)


def _as_it_lies(chunk: Any) -> _Array:
    """Numbers without nulls, in Arrow's own memory. Arrow's `to_numpy` would load pandas, which takes 50 MB."""
    if not len(chunk):  # which may have no memory
        return np.empty(0)
    kind = chunk.type
    dtype = np.dtype(f"{'f' if 'float' in str(kind) or 'double' in str(kind) else str(kind)[0]}{kind.bit_width // 8}")
    values: _Array = np.frombuffer(chunk.buffers()[1], dtype, count=chunk.offset + len(chunk))
    return values[chunk.offset :]


def _with_nan(chunk: Any) -> _Array:
    import pyarrow as pa

    values = chunk.cast(pa.uint8()) if pa.types.is_boolean(chunk.type) else chunk
    return _as_it_lies(values.cast(pa.float64()).fill_null(np.nan))


def _of_lists(chunk: Any, name: str, part: str) -> _Array:
    """Lists of one length as rows."""
    import pyarrow.compute as pc

    if chunk.null_count:
        raise DataError(f"{part}: column {name!r} has {chunk.null_count} null(s) among its lists")
    lengths = pc.list_value_length(chunk)
    bounds = pc.min_max(lengths).as_py()
    if bounds["min"] != bounds["max"]:
        raise DataError(
            f"{part}: column {name!r} holds lists of {bounds['min']} to {bounds['max']} values; expected one length"
        )
    inner = chunk.flatten()
    values = _numpy(inner, name, part) if len(inner) else np.empty(0)
    return values.reshape(len(chunk), bounds["max"], *values.shape[1:])


def pieces(block: Any, rows: int) -> Iterator[Any]:
    """A block of rows in pieces of at most so many."""
    total = row_count(block)
    for start in range(0, total, rows):
        yield rows_of(block, start, min(start + rows, total))


def rows_of(block: Any, start: int, stop: int) -> Any:
    """The rows start .. stop - 1 of a block."""
    if isinstance(block, Mapping):
        return {name: values[start:stop] for name, values in block.items()}
    if isinstance(block, np.ndarray):
        return block[start:stop]
    if hasattr(block, "iloc"):
        return block.iloc[start:stop]
    return block.slice(start, stop - start)
