"""From a trained network to a file for inference, with a certificate.

    python examples/deploy.py [FOLDER]

Train, calibrate, look at what folding will do, fold, export to torch.export and read the file back. Data: the digits of
scikit-learn.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import batchnorm as bn


def main(folder: str | Path | None = None, steps: int = 150) -> float:
    torch.manual_seed(0)
    data = load_digits()
    x, y = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)
    )  # fmt: skip
    net = bn.insert(net, x[:8])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(steps):
        at = torch.randint(1500, (60,))
        loss = nn.functional.cross_entropy(net(x[at]), y[at])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    bn.calibrate(net, x[:1500].split(100))
    folded = bn.fold(net.eval(), x[:16])
    print(folded.certificate)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(folder or temporary) / "model.pt2"
        batch = torch.export.Dim("batch", min=1)
        torch.export.save(torch.export.export(folded.model, (x[:16],), dynamic_shapes=({0: batch},)), path)
        logits = torch.export.load(path).module()(x[1500:])
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")
    with torch.no_grad():
        difference = float((logits - net(x[1500:])).abs().max() / logits.abs().max())
    right = float((logits.argmax(1) == y[1500:]).float().mean())
    print(f"{100 * right:.1f} % of {len(x) - 1500} test digits; folded and read back, off by {difference:.1e} at most")
    return difference


if __name__ == "__main__":
    main(*sys.argv[1:2])
