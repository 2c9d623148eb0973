"""The parts of a network that can be captured by themselves: modules, each with its own calls on the example.

Where the whole network cannot be captured, its parts stand for it. A module that the network calls several times is a
part beside the whole, in whose flow none of its layers has one place.

A part is edited by its own data flow. That holds in the network if nothing else reaches into the part: no code outside
it calls its layers, reads their tensors, or registers them a second time. Modules without state, such as activations,
may be used by others, too, since no edit of a part changes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from batchnorm.errors import BatchNormError
from batchnorm.nn.outside import has_hooks
from batchnorm.surgery.capture import NotCapturedError
from batchnorm.surgery.comparison import Example, copy_of, leaves_of, run_example
from batchnorm.surgery.modules import is_compiled, is_leaf
from batchnorm.surgery.own_state import own_state

T = TypeVar("T")
_SHOWN = 3
_PLAIN = (Tensor, bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format, type(None))


@dataclass(frozen=True)
class Part(Generic[T]):
    """A module that can be captured, what it is called with on the example, and what is planned in it.

    ``lent`` names the modules without state in it that are used outside it, too: they must stay as they are.
    ``of_one_shape`` says whether all its calls on the example have the same shapes.
    """

    name: str
    example: Example
    plan: T
    lent: frozenset[str] = frozenset()
    of_one_shape: bool = True

    def holds(self, name: str) -> bool:
        """Whether a module of the network lies in the part."""
        return not self.name or name.startswith(f"{self.name}.")

    def inner(self, name: str) -> str:
        """The name in the part of a module of the network."""
        return name.removeprefix(f"{self.name}.") if self.name else name

    def full(self, name: str) -> str:
        """The name in the network of a module of the part."""
        return ".".join(key for key in (self.name, name) if key)

    def full_each(self, names: str) -> str:
        """The same of several, with commas between."""
        return ", ".join(map(self.full, names.split(", ")))

    def within(self, net: nn.Module) -> nn.Module:
        return net.get_submodule(self.name)


@dataclass(frozen=True)
class Found(Generic[T]):
    """The parts of a network, and why each module around them, and each other one with something to edit, is none."""

    parts: list[Part[T]]
    reasons: dict[str, str]

    def told(self) -> str:
        """The reasons for what lies deepest, in one sentence."""
        deepest = [key for key in self.reasons if not any(other.startswith(f"{key}.") for other in self.reasons)]
        shown = [f"'{key}' {self.reasons[key]}" for key in deepest if key][:_SHOWN]
        more = len(deepest) - len(shown)
        return "; ".join(shown) + (f"; and {more} more" if shown and more else "")

    def reason(self, name: str) -> str:
        """Why a module lies in no part: the reason of the innermost module around it."""
        while name not in self.reasons:
            name = name.rpartition(".")[0]
        return f"{'the network' if not name else repr(name)}, in which it is called, {self.reasons[name]}"


def parts_of(
    net: nn.Module,
    example: Example,
    holds: Callable[[nn.Module], bool],
    plan: Callable[[str, Example, frozenset[str]], T],
    error: NotCapturedError,
) -> Found[T]:
    """The largest modules with something to edit that can be captured, in a network that cannot.

    Args:
        net: the network.
        example: what it is called with.
        holds: whether a layer is to be edited.
        plan: what is planned in a module, by its name, what it is called with, and what it lends (`Part.lent`); raises
            what `capture` does.
        error: why the whole cannot be captured.
    """
    found: Found[T] = Found([], {"": error.short})
    try:
        seen = Seen.of(net, example)
    except BatchNormError as failed:
        found.reasons[""] += f", and does not run while reads of its tensors are watched ({failed})"
        return found

    def visit(name: str, module: nn.Module) -> None:
        if is_leaf(module) or not any(map(holds, module.modules())):
            return
        reason = seen.obstacle(name)
        if reason is None:
            try:
                given, lent = seen.given[name], seen.lent(name)
                found.parts.append(Part(name, given, plan(name, given, lent), lent))
                return
            except NotCapturedError as failed:
                reason = failed.short
            except BatchNormError as failed:
                reason = f"cannot be edited by itself ({failed})"
        if name in seen.given:
            found.reasons[name] = reason
        for key, child in module.named_children():
            visit(f"{name}.{key}", child)

    for key, child in net.named_children():
        visit(key, child)
    return found


def parts_called_again(
    net: nn.Module,
    example: Example,
    wanted: Callable[[str, int], bool],
    plan: Callable[[str, Example, frozenset[str]], T],
    counts: Callable[[Part[T]], bool],
) -> list[Part[T]]:
    """The largest modules of a network that are wanted, by name and number of calls, and count once they are captured.

    They may be called with several shapes, see `Part.of_one_shape`.
    """
    try:
        seen = Seen.of(net, example)
    except BatchNormError:
        return []
    parts: list[Part[T]] = []
    for name, calls in sorted(seen.shapes.items()):
        module = net.get_submodule(name)
        if is_leaf(module) or any(part.holds(name) for part in parts) or not wanted(name, len(calls)):
            continue
        if seen.obstacle(name, several_shapes=True) is None:
            given, lent = seen.given[name], seen.lent(name)
            with suppress(BatchNormError):
                part = Part(name, given, plan(name, given, lent), lent, all(call == calls[0] for call in calls))
                parts += [part] if counts(part) else []
    return parts


@dataclass
class Seen:
    """What a run of a network on its example shows of its modules.

    Attributes:
        net: a copy that was run, in evaluation.
        given: what each module that is no layer is called with first, by name.
        shapes: the shapes of all its calls.
        returns: the types that no graph follows among what it gives back.
        reads: the modules that ran while a tensor of a module was read, or the module itself was called, by its name.
        stateless: the modules that have nothing that an edit could change, and no hooks, by identity.
    """

    net: nn.Module
    given: dict[str, Example] = field(default_factory=dict)
    shapes: dict[str, list[list[Any]]] = field(default_factory=dict)
    returns: dict[str, str] = field(default_factory=dict)
    reads: dict[str, set[tuple[str, ...]]] = field(default_factory=dict)
    running: list[str] = field(default_factory=list)
    stateless: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, net: nn.Module, example: Example) -> Seen:
        seen = cls(copy_of(net, training=False))
        without = {id(module): module for module in seen.net.modules() if _is_stateless(module)}
        before = {key: own_state(module) for key, module in without.items()}
        for name, module in seen.net.named_modules():
            module.register_forward_pre_hook(partial(seen._enters, name, is_leaf(module)), with_kwargs=True)
            module.register_forward_hook(partial(seen._leaves, name), always_call=True)
            if not is_compiled(module):
                module.__class__ = _watched(type(module), partial(seen._reads, name))
        run_example(seen.net, example)
        changed = {key for key, module in without.items() if own_state(module) != before[key]}
        whole = (module for key, module in without.items() if not changed & set(map(id, module.modules())))
        seen.stateless = set(map(id, whole))
        return seen

    def obstacle(self, name: str, several_shapes: bool = False) -> str | None:
        """Why a module cannot be edited by itself, in words, or None; whether it may be called with several shapes."""
        if name not in self.given:
            return "is not called on the example"
        inside = dict(self.net.get_submodule(name).named_modules(prefix=name))
        strange = [type(leaf).__name__ for leaf in self.given[name].leaves() if not isinstance(leaf, _PLAIN)]
        if strange:
            return f"is called with a {strange[0]}, into which no graph looks"
        if name in self.returns:
            return f"gives a {self.returns[name]}, into which no graph looks"
        if not several_shapes and any(shapes != self.shapes[name][0] for shapes in self.shapes[name]):
            return "is called with values of several shapes"
        for key, module in inside.items():
            if id(module) not in self.stateless and self._is_reached(key, name):
                return f"is not alone with '{key}', which is called or read from outside it"
        shared = self._shared(name)
        return f"shares '{shared}' with other modules" if shared else None

    def lent(self, name: str) -> frozenset[str]:
        """The modules without state in a module that are registered or called outside it, too."""
        inside = self.net.get_submodule(name).named_modules(prefix=name)
        own = {id(module): key for key, module in inside if id(module) in self.stateless}
        outside = {id(module) for path, module in _things(self.net, "") if not _is_in(path, name)}
        return frozenset(key for mark, key in own.items() if mark in outside or self._is_reached(key, name))

    def _shared(self, name: str) -> str | None:
        """What of a module is registered outside it, too, and has a state."""
        own = {id(thing): path for path, thing in _things(self.net.get_submodule(name), name)}
        for path, thing in _things(self.net, ""):
            if id(thing) in own and id(thing) not in self.stateless and not _is_in(path, name):
                return own[id(thing)]
        return None

    def _is_reached(self, key: str, name: str) -> bool:
        """Whether a module in the module ``name`` is called, or its tensors are read, while that does not run."""
        return any(name not in running for running in self.reads.get(key, ()))

    def _enters(self, name: str, leaf: bool, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not leaf:
            given = Example(args, kwargs)
            self.shapes.setdefault(name, []).append(_shapes(given))
            if name not in self.given:
                self.given[name] = given.map(lambda x: x.detach().clone())
        self.running.append(name)
        self._reads(name)

    def _leaves(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        self.running.pop()
        for _, leaf in leaves_of(output):
            if not isinstance(leaf, _PLAIN):
                self.returns[name] = type(leaf).__name__

    def _reads(self, name: str) -> None:
        if self.running:
            self.reads.setdefault(name, set()).add(tuple(self.running))


def _is_in(path: str, name: str) -> bool:
    return path == name or path.startswith(f"{name}.")


def _is_stateless(module: nn.Module) -> bool:
    """Whether neither a module nor one in it has tensors or hooks."""
    return not any(has_hooks(each) or any(map(_has_tensors, vars(each).values())) for each in module.modules())


def _things(net: nn.Module, prefix: str) -> Iterator[tuple[str, Any]]:
    """The modules and tensors in a module, wherever they are registered, by name."""
    yield from net.named_modules(prefix=prefix, remove_duplicate=False)
    yield from net.named_parameters(prefix, remove_duplicate=False)
    yield from net.named_buffers(prefix, remove_duplicate=False)


def _shapes(call: Example) -> list[Any]:
    return [(x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x for x in call.leaves()]


def _watched(kind: type[nn.Module], note: Callable[[], None]) -> type[nn.Module]:
    """A class whose tensors, also those in lists and mappings, are read under watch."""

    def read(self: nn.Module, name: str) -> Any:
        value = kind.__getattribute__(self, name)
        if not name.startswith("_") and _has_tensors(value):
            note()
        return value

    def missing(self: nn.Module, name: str) -> Any:
        value = kind.__getattr__(self, name)
        if _has_tensors(value):
            note()
        return value

    members = {"__getattribute__": read, "__getattr__": missing, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), members)


def _has_tensors(value: Any) -> bool:
    if isinstance(value, (list, tuple, dict)):
        return any(isinstance(x, Tensor) for x in pytree.tree_leaves(value))
    return isinstance(value, Tensor)
