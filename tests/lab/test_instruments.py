"""Instruments: known answers on quadratic and linear networks, and nothing of the network changes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

import batchnorm as bn
from batchnorm.errors import InputError
from batchnorm.lab.instruments import (
    Objective,
    Recorder,
    activations,
    covariate_shift,
    descent,
    gradient_norms,
    loss_surface,
    weight_scales,
)


class Quadratic(nn.Module):
    """L = theta^T A theta / 2, its gradient A theta."""

    def __init__(self, hessian):
        super().__init__()
        self.theta = nn.Parameter(torch.randn(len(hessian), dtype=torch.float64))
        self.hessian = hessian

    def forward(self, batch):
        return self.theta @ self.hessian @ self.theta / 2


def quadratic(size=4):
    root = torch.randn(size, size, dtype=torch.float64)
    return Quadratic(root @ root.T)


def run(net, batch):
    return net(batch)


def busy_network():
    """Everything that a probe could disturb: dropout, both kinds of batch norm, a frozen part, a shared layer."""
    shared = nn.Linear(6, 6)
    net = nn.Sequential(
        nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), shared, bn.BatchNorm1d(6, running="cumulative"),
        shared, bn.BatchNorm1d(6, renorm=bn.Renorm(warmup=0)), nn.ReLU(), nn.BatchNorm1d(6, momentum=None),
        nn.Linear(6, 3),
    )  # fmt: skip
    net[9].eval()
    net[10].bias.requires_grad_(False)
    return net


PROBES = {
    "descent": lambda net, batch: descent(net, batch, 0.1),
    "covariate_shift": lambda net, batch: covariate_shift(net, batch, 0.1),
    "activations": activations,
    "gradient_norms": gradient_norms,
    "loss_surface": loss_surface,
    "weight_scales": lambda net, batch: weight_scales(net, 0.1),
}


@pytest.mark.parametrize("name", PROBES)
def test_nothing_changes_to_the_bit(name):
    net = busy_network()
    batch = torch.randn(8, 5), torch.randint(3, (8,))
    Objective(net, batch)(dict(net.named_parameters())).backward()
    state = {key: value.clone() for key, value in net.state_dict().items()}
    state |= {key: value.clone() for key, value in net.named_buffers()}
    gradients = {key: (p.grad, None if p.grad is None else p.grad.clone()) for key, p in net.named_parameters()}
    versions = {key: p._version for key, p in net.named_parameters()}
    modes = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()]
    random = torch.get_rng_state()
    first = PROBES[name](net, batch)
    assert torch.equal(random, torch.get_rng_state())
    assert modes == [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()]
    assert versions == {key: p._version for key, p in net.named_parameters()}
    for key, value in [*net.state_dict().items(), *net.named_buffers()]:
        assert torch.equal(value, state[key]), key
    for key, p in net.named_parameters():
        before, copy = gradients[key]
        assert p.grad is before
        assert copy is None or torch.equal(p.grad, copy)
    assert PROBES[name](net, batch) == first  # the same random numbers: the same dropout masks


@pytest.mark.parametrize("name", [name for name in PROBES if name != "weight_scales"])  # which runs no forward
def test_nothing_changes_when_the_loss_raises(name):
    net = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
    state = {key: value.clone() for key, value in net.state_dict().items()}
    batch = torch.randn(1, 5), torch.zeros(1, dtype=torch.long)
    random = torch.get_rng_state()
    with pytest.raises(ValueError, match="Expected"):
        PROBES[name](net, batch)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize("name", PROBES)
def test_ten_forward_backwards_at_most(name):
    calls = {"forward": 0, "backward": 0}

    class Counting(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            calls["forward"] += 1
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            calls["backward"] += 1
            return dy

    class Counted(nn.Sequential):
        def forward(self, x):
            return Counting.apply(super().forward(x))

    net = Counted(*(nn.Linear(4, 4) for _ in range(25)))
    PROBES[name](net, (torch.randn(6, 4), torch.randint(4, (6,))))
    assert calls["forward"] + 2 * calls["backward"] <= 30  # a backward is two forwards
    assert calls["backward"] <= 10


def test_descent_on_a_quadratic():
    net = quadratic()
    g, rate = (net.hessian @ net.theta).detach(), 0.01
    found = descent(net, None, rate, factors=(0.5, 1.0, 4.0), loss=run)
    assert found.loss == pytest.approx(float(run(net, None).detach()))
    assert found.gradient_norm == pytest.approx(float(g.norm()))
    for factor, loss, distance in zip((0.5, 1.0, 4.0), found.losses, found.gradient_distances, strict=True):
        theta = net.theta.detach() - factor * rate * g
        assert loss == pytest.approx(float(theta @ net.hessian @ theta / 2), rel=1e-12)
        assert distance == pytest.approx(float(factor * rate * (net.hessian @ g).norm()), rel=1e-9)
    assert found.smoothness == pytest.approx(float((net.hessian @ g).norm() / g.norm()), rel=1e-9)


def test_descent_where_the_gradient_is_zero_and_bad_input():
    net = quadratic()
    nn.init.zeros_(net.theta)
    assert descent(net, None, 0.1, loss=run).smoothness == 0
    with pytest.raises(InputError, match="step sizes"):
        descent(net, None, 0.0, loss=run)
    with pytest.raises(InputError, match="batch"):
        descent(nn.Linear(2, 2), torch.randn(3, 2), 0.1)
    with pytest.raises(InputError, match="requires_grad"):
        descent(nn.ReLU(), (torch.randn(3, 2), torch.zeros(3, dtype=torch.long)), 0.1)


def test_covariate_shift_of_a_linear_network():
    """L = (c b a x)^2/2 with scalars: G_b = c a x (c b a x), and G'_b has a moved alone."""
    net = nn.Sequential(*(nn.Linear(1, 1, bias=False, dtype=torch.float64) for _ in range(3)))
    a, b, c = (float(layer.weight.detach()) for layer in net)
    x, rate = 0.7, 0.1
    found = covariate_shift(
        net, torch.tensor([[x]], dtype=torch.float64), rate, loss=lambda net, x: net(x).square().sum() / 2
    )

    def gradients(a, b, c):
        return tuple((a * b * c * x) * a * b * c * x / w for w in (a, b, c))

    da, db, _ = gradients(a, b, c)
    own = gradients(a, b, c)
    moved = (own[0], gradients(a - rate * da, b, c)[1], gradients(a - rate * da, b - rate * db, c)[2])
    assert found.layers == ("0", "1", "2")
    assert found.norms == pytest.approx([abs(g - h) for g, h in zip(own, moved, strict=True)], rel=1e-9)
    assert found.relative_norms == pytest.approx([abs(1 - h / g) for g, h in zip(own, moved, strict=True)], rel=1e-9)
    assert found.cosines == pytest.approx([math.copysign(1, g * h) for g, h in zip(own, moved, strict=True)])


