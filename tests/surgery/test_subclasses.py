"""Layers of classes of their own: known by what they compute, or refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from small_networks import Calls, randomize
from torch import nn

import batchnorm as bn
from batchnorm.errors import SurgeryError


class NormAct(nn.BatchNorm2d):
    """A forward that calls batch_norm, then more, in the manner of the image model libraries."""

    def __init__(self, channels, act):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x):
        torch._assert(x.ndim == 4, "expected four axes")
        training = self.training or (self.running_mean is None and self.running_var is None)
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training, self.momentum, self.eps
        )
        return self.act(self.drop(x))


class ChannelsLast(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class InFloat32(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x.float()).type(x.dtype)


class AndMore(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2 + x.mean()


class OfTheBatch(nn.BatchNorm2d):
    def forward(self, x):
        return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.1, self.eps)


class SamePadding(nn.Conv2d):
    """Pads by itself, depending on the size."""

    def forward(self, x):
        rest = max((-(-x.shape[-1] // self.stride[0]) - 1) * self.stride[0] + self.kernel_size[0] - x.shape[-1], 0)
        x = F.pad(x, [rest // 2, rest - rest // 2] * 2)
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Standardized(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


def folded(net, x, layers):
    """Check the fold on inputs that it has not seen; the layers that stayed."""
    randomize(net).eval()
    state = copy.deepcopy(net.state_dict())
    result = bn.fold(net, x)
    other = torch.randn(x.shape) * 2
    torch.testing.assert_close(result.model(other), net(other), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in state.items())
    assert len(result.certificate.folded) == layers
    return {item.layer: item.reason for item in result.certificate.kept}


@pytest.mark.parametrize("act", [nn.ReLU(), nn.SiLU(), nn.PReLU(), nn.Identity()])
def test_normalization_and_activation_in_one_class(act):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), NormAct(8, act), nn.Conv2d(8, 4, 1), NormAct(4, act))
    x = torch.randn(2, 3, 8, 8)
    assert not folded(net, x, 2)
    certificate = bn.fold(net, x).certificate
    assert [(item.layer, item.into) for item in certificate.folded] == [("1", "0"), ("3", "2")]
    model = pickle.loads(pickle.dumps(bn.fold(net, x).model))
    torch.testing.assert_close(model(x), net(x), rtol=1e-4, atol=1e-5)


def test_forwards_around_the_inherited_one():
    net = nn.Sequential(nn.Linear(5, 6), ChannelsLast(6), nn.ReLU())
    assert not folded(net, torch.randn(2, 7, 5), 1)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), InFloat32(4))
    assert not folded(net, torch.randn(2, 3, 6, 6), 1)


def test_forwards_that_do_something_else():
    kept = folded(nn.Sequential(nn.Conv2d(3, 4, 3), AndMore(4)), torch.randn(2, 3, 6, 6), 0)
    assert "call of mean" in kept["1"]
    kept = folded(nn.Sequential(nn.Conv2d(3, 4, 3), OfTheBatch(4)), torch.randn(2, 3, 6, 6), 0)
    assert "forward of its own" in kept["1"]


def test_classes_whose_layers_are_read_from_outside():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    layer.norm1, layer.norm2 = ChannelsLast(8), ChannelsLast(8)
    kept = folded(layer, torch.randn(2, 5, 8), 0)
    assert set(kept) == {"norm1", "norm2"}
    net = Calls(
        lambda self, x: self.norm(self.conv(x)) * self.norm.eps, conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4)
    )
    assert not folded(net, torch.randn(2, 3, 6, 6), 1)


def test_a_folded_network_that_fails_is_an_error_that_says_so():
    def forward(self, x):
        assert isinstance(self.norm, nn.BatchNorm2d)
        return self.norm(self.conv(x))

    net = Calls(forward, conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4))
    with pytest.raises(SurgeryError, match="looks at its layers from outside"):
        bn.fold(net, torch.randn(2, 3, 6, 6))


def test_weights_applied_once():
    net = nn.Sequential(
        SamePadding(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), SamePadding(4, 4, 3, groups=4, bias=False)
    )
    net.append(nn.BatchNorm2d(4))
    assert not folded(net, torch.randn(2, 3, 9, 9), 2)
    kept = folded(nn.Sequential(nn.BatchNorm2d(3), SamePadding(3, 4, 3)), torch.randn(2, 3, 9, 9), 0)
    assert "forward of its own" in kept["0"]
    kept = folded(nn.Sequential(Standardized(3, 4, 3), nn.BatchNorm2d(4)), torch.randn(2, 3, 9, 9), 0)
    assert "call of conv2d" in kept["1"]


def test_shapes_decide_data_do_not():
    def by_shape(self, x):
        parts = list(self.norm(self.conv(x)).chunk(2, 1))
        for _ in range(len(x.shape) - 2):
            parts.append(parts[-1] + 1 if x.size(0) > 1 else parts[-1])
        return torch.cat(parts, 1)

    net = Calls(by_shape, conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4))
    assert not folded(net, torch.randn(2, 3, 6, 6), 1)
    net = Calls(
        lambda self, x: self.norm(self.conv(x)) if float(x.sum()) > 0 else x,
        conv=nn.Conv2d(3, 4, 3),
        norm=nn.BatchNorm2d(4),
    )
    with pytest.raises(SurgeryError, match="depends on the data's values"):
        bn.fold(net, torch.randn(2, 3, 6, 6))


def test_ill_conditioned_networks_are_judged_by_their_own_rounding():
    """The mean is a million standard deviations: float32 itself is off by some percent of one."""
    net = randomize(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))).eval()
    with torch.no_grad():
        net[0].bias += 1e4
        net[1].running_mean.copy_(net[0].bias)
        net[1].running_var.fill_(0.1)
    certificate = bn.fold(net, torch.randn(16, 8)).certificate
    assert certificate.rounding is not None
    assert certificate.rounding > 1e-5
    assert certificate.error is not None
    assert certificate.error <= 4 * certificate.rounding
    assert "against float64" in str(certificate)
