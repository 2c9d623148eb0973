"""Modules that a network calls several times fold by their own flow: siamese branches, heads over several levels."""

from __future__ import annotations

import pytest
import torch
from small_networks import Calls, randomize
from torch import nn
from torch.utils.checkpoint import checkpoint

import batchnorm as bn

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
OTHERS = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()


def branch():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4)
    )


def siamese(self, x, y):
    return self.head(self.branch(x) - self.branch(y))


def levels(self, x, y):
    return self.head(self.branch(x)), self.head(self.branch(x[..., 1:]))


def reading_shapes(self, x, y):
    return self.branch(x).flatten(1), self.branch(x[..., 1:, 1:]).flatten(1)


def reaching_in(self, x, y):
    return self.head(self.branch(x) - self.branch(y) + self.branch[0](y).mean())


def network(forward, inner=None):
    head = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    return randomize(Calls(forward, branch=inner or branch(), head=head)).double().eval()


class ByShape(nn.Module):
    """A forward that another size of the images would change."""

    def __init__(self):
        super().__init__()
        self.inner = branch()

    def forward(self, x):
        return self.inner(x) * 2 if x.shape[-1] > 7 else self.inner(x)


def pairs(certificate):
    return {(item.layer, item.into) for item in certificate.folded}


@pytest.mark.parametrize("forward", [siamese, levels])
def test_what_is_called_again_folds_and_is_verified_by_itself(forward):
    net = network(forward)
    example = (IMAGES, OTHERS)
    result = bn.fold(net, example)
    certificate = result.certificate
    inside = {("branch.1", "branch.0"), ("branch.4", "branch.3")}
    assert pairs(certificate) == inside | {("head.0", "head.1")}
    assert certificate.kept == ()
    assert set(certificate.parts) == ({"branch"} if forward is siamese else {"branch", "head"})
    assert any(d.output == "branch: output" for d in certificate.differences)
    assert certificate.proven
    torch.testing.assert_close(result.model(*example), net(*example), rtol=1e-9, atol=1e-10)
    swapped = (OTHERS, IMAGES)
    torch.testing.assert_close(result.model(*swapped), net(*swapped), rtol=1e-9, atol=1e-10)


def test_the_innermost_module_folds_where_shapes_decide_around_it():
    """`ByShape` is one graph for each shape; the branch in it is the same for all."""
    net = network(reading_shapes, ByShape())
    result = bn.fold(net, (IMAGES, OTHERS))
    assert result.certificate.parts == ("branch.inner",)
    assert len(result.certificate.folded) == 2
    torch.testing.assert_close(result.model(IMAGES, OTHERS), net(IMAGES, OTHERS), rtol=1e-9, atol=1e-10)


def test_a_layer_that_is_also_called_from_outside_stays():
    net = network(reaching_in)
    result = bn.fold(net, (IMAGES, OTHERS))
    assert pairs(result.certificate) == {("head.0", "head.1")}
    assert {item.layer for item in result.certificate.kept} == {"branch.1", "branch.4"}
    assert all(item.reason == "it is used 2 times" for item in result.certificate.kept)


def test_a_layer_called_again_by_the_network_itself_stays():
    def forward(self, x, y):
        return self.norm(self.conv(x)) + self.norm(self.conv(y))

    net = randomize(Calls(forward, conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4))).double().eval()
    (kept,) = bn.fold(net, (IMAGES, OTHERS)).certificate.kept
    assert (kept.layer, kept.reason) == ("norm", "it is used 2 times")


def test_a_checkpointed_branch_folds():
    """Its backward runs it once more."""

    def forward(self, x, y):
        return self.head(checkpoint(self.branch, x, use_reentrant=False) - self.branch(y))

    net = network(forward)
    result = bn.fold(net, (IMAGES, OTHERS))
    assert ("branch.1", "branch.0") in pairs(result.certificate)
    assert result.certificate.unseen == ()
    torch.testing.assert_close(result.model(IMAGES, OTHERS), net(IMAGES, OTHERS), rtol=1e-9, atol=1e-10)
