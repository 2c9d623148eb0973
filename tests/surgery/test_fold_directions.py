"""Folding forwards and backwards through what commutes with a channel's scale and shift, and through nothing else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_networks import Calls, randomize
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import batchnorm as bn
from batchnorm.surgery.layers import ScaleShift


def statistics_without_zeros(net, positive=False):
    """Random statistics, no gamma near zero."""
    for module in randomize(net).modules():
        if isinstance(module, _BatchNorm) and module.weight is not None:
            with torch.no_grad():
                signs = torch.ones_like(module.weight) if positive else module.weight.sign()
                module.weight.copy_(signs * module.weight.abs().clamp(0.3))
                module.weight[0] = 0.7
    return net.eval()


def norms(net):
    return [module for module in net.modules() if isinstance(module, (_BatchNorm, ScaleShift))]


def folded_away(net, *inputs):
    """Folds, checks that nothing is left and that the outputs agree in float64; gives the certificate."""
    net = net.double()
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    result = bn.fold(net, inputs)
    assert not norms(result.model), result.certificate
    with torch.no_grad():
        torch.testing.assert_close(result.model(*inputs), net(*inputs), rtol=1e-11, atol=1e-11)
        wide = tuple(torch.cat([x, x, x]) for x in inputs)
        torch.testing.assert_close(result.model(*wide), net(*wide), rtol=1e-11, atol=1e-11)
    return result.certificate


def stays(net, *inputs):
    """Folds, checks that one norm is left, fused, and gives the reason."""
    net = net.double()
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    result = bn.fold(net, inputs)
    assert not [m for m in result.model.modules() if isinstance(m, _BatchNorm)]
    with torch.no_grad():
        torch.testing.assert_close(result.model(*inputs), net(*inputs), rtol=1e-11, atol=1e-11)
    (kept,) = result.certificate.kept
    assert kept.becomes.startswith("ScaleShift")
    return kept.reason


CONVOLUTIONS = {1: (nn.Conv1d, nn.BatchNorm1d), 2: (nn.Conv2d, nn.BatchNorm2d), 3: (nn.Conv3d, nn.BatchNorm3d)}


@settings(max_examples=50)
@given(
    axes=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 6]),
    stride=st.integers(1, 2),
    padding=st.sampled_from([0, 1, 2, "same", "valid"]),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    kernel=st.sampled_from([1, 3]),
    bias=st.booleans(),
    channels_last=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_before_any_convolution(axes, groups, stride, padding, mode, kernel, bias, channels_last, seed):
    torch.manual_seed(seed)
    kind, norm = CONVOLUTIONS[axes]
    stride = 1 if padding == "same" else stride
    conv = kind(6, 6, kernel, stride=stride, padding=padding, padding_mode=mode, groups=groups, bias=bias)
    if channels_last and axes == 2:
        conv = conv.to(memory_format=torch.channels_last)
    net = statistics_without_zeros(nn.Sequential(norm(6), conv))
    certificate = folded_away(net, torch.randn(2, 6, *[5] * axes))
    assert certificate.folded[0].into == "1"


def test_padding_gets_the_value_that_the_border_needs():
    """Scale 2, shift 5, kernel 1-2-1: without a padding value the border is off by 5."""
    conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)
    norm = nn.BatchNorm1d(1, eps=1e-30)  # torch 2.10 refuses 0
    net = nn.Sequential(norm, conv).eval()
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([[[1.0, 2.0, 1.0]]]))
        norm.weight.fill_(2.0)
        norm.bias.fill_(5.0)
    x = torch.arange(4.0).reshape(1, 1, 4)
    model = bn.fold(net, x).model
    assert model[1].padding_value.tolist() == [-2.5]
    torch.testing.assert_close(model(x), torch.tensor([[[17.0, 28.0, 36.0, 31.0]]]))
    assert F.conv1d(2 * x, conv.weight, torch.tensor([20.0]), padding=1)[0, 0, 0] - model(x)[0, 0, 0] == 5


CROSSINGS = {
    "identity": (nn.Identity(), False),
    "dropout": (nn.Dropout2d(), False),
    "average pool": (nn.AvgPool2d(2), False),
    "average pool, padding not counted": (nn.AvgPool2d(3, 2, 1, count_include_pad=False), False),
    "average pool, ceil": (nn.AvgPool2d(3, 2, ceil_mode=True), False),
    "adaptive average": (nn.AdaptiveAvgPool2d(2), False),
    "max pool": (nn.MaxPool2d(3, 2, 1), True),
    "adaptive max": (nn.AdaptiveMaxPool2d(2), True),
    "upsampling": (nn.Upsample(scale_factor=2, mode="bilinear"), False),
    "reflection": (nn.ReflectionPad2d(1), False),
    "shuffle": (nn.ChannelShuffle(2), False),
}


@pytest.mark.parametrize("forwards", [True, False])
@pytest.mark.parametrize("name", CROSSINGS)
def test_layers_that_are_crossed(name, forwards):
    between, monotone = CROSSINGS[name]
    conv, norm = nn.Conv2d(6, 6, 2), nn.BatchNorm2d(6)
    layers = (norm, between, conv) if forwards else (conv, between, norm)
    x = torch.randn(2, 6, 8, 8)
    folded_away(statistics_without_zeros(nn.Sequential(*layers), positive=monotone), x)
    if monotone:
        net = statistics_without_zeros(nn.Sequential(*layers))
        assert (norm.weight < 0).any()
        assert "negative" in stays(net, x)


@pytest.mark.parametrize("forwards", [True, False])
@pytest.mark.parametrize(
    "between",
    [
        nn.ReLU(),
        nn.ZeroPad2d(1),
        nn.AvgPool2d(3, 2, 1),
        nn.AvgPool2d(2, divisor_override=3),
        nn.LPPool2d(2, 2),
        nn.Hardtanh(),
        nn.LocalResponseNorm(2),
        nn.PReLU(),
    ],
)
def test_layers_that_are_not_crossed(between, forwards):
    conv, norm = nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6)
    layers = (norm, between, conv) if forwards else (conv, between, norm)
    stays(statistics_without_zeros(nn.Sequential(*layers)), torch.randn(2, 6, 8, 8))


CALLS = {
    "average pool": lambda self, x: self.after(F.avg_pool2d(self.before(x), 2)),
    "adaptive": lambda self, x: self.after(F.adaptive_avg_pool2d(self.before(x), 1)),
    "dropout": lambda self, x: self.after(F.dropout(self.before(x), 0.5, self.training)),
    "interpolation": lambda self, x: self.after(F.interpolate(self.before(x), scale_factor=2)),
    "there and back": lambda self, x: self.after(self.before(x).flatten(2).unflatten(2, (8, 8))),
    "crop": lambda self, x: self.after(self.before(x)[:, :, 1:-1, 1:-1]),
    "permuted": lambda self, x: self.after(self.before(x).permute(0, 1, 3, 2)),
    "size": lambda self, x: (lambda y: self.after(y.view(y.size(0), 6, y.shape[2], -1)))(self.before(x)),
}


@pytest.mark.parametrize("forwards", [True, False])
@pytest.mark.parametrize("name", CALLS)
def test_calls_that_are_crossed(name, forwards):
    conv, norm = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
    before, after = (norm, conv) if forwards else (conv, norm)
    net = statistics_without_zeros(Calls(CALLS[name], before=before, after=after))
    folded_away(net, torch.randn(2, 6, 8, 8))


REFUSED_CALLS = {
    "max pool": lambda self, x: self.after(F.max_pool2d(self.before(x), 2)),
    "counted padding": lambda self, x: self.after(F.avg_pool2d(self.before(x), 2, padding=1)),
    "training dropout": lambda self, x: self.after(F.dropout(self.before(x), 0.0, True)),
    "relu": lambda self, x: self.after(F.relu(self.before(x))),
    "zero padding": lambda self, x: self.after(F.pad(self.before(x), (1, 1))),
    "mean over channels": lambda self, x: self.after(self.before(x).mean(1, keepdim=True).expand(-1, 6, -1, -1)),
    "cast": lambda self, x: self.after(self.before(x).float().double()),
    "used twice": lambda self, x: (lambda y: self.after(y) + y.mean())(self.before(x)),
    "split": lambda self, x: (lambda a, b: self.after(torch.cat([b, a], 1)))(*self.before(x).chunk(2, 1)),
    "shuffle": lambda self, x: self.after(self.before(x).view(-1, 2, 3, 8, 8).transpose(1, 2).reshape(-1, 6, 8, 8)),
    "unnatural view": lambda self, x: self.after(self.before(x).transpose(1, 2).reshape(-1, 6, 8, 8)),
}


@pytest.mark.parametrize("forwards", [True, False])
@pytest.mark.parametrize("name", REFUSED_CALLS)
def test_calls_that_are_not_crossed(name, forwards):
    conv, norm = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
    before, after = (norm, conv) if forwards else (conv, norm)
    stays(statistics_without_zeros(Calls(REFUSED_CALLS[name], before=before, after=after)), torch.randn(2, 6, 8, 8))


def test_flatten_before_a_linear_layer():
    net = nn.Sequential(nn.BatchNorm2d(3), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 4))
    folded_away(statistics_without_zeros(net), torch.randn(3, 3, 4, 4))


def test_a_norm_of_flattened_maps_needs_one_scale_a_channel():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.BatchNorm1d(16))
    assert "differs between the positions" in stays(statistics_without_zeros(net), torch.randn(2, 3, 4, 4))
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4))
    folded_away(statistics_without_zeros(net), torch.randn(2, 3, 4, 4))


def test_linear_over_sequences_and_its_transposed_norm():
    net = Calls(lambda self, x: self.bn(self.fc(x).transpose(1, 2)), fc=nn.Linear(4, 6), bn=nn.BatchNorm1d(6))
    folded_away(statistics_without_zeros(net), torch.randn(2, 5, 4))
    net = Calls(lambda self, x: self.bn(self.fc(x).flatten(0, 1)), fc=nn.Linear(4, 6), bn=nn.BatchNorm1d(6))
    folded_away(statistics_without_zeros(net), torch.randn(2, 5, 4))
    net = Calls(lambda self, x: self.fc(self.bn(x).transpose(1, 2)), fc=nn.Linear(4, 6), bn=nn.BatchNorm1d(4))
    folded_away(statistics_without_zeros(net), torch.randn(2, 4, 5))


@pytest.mark.parametrize("length", [4, 5])
def test_a_norm_of_positions_is_not_one_of_channels(length):
    """BN on (N, L, C) behind a linear layer normalizes L, whether or not L = C."""
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(length))
    assert "axis 1" in stays(statistics_without_zeros(net), torch.randn(2, length, 4))
    net = nn.Sequential(nn.BatchNorm1d(length), nn.Linear(4, 4))
    assert "another axis" in stays(statistics_without_zeros(net), torch.randn(2, length, 4))


def test_other_weighted_layers():
    net = nn.Sequential(nn.Embedding(10, 6, padding_idx=0), nn.Flatten(0, 1), nn.BatchNorm1d(6))
    folded_away(statistics_without_zeros(net), torch.randint(10, (4, 3)))
    net = Calls(lambda self, x, y: self.bn(self.both(x, y)), both=nn.Bilinear(3, 4, 5), bn=nn.BatchNorm1d(5))
    folded_away(statistics_without_zeros(net), torch.randn(6, 3), torch.randn(6, 4))
    net = nn.Sequential(nn.Embedding(10, 6, max_norm=1.0), nn.BatchNorm1d(6))
    assert "max_norm" in stays(statistics_without_zeros(net), torch.randint(10, (4,)))


def test_transposed_convolutions_after_the_norm():
    net = nn.Sequential(nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 1, groups=2))
    folded_away(statistics_without_zeros(net), torch.randn(2, 4, 5, 5))
    net = statistics_without_zeros(nn.Sequential(nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 3, 2, groups=2)))
    assert "inserts are zero" in stays(net, torch.randn(2, 4, 5, 5))
    net = statistics_without_zeros(nn.Sequential(nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 3, 2, groups=2)))
    net[0].running_mean.zero_()
    nn.init.zeros_(net[0].bias)
    folded_away(net, torch.randn(2, 4, 5, 5))


class Dense(nn.Module):
    """Two branches joined, normalized together, then used by two layers."""

    def __init__(self, before):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.c, self.d = nn.Conv2d(6, 2, 3, padding=1), nn.Conv2d(6, 2, 1)
        self.before = before

    def forward(self, x):
        if self.before:
            return self.bn(torch.cat([self.a(x), self.b(x)], 1))
        y = self.bn(x)
        return self.c(y) + self.d(y)


def test_concatenations_and_several_consumers():
    certificate = folded_away(statistics_without_zeros(Dense(True)), torch.randn(2, 3, 5, 5))
    assert certificate.folded[0].into == "a, b"
    certificate = folded_away(statistics_without_zeros(Dense(False)), torch.randn(2, 6, 5, 5))
    assert certificate.folded[0].into == "c, d"

    def forward(self, x):
        y = torch.cat([self.first(x[:, :2]), x[:, 2:4], self.second(x[:, 4:])], 1)
        return self.conv(y)

    norms_ = {"first": nn.BatchNorm2d(2), "second": nn.BatchNorm2d(2)}
    net = statistics_without_zeros(Calls(forward, conv=nn.Conv2d(6, 3, 3, padding=1), **norms_))
    certificate = folded_away(net, torch.randn(2, 6, 5, 5))
    assert [item.into for item in certificate.folded] == ["conv", "conv"]


def test_one_branch_that_cannot_keeps_all_as_they_were():
    def forward(self, x):
        return self.bn(torch.cat([self.a(x), F.relu(self.b(x))], 1))

    net = Calls(forward, a=nn.Conv2d(3, 2, 1), b=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(6))
    assert "relu" in stays(statistics_without_zeros(net), torch.randn(2, 3, 5, 5))


def test_a_norm_of_a_part_leaves_the_other_part():
    def forward(self, x):
        a, b = self.conv(x).split([2, 4], 1)
        return self.bn(a), b

    net = Calls(forward, conv=nn.Conv2d(3, 6, 1), bn=nn.BatchNorm2d(2))
    folded_away(statistics_without_zeros(net), torch.randn(2, 3, 5, 5))

    def twice(self, x):
        parts = self.conv(x).chunk(2, 1)
        return self.bn(parts[0]), parts[0], parts[1]

    net = Calls(twice, conv=nn.Conv2d(3, 6, 1), bn=nn.BatchNorm2d(3))
    assert "more than once" in stays(statistics_without_zeros(net), torch.randn(2, 3, 5, 5))


def test_in_place_changes_of_what_the_norm_read():
    """Without the norm its input's memory reaches the convolution, changed."""

    def forward(self, x):
        y = torch.tanh(x)
        z = self.bn(y)
        y += 1
        return self.conv(z) + y

    net = Calls(forward, bn=nn.BatchNorm2d(3), conv=nn.Conv2d(3, 3, 1))
    assert "in place" in stays(statistics_without_zeros(net), torch.randn(2, 3, 5, 5))

    def aliased(self, x):
        y = torch.tanh(x)
        z = self.bn(y.view(y.shape))
        F.relu_(y[:, :2])
        return self.conv(z)

    net = Calls(aliased, bn=nn.BatchNorm2d(3), conv=nn.Conv2d(3, 3, 1))
    assert "in place" in stays(statistics_without_zeros(net), torch.randn(2, 3, 5, 5))


