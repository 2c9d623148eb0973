"""The summary says what is there: sources, followers, placement, counts, state."""

from __future__ import annotations

import io
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import batchnorm as bn
from batchnorm.errors import InputError


def only(net, example=None):
    (layer,) = bn.summary(net, example).layers
    return layer


def test_counts_as_keras_prints_them():
    net = nn.Sequential(nn.Linear(30, 50), nn.BatchNorm1d(50), nn.ReLU(), nn.Linear(50, 5))
    table = bn.summary(net, torch.randn(8, 30))
    assert (table.total, table.trainable, table.non_trainable) == (2005, 1905, 100)
    (layer,) = table.layers
    assert (layer.trained, layer.not_trained) == (100, 100)
    for text in ("200", "Total params: 2,005", "Trainable params: 1,905", "params: 100"):
        assert text in str(table)


def test_counts_of_a_convolution():
    layer = only(nn.Sequential(nn.Conv2d(3, 30, 4), nn.BatchNorm2d(30)))
    assert (layer.trained, layer.not_trained) == (60, 60)


def test_frozen_and_without_affine():
    net = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4, affine=False))
    bn.freeze(net)
    table = bn.summary(net)
    assert [(x.trained, x.not_trained) for x in table.layers] == [(0, 16), (0, 8)]
    assert (table.trainable, table.non_trainable) == (0, 24)
    assert all(x.frozen and x.source == "running" for x in table.layers)
    assert "running (frozen)" in str(table)


def test_shared_parameters_count_once():
    shared = nn.Linear(4, 4)
    assert bn.summary(nn.Sequential(shared, nn.ReLU(), shared)).total == 20


def test_neighbours_placement_and_bias():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, bias=False)
            self.norm1, self.norm2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
            self.norm3 = nn.BatchNorm2d(8)
            self.act = nn.Sigmoid()
            self.head = nn.Linear(8, 2)

        def forward(self, x):
            x = F.relu(self.norm1(self.conv1(x)))
            y = self.norm2(self.act(self.conv2(x)))
            z = self.norm3(torch.cat([y, x[:, :, 1:-1, 1:-1]], 1))
            return self.head(z.mean((2, 3)))

    first, second, third = bn.summary(Net(), torch.randn(2, 3, 8, 8)).layers
    assert (first.name, first.fed_by, first.followed_by) == (
        "norm1",
        ("conv1",),
        ("a call of relu",),
    )
    assert (first.placement, first.redundant_bias) == ("before activation", True)
    assert (second.fed_by, second.placement) == (("act",), "after activation")
    assert second.redundant_bias is False
    assert third.fed_by == ("a call of cat",)
    assert third.placement == "after activation"
    assert [x.values_per_channel for x in (first, second, third)] == [72, 32, 32]


def test_a_bias_read_elsewhere_or_on_another_axis_is_not_redundant():
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    assert only(net, torch.randn(3, 5, 6)).redundant_bias is False
    assert only(net, torch.randn(3, 6)).redundant_bias is True


def test_placement_without_activation_and_fused():
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    assert only(net, torch.randn(3, 6)).placement == "no activation"
    net[1] = bn.BatchNorm1d(5, activation="relu")
    assert only(net, torch.randn(3, 6)).placement == "before activation"


def test_a_layer_used_twice():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.lin = nn.BatchNorm1d(4), nn.Linear(4, 4)

        def forward(self, x):
            return self.norm(self.lin(self.norm(x))[:2])

    layer = only(Net(), torch.randn(6, 4))
    assert layer.fed_by == ("the network's input", "a call of getitem")
    assert layer.values_per_channel == 2


@pytest.mark.parametrize(
    ("health", "change"),
    [
        ("good", lambda layer: None),
        ("untrained", lambda layer: layer.reset_running_stats()),
        ("broken", lambda layer: layer.running_mean.fill_(float("nan"))),
        ("broken", lambda layer: layer.running_var.fill_(-1.0)),
        ("dead", lambda layer: layer.running_var[1].fill_(1e-12)),
        ("starved", lambda layer: layer.train()),
    ],
)
def test_health(health, change):
    layer = nn.BatchNorm1d(4)
    layer(torch.randn(8, 4))
    layer.eval()
    change(layer)
    assert only(layer, torch.randn(1, 4)).health == health


