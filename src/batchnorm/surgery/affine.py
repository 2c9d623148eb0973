"""Batch normalization with known statistics as scale and shift, and how these cross other operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.padding import _CircularPadNd, _ReflectionPadNd, _ReplicationPadNd
from torch.utils import _pytree as pytree

from batchnorm.surgery.flow import DataFlow, data_inputs, operation, rank, reads_shape, value_of
from batchnorm.surgery.frozen import eps_of, is_frozen_norm, looks_frozen

_IDENTITIES = {"alias", "clone", "contiguous", "detach"}
_CASTS = {"bfloat16", "cpu", "cuda", "double", "float", "half", "to", "type", "type_as"}
_DROPOUTS = {
    "alpha_dropout",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "feature_alpha_dropout",
    "feature_dropout",
}
# Calls that give all values of a tensor, and nothing else, in another shape or order.
REARRANGEMENTS = {
    "flatten",
    "movedim",
    "permute",
    "reshape",
    "reshape_as",
    "squeeze",
    "swapaxes",
    "transpose",
    "unflatten",
    "unsqueeze",
    "view",
    "view_as",
}
_MOVES = REARRANGEMENTS | {
    "channel_shuffle",
    "chunk",
    "getitem",
    "narrow",
    "pixel_shuffle",
    "pixel_unshuffle",
    "split",
    "split_with_sizes",
    "tensor_split",
}
_SHAPED_AS = {"expand_as", "reshape_as", "type_as", "view_as"}
_LIKE = {
    *("empty_like", "full_like", "new_empty", "new_full", "new_ones", "new_tensor", "new_zeros", "ones_like"),
    *("rand_like", "randn_like", "zeros_like"),
}
_AVERAGE_POOLS = {f"avg_pool{n}d": n for n in (1, 2, 3)}
_ADAPTIVE_POOLS = {f"adaptive_avg_pool{n}d": n for n in (1, 2, 3)}
_MAX_POOLS = {f"max_pool{n}d": n for n in (1, 2, 3)} | {f"adaptive_max_pool{n}d": n for n in (1, 2, 3)}
_INTERPOLATIONS = {"interpolate", "upsample", "upsample_bilinear", "upsample_nearest"}

_DROPOUT_MODULES = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_MOVING_MODULES = (nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle)
_COMMUTING_MODULES = (_ReflectionPadNd, _ReplicationPadNd, _CircularPadNd, nn.Upsample)
_AVERAGE_MODULES = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


def is_norm(module: nn.Module | None) -> bool:
    """Batch normalization as a layer, or as buffers in the manner of ``FrozenBatchNorm2d``."""
    return isinstance(module, _BatchNorm) or (module is not None and is_frozen_norm(module))


def wide(tensor: Any) -> Tensor:
    """In float64 on the CPU."""
    result: Tensor = tensor.detach().to("cpu", torch.float64)
    return result


def affine_of(layer: Any) -> tuple[Tensor, Tensor]:
    """Scale ``gamma / sqrt(var + eps)`` and shift ``beta - mean * scale``, float64 on the CPU.

    ``var`` is the layer's ``running_var``, whatever estimate (torch: unbiased) it holds.
    """
    eps: Any = eps_of(layer) if looks_frozen(layer) else layer.eps
    scale = (wide(layer.running_var) + eps).rsqrt()
    if layer.weight is not None:
        scale = scale * wide(layer.weight)
    shift = -wide(layer.running_mean) * scale
    if layer.bias is not None:
        shift = shift + wide(layer.bias)
    return scale, shift


@dataclass(frozen=True)
class ChannelMap:
    """``x -> scale * x + shift`` along one axis of a value; axis None: the same everywhere, (1,)."""

    scale: Tensor
    shift: Tensor
    axis: int | None

    def along(self, axis: int, size: int) -> ChannelMap | None:
        """The same along ``axis``, or None where it varies along another one."""
        if self.axis is None:
            return ChannelMap(self.scale.expand(size), self.shift.expand(size), axis)
        return self if self.axis == axis and len(self.scale) == size else None

    def on_axis(self, axis: int, index: Tensor) -> ChannelMap:
        return ChannelMap(self.scale[index], self.shift[index], axis)


@dataclass(frozen=True)
class Crossing:
    """How an operation moves channels: element k of ``axis`` of its result is channel ``index[k]``.

    ``index`` None: the channels stay, on ``axis``. ``monotone``: only an increasing map commutes with it.
    """

    axis: int | None
    index: Tensor | None = None
    monotone: bool = False

    def forward(self, map: ChannelMap) -> ChannelMap | str:
        """The map of the result that is the map of the input."""
        if self.monotone and bool((map.scale < 0).any()):
            return "a scale is negative, and max-pooling takes the largest"
        if map.axis is None or self.index is None:
            return ChannelMap(map.scale, map.shift, None if map.axis is None else self.axis)
        return ChannelMap(map.scale[self.index], map.shift[self.index], self.axis)

    def backward(self, map: ChannelMap, channels: int, axis: int) -> ChannelMap | str:
        """The map of the input, with ``channels`` on ``axis``, that is the map of the result."""
        if self.monotone and bool((map.scale < 0).any()):
            return "a scale is negative, and max-pooling takes the largest"
        if self.index is None or map.axis is None:
            return ChannelMap(map.scale, map.shift, None if map.axis is None else axis)
        if self.axis is not None and map.axis != self.axis:
            return "the channels lie on another axis there"
        index = self.index if self.axis is not None else self.index.expand(len(map.scale))
        scale, shift = torch.ones(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
        scale[index], shift[index] = map.scale, map.shift
        if not (torch.equal(scale[index], map.scale) and torch.equal(shift[index], map.shift)):
            return "the scale differs between the positions of one channel there"
        return ChannelMap(scale, shift, axis)


def data_users(node: fx.Node) -> list[fx.Node]:
    """The users of a node's values, not of its shape alone."""
    return [user for user in node.users if not reads_shape(user) and not _gives_shape(node, user)]


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """The tensors, or lists of them, whose values flow into a node."""
    tensors = (n for n in data_inputs(node) if any(isinstance(v, Tensor) for v in pytree.tree_leaves(value_of(n))))
    return [n for n in tensors if not _gives_shape(n, node)]


