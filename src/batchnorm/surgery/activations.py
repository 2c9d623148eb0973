"""Activations as modules, as calls in a graph, and by the names under which layers fuse them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from batchnorm.nn import batch_norm as ours
from batchnorm.surgery.affine import REARRANGEMENTS, argument, data_users
from batchnorm.surgery.capture import traced_without_draws
from batchnorm.surgery.flow import DataFlow, operation
from batchnorm.surgery.modules import obstacle
from batchnorm.surgery.own_state import own_state
from batchnorm.undo import in_mode


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
    "elu": lambda slope: nn.ELU(),
    "mish": lambda slope: nn.Mish(),
    "gelu_tanh": lambda slope: nn.GELU(approximate="tanh"),
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
    nn.ELU: "elu",
    nn.CELU: "elu",  # that of alpha 1
    nn.Mish: "mish",
}
KNOWN = frozenset(_MODULES)


def of_module(module: nn.Module | None) -> Activation | None:
    """What a layer of ours can fuse in the module's place, or None."""
    if module is None:
        return None
    name = _NAMES.get(type(module))
    if not _has_forward_alone(module):
        return None
    if name is None:
        return _of_forward(module) if not str(type(module).forward.__module__).startswith("torch.") else None
    if getattr(module, "alpha", 1.0) != 1.0:
        return None
    if getattr(module, "approximate", "none") != "none":
        return Activation("gelu_tanh") if module.approximate == "tanh" else None
    return Activation(name, float(getattr(module, "negative_slope", 0.01)))


def _has_forward_alone(module: nn.Module) -> bool:
    """Whether a module has nothing but its class' forward: no tensors, no modules, nothing in its place."""
    kind = type(module)
    things = (module._parameters, module._buffers, module._modules)
    return (
        not any(map(bool, things))
        and kind.__call__ is nn.Module.__call__
        and not any(name in module.__dict__ for name in ("forward", "__call__"))
    )


def _of_forward(module: nn.Module) -> Activation | None:
    """The activation that a class of anybody's computes, and does nothing else, in both modes."""
    found = set()
    for training in (False, True):
        twin = in_mode(copy.deepcopy(module), training)
        before = own_state(twin)
        try:
            graph = traced_without_draws(fx.Tracer(), twin)
        except Exception:  # whatever tracing a forward of any class raises
            return None
        found.add(_computed(list(graph.nodes)) if own_state(twin) == before else None)
    return found.pop() if len(found) == 1 else None


def _computed(nodes: list[fx.Node]) -> Activation | None:
    """The activation of its first input that a graph computes: one call, x sigmoid(x), or x tanh(softplus(x))."""
    inputs = [node for node in nodes if node.op == "placeholder"]
    calls = nodes[len(inputs) : -1]
    if not inputs or not calls or nodes[-1].args != (calls[-1],) or any(node.users for node in inputs[1:]):
        return None
    first = of_call(calls[0])
    if len(calls) == 1:
        return first
    is_gated = operation(calls[-1]) == "mul" and not calls[-1].kwargs and set(calls[-1].args) == {inputs[0], calls[-2]}
    if not is_gated:
        return None
    if len(calls) == 2:
        return Activation("silu") if first == Activation("sigmoid") else None
    is_mish = len(calls) == 3 and _is_softplus(calls[0]) and of_call(calls[1]) == Activation("tanh")
    reads = is_mish and calls[0].all_input_nodes == [inputs[0]] and calls[1].all_input_nodes == [calls[0]]
    return Activation("mish") if reads else None


def _is_softplus(node: fx.Node) -> bool:
    given = argument(node, 1, "beta", 1), argument(node, 2, "threshold", 20)
    return operation(node) == "softplus" and given == (1, 20)


def of_call(node: fx.Node) -> Activation | None:
    """The same for a call such as ``F.relu(x)``, ``x.relu_()`` or ``torch.sigmoid(x)``."""
    name = operation(node) if node.op in ("call_function", "call_method") else ""
    name = "elu" if name == "celu" else name
    if name not in KNOWN or len(node.all_input_nodes) != 1:
        return None
    if name == "gelu" and (how := argument(node, 1, "approximate", "none")) != "none":
        return Activation("gelu_tanh") if how == "tanh" else None
    if name == "elu" and not _is_plain_elu(node):
        return None
    return Activation(name, float(argument(node, 1, "negative_slope", 0.01)) if name == "leaky_relu" else 0.01)


def _is_plain_elu(node: fx.Node) -> bool:
    """Of alpha 1; the operator of that name takes two scales more, the first where the function has `inplace`."""
    scales = {"scale", "input_scale"} & node.kwargs.keys() or len(node.args) > 3
    return (
        not scales and argument(node, 1, "alpha", 1.0) == 1.0 and isinstance(argument(node, 2, "inplace", False), bool)
    )


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


_REARRANGEMENTS = REARRANGEMENTS | {"contiguous", "t"}
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_HOMOGENEOUS = frozenset({"relu", "leaky_relu"})  # f(a x) = a f(x) for a of at least 0


def is_rearrangement(node: fx.Node, of: fx.Node) -> bool:
    """Whether a call gives the values of a node in another shape or order, so that activations may come before it."""
    is_call = node.op in ("call_function", "call_method") and operation(node) in _REARRANGEMENTS
    return is_call and bool(node.args) and node.args[0] is of


def following(flow: DataFlow, node: fx.Node) -> tuple[str, Activation] | str | None:
    """The activation module that alone takes a node's value: (name, activation); why it cannot be fused; or None.

    It may stand behind another shape or order of the value. One that takes factors of at least 0 out of its argument
    may stand behind a dropout, which multiplies by such.
    """
    users, is_dropped = data_users(node), False
    while len(users) == 1:
        called = flow.module(users[0])
        drops = type(called) in _DROPOUTS
        if not drops and type(called) not in (nn.Flatten, nn.Unflatten) and not is_rearrangement(users[0], node):
            break
        is_dropped = is_dropped or drops
        node, users = users[0], data_users(users[0])
    activation = of_module(flow.module(users[0])) if len(users) == 1 else None
    if activation is None or (is_dropped and activation.name not in _HOMOGENEOUS):
        return None
    name = flow.name(users[0])
    reason = obstacle(flow, name)
    return f"its activation '{name}': {reason}" if reason else (name, activation)
