"""A batch normalization that is computed with what comes behind it: as a value, and in a graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook

from batchnorm.kernels import aten
from batchnorm.nn import batch_norm as ours
from batchnorm.nn.outside import has_hooks
from batchnorm.ops.context import is_compiled
from batchnorm.surgery import activations
from batchnorm.surgery.conversion import Absorbed


@dataclass(frozen=True)
class Before:
    """A batch normalization whose output only a depthwise convolution or a pooling reads.

    Attributes:
        layer: the batch normalization.
        activation: of a call behind it; None leaves it to the layer.
        slope: that of the activation.
        stand_ins: modules between both that hand on what they are given, since the layer computes them.
    """

    layer: Any
    activation: str | None = None
    slope: float = 0.0
    stand_ins: tuple[Any, ...] = ()

    def __call__(self, x: Any) -> Any:
        y = activated(self.layer(x), self.layer, self.activation, self.slope)
        for module in self.stand_ins:
            y = module(y)
        return y

    def is_one_call(self) -> bool:
        """Whether the layer computes all of it, and nobody watches."""
        return (
            isinstance(self.layer, ours.BatchNorm)
            and computes(self.layer, self.activation)
            and not has_hooks(self.layer)
            and all(isinstance(each, Absorbed) and not has_hooks(each) for each in self.stand_ins)
        )


def can_be_one_call(x: Any) -> bool:
    """Whether C++ may take an input; it looks at the rest."""
    return not is_compiled() and isinstance(x, Tensor) and x.is_cpu and not _has_any_global_hook()


def computes(layer: Any, activation: str | None) -> bool:
    return activation is None or activations.is_computed_by(layer, activation)


def activated(y: Tensor, layer: Any, activation: str | None, slope: float) -> Tensor:
    return y if computes(layer, activation) else aten.activate(y, activation or "identity", slope)


# ---------------------------------------------------------------------------------------------- in a graph
_IN_PLACE = {"iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "iand", "ior", "ixor"}


def writes(node: fx.Node) -> bool:
    """Whether a call changes its first argument in place."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = str(node.target if isinstance(node.target, str) else getattr(node.target, "__name__", ""))
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in _IN_PLACE or bool(node.kwargs.get("inplace")) or name == "setitem"


def nothing_is_written(graph: fx.Graph, first: fx.Node, last: fx.Node) -> bool:
    """Whether no call after one node and before another changes a value in place, which the first may have read."""
    nodes = list(graph.nodes)
    return not any(map(writes, nodes[nodes.index(first) + 1 : nodes.index(last)]))


def is_call_of(module: nn.Module, node: Any, kind: Callable[[Any], bool]) -> bool:
    """Whether a node calls a module of some kind with one value."""
    return (
        isinstance(node, fx.Node)
        and node.op == "call_module"
        and len(node.args) == 1
        and not node.kwargs
        and kind(module.get_submodule(str(node.target)))
    )


@dataclass
class Found:
    """A `Before` in a graph.

    Attributes:
        nodes: its calls, the last first.
        layer: the name of the batch normalization; arguments: its activation and slope, if these are a call's.
        stand_ins: the names of modules that hand on what they are given.
        x: the input.
    """

    nodes: list[fx.Node]
    layer: str
    arguments: tuple[Any, ...]
    stand_ins: list[str]
    x: Any

    def made(self, graph: fx.Graph) -> fx.Node:
        """The `Before`."""
        what = (graph.get_attr(self.layer), *(self.arguments or (None, 0.0)))
        held = tuple(graph.get_attr(name) for name in reversed(self.stand_ins))
        return graph.call_function(Before, (*what, held))


def found_before(
    module: nn.Module, node: Any, is_ours: Callable[[Any], bool], is_absorbed: Callable[[str], bool], normalized: Any
) -> Found | None:
    """The batch normalization, with its activation, that makes ``node``, which has one reader.

    ``normalized`` is the function whose calls stand for a layer and an activation behind it.
    """
    nodes: list[fx.Node] = []
    stand_ins: list[str] = []
    while isinstance(node, fx.Node) and len(node.users) == 1:
        nodes.append(node)
        if node.op == "call_function" and node.target is normalized:
            layer, x, residual, *arguments = node.args
            assert isinstance(layer, fx.Node)
            return None if residual is not None else Found(nodes, str(layer.target), tuple(arguments), stand_ins, x)
        if is_call_of(module, node, is_ours):
            return Found(nodes, str(node.target), (), stand_ins, node.args[0])
        if not (is_call_of(module, node, lambda _: True) and is_absorbed(str(node.target))):
            return None
        stand_ins.append(str(node.target))
        node = node.args[0]
    return None
