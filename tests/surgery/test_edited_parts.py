"""Networks that decide by their data, which no graph can follow as a whole, edited in the parts that it can follow."""

from __future__ import annotations

import copy

import pytest
import torch
from small_networks import Calls, randomize
from torch import nn

import batchnorm as bn
from batchnorm.errors import SurgeryError
from batchnorm.surgery.insertion import plan_insertion

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()


def block(norm=True):
    """conv, norm, relu, conv: one normalization folds, and the first convolution can be normalized."""
    middle = [nn.BatchNorm2d(3)] if norm else []
    return nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), *middle, nn.ReLU(), nn.Conv2d(3, 3, 1))


def decide(x):
    """What no graph follows."""
    return x / 2 if float(x.detach().abs().max()) > 1e9 else x


def plain(self, x):
    return decide(self.first(x)) + self.second(x)


def called_inside(self, x):
    return decide(self.first(x)) + self.second(x) + self.first[0](x)


def read_inside(self, x):
    return decide(self.first(x)) * self.first[0].weight.sum() + self.second(x)


def several_shapes(self, x):
    return decide(self.first(x)) + self.second(x) + self.first(x[:, :, :1])


def strange_argument(self, x):
    return decide(self.first(x, {1, 2})) + self.second(x)


class Strange(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, numbers):
        return self.inner(x) * len(numbers)


class Giving(Strange):
    def forward(self, x):
        return Box(self.inner(x))


class Box:
    def __init__(self, value):
        self.value = value


def strange_result(self, x):
    return decide(self.first(x).value) + self.second(x)


def network(forward, norm=True):
    first, second = block(norm), block(norm)
    if forward is strange_argument:
        first = Strange(first)
    if forward is strange_result:
        first = Giving(first)
    return randomize(Calls(forward, first=first, second=second)).double().eval()


def test_what_can_be_captured_folds_and_is_verified_by_itself():
    net = network(plain)
    original = copy.deepcopy(net)
    result = bn.fold(net, IMAGES)
    certificate = result.certificate
    assert [(item.layer, item.into) for item in certificate.folded] == [
        ("first.1", "first.0"),
        ("second.1", "second.0"),
    ]
    assert certificate.parts == ("first", "second")
    assert certificate.proven
    assert {d.output for d in certificate.differences} == {"output", "first: output", "second: output"}
    assert "in 'first', 'second'" in str(certificate)
    for x in (IMAGES, IMAGES * 1e10):  # either way of the decision
        torch.testing.assert_close(result.model(x), original(x), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(net(IMAGES), original(IMAGES), rtol=0, atol=0)


@pytest.mark.parametrize("forward", [called_inside, read_inside, several_shapes])
def test_a_part_that_others_reach_into_stays(forward):
    net = network(forward)
    result = bn.fold(net, IMAGES)
    assert [item.layer for item in result.certificate.folded] == ["second.1"]
    (kept,) = result.certificate.kept
    assert kept.layer == "first.1"
    assert ("several shapes" if forward is several_shapes else "called or read from outside") in kept.reason
    torch.testing.assert_close(result.model(IMAGES), net(IMAGES), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("forward", [strange_argument, strange_result])
def test_where_values_hide_in_objects_the_modules_inside_are_the_parts(forward):
    net = network(forward)
    result = bn.fold(net, IMAGES)
    assert result.certificate.parts == ("first.inner", "second")
    assert len(result.certificate.folded) == 2
    torch.testing.assert_close(result.model(IMAGES), net(IMAGES), rtol=1e-9, atol=1e-10)


def test_a_part_whose_weight_is_tied_to_another_module_stays():
    net = network(plain)
    net.other = nn.Conv2d(3, 3, 3)
    net.other.weight = net.first[0].weight
    result = bn.fold(net, IMAGES)
    assert [item.layer for item in result.certificate.folded] == ["second.1"]
    assert "shares 'first.0.weight' with other modules" in result.certificate.kept[0].reason


def called_activation(self, x):
    activation = self.first[1] if len(self.first) == 3 else self.first[2]
    return activation(decide(self.first(x))) + self.second(x)


SHARED = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "identity": nn.Identity,
    "dropout": nn.Dropout,
    "several": lambda: nn.Sequential(nn.Dropout(), nn.GELU()),
}


def sharing(activation, forward=plain):
    """Two blocks with one activation, as YOLO-like networks have, whose whole cannot be captured."""
    net = network(forward)
    net.first[2] = net.second[2] = activation
    return net.double().eval()


@pytest.mark.parametrize("kind", SHARED)
def test_a_shared_module_without_state_is_no_obstacle(kind):
    net = sharing(SHARED[kind]())
    result = bn.fold(net, IMAGES)
    assert [item.layer for item in result.certificate.folded] == ["first.1", "second.1"]
    assert result.certificate.parts == ("first", "second")
    assert result.model.first[2] is result.model.second[2]
    torch.testing.assert_close(result.model(IMAGES), net(IMAGES), rtol=1e-9, atol=1e-10)
    assert bn.summary(net, IMAGES).parts == ("first", "second")


def test_a_shared_activation_that_is_called_from_outside_is_no_obstacle():
    net = sharing(nn.ReLU(), called_activation)
    result = bn.fold(net, IMAGES)
    assert [item.layer for item in result.certificate.folded] == ["first.1", "second.1"]
    torch.testing.assert_close(result.model(IMAGES), net(IMAGES), rtol=1e-9, atol=1e-10)


def test_what_stays_does_not_take_in_an_activation_that_others_use():
    def forward(self, x):
        return self.first[1](decide(self.first(x))) + self.second(x)

    first = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1))
    net = randomize(Calls(forward, first=first, second=block())).double().eval()
    result = bn.fold(net, IMAGES)
    assert type(result.model.first[1]) is nn.ReLU
    assert [item.layer for item in result.certificate.kept] == ["first.0"]
    torch.testing.assert_close(result.model(IMAGES), net(IMAGES), rtol=1e-9, atol=1e-10)


