"""Questions about modules: what their classes compute, who sees them, and whether they can be edited."""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from batchnorm.errors import InputError, SurgeryError
from batchnorm.nn.outside import has_hooks
from batchnorm.surgery.flow import DataFlow
from batchnorm.surgery.frozen import is_frozen_layer
from batchnorm.surgery.plan import references
from batchnorm.surgery.weights import applies_weights_once

_LEAF_PACKAGES = ("torch.nn.modules.", "torch.ao.nn.", "batchnorm.nn.", "batchnorm.surgery.")
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


_METHODS = ("forward", "_conv_forward", "__call__")


def is_plain(module: nn.Module) -> bool:
    """Whether the module computes what its class in torch.nn, or in this package, computes."""
    kind = type(module)
    return (
        str(kind.forward.__module__).startswith(_LEAF_PACKAGES)
        and str(getattr(kind, "_conv_forward", kind.forward).__module__).startswith(_LEAF_PACKAGES)
        and not has_methods(module)
    )


def computes_as(module: Any, *kinds: type[nn.Module]) -> bool:
    """Whether the module is of one of these classes, or of a subclass that computes the same with the same weights."""
    kind: Any = type(module)
    return (kind in kinds or _inherits(kind, kinds)) and not has_methods(module)


def has_methods(module: nn.Module) -> bool:
    """Whether something stands in the place of a method that decides what the module computes, in it or its class."""
    return any(name in module.__dict__ for name in _METHODS) or type(module).__call__ is not nn.Module.__call__


@functools.lru_cache(maxsize=256)
def _inherits(kind: type, kinds: tuple[type[nn.Module], ...]) -> bool:
    if not issubclass(kind, kinds) or kind.__module__ == parametrize.__name__:
        return False  # parametrizations give a module a class whose weights are computed
    bases = [each for each in kinds if issubclass(kind, each)]
    return any(all(getattr(kind, name, None) is getattr(base, name, None) for name in _METHODS) for base in bases)


def is_leaf(module: nn.Module) -> bool:
    """Whether the graph keeps the module as one node."""
    if isinstance(module, _CONTAINERS):
        return False
    return is_plain(module) or isinstance(module, _BatchNorm) or is_known(module)


def is_known(module: nn.Module) -> bool:
    """Whether a class of its own computes what surgery understands, as seen from its outputs."""
    return is_frozen_layer(module) or (not has_hooks(module) and applies_weights_once(module))


def obstacle(flow: DataFlow, name: str, several_calls: bool = False) -> str | None:
    """Why the layer cannot be edited by itself, in words, or None; whether it may be called several times."""
    module = flow.modules[name]
    calls = flow.calls(name)
    if not is_plain(module) and not is_known(module):
        return f"its class {type(module).__qualname__} has a forward of its own"
    if not calls:
        return "it is not called on the example's path (or only inside another layer)"
    if len(calls) > 1 and not several_calls:
        return f"it is used {len(calls)} times"
    reason = obstacle_outside(flow.net, module)
    if reason is not None:
        return reason
    readers = flow.readers(name)
    if readers:
        return f"its parameters or buffers are also read by {flow.describe(readers[0])}"
    return None


def obstacle_outside(net: nn.Module, module: nn.Module) -> str | None:
    """What stands against an edit of the layer beside the data flow, in words, or None."""
    if parametrize.is_parametrized(module):
        return (
            "its parameters are computed by a parametrization; make it permanent with "
            "torch.nn.utils.parametrize.remove_parametrizations"
        )
    if any(is_compiled(parent) for parent, _ in references(net, module)):
        return "it is compiled by itself; compile the network instead"
    if has_hooks(module):
        return "it has hooks, which see or change its input or output; remove them first"
    return None


def unwrap(net: Any, verb: str) -> nn.Module:
    """The network behind ``torch.compile``; refuses what cannot be edited from outside.

    Raises:
        InputError: for anything but a ``torch.nn.Module``.
        SurgeryError: for scripted, lazy and parallel networks.
    """
    if not isinstance(net, nn.Module):
        raise InputError(f"{verb}: expected a torch.nn.Module, got {type(net).__name__}")
    while is_compiled(net):
        net = original(net)
    for name, module in net.named_modules():
        where = f"'{name}'" if name else "the network"
        if isinstance(module, torch.jit.ScriptModule):
            raise SurgeryError(f"{verb}: {where} is TorchScript; give the Python module instead")
        if hasattr(module, "module") and type(module).__module__.startswith("torch.nn.parallel"):
            raise SurgeryError(f"{verb}: {where} is a {type(module).__name__}; give its .module instead")
        lazy = [k for k, p in module.named_parameters(recurse=False) if nn.parameter.is_lazy(p)]
        if lazy:
            raise SurgeryError(f"{verb}: {where} is lazy, without shapes yet; call the network once first")
    return cast(nn.Module, net)


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is the wrapper that ``torch.compile`` returns."""
    return type(module).__name__ == "OptimizedModule" and hasattr(module, "_orig_mod")


def original(module: nn.Module) -> nn.Module:
    return cast(nn.Module, module._orig_mod)
