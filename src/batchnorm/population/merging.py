"""What the ranks of torch.distributed have measured, merged; one that is missing or has other layers is named."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import BatchNormError, InputError, SynchronizationError
from batchnorm.population.measuring import Estimate, buffers_of

_passes = itertools.count()  # every rank makes the same ones


def over_ranks(
    measure: Callable[[], dict[str, Estimate]],
    layers: dict[str, _BatchNorm],
    group: dist.ProcessGroup | None,
    timeout: float,
) -> dict[str, Estimate]:
    """What all ranks measure together, in one order for all.

    Args:
        measure: this rank's pass over its data.
        layers: those that are measured, by name.
        group: of torch.distributed; None for all ranks.
        timeout: seconds that a rank waits for the others after its own pass.

    Raises:
        InputError: another rank has failed.
        SynchronizationError: a rank is dead, stuck, or has other layers.
    """
    key = f"batchnorm/calibrate/{next(_passes)}"
    error: BaseException | None = None
    mine: dict[str, Estimate] = {}
    try:
        mine = measure()
    except BaseException as raised:
        error = raised
    layer = next(iter(layers))
    with _waiting(key, group, timeout, layer):
        failed = _meet(layers, error is not None, group, timeout)
    if error is not None:
        raise error
    if failed:
        raise InputError(f"calibrate: {len(failed)} other rank(s) failed ({failed}); the network is unchanged")
    with _waiting(key, group, timeout, layer):
        return _merged(mine, layers, group)


def _merged(
    mine: dict[str, Estimate], layers: dict[str, _BatchNorm], group: dist.ProcessGroup | None
) -> dict[str, Estimate]:
    """What this rank has measured with what the others have, in the order in which the layers ran."""
    order = list(mine)
    places = [order.index(name) if name in mine else len(layers) for name in layers]
    device = buffers_of(next(iter(layers.values())))[0].device
    first = torch.tensor(places, dtype=torch.long, device=device)
    dist.all_reduce(first, dist.ReduceOp.MIN, group=group)
    merged: dict[str, Estimate] = {}
    for place, name in sorted(zip(first.tolist(), layers, strict=True), key=lambda pair: pair[0]):
        if place < len(layers):
            part = mine.get(name) or Estimate.empty(buffers_of(layers[name])[0])
            merged[name] = part.all_reduce(group)
    return merged


def _meet(layers: dict[str, _BatchNorm], failed: bool, group: dist.ProcessGroup | None, timeout: float) -> list[int]:
    """The ranks that have failed; raises where the ranks have other layers."""
    shapes = {name: tuple(buffers_of(layer)[0].shape) for name, layer in layers.items()}
    digest = hashlib.sha256(repr(shapes).encode()).digest()
    device = buffers_of(next(iter(layers.values())))[0].device
    mine = torch.tensor([failed, int.from_bytes(digest[:7], "big")], dtype=torch.long, device=device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    work: Any = dist.all_gather(everyone, mine, group=group, async_op=True)
    work.wait(datetime.timedelta(seconds=timeout))
    table: Tensor = torch.stack(everyone)
    if len(set(table[:, 1].tolist())) > 1:
        all_shapes: list[Any] = [None] * len(everyone)
        dist.all_gather_object(all_shapes, shapes, group=group)
        _refuse_differences(all_shapes)
    return [rank for rank, bad in enumerate(table[:, 0].tolist()) if bad]


def _refuse_differences(all_shapes: list[dict[str, tuple[int, ...]]]) -> None:
    """Name the first layer that is not the same on all ranks."""
    for name in dict.fromkeys(name for shapes in all_shapes for name in shapes):
        found = [shapes.get(name) for shapes in all_shapes]
        if len(set(found)) > 1:
            listed = ", ".join(f"rank {rank}: {shape or 'none'}" for rank, shape in enumerate(found))
            raise SynchronizationError(
                f"calibrate: layer {name!r} has statistics of other shapes on other ranks ({listed}); expected the "
                "same network on all. The network is unchanged"
            )
    raise SynchronizationError("calibrate: the ranks have their layers in another order; the network is unchanged")


@contextlib.contextmanager
def _waiting(key: str, group: dist.ProcessGroup | None, timeout: float, layer: str) -> Iterator[None]:
    """Around the exchanges of a pass: an error of theirs says which ranks have not come to it."""
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    store: Any = dist.distributed_c10d._get_default_store()
    rank = dist.get_rank()
    with contextlib.suppress(RuntimeError):
        store.set(f"{key}/{rank}", "1")
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, BatchNormError):
            raise
        try:
            missing = [other for other in ranks if not store.check([f"{key}/{other}"])]
        except RuntimeError:
            missing = [0]  # which keeps the store
        who = f"rank(s) {missing} did not come to the end of theirs" if missing else "an exchange failed"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SynchronizationError(
            f"calibrate, rank {rank}: this rank has measured its batches (layer {layer!r} and those after it), and "
            f"{who} within timeout={timeout:g} seconds ({reason}). The network is unchanged"
        ) from error
