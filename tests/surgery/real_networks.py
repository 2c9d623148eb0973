"""Definitions of well-known networks, built with random weights and statistics; nothing is downloaded."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks import whole


@cache
def torchvision() -> Any:
    """The package, or a skip."""
    package = whole.torchvision()
    if package is None:
        pytest.skip("torchvision is not installed: pip install --no-deps torchvision")
    return package


def image_network(name: str, **options: Any) -> nn.Module:
    """A definition of torchvision by its name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net: nn.Module = torchvision().models.get_model(name, weights=None, **options)
    return lively(net)


def lively(net: nn.Module, seed: int = 0) -> nn.Module:
    """Random running statistics, shifts, and signs of gamma, of sizes that keep the values in range."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, (nn.Conv2d, nn.Conv3d, nn.Linear)):
                fan = module.weight[0].numel()
                gain = 2 if module.bias is None else 0.5  # biased layers make the gates and heads
                module.weight.normal_(0, (gain / fan) ** 0.5, generator=generator)
            if not isinstance(module, _BatchNorm):
                continue
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
            module.num_batches_tracked.fill_(7)
            if module.weight is not None:
                module.weight.uniform_(0.3, 1.0, generator=generator)
                flip = torch.rand(module.weight.shape, generator=generator) < 0.3
                module.weight[flip] *= -1
                module.bias.normal_(0, 0.3, generator=generator)
    return net.eval()
