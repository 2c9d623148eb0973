"""Branches whose sum is one convolution: re-parameterization (Ding et al. 2021, RepVGG, section 3.3).

A block computes, say, ``BN(conv3x3(x)) + BN(conv1x1(x)) + BN(x)``. With known statistics each branch is a convolution
of the same x, the last one with a kernel that is 1 at its center. Their sum is one convolution, whose kernel is the sum
of the kernels with their centers on each other. Branches may also be subtracted, and scaled by a number a channel.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from batchnorm.nn.outside import has_hooks
from batchnorm.surgery.absorption import State, Weights
from batchnorm.surgery.affine import data_users, is_identity, is_norm, wide
from batchnorm.surgery.capture import trace_module
from batchnorm.surgery.comparison import copy_of
from batchnorm.surgery.flow import DataFlow, attribute, data_inputs, operation, rank
from batchnorm.surgery.modules import obstacle

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LONGEST = 64  # nodes of a sum


@dataclass
class Sum:
    """A value as ``scale * x`` plus convolutions of x plus ``shift``, one scale and shift a channel.

    Attributes:
        convolutions: by name, the scale of each, a number an output channel.
        norms: the batch normalization layers inside.
        nodes: every node from x, which is not among them, to the value.
    """

    scale: Tensor
    shift: Tensor
    convolutions: dict[str, Tensor] = field(default_factory=dict)
    norms: tuple[str, ...] = ()
    nodes: frozenset[fx.Node] = frozenset()
    adds: bool = False

    def scaled(self, scale: Tensor, shift: Tensor | float, node: fx.Node, norm: str | None = None) -> Sum:
        scales = {name: own * scale for name, own in self.convolutions.items()}
        norms = self.norms if norm is None else (*self.norms, norm)
        moved = self.shift * scale + shift
        return Sum(self.scale * scale, moved, scales, norms, self.nodes | {node}, self.adds)

    def plus(self, other: Sum, sign: float, node: fx.Node) -> Sum | None:
        if self.convolutions.keys() & other.convolutions.keys() or len(self.shift) != len(other.shift):
            return None
        scales = {**self.convolutions, **{name: sign * own for name, own in other.convolutions.items()}}
        return Sum(
            self.scale + sign * other.scale,
            self.shift + sign * other.shift,
            scales,
            self.norms + other.norms,
            self.nodes | other.nodes | {node},
            True,
        )


@dataclass(frozen=True)
class Merge:
    """Branches that become the convolution ``host``: ``value`` is then what the host gives for ``x``."""

    value: fx.Node
    x: fx.Node
    sum: Sum
    host: str
    weights: Weights

    @property
    def branches(self) -> tuple[str, ...]:
        """The names of the convolutions, the host first, and of what is applied to x itself."""
        others = [name for name in self.sum.convolutions if name != self.host]
        return (self.host, *others, *(["identity"] if bool(self.sum.scale.any()) else []))

    def home(self, net: nn.Module) -> str:
        """The innermost module with a forward that holds all convolutions and normalizations of the sum."""
        paths = [name.split(".")[:-1] for name in (*self.sum.convolutions, *self.sum.norms)]
        same = itertools.takewhile(lambda keys: len(set(keys)) == 1, zip(*paths, strict=False))
        home = ".".join(keys[0] for keys in same)
        while isinstance(net.get_submodule(home), (nn.ModuleList, nn.ModuleDict)):
            home = home.rpartition(".")[0]
        return home


def merges(state: State) -> tuple[list[Merge], dict[str, str]]:
    """The sums of branches that are one convolution, the last in the order of data first.

    Returns:
        The merges, and by the name of each normalization in a sum that cannot be merged, the reason.
    """
    flow = state.flow
    found: list[Merge] = []
    reasons: dict[str, str] = {}
    taken: set[fx.Node] = set()
    for node in reversed(flow.nodes):
        if node in taken or not node.op.startswith("call") or (rank(node) or 0) < 3:
            continue
        merge = _merge_at(state, node)
        if isinstance(merge, Merge):
            taken |= merge.sum.nodes
            found.append(merge)
        elif merge is not None:
            reasons.update(dict.fromkeys(merge[0], merge[1]))
    return found, {name: reason for name, reason in reasons.items() if all(name not in m.sum.norms for m in found)}


def _merge_at(state: State, node: fx.Node) -> Merge | tuple[tuple[str, ...], str] | None:
    for x in _candidates(state, node):
        total = _Reading(state, x).of(node)
        if total is None or not total.adds or not total.norms or not total.convolutions:
            continue
        if len(total.convolutions) == 1 and not bool(total.scale.any()):
            continue
        inner = (n for n in total.nodes if n is not node)
        if any(user not in total.nodes for n in inner for user in data_users(n)):
            continue
        merged = _one_convolution(state, total)
        if isinstance(merged, str):
            return total.norms, merged
        return Merge(node, x, total, *merged)
    return None


def _candidates(state: State, node: fx.Node) -> list[fx.Node]:
    """The inputs of the convolutions behind a value that nothing but sums, scales and normalizations follow."""
    inputs: list[fx.Node] = []
    adds = False
    ahead, seen = [node], set[fx.Node]()
    while ahead and len(seen) < _LONGEST:
        each = ahead.pop()
        if each in seen:
            continue
        seen.add(each)
        module = state.flow.module(each)
        if isinstance(module, _CONVOLUTIONS):
            inputs += data_inputs(each)
        elif _is_linear(state, each):
            adds = adds or operation(each) in ("add", "sub")
            ahead += data_inputs(each)
    return list(dict.fromkeys(inputs)) if adds else []


def _is_linear(state: State, node: fx.Node) -> bool:
    if not node.op.startswith("call"):
        return False
    module = state.flow.module(node)
    if module is not None:
        return is_norm(module) or is_identity(state.flow, node)
    return operation(node) in ("add", "sub", "mul") or is_identity(state.flow, node)


@dataclass
class _Reading:
    """Reads values as sums of functions of ``x``."""

    state: State
    x: fx.Node

    def of(self, node: fx.Node) -> Sum | None:
        if node is self.x:
            value = node.meta.get("val")
            if not isinstance(value, Tensor) or value.dim() < 3:
                return None
            channels = value.shape[1]
            return Sum(torch.ones(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64))
        if not node.op.startswith("call"):
            return None
        module = self.state.flow.module(node)
        if isinstance(module, _CONVOLUTIONS):
            return self.convolution(node)
        if is_norm(module):
            return self.normalization(node)
        if is_identity(self.state.flow, node):
            inside = self.of(data_inputs(node)[0])
            return None if inside is None else inside.scaled(torch.ones_like(inside.scale), 0.0, node)
        if module is not None or len(node.args) != 2 or node.kwargs:
            return None
        return self.arithmetic(node)

    def convolution(self, node: fx.Node) -> Sum | None:
        flow, name = self.state.flow, self.state.flow.name(node)
        layer: Any = flow.modules[name]
        if data_inputs(node) != [self.x] or type(layer) not in _CONVOLUTIONS or obstacle(flow, name) is not None:
            return None
        if name in self.state.weights or rank(node) != len(layer.kernel_size) + 2:
            return None
        zeros = torch.zeros(layer.out_channels, dtype=torch.float64)
        bias = zeros if layer.bias is None else wide(layer.bias)
        return Sum(zeros, bias, {name: torch.ones_like(zeros)}, (), frozenset({node}))

    def normalization(self, node: fx.Node) -> Sum | None:
        name = self.state.flow.name(node)
        if self.state.foldable.get(name, "unknown") is not None or len(data_inputs(node)) != 1:
            return None
        line = self.state.line(name)
        inside = self.of(data_inputs(node)[0])
        if getattr(self.state.flow.modules[name], "activation", None) or line.axis != 1 or inside is None:
            return None
        return inside.scaled(line.scale, line.shift, node, name) if len(line.scale) == len(inside.scale) else None

    def arithmetic(self, node: fx.Node) -> Sum | None:
        name = operation(node)
        a, b = (self.operand(arg) for arg in node.args)
        if name in ("add", "sub"):
            sign = 1.0 if name == "add" else -1.0
            if isinstance(a, Sum) and isinstance(b, Sum):
                return a.plus(b, sign, node)
            if isinstance(a, Sum) and isinstance(b, Tensor):
                return a.scaled(torch.ones_like(a.scale), sign * b, node)
            if isinstance(a, Tensor) and isinstance(b, Sum):
                return b.scaled(torch.full_like(b.scale, sign), a, node)
        if name == "mul":
            whole, factor = (a, b) if isinstance(a, Sum) else (b, a)
            if isinstance(whole, Sum) and isinstance(factor, Tensor):
                return whole.scaled(factor.expand_as(whole.scale), 0.0, node)
        return None

    def operand(self, value: Any) -> Sum | Tensor | None:
        """A sum, or a number a channel."""
        if isinstance(value, (int, float)):
            return torch.tensor([float(value)], dtype=torch.float64)
        if not isinstance(value, fx.Node):
            return None
        if value.op != "get_attr":
            return self.of(value)
        constant, axes = attribute(self.state.flow.net, self.state.flow.name(value)), rank(self.x) or 0
        if not isinstance(constant, Tensor) or not constant.is_floating_point() or constant.dim() > axes:
            return None
        shape = [1] * (axes - constant.dim()) + list(constant.shape)
        return wide(constant).reshape(-1) if shape[0] == 1 and set(shape[2:]) == {1} else None


def _one_convolution(state: State, total: Sum) -> tuple[str, Weights] | str:
    """The convolution that takes all branches in, and its new weights; or why there is none."""
    layers: dict[str, Any] = {name: state.flow.modules[name] for name in total.convolutions}
    host = max(layers, key=lambda name: math.prod(layers[name].kernel_size))
    layer, kernel = layers[host], _kernel(layers[host], total.convolutions[host])
    start = _paddings(layer)
    if start is None:
        return f"'{host}' pads by {layer.padding_mode}"
    for name, other in layers.items():
        if name == host:
            continue
        if other.stride != layer.stride or other.groups != layer.groups:
            return f"'{name}' and '{host}' have other strides or groups"
        places = _places(layer, start, other, _paddings(other))
        if places is None:
            return f"the taps of '{name}' are not among those of '{host}'"
        index: Any = (slice(None), slice(None), *torch.meshgrid(*places, indexing="ij"))
        kernel[index] += _kernel(other, total.convolutions[name])
    if bool(total.scale.any()):
        center = [divmod(pad, dilation) for pad, dilation in zip(start, layer.dilation, strict=True)]
        inside = all(not rest and k < size for (k, rest), size in zip(center, layer.kernel_size, strict=True))
        if set(layer.stride) != {1} or layer.in_channels != layer.out_channels or not inside:
            return f"'{host}' has no tap that reads each value where it gives one"
        outputs = torch.arange(layer.out_channels)
        index = (outputs, outputs % (layer.in_channels // layer.groups), *(k for k, _ in center))
        kernel[index] += total.scale
    values = (kernel, total.shift)
    if not all(bool(value.to(layer.weight.dtype).isfinite().all()) for value in values):
        return f"the weights of '{host}' would overflow {layer.weight.dtype}"
    return host, Weights(kernel, total.shift)


def _kernel(layer: _ConvNd, scale: Tensor) -> Tensor:
    weight = wide(layer.weight)
    return (weight * scale.reshape(-1, *[1] * (weight.dim() - 1))).contiguous()


def _paddings(layer: _ConvNd) -> list[int] | None:
    """The zeros before the first value on each axis of space; None for other padding."""
    if layer.padding == "valid":
        return [0] * len(layer.kernel_size)
    sizes = zip(layer.kernel_size, layer.dilation, strict=True)
    pads = [d * (k - 1) // 2 for k, d in sizes] if layer.padding == "same" else [int(p) for p in layer.padding]
    return pads if layer.padding_mode == "zeros" or not any(pads) else None


def _places(host: _ConvNd, start: list[int], other: _ConvNd, pads: list[int] | None) -> list[Tensor] | None:
    """By axis, the taps of ``host`` that read what the taps of ``other`` read."""
    places = []
    for axis, pad in enumerate(pads or []):
        reads = torch.arange(other.kernel_size[axis]) * other.dilation[axis] - pad + start[axis]
        taps, rest = reads // host.dilation[axis], reads % host.dilation[axis]
        if bool(rest.any()) or bool(((taps < 0) | (taps >= host.kernel_size[axis])).any()):
            return None
        places.append(taps)
    return places or None


# The forward of the module that holds the branches


def by_home(net: nn.Module, found: list[Merge]) -> dict[str, list[Merge]]:
    """The merges by the module whose forward is written anew: the outermost of those that hold each other."""
    homes = {merge.home(net) for merge in found}

    def outermost(home: str) -> str:
        return min((h for h in homes if not h or home == h or home.startswith(f"{h}.")), key=len)

    grouped: dict[str, list[Merge]] = {}
    for merge in found:
        grouped.setdefault(outermost(merge.home(net)), []).append(merge)
    return grouped


def rewritten(flow: DataFlow, home: str, found: Iterable[Merge]) -> fx.Graph | str:
    """The forward of the module ``home`` as a graph in which each sum is its host's call; or why there is none."""
    module = flow.net.get_submodule(home)
    if any(has_hooks(each) for each in module.modules()):
        return f"there are hooks in '{home}', whose forward would be written anew"
    try:
        graphs = [trace_module(copy_of(module, training=mode)) for mode in (False, True)]
    except Exception as error:  # whatever tracing a forward of any kind raises
        first = (str(error).strip().splitlines() or [""])[0]
        return f"the forward of '{home}' cannot be captured by itself ({type(error).__name__}: {first})"
    if str(graphs[0]) != str(graphs[1]):
        return f"the forward of '{home}' is another one in training mode"
    graph = graphs[0]
    prefix = f"{home}." if home else ""
    for merge in found:
        outcome = _rewrite(flow, graph, prefix, merge)
        if outcome is not None:
            return outcome
    graph.lint()
    return graph


