"""accelerate with the channels last: the same network, other strides; revert gives the usual order back."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from small_networks import mobilenet, randomize, resnet
from torch import nn

import batchnorm as bn
from batchnorm.errors import InputError, SurgeryError
from batchnorm.surgery import memory_order

IMAGES = torch.randn(4, 3, 16, 16)
LAST = torch.channels_last


class Flattening(nn.Module):
    """A convolution, batch normalization and a linear layer, with view or flatten between them."""

    def __init__(self, view: bool) -> None:
        super().__init__()
        self.view = view
        self.conv, self.norm, self.out = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4 * 16 * 16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        return self.out(x.view(x.size(0), -1) if self.view else x.flatten(1))


def spatial(net: nn.Module) -> list[nn.Module]:
    """Convolutions whose weights can lie in two orders."""
    return [m for m in net.modules() if isinstance(m, nn.Conv2d) and min(m.kernel_size) > 1 and m.weight.shape[1] > 1]


def step(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients in training mode, then the output in evaluation mode, in float64."""
    twin = copy.deepcopy(net).double().train()
    torch.manual_seed(3)
    y = twin(x.double())
    (y * torch.randn(y.shape, dtype=y.dtype)).sum().backward()
    with torch.no_grad():
        after = twin.eval()(x.double())
    return [y.detach(), after, *(p.grad for p in twin.parameters())]


@pytest.mark.parametrize("make", [resnet, mobilenet])
def test_the_same_network_in_another_order_and_back(make):
    net = randomize(make())
    original = copy.deepcopy(net)
    bn.accelerate(net, IMAGES, channels_last=True)
    assert spatial(net)
    assert all(m.weight.is_contiguous(memory_format=LAST) for m in spatial(net))
    assert not any(m.weight.is_contiguous() for m in spatial(net))
    assert len(net.report.order.convolutions) == len(spatial(net))
    assert f"The weights of {len(spatial(net))} convolution" in str(net.report)
    assert "have the channels last" in str(net.report)
    for mine, theirs in zip(step(net, IMAGES), step(original, IMAGES), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)
    for (key, mine), (other, theirs) in zip(net.state_dict().items(), original.state_dict().items(), strict=True):
        assert key == other
        assert torch.equal(mine, theirs)
    twin = copy.deepcopy(net)
    for given in (net, twin):
        bn.revert(given)
        assert all(m.weight.is_contiguous() for m in spatial(given))
        assert not any(memory_order.LAID_OUT in m.__dict__ for m in given.modules())


def test_what_convolutions_compute_has_the_channels_last():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3))
    assert net(IMAGES).is_contiguous()
    bn.accelerate(net, IMAGES, channels_last=True)
    assert net(IMAGES).is_contiguous(memory_format=LAST)


def test_a_reverted_layer_can_be_pickled_and_one_in_another_order_too():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    bn.accelerate(net, IMAGES, channels_last=True)
    loaded = pickle.loads(pickle.dumps(net))
    assert loaded[0].weight.is_contiguous(memory_format=LAST)
    assert bn.revert(loaded)[0].weight.is_contiguous()


def test_a_forward_that_views_is_refused_and_nothing_is_changed():
    net = Flattening(view=True)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(SurgeryError, match=r"channels last the network fails .*view size.*leave out channels_last"):
        bn.accelerate(net, IMAGES, channels_last=True)
    assert type(net.norm) is nn.BatchNorm2d
    assert net.conv.weight.is_contiguous()
    assert memory_order.LAID_OUT not in net.conv.__dict__
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_a_forward_that_views_is_accelerated_without_where_it_may_be():
    net = bn.accelerate(Flattening(view=True), IMAGES, channels_last=None)
    assert net.norm.activation == "relu"
    assert net.conv.weight.is_contiguous()
    assert "keep the order of their weights: with the channels last the network fails" in str(net.report)


