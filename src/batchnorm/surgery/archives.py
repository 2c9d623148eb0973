"""torch.export archives as networks of modules, which every verb can edit, and back."""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from batchnorm.errors import InputError, SurgeryError
from batchnorm.surgery.archive_check import load_archive
from batchnorm.surgery.comparison import Example
from batchnorm.surgery.flow import operation

_CONVOLUTIONS = {f"{kind}{n}d" for kind in ("conv", "conv_transpose") for n in (1, 2, 3)}
_TENSORS = {"batch_norm": ("weight", "bias", "running_mean", "running_var"), "linear": ("weight", "bias")}
_TENSORS |= dict.fromkeys(_CONVOLUTIONS, ("weight", "bias"))
_BY_AXES = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_UNUSED = ("num_batches_tracked",)


@dataclass(frozen=True)
class Archive:
    """A program whose convolutions, linear layers and batch normalizations are modules again, by their old names.

    Attributes:
        program: as it was loaded.
        net: the network in evaluation mode, over the program's own parameters.
        example: the input that the program was exported with.
    """

    program: ExportedProgram
    net: fx.GraphModule
    example: Example

    def export(self, net: nn.Module) -> ExportedProgram:
        """An edited copy of ``net`` as a program that takes what this one took, of the same dynamic shapes.

        Raises:
            SurgeryError: the edited network cannot be exported with those shapes.
        """
        inputs = self.example.map(lambda x: x.detach().clone())
        failure: Exception | None = None
        for free in (False, True):
            try:
                shapes = _dynamic_shapes(self.program, inputs, free)
                made = torch.export.export(net, inputs.args, inputs.kwargs, dynamic_shapes=shapes)
            except Exception as error:  # what torch.export raises has no public base
                failure = error
                continue
            if _open(made) == _open(self.program):
                return made
        reason = str(failure or "other dimensions are open").strip().splitlines()
        raise SurgeryError(f"the edited network cannot be exported as the old one was: {reason[0]}") from failure


def open_archive(path: str | Path) -> Archive:
    """Load a torch.export archive (.pt2) as a network of modules.

    Raises:
        InputError: the file cannot be read, has a member that plain networks do not need (see `load_archive`), holds
            no example, or was exported in training mode.
    """
    with quiet():
        program = load_archive(path)
        try:
            lifted = program.module(check_guards=False)  # guards are code made of the program's texts
        except Exception as error:  # the parts are plain, but do not fit together
            raise InputError(f"{path}: it cannot be read as a torch.export archive ({error})") from error
    if program.example_inputs is None:
        raise InputError(f"{path}: the archive holds no example input to compare on; export it again with one")
    norms = [n for n in program.graph.nodes if n.op == "call_function" and operation(n) == "batch_norm"]
    if any(_arguments(n)["training"] and _arguments(n)["running_mean"] is not None for n in norms):
        raise InputError(f"{path}: it was exported in training mode; call net.eval() and export it again")
    args, kwargs = program.example_inputs
    return Archive(program, _network(lifted), Example(tuple(args), dict(kwargs)))


def _network(lifted: fx.GraphModule) -> fx.GraphModule:
    graph = lifted.graph
    for node in [n for n in graph.nodes if n.op == "call_function" and operation(n) == "detach"]:
        source = node.args[0]  # gamma and beta that do not train; nothing does here
        if isinstance(source, fx.Node) and source.op == "get_attr":
            node.replace_all_uses_with(source)
            graph.erase_node(node)
    made: dict[str, list[Any]] = {}
    for node in [n for n in graph.nodes if n.op == "call_function" and operation(n) in _TENSORS]:
        found = _module_of(lifted, node)
        if found is None:
            continue
        name, module = found
        settings = [operation(node), *_settings(node)]
        if made.setdefault(name, settings) != settings:  # one set of parameters, used in two ways
            continue
        if lifted.get_submodule(name).__class__ is not module.__class__:
            _put(lifted, name, module)
        with graph.inserting_before(node):
            call = graph.call_module(name, (node.args[0],))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph.erase_node(node)
    graph.eliminate_dead_code()
    net = fx.GraphModule(lifted, graph)
    for module in net.modules():  # a GraphModule of an exported program has no eval() of its own
        module.training = False
    return net


