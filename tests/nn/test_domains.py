"""Domains: several sets of running statistics over one gamma and beta; what every verb makes of them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import distributed as dist
from torch import nn

import batchnorm as bn
from batchnorm.errors import InputError, SurgeryError

DATA = [torch.randn(16, 3) * (k + 1) + k for k in range(3)]


def trained(domains=3):
    net = nn.Sequential(bn.BatchNorm1d(3, domains=domains, momentum=None), nn.Linear(3, 2))
    for k in range(domains):
        with bn.use_domain(net, k):
            net(DATA[k])
    return net


def test_each_domain_has_the_statistics_of_its_own_data():
    net = trained()
    layer = net[0]
    assert layer.domain == 0
    for k, x in enumerate(DATA):
        alone = nn.BatchNorm1d(3, momentum=None)
        alone(x)
        for key in ("running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(getattr(layer, key)[k], getattr(alone, key))
        bn.use_domain(net.eval(), k)
        torch.testing.assert_close(layer(x), alone.eval()(x))
    with pytest.raises(ZeroDivisionError), bn.use_domain(net, 1):
        raise ZeroDivisionError
    assert layer.domain == 2


@pytest.mark.parametrize("index", [3, -1, True, 1.0, None])
def test_a_domain_that_there_is_not(index):
    net = nn.Sequential(bn.BatchNorm1d(3, domains=4), bn.BatchNorm1d(3, domains=3))
    with pytest.raises(InputError, match="domains 0 to"):
        bn.use_domain(net, index)
    assert net[0].domain == 0
    with pytest.raises(InputError, match="no layer with domains"):
        bn.use_domain(nn.Sequential(bn.BatchNorm1d(3)), 0)


def test_states():
    net, like = trained(), nn.Sequential(bn.BatchNorm1d(3, domains=3), nn.Linear(3, 2))
    like.load_state_dict(net.state_dict())
    assert torch.equal(like[0].running_var, net[0].running_var)
    plain = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    plain(DATA[2])
    like.load_state_dict(plain.state_dict())
    for row in like[0].running_mean:
        assert torch.equal(row, plain[0].running_mean)
    assert like[0].num_batches_tracked.tolist() == [1, 1, 1]
    with pytest.raises(RuntimeError, match="size mismatch"):
        plain.load_state_dict(net.state_dict())
    bn.use_domain(net, 2)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert twin[0].domain == 2
        assert torch.equal(twin.eval()(DATA[0]), net.eval()(DATA[0]))


def test_freezing():
    net = trained()
    before = copy.deepcopy(net.state_dict())
    bn.use_domain(bn.freeze(net), 1)
    y = net.train()(DATA[0])
    assert torch.equal(y, bn.unfreeze(net).eval()(DATA[0]))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    with bn.use_domain(net, 2), bn.accumulate(net.train()):
        net(DATA[0])
    changed = (net[0].running_mean != before["0.running_mean"]).any(1)
    assert changed.tolist() == [False, False, True]


def test_verbs_take_the_domain_in_use():
    net = trained()
    before = copy.deepcopy(net.state_dict())
    bn.use_domain(net, 1)
    bn.calibrate(net, [DATA[0]])
    torch.testing.assert_close(net[0].running_mean[1], DATA[0].mean(0))
    torch.testing.assert_close(net[0].running_var[1], DATA[0].var(0))
    changed = [key for key, value in net.state_dict().items() if not torch.equal(value, before[key])]
    assert changed == ["0.running_mean", "0.running_var"]
    assert torch.equal(net[0].running_mean[::2], before["0.running_mean"][::2])
    calibrated = copy.deepcopy(net.state_dict())
    bn.adapt(net, DATA[2], prior=0)
    torch.testing.assert_close(net[0].running_mean[1], DATA[2].mean(0))
    assert torch.equal(net[0].running_mean[::2], before["0.running_mean"][::2])
    bn.restore(net)
    assert all(torch.equal(value, calibrated[key]) for key, value in net.state_dict().items())
    assert bn.summary(net, DATA[0]).layers[0].health == "good"
    assert not bn.fold(net.eval(), DATA[0]).certificate.folded
    with pytest.raises(InputError, match=r"keeps \(3, 3\) statistics"):
        bn.to_flax(net)


def test_models_are_averaged_domain_by_domain():
    nets = [trained(), trained()]
    with bn.use_domain(nets[1], 0):
        nets[1](DATA[2])
    mean = bn.average_statistics(copy.deepcopy(nets[0]), nets)[0]
    torch.testing.assert_close(mean.running_mean[0], (2 * DATA[0].mean(0) + DATA[2].mean(0)) / 3)
    torch.testing.assert_close(mean.running_mean[1], DATA[1].mean(0))
    assert mean.num_batches_tracked.tolist() == [3, 2, 2]
    untouched = nn.Sequential(bn.BatchNorm1d(3, domains=2))
    untouched(DATA[0])
    merged = bn.average_statistics(copy.deepcopy(untouched), [untouched, untouched])
    assert torch.equal(merged[0].running_var[1], torch.ones(3))


def test_conversion_and_the_way_back():
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    net(DATA[1])
    state = copy.deepcopy(net.state_dict())
    bn.convert(net, domains=2)
    assert net[0].running_mean.shape == (2, 3)
    bn.revert(net)
    assert type(net[0]) is nn.BatchNorm1d
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    bn.convert(net, domains=2)
    with bn.use_domain(net, 1):
        net(DATA[0])
    shown, state = repr(net), copy.deepcopy(net.state_dict())
    with pytest.raises(SurgeryError, match=r"'0' has statistics of several domains"):
        bn.revert(net)
    assert repr(net) == shown
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    bn.use_domain(net, 1)
    bn.revert(bn.convert(net, domains=0))
    assert torch.equal(net[0].running_mean, state["0.running_mean"][1])
    assert net.state_dict().keys() == state.keys()

    frames = bn.BatchNorm1d(3, pool="frame", max_steps=2)
    frames(torch.randn(4, 2, 3))
    steps = frames.running_mean.clone()
    bn.convert(frames, domains=3)
    assert torch.equal(frames.running_mean, steps.expand(3, 2, 3))
    assert torch.equal(bn.revert(frames).running_mean, steps)


def test_options_that_do_not_go_together_change_nothing():
    net = nn.Sequential(nn.BatchNorm1d(6), nn.BatchNorm1d(4), nn.BatchNorm1d(3, track_running_stats=False))
    for options, reason in (
        ({"channel_groups": 3}, "'1' cannot have these options: channel_groups=3 does not divide 4"),
        ({"domains": 2}, "'2' cannot have these options: domains="),
        ({"renorm": bn.Renorm()}, "'2' cannot have these options: renorm= needs running statistics"),
        ({"running": "debiased", "momentum": None}, "needs a momentum"),
        ({"process_group": "world", "ghost_size": 2, "ghost_update": "decay"}, "give 'merge'"),
    ):
        with pytest.raises(SurgeryError, match=reason):
            bn.convert(net, **options)
        assert {type(layer) for layer in net} == {nn.BatchNorm1d}


def test_synchronized_layers_of_torch():
    net = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3, eps=1e-3))).eval()
    before, x = repr(net), torch.randn(2, 2, 3, 3)
    bn.convert(net, example=x)
    assert (type(net[1]), net[1].process_group, net[1].label) == (bn.BatchNorm2d, "world", "1")
    bn.convert(net, process_group=None)
    assert net[1].process_group is None
    bn.revert(net)
    assert repr(net) == before
    assert net[1].process_group is None
    assert "label" not in vars(net[1])
    with pytest.raises(SurgeryError, match="give an example"):
        bn.convert(net)

    ours = nn.Sequential(bn.BatchNorm2d(3, process_group="world"))
    bn.convert(ours, to="sync")
    assert type(ours[0]) is nn.SyncBatchNorm
    assert ours[0].process_group is None
    assert bn.revert(ours)[0].process_group == "world"


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
def test_copies_share_the_process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        group = dist.new_group()
        net = bn.convert(nn.Sequential(nn.BatchNorm1d(3)), process_group=group)
        twin = copy.deepcopy(net)
        assert twin[0].process_group is group
        assert twin[0].weight is not net[0].weight
        with pytest.raises(InputError, match=r"layer '0' cannot be pickled"):
            pickle.dumps(net)
        bn.convert(net, process_group="world")
        assert pickle.loads(pickle.dumps(net))[0].process_group == "world"
        bn.revert(net)
        parallel = nn.parallel.DistributedDataParallel(bn.convert(net, process_group="world"))
        with pytest.raises(InputError, match="no layer of the network shares"):
            bn.joinable(parallel)
        with pytest.raises(InputError, match="got a Sequential"):
            bn.joinable(net)
        del parallel  # its reducer holds the group, whose threads can wait for the interpreter
    finally:
        dist.destroy_process_group()
