"""Operations through which a scale of channels goes and a shift does not, and parameters that are added or multiplied.

Sums over neighbours, products with other values, and rows that are gathered are linear in each channel:
``f(scale * x) = scale * f(x)``. A shift would have to be known behind them, where a bias is added
(``A (x W) + b``, Kipf & Welling 2017, equation 2, with a bias).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from batchnorm.surgery.affine import argument, data_users
from batchnorm.surgery.flow import IS_ZERO, DataFlow, attribute, operation, rank, value_of

_ROW_PRODUCTS = {"mm", "bmm", "matmul", "spmm", "sparse_mm", "_sparse_mm", "hspmm"}
_ZEROS = {"zeros", "zeros_like", "new_zeros"}
_VIEWS = {"view", "reshape", "flatten", "unflatten", "_unsafe_view"}
_LINEAR_REDUCTIONS = {"sum", "mean", "add"}
_LARGEST = 1e6  # of a scale that a parameter undoes, and one over the smallest


@dataclass(frozen=True)
class Way:
    """A value whose channels lie on ``axis``; ``increasing``: no negative scale goes through."""

    source: fx.Node
    axis: int
    increasing: bool = False


def ways(flow: DataFlow, node: fx.Node, axis: int) -> list[Way]:
    """The inputs of a call that may be scaled, each by itself, in the place of channels on ``axis`` of its result."""
    if node.op not in ("call_function", "call_method") or not node.args:
        return []
    name, first = operation(node), node.args[0]
    if name in ("mul", "multiply", "div", "divide", "true_divide"):
        return _through_product(node, axis, name)
    if name in _ROW_PRODUCTS:
        return _through_rows(node, axis)
    if not isinstance(first, fx.Node) or rank(first) is None:
        return []
    if name == "neg":
        return [Way(first, axis)]
    if name in ("index_select", "index", "getitem"):
        return [Way(first, axis)] if _gathers_elsewhere(node, name, axis) else []
    if name in ("scatter_add", "index_add", "scatter_reduce"):
        return _through_scatter(flow, node, axis, name)
    if name == "sum":
        return _through_sum(node, first, axis)
    return []


def _through_product(node: fx.Node, axis: int, name: str) -> list[Way]:
    if len(node.args) != 2 or node.kwargs:
        return []
    from_right = (rank(node) or 0) - axis
    found = []
    for value in node.args[: 1 if "div" in name else 2]:
        place = _axis_from_right(value, from_right)
        if isinstance(value, fx.Node) and place is not None and size(value, place) == size(node, axis) is not None:
            found.append(Way(value, place))
    return found


def merged_axes(node: fx.Node, axis: int) -> fx.Node | None:
    """The input of a view that joins its axes ``axis`` and ``axis + 1`` to the axis ``axis`` of the result."""
    source = _viewed(node)
    if source is None or rank(source) != (rank(node) or 0) + 1:
        return None
    heads, each = size(source, axis), size(source, axis + 1)
    same = all(size(source, a + (a > axis)) == size(node, a) for a in range(rank(node) or 0) if a != axis)
    return source if same and heads and each and heads * each == size(node, axis) else None


def parted_axis(node: fx.Node, axis: int) -> fx.Node | None:
    """The input of a view that parts its axis ``axis`` into the axes ``axis`` and ``axis + 1`` of the result."""
    source = _viewed(node)
    if source is None or rank(source) != (rank(node) or 0) - 1:
        return None
    heads, each = size(node, axis), size(node, axis + 1)
    same = all(size(node, a + (a > axis)) == size(source, a) for a in range(rank(source) or 0) if a != axis)
    return source if same and heads and each and heads * each == size(source, axis) else None


def _viewed(node: fx.Node) -> fx.Node | None:
    if node.op not in ("call_function", "call_method") or operation(node) not in _VIEWS or not node.args:
        return None
    source = node.args[0]
    return source if isinstance(source, fx.Node) and rank(source) is not None else None


def _through_rows(node: fx.Node, axis: int) -> list[Way]:
    """``A @ x``: each column of x by itself."""
    if len(node.args) < 2:
        return []
    x = node.args[1]
    axes = rank(x) if isinstance(x, fx.Node) else None
    if not isinstance(x, fx.Node) or axes is None or axes < 2 or axis != (rank(node) or 0) - 1:
        return []
    return [Way(x, axes - 1)]


def _gathers_elsewhere(node: fx.Node, name: str, axis: int) -> bool:
    """Whether the call gathers along one axis that is not the channels'."""
    if name == "index_select":
        return _axis(node, 1) not in (None, axis)
    index = node.args[1] if len(node.args) > 1 else None
    places = list(index) if isinstance(index, (list, tuple)) else [index]
    given = [i for i, place in enumerate(places) if isinstance(place, fx.Node)]
    if len(given) != 1 or any(place is not None and not isinstance(place, fx.Node) for place in places):
        return False
    only: Any = places[given[0]]
    return rank(only) == 1 and given[0] != axis


