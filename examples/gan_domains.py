"""A discriminator that sees real and generated samples: statistics of their own for each domain.

    python examples/gan_domains.py

Real and generated samples differ, most of all at first. One set of running statistics becomes a mixture that fits
neither. With `domains=2` each keeps its own, and evaluation of either is that of its own kind. Data: the digits of
scikit-learn.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import batchnorm as bn


def critic(**options: int) -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), bn.BatchNorm1d(32, **options), nn.LeakyReLU(0.2), nn.Linear(32, 1))


def gap(net: nn.Module, batch: Tensor) -> float:
    """How far evaluation of a batch is from its training, in standard deviations of the output."""
    with torch.no_grad(), bn.no_update(net):
        trained, evaluated = net.train()(batch), net.eval()(batch)
    net.train()
    return float((trained - evaluated).square().mean().sqrt() / trained.std())


def main(steps: int = 150) -> dict[str, float]:
    real = torch.tensor(load_digits().data, dtype=torch.float32) / 8 - 1
    found = {}
    for name, domains in (("one set of statistics", 0), ("a set for each domain", 2)):
        torch.manual_seed(0)
        net = critic(domains=domains)
        generator = nn.Sequential(
            nn.Linear(8, 32, bias=False), bn.BatchNorm1d(32, activation="relu"), nn.Linear(32, 64), nn.Tanh()
        )
        optimizers = [torch.optim.Adam(part.parameters(), lr=2e-3, betas=(0.5, 0.99)) for part in (net, generator)]
        for _ in range(steps):
            samples = real[torch.randint(len(real), (64,))]
            fake = generator(torch.randn(64, 8))

            def judged(batch: Tensor, domain: int, net: nn.Module = net, domains: int = domains) -> Tensor:
                if not domains:
                    return net(batch)
                with bn.use_domain(net, domain):
                    return net(batch)

            loss = (
                nn.functional.softplus(-judged(samples, 0)).mean()
                + nn.functional.softplus(judged(fake.detach(), 1)).mean()
            )
            optimizers[0].zero_grad()
            loss.backward()
            optimizers[0].step()
            loss = nn.functional.softplus(-judged(fake, 1)).mean()
            optimizers[1].zero_grad()
            loss.backward()
            optimizers[1].step()
        gaps = []
        for domain, batch in enumerate((real[:512], generator(torch.randn(512, 8)).detach())):
            if domains:
                bn.use_domain(net, domain)
            gaps.append(gap(net, batch))
        found[name] = max(gaps)
        print(f"{name:22} training and evaluation apart by {gaps[0]:.3f} (real), {gaps[1]:.3f} (generated) deviations")
    return found


if __name__ == "__main__":
    main()
