"""Batch normalization of a depthwise convolution's output, which lies in no memory but the caches.

Both work on each channel by itself. So some channels at a time are convolved, normalized and written; the backward
makes the output of the convolution again where it needs it. So may be a batch normalization before the convolution.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from batchnorm.nn import batch_norm as ours
from batchnorm.nn.outside import has_hooks, show
from batchnorm.surgery.chains import Before, Found, activated, can_be_one_call, computes, is_call_of
from batchnorm.surgery.modules import computes_as


def is_depthwise(module: Any) -> bool:
    """Whether a module convolves each channel with one kernel of its own, with zeros around the planes."""
    return (
        computes_as(module, nn.Conv1d, nn.Conv2d)
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


def normalized_convolution(
    conv: Any, layer: Any, x: Any, activation: str | None = None, slope: float = 0.0, before: Before | None = None
) -> Tensor:
    """activation(layer(conv(before(x)))), at once where all are what they were and nobody watches what lies between.

    ``activation`` is that of a call behind the layer, or None.
    """
    watched = has_hooks(conv) or has_hooks(layer)
    y: Tensor | None = None
    if can_be_one_call(x) and computes(layer, activation) and not watched and is_pair(conv, layer):
        sides = padding(conv)
        if before is not None and before.is_one_call():
            y = layer.forward_depthwise(conv, sides, x, before.layer)
        if y is None:
            x, before = x if before is None else before(x), None
            y = layer.forward_depthwise(conv, sides, x)
    if y is None:
        y = activated(layer(conv(x if before is None else before(x))), layer, activation, slope)
    elif layer._forward_hooks:
        show(layer, y)
    return y


# ---------------------------------------------------------------------------------------------- in a graph
def readers(module: nn.Module, graph: fx.Graph, is_ours: Callable[[Any], bool]) -> list[fx.Node]:
    """The calls of layers whose input is the output of a depthwise convolution that nobody else reads."""
    return [n for n in graph.nodes if is_call_of(module, n, is_ours) and reads_depthwise(module, n.args[0])]


def reads_depthwise(module: nn.Module, before: Any) -> bool:
    """Whether a node is the call of a depthwise convolution with one reader."""
    return is_call_of(module, before, is_depthwise) and len(before.users) == 1


def fuse(graph: fx.Graph, node: fx.Node, conv: fx.Node, layer: str, activation: Any, before: Found | None) -> None:
    """One call in place of ``node``, which reads the convolution, and perhaps of what comes before that."""
    with graph.inserting_before(node):
        attributes = (graph.get_attr(str(conv.target)), graph.get_attr(layer))
        if before is None:
            given = (*attributes, conv.args[0], *activation)
        else:
            given = (*attributes, before.x, *(activation or (None, 0.0)), before.made(graph))
        call = graph.call_function(normalized_convolution, given)
    call.meta.update(node.meta)
    node.replace_all_uses_with(call)
    for each in (node, conv, *([] if before is None else before.nodes)):
        graph.erase_node(each)