class Counting(nn.Module):
    """Decides by how often it was called."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return x.relu() if self.calls % 2 else x


class Scaling(nn.Module):
    """Has a tensor that is no buffer."""

    def __init__(self):
        super().__init__()
        self.scale = torch.tensor(2.0).double()

    def forward(self, x):
        return x * self.scale


def hooked():
    activation = nn.ReLU()
    activation.register_forward_hook(lambda module, args, y: y * 2)
    return activation


@pytest.mark.parametrize("make", [Counting, Scaling, hooked, nn.PReLU, lambda: nn.BatchNorm2d(3)])
def test_a_shared_module_with_a_state_or_hooks_is_one(make):
    net = sharing(make())
    with pytest.raises(SurgeryError, match=r"'second' shares 'second\.2' with other modules"):
        bn.fold(net, IMAGES)


@pytest.mark.parametrize("forward", [plain, called_activation])
def test_insert_leaves_an_activation_that_others_use(forward):
    net = network(forward, norm=False)
    if forward is plain:
        net.first[1] = net.second[1]
    original = copy.deepcopy(net)
    with pytest.raises(SurgeryError, match=r"its activation 'first\.1' is also used outside 'first'; give each"):
        bn.insert(net, IMAGES, placement="after_activation")
    assert net.state_dict().keys() == original.state_dict().keys()
    bn.insert(net, IMAGES)
    assert [name for name, module in net.named_modules() if isinstance(module, nn.BatchNorm2d)] == [
        "first.0.norm",
        "second.0.norm",
    ]


def test_where_no_part_folds_the_parts_are_named():
    def forward(self, x):
        return self.inner(x)

    def inner(self, x):
        return decide(self.norm(self.conv(x)))

    net = Calls(forward, inner=Calls(inner, conv=nn.Conv2d(3, 3, 3), norm=nn.BatchNorm2d(3))).double().eval()
    with pytest.raises(SurgeryError, match=r"Of its parts .* none folds: 'inner' cannot be captured \(torch\.fx: "):
        bn.fold(net, IMAGES)
    with pytest.raises(SurgeryError, match=r"insert: .*'inner' cannot be captured"):
        bn.insert(net, IMAGES)


def test_insert_takes_the_parts():
    net = network(plain, norm=False)
    original = copy.deepcopy(net)
    plan = plan_insertion(net, IMAGES, initialize="preserve")
    assert "behind 'first' is not known" in plan.skipped["first.2"]
    plan.apply()
    norms = [name for name, module in net.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms == ["first.0.norm", "second.0.norm"]
    torch.testing.assert_close(net.eval()(IMAGES), original(IMAGES), rtol=1e-6, atol=1e-6)
    bn.insert(original, IMAGES, only="first.2")
    assert isinstance(original.first[2].norm, nn.BatchNorm2d)


def test_insert_names_the_part_around_a_layer_that_is_asked_for():
    def forward(self, x):
        return decide(self.conv(self.first(x)))

    net = Calls(forward, first=block(False), conv=nn.Conv2d(3, 3, 1)).double()
    with pytest.raises(SurgeryError, match=r"'conv': the network, in which it is called, cannot be captured"):
        bn.insert(net, IMAGES, only="conv")
