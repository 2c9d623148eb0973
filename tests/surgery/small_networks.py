"""Small networks in the manner of the well-known ones, and random statistics for all of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def randomize(net: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights, signs of gamma, shifts and running statistics; one gamma is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in net.modules():
            if not isinstance(module, _BatchNorm):
                continue
            if module.running_mean is not None:
                module.running_mean.normal_(0, 1, generator=generator)
                module.running_var.uniform_(0.3, 3.0, generator=generator)
                module.num_batches_tracked.fill_(7)
            if module.weight is not None:
                module.weight.normal_(0, 1, generator=generator)
                module.weight[0] = 0
            if module.bias is not None:
                module.bias.normal_(0, 1, generator=generator)
    return net


class Residual(nn.Module):
    """A basic block of a ResNet, with one ReLU used twice."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.down = None
        if stride != 1 or inputs != outputs:
            self.down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x if self.down is None else self.down(x)
        return self.relu(y)


def resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        Residual(8, 8),
        Residual(8, 16, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


class InvertedResidual(nn.Module):
    """A block of MobileNetV2/V3: expand, depthwise, squeeze and excite, project."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        wide = 4 * channels
        self.expand = nn.Sequential(nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(True))
        self.depthwise = nn.Sequential(
            nn.Conv2d(wide, wide, 3, 1, 1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.Hardswish(),
        )
        self.squeeze = nn.Conv2d(wide, channels, 1)
        self.excite = nn.Conv2d(channels, wide, 1)
        self.project = nn.Sequential(nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.depthwise(self.expand(x))
        gate = self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1))))
        return x + self.project(y * F.hardsigmoid(gate))


def mobilenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        InvertedResidual(8),
        InvertedResidual(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(8, 5),
    )


class Plain(nn.Module):
    """Convolutions and linear layers without normalization, with calls for activations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3)
        self.conv2 = nn.Conv2d(6, 6, 3)
        self.hidden = nn.Linear(6, 10)
        self.head = nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.conv1(x))
        x = x[:, :, 1:-1, 1:-1] + F.relu(self.conv2(x))
        return self.head(torch.sigmoid(self.hidden(x.mean((2, 3)))))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 9), nn.Sigmoid(), nn.Linear(9, 9), nn.Sigmoid(), nn.Linear(9, 3))


class Calls(nn.Module):
    """Layers by name and a function of (self, x) as forward."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            setattr(self, name, layer)
        randomize(self).eval()

    def forward(self, *args, **kwargs):
        return self.run(self, *args, **kwargs)
