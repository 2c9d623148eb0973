"""Weights of convolutions with the channels last in memory, which torch's convolutions on CPUs are faster with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from batchnorm.errors import InputError, SurgeryError, message_of
from batchnorm.surgery.comparison import Example, copy_of, random_state_kept
from batchnorm.surgery.memory import training_step
from batchnorm.undo import kept

LAID_OUT = "_channels_last_since"
"""What a convolution is marked with whose weight was given another order, until `revert`."""

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
_CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d, nn.Conv3d, nn.ConvTranspose3d)
_ROUNDS = 3
_WORTH = 0.97  # of the time that a step takes in the order at hand


@dataclass(frozen=True)
class MemoryOrder:
    """What became of the order of the convolutions' weights.

    Attributes:
        convolutions: the names of those whose weights have the channels last now.
        ratio: the time of a training step on the example with the channels last, over the time before; None where
            nothing was measured.
        obstacle: why all stayed as they were, or None.
    """

    convolutions: tuple[str, ...] = ()
    ratio: float | None = None
    obstacle: str | None = None

    def __str__(self) -> str:
        if self.obstacle is not None:
            return f"Convolutions keep the order of their weights: {self.obstacle}."
        took = "" if self.ratio is None else f"; a step on the example takes {self.ratio:.2f} of the time before"
        many = len(self.convolutions)
        return f"The weights of {many} convolution{'s' * (many != 1)} have the channels last{took}."


class Weights:
    """Convolutions of a network, and the memory that their weights lie in."""

    def __init__(self, net: nn.Module) -> None:
        self.held = [(name, module, weight, weight.data) for name, module, weight in _planar(net)]

    def lay_out(self) -> None:
        for _, module, weight, _ in self.held:
            weight.data = weight.data.contiguous(memory_format=_FORMATS[weight.ndim])
            module.__dict__[LAID_OUT] = True

    def restore(self) -> None:
        for _, module, weight, data in self.held:
            weight.data = data
            module.__dict__.pop(LAID_OUT, None)


def lay_out(
    net: nn.Module, example: Example, check: Callable[[nn.Module, nn.Module], None], only_if_faster: bool
) -> MemoryOrder:
    """Put the channels last in the weights of all convolutions, if the network computes the same with them.

    Args:
        net: the network, which is changed.
        example: what it is run on.
        check: raises if two networks differ: the one before, and the one after.
        only_if_faster: measure training steps on the example, and leave everything as it was if none is faster, or if
            the network can't run so.

    Raises:
        SurgeryError: the network can't run so, or computes something else; not with ``only_if_faster``.
    """
    weights = Weights(net)
    if not weights.held:
        return MemoryOrder(obstacle="none of them has a weight in torch's usual order that could have another one")
    before, ratio = copy_of(net), None
    with kept(weights, if_it_fails=True):
        weights.lay_out()
        try:
            check(before, net)
            obstacle = None
        except InputError as error:
            cause = error.__cause__ or error
            obstacle = f"with the channels last the network fails ({type(cause).__name__}: {message_of(cause)})"
        except SurgeryError as error:
            said = message_of(error).removeprefix("accelerate: ").removesuffix("; nothing was changed")
            obstacle = f"with the channels last {said}"
        if obstacle is not None and not only_if_faster:
            raise SurgeryError(f"accelerate: {obstacle}; leave out channels_last=True. Nothing was changed.")
        if only_if_faster and obstacle is None:
            ratio = _ratio(before, net, example)
            if ratio > _WORTH:
                obstacle = f"with the channels last a step on the example takes {ratio:.2f} of the time"
    if obstacle is not None:
        weights.restore()
        return MemoryOrder(ratio=ratio, obstacle=obstacle)
    return MemoryOrder(tuple(name for name, *_ in weights.held), ratio)


def put_back(module: nn.Module) -> None:
    """torch's usual order for a convolution's weight, whose order `lay_out` has changed."""
    weight = module._parameters.get("weight")
    if weight is not None:
        weight.data = weight.data.contiguous()
    module.__dict__.pop(LAID_OUT, None)


def _planar(net: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Convolutions by name whose weights lie by themselves in torch's usual order, and can have another one."""
    for name, module in net.named_modules():
        weight = module._parameters.get("weight") if isinstance(module, _CONVOLUTIONS) else None
        if not isinstance(weight, nn.Parameter) or isinstance(weight, nn.UninitializedParameter):
            continue
        if weight.layout is torch.strided and weight.ndim in _FORMATS and weight.is_contiguous():
            alone = weight.untyped_storage().nbytes() == weight.nbytes
            shared = weight.device.type == "cpu" and weight.is_shared()
            if alone and not shared and not weight.is_contiguous(memory_format=_FORMATS[weight.ndim]):
                yield name, module, weight


def _ratio(before: nn.Module, after: nn.Module, example: Example) -> float:
    """The least time of a training step of copies of two networks, in turn: that of the second over the first's."""
    twins = [copy_of(before, training=True), copy_of(after, training=True)]
    best = [float("inf")] * 2
    with random_state_kept(before), torch.enable_grad():
        for turn in range(1 + _ROUNDS):
            for k, twin in enumerate(twins):
                took = training_step(twin, example)
                best[k] = min(best[k], took) if turn else best[k]  # the first step loads and allocates
    return best[1] / best[0]
