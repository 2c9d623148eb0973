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
    with pytest.raises(SurgeryError, match="give an example"):
        bn.convert(nn.Sequential(nn.SyncBatchNorm(4)))
    with pytest.raises(SurgeryError, match="frozen"):
        bn.convert(bn.freeze(network()))

    class Own(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) * (2 if self.training else 1)

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


BY_SAMPLE = {
    "group norm": (lambda: nn.GroupNorm(2, 6), (6, 5, 4)),
    "one group": (lambda: nn.GroupNorm(1, 6, eps=1e-2), (6, 5)),
    "instance norm": (lambda: nn.GroupNorm(6, 6), (6, 3, 3, 3)),
    "rows in groups": (lambda: nn.GroupNorm(2, 6, affine=False), (6,)),
    "layer norm": (lambda: nn.LayerNorm(6, bias=False), (6,)),
    "layer norm over space": (lambda: nn.LayerNorm((6, 5, 4)), (6, 5, 4)),
    "layer norm without gamma": (lambda: nn.LayerNorm((6, 5), elementwise_affine=False), (6, 5)),
}


def parts(net):
    """All that a copy must have, parameters and their gradients' flags too."""
    return [
        (m.__class__, {k: v for k, v in m.__dict__.items() if k not in nn.Module().__dict__}, sorted(m._buffers))
        for m in net.modules()
    ], [(name, p.shape, p.requires_grad) for name, p in net.named_parameters()]


@pytest.mark.parametrize("name", BY_SAMPLE)
def test_normalization_of_each_sample_is_a_form_of_ours(name):
    make, shape = BY_SAMPLE[name]
    net = nn.Sequential(nn.Identity(), make())
    one_a_channel = not isinstance(net[1], nn.LayerNorm) or len(net[1].normalized_shape) == 1
    for parameter in net.parameters():
        nn.init.normal_(parameter) if one_a_channel else nn.init.constant_(parameter, 1.5)
    of = "layer_norm" if isinstance(net[1], nn.LayerNorm) else "group_norm"
    original, before, state = copy.deepcopy(net), parts(net), copy.deepcopy(net.state_dict())
    parameters = list(net.parameters())
    bn.convert(net, torch.randn(3, *shape), of=of)
    assert isinstance(net[1], (bn.BatchNorm1d, bn.BatchNorm2d, bn.BatchNorm3d))
    assert net.state_dict().keys() == state.keys()
    if one_a_channel:
        assert all(a is b for a, b in zip(parameters, net.parameters(), strict=True))
    for batch in (1, 4):
        for mode in (True, False):
            x, y = (torch.randn(batch, *shape, dtype=torch.float64).requires_grad_() for _ in range(2))
            with torch.no_grad():
                y.copy_(x)
            expected = original.train(mode).double()(x)
            actual = net.train(mode).double()(y)
            torch.testing.assert_close(actual, expected)
            upstream = torch.randn_like(expected)
            expected.backward(upstream)
            actual.backward(upstream)
            torch.testing.assert_close(y.grad, x.grad, rtol=1e-6, atol=1e-8)
    net.float()
    back = bn.convert(copy.deepcopy(net), torch.randn(2, *shape), to="group_norm")
    assert type(back[1]) is nn.GroupNorm
    x = torch.randn(5, *shape)
    torch.testing.assert_close(back(x), net(x))
    torch.testing.assert_close(bn.revert(back)(x), net(x))
    if of == "layer_norm" and len(shape) == 1:
        again = bn.convert(copy.deepcopy(net), torch.randn(2, *shape), to="layer_norm")
        torch.testing.assert_close(again(x), net(x))
        assert repr(again[1]) == repr(original[1])
    bn.revert(net)
    assert parts(net) == before
    for key, value in net.state_dict().items():
        assert torch.equal(value, state[key])


def test_ours_to_group_norm_and_back():
    net = nn.Sequential(bn.BatchNorm2d(6, track_running_stats=False, ghost_size=1, channel_groups=3, source="batch"))
    before, x = parts(net), torch.randn(4, 6, 3, 3)
    expected = net(x)
    bn.convert(net, to="group_norm")
    assert repr(net[0]) == repr(nn.GroupNorm(3, 6))
    torch.testing.assert_close(net(x), expected)
    assert parts(bn.revert(net)) == before


LAYERS = {
    "pools over a sample": lambda: nn.BatchNorm2d(6),
    "computes the same": lambda: bn.BatchNorm2d(6, channel_groups=2),
    "keeps running statistics": lambda: bn.BatchNorm2d(6, ghost_size=1, source="batch"),
    "has activation='relu'": lambda: bn.BatchNorm2d(6, ghost_size=1, track_running_stats=False, activation="relu"),
}


@pytest.mark.parametrize("reason", LAYERS)
@pytest.mark.parametrize("to", ["group_norm", "layer_norm"])
def test_what_pools_over_the_batch_is_no_group_norm(reason, to):
    net = nn.Sequential(LAYERS[reason]())
    before = parts(net)
    with pytest.raises(SurgeryError, match=reason):
        bn.convert(net, torch.randn(2, 6, 3, 3), to=to)
    assert parts(net) == before


def test_normalization_of_each_sample_that_has_no_form():
    places = nn.LayerNorm((6, 4))
    nn.init.normal_(places.weight)
    flat = bn.BatchNorm2d(6, ghost_size=1, channel_groups=1, track_running_stats=False)
    for layer, of, x, reason in (
        (places, "layer_norm", torch.randn(2, 6, 4), "differ between the places"),
        (nn.LayerNorm(6), "layer_norm", torch.randn(2, 4, 6), "each position by itself"),
        (nn.GroupNorm(2, 6), "group_norm", None, "give an example"),
        (nn.GroupNorm(2, 6), "group_norm", torch.randn(2, 6, 1, 1, 1, 2), "with 6 axes"),
    ):
        net = nn.Sequential(layer)
        with pytest.raises(SurgeryError, match=reason):
            bn.convert(net, x, of=of)
        assert net[0] is layer
    for x in (None, torch.randn(2, 6, 3, 3)):
        with pytest.raises(SurgeryError, match="an example has to show"):
            bn.convert(nn.Sequential(copy.deepcopy(flat)), x, to="layer_norm")
    for options in ({"to": "torch"}, {"nonfinite": "skip"}):
        with pytest.raises(InputError, match="goes with to='batchnorm'"):
            bn.convert(nn.Sequential(nn.GroupNorm(2, 6)), of="group_norm", **options)
    with pytest.raises(SurgeryError, match="no GroupNorm"):
        bn.convert(nn.Sequential(nn.BatchNorm2d(6)), of="group_norm")
