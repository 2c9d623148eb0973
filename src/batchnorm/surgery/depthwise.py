"""Batch normalization of a depthwise convolution's output, which lies in no memory but the caches.

Both work on each channel by itself. So some channels at a time are convolved, normalized and written; the backward
makes the output of the convolution again where it needs it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.module import _has_any_global_hook

from batchnorm.kernels import aten
from batchnorm.nn import batch_norm as ours
from batchnorm.nn.outside import has_hooks, show
from batchnorm.surgery import activations


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


def normalized_convolution(conv: Any, layer: Any, x: Any, activation: str | None = None, slope: float = 0.0) -> Tensor:
    """activation(layer(conv(x))), at once where both are what they were and nobody watches what lies between them.

    ``activation`` is that of a call behind the layer, or None.
    """
    computed = activation is None or activations.is_computed_by(layer, activation)
    watched = has_hooks(conv) or has_hooks(layer) or _has_any_global_hook()
    y: Tensor | None = None
    if computed and not watched and is_pair(conv, layer):
        y = layer.forward_depthwise(conv, padding(conv), x)
    if y is None:
        y = layer(conv(x))
    elif layer._forward_hooks:
        show(layer, y)
    return y if computed else aten.activate(y, activation or "identity", slope)


# ---------------------------------------------------------------------------------------------- in a module's own forward
def readers(module: nn.Module, graph: fx.Graph, is_ours: Callable[[Any], bool]) -> list[fx.Node]:
    """The calls of layers whose input is the output of a depthwise convolution that nobody else reads."""
    found = []
    for node in graph.nodes:
        if node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
            layer = module.get_submodule(str(node.target))
            if is_ours(layer) and reads_depthwise(module, node.args[0]):
                found.append(node)
    return found


def reads_depthwise(module: nn.Module, before: Any) -> bool:
    """Whether a node is the call of a depthwise convolution with one reader."""
    return (
        isinstance(before, fx.Node)
        and before.op == "call_module"
        and len(before.args) == 1
        and not before.kwargs
        and len(before.users) == 1
        and is_depthwise(module.get_submodule(str(before.target)))
    )


def fuse(graph: fx.Graph, node: fx.Node, before: fx.Node, layer: str, *activation: Any) -> None:
    """One call in place of ``node``, which reads the convolution ``before``."""
    with graph.inserting_before(node):
        conv, norm = graph.get_attr(str(before.target)), graph.get_attr(layer)
        call = graph.call_function(normalized_convolution, (conv, norm, before.args[0], *activation))
    call.meta.update(node.meta)
    node.replace_all_uses_with(call)
    graph.erase_node(node)
    graph.erase_node(before)


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
    modules: list[Any] = [*self._modules.values(), None]
    done = None
    for module, after in pairwise(modules):
        if module is done and done is not None:
            done = None
        elif is_pair(module, after):
            input, done = normalized_convolution(module, after, input), after
        else:
            input = module(input)
    return input


def _reduce(self: nn.Module, protocol: int) -> Any:
    return _bare, (vars(type(self))["original_kind"],), self.__dict__


def _bare(kind: type[nn.Module]) -> nn.Module:
    paired = in_pairs(kind)
    return paired.__new__(paired)
