"""The wall figures: a module as a user calls it, with gradients and fresh outputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm
from batchnorm.ops import schemas

from . import oracle
from .cases import CONVOLUTIONS, DENSE, EPS, FUSIONS, LYING, SMALL, TURNED, Case, Data, draw, grid, turned
from .rows import Row, compare
from .timing import PAUSE, Phases, alternate, both_phases

TORCH = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
OURS = {
    2: batchnorm.BatchNorm1d, 3: batchnorm.BatchNorm1d, 4: batchnorm.BatchNorm2d, 5: batchnorm.BatchNorm3d,
}  # fmt: skip
BOTH = "forward+backward"
NEVER_IN_PLACE = ("gelu", "sigmoid", "tanh")


class Apart(nn.Module):
    """Batch norm, then the addition and the activation in place, as torchvision writes them."""

    def __init__(self, norm: nn.Module, activation: str | None) -> None:
        super().__init__()
        self.norm, self.activation = norm, activation

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.norm(x)
        if residual is not None:
            y += residual
        if self.activation is None:
            return y
        if self.activation == "gelu_tanh":
            return F.gelu(y, approximate="tanh")
        in_place = {} if self.activation in NEVER_IN_PLACE else {"inplace": True}
        return getattr(F, self.activation)(y, **in_place)  # type: ignore[no-any-return]


def module(name: str, case: Case, data: Data) -> nn.Module:
    """The contestant `name`: torch, compile, ours (not fused), ours fused."""
    rank, channels = len(case.shape), case.shape[1]
    if name == "ours fused":
        norm = built = OURS[rank](channels, eps=EPS, activation=case.activation)
    else:
        norm = (OURS if name == "ours" else TORCH)[rank](channels, eps=EPS)
        built = Apart(norm, case.activation) if case.activation or case.adds else norm
    with torch.no_grad():
        norm.weight.copy_(data.weight)
        norm.bias.copy_(data.bias)
    if case.dtype == "float64":
        norm.double()  # torch's layers take no float64 beside float32
    if name == "compile":
        torch._dynamo.reset()
        built.compile(fullgraph=True, dynamic=False)
    return built


class Step:
    """Forward and backward of one module on one case."""

    def __init__(self, name: str, case: Case, data: Data) -> None:
        self.module, self.case = module(name, case, data), case
        self.x, self.dy = data.x.detach().requires_grad_(), data.dy
        self.inputs = (self.x, data.residual.detach().requires_grad_()) if case.adds else (self.x,)
        self.leaves = [*self.inputs, *self.module.parameters()]

    def run(self) -> Phases:
        return both_phases(lambda: self.module(*self.inputs), self.dy, self.leaves)

    def result(self) -> dict[str, Tensor]:
        """What the gate looks at."""
        y = self.module(*self.inputs)
        y.backward(self.dy)
        grads = [leaf.grad for leaf in self.leaves]
        for leaf in self.leaves:
            leaf.grad = None
        names = ["dx", *(["residual"] if self.case.adds else []), "weight", "bias"]
        return {"y": y, **dict(zip(names, grads, strict=True))}


class Frozen(Step):
    """The same through constant statistics, where gamma and beta want no gradient."""

    def __init__(self, name: str, case: Case, data: Data) -> None:
        super().__init__(name, case, data)
        self.module.eval().requires_grad_(False)
        self.leaves = [*self.inputs]

    def result(self) -> dict[str, Tensor]:
        y = self.module(*self.inputs)
        y.backward(self.dy)
        result = {"y": y.detach(), "dx": self.x.grad}
        self.x.grad = None
        return result


class Turned(Step):
    """The same of a leaf (N, L, C) or (L, N, C), which is seen as (N, C, L) for the layer, and so is its gradient."""

    def __init__(self, name: str, case: Case, data: Data) -> None:
        super().__init__(name, case, data)
        self.layer, self.module = self.module, self._module
        self.inputs = tuple(turned(t.detach(), case.order).requires_grad_() for t in self.inputs)
        self.leaves = [*self.inputs, *self.layer.parameters()]
        self.dy = turned(self.dy, case.order)

    def _module(self, *inputs: Tensor) -> Tensor:
        order = self.case.order
        return turned(self.layer(*(turned(t, order, back=True) for t in inputs)), order)

    def result(self) -> dict[str, Tensor]:
        found = super().result()
        return {k: t if t.ndim == 1 else turned(t, self.case.order, back=True) for k, t in found.items()}


class Inference:
    """One module in evaluation mode, without gradients."""

    def __init__(self, name: str, case: Case, data: Data) -> None:
        self.module, self.x = module(name, case, data).eval(), data.x

    def run(self) -> Phases:
        with torch.no_grad():
            begin = time.perf_counter()
            y = self.module(self.x)
            took = time.perf_counter() - begin
        del y
        return {"inference": took}

    def result(self) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"y": self.module(self.x)}


def measure(
    case: Case, contestants: tuple[str, ...], seconds: float, suite: str = "wall", mode: str = "training"
) -> Iterator[Row]:
    """The rows of a case: of the contestants whose result is right. `mode` is training, inference or frozen."""
    data, columns = draw(case), {"suite": suite, **case.columns()}
    inference = mode == "inference"
    if mode == "frozen":
        columns["mode"] = mode
    step = Turned if case.order in TURNED else Step
    make = {"training": step, "inference": Inference, "frozen": Frozen}[mode]
    runs: dict[str, Callable[[], Phases]] = {}
    errors = {}
    for name in contestants:
        contestant = make(name, case, data)
        try:
            errors[name] = oracle.check(case, name, contestant.result(), population=mode != "training")
        except oracle.WrongResultError as wrong:
            yield {**columns, "direction": "inference" if inference else BOTH, "contestant": name, "absent": str(wrong)}
        else:
            runs[name] = contestant.run
    times, rounds = alternate(runs, seconds, pause=PAUSE if "compile" in runs else 0)
    yield from compare({**columns, "rounds": rounds}, times, errors)


COMPILED = (
    Case(CONVOLUTIONS[0], "float32", "planar", "bn+add+relu"),
    Case(CONVOLUTIONS[2], "float32", "planar", "bn+relu"),
    Case(CONVOLUTIONS[2], "bfloat16", "channels_last", "bn+add+relu"),
    Case(SMALL[0], "float32", "dense", "bn+relu"),
)
"""The cases that torch.compile takes part in: compiling one takes about as long as all other figures of five."""


ACTIVATIONS = schemas.ACTIVATIONS[1:]  # without the identity
OF_NETWORKS = ((16, 96, 48, 48), (8, 240, 12, 12), (8, 1152, 3, 3))
"""Inputs as layers of MobileNet and EfficientNet have them: not in the cache; in it; of short planes."""


def activation_cases(quick: bool) -> list[Case]:
    """Every activation, fused into training."""
    activations, shapes = (("relu6", "silu"), OF_NETWORKS[1:2]) if quick else (ACTIVATIONS, OF_NETWORKS)
    return grid(shapes, ("float32", "bfloat16"), [f"bn+{each}" for each in activations])


def order_cases(quick: bool) -> list[Case]:
    """BN + ReLU of inputs and gradients in orders that are not those of torch's results."""
    sequences, images = ((64, 256, 400), (8, 512, 128), (32, 64, 50)), ((16, 64, 56, 56), (8, 512, 7, 7))
    shapes = (sequences[1:2], images[1:]) if quick else (sequences, images)
    pairs = [(order, shape) for order in LYING for shape in shapes[order not in TURNED]]
    return [Case(shape, dtype, order, "bn+relu") for order, shape in pairs for dtype in ("float32", "bfloat16")]


def cases(quick: bool) -> list[tuple[Case, tuple[str, ...], str]]:
    """Case, contestants, and whether it is training or inference."""
    shapes = (CONVOLUTIONS[2], *SMALL) if quick else (*CONVOLUTIONS, DENSE, *SMALL)
    fusions = ("bn", "bn+relu") if quick else FUSIONS
    found = []
    for case in grid(shapes, ("float32", "bfloat16"), fusions):
        fused = ("ours fused",) if case.fusion != "bn" else ()
        compiled = ("compile",) if case in COMPILED and (not quick or case.shape in SMALL) else ()
        found.append((case, ("torch", *compiled, "ours", *fused), "training"))
    convolutions = CONVOLUTIONS[2:3] if quick else (*CONVOLUTIONS, DENSE)
    for case in grid(convolutions, ("float32", "bfloat16"), ("bn+relu",)):
        found.append((case, ("torch", "ours", "ours fused"), "inference"))
    return found
