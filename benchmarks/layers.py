"""Layers drawn at random, as users have them: where ours is slower than torch, and in which kind of case.

The other suites have a few chosen inputs. This one draws sizes, dtypes, orders, activations and what is asked of the
layer, from seeds that anybody can repeat.
"""

from __future__ import annotations

import math
import random

from .cases import Case

BATCHES = (2, 3, 4, 8, 16, 32, 64, 128, 256)
CHANNELS = (3, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048)
SIDES = (1, 2, 3, 4, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 56, 64, 80, 112)
LENGTHS = (5, 16, 49, 100, 128, 400, 1000, 4000)
ROWS = (8, 32, 64, 128, 256, 1024, 4096, 16384)
DEPTHS = (1, 2, 4, 8, 16)
DTYPES = ("float32", "float32", "float32", "bfloat16", "bfloat16", "float16", "float64")
ACTIVATIONS = ("relu", "relu", "add+relu", "relu6", "leaky_relu", "silu", "gelu", "hardswish")
FUSIONS = ("bn", "bn", *(f"bn+{each}" for each in ACTIVATIONS))
MODES = ("training", "training", "training", "inference", "frozen")
"""What is asked: a step; evaluation; a backward through constant statistics, without gradients of gamma and beta."""

SMALLEST, LARGEST = 256, 4_000_000  # elements: from where a call is all, to where pages that are fetched decide


def _shape(draw: random.Random, dimensions: int) -> tuple[int, ...]:
    while True:
        batch, channels, side = draw.choice(BATCHES), draw.choice(CHANNELS), draw.choice(SIDES)
        shape: tuple[int, ...] = {
            0: (draw.choice(ROWS), channels),
            1: (batch, channels, draw.choice(LENGTHS)),
            2: (batch, channels, side, side),
            3: (batch, channels, draw.choice(DEPTHS), side, side),
        }[dimensions]
        if SMALLEST <= math.prod(shape) <= LARGEST and math.prod(shape) >= 8 * shape[1]:
            return shape


def cases(seed: int, count: int) -> list[tuple[Case, str]]:
    """`count` layers, each with what is asked of it, one of `MODES`; the same for the same seed."""
    draw, found = random.Random(seed), []
    for _ in range(count):
        dimensions = draw.choice((0, 1, 2, 2, 2, 2, 3))
        shape, dtype, fusion, mode = (
            _shape(draw, dimensions), draw.choice(DTYPES), draw.choice(FUSIONS), draw.choice(MODES),
        )  # fmt: skip
        last = dimensions > 1 and draw.random() < 0.5
        order = "dense" if dimensions == 0 else "channels_last" if last else "planar"
        if mode != "training":
            fusion = fusion.replace("+add", "")
        found.append((Case(shape, dtype, order, fusion), mode))
    return found