def test_covariate_shift_follows_the_calls_and_takes_gamma_with_the_layers_behind():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.norm, self.first = nn.Linear(4, 3), nn.BatchNorm1d(4), nn.Linear(5, 4)

        def forward(self, x):
            return self.last(self.norm(self.first(x)))

    net, batch, rate = Backwards().double(), (torch.randn(8, 5).double(), torch.randint(3, (8,))), 0.5
    found = covariate_shift(net, batch, rate)
    assert found.layers == ("first", "last")
    assert found.norms[0] == 0
    objective = Objective(net, batch)
    _, g = objective.gradient()
    moved = {n: p - rate * g[n] * (not n.startswith("last")) for n, p in objective.parameters.items()}
    with torch.enable_grad():
        leaves = {n: p.requires_grad_() for n, p in moved.items()}
        there = torch.autograd.grad(
            nn.functional.cross_entropy(functional_call(net, leaves, batch[0]), batch[1]),
            [leaves["last.weight"], leaves["last.bias"]],
        )
    expected = torch.cat([(g["last.weight"] - there[0]).flatten(), g["last.bias"] - there[1]]).norm()
    assert found.norms[1] == pytest.approx(float(expected), rel=1e-9)
    assert found.norms[1] > 0
    with pytest.raises(InputError, match="owns no trained parameters"):
        covariate_shift(net, batch, rate, layers=["nowhere"])


