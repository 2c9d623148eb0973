"""Pooling of batch normalization's output, which lies in no memory but the caches.

One byte a window tells the backward where its largest value was. A 1x1 convolution between both goes last where windows
become means: that is the same, and the convolution has fewer places to compute.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from batchnorm.nn.outside import has_hooks, show
from batchnorm.surgery.chains import Before, Found, can_be_one_call, is_call_of
from batchnorm.surgery.modules import computes_as


def is_pooling(module: Any) -> bool:
    """Whether a module takes the largest value of each window of an image, or its mean, and nothing else."""
    if computes_as(module, nn.MaxPool2d):
        return not module.return_indices and _pair(module.dilation) == (1, 1)
    return is_mean(module)


def is_mean(module: Any) -> bool:
    """Whether a module takes the mean of each window of an image, all inside."""
    return (
        computes_as(module, nn.AvgPool2d)
        and _pair(module.padding) == (0, 0)
        and not module.ceil_mode
        and module.divisor_override is None
    )


def is_pointwise(module: Any) -> bool:
    """Whether a module convolves each place by itself, so that it may as well convolve means of places."""
    return (
        computes_as(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.stride == (1, 1)
        and module.padding in ((0, 0), "valid", "same")
    )


def pooled(pool: Any, x: Any, before: Before, conv: Any = None) -> Tensor:
    """pool(conv(before(x))), at once where all are what they were and nobody watches what lies between them."""
    y: Tensor | None = None
    watched = has_hooks(pool) or (conv is not None and has_hooks(conv))
    if can_be_one_call(x) and _fit(pool, conv) and not watched and before.is_one_call():
        windows = (_pair(pool.kernel_size), _pair(pool.stride), _pair(pool.padding), bool(pool.ceil_mode))
        y = before.layer.forward_pooled(x, (*windows, is_mean(pool)))
    if y is None:
        z: Tensor = pool(before(x) if conv is None else conv(before(x)))
        return z
    if before.layer._forward_hooks:
        show(before.layer, y)
    return y if conv is None else conv(y)


def _fit(pool: Any, conv: Any) -> bool:
    return is_pooling(pool) if conv is None else is_mean(pool) and is_pointwise(conv)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def convolution_before(module: nn.Module, node: fx.Node) -> fx.Node | None:
    """The call of a 1x1 convolution whose output a pooling into means alone reads."""
    before = node.args[0]
    if not (is_call_of(module, node, is_mean) and is_call_of(module, before, is_pointwise)):
        return None
    assert isinstance(before, fx.Node)
    return before if len(before.users) == 1 else None


def fuse(graph: fx.Graph, node: fx.Node, conv: fx.Node | None, before: Found) -> None:
    """One call in place of the pooling ``node`` and of what comes before it."""
    with graph.inserting_before(node):
        pool = graph.get_attr(str(node.target))
        between = () if conv is None else (graph.get_attr(str(conv.target)),)
        call = graph.call_function(pooled, (pool, before.x, before.made(graph), *between))
    call.meta.update(node.meta)
    node.replace_all_uses_with(call)
    for each in (node, *([] if conv is None else [conv]), *before.nodes):
        graph.erase_node(each)
