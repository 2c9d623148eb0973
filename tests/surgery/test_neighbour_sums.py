"""Folding through sums over neighbours: a scale goes into the weights before them, a shift into the bias behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from batchnorm import fold

NODES, EDGES = 12, 40
EXAMPLE = (torch.randn(NODES, 5, generator=torch.Generator().manual_seed(0)), torch.randint(0, NODES, (2, EDGES)))


class Graph(nn.Module):
    """A convolution on a graph, batch normalization and an activation."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.norm = nn.BatchNorm1d(width)
        with torch.no_grad():
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.5, 2)
            self.norm.weight.normal_()
            self.norm.bias.normal_()
        self.lin = nn.Linear(5, width, bias=False)
        self.bias = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return nn.functional.leaky_relu(self.norm(self.convolve(x, edges)), 0.5)

    def convolve(self, x: Tensor, edges: Tensor) -> Tensor:
        raise NotImplementedError


def summed(messages: Tensor, targets: Tensor) -> Tensor:
    index = targets.view(-1, *[1] * (messages.dim() - 1)).expand_as(messages)
    return messages.new_zeros(NODES, *messages.shape[1:]).scatter_add_(0, index, messages)


class Scattered(Graph):
    """GCN: messages are weighed by an edge's number, summed, and a bias is added."""

    def convolve(self, x: Tensor, edges: Tensor) -> Tensor:
        weights = torch.linspace(0.1, 1, EDGES).view(-1, 1)
        return summed(weights * self.lin(x).index_select(0, edges[0]), edges[1]) + self.bias


class IndexAdded(Graph):
    def convolve(self, x: Tensor, edges: Tensor) -> Tensor:
        messages = self.lin(x)[edges[0]]
        return torch.zeros(NODES, 6).index_add(0, edges[1], messages) / 3 + self.bias


class ByMatrix(Graph):
    """Kipf's: the weight is a parameter that x is multiplied by, the graph a sparse matrix."""

    def __init__(self, sparse: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 6))
        dense = (torch.rand(NODES, NODES) < 0.3).float()
        self.register_buffer("graph", dense.to_sparse() if sparse else dense)
        del self.lin

    def convolve(self, x: Tensor, edges: Tensor) -> Tensor:
        return torch.mm(self.graph, torch.mm(x, self.weight)) + self.bias


class OfTwo(Graph):
    """GraphSAGE: what neighbours say and what the node itself says, each through a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Linear(5, 6)

    def convolve(self, x: Tensor, edges: Tensor) -> Tensor:
        return self.lin(summed(x[edges[0]], edges[1])) - self.own(x)


class Attending(Graph):
    """GAT with two heads: the layer's output is also what attention looks at."""

    def __init__(self, together: bool = True) -> None:
        super().__init__(6 if together else 3)
        self.lin = nn.Linear(5, 6, bias=False)
        self.att = nn.Parameter(torch.randn(1, 2, 3))
        self.together = together

    def convolve(self, x: Tensor, edges: Tensor) -> Tensor:
        features = self.lin(x).view(NODES, 2, 3)
        attention = (features * self.att).sum(-1).sigmoid()
        out = summed(attention[edges[0]].unsqueeze(-1) * features[edges[0]], edges[1])
        return (out.view(NODES, 6) if self.together else out.mean(1)) + self.bias


