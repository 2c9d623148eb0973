"""Batch normalization that an ONNX file spells as Mul and Add by constants per channel.

Keras 3 and tf2onnx write no BatchNormalization in inference, and Paddle writes a convolution's bias as an Add of
(1, C, 1, 1). Each such chain is one map ``scale * x + shift`` per channel, so it becomes a BatchNormalization of mean
0, variance 1 and epsilon 0, which the rules of folding know.
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
    """Adjacent nodes that compute ``scale * source + shift`` per channel; both (C,), float64."""

    source: str
    nodes: list[Any]
    scale: Tensor
    shift: Tensor

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
        source, scale, shift = read
        before = found.get(source)
        if before is not None and graph.uses[source] == 1:
            del found[source]
            nodes, scale, shift = [*before.nodes, node], before.scale * scale, before.shift * scale + shift
            found[node.output[0]] = Chain(before.source, nodes, scale, shift)
        else:
            found[node.output[0]] = Chain(source, [node], scale, shift)
    return [chain for chain in found.values() if _counts(graph, chain)]


def _counts(graph: OnnxGraph, chain: Chain) -> bool:
    kinds = {"scale" if node.op_type in ("Mul", "Div") else "shift" for node in chain.nodes}
    if len(kinds) == 2:
        return True
    maker = graph.makers.get(chain.source)
    readers = [n for n in graph.graph.node if chain.output in n.input]
    after = maker is not None and graph.is_own(maker, "BatchNormalization") and graph.uses[chain.source] == 1
    return after or (len(readers) == graph.uses[chain.output] == 1 and graph.is_own(readers[0], "BatchNormalization"))


def _line(graph: OnnxGraph, node: Any, values: dict[str, Tensor]) -> tuple[str, Tensor, Tensor] | None:
    """The data that a node takes, and its map per channel; None where it is no such map."""
    if not graph.is_own(node, *_OPERATORS) or len(node.input) != 2:
        return None
    constant = [name in graph.constants for name in node.input]
    if sum(constant) != 1 or (node.op_type == "Div" and constant[0]):
        return None
    source, other = (node.input[1], node.input[0]) if constant[0] else (node.input[0], node.input[1])
    value, result = values.get(source), values.get(node.output[0])
    if value is None or result is None or value.shape != result.shape or value.dim() < 2 or value.dtype not in _TYPES:
        return None
    vector = _per_channel(graph.tensor(other), value)
    maker = graph.makers.get(source)
    if vector is None or (node.op_type == "Add" and maker is not None and graph.is_own(maker, "MatMul")):
        return None  # the Add behind a MatMul is its bias, which folding knows
    one, zero = torch.ones_like(vector), torch.zeros_like(vector)
    if node.op_type == "Mul":
        return source, vector, zero
    if node.op_type == "Div":
        return (source, 1 / vector, zero) if bool((vector != 0).all()) else None
    if node.op_type == "Add":
        return source, one, vector
    return (source, -one, vector) if constant[0] else (source, one, -vector)


def _per_channel(constant: Tensor | None, value: Tensor) -> Tensor | None:
    """A constant that has one value a channel, the second axis, as (C,) in float64."""
    channels = value.shape[1]
    if constant is None or constant.dim() > value.dim() or constant.dtype != value.dtype:
        return None
    shape = (*(1,) * (value.dim() - constant.dim()), *constant.shape)
    if any(size != 1 for axis, size in enumerate(shape) if axis != 1) or shape[1] not in (1, channels):
        return None
    return constant.reshape(-1).double().expand(channels)


def with_norms(model: Any, wanted: Sequence[Chain], labels: Collection[str], values: dict[str, Tensor]) -> None:
    """Puts a BatchNormalization in the place of each chain whose label is asked for, in the model."""
    graph = OnnxGraph(model)
    helper, numpy_helper = graph.onnx.helper, graph.onnx.numpy_helper
    for chain in wanted:
        if chain.label not in labels:
            continue
        kind = values[chain.source].dtype
        zeros = torch.zeros_like(chain.scale)
        names = []
        parts = {"scale": chain.scale, "bias": chain.shift, "mean": zeros, "var": zeros + 1}
        for part, vector in parts.items():
            name = graph.fresh(f"{chain.label}.{part}")
            model.graph.initializer.append(numpy_helper.from_array(vector.to(kind).numpy(), name))
            graph.refresh()
            names.append(name)
        node = helper.make_node(
            "BatchNormalization", [chain.source, *names], [chain.output], name=chain.label, epsilon=0.0
        )
        outputs = {each.output[0] for each in chain.nodes}
        kept = [each for each in model.graph.node if each.output[0] not in outputs]
        at = next(i for i, each in enumerate(model.graph.node) if each.output[0] == chain.output)
        before = sum(each.output[0] not in outputs for each in list(model.graph.node)[:at])
        kept.insert(before, node)
        del model.graph.node[:]
        model.graph.node.extend(kept)
        graph.refresh()
