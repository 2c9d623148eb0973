"""accelerate gives the same network in both modes, with the same keys; revert gives the original back."""

from __future__ import annotations

import contextlib
import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from small_networks import Calls, mobilenet, randomize, resnet
from torch import nn
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm.errors import InputError, SurgeryError
from batchnorm.surgery.acceleration import plan_acceleration

IMAGES = torch.randn(4, 3, 16, 16)


def structure(net):
    return [(name, type(module), module.training, module.extra_repr()) for name, module in net.named_modules()]


def trained(net, x):
    """Outputs, gradients and buffers of a training step with a random upstream gradient, in float64."""
    twin = copy.deepcopy(net).double().train()
    torch.manual_seed(3)
    y = twin(x.double())
    (y * torch.randn_like(y)).sum().backward()
    return y.detach(), {n: p.grad for n, p in twin.named_parameters()}, dict(twin.named_buffers())


def assert_same(a, b, x):
    with torch.no_grad():
        wide = [copy.deepcopy(net).double().eval()(x.double()) for net in (a, b)]
    torch.testing.assert_close(*wide, rtol=1e-9, atol=1e-9)
    for one, other in zip(trained(a, x), trained(b, x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("make", [resnet, mobilenet])
@pytest.mark.parametrize("training", [True, False])
def test_residual_networks(make, training):
    net = randomize(make()).train(training)
    original = copy.deepcopy(net)
    before, keys = structure(net), list(net.state_dict())
    assert bn.accelerate(net, IMAGES) is net
    assert list(net.state_dict()) == keys
    assert net.training is training
    assert all(isinstance(m, bn.BatchNorm2d) for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    assert_same(original, net, IMAGES)
    assert bn.revert(net) is net
    assert structure(net) == before
    assert_same(original, net, IMAGES)


def test_every_pattern_of_a_residual_block_is_fused():
    net = bn.accelerate(resnet(), IMAGES)
    assert [net[i].bn1.activation for i in (3, 4)] == ["relu", "relu"]
    assert [net[i].bn2.activation for i in (3, 4)] == ["relu", "relu"]
    assert net[4].down[1].activation is None
    calls = []
    net[3].bn2.register_forward_hook(lambda m, args, kwargs, y: calls.append(kwargs), with_kwargs=True)
    net(IMAGES)
    assert calls[0]["residual"].shape == (4, 8, 16, 16)
    assert isinstance(net[3], type(resnet()[3]))


def test_a_copy_leaves_the_network_alone():
    net = randomize(resnet())
    before = structure(net)
    fast = bn.accelerate(net, IMAGES, inplace=False)
    assert fast is not net
    assert structure(net) == before
    assert_same(net, fast, IMAGES)
    assert_same(net, copy.deepcopy(fast), IMAGES)
    assert structure(bn.revert(copy.deepcopy(fast))) == before


def test_training_after_it_and_reverting_keeps_what_was_learned():
    net = bn.accelerate(randomize(resnet()).train(), IMAGES)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    net(IMAGES).square().mean().backward()
    optimizer.step()
    state = copy.deepcopy(net.state_dict())
    bn.revert(net)
    plain = resnet()
    plain.load_state_dict(state)
    torch.testing.assert_close(net.eval()(IMAGES), plain.eval()(IMAGES))


class Called(Calls):
    """The same with a signature that torch.fx can follow."""

    def forward(self, x):
        return self.run(self, x)


ACTIVATIONS = {
    "relu": (nn.ReLU(), F.relu),
    "relu6": (nn.ReLU6(), F.relu6),
    "leaky_relu": (nn.LeakyReLU(0.3), lambda x: F.leaky_relu(x, 0.3)),
    "silu": (nn.SiLU(), F.silu),
    "gelu": (nn.GELU(), F.gelu),
    "hardswish": (nn.Hardswish(), F.hardswish),
    "sigmoid": (nn.Sigmoid(), torch.sigmoid),
    "tanh": (nn.Tanh(), torch.tanh),
    "elu": (nn.ELU(), F.elu),
    "celu": (nn.CELU(), lambda x: F.celu(x, 1.0)),
    "mish": (nn.Mish(), F.mish),
    "gelu_tanh": (nn.GELU(approximate="tanh"), lambda x: F.gelu(x, approximate="tanh")),
}


@pytest.mark.parametrize("called", [True, False])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name, called):
    module, function = ACTIVATIONS[name]
    if called:
        net = Called(lambda self, x: function(self.norm(self.conv(x))), conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4))
    else:
        layers = {"conv": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4), "act": copy.deepcopy(module)}
        net = Called(lambda self, x: self.act(self.norm(self.conv(x))), **layers)
    original = copy.deepcopy(net)
    bn.accelerate(net, IMAGES)
    assert net.norm.activation == {"celu": "elu"}.get(name, name)
    assert_same(original, net, IMAGES)


