"""An ONNX graph: its constants, who makes and who uses each value, and the edits that folding makes."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchnorm.errors import MissingDependencyError

IN_MEMORY = 2**31 - 2**20  # bytes of a protobuf; what is larger has its weights in a file of their own
DOMAINS = ("", "ai.onnx")  # two spellings of ONNX's own operators
_OF_CONSTANTS = {  # operators that exporters leave between a constant and the layer that reads it
    *("Cast", "Concat", "Constant", "ConstantOfShape", "Expand", "Identity"),
    *("Reshape", "Shape", "Squeeze", "Transpose", "Unsqueeze"),
}
_CONSTANTS_ARE_INPUTS = 4  # before this version of the format every initializer was also listed as an input


def needed(package: str) -> Any:
    """An optional package, or a ``MissingDependencyError`` that names the extra."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingDependencyError(f"{package} is not installed: pip install 'batchnorm[export]'") from error


class OnnxGraph:
    """The main graph of an ``onnx.ModelProto``; editing it edits the model.

    Attributes:
        makers: the node that makes each value.
        uses: how often each value is read, by subgraphs and as an output of the model too.
        constants: the tensors of values that no caller can change, by name.
    """

    def __init__(self, model: Any) -> None:
        self.onnx = needed("onnx")
        self.model, self.graph = model, model.graph
        self._computed: dict[str, Any] = {}
        self.opset = next((o.version for o in model.opset_import if o.domain in DOMAINS), 1)
        self.refresh()

    def refresh(self) -> None:
        self.makers = {name: node for node in self.graph.node for name in node.output if name}
        self.uses = Counter(name for node in self.graph.node for name in used(node))
        self.uses.update(self.outputs)
        settable = set() if self.constants_are_inputs else {value.name for value in self.graph.input}
        self.initializers = {t.name: t for t in self.graph.initializer}
        self.constants = {name: t for name, t in self.initializers.items() if name not in settable}
        for node in self.graph.node:
            if node.op_type == "CastLike" and node.input[0] in self.constants:  # values are compared in float64
                self.constants[node.output[0]] = self.constants[node.input[0]]
            elif self.is_own(node, *_OF_CONSTANTS) and all(name in self.constants for name in node.input):
                self.constants[node.output[0]] = self._evaluated(node)

    @property
    def constants_are_inputs(self) -> bool:
        return bool(self.model.ir_version < _CONSTANTS_ARE_INPUTS)

    @property
    def inputs(self) -> list[Any]:
        """The inputs that a caller has to give."""
        return [value for value in self.graph.input if value.name not in self.initializers]

    @property
    def outputs(self) -> list[str]:
        return [value.name for value in self.graph.output]

    def is_own(self, node: Any, *kinds: str) -> bool:
        """Whether a node is one of these operators of ONNX's own."""
        return node.op_type in kinds and node.domain in DOMAINS

    def attributes(self, node: Any) -> dict[str, Any]:
        return {a.name: self.onnx.helper.get_attribute_value(a) for a in node.attribute}

    def tensor(self, name: str) -> Tensor | None:
        """A constant in its own dtype, or None."""
        constant = self.constants.get(name)
        if constant is None:
            return None
        array = self.onnx.numpy_helper.to_array(constant)
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16)
        return torch.from_numpy(np.array(array))

    def set_input(self, node: Any, index: int, value: Tensor, name: str) -> None:
        """Make a constant what a node reads at ``index``: under the old name if nothing else reads that."""
        old = node.input[index] if len(node.input) > index else ""
        if old in self.constants and old in self.initializers and self.uses[old] == 1:
            name = old
            self._forget(old)
        else:
            name = self.fresh(name)
        tensor = self._proto(value, name)
        self.graph.initializer.append(tensor)
        if self.constants_are_inputs:
            self.graph.input.append(self.onnx.helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
        node.input.extend([""] * (index + 1 - len(node.input)))
        node.input[index] = name
        self.refresh()

    def set_attribute(self, node: Any, name: str, value: Any) -> None:
        for attribute in [a for a in node.attribute if a.name == name]:
            node.attribute.remove(attribute)
        node.attribute.append(self.onnx.helper.make_attribute(name, value))

    def add_after(self, node: Any, constant: Tensor, label: str) -> None:
        """Add a constant to a node's output, which keeps its name."""
        output, between = node.output[0], self.fresh(f"{label}.product")
        node.output[0] = between
        added = self.onnx.helper.make_node("Add", [between, ""], [output], name=self.fresh(f"{label}.bias"))
        self.graph.node.insert(list(self.graph.node).index(node) + 1, added)
        self.set_input(self.graph.node[list(self.graph.node).index(node) + 1], 1, constant, f"{label}.bias")

    def remove(self, node: Any) -> None:
        """Take out a node that gives its first input on; what read the one value reads the other."""
        source, result = node.input[0], node.output[0]
        self.graph.node.remove(node)
        if result in self.outputs:
            maker = self.makers[source]
            maker.output[list(maker.output).index(source)] = result
            source, result = result, source
        _rename_uses(self.graph, result, source)
        for info in [v for v in self.graph.value_info if v.name == result]:
            self.graph.value_info.remove(info)
        self.refresh()

    def drop_unused(self, before: Counter[str]) -> None:
        """Remove constants that were read before and are not any more."""
        while True:
            idle = [
                n
                for n in self.graph.node
                if self.is_own(n, "CastLike", *_OF_CONSTANTS)
                and not any(self.uses[name] for name in n.output)
                and any(before[name] for name in n.output)
            ]
            for node in idle:
                self.graph.node.remove(node)
            for name in [t.name for t in self.graph.initializer if before[t.name] and not self.uses[t.name]]:
                self._forget(name)
            self.refresh()
            if not idle:
                return

    def fresh(self, name: str) -> str:
        """A name that nothing has."""
        taken = {*self.makers, *self.initializers, *self.uses, *(v.name for v in self.graph.input)}
        taken |= {node.name for node in self.graph.node} | set(inner_names(self.graph))
        candidate, number = name, 1
        while candidate in taken:
            number += 1
            candidate = f"{name}.{number}"
        return candidate

    def _forget(self, name: str) -> None:
        """Take out a constant, and the input that old versions of the format list it as."""
        self.graph.initializer.remove(self.initializers[name])
        for value in [v for v in self.graph.input if v.name == name and self.constants_are_inputs]:
            self.graph.input.remove(value)

    def _proto(self, value: Tensor, name: str) -> Any:
        if value.dtype == torch.bfloat16:
            wide = value.float().numpy()
            narrow = self.onnx.helper.tensor_dtype_to_np_dtype(self.onnx.TensorProto.BFLOAT16)
            return self.onnx.numpy_helper.from_array(wide.astype(narrow), name)
        return self.onnx.numpy_helper.from_array(value.contiguous().numpy(), name)

    def _evaluated(self, node: Any) -> Any:
        """The value of a node whose inputs are constants."""
        if node.output[0] in self._computed:
            return self._computed[node.output[0]]
        reference = importlib.import_module("onnx.reference")
        helper = self.onnx.helper
        output = helper.make_tensor_value_info(node.output[0], self.onnx.TensorProto.UNDEFINED, None)
        feed = {name: self.onnx.numpy_helper.to_array(self.constants[name]) for name in node.input}
        inputs = [helper.make_tensor_value_info(name, self.constants[name].data_type, None) for name in feed]
        graph = helper.make_graph([node], "constant", inputs, [output])
        model = helper.make_model(graph, opset_imports=self.model.opset_import)
        (value,) = reference.ReferenceEvaluator(model).run(None, feed)
        self._computed[node.output[0]] = self.onnx.numpy_helper.from_array(np.asarray(value), node.output[0])
        return self._computed[node.output[0]]


def used(node: Any) -> Iterator[str]:
    """The values that a node reads, those of its subgraphs too."""
    yield from (name for name in node.input if name)
    for graph in subgraphs(node):
        for inner in graph.node:
            yield from used(inner)
        yield from (output.name for output in graph.output)


def subgraphs(node: Any) -> Iterator[Any]:
    for attribute in node.attribute:
        yield from attribute.graphs
        if attribute.HasField("g"):
            yield attribute.g


def nested(graph: Any) -> Iterator[tuple[Any, Any]]:
    """The nodes inside a graph's subgraphs, each with the node of the graph that holds it."""
    for node in graph.node:
        for inside in subgraphs(node):
            yield from ((inner, node) for inner in inside.node)
            yield from ((inner, node) for inner, _ in nested(inside))


def inner_names(graph: Any) -> Iterator[str]:
    for inner, _ in nested(graph):
        yield from inner.output


def _rename_uses(graph: Any, old: str, new: str) -> None:
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == old:
                node.input[index] = new
        for inside in subgraphs(node):
            _rename_uses(inside, old, new)
    for output in graph.output:
        if output.name == old:
            output.name = new
