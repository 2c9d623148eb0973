"""Exchanges between ranks: what ranks must agree on before the first, and who is missing where one fails."""

from __future__ import annotations

import hashlib
import re
import time
from typing import Any, NoReturn

import torch
from torch import distributed as dist

from batchnorm.errors import BatchNormError, SynchronizationError

_WORDS = re.compile(  # of errors of gloo, nccl and their stores
    r"\b(gloo|nccl|connection|timed out|timeout|peer|process group|socket|(tcp|file|hash)?store)\b", re.IGNORECASE
)
PATIENCE = 2.0  # seconds in which ranks whose exchange failed, too, tell the others so
_KEY = "batchnorm/failed"
_last = ""  # the layer whose ranks have exchanged last
# Where Dynamo breaks the graph if an autograd function writes to a module's name: in torch 2.10 and 2.11, not in 2.13.
_BREAKS_GRAPHS = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13)
_compared: dict[str, list[str]] = {}  # of each group the layers that its ranks have compared, in that order


class waiting:  # noqa: N801 - a context manager, named as one
    """Around a collective: its error names the layer, and the ranks that did not come to it.

    Args:
        group: of torch.distributed; None for all ranks.
        layer: its name.
        exchange: which of the layer's it is; a rank that has left out a layer may meet the others in another one.
    """

    def __init__(self, group: Any, layer: str, exchange: str = "comparison") -> None:
        self.group, self.layer, self.exchange = group, layer, exchange

    def __enter__(self) -> None:
        global _last
        if not (_BREAKS_GRAPHS and torch.compiler.is_compiling()):
            _last = self.layer

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, RuntimeError) and not isinstance(error, BatchNormError):
            place = f"{self.layer}, {self.exchange}"
            raise SynchronizationError(
                f"{self.layer}: the ranks of its process group did not all exchange their statistics "
                f"({first_line(error)})"
                f"{_absent(self.group, place)}; each must run the same layers forward and backward, an empty "
                "batch included"
            ) from error


class rank_errors:  # noqa: N801 - a context manager, named as one
    """Around a training step on several ranks: the error of any exchange names the ranks that did not come to it.

    Layers with ``process_group=`` name themselves and the missing ranks without it. DistributedDataParallel exchanges,
    too: buffers before a forward, gradients in the backward. A rank that is dead or stuck is met there first, as an
    error of gloo or nccl that names nothing. How long an exchange waits is the ``timeout`` of the process group.

    Args:
        process_group: of torch.distributed; "world" or None for all ranks.

    Raises:
        SynchronizationError: an exchange failed; the message names the ranks that are missing, and the layer before.

    Source: this package (docs/synchronized.md).

    Examples:
        >>> import torch, batchnorm as bn
        >>> net = torch.nn.Linear(2, 2)
        >>> with bn.rank_errors():
        ...     net(torch.zeros(1, 2)).sum().backward()
    """

    def __init__(self, process_group: Any = None) -> None:
        self.group = None if isinstance(process_group, str) else process_group

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, RuntimeError) or isinstance(error, BatchNormError) or not is_of_an_exchange(error):
            return
        if not (dist.is_available() and dist.is_initialized()):
            return
        place = f"an exchange after {_last}" if _last else "an exchange before the first layer's"
        raise SynchronizationError(
            f"rank {dist.get_rank()}: the ranks did not all come to {place} ({first_line(error)})"
            f"{_absent(self.group, place)}"
        ) from error


def is_of_an_exchange(error: RuntimeError) -> bool:
    """Whether a RuntimeError, of which torch has one for all, comes from gloo, nccl or their store."""
    return isinstance(error, dist.DistError) or bool(_WORDS.search(str(error)))


def first_line(error: BaseException) -> str:
    """What an error says first, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def agree(group: Any, layer: str, options: str, device: torch.device) -> int:
    """Compare what the ranks say of a layer: sums of other shapes, once they are exchanged, can end a process.

    Args:
        group: of torch.distributed; None for all ranks.
        layer: its name.
        options: of the layer and its input, in words.
        device: of the exchange.

    Returns:
        Which layer it is of those that the ranks of the group have compared, from 1: the same on all ranks.

    Raises:
        SynchronizationError: a rank is at another layer, or has other options; or a rank is missing.
    """
    text = f"{layer}: {options}"
    digest = hashlib.sha256(text.encode()).digest()
    mine = torch.tensor([int.from_bytes(digest[:7], "big")], device=device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    with waiting(group, layer):
        dist.all_gather(everyone, mine, group=group)
        if all(bool(one == mine) for one in everyone):
            layers = _layers(group)
            layers.append(layer)
            return len(layers)
        texts: list[Any] = [None] * len(everyone)
        dist.all_gather_object(texts, text, group=group)
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    listed = "; ".join(f"rank {rank} has {text}" for rank, text in zip(ranks, texts, strict=True))
    raise SynchronizationError(
        f"{layer}: the ranks that share its statistics differ ({listed}); expected the same network, options and "
        "dtypes on all"
    )


def refuse_mixture(group: Any, layer: str, places: list[int]) -> NoReturn:
    """Raise for ranks that have exchanged statistics of different layers, by what `agree` gave each for its own."""
    names, ranks = _layers(group), dist.get_process_group_ranks(group or dist.group.WORLD)
    told = [names[place - 1] if 0 < place <= len(names) else f"layer {place}" for place in places]
    listed = "; ".join(
        f"rank {rank} is at {name} (number {place})" for rank, name, place in zip(ranks, told, places, strict=True)
    )
    raise SynchronizationError(
        f"{layer}: the ranks exchanged statistics of different layers ({listed}; counted in the order of their first "
        "exchanges); each rank must run the same layers in the same order"
    )


def _layers(group: Any) -> list[str]:
    every: Any = dist.group.WORLD
    return _compared.setdefault((group or every).group_name, [])


def _absent(group: Any, place: str) -> str:
    """Which ranks have not told within PATIENCE that an exchange of theirs failed, too, and where the others are."""
    try:
        store: Any = dist.distributed_c10d._get_default_store()
        mine, ranks = dist.get_rank(), dist.get_process_group_ranks(group or dist.group.WORLD)
        store.set(f"{_KEY}/{mine}", place)
        deadline = time.monotonic() + PATIENCE
        others = [rank for rank in ranks if rank != mine]
        silent = others
        while silent and time.monotonic() < deadline:
            silent = [rank for rank in others if not store.check([f"{_KEY}/{rank}"])]
            if silent:
                time.sleep(0.05)
        elsewhere = {rank: store.get(f"{_KEY}/{rank}").decode() for rank in others if rank not in silent}
    except (RuntimeError, ValueError):
        return "; the rank that keeps the store of the group, mostly rank 0, cannot be reached"
    told = [f"rank {rank} is at {other} and this one at {place}" for rank, other in elsewhere.items() if other != place]
    if silent:
        names = ", ".join(f"rank {rank}" for rank in silent)
        told.append(f"{names} did not come to it: it is dead, stuck, or has no batch left")
    return "".join(f"; {one}" for one in told)
