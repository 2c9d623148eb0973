"""What tools of torch find when they compile, fuse or swap a layer of this package.

Such tools look at classes and attributes instead of calling the layer: TorchScript reads annotations, a fuser takes
``running_mean`` and ``weight``, a converter makes a layer of another class. Here each of them gets the right thing, or
an error that says what to do first. `leaves` is about torch.fx.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from batchnorm.errors import SurgeryError

LOOKS_ON = "looks_on"
"""The attribute of a hook of ours that looks at outputs alone, also at those of fused calls."""

GUARDED = "_activation_is_guarded"
"""The attribute of a layer whose activation others compute if the layer is swapped."""


class Unscriptable:
    """A layer that TorchScript cannot compile: its options are Python."""

    def __prepare_scriptable__(self) -> Any:
        """Called by ``torch.jit.script`` before it compiles a network, on each of its modules."""
        raise SurgeryError(
            f"torch.jit.script cannot compile {type(self).__name__}, a layer of this package. Call "
            "bn.convert(net, to='torch') first (after bn.accelerate, bn.revert(net)), or use torch.export"
        )


class Swappable(Unscriptable):
    """A layer that refuses to be swapped for a plain one while it is more than that.

    Functions such as ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` make a plain layer of every batch normalization.
    On the way they ask for ``qconfig``, an attribute of quantization: that is where such a swap can be refused.
    """

    def _lost_in_a_swap(self, caller: str) -> str | None:
        """The part of the layer that a plain one would lose, in words, or None. ``caller`` is the swapping module."""
        raise NotImplementedError

    @property
    def qconfig(self) -> Any:
        """The configuration that quantization has set; there is none before."""
        if "qconfig" in self.__dict__:
            return self.__dict__["qconfig"]
        caller = sys._getframe(1)
        if "sync" in caller.f_code.co_name.lower():
            lost = self._lost_in_a_swap(str(caller.f_globals.get("__name__")))
            if lost is not None:
                raise SurgeryError(
                    f"{caller.f_code.co_name}: a plain layer in the place of {self!r} would lose {lost}. "
                    "bn.convert(net, process_group='world') synchronizes this layer as it is"
                )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute 'qconfig'")

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        self.__dict__["qconfig"] = value

    def _lost_in_evaluation(self) -> str | None:
        """The part of the layer that scale and shift by running statistics would lose, in words, or None."""
        raise NotImplementedError

    @property
    def affine(self) -> bool:
        """Whether the layer has gamma and beta.

        ``torch.utils.mkldnn.to_mkldnn`` asks for it before it makes a plain layer of this one: there it is refused.
        """
        if "affine" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute 'affine'")
        if sys._getframe(1).f_globals.get("__name__") == "torch.utils.mkldnn":
            lost = self._lost_in_evaluation()
            if lost is not None:
                raise SurgeryError(
                    f"to_mkldnn: a plain layer in the place of {self!r} would lose {lost}; call bn.fold(net, example) "
                    "first, or bn.revert(net) after bn.accelerate"
                )
        return bool(self.__dict__["affine"])

    @affine.setter
    def affine(self, value: bool) -> None:
        self.__dict__["affine"] = value


def keeps_fast_paths_away(module: nn.Module, args: Any) -> None:
    """A hook before ``forward`` that does nothing.

    ``torch.nn.TransformerEncoderLayer`` in evaluation mode reads ``norm1.weight, bias, eps`` and computes layer
    normalization with them, whatever module ``norm1`` is. It does not if a module in it has a hook. So the layers that
    can stand there, those over sequences, have this one.
    """


NORM = "norm"
"""The name under which a layer holds the normalization that `followed_by_norm` calls."""


def followed_by_norm(module: nn.Module, args: Any, output: Any) -> Any:
    """A hook behind a layer whose attributes are read elsewhere: the normalization that `insert` gave it."""
    norm = module._modules[NORM]
    assert norm is not None
    return norm(output)


def is_followed(module: nn.Module) -> bool:
    """Whether a normalization is called by a hook behind the module."""
    return any(hook is followed_by_norm for hook in module._forward_hooks.values())


_OURS = (keeps_fast_paths_away, followed_by_norm)


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module runs hooks of anybody else."""
    registries = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    hooks = (hook for registry in registries for hook in registry.values())
    return any(
        hook not in _OURS and not getattr(hook, "changes_nothing", False) and not getattr(hook, LOOKS_ON, False)
        for hook in hooks
    )


def show(module: nn.Module, y: Any) -> None:
    """Calls the hooks that look at an output of a module, where its forward was no call of it."""
    for hook in module._forward_hooks.values():
        if getattr(hook, LOOKS_ON, False):
            hook(module, (), {}, y)


def teach_fusers(pairs: dict[type[nn.Module], type[nn.Module]], as_torch: Callable[[Any], nn.Module]) -> None:
    """Lets ``torch.ao.quantization.fuse_modules`` take our layers where it takes torch's.

    Args:
        pairs: torch's classes and ours.
        as_torch: gives the layer of torch.nn with the same tensors, or raises for a layer that is more than that.
    """
    mappings = sys.modules.get("torch.ao.quantization.fuser_method_mappings")
    known: dict[Any, Any] | None = getattr(mappings, "_DEFAULT_OP_LIST_TO_FUSER_METHOD", None)
    if known is None:  # a torch without this kind of quantization
        return
    for kinds, fuse in list(known.items()):
        if any(kind in pairs for kind in kinds):
            known[tuple(pairs.get(kind, kind) for kind in kinds)] = _Fuser(fuse, as_torch)


class _Fuser:
    """A function of torch's that fuses modules, for lists in which a layer is ours."""

    def __init__(self, fuse: Callable[..., Any], as_torch: Callable[[Any], nn.Module]) -> None:
        self.fuse, self.as_torch = fuse, as_torch

    def __call__(self, is_qat: bool, *modules: nn.Module) -> Any:
        return self.fuse(is_qat, *(self.as_torch(m) if isinstance(m, Swappable) else m for m in modules))
