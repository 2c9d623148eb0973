"""Training on several ranks of torch.distributed: who does what, what they agree on, and the end of a lost one."""

from __future__ import annotations

import contextlib
import datetime
import gc
import hashlib
import inspect
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from batchnorm import convert, sync_running_statistics
from batchnorm.errors import BatchNormError, DataError, InputError, SynchronizationError
from batchnorm.exchanges import first_line, is_of_an_exchange

T = TypeVar("T")

SETTLING = 0.1
"""Seconds for the threads of gloo to let go of the tensors of their last exchange. One that still holds some when the
interpreter ends aborts the process, whose work is done (torch 2.13; its pull request 179291, which was closed)."""


@dataclass
class Ranks:
    """This process among the ranks of a run; alone, it is rank 0 of 1 and exchanges nothing.

    Args:
        rank: number of this process.
        size: number of processes.
        synchronized: whether layers normalize by the statistics of the whole batch.
        step: the update at work, for errors.
        sharded: whether the parameters are cut over the ranks.
    """

    rank: int = 0
    size: int = 1
    synchronized: bool = True
    step: int = 0
    sharded: bool = False

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files and draws progress."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        return self.size == 1

    def share(self, batch: Tensor) -> Tensor:
        """This rank's part of the places of a batch: every `size`-th, as torch's DistributedSampler cuts them.

        Unlike that sampler it repeats no sample where the batch cannot be divided; `loss_scale` makes up for it.
        """
        return batch if self.is_alone else batch[self.rank :: self.size]

    def prepare(self, network: nn.Module) -> nn.Module:
        """The network whose layers share statistics, where they are to; before optimizers are made of it."""
        normalizes = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())
        if self.is_alone or not self.synchronized or not normalizes:
            return network
        return convert(network, process_group="world")

    def parallel(self, network: nn.Module) -> nn.Module:
        """What to call in training: the network in DistributedDataParallel, which averages the gradients."""
        if self.is_alone or self.sharded or not any(p.requires_grad for p in network.parameters()):
            return network
        # Without its broadcast of buffers, which would overwrite the statistics of all ranks with those of rank 0.
        known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # of older torch
        # So that gradients stay in the buckets of the first step: sums over more than two ranks depend on the place in
        # a bucket, and a run that is resumed would lose the bits.
        options: Any = {name: False, "find_unused_parameters": True}
        return nn.parallel.DistributedDataParallel(network, **options)

    def merge_statistics(self, network: nn.Module) -> None:
        """If each rank normalizes by its own part, give all of them the statistics of all parts."""
        layers = (m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
        if not self.is_alone and not self.synchronized and any(m.running_mean is not None for m in layers):
            with self.watched("running statistics"):
                sync_running_statistics(network)

    def total(self, *values: float) -> list[float]:
        """The sums over ranks of some numbers; the same bits on all."""
        if self.is_alone:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        with self.watched("loss"):
            dist.all_reduce(sums, group=_group())
        return [float(value) for value in sums]

    def begin(self, step: int) -> None:
        """Tell the others, in case they have to say who is missing, which step this rank is at."""
        self.step = step
        if not self.is_alone:
            with contextlib.suppress(RuntimeError):
                _store().set(f"batchnorm/step/{self.rank}", str(step))

    @contextlib.contextmanager
    def watched(self, what: str) -> Iterator[None]:
        """Around an exchange: its failure becomes one error that names the step, the ranks behind, and what waited.

        Raises:
            SynchronizationError: another rank is dead, stuck, or at another exchange.
        """
        try:
            yield
        except SynchronizationError as error:  # of a layer, which it names
            raise SynchronizationError(f"{self._place()}: {error}{self._missing()}") from error
        except RuntimeError as error:
            if isinstance(error, BatchNormError) or not is_of_an_exchange(error):
                raise
            raise SynchronizationError(
                f"{self._place()}: the ranks did not all exchange {what} ({first_line(error)}){self._missing()}"
            ) from error

    def _place(self) -> str:
        return f"rank {self.rank} of {self.size}, step {self.step}"

    def _missing(self) -> str:
        """Who is behind, as far as it is known."""
        behind = []
        for rank in range(self.size):
            if rank == self.rank:
                continue
            try:
                key = f"batchnorm/step/{rank}"
                store = _store()
                at = int(store.get(key)) if store.check([key]) else 0
            except (RuntimeError, ValueError):
                return "; rank 0, which keeps the records of the others, cannot be reached"
            if at <= self.step:
                behind.append((at, rank))
        if not behind:
            return ""
        last = min(at for at, _ in behind)
        names = ", ".join(f"rank {rank}" for at, rank in behind if at == last)
        return f"; last heard of at step {last}: {names}"

    def from_first(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, on all ranks; an error of its own is an error on all."""
        if self.is_alone:
            return make()
        made: list[Any] = [None, None]
        if self.is_first:
            try:
                made[0] = make()
            except BatchNormError as error:
                made[1] = error
        with self.watched("the run folder"):
            dist.broadcast_object_list(made, src=0)
        if made[1] is not None:
            raise made[1]
        return made[0]  # type: ignore[no-any-return]

    def gather(self, mine: Any) -> list[Any]:
        """An object of each rank, on all."""
        if self.is_alone:
            return [mine]
        found: list[Any] = [None] * self.size
        with self.watched("their states"):
            dist.all_gather_object(found, mine)
        return found

    def check_equal(self, network: nn.Module, what: str) -> None:
        """Raise SynchronizationError where ranks hold other bits."""
        prints = self.gather(_fingerprint(network))
        other = [rank for rank, one in enumerate(prints) if one != prints[0]]
        if other:
            raise SynchronizationError(f"{self._place()}: rank(s) {other} hold other bits of {what} than rank 0")


def _fingerprint(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for key, value in network.state_dict().items():
        if key.endswith("num_batches_tracked"):  # each rank counts its own
            continue
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _group() -> Any:
    return dist.group.WORLD


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def is_launched() -> bool:
    """Whether torchrun, or a scheduler that sets the same variables, has started several ranks."""
    return dist.is_available() and int(os.environ.get("WORLD_SIZE", "1") or 1) > 1


def restarts() -> int:
    """How often torchrun has started the ranks anew."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") or 0)


