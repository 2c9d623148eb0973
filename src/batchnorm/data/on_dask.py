"""Arrays and data frames of Dask: a task for each chunk or partition, and a tree of merges, as one graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from batchnorm.data.engines import Merge, PlacedTask, Task, placed
from batchnorm.data.features import row_count
from batchnorm.data.waiting import within
from batchnorm.errors import DataError, MissingDependencyError

try:
    import dask
except ImportError as _error:  # pragma: no cover - the engine is there where its data sets are
    raise MissingDependencyError("batchnorm.data: Dask is not installed: pip install 'batchnorm[dask]'") from _error

_FAN_IN = 16  # results that one merge takes in


class DaskSource:
    """A `dask.array.Array`, cut along its first axis, or a `dask.dataframe.DataFrame`."""

    def __init__(self, collection: Any) -> None:
        is_array = hasattr(collection, "rechunk")
        if is_array and collection.ndim < 2:
            raise DataError(f"got an array of shape {collection.shape}; expected samples on axis 0, and features")
        if is_array:  # chunks of whole samples
            collection = collection.rechunk(dict.fromkeys(range(1, collection.ndim), -1))
        elif not hasattr(collection, "to_delayed"):
            raise DataError(f"got a {type(collection).__name__} of Dask; expected an Array or a DataFrame")
        self._columns = None if is_array else [str(name) for name in collection.columns]
        self._counts: list[int] | None = None
        self._parts = list(_flat(collection.to_delayed()))

    def columns(self) -> list[str] | None:
        return self._columns

    def run_placed(self, task: PlacedTask, timeout: float) -> list[bytes]:
        if self._counts is None:
            rows = _compute([dask.delayed(row_count)(part) for part in self._parts], timeout)
            self._counts = [int(count) for count in rows]
        return self.run(placed(task, self._counts), timeout)

    def run(self, task: Task, timeout: float, merge: Merge | None = None) -> list[bytes]:
        # One node of the graph, which may hold a network. Not pure: its name is not made of the network's bits.
        shared = dask.delayed(_Held(task), pure=False, traverse=False)
        level = [dask.delayed(_work, pure=False)(shared, number, part) for number, part in enumerate(self._parts)]
        while merge is not None and len(level) > 1:
            runs = [level[start : start + _FAN_IN] for start in range(0, len(level), _FAN_IN)]
            level = [dask.delayed(merge, pure=False)(run) for run in runs]
        return list(_compute(level, timeout))


@dataclass(frozen=True)
class _Held:
    """A task that is a value for Dask, and not a function to be called lazily."""

    task: Task


def _work(held: _Held, number: int, part: Any) -> bytes:
    return held.task(number, iter([part]))


def _flat(parts: Any) -> Any:
    return parts.ravel() if hasattr(parts, "ravel") else parts


def _compute(delayed: list[Any], timeout: float) -> tuple[Any, ...]:
    return within(timeout, "Dask", lambda: tuple(dask.compute(*delayed)))
