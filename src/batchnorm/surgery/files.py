"""Folding in files: ONNX models and torch.export archives, by the same rules and with the same proof.

Only what stands right after its convolution, transposed convolution or linear layer is folded here.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from batchnorm.errors import InputError, MissingDependencyError, SurgeryError
from batchnorm.surgery.certificate import Certificate, Difference, Folded, Kept
from batchnorm.surgery.comparison import Example, distances
from batchnorm.surgery.folding import TOLERANCE
from batchnorm.surgery.graph import operation

_LIMIT = TOLERANCE[torch.float32]
_FOLDABLE = {  # operators of constants that exporters leave before a layer
    *("Cast", "Concat", "Constant", "ConstantOfShape", "Expand", "Identity"),
    *("Reshape", "Shape", "Squeeze", "Transpose", "Unsqueeze"),
}
_CONVOLUTIONS = {f"{kind}{n}d" for kind in ("conv", "conv_transpose") for n in (1, 2, 3)}


def fold_onnx(path: str | Path) -> tuple[Any, Certificate]:
    """Fold the ``BatchNormalization`` nodes of an ONNX file into the Conv, ConvTranspose and Gemm nodes before them.

    A node is kept, with the reason, unless its layer's output goes nowhere else (graph outputs and subgraphs
    included) and all parameters are constants. Computed in float64, rounded once, and compared in onnxruntime, its own
    optimizations off, on two random inputs.

    Returns:
        The folded ``onnx.ModelProto``, and the certificate.

    Raises:
        InputError: the file cannot be read.
        MissingDependencyError: onnx or onnxruntime is missing.
        SurgeryError: no batch normalization, or the outputs differ.
    """
    onnx = _needed("onnx")
    _needed("onnxruntime")
    try:
        model = onnx.load(str(path))
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf, the checker and the system have errors of their own
        raise InputError(f"{path}: it cannot be read as an ONNX model ({error})") from error
    original = onnx.ModelProto.FromString(model.SerializeToString())
    folded: list[Folded] = []
    kept: list[Kept] = []
    graph = _OnnxGraph(onnx, model)
    for node in [n for n in model.graph.node if n.op_type == "BatchNormalization" and not n.domain]:
        outcome = graph.fold(node)
        if isinstance(outcome, Folded):
            folded.append(outcome)
        else:
            kept.append(outcome)
    if not folded and not kept:
        raise SurgeryError(f"{path}: the model has no BatchNormalization")
    differences = []
    for seed in (1, 2):
        feed = _onnx_feed(onnx, model, seed)
        before, after = (_run_onnx(m, feed) for m in (original, model))
        differences += [
            Difference(f"random {seed}", "float32", d.output, d.absolute, d.relative, None, _LIMIT)
            for d in distances(before, after)
        ]
    _check(differences, str(path))
    return model, Certificate(tuple(folded), tuple(kept), tuple(differences), "onnx", _LIMIT)


class _OnnxGraph:
    """Nodes by the values that they make, how often each value is used, and the constants."""

    def __init__(self, onnx: Any, model: Any) -> None:
        self.onnx, self.graph, self.opsets = onnx, model.graph, model.opset_import
        self.refresh()

    def refresh(self) -> None:
        self.makers = {name: node for node in self.graph.node for name in node.output}
        self.uses = Counter(name for node in self.graph.node for name in _used(node))
        self.uses.update(output.name for output in self.graph.output)
        inputs = {value.name for value in self.graph.input}
        self.constants = {t.name: t for t in self.graph.initializer if t.name not in inputs}
        for node in self.graph.node:
            if node.op_type == "CastLike" and node.input[0] in self.constants:  # values are compared in float64
                self.constants[node.output[0]] = self.constants[node.input[0]]
            elif node.op_type in _FOLDABLE and not node.domain and all(name in self.constants for name in node.input):
                self.constants[node.output[0]] = self.evaluated(node)

    def evaluated(self, node: Any) -> Any:
        """The value of a node whose inputs are constants."""
        reference = importlib.import_module("onnx.reference")
        output = self.onnx.helper.make_tensor_value_info(node.output[0], self.onnx.TensorProto.UNDEFINED, None)
        graph = self.onnx.helper.make_graph([node], "constant", [], [output])
        feed = {name: self.onnx.numpy_helper.to_array(self.constants[name]) for name in node.input}
        graph.input.extend(self.onnx.helper.make_tensor_value_info(name, 1, None) for name in feed)
        model = self.onnx.helper.make_model(graph, opset_imports=self.opsets)
        (value,) = reference.ReferenceEvaluator(model).run(None, feed)
        return self.onnx.numpy_helper.from_array(np.asarray(value), node.output[0])

    def value(self, name: str) -> Any:
        """A constant as a float64 array, or None."""
        tensor = self.constants.get(name)
        return None if tensor is None else self.onnx.numpy_helper.to_array(tensor).astype(np.float64)

    def fold(self, norm: Any) -> Folded | Kept:
        label = norm.name or norm.output[0]
        layer: Any = self.makers.get(norm.input[0])
        reason = self.obstacle(norm, layer)
        if reason is not None:
            return Kept(label, reason)
        scale, shift = self.affine(norm)
        weight, old = self.value(layer.input[1]), self.bias(layer)
        attributes = {a.name: self.onnx.helper.get_attribute_value(a) for a in layer.attribute}
        weight = _scaled(layer.op_type, weight, scale, attributes)
        dtype = self.onnx.numpy_helper.to_array(self.constants[layer.input[1]]).dtype
        with np.errstate(over="ignore"):
            values = weight.astype(dtype), ((0 if old is None else old) * scale + shift).astype(dtype)
        if not all(np.isfinite(value).all() for value in values):
            return Kept(label, f"the folded weights would overflow {dtype}")
        for index, value in enumerate(values):
            name = f"{label}.folded.{'weight' if index == 0 else 'bias'}"
            self.graph.initializer.append(self.onnx.numpy_helper.from_array(value, name))
            if len(layer.input) > index + 1:
                layer.input[index + 1] = name
            else:
                layer.input.append(name)
        layer.output[0] = norm.output[0]
        self.graph.node.remove(norm)
        self.refresh()
        self.drop_unused()
        return Folded(label, layer.name or layer.output[0])

    def obstacle(self, norm: Any, layer: Any) -> str | None:
        attributes = {a.name: self.onnx.helper.get_attribute_value(a) for a in norm.attribute}
        if attributes.get("training_mode", 0) or len([o for o in norm.output if o]) > 1:
            return "it normalizes with the statistics of each batch"
        if attributes.get("spatial", 1) == 0:
            return "it normalizes every position by itself (spatial=0)"
        if any(self.value(name) is None for name in norm.input[1:5]):
            return "its parameters or statistics are computed, not constant"
        if layer is None:
            return "its input comes from the model's input"
        if layer.op_type not in ("Conv", "ConvTranspose", "Gemm") or layer.domain:
            return f"its input comes from a {layer.op_type}"
        if self.uses[norm.input[0]] > 1:
            return f"the output of '{layer.name}' also goes elsewhere"
        if self.value(layer.input[1]) is None:
            return f"the weight of '{layer.name}' is computed, not constant"
        if len(layer.input) > 2 and layer.input[2] and self.value(layer.input[2]) is None:
            return f"the bias of '{layer.name}' is computed, not constant"
        factors = {a.name: self.onnx.helper.get_attribute_value(a) for a in layer.attribute}
        if layer.op_type == "Gemm" and (factors.get("alpha", 1.0), factors.get("beta", 1.0)) != (1.0, 1.0):
            return f"'{layer.name}' has factors of its own"
        bias = self.bias(layer)
        if bias is not None and bias.ndim > 1 and bias.shape[0] != 1:
            return f"the bias of '{layer.name}' differs between samples"
        if not all(np.isfinite(x).all() for x in self.affine(norm)):
            return "its statistics or parameters are not finite, or var + epsilon is negative"
        return None

    def bias(self, layer: Any) -> Any:
        value = self.value(layer.input[2]) if len(layer.input) > 2 and layer.input[2] else None
        return None if value is None else value.reshape(-1) if value.ndim > 1 else value

    def affine(self, norm: Any) -> tuple[Any, Any]:
        gamma, beta, mean, var = (self.value(name) for name in norm.input[1:5])
        eps = next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5)
        with np.errstate(invalid="ignore", divide="ignore"):
            scale = gamma / np.sqrt(var + eps)
        return scale, beta - mean * scale

    def drop_unused(self) -> None:
        for tensor in [t for t in self.graph.initializer if not self.uses[t.name]]:
            self.graph.initializer.remove(tensor)


def _used(node: Any) -> Iterator[str]:
    """The values that a node reads, those of its subgraphs too."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
            for inner in graph.node:
                yield from _used(inner)
            yield from (output.name for output in graph.output)


