# /// script
# requires-python = "==3.11.*"
# dependencies = ["jittor==1.3.11.0", "numpy"]
# ///
"""A file of Jittor 1.3.11 (2026-11-28), which compiles its operators with the g++ of the machine."""

import jittor as jt
import numpy as np
from case import BEFORE, HERE, STEPS, batches, expect, first, pack
from jittor import nn

jt.flags.use_cuda = 0


class Net(nn.Module):
    def __init__(self):
        self.first = nn.BatchNorm(3, eps=1e-2, momentum=0.1)
        self.second = nn.BatchNorm(3, eps=1e-3, momentum=0.2)

    def execute(self, x):
        return self.second(nn.relu(self.first(x)))


def train(net, x, target, rate: float) -> None:
    net.train()
    optimizer = nn.SGD(net.parameters(), rate)
    optimizer.step(((net(jt.array(x)) - jt.array(target)) ** 2).mean())
    net.sync() if hasattr(net, "sync") else jt.sync_all()


def evaluate(net, x) -> np.ndarray:
    net.eval()
    return np.moveaxis(net(jt.array(x)).numpy(), 1, -1)


def run(name: str, rank: int) -> None:
    x, target = batches(rank)
    data, goal = [first(each) for each in x], first(target)
    net = Net()
    for i in range(BEFORE):
        train(net, data[i], goal, 0.5)
    net.save(str(HERE / name))
    before = evaluate(net, data[BEFORE])
    for i in range(STEPS):
        train(net, data[BEFORE + 1 + i], goal, 0.1)
    layers = [
        {
            "gamma": m.weight.numpy(),
            "beta": m.bias.numpy(),
            "mean": m.running_mean.numpy(),
            "var": m.running_var.numpy(),
        }
        for m in (net.first, net.second)
    ]
    expect(name, x, target, before, evaluate(net, data[BEFORE]), layers)
    pack(name)


run("jittor.pkl", 2)
