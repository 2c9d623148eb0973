"""Batch normalization that others froze: modules of any class that hold four vectors and apply them.

Detection networks normalize with fixed statistics, by classes such as ``FrozenBatchNorm2d``: each package has its own.
They are known by the names of their four tensors and by what a trial run on copies gives. ``eps`` is found by the
trial, too: some classes write it into their forward alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.nn.outside import has_hooks

TENSORS = ("weight", "bias", "running_mean", "running_var")
NORM = "norm"
"""The name of the normalization in what is `opened`."""
_SHAPES = ((3, 3), (), (5,), (2, 2, 2))  # of space, the likeliest first
_AGREES = 1e-4  # of a term: a forward may compute in float32


class FrozenNorm(nn.Module):
    """``(x - running_mean) / sqrt(running_var + eps) * weight + bias`` by channel, in training and in evaluation."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, layer: nn.Module, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self._buffers, self._parameters = dict(layer._buffers), dict(layer._parameters)

    def forward(self, input: Tensor) -> Tensor:
        shape = [-1] + [1] * (input.dim() - 2)
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return input * scale.view(shape) + (self.bias - self.running_mean * scale).view(shape)


def looks_frozen(module: nn.Module) -> bool:
    """Whether a module that is no batch normalization of torch's holds just its four tensors, by name and shape."""
    if isinstance(module, _BatchNorm):
        return False
    own: dict[str, Any] = {**module._parameters, **module._buffers}
    if own.keys() - {"num_batches_tracked"} != set(TENSORS):
        return False
    tensors = [own[name] for name in TENSORS]
    one_row = all(isinstance(t, Tensor) and t.dim() == 1 and t.is_floating_point() for t in tensors)
    return one_row and len({len(t) for t in tensors}) == 1 and not any(True for _ in _inner_tensors(module))


def _inner_tensors(module: nn.Module) -> Iterator[Tensor]:
    for child in module.children():
        yield from child.parameters()
        yield from child.buffers()


def is_frozen_norm(module: nn.Module) -> bool:
    """Whether a module of any class is batch normalization with fixed statistics, and nothing more."""
    return looks_frozen(module) and not module._modules and not _is_seen(module) and eps_of(module) is not None


def is_frozen_layer(module: nn.Module) -> bool:
    """Whether a module of any class is that, or that and its children behind it."""
    return looks_frozen(module) and (is_frozen_norm(module) or opened(module) is not None)


def told_of_frozen(net: nn.Module) -> str:
    """For a network without batch normalization of torch's: that its layers are frozen by their class, or nothing."""
    found = [(name, module) for name, module in net.named_modules() if is_frozen_layer(module)]
    if not found:
        return ""
    name, module = found[0]
    return (
        f" but {len(found)} layers whose class is frozen, such as '{name}', a {type(module).__qualname__}: they keep "
        "their statistics in training, and bn.fold takes them; for layers that train, build the network with torch.nn's"
    )


def _is_seen(module: nn.Module) -> bool:
    return any(has_hooks(each) for each in module.modules())


def eps_of(module: nn.Module) -> float | None:
    """The eps of a frozen layer, found by a trial run; None if the layer computes something else.

    With mean 0, variance 0, gamma 1 and beta 0 the layer multiplies by 1 / sqrt(eps). Whether it then computes
    ``(x - mean) / sqrt(var + eps) * gamma + beta`` is seen on random numbers, with variances near eps and near 1.
    Its children are left out of the trial.
    """
    if not looks_frozen(module):
        return None
    try:
        with torch.no_grad():
            twin = _plain(module)
            for space in _SHAPES:
                eps = _trial(twin, space, getattr(module, "eps", None))
                if eps is not None:
                    return eps
    except Exception:  # whatever a forward of any class raises
        return None
    return None


def _plain(module: nn.Module) -> Any:
    """A copy on the CPU in float64 whose children do nothing."""
    twin = copy.deepcopy(module).to("cpu", torch.float64)
    for name in twin._modules:
        twin._modules[name] = nn.Identity()
    return twin


