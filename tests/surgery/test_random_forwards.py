"""Networks whose forward draws random numbers in Python, to skip layers, say, and those that decide by their data."""

from __future__ import annotations

import copy
import functools
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_networks import Calls, randomize
from torch import nn

import batchnorm as bn
from batchnorm.errors import SurgeryError

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()


class One(Calls):
    """With one argument, so that its own forward can be traced."""

    def forward(self, x):
        return self.run(self, x)


P = 0.02  # a skip that few draws show


def skips(self):
    return self.training and bool(torch.rand(()) < P)


@functools.cache
def seeds():
    """Some in which the first draw skips, and some in which it does not."""
    drawn = {}
    for seed in range(1000):
        torch.manual_seed(seed)
        drawn.setdefault(bool(torch.rand(()) < P), []).append(seed)
    return drawn[True][:4] + drawn[False][:4]


def outputs(net, training):
    """Outputs and running statistics for several draws."""
    net, found = copy.deepcopy(net).train(training), []
    for seed in seeds():
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        with torch.no_grad():
            found.append(net(IMAGES))
    return torch.stack(found), [buffer.double() for _, buffer in sorted(net.named_buffers()) if "batches" not in _]


def assert_same(a, b):
    for training in (False, True):
        (y, statistics), (z, others) = outputs(a, training), outputs(b, training)
        torch.testing.assert_close(y, z, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(statistics, others, rtol=1e-9, atol=1e-10)


def layers(**more):
    return {"conv": nn.Conv2d(3, 3, 3, padding=1), "norm": nn.BatchNorm2d(3), **more}


def branch_in_a_sequential():
    def forward(self, x):
        return x if skips(self) else x + self.branch(x)

    return One(forward, branch=nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()))


def own_calls():
    def forward(self, x):
        return x if skips(self) else F.relu(self.norm(self.conv(x)) + x)

    return One(forward, **layers())


def activation_without_the_layer():
    def forward(self, x):
        x = self.conv(x)
        return self.act(x if skips(self) else self.norm(x))

    return One(forward, **layers(act=nn.ReLU()))


def layer_without_the_activation():
    def forward(self, x):
        x = self.norm(self.conv(x))
        return x if skips(self) else self.act(x)

    return One(forward, **layers(act=nn.ReLU()))


def noise_of_numpy():
    def forward(self, x):
        x = F.relu(self.norm(self.conv(x)))
        return x * torch.tensor(np.random.rand(len(IMAGES)) > 0.5)[:, None, None, None] if self.training else x

    return One(forward, **layers())


def noise_of_python():
    def forward(self, x):
        x = F.relu(self.norm(self.conv(x)))
        return x * random.random() if self.training else x

    return One(forward, **layers())


def noise_elsewhere():
    """Its module draws, but neither the layer nor the activation depends on it."""

    def drop(self, x):
        return x * (torch.rand(len(IMAGES), 1, 1, 1) > 0.3) if self.training else x

    def forward(self, x):
        return self.drop(self.act(self.norm(self.conv(x))))

    return One(forward, **layers(act=nn.ReLU(), drop=One(drop)))


KINDS = [
    branch_in_a_sequential,
    own_calls,
    activation_without_the_layer,
    layer_without_the_activation,
    noise_of_numpy,
    noise_of_python,
    noise_elsewhere,
]
FUSED = [branch_in_a_sequential, noise_elsewhere]


@pytest.mark.parametrize("make", KINDS)
def test_accelerate_keeps_the_draws(make):
    net = randomize(make()).double()
    original = copy.deepcopy(net)
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)
    bn.accelerate(net, IMAGES)
    drawn = float(torch.rand(())), float(np.random.rand()), random.random()
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)
    assert drawn == (float(torch.rand(())), float(np.random.rand()), random.random())
    assert bool(net.report.fused) is (make in FUSED)
    assert net.report.fused or "random numbers are drawn" in str(net.report)
    assert_same(original, net)
    assert_same(original, bn.revert(net))


@pytest.mark.parametrize("make", KINDS)
def test_insert_takes_the_flow_of_evaluation(make):
    for seed in range(3):
        net = randomize(make()).double().train()
        for name, module in list(net.named_modules()):
            if isinstance(module, nn.BatchNorm2d):
                parent, _, key = name.rpartition(".")
                setattr(net.get_submodule(parent), key, nn.Identity())
        net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), net, nn.Conv2d(3, 2, 1)).double()
        torch.manual_seed(seed)
        bn.insert(net, IMAGES)
        assert net.training
        assert sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) == 2


def test_summary_sees_what_a_draw_skips():
    def forward(self, x):
        return x if self.training and torch.rand(()) < 0.5 else self.norm(self.conv(x))

    net = One(forward, **layers()).double().train()
    for seed in range(4):
        torch.manual_seed(seed)
        found = bn.summary(net, IMAGES)
        assert found.note is None
        assert [row.fed_by for row in found.layers] == [("conv",)]