def _gives_shape(node: fx.Node, user: fx.Node) -> bool:
    """Whether a call reads the shape or dtype of this argument alone, as ``x.reshape_as(node)`` does."""
    if user.op not in ("call_function", "call_method"):
        return False
    name = operation(user)
    if name in _SHAPED_AS:
        return bool(user.args) and user.args[0] is not node
    return name in _LIKE and bool(user.args) and user.args[0] is node and len(user.all_input_nodes) == 1


def shape(node: fx.Node) -> tuple[int, ...] | None:
    value = value_of(node)
    return tuple(value.shape) if isinstance(value, Tensor) else None


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call by position or name; a node's value on the example where it is computed."""
    value = node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
    return fx.map_arg(value, value_of)


def crossing(flow: DataFlow, node: fx.Node, source: fx.Node, axis: int) -> Crossing | str | None:
    """How channels on ``axis`` of ``source`` come through ``node``; why not; None for what is unknown."""
    module = flow.module(node)
    if module is not None:
        return _through_module(flow, node, source, axis, module)
    if not node.op.startswith("call"):
        return None
    name, axes = operation(node), rank(source)
    if axes is None:
        return None
    if name in _IDENTITIES or (name in _CASTS and _same_dtype(node, source)):
        return Crossing(axis)
    if name in _DROPOUTS:
        training = argument(node, 2, "training", argument(node, 2, "train", True))
        return f"{flow.describe(node)} drops values in training" if training else Crossing(axis)
    if name in _MOVES:
        return _moved(flow, [node], source, axis)
    if name in _INTERPOLATIONS:
        return Crossing(axis) if axis == 1 else None
    if name == "mean":
        return _averaged(node, axes, axis)
    return _through_pool(flow, node, axes, axis, name)


def is_identity(flow: DataFlow, node: fx.Node) -> bool:
    """Whether a call gives the one tensor that it takes, as dropout in evaluation does."""
    if not node.op.startswith("call") or len(tensor_inputs(node)) != 1:
        return False
    module, source = flow.module(node), tensor_inputs(node)[0]
    if module is not None:
        return isinstance(module, nn.Identity) or (isinstance(module, _DROPOUT_MODULES) and not module.training)
    name = operation(node)
    if name in _DROPOUTS:
        return not argument(node, 2, "training", argument(node, 2, "train", True))
    return name in _IDENTITIES or (name in _CASTS and _same_dtype(node, source))


def _same_dtype(node: fx.Node, source: fx.Node) -> bool:
    values = value_of(node), value_of(source)
    return all(isinstance(v, Tensor) for v in values) and len({v.dtype for v in values}) == 1


