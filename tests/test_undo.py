"""What is remembered comes back, from every way out of the body."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.undo import Attributes, Buffers, Flags, OptimizerState, Structure, Values, evaluating, kept


class Stopped(BaseException):
    """As Ctrl-C: no `Exception`."""


@pytest.fixture
def net():
    return nn.Sequential(nn.Linear(3, 3), bn.BatchNorm1d(3), nn.Dropout())


def test_after_the_body_or_only_if_it_fails(net):
    with kept(Attributes([net[1]], "eps")):
        net[1].eps = 1.0
    assert net[1].eps == 1e-5
    with kept(Attributes([net[1]], "eps"), if_it_fails=True):
        net[1].eps = 2.0
    assert net[1].eps == 2.0
    with pytest.raises(Stopped), kept(Attributes([net[1]], "eps"), if_it_fails=True):  # noqa: PT012
        net[1].eps = 3.0
        raise Stopped
    assert net[1].eps == 2.0


def test_the_last_memory_is_put_back_first(net):
    first = Attributes([net], "note")
    net.note = "between"
    with kept(first, Attributes([net], "note")):
        net.note = "inside"
    assert not hasattr(net, "note")


def test_an_attribute_of_the_class_is_the_classs_again(net):
    with kept(Attributes([net[1]], "_source", "domain", "absent")):
        net[1]._source, net[1].domain, net[1].absent = object(), 1, 2
    assert not net[1].__dict__.keys() & {"_source", "domain", "absent"}
    assert net[1]._call_size == 0  # the short call is back, too


def test_values_go_back_into_the_same_memory(net):
    buffer, address = net[1].running_mean, net[1].running_mean.data_ptr()
    with kept(Values([buffer])):
        net(torch.randn(4, 3))
        assert buffer.any()
    assert not buffer.any()
    assert buffer.data_ptr() == address


def test_buffers_that_were_replaced_or_dropped_are_back(net):
    before = net[1].running_mean, net[1].running_var
    with kept(Buffers(net)):
        net[1].running_mean = torch.ones(3)
        net[1].running_var.fill_(7.0)
        net[1].running_var = None
    assert (net[1].running_mean, net[1].running_var) == before
    assert (net[1].running_var == 1).all()


def test_flags_and_gradients(net):
    gradient = net[0].weight.grad = torch.ones(3, 3)
    with kept(Flags(net.parameters())):
        for p in net.parameters():
            p.requires_grad_(False)
            p.grad = None
    assert all(p.requires_grad for p in net.parameters())
    assert net[0].weight.grad is gradient


def test_a_structure_has_its_classes_and_parts_again(net):
    twin, children = copy.deepcopy(net), dict(net.named_modules())
    with kept(Structure(net.modules())):
        net[1].__class__ = nn.BatchNorm1d
        net[1].weight = None
        net[2] = nn.ReLU()
        net.extra = 1
    assert dict(net.named_modules()) == children
    assert repr(net) == repr(twin)
    assert not hasattr(net, "extra")
    assert net[1].weight is not None


def test_an_optimizer_has_its_parameters_and_state(net):
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    state, parameters = dict(optimizer.state), list(net.parameters())
    with kept(OptimizerState(optimizer)):
        optimizer.param_groups[0]["params"].pop()
        optimizer.state.clear()
    assert optimizer.param_groups[0]["params"] == parameters
    assert dict(optimizer.state) == state


def test_each_module_is_in_its_own_mode_again(net):
    net[2].eval()
    with evaluating(net):
        assert not net.training
    assert [m.training for m in net] == [True, True, False]
