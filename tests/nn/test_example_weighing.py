"""Inference example weighing against its formula, and the search for its weight."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm import reference
from batchnorm.errors import InputError

SHAPES = [(5, 3), (1, 3, 4), (5, 3, 7), (4, 3, 2, 5), (2, 3, 2, 2, 3)]
LAYERS = {2: bn.BatchNorm1d, 3: bn.BatchNorm1d, 4: bn.BatchNorm2d, 5: bn.BatchNorm3d}


def layer_for(shape: tuple[int, ...], weight: float, dtype: torch.dtype = torch.float64) -> nn.Module:
    layer = LAYERS[len(shape)](3, example_weight=weight, dtype=dtype).eval()
    with torch.no_grad():
        for name, tensor in layer.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(3).exp() if name == "running_var" else torch.randn(3))
    return layer


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weight", [0.0, 1 / 64, 0.3, 1.0])
@pytest.mark.parametrize("needs_grad", [True, False])
def test_is_the_papers_formula(shape: tuple[int, ...], weight: float, needs_grad: bool):
    """Through the kernels, and differentiably."""
    layer, x = layer_for(shape, weight), torch.randn(shape, dtype=torch.float64) * 2 + 1
    state = {k: v.numpy() for k, v in layer.state_dict().items()}
    want = reference.weigh_example(
        x.numpy(), state["running_mean"], state["running_var"], weight, state["weight"], state["bias"]
    )
    got = layer(x.requires_grad_(needs_grad)).detach().numpy()
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


def test_a_large_mean_does_not_cancel():
    layer, x = layer_for((4, 3, 50), 0.5, torch.float32), torch.randn(4, 3, 50) + 1e4
    layer.running_mean.fill_(1e4)
    want = reference.weigh_example(
        x.double().numpy(), layer.running_mean.numpy(), layer.running_var.numpy(), 0.5,
        layer.weight.detach().numpy(), layer.bias.detach().numpy(),
    )  # fmt: skip
    np.testing.assert_allclose(layer(x).detach().numpy(), want, atol=1e-2)


def test_gradients_count_the_examples_own_statistics():
    layer = layer_for((3, 3, 4), 0.3)
    x = torch.randn(3, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(layer, x)
    dy, grads = torch.randn_like(x), []
    for leaf in (x, x.detach()):
        layer.zero_grad()
        layer(leaf).backward(dy)
        grads.append([p.grad.clone() for p in layer.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_training_does_not_weigh_and_examples_do_not_mix():
    layer, x = layer_for((6, 3, 4), 0.3, torch.float32), torch.randn(6, 3, 4)
    plain = bn.BatchNorm1d(3)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer.train()(x), plain(x))
    together = layer.eval()(x)
    for i in range(6):
        torch.testing.assert_close(layer(x[i : i + 1]), together[i : i + 1])
    assert layer(x[:0]).shape == (0, 3, 4)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
def test_compiled_exported_and_copied():
    layer, x = layer_for((6, 3, 4), 0.3, torch.float32), torch.randn(6, 3, 4)
    expected = layer(x)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), expected)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    assert "example_weight=0.3" in repr(layer)
    with pytest.raises(InputError, match="example_weight must be"):
        layer.example_weight = 1.5


class Shifted(nn.Module):
    """A classifier whose validation examples have scales of their own, which the population does not know."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.norm = kind(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return torch.stack([h[:, 0, 0], -h[:, 0, 0]], 1) * 3


def shifted_batches(count: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    made = []
    for k in range(count):
        clean = torch.randn(8 + k, 2, 9)
        label = (clean[:, 0, 0] < 0).long()
        made.append((clean + torch.randn(8 + k, 2, 1) * 4, label))
    return made


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, bn.BatchNorm1d])
def test_the_weight_is_found_without_training(kind: type[nn.Module]):
    net, data = Shifted(kind).train(), shifted_batches()
    net.norm.running_var.fill_(17.0)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    weights = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
    curve = bn.tune_example_weight(net, data, weights=weights)
    samples, losses = sum(len(x) for x, _ in data), []
    for weight in weights:
        net.norm.example_weight = weight
        total = sum(nn.functional.cross_entropy(net.eval()(x), y, reduction="sum").item() for x, y in data)
        losses.append(total / samples)
    np.testing.assert_allclose(curve.losses, losses, rtol=1e-6)
    assert curve.weights == weights
    assert curve.best == weights[int(np.argmin(losses))]
    assert curve.best > 0
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_the_search_sets_the_weight_and_keeps_the_modes():
    net = Shifted(bn.BatchNorm1d).train()
    curve = bn.tune_example_weight(net, iter(shifted_batches()), loss=lambda out, batch: out.square().mean() * 0)
    assert net.norm.example_weight == curve.best == 0.0
    assert net.training
    assert net.norm.training


def test_a_search_that_fails_changes_nothing():
    net = Shifted(nn.BatchNorm1d).train()
    cases = [
        ([], {}, "no batches"),
        (shifted_batches(), {"weights": (0.5, 2.0)}, "expected numbers"),
        ([torch.randn(3, 2, 4)], {}, "give loss="),
        (shifted_batches(), {"loss": lambda out, batch: torch.tensor(math.nan)}, "NaN"),
    ]
    for data, options, reason in cases:
        with pytest.raises(InputError, match=reason):
            bn.tune_example_weight(net, data, **options)
        assert type(net.norm) is nn.BatchNorm1d
        assert net.norm.training
