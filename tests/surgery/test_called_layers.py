"""Weights that a forward uses by calls take batch normalization in, as layers do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_networks import randomize
from torch import nn

import batchnorm as bn


class Dense(nn.Module):
    """A linear layer of a package's own, as graph networks have."""

    def __init__(self, inputs, outputs, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        if bias:
            self.bias = nn.Parameter(torch.randn(outputs))
        else:
            self.register_parameter("bias", None)

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Filter(nn.Module):
    def __init__(self, inputs, outputs, groups=1):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(outputs, inputs // groups, 3, 3))
        self.offset = nn.Parameter(torch.randn(outputs))
        self.groups = groups

    def forward(self, x):
        return F.conv2d(x, self.kernel, self.offset, stride=2, padding=1, groups=self.groups)


class Unbiased(Dense):
    """Its forward never adds a bias."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.norm = nn.Parameter(torch.randn(4, 4)), nn.BatchNorm1d(4)

    def forward(self, x):
        return F.linear(self.norm(F.linear(x, self.weight)), self.weight)


def folded(net, x):
    net = randomize(net).double().eval()
    result = bn.fold(net, x.double())
    torch.testing.assert_close(result.model(x.double()), net(x.double()), rtol=1e-10, atol=1e-10)
    return result


@pytest.mark.parametrize("bias", [True, False])
def test_linear_calls(bias):
    net = nn.Sequential(Dense(3, 4, bias), nn.BatchNorm1d(4), nn.ReLU(), nn.BatchNorm1d(4), Dense(4, 2, bias))
    result = folded(net, torch.randn(8, 3))
    assert [(item.layer, item.into) for item in result.certificate.folded] == [("1", "0"), ("3", "4")]
    assert result.model[0].bias is not None


@pytest.mark.parametrize("groups", [1, 2])
def test_convolution_calls(groups):
    net = nn.Sequential(Filter(4, 4, groups), nn.BatchNorm2d(4), nn.ReLU())
    assert [item.into for item in folded(net, torch.randn(2, 4, 7, 7)).certificate.folded] == ["0"]


def test_a_padded_call_gets_no_padding_value():
    net = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), Filter(4, 4))
    (kept,) = folded(net, torch.randn(2, 4, 7, 7)).certificate.kept
    assert "padding" in kept.reason


@pytest.mark.parametrize("net", [nn.Sequential(Unbiased(3, 4), nn.BatchNorm1d(4)), Tied()])
def test_what_cannot_be_edited_stays(net):
    assert not folded(net, torch.randn(8, net.weight.shape[1] if isinstance(net, Tied) else 3)).certificate.folded


class Positions(nn.Module):
    """Linear, batch normalization over all positions, and the shape of before, as in LeViT."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4)

    def forward(self, x):
        x = self.linear(x)
        return self.norm(x.flatten(0, 1)).reshape_as(x)


def test_reading_a_shape_is_no_use_of_the_values():
    result = folded(Positions(), torch.randn(2, 5, 3))
    assert [item.into for item in result.certificate.folded] == ["linear"]


class PaddedConv(nn.Conv2d):
    """It pads by a submodule, as the encoders of segmentation packages do."""

    def __init__(self, pad, *args):
        super().__init__(*args)
        self.pad = pad

    def forward(self, x):
        return F.conv2d(self.pad(x), self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


@pytest.mark.parametrize("pad", [nn.ZeroPad2d((0, 1, 0, 1)), nn.Identity(), nn.ReflectionPad2d(1)])
def test_padding_by_a_submodule(pad):
    net = nn.Sequential(PaddedConv(pad, 3, 4, 3), nn.BatchNorm2d(4))
    assert [item.into for item in folded(net, torch.randn(2, 3, 6, 6)).certificate.folded] == ["0"]


def test_a_submodule_that_computes_more_keeps_it():
    net = nn.Sequential(PaddedConv(nn.Softplus(), 3, 4, 3), nn.BatchNorm2d(4))
    folded(net, torch.randn(2, 3, 6, 6))
