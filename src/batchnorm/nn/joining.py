"""Ranks with different numbers of batches: what a rank without a batch does while the others' layers exchange."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.algorithms.join import Joinable, JoinHook
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import PackedSequence
from torch.utils.hooks import RemovableHandle

from batchnorm.errors import InputError, SynchronizationError
from batchnorm.nn import modes
from batchnorm.nn.batch_norm import BatchNorm
from batchnorm.ops.context import is_recomputing
from batchnorm.pools import is_alone, process_group


def joinable(net: DistributedDataParallel) -> Joinable:
    """A network that may stand in `torch.distributed.algorithms.join.Join` although its layers share statistics.

    In the list of `Join` it takes the network's place; other joinables follow it. A rank that has run out of batches
    then takes part in every exchange of the others with empty batches, as its own last batch was: what runs forward,
    what runs backward, and in which order. Its running statistics go on with theirs.

    Args:
        net: wrapped in DistributedDataParallel. Its layers need a process group of their own,
            ``torch.distributed.new_group()``: within the group in which gradients are reduced, their exchanges and the
            reductions would have to come in one order on all ranks, and a rank that has joined cannot know it.

    Returns:
        The joinable, for the list of `Join`.

    Raises:
        InputError: a network that is not wrapped, no layer that shares statistics, or one that does so in the
            network's own process group.
        SynchronizationError: on leaving `Join`, on a rank that never had a batch, and so cannot know what the others
            exchange; give each rank at least one.

    As for `Join` itself, each iteration is one forward and one backward of ``net`` (second derivatives, which exchange
    more, are not followed).

    Source: this package; `torch.distributed.algorithms.join` has the protocol.

    Examples:
        >>> from torch.distributed.algorithms.join import Join
        >>> def train(net, batches, optimizer):
        ...     with Join([joinable(net)]):
        ...         for x, target in batches:  # of another number on each rank
        ...             nn.functional.mse_loss(net(x), target).backward()
        ...             optimizer.step()
        ...             optimizer.zero_grad()
    """
    if not isinstance(net, DistributedDataParallel):
        raise InputError(
            f"joinable: got a {type(net).__name__}; expected a network in DistributedDataParallel, whose reductions "
            "Join shadows as well"
        )
    layers = [m for m in net.modules() if isinstance(m, BatchNorm) and not is_alone(m.process_group)]
    if not layers:
        raise InputError("joinable: no layer of the network shares statistics with other ranks; give Join the network")
    for layer in layers:
        if (process_group(layer.process_group) or dist.group.WORLD) is net.process_group:
            raise InputError(
                f"joinable: {layer._name()} shares statistics in the group in which gradients are reduced; give the "
                "layers one of their own: bn.convert(net, process_group=torch.distributed.new_group()), before "
                "DistributedDataParallel"
            )
    return _Joinable(net, layers)


@dataclass
class _Call:
    """One forward of a layer, and how to repeat it with nothing."""

    layer: BatchNorm
    empty: Callable[[], tuple[Any, dict[str, Any]]]
    has_gradient: bool
    recomputed: bool


class _Record:
    """The exchanges of one iteration, in their order: the number of a call, and whether it went forward."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []
        self.events: list[tuple[int, bool]] = []
        self.pausing = False

    def clear(self, *_: Any) -> None:
        self.calls, self.events = [], []

    def note(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
        """A forward hook."""
        assert isinstance(layer, BatchNorm)
        if self.pausing or not (layer.normalizes_by_batch or layer.updates_statistics):
            return
        x = args[0] if args else kwargs["input"]
        weighed = (args[4] if len(args) > 4 else kwargs.get("weights")) is not None
        data = y.data if isinstance(y, PackedSequence) else y
        number = len(self.calls)
        has_gradient = data.requires_grad and layer.normalizes_by_batch
        self.calls.append(_Call(layer, _nothing(layer, x, weighed), has_gradient, is_recomputing()))
        self.events.append((number, True))
        if has_gradient:
            assert data.grad_fn is not None
            data.grad_fn.register_prehook(lambda _: self.events.append((number, False)))

    def repeat(self) -> None:
        """All of it, with empty batches."""
        if not self.calls:
            raise SynchronizationError(
                "Join: this rank had no batch of its own, so it cannot know what the others' layers exchange; "
                "give each rank at least one batch"
            )
        outputs: dict[int, tuple[Tensor, Tensor]] = {}
        self.pausing = True
        try:
            for number, forward in list(self.events):
                if forward:
                    outputs[number] = _run(self.calls[number])
                else:
                    x, y = outputs.pop(number)
                    torch.autograd.grad(y, x, torch.zeros_like(y))
        finally:
            self.pausing = False


def _run(call: _Call) -> tuple[Tensor, Tensor]:
    x, kwargs = call.empty()
    with torch.set_grad_enabled(call.has_gradient):
        x.requires_grad_(call.has_gradient)
        if not call.recomputed:
            return x, call.layer(x, **kwargs)
        with modes.no_update(call.layer):
            return x, call.layer(x, **kwargs)


def _nothing(layer: BatchNorm, x: Any, weighed: bool) -> Callable[[], tuple[Any, dict[str, Any]]]:
    """Makes an input like x without samples."""
    if isinstance(x, PackedSequence) or x.is_nested:
        data = x.data if isinstance(x, PackedSequence) else x.values()
        shape = [0, layer.num_features] if layer.pool is None else [0, 1, layer.num_features]
        dtype, device, batch = data.dtype, data.device, 0
    else:
        shape, dtype, device = list(x.shape), x.dtype, x.device
        batch = 0 if layer.pool is None or layer.batch_first else 1
    shape[batch] = 0

    def make() -> tuple[Any, dict[str, Any]]:
        empty = torch.zeros(shape, dtype=dtype, device=device)
        if not weighed:
            return empty, {}
        axis = 1 if layer.pool is None else 2  # of the channels
        return empty, {"weights": torch.zeros(shape[:axis] + shape[axis + 1 :], device=device)}

    return make


class _Joinable(Joinable):
    """A DistributedDataParallel network whose hook also shadows its layers."""

    def __init__(self, net: DistributedDataParallel, layers: list[BatchNorm]) -> None:
        self.net, self.layers, self.record = net, layers, _Record()
        self.watching: list[RemovableHandle] = []

    @property
    def _join_config(self) -> Any:
        """Join's settings, which the network goes by: it tells the others that it has not joined."""
        return self.net._join_config

    @_join_config.setter
    def _join_config(self, config: Any) -> None:
        self.net._join_config = config

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """Records from now on, until all have joined."""
        self.stop()
        self.watching = [self.net.register_forward_pre_hook(self.record.clear)]
        self.watching += [m.register_forward_hook(self.record.note, with_kwargs=True) for m in self.layers]
        return _Hook(self, **kwargs)

    def stop(self) -> None:
        for handle in self.watching:
            handle.remove()

    @property
    def join_device(self) -> torch.device:
        return self.net.join_device  # type: ignore[no-any-return]

    @property
    def join_process_group(self) -> Any:
        return self.net.join_process_group


class _Hook(JoinHook):
    """The network's own hook, and between its part before the others' forward and that after it, the layers'."""

    def __init__(self, joinable: _Joinable, **kwargs: Any) -> None:
        self.joinable, self.net, self.record = joinable, joinable.net, joinable.record
        self.inner = self.net.join_hook(**kwargs)

    def main_hook(self) -> None:
        """In the order of the ranks that have not joined: buffers, the layers, then gradients."""
        repeated = False

        def gradients() -> None:
            nonlocal repeated
            self.record.repeat()
            repeated = True
            type(self.net)._match_all_reduce_for_bwd_pass(self.net)

        self.net._match_all_reduce_for_bwd_pass = gradients  # type: ignore[method-assign]
        try:
            self.inner.main_hook()
        finally:
            del self.net._match_all_reduce_for_bwd_pass
        if not repeated:  # gradients are not reduced: no_sync()
            self.record.repeat()

    def post_hook(self, is_last_joiner: bool) -> None:
        self.joinable.stop()
        self.inner.post_hook(is_last_joiner)
