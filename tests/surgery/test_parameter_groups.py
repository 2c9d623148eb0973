"""Decay reaches what it is for, once, and gamma may decay toward 1."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.errors import InputError


def network():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.PReLU(),
        nn.Flatten(),
        nn.Linear(64, 5),
        nn.LayerNorm(5),
        nn.LSTM(5, 2),
    )
    net.register_parameter("scale", nn.Parameter(torch.ones(3)))
    return net


def by_id(groups):
    return {id(p): group for group in groups for p in group["params"]}


def test_roles():
    net = network()
    groups = bn.param_groups(net, 1e-2, 1e-3, bias_weight_decay=1e-4)
    found = by_id(groups)
    assert len(found) == sum(len(g["params"]) for g in groups) == len(list(net.parameters()))
    for name, parameter in net.named_parameters():
        expected = 1e-3 if name.startswith(("1.", "5.")) else 1e-4 if "bias" in name else 1e-2
        assert found[id(parameter)]["weight_decay"] == expected, name
    assert [g["weight_decay"] for g in bn.param_groups(net)] == [5e-4, 0.0, 0.0]


def test_shared_and_frozen_parameters():
    net = network()
    net.again = nn.BatchNorm2d(4)
    net.again.weight = net[1].weight
    net.tied = nn.Linear(64, 5, bias=False)
    net.tied.weight = net[4].weight
    net[0].weight.requires_grad_(False)
    groups = bn.param_groups(net)
    assert sum(len(g["params"]) for g in groups) == len(list(net.parameters()))
    assert by_id(groups)[id(net[0].weight)]["weight_decay"] == 5e-4
    before = net[0].weight.clone()
    optimizer = torch.optim.SGD(groups, lr=0.1)
    net[4](torch.randn(2, 64)).square().sum().backward()
    optimizer.step()
    assert torch.equal(before, net[0].weight)


OPTIMIZERS = {
    "sgd": lambda g: torch.optim.SGD(g, lr=0.1, momentum=0.9),
    "adamw": lambda g: torch.optim.AdamW(g, lr=0.1),
    "rmsprop": lambda g: torch.optim.RMSprop(g, lr=0.1),
    "adam, fused lists": lambda g: torch.optim.Adam(g, lr=0.1, foreach=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gamma_decays_toward_one(name):
    """With zero gradients only the decay moves anything."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([3.0, 1.0, 0.0, -1.0]))
        net[1].bias.fill_(0.0)
    optimizer = OPTIMIZERS[name](bn.param_groups(net, 0.0, 0.5, gamma_toward_one=True))
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(net[1].weight.detach(), torch.tensor([2.9, 1.0, 0.05, -0.9]))
    net[1].weight.grad = None
    before = net[1].weight.clone()
    optimizer.step()
    assert torch.equal(net[1].weight, before)


def test_for_plain_sgd_it_is_the_penalty_around_one():
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    one = torch.optim.SGD(bn.param_groups(nets[0], 0.0, 0.3, gamma_toward_one=True), lr=0.1)
    other = torch.optim.SGD(nets[1].parameters(), lr=0.1)
    for _ in range(5):
        x, upstream = torch.randn(6, 3).double(), torch.randn(6, 4).double()
        for optimizer, net, penalty in ((one, nets[0], 0.0), (other, nets[1], 0.15)):
            optimizer.zero_grad()
            extra = penalty * ((net[1].weight - 1).square().sum() + net[1].bias.square().sum())
            ((net(x) * upstream).sum() + extra).backward()
            optimizer.step()
    torch.testing.assert_close(nets[0][1].weight, nets[1][1].weight)
    torch.testing.assert_close(nets[0][1].bias, nets[1][1].bias)


def test_the_option_survives_the_optimizers_state_and_leaves_other_optimizers_alone():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    groups = bn.param_groups(net, 0.0, 0.5, gamma_toward_one=True)
    optimizer = torch.optim.SGD(groups, lr=0.1)
    state = optimizer.state_dict()
    assert [g.get("decay_toward_one") for g in state["param_groups"]] == [None, 0.5, None, None]
    plain = nn.BatchNorm1d(4)
    nn.init.constant_(plain.weight, 3.0)
    other = torch.optim.SGD(plain.parameters(), lr=0.1)
    plain.weight.grad = torch.zeros(4)
    other.step()
    assert (plain.weight == 3).all()


def test_bad_decays():
    for options in ({"weight_decay": -1.0}, {"norm_weight_decay": float("nan")}, {"bias_weight_decay": float("inf")}):
        with pytest.raises(InputError, match=next(iter(options))):
            bn.param_groups(network(), **options)
