"""Running ONNX models: inputs of the sizes that they take, and every value on them."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchnorm.errors import InputError, SurgeryError
from batchnorm.surgery.comparison import Example
from batchnorm.surgery.onnx_graph import IN_MEMORY, OnnxGraph, needed
from batchnorm.surgery.onnx_precision import retyped

_BATCH = 2  # what a free first dimension is, and
_FREE = (8, 32, 64, 224, 2, 1)  # what other free dimensions are, the first that the model takes


class Runner:
    """A model in onnxruntime with its optimizations off, or in the reference evaluator where that lacks kernels.

    Args:
        model: an ``onnx.ModelProto``.
        every: whether to give all values, and not only the outputs.
    """

    def __init__(self, model: Any, every: bool = False) -> None:
        self.onnx, runtime = needed("onnx"), needed("onnxruntime")
        self.names = list(dict.fromkeys(_values(OnnxGraph(model)))) if every else [v.name for v in model.graph.output]
        options = runtime.SessionOptions()
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads, options.log_severity_level = 1, 4
        declared = list(model.graph.output)
        known = {value.name for value in declared}
        model.graph.output.extend(self.onnx.ValueInfoProto(name=name) for name in self.names if name not in known)
        self.session: Any = None
        self.narrowed = False  # whether a model of float64 runs in float32, for want of an evaluator
        self._narrow: Callable[[], Any] | None = None
        try:
            self.session = _session(self.onnx, runtime, model, options)
        except Exception as error:  # onnxruntime's errors have no common public base
            self.reason = str(error)
            reference = importlib.import_module("onnx.reference")
            copy = self.onnx.ModelProto.FromString(model.SerializeToString())
            self._narrow = lambda: _session(self.onnx, runtime, retyped(copy, "DOUBLE", "FLOAT"), options)
            try:
                self.session = reference.ReferenceEvaluator(copy)
            except Exception as second:
                raise SurgeryError(
                    f"neither onnxruntime nor onnx's own evaluator takes the model, so nothing can be proven: {error}"
                ) from second
        finally:
            del model.graph.output[:]
            model.graph.output.extend(declared)

    @property
    def method(self) -> str:
        if self.narrowed:
            return "onnxruntime in float32"
        return "onnxruntime" if type(self.session).__module__.startswith("onnxruntime") else "onnx.reference"

    def __call__(self, example: Example) -> dict[str, Any]:
        try:
            return self._run(example)
        except Exception as error:  # of the evaluator: some operators are wrong or missing there in float64
            doubles = any(isinstance(v, Tensor) and v.dtype == torch.float64 for v in example.kwargs.values())
            if self._narrow is None or self.narrowed or not doubles:
                raise
            try:
                self.session = self._narrow()
            except Exception as second:
                raise SurgeryError(
                    f"onnxruntime does not take the model ({self.reason}), and {self.method} fails on it: {error}"
                ) from second
            self.narrowed = True
            return self._run(example)

    def _run(self, example: Example) -> dict[str, Any]:
        feed = {name: _array(self.onnx, value) for name, value in example.kwargs.items()}
        if self.narrowed:
            feed = {name: v.astype(np.float32) if v.dtype == np.float64 else v for name, v in feed.items()}
        found = dict(zip(self.names, map(_tensors, self.session.run(self.names, feed)), strict=True))
        return {name: _widened(value) for name, value in found.items()} if self.narrowed else found


def examples(model: Any, runner: Runner, given: dict[str, Any] | None) -> dict[str, Example]:
    """Inputs that the model takes: those given, and random ones, where none are given of two batch sizes.

    Raises:
        InputError: the given ones have other names than the model's inputs.
        SurgeryError: the model runs on none of the sizes that were tried.
    """
    graph = OnnxGraph(model)
    if given is not None:
        expected = [value.name for value in graph.inputs]
        if sorted(given) != sorted(expected):
            raise InputError(f"the inputs are named {', '.join(sorted(given))}; the model takes {', '.join(expected)}")
        first = Example((), {name: torch.as_tensor(np.asarray(value)) for name, value in given.items()})
        try:
            runner(first)
        except Exception as error:
            raise InputError(f"the model fails on the given inputs ({first.describe()}): {error}") from error
        return {"example": first, **{f"random {seed}": first.randomized(seed) for seed in (1, 2)}}
    failure: Exception | None = None
    for size in _FREE:
        try:
            first = _random(graph, _BATCH, size, 1)
            runner(first)
        except InputError:
            raise
        except Exception as error:
            failure = failure or error
            continue
        second = next((e for e in _others(graph, size) if _runs(runner, e)), _random(graph, _BATCH, size, 2))
        return {"random 1": first, "random 2": second}
    text = str(failure).strip().splitlines()[0]
    raise SurgeryError(
        f"the model fails on random inputs, so nothing can be proven; give inputs that it takes: {text}"
    ) from failure


def _others(graph: OnnxGraph, size: int) -> Iterator[Example]:
    """Inputs of other sizes than the first ones, so that no edit rests on two sizes being equal by chance."""
    yield _random(graph, _BATCH + 1, 2 * size, 2)
    yield _random(graph, _BATCH + 1, size, 2)


def _runs(runner: Runner, example: Example) -> bool:
    try:
        runner(example)
    except Exception:
        return False
    return True


def _random(graph: OnnxGraph, batch: int, size: int, seed: int) -> Example:
    """Normal values, 0 and 1 for integers; dimensions of one name have one size."""
    generator = np.random.default_rng(seed)
    feed: dict[str, Tensor] = {}
    named: dict[str, int] = {}
    for value in graph.inputs:
        if not value.type.HasField("tensor_type"):
            raise InputError(f"the input '{value.name}' is no tensor; give inputs")
        dims = value.type.tensor_type.shape.dim
        shape = []
        for axis, dim in enumerate(dims):
            free = batch if axis == 0 else size
            shape.append(dim.dim_value or (named.setdefault(dim.dim_param, free) if dim.dim_param else free))
        kind = graph.onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        if np.issubdtype(kind, np.floating) or kind.name == "bfloat16":
            array = generator.standard_normal(shape).astype(np.float32)
            feed[value.name] = torch.from_numpy(array).to(_dtype(kind))
        else:
            feed[value.name] = torch.from_numpy(generator.integers(0, 2, shape).astype(kind))
    return Example((), feed)


def _dtype(kind: Any) -> torch.dtype:
    dtype = getattr(torch, kind.name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _array(onnx: Any, value: Tensor) -> Any:
    if value.dtype == torch.bfloat16:
        narrow = onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.BFLOAT16)
        return value.float().numpy().astype(narrow)
    return value.numpy()


def _widened(value: Any) -> Any:
    """Results of float32 in the model's own float64."""
    if isinstance(value, list):
        return [_widened(each) for each in value]
    return value.double() if isinstance(value, Tensor) and value.dtype == torch.float32 else value


def _tensors(value: Any) -> Any:
    """The tensors of an output; None for what is none, as text."""
    if isinstance(value, (list, tuple)):
        return [_tensors(item) for item in value]
    array = np.asarray(value)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16)
    return torch.from_numpy(np.array(array)) if array.dtype.kind in "biufc" else None


def _values(graph: OnnxGraph) -> Sequence[str]:
    """The values that depend on the inputs and of which a shape is of use."""
    made = [name for node in graph.graph.node for name in node.output if name and name not in graph.constants]
    return [*graph.outputs, *(name for name in made if graph.uses[name])]


def _session(onnx: Any, runtime: Any, model: Any, options: Any) -> Any:
    providers = ["CPUExecutionProvider"]
    if model.ByteSize() < IN_MEMORY:
        return runtime.InferenceSession(model.SerializeToString(), options, providers=providers)
    with tempfile.TemporaryDirectory(prefix="batchnorm-") as folder:
        path = Path(folder) / "model.onnx"
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        onnx.save(copy, path, save_as_external_data=True, location="model.data")
        return runtime.InferenceSession(str(path), options, providers=providers)
