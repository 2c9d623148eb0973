"""Good in training, bad in evaluation: `bn.diagnose` says why, and what mends it.

    python examples/diagnose_broken.py

The network was trained with momentum=0.001, so its running statistics are nearly the initial 0 and 1. Data: the digits
of scikit-learn.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import batchnorm as bn


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32), torch.tensor(data.target)


def broken(x: Tensor, y: Tensor, steps: int = 150) -> nn.Module:
    """A network that is trained well, and keeps statistics that are hardly more than the initial ones."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(64, 50), nn.BatchNorm1d(50, momentum=0.001), nn.ReLU(),
        nn.Linear(50, 50), nn.BatchNorm1d(50, momentum=0.001), nn.ReLU(), nn.Linear(50, 10),
    )  # fmt: skip
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(steps):
        at = torch.randint(1500, (60,))
        loss = nn.functional.cross_entropy(net(x[at]), y[at])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((net.eval()(x).argmax(1) == y).float().mean())


def main(steps: int = 150) -> dict[str, float]:
    x, y = digits()
    net = broken(x, y, steps)
    batches = list(x[:1500].split(60))
    found = {"before": accuracy(net, x[1500:], y[1500:])}
    print(f"before: {100 * found['before']:.1f} % right\n")
    print(bn.diagnose(net.train(), batches))
    bn.calibrate(net, batches)
    found["after"] = accuracy(net, x[1500:], y[1500:])
    print(f"\nafter bn.calibrate: {100 * found['after']:.1f} % right")
    return found


if __name__ == "__main__":
    main()