class Gated(Graph):
    """A gate that is computed from another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(5, 6)

    def convolve(self, x: Tensor, edges: Tensor) -> Tensor:
        return summed((self.gate(x).sigmoid() * self.lin(x))[edges[0]], edges[1]) + self.bias


FOLDED: dict[str, tuple[Any, str]] = {
    "scatter": (Scattered, "bias, lin"),
    "index_add": (IndexAdded, "bias, lin"),
    "sparse": (ByMatrix, "bias, weight"),
    "dense": (lambda: ByMatrix(sparse=False), "bias, weight"),
    "two": (OfTwo, "lin, own"),
    "attention": (Attending, "bias, att, lin"),
    "mean of heads": (lambda: Attending(together=False), "bias, att, lin"),
    "gate": (Gated, "bias, lin"),
}


@pytest.mark.parametrize("name", FOLDED)
def test_scale_and_shift_are_in_weight_and_bias(name: str) -> None:
    make, into = FOLDED[name]
    net = make().eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    result = fold(net, EXAMPLE)
    assert [(item.layer, item.into) for item in result.certificate.folded] == [("norm", into)]
    assert not any(isinstance(module, nn.BatchNorm1d) for module in result.model.modules())
    twin = make().eval().double()
    twin.load_state_dict({key: value.double() if value.is_floating_point() else value for key, value in before.items()})
    truth = twin(EXAMPLE[0].double(), EXAMPLE[1]) if name != "index_add" else net(*EXAMPLE).double()
    error = (result.model(*EXAMPLE).double() - truth).abs().max() / truth.abs().max()
    assert error < 1e-6
    assert all(torch.equal(value.to_dense(), before[key].to_dense()) for key, value in net.state_dict().items())


class NoBias(Graph):
    def convolve(self, x: Tensor, edges: Tensor) -> Tensor:
        return summed(self.lin(x)[edges[0]], edges[1])


class BiasReadTwice(Graph):
    def convolve(self, x: Tensor, edges: Tensor) -> Tensor:
        return summed(self.lin(x)[edges[0]], edges[1]) + self.bias * self.bias.sum()


class SharedBias(Graph):
    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return super().forward(x, edges) + self.bias

    def convolve(self, x: Tensor, edges: Tensor) -> Tensor:
        return summed(self.lin(x)[edges[0]], edges[1]) + self.bias


class OneBiasForAll(Graph):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(1))

    def convolve(self, x: Tensor, edges: Tensor) -> Tensor:
        return summed(self.lin(x)[edges[0]], edges[1]) + self.bias


class Started(Graph):
    """The sum does not start from zero."""

    def convolve(self, x: Tensor, edges: Tensor) -> Tensor:
        messages = self.lin(x)[edges[0]]
        index = edges[1].view(-1, 1).expand_as(messages)
        return torch.ones(NODES, 6).scatter_add_(0, index, messages) + self.bias


class Largest(Graph):
    """The largest of the neighbours, where a scale is negative."""

    def convolve(self, x: Tensor, edges: Tensor) -> Tensor:
        messages = self.lin(x)[edges[0]]
        index = edges[1].view(-1, 1).expand_as(messages)
        found = messages.new_zeros(NODES, 6).scatter_reduce_(0, index, messages, "amax", include_self=False)
        return found + self.bias


class Looked(Graph):
    """What is summed is also looked at by a function that is not linear."""

    def convolve(self, x: Tensor, edges: Tensor) -> Tensor:
        features = self.lin(x)
        return summed((features.sigmoid() * features)[edges[0]], edges[1]) + self.bias


KEPT: dict[str, tuple[type[Graph], str]] = {
    "no bias": (NoBias, "passes a scale on and no shift; no bias is added behind it"),
    "bias read twice": (BiasReadTwice, "its input comes from"),
    "shared bias": (SharedBias, "the tensor bias, which is added, is no parameter that is read there alone"),
    "one number": (OneBiasForAll, "the tensor bias, which is added, has not one number a channel"),
    "start": (Started, "its input comes from a call of scatter_add"),
    "negative": (Largest, "a scale is negative, and a call of scatter_reduce takes the largest or smallest"),
    "looked at": (Looked, "the output of 'lin' also goes to a call of sigmoid"),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_stays_has_its_reason(name: str) -> None:
    make, reason = KEPT[name]
    net = make().eval()
    result = fold(net, EXAMPLE)
    (kept,) = result.certificate.kept
    assert reason in kept.reason
    torch.testing.assert_close(result.model(*EXAMPLE), net(*EXAMPLE))


def test_the_largest_of_neighbours_takes_positive_scales() -> None:
    net = Largest().eval()
    with torch.no_grad():
        net.norm.weight.abs_()
    assert [item.into for item in fold(net, EXAMPLE).certificate.folded] == ["bias, lin"]


def test_a_scale_of_zero_is_not_undone_in_attention() -> None:
    net = Attending().eval()
    with torch.no_grad():
        net.norm.weight[2] = 0
    (kept,) = fold(net, EXAMPLE).certificate.kept
    assert "also goes to a call of mul" in kept.reason


def test_normalization_of_a_sum_of_two_convolutions() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, stride=2, padding=1)
            self.norm = nn.BatchNorm2d(4)
            nn.init.normal_(self.norm.bias)
            nn.init.normal_(self.norm.running_mean)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.a(x)[..., ::2, ::2] + self.b(x))

    certificate = fold(Sum().eval(), torch.randn(2, 3, 8, 8)).certificate
    assert [item.layer for item in certificate.folded] == ["norm"]
