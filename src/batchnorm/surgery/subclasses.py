"""Layers of user's classes that still are what they inherit from: normalization and more, or weights applied once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.nn import batch_norm as ours
from batchnorm.nn import foreign
from batchnorm.nn.outside import has_hooks
from batchnorm.surgery import frozen
from batchnorm.surgery.capture import ExampleTracer
from batchnorm.surgery.comparison import Example, copy_of, random_state_kept, run_example
from batchnorm.surgery.flow import operation
from batchnorm.surgery.modules import is_plain
from batchnorm.surgery.plan import replace_module
from batchnorm.undo import in_mode

_TORCH = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
NORM = frozen.NORM


def opened(net: nn.Module, example: Example) -> dict[str, nn.Module]:
    """By name, what each batch normalization with a forward of its own computes, the normalization a module in it.

    A layer such as ``BatchNormAct2d`` calls ``batch_norm`` once on its own statistics and parameters, and does more
    before or after. Its value is a ``torch.fx.GraphModule`` with copies of its tensors and modules, in which
    that call is the submodule ``norm``. Frozen layers of other packages that call an activation behind the
    normalization are opened, too. Layers in training mode or with hooks, and those whose forward cannot be traced, are
    left out.
    """
    foreign_names = [
        name
        for name, module in net.named_modules()
        if name and isinstance(module, _BatchNorm) and not is_plain(module)
        if _is_known(module) and not has_hooks(module)
    ]
    inside = ((name, frozen.opened(module)) for name, module in net.named_modules() if name)
    found: dict[str, nn.Module] = {name: module for name, module in inside if module is not None}
    if not foreign_names and not found:
        return {}
    watched, inputs = copy_of(net, training=False), dict[str, Tensor]()
    for name in foreign_names:
        watched.get_submodule(name).register_forward_pre_hook(_noting(inputs, name), with_kwargs=True)
    run_example(watched, example)
    for name, x in inputs.items():
        try:
            layer = net.get_submodule(name)
            own: Any = foreign.as_theirs(layer) if isinstance(layer, foreign.ForeignBatchNorm) else copy.deepcopy(layer)
            with random_state_kept(net), torch.no_grad():
                found[name] = _opened(own, x)
        except Exception:  # whatever tracing a forward of any kind raises
            continue
    return found if _runs(in_mode(with_opened(net, found), False), example) else {}


def _is_known(layer: nn.Module) -> bool:
    """Whether known statistics normalize, in the mode that the layer is in."""
    return not (layer.normalizes_by_batch if isinstance(layer, ours.BatchNorm) else layer.training)


def with_opened(net: nn.Module, found: dict[str, nn.Module]) -> nn.Module:
    """A copy of the network with these in the places of their layers."""
    twin = copy_of(net)
    for name, module in found.items():
        replace_module(twin, twin.get_submodule(name), copy.deepcopy(module))
    return twin


def _runs(net: nn.Module, example: Example) -> bool:
    """False where a forward reads from the layer what its replacement has not."""
    try:
        example.run(net)
    except Exception:
        return False
    return True


def _noting(inputs: dict[str, Tensor], name: str) -> Callable[..., None]:
    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        if len(args) == 1 and not kwargs:
            inputs[name] = args[0]

    return note


def _opened(layer: Any, x: Tensor) -> nn.Module:
    tracer = ExampleTracer(layer, set(), [x])
    tracer.leaves = {id(child) for child in layer.modules() if child is not layer}
    graph = tracer.trace(layer)
    (call,) = [node for node in graph.nodes if operation(node) == "batch_norm"]
    given = dict(zip(_PARAMETERS, call.args, strict=False)) | call.kwargs
    own = {key: given[key].target if isinstance(given[key], fx.Node) else None for key in _PARAMETERS[1:5]}
    if given["training"] or any(own[key] != (None if getattr(layer, key) is None else key) for key in own):
        raise ValueError("other statistics or parameters than its own")
    if any(node.op == "get_attr" and set(node.users) != {call} for node in graph.nodes):
        raise ValueError("its tensors are read elsewhere, too")
    norm = _TORCH[tracer.values[given["input"]].dim()](
        layer.num_features, given["eps"], affine=layer.weight is not None, device="meta"
    )
    norm._parameters, norm._buffers = dict(layer._parameters), dict(layer._buffers)
    with graph.inserting_before(call):
        call.replace_all_uses_with(graph.call_module(NORM, (given["input"],)))
    for node in [call, *(source for source in call.all_input_nodes if source.op == "get_attr")]:
        graph.erase_node(node)
    plain = fx.Graph()  # of no tracer, so that it can be pickled
    plain.output(plain.graph_copy(graph, {}))
    made = fx.GraphModule({NORM: norm.eval(), **dict(layer.named_children())}, plain, type(layer).__name__)
    return made.eval()


_PARAMETERS = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
