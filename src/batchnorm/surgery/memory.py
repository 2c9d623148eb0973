"""Which outputs of batch normalization a network keeps for its backward, chosen by their sizes and a budget of time."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from batchnorm.errors import InputError, SurgeryError
from batchnorm.nn.batch_norm import BatchNorm
from batchnorm.nn.outside import LOOKS_ON
from batchnorm.ops.context import is_compiled
from batchnorm.ops.recomputation import Remade, recompute_outputs, with_convolution
from batchnorm.surgery.comparison import Example, copy_of, random_state_kept, run_example
from batchnorm.surgery.modules import unwrap

_ROUNDS = 3


@dataclass(frozen=True)
class Output:
    """The output of one layer.

    Attributes:
        bytes: its size on the example, and that of the layer's input if a convolution makes that again.
        seconds: the time that it takes to make them again, measured.
        remade: whether they are made again in the backward, or else kept.
    """

    bytes: int
    seconds: float
    remade: bool


@dataclass(frozen=True)
class MemoryPlan:
    """What `save_memory` chose.

    Attributes:
        outputs: of each layer, by name.
        step: seconds of a training step on the example.
        budget: the share of it that may be spent.
    """

    outputs: dict[str, Output]
    step: float
    budget: float

    @property
    def saved(self) -> int:
        """Bytes of the outputs that are not kept."""
        return sum(each.bytes for each in self.outputs.values() if each.remade)

    @property
    def seconds(self) -> float:
        """What making them again takes."""
        return sum(each.seconds for each in self.outputs.values() if each.remade)

    def __str__(self) -> str:
        total, remade = (
            sum(each.bytes for each in self.outputs.values()),
            [o for o in self.outputs.values() if o.remade],
        )
        share = self.seconds / self.step if self.step else 0.0
        lines = [
            f"Of {len(self.outputs)} outputs of batch normalization ({total / 1e6:.1f} MB on the example) {len(remade)}"
            f" ({self.saved / 1e6:.1f} MB) are made again, in {share:.1%} of a step's time (budget {self.budget:.0%})."
        ]
        for name, each in self.outputs.items():
            what = "made again" if each.remade else "kept"
            lines.append(f"  {name}: {each.bytes / 1e6:.2f} MB, {each.seconds * 1e3:.2f} ms: {what}")
        return "\n".join(lines)


def save_memory(net: nn.Module, example: Any, *, budget: float = 0.05) -> MemoryPlan:
    """Let a network make outputs of batch normalization again in its backward, where that takes little time.

    The layer behind a batch normalization keeps its input for its own backward. Each output that is made again instead,
    with the same bits, costs one more normalization, or a cheap convolution with it (see `recompute_outputs`, which
    covers all of them for a time).
    This function measures a training step on the example, and what each output would take. It then chooses those
    that free the most bytes for their time, until the budget is spent. From then on each forward of ``net`` in training
    mode that records gradients does so. Nothing else changes: neither parameters, nor statistics, nor results. Another
    call chooses anew. ``budget=0`` keeps every output, as before the first call.

    Fuse first: ``save_memory(accelerate(net, example), example)``.

    Args:
        net: the network, with layers of this package.
        example: an input that it can be trained on: a tensor, a tuple of positional or a mapping of keyword arguments.
            Its batch should be like those of the training.
        budget: the share of a step's time that may be spent, at least 0; 0.05 is one twentieth.

    Returns:
        The plan; ``print(plan)`` shows it.

    Raises:
        InputError: a negative budget, no module, or an example that the network fails on.
        SurgeryError: no layer of this package.

    Source: Chen et al. 2016 (recomputation); Rota Bulò et al. 2018 (of batch normalization).

    Examples:
        >>> from batchnorm import BatchNorm2d
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), BatchNorm2d(8, activation="relu"), nn.Conv2d(8, 8, 3))
        >>> plan = save_memory(net, torch.randn(2, 3, 8, 8), budget=1.0)
        >>> plan.outputs["1"].remade
        True
    """
    root = unwrap(net, "save_memory")
    if not budget >= 0:
        raise InputError(f"save_memory: budget is a share of a step's time and must be at least 0, got {budget}")
    layers = {name: layer for name, layer in root.named_modules() if isinstance(layer, BatchNorm)}
    if not layers:
        raise SurgeryError(
            "save_memory: the network has no batch normalization of this package; bn.accelerate it first"
        )
    step, measured = _measured(root, list(layers), Example.of(example))
    plan = MemoryPlan(_chosen(measured, step * budget), step, budget)
    for name, layer in layers.items():
        layer.keeps_output = name not in plan.outputs or not plan.outputs[name].remade
    _detach(root)
    if any(each.remade for each in plan.outputs.values()):
        root.register_forward_pre_hook(_enter)
        root.register_forward_hook(_leave, always_call=True)
    return plan


# The time for making outputs again if nobody set a budget: this share of a step's time by the estimate below, in
# which a core computes so many operations in the time in which it moves one byte.
_SHARE = 0.04
_OPERATIONS_A_BYTE = 8


@torch.no_grad()
def remake_what_costs_little(root: nn.Module, example: Example, convolved: Collection[str] = ()) -> dict[str, int]:
    """Lets the largest outputs be made again whose making takes a small share of a step, by sizes alone.

    A step is taken as three times the products of convolutions and linear layers and six passes over what is
    normalized; an output made again, as two passes over it, or four with the depthwise convolution of the layers
    ``convolved``. Outputs with a residual are kept.

    Returns:
        The bytes of each output that is made again, by the layer's name.
    """
    twin = copy_of(root, training=False)
    _detach(twin)
    sizes: dict[str, int] = {}
    work = [0.0]
    for name, module in twin.named_modules():
        if isinstance(module, BatchNorm):
            module.register_forward_hook(_sizing(sizes, work, name), with_kwargs=True)
        elif isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
            module.register_forward_hook(_counting(work))
    with random_state_kept(twin):
        run_example(twin, example)
    left, remade = _SHARE * work[0], {}
    for name in sorted(sizes, key=lambda n: sizes[n], reverse=True):
        cost = (4 if name in convolved else 2) * sizes[name]
        if cost <= left:
            left -= cost
            remade[name] = sizes[name]
    for name in remade:
        layer = root.get_submodule(name)
        assert isinstance(layer, BatchNorm)
        layer.keeps_output = False
    return remade


def _sizing(sizes: dict[str, int], work: list[float], name: str) -> Any:
    def note(_: nn.Module, args: Any, kwargs: Any, y: Any) -> None:
        if isinstance(y, Tensor) and not y.is_nested:
            size = y.numel() * y.element_size()
            work[0] += 6 * size
            if len(args) < 2 and kwargs.get("residual") is None:
                sizes[name] = sizes.get(name, 0) + size

    return note


def _counting(work: list[float]) -> Any:
    def count(module: nn.Module, args: Any, y: Any) -> None:
        if isinstance(y, Tensor) and isinstance(module.weight, Tensor) and module.weight.numel():
            products = y.numel() * (module.weight.numel() // module.weight.shape[0])
            work[0] += 3 * 2 * products / _OPERATIONS_A_BYTE

    return count


def _chosen(measured: dict[str, tuple[int, float]], seconds: float) -> dict[str, Output]:
    """Those that free the most bytes for their time first, while the time lasts."""
    remade, left = set(), seconds
    for name in sorted(measured, key=lambda n: measured[n][0] / max(measured[n][1], 1e-9), reverse=True):
        if measured[name][1] <= left:
            remade.add(name)
            left -= measured[name][1]
    return {name: Output(*each, name in remade) for name, each in measured.items()}


def _measured(root: nn.Module, names: list[str], example: Example) -> tuple[float, dict[str, tuple[int, float]]]:
    """Seconds of a step of a copy in training mode; bytes of each layer's output and seconds to make it again."""
    twin = copy_of(root, training=True)
    _detach(twin)
    noted: dict[str, Noted] = {}
    hooks = [twin.get_submodule(name).register_forward_hook(_noting(noted, name), with_kwargs=True) for name in names]
    for layer in twin.modules():
        if isinstance(layer, BatchNorm):
            layer.keeps_output = None
    with random_state_kept(twin), torch.enable_grad():
        with recompute_outputs():
            training_step(twin, example)
        for hook in hooks:
            hook.remove()
        took = min(training_step(twin, example) for _ in range(2))
    known: dict[Layout, float] = {}
    found = {}
    for name, (layout, has_residual, convolution) in noted.items():
        size = math.prod(layout.shape) * layout.dtype.itemsize
        if convolution is not None:  # once for the output, and once for the input, if that is freed, too
            times = 2 if convolution.frees_input else 1
            found[name] = (times * size, times * convolution.seconds)
            continue
        if layout not in known:
            known[layout] = _normalization(layout)
        # With a residual, that is made again first.
        found[name] = (size, known[layout] * (2 if has_residual else 1))
    return took, found


