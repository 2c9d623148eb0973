"""Frozen stays frozen, and freeze then unfreeze is the identity."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from small_networks import randomize, resnet
from torch import nn

import batchnorm as bn
from batchnorm.errors import InputError, SurgeryError
from batchnorm.surgery.freezing import is_frozen

KINDS = {
    "torch": nn.BatchNorm2d,
    "ours": bn.BatchNorm2d,
}


def small(kind):
    return randomize(nn.Sequential(nn.Conv2d(3, 4, 3), KINDS[kind](4), nn.ReLU()))


def everything(net):
    """Class, attributes and flags of every module and parameter; tensors by identity."""
    return [
        (
            name,
            type(module),
            {k: dict(v) if isinstance(v, dict) else v for k, v in module.__dict__.items()},
            {k: p.requires_grad for k, p in module.named_parameters(recurse=False)},
        )
        for name, module in net.named_modules()
    ]


def values(net):
    return {key: value.clone() for key, value in net.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("kind", KINDS)
def test_training_a_frozen_network_leaves_its_norms_alone(kind):
    net = small(kind)
    x = torch.randn(5, 3, 6, 6)
    expected = net.eval()(x)
    assert bn.freeze(net) is net
    net.train()
    before = values(net[1])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.5, momentum=0.9)
    output = net(x)
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)
    (output * torch.randn_like(output)).sum().backward()
    optimizer.step()
    assert same(before, values(net[1]))
    assert net[0].weight.grad is not None


def test_pending_gradients_cannot_move_gamma():
    net = small("torch").train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.5)
    output = net(torch.randn(5, 3, 6, 6))
    (output * torch.randn_like(output)).sum().backward()
    bn.freeze(net)
    before = values(net[1])
    optimizer.step()
    assert same(before, values(net[1]))


@pytest.mark.parametrize("kind", KINDS)
@given(
    flags=st.lists(st.booleans(), min_size=3, max_size=3),
    freezes=st.integers(1, 3),
    unfreezes=st.integers(1, 3),
)
def test_freeze_then_unfreeze_is_the_identity(kind, flags, freezes, unfreezes):
    net = small(kind)
    net[1].weight.requires_grad_(flags[0])
    net[1].bias.requires_grad_(flags[1])
    net[1].train(flags[2])
    if kind == "ours":
        net[1].source, net[1].update = "batch" if flags[0] else "auto", "auto"
    before, contents = everything(net), values(net)
    for _ in range(freezes):
        bn.freeze(net)
    assert is_frozen(net[1])
    assert isinstance(net[1], KINDS[kind])
    for _ in range(unfreezes):
        bn.unfreeze(net)
    assert everything(net) == before
    assert same(contents, values(net))


def test_a_gamma_that_two_layers_share():
    net = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    net[1].weight = net[0].weight
    bn.unfreeze(bn.freeze(net))
    assert net[0].weight.requires_grad
    assert net[1].weight is net[0].weight


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_survives(kind):
    net = bn.freeze(small(kind))
    x = torch.randn(5, 3, 6, 6)
    expected = net(x)
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), loaded):
        other.train()
        assert torch.equal(other(x), expected)
        assert is_frozen(other[1])
        assert not other[1].weight.requires_grad
        bn.unfreeze(other)
        assert type(other[1]) is KINDS[kind]
        assert other[1].weight.requires_grad
    net.to(torch.float64).train().load_state_dict(net.state_dict())
    assert net(x.double()).dtype is torch.float64
    assert not net[1].weight.requires_grad
    assert set(net.state_dict()) == set(small(kind).state_dict())


def test_weights_load_into_frozen_layers_and_stay():
    net, other = bn.freeze(small("torch")), randomize(small("torch"), seed=5)
    net.load_state_dict(other.state_dict())
    before = values(net[1])
    net.train()(torch.randn(5, 3, 6, 6))
    assert same(before, values(net[1]))
    assert torch.equal(net[1].running_mean, other[1].running_mean)


def test_frozen_in_training_mode_folds():
    net = randomize(resnet())
    bn.freeze(net).train()
    x = torch.randn(2, 3, 16, 16)
    result = bn.fold(net, x)
    assert len(result.certificate.folded) == 6
    torch.testing.assert_close(result.model(x), net(x), rtol=1e-5, atol=1e-5)


class OfTheBatch(nn.BatchNorm2d):
    def forward(self, x):
        return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.1, self.eps)


class DropsByItself(nn.BatchNorm2d):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, self.training)


class Counts(nn.BatchNorm2d):
    def forward(self, x):
        with torch.no_grad():
            self.running_var += self.training
        return super().forward(x)


REFUSED = {
    "running statistics": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "OfTheBatch.*does not normalize by its running statistics": lambda: OfTheBatch(4),
    "DropsByItself.*training": lambda: DropsByItself(4),
    "Counts": lambda: Counts(4),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_frozen_leaves_all_as_it_was(reason):
    net = nn.Sequential(nn.BatchNorm2d(4), REFUSED[reason]())
    before = everything(net)
    with pytest.raises(SurgeryError, match=rf"'1'.*{reason}"):
        bn.freeze(net)
    assert everything(net) == before


def test_no_norms_and_no_network():
    with pytest.raises(SurgeryError, match="no batch normalization"):
        bn.freeze(nn.Linear(3, 3))
    with pytest.raises(InputError, match=r"torch\.nn\.Module"):
        bn.freeze("network")
    net = nn.Linear(3, 3)
    assert bn.unfreeze(net) is net


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
def test_compiled():
    torch._dynamo.reset()
    net = small("torch").train()
    compiled = torch.compile(net, backend="eager")
    x = torch.randn(5, 3, 6, 6)
    compiled(x)
    assert bn.freeze(compiled) is compiled
    before = values(net[1])
    compiled(x)
    assert same(before, values(net[1]))


@pytest.mark.parametrize(
    ("layers", "told"),
    [
        (1, "freeze: '1' keeps no running"),
        (2, "freeze: '1' (like '2') keeps no running"),
        (5, "freeze: '1' (like '2', '3', '4' and '5') keeps no running"),
        (12, "freeze: '1' (like '2', '3', '4' and 8 more) keeps no running"),
    ],
)
def test_layers_with_one_obstacle_are_named_together(layers, told):
    net = nn.Sequential(nn.Identity(), *(nn.BatchNorm1d(4, track_running_stats=False) for _ in range(layers)))
    with pytest.raises(SurgeryError) as raised:
        bn.freeze(net)
    assert str(raised.value).startswith(told)
    assert str(raised.value).count("keeps no running") == 1
