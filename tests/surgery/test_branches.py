"""Sums of branches become one convolution: the same function, one layer."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from small_networks import randomize
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import batchnorm as bn
from batchnorm.errors import SurgeryError

BY_RANK = {1: (nn.Conv1d, nn.BatchNorm1d), 2: (nn.Conv2d, nn.BatchNorm2d), 3: (nn.Conv3d, nn.BatchNorm3d)}


def branch(rank, inputs, outputs, kernel, **settings):
    conv, norm = BY_RANK[rank]
    return nn.Sequential(conv(inputs, outputs, kernel, **settings), norm(outputs))


class Block(nn.Module):
    """A block as in RepVGG: 3x3, 1x1 and, where the shapes allow it, the input itself."""

    def __init__(self, rank=2, inputs=4, outputs=4, stride=1, groups=1, dilation=1, bias=False, identity=True):
        super().__init__()
        same = {"stride": stride, "groups": groups, "bias": bias}
        self.wide = branch(rank, inputs, outputs, 3, padding=dilation, dilation=dilation, **same)
        self.point = branch(rank, inputs, outputs, 1, **same)
        self.skip = BY_RANK[rank][1](inputs) if identity else None
        self.act = nn.ReLU()
        self.stride = stride

    def forward(self, x):
        y = self.wide(x) + self.point(x)
        return self.act(y if self.skip is None else y + self.skip(x))


def convolutions(net):
    return [m for m in net.modules() if isinstance(m, nn.modules.conv._ConvNd)]


def check(net, x, merged):
    net = randomize(net).double().eval()
    result = bn.fold(net, x.double())
    assert len(result.certificate.merged) == merged
    torch.testing.assert_close(result.model(x.double()), net(x.double()), rtol=1e-11, atol=1e-11)
    return result


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"groups": 2, "bias": True},
        {"groups": 4},
        {"dilation": 2},
        {"outputs": 6, "stride": 2, "identity": False},
        {"inputs": 6, "outputs": 4, "groups": 2, "identity": False},
    ],
)
def test_a_block_becomes_one_convolution(rank, settings):
    result = check(Block(rank, **settings), torch.randn(2, settings.get("inputs", 4), *[7] * rank), 1)
    assert len(convolutions(result.model)) == 1
    assert not any(isinstance(m, _BatchNorm) for m in result.model.modules())
    (merged,) = result.certificate.merged
    assert merged.into == "wide.0"
    assert merged.branches[:2] == ("wide.0", "point.0")
    assert ("identity" in merged.branches) == settings.get("identity", True)
    assert {item.into for item in result.certificate.folded} == {"wide.0"}


class Scaled(nn.Module):
    """x + gamma (mixer(x) - norm(x)), as in FastViT; then a normalization of the sum, as in RepViT."""

    def __init__(self, channels=4):
        super().__init__()
        self.mixer = Block(2, channels, channels, groups=channels)
        self.mixer.act = nn.Identity()
        self.norm, self.last = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.gamma = nn.Parameter(torch.linspace(0.5, 2, channels).reshape(channels, 1, 1))

    def forward(self, x):
        return self.last(x + self.gamma * (self.mixer(x) - self.norm(x)))


def test_differences_scales_and_a_norm_of_the_sum():
    result = check(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), Scaled()), torch.randn(2, 3, 6, 6), 1)
    assert len(convolutions(result.model)) == 2
    assert not result.certificate.kept


def test_blocks_in_a_row_and_what_comes_after():
    net = nn.Sequential(Block(), Block(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5))
    result = check(net, torch.randn(2, 4, 8, 8), 2)
    assert [type(m).__name__ for m in convolutions(result.model)] == ["Conv2d"] * 3
    assert result.model[0].stride == 1  # what others may read stays


def test_the_folded_network_is_copied_pickled_and_trained():
    net = randomize(nn.Sequential(Block(), nn.Flatten(), nn.Linear(4 * 36, 2))).eval()
    folded = bn.fold(net, torch.randn(2, 4, 6, 6)).model
    x = torch.randn(3, 4, 6, 6)
    for twin in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))):
        assert torch.equal(twin(x), folded(x))
    folded.train()(x).sum().backward()
    assert all(p.grad is not None for p in folded.parameters())
    torch.testing.assert_close(torch.export.export(folded.eval(), (x,)).module()(x), folded(x))


class Exported(nn.Module):
    """Blocks with identities in their branches, in a forward that torch.export alone can follow."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        for block in self.blocks:
            block.wide.append(nn.Identity())
            block.point.append(nn.Identity())

    def forward(self, x):
        if not isinstance(x, torch.Tensor):
            raise TypeError("no tensor")
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("whole", [True, False])
def test_identities_in_the_branches_are_passed_over(whole):
    net = Exported() if whole else nn.Sequential(*Exported().blocks)
    result = check(net, torch.randn(2, 4, 6, 6), 2)
    assert len(convolutions(result.model)) == 2
    assert not result.certificate.kept


class Leaking(Block):
    def forward(self, x):
        y = self.point(x)
        return self.wide(x) + y + y.mean()


class Strided(Block):
    def __init__(self):
        super().__init__(identity=False)
        self.point[0].stride = self.wide[0].stride = (2, 2)
        self.wide[0].padding = (0, 0)
        self.point[0].padding = (0, 0)

    def forward(self, x):
        return self.wide(x) + self.point(x)[..., :-1, :-1]


class Reflecting(Block):
    def __init__(self):
        super().__init__()
        self.wide[0] = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")


@pytest.mark.parametrize(("kind", "size"), [(Leaking, 6), (Strided, 7), (Reflecting, 6)])
def test_what_is_no_single_convolution_stays_and_is_right(kind, size):
    check(kind(), torch.randn(2, 4, size, size), 0)


class Random(Block):
    def forward(self, x):
        if self.training:
            return self.wide(x)
        return super().forward(x)


def test_another_forward_in_training_is_told():
    net = randomize(nn.Sequential(Random(), nn.Conv2d(4, 4, 1))).eval()
    result = bn.fold(net, torch.randn(2, 4, 6, 6))
    assert not result.certificate.merged
    assert any("another one in training" in item.reason for item in result.certificate.kept) or not any(
        isinstance(m, _BatchNorm) for m in result.model.modules()
    )


def test_a_sum_without_normalization_is_left_alone():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            return torch.relu(self.a(x) + self.b(x)) + self.norm(torch.relu(x))

    result = check(Plain(), torch.randn(2, 4, 6, 6), 0)
    assert len(convolutions(result.model)) == 2


def test_a_network_in_training_mode_is_refused():
    with pytest.raises(SurgeryError, match="training mode"):
        bn.fold(Block(), torch.randn(2, 4, 6, 6))
    net = randomize(Block())
    result = bn.fold(bn.freeze(net).train(), torch.randn(2, 4, 6, 6))
    assert len(result.certificate.merged) == 1
