# /// script
# requires-python = "==3.11.*"
# dependencies = ["tinygrad==0.14.0", "numpy"]
# ///
"""Files of tinygrad 0.14.0 (2026-11-28), with `DEV=CPU` (it calls clang) in the environment."""

import numpy as np
from case import BEFORE, HERE, batches, expect, first, pack
from tinygrad import Context, Tensor, dtypes, nn


class Network:
    def __init__(self):
        self.first, self.second = nn.BatchNorm(3, eps=1e-2, momentum=0.1), nn.BatchNorm(3, eps=1e-3, momentum=0.2)

    def __call__(self, x):
        return self.second(self.first(x).relu())


def train(net, x, target, rate):
    optimizer = nn.optim.SGD([net.first.weight, net.first.bias, net.second.weight, net.second.bias], lr=rate)
    with Context(TRAINING=1):
        for each in x:
            optimizer.zero_grad()
            (net(Tensor(first(each))) - Tensor(first(target))).square().mean().backward()
            Tensor.realize(*(v for m in (net.first, net.second) for v in (m.running_mean, m.running_var)))
            optimizer.step()


def evaluate(net, x):
    return np.moveaxis(net(Tensor(first(x))).numpy(), 1, -1)


def main(name):
    x, target = batches(2)
    net = Network()
    train(net, x[:BEFORE], target, 0.5)
    state = nn.state.get_state_dict(net)
    if "float16" in name:  # the file is of half the size, and training goes on in float32 from what it holds
        state = {k: v.cast(dtypes.half).realize() if v.dtype == dtypes.float else v for k, v in state.items()}
        nn.state.load_state_dict(net, {k: v.cast(dtypes.float) for k, v in state.items()}, verbose=False)
    nn.state.safe_save(state, str(HERE / name))
    before = evaluate(net, x[BEFORE])
    train(net, x[BEFORE + 1 :], target, 0.1)
    layers = [
        {
            "gamma": m.weight.numpy(),
            "beta": m.bias.numpy(),
            "mean": m.running_mean.numpy(),
            "var": m.running_var.numpy(),
        }
        for m in (net.first, net.second)
    ]
    expect(name, x, target, before, evaluate(net, x[BEFORE]), layers)
    pack(name)


main("tinygrad.safetensors")
main("tinygrad.float16.safetensors")
