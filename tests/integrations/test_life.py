"""Each part of a life in training does what it says, in any loop."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.errors import InputError
from batchnorm.integrations.life import Life, layer_modes, set_layer_modes
from batchnorm.surgery.freezing import is_frozen

DATA = [3 * torch.randn(8, 4, generator=torch.Generator().manual_seed(k)) + k for k in range(4)]


def network(kind=nn.BatchNorm1d):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), kind(8), nn.ReLU(), nn.Linear(8, 2))


def train(net, life, optimizer, epochs=2, micro=2):
    for epoch in range(epochs):
        life.epoch(epoch)
        for start in range(0, len(DATA), micro):
            with life.step():
                optimizer.zero_grad()
                for x in DATA[start : start + micro]:
                    net(x).square().mean().backward()
                optimizer.step()
        life.validation()


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, bn.BatchNorm1d])
def test_micro_batches_count_as_one_and_the_end_is_exact(kind):
    net = network(kind)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    with Life(net, optimizer) as life:
        train(net, life, optimizer, epochs=1)
    assert int(net[1].num_batches_tracked) == 2
    with torch.no_grad():
        z = [net[0](torch.cat(DATA[k : k + 2])).double() for k in (0, 2)]
    expected = torch.zeros(8, dtype=torch.float64)
    for each in z:
        expected = 0.9 * expected + 0.1 * each.mean(0)
    torch.testing.assert_close(net[1].running_mean.double(), expected, rtol=1e-5, atol=1e-5)
    with Life(net, optimizer, batches=DATA) as life:
        train(net, life, optimizer, epochs=1)
    whole = torch.cat(z)
    torch.testing.assert_close(net[1].running_mean.double(), whole.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(net[1].running_var.double(), whole.var(0), rtol=1e-5, atol=1e-5)
    assert type(net[1]) is kind


def test_layers_are_frozen_from_the_epoch_on():
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    seen = []
    with Life(net, optimizer, batches=DATA, freeze_from_epoch=1) as life:
        for epoch in range(3):
            life.epoch(epoch)
            seen.append(is_frozen(net[1]))
            before = net[1].running_mean.clone()
            with life.step():
                net(DATA[0]).sum().backward()
            assert torch.equal(before, net[1].running_mean) == (epoch >= 1)
    assert seen == [False, True, True]


def test_the_average_of_the_weights_has_its_own_statistics():
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    expected = copy.deepcopy(net)
    with Life(net, optimizer, batches=lambda: DATA, ema=0.5) as life:
        for _ in range(3):
            with life.step():
                optimizer.zero_grad()
                net(DATA[0]).square().mean().backward()
                optimizer.step()
            for mean, own in zip(expected.parameters(), net.parameters(), strict=True):
                mean.data = 0.5 * mean.data + 0.5 * own.data
    for name, mean in life.ema.named_parameters():
        torch.testing.assert_close(mean, expected.get_parameter(name))
        assert not mean.requires_grad
    z = life.ema[0](torch.cat(DATA)).double()
    torch.testing.assert_close(life.ema[1].running_mean.double(), z.mean(0), rtol=1e-4, atol=1e-4)


def test_buffers_of_the_average_are_found_by_name():
    """A buffer that the network gets after the start does not shift those behind it."""
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    with Life(net, optimizer, accumulate=False, ema=0.5) as life:
        net[0].register_buffer("seen", torch.full((8,), 7.0))
        train(net, life, optimizer, epochs=1)
    assert torch.equal(life.ema[1].running_mean, net[1].running_mean)
    assert torch.equal(life.ema[1].running_var, net[1].running_var)


def test_calibration_before_validation_is_on_a_budget():
    net = network()
    with Life(net, batches=DATA, calibrate_before_validation=16, calibrate_at_end=False) as life:
        life.validation()
    with torch.no_grad():
        z = net[0](torch.cat(DATA[:2]))
    torch.testing.assert_close(net[1].running_mean, z.mean(0))


def test_an_error_leaves_the_statistics_of_the_step():
    net = network()
    before = copy.deepcopy(net.state_dict())
    life = Life(net, batches=DATA)

    def fail():
        with life, life.step():
            net(DATA[0])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
    assert type(net[1]) is nn.BatchNorm1d


def test_modes_travel_where_weights_alone_are_kept():
    net = bn.freeze(network())
    bn.set_mode(other := network(bn.BatchNorm1d), update="never")
    for given in (net, other):
        saved = json.loads(json.dumps(layer_modes(given)))
        twin = set_layer_modes(network(), saved)
        assert layer_modes(twin) == saved
    assert is_frozen(set_layer_modes(network(), layer_modes(net))[1])
    assert layer_modes(network()) == {}
    with pytest.raises(InputError, match="'0' is no batch normalization"):
        set_layer_modes(network(), {"0": {}})


def test_a_checkpoint_gives_all_of_it_back():
    net = network()
    life = Life(net, ema=0.9)
    life.begin()
    life.epoch(0)
    bn.freeze(net)
    state = life.state_dict()
    again = Life(network(), ema=0.9)
    again.begin()
    with torch.no_grad():
        life.ema[0].weight.add_(1)
    again.load_state_dict(life.state_dict())
    assert is_frozen(again.net[1])
    assert torch.equal(again.ema[0].weight, life.ema[0].weight)
    with pytest.raises(InputError, match="no state of Life"):
        again.load_state_dict({**state, "version": 0})


def test_the_watch_is_told_the_losses():
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with Life(net, optimizer, watch={"every": 1}) as life:
        for x in DATA:
            life.step_begins()
            loss = net(x).square().mean()
            loss.backward()
            optimizer.step()
            life.step_ends(loss)
        assert len(life.watch.readings) == 4
        assert life.watch.readings[-1].values["loss"] == pytest.approx(float(loss.detach()))
        assert life.watch.readings[-1].layers[0].rate is not None


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"calibrate_before_validation": 8}, "needs batches"),
        ({"ema": 1.0}, "ema"),
        ({"freeze_from_epoch": -1}, "from 0 up"),
    ],
)
def test_wrong_options(options, match):
    with pytest.raises(InputError, match=match):
        Life(network(), **options)
    with pytest.raises(InputError, match="no batch normalization"):
        Life(nn.Linear(2, 2))
