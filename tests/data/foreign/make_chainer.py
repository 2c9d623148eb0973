# /// script
# requires-python = "==3.11.*"
# dependencies = ["chainer==7.8.1", "numpy<1.24", "setuptools<70"]
# ///
"""A file of Chainer 7.8.1 (2026-11-28). It is built with `pip install --no-build-isolation`, setuptools before 70."""

import chainer
import numpy as np
from case import BEFORE, HERE, batches, expect, first, pack
from chainer import functions as F
from chainer import links


class Network(chainer.Chain):
    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.first = links.BatchNormalization(3, decay=0.9, eps=1e-2)
            self.second = links.BatchNormalization(3, decay=0.8, eps=1e-3)

    def forward(self, x):
        return self.second(F.relu(self.first(x)))


def train(net, x, target, rate):
    optimizer = chainer.optimizers.SGD(rate).setup(net)
    for each in x:
        net.cleargrads()
        F.mean_squared_error(net(first(each)), first(target)).backward()
        optimizer.update()


def evaluate(net, x):
    with chainer.using_config("train", False), chainer.no_backprop_mode():
        return np.moveaxis(net(first(x)).array, 1, -1)


def main(name="chainer.npz"):
    x, target = batches(2)
    net = Network()
    train(net, x[:BEFORE], target, 0.5)
    chainer.serializers.save_npz(str(HERE / name), net)
    before = evaluate(net, x[BEFORE])
    train(net, x[BEFORE + 1 :], target, 0.1)
    layers = [
        {"gamma": m.gamma.array, "beta": m.beta.array, "mean": m.avg_mean, "var": m.avg_var}
        for m in (net.first, net.second)
    ]
    expect(name, x, target, before, evaluate(net, x[BEFORE]), layers)
    pack(name)


main()
