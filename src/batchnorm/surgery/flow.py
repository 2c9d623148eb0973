"""Data flow of a network as a graph: whose output goes into which layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

ROOT = "net"
SHAPE_READERS = {"dim", "ndimension", "numel", "size", "sym_size"}
SHAPE_ATTRIBUTES = {"device", "dtype", "is_cuda", "ndim", "requires_grad", "shape"}
EXPORTED = "torch.export"
IS_ZERO = "is_zero"  # of a constant that a forward makes


class DataFlow:
    """The captured graph of ``net`` and its modules.

    Attributes:
        graph: the ``fx.Graph``; editing it does not change the network.
        net: the network that was captured (not the copy that was traced).
        modules: each module by its first qualified name, shared modules once.
        method: ``"torch.fx"``; or ``"torch.fx on the example's shapes"`` or ``"torch.export"``: then the flow holds for
            these alone.
        draws: whether random numbers that are not in the graph shaped it: it is one draw of several.
    """

    def __init__(self, graph: fx.Graph, net: nn.Module, method: str, draws: bool = False) -> None:
        self.graph = graph
        self.net = net
        self.method = method
        self.draws = draws
        self.modules: dict[str, nn.Module] = dict(net.named_modules())
        self._first: dict[int, str] = {id(module): name for name, module in self.modules.items()}
        self._calls: dict[str, list[fx.Node]] = {}
        self._names: dict[fx.Node, str] = {}
        for node in graph.nodes:
            if node.op == "call_module":
                self._calls.setdefault(self.name(node), []).append(node)

    @property
    def nodes(self) -> list[fx.Node]:
        return list(self.graph.nodes)

    def name(self, node: fx.Node) -> str:
        """The qualified name of the module or tensor behind a node."""
        if node not in self._names:
            path = str(node.target).removeprefix(ROOT).removeprefix(".")
            called = node.op == "call_module"
            self._names[node] = self._first[id(self.net.get_submodule(path))] if called else path
        return self._names[node]

    def module(self, node: Any) -> nn.Module | None:
        """The layer that a node calls."""
        if isinstance(node, fx.Node) and node.op == "call_module":
            return self.modules[self.name(node)]
        return None

    def calls(self, name: str) -> list[fx.Node]:
        """The nodes that call the module ``name``."""
        return [node for node in self._calls.get(name, []) if not node._erased]

    def call(self, name: str, layer: nn.Module, node: fx.Node, given: fx.Node) -> fx.Node:
        """Put a call of ``layer``, which the network has not, on the value of ``given`` in the place of ``node``."""
        with self.graph.inserting_before(node):
            call = self.graph.call_module(f"{ROOT}.{name}", (given,))
        call.meta.update(node.meta)
        node.replace_all_uses_with(call)
        self.graph.erase_node(node)
        self.modules[name], self._names[call] = layer, name
        self._calls.setdefault(name, []).append(call)
        return call

    def readers(self, name: str) -> list[fx.Node]:
        """What reads values of the module's own parameters or buffers beside the module itself."""
        own = {
            id(t)
            for t in (
                *self.modules[name].parameters(recurse=False),
                *self.modules[name].buffers(recurse=False),
            )
        }
        return [
            user
            for node in self.nodes
            if node.op == "get_attr" and id(attribute(self.net, self.name(node))) in own
            for user in node.users
            if not reads_shape(user)
        ]

    def describe(self, node: fx.Node) -> str:
        """A node in words."""
        if node.op == "call_module":
            return self.name(node)
        if node.op == "output":
            return "the network's output"
        if node.op == "placeholder" or is_input(node):
            return "the network's input"
        if node.op == "get_attr":
            return f"the tensor {self.name(node)}"
        if node.target is observed:
            return f"the hooks of '{str(node.args[1]).removeprefix(ROOT).removeprefix('.')}'"
        return f"a call of {operation(node)}"


def attribute(net: nn.Module, path: str) -> Any:
    """The attribute of a module or submodule at a qualified path, None where there is none."""
    value: Any = net
    for key in path.split("."):
        value = getattr(value, key, None)
    return value


def reads_shape(node: fx.Node) -> bool:
    """Whether a node reads a tensor's shape, dtype or device, and not its values."""
    if node.op == "call_function" and operation(node) == "getattr":
        return node.args[1] in SHAPE_ATTRIBUTES
    return node.op in ("call_function", "call_method") and operation(node) in SHAPE_READERS


def value_of(node: fx.Node) -> Any:
    """The node's value on the example as tensors without data."""
    return node.meta.get("val")


def rank(node: fx.Node) -> int | None:
    """The number of axes of a node's tensor on the example, None for anything but a tensor."""
    value = value_of(node)
    return value.dim() if isinstance(value, Tensor) else None


def data_inputs(node: fx.Node) -> list[fx.Node]:
    """The values that flow into a node, without the network's own parameters and buffers."""
    return [n for n in node.all_input_nodes if n.op != "get_attr"]


def is_input(node: fx.Node) -> bool:
    return node.op == "call_function" and operation(node) == "getitem" and node.all_input_nodes[0].op == "placeholder"


def operation(node: fx.Node) -> str:
    """The plain name of a function or method node: ``add`` for ``+``, ``+=``, ``torch.add`` and
    ``Tensor.add_`` alike."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = str(target.overloadpacket.__name__)
    elif isinstance(target, str):
        name = target
    else:
        name = str(getattr(target, "__name__", target))
    name = name.rstrip("_") if not name.startswith("__") else name.strip("_")
    in_place = {"iadd": "add", "imul": "mul", "isub": "sub", "itruediv": "div", "truediv": "div"}
    return in_place.get(name, name)


def observed(value: Any, name: str) -> Any:
    """Stands in the graph where the hooks of module ``name`` see, and may change, a value."""
    return value