def test_chains_end_in_one_layer():
    net = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3, affine=False), nn.ReLU())
    net = statistics_without_zeros(net).double()
    x = torch.randn(2, 3, 4, 4).double()
    result = bn.fold(net, x)
    assert [type(m).__name__ for m in result.model] == ["ReLU", "Identity", "Identity", "ScaleShift", "Identity"]
    assert result.model[3].activation == "relu"
    torch.testing.assert_close(result.model(x), net(x), rtol=1e-12, atol=1e-12)


def test_what_is_left_is_fused_and_the_same_in_training():
    net = statistics_without_zeros(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.LeakyReLU(0.2), nn.Conv2d(3, 3, 1)))
    x = torch.randn(2, 3, 4, 4)
    result = bn.fold(net, x)
    assert isinstance(result.model[2], nn.Identity)
    expected = net(x)
    torch.testing.assert_close(result.model.train()(x), expected, rtol=1e-5, atol=1e-5)
    restored = torch.export.export(result.model, (x,)).module()(x)
    torch.testing.assert_close(restored, expected, rtol=1e-5, atol=1e-5)


def test_what_is_left_subtracts_the_mean_first():
    net = statistics_without_zeros(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)))
    net[1].running_mean.fill_(1e4)
    x = torch.randn(2, 3, 4, 4) + 1e4
    folded = bn.fold(net, x).model(x).double()
    by_torch, truth = net(x).double(), net.double()(x.double())
    assert (folded - truth).abs().max() <= (by_torch - truth).abs().max()
    assert (folded - truth).abs().max() < 1e-6 * truth.abs().max()


