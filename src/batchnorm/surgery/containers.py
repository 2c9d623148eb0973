"""Containers that compute at once what stands in them one behind the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from batchnorm.nn import batch_norm as ours
from batchnorm.surgery import depthwise, pooling
from batchnorm.surgery.chains import Before
from batchnorm.surgery.conversion import Absorbed


@dataclass
class Found:
    """The layers of a ``Sequential`` that are computed with others.

    Attributes:
        convolved: those right behind a depthwise convolution.
        before: those before one, with their activations between both.
        pooled: those whose output is pooled behind their activations, perhaps behind a 1x1 convolution.
    """

    convolved: list[nn.Module] = field(default_factory=list)
    before: list[nn.Module] = field(default_factory=list)
    pooled: list[nn.Module] = field(default_factory=list)

    def any(self) -> bool:
        return bool(self.convolved or self.pooled)


def found_in(container: nn.Sequential, is_ours: Callable[[Any], bool], is_absorbed: Callable[[Any], bool]) -> Found:
    """What `_forward` will compute at once."""
    found, i = Found(), 0
    modules: list[Any] = [*container._modules.values(), None, None]
    while modules[i] is not None:
        k = i
        if is_ours(modules[i]):
            k += 1
            while is_absorbed(modules[k]):
                k += 1
        if depthwise.is_depthwise(modules[k]) and is_ours(modules[k + 1]):
            found.convolved.append(modules[k + 1])
            found.before += modules[i : i + 1] if k > i else []
            i = k + 2
        elif k > i and (_pools(modules[k], None) or _pools(modules[k + 1], modules[k])):
            found.pooled.append(modules[i])
            i = k + 1
        else:
            i += 1
    return found


def _pools(pool: Any, conv: Any) -> bool:
    if conv is None:
        return pooling.is_pooling(pool)
    return pooling.is_mean(pool) and pooling.is_pointwise(conv)


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
