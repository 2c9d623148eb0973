"""Layers of other people's classes have modes: their forward is kept, and our layer normalizes in it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import batchnorm as bn
from batchnorm.errors import SurgeryError


class ThenAct(nn.BatchNorm2d):
    def forward(self, x):
        return torch.tanh(super().forward(x))


class Calls(nn.BatchNorm2d):
    """Calls the function itself, and counts batches itself, in the manner of the image model libraries."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.drop, self.act = nn.Dropout(0.5), nn.SiLU()

    def forward(self, x):
        share = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                share = 1.0 / float(self.num_batches_tracked)
        batch = self.training or (self.running_mean is None and self.running_var is None)
        tracked = not self.training or self.track_running_stats
        mean, var = (self.running_mean, self.running_var) if tracked else (None, None)
        return self.act(self.drop(F.batch_norm(x, mean, var, self.weight, self.bias, batch, share, self.eps)))


class LastAxis(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Operator(nn.BatchNorm3d):
    def forward(self, x):
        if self.training:
            self.num_batches_tracked.add_(1)
        return F.relu6(
            torch.batch_norm(
                x, self.weight, self.bias, self.running_mean, self.running_var, self.training, self.momentum, self.eps,
                False,
            )
        )  # fmt: skip


class AnyRank(nn.modules.batchnorm._BatchNorm):
    def _check_input_dim(self, input):
        assert input.ndim >= 2

    def forward(self, x):
        return super().forward(x).abs()


class OfOurs(bn.BatchNorm2d):
    def forward(self, x):
        return torch.sigmoid(super().forward(x))


LAYERS = {
    "super": (lambda: ThenAct(4), (6, 4, 3, 5)),
    "function": (lambda: Calls(4), (6, 4, 3, 5)),
    "cumulative": (lambda: Calls(4, momentum=None), (6, 4, 3, 5)),
    "no affine": (lambda: ThenAct(4, affine=False), (6, 4, 3, 5)),
    "last axis": (lambda: LastAxis(4), (6, 5, 4)),
    "operator": (lambda: Operator(4), (6, 4, 3, 5, 2)),
    "any rank": (lambda: AnyRank(4), (6, 4)),
    "subclass of ours": (lambda: OfOurs(4), (6, 4, 3, 5)),
    "sync": (lambda: nn.SyncBatchNorm(4), (6, 4, 3, 5)),
}


def made(name, dtype=torch.float32):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = make()
    for buffer in (layer.running_mean, layer.running_var):
        nn.init.uniform_(buffer, 0.5, 1.5)
    if layer.affine:
        nn.init.uniform_(layer.weight, 0.5, 1.5)
        nn.init.uniform_(layer.bias, -1, 1)
    return layer.to(dtype), 2 * torch.randn(shape, dtype=dtype) + 1


def run(layer, x, training):
    """Output of a copy whose children do not train, its state afterwards, and the gradient of its input."""
    layer.train(training)
    for child in layer.children():
        child.eval()
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(torch.cos(torch.arange(y.numel(), dtype=y.dtype)).reshape(y.shape))
    return y.detach(), {k: v.clone() for k, v in layer.state_dict().items()}, x.grad


def same(one, other):
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LAYERS)
def test_frozen_they_compute_what_they_did_in_evaluation(name, dtype):
    layer, x = made(name, dtype)
    net, kind, state = nn.Sequential(layer), type(layer), copy.deepcopy(layer.state_dict())
    flags = {n: p.requires_grad for n, p in layer.named_parameters()}
    expected = run(copy.deepcopy(layer), x, False)
    bn.freeze(net)
    assert isinstance(layer, kind)
    assert type(layer).__name__ == kind.__name__
    for twin in (layer, copy.deepcopy(layer)):
        same(run(twin, x, True), expected)
        same(run(twin, x, False), expected)
    assert not any(p.requires_grad for p in layer.parameters())
    bn.unfreeze(net)
    assert type(layer) is kind
    assert {n: p.requires_grad for n, p in layer.named_parameters()} == flags
    assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())
    same(run(layer, x, False), expected)


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "sync"])
def test_modes_mean_the_same_as_everywhere(name):
    layer, x = made(name)
    by_batch, by_running = (run(copy.deepcopy(layer), x, training) for training in (True, False))
    state = copy.deepcopy(layer.state_dict())
    with bn.mode(layer, source="batch", update="never"):
        y, after, dx = run(layer, x, False)
        same((y, dx), (by_batch[0], by_batch[2]))
        same(after, dict(state))
    with bn.mode(layer, source="running", update="always"):
        y, after, dx = run(layer, x, False)
        same((y, dx), (by_running[0], by_running[2]))
        same(after, by_batch[1])
    layer.load_state_dict(state)
    with bn.no_update(layer):
        same(run(layer, x, True)[1], dict(state))
    same(run(layer, x, True), by_batch)


@pytest.mark.parametrize("name", ["super", "function", "subclass of ours"])
def test_micro_batches_are_taken_in_as_one_batch(name):
    layer, x = made(name)
    whole = copy.deepcopy(layer).train()
    whole(x)
    layer.train()
    with bn.accumulate(layer):
        for part in x.split(2):
            layer(part)
    same(layer.running_mean, whole.running_mean)
    same(layer.running_var, whole.running_var)
    assert int(layer.num_batches_tracked) == 1


@pytest.mark.parametrize("name", ["super", "function"])
def test_options_of_ours_are_theirs_for_the_time(name):
    layer, x = made(name)
    kind, net = type(layer), nn.Sequential(layer)
    x[0, 1] = torch.inf
    before = layer.running_mean.clone()
    bn.convert(net, nonfinite="skip_channel")
    assert isinstance(layer, kind)
    layer.train()(x)
    assert torch.isfinite(layer.running_mean).all()
    assert torch.equal(layer.running_mean[1], before[1])
    assert not torch.equal(layer.running_mean[0], before[0])
    assert type(bn.revert(net)[0]) is kind


@pytest.mark.parametrize("name", ["super", "function"])
def test_a_frozen_layer_is_pickled_folded_and_compiled(name):
    layer, x = made(name)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), layer).eval()
    x = torch.randn(5, 3, 7, 7)
    with torch.no_grad():
        expected = net(x)
        bn.freeze(net)
        for module in (net, pickle.loads(pickle.dumps(net)), torch.compile(net, backend="eager", fullgraph=True)):
            same(module(x), expected)
        folded = bn.fold(net, x)
        assert len(folded.certificate.folded) == 1
        same(folded.model(x), expected)


def test_a_class_with_an_attribute_that_we_use_is_refused():
    class Named(nn.BatchNorm2d):
        activation = "leaky_relu"

        def forward(self, x):
            return F.leaky_relu(super().forward(x))

    with pytest.raises(SurgeryError, match="'activation' of its own"):
        bn.freeze(nn.Sequential(Named(4)))


def test_a_class_of_which_a_synchronized_layer_would_keep_a_part_is_refused():
    with pytest.raises(SurgeryError, match="keep the normalization alone"):
        bn.convert(nn.Sequential(ThenAct(4)), to="sync")
