"""Batches of rows out of a data set that this process reads: as many rows each, across the borders of its parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from batchnorm.data.features import columns_of, row_count, rows_of, to_tensors
from batchnorm.data.measuring import checked_columns
from batchnorm.data.sources import Local, source_of
from batchnorm.errors import InputError

Batch = Tensor | dict[str, Tensor]


class batches:  # noqa: N801 - called as a function is
    """The rows of files, arrays and tables as batches of tensors, read anew in each pass and in bounded memory.

    A batch is the next `batch_size` rows of the data in their order, wherever a part ends; the last one may be smaller.

    Args:
        dataset: what `data.moments` takes, but for the data sets of engines, which bring batches of their own.
        batch_size: rows of a batch, at least 1.
        columns: the columns to read, by default all. Columns of numbers are the features of a tensor (N, C); a
            single column of arrays is a tensor (N, ...); columns of arrays beside others come as a dict, by name.
        dtype: of numbers with a fraction; whole numbers in arrays stay whole.

    Raises:
        DataError: as in `data.moments`, while the batches are read.

    Examples:
        >>> import numpy as np
        >>> [len(batch) for batch in batches(np.zeros((5, 2)), batch_size=2)]
        [2, 2, 1]
    """

    def __init__(
        self,
        dataset: Any,
        *,
        batch_size: int,
        columns: Sequence[str] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_batch_size("data.batches", batch_size)
        self._columns = checked_columns("data.batches", columns)
        source = source_of(dataset, "data.batches")
        if not isinstance(source, Local):
            raise InputError(
                f"data.batches: got a {type(dataset).__name__}, which brings batches of its own; calibrate and "
                "Standardize.fit take it as it is"
            )
        self._source = source
        self._batch_size = batch_size
        self._dtype = dtype

    def __iter__(self) -> Iterator[Batch]:
        source = self._source
        blocks = ((name, block) for k, name in enumerate(source.names) for block in source.read(k, self._columns))
        return in_batches(blocks, self._batch_size, self._columns, self._dtype)


def check_batch_size(called: str, batch_size: Any) -> None:
    """Raise InputError for what is no number of rows."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"{called}: got batch_size={batch_size!r}; expected a whole number from 1 up")


def in_batches(
    blocks: Iterator[tuple[str, Any]], batch_size: int, columns: Sequence[str] | None, dtype: torch.dtype
) -> Iterator[Batch]:
    """Runs of `batch_size` rows of named blocks."""
    waiting: list[Batch] = []
    rows = 0
    order = list(columns) if columns is not None else None
    for part, block in blocks:
        start, size = 0, row_count(block)
        while start < size:
            stop = min(size, start + batch_size - rows)
            taken = columns_of(rows_of(block, start, stop), order, part)
            order = order if taken[0].name == "" else [column.name for column in taken]
            waiting.append(to_tensors(taken, dtype, part))
            rows, start = rows + stop - start, stop
            if rows == batch_size:
                yield joined(waiting)
                waiting, rows = [], 0
    if waiting:
        yield joined(waiting)


def joined(rows: list[Batch]) -> Batch:
    """Pieces of a batch as one."""
    first = rows[0]
    if len(rows) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat([piece for piece in rows if isinstance(piece, Tensor)])
    return {name: torch.cat([piece[name] for piece in rows if isinstance(piece, dict)]) for name in first}
