"""Theorems 4.1 and 4.2 of Santurkar et al. (2018), both sides: with eps = 0 they are equalities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from batchnorm import functional

NO_EPS = 5e-324  # the operator, as torch's, wants an eps above 0; with this one var + eps is var, to the bit


@dataclass(frozen=True)
class Sides:
    """Left and right side of a theorem, one value a channel (C,)."""

    left: Tensor
    right: Tensor

    @property
    def gap(self) -> float:
        """The largest |left - right| over the channels, divided by the largest side."""
        largest = torch.maximum(self.left.abs(), self.right.abs()).max()
        return float((self.left - self.right).abs().max() / largest)


def gradient_identity(x: Tensor, weight: Tensor, bias: Tensor, loss: Callable[[Tensor], Tensor], eps: float) -> Sides:
    """Theorem 4.1: what batch normalization does to the norm of the gradient.

    ``||dL/dx||^2 <= gamma^2/sigma^2 (||g||^2 - (1/m) (sum g)^2 - (1/m) <g, xhat>^2)`` with g = dL/dy, channel by
    channel; sigma^2 is the *biased* variance + eps. Two directions are taken out of the gradient, and it is scaled by
    gamma/sigma.

    Args:
        x: (m, C), a batch.
        weight, bias: gamma and beta (C,).
        loss: of the output y (m, C), a scalar.
        eps: with 0 the two sides are equal.
    """
    x = x.detach().requires_grad_()
    y = functional.batch_norm(x, None, None, weight, bias, training=True, eps=eps or NO_EPS)
    g, dx = torch.autograd.grad(loss(y), (y, x))
    m, scale, xhat = len(x), weight / (x.detach().var(0, correction=0) + eps).sqrt(), _normalized(x, eps)
    right = scale**2 * (g.square().sum(0) - g.sum(0) ** 2 / m - (g * xhat).sum(0) ** 2 / m)
    return Sides(dx.square().sum(0), right)


def smoothness_identity(x: Tensor, weight: Tensor, bias: Tensor, loss: Callable[[Tensor], Tensor], eps: float) -> Sides:
    """Theorem 4.2: what batch normalization does to the curvature of the loss along its gradient.

    ``u^T (d2L/dx2) u <= gamma^2/sigma^2 u^T H u - gamma/(m sigma^2) <g, xhat> ||u||^2`` with u = dL/dx of a channel,
    H = d2L/dy2 within the channel, g = dL/dy; sigma^2 is the *biased* variance + eps.

    Args: as for `gradient_identity`.
    """
    x = x.detach().requires_grad_()
    y = functional.batch_norm(x, None, None, weight, bias, training=True, eps=eps or NO_EPS)
    (u,) = torch.autograd.grad(loss(y), x, create_graph=True)
    left = _curvature(u, x, u.detach())
    z = y.detach().requires_grad_()
    (g,) = torch.autograd.grad(loss(z), z, create_graph=True)
    direction = u.detach()
    m, var = len(x), x.detach().var(0, correction=0) + eps
    inner = (g.detach() * _normalized(x, eps)).sum(0)
    right = weight**2 / var * _curvature(g, z, direction) - weight / (m * var) * inner * direction.square().sum(0)
    return Sides(left.detach(), right.detach())


def _curvature(gradient: Tensor, at: Tensor, direction: Tensor) -> Tensor:
    """direction^T H direction channel by channel, all other channels held fixed; (C,)."""
    parts = []
    for c in range(at.shape[1]):
        alone = torch.zeros_like(direction)
        alone[:, c] = direction[:, c]
        (product,) = torch.autograd.grad(gradient, at, alone, retain_graph=True)
        parts.append((product * alone).sum())
    return torch.stack(parts)


def _normalized(x: Tensor, eps: float) -> Tensor:
    x = x.detach()
    return (x - x.mean(0)) / (x.var(0, correction=0) + eps).sqrt()
