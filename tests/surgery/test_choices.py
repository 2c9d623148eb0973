"""Networks that choose between values: what rounding alone decides is no difference of theirs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.errors import SurgeryError
from batchnorm.surgery.choices import choices, with_choices
from batchnorm.surgery.comparison import Example, distances
from batchnorm.surgery.rounding import Rounding

EPS = torch.finfo(torch.float32).eps


class Detector(nn.Module):
    """Two stages, as the detectors with queries have them: the places of the largest scores are decoded further."""

    def __init__(self, count: int = 8) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.SiLU()
        self.score, self.decode, self.count = nn.Conv2d(8, 1, 1), nn.Linear(1, 4), count

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        scores = self.score(self.act(self.norm(self.conv(x)))).flatten(1)
        values, places = scores.topk(self.count)
        return {"scores": values, "boxes": self.decode(places[..., None].to(x) / scores.shape[1])}


def alike(places: int = 32) -> Tensor:
    """An image whose places differ by a few units in the last place, so that rounding orders their scores."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(-8, 9, (2, 3, places, places), generator=generator)
    return torch.tensor([0.7, -0.4, 0.9])[:, None, None] * (1 + EPS * steps)


def detector() -> Detector:
    torch.manual_seed(0)
    net = Detector().eval()
    nn.init.normal_(net.norm.running_mean, 0, 0.2)
    nn.init.uniform_(net.norm.running_var, 0.5, 1.5)
    return net


def test_accelerate_takes_networks_whose_choices_rounding_decides():
    net, x = detector(), alike()
    before = net(x)
    with pytest.warns(UserWarning, match=r"rounding alone decides a choice there \(topk, whose values differ by "):
        bn.accelerate(net, x)
    after = net.eval()(x)
    assert net.report.fused == {"norm": "silu"}
    torch.testing.assert_close(after["scores"], before["scores"])
    assert not torch.allclose(after["boxes"], before["boxes"], rtol=1e-2)  # other places of equal scores


class Asks(nn.Module):
    """A question to values that weights scale, whose answer decides between two numbers that are far apart."""

    def __init__(self, ask: str, first: float, near: float = 0.1) -> None:
        super().__init__()
        self.ask, self.weight, self.near = ask, nn.Parameter(torch.tensor([first, 1.0])), near

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.weight
        return torch.tensor([self.near, 7.0])[self.place(y)] * y

    def place(self, y: Tensor) -> Tensor:
        first = y[..., :1]
        if self.ask == "argmax":
            return 1 - y.argmax(-1, keepdim=True)
        if self.ask == "sort":
            return 1 - y.sort(-1, descending=True).indices[..., :1]
        if self.ask == "ge":
            return (first >= 3).long()
        if self.ask == "floor":
            return first.floor().int() - 2
        if self.ask == "long":
            return first.long() - 2
        assert self.ask == "in place"
        return torch.zeros(first.shape, dtype=torch.long).copy_(first) - 2


X = torch.full((2, 2), 3.0)
BELOW, ABOVE = 1 - EPS, 1 + EPS


@pytest.mark.parametrize("ask", ["argmax", "sort", "ge", "floor", "long", "in place"])
def test_every_kind_of_choice_is_held(ask: str):
    before, after = Asks(ask, BELOW).requires_grad_(False), Asks(ask, ABOVE).requires_grad_(False)
    assert float((before(X) - after(X)).abs().max() / before(X).abs().max()) > 10
    with pytest.warns(
        UserWarning, match=r"verb: output differs by .* With the same choices the outputs differ by 3.0e-07"
    ):
        Rounding(before, Example.of(X)).compare(after, 1e-5, "verb")


@pytest.mark.parametrize("ask", ["argmax", "ge", "floor"])
@pytest.mark.parametrize(
    "edited",
    [{"first": 1.001}, {"first": ABOVE, "near": 0.11}, {"first": ABOVE, "ask": "long", "near": 7.0}],
    ids=["what is asked differs", "what is answered differs", "the question differs"],
)
def test_a_choice_excuses_no_other_difference(ask: str, edited: dict[str, Any]):
    own = Rounding(Asks(ask, BELOW), Example.of(X))
    with pytest.raises(SurgeryError, match="verb: output differs"):
        own.compare(Asks(**({"ask": ask} | edited)), 1e-5, "verb")


def test_a_mask_is_no_measure_for_the_values_beside_it():
    """A score of -1e38 for "never" would make every other difference small beside it."""

    class Masked(Asks):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.cat([x * self.weight, torch.full_like(x, -1e38)], -1)
            return torch.tensor([7.0, 0.1, 0.0, 0.0])[y.argmax(-1, keepdim=True)]

    own = Rounding(Masked("", BELOW), Example.of(X))
    with pytest.warns(UserWarning, match="argmax"):
        own.compare(Masked("", ABOVE), 1e-5, "verb")
    with pytest.raises(SurgeryError, match="differs"):
        own.compare(Masked("", 1.1), 1e-5, "verb")


def test_choices_are_noted_in_order_and_none_is_changed_in_the_same_network():
    net, x = detector(), Example.of(alike())
    noted = choices(net, x)
    assert [each.operator for each in noted] == ["aten::topk"]
    held = with_choices(net, x, noted)
    assert held is not None
    assert held.changed == ()
    assert held.apart == 0.0
    assert with_choices(net, x, noted[:0]) is None


@pytest.mark.filterwarnings("ignore:fold. output.*rounding alone decides a choice")
@torch.no_grad()
def test_fold_holds_the_choices_that_rounding_makes():
    net, x = detector(), alike()
    result = bn.fold(net, x)
    folded, proofs = result.model, result.certificate
    assert proofs.folded
    assert max(d.relative for d in proofs.differences if d.dtype == "float32") < 1e-5
    given = [x, torch.cat([x, x]), alike(24), alike(40)]
    assert max(float((net(each)["boxes"] - folded(each)["boxes"]).abs().max()) for each in given) > 0.01


def test_other_sizes_of_an_output_tell_of_limits():
    with pytest.raises(
        SurgeryError, match=r"output\['rows'\] has the shape \(3, 2\) .* has \(5, 2\).*a threshold, a match"
    ):
        distances({"rows": torch.ones(5, 2)}, {"rows": torch.ones(3, 2)})
    with pytest.raises(SurgeryError, match=r"output\[0\] has torch.float64 where the original has torch.float32"):
        distances((torch.ones(5),), (torch.ones(5).double(),))
