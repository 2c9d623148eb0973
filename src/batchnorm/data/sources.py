"""Which data sets can be read, and by which engine: recognized by their type, without importing an engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from batchnorm.data.engines import Source
from batchnorm.data.files import File, find_files
from batchnorm.errors import DataError


@dataclass(frozen=True)
class Local:
    """Parts that this process reads itself: files, or what is in memory.

    Args:
        names: of the parts.
        read: called with the number of a part and the columns to read, gives its blocks.
        groups: called with the same, gives columns that are best read by themselves; None: all together.
    """

    names: tuple[str, ...]
    read: Callable[[int, Sequence[str] | None], Iterator[Any]]
    groups: Callable[[int, Sequence[str] | None], list[list[str]] | None] = lambda k, columns: None


def is_dataset(given: Any) -> bool:
    """Whether this is a data set of an engine, a table, an array or files, and not batches of tensors."""
    return _engine(given) is not None or _is_files(given) or isinstance(given, np.ndarray) or _is_table(given)


def source_of(given: Any, called: str) -> Source | Local:
    """The partitions of a data set.

    Raises:
        DataError: a type that is not known.
    """
    engine = _engine(given)
    if engine == "ray":
        from batchnorm.data.on_ray import RaySource

        return RaySource(given)
    if engine == "spark":
        from batchnorm.data.on_spark import SparkSource

        return SparkSource(given)
    if engine == "dask":
        from batchnorm.data.on_dask import DaskSource

        return DaskSource(given)
    if _is_files(given):
        return _of_files(find_files(given))
    if isinstance(given, np.ndarray) or _is_table(given):
        return _in_memory(given)
    raise DataError(
        f"{called}: got a {type(given).__name__}; expected files (.npy, Parquet, Arrow), an array, a table of Arrow, "
        "pandas or polars, or a data set of Ray, Spark or Dask"
    )


def _of_files(files: list[File]) -> Local:
    return Local(
        tuple(file.name for file in files),
        lambda k, columns: files[k].blocks(columns),
        lambda k, columns: files[k].column_groups(columns),
    )


def _in_memory(table: Any) -> Local:
    if hasattr(table, "get_fragments"):  # a dataset of Arrow
        fragments = list(table.get_fragments())
        names = tuple(str(getattr(fragment, "path", None) or f"fragment {k}") for k, fragment in enumerate(fragments))

        def read(k: int, columns: Sequence[str] | None) -> Iterator[Any]:
            wanted = None if columns is None else [c for c in columns if c in fragments[k].physical_schema.names]
            return iter(fragments[k].to_batches(columns=wanted, use_threads=False))

        return Local(names, read)
    if hasattr(table, "read_next_batch"):
        return Local(("the data",), lambda k, columns: iter(table))
    return Local(("the data",), lambda k, columns: iter([table]))


def _is_files(given: Any) -> bool:
    if isinstance(given, str | os.PathLike):
        return True
    return isinstance(given, list | tuple) and bool(given) and all(isinstance(one, str | os.PathLike) for one in given)


def _packages(given: Any) -> list[str]:
    return [kind.__module__ for kind in type(given).__mro__]


def _engine(given: Any) -> str | None:
    for module in _packages(given):
        if module.startswith("ray.data."):
            return "ray"
        if module.startswith("pyspark.sql."):
            return "spark"
        if module.startswith(("dask.array", "dask.dataframe", "dask_expr")):
            return "dask"
    return None


def _is_table(given: Any) -> bool:
    for module in _packages(given):
        if module.split(".")[0] in ("pandas", "polars") and hasattr(given, "columns"):
            return True
        if module.startswith("pyarrow.") and (hasattr(given, "schema") or hasattr(given, "get_fragments")):
            return True
    return False
