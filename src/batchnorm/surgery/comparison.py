"""Example inputs, running a network without a trace, and the differences between two outputs."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from batchnorm.errors import InputError, SurgeryError, message_of
from batchnorm.undo import in_mode


@dataclass(frozen=True)
class Example:
    """What a network is called with: positional and keyword arguments."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, value: Any) -> Example:
        """A tuple holds positional arguments, a mapping keyword ones, all else is the input."""
        if isinstance(value, Example):
            return value
        if isinstance(value, Mapping):
            return cls((), {str(key): item for key, item in value.items()})
        return cls(tuple(value) if isinstance(value, tuple) else (value,), {})

    def leaves(self) -> list[Any]:
        return list(pytree.tree_leaves((self.args, self.kwargs)))

    def with_leaves(self, leaves: Sequence[Any]) -> Example:
        args, kwargs = pytree.tree_unflatten(list(leaves), pytree.tree_structure((self.args, self.kwargs)))
        return Example(args, kwargs)

    def map(self, change: Callable[[Tensor], Tensor]) -> Example:
        return self.with_leaves([change(x) if isinstance(x, Tensor) else x for x in self.leaves()])

    def to(self, dtype: torch.dtype) -> Example:
        """The same with floating-point tensors in ``dtype``."""
        return self.map(lambda x: x.to(dtype) if x.is_floating_point() else x)

    def randomized(self, seed: int) -> Example:
        """Normal values with each floating-point tensor's own mean and standard deviation; where
        there is none, the integers of the example in another order."""
        generator = torch.Generator().manual_seed(seed)
        floating = any(isinstance(x, Tensor) and x.is_floating_point() for x in self.leaves())

        def draw(x: Tensor) -> Tensor:
            if x.is_floating_point():
                values = x.double()
                spread = values.std() if x.numel() > 1 else torch.ones((), dtype=torch.float64)
                spread = torch.where(spread > 0, spread, torch.ones_like(spread)).cpu()
                noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
                return (noise * spread + values.mean().cpu()).to(x.device, x.dtype)
            if floating or x.is_complex():
                return x
            order = torch.randperm(x.numel(), generator=generator).to(x.device)
            return x.reshape(-1)[order].reshape(x.shape)

        return self.map(draw)

    def doubled(self) -> Example:
        """The same with every tensor given twice along its first axis, as a batch of twice the size."""
        return self.map(lambda x: torch.cat([x, x]) if x.dim() > 1 else x)

    def run(self, net: nn.Module, gradients: bool = False) -> Any:
        """The network's output on a copy of the example, for a backward if ``gradients``; the random state is kept."""
        fresh = self.map(lambda x: x.detach().clone())
        with random_state_kept(net), torch.set_grad_enabled(gradients):
            return net(*fresh.args, **fresh.kwargs)

    def describe(self) -> str:
        return (
            ", ".join(f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else repr(x) for x in self.leaves())
            or "no input"
        )


@contextlib.contextmanager
def random_state_kept(net: nn.Module) -> Iterator[None]:
    """Give back the random state of torch, Python and NumPy after the body."""
    devices = {t.device for t in (*net.parameters(), *net.buffers()) if t.device.type == "cuda"}
    python = random.getstate()
    numpy = sys.modules.get("numpy")
    legacy = numpy.random.get_state() if numpy is not None else None
    try:
        with torch.random.fork_rng(devices=sorted(devices, key=str)):
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(legacy)


class Draws:
    """Tells whether random numbers of torch, Python or NumPy were drawn since the last look."""

    def __init__(self, net: nn.Module) -> None:
        tensors = (*net.parameters(), *net.buffers())
        self.devices = sorted({t.device for t in tensors if t.device.type == "cuda"}, key=str)
        self.seen = self._states()

    def moved(self) -> bool:
        """Whether they were; the next answer counts from now on."""
        (plain, states), self.seen = self.seen, self._states()
        return plain != self.seen[0] or not all(map(torch.equal, states, self.seen[1]))

    def _states(self) -> tuple[Any, list[Tensor]]:
        numpy = sys.modules.get("numpy")
        legacy = () if numpy is None else tuple(map(_plain_state, numpy.random.get_state()))
        states = [torch.random.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self.devices)]
        return (random.getstate(), legacy), states


def _plain_state(value: Any) -> Any:
    return value.tobytes() if hasattr(value, "tobytes") else value


def seed_all(number: int) -> None:
    """Seed torch, Python and NumPy."""
    torch.manual_seed(number)
    random.seed(number)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(number)


