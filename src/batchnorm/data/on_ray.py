"""Data sets of Ray: an aggregation for `Dataset.aggregate` and `groupby`, and work on their blocks."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from batchnorm.data.columns import ColumnMoments
from batchnorm.data.engines import Merge, PlacedTask, Task
from batchnorm.data.waiting import within
from batchnorm.errors import BatchNormError, DataError, MissingDependencyError, SynchronizationError

try:
    import ray
    from ray.data.aggregate import AggregateFn
except ImportError as _error:  # pragma: no cover - the engine is there where its data sets are
    raise MissingDependencyError("batchnorm.data: Ray Data is not installed: pip install 'batchnorm[ray]'") from _error

RETRIES = 3  # of a block whose worker dies


class MomentsOf(AggregateFn):  # type: ignore[misc]
    """An aggregation of Ray Data: the moments of columns, for ``dataset.aggregate(...)`` and ``groupby(...)``.

    The result is JSON text: ``ColumnMoments.from_dict(json.loads(text))``. A fault of a block (no such column, no
    numbers) is an entry "error" in it, so that Ray does not repeat the block in vain.

    It is an `AggregateFn` and no `AggregateFnV2`: of that kind Ray 2.60 hands on the keys of the groups and one column
    alone, and this one reads several.

    Args:
        columns: the columns to measure, by default all.
        feature_axis: of columns of arrays.
        any_type: let a column have several types of numbers.
        alias: the name of the result.

    Examples:
        >>> import ray  # doctest: +SKIP
        >>> text = ray.data.range(9).aggregate(MomentsOf(["id"]))["moments"]  # doctest: +SKIP
        >>> ColumnMoments.from_dict(json.loads(text)).moments.mean  # doctest: +SKIP
        tensor([4.], dtype=torch.float64)
    """

    def __init__(
        self,
        columns: Sequence[str] | None = None,
        *,
        feature_axis: int = 1,
        any_type: bool = False,
        alias: str = "moments",
    ) -> None:
        self._columns = None if columns is None else list(columns)
        self._axis = feature_axis
        self._any_type = any_type
        empty = json.dumps(ColumnMoments.empty().to_dict())
        super().__init__(
            init=lambda key: empty,
            merge=self.combine,
            name=alias,
            accumulate_block=lambda accumulator, block: self.combine(accumulator, self.aggregate_block(block)),
        )

    def aggregate_block(self, block: Any) -> str:
        """The moments of the rows of a block."""
        part = f"a block of {len(block)} rows (Ray's task {ray.get_runtime_context().get_task_id() or 'none'})"

        def measure() -> ColumnMoments:
            return ColumnMoments.of_blocks(
                [block], columns=self._columns, feature_axis=self._axis, part=part, any_type=self._any_type
            )

        return _told(measure)

    def combine(self, current_accumulator: str, new: str) -> str:
        """The moments of the rows of two blocks."""
        both = [json.loads(current_accumulator), json.loads(new)]
        failed = [one for one in both if "error" in one]
        if failed:
            return json.dumps(failed[0])
        first, second = (ColumnMoments.from_dict(one) for one in both)
        return _told(lambda: first.merge(second, any_type=self._any_type))


def _told(measure: Callable[[], ColumnMoments]) -> str:
    try:
        return json.dumps(measure().to_dict())
    except BatchNormError as error:
        return json.dumps({"error": str(error)})


class RaySource:
    """A `ray.data.Dataset`; its partitions are its blocks."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def columns(self) -> list[str]:
        return list(self._dataset.columns() or ())

    def run(self, task: Task, timeout: float, merge: Merge | None = None) -> list[bytes]:
        found = self.run_placed(_Placeless(task), timeout)
        return found if merge is None else [merge(found)]

    def run_placed(self, task: PlacedTask, timeout: float) -> list[bytes]:
        work = _Work(task, timeout)
        return within(timeout, "Ray Data", lambda: self._feed(work), work.close)

    def _feed(self, work: _Work) -> list[bytes]:
        start = 0
        with _in_order(self._dataset) as blocks:
            for number, (block, rows) in enumerate(blocks):
                work.submit(number, block, start, rows)
                start += rows
        return work.finish()


@dataclass(frozen=True)
class _Placeless:
    """A task that does not ask for the place of its partition."""

    task: Task

    def __call__(self, partition: int, blocks: Iterator[Any], start: int, rows: int) -> bytes:
        return self.task(partition, blocks)


@contextlib.contextmanager
def _in_order(dataset: Any) -> Iterator[Iterator[tuple[Any, int]]]:
    """(block, rows) of a data set, in its own order, as Ray makes them: they are not all kept."""
    options = dataset.context.execution_options
    before = options.preserve_order
    options.preserve_order = True
    try:
        yield (_entry(entry) for bundle in dataset.iter_internal_ref_bundles() for entry in bundle.blocks)
    finally:
        options.preserve_order = before


def _entry(entry: Any) -> tuple[Any, int]:
    """(reference, rows) of a block, from a pair or an object with the same two."""
    reference, metadata = (entry.ref, entry.metadata) if hasattr(entry, "metadata") else entry
    return reference, int(metadata.num_rows)


def _on_a_worker(held: list[Any], number: int, block: Any, start: int, rows: int) -> bytes:
    return _unpacked(held[0])(number, iter([block]), start, rows)


@functools.lru_cache(maxsize=1)
def _unpacked(reference: Any) -> PlacedTask:
    """The task, which may hold a network: a worker unpacks it once for all of its blocks."""
    task: PlacedTask = ray.get(reference)
    return task


class _Work:
    """Blocks that are worked on by Ray's workers; as many at a time as there are processors.

    Ray gives the block of a worker that dies to another one, and has one result for it.

    The work claims no processors: Ray needs these to make the blocks, and would wait for them for ever.
    """

    def __init__(self, task: PlacedTask, timeout: float) -> None:
        self._task = ray.put(task)
        self._timeout = timeout
        self._run = ray.remote(num_cpus=0, max_retries=RETRIES)(_on_a_worker)
        self._most = max(1, int(ray.cluster_resources().get("CPU", 1)))
        self._working: dict[Any, int] = {}  # the partition of each future
        self._found: dict[int, bytes] = {}

    def submit(self, number: int, block: Any, start: int, rows: int) -> None:
        """Have a block worked on, once a processor has time for it."""
        while len(self._working) >= self._most:
            self._take_one()
        self._working[self._run.remote([self._task], number, block, start, rows)] = number

    def finish(self) -> list[bytes]:
        """All results, by the number of their block."""
        while self._working:
            self._take_one()
        return [self._found[number] for number in sorted(self._found)]

    def close(self) -> None:
        """Give up what is not done."""
        for future in list(self._working):
            ray.cancel(future, force=True)

    def _take_one(self) -> None:
        done, _ = ray.wait(list(self._working), num_returns=1, timeout=self._timeout)
        if not done:
            names = ", ".join(f"partition {number}" for number in list(self._working.values())[:8])
            raise SynchronizationError(
                f"Ray did not answer within timeout={self._timeout:g} seconds; unfinished: {names}"
            )
        number = self._working.pop(done[0])
        try:
            self._found[number] = ray.get(done[0])
        except ray.exceptions.RayTaskError as error:
            raise DataError(f"partition {number}: {str(error).strip().splitlines()[-1]}") from error
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[0]
            raise SynchronizationError(
                f"partition {number}: {RETRIES + 1} workers of Ray died one after the other at work on it ({reason})"
            ) from error