class Silu(nn.Module):
    """An activation as other packages wrap them."""

    def forward(self, input):
        return F.silu(input)


class Swish(nn.Module):
    def forward(self, x):
        return x * x.sigmoid()


class Mish(nn.Module):
    def forward(self, x):
        return x.mul(F.softplus(x).tanh())


class MishWrittenOut(nn.Module):
    def forward(self, x):
        return F.softplus(x, beta=1, threshold=20).tanh() * x


class MishOfAnother(nn.Module):
    def forward(self, x):
        return x.mul(F.softplus(x, 2.0).tanh())


class Leaky(nn.Module):
    def __init__(self, slope=0.2):
        super().__init__()
        self.slope = slope

    def forward(self, x):
        return F.leaky_relu(x, self.slope)


class QuickGelu(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Counting(Silu):
    calls = 0

    def forward(self, input):
        self.calls += 1
        return super().forward(input)


class ReluInTraining(nn.Module):
    def forward(self, x):
        return F.relu(x) if self.training else F.relu6(x)


class Keeping(nn.Module):
    def forward(self, x):
        self.last = x.detach()
        return F.relu(x)


def with_something_of_its_own(module):
    module.factor = nn.Parameter(torch.ones(1))
    return module


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize(
    ("act", "name"),
    [
        (Silu(), "silu"),
        (Swish(), "silu"),
        (Leaky(), "leaky_relu"),
        (Mish(), "mish"),
        (MishWrittenOut(), "mish"),
        (MishOfAnother(), None),
        (nn.ELU(0.5), None),
        (nn.CELU(0.5), None),
        (with_something_of_its_own(nn.ELU()), None),
        (with_something_of_its_own(nn.ReLU()), None),
        (QuickGelu(), None),
        (Counting(), None),
        (ReluInTraining(), None),
        (Keeping(), None),
    ],
)
def test_activations_of_other_classes(act, name, in_order):
    if in_order:
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), act)
        norm = net[1]
    else:
        norm = nn.BatchNorm2d(4)
        net = Called(lambda self, x: self.act(self.norm(self.conv(x))), conv=nn.Conv2d(3, 4, 3), norm=norm, act=act)
    original = copy.deepcopy(net)
    bn.accelerate(net, IMAGES)
    assert norm.activation == name
    assert norm.negative_slope == (0.2 if name == "leaky_relu" else 0.01)
    assert_same(original, net, IMAGES)


def test_an_order_of_memory_that_is_another_one_is_no_difference():
    """One value a channel lies in both orders; our layers and torch's call it another one, and an enlargement shows."""
    torch.manual_seed(0)
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3), nn.ReLU())
    net = nn.Sequential(pooled, nn.Upsample(scale_factor=4), nn.Conv2d(3, 4, 1))
    x = IMAGES.contiguous(memory_format=torch.channels_last)
    bn.accelerate(net, x)
    assert pooled[1].activation == "relu"


