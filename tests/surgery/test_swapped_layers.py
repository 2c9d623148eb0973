"""Other tools swap the layers of an accelerated network, and other people's classes are fused: nothing gets lost."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from small_networks import randomize
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import batchnorm as bn
from batchnorm.errors import SurgeryError

IMAGES = torch.randn(4, 3, 9, 9)


class NormAct(nn.BatchNorm2d):
    """Normalization, dropout and activation in one class, in the manner of the image model libraries."""

    def __init__(self, channels, act, drop=0.0):
        super().__init__(channels)
        self.drop, self.act = nn.Dropout(drop) if drop else nn.Identity(), act

    def forward(self, x):
        training = self.training or self.running_mean is None
        if training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training, self.momentum, self.eps
        )
        return self.act(self.drop(x))


class ThenAct(nn.BatchNorm2d):
    def forward(self, x):
        return F.hardswish(super().forward(x))


def modules(act):
    """Activation modules behind the layers."""
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), act(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), act()]
    return nn.Sequential(*layers)


class Block(nn.Module):
    """An addition and calls of activations in a forward."""

    def __init__(self, act):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.act = act

    def forward(self, x):
        x = self.act(self.norm1(self.conv1(x)))
        return self.act(self.norm2(self.conv2(x)) + x)


NETWORKS = {
    "modules, silu": lambda: modules(nn.SiLU),
    "modules, gelu": lambda: modules(nn.GELU),
    "calls, silu": lambda: Block(F.silu),
    "calls, sigmoid": lambda: Block(torch.sigmoid),
}


def to_sync(net):
    return nn.SyncBatchNorm.convert_sync_batchnorm(net)


def to_plain(net):
    """Each layer is swapped for one of torch.nn with the same state, as tools that freeze or convert do."""
    for module in list(net.modules()):
        for key, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                plain = nn.BatchNorm2d(child.num_features, child.eps).train(child.training)
                plain.load_state_dict(child.state_dict())
                setattr(module, key, plain)
    return net


def to_fused(net):
    """The layers are folded into the convolutions by torch's own function."""
    found = dict(net.named_modules())
    names = [n for n, m in found.items() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))]
    for conv, norm in zip(names[::2], names[1::2], strict=True):
        setattr(net, conv, fuse_conv_bn_eval(found[conv], found[norm]))
        setattr(net, norm, nn.Identity())
    return net


@pytest.mark.parametrize("swap", [to_sync, to_plain, to_fused])
@pytest.mark.parametrize("name", NETWORKS)
def test_activations_and_additions_survive_a_swap(name, swap):
    net = randomize(NETWORKS[name]()).eval()
    expected = net(IMAGES)
    accelerated = bn.accelerate(net, IMAGES, inplace=False)
    assert len(accelerated.report.fused) == 2
    for twin in (accelerated, copy.deepcopy(accelerated)):
        torch.testing.assert_close(twin(IMAGES), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(swap(copy.deepcopy(twin))(IMAGES), expected, rtol=1e-5, atol=1e-5)
    swapped = swap(accelerated)
    torch.testing.assert_close(swapped(IMAGES), expected, rtol=1e-5, atol=1e-5)


def sync_of_their_own(module):
    """A package's own conversion, which knows its classes: a layer of them that normalizes over all ranks."""
    hasattr(module, "qconfig")
    made = NormAct(module.num_features, module.act)
    made.load_state_dict(module.state_dict())
    return made


@pytest.mark.parametrize("freezes", [False, True])
def test_a_package_that_swaps_its_own_classes_loses_no_modes(freezes):
    net = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), NormAct(4, nn.ReLU()))).eval()
    expected = net(IMAGES)
    if freezes:
        with pytest.raises(SurgeryError, match=r"would lose source='running', update='never'"):
            sync_of_their_own(bn.freeze(net)[1])
        return
    bn.accelerate(net, IMAGES)
    net[1] = sync_of_their_own(net[1]).eval()
    torch.testing.assert_close(net(IMAGES), expected)


def test_a_network_that_was_saved_whole_survives_a_swap():
    net = randomize(modules(nn.SiLU)).eval()
    expected = net(IMAGES)
    file = io.BytesIO()
    torch.save(bn.accelerate(net, IMAGES), file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    torch.testing.assert_close(loaded(IMAGES), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(to_plain(loaded)(IMAGES), expected, rtol=1e-5, atol=1e-5)


def test_what_fold_leaves_is_not_activated_twice():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 4, 3))
    net = randomize(net).append(nn.BatchNorm2d(4)).append(nn.SiLU()).eval()
    expected = net(IMAGES)
    folded = bn.fold(bn.accelerate(net, IMAGES), IMAGES)
    torch.testing.assert_close(folded.model(IMAGES), expected, rtol=1e-5, atol=1e-5)


def trained(net, x):
    twin = copy.deepcopy(net).double().train()
    torch.manual_seed(3)
    y = twin(x.double())
    (y * torch.randn_like(y)).sum().backward()
    return y.detach(), {n: p.grad for n, p in twin.named_parameters()}, dict(twin.named_buffers())


@pytest.mark.parametrize("act", [nn.ReLU(inplace=True), nn.SiLU(), nn.Identity()])
def test_classes_that_normalize_and_activate_are_fused(act):
    net = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), NormAct(4, act), nn.Conv2d(4, 4, 3), ThenAct(4)))
    original, keys = copy.deepcopy(net), list(net.state_dict())
    report = bn.accelerate(net, IMAGES).report
    assert (set(report.fused) | set(report.swapped), report.kept) == ({"1", "3"}, {})
    assert isinstance(net[1], NormAct)
    assert isinstance(net[1], bn.BatchNorm2d)
    assert net[3].activation == "hardswish"
    assert list(net.state_dict()) == keys
    for one, other in zip(trained(original, IMAGES), trained(net, IMAGES), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)
    bn.revert(net)
    assert [type(m) for m in net.modules()] == [type(m) for m in original.modules()]
    assert not hasattr(net, "report")
    torch.testing.assert_close(net.eval()(IMAGES), original.eval()(IMAGES))


def test_a_layer_that_is_left_alone_is_named_with_the_reason():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), NormAct(4, nn.ReLU(), drop=0.5), nn.Conv2d(4, 4, 3), NormAct(4, nn.PReLU()))
    with pytest.warns(UserWarning, match=r"accelerate changed nothing.* 2 kept") as caught:
        bn.accelerate(net, IMAGES)
    text = str(caught[0].message)
    assert "1: kept, since it is a NormAct, whose forward has Dropout" in text
    assert "3: kept, since it is a NormAct, whose forward has PReLU" in text


def test_a_second_call_says_that_it_changed_nothing():
    net = bn.accelerate(randomize(modules(nn.ReLU)), IMAGES)
    with pytest.warns(UserWarning, match="changed nothing"):
        bn.accelerate(net, IMAGES)
