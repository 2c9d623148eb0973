"""Volumes so large that a batch holds two: exact accumulation, and statistics by `bn.calibrate`.

    python examples/tiny_batches_3d.py

A small 3-D network marks bright ellipsoids in noisy phantoms (made here; no patient's data). Two samples a step are
all that fits. `bn.accumulate_exact` gives the gradients of a batch of eight in the memory of two, and `bn.calibrate`
measures the statistics for inference over all volumes.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import batchnorm as bn


def phantoms(count: int, size: int = 12) -> tuple[Tensor, Tensor]:
    """Volumes (N, 1, D, H, W) with an ellipsoid each, and where it is."""
    at = torch.stack(torch.meshgrid(*[torch.arange(size) + 0.5] * 3, indexing="ij"))
    center = size * (0.3 + 0.4 * torch.rand(count, 3, 1, 1, 1))
    radius = size * (0.12 + 0.15 * torch.rand(count, 3, 1, 1, 1))
    inside = (((at - center) / radius) ** 2).sum(1, keepdim=True) < 1
    scanner = 1 + 0.3 * torch.randn(count, 1, 1, 1, 1)  # each scan has its own gain
    return scanner * (inside + 0.6 * torch.randn(inside.shape)), inside.float()


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 8, 3, padding=1, bias=False), bn.BatchNorm3d(8, activation="relu"),
        nn.Conv3d(8, 8, 3, padding=1, bias=False), bn.BatchNorm3d(8, activation="relu"), nn.Conv3d(8, 1, 1),
    )  # fmt: skip


def loss(out: Tensor, target: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(out, target, pos_weight=torch.tensor(8.0))


@torch.no_grad()
def dice(net: nn.Module, x: Tensor, y: Tensor) -> float:
    guess = (net.eval()(x) > 0).float()
    return float(2 * (guess * y).sum() / (guess + y).sum())


def main(steps: int = 40) -> dict[str, float]:
    torch.manual_seed(0)
    x, y = phantoms(32)
    test_x, test_y = phantoms(16)
    start = network()
    found = {}
    for name, exact in (("batches of 2", False), ("exact batches of 8", True)):
        net = copy.deepcopy(start).train()
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        torch.manual_seed(1)
        for _ in range(steps):
            at = torch.randperm(len(x))[:8]
            micro = [(x[pair], y[pair]) for pair in at.split(2)]
            optimizer.zero_grad()
            if exact:
                bn.accumulate_exact(net, micro, lambda net, pair: loss(net(pair[0]), pair[1]) / 4)
            else:
                loss(net(micro[0][0]), micro[0][1]).backward()
            optimizer.step()
        bn.calibrate(net, x.split(2))
        found[name] = dice(net, test_x, test_y)
        print(f"{name:20} Dice {found[name]:.3f}")
    return found


if __name__ == "__main__":
    main()