LEFT_ALONE = {
    "elu of another alpha": lambda self, x: F.elu(self.norm(x), 0.5),
    "elu of another scale": lambda self, x: torch.ops.aten.elu(self.norm(x), 1.0, 2.0),
    "elu of another input": lambda self, x: torch.ops.aten.elu(self.norm(x), input_scale=2.0),
    "used twice": lambda self, x: (lambda y: F.relu(y) + y.mean())(self.norm(x)),
    "broadcast": lambda self, x: self.norm(x) + x.mean((2, 3), keepdim=True),
    "scaled": lambda self, x: torch.add(self.norm(x), x, alpha=2),
    "number": lambda self, x: self.norm(x) + 1,
    "itself": lambda self, x: (lambda y: y + y)(self.norm(x)),
    "other dtype": lambda self, x: self.norm(x) + x.double(),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_only_looks_like_a_pattern(name):
    net = Called(LEFT_ALONE[name], norm=nn.BatchNorm2d(3))
    original = copy.deepcopy(net)
    bn.accelerate(net, IMAGES)
    assert net.norm.activation is None
    with torch.no_grad():
        torch.testing.assert_close(net(IMAGES), original(IMAGES), rtol=1e-5, atol=1e-5)


def _dropped(self, x):
    return F.dropout(F.relu(self.norm(self.conv(x))), 0.3, training=self.training)


def _longer_in_training(self, x):
    y = F.silu(self.norm(self.conv(x)))
    if not self.training:
        return y
    keep = torch.rand([x.shape[0], 1, 1, 1], dtype=x.dtype) > 0.5  # whole examples, as in stochastic depth
    return y * keep * 2


def _inverse(self, x):
    return F.hardtanh(F.relu6(self.norm(self.conv(x))), 0.0, 6.0 if self.training else 3.0)


IN_TRAINING = {
    "dropout": (_dropped, "relu"),
    "more calls": (_longer_in_training, "silu"),
    "number": (_inverse, "relu6"),
}


@pytest.mark.parametrize("name", IN_TRAINING)
def test_a_forward_that_differs_in_training(name):
    """As F.dropout(x, p, self.training) makes it: both are generated, and the mode chooses."""
    forward, activation = IN_TRAINING[name]
    net = Called(forward, conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4)).train()
    original = copy.deepcopy(net)
    bn.accelerate(net, IMAGES)
    assert net.norm.activation == activation
    assert list(inspect.signature(net.forward).parameters) == ["x"]
    assert_same(original, net, IMAGES)
    assert_same(original, copy.deepcopy(net), IMAGES)
    assert_same(original, bn.revert(net), IMAGES)


def test_a_forward_in_which_other_things_could_be_fused_in_training_is_refused_and_named():
    def forward(self, x):
        y = self.norm(self.conv(x))
        return F.relu(y) if self.training else F.silu(y)

    net = Called(forward, conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4)).train()
    original = copy.deepcopy(net)
    plan = plan_acceleration(net, IMAGES)
    assert "another one in training" in plan.skipped[""]
    bn.accelerate(net, IMAGES)
    assert net.norm.activation is None
    assert_same(original, net, IMAGES)


class Inverted(nn.Module):
    """A block whose caller says how many of its examples to drop, as in EfficientNets that were ported."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.SiLU()
        self.back, self.last = nn.Conv2d(6, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x, rate=None, *, double=False):
        y = self.last(self.back(self.act(self.norm(self.conv(x)))))
        if rate is not None and rate > 0:
            if self.training:
                y = y / (1 - rate) * torch.floor(1 - rate + torch.rand([y.shape[0], 1, 1, 1], dtype=y.dtype))
            y = y + x
        return 2 * y if double else self.act(y)


class Blocks(nn.Module):
    def __init__(self, kind=Inverted):
        super().__init__()
        self.blocks = nn.ModuleList(kind() for _ in range(3))

    def forward(self, x):
        for number, block in enumerate(self.blocks):
            x = block(x, number / 10)
        return x


class Plain(Inverted):
    def forward(self, x, rate=None):
        return super().forward(x, rate)


def test_arguments_that_a_forward_decides_by():
    """The forward is generated for their values on the example; with others the original is called, and is right."""
    net = randomize(Blocks(Plain)).train()
    original = copy.deepcopy(net)
    bn.accelerate(net, IMAGES)
    assert [block.norm.activation for block in net.blocks] == ["silu"] * 3
    assert list(inspect.signature(net.blocks[0].forward).parameters) == ["x", "rate"]
    assert_same(original, net, IMAGES)
    assert_same(original, copy.deepcopy(net), IMAGES)
    for given in ((0.4,), (None,), (), (0.1,), (0,)):
        for named in (False, True):
            for mode in (True, False):
                found = []
                for each in (original, net):
                    block = copy.deepcopy(each.blocks[1]).train(mode)
                    torch.manual_seed(0)
                    args, kwargs = ((), {"rate": given[0]}) if named and given else (given, {})
                    found.append(block(IMAGES, *args, **kwargs))
                torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
                assert block.norm.activation == ("silu" if given == (0.1,) else None)
    for args, kwargs in (((0.1, 3), {}), ((0.1,), {"x": IMAGES}), ((), {"x": IMAGES})):
        with pytest.raises(TypeError):
            copy.deepcopy(net.blocks[1])(IMAGES, *args, **kwargs)
    with pytest.raises(TypeError):
        copy.deepcopy(net.blocks[1])(IMAGES, speed=0.1)
    assert_same(original, bn.revert(net), IMAGES)


class Choosing(nn.Module):
    """By a flag, by a tensor that may be absent, and through a checkpoint."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def body(self, x):
        return F.silu(self.norm(self.conv(x)))

    def forward(self, x, mask=None, double=False, saving=False):
        y = checkpoint(self.body, x, use_reentrant=False) if saving else self.body(x)
        y = y if mask is None else y * mask
        return 2 * y if double is True else y


