"""convert gives every layer the same options or class and keeps its state; revert is lossless."""

from __future__ import annotations

import copy

import pytest
import torch
from small_networks import randomize
from torch import nn

import batchnorm as bn
from batchnorm.errors import InputError, SurgeryError

IMAGES = torch.randn(4, 3, 6, 6)


def network():
    return randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-3), nn.Flatten(), nn.BatchNorm1d(64)))


def picture(net):
    return [(name, type(m), m.training, m.extra_repr(), sorted(m._buffers)) for name, m in net.named_modules()]


@pytest.mark.parametrize(
    "options", [{}, {"nonfinite": "skip"}, {"running": "debiased", "momentum": 0.2}, {"decay": 0.8}]
)
def test_options_there_and_back(options):
    net = network()
    before, state, parameters = picture(net), copy.deepcopy(net.state_dict()), list(net.parameters())
    assert bn.convert(net, **options) is net
    for layer in (net[1], net[3]):
        assert isinstance(layer, (bn.BatchNorm1d, bn.BatchNorm2d))
        assert layer.nonfinite == options.get("nonfinite", "propagate")
        assert layer.momentum == pytest.approx(
            1 - options["decay"] if "decay" in options else options.get("momentum", 0.1)
        )
    assert net[1].eps == 1e-3
    bn.convert(net, running_var="biased")
    assert net[3].running_var_kind == "biased"
    bn.revert(net)
    assert picture(net) == before
    assert all(a is b for a, b in zip(parameters, net.parameters(), strict=True))
    for key, value in net.state_dict().items():
        assert torch.equal(value, state[key])


def test_learned_values_stay_when_reverting():
    net = bn.convert(network().train(), nonfinite="skip")
    net(IMAGES)
    mean = net[1].running_mean.clone()
    assert net[1].num_batches_skipped == 0
    bn.revert(net)
    assert torch.equal(net[1].running_mean, mean)
    assert "1.num_batches_skipped" not in net.state_dict()
    net(IMAGES)


@pytest.mark.parametrize("target", ["sync", "torch", "batchnorm"])
def test_classes_there_and_back(target):
    net = network().eval()
    expected, before = net(IMAGES), picture(net)
    bn.convert(net, IMAGES, to=target)
    kinds = {"sync": (nn.SyncBatchNorm,) * 2, "torch": (nn.BatchNorm2d, nn.BatchNorm1d)}
    assert (type(net[1]), type(net[3])) == kinds.get(target, (bn.BatchNorm2d, bn.BatchNorm1d))
    torch.testing.assert_close(net(IMAGES), expected)
    for back in ("torch", "batchnorm"):
        again = bn.convert(copy.deepcopy(net), IMAGES, to=back)
        assert type(again[1]) is {"torch": nn.BatchNorm2d, "batchnorm": bn.BatchNorm2d}[back]
        torch.testing.assert_close(again(IMAGES), expected)
    assert picture(bn.revert(net)) == before


def test_what_cannot_be_converted_is_refused_with_its_name():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), bn.BatchNorm2d(4, activation="relu"))
    before = picture(net)
    for target in ("torch", "sync"):
        with pytest.raises(SurgeryError, match="'1' has activation='relu'"):
            bn.convert(net, to=target)
    for target in ("group_norm", "layer_norm"):
        with pytest.raises(SurgeryError, match="pools over a sample"):
            bn.convert(net, to=target)
    with pytest.raises(SurgeryError, match="give an example"):
        bn.convert(nn.Sequential(nn.SyncBatchNorm(4)))
    with pytest.raises(SurgeryError, match="frozen"):
        bn.convert(bn.freeze(network()))

    class Own(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(SurgeryError, match=r"'0' is a .*Own"):
        bn.convert(nn.Sequential(Own(4)))
    assert picture(net) == before


def test_bad_options_name_themselves_and_change_nothing():
    net = network()
    before = picture(net)
    for options, message in (
        ({"nonfinit": "skip"}, "nonfinit"),
        ({"nonfinite": "never"}, "never"),
        ({"to": "jax"}, "jax"),
        ({"to": "torch", "nonfinite": "skip"}, "go with"),
        ({"decay": 0.9, "momentum": 0.1}, "two names"),
        ({"eps": float("nan")}, "eps"),
    ):
        with pytest.raises(InputError, match=message):
            bn.convert(net, **options)
    assert picture(net) == before
    with pytest.raises(SurgeryError, match="no batch normalization"):
        bn.convert(nn.Linear(2, 2))


def test_reverting_what_was_never_changed_is_nothing():
    net = network()
    before = picture(net)
    assert picture(bn.revert(net)) == before
