"""Batch normalization as another framework's file or state holds it, in our words."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from batchnorm.errors import InputError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class ForeignBatchNorm:
    """One batch normalization of another framework.

    Args:
        name: its name there.
        mean: (C,), and
        var: (C,), of the kind that ``variance`` says.
        gamma: (C,), or None where it has none (Keras' ``scale=False``).
        beta: (C,), or None (``center=False``).
        decay: share of the *old* statistics.
        eps: added to the variance, inside the root.
        variance: "biased", "unbiased", or "fused", which is unbiased over images and volumes and biased elsewhere.
        running: "ema", or "debiased" where the framework divides by 1 - decay^t.
        batches: t, the number of batches that are in the statistics; None where the framework does not count.
        frozen: whether it is in inference mode in training as well (Keras' ``trainable=False``).
        loose: vectors that are gamma or beta, where the file does not say which.
        aliases: further names that it is known by.
        obstacle: a reason why training cannot go on here as it would there; None where it can.
        rank: the number of axes of its input, for formats whose vectors have as many.
    """

    name: str
    mean: Array
    var: Array
    gamma: Array | None
    beta: Array | None
    decay: float = 0.99
    eps: float = 1e-3
    variance: str = "biased"
    running: str = "ema"
    batches: int | None = None
    frozen: bool = False
    loose: tuple[Array, ...] = ()
    aliases: tuple[str, ...] = ()
    obstacle: str | None = None
    rank: int = 2

    def counter(self) -> int:
        """t for a framework that divides its averages by 1 - decay^t; of a plain average the t from which it is 1.

        Raises:
            InputError: the average is none that such a framework keeps.
        """
        if not 0 <= self.decay < 1:  # NaN of a cumulative average as well
            raise InputError(
                f"layer {self.name!r} averages with decay {self.decay}, or cumulatively; the framework's average needs "
                "a decay from 0 to below 1. Set layer.momentum to 1 - decay first"
            )
        if self.running == "debiased":
            return self.batches or 0
        return math.ceil(-30 * math.log(2) / math.log(self.decay)) if self.decay else 1

    def filled(self) -> list[Array]:
        """gamma, beta, mean and variance, with ones and zeros for a gamma and a beta that are missing."""
        gamma = np.ones_like(self.mean) if self.gamma is None else self.gamma
        beta = np.zeros_like(self.mean) if self.beta is None else self.beta
        return [gamma, beta, self.mean, self.var]


@dataclass(frozen=True)
class Checkpoint:
    """The batch normalizations of a file or a state, and what it was taken for.

    Args:
        framework: the key of the framework's row in `conventions.CONVENTIONS`.
        kind: the kind of file or state, in words.
        layers: the batch normalizations, in the order of the model where ``ordered``.
        ordered: whether their order is the model's.
        notes: what the file does not say and was assumed.
        doubtful: what may be a batch normalization or another layer; it is one if the caller names it.
    """

    framework: str
    kind: str
    layers: tuple[ForeignBatchNorm, ...]
    ordered: bool = True
    notes: tuple[str, ...] = field(default=())
    doubtful: tuple[ForeignBatchNorm, ...] = field(default=())

    def rows(self) -> list[dict[str, str]]:
        """One row of text a layer: what a table shows."""
        return [
            {
                "layer": f.name,
                "channels": str(f.mean.size),
                "trained": " ".join(_trained(f)) or "none",
                "decay": f"{f.decay:g}",
                "eps": f"{f.eps:g}",
                "variance": f.variance + (", debiased" if f.running == "debiased" else ""),
                "mean": _range(f.mean),
                "var": _range(f.var),
                "training here": f.obstacle or ("frozen" if f.frozen else "goes on alike"),
            }
            for f in self.layers
        ]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the vectors, as JSON takes it."""
        layers = [
            {
                "name": f.name,
                "channels": int(f.mean.size),
                "trained": _trained(f),
                "decay": None if f.decay != f.decay else f.decay,
                "eps": f.eps,
                "variance": f.variance,
                "running": f.running,
                "batches": f.batches,
                "frozen": f.frozen,
                "obstacle": f.obstacle,
                "mean": [float(f.mean.min()), float(f.mean.max())] if f.mean.size else [],
                "var": [float(f.var.min()), float(f.var.max())] if f.var.size else [],
            }
            for f in self.layers
        ]
        told = {"framework": self.framework, "kind": self.kind, "ordered": self.ordered, "notes": list(self.notes)}
        return {**told, "layers": layers}


def _trained(f: ForeignBatchNorm) -> list[str]:
    if f.loose:
        return ["gamma or beta"]
    return [name for name, vector in (("gamma", f.gamma), ("beta", f.beta)) if vector is not None]


def _range(vector: Array) -> str:
    return f"{vector.min():.3g} to {vector.max():.3g}" if vector.size else ""