@pytest.mark.parametrize("masked", [False, True])
def test_flags_and_tensors_that_may_be_absent(masked):
    original = randomize(Choosing()).train()
    mask = (IMAGES[:, :1] > 0).float()
    net = bn.accelerate(copy.deepcopy(original), (IMAGES, mask) if masked else IMAGES)
    assert net.norm.activation == "silu"
    for given in ({}, {"mask": mask}, {"double": True}, {"mask": mask, "double": True}, {"saving": True}):
        for used in (copy.deepcopy(net), net):  # as it was, and after calls with other arguments
            found = []
            for each in (used, copy.deepcopy(original)):
                each.zero_grad()
                y = each(IMAGES, **given)
                y.square().sum().backward()
                found.append([y, *(p.grad.clone() for p in each.parameters())])
            torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)
    assert net.norm.activation is None


class Skipping(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x, skip=None):
        y = F.relu(self.norm(self.conv(x)))
        return 2 * y if skip is None else y + skip


@pytest.mark.parametrize("example", [IMAGES, (IMAGES, IMAGES)], ids=["absent", "given"])
def test_a_tensor_that_may_be_absent_and_nothing_else(example):
    original = randomize(Skipping()).eval()
    net = bn.accelerate(copy.deepcopy(original), example)
    assert net.norm.activation == "relu"
    for given in ((IMAGES,), (IMAGES, IMAGES), (IMAGES,)):
        torch.testing.assert_close(net(*given), original(*given), rtol=1e-4, atol=1e-5)


def _dropout_of_its_own(self, x):
    return F.dropout(F.silu(self.norm(self.conv(x))), 0.4, self.drop.training)


def _by_its_norm(self, x):
    y = F.silu(self.norm(self.conv(x)))
    return 2 * y if self.norm.training else y


@pytest.mark.parametrize("forward", [_dropout_of_its_own, _by_its_norm])
def test_a_forward_that_looks_at_the_modes_of_modules_in_it_stays(forward):
    layers = {"conv": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4), "drop": nn.Dropout(0.4)}
    net = Called(forward, **layers).train()
    original = copy.deepcopy(net)
    bn.accelerate(net, IMAGES)
    assert "modes of modules" in net.report.unfused[""]
    for each in (net, original):
        each.eval()
        each.drop.train()
    torch.manual_seed(0)
    ours = net(IMAGES)
    torch.manual_seed(0)
    torch.testing.assert_close(ours, original(IMAGES), rtol=1e-4, atol=1e-5)
    assert_same(original, net.train(), IMAGES)


def test_arguments_by_name_alone_leave_a_forward_as_it_is():
    net = randomize(Blocks()).train()
    original = copy.deepcopy(net)
    bn.accelerate(net, IMAGES)
    assert_same(original, net, IMAGES)
    assert_same(original, bn.revert(net), IMAGES)


class Tokens(nn.Module):
    """Batch normalization of (tokens, channels), with what is around it in transformers with convolutions."""

    def __init__(self, forward, activation):
        super().__init__()
        self.linear, self.norm, self.act, self.way = nn.Linear(3, 6), nn.BatchNorm1d(6), activation, forward

    def forward(self, x):
        return self.way(self, self.linear(x.flatten(2).transpose(1, 2)))


