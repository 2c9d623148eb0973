"""A transaction that fails leaves structure, classes, attributes, flags and optimizer as they were."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from batchnorm.surgery.plan import Plan, Step, references, replace_module


def network():
    shared = nn.Linear(3, 3)
    return nn.Sequential(shared, nn.BatchNorm1d(3), nn.Sequential(shared, nn.ReLU()))


class Other(nn.BatchNorm1d):
    pass


def test_everything_comes_back():
    net = network()
    layer, norm = net[0], net[1]
    layer(torch.ones(1, 3)).sum().backward()
    bias, grad = layer.bias, layer.weight.grad
    optimizer = torch.optim.Adam(net.parameters())
    optimizer.step()
    state = dict(optimizer.state)
    params = list(optimizer.param_groups[0]["params"])

    def spoil():
        replace_module(net, layer, nn.Identity())
        layer.register_parameter("bias", None)
        layer.weight.requires_grad_(False)
        layer.weight.grad = None
        norm.__class__ = Other
        norm.eps, norm.extra = 5.0, 1
        norm.eval()
        net.add_module("more", nn.ReLU())
        del norm.running_mean
        optimizer.param_groups[0]["params"].clear()
        optimizer.state.clear()

    def fail():
        assert isinstance(net[0], nn.Identity)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Plan(net, [Step("spoil", spoil)], fail, optimizer).apply()
    assert [name for name, _ in net.named_children()] == ["0", "1", "2"]
    assert net[0] is layer
    assert net[2][0] is layer
    assert layer.bias is bias
    assert layer.weight.grad is grad
    assert layer.weight.requires_grad
    assert type(norm) is nn.BatchNorm1d
    assert (norm.eps, norm.training) == (1e-5, True)
    assert not hasattr(norm, "extra")
    assert list(norm._buffers) == ["running_mean", "running_var", "num_batches_tracked"]
    assert optimizer.state == state
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], params, strict=True))


def test_success_stays_and_reads_as_text():
    net = network()
    plan = Plan(net, [Step("0: out", lambda: replace_module(net, net[0], nn.Identity()))], lambda: None)
    plan.skipped["1"] = "no reason"
    assert str(plan) == "0: out\n1: left alone, no reason"
    plan.apply()
    assert isinstance(net[2][0], nn.Identity)
    assert net[2][0] is net[0]


def test_references_find_every_place():
    net = network()
    assert references(net, net[0]) == [(net, "0"), (net[2], "0")]
