"""Other packages' frozen batch normalization is found, folded with its own eps, and listed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.errors import SurgeryError
from batchnorm.surgery.frozen import eps_of


class Frozen(nn.Module):
    """As in the detection networks of several packages: eps is written into the forward."""

    eps_inside = 1e-5

    def __init__(self, channels, parameters=False):
        super().__init__()
        values = torch.rand(channels) + 0.5, torch.randn(channels), torch.randn(channels), 2e-5 * torch.rand(channels)
        for name, value in zip(("weight", "bias", "running_mean", "running_var"), values, strict=True):
            if parameters and name in ("weight", "bias"):
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    def forward(self, x):
        weight, bias, mean, var = (t.reshape(1, -1, *[1] * (x.dim() - 2)) for t in (
            self.weight, self.bias, self.running_mean, self.running_var
        ))  # fmt: skip
        scale = weight * (var + self.eps_inside).rsqrt()
        return x * scale + (bias - mean * scale)


class FrozenAct(Frozen):
    """With dropout and an activation behind it."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act, self.drop = nn.ReLU(inplace=True), nn.Identity()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class Declared(Frozen):
    """Its attribute ``eps`` is not what it computes with."""

    def __init__(self, channels):
        super().__init__(channels)
        self.eps = 1e-3


class Doubled(Frozen):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("layer", "eps"),
    [
        (Frozen(3), 1e-5),
        (Frozen(1, parameters=True), 1e-5),
        (Declared(3), 1e-5),
        (FrozenAct(3), 1e-5),
        (Doubled(3), None),
        (nn.BatchNorm2d(3), None),
    ],
)
def test_eps_is_what_the_forward_computes_with(layer, eps):
    assert eps_of(layer) == (eps if eps is None else pytest.approx(eps, rel=1e-5))


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-3, 0.25])
def test_any_eps(eps):
    layer = Frozen(4)
    layer.eps_inside = eps
    assert eps_of(layer) == pytest.approx(eps, rel=1e-5)


@pytest.mark.parametrize("kind", [Frozen, FrozenAct, Declared, lambda c: Frozen(c, parameters=True)])
@pytest.mark.parametrize("training", [False, True])
def test_it_folds_and_is_listed(kind, training):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), kind(4), nn.Conv2d(4, 2, 1)).double().train(training)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    result = bn.fold(net, x)
    assert [(item.layer, item.into) for item in result.certificate.folded] == [("1", "0")]
    torch.testing.assert_close(result.model(x), net(x), rtol=1e-9, atol=1e-9)
    (row,) = bn.summary(net, x).layers
    assert (row.name, row.features, row.source, row.frozen) == ("1", 4, "running", True)
    assert row.fed_by == ("0",)


def test_a_frozen_layer_that_stays_keeps_its_numbers():
    net = nn.Sequential(nn.Sigmoid(), FrozenAct(4), nn.Sigmoid()).eval()
    x = torch.randn(2, 4, 5, 5)
    result = bn.fold(net, x)
    assert [item.layer for item in result.certificate.kept] == ["1"]
    torch.testing.assert_close(result.model.train()(x), net(x))


def test_what_computes_something_else_is_told():
    with pytest.raises(SurgeryError, match="'1' hold its four tensors, but a trial run gives something else"):
        bn.fold(nn.Sequential(nn.Conv2d(3, 4, 1), Doubled(4)).eval(), torch.randn(2, 3, 4, 4))


@pytest.mark.parametrize("verb", [bn.freeze, bn.convert, lambda net: bn.accelerate(net, torch.randn(2, 3, 4, 4))])
def test_verbs_for_layers_that_train_say_what_is_there(verb):
    with pytest.raises(
        SurgeryError, match="no batch normalization but 1 layers whose class is frozen, such as '1', a Fr"
    ):
        verb(nn.Sequential(nn.Conv2d(3, 4, 1), FrozenAct(4)))


def test_nothing_is_inserted_before_it():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), FrozenAct(4), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    bn.insert(net, torch.randn(2, 3, 6, 6))
    assert type(net[0]) is nn.Conv2d
    assert isinstance(net[2], nn.Sequential)