def test_fold_names_the_way_out():
    net = bn.freeze(own_calls().double()).train()
    with pytest.raises(SurgeryError, match=r"draws random numbers outside torch; call net\.eval\(\) first"):
        bn.fold(net, IMAGES)
    assert len(bn.fold(net.eval(), IMAGES).certificate.folded) == 1


def test_a_weighting_that_is_random_keeps_its_draws():
    """A network that is random in evaluation, too: nothing of it is generated anew."""

    def forward(self, x):
        return F.relu(self.norm(self.conv(x))) * torch.rand(len(IMAGES), 1, 1, 1)

    net = randomize(One(forward, **layers())).double()
    original = copy.deepcopy(net)
    bn.accelerate(net, IMAGES)
    assert not net.report.fused
    assert_same(original, net)
    with pytest.raises(SurgeryError, match="fold the parts that do not"):
        bn.fold(original.eval(), IMAGES)


class Deciding(nn.Module):
    """No graph can follow it."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.SiLU())
        self.second = One(lambda self, x: F.relu(self.norm(self.conv(x)) + x), **layers())
        self.third = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())

    def forward(self, x):
        x = self.second(self.first(x))
        if float(x.detach().abs().max()) > 1e9:
            x = x / 2
        return self.third[2](self.third[1](self.third[0](x)))


def test_what_cannot_be_captured_is_accelerated_part_by_part():
    net = randomize(Deciding()).double()
    original = copy.deepcopy(net)
    bn.accelerate(net, IMAGES)
    assert net.report.fused == {"first.1": "silu", "second.norm": "an addition and relu"}
    assert net.report.swapped == ("third.1",)
    assert "cannot be captured" in net.report.unfused[""]
    assert_same(original, net)


def test_a_part_of_a_sequential_that_is_called_from_outside_is_left_alone():
    class Twice(Deciding):
        def forward(self, x):
            return super().forward(x) + self.first[1](x)

    net = randomize(Twice()).double()
    original = copy.deepcopy(net)
    bn.accelerate(net, IMAGES)
    assert "first.1" not in net.report.fused
    assert_same(original, net)


GENERATOR = random.Random(0)


class Drawn:
    """A skip that a generator of the network's own draws."""

    def __init__(self, generator):
        self.generator = generator

    def __call__(self):
        return self.generator.random() < P


class DrawnByTorch(Drawn):
    def __call__(self):
        return bool(torch.rand((), generator=self.generator) < P)

    def __deepcopy__(self, memo):
        generator = torch.Generator()
        generator.set_state(self.generator.get_state())
        return DrawnByTorch(generator)


class Counted:
    """Each 50th call skips."""

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return self.calls % 50 == 0


class Skipping(nn.Module):
    def __init__(self, skips, calls):
        super().__init__()
        self.block = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)])
        self.act, self.skips = nn.ReLU() if calls else None, skips

    def forward(self, x):
        for layer in self.block:
            x = layer(x)
        if self.training and self.skips():
            return x
        return F.relu(x) if self.act is None else self.act(x)


class SkippingByGlobal(Skipping):
    def forward(self, x):
        for layer in self.block:
            x = layer(x)
        if self.training and GENERATOR.random() < P:
            return x
        return F.relu(x) if self.act is None else self.act(x)


@pytest.mark.parametrize("calls", [True, False], ids=["module", "function"])
@pytest.mark.parametrize(
    "make",
    [
        lambda calls: Skipping(Drawn(random.Random(0)), calls),
        lambda calls: Skipping(Drawn(np.random.default_rng(0)), calls),
        lambda calls: Skipping(Drawn(np.random.RandomState(0)), calls),
        lambda calls: Skipping(DrawnByTorch(torch.Generator().manual_seed(0)), calls),
        lambda calls: Skipping(Counted(), calls),
        lambda calls: SkippingByGlobal(None, calls),
    ],
    ids=["Python's", "NumPy's", "NumPy's old", "torch's", "counter", "global"],
)
def test_a_forward_that_decides_by_numbers_of_its_own_is_left_alone(make, calls):
    net = randomize(make(calls)).double()
    fast = bn.accelerate(net, IMAGES, inplace=False)
    assert not fast.report.fused
    assert "changes numbers or generators of its own" in fast.report.unfused[""]
    found = []
    for each in (net, fast):
        GENERATOR.seed(1)
        steps = copy.deepcopy(each).train()
        with torch.no_grad():
            found.append(torch.stack([steps(IMAGES) for _ in range(120)]))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-10)
    assert (found[0] < 0).any()  # some were skipped


def test_what_a_forward_keeps_from_its_first_run_or_writes_as_tensors_is_no_decision():
    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.act = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
            self.side, self.last = 0, None

        def forward(self, x):
            self.side = x.shape[-1]
            self.last = self.act(self.norm(self.conv(x)))
            return self.last

    fast = bn.accelerate(randomize(Keeping()).double(), IMAGES, inplace=False)
    assert list(fast.report.fused) == ["norm"]
