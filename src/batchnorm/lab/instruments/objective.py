"""The loss of a network on one batch, as a function of its parameters that changes nothing of the network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from batchnorm.errors import InputError
from batchnorm.training.loop import random_state, set_random_state

Loss = Callable[[nn.Module, Any], Tensor]
Parameters = dict[str, Tensor]


def batch_loss(net: nn.Module, batch: Any) -> Tensor:
    """Mean cross-entropy (nats) of a batch ``(x, y)``: x as the network takes it, y (N,) class numbers."""
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
        given = type(batch).__name__
        raise InputError(
            f"instruments: got a {given} for a batch; expected (x, y), or give loss=lambda net, batch: ..."
        )
    x, y = batch
    return cross_entropy(net(x), y)


class Objective:
    """``loss(net, batch)`` as a function of the parameters that train, every other thing held fixed.

    Each call sees the same batch, the same random numbers (so the same dropout masks) and the same buffers, and works
    on copies: parameters, gradients, running statistics, counters, modes and the state of the random number generators
    of the network are never written, so they are afterwards what they were, bit for bit. The network runs in the mode
    that it is in: batch statistics where it trains, running ones where a layer is frozen.

    Args:
        net: any network.
        batch: what `loss` takes; by default ``(x, y)``.
        loss: ``loss(net, batch)``, a scalar; by default the mean cross-entropy.

    Raises:
        InputError: no parameter trains, or the loss is not a scalar.
    """

    def __init__(self, net: nn.Module, batch: Any, loss: Loss | None = None) -> None:
        self.net, self.batch = net, batch
        self._run = _Run(net, loss or batch_loss)
        self._random = random_state()
        trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
        self.parameters: Parameters = {name: p.detach() for name, p in trained.items()}
        self._places = _places(net, trained)
        if not self.parameters:
            raise InputError(f"instruments: no parameter of {type(net).__name__} has requires_grad")

    def __call__(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The loss at these values of the parameters; one forward."""
        replaced = {f"net.{place}": parameters[name] for place, name in self._places.items()}
        replaced |= {f"net.{name}": buffer.clone() for name, buffer in self.net.named_buffers()}
        now = random_state()
        set_random_state(self._random)
        try:
            value: Tensor = functional_call(self._run, replaced, (self.batch,), tie_weights=False)
        finally:
            set_random_state(now)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise InputError("instruments: loss(net, batch) has to return a scalar tensor")
        return value.reshape(())

    def gradient(self, parameters: Mapping[str, Tensor] | None = None) -> tuple[float, Parameters]:
        """Loss and gradient there, by default where the network is; one forward-backward."""
        at = self.parameters if parameters is None else parameters
        leaves = {name: value.detach().requires_grad_() for name, value in at.items()}
        with torch.enable_grad():
            value = self(leaves)
            found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
        gradient = {
            name: torch.zeros_like(leaf) if g is None else g.detach()
            for (name, leaf), g in zip(leaves.items(), found, strict=True)
        }
        return float(value.detach()), gradient


class _Run(nn.Module):
    """``loss(net, batch)`` as a module, so that the network's tensors can be replaced for one call."""

    def __init__(self, net: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.net = net
        self._loss = loss

    def forward(self, batch: Any) -> Tensor:
        return self._loss(self.net, batch)


def _places(net: nn.Module, trained: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """Where each parameter is registered, a tied one at several places; each module under one of its names."""
    names = {id(parameter): name for name, parameter in trained.items()}
    return {
        f"{prefix}.{key}" if prefix else key: names[id(parameter)]
        for prefix, module in net.named_modules()
        for key, parameter in module._parameters.items()
        if id(parameter) in names
    }


def step(parameters: Parameters, direction: Parameters, size: float) -> Parameters:
    """parameters - size * direction."""
    return {name: value - size * direction[name] for name, value in parameters.items()}


def dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """The scalar product, in float64."""
    return sum(float((a[name].double() * b[name].double()).sum()) for name in a)


def norm(a: Mapping[str, Tensor]) -> float:
    """The l2 norm, in float64."""
    return float(dot(a, a) ** 0.5)


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """The l2 distance, in float64."""
    return norm({name: a[name].double() - b[name].double() for name in a})


def layers_in_order(objective: Objective) -> dict[str, list[str]]:
    """The modules that own trained parameters, in the order of their first call, and their parameters; one forward.

    Modules whose forward is not called (their parameters are read by another) come last.
    """
    owned: dict[str, list[str]] = {}
    for name in objective.parameters:
        owned.setdefault(name.rpartition(".")[0], []).append(name)
    order: dict[str, None] = {}
    hooks = [
        objective.net.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: order.setdefault(name)
        )
        for name in owned
    ]
    try:
        with torch.no_grad():
            objective(objective.parameters)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: owned[name] for name in [*order, *(n for n in owned if n not in order)]}