class FrozenBatchNorm2d(nn.Module):
    """In the manner of the detection libraries."""

    def __init__(self, channels, order=1):
        super().__init__()
        self.eps, self.order = 1e-5, order
        self.register_buffer("weight", torch.randn(channels))
        self.register_buffer("bias", torch.randn(channels))
        self.register_buffer("running_mean", torch.randn(channels))
        self.register_buffer("running_var", torch.rand(channels) + 0.5)

    def forward(self, x):
        shape = (1, -1, 1, 1)
        scale = self.weight.reshape(shape) * (self.running_var.reshape(shape) + self.eps).rsqrt() ** self.order
        return x * scale + self.bias.reshape(shape) - self.running_mean.reshape(shape) * scale


@pytest.mark.parametrize("training", [True, False])
def test_buffers_as_a_norm(training):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), FrozenBatchNorm2d(4), nn.ReLU()).train(training)
    x = torch.randn(2, 3, 6, 6)
    result = bn.fold(net, x)
    assert [(i.layer, i.into) for i in result.certificate.folded] == [("1", "0")]
    torch.testing.assert_close(result.model(x), net(x), rtol=1e-5, atol=1e-5)


def test_buffers_that_only_look_like_a_norm():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), FrozenBatchNorm2d(4, order=2), nn.BatchNorm2d(4)).eval()
    result = bn.fold(net, torch.randn(2, 3, 6, 6))
    assert [item.layer for item in result.certificate.kept] == ["2"]
    assert isinstance(result.model[1], FrozenBatchNorm2d)


