"""The settings that every verb of normalization takes beside its input and its statistics."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Fusion(NamedTuple):
    """The part after the statistics: ``activation((x - mean) / sqrt(var + eps) * weight + bias + residual)``.

    Attributes:
        weight: gamma (C,), or None for 1.
        bias: beta (C,), or None for 0.
        residual: like the input, or None.
        eps: added to the variance, inside the root.
        activation: its name, or None.
        slope: of "leaky_relu".

    What it gives out are methods, since Dynamo of torch 2.10 traces no property of a named tuple.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    eps: float = 1e-5
    activation: str | None = None
    slope: float = 0.01

    def tensors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """As the operators take them."""
        return self.weight, self.bias, self.residual

    def settings(self) -> tuple[float, str, float]:
        """eps, the activation's name ("identity" for none) and its slope."""
        return self.eps, self.activation or "identity", self.slope

    def with_residual(self, residual: Tensor | None) -> Fusion:
        """The same with that residual; not by `_replace`, beside whose result Dynamo of torch 2.11 breaks no graph."""
        return Fusion(self.weight, self.bias, residual, self.eps, self.activation, self.slope)

    def renormalized(self, r: Tensor, d: Tensor, dtype: torch.dtype) -> Fusion:
        """gamma r and gamma d + beta in place of gamma and beta: with these, batch normalization is renormalization.

        In float32 or wider: a bfloat16 gamma has too few digits to hold the product. Differentiable in gamma and beta.

        Args:
            r, d: the corrections (C,), float64.
            dtype: of the input.
        """
        weight, bias = self.weight, self.bias
        dtype = dtype if weight is None else weight.dtype
        if dtype in (torch.bfloat16, torch.float16):
            dtype = torch.float32
        gamma = None if weight is None else weight.to(r.dtype)
        scale, shift = (r, d) if gamma is None else (gamma * r, gamma * d)
        if bias is not None:
            shift = shift + bias.to(shift.dtype)
        return self._replace(weight=scale.to(dtype), bias=shift.to(dtype))
