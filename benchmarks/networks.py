"""Networks for end-to-end training steps, with the batch norm left open."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm

from .wall import Apart

Norm = Callable[[int, "str | None"], nn.Module]
"""Makes activation(BN(x) + residual) of so many channels: `norm(channels, activation)(x, residual)`."""

NORMS: dict[str, Norm] = {
    "torch": lambda channels, activation: Apart(nn.BatchNorm2d(channels), activation),
    "ours": lambda channels, activation: Apart(batchnorm.BatchNorm2d(channels), activation),
    "ours fused": lambda channels, activation: batchnorm.BatchNorm2d(channels, activation=activation),
}
_DENSE: dict[str, Norm] = {
    "torch": lambda channels, activation: Apart(nn.BatchNorm1d(channels), activation),
    "ours": lambda channels, activation: Apart(batchnorm.BatchNorm1d(channels), activation),
    "ours fused": lambda channels, activation: batchnorm.BatchNorm1d(channels, activation=activation),
}
CLASSES = 100


def _convolution(inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)


class _Block(nn.Module):
    """The basic block of He et al. 2016."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.first, self.first_norm = _convolution(inputs, outputs, stride=stride), norm(outputs, "relu")
        self.second, self.second_norm = _convolution(outputs, outputs), norm(outputs, "relu")
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(_convolution(inputs, outputs, 1, stride), norm(outputs, None))

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first_norm(self.first(x)))
        return self.second_norm(y, self.shortcut(x))  # type: ignore[no-any-return]


def resnet18(name: str) -> nn.Module:
    """ResNet-18 (He et al. 2016, table 1)."""
    norm = NORMS[name]
    layers: list[nn.Module] = [_convolution(3, 64, 7, 2), norm(64, "relu"), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [_Block(inputs, outputs, stride, norm), _Block(outputs, outputs, 1, norm)]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, CLASSES))


def mobilenet(name: str) -> nn.Module:
    """Depthwise separable convolutions (Howard et al. 2017, table 1)."""
    norm = NORMS[name]
    layers: list[nn.Module] = [_convolution(3, 32, 3, 2), norm(32, "relu")]
    inputs = 32
    strides = {64: (1,), 128: (2, 1), 256: (2, 1), 512: (2, 1, 1, 1, 1, 1), 1024: (2, 1)}
    for outputs, each in strides.items():
        for stride in each:
            layers += [_convolution(inputs, inputs, stride=stride, groups=inputs), norm(inputs, "relu")]
            layers += [_convolution(inputs, outputs, 1), norm(outputs, "relu")]
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1024, CLASSES))


def mlp(name: str) -> nn.Module:
    """256-512-512-512-100."""
    widths, layers = (256, 512, 512, 512), []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs, bias=False), _DENSE[name](outputs, "relu")]
    return nn.Sequential(*layers, nn.Linear(widths[-1], CLASSES))


NETWORKS: dict[str, tuple[Callable[[str], nn.Module], tuple[int, ...]]] = {
    "resnet18": (resnet18, (8, 3, 128, 128)),
    "mobilenet": (mobilenet, (8, 3, 128, 128)),
    "mlp": (mlp, (256, 256)),
}
"""How to make them, and the input of a step."""


def all_gradients(net: nn.Module) -> Tensor:
    """Of all parameters that have one, end to end, in float64."""
    return torch.cat([p.grad.flatten().double() for p in net.parameters() if p.grad is not None])


class TrainingStep:
    """Loss, gradients and an SGD step of one network; weights stay float32, bfloat16 is autocast's."""

    def __init__(self, network: str, name: str, dtype: torch.dtype, shape: tuple[int, ...] | None = None) -> None:
        make, default = NETWORKS[network]
        torch.manual_seed(0)
        self.network, self.dtype = make(name), dtype
        if dtype == torch.float64:
            self.network.double()
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(shape or default, generator=generator).to(self.network[-1].weight.dtype)  # type: ignore
        self.target = torch.randint(CLASSES, self.x.shape[:1], generator=generator)
        if self.x.ndim == 4 and dtype == torch.bfloat16:
            self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.x = self.x.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=1e-3, momentum=0.9)

    def gradients(self) -> Tensor:
        """All of the loss's, end to end."""
        self._backward()
        return all_gradients(self.network)

    def run(self) -> None:
        """One step."""
        self._backward()
        self.optimizer.step()

    def _backward(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            loss = F.cross_entropy(self.network(self.x), self.target)
        loss.backward()