def test_synchronized_layers():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    folded_away(nn.SyncBatchNorm.convert_sync_batchnorm(statistics_without_zeros(net)), torch.randn(2, 3, 6, 6))


class Novel(bn.BatchNorm2d):
    """A layer of a later version."""

    __module__ = "batchnorm.nn.novel"

    def __init__(self, channels, *, made_up=0.0):
        super().__init__(channels)
        self.made_up = made_up


def test_options_that_fold_does_not_know_are_refused():
    for value, expected in ((0.0, 1), (0.25, 0)):
        net = statistics_without_zeros(nn.Sequential(nn.Conv2d(3, 4, 3), Novel(4, made_up=value)))
        result = bn.fold(net, torch.randn(2, 3, 6, 6))
        assert len(result.certificate.folded) == expected
        if not expected:
            assert "made_up=0.25" in result.certificate.kept[0].reason
            assert isinstance(result.model[1], Novel)


def test_example_weighing_is_no_affine_map():
    net = statistics_without_zeros(nn.Sequential(nn.Conv2d(3, 4, 3), bn.BatchNorm2d(4, example_weight=0.1)))
    x = torch.randn(2, 3, 6, 6)
    result = bn.fold(net, x)
    assert "example_weight=0.1" in result.certificate.kept[0].reason
    torch.testing.assert_close(result.model(x), net(x), rtol=0, atol=0)


def test_the_certificate_also_tells_bfloat16():
    net = statistics_without_zeros(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
    x = torch.randn(2, 3, 8, 8)
    certificate = bn.fold(net, x).certificate
    (narrow,) = [d for d in certificate.differences if d.dtype == "bfloat16"]
    assert narrow.passed
    assert 1e-4 < narrow.relative < 0.05
    assert certificate.relative < 1e-5
    assert "doubled batch" in {d.inputs for d in certificate.differences}
