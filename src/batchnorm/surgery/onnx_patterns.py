"""Batch normalization that an ONNX file spells as Mul and Add by constants per channel.

Keras 3 and tf2onnx write no BatchNormalization in inference, and Paddle writes a convolution's bias as an Add of
(1, C, 1, 1). Each such chain is one map ``scale * x + shift`` per channel, so it becomes a BatchNormalization of mean
0, variance 1 and epsilon 0, which the rules of folding know. If the channels are the last axis, as TensorFlow has
them, it stands between two Transpose nodes, which go again with it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchnorm.surgery.onnx_graph import OnnxGraph

_OPERATORS = ("Mul", "Add", "Sub", "Div")
_TYPES = (torch.float32, torch.float64)


@dataclass
class Chain:
    """Adjacent nodes that compute ``scale * source + shift`` per channel; both (C,), float64.

    ``axis`` is that of the channels, 1 or the last one; None where one number serves all.
    """

    source: str
    nodes: list[Any]
    scale: Tensor
    shift: Tensor
    axis: int | None = 1

    @property
    def output(self) -> str:
        return str(self.nodes[-1].output[0])

    @property
    def label(self) -> str:
        return str(self.nodes[-1].name or self.output)


def chains(graph: OnnxGraph, values: dict[str, Tensor]) -> list[Chain]:
    """The chains that are a batch normalization, or a bias or scale right beside one.

    A chain counts if it multiplies and adds, or if its neighbour is a BatchNormalization.
    """
    found: dict[str, Chain] = {}
    if graph.opset < 7:
        return []
    for node in graph.graph.node:
        read = _line(graph, node, values)
        if read is None:
            continue
        before = found.get(read.source)
        if before is not None and graph.uses[read.source] == 1 and _one_axis(before, read):
            del found[read.source]
            scale, shift = before.scale * read.scale, before.shift * read.scale + read.shift
            axis = read.axis if before.axis is None else before.axis
            read = Chain(before.source, [*before.nodes, node], scale, shift, axis)
        found[node.output[0]] = read
    return [chain for chain in found.values() if _counts(graph, chain)]


def _one_axis(first: Chain, second: Chain) -> bool:
    return first.axis is None or second.axis is None or first.axis == second.axis


def _counts(graph: OnnxGraph, chain: Chain) -> bool:
    kinds = {"scale" if node.op_type in ("Mul", "Div") else "shift" for node in chain.nodes}
    if len(kinds) == 2:
        return True
    maker = graph.makers.get(chain.source)
    readers = [n for n in graph.graph.node if chain.output in n.input]
    after = maker is not None and graph.is_own(maker, "BatchNormalization") and graph.uses[chain.source] == 1
    return after or (len(readers) == graph.uses[chain.output] == 1 and graph.is_own(readers[0], "BatchNormalization"))


def _line(graph: OnnxGraph, node: Any, values: dict[str, Tensor]) -> Chain | None:
    """A node as a chain of its own; None where it is no map per channel."""
    if not graph.is_own(node, *_OPERATORS) or len(node.input) != 2:
        return None
    constant = [name in graph.constants for name in node.input]
    if sum(constant) != 1 or (node.op_type == "Div" and constant[0]):
        return None
    source, other = (node.input[1], node.input[0]) if constant[0] else (node.input[0], node.input[1])
    value, result = values.get(source), values.get(node.output[0])
    if value is None or result is None or value.shape != result.shape or value.dim() < 2 or value.dtype not in _TYPES:
        return None
    found = _per_channel(graph.tensor(other), value)
    maker = graph.makers.get(source)
    if found is None or (node.op_type == "Add" and maker is not None and graph.is_own(maker, "MatMul")):
        return None  # the Add behind a MatMul is its bias, which folding knows
    vector, axis = found
    one, zero = torch.ones_like(vector), torch.zeros_like(vector)
    if node.op_type == "Mul":
        return Chain(source, [node], vector, zero, axis)
    if node.op_type == "Div":
        return Chain(source, [node], 1 / vector, zero, axis) if bool((vector != 0).all()) else None
    if node.op_type == "Add":
        return Chain(source, [node], one, vector, axis)
    return Chain(source, [node], *((-one, vector) if constant[0] else (one, -vector)), axis)


def _per_channel(constant: Tensor | None, value: Tensor) -> tuple[Tensor, int | None] | None:
    """A constant that has one value a channel, as (C,) in float64, and the axis: the second or the last."""
    if constant is None or constant.dim() > value.dim() or constant.dtype != value.dtype:
        return None
    vector = constant.reshape(-1).double()
    shape = (*(1,) * (value.dim() - constant.dim()), *constant.shape)
    wide = [axis for axis, size in enumerate(shape) if size != 1]
    if not wide:
        return vector, None
    if len(wide) > 1 or wide[0] not in (1, value.dim() - 1) or shape[wide[0]] != value.shape[wide[0]]:
        return None
    return vector, wide[0]


def with_norms(model: Any, wanted: Sequence[Chain], labels: Collection[str], values: dict[str, Tensor]) -> list[str]:
    """Puts a BatchNormalization in the place of each chain whose label is asked for, in the model.

    Returns:
        The names of Transpose nodes that stand behind one.
    """
    graph = OnnxGraph(model)
    helper, numpy_helper = graph.onnx.helper, graph.onnx.numpy_helper
    behind: list[str] = []
    for chain in wanted:
        if chain.label not in labels:
            continue
        value, names = values[chain.source], []
        kind, last = value.dtype, chain.axis not in (None, 1)
        scale, shift = (v.expand(value.shape[chain.axis or 1]) for v in (chain.scale, chain.shift))
        parts = {"scale": scale, "bias": shift, "mean": torch.zeros_like(scale), "var": torch.ones_like(scale)}
        for part, vector in parts.items():
            name = graph.fresh(f"{chain.label}.{part}")
            model.graph.initializer.append(numpy_helper.from_array(vector.to(kind).numpy(), name))
            graph.refresh()
            names.append(name)
        source, result, made = chain.source, chain.output, []
        if last:
            source, result = graph.fresh(f"{chain.label}.first"), graph.fresh(f"{chain.label}.second")
            there, back = _orders(value.dim())
            values[source] = values[result] = value.permute(there)
            made = [
                helper.make_node("Transpose", [chain.source], [source], name=source, perm=there),
                helper.make_node("Transpose", [result], [chain.output], name=result, perm=back),
            ]
            behind.append(result)
        norm = helper.make_node("BatchNormalization", [source, *names], [result], name=chain.label, epsilon=0.0)
        _replace(model.graph, chain, [*made[:1], norm, *made[1:]])
        graph.refresh()
    return behind


def _orders(dims: int) -> tuple[list[int], list[int]]:
    """Orders of axes that move the last axis to the second place, and back."""
    return [0, dims - 1, *range(1, dims - 1)], [0, *range(2, dims), 1]


def _replace(graph: Any, chain: Chain, nodes: list[Any]) -> None:
    """Puts nodes where the last one of a chain is, and takes the chain out."""
    gone = {each.output[0] for each in chain.nodes}
    kept: list[Any] = []
    for each in graph.node:
        if each.output[0] == chain.output:
            kept += nodes
        elif each.output[0] not in gone:
            kept.append(each)
    del graph.node[:]
    graph.node.extend(kept)


def without_pairs(model: Any, behind: Collection[str]) -> None:
    """Takes out the Transpose nodes between which a BatchNormalization stood, where it is gone."""
    graph = OnnxGraph(model)
    for name in behind:
        second = next(node for node in graph.graph.node if node.name == name)
        first = graph.makers.get(second.input[0])
        if first is not None and graph.is_own(first, "Transpose") and first.name.endswith(".first"):
            graph.remove(first)
            graph.remove(next(node for node in graph.graph.node if node.name == name))