def _through_module(flow: DataFlow, node: fx.Node, source: fx.Node, axis: int, module: Any) -> Crossing | str | None:
    axes = rank(source)
    name = flow.describe(node)
    if isinstance(module, nn.Identity):
        return Crossing(axis)
    if isinstance(module, _DROPOUT_MODULES):
        return f"'{name}' drops values in training" if module.training else Crossing(axis)
    if isinstance(module, _MOVING_MODULES):
        return _moved(flow, [node], source, axis)
    if isinstance(module, _COMMUTING_MODULES):
        return Crossing(axis) if axis == 1 else None
    kind = type(module).__name__
    dims = int(kind[-2]) if kind.endswith("d") and kind[-2].isdigit() else 0
    if not dims or axes is None or axis >= axes - dims:
        return None
    if isinstance(module, _AVERAGE_MODULES):
        pads = _any(module.padding) and module.count_include_pad
        return _average(name, pads, getattr(module, "divisor_override", None), axis)
    if kind.startswith("AdaptiveAvgPool"):
        return Crossing(axis)
    if kind.startswith(("MaxPool", "AdaptiveMaxPool")) and not module.return_indices:
        return Crossing(axis, monotone=True)
    return None


def _through_pool(flow: DataFlow, node: fx.Node, axes: int, axis: int, name: str) -> Crossing | str | None:
    dims = _AVERAGE_POOLS.get(name) or _ADAPTIVE_POOLS.get(name) or _MAX_POOLS.get(name)
    if dims is None or axis >= axes - dims:
        return None
    if name in _AVERAGE_POOLS:
        pads = _any(argument(node, 3, "padding", 0)) and argument(node, 5, "count_include_pad", True)
        return _average(flow.describe(node), pads, argument(node, 6, "divisor_override"), axis)
    if name in _MAX_POOLS:
        return Crossing(axis, monotone=True) if isinstance(value_of(node), Tensor) else None
    return Crossing(axis)


def _average(name: str, pads: bool, divisor: Any, axis: int) -> Crossing | str:
    if pads:
        return f"'{name}' counts its padding in the average"
    return f"'{name}' divides by a number of its own" if divisor is not None else Crossing(axis)


def _any(padding: Any) -> bool:
    return any(padding) if isinstance(padding, Sequence) else bool(padding)


def _averaged(node: fx.Node, axes: int, axis: int) -> Crossing | None:
    given = argument(node, 1, "dim")
    reduced = {a % axes for a in ([given] if isinstance(given, int) else given or range(axes))}
    if axis in reduced or argument(node, 3, "dtype") is not None:
        return None
    kept = argument(node, 2, "keepdim", False)
    return Crossing(axis if kept else axis - sum(a < axis for a in reduced))


def _moved(flow: DataFlow, nodes: list[fx.Node], source: fx.Node, axis: int) -> Crossing | str | None:
    """Watch where the channels go by moving their numbers."""
    sizes = shape(source)
    if sizes is None or not all(isinstance(size, int) for size in sizes):
        return None  # a size that depends on the data
    if any(isinstance(a, torch.dtype) for n in nodes for a in (*n.args, *n.kwargs.values())):
        return None  # view(dtype) moves nothing, it reads the bits anew
    numbers = torch.arange(sizes[axis]).reshape(-1, *[1] * (len(sizes) - axis - 1)).expand(sizes)
    moved = _run(flow, nodes, source, numbers)
    if not isinstance(moved, Tensor) or not moved.numel():
        return None
    varying = [a for a in range(moved.dim()) if moved.shape[a] > 1 and bool((moved != moved.narrow(a, 0, 1)).any())]
    if len(varying) > 1:
        return f"{flow.describe(nodes[-1])} spreads the channels over {len(varying)} axes"
    if not varying:
        return Crossing(None, moved.reshape(-1)[:1])
    index = moved.movedim(varying[0], 0).reshape(moved.shape[varying[0]], -1)[:, 0]
    return Crossing(varying[0], index)


def _run(flow: DataFlow, nodes: list[fx.Node], source: fx.Node, numbers: Tensor) -> Any:
    values: dict[fx.Node, Any] = {source: numbers}
    for node in nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n] if n in values else value_of(n))
        module = flow.module(node)
        try:
            if module is not None:
                values[node] = module(*args, **kwargs)
            elif isinstance(node.target, str):
                values[node] = getattr(args[0], node.target)(*args[1:], **kwargs)
            else:
                assert callable(node.target)
                values[node] = node.target(*args, **kwargs)
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError, AttributeError):
            return None
    return values[nodes[-1]]


def piece(flow: DataFlow, split: fx.Node, part: fx.Node, source: fx.Node, axis: int) -> Crossing | str | None:
    """How channels come through ``split(...)[i]``."""
    return _moved(flow, [split, part], source, axis)