def _trial(twin: Any, space: tuple[int, ...], given: Any) -> float | None:
    channels = len(twin.weight)
    _load(twin, *(torch.full((channels,), value, dtype=torch.float64) for value in (1.0, 0.0, 0.0, 0.0)))
    ones = torch.ones(2, channels, *space, dtype=torch.float64)
    try:
        gain = twin(ones.clone()).double()
    except Exception:  # another rank
        return None
    if gain.shape != ones.shape:
        return None
    first = float(gain.flatten()[0])
    if not bool(gain.isfinite().any()):
        eps = 0.0  # 1 / 0
    elif first > 0 and bool((gain == first).all()):
        eps = first**-2
        eps = next((e for e in (given, float(f"{eps:.6g}")) if isinstance(e, float) and _close(e, eps)), eps)
    else:
        return None
    return eps if all(_computes(twin, space, eps, near) for near in (eps or 1e-5, 1.0)) else None


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-5 * max(abs(a), abs(b))


def _computes(twin: Any, space: tuple[int, ...], eps: float, near: float) -> bool:
    generator = torch.Generator().manual_seed(0)
    channels = len(twin.weight)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weight, bias, mean, spread = (draw(channels) for _ in range(4))
    var = near * torch.exp(spread)
    _load(twin, weight, bias, mean, var)
    x = draw(2, channels, *space)
    shape = [-1] + [1] * len(space)
    scale = (weight * (var + eps).rsqrt()).view(shape)
    terms = x * scale, mean.view(shape) * scale, bias.view(shape)
    size = sum(term.abs() for term in terms)
    y = twin(x.clone())
    return y.shape == x.shape and bool(((y - (terms[0] - terms[1] + terms[2])).abs() <= _AGREES * size).all())


def _load(twin: Any, *values: Tensor) -> None:
    for name, value in zip(TENSORS, values, strict=True):
        getattr(twin, name).copy_(value)


def opened(module: nn.Module) -> nn.Sequential | None:
    """A frozen layer that calls its children behind the normalization, as normalization and children; None for others.

    Such is a class that has an activation and dropout: each child is called once, on what the one before it gave.
    """
    eps = eps_of(module) if module._modules and looks_frozen(module) and not _is_seen(module) else None
    if eps is None:
        return None
    try:
        order = _order(module)
    except Exception:  # whatever a forward of any class raises
        return None
    if order is None:
        return None
    children = [(name, module._modules[name]) for name in order]
    made = nn.Sequential()
    made.add_module(NORM, FrozenNorm(module, eps).train(module.training))
    for name, child in children:
        assert child is not None
        made.add_module(f"{name}_" if name == NORM else name, child)
    made.training = module.training
    return made


def _order(module: nn.Module) -> list[str] | None:
    """The names of the children in the order of their calls, if each takes what the one before gave."""
    twin: Any = copy.deepcopy(module).to("cpu", torch.float64)
    plain = _plain(module)
    calls: list[tuple[str, Tensor]] = []
    results: list[Tensor] = []

    def before(name: str) -> Any:
        return lambda child, args: calls.append((name, args[0].clone())) if len(args) == 1 else calls.append(("", args))

    def after(child: nn.Module, args: Any, result: Any) -> None:
        results.append(result.clone())

    for name, child in twin.named_children():
        child.eval()
        child.register_forward_pre_hook(before(name))
        child.register_forward_hook(after)
    for space in _SHAPES:
        calls.clear()
        results.clear()
        x = torch.randn(2, len(twin.weight), *space, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        try:
            with torch.no_grad():
                y, normalized = twin(x.clone()), plain(x.clone())
        except Exception:  # another rank
            continue
        names = [name for name, _ in calls]
        passed = [normalized, *results]
        in_line = all(torch.equal(given, value) for (_, given), value in zip(calls, passed, strict=False))
        if "" in names or len(set(names)) != len(names) or not in_line or not torch.equal(y, passed[-1]):
            return None
        return names
    return None
