"""An ONNX graph read as the data flow of torch modules, so that one set of folding rules serves both."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from batchnorm.surgery.absorption import Weights
from batchnorm.surgery.flow import DataFlow
from batchnorm.surgery.onnx_graph import OnnxGraph, used

# No class that folding knows how to give a padding value: an ONNX Conv pads with zeros.
_CONV: dict[tuple[str, int], type[nn.Module]] = {
    (kind, dims): type(f"{kind}{dims}d", (getattr(nn, f"{kind}{dims}d"),), {})
    for kind in ("Conv", "ConvTranspose")
    for dims in (1, 2, 3)
}
_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_POOLS = {"AveragePool": "avg_pool", "MaxPool": "max_pool"}
_GLOBAL_POOLS = {"GlobalAveragePool": "adaptive_avg_pool", "GlobalMaxPool": "adaptive_max_pool"}
_RESHAPES = ("Flatten", "Reshape", "Squeeze", "Unsqueeze")


class _Net(nn.Module):
    """Modules under the names of nodes, whatever characters those have."""

    def get_submodule(self, target: str) -> nn.Module:
        module = self._modules[target]
        assert module is not None
        return module


class OnnxFlow(DataFlow):
    """The graph with Conv, Gemm, MatMul and BatchNormalization as modules, and all else as calls.

    Shapes are those of one run. An operator that the rules of folding need not know keeps its ONNX name, which they
    refuse.

    Attributes:
        owners: the nodes of each module: its own, and the Add of its bias if that is another.
        reasons: why a BatchNormalization is no module, by label.
        labels: the label of each BatchNormalization, by its output.
    """

    def __init__(self, onnx: OnnxGraph, values: dict[str, Tensor]) -> None:
        self.onnx, self.values = onnx, values
        self.owners: dict[str, list[Any]] = {}
        self.reasons: dict[str, str] = {}
        self.labels: dict[str, str] = {}
        self.made: dict[str, fx.Node] = {}
        self.operators: dict[fx.Node, str] = {}
        self.network = _Net()
        self.calls_made = fx.Graph()
        for value in onnx.inputs:
            self._set(value.name, self.calls_made.placeholder(f"x{len(self.made)}"))
        biases = {add.output[0]: node for node, add in self._biased()}
        later = {node.output[0] for node in biases.values()}
        for node in onnx.graph.node:
            if node.output[0] in later or all(name in onnx.constants for name in node.output if name):
                continue
            self._read(biases.get(node.output[0], node), node if node.output[0] in biases else None)
        self.calls_made.output([self.made[name] for name in onnx.outputs if name in self.made])
        super().__init__(self.calls_made, self.network, "onnx")

    def describe(self, node: fx.Node) -> str:
        return f"a call of {self.operators[node]}" if node in self.operators else super().describe(node)

    def _read(self, node: Any, add: Any) -> None:
        call = None
        if self.onnx.is_own(node, "BatchNormalization"):
            call = self._norm(node)
        elif self.onnx.is_own(node, *_LAYERS[:2]):
            call = self._convolution(node)
        elif self.onnx.is_own(node, *_LAYERS[2:]):
            call = self._linear(node, add)
        elif self.onnx.is_own(node, node.op_type):
            call = self._known(node)
        if call is not None:
            self._set((add or node).output[0], call)
            if call.op == "call_function":
                self.operators[call] = node.op_type
            return
        computed = self.onnx.is_own(node, *_LAYERS) and not set(node.input[1:]) <= self.onnx.constants.keys()
        makers = [self.onnx.makers.get(name) for name in node.input[1:]]
        quantized = any(maker is not None and maker.op_type == "DequantizeLinear" for maker in makers)
        how = "quantized: fold before you quantize" if quantized else "computed, or an input that callers may set"
        what = f" ('{self._label(node)}', whose weight or bias is {how})"
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            what, computed = " (fold before you quantize)", True
        self._opaque(node, f"{node.op_type}{what if computed else ''}")

    def _set(self, name: str, call: fx.Node) -> None:
        call.meta["val"] = self.values.get(name)
        self.made[name] = call

    def _call(self, function: Callable[..., Any], node: Any, *args: Any) -> fx.Node | None:
        """A call of a torch function on a node's first input; None where that is a constant."""
        source = self.made.get(node.input[0])
        return None if source is None else self.calls_made.call_function(function, (source, *args))

    def _opaque(self, node: Any, what: str) -> None:
        sources = [self.made[name] for name in dict.fromkeys(used(node)) if name in self.made]
        call = self.calls_made.call_function(_named(what), tuple(sources))
        if len(node.output) == 1:
            self._set(node.output[0], call)
            return
        call.meta["val"] = tuple(self.values.get(name) for name in node.output)
        self._parts(node, call)

    def _parts(self, node: Any, call: fx.Node) -> None:
        for index, name in enumerate(node.output):
            if name:
                self._set(name, self.calls_made.call_function(operator.getitem, (call, index)))

    def _module(self, node: Any, module: nn.Module, source: fx.Node, *more: Any) -> fx.Node:
        label = self._label(node)
        self.network._modules[label] = module.eval()
        self.owners[label] = [node, *more]
        return self.calls_made.call_module(f"net.{label}", (source,))

    def _label(self, node: Any) -> str:
        name = node.name or node.output[0]
        return name if name not in self.network._modules and name not in self.reasons else f"{name} ({node.output[0]})"

    def _norm(self, node: Any) -> fx.Node | None:
        source = self.made.get(node.input[0])
        reason = self._unfoldable(node)
        if reason is not None or source is None:
            self.labels[node.output[0]] = label = self._label(node)
            self.reasons[label] = reason or "its input is a constant"
            return None
        gamma, beta, mean, var = (self.onnx.tensor(name) for name in node.input[1:5])
        assert isinstance(gamma, Tensor)
        layer = nn.BatchNorm2d(len(gamma), self.onnx.attributes(node).get("epsilon", 1e-5), device="meta")
        layer.weight, layer.bias = (nn.Parameter(t, requires_grad=False) for t in (gamma, beta))  # type: ignore[arg-type]
        layer.running_mean, layer.running_var = mean, var
        call = self._module(node, layer, source)
        self.labels[node.output[0]] = str(call.target).removeprefix("net.")
        return call

    def _unfoldable(self, node: Any) -> str | None:
        attributes = self.onnx.attributes(node)
        batch = "it normalizes with the statistics of each batch"
        if self.onnx.opset < 7 and not attributes.get("is_test", 0):
            return batch
        if attributes.get("training_mode", 0) or len([name for name in node.output if name]) > 1:
            return batch
        if attributes.get("spatial", 1) == 0:
            return "it normalizes every position by itself (spatial=0)"
        if any(name not in self.onnx.constants for name in node.input[1:5]):
            return "its parameters or statistics are computed, or inputs that callers may set, not constants"
        return None

    def _layer(self, node: Any, module: nn.Module, *more: Any) -> fx.Node | None:
        return self._module(node, module, self.made[node.input[0]], *more)

    def _convolution(self, node: Any) -> fx.Node | None:
        read = self._constants(node)
        if read is None or node.input[0] not in self.made:
            return None
        weight, bias = read
        dims, given = weight.dim() - 2, self.onnx.attributes(node)
        kind = _CONV.get((node.op_type, dims))
        if kind is None:
            return None
        groups = given.get("group", 1)
        transposed = node.op_type == "ConvTranspose"
        channels = (
            (weight.shape[0], weight.shape[1] * groups) if transposed else (weight.shape[1] * groups, len(weight))
        )
        automatic = given.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID")
        padded = any(given.get("pads", ())) or (automatic and max(weight.shape[2:]) > 1)
        changed = any(given.get("output_padding", ())) or "output_shape" in given
        options = {"padding": int(padded or changed), "stride": tuple(given.get("strides", [1] * dims))}
        if transposed and changed:
            options["stride"] = 2  # more places than a plain one has: none of them may be shifted
        layer: Any = kind(*channels, tuple(weight.shape[2:]), groups=groups, device="meta", **options)
        return self._layer(node, _filled(layer, weight, bias))

    def _linear(self, node: Any, add: Any) -> fx.Node | None:
        read = self._constants(node)
        source = self.made.get(node.input[0])
        if read is None or source is None or read[0].dim() != 2:
            return None
        weight, bias = read
        given = self.onnx.attributes(node)
        if node.op_type == "MatMul":
            weight = weight.T
            bias = None if add is None else _vector(self.onnx.tensor(_constant_input(self.onnx, add)), len(weight))
        else:
            weight = (weight if given.get("transB", 0) else weight.T) * given.get("alpha", 1.0)
            bias = None if bias is None else _vector(bias, len(weight))
            if bias is None and len(node.input) > 2 and node.input[2]:
                return None
            bias = None if bias is None else bias * given.get("beta", 1.0)
        if given.get("transA", 0):
            value, source = source.meta["val"], self.calls_made.call_function(torch.permute, (source, (1, 0)))
            source.meta["val"] = None if value is None else value.T
        layer = nn.Linear(weight.shape[1], len(weight), device="meta")
        return self._module(node, _filled(layer, weight, bias), source, *([] if add is None else [add]))

    def _constants(self, node: Any) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias of a layer on data; None where they are no constants of floating point."""
        weight = self.onnx.tensor(node.input[1])
        biased = len(node.input) > 2 and node.input[2]
        bias = self.onnx.tensor(node.input[2]) if biased else None
        if weight is None or (biased and bias is None) or node.input[0] in self.onnx.constants:
            return None
        return (weight, bias) if weight.is_floating_point() and weight.dim() > 1 else None

    def _biased(self) -> Iterable[tuple[Any, Any]]:
        """Each MatMul by a constant whose output goes only into the Add of a constant vector, and that Add."""
        for add in self.onnx.graph.node:
            if not self.onnx.is_own(add, "Add"):
                continue
            name = _constant_input(self.onnx, add)
            others = [other for other in add.input if other != name]
            product = self.onnx.makers.get(others[0]) if name and len(others) == 1 else None
            if product is None or not self.onnx.is_own(product, "MatMul") or self.onnx.uses[others[0]] != 1:
                continue
            read, before, after = self._constants(product), self.values.get(others[0]), self.values.get(add.output[0])
            if read is None or read[0].dim() != 2 or before is None or after is None or before.shape != after.shape:
                continue
            if _vector(self.onnx.tensor(name), read[0].shape[1]) is not None:
                yield product, add

    def _known(self, node: Any) -> fx.Node | None:
        """The torch function that does the same with channels, None where there is none."""
        given, value = self.onnx.attributes(node), self.values.get(node.input[0]) if node.input else None
        result = self.values.get(node.output[0])
        if value is None or result is None:
            return None
        if node.op_type == "Identity":
            return self._call(torch.clone, node)
        if node.op_type in ("Shape", "Size"):
            return self._call(torch.Tensor.size, node)
        if node.op_type == "Dropout":
            return None if self._drops(node, given) else self._call(torch.clone, node)
        if node.op_type in _RESHAPES:
            return self._call(torch.reshape, node, tuple(result.shape))
        if node.op_type == "Transpose":
            return self._call(torch.permute, node, tuple(given.get("perm", range(value.dim())[::-1])))
        if node.op_type == "Concat" and all(name in self.made for name in node.input):
            return self.calls_made.call_function(torch.cat, ([self.made[n] for n in node.input], given["axis"]))
        if node.op_type == "Split":
            return self._split(node, given)
        if node.op_type == "ReduceMean":
            return self._mean(node, given, value, result)
        if node.op_type == "Resize":
            return self._resize(node, given, value, result)
        return self._pool(node, given, value)

    def _drops(self, node: Any, given: dict[str, Any]) -> bool:
        if self.onnx.opset < 7:
            return not given.get("is_test", 0)
        if len([name for name in node.output if name]) > 1:
            return True
        flag = node.input[2] if len(node.input) > 2 else ""
        training = self.onnx.tensor(flag) if flag else torch.tensor(False)
        return training is None or bool(training.any())

    def _split(self, node: Any, given: dict[str, Any]) -> fx.Node | None:
        axis = given.get("axis", 0)
        sizes = [self.values[name].shape[axis] for name in node.output if name in self.values]
        call = self._call(torch.split, node, sizes, axis) if len(sizes) == len(node.output) else None
        if call is None:
            return None
        call.meta["val"] = tuple(self.values[name] for name in node.output)
        self._parts(node, call)
        return self.made[node.output[0]]

    def _mean(self, node: Any, given: dict[str, Any], value: Tensor, result: Tensor) -> fx.Node | None:
        axes = given.get("axes")
        if len(node.input) > 1 and node.input[1]:
            constant = self.onnx.tensor(node.input[1])
            axes = None if constant is None else constant.tolist()
        if not axes:
            return None
        return self._call(torch.mean, node, [axis % value.dim() for axis in axes], bool(given.get("keepdims", 1)))

    def _resize(self, node: Any, given: dict[str, Any], value: Tensor, result: Tensor) -> fx.Node | None:
        """Weights that sum to one at every place: nearest and linear without extrapolation, channels as they are."""
        plain = given.get("mode", b"nearest") in (b"nearest", b"linear")
        plain = plain and given.get("coordinate_transformation_mode", b"half_pixel") != b"tf_crop_and_resize"
        if not plain or "axes" in given or value.shape[:2] != result.shape[:2]:
            return None
        return self._call(F.interpolate, node)

    def _pool(self, node: Any, given: dict[str, Any], value: Tensor) -> fx.Node | None:
        dims = value.dim() - 2
        if dims not in (1, 2, 3):
            return None
        if node.op_type in _GLOBAL_POOLS:
            return self._call(_named(f"{_GLOBAL_POOLS[node.op_type]}{dims}d"), node, 1)
        if node.op_type not in _POOLS or len([name for name in node.output if name]) > 1:
            return None
        average = node.op_type == "AveragePool"
        if average and given.get("ceil_mode", 0):
            return None  # what a window over the edge is divided by differs between versions
        automatic = given.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID")
        padding = int(automatic or any(given.get("pads", ())))
        tail = (False, bool(given.get("count_include_pad", 0))) if average else ()
        function = _named(f"{_POOLS[node.op_type]}{dims}d")
        return self._call(function, node, given["kernel_shape"], 1, padding, *tail)

    def write(self, label: str, new: Weights) -> None:
        """Give the layer behind a label these parameters."""
        node, *more = self.owners[label]
        layer: Any = self.network._modules[label]
        weight = new.weight.to(layer.weight.dtype)
        bias = None if new.bias is None else new.bias.to(layer.weight.dtype)
        if node.op_type == "MatMul" or (node.op_type == "Gemm" and not self.onnx.attributes(node).get("transB", 0)):
            weight = weight.T
        self.onnx.set_input(node, 1, weight, f"{label}.weight")
        if node.op_type == "Gemm":
            for name in {"alpha", "beta"} & self.onnx.attributes(node).keys():
                self.onnx.set_attribute(node, name, 1.0)
        if bias is None:
            return
        if node.op_type != "MatMul":
            self.onnx.set_input(node, 2, bias, f"{label}.bias")
        elif more:
            at = list(more[0].input).index(_constant_input(self.onnx, more[0]))
            self.onnx.set_input(more[0], at, bias, f"{label}.bias")
        else:
            self.onnx.add_after(node, bias, label)

    def write_line(self, label: str, scale: Tensor, shift: Tensor) -> None:
        """Make a BatchNormalization that stays ``scale * x + shift``."""
        (node,) = self.owners[label]
        layer: Any = self.network._modules[label]
        values = (scale, shift, torch.zeros_like(scale), torch.ones_like(scale))
        for index, (name, value) in enumerate(zip(("scale", "bias", "mean", "var"), values, strict=True), 1):
            old = layer.weight if index < 3 else layer.running_var
            self.onnx.set_input(node, index, value.to(old.dtype), f"{label}.{name}")
        self.onnx.set_attribute(node, "epsilon", 0.0)


def _constant_input(onnx: OnnxGraph, add: Any) -> str:
    return next((name for name in add.input if name in onnx.constants), "")


def _vector(constant: Tensor | None, size: int) -> Tensor | None:
    """A bias that is the same at all places as (size,), None where it is not."""
    if constant is None or any(n != 1 for n in constant.shape[:-1]) or constant.numel() not in (1, size):
        return None
    return constant.reshape(-1).expand(size)


def _filled(layer: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return layer  # type: ignore[no-any-return]


def _named(name: str) -> Callable[..., Any]:
    """A function that a graph can call and errors can name; nothing runs it."""

    def call(*args: Any) -> Any:
        raise NotImplementedError(name)

    call.__name__ = name
    return call
