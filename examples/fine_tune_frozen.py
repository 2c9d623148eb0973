"""A second head on a body that must not change: requires_grad=False does not freeze batch norm, `bn.freeze` does.

    python examples/fine_tune_frozen.py

A network learns the digits 0 to 4. Its body then gets a second head for 5 to 9, trained on 40 samples in batches of 4,
and the first head has to go on working. With gradients switched off the running statistics still follow the new data;
after `bn.freeze` the body stays what it was, bit for bit. Data: the digits of scikit-learn.
"""

from __future__ import annotations

import copy

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import batchnorm as bn


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)


def fit(net: nn.Module, x: Tensor, y: Tensor, *, steps: int, batch: int, lr: float) -> None:
    net.train()
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9)
    for _ in range(steps):
        at = torch.randint(len(x), (batch,))
        loss = nn.functional.cross_entropy(net(x[at]), y[at])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((net.eval()(x).argmax(1) == y).float().mean())


def main(steps: int = 300) -> dict[str, float]:
    torch.manual_seed(0)
    x, y = digits()
    first, second = y < 5, y >= 5
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), bn.BatchNorm2d(16, activation="relu"),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), bn.BatchNorm2d(32, activation="relu"),
        nn.Flatten(), nn.Linear(32 * 16, 5),
    )  # fmt: skip
    fit(net, x[first], y[first], steps=steps, batch=64, lr=0.05)
    few_x, few_y = x[second][:40], y[second][:40] - 5
    found = {}
    with torch.no_grad():
        before = net.eval()(x[first])
    for name, frozen in (("requires_grad=False", False), ("bn.freeze", True)):
        body, head = copy.deepcopy(net[:-1]).requires_grad_(False), nn.Linear(32 * 16, 5)
        if frozen:
            bn.freeze(body)  # stays frozen through .train()
        torch.manual_seed(1)
        fit(nn.Sequential(body, head), few_x, few_y, steps=steps, batch=4, lr=0.01)
        with torch.no_grad():
            after = nn.Sequential(body, net[-1]).eval()(x[first])
        found[f"first head moved, {name}"] = float((after - before).abs().max() / before.std())
        found[f"second head right, {name}"] = accuracy(nn.Sequential(body, head), x[second][40:], y[second][40:] - 5)
    for name, value in found.items():
        print(f"{name:40} {value:.3g}")
    return found


if __name__ == "__main__":
    main()
