"""What a module's forward may decide by besides its input: numbers and generators that are the module's own."""

from __future__ import annotations

import collections
import itertools
import random
import sys
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_OF_TORCH = frozenset(nn.Module().__dict__)  # parameters, hooks, the mode: none of the module's author
_DEPTH, _MOST, _LONGEST = 6, 10_000, 1000  # levels, objects, and values of a list or a mapping that are looked at


def own_state(module: nn.Module) -> Hashable:
    """A picture of the numbers, texts and random generators in a module's attributes.

    Global generators that its forward names are in it, too. Tensors and modules inside are left out, and so is what
    cannot be looked into, such as an iterator, or lies deeper or behind more than is looked at.
    """
    seen: set[int] = set()
    own = {key: value for key, value in vars(module).items() if key not in _OF_TORCH}
    named = getattr(type(module).forward, "__globals__", {})
    code = getattr(type(module).forward, "__code__", None)
    generators = [named[name] for name in (code.co_names if code else ()) if _generator(named.get(name)) is not None]
    return _picture(own, seen, 0), tuple(_picture(each, seen, 0) for each in generators)


def _generator(value: Any) -> Hashable | None:
    """The state of a generator of random numbers of Python, NumPy or torch; None if it is none."""
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return value.getstate()
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.random.Generator):
        return str(value.bit_generator.state)
    if numpy is not None and isinstance(value, numpy.random.RandomState):
        return str(value.get_state(legacy=False))
    return None


def _picture(value: Any, seen: set[int], depth: int) -> Hashable:
    if isinstance(value, bool | int | float | complex | str | bytes | None):
        return value
    if isinstance(value, Tensor | nn.Module | type) or depth > _DEPTH or len(seen) > _MOST or id(value) in seen:
        return type(value).__name__
    seen.add(id(value))
    state = _generator(value)
    if state is not None:
        return state
    if isinstance(value, itertools.count):
        return repr(value)
    if isinstance(value, Mapping):
        pairs = itertools.islice(value.items(), _LONGEST)
        return len(value), tuple((str(key), _picture(each, seen, depth + 1)) for key, each in pairs)
    if isinstance(value, list | tuple | collections.deque):
        return len(value), tuple(_picture(each, seen, depth + 1) for each in itertools.islice(value, _LONGEST))
    return type(value).__name__, _picture(getattr(value, "__dict__", None), seen, depth + 1)
