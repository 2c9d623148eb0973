"""The transactional plan: every edit of a network is planned, applied, verified, or undone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn
from torch.optim import Optimizer

from batchnorm.undo import Memory, OptimizerState, Structure, kept


@dataclass(frozen=True)
class Step:
    """One edit: what it does, in words, and the action that does it (never in place)."""

    what: str
    do: Callable[[], None]


@dataclass
class Plan:
    """Steps on one network, and a check of the result that raises when it is not what was planned.

    ``apply`` carries out all the steps and the check, or leaves the network (and optimizer) as it
    was: the same module objects, parameters, buffers, flags and modes.
    """

    net: nn.Module
    steps: Sequence[Step]
    verify: Callable[[], None]
    optimizer: Optimizer | None = None
    skipped: dict[str, str] = field(default_factory=dict)

    def apply(self) -> None:
        with transaction(self.net, self.optimizer):
            for step in self.steps:
                step.do()
            self.verify()

    def __str__(self) -> str:
        lines = [step.what for step in self.steps]
        lines += [f"{name or 'the network'}: left alone, {why}" for name, why in self.skipped.items()]
        return "\n".join(lines)


@contextlib.contextmanager
def transaction(net: nn.Module, optimizer: Optimizer | None = None) -> Iterator[None]:
    """Undo every change of structure, attributes, flags and optimizer state if the body raises."""
    memories: list[Memory] = [Structure(net.modules())]
    if optimizer is not None:
        memories.append(OptimizerState(optimizer))
    with kept(*memories, if_it_fails=True):
        yield


def references(net: nn.Module, module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Every place (parent, key) where ``module`` is registered in ``net``."""
    return [(parent, key) for parent in net.modules() for key, child in parent._modules.items() if child is module]


def replace_module(net: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` is registered; keys and order stay."""
    for parent, key in references(net, old):
        parent._modules[key] = new
