"""Batch normalization of a concatenation along the channels, which is not made: each part is read where it lies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from batchnorm.nn import batch_norm as ours
from batchnorm.nn.outside import has_hooks


def readers(module: nn.Module, graph: fx.Graph, is_ours: Callable[[nn.Module], bool]) -> list[fx.Node]:
    """The calls of layers in a module's own graph whose input is a concatenation that nobody else reads."""
    found = []
    for node in graph.nodes:
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            continue
        if is_ours(module.get_submodule(str(node.target))) and _parts(node.args[0]) is not None:
            found.append(node)
    return found


def hand_in_parts(graph: fx.Graph, node: fx.Node) -> None:
    """Gives the layer of a call the parts themselves."""
    joined: Any = node.args[0]
    with graph.inserting_before(node):
        layer = graph.get_attr(str(node.target))
        call = graph.call_function(normalized_parts, (layer, _parts(joined)))
    call.meta.update(node.meta)
    node.replace_all_uses_with(call)
    graph.erase_node(node)
    graph.erase_node(joined)


def normalized_parts(layer: Any, parts: Any) -> Tensor:
    """layer(torch.cat(parts, 1)); the layer reads the parts if it is still ours and nobody watches its input."""
    y: Tensor | None = None
    if isinstance(layer, ours.BatchNorm) and isinstance(parts, Sequence) and len(parts) > 1 and not has_hooks(layer):
        y = layer.forward_parts(list(parts))
    if y is None:
        y = layer(parts[0] if isinstance(parts, Sequence) and len(parts) == 1 else torch.cat(parts, 1))
    return y


def _parts(joined: Any) -> Any:
    """What a node concatenates along the channels, if one call alone reads the result; else None."""
    if not isinstance(joined, fx.Node) or joined.op != "call_function" or len(joined.users) != 1:
        return None
    if joined.target not in (torch.cat, torch.concat, torch.concatenate):
        return None
    given = {**dict(zip(("tensors", "dim"), joined.args, strict=False)), **joined.kwargs}
    if given.keys() - {"tensors", "dim", "axis"} or given.get("dim", given.get("axis", 0)) != 1:
        return None
    return given.get("tensors")