BEHIND_VIEWS = {
    "flat tokens": lambda self, y: self.act(self.norm(y.flatten(0, 1)).reshape_as(y)),
    "turned": lambda self, y: self.act(self.norm(y.transpose(1, 2)).transpose(1, 2)),
    "turned and copied": lambda self, y: self.act(self.norm(y.permute(0, 2, 1)).permute(0, 2, 1).contiguous()),
    "in more axes": lambda self, y: self.act(self.norm(y.flatten(0, 1)).view(4, 16, 16, 6).movedim(-1, 1)),
}


@pytest.mark.parametrize("called", [True, False])
@pytest.mark.parametrize("name", BEHIND_VIEWS)
def test_an_activation_behind_another_shape_or_order(name, called):
    net = Tokens(BEHIND_VIEWS[name], nn.Hardswish())
    if called:
        del net.act
        net.act = F.hardswish
    original = copy.deepcopy(net)
    bn.accelerate(net, IMAGES)
    assert net.norm.activation == "hardswish"
    assert_same(original, net, IMAGES)
    assert_same(original, bn.revert(net), IMAGES)


def test_an_activation_of_a_part_of_the_values_stays():
    net = Tokens(lambda self, y: self.act(self.norm(y.flatten(0, 1))[:3]), nn.Hardswish())
    original = copy.deepcopy(net)
    bn.accelerate(net, IMAGES)
    assert net.norm.activation is None
    assert_same(original, net, IMAGES)


@pytest.mark.parametrize("activation", [nn.ReLU(inplace=True), nn.LeakyReLU(0.1, inplace=True), nn.SiLU()])
@pytest.mark.parametrize("drop", [nn.Dropout(0.0), nn.Dropout(0.4), nn.Dropout2d(0.4, inplace=True)])
def test_an_activation_behind_dropout(activation, drop):
    """relu(a z) is a relu(z) for what dropout multiplies by; nothing like that holds for silu."""
    layers = {"conv": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4), "drop": drop, "act": activation}
    net = Called(lambda self, x: self.act(self.drop(self.norm(self.conv(x)))), **layers)
    original = copy.deepcopy(net)
    bn.accelerate(net, IMAGES)
    assert (net.norm.activation is None) == isinstance(activation, nn.SiLU)
    assert_same(original, net, IMAGES)
    net.drop.p = original.drop.p = 0.7
    assert_same(original, net, IMAGES)
    assert_same(original, bn.revert(net), IMAGES)


def test_hooks_frozen_and_foreign_layers_are_left_alone():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    seen = []
    net[1].register_forward_hook(lambda m, a, y: seen.append(y))
    bn.accelerate(net, IMAGES)
    assert net[1].activation is None
    assert isinstance(net[2], nn.ReLU)
    bn.revert(net)
    bn.freeze(net)
    plan = plan_acceleration(net, IMAGES)
    assert "frozen" in plan.skipped["1"]
    plan.apply()
    bn.unfreeze(net)
    assert type(net[1]) is nn.BatchNorm2d


def test_frozen_layers_are_not_reverted():
    net = bn.freeze(bn.accelerate(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), IMAGES))
    with pytest.raises(SurgeryError, match=r"'1' frozen.*unfreeze"):
        bn.revert(net)
    bn.revert(bn.unfreeze(net))
    assert type(net[1]) is nn.BatchNorm2d
    assert type(net[2]) is nn.ReLU


def test_a_wrong_fusion_is_noticed_and_undone(monkeypatch):
    from batchnorm.surgery import acceleration, activations

    wrong = activations.Activation("relu6")
    monkeypatch.setattr(acceleration.activations, "following", lambda flow, node: ("2", wrong))
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh())
    before = structure(net)
    # The layer gives another value than before by design: the difference begins behind it.
    with pytest.raises(SurgeryError, match=r"nothing was changed\. The difference begins at the output of '2'"):
        bn.accelerate(net, IMAGES)
    assert structure(net) == before


def test_examples_that_cannot_be_trained_on():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU()).eval()
    before = structure(net)
    with pytest.raises(InputError, match="training mode"):
        bn.accelerate(net, torch.randn(1, 3))
    assert structure(net) == before
    with pytest.raises(SurgeryError, match="no batch normalization"):
        bn.accelerate(nn.Linear(3, 4), torch.randn(2, 3))


