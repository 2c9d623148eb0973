"""Containers that compute at once what stands in them one behind the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import nn

from batchnorm.nn import batch_norm as ours
from batchnorm.surgery import depthwise, pooling
from batchnorm.surgery.chains import Before
from batchnorm.surgery.conversion import Absorbed


class Group(NamedTuple):
    """Modules of a ``Sequential`` that stand one behind the other, and what of them is computed at once.

    Attributes:
        modules: all of the group.
        layer: a batch normalization before the rest, or None; stand_ins: the activations that it computes.
        conv: a depthwise convolution, of which ``norm`` normalizes the output; or one before a pooling; or None.
        norm: a batch normalization behind the convolution, or None.
        pool: a pooling, or None.
    """

    modules: list[Any]
    layer: Any = None
    stand_ins: tuple[Any, ...] = ()
    conv: Any = None
    norm: Any = None
    pool: Any = None


def groups_of(
    container: nn.Sequential, is_ours: Callable[[Any], bool], is_absorbed: Callable[[Any], bool]
) -> Iterator[Group]:
    """The modules of a ``Sequential`` in their order, those together that are computed at once."""
    modules: list[Any] = [*container._modules.values(), None, None]
    i = 0
    while modules[i] is not None:
        k, layer = i, None
        if is_ours(modules[i]):
            k, layer = i + 1, modules[i]
            while is_absorbed(modules[k]):
                k += 1
        first, second, before = modules[k], modules[k + 1], (layer, tuple(modules[i + 1 : k]))
        if depthwise.is_depthwise(first) and is_ours(second):
            group = Group(modules[i : k + 2], *before, conv=first, norm=second)
        elif layer is not None and pooling.is_pooling(first):
            group = Group(modules[i : k + 1], *before, pool=first)
        elif layer is not None and pooling.is_pointwise(first) and pooling.is_mean(second):
            group = Group(modules[i : k + 2], *before, conv=first, pool=second)
        else:
            group = Group(modules[i : i + 1])
        yield group
        i += len(group.modules)


_classes: dict[Any, type[nn.Module]] = {}


def in_pairs(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a ``Sequential`` that calls at once what can be computed so."""
    if kind in _classes:
        return _classes[kind]
    members = {
        "forward": _forward,
        "original_kind": kind,
        "__module__": kind.__module__,
        "__doc__": kind.__doc__,
        "__reduce_ex__": _reduce,
    }
    _classes[kind] = type(f"Accelerated{kind.__name__}", (kind,), members)
    return _classes[kind]


def _forward(self: nn.Sequential, input: Any) -> Any:
    for group in groups_of(self, lambda m: isinstance(m, ours.BatchNorm), lambda m: isinstance(m, Absorbed)):
        before = None if group.layer is None else Before(group.layer, stand_ins=group.stand_ins)
        if group.norm is not None:
            input = depthwise.normalized_convolution(group.conv, group.norm, input, before=before)
        elif before is not None:
            input = pooling.pooled(group.pool, input, before, group.conv)
        else:
            input = group.modules[0](input)
    return input


def _reduce(self: nn.Module, protocol: int) -> Any:
    return _bare, (vars(type(self))["original_kind"],), self.__dict__


def _bare(kind: type[nn.Module]) -> nn.Module:
    paired = in_pairs(kind)
    return paired.__new__(paired)