def test_activations_and_gradients_of_a_linear_layer():
    net = nn.Linear(3, 2, dtype=torch.float64)
    x, y = torch.randn(40, 3, dtype=torch.float64), torch.randint(2, (40,))
    found = activations(nn.Sequential(net), (x, y), ["0"], unit=1, bins=7)["0"]
    values = (x @ net.weight[1] + net.bias[1]).detach()
    assert found.percentiles == pytest.approx(torch.quantile(values, torch.tensor([0.15, 0.5, 0.85]).double()).tolist())
    assert sum(found.counts) == 40
    assert len(found.edges) == len(found.counts) + 1 == 8
    assert (found.edges[0], found.edges[-1]) == pytest.approx((float(values.min()), float(values.max())))
    assert (found.mean, found.std) == pytest.approx((float(values.mean()), float(values.std(correction=0))))
    probabilities = torch.softmax(net(x), 1).detach() - nn.functional.one_hot(y, 2)
    gradient = torch.cat([probabilities.T @ x / 40, probabilities.sum(0)[:, None] / 40], 1)
    assert gradient_norms(net, (x, y))[""] == pytest.approx(float(gradient.norm()))
    with pytest.raises(InputError, match="no layer"):
        activations(net, (x, y), ["nowhere"])


def test_surface_of_a_quadratic():
    net = quadratic(3)
    d1, d2 = torch.randn(2, 3, dtype=torch.float64)
    found = loss_surface(net, None, radius=0.5, points=3, directions=({"theta": d1}, {"theta": d2}), loss=run)
    assert found.offsets == (-0.5, 0.0, 0.5)
    for a, row in zip(found.offsets, found.losses, strict=True):
        for b, value in zip(found.offsets, row, strict=True):
            theta = net.theta.detach() + a * d1 + b * d2
            assert value == pytest.approx(float(theta @ net.hessian @ theta / 2), rel=1e-9)
    with pytest.raises(InputError, match="odd"):
        loss_surface(net, None, points=4, loss=run)


def test_filter_normalized_directions_have_the_weights_norms():
    """L = sum of rows' squared norms: its cross term aside, a step of 1 adds each row's own squared norm."""
    net = nn.Conv2d(50, 4, 2, bias=False, dtype=torch.float64)
    found = loss_surface(net, None, points=3, loss=lambda net, _: net.weight.square().sum())
    middle = float(net.weight.detach().square().sum())
    along = (found.losses[0][1] + found.losses[2][1]) / 2  # the cross terms cancel
    assert found.losses[1][1] == pytest.approx(middle)
    assert along == pytest.approx(2 * middle)


def test_the_loss_does_not_see_a_normalized_weights_scale():
    net = nn.Sequential(nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4, eps=1e-30), nn.Linear(4, 3)).double()
    batch = torch.randn(16, 5).double(), torch.randint(3, (16,))
    small = weight_scales(net, 0.1)["0"]
    gradient = gradient_norms(net, batch)["0"]
    with torch.no_grad():
        net[0].weight.mul_(4)
    large = weight_scales(net, 0.1)["0"]
    assert large.norm == pytest.approx(4 * small.norm)
    assert large.effective_learning_rate == pytest.approx(small.effective_learning_rate / 16)
    assert gradient_norms(net, batch)["0"] == pytest.approx(gradient / 4)


def test_tied_weights_move_together():
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)).double()
    net[1].weight = net[0].weight
    x = torch.randn(4, 3, dtype=torch.float64)
    value, gradient = Objective(net, x, lambda net, x: net(x).square().sum()).gradient()
    net(x).square().sum().backward()
    assert list(gradient) == ["0.weight"]
    torch.testing.assert_close(gradient["0.weight"], net[0].weight.grad)
    assert value == pytest.approx(float(net(x).detach().square().sum()))


def test_recorder_keeps_its_steps():
    net = nn.Linear(3, 2)
    recorder = Recorder(net, {"scale": lambda net, batch: weight_scales(net, 0.1)[""].norm}, every=3)
    for _ in range(7):
        recorder(None)
        with torch.no_grad():
            net.weight.mul_(2)
    steps, norms = zip(*recorder.records["scale"], strict=True)
    assert steps == (0, 3, 6)
    assert norms == pytest.approx([norms[0], 8 * norms[0], 64 * norms[0]])
    with pytest.raises(InputError, match="every"):
        Recorder(net, {}, every=0)
