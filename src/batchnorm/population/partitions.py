"""What the batch-norm layers of a network receive, measured by the workers of an engine where the data lies."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm import errors
from batchnorm.data.engines import Source
from batchnorm.data.features import columns_of, row_count, rows_of, to_tensors
from batchnorm.data.reading import Batch, in_batches, joined
from batchnorm.errors import BatchNormError, DataError, InputError
from batchnorm.ops.context import eager
from batchnorm.population.feeding import feed
from batchnorm.population.measuring import Estimate, Measurement, Method


def measure_partitions(
    net: nn.Module,
    layers: dict[str, _BatchNorm],
    source: Source,
    *,
    method: Method,
    forward: Callable[[Any, Any], Any] | None,
    batch_size: int,
    columns: Sequence[str] | None,
    timeout: float,
) -> dict[str, Estimate]:
    """What `calibrate` measures of each layer, in one pass over the partitions, or in one a layer.

    A batch is the next `batch_size` rows of the whole data set, so the batches are those of one process, however the
    data are cut: a worker measures the batches that lie in its partition, and sends the rows at its edges, of which
    the batches across borders are made here. Findings are kept by the number of the partition, so a
    partition that is worked on again counts once.

    Raises:
        DataError: no rows, or what `data.moments` refuses.
        SynchronizationError: the engine did not answer within `timeout` seconds.
    """
    work = _Pass(_portable(net), list(layers), forward, batch_size, columns or source.columns())

    def measure() -> dict[str, Estimate]:
        return work.gather([_opened(found) for found in source.run_placed(work, timeout)])

    estimates = measure()
    if method != "sequential":
        return estimates
    reached = list(estimates)
    while True:
        name, estimate = next((n, e) for n, e in estimates.items() if n not in work.final)
        work.final[name] = estimate
        if len(work.final) == len(reached):
            return work.final
        estimates = measure()
        if all(name in work.final for name in estimates):
            return work.final


@dataclass
class _Found:
    """What a worker has found in a partition: its rows, the estimates of its layers, and the rows at its edges."""

    rows: int
    estimates: dict[str, Estimate]
    head: list[Batch]
    tail: list[Batch]


@dataclass
class _Pass:
    """One pass over the data, as a task for every partition.

    Args:
        net: a copy that workers may copy again.
        names: of the layers that are measured.
        final: the layers that normalize by what was measured of them in passes before.
    """

    net: nn.Module
    names: list[str]
    forward: Callable[[Any, Any], Any] | None
    batch_size: int
    columns: Sequence[str] | None
    final: dict[str, Estimate] = field(default_factory=dict)

    def __call__(self, partition: int, blocks: Iterator[Any], start: int, rows: int) -> bytes:
        label = f"partition {partition}"
        # A fault of the data is returned, and not raised: an engine would work on the partition again in vain.
        try:
            found: Any = self._measure(label, blocks, start, rows)
        except BatchNormError as error:
            text = str(error)
            found = (type(error).__name__, text if text.startswith(label) else f"{label}: {text}")
        return pickle.dumps(found)

    def gather(self, parts: list[_Found]) -> dict[str, Estimate]:
        """The estimates of all partitions, and of the batches that lie across their borders."""
        if not any(part.rows for part in parts):
            raise DataError(f"calibrate: the data set has no rows ({len(parts)} partition(s))")
        whole: dict[str, Estimate] = {}
        first: dict[str, int] = {}
        for estimates in [*(part.estimates for part in parts), self._over(self._across(parts))]:
            for place, (name, estimate) in enumerate(estimates.items()):
                whole[name] = whole[name].merge(estimate) if name in whole else estimate
                first[name] = min(place, first.get(name, place))
        return {name: whole[name] for name in sorted(whole, key=lambda name: first[name])}

    def _measure(self, label: str, blocks: Iterator[Any], start: int, rows: int) -> _Found:
        if rows < 0:
            raise DataError("it was not there when the rows were counted; the data set must be the same in each pass")
        head = min(-start % self.batch_size, rows)
        middle = (rows - head) // self.batch_size * self.batch_size
        found = _Found(rows, {}, [], [])

        def inside() -> Iterator[tuple[str, Any]]:
            seen = 0
            for block in blocks:
                size = row_count(block)
                a, b = (min(max(end - seen, 0), size) for end in (head, head + middle))
                if a:
                    found.head.append(self._tensors(rows_of(block, 0, a), label))
                if b > a:
                    yield label, rows_of(block, a, b)
                if b < size:
                    found.tail.append(self._tensors(rows_of(block, b, size), label))
                seen += size
            if seen != rows:
                raise DataError(
                    f"it had {rows} rows, and {seen} when they were read again; the data set must be the same in each "
                    "pass: cache it, or write it to files"
                )

        found.estimates = self._over(in_batches(inside(), self.batch_size, self.columns, self._dtype()))
        return found

    def _across(self, parts: list[_Found]) -> Iterator[Batch]:
        """The batches that are made of the edges of partitions, the last one of the data set included."""
        waiting: list[Batch] = []
        rows = 0
        for part in parts:
            waiting += part.head
            head = min(-rows % self.batch_size, part.rows)
            if head and (rows + head) % self.batch_size == 0:
                yield joined(waiting)
                waiting = []
            rows += part.rows
            waiting += part.tail
        if waiting:
            yield joined(waiting)

    def _over(self, batches: Iterable[Batch]) -> dict[str, Estimate]:
        net = copy.deepcopy(self.net)  # threads of one process may be at work
        modules = dict(net.named_modules())
        layers: dict[str, Any] = {name: modules[name] for name in self.names}
        run = self.forward or feed
        with torch.no_grad(), eager(), Measurement(net, layers) as measurement:
            measurement.finish_all(self.final)
            return measurement.over(batches, lambda batch: run(net, batch), may_be_empty=True)

    def _tensors(self, block: Any, label: str) -> Batch:
        return to_tensors(columns_of(block, self.columns, label), self._dtype(), label)

    def _dtype(self) -> torch.dtype:
        return float_dtype(self.net)


def float_dtype(net: nn.Module) -> torch.dtype:
    """That of the first parameter or buffer with a fraction."""
    tensors = (t for group in (net.parameters(), net.buffers()) for t in group)
    return next((t.dtype for t in tensors if t.is_floating_point()), torch.get_default_dtype())


def _portable(net: nn.Module) -> nn.Module:
    """A copy for other processes, which may have no accelerator."""
    twin = copy.deepcopy(net).to("cpu")
    for module in twin.modules():
        if getattr(module, "process_group", None) is not None and not isinstance(module.process_group, str):
            module.__dict__["process_group"] = None  # it belongs to this process; no layer uses it while it is measured
    return twin


def _opened(found: bytes) -> _Found:
    opened = pickle.loads(found)
    if isinstance(opened, _Found):
        return opened
    kind, text = opened
    raise getattr(errors, kind, InputError)(text)