def test_generated_forwards_are_copied_but_not_pickled():
    net = bn.accelerate(resnet(), IMAGES)
    with pytest.raises(SurgeryError, match="revert"):
        pickle.dumps(net)
    assert len(pickle.dumps(bn.revert(net))) > 1000
    plain = bn.accelerate(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), IMAGES)
    assert pickle.loads(pickle.dumps(plain))[1].activation == "relu"


def test_accelerated_networks_fold_export_and_freeze():
    net = bn.accelerate(randomize(resnet()).eval(), IMAGES)
    expected = net(IMAGES)
    result = bn.fold(net, IMAGES)
    assert not result.certificate.kept
    torch.testing.assert_close(result.model(IMAGES), expected, rtol=1e-4, atol=1e-4)
    exported = torch.export.export(net, (IMAGES,)).module()
    torch.testing.assert_close(exported(IMAGES), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bn.freeze(net).train()(IMAGES), expected, rtol=1e-4, atol=1e-4)


class Growing(nn.Module):
    """Blocks that take a list which grows, as those of DenseNet do."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Joined(3 * i) for i in (1, 2))

    def forward(self, x):
        features = [x]
        for block in self.blocks:
            features.append(block(features))
        return torch.cat(features, 1)


class Joined(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(channels), nn.Conv2d(channels, 3, 1)

    def forward(self, parts):
        return self.conv(F.relu(self.norm(torch.cat(parts, 1))))


def test_inputs_that_grow_while_the_network_runs():
    net = randomize(Growing())
    original = copy.deepcopy(net)
    bn.accelerate(net, IMAGES)
    assert [block.norm.activation for block in net.blocks] == ["relu", "relu"]
    assert_same(original, net, IMAGES)


class Branches(nn.Module):
    """Parallel normalizations that one sum joins."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.BatchNorm2d(3) for _ in range(3))

    def forward(self, x):
        y = self.a(x) + self.b(x)
        y += self.c(x)
        return F.relu(y)


def test_several_layers_that_feed_one_sum():
    """Only one layer can take each addition."""
    net, x = randomize(Branches()).eval(), torch.randn(4, 3, 5, 5)
    expected = net(x)
    bn.accelerate(net, x)
    torch.testing.assert_close(net(x), expected)
    assert net.c.activation == "relu"


def test_values_that_are_overwritten_later_are_not_fused():
    def forward(self, x):
        y = self.a(x)
        z = self.b(y)
        y.mul_(0.5)
        z.add_(y)
        return z + y

    net = Calls(forward, a=nn.BatchNorm2d(3), b=nn.BatchNorm2d(3)).double()
    x = torch.randn(4, 3, 5, 5).double()
    with torch.no_grad():
        expected = net(x)
    with contextlib.suppress(InputError):  # torch cannot train it
        bn.accelerate(net, x)
    with torch.no_grad():
        torch.testing.assert_close(net(x), expected)


def test_checkpointed_parts_count_their_batches_once():
    from torch.utils.checkpoint import checkpoint

    def forward(self, x):
        return self.head(checkpoint(self.body, x, use_reentrant=False))

    body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    net = Calls(forward, body=body, head=nn.Conv2d(4, 2, 1)).train()
    bn.accelerate(net, torch.randn(4, 3, 5, 5))
    assert net.body[1].activation == "relu"


def test_networks_that_cast_to_float32_by_themselves():
    net = Calls(lambda self, x: self.norm(self.conv(x.float())), conv=nn.Conv2d(3, 4, 1), norm=nn.BatchNorm2d(4))
    bn.accelerate(net, torch.randn(4, 3, 5, 5))
    assert isinstance(net.norm, bn.BatchNorm2d)


class ByLength(nn.Module):
    """A forward that asks its input's length, as many do that flatten."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)) + x)
        return x.reshape(len(x), -1)


def test_a_forward_that_asks_for_a_length_is_fused():
    net = ByLength()
    original = copy.deepcopy(net)
    bn.accelerate(net, IMAGES)
    assert net.norm.activation == "relu"
    assert "an addition" in str(net.report)
    assert_same(original, net, IMAGES)
    assert_same(original, net, IMAGES[:2])  # of another length than the example
    assert "len" not in ByLength.forward.__globals__