def _starts_from_zero(flow: DataFlow, start: fx.Node) -> bool:
    if start.op != "get_attr":
        return operation(start) in _ZEROS
    return bool(start.meta.get(IS_ZERO)) and attribute(flow.net, flow.name(start)) is None  # made by the forward


def _through_scatter(flow: DataFlow, node: fx.Node, axis: int, name: str) -> list[Way]:
    if len(node.args) < 4:
        return []
    start, source = node.args[0], node.args[3]
    assert isinstance(start, fx.Node)
    if not isinstance(source, fx.Node) or rank(source) != rank(node) or _axis(node, 1) in (None, axis):
        return []
    if not _starts_from_zero(flow, start) or data_users(start) != [node]:
        return []
    if name != "scatter_reduce":
        return [Way(source, axis)] if argument(node, 4, "alpha", 1) == 1 else []
    reduction = argument(node, 4, "reduce")
    if reduction in _LINEAR_REDUCTIONS:
        return [Way(source, axis)]
    return [Way(source, axis, increasing=True)] if reduction in ("amax", "amin") else []


def _through_sum(node: fx.Node, source: fx.Node, axis: int) -> list[Way]:
    axes, given = rank(source) or 0, argument(node, 1, "dim")
    if given is None or argument(node, 3, "dtype") is not None:
        return []
    reduced = {a % axes for a in ([given] if isinstance(given, int) else given)}
    kept = bool(argument(node, 2, "keepdim", False))
    left = [a for a in range(axes) if kept or a not in reduced]
    place = left[axis] if axis < len(left) else axes
    return [Way(source, place)] if place < axes and place not in reduced else []


def size(node: Any, axis: int) -> int | None:
    """How long an axis is; None where that depends on the data."""
    value = value_of(node) if isinstance(node, fx.Node) else None
    length = value.shape[axis] if isinstance(value, Tensor) and -value.dim() <= axis < value.dim() else None
    return length if isinstance(length, int) else None


def _axis_from_right(node: Any, from_right: int) -> int | None:
    axes = rank(node) if isinstance(node, fx.Node) else None
    return axes - from_right if axes is not None and axes >= from_right else None


def _axis(node: fx.Node, position: int) -> int | None:
    given = argument(node, position, "dim")
    axes = rank(node)
    return given % axes if isinstance(given, int) and axes else None


def own_parameter(flow: DataFlow, node: Any, reader: fx.Node) -> str | None:
    """The path of the parameter behind ``node`` that ``reader`` alone reads, once; None for anything else."""
    if not isinstance(node, fx.Node) or node.op != "get_attr" or reader.all_input_nodes.count(node) != 1:
        return None
    path = flow.name(node)
    tensor, (owner, _, key) = attribute(flow.net, path), path.rpartition(".")
    if not isinstance(tensor, nn.Parameter) or flow.net.get_submodule(owner)._parameters.get(key) is not tensor:
        return None
    readers = [
        user
        for other in flow.nodes
        if other.op == "get_attr" and attribute(flow.net, flow.name(other)) is tensor
        for user in other.users
    ]
    if readers != [reader] or list(reader.args).count(node) != 1:
        return None
    called = (flow.module(other) for other in flow.nodes if other.op == "call_module")
    return None if any(p is tensor for m in called if m is not None for p in m.parameters()) else path


def along(vector: Tensor, tensor: Tensor, from_right: int) -> Tensor | None:
    """Numbers of channels, shaped for ``tensor``, whose channels lie on axes from this place from the right on."""
    if tensor.dim() < from_right or tensor.shape[tensor.dim() - from_right :][: vector.dim()] != vector.shape:
        return None
    return vector.reshape(*vector.shape, *[1] * (from_right - vector.dim()))


def can_be_undone(scale: Tensor) -> bool:
    """Whether a parameter can be divided by the scale without loss."""
    sizes = scale.abs()
    return bool(((sizes >= 1 / _LARGEST) & (sizes <= _LARGEST)).all())


def fits(new: Tensor, old: nn.Parameter) -> bool:
    """Whether new values are finite in the parameter's dtype."""
    return bool(new.to(old.dtype).isfinite().all()) and not torch.is_complex(old)
