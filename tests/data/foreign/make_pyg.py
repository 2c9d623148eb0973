# /// script
# requires-python = "==3.11.*"
# dependencies = ["torch==2.13.0", "torch-geometric==2.8.1", "numpy"]
# ///
"""A file of PyTorch Geometric 2.8.1 (2026-11-29) on torch 2.13.0, by `torch.save(net.state_dict())`."""

import torch
from case import BEFORE, HERE, batches, expect, pack
from torch_geometric.nn import BatchNorm


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = BatchNorm(3, eps=1e-2, momentum=0.1), BatchNorm(3, eps=1e-3, momentum=0.2)

    def forward(self, x):
        return self.second(self.first(x).relu())


def train(net, x, target, rate):
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=rate)
    for each in x:
        optimizer.zero_grad()
        (net(torch.from_numpy(each)) - torch.from_numpy(target)).square().mean().backward()
        optimizer.step()


def evaluate(net, x):
    return net.eval()(torch.from_numpy(x)).detach().numpy()


def main(name):
    x, target = batches(1)
    net = Network()
    train(net, x[:BEFORE], target, 0.5)
    torch.save(net.state_dict(), HERE / name)
    before = evaluate(net, x[BEFORE])
    train(net, x[BEFORE + 1 :], target, 0.1)
    layers = [
        {
            "gamma": m.module.weight.detach(),
            "beta": m.module.bias.detach(),
            "mean": m.module.running_mean,
            "var": m.module.running_var,
        }
        for m in (net.first, net.second)
    ]
    expect(name, x, target, before, evaluate(net, x[BEFORE]), layers)
    pack(name)


main("pyg.pt")
