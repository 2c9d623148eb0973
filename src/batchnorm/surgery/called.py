"""Linear and convolution layers that are calls: ``F.linear(x, self.weight, self.bias)`` in a forward of any class.

Such a call is put into the captured graph as a call of a layer of torch.nn that shares the tensors. So it is edited by
the rules for layers; the new weights go to the module that owns the tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from batchnorm.surgery.comparison import Example, copy_of, tensors_of
from batchnorm.surgery.flow import DataFlow, attribute, operation, rank


class CalledConv1d(nn.Conv1d):
    """A call of ``F.conv1d``, whose padding is the caller's."""


class CalledConv2d(nn.Conv2d):
    """A call of ``F.conv2d``, whose padding is the caller's."""


class CalledConv3d(nn.Conv3d):
    """A call of ``F.conv3d``, whose padding is the caller's."""


_CONVOLUTIONS: dict[str, Any] = {"conv1d": CalledConv1d, "conv2d": CalledConv2d, "conv3d": CalledConv3d}
_ARGUMENTS = {
    "linear": ("input", "weight", "bias"),
    **dict.fromkeys(_CONVOLUTIONS, ("input", "weight", "bias", "stride", "padding", "dilation", "groups")),
}
_DEFAULTS = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}


@dataclass(frozen=True)
class Owner:
    """Where a called layer's tensors are: the module's name, and the names of weight and bias in it."""

    module: str
    weight: str
    bias: str


def called_layers(flow: DataFlow, example: Example) -> dict[str, Owner]:
    """Make calls layers in the graph of ``flow``, where nothing else reads their tensors; the owners by name.

    A layer has its owner's name, or that of its weight where the owner is called as a layer itself, or owns several.
    """
    readers: dict[int, list[fx.Node]] = {}
    for node in flow.nodes:
        if node.op == "get_attr":
            readers.setdefault(id(attribute(flow.net, flow.name(node))), []).extend(node.users)
    found: dict[str, Owner] = {}
    for node in flow.nodes:
        given = _arguments(node)
        owner = None if given is None else _owner(flow, given, readers, example)
        if given is None or owner is None:
            continue
        layer = _layer(flow.net.get_submodule(owner.module), owner, operation(node), given)
        if layer is None:
            continue
        name = owner.module
        if flow.calls(name) or name in found:
            name = f"{owner.module}.{owner.weight}".removeprefix(".")
        found[name] = owner
        flow.call(name, layer, node, given["input"])
    return found


def _arguments(node: fx.Node) -> dict[str, Any] | None:
    names = _ARGUMENTS.get(operation(node)) if node.op == "call_function" else None
    if names is None or len(node.args) > len(names):
        return None
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    known = given.keys() <= set(names) and isinstance(given.get("input"), fx.Node)
    x: Any = given.get("input")
    return given if known and isinstance(given.get("weight"), fx.Node) and rank(x) else None


def _owner(flow: DataFlow, given: dict[str, Any], readers: dict[int, list[fx.Node]], example: Example) -> Owner | None:
    """Who owns weight and bias, if they are parameters that this call alone reads."""
    nodes = [given["weight"], *([given["bias"]] if given.get("bias") is not None else [])]
    paths = []
    for node in nodes:
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        path = flow.name(node)
        if not isinstance(attribute(flow.net, path), nn.Parameter):
            return None
        if len(readers[id(attribute(flow.net, path))]) != 1:
            return None
        paths.append(path.rpartition("."))
    module, _, weight = paths[0]
    if len(paths) == 2:
        return Owner(module, weight, paths[1][2]) if paths[1][0] == module else None
    owner = flow.net.get_submodule(module)
    takes_bias = weight == "weight" and "bias" in owner._parameters and owner._parameters["bias"] is None
    return Owner(module, weight, "bias") if takes_bias and _reads_bias(flow, module, given["weight"], example) else None


def _reads_bias(flow: DataFlow, module: str, weight: fx.Node, example: Example) -> bool:
    """Whether the forward would use a bias that the module has not now."""
    twin = copy_of(flow.net, training=False)
    owner = twin.get_submodule(module)
    size = attribute(flow.net, flow.name(weight)).shape[0]
    like = next(twin.parameters())
    owner.register_parameter("bias", nn.Parameter(torch.full((size,), torch.nan, dtype=like.dtype, device=like.device)))
    try:
        output = example.run(twin)
    except Exception:  # whatever a forward of any class raises
        return False
    return any(bool(x.isnan().any()) for _, x in tensors_of(output) if x.is_floating_point())


def _layer(owner: nn.Module, names: Owner, name: str, given: dict[str, Any]) -> nn.Module | None:
    weight = owner._parameters[names.weight]
    assert weight is not None
    made: Any
    if name == "linear":
        if weight.dim() != 2:
            return None
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    else:
        settings = {key: given.get(key, default) for key, default in _DEFAULTS.items()}
        if not all(_is_constant(value) for value in settings.values()):
            return None
        kernel, groups = tuple(weight.shape[2:]), settings["groups"]
        channels = weight.shape[1] * groups, weight.shape[0]
        made = _CONVOLUTIONS[name](*channels, kernel, bias=False, device="meta", **settings)
    made._parameters = {"weight": weight, "bias": owner._parameters[names.bias]}
    layer: nn.Module = made.train(owner.training)
    return layer


def _is_constant(value: Any) -> bool:
    each = value if isinstance(value, (tuple, list)) else (value,)
    return all(isinstance(x, (int, str)) for x in each)
