"""Containers that compute at once what stands in them one behind the other."""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from torch import nn

from batchnorm.nn import batch_norm as ours
from batchnorm.surgery import depthwise, pooling
from batchnorm.surgery.chains import Before
from batchnorm.surgery.conversion import Absorbed


def pairs_in(container: nn.Sequential, is_ours: Callable[[Any], bool]) -> list[nn.Module]:
    """The layers in a ``Sequential`` right behind a depthwise convolution."""
    return [
        after
        for conv, after in pairwise(container._modules.values())
        if depthwise.is_depthwise(conv) and is_ours(after)
    ]


def pooled_in(
    container: nn.Sequential, is_ours: Callable[[Any], bool], is_absorbed: Callable[[Any], bool]
) -> list[nn.Module]:
    """The layers in a ``Sequential`` whose output is pooled behind their activations, perhaps behind a 1x1 convolution."""
    found, layer, conv = [], None, None
    for module in container._modules.values():
        if layer is not None and (pooling.is_pooling(module) if conv is None else pooling.is_mean(module)):
            found.append(layer)
        if layer is not None and conv is None and pooling.is_pointwise(module):
            conv = module
            continue
        layer, conv = module if is_ours(module) else layer if is_absorbed(module) and conv is None else None, None
    return found


@functools.cache
def in_pairs(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a ``Sequential`` that calls at once what can be computed so."""
    members = {
        "forward": _forward,
        "original_kind": kind,
        "__module__": kind.__module__,
        "__doc__": kind.__doc__,
        "__reduce_ex__": _reduce,
    }
    return type(f"Accelerated{kind.__name__}", (kind,), members)


def _forward(self: nn.Sequential, input: Any) -> Any:
    modules: list[Any] = [*self._modules.values(), None, None]
    i = 0
    while modules[i] is not None:
        k, before = i, None
        if isinstance(modules[i], ours.BatchNorm):
            k += 1
            while isinstance(modules[k], Absorbed):
                k += 1
            before = Before(modules[i], stand_ins=tuple(modules[i + 1 : k]))
        if depthwise.is_pair(modules[k], modules[k + 1]):
            input = depthwise.normalized_convolution(modules[k], modules[k + 1], input, before=before)
            i = k + 2
        elif before is not None and pooling.is_pooling(modules[k]):
            input = pooling.pooled(modules[k], input, before)
            i = k + 1
        elif before is not None and pooling.is_pointwise(modules[k]) and pooling.is_mean(modules[k + 1]):
            input = pooling.pooled(modules[k + 1], input, before, modules[k])
            i = k + 2
        else:
            input = modules[i](input)
            i += 1
    return input


def _reduce(self: nn.Module, protocol: int) -> Any:
    return _bare, (vars(type(self))["original_kind"],), self.__dict__


def _bare(kind: type[nn.Module]) -> nn.Module:
    paired = in_pairs(kind)
    return paired.__new__(paired)
