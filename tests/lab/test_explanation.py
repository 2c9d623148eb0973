"""The walk through a layer: its numbers are the layer's, and the page shows them."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.cli import main
from batchnorm.errors import InputError
from batchnorm.lab.explanation import explain, highlighted
from batchnorm.report.explain_page import number, write_explanation


def network(norm):
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 4), norm, nn.Sigmoid(), nn.Linear(4, 3)).double()


def batch(m=12):
    return torch.randn(m, 2, 3, dtype=torch.float64), torch.randint(3, (m,))


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(4), bn.BatchNorm1d(4, momentum=None), nn.BatchNorm1d(4, affine=False)])
def test_the_numbers_are_the_layers(norm):
    net, data = network(norm), batch()
    if norm.affine:
        nn.init.uniform_(norm.weight, -2, 2)
        nn.init.normal_(norm.bias)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    found = explain(net, data, channel=2)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert found.forward_gap < 1e-13
    assert found.backward_gap < 1e-11
    assert found.m == 12
    net.train()
    nn.functional.cross_entropy(net(data[0]), data[1]).backward()
    if norm.affine:
        assert found.sum_dy == pytest.approx(float(norm.bias.grad[2]))
        assert found.sum_dy_xhat == pytest.approx(float(norm.weight.grad[2]))
    assert found.running_after == pytest.approx((float(norm.running_mean[2]), float(norm.running_var[2])))
    share, (mean, var) = found.momentum, found.running_before
    mixed = ((1 - share) * mean + share * found.mean, (1 - share) * var + share * found.var * 12 / 11)
    assert found.running_after == pytest.approx(mixed)
    assert math.fsum(found.dx) == pytest.approx(0, abs=1e-12)


def test_convolutions_pool_over_space_and_the_first_layer_may_see_the_input():
    net = nn.Sequential(
        nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten()
    )
    x, y = torch.randn(5, 2, 4, 4), torch.randint(12, (5,))
    first = explain(net, (x, y), channel=1)
    assert (first.layer, first.m) == ("0", 80)
    assert first.mean == pytest.approx(float(x[:, 1].mean()))
    assert first.backward_gap < 1e-4
    last = explain(net, (x, y), layer="2")
    assert last.running_before is None
    assert x.grad is None
    assert not x.requires_grad


@pytest.mark.parametrize(
    ("net", "options", "message"),
    [
        (nn.Linear(6, 3), {}, r"bn\.insert"),
        (network(nn.BatchNorm1d(4)), {"layer": "7"}, "no batch norm layer '7'; expected one of 2"),
        (network(nn.BatchNorm1d(4)), {"channel": 4}, "channel=4"),
        (network(bn.BatchNorm1d(4, activation="relu")), {}, "activation='relu'"),
    ],
)
def test_what_cannot_be_walked(net, options, message):
    with pytest.raises(InputError, match=message):
        explain(net, batch(), **options)


def test_the_followed_values_and_numbers():
    assert highlighted([3.0, 1.0, 2.0, 9.0, -1.0]) == (4, 2, 3)
    assert [number(v) for v in (0, -1.23456, 1234.5, 1e-5, -2e7)] == [
        "0",
        "−1.235",
        "1234",
        "1.00e-05".replace("-", "−"),
        "−2.00e+07",
    ]


def test_the_page(tmp_path):
    found = explain(network(nn.BatchNorm1d(4)), batch())
    text = write_explanation(tmp_path / "page.html", found, source="A toy.").read_text()
    assert text.count("<svg") == 4  # two figures, each for a wide screen and for a phone
    for value in (found.mean, found.var, found.inv_std, found.sum_dy, found.sum_dy_xhat, found.running_after[1]):
        assert f"<b>{number(value)}</b>" in text
    assert "and 4 more" in text
    assert not re.search(r'(src|href)="(?!#|data:)', text)


def test_the_command(tmp_path, capsys):
    words = ["lab", "explain", "--data", "digits", "--set", "steps=3", "--set", "channel=5", "--out", str(tmp_path)]
    assert main(words) == 0
    text = (tmp_path / "explain.html").read_text()
    assert "Channel 5" in text
    assert "batchnorm" not in capsys.readouterr().err
    assert main([*words, "--set", "layer=nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert main(["lab", "explain", "--set", "rate=3"]) == 2
    assert "layer, channel" in capsys.readouterr().err
