"""A network and data of one's own for `batchnorm train`: which of three waves is it?

cd examples
batchnorm train --network waves:network --data waves:load --baseline --steps 300
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

SHAPES = ("sine", "square", "sawtooth")


class Residual(nn.Module):
    """x + conv(relu(conv(x))), with the length and the channels kept."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(channels, channels, 5, padding=2)
        self.second = nn.Conv1d(channels, channels, 5, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.second(torch.relu(self.first(x))))


def network(in_channels: int, num_classes: int) -> nn.Module:
    """The factory: called with the arguments that it names, out of those that are offered."""
    return nn.Sequential(
        nn.Conv1d(in_channels, 16, 5, stride=2, padding=2),
        nn.ReLU(),
        Residual(16),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(16, num_classes),
    )


def load(seed: int) -> dict[str, Tensor]:
    """The loader: x of shape (N, 1, 64) and class numbers y, with a test part of its own."""
    generator = torch.Generator().manual_seed(seed)
    x, y = waves(1200, generator)
    x_test, y_test = waves(300, generator)
    return {"x": x, "y": y, "x_test": x_test, "y_test": y_test}


def waves(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Waves of random frequency, phase and height with noise of the same size as they."""
    y = torch.randint(len(SHAPES), (count,), generator=generator)
    frequency = torch.empty(count, 1).uniform_(1.5, 4, generator=generator)
    phase = torch.empty(count, 1).uniform_(0, 1, generator=generator)
    turns = frequency * torch.linspace(0, 1, 64) + phase
    sine = torch.sin(2 * math.pi * turns)
    shapes = torch.stack([sine, sine.sign(), 2 * (turns % 1) - 1])
    height = torch.empty(count, 1).uniform_(0.5, 2, generator=generator)
    clean = height * shapes[y, torch.arange(count)]
    return (clean + 0.5 * torch.randn(count, 64, generator=generator))[:, None], y
