"""Batch normalization of a depthwise convolution's output, which lies in no memory but the caches.

Both work on each channel by itself. So some channels at a time are convolved, normalized and written; the backward
makes the output of the convolution again where it needs it. So may be a batch normalization before the convolution.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.module import _has_any_global_hook

from batchnorm.kernels import aten
from batchnorm.nn import batch_norm as ours
from batchnorm.nn.outside import has_hooks, show
from batchnorm.surgery import activations
from batchnorm.surgery.conversion import Absorbed


def is_depthwise(module: Any) -> bool:
    """Whether a module convolves each channel with one kernel of its own, with zeros around the planes."""
    return (
        type(module) in (nn.Conv1d, nn.Conv2d)
        and module.groups == module.in_channels == module.out_channels
        and module.groups > 1
        and module.padding_mode == "zeros"
        and padding(module) is not None
    )


def padding(conv: _ConvNd) -> tuple[int, ...] | None:
    """The zeros on each side of each axis; None where the two sides differ."""
    if isinstance(conv.padding, tuple):
        return conv.padding
    if conv.padding == "valid":
        return (0,) * len(conv.kernel_size)
    both = [step * (size - 1) for step, size in zip(conv.dilation, conv.kernel_size, strict=True)]
    return None if any(each % 2 for each in both) else tuple(each // 2 for each in both)


def is_pair(conv: Any, layer: Any) -> bool:
    """Whether a layer of this package fits behind a depthwise convolution."""
    return is_depthwise(conv) and isinstance(layer, ours.BatchNorm) and layer.num_features == conv.out_channels


@dataclass(frozen=True)
class Before:
    """What comes before such a convolution.

    Attributes:
        layer: a batch normalization.
        activation: of a call behind it; None leaves it to the layer.
        slope: that of the activation.
        stand_ins: modules between both that hand on what they are given, since the layer computes them.
    """

    layer: Any
    activation: str | None = None
    slope: float = 0.0
    stand_ins: tuple[Any, ...] = ()

    def __call__(self, x: Any) -> Any:
        y = _activated(self.layer(x), self.layer, self.activation, self.slope)
        for module in self.stand_ins:
            y = module(y)
        return y

    def is_one_call(self) -> bool:
        """Whether the layer computes all of it, and nobody watches."""
        return (
            isinstance(self.layer, ours.BatchNorm)
            and _computes(self.layer, self.activation)
            and not has_hooks(self.layer)
            and all(isinstance(each, Absorbed) and not has_hooks(each) for each in self.stand_ins)
        )


def normalized_convolution(
    conv: Any, layer: Any, x: Any, activation: str | None = None, slope: float = 0.0, before: Before | None = None
) -> Tensor:
    """activation(layer(conv(before(x)))), at once where all are what they were and nobody watches what lies between.

    ``activation`` is that of a call behind the layer, or None.
    """
    watched = has_hooks(conv) or has_hooks(layer) or _has_any_global_hook()
    y: Tensor | None = None
    if _computes(layer, activation) and not watched and is_pair(conv, layer):
        sides = padding(conv)
        if before is not None and before.is_one_call():
            y = layer.forward_depthwise(conv, sides, x, before.layer)
        if y is None:
            x, before = x if before is None else before(x), None
            y = layer.forward_depthwise(conv, sides, x)
    if y is None:
        y = _activated(layer(conv(x if before is None else before(x))), layer, activation, slope)
    elif layer._forward_hooks:
        show(layer, y)
    return y


def _computes(layer: Any, activation: str | None) -> bool:
    return activation is None or activations.is_computed_by(layer, activation)


def _activated(y: Tensor, layer: Any, activation: str | None, slope: float) -> Tensor:
    return y if _computes(layer, activation) else aten.activate(y, activation or "identity", slope)


# ---------------------------------------------------------------------------------------------- in a module's own forward
def readers(module: nn.Module, graph: fx.Graph, is_ours: Callable[[Any], bool]) -> list[fx.Node]:
    """The calls of layers whose input is the output of a depthwise convolution that nobody else reads."""
    return [n for n in graph.nodes if is_call_of(module, n, is_ours) and reads_depthwise(module, n.args[0])]


def is_call_of(module: nn.Module, node: Any, kind: Callable[[Any], bool]) -> bool:
    """Whether a node calls a module of some kind with one value."""
    return (
        isinstance(node, fx.Node)
        and node.op == "call_module"
        and len(node.args) == 1
        and not node.kwargs
        and kind(module.get_submodule(str(node.target)))
    )


def reads_depthwise(module: nn.Module, before: Any) -> bool:
    """Whether a node is the call of a depthwise convolution with one reader."""
    return is_call_of(module, before, is_depthwise) and len(before.users) == 1


@dataclass
class Found:
    """What comes before a convolution in a graph, from the convolution backwards.

    Attributes:
        nodes: all that is computed at once.
        layer: the name of the batch normalization; arguments: its activation and slope, if these are a call's.
        stand_ins: the names of modules that hand on what they are given.
        x: the input.
    """

    nodes: list[fx.Node]
    layer: str
    arguments: tuple[Any, ...]
    stand_ins: list[str]
    x: Any


def found_before(
    module: nn.Module, node: Any, is_ours: Callable[[Any], bool], is_absorbed: Callable[[str], bool], normalized: Any
) -> Found | None:
    """The batch normalization whose output alone a convolution reads, with its activation; ``normalized``: a call."""
    nodes, stand_ins = [], []
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


def fuse(graph: fx.Graph, node: fx.Node, conv: fx.Node, layer: str, activation: Any, before: Found | None) -> None:
    """One call in place of ``node``, which reads the convolution, and perhaps of what comes before that."""
    with graph.inserting_before(node):
        attributes = (graph.get_attr(str(conv.target)), graph.get_attr(layer))
        if before is None:
            given = (*attributes, conv.args[0], *activation)
        else:
            what = (graph.get_attr(before.layer), *(before.arguments or (None, 0.0)))
            held = tuple(graph.get_attr(name) for name in reversed(before.stand_ins))
            first = graph.call_function(Before, (*what, held))
            given = (*attributes, before.x, *(activation or (None, 0.0)), first)
        call = graph.call_function(normalized_convolution, given)
    call.meta.update(node.meta)
    node.replace_all_uses_with(call)
    for each in (node, conv, *([] if before is None else before.nodes)):
        graph.erase_node(each)


# ---------------------------------------------------------------------------------------------- in a Sequential
def pairs_in(container: nn.Sequential, is_ours: Callable[[Any], bool]) -> list[nn.Module]:
    """The layers in a ``Sequential`` right behind a depthwise convolution."""
    return [after for conv, after in pairwise(container._modules.values()) if is_depthwise(conv) and is_ours(after)]


@functools.cache
def in_pairs(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a ``Sequential`` that calls each such convolution and the layer behind it at once."""
    members = {
        "forward": _forward,
        "original_kind": kind,
        "__module__": kind.__module__,
        "__doc__": kind.__doc__,
        "__reduce_ex__": _reduce,
    }
    return type(f"Accelerated{kind.__name__}", (kind,), members)


def _forward(self: nn.Sequential, input: Any) -> Any:
    modules: list[Any] = list(self._modules.values())
    i = 0
    while i < len(modules):
        k, before = i, None
        if isinstance(modules[i], ours.BatchNorm):
            k += 1
            while k < len(modules) and isinstance(modules[k], Absorbed):
                k += 1
            before = Before(modules[i], stand_ins=tuple(modules[i + 1 : k]))
        if k + 1 < len(modules) and is_pair(modules[k], modules[k + 1]):
            input = normalized_convolution(modules[k], modules[k + 1], input, before=before)
            i = k + 2
        else:
            input = modules[i](input)
            i += 1
    return input


def _reduce(self: nn.Module, protocol: int) -> Any:
    return _bare, (vars(type(self))["original_kind"],), self.__dict__


def _bare(kind: type[nn.Module]) -> nn.Module:
    paired = in_pairs(kind)
    return paired.__new__(paired)
