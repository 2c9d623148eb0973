# /// script
# requires-python = "==3.11.*"
# dependencies = ["mlx[cpu]==0.32.4", "numpy"]
# ///
"""Files of MLX 0.32.4, on its CPU build for Linux (2026-11-28)."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from case import BEFORE, HERE, batches, expect, pack


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = [nn.BatchNorm(3, eps=1e-2, momentum=0.1), nn.BatchNorm(3, eps=1e-3, momentum=0.2)]

    def __call__(self, x):
        return self.norms[1](nn.relu(self.norms[0](x)))


def train(net, x, target, rate):
    net.train()
    optimizer = optim.SGD(rate)
    step = nn.value_and_grad(net, lambda each: ((net(each) - mx.array(target)) ** 2).mean())
    for each in x:
        _, gradients = step(mx.array(each))
        optimizer.update(net, gradients)
        mx.eval(net.parameters())


def evaluate(net, x):
    net.eval()
    return np.array(net(mx.array(x)))


def run(name, rank):
    x, target = batches(rank)
    net = Network()
    train(net, x[:BEFORE], target, 0.5)
    net.save_weights(str(HERE / name))
    before = evaluate(net, x[BEFORE])
    train(net, x[BEFORE + 1 :], target, 0.1)
    layers = [
        {
            "gamma": np.array(m.weight),
            "beta": np.array(m.bias),
            "mean": np.array(m.running_mean),
            "var": np.array(m.running_var),
        }
        for m in net.norms
    ]
    expect(name, x, target, before, evaluate(net, x[BEFORE]), layers)
    pack(name)


run("mlx.safetensors", 2)
run("mlx.npz", 1)
