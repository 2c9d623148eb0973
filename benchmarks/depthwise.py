"""Depthwise convolutions with batch normalization and activation behind them, and perhaps before them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

import batchnorm

from .rows import Row, compare
from .timing import Phases, alternate, both_phases

BOTH = "forward+backward"
TOLERANCE = 1e-4  # of the largest value


class Layers(NamedTuple):
    """What is measured: an input (N, C, H, W), a kernel, a stride, and an activation as in the networks named."""

    shape: tuple[int, ...]
    kernel: int
    stride: int
    activation: str
    of: str


CASES = (
    Layers((16, 32, 48, 48), 3, 1, "relu6", "MobileNetV2"),
    Layers((16, 96, 48, 48), 3, 2, "relu6", "MobileNetV2"),
    Layers((16, 144, 24, 24), 3, 1, "relu6", "MobileNetV2"),
    Layers((16, 384, 6, 6), 3, 1, "relu6", "MobileNetV2"),
    Layers((16, 960, 3, 3), 3, 1, "relu6", "MobileNetV2"),
    Layers((8, 32, 112, 112), 3, 1, "relu6", "MobileNetV2"),
    Layers((8, 144, 56, 56), 3, 2, "relu6", "MobileNetV2"),
    Layers((8, 240, 28, 28), 5, 1, "silu", "EfficientNet-B0"),
    Layers((8, 672, 14, 14), 5, 2, "silu", "EfficientNet-B0"),
    Layers((8, 1152, 7, 7), 5, 1, "silu", "EfficientNet-B0"),
    Layers((16, 58, 12, 12), 3, 1, "", "ShuffleNetV2"),
    Layers((8, 512, 14, 14), 3, 1, "relu", "MobileNetV1"),
)
_MODULES = {"relu": nn.ReLU, "relu6": nn.ReLU6, "silu": nn.SiLU, "": nn.Identity}


def network(case: Layers, before: bool) -> nn.Sequential:
    """In torch's layers."""
    channels, act = case.shape[1], _MODULES[case.activation]
    conv = nn.Conv2d(channels, channels, case.kernel, case.stride, case.kernel // 2, groups=channels, bias=False)
    first = [nn.BatchNorm2d(channels), act()] if before else []
    return nn.Sequential(*first, conv, nn.BatchNorm2d(channels), act())


class Step:
    """Forward and backward of a network on one input."""

    def __init__(self, net: nn.Module, x: Tensor, dy: Tensor) -> None:
        self.net, self.x, self.dy = net, x.detach().requires_grad_(), dy
        self.leaves = [self.x, *net.parameters()]

    def run(self) -> Phases:
        return both_phases(lambda: self.net(self.x), self.dy, self.leaves)

    def result(self) -> list[Tensor]:
        y = self.net(self.x)
        y.backward(self.dy)
        found = [y.detach(), *(leaf.grad for leaf in self.leaves if leaf.grad is not None)]
        for leaf in self.leaves:
            leaf.grad = None
        return found


def contestants(case: Layers, order: str, before: bool, seed: int) -> tuple[dict[str, Step], dict[str, float]]:
    """torch's layers; ours, where torch convolves; and all at once. With the errors of their gradients."""
    torch.manual_seed(seed)
    net, x = network(case, before), torch.randn(case.shape)
    if order == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    dy = torch.randn_like(net(x))
    apart = batchnorm.convert(copy.deepcopy(net))
    together = batchnorm.accelerate(net, x, inplace=False)
    steps = {"torch": Step(net, x, dy), "ours": Step(apart, x, dy), "at once": Step(together, x, dy)}
    truth = Step(copy.deepcopy(net).double(), x.double(), dy.double()).result()
    errors = {}
    for name, step in steps.items():
        # What a normalization behind it takes off has no gradient but roundings.
        least = 0.01 * max(float(b.abs().max()) for b in truth[2:])
        sizes = [max(float(b.abs().max()), least) for b in truth]
        found = zip(step.result(), truth, sizes, strict=True)
        errors[name] = max(float((a.double() - b).abs().max()) / size for a, b, size in found)
    return steps, errors


def measure(case: Layers, order: str, before: bool, seconds: float) -> Iterator[Row]:
    """The rows of a case, on the first of five seeds at which no kink of an activation decides."""
    for seed in range(5):
        steps, errors = contestants(case, order, before, seed)
        if max(errors.values()) <= TOLERANCE:
            break
    columns = {
        "suite": "depthwise", "shape": list(case.shape), "dtype": "float32", "order": order, "kernel": case.kernel,
        "stride": case.stride, "activation": case.activation, "before": before, "of": case.of,
    }  # fmt: skip
    for name, error in errors.items():
        if error > TOLERANCE:
            yield {**columns, "direction": BOTH, "contestant": name, "absent": f"off by {error:.1e}"}
            del steps[name]
    times, rounds = alternate({name: step.run for name, step in steps.items()}, seconds)
    yield from compare({**columns, "rounds": rounds}, times, errors)


def cases(quick: bool) -> list[tuple[Layers, str, bool]]:
    """Each in both orders, alone and with the normalization before it."""
    chosen = CASES[2:4] if quick else CASES
    return [
        (case, order, before) for case in chosen for order in ("planar", "channels_last") for before in (False, True)
    ]