def copy_of(net: nn.Module, training: bool | None = None) -> nn.Module:
    """A deep copy in that mode (None: as its modules are), or a ``SurgeryError`` that names what can't be copied."""
    groups = (getattr(module, "process_group", None) for module in net.modules())  # handles, which have no copies
    try:
        twin = copy.deepcopy(net, {id(group): group for group in groups})
    except Exception as error:
        computed = [
            f"{name}.{key}".lstrip(".")
            for name, module in net.named_modules()
            for key, value in module.__dict__.items()
            if isinstance(value, Tensor) and not value.is_leaf
        ]
        cause = (
            f"{', '.join(computed)} is computed from other parameters; remove that computation "
            "first (torch.nn.utils.remove_weight_norm, remove_spectral_norm or prune.remove)"
            if computed
            else f"copy.deepcopy failed with {type(error).__name__}: {error}"
        )
        raise SurgeryError(f"the network cannot be copied: {cause}") from error
    return twin if training is None else in_mode(twin, training)


def run_example(net: nn.Module, example: Example, gradients: bool = False) -> Any:
    """``example.run(net, gradients)``, or an ``InputError`` that shows the example."""
    try:
        return example.run(net, gradients)
    except Exception as error:
        raise InputError(
            f"the network fails on the example ({example.describe()}): {type(error).__name__}: "
            f"{message_of(error)}. Give an input that the network takes: a tensor, a tuple of positional "
            "arguments or a dict of keyword arguments."
        ) from error


class _Narrowing(TorchDispatchMode):
    """Notes whether any operation gives a floating-point tensor narrower than float64."""

    seen: bool = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in pytree.tree_leaves(result):
            self.seen |= bool(isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64)
        return result


def narrows(net: nn.Module, example: Example) -> bool:
    """Whether a float64 network rounds to a narrower type on the way, as one with ``x.float()`` in its forward."""
    mode = _Narrowing()
    with mode:
        example.run(net)
    return mode.seen


def leaves_of(value: Any, path: str = "output") -> Iterator[tuple[str, Any]]:
    """What mappings, sequences and data classes hold, at any depth, each with its path."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves_of(item, f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from leaves_of(item, f"{path}[{index}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for key in dataclasses.fields(value):
            yield from leaves_of(getattr(value, key.name), f"{path}.{key.name}")
    else:
        yield path, value


def tensors_of(value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a nested output, each with its path."""
    return ((path, leaf) for path, leaf in leaves_of(value) if isinstance(leaf, Tensor))


@dataclass(frozen=True)
class Distance:
    """Largest absolute difference, and that relative to the largest expected magnitude; for
    integers and booleans, the relative difference is the share of unequal elements."""

    output: str
    absolute: float
    relative: float


def distances(expected: Any, actual: Any, *, dtype: torch.dtype | None = None) -> list[Distance]:
    """The distance of every tensor in two outputs of one structure, floating-point tensors first
    cast to ``dtype`` where one is given.

    Raises:
        SurgeryError: when the structures, shapes or dtypes differ.
    """
    a, b = list(tensors_of(expected)), list(tensors_of(actual))
    if [path for path, _ in a] != [path for path, _ in b]:
        raise SurgeryError(f"the outputs are {[p for p, _ in b]}, expected {[p for p, _ in a]}")
    return [_distance(path, _cast(x, dtype), _cast(y, dtype)) for (path, x), (_, y) in zip(a, b, strict=True)]


def _cast(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return x if dtype is None or not x.is_floating_point() else x.to(dtype)


def _distance(path: str, expected: Tensor, actual: Tensor) -> Distance:
    if expected.dtype != actual.dtype:
        raise SurgeryError(f"{path} has {actual.dtype} where the original has {expected.dtype}")
    if expected.shape != actual.shape:
        raise SurgeryError(
            f"{path} has the shape {tuple(actual.shape)} where the original has {tuple(expected.shape)}. Where "
            "values decide how many there are (a threshold, a match), rounding can: give an example that lies further "
            "from the limit, or edit the part of the network before it"
        )
    if expected.numel() == 0:
        return Distance(path, 0.0, 0.0)
    wide = torch.complex128 if expected.is_complex() else torch.float64
    x, y = expected.detach().to("cpu", wide), actual.detach().to("cpu", wide)
    same = (x == y) | (x.isnan() & y.isnan())
    difference = torch.where(same, 0.0, (x - y).abs())
    absolute = float("inf") if bool(difference.isnan().any()) else float(difference.max())
    if not (expected.is_floating_point() or expected.is_complex()):
        return Distance(path, absolute, float((~same).double().mean()))
    finite = x.abs()[x.isfinite()]
    size = float(finite.max()) if finite.numel() else 0.0
    if absolute == 0.0:
        return Distance(path, 0.0, 0.0)
    return Distance(path, absolute, absolute / size if size > 0 else float("inf"))
