"""Batch normalization converted to normalization of samples: exactly where it is the same, else fitted and measured."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from small_networks import randomize, resnet
from torch import nn

import batchnorm as bn
from batchnorm.errors import InputError, SurgeryError

X = torch.randn(2, 3, 7, 7)


def test_statistics_that_nothing_uses_are_dropped_and_come_back():
    net = randomize(nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32)))
    before, gamma = copy.deepcopy(net.state_dict()), net[1].weight
    bn.convert(net, ghost_size=1, channel_groups=2, source="batch", update="never")
    expected = net(X)
    bn.convert(net, X, to="group_norm")
    assert type(net[1]) is nn.GroupNorm
    assert net[1].weight is gamma
    torch.testing.assert_close(net(X), expected, rtol=1e-4, atol=1e-5)
    bn.revert(net)
    assert type(net[1]) is nn.BatchNorm2d
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("affine", [True, False])
def test_instance_norm_is_a_form_of_ours(dims, affine):
    kind = getattr(nn, f"InstanceNorm{dims}d")
    net, x = nn.Sequential(kind(4, affine=affine)), torch.randn(3, 4, *[5] * dims)
    expected, text = net(x), repr(net)
    bn.convert(net, x, of="instance_norm")
    assert isinstance(net[0], (bn.BatchNorm1d, bn.BatchNorm2d, bn.BatchNorm3d))
    for mode in (True, False):
        torch.testing.assert_close(net.train(mode)(x), expected, rtol=1e-4, atol=1e-5)
    again = bn.convert(copy.deepcopy(net).train(), x, to="instance_norm")
    assert repr(again) == text
    torch.testing.assert_close(again(x), expected)
    assert repr(bn.revert(net)) == text


def pretrained(make, shape):
    torch.manual_seed(0)
    net, batches = make(), [torch.randn(8, *shape) * 2 + 1 for _ in range(4)]
    randomize(net)
    return bn.calibrate(net, batches).eval(), batches


def convnet():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6))


def distance(net, expected, batches):
    made = torch.cat([net(x) for x in batches]).double()
    return float(((made - expected).square().sum() / (expected - expected.mean(0)).square().sum()).sqrt())


CASES = {
    "group_norm": (convnet, (3, 9, 9), {"to": "group_norm"}, nn.GroupNorm),
    "groups": (convnet, (3, 9, 9), {"to": "group_norm", "groups": 2}, nn.GroupNorm),
    "instance_norm": (convnet, (3, 9, 9), {"to": "instance_norm"}, nn.InstanceNorm2d),
    "residual": (resnet, (3, 8, 8), {"to": "group_norm", "groups": 1}, nn.GroupNorm),
    "rows": (lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8)), (5,), {"to": "layer_norm"}, nn.LayerNorm),
    "no affine": (
        lambda: nn.Sequential(nn.Conv1d(3, 8, 2), bn.BatchNorm1d(8, affine=False)),
        (3, 9),
        {"to": "group_norm"},
        nn.GroupNorm,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_fit_agrees_better_than_the_old_gamma_and_beta(case):
    make, shape, options, kind = CASES[case]
    net, batches = pretrained(make, shape)
    with torch.no_grad():
        expected = torch.cat([net(x) for x in batches]).double()
    original, names = (
        copy.deepcopy(net),
        [n for n, m in net.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)],
    )
    parameters = dict(net.named_parameters())
    with pytest.warns(UserWarning, match="of their standard deviation") as told:
        bn.convert(net, fit=batches, **options)
    assert all(type(net.get_submodule(name)) is kind for name in names)
    assert all(net.get_parameter(name) is parameter for name, parameter in parameters.items())
    (figure,) = re.findall(r"by ([\d.e-]+) of their", str(told[0].message))
    with torch.no_grad():
        found = distance(net, expected, batches)
        assert found == pytest.approx(float(figure), rel=0.06)
        naive = copy.deepcopy(net)
        for name in names:
            layer, old = naive.get_submodule(name), original.get_submodule(name)
            layer.weight.copy_(old.weight if old.affine else torch.ones_like(layer.weight))
            layer.bias.copy_(old.bias if old.affine else torch.zeros_like(layer.bias))
        assert found < distance(naive, expected, batches)
        assert found < 1
        small = torch.cat([net(x) for x in batches[0].split(1)])
        torch.testing.assert_close(small, net(batches[0]), rtol=1e-3, atol=1e-4)  # no batch statistics are left
    bn.revert(net)
    for key, value in original.state_dict().items():
        assert torch.equal(net.state_dict()[key], value)
    assert torch.equal(net(batches[0]), original(batches[0]))


def test_the_fit_of_a_last_layer_is_the_least_squares_one():
    net, batches = pretrained(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), (3, 9, 9))
    with torch.no_grad():
        x = net[0](torch.cat(batches))
        y = net[1](x).double().movedim(1, 0).flatten(1)
        z = nn.GroupNorm(2, 4, affine=False)(x).double().movedim(1, 0).flatten(1)
    with pytest.warns(UserWarning, match="another function"):
        bn.convert(net, fit=iter(batches), to="group_norm", groups=2)
    weight, bias = net[1].weight.detach(), net[1].bias.detach()
    for channel in range(4):
        a = torch.stack([z[channel], torch.ones_like(z[channel])], 1)
        gamma, beta = torch.linalg.lstsq(a, y[channel][:, None]).solution.flatten()
        assert float(weight[channel]) == pytest.approx(float(gamma), rel=1e-4)
        assert float(bias[channel]) == pytest.approx(float(beta), rel=1e-4, abs=1e-5)


def test_a_fit_that_is_exact_says_nothing():
    net, x = nn.Sequential(nn.BatchNorm2d(4)), torch.randn(1, 4, 30, 30)
    bn.calibrate(net, [torch.cat([x, x])])
    bn.convert(net, fit=[x], to="instance_norm")  # one sample: its statistics are those of the data, but for n - 1
    assert type(net[0]) is nn.InstanceNorm2d


REFUSED = [
    (bn.BatchNorm2d(4, activation="relu"), {"to": "group_norm"}, "activation='relu'"),
    (bn.BatchNorm2d(4, track_running_stats=False), {"to": "group_norm"}, "keeps no running statistics"),
    (nn.BatchNorm2d(4), {"to": "group_norm", "groups": 3}, "3 groups do not divide"),
    (nn.BatchNorm2d(4), {"to": "layer_norm"}, "to='group_norm', groups=1"),
    (nn.BatchNorm2d(4), {"to": "instance_norm", "groups": 2}, "goes with to='group_norm' alone"),
]


@pytest.mark.parametrize(("layer", "options", "message"), REFUSED)
def test_what_cannot_be_fitted(layer, options, message):
    net = nn.Sequential(copy.deepcopy(layer))
    with pytest.raises(SurgeryError, match=re.escape(message)):
        bn.convert(net, fit=[torch.randn(2, 4, 3, 3)], **options)
    assert type(net[0]) is type(layer)


def test_wrong_arguments_of_a_fit():
    net = nn.Sequential(nn.BatchNorm2d(4))
    for options in ({"to": "torch"}, {}, {"to": "batchnorm", "of": "group_norm"}):
        with pytest.raises(InputError, match="fit and groups go with"):
            bn.convert(net, fit=[torch.randn(2, 4, 3, 3)], **options)
    with pytest.raises(InputError, match="no batches"):
        bn.convert(net, fit=[], to="group_norm")
    with pytest.raises(SurgeryError, match="fit=batches"):
        bn.convert(net, to="group_norm")
    with pytest.raises(SurgeryError, match="one value a channel"):
        bn.convert(nn.Sequential(nn.BatchNorm1d(4)), fit=[torch.randn(2, 4)], to="group_norm", groups=4)