def _module_of(net: nn.Module, node: fx.Node) -> tuple[str, nn.Module] | None:
    """The layer whose parameters a call reads, and its name; None where they are no layer's own."""
    kind = operation(node)
    read = _arguments(node)
    expected = _TENSORS[kind]
    given = {key: read.get(key) for key in expected if read.get(key) is not None}
    if not given or not all(isinstance(value, fx.Node) and value.op == "get_attr" for value in given.values()):
        return None
    paths = {key: str(value.target).rpartition(".") for key, value in given.items() if isinstance(value, fx.Node)}
    owners = {owner for owner, _, _ in paths.values()}
    if len(owners) != 1 or not (name := owners.pop()) or any(key != last for key, (_, _, last) in paths.items()):
        return None
    holder = net.get_submodule(name)
    own = {**dict(holder.named_parameters(recurse=False)), **dict(holder.named_buffers(recurse=False))}
    if holder._modules or own.keys() - set(_UNUSED) != given.keys():
        return None
    module = _made(kind, read, own, node)
    if module is None:
        return None
    for key, value in own.items():
        module._parameters.pop(key, None)
        module._buffers.pop(key, None)
        if isinstance(value, nn.Parameter):
            module.register_parameter(key, value)
        else:
            module.register_buffer(key, value)
    return name, module


def _made(kind: str, read: dict[str, Any], own: dict[str, Tensor], node: fx.Node) -> nn.Module | None:
    biased = "bias" in own
    if kind == "batch_norm":
        axes = node.meta["val"].dim()
        if axes not in _BY_AXES or ("running_mean" in own) != ("running_var" in own):
            return None
        if read["training"] and "running_mean" in own:
            return None
        channels, tracked = node.meta["val"].shape[1], "running_mean" in own
        layer = _BY_AXES[axes](int(channels), read["eps"], read["momentum"], "weight" in own, tracked, "meta")
        if "weight" in own and not biased:
            layer.register_parameter("bias", None)
        return layer if "weight" in own or not biased else None
    weight = own["weight"]
    if kind == "linear":
        return nn.Linear(weight.shape[1], weight.shape[0], bias=biased, device="meta") if weight.dim() == 2 else None
    transposed = "transpose" in kind
    groups = read["groups"]
    sizes = (weight.shape[0], weight.shape[1] * groups) if transposed else (weight.shape[1] * groups, weight.shape[0])
    options = {key: read[key] for key in ("stride", "padding", "dilation", "groups", "output_padding") if key in read}
    dims = weight.dim() - 2
    options = {key: _repeated(value, dims) for key, value in options.items()}
    name = f"Conv{'Transpose' if transposed else ''}{dims}d"
    made: nn.Module = getattr(nn, name)(*sizes, tuple(weight.shape[2:]), bias=biased, device="meta", **options)
    return made


def _repeated(value: Any, dims: int) -> Any:
    """A number for each axis, where a list holds one for all of them."""
    return value if not isinstance(value, list) else tuple(value) * (dims if len(value) == 1 else 1)


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator's call by the names of its schema, defaults included."""
    assert isinstance(node.target, torch._ops.OpOverload)
    found = {}
    for index, argument in enumerate(node.target._schema.arguments):
        value = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
        found[argument.name] = value
    return found


def _settings(node: fx.Node) -> list[Any]:
    return [value for value in _arguments(node).values() if not isinstance(value, fx.Node)]


def _put(net: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, key = name.rpartition(".")
    net.get_submodule(parent)._modules[key] = module


def _open(program: ExportedProgram) -> int:
    """The number of dimensions of inputs that are left open."""
    return sum(not isinstance(size, int) for shape in _shapes(program) for size in shape)


def _shapes(program: ExportedProgram) -> list[tuple[Any, ...]]:
    users = set(program.graph_signature.user_inputs)
    values = [n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder" and n.name in users]
    return [tuple(value.shape) if isinstance(value, Tensor) else () for value in values]


def _dynamic_shapes(program: ExportedProgram, inputs: Example, free: bool) -> Any:
    """For ``torch.export.export``: dimensions that were one symbol are one again, in its range; or found anew."""
    if not _open(program):
        return None
    symbols: dict[str, Any] = {}

    def dim(size: Any) -> Any:
        expression = size.node.expr
        bounds = program.range_constraints.get(expression)
        if free or not expression.is_Symbol or bounds is None:
            return torch.export.Dim.AUTO
        limits = {key: int(b) for key, b in (("min", bounds.lower), ("max", bounds.upper)) if b.is_Integer}
        return symbols.setdefault(str(expression), torch.export.Dim(f"d{len(symbols)}", **limits))

    leaves: list[Any] = []
    for shape in _shapes(program):
        leaves.append({axis: dim(size) for axis, size in enumerate(shape) if not isinstance(size, int)} or None)
    args, kwargs = pytree.tree_unflatten(leaves, pytree.tree_structure((inputs.args, inputs.kwargs)))
    names = list(inspect.signature(program.module(check_guards=False).forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without torch's warnings about how torch itself reads, copies and writes programs."""
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning, UserWarning):
            warnings.simplefilter("ignore", category)
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
