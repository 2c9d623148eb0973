"""Theorems 4.1 and 4.2 of Santurkar et al. (2018): equalities at eps = 0, and what eps takes away."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from batchnorm.lab.theorems import gradient_identity, smoothness_identity

IDENTITIES = [gradient_identity, smoothness_identity]


def layer(seed, m, channels):
    """A batch, gamma, beta, and a loss of the output with a dense Hessian."""
    torch.manual_seed(seed)
    x = torch.randn(m, channels, dtype=torch.float64) * torch.rand(channels).double().add(0.5) + torch.randn(channels)
    head = nn.Sequential(nn.Tanh(), nn.Linear(channels, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    y = torch.randint(3, (m,))
    mix = torch.randn(m, m, dtype=torch.float64) / m  # samples act on each other, so H is no diagonal

    def loss(z):
        return nn.functional.cross_entropy(head(z + mix @ z.sin()), y)

    weight = torch.randn(channels, dtype=torch.float64)
    return x, weight, torch.randn(channels, dtype=torch.float64), loss


@pytest.mark.parametrize("identity", IDENTITIES)
@settings(max_examples=30)
@given(seed=st.integers(0, 1000), m=st.integers(3, 40), channels=st.integers(1, 4))
def test_equality_at_eps_zero(identity, seed, m, channels):
    sides = identity(*layer(seed, m, channels), eps=0.0)
    assert sides.left.shape == (channels,)
    assert sides.gap < 1e-9


def test_gradient_only_shrinks_with_eps():
    """<= holds for every eps: xhat is then shorter than sqrt(m), and less of g is taken out."""
    x, weight, bias, loss = layer(0, 12, 3)
    gaps = []
    for eps in (1e-8, 1e-4, 1e-2, 1.0):
        sides = gradient_identity(x, weight, bias, loss, eps)
        gaps.append(sides.gap)
    assert gaps == sorted(gaps)
    assert gaps[-1] > 1e-3
