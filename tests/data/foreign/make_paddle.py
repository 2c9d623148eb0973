# /// script
# requires-python = "==3.11.*"
# dependencies = ["paddlepaddle==3.3.1", "numpy"]
# ///
"""Files of PaddlePaddle 3.3.1 (2026-11-28)."""

import numpy as np
import paddle
from case import BEFORE, HERE, batches, expect, first, pack
from paddle import nn

KINDS = {1: nn.BatchNorm1D, 2: nn.BatchNorm2D, 3: nn.BatchNorm3D}


def train(net, x, target, rate):
    net.train()
    optimizer = paddle.optimizer.SGD(rate, parameters=net.parameters())
    for each in x:
        loss = ((net(paddle.to_tensor(first(each))) - paddle.to_tensor(first(target))) ** 2).mean()
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()


def evaluate(net, x):
    net.eval()
    return np.moveaxis(net(paddle.to_tensor(first(x))).numpy(), 1, -1)


def run(name, rank):
    x, target = batches(rank)
    kind = KINDS[rank]
    net = nn.Sequential(kind(3, momentum=0.9, epsilon=1e-2), nn.ReLU(), kind(3, momentum=0.8, epsilon=1e-3))
    train(net, x[:BEFORE], target, 0.5)
    paddle.save(net.state_dict(), str(HERE / name))
    before = evaluate(net, x[BEFORE])
    train(net, x[BEFORE + 1 :], target, 0.1)
    layers = [
        {"gamma": m.weight.numpy(), "beta": m.bias.numpy(), "mean": m._mean.numpy(), "var": m._variance.numpy()}
        for m in (net[0], net[2])
    ]
    expect(name, x, target, before, evaluate(net, x[BEFORE]), layers)
    pack(name)


run("paddle.flat.pdparams", 1)
run("paddle.images.pdparams", 2)