@pytest.mark.parametrize(("after", "taken"), [(0.5, True), (0.96, True), (0.98, False), (2.0, False)])
def test_the_faster_order_is_taken(monkeypatch, after, taken):
    def seconds(net, example):
        return after if net.conv.weight.is_contiguous(memory_format=LAST) else 1.0

    monkeypatch.setattr(memory_order, "training_step", seconds)
    net = bn.accelerate(Flattening(view=False), IMAGES, channels_last=None)
    assert net.conv.weight.is_contiguous(memory_format=LAST) is taken
    assert net.norm.activation == "relu"
    assert net.report.order.ratio == after
    assert f"takes {after:.2f} of the time" in str(net.report)
    assert (memory_order.LAID_OUT in net.conv.__dict__) is taken


def test_statistics_gradients_and_random_numbers_stay_where_time_is_measured():
    net = Flattening(view=False)
    mean, state = net.norm.running_mean.clone(), torch.get_rng_state()
    bn.accelerate(net, IMAGES, channels_last=None)
    assert torch.equal(net.norm.running_mean, mean)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in net.parameters())


def test_networks_with_nothing_to_lay_out_say_so():
    dense = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    with pytest.warns(UserWarning, match="keep the order of their weights: none of them"):
        bn.accelerate(dense, torch.randn(5, 4), channels_last=True)
    assert isinstance(dense[1], bn.BatchNorm1d)
    last = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=LAST)
    with pytest.warns(UserWarning, match="none of them"):
        bn.accelerate(last, IMAGES, channels_last=True)
    assert bn.revert(last)[0].weight.is_contiguous(memory_format=LAST)  # it was so before


def test_other_words_for_the_order_are_refused():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(InputError, match="got channels_last='auto'; expected True, False, or None to measure"):
        bn.accelerate(net, IMAGES, channels_last="auto")
    assert type(net[1]) is nn.BatchNorm2d


def test_accelerated_networks_can_be_laid_out_later():
    net = bn.accelerate(randomize(resnet()), IMAGES)
    original = copy.deepcopy(net)
    bn.accelerate(net, IMAGES, channels_last=True)
    assert all(m.weight.is_contiguous(memory_format=LAST) for m in spatial(net))
    for mine, theirs in zip(step(net, IMAGES), step(original, IMAGES), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)


def test_three_dimensions_and_transposed_convolutions():
    net = nn.Sequential(nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4), nn.ReLU(), nn.ConvTranspose3d(4, 3, 3))
    x = torch.randn(2, 2, 6, 6, 6)
    original = copy.deepcopy(net)
    bn.accelerate(net, x, channels_last=True)
    assert all(net[k].weight.is_contiguous(memory_format=torch.channels_last_3d) for k in (0, 3))
    for mine, theirs in zip(step(net, x), step(original, x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)


def test_weights_that_lie_in_memory_of_others_stay():
    flat = torch.randn(2, 4, 3, 3, 3)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    net[0].weight.data = flat[0]
    bn.accelerate(net, IMAGES, channels_last=True)
    assert net[0].weight.data_ptr() == flat.data_ptr()
    assert net.report.order.convolutions == ("3",)


def test_a_copy_is_laid_out_and_the_original_is_not():
    net = randomize(resnet())
    other = bn.accelerate(net, IMAGES, inplace=False, channels_last=True)
    assert all(m.weight.is_contiguous() for m in spatial(net))
    assert all(m.weight.is_contiguous(memory_format=LAST) for m in spatial(other))


@pytest.mark.parametrize("verb", ["fold", "freeze", "calibrate"])
def test_other_verbs_take_weights_in_this_order(verb):
    net = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3)))
    original = copy.deepcopy(net)
    bn.accelerate(net, IMAGES, channels_last=True)
    for each in (net, original):
        if verb == "calibrate":
            bn.calibrate(each, [IMAGES])
        elif verb == "freeze":
            bn.freeze(each)
    if verb == "fold":
        net, original = (bn.fold(each.eval(), IMAGES).model for each in (net, original))
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(IMAGES), original.eval()(IMAGES), rtol=1e-4, atol=1e-5)
