"""Activations as modules, as calls in a graph, and by the names under which layers fuse them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from batchnorm.nn import batch_norm as ours
from batchnorm.surgery.affine import argument, data_users
from batchnorm.surgery.flow import DataFlow, operation
from batchnorm.surgery.modules import obstacle


@dataclass(frozen=True)
class Activation:
    """A fusible activation: its name and, of "leaky_relu", its slope."""

    name: str
    slope: float = 0.01

    def module(self) -> nn.Module:
        return _MODULES[self.name](self.slope)


_MODULES: dict[str, Callable[[float], nn.Module]] = {
    "relu": lambda slope: nn.ReLU(),
    "relu6": lambda slope: nn.ReLU6(),
    "leaky_relu": lambda slope: nn.LeakyReLU(slope),
    "silu": lambda slope: nn.SiLU(),
    "gelu": lambda slope: nn.GELU(),
    "hardswish": lambda slope: nn.Hardswish(),
    "sigmoid": lambda slope: nn.Sigmoid(),
    "tanh": lambda slope: nn.Tanh(),
}
_NAMES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Hardswish: "hardswish",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
}
KNOWN = frozenset(_MODULES)


def of_module(module: nn.Module | None) -> Activation | None:
    """What a layer of ours can fuse in the module's place, or None."""
    name = None if module is None else _NAMES.get(type(module))
    if name is None or getattr(module, "approximate", "none") != "none":
        return None
    return Activation(name, float(getattr(module, "negative_slope", 0.01)))


def of_call(node: fx.Node) -> Activation | None:
    """The same for a call such as ``F.relu(x)``, ``x.relu_()`` or ``torch.sigmoid(x)``."""
    name = operation(node) if node.op in ("call_function", "call_method") else ""
    if name not in KNOWN or len(node.all_input_nodes) != 1:
        return None
    if name == "gelu" and argument(node, 1, "approximate", "none") != "none":
        return None
    return Activation(name, float(argument(node, 1, "negative_slope", 0.01)) if name == "leaky_relu" else 0.01)


def of_layer(layer: Any) -> Activation | None:
    """What a batch normalization layer of ours has fused already."""
    name = getattr(layer, "activation", None)
    return Activation(name, layer.negative_slope) if name else None


_COMPUTES = "_computes_activation"


def takes_over(module: nn.Module, layer: Any) -> None:
    """Notes on a module that it computes the activation of the fused layer whose place it takes."""
    if getattr(layer, "activation", None):
        module.__dict__[_COMPUTES] = layer.activation


def is_computed_by(module: nn.Module | None, name: str) -> bool:
    """Whether the module computes this activation itself: a fused layer, or what surgery put in its place."""
    if isinstance(module, ours.BatchNorm):
        return (module.activation or "") == name
    return module is not None and module.__dict__.get(_COMPUTES, "") == name != ""


def following(flow: DataFlow, node: fx.Node) -> tuple[str, Activation] | str | None:
    """The activation module that alone takes a node's value: (name, activation); why it cannot be fused; or None."""
    users = data_users(node)
    activation = of_module(flow.module(users[0])) if len(users) == 1 else None
    if activation is None:
        return None
    name = flow.name(users[0])
    reason = obstacle(flow, name)
    return f"its activation '{name}': {reason}" if reason else (name, activation)
