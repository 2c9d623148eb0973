"""What modules and tensors were, and how they are put back: for everything that changes a network for a time.

The layer itself holds the things that it remembers for good, through copies and pickles: `nn/saved_modes.py` while it
is frozen, `surgery/conversion.py` until `revert`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_MISSING = object()
Net = TypeVar("Net", bound=nn.Module)


class Memory(Protocol):
    """Something that was, and can be again."""

    def restore(self) -> None: ...


@contextlib.contextmanager
def kept(*memories: Memory, if_it_fails: bool = False) -> Iterator[None]:
    """After the body everything is as it was, put back from the last memory to the first.

    Args:
        memories: made before the body.
        if_it_fails: put back only if the body raises, Ctrl-C included.
    """
    try:
        yield
    except BaseException:
        _restore(memories)
        raise
    if not if_it_fails:
        _restore(memories)


def _restore(memories: tuple[Memory, ...]) -> None:
    for memory in reversed(memories):
        memory.restore()


class Attributes:
    """Some attributes of modules. One that a module had from its class alone is its class's again."""

    def __init__(self, modules: Iterable[nn.Module], *names: str) -> None:
        self._held = [(m, n, n in m.__dict__, getattr(m, n, _MISSING)) for m in modules for n in names]

    def restore(self) -> None:
        for module, name, was_its_own, value in self._held:
            if value is not _MISSING:
                setattr(module, name, value)
            elif hasattr(module, name):
                delattr(module, name)
            if not was_its_own:  # set to what its class says, and so nothing of its own
                module.__dict__.pop(name, None)


class Flags:
    """``requires_grad`` and the gradients of parameters."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._held = [(p, p.requires_grad, p.grad) for p in parameters]

    def restore(self) -> None:
        for parameter, requires_grad, gradient in self._held:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient


class Values:
    """The values of tensors, which go back into the same memory."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._held = [(tensor, tensor.detach().clone()) for tensor in tensors]

    @torch.no_grad()
    def restore(self) -> None:
        for tensor, value in self._held:
            tensor.copy_(value)


class Buffers:
    """All buffers of a network: the same tensors in the same places, with the values that they had."""

    def __init__(self, net: nn.Module) -> None:
        self._places = [(module._buffers, dict(module._buffers)) for module in net.modules()]
        self._values = Values(b for _, buffers in self._places for b in buffers.values() if b is not None)

    def restore(self) -> None:
        self._values.restore()
        for place, buffers in self._places:
            place.update(buffers)


class Structure:
    """Modules as they are built: classes, all attributes, what is registered, flags and gradients; no values."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._held = []
        for module in modules:
            attributes = dict(module.__dict__)
            registries = {name: dict(value) for name, value in attributes.items() if isinstance(value, dict)}
            self._held.append((module, type(module), attributes, registries))
        self._flags = Flags(p for module, *_ in self._held for p in module.parameters(recurse=False))

    def restore(self) -> None:
        for module, kind, attributes, registries in self._held:
            if type(module) is not kind:
                module.__class__ = kind
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for name, content in registries.items():
                registry = module.__dict__[name]
                registry.clear()
                registry.update(content)
        self._flags.restore()


class OptimizerState:
    """The parameters of each group of an optimizer, and what it keeps of them."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer, self._state = optimizer, dict(optimizer.state)
        self._groups: list[tuple[dict[str, Any], list[Any]]] = [(g, list(g["params"])) for g in optimizer.param_groups]

    def restore(self) -> None:
        for group, parameters in self._groups:
            group["params"][:] = parameters
        self._optimizer.state.clear()
        self._optimizer.state.update(self._state)


def in_mode(net: Net, training: bool) -> Net:
    """``net.train(training)``; and the network, which a ``train`` of its own may forget to return."""
    net.train(training)
    return net


@contextlib.contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """``net.eval()`` for the body; then each module is in the mode that it was in."""
    with kept(Attributes(net.modules(), "training")):
        net.eval()
        yield
