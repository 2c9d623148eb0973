"""Max-pooling of batch normalization's output, which lies in no memory but the caches.

One byte a window tells the backward where its largest value was.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook

from batchnorm.nn import batch_norm as ours
from batchnorm.nn.outside import has_hooks, show
from batchnorm.surgery.chains import Before, Found


def is_pooling(module: Any) -> bool:
    """Whether a module takes the largest value of each window of an image, and nothing else."""
    return type(module) is nn.MaxPool2d and not module.return_indices and _pair(module.dilation) == (1, 1)


def pooled(pool: Any, x: Any, before: Before) -> Tensor:
    """pool(before(x)), at once where both are what they were and nobody watches what lies between them."""
    y: Tensor | None = None
    if is_pooling(pool) and before.is_one_call() and not has_hooks(pool) and not _has_any_global_hook():
        windows = (_pair(pool.kernel_size), _pair(pool.stride), _pair(pool.padding), bool(pool.ceil_mode))
        y = before.layer.forward_pooled(x, windows)
    if y is None:
        y = pool(before(x))
    elif before.layer._forward_hooks:
        show(before.layer, y)
    return y


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def fuse(graph: fx.Graph, node: fx.Node, before: Found) -> None:
    """One call in place of the pooling ``node`` and of what comes before it."""
    with graph.inserting_before(node):
        pool = graph.get_attr(str(node.target))
        call = graph.call_function(pooled, (pool, before.x, before.made(graph)))
    call.meta.update(node.meta)
    node.replace_all_uses_with(call)
    for each in (node, *before.nodes):
        graph.erase_node(each)


def is_pair(pool: Any, layer: Any) -> bool:
    """Whether a layer of this package can be pooled at once."""
    return is_pooling(pool) and isinstance(layer, ours.BatchNorm)
