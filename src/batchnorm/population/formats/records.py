"""Batch normalization as another framework's file or state holds it, in our words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

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


@dataclass(frozen=True)
class Checkpoint:
    """The batch normalizations of a file or a state, and what it was taken for.

    Args:
        framework: the key of the framework's row in `conventions.CONVENTIONS`.
        kind: the kind of file or state, in words.
        layers: the batch normalizations, in the order of the model where ``ordered``.
        ordered: whether their order is the model's.
        notes: what the file does not say and was assumed.
    """

    framework: str
    kind: str
    layers: tuple[ForeignBatchNorm, ...]
    ordered: bool = True
    notes: tuple[str, ...] = field(default=())
