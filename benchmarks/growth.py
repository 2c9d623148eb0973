"""How the time of BN + ReLU grows with samples, channels, space and threads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from . import wall
from .cases import Case
from .rows import Row

SWEEPS: dict[str, tuple[tuple[int, ...], ...]] = {
    "N": tuple((n, 64, 28, 28) for n in (1, 4, 16, 64, 256)),
    "C": tuple((32, c, 28, 28) for c in (1, 4, 16, 64, 256)),
    "space": tuple((32, 64, s, s) for s in (1, 3, 7, 14, 28, 56)),
}


def cases(quick: bool) -> list[tuple[str, Case]]:
    """What grows, and the case."""
    sweeps = {"N": SWEEPS["N"][:4]} if quick else SWEEPS
    return [
        (axis, Case(shape, fusion="bn+relu", threads=threads))
        for axis, shapes in sweeps.items()
        for shape in shapes
        for threads in thread_counts()
    ]


def thread_counts() -> tuple[int, ...]:
    return tuple(sorted({1, torch.get_num_threads()}))


def measure(axis: str, case: Case, seconds: float) -> Iterator[Row]:
    """Forward and backward of torch and of ours fused, on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        for row in wall.measure(replace(case, threads=0), ("torch", "ours fused"), seconds, suite="growth"):
            if row["direction"] == wall.BOTH:
                yield {**row, "axis": axis, "threads": case.threads}
    finally:
        torch.set_num_threads(before)
