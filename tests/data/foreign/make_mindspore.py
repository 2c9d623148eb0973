# /// script
# requires-python = "==3.11.*"
# dependencies = ["mindspore==2.10.0", "numpy"]
# ///
"""Files of MindSpore 2.10.0, in PyNative mode on the CPU (2026-11-28)."""

import mindspore
import numpy as np
from case import BEFORE, HERE, batches, expect, first, pack
from mindspore import Tensor, nn

mindspore.set_context(mode=mindspore.PYNATIVE_MODE)
mindspore.set_device("CPU")
KINDS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}


def train(net, x, target, rate):
    net.set_train(True)
    optimizer = nn.SGD(net.trainable_params(), rate)
    step = mindspore.value_and_grad(lambda a, b: ((net(a) - b) ** 2).mean(), None, optimizer.parameters)
    for each in x:
        _, gradients = step(Tensor(first(each)), Tensor(first(target)))
        optimizer(gradients)


def evaluate(net, x):
    net.set_train(False)
    return np.moveaxis(net(Tensor(first(x))).asnumpy(), 1, -1)


def run(name, rank, **options):
    x, target = batches(rank)
    kind = KINDS[rank]
    net = nn.SequentialCell(kind(3, momentum=0.9, eps=1e-2), nn.ReLU(), kind(3, momentum=0.8, eps=1e-3))
    train(net, x[:BEFORE], target, 0.5)
    mindspore.save_checkpoint(net, str(HERE / name), **options)
    before = evaluate(net, x[BEFORE])
    train(net, x[BEFORE + 1 :], target, 0.1)
    layers = [
        {
            "gamma": m.gamma.asnumpy(),
            "beta": m.beta.asnumpy(),
            "mean": m.moving_mean.asnumpy(),
            "var": m.moving_variance.asnumpy(),
        }
        for m in (net[0], net[2])
    ]
    expect(name, x, target, before, evaluate(net, x[BEFORE]), layers)
    pack(name)


run("mindspore.images.ckpt", 2)
run("mindspore.flat.safetensors", 1, format="safetensors")
