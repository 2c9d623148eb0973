"""What an engine does for us: run a task on each partition of a data set, where it lies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any, Protocol

# A task is given the number and the blocks of a partition, in a process of the engine's choice.
Task = Callable[[int, Iterator[Any]], bytes]
Merge = Callable[[list[bytes]], bytes]


class PlacedTask(Protocol):
    """A task that is also told where in the data set the partition lies."""

    def __call__(self, partition: int, blocks: Iterator[Any], start: int, rows: int) -> bytes:
        """`start` rows come before the partition, which has `rows`; negative where it was not counted."""


class Source(Protocol):
    """A data set in partitions, where it lies."""

    def columns(self) -> list[str] | None:
        """The names of its columns, in their order; None for an array."""

    def run(self, task: Task, timeout: float, merge: Merge | None = None) -> list[bytes]:
        """What the task makes of each partition, in their order, or what `merge` makes of that as a tree.

        The result of a partition is taken once, whatever the engine repeats.

        Raises:
            SynchronizationError: the engine did not answer within `timeout` seconds.
        """

    def run_placed(self, task: PlacedTask, timeout: float) -> list[bytes]:
        """`run` with a task that is told the place of its partition."""


def placed(task: PlacedTask, counts: list[int]) -> Task:
    """A task for partitions of these numbers of rows."""
    starts = [0, *accumulate(counts)]

    def work(partition: int, blocks: Iterator[Any]) -> bytes:
        known = partition < len(counts)
        return task(partition, blocks, starts[partition] if known else -1, counts[partition] if known else -1)

    return work
