"""`accelerate` fuses in modules that a network calls several times, where each of their calls does the same."""

from __future__ import annotations

import copy

import pytest
import torch
from small_networks import Calls, randomize
from torch import nn

import batchnorm as bn

IMAGES = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
OTHERS = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def line():
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())


class Block(nn.Module):
    """Its own forward: the sum and the call of an activation go into the layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        return torch.relu(self.norm(self.conv(x)) + x)


class Twice(nn.Module):
    """Calls its line twice in one go, and only once with what follows fused."""

    def __init__(self):
        super().__init__()
        self.line = line()[:2]

    def forward(self, x):
        return torch.relu(self.line(x)) - self.line(x * 2)


def siamese(self, x, y):
    return self.branch(x) - self.branch(y)


def levels(self, x, y):
    return self.branch(x).mean((2, 3)) - self.branch(y[..., ::2]).mean((2, 3))


def differently(self, x, y):
    """One of the two calls is followed by an activation."""
    return torch.relu(self.branch[1](self.branch[0](x))) - self.branch[1](self.branch[0](y))


def trained(net, seed=0):
    net = net.train()
    x, y = IMAGES.clone().requires_grad_(), OTHERS.clone().requires_grad_()
    net(x, y).square().sum().backward()
    return [x.grad, y.grad, *(p.grad for p in net.parameters()), *net.buffers()]


@pytest.mark.parametrize(
    ("make", "told"),
    [(line, {"branch.1": "relu"}), (Block, {"branch.norm": "an addition and relu"})],
)
@pytest.mark.parametrize("forward", [siamese, levels])
def test_what_each_call_does_is_fused(forward, make, told):
    net = randomize(Calls(forward, branch=make()))
    original = copy.deepcopy(net)
    bn.accelerate(net, (IMAGES, OTHERS))
    assert net.report.fused == told
    for fast, plain in zip(trained(net), trained(original), strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(net.eval()(IMAGES, OTHERS), original.eval()(IMAGES, OTHERS), rtol=1e-5, atol=1e-5)
    bn.revert(net)
    assert all(type(a) is type(b) for a, b in zip(net.modules(), original.modules(), strict=True))


@pytest.mark.parametrize(("forward", "make"), [(differently, line), (siamese, Twice)])
def test_calls_that_differ_are_left_alone(forward, make):
    net = randomize(Calls(forward, branch=make()))
    original = copy.deepcopy(net)
    bn.accelerate(net, (IMAGES, OTHERS))
    assert net.report.fused == {}
    torch.testing.assert_close(net(IMAGES, OTHERS), original(IMAGES, OTHERS), rtol=1e-5, atol=1e-5)


def test_a_line_in_two_modules_is_left_to_itself():
    """The layer is in step with its line, and with neither of the modules that call that."""

    class Uses(nn.Module):
        def __init__(self, inner, relu):
            super().__init__()
            self.inner, self.relu = inner, relu

        def forward(self, x):
            return torch.relu(self.inner(x)) if self.relu else self.inner(x)

    shared = line()[:2]
    net = randomize(Calls(lambda self, x, y: self.a(x) - self.b(y), a=Uses(shared, True), b=Uses(shared, False)))
    original = copy.deepcopy(net)
    bn.accelerate(net, (IMAGES, OTHERS))
    assert net.report.fused == {}
    torch.testing.assert_close(net(IMAGES, OTHERS), original(IMAGES, OTHERS), rtol=1e-5, atol=1e-5)
