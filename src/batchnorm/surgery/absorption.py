"""Which layers can take a channel's scale and shift in: those before it, or those after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from batchnorm.surgery import scaling
from batchnorm.surgery.affine import (
    ChannelMap,
    affine_of,
    crossing,
    data_users,
    is_identity,
    is_norm,
    piece,
    shape,
    tensor_inputs,
    wide,
)
from batchnorm.surgery.flow import DataFlow, attribute, data_inputs, operation, rank, value_of
from batchnorm.surgery.layers import CHANNEL_PADDED
from batchnorm.surgery.modules import is_plain, obstacle
from batchnorm.surgery.weights import per_input, reads_inputs_once, scale_outputs

_WEIGHTED = (_ConvNd, nn.Linear, nn.Bilinear, nn.Embedding)
_SPLITS = {"chunk", "split", "split_with_sizes", "tensor_split"}
_CONCATENATIONS = {"cat", "concat", "concatenate"}


@dataclass(frozen=True)
class Weights:
    """A layer's parameters so far, float64 on the CPU; ``padding`` is its padding's value for each input channel."""

    weight: Tensor
    bias: Tensor | None
    padding: Tensor | None = None


@dataclass(frozen=True)
class Line:
    """Batch normalization as ``scale * x + shift``, one pair a channel of ``axis``."""

    scale: Tensor
    shift: Tensor
    axis: int


@dataclass
class State:
    """What the layers have become, by name: weights, and the lines of batch normalization that stays.

    ``vectors`` are parameters that a forward adds or multiplies by itself, by their paths.
    """

    flow: DataFlow
    weights: dict[str, Weights] = field(default_factory=dict)
    lines: dict[str, Line] = field(default_factory=dict)
    foldable: dict[str, str | None] = field(default_factory=dict)
    vectors: dict[str, Tensor] = field(default_factory=dict)

    def of(self, name: str) -> Weights:
        if name in self.weights:
            return self.weights[name]
        layer: Any = self.flow.modules[name]
        bias = getattr(layer, "bias", None)
        return Weights(wide(layer.weight), None if bias is None else wide(bias))

    def line(self, name: str) -> Line:
        if name in self.lines:
            return self.lines[name]
        node = self.flow.calls(name)[0]
        return Line(*affine_of(self.flow.modules[name]), channel_axis(self.flow.modules[name], node))


@dataclass
class Absorption:
    """Layers that together take one map in; nothing counts before all of them can."""

    state: State
    site: fx.Node
    weights: dict[str, Weights] = field(default_factory=dict)
    lines: dict[str, Line] = field(default_factory=dict)
    into: list[str] = field(default_factory=list)
    vectors: dict[str, Tensor] = field(default_factory=dict)

    def commit(self) -> None:
        self.state.weights |= self.weights
        self.state.lines |= self.lines
        self.state.vectors |= self.vectors

    def attempt(self, way: Callable[[], str | None]) -> str | None:
        """Go one way; if it fails, nothing that it planned stays."""
        kept = dict(self.weights), dict(self.lines), list(self.into), dict(self.vectors)
        reason = way()
        if reason is not None:
            self.weights, self.lines, self.into, self.vectors = kept
        return reason

    def before(self, node: fx.Node, map: ChannelMap, reader: fx.Node | None = None) -> str | None:
        """Make ``node`` give ``reader`` (the site by default) the mapped value; why it cannot, or None."""
        flow = self.state.flow
        users = [user for user in data_users(node) if user is not (reader or self.site)]
        users = [user for user in users if not self._undone_by(user, node, map)]
        if users:
            others = " and ".join(dict.fromkeys(flow.describe(user) for user in users))
            return f"the output of {_called(flow, node)} also goes to {others}"
        module = flow.module(node)
        if isinstance(module, _WEIGHTED) or is_norm(module):
            return self._into(node, map, "output")
        if node.op.startswith("call") and operation(node) in _CONCATENATIONS and module is None:
            return self._before_concatenation(node, map)
        sources = tensor_inputs(node)
        reason = f"its input comes from {flow.describe(node)}"
        if node.op.startswith("call") and len(sources) == 1:
            reason = self.attempt(lambda: self._before_crossing(node, sources[0], map)) or ""
        if reason and node.op.startswith("call") and module is None and map.axis is not None:
            other = self._before_arithmetic(node, map)
            return other if other is None or other else reason
        return reason or None

    def _before_crossing(self, node: fx.Node, source: fx.Node, map: ChannelMap) -> str | None:
        flow = self.state.flow
        reason = f"its input comes from {flow.describe(node)}"
        split = source if isinstance(value_of(source), (list, tuple)) else None
        if split is not None:
            if operation(split) not in _SPLITS or flow.module(split) is not None:
                return reason
            if not _apart(split):
                return f"{flow.describe(split)} gives a part of its result more than once"
            source = tensor_inputs(split)[0]
        axes, sizes = rank(source), shape(source)
        reasons = []
        for axis in _candidate_axes(axes, map):
            way = piece(flow, split, node, source, axis) if split else crossing(flow, node, source, axis)
            if isinstance(way, str):
                reasons.append(way)
            if way is None or isinstance(way, str):
                continue
            assert sizes is not None
            if way.index is None and map.axis is not None and way.axis != map.axis:
                continue
            moved = way.backward(map, sizes[axis], axis)
            if isinstance(moved, str):
                reasons.append(moved)
                continue
            reader = split or node
            result = self.attempt(partial(self.before, source, moved, reader))
            if result is None:
                return None
            reasons.append(result)
        return reasons[0] if reasons else reason

    def _before_concatenation(self, node: fx.Node, map: ChannelMap) -> str | None:
        axis = _axis_of_concatenation(node)
        inputs = node.args[0] if node.args else node.kwargs.get("tensors")
        if map.axis is not None and map.axis != axis:
            return "a concatenation joins another axis than that of the channels"
        assert isinstance(inputs, (list, tuple))
        start = 0
        for source in inputs:
            assert isinstance(source, fx.Node)
            sizes = shape(source)
            if sizes is None:
                return f"its input comes from {self.state.flow.describe(source)}"
            size = sizes[axis]
            part = map
            if map.axis is not None:
                part = ChannelMap(map.scale[start : start + size], map.shift[start : start + size], axis)
            reason = self.before(source, part, node)
            if reason is not None:
                return reason
            start += size
        return None

    def _before_arithmetic(self, node: fx.Node, map: ChannelMap) -> str | None:
        """Sums, whose terms are all scaled and one of them shifted, and what is linear in each channel.

        Returns:
            None where the map is taken in, else the reason, which is empty if the operation is none of these.
        """
        if operation(node) in ("add", "sub") and len(node.args) == 2 and not node.kwargs:
            return self._before_sum(node, map)
        assert map.axis is not None
        parted = scaling.parted_axis(node, map.axis - 1)
        if parted is not None:  # each head has the same channels
            heads = scaling.size(node, map.axis - 1) or 1
            return self.before(parted, ChannelMap(map.scale.repeat(heads), map.shift.repeat(heads), map.axis - 1), node)
        merged = scaling.merged_axes(node, map.axis)
        found = scaling.ways(self.state.flow, node, map.axis)
        owned = next((a for a in node.args if scaling.own_parameter(self.state.flow, a, node)), None)
        if not found and owned is None and merged is None:
            return ""
        described = self.state.flow.describe(node)
        if bool(map.shift.any()):
            if merged is not None:
                return ""
            return f"its input comes from {described}, which passes a scale on and no shift; no bias is added behind it"
        if merged is not None:
            heads = scaling.size(merged, map.axis) or 1
            return self._before_heads(merged, map.scale.reshape(heads, -1), map.axis, node)
        if owned is not None and self._into_factor(node, owned, map):
            return None
        reason = ""
        for way in found:
            if way.increasing and bool((map.scale < 0).any()):
                return f"a scale is negative, and {described} takes the largest or smallest"
            moved = ChannelMap(map.scale, map.shift, way.axis)
            reason = self.attempt(partial(self.before, way.source, moved, node)) or ""
            if not reason:
                return None
        return reason

    def _before_heads(self, node: fx.Node, scale: Tensor, axis: int, reader: fx.Node) -> str | None:
        """Scale channels that lie on two axes, (heads, channels of a head), of which ``axis`` is the first."""
        flow = self.state.flow
        both = ChannelMap(scale, torch.zeros_like(scale), axis)
        users = [user for user in data_users(node) if user is not reader and not self._undone_by(user, node, both)]
        if users:
            return f"the output of {_called(flow, node)} also goes to {flow.describe(users[0])}"
        source = scaling.parted_axis(node, axis)
        if source is not None:
            return self.before(source, ChannelMap(scale.reshape(-1), torch.zeros(scale.numel()).to(scale), axis), node)
        if is_identity(flow, node):
            return self._before_heads(tensor_inputs(node)[0], scale, axis, node)
        reason = f"its input comes from {flow.describe(node)}"
        second = {way.source: way.axis for way in scaling.ways(flow, node, axis + 1)}
        for way in scaling.ways(flow, node, axis):
            if way.increasing or second.get(way.source) != way.axis + 1:
                continue
            there = partial(self._before_heads, way.source, scale, way.axis, node)
            reason = self.attempt(there) or ""
            if not reason:
                return None
        return reason

    def _before_sum(self, node: fx.Node, map: ChannelMap) -> str | None:
        a, b = node.args
        if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or a is b or map.axis is None:
            return ""
        still = ChannelMap(map.scale, torch.zeros_like(map.shift), map.axis)
        reasons = []
        for shifted, scaled in ((b, a), (a, b)) if operation(node) == "add" else ((a, b),):

            def way(shifted: fx.Node = shifted, scaled: fx.Node = scaled) -> str | None:
                return self._before_term(node, shifted, map) or self._before_term(node, scaled, still)

            reason = self.attempt(way)
            if reason is None:
                return None
            reasons.append(reason)
        return reasons[0]

    def _before_term(self, node: fx.Node, term: fx.Node, map: ChannelMap) -> str | None:
        """Map one term of a sum: a value, or a parameter that is added."""
        assert map.axis is not None
        from_right = (rank(node) or 0) - map.axis
        if term.op == "get_attr":
            return self._into_bias(node, term, map, from_right)
        axis = (rank(term) or 0) - from_right
        if axis < 0 or scaling.size(term, axis) != len(map.scale):
            return f"{self.state.flow.describe(term)}, which is added, is the same for all channels"
        return self.before(term, ChannelMap(map.scale, map.shift, axis), node)

    def _into_bias(self, node: fx.Node, given: fx.Node, map: ChannelMap, from_right: int) -> str | None:
        """Scale and shift a parameter that the forward adds."""
        path = scaling.own_parameter(self.state.flow, given, node)
        if path is None:
            return f"{self.state.flow.describe(given)}, which is added, is no parameter that is read there alone"
        scale, shift = (
            scaling.along(v, attribute(self.state.flow.net, path), from_right) for v in (map.scale, map.shift)
        )
        if scale is None or shift is None:
            return f"the tensor {path}, which is added, has not one number a channel"
        return self._set(path, lambda old: old * scale + shift)

    def _into_factor(self, node: fx.Node, given: Any, map: ChannelMap) -> bool:
        """Scale a parameter that a value is multiplied by, element by element or, on the right, as a matrix."""
        path, name = scaling.own_parameter(self.state.flow, given, node), operation(node)
        assert path is not None
        assert map.axis is not None
        tensor, from_right = attribute(self.state.flow.net, path), (rank(node) or 0) - map.axis
        if name not in ("mul", "multiply", "mm", "matmul") or len(node.args) != 2 or node.kwargs:
            return False
        if name in ("mm", "matmul") and (given is not node.args[1] or tensor.dim() != 2 or from_right != 1):
            return False
        scale = scaling.along(map.scale, tensor, from_right)
        return scale is not None and self._set(path, lambda old: old * scale) is None

    def _undone_by(self, user: fx.Node, node: fx.Node, map: ChannelMap) -> bool:
        """Whether another reader multiplies the value by a parameter that can be divided by the scale.

        So the vectors of attention (Velickovic et al. 2018, equation 3) see the value that they saw.
        """
        flow = self.state.flow
        if user.op not in ("call_function", "call_method") or operation(user) not in ("mul", "multiply"):
            return False
        if len(user.args) != 2 or user.kwargs or node not in user.args or map.axis is None:
            return False
        other = user.args[1] if user.args[0] is node else user.args[0]
        path = scaling.own_parameter(flow, other, user)
        if path is None or bool(map.shift.any()) or not scaling.can_be_undone(map.scale):
            return False
        scale = scaling.along(map.scale, attribute(flow.net, path), (rank(node) or 0) - map.axis)
        return scale is not None and self._set(path, lambda old: old / scale) is None

    def _set(self, path: str, change: Callable[[Tensor], Tensor]) -> str | None:
        """Change a parameter that a forward uses by itself."""
        old = attribute(self.state.flow.net, path)
        if path in self.into:
            return f"it meets '{path}' twice"
        new = change(self.state.vectors[path] if path in self.state.vectors else wide(old))
        if not scaling.fits(new, old) or new.shape != old.shape:
            return f"the folded values of '{path}' would overflow {old.dtype}"
        self.vectors[path] = new
        self.into.append(path)
        return None

    def after(self, node: fx.Node, map: ChannelMap) -> str | None:
        """Let everything that takes ``node`` take the unmapped value and map it itself."""
        users = data_users(node)
        if not users:
            return "nothing takes its output"
        for user in users:
            reason = self._after_user(user, node, map)
            if reason is not None:
                return reason
        return None

    def _after_user(self, user: fx.Node, node: fx.Node, map: ChannelMap) -> str | None:
        flow = self.state.flow
        module = flow.module(user)
        if isinstance(module, (_ConvNd, nn.Linear)) or is_norm(module):
            if data_inputs(user)[0] is not node or len(data_inputs(user)) > 1:
                return f"its output goes to a second input of '{flow.name(user)}'"
            return self._into(user, map, "input")
        if user.op.startswith("call") and module is None and operation(user) in _CONCATENATIONS:
            return self._after_concatenation(user, node, map)
        reason = f"its output goes to {flow.describe(user)}"
        if map.axis is None or not user.op.startswith("call") or tensor_inputs(user) != [node]:
            return reason
        if isinstance(value_of(user), (list, tuple)):
            return self._after_split(user, node, map) if operation(user) in _SPLITS and module is None else reason
        way = crossing(flow, user, node, map.axis)
        if way is None or isinstance(way, str):
            return way or reason
        moved = way.forward(map)
        return moved if isinstance(moved, str) else self.after(user, moved)

    def _after_split(self, split: fx.Node, node: fx.Node, map: ChannelMap) -> str | None:
        assert map.axis is not None
        for part in data_users(split):
            way = piece(self.state.flow, split, part, node, map.axis)
            if way is None or isinstance(way, str):
                return way or f"its output goes to {self.state.flow.describe(part)}"
            moved = way.forward(map)
            reason = moved if isinstance(moved, str) else self.after(part, moved)
            if reason is not None:
                return reason
        return None

    def _after_concatenation(self, user: fx.Node, node: fx.Node, map: ChannelMap) -> str | None:
        axis, whole = _axis_of_concatenation(user), shape(user)
        inputs = user.args[0] if user.args else user.kwargs.get("tensors")
        if whole is None or (map.axis is not None and map.axis != axis):
            return "a concatenation joins another axis than that of the channels"
        scale, shift = torch.ones(whole[axis], dtype=torch.float64), torch.zeros(whole[axis], dtype=torch.float64)
        start = 0
        assert isinstance(inputs, (list, tuple))
        for source in inputs:
            assert isinstance(source, fx.Node)
            size = (shape(source) or ())[axis]
            if source is node:
                scale[start : start + size], shift[start : start + size] = map.scale, map.shift
            start += size
        return self.after(user, ChannelMap(scale, shift, axis))

    def _into(self, node: fx.Node, map: ChannelMap, side: str) -> str | None:
        """Change the layer that ``node`` calls, at its output or its input."""
        flow, name = self.state.flow, self.state.flow.name(node)
        layer = flow.modules[name]
        way = "its input comes from" if side == "output" else "its output goes to"
        reason = obstacle(flow, name)
        if reason is not None:
            return f"{way} '{name}', but {reason}"
        if side == "input" and not (is_plain(layer) or is_norm(layer) or reads_inputs_once(layer)):
            return f"{way} '{name}', whose class {type(layer).__qualname__} has a forward of its own"
        if name in self.into:
            return f"it meets '{name}' twice"
        if is_norm(layer):
            outcome: Weights | Line | str = self._line(node, name, map, side)
        else:
            change = _at_output if side == "output" else _at_input
            outcome = change(layer, self.state.of(name), node, map, name)
        if isinstance(outcome, str):
            return outcome
        if isinstance(outcome, Line):
            self.lines[name] = outcome
        else:
            self.weights[name] = outcome
        self.into.append(name)
        return None

    def _line(self, node: fx.Node, name: str, map: ChannelMap, side: str) -> Line | str:
        reason = self.state.foldable.get(name, "it is unknown")
        if reason is not None:
            return f"its neighbour '{name}' stays: {reason}"
        line = self.state.line(name)
        along = map.along(line.axis, len(line.scale))
        if along is None:
            return f"the channels of '{name}' lie on another axis"
        if side == "input":
            return Line(line.scale * along.scale, line.shift + line.scale * along.shift, line.axis)
        if getattr(self.state.flow.modules[name], "activation", None):
            return f"the fused activation of '{name}' is between"
        return Line(line.scale * along.scale, line.shift * along.scale + along.shift, line.axis)


def channel_axis(layer: Any, node: fx.Node) -> int:
    """The axis of its input that the layer normalizes."""
    return (rank(node) or 0) - 1 if getattr(layer, "channels_last", False) else 1


def _called(flow: DataFlow, node: fx.Node) -> str:
    return f"'{flow.name(node)}'" if node.op == "call_module" else flow.describe(node)


def _axis_of_concatenation(node: fx.Node) -> int:
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
    assert isinstance(given, int)
    return given % (rank(node) or 1)


def _apart(split: fx.Node) -> bool:
    """Whether each part is taken once."""
    taken = [user.args[1] for user in split.users if operation(user) == "getitem"]
    return len(taken) == len(split.users) == len(set(map(str, taken)))


def _candidate_axes(axes: int | None, map: ChannelMap) -> list[int]:
    """Where the channels may lie in the input: most often on the axis of the result, or on the second."""
    if axes is None:
        return []
    first = [map.axis] if map.axis is not None and map.axis < axes else []
    return list(dict.fromkeys([*first, *range(1, axes)]))


def _at_output(layer: Any, old: Weights, node: fx.Node, map: ChannelMap, name: str) -> Weights | str:
    axes = rank(node) or 0
    axis, size = axes - 1, 0
    if isinstance(layer, _ConvNd):
        axis, size = 1, layer.out_channels
    elif isinstance(layer, nn.Embedding):
        size = layer.embedding_dim
        if layer.max_norm is not None:
            return f"'{name}' bounds the norm of its rows when it is called (max_norm)"
    else:
        size = layer.out_features
    along = map.along(axis, size)
    if along is None or (isinstance(layer, _ConvNd) and axes != len(layer.kernel_size) + 2) or axes < 2:
        return f"it normalizes axis {map.axis} of a tensor with {axes} axes, which is not the channel axis of '{name}'"
    if isinstance(layer, nn.Embedding):
        return _checked(layer, Weights(old.weight * along.scale + along.shift, None), name)
    bias = along.shift if old.bias is None else old.bias * along.scale + along.shift
    return _checked(layer, Weights(scale_outputs(layer, old.weight, along.scale), bias, old.padding), name)


def _at_input(layer: Any, old: Weights, node: fx.Node, map: ChannelMap, name: str) -> Weights | str:
    source = data_inputs(node)[0]
    axes = rank(source) or 0
    linear = isinstance(layer, nn.Linear)
    axis, size = (axes - 1, layer.in_features) if linear else (1, layer.in_channels)
    along = map.along(axis, size)
    if along is None or axes < 2 or (not linear and axes != len(layer.kernel_size) + 2):
        return f"it normalizes another axis than that of the input channels of '{name}'"
    if isinstance(layer, _ConvTransposeNd) and bool(along.shift.any()) and not _is_pointwise(layer):
        return f"the places that '{name}' inserts are zero, which a shift would change"
    weight = old.weight.clone(memory_format=torch.contiguous_format)
    grouped = per_input(layer, weight)
    scale, shift = (x.reshape(grouped.shape[0], 1, -1, 1) for x in (along.scale, along.shift))
    added = (grouped * shift).sum((2, 3)).reshape(-1)
    grouped.mul_(scale)
    if linear or not _pads_with_zeros(layer):
        bias = added if old.bias is None else old.bias + added
        return _checked(layer, Weights(weight, bias), name)
    padding = _padding_value(old.padding, along)
    if padding is None:
        return f"gamma is 0 in a channel whose shift is not, which no padding value of '{name}' can hide"
    changed = bool(padding.any())
    if changed and type(layer) not in CHANNEL_PADDED and not isinstance(layer, tuple(CHANNEL_PADDED.values())):
        return f"'{name}' is a {type(layer).__name__}, whose padding cannot be given a value"
    return _checked(layer, Weights(weight, old.bias, padding if changed else None), name)


def _is_pointwise(layer: _ConvTransposeNd) -> bool:
    ones = {*layer.kernel_size, *layer.stride}
    zeros = {*layer.padding, *layer.output_padding}
    return ones == {1} and zeros == {0}


def _pads_with_zeros(layer: _ConvNd) -> bool:
    if isinstance(layer, _ConvTransposeNd) or layer.padding_mode != "zeros":
        return False
    if isinstance(layer.padding, str):
        return layer.padding == "same" and max(layer.kernel_size) > 1
    return any(layer.padding)


def _padding_value(old: Tensor | None, map: ChannelMap) -> Tensor | None:
    """The value that the map takes to the padding's value so far: (old - shift) / scale."""
    target = -map.shift if old is None else old - map.shift
    if bool(((map.scale == 0) & (target != 0)).any()):
        return None
    return torch.where(target == 0, 0.0, target / torch.where(map.scale == 0, 1.0, map.scale))


def _checked(layer: Any, new: Weights, name: str) -> Weights | str:
    dtype = layer.weight.dtype
    values = [value for value in (new.weight, new.bias, new.padding) if value is not None]
    if not all(bool(value.to(dtype).isfinite().all()) for value in values):
        return f"the folded weights of '{name}' would overflow {dtype}"
    return new
