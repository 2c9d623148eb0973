"""What a certificate claims where the outputs do not depend on what was folded."""

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """A residual block whose last normalization starts from zero."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.b, self.m = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.m(self.b(self.n(self.a(x)).relu()))


def chain() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1)).eval()


def test_a_head_of_zeros_proves_nothing():
    net = chain()
    assert bn.fold(net, X).certificate.unseen == ()
    nn.init.zeros_(net[3].weight)
    certificate = bn.fold(net, X).certificate
    assert certificate.unseen == ("1",)
    assert not certificate.proven
    assert certificate.verdict.startswith("Not proven: no output depends on what was folded ('1')")
    assert "Not proven" in str(certificate)


def test_what_a_zero_gamma_hides_is_named():
    net = Block().eval()
    assert bn.fold(net, X).certificate.unseen == ()
    nn.init.zeros_(net.m.weight)
    certificate = bn.fold(net, X).certificate
    assert certificate.unseen == ("n",)
    assert certificate.proven
    assert certificate.verdict.endswith("They say nothing of 'n', on which no output depends.")


@pytest.mark.parametrize("change", [lambda y: y.argmax(1), lambda y: y.detach()], ids=["integers", "no gradient"])
def test_outputs_without_gradients_are_no_reason_for_doubt(change):
    class Last(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return change(x)

    certificate = bn.fold(chain().append(Last()), X).certificate
    assert certificate.unseen == ()
    assert certificate.proven


def test_an_output_without_a_gradient_shows_a_layer_too():
    class Two(nn.Module):
        """Where a class comes from one layer, and a score from another."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.n = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
            self.b, self.m = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.n(self.a(x))
            return y.argmax(1), self.m(self.b(x)) + 0 * y

    certificate = bn.fold(Two().eval(), X).certificate
    assert {item.layer for item in certificate.folded} == {"n", "m"}
    assert certificate.unseen == ()
