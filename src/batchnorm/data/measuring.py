"""The moments of a data set in one pass, measured where its parts lie."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from batchnorm.data.columns import ColumnMoments, NonFinite, check_choice, merge_all
from batchnorm.data.engines import Merge, Task
from batchnorm.data.sources import Local, source_of
from batchnorm.data.waiting import TIMEOUT, check_timeout
from batchnorm.errors import BatchNormError, DataError, InputError


def moments(
    dataset: Any,
    *,
    columns: Sequence[str] | None = None,
    feature_axis: int = 1,
    nonfinite: NonFinite = "error",
    any_type: bool = False,
    timeout: float = TIMEOUT,
) -> ColumnMoments:
    """Count, mean and M2 of every column of a data set, in float64, in one pass and in bounded memory.

    Each part (file, partition, block) is measured where it lies, and the parts are merged in their order:

        n = na + nb;  d = mean_b - mean_a;  mean = mean_a + d nb/n;  M2 = M2a + M2b + d^2 na nb/n

    so the result is that of one process up to rounding, however the data are cut. A part that an engine works on again
    counts once. Parts without rows count nothing.

    Args:
        dataset: one of

            - files: a path, a folder, a pattern such as ``"part-*.parquet"``, or a list of these. ``.npy`` arrays
              (N, C, ...), Parquet, Arrow (file and stream format, Feather), each of any size;
            - in memory: a NumPy array, a table, dataset or reader of Arrow, a data frame of pandas or polars;
            - ``ray.data.Dataset``, ``pyspark.sql.DataFrame``, ``dask.array.Array``, ``dask.dataframe.DataFrame``.
        columns: the columns to read, in this order. By default all, which must then all be numbers.
        feature_axis: the axis of the features in arrays, and in columns of arrays.
        nonfinite: what becomes of NaN, infinity and nulls. ``"error"`` refuses them, counted by column; ``"skip"``
            leaves out these values alone, and `ColumnMoments.nonfinite` has their number.
        any_type: let a column be of several types of numbers, such as int64 in one file and double in the next.
        timeout: seconds to wait for an engine.

    Returns:
        `ColumnMoments`; its ``moments`` have the shape (C,).

    Raises:
        DataError: files that are missing, damaged or named twice, a column that is missing, of another type in another
            part, or not numeric, values that are not finite, no rows. The message names part and column.
        SynchronizationError: the engine did not answer in time.
        MissingDependencyError: pyarrow or an engine is not installed.

    Source: Chan, Golub & LeVeque 1983, Algorithms for Computing the Sample Variance.

    Examples:
        >>> import numpy as np
        >>> found = moments(np.array([[1.0, 7.0], [3.0, 7.0]]))
        >>> found.moments.mean, found.moments.variance(unbiased=False)
        (tensor([2., 7.], dtype=torch.float64), tensor([1., 0.], dtype=torch.float64))
    """
    called = "data.moments"
    check_choice(called, nonfinite)
    columns = checked_columns(called, columns)
    limit = check_timeout(called, timeout)
    source = source_of(dataset, called)
    if isinstance(source, Local):
        found = _locally(source, columns, feature_axis, any_type)
    else:
        texts = source.run(_task(columns, feature_axis, any_type), limit, _merge(any_type))
        found = merge_all([_read(json.loads(text)) for text in texts], any_type)
    return found.check(called, nonfinite)


def checked_columns(called: str, columns: Any) -> list[str] | None:
    """The names of columns as a list.

    Raises:
        InputError: they are no list of different names.
    """
    if columns is None:
        return None
    names = columns if isinstance(columns, list | tuple) else None
    if not names or not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        raise InputError(f"{called}: got columns={columns!r}; expected a list of different names")
    return list(names)


def _locally(source: Local, columns: list[str] | None, axis: int, any_type: bool) -> ColumnMoments:
    """The parts one after the other; the first mistake ends it."""
    whole = ColumnMoments.empty()
    for k, name in enumerate(source.names):
        groups = source.groups(k, columns)
        found = [
            ColumnMoments.of_blocks(
                source.read(k, group), columns=group, feature_axis=axis, part=name, any_type=any_type
            )
            for group in ([columns] if groups is None else groups)
        ]
        whole = whole.merge(found[0].beside(found[1:]), any_type=any_type)
    return whole


def _task(columns: list[str] | None, axis: int, any_type: bool) -> Task:
    def measure(partition: int, blocks: Iterator[Any]) -> bytes:
        # A fault of the data is returned, and not raised: an engine would work on the partition again in vain.
        try:
            found = ColumnMoments.of_blocks(
                blocks, columns=columns, feature_axis=axis, part=f"partition {partition}", any_type=any_type
            )
        except BatchNormError as error:
            return json.dumps({"error": str(error)}).encode()
        return json.dumps(found.to_dict()).encode()

    return measure


def _merge(any_type: bool) -> Merge:
    def merge(texts: list[bytes]) -> bytes:
        try:
            whole = merge_all([_read(json.loads(text)) for text in texts], any_type)
        except BatchNormError as error:
            return json.dumps({"error": str(error)}).encode()
        return json.dumps(whole.to_dict()).encode()

    return merge


def _read(state: dict[str, Any]) -> ColumnMoments:
    if "error" in state:
        raise DataError(str(state["error"]))
    return ColumnMoments.from_dict(state)