@contextlib.contextmanager
def joined(device: str, synchronized: bool, timeout: float, sharded: bool = False) -> Iterator[Ranks]:
    """This process among the others; a process that is alone exchanges nothing.

    Args:
        device: of the networks: gloo on the CPU, nccl on CUDA.
        synchronized: see `Ranks`.
        timeout: seconds that an exchange may take.
        sharded: see `Ranks`; one process is then a group of its own.

    Raises:
        SynchronizationError: the ranks did not find each other in time.
    """
    if not is_launched() and not sharded:
        yield Ranks(synchronized=synchronized)
        return
    own = not dist.is_initialized()
    backend = "nccl" if torch.device(device).type == "cuda" else "gloo"
    limit = datetime.timedelta(seconds=timeout)
    if own and not is_launched():
        alone = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=alone, rank=0, world_size=1, timeout=limit)
    elif own:
        try:
            store, rank, size = next(dist.distributed_c10d.rendezvous("env://", timeout=limit))  # type: ignore[attr-defined]
            # torchrun's store outlives a restart, and with it the addresses of ranks that are gone.
            store = dist.distributed_c10d.PrefixStore(f"restart_{restarts()}", store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
        except (RuntimeError, ValueError) as error:
            raise SynchronizationError(
                f"rank {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')} did not find the others "
                f"({first_line(error)})"
            ) from error
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), synchronized, sharded=sharded)
    finally:
        if own:
            gc.collect()  # networks in cycles hold the group, and with it its threads
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()
            time.sleep(SETTLING)


def check_parts(ranks: Ranks, batch_size: int, samples: int) -> None:
    """Raise InputError where a rank would have too little of each batch."""
    least = 1 if ranks.synchronized else 2
    if batch_size // ranks.size < least:
        raise InputError(
            f"train: batch_size={batch_size} for {ranks.size} ranks, expected at least {least * ranks.size}: the batch "
            "is that of all ranks together" + ("" if ranks.synchronized else ", and each normalizes by its own part")
        )
    if samples < batch_size:
        raise DataError(
            f"{samples} training samples do not make one batch of {batch_size}. Give a smaller --batch-size."
        )
