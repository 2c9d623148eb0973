"""An ONNX model in another floating-point type: what its outputs are without the rounding of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from batchnorm.surgery.onnx_graph import needed


def retyped(model: Any, old: str, new: str) -> Any:
    """A copy of the model with one element type, such as "FLOAT", in place of another, in branches and loops too.

    Constants are converted, and so are the types of inputs, outputs and values, what Cast makes, and attributes.
    """
    onnx = needed("onnx")
    source, target = onnx.TensorProto.DataType.Value(old), onnx.TensorProto.DataType.Value(new)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for graph in _graphs(copy.graph):
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.tensor_type.elem_type == source:
                value.type.tensor_type.elem_type = target
        for constant in graph.initializer:
            _convert(onnx, constant, source, target)
        for node in graph.node:
            _retype(onnx, node, source, target)
    return copy


def _retype(onnx: Any, node: Any, source: int, target: int) -> None:
    if node.op_type == "Constant":
        for attribute in node.attribute:
            if attribute.name in ("value_float", "value_floats"):  # which are FLOAT
                values = attribute.f if attribute.name == "value_float" else list(attribute.floats)
                tensor = onnx.numpy_helper.from_array(_numpy(onnx, source)(values))
                attribute.CopyFrom(onnx.helper.make_attribute("value", tensor))
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.TENSOR:
            _convert(onnx, attribute.t, source, target)
        if attribute.type == onnx.AttributeProto.INT and attribute.name in ("to", "dtype") and attribute.i == source:
            attribute.i = target
    if node.op_type == "ConstantOfShape" and not node.attribute and source == onnx.TensorProto.FLOAT:
        zero = onnx.numpy_helper.from_array(_numpy(onnx, target)([0]))
        node.attribute.append(onnx.helper.make_attribute("value", zero))


def _convert(onnx: Any, tensor: Any, source: int, target: int) -> None:
    if tensor.data_type == source:
        array = onnx.numpy_helper.to_array(tensor)
        made = onnx.numpy_helper.from_array(array.astype(onnx.helper.tensor_dtype_to_np_dtype(target)), tensor.name)
        tensor.CopyFrom(made)


def _numpy(onnx: Any, kind: int) -> Any:
    import numpy as np

    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind)
    return lambda values: np.asarray(values, dtype)


def _graphs(graph: Any) -> Iterator[Any]:
    """The graph, and those of its branches and loops."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)
            for inner in attribute.graphs:
                yield from _graphs(inner)
