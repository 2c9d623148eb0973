"""Data frames of Spark: tasks over Arrow batches (`mapInArrow`), whose results merge in a tree."""

from __future__ import annotations

import contextlib
import math
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from batchnorm.data.engines import Merge, PlacedTask, Task, placed
from batchnorm.data.waiting import within
from batchnorm.errors import BatchNormError, DataError, MissingDependencyError

try:
    import pyarrow as pa
    from pyspark.sql import functions
except ImportError as _error:  # pragma: no cover - the engine is there where its data frames are
    raise MissingDependencyError(
        "batchnorm.data: Spark's data frames need pyspark and pyarrow: pip install 'batchnorm[spark]'"
    ) from _error

_SCHEMA = "partition long, value binary"
_DIRECT = 64  # so many results come to the driver as they are


class SparkSource:
    """A `pyspark.sql.DataFrame`, of a session of this process or of Spark Connect."""

    def __init__(self, frame: Any) -> None:
        self._frame = frame
        self._counts: list[int] | None = None

    def columns(self) -> list[str]:
        return list(self._frame.columns)

    def run_placed(self, task: PlacedTask, timeout: float) -> list[bytes]:
        if self._counts is None:
            # The same plan as for the work itself: another one might be cut into other partitions.
            found = self.run(lambda _, blocks: str(sum(block.num_rows for block in blocks)).encode(), timeout)
            self._counts = [int(text) for text in found]
        return self.run(placed(task, self._counts), timeout)

    def run(self, task: Task, timeout: float, merge: Merge | None = None) -> list[bytes]:
        def work(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            from pyspark import TaskContext

            context = TaskContext.get()
            partition = context.partitionId() if context is not None else 0
            yield _row(partition, task(partition, iter(batches)))

        frame = self._frame.mapInArrow(work, _SCHEMA)
        rows = self._collect(frame if merge is None else _merged(frame, merge), timeout)
        # The key is the partition, so a partition that Spark has worked on twice is there once.
        found = {int(row["partition"]): bytes(row["value"]) for row in rows}
        results = [found[partition] for partition in sorted(found)]
        return results if merge is None else [merge(results)]

    def _collect(self, frame: Any, timeout: float) -> list[Any]:
        session = frame.sparkSession
        tag = f"batchnorm-{uuid.uuid4().hex}"

        def collect() -> list[Any]:
            with contextlib.suppress(Exception):
                session.addTag(tag)
            return list(frame.collect())

        def cancel() -> None:
            with contextlib.suppress(Exception):
                session.interruptTag(tag)

        try:
            return within(timeout, "Spark", collect, cancel)
        except BatchNormError:
            raise
        except Exception as error:
            told = [line for line in str(error).splitlines() if "Error: " in line or "Exception: " in line]
            reason = (told or str(error).splitlines() or [type(error).__name__])[-1].strip()
            raise DataError(f"Spark gave up: {reason}") from error


def _row(partition: int, value: bytes) -> pa.RecordBatch:
    columns = [pa.array([partition], pa.int64()), pa.array([value], pa.binary())]
    return pa.RecordBatch.from_arrays(columns, names=["partition", "value"])


def _merged(frame: Any, merge: Merge) -> Any:
    """One level of a tree: partitions are merged in runs, so that the driver takes few results.

    A run holds adjacent partitions and is merged in their order, so the bits do not depend on who was done first.
    """
    partitions = _partitions(frame)
    if partitions <= _DIRECT:
        return frame
    run = math.isqrt(partitions - 1) + 1

    def together(table: pa.Table) -> pa.Table:
        rows = sorted(table.to_pylist(), key=lambda row: row["partition"])
        found = {row["partition"]: row["value"] for row in rows}
        return pa.Table.from_batches([_row(min(found), merge(list(found.values())))])

    by_run = frame.groupBy(functions.floor(functions.col("partition") / run))
    if hasattr(by_run, "applyInArrow"):
        return by_run.applyInArrow(together, _SCHEMA)
    return frame


def _partitions(frame: Any) -> int:
    """How many partitions a frame has, as far as it is known; Spark Connect does not tell."""
    with contextlib.suppress(Exception):
        return int(frame.rdd.getNumPartitions())
    return _DIRECT + 1