class Layout(NamedTuple):
    """How an output lies in memory."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Noted(NamedTuple):
    """The output of a layer; and what making it again takes, if a convolution is made for it."""

    layout: Layout
    has_residual: bool
    convolution: Remade | None


def _noting(noted: dict[str, Noted], name: str) -> Any:
    def note(_: nn.Module, args: Any, kwargs: Any, y: Any) -> None:
        if name not in noted and isinstance(y, Tensor) and not y.is_nested and y.ndim > 1:
            residual = args[1] if len(args) > 1 else kwargs.get("residual")
            layout = Layout(tuple(y.shape), y.stride(), y.dtype, y.device)
            noted[name] = Noted(layout, residual is not None, with_convolution(y))

    setattr(note, LOOKS_ON, True)
    return note


def training_step(net: nn.Module, example: Example) -> float:
    """Seconds of a forward and a backward."""
    begin = time.perf_counter()
    output = run_example(net, example, gradients=True)
    losses = [x.float().sum() for x in pytree.tree_leaves(output) if isinstance(x, Tensor) and x.requires_grad]
    if losses:
        torch.stack(losses).sum().backward()
    net.zero_grad(set_to_none=True)
    _wait()
    return time.perf_counter() - begin


@torch.no_grad()
def _normalization(layout: Layout) -> float:
    """Seconds that it takes to make such an output."""
    x = torch.empty_strided(layout.shape, layout.strides, dtype=layout.dtype, device=layout.device).zero_()
    statistics = torch.ones(1, x.shape[1], dtype=torch.float64, device=x.device)
    seconds = []
    for _ in range(_ROUNDS):
        begin = time.perf_counter()
        torch.ops.batchnorm.normalize(x, statistics, statistics, None, None, None, 0, 1e-5, 1, 0.0, False)
        _wait()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


# ---------------------------------------------------------------------------------------------- hooks on the network
_active = threading.local()


def _contexts() -> list[Any]:
    if not hasattr(_active, "contexts"):
        _active.contexts = []
    contexts: list[Any] = _active.contexts
    return contexts


def _enter(module: nn.Module, args: Any) -> None:
    if is_compiled():
        return
    context = recompute_outputs() if module.training and torch.is_grad_enabled() else None
    if context is not None:
        context.__enter__()
    _contexts().append(context)


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    if is_compiled():
        return
    contexts = _contexts()
    context = contexts.pop() if contexts else None
    if context is not None:
        context.__exit__(None, None, None)


def _detach(module: nn.Module) -> None:
    """Removes the hooks of `save_memory`."""
    for registry, own in ((module._forward_pre_hooks, _enter), (module._forward_hooks, _leave)):
        for key in [key for key, hook in registry.items() if hook is own]:
            del registry[key]
    for key in [key for key in module._forward_hooks_always_called if key not in module._forward_hooks]:
        del module._forward_hooks_always_called[key]
