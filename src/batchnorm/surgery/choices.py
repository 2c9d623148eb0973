"""Choices of a network between values: which are the largest, which pass a threshold, which step one falls on.

Where two values are equal up to rounding, rounding alone chooses, and what follows may be far apart in two networks
that compute the same. Such a network is compared with the choices of the original held fast.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from batchnorm.surgery.comparison import Example, distances

_CASTS = {"_to_copy", "copy_", "to"}
_STEPS = {"ceil", "floor", "round", "sign", "trunc"}  # give floating-point values that jump
_OURS = "batchnorm"
_MASK = 1e30  # a larger magnitude stands for "never", and is no measure for the values beside it


@dataclass(frozen=True)
class Choice:
    """One call that chooses: its operator, the floating-point tensors that it looks at, and what it gives."""

    operator: str
    seen: list[Tensor]
    given: list[Tensor]


@dataclass(frozen=True)
class Held:
    """A run in which the choices of another network were held.

    Attributes:
        output: what the network gave.
        changed: what would have chosen otherwise, by the operator's name.
        apart: the largest difference of what those looked at, relative to its largest value.
    """

    output: Any
    changed: tuple[str, ...]
    apart: float


def choices(net: nn.Module, example: Example) -> list[Choice]:
    """The choices of a network on an example, in the order of calls."""
    mode = _Choices(None)
    with mode:
        example.run(net)
    return mode.found


def with_choices(net: nn.Module, example: Example, held: list[Choice]) -> Held | None:
    """A run in which each call chooses as in ``held``; None where the calls are others."""
    mode = _Choices(held)
    try:
        with mode:
            output = example.run(net)
    except Exception:  # whatever a forward of any class raises where it is given the choices of another
        return None
    if mode.lost or len(mode.found) != len(held):
        return None
    return Held(output, tuple(dict.fromkeys(mode.changed)), mode.apart)


class _Choices(TorchDispatchMode):
    """Notes the choices, or puts those of another run in their place."""

    def __init__(self, held: list[Choice] | None) -> None:
        super().__init__()
        self.held, self.found, self.changed, self.apart, self.lost = held, list[Choice](), list[str](), 0.0, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        seen = [x.clone() for x in _tensors((args, kwargs)) if x.is_floating_point()]
        result = func(*args, **(kwargs or {}))
        chosen = _chosen(func, result) if seen else []
        if not chosen:
            return result
        here = Choice(func._schema.name, seen, [x.clone() for x in chosen])
        self.found.append(here)
        if self.held is None or self.lost:
            return result
        there = self.held[len(self.found) - 1] if len(self.found) <= len(self.held) else None
        if there is None or not _alike(here, there):
            self.lost = True
            return result
        return self._replace(func, result, here, there)

    def _replace(self, func: Any, result: Any, here: Choice, there: Choice) -> Any:
        if all(map(_equal, here.given, there.given)):
            return result
        name = here.operator.partition("::")[2]
        self.changed.append("a cast to integers" if name in _CASTS else name)
        self.apart = max([self.apart, *map(_apart, there.seen, here.seen)])
        if func._schema.is_mutable:
            for x, y in zip(_chosen(func, result), there.given, strict=True):
                x.copy_(y)
            return result
        given = iter(there.given)
        chosen = {id(x) for x in _chosen(func, result)}
        return pytree.tree_map(lambda x: next(given).to(x.dtype, copy=True) if id(x) in chosen else x, result)


def _tensors(value: Any) -> Iterator[Tensor]:
    return (x for x in pytree.tree_leaves(value) if isinstance(x, Tensor))


def _chosen(func: Any, result: Any) -> list[Tensor]:
    """The tensors in a result that jump where the input moves: integers, booleans and steps."""
    space, _, name = func._schema.name.partition("::")
    if space == _OURS or name.startswith(("empty", "new_empty")):
        return []
    return [x for x in _tensors(result) if name in _STEPS or not (x.is_floating_point() or x.is_complex())]


def _alike(a: Choice, b: Choice) -> bool:
    """Whether two calls are of one operator on tensors of equal sizes; how many are found may depend on the values."""
    return a.operator == b.operator and [x.shape for x in a.seen] == [x.shape for x in b.seen]


def _equal(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and torch.equal(x, y.to(x.dtype))


def _apart(x: Tensor, y: Tensor) -> float:
    """The largest difference relative to the largest value, masks left out."""
    counts = x.abs() < _MASK
    if not torch.equal(counts, y.abs() < _MASK):
        return float("inf")
    (distance,) = distances(torch.where(counts, x, 0).double(), torch.where(counts, y, 0).double())
    return distance.relative
