"""What is measured: shapes, dtypes, memory orders, fusions."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

CONVOLUTIONS = ((32, 64, 112, 112), (32, 256, 56, 56), (32, 512, 28, 28), (32, 2048, 7, 7))
DENSE = (8192, 1024)
SMALL = ((256, 256), (64, 32))
FUSIONS = ("bn", "bn+relu", "bn+add+relu")
EPS = 1e-5


TURNED = ("sequences", "time first")
LYING = (*TURNED, "channels_last, dy planar", "planar, dy channels_last")
"""Orders that networks come to: (N, C, L) views of (N, L, C) and of (L, N, C); gradients in another order than x."""


@dataclass(frozen=True)
class Case:
    """One problem: `order` is "planar" (N, C, ...), "channels_last", "dense" (N, C), or one of `LYING`."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    order: str = "planar"
    fusion: str = "bn"
    threads: int = 0  # 0: torch's choice

    @property
    def activation(self) -> str | None:
        last = self.fusion.split("+")[-1]
        return None if last in ("bn", "add") else last

    @property
    def adds(self) -> bool:
        return "add" in self.fusion

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)  # type: ignore[no-any-return]

    @property
    def pool(self) -> int:
        """Values a channel."""
        return math.prod(self.shape) // self.shape[1]

    @property
    def bytes(self) -> int:
        """Of x."""
        return math.prod(self.shape) * self.torch_dtype.itemsize

    def columns(self) -> dict[str, Any]:
        """As a row names it."""
        return {"shape": list(self.shape), "dtype": self.dtype, "order": self.order, "fusion": self.fusion}


@dataclass(frozen=True, eq=False)
class Data:
    """The tensors of a case: x, residual and dy in its dtype and order, weight and bias (C,) in float32."""

    x: Tensor
    residual: Tensor
    dy: Tensor
    weight: Tensor
    bias: Tensor


@lru_cache(maxsize=1)
def _draw(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    x = normal(*shape).mul_(2).add_(1).to(dtype)
    return x, normal(*shape).to(dtype), normal(*shape).to(dtype), normal(shape[1]) + 1.5, normal(shape[1])


def draw(case: Case) -> Data:
    """The same numbers for every order and fusion."""
    x, residual, dy, weight, bias = _draw(case.shape, case.torch_dtype)
    last = torch.channels_last if len(case.shape) == 4 else torch.channels_last_3d
    if case.order.startswith("channels_last"):
        x, residual = (t.to(memory_format=last) for t in (x, residual))
    if case.order in ("channels_last", "planar, dy channels_last"):
        dy = dy.to(memory_format=last)
    if case.order in TURNED:
        x, residual, dy = (turned(turned(t, case.order).contiguous(), case.order, back=True) for t in (x, residual, dy))
    return Data(x, residual, dy, weight, bias)


def turned(t: Tensor, order: str, back: bool = False) -> Tensor:
    """(N, C, L) as (N, L, C) or (L, N, C), or these as that."""
    if order == "sequences":
        return t.transpose(1, 2)
    return t.permute(1, 2, 0) if back else t.permute(2, 0, 1)


def orders(shape: tuple[int, ...]) -> tuple[str, ...]:
    return ("planar", "channels_last") if len(shape) == 4 else ("dense",)


def grid(shapes: Iterable[tuple[int, ...]], dtypes: Iterable[str], fusions: Iterable[str]) -> list[Case]:
    """All cases, those with the same numbers and the same truth next to one another."""
    return [
        Case(shape, dtype, order, fusion)
        for shape, dtype, fusion in product(shapes, dtypes, fusions)
        for order in orders(shape)
    ]