def test_health_without_running_statistics():
    layer = nn.BatchNorm1d(4, track_running_stats=False)
    assert only(layer, torch.randn(8, 4)).health == "untracked"
    assert only(layer, torch.randn(8, 4)).source == "batch"


def test_source_follows_the_mode():
    assert only(nn.BatchNorm1d(4).train()).source == "batch"
    assert only(nn.BatchNorm1d(4).eval()).source == "running"


def test_nothing_is_changed():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()).train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    rng = torch.get_rng_state()
    bn.summary(net, torch.randn(8, 4, generator=torch.Generator()))
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert net[1].training


def test_without_data_flow():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(x) if x.sum() > 0 else x

    assert only(Net()).fed_by is None
    table = bn.summary(Net(), torch.ones(3, 4))
    assert table.layers[0].fed_by is None
    assert "cannot be captured" in str(table)
    assert "?" in str(table)
    with pytest.raises(InputError, match="fails on the example"):
        bn.summary(Net(), torch.ones(3, 5))
    with pytest.raises(InputError, match=r"torch\.nn\.Module"):
        bn.summary([Net()])


def test_as_data():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    data = json.loads(json.dumps(bn.summary(net, torch.randn(3, 4)).to_dict()))
    assert data["layers"][0]["fed_by"] == ["0"]
    assert data["total"] == 36
    assert "no batch normalization" in str(bn.summary(nn.Linear(2, 2)))


def test_pages_and_tables_say_the_same():
    from rich.console import Console

    net = nn.Sequential(nn.Linear(30, 50), nn.BatchNorm1d(50), nn.Linear(50, 5))
    found = bn.summary(net, torch.randn(8, 30))
    assert (found.total, found.trainable, found.non_trainable) == (2005, 1905, 100)
    net.add_module("<b>", nn.BatchNorm1d(5))
    found = bn.summary(net, torch.randn(8, 30))
    page = found.to_html()
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert "http" not in page
    console = Console(width=250, record=True, file=io.StringIO())
    console.print(found)
    table = console.export_text()
    for text in ("untrained", f"{found.total:,}", "BatchNorm1d"):
        assert text in page
        assert text in table
        assert text in str(found)


class Deciding(nn.Module):
    """A forward that looks at its data: blocks can be captured, the whole cannot."""

    def __init__(self):
        super().__init__()
        conv, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.first = nn.Sequential(conv, norm, nn.ReLU(), nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))
        self.alone = nn.BatchNorm2d(4)
        self.last = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))

    def forward(self, x):
        x = self.first(x)
        if float(x.detach().abs().max()) > 1e9:
            return x
        return self.last(self.alone(x).relu())


def test_a_network_that_cannot_be_captured_is_shown_by_its_parts():
    table = bn.summary(Deciding(), torch.randn(2, 3, 6, 6))
    assert table.parts == ("first", "last")
    rows = {row.name: row for row in table.layers}
    assert list(rows) == ["first.1", "first.4", "alone", "last.0"]
    assert rows["first.1"].fed_by == ("first.0",)
    assert rows["first.1"].followed_by == ("first.2",)
    assert [row.placement for row in table.layers] == ["before activation", None, None, None]
    assert [row.redundant_bias for row in table.layers] == [True, False, None, None]
    assert [row.values_per_channel for row in table.layers] == [32, 32, None, 32]
    assert rows["first.4"].followed_by == ("the output of 'first'",)
    assert rows["last.0"].fed_by == ("the input of 'last'",)
    assert rows["alone"].fed_by is None
    assert "cannot be captured" in table.note
    assert "its parts 'first', 'last'. 1 of 4 layers lie in none: 'alone': the network" in table.note
    assert table.total == bn.summary(Deciding()).total
