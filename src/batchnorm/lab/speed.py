"""This package's layer beside torch's, on shapes of the user's choice: first whether it is right, then how fast."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from batchnorm import reference
from batchnorm.errors import InputError
from batchnorm.lab.timing import Phases, alternate
from batchnorm.nn.batch_norm import BY_RANK

SHAPES: tuple[tuple[int, ...], ...] = ((1024, 256), (32, 64, 56, 56), (32, 256, 14, 14), (16, 128, 400))
DTYPES = ("float32", "bfloat16", "float16", "float64")
PHASES = ("training step", "training forward", "inference")
LIMIT = 16.0
"""Units in the last place of 1 + |true| that our result may be off, unless torch's is further off."""

_TORCH = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@dataclass(frozen=True)
class Timing:
    """One phase on one shape.

    Attributes:
        phase: "training step" is forward and backward, "training forward" without a graph.
        torch, ours: milliseconds, medians of runs that took turns.
        torch_error, our_error: against float64, in units in the last place of 1 + |true|: outputs, running statistics
            and, for a training step, all gradients.
    """

    shape: tuple[int, ...]
    dtype: str
    phase: str
    torch: float
    ours: float
    torch_error: float
    our_error: float

    @property
    def ratio(self) -> float:
        """How many times as fast as torch's layer ours is."""
        return self.torch / self.ours

    @property
    def is_right(self) -> bool:
        """Whether our error is within `LIMIT`, or no more than torch's; the times of others tell nothing."""
        return self.our_error <= max(LIMIT, self.torch_error)


def compare(
    shapes: Sequence[Sequence[int]] = SHAPES, *, dtype: str = "float32", device: str = "cpu", seconds: float = 0.5
) -> Iterator[Timing]:
    """Batch normalization of (N, C, *space) by torch's layer and by ours, in turn, with gamma and beta.

    Args:
        shapes: two to five sizes each, N the first, C the second.
        dtype: of input, gamma and beta: "float32", "bfloat16", "float16" or "float64".
        device: of torch.
        seconds: about how long each phase is measured at most.

    Yields:
        A `Timing` a shape and phase, as soon as it is there.

    Raises:
        InputError: a shape, dtype or device that there is not; before anything is measured.
    """
    wanted = [tuple(shape) for shape in shapes]
    for shape in wanted:
        if not 2 <= len(shape) <= 5 or min(shape) < 1 or np.prod(shape) < 2 * shape[1]:
            raise InputError(f"bench: shape {shape}; expected (N, C, *space), 2 to 5 sizes, 2 values a channel or more")
    if dtype not in DTYPES:
        raise InputError(f"bench: dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    if not seconds > 0:
        raise InputError(f"bench: {seconds} seconds; expected more than 0")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # how torch says that it was built without a device
        raise InputError(f"bench: device {device!r} cannot be used: {error}") from error
    return _compare(wanted, dtype, device, seconds)


def _compare(shapes: list[tuple[int, ...]], dtype: str, device: str, seconds: float) -> Iterator[Timing]:
    for shape in shapes:
        case = _Case(shape, dtype, device)
        for phase in PHASES:
            layers = {"torch": case.torch, "ours": case.ours}
            errors = [case.error(layer, phase) for layer in layers.values()]
            calls = {name: _timed(case.call(layer, phase), device) for name, layer in layers.items()}
            times, _ = alternate(calls, seconds)
            yield Timing(shape, dtype, phase, *(1e3 * times[name]["call"] for name in layers), *errors)


class _Case:
    """Data and layers of one shape, and what they should give."""

    def __init__(self, shape: tuple[int, ...], dtype: str, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.options: dict[str, Any] = {"device": device, "dtype": self.dtype}

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).to(**self.options)

        self.x, self.dy = draw(*shape), draw(*shape)
        self.affine = [1 + 0.1 * draw(shape[1]), draw(shape[1])]
        rank = max(1, len(shape) - 2)
        self.torch, self.ours = self.layer(_TORCH[rank]), self.layer(BY_RANK[rank])

    def layer(self, kind: type[nn.Module]) -> nn.Module:
        layer: Any = kind(self.x.shape[1], **self.options)
        with torch.no_grad():
            layer.weight.copy_(self.affine[0])
            layer.bias.copy_(self.affine[1])
        return layer  # type: ignore[no-any-return]

    def call(self, layer: nn.Module, phase: str) -> Callable[[], Any]:
        layer.train(phase != "inference")
        if phase != "training step":
            return torch.no_grad()(lambda: layer(self.x))
        x = self.x.clone().requires_grad_()

        def step() -> None:
            torch.autograd.grad(layer(x), (x, *layer.parameters()), self.dy)

        return step

    def error(self, layer: Any, phase: str) -> float:
        """The largest error of everything that the phase makes."""
        fresh = self.layer(type(layer)).train(phase != "inference")
        x = self.x.clone().requires_grad_()
        y = fresh(x)
        arrays = [t.detach().double().cpu().numpy() for t in (self.x, *self.affine)]
        pairs: list[tuple[Tensor, Any]] = []
        if phase == "inference":
            true = reference.inference(arrays[0], np.zeros(x.shape[1]), np.ones(x.shape[1]), *arrays[1:], eps=layer.eps)
            pairs.append((y, true.y))
        else:
            pairs.append((y, reference.batch_norm(*arrays, eps=layer.eps).y))
            running = reference.running_statistics([arrays[0]])
            pairs += [(fresh.running_mean, running.mean), (fresh.running_var, running.var)]  # type: ignore[list-item]
        worst = max(self.off(given, true) for given, true in pairs)
        if phase == "training step":
            given = torch.autograd.grad(y, (x, *fresh.parameters()), self.dy)
            dy = self.dy.double().cpu().numpy()
            gradients = reference.backward(dy, arrays[0], arrays[1], eps=layer.eps)
            root = (x.numel() / x.shape[1]) ** 0.5  # of a sum's size, and so of its rounding
            sums = zip(given[1:], (gradients.dgamma, gradients.dbeta), strict=True)
            worst = max(worst, self.off(given[0], gradients.dx), *(self.off(*pair, root) for pair in sums))
        return worst

    def off(self, given: Tensor, true: Any, scale: float = 1.0) -> float:
        """In units in the last place of ``scale + |true|``; infinite for what is no number."""
        error = np.abs(given.detach().double().cpu().numpy() - true) / (scale + np.abs(true))
        worst = float(error.max()) / torch.finfo(given.dtype).eps
        return worst if worst == worst else float("inf")


def _timed(call: Callable[[], Any], device: str) -> Callable[[], Phases]:
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None

    def run() -> Phases:
        wait()
        begin = time.perf_counter()
        call()
        wait()
        return {"call": time.perf_counter() - begin}

    return run