def _rewrite(flow: DataFlow, graph: fx.Graph, prefix: str, merge: Merge) -> str | None:
    host = next((n for n in graph.nodes if n.op == "call_module" and prefix + str(n.target) == merge.host), None)
    for node in graph.nodes:
        pairs: dict[fx.Node, fx.Node | None] = {}
        if host is not None and _alike(flow, prefix, merge, node, merge.value, pairs):
            node.replace_all_uses_with(host, delete_user_cb=lambda user, inside=frozenset(pairs): user not in inside)
            for old in reversed([n for n in graph.nodes if n in pairs and n is not host]):
                if pairs[old] is not merge.x and not old.users:
                    graph.erase_node(old)
            return None
    return f"the sum of its branches is not computed in the forward of '{prefix.rstrip('.')}' alone"


def _alike(
    flow: DataFlow, prefix: str, merge: Merge, own: Any, node: Any, pairs: dict[fx.Node, fx.Node | None]
) -> bool:
    """Whether a node of the module's own graph computes what ``node`` does from the same x; notes the pairs.

    Calls of ``nn.Identity``, which exported graphs do not have, are passed over: they stand for no node.
    """
    if not isinstance(own, fx.Node) or not isinstance(node, fx.Node):
        return type(own) is type(node) and own == node
    while node is not merge.x and isinstance(flow.module(node), nn.Identity):
        node = data_inputs(node)[0]
    while own.op == "call_module" and isinstance(flow.net.get_submodule(prefix + str(own.target)), nn.Identity):
        pairs[own] = None
        own = own.all_input_nodes[0]
    if own in pairs or node in pairs.values():
        return pairs.get(own) is node
    if node is not merge.x:
        if node.op != own.op or len(node.args) != len(own.args) or node.kwargs or own.kwargs:
            return False
        if node.op in ("call_module", "get_attr"):
            if flow.name(node) != prefix + str(own.target):
                return False
        elif operation(node) != operation(own):
            return False
        if not all(_alike(flow, prefix, merge, a, b, pairs) for a, b in zip(own.args, node.args, strict=True)):
            return False
    pairs[own] = node
    return True


def becomes_graph(net: nn.Module, home: str, graph: fx.Graph) -> Callable[[], None]:
    """Gives the module ``home`` the forward of the graph, in place; it keeps the submodules that are still called.

    An identity takes the place of each other one: somebody outside may name it, such as the ``train`` of a network that
    keeps some layers in evaluation.
    """

    def do() -> None:
        module = net.get_submodule(home)
        kept = {k: v for k, v in vars(module).items() if not k.startswith("_") and k != "training"}
        plain = fx.Graph()  # of no tracer, so that it can be pickled
        plain.output(plain.graph_copy(graph, {}))
        made = fx.GraphModule(module, plain, type(module).__name__)
        state = {**made.__dict__, "training": module.training}
        for key, child in module._modules.items():
            if child is not None and key not in made._modules:
                made._modules[key] = nn.Identity().train(child.training)
        for key, value in kept.items():  # a forward outside may read them
            if key not in state and not hasattr(fx.GraphModule, key):
                state[key] = value
        module.__class__ = type(made)
        module.__dict__.clear()
        module.__dict__.update(state)

    return do