def _scaled(kind: str, weight: Any, scale: Any, attributes: dict[str, Any]) -> Any:
    if kind == "Gemm":
        return weight * (scale[:, None] if attributes.get("transB", 0) else scale)
    ones = [1] * (weight.ndim - 2)
    if kind == "Conv":
        return weight * scale.reshape(-1, 1, *ones)
    groups = attributes.get("group", 1)
    grouped = weight.reshape(groups, -1, *weight.shape[1:]) * scale.reshape(groups, 1, -1, *ones)
    return grouped.reshape(weight.shape)


def _onnx_feed(onnx: Any, model: Any, seed: int) -> dict[str, Any]:
    """Normal values for every input; a dimension without a size is 2."""
    generator = np.random.default_rng(seed)
    constants = {t.name for t in model.graph.initializer}
    feed = {}
    for value in model.graph.input:
        if value.name in constants:
            continue
        kind = value.type.tensor_type
        shape = [d.dim_value or 2 for d in kind.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        feed[value.name] = generator.standard_normal(shape).astype(dtype)
    return feed


def _run_onnx(model: Any, feed: dict[str, Any]) -> list[Tensor]:
    runtime = _needed("onnxruntime")
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    try:
        session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return [torch.from_numpy(np.asarray(value)) for value in session.run(None, feed)]
    except Exception as error:  # onnxruntime's errors have no common public base
        raise SurgeryError(
            f"onnxruntime cannot run the model on random inputs, so nothing can be proven: {error}"
        ) from (error)


def fold_archive(path: str | Path) -> tuple[torch.export.ExportedProgram, Certificate]:
    """Fold ``batch_norm`` in a torch.export archive (.pt2) into the convolution or linear layer before it.

    Dynamic shapes stay. The archive's own example input is what the result is compared on.

    Raises:
        InputError: the file cannot be read, or holds no example.
        SurgeryError: no batch normalization, or the outputs differ.
    """
    try:
        program = torch.export.load(str(path))
    except Exception as error:  # zip, json and schema errors
        raise InputError(f"{path}: it cannot be read as a torch.export archive ({error})") from error
    if program.example_inputs is None:
        raise InputError(f"{path}: the archive holds no example input to compare on; export it again with one")
    args, kwargs = program.example_inputs
    examples = {"example": Example(tuple(args), dict(kwargs))}
    examples |= {f"random {seed}": examples["example"].randomized(seed) for seed in (1, 2)}
    before = {name: given.run(program.module()) for name, given in examples.items()}
    outcomes = [_fold_call(program, n) for n in list(program.graph.nodes) if operation(n) == "batch_norm"]
    if not outcomes:
        raise SurgeryError(f"{path}: the program has no batch_norm (decomposed programs have none left)")
    program.graph.lint()
    program.graph_module.recompile()
    differences = [
        Difference(name, "float32", d.output, d.absolute, d.relative, None, _LIMIT)
        for name, given in examples.items()
        for d in distances(before[name], given.run(program.module()))
    ]
    _check(differences, str(path))
    folded = tuple(item for item in outcomes if isinstance(item, Folded))
    kept = tuple(item for item in outcomes if isinstance(item, Kept))
    return program, Certificate(folded, kept, tuple(differences), "torch.export", _LIMIT)


def _fold_call(program: torch.export.ExportedProgram, norm: fx.Node) -> Folded | Kept:
    """Fold one aten.batch_norm(x, weight, bias, mean, var, training, momentum, eps, cudnn)."""
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    state = program.state_dict
    layer = norm.args[0]
    label = next((names[n.name] for n in norm.all_input_nodes if n.name in names), norm.name).rpartition(".")[0]
    if norm.args[5]:
        return Kept(label, "it normalizes with the statistics of each batch")
    if not isinstance(layer, fx.Node) or operation(layer) not in {*_CONVOLUTIONS, "linear"}:
        return Kept(label, f"its input comes from a call of {operation(layer)}")  # type: ignore[arg-type]
    if len(layer.users) > 1:
        return Kept(label, "the output of the layer before also goes elsewhere")
    value = layer.meta["val"]
    if operation(layer) == "linear" and value.dim() != 2:
        return Kept(label, f"it normalizes axis 1 of a tensor with {value.dim()} axes")
    tensors = [*norm.args[1:5], layer.args[1], layer.args[2] if len(layer.args) > 2 else None]
    for node in tensors:
        if isinstance(node, fx.Node) and (names.get(node.name) not in state or len(node.users) > 1):
            return Kept(label, "parameters or statistics are computed, or used elsewhere")
    gamma, beta, mean, var, weight, bias = (None if n is None else state[names[n.name]].double() for n in tensors)  # type: ignore[union-attr]
    if mean is None or var is None or weight is None:
        return Kept(label, "it has no statistics")
    scale = (var + norm.args[7]).rsqrt() * (1 if gamma is None else gamma)
    shift = (0 if beta is None else beta) - mean * scale
    groups = layer.args[6] if "transpose" in operation(layer) and len(layer.args) > 6 else 1
    new = _scaled("ConvTranspose" if "transpose" in operation(layer) else "Conv", weight, scale, {"group": groups})
    added = (0 if bias is None else bias) * scale + shift
    holder = tensors[5] or tensors[1] or tensors[2]  # the layer's bias, or a tensor of the norm that is free now
    assert isinstance(holder, fx.Node)
    for node, value in ((tensors[4], new), (holder, added)):
        assert isinstance(node, fx.Node)
        old = state[names[node.name]]
        with torch.no_grad():
            old.copy_(value)
        if not bool(old.isfinite().all()):
            raise SurgeryError(f"the folded weights of '{names[node.name]}' would overflow {old.dtype}")
    norm.target, norm.kwargs = layer.target, layer.kwargs  # under the norm's name, which an output may have
    norm.args = (*layer.args[:2], holder, *layer.args[3:])
    program.graph.erase_node(layer)
    return Folded(label, names[tensors[4].name].rpartition(".")[0])  # type: ignore[union-attr]


def _check(differences: list[Difference], path: str) -> None:
    for d in differences:
        if not d.passed:
            raise SurgeryError(
                f"{path}: {d.output} of the folded network differs by {d.relative:.1e} of its largest value on the "
                f"{d.inputs} input (accepted {d.tolerance:.0e}); nothing was written"
            )


def _needed(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingDependencyError(f"{package} is not installed: pip install 'batchnorm[export]'") from error
