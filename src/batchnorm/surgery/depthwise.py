"""Batch normalization of a depthwise convolution's output, which lies in no memory but the caches.

Both work on each channel by itself. So some channels at a time are convolved, normalized and written; the backward
makes the output of the convolution again where it needs it. So may be a batch normalization before the convolution.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from batchnorm.nn import batch_norm as ours
from batchnorm.nn.outside import has_hooks, show
from batchnorm.surgery.capture import traced_without_draws
from batchnorm.surgery.chains import Before, Found, activated, can_be_one_call, computes, is_call_of
from batchnorm.surgery.modules import computes_as, has_methods
from batchnorm.surgery.own_state import own_state
from batchnorm.undo import in_mode


def is_depthwise(module: Any) -> bool:
    """Whether a module convolves each channel with one kernel of its own, with zeros around the planes."""
    return (
        isinstance(module, (nn.Conv1d, nn.Conv2d))
        and module.groups == module.in_channels == module.out_channels
        and module.groups > 1
        and module.padding_mode == "zeros"
        and padding(module) is not None
    )


def padding(conv: _ConvNd) -> tuple[int, ...] | None:
    """The zeros on each side of each axis; None where the two sides differ, or the class computes something else."""
    if computes_as(conv, nn.Conv1d, nn.Conv2d):
        return _padding(conv)
    if has_methods(conv) or is_parametrized(conv) or is_lazy(conv.weight) or any(map(has_hooks, conv.children())):
        return None
    if conv not in _by_itself:
        found = {_padded_by_itself(conv, training) for training in (False, True)}
        _by_itself[conv] = found.pop() if len(found) == 1 else None
    return _by_itself[conv]


def _padding(conv: _ConvNd) -> tuple[int, ...] | None:
    if isinstance(conv.padding, tuple):
        return conv.padding
    if conv.padding == "valid":
        return (0,) * len(conv.kernel_size)
    both = [step * (size - 1) for step, size in zip(conv.dilation, conv.kernel_size, strict=True)]
    return None if any(each % 2 for each in both) else tuple(each // 2 for each in both)


_by_itself: weakref.WeakKeyDictionary[_ConvNd, tuple[int, ...] | None] = weakref.WeakKeyDictionary()


def _padded_by_itself(conv: _ConvNd, training: bool) -> tuple[int, ...] | None:
    """Those of a subclass whose forward puts fixed zeros around its input and convolves, and does nothing else.

    So do the EfficientNets of packages that were ported from TensorFlow, whose padding module lies in the convolution.
    """
    twin = in_mode(copy.deepcopy(conv), training)
    before = own_state(twin)
    try:
        nodes = list(traced_without_draws(fx.Tracer(), twin).nodes)
    except Exception:  # whatever tracing a forward of any class raises
        return None
    if own_state(twin) != before:
        return None
    x, *calls = [node for node in nodes if node.op not in ("get_attr", "output")]
    if not calls or nodes[-1].args != (calls[-1],) or calls[-1].target not in _FUNCTIONS:
        return None
    given = dict(zip(_ARGUMENTS, calls[-1].args, strict=False)) | calls[-1].kwargs
    sides = [(0, 0)] * len(conv.kernel_size)
    value: Any = x
    for node in calls[:-1]:
        around = _zeros(conv, node, len(sides))
        if around is None or node.args[:1] != (value,):
            return None
        sides = [(a + c, b + d) for (a, b), (c, d) in zip(sides, around, strict=True)]
        value = node
    named = {key: getattr(given.get(key), "target", None) for key in ("weight", "bias")}
    bias = None if conv.bias is None else "bias"
    if x.op != "placeholder" or given.get("input") is not value or named != {"weight": "weight", "bias": bias}:
        return None
    if any(_each(given.get(key, 1), sides) != _each(getattr(conv, key), sides) for key in ("stride", "dilation")):
        return None
    own = given.get("padding", 0)
    if given.get("groups", 1) != conv.groups or isinstance(own, str):
        return None
    total = [(a + p, b + p) for (a, b), p in zip(sides, _each(own, sides), strict=True)]
    return tuple(a for a, _ in total) if all(a == b >= 0 for a, b in total) else None


_FUNCTIONS = (torch.conv1d, torch.conv2d, F.conv1d, F.conv2d)
_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


def _each(value: Any, axes: Sequence[Any]) -> tuple[int, ...]:
    return tuple(value) * (len(axes) // len(value)) if isinstance(value, (tuple, list)) else (value,) * len(axes)


def _zeros(conv: _ConvNd, node: fx.Node, axes: int) -> list[tuple[int, int]] | None:
    """The zeros that a call puts around its input, before and behind, the first axis of space first."""
    if node.op == "call_module":
        module = conv.get_submodule(str(node.target))
        if type(module) is nn.Identity:
            return [(0, 0)] * axes
        is_zero = type(module) in (nn.ZeroPad1d, nn.ZeroPad2d, nn.ConstantPad1d, nn.ConstantPad2d) and not module.value
        around: Any = module.padding if is_zero else None
    elif node.target is F.pad:
        options = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)) | node.kwargs
        is_zero = options.get("mode", "constant") == "constant" and not options.get("value")
        around = options["pad"] if is_zero else None
    else:
        return None
    if not isinstance(around, (tuple, list)) or not all(isinstance(each, int) for each in around):
        return None
    pairs = list(zip(around[::2], around[1::2], strict=True))[::-1]
    return [(0, 0)] * (axes - len(pairs)) + pairs if len(pairs) <= axes else None


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
